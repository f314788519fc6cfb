"""Spearman's rank correlation of two attributions (Spearman, 1904)."""

from typing import Any

from xviz_jax.metrics import similarity
from xviz_jax.metrics.measurement import Measurement, conclude


def spearman(a: Any, b: Any) -> Measurement:
    """How alike two attributions of one input rank its features, from -1 to 1.

    Describes; two methods that agree can both be wrong, and two that are right need
    not agree. Equal scores have the mean of their ranks. Costs two sorts.

    Args:
      a: An `Attribution`, or scores of any shape.
      b: Another of the same shape.

    Returns:
      The correlation, undefined where all scores of one are equal.

    Raises:
      ValueError: If the shapes differ.

    >>> import jax.numpy as jnp
    >>> float(spearman(jnp.array([1.0, 2.0, 9.0]), jnp.array([0.0, 0.1, 0.2])).value)
    1.0
    """
    first, second = similarity.pair("spearman", a, b)
    value = similarity.spearman(first, second)
    return conclude(value, similarity.checks(first, second))
