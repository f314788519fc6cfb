"""A small convolutional network with ReLUs, trained, for paths with kinks.

    apt-get install dataset-fashion-mnist     # or pass --data FOLDER
    python tests/gradients/convolutional.py

writes `goldens/convolutional.npz`. Two minutes on one core; 88% of the test images.
"""

import argparse
import gzip
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

WEIGHTS = Path(__file__).parent / "goldens" / "convolutional.npz"
CHANNELS = (1, 8, 16, 24)


def load():
    """The trained weights."""
    with np.load(WEIGHTS, allow_pickle=False) as stored:
        return {name: jnp.asarray(stored[name]) for name in stored}


def forward(weights, image):
    """Maps one image [28, 28] in [0, 1] to logits [10]."""
    x = image[None, :, :, None]
    for layer in range(1, len(CHANNELS)):
        x = jax.lax.conv_general_dilated(
            x,
            weights[f"kernel{layer}"],
            window_strides=(2, 2),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + weights[f"bias{layer}"].reshape(1, 1, 1, -1))
    return x.reshape(-1) @ weights["head"] + weights["offset"]


def initial(key):
    weights = {"offset": jnp.zeros(10)}
    for layer, (before, after) in enumerate(itertools.pairwise(CHANNELS), 1):
        key, own = jax.random.split(key)
        kernel = jax.random.normal(own, (3, 3, before, after))
        weights[f"kernel{layer}"] = kernel * (2 / (9 * before)) ** 0.5
        weights[f"bias{layer}"] = jnp.zeros(after)
    last = 16 * CHANNELS[-1]
    return weights | {"head": jax.random.normal(key, (last, 10)) * (2 / last) ** 0.5}


def read(folder, split):
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return pixels / np.float32(255), np.frombuffer(labels, np.uint8, offset=8)


def train(folder, steps=1800, batch=128):
    images, labels = read(folder, "train")
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    weights = initial(jax.random.key(0))
    state = optimizer.init(weights)

    def loss(weights, x, y):
        logits = jax.vmap(forward, (None, 0))(weights, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(weights, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(weights, x, y), state)
        return optax.apply_updates(weights, updates), state

    random = np.random.default_rng(0)
    for _ in range(steps):
        rows = random.integers(0, len(images), batch)
        weights, state = step(weights, state, images[rows], labels[rows].astype("i4"))
    images, labels = read(folder, "t10k")
    logits = jax.vmap(forward, (None, 0))(weights, images)
    print(f"accuracy {np.mean(np.argmax(logits, -1) == labels):.1%}")
    return weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist")
    )
    np.savez(WEIGHTS, allow_pickle=False, **train(parser.parse_args().data))
