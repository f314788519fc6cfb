"""Which array is the query, the key and the value, and which axis is which.

A softmax that weighs values is attention when its scores are a product of two
arrays of which one runs over the same keys as the values. The axes then have
roles: batch, head, group of heads that share a key, query, key.
"""

import dataclasses
import math

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing.axes import AxisMap, Side, axes_of
from xviz_jax.tracing.compat import Literal
from xviz_jax.tracing.graph import CUSTOM_RULE, Atom, Graph, Node
from xviz_jax.tracing.origins import (
    bare_input,
    is_made_of,
    is_random,
    is_raw,
    is_repeated,
    is_zero,
    origin,
)
from xviz_jax.tracing.softmax import Combine, Softmax

BATCH, HEAD, GROUP, QUERY, KEY = range(5)
# What leaves probabilities as they are, but for their shape and dtype.
KEEPING = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "expand_dims",
    "layout_constraint",
    "name",
    "optimization_barrier",
    "pvary",
    "reduce_precision",
    "reshape",
    "reshard",
    "sharding_constraint",
    "squeeze",
    "transpose",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """The query-key product behind a softmax.

    Attributes:
      node: Where it is made.
      sides: Its operands.
      axes: The softmax's axes, with respect to the product's result.
      query_side: Which operand is the query.
      others: Further products added into the same scores.
    """

    node: Node
    sides: tuple[Side, Side]
    axes: AxisMap
    query_side: int
    others: tuple[Node, ...] = ()

    @property
    def query(self) -> Atom:
        """The query operand."""
        return self.sides[self.query_side].atom

    @property
    def key(self) -> Atom:
        """The key operand."""
        return self.sides[1 - self.query_side].atom


@dataclasses.dataclass(eq=False)
class Reading:
    """One site, understood: where its arrays are and what their axes mean.

    Attributes:
      kind: As in `Site`.
      softmax: The exponential and what becomes of it.
      combine: Where the values are weighed.
      deferred: Whether the division comes after the product with the values.
      product: The query-key product, if there is one.
      roles: The role of each of the softmax's axes.
      probability: The value that holds the probabilities; None when deferred.
      axes: That value's axes, with respect to the softmax.
      shape: Sizes of the softmax's axes in the probabilities.
      notes: What was not understood, a sentence each.
    """

    kind: str
    softmax: Softmax
    combine: Combine
    deferred: bool
    product: Product | None
    roles: tuple[int, ...]
    probability: Atom
    axes: AxisMap
    shape: tuple[int, ...]
    notes: list[str] = dataclasses.field(default_factory=list)

    def along(self, *roles: int) -> list[int]:
        """Axes that have one of `roles`, in the order of the roles."""
        return [
            axis for role in roles for axis, own in enumerate(self.roles) if own == role
        ]

    def canonical_shape(self) -> tuple[int, ...]:
        """Sizes of batch, head, query and key."""
        groups = ((BATCH,), (HEAD, GROUP), (QUERY,), (KEY,))
        return tuple(
            math.prod(self.shape[axis] for axis in self.along(*roles))
            for roles in groups
        )


def read(graph: Graph, softmax: Softmax) -> Reading | None:
    """Reads the site of a softmax; None where it weighs no values."""
    found = _first_combine(graph, softmax)
    if found is None:
        return None
    product, _ = _find_product(graph, softmax, *found[:2])
    if product is not None:
        softmax = softmax.refined(product.node)
        found = _first_combine(graph, softmax) or found
    kind, combine, deferred = found
    product, kind = _find_product(graph, softmax, kind, combine)
    keys = softmax.keys if found[0] == "attention" else frozenset(combine.summed())
    roles, note = _roles(graph, softmax, product, combine, keys)
    reading = Reading(
        kind,
        softmax,
        combine,
        deferred,
        product,
        roles,
        None if deferred else softmax.probability,
        softmax.axes if deferred else softmax.probability_axes,
        softmax.shape,
    )
    if note:
        reading.notes.append(note)
    if not deferred:
        _leave_custom_rule(graph, reading)
        _advance(graph, reading)
        if kind == "attention":
            _take_what_weighs(graph, reading)
    if kind == "attention" and _weighs_again(graph, softmax, combine):
        reading.kind = "unknown"
        reading.notes.append("its map weighs more values, made of what it gave")
    return reading


