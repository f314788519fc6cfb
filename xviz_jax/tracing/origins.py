"""Where a value comes from: what it is made of, looking back through a program."""

from collections.abc import Iterator

import numpy as np

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.graph import Atom, Graph, Node

_CASTS = ("convert_element_type", "copy", "reduce_precision", "sharding_constraint")
_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")
_LONGEST_WALK = 400


def origin(graph: Graph, atom: Atom, axis: int) -> tuple[Atom, int]:
    """Follows one axis back to the array, and its axis, that it came from."""
    for _ in range(_LONGEST_WALK):
        node = graph.source(atom)
        if node is None:
            step = _step_out(graph, atom, axis)
        else:
            step = _step_back(graph, node, atom, axis)
        if step is None:
            break
        atom, axis = step
    return atom, axis


def _step_out(graph: Graph, atom: Atom, axis: int):
    """An axis of a loop's operand, in the array that it is or is a slice of."""
    if isinstance(atom, Literal) or atom not in graph.outer:
        return None
    outside = graph.outer[atom]
    own, whole = graph.shape(atom), graph.shape(outside)
    if isinstance(outside, Literal) or own not in (whole, whole[1:]):
        return None
    return outside, axis + len(whole) - len(own)


def _step_back(graph: Graph, node: Node, atom: Atom, axis: int):
    if node.primitive == "split":
        return node.ins[0], axis
    if node.primitive == "dot_general":
        for side in axis_maps.sides(graph, node) or ():
            for own, out in side.out.items():
                if out == axis:
                    return side.atom, own
        return None
    return next(steps_back(graph, node, atom, axis), None)


def steps_back(
    graph: Graph, node: Node, atom: Atom, axis: int
) -> Iterator[tuple[Atom, int]]:
    """Where an axis is in the operands of what changes shape, or each value by itself.

    The operands that vary along it come in their order.
    """
    result = graph.shape(atom)
    for operand, source in enumerate(node.ins):
        if isinstance(source, Literal):
            continue
        if node.primitive == "select_n" and operand == 0:
            continue
        shape = graph.shape(source)
        if node.primitive in axis_maps.SHAPING:
            identity = axis_maps.identity(shape)
            for axes in axis_maps.through(graph, node, operand, identity):
                pieces = [piece for piece in axes[axis] if not piece.broadcast]
                wide = [piece for piece in pieces if piece.size > 1] or pieces
                yield from ((source, piece.axis) for piece in wide)
        elif shape == result and len(node.outs) == 1:
            if len(node.ins) == 1 or not is_repeated(graph, source, axis):
                yield source, axis


def is_repeated(graph: Graph, atom: Atom, axis: int) -> bool:
    """Whether a value is the same all along an axis, for it was broadcast there."""
    node = graph.source(atom)
    if node is None or node.primitive != "broadcast_in_dim":
        return False
    return axis not in [int(a) for a in node.params["broadcast_dimensions"]]


def is_raw(graph: Graph, atom: Atom) -> bool:
    """Whether a value is an input or constant, but for its shape and dtype."""
    return bare_input(graph, atom) is not None


def bare_input(graph: Graph, atom: Atom) -> Atom | None:
    """The input or constant that a value is, but for its shape and dtype."""
    for _ in range(_LONGEST_WALK):
        if isinstance(atom, Literal):
            return atom
        node = graph.source(atom)
        if node is None:
            if atom in graph.outer:
                atom = graph.outer[atom]
                continue
            return atom if atom in graph.constants or atom in graph.root.ins else None
        scaled = node.primitive in ("mul", "div") and isinstance(node.ins[1], Literal)
        shaping = (*axis_maps.SHAPING, *_CASTS)
        if node.kind != "leaf" or (node.primitive not in shaping and not scaled):
            return None
        atom = node.ins[0]
    return None


def is_made_of(graph: Graph, atom: Atom, origin: Atom) -> bool:
    """Whether a value depends on an input, within one turn of the loops around it."""
    waiting, seen = [atom], set()
    while waiting:
        atom = waiting.pop()
        if isinstance(atom, Literal) or atom in seen:
            continue
        seen.add(atom)
        if atom == origin:
            return True
        node = graph.source(atom)
        if node is not None:
            waiting += node.ins
        elif atom in graph.outer:
            waiting.append(graph.outer[atom])
    return False


def is_zero(graph: Graph, atom: Atom) -> bool:
    """Whether a value is a literal zero of any shape."""
    while not isinstance(atom, Literal):
        node = graph.source(atom)
        if node is None or node.primitive not in ("broadcast_in_dim", *_CASTS):
            return False
        atom = node.ins[0]
    return bool(
        (atom.val == 0) if not hasattr(atom.val, "all") else (atom.val == 0).all()
    )


def is_random(graph: Graph, atom: Atom) -> bool:
    """Whether a value depends on random bits, looking back to the last product."""
    waiting, seen = [atom], set()
    while waiting and len(seen) < _LONGEST_WALK:
        current = waiting.pop()
        node = graph.source(current)
        if node is None or node.index in seen:
            continue
        seen.add(node.index)
        if node.primitive in _RANDOM:
            return True
        if node.primitive != "dot_general":
            waiting += node.ins
    return False


def same_value(graph: Graph, x: Atom, y: Atom, depth: int = 8) -> bool:
    """Whether two values are computed alike from the same."""
    if isinstance(x, Literal) or isinstance(y, Literal):
        both = isinstance(x, Literal) and isinstance(y, Literal)
        return both and bool(np.all(x.val == y.val))
    if x == y:
        return True
    a, b = graph.source(x), graph.source(y)
    if a is None or b is None or a.outs.index(x) != b.outs.index(y):
        return False
    return same_result(graph, a, b, depth)


def same_result(graph: Graph, a: Node, b: Node, depth: int = 8) -> bool:
    """Whether two leaves compute the same from the same values."""
    if a is b:
        return True
    if depth == 0 or a.kind != "leaf" or b.kind != "leaf" or a.bodies or b.bodies:
        return False
    if a.primitive != b.primitive or len(a.ins) != len(b.ins):
        return False
    if a.primitive in ("random_bits", "name") or str(a.params) != str(b.params):
        return False
    return all(
        same_value(graph, x, y, depth - 1) for x, y in zip(a.ins, b.ins, strict=True)
    )
