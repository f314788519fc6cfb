"""The main job on the embedded default: both schools, a thousand images."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from xviz_jax import batch, compare_command, compare_subject
from xviz_jax.attention import attention_rollout
from xviz_jax.attribution import Attribution
from xviz_jax.comparison import CEILING, CONTROLS, Comparison
from xviz_jax.gradients import input_x_gradient, integrated_gradients, saliency
from xviz_jax.models import embedded
from xviz_jax.plotting import gallery

_GALLERY, _GALLERY_MISTAKES = 8, 2
# Less than a picture shows, and a quarter cheaper than 1%.
_TOLERANCE = 0.03
# Points of a perturbation curve of the comparison.
_CURVE = 4

METHODS = (
    "attention_rollout",
    "integrated_gradients",
    "saliency",
    "input_x_gradient",
)


def check(
    out: Path,
    limit: int,
    methods: Sequence[str],
    steps: int | None,
    microbatch: int,
    overwrite: bool,
    compare: int,
) -> None:
    """Refuses wrong options before anything is computed or written.

    Raises:
      ValueError: If an option does not fit, or the folder is not empty.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(f"methods are among {METHODS}, got {tuple(methods)}")
    if not 1 <= limit <= embedded.IMAGES:
        raise ValueError(f"`limit` is from 1 to {embedded.IMAGES}, got {limit}")
    # Methods check their options when they are made.
    integrated_gradients(lambda x: x, steps=steps)
    if microbatch < 1:
        raise ValueError(f"`microbatch` is positive, got {microbatch}")
    if compare < 0 or compare == 1:
        raise ValueError(f"`compare` is 0 or at least 2, got {compare}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} is not empty; pass --overwrite to write into it")


def explainers(
    model: Callable, steps: int | None
) -> dict[str, Callable[..., Attribution]]:
    """The methods the demo knows, for a model of `(parameters, image)`."""
    return {
        "attention_rollout": attention_rollout(model),
        # The batch fills the machine: one node of each image at a time.
        "integrated_gradients": integrated_gradients(
            model, tolerance=_TOLERANCE, steps=steps, chunk=1, argnums=1
        ),
        "saliency": saliency(model, argnums=1),
        "input_x_gradient": input_x_gradient(model, argnums=1),
    }


def run(
    out: Path,
    *,
    limit: int = 1000,
    methods: Sequence[str] = ("attention_rollout", "integrated_gradients"),
    steps: int | None = None,
    microbatch: int = 4,
    seed: int = 0,
    overwrite: bool = False,
    compare: int = 0,
) -> dict[str, Any]:
    """Explains held-out images, prints a table, and writes the results.

    Args:
      out: Folder for `gallery.png`, `attributions.npz` and `summary.json`, and for
        `comparison.json` and `comparison.png`.
      limit: How many of the 1,000 images.
      methods: Names among `attention_rollout`, `integrated_gradients`, `saliency`,
        `input_x_gradient`.
      steps: Path nodes of integrated gradients, the same for all images; None for
        as many as each image needs.
      microbatch: Images computed at once.
      seed: Picks the images of the gallery.
      overwrite: Allow a folder that is not empty.
      compare: Images on which all methods are compared; 0 for no comparison.

    Returns:
      The summary, as written.

    Raises:
      ValueError: If an option does not fit, or the folder is not empty.
    """
    check(out, limit, methods, steps, microbatch, overwrite, compare)
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    forward, parameters = embedded.functional()
    known = explainers(forward, steps)
    images, labels = embedded.images()
    images, labels = images[:limit], labels[:limit]

    console = Console()
    logits = _logits(forward, parameters, images)
    predicted = logits.argmax(axis=-1)
    runs: dict[str, batch.Run] = {}
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        for name in methods:
            task = bar.add_task(name, total=limit)
            runs[name] = batch.run(
                known[name],
                images,
                shared=(parameters,),
                microbatch=microbatch,
                progress=lambda count, task=task: bar.advance(task, count),
            )
    arrays = {name: runs[name].attribution.scores for name in methods}
    np.savez(
        out / "attributions.npz",
        allow_pickle=False,
        predicted=predicted,
        labels=labels,
        **arrays,
    )
    summary = _summarise(runs, predicted, labels, steps, microbatch, seed)
    _draw(out / "gallery.png", images, labels, logits, arrays, seed)
    verdict = None
    if compare:
        verdict = _compared(min(compare, limit), console, seed)
        compare_command.write(verdict, out)
        summary["comparison"] = _findings(verdict)
    summary["total_seconds"] = round(time.perf_counter() - begin, 2)
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    (out / "summary.json").write_text(text)
    console.print(_table(summary))
    if verdict is not None:
        compare_command.show(verdict, console)
    console.print(
        f"{limit} images, accuracy {summary['accuracy']:.1%}, "
        f"{summary['total_seconds']:.0f} s in all on {summary['device']}; "
        f"results in {out}"
    )
    return summary


