"""AttCAT, attentive class activation tokens (Qiang et al., NeurIPS 2022)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attention import queries, residual, rows, stack, steps
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.sites import readable, self_attention
from xviz_jax.attention.streams import Naming, Streams, several
from xviz_jax.attribution import Attribution, Target
from xviz_jax.tracing.program import Program, trace


def attcat(
    model: Callable,
    *,
    start_layer: int = 0,
    last: Mapping[str, str] | None = None,
    streams: Naming | None = None,
) -> Callable[..., Attribution]:
    """Input times gradient of every layer's tokens, weighed by who attends to them.

    What a token holds for or against a class, in each layer, times the attention it
    gets there on average over heads and queries; summed over layers. Needs a target.
    Signed, unlike what is made of attention alone. Conserves nothing. Costs one
    forward and one backward pass and a pass over each layer's map, which is made tile
    by tile, and holds every layer's stream and its gradient: memory grows with the
    length and not with its square. Computes in float32.

    With cross-attention, as of an encoder and a decoder, the tokens that a layer
    attends to are those of its keys' sequence at that time: of an encoder's, what
    leaves its last layer.

    Args:
      model: Maps one example to logits; any JAX function, with its attention and
        residual streams found by tracing.
      start_layer: The first layer taken along; earlier ones are left out.
      last: For several sequences, the names that `jax.ad_checkpoint.checkpoint_name`
        gave to what their last layers return, of those where tracing does not find it.
      streams: Names the sequences, if tracing cannot tell them apart: of each
        attention site, by its name, those of its queries and of its keys.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position; for several sequences a dict of these as of `attention_rollout`.
      The mean is over positions that may be attended, so that padding changes nothing.
      No diagnostics.

    Raises:
      ValueError: If the model has no attention, some that is not understood, or a
        layer without a residual stream; if its sequences, or their ends, cannot be
        told, with the name of the site; or an option does not fit.

    Source: equations 7 to 9 of the paper; tokens are those that enter a layer.
    """

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key

        def scalar(logits: jax.Array) -> jax.Array:
            return attribution.explained(attribution.hold(target, logits), logits)

        program = trace(model, args, {})
        found = several(program, readable(program.sites), streams)
        if found is not None:
            found.check(last or {}, "last")
            logits, scores = _of_several(
                program, found, scalar, start_layer, last or {}
            )
            return Attribution(scores=scores, output=scalar(logits))
        if last:
            raise ValueError(f"`last` is of several sequences, got {last!r} for one")
        sites = self_attention(program.sites)
        logits, read, _ = residual.capture_tokens(program, {"": sites}, scalar, {})
        kept = stack.since(read, start_layer)
        attention = rows.each(kept, queries.uniform(read), Fusion())
        impacts = [_impact(layer.values).reshape(layer.length, -1) for layer in kept]
        scores = jnp.sum(attention * jnp.concatenate(impacts), axis=0)
        return Attribution(scores=scores, output=scalar(logits))

    return explain


def _impact(tokens: Mapping[str, jax.Array]) -> jax.Array:
    """What each token holds for or against the class, float32."""
    stream, slope = tokens["stream"], tokens["stream_cotangent"]
    return jnp.sum(stream.astype(jnp.float32) * slope.astype(jnp.float32), axis=-1)


def _of_several(
    program: Program,
    streams: Streams,
    scalar: Callable[[jax.Array], jax.Array],
    start_layer: int,
    last: Mapping[str, str],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    sites = readable(program.sites)
    steps.check_order(sites)
    sequences = streams.by_queries(sites)
    logits, read, ends = residual.capture_tokens(
        program, sequences, scalar, last, streams.keys
    )
    every = steps.in_turn(read, streams, 0)
    stack.check_start(len(every), start_layer)
    scores = {
        name: jnp.zeros(length, jnp.float32) for name, length in streams.lengths.items()
    }
    for step in every[start_layer:]:
        writers = [other for other in every if other.query == step.key]
        tokens = ends.get(step.key, {})
        if step.other < len(writers):
            tokens = writers[step.other].layer.values
        if not tokens:
            raise ValueError(
                f"the tokens of {step.key!r} that {step.layer.site.name!r} attends to "
                "were not found; name what its last layer returns in `last`"
            )
        impact, length = _impact(tokens), streams.lengths[step.key]
        if impact.shape != (length,):
            raise ValueError(
                f"the tokens of {step.key!r} are {length}, got {list(impact.shape)} in "
                "what its last layer returns"
            )
        share = steps.uniform(read, streams, step.query)
        attention = rows.through(step.layer, share, Fusion())
        scores[step.key] = scores[step.key] + attention * impact
    return logits, scores
