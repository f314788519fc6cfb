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

from xviz_jax.attention.streams import crossing
from xviz_jax.tracing import Site, blocks
from xviz_jax.tracing.program import Program, trace
from xviz_jax.tracing.site import positions
from xviz_jax.tracing.transforms import read, read_cotangents
from xviz_jax.tracing.values import AttentionValues

# A map of this size is read as the model made it: it fits a cache, and making it
# again costs more than keeping it.
_SMALL_MAP = 8 * 2**20
# One that the model makes anyway is read there, of a head of 2,048 positions at most.
_FUSED_MAP = 16 * 2**20
# What is added to the scores of keys that are not to be seen is at most this.
_MASKING_BIAS = -9e3
_TILED = ("query", "key", "bias", "remaining_mask")
_DENSE = ("probabilities",)
_INSIDE = ("probabilities", "bias", "remaining_mask")
KeepOf = Callable[[Site, dict[str, jax.Array]], dict[str, jax.Array]]
_ALONG_QUERIES = {"query": -3, "output": -3, "output_cotangent": -3}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of self-attention, or several alike that a loop runs.

    Attributes:
      site: Where it is.
      count: How many layers; None for one, whose arrays have no layer axis.
      values: Its arrays by name, `[count, ...]` or `[1, ...]` where all layers have
        the same, laid out as `tracing.capture` gives them.
    """

    site: Site
    count: int | None
    values: dict[str, jax.Array]

    @property
    def length(self) -> int:
        """How many layers."""
        return 1 if self.count is None else self.count

    def since(self, start: int) -> "Layer":
        """Without the first `start` of several."""
        if self.count is None or start <= 0:
            return self
        values = {
            name: array[start:] if len(array) == self.count else array
            for name, array in self.values.items()
        }
        return dataclasses.replace(self, count=self.count - start, values=values)


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


def of_one_sequence(program: Program) -> tuple[Site, ...]:
    """As `self_attention`, of a program that has no other sequence either.

    Raises:
      ValueError: As there; and if a site attends from one sequence to another.
    """
    sites = self_attention(program.sites)
    other = crossing(program, sites)
    if other is not None:
        raise ValueError(
            f"{other.name!r} attends from one sequence to another of as many "
            "positions; this method takes self-attention over one sequence"
        )
    return sites


def self_attention(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites that an attention method for one sequence can use.

    Raises:
      ValueError: If the model has none, if something in it looks like attention but
        is not understood, or if the sites do not belong to one sequence.
    """
    found = readable(sites)
    length = found[0].shape[-1]
    for site in found:
        _check_length(site, length)
    return found


