"""Top-k overlap of two attributions (Krishna et al., 2022, arXiv 2202.01602)."""

from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import chunks
from xviz_jax.metrics import similarity
from xviz_jax.metrics.measurement import Measurement, conclude


def top_k_overlap(a: Any, b: Any, *, k: int) -> Measurement:
    """The share of the `k` largest magnitudes that two attributions have in common.

    Also called feature agreement. Describes; from 0 to 1, and `k / features` by chance.
    Magnitudes that are equal at the edge share the places there, so that no position
    is favoured. Costs two sorts.

    Args:
      a: An `Attribution`, or scores of any shape.
      b: Another of the same shape.
      k: How many of the largest.

    Returns:
      The share, undefined where all magnitudes of one are equal.

    Raises:
      ValueError: If the shapes differ, or there are fewer than `k` scores.

    >>> a, b = jnp.array([3.0, 2.0, 1.0]), jnp.array([3.0, -1.0, -2.0])
    >>> float(top_k_overlap(a, b, k=2).value)
    0.5
    """
    first, second, both = common("top_k_overlap", a, b, k)
    checks = similarity.checks(jnp.abs(first), jnp.abs(second))
    return conclude(jnp.sum(both) / k, checks)


def common(name: str, a: Any, b: Any, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Both rows of scores, and how much of each feature is among both top k."""
    first, second = similarity.pair(name, a, b)
    if chunks.positive(k, "k") > len(first):
        raise ValueError(f"`k` is at most the number of scores, {len(first)}, got {k}")
    tops = [similarity.top_share(jnp.abs(each), k) for each in (first, second)]
    return first, second, jnp.minimum(*tops)
