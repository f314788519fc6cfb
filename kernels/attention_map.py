"""The fused attention matrix that every operation reads and none has to form.

One layer of attention gives, for each head h, the probabilities
P_h = softmax(scale * q_h k_h^T) under its masks. Attribution methods weigh them by
their gradient, fuse the heads, and then multiply or measure the resulting matrix

    F = fuse_h T(P_h),    T(P) = P,  P * dP  or  relu(P * dP),

where dP_ij = dout_i . v_j exactly, since the output of a head is P v. `AttentionMap`
holds what defines F, checked and brought to a single batch axis; a backend forms as
much of F at a time as it likes.
"""

import dataclasses
import numbers
from typing import Literal, TypedDict, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np

Relevance = Literal["attention", "gradient_x_attention", "relu_gradient_x_attention"]
HeadFusion = Literal["mean", "sum", "weighted", "max", "min"]
Window = tuple[int | None, int | None]
ArrayLike = jax.Array | np.ndarray


class ScoringOptions(TypedDict, total=False):
    """How queries and keys become probabilities; shared by all operations.

    A score is `softcap(scale * q.k) + bias`, and it counts where `causal`, `window`,
    `key_mask` and `mask` all allow it. A query row with nothing allowed has
    probability zero everywhere.

    Attributes:
      scale: multiplies q.k; `head_dim ** -0.5` unless given. A learned or traced
        scale belongs in q.
      causal: query i sees keys at its own position and before.
      window: `(left, right)`: query i sees keys from `i - left` to `i + right`; None
        leaves a side open.
      q_offset: the position of query 0 among the keys; `Nk - Nq` unless given, so
        that the last query meets the last key.
      key_mask: bool `[*batch, Nk]`, True where a key may be attended.
      mask: bool, broadcastable to `[*batch, H, Nq, Nk]`, True where attended. `xla`
        and `reference` only.
      bias: float, broadcastable likewise, added to the capped score. `xla` and
        `reference` only.
      softcap: scores become `softcap * tanh(score / softcap)`.
    """

    scale: float | None
    causal: bool
    window: Window | None
    q_offset: int | None
    key_mask: ArrayLike | None
    mask: ArrayLike | None
    bias: ArrayLike | None
    softcap: float | None


