"""A model traced into a graph, with its sites found and named."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax.tracing import (
    activation,
    compat,
    fused,
    loops,
    masks,
    matcher,
    mixing,
    neighbours,
    roles,
    scores,
)
from xviz_jax.tracing.activation import ActivationValues
from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.fused import FusedValues
from xviz_jax.tracing.graph import Atom, Body, Graph, Node
from xviz_jax.tracing.roles import Reading
from xviz_jax.tracing.site import Site
from xviz_jax.tracing.values import AttentionValues, UnknownValues, Values

# Scopes of derivatives and of values computed again for them.
_BACKWARD = ("transpose(", "rematted_computation")
# Last parts of a parameter's path that say what it is, not where.
_LEAVES = ("value", "raw_value", "kernel", "weight", "w", "W", "embedding")
_WRAPPED = re.compile(r"^(vmap|jvp|jit|pjit|remat|checkpoint|transpose)\(.*\)$")
_ACTIVATIONS = ("named", "block", "embedding", "convolution")
_ENDLESS = (
    "it lies in a `while_loop`, and how often that turns is not known beforehand; "
    "`fori_loop` with fixed bounds can be read"
)
_UNWEIGHED = (
    "it weighs positions by a function of scores that is no softmax, as by sigmoids"
)
_UNNORMALISED = (
    "exponentials of a query-key product weigh values, but what normalises them is "
    "not in the same place, as in an online softmax over blocks of keys"
)


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
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, compat.Tracer)
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """A site before it has a unique name."""

    place: tuple[int, ...]
    base: str
    body: Body
    values: Values
    site: Site


def _locate(graph: Graph, inputs: dict[int, tuple[str, ...]]) -> tuple[Located, ...]:
    lookups, mixed = activation.Lookups(graph), mixing.Finder(graph)
    found: list[_Found] = []
    for body in graph.bodies():
        around, order = _around(body)
        endless = any(b.parent and b.parent.kind == "while" for b in body.ancestry())
        sites = _sites_of(graph, body, around, lookups, mixed, inputs)
        for node, base, values, site in sites:
            if any(mark in node.scope for mark in _BACKWARD):
                continue
            if endless and site.kind in _ACTIVATIONS:
                continue
            place = (*order, node.index)
            site = dataclasses.replace(site, order=place)
            if endless:
                site = dataclasses.replace(
                    site, kind="unknown", values=(), why=_ENDLESS
                )
            found.append(_Found(place, base or site.kind, body, values, site))
    found.sort(key=lambda each: each.place)
    located, used = [], {}
    for each in found:
        used[each.base] = used.get(each.base, 0) + 1
        count = used[each.base] - 1
        name = each.base if count == 0 else f"{each.base}#{count}"
        site = dataclasses.replace(each.site, name=name)
        located.append(Located(site, each.body, each.values))
    return tuple(_with_neighbours(graph, located))


def _with_neighbours(graph: Graph, located: list[Located]) -> Iterator[Located]:
    """Adds to each site what runs beside it."""
    before: dict[Body, tuple[str, neighbours.Attention]] = {}
    for each in located:
        values = each.values
        if each.site.kind == "attention" and isinstance(
            values, AttentionValues | FusedValues
        ):
            name, last = before.get(each.body, ("", None))
            site = each.site
            if last is not None and neighbours.joined(last, values):
                site = dataclasses.replace(site, joins=name)
            elif last is not None and not neighbours.feeds(graph, last, values):
                site = dataclasses.replace(site, beside=name)
            before[each.body] = (site.name, values)
            yield dataclasses.replace(each, site=site)
        else:
            yield each


def _sites_of(
    graph: Graph,
    body: Body,
    around: tuple[int, ...],
    lookups: activation.Lookups,
    mixed: mixing.Finder,
    inputs: dict[int, tuple[str, ...]],
) -> Iterator[tuple[Node, str, Values, Site]]:
    """Sites of one body: where each runs, its name's base, its values, and itself."""
    blocks: set[int] = set()
    weighing: set[Node] = set()
    for softmax in matcher.find(graph, body):
        reading = roles.read(graph, softmax)
        weighing.update(combine.node for combine in softmax.combines)
        if reading is None:
            if roles.is_unnormalised(graph, softmax):
                site = Site("", "unknown", around, why=_UNNORMALISED)
                yield (
                    softmax.node,
                    _scope_name(softmax.node.scope),
                    UnknownValues(),
                    site,
                )
            continue
        node = reading.combine.node
        base = _scope_name(node.scope)
        if not base:
            base = _parameter_name(graph, reading, inputs)
        read = scores.read(graph, reading.softmax, reading.product)
        values = AttentionValues(graph, reading, read)
        yield node, base, values, _attention_site(graph, body, around, values)
        stream = activation.block_input(graph, values)
        if stream is not None and stream not in blocks:
            blocks.add(stream)
            site = _activation_site(graph, "block", stream, around)
            at = graph.producer.get(stream, reading.softmax.node)
            block = ActivationValues(graph, stream)
            yield at, f"{base}/block" if base else "block", block, site
    for node in mixed.find(body, weighing):
        site = Site("", "unknown", around, why=_UNWEIGHED)
        yield node, _scope_name(node.scope), UnknownValues(), site
    for kernel in fused.find(graph, body):
        if isinstance(kernel, Node):
            why = "a Pallas kernel that may be attention has no known signature"
            site = Site("", "unknown", around, why=why)
            yield kernel, _scope_name(kernel.scope), UnknownValues(), site
        else:
            values = FusedValues(graph, kernel)
            site = _fused_site(graph, body, around, kernel, values)
            yield kernel.node, _scope_name(kernel.node.scope), values, site
    for node in lookups.of(body):
        base = _scope_name(node.scope) or _table_name(graph, node, inputs)
        rows = lookups.rows(node)
        site = _activation_site(graph, "embedding", rows, around)
        site = dataclasses.replace(site, inputs=lookups.inputs(node))
        yield node, base, ActivationValues(graph, rows), site
    for node, base in activation.named(body):
        site = _activation_site(graph, "named", node.outs[0], around)
        yield node, base, ActivationValues(graph, node.outs[0]), site
    for node, atom, axis in activation.convolutions(graph, body):
        base = _scope_name(node.scope) or _kernel_name(graph, node, inputs)
        site = _activation_site(graph, "convolution", atom, around)
        site = dataclasses.replace(site, channel_axis=axis)
        yield node, base, ActivationValues(graph, atom), site


