"""Finds products that mix positions by what another product says, without a softmax.

As attention by sigmoids, by rectified or squared scores, or by exponentials that are
weighted before they are summed. The sign is an axis of positions that meets itself:
an array of queries by keys is made of two arrays, and weighs a third one whose axis
began where that of the keys did.
"""

from collections.abc import Collection, Iterator

import jax.numpy as jnp

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing.axes import Side
from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.graph import Atom, Body, Graph, Node
from xviz_jax.tracing.origins import is_raw, origin

_LONGEST_WALK = 400


def find(graph: Graph, body: Body, known: Collection[Node]) -> Iterator[Node]:
    """Products that weigh values by a function of scores.

    Args:
      graph: The program.
      body: Where to look.
      known: Products that weigh values by a softmax, and exponentials of these: what
        is made of them as well is their derivative.
    """
    known = set(known)
    for node in body.leaves:
        if node.primitive != "dot_general" or node in known:
            continue
        sides = axis_maps.sides(graph, node)
        assert sides is not None
        if any(
            _is_weighed(graph, sides[operand], sides[1 - operand], known)
            for operand in (0, 1)
        ):
            yield node


def _is_weighed(
    graph: Graph, weights: Side, values: Side, known: Collection[Node]
) -> bool:
    if is_raw(graph, values.atom) or is_raw(graph, weights.atom):
        return False
    if not (_is_computed(graph, values.atom) and _is_computed(graph, weights.atom)):
        return False
    for axis, own in zip(weights.contract, values.contract, strict=True):
        began = origin(graph, values.atom, own)
        for product, out in _products(graph, weights.atom, axis, known):
            if _runs_from(graph, product, out, began):
                return True
    return False


def _runs_from(graph: Graph, product: Node, out: int, began: tuple[Atom, int]) -> bool:
    """Whether an axis of a product of two arrays is that of keys which began there."""
    sides = axis_maps.sides(graph, product)
    assert sides is not None
    for mine, other in (sides, sides[::-1]):
        keys = [axis for axis in mine.free if mine.out[axis] == out]
        if not keys or not other.free:
            continue
        if not (_is_computed(graph, mine.atom) and _is_computed(graph, other.atom)):
            continue
        if origin(graph, mine.atom, keys[0]) == began:
            return True
    return False


def _is_computed(graph: Graph, atom: Atom) -> bool:
    """Whether products and inputs have a part in a value: in weights they have none."""
    waiting, seen = [atom], set()
    multiplied = given = False
    while waiting and len(seen) < _LONGEST_WALK and not (multiplied and given):
        current = waiting.pop()
        if isinstance(current, Literal) or current in seen:
            continue
        seen.add(current)
        # Which slice of the weights it is says nothing of them.
        if not jnp.issubdtype(graph.aval(current).dtype, jnp.floating):
            continue
        node = graph.source(current)
        if node is None:
            if current in graph.outer:
                waiting.append(graph.outer[current])
            else:
                given |= current not in graph.constants
                # What a loop carries.
                multiplied |= given and current not in graph.root.ins
        else:
            products = ("conv_general_dilated", "dot_general")
            multiplied |= bool(node.bodies) or node.primitive in products
            waiting += node.ins
    return multiplied and given


def _products(
    graph: Graph, atom: Atom, axis: int, known: Collection[Node]
) -> list[tuple[Node, int]]:
    """Products of which a value is an elementwise function, and where its axis is."""
    found: list[tuple[Node, int]] = []
    waiting, seen = [(atom, axis)], set()
    while waiting and len(seen) < _LONGEST_WALK:
        place = atom, axis = waiting.pop()
        node = graph.source(atom)
        if node is None or place in seen or node.bodies:
            continue
        seen.add(place)
        if node.primitive == "dot_general":
            if node not in known:
                found.append((node, axis))
            continue
        if node in known:
            return []
        result = graph.shape(atom)
        for operand, source in enumerate(node.ins):
            if isinstance(source, Literal):
                continue
            shape = graph.shape(source)
            if node.primitive in axis_maps.SHAPING:
                identity = axis_maps.identity(shape)
                for axes in axis_maps.through(graph, node, operand, identity):
                    pieces = [piece for piece in axes[axis] if not piece.broadcast]
                    waiting += [(source, p.axis) for p in pieces if p.size > 1]
            elif shape == result and len(node.outs) == 1:
                waiting.append((source, axis))
    return found
