"""What every attention head of a model does: statistics of its map, never held.

Entropy and distance are of Vig and Belinkov, 2019 (arXiv 1906.04284), the sink at the
first token of Xiao et al., 2023 (arXiv 2309.17453).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attention import layers, masking, operands, rows
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.sites import readable, self_attention
from xviz_jax.attention.stack import Layer
from xviz_jax.attention.streams import Naming, several
from xviz_jax.attribution import Attribution, Target
from xviz_jax.kernels.attention_statistics import attention_statistics as kernel
from xviz_jax.kernels.attention_statistics.statistics import (
    AttentionStatistics,
    summarise,
)
from xviz_jax.tracing import Site
from xviz_jax.tracing.program import trace
from xviz_jax.tracing.site import positions

# Bytes of a map that are looked at together, and stay in a cache between looks.
_STRIP = 2**19


def attention_statistics(
    model: Callable,
    *,
    pad: Callable[..., Any] | None = None,
    top_k: int = 1,
    streams: Naming | None = None,
) -> Callable[..., Attribution]:
    """How much attention each position gets, and what each head of each layer does.

    For audits: which heads are local, diffuse, or look at the first token or at
    padding, over any number of inputs. Class-blind; never negative; scores sum to
    one. Costs one forward pass and a look at each layer's map: where the model makes
    it anyway, of up to 2,048 positions, inside the model, so that statistics alone are
    kept; else it is made again from queries and keys, twice, tile by tile. Memory
    grows with the length, and not with its square, beyond the model's own. Computes
    in float32.

    With cross-attention, as of an encoder and a decoder, layers are listed apart by the
    sequences of their queries and of their keys.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing.
      pad: A function of the model's arguments that says which positions are padding,
        bool `[length]`; they do not count as queries. For several sequences it gives a
        dict of these, of all that have padding.
      top_k: How many of a query's strongest keys are listed; on a CPU each further
        one costs about half of what the first does.
      streams: Names the sequences, if tracing cannot tell them apart: of each
        attention site, by its name, those of its queries and of its keys.

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

      For several sequences scores are a dict of these as of `attention_rollout`, means
      over the layers that attend to each, zero where none does; and diagnostics are
      named `QUERY>KEY/entropy` and so on, by the sequences of queries and keys, without
      `distance` and `self_share` where these are two.

    Raises:
      ValueError: If the model has no attention, or some that is not understood, or
        layers of unlike numbers of heads; if its sequences cannot be told apart, with
        the name of the site; if an option does not fit.
    """

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        program = trace(model, args, {})
        found = several(program, readable(program.sites), streams)
        if found is None:
            sites = self_attention(program.sites)
            lengths = {"": sites[0].shape[-1]}
            padding = {} if pad is None else {"": pad(*args)}
            names = lambda _: ("", "")
        else:
            sites, lengths = readable(program.sites), found.lengths
            padding = {} if pad is None else pad(*args)
            names = lambda site: found.of[site.joins or site.name]
        padding = _padding(padding, lengths)
        of_site = lambda site: _Asked(*names(site), padding, top_k)
        _check(sites, names, top_k)
        of_map = lambda site, values: _of_map(of_site(site), site, values)
        logits, read = layers.capture_of(program, sites, keep=of_map)
        listed: dict[tuple[str, str], list] = {}
        for layer in read:
            asked = of_site(layer.site)
            parts = rows.apart([layer], functools.partial(_of_layer, asked))
            listed.setdefault((asked.query, asked.key), []).extend(parts)
        every = {
            pair: jax.tree.map(lambda *own: jnp.concatenate(own), *parts)
            for pair, parts in listed.items()
        }
        received: dict[str, list[jax.Array]] = {name: [] for name in lengths}
        for (_, key), statistics in every.items():
            received[key].append(statistics.pop("received"))
        scores = {
            name: jnp.mean(jnp.concatenate(own), axis=0)
            if own
            else jnp.zeros(lengths[name], jnp.float32)
            for name, own in received.items()
        }
        title = lambda pair: "" if found is None else "{}>{}/".format(*pair)
        return Attribution(
            scores=scores if found is not None else scores[""],
            output=attribution.explained(attribution.hold(target, logits), logits),
            diagnostics={
                title(pair) + name: array
                for pair, statistics in every.items()
                for name, array in statistics.items()
            },
        )

    return explain


@dataclasses.dataclass(frozen=True, eq=False)
class _Asked:
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
        number = jnp.maximum(jnp.sum(counts, dtype=jnp.float32), 1)
        return counts.astype(jnp.float32) / number


def _padding(given: Any, lengths: Mapping[str, int]) -> dict[str, jax.Array]:
    if not isinstance(given, Mapping) or not set(given) <= set(lengths):
        got = list(given) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(
            f"`pad` gives a dict by the sequences {list(lengths)}, got {got}"
        )
    padding = {name: jnp.asarray(own) for name, own in given.items()}
    for name, own in padding.items():
        if own.shape != (lengths[name],) or own.dtype != bool:
            raise ValueError(
                f"`pad` gives bool[{lengths[name]}], got {own.dtype}{list(own.shape)}"
            )
    return padding


def _check(
    sites: Sequence[Site], names: Callable[[Site], tuple[str, str]], top_k: int
) -> None:
    heads: dict[tuple[str, str], set[int]] = {}
    for site in sites:
        heads.setdefault(names(site), set()).add(site.shape[-3])
    for found in heads.values():
        if len(found) > 1:
            raise ValueError(
                "statistics are listed by layer and head: all layers must have as "
                f"many heads, got {sorted(found)}"
            )
    least = min(site.shape[-1] for site in sites)
    if not 0 <= top_k <= least:
        raise ValueError(f"`top_k` is from 0 to {least} keys, got {top_k}")


def _of_map(
    asked: _Asked, site: Site, values: dict[str, jax.Array]
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


def _of_layer(asked: _Asked, layer: Layer) -> dict[str, jax.Array]:
    values = layer.values
    if "entropy" in values:
        return values
    if "probabilities" in values:
        return _of_map(asked, layer.site, values)
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
    asked: _Asked, found: AttentionStatistics, share: jax.Array, received: jax.Array
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
