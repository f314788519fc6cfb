"""The definition of `attention_statistics`."""

import jax
import jax.numpy as jnp

from xviz_jax.kernels import dense
from xviz_jax.kernels.attention_map import AttentionMap
from xviz_jax.kernels.attention_statistics.statistics import (
    AttentionStatistics,
    summarise,
)


def attention_statistics(
    attention: AttentionMap,
    marked: jax.Array | None,
    top_k: int,
    *,
    config=None,
    interpret=False,
) -> AttentionStatistics:
    """Statistics `[B, H, Nq]` of the probabilities of each head."""
    del config, interpret
    p = dense.probabilities(attention)
    positions = attention.query_positions()[:, None, :, None]
    marked = None if marked is None else marked[:, None, None]
    return summarise(p, jnp.log(p), positions, marked, top_k)
