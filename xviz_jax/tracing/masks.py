"""What a mask lets through, proved from the program without running it.

A mask made of positions is a comparison of sums of `iota`s; such a sum is an affine
function of an array's indices, and its comparison a half-plane. Causality and windows
are half-planes in query and key, however long the sequence is.
"""

import dataclasses

import numpy as np

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.graph import Atom, Graph, Node
from xviz_jax.tracing.roles import KEY, QUERY, Reading
from xviz_jax.tracing.scores import Scores, Term

_SHAPING = ("broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose")
_DEEPEST = 40
_LARGEST_ARRAY = 1 << 22


@dataclasses.dataclass(frozen=True)
class _Affine:
    """slopes . index + offset, for an index into an array."""

    slopes: tuple[float, ...]
    offset: float

    def __sub__(self, other: "_Affine") -> "_Affine":
        slopes = tuple(a - b for a, b in zip(self.slopes, other.slopes, strict=True))
        return _Affine(slopes, self.offset - other.offset)


# Half-planes that must all hold, each the set where an affine function is >= 0.
_Planes = tuple[_Affine, ...]


def causality(
    graph: Graph, reading: Reading, scores: Scores
) -> tuple[bool | None, tuple[int | None, int | None] | None]:
    """Whether queries see earlier keys only, and how far they see.

    Returns:
      `(causal, window)`: None for `causal` where the mask depends on data or is not
      understood, False where there is no mask at all; `window` is `(left, right)`.
    """
    queries, keys = reading.along(QUERY), reading.along(KEY)
    if scores.scale is None or len(keys) != 1 or len(queries) > 1:
        return None, None
    if not scores.masks and not scores.biases:
        return False, None
    left: int | None = None
    right: int | None = None
    for term in scores.masks:
        for plane in _planes_of(graph, term):
            sees = _sees(plane, term, queries, keys)
            if sees is None:
                continue
            side, reach = sees
            if side == "right":
                right = reach if right is None else min(right, reach)
            else:
                left = reach if left is None else min(left, reach)
    lengths = reading.canonical_shape()[2:]
    diagonal = lengths[1] - lengths[0]
    if right is not None:
        right -= diagonal
    if left is not None:
        left += diagonal
    causal = True if right == 0 else None
    if left is None and (right is None or right == 0):
        return causal, None
    return causal, (left, right)


def _planes_of(graph: Graph, term: Term) -> _Planes:
    planes = _mask(graph, term.atom, 0)
    if planes is None:
        return ()
    if term.factor > 0:
        return planes
    return _negated(planes) or ()


def _sees(plane: _Affine, term: Term, queries: list[int], keys: list[int]):
    """`key - query <= reach` is ("right", reach); `query - key <= reach` is left."""
    slopes = {}
    for axis, pieces in enumerate(term.axes):
        for piece in pieces:
            if piece.broadcast or term.shape[piece.axis] == 1:
                continue
            rank = len(plane.slopes) - len(term.shape)
            slope = plane.slopes[piece.axis + rank]
            if slope:
                slopes[axis] = slope * piece.stride
    if set(slopes) != {*queries, *keys} or len(queries) != 1:
        return None
    query, key = slopes[queries[0]], slopes[keys[0]]
    if query != -key:
        return None
    reach = int(np.floor(plane.offset / abs(key)))
    return ("right", reach) if key < 0 else ("left", reach)


