"""LeGrad (Bousselham et al., 2024, arXiv 2404.03214)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attention import layers, masking, queries, rows, stack
from xviz_jax.attention.fusion import gradient_row
from xviz_jax.attention.stack import Layer
from xviz_jax.attribution import Attribution, Target

# Queries whose gradients are made at once.
_TILE = 128


def legrad(
    model: Callable, *, start_layer: int = 0, last: str | None = None
) -> Callable[..., Attribution]:
    """Where more attention, layer by layer, would speak for a class at once.

    Each layer is asked what the model would say if it were the last one: what it
    passes on goes straight to the rest of the model, its final normalisation, pooling
    and head. The positive part of that answer's gradient at the layer's attention is
    averaged over heads and queries, and summed over layers. Attention itself is never
    multiplied in, and counts only where it is not zero. Needs a target. Never
    negative. Conserves nothing. Costs one forward and one backward pass, the rest of
    the model once more for each layer, and a product of queries by keys in each, made
    tile by tile: memory grows with the length and not with its square. Computes in
    float32.

    Args:
      model: Maps one example to logits; any JAX function, with its attention and
        residual streams found by tracing. Self-attention over one sequence.
      start_layer: The first layer taken along; earlier ones are left out. The
        paper's own code takes the last few.
      last: The name, given by `jax.ad_checkpoint.checkpoint_name`, of what the last
        layer returns. None to find it by tracing: what a loop over layers ends with,
        or where layers that are written out stop repeating.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position, a class token's included, and not rescaled. The mean is over
      positions that may be attended, so that padding changes nothing. No diagnostics.

    Raises:
      ValueError: If the model has no self-attention over one sequence, attention
        that is not understood, or a layer without a residual stream; if what leaves
        the last layer is not found, or a layer sees earlier ones around the stream;
        or an option does not fit.

    Source: section 3 of the paper, before its rescaling.
    """

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key

        def scalar(own: jax.Array, logits: jax.Array) -> jax.Array:
            return attribution.explained(attribution.hold(target, logits), own)

        logits, found = layers.capture_own(model, args, scalar, last)
        kept = stack.since(found, start_layer)
        share = queries.uniform(found)
        each = rows.apart(kept, lambda layer: _of_layer(layer, share))
        scores = jnp.sum(jnp.concatenate(each), axis=0)
        return Attribution(scores=scores, output=scalar(logits, logits))

    return explain


def _of_layer(layer: Layer, share: jax.Array) -> jax.Array:
    """The mean over heads and queries of what of the gradient is positive."""

    def of_query(position: jax.Array) -> jax.Array:
        slope = gradient_row(layer.values, position)
        counted = jnp.where(masking.seen(layer, position), jax.nn.relu(slope), 0)
        return jnp.mean(counted, axis=0)

    return chunks.total(of_query, jnp.arange(len(share)), _TILE, share)
