"""Train the embedded default: a vision transformer on Fashion-MNIST, with optax.

    apt-get install dataset-fashion-mnist     # or pass --data FOLDER
    python examples/train_embedded.py --out xviz_jax/models/embedded

Training drops a random part of the patches (Liu et al., 2023, arXiv 2208.07220):
a quarter is kept at first, half later, all at the end. That makes an epoch up to
eight times cheaper, and two CPU cores are enough. Writes `weights.npz`,
`images.npz` (the first 1,000 test images) and `card.json`.
"""

import argparse
import dataclasses
import gzip
import importlib.metadata
import json
import platform
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from xviz_jax.models.embedded import modeling

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
BATCH = 64
# Patches kept, epochs.
PHASES = ((49, 8), (98, 4), (196, 2))


def read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads one split in the IDX format: uint8 images [n, 28, 28] and labels [n]."""
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return pixels, np.frombuffer(labels, np.uint8, offset=8)


def augment(key: jax.Array, image: jax.Array) -> jax.Array:
    """Flips an image left to right half of the time, and moves it by up to 2 pixels."""
    flip, move = jax.random.split(key)
    image = jnp.where(jax.random.bernoulli(flip), image[:, ::-1], image)
    start = jax.random.randint(move, (2,), 0, 5)
    return jax.lax.dynamic_slice(jnp.pad(image, 2), start, image.shape)


def one_loss(model, key: jax.Array, image: jax.Array, label: jax.Array, keep: int):
    """Cross-entropy of one augmented image of which `keep` patches are seen."""
    augmentation, dropping = jax.random.split(key)
    tokens = model.embed(augment(augmentation, image))
    kept = jax.random.permutation(dropping, tokens.shape[0] - 1)[:keep]
    logits = model.classify(jnp.concatenate([tokens[:1], tokens[1:][kept]]))
    smooth = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), 0.05)
    return optax.softmax_cross_entropy(logits, smooth)


@partial(jax.jit, static_argnames=("graph", "optimizer", "keep"), donate_argnums=(1, 2))
def step(graph, state, moments, optimizer, key, images, labels, keep):
    """One optimizer step on uint8 images [batch, 28, 28]."""

    def loss(state):
        model = nnx.merge(graph, state)
        keys = jax.random.split(key, len(labels))
        pixels = images.astype(jnp.float32) / 255
        each = jax.vmap(partial(one_loss, model, keep=keep))(keys, pixels, labels)
        return jnp.mean(each)

    value, gradient = jax.value_and_grad(loss)(state)
    updates, moments = optimizer.update(gradient, moments, state)
    return optax.apply_updates(state, updates), moments, value


@partial(jax.jit, static_argnames="graph")
def predict(graph, state, images):
    """Predicted classes of uint8 images [batch, 28, 28]."""
    pixels = images.astype(jnp.float32) / 255
    return jnp.argmax(jax.vmap(nnx.merge(graph, state))(pixels), axis=-1)


def accuracy(graph, state, images, labels) -> float:
    """Share of right predictions; the number of images is a multiple of 200."""
    chunks = images.reshape(-1, 200, 28, 28)
    predicted = np.concatenate([predict(graph, state, chunk) for chunk in chunks])
    return float(np.mean(predicted == labels))


def save(out: Path, state, card: dict, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes weights, held-out images and the card; no pickle anywhere."""
    weights = {
        "/".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(state)
    }
    np.savez_compressed(out / "weights.npz", allow_pickle=False, **weights)
    np.savez_compressed(
        out / "images.npz",
        allow_pickle=False,
        images=images[:1000],
        labels=labels[:1000],
    )
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def describe(config: modeling.Config, seed: int, epochs: int) -> dict:
    """The card's part that is known before the accuracy is."""
    packages = ("jax", "flax", "optax", "numpy")
    return {
        "model": "vision transformer, patch 2, on 28 x 28 images",
        "config": dataclasses.asdict(config),
        "classes": CLASSES,
        "data": "Fashion-MNIST (Xiao et al., 2017, arXiv 1708.07747), MIT licence",
        "images": "the first 1,000 images of the test split",
        "weights_licence": "Apache-2.0",
        "command": "python examples/train_embedded.py "
        f"--out xviz_jax/models/embedded --seed {seed} --epochs {epochs}",
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def main() -> None:
    """Trains, measures and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist")
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    kept = [keep for keep, epochs in PHASES for _ in range(epochs)]
    parser.add_argument(
        "--epochs",
        type=int,
        default=len(kept),
        help="stop after so many; the learning rate falls as if there were more",
    )
    arguments = parser.parse_args()

    train, train_labels = read(arguments.data, "train")
    test, test_labels = read(arguments.data, "t10k")
    config = modeling.Config()
    graph, state = nnx.split(
        modeling.VisionTransformer(config, rngs=nnx.Rngs(arguments.seed))
    )
    steps = len(train) // BATCH
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.5e-3, 1000, steps * len(kept))
    optimizer = optax.adamw(schedule, weight_decay=0.05)
    moments = optimizer.init(state)

    shuffle = np.random.default_rng(arguments.seed)
    key = jax.random.key(arguments.seed)
    start, right = time.monotonic(), 0.0
    for epoch, keep in enumerate(kept[: arguments.epochs], start=1):
        order = shuffle.permutation(len(train))[: steps * BATCH]
        losses = []
        for rows in order.reshape(steps, BATCH):
            key, now = jax.random.split(key)
            data = (train[rows], train_labels[rows])
            state, moments, value = step(
                graph, state, moments, optimizer, now, *data, keep
            )
            losses.append(value)
        right = accuracy(graph, state, test, test_labels)
        minutes = (time.monotonic() - start) / 60
        print(
            f"epoch {epoch}: {keep} patches, loss {np.mean(losses):.3f}, "
            f"test accuracy {right:.4f}, {minutes:.1f} min",
            flush=True,
        )
    card = describe(config, arguments.seed, arguments.epochs)
    card["test_accuracy"] = right
    card["test_accuracy_of_the_images"] = accuracy(
        graph, state, test[:1000], test_labels[:1000]
    )
    save(arguments.out, state, card, test, test_labels)


if __name__ == "__main__":
    main()
