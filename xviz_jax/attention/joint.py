"""Rows carried through attention over several sequences, from the last to the first.

As in a model of one sequence whose positions are those of all (Ferrando et al., 2022,
arXiv 2205.11631, section 3).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp

from xviz_jax.attention import layers, queries, rows, steps
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.sites import readable
from xviz_jax.attention.stack import Layer
from xviz_jax.attention.steps import Step
from xviz_jax.attention.streams import Streams
from xviz_jax.tracing import pooling
from xviz_jax.tracing.program import Program

Query = queries.Query | Mapping[str, queries.Query | None] | None
Asked = TypeVar("Asked", queries.Query, queries.Query | None)


@dataclasses.dataclass(frozen=True)
class Walk:
    """A model of several sequences that was run, and which rows are asked for.

    Attributes:
      output: What the model said.
      streams: Its sequences.
      steps: Its layers in the order they run.
      stream: The sequence that is explained.
      start: Weights of its rows, float32 `[length]`; or `[length, length]`, each row by
        itself, padding's zero.
    """

    output: jax.Array
    streams: Streams
    steps: list[Step]
    stream: str
    start: jax.Array

    @property
    def top(self) -> int:
        """How many layers write to the explained sequence."""
        return sum(step.query == self.stream for step in self.steps)


def read(
    program: Program,
    streams: Streams,
    query: Query,
    fusion: Fusion,
    scalar: Callable[[jax.Array], jax.Array] | None = None,
    start_layer: int = 0,
) -> Walk:
    """Runs a model of several sequences.

    Args:
      program: The model, traced.
      streams: Its sequences.
      query: Rows of the sequence that the output is read from, or by its name of
        another; None for all of them.
      fusion: How heads are fused, inside the model where that is possible.
      scalar: As for `layers.capture`.
      start_layer: The first layer taken along.

    Raises:
      ValueError: If the output is read from several sequences and `query` names
        none, if all rows are asked for with gradients, if attention leads from there
        to only some, or if layers run beside each other.
    """
    sites = readable(program.sites)
    steps.check_order(sites)
    stream, query = _explained(streams, query)
    if query is None and scalar is not None:
        raise ValueError("`query` is a position or weights of rows, got None")
    _check_reached(streams, stream)
    keep = fusion.inside(query)
    output, found = layers.capture_of(program, sites, scalar, keep=keep)
    start = _start(program, found, streams, stream, query)
    every = steps.in_turn(found, streams, start_layer)
    return Walk(output, streams, every, stream, start)


def of_one(query: Asked | Mapping[str, Asked]) -> Asked:
    """What is asked of a model of one sequence.

    Raises:
      ValueError: If it names a sequence.
    """
    if isinstance(query, Mapping):
        raise ValueError(
            f"`query` names a sequence where there are several, got {query!r} for "
            "a model of one"
        )
    return query


def propagate(
    walk: Walk,
    fusion: Fusion,
    *,
    residual: Literal["add"] | float,
    normalize: bool,
) -> dict[str, jax.Array]:
    """The explained rows, carried from the last layer to the first.

    Args:
      walk: As `read` gives it.
      fusion: How heads are fused.
      residual: As for `rows.propagate`.
      normalize: As there.

    Returns:
      What they have of each sequence, float32 `[length]` or `[rows, length]`.
    """
    kept, mixed = rows.shares(residual)
    # Of each sequence, after so many of the layers that write to it.
    carried = {(walk.stream, walk.top): walk.start}
    for step in reversed(walk.steps):
        row = carried.pop((step.query, step.own + 1), None)
        if row is None:
            continue
        fused = rows.fused(step.layer, fusion)
        if normalize and not fusion.keeps_sums:
            total = kept + mixed * fused.sums()
            row = row / jnp.where(total == 0, 1, total)
        passed = mixed * fused.through(row)
        for place, part in (
            ((step.query, step.own), kept * row),
            ((step.key, step.other), passed),
        ):
            carried[place] = carried[place] + part if place in carried else part
    shape = walk.start.shape[:-1]
    return {
        name: carried.get((name, 0), jnp.zeros((*shape, length), jnp.float32))
        for name, length in walk.streams.lengths.items()
    }


def mass(scores: Mapping[str, jax.Array]) -> jax.Array:
    """The sum of the scores of all sequences, of each row."""
    return sum((jnp.sum(s, axis=-1) for s in scores.values()), jnp.float32(0))


def diagnostics(walk: Walk, scores: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`mass`, the sum of all scores, and `self_share`, the explained position's own."""
    own = jnp.sum(scores[walk.stream] * walk.start, axis=-1)
    return {"mass": mass(scores), "self_share": own}


def _explained(streams: Streams, query: Query) -> tuple[str, queries.Query | None]:
    if isinstance(query, Mapping):
        if len(query) != 1 or not set(query) <= set(streams.lengths):
            raise ValueError(
                f"`query` names one of the sequences {list(streams.lengths)}, got "
                f"{list(query)}"
            )
        return next(iter(query.items()))
    if len(streams.read) != 1:
        raise ValueError(
            f"the output is read from the sequences {list(streams.read)}: name one, as "
            f"in `query={{{next(iter(streams.lengths))!r}: 0}}`"
        )
    return streams.read[0], query


def _check_reached(streams: Streams, stream: str) -> None:
    reached = [stream]
    for name in reached:
        keys = [key for query, key in streams.of.values() if query == name]
        reached += [key for key in dict.fromkeys(keys) if key not in reached]
    missing = [name for name in streams.lengths if name not in reached]
    if missing:
        raise ValueError(
            f"no attention leads from the sequence {stream!r} to {missing}: this "
            "method does not see how they act on it"
        )


def _start(
    program: Program,
    found: list[Layer],
    streams: Streams,
    stream: str,
    query: queries.Query | None,
) -> jax.Array:
    length = streams.lengths[stream]
    if query is None:
        return jnp.diag(steps.attended(found, streams, stream).astype(jnp.float32))
    if isinstance(query, str):
        if query == "mean":
            return steps.uniform(found, streams, stream)
        if query != "pooled" or streams.read != (stream,):
            raise ValueError(
                f"`query` is a position or weights of the {length} positions of "
                f"{stream!r}, 'mean', or 'pooled' where the output reads it alone, got "
                f"{query!r}"
            )
        return queries.weights_of_rows(pooling.weights(program), length)
    return queries.of_named(query, length)
