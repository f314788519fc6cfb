"""Generic attention relevance (Chefer, Gur and Wolf, 2021, arXiv 2103.15679)."""

from collections.abc import Callable
from typing import Any

import jax

from xviz_jax import attribution
from xviz_jax.attention import layers, rows
from xviz_jax.attention.attention_rollout import Heads, check_heads
from xviz_jax.attribution import Attribution, Target


def attention_relevance(
    model: Callable,
    *,
    query: int | jax.Array = 0,
    heads: Heads = "mean",
    start_layer: int = 0,
) -> Callable[..., Attribution]:
    """Which positions the model's attention used for a class, through every layer.

    Each layer's attention is weighed by its gradient, only what speaks for the
    class is kept, heads are fused, the identity is added for the residual
    connection, and the layers are multiplied. Unlike a rollout it depends on the
    target. Costs one forward and one backward pass and, for one row, a pass over
    each layer's map, which is made from queries, keys, values and the gradient at
    the attention's output, tile by tile: memory grows with the length and not with
    its square. Computes in float32.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing. Self-attention over one sequence.
      query: The position the class is read from: 0 for a class token, -1 for the
        last token of a decoder. May be traced.
      heads: How heads are fused: `mean`, the paper's, `max` or `min`.
      start_layer: The first layer taken along; earlier ones are left out.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position, non-negative and not normalised, and these diagnostics:

      - `mass`: sum of the scores, at least 1: the identity that every layer adds;
      - `self_share`: the score of the explained position itself, at least 1 too.

    Raises:
      ValueError: If the model has no self-attention over one sequence, or attention
        that is not understood, or an option does not fit.

    Source: equations 5 and 6 of the paper, with R the identity at first; the row of
    R that belongs to `query`. The gradient of the attention A = softmax(QKᵀ) is
    dL/dO Vᵀ, with O = A V.
    """
    check_heads(heads)

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key

        def scalar(logits: jax.Array) -> jax.Array:
            return attribution.explained(attribution.hold(target, logits), logits)

        logits, found = layers.capture(model, args, scalar)
        row = rows.propagate(
            layers.since(found, start_layer),
            query,
            rows.Fusion(heads, "relu_gradient_x_attention"),
            residual="add",
            normalize=heads != "mean",
        )
        return Attribution(
            scores=row,
            output=scalar(logits),
            diagnostics=rows.diagnostics(row, query),
        )

    return explain
