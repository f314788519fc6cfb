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

from xviz_jax.kernels import mosaic_tpu, tuning
from xviz_jax.kernels.attention_lse import mosaic_tpu as lse_kernel
from xviz_jax.kernels.attention_map import AttentionMap
from xviz_jax.kernels.attention_row_product import xla
from xviz_jax.kernels.dispatch import differentiated_as

_LANES, _SUBLANES = mosaic_tpu.LANES, mosaic_tpu.SUBLANES
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
    b, h, _, _, nk = attention.shape
    m = r.shape[1]
    on_vpu = attention.fuses_linearly and m <= _MAX_VECTORS_ON_VPU
    bq, bk = _block_sizes(attention, m, config)
    tiles = mosaic_tpu.Tiles.of(attention, bq, bk)
    band, linear = tiles.band, tiles.linear
    lse = attention.lse
    if lse is None:
        lse = lse_kernel.call(attention, config=None, interpret=interpret)

    def at(b, j, x, y):
        head, step = (x, y) if linear else (y, x)
        return b, head, band.query_block(j, step), j

    def vectors(b, j, x, y):
        return b, 0, at(b, j, x, y)[2]

    padded = mosaic_tpu.round_up(m, _SUBLANES)
    specs, operands = tiles.operands(attention, lse, at)
    specs.append(pl.BlockSpec((None, padded, bq), vectors))
    operands.append(jnp.pad(r, ((0, 0), (0, padded - m), (0, 0))))
    scratch = [pltpu.VMEM((m, bk, _LANES), jnp.float32)] if on_vpu else []
    if not linear:
        scratch = [pltpu.VMEM((bk, bq), jnp.float32)]
    out = pl.pallas_call(
        functools.partial(
            _kernel, tiles=tiles, vectors=m, on_vpu=on_vpu, fast=precision == "fast"
        ),
        grid=(
            b,
            -(-nk // bk),
            *((h, band.query_steps) if linear else (band.query_steps, h)),
        ),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, padded, bk), lambda b, j, x, y: (b, 0, j)),
        out_shape=mosaic_tpu.result_like((b, padded, nk), *operands),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=mosaic_tpu.VMEM_LIMIT_BYTES,
        ),
        cost_estimate=mosaic_tpu.cost(
            attention, attention.k.nbytes + attention.q.nbytes * (-(-nk // bk))
        ),
        interpret=interpret,
        name=f"attention_row_product_{attention.relevance}_{attention.head_fusion}",
    )(*operands)
    return out[:, :m]


def _block_sizes(attention, vectors, config):
    if not attention.fuses_linearly:
        bq, bk = 512, 512
    elif attention.relevance != "attention" or vectors > _MAX_VECTORS_ON_VPU:
        bq, bk = 256, 1024
    else:
        bq, bk = 1024, 1024
    bq, bk = tuning.block_sizes(
        "attention_row_product",
        attention,
        config,
        vectors=vectors,
        block_q=bq,
        block_k=bk,
    )
    return mosaic_tpu.clip_blocks(attention, bq, bk)


def _kernel(*refs, tiles, vectors, on_vpu, fast):
    tile_refs, (r, out, *scratch) = tiles.split(refs)
    band = tiles.band
    j, h, step = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    if not tiles.linear:
        h, step = step, h
    first, last = band.query_blocks(j)
    i = first + step
    live = i <= last

    def weights():
        lanes = lax.broadcasted_iota(jnp.int32, r.shape, 1) + i * band.bq
        return jnp.where(lanes < band.nq, r[...], 0.0)

    @pl.when((h == 0) & (step == 0))
    def _():
        out[...] = jnp.zeros_like(out)
        if on_vpu:
            scratch[0][...] = jnp.zeros_like(scratch[0])

    @pl.when(live)
    def _():
        p = tiles(tile_refs, i, j)
        if on_vpu:
            _multiply_on_vpu(scratch[0], weights(), p, vectors)
        elif tiles.linear:
            out[...] += mosaic_tpu.accurate_products(weights(), p, 1, fast)
        else:
            tiles.fuse(scratch[0], h, p)

    if not tiles.linear:

        @pl.when(live & (h == tiles.heads - 1))
        def _():
            p = scratch[0][...]
            out[...] += mosaic_tpu.accurate_products(weights(), p, 1, fast)

    if on_vpu:

        @pl.when((h == tiles.heads - 1) & (step == band.query_steps - 1))
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