def readable(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites of attention, over whichever sequences.

    Raises:
      ValueError: If the model has none, or if something in it looks like attention
        but is not understood.
    """
    unknown = [site for site in sites if site.kind == "unknown"]
    if unknown:
        listed = "; ".join(f"{site.name!r}: {site.why}" for site in unknown)
        raise ValueError(f"the model has attention that is not understood: {listed}")
    found = tuple(site for site in sites if site.kind == "attention")
    if not found:
        kinds = sorted({site.kind for site in sites}) or ["nothing"]
        raise ValueError(
            f"the model has no attention to explain; tracing found {', '.join(kinds)}"
        )
    for site in found:
        _check(site)
    return found


def _check(site: Site) -> None:
    if "probabilities" not in site.values and site.scale is None:
        raise ValueError(
            f"the probabilities of {site.name!r} cannot be read: {site.why}"
        )
    around = site.turns[:-1] if _is_chunked(site) else site.turns
    if not set(around) <= {"layers", "reversed"}:
        raise ValueError(
            f"{site.name!r} lies in a loop over something else than layers, as heads, "
            "shards or examples; use `jax.vmap` there"
        )
    batch = site.shape[len(site.loops)]
    if batch != 1:
        raise ValueError(
            f"{site.name!r} has a batch of {batch}; a model takes one example "
            "here: use `xv.single`, and `jax.vmap` for a batch"
        )


def _check_length(site: Site, length: int) -> None:
    if site.beside:
        raise ValueError(
            f"{site.name!r} runs beside {site.beside!r} and not after it; this method "
            "takes layers one after another"
        )
    query, key = positions(site)
    if query != key or key != length:
        raise ValueError(
            f"{site.name!r} has {query} queries and {key} keys; this method takes "
            f"self-attention over one sequence, here of {length}"
        )


def _is_chunked(site: Site) -> bool:
    return site.turns[-1:] == ("queries",)


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
    if not readable or _is_chunked(site):
        return False
    alone = not site.joins and all(other.joins != site.name for other in sites)
    return alone and site.shape[-2] * site.shape[-1] * 4 <= _FUSED_MAP


def _to_read(site: Site, sites: Sequence[Site]) -> tuple[str, ...]:
    _, heads, query, key = site.shape[len(site.loops) :]
    if _is_chunked(site):
        query *= site.loops[-1]
    small = heads * query * key * 4 <= _SMALL_MAP
    dense = "probabilities" in site.values and small
    return _DENSE if dense or not _is_tiled(site, sites) else _TILED


def in_order(sites: Sequence[Site], found: dict[str, dict[str, Any]]) -> list[Layer]:
    """Layers in the order they run; a loop of one site stays one `Layer`."""
    placed: list[tuple[tuple[int, ...], Site, int | None]] = []
    arrays: dict[str, dict[str, jax.Array]] = {}
    for site in sites:
        own = {n: _flat(site, n, array) for n, array in found[site.name].items()}
        if site.joins:
            # Maps that weigh the same values are the heads of one layer.
            heads = arrays[site.name] = arrays[site.joins]
            for name, array in heads.items():
                heads[name] = jnp.concatenate([array, own[name]], axis=-3)
            continue
        arrays[site.name] = own
        for number, turn in enumerate(_turns(turning(site))):
            placed.append((_place(site, turn), site, number if turn else None))
    placed.sort(key=lambda each: each[0])
    layers: list[Layer] = []
    while placed:
        _, site, number = placed[0]
        values = arrays[site.name]
        run = 1
        while run < len(placed) and placed[run][1] is site:
            run += 1
        if number is None:
            layers.append(Layer(site, None, values))
            run = 1
        elif run == len(_turns(turning(site))):
            layers.append(Layer(site, run, values))
        else:
            # Several sites share a loop: turn by turn.
            run = 1
            one = {
                name: array[number if len(array) > 1 else 0]
                for name, array in values.items()
            }
            layers.append(Layer(site, None, one))
        placed = placed[run:]
    return layers


def turning(site: Site) -> tuple[int, ...]:
    """Lengths of the loops over layers that a site lies in, outermost first."""
    return site.loops[:-1] if _is_chunked(site) else site.loops


def _turns(loops: tuple[int, ...]) -> list[tuple[int, ...]]:
    turns: list[tuple[int, ...]] = [()]
    for length in loops:
        turns = [(*turn, index) for turn in turns for index in range(length)]
    return turns


def _place(site: Site, turn: tuple[int, ...]) -> tuple[int, ...]:
    """Sorts by loop, then by turn, then by position within it."""
    forward = len(site.loops) - len(turn)
    padded = (*(0,) * (len(site.order) - 1 - forward - len(turn)), *turn)
    padded = (*padded, *(0,) * (forward + 1))
    pairs = zip(site.order, padded, strict=True)
    return tuple(number for pair in pairs for number in pair)


def _flat(site: Site, name: str, array: jax.Array) -> jax.Array:
    """A site's value with chunks joined and loops as one axis of layers."""
    if _is_chunked(site):
        array = _joined(site, name, array)
    loops = turning(site)
    if not loops:
        return array
    for axis, kind in enumerate(site.turns[: len(loops)]):
        if kind == "reversed":
            array = jnp.flip(array, axis)
    if any(size != 1 for size in array.shape[: len(loops)]):
        array = jnp.broadcast_to(array, (*loops, *array.shape[len(loops) :]))
    count = 1
    for size in array.shape[: len(loops)]:
        count *= size
    return array.reshape(count, *array.shape[len(loops) :])


def _joined(site: Site, name: str, array: jax.Array) -> jax.Array:
    """Chunks of queries, the last of the loop axes, as one axis of queries."""
    if name in ("key", "value"):
        return jnp.take(array, 0, axis=len(site.loops) - 1)
    axis = _ALONG_QUERIES.get(name, -2) + array.ndim
    loop = len(site.loops) - 1
    chunks, chunk = site.loops[-1], site.shape[-2]
    if array.shape[loop] == array.shape[axis] == 1:
        return jnp.take(array, 0, axis=loop)
    shape = list(array.shape)
    shape[loop], shape[axis] = chunks, chunk
    array = jnp.moveaxis(jnp.broadcast_to(array, shape), loop, axis - 1)
    shape = list(array.shape)
    return array.reshape(*shape[: axis - 1], chunks * chunk, *shape[axis + 1 :])


def pick(layers: Sequence[Layer], number: int) -> Layer:
    """One layer by its number, as a layer of its own; -1 is the last.

    Raises:
      ValueError: If there is none.
    """
    depth = sum(layer.length for layer in layers)
    if not -depth <= number < depth:
        raise ValueError(
            f"`layer` is from {-depth} to {depth - 1} for {depth} layers, got {number}"
        )
    turns = [(layer, turn) for layer in layers for turn in range(layer.length)]
    layer, number = turns[number]
    if layer.count is None:
        return layer
    values = {
        name: array[number if len(array) == layer.count else 0]
        for name, array in layer.values.items()
    }
    return Layer(layer.site, None, values)


def attended(layers: Sequence[Layer]) -> jax.Array:
    """Which positions any query of the first layer may attend, bool `[length]`.

    Padding is what no query may.
    """
    layer = pick(layers, 0)
    return attended_in(layer.site, layer.values)


def attended_in(site: Site, values: Mapping[str, jax.Array]) -> jax.Array:
    """As `attended`, of the values of one layer: what masks it, or its map."""
    masking = [name for name in ("bias", "remaining_mask") if name in site.values]
    told = site.scale is not None and all(name in values for name in masking)
    if "probabilities" in values and not told:
        return jnp.any(values["probabilities"] > 0, axis=(0, 1, 2))
    seen = jnp.ones(site.shape[-1], bool)
    if "remaining_mask" in values:
        mask = values["remaining_mask"]
        seen &= jnp.any(mask, axis=tuple(range(mask.ndim - 1)))
    if "bias" in values:
        bias = values["bias"]
        seen &= jnp.any(bias > _MASKING_BIAS, axis=tuple(range(bias.ndim - 1)))
    return seen


def seen(layer: Layer, position: jax.Array) -> jax.Array:
    """Which keys a query of one layer attends, bool `[heads or 1, length]`."""
    values, site = layer.values, layer.site
    if "probabilities" in values:
        return values["probabilities"][0][:, position] > 0
    ahead = jnp.arange(site.shape[-1]) - position
    allowed = jnp.ones(ahead.shape, bool)
    if site.causal:
        allowed &= ahead <= 0
    left, right = site.window or (None, None)
    if left is not None:
        allowed &= ahead >= -left
    if right is not None:
        allowed &= ahead <= right
    allowed = allowed[None]
    row = lambda array: array[0, :, position if array.shape[-2] > 1 else 0]
    if "remaining_mask" in values:
        allowed = allowed & row(values["remaining_mask"])
    if "bias" in values:
        allowed = allowed & (row(values["bias"]) > _MASKING_BIAS)
    return allowed


def since(layers: Sequence[Layer], start: int) -> list[Layer]:
    """Without the first `start` layers.

    Raises:
      ValueError: If none would be left.
    """
    check_start(sum(layer.length for layer in layers), start)
    kept = []
    for layer in layers:
        if start < layer.length:
            kept.append(layer.since(start))
        start = max(start - layer.length, 0)
    return kept


def check_start(depth: int, start: int) -> None:
    """Refuses to leave out every layer.

    Raises:
      ValueError: If none would be left.
    """
    if not 0 <= start < depth:
        raise ValueError(
            f"`start_layer` is from 0 to {depth - 1} for {depth} layers, got {start}"
        )
