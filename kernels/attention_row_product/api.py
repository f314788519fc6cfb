"""Rows of weights times the fused attention matrix, which is never formed."""

from collections.abc import Mapping
from typing import Any, Literal, Unpack

import jax

from xviz_jax.kernels import dispatch
from xviz_jax.kernels.attention_map import (
    ArrayLike,
    AttentionMap,
    RelevanceOptions,
    attention_map,
    check_vectors,
    drop_unused_queries,
)

IMPLEMENTATIONS = ("reference", "xla", "mosaic_tpu", "mosaic_gpu")


def attention_row_product(
    r: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    *,
    precision: Literal["default", "fast"] = "default",
    implementation: dispatch.Implementation | None = None,
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
    **options: Unpack[RelevanceOptions],
) -> jax.Array:
    """r F, where F = fuse_h T(P_h) is the fused attention or relevance matrix.

    The step of every rollout: weights over the queries become weights over the
    keys. It is also the cotangent of the values in attention with output cotangent
    r, at a fifth of the work. Costs one product of q and k (two with a gradient
    relevance), in memory O(N * block).

    Args:
      r: M vectors of weights over the queries, float `[*batch, M, Nq]`.
      q: queries `[*batch, Nq, H, head_dim]`, float32, bfloat16 or float16, as they
        enter the scores: after rotary embedding and normalisation.
      k: keys `[*batch, Nk, Hkv, head_dim]`, dtype of q; query head h uses key head
        `h // (H // Hkv)`.
      precision: "default" is exact to about 1e-6 (1e-5 on TPU with more than two
        vectors or a maximum or minimum); "fast" lets an accelerator round r and P
        to 16 bits before their product, an error near 1e-3 over 12 layers.
      implementation: "reference", "xla", "mosaic_tpu", "mosaic_gpu", or None to
        take the first that can. All are differentiable.
      config: block sizes of the named implementation.
      interpret: of the Mosaic implementations, as in `pallas_call`.
      **options: scale, masks, relevance and head fusion; see `RelevanceOptions`.

    Returns:
      `[*batch, M, Nk]`, float32 (float64 for float64 q). Queries that may attend
      nothing contribute zero.

    Raises:
      TypeError: q, k, v, dout or r is not floating, or a mask is not boolean.
      ValueError: shapes or options that do not fit; the text says which.
      NotImplementedError: the named implementation does not support an argument.

    >>> import jax.numpy as jnp
    >>> q = k = jnp.zeros((4, 2, 8))
    >>> attention_row_product(jnp.eye(4)[1:2], q, k, causal=True)
    Array([[0.5, 0.5, 0. , 0. ]], dtype=float32)
    """
    attention = attention_map(q, k, **options)
    r = check_vectors("r", r, attention, attention.q.shape[1])
    out = row_product(
        r,
        attention,
        precision=precision,
        implementation=implementation,
        config=config,
        interpret=interpret,
    )
    return out.reshape(*attention.batch, *out.shape[1:])


def row_product(
    r: jax.Array,
    attention: AttentionMap,
    *,
    precision: Literal["default", "fast"],
    implementation: dispatch.Implementation | None,
    config: Mapping[str, int] | None,
    interpret: Any,
) -> jax.Array:
    """`attention_row_product` of checked arguments, `[B, M, Nk]`."""
    if precision not in ("default", "fast"):
        raise ValueError(f"precision wants 'default' or 'fast', got {precision!r}")
    return dispatch.run(
        "attention_row_product",
        IMPLEMENTATIONS,
        implementation,
        r,
        drop_unused_queries(r, attention),
        precision=precision,
        config=config,
        interpret=interpret,
    )
