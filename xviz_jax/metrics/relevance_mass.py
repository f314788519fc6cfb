"""Relevance mass accuracy (Arras et al., 2020, arXiv 2003.07258)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from xviz_jax.attribution import Target
from xviz_jax.metrics.features import mask_checks, pointed
from xviz_jax.metrics.measurement import Measurement, Metric, Reason, conclude


def relevance_mass(
    model: Callable | None = None,
    *,
    groups: Any = None,
    argnums: int = 0,
) -> Metric:
    """The share of the positive scores that lies inside a mask, from 0 to 1.

    For inputs whose cause is known; negative scores count as zero. Of a scattering of
    equal scores it is the mask's share of the input, the detail `chance`. Costs next to
    nothing.

    Args:
      model: Not run; here so that all metrics have one form.
      groups: The number of the feature that each element belongs to, as for
        `deletion`. By default scores are taken as they are, whatever their shape.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, higher is better, called with `mask=`: nonzero inside, shaped like the
      leading axes of the scores (with groups, of the input), or `[features]`. A feature
      is inside if at least half of it is. Undefined where the mask is empty or covers
      everything, or no score is positive.

    Raises:
      ValueError: If the scores, groups or mask do not fit, or there is no mask.

    >>> x = jnp.array([1.0, 3.0, -2.0])
    >>> float(relevance_mass()(x, x, mask=jnp.array([0, 1, 1])).value)
    0.75
    """
    del model

    def measure(
        *args: Any, target: Target = None, key: Any = None, mask: Any
    ) -> Measurement:
        del target, key
        row, inside = pointed("relevance_mass", args, argnums, groups, mask)
        # At the size of 1, the sum does not overflow.
        positive = jnp.maximum(row, 0) / jnp.max(jnp.abs(row))
        share = jnp.sum(jnp.where(inside, positive, 0)) / jnp.sum(positive)
        none = (Reason.NONE_POSITIVE, ~jnp.any(row > 0))
        chance = jnp.mean(inside.astype(jnp.float32))
        return conclude(share, [*mask_checks(row, inside), none], chance=chance)

    return Metric("relevance_mass", "higher", frozenset({"mask"}), measure)
