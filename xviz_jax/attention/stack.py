"""The layers of a model's self-attention, in the order they run."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.tracing import Site

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


def is_chunked(site: Site) -> bool:
    """Whether the innermost loop is over chunks of queries."""
    return site.turns[-1:] == ("queries",)


def turning(site: Site) -> tuple[int, ...]:
    """Lengths of the loops over layers that a site lies in, outermost first."""
    return site.loops[:-1] if is_chunked(site) else site.loops


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
    if is_chunked(site):
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
