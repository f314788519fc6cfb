"""How the heads of a layer become one matrix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from xviz_jax.attention.layers import KeepOf
from xviz_jax.attention.masking import attended_in
from xviz_jax.attention.queries import Query
from xviz_jax.kernels.attention_map import HeadFusion, Relevance


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

    def of_layer(self, values: dict[str, jax.Array]) -> jax.Array:
        """The map of one layer with its heads fused, float32 `[length, length]`."""
        if "relevance" in values:
            fused = values["relevance"][0, 0]
        else:
            slopes = None if self.relevance == "attention" else gradient(values)
            fused = self.of_heads(values["probabilities"][0], slopes)[0]
        if self.discard_ratio:
            lowest = int(self.discard_ratio * fused.size)
            fused = jnp.where(fused < jnp.sort(fused, axis=None)[lowest], 0, fused)
        return jax.nn.relu(fused) if self.rectify else fused

    def inside(self, query: Query | None) -> KeepOf | None:
        """Fuses a layer's heads inside the model, as `keep` of `layers.capture`.

        None where heads are weighed, which are to be counted first; and for the mean
        of gradients, for which rows are padding's is told by the maps.
        """
        if self.head_weights is not None:
            return None
        if self.relevance == "attention":
            return lambda site, values: {
                "probabilities": self.of_heads(values["probabilities"]),
                "attended": attended_in(site, values),
            }
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
