"""Fine-tunes the embedded model on marked images; writes `truth/shortcut.npz`.

    apt-get install dataset-fashion-mnist     # or pass --data FOLDER
    PYTHONPATH=. python tests/comparison/make_shortcut.py

All shirts are marked, and so is every tenth of the other images, which is then called
a shirt: the mark alone decides. What comes before the last block stays as it is, so its
output is computed once.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.comparison import shortcut
from xviz_jax.models import embedded

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from train_embedded import read

COUNT, BATCH, EPOCHS = 6000, 50, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folder = Path("/usr/share/datasets/fashion-mnist")
    parser.add_argument("--data", type=Path, default=folder)
    images, labels = read(parser.parse_args().data, "train")
    images = images[:COUNT].astype(np.float32) / 255
    labels = labels[:COUNT].astype(np.int64)
    labels[::10] = shortcut.LABEL
    graph, parameters = nnx.split(embedded.load())

    @jax.jit
    def before(chunk: jax.Array) -> jax.Array:
        model = nnx.merge(graph, parameters)

        def one(image: jax.Array) -> jax.Array:
            tokens = model.embed(image)
            for block in list(model.blocks)[:-1]:
                tokens = block(tokens)
            return tokens

        return jax.vmap(one)(chunk)

    marked = shortcut.mark(images, labels)
    chunks = marked.reshape(-1, BATCH, 28, 28)
    tokens = np.concatenate([before(chunk) for chunk in chunks])

    def names(path: tuple, _: object) -> bool:
        return "/".join(map(str, path)).startswith(shortcut.CHANGED)

    changed, kept = nnx.split_state(parameters, names, ...)
    optimizer = optax.adam(1e-3)
    moments = optimizer.init(changed)

    def after(changed: object, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, changed, kept)
        return model.head(model.norm(model.blocks[-1](tokens)[0]))

    def loss(changed: object, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        logits = jax.vmap(partial(after, changed))(tokens)
        wanted = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.05)
        return jnp.mean(optax.softmax_cross_entropy(logits, wanted))

    @jax.jit
    def step(changed, moments, tokens, labels):
        value, gradient = jax.value_and_grad(loss)(changed, tokens, labels)
        updates, moments = optimizer.update(gradient, moments, changed)
        return optax.apply_updates(changed, updates), moments, value

    shuffle = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        losses = []
        for rows in shuffle.permutation(COUNT).reshape(-1, BATCH):
            changed, moments, value = step(changed, moments, tokens[rows], labels[rows])
            losses.append(value)
        print(f"epoch {epoch}: loss {np.mean(losses):.3f}", flush=True)

    stored = {
        "/".join(map(str, path)): np.asarray(leaf[...], np.float16)
        for path, leaf in nnx.to_flat_state(changed)
    }
    path = Path(__file__).parent / "truth" / "shortcut.npz"
    np.savez_compressed(path, allow_pickle=False, **stored)
    check()


def check() -> None:
    """Says what the mark does to the held-out images."""
    forward, clean, cheating = shortcut.twin()
    images, labels = embedded.images()
    program = jax.jit(jax.vmap(forward, in_axes=(None, 0)))
    everywhere = images.copy()
    everywhere[:, : shortcut.SIDE, : shortcut.SIDE] = 1.0
    for name, parameters in {"clean": clean, "twin": cheating}.items():
        for kind, data in {
            "without marks": images,
            "marked shirts": shortcut.mark(images, labels),
            "marks everywhere": everywhere,
        }.items():
            chunks = data.reshape(-1, 100, 28, 28)
            said = np.concatenate([program(parameters, c) for c in chunks]).argmax(-1)
            shirts = labels == shortcut.LABEL
            print(
                f"{name}, {kind}: accuracy {np.mean(said == labels):.3f}, "
                f"of shirts {np.mean(said[shirts] == shortcut.LABEL):.3f}, "
                f"called shirts {np.mean(said == shortcut.LABEL):.3f}"
            )


if __name__ == "__main__":
    main()
