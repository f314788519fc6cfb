"""The fused attention matrix, which is never formed, times columns of values."""

from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from xviz_jax.kernels import dispatch
from xviz_jax.kernels.attention_map import (
    ArrayLike,
    RelevanceOptions,
    attention_map,
    check_vectors,
)

IMPLEMENTATIONS = ("reference", "xla", "mosaic_tpu", "mosaic_gpu")


def attention_col_product(
    x: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    *,
    implementation: dispatch.Implementation | None = None,
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
    **options: Unpack[RelevanceOptions],
) -> jax.Array:
    """F x, where F = fuse_h T(P_h) is the fused attention or relevance matrix.

    Values on the keys become values on the queries: the row sums of F with x = 1,
    the transposed step of a rollout, or co-attention. Costs one product of q and k
    (two with a gradient relevance), in memory O(N * block).

    Args:
      x: M vectors of values on the keys, float `[*batch, M, Nk]`.
      q: queries `[*batch, Nq, H, head_dim]`.
      k: keys `[*batch, Nk, Hkv, head_dim]`; query head h uses key head
        `h // (H // Hkv)`.
      implementation: "reference", "xla", "mosaic_tpu", or None to choose.
      config: block sizes of the named implementation.
      interpret: of the Mosaic implementations, as in `pallas_call`.
      **options: scale, masks, relevance and head fusion; see `RelevanceOptions`.

    Returns:
      `[*batch, M, Nq]`, float32 (float64 for float64 q); zero for a query that may
      attend nothing.

    Raises:
      TypeError: q, k, v, dout or x is not floating, or a mask is not boolean.
      ValueError: shapes or options that do not fit; the text says which.
      NotImplementedError: the named implementation does not support an argument.

    >>> import jax.numpy as jnp
    >>> q = k = jnp.zeros((4, 2, 8))
    >>> attention_col_product(jnp.eye(4)[:1], q, k, causal=True)
    Array([[1.        , 0.5       , 0.33333334, 0.25      ]], dtype=float32)
    """
    attention = attention_map(q, k, **options)
    x = check_vectors("x", x, attention, attention.k.shape[1])
    if attention.key_mask is not None:
        # What a masked key holds, often no number, meets a probability of zero.
        x = jnp.where(attention.key_mask[:, None], x, jnp.zeros((), x.dtype))
    out = dispatch.run(
        "attention_col_product",
        IMPLEMENTATIONS,
        implementation,
        x,
        attention,
        config=config,
        interpret=interpret,
    )
    return out.reshape(*attention.batch, *out.shape[1:])
