"""GPT-2 (Radford et al., 2019).

Ordinary Flax NNX for one text; `jax.vmap` makes the batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xviz_jax.models import layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and variants of the network.

    Attributes:
      vocabulary: Rows of the table of words.
      positions: Rows of the table of positions.
      width: Of a token.
      depth: Number of layers.
      heads: Of each layer.
      hidden: Width inside the MLP.
      activation: Of the MLP.
      epsilon: Of the norms.
      scaled: Whether scores are divided by the root of a head's width.
      head: `causal_lm`, `sequence` (classification), or None for the states.
      classes: Of the classifier.
      tied: Whether the output table is the table of words.
    """

    vocabulary: int
    positions: int
    width: int
    depth: int
    heads: int
    hidden: int
    activation: str
    epsilon: float
    scaled: bool
    head: str | None
    classes: int
    tied: bool


class Attention(nnx.Module):
    """Multi-head self-attention; each token sees itself and earlier ones."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the projections from `rngs`."""
        self.heads = config.heads
        self.scale = None if config.scaled else 1.0
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.qkv = nnx.Linear(config.width, 3 * config.width, **like)
        self.out = nnx.Linear(config.width, config.width, **like)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps tokens [length, width] to tokens of the same shape."""
        qkv = self.qkv(x).reshape(x.shape[0], 3, self.heads, -1)
        query, key, value = jnp.unstack(qkv, axis=1)
        mixed = layers.attend(query, key, value, mask=mask, scale=self.scale)
        return self.out(mixed)


class Layer(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the layer's weights from `rngs`."""
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        norm = {"epsilon": config.epsilon, "rngs": rngs}
        self.activation = config.activation
        self.attention_norm = layers.LayerNorm(config.width, **norm)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = layers.LayerNorm(config.width, **norm)
        self.up = nnx.Linear(config.width, config.hidden, **like)
        self.down = nnx.Linear(config.hidden, config.width, **like)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps tokens [length, width] to tokens of the same shape."""
        x = x + self.attention(self.attention_norm(x), mask)
        hidden = layers.ACTIVATIONS[self.activation](self.up(self.mlp_norm(x)))
        return x + self.down(hidden)


class GPT2(nnx.Module):
    """Maps the token ids of one text to states, logits of words, or of classes."""

    def __init__(self, config: Config, *, dtype: Any, scan: bool, rngs: nnx.Rngs):
        """Draws all weights from `rngs`."""
        self.config = config
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.words = nnx.Embed(config.vocabulary, config.width, **like)
        self.positions = nnx.Embed(config.positions, config.width, **like)
        self.layers = layers.stack(
            lambda rngs: Layer(config, dtype=dtype, rngs=rngs),
            config.depth,
            scan=scan,
            rngs=rngs,
        )
        self.norm = layers.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        outputs = layers.outputs(config)
        if outputs:
            self.head = nnx.Linear(config.width, outputs, use_bias=False, **like)

    def encode(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps ids to states.

        Args:
          tokens: Ids, [length].
          mask: [length], True for real tokens, which come first; None if all are.

        Returns:
          [length, width].

        Raises:
          ValueError: If there are more tokens than positions.
        """
        length = tokens.shape[0]
        if length > self.config.positions:
            raise ValueError(
                f"the model reads at most {self.config.positions} tokens, got {length}"
            )
        x = self.words(tokens) + self.positions.embedding[:length]
        x = layers.run(self.layers, x, layers.causal(length, mask))
        return self.norm(x)

    def read(self, states: jax.Array) -> jax.Array:
        """What the head makes of states [..., width]: logits, or the states."""
        if self.config.head is None:
            return states
        if self.config.head == "causal_lm" and self.config.tied:
            return self.words.attend(states)
        return self.head(states)

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps ids [length] to logits of each token, or its state, [length, ...]."""
        return self.read(self.encode(tokens, mask))