def _logits(forward: Callable, parameters: Any, images: np.ndarray) -> np.ndarray:
    program = jax.jit(jax.vmap(forward, in_axes=(None, 0)))
    padded = np.concatenate([images, np.repeat(images[-1:], -len(images) % 50, axis=0)])
    parts = [program(parameters, chunk) for chunk in padded.reshape(-1, 50, 28, 28)]
    return np.concatenate(parts)[: len(images)]


def _summarise(
    runs: dict[str, batch.Run],
    predicted: np.ndarray,
    labels: np.ndarray,
    steps: int | None,
    microbatch: int,
    seed: int,
) -> dict[str, Any]:
    methods = {}
    for name, done in runs.items():
        row: dict[str, Any] = {
            "inputs_per_second": round(len(labels) / done.run_seconds, 2),
            "run_seconds": round(done.run_seconds, 2),
            "compile_seconds": round(done.compile_seconds, 2),
        }
        diagnostics = done.attribution.diagnostics
        if "completeness_gap" in diagnostics:
            gap = diagnostics["completeness_gap"]
            row["converged"] = float(np.mean(diagnostics["converged"]))
            row["completeness_gap_median"] = float(np.median(gap))
            row["completeness_gap_p99"] = float(np.quantile(gap, 0.99))
            row["evaluations_mean"] = float(np.mean(diagnostics["evaluations"]))
        methods[name] = row
    return {
        "images": len(labels),
        "accuracy": float(np.mean(predicted == labels)),
        "steps": steps,
        "tolerance": _TOLERANCE,
        "microbatch": microbatch,
        "seed": seed,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "methods": methods,
    }


def _compared(count: int, console: Console, seed: int) -> Comparison:
    """Which of the methods may be believed, on the first images."""
    subject = compare_subject.of_embedded(None, count)
    with console.status("comparing") as status:
        return compare_command.judged(
            subject,
            compare_command.explainers(subject, METHODS),
            steps=_CURVE,
            key=jax.random.key(seed),
            progress=lambda part: status.update(f"comparing: {part}"),
        )


def _findings(found: Comparison) -> dict[str, Any]:
    """The verdict, and the intervals behind it."""
    settings = found.settings
    places: dict[str, Any] = {}
    for metric in settings["evidence"]:
        for imputer in settings["imputers"]:
            rows = places.setdefault(metric, {}).setdefault(imputer, {})
            for name in (*found.methods, *CONTROLS, CEILING):
                place = found.summary(name, metric, imputer).place
                rows[name] = None if place is None else dataclasses.asdict(place)
    return {
        "images": settings["records"],
        "features": settings["features"],
        "level": settings["level"],
        "verdict": found.verdict,
        "random 0, leave one out 1": places,
    }


def _table(summary: dict[str, Any]) -> Table:
    table = Table(title="xviz-jax demo")
    headings = (
        "method",
        "inputs/s",
        "compile s",
        "converged",
        "median gap",
        "99% gap",
    )
    for heading in headings:
        left = heading == "method"
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    for name, row in summary["methods"].items():
        cells = ["-", "-", "-"]
        if "converged" in row:
            cells = [
                f"{row['converged']:.1%}",
                f"{row['completeness_gap_median']:.3%}",
                f"{row['completeness_gap_p99']:.3%}",
            ]
        speed, compiling = row["inputs_per_second"], row["compile_seconds"]
        table.add_row(name, f"{speed:.1f}", f"{compiling:.1f}", *cells)
    return table


def _draw(
    path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    arrays: dict[str, np.ndarray],
    seed: int,
) -> None:
    """Draws eight images, two of them mistaken for another class where there are."""
    predicted = logits.argmax(axis=-1)
    random = np.random.default_rng(seed)
    order = random.permutation(len(images))
    wrong = [i for i in order if predicted[i] != labels[i]][:_GALLERY_MISTAKES]
    # One of each class before a second of any.
    seen = np.zeros(len(images), int)
    for label in np.unique(labels):
        rows = [i for i in order if labels[i] == predicted[i] == label]
        seen[rows] = np.arange(len(rows))
    right = [i for i in order if predicted[i] == labels[i]]
    right = sorted(right, key=seen.__getitem__)[: _GALLERY - len(wrong)]
    chosen = [*right, *wrong]
    classes = embedded.card()["classes"]
    titles = [
        classes[predicted[i]]
        if predicted[i] == labels[i]
        else f"{classes[predicted[i]]}\n(is {classes[labels[i]]})"
        for i in chosen
    ]
    figure = gallery(
        images[chosen],
        {name: _as_map(scores[chosen]) for name, scores in arrays.items()},
        titles=titles,
        marked=range(len(right), len(chosen)),
    )
    figure.savefig(path, dpi=150)


def _as_map(scores: np.ndarray) -> np.ndarray:
    """Scores of tokens, without the class token's, as maps of patches."""
    if scores.ndim == 3:
        return scores
    patches = scores[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    return patches.reshape(-1, side, side)
