"""Rows carried through layers of attention, from the last to the first."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.masking import attended
from xviz_jax.attention.operands import SINGLE, scoring, stacks_of
from xviz_jax.attention.queries import one_hot, row_weights
from xviz_jax.attention.stack import Layer
from xviz_jax.kernels.attention_col_product import attention_col_product
from xviz_jax.kernels.attention_fused_matrix import attention_fused_matrix
from xviz_jax.kernels.attention_fused_quantile import attention_fused_quantile
from xviz_jax.kernels.attention_row_product import attention_row_product
from xviz_jax.kernels.rollout_rows import rollout_rows
from xviz_jax.tracing.site import positions


def propagate(
    layers: Sequence[Layer],
    query: int | jax.Array,
    fusion: Fusion,
    *,
    residual: Literal["add"] | float,
    normalize: bool = False,
) -> jax.Array:
    """A row of the product of all layers, from the last to the first.

    Args:
      layers: As `capture` gives them, at least one.
      query: Which row; or weights of rows, float `[length]`.
      fusion: How heads are fused.
      residual: As in `kernels.rollout_rows`.
      normalize: Whether rows of each layer are divided by their sums, where these
        are not one anyway.

    Returns:
      The row, float32 `[length]`.
    """
    length = layers[-1].site.shape[-1]
    weighed = jnp.ndim(query) == 1
    start = jnp.asarray(query) if weighed else one_hot(query, length)
    normalize = normalize and not fusion.keeps_sums
    row = start if weighed else None
    for layer in reversed(layers):
        if _is_at_hand(layer):
            begin = start if row is None else row
            row = _dense(layer, begin, residual, normalize, fusion)
            continue
        rows = row[None, None] if row is not None else jnp.asarray(query)[None]
        options = stacks_of(layer, fusion)
        row = rollout_rows(
            **options,
            rows=rows,
            residual=residual,
            normalize=normalize,
            discard_ratio=fusion.discard_ratio,
            head_fusion=fusion.heads,
            relevance=fusion.relevance,
            **scoring(layer),
        )[0][0, 0]
    assert row is not None
    return row


def each(layers: Sequence[Layer], query: int | jax.Array, fusion: Fusion) -> jax.Array:
    """The same row, or weighted sum of rows, of every layer by itself.

    Args:
      layers: As `capture` gives them, at least one, over the same sequences.
      query: As for `propagate`.
      fusion: How heads are fused.

    Returns:
      Rows of the fused matrices, first layer first, float32 `[depth, keys]`.
    """
    queries, _ = positions(layers[0].site)
    share = row_weights(query, queries)
    return jnp.concatenate(apart(layers, lambda layer: through(layer, share, fusion)))


def apart(layers: Sequence[Layer], function: Callable[[Layer], Any]) -> list[Any]:
    """What a function makes of every layer by itself, a loop's one after another.

    Args:
      layers: As `capture` gives them, at least one.
      function: Takes a layer without an axis of layers.

    Returns:
      For each of `layers`, results with an axis of its layers in front.
    """
    found = []
    for layer in layers:
        if layer.count is None:
            found.append(jax.tree.map(lambda leaf: leaf[None], function(layer)))
            continue
        own, same = split(layer)

        def turn(own: Any, layer: Layer = layer, same: Any = same) -> Any:
            return function(Layer(layer.site, None, {**same, **own}))

        found.append(jax.lax.map(turn, own))
    return found


def product(
    layers: Sequence[Layer],
    fusion: Fusion,
    *,
    residual: Literal["add"] | float,
    normalize: bool = False,
) -> jax.Array:
    """The product of all layers, every row of it.

    Args:
      layers: As `capture` gives them, at least one.
      fusion: How heads are fused.
      residual: As in `kernels.rollout_rows`.
      normalize: As for `propagate`.

    Returns:
      The matrix, float32 `[query, key]`; rows of padding, which no query may attend,
      are zero.
    """

    def through(below: jax.Array, layer: Layer) -> jax.Array:
        step = _mixed(layer, fusion, residual, normalize)
        return jnp.matmul(step, below, precision="highest")

    found = jnp.eye(layers[-1].site.shape[-1], dtype=jnp.float32)
    for layer in layers:
        if layer.count is None:
            found = through(found, layer)
            continue
        own, same = split(layer)

        def turn(below: jax.Array, own: Any, layer=layer, same=same) -> Any:
            return through(below, Layer(layer.site, None, {**same, **own})), None

        found, _ = jax.lax.scan(turn, found, own)
    # A product, so that what is no number stays none.
    return found * attended(layers).astype(jnp.float32)[:, None]


def matrices(
    layers: Sequence[Layer],
    fusion: Fusion,
    *,
    residual: Literal["add"] | float,
    normalize: bool = False,
) -> jax.Array:
    """The factors of `product`, first layer first, float32 `[depth, query, key]`."""
    one = lambda layer: _mixed(layer, fusion, residual, normalize)
    return jnp.concatenate(apart(layers, one))


def _mixed(
    layer: Layer, fusion: Fusion, residual: Literal["add"] | float, normalize: bool
) -> jax.Array:
    """The fused map of one layer with its share of the identity."""
    kept, mixed = shares(residual)
    identity = jnp.eye(layer.site.shape[-1], dtype=jnp.float32)
    step = kept * identity + mixed * matrix(layer, fusion)
    if normalize and not fusion.keeps_sums:
        total = jnp.sum(step, axis=-1, keepdims=True)
        step = step / jnp.where(total == 0, 1, total)
    return step


def _is_at_hand(layer: Layer) -> bool:
    """Whether a layer's map was read, and is not to be made of queries and keys."""
    return "probabilities" in layer.values or "relevance" in layer.values


