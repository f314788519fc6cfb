"""What a mask lets through, proved from the program without running it.

A mask made of positions is a comparison of sums of `iota`s; such a sum is an affine
function of an array's indices, and its comparison a half-plane. Causality and windows
are half-planes in query and key, however long the sequence is.
"""

import dataclasses
from typing import Any

import numpy as np

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing import loops
from xviz_jax.tracing.compat import Literal, scan_sizes
from xviz_jax.tracing.graph import Atom, Body, Graph, Node
from xviz_jax.tracing.roles import KEY, QUERY, Reading
from xviz_jax.tracing.scores import Scores, Term

_SHAPING = ("broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose")
_DEEPEST = 40
_LARGEST_ARRAY = 1 << 22


@dataclasses.dataclass(frozen=True)
class Sight:
    """What queries may see.

    Attributes:
      causal: Whether only earlier keys; None where that depends on data or is not
        understood, False where there is no mask at all.
      window: How far `(left, right)`, where that is proved.
      rest: Masks of which `causal` and `window` do not say all.
    """

    causal: bool | None
    window: tuple[int | None, int | None] | None
    rest: tuple[Term, ...]


@dataclasses.dataclass(frozen=True)
class _Affine:
    """slopes . index + offset, for an index into an array.

    The offset may differ between the turns of a loop: then it is a vector of them.
    """

    slopes: tuple[float, ...]
    offset: Any

    def __sub__(self, other: "_Affine") -> "_Affine":
        slopes = tuple(a - b for a, b in zip(self.slopes, other.slopes, strict=True))
        return _Affine(slopes, self.offset - other.offset)


@dataclasses.dataclass(frozen=True)
class _Region:
    """Where half-planes all hold, each the set with an affine function >= 0.

    Attributes:
      planes: The half-planes.
      exact: Whether the region is all of it; otherwise it lies within.
    """

    planes: tuple[_Affine, ...]
    exact: bool = True


def sight(
    graph: Graph, body: Body, reading: Reading, scores: Scores, chunked: bool
) -> Sight:
    """What queries may see.

    Args:
      graph: The program.
      body: Where the attention is.
      reading: Its axes.
      scores: Its masks.
      chunked: Whether the loop around it runs over chunks of the queries.
    """
    queries, keys = reading.along(QUERY), reading.along(KEY)
    if scores.scale is None or len(keys) != 1 or len(queries) > 1:
        return Sight(None, None, scores.masks)
    if not scores.masks:
        return Sight(None if scores.biases else False, None, ())
    chunk, length = reading.canonical_shape()[2:]
    starts = np.zeros(1)
    if chunked and body.parent is not None:
        starts = np.arange(body.parent.params["length"]) * chunk
    bounds: dict[str, int] = {}
    rest = []
    for term in scores.masks:
        region = _Reader(graph, body).region(term)
        whole = region.exact
        for plane in region.planes:
            seen = _sees(plane, term, queries, keys, starts, alone=chunk == 1)
            if seen is None:
                whole = False
            else:
                side, reach = seen
                bounds[side] = min(reach, bounds.get(side, reach))
        if not whole:
            rest.append(term)
    # The last query meets the last key.
    diagonal = length - chunk * len(starts)
    left = bounds["left"] + diagonal if "left" in bounds else None
    right = bounds["right"] - diagonal if "right" in bounds else None
    if min(left or 0, right or 0) < 0:
        return Sight(None, None, scores.masks)
    window = None if left is None and right in (None, 0) else (left, right)
    return Sight(True if right == 0 else None, window, tuple(rest))


def _sees(
    plane: _Affine, term: Term, queries, keys, starts: np.ndarray, *, alone: bool
):
    """`key - query <= reach` is ("right", reach); `query - key <= reach` is left.

    A query that is alone, with no others beside it, has no axis to vary along.
    """
    slopes: dict[int, float] = {}
    for axis, pieces in enumerate(term.axes):
        for piece in pieces:
            if piece.broadcast or term.shape[piece.axis] == 1:
                continue
            slope = plane.slopes[term.places.index(piece.axis)]
            if slope:
                slopes[axis] = slope * piece.stride
    towards = slopes.pop(keys[0], 0.0)
    away = slopes.pop(queries[0], 0.0) if queries else 0.0
    if slopes or not towards or (away != -towards and not (alone and away == 0)):
        return None
    reaches = np.floor(np.asarray(plane.offset) / abs(towards))
    reaches = reaches - starts if towards < 0 else reaches + starts
    if (reaches != reaches[0]).any():
        return None
    return "right" if towards < 0 else "left", int(reaches[0])


