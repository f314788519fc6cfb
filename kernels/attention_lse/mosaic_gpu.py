# pyright: reportArgumentType=false
"""`attention_lse` on NVIDIA Hopper: the online softmax without its values."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.kernels import mosaic_gpu, mosaic_gpu_walk
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
    mosaic_gpu.require_support(attention)
    kernel = functools.partial(call, config=config, interpret=interpret)
    return differentiated_as(xla.attention_lse, kernel)(attention)


def call(
    attention: AttentionMap, *, config: Mapping[str, int] | None, interpret: Any
) -> jax.Array:
    """The kernel itself, which has no derivative."""
    scale = attention.scale * mosaic_gpu.LOG2_E
    # A positive scale keeps the order, so that only the maximum is multiplied, and
    # scale and shift are one instruction.
    first, then = (1.0, scale) if scale > 0.0 else (scale, 1.0)

    def step(tile, carry):
        s = tile.keep_seen(tile.products[0] * first, -jnp.inf)
        before, total = carry
        after = jnp.maximum(before, jnp.max(s, axis=1) * then)
        # While a query has met no key its maximum is -inf, and -inf - -inf is NaN.
        shift = jnp.where(after == -jnp.inf, 0.0, after)
        added = jnp.sum(jnp.exp2(s * then - tile.along_rows(shift)), axis=1)
        return after, total * jnp.exp2(before - shift) + added

    def finish(_, carry):
        top, total = carry
        return [top * math.log(2.0) + jnp.log(total)]

    return mosaic_gpu_walk.walk_keys(
        "attention_lse",
        attention,
        config,
        start=(-jnp.inf, 0.0),
        step=step,
        finish=finish,
        outputs=1,
        interpret=interpret,
        candidates=[(128, 64, 2), (64, 128, 2)],
    )[:, :, 0]
