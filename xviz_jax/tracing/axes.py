"""Axis maps: where each axis of a view comes from in a reference array.

The softmax of attention is rarely the array its query-key product made: it is
reshaped, transposed, split into groups and broadcast on the way. An axis map says,
for each axis of the view, which pieces of which reference axes it runs over, so
that an array can be carried from one layout to the other.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp

from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.graph import Atom, Graph, Node


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run over part of one reference axis.

    Attributes:
      axis: The reference axis, or a negative number for a broadcast axis of its own.
      stride: Distance between neighbours on the reference axis.
      size: Number of steps.
    """

    axis: int
    stride: int
    size: int

    @property
    def broadcast(self) -> bool:
        """Whether the run repeats one element rather than visiting an axis."""
        return self.axis < 0


RESIZING = ("slice", "dynamic_slice", "dynamic_update_slice", "pad", "rev")
# Operations that move elements and do not compute with them.
SHAPING = (
    *RESIZING,
    "broadcast_in_dim",
    "concatenate",
    "expand_dims",
    "reshape",
    "squeeze",
    "stack",
    "tile",
    "transpose",
    "unstack",
)

# For each axis of a view, its pieces, slowest first.
AxisMap = tuple[tuple[Piece, ...], ...]

_fresh = itertools.count(1)


def identity(shape: tuple[int, ...]) -> AxisMap:
    """The map of an array onto itself."""
    return tuple((Piece(axis, 1, size),) for axis, size in enumerate(shape))


def repeated(size: int) -> tuple[Piece, ...]:
    """An axis that only repeats."""
    return () if size == 1 else (Piece(-next(_fresh), 1, size),)


def axes_of(pieces: tuple[Piece, ...]) -> set[int]:
    """Reference axes that some pieces visit."""
    return {piece.axis for piece in pieces if not piece.broadcast}


def reshape(axes: AxisMap, shape: tuple[int, ...]) -> AxisMap | None:
    """The map after a row-major reshape, or None where an axis is cut unevenly."""
    queue = [piece for pieces in axes for piece in pieces]
    result = []
    for size in shape:
        pieces: list[Piece] = []
        if size == 1 and queue and queue[0].size == 1:
            pieces.append(queue.pop(0))
        while size > 1:
            while queue and queue[0].size == 1:
                queue.pop(0)
            if not queue:
                return None
            piece = queue.pop(0)
            if size % piece.size == 0:
                pieces.append(piece)
                size //= piece.size
            elif piece.size % size == 0:
                rest = piece.size // size
                pieces.append(Piece(piece.axis, piece.stride * rest, size))
                queue.insert(0, Piece(piece.axis, piece.stride, rest))
                size = 1
            else:
                return None
        result.append(_merge(pieces))
    return tuple(result)


def _merge(pieces: list[Piece]) -> tuple[Piece, ...]:
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.axis == piece.axis
            and last.stride == piece.stride * piece.size
        ):
            merged[-1] = Piece(last.axis, piece.stride, last.size * piece.size)
        else:
            merged.append(piece)
    return tuple(merged)


def through(graph: Graph, node: Node, operand: int, axes: AxisMap) -> list[AxisMap]:
    """Maps of a shape-changing node's results, given the map of one operand.

    Slices, pads and concatenations keep an axis only approximately (its size
    changes); they are followed because masks, caches and relative positions use
    them, and `exact` tells such a map apart.
    """
    name, params = node.primitive, node.params
    shape = graph.shape(node.ins[operand])
    if name == "transpose":
        return [tuple(axes[axis] for axis in params["permutation"])]
    if name == "reshape":
        regrouped = None
        if params.get("dimensions") is None:
            regrouped = reshape(axes, params["new_sizes"])
        return [] if regrouped is None else [regrouped]
    if name == "broadcast_in_dim" and operand == 0:
        out = [repeated(size) for size in params["shape"]]
        for axis, target in enumerate(params["broadcast_dimensions"]):
            if shape[axis] == params["shape"][target]:
                out[int(target)] = axes[axis]
        return [tuple(out)]
    if name == "squeeze":
        dropped = {int(axis) % len(shape) for axis in params["dimensions"]}
        return [tuple(a for axis, a in enumerate(axes) if axis not in dropped)]
    if name == "expand_dims":
        grown = list(axes)
        for axis in sorted(params["dimensions"]):
            grown.insert(axis, ())
        return [tuple(grown)]
    if name == "split":
        return [_resized(axes, shape, graph.shape(out)) or () for out in node.outs]
    if name == "unstack":
        kept = tuple(a for axis, a in enumerate(axes) if axis != params["axis"])
        return [kept for _ in node.outs]
    if name == "stack":
        grown = list(axes)
        grown.insert(params["axis"], repeated(len(node.ins)))
        return [tuple(grown)]
    if name == "tile":
        return [
            tuple((*repeated(n), *a) for n, a in zip(params["reps"], axes, strict=True))
        ]
    keeps = name in RESIZING and operand == 0
    if keeps or name == "concatenate":
        resized = _resized(axes, shape, graph.shape(node.outs[0]))
        return [] if resized is None else [resized]
    return []


