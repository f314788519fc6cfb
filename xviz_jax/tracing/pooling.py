"""How a model's output reads its last sequence: with which weight of each position.

The operation at which the axis of positions ends is found in the program: one position
is taken, or all are averaged. Its derivative tells the weights, which may depend on the
input, as those of a mean over all but padding do.
"""

import dataclasses

import jax
import jax.numpy as jnp

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing import interpreter
from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.graph import Atom, Graph, Node
from xviz_jax.tracing.interpreter import Plan
from xviz_jax.tracing.program import Program
from xviz_jax.tracing.sequences import Sequences
from xviz_jax.tracing.site import positions

_NAME = "pooling"
# Of positions, each with features of its own, these make one with such features.
_TAKING = ("dynamic_slice", "gather", "slice")
_GIVE_UP = "pass `query` as a position or as weights of rows"


@dataclasses.dataclass(frozen=True, eq=False)
class _End:
    """Where an axis of positions ends: `axis` of `atom`, an operand of `node`."""

    node: Node
    atom: int
    axis: int


def weights(program: Program) -> jax.Array:
    """Weights of positions, float32 `[length]`, that sum to one.

    Args:
      program: A traced model.

    Raises:
      ValueError: If the output does not read its last sequence at one place, or
        makes more of it than a sum or one position.
    """
    sequences = Sequences(program)
    read = sequences.read()
    lengths = {positions(site)[0] for site in program.sites if site.name in read}
    ends = _ends(sequences, program.graph)
    for end in ends:
        _check(program.graph, end, lengths)
    if len({(end.node.index, end.atom) for end in ends}) != 1:
        places = [f"{end.node.primitive!r}" for end in ends] or ["none"]
        raise ValueError(
            "the output reads its sequence at one place of a program that pools; "
            f"tracing found {', '.join(places)}: {_GIVE_UP}"
        )
    end = _unmasked(sequences, program.graph, ends[0])
    pooled = end.node.outs[0]
    plan = Plan(program.graph)
    root = program.graph.root
    plan.reach(root, _NAME)
    plan.rewrite(end.atom, _NAME, lambda value, _, given: value + given)
    plan.read(root, _NAME, _NAME, [pooled], lambda get: get(pooled))

    def moved(added: jax.Array) -> jax.Array:
        _, found = interpreter.run(plan, program.inputs, {_NAME: added})
        return jnp.sum(found[_NAME][_NAME].astype(jnp.float32))

    aval = program.graph.aval(end.atom)
    slopes = jax.grad(moved)(jnp.zeros(aval.shape, aval.dtype)).astype(jnp.float32)
    others = tuple(axis for axis in range(slopes.ndim) if axis != end.axis)
    found = jnp.sum(slopes, axis=others)
    return found / jnp.sum(found)


def _ends(sequences: Sequences, graph: Graph) -> list[_End]:
    found: list[_End] = []
    waiting, seen = list(graph.root.outs), set()
    while waiting:
        atom = waiting.pop()
        if isinstance(atom, Literal) or atom in seen:
            continue
        seen.add(atom)
        node = graph.source(atom)
        if node is None or sequences.axis_of(atom) is not None:
            continue
        for operand in node.ins:
            axis = sequences.axis_of(operand)
            if axis is None:
                waiting.append(operand)
            else:
                found.append(_End(node, operand, axis))
    return found


def _check(graph: Graph, end: _End, lengths: set[int]) -> None:
    node, name = end.node, end.node.primitive
    summed = name == "reduce_sum"
    if name == "dot_general":
        contract, _ = node.params["dimension_numbers"]
        summed = tuple(contract[node.ins.index(end.atom)]) == (end.axis,)
    taken = name in _TAKING and end.atom is node.ins[0]
    # An axis of another length is one of positions and features together.
    whole = {graph.shape(end.atom)[end.axis]} == lengths
    if not whole or not (summed or taken):
        raise ValueError(
            f"the output reads its sequence by {name!r}, which is neither a sum over "
            f"positions nor one of them: {_GIVE_UP}"
        )


def _unmasked(sequences: Sequences, graph: Graph, end: _End) -> _End:
    """The same end, of the positions before any were masked or weighed."""
    atom = end.atom
    while (node := graph.source(atom)) is not None:
        own = [each for each in node.ins if sequences.axis_of(each) == end.axis]
        if len(own) != 1 or graph.shape(own[0]) != graph.shape(atom):
            break
        (kept,) = own
        rest = [each for each in node.ins if each is not kept]
        weighing = node.primitive in ("mul", "div") and node.ins[0] is kept
        weighing |= node.primitive == "mul"
        weighing &= all(_is_weight(graph, each, end.axis) for each in rest)
        if node.primitive != "select_n" and not weighing:
            break
        atom = kept
    return dataclasses.replace(end, atom=atom)


def _is_weight(graph: Graph, atom: Atom, axis: int) -> bool:
    """Whether a value is alike for all features of a position."""
    if isinstance(atom, Literal):
        return True
    atom, targets = axis_maps.unrepeated(graph, atom)
    sizes = zip(targets, graph.shape(atom), strict=True)
    return all(target == axis for target, size in sizes if size > 1)
