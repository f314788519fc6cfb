"""What every attention head of a model does: statistics of its map, never held.

Entropy and distance are of Vig and Belinkov, 2019 (arXiv 1906.04284), the sink at the
first token of Xiao et al., 2023 (arXiv 2309.17453).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attention import layers, masking, operands, rows
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.sites import of_one_sequence
from xviz_jax.attention.stack import Layer
from xviz_jax.attribution import Attribution, Target
from xviz_jax.kernels.attention_statistics import attention_statistics as kernel
from xviz_jax.kernels.attention_statistics.statistics import (
    AttentionStatistics,
    summarise,
)
from xviz_jax.tracing import Site
from xviz_jax.tracing.program import trace

# Bytes of a map that are looked at together, and stay in a cache between looks.
_STRIP = 2**19


def attention_statistics(
    model: Callable,
    *,
    pad: Callable[..., jax.Array] | None = None,
    top_k: int = 1,
) -> Callable[..., Attribution]:
    """How much attention each position gets, and what each head of each layer does.

    For audits: which heads are local, diffuse, or look at the first token or at
    padding, over any number of inputs. Class-blind; never negative; scores sum to
    one. Costs one forward pass and a look at each layer's map: where the model makes
    it anyway, of up to 2,048 positions, inside the model, so that statistics alone are
    kept; else it is made again from queries and keys, twice, tile by tile. Memory
    grows with the length, and not with its square, beyond the model's own. Computes
    in float32.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing. Self-attention over one sequence.
      pad: A function of the model's arguments that says which positions are padding,
        bool `[length]`; they do not count as queries.
      top_k: How many of a query's strongest keys are listed; on a CPU each further
        one costs about half of what the first does.

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
        program = trace(model, args, {})
        sites = of_one_sequence(program)
        heads, length = {site.shape[-3] for site in sites}, sites[0].shape[-1]
        if len(heads) > 1:
            raise ValueError(
                "statistics are listed by layer and head: all layers must have as "
                f"many heads, got {sorted(heads)}"
            )
        if not 0 <= top_k <= length:
            raise ValueError(f"`top_k` is from 0 to {length} keys, got {top_k}")
        padding = None if pad is None else _padding(pad, args, length)
        of_map = functools.partial(_of_map, padding, top_k)
        logits, found = layers.capture_of(program, sites, keep=of_map)
        of_layer = functools.partial(_of_layer, padding, top_k)
        parts = rows.apart(found, of_layer)
        every = jax.tree.map(lambda *own: jnp.concatenate(own), *parts)
        return Attribution(
            scores=jnp.mean(every.pop("received"), axis=0),
            output=attribution.explained(attribution.hold(target, logits), logits),
            diagnostics=every,
        )

    return explain


def _padding(pad: Callable[..., jax.Array], args: Any, length: int) -> jax.Array:
    padding = jnp.asarray(pad(*args))
    if padding.shape != (length,) or padding.dtype != bool:
        raise ValueError(
            f"`pad` gives bool[{length}], got {padding.dtype}{list(padding.shape)}"
        )
    return padding


def _shares(queries: jax.Array, padding: jax.Array | None) -> jax.Array:
    """Equal weights of the queries that count, float32 `[length]`."""
    if padding is not None:
        queries = queries & ~padding
    count = jnp.maximum(jnp.sum(queries, dtype=jnp.float32), 1)
    return queries.astype(jnp.float32) / count


def _of_map(
    padding: jax.Array | None, top_k: int, site: Site, values: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Of a layer whose map is at hand, one strip of queries after another."""
    p = values["probabilities"][0]
    share = _shares(masking.attended_in(site, values), padding)
    marked = None if padding is None else padding[None, None]
    heads, _, length = p.shape
    size = min(max(_STRIP // (4 * heads * length), 16), length)
    strips = -(-length // size)
    size = -(-length // strips)
    # Rows of the last strip that are the one before's as well.
    twice = strips * size - length

    def of_strip(number: jax.Array) -> tuple[jax.Array, ...]:
        first = jnp.minimum(number * size, length - size)
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, first, size, axis)
        positions = first + jnp.arange(size, dtype=jnp.int32)
        strip = cut(p, 1).astype(jnp.float32)
        found = summarise(
            strip, jnp.log(strip), positions[None, :, None], marked, max(top_k, 1)
        )
        own = jnp.where(positions >= number * size, cut(share, 0), 0)
        received = jnp.einsum("q,hqk->k", own, strip, precision="highest")
        kept = (found.entropy, found.distance, found.first_mass, found.marked_mass)
        return *kept, found.top_keys, found.top_weights, received

    def join(y: jax.Array) -> jax.Array:
        y = jnp.moveaxis(y, 0, 1)
        y = y.reshape(heads, strips * size, *y.shape[3:])
        cut = lambda begin, end: jax.lax.slice_in_dim(y, begin, end, axis=1)
        last = (strips - 1) * size
        return jnp.concatenate([cut(0, last), cut(last + twice, strips * size)], axis=1)

    *each, received = jax.lax.map(of_strip, jnp.arange(strips, dtype=jnp.int32))
    entropy, distance, first_mass, marked_mass, top_keys, top_weights = map(join, each)
    found = AttentionStatistics(
        entropy=entropy,
        distance=distance,
        self_mass=jnp.diagonal(p, axis1=1, axis2=2).astype(jnp.float32),
        first_mass=first_mass,
        marked_mass=marked_mass,
        maximum=top_weights[..., 0],
        top_keys=top_keys,
        top_weights=top_weights,
    )
    return _averaged(found, share, top_k, received.sum(axis=0) / heads)


def _of_layer(
    padding: jax.Array | None, top_k: int, layer: Layer
) -> dict[str, jax.Array]:
    values = layer.values
    if "entropy" in values:
        return values
    if "probabilities" in values:
        return _of_map(padding, top_k, layer.site, values)
    share = _shares(masking.attended([layer]), padding)
    stacks = operands.stacks_of(layer, Fusion())
    found = kernel(
        **{operands.SINGLE[name]: stack[0] for name, stack in stacks.items()},
        marked_keys=None if padding is None else padding[None],
        # The strongest key is needed to compare heads, whether it is listed or not.
        top_k=max(top_k, 1),
        **operands.scoring(layer),
    )
    found = jax.tree.map(lambda leaf: leaf[0], found)
    received = rows.propagate([layer], share, Fusion(), residual=0.0)
    return _averaged(found, share, top_k, received)


def _averaged(
    found: AttentionStatistics, share: jax.Array, top_k: int, received: jax.Array
) -> dict[str, jax.Array]:
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
        "received": received,
    }


def _agreement(strongest: jax.Array, share: jax.Array) -> jax.Array:
    """The share of pairs of heads with the same strongest key, of `[heads, length]`."""
    heads = len(strongest)
    if heads == 1:
        return jnp.float32(1)
    same = strongest[:, None] == strongest[None]
    alike = jnp.sum(same.astype(jnp.float32), axis=(0, 1)) - heads
    return jnp.sum(alike * share) / (heads * (heads - 1))
