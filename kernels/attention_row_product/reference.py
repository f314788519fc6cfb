"""The definition of `attention_row_product`."""

import jax
import jax.numpy as jnp

from xviz_jax.kernels import dense
from xviz_jax.kernels.attention_map import AttentionMap


def attention_row_product(
    r: jax.Array,
    attention: AttentionMap,
    *,
    precision="default",
    config=None,
    interpret=False,
) -> jax.Array:
    """`[B, M, Nq]` times F `[B, Nq, Nk]`."""
    del precision, config, interpret
    return jnp.matmul(r, dense.fused(attention), precision="highest")
