"""How alike two rows of scores are. NaN where that is undefined, never 0."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from xviz_jax.metrics.features import flattened, rounding
from xviz_jax.metrics.measurement import Reason

Similarity = Literal["spearman", "pearson", "cosine"]


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """The cosine of the angle between two vectors.

    Args:
      a: float32 `[n]`.
      b: The same.
    """
    # At the size of 1, squares neither overflow nor vanish.
    a, b = (each / jnp.max(jnp.abs(each)) for each in (a, b))
    return jnp.clip(jnp.sum(a * b) / jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b)), -1, 1)


def pearson(a: jax.Array, b: jax.Array) -> jax.Array:
    """The linear correlation; undefined where one varies by no more than rounding.

    Args:
      a: float32 `[n]`.
      b: The same.
    """

    def away(each: jax.Array) -> jax.Array:
        moved = each - jnp.mean(each)
        return jnp.where(jnp.max(jnp.abs(moved)) <= rounding(each), jnp.nan, moved)

    return cosine(away(a), away(b))


def spearman(a: jax.Array, b: jax.Array) -> jax.Array:
    """The linear correlation of ranks; equal scores have the mean of their ranks.

    Args:
      a: float32 `[n]`, finite.
      b: The same.
    """
    return pearson(average_ranks(a), average_ranks(b))


_SIMILARITIES = {"spearman": spearman, "pearson": pearson, "cosine": cosine}


def named(similarity: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The function of that name.

    Raises:
      ValueError: If there is none.
    """
    if similarity not in _SIMILARITIES:
        raise ValueError(
            f"`similarity` is one of {list(_SIMILARITIES)}, got {similarity!r}"
        )
    return _SIMILARITIES[similarity]


def average_ranks(scores: jax.Array) -> jax.Array:
    """Ranks from 1, the lowest, up; equal scores have the mean of their ranks."""
    ordered = jnp.sort(scores)
    below = jnp.searchsorted(ordered, scores, side="left", method="sort")
    through = jnp.searchsorted(ordered, scores, side="right", method="sort")
    return (below + through + 1).astype(jnp.float32) / 2


def top_share(scores: jax.Array, k: Any) -> jax.Array:
    """How much of each score is among the `k` highest, float32, summing to `k`.

    Scores equal to the lowest of these share the places that are left, so that no
    position is favoured.

    Args:
      scores: `[n]`, finite.
      k: From 1 to n; may be traced.
    """
    last = jnp.sort(scores)[len(scores) - k]
    above, level = scores > last, scores == last
    share = (k - jnp.sum(above)) / jnp.sum(level)
    return jnp.where(above, 1.0, jnp.where(level, share, 0.0)).astype(jnp.float32)


def pair(name: str, a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """The scores of two attributions in rows, float32.

    Raises:
      ValueError: If their shapes differ.
    """
    first, second = (getattr(each, "scores", each) for each in (a, b))
    shapes = [
        [jnp.shape(leaf) for leaf in jax.tree.leaves(each)] for each in (first, second)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`{name}` compares scores of one shape, got {shapes[0]} and {shapes[1]}"
        )
    return flattened(first), flattened(second)


def checks(*scores: jax.Array) -> list[tuple[Reason, jax.Array]]:
    """What makes every comparison of rows of scores undefined."""
    finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(each)) for each in scores]))
    equal = jnp.any(jnp.array([jnp.max(each) == jnp.min(each) for each in scores]))
    return [(Reason.SCORES_NOT_FINITE, ~finite), (Reason.NO_VARIANCE, equal)]
