"""The definition of `attention_fused_matrix`."""

import jax

from xviz_jax.kernels import dense
from xviz_jax.kernels.attention_map import AttentionMap


def attention_fused_matrix(
    attention: AttentionMap, *, config=None, interpret=False
) -> jax.Array:
    """F, `[B, Nq, Nk]`."""
    del config, interpret
    return dense.fused(attention)
