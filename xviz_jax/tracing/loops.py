"""What the turns of a loop around attention are: layers, or parts of one attention.

A loop over layers carries the residual stream, and its queries depend on what is
carried. A loop whose queries, keys and values do not is a map: over chunks of the
queries, when keys and values are the same at every turn and the queries are cut off
one array in order; over heads, examples or windows otherwise.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing.axes import Piece
from xviz_jax.tracing.compat import Literal, scan_sizes
from xviz_jax.tracing.graph import Atom, Body, Graph, Node

LAYERS, REVERSED, QUERIES, PARALLEL = "layers", "reversed", "queries", "parallel"

_RESHAPING = ("broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose")
_ELEMENTWISE = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "lt": np.less,
    "le": np.less_equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
}
_KEEPING = ("convert_element_type", "copy", "squeeze", "reshape", "expand_dims")


def turns(
    graph: Graph, body: Body, query: Atom, key: Atom, value: Atom
) -> tuple[str, ...]:
    """What the loops around `body` run over, outermost first.

    Args:
      graph: The program.
      body: Where the attention is.
      query: The operand of the query-key product, in `body`; so is `key`.
      key: See `query`.
      value: What is weighed.

    Returns:
      For each loop `layers`, `reversed` (layers, the last one first), `queries` or
      `parallel`.
    """
    kinds: list[str] = []
    wanted = [[query], [key], [value]]
    inner = body
    while inner.parent is not None and inner.outer is not None:
        reached = [_reached(graph, inner, atoms) for atoms in wanted]
        if inner.parent.kind == "shard_map":
            kinds.append(PARALLEL)
        elif inner.parent.kind == "scan":
            kinds.append(_scan_kind(graph, inner, *reached))
        wanted = [_outside(inner, each) for each in reached]
        inner = inner.outer
    return tuple(reversed(kinds))


def constant_in(graph: Graph, body: Body, atoms: Iterable[Atom]) -> list[Body]:
    """The bodies of scans at each of whose turns some values are the same.

    Args:
      graph: The program.
      body: Where the values are.
      atoms: The values.
    """
    found = []
    wanted, inner = list(atoms), body
    while inner.parent is not None and inner.outer is not None:
        reached = _reached(graph, inner, wanted)
        if inner.parent.kind == "scan":
            constants, _ = scan_sizes(inner.parent.params)
            if reached <= set(inner.ins[:constants]):
                found.append(inner)
        wanted, inner = _outside(inner, reached), inner.outer
    return found


def _outside(body: Body, reached: set[int]) -> list[Atom]:
    """What some inputs of a body are, one body further out."""
    parent = body.parent
    assert parent is not None
    offset = 1 if parent.kind == "cond" else 0
    if parent.kind == "while":
        offset = parent.params["cond_nconsts"]
    places = {atom: place for place, atom in enumerate(body.ins)}
    return [parent.ins[places[atom] + offset] for atom in reached]


def _reached(graph: Graph, body: Body, atoms: Iterable[Atom]) -> set[int]:
    """The inputs of a body that some of its values depend on."""
    inputs, seen = set(body.ins), set()
    found: set[int] = set()
    waiting = [atom for atom in atoms if not isinstance(atom, Literal)]
    while waiting:
        atom = waiting.pop()
        if atom in seen:
            continue
        seen.add(atom)
        if atom in inputs:
            found.add(atom)
        node = graph.source(atom)
        if node is not None:
            waiting += [each for each in node.ins if not isinstance(each, Literal)]
    return found


def _scan_kind(graph, body: Body, query: set, key: set, value: set) -> str:
    node = body.parent
    assert node is not None
    constants, carried = scan_sizes(node.params)
    carry = body.ins[constants : constants + carried]
    moving = {
        atom
        for atom, out in zip(carry, body.outs[:carried], strict=True)
        if not _is_counter(graph, atom, out)
    }
    if (query | key | value) & moving:
        return REVERSED if node.params.get("reverse") else LAYERS
    varying = set(body.ins[constants:])
    if (key | value) & varying or not query & varying:
        return PARALLEL
    return QUERIES if _cuts_queries(graph, body, query & varying) else PARALLEL


def _is_counter(graph: Graph, atom: int, out: Atom) -> bool:
    if out == atom:
        return True
    node = graph.source(out)
    if node is None or node.primitive != "add" or graph.shape(out) != ():
        return False
    return atom in node.ins and any(isinstance(each, Literal) for each in node.ins)


def _cuts_queries(graph: Graph, body: Body, varying: set[int]) -> bool:
    """Whether the turns take contiguous chunks, in order, of whatever they slice."""
    node = body.parent
    assert node is not None
    length = node.params["length"]
    cut = False
    for atom in varying:
        if graph.shape(atom) and graph.aval(atom).dtype.kind in "fV":
            if not _is_cut(graph, graph.outer.get(atom), length):
                return False
            cut = True
    sliced = [leaf for leaf in body.leaves if leaf.primitive == "dynamic_slice"]
    for leaf in sliced:
        chosen = [s for s in leaf.ins[1:] if _reached(graph, body, [s]) & varying]
        if chosen:
            if not _slices_in_order(graph, body, leaf, length):
                return False
            cut = True
    return cut


def _is_cut(graph: Graph, atom: Atom | None, length: int) -> bool:
    """Whether the leading axis of a scanned array counts chunks of one axis."""
    if atom is None or isinstance(atom, Literal):
        return False
    # Backwards through what only moves elements, to the array that was cut.
    path: list[Node] = []
    while True:
        source = graph.source(atom)
        if source is None or source.primitive not in _RESHAPING:
            break
        path.append(source)
        atom = source.ins[0]
    axes = axis_maps.identity(graph.shape(atom))
    for step in reversed(path):
        maps = axis_maps.through(graph, step, 0, axes)
        if not maps:
            return False
        axes = maps[0]
    if len(axes[0]) != 1 or axes[0][0].broadcast:
        return False
    first = axes[0][0]
    whole = graph.shape(atom)[first.axis]
    if first.size != length or first.stride * length != whole:
        return False
    if first.stride == 1:
        return True
    rest = Piece(first.axis, 1, first.stride)
    return any(rest in pieces for pieces in axes[1:])


def _slices_in_order(graph: Graph, body: Body, leaf: Node, length: int) -> bool:
    sizes = leaf.params["slice_sizes"]
    shape = graph.shape(leaf.ins[0])
    cut = 0
    for axis, start in enumerate(leaf.ins[1:]):
        starts = per_turn(graph, body, start)
        if starts is None:
            return False
        if (starts == 0).all() and sizes[axis] == shape[axis]:
            continue
        wanted = np.arange(length) * sizes[axis]
        if length * sizes[axis] != shape[axis] or not (starts == wanted).all():
            return False
        cut += 1
    return cut == 1


def per_turn(graph: Graph, body: Body, atom: Atom) -> np.ndarray | None:
    """A scalar that is made of numbers only, at each turn of the scan around `body`.

    Returns:
      Its values `[turns]`, in the order in which the scan stacks results; None where
      it depends on data.
    """
    node = body.parent
    if node is None or node.kind != "scan":
        return None
    return _per_turn(graph, body, node.params["length"], atom, 0)


def _per_turn(graph: Graph, body: Body, length: int, atom: Atom, depth: int):
    if isinstance(atom, Literal):
        return np.full(length, atom.val) if np.ndim(atom.val) == 0 else None
    if graph.shape(atom) not in ((), (1,)) or depth > 20:
        return None
    if atom in body.ins:
        return _input_per_turn(graph, body, length, atom)
    node = graph.source(atom)
    if node is None:
        value = graph.constants.get(atom)
        return _filled(value, length)
    if node.primitive in _KEEPING:
        return _per_turn(graph, body, length, node.ins[0], depth + 1)
    operands = [_per_turn(graph, body, length, each, depth + 1) for each in node.ins]
    if any(each is None for each in operands):
        return None
    if node.primitive == "select_n" and len(operands) == 3:
        return np.where(operands[0], operands[2], operands[1])
    if node.primitive == "clamp":
        return np.clip(operands[1], operands[0], operands[2])
    function = _ELEMENTWISE.get(node.primitive)
    return None if function is None else function(*operands)


def _filled(value: object, length: int) -> np.ndarray | None:
    if not isinstance(value, Sequence | int | float) and not hasattr(value, "dtype"):
        return None
    try:
        return np.full(length, np.asarray(value).reshape(()))
    except (TypeError, ValueError, RuntimeError):
        return None


def _input_per_turn(graph: Graph, body: Body, length: int, atom: int):
    node = body.parent
    assert node is not None
    constants, carried = scan_sizes(node.params)
    place = body.ins.index(atom)
    if place < constants:
        outside = node.ins[place]
        value = None
        if isinstance(outside, Literal):
            value = outside.val
        elif outside in graph.constants:
            value = graph.constants[outside]
        return _filled(value, length)
    if place < constants + carried:
        out = graph.source(body.outs[place - constants])
        begin = node.ins[place]
        if out is None or out.primitive != "add" or not isinstance(begin, Literal):
            return None
        steps = [each.val for each in out.ins if isinstance(each, Literal)]
        if atom not in out.ins or len(steps) != 1:
            return None
        counted = begin.val + np.arange(length) * steps[0]
        return counted[::-1] if node.params.get("reverse") else counted
    values = linear(graph, node.ins[place])
    return values if values is not None and values.shape == (length,) else None


def linear(graph: Graph, atom: Atom, depth: int = 0) -> np.ndarray | None:
    """An integer vector that the program makes of numbers, `arange` and the like."""
    if depth > 20:
        return None
    if isinstance(atom, Literal):
        return np.asarray(atom.val)
    if atom in graph.constants:
        value = graph.constants[atom]
        try:
            return np.asarray(value)
        except (TypeError, ValueError, RuntimeError):
            return None
    node = graph.source(atom)
    if node is None:
        return None
    if node.primitive == "iota" and len(graph.shape(atom)) == 1:
        return np.arange(graph.shape(atom)[0])
    if node.primitive in ("convert_element_type", "copy"):
        return linear(graph, node.ins[0], depth + 1)
    if node.primitive == "broadcast_in_dim" and graph.shape(node.ins[0]) == ():
        value = linear(graph, node.ins[0], depth + 1)
        return None if value is None else np.broadcast_to(value, graph.shape(atom))
    function = _ELEMENTWISE.get(node.primitive)
    if function is None:
        return None
    operands = [linear(graph, each, depth + 1) for each in node.ins]
    if any(each is None for each in operands):
        return None
    return function(*operands)
