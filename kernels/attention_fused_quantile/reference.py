"""The definition of `attention_fused_quantile`."""

import jax
import jax.numpy as jnp

from xviz_jax.kernels import dense
from xviz_jax.kernels.attention_map import AttentionMap


def attention_fused_quantile(
    attention: AttentionMap, rank: int, *, config=None
) -> jax.Array:
    """The entry of F, `[B]`, that exactly `rank` entries precede in order."""
    del config
    fused = dense.fused(attention)
    return jnp.sort(fused.reshape(fused.shape[0], -1), -1)[:, rank]