def _first_combine(graph: Graph, softmax: Softmax) -> tuple[str, Combine, bool] | None:
    """The first product with values; later ones belong to derivatives.

    Constants are weighed beside values, as of relative positions.
    """
    whole = [c for c in softmax.combines if softmax.keys <= c.summed()]
    whole.sort(key=lambda combine: is_raw(graph, combine.value))
    for combine in whole:
        if combine.kind == "probability":
            return "attention", combine, False
    if softmax.deferred is not None and softmax.deferred.combine in whole:
        return "attention", softmax.deferred.combine, True
    for combine in softmax.combines:
        summed = combine.summed()
        if combine.kind == "probability" and summed and not summed & softmax.keys:
            return "inverted", combine, False
    return None


def is_unnormalised(graph: Graph, softmax: Softmax) -> bool:
    """Whether exponentials of a computed product weigh values, undivided."""
    for combine in softmax.combines:
        if combine.kind != "exponential" or not softmax.keys <= combine.summed():
            continue
        product, kind = _find_product(graph, softmax, "attention", combine)
        if product is None or kind != "attention":
            continue
        if not is_raw(graph, product.query) and not is_raw(graph, product.key):
            return True
    return False


def _shared_with_value(graph: Graph, combine: Combine) -> set[int]:
    """Axes of the softmax that the values have too."""
    if combine.node.primitive == "dot_general":
        contract, batch = combine.node.params["dimension_numbers"]
        dims = [*contract[combine.operand], *batch[combine.operand]]
    else:
        atom, targets = axis_maps.unrepeated(graph, combine.value)
        sizes = zip(targets, graph.shape(atom), strict=True)
        dims = [target for target, size in sizes if size > 1]
    return set().union(*[axes_of(combine.axes[dim]) for dim in dims])


def _find_product(
    graph: Graph, softmax: Softmax, kind: str, combine: Combine
) -> tuple[Product | None, str]:
    """The product of which one side runs over the keys, and what kind it makes."""
    wide = {axis for axis, size in enumerate(softmax.shape) if size > 1}
    keys = softmax.keys if kind == "attention" else frozenset(combine.summed())
    shared = _shared_with_value(graph, combine) & wide
    candidates = []
    for node, axes in softmax.scores.items():
        sides = axis_maps.sides(graph, node)
        if sides is None:
            continue
        batch = _softmax_axes(axes, {sides[0].out[axis] for axis in sides[0].batch})
        free = [_softmax_axes(axes, {s.out[axis] for axis in s.free}) for s in sides]
        for query_side in (0, 1):
            queries, key_free = free[query_side], free[1 - query_side]
            if not keys <= key_free or keys & queries:
                continue
            agree = (batch | key_free) & wide == shared
            product = Product(node, sides, axes, query_side)
            routed = bool(queries & wide) and queries & wide <= shared and not agree
            candidates.append((not agree, node.index, product, routed, batch & wide))
    if not candidates:
        return None, "pooling" if kind == "attention" else kind
    candidates.sort(key=lambda candidate: candidate[:2])
    _, _, product, routed, batch = candidates[0]
    others = {c[2].node: None for c in candidates[1:] if c[2].node is not product.node}
    product = dataclasses.replace(product, others=tuple(others))
    if kind != "attention":
        return product, kind
    if _is_vector_query(graph, product):
        return None, "pooling"
    if (routed and not batch) or _is_expert_choice(graph, product, combine):
        return product, "router"
    return product, kind


def _softmax_axes(axes: AxisMap, of: set[int]) -> set[int]:
    """Axes of the softmax that run over some axes of the product."""
    return {axis for axis, pieces in enumerate(axes) if axes_of(pieces) & of}


def _is_vector_query(graph: Graph, product: Product) -> bool:
    """A parameter vector dotted with every key: learned-query or additive pooling."""
    side = product.sides[product.query_side]
    shape = graph.shape(product.query)
    single = all(shape[axis] == 1 for axis in side.free)
    return single and not side.batch and is_raw(graph, product.query)


