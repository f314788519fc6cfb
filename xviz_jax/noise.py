"""Normal noise on inputs, and on the embeddings of tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# A standard deviation, or a function of the input that returns it.
Noise = float | Callable[[Any], Any]


def add(tree: Any, noise: Noise, key: jax.Array) -> Any:
    """Adds independent normal noise to every element, drawn in float32.

    Args:
      tree: A pytree of float arrays.
      noise: Its standard deviation, or a function of the tree that returns it.
      key: A PRNG key.
    """
    width = jnp.asarray(noise(tree) if callable(noise) else noise).astype(jnp.float32)
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    moved = [
        (leaf.astype(jnp.float32) + width * jax.random.normal(own, leaf.shape))
        for leaf, own in zip(leaves, keys, strict=True)
    ]
    cast = [new.astype(leaf.dtype) for new, leaf in zip(moved, leaves, strict=True)]
    return jax.tree.unflatten(structure, cast)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoisyTokens:
    """Stands for an argument of tokens whose embeddings get noise.

    Methods that explain embeddings take it in place of the tokens; a model does not.

    Attributes:
      tokens: Integers.
      key: The noise's PRNG key.
      noise: As for `add`; a function is given the embeddings, as a dict by the name
        of their table where there are several.
    """

    tokens: jax.Array
    key: jax.Array
    noise: Noise = dataclasses.field(metadata={"static": True})

    def shake(self, embeddings: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The embeddings of the tokens, with their noise."""
        if len(embeddings) > 1:
            return add(embeddings, self.noise, self.key)
        ((name, only),) = embeddings.items()
        return {name: add(only, self.noise, self.key)}
