"""ROAD, remove and debias (Rong et al., 2022, arXiv 2202.00449)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from xviz_jax import chunks
from xviz_jax.attribution import Target
from xviz_jax.metrics import curves, imputers
from xviz_jax.metrics.features import prepare
from xviz_jax.metrics.measurement import Measurement, Metric, conclude


def road(
    model: Callable,
    *,
    fractions: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    noise: float = 0.01,
    axes: Sequence[int] = (0, 1),
    groups: Any = None,
    chunk: int = 8,
    argnums: int = 0,
) -> Metric:
    """How long the prediction stays the target as an image's highest scores go.

    The share of `fractions` at which the class is still the predicted one, whose mean
    over many images is the area under the paper's curve. What is taken away is painted
    over from its neighbours (`imputers.noisy_linear`), so that the shape of the hole
    tells little of the class, and no model is trained again. Costs one forward pass and
    one system of linear equations for each fraction, and two forward passes more.

    Args:
      model: Maps one image to logits; any JAX function.
      fractions: Of the features taken away, from above 0 to below 1, rounded to whole
        features.
      noise: Standard deviation of the noise on what is painted over, in units of the
        input.
      axes: The two axes of the grid.
      groups: The number of the feature that each element belongs to, as for
        `deletion`. By default every element is a feature, each channel by itself;
        `lambda x: xv.patches(x.shape, 1)` takes whole pixels.
      chunk: How many images are evaluated at once.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, lower is better, that needs a `key`. Its details are `fraction`, of
      features gone after rounding, and `kept`, 1 where the class is still predicted,
      both `[fractions]`, and `margin`, `[fractions + 1]`, of the whole image first: the
      class's logit less the largest other one.

    Raises:
      ValueError: If there is no key, the target is not a class, the input is not an
        image, or an option, the scores or the groups does not fit.
    """
    chunks.positive(chunk, "chunk")
    taken = imputers.noisy_linear(noise, axes)
    shares = np.asarray(fractions, np.float64)
    if shares.ndim != 1 or not len(shares) or not ((shares > 0) & (shares < 1)).all():
        raise ValueError(f"`fractions` are between 0 and 1, got {fractions}")

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        if callable(target) or isinstance(target, tuple | list):
            raise ValueError(f"`road` is for a target that is a class, got {target}")
        seen = prepare("road", model, args, argnums, target, groups, taken, "margin")
        sizes = np.floor(shares * seen.count + 0.5).astype(int)
        # With nothing left too, a model that nothing changes is told from scores that
        # miss what does.
        found = curves.values(seen, key, chunk, remove=np.array([seen.count, *sizes]))
        margin = found[1:]
        kept = (margin >= 0).astype(jnp.float32)
        return conclude(
            jnp.mean(kept),
            [*seen.checks(found), seen.equal],
            fraction=jnp.asarray(sizes / seen.count, jnp.float32),
            kept=kept,
            margin=jnp.concatenate([seen.output[None], margin]),
        )

    return Metric("road", "lower", frozenset({"key", "image"}), measure)
