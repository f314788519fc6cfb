"""The result of `attention_statistics`, and its definition on known scores."""

import dataclasses

import jax
import jax.numpy as jnp


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
    keys = jax.lax.broadcasted_iota(
        jnp.int32, (1,) * (p.ndim - 1) + p.shape[-1:], p.ndim - 1
    )
    distance = jnp.abs(positions - keys)
    zero = jnp.zeros((), p.dtype)
    top_weights, top_keys = jax.lax.top_k(p, top_k)
    entropy = -jnp.where(p == zero, zero, p * log_p).sum(-1)
    marked_mass = zero if marked is None else jnp.where(marked, p, zero).sum(-1)
    return AttentionStatistics(
        entropy=entropy,
        distance=(p * distance.astype(p.dtype)).sum(-1),
        self_mass=jnp.where(distance == 0, p, zero).sum(-1),
        first_mass=p[..., 0],
        marked_mass=jnp.broadcast_to(marked_mass, p.shape[:-1]),
        # XLA's maximum overlooks NaN on a CPU.
        maximum=jnp.where(jnp.isnan(entropy), entropy, p.max(-1)),
        top_keys=jnp.where(top_weights > 0.0, top_keys.astype(jnp.int32), -1),
        top_weights=top_weights,
    )
