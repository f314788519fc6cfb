"""Sites that are one array: embeddings, named values, blocks, feature maps."""

import math
from collections.abc import Callable

import jax.numpy as jnp

from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.graph import Atom, Body, Graph, Node
from xviz_jax.tracing.interpreter import Plan
from xviz_jax.tracing.origins import is_raw
from xviz_jax.tracing.values import AttentionValues, Change, Read

_INTEGER_STEPS = (
    "add",
    "broadcast_in_dim",
    "clamp",
    "concatenate",
    "convert_element_type",
    "copy",
    "expand_dims",
    "max",
    "min",
    "reshape",
    "select_n",
    "squeeze",
    "sub",
    "transpose",
)
# Operations of a layer between its attention and the residual sum.
_LAYER_STEPS = (
    "add",
    "broadcast_in_dim",
    "convert_element_type",
    "div",
    "dot_general",
    "mul",
    "name",
    "optimization_barrier",
    "reshape",
    "select_n",
    "sharding_constraint",
    "squeeze",
    "transpose",
)
_FARTHEST = 200


class ActivationValues:
    """The value of one array."""

    def __init__(self, graph: Graph, atom: int):
        """Takes the array's number."""
        self.graph = graph
        self.atom = atom

    def readers(self) -> dict[str, Callable[[], tuple[list[Atom], Read]]]:
        """As `Values`."""
        return {"activation": lambda: ([self.atom], lambda get: get(self.atom))}

    def rewrite(self, plan: Plan, name: str, change: Change) -> None:
        """As `Values`."""
        plan.rewrite(self.atom, name, lambda value, _, given: change(value, given))

    def add_to_output(self, plan: Plan, name: str) -> tuple[int, ...] | None:
        """As `Values`: an activation is its own output."""
        self.rewrite(
            plan,
            name,
            lambda value, given: (
                value if given is None else value + given.astype(value.dtype)
            ),
        )
        return self.graph.shape(self.atom)


def named(body: Body) -> list[tuple[Node, str]]:
    """Values marked by `jax.ad_checkpoint.checkpoint_name`, with their names."""
    return [
        (leaf, leaf.params["name"]) for leaf in body.leaves if leaf.primitive == "name"
    ]


def convolutions(graph: Graph, body: Body) -> list[tuple[Node, int, int]]:
    """Convolutions, their outputs with their biases, and the axis of channels there.

    The axis is counted from the last, so that a batch axis of size 1 that is dropped
    on the way to the bias leaves it as it is.
    """
    found = []
    for leaf in body.leaves:
        if leaf.primitive == "conv_general_dilated":
            channels = leaf.params["dimension_numbers"].out_spec[1]
            axis = channels - len(graph.shape(leaf.outs[0]))
            atom = leaf.outs[0]
            biased = _with_bias(graph, atom, graph.shape(atom)[axis])
            found.append((leaf, biased, axis))
    return found


def _with_bias(graph: Graph, atom: int, channels: int) -> int:
    last, shape = atom, graph.shape(atom)
    while len(users := graph.users.get(last, ())) == 1 and users[0].kind == "leaf":
        node = users[0]
        new = graph.shape(node.outs[0]) if node.outs else ()
        if node.primitive == "add" and new == graph.shape(last):
            other = node.ins[1 - node.ins.index(last)]
            return node.outs[0] if _is_bias(graph, other, channels) else atom
        dropped = len(shape) - len(new)
        same = 0 <= dropped and shape == (1,) * dropped + new
        if node.primitive not in ("reshape", "squeeze") or not same:
            return atom
        last = node.outs[0]
    return atom


def _is_bias(graph: Graph, atom: Atom, channels: int) -> bool:
    """Whether a value is one parameter for each channel, or one for all."""
    if not is_raw(graph, atom):
        return False
    while not isinstance(atom, Literal) and math.prod(graph.shape(atom)) > channels:
        node = graph.source(atom)
        if node is None:
            return False
        atom = node.ins[0]
    return True


