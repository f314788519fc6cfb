"""The logsumexp of attention scores, in full precision."""

from collections.abc import Mapping
from typing import Any, Unpack

import jax

from xviz_jax.kernels import dispatch
from xviz_jax.kernels.attention_map import ArrayLike, ScoringOptions, attention_map

IMPLEMENTATIONS = ("reference", "xla", "mosaic_tpu", "mosaic_gpu")


def attention_lse(
    q: ArrayLike,
    k: ArrayLike,
    *,
    implementation: dispatch.Implementation | None = None,
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
    **scoring: Unpack[ScoringOptions],
) -> jax.Array:
    """The natural-log normaliser of each attention row, logsumexp_j(score_ij).

    Computed once, it spares every later operation on the same attention its
    softmax statistics. It is float32 also for 16-bit queries, because a logsumexp
    rounded to them shifts every probability of its row. Costs one product of q
    and k, in memory O(N * block).

    Args:
      q: queries `[*batch, Nq, H, head_dim]`.
      k: keys `[*batch, Nk, Hkv, head_dim]`; query head h uses key head
        `h // (H // Hkv)`.
      implementation: "reference", "xla", "mosaic_tpu", or None to choose.
      config: block sizes of the named implementation.
      interpret: of the Mosaic implementations, as in `pallas_call`.
      **scoring: scale, masks and cap; see `ScoringOptions`.

    Returns:
      `[*batch, H, Nq]`, float32 (float64 for float64 q); -inf for a query that may
      attend nothing.

    Raises:
      TypeError: q or k is not floating.
      ValueError: shapes or options that do not fit; the text says which.
      NotImplementedError: the named implementation does not support an argument.

    >>> import jax.numpy as jnp
    >>> q = k = jnp.zeros((4, 1, 8))
    >>> attention_lse(q, k, causal=True).round(4)
    Array([[0.    , 0.6931, 1.0986, 1.3863]], dtype=float32)
    """
    attention = attention_map(q, k, **scoring)
    lse = dispatch.run(
        "attention_lse",
        IMPLEMENTATIONS,
        implementation,
        attention,
        config=config,
        interpret=interpret,
    )
    return lse.reshape(*attention.batch, *lse.shape[1:])