def _mask(graph: Graph, atom: Atom, depth: int) -> _Planes | None:
    """Half-planes of a boolean array; None where it is not made of positions."""
    if isinstance(atom, Literal) or depth > _DEEPEST:
        return None
    node = graph.source(atom)
    if node is None:
        return _constant_mask(graph, atom)
    shape = graph.shape(atom)
    if node.primitive in ("ge", "gt", "le", "lt"):
        a, b = (_affine(graph, each, shape, depth + 1) for each in node.ins)
        if a is None or b is None:
            return None
        gap = a - b if node.primitive in ("ge", "gt") else b - a
        strict = node.primitive in ("gt", "lt")
        return (dataclasses.replace(gap, offset=gap.offset - strict),)
    if node.primitive == "and":
        found = [_mask(graph, each, depth + 1) for each in node.ins]
        # Half-planes of one operand still bound the whole.
        return tuple(plane for planes in found for plane in planes or ()) or None
    if node.primitive == "not":
        return _negated(_mask(graph, node.ins[0], depth + 1))
    if node.primitive in ("convert_element_type", "copy"):
        return _mask(graph, node.ins[0], depth + 1)
    if node.primitive == "ne" and isinstance(node.ins[1], Literal):
        zero = not np.any(node.ins[1].val)
        return _mask(graph, node.ins[0], depth + 1) if zero else None
    if node.primitive == "select_n" and len(node.ins) == 3:
        low, high = (_truth(graph, each) for each in node.ins[1:])
        planes = _mask(graph, node.ins[0], depth + 1)
        if (low, high) == (False, True):
            return planes
        return _negated(planes) if (low, high) == (True, False) else None
    if node.primitive in _SHAPING:
        inner = _mask(graph, node.ins[0], depth + 1)
        return None if inner is None else _moved_all(graph, node, inner)
    return None


def _negated(planes: _Planes | None) -> _Planes | None:
    """The complement of one half-plane of integers."""
    if planes is None or len(planes) != 1:
        return None
    (plane,) = planes
    return (_Affine(tuple(-s for s in plane.slopes), -plane.offset - 1),)


def _affine(graph: Graph, atom: Atom, shape: tuple[int, ...], depth: int):
    """An integer array as an affine function of the indices of `shape`."""
    if isinstance(atom, Literal):
        if np.ndim(atom.val):
            return None
        return _Affine((0.0,) * len(shape), float(atom.val))
    if depth > _DEEPEST:
        return None
    own = graph.shape(atom)
    if own == () and shape:
        inner = _affine(graph, atom, (), depth + 1)
        return None if inner is None else _Affine((0.0,) * len(shape), inner.offset)
    node = graph.source(atom)
    if node is None:
        return None
    if node.primitive == "iota":
        slopes = [0.0] * len(own)
        slopes[node.params["dimension"]] = 1.0
        return _Affine(tuple(slopes), 0.0)
    if node.primitive in ("convert_element_type", "copy"):
        return _affine(graph, node.ins[0], shape, depth + 1)
    if node.primitive in ("add", "sub"):
        a, b = (_affine(graph, each, own, depth + 1) for each in node.ins)
        if a is None or b is None:
            return None
        if node.primitive == "sub":
            return a - b
        return a - _Affine(tuple(-s for s in b.slopes), -b.offset)
    if node.primitive == "neg":
        inner = _affine(graph, node.ins[0], own, depth + 1)
        return None if inner is None else _Affine((0.0,) * len(own), 0.0) - inner
    if node.primitive in _SHAPING:
        below = graph.shape(node.ins[0])
        inner = _affine(graph, node.ins[0], below, depth + 1)
        moved = None if inner is None else _moved_all(graph, node, (inner,))
        return None if moved is None else moved[0]
    return None


def _moved_all(graph: Graph, node: Node, planes: _Planes) -> _Planes | None:
    """Affine functions of a result's indices, from those of its operand's."""
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


def _truth(graph: Graph, atom: Atom) -> bool | None:
    """Whether a value is true, or false, everywhere."""
    while not isinstance(atom, Literal):
        node = graph.source(atom)
        if node is None or node.primitive not in (*_SHAPING, "convert_element_type"):
            return None
        atom = node.ins[0]
    return bool(atom.val) if np.ndim(atom.val) == 0 else None


def _constant_mask(graph: Graph, atom: Atom) -> _Planes | None:
    """Recognises an array that is lower triangular in its last two axes."""
    value = graph.constants.get(atom)
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
            return (_Affine(slopes, float(offset)),)
    return None
