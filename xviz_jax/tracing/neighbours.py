"""Which sites of attention run one after another, and which side by side."""

from collections.abc import Iterable

from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.fused import FusedValues
from xviz_jax.tracing.graph import Atom, Graph, Node
from xviz_jax.tracing.values import AttentionValues

Attention = AttentionValues | FusedValues


def joined(first: Attention, second: Attention) -> bool:
    """Whether one product weighs the values by both, as in differential attention."""
    return weighing(first) is weighing(second)


def feeds(graph: Graph, first: Attention, second: Attention) -> bool:
    """Whether the second's queries, keys or values depend on the first's output."""
    return _depends(graph, operands(second), weighing(first))


def weighing(values: Attention) -> Node:
    """The node that weighs the values."""
    if isinstance(values, FusedValues):
        return values.fused.node
    return values.reading.combine.node


def operands(values: Attention) -> list[Atom]:
    """What attention is made of: queries and keys, where there are any, and values."""
    if isinstance(values, FusedValues):
        return list(values.fused.operands)
    product = values.reading.product
    own = [] if product is None else [product.query, product.key]
    return [*own, values.reading.combine.value]


def _depends(graph: Graph, atoms: Iterable[Atom], on: Node) -> bool:
    results = set(on.outs)
    waiting, seen = list(atoms), set()
    while waiting:
        atom = waiting.pop()
        if isinstance(atom, Literal) or atom in seen:
            continue
        seen.add(atom)
        if atom in results:
            return True
        node = graph.source(atom)
        # What was computed before cannot depend on it.
        if node is not None and node.index >= on.index:
            waiting += node.ins
    return False
