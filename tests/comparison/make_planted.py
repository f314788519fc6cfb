"""Trains the planted-token transformers and writes `truth/planted.npz`.

    PYTHONPATH=. python tests/comparison/make_planted.py

Each text holds one planted token, which alone tells the class, one decoy, which tells
it as well, and noise. The decoys' embeddings are zero, and so is that of the token
that stands for nothing: a model cannot tell the two apart. In training tokens are
taken away at random, so that a text with holes is nothing new; without the planted
token all classes are right. Five seeds are trained at once, by one `vmap`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.comparison import planted

SEEDS, STEPS, BATCH = 5, 1500, 128


def initial(key: jax.Array) -> dict[str, jax.Array]:
    width, hidden = planted.WIDTH, planted.HIDDEN
    shapes = {
        "tokens": (planted.VOCABULARY, width),
        "positions": (planted.LENGTH + 1, width),
        "class_token": (1, width),
        "query": (planted.LAYERS, width, width),
        "key": (planted.LAYERS, width, width),
        "value": (planted.LAYERS, width, width),
        "out": (planted.LAYERS, width, width),
        "up": (planted.LAYERS, width, hidden),
        "down": (planted.LAYERS, hidden, width),
        "head": (width, planted.CLASSES),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(each, shape) * (0.5 if shape[0] < 3 else 0.3)
        if name in ("tokens", "positions", "class_token")
        else jax.random.normal(each, shape) * shape[-2] ** -0.5
        for each, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def loss(weights: dict, key: jax.Array) -> jax.Array:
    drawing, dropping = jax.random.split(key)
    data = jax.vmap(planted.draw)(jax.random.split(drawing, BATCH))
    shares = jax.random.uniform(dropping, (BATCH, 1))
    noise = jax.random.uniform(jax.random.fold_in(dropping, 1), data.tokens.shape)
    dropped = noise < shares**2
    tokens = jnp.where(dropped, planted.NOTHING, data.tokens)
    gone = jnp.take_along_axis(dropped, data.place[:, None], axis=1)
    certain = jax.nn.one_hot(data.label, planted.CLASSES)
    wanted = jnp.where(gone, 1 / planted.CLASSES, 0.95 * certain + 0.05 / 3)
    logits = jax.vmap(planted.forward, in_axes=(None, 0))(planted.tie(weights), tokens)
    return jnp.mean(optax.softmax_cross_entropy(logits, wanted))


def main() -> None:
    keys = jax.random.split(jax.random.key(0), SEEDS)
    weights = jax.vmap(initial)(keys)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))
    moments = jax.vmap(optimizer.init)(weights)

    @jax.jit
    def train(weights, moments):
        def step(carry, number):
            weights, moments = carry
            now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
            value, gradient = jax.vmap(jax.value_and_grad(loss))(weights, now)
            updates, moments = jax.vmap(optimizer.update)(gradient, moments, weights)
            return (optax.apply_updates(weights, updates), moments), value

        return jax.lax.scan(step, (weights, moments), jnp.arange(STEPS))

    (weights, _), losses = train(weights, moments)
    weights = jax.vmap(planted.tie)(weights)
    stored = {name: np.asarray(each, np.float16) for name, each in weights.items()}
    data = jax.vmap(planted.draw)(jax.random.split(jax.random.key(99), 512))
    for seed in range(SEEDS):
        each = {name: jnp.float32(leaf[seed]) for name, leaf in stored.items()}
        logits = jax.vmap(planted.forward, in_axes=(None, 0))(each, data.tokens)
        right = jnp.mean(jnp.argmax(logits, axis=-1) == data.label)
        print(f"seed {seed}: loss {losses[-1, seed]:.3f}, accuracy {right:.4f}")
        assert right > 0.99
    path = Path(__file__).parent / "truth" / "planted.npz"
    np.savez_compressed(path, allow_pickle=False, **stored)


if __name__ == "__main__":
    main()
