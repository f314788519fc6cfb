"""Attention flow (Abnar and Zuidema, 2020, arXiv 2005.00928)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attention import layers, masking, max_flow, queries, rows, stack
from xviz_jax.attention.attention_rollout import Heads, check_heads
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attribution import Attribution, Target


def attention_flow(
    model: Callable,
    *,
    query: queries.Query | None = 0,
    heads: Heads = "mean",
    residual: float = 0.5,
    start_layer: int = 0,
    chunk: int = 16,
) -> Callable[..., Attribution]:
    """How much could flow from a position to each input, if attention were pipes.

    The layers are a network: from each position of a layer to each of the one below
    leads an edge, as wide as attention with its residual connection. A score is the
    maximum flow from the explained position at the top to one input, each input
    alone: where rollout multiplies along a path and adds up paths, a path here carries
    what its narrowest edge lets through, and paths share edges. Class-blind. Never
    negative; scores are divided by their sum, and so add up to one. Costs one forward
    pass, and to each input a flow by tens of sweeps over all maps, or a hundred where
    they are causal, `chunk` inputs at once: memory grows with
    `chunk * depth * length ** 2`, and time with `depth * length ** 3`. For short
    sequences; `attention_rollout` is for longer ones. Computes in float32; flows are
    found in integers, and so to the end.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing. One sequence, one example.
      query: The position that is explained: 0 for a class token, -1 for the last
        token of a decoder. May be traced. Weights of rows, float `[length]`, `mean` or
        `pooled` as for `attention_rollout`: a position whose edges are the rows'
        weighted mean. None for all of them, padding's zero, at as many times the cost.
      heads: How heads are fused: `mean`, `max` or `min`. Rows that no longer sum to
        one are normalised after the residual is added.
      residual: Weight of the identity in each layer, from 0 (none) to 1.
      start_layer: The first layer taken along; earlier ones are left out.
      chunk: To how many inputs flows are found at once.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position, `[length]` or, of all queries, `[length, length]`; and these
      diagnostics:

      - `flow`: the flows before they are divided by their sum, shaped like the scores,
        each at most 1;
      - `self_share`: the score of the explained position itself, of each query;
      - `optimality_gap`: by how much a flow may be off at most, of each query: each
        is the width of a cut that no flow can pass, less a flow that was found.

    Raises:
      ValueError: If the model has no self-attention over one sequence, or attention
        that is not understood, or an option does not fit.

    Source: section 3 of the paper; rows are queries.

    >>> model = lambda x: (jax.nn.softmax(x @ x.T) @ x)[0]
    >>> attention_flow(model)(jnp.zeros((2, 3))).diagnostics["flow"].tolist()
    [0.75, 0.25]
    """
    check_heads(heads)
    chunks.positive(chunk, "chunk")
    if isinstance(residual, str) or not 0 <= residual <= 1:
        raise ValueError(f"`residual` is a weight from 0 to 1, got {residual!r}")
    fusion = Fusion(heads)

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        logits, found = layers.capture(model, args)
        widths = rows.matrices(
            stack.since(found, start_layer),
            fusion,
            residual=float(residual),
            normalize=True,
        )
        length = widths.shape[-1]
        if query is None:
            # Nothing flows from a position that no query may attend.
            own = jnp.diag(masking.attended(found).astype(jnp.float32))
        else:
            start = queries.resolve(query, found, model, args)
            own = queries.row_weights(start, length)[None]
        flow, least = jax.lax.map(
            lambda one: max_flow.from_position(widths, one, chunk), own
        )
        total = jnp.sum(flow, axis=-1, keepdims=True)
        scores = flow / jnp.where(total == 0, 1, total)
        # The bounds meet, but one is summed in float32.
        gap = jnp.max(jnp.maximum(flow - least, 0), axis=-1)
        results = {
            "flow": flow,
            "self_share": jnp.sum(scores * own, axis=-1),
            "optimality_gap": gap,
        }
        if query is not None:
            scores, results = jax.tree.map(lambda leaf: leaf[0], (scores, results))
        return Attribution(
            scores=scores,
            output=attribution.explained(attribution.hold(target, logits), logits),
            diagnostics=results,
        )

    return explain
