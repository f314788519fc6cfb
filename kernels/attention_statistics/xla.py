"""`attention_statistics` in strips of query rows."""

from collections.abc import Mapping

import jax

from xviz_jax.kernels import tiles
from xviz_jax.kernels.attention_map import AttentionMap
from xviz_jax.kernels.attention_statistics.statistics import (
    AttentionStatistics,
    summarise,
)


def attention_statistics(
    attention: AttentionMap,
    marked: jax.Array | None,
    top_k: int,
    *,
    config: Mapping[str, int] | None = None,
    interpret: bool = False,
) -> AttentionStatistics:
    """Statistics `[B, H, Nq]` of the probabilities of each head."""
    del interpret
    tile = tiles.tile_sizes(attention, config)

    def one(x):
        p, log_p = tiles.probabilities(attention, x)
        positions = x["positions"][:, None, None, :, None]
        flags = x["marked"][:, None, None, None] if "marked" in x else None
        return summarise(p, log_p, positions, flags, top_k)

    heads = lambda x: tiles.blocked(one, x, "h", tile.h, "stack", 1)
    strips = lambda x: tiles.blocked(heads, x, "i", tile.i, "stack", 3)
    vectors = {} if marked is None else {"marked": marked}
    x = tiles.operands(attention, **vectors)
    statistics = tiles.blocked(strips, x, "b", tile.b, "stack")
    join_heads = lambda y: y.reshape(y.shape[0], -1, *y.shape[3:])
    return jax.tree.map(join_heads, statistics)