def _is_expert_choice(graph: Graph, product: Product, combine: Combine) -> bool:
    """Keys are bare parameters while values are computed: gates of experts."""
    side = product.sides[1 - product.query_side]
    bare = None if side.batch else bare_input(graph, product.key)
    if bare is None or is_raw(graph, combine.value):
        return False
    # Values made of the keys are a sequence's, which attends itself as it came.
    return not is_made_of(graph, combine.value, bare)


def _roles(
    graph: Graph,
    softmax: Softmax,
    product: Product | None,
    combine: Combine,
    keys: frozenset[int],
) -> tuple[tuple[int, ...], str]:
    roles = [BATCH] * len(softmax.shape)
    note = ""
    if product is not None:
        note = _product_roles(graph, softmax, product, roles, keys)
    else:
        _pooling_roles(graph, softmax, combine, roles, keys)
    for axis in keys:
        roles[axis] = KEY
    if product is not None and HEAD not in roles:
        # Without weights to tell, the convention decides: heads come after batch.
        own = [
            axis
            for axis, pieces in enumerate(product.axes)
            if roles[axis] == BATCH and axes_of(pieces)
        ]
        if len(own) > 1:
            roles[own[-1]] = HEAD
    return tuple(roles), note


def _pooling_roles(graph, softmax, combine, roles, keys) -> None:
    """Axes that the values lack: heads if a parameter has them, else queries."""
    lacking = set(range(len(softmax.shape))) - _shared_with_value(graph, combine)
    for axis in lacking:
        roles[axis] = QUERY
    for node, axes in softmax.scores.items():
        made = axis_maps.sides(graph, node)
        for side in made or ():
            own = _softmax_axes(axes, {side.out[axis] for axis in side.free})
            if not own & keys and is_raw(graph, side.atom):
                for axis in own & lacking:
                    roles[axis] = HEAD


def _product_roles(graph, softmax, product, roles, keys) -> str:
    """Fills in the roles that the query-key product tells; returns a note."""
    query, key = (
        product.sides[product.query_side],
        product.sides[1 - product.query_side],
    )
    depth = None
    if query.contract:
        depth = origin(graph, product.query, query.contract[0])

    def from_weights(axis: int) -> bool:
        """Whether a query axis came out of the matrix the features came out of."""
        return depth is not None and origin(graph, product.query, axis)[0] == depth[0]

    def softmax_axes(axis: int) -> set[int]:
        return _softmax_axes(product.axes, {query.out[axis]})

    shape = graph.shape(product.query)
    free = [axis for axis in query.free if softmax_axes(axis)]
    wide = [axis for axis in free if shape[axis] > 1] or free[:1]
    if wide and all(from_weights(axis) for axis in wide):
        depth = None
    queries, note = wide, ""
    if len(wide) > 1 and len(wide) != len(keys):
        key_origins = [
            origin(graph, product.key, axis)
            for axis in key.free
            if _softmax_axes(product.axes, {key.out[axis]}) & keys
        ]
        queries = [axis for axis in wide if not from_weights(axis)]
        if len(queries) != 1:
            queries = [
                a for a in wide if origin(graph, product.query, a) in key_origins
            ]
        if len(queries) != 1:
            queries = [max(wide, key=lambda axis: (shape[axis], axis))]
            note = "which axis runs over the queries is a guess: the longest"
    for axis in free:
        for own in softmax_axes(axis):
            roles[own] = QUERY if axis in queries else GROUP
    for axis in query.batch:
        for own in softmax_axes(axis):
            roles[own] = HEAD if from_weights(axis) else BATCH
    return note


def _leave_custom_rule(graph: Graph, reading: Reading) -> None:
    """Reads probabilities where a function with its own derivative returns them."""
    softmax, inside = reading.softmax, reading.combine.node.path
    rules = [
        call
        for call in graph.visible[reading.probability]
        if call not in inside and call.primitive in CUSTOM_RULE
    ]
    for call in rules[:1]:
        for out in call.outs:
            same = graph.shape(softmax.exponential)
            if not isinstance(out, Literal) and graph.shape(out) == same:
                reading.probability = out
                reading.axes = softmax.axes


