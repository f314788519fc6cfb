"""Attention inside one kernel, read at its operands by the kernels' known signatures.

Nothing inside a kernel can be captured, but query, key, value and output are outside,
and from these everything else follows. Known: the cuDNN primitive behind
`jax.nn.dot_product_attention`, and the flash and splash kernels of JAX's Pallas.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax.tracing.compat import Literal, is_jaxpr
from xviz_jax.tracing.graph import Atom, Body, Graph, Node
from xviz_jax.tracing.interpreter import Get, Plan
from xviz_jax.tracing.values import Change, Read

_CUDNN = ("dot_product_attention_fwd_wrapper", "dot_product_attention_fwd")
_EXPONENTIALS = ("exp", "exp2")
_MASKED = -1e30


@dataclasses.dataclass(frozen=True, eq=False)
class Fused:
    """A kernel's operands and options.

    Attributes:
      node: The call, or the primitive.
      operands: Query, key and value.
      layout: Order of an operand's axes: `BTHD`, `BHTD`, or `HTD` or `TD` without
        batch or heads.
      scale: What the product is multiplied by; None where it, or the mask, is not
        known.
      causal: Whether the kernel masks later keys; None where that is not known.
      window: How far a query sees.
      bias: An operand added to the scores `[batch, head, query, key]`.
      segments: Operands that number the segments of queries and keys.
      why: What is not known.
    """

    node: Node
    operands: tuple[Atom, Atom, Atom]
    layout: str
    scale: float | None
    causal: bool | None
    window: tuple[int | None, int | None] | None = None
    bias: Atom = None
    segments: tuple[Atom, Atom] | None = None
    why: str = ""


def find(graph: Graph, body: Body) -> Iterator[Fused | Node]:
    """Known kernels of a body, and kernels that may be attention but are not known."""
    yield from _walk(graph, body.nodes)


def _walk(graph: Graph, nodes: list[Node]) -> Iterator[Fused | Node]:
    for node in nodes:
        known = _known(graph, node)
        if known is not None:
            yield known
        elif node.kind == "call":
            yield from _walk(graph, node.children)
        elif node.primitive == "pallas_call" and _attends(node):
            yield node


def _known(graph: Graph, node: Node) -> Fused | None:
    if node.primitive in _CUDNN:
        return _cudnn(graph, node)
    if node.kind != "call":
        return None
    readers = {
        "mha": _pallas_gpu,
        "flash_attention": _pallas_tpu,
        "_splash_attention": _splash,
    }
    reader = readers.get(node.params.get("name", ""))
    kernel = next(_kernels(node), None)
    return None if reader is None or kernel is None else reader(graph, node, kernel)


def _kernels(node: Node) -> Iterator[Node]:
    for child in node.children:
        if child.primitive == "pallas_call":
            yield child
        yield from _kernels(child)


def _cudnn(graph: Graph, node: Node) -> Fused | None:
    params = node.params
    causal = "CAUSAL" in str(params["mask_type"])
    length = params.get("sliding_window_length")
    if params.get("dropout_rate") or str(params["mask_type"]).endswith("PADDING"):
        return None
    return Fused(
        node,
        tuple(node.ins[:3]),
        "BTHD" if params["layout"] in (0, "BTNH") else "BHTD",
        float(params["scale"]),
        causal,
        (length - 1, 0) if length else None,
        node.ins[3] if params["variadic_args"][0] else None,
    )


def _pallas_gpu(graph: Graph, node: Node, kernel: Node) -> Fused:
    segments = (node.ins[3],) * 2 if len(node.ins) > 3 else None
    scale, causal = _inside(kernel)
    operands = (node.ins[0], node.ins[1], node.ins[2])
    return Fused(node, operands, "BTHD", scale, causal, segments=segments)


def _pallas_tpu(graph: Graph, node: Node, kernel: Node) -> Fused:
    scale, causal = _inside(kernel)
    bias, segments = None, []
    for atom in node.ins[3:]:
        if jnp.issubdtype(graph.aval(atom).dtype, jnp.floating):
            bias = atom
        else:
            segments.append(atom)
    why = ""
    if bias is not None and scale not in (None, 1.0):
        # This kernel scales product and bias together.
        why = "the kernel's bias is scaled with the product"
    operands = (node.ins[0], node.ins[1], node.ins[2])
    pair = (segments[0], segments[1]) if len(segments) == 2 else None
    return Fused(node, operands, "BHTD", scale, causal, None, bias, pair, why)


def _splash(graph: Graph, node: Node, kernel: Node) -> Fused | None:
    floats = [
        atom
        for atom in node.ins
        if jnp.issubdtype(graph.aval(atom).dtype, jnp.floating)
    ]
    if len(floats) < 3:
        return None
    layout = "BHTD" if len(graph.shape(floats[0])) == 4 else "HTD"
    why = "the mask of a splash kernel cannot be read from its operands"
    operands = (floats[0], floats[1], floats[2])
    return Fused(node, operands, layout, None, None, why=why)


def _inside(kernel: Node) -> tuple[float | None, bool]:
    """Scale and causality, from the kernel's own program."""
    leaves = list(_leaves(Graph(kernel.params["jaxpr"])))
    causal = any(
        leaf.primitive in ("ge", "gt", "le", "lt")
        and len(graph.shape(leaf.outs[0])) == 2
        and graph.aval(leaf.ins[0]).dtype.kind == "i"
        for graph, leaf in leaves
    )
    for graph, leaf in leaves:
        if leaf.primitive == "dot_general":
            return _scale(graph, leaf.outs[0]), causal
    return None, causal


