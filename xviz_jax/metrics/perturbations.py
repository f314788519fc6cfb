"""Small moves of an input, drawn at random or by the caller."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# A size, or a function `(x, key)` that returns moves `[samples, *x.shape]`.
Perturbation = float | Callable[[Any, jax.Array], Any]


def check(name: str, perturbation: Any) -> None:
    """Raises ValueError unless it is a function, or a number above zero."""
    if not callable(perturbation) and not perturbation > 0:
        raise ValueError(
            f"`{name}` takes a size above zero, or a function, got {perturbation!r}"
        )


def moves(
    perturbation: Perturbation,
    x: Any,
    samples: int,
    key: jax.Array,
    draw: Callable[..., jax.Array],
) -> Any:
    """Several moves of an input, a pytree of `[samples, *leaf.shape]`.

    Args:
      perturbation: A function that returns them, or their size.
      x: A pytree of float arrays.
      samples: How many, of a size.
      key: A PRNG key.
      draw: `draw(key, shape)` gives moves of size 1, float32.

    Raises:
      ValueError: If the input is not made of floats, or what a function returns does
        not fit it.
    """
    leaves, tree = jax.tree.flatten(x)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise ValueError(
            f"only floats can be moved, got {[str(leaf.dtype) for leaf in leaves]}"
        )
    if not callable(perturbation):
        keys = jax.random.split(key, len(leaves))
        drawn = [
            perturbation * draw(own, (samples, *leaf.shape))
            for own, leaf in zip(keys, leaves, strict=True)
        ]
    else:
        moved = perturbation(x, key)
        drawn = [jnp.asarray(leaf) for leaf in jax.tree.leaves(moved)]
        found, wanted = [d.shape for d in drawn], [leaf.shape for leaf in leaves]
        counts = {shape[:1] for shape in found}
        same = jax.tree.structure(moved) == tree and len(counts) == 1
        if not same or [shape[1:] for shape in found] != wanted or counts == {(0,)}:
            raise ValueError(
                "a perturbation returns `[samples, *x.shape]` for an input of "
                f"{wanted}, got {found}"
            )
    cast = [new.astype(leaf.dtype) for new, leaf in zip(drawn, leaves, strict=True)]
    return jax.tree.unflatten(tree, cast)
