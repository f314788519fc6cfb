"""`attention_col_product` on TPU.

A block of queries stays while keys and heads pass by, as in attention with few value
columns. For a maximum or minimum the heads are innermost and their fused tile stays in
memory.
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
from xviz_jax.kernels.attention_col_product import xla
from xviz_jax.kernels.attention_lse import mosaic_tpu as lse_kernel
from xviz_jax.kernels.attention_map import AttentionMap
from xviz_jax.kernels.dispatch import differentiated_as

# The accumulators of more would not fit beside the tiles.
_MAX_VECTORS = 512


def attention_col_product(
    columns: jax.Array,
    attention: AttentionMap,
    *,
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """F `[B, Nq, Nk]` times each row of `[B, M, Nk]`, as `[B, M, Nq]`."""
    mosaic_tpu.require_support(attention)
    if columns.shape[1] > _MAX_VECTORS:
        raise NotImplementedError(
            f"mosaic_tpu multiplies at most {_MAX_VECTORS} vectors x, got "
            f"{columns.shape[1]}; form the matrix with attention_fused_matrix"
        )
    kernel = functools.partial(call, config=config, interpret=interpret)
    return differentiated_as(xla.attention_col_product, kernel)(columns, attention)


def call(
    columns: jax.Array,
    attention: AttentionMap,
    *,
    config: Mapping[str, int] | None,
    interpret: Any,
) -> jax.Array:
    """The kernel itself, which has no derivative."""
    b, h, _, nq, _ = attention.shape
    m = columns.shape[1]
    bq, bk = (512, 512) if not attention.fuses_linearly else (512, 1024)
    bq, bk = tuning.block_sizes(
        "attention_col_product",
        attention,
        config,
        vectors=m,
        block_q=bq,
        block_k=bk,
    )
    bq, bk = mosaic_tpu.clip_blocks(attention, bq, bk)
    tiles = mosaic_tpu.Tiles.of(attention, bq, bk)
    band, linear = tiles.band, tiles.linear
    lse = attention.lse
    if lse is None:
        lse = lse_kernel.call(attention, config=None, interpret=interpret)

    def at(b, i, x, y):
        head, step = (x, y) if linear else (y, x)
        return b, head, i, band.key_block(i, step)

    def vectors(b, i, x, y):
        return b, 0, at(b, i, x, y)[3]

    padded = mosaic_tpu.round_up(m, mosaic_tpu.SUBLANES)
    specs, operands = tiles.operands(attention, lse, at)
    specs.append(pl.BlockSpec((None, padded, bk), vectors))
    operands.append(jnp.pad(columns, ((0, 0), (0, padded - m), (0, 0))))
    out = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles),
        grid=(
            b,
            -(-nq // bq),
            *((h, band.key_steps) if linear else (band.key_steps, h)),
        ),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, padded, bq), lambda b, i, x, y: (b, 0, i)),
        out_shape=mosaic_tpu.result_like((b, padded, nq), *operands),
        scratch_shapes=[] if linear else [pltpu.VMEM((bk, bq), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=mosaic_tpu.VMEM_LIMIT_BYTES,
        ),
        cost_estimate=mosaic_tpu.cost(
            attention, attention.q.nbytes + attention.k.nbytes * (-(-nq // bq))
        ),
        interpret=interpret,
        name=f"attention_col_product_{attention.relevance}_{attention.head_fusion}",
    )(*operands)
    return out[:, :m]


def _kernel(*refs, tiles):
    tile_refs, (columns, out, *scratch) = tiles.split(refs)
    band = tiles.band
    i, h, step = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    if not tiles.linear:
        h, step = step, h
    first, last = band.key_blocks(i)
    j = first + step
    live = j <= last

    def multiply(p):
        lanes = lax.broadcasted_iota(jnp.int32, columns.shape, 1) + j * band.bk
        x = jnp.where(lanes < band.nk, columns[...], 0.0)
        out[...] += mosaic_tpu.accurate_products(x, p, 0, fast=False)

    @pl.when((h == 0) & (step == 0))
    def _():
        out[...] = jnp.zeros_like(out)

    @pl.when(live)
    def _():
        p = tiles(tile_refs, i, j)
        if tiles.linear:
            multiply(p)
        else:
            tiles.fuse(scratch[0], h, p)

    if not tiles.linear:

        @pl.when(live & (h == tiles.heads - 1))
        def _():
            multiply(scratch[0][...])
