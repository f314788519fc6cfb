"""Layers cut apart: each between the stream that enters it and the one that leaves it.

What leaves a layer is what enters the next. What leaves the last one is what a loop
over layers ends with, or, after layers that are written out, the value that the last
attention is followed by as the one before it is by the stream between them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.tracing import interpreter, neighbours
from xviz_jax.tracing.activation import ActivationValues
from xviz_jax.tracing.compat import Literal, scan_sizes
from xviz_jax.tracing.fused import FusedValues
from xviz_jax.tracing.graph import Atom, Body, Graph, Node
from xviz_jax.tracing.interpreter import Plan
from xviz_jax.tracing.program import Located, Program
from xviz_jax.tracing.transforms import add_zeros
from xviz_jax.tracing.values import AttentionValues

# No site has such a name.
LAST = "(last)"
# What leaves the elements of a stream as they are, and in order.
_KEEPING = (
    "convert_element_type",
    "copy",
    "expand_dims",
    "name",
    "optimization_barrier",
    "reshape",
    "squeeze",
)
_HINT = (
    "mark what the last layer returns by `jax.ad_checkpoint.checkpoint_name(x, "
    "'name')`, and pass `last='name'`"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """A program, and the streams between its layers.

    Attributes:
      program: A traced model.
      attention: The attention of each layer, by its name.
      entries: The stream that enters each layer, by the name of its attention.
      last: The value that leaves the last layer; None where nobody needs it.
    """

    program: Program
    attention: dict[str, Located]
    entries: dict[str, Located]
    last: int | None


def cut(
    program: Program,
    entries: Mapping[str, str],
    last: str | None = None,
    *,
    needs_last: bool = True,
    kinds: Mapping[str, str] | None = None,
) -> Blocks:
    """Cuts a program between its layers.

    Args:
      program: A traced model.
      entries: For the name of each layer's attention, that of the block it lies in.
      last: The name of the site that the last layer returns; None to find it.
      needs_last: Whether it is an error not to find it.
      kinds: Of each layer, by the name of its attention, which others it is like, if
        not all are alike.

    Raises:
      ValueError: If a layer sees earlier ones otherwise than through the stream, or
        what leaves the last layer is not found.
    """
    attention, found = _located(program, entries)
    atom = ending(program, entries, last, kinds)
    if atom is None and needs_last:
        raise ValueError(f"what leaves the last layer was not found: {_HINT}")
    _check_streams(program.graph, attention, found, atom)
    return Blocks(program, attention, found, atom)


def ending(
    program: Program,
    entries: Mapping[str, str],
    last: str | None = None,
    kinds: Mapping[str, str] | None = None,
) -> int | None:
    """The value that leaves the last layer; None where it is not found.

    Args:
      program: A traced model.
      entries: As for `cut`.
      last: As there.
      kinds: As there.

    Raises:
      ValueError: If `last` names nothing that could be it.
    """
    if last is None:
        return _find_last(program.graph, *_located(program, entries), kinds or {})
    located = {each.site.name: each for each in program.located}
    if last not in located:
        raise ValueError(f"`last` names no site, got {last!r}; there are {[*located]}")
    return _named(located[last])


def _located(
    program: Program, entries: Mapping[str, str]
) -> tuple[dict[str, Located], dict[str, Located]]:
    """The attention of each layer, and the block it lies in."""
    located = {each.site.name: each for each in program.located}
    attention = {name: located[name] for name in entries}
    return attention, {name: located[block] for name, block in entries.items()}


def rest(blocks: Blocks, stream: jax.Array) -> Any:
    """The model's output if `stream` left its last layer."""
    program, atom = blocks.program, blocks.last
    assert atom is not None
    aval = program.graph.aval(atom)
    if stream.size != aval.size:
        raise ValueError(
            f"a layer passes on an array of {stream.shape}, but the last returns "
            f"{aval.shape}: {_HINT}"
        )
    plan = Plan(program.graph)
    plan.rewrite(atom, LAST, lambda value, get, given: given)
    given = {LAST: stream.reshape(aval.shape).astype(aval.dtype)}
    outs, _ = interpreter.run(plan, program.inputs, given)
    return program.rebuild(outs)


