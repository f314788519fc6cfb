"""Grad-SAM (Barkan et al., 2021, arXiv 2204.11073)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attention import layers, queries, rows, stack
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attribution import Attribution, Target


def grad_sam(model: Callable, *, start_layer: int = 0) -> Callable[..., Attribution]:
    """Which positions all queries attend where that speaks for a class.

    Each layer's attention is weighed by the positive part of its gradient and
    averaged over layers, heads and queries. No position is followed through the
    layers, so that none needs to be named: a choice for models without a class
    token. Needs a target. Never negative. Conserves nothing. Costs one forward and
    one backward pass and a pass over each layer's map, which is made tile by tile:
    memory grows with the length and not with its square. Computes in float32.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing. Self-attention over one sequence.
      start_layer: The first layer taken along; earlier ones are left out.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position. The mean is over positions that may be attended, so that padding
      changes nothing. No diagnostics.

    Raises:
      ValueError: If the model has no self-attention over one sequence, or attention
        that is not understood, or an option does not fit.

    Source: equation 4 of the paper.
    """

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key

        def scalar(logits: jax.Array) -> jax.Array:
            return attribution.explained(attribution.hold(target, logits), logits)

        logits, found = layers.capture(model, args, scalar)
        each = rows.each(
            stack.since(found, start_layer),
            queries.uniform(found),
            Fusion(relevance="relu_gradient_x_attention"),
        )
        return Attribution(scores=jnp.mean(each, axis=0), output=scalar(logits))

    return explain
