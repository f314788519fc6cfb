"""Which sequence the queries, and which the keys, of each attention run over.

The axis of positions is followed back from an operand to the arrays in which it began:
through what acts on each position by itself, and through attention from its output to
its queries. Two operands run over one sequence if their axes began alike.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing import compat
from xviz_jax.tracing.axes import axes_of
from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.fused import FusedValues
from xviz_jax.tracing.graph import Atom, Body, Graph, Node
from xviz_jax.tracing.program import Program
from xviz_jax.tracing.roles import KEY, QUERY
from xviz_jax.tracing.softmax import Combine
from xviz_jax.tracing.values import AttentionValues

_SHAPING = (*axis_maps.SHAPING, "split")
# What these make of an axis of another size is other positions.
_CUTTING = (*axis_maps.RESIZING, "concatenate", "split")
_REDUCING = ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or")
_REDUCING = (*_REDUCING, "reduce_prod", "reduce_sum")

Place = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Run:
    """What one operand of attention runs over.

    Attributes:
      origins: Arrays, and axes of these, in which its positions began.
      now: Sites whose outputs it holds, made in its own turn of a loop.
      earlier: Those made in an earlier turn.
      cut: Whether it selects or joins positions of what attention made.
      upstream: Where it does, all sites that these come from, and whether of an
        earlier turn.
      stacked: Sites that were reached through what a loop around them stacks, and the
        number of that loop.
    """

    origins: frozenset[Place]
    now: frozenset[str]
    earlier: frozenset[str]
    cut: bool
    upstream: frozenset[tuple[str, bool]] = frozenset()
    stacked: frozenset[tuple[str, int]] = frozenset()


class Sequences:
    """Follows positions and values of a traced program back through its attention."""

    def __init__(self, program: Program):
        """Notes where attention puts out what."""
        self.graph: Graph = program.graph
        self._inputs: dict[int, tuple[Body, int]] = {
            atom: (body, number)
            for body in self.graph.bodies()
            for number, atom in enumerate(body.ins)
        }
        # Of each output of attention: its site, and its axes of queries.
        self._made: dict[int, tuple[str, set[int]]] = {}
        self._starts: dict[tuple[str, str], list[Place]] = {}
        self._runs: dict[tuple[str, str], Run] = {}
        for located in program.located:
            site, values = located.site, located.values
            if site.kind != "attention" or not isinstance(
                values, AttentionValues | FusedValues
            ):
                continue
            name = site.joins or site.name
            for atom, axes in _outputs(self.graph, values):
                self._made.setdefault(atom, (name, axes))
            for side in ("query", "key", "value"):
                self._starts[site.name, side] = _positions(values, side)

    def run(self, name: str, side: str) -> Run:
        """What the queries, keys or values of a site run over; `side` says which."""
        if (name, side) not in self._runs:
            self._runs[name, side] = self.follow(self._starts[name, side])
        return self._runs[name, side]

    def made_from(self, name: str, side: str) -> set[int]:
        """All values that an operand of a site depends on."""
        waiting = [(atom, False) for atom, _ in self._starts[name, side]]
        return {atom for atom, _ in self._before(waiting)}

    def is_constant(self, name: str, side: str) -> bool:
        """Whether an operand of a site depends on no input of the program."""
        return self.made_from(name, side).isdisjoint(self.graph.root.ins)

    def follow(self, places: Iterable[Place]) -> Run:
        """What axes of some arrays run over, together."""
        origins: set[Place] = set()
        now: set[str] = set()
        earlier: set[str] = set()
        upstream: set[tuple[str, bool]] = set()
        stacked: set[tuple[str, int]] = set()
        none: frozenset[int] = frozenset()
        waiting = [(*place, False, none) for place in places]
        seen = set()
        while waiting:
            each = waiting.pop()
            atom, axis, before, loops = each
            if isinstance(atom, Literal) or each in seen:
                continue
            seen.add(each)
            if atom in self._made:
                name, axes = self._made[atom]
                if axis in axes:
                    (earlier if before else now).add(name)
                    stacked.update((name, loop) for loop in loops)
                    own = self._starts[name, "query"]
                    waiting += [(*place, before, loops) for place in own]
                continue
            steps = list(self._steps(atom, axis))
            waiting += [
                (other, at, before or again, loops | loop)
                for other, at, again, loop in steps
            ]
            if not steps and self._is_positions(atom):
                origins.add((atom, axis))
                upstream |= self._upstream(atom, before)
        return Run(
            origins=frozenset(origins),
            now=frozenset(now),
            earlier=frozenset(earlier),
            cut=bool(upstream),
            upstream=frozenset(upstream),
            stacked=frozenset(stacked),
        )

    def made_of(self, name: str, side: str, atoms: Iterable[Atom]) -> bool:
        """Whether an operand of a site depends on all of some values."""
        missing = set(atoms)
        waiting = [(atom, False) for atom, _ in self._starts[name, side]]
        for atom, _ in self._before(waiting):
            missing.discard(atom)
        return not missing

    def _upstream(self, atom: Atom, before: bool) -> set[tuple[str, bool]]:
        """Sites that a value depends on, and whether in an earlier turn."""
        return {
            (self._made[each][0], again)
            for each, again in self._before([(atom, before)])
            if each in self._made
        }

    def _before(self, waiting: list[tuple[Atom, bool]]) -> Iterator[tuple[int, bool]]:
        """All that some values depend on, and whether in an earlier turn."""
        seen = set()
        while waiting:
            atom, before = waiting.pop()
            if isinstance(atom, Literal) or (atom, before) in seen:
                continue
            seen.add((atom, before))
            yield atom, before
            node = self.graph.source(atom)
            if node is None:
                entering = self._entering(atom)
                waiting += [(other, before or again) for other, _, again in entering]
            elif node.bodies:
                waiting += [(other, before) for other, _ in _leaving(node, atom)]
            else:
                waiting += [(other, before) for other in node.ins]

    def read(self) -> frozenset[str]:
        """Sites whose sequence the program's output reads, at its end."""
        return self._reached(self.graph.root.outs)

    def _reached(self, atoms: Iterable[Atom]) -> frozenset[str]:
        """Sites whose outputs some values depend on, but for those behind others."""
        found, waiting, seen = set(), list(atoms), set()
        while waiting:
            atom = waiting.pop()
            if isinstance(atom, Literal) or atom in seen:
                continue
            seen.add(atom)
            if atom in self._made:
                found.add(self._made[atom][0])
                continue
            node = self.graph.source(atom)
            if node is None:
                waiting += [other for other, _, _ in self._entering(atom)]
            elif node.bodies:
                waiting += [other for other, _ in _leaving(node, atom)]
            else:
                waiting += node.ins
        return frozenset(found)

    def axis_of(self, atom: Atom) -> int | None:
        """The axis of a value that runs over positions of what attention made."""
        if isinstance(atom, Literal):
            return None
        for axis in range(len(self.graph.shape(atom))):
            run = self.follow([(atom, axis)])
            if run.now or run.earlier:
                return axis
        return None

    def _steps(
        self, atom: int, axis: int
    ) -> Iterator[tuple[Atom, int, bool, frozenset[int]]]:
        """One step back along an axis.

        Yields:
          An array, its axis, whether it is of a loop's earlier turn, and the loop that
          stacks it, if one does.
        """
        none: frozenset[int] = frozenset()
        node = self.graph.source(atom)
        if node is None:
            for other, shift, again in self._entering(atom):
                yield other, axis + shift, again, none
        elif node.bodies:
            for other, shift in _leaving(node, atom):
                # The first axis of what a scan stacks is its turns.
                if axis + shift >= 0:
                    loop = frozenset({node.index}) if shift else none
                    yield other, axis + shift, False, loop
        else:
            for other, own in _before(self.graph, node, atom, axis):
                yield other, own, False, none

    def _entering(self, atom: int) -> Iterator[tuple[Atom, int, bool]]:
        """What an input of a body is outside, or was at the turn before."""
        if atom not in self._inputs:
            return
        body, number = self._inputs[atom]
        node = body.parent
        if node is None:
            return
        if node.kind == "scan":
            fixed, carried = compat.scan_sizes(node.params)
            sliced = number >= fixed + carried
            yield node.ins[number], int(sliced), False
            if fixed <= number < fixed + carried:
                yield body.outs[number - fixed], 0, True
        elif node.kind == "while":
            tested, fixed = node.params["cond_nconsts"], node.params["body_nconsts"]
            yield node.ins[tested + number], 0, False
            if number >= fixed:
                yield body.outs[number - fixed], 0, True
        else:
            yield node.ins[number + (node.kind == "cond")], 0, False

    def _is_positions(self, atom: int) -> bool:
        """Whether a value may tell positions apart: a count of them is none."""
        node = self.graph.source(atom)
        return node is None or node.primitive not in ("iota", "broadcast_in_dim")


