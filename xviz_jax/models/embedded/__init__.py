"""The embedded default: a vision transformer trained on Fashion-MNIST.

Weights, 1,000 held-out labelled images and `card.json` (data, licences, command,
seed, versions, measured accuracy) lie beside this file. The images are part of
Fashion-MNIST, copyright 2017 Zalando SE, under the MIT licence in
`LICENSE-fashion-mnist.txt`.
"""

import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import jax
import numpy as np
from flax import nnx

from xviz_jax.models.embedded.modeling import Config as Config
from xviz_jax.models.embedded.modeling import VisionTransformer as VisionTransformer

IMAGES = 1000

_FOLDER = resources.files(__name__)


def card() -> dict[str, Any]:
    """What the model is, how it was made, and how accurate it is."""
    return json.loads((_FOLDER / "card.json").read_text())


def load() -> VisionTransformer:
    """Reads the trained model, which maps an image [28, 28] in [0, 1] to 10 logits.

    Raises:
      ValueError: If the weights do not fit the model.
    """
    config = Config(**card()["config"])
    blank = nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(blank)
    with (_FOLDER / "weights.npz").open("rb") as file:
        weights = dict(np.load(file, allow_pickle=False))
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        if name not in weights:
            raise ValueError(f"the weights lack {name!r}")
        value = weights.pop(name)
        if value.shape != leaf.shape:
            raise ValueError(
                f"{name!r} is {value.shape}, but the model has {leaf.shape}"
            )
        filled.append((path, leaf.replace(jax.numpy.asarray(value))))
    if weights:
        raise ValueError(f"the weights have {sorted(weights)}, the model does not")
    return nnx.merge(graph, nnx.from_flat_state(filled))


def functional() -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """The model as `forward(parameters, image)`, and its parameters.

    Explain it with `argnums=1`: the parameters stay arguments of the compiled
    program.
    """
    graph, parameters = nnx.split(load())

    def forward(parameters: Any, image: jax.Array) -> jax.Array:
        return nnx.merge(graph, parameters)(image)

    return forward, parameters


def images() -> tuple[np.ndarray, np.ndarray]:
    """The held-out images, float32 [1000, 28, 28] in [0, 1], and labels [1000]."""
    with (_FOLDER / "images.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        pixels, labels = arrays["images"], arrays["labels"]
    return pixels.astype(np.float32) / 255, labels.astype(np.int64)
