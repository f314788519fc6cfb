"""The values of attention, carried into one layout whatever the model's own is.

Probabilities are `[batch, head, query, key]`; query, key, value and output are
`[batch, length, head, dim]` as `jax.nn.dot_product_attention` takes them, key and
value with fewer heads where heads share them. Loop axes come in front.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing import deferred
from xviz_jax.tracing.axes import AxisMap, Piece
from xviz_jax.tracing.graph import Atom, Graph
from xviz_jax.tracing.interpreter import Get, Plan
from xviz_jax.tracing.roles import (
    BATCH,
    GROUP,
    HEAD,
    KEEPING,
    KEY,
    QUERY,
    Reading,
)
from xviz_jax.tracing.scores import Scores, Term

# Computes a value from those a run has defined.
Read = Callable[[Get], jax.Array]
# Changes a value, given the operand of its site's rewrite.
Change = Callable[[jax.Array, Any], jax.Array]
Tap = Callable[[jax.Array, Any, Callable[[jax.Array], jax.Array]], jax.Array]


class Values(Protocol):
    """What a kind of site can do; reads return atoms and how to combine them."""

    def readers(self) -> dict[str, Callable[[], tuple[list[Atom], Read]]]:
        """How to read each value the site has; one may raise ValueError."""
        ...

    def rewrite(self, plan: Plan, name: str, change: Change) -> None:
        """Applies `change(value, given)` to probabilities, or to an activation."""
        ...

    def add_to_output(self, plan: Plan, name: str) -> tuple[int, ...] | None:
        """Lets the array given for `name` be added to the output.

        Returns its shape, without loops; None where the output is not the product
        of the probabilities and the values.
        """
        ...


class UnknownValues:
    """A site that is not understood has no values, and cannot be changed."""

    def readers(self) -> dict[str, Callable[[], tuple[list[Atom], Read]]]:
        """As `Values`."""
        return {}

    def rewrite(self, plan: Plan, name: str, change: Change) -> None:
        """As `Values`."""
        raise NotImplementedError(f"{name!r} is not understood")

    def add_to_output(self, plan: Plan, name: str) -> tuple[int, ...] | None:
        """As `Values`."""
        raise NotImplementedError(f"{name!r} is not understood")


class AttentionValues:
    """Values around a softmax."""

    def __init__(self, graph: Graph, reading: Reading, scores: Scores):
        """Takes a reading and the way its scores come about."""
        self.graph = graph
        self.reading = reading
        self.scores = scores
        # Masks of which the site's `causal` and `window` do not say all.
        self.rest: tuple[Term, ...] = scores.masks

    def readers(self) -> dict[str, Callable[[], tuple[list[Atom], Read]]]:
        """As `Values`."""
        readers: dict[str, Callable[[], tuple[list[Atom], Read]]] = {
            "probabilities": self.probabilities,
            "value": lambda: self.operand("value"),
            "output": self.output,
            "logsumexp": self.logsumexp,
        }
        if self.reading.product is not None:
            readers["query"] = lambda: self.operand("query")
            readers["key"] = lambda: self.operand("key")
        if self.scores.biases:
            readers["bias"] = self.bias
        if self.scores.masks:
            readers["mask"] = lambda: self.mask(self.scores.masks)
        if self.rest:
            readers["remaining_mask"] = lambda: self.mask(self.rest)
        return readers

    @property
    def dtype(self) -> Any:
        """Of the probabilities, or of what would be divided to these."""
        (atom, *_), _ = self.native_probabilities()
        return self.graph.aval(atom).dtype

    def rewrite(self, plan: Plan, name: str, change: Change) -> None:
        """As `Values`."""
        reading = self.reading

        def natively(native: jax.Array, given: Any) -> jax.Array:
            changed = change(self.canonical(native), given)
            return self.native(changed.astype(native.dtype))

        if reading.deferred:
            deferred.rewrite(self.graph, reading, plan, name, natively)
            return

        def rewritten(value, get, given):
            native = axis_maps.from_view(value, reading.axes, reading.shape)
            return axis_maps.to_view(
                natively(native, given), reading.axes, reading.shape
            )

        plan.rewrite(reading.probability, name, rewritten)

    def tap(self, plan: Plan, name: str, change: Tap) -> None:
        """Applies `change(value, given, canonical)` to probabilities as they lie.

        What it keeps for a backward pass is then the very array that the program keeps.
        `canonical` carries the value, and what is laid out like it, into one layout.
        """
        reading = self.reading
        if reading.deferred:
            self.rewrite(plan, name, lambda x, given: change(x, given, lambda x: x))
            return

        def canonical(value: jax.Array) -> jax.Array:
            native = axis_maps.from_view(value, reading.axes, reading.shape)
            return self.canonical(native)

        plan.rewrite(
            reading.probability,
            name,
            lambda value, get, given: change(value, given, canonical),
        )

    def add_to_output(self, plan: Plan, name: str) -> tuple[int, ...] | None:
        """As `Values`."""
        try:
            self._value()
            atom, axes = self.output_place()
        except ValueError:
            return None
        if not self._is_direct():
            return None
        aval = self.graph.aval(atom)
        shape = jax.eval_shape(lambda x: self.canonical_output(x, axes), aval).shape

        def rewritten(value, get, given):
            del get
            if given is None:
                return value
            return value + self.native_output(given.astype(value.dtype), axes)

        plan.rewrite(atom, name, rewritten)
        return shape

    def _is_direct(self) -> bool:
        """Whether nothing comes between the probabilities and their product."""
        reading, graph = self.reading, self.graph
        start = reading.softmax.exponential if reading.deferred else reading.probability
        atom = reading.combine.node.ins[reading.combine.operand]
        if reading.combine.node.primitive != "dot_general":
            product = graph.source(atom)
            if product is None:
                return False
            atom = next(each for each in product.ins if each != reading.combine.value)
        while atom != start:
            node = graph.source(atom)
            if node is None or node.primitive not in KEEPING:
                return False
            # What else reads the probabilities depends on them too.
            if len(graph.users[atom]) != 1:
                return False
            atom = node.ins[node.outs.index(atom)]
        return reading.deferred or len(graph.users[start]) == 1

    def probabilities(self) -> tuple[list[Atom], Read]:
        """Probabilities [batch, head, query, key]."""
        atoms, native = self.native_probabilities()
        return atoms, lambda get: self.canonical(native(get))

    def native_probabilities(self) -> tuple[list[Atom], Read]:
        """Probabilities on the softmax's own axes."""
        reading = self.reading
        if reading.deferred:
            return deferred.probabilities(reading)
        return [reading.probability], lambda get: axis_maps.from_view(
            get(reading.probability), reading.axes, reading.shape
        )

    def logsumexp(self) -> tuple[list[Atom], Read]:
        """Logarithm of the normaliser, float32 [batch, head, query]."""
        softmax, logits = self.reading.softmax, self.scores.logits
        if softmax.modified:
            raise ValueError("its normaliser holds more than the keys")
        keys = tuple(sorted(softmax.keys or ()))

        def read(get: Get) -> jax.Array:
            values = axis_maps.from_view(get(logits), softmax.axes, softmax.shape)
            values = values.astype(jnp.float32)
            total = jax.nn.logsumexp(values, axis=keys, keepdims=True)
            return self._arrange(total, self.reading.shape, (KEY,))[..., 0]

        return [logits], read

    def operand(self, which: str) -> tuple[list[Atom], Read]:
        """Query, key or value, [batch, length, head, dim]."""
        if which == "value":
            return self._value()
        product = self.reading.product
        if product is None:
            raise ValueError("there is no query-key product")
        side = product.query_side if which == "query" else 1 - product.query_side
        atom = product.sides[side].atom
        layout = self._operand_layout(side)
        length = QUERY if which == "query" else KEY

        def read(get: Get) -> jax.Array:
            native = axis_maps.to_view(get(atom), layout, self.graph.shape(atom))
            return self._by_length(native, length)

        return [atom], read

    def output(self) -> tuple[list[Atom], Read]:
        """What the values were weighed into, [batch, query, head, dim]."""
        atom, axes = self.output_place()

        def read(get: Get) -> jax.Array:
            return self.canonical_output(get(atom), axes)

        return [atom], read

    def canonical_output(self, value: jax.Array, axes: AxisMap) -> jax.Array:
        """Carries an output from its own layout, [batch, query, head, dim]."""
        reference = (*self.reading.shape, self._depth())
        return self._by_length(axis_maps.from_view(value, axes, reference), QUERY)

    def native_output(self, value: jax.Array, axes: AxisMap) -> jax.Array:
        """Carries an output [batch, query, head, dim] back into its own layout."""
        reading = self.reading
        order = reading.along(BATCH, QUERY, HEAD, GROUP)
        rank = len(reading.shape)
        keys = reading.along(KEY)
        sizes = [reading.shape[axis] for axis in order]
        value = value.reshape([*sizes, *(1 for _ in keys), self._depth()])
        places = [*order, *keys, rank]
        value = value.transpose(sorted(range(len(places)), key=places.__getitem__))
        # An axis the output does not have is one it was summed over.
        visited = {p.axis for group in axes for p in group if not p.broadcast}
        shape = [*reading.shape, self._depth()]
        for axis in range(rank):
            if axis not in visited:
                shape[axis] = 1
        return axis_maps.to_view(value.reshape(shape), axes, tuple(shape))

    def output_place(self) -> tuple[Atom, AxisMap]:
        """The output's value and its axes, with respect to softmax axes and depth."""
        combine = self.reading.combine
        depth = len(self.reading.shape)
        self._check_plain()
        if combine.node.primitive == "dot_general":
            sides = axis_maps.sides(self.graph, combine.node)
            assert sides is not None
            weights, value = sides[combine.operand], sides[1 - combine.operand]
            rank = len(self.graph.shape(combine.node.outs[0]))
            layout: list[tuple[Piece, ...]] = [()] * rank
            for axis, out in weights.out.items():
                layout[out] = combine.axes[axis]
            shape = self.graph.shape(combine.value)
            for axis, piece in _depths(value.free, shape, depth).items():
                layout[value.out[axis]] = (piece,)
        else:
            summed = {int(axis) for axis in combine.node.params["axes"]}
            pieces = self._product_layout()
            layout = [p for axis, p in enumerate(pieces) if axis not in summed]
        if not self.reading.deferred or self.reading.softmax.deferred is None:
            return combine.node.outs[0], tuple(layout)
        later = self.reading.softmax.deferred
        composed = _compose(later.axes, tuple(layout))
        if composed is None:
            raise ValueError("its output is rearranged before it is normalised")
        return later.quotient, composed

    def bias(self) -> tuple[list[Atom], Read]:
        """Sum of what is added to the scaled product; axes may have size 1."""
        terms = self.scores.biases

        def read(get: Get) -> jax.Array:
            total = None
            for term in terms:
                value = self._term(get, term).astype(jnp.float32) * term.factor
                total = value if total is None else total + value
            assert total is not None
            return total

        return [term.atom for term in terms], read

    def mask(self, terms: Sequence[Term]) -> tuple[list[Atom], Read]:
        """True where a query may see a key; axes may have size 1."""

        def read(get: Get) -> jax.Array:
            total = None
            for term in terms:
                value = self._term(get, term).astype(jnp.bool_)
                value = value if term.factor > 0 else ~value
                total = value if total is None else total & value
            assert total is not None
            return total

        return [term.atom for term in terms], read

    def canonical(self, native: jax.Array) -> jax.Array:
        """Carries an array on the softmax's axes to [batch, head, query, key]."""
        return self._arrange(native, native.shape, ())

    def native(self, canonical: jax.Array) -> jax.Array:
        """Carries [batch, head, query, key] back to the softmax's axes."""
        reading = self.reading
        order = reading.along(BATCH, HEAD, GROUP, QUERY, KEY)
        value = canonical.reshape([reading.shape[axis] for axis in order])
        return value.transpose(sorted(range(len(order)), key=order.__getitem__))

    def _arrange(self, native, shape, dropped: tuple[int, ...]) -> jax.Array:
        reading = self.reading
        order = reading.along(BATCH, HEAD, GROUP, QUERY, KEY)
        groups = ((BATCH,), (HEAD, GROUP), (QUERY,), (KEY,))
        sizes = []
        for roles in groups:
            axes = reading.along(*roles)
            gone = any(role in dropped for role in roles)
            sizes.append(1 if gone else math.prod(shape[axis] for axis in axes))
        return native.transpose(order).reshape(sizes)

    def _by_length(self, native: jax.Array, length: int) -> jax.Array:
        """[softmax axes, depth] to [batch, length, head, depth]."""
        reading = self.reading
        native = self._whole(native, (BATCH,))
        if length == QUERY:
            native = self._whole(native, (HEAD, GROUP))
        other = KEY if length == QUERY else QUERY
        order = reading.along(BATCH, length, HEAD, GROUP, other)
        groups = ((BATCH,), (length,), (HEAD, GROUP))
        sizes = [
            math.prod(native.shape[axis] for axis in reading.along(*roles))
            for roles in groups
        ]
        depth = native.shape[-1]
        return native.transpose([*order, len(order)]).reshape([*sizes, depth])

    def _whole(self, native: jax.Array, roles: tuple[int, ...]) -> jax.Array:
        """Repeats axes that are missing while others of the same role are there."""
        axes = self.reading.along(*roles)
        shape = list(native.shape)
        if any(shape[axis] != 1 for axis in axes):
            for axis in axes:
                shape[axis] = self.reading.shape[axis]
        return jnp.broadcast_to(native, shape)

    def _operand_layout(self, side: int) -> AxisMap:
        """The softmax's axes and then depth, with respect to a product's operand."""
        product = self.reading.product
        assert product is not None
        own = product.sides[side]
        shape = self.graph.shape(own.atom)
        back = {out: axis for axis, out in own.out.items()}
        layout = []
        for pieces in product.axes:
            mine = []
            for piece in pieces:
                if piece.axis not in back:
                    continue
                axis = back[piece.axis]
                resized = len(pieces) == 1 and piece.stride == 1
                size = shape[axis] if resized else piece.size
                mine.append(Piece(axis, piece.stride, size))
            layout.append(tuple(mine))
        depth = tuple(Piece(axis, 1, shape[axis]) for axis in own.contract)
        layout = (*layout, depth)
        if axis_maps.factors(layout, shape) is None:
            raise ValueError("its query or key is rearranged on the way")
        return layout

    def _value(self) -> tuple[list[Atom], Read]:
        combine = self.reading.combine
        self._check_plain()
        depth = len(self.reading.shape)
        atom = combine.value
        if combine.node.primitive == "dot_general":
            sides = axis_maps.sides(self.graph, combine.node)
            assert sides is not None
            weights, value = sides[combine.operand], sides[1 - combine.operand]
            shape = self.graph.shape(atom)
            layout: list[tuple[Piece, ...]] = [()] * len(shape)
            mine = (*weights.batch, *weights.contract)
            own = (*value.batch, *value.contract)
            for axis, place in zip(mine, own, strict=True):
                layout[place] = combine.axes[axis]
            for axis, piece in _depths(value.free, shape, depth).items():
                layout[axis] = (piece,)
        else:
            atom, layout = self._peeled_value()
        reference = (*self.reading.shape, self._depth())

        def read(get: Get) -> jax.Array:
            native = axis_maps.from_view(get(atom), tuple(layout), reference)
            return self._by_length(native, KEY)

        return [atom], read

    def _product_layout(self) -> list[tuple[Piece, ...]]:
        """Axes of an elementwise product of weights and values."""
        depth = len(self.reading.shape)
        spread = [
            axis
            for axis, pieces in enumerate(self.reading.combine.axes)
            if any(piece.broadcast for piece in pieces)
        ]
        shape = self.graph.shape(self.reading.combine.node.ins[0])
        depths = _depths(spread, shape, depth)
        return [
            (depths[axis],) if axis in depths else pieces
            for axis, pieces in enumerate(self.reading.combine.axes)
        ]

    def _peeled_value(self) -> tuple[Atom, list[tuple[Piece, ...]]]:
        """The factor that weights are multiplied by, before it was repeated."""
        atom, targets = axis_maps.unrepeated(self.graph, self.reading.combine.value)
        product = self._product_layout()
        layout = [product[target] for target in targets]
        shape = self.graph.shape(atom)
        pairs = zip(layout, shape, strict=True)
        return atom, [() if size == 1 else pieces for pieces, size in pairs]

    def _depth(self) -> int:
        combine = self.reading.combine
        if combine.node.primitive == "dot_general":
            sides = axis_maps.sides(self.graph, combine.node)
            assert sides is not None
            shape = self.graph.shape(combine.value)
            return math.prod(shape[axis] for axis in sides[1 - combine.operand].free)
        shape = self.graph.shape(combine.node.ins[0])
        spread = [
            size
            for pieces, size in zip(combine.axes, shape, strict=True)
            if any(piece.broadcast for piece in pieces)
        ]
        return math.prod(spread)

    def _check_plain(self) -> None:
        """Heads that are mixed after the softmax leave no values of one head."""
        if self.reading.combine.node.primitive != "dot_general":
            return
        pieces = [piece for group in self.reading.combine.axes for piece in group]
        if any(piece.broadcast for piece in pieces):
            raise ValueError("its heads are mixed after the softmax")

    def _term(self, get: Get, term: Term) -> jax.Array:
        value = get(term.atom).reshape(term.shape)
        reference = _reference_shape(term)
        native = axis_maps.to_view(value, term.axes, reference, expand=False)
        groups = ((BATCH,), (HEAD, GROUP), (QUERY,), (KEY,))
        for roles in groups:
            native = self._whole(native, roles)
        return self._arrange(native, native.shape, ())


def _reference_shape(term: Term) -> tuple[int, ...]:
    sizes = [1] * len(term.shape)
    for group in term.axes:
        for piece in group:
            if not piece.broadcast:
                sizes[piece.axis] *= piece.size
    return tuple(sizes)


def _depths(axes, shape: tuple[int, ...], reference: int) -> dict[int, Piece]:
    """Lays the axes only the values have side by side on one depth axis."""
    pieces, stride = {}, 1
    for axis in reversed(list(axes)):
        pieces[axis] = Piece(reference, stride, shape[axis])
        stride *= shape[axis]
    return pieces


def _compose(outer: AxisMap, inner: AxisMap) -> AxisMap | None:
    """A map onto a map; None where the outer one cuts an axis."""
    composed = []
    for group in outer:
        pieces: tuple[Piece, ...] = ()
        for piece in group:
            if piece.broadcast or piece.stride != 1:
                return None
            pieces += inner[piece.axis]
        composed.append(pieces)
    return tuple(composed)
