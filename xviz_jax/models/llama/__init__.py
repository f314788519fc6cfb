"""Llama, Mistral, Qwen2, Qwen3 and SmolLM: next words, classes of texts, or states.

Published classes: `LlamaModel`, `LlamaForCausalLM`, `LlamaForSequenceClassification`,
and the same of Mistral, Qwen2 and Qwen3.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from xviz_jax.models import layers
from xviz_jax.models.llama.modeling import Config as Config
from xviz_jax.models.llama.modeling import Llama as Llama
from xviz_jax.models.llama.params import configure as configure
from xviz_jax.models.llama.params import mapping as mapping


def build(config: Config, *, dtype: Any, scan: bool, rngs: nnx.Rngs) -> Llama:
    """Makes the module, with random parameters."""
    return Llama(config, dtype=dtype, scan=scan, rngs=rngs)


def output(config: Config, *, position: int = -1) -> Callable[..., jax.Array]:
    """The function that is explained.

    Args:
      config: As `configure` returns it.
      position: Which token's logits are read: by default those after the last real
        token.

    Returns:
      A function of `(module, tokens, mask=None)` that returns logits, or for a model
      without a head the token's state.
    """
    del config
    return layers.reader(position)
