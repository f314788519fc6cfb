"""DINOv2 (Oquab et al., 2023, arXiv 2304.07193), also with register tokens (Darcet et
al., 2023, arXiv 2309.16588), as transformers publishes it.

Ordinary Flax NNX, written for one image; `jax.vmap` makes the batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xviz_jax.models import layers
from xviz_jax.models.vit import positions
from xviz_jax.models.vit.modeling import Attention, PatchEmbedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the network.

    Attributes:
      width: Of a token.
      depth: Number of layers.
      heads: Of each layer's attention.
      hidden: Width inside the MLP.
      swiglu: Whether the MLP is gated (Shazeer, 2020, arXiv 2002.05202).
      activation: Of the MLP that is not gated.
      epsilon: Of the layer norms.
      qkv_bias: Whether query, key and value have a bias.
      patch: Height and width of a patch, in pixels.
      grid: Rows and columns of the table of positions.
      channels: Of the image.
      registers: Number of register tokens, after the class token.
      antialias: How positions are resized: see `positions.resize`.
      classes: Number of logits; None for a model without a head.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    swiglu: bool
    activation: str
    epsilon: float
    qkv_bias: bool
    patch: tuple[int, int]
    grid: tuple[int, int]
    channels: int
    registers: int
    antialias: bool
    classes: int | None


class Embeddings(nnx.Module):
    """An image's tokens: class token, registers, patches."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the embeddings from `rngs`."""
        self.grid, self.antialias = config.grid, config.antialias
        self.patches = PatchEmbedding(
            config.channels, config.width, config.patch, dtype=dtype, rngs=rngs
        )
        init, width = nnx.initializers.normal(0.02), config.width
        length = 1 + config.grid[0] * config.grid[1]
        self.class_token = nnx.Param(init(rngs.params(), (1, width), dtype))
        self.position = nnx.Param(init(rngs.params(), (length, width), dtype))
        if config.registers:
            shape = (config.registers, width)
            self.registers = nnx.Param(init(rngs.params(), shape, dtype))

    def __call__(self, image: jax.Array) -> jax.Array:
        """Maps an image [height, width, channels] to tokens [length, width].

        Positions are resized where the image does not have the table's patches.
        Registers have none.
        """
        patches = self.patches(image)
        rows, columns, width = patches.shape
        position = self.position[...]
        table = position[1:].reshape(*self.grid, width)
        patches = patches + positions.resize(
            table, (rows, columns), antialias=self.antialias
        )
        tokens = [self.class_token[...] + position[:1]]
        if hasattr(self, "registers"):
            tokens.append(self.registers[...])
        return jnp.concatenate([*tokens, patches.reshape(rows * columns, width)])


class MLP(nnx.Module):
    """Two linear maps with an activation between."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the maps from `rngs`."""
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.activation = config.activation
        self.up = nnx.Linear(config.width, config.hidden, **like)
        self.down = nnx.Linear(config.hidden, config.width, **like)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [length, width] to tokens of the same shape."""
        return self.down(layers.ACTIVATIONS[self.activation](self.up(x)))


class SwiGLU(nnx.Module):
    """An MLP whose hidden values are gated."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the maps from `rngs`."""
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.gate = nnx.Linear(config.width, config.hidden, **like)
        self.up = nnx.Linear(config.width, config.hidden, **like)
        self.down = nnx.Linear(config.hidden, config.width, **like)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [length, width] to tokens of the same shape."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """One pre-norm encoder layer with scaled branches."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the layer's weights from `rngs`."""
        norm = {"epsilon": config.epsilon, "rngs": rngs}
        ones = jnp.ones(config.width, dtype)
        self.attention_norm = layers.LayerNorm(config.width, **norm)
        self.attention = Attention(
            config.width,
            config.heads,
            qkv_bias=config.qkv_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.attention_scale = nnx.Param(ones)
        self.mlp_norm = layers.LayerNorm(config.width, **norm)
        kind = SwiGLU if config.swiglu else MLP
        self.mlp = kind(config, dtype=dtype, rngs=rngs)
        self.mlp_scale = nnx.Param(ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [length, width] to tokens of the same shape."""
        x = x + self.attention(self.attention_norm(x)) * self.attention_scale[None]
        return x + self.mlp(self.mlp_norm(x)) * self.mlp_scale[None]


class Dinov2(nnx.Module):
    """Maps one image to tokens, and to logits or the class token's features."""

    def __init__(self, config: Config, *, dtype: Any, scan: bool, rngs: nnx.Rngs):
        """Draws all weights from `rngs`."""
        self.config = config
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        self.layers = layers.stack(
            lambda rngs: Layer(config, dtype=dtype, rngs=rngs),
            config.depth,
            scan=scan,
            rngs=rngs,
        )
        self.norm = layers.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        if config.classes is not None:
            self.head = nnx.Linear(
                2 * config.width,
                config.classes,
                dtype=dtype,
                param_dtype=dtype,
                rngs=rngs,
            )

    def encode(self, image: jax.Array) -> jax.Array:
        """Maps an image [height, width, channels] to tokens [length, width].

        Class token, registers, then patches row by row.
        """
        return self.norm(layers.run(self.layers, self.embeddings(image)))

    def __call__(self, image: jax.Array) -> jax.Array:
        """Maps an image [height, width, channels] to logits [classes].

        The head sees the class token and the mean of the patches. A model without a
        head gives the class token's features.
        """
        tokens = self.encode(image)
        if self.config.classes is None:
            return tokens[0]
        patches = tokens[1 + self.config.registers :]
        return self.head(jnp.concatenate([tokens[0], patches.mean(axis=0)]))
