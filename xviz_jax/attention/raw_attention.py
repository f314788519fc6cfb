"""Raw attention (Bahdanau et al., 2014, arXiv 1409.0473), of one layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attention import layers, queries, rows, stack
from xviz_jax.attention.attention_rollout import Heads, check_heads
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attribution import Attribution, Target
from xviz_jax.tracing.site import positions


def raw_attention(
    model: Callable,
    *,
    query: queries.Query = 0,
    layer: int | str = -1,
    head: int | None = None,
    heads: Heads = "mean",
) -> Callable[..., Attribution]:
    """Where one layer's attention looks from one position.

    The simplest picture, and the baseline that others should beat: it knows of one
    layer only, and of neither values nor the residual connection. Class-blind.
    Never negative; sums to one, but for fusions by `max` and `min`. Costs one forward
    pass and one row of the map, made again from queries and keys where the map is
    long, so that memory grows with the length and not with its square. Computes in
    float32.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing. One example; one sequence, unless `layer` is a name.
      query: The position that looks: 0 for a class token, -1 for the last token of a
        decoder. May be traced. `pooled` for the rows that the output reads, found by
        tracing, with their weights, for another forward pass; `mean` for all rows,
        averaged, padding's left out; or weights of rows, float `[length]`.
      layer: Which layer, in the order they run; -1 is the last. Or the name of an
        attention site, as `tracing.sites` and `xviz-jax doctor` list them, of any
        model: from one sequence to another too. Of a loop's the last turn. `query` is
        then a position or weights of its rows, at the cost of a pass over the map.
      head: Which head; None for all of them.
      heads: How they are then fused: `mean`, `max` or `min`.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position, and these diagnostics:

      - `mass`: sum of the scores;
      - `self_share`: the score of the explained position itself; of several, by their
        weights. Not of a layer by name.

    Raises:
      ValueError: If the model has no self-attention over one sequence, or attention
        that is not understood, or an option does not fit.

    Source: equation 6 of the paper. The last layer with its heads averaged is the
    convention of the baseline in the code of arXiv 2012.09838.

    >>> model = lambda x: (jax.nn.softmax(x @ x.T) @ x)[0]
    >>> raw_attention(model)(jnp.zeros((4, 2))).scores.tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    check_heads(heads)

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        if isinstance(layer, str):
            logits, one = layers.capture_named(model, args, layer)
            start = queries.of_named(query, positions(one.site)[0])
            row = rows.through(one, start, _fusion(one, head, heads))
            diagnostics = {"mass": jnp.sum(row)}
        else:
            logits, found = layers.capture(model, args)
            one = stack.pick(found, layer)
            start = queries.resolve(query, found, model, args)
            row = rows.propagate([one], start, _fusion(one, head, heads), residual=0.0)
            diagnostics = queries.diagnostics(row, start)
        return Attribution(
            scores=row,
            output=attribution.explained(attribution.hold(target, logits), logits),
            diagnostics=diagnostics,
        )

    return explain


def _fusion(layer: stack.Layer, head: int | None, heads: Heads) -> Fusion:
    if head is None:
        return Fusion(heads)
    count = layer.site.shape[-3]
    if not -count <= head < count:
        raise ValueError(
            f"`head` is from {-count} to {count - 1} in a layer of {count} heads, "
            f"got {head}"
        )
    chosen = jax.nn.one_hot(head % count, count, dtype=jnp.float32)
    return Fusion("weighted", head_weights=chosen)
