"""Complexity (Bhatt et al., 2020, arXiv 2005.00631)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.attribution import Target
from xviz_jax.metrics.features import grouped
from xviz_jax.metrics.measurement import Measurement, Metric, Reason, conclude


def complexity(
    model: Callable | None = None,
    *,
    groups: Any = None,
    argnums: int = 0,
) -> Metric:
    """The entropy of the shares of the magnitudes, in nats: 0 if one feature has all.

    Describes: a simple attribution is short to read, not correct. At most the logarithm
    of the number of features. Costs next to nothing.

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

    >>> x = jnp.ones(4)
    >>> round(float(complexity()(x, x).value), 4)  # the logarithm of 4
    1.3863
    """
    del model

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        del target, key
        row = grouped("complexity", args, argnums, groups)
        # At the size of 1, the sum does not overflow.
        size = jnp.abs(row) / jnp.max(jnp.abs(row))
        share = size / jnp.sum(size)
        checks = [
            (Reason.SCORES_NOT_FINITE, ~jnp.all(jnp.isfinite(row))),
            (Reason.ALL_ZERO, jnp.all(row == 0)),
        ]
        return conclude(jnp.sum(jax.scipy.special.entr(share)), checks)

    return Metric("complexity", None, frozenset(), measure)