def elementwise(
    axes: AxisMap, shape: tuple[int, ...], result: tuple[int, ...]
) -> AxisMap | None:
    """The map after an elementwise operation, whose operands may have size-1 axes."""
    if shape == result:
        return axes
    if len(shape) != len(result):
        return None
    if any(a not in (1, b) for a, b in zip(shape, result, strict=True)):
        return None
    return tuple(
        kept if a == b else repeated(b)
        for kept, a, b in zip(axes, shape, result, strict=True)
    )


def _resized(
    axes: AxisMap, shape: tuple[int, ...], result: tuple[int, ...]
) -> AxisMap | None:
    out = []
    for pieces, old, new in zip(axes, shape, result, strict=True):
        if old == new:
            out.append(pieces)
        elif len(pieces) == 1:
            out.append((dataclasses.replace(pieces[0], size=new),))
        else:
            return None
    return tuple(out)


def factors(axes: AxisMap, shape: tuple[int, ...]) -> list[Piece] | None:
    """Cuts each reference axis as finely as the view does, in row-major order.

    None where the view does not visit the reference exactly: part of an axis is
    missing, or was resized.
    """
    cut: list[Piece] = []
    for axis, size in enumerate(shape):
        own = [piece for pieces in axes for piece in pieces if piece.axis == axis]
        own.sort(key=lambda piece: -piece.stride)
        if not own:
            cut.append(Piece(axis, 1, size))
            continue
        stride = size
        for piece in own:
            if piece.stride * piece.size != stride:
                return None
            stride = piece.stride
        if stride != 1:
            return None
        cut += own
    return cut


def to_view(
    value: jax.Array, axes: AxisMap, reference: tuple[int, ...], *, expand: bool = True
) -> jax.Array:
    """Carries an array from the reference layout into a view of it.

    An axis of size 1 in `value` stands for any size. With `expand`, the result has
    the view's sizes; without, an axis on which nothing varies keeps size 1.
    """
    cut = factors(axes, reference)
    if cut is None:
        raise ValueError(f"the layout {axes} does not cover {reference}")
    sizes = [piece.size if value.shape[piece.axis] != 1 else 1 for piece in cut]
    pieces = [piece for group in axes for piece in group]
    visited = [cut.index(piece) for piece in pieces if not piece.broadcast]
    rest = [index for index in range(len(cut)) if index not in visited]
    if any(sizes[index] != 1 for index in rest):
        raise ValueError(f"the layout {axes} leaves out part of {value.shape}")
    value = value.reshape(sizes).transpose(visited + rest)
    value = value.reshape([sizes[index] for index in visited])
    spread = tuple(None if piece.broadcast else slice(None) for piece in pieces)
    value = value[spread] if spread else value
    full, start = [], 0
    for group in axes:
        varies = any(size != 1 for size in value.shape[start : start + len(group)])
        full += [piece.size if expand or varies else 1 for piece in group]
        start += len(group)
    value = jnp.broadcast_to(value, full)
    shape, start = [], 0
    for group in axes:
        shape.append(math.prod(full[start : start + len(group)]))
        start += len(group)
    return value.reshape(shape)


def from_view(value: jax.Array, axes: AxisMap, reference: tuple[int, ...]) -> jax.Array:
    """Carries a view back; reference axes it does not have come back with size 1."""
    pieces = [piece for group in axes for piece in group]
    value = value.reshape([piece.size for piece in pieces])
    value = value[tuple(0 if piece.broadcast else slice(None) for piece in pieces)]
    pieces = [piece for piece in pieces if not piece.broadcast]
    order = sorted(
        range(len(pieces)), key=lambda i: (pieces[i].axis, -pieces[i].stride)
    )
    sizes = [
        math.prod(piece.size for piece in pieces if piece.axis == axis)
        for axis in range(len(reference))
    ]
    return value.transpose(order).reshape(sizes)


