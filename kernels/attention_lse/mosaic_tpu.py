"""`attention_lse` on TPU: the online softmax without its values."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xviz_jax.kernels import mosaic_tpu
from xviz_jax.kernels.attention_lse import xla
from xviz_jax.kernels.attention_map import AttentionMap
from xviz_jax.kernels.dispatch import block_sizes, differentiated_as


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
    b, h, kv_heads, nq, nk = attention.shape
    size = 1024 if min(nq, nk) >= 1024 else 512
    bq, bk = block_sizes(
        config,
        block_q=min(size, mosaic_tpu.round_up(nq, 128)),
        block_k=min(size, mosaic_tpu.round_up(nk, 128)),
    )
    band = mosaic_tpu.Band.of(attention, bq, bk)
    dim, group = attention.q.shape[3], h // kv_heads

    def key_block(i, step):
        first, last = band.key_blocks(i)
        # Steps beyond the band repeat a block, and a repeated block is not copied.
        return jnp.clip(first + step, 0, jnp.maximum(last, 0))

    in_specs = [
        pl.BlockSpec((None, None, bq, dim), lambda b, h, i, n: (b, h, i, 0)),
        pl.BlockSpec(
            (None, None, bk, dim),
            lambda b, h, i, n: (b, lax.div(h, group), key_block(i, n), 0),
        ),
    ]
    operands = [
        mosaic_tpu.heads_first(attention.q),
        mosaic_tpu.heads_first(attention.k),
    ]
    if attention.key_mask is not None:
        in_specs.append(
            pl.BlockSpec((None, bk, 1), lambda b, h, i, n: (b, key_block(i, n), 0))
        )
        operands.append(attention.key_mask.astype(jnp.float32)[..., None])
    lse = pl.pallas_call(
        functools.partial(
            _kernel,
            band=band,
            scale=attention.scale,
            softcap=attention.softcap,
            masked=attention.key_mask is not None,
        ),
        grid=(b, h, -(-nq // bq), band.key_steps),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((None, None, 1, bq), lambda b, h, i, n: (b, h, 0, i)),
        out_shape=mosaic_tpu.result_like((b, h, 1, nq), *operands),
        scratch_shapes=[pltpu.VMEM((1, bq), jnp.float32) for _ in range(2)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=mosaic_tpu.VMEM_LIMIT_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * h * nq * nk * dim,
            transcendentals=b * h * nq * nk,
            bytes_accessed=attention.q.nbytes + attention.k.nbytes * (-(-nq // bq)),
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
