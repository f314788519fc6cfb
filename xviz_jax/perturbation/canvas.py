"""An input of which places along the leading axes are shown or hidden."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attribution import At, Target


@dataclasses.dataclass(frozen=True)
class Canvas:
    """One array whose places are hidden behind a baseline.

    Attributes:
      shape: The shape of the input, or of the tokens.
      output: The explained scalar at the input, float32.
      value: Maps how much of each place is shown, from 0 to 1 or bool, along any
        number of leading axes, to the explained scalar. Further axes are shown and
        hidden whole.
    """

    shape: tuple[int, ...]
    output: jax.Array
    value: Callable[[jax.Array], jax.Array]

    def scores(self, places: jax.Array) -> jax.Array:
        """Spreads scores of places over the axes that they have in common."""
        return jnp.broadcast_to(_trailing(places, len(self.shape)), self.shape)

    def sizes(self, given: int | Sequence[int], name: str) -> tuple[int, ...]:
        """One positive size for each leading axis.

        Args:
          given: One number stands for two axes, or as many as there are.
          name: The option it was given by.

        Raises:
          ValueError: If there are more sizes than axes, or one is not positive.
        """
        axes = min(2, len(self.shape))
        sizes = (given,) * axes if isinstance(given, int) else tuple(given)
        if not 0 < len(sizes) <= len(self.shape) or min(sizes) < 1:
            raise ValueError(
                f"`{name}` is positive, for leading axes of {self.shape}; got {given}"
            )
        return sizes


def prepare(
    method: str,
    model: Callable,
    args: Sequence[Any],
    argnums: int,
    target: Target,
    at: At,
    baseline: Any,
) -> Canvas:
    """Sets up the canvas of an input.

    Raises:
      ValueError: If the input is not one array with axes; as `attribution.ask` and
        `attribution.start` do.
    """
    question = attribution.ask(model, args, argnums, at)
    whole = question.x if question.tokens is None else question.tokens
    if not hasattr(whole, "shape") or not whole.shape:
        raise ValueError(
            f"`{method}` takes one array with axes, got {jax.tree.structure(whole)} "
            f"of {[jnp.shape(leaf) for leaf in jax.tree.leaves(whole)]}"
        )

    begin = attribution.start(baseline, question)
    output, scalar = question.fix(target)

    def value(shown: jax.Array) -> jax.Array:
        def mix(leaf: jax.Array, other: jax.Array) -> jax.Array:
            share = jnp.broadcast_to(_trailing(shown, leaf.ndim), leaf.shape)
            if share.dtype == bool:
                return jnp.where(share, leaf, other)
            hidden = other.astype(jnp.float32)
            way = leaf.astype(jnp.float32) - hidden
            return (hidden + share * way).astype(leaf.dtype)

        return scalar(jax.tree.map(mix, question.x, begin))

    return Canvas(whole.shape, output, value)


def _trailing(array: jax.Array, ndim: int) -> jax.Array:
    return array.reshape(array.shape + (1,) * (ndim - array.ndim))
