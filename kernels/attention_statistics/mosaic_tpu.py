"""`attention_statistics` on TPU: an online softmax that carries its moments along.

What is summed over keys is summed of exp(score - top), where `top` is the largest
score so far, and rescaled when that rises; the entropy from (score - top) too, which
loses nothing where a row is sharp. A block of scores is walked eight keys at a time,
so that all sums stay in registers: each of the eight sublanes has its own, and its own
list of strongest keys, until the last step brings them together.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xviz_jax.kernels import mosaic_tpu, tuning
from xviz_jax.kernels.attention_map import AttentionMap
from xviz_jax.kernels.attention_statistics import xla
from xviz_jax.kernels.attention_statistics.statistics import AttentionStatistics
from xviz_jax.kernels.dispatch import differentiated_as

# Every key listed is carried along, and compared with each score.
_MAX_TOP_K = 32
_NO_KEY = 2**30
_SUMS, _EIGHT = 6, mosaic_tpu.SUBLANES


def attention_statistics(
    attention: AttentionMap,
    marked: jax.Array | None,
    top_k: int,
    *,
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
) -> AttentionStatistics:
    """Statistics `[B, H, Nq]` of the probabilities of each head."""
    mosaic_tpu.require_support(attention)
    if top_k > _MAX_TOP_K:
        raise NotImplementedError(
            f"mosaic_tpu lists at most top_k={_MAX_TOP_K} keys, got {top_k}"
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
    b, h, _, nq, _ = attention.shape
    bq, bk = tuning.block_sizes(
        "attention_statistics",
        attention,
        config,
        vectors=top_k,
        block_q=512,
        block_k=512,
    )
    bq, bk = mosaic_tpu.clip_blocks(attention, bq, bk)
    band = mosaic_tpu.Band.of(attention, bq, bk)
    specs, operands = mosaic_tpu.score_operands(attention, band, marked)
    listed = mosaic_tpu.round_up(max(top_k, 1), mosaic_tpu.SUBLANES)
    rows = (mosaic_tpu.SUBLANES, listed, listed)
    outputs = [mosaic_tpu.result_like((b, h, n, nq), *operands) for n in rows]
    outputs[2] = outputs[2].update(dtype=jnp.int32)
    sums, weights, keys = pl.pallas_call(
        functools.partial(
            _kernel,
            band=band,
            scale=attention.scale,
            softcap=attention.softcap,
            masked=attention.key_mask is not None,
            marked=marked is not None,
            top_k=top_k,
        ),
        grid=(b, h, -(-nq // bq), band.key_steps),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((None, None, n, bq), lambda b, h, i, n: (b, h, 0, i))
            for n in rows
        ],
        out_shape=outputs,
        scratch_shapes=[
            pltpu.VMEM((bk, bq), jnp.float32),
            pltpu.VMEM((1, bq), jnp.float32),
            pltpu.VMEM((_SUMS, _EIGHT, bq), jnp.float32),
            pltpu.VMEM((max(top_k, 1), _EIGHT, bq), jnp.float32),
            pltpu.VMEM((max(top_k, 1), _EIGHT, bq), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=mosaic_tpu.VMEM_LIMIT_BYTES,
        ),
        cost_estimate=mosaic_tpu.cost(
            attention, attention.q.nbytes + attention.k.nbytes * (-(-nq // bq))
        ),
        interpret=interpret,
        name="attention_statistics",
    )(*operands)
    entropy, distance, self_mass, first_mass, marked_mass, maximum = (
        sums[:, :, n] for n in range(6)
    )
    return AttentionStatistics(
        entropy=entropy,
        distance=distance,
        self_mass=self_mass,
        first_mass=first_mass,
        marked_mass=marked_mass,
        maximum=maximum,
        top_keys=jnp.moveaxis(keys[:, :, :top_k], 2, 3),
        top_weights=jnp.moveaxis(weights[:, :, :top_k], 2, 3),
    )


def _kernel(q, k, *refs, band, scale, softcap, masked, marked, top_k):
    flags, refs = refs[: masked + marked], refs[masked + marked :]
    sums_out, weights_out, keys_out, scores, top, sums, best, best_keys = refs
    i, step = pl.program_id(2), pl.program_id(3)
    first, last = band.key_blocks(i)
    j = first + step

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, -jnp.inf)
        sums[...] = jnp.zeros_like(sums)
        best[...] = jnp.full_like(best, -jnp.inf)
        best_keys[...] = jnp.full_like(best_keys, _NO_KEY)

    @pl.when(j <= last)
    def _():
        s = mosaic_tpu.scores(k[...], q[...], scale, softcap)
        allowed = band.allowed(i, j, flags[0][...] if masked else None)
        s = jnp.where(allowed, s, -jnp.inf)
        scores[...] = s
        before = top[...]
        after = jnp.maximum(before, jnp.max(s, 0, keepdims=True))
        top[...] = after
        # While a query has met no key its maximum is -inf, and -inf - -inf is NaN.
        shift = jnp.where(after == -jnp.inf, 0.0, after)
        fall = jnp.where(before == -jnp.inf, 0.0, before - shift)
        kept = jnp.exp(fall)
        total, spread, *others = (sums[n] for n in range(_SUMS))
        old = (total, spread + fall * total, *others)
        marks = flags[-1] if marked else None
        found = _walk(
            scores,
            marks,
            shift,
            [x * kept for x in old],
            [best[n] for n in range(top_k)],
            [best_keys[n] for n in range(top_k)],
            first_query=i * band.bq + band.offset,
            first_key=j * band.bk,
        )
        for target, values in zip((sums, best, best_keys), found, strict=True):
            for n, value in enumerate(values):
                target[n] = value

    @pl.when(step == band.key_steps - 1)
    def _():
        together = lambda n: jnp.sum(sums[n], 0, keepdims=True)
        total, spread = together(0), together(1)
        # A query that attends nothing has no statistics but zeros.
        some = total != 0.0
        safe = jnp.where(some, total, 1.0)
        inverse = jnp.where(some, 1.0 / safe, 0.0)
        sums_out[...] = jnp.zeros_like(sums_out)
        sums_out[0:1] = jnp.log(safe) - spread * inverse
        for n in range(2, _SUMS):
            sums_out[n - 1 : n] = together(n) * inverse
        sums_out[_SUMS - 1 : _SUMS] = inverse
        weights_out[...] = jnp.zeros_like(weights_out)
        keys_out[...] = jnp.full_like(keys_out, -1)
        shift = jnp.where(top[...] == -jnp.inf, 0.0, top[...])
        candidates = [x[...].reshape(-1, band.bq) for x in (best, best_keys)]
        for n, (score, key) in enumerate(_strongest(*candidates, top_k)):
            weight = jnp.exp(score - shift) * inverse
            weights_out[n : n + 1] = weight
            keys_out[n : n + 1] = jnp.where(weight > 0.0, key, -1)


def _walk(scores, marks, shift, sums, best, best_keys, *, first_query, first_key):
    """Adds the block `scores` to what is carried, eight keys at a time."""
    shape = (_EIGHT, scores.shape[1])
    sublane = lax.broadcasted_iota(jnp.int32, shape, 0)
    query = lax.broadcasted_iota(jnp.int32, shape, 1) + first_query

    def step(n, carry):
        sums, best, best_keys = (list(part) for part in carry)
        rows = pl.ds(pl.multiple_of(n * _EIGHT, _EIGHT), _EIGHT)
        s = scores[rows]
        key = sublane + (first_key + n * _EIGHT)
        below = s - shift
        e = jnp.exp(below)
        distance = jnp.abs(query - key)
        gained = [
            e,
            e * jnp.where(e > 0.0, below, 0.0),
            e * distance.astype(jnp.float32),
            jnp.where(distance == 0, e, 0.0),
            jnp.where(key == 0, e, 0.0),
        ]
        if marks is not None:
            # Beyond the last key lies what is no number.
            gained.append(jnp.where(e == 0.0, 0.0, e * marks[rows]))
        for n, gain in enumerate(gained):
            sums[n] = sums[n] + gain
        for n in range(len(best)):
            # What a better score displaces goes on down the list.
            better = s > best[n]
            best[n], s = jnp.where(better, s, best[n]), jnp.where(better, best[n], s)
            best_keys[n], key = (
                jnp.where(better, key, best_keys[n]),
                jnp.where(better, best_keys[n], key),
            )
        return sums, best, best_keys

    steps = scores.shape[0] // _EIGHT
    return lax.fori_loop(0, steps, step, (sums, best, best_keys))


def _strongest(scores, keys, top_k):
    """The highest of a few candidates, the lower key first among equals."""
    found = []
    for _ in range(top_k):
        highest = jnp.max(scores, 0, keepdims=True)
        contenders = jnp.where(scores == highest, keys, _NO_KEY)
        winner = jnp.min(contenders, 0, keepdims=True)
        found.append((highest, winner))
        scores = jnp.where(keys == winner, -jnp.inf, scores)
    return found
