"""Runs a graph again, reading and rewriting values on the way.

Everything is emitted as it was, except what a `Plan` asks for. A call is opened
only when a value inside it is wanted; loops, branches and shards that hold a wanted
value are emitted anew through JAX's public control flow, with what is read as an
extra result and what is added as an extra operand, one slice for each turn.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from xviz_jax.tracing import compat
from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.graph import (
    CUSTOM_RULE,
    REMAT,
    Atom,
    Body,
    Graph,
    Node,
)

# Looks a value up where it is defined.
Get = Callable[[Atom], Any]
# Rewrites a value: (value, get, operand given for the site) -> value.
Rewrite = Callable[[Any, Get, Any], Any]
Captures = dict[str, dict[str, Any]]


class Plan:
    """What to read and rewrite during a run."""

    def __init__(self, graph: Graph):
        """Starts with nothing to read and nothing to rewrite."""
        self.graph = graph
        self.opened: set[Node] = set()
        self.active: set[Node] = set()
        self.wanted: set[int] = set()
        self.rewrites: dict[int, list[tuple[str, Rewrite]]] = {}
        self.operands: dict[tuple[Node, int], list[tuple[str, Rewrite]]] = {}
        self.replaced: dict[Node, tuple[str, Callable]] = {}
        self.captures: dict[Body, list[tuple[str, Callable[[Get], dict]]]] = {}
        # What a loop gives once, because it is the same at every turn.
        self.once: dict[Body, set[tuple[str, str]]] = {}
        self._within: dict[Body, set[str]] = {}
        self._untouched: dict[Node, bool] = {}

    def reach(self, body: Body, name: str) -> None:
        """Makes `body` run by hand, for the sake of a site."""
        for inner in body.ancestry():
            self._within.setdefault(inner, set()).add(name)
            if inner.parent is not None:
                self.active.add(inner.parent)
                self._open(inner.parent.path)

    def read(self, body: Body, name: str, key: str, atoms, function) -> None:
        """Captures `function(get)`, which looks up `atoms`, at the end of `body`."""
        self.keep(body, name, atoms, lambda get: {key: function(get)})

    def keep(self, body: Body, name: str, atoms, function) -> None:
        """Captures the values by key that `function(get)` makes, as `read` does one."""
        self.reach(body, name)
        for atom in atoms:
            self.want(atom)
        self.captures.setdefault(body, []).append((name, function))

    def want(self, atom: Atom) -> None:
        """Makes a value available to captures and rewrites."""
        if not isinstance(atom, Literal):
            self.wanted.add(atom)
            self._open(self.graph.visible[atom])

    def rewrite(self, atom: int, name: str, function: Rewrite) -> None:
        """Rewrites a value for everything that reads it."""
        node = self.graph.producer.get(atom)
        defined = node.path if node is not None else ()
        for user in self.graph.users.get(atom, ()):
            common = [a for a, b in zip(defined, user.path, strict=False) if a is b]
            self._open(common)
        self.rewrites.setdefault(atom, []).append((name, function))

    def rewrite_operand(
        self, node: Node, operand: int, name: str, function: Rewrite
    ) -> None:
        """Rewrites a value for one reader only."""
        self._open(node.path)
        self.operands.setdefault((node, operand), []).append((name, function))

    def replace(self, node: Node, name: str, function: Callable) -> None:
        """Computes a leaf's results by `function(operands, given)` instead."""
        self._open(node.path)
        self.replaced[node] = (name, function)

    def within(self, body: Body, given: dict[str, Any]) -> dict[str, Any]:
        """The part of `given` that is meant for sites in `body`."""
        names = self._within.get(body, ())
        return {name: value for name, value in given.items() if name in names}

    def untouched(self, call: Node) -> bool:
        """Whether nothing inside a call is rewritten."""
        if call not in self._untouched:
            self._untouched[call] = all(map(self._as_it_was, call.children))
        return self._untouched[call]

    def _as_it_was(self, node: Node) -> bool:
        if node.kind == "call":
            return self.untouched(node)
        if node in self.replaced or node in self.active:
            return False
        if any(out in self.rewrites for out in node.outs):
            return False
        return not any((node, i) in self.operands for i in range(len(node.ins)))

    def _open(self, calls) -> None:
        self.opened.update(calls)


