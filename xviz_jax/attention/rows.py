"""Rows carried through layers of attention, from the last to the first."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from xviz_jax.attention.layers import Layer
from xviz_jax.kernels.attention_map import HeadFusion, Relevance
from xviz_jax.kernels.rollout_rows import rollout_rows

_SINGULAR = {"masks": "mask", "biases": "bias", "key_masks": "key_mask"}


def one_hot(query: int | jax.Array, length: int) -> jax.Array:
    """A row that is 1 at one position, float32 `[length]`; NaN outside the sequence.

    Raises:
      ValueError: If `query` is no position.
    """
    if isinstance(query, int) and not -length <= query < length:
        raise ValueError(
            f"`query` is a position from {-length} to {length - 1}, got {query}"
        )
    position = jnp.asarray(query)
    if position.shape != () or not jnp.issubdtype(position.dtype, jnp.integer):
        raise ValueError(
            f"`query` is one integer position, got {position.dtype} of shape "
            f"{position.shape}"
        )
    valid = (position >= -length) & (position < length)
    row = jax.nn.one_hot(position % length, length, dtype=jnp.float32)
    return jnp.where(valid, row, jnp.nan)


def propagate(
    layers: Sequence[Layer],
    query: int | jax.Array,
    *,
    residual: Literal["add"] | float,
    heads: HeadFusion,
    relevance: Relevance = "attention",
) -> jax.Array:
    """A row of the product of all layers, from the last to the first.

    Args:
      layers: As `capture` gives them, at least one.
      query: Which row.
      residual: As in `kernels.rollout_rows`.
      heads: How heads are fused. Rows of `max` and `min` are normalised.
      relevance: As in `kernels.rollout_rows`.

    Returns:
      The row, float32 `[length]`.
    """
    length = layers[-1].site.shape[-1]
    start = one_hot(query, length)
    row = None
    for layer in reversed(layers):
        if "probabilities" in layer.values:
            begin = start if row is None else row
            row = _dense(layer, begin, residual, heads, relevance)
            continue
        rows = row[None, None] if row is not None else jnp.asarray(query)[None]
        options = _options(layer, relevance)
        row = rollout_rows(
            **options,
            rows=rows,
            residual=residual,
            normalize=heads != "mean",
            head_fusion=heads,
            relevance=relevance,
            causal=bool(layer.site.causal),
            window=layer.site.window,
            scale=layer.site.scale,
            softcap=layer.site.softcap,
        )[0][0, 0]
    assert row is not None
    return row


def _options(layer: Layer, relevance: str) -> dict[str, Any]:
    """Array arguments of `rollout_rows`."""
    values = dict(layer.values)
    stacks = {"qs": values["query"], "ks": values["key"]}
    if relevance != "attention":
        stacks["vs"] = values["value"]
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


def _dense(
    layer: Layer,
    row: jax.Array,
    residual: Literal["add"] | float,
    heads: str,
    relevance: str,
) -> jax.Array:
    """Rows through layers of which the maps are at hand."""
    arrays = layer.values
    turns = [arrays]
    if layer.count is not None:
        turns = [
            {n: array[turn if len(array) > 1 else 0] for n, array in arrays.items()}
            for turn in range(layer.count)
        ]
    kept, mixed = 1.0, 1.0
    if residual != "add":
        kept, mixed = residual, 1 - residual
    for values in reversed(turns):
        fused = _fused(values, heads, relevance)
        if heads != "mean":
            total = kept + mixed * jnp.sum(fused, axis=-1)
            row = row / jnp.where(total > 0, total, 1)
        # Its rows sum to one otherwise, and still do with the identity mixed in.
        row = kept * row + mixed * jnp.matmul(row, fused, precision="highest")
    return row


def _fused(values: dict[str, jax.Array], heads: str, relevance: str) -> jax.Array:
    """The map of one layer with its heads fused, float32 `[length, length]`."""
    weights = values["probabilities"][0].astype(jnp.float32)
    if relevance != "attention":
        gradient = values.get("probabilities_cotangent")
        if gradient is None:
            group = weights.shape[0] // values["value"].shape[-2]
            value = jnp.repeat(values["value"][0].astype(jnp.float32), group, axis=1)
            gradient = jnp.einsum(
                "qhd,khd->hqk",
                values["output_cotangent"][0],
                value,
                precision="highest",
            )
        else:
            gradient = gradient[0]
        weights = jax.nn.relu(weights * gradient)
    fuse: dict[str, Callable] = {"mean": jnp.mean, "max": jnp.max, "min": jnp.min}
    return fuse[heads](weights, axis=0)


def diagnostics(row: jax.Array, query: int | jax.Array) -> dict[str, jax.Array]:
    """`mass`, the sum of a row, and `self_share`, the explained position's own."""
    own = jnp.sum(row * one_hot(query, row.shape[0]))
    return {"mass": jnp.sum(row), "self_share": own}
