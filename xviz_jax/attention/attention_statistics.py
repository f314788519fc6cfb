"""What every attention head of a model does: statistics of its map, never held.

Entropy and distance are of Vig and Belinkov, 2019 (arXiv 1906.04284), the sink at the
first token of Xiao et al., 2023 (arXiv 2309.17453).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attention import layers, rows
from xviz_jax.attention.head_statistics import Asked, of_layer, of_map
from xviz_jax.attention.sites import readable, self_attention
from xviz_jax.attention.streams import Naming, several
from xviz_jax.attribution import Attribution, Target
from xviz_jax.tracing import Site
from xviz_jax.tracing.program import trace


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
        dict of these, of all that have padding: a mask tells it of queries only where
        a sequence attends to itself.
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
        of_site = lambda site: Asked(*names(site), padding, top_k)
        _check(sites, names, top_k)
        keep = lambda site, values: of_map(of_site(site), site, values)
        logits, read = layers.capture_of(program, sites, keep=keep)
        listed: dict[tuple[str, str], list] = {}
        for layer in read:
            asked = of_site(layer.site)
            parts = rows.apart([layer], functools.partial(of_layer, asked))
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
