"""Finds attention over positions that are no longer where they were."""

import math
from collections.abc import Iterable, Iterator

import numpy as np

from xviz_jax.tracing.graph import Atom, Graph, Node
from xviz_jax.tracing.scores import constant
from xviz_jax.tracing.sequences import Place, Run, Sequences


def find(sequences: Sequences, names: Iterable[str]) -> Node | None:
    """The first operation that puts positions into another order for attention.

    Flips, rolls, and gathers of as many positions as there are: between layers, or
    before attention and back again after it. What is beside the positions as they were,
    as tokens sorted by expert, is added to them in their order. Sums over positions
    with weights, as products with permutation matrices, are not seen.

    Args:
      sequences: Of the program.
      names: Its sites of attention.
    """
    graph = sequences.graph
    turned = False
    for name in names:
        for run in (sequences.run(name, side) for side in ("query", "key")):
            nodes = _permuting(graph, run)
            if nodes and run.cut and not run.now | run.earlier:
                return nodes[0]
            turned |= bool(nodes) and len(nodes) == len(run.origins)
    return next(_after(sequences), None) if turned else None


def _permuting(graph: Graph, run: Run) -> list[Node]:
    """Operations whose results are where a run began."""
    sources = [graph.source(atom) for atom, _ in run.origins]
    return [node for node in sources if node is not None and _permuted(graph, node)]


def _after(sequences: Sequences) -> Iterator[Node]:
    """Operations that put positions that attention wrote into another order."""
    graph = sequences.graph
    for body in graph.bodies():
        for node in body.leaves:
            for place in _permuted(graph, node):
                run = sequences.follow([place])
                if run.now or run.earlier:
                    yield node


def _permuted(graph: Graph, node: Node) -> list[Place]:
    """Axes along which an operation may take what is there in another order."""
    atoms = [atom for atom in node.ins if isinstance(atom, int)]
    if node.primitive == "rev" and atoms:
        wide = [d for d in node.params["dimensions"] if graph.shape(atoms[0])[d] > 1]
        return [(atoms[0], axis) for axis in wide]
    if node.primitive == "gather" and isinstance(node.ins[0], int):
        return _gathered(graph, node, node.ins[0])
    if node.primitive == "concatenate":
        return _joined(graph, node)
    return []


def _gathered(graph: Graph, node: Node, atom: int) -> list[Place]:
    numbers, shape = node.params["dimension_numbers"], graph.shape(atom)
    result = graph.shape(node.outs[0])
    taken = math.prod(
        size for axis, size in enumerate(result) if axis not in numbers.offset_dims
    )
    sizes = node.params["slice_sizes"]
    return [
        (atom, int(axis))
        for column, axis in enumerate(numbers.start_index_map)
        if sizes[axis] == 1
        and shape[axis] == taken > 1
        and not _ascends(graph, node.ins[1], column)
    ]


def _ascends(graph: Graph, indices: Atom, column: int) -> bool:
    """Whether indices are known, and each is greater than the one before."""
    source = graph.source(indices)
    while source is not None and source.primitive == "convert_element_type":
        source = graph.source(source.ins[0])
    if source is not None and source.primitive == "concatenate":
        indices, column = source.ins[column], 0
    value = constant(graph, indices)
    if value is None:
        return False
    if value.ndim > 1:
        value = value[..., column]
    # What was broadcast comes back small.
    return value.size > 1 and bool((np.diff(value.ravel()) > 0).all())


def _joined(graph: Graph, node: Node) -> list[Place]:
    """Pieces of one array, joined to one as long, of which some have moved."""
    axis, offset = int(node.params["dimension"]), 0
    pieces: dict[Atom, list[tuple[int, int]]] = {}
    for atom in node.ins:
        source = graph.source(atom)
        if source is not None and source.primitive == "slice":
            start = int(source.params["start_indices"][axis])
            pieces.setdefault(source.ins[0], []).append((start, offset))
        offset += graph.shape(atom)[axis]
    return [
        (whole, axis)
        for whole, places in pieces.items()
        if isinstance(whole, int)
        and len(places) > 1
        and graph.shape(whole)[axis] == offset
        and any(start != place for start, place in places)
    ]