def _leaving(node: Node, atom: int) -> Iterator[tuple[Atom, int]]:
    """What a result of a loop, branch or shard is inside."""
    number = node.outs.index(atom)
    stacked = False
    if node.kind == "scan":
        _, carried = compat.scan_sizes(node.params)
        stacked = number >= carried
    for body in node.bodies:
        yield body.outs[number], -1 if stacked else 0
    if node.kind == "while":
        fixed = node.params["cond_nconsts"] + node.params["body_nconsts"]
        yield node.ins[fixed + number], 0


def _outputs(
    graph: Graph, values: AttentionValues | FusedValues
) -> list[tuple[int, set[int]]]:
    """What attention puts out, before and after its division, and axes of queries."""
    if isinstance(values, FusedValues):
        axis = values.fused.layout.index("T")
        return [(out, {axis}) for out in values.fused.node.outs]
    reading, combine = values.reading, values.reading.combine
    if combine.node.primitive == "dot_general":
        sides = axis_maps.sides(graph, combine.node)
        assert sides is not None
        places = sides[combine.operand].out.items()
    else:
        summed = {int(axis) for axis in combine.node.params["axes"]}
        kept = [axis for axis in range(len(combine.axes)) if axis not in summed]
        places = [(axis, out) for out, axis in enumerate(kept)]
    queries = set(reading.along(QUERY))
    own = {out for axis, out in places if axes_of(combine.axes[axis]) & queries}
    found = [(combine.node.outs[0], own)]
    if reading.deferred and reading.softmax.deferred is not None:
        deferred = reading.softmax.deferred
        along = {n for n, group in enumerate(deferred.axes) if axes_of(group) & own}
        found.append((deferred.quotient, along))
    return found


