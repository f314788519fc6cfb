"""Attention Grad-CAM (Chefer, Gur and Wolf, 2021, arXiv 2012.09838, section 4)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attention import layers, masking, queries, rows, stack
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attribution import Attribution, Target
from xviz_jax.tracing.site import positions


def attention_grad_cam(
    model: Callable, *, query: queries.Query = 0, layer: int | str = -1
) -> Callable[..., Attribution]:
    """One layer's attention, its heads weighed by their gradients as in Grad-CAM.

    Heads are to attention what channels are to a convolution: each counts by its
    gradient, averaged over the keys that the explained position sees, and what speaks
    against the class is set to zero. Knows of one layer only. Needs a target. Never
    negative. Conserves nothing. Costs one forward and one backward pass and one row
    of the map, made from queries and keys, or of a named layer a pass over the map; its
    mean gradient is made from values and the gradient at the attention's output: memory
    grows with the length and not with its square. Computes in float32.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing. One sequence, unless `layer` is a name.
      query: The position the class is read from: 0 for a class token, -1 for the
        last token of a decoder. May be traced. `pooled` for the rows that the
        output reads, found by tracing, with their weights, for another forward pass;
        `mean` for all rows, averaged, padding's left out; or weights of rows, float
        `[length]`.
      layer: Which layer, in the order they run; -1 is the last. Or the name of an
        attention site of any model, as for `raw_attention`: from one sequence to
        another too. `query` is then a position or weights of its rows.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position. No diagnostics.

    Raises:
      ValueError: If the model has no self-attention over one sequence, or attention
        that is not understood, or an option does not fit.

    Source: Grad-CAM, equations 1 and 2 of arXiv 1610.02391, with the row of each head
    as a feature map.
    """

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key

        def scalar(logits: jax.Array) -> jax.Array:
            return attribution.explained(attribution.hold(target, logits), logits)

        start = None
        if isinstance(layer, str):
            logits, one = layers.capture_named(model, args, layer, scalar)
            share = queries.of_named(query, positions(one.site)[0])
        else:
            logits, found = layers.capture(model, args, scalar)
            one = stack.pick(found, layer)
            start = queries.resolve(query, found, model, args)
            share = queries.row_weights(start, one.site.shape[-1])
        seen = masking.attended([one]).astype(jnp.float32)
        weights = _mean_gradients(one.values, share, seen / jnp.sum(seen))
        fusion = Fusion("weighted", head_weights=weights / len(weights))
        if start is None:
            row = rows.through(one, share, fusion)
        else:
            row = rows.propagate([one], start, fusion, residual=0.0)
        return Attribution(scores=jax.nn.relu(row), output=scalar(logits))

    return explain


def _mean_gradients(
    values: dict[str, jax.Array], query: jax.Array, keys: jax.Array
) -> jax.Array:
    """The gradient at a row of each head's map, averaged over keys, `[heads]`."""
    if "probabilities_cotangent" in values:
        gradient = values["probabilities_cotangent"][0]
        return jnp.einsum("hqk,q,k->h", gradient, query, keys, precision="highest")
    cotangent = jnp.einsum(
        "qhd,q->hd", values["output_cotangent"][0], query, precision="highest"
    )
    value = jnp.einsum("khd,k->hd", values["value"][0].astype(jnp.float32), keys)
    value = jnp.repeat(value, len(cotangent) // len(value), axis=0)
    return jnp.sum(cotangent * value, axis=-1)
