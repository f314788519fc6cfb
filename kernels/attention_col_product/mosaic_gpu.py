# pyright: reportArgumentType=false
"""`attention_col_product` on NVIDIA Hopper, for linear fusions.

Every head writes its own sums; XLA adds them, so the result is deterministic.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.kernels import mosaic_gpu, mosaic_gpu_walk
from xviz_jax.kernels.attention_col_product import xla
from xviz_jax.kernels.attention_lse import mosaic_gpu as lse_kernel
from xviz_jax.kernels.attention_map import AttentionMap
from xviz_jax.kernels.dispatch import differentiated_as

# Each is another sum in registers.
_MAX_VECTORS = 8


def attention_col_product(
    columns: jax.Array,
    attention: AttentionMap,
    *,
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """F `[B, Nq, Nk]` times each row of `[B, M, Nk]`, as `[B, M, Nq]`."""
    mosaic_gpu.require_support(attention)
    mosaic_gpu.require_linear(attention)
    if columns.shape[1] > _MAX_VECTORS:
        raise NotImplementedError(
            f"mosaic_gpu multiplies at most {_MAX_VECTORS} vectors x, got "
            f"{columns.shape[1]}"
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
    lse = attention.lse
    if lse is None:
        lse = lse_kernel.call(attention, config=None, interpret=interpret)
    scale = attention.scale * mosaic_gpu.LOG2_E

    def step(tile, sums):
        scores, *gradient = tile.products
        (norm,) = tile.per_query
        p = jnp.exp2(scores * scale - tile.along_rows(norm))
        if gradient:
            p = p * mosaic_gpu.counted_gradient(attention, gradient[0])
        # After the gradient, which may be NaN where nothing is attended.
        p = tile.keep_seen(p, 0.0)
        return [
            total + jnp.sum(p * tile.along_columns(x), axis=1)
            for total, x in zip(sums, tile.per_key[0], strict=True)
        ]

    partial = mosaic_gpu_walk.walk_keys(
        "attention_col_product",
        attention,
        config,
        vectors=columns.shape[1],
        per_query=[mosaic_gpu.base_two(lse)],
        per_key=[columns],
        start=(0.0,) * columns.shape[1],
        step=step,
        finish=lambda _, sums: sums,
        outputs=columns.shape[1],
        interpret=interpret,
    )
    return mosaic_gpu.sum_heads(attention, partial)
