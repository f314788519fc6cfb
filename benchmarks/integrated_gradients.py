"""Integrated gradients over their floor, and beside Captum where it is installed.

(a) Fixed steps over the same number of forward and backward passes of the same
    batch, in one compiled loop, with no attribution.
(b) Equal fixed steps, our best microbatch and chunk over Captum's best internal batch
    size, on twin weights: a BERT-small-like model of 32 and of 128 tokens, and a
    ViT-S/16-like.
(c) The adaptive form at 1% over Captum's default rule with the steps that it needs
    for the same 95th percentile of errors, on models that are trained, for errors of
    random networks say nothing: the embedded one, whose paths are smooth, and a
    convolutional one with ReLUs. Without Captum, over the same rule here.
(d) Compile time with a scan over layers, over layers one by one.
(e) All ten classes at once over one class at a time.

Ratios below 1 are to our credit. Rows with Captum: pip install captum==0.9.0 torch.
"""

import dataclasses
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Pair, arguments, paired, report

import xviz_jax as xv
from xviz_jax import batch
from xviz_jax.models import embedded

try:
    import captum  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as missing:
    captum = torch = None
    print(f"Without Captum, (b) is left out and (c) is over our own rule: {missing}")

TOLERANCE = 0.01
STEPS = (8, 12, 16, 24, 32, 50, 64, 100, 128, 200, 256, 400, 512)


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

    @property
    def tokens(self) -> int:
        return (self.size // self.patch) ** 2 if self.patch else self.size

    @property
    def input(self) -> tuple[int, ...]:
        if self.patch:
            return (self.size, self.size, self.channels)
        return (self.size, self.width)


BERT = Shape("BERT-small-like, 32 tokens", 512, 4, 8, 32)
LONG = dataclasses.replace(BERT, name="BERT-small-like, 128 tokens", size=128)
VIT = Shape("ViT-S/16-like", 384, 12, 6, 224, 16, 3)
SMALL = Shape("tiny, 8 tokens", 16, 2, 2, 8)
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

    def norm(x, scale, shift):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return x * scale + shift

    def block(x, w):
        qkv = norm(x, w["norm1"], w["shift1"]) @ w["qkv"] + w["qkv_bias"]
        qkv = qkv.reshape(len(x), 3, shape.heads, -1).transpose(1, 2, 0, 3)
        scale = qkv.shape[-1] ** -0.5
        maps = jax.nn.softmax(jnp.einsum("hqd,hkd->hqk", qkv[0] * scale, qkv[1]))
        mixed = jnp.einsum("hqk,hkd->qhd", maps, qkv[2]).reshape(x.shape)
        x = x + mixed @ w["out"] + w["out_bias"]
        hidden = norm(x, w["norm2"], w["shift2"]) @ w["up"] + w["up_bias"]
        return x + jax.nn.gelu(hidden) @ w["down"] + w["down_bias"], None

    def forward(weights, x):
        if shape.patch:
            grid = shape.size // shape.patch
            x = (x - shape.mean) / shape.deviation
            x = x.reshape(grid, shape.patch, grid, shape.patch, -1)
            x = x.transpose(0, 2, 1, 3, 4).reshape(grid**2, -1)
            x = x @ weights["patch"] + weights["patch_bias"]
        x = jnp.concatenate([weights["first"], x]) + weights["position"]
        if scan:
            x, _ = jax.lax.scan(block, x, weights["block"])
        else:
            for layer in range(shape.layers):
                each = {name: w[layer] for name, w in weights["block"].items()}
                x, _ = block(x, each)
        x = norm(x[0], weights["norm"], weights["shift"])
        return x @ weights["head"] + weights["head_bias"]

    return forward


def torch_model(shape: Shape, weights: dict) -> Callable:
    """A batch of inputs to logits, with the same weights."""
    assert torch is not None
    functional, join = torch.nn.functional, torch.cat
    weights = jax.tree.map(torch.tensor, weights)

    def norm(x, scale, shift):
        return functional.layer_norm(x, x.shape[-1:], scale, shift, 1e-6)

    def forward(x):
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


def problem(shape: Shape, count: int) -> tuple[dict, jax.Array, jax.Array]:
    """Weights, inputs, and the classes that are explained."""
    weights = random_weights(shape)
    x = np.random.default_rng(1).normal(size=(count, *shape.input)).astype(np.float32)
    logits = jax.jit(jax.vmap(jax_model(shape), (None, 0)))(weights, x)
    weights = jax.tree.map(jnp.asarray, weights)
    return weights, jnp.asarray(x), jnp.argmax(logits, axis=-1)


def fixed(
    shape: Shape, steps: int, chunk: int, microbatch: int | None = None
) -> Callable:
    """A compiled batch of `(weights, inputs, classes)`, a few at a time."""
    explain = xv.integrated_gradients(
        jax_model(shape), steps=steps, chunk=chunk, argnums=1
    )
    one = lambda weights, x, target: explain(weights, x, target=target).scores
    if microbatch is None:
        return jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))

    def some_at_a_time(weights, x, targets):
        return jax.lax.map(
            lambda row: one(weights, *row), (x, targets), batch_size=microbatch
        )

    return jax.jit(some_at_a_time)


