"""What every attention head of a model does: statistics of its map, never held.

Entropy and distance are of Vig and Belinkov, 2019 (arXiv 1906.04284), the sink at the
first token of Xiao et al., 2023 (arXiv 2309.17453).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attention import layers, rows
from xviz_jax.attention.layers import Layer
from xviz_jax.attribution import Attribution, Target
from xviz_jax.kernels.attention_statistics import attention_statistics as kernel
from xviz_jax.kernels.attention_statistics.statistics import summarise


def attention_statistics(
    model: Callable,
    *,
    pad: Callable[..., jax.Array] | None = None,
    top_k: int = 4,
) -> Callable[..., Attribution]:
    """How much attention each position gets, and what each head of each layer does.

    For audits: which heads are local, diffuse, or look at the first token or at
    padding, over any number of inputs. Class-blind; never negative; scores sum to
    one. Costs one forward pass and two passes over each layer's map, which is made
    tile by tile: memory grows with the length and not with its square. Computes in
    float32.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing. Self-attention over one sequence.
      pad: A function of the model's arguments that says which positions are padding,
        bool `[length]`; they do not count as queries.
      top_k: How many of a query's strongest keys are listed.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, whose scores are the
      attention that each position gets, averaged over layers, heads and queries, and
      whose diagnostics are, for each layer and head, averaged over queries,

      - `entropy`: in nats, log of the number of keys where all are seen alike;
      - `distance`: between query and key, in positions;
      - `self_share`, `first_share`, `pad_leak`: what queries give to themselves, to
        the first position, and to padding;
      - `top_keys`, `top_weights`: the strongest keys of each query, `[depth, heads,
        length, top_k]`, with -1 where fewer have any weight;

      and for each layer `head_agreement`: the share of pairs of heads whose strongest
      key is the same, 1 for a single head.

    Raises:
      ValueError: If the model has no self-attention over one sequence, attention
        that is not understood, or layers of unlike numbers of heads; if an option
        does not fit.
    """

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        logits, found = layers.capture(model, args)
        heads = {layer.site.shape[-3] for layer in found}
        if len(heads) > 1:
            raise ValueError(
                "statistics are listed by layer and head: all layers must have as "
                f"many heads, got {sorted(heads)}"
            )
        length = found[0].site.shape[-1]
        if not 0 <= top_k <= length:
            raise ValueError(f"`top_k` is from 0 to {length} keys, got {top_k}")
        queries, padding = layers.attended(found), None
        if pad is not None:
            padding = jnp.asarray(pad(*args))
            if padding.shape != (length,) or padding.dtype != bool:
                raise ValueError(
                    f"`pad` gives bool[{length}], got {padding.dtype}"
                    f"{list(padding.shape)}"
                )
            queries &= ~padding
        count = jnp.maximum(jnp.sum(queries, dtype=jnp.float32), 1)
        share = queries.astype(jnp.float32) / count
        parts = rows.apart(found, lambda one: _of_layer(one, share, padding, top_k))
        return Attribution(
            scores=jnp.mean(rows.each(found, share, rows.Fusion()), axis=0),
            output=attribution.explained(attribution.hold(target, logits), logits),
            diagnostics=jax.tree.map(lambda *own: jnp.concatenate(own), *parts),
        )

    return explain


def _of_layer(
    layer: Layer, share: jax.Array, padding: jax.Array | None, top_k: int
) -> dict[str, jax.Array]:
    # The strongest key is needed to compare heads, whether it is listed or not.
    listed = max(top_k, 1)
    if "probabilities" in layer.values:
        p = layer.values["probabilities"][0].astype(jnp.float32)
        positions = jnp.arange(p.shape[-1])[None, :, None]
        if padding is not None:
            padding = padding[None, None]
        found = summarise(p, jnp.log(p), positions, padding, listed)
    else:
        stacks = rows.stacks_of(layer, rows.Fusion())
        found = kernel(
            **{rows.SINGLE[name]: stack[0] for name, stack in stacks.items()},
            marked_keys=None if padding is None else padding[None],
            top_k=listed,
            **rows.scoring(layer),
        )
        found = jax.tree.map(lambda leaf: leaf[0], found)
    counts = (share > 0)[None]
    mean = lambda rows: jnp.sum(jnp.where(counts, rows, 0) * share[None], axis=-1)
    return {
        "entropy": mean(found.entropy),
        "distance": mean(found.distance),
        "self_share": mean(found.self_mass),
        "first_share": mean(found.first_mass),
        "pad_leak": mean(found.marked_mass),
        "top_keys": found.top_keys[..., :top_k],
        "top_weights": found.top_weights[..., :top_k],
        "head_agreement": _agreement(found.top_keys[..., 0], share),
    }


def _agreement(strongest: jax.Array, share: jax.Array) -> jax.Array:
    """The share of pairs of heads with the same strongest key, of `[heads, length]`."""
    heads = len(strongest)
    if heads == 1:
        return jnp.float32(1)
    same = strongest[:, None] == strongest[None]
    alike = jnp.sum(same.astype(jnp.float32), axis=(0, 1)) - heads
    return jnp.sum(alike * share) / (heads * (heads - 1))
