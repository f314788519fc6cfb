"""BERT (Devlin et al., 2019, arXiv 1810.04805) and kin.

RoBERTa (arXiv 1907.11692) counts positions from another row, DistilBERT (arXiv
1910.01108) has no segments. Ordinary Flax NNX for one text; `jax.vmap` makes the
batch.
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
      kind: `bert`, `roberta` or `distilbert`: how the published tensors are named.
      vocabulary: Rows of the table of words.
      positions: Rows of the table of positions.
      first_position: The row of the first token.
      segments: Rows of the table of segments; 0 for none.
      width: Of a token.
      depth: Number of layers.
      heads: Of each layer.
      hidden: Width inside the MLP.
      activation: Of the MLP.
      epsilon: Of the norms.
      head: `masked_lm`, `sequence` (classification), `tokens` (classification), or
        None for the states themselves.
      classes: Of a classifier.
      pooler: Activation of a dense layer on the first token, between the encoder and
        what follows; None for none.
      pooling: What stands for a text where there is no head: `pooler`, `first` or
        `mean`.
      transform: Activation of the masked-LM head.
      tied: Whether its output table is the table of words.
    """

    kind: str
    vocabulary: int
    positions: int
    first_position: int
    segments: int
    width: int
    depth: int
    heads: int
    hidden: int
    activation: str
    epsilon: float
    head: str | None
    classes: int
    pooler: str | None
    pooling: str
    transform: str
    tied: bool


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the projections from `rngs`."""
        self.heads = config.heads
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.query = nnx.Linear(config.width, config.width, **like)
        self.key = nnx.Linear(config.width, config.width, **like)
        self.value = nnx.Linear(config.width, config.width, **like)
        self.out = nnx.Linear(config.width, config.width, **like)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps tokens [length, width] to tokens of the same shape."""
        split = x.shape[0], self.heads, -1
        query, key, value = (
            project(x).reshape(split) for project in (self.query, self.key, self.value)
        )
        return self.out(layers.attend(query, key, value, mask=mask))


class Layer(nnx.Module):
    """One post-norm encoder layer."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the layer's weights from `rngs`."""
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        norm = {"epsilon": config.epsilon, "rngs": rngs}
        self.activation = config.activation
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.attention_norm = layers.LayerNorm(config.width, **norm)
        self.up = nnx.Linear(config.width, config.hidden, **like)
        self.down = nnx.Linear(config.hidden, config.width, **like)
        self.mlp_norm = layers.LayerNorm(config.width, **norm)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps tokens [length, width] to tokens of the same shape."""
        x = self.attention_norm(x + self.attention(x, mask))
        hidden = layers.ACTIVATIONS[self.activation](self.up(x))
        return self.mlp_norm(x + self.down(hidden))


class Embeddings(nnx.Module):
    """Words, positions and segments, added and normalised."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the tables from `rngs`."""
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.first = config.first_position
        self.segmented = config.segments > 0
        self.words = nnx.Embed(config.vocabulary, config.width, **like)
        self.positions = nnx.Embed(config.positions, config.width, **like)
        if config.segments:
            self.segments = nnx.Embed(config.segments, config.width, **like)
        self.norm = layers.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)

    def __call__(self, tokens: jax.Array, segments: jax.Array | None) -> jax.Array:
        """Maps ids [length] to [length, width].

        Raises:
          ValueError: If there are more tokens than positions.
        """
        length, last = tokens.shape[0], self.positions.embedding.shape[0]
        if self.first + length > last:
            raise ValueError(
                f"the model reads at most {last - self.first} tokens, got {length}"
            )
        x = self.words(tokens)
        if self.segmented:
            if segments is None:
                segments = jnp.zeros_like(tokens)
            x = x + self.segments(segments)
        return self.norm(x + self.positions.embedding[self.first : self.first + length])


class MaskedHead(nnx.Module):
    """Maps states to the words' logits."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        """Draws the weights from `rngs`."""
        like = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.activation = config.transform
        self.transform = nnx.Linear(config.width, config.width, **like)
        self.norm = layers.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(config.vocabulary, dtype))
        self.tied = config.tied
        if not config.tied:
            self.table = nnx.Linear(
                config.width, config.vocabulary, use_bias=False, **like
            )

    def __call__(self, x: jax.Array, words: nnx.Embed) -> jax.Array:
        """Maps states [..., width] to logits [..., vocabulary]."""
        x = self.norm(layers.ACTIVATIONS[self.activation](self.transform(x)))
        logits = words.attend(x) if self.tied else self.table(x)
        return logits + jnp.broadcast_to(self.bias[...], logits.shape)


class Bert(nnx.Module):
    """Maps the token ids of one text to states, logits of words, or of classes."""

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
        if config.pooler is not None:
            self.pooler = nnx.Linear(config.width, config.width, **like)
        if config.head == "masked_lm":
            self.masked_lm = MaskedHead(config, dtype=dtype, rngs=rngs)
        elif config.head is not None:
            self.classifier = nnx.Linear(config.width, config.classes, **like)

    def encode(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Maps ids to states.

        Args:
          tokens: Ids, [length].
          mask: [length], True for real tokens; None if all are.
          segments: [length], which of two texts a token is from; None for the first.

        Returns:
          [length, width].
        """
        seen = None if mask is None else mask.astype(bool)[None, :]
        return layers.run(self.layers, self.embeddings(tokens, segments), seen)

    def read(self, states: jax.Array) -> jax.Array:
        """What the head makes of states [..., width]: logits, or the states.

        For a classifier of texts, and for the pooler, that is the first token's.
        """
        if self.config.head == "masked_lm":
            return self.masked_lm(states, self.embeddings.words)
        if self.config.pooler is not None:
            states = layers.ACTIVATIONS[self.config.pooler](self.pooler(states))
        return states if self.config.head is None else self.classifier(states)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Maps ids [length] to what the published model returns.

        Logits [length, vocabulary] or [length, classes] of a head for each token,
        logits [classes] of a head for texts, or states [length, width].
        """
        states = self.encode(tokens, mask, segments)
        if self.config.head == "sequence":
            return self.read(states[0])
        return states if self.config.head is None else self.read(states)
