"""`xviz-jax compare`: from what the command line asks to a verdict, saved and drawn."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xviz_jax import explain, metrics
from xviz_jax.attribution import Attribution
from xviz_jax.compare_subject import Subject, groups_of, positions_of, subject_of
from xviz_jax.comparison import CEILING, CONTROLS, Comparison, compare, in_words
from xviz_jax.escape import terminal

METHODS = (
    "attention_rollout",
    "integrated_gradients",
    "saliency",
    "input_x_gradient",
)
# Less than a ranking of patches shows.
_TOLERANCE = 0.1


def run(
    model: str,
    data: Path | None,
    methods: Sequence[str],
    limit: int | None,
    out: Path,
    console: Console,
    *,
    against: str | None = None,
    patch: int | None = None,
    steps: int = 8,
    microbatch: int = 8,
    seed: int = 0,
) -> Comparison:
    """Compares methods, prints the verdict, and writes it with a figure.

    Args:
      model: `embedded`, a checkpoint's folder, or `package.module:function`.
      data: A `.npy` file with a row for each record, or an `.npz` file with `records`
        and, if there are any, `targets`, `slices` and, of padded texts, `mask`; None
        for the embedded model's own images.
      methods: Names of methods in `xviz_jax`.
      limit: How many records, the first ones; None for all.
      out: Folder for `comparison.json` and `comparison.png`.
      console: Where to print.
      against: A text or image file, whose cosine with the features of a model without
        classes is explained.
      patch: The side of a feature in pixels, of images.
      steps: Points of a perturbation curve.
      microbatch: Records computed at once.
      seed: Of everything random.

    Raises:
      ValueError: If the request does not fit the model, the methods or the data.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder")
    if limit is not None and limit < 2:
        raise ValueError(f"`--limit` is at least 2, got {limit}")
    subject = subject_of(model, data, limit, against)
    if patch is not None:
        subject = dataclasses.replace(subject, patch=patch)
    with console.status("comparing") as status:
        found = judged(
            subject,
            explainers(subject, methods),
            steps=steps,
            microbatch=microbatch,
            key=jax.random.key(seed),
            progress=lambda part: status.update(f"comparing: {part}"),
        )
    show(found, console)
    write(found, out)
    console.print(Text(terminal(f"results in {out}")))
    return found


def show(found: Comparison, console: Console) -> None:
    """Prints the tables, the verdict, and features that carry one slice alone."""
    console.print(table(found))
    if any(method.slices for method in found.methods.values()):
        console.print(slices_table(found))
    lines = [f"{name}: {sentence}" for name, sentence in found.verdict.items()]
    for name, method in found.methods.items():
        lines += [
            f"{name}, {slice_}: {in_words(feature, share, elsewhere)}"
            for slice_, feature, share, elsewhere in method.raised
        ]
    for line in lines:
        console.print(Text(terminal(line)))


def write(found: Comparison, out: Path) -> None:
    """Writes `comparison.json` and `comparison.png`."""
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / "comparison.json")
    figure = found.plot().get_figure(root=True)
    assert figure is not None
    figure.savefig(out / "comparison.png", dpi=150)


def judged(
    subject: Subject,
    methods: dict[str, Callable[..., Attribution]],
    *,
    key: jax.Array,
    steps: int,
    microbatch: int = 8,
    progress: Callable[[str], Any] | None = None,
) -> Comparison:
    """Compares methods on the subject's records, at the granularity of its features."""
    return compare(
        subject.forward,
        methods,
        (subject.records, *subject.rest),
        shared=subject.shared,
        targets=subject.targets,
        class_specific=not callable(subject.targets),
        groups=groups_of(subject),
        padding=subject.padding,
        positions=positions_of(subject, methods),
        imputers=subject.imputers,
        metrics=[
            partial(metrics.abpc, steps=steps),
            metrics.comprehensiveness,
            metrics.sparseness,
        ],
        slices=subject.slices,
        microbatch=microbatch,
        key=key,
        progress=progress,
    )


def explainers(
    subject: Subject, methods: Sequence[str]
) -> dict[str, Callable[..., Attribution]]:
    """Methods by name, made for the subject.

    Raises:
      ValueError: If there is no such method, or it needs options of its own.
    """
    known, made = explain.methods(), {}
    for name in methods:
        if name not in known:
            raise ValueError(f"`--methods` are among {sorted(known)}, got {name!r}")
        options = inspect.signature(known[name]).parameters
        needed = [
            o.name for o in list(options.values())[1:] if o.default is inspect._empty
        ]
        if needed:
            raise ValueError(f"{name} needs {needed}, which `compare` cannot give")
        given = {"argnums": len(subject.shared), "query": subject.query}
        if subject.baseline is not None:
            given["baseline"] = subject.baseline
        if name == "integrated_gradients":
            # The batch fills the machine: one node of each record at a time.
            given |= {"tolerance": _TOLERANCE, "chunk": 1}
        chosen = {key: value for key, value in given.items() if key in options}
        if subject.rest and given["query"] == -1 and "query" in options:
            made[name] = _at_the_last_token(known[name], subject, chosen)
        else:
            made[name] = known[name](subject.forward, **chosen)
    return made


def _at_the_last_token(
    method: Callable, subject: Subject, options: dict[str, Any]
) -> Callable[..., Attribution]:
    """A method that explains the last position that is no padding."""

    def explain(*args: Any, target: Any = None, key: Any = None) -> Attribution:
        *_, mask = args
        last = jnp.sum(mask.astype(jnp.int32)) - 1
        made = method(subject.forward, **{**options, "query": last})
        return made(*args, target=target, key=key)

    return explain


def table(found: Comparison) -> Table:
    """Every ranking's place, by metric and imputer, with what the methods cost."""
    shown = Table(
        title="random 0, leave one out 1; intervals are in comparison.json",
        title_justify="left",
    )
    columns = [
        (metric, imputer)
        for metric in found.settings["evidence"]
        for imputer in found.settings["imputers"]
    ]
    shown.add_column("method", no_wrap=True)
    for metric, imputer in columns:
        shown.add_column(f"{metric}, {imputer}", justify="right", overflow="fold")
    for head in ("passes", "ms"):
        shown.add_column(head, justify="right", no_wrap=True)
    for name in (*found.methods, *CONTROLS, CEILING):
        places = [found.summary(name, *column).place for column in columns]
        cells = ["-" if each is None else f"{each.estimate:.2f}" for each in places]
        method = found.methods.get(name)
        if method is None:
            shown.add_row(name, *cells, "", "", style="dim")
            continue
        count = method.evaluations
        spent = ["-" if count is None else f"{count:.1f}", f"{method.milliseconds:.1f}"]
        shown.add_row(Text(terminal(name)), *cells, *spent)
    return shown


def slices_table(found: Comparison) -> Table:
    """Each slice's verdicts, with the features that carry it alone."""
    shown = Table(
        title="slices, with the features that carry one alone", title_justify="left"
    )
    shown.add_column("slice", overflow="fold")
    shown.add_column("n", justify="right", no_wrap=True)
    for name in found.methods:
        shown.add_column(Text(terminal(name)), overflow="fold")
    for slice_, count in found.settings["slices"].items():
        cells = []
        for method in found.methods.values():
            word = method.slices[slice_].partition(":")[0]
            raised = [
                f"feature {feature}: {share.estimate:.0%}, else {elsewhere:.0%}"
                for name, feature, share, elsewhere in method.raised
                if name == slice_
            ]
            cells.append(Text("\n".join([word, *raised])))
        shown.add_row(Text(terminal(slice_)), str(count), *cells)
    return shown
