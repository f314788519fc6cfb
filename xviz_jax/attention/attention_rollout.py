"""Attention rollout (Abnar and Zuidema, 2020, arXiv 2005.00928)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attention import layers
from xviz_jax.attribution import Attribution, Target

_FUSIONS: dict[str, Callable[..., jax.Array]] = {
    "mean": jnp.mean,
    "max": jnp.max,
    "min": jnp.min,
}


def attention_rollout(
    model: Callable,
    *,
    query: int | jax.Array = 0,
    heads: str = "mean",
    residual: float = 0.5,
    start_layer: int = 0,
) -> Callable[..., Attribution]:
    """Follows attention from one position down to the input, through every layer.

    Each layer's heads are fused, mixed with the identity for the residual
    connection, and the layers are multiplied. Class-blind: it tells where the
    position looked, not what for, and is the same for every target. Costs one
    forward pass; propagates one row and not the matrix. Computes in float32.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing. One sequence, one example.
      query: The position that is explained: 0 for a class token, -1 for the last
        token of a decoder. May be traced.
      heads: How heads are fused: `mean`, `max` or `min`. The last two do not keep
        rows summing to one; rows are normalised after the residual is added.
      residual: Weight of the identity in each layer, from 0 (none) to 1; 0.5 is the
        paper's.
      start_layer: The first layer taken along; earlier ones are left out.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position, non-negative, and these diagnostics:

      - `mass`: sum of the scores, 1 but for rounding;
      - `self_share`: the share of the explained position itself, which the residual
        makes large.

    Raises:
      ValueError: If the model has no self-attention over one sequence, or attention
        that is not understood, or an option does not fit.

    Source: equations 1 and 2 of the paper; rows are queries.
    """
    if heads not in _FUSIONS:
        raise ValueError(f"`heads` is one of {list(_FUSIONS)}, got {heads!r}")
    if not 0 <= residual <= 1:
        raise ValueError(f"`residual` is a weight from 0 to 1, got {residual}")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        logits, sites, captured = layers.capture(model, args, ("probabilities",))
        depth, length = layers.count(sites), sites[0].shape[-1]
        if not 0 <= start_layer < depth:
            raise ValueError(
                f"`start_layer` is from 0 to {depth - 1} for {depth} layers, "
                f"got {start_layer}"
            )
        row = _one_hot(query, length)
        maps = layers.in_order(sites, captured, "probabilities")
        for probabilities in reversed(maps[start_layer:]):
            row = _step(row, probabilities[0].astype(jnp.float32), heads, residual)
        return Attribution(
            scores=row,
            output=attribution.explained(attribution.hold(target, logits), logits),
            diagnostics={
                "mass": jnp.sum(row),
                "self_share": jnp.sum(row * _one_hot(query, length)),
            },
        )

    return explain


def _one_hot(query: int | jax.Array, length: int) -> jax.Array:
    if isinstance(query, int) and not -length <= query < length:
        raise ValueError(
            f"`query` is a position from {-length} to {length - 1}, got {query}"
        )
    position = jnp.asarray(query)
    if position.shape != () or not jnp.issubdtype(position.dtype, jnp.integer):
        raise ValueError(
            f"`query` is one integer position, got {position.dtype} of shape "
            f"{position.shape}"
        )
    valid = (position >= -length) & (position < length)
    one_hot = jax.nn.one_hot(position % length, length, dtype=jnp.float32)
    return jnp.where(valid, one_hot, jnp.nan)


def _step(
    row: jax.Array, probabilities: jax.Array, heads: str, residual: float
) -> jax.Array:
    """One layer: a row [length] times the fused map [length, length]."""
    fused = _FUSIONS[heads](probabilities, axis=0)
    if heads == "mean":
        # Its rows sum to one, and still do once the identity is mixed in.
        return residual * row + (1 - residual) * (row @ fused)
    total = residual + (1 - residual) * jnp.sum(fused, axis=-1)
    share = row / jnp.where(total > 0, total, 1)
    return residual * share + (1 - residual) * (share @ fused)
