"""The whole attention rollout, for short inputs or many rows."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from xviz_jax.kernels import dispatch
from xviz_jax.kernels.attention_fused_matrix.api import IMPLEMENTATIONS as _MATRIX
from xviz_jax.kernels.attention_map import (
    AttentionMap,
    HeadFusion,
    Relevance,
    ScoringOptions,
)
from xviz_jax.kernels.rollout import Layers, Residual, Stack


def rollout_full(
    qs: Stack,
    ks: Stack,
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
    key_masks: Stack | None = None,
    masks: Stack | None = None,
    biases: Stack | None = None,
    per_layer: Sequence[Mapping[str, Any]] | None = None,
    implementation: dispatch.Implementation | None = None,
    config: Mapping[str, int] | None = None,
    **scoring: Unpack[ScoringOptions],
) -> jax.Array:
    """R = A_L ... A_1, where A_l adds a residual to the fused F_l of layer l.

    For when most rows of R are wanted, more than about N / H of them; fewer are
    cheaper from `rollout_rows`, whose arguments these are. Costs a product of q and
    k and one of two N x N matrices a layer; memory is three N x N matrices, and
    never H of them. The identity is added to each product instead of to its
    factors, which keeps the weights of a token on itself exact.

    Args:
      qs: queries of every layer; see `rollout_rows`.
      ks: keys of every layer.
      residual: "half", "add", "normalize", "none" or a weight.
      normalize: divide the rows of each A by their sums.
      relevance: how a probability counts.
      head_fusion: how heads become one matrix.
      discard_ratio: the fraction of the entries of each F, the lowest, to zero.
      vs: values of every layer, for a gradient relevance.
      douts: cotangents of the attention outputs, for a gradient relevance.
      lses: `attention_lse` of every layer, if known.
      head_weights: `[L, H]` or `[L, *batch, H]`, for head_fusion="weighted".
      key_masks: `key_mask` of every layer, where the layers have their own.
      masks: `mask` of every layer.
      biases: `bias` of every layer.
      per_layer: options of single layers of a sequence.
      implementation: "reference", "xla", or None to choose.
      config: block sizes of the fused matrices.
      **scoring: scale, masks and cap; see `ScoringOptions`.

    Returns:
      float32 `[*batch, N, N]`; row i says what output token i is made of.

    Raises:
      TypeError: an argument has the wrong dtype.
      ValueError: shapes or options that do not fit; the text says which.

    >>> import jax.numpy as jnp
    >>> q = k = jnp.zeros((2, 2, 1, 8))  # two layers, two tokens
    >>> rollout_full(q, k, causal=True)
    Array([[1.    , 0.    ],
           [0.4375, 0.5625]], dtype=float32)
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
            "key_mask": key_masks,
            "mask": masks,
            "bias": biases,
        },
        options=dict(relevance=relevance, head_fusion=head_fusion, **scoring),
    )

    def fused(attention: AttentionMap) -> jax.Array:
        return dispatch.run(
            "attention_fused_matrix", _MATRIX, implementation, attention, config=config
        )

    def step(product: jax.Array, attention: AttentionMap) -> jax.Array:
        f = fused(attention)
        mixed = jnp.matmul(f, product, precision="highest")
        return layers.normalize_rows(layers.add_residual(product, mixed), f)

    first = layers[0]
    eye = jnp.eye(first.q.shape[1], dtype=first.dtype)[None]
    f = fused(first)
    out = layers.normalize_rows(layers.add_residual(eye, f), f)
    out = layers.fold(step, out, range(1, layers.count))
    return out.reshape(*first.batch, *out.shape[1:])