class Lookups:
    """Finds tables of parameters that are looked up by integer inputs."""

    def __init__(self, graph: Graph):
        """Marks everything that is an integer input but for shape and offset."""
        self.graph = graph
        # Which of the program's inputs each index, and each one-hot array, is made of.
        self.indices: dict[int, frozenset[int]] = {}
        self.hot: dict[int, frozenset[int]] = {}
        for number, atom in enumerate(graph.root.ins):
            if self._is_integer(atom):
                self.indices[atom] = frozenset({number})
        for body in graph.bodies():
            for inner in body.ins:
                passed = self._of(self.indices, [graph.outer.get(inner)])
                if passed:
                    self.indices[inner] = passed
            for leaf in body.leaves:
                self._mark(leaf)

    def of(self, body: Body) -> list[Node]:
        """Nodes whose result is looked-up rows, in program order."""
        return [leaf for leaf in body.leaves if self.inputs(leaf)]

    def inputs(self, leaf: Node) -> tuple[int, ...]:
        """Numbers of the program's inputs that a node looks up; none for others."""
        found: frozenset[int] = frozenset()
        if leaf.primitive == "gather" and self._is_table(leaf.ins[0]):
            found = self._of(self.indices, [leaf.ins[1]])
        elif leaf.primitive == "dot_general":
            for hot, table in ((0, 1), (1, 0)):
                if self._is_table(leaf.ins[table]):
                    found |= self._of(self.hot, [leaf.ins[hot]])
        return tuple(sorted(found))

    def rows(self, node: Node) -> int:
        """What a lookup returns, without axes of one row each."""
        atom = node.outs[0]
        users = self.graph.users.get(atom, ())
        while len(users) == 1 and users[0].primitive == "squeeze":
            atom = users[0].outs[0]
            users = self.graph.users.get(atom, ())
        return atom

    def _of(self, marks: dict[int, frozenset[int]], atoms) -> frozenset[int]:
        known = [atom for atom in atoms if not isinstance(atom, Literal)]
        return frozenset().union(*[marks.get(atom, frozenset()) for atom in known])

    def _mark(self, leaf: Node) -> None:
        indices = self._of(self.indices, leaf.ins)
        if leaf.primitive in _INTEGER_STEPS and indices:
            for out in leaf.outs:
                if self._is_integer(out):
                    self.indices[out] = indices
        if leaf.primitive == "eq" and indices:
            others = [atom for atom in leaf.ins if not self._of(self.indices, [atom])]
            if len(others) == 1 and self._counts(others[0]):
                self.hot[leaf.outs[0]] = indices
        hot = self._of(self.hot, leaf.ins)
        shaping = ("convert_element_type", "reshape", "transpose", "squeeze")
        if leaf.primitive in shaping and hot:
            self.hot[leaf.outs[0]] = hot

    def _is_table(self, atom: Atom) -> bool:
        wide = len(self.graph.shape(atom)) >= 2
        real = jnp.issubdtype(self.graph.aval(atom).dtype, jnp.floating)
        return wide and real and is_raw(self.graph, atom)

    def _is_integer(self, atom: Atom) -> bool:
        dtype = getattr(self.graph.aval(atom), "dtype", None)
        return dtype is not None and jnp.issubdtype(dtype, jnp.integer)

    def _counts(self, atom: Atom) -> bool:
        """Whether a value is the numbers of the classes, whatever its shape."""
        while (node := self.graph.source(atom)) is not None:
            if node.primitive == "iota":
                return True
            if node.primitive not in _INTEGER_STEPS or not node.ins:
                return False
            atom = node.ins[0]
        return not isinstance(atom, Literal) and atom in self.graph.constants


def block_input(graph: Graph, attention: AttentionValues) -> int | None:
    """The residual stream that a layer's attention is added to, if there is one.

    Followed forward from the attention's output to the first sum with an array of
    the same shape that its query was computed from.
    """
    product = attention.reading.product
    if product is None:
        return None
    before = _ancestors(graph, product.query)
    try:
        start, _ = attention.output_place()
    except ValueError:
        start = attention.reading.combine.node.outs[0]
    waiting, seen = [start], set()
    while waiting and len(seen) < _FARTHEST:
        atom = waiting.pop(0)
        for node in graph.users.get(atom, ()):
            if node.index in seen or node.primitive not in _LAYER_STEPS:
                continue
            seen.add(node.index)
            if node.primitive == "add":
                other = node.ins[1 - node.ins.index(atom)]
                same = graph.shape(other) == graph.shape(node.outs[0])
                if same and other in before:
                    return other
            waiting += node.outs
    return None


def _ancestors(graph: Graph, atom: Atom) -> set[int]:
    """Values an array was computed from, within its body."""
    waiting, seen = [atom], set()
    while waiting and len(seen) < 10 * _FARTHEST:
        current = waiting.pop(0)
        if isinstance(current, Literal) or current in seen:
            continue
        seen.add(current)
        node = graph.source(current)
        if node is not None:
            waiting += node.ins
    return seen
