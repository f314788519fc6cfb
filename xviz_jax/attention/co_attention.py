"""Relevance through attention over several sequences.

Chefer, Gur and Wolf, 2021 (arXiv 2103.15679), equations 5 to 11: co-attention, as of a
text and an image, and encoders with decoders. One fused map of each layer is held, and
a matrix for each pair of sequences.
"""

import jax
import jax.numpy as jnp

from xviz_jax.attention import rows
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.joint import Walk
from xviz_jax.attention.steps import Step
from xviz_jax.attention.streams import Streams

# Of one sequence, its relevance to each that has reached it, `[own, other]`.
Relevance = dict[str, jax.Array]


def relevance(walk: Walk, fusion: Fusion) -> dict[str, jax.Array]:
    """The explained row of the relevance of each sequence."""
    states = _States(walk.streams, fusion)
    for step in walk.steps:
        states.take(step)
    last = states.of[walk.stream][-1]
    return {
        name: _product(walk.start, last[name])
        if name in last
        else jnp.zeros(length, jnp.float32)
        for name, length in walk.streams.lengths.items()
    }


class _States:
    """The relevance of each sequence after each layer that wrote to it."""

    def __init__(self, streams: Streams, fusion: Fusion):
        self.fusion = fusion
        self.of: dict[str, list[Relevance]] = {
            name: [{name: jnp.eye(length, dtype=jnp.float32)}]
            for name, length in streams.lengths.items()
        }

    def take(self, step: Step) -> None:
        """One layer, by equations 6 and 7, or 10 and 11."""
        weights = rows.matrix(step.layer, self.fusion)
        before, attended = self.of[step.query][step.own], self.of[step.key][step.other]
        after = dict(before)
        for name, reached in attended.items():
            if name == step.key != step.query:
                left, right = _normalized(before[step.query]), _normalized(reached)
                moved = _product(left.T, _product(weights, right))
            else:
                moved = _product(weights, reached)
            after[name] = before[name] + moved if name in before else moved
        self.of[step.query].append(after)


def _normalized(relevance: jax.Array) -> jax.Array:
    """Equations 8 and 9; a row that has nothing but the identity stays as it is."""
    identity = jnp.eye(len(relevance), dtype=jnp.float32)
    rest = relevance - identity
    total = jnp.sum(rest, axis=-1, keepdims=True)
    return rest / jnp.where(total == 0, 1, total) + identity


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision="highest")
