"""Grad-SAM (Barkan et al., 2021, arXiv 2204.11073)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attention import layers, queries, rows, stack, steps
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.sites import readable, self_attention
from xviz_jax.attention.streams import Naming, several
from xviz_jax.attribution import Attribution, Target
from xviz_jax.tracing.program import trace


def grad_sam(
    model: Callable, *, start_layer: int = 0, streams: Naming | None = None
) -> Callable[..., Attribution]:
    """Which positions all queries attend where that speaks for a class.

    Each layer's attention is weighed by the positive part of its gradient and
    averaged over layers, heads and queries. No position is followed through the
    layers, so that none needs to be named: a choice for models without a class
    token. Needs a target. Never negative. Conserves nothing. Costs one forward and
    one backward pass and a pass over each layer's map, which is made tile by tile:
    memory grows with the length and not with its square. Computes in float32.

    With cross-attention, as of an encoder and a decoder, each sequence has scores of
    its own: means over the layers that attend to it, from whichever sequence.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing.
      start_layer: The first layer taken along; earlier ones are left out.
      streams: Names the sequences, if tracing cannot tell them apart: of each
        attention site, by its name, those of its queries and of its keys.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position; for several sequences a dict of these as of `attention_rollout`,
      zero where no layer attends. The mean is over positions that may be attended, so
      that padding changes nothing. No diagnostics.

    Raises:
      ValueError: If the model has no attention, or some that is not understood; if
        its sequences cannot be told apart, with the name of the site; if an option
        does not fit.

    Source: equation 4 of the paper.
    """

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key

        def scalar(logits: jax.Array) -> jax.Array:
            return attribution.explained(attribution.hold(target, logits), logits)

        fusion = Fusion(relevance="relu_gradient_x_attention")
        program = trace(model, args, {})
        found = several(program, readable(program.sites), streams)
        if found is not None:
            sites = readable(program.sites)
            logits, read = layers.capture_of(program, sites, scalar)
            of_layer = lambda layer, share: rows.each([layer], share, fusion)
            given = steps.by_keys(read, found, start_layer, of_layer)
            scores = {
                name: jnp.sum(each, axis=0) / max(len(each), 1)
                for name, each in given.items()
            }
            return Attribution(scores=scores, output=scalar(logits))
        sites = self_attention(program.sites)
        logits, read = layers.capture_of(program, sites, scalar)
        each = rows.each(stack.since(read, start_layer), queries.uniform(read), fusion)
        return Attribution(scores=jnp.mean(each, axis=0), output=scalar(logits))

    return explain
