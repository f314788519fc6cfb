"""Evaluates a function of many items, some at a time, in one compiled body."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def positive(value: int, name: str) -> int:
    """Returns an option that is a positive integer.

    Raises:
      ValueError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is a positive integer, got {value!r}")
    return value


def each(function: Callable[[Any], Any], items: Any, chunk: int) -> Any:
    """The function's values of all items, stacked: `jax.vmap` in less memory.

    Args:
      function: Maps one item to a pytree of arrays.
      items: A pytree of arrays with one row for each item.
      chunk: How many items are evaluated at once.

    >>> each(lambda x: x * x, jnp.arange(5), chunk=2).tolist()
    [0, 1, 4, 9, 16]
    """
    count = len(jax.tree.leaves(items)[0])
    if chunk >= count:
        return _many(function, items)

    def turn(_: None, some: Any) -> tuple[None, Any]:
        return None, _many(function, some)

    _, values = jax.lax.scan(turn, None, _chunked(items, chunk))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], values)


def total(
    function: Callable[[Any], Any],
    items: Any,
    chunk: int,
    weights: jax.Array | None = None,
) -> Any:
    """The weighted sum of the function's values of all items, in float32.

    Args:
      function: Maps one item to a pytree of arrays.
      items: A pytree of arrays with one row for each item.
      chunk: How many items are evaluated at once; memory does not grow with their
        number.
      weights: One for each item; by default all are 1.

    >>> float(total(lambda x: x * x, jnp.arange(5.0), chunk=2))
    30.0
    """
    count = len(jax.tree.leaves(items)[0])
    if weights is None:
        weights = jnp.ones(count)
    weights = weights.astype(jnp.float32)

    def add(some: Any, weight: jax.Array) -> Any:
        return jax.tree.map(
            lambda leaf: jnp.tensordot(weight, leaf.astype(jnp.float32), axes=1),
            _many(function, some),
        )

    if chunk >= count:
        return add(items, weights)

    def turn(sums: Any, some: tuple[Any, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, add(*some)), None

    # The padding repeats a real item, whose value is as finite as there.
    padded = jnp.pad(weights, (0, -count % chunk)).reshape(-1, chunk)
    one = jax.tree.map(lambda leaf: leaf[0], items)
    shapes = jax.eval_shape(function, one)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    return jax.lax.scan(turn, zeros, (_chunked(items, chunk), padded))[0]


def moments(function: Callable[[Any], Any], items: Any, chunk: int) -> tuple[Any, Any]:
    """Mean and variance of the function's values over all items, in float32.

    Args:
      function: Maps one item to a pytree of float arrays.
      items: A pytree of arrays with one row for each item.
      chunk: How many items are evaluated at once; memory does not grow with their
        number.

    Returns:
      The mean, and the variance as it divides by one less than their number (not a
      number, for one item), merged from chunk to chunk without cancellation (Chan,
      Golub and LeVeque, 1979).

    >>> mean, variance = moments(lambda x: x, jnp.array([1.0, 2.0, 6.0]), chunk=2)
    >>> float(mean), float(variance)
    (3.0, 7.0)
    """
    count = len(jax.tree.leaves(items)[0])
    chunk = min(chunk, count)
    weights = jnp.pad(jnp.ones(count), (0, -count % chunk)).reshape(-1, chunk)

    def turn(so_far: Any, some: tuple[Any, jax.Array]) -> tuple[Any, None]:
        number, mean, spread = so_far
        values, weight = _many(function, some[0]), some[1]
        more = jnp.sum(weight)
        average = lambda v: jnp.tensordot(weight, v, axes=1) / more
        values = jax.tree.map(lambda v: v.astype(jnp.float32), values)
        here = jax.tree.map(average, values)
        around = jax.tree.map(
            lambda v, m: jnp.tensordot(weight, (v - m[None]) ** 2, axes=1),
            values,
            here,
        )
        step = jax.tree.map(jnp.subtract, here, mean)
        both = number + more
        mean = jax.tree.map(lambda m, d: m + d * (more / both), mean, step)
        spread = jax.tree.map(
            lambda s, a, d: s + a + d * d * (number * more / both), spread, around, step
        )
        return (both, mean, spread), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], items))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    start = (jnp.float32(0), zeros, zeros)
    chunked = (_chunked(items, chunk), weights)
    (_, mean, spread), _ = jax.lax.scan(turn, start, chunked)
    degrees = count - 1 if count > 1 else jnp.nan
    return mean, jax.tree.map(lambda s: s / degrees, spread)


def _many(function: Callable[[Any], Any], items: Any) -> Any:
    if len(jax.tree.leaves(items)[0]) > 1:
        return jax.vmap(function)(items)
    value = function(jax.tree.map(lambda leaf: leaf[0], items))
    return jax.tree.map(lambda leaf: leaf[None], value)


def _chunked(items: Any, chunk: int) -> Any:
    """Rows as `[chunks, chunk, ...]`, the last ones repeated to fill up."""

    def split(leaf: jax.Array) -> jax.Array:
        index = jnp.minimum(jnp.arange(-(-len(leaf) // chunk) * chunk), len(leaf) - 1)
        return leaf[index].reshape(-1, chunk, *leaf.shape[1:])

    return jax.tree.map(split, items)
