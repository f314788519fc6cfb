"""What a layer of attention lets be seen."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from xviz_jax.attention.stack import Layer, pick
from xviz_jax.tracing import Site
from xviz_jax.tracing.site import positions

# What is added to the scores of keys that are not to be seen is at most this: -1e4 of
# products that are scaled later is less, and in float32 an exponential of it is zero.
_MASKING_BIAS = -250.0


def attended(layers: Sequence[Layer]) -> jax.Array:
    """Which positions any query of the first layer may attend, bool `[length]`.

    Padding is what no query may.
    """
    layer = pick(layers, 0)
    return attended_in(layer.site, layer.values)


def attended_in(site: Site, values: Mapping[str, jax.Array]) -> jax.Array:
    """As `attended`, of the values of one layer: what masks it, or its map."""
    if "attended" in values:
        return values["attended"]
    masking = [name for name in ("bias", "remaining_mask") if name in site.values]
    told = site.scale is not None and all(name in values for name in masking)
    if "probabilities" in values and not told:
        return jnp.any(values["probabilities"] > 0, axis=(0, 1, 2))
    seen = jnp.ones(site.shape[-1], bool)
    if "remaining_mask" in values:
        mask = values["remaining_mask"]
        seen &= jnp.any(mask, axis=tuple(range(mask.ndim - 1)))
    if "bias" in values:
        bias = values["bias"]
        seen &= jnp.any(bias > _MASKING_BIAS, axis=tuple(range(bias.ndim - 1)))
    return seen


def seen(layer: Layer, position: jax.Array) -> jax.Array:
    """Which keys a query of one layer attends, bool `[heads or 1, length]`."""
    values, site = layer.values, layer.site
    if "probabilities" in values:
        return values["probabilities"][0][:, position] > 0
    # The last query sees up to the last key, however many there are of each.
    queries, keys = positions(site)
    ahead = jnp.arange(keys) - (keys - queries) - position
    allowed = jnp.ones(ahead.shape, bool)
    if site.causal:
        allowed &= ahead <= 0
    left, right = site.window or (None, None)
    if left is not None:
        allowed &= ahead >= -left
    if right is not None:
        allowed &= ahead <= right
    allowed = allowed[None]
    row = lambda array: array[0, :, position if array.shape[-2] > 1 else 0]
    if "remaining_mask" in values:
        allowed = allowed & row(values["remaining_mask"])
    if "bias" in values:
        allowed = allowed & (row(values["bias"]) > _MASKING_BIAS)
    return allowed
