"""Transformers that were trained to find one planted token among noise.

A text of `LENGTH` tokens holds one of the planted tokens 1, 2, 3, which is the class;
one of the decoys 4, 5, 6, which agrees with it; and noise. `make_planted.py` trained
the weights of five seeds.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

NOTHING, CLASSES, VOCABULARY, LENGTH = 0, 3, 15, 10
WIDTH, HIDDEN, LAYERS, HEADS = 16, 32, 2, 2
SEEDS = 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens `[LENGTH]`, their class, and where the planted token and the decoy are."""

    tokens: jax.Array
    label: jax.Array
    place: jax.Array
    decoy: jax.Array


def draw(key: jax.Array) -> Text:
    """One text."""
    noise, kind, where = jax.random.split(key, 3)
    first = 1 + 2 * CLASSES
    tokens = jax.random.randint(noise, (LENGTH,), first, VOCABULARY)
    label = jax.random.randint(kind, (), 0, CLASSES)
    place, decoy = jax.random.permutation(where, LENGTH)[:2]
    tokens = tokens.at[place].set(1 + label).at[decoy].set(1 + CLASSES + label)
    return Text(tokens, label, place, decoy)


def texts(count: int, seed: int = 1) -> Text:
    """Several texts, as numpy arrays."""
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.device_get(jax.jit(jax.vmap(draw))(keys))


def tie(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Zeroes the embeddings of decoys, and of the token that stands for nothing."""
    numbers = np.arange(VOCABULARY)
    ignored = (numbers == NOTHING) | ((numbers > CLASSES) & (numbers <= 2 * CLASSES))
    seen = jnp.asarray(~ignored, jnp.float32)[:, None]
    return {**weights, "tokens": weights["tokens"] * seen}


def load(seed: int) -> dict[str, jax.Array]:
    """The weights of one seed."""
    path = Path(__file__).parent / "truth" / "planted.npz"
    with np.load(path, allow_pickle=False) as stored:
        return {name: jnp.float32(stored[name][seed]) for name in stored.files}


def forward(weights: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Logits `[CLASSES]`, read off a class token before the text."""
    x = jnp.concatenate([weights["class_token"], weights["tokens"][tokens]])
    x = x + weights["positions"]
    for layer in range(LAYERS):
        heads = lambda name, x, layer=layer: (x @ weights[name][layer]).reshape(
            LENGTH + 1, HEADS, -1
        )
        seen = _norm(x)
        query, key, value = (heads(name, seen) for name in ("query", "key", "value"))
        logits = jnp.einsum("qhd,khd->hqk", query, key) * (WIDTH // HEADS) ** -0.5
        mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits), value)
        x = x + mixed.reshape(x.shape) @ weights["out"][layer]
        hidden = jax.nn.gelu(_norm(x) @ weights["up"][layer])
        x = x + hidden @ weights["down"][layer]
    return _norm(x)[0] @ weights["head"]


def _norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-3)
