"""What the heads of one layer of attention do, from its map, or queries and keys."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from xviz_jax.attention import masking, operands, queries, rows
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.stack import Layer
from xviz_jax.kernels.attention_statistics import attention_statistics as kernel
from xviz_jax.kernels.attention_statistics.statistics import (
    AttentionStatistics,
    summarise,
)
from xviz_jax.tracing import Site
from xviz_jax.tracing.site import positions

# Bytes of a map that are looked at together, and stay in a cache between looks.
_STRIP = 2**19


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of a layer.

    Attributes:
      query: The sequence of its queries.
      key: That of its keys.
      padding: Of sequences, which positions are none, bool `[length]`.
      top_k: How many keys are listed.
    """

    query: str
    key: str
    padding: Mapping[str, jax.Array]
    top_k: int

    @property
    def own(self) -> bool:
        """Whether a sequence attends to itself."""
        return self.query == self.key

    def shares(self, site: Site, values: Mapping[str, jax.Array]) -> jax.Array:
        """Equal weights of the queries that count, float32 `[queries]`."""
        counts = jnp.ones(positions(site)[0], bool)
        if self.own:
            counts = masking.attended_in(site, values)
        if self.query in self.padding:
            counts = counts & ~self.padding[self.query]
        return queries.shares(counts)


def of_map(
    asked: Asked, site: Site, values: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Of a layer whose map is at hand, one strip of queries after another."""
    p = values["probabilities"][0]
    share = asked.shares(site, values)
    padding, top_k = asked.padding.get(asked.key), asked.top_k
    marked = None if padding is None else padding[None, None]
    heads, length, keys = p.shape
    size = min(max(_STRIP // (4 * heads * keys), 16), length)
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
    return _averaged(asked, found, share, received.sum(axis=0) / heads)


def of_layer(asked: Asked, layer: Layer) -> dict[str, jax.Array]:
    """Of a layer as it was read: as statistics, a map, or queries and keys."""
    values = layer.values
    if "entropy" in values:
        return values
    if "probabilities" in values:
        return of_map(asked, layer.site, values)
    share = asked.shares(layer.site, values)
    padding = asked.padding.get(asked.key)
    stacks = operands.stacks_of(layer, Fusion())
    found = kernel(
        **{operands.SINGLE[name]: stack[0] for name, stack in stacks.items()},
        marked_keys=None if padding is None else padding[None],
        # The strongest key is needed to compare heads, whether it is listed or not.
        top_k=max(asked.top_k, 1),
        **operands.scoring(layer),
    )
    found = jax.tree.map(lambda leaf: leaf[0], found)
    received = rows.through(layer, share, Fusion())
    return _averaged(asked, found, share, received)


def _averaged(
    asked: Asked, found: AttentionStatistics, share: jax.Array, received: jax.Array
) -> dict[str, jax.Array]:
    counts = (share > 0)[None]
    mean = lambda rows: jnp.sum(jnp.where(counts, rows, 0) * share[None], axis=-1)
    within = {}
    if asked.own:
        within["distance"] = mean(found.distance)
        within["self_share"] = mean(found.self_mass)
    return {
        "entropy": mean(found.entropy),
        **within,
        "first_share": mean(found.first_mass),
        "pad_leak": mean(found.marked_mass),
        "top_keys": found.top_keys[..., : asked.top_k],
        "top_weights": found.top_weights[..., : asked.top_k],
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
