"""A program as one graph: calls flattened, loops and branches as bodies.

A jaxpr nests: softmax, einsum and every `jit` are calls of inner jaxprs, and
attention almost always crosses them. Here each value has one number however many
calls it passes through, so a reader of the graph never meets a call boundary.
Loops, branches and shards stay what they are: bodies of their own.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from xviz_jax.tracing import compat
from xviz_jax.tracing.compat import Literal

STRUCTURED = ("scan", "while", "cond", "shard_map")
REMAT = ("remat", "remat2", "checkpoint")
CUSTOM_RULE = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
# Their jaxprs are no calls: operands are blocks, buffers or elements.
OPAQUE = (
    "pallas_call",
    "core_map",
    "custom_linear_solve",
    "custom_partitioning",
    "mpmd_map",
    "reduce",
    "reduce_window",
    "run_state",
    "scatter",
    "scatter-add",
    "sort",
    "xla_pmap",
)

# A value's number, or the literal itself.
Atom = Any


@dataclasses.dataclass(eq=False)
class Node:
    """One equation, at the place where it runs.

    Attributes:
      eqn: The equation.
      index: Position in program order, unique in the graph.
      path: The calls around it within its body, outermost first.
      kind: `leaf`, `call`, or a name among `STRUCTURED`.
      ins: Operands.
      outs: Results.
      scope: Name scopes of the equation and of the calls around it.
      children: Nodes inside a call.
      bodies: Bodies of a loop, branch or shard.
    """

    eqn: Any
    index: int
    path: tuple["Node", ...]
    kind: str
    ins: list[Atom]
    scope: str
    outs: list[Atom] = dataclasses.field(default_factory=list)
    children: list["Node"] = dataclasses.field(default_factory=list)
    bodies: list["Body"] = dataclasses.field(default_factory=list)

    @property
    def primitive(self) -> str:
        """Name of the equation's primitive."""
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the equation."""
        return self.eqn.params


@dataclasses.dataclass(eq=False)
class Body:
    """A scope of execution: the program, a loop's body, a branch, a shard."""

    parent: Node | None
    outer: "Body | None"
    nodes: list[Node] = dataclasses.field(default_factory=list)
    leaves: list[Node] = dataclasses.field(default_factory=list)
    ins: list[int] = dataclasses.field(default_factory=list)
    outs: list[Atom] = dataclasses.field(default_factory=list)

    def ancestry(self) -> list["Body"]:
        """This body and those around it, outermost first."""
        around = self.outer.ancestry() if self.outer is not None else []
        return [*around, self]


