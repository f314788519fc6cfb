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
On a GPU each row is there in float32, whose products are never rounded to TF32, and
with products in bfloat16 summed in float32; there (a) is followed by the time of the
matrix products alone, at the rate of a large product measured in the same run.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Memory that JAX does not use is PyTorch's.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from timing import Pair, arguments, paired, report
from twins import (
    DEVICE,
    ON_GPU,
    TRAINED,
    Shape,
    conv_model,
    conv_weights,
    jax_model,
    random_weights,
    torch_conv,
    torch_model,
    trained_weights,
)

import xviz_jax as xv
from xviz_jax import batch
from xviz_jax.models import embedded

try:
    import captum  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as missing:
    captum = torch = None
    print(f"Without Captum, (b) is left out and (c) is over our own rule: {missing}")

PRECISIONS = ("float32", "bfloat16") if ON_GPU else ("float32",)
TOLERANCE = 0.01
STEPS = (8, 12, 16, 24, 32, 50, 64, 100, 128, 200, 256, 400, 512)

BERT = Shape("BERT-small-like, 32 tokens", 512, 4, 8, 32)
LONG = dataclasses.replace(BERT, name="BERT-small-like, 128 tokens", size=128)
VIT = Shape("ViT-S/16-like", 384, 12, 6, 224, 16, 3)
SMALL = Shape("tiny, 8 tokens", 16, 2, 2, 8)


def problem(shape: Shape, count: int) -> tuple[dict, jax.Array, jax.Array]:
    """Weights, inputs, and the classes that are explained."""
    weights = random_weights(shape)
    x = np.random.default_rng(1).normal(size=(count, *shape.input)).astype(np.float32)
    shape = dataclasses.replace(shape, precision="float32")
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


def compiled(programs: Sequence[Callable], args: tuple) -> list[Callable]:
    """Jitted functions, compiled for `args` side by side."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda f: f.lower(*args).compile(), programs))


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
    chunks = sorted({1, min(steps, 4)})
    programs = compiled(
        [make(shape, steps, chunk) for make in (fixed, passes) for chunk in chunks],
        args,
    )
    for chunk, ours, floor in zip(
        chunks, programs[: len(chunks)], programs[len(chunks) :], strict=True
    ):
        name = f"(a) {shape}, {count} inputs, {steps} steps, chunk {chunk}"
        pair = paired(
            name,
            lambda ours=ours: ours(*args),
            lambda floor=floor: floor(*args),
            rounds=rounds,
            error="the same passes",
        )
        pairs.append(pair)
        if ON_GPU:
            least = count * steps * products(shape) / matrix_rate(shape.precision)
            ratios = (pair.seconds / least,)
            name += ", over its matrix products"
            pairs.append(Pair(name, pair.seconds, least, ratios, "-"))
    return pairs


def products(shape: Shape) -> float:
    """Floating-point operations of the products of a forward and a backward pass."""
    tokens, width = shape.tokens + 1, shape.width
    weights = 24 * tokens * width**2
    attention = 4 * tokens**2 * width
    # Backwards, by the inputs only; of a product of two of these there are two.
    return shape.layers * (2 * weights + 3 * attention)


@functools.cache
def matrix_rate(precision: str) -> float:
    """Floating-point operations a second of a large product, measured."""
    n = 8192
    x = jax.random.normal(jax.random.key(0), (n, n), precision)
    product = jax.jit(functools.partial(jnp.matmul, precision="highest"))
    jax.block_until_ready(product(x, x))
    begin = time.perf_counter()
    jax.block_until_ready([product(x, x) for _ in range(5)])
    return 5 * 2 * n**3 / (time.perf_counter() - begin)


def captum_scores(forward: Callable, x: Any, targets: Any, steps: int, size: int):
    """Captum's attributions, its default rule."""
    assert captum is not None
    method = captum.attr.IntegratedGradients(forward)
    found = method.attribute(x, target=targets, n_steps=steps, internal_batch_size=size)
    # On the host, and so computed.
    return found.detach().cpu()


