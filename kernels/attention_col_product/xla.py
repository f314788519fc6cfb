"""`attention_col_product` in strips of query rows."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from xviz_jax.kernels import tiles
from xviz_jax.kernels.attention_map import AttentionMap


def attention_col_product(
    columns: jax.Array,
    attention: AttentionMap,
    *,
    config: Mapping[str, int] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """F `[B, Nq, Nk]` times each row of `[B, M, Nk]`, as `[B, M, Nq]`."""
    del interpret
    tile = tiles.tile_sizes(attention, config)
    einsum = lambda *args: jnp.einsum(*args, precision="highest")

    def heads(x):
        t, factor = tiles.relevance(attention, x)
        products = einsum("bhgij,bmj->bhgim", t, x["columns"])
        return einsum("bhgim,bhgi->bim", products, tiles.row_weights(x, factor))

    def strip(x):
        if attention.fuses_linearly:
            return tiles.blocked(heads, x, "h", tile.h, "sum")
        return einsum("bij,bmj->bim", tiles.fused(attention, x, tile.h), x["columns"])

    def example(x):
        parts = tiles.bands(attention, x, tile.i)
        strips = [tiles.blocked(strip, x, "i", tile.i, "stack", 1) for x, _, _ in parts]
        return jnp.concatenate(strips, 1)

    x = tiles.operands(attention, columns=columns)
    return jnp.moveaxis(tiles.blocked(example, x, "b", tile.b, "stack"), 1, 2)