def _negated(region: _Region | None) -> _Region | None:
    """The complement of one half-plane of integers."""
    if region is None or len(region.planes) != 1 or not region.exact:
        return None
    (plane,) = region.planes
    return _Region((_Affine(tuple(-s for s in plane.slopes), -plane.offset - 1),))


class _Reader:
    """Reads the masks of one body."""

    def __init__(self, graph: Graph, body: Body):
        self.graph = graph
        self.body = body
        self.steps = 0

    def region(self, term: Term) -> _Region:
        """Where a mask lets through."""
        region = self._mask(term.atom)
        if term.factor < 0:
            region = _negated(region)
        return _Region((), False) if region is None else region

    def _mask(self, atom: Atom) -> _Region | None:
        """The region of a boolean array; None where it is not made of positions."""
        self.steps += 1
        if isinstance(atom, Literal) or self.steps > _DEEPEST:
            return None
        graph = self.graph
        node = graph.source(atom)
        if node is None:
            outside = self._outside(atom)
            if outside is None:
                return self._constant(atom)
            return _Reader(graph, outside[0])._mask(outside[1])
        if node.primitive in ("ge", "gt", "le", "lt"):
            shape = graph.shape(atom)
            a, b = (self._affine(each, shape) for each in node.ins)
            # Only between integers is less than one number at most the one before.
            if a is None or b is None or not all(map(self._is_integer, node.ins)):
                return None
            gap = a - b if node.primitive in ("ge", "gt") else b - a
            strict = node.primitive in ("gt", "lt")
            return _Region((dataclasses.replace(gap, offset=gap.offset - strict),))
        if node.primitive == "and":
            parts = [each for each in node.ins if _truth(graph, each) is not True]
            found = [self._mask(each) for each in parts]
            known = [region for region in found if region is not None]
            # What bounds one operand bounds the whole.
            planes = tuple(plane for region in known for plane in region.planes)
            whole = len(known) == len(found) and all(r.exact for r in known)
            return _Region(planes, whole) if planes else None
        if node.primitive == "not":
            return _negated(self._mask(node.ins[0]))
        if node.primitive in ("convert_element_type", "copy"):
            return self._mask(node.ins[0])
        if node.primitive == "ne" and isinstance(node.ins[1], Literal):
            return None if np.any(node.ins[1].val) else self._mask(node.ins[0])
        if node.primitive == "select_n" and len(node.ins) == 3:
            low, high = (_truth(graph, each) for each in node.ins[1:])
            if (low, high) == (False, True):
                return self._mask(node.ins[0])
            if (low, high) == (True, False):
                return _negated(self._mask(node.ins[0]))
            return None
        if node.primitive in _SHAPING:
            inner = self._mask(node.ins[0])
            planes = None if inner is None else self._moved(node, inner.planes)
            if inner is None or planes is None:
                return None
            return _Region(planes, inner.exact)
        return None

    def _affine(self, atom: Atom, shape: tuple[int, ...]) -> _Affine | None:
        """An integer array as an affine function of the indices of `shape`."""
        self.steps += 1
        if self.steps > _DEEPEST:
            return None
        graph = self.graph
        flat = (0.0,) * len(shape)
        own = graph.shape(atom)
        if own == ():
            number = self._number(atom)
            return None if number is None else _Affine(flat, number)
        node = graph.source(atom)
        if node is None:
            return self._entering(atom)
        if node.primitive == "iota":
            slopes = [0.0] * len(own)
            slopes[node.params["dimension"]] = 1.0
            return _Affine(tuple(slopes), 0.0)
        if node.primitive in ("convert_element_type", "copy"):
            truncated = self._is_integer(atom) and not self._is_integer(node.ins[0])
            return None if truncated else self._affine(node.ins[0], shape)
        if node.primitive in ("add", "sub"):
            a, b = (self._affine(each, own) for each in node.ins)
            if a is None or b is None:
                return None
            if node.primitive == "sub":
                return a - b
            return a - _Affine(tuple(-s for s in b.slopes), -b.offset)
        if node.primitive == "mul":
            return self._multiplied(node, own)
        if node.primitive == "neg":
            inner = self._affine(node.ins[0], own)
            return None if inner is None else _Affine((0.0,) * len(own), 0.0) - inner
        if node.primitive in _SHAPING:
            inner = self._affine(node.ins[0], graph.shape(node.ins[0]))
            moved = None if inner is None else self._moved(node, (inner,))
            return None if moved is None else moved[0]
        return None

    def _is_integer(self, atom: Atom) -> bool:
        return bool(np.issubdtype(self.graph.aval(atom).dtype, np.integer))

    def _multiplied(self, node: Node, shape: tuple[int, ...]) -> _Affine | None:
        for a, b in (node.ins, node.ins[::-1]):
            if self.graph.shape(b) == ():
                inner, factor = self._affine(a, shape), self._number(b)
                if inner is None or np.ndim(factor) or factor is None:
                    return None
                slopes = tuple(s * factor for s in inner.slopes)
                return _Affine(slopes, inner.offset * factor)
        return None

    def _number(self, atom: Atom) -> Any:
        """A scalar of the program: one number, or one for each turn."""
        if isinstance(atom, Literal):
            return float(atom.val) if np.ndim(atom.val) == 0 else None
        turns = loops.per_turn(self.graph, self.body, atom)
        if turns is not None:
            same = (turns == turns[:1]).all()
            return float(turns[0]) if same else turns.astype(float)
        value = loops.linear(self.graph, atom)
        return float(value) if value is not None and value.shape == () else None

    def _entering(self, atom: Atom) -> _Affine | None:
        """An array that comes into the body, or a slice of one for each turn."""
        graph = self.graph
        outside = self._outside(atom)
        if outside is not None:
            return _Reader(graph, outside[0])._affine(outside[1], graph.shape(atom))
        node = self.body.parent
        if node is None or node.kind != "scan" or atom not in self.body.ins:
            value = loops.linear(graph, atom)
            return None if value is None else _fitted(value)
        place = self.body.ins.index(atom)
        if place < sum(scan_sizes(node.params)) or self.body.outer is None:
            return None
        whole = node.ins[place]
        reader = _Reader(graph, self.body.outer)
        found = reader._affine(whole, graph.shape(whole))
        if found is None or np.ndim(found.offset):
            return None
        turns = np.arange(node.params["length"])
        return _Affine(found.slopes[1:], found.offset + found.slopes[0] * turns)

    def _outside(self, atom: Atom) -> tuple[Body, Atom] | None:
        """The same array one body further out, where every turn sees all of it."""
        outer = self.graph.outer.get(atom) if isinstance(atom, int) else None
        if outer is None or self.body.outer is None or atom not in self.body.ins:
            return None
        parent = self.body.parent
        if parent is not None and parent.kind == "scan":
            constants, _ = scan_sizes(parent.params)
            if self.body.ins.index(atom) >= constants:
                return None
        elif parent is None or parent.kind == "shard_map":
            return None
        return self.body.outer, outer

    def _moved(self, node: Node, planes) -> tuple[_Affine, ...] | None:
        """Affine functions of a result's indices, from those of its operand's."""
        graph = self.graph
        shape = graph.shape(node.ins[0])
        maps = axis_maps.through(graph, node, 0, axis_maps.identity(shape))
        if not maps:
            return None
        moved = []
        for plane in planes:
            slopes = []
            for pieces in maps[0]:
                own = [piece for piece in pieces if not piece.broadcast]
                varying = [piece for piece in own if plane.slopes[piece.axis]]
                if len(varying) > 1 or (varying and len(pieces) > 1):
                    return None
                slope = 0.0
                if varying:
                    slope = plane.slopes[varying[0].axis] * varying[0].stride
                slopes.append(slope)
            moved.append(_Affine(tuple(slopes), plane.offset))
        return tuple(moved)

    def _constant(self, atom: Atom) -> _Region | None:
        """Recognises an array that is lower triangular in its last two axes."""
        value = self.graph.constants.get(atom)
        if value is None or not hasattr(value, "shape") or len(value.shape) < 2:
            return None
        if np.prod(value.shape) > _LARGEST_ARRAY:
            return None
        try:
            array = np.asarray(value).astype(bool)
        except (TypeError, ValueError, RuntimeError):
            return None
        rows, columns = array.shape[-2:]
        flat = array.reshape(-1, rows, columns)
        if not (flat == flat[:1]).all():
            return None
        for offset in {0, columns - rows}:
            if (flat[0] == np.tri(rows, columns, offset, dtype=bool)).all():
                slopes = (*(0.0,) * (array.ndim - 2), 1.0, -1.0)
                return _Region((_Affine(slopes, float(offset)),))
        return None


def _fitted(value: np.ndarray) -> _Affine | None:
    """A vector of evenly spaced integers as a function of its index."""
    if value.ndim != 1 or value.dtype.kind not in "iu" or not len(value):
        return None
    step = int(value[1]) - int(value[0]) if len(value) > 1 else 0
    if (np.arange(len(value)) * step + value[0] != value).any():
        return None
    return _Affine((float(step),), float(value[0]))


def _truth(graph: Graph, atom: Atom) -> bool | None:
    """Whether a value is true, or false, everywhere."""
    while not isinstance(atom, Literal):
        node = graph.source(atom)
        if node is None or node.primitive not in (*_SHAPING, "convert_element_type"):
            return None
        atom = node.ins[0]
    return bool(atom.val) if np.ndim(atom.val) == 0 else None
