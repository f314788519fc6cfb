"""A model's self-attention as a list of layers.

A layer is kept as queries and keys, from which its map is made again tile by tile,
unless the map is small, or is more than a softmax of their product.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.attention.sites import named, of_one_sequence
from xviz_jax.attention.stack import Layer, in_order, is_chunked, pick
from xviz_jax.tracing import Site
from xviz_jax.tracing.program import Program, trace
from xviz_jax.tracing.transforms import read, read_cotangents
from xviz_jax.tracing.values import AttentionValues

# A map of this size is read as the model made it: it fits a cache, and making it
# again costs more than keeping it.
_SMALL_MAP = 8 * 2**20
# One that the model makes anyway is read there, of a head of 2,048 positions at most.
_FUSED_MAP = 16 * 2**20
_TILED = ("query", "key", "bias", "remaining_mask")
# What masks a map tells padding where a row of nothing but padding is none of zeros.
_DENSE = ("probabilities", "bias", "remaining_mask")
KeepOf = Callable[[Site, dict[str, jax.Array]], dict[str, jax.Array]]


def capture(
    model: Callable,
    args: Sequence[Any],
    scalar: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, list[Layer]]:
    """Runs a model and reads its self-attention.

    Args:
      model: Maps one example to logits.
      args: Its positional arguments.
      scalar: If given, its gradient at the attention is read as well, in one
        forward and one backward pass.

    Returns:
      The model's output, and its layers in the order they run.

    Raises:
      ValueError: As `self_attention`.
    """
    program = trace(model, tuple(args), {})
    sites = of_one_sequence(program)
    return capture_of(program, sites, scalar)


def capture_of(
    program: Program,
    sites: Sequence[Site],
    scalar: Callable[[jax.Array], jax.Array] | None = None,
    *,
    keep: KeepOf | None = None,
) -> tuple[jax.Array, list[Layer]]:
    """Runs a traced program and reads some of its attention.

    Args:
      program: A traced model.
      sites: As `self_attention` or `readable` gives them.
      scalar: As for `capture`.
      keep: What to make of the values of a layer inside the model, and to read instead
        of them, where its map is small, or made anyway and not too long: of its
        `probabilities`, `bias` and `remaining_mask`, or with `scalar` of its
        `probabilities` and `probabilities_cotangent`. Takes the site and the values of
        one layer.

    Returns:
      As `capture`.
    """
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
            site.name: _DENSE if site.name in inside else _to_read(site, sites)
            for site in sites
        }
        output, found = read(program, wanted, once=True, keep=inside)
    else:
        wanted = beside_gradients(sites)
        output, found = read_cotangents(program, scalar, wanted, once=True, keep=inside)
    return output, in_order(sites, found)


def beside_gradients(sites: Sequence[Site]) -> dict[str, tuple[str, ...]]:
    """What to read of each layer, by its site's name, for its map and its gradient."""
    return {
        site.name: ("value", *(_TILED if _is_tiled(site, sites) else _DENSE))
        for site in sites
    }


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
    site = named(program.sites, name)
    # Maps that weigh the same values are the heads of one layer.
    first = site.joins or name
    chosen = [each for each in program.sites if first in (each.name, each.joins)]
    output, found = capture_of(program, chosen, scalar)
    return output, pick(found, -1)


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
        and "probabilities" in located.site.values
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
