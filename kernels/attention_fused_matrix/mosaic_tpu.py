"""`attention_fused_matrix` on TPU: the heads of a tile fused where it lies."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from xviz_jax.kernels import mosaic_tpu, tuning
from xviz_jax.kernels.attention_fused_matrix import xla
from xviz_jax.kernels.attention_lse import mosaic_tpu as lse_kernel
from xviz_jax.kernels.attention_map import AttentionMap
from xviz_jax.kernels.dispatch import differentiated_as


def attention_fused_matrix(
    attention: AttentionMap,
    *,
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """F, `[B, Nq, Nk]`."""
    mosaic_tpu.require_support(attention)
    kernel = functools.partial(call, config=config, interpret=interpret)
    return differentiated_as(xla.attention_fused_matrix, kernel)(attention)


def call(
    attention: AttentionMap, *, config: Mapping[str, int] | None, interpret: Any
) -> jax.Array:
    """The kernel itself, which has no derivative."""
    b, h, _, nq, nk = attention.shape
    bq, bk = tuning.block_sizes(
        "attention_fused_matrix", attention, config, block_q=512, block_k=512
    )
    bq, bk = mosaic_tpu.clip_blocks(attention, bq, bk)
    tiles = mosaic_tpu.Tiles.of(attention, bq, bk)
    lse = attention.lse
    if lse is None:
        lse = lse_kernel.call(attention, config=None, interpret=interpret)
    specs, operands = tiles.operands(attention, lse, lambda b, i, j, h: (b, h, i, j))
    return pl.pallas_call(
        functools.partial(_kernel, tiles=tiles),
        grid=(b, -(-nq // bq), -(-nk // bk), h),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, bq, bk), lambda b, i, j, h: (b, i, j)),
        out_shape=mosaic_tpu.result_like((b, nq, nk), *operands),
        scratch_shapes=[pltpu.VMEM((bk, bq), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=mosaic_tpu.VMEM_LIMIT_BYTES,
        ),
        cost_estimate=mosaic_tpu.cost(attention, 4 * b * nq * nk),
        interpret=interpret,
        name=f"attention_fused_matrix_{attention.relevance}_{attention.head_fusion}",
    )(*operands)


def _kernel(*refs, tiles):
    tile_refs, (out, fused) = tiles.split(refs)
    i, j, h = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    first, last = tiles.band.key_blocks(i)
    live = (first <= j) & (j <= last)

    @pl.when(live)
    def _():
        tiles.fuse(fused, h, tiles(tile_refs, i, j))

    @pl.when(live & (h == tiles.heads - 1))
    def _():
        out[...] = fused[...].T

    @pl.when(~live & (h == 0))
    def _():
        out[...] = jnp.zeros_like(out)
