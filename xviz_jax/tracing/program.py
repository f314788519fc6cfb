"""A model traced into a graph, with its sites found and named."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from xviz_jax.tracing import compat, matcher, roles, scores
from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.graph import Atom, Body, Graph, Node
from xviz_jax.tracing.roles import Reading
from xviz_jax.tracing.scores import Scores
from xviz_jax.tracing.site import Site
from xviz_jax.tracing.values import Values

# Scopes of derivatives and of values computed again for them.
_BACKWARD = ("transpose(", "rematted_computation")
# Last parts of a parameter's path that say what it is, not where.
_LEAVES = ("value", "raw_value", "kernel", "weight", "w", "W", "embedding")
_WRAPPED = re.compile(r"^(vmap|jvp|jit|pjit|remat|checkpoint|transpose)\(.*\)$")


@dataclasses.dataclass(frozen=True, eq=False)
class Located:
    """A site together with where its values are."""

    site: Site
    body: Body
    values: Values


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced model.

    Attributes:
      graph: What it computes.
      inputs: Its array arguments, flat.
      located: Its sites in program order.
      rebuild: Makes the model's output from flat results.
    """

    graph: Graph
    inputs: list[Any]
    located: tuple[Located, ...]
    rebuild: Callable[[list[Any]], Any]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in program order."""
        return tuple(each.site for each in self.located)


def trace(model: Callable, args: tuple, kwargs: dict[str, Any]) -> Program:
    """Traces a model on arguments of which only shapes and dtypes matter.

    Arrays are inputs; numbers, strings and other leaves stay what they are.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    leaves = [leaf for _, leaf in paths]
    dynamic = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    results: dict[str, Any] = {}

    def flat(*values):
        filled = list(leaves)
        for index, value in zip(dynamic, values, strict=True):
            filled[index] = value
        positional, named = jax.tree.unflatten(tree, filled)
        out, results["tree"] = jax.tree.flatten(model(*positional, **named))
        results["static"] = [None if _is_number(leaf) else leaf for leaf in out]
        return [leaf for leaf in out if _is_number(leaf)]

    closed = jax.make_jaxpr(flat)(*[leaves[index] for index in dynamic])

    def rebuild(values: list[Any]) -> Any:
        rest = iter(values)
        filled = [next(rest) if leaf is None else leaf for leaf in results["static"]]
        return jax.tree.unflatten(results["tree"], filled)

    graph = Graph(closed)
    names = [_path_name(paths[index][0][1:]) for index in dynamic]
    located = _locate(graph, dict(zip(graph.root.ins, names, strict=True)))
    return Program(graph, [leaves[index] for index in dynamic], located, rebuild)


def _is_array(leaf: Any) -> bool:
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, jax.core.Tracer)
    return isinstance(leaf, kinds)


def _is_number(leaf: Any) -> bool:
    return _is_array(leaf) or isinstance(leaf, bool | int | float | complex)


def _path_name(path) -> tuple[str, ...]:
    """The path of a leaf below its argument."""
    parts = []
    for key in path[1:]:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                parts.append(str(getattr(key, attribute)))
                break
    return tuple(parts)


def _locate(graph: Graph, inputs: dict[int, tuple[str, ...]]) -> tuple[Located, ...]:
    outer = _outer_names(graph)
    found: list[tuple[tuple[int, ...], str, Body, tuple[int, ...], Reading]] = []
    for body in graph.bodies():
        loops, order = _around(body)
        for softmax in matcher.find(graph, body):
            reading = roles.read(graph, softmax)
            if reading is None:
                continue
            node = reading.combine.node
            if any(mark in node.scope for mark in _BACKWARD):
                continue
            base = _scope_name(node.scope)
            if not base:
                base = _parameter_name(graph, reading, inputs, outer)
            place = (*order, node.index)
            found.append((place, base or reading.kind, body, loops, reading))
    found.sort(key=lambda each: each[0])
    located, used = [], {}
    for place, base, body, loops, reading in found:
        used[base] = used.get(base, 0) + 1
        name = base if used[base] == 1 else f"{base}#{used[base] - 1}"
        read = scores.read(graph, reading.softmax, reading.product)
        values = Values(graph, reading, read)
        site = _site(name, loops, place, values)
        located.append(Located(site, body, values))
    return tuple(located)


