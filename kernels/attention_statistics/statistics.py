"""The result of `attention_statistics`, and its definition on known scores."""

import dataclasses

import jax
import jax.numpy as jnp

# So many of the largest are looked for one after another, and not sorted.
_FEW = 4


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
    entropy = -jnp.where(p == zero, zero, p * log_p).sum(-1)
    # XLA's maximum overlooks NaN on a CPU.
    number = lambda found: jnp.where(
        jnp.isnan(entropy).reshape(*entropy.shape, *(1,) * (found.ndim - p.ndim + 1)),
        jnp.nan,
        found,
    )
    top_weights, top_keys = largest(p, top_k)
    top_weights = number(top_weights)
    marked_mass = zero if marked is None else jnp.where(marked, p, zero).sum(-1)
    return AttentionStatistics(
        entropy=entropy,
        distance=(p * distance).sum(-1),
        self_mass=jnp.where(distance == 0, p, zero).sum(-1),
        first_mass=p[..., 0],
        marked_mass=jnp.broadcast_to(marked_mass, p.shape[:-1]),
        maximum=number(p.max(-1)),
        top_keys=jnp.where(top_weights > 0.0, top_keys, -1),
        top_weights=top_weights,
    )


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
    shape = (1,) * (p.ndim - 1) + p.shape[-1:]
    index = jax.lax.broadcasted_iota(jnp.int32, shape, p.ndim - 1)
    tops, found = [], []
    for _ in range(count):
        tops.append(p.max(-1, keepdims=True))
        here = jnp.where(p == tops[-1], index, p.shape[-1])
        found.append(here.min(-1, keepdims=True))
        p = jnp.where(index == found[-1], -1, p)
    return jnp.concatenate(tops, -1), jnp.concatenate(found, -1)