class RelevanceOptions(ScoringOptions, total=False):
    """`ScoringOptions`, and how probabilities become the fused matrix F.

    Attributes:
      lse: float32 `[*batch, H, Nq]`, natural-log normalisers of the scores, as
        `attention_lse` gives them; spares their computation. Never from a library
        that rounds them to the dtype of q: a bfloat16 logsumexp costs 0.5 %.
      v: values `[*batch, Nk, Hkv, d_v]`; required with a gradient relevance.
      dout: cotangents of the attention output, before its output projection,
        `[*batch, Nq, H, d_v]`; required with a gradient relevance.
      relevance: "attention" (P), "gradient_x_attention" (P * dP) or
        "relu_gradient_x_attention" (its positive part).
      head_fusion: "mean", "sum", "weighted", "max" or "min" over the heads.
      head_weights: `[H]` or `[*batch, H]`, for "weighted": F = sum_h w_h T(P_h).
      threshold: float32 `[*batch]`: entries of F below it count as zero. `xla` and
        `reference` only; `attention_fused_quantile` finds it.
    """

    lse: ArrayLike | None
    v: ArrayLike | None
    dout: ArrayLike | None
    relevance: Relevance
    head_fusion: HeadFusion
    head_weights: ArrayLike | None
    threshold: ArrayLike | None


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """What defines F, with every batch axis folded into the first, `B`.

    `mask` and `bias` keep axes of length one; `positions` is `[B, Nq]` or None, in
    which case query i lies at key position `i + q_offset`.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array | None
    dout: jax.Array | None
    lse: jax.Array | None
    head_weights: jax.Array | None
    threshold: jax.Array | None
    key_mask: jax.Array | None
    mask: jax.Array | None
    bias: jax.Array | None
    positions: jax.Array | None
    q_offset: int = dataclasses.field(metadata=_STATIC)
    scale: float = dataclasses.field(metadata=_STATIC)
    softcap: float | None = dataclasses.field(metadata=_STATIC)
    causal: bool = dataclasses.field(metadata=_STATIC)
    window: Window | None = dataclasses.field(metadata=_STATIC)
    relevance: Relevance = dataclasses.field(metadata=_STATIC)
    head_fusion: HeadFusion = dataclasses.field(metadata=_STATIC)
    batch: tuple[int, ...] = dataclasses.field(metadata=_STATIC)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype everything is accumulated in: float32, or float64 for such q."""
        return _accumulation_dtype(self.q.dtype)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """`(B, H, Hkv, Nq, Nk)`."""
        b, nq, h, _ = self.q.shape
        return b, h, self.k.shape[2], nq, self.k.shape[1]

    @property
    def fuses_linearly(self) -> bool:
        """Whether F is a weighted sum over heads, so that heads need not meet."""
        return self.head_fusion not in ("max", "min") and self.threshold is None

    def known_row_sums(self) -> jax.Array | None:
        """The row sums of F, `[B or 1, Nq]`, where counting keys tells them.

        A mean of softmaxes sums to one, or to zero where no key is allowed. A given
        `lse` may hold a sink, whose weight is missing from the row.
        """
        unknown = (self.threshold, self.lse, self.mask, self.bias, self.positions)
        if any(x is not None for x in unknown):
            return None
        if self.relevance != "attention" or self.head_fusion != "mean":
            return None
        i, nk = self.query_positions(), self.k.shape[1]
        left, right = self.window or (None, None)
        first, last = jnp.zeros_like(i), jnp.full_like(i, nk - 1)
        if left is not None:
            first = jnp.maximum(first, i - left)
        for side in (right, 0 if self.causal else None):
            if side is not None:
                last = jnp.minimum(last, i + side)
        allowed = jnp.ones((1, nk), bool) if self.key_mask is None else self.key_mask
        before = jnp.pad(jnp.cumsum(allowed, 1, dtype=jnp.int32), ((0, 0), (1, 0)))
        count = jnp.take(before, last[0] + 1, 1) - jnp.take(before, first[0], 1)
        return ((count > 0) & (first <= last)).astype(self.dtype)

    def query_positions(self) -> jax.Array:
        """Where the queries lie among the keys, int32 `[B or 1, Nq]`."""
        if self.positions is not None:
            return self.positions
        return jnp.arange(self.q.shape[1], dtype=jnp.int32)[None] + self.q_offset

    def fusion_weights(self) -> jax.Array:
        """`[B or 1, H]`, the weight of each head in a linear fusion."""
        if self.head_weights is not None:
            return self.head_weights.astype(self.dtype)
        heads = self.q.shape[2]
        weight = 1 / heads if self.head_fusion == "mean" else 1.0
        return jnp.full((1, heads), weight, self.dtype)

    def with_threshold(self, threshold: jax.Array) -> "AttentionMap":
        """F with its entries below `threshold` `[B]` discarded."""
        return dataclasses.replace(self, threshold=threshold)

    def take_queries(self, rows: jax.Array) -> "AttentionMap":
        """The rows of F that int `rows` `[B, M]` name; NaN rows where out of range."""

        def take(x, axis):
            if x is None or x.shape[axis] == 1 < self.q.shape[1]:
                return x
            b = rows.shape[0]
            x = jnp.broadcast_to(x, (b, *x.shape[1:]))
            fill = None if x.dtype == bool else jnp.nan
            gather = lambda x, rows: jnp.take(
                x, rows, axis - 1, mode="fill", fill_value=fill
            )
            return jax.vmap(gather)(x, rows)

        positions = rows + self.q_offset
        if self.positions is not None:
            positions = jnp.take_along_axis(self.positions, rows, 1)
        return dataclasses.replace(
            self,
            q=take(self.q, 1),
            dout=take(self.dout, 1),
            lse=take(self.lse, 2),
            mask=take(self.mask, 2),
            bias=take(self.bias, 2),
            positions=positions,
        )