def read_own_cotangents(
    blocks: Blocks,
    scalar: Callable[[Any, Any], jax.Array],
    values: Mapping[str, tuple[str, ...]],
):
    """Reads each layer's attention with the gradient of that layer's own output.

    A layer's own output is what the model says if the layer were its last. One pass
    forward and backward, and the rest of the model once more for each layer.

    Args:
      blocks: As `cut` gives them, with `last` unless there is one layer only.
      scalar: Maps such an output, and the model's, to the scalar that is explained.
      values: Which values of which attention to read.

    Returns:
      As `tracing.transforms.read_cotangents`.
    """
    program = blocks.program
    plan = Plan(program.graph)
    zeros, place = add_zeros(plan, program, values, once=True)
    for name, entry in blocks.entries.items():
        _read_stream(plan, name, entry)
        _change_readers(plan, name, entry, lambda x, _, __: jax.lax.stop_gradient(x))
    single = len(blocks.entries) == 1 and not any(
        entry.site.loops for entry in blocks.entries.values()
    )

    def explained(added):
        outs, found = interpreter.run(plan, program.inputs, added)
        output = program.rebuild(outs)
        total = scalar(output, output)
        if single:
            return total, (output, found)
        for name, entry in blocks.entries.items():
            streams = found[name].pop("stream")
            streams = streams.reshape(-1, *streams.shape[len(entry.site.loops) :])
            own = jax.vmap(lambda stream: scalar(rest(blocks, stream), output))
            total += jnp.sum(own(streams))
        return total, (output, found)

    gradients, (output, found) = jax.grad(explained, has_aux=True)(zeros)
    for name, gradient in gradients.items():
        found[name][f"{place[name]}_cotangent"] = gradient
    return output, found


class Leaving:
    """Runs all layers at once, each from its own kept input, with values left out."""

    def __init__(self, blocks: Blocks):
        """Takes a program that is cut, with `last`."""
        assert blocks.last is not None
        self.blocks = blocks
        self.plan = Plan(blocks.program.graph)
        # Whether what is left out is subtracted from a layer's output.
        self.direct: dict[str, bool] = {}
        for name, entry in blocks.entries.items():
            _read_stream(self.plan, name, entry)
            key = _kept(name)
            _change_readers(
                self.plan,
                key,
                entry,
                lambda value, _, given: value if given is None else given,
            )
            self.plan.reach(entry.body, key)
        for name, located in blocks.attention.items():
            self.plan.reach(located.body, name)
            shape = located.values.add_to_output(self.plan, name)
            self.direct[name] = shape is not None
            if shape is None:
                located.values.rewrite(self.plan, name, _without)
        self.plan.read(
            blocks.program.graph.root,
            LAST,
            "stream",
            [blocks.last],
            lambda get: get(blocks.last),
        )

    def __call__(self, kept: Mapping[str, jax.Array], changes: Mapping[str, jax.Array]):
        """The streams that enter each layer, by its attention, and the last one.

        Args:
          kept: What each layer is to see instead, by its attention's name.
          changes: For each attention what is added to its output or, if that is not
            `direct`, which keys stay, bool `[*loops, key]`.
        """
        given = {_kept(name): stream for name, stream in kept.items()} | dict(changes)
        program = self.blocks.program
        _, found = interpreter.run(self.plan, program.inputs, given)
        return {name: own["stream"] for name, own in found.items()}


def _kept(name: str) -> str:
    return f"{name}: kept"


def _without(value: jax.Array, stays: jax.Array | None) -> jax.Array:
    return value if stays is None else jnp.where(stays[None, None, None], value, 0)


def _read_stream(plan: Plan, name: str, entry: Located) -> None:
    atom = _atom(entry)
    plan.read(entry.body, name, "stream", [atom], lambda get: get(atom))


def _change_readers(plan: Plan, name: str, entry: Located, change: Any) -> None:
    """Changes what a layer sees of its stream, and not the stream itself."""
    atom = _atom(entry)
    plan.reach(entry.body, name)
    for node in plan.graph.users[atom]:
        for operand, each in enumerate(node.ins):
            if not isinstance(each, Literal) and each == atom:
                plan.rewrite_operand(node, operand, name, change)


def _atom(entry: Located) -> int:
    assert isinstance(entry.values, ActivationValues)
    return entry.values.atom


def _named(located: Located) -> int:
    if not isinstance(located.values, ActivationValues) or located.site.loops:
        raise ValueError(
            f"`last` names one array after all layers, but {located.site.name!r} is "
            f"of kind {located.site.kind!r} and lies in {len(located.site.loops)} loops"
        )
    return located.values.atom


def _find_last(
    graph: Graph,
    attention: Mapping[str, Located],
    entries: Mapping[str, Located],
    kinds: Mapping[str, str],
) -> int | None:
    final = max(attention, key=lambda name: attention[name].site.order)
    body = entries[final].body
    same = sorted(
        (name for name in entries if entries[name].body is body),
        key=lambda name: attention[name].site.order,
    )
    if body.parent is not None:
        return _after_loop(graph, body, _atom(entries[same[0]]))
    period = _period([kinds.get(name, "") for name in same])
    # Where the last layer lacks some of a period, it ends elsewhere.
    if len(same) <= period or len(same) % period:
        return None
    before, final = (
        neighbours.weighing(_values(attention[name]))
        for name in (same[-1 - period], same[-1])
    )
    return _repeated(graph, body, before, final, _atom(entries[same[-period]]))