def passes(shape: Shape, steps: int, chunk: int) -> Callable:
    """The floor: as many forward and backward passes, and no attribution."""
    forward = jax_model(shape)

    def scalar(x, weights, target):
        return jnp.sum(jnp.where(jnp.arange(10) == target, forward(weights, x), 0))

    gradient = jax.grad(scalar)

    def one(weights, x, target):
        def turn(total, shifts):
            if chunk == 1:
                return total + gradient(x + shifts[0], weights, target), None
            found = jax.vmap(lambda s: gradient(x + s, weights, target))(shifts)
            return total + found.sum(axis=0), None

        shifts = jnp.linspace(0, 1e-3, steps).reshape(-1, chunk)
        return jax.lax.scan(turn, jnp.zeros_like(x), shifts)[0]

    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))


def best(candidates: dict[Any, Callable]) -> Any:
    """The candidate that takes the least time, the better of two after a first run."""
    times = {}
    for name, call in candidates.items():
        jax.block_until_ready(call())
        for _ in range(2):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            taken = time.perf_counter() - begin
            times[name] = min(taken, times.get(name, taken))
    return min(times, key=times.__getitem__)


def distance(found: Any, wanted: Any) -> np.ndarray:
    """Relative L1 distance of each row."""
    found, wanted = (
        np.asarray(each).reshape(len(each), -1) for each in (found, wanted)
    )
    return np.abs(found - wanted).sum(axis=1) / np.abs(wanted).sum(axis=1)


def over_the_floor(shape: Shape, count: int, steps: int, rounds: int) -> list[Pair]:
    args = problem(shape, count)
    pairs = []
    for chunk in sorted({1, min(steps, 4)}):
        ours, floor = fixed(shape, steps, chunk), passes(shape, steps, chunk)
        pairs.append(
            paired(
                f"(a) {shape.name}, {count} inputs, {steps} steps, chunk {chunk}",
                lambda ours=ours: ours(*args),
                lambda floor=floor: floor(*args),
                rounds=rounds,
                error="the same passes",
            )
        )
    return pairs


def captum_scores(forward: Callable, x: Any, targets: Any, steps: int, size: int):
    """Captum's attributions, its default rule."""
    assert captum is not None
    method = captum.attr.IntegratedGradients(forward)
    return method.attribute(
        x, target=targets, n_steps=steps, internal_batch_size=size
    ).detach()


