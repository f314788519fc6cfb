"""From the query-key product to the softmax: scale, soft cap, bias and mask.

If these are all that happens on the way, the probabilities can be computed again
from query and key, tile by tile, and no map has to be kept.
"""

import dataclasses
import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing import compat
from xviz_jax.tracing.axes import AxisMap
from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.graph import Atom, Graph, Node
from xviz_jax.tracing.matcher import is_maximum
from xviz_jax.tracing.origins import same_value
from xviz_jax.tracing.roles import Product
from xviz_jax.tracing.softmax import Softmax

_CASTS = (
    "convert_element_type",
    "copy",
    "copy_p",
    "name",
    "optimization_barrier",
    "reduce_precision",
    "sharding_constraint",
    "stop_gradient",
)
_SHAPING = ("broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose")
# Anything at least this negative is meant as minus infinity.
_MASKED = -1e3
_LARGEST_CONSTANT = 1 << 12


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """An array that takes part in the scores.

    Attributes:
      atom: The array.
      axes: The softmax's axes, with respect to `shape`.
      shape: The array's shape when its axes are lined up with the scores'.
      places: Where in `shape` each axis of the array stands.
      factor: What a bias is multiplied by; -1 for a mask that is true where masked.
    """

    atom: Atom
    axes: AxisMap
    shape: tuple[int, ...]
    places: tuple[int, ...]
    factor: float


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """How a softmax's operand comes from its product.

    Attributes:
      logits: The operand of the softmax, before its maximum is subtracted.
      scale: What the product is multiplied by; None where it is not understood.
      softcap: `c` in `c * tanh(scores / c)`.
      biases: What is added after scale and soft cap.
      masks: What must hold for a key to be seen.
      why: What is not understood, as a sentence.
    """

    logits: Atom
    scale: float | None = None
    softcap: float | None = None
    biases: tuple[Term, ...] = ()
    masks: tuple[Term, ...] = ()
    why: str = ""


def unshifted(graph: Graph, softmax: Softmax) -> Atom:
    """The softmax's operand, before its own maximum was subtracted."""
    atom = softmax.node.ins[0]
    while True:
        node = graph.source(atom)
        if node is None:
            return atom
        shifted = node.primitive == "sub" and not isinstance(node.ins[0], Literal)
        if shifted and graph.shape(node.ins[0]) == graph.shape(softmax.exponential):
            if not is_maximum(graph, node.ins[1]):
                return atom
            return node.ins[0]
        if node.primitive not in ("copy", "stop_gradient"):
            return atom
        atom = node.ins[0]


def read(graph: Graph, softmax: Softmax, product: Product | None) -> Scores:
    """Reads the way from a product to the softmax, from its end."""
    logits = unshifted(graph, softmax)
    if product is None:
        return Scores(logits, why="there is no query-key product")
    if softmax.node.primitive == "exp2":
        return Scores(logits, why="the softmax is taken to base 2")
    if softmax.modified:
        return Scores(logits, why="the normaliser does not sum every key, or more")
    if softmax.changed:
        why = "what leaves the softmax is changed before it weighs the values"
        return Scores(logits, why=why)
    return _Reader(graph, softmax, product, logits).run()


class _UnevenError(Exception):
    """A bias or mask cannot be lined up with the softmax."""


