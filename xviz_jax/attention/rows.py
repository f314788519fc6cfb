"""Rows carried through layers of attention, from the last to the first."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from xviz_jax.attention.layers import KeepOf, Layer, attended
from xviz_jax.kernels.attention_fused_matrix import attention_fused_matrix
from xviz_jax.kernels.attention_fused_quantile import attention_fused_quantile
from xviz_jax.kernels.attention_map import HeadFusion, Relevance
from xviz_jax.kernels.rollout_rows import rollout_rows
from xviz_jax.tracing import pooling
from xviz_jax.tracing.program import trace

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
# One position, weights of rows, `mean`: all rows but padding's, alike; or `pooled`:
# as the model's output reads them.
Query = int | jax.Array | Literal["mean", "pooled"]
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


def resolve(
    query: Query, layers: Sequence[Layer], model: Callable, args: Sequence[Any]
) -> int | jax.Array:
    """A position, or weights of rows, as `propagate` takes them.

    Args:
      query: As a user gives it.
      layers: As `capture` gives them, all of the model's.
      model: Whose layers these are.
      args: Its positional arguments.

    Raises:
      ValueError: If it is neither a position nor weights of all rows, or if it is
        `pooled` and how the model pools is not found.
    """
    length = layers[-1].site.shape[-1]
    if isinstance(query, str):
        if query == "mean":
            return uniform(layers)
        if query != "pooled":
            raise ValueError(
                "`query` is a position, weights of rows, 'mean' or 'pooled', got "
                f"{query!r}"
            )
        query = pooling.weights(trace(model, tuple(args), {}))
    if jnp.ndim(query) == 1:
        return weights_of_rows(query, length)
    one_hot(query, length)
    return query


def weights_of_rows(query: int | jax.Array, length: int) -> jax.Array:
    """Weights of rows, float32 `[length]`.

    Raises:
      ValueError: If these are no floats, or not one for each row.
    """
    weights = jnp.asarray(query)
    if weights.shape != (length,) or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"weights of rows in `query` are float[{length}], got {weights.dtype}"
            f"{list(weights.shape)}"
        )
    return weights.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """How a layer's heads become one matrix, and what becomes of it.

    Attributes:
      heads: As `head_fusion` of `kernels.rollout_rows`.
      relevance: As in `kernels.rollout_rows`.
      head_weights: `[heads]`, the same in every layer, for `weighted`.
      rectify: Whether negative entries become zero once the heads are fused.
      discard_ratio: The fraction of entries of each fused map, its lowest, to zero.
    """

    heads: HeadFusion = "mean"
    relevance: Relevance = "attention"
    head_weights: jax.Array | None = None
    rectify: bool = False
    discard_ratio: float = 0.0

    def of_heads(
        self, maps: jax.Array, gradients: jax.Array | None = None
    ) -> jax.Array:
        """One map of several heads', float32 `[..., 1, query, key]`.

        Args:
          maps: `[..., heads, query, key]`.
          gradients: At the maps, where `relevance` needs them.
        """
        if self.relevance != "attention" and gradients is None:
            raise ValueError(f"`relevance` of {self.relevance!r} needs gradients")
        weights = maps.astype(jnp.float32)
        if gradients is not None:
            # A key that is not attended contributes nothing, whatever it holds.
            weights = jnp.where(weights == 0, 0, weights * gradients)
        if self.relevance == "relu_gradient_x_attention":
            weights = jax.nn.relu(weights)
        heads = weights.shape[-3]
        shares = self.head_weights
        if shares is None:
            share = 1 / heads if self.heads == "mean" else 1
            shares = jnp.full(heads, share, jnp.float32)
        fuse = {"max": jnp.maximum, "min": jnp.minimum}.get(self.heads)
        if fuse is None and gradients is not None:
            # A product: on a CPU, XLA computes a sum that a loop stacks on one core.
            fused = jnp.einsum("h,...hqk->...qk", shares, weights, precision="highest")
            return fused[..., None, :, :]
        # One after another: XLA would store what a reduction of all begins with.
        cut = lambda head: jax.lax.slice_in_dim(
            weights, head, head + 1, axis=weights.ndim - 3
        )
        each = (cut(head) * shares[head] for head in range(heads))
        return functools.reduce(fuse or jnp.add, each)

    def inside(self, query: Query | None) -> KeepOf | None:
        """Fuses a layer's heads inside the model, as `keep` of `layers.capture`.

        None where heads are weighed, which are to be counted first; and for the mean
        of gradients, for which rows are padding's is told by the maps.
        """
        if self.head_weights is not None:
            return None
        if self.relevance == "attention":
            plain = lambda values: self.of_heads(values["probabilities"])
            return lambda _, values: {"probabilities": plain(values)}
        if isinstance(query, str) and query == "mean":
            return None
        weighed = lambda values: self.of_heads(
            values["probabilities"], values["probabilities_cotangent"]
        )
        return lambda _, values: {"relevance": weighed(values)}

    @property
    def keeps_sums(self) -> bool:
        """Whether rows sum to one because those of attention do."""
        plain = self.heads == "mean" and self.relevance == "attention"
        return plain and not self.discard_ratio


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
      layers: As `capture` gives them, at least one.
      query: As for `propagate`.
      fusion: How heads are fused.

    Returns:
      Rows of the fused matrices, first layer first, float32 `[depth, length]`.
    """
    one = lambda layer: propagate([layer], query, fusion, residual=0.0)
    return jnp.concatenate(apart(layers, one))


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
    kept, mixed = _shares(residual)
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


