"""Sparseness (Chalasani et al., 2020, arXiv 1810.06583)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from xviz_jax.attribution import Target
from xviz_jax.metrics.features import grouped
from xviz_jax.metrics.measurement import Measurement, Metric, Reason, conclude


def sparseness(
    model: Callable | None = None,
    *,
    groups: Any = None,
    argnums: int = 0,
) -> Metric:
    """The Gini index of the magnitudes: 0 if all are equal, near 1 if one stands out.

    Describes: a sparse attribution is short to read, not correct. Costs one sort.

    Args:
      model: Not run; here so that all metrics have one form.
      groups: The number of the feature that each element belongs to, as for
        `deletion`. By default scores are taken as they are, whatever their shape.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, of which neither direction is better. Undefined where all scores are
      zero.

    Raises:
      ValueError: If the scores or groups do not fit.

    >>> x = jnp.array([0.0, 0.0, 0.0, 2.0])
    >>> float(sparseness()(x, x).value)
    0.75

    Source: Hurley and Rickard, 2009, arXiv 0811.4706.
    """
    del model

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        del target, key
        row = grouped("sparseness", args, argnums, groups)
        size = jnp.sort(jnp.abs(row))
        # At the size of 1, the sum does not overflow.
        size = size / jnp.max(size)
        place = jnp.arange(1, len(row) + 1, dtype=jnp.float32)
        weight = (2 * place - len(row) - 1) / len(row)
        checks = [
            (Reason.SCORES_NOT_FINITE, ~jnp.all(jnp.isfinite(row))),
            (Reason.ALL_ZERO, jnp.all(row == 0)),
        ]
        return conclude(jnp.sum(weight * size) / jnp.sum(size), checks)

    return Metric("sparseness", None, frozenset(), measure)
