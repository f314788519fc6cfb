"""Curves of a model's output as features go, or come, in the order of their scores."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import chunks
from xviz_jax.metrics.features import Features


def places(scores: jax.Array) -> jax.Array:
    """Each feature's place from the highest score, 0, down; of equal ones by number."""
    return jnp.argsort(jnp.argsort(-scores, stable=True), stable=True)


def sizes(count: int, steps: int) -> np.ndarray:
    """How many features have gone at each point of a curve, from 0 to all."""
    steps = min(steps, count)
    return np.array([(2 * n * count + steps) // (2 * steps) for n in range(steps + 1)])


def values(
    features: Features,
    key: Any,
    chunk: int,
    remove: np.ndarray | None = None,
    keep: np.ndarray | None = None,
) -> jax.Array:
    """The output at each of several sizes, all in one compiled body.

    Args:
      features: The input.
      key: A PRNG key, if the imputer needs one.
      chunk: How many inputs are evaluated at once.
      remove: For how many features of the highest scores are absent.
      keep: For how many of these alone are present.

    Returns:
      float32 `[sizes]`, those of `remove` first.
    """
    order = places(features.scores)
    removed = np.zeros(0, np.int32) if remove is None else np.asarray(remove, np.int32)
    kept = np.zeros(0, np.int32) if keep is None else np.asarray(keep, np.int32)
    sizes = jnp.asarray(np.concatenate([removed, kept]))
    keeps = jnp.asarray(np.arange(len(sizes)) >= len(removed))

    def value(item: tuple[jax.Array, jax.Array, Any]) -> jax.Array:
        size, keeping, own = item
        return features.value((order < size) == keeping, own)

    return chunks.each(value, (sizes, keeps, features.keys(key, len(sizes))), chunk)


def area(fraction: np.ndarray, curve: jax.Array) -> jax.Array:
    """The area under a curve, by trapezoids."""
    width = jnp.asarray(np.diff(fraction), jnp.float32)
    return jnp.sum(width * (curve[1:] + curve[:-1]) / 2)
