"""Vision transformers: ViT (Dosovitskiy et al., 2021, arXiv 2010.11929) and DeiT
(Touvron et al., 2021, arXiv 2012.12877), as transformers publishes them.

Ordinary Flax NNX, written for one image; `jax.vmap` makes the batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xviz_jax.models import layers
from xviz_jax.models.vit import positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the network.

    Attributes:
      width: Of a token.
      depth: Number of layers.
      heads: Of each layer's attention.
      hidden: Width inside the MLP.
      activation: Of the MLP.
      epsilon: Of the layer norms.
      qkv_bias: Whether query, key and value have a bias.
      patch: Height and width of a patch, in pixels.
      grid: Rows and columns of the table of positions.
      channels: Of the image.
      distilled: Whether a distillation token follows the class token.
      classes: Number of logits; None for a model without a head.
      teacher: Whether the distillation token has a head of its own, and logits are
        the mean of both.
      pooler: Width of the pooled class token, and the activation; None without.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    activation: str
    epsilon: float
    qkv_bias: bool
    patch: tuple[int, int]
    grid: tuple[int, int]
    channels: int
    distilled: bool
    classes: int | None
    teacher: bool
    pooler: tuple[int, str] | None


class PatchEmbedding(nnx.Module):
    """One token for each whole patch of an image; the rest of it is unseen."""

    def __init__(
        self,
        channels: int,
        width: int,
        patch: tuple[int, int],
        *,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        """Draws the projection from `rngs`."""
        self.projection = nnx.Conv(
            channels,
            width,
            patch,
            strides=patch,
            padding="VALID",
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, image: jax.Array) -> jax.Array:
        """Maps an image [height, width, channels] to [rows, columns, width].

        Raises:
          ValueError: If the image has the wrong form, or no whole patch.
        """
        convolution = self.projection
        patch, channels = tuple(convolution.kernel_size), convolution.in_features
        if image.ndim != 3 or image.shape[-1] != channels:
            raise ValueError(
                f"the model takes one image [height, width, {channels}], got shape "
                f"{image.shape}"
            )
        if image.shape[0] < patch[0] or image.shape[1] < patch[1]:
            raise ValueError(
                f"an image of {image.shape[0]} x {image.shape[1]} pixels has no whole "
                f"patch of {patch[0]} x {patch[1]}"
            )
        return convolution(image.astype(convolution.kernel[...].dtype))


class Embeddings(nnx.Module):
    """An image's tokens: class token, distillation token, patches."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the embeddings from `rngs`."""
        self.grid = config.grid
        self.patches = PatchEmbedding(
            config.channels, config.width, config.patch, dtype=dtype, rngs=rngs
        )
        init, width = nnx.initializers.normal(0.02), config.width
        self.class_token = nnx.Param(init(rngs.params(), (1, width), dtype))
        if config.distilled:
            self.distillation_token = nnx.Param(init(rngs.params(), (1, width), dtype))
        length = 1 + config.distilled + config.grid[0] * config.grid[1]
        self.position = nnx.Param(init(rngs.params(), (length, width), dtype))
        self.distilled = config.distilled

    def __call__(self, image: jax.Array) -> jax.Array:
        """Maps an image [height, width, channels] to tokens [length, width].

        Positions are resized where the image does not have the table's patches.
        """
        first = [self.class_token[...]]
        if self.distilled:
            first.append(self.distillation_token[...])
        patches = self.patches(image)
        rows, columns, width = patches.shape
        position = self.position[...]
        table = position[len(first) :].reshape(*self.grid, width)
        patches = patches + positions.resize(table, (rows, columns))
        prefix = jnp.concatenate(first) + position[: len(first)]
        return jnp.concatenate([prefix, patches.reshape(rows * columns, width)])


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(
        self, width: int, heads: int, *, qkv_bias: bool, dtype: Any, rngs: nnx.Rngs
    ):
        """Draws the projections from `rngs`."""
        self.heads = heads
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.query = nnx.Linear(width, width, use_bias=qkv_bias, **like)
        self.key = nnx.Linear(width, width, use_bias=qkv_bias, **like)
        self.value = nnx.Linear(width, width, use_bias=qkv_bias, **like)
        self.out = nnx.Linear(width, width, **like)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [length, width] to tokens of the same shape."""
        split = (x.shape[0], self.heads, x.shape[1] // self.heads)
        query, key, value = (
            project(x).reshape(split) for project in (self.query, self.key, self.value)
        )
        return self.out(layers.attend(query, key, value))


class Layer(nnx.Module):
    """One pre-norm encoder layer."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the layer's weights from `rngs`."""
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        norm = {"epsilon": config.epsilon, "rngs": rngs}
        self.activation = config.activation
        self.attention_norm = layers.LayerNorm(config.width, **norm)
        self.attention = Attention(
            config.width,
            config.heads,
            qkv_bias=config.qkv_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = layers.LayerNorm(config.width, **norm)
        self.up = nnx.Linear(config.width, config.hidden, **like)
        self.down = nnx.Linear(config.hidden, config.width, **like)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [length, width] to tokens of the same shape."""
        x = x + self.attention(self.attention_norm(x))
        hidden = layers.ACTIVATIONS[self.activation](self.up(self.mlp_norm(x)))
        return x + self.down(hidden)


class VisionTransformer(nnx.Module):
    """Maps one image to tokens, and to logits or pooled features."""

    def __init__(self, config: Config, *, dtype: Any, scan: bool, rngs: nnx.Rngs):
        """Draws all weights from `rngs`."""
        self.config = config
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        self.layers = layers.stack(
            lambda rngs: Layer(config, dtype=dtype, rngs=rngs),
            config.depth,
            scan=scan,
            rngs=rngs,
        )
        self.norm = layers.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        if config.pooler is not None:
            self.pooler = nnx.Linear(config.width, config.pooler[0], **like)
        if config.classes is not None:
            self.head = nnx.Linear(config.width, config.classes, **like)
        if config.teacher and config.classes is not None:
            self.distillation_head = nnx.Linear(config.width, config.classes, **like)

    def encode(self, image: jax.Array) -> jax.Array:
        """Maps an image [height, width, channels] to tokens [length, width].

        Class token, distillation token where there is one, then patches row by row.
        """
        return self.norm(layers.run(self.layers, self.embeddings(image)))

    def pool(self, tokens: jax.Array) -> jax.Array:
        """The class token's features, through the pooler where there is one."""
        if self.config.pooler is None:
            return tokens[0]
        return layers.ACTIVATIONS[self.config.pooler[1]](self.pooler(tokens[0]))

    def __call__(self, image: jax.Array) -> jax.Array:
        """Maps an image [height, width, channels] to logits [classes].

        A model without a head gives the pooled features.
        """
        tokens = self.encode(image)
        if self.config.classes is None:
            return self.pool(tokens)
        logits = self.head(tokens[0])
        if self.config.teacher:
            return (logits + self.distillation_head(tokens[1])) / 2
        return logits