def attention_map(
    q: ArrayLike, k: ArrayLike, **options: Unpack[RelevanceOptions]
) -> AttentionMap:
    """Checks the arguments of an operation and folds their batch axes into one.

    Raises:
      TypeError: q, k, v or dout is not floating, or a mask is not boolean.
      ValueError: shapes, dtypes or options that do not fit together.
    """
    q, k = jnp.asarray(q), jnp.asarray(k)
    array = lambda name: (
        None if options.get(name) is None else jnp.asarray(options.get(name))
    )
    batch, (nq, heads, dim) = check_queries(q, k)
    nk, kv_heads = k.shape[-3:-1]
    relevance = options.get("relevance", "attention")
    head_fusion = options.get("head_fusion", "mean")
    _check_choice("relevance", relevance, get_args(Relevance))
    _check_choice("head_fusion", head_fusion, get_args(HeadFusion))
    causal, window = bool(options.get("causal", False)), options.get("window")
    _check_window(window)
    q_offset = options.get("q_offset")
    if q_offset is None:
        if causal and nq > nk:
            raise ValueError(
                f"causal attention aligns the last query with the last key, so it "
                f"wants Nq <= Nk; got {nq} queries and {nk} keys (pass q_offset "
                f"where they are aligned otherwise)"
            )
        q_offset = nk - nq
    elif not isinstance(q_offset, numbers.Integral) or q_offset < 0:
        raise ValueError(f"q_offset wants an integer >= 0, got {q_offset!r}")
    scale, softcap = options.get("scale"), options.get("softcap")
    if scale is None:
        scale = dim**-0.5
    elif not isinstance(scale, numbers.Real):
        raise TypeError(
            f"scale wants a Python number, got {type(scale).__name__}; multiply q by "
            f"a learned or traced scale and pass scale=1.0"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap wants a positive number, got {softcap!r}")

    b = 1
    for n in batch:
        b *= n
    fold = lambda x: None if x is None else x.reshape(b, *x.shape[len(batch) :])

    v, dout = array("v"), array("dout")
    if relevance == "attention":
        for name, x in (("v", v), ("dout", dout)):
            if x is not None:
                raise ValueError(
                    f"relevance='attention' takes no {name}; did you mean "
                    f"relevance='relu_gradient_x_attention'?"
                )
    else:
        if v is None or dout is None:
            missing = "v" if v is None else "dout"
            raise ValueError(
                f"relevance={relevance!r} wants both v and dout; {missing} is missing"
            )
        value_dim = v.shape[-1:]
        _check_array("v", v, (*batch, nk, kv_heads, *value_dim), q.dtype)
        _check_array("dout", dout, (*batch, nq, heads, *value_dim), q.dtype)

    lse = array("lse")
    if lse is not None:
        wanted = _accumulation_dtype(q.dtype)
        if lse.dtype != wanted:
            raise ValueError(
                f"lse wants dtype {wanted}, got {lse.dtype}: a rounded logsumexp "
                f"costs half a percent of the attribution; see attention_lse"
            )
        _check_array("lse", lse, (*batch, heads, nq))
    head_weights = array("head_weights")
    if (head_fusion == "weighted") != (head_weights is not None):
        raise ValueError(
            f"head_weights go with head_fusion='weighted'; got "
            f"head_fusion={head_fusion!r} and head_weights "
            f"{'None' if head_weights is None else 'given'}"
        )
    if head_weights is not None:
        shape = (heads,) if head_weights.ndim == 1 else (*batch, heads)
        _check_array("head_weights", head_weights, shape)
        _check_floating("head_weights", head_weights)
        head_weights = head_weights.reshape(-1, heads)
    key_mask = array("key_mask")
    if key_mask is not None:
        _check_boolean("key_mask", key_mask)
        _check_array("key_mask", key_mask, (*batch, nk))
    mask, bias = array("mask"), array("bias")
    full = (*batch, heads, nq, nk)
    if mask is not None:
        _check_boolean("mask", mask)
        mask = _fold_broadcastable("mask", mask, full, b)
    if bias is not None:
        _check_floating("bias", bias)
        bias = _fold_broadcastable("bias", bias, full, b)
    threshold = array("threshold")
    if threshold is not None:
        _check_array("threshold", threshold, batch)
        _check_floating("threshold", threshold)
    return AttentionMap(
        q=q.reshape(b, *q.shape[-3:]),
        k=k.reshape(b, *k.shape[-3:]),
        v=fold(v),
        dout=fold(dout),
        lse=fold(lse),
        head_weights=head_weights,
        threshold=None if threshold is None else threshold.reshape(b),
        key_mask=fold(key_mask),
        mask=mask,
        bias=bias,
        positions=None,
        q_offset=int(q_offset),
        scale=float(scale),
        softcap=None if softcap is None else float(softcap),
        causal=causal,
        window=None if window == (None, None) else window,
        relevance=relevance,
        head_fusion=head_fusion,
        batch=batch,
    )


def check_queries(q: jax.Array, k: jax.Array) -> tuple[tuple[int, ...], tuple]:
    """Checks q against k; returns the batch shape and `(Nq, H, head_dim)` of q."""
    for name, x in (("q", q), ("k", k)):
        _check_floating(name, x)
        if x.ndim < 3:
            raise ValueError(
                f"{name} wants shape [*batch, length, heads, head_dim], got {x.shape}"
            )
        if 0 in x.shape:
            raise ValueError(f"{name} is empty: its shape is {x.shape}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if q.dtype != k.dtype:
        raise ValueError(f"q and k want one dtype, got {q.dtype} and {k.dtype}")
    if q.shape[:-3] != k.shape[:-3]:
        raise ValueError(f"q and k differ in batch shape: {q.shape} and {k.shape}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k differ in head_dim: {q.shape} and {k.shape}")
    if heads % kv_heads:
        raise ValueError(
            f"the query heads want to be a multiple of the key heads, got {heads} "
            f"and {kv_heads} from q {q.shape} and k {k.shape}"
        )
    return q.shape[:-3], q.shape[-3:]


def check_vectors(
    name: str, x: ArrayLike, attention: AttentionMap, length: int
) -> jax.Array:
    """Checks vectors `[*batch, M, length]`; returns them as `[B, M, length]`."""
    x = jnp.asarray(x)
    _check_floating(name, x)
    batch = attention.batch
    if x.ndim != len(batch) + 2 or x.shape[:-2] != batch or x.shape[-1] != length:
        raise ValueError(f"{name} wants shape {(*batch, 'M', length)}, got {x.shape}")
    if x.shape[-2] == 0:
        raise ValueError(f"{name} is empty: its shape is {x.shape}")
    if x.dtype.itemsize > attention.dtype.itemsize:
        raise ValueError(
            f"{name} wants a dtype no wider than {attention.dtype}, got {x.dtype}"
        )
    return x.reshape(-1, *x.shape[-2:]).astype(attention.dtype)


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} wants one of {choices}, got {value!r}")


def _accumulation_dtype(dtype):
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _check_floating(name, x):
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise TypeError(
            f"{name} wants a floating dtype of 16, 32 or 64 bits, got {x.dtype}"
        )


def _check_boolean(name, x):
    if x.dtype != bool:
        raise TypeError(f"{name} wants booleans, True where attended; got {x.dtype}")


def _check_array(name, x, shape, dtype=None):
    if x.shape != shape:
        raise ValueError(f"{name} wants shape {shape}, got {x.shape}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name} wants the dtype of q, {dtype}, got {x.dtype}")


def _check_window(window):
    if window is None:
        return
    if not isinstance(window, tuple) or len(window) != 2:
        raise ValueError(f"window wants a pair (left, right), got {window!r}")
    for side in window:
        if side is not None and (not isinstance(side, numbers.Integral) or side < 0):
            raise ValueError(f"window wants integers >= 0 or None, got {window!r}")


def _fold_broadcastable(name, x, shape, b):
    """Brings `x`, broadcastable to `shape`, to `[B or 1, H or 1, Nq or 1, Nk or 1]`."""
    fits = x.ndim <= len(shape) and all(
        n in (1, m) for n, m in zip(x.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"{name} wants to broadcast to {shape}, got {x.shape}")
    x = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    if all(n == 1 for n in x.shape[:-3]):
        return x.reshape(1, *x.shape[-3:])
    x = jnp.broadcast_to(x, (*shape[:-3], *x.shape[-3:]))
    return x.reshape(b, *x.shape[-3:])


def larger(x: jax.Array, y: jax.Array) -> jax.Array:
    """The elementwise maximum; NaN where either is, which XLA's own drops on a CPU."""
    return jnp.where((x > y) | (x != x), x, y)


def smaller(x: jax.Array, y: jax.Array) -> jax.Array:
    """The elementwise minimum; NaN where either is, which XLA's own drops on a CPU."""
    return jnp.where((x < y) | (x != x), x, y)


def positive_part(x: jax.Array) -> jax.Array:
    """`x` where it is positive, else zero; NaN stays."""
    return jnp.where(x <= 0.0, jnp.zeros((), x.dtype), x)


def drop_unused_queries(r: jax.Array, attention: AttentionMap) -> AttentionMap:
    """`attention` without the non-finite queries that `r` `[B, M, Nq]` gives no weight.

    Padding is often NaN by the second layer, where a model divided by the empty sum
    of a fully masked row. Nothing attends to it, so its weight is zero, and a zero
    weight must silence it.
    """
    unused = (r == 0.0).all(1)

    def silence(x, axes):
        if x is None:
            return None
        finite = jnp.isfinite(x).all(axes)
        drop = jnp.expand_dims(unused & ~finite, axes)
        return jnp.where(drop, jnp.zeros((), x.dtype), x)

    lse = attention.lse
    if lse is not None:
        drop = unused[:, None] & jnp.isnan(lse)
        lse = jnp.where(drop, jnp.zeros((), lse.dtype), lse)
    return dataclasses.replace(
        attention,
        q=silence(attention.q, (2, 3)),
        dout=silence(attention.dout, (2, 3)),
        lse=lse,
    )
