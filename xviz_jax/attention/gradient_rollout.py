"""Gradient rollout: attention rollout of maps that are weighed by their gradient.

The method of github.com/jacobgil/vit-explain (2020), an unpublished variant of
attention rollout (Abnar and Zuidema, 2020, arXiv 2005.00928).
"""

from collections.abc import Callable
from typing import Any

import jax

from xviz_jax import attribution
from xviz_jax.attention import layers, rows
from xviz_jax.attribution import Attribution, Target


def gradient_rollout(
    model: Callable,
    *,
    query: rows.Query = 0,
    residual: float = 0.5,
    discard_ratio: float = 0.0,
    start_layer: int = 0,
) -> Callable[..., Attribution]:
    """Follows what attention contributes to a class through every layer.

    Each layer's attention times its gradient is averaged over heads, its positive
    part is mixed with the identity, rows are divided by their sums, and the layers
    are multiplied. The convention is that of vit-explain, but for what it discards.
    Gradients are small beside the identity, which the model's scale
    therefore weighs: `attention_relevance` is the published form. Never negative;
    sums to one. Costs one forward and one backward pass and two passes over each
    layer's map, made tile by tile. Computes in float32.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing. Self-attention over one sequence.
      query: The position the class is read from: 0 for a class token, -1 for the
        last token of a decoder. May be traced. `pooled` for the rows that the
        output reads, found by tracing, with their weights, for another forward pass;
        `mean` for all rows, averaged, padding's left out; or weights of rows, float
        `[length]`.
      residual: Weight of the identity in each layer, from 0 (none) to 1. Without
        any, a row that has nothing positive stays zero.
      discard_ratio: The fraction of entries of each layer's fused map, its lowest,
        that count as zero; 0.9 by default in the repository.
      start_layer: The first layer taken along; earlier ones are left out.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position, and these diagnostics:

      - `mass`: sum of the scores;
      - `self_share`: the score of the explained position itself; of several, by their
        weights.

    Raises:
      ValueError: If the model has no self-attention over one sequence, or attention
        that is not understood, or an option does not fit.

    Source: the repository's description, without two faults of its code: rows, not
    columns, are divided by row sums, and each layer has its own gradient.
    """
    if not 0 <= residual <= 1:
        raise ValueError(f"`residual` is a weight from 0 to 1, got {residual}")
    if not 0 <= discard_ratio < 1:
        raise ValueError(
            f"`discard_ratio` is from 0 to less than 1, got {discard_ratio}"
        )
    fusion = rows.Fusion(
        relevance="gradient_x_attention",
        rectify=True,
        discard_ratio=float(discard_ratio),
    )

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key

        def scalar(logits: jax.Array) -> jax.Array:
            return attribution.explained(attribution.hold(target, logits), logits)

        keep = fusion.inside(query)
        logits, found = layers.capture(model, args, scalar, keep=keep)
        start = rows.resolve(query, found, model, args)
        row = rows.propagate(
            layers.since(found, start_layer),
            start,
            fusion,
            residual=float(residual),
            normalize=True,
        )
        return Attribution(
            scores=row,
            output=scalar(logits),
            diagnostics=rows.diagnostics(row, start),
        )

    return explain