class _Reader:
    def __init__(self, graph: Graph, softmax: Softmax, product: Product, logits: Atom):
        self.graph = graph
        self.softmax = softmax
        self.product = product.node.outs[0]
        self.logits = logits
        # Steps from the current value to the logits, latest first.
        self.path: list[tuple[Node, int]] = []
        self.scale, self.outer, self.cap = 1.0, 1.0, None
        self.biases: list[Term] = []
        self.masks: list[Term] = []
        self.selections: list[Atom] = []

    def run(self) -> Scores:
        atom = self.logits
        while atom != self.product:
            node = self.graph.source(atom)
            try:
                step = None if node is None else self._step(node)
            except _UnevenError:
                step = None
            if node is None or step is None:
                what = "an input" if node is None else f"`{node.primitive}`"
                why = f"{what} stands between the query-key product and the softmax"
                return Scores(self.logits, why=why)
            operand, atom = step, node.ins[step]
            self.path.append((node, operand))
        for atom in self.softmax.selections:
            known = (same_value(self.graph, atom, each) for each in self.selections)
            if not any(known):
                why = "exponentials are masked by something else than their scores"
                return Scores(self.logits, why=why)
        scale, cap = self.scale, None
        if self.cap is not None:
            scale, cap = self.scale * self.cap, self.cap
        return Scores(self.logits, scale, cap, tuple(self.biases), tuple(self.masks))

    def _step(self, node: Node) -> int | None:
        """Takes one step back; returns the operand that leads to the product."""
        name = node.primitive
        if name in _CASTS or (name in _SHAPING and self._keeps_size(node)):
            return 0
        if name in ("mul", "div"):
            return self._scaled(node)
        if name in ("add", "sub", "add_any"):
            return self._biased(node)
        if name == "select_n":
            return self._masked(node)
        if name == "neg":
            self.scale = -self.scale
            return 0
        if name == "tanh" and self.cap is None and not self.biases:
            self.cap, self.scale = self.scale, 1.0
            return 0
        if name in ("max", "clamp"):
            return self._bounded(node)
        return None

    def _keeps_size(self, node: Node) -> bool:
        shapes = self.graph.shape(node.ins[0]), self.graph.shape(node.outs[0])
        return math.prod(shapes[0]) == math.prod(shapes[1])

    def _scaled(self, node: Node) -> int | None:
        for operand in (0, 1) if node.primitive == "mul" else (0,):
            number = constant(self.graph, node.ins[1 - operand])
            if number is not None and number.size == 1:
                factor = float(number.reshape(()))
                self.scale *= factor if node.primitive == "mul" else 1 / factor
                return operand
        return None

    def _biased(self, node: Node) -> int | None:
        operand = self._leads(node)
        if operand is None or (node.primitive == "sub" and operand == 1):
            return None
        if self.cap is not None:
            return None
        factor = self.scale * (-1.0 if node.primitive == "sub" else 1.0)
        (term,) = self._terms(node, node.ins[1 - operand], None)
        self.biases.append(replace(term, factor=factor))
        return operand

    def _masked(self, node: Node) -> int | None:
        # A cap that comes after lets some of what is masked through.
        if len(node.ins) != 3 or self.cap is not None:
            return None
        for operand in (1, 2):
            other = constant(self.graph, node.ins[3 - operand])
            if other is None or other.size != 1 or other.reshape(()) > _MASKED:
                continue
            self.selections.append(node.ins[0])
            seen = operand == 2
            parts = self._terms(node, node.ins[0], "and" if seen else "or")
            factor = 1.0 if seen else -1.0
            self.masks += [replace(part, factor=factor) for part in parts]
            return operand
        return None

    def _bounded(self, node: Node) -> int | None:
        """A bound from below that only replaces what is masked anyway."""
        operands = (0, 1) if node.primitive == "max" else (1,)
        for operand in operands:
            low = node.ins[1 - operand] if node.primitive == "max" else node.ins[0]
            number = constant(self.graph, low)
            if number is not None and number.size == 1 and number.max() < _MASKED:
                return operand if node.primitive == "max" else None
        return None

    def _leads(self, node: Node) -> int | None:
        """Which operand of an addition comes from the product most directly."""
        found = []
        for operand in (0, 1):
            distance = self._distance(node.ins[operand])
            if distance is not None:
                found.append((distance, operand))
        return min(found)[1] if found else None

    def _distance(self, atom: Atom) -> int | None:
        waiting, seen = [(atom, 0)], set()
        while waiting:
            current, distance = waiting.pop(0)
            if current == self.product:
                return distance
            node = self.graph.source(current)
            if node is None or node.index in seen or node.primitive == "dot_general":
                continue
            seen.add(node.index)
            waiting += [(each, distance + 1) for each in node.ins]
        return None

    def _terms(self, node: Node, atom: Atom, joined: str | None) -> list[Term]:
        """Lines an array up with the scores at `node`, leaving out what repeats.

        What is `joined` of several arrays comes as one term for each.
        """
        result = self.graph.shape(node.outs[0])
        rank = len(self.graph.shape(atom))
        places = tuple(range(len(result))) if rank else ()
        axes = axis_maps.identity(result)
        for later, own in reversed(self.path):
            if later.primitive in _SHAPING:
                axes = axis_maps.through(self.graph, later, own, axes)[0]
        # The softmax's axes may be cut finer than the exponential's own.
        cut = axis_maps.reshape(axes, self.softmax.shape)
        if cut is None:
            raise _UnevenError
        return [
            Term(each, cut, shape, own, 1.0)
            for each, shape, own in self._parts(atom, places, len(result), joined)
        ]

    def _parts(self, atom: Atom, places: tuple[int, ...], rank: int, joined):
        while (source := self.graph.source(atom)) is not None:
            if source.primitive != "broadcast_in_dim":
                break
            mapped = source.params["broadcast_dimensions"]
            places = tuple(places[int(axis)] for axis in mapped)
            atom = source.ins[0]
        if source is not None and source.primitive == joined:
            for each in source.ins:
                own = len(self.graph.shape(each))
                if own not in (0, len(places)):
                    raise _UnevenError
                yield from self._parts(each, places if own else (), rank, joined)
            return
        if joined and isinstance(atom, Literal) and bool(atom.val) == (joined == "and"):
            return  # It lets everything through.
        shape = [1] * rank
        for place, size in zip(places, self.graph.shape(atom), strict=True):
            shape[place] = size
        yield atom, tuple(shape), places


def constant(graph: Graph, atom: Atom) -> np.ndarray | None:
    """The number a value always has; None where it depends on an input.

    Broadcast values come back small. Arrays of more than a few thousand elements
    are not looked at.
    """
    try:
        return _constant(graph, atom, 0)
    except (TypeError, ValueError, jax.errors.TracerArrayConversionError):
        return None


def _constant(graph: Graph, atom: Atom, depth: int) -> np.ndarray | None:
    if isinstance(atom, Literal):
        return np.asarray(atom.val)
    if math.prod(graph.shape(atom)) > _LARGEST_CONSTANT:
        node = graph.source(atom)
        if node is None or node.primitive not in ("broadcast_in_dim", *_CASTS):
            return None
        return _constant(graph, node.ins[0], depth + 1)
    if atom in graph.constants:
        value = graph.constants[atom]
        return None if isinstance(value, compat.Tracer) else np.asarray(value)
    node = graph.source(atom)
    if node is None or node.kind != "leaf" or depth > 20:
        return None
    if node.primitive == "broadcast_in_dim":
        return _constant(graph, node.ins[0], depth + 1)
    operands: list[Any] = []
    for each in node.ins:
        value = _constant(graph, each, depth + 1)
        if value is None or value.shape != graph.shape(each):
            return None
        operands.append(value.astype(graph.aval(each).dtype))
    with jax.ensure_compile_time_eval():
        results = compat.bind(node.eqn, operands)
    return np.asarray(results[node.outs.index(atom)])
