"""A model's self-attention as a list of layers.

A layer is kept as queries and keys, from which its map is made again tile by tile,
unless the map is small, or is more than a softmax of their product.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.attention.sites import named, of_one_sequence
from xviz_jax.attention.stack import Layer, in_order, is_chunked, pick
from xviz_jax.tracing import Site, blocks
from xviz_jax.tracing.activation import ActivationValues, block_input
from xviz_jax.tracing.program import Located, Program, trace
from xviz_jax.tracing.transforms import Keep, read, read_cotangents
from xviz_jax.tracing.values import AttentionValues

# A map of this size is read as the model made it: it fits a cache, and making it
# again costs more than keeping it.
_SMALL_MAP = 8 * 2**20
# One that the model makes anyway is read there, of a head of 2,048 positions at most.
_FUSED_MAP = 16 * 2**20
_TILED = ("query", "key", "bias", "remaining_mask")
_DENSE = ("probabilities",)
_INSIDE = ("probabilities", "bias", "remaining_mask")
KeepOf = Callable[[Site, dict[str, jax.Array]], dict[str, jax.Array]]


def capture(
    model: Callable,
    args: Sequence[Any],
    scalar: Callable[[jax.Array], jax.Array] | None = None,
    *,
    streams: bool = False,
    keep: KeepOf | None = None,
) -> tuple[jax.Array, list[Layer]]:
    """Runs a model and reads its self-attention.

    Args:
      model: Maps one example to logits.
      args: Its positional arguments.
      scalar: If given, its gradient at the attention is read as well, in one
        forward and one backward pass.
      streams: Whether to read the residual streams and their gradients besides.
      keep: What to make of the values of a layer inside the model, and to read instead
        of them, where its map is small, or made anyway and not too long: of its
        `probabilities`, `bias` and `remaining_mask`, or with `scalar` of its
        `probabilities` and `probabilities_cotangent`. Takes the site and the values of
        one layer.

    Returns:
      The model's output, and its layers in the order they run.

    Raises:
      ValueError: As `self_attention`.
    """
    program = trace(model, tuple(args), {})
    sites = of_one_sequence(program)
    return capture_of(program, sites, scalar, streams=streams, keep=keep)


def capture_of(
    program: Program,
    sites: Sequence[Site],
    scalar: Callable[[jax.Array], jax.Array] | None = None,
    *,
    streams: bool = False,
    keep: KeepOf | None = None,
) -> tuple[jax.Array, list[Layer]]:
    """As `capture`, of a traced program and its sites of `self_attention`."""
    inside = {}
    if keep is not None:
        made = _made_by_the_model(program, exact=scalar is not None)
        if scalar is None:
            made |= {s.name for s in sites if _to_read(s, sites) is _DENSE}
        inside = {
            site.name: functools.partial(keep, site)
            for site in sites
            if _can_be_kept(site, sites, made)
        }
    if scalar is None:
        wanted = {
            site.name: _INSIDE if site.name in inside else _to_read(site, sites)
            for site in sites
        }
        output, found = read(program, wanted, once=True, keep=inside)
    else:
        entries = _streams(program, sites) if streams else {}
        output, found = _backward(program, sites, scalar, entries, inside)
    return output, in_order(sites, found)


def _backward(
    program: Program,
    sites: Sequence[Site],
    scalar: Callable[[jax.Array], jax.Array],
    entries: Mapping[str, Located],
    inside: Mapping[str, Keep] | None = None,
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """What is read of sites with gradients, and of the streams beside some of them."""
    wanted: dict[str, Sequence[str]] = {
        site.name: ("value", *(_TILED if _is_tiled(site, sites) else _DENSE))
        for site in sites
    }
    wanted |= {entry.site.name: ("activation",) for entry in entries.values()}
    output, found = read_cotangents(program, scalar, wanted, once=True, keep=inside)
    for name, entry in entries.items():
        own = found.pop(entry.site.name)
        found.setdefault(name, {}).update(
            stream=sequence(entry.site, own["activation"]),
            stream_cotangent=sequence(entry.site, own["output_cotangent"]),
        )
    return output, found


def capture_named(
    model: Callable,
    args: Sequence[Any],
    name: str,
    scalar: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Layer]:
    """Runs a model and reads one layer, whichever sequences it joins.

    Args:
      model: Maps one example to logits.
      args: Its positional arguments.
      name: Of the layer's site; of a loop's, its last turn is taken.
      scalar: As for `capture`.

    Raises:
      ValueError: If no attention has that name, or some is not understood.
    """
    program = trace(model, tuple(args), {})
    output, found = capture_of(program, [named(program.sites, name)], scalar)
    return output, pick(found, -1)


def capture_tokens(
    program: Program,
    sequences: Mapping[str, Sequence[Site]],
    scalar: Callable[[jax.Array], jax.Array],
    last: Mapping[str, str],
    keys: Mapping[str, str],
) -> tuple[jax.Array, list[Layer], dict[str, dict[str, jax.Array]]]:
    """Reads attention and the residual streams of all sequences, to their ends.

    Args:
      program: A traced model.
      sequences: Of each sequence, by its name, the sites whose queries run over it.
      scalar: As for `capture`.
      last: As for `capture_own`.
      keys: As for `cut`.

    Returns:
      As `capture` with `streams`; and of each sequence what leaves its last layer, as
      `stream` and `stream_cotangent`, where that was found.
    """
    ends = {}
    for name, sites in sequences.items():
        own = {n: b.site.name for n, b in _streams(program, sites).items()}
        atom = blocks.ending(program, own, last.get(name), keys)
        if atom is not None:
            end = Site(_end(name), "named", values=("activation",))
            values = ActivationValues(program.graph, atom)
            ends[end.name] = Located(end, program.graph.root, values)
    longer = dataclasses.replace(program, located=(*program.located, *ends.values()))
    every = {site.name for sites in sequences.values() for site in sites}
    sites = [site for site in program.sites if site.name in every]
    entries = _streams(program, sites) | ends
    output, found = _backward(longer, sites, scalar, entries)
    tokens = {name: found.pop(_end(name), {}) for name in sequences}
    return output, in_order(sites, found), tokens


def _end(name: str) -> str:
    """Of a sequence; no site has such a name."""
    return f"(last) {name}"


def capture_own(
    program: Program,
    sequences: Mapping[str, Sequence[Site]],
    scalar: Callable[[jax.Array, jax.Array], jax.Array],
    last: Mapping[str, str],
    keys: Mapping[str, str] | None = None,
) -> tuple[jax.Array, list[Layer]]:
    """Reads attention, with each layer's own gradient.

    Args:
      program: A traced model.
      sequences: Of each sequence, by its name, the sites whose queries run over it.
      scalar: Maps what the model says if a layer were the last of its sequence, and
        what it says, to what is explained. Its gradient at the layer's attention is
        read.
      last: For the name of a sequence, `last` of `tracing.blocks.cut`.
      keys: As for `cut`.

    Returns:
      As `capture`.

    Raises:
      ValueError: As `cut`.
    """
    every = [site for sites in sequences.values() for site in sites]
    output, found = None, {}
    for name, sites in sequences.items():
        single = len(sites) == 1 and not sites[0].loops
        wanted = {
            site.name: ("value", *(_TILED if _is_tiled(site, every) else _DENSE))
            for site in sites
        }
        apart = cut(program, sites, last.get(name), keys, needs_last=not single)
        output, own = blocks.read_own_cotangents(apart, scalar, wanted)
        found |= own
    assert output is not None
    ordered = [site for site in program.sites if site.name in found]
    return output, in_order(ordered, found)


def cut(
    program: Program,
    sites: Sequence[Site],
    last: str | None = None,
    keys: Mapping[str, str] | None = None,
    *,
    needs_last: bool = True,
) -> blocks.Blocks:
    """Cuts a model between the layers of a sequence, as `tracing.blocks.cut`.

    Args:
      program: A traced model.
      sites: The attention whose queries run over the sequence.
      last: As there.
      keys: Of each of these sites, by its name, the sequence of its keys, if there are
        several.
      needs_last: As there.

    Raises:
      ValueError: As there; and if a layer has no residual stream.
    """
    entries = {n: each.site.name for n, each in _streams(program, sites).items()}
    return blocks.cut(program, entries, last, needs_last=needs_last, kinds=keys)


def _streams(program: Program, layers: Sequence[Site]) -> dict[str, Located]:
    """The residual stream that each layer of attention is added to, by its name."""
    located = {each.site.name: each for each in program.located}
    blocks = {
        each.values.atom: each
        for each in program.located
        if each.site.kind == "block" and isinstance(each.values, ActivationValues)
    }
    found: dict[str, Located] = {}
    for layer in layers:
        values, stream = located[layer.name].values, None
        if isinstance(values, AttentionValues):
            stream = block_input(program.graph, values)
        block = blocks.get(stream) if stream is not None else None
        if block is None or block in found.values():
            raise ValueError(
                f"no residual stream was found that {layer.name!r} is added to"
            )
        found[layer.name] = block
    return found


def sequence(site: Site, array: jax.Array) -> jax.Array:
    """A stream `[*loops, length, features]`, without a batch of one."""
    return array.reshape(*site.loops, *array.shape[-2:])


def _is_tiled(site: Site, sites: Sequence[Site]) -> bool:
    """Whether queries and keys tell a layer's map."""
    joined = site.joins or any(other.joins == site.name for other in sites)
    return site.scale is not None and not joined


