"""AttCAT, attentive class activation tokens (Qiang et al., NeurIPS 2022)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attention import layers, queries, rows, stack
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attribution import Attribution, Target


def attcat(model: Callable, *, start_layer: int = 0) -> Callable[..., Attribution]:
    """Input times gradient of every layer's tokens, weighed by who attends to them.

    What a token holds for or against a class, in each layer, times the attention it
    gets there on average over heads and queries; summed over layers. Needs a target.
    Signed, unlike what is made of attention alone. Conserves nothing. Costs one
    forward and one backward pass and a pass over each layer's map, which is made tile
    by tile, and holds every layer's stream and its gradient: memory grows with the
    length and not with its square. Computes in float32.

    Args:
      model: Maps one example to logits; any JAX function, with its attention and
        residual streams found by tracing. Self-attention over one sequence.
      start_layer: The first layer taken along; earlier ones are left out.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position. The mean is over positions that may be attended, so that padding
      changes nothing. No diagnostics.

    Raises:
      ValueError: If the model has no self-attention over one sequence, attention
        that is not understood, or a layer without a residual stream, or an option
        does not fit.

    Source: equations 7 to 9 of the paper; tokens are those that enter a layer.
    """

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key

        def scalar(logits: jax.Array) -> jax.Array:
            return attribution.explained(attribution.hold(target, logits), logits)

        logits, found = layers.capture(model, args, scalar, streams=True)
        kept = stack.since(found, start_layer)
        attention = rows.each(kept, queries.uniform(found), Fusion())
        impacts = [
            jnp.sum(
                layer.values["stream"].astype(jnp.float32)
                * layer.values["stream_cotangent"].astype(jnp.float32),
                axis=-1,
            ).reshape(layer.length, -1)
            for layer in kept
        ]
        scores = jnp.sum(attention * jnp.concatenate(impacts), axis=0)
        return Attribution(scores=scores, output=scalar(logits))

    return explain
