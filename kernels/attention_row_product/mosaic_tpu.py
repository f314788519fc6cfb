"""`attention_row_product` on TPU.

A block of keys stays while queries and heads pass by, so that its columns of the
result are summed in place. In a linear fusion a few vectors are multiplied on the
vector unit in float32; more go through the matrix unit as sums of bfloat16 parts. For
a maximum or minimum the heads are innermost and their fused tile stays in memory.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xviz_jax.kernels import mosaic_tpu
from xviz_jax.kernels.attention_lse import mosaic_tpu as lse_kernel
from xviz_jax.kernels.attention_map import AttentionMap
from xviz_jax.kernels.attention_row_product import xla
from xviz_jax.kernels.dispatch import block_sizes, differentiated_as

_LANES, _SUBLANES = 128, 8
# Up to here float32 on the vector unit beats three bfloat16 matrix products.
_MAX_VECTORS_ON_VPU = 2
# The accumulators of more would not fit beside the tiles.
_MAX_VECTORS = 512


def attention_row_product(
    r: jax.Array,
    attention: AttentionMap,
    *,
    precision: Literal["default", "fast"] = "default",
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`[B, M, Nq]` times F `[B, Nq, Nk]`."""
    mosaic_tpu.require_support(attention)
    if r.shape[1] > _MAX_VECTORS:
        raise NotImplementedError(
            f"mosaic_tpu multiplies at most {_MAX_VECTORS} vectors r, got "
            f"{r.shape[1]}; form the matrix with attention_fused_matrix"
        )
    kernel = functools.partial(
        call, precision=precision, config=config, interpret=interpret
    )
    plain = functools.partial(xla.attention_row_product, precision=precision)
    return differentiated_as(plain, kernel)(r, attention)


