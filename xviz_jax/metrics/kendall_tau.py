"""Kendall's tau-b of two attributions (Kendall, 1945)."""

from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import chunks
from xviz_jax.metrics import similarity
from xviz_jax.metrics.measurement import Measurement, conclude


def kendall_tau(a: Any, b: Any, *, chunk: int = 64) -> Measurement:
    """The share of pairs of features ranked alike less that ranked apart, -1 to 1.

    Describes; it is no evidence for either (Neely et al., 2022, arXiv 2205.04559).
    Tau-b: pairs that are equal in one are left out of its scale. Costs `features`
    squared comparisons, in memory of `chunk * features`.

    Args:
      a: An `Attribution`, or scores of any shape.
      b: Another of the same shape.
      chunk: How many features are compared with all at once.

    Returns:
      The correlation, undefined where all scores of one are equal.

    Raises:
      ValueError: If the shapes differ, or the chunk does not fit.

    >>> a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 3.0, 2.0])
    >>> round(float(kendall_tau(a, b).value), 4)
    0.3333
    """
    chunks.positive(chunk, "chunk")
    first, second = similarity.pair("kendall_tau", a, b)

    def against(place: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        one, other = (_order(each[place], each) for each in (first, second))
        return jnp.sum(one * other), jnp.sum(one != 0), jnp.sum(other != 0)

    rows = chunks.each(against, jnp.arange(len(first)), chunk)
    # Each row's count is exact; so is their sum in float32, up to 4,096 features.
    alike, untied, other_untied = (jnp.sum(row.astype(jnp.float32)) for row in rows)
    value = alike / jnp.sqrt(untied) / jnp.sqrt(other_untied)
    return conclude(jnp.clip(value, -1, 1), similarity.checks(first, second))


def _order(one: jax.Array, others: jax.Array) -> jax.Array:
    """Whether a score is above, 1, or below, -1, each of the others."""
    # Differences overflow and vanish; comparisons do not.
    return (one > others).astype(jnp.int32) - (one < others).astype(jnp.int32)
