"""Metrics of a comparison over their floor, and beside Quantus where it is installed.

(a) Five metrics of four methods on images of the embedded model, each metric one
    compiled program for all methods, over as many plain forward passes of the same
    batch. The last column says how many evaluations of the model that is a second.
(b) Three metrics over the same three of Quantus, of the same scores, on the embedded
    model's twin in torch: deletion of 28 pixels at a time, the correlation over 64
    sets of a fifth of the pixels, sparseness. The last column is how far apart the
    results are: curves at most, means of the rest.

Ratios below 1 are to our credit. (b): pip install captum==0.9.0 quantus==0.6.0 torch.
"""

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from integrated_gradients import TRAINED, torch, torch_model, trained_weights
from timing import Pair, arguments, paired, report

import xviz_jax as xv
from xviz_jax import metrics
from xviz_jax.models import embedded

try:
    import quantus  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as missing:
    quantus = None
    print(f"Without Quantus, (b) is left out: {missing}")

PATCH, MICROBATCH = 4, 8
SIDE = 28
SAMPLES, FRACTION = 64, 0.2


def explanations(
    forward: Callable, parameters: Any, images: np.ndarray, most: int
) -> tuple[np.ndarray, jax.Array]:
    """Scores of up to four methods, `[images, methods, 28, 28]`, and the classes."""
    every = jax.jit(jax.vmap(forward, in_axes=(None, 0)))
    targets = jnp.argmax(every(parameters, images), axis=-1)
    rollout = xv.attention_rollout(forward)

    def on_pixels(parameters, image, target=None, key=None):
        found = rollout(parameters, image, target=target)
        grid = found.scores[1:].reshape(SIDE // 2, SIDE // 2)
        return xv.Attribution(
            scores=jnp.repeat(jnp.repeat(grid, 2, axis=0), 2, axis=1),
            output=found.output,
        )

    explainers = [
        xv.input_x_gradient(forward, argnums=1),
        xv.saliency(forward, argnums=1),
        xv.integrated_gradients(forward, steps=8, chunk=1, argnums=1),
        on_pixels,
    ]
    found = []
    for explain in explainers[:most]:
        one = lambda p, x, t, explain=explain: explain(p, x, target=t).scores
        program = jax.jit(
            lambda p, x, t, one=one: jax.lax.map(
                lambda row: one(p, *row), (x, t), batch_size=MICROBATCH
            )
        )
        found.append(np.asarray(program(parameters, images, targets)))
    return np.stack(found, axis=1), targets


def measuring(metric: metrics.Metric) -> Callable:
    """Values of several rankings, `(parameters, images, scores, targets, keys)`."""

    def one(parameters, image, scores, target, key):
        options = {"key": key} if "key" in metric.needs else {}
        return jax.lax.map(
            lambda each: metric(parameters, image, each, target=target, **options),
            scores,
        )

    return jax.jit(
        lambda parameters, *rows: jax.lax.map(
            lambda row: one(parameters, *row), rows, batch_size=MICROBATCH
        )
    )


def passes(forward: Callable, count: int) -> Callable:
    """The floor: so many forward passes of each image, and nothing else."""

    def one(parameters, image):
        def turn(total, shift):
            return total + jnp.sum(forward(parameters, image + shift)), None

        return jax.lax.scan(turn, jnp.float32(0), jnp.linspace(0, 1e-3, count))[0]

    return jax.jit(
        lambda parameters, images: jax.lax.map(
            lambda image: one(parameters, image), images, batch_size=8 * MICROBATCH
        )
    )


def over_the_floor(images: np.ndarray, rounds: int, most: int) -> list[Pair]:
    forward, parameters = embedded.functional()
    scores, targets = explanations(forward, parameters, images, most)
    keys = jax.random.split(jax.random.key(0), len(images))
    groups = xv.patches((SIDE, SIDE), PATCH)
    options = {"groups": groups, "argnums": 1}
    # Each with how often it evaluates the model for one ranking.
    known = {
        "comprehensiveness": (metrics.comprehensiveness(forward, **options), 7),
        "sufficiency": (metrics.sufficiency(forward, **options), 7),
        "deletion": (metrics.deletion(forward, **options), 17),
        "abpc": (metrics.abpc(forward, **options), 32),
        "faithfulness_correlation": (
            metrics.faithfulness_correlation(forward, samples=SAMPLES, **options),
            SAMPLES + 1,
        ),
    }
    pairs = []
    for name, (metric, evaluations) in list(known.items())[: most + 1]:
        program = measuring(metric)
        count = evaluations * scores.shape[1]
        floor = passes(forward, count)
        pair = paired(
            f"(a) {name}, {scores.shape[1]} methods, {len(images)} images",
            lambda program=program: program(parameters, images, scores, targets, keys),
            lambda floor=floor: floor(parameters, images),
            rounds=rounds,
            error="",
        )
        speed = count * len(images) / pair.seconds
        pairs.append(
            Pair(
                pair.name,
                pair.seconds,
                pair.floor_seconds,
                pair.ratios,
                f"{speed:.0f} evaluations a second",
            )
        )
    return pairs


def beside_quantus(images: np.ndarray, rounds: int) -> list[Pair]:
    if quantus is None or torch is None:
        return []
    forward, parameters = embedded.functional()
    scores, targets = explanations(forward, parameters, images, 1)
    keys = jax.random.split(jax.random.key(0), len(images))
    twin = torch_model(TRAINED, trained_weights())

    class Module(torch.nn.Module):
        def forward(self, x):
            return twin(x.reshape(-1, SIDE, SIDE, 1))

    plain = {
        "normalise": False,
        "abs": False,
        "disable_warnings": True,
        "display_progressbar": False,
    }
    size = round(FRACTION * SIDE * SIDE)
    theirs = {
        "deletion": quantus.PixelFlipping(
            features_in_step=SIDE, perturb_baseline=0.0, **plain
        ),
        "faithfulness_correlation": quantus.FaithfulnessCorrelation(
            nr_runs=SAMPLES,
            subset_size=size,
            perturb_baseline=0.0,
            return_aggregate=False,
            **plain,
        ),
        "sparseness": quantus.Sparseness(**{**plain, "abs": True}),
    }
    ours = {
        "deletion": metrics.deletion(forward, steps=SIDE, argnums=1),
        "faithfulness_correlation": metrics.faithfulness_correlation(
            forward, samples=SAMPLES, fraction=FRACTION, argnums=1
        ),
        "sparseness": metrics.sparseness(forward, argnums=1),
    }
    model = Module().eval()
    classes = np.asarray(targets)

    def ask(metric: Any) -> Any:
        # It prints and warns, whatever it is told.
        quiet = contextlib.redirect_stdout(io.StringIO())
        with quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return metric(
                model=model,
                x_batch=images[:, None],
                y_batch=classes,
                a_batch=scores,
                softmax=False,
                channel_first=True,
                batch_size=64,
            )

    pairs = []
    for name, metric in ours.items():
        program = measuring(metric)
        call = lambda program=program: program(
            parameters, images, scores, targets, keys
        )
        found, wanted = call(), np.asarray(ask(theirs[name]), np.float64)
        if name == "deletion":
            curves = np.asarray(found.details["curve"])[:, 0, 1:]
            apart = np.abs(curves - wanted.reshape(curves.shape)).max()
        else:
            apart = abs(np.nanmean(found.value) - np.nanmean(wanted))
        pairs.append(
            paired(
                f"(b) {name}, {len(images)} images, over Quantus",
                call,
                lambda name=name: ask(theirs[name]),
                rounds=rounds,
                error=f"{apart:.1e} apart",
            )
        )
    return pairs


def main() -> None:
    chosen = arguments(__doc__)
    images, _ = embedded.images()
    # A round takes minutes.
    rounds = 1 if chosen.small else min(chosen.rounds, 3)
    count, most = (2, 1) if chosen.small else (256, 4)
    pairs = over_the_floor(images[:count], rounds, most)
    pairs += beside_quantus(images[:count], rounds)
    command = "python benchmarks/comparison.py"
    report("Metrics of a comparison", command, pairs, save=chosen.save)


if __name__ == "__main__":
    main()
