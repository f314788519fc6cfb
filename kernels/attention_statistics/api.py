"""What each attention head does, query by query, in one pass over its scores."""

import numbers
from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from xviz_jax.kernels import dispatch
from xviz_jax.kernels.attention_map import ArrayLike, ScoringOptions, attention_map
from xviz_jax.kernels.attention_statistics.statistics import AttentionStatistics

IMPLEMENTATIONS = ("reference", "xla", "mosaic_tpu", "mosaic_gpu")


def attention_statistics(
    q: ArrayLike,
    k: ArrayLike,
    *,
    marked_keys: ArrayLike | None = None,
    top_k: int = 4,
    implementation: dispatch.Implementation | None = None,
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
    **scoring: Unpack[ScoringOptions],
) -> AttentionStatistics:
    """Entropy, distance, sinks and strongest keys of every attention row.

    Tells heads apart (local, diffuse, sink, previous-token) without looking at a
    map. Costs one product of q and k, in memory O(N * block).

    Args:
      q: queries `[*batch, Nq, H, head_dim]`.
      k: keys `[*batch, Nk, Hkv, head_dim]`; query head h uses key head
        `h // (H // Hkv)`.
      marked_keys: bool `[*batch, Nk]`, the keys whose weight `marked_mass` sums.
      top_k: how many of the strongest keys to list, from 0 to Nk.
      implementation: "reference", "xla", "mosaic_tpu", or None to choose.
      config: block sizes of the named implementation.
      interpret: of the Mosaic implementations, as in `pallas_call`.
      **scoring: scale, masks and cap; see `ScoringOptions`.

    Returns:
      `AttentionStatistics`, each field `[*batch, H, Nq]`.

    Raises:
      TypeError: q or k is not floating, or a mask is not boolean.
      ValueError: shapes or options that do not fit; the text says which.
      NotImplementedError: the named implementation does not support an argument.

    >>> import jax.numpy as jnp
    >>> q = k = jnp.zeros((4, 1, 8))
    >>> statistics = attention_statistics(q, k, causal=True)
    >>> statistics.distance
    Array([[0. , 0.5, 1. , 1.5]], dtype=float32)
    """
    attention = attention_map(q, k, **scoring)
    b, _, _, _, nk = attention.shape
    if not isinstance(top_k, numbers.Integral) or not 0 <= top_k <= nk:
        raise ValueError(f"top_k wants an integer from 0 to {nk} keys, got {top_k!r}")
    if marked_keys is not None:
        marked_keys = jnp.asarray(marked_keys)
        if marked_keys.dtype != bool:
            raise TypeError(f"marked_keys wants booleans, got {marked_keys.dtype}")
        if marked_keys.shape != (*attention.batch, nk):
            raise ValueError(
                f"marked_keys wants shape {(*attention.batch, nk)}, "
                f"got {marked_keys.shape}"
            )
        marked_keys = marked_keys.reshape(b, nk)
    statistics = dispatch.run(
        "attention_statistics",
        IMPLEMENTATIONS,
        implementation,
        attention,
        marked_keys,
        top_k,
        config=config,
        interpret=interpret,
    )
    unfold = lambda y: y.reshape(*attention.batch, *y.shape[1:])
    return jax.tree.map(unfold, statistics)