def _leaves(graph: Graph) -> Iterator[tuple[Graph, Node]]:
    for body in graph.bodies():
        for leaf in body.leaves:
            yield graph, leaf
            for value in leaf.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if leaf.kind == "leaf" and is_jaxpr(inner):
                        yield from _leaves(Graph(inner))


def _scale(graph: Graph, atom: int) -> float | None:
    """Product of the numbers a value is multiplied by on its way to an exponential."""
    scale, seen = 1.0, {atom}
    waiting = [atom]
    while waiting:
        current = waiting.pop(0)
        for node in graph.users.get(current, ()):
            if node.primitive in _EXPONENTIALS:
                return scale * (math.log(2) if node.primitive == "exp2" else 1.0)
            if node.primitive == "dot_general" or node.outs[0] in seen:
                continue
            if node.primitive == "mul":
                numbers = [a for a in node.ins if isinstance(a, Literal)]
                if len(numbers) != 1 or np.ndim(numbers[0].val):
                    continue
                scale *= float(numbers[0].val)
            seen.add(node.outs[0])
            waiting.append(node.outs[0])
    return None


def _attends(node: Node) -> bool:
    """Whether a kernel multiplies twice around an exponential."""
    found = [leaf.primitive for _, leaf in _leaves(Graph(node.params["jaxpr"]))]
    exponentials = sum(found.count(name) for name in _EXPONENTIALS)
    return found.count("dot_general") >= 2 and exponentials > 0