def _take_what_weighs(graph: Graph, reading: Reading) -> None:
    """Reads what weighs the values, where more than a mask came after the softmax.

    As where probabilities are masked and divided by their sum again, or sharpened.
    Dropout, heads that are mixed, and gates that are alike for all keys leave the
    probabilities what they are.
    """
    combine = reading.combine
    if combine.node.primitive != "dot_general":
        return
    weights = combine.node.ins[combine.operand]
    if any(piece.broadcast for group in combine.axes for piece in group):
        return
    waiting, seen, changed = [weights], set(), False
    while waiting:
        atom = waiting.pop()
        if isinstance(atom, Literal) or atom == reading.probability or atom in seen:
            continue
        seen.add(atom)
        node = graph.source(atom)
        if node is None:
            continue
        # Another softmax has a part in it, or heads have been mixed.
        if node.bodies or node.primitive in ("dot_general", "exp", "exp2"):
            return
        if is_random(graph, atom):
            return
        gate = _gate(graph, node, reading, weights)
        changed |= node.primitive not in KEEPING and gate is None
        waiting += [each for each in node.ins if each != gate]
    left = [1] * len(reading.shape)
    for piece in (piece for group in combine.axes for piece in group):
        left[piece.axis] *= piece.size
    # Heads that are subtracted from others are several of one layer.
    keys = reading.along(KEY)
    if changed and all(
        axis in keys or size == left[axis] for axis, size in enumerate(reading.shape)
    ):
        reading.softmax.changed = True
        reading.probability, reading.axes = weights, combine.axes
        reading.shape = _sizes(combine.axes, reading.shape)


def _gate(graph: Graph, node: Node, reading: Reading, weights: Atom) -> Atom:
    """A factor of the weights that is alike for all keys and is not made of these.

    Or a zero that is added.
    """
    combine = reading.combine
    if node.primitive in ("add", "sub"):
        return next((each for each in node.ins[::-1] if is_zero(graph, each)), None)
    if node.primitive not in ("div", "mul"):
        return None
    if graph.shape(node.outs[0]) != graph.shape(weights):
        return None
    keys = combine.node.params["dimension_numbers"][0][combine.operand]
    for other in (node.ins[1], node.ins[0])[: 1 if node.primitive == "div" else 2]:
        shape = graph.shape(other)
        alike = not shape or all(
            shape[axis] == 1 or is_repeated(graph, other, axis) for axis in keys
        )
        if alike and not is_made_of(graph, other, reading.probability):
            return other
    return None


def _weighs_again(graph: Graph, softmax: Softmax, first: Combine) -> bool:
    """Whether one map weighs what was made of what it had weighed before."""
    (made,) = first.node.outs
    later = [
        combine
        for combine in softmax.combines
        if combine.node is not first.node and softmax.keys <= combine.summed()
    ]
    return any(is_made_of(graph, combine.value, made) for combine in later)


def _sizes(axes: AxisMap, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the softmax's axes in a view, of which some may be cut off."""
    sizes = list(shape)
    for pieces in axes:
        if len(pieces) == 1 and not pieces[0].broadcast and pieces[0].stride == 1:
            sizes[pieces[0].axis] = min(pieces[0].size, sizes[pieces[0].axis])
    return tuple(sizes)


def _advance(graph: Graph, reading: Reading) -> None:
    """Moves past what still defines the probabilities.

    `where(mask, probabilities, 0)` and the removal of a sink's column come after
    the softmax but before the probabilities are used.
    """
    while True:
        users = graph.users.get(reading.probability, [])
        if len(users) != 1:
            return
        node = users[0]
        if node.primitive == "slice" and node.params["strides"] is None:
            maps = axis_maps.through(graph, node, 0, reading.axes)
            if not maps:
                return
            reading.axes = maps[0]
        elif node.primitive != "select_n" or not _masks(graph, node, reading):
            return
        reading.probability = node.outs[0]
        reading.shape = _sizes(reading.axes, reading.shape)


def _masks(graph: Graph, node: Node, reading: Reading) -> bool:
    others = [atom for atom in node.ins[1:] if atom != reading.probability]
    same = graph.shape(node.outs[0]) == graph.shape(reading.probability)
    return (
        same
        and len(others) == 1
        and is_zero(graph, others[0])
        and not is_random(graph, node.ins[0])
    )