def _positions(values: AttentionValues | FusedValues, side: str) -> list[Place]:
    """The axes of queries, keys or values, in the operand that has them."""
    if isinstance(values, FusedValues):
        fused = values.fused
        atom = fused.operands[("query", "key", "value").index(side)]
        return [(atom, fused.layout.index("T"))]
    reading = values.reading
    if side == "value":
        return _of_values(values.graph, reading.combine)
    product = reading.product
    if product is None:
        return []
    asked = side == "query"
    own = product.sides[product.query_side if asked else 1 - product.query_side]
    back = {out: axis for axis, out in own.out.items()}
    along = reading.along(QUERY if asked else KEY)
    pieces = [piece for axis in along for piece in product.axes[axis]]
    wide = [piece for piece in pieces if piece.size > 1] or pieces
    return [(own.atom, back[p.axis]) for p in wide if p.axis in back]


def _of_values(graph: Graph, combine: Combine) -> list[Place]:
    if combine.node.primitive != "dot_general" or not isinstance(combine.value, int):
        return []
    sides = axis_maps.sides(graph, combine.node)
    assert sides is not None
    return [(combine.value, axis) for axis in sides[1 - combine.operand].contract]


def _before(graph: Graph, node: Node, atom: int, axis: int) -> list[tuple[Atom, int]]:
    """Where an axis of an operation's result is in its operands."""
    name, result = node.primitive, graph.shape(atom)
    if name == "dot_general":
        return [
            (side.atom, own)
            for side in axis_maps.sides(graph, node) or ()
            for own, out in side.out.items()
            if out == axis
        ]
    if name in _REDUCING:
        gone = {int(each) for each in node.params["axes"]}
        rank = len(graph.shape(node.ins[0]))
        kept = [own for own in range(rank) if own not in gone]
        return [(node.ins[0], kept[axis])]
    if name == "conv_general_dilated":
        numbers = node.params["dimension_numbers"]
        own = numbers.lhs_spec[numbers.out_spec.index(axis)]
        same = axis != numbers.out_spec[1]
        same &= graph.shape(node.ins[0])[own] == result[axis]
        return [(node.ins[0], own)] if same else []
    if name == "optimization_barrier":
        return [(node.ins[node.outs.index(atom)], axis)]
    if name == "gather":
        return _gathered(graph, node, axis)
    found: list[tuple[Atom, int]] = []
    for operand, source in enumerate(node.ins):
        if isinstance(source, Literal) or (name == "select_n" and operand == 0):
            continue
        shape = graph.shape(source)
        if name in _SHAPING:
            maps = axis_maps.through(graph, node, operand, axis_maps.identity(shape))
            if maps:
                pieces = maps[node.outs.index(atom)][axis]
                found += [(source, own) for own in _visited(node, pieces, axis)]
        elif len(shape) == len(result) and shape[axis] == result[axis]:
            found.append((source, axis))
    return [each for each in found if not _is_cut(graph, node, each, result[axis])]


def _gathered(graph: Graph, node: Node, axis: int) -> list[tuple[Atom, int]]:
    """The axis of what is gathered from, where it is taken whole."""
    numbers, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    if axis not in numbers.offset_dims:
        return []
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [own for own in range(len(sizes)) if own not in gone]
    own = kept[numbers.offset_dims.index(axis)]
    whole = sizes[own] == graph.shape(node.ins[0])[own]
    return [(node.ins[0], own)] if whole else []


def _visited(node: Node, pieces: Sequence[axis_maps.Piece], axis: int) -> list[int]:
    """Axes of an operand that an axis of the result runs over."""
    if node.primitive == "rev" and axis in node.params["dimensions"]:
        return []
    own = [piece for piece in pieces if not piece.broadcast]
    return [piece.axis for piece in own if piece.size > 1] or [p.axis for p in own]


def _is_cut(graph: Graph, node: Node, place: tuple[Atom, int], size: int) -> bool:
    atom, axis = place
    return node.primitive in _CUTTING and graph.shape(atom)[axis] != size
