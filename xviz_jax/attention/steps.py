"""Layers of attention over several sequences, one by one, in the order they run.

As of an encoder and its decoder, or of a text and an image. Each layer writes to the
sequence of its queries and reads that of its keys, both as they were when its operands
were made.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from xviz_jax.attention import masking, queries, stack
from xviz_jax.attention.stack import Layer
from xviz_jax.attention.streams import Streams
from xviz_jax.tracing import Site
from xviz_jax.tracing.sequences import Run


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer of attention.

    Attributes:
      layer: What was read of it.
      turn: Which turn of the loop around it.
      query: The sequence of its queries, to which it writes.
      key: That of its keys.
      own: How many of the layers that write to `query` its queries were made after.
      other: How many of those that write to `key` its keys were.
    """

    layer: Layer
    turn: int
    query: str
    key: str
    own: int = 0
    other: int = 0


def in_turn(found: list[Layer], streams: Streams, start_layer: int) -> list[Step]:
    """Layers one by one, in the order they run, without the first `start_layer`.

    Raises:
      ValueError: If none would be left, or if layers run beside each other.
    """
    every: list[Step] = []
    for layer in found:
        for number in range(layer.length):
            turn = sum(step.layer.site is layer.site for step in every)
            one = stack.pick([layer], number)
            every.append(Step(one, turn, *streams.of[layer.site.name]))
    stack.check_start(len(every), start_layer)
    writers: dict[str, list[Step]] = {name: [] for name in streams.lengths}
    steps = []
    for step in every[start_layer:]:
        own = _made_after(step, "query", streams, writers[step.query])
        other = _made_after(step, "key", streams, writers[step.key])
        latest = (own, other) if step.query == step.key else (own,)
        for seen in latest:
            if seen < len(writers[step.query]):
                beside = writers[step.query][seen].layer.site.name
                raise ValueError(
                    f"{step.layer.site.name!r} runs beside {beside!r} and not after "
                    "it; this method takes layers of one sequence one after another"
                )
        steps.append(dataclasses.replace(step, own=own, other=other))
        writers[step.query].append(step)
    return steps


def check_order(sites: tuple[Site, ...]) -> None:
    """Refuses loops of which the turns of all sites have no one order."""
    for site in sites:
        if len(stack.turning(site)) > 1:
            raise ValueError(
                f"{site.name!r} lies in a loop inside a loop, of which the order of "
                "layers over several sequences is not told"
            )


def by_keys(
    found: list[Layer],
    streams: Streams,
    start_layer: int,
    of_layer: Callable[[Layer, jax.Array], jax.Array],
) -> dict[str, jax.Array]:
    """What each position is given as a key, by each layer that attends to it.

    Args:
      found: Layers in the order they run.
      streams: The sequences.
      start_layer: The first layer taken along.
      of_layer: Takes a layer, or several alike, and equal weights of its queries;
        gives float32 `[layers, keys]`.

    Returns:
      Of each sequence `[layers, length]`; no layers where none attends to it.
    """
    given: dict[str, list[jax.Array]] = {
        name: [jnp.zeros((0, length), jnp.float32)]
        for name, length in streams.lengths.items()
    }
    for layer in stack.since(found, start_layer):
        query, key = streams.of[layer.site.name]
        given[key].append(of_layer(layer, uniform(found, streams, query)))
    return {name: jnp.concatenate(each) for name, each in given.items()}


def uniform(found: list[Layer], streams: Streams, stream: str) -> jax.Array:
    """Equal weights of a sequence's rows but padding's, float32 `[length]`."""
    return queries.shares(attended(found, streams, stream))


def attended(found: list[Layer], streams: Streams, stream: str) -> jax.Array:
    """Which positions of a sequence any query may attend, bool `[length]`.

    Told by the first layer in which it attends to itself, or else is attended to; all
    of one that never is.
    """
    pairs = [(streams.of[layer.site.name], layer) for layer in found]
    own = [layer for pair, layer in pairs if pair == (stream, stream)]
    own += [layer for (_, key), layer in pairs if key == stream]
    if own:
        return masking.attended(own[:1])
    return jnp.ones(streams.lengths[stream], bool)


def _made_after(step: Step, side: str, streams: Streams, writers: list[Step]) -> int:
    """How many of the layers that wrote to a sequence an operand was made after."""
    run = streams.runs[step.layer.site.name, side]
    seen = [_was_before(step, run, writer) for writer in writers]
    return seen.index(False) if False in seen else len(seen)


def _was_before(step: Step, run: Run, writer: Step) -> bool:
    site, other = step.layer.site, writer.layer.site
    loops = other.order[:-2] if stack.is_chunked(other) else other.order[:-1]
    if any((other.name, loop) in run.stacked for loop in loops):
        raise ValueError(
            f"{site.name!r} reads what a loop stacks of {other.name!r}; this method "
            "does not tell of which turns"
        )
    # Of positions that were not followed further, all that they were made of.
    now = run.now | {name for name, again in run.upstream if not again}
    earlier = run.earlier | {name for name, again in run.upstream if again}
    together = other.order[:-1] == site.order[:-1]
    if together and writer.turn == step.turn and stack.turning(site):
        return other.name in now
    return other.name in now | earlier
