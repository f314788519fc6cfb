"""`attention_lse` on TPU: the online softmax without its values."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xviz_jax.kernels import mosaic_tpu, tuning
from xviz_jax.kernels.attention_lse import xla
from xviz_jax.kernels.attention_map import AttentionMap
from xviz_jax.kernels.dispatch import differentiated_as


def attention_lse(
    attention: AttentionMap,
    *,
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """logsumexp of the scores over the keys, `[B, H, Nq]`."""
    mosaic_tpu.require_support(attention)
    kernel = functools.partial(call, config=config, interpret=interpret)
    return differentiated_as(xla.attention_lse, kernel)(attention)


def call(
    attention: AttentionMap, *, config: Mapping[str, int] | None, interpret: Any
) -> jax.Array:
    """The kernel itself, which has no derivative."""
    b, h, _, nq, nk = attention.shape
    size = 1024 if min(nq, nk) >= 1024 else 512
    bq, bk = tuning.block_sizes(
        "attention_lse", attention, config, block_q=size, block_k=size
    )
    bq, bk = mosaic_tpu.clip_blocks(attention, bq, bk)
    band = mosaic_tpu.Band.of(attention, bq, bk)
    specs, operands = mosaic_tpu.score_operands(attention, band)
    lse = pl.pallas_call(
        functools.partial(
            _kernel,
            band=band,
            scale=attention.scale,
            softcap=attention.softcap,
            masked=attention.key_mask is not None,
        ),
        grid=(b, h, -(-nq // bq), band.key_steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, None, 1, bq), lambda b, h, i, n: (b, h, 0, i)),
        out_shape=mosaic_tpu.result_like((b, h, 1, nq), *operands),
        scratch_shapes=[pltpu.VMEM((1, bq), jnp.float32) for _ in range(2)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=mosaic_tpu.VMEM_LIMIT_BYTES,
        ),
        cost_estimate=mosaic_tpu.cost(
            attention, attention.q.nbytes + attention.k.nbytes * (-(-nq // bq))
        ),
        interpret=interpret,
        name="attention_lse",
    )(*operands)
    return lse[:, :, 0]


def _kernel(q, k, *refs, band, scale, softcap, masked):
    key_mask = refs[0][...] if masked else None
    lse, top, total = refs[masked:]
    i, step = pl.program_id(2), pl.program_id(3)
    first, last = band.key_blocks(i)
    j = first + step

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)

    @pl.when(j <= last)
    def _():
        s = mosaic_tpu.scores(k[...], q[...], scale, softcap)
        s = jnp.where(band.allowed(i, j, key_mask), s, -jnp.inf)
        before = top[...]
        after = jnp.maximum(before, jnp.max(s, 0, keepdims=True))
        # While a query has met no key its maximum is -inf, and -inf - -inf is NaN.
        shift = jnp.where(after == -jnp.inf, 0.0, after)
        added = jnp.sum(jnp.exp(s - shift), 0, keepdims=True)
        total[...] = total[...] * jnp.exp(before - shift) + added
        top[...] = after

    @pl.when(step == band.key_steps - 1)
    def _():
        lse[...] = top[...] + jnp.log(total[...])