def beside_captum(shape: Shape, count: int, steps: int, rounds: int) -> list[Pair]:
    if torch is None:
        return []
    weights, x, targets = problem(shape, count)
    forward = torch_model(shape, jax.tree.map(np.asarray, weights))
    points, classes = torch.tensor(np.asarray(x)), torch.tensor(np.asarray(targets))
    sizes = [(2, 1), (4, 1), (8, 1), (32, 1), (4, 2), (1, 4)]
    ours = {
        (microbatch, chunk): lambda program=program: program(weights, x, targets)
        for microbatch, chunk in sizes
        if chunk <= steps
        for program in [fixed(shape, steps, chunk, min(microbatch, count))]
    }
    theirs = {
        size: lambda size=size: captum_scores(forward, points, classes, steps, size)
        for size in (32, 64, 128)
    }
    chosen, size = best(ours), best(theirs)
    error = distance(theirs[size](), ours[chosen]()).max()
    return [
        paired(
            f"(b) {shape.name}, {count} inputs, {steps} steps, {chosen[0]} inputs x "
            f"{chosen[1]} nodes at once, over Captum's internal batch of {size}",
            ours[chosen],
            theirs[size],
            rounds=rounds,
            error=f"{error:.0e} apart",
        )
    ]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model here, and in torch; with its inputs and a dense midpoint rule."""

    name: str
    forward: Callable[[Any, Any], Any]
    weights: dict
    inputs: np.ndarray
    twin: Callable[[dict], Callable]
    dense: int
    outputs: tuple[str, ...] = ("logits", "softmax")


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
        )
        x = jax.nn.relu(x + weights[f"bias{layer}"].reshape(1, 1, 1, -1))
    return x.reshape(-1) @ weights["head"] + weights["offset"]


def conv_weights() -> dict:
    """Of the trained network that the tests have."""
    goldens = Path(__file__).parents[1] / "tests" / "gradients" / "goldens"
    with np.load(goldens / "convolutional.npz", allow_pickle=False) as stored:
        return dict(stored)


def torch_conv(weights: dict) -> Callable:
    """A batch of images to logits, with the same weights."""
    assert torch is not None
    functional = torch.nn.functional
    w = jax.tree.map(torch.tensor, weights)

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


def at_equal_error(model: Trained, rounds: int) -> list[Pair]:
    """(c) with one row for each function of the logits."""
    pairs = []
    shared = (jax.tree.map(jnp.asarray, model.weights),)
    for name in model.outputs:
        activation = jax.nn.softmax if name == "softmax" else lambda z: z
        function = lambda weights, x, f=activation: f(model.forward(weights, x))

        def run(microbatch=8, function=function, **options):
            explain = xv.integrated_gradients(function, chunk=1, argnums=1, **options)
            size = min(microbatch, len(model.inputs))
            return batch.run(explain, model.inputs, shared=shared, microbatch=size)

        wanted = run(steps=model.dense, rule="midpoint").attribution.scores
        found = run(tolerance=TOLERANCE).attribution
        tail = np.quantile(distance(found.scores, wanted), 0.95)
        needed = next(
            steps
            for steps in (*(s for s in STEPS if s < model.dense), model.dense)
            if np.quantile(distance(run(steps=steps).attribution.scores, wanted), 0.95)
            <= tail
            or steps >= model.dense
        )
        sizes = {
            size: run(size, tolerance=TOLERANCE).run_seconds for size in (4, 8, 16, 64)
        }
        size = min(sizes, key=sizes.__getitem__)
        ours = Timed(
            lambda run=run, size=size: run(size, tolerance=TOLERANCE).run_seconds
        )
        theirs = captum_at(model, name, needed) or Timed(
            lambda run=run, size=size, needed=needed: (
                run(size, steps=needed).run_seconds
            )
        )
        mean = found.diagnostics["evaluations"].mean()
        who = "Captum" if torch is not None else "Gauss-Legendre here"
        pairs.append(
            timed_pair(
                f"(c) {model.name}, {name}, {len(model.inputs)} inputs: adaptive, "
                f"mean of {mean:.0f} passes, {size} inputs at once, over {who} with "
                f"{needed} steps",
                ours,
                theirs,
                rounds,
                f"{tail:.1e} at 95%",
            )
        )
    return pairs


@dataclasses.dataclass(frozen=True)
class Timed:
    """Something that says how long it took, without its compilation."""

    seconds: Callable[[], float]


def captum_at(model: Trained, name: str, steps: int) -> Timed | None:
    if torch is None:
        return None
    logits = model.twin(model.weights)
    forward = logits if name == "logits" else lambda x: logits(x).softmax(dim=1)
    points = torch.tensor(model.inputs)
    classes = logits(points).argmax(dim=1)
    some = min(len(points), 8)
    size = best(
        {
            size: lambda size=size: captum_scores(
                forward, points[:some], classes[:some], steps, size
            )
            for size in (8, 32, 64, 256)
        }
    )

    def seconds() -> float:
        begin = time.perf_counter()
        # Of eight images at a time, so that its points fit into memory.
        for first in range(0, len(points), 8):
            rows = slice(first, first + 8)
            captum_scores(forward, points[rows], classes[rows], steps, size)
        return time.perf_counter() - begin

    return Timed(seconds)


def timed_pair(name: str, ours: Timed, theirs: Timed, rounds: int, error: str) -> Pair:
    mine, base = [], []
    for _ in range(rounds):
        mine.append(ours.seconds())
        base.append(theirs.seconds())
    ratios = tuple(a / b for a, b in zip(mine, base, strict=True))
    return Pair(name, float(np.median(mine)), float(np.median(base)), ratios, error)


def compilation(shape: Shape, rounds: int) -> Pair:
    """(d) of the adaptive form, which holds the model twice."""
    weights, x, targets = problem(shape, 1)

    def seconds(scan: bool) -> float:
        model = jax_model(shape, scan=scan)
        explain = xv.integrated_gradients(model, argnums=1)
        one = lambda weights, x, target: explain(weights, x, target=target)
        begin = time.perf_counter()
        jax.jit(one).lower(weights, x[0], targets[0]).compile()
        return time.perf_counter() - begin

    name = f"(d) {shape.name}, {shape.layers} layers: compiling a scan over layers"
    ours, theirs = Timed(lambda: seconds(True)), Timed(lambda: seconds(False))
    return timed_pair(f"{name}, over one by one", ours, theirs, rounds, "none")


def all_classes(shape: Shape, count: int, steps: int, rounds: int) -> Pair:
    """(e) with fixed steps, whose forward passes all classes share."""
    weights, x, _ = problem(shape, count)
    explain = xv.integrated_gradients(jax_model(shape), steps=steps, chunk=1, argnums=1)
    every = xv.many_targets(explain)
    together = jax.jit(
        jax.vmap(lambda weights, x: every(weights, x).scores, in_axes=(None, 0))
    )
    alone = fixed(shape, steps, 1)
    classes = [jnp.full(count, target) for target in range(10)]
    one_by_one = lambda: jnp.stack([alone(weights, x, each) for each in classes], 1)
    error = distance(together(weights, x), one_by_one()).max()
    return paired(
        f"(e) {shape.name}, {count} inputs, {steps} steps: ten classes at once, over "
        "one by one",
        lambda: together(weights, x),
        one_by_one,
        rounds=rounds,
        error=f"{error:.0e} apart",
    )


def main() -> None:
    options = arguments(__doc__)
    rounds = 2 if options.small else options.rounds
    # Shape, inputs, steps: the last few keep a round within two minutes.
    sizes = [(BERT, 32, 8), (LONG, 32, 4), (VIT, 32, 2)]
    deep, many = VIT, (BERT, 8, 8)
    images = embedded.images()[0]
    trained = [
        Trained(
            TRAINED.name,
            jax_model(TRAINED),
            trained_weights(),
            images[:64, :, :, None],
            lambda weights: torch_model(TRAINED, weights),
            256,
        ),
        Trained(
            "convolutional",
            conv_model,
            conv_weights(),
            images[500:628],
            torch_conv,
            2048,
        ),
    ]
    if options.small:
        sizes, deep, many = [(SMALL, 2, 1)], SMALL, (SMALL, 2, 1)
        weights, x, _ = problem(SMALL, 2)
        trained = [
            Trained(
                SMALL.name,
                jax_model(SMALL),
                jax.tree.map(np.asarray, weights),
                np.asarray(x),
                lambda weights: torch_model(SMALL, weights),
                2,
                ("logits",),
            )
        ]
    pairs = [pair for size in sizes for pair in over_the_floor(*size, rounds)]
    command = "python benchmarks/integrated_gradients.py --save"
    title = "Integrated gradients over forward and backward passes"
    report(title, command, pairs, save=options.save)
    pairs = [pair for size in sizes for pair in beside_captum(*size, rounds)]
    for model in trained:
        pairs += at_equal_error(model, 1 if options.small else rounds)
    pairs += [compilation(deep, 1 if options.small else 3), all_classes(*many, rounds)]
    title = "Integrated gradients beside others"
    report(title, command, pairs, save=options.save)


if __name__ == "__main__":
    main()
