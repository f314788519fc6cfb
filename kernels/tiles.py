"""The attention map one tile at a time, in plain XLA.

A tile is a block of examples, key heads and query rows against *all* keys, so its
softmax is exact without a second pass, and memory is O(N * block). The arrays of an
`AttentionMap` become `Operands`, whose axes have names, and `blocked` walks along one
named axis: `blocked(f, x, "i", 256, ...)` hands `f` 256 query rows at a time.

    b example   h key head   g query head of that key head
    i query     j key        d feature        m vector of the caller
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from xviz_jax.kernels.attention_map import (
    AttentionMap,
    larger,
    positive_part,
    smaller,
)
from xviz_jax.kernels.dispatch import block_sizes, platform

Operands = dict[str, jax.Array]

_AXES = {
    "q": "bhgid",
    "k": "bhjd",
    "v": "bhjd",
    "dout": "bhgid",
    "lse": "bhgi",
    "weights": "bhg",
    "threshold": "b",
    "key_mask": "bj",
    "mask": "bhgij",
    "bias": "bhgij",
    "positions": "bi",
    "rows": "bmi",
    "columns": "bmj",
    "marked": "bj",
}

# Below this size a CPU keeps a whole map in cache, and walking along it only costs.
_CPU_DENSE_BYTES = 8 * 2**20
# An accelerator wants few, large tiles; this bounds what one of them may take.
_ACCELERATOR_BYTES = 128 * 2**20


# More bands leave out more masked keys, but each is another loop to compile and
# copies its keys, which overlap under a triangle and hardly do under a window.
_TRIANGLE_BANDS, _WINDOW_BANDS = 4, 16


_REDUCTIONS = {"sum": jnp.add, "max": larger, "min": smaller}


class Tile(NamedTuple):
    """How many examples, key heads and query rows are held at a time."""

    b: int
    h: int
    i: int


def tile_sizes(
    attention: AttentionMap, config: Mapping[str, int] | None = None
) -> Tile:
    """The tile that suits the platform; `config` overrides its sizes by name."""
    b, heads, kv_heads, nq, nk = attention.shape
    group = heads // kv_heads
    row = nk * attention.dtype.itemsize
    if platform() == "cpu":
        if b * heads * nq * row <= _CPU_DENSE_BYTES:
            tile = Tile(b, kv_heads, nq)
        elif heads * nq * row <= _CPU_DENSE_BYTES:
            tile = Tile(1, kv_heads, nq)
        else:
            tile = Tile(1, 1, -(-(128 if nk >= 8192 else 256) // group))
    else:
        fitting = lambda b, h: _ACCELERATOR_BYTES // (b * h * group * row)
        if fitting(b, kv_heads) >= min(nq, 64):
            tile = Tile(b, kv_heads, fitting(b, kv_heads))
        elif fitting(1, kv_heads) >= min(nq, 64):
            tile = Tile(1, kv_heads, fitting(1, kv_heads))
        else:
            tile = Tile(1, 1, max(16, fitting(1, 1)))
    tile = Tile(*block_sizes(config, block_b=tile.b, block_h=tile.h, block_q=tile.i))
    h = min(tile.h, kv_heads)
    if kv_heads % h:
        raise ValueError(
            f"config wants a block_h that divides {kv_heads} key heads, got {h}"
        )
    # Equal strips: 300 rows are two of 150, not one of 256 and one of padding.
    return Tile(tile.b, h, -(-nq // -(-nq // min(tile.i, nq))))


def operands(attention: AttentionMap, **vectors: jax.Array) -> Operands:
    """The arrays of `attention`, and the caller's, with their axes as `_AXES` says."""
    _, heads, kv_heads, _, _ = attention.shape
    group = heads // kv_heads
    # [B, N, H, D] -> [B, Hkv, G, N, D], so that a tile is one matrix product.
    by_query_head = lambda x: jnp.moveaxis(
        x.reshape(*x.shape[:2], kv_heads, group, x.shape[3]), 1, 3
    )
    split = lambda x: x.reshape(
        x.shape[0], *((1, 1) if x.shape[1] == 1 else (kv_heads, group)), *x.shape[2:]
    )
    found = {
        "q": by_query_head(attention.q),
        "k": jnp.moveaxis(attention.k, 1, 2),
        "positions": attention.query_positions(),
        "weights": attention.fusion_weights().reshape(-1, kv_heads, group),
        "key_mask": attention.key_mask,
        "threshold": attention.threshold,
    }
    if attention.v is not None and attention.dout is not None:
        found |= {
            "v": jnp.moveaxis(attention.v, 1, 2),
            "dout": by_query_head(attention.dout),
        }
    for name in ("lse", "mask", "bias"):
        x = getattr(attention, name)
        found[name] = None if x is None else split(x)
    return {name: x for name, x in (found | vectors).items() if x is not None}


