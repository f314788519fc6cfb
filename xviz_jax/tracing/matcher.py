"""Finds every softmax that weighs values, however it is written.

The anchor is the exponential. From each `exp` forward, values are tagged with what
they are to it: the exponentials themselves, their sum, its inverse or logarithm,
the probabilities, an output still to be divided. Each tag carries an axis map, so
no pattern of shapes, masks, casts or calls has to be listed; what an operation
means to a tag is decided by its arithmetic alone.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing.axes import AxisMap, axes_of
from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.graph import Atom, Body, Graph, Node
from xviz_jax.tracing.origins import same_result
from xviz_jax.tracing.softmax import Combine, Deferred, Softmax

_UNCHANGED = {
    "add_any",
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "layout_constraint",
    "name",
    "neg",
    "optimization_barrier",
    "pbroadcast",
    "pvary",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
    "stop_gradient",
}
_ARITHMETIC = {
    "abs",
    "add",
    "clamp",
    "div",
    "integer_pow",
    "max",
    "min",
    "mul",
    "pow",
    "select_n",
    "sqrt",
    "square",
    "sub",
}
# Elementwise operations through which a tag stays what it is.
_PASSES = {
    "score": _UNCHANGED
    | _ARITHMETIC
    | {"erf", "expm1", "log", "log1p", "logistic", "tanh"},
    "exponential": _UNCHANGED | {"mul", "select_n"},
    "sum": _UNCHANGED | {"abs", "add", "clamp", "max", "select_n"},
    "inverse": _UNCHANGED | {"abs", "add", "clamp", "max", "select_n"},
    "log_sum": _UNCHANGED | {"abs", "add", "clamp", "max", "select_n"},
    "log_probability": _UNCHANGED | {"select_n"},
    "probability": _UNCHANGED | _ARITHMETIC,
    "numerator": _UNCHANGED,
}
# A network may add many products up; the newest are the ones that matter.
_MOST_SCORES = 6
_NEGLIGIBLE = 1e-5


@dataclasses.dataclass(frozen=True)
class _Tag:
    axes: AxisMap
    # What an elementwise product multiplied by last.
    factor: Atom = None
    combine: Combine | None = None


class _Tags:
    """What each value of a body is, to which exponential or product."""

    def __init__(self):
        self._of: dict[int, dict[tuple[str, Any], _Tag]] = {}

    def add(self, atom: Atom, kind: str, source: Any, tag: _Tag) -> None:
        tags = self._of.setdefault(atom, {})
        tags.setdefault((kind, source), tag)
        scores = [key for key in tags if key[0] == "score"]
        if len(scores) > _MOST_SCORES:
            del tags[min(scores, key=lambda key: key[1].index)]

    def of(self, atom: Atom, *kinds: str) -> Iterator[tuple[str, Any, _Tag]]:
        if isinstance(atom, Literal):
            return
        for (kind, source), tag in list(self._of.get(atom, {}).items()):
            if not kinds or kind in kinds:
                yield kind, source, tag

    def get(self, atom: Atom, kind: str, source: Any) -> _Tag | None:
        if isinstance(atom, Literal):
            return None
        return self._of.get(atom, {}).get((kind, source))


def find(graph: Graph, body: Body) -> list[Softmax]:
    """Every exponential of a body whose sum is taken, in program order."""
    return _Finder(graph, body).run()


class _Finder:
    def __init__(self, graph: Graph, body: Body):
        self.graph = graph
        self.body = body
        self.tags = _Tags()
        self.found: list[Softmax] = []

    def run(self) -> list[Softmax]:
        rules = {
            "dot_general": self._dot,
            "exp": self._exp,
            "exp2": self._exp,
            "reduce_sum": self._sum,
            "log": self._log,
        }
        for node in self.body.leaves:
            rule = rules.get(node.primitive)
            if rule is not None:
                rule(node)
            else:
                divided = self._divide(node)
                self._log_probability(node)
                self._pass(node, divided)
        return [softmax for softmax in self.found if softmax.keys]

    def _dot(self, node: Node) -> None:
        shape = self.graph.shape(node.outs[0])
        sides = axis_maps.sides(self.graph, node)
        assert sides is not None
        for operand in (0, 1):
            mine, value = sides[operand], node.ins[1 - operand]
            if not sides[1 - operand].free and not mine.free:
                # Every axis is shared: an inner product, as in an entropy.
                continue
            weights = self.tags.of(node.ins[operand], "probability", "exponential")
            for kind, softmax, tag in weights:
                combine = Combine(kind, node, operand, tag.axes, value)
                softmax.combines.append(combine)
                if kind == "exponential":
                    numerator = _Tag(axis_maps.identity(shape), combine=combine)
                    self.tags.add(node.outs[0], "numerator", softmax, numerator)
                elif softmax.keys and self._mixes_heads(softmax, combine):
                    # Heads are mixed (talking heads): still probabilities.
                    axes = [axis_maps.repeated(size) for size in shape]
                    for axis, out in mine.out.items():
                        axes[out] = tag.axes[axis]
                    mixed = _Tag(tuple(axes), factor=value)
                    self.tags.add(node.outs[0], "probability", softmax, mixed)
            self._mix_scores(node, operand, sides)
        own = _Tag(axis_maps.identity(shape))
        self.tags.add(node.outs[0], "score", node, own)

    def _mixes_heads(self, softmax: Softmax, combine: Combine) -> bool:
        """Whether a product sums over neither the queries nor the keys."""
        summed = combine.summed()
        if summed & softmax.keys or not softmax.scores:
            return not summed & softmax.keys
        for product, own in softmax.scores.items():
            places = {
                side.out[axis]
                for side in axis_maps.sides(self.graph, product) or ()
                for axis in side.free
            }
            if not any(axes_of(own[axis]) & places for axis in summed):
                return True
        return False

    def _mix_scores(self, node: Node, operand: int, sides: tuple) -> None:
        """A product over the head axis of scores leaves scores (talking heads)."""
        mine, other = sides[operand], sides[1 - operand]
        if len(mine.contract) != 1 or len(other.free) != 1:
            return
        contracted = mine.contract[0]
        width = self.graph.shape(node.ins[1 - operand])[other.free[0]]
        for _, product, tag in self.tags.of(node.ins[operand], "score"):
            pieces = tag.axes[contracted]
            made = axis_maps.sides(self.graph, product)
            batch = {made[0].out[axis] for axis in made[0].batch} if made else set()
            if len(pieces) != 1 or pieces[0].axis not in batch:
                continue
            axes: list[Any] = [()] * len(self.graph.shape(node.outs[0]))
            for axis, out in mine.out.items():
                axes[out] = tag.axes[axis]
            head = dataclasses.replace(pieces[0], size=width)
            axes[other.out[other.free[0]]] = (head,)
            self.tags.add(node.outs[0], "score", product, _Tag(tuple(axes)))

    def _exp(self, node: Node) -> None:
        operand, result = node.ins[0], node.outs[0]
        for _, softmax, tag in self.tags.of(operand, "log_probability"):
            self._set_probability(softmax, result, tag.axes)
            return
        if isinstance(operand, Literal):
            return
        shape = self.graph.shape(operand)
        scores = {
            product: tag.axes for _, product, tag in self.tags.of(operand, "score")
        }
        whole = axis_maps.identity(shape)
        for softmax in self.found:
            # The same exponential may be written twice, above and below a division.
            if same_result(self.graph, softmax.node, node):
                break
        else:
            softmax = Softmax(node, self.body, shape, scores, whole)
            self.found.append(softmax)
        self.tags.add(result, "exponential", softmax, _Tag(whole))

    def _sum(self, node: Node) -> None:
        if axis_maps.sides(self.graph, node) is not None:
            own = _Tag(axis_maps.identity(self.graph.shape(node.outs[0])))
            self.tags.add(node.outs[0], "score", node, own)
        over = {int(axis) for axis in node.params["axes"]}
        wanted = ("exponential", "probability")
        for kind, softmax, tag in self.tags.of(node.ins[0], *wanted):
            summed = set().union(*[axes_of(tag.axes[axis]) for axis in over])
            rest = tuple(p for axis, p in enumerate(tag.axes) if axis not in over)
            spread = any(piece.broadcast for pieces in rest for piece in pieces)
            masked = tag.factor is None or self._is_mask(tag.factor)
            if kind == "exponential" and summed and masked and not spread:
                if not softmax.keys:
                    softmax.keys = frozenset(summed)
                    softmax.total, softmax.total_axes = node.outs[0], rest
                if softmax.keys == summed:
                    self.tags.add(node.outs[0], "sum", softmax, _Tag(rest))
            elif tag.factor is not None and spread and summed:
                # Multiply and sum: the axis that only the values have is left over.
                combine = Combine(kind, node, 0, tag.axes, tag.factor)
                if kind == "probability" and softmax.keys <= summed:
                    softmax.combines.append(combine)
                elif kind == "exponential":
                    softmax.combines.append(combine)
                    shape = self.graph.shape(node.outs[0])
                    numerator = _Tag(axis_maps.identity(shape), combine=combine)
                    self.tags.add(node.outs[0], "numerator", softmax, numerator)

    def _log(self, node: Node) -> None:
        for kind, softmax, tag in self.tags.of(node.ins[0], "sum", "score"):
            kind = "log_sum" if kind == "sum" else "score"
            self.tags.add(node.outs[0], kind, softmax, _Tag(tag.axes))

    def _divide(self, node: Node) -> bool:
        """Divides exponentials, or a numerator, by their sum."""
        if node.primitive in ("integer_pow", "pow"):
            power = node.params.get("y")
            if power is None and isinstance(node.ins[1], Literal):
                power = float(np.asarray(node.ins[1].val))
            for _, softmax, tag in self.tags.of(node.ins[0], "sum"):
                if power == -1:
                    self.tags.add(node.outs[0], "inverse", softmax, tag)
            return False
        if node.primitive not in ("div", "mul"):
            return False
        by, orders = ("sum", [(0, 1)])
        if node.primitive == "mul":
            by, orders = ("inverse", [(0, 1), (1, 0)])
        divided = False
        for above, below in orders:
            weights = self.tags.of(node.ins[above], "exponential", "numerator")
            for kind, softmax, tag in weights:
                total = self.tags.get(node.ins[below], by, softmax)
                if total is None:
                    continue
                divided = True
                if kind == "exponential":
                    self._set_probability(softmax, node.outs[0], tag.axes)
                elif softmax.deferred is None and tag.combine is not None:
                    softmax.deferred = Deferred(
                        tag.combine,
                        node.outs[0],
                        tag.axes,
                        node.ins[below],
                        total.axes,
                        by == "inverse",
                    )
        if node.primitive == "div" and not divided:
            for _, softmax, tag in self.tags.of(node.ins[1], "sum"):
                self.tags.add(node.outs[0], "inverse", softmax, tag)
        return divided

    def _log_probability(self, node: Node) -> None:
        if node.primitive != "sub":
            return
        for _, softmax, _ in self.tags.of(node.ins[1], "log_sum"):
            whole = self.graph.shape(node.outs[0]) == softmax.shape
            if whole and not isinstance(node.ins[0], Literal):
                tag = _Tag(axis_maps.identity(softmax.shape))
                self.tags.add(node.outs[0], "log_probability", softmax, tag)

    def _set_probability(self, softmax: Softmax, atom: Atom, axes: AxisMap) -> None:
        if softmax.probability is None:
            softmax.probability, softmax.probability_axes = atom, axes
        self.tags.add(atom, "probability", softmax, _Tag(axes))

    def _pass(self, node: Node, divided: bool) -> None:
        """Carries tags through an operation that changes shape or values only."""
        for operand, atom in enumerate(node.ins):
            for kind, source, tag in self.tags.of(atom):
                if divided and kind in ("exponential", "numerator"):
                    continue
                self._note_modified(node, operand, kind, source)
                for out, axes in self._follow(node, operand, kind, tag):
                    passed = dataclasses.replace(tag, axes=axes)
                    if node.primitive == "mul":
                        factor = node.ins[1 - operand]
                        passed = dataclasses.replace(passed, factor=factor)
                    self.tags.add(out, kind, source, passed)

    def _note_modified(self, node: Node, operand: int, kind: str, source: Any) -> None:
        """Notes what keeps query and key from telling the probabilities."""
        if kind == "exponential" and node.primitive == "select_n" and operand > 0:
            source.selections.append(node.ins[0])
        if node.primitive not in ("add", "add_any", "max", "mul"):
            return
        other = node.ins[1 - operand]
        constant = isinstance(other, Literal)
        if kind == "exponential" and node.primitive == "mul":
            if not constant and self._is_mask(other):
                source.modified = True
        elif kind == "sum" and node.primitive != "mul":
            if not constant or np.max(np.abs(np.float64(other.val))) > _NEGLIGIBLE:
                source.modified = True
        elif kind == "log_sum" and node.primitive != "mul":
            if not constant and not is_maximum(self.graph, other):
                source.modified = True

    def _follow(
        self, node: Node, operand: int, kind: str, tag: _Tag
    ) -> list[tuple[Atom, AxisMap]]:
        name = node.primitive
        scaled = kind == "numerator" and name in ("mul", "div")
        if scaled and not (operand == 0 and isinstance(node.ins[1], Literal)):
            return []
        if name in _PASSES[kind] or scaled:
            if name == "select_n" and operand == 0:
                return []
            if name == "div" and operand == 1 and kind != "score":
                return []
            if name == "optimization_barrier":
                return [(node.outs[operand], tag.axes)]
            shape = self.graph.shape(node.ins[operand])
            result = self.graph.shape(node.outs[0])
            axes = axis_maps.elementwise(tag.axes, shape, result)
            return [] if axes is None else [(node.outs[0], axes)]
        maps = axis_maps.through(self.graph, node, operand, tag.axes)
        return [
            (out, axes)
            for out, axes in zip(node.outs, maps, strict=False)
            if len(axes) == len(self.graph.shape(out))
        ]

    def _is_mask(self, atom: Atom) -> bool:
        """Whether a factor is made of truth values."""
        while True:
            aval = self.graph.aval(atom)
            if aval.dtype == np.bool_:
                return True
            node = self.graph.source(atom)
            shaping = ("broadcast_in_dim", "convert_element_type", "reshape")
            if node is None or node.primitive not in shaping:
                return False
            atom = node.ins[0]


def is_maximum(graph: Graph, atom: Atom) -> bool:
    """Whether a value is the maximum that a softmax subtracts."""
    passing = (*_UNCHANGED, *axis_maps.SHAPING, "is_finite", "max", "select_n")
    waiting, steps = [atom], 0
    while waiting and steps < 20:
        steps += 1
        node = graph.source(waiting.pop())
        if node is None:
            continue
        if node.primitive in ("reduce_max", "pmax"):
            return True
        if node.primitive in passing:
            waiting += node.ins
    return False
