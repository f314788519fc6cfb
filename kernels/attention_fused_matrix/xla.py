"""`attention_fused_matrix` in strips of query rows, a head at a time."""

from collections.abc import Mapping

import jax

from xviz_jax.kernels import tiles
from xviz_jax.kernels.attention_map import AttentionMap


def attention_fused_matrix(
    attention: AttentionMap,
    *,
    config: Mapping[str, int] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """F, `[B, Nq, Nk]`."""
    del interpret
    tile = tiles.tile_sizes(attention, config)
    strip = lambda x: tiles.fused(attention, x, tile.h)
    strips = lambda x: tiles.blocked(strip, x, "i", tile.i, "stack", 1)
    return tiles.blocked(strips, tiles.operands(attention), "b", tile.b, "stack")
