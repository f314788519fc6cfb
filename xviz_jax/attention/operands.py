"""What kernels take of a layer that is kept as queries and keys."""

from typing import Any

import jax.numpy as jnp

from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.stack import Layer

# What kernels of one layer call the stacks of those of several.
SINGLE = {
    "qs": "q",
    "ks": "k",
    "vs": "v",
    "douts": "dout",
    "masks": "mask",
    "biases": "bias",
    "key_masks": "key_mask",
    "head_weights": "head_weights",
    "thresholds": "threshold",
}
_SINGULAR = {"masks": "mask", "biases": "bias", "key_masks": "key_mask"}


def stacks_of(layer: Layer, fusion: Fusion) -> dict[str, Any]:
    """Array arguments of `rollout_rows`."""
    values = dict(layer.values)
    stacks = {"qs": values["query"], "ks": values["key"]}
    if fusion.relevance != "attention":
        stacks["vs"] = values["value"]
        # Kernels share keys and values among as many heads.
        heads = max(stacks["ks"].shape[-2], stacks["vs"].shape[-2])
        for name in ("ks", "vs"):
            times = heads // stacks[name].shape[-2]
            if times > 1:
                stacks[name] = jnp.repeat(stacks[name], times, axis=-2)
        # The gradient of a 16-bit output has no more than 16 bits.
        stacks["douts"] = values["output_cotangent"].astype(values["value"].dtype)
    if len({array.dtype for array in stacks.values()}) > 1:
        stacks = {n: array.astype(jnp.float32) for n, array in stacks.items()}
    for name, plural in (("remaining_mask", "masks"), ("bias", "biases")):
        if name not in values:
            continue
        array = values[name]
        if name == "remaining_mask" and array.shape[-3:-1] == (1, 1):
            plural, array = "key_masks", array[..., 0, 0, :]
        stacks[plural] = array
    every = layer.count or 1
    if fusion.head_weights is not None:
        shape = (every, *fusion.head_weights.shape)
        own = jnp.broadcast_to(fusion.head_weights, shape)
        stacks["head_weights"] = own if layer.count is not None else own[0]
    if fusion.rectify:
        own = jnp.zeros((every, 1), jnp.float32)
        stacks["thresholds"] = own if layer.count is not None else own[0]
    if layer.count is None:
        return {name: [array] for name, array in stacks.items()}
    options = {}
    for name, array in stacks.items():
        if len(array) == layer.count:
            options[name] = array
        elif name in _SINGULAR:
            options[_SINGULAR[name]] = array[0]
        else:
            options[name] = jnp.broadcast_to(array, (layer.count, *array.shape[1:]))
    return options


def scoring(layer: Layer) -> dict[str, Any]:
    """How a kernel makes a layer's probabilities of its queries and keys."""
    return {
        "causal": bool(layer.site.causal),
        "window": layer.site.window,
        "scale": layer.site.scale,
        "softcap": layer.site.softcap,
    }
