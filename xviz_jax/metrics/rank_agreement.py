"""Rank agreement of two attributions (Krishna et al., 2022, arXiv 2202.01602)."""

from typing import Any

import jax.numpy as jnp

from xviz_jax.metrics import similarity
from xviz_jax.metrics.measurement import Measurement, conclude
from xviz_jax.metrics.top_k_overlap import common


def rank_agreement(a: Any, b: Any, *, k: int) -> Measurement:
    """The share of the `k` largest magnitudes in common, and at the same rank.

    Describes; from 0 to `top_k_overlap`, whose rules it follows. Equal magnitudes have
    the mean of their ranks. Costs six sorts.

    Args:
      a: An `Attribution`, or scores of any shape.
      b: Another of the same shape.
      k: How many of the largest.

    Returns:
      The share, undefined where all magnitudes of one are equal.

    Raises:
      ValueError: If the shapes differ, or there are fewer than `k` scores.

    >>> a, b = jnp.array([3.0, 2.0, 1.0]), jnp.array([3.0, 1.0, 2.0])
    >>> float(rank_agreement(a, b, k=2).value)
    0.5
    """
    first, second, both = common("rank_agreement", a, b, k)
    ranks = [similarity.average_ranks(jnp.abs(each)) for each in (first, second)]
    same = jnp.where(ranks[0] == ranks[1], both, 0)
    checks = similarity.checks(jnp.abs(first), jnp.abs(second))
    return conclude(jnp.sum(same) / k, checks)
