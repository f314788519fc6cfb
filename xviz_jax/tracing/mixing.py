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
from xviz_jax.tracing.origins import origin, steps_back

_PRODUCTS = ("conv_general_dilated", "dot_general")


class Finder:
    """Looks through the bodies of a program, each before those inside it."""

    def __init__(self, graph: Graph):
        """Nothing is known of any value."""
        self.graph = graph
        # Values in which an input has a part, and those in which it and a product have.
        self._given: set[Atom] = set(graph.root.ins)
        self._computed: set[Atom] = set()

    def find(self, body: Body, known: Collection[Node]) -> Iterator[Node]:
        """Products that weigh values by a function of scores.

        Args:
          body: Where to look.
          known: Products that weigh values by a softmax.
        """
        self._mark(body)
        for node in body.leaves:
            if node.primitive != "dot_general" or node in known:
                continue
            sides = axis_maps.sides(self.graph, node)
            assert sides is not None
            one, other = sides
            if self._is_weighed(one, other, known) or self._is_weighed(
                other, one, known
            ):
                yield node

    def _mark(self, body: Body) -> None:
        """Notes which values of a body are computed: weights alone are not."""
        graph = self.graph
        for atom in body.ins:
            if atom in graph.root.ins:
                continue
            if atom not in graph.outer:
                # What a loop carries.
                self._note(atom, given=True, computed=True)
                continue
            outside = graph.outer[atom]
            given, computed = outside in self._given, outside in self._computed
            self._note(atom, given=given, computed=computed)
        for node in body.leaves:
            given = not self._given.isdisjoint(self._floats(node.ins))
            computed = not self._computed.isdisjoint(self._floats(node.ins))
            computed |= given and (bool(node.bodies) or node.primitive in _PRODUCTS)
            for atom in node.outs:
                self._note(atom, given=given, computed=computed)

    def _note(self, atom: Atom, *, given: bool, computed: bool) -> None:
        self._given |= {atom} if given else set()
        self._computed |= {atom} if computed else set()

    def _floats(self, atoms: Collection[Atom]) -> list[Atom]:
        """Which slice of the weights is taken says nothing of them."""
        return [
            atom
            for atom in atoms
            if not isinstance(atom, Literal)
            and jnp.issubdtype(self.graph.aval(atom).dtype, jnp.floating)
        ]

    def _is_weighed(self, weights: Side, values: Side, known: Collection[Node]) -> bool:
        if not {weights.atom, values.atom} <= self._computed:
            return False
        for axis, own in zip(weights.contract, values.contract, strict=True):
            began = origin(self.graph, values.atom, own)
            for product, out in _products(self.graph, weights.atom, axis, known):
                if self._runs_from(product, out, began):
                    return True
        return False

    def _runs_from(self, product: Node, out: int, began: tuple[Atom, int]) -> bool:
        """Whether an axis of a product of two arrays is of keys that began there."""
        sides = axis_maps.sides(self.graph, product)
        assert sides is not None
        for mine, other in (sides, sides[::-1]):
            keys = [axis for axis in mine.free if mine.out[axis] == out]
            both = {mine.atom, other.atom} <= self._computed
            if keys and other.free and both:
                return origin(self.graph, mine.atom, keys[0]) == began
        return False


def _products(
    graph: Graph, atom: Atom, axis: int, known: Collection[Node]
) -> list[tuple[Node, int]]:
    """Products of which a value is an elementwise function, and where its axis is."""
    found: list[tuple[Node, int]] = []
    waiting, seen = [(atom, axis)], set()
    while waiting:
        place = atom, axis = waiting.pop()
        node = graph.source(atom)
        if node is None or place in seen or node.bodies:
            continue
        seen.add(place)
        if node.primitive == "dot_general":
            if node not in known:
                found.append((node, axis))
        else:
            waiting += steps_back(graph, node, atom, axis)
    return found
