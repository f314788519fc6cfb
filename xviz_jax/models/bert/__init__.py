"""BERT, RoBERTa and DistilBERT: states, masked words, classes of texts or tokens.

Published classes: `BertModel`, `BertForMaskedLM`, `BertForPreTraining`,
`BertForSequenceClassification`, `BertForTokenClassification`, and the same of
RoBERTa and DistilBERT where they exist.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xviz_jax.models import layers
from xviz_jax.models.bert.modeling import Bert as Bert
from xviz_jax.models.bert.modeling import Config as Config
from xviz_jax.models.bert.params import configure as configure
from xviz_jax.models.bert.params import mapping as mapping


def build(config: Config, *, dtype: Any, scan: bool, rngs: nnx.Rngs) -> Bert:
    """Makes the module, with random parameters."""
    return Bert(config, dtype=dtype, scan=scan, rngs=rngs)


def output(
    config: Config, *, position: int | None = None, pooling: str | None = None
) -> Callable[..., jax.Array]:
    """The function that is explained.

    Args:
      config: As `configure` returns it.
      position: Whose logits are read, for a head that has some for each token;
        negative from the last real token.
      pooling: What stands for a text, for a model without a head: `mean` over the
        real tokens, `first` or `pooler`; by default what the checkpoint was made
        for.

    Returns:
      A function of `(module, tokens, mask=None, segments=None)` that returns logits,
      or for a model without a head the features of the text (not normalised), of
      which a callable target takes what is asked about.

    Raises:
      ValueError: If an option does not fit the head.
    """
    each = config.head in ("masked_lm", "tokens")
    if each == (position is None):
        wants = "wants a `position`" if each else "takes no `position`"
        raise ValueError(f"a model with the head {config.head!r} {wants}")
    if config.head is not None and pooling is not None:
        raise ValueError(f"a model with the head {config.head!r} takes no `pooling`")
    known = ("mean", "first", *(("pooler",) if config.pooler else ()))
    if pooling is not None and pooling not in known:
        raise ValueError(f"`pooling` is one of {known}, got {pooling!r}")
    chosen = pooling or config.pooling

    def read(module: Bert, tokens: Any, mask: Any = None, segments: Any = None):
        states = module.encode(tokens, mask, segments)
        if position is not None:
            return module.read(layers.at(states, position, mask))
        if config.head is None and chosen == "mean":
            return _mean(states, mask)
        if config.head is None and chosen == "first":
            return states[0]
        return module.read(states[0])

    return read


def _mean(states: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return jnp.mean(states, axis=0)
    real = mask.astype(states.dtype)[:, None]
    return jnp.sum(states * real, axis=0) / jnp.sum(real)
