"""The fused attention matrix, formed without its heads side by side."""

from collections.abc import Mapping
from typing import Any, Unpack

import jax

from xviz_jax.kernels import dispatch
from xviz_jax.kernels.attention_map import ArrayLike, RelevanceOptions, attention_map

IMPLEMENTATIONS = ("reference", "xla", "mosaic_tpu")


def attention_fused_matrix(
    q: ArrayLike,
    k: ArrayLike,
    *,
    implementation: dispatch.Implementation | None = None,
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
    **options: Unpack[RelevanceOptions],
) -> jax.Array:
    """F = fuse_h T(P_h), the fused attention or relevance matrix of one layer.

    For when F itself is wanted; a few of its rows or products are cheaper from
    `attention_row_product`. Costs one product of q and k (two with a gradient
    relevance). Memory is that of the result: the heads are fused tile by tile, so
    H maps never exist together.

    Args:
      q: queries `[*batch, Nq, H, head_dim]`.
      k: keys `[*batch, Nk, Hkv, head_dim]`; query head h uses key head
        `h // (H // Hkv)`.
      implementation: "reference", "xla", "mosaic_tpu", or None to choose.
      config: block sizes of the named implementation.
      interpret: of the Mosaic implementations, as in `pallas_call`.
      **options: scale, masks, relevance and head fusion; see `RelevanceOptions`.

    Returns:
      `[*batch, Nq, Nk]`, float32 (float64 for float64 q).

    Raises:
      TypeError: q, k, v or dout is not floating, or a mask is not boolean.
      ValueError: shapes or options that do not fit; the text says which.
      NotImplementedError: the named implementation does not support an argument.

    >>> import jax.numpy as jnp
    >>> attention_fused_matrix(jnp.zeros((2, 4, 8)), jnp.zeros((2, 4, 8)), causal=True)
    Array([[1. , 0. ],
           [0.5, 0.5]], dtype=float32)
    """
    attention = attention_map(q, k, **options)
    out = dispatch.run(
        "attention_fused_matrix",
        IMPLEMENTATIONS,
        implementation,
        attention,
        config=config,
        interpret=interpret,
    )
    return out.reshape(*attention.batch, *out.shape[1:])
