"""Attention rollout (Abnar and Zuidema, 2020, arXiv 2005.00928)."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from xviz_jax import attribution
from xviz_jax.attention import layers, rows
from xviz_jax.attribution import Attribution, Target

Heads = Literal["mean", "max", "min"]


def attention_rollout(
    model: Callable,
    *,
    query: int | jax.Array = 0,
    heads: Heads = "mean",
    residual: float = 0.5,
    start_layer: int = 0,
) -> Callable[..., Attribution]:
    """Follows attention from one position down to the input, through every layer.

    Each layer's heads are fused, mixed with the identity for the residual
    connection, and the layers are multiplied. Class-blind: it tells where the
    position looked, not what for, and is the same for every target. Costs one
    forward pass and, for one row, a pass over each layer's map. Long maps are made
    again from queries and keys, tile by tile, so that memory grows with the length
    and not with its square, whatever the model's own attention does. Computes in
    float32.

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
    check_heads(heads)
    if not 0 <= residual <= 1:
        raise ValueError(f"`residual` is a weight from 0 to 1, got {residual}")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        logits, found = layers.capture(model, args)
        found = layers.since(found, start_layer)
        row = rows.propagate(found, query, residual=float(residual), heads=heads)
        return Attribution(
            scores=row,
            output=attribution.explained(attribution.hold(target, logits), logits),
            diagnostics=rows.diagnostics(row, query),
        )

    return explain


def check_heads(heads: str) -> None:
    """Refuses what is no fusion of heads."""
    if heads not in get_args(Heads):
        raise ValueError(f"`heads` is one of {list(get_args(Heads))}, got {heads!r}")