def blocked(
    function: Callable[[Operands], Any],
    operands: Operands,
    axis: str,
    block: int,
    combine: Literal["stack", "sum", "max", "min"],
    out_axis: int = 0,
) -> Any:
    """`function` of blocks of `operands` along a named axis, combined.

    Args:
      function: operands of one block -> pytree of arrays.
      operands: the whole operands.
      axis: the letter of the axis to walk along.
      block: its block length; the last block is padded with zeros.
      combine: "stack" joins the results along their `out_axis` and cuts the padding
        off; the others reduce them elementwise.
      out_axis: where the walked axis lies in the results of "stack".

    Each block is rematerialised when differentiated, so that a gradient too holds
    one tile at a time.
    """
    at = {name: _AXES[name].find(axis) for name in operands}
    size = max(x.shape[at[name]] for name, x in operands.items() if at[name] >= 0)
    count = -(-size // block)
    if count == 1:
        return function(operands)

    whole, xs = {}, {}
    for name, x in operands.items():
        # Length one means broadcast along this axis.
        if at[name] < 0 or x.shape[at[name]] == 1:
            whole[name] = x
            continue
        padding = [(0, 0)] * x.ndim
        padding[at[name]] = (0, count * block - size)
        x = jnp.pad(x, padding)
        shape = (*x.shape[: at[name]], count, block, *x.shape[at[name] + 1 :])
        xs[name] = jnp.moveaxis(x.reshape(shape), at[name], 0)
    step = jax.checkpoint(lambda whole, part: function(whole | part), prevent_cse=False)

    if combine == "stack":
        _, ys = jax.lax.scan(lambda _, part: (None, step(whole, part)), None, xs)

        def join(y):
            y = jnp.moveaxis(y, 0, out_axis)
            shape = (*y.shape[:out_axis], -1, *y.shape[out_axis + 2 :])
            return jax.lax.slice_in_dim(y.reshape(shape), 0, size, axis=out_axis)

        return jax.tree.map(join, ys)

    reduce = _REDUCTIONS[combine]
    start = {"sum": 0.0, "max": -math.inf, "min": math.inf}[combine]
    first = {name: x[0] for name, x in xs.items()}
    # `full_like` of the abstract result also carries how it varies over a mesh.
    init = jax.tree.map(
        lambda y: jnp.full_like(y, start), jax.eval_shape(step, whole, first)
    )
    body = lambda carry, part: (
        jax.tree.map(reduce, carry, step(whole, part)),
        None,
    )
    return jax.lax.scan(body, init, xs)[0]


def bands(
    attention: AttentionMap, x: Operands, block: int
) -> list[tuple[Operands, int, int]]:
    """Parts of the queries, each with only the keys its causal mask or window reaches.

    Strips of a static width cannot end at the diagonal; a few widths come near it.

    Returns:
      For each part, in order: its operands, and the first and past-the-last key.
    """
    nq, nk = x["q"].shape[3], x["k"].shape[2]
    left, right = attention.window or (None, None)
    if attention.causal:
        right = 0 if right is None else min(right, 0)
    unbounded = left is None and right is None
    count = _TRIANGLE_BANDS if None in (left, right) else _WINDOW_BANDS
    count = min(count, nq // (2 * block))
    if count < 2 or unbounded or attention.positions is not None:
        return [(x, 0, nk)]
    size = block * -(-nq // (count * block))
    found = []
    for start in range(0, nq, size):
        stop = min(start + size, nq)
        first, last = start + attention.q_offset, stop - 1 + attention.q_offset
        low = 0 if left is None else min(max(first - left, 0), nk - 1)
        high = nk if right is None else min(last + right + 1, nk)
        high = max(high, low + 1)
        part = dict(x)
        for axis, begin, end in (("i", start, stop), ("j", low, high)):
            for name, y in part.items():
                at = _AXES[name].find(axis)
                if at >= 0 and y.shape[at] > 1:
                    part[name] = jax.lax.slice_in_dim(y, begin, end, axis=at)
        part["positions"] = part["positions"] - low
        found.append((part, low, high))
    return found


def scores(attention: AttentionMap, x: Operands) -> jax.Array:
    """The softmax's argument on a tile, `[b, h, g, i, j]`; -inf where masked."""
    s = _products(attention, x["q"], x["k"]) * attention.scale
    if attention.softcap is not None:
        s = attention.softcap * jnp.tanh(s / attention.softcap)
    if "bias" in x:
        s = s + x["bias"].astype(s.dtype)
    ok = _allowed(attention, x)
    return s if ok is None else jnp.where(ok, s, -jnp.inf)


def softmax(attention: AttentionMap, x: Operands) -> tuple[jax.Array, jax.Array | None]:
    """exp(scores) up to a factor per row, and that factor `[b, h, g, i]`.

    The factor is None, meaning one, where `lse` is among the operands.
    """
    s = scores(attention, x)
    if "lse" in x:
        return _exp(s, jnp.where(x["lse"] == -jnp.inf, 0.0, x["lse"])), None
    e, _, total = _exponentials(s)
    # A row that sums to zero attends nothing; one that sums to NaN is NaN already
    # where it attends, and a NaN factor would carry that to the masked keys.
    usable = (total > 0.0) & (total < jnp.inf)
    return e, 1.0 / jnp.where(usable, total, 1.0)


def log_normaliser(attention: AttentionMap, x: Operands) -> jax.Array:
    """The logsumexp of the scores on a tile, `[b, h, g, i]`."""
    _, top, total = _exponentials(scores(attention, x))
    some = total != 0.0
    return jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)


def probabilities(attention: AttentionMap, x: Operands) -> tuple[jax.Array, jax.Array]:
    """P on a tile, `[b, h, g, i, j]`, and its logarithm; -inf where masked."""
    s = scores(attention, x)
    e, top, total = _exponentials(s)
    total = jnp.where(total == 0.0, 1.0, total)
    log_p = s - (top + jnp.log(total))[..., None]
    # In a row that holds a NaN, the masked keys still have no probability.
    return jnp.where(s == -jnp.inf, 0.0, e / total[..., None]), log_p


def relevance(
    attention: AttentionMap, x: Operands
) -> tuple[jax.Array, jax.Array | None]:
    """T(P) on a tile up to a factor per row, and that factor or None for one."""
    e, factor = softmax(attention, x)
    if attention.relevance == "attention":
        return e, factor
    gradient = _products(attention, x["dout"], x["v"])
    if attention.relevance == "relu_gradient_x_attention":
        gradient = positive_part(gradient)
    # An unattended key contributes nothing, whatever its value vector holds.
    return jnp.where(e == 0.0, 0.0, e * gradient), factor


def fused(attention: AttentionMap, x: Operands, block_h: int) -> jax.Array:
    """The fused matrix F on a tile, `[b, i, j]`, its heads `block_h` at a time."""

    def some_heads(x):
        t, factor = relevance(attention, x)
        if attention.head_fusion in ("max", "min"):
            t = t if factor is None else t * factor[..., None]
            heads = jnp.unstack(t.reshape(t.shape[0], -1, *t.shape[3:]), axis=1)
            return functools.reduce(_REDUCTIONS[attention.head_fusion], heads)
        return jnp.einsum(
            "bhgi,bhgij->bij", row_weights(x, factor), t, precision="highest"
        )

    combine = attention.head_fusion
    combine = combine if combine in ("max", "min") else "sum"
    out = blocked(some_heads, x, "h", block_h, combine)
    if "threshold" in x:
        threshold = x["threshold"][:, None, None].astype(out.dtype)
        out = jnp.where(out < threshold, 0.0, out)
    return out


def row_weights(x: Operands, factor: jax.Array | None) -> jax.Array:
    """The fusion weight of each head's row times its softmax factor."""
    shape = (x["q"].shape[0], *x["q"].shape[1:4])
    weights = x["weights"][..., None]
    return jnp.broadcast_to(weights if factor is None else weights * factor, shape)


def _exponentials(s):
    """exp(s - top), top and the row sums, with a top of 0 for a masked row."""
    top = jax.lax.stop_gradient(jnp.max(s, -1))
    top = jnp.where(top == -jnp.inf, 0.0, top)
    e = _exp(s, top)
    return e, top, jnp.sum(e, -1)


def _exp(s, shift):
    # Masked scores give zero even in a row whose shift is NaN.
    return jnp.where(s == -jnp.inf, 0.0, jnp.exp(s - shift[..., None]))


def _products(attention, x, y):
    return jnp.einsum(
        "bhgid,bhjd->bhgij",
        x,
        y,
        precision="highest",
        preferred_element_type=attention.dtype,
    )


def _allowed(attention, x):
    tests = []
    if attention.causal or attention.window is not None:
        i = x["positions"][:, None, None, :, None]
        j = jnp.arange(x["k"].shape[2], dtype=jnp.int32)[None, None, None, None]
        left, right = attention.window or (None, None)
        if attention.causal:
            tests.append(j <= i)
        if left is not None:
            tests.append(j >= i - left)
        if right is not None:
            tests.append(j <= i + right)
    if "key_mask" in x:
        tests.append(x["key_mask"][:, None, None, None])
    if "mask" in x:
        tests.append(x["mask"])
    ok = None
    for test in tests:
        ok = test if ok is None else ok & test
    return ok
