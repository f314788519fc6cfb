"""Layers of attention with the residual streams that run between them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax

from xviz_jax.attention.layers import beside_gradients
from xviz_jax.attention.stack import Layer, in_order
from xviz_jax.tracing import Site, blocks
from xviz_jax.tracing.activation import ActivationValues, block_input
from xviz_jax.tracing.program import Located, Program
from xviz_jax.tracing.transforms import read_cotangents
from xviz_jax.tracing.values import AttentionValues


def capture_tokens(
    program: Program,
    sequences: Mapping[str, Sequence[Site]],
    scalar: Callable[[jax.Array], jax.Array],
    last: Mapping[str, str],
    keys: Mapping[str, str] | None = None,
) -> tuple[jax.Array, list[Layer], dict[str, dict[str, jax.Array]]]:
    """Reads attention, the streams that enter each layer, and what leaves the last.

    Args:
      program: A traced model.
      sequences: Of each sequence, by its name, the sites whose queries run over it.
      scalar: Of the model's output, what is explained; its gradients are read.
      last: As for `capture_own`.
      keys: As for `cut`.

    Returns:
      As `layers.capture`, each layer with what enters it as `stream` and
      `stream_cotangent`; and of each sequence the same of what leaves its last layer,
      where that was found.
    """
    ends = {}
    # Of a single sequence nobody reads where it ends; of one of keys, only its name.
    ending = {} if len(sequences) == 1 and not last else sequences
    for name, sites in {**dict.fromkeys(last, ()), **ending}.items():
        own = {n: b.site.name for n, b in _streams(program, sites).items()}
        atom = blocks.ending(program, own, last.get(name), keys)
        if atom is not None:
            end = Site(_end(name), "named", values=("activation",))
            values = ActivationValues(program.graph, atom)
            ends[end.name] = Located(end, program.graph.root, values)
    longer = dataclasses.replace(program, located=(*program.located, *ends.values()))
    every = {site.name for sites in sequences.values() for site in sites}
    sites = [site for site in program.sites if site.name in every]
    streams = _streams(program, sites) | ends
    wanted: dict[str, tuple[str, ...]] = dict(beside_gradients(sites))
    wanted |= {each.site.name: ("activation",) for each in streams.values()}
    output, found = read_cotangents(longer, scalar, wanted, once=True)
    for name, each in streams.items():
        own = found.pop(each.site.name)
        found.setdefault(name, {}).update(
            stream=sequence(each.site, own["activation"]),
            stream_cotangent=sequence(each.site, own["output_cotangent"]),
        )
    tokens = {name: found.pop(_end(name), {}) for name in {*sequences, *last}}
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
      As `layers.capture`.

    Raises:
      ValueError: As `cut`.
    """
    wanted = beside_gradients([s for sites in sequences.values() for s in sites])
    output, found = None, {}
    for name, sites in sequences.items():
        single = len(sites) == 1 and not sites[0].loops
        apart = cut(program, sites, last.get(name), keys, needs_last=not single)
        own_wanted = {site.name: wanted[site.name] for site in sites}
        output, own = blocks.read_own_cotangents(apart, scalar, own_wanted)
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
