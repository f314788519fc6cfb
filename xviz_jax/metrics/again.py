"""Runs the method itself again, at another input, for another class or model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.metrics.features import flattened
from xviz_jax.metrics.measurement import Reason


def check(name: str, explain: Any) -> None:
    """Raises ValueError unless `explain` can be called."""
    if not callable(explain):
        raise ValueError(
            f"`{name}` runs the method again: pass `explain=`, what the method "
            f"returned, got {explain!r}"
        )


def scores(
    explain: Callable, args: Sequence[Any], target: Any, key: Any, like: Any
) -> jax.Array:
    """The method's scores in a row, float32.

    Raises:
      ValueError: If they are not shaped like the scores that are judged.
    """
    found = explain(*args, target=target, key=key).scores
    shapes = [
        [jnp.shape(leaf) for leaf in jax.tree.leaves(each)] for each in (found, like)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`explain` gives scores of {shapes[0]}, but those it is to be compared "
            f"with have {shapes[1]}: bring both to one form"
        )
    return flattened(found)


def finite(*rows: jax.Array) -> tuple[Reason, jax.Array]:
    """Whether some of the scores are not finite."""
    bad = [~jnp.all(jnp.isfinite(row)) for row in rows]
    return Reason.SCORES_NOT_FINITE, jnp.any(jnp.stack(bad))
