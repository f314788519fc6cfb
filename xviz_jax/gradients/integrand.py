"""What is integrated along a path, and sums of it.

An integrand maps alpha, a float32 scalar in [0, 1], to the explained scalar at that
point of the path and to a vector: a float32 pytree, one entry for each element of
the input, whose sum is the derivative of the scalar along the path. The integral of
the vector is the attribution, so it adds up to the change of the scalar.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Integrand = Callable[[jax.Array], tuple[jax.Array, Any]]

# Differences of the output that are smaller than this many roundings say nothing.
_ROUNDINGS = 4
# A change of the output that is a smaller share of the scores is their cancellation.
_CANCELLED = 1 / 32


def several(integrand: Integrand, nodes: jax.Array) -> tuple[jax.Array, Any]:
    """Scalar and vector at each node; one alone is not batched."""
    if len(nodes) > 1:
        return jax.vmap(integrand)(nodes)
    return jax.tree.map(lambda each: each[None], integrand(nodes[0]))


def weigh(weights: jax.Array, vectors: Any) -> Any:
    """Sums `[sums, ...]` of vectors `[nodes, ...]` under weights `[sums, nodes]`."""

    def add(leaf: jax.Array) -> jax.Array:
        if weights.shape[1] == 1:
            return weights.reshape(-1, *(1,) * (leaf.ndim - 1)) * leaf
        highest = jax.lax.Precision.HIGHEST
        return jnp.tensordot(weights, leaf, axes=1, precision=highest)

    return jax.tree.map(add, vectors)


def integrate_fixed(
    integrand: Integrand,
    like: Any,
    nodes: np.ndarray,
    weights: np.ndarray,
    chunk: int,
) -> Any:
    """Weighted sums of the vector at fixed nodes.

    Args:
      integrand: The path.
      like: Arrays shaped like its vector.
      nodes: Where it is evaluated, `[nodes]` in [0, 1].
      weights: One row for each sum, `[sums, nodes]`.
      chunk: Nodes evaluated at once; memory does not grow with their number.

    Returns:
      A float32 pytree `[sums, ...]`.
    """
    chunk = min(chunk, len(nodes))
    padding = -len(nodes) % chunk
    # The padding repeats a real node, where the gradient is as finite as there.
    nodes = np.concatenate([nodes, np.repeat(nodes[-1:], padding)])
    columns = np.pad(weights, ((0, 0), (0, padding))).T

    def add(sums: Any, some: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        found = weigh(some[1].T, several(integrand, some[0])[1])
        return jax.tree.map(jnp.add, sums, found), None

    chunked = (
        jnp.asarray(nodes.reshape(-1, chunk), jnp.float32),
        jnp.asarray(columns.reshape(-1, chunk, len(weights)), jnp.float32),
    )
    return jax.lax.scan(add, zeros_of(like, len(weights)), chunked)[0]


def zeros_of(like: Any, sums: int) -> Any:
    """Empty sums `[sums, ...]` of vectors shaped like a pytree."""
    # Made of `like`, so that they lie on its mesh.
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(
            jnp.zeros_like(leaf, jnp.float32)[None], (sums, *leaf.shape)
        ),
        like,
    )


def total_of(vector: Any) -> jax.Array:
    """Sum over all elements of a pytree."""
    return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(vector)), jnp.float32(0))


def norm_of(vector: Any) -> jax.Array:
    """L1 norm over all elements of a pytree."""
    return total_of(jax.tree.map(jnp.abs, vector))


def beyond_rounding(
    difference: jax.Array, left: jax.Array, right: jax.Array, resolution: float
) -> jax.Array:
    """The size of a difference of two outputs, less what rounding may have made it."""
    size = jnp.maximum(jnp.abs(left), jnp.abs(right))
    return jnp.maximum(jnp.abs(difference) - _ROUNDINGS * resolution * size, 0)


def judge(
    vector: Any,
    error: jax.Array,
    begin_value: jax.Array,
    value: jax.Array,
    *,
    resolution: float,
    tolerance: float,
) -> tuple[jax.Array, jax.Array]:
    """Says how far an attribution vector can be trusted.

    Args:
      vector: The attribution.
      error: Estimate of its error, L1, in units of the output.
      begin_value: The explained scalar where the path starts.
      value: The explained scalar where it ends.
      resolution: The relative rounding of these, as `jnp.finfo(dtype).eps`.
      tolerance: The relative error that is wanted.

    Returns:
      The relative error: the estimate, or the completeness gap where that is larger
      (no vector is closer to the true one than its sum is), over the norm of the
      vector, or the change of the output where that is larger (no true vector has a
      smaller norm). And whether it has converged: the relative error is within the
      tolerance, and the gap is so relative to the change of the output too, unless
      that is next to nothing beside the scores that cancel out in it.
    """
    norm, change = norm_of(vector), jnp.abs(value - begin_value)
    gap = beyond_rounding(
        total_of(vector) - (value - begin_value), begin_value, value, resolution
    )
    tiny = jnp.finfo(jnp.float32).tiny
    relative = jnp.maximum(error, gap) / jnp.maximum(jnp.maximum(norm, change), tiny)
    agrees = gap <= tolerance * jnp.maximum(change, _CANCELLED * norm)
    return relative, (relative <= tolerance) & agrees & jnp.isfinite(norm)