def beside_captum(shape: Shape, count: int, steps: int, rounds: int) -> list[Pair]:
    if torch is None:
        return []
    weights, x, targets = problem(shape, count)
    forward = torch_model(shape, jax.tree.map(np.asarray, weights))
    points, classes = (
        torch.tensor(np.asarray(each), device=DEVICE) for each in (x, targets)
    )
    sizes = [(2, 1), (4, 1), (8, 1), (32, 1), (4, 2), (1, 4)]
    if ON_GPU:
        sizes = [(32, 1), (32, 4), (32, 8), (8, 8)]
    sizes = [(few, chunk) for few, chunk in sizes if chunk <= steps]
    args = (weights, x, targets)
    programs = compiled(
        [fixed(shape, steps, chunk, min(few, count)) for few, chunk in sizes], args
    )
    ours = {
        size: lambda program=program: program(*args)
        for size, program in zip(sizes, programs, strict=True)
    }
    theirs = {
        size: lambda size=size: captum_scores(forward, points, classes, steps, size)
        for size in ((128, 256, 1024) if ON_GPU else (32, 64, 128))
    }
    chosen, size = best(ours), best(theirs)
    error = distance(theirs[size](), ours[chosen]()).max()
    return [
        paired(
            f"(b) {shape}, {count} inputs, {steps} steps, {chosen[0]} inputs x "
            f"{chosen[1]} nodes at once, over Captum's internal batch of {size}",
            ours[chosen],
            theirs[size],
            rounds=rounds,
            error=f"{error:.0e} apart",
        )
    ]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model here, and in torch; with its inputs and a dense midpoint rule.

    Here in some precisions, the first of which is exact and also PyTorch's.
    """

    name: str
    forward: dict[str, Callable[[Any, Any], Any]]
    weights: dict
    inputs: np.ndarray
    twin: Callable[[dict], Callable]
    dense: int
    outputs: tuple[str, ...] = ("logits", "softmax")


def at_equal_error(model: Trained, rounds: int) -> list[Pair]:
    """(c) with one row for each function of the logits and each precision."""
    pairs = []
    shared = batch.Placed(
        (jax.tree.map(jnp.asarray, model.weights),), jax.devices()[:1]
    )
    sizes = (64, 256) if ON_GPU else (4, 8, 16, 64)
    sizes = sorted({min(size, len(model.inputs)) for size in sizes})

    def program(function: Callable, size: int, **options: Any) -> Callable:
        explain = xv.integrated_gradients(function, chunk=1, argnums=1, **options)
        ready = batch.Program(explain, model.inputs, shared=shared, microbatch=size)
        return lambda: ready(model.inputs)

    for name in model.outputs:
        activation = jax.nn.softmax if name == "softmax" else lambda z: z
        functions = {
            precision: lambda weights, x, f=activation, forward=forward: f(
                forward(weights, x)
            )
            for precision, forward in model.forward.items()
        }
        exact = functions[next(iter(functions))]
        wanted = program(exact, sizes[-1], steps=model.dense, rule="midpoint")().scores
        tail = lambda found, wanted=wanted: np.quantile(distance(found, wanted), 0.95)
        if torch is not None:
            who, rule = "Captum", captum_at(model, name)
        else:
            who = "Gauss-Legendre here"
            rule = lambda steps, exact=exact: program(exact, sizes[-1], steps=steps)
        for precision, function in functions.items():
            with ThreadPoolExecutor() as pool:
                make = functools.partial(program, function, tolerance=TOLERANCE)
                ours = dict(zip(sizes, pool.map(make, sizes), strict=True))
            size = best(ours)
            found = ours[size]()
            error = tail(found.scores)
            needed = next(
                steps
                for steps in (*(s for s in STEPS if s < model.dense), model.dense)
                if steps >= model.dense or tail(scores_of(rule(steps)())) <= error
            )
            mean = found.diagnostics["evaluations"].mean()
            title = f"{model.name}, {precision}" if ON_GPU else model.name
            pairs.append(
                paired(
                    f"(c) {title}, {name}, {len(model.inputs)} inputs: adaptive, mean "
                    f"of {mean:.0f} passes, {size} inputs at once, over {who} with "
                    f"{needed} steps",
                    ours[size],
                    rule(needed),
                    rounds=rounds,
                    error=f"{error:.1e} at 95%",
                )
            )
    return pairs


def scores_of(found: Any) -> Any:
    return getattr(found, "scores", found)


@dataclasses.dataclass(frozen=True)
class Timed:
    """Something that says how long it took, without its compilation."""

    seconds: Callable[[], float]


def captum_at(model: Trained, name: str) -> Callable[[int], Callable]:
    """`steps -> a call`, in float32 and with the internal batch size that suits it."""
    assert torch is not None
    logits = model.twin(model.weights)
    forward = logits if name == "logits" else lambda x: logits(x).softmax(dim=1)
    points = torch.tensor(model.inputs, device=DEVICE)
    with torch.no_grad():
        classes = logits(points).argmax(dim=1)
    # So many images at a time, for its points to fit into memory.
    some = min(len(points), 128 if ON_GPU else 8)
    size = best(
        {
            size: lambda size=size: captum_scores(
                forward, points[:some], classes[:some], 32, size
            )
            for size in ((256, 1024, 4096) if ON_GPU else (8, 32, 64, 256))
        }
    )

    def at(steps: int) -> Callable:
        def call() -> Any:
            parts = [
                captum_scores(
                    forward,
                    points[first : first + some],
                    classes[first : first + some],
                    steps,
                    size,
                )
                for first in range(0, len(points), some)
            ]
            return np.concatenate([part.numpy() for part in parts])

        return call

    return at


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


def shown(pair: Pair) -> Pair:
    """At once, for it may be long until the others are there."""
    print(pair.row(), flush=True)
    return pair


def main() -> None:
    options = arguments(__doc__)
    rounds = 2 if options.small else options.rounds
    # Shape, inputs, steps: the last few keep a round within two minutes.
    sizes = [(BERT, 32, 8), (LONG, 32, 4), (VIT, 32, 2)]
    deep, many = VIT, (BERT, 8, 8)
    vit_images, conv_images = slice(64), slice(500, 628)
    if ON_GPU:
        sizes = [
            (dataclasses.replace(shape, precision=precision), 32, 32)
            for shape in (BERT, LONG, VIT)
            for precision in PRECISIONS
        ]
        many = (BERT, 32, 32)
        vit_images, conv_images = slice(512), slice(500, 1000)
    images = embedded.images()[0]
    precise = lambda precision: dataclasses.replace(TRAINED, precision=precision)
    trained = [
        Trained(
            TRAINED.name,
            {precision: jax_model(precise(precision)) for precision in PRECISIONS},
            trained_weights(),
            images[vit_images, :, :, None],
            lambda weights: torch_model(TRAINED, weights),
            256,
        ),
        Trained(
            "convolutional",
            {"float32": conv_model},
            conv_weights(),
            images[conv_images],
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
                {"float32": jax_model(SMALL)},
                jax.tree.map(np.asarray, weights),
                np.asarray(x),
                lambda weights: torch_model(SMALL, weights),
                2,
                ("logits",),
            )
        ]
    where = " on a GPU" if ON_GPU else ""
    command = "python benchmarks/integrated_gradients.py --save"
    pairs = [shown(pair) for size in sizes for pair in over_the_floor(*size, rounds)]
    title = f"Integrated gradients over forward and backward passes{where}"
    report(title, command, pairs, save=options.save)
    pairs = [shown(pair) for size in sizes for pair in beside_captum(*size, rounds)]
    for model in trained:
        few = 1 if options.small else rounds
        pairs += [shown(pair) for pair in at_equal_error(model, few)]
    turns = 1 if options.small or ON_GPU else 3
    pairs += [compilation(deep, turns), all_classes(*many, rounds)]
    title = f"Integrated gradients beside others{where}"
    report(title, command, pairs, save=options.save)


if __name__ == "__main__":
    main()