def _period(kinds: Sequence[str]) -> int:
    """After how many layers of one kind each there is one of the same again."""
    return next(
        step
        for step in range(1, len(kinds) + 1)
        if all(one == other for one, other in zip(kinds, kinds[step:], strict=False))
    )


def _after_loop(graph: Graph, body: Body, atom: Atom) -> int | None:
    """What the loop ends with of which the first layer takes `atom` in each turn."""
    number, outer = _carried(graph, body, atom), body.outer
    if number is None or body.parent is None or outer is None:
        return None
    out = body.parent.outs[number]
    if outer.parent is None:
        return out
    if outer.parent.kind != "scan":
        return None
    constants, carried = scan_sizes(outer.parent.params)
    if out not in outer.outs[:carried]:
        return None
    return _after_loop(graph, outer, outer.ins[constants + outer.outs.index(out)])


def _carried(graph: Graph, body: Body, atom: Atom) -> int | None:
    """Which of the arrays that a loop carries holds the elements of `atom`."""
    while (node := graph.source(atom)) is not None and node.primitive in _KEEPING:
        atom = node.ins[0]
    if body.parent is None or body.parent.kind != "scan":
        return None
    constants, carried = scan_sizes(body.parent.params)
    carry = body.ins[constants : constants + carried]
    return carry.index(atom) if atom in carry else None


def _repeated(
    graph: Graph, body: Body, before: Node, final: Node, stream: int
) -> int | None:
    """What stands to `final` as `stream` does to `before`, the same way off."""
    made = graph.producer.get(stream)
    if made is None:
        return None
    begin, end = body.leaves.index(before), body.leaves.index(final)
    way = body.leaves.index(made) - begin + 1
    first, second = body.leaves[begin : begin + way], body.leaves[end : end + way]
    if way < 1 or [_kind(graph, n) for n in first] != [_kind(graph, n) for n in second]:
        return None
    return second[-1].outs[made.outs.index(stream)]


def _kind(graph: Graph, node: Node) -> tuple:
    return node.primitive, tuple(map(graph.shape, node.outs))


def _check_streams(
    graph: Graph,
    attention: Mapping[str, Located],
    entries: Mapping[str, Located],
    last: int | None,
) -> None:
    """Holds that a layer sees those before it through its stream only."""
    bodies = {entry.body for entry in entries.values()}
    for body in bodies:
        names = [name for name in entries if entries[name].body is body]
        names.sort(key=lambda name: attention[name].site.order)
        nodes = {name: neighbours.weighing(_values(attention[name])) for name in names}
        earlier = {out for node in nodes.values() for out in node.outs}
        for leaf in body.leaves:
            if any(_holds(inner, bodies) for inner in leaf.bodies):
                earlier.update(leaf.outs)
        earlier |= set(_moving(graph, body))
        streams = [_atom(entries[name]) for name in names]
        leaving: list[Atom] = streams[1:]
        number = _carried(graph, body, streams[0])
        if number is not None:
            leaving.append(body.outs[number])
        elif last is not None and body.parent is None:
            leaving.append(last)
        for place, name in enumerate(names):
            wanted = neighbours.operands(_values(attention[name]))
            wanted += leaving[place : place + 1]
            others = earlier - set(nodes[name].outs)
            if _reaches(graph, wanted, others, streams[place]):
                raise ValueError(
                    f"{name!r}, or what follows it, sees earlier layers otherwise than "
                    "through the stream it is added to"
                )


def _values(located: Located) -> neighbours.Attention:
    assert isinstance(located.values, AttentionValues | FusedValues)
    return located.values


def _holds(body: Body, wanted: set[Body]) -> bool:
    inside = (inner for leaf in body.leaves for inner in leaf.bodies)
    return body in wanted or any(_holds(inner, wanted) for inner in inside)


def _moving(graph: Graph, body: Body) -> list[int]:
    """What a loop carries, and changes, of floats."""
    if body.parent is None or body.parent.kind != "scan":
        return []
    constants, carried = scan_sizes(body.parent.params)
    carry = zip(body.ins[constants:], body.outs[:carried], strict=False)
    floats = lambda atom: jnp.issubdtype(graph.aval(atom).dtype, jnp.floating)
    return [atom for atom, out in carry if out != atom and floats(atom)]


def _reaches(
    graph: Graph, atoms: Iterable[Atom], wanted: set[int], without: int
) -> bool:
    """Whether values depend on any that is wanted, on a way around one value."""
    waiting, seen = list(atoms), {without}
    while waiting:
        atom = waiting.pop()
        if isinstance(atom, Literal) or atom in seen:
            continue
        seen.add(atom)
        if atom in wanted:
            return True
        node = graph.source(atom)
        if node is not None:
            waiting += node.ins
    return False