def _around(body: Body) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of the loops around a body, and positions of all that is around it."""
    loops, order = [], []
    for each in body.ancestry()[1:]:
        node = each.parent
        assert node is not None
        order.append(node.index)
        if node.kind == "scan":
            loops.append(node.params["length"])
        elif node.kind == "shard_map":
            loops.append(compat.shard_count(node.params))
    return tuple(loops), tuple(order)


def _site(name: str, loops, order, values: Values) -> Site:
    reading, read = values.reading, values.scores
    notes = list(reading.notes)
    available = ["probabilities"]
    for which, function in _readers(values, read).items():
        try:
            function()
            available.append(which)
        except ValueError as error:
            notes.append(f"{which} cannot be read: {error}")
    if reading.kind == "attention" and read.why:
        notes.append(read.why)
    known = read.scale is not None and {"query", "key"} <= set(available)
    return Site(
        name,
        reading.kind,
        loops,
        (*loops, *reading.canonical_shape()),
        scale=read.scale if known else None,
        softcap=read.softcap if known else None,
        values=tuple(available),
        order=order,
        why="; ".join(notes),
    )


def _readers(values: Values, read: Scores) -> dict[str, Callable[[], Any]]:
    readers: dict[str, Callable[[], Any]] = {
        "value": lambda: values.operand("value"),
        "output": values.output,
        "logsumexp": values.logsumexp,
    }
    if values.reading.product is not None:
        readers["query"] = lambda: values.operand("query")
        readers["key"] = lambda: values.operand("key")
    if read.biases:
        readers["bias"] = values.bias
    if read.masks:
        readers["mask"] = values.mask
    return readers


def _scope_name(scope: str) -> str:
    parts = [part for part in scope.split("/") if part and "->" not in part]
    return "/".join(part for part in parts if not _WRAPPED.match(part))


def _outer_names(graph: Graph) -> dict[int, int]:
    """Which value outside a loop each input of its body is, or is a slice of."""
    outer = {}
    for body in graph.bodies():
        if body.parent is not None and body.parent.kind == "scan":
            outer.update(zip(body.ins, body.parent.ins, strict=True))
    return outer


def _parameter_name(graph, reading: Reading, inputs, outer) -> str:
    """The path that the parameters behind query, key and value have in common."""
    atoms = [reading.combine.value]
    if reading.product is not None:
        atoms += [reading.product.query, reading.product.key]
    paths = [_nearest_parameter(graph, atom, inputs, outer) for atom in atoms]
    paths = [path for path in paths if path]
    if not paths:
        return ""
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) != 1:
            break
        common.append(parts[0])
    if common == list(paths[0]):
        # Query, key and value come out of one array: name its layer, not it.
        while common and common[-1] in _LEAVES:
            common.pop()
    return "/".join(common)


def _nearest_parameter(graph: Graph, atom: Atom, inputs, outer):
    waiting, seen = [atom], set()
    while waiting and len(seen) < 400:
        current = waiting.pop(0)
        node = graph.source(current)
        if node is None or node.index in seen:
            continue
        seen.add(node.index)
        if node.primitive in ("dot_general", "conv_general_dilated"):
            for operand in (1, 0):
                path = _input_path(graph, node.ins[operand], inputs, outer)
                if path is not None:
                    return path
            continue
        waiting += node.ins
    return None


def _input_path(graph: Graph, atom: Atom, inputs, outer) -> tuple[str, ...] | None:
    for _ in range(60):
        if isinstance(atom, Literal):
            return None
        if atom in inputs:
            return inputs[atom]
        node: Node | None = graph.source(atom)
        if node is not None and node.kind == "leaf" and node.ins:
            if node.primitive == "dot_general":
                return None
            atom = node.ins[0]
        elif atom in outer:
            atom = outer[atom]
        else:
            return None
    return None
