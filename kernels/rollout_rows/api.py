"""Rows of the attention rollout, from products of rows instead of matrices."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from xviz_jax.kernels import dispatch
from xviz_jax.kernels.attention_fused_matrix.api import IMPLEMENTATIONS as _MATRIX
from xviz_jax.kernels.attention_map import (
    ArrayLike,
    AttentionMap,
    HeadFusion,
    Relevance,
    ScoringOptions,
    check_vectors,
)
from xviz_jax.kernels.attention_row_product.api import row_product
from xviz_jax.kernels.rollout import Layers, Residual, Stack


def rollout_rows(
    qs: Stack,
    ks: Stack,
    rows: ArrayLike | Sequence[int],
    *,
    residual: Residual = "half",
    normalize: bool = False,
    relevance: Relevance = "attention",
    head_fusion: HeadFusion = "mean",
    discard_ratio: float = 0.0,
    vs: Stack | None = None,
    douts: Stack | None = None,
    lses: Stack | None = None,
    head_weights: Stack | None = None,
    thresholds: Stack | None = None,
    key_masks: Stack | None = None,
    masks: Stack | None = None,
    biases: Stack | None = None,
    per_layer: Sequence[Mapping[str, Any]] | None = None,
    precision: Literal["default", "fast"] = "default",
    implementation: dispatch.Implementation | None = None,
    config: Mapping[str, int] | None = None,
    interpret: Any = False,
    **scoring: Unpack[ScoringOptions],
) -> tuple[jax.Array, jax.Array]:
    """Rows of R = A_L ... A_1, where A_l adds a residual to the fused F_l.

    A row of the product is a row vector carried from the last layer to the first,
    one `attention_row_product` a layer, so that no N x N matrix is formed; and the
    last layer costs only the requested rows. With M rows and N tokens that beats
    `rollout_full` unless M exceeds about N / H. Memory is O(N * block) beside the
    arguments.

    "half" with relevance "attention" is attention rollout (Abnar and Zuidema 2020);
    "add" with "relu_gradient_x_attention" is the relevance of Chefer, Gur and Wolf
    (ICCV 2021, equations 5 and 6) for self-attention.

    Args:
      qs: queries of every layer, first to last: one array `[L, *batch, N, H,
        head_dim]`, or a sequence of L arrays that may differ in H and head_dim.
      ks: keys likewise, `[L, *batch, N, Hkv, head_dim]`.
      rows: which rows of R: int `[M]`, or `[*batch, M]` for rows of each example's
        own; negative counts from the end. Or float `[*batch, M, N]`, weights over
        the rows, which costs a full pass in the last layer too.
      residual: "half", A = (I + F) / 2; "add", A = I + F; "normalize", the rows of
        I + F divided by their sums, equal to "half" where F's rows sum to one;
        "none", A = F; or a number w from 0 to 1, A = w I + (1 - w) F.
      normalize: divide the rows of each A by their sums.
      relevance: how a probability counts; see `RelevanceOptions`.
      head_fusion: how heads become one matrix; see `RelevanceOptions`.
      discard_ratio: the fraction of the entries of each F, the lowest, to zero.
      vs: values likewise `[L, *batch, N, Hkv, d_v]`, for a gradient relevance.
      douts: cotangents of the attention outputs, `[L, *batch, N, H, d_v]`.
      lses: their `attention_lse`, `[L, *batch, H, N]`, if known.
      head_weights: `[L, H]` or `[L, *batch, H]`, for head_fusion="weighted".
      thresholds: `[L, *batch]`, entries of each F below it count as zero.
      key_masks: `key_mask` of every layer, where the layers have their own.
      masks: `mask` of every layer.
      biases: `bias` of every layer.
      per_layer: options of single layers of a sequence, such as `{"window": ...}`.
      precision: see `attention_row_product`.
      implementation: of the row products.
      config: block sizes of the row products.
      interpret: of the Mosaic implementations.
      **scoring: scale, masks and cap; see `ScoringOptions`.

    Returns:
      The rows, float32 `[*batch, M, N]`, and their mass `[*batch, M]`: the sum of
      each row, which is one, up to rounding, for "half" and "normalize" with
      relevance "attention" and mean fusion. A row out of range is NaN.

    Raises:
      TypeError: an argument has the wrong dtype.
      ValueError: shapes or options that do not fit, or rows out of range where they
        are not traced; the text says which.
      NotImplementedError: the named implementation does not support an argument.

    >>> import jax.numpy as jnp
    >>> q = k = jnp.zeros((2, 2, 1, 8))  # two layers, two tokens
    >>> weights, mass = rollout_rows(q, k, [-1], causal=True)
    >>> weights
    Array([[0.4375, 0.5625]], dtype=float32)
    """
    layers = Layers(
        qs,
        ks,
        residual=residual,
        normalize=normalize,
        discard_ratio=discard_ratio,
        implementation=implementation,
        per_layer=per_layer,
        stacks={
            "v": vs,
            "dout": douts,
            "lse": lses,
            "head_weights": head_weights,
            "threshold": thresholds,
            "key_mask": key_masks,
            "mask": masks,
            "bias": biases,
        },
        options=dict(relevance=relevance, head_fusion=head_fusion, **scoring),
    )

    def step(r: jax.Array, attention: AttentionMap) -> jax.Array:
        r = layers.scale_rows(r, attention)
        product = row_product(
            r,
            attention,
            precision=precision,
            implementation=implementation,
            config=config,
            interpret=interpret,
        )
        return layers.add_residual(r, product)

    last = layers[layers.count - 1]
    rows = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if jnp.issubdtype(rows.dtype, jnp.floating):
        r = step(check_vectors("rows", rows, last, last.q.shape[1]), last)
    else:
        r = _last_layer(layers, last, _check_rows(rows, last), implementation)
    r = layers.fold(step, r, range(layers.count - 2, -1, -1))
    r = r.reshape(*last.batch, *r.shape[1:])
    return r, r.sum(-1)


def _last_layer(layers, last, rows, implementation):
    """The requested rows of the last layer, the only ones of it that are computed."""
    eye = jax.nn.one_hot(rows, last.q.shape[1], dtype=last.dtype)
    only = last.take_queries(rows)
    fused = dispatch.run(
        "attention_fused_matrix",
        _MATRIX,
        "reference" if implementation == "reference" else None,
        only,
        config=None,
    )
    return layers.normalize_rows(layers.add_residual(eye, fused), fused)


def _check_rows(rows, attention):
    """Non-negative int32 row numbers, `[B, M]`."""
    n = attention.q.shape[1]
    if not jnp.issubdtype(rows.dtype, jnp.integer):
        raise TypeError(f"rows wants integers, or floating weights; got {rows.dtype}")
    if rows.ndim == 0 or rows.shape[:-1] not in ((), attention.batch):
        raise ValueError(
            f"rows wants shape ('M',) or {(*attention.batch, 'M')}, got {rows.shape}"
        )
    if rows.shape[-1] == 0:
        raise ValueError("rows is empty")
    if not isinstance(rows, Tracer):
        outside = np.asarray(rows)[(np.asarray(rows) < -n) | (np.asarray(rows) >= n)]
        if outside.size:
            raise ValueError(f"rows wants rows of {n} tokens, got {outside.tolist()}")
    rows = jnp.asarray(rows, jnp.int32)
    rows = jnp.where(rows < 0, rows + n, rows)
    # What is still negative must not wrap a second time.
    rows = jnp.where(rows < 0, n, rows)
    rows = jnp.broadcast_to(rows, (*attention.batch, rows.shape[-1]))
    return rows.reshape(-1, rows.shape[-1])