class Graph:
    """The whole program; values are numbered from 1.

    Attributes:
      avals: Shape and dtype of each value.
      producer: The leaf that defines a value; inputs and constants have none.
      users: The leaves that read a value.
      visible: The calls a value lies in, at its outermost place.
      constants: Values the program carries with it.
      outer: For inputs of a loop, branch or shard, the value outside that they are,
        or are a slice of; inputs that change from turn to turn are not listed.
      root: The program's own body.
    """

    def __init__(self, closed: Any):
        """Reads a closed jaxpr."""
        self.avals: dict[int, Any] = {}
        self.producer: dict[int, Node] = {}
        self.users: dict[int, list[Node]] = {}
        self.visible: dict[int, tuple[Node, ...]] = {}
        self.constants: dict[int, Any] = {}
        self.outer: dict[int, Atom] = {}
        self._indices = itertools.count()
        self.root = self._body(closed, None, None, "")

    def shape(self, atom: Atom) -> tuple[int, ...]:
        """Shape of a value or literal."""
        return tuple(getattr(self.aval(atom), "shape", ()))

    def aval(self, atom: Atom) -> Any:
        """Abstract value of a value or literal."""
        return atom.aval if isinstance(atom, Literal) else self.avals[atom]

    def source(self, atom: Atom) -> Node | None:
        """The leaf that defines a value, if any."""
        return None if isinstance(atom, Literal) else self.producer.get(atom)

    def bodies(self) -> Iterator[Body]:
        """Every body, each before the bodies inside it."""
        waiting = [self.root]
        while waiting:
            body = waiting.pop(0)
            yield body
            waiting += [inner for leaf in body.leaves for inner in leaf.bodies]

    def _new(self, aval: Any, path: tuple[Node, ...]) -> int:
        number = len(self.avals) + 1
        self.avals[number] = aval
        self.visible[number] = path
        return number

    def _body(self, closed: Any, parent: Node | None, outer: Body | None, scope: str):
        jaxpr = compat.open_jaxpr(closed)
        body = Body(parent, outer)
        names: dict[Any, Atom] = {}
        self._name_constants(closed, names, ())
        for variable in jaxpr.invars:
            names[variable] = self._new(variable.aval, ())
            body.ins.append(names[variable])
        body.nodes = self._read(jaxpr, names, (), body, scope)
        body.outs = [_lookup(variable, names) for variable in jaxpr.outvars]
        return body

    def _name_constants(self, closed: Any, names: dict, path: tuple[Node, ...]):
        constants = compat.consts(closed)
        for variable, value in zip(
            compat.open_jaxpr(closed).constvars, constants, strict=True
        ):
            names[variable] = self._new(variable.aval, path)
            self.constants[names[variable]] = value

    def _read(self, jaxpr, names, path, body: Body, scope: str) -> list[Node]:
        nodes = []
        for eqn in jaxpr.eqns:
            ins = [_lookup(variable, names) for variable in eqn.invars]
            inner = called_jaxpr(eqn)
            kind = "leaf"
            if inner is not None:
                kind = "call"
            elif eqn.primitive.name in STRUCTURED:
                kind = eqn.primitive.name
            node = Node(
                eqn,
                next(self._indices),
                path,
                kind,
                ins,
                _join(scope, compat.name_stack(eqn)),
            )
            nodes.append(node)
            if kind == "call":
                self._read_call(node, inner, body)
            else:
                self._read_leaf(node, body)
            names.update(zip(eqn.outvars, node.outs, strict=True))
        return nodes

    def _read_call(self, node: Node, closed: Any, body: Body) -> None:
        jaxpr = compat.open_jaxpr(closed)
        names = dict(zip(jaxpr.invars, node.ins, strict=True))
        self._name_constants(closed, names, node.path)
        node.children = self._read(jaxpr, names, (*node.path, node), body, node.scope)
        for variable in jaxpr.outvars:
            atom = _lookup(variable, names)
            if not isinstance(atom, Literal):
                self.visible[atom] = min(self.visible[atom], node.path, key=len)
            node.outs.append(atom)

    def _read_leaf(self, node: Node, body: Body) -> None:
        for variable in node.eqn.outvars:
            number = self._new(variable.aval, node.path)
            self.producer[number] = node
            node.outs.append(number)
        for atom in node.ins:
            if not isinstance(atom, Literal):
                self.users.setdefault(atom, []).append(node)
        body.leaves.append(node)
        for closed in _inner_bodies(node):
            inner = self._body(closed, node, body, node.scope)
            node.bodies.append(inner)
            self.outer.update(_entering(node, inner))


def called_jaxpr(eqn: Any) -> Any | None:
    """The jaxpr an equation calls with its own operands; None for every other kind.

    Decided by structure (one inner jaxpr, operands of the same number and shape),
    because the names of call primitives change between JAX versions.
    """
    if eqn.primitive.name in STRUCTURED or eqn.primitive.name in OPAQUE:
        return None
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    found = [
        eqn.params[name]
        for name in names
        if name in eqn.params and compat.is_jaxpr(eqn.params[name])
    ]
    if len(found) != 1:
        return None
    jaxpr = compat.open_jaxpr(found[0])
    outer = [*eqn.invars, *eqn.outvars]
    inner = [*jaxpr.invars, *jaxpr.outvars]
    if len(jaxpr.invars) != len(eqn.invars) or len(inner) != len(outer):
        return None
    shapes = [(_shape(a), _shape(b)) for a, b in zip(inner, outer, strict=True)]
    return found[0] if all(a == b for a, b in shapes) else None


def _inner_bodies(node: Node) -> list[Any]:
    if node.kind in ("scan", "shard_map"):
        return [node.params["jaxpr"]]
    if node.kind == "cond":
        return list(node.params["branches"])
    if node.kind == "while":
        return [node.params["body_jaxpr"]]
    return []


def _entering(node: Node, body: Body) -> dict[int, Atom]:
    """What each input of a body is outside, where it is the same at every turn."""
    if node.kind == "scan":
        constants, carried = compat.scan_sizes(node.params)
        pairs = list(zip(body.ins, node.ins, strict=True))
        return dict(pairs[:constants] + pairs[constants + carried :])
    if node.kind == "while":
        tested, fixed = node.params["cond_nconsts"], node.params["body_nconsts"]
        outside = node.ins[tested : tested + fixed]
        return dict(zip(body.ins[:fixed], outside, strict=True))
    outside = node.ins[1:] if node.kind == "cond" else node.ins
    return dict(zip(body.ins, outside, strict=True))


def _shape(variable: Any) -> tuple[int, ...] | None:
    return getattr(variable.aval, "shape", None)


def _lookup(variable: Any, names: dict) -> Atom:
    return variable if isinstance(variable, Literal) else names[variable]


def _join(outer: str, inner: str) -> str:
    if not inner or not outer or inner == outer or inner.startswith(outer + "/"):
        return inner or outer
    return f"{outer}/{inner}"
