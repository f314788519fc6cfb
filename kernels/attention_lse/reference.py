"""The definition of `attention_lse`."""

import jax

from xviz_jax.kernels import dense
from xviz_jax.kernels.attention_map import AttentionMap


def attention_lse(
    attention: AttentionMap, *, config=None, interpret=False
) -> jax.Array:
    """logsumexp of the scores over the keys, `[B, H, Nq]`."""
    del config, interpret
    return dense.lse(attention)