def _around(body: Body) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of the loops around a body, and positions of all that is around it."""
    lengths, order = [], []
    for each in body.ancestry()[1:]:
        node = each.parent
        assert node is not None
        order.append(node.index)
        if node.kind == "scan":
            lengths.append(node.params["length"])
        elif node.kind == "shard_map":
            lengths.append(compat.shard_count(node.params))
    return tuple(lengths), tuple(order)


def _attention_site(graph: Graph, body: Body, around, values: AttentionValues) -> Site:
    reading, read = values.reading, values.scores
    notes = list(reading.notes)
    product = reading.product
    turns = (loops.PARALLEL,) * len(around)
    if product is not None:
        operands = (product.query, product.key, reading.combine.value)
        turns = loops.turns(graph, body, *operands)
    chunked = turns[-1:] == (loops.QUERIES,)
    sight = masks.sight(graph, body, reading, read, chunked)
    values.rest = sight.rest
    available = []
    for which, function in values.readers().items():
        try:
            function()
            available.append(which)
        except ValueError as error:
            notes.append(f"{which} cannot be read: {error}")
    if reading.kind == "attention" and read.why:
        notes.append(read.why)
    known = read.scale is not None and {"query", "key"} <= set(available)
    return Site(
        "",
        reading.kind,
        around,
        shape=(*around, *reading.canonical_shape()),
        turns=turns,
        causal=sight.causal,
        window=sight.window,
        scale=read.scale if known else None,
        softcap=read.softcap if known else None,
        values=tuple(available),
        why="; ".join(notes),
    )


def _fused_site(
    graph: Graph, body: Body, around, kernel: fused.Fused, values: FusedValues
) -> Site:
    return Site(
        "",
        "attention",
        around,
        shape=(*around, *values.canonical_shape()),
        turns=loops.turns(graph, body, *kernel.operands),
        causal=kernel.causal,
        window=kernel.window,
        scale=None if kernel.why else kernel.scale,
        values=tuple(values.readers()),
        why=kernel.why,
    )


def _activation_site(graph: Graph, kind: str, atom: int, around) -> Site:
    shape = (*around, *graph.shape(atom))
    return Site("", kind, around, shape=shape, values=("activation",))


def _scope_name(scope: str) -> str:
    parts = [part for part in scope.split("/") if part and "->" not in part]
    return "/".join(part for part in parts if not _WRAPPED.match(part))


def _parameter_name(graph, reading: Reading, inputs) -> str:
    """The path that the parameters behind query, key and value have in common."""
    atoms = [reading.combine.value]
    if reading.product is not None:
        atoms += [reading.product.query, reading.product.key]
    paths = [_nearest_parameter(graph, atom, inputs) for atom in atoms]
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


def _kernel_name(graph: Graph, node: Node, inputs) -> str:
    """The path of a convolution's layer."""
    path = _input_path(graph, node.ins[1], inputs) or ()
    return "/".join(part for part in path if part not in _LEAVES)


def _table_name(graph: Graph, node: Node, inputs) -> str:
    """The path of the table that is looked up."""
    for atom in node.ins[:2]:
        path = _input_path(graph, atom, inputs)
        if path and jnp.issubdtype(graph.aval(atom).dtype, jnp.floating):
            return "/".join(part for part in path if part not in _LEAVES)
    return ""


def _nearest_parameter(graph: Graph, atom: Atom, inputs):
    waiting, seen = [atom], set()
    while waiting and len(seen) < 400:
        current = waiting.pop(0)
        node = graph.source(current)
        if node is None or node.index in seen:
            continue
        seen.add(node.index)
        if node.primitive in ("dot_general", "conv_general_dilated"):
            for operand in (1, 0):
                path = _input_path(graph, node.ins[operand], inputs)
                if path is not None:
                    return path
            continue
        waiting += node.ins
    return None


def _input_path(graph: Graph, atom: Atom, inputs) -> tuple[str, ...] | None:
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
        elif atom in graph.outer:
            atom = graph.outer[atom]
        else:
            return None
    return None
