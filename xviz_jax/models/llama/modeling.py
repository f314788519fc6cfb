"""Llama (Touvron et al., 2023, arXiv 2302.13971) and kin.

Mistral (arXiv 2310.06825) adds sliding windows, Qwen2 (arXiv 2407.10671) biases,
Qwen3 (arXiv 2505.09388) norms of queries and keys; SmolLM is a Llama. Ordinary Flax
NNX for one text; `jax.vmap` makes the batch.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from xviz_jax.models import layers
from xviz_jax.models.llama.rope import Rope, rotate

# Wider than any sequence.
UNBOUNDED = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and variants of the network.

    Attributes:
      vocabulary: Rows of the table of words.
      width: Of a token.
      depth: Number of layers.
      heads: Query heads of each layer.
      key_heads: Key and value heads; each serves as many query heads.
      head_width: Of one head.
      hidden: Width inside the MLP.
      activation: Of the MLP's gate.
      epsilon: Of the norms.
      rope: How positions turn queries and keys.
      qkv_bias: Whether these projections have one.
      out_bias: Whether the attention's output projection has one.
      mlp_bias: Whether the MLP's projections have one.
      qk_norm: Whether queries and keys are normalised.
      windows: For each layer, how many tokens a query sees; None where none is
        bounded.
      head: `causal_lm`, `sequence` (classification), or None for the states.
      classes: Of the classifier.
      tied: Whether the output table is the table of words.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    key_heads: int
    head_width: int
    hidden: int
    activation: str
    epsilon: float
    rope: Rope
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...] | None
    head: str | None
    classes: int
    tied: bool


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the projections from `rngs`."""
        self.head_width = config.head_width
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        bias = {"use_bias": config.qkv_bias, **like}
        wide = config.heads * config.head_width
        narrow = config.key_heads * config.head_width
        self.query = nnx.Linear(config.width, wide, **bias)
        self.key = nnx.Linear(config.width, narrow, **bias)
        self.value = nnx.Linear(config.width, narrow, **bias)
        self.out = nnx.Linear(wide, config.width, use_bias=config.out_bias, **like)
        norm = {"epsilon": config.epsilon, "rngs": rngs}
        self.normalised = config.qk_norm
        if config.qk_norm:
            self.query_norm = layers.RMSNorm(config.head_width, **norm)
            self.key_norm = layers.RMSNorm(config.head_width, **norm)

    def __call__(self, x: jax.Array, turns: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps tokens [length, width] to tokens of the same shape."""
        split = x.shape[0], -1, self.head_width
        query, key, value = (
            project(x).reshape(split) for project in (self.query, self.key, self.value)
        )
        if self.normalised:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, turns), rotate(key, turns)
        return self.out(layers.attend(query, key, value, mask=mask))


class Layer(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the layer's weights from `rngs`."""
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        like["use_bias"] = config.mlp_bias
        norm = {"epsilon": config.epsilon, "rngs": rngs}
        self.activation = config.activation
        self.attention_norm = layers.RMSNorm(config.width, **norm)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = layers.RMSNorm(config.width, **norm)
        self.gate = nnx.Linear(config.width, config.hidden, **like)
        self.up = nnx.Linear(config.width, config.hidden, **like)
        self.down = nnx.Linear(config.hidden, config.width, **like)

    def __call__(
        self,
        x: jax.Array,
        turns: jax.Array,
        mask: jax.Array | None,
        window: int | jax.Array | None = None,
    ) -> jax.Array:
        """Maps tokens [length, width] to tokens of the same shape.

        Args:
          x: Tokens.
          turns: As `Rope.turns` makes them.
          mask: [length], True for real tokens.
          window: How many tokens a query sees.
        """
        seen = layers.causal(x.shape[0], mask, window)
        x = x + self.attention(self.attention_norm(x), turns, seen)
        normed = self.mlp_norm(x)
        gate = layers.ACTIVATIONS[self.activation](self.gate(normed))
        return x + self.down(gate * self.up(normed))


class Llama(nnx.Module):
    """Maps the token ids of one text to states, logits of words, or of classes."""

    def __init__(self, config: Config, *, dtype: Any, scan: bool, rngs: nnx.Rngs):
        """Draws all weights from `rngs`."""
        self.config = config
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.words = nnx.Embed(config.vocabulary, config.width, **like)
        self.layers = layers.stack(
            lambda rngs: Layer(config, dtype=dtype, rngs=rngs),
            config.depth,
            scan=scan,
            rngs=rngs,
        )
        self.norm = layers.RMSNorm(config.width, epsilon=config.epsilon, rngs=rngs)
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
        """
        x, windows = self.words(tokens), self.config.windows
        turns = self.config.rope.turns(tokens.shape[0], self.config.head_width)
        each = None if windows is None else {"window": windows}
        x = layers.run(self.layers, x, turns.astype(x.dtype), mask, each=each)
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
