"""Probabilities that are never there: values are weighed first, and divided later."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.tracing import axes as axis_maps
from xviz_jax.tracing.axes import AxisMap
from xviz_jax.tracing.graph import Atom, Graph
from xviz_jax.tracing.interpreter import Get, Plan
from xviz_jax.tracing.roles import KEEPING, Reading
from xviz_jax.tracing.softmax import Deferred


def probabilities(reading: Reading) -> tuple[list[Atom], Callable[[Get], jax.Array]]:
    """What they would be, on the softmax's own axes: atoms, and how to combine them."""
    deferred, (atom, axes) = _deferred(reading), _weights(reading)
    shape = reading.softmax.shape

    def quotient(get: Get) -> jax.Array:
        weights = axis_maps.from_view(get(atom), axes, shape)
        by = axis_maps.from_view(get(deferred.by), deferred.by_axes, shape)
        by = by.astype(weights.dtype)
        return weights * by if deferred.inverse else weights / by

    return [atom, deferred.by], quotient


def rewrite(
    graph: Graph,
    reading: Reading,
    plan: Plan,
    name: str,
    change: Callable[[jax.Array, Any], jax.Array],
) -> None:
    """Changes weights by what the change of probabilities comes to.

    What they are divided by stays as it is, and so does the program when nothing is
    changed.

    Args:
      graph: The program.
      reading: The site.
      plan: Where the change is noted.
      name: Of the site.
      change: Of probabilities on the softmax's own axes, given its operand.

    Raises:
      ValueError: If they are divided by more or less than their sum, and that is not
        there before they weigh the values.
    """
    softmax, combine = reading.softmax, reading.combine
    deferred, (atom, axes) = _deferred(reading), _weights(reading)
    plan.want(atom)
    keys = tuple(sorted(softmax.keys))
    source = graph.source(deferred.by)
    is_there = source is not None and source.index < combine.node.index
    if is_there:
        plan.want(deferred.by)
    elif not _is_summed(graph, reading, atom):
        raise ValueError(
            f"{name!r} divides by more or less than the sum of its weights, after "
            "their product with the values: its map can be read, but not changed"
        )

    def divisor(weights: jax.Array, get: Get) -> jax.Array:
        if is_there:
            return axis_maps.from_view(
                get(deferred.by), deferred.by_axes, softmax.shape
            )
        # Summed here, because the program does so only after the product.
        return jnp.sum(weights, axis=keys, keepdims=True, dtype=jnp.float32)

    def rewritten(value: jax.Array, get: Get, given: Any) -> jax.Array:
        weights = axis_maps.from_view(get(atom), axes, softmax.shape)
        by = divisor(weights, get).astype(weights.dtype)
        inverse = is_there and deferred.inverse
        native = weights * by if inverse else weights / by
        moved = change(native, given).astype(native.dtype) - native
        moved = moved / by if inverse else moved * by
        extra = axis_maps.to_view(moved, combine.axes, softmax.shape)
        return value + extra.astype(value.dtype)

    plan.rewrite_operand(combine.node, combine.operand, name, rewritten)


def _deferred(reading: Reading) -> Deferred:
    assert reading.softmax.deferred is not None
    return reading.softmax.deferred


def _weights(reading: Reading) -> tuple[Atom, AxisMap]:
    """Exponentials as they weigh the values, masked if they are, and their axes."""
    softmax, combine = reading.softmax, reading.combine
    if combine.node.primitive == "dot_general":
        return combine.node.ins[combine.operand], combine.axes
    if softmax.modified or softmax.selections:
        raise ValueError("its exponentials are masked, and divided by later")
    return softmax.exponential, softmax.axes


def _is_summed(graph: Graph, reading: Reading, weights: Atom) -> bool:
    """Whether the normaliser is the sum of weights, and of nothing else."""
    softmax = reading.softmax
    node = graph.source(_peeled(graph, softmax.total))
    if softmax.modified or node is None or node.primitive != "reduce_sum":
        return False
    return _peeled(graph, node.ins[0]) == _peeled(graph, weights)


def _peeled(graph: Graph, atom: Atom) -> Atom:
    """A value before its shape and dtype were changed."""
    while (node := graph.source(atom)) and node.primitive in KEEPING:
        atom = node.ins[node.outs.index(atom)]
    return atom
