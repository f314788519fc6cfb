"""LeGrad (Bousselham et al., 2024, arXiv 2404.03214)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attention import masking, queries, residual, rows, stack, steps
from xviz_jax.attention.fusion import gradient_row
from xviz_jax.attention.sites import readable, self_attention
from xviz_jax.attention.stack import Layer
from xviz_jax.attention.streams import Naming, several
from xviz_jax.attribution import Attribution, Target
from xviz_jax.tracing.program import trace

# Queries whose gradients are made at once.
_TILE = 128


def legrad(
    model: Callable,
    *,
    start_layer: int = 0,
    last: str | Mapping[str, str] | None = None,
    streams: Naming | None = None,
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

    With cross-attention, as of an encoder and a decoder, a layer is asked what the
    model would say if it were the last of the sequence it writes to, and each sequence
    gets what is said of it as keys. That costs passes for each sequence.

    Args:
      model: Maps one example to logits; any JAX function, with its attention and
        residual streams found by tracing.
      start_layer: The first layer taken along; earlier ones are left out. The
        paper's own code takes the last few.
      last: The name, given by `jax.ad_checkpoint.checkpoint_name`, of what the last
        layer returns. None to find it by tracing: what a loop over layers ends with,
        or where layers that are written out stop repeating. For several sequences a
        dict of such names, of those where it is not found.
      streams: Names the sequences, if tracing cannot tell them apart: of each
        attention site, by its name, those of its queries and of its keys.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position, a class token's included, and not rescaled; for several sequences
      a dict of these as of `attention_rollout`. The mean is over positions that may be
      attended, so that padding changes nothing. No diagnostics.

    Raises:
      ValueError: If the model has no attention, some that is not understood, or a
        layer without a residual stream; if what leaves the last layer is not found, or
        a layer sees earlier ones around the stream; if its sequences cannot be told
        apart, with the name of the site; or an option does not fit.

    Source: section 3 of the paper, before its rescaling.
    """

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key

        def scalar(own: jax.Array, logits: jax.Array) -> jax.Array:
            return attribution.explained(attribution.hold(target, logits), own)

        program = trace(model, args, {})
        found = several(program, readable(program.sites), streams)
        if found is None:
            if isinstance(last, Mapping):
                raise ValueError(f"`last` of one sequence is one name, got {last!r}")
            sequences = {"": self_attention(program.sites)}
            named = {} if last is None else {"": last}
        else:
            if isinstance(last, str):
                raise ValueError(
                    f"`last` is a dict by the sequences {list(found.lengths)}, got "
                    f"{last!r}"
                )
            sequences = found.by_queries(readable(program.sites))
            named = last or {}
            found.check(named, "last", sequences)
        keys = None if found is None else found.keys
        logits, read = residual.capture_own(program, sequences, scalar, named, keys)
        if found is None:
            share = queries.uniform(read)
            each = _gradients(stack.since(read, start_layer), share)
            scores = jnp.sum(each, axis=0)
        else:
            one = lambda layer, share: _gradients([layer], share)
            given = steps.by_keys(read, found, start_layer, one)
            scores = {name: jnp.sum(each, axis=0) for name, each in given.items()}
        return Attribution(scores=scores, output=scalar(logits, logits))

    return explain


def _gradients(found: Sequence[Layer], share: jax.Array) -> jax.Array:
    """Of each layer by itself, `[layers, keys]`."""
    return jnp.concatenate(rows.apart(found, lambda layer: _of_layer(layer, share)))


def _of_layer(layer: Layer, share: jax.Array) -> jax.Array:
    """The mean over heads and queries of what of the gradient is positive."""

    def of_query(position: jax.Array) -> jax.Array:
        slope = gradient_row(layer.values, position)
        counted = jnp.where(masking.seen(layer, position), jax.nn.relu(slope), 0)
        return jnp.mean(counted, axis=0)

    return chunks.total(of_query, jnp.arange(len(share)), _TILE, share)
