"""`attention_lse` in strips of query rows."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from xviz_jax.kernels import tiles
from xviz_jax.kernels.attention_map import AttentionMap


def attention_lse(
    attention: AttentionMap,
    *,
    config: Mapping[str, int] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """logsumexp of the scores over the keys, `[B, H, Nq]`."""
    del interpret
    tile = tiles.tile_sizes(attention, config)

    def heads(x):
        one = lambda x: tiles.log_normaliser(attention, x)
        return tiles.blocked(one, x, "h", tile.h, "stack", 1)

    def example(x):
        parts = tiles.bands(attention, x, tile.i)
        strips = [tiles.blocked(heads, x, "i", tile.i, "stack", 3) for x, _, _ in parts]
        return jnp.concatenate(strips, 3)

    lse = tiles.blocked(example, tiles.operands(attention), "b", tile.b, "stack")
    return lse.reshape(attention.q.shape[0], attention.q.shape[2], -1)
