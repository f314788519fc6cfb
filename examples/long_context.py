"""Explains the last of 16,384 tokens of a decoder, on a CPU, without an N x N map.

The model attends in the manner of flash attention: chunk after chunk of queries,
computed again for the gradient. Its weights are random but for one head, which lets
the last token, a question, look for the one token that answers it. A stored map of
one layer would take 16,384 x 16,384 x 4 bytes = 1 GB for each head.

    python examples/long_context.py [--length 16384] [--layers 4]
"""

import argparse
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import xviz_jax as xv

VOCABULARY, HEADS, DIM, CLASSES = 64, 2, 64, 8
WIDTH = HEADS * DIM
QUESTION, ANSWER = 0, 1
_SCALE = DIM**-0.5


def make_parameters(layers: int, seed: int = 0) -> dict[str, Any]:
    """Random weights, with a head in the middle layer that answers the question."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape) / shape[-2] ** 0.5
    blocks = {
        "query": 0.3 * draw(layers, WIDTH, WIDTH),
        "key": 0.3 * draw(layers, WIDTH, WIDTH),
        "value": draw(layers, WIDTH, WIDTH),
        "out": 0.1 * draw(layers, WIDTH, WIDTH),
        "up": draw(layers, WIDTH, 2 * WIDTH),
        "down": 0.1 * draw(layers, 2 * WIDTH, WIDTH),
    }
    table = rng.normal(size=(VOCABULARY, WIDTH))
    head = draw(WIDTH, CLASSES)
    asked, answer = table[QUESTION], table[ANSWER]
    middle, direction = layers // 2, np.eye(WIDTH)[0]
    # Scores of 16 and more outweigh 16,384 others near 0.
    blocks["query"][middle] += 2 * np.outer(asked, direction) / DIM**0.5
    blocks["key"][middle] += 2 * np.outer(answer, direction) / DIM**0.5
    # What the answer brings along speaks for class 3.
    blocks["value"][middle] += np.outer(answer, np.eye(WIDTH)[1]) / DIM**0.5
    blocks["out"][middle] += np.outer(np.eye(WIDTH)[1], head[:, 3])
    parameters = {"table": table, "blocks": blocks, "head": head}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), parameters)


def attend(query, key, value, chunk: int) -> jax.Array:
    """Causal attention `[length, heads, dim]`, a chunk of queries at a time."""
    length = query.shape[0]
    keys = jnp.arange(length)

    @jax.checkpoint
    def one(part):
        queries, positions = part
        scores = jnp.einsum("qhd,khd->hqk", queries, key) * _SCALE
        seen = positions[:, None] >= keys[None]
        weights = jax.nn.softmax(jnp.where(seen[None], scores, -jnp.inf))
        return jnp.einsum("hqk,khd->qhd", weights, value)

    parts = (query.reshape(-1, chunk, HEADS, DIM), keys.reshape(-1, chunk))
    return jax.lax.map(one, parts).reshape(length, HEADS, DIM)


def normalised(x: jax.Array) -> jax.Array:
    """Root mean square normalisation."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def decoder(parameters: dict[str, Any], tokens: jax.Array, chunk: int = 128):
    """Maps token ids `[length]` to logits of the last position."""

    def block(x, weights):
        split = lambda name: (normalised(x) @ weights[name]).reshape(-1, HEADS, DIM)
        mixed = attend(split("query"), split("key"), split("value"), chunk)
        x = x + mixed.reshape(x.shape) @ weights["out"]
        x = x + jax.nn.gelu(normalised(x) @ weights["up"]) @ weights["down"]
        return x, None

    block = jax.checkpoint(block)
    x, _ = jax.lax.scan(block, parameters["table"][tokens], parameters["blocks"])
    return normalised(x[-1]) @ parameters["head"]


def peak_megabytes() -> float:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Runs the model and explains its last token twice."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    length, where = options.length, options.length // 3
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, VOCABULARY, length)
    tokens[where], tokens[-1] = ANSWER, QUESTION
    tokens = jnp.asarray(tokens, jnp.int32)
    parameters = make_parameters(options.layers)
    maps = options.layers * HEADS * length**2 * 4 / 2**20
    print(f"{length} tokens, {options.layers} layers x {HEADS} heads of {DIM}")
    print(f"all attention maps would take {maps:,.0f} MB; the answer is at {where}")

    explainers = {
        "forward": lambda p, x: decoder(p, x),
        "attention_rollout": xv.attention_rollout(decoder, query=-1),
        "attention_relevance": xv.attention_relevance(decoder, query=-1),
    }
    begin = peak_megabytes()
    for name, explain in explainers.items():
        start = time.perf_counter()
        result = jax.block_until_ready(jax.jit(explain)(parameters, tokens))
        seconds = time.perf_counter() - start
        line = f"{name:20} {seconds:6.1f} s, peak {peak_megabytes() - begin:5.0f} MB"
        if isinstance(result, xv.Attribution):
            # The last token's own share is the residual connection's.
            scores = np.asarray(result.scores[:-1])
            line += (
                f", highest at {scores.argmax()} "
                f"({scores.max() / np.median(scores):,.0f} x the median)"
            )
        else:
            line += f", predicts class {int(result.argmax())}"
        print(line)


if __name__ == "__main__":
    main()
