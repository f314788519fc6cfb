"""The result of `attention_statistics`, and its definition on known scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

# So many of the largest are looked for one after another, and not sorted.
_FEW = 4
# Rows this long are cut into so many pieces, or up to twice as many.
_LONG = 256
_PIECES = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionStatistics:
    """One number per head and query, `[*batch, H, Nq]` in float32.

    Means over the queries say what a head does; a query that may attend nothing has
    zero everywhere.

    Attributes:
      entropy: of the row, in nats; log of the number of keys when uniform.
      distance: mean |query position - key position|, in tokens.
      self_mass: weight on the query's own position.
      first_mass: weight on key 0, the usual attention sink.
      marked_mass: weight on the marked keys, such as padding or separators.
      maximum: the largest weight.
      top_keys: int32 `[*batch, H, Nq, top_k]`, the keys of the largest weights, in
        falling order; the lower index first among equals, and -1 where fewer keys
        have any weight.
      top_weights: their weights, `[*batch, H, Nq, top_k]`.
    """

    entropy: jax.Array
    distance: jax.Array
    self_mass: jax.Array
    first_mass: jax.Array
    marked_mass: jax.Array
    maximum: jax.Array
    top_keys: jax.Array
    top_weights: jax.Array


def summarise(
    p: jax.Array,
    log_p: jax.Array,
    positions: jax.Array,
    marked: jax.Array | None,
    top_k: int,
) -> AttentionStatistics:
    """Statistics of rows of probabilities.

    Args:
      p: probabilities `[..., Nq, Nk]`.
      log_p: their logarithms, used where p is not zero.
      positions: of the queries among the keys, `[..., Nq, 1]`.
      marked: bool, broadcastable to p, or None for no marked key.
      top_k: how many keys to list.
    """
    shape = (1,) * (p.ndim - 1) + p.shape[-1:]
    keys = jax.lax.broadcasted_iota(p.dtype, shape, p.ndim - 1)
    distance = jnp.abs(positions.astype(p.dtype) - keys)
    zero = jnp.zeros((), p.dtype)
    entropy = -total(jnp.where(p == zero, zero, p * log_p))
    # XLA's maximum overlooks NaN on a CPU.
    number = lambda found: jnp.where(
        jnp.isnan(entropy).reshape(*entropy.shape, *(1,) * (found.ndim - p.ndim + 1)),
        jnp.nan,
        found,
    )
    top_weights, top_keys = largest(p, top_k)
    top_weights = number(top_weights)
    marked_mass = zero if marked is None else total(jnp.where(marked, p, zero))
    return AttentionStatistics(
        entropy=entropy,
        distance=total(p * distance),
        self_mass=total(jnp.where(distance == 0, p, zero)),
        first_mass=p[..., 0],
        marked_mass=jnp.broadcast_to(marked_mass, p.shape[:-1]),
        maximum=number(p.max(-1)),
        top_keys=jnp.where(top_weights > 0.0, top_keys, -1),
        top_weights=top_weights,
    )


def total(x: jax.Array) -> jax.Array:
    """The sum along the last axis."""
    return functools.reduce(jnp.add, (each for _, each in _pieces(x, 0))).sum(-1)


def largest(p: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest of non-negative numbers along the last axis, and where they are.

    As `jax.lax.top_k`, which for a few takes longer on a CPU.

    Args:
      p: `[..., n]`.
      count: how many, at most n.

    Returns:
      Numbers and int32 indices `[..., count]`, in falling order; the lower index
      first among equals.
    """
    if not 0 < count <= _FEW:
        return jax.lax.top_k(p, count)
    index = _index(p)
    tops, found = [], []
    for _ in range(count):
        top, where = _largest(p)
        tops.append(top)
        found.append(where)
        p = jnp.where(index == where, -1, p)
    return jnp.concatenate(tops, -1), jnp.concatenate(found, -1)


def _largest(p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest, and the first place where it is, `[..., 1]`."""
    (_, best), *others = _pieces(p, -1)
    begin = jnp.zeros(best.shape, jnp.int32)
    for first, piece in others:
        begin = jnp.where(piece > best, first, begin)
        best = jnp.maximum(best, piece)
    top = best.max(-1, keepdims=True)
    place = jnp.where(best == top, begin + _index(best), p.shape[-1])
    return top, place.min(-1, keepdims=True)


def _index(x: jax.Array) -> jax.Array:
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]
    return jax.lax.broadcasted_iota(jnp.int32, shape, x.ndim - 1)


def _pieces(x: jax.Array, fill: float) -> list[tuple[int, jax.Array]]:
    """Pieces of equal width along the last axis, and where they begin.

    XLA reduces a long last axis number by number on a CPU, but combines pieces by
    vectors. What the last one has of the one before is `fill`.
    """
    length = x.shape[-1]
    width = 1 << (length // _PIECES).bit_length() - 1 if length >= _LONG else length
    cut = lambda first: jax.lax.slice_in_dim(x, first, first + width, axis=x.ndim - 1)
    pieces = [(first, cut(first)) for first in range(0, length - width + 1, width)]
    if rest := length % width:
        own = _index(pieces[0][1]) >= width - rest
        pieces.append((length - width, jnp.where(own, cut(length - width), fill)))
    return pieces