def refine(axes: AxisMap, cuts: dict[int, list[Piece]]) -> AxisMap | None:
    """The map with respect to a reference whose axes were cut into several.

    Args:
      axes: A map with respect to the old reference.
      cuts: For each old axis, the new axes it became, slowest first; the strides
        are those on the old axis.

    Returns:
      The map with respect to the new reference, or None where a piece runs across
      a cut unevenly.
    """
    refined = []
    for group in axes:
        pieces: list[Piece] = []
        for piece in group:
            if piece.broadcast:
                pieces.append(piece)
            elif len(cuts[piece.axis]) == 1:
                pieces.append(dataclasses.replace(piece, axis=cuts[piece.axis][0].axis))
            else:
                for cut in cuts[piece.axis]:
                    low = max(cut.stride, piece.stride)
                    high = min(cut.stride * cut.size, piece.stride * piece.size)
                    if high <= low:
                        continue
                    if high % low or low % cut.stride:
                        return None
                    pieces.append(Piece(cut.axis, low // cut.stride, high // low))
        refined.append(tuple(pieces))
    return tuple(refined)


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One operand of a product that sums over some of its axes.

    Attributes:
      atom: The operand.
      batch: Its axes that the other operand has too.
      contract: Its axes that are summed over.
      free: Its axes that only it has.
      out: For each batch or free axis, the axis of the result it becomes.
    """

    atom: Atom
    batch: tuple[int, ...]
    contract: tuple[int, ...]
    free: tuple[int, ...]
    out: dict[int, int]


def sides(graph: Graph, node: Node) -> tuple[Side, Side] | None:
    """Both operands of a product: a `dot_general`, or the sum of a multiplication."""
    if node.primitive == "dot_general":
        return _dot_sides(graph, node)
    if node.primitive == "reduce_sum":
        return _sum_sides(graph, node)
    return None


def _dot_sides(graph: Graph, node: Node) -> tuple[Side, Side]:
    contract, batch = node.params["dimension_numbers"]
    found = []
    start = len(batch[0])
    for side in (0, 1):
        rank = len(graph.shape(node.ins[side]))
        used = {*contract[side], *batch[side]}
        free = tuple(axis for axis in range(rank) if axis not in used)
        out = {axis: place for place, axis in enumerate(batch[side])}
        out.update({axis: start + place for place, axis in enumerate(free)})
        start += len(free)
        atom = node.ins[side]
        found.append(Side(atom, tuple(batch[side]), tuple(contract[side]), free, out))
    return found[0], found[1]


def _sum_sides(graph: Graph, node: Node) -> tuple[Side, Side] | None:
    product = graph.source(node.ins[0])
    if product is None or product.primitive != "mul":
        return None
    if any(isinstance(atom, Literal) for atom in product.ins):
        return None
    summed = {int(axis) for axis in node.params["axes"]}
    rank = len(graph.shape(node.ins[0]))
    kept = [axis for axis in range(rank) if axis not in summed]
    places = [unrepeated(graph, atom) for atom in product.ins]
    wide = [
        {t for axis, t in enumerate(targets) if graph.shape(atom)[axis] > 1}
        for atom, targets in places
    ]
    found = []
    for (atom, targets), other in zip(places, (wide[1], wide[0]), strict=True):
        shape = graph.shape(atom)
        axes: dict[str, list[int]] = {"batch": [], "contract": [], "free": []}
        for axis, target in enumerate(targets):
            if target in summed:
                axes["contract"].append(axis)
            else:
                shared = target in other and shape[axis] > 1
                axes["batch" if shared else "free"].append(axis)
        out = {
            axis: kept.index(target)
            for axis, target in enumerate(targets)
            if target not in summed
        }
        batch, contract, free = (
            tuple(axes[name]) for name in ("batch", "contract", "free")
        )
        found.append(Side(atom, batch, contract, free, out))
    return found[0], found[1]


def unrepeated(graph: Graph, atom: Atom) -> tuple[Atom, list[int]]:
    """A value before it was broadcast, and which axis each of its axes became."""
    targets = list(range(len(graph.shape(atom))))
    while (node := graph.source(atom)) is not None:
        if node.primitive != "broadcast_in_dim":
            break
        own = node.params["broadcast_dimensions"]
        targets = [targets[int(axis)] for axis in own]
        atom = node.ins[0]
    return atom, targets