def _made_by_the_model(program: Program, *, exact: bool) -> frozenset[str]:
    """The sites whose maps the model makes, not a kernel that keeps them to itself.

    Args:
      program: A traced model.
      exact: Whether only in float32: gradients of 16 bits are worse than those made
        of the gradient at the output.
    """
    return frozenset(
        located.site.name
        for located in program.located
        if isinstance(located.values, AttentionValues)
        and (not exact or located.values.dtype == jnp.float32)
    )


def _can_be_kept(site: Site, sites: Sequence[Site], made: frozenset[str]) -> bool:
    """Whether a layer's map is whole inside the model, and short enough to keep."""
    readable = "probabilities" in site.values and site.name in made
    if not readable or is_chunked(site):
        return False
    alone = not site.joins and all(other.joins != site.name for other in sites)
    return alone and site.shape[-2] * site.shape[-1] * 4 <= _FUSED_MAP


def _to_read(site: Site, sites: Sequence[Site]) -> tuple[str, ...]:
    _, heads, query, key = site.shape[len(site.loops) :]
    if is_chunked(site):
        query *= site.loops[-1]
    small = heads * query * key * 4 <= _SMALL_MAP
    dense = "probabilities" in site.values and small
    return _DENSE if dense or not _is_tiled(site, sites) else _TILED
