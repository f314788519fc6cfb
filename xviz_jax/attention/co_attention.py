"""Relevance through attention over several sequences.

Chefer, Gur and Wolf, 2021 (arXiv 2103.15679), equations 5 to 11: co-attention, as of a
text and an image, and encoders with decoders. Every map is held.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from xviz_jax.attention import layers, queries, rows, stack
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.sites import readable
from xviz_jax.attention.stack import Layer
from xviz_jax.attention.streams import Streams
from xviz_jax.tracing import Site
from xviz_jax.tracing.program import Program
from xviz_jax.tracing.sequences import Run

# Of one sequence, its relevance to each that has reached it, `[own, other]`.
Relevance = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer of attention: a site, and which turn of the loop around it."""

    site: Site
    turn: int
    layer: Layer


def relevance(
    program: Program,
    streams: Streams,
    scalar: Callable[[jax.Array], jax.Array],
    query: queries.Query | Mapping[str, queries.Query],
    start_layer: int,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """The explained row of the relevance of each sequence.

    Args:
      program: A traced model.
      streams: Its sequences.
      scalar: Of the model's output, what is explained.
      query: As for `attention_relevance`.
      start_layer: The first layer taken along.

    Returns:
      The output, scores of each sequence, and diagnostics.

    Raises:
      ValueError: If the output is read from several sequences and `query` names
        none, if attention leads from there to only some, or if layers run beside
        each other.
    """
    sites = readable(program.sites)
    for site in sites:
        if len(stack.turning(site)) > 1:
            raise ValueError(
                f"{site.name!r} lies in a loop inside a loop, of which the order of "
                "layers over several sequences is not told"
            )
    stream, query = _explained(streams, query)
    _check_reached(streams, stream)
    output, found = layers.capture_maps(program, sites, scalar)
    start = _start(found, streams, stream, query)
    states = _States(streams)
    steps = _steps(found)
    stack.check_start(len(steps), start_layer)
    for step in steps[start_layer:]:
        states.take(step)
    last = states.of(stream)
    share = queries.row_weights(start, streams.lengths[stream])
    scores = {
        name: jnp.matmul(share, last[name], precision="highest")
        if name in last
        else jnp.zeros(length, jnp.float32)
        for name, length in streams.lengths.items()
    }
    mass = sum(map(jnp.sum, scores.values()), jnp.float32(0))
    own = jnp.sum(scores[stream] * share)
    return output, scores, {"mass": mass, "self_share": own}


def _explained(
    streams: Streams, query: queries.Query | Mapping[str, queries.Query]
) -> tuple[str, queries.Query]:
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
    found: list[Layer], streams: Streams, stream: str, query: queries.Query
) -> int | jax.Array:
    length = streams.lengths[stream]
    own = [layer for layer in found if streams.of[layer.site.name] == (stream, stream)]
    if isinstance(query, str) and query == "mean" and own:
        return queries.uniform(own[:1])
    if isinstance(query, str):
        raise ValueError(
            f"`query` is a position or weights of the {length} positions of "
            f"{stream!r}, or 'mean' of one that attends to itself, got {query!r}"
        )
    if jnp.ndim(query) == 1:
        return queries.weights_of_rows(query, length)
    queries.one_hot(query, length)
    return query


def _steps(found: list[Layer]) -> list[Step]:
    """Layers one by one, in the order they run."""
    steps: list[Step] = []
    for layer in found:
        for number in range(layer.length):
            turn = sum(step.site is layer.site for step in steps)
            steps.append(Step(layer.site, turn, stack.pick([layer], number)))
    return steps


class _States:
    """The relevance of each sequence after each layer that wrote to it."""

    def __init__(self, streams: Streams):
        self.streams = streams
        self.states: dict[str, list[Relevance]] = {
            name: [{name: jnp.eye(length, dtype=jnp.float32)}]
            for name, length in streams.lengths.items()
        }
        self.writers: dict[str, list[Step]] = {name: [] for name in streams.lengths}

    def of(self, stream: str) -> Relevance:
        return self.states[stream][-1]

    def take(self, step: Step) -> None:
        """One layer, by equations 6 and 7, or 10 and 11."""
        query, key = self.streams.of[step.site.name]
        own, other = self._seen(step, "query", query), self._seen(step, "key", key)
        for side, seen, name in (("query", own, query), ("key", other, key)):
            if (side == "query" or query == key) and seen < len(self.writers[name]):
                beside = self.writers[name][seen].site.name
                raise ValueError(
                    f"{step.site.name!r} runs beside {beside!r} and not after it; this "
                    "method takes layers of one sequence one after another"
                )
        weights = rows.matrix(step.layer, Fusion(relevance="relu_gradient_x_attention"))
        before, attended = self.states[query][own], self.states[key][other]
        after = dict(before)
        for name, reached in attended.items():
            if name == key != query:
                left, right = _normalized(before[query]), _normalized(reached)
                moved = _product(left.T, _product(weights, right))
            else:
                moved = _product(weights, reached)
            after[name] = before[name] + moved if name in before else moved
        self.states[query].append(after)
        self.writers[query].append(step)

    def _seen(self, step: Step, side: str, stream: str) -> int:
        """How many of the layers that wrote to a sequence an operand was made after."""
        run = self.streams.runs[step.site.name, side]
        seen = [_was_before(step, run, writer) for writer in self.writers[stream]]
        return seen.index(False) if False in seen else len(seen)


def _was_before(step: Step, run: Run, writer: Step) -> bool:
    if run.cut:
        # Its positions were not followed further; the sequences were given by name.
        return True
    name = writer.site.name
    together = writer.site.order[:-1] == step.site.order[:-1]
    if together and writer.turn == step.turn and stack.turning(step.site):
        return name in run.now
    return name in run.now | run.earlier


def _normalized(relevance: jax.Array) -> jax.Array:
    """Equations 8 and 9; a row that has nothing but the identity stays as it is."""
    identity = jnp.eye(len(relevance), dtype=jnp.float32)
    rest = relevance - identity
    total = jnp.sum(rest, axis=-1, keepdims=True)
    return rest / jnp.where(total == 0, 1, total) + identity


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision="highest")
