"""Generic attention relevance (Chefer, Gur and Wolf, 2021, arXiv 2103.15679)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from xviz_jax import attribution
from xviz_jax.attention import co_attention, joint, layers, queries, rows, stack
from xviz_jax.attention.attention_rollout import Heads, check_heads
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.sites import readable, self_attention
from xviz_jax.attention.streams import Naming, several
from xviz_jax.attribution import Attribution, Target
from xviz_jax.tracing.program import trace


def attention_relevance(
    model: Callable,
    *,
    query: queries.Query | Mapping[str, queries.Query] = 0,
    heads: Heads = "mean",
    start_layer: int = 0,
    streams: Naming | None = None,
) -> Callable[..., Attribution]:
    """Which positions the model's attention used for a class, through every layer.

    Each layer's attention is weighed by its gradient, only what speaks for the
    class is kept, heads are fused, the identity is added for the residual
    connection, and the layers are multiplied. Unlike a rollout it depends on the
    target. Never negative; conserves nothing. This is the paper's own convention:
    the identity and all of attention, rows never normalised but for cross-attention.
    Costs one forward and one backward pass and, for one row, a pass over each layer's
    map. A map that the model makes anyway, of up to 2,048 positions, is read inside the
    model with its heads fused, on the way backward: one float32 `[length, length]` is
    kept for each layer. Else it is made from queries, keys, values and the gradient at
    the attention's output, tile by tile: memory grows with the length and not with its
    square. Computes in float32.

    With cross-attention, as of an encoder and a decoder or of a text and an image, one
    relevance is kept for each pair of sequences, and memory grows with their squares.
    Tracing tells the sequences apart by following
    positions to the arrays in which they began. Attention that reads a sequence as it
    was before a layer beside it, as in co-attention, takes relevance of before.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing.
      query: The position the class is read from: 0 for a class token, -1 for the
        last token of a decoder. May be traced. `pooled` for the rows that the
        output reads, found by tracing, with their weights, for another forward pass;
        `mean` for all rows, averaged, padding's left out; or weights of rows, float
        `[length]`. Where the output is read from several sequences, any of these for
        one of them, by its name: `{name: position}`.
      heads: How heads are fused: `mean`, the paper's, or for one sequence `max` or
        `min`, and then rows are normalised.
      start_layer: The first layer taken along; earlier ones are left out.
      streams: Names the sequences, if tracing cannot tell them apart: of each
        attention site, by its name, those of its queries and of its keys.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position, non-negative and not normalised; for several sequences a dict of
      these by the name in `streams`, or else of the first attention site whose
      queries run over it (`NAME/key` if only keys of the site NAME do). Diagnostics:

      - `mass`: sum of the scores, of one position at least 1: the identity that every
        layer adds;
      - `self_share`: the score of the explained position itself, at least 1 too; of
        several, by their weights.

    Raises:
      ValueError: If the model has no attention, or some that is not understood; if
        its sequences cannot be told apart, with the name of the site; if an option
        does not fit.

    Source: equations 5 and 6 of the paper, with R the identity at first; the row of
    R that belongs to `query`. The gradient of the attention A = softmax(QKᵀ) is
    dL/dO Vᵀ, with O = A V. For several sequences equations 5 to 11; what a sequence
    has of a third is passed on as in equation 11.
    """
    check_heads(heads)

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key

        def scalar(logits: jax.Array) -> jax.Array:
            return attribution.explained(attribution.hold(target, logits), logits)

        program = trace(model, args, {})
        fusion = Fusion(heads, "relu_gradient_x_attention")
        found = several(program, readable(program.sites), streams)
        if found is not None:
            if heads != "mean":
                raise ValueError(
                    f"`heads` of several sequences are fused by 'mean', got {heads!r}"
                )
            walk = joint.read(program, found, query, fusion, scalar, start_layer)
            scores = co_attention.relevance(walk, fusion)
            return Attribution(
                scores=scores,
                output=scalar(walk.output),
                diagnostics=joint.diagnostics(walk, scores),
            )
        asked = joint.of_one(query)
        sites = self_attention(program.sites)
        keep = fusion.inside(asked)
        logits, read = layers.capture_of(program, sites, scalar, keep=keep)
        start = queries.resolve(asked, read, model, args)
        row = rows.propagate(
            stack.since(read, start_layer),
            start,
            fusion,
            residual="add",
            normalize=heads != "mean",
        )
        return Attribution(
            scores=row,
            output=scalar(logits),
            diagnostics=queries.diagnostics(row, start),
        )

    return explain