def split(layer: Layer) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """What each of several layers has of its own, and what all have alike."""
    own = {n: a for n, a in layer.values.items() if len(a) == layer.count}
    return own, {n: a[0] for n, a in layer.values.items() if n not in own}


def shares(residual: Literal["add"] | float) -> tuple[float, float]:
    """Of the identity and of attention."""
    return (1.0, 1.0) if residual == "add" else (residual, 1 - residual)


@dataclasses.dataclass(frozen=True, eq=False)
class Fused:
    """The fused map of one layer, at hand or made tile by tile.

    Attributes:
      map: float32 `[query, key]`, if it is at hand.
      operands: Else what kernels make it of.
    """

    map: jax.Array | None
    operands: dict[str, Any]

    def through(self, row: jax.Array) -> jax.Array:
        """Rows `[..., query]` times the map, float32 `[..., key]`."""
        if self.map is not None:
            return jnp.matmul(row, self.map, precision="highest")
        found = attention_row_product(
            row.reshape(1, -1, row.shape[-1]), **self.operands
        )
        return found.reshape(*row.shape[:-1], -1)

    def sums(self) -> jax.Array:
        """Of each row, float32 `[query]`."""
        if self.map is not None:
            return jnp.sum(self.map, axis=-1)
        ones = jnp.ones((1, 1, self.operands["k"].shape[1]), jnp.float32)
        return attention_col_product(ones, **self.operands)[0, 0]


def fused(layer: Layer, fusion: Fusion) -> Fused:
    """The map of one layer with its heads fused."""
    if _is_at_hand(layer):
        return Fused(fusion.of_layer(layer.values), {})
    options = {SINGLE[n]: stack[0] for n, stack in stacks_of(layer, fusion).items()}
    options |= scoring(layer)
    options |= {"relevance": fusion.relevance, "head_fusion": fusion.heads}
    if fusion.discard_ratio:
        ratio = fusion.discard_ratio
        options["threshold"] = attention_fused_quantile(ratio=ratio, **options)
    return Fused(None, options)


def matrix(layer: Layer, fusion: Fusion) -> jax.Array:
    """The fused map of one layer, float32 `[query, key]`."""
    made = fused(layer, fusion)
    return attention_fused_matrix(**made.operands)[0] if made.map is None else made.map


def through(layer: Layer, row: jax.Array, fusion: Fusion) -> jax.Array:
    """Rows `[..., query]` times the fused map of one layer, float32 `[..., key]`."""
    return fused(layer, fusion).through(row)


def _dense(
    layer: Layer,
    row: jax.Array,
    residual: Literal["add"] | float,
    normalize: bool,
    fusion: Fusion,
) -> jax.Array:
    """Rows through layers of which the maps are at hand."""
    arrays = layer.values
    turns = [arrays]
    if layer.count is not None:
        turns = [
            {n: array[turn if len(array) > 1 else 0] for n, array in arrays.items()}
            for turn in range(layer.count)
        ]
    kept, mixed = shares(residual)
    for values in reversed(turns):
        fused = fusion.of_layer(values)
        if normalize:
            total = kept + mixed * jnp.sum(fused, axis=-1)
            row = row / jnp.where(total == 0, 1, total)
        if layer.count is None:
            carried = jnp.matmul(row, fused, precision="highest")
        else:
            # For a product, XLA would copy the map out of its stack. (A sum it would
            # fuse with what makes a map of its own, and keep all heads that long.)
            carried = jnp.sum(row[:, None] * fused, axis=0)
        row = kept * row + mixed * carried
    return row
