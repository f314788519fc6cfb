"""`attention_fused_quantile` by radix selection.

The bits of a float32, its sign folded in, are ordered as its value is. One pass over
F counts the upper 16 bits of its entries, which fixes those of the answer; a second
counts the lower 16 bits among the entries that share them. Both passes compute the
same strips, bit for bit, as `attention_row_product` with the same config does.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax.kernels import tiles
from xviz_jax.kernels.attention_map import AttentionMap

_BINS = 2**16
_SIGN = np.uint32(2**31)


def attention_fused_quantile(
    attention: AttentionMap, rank: int, *, config: Mapping[str, int] | None = None
) -> jax.Array:
    """The entry of F, `[B]`, that exactly `rank` entries precede in order."""
    if attention.dtype != jnp.float32:
        raise NotImplementedError(
            "q wants at most 32 bits for attention_fused_quantile"
        )
    tile = tiles.tile_sizes(attention, config)
    # Ones on the real rows: `blocked` pads them with zeros along with the queries.
    rows = jnp.ones((1, 1, attention.q.shape[1]), jnp.float32)

    def histogram(x, digit_of):
        def strip(x):
            bits = _ordered_bits(tiles.fused(attention, x, tile.h))
            digit = digit_of(bits)
            digit = jnp.where(x["rows"][:, 0, :, None] > 0.0, digit, _BINS)
            count = lambda d: jnp.zeros(_BINS, jnp.uint32).at[d].add(1, mode="drop")
            return jax.vmap(count)(digit.reshape(digit.shape[0], -1))

        return tiles.blocked(strip, x, "i", tile.i, "sum")

    def example(x):
        wanted = jnp.full((x["q"].shape[0],), rank, jnp.uint32)
        upper, before = _select(histogram(x, lambda bits: bits >> 16), wanted)
        shares = lambda bits: bits >> 16 == upper[:, None, None]
        lower_digit = lambda bits: jnp.where(shares(bits), bits & 0xFFFF, _BINS)
        lower, _ = _select(histogram(x, lower_digit), wanted - before)
        return _float_of((upper << 16) | lower)

    x = tiles.operands(attention, rows=rows)
    return tiles.blocked(example, x, "b", tile.b, "stack")


def _select(counts, rank):
    """The digit that holds rank `rank`, and how many entries lie in lower digits."""
    total = jnp.cumsum(counts, -1, dtype=jnp.uint32)
    digit = jnp.argmax(total > rank[:, None], -1)
    before = jnp.take_along_axis(total - counts, digit[:, None], -1)[:, 0]
    return digit.astype(jnp.uint32), before


def _ordered_bits(x):
    # Adding zero turns -0.0 into 0.0, which it equals.
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)
    return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)


def _float_of(bits):
    bits = jnp.where(bits >= _SIGN, bits ^ _SIGN, ~bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
