"""Transformers that tracr compiled from programs, in plain JAX.

`make_tracr.py` stored their weights, all inputs of five out of three tokens, what the
compiled models answer, and exact Shapley values.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ("reverse", "frac_prevs", "pair_balance", "hist", "sort")
LENGTH = 5


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      weights: The arguments of `forward`.
      vocabulary: The three tokens.
      tokens: Every input, `[inputs, LENGTH]`.
      logits: What tracr's own model answers, `[inputs, LENGTH, classes]`.
      shapley: Of the answer at each position, of each token: `[inputs, LENGTH,
        LENGTH]`.
    """

    weights: dict[str, jax.Array]
    vocabulary: np.ndarray
    tokens: np.ndarray
    logits: np.ndarray
    shapley: np.ndarray


def load(name: str) -> Program:
    """Reads one of the stored programs."""
    path = Path(__file__).parent / "truth" / f"tracr_{name}.npz"
    with np.load(path, allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    rest = (arrays.pop(key) for key in ("tokens", "logits", "shapley"))
    tokens, logits, shapley = rest
    # The token that begins every input is part of the model.
    arrays["first"] = arrays["token_embed"][tokens[0, :1]]
    weights = {key: jnp.asarray(each) for key, each in arrays.items()}
    tokens = tokens[:, 1:]
    return Program(weights, np.unique(tokens), tokens, logits, shapley)


def forward(
    weights: dict[str, jax.Array], tokens: jax.Array, position: jax.Array
) -> jax.Array:
    """Logits `[classes]` of the answer at one position."""
    x = jnp.concatenate([weights["first"], weights["token_embed"][tokens]])
    x = x + weights["pos_embed"]
    for layer in range(weights["query"].shape[0]):
        heads = {
            name: jnp.einsum("nd,dhk->nhk", x, weights[name][layer])
            for name in ("query", "key", "value")
        }
        scale = heads["key"].shape[-1] ** -0.5
        logits = jnp.einsum("qhk,nhk->hqn", heads["query"], heads["key"]) * scale
        mixed = jnp.einsum("hqn,nhk->qhk", jax.nn.softmax(logits), heads["value"])
        x = x + jnp.einsum("qhk,hkd->qd", mixed, weights["linear"][layer])
        x = x + jax.nn.relu(x @ weights["up"][layer]) @ weights["down"][layer]
    return (x @ weights["head"])[1 + position]
