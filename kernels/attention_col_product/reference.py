"""The definition of `attention_col_product`."""

import jax
import jax.numpy as jnp

from xviz_jax.kernels import dense
from xviz_jax.kernels.attention_map import AttentionMap


def attention_col_product(
    x: jax.Array, attention: AttentionMap, *, config=None, interpret=False
):
    """F `[B, Nq, Nk]` times each row of `[B, M, Nk]`, as `[B, M, Nq]`."""
    del config, interpret
    return jnp.einsum("bij,bmj->bmi", dense.fused(attention), x, precision="highest")