def scoring(layer: Layer) -> dict[str, Any]:
    """How a kernel makes a layer's probabilities of its queries and keys."""
    return {
        "causal": bool(layer.site.causal),
        "window": layer.site.window,
        "scale": layer.site.scale,
        "softcap": layer.site.softcap,
    }


def _shares(residual: Literal["add"] | float) -> tuple[float, float]:
    """Of the identity and of attention."""
    return (1.0, 1.0) if residual == "add" else (residual, 1 - residual)


def matrix(layer: Layer, fusion: Fusion) -> jax.Array:
    """The fused map of one layer, float32 `[query, key]`."""
    if _is_at_hand(layer):
        return _fused(layer.values, fusion)
    options = {SINGLE[n]: stack[0] for n, stack in stacks_of(layer, fusion).items()}
    options |= scoring(layer)
    options |= {"relevance": fusion.relevance, "head_fusion": fusion.heads}
    if fusion.discard_ratio:
        ratio = fusion.discard_ratio
        options["threshold"] = attention_fused_quantile(ratio=ratio, **options)
    return attention_fused_matrix(**options)[0]


def stacks_of(layer: Layer, fusion: Fusion) -> dict[str, Any]:
    """Array arguments of `rollout_rows`."""
    values = dict(layer.values)
    stacks = {"qs": values["query"], "ks": values["key"]}
    if fusion.relevance != "attention":
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
    kept, mixed = _shares(residual)
    for values in reversed(turns):
        fused = _fused(values, fusion)
        if normalize:
            total = kept + mixed * jnp.sum(fused, axis=-1)
            row = row / jnp.where(total == 0, 1, total)
        # A sum: XLA would copy the map out of its stack for a product.
        row = kept * row + mixed * jnp.sum(row[:, None] * fused, axis=0)
    return row


def _fused(values: dict[str, jax.Array], fusion: Fusion) -> jax.Array:
    """The map of one layer with its heads fused, float32 `[length, length]`."""
    if "relevance" in values:
        fused = values["relevance"][0, 0]
    else:
        slopes = None if fusion.relevance == "attention" else gradient(values)
        fused = fusion.of_heads(values["probabilities"][0], slopes)[0]
    if fusion.discard_ratio:
        lowest = int(fusion.discard_ratio * fused.size)
        fused = jnp.where(fused < jnp.sort(fused, axis=None)[lowest], 0, fused)
    return jax.nn.relu(fused) if fusion.rectify else fused


def gradient(values: dict[str, jax.Array]) -> jax.Array:
    """The gradient at one layer's map, float32 `[heads, query, key]`."""
    if "probabilities_cotangent" in values:
        return values["probabilities_cotangent"][0].astype(jnp.float32)
    cotangent = values["output_cotangent"][0].astype(jnp.float32)
    group = cotangent.shape[-2] // values["value"].shape[-2]
    value = jnp.repeat(values["value"][0].astype(jnp.float32), group, axis=1)
    return jnp.einsum("qhd,khd->hqk", cotangent, value, precision="highest")


def gradient_row(values: dict[str, jax.Array], position: jax.Array) -> jax.Array:
    """The gradient at one query of one layer's map, float32 `[heads, key]`."""
    if "probabilities_cotangent" in values:
        return values["probabilities_cotangent"][0][:, position].astype(jnp.float32)
    cotangent = values["output_cotangent"][0][position].astype(jnp.float32)
    value = values["value"][0].astype(jnp.float32)
    cotangent = cotangent.reshape(value.shape[1], -1, value.shape[2])
    slope = jnp.einsum("hgd,khd->hgk", cotangent, value, precision="highest")
    return slope.reshape(-1, len(value))


def uniform(layers: Sequence[Layer]) -> jax.Array:
    """Equal weights of all rows but padding's, float32 `[length]`."""
    seen = attended(layers).astype(jnp.float32)
    return seen / jnp.maximum(jnp.sum(seen), 1)


def diagnostics(row: jax.Array, query: int | jax.Array) -> dict[str, jax.Array]:
    """`mass`, the sum of a row, and `self_share`, the explained position's own.

    Args:
      row: The scores.
      query: As `resolve` gives it.
    """
    own = jnp.sum(row * row_weights(query, row.shape[0]))
    return {"mass": jnp.sum(row), "self_share": own}


def row_weights(query: int | jax.Array, length: int) -> jax.Array:
    """What is resolved as weights of all rows, float32 `[length]`."""
    return jnp.asarray(query) if jnp.ndim(query) == 1 else one_hot(query, length)
