"""A model's self-attention as a list of layers.

A layer is kept as queries and keys, from which its map is made again tile by tile,
unless the map is small, or is more than a softmax of their product.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.attention.sites import of_one_sequence, self_attention
from xviz_jax.attention.stack import Layer, in_order, is_chunked
from xviz_jax.tracing import Site, blocks
from xviz_jax.tracing.program import Program, trace
from xviz_jax.tracing.transforms import read, read_cotangents
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
        wanted = {
            site.name: ("value", *(_TILED if _is_tiled(site, sites) else _DENSE))
            for site in sites
        }
        entries = _streams(program.sites, sites) if streams else {}
        wanted |= {site.name: ("activation",) for site in entries.values()}
        output, found = read_cotangents(program, scalar, wanted, once=True, keep=inside)
        for name, site in entries.items():
            own = found.pop(site.name)
            for kind in ("activation", "output_cotangent"):
                ending = kind.removeprefix("activation").removeprefix("output")
                found[name][f"stream{ending}"] = sequence(site, own[kind])
    return output, in_order(sites, found)


def capture_own(
    model: Callable,
    args: Sequence[Any],
    scalar: Callable[[jax.Array, jax.Array], jax.Array],
    last: str | None = None,
) -> tuple[jax.Array, list[Layer]]:
    """Runs a model and reads its self-attention, with each layer's own gradient.

    Args:
      model: Maps one example to logits.
      args: Its positional arguments.
      scalar: Maps what the model says if a layer were its last, and what it says, to
        what is explained. Its gradient at the layer's attention is read.
      last: As in `tracing.blocks.cut`.

    Returns:
      As `capture`.

    Raises:
      ValueError: As `cut`.
    """
    program = trace(model, tuple(args), {})
    sites = self_attention(program.sites)
    single = len(sites) == 1 and not sites[0].loops
    wanted = {
        site.name: ("value", *(_TILED if _is_tiled(site, sites) else _DENSE))
        for site in sites
    }
    apart = cut(program, sites, last, needs_last=not single)
    output, found = blocks.read_own_cotangents(apart, scalar, wanted)
    return output, in_order(sites, found)


def cut(
    program: Program,
    sites: Sequence[Site],
    last: str | None = None,
    *,
    needs_last: bool = True,
) -> blocks.Blocks:
    """Cuts a model between its layers, as `tracing.blocks.cut`.

    Raises:
      ValueError: As there; and if a layer has no residual stream.
    """
    entries = {n: site.name for n, site in _streams(program.sites, sites).items()}
    return blocks.cut(program, entries, last, needs_last=needs_last)


def _streams(sites: Sequence[Site], layers: Sequence[Site]) -> dict[str, Site]:
    """The block that each layer of attention lies in, by the layer's name."""
    found = {}
    for layer in layers:
        before = [
            site
            for site in sites
            if site.order[:-1] == layer.order[:-1] and site.order < layer.order
        ]
        blocks = [site for site in before if site.kind == "block"]
        others = [site for site in before if site.kind == "attention"]
        if not blocks or (others and others[-1].order > blocks[-1].order):
            raise ValueError(
                f"no residual stream was found that {layer.name!r} is added to"
            )
        found[layer.name] = blocks[-1]
    return found


def sequence(site: Site, array: jax.Array) -> jax.Array:
    """A stream `[*loops, length, features]`, without a batch of one."""
    return array.reshape(*site.loops, *array.shape[-2:])


def capture_maps(
    program: Program,
    sites: Sequence[Site],
    scalar: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, list[Layer]]:
    """Reads all maps and their gradients, whatever their size.

    Args:
      program: A traced model.
      sites: As `readable` gives them.
      scalar: As for `capture`.

    Returns:
      As `capture`.
    """
    for site in sites:
        if "probabilities" not in site.values:
            raise ValueError(
                f"the probabilities of {site.name!r} cannot be read: {site.why}"
            )
    wanted = {site.name: ("value", "probabilities") for site in sites}
    output, found = read_cotangents(program, scalar, wanted, once=True)
    return output, in_order(sites, found)


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
