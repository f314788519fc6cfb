"""Relevance rank accuracy (Arras et al., 2020, arXiv 2003.07258)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from xviz_jax.attribution import Target
from xviz_jax.metrics.features import mask_checks, pointed
from xviz_jax.metrics.measurement import Measurement, Metric, Reason, conclude
from xviz_jax.metrics.similarity import top_share


def relevance_rank(
    model: Callable | None = None,
    *,
    groups: Any = None,
    argnums: int = 0,
) -> Metric:
    """The share of a mask that the highest scores fill, as many as it has features.

    For inputs whose cause is known; only the order counts. From 0 to 1, and the mask's
    share of the input by chance, the detail `chance`. Scores that are equal at the edge
    share the places there. Costs one sort.

    Args:
      model: Not run; here so that all metrics have one form.
      groups: The number of the feature that each element belongs to, as for
        `deletion`. By default scores are taken as they are, whatever their shape.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, higher is better, called with `mask=`: nonzero inside, shaped like the
      leading axes of the scores (with groups, of the input), or `[features]`. A feature
      is inside if at least half of it is. Undefined where the mask is empty or covers
      everything, or all scores are equal.

    Raises:
      ValueError: If the scores, groups or mask do not fit, or there is no mask.

    >>> x = jnp.array([1.0, 3.0, 2.0])
    >>> float(relevance_rank()(x, x, mask=jnp.array([1, 1, 0])).value)
    0.5
    """
    del model

    def measure(
        *args: Any, target: Target = None, key: Any = None, mask: Any
    ) -> Measurement:
        del target, key
        row, inside = pointed("relevance_rank", args, argnums, groups, mask)
        size = jnp.maximum(jnp.sum(inside), 1)
        filled = jnp.where(inside, top_share(row, size), 0)
        equal = (Reason.NO_VARIANCE, jnp.max(row) == jnp.min(row))
        chance = jnp.mean(inside.astype(jnp.float32))
        checks = [*mask_checks(row, inside), equal]
        value = jnp.sum(filled) / size.astype(jnp.float32)
        return conclude(value, checks, chance=chance)

    return Metric("relevance_rank", "higher", frozenset({"mask"}), measure)
