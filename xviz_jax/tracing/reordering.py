"""Finds where positions that attention wrote are put into another order."""

import math

from xviz_jax.tracing.graph import Atom, Graph, Node
from xviz_jax.tracing.sequences import Place, Sequences


def find(sequences: Sequences) -> Node | None:
    """The first operation that permutes positions after attention; None if none does.

    Flips, rolls, and gathers of as many positions as there are: after these, a position
    of the next layer, or of the output, is not that of the layer before. Sums over
    positions with weights, as products with permutation matrices, are not seen.
    """
    graph = sequences.graph
    for body in graph.bodies():
        for node in body.leaves:
            for place in _permuted(graph, node):
                run = sequences.follow([place])
                if run.now or run.earlier:
                    return node
    return None


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
        for axis in numbers.start_index_map
        if sizes[axis] == 1 and shape[axis] == taken > 1
    ]


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
