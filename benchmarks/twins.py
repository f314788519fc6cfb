"""The same networks in JAX and in PyTorch, with the same weights."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax.models import embedded

try:
    import torch  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:
    torch = None

ON_GPU = jax.default_backend() == "gpu"
# Where PyTorch computes.
DEVICE = "cuda" if ON_GPU else "cpu"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A pre-norm transformer; of images if there is a patch, else of embeddings."""

    name: str
    width: int
    layers: int
    heads: int
    size: int
    patch: int = 0
    channels: int = 1
    mean: float = 0.0
    deviation: float = 1.0
    precision: str = "float32"

    def __str__(self) -> str:
        return f"{self.name}, {self.precision}" if ON_GPU else self.name

    @property
    def tokens(self) -> int:
        return (self.size // self.patch) ** 2 if self.patch else self.size

    @property
    def input(self) -> tuple[int, ...]:
        if self.patch:
            return (self.size, self.size, self.channels)
        return (self.size, self.width)


TRAINED = Shape("embedded model", 64, 4, 4, 28, 2, 1, 0.286, 0.353)


def random_weights(shape: Shape) -> dict:
    random = np.random.default_rng(0)
    layers, width = shape.layers, shape.width

    def draw(*size: int) -> np.ndarray:
        return random.normal(0, size[-2] ** -0.5, size).astype(np.float32)

    zeros = lambda *size: np.zeros(size, np.float32)
    ones = lambda *size: np.ones(size, np.float32)
    return {
        "block": {
            "norm1": ones(layers, width),
            "shift1": zeros(layers, width),
            "qkv": draw(layers, width, 3 * width),
            "qkv_bias": zeros(layers, 3 * width),
            "out": draw(layers, width, width),
            "out_bias": zeros(layers, width),
            "norm2": ones(layers, width),
            "shift2": zeros(layers, width),
            "up": draw(layers, width, 4 * width),
            "up_bias": zeros(layers, 4 * width),
            "down": draw(layers, 4 * width, width),
            "down_bias": zeros(layers, width),
        },
        "patch": draw(max(shape.patch**2 * shape.channels, 1), width),
        "patch_bias": zeros(width),
        "first": draw(1, width),
        "position": draw(shape.tokens + 1, width),
        "norm": ones(width),
        "shift": zeros(width),
        "head": draw(width, 10),
        "head_bias": zeros(10),
    }


def trained_weights() -> dict:
    """The embedded model's weights, under the names above."""
    path = resources.files(embedded) / "weights.npz"
    with path.open("rb") as file:
        stored = dict(np.load(file, allow_pickle=False))
    theirs = {
        "norm1": "attention_norm/scale",
        "shift1": "attention_norm/bias",
        "qkv": "attention/qkv/kernel",
        "qkv_bias": "attention/qkv/bias",
        "out": "attention/out/kernel",
        "out_bias": "attention/out/bias",
        "norm2": "mlp_norm/scale",
        "shift2": "mlp_norm/bias",
        "up": "up/kernel",
        "up_bias": "up/bias",
        "down": "down/kernel",
        "down_bias": "down/bias",
    }
    layers = range(TRAINED.layers)
    return {
        "block": {
            name: np.stack([stored[f"blocks/{layer}/{each}"] for layer in layers])
            for name, each in theirs.items()
        },
        "patch": stored["patch/kernel"],
        "patch_bias": stored["patch/bias"],
        "first": stored["class_token"],
        "position": stored["position"],
        "norm": stored["norm/scale"],
        "shift": stored["norm/bias"],
        "head": stored["head/kernel"],
        "head_bias": stored["head/bias"],
    }


def jax_model(shape: Shape, *, scan: bool = True) -> Callable[[Any, jax.Array], Any]:
    """`(weights, one input) -> logits`."""

    def product(function, *arrays):
        if shape.precision == "float32":
            return function(*arrays, precision="highest")
        arrays = [x.astype(shape.precision) for x in arrays]
        return function(*arrays).astype(jnp.float32)

    matmul = functools.partial(product, jnp.matmul)
    einsum = lambda how, *arrays: product(functools.partial(jnp.einsum, how), *arrays)

    def norm(x, scale, shift):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return x * scale + shift

    def block(x, w):
        qkv = matmul(norm(x, w["norm1"], w["shift1"]), w["qkv"]) + w["qkv_bias"]
        qkv = qkv.reshape(len(x), 3, shape.heads, -1).transpose(1, 2, 0, 3)
        scale = qkv.shape[-1] ** -0.5
        maps = jax.nn.softmax(einsum("hqd,hkd->hqk", qkv[0] * scale, qkv[1]))
        mixed = einsum("hqk,hkd->qhd", maps, qkv[2]).reshape(x.shape)
        x = x + matmul(mixed, w["out"]) + w["out_bias"]
        hidden = matmul(norm(x, w["norm2"], w["shift2"]), w["up"]) + w["up_bias"]
        return x + matmul(jax.nn.gelu(hidden), w["down"]) + w["down_bias"], None

    def forward(weights, x):
        if shape.patch:
            grid = shape.size // shape.patch
            x = (x - shape.mean) / shape.deviation
            x = x.reshape(grid, shape.patch, grid, shape.patch, -1)
            x = x.transpose(0, 2, 1, 3, 4).reshape(grid**2, -1)
            x = matmul(x, weights["patch"]) + weights["patch_bias"]
        x = jnp.concatenate([weights["first"], x]) + weights["position"]
        if scan:
            x, _ = jax.lax.scan(block, x, weights["block"])
        else:
            for layer in range(shape.layers):
                each = {name: w[layer] for name, w in weights["block"].items()}
                x, _ = block(x, each)
        x = norm(x[0], weights["norm"], weights["shift"])
        return matmul(x, weights["head"]) + weights["head_bias"]

    return forward


def torch_model(shape: Shape, weights: dict) -> Callable:
    """A batch of inputs to logits, with the same weights."""
    assert torch is not None
    functional, join = torch.nn.functional, torch.cat
    weights = jax.tree.map(functools.partial(torch.tensor, device=DEVICE), weights)
    fast = functools.partial(torch.autocast, DEVICE, torch.bfloat16)
    precision = contextlib.nullcontext if shape.precision == "float32" else fast

    def norm(x, scale, shift):
        return functional.layer_norm(x, x.shape[-1:], scale, shift, 1e-6)

    def forward(x):
        with precision():
            return logits(x)

    def logits(x):
        count = len(x)
        if shape.patch:
            grid = shape.size // shape.patch
            x = (x - shape.mean) / shape.deviation
            x = x.reshape(count, grid, shape.patch, grid, shape.patch, -1)
            x = x.permute(0, 1, 3, 2, 4, 5).reshape(count, grid**2, -1)
            x = x @ weights["patch"] + weights["patch_bias"]
        first = weights["first"].expand(count, 1, -1)
        x = join([first, x], dim=1) + weights["position"]
        for layer in range(shape.layers):
            w = {name: each[layer] for name, each in weights["block"].items()}
            qkv = norm(x, w["norm1"], w["shift1"]) @ w["qkv"] + w["qkv_bias"]
            qkv = qkv.reshape(count, x.shape[1], 3, shape.heads, -1)
            mixed = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
            mixed = mixed.transpose(1, 2).reshape(x.shape)
            x = x + mixed @ w["out"] + w["out_bias"]
            hidden = norm(x, w["norm2"], w["shift2"]) @ w["up"] + w["up_bias"]
            hidden = functional.gelu(hidden, approximate="tanh")
            x = x + hidden @ w["down"] + w["down_bias"]
        x = norm(x[:, 0], weights["norm"], weights["shift"])
        return x @ weights["head"] + weights["head_bias"]

    return forward


def conv_model(weights: dict, image: jax.Array) -> jax.Array:
    """Three convolutions with ReLUs and a linear head; one image [28, 28]."""
    x = image[None, :, :, None]
    for layer in (1, 2, 3):
        x = jax.lax.conv_general_dilated(
            x,
            weights[f"kernel{layer}"],
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        x = jax.nn.relu(x + weights[f"bias{layer}"].reshape(1, 1, 1, -1))
    head = jnp.matmul(x.reshape(-1), weights["head"], precision="highest")
    return head + weights["offset"]


def conv_weights() -> dict:
    """Of the trained network that the tests have."""
    goldens = Path(__file__).parents[1] / "tests" / "gradients" / "goldens"
    with np.load(goldens / "convolutional.npz", allow_pickle=False) as stored:
        return dict(stored)


def torch_conv(weights: dict) -> Callable:
    """A batch of images to logits, with the same weights."""
    assert torch is not None
    functional = torch.nn.functional
    w = jax.tree.map(functools.partial(torch.tensor, device=DEVICE), weights)
    torch.backends.cudnn.allow_tf32 = False

    def forward(x):
        x = x[:, None]
        for layer in (1, 2, 3):
            # "SAME" puts what is odd at the end.
            edge = (1, 1, 1, 1) if x.shape[-1] % 2 else (0, 1, 0, 1)
            kernel = w[f"kernel{layer}"].permute(3, 2, 0, 1)
            x = functional.pad(x, edge)
            x = functional.conv2d(x, kernel, w[f"bias{layer}"], stride=2).relu()
        x = x.permute(0, 2, 3, 1).reshape(len(x), -1)
        return x @ w["head"] + w["offset"]

    return forward