class FusedValues:
    """Values around a kernel; what is inside is computed again from its operands."""

    def __init__(self, graph: Graph, fused: Fused):
        """Takes a known kernel."""
        self.graph = graph
        self.fused = fused
        shape = self._shape
        self.query, self.key, self.value = (shape(each) for each in fused.operands)

    def canonical_shape(self) -> tuple[int, ...]:
        """Sizes of batch, head, query and key."""
        batch, length, heads, _ = self.query
        return batch, heads, length, self.key[1]

    def readers(self) -> dict[str, Callable[[], tuple[list[Atom], Read]]]:
        """As `Values`."""
        names = ("query", "key", "value")
        readers: dict[str, Callable[[], tuple[list[Atom], Read]]] = {
            name: lambda atom=atom: ([atom], lambda get: self._canonical(get(atom)))
            for name, atom in zip(names, self.fused.operands, strict=True)
        }
        out = self.fused.node.outs[0]
        readers["output"] = lambda: ([out], lambda get: self._canonical(get(out)))
        if self.fused.bias is not None:
            bias = self.fused.bias
            readers["bias"] = lambda: ([bias], self._bias)
        if self.fused.segments is not None:
            pair = list(self.fused.segments)
            readers["remaining_mask"] = lambda: (pair, self._same_segment)
        if self.fused.scale is not None:
            atoms = self._atoms()
            readers["probabilities"] = lambda: (
                atoms,
                lambda get: jax.nn.softmax(self._scores(get), axis=-1),
            )
            readers["logsumexp"] = lambda: (
                atoms,
                lambda get: jax.nn.logsumexp(self._scores(get), axis=-1),
            )
        return readers

    def rewrite(self, plan: Plan, name: str, change: Change) -> None:
        """As `Values`: adds to the output what the change comes to."""
        if self.fused.scale is None:
            raise NotImplementedError(
                f"the probabilities of {name!r} cannot be computed again: "
                f"{self.fused.why}"
            )
        for atom in self._atoms():
            plan.want(atom)

        def rewritten(out, get, given):
            before = jax.nn.softmax(self._scores(get), axis=-1)
            moved = change(before, given) - before
            value = self._canonical(get(self.fused.operands[2])).astype(jnp.float32)
            value = jnp.repeat(value, moved.shape[1] // value.shape[2], axis=2)
            extra = jnp.einsum("bhqk,bkhd->bqhd", moved, value)
            return out + self._native(extra, out).astype(out.dtype)

        plan.rewrite(self.fused.node.outs[0], name, rewritten)

    def add_to_output(self, plan: Plan, name: str) -> tuple[int, ...] | None:
        """As `Values`."""

        def rewritten(out, get, given):
            del get
            if given is None:
                return out
            return out + self._native(given, out).astype(out.dtype)

        plan.rewrite(self.fused.node.outs[0], name, rewritten)
        return self._shape(self.fused.node.outs[0])

    def _atoms(self) -> list[Atom]:
        extra = [] if self.fused.bias is None else [self.fused.bias]
        return [*self.fused.operands, *extra, *(self.fused.segments or ())]

    def _shape(self, atom: Atom) -> tuple[int, ...]:
        return jax.eval_shape(self._canonical, self.graph.aval(atom)).shape

    def _canonical(self, operand: jax.Array) -> jax.Array:
        """[batch, length, head, dim]."""
        layout = self.fused.layout
        if operand.ndim == len(layout) - 1:
            # One head of keys and values, without an axis for it.
            layout = layout.replace("H", "")
        for place, axis in enumerate("BHTD"):
            if axis not in layout:
                operand = jnp.expand_dims(operand, place)
                layout = layout[:place] + axis + layout[place:]
        return operand.transpose([layout.index(axis) for axis in "BTHD"])

    def _native(self, canonical: jax.Array, like: jax.Array) -> jax.Array:
        layout = self.fused.layout
        full = layout if len(layout) == 4 else "B" + layout
        order = ["BTHD".index(axis) for axis in full]
        return canonical.transpose(order).reshape(like.shape)

    def _bias(self, get: Get) -> jax.Array:
        bias = get(self.fused.bias)
        return bias.reshape((1,) * (4 - bias.ndim) + bias.shape)

    def _same_segment(self, get: Get) -> jax.Array:
        """True where query and key lie in one segment, [batch, 1, query, key]."""
        assert self.fused.segments is not None
        queries, keys = (get(atom) for atom in self.fused.segments)
        return queries[:, None, :, None] == keys[:, None, None, :]

    def _scores(self, get: Get) -> jax.Array:
        """Masked scores [batch, head, query, key], float32."""
        fused = self.fused
        query, key = (self._canonical(get(a)) for a in fused.operands[:2])
        key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
        scores = jnp.einsum(
            "bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32
        )
        scores = scores * jnp.float32(fused.scale)
        if fused.bias is not None:
            bias = self._bias(get).astype(jnp.float32)
            scores = scores + bias * jnp.float32(fused.scale if fused.why else 1.0)
        gap = jnp.arange(scores.shape[2])[:, None] - jnp.arange(scores.shape[3])[None]
        seen = jnp.ones(gap.shape, bool)
        if fused.causal:
            seen &= gap >= 0
        if fused.window is not None and fused.window[0] is not None:
            seen &= gap <= fused.window[0]
        seen = seen[None, None]
        if fused.segments is not None:
            seen = seen & self._same_segment(get)
        return jnp.where(seen, scores, _MASKED)