def call(
    r: jax.Array,
    attention: AttentionMap,
    *,
    precision: Literal["default", "fast"],
    config: Mapping[str, int] | None,
    interpret: Any,
) -> jax.Array:
    """The kernel itself, which has no derivative."""
    b, h, kv_heads, nq, nk = attention.shape
    m, dim, group = r.shape[1], attention.q.shape[3], h // kv_heads
    linear = attention.fuses_linearly
    on_vpu = linear and m <= _MAX_VECTORS_ON_VPU
    with_gradient = attention.relevance != "attention"
    bq, bk = _block_sizes(attention, m, config)
    band = mosaic_tpu.Band.of(attention, bq, bk)
    lse = attention.lse
    if lse is None:
        lse = lse_kernel.call(attention, config=None, interpret=interpret)

    order = (
        (lambda f: lambda b, j, h, n: f(b, j, h, n))
        if linear
        else (lambda f: lambda b, j, n, h: f(b, j, h, n))
    )

    def query_block(j, step):
        first, last = band.query_blocks(j)
        # Steps beyond the band repeat a block, and a repeated block is not copied.
        return jnp.clip(first + step, 0, jnp.clip(last, 0, -(-nq // bq) - 1))

    padded = mosaic_tpu.round_up(m, _SUBLANES)
    per_query = lambda size: pl.BlockSpec(
        (None, None, bq, size), order(lambda b, j, h, n: (b, h, query_block(j, n), 0))
    )
    per_key = lambda size: pl.BlockSpec(
        (None, None, bk, size), order(lambda b, j, h, n: (b, lax.div(h, group), j, 0))
    )
    in_specs = [
        pl.BlockSpec(
            (None, None, 1, 1),
            order(lambda b, j, h, n: (b, h, 0, 0)),
            memory_space=pltpu.SMEM,
        ),
        pl.BlockSpec(
            (None, padded, bq), order(lambda b, j, h, n: (b, 0, query_block(j, n)))
        ),
        pl.BlockSpec(
            (None, None, 1, bq), order(lambda b, j, h, n: (b, h, 0, query_block(j, n)))
        ),
        per_query(dim),
        per_key(dim),
    ]
    weights = jnp.broadcast_to(attention.fusion_weights(), (b, h))
    operands = [
        weights[..., None, None],
        jnp.pad(r, ((0, 0), (0, padded - m), (0, 0))),
        jnp.where(lse == -jnp.inf, 0.0, lse)[:, :, None],
        mosaic_tpu.heads_first(attention.q),
        mosaic_tpu.heads_first(attention.k),
    ]
    if attention.v is not None and attention.dout is not None:
        in_specs += [per_query(attention.dout.shape[3]), per_key(attention.v.shape[3])]
        operands += [
            mosaic_tpu.heads_first(attention.dout),
            mosaic_tpu.heads_first(attention.v),
        ]
    if attention.key_mask is not None:
        in_specs.append(
            pl.BlockSpec((None, bk, 1), order(lambda b, j, h, n: (b, j, 0)))
        )
        operands.append(attention.key_mask.astype(jnp.float32)[..., None])
    scratch = [pltpu.VMEM((m, bk, _LANES), jnp.float32)] if on_vpu else []
    if not linear:
        scratch = [pltpu.VMEM((bk, bq), jnp.float32)]

    steps = (h, band.query_steps) if linear else (band.query_steps, h)
    out = pl.pallas_call(
        functools.partial(
            _kernel,
            attention=_Static(attention),
            band=band,
            vectors=m,
            on_vpu=on_vpu,
            fast=precision == "fast",
        ),
        grid=(b, -(-nk // bk), *steps),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((None, padded, bk), order(lambda b, j, h, n: (b, 0, j))),
        out_shape=mosaic_tpu.result_like((b, padded, nk), *operands),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=mosaic_tpu.VMEM_LIMIT_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * (1 + with_gradient) * b * h * nq * nk * dim,
            transcendentals=b * h * nq * nk,
            bytes_accessed=attention.k.nbytes + attention.q.nbytes * (-(-nk // bk)),
        ),
        interpret=interpret,
        name=f"attention_row_product_{attention.relevance}_{attention.head_fusion}",
    )(*operands)
    return out[:, :m]


class _Static:
    """What the kernel needs of an `AttentionMap` that is no array."""

    def __init__(self, attention: AttentionMap):
        self.scale, self.softcap = attention.scale, attention.softcap
        self.relevance, self.head_fusion = attention.relevance, attention.head_fusion
        self.heads = attention.q.shape[2]
        self.masked = attention.key_mask is not None


def _block_sizes(attention, vectors, config):
    _, _, _, nq, nk = attention.shape
    if not attention.fuses_linearly:
        bq, bk = 512, 512
    elif attention.relevance != "attention" or vectors > _MAX_VECTORS_ON_VPU:
        bq, bk = 256, 1024
    else:
        bq, bk = 1024, 1024
    bq, bk = block_sizes(config, block_q=bq, block_k=bk)
    if bq % _LANES or bk % _LANES:
        raise ValueError(f"config wants multiples of {_LANES}, got {bq} and {bk}")
    return (
        min(bq, mosaic_tpu.round_up(nq, _LANES)),
        min(bk, mosaic_tpu.round_up(nk, _LANES)),
    )


def _kernel(weight, r, lse, q, k, *refs, attention, band, vectors, on_vpu, fast):
    refs = list(refs)
    dout, v = None, None
    if attention.relevance != "attention":
        dout, v = refs.pop(0), refs.pop(0)
    key_mask = refs.pop(0)[...] if attention.masked else None
    out, *scratch = refs
    linear = attention.head_fusion not in ("max", "min")
    j = pl.program_id(1)
    h, step = pl.program_id(2), pl.program_id(3)
    if not linear:
        h, step = step, h
    first, last = band.query_blocks(j)
    i = first + step
    live = i <= last

    def tile():
        s = mosaic_tpu.scores(k[...], q[...], attention.scale, attention.softcap)
        p = jnp.exp(s - lse[...])
        if dout is not None and v is not None:
            gradient = mosaic_tpu.products(v[...], dout[...])
            if attention.relevance == "relu_gradient_x_attention":
                gradient = jnp.maximum(gradient, 0.0)
            p = p * gradient
        # Masking the product, not the score, also removes what padding held.
        return jnp.where(band.allowed(i, j, key_mask), p, 0.0)

    def weights():
        lanes = lax.broadcasted_iota(jnp.int32, r.shape, 1) + i * band.bq
        return jnp.where(lanes < band.nq, r[...], 0.0)

    @pl.when((h == 0) & (step == 0))
    def _():
        out[...] = jnp.zeros_like(out)
        if on_vpu:
            scratch[0][...] = jnp.zeros_like(scratch[0])

    if linear:

        @pl.when(live)
        def _():
            p = tile() * weight[0, 0]
            if on_vpu:
                _multiply_on_vpu(scratch[0], weights(), p, vectors)
            else:
                out[...] += _multiply_on_mxu(weights(), p, fast)
    else:
        fuse = jnp.maximum if attention.head_fusion == "max" else jnp.minimum
        (fused,) = scratch

        @pl.when(live & (h == 0))
        def _():
            fused[...] = tile()

        @pl.when(live & (h > 0))
        def _():
            fused[...] = fuse(fused[...], tile())

        @pl.when(live & (h == attention.heads - 1))
        def _():
            out[...] += _multiply_on_mxu(weights(), fused[...], fast)

    if on_vpu:

        @pl.when((h == attention.heads - 1) & (step == band.query_steps - 1))
        def _():
            # The lanes of the accumulator are summed, and moved to a row, by a
            # product with ones.
            ones = jnp.ones((_SUBLANES, _LANES), jnp.float32)
            for m in range(vectors):
                out[m : m + 1, :] = mosaic_tpu.products(ones, scratch[0][m])[:1]


def _multiply_on_vpu(accumulator, r, p, vectors):
    for m in range(vectors):
        weighted = p * r[m : m + 1]
        total = accumulator[m]
        for lane in range(0, p.shape[1], _LANES):
            total = total + weighted[:, lane : lane + _LANES]
        accumulator[m] = total


def _multiply_on_mxu(r, p, fast):
    """r p^T; unless fast, from the bfloat16 parts of both, an error near 1e-6."""
    r_high, p_high = r.astype(jnp.bfloat16), p.astype(jnp.bfloat16)
    if fast:
        return mosaic_tpu.products(r_high, p_high)
    r_low = (r - r_high.astype(jnp.float32)).astype(jnp.bfloat16)
    p_low = (p - p_high.astype(jnp.float32)).astype(jnp.bfloat16)
    # Both parts of r meet the high part of p while it is loaded.
    both = mosaic_tpu.products(jnp.concatenate([r_high, r_low]), p_high)
    n = r.shape[0]
    return both[:n] + both[n:] + mosaic_tpu.products(r_high, p_low)
