"""Area between perturbation curves (Schulz et al., 2020, arXiv 2001.00396).

So named, and used for transformers, by Achtibat et al., 2024, arXiv 2402.05602.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from xviz_jax import chunks
from xviz_jax.attribution import Target
from xviz_jax.metrics import curves, imputers
from xviz_jax.metrics.features import Output, check_output, prepare
from xviz_jax.metrics.measurement import Measurement, Metric, conclude


def abpc(
    model: Callable,
    *,
    imputer: imputers.Imputer | None = None,
    groups: Any = None,
    output: Output = "logit",
    steps: int = 16,
    chunk: int = 8,
    argnums: int = 0,
) -> Metric:
    """The area between taking the lowest and taking the highest scores away first.

    Both curves, LeRF and MoRF, run over the same fractions of features gone, from the
    whole input to nothing of it, so that part of what is due to unseen inputs cancels:
    a random order has an expected value of 0. Equals `insertion` less `deletion`. In
    units of the output. Costs `2 * steps` forward passes; memory grows with `chunk`
    only.

    Args:
      model: Maps one example to logits; any JAX function.
      imputer: What takes the place of absent features, of `xv.metrics.imputers`; None
        for zeros (of tokens, their embeddings).
      groups: The number of the feature that each element belongs to, as for
        `deletion`. By default every element, or token, is a feature.
      output: What is measured of the logits: `logit`, the explained scalar itself;
        `probability`, that of the class; `margin`, its logit less the largest other.
      steps: Points of each curve after the first, equally spaced but for whole
        features; at most one for each feature.
      chunk: How many inputs are evaluated at once.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, higher is better. Its details are `fraction`, of features gone,
      `morf` and `lerf`, all `[steps + 1]`. In both, equal scores are taken in one
      order, by number, as if the order had no ties.

    Raises:
      ValueError: If an option, the scores, groups, target or input does not fit.

    >>> measure = abpc(lambda x: jnp.sum(x)[None])
    >>> x = jnp.array([1.0, 3.0])
    >>> float(measure(x, x).value)  # 4, 3, 0 less 4, 1, 0
    1.0
    """
    chunks.positive(steps, "steps")
    chunks.positive(chunk, "chunk")
    check_output(output)
    taken = imputers.check(imputer)

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        seen = prepare("abpc", model, args, argnums, target, groups, taken, output)
        gone = curves.sizes(seen.count, steps)
        inner, left = gone[1:-1], seen.count - gone[1:-1]
        found = curves.values(seen, key, chunk, remove=gone[1:], keep=left)
        falling, rising = found[: len(inner) + 1], found[len(inner) + 1 :]
        # The curves share both ends.
        morf = jnp.concatenate([seen.output[None], falling])
        lerf = jnp.concatenate([seen.output[None], rising, falling[-1:]])
        fraction = gone / seen.count
        return conclude(
            curves.area(fraction, lerf - morf),
            [*seen.checks(found), seen.equal],
            fraction=jnp.asarray(fraction, jnp.float32),
            morf=morf,
            lerf=lerf,
        )

    needs = frozenset({"key"} if taken.random else ())
    return Metric("abpc", "higher", needs, measure)
