"""A small vision transformer (Dosovitskiy et al., 2021, arXiv 2010.11929).

Ordinary Flax NNX, written for one image; `jax.vmap` makes the batch. It knows
nothing of attribution: the methods look into it from outside.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the network."""

    image_size: int = 28
    patch_size: int = 2
    width: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 2
    classes: int = 10
    pixel_mean: float = 0.286
    pixel_std: float = 0.353

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


def _waves(config: Config) -> jax.Array:
    """Sines and cosines of a patch's row and column, [grid * grid, width].

    The position table starts from them, and training moves it from there: from
    random values a network this small is slow to find out which patches touch.
    """
    frequencies = 100.0 ** -jnp.linspace(0, 1, config.width // 4)
    angles = jnp.outer(jnp.arange(config.grid, dtype=jnp.float32), frequencies)
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    rows = jnp.repeat(waves, config.grid, axis=0)
    columns = jnp.tile(waves, (config.grid, 1))
    return jnp.concatenate([rows, columns], axis=-1)


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draws the projections from `rngs`."""
        self.heads = config.heads
        self.qkv = nnx.Linear(config.width, 3 * config.width, rngs=rngs)
        self.out = nnx.Linear(config.width, config.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [length, width] to tokens of the same shape."""
        length, width = x.shape
        qkv = self.qkv(x).reshape(length, 3, self.heads, width // self.heads)
        query, key, value = jnp.unstack(qkv.transpose(1, 2, 0, 3))
        scale = (width // self.heads) ** -0.5
        logits = jnp.einsum("hqd,hkd->hqk", query * scale, key)
        mixed = jnp.einsum("hqk,hkd->hqd", jax.nn.softmax(logits), value)
        return self.out(mixed.transpose(1, 0, 2).reshape(length, width))


class Block(nnx.Module):
    """One pre-norm encoder layer."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draws the layer's weights from `rngs`."""
        hidden = config.mlp_ratio * config.width
        self.attention_norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.up = nnx.Linear(config.width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, config.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [length, width] to tokens of the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class VisionTransformer(nnx.Module):
    """Maps one image [size, size] with values in [0, 1] to class logits."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draws all weights from `rngs`."""
        self.config = config
        init = nnx.initializers.normal(0.02)
        self.patch = nnx.Linear(config.patch_size**2, config.width, rngs=rngs)
        self.class_token = nnx.Param(init(rngs.params(), (1, config.width)))
        self.position = nnx.Param(jnp.pad(_waves(config), ((1, 0), (0, 0))))
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, config.classes, rngs=rngs)

    def embed(self, image: jax.Array) -> jax.Array:
        """Turns an image into tokens [1 + grid * grid, width], class token first."""
        grid, size = self.config.grid, self.config.patch_size
        pixels = (image - self.config.pixel_mean) / self.config.pixel_std
        patches = pixels.reshape(grid, size, grid, size).transpose(0, 2, 1, 3)
        patches = self.patch(patches.reshape(grid * grid, size * size))
        return jnp.concatenate([self.class_token[...], patches]) + self.position[...]

    def classify(self, tokens: jax.Array) -> jax.Array:
        """Turns tokens, class token first, into logits [classes]."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens[0]))

    def __call__(self, image: jax.Array) -> jax.Array:
        """Maps an image [size, size] to logits [classes]."""
        return self.classify(self.embed(image))
