"""`attention_row_product` in strips of query rows.

In a linear fusion the softmax factor of a row and the weight of its head go into
the row's weight, so a tile of exponentials is written once and read once.
"""

import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from xviz_jax.kernels import tiles
from xviz_jax.kernels.attention_map import AttentionMap


def attention_row_product(
    r: jax.Array,
    attention: AttentionMap,
    *,
    precision: Literal["default", "fast"] = "default",
    config: Mapping[str, int] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`[B, M, Nq]` times F `[B, Nq, Nk]`."""
    del interpret
    tile = tiles.tile_sizes(attention, config)
    dot_precision = "highest" if precision == "default" else "default"

    def heads(x):
        t, factor = tiles.relevance(attention, x)
        weights = x["rows"][:, None, None] * tiles.row_weights(x, factor)[..., None, :]
        einsum = functools.partial(jnp.einsum, precision=dot_precision)
        if x["rows"].shape[1] > x["q"].shape[3]:
            return einsum("bhgmi,bhgij->bmj", weights, t)
        # Head by head, for one sum over all heads' rows would round more.
        return einsum("bhgmi,bhgij->bhgmj", weights, t).sum((1, 2))

    def strip(x):
        if attention.fuses_linearly:
            return tiles.blocked(heads, x, "h", tile.h, "sum")
        fused = tiles.fused(attention, x, tile.h)
        return jnp.matmul(x["rows"], fused, precision=dot_precision)

    def example(x):
        nk, total = x["k"].shape[2], 0.0
        for part, low, high in tiles.bands(attention, x, tile.i):
            columns = tiles.blocked(strip, part, "i", tile.i, "sum")
            total += jnp.pad(columns, ((0, 0), (0, 0), (low, nk - high)))
        return total

    x = tiles.operands(attention, rows=r)
    return tiles.blocked(example, x, "b", tile.b, "stack")
