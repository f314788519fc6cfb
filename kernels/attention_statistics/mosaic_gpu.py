# pyright: reportArgumentType=false
"""`attention_statistics` on NVIDIA Hopper: an online softmax with its moments.

The same sums as on TPU, carried in registers, one number a query.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.kernels import mosaic_gpu, mosaic_gpu_walk
from xviz_jax.kernels.attention_map import AttentionMap
from xviz_jax.kernels.attention_statistics import xla
from xviz_jax.kernels.attention_statistics.statistics import AttentionStatistics
from xviz_jax.kernels.dispatch import differentiated_as

# Every key listed is carried in registers, and another walk over the block.
_MAX_TOP_K = 8
_NO_KEY = 2.0**30


def attention_statistics(
    attention: AttentionMap,
    marked: jax.Array | None,
    top_k: int,
    *,
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
) -> AttentionStatistics:
    """Statistics `[B, H, Nq]` of the probabilities of each head."""
    mosaic_gpu.require_support(attention)
    if top_k > _MAX_TOP_K:
        raise NotImplementedError(
            f"mosaic_gpu lists at most top_k={_MAX_TOP_K} keys, got {top_k}"
        )
    kernel = functools.partial(call, top_k=top_k, config=config, interpret=interpret)
    plain = functools.partial(xla.attention_statistics, top_k=top_k)
    return differentiated_as(plain, kernel)(attention, marked)


def call(
    attention: AttentionMap,
    marked: jax.Array | None,
    *,
    top_k: int,
    config: Mapping[str, int] | None,
    interpret: Any,
) -> AttentionStatistics:
    """The kernel itself, which has no derivative."""
    scale = attention.scale * mosaic_gpu.LOG2_E

    def step(tile, carry):
        before, total, spread, *sums = carry[:7]
        s = tile.keep_seen(tile.products[0] * scale, -jnp.inf)
        after = jnp.maximum(before, jnp.max(s, axis=1))
        # While a query has met no key its maximum is -inf, and -inf - -inf is NaN.
        shift = jnp.where(after == -jnp.inf, 0.0, after)
        fall = jnp.where(before == -jnp.inf, 0.0, before - shift)
        below = tile.keep_seen(s - tile.along_rows(shift), 0.0)
        e = tile.keep_seen(jnp.exp2(below), 0.0)
        distance = jnp.abs(tile.query - tile.key).astype(jnp.float32)
        rows = [
            e * distance,
            jnp.where(distance == 0.0, e, 0.0),
            jnp.where(tile.key == 0, e, 0.0),
        ]
        if marked is not None:
            rows.append(e * tile.along_columns(tile.per_key[0][0]))
        kept = jnp.exp2(fall)
        gained = [jnp.sum(x, axis=1) for x in (e, e * below, *rows)]
        gained += [0.0] * (4 - len(rows))
        old = (total, spread + fall * total, *sums)
        carried = [x * kept + gain for x, gain in zip(old, gained, strict=True)]
        return after, *carried, *_compete(tile, s, carry[7:], top_k)

    def finish(_, carry):
        top, total, spread, *sums = carry[:7]
        # A query that attends nothing has no statistics but zeros.
        some = total != 0.0
        safe = jnp.where(some, total, 1.0)
        inverse = jnp.where(some, 1.0 / safe, 0.0)
        entropy = jnp.log(safe) - spread * inverse * math.log(2.0)
        shift = jnp.where(top == -jnp.inf, 0.0, top)
        weights = [jnp.exp2(s - shift) * inverse for s in carry[7 : 7 + top_k]]
        return [
            entropy,
            *(x * inverse for x in sums),
            inverse,
            *weights,
            *carry[7 + top_k :],
        ]

    found = mosaic_gpu_walk.walk_keys(
        "attention_statistics",
        attention,
        config,
        vectors=top_k,
        per_key=[] if marked is None else [marked.astype(jnp.float32)[:, None]],
        start=(-jnp.inf,) + (0.0,) * 6 + (-jnp.inf,) * top_k + (_NO_KEY,) * top_k,
        step=step,
        finish=finish,
        outputs=6 + 2 * top_k,
        interpret=interpret,
        # Wider blocks are 2% faster, until a mask makes their registers spill.
        candidates=(),
    )
    one = [found[:, :, n] for n in range(6)]
    weights, keys = (
        jnp.moveaxis(found[:, :, n : n + top_k], 2, 3) for n in (6, 6 + top_k)
    )
    return AttentionStatistics(
        *one,
        top_keys=jnp.where(weights > 0.0, keys, -1.0).astype(jnp.int32),
        top_weights=weights,
    )


def _compete(tile, s, champions, top_k):
    """The `top_k` highest of the best so far and of a block, the first among equals."""
    scores, keys = list(champions[:top_k]), list(champions[top_k:])
    own_keys = tile.key.astype(jnp.float32)
    best, best_keys = [], []
    for _ in range(top_k):
        highest = functools.reduce(jnp.maximum, scores, jnp.max(s, axis=1))
        won = jnp.where(s == tile.along_rows(highest), own_keys, _NO_KEY)
        winner = jnp.min(won, axis=1)
        for score, key in zip(scores, keys, strict=True):
            winner = jnp.minimum(winner, jnp.where(score == highest, key, _NO_KEY))
        best.append(highest)
        best_keys.append(winner)
        s = jnp.where(own_keys == tile.along_rows(winner), -jnp.inf, s)
        scores = [
            jnp.where(key == winner, -jnp.inf, score)
            for score, key in zip(scores, keys, strict=True)
        ]
    return *best, *best_keys