def run(plan: Plan, values: list[Any], given: dict[str, Any]):
    """Runs the program on flat inputs.

    Args:
      plan: What to read and rewrite.
      values: One value for each input of the program.
      given: For each site's name, the operand of its rewrites.

    Returns:
      The program's flat results, and the captures by site and key.
    """
    return _body(plan, plan.graph.root, values, given)


def _body(plan: Plan, body: Body, values, given: dict[str, Any]):
    """Runs one body; returns its results and its captures."""
    execution = _Run(plan, {}, given)
    for atom, value in zip(body.ins, values, strict=True):
        execution.define(atom, value)
    execution.nodes(body.nodes)
    captures = execution.captures
    for name, function in plan.captures.get(body, ()):
        captures.setdefault(name, {}).update(function(execution.get))
    return [execution.get(atom) for atom in body.outs], captures


class _Run:
    """Values known so far in one execution of a body, and what was captured."""

    def __init__(self, plan: Plan, values: dict[int, Any], given: dict[str, Any]):
        self.plan = plan
        self.values = values
        self.given = given
        self.captures: Captures = {}

    def get(self, atom: Atom) -> Any:
        if isinstance(atom, Literal):
            return atom.val
        if atom in self.values:
            return self.values[atom]
        return self.plan.graph.constants[atom]

    def define(self, atom: Atom, value: Any) -> None:
        # A call's result can be one of its operands, or a literal.
        if isinstance(atom, Literal) or atom in self.values:
            return
        for name, function in self.plan.rewrites.get(atom, ()):
            value = function(value, self.get, self.given.get(name))
        self.values[atom] = value

    def _collect(self, captures: Captures) -> None:
        for name, values in captures.items():
            self.captures.setdefault(name, {}).update(values)

    def nodes(self, nodes: list[Node]) -> None:
        for node in nodes:
            if node.kind == "call" and node in self.plan.opened:
                with compat.source_context(node.eqn):
                    self._opened(node)
            else:
                for atom, value in zip(node.outs, self._leaf(node), strict=True):
                    self.define(atom, value)

    def _opened(self, node: Node) -> None:
        if node.primitive in REMAT:
            self._remat(node)
        elif node.primitive in CUSTOM_RULE and self.plan.untouched(node):
            self._shadow(node)
        else:
            self.nodes(node.children)

    def _shadow(self, node: Node) -> None:
        """Keeps a function's own derivative; its inside is run for captures only."""
        results = compat.bind(node.eqn, [self.get(atom) for atom in node.ins])
        before = dict(self.values)
        self.nodes(node.children)
        inside, self.values = self.values, before
        for atom, value in zip(node.outs, results, strict=True):
            self.define(atom, value)
        for atom, value in inside.items():
            self.values.setdefault(atom, value)

    def _leaf(self, node: Node) -> list[Any]:
        values = [self.get(atom) for atom in node.ins]
        for operand in range(len(values)):
            for name, function in self.plan.operands.get((node, operand), ()):
                given = self.given.get(name)
                values[operand] = function(values[operand], self.get, given)
        if node in self.plan.replaced:
            name, function = self.plan.replaced[node]
            return function(values, self.given.get(name))
        if node in self.plan.active:
            emit = {
                "scan": self._scan,
                "cond": self._cond,
                "while": self._while,
                "shard_map": self._shard_map,
            }
            with compat.source_context(node.eqn):
                return emit[node.kind](node, values)
        return compat.bind(node.eqn, values)

    def _remat(self, node: Node) -> None:
        inside = set(_defined(node.children))
        exported = [atom for atom in node.outs if not isinstance(atom, Literal)]
        exported += [atom for atom in self.plan.wanted if atom in inside]
        exported = list(dict.fromkeys(exported))
        outer = [atom for atom in node.ins if not isinstance(atom, Literal)]

        def function(values, given):
            known = {**self.values, **dict(zip(outer, values, strict=True))}
            inner = _Run(self.plan, known, given)
            inner.nodes(node.children)
            return [inner.get(atom) for atom in exported], inner.captures

        rematerialised = jax.checkpoint(
            function,
            policy=node.params.get("policy"),
            prevent_cse=node.params.get("prevent_cse", True),
        )
        values, captures = rematerialised([self.get(a) for a in outer], self.given)
        self._collect(captures)
        for atom, value in zip(exported, values, strict=True):
            self.values.setdefault(atom, value)

    def _scan(self, node: Node, values: list[Any]) -> list[Any]:
        constants, carried = compat.scan_sizes(node.params)
        body = node.bodies[0]
        fixed = values[:constants]

        def turn(carry, sliced):
            (carry, _), (xs, given) = carry, sliced
            outs, captures = _body(self.plan, body, [*fixed, *carry, *xs], given)
            same = self._same(body, captures)
            return (tuple(outs[:carried]), same), (tuple(outs[carried:]), captures)

        start = tuple(values[constants : constants + carried])
        sliced = (
            tuple(values[constants + carried :]),
            self.plan.within(body, self.given),
        )
        same: Captures = {}
        if self.plan.once.get(body):
            first = jax.tree.map(lambda leaf: leaf[0], sliced)
            (_, shapes), _ = jax.eval_shape(turn, (start, {}), first)
            same = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (carry, same), (stacked, captures) = jax.lax.scan(
            turn, (start, same), sliced, **compat.scan_options(node.params)
        )
        self._collect(captures)
        # The loop's axis stays, with one entry for all turns.
        self._collect(jax.tree.map(lambda leaf: leaf[None], same))
        return [*carry, *stacked]

    def _same(self, body: Body, captures: Captures) -> Captures:
        """Takes what is the same at every turn out of `captures`."""
        same: Captures = {}
        for name, key in sorted(self.plan.once.get(body, ())):
            if key in captures.get(name, {}):
                same.setdefault(name, {})[key] = captures[name].pop(key)
        return same

    def _cond(self, node: Node, values: list[Any]) -> list[Any]:
        index, *operands = values

        def branch(body, *operands):
            given = self.plan.within(body, self.given)
            return _body(self.plan, body, operands, given)

        branches = [functools.partial(branch, body) for body in node.bodies]
        blank: Captures = {}
        for each in branches:
            for name, shapes in jax.eval_shape(each, *operands)[1].items():
                blank.setdefault(name, {}).update(shapes)

        def padded(each, *operands):
            outs, captures = each(*operands)
            full = {
                name: {
                    key: captures[name][key]
                    if key in captures.get(name, {})
                    else jnp.zeros(shape.shape, shape.dtype)
                    for key, shape in shapes.items()
                }
                for name, shapes in blank.items()
            }
            return outs, full

        outs, captures = jax.lax.switch(
            jnp.asarray(index).astype(jnp.int32),
            [functools.partial(padded, each) for each in branches],
            *operands,
        )
        self._collect(captures)
        return outs

    def _shard_map(self, node: Node, values: list[Any]) -> list[Any]:
        params, body = node.params, node.bodies[0]
        axes = compat.manual_axes(params)

        def shard(values, given):
            own = jax.tree.map(lambda leaf: leaf[0], given)
            outs, captures = _body(self.plan, body, values, own)
            return tuple(outs), jax.tree.map(lambda leaf: leaf[None], captures)

        outs, captures = jax.shard_map(
            shard,
            mesh=params["mesh"],
            in_specs=(tuple(params["in_specs"]), PartitionSpec(axes)),
            out_specs=(tuple(params["out_specs"]), PartitionSpec(axes)),
            axis_names=set(axes),
            check_vma=params["check_vma"],
        )(tuple(values), self.plan.within(body, self.given))
        self._collect(captures)
        return list(outs)

    def _while(self, node: Node, values: list[Any]) -> list[Any]:
        params, body = node.params, node.bodies[0]
        if self.plan.captures.get(body):
            raise NotImplementedError(
                "a value inside a `while_loop` was asked for, but how often such a "
                "loop turns is not known beforehand; use `fori_loop` with fixed bounds"
            )
        tested, fixed = params["cond_nconsts"], params["body_nconsts"]
        test = compat.evaluate_jaxpr(params["cond_jaxpr"])
        constants = values[tested : tested + fixed]
        given = self.plan.within(body, self.given)

        def turn(carry):
            outs, _ = _body(self.plan, body, [*constants, *carry], given)
            return tuple(outs)

        start = tuple(values[tested + fixed :])
        return list(
            jax.lax.while_loop(
                lambda carry: test(*values[:tested], *carry)[0], turn, start
            )
        )


def _defined(nodes: list[Node]):
    for node in nodes:
        if node.kind == "call":
            yield from _defined(node.children)
        else:
            yield from node.outs
