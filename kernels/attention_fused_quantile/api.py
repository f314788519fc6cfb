"""An exact quantile of the fused attention matrix, which is never formed."""

from collections.abc import Mapping
from typing import Unpack

import jax

from xviz_jax.kernels import dispatch
from xviz_jax.kernels.attention_map import (
    ArrayLike,
    AttentionMap,
    RelevanceOptions,
    attention_map,
)

IMPLEMENTATIONS = ("reference", "xla")


def attention_fused_quantile(
    q: ArrayLike,
    k: ArrayLike,
    ratio: float,
    *,
    implementation: dispatch.Implementation | None = None,
    config: Mapping[str, int] | None = None,
    **options: Unpack[RelevanceOptions],
) -> jax.Array:
    """The threshold that discards the lowest `ratio` of the entries of F.

    As `threshold` of the other operations it zeroes `int(ratio * Nq * Nk)` entries of
    F = fuse_h T(P_h), fewer where entries tie with it; masked entries count, as the
    zeros they are. This is the discard ratio of attention rollout for vision
    transformers (github.com/jacobgil/vit-explain). Exact: no entry is sampled. Costs
    two passes over F, in memory O(N * block).

    Args:
      q: queries `[*batch, Nq, H, head_dim]`, at most float32.
      k: keys `[*batch, Nk, Hkv, head_dim]`; query head h uses key head
        `h // (H // Hkv)`.
      ratio: the fraction of entries to discard, in [0, 1).
      implementation: "reference", "xla", or None to choose.
      config: block sizes of the named implementation; give later operations the
        same ones, and their entries compare with the threshold bit for bit.
      **options: scale, masks, relevance and head fusion; see `RelevanceOptions`.

    Returns:
      float32 `[*batch]`.

    Raises:
      TypeError: q, k, v or dout is not floating, or a mask is not boolean.
      ValueError: shapes or options that do not fit; the text says which.
      NotImplementedError: float64, or 2^32 entries and more.

    >>> import jax.numpy as jnp
    >>> q = k = jnp.zeros((4, 1, 8))
    >>> attention_fused_quantile(q, k, 0.5, causal=True).round(4)  # of 6 x 0, 4 x 1/4
    Array(0.25, dtype=float32)
    """
    attention = attention_map(q, k, **options)
    out = quantile(attention, ratio, implementation, config)
    return out.reshape(attention.batch)


def quantile(
    attention: AttentionMap,
    ratio: float,
    implementation: dispatch.Implementation | None,
    config: Mapping[str, int] | None,
) -> jax.Array:
    """`attention_fused_quantile` of checked arguments, `[B]`."""
    if not 0 <= ratio < 1:
        raise ValueError(f"the discarded ratio wants to lie in [0, 1), got {ratio!r}")
    entries = attention.q.shape[1] * attention.k.shape[1]
    if entries >= 2**32:
        raise NotImplementedError(f"q and k span {entries} entries; counted to 2^32")
    return dispatch.run(
        "attention_fused_quantile",
        IMPLEMENTATIONS,
        implementation,
        attention,
        int(ratio * entries),
        config=config,
    )
