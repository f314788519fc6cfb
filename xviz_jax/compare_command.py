"""`xviz-jax compare`: from what the command line asks to a verdict, saved and drawn."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xviz_jax import arrays, baselines, doctor, explain, metrics, models
from xviz_jax.attribution import Attribution
from xviz_jax.comparison import CEILING, CONTROLS, Comparison, compare
from xviz_jax.escape import terminal
from xviz_jax.metrics.imputers import Imputer
from xviz_jax.models import embedded
from xviz_jax.perturbation import patches

METHODS = (
    "attention_rollout",
    "integrated_gradients",
    "saliency",
    "input_x_gradient",
)
# The side of a feature of the embedded model's images, in pixels.
PATCH = 4
# Less than a ranking of patches shows.
_TOLERANCE = 0.1
_BLUR = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and the records that its explanations are compared on.

    Attributes:
      forward: A function of `(*shared, x, *rest)`.
      shared: Its parameters, or nothing.
      records: A row for each record.
      imputers: What takes the place of absent features.
      baseline: Where a path starts.
      query: The position that attention methods explain.
      patch: The side of a feature, of images.
      slices: A label for each record, or None.
      targets: A class for each record; None for the predicted ones.
    """

    forward: Callable[..., jax.Array]
    shared: tuple[Any, ...]
    records: np.ndarray
    imputers: Sequence[Imputer] | None = None
    baseline: Any = None
    query: int = 0
    patch: int | None = None
    slices: np.ndarray | None = None
    targets: np.ndarray | None = None


def run(
    model: str,
    data: Path | None,
    methods: Sequence[str],
    limit: int | None,
    out: Path,
    console: Console,
    *,
    patch: int | None = None,
    steps: int = 8,
    microbatch: int = 8,
    seed: int = 0,
) -> Comparison:
    """Compares methods, prints the verdict, and writes it with a figure.

    Args:
      model: `embedded`, a checkpoint's folder, or `package.module:function`.
      data: A `.npy` file with a row for each record, or an `.npz` file with `records`
        and, if there are any, `targets` and `slices`; None for the embedded model's own
        images.
      methods: Names of methods in `xviz_jax`.
      limit: How many records, the first ones; None for all.
      out: Folder for `comparison.json` and `comparison.png`.
      console: Where to print.
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
    subject = subject_of(model, data, limit)
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
    console.print(table(found))
    for name, sentence in found.verdict.items():
        console.print(Text(terminal(f"{name}: {sentence}")))
    write(found, out)
    console.print(Text(terminal(f"results in {out}")))
    return found


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
    shape = subject.records.shape[1:]
    groups = None
    if subject.patch is not None:
        height, width = _grid(shape)
        groups = patches((height, width), subject.patch)
        groups = groups.reshape(*groups.shape, *(1,) * (len(shape) - 2))
        groups = np.broadcast_to(groups, shape).copy()
    return compare(
        subject.forward,
        methods,
        subject.records,
        shared=subject.shared,
        targets=subject.targets,
        groups=groups,
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
        made[name] = known[name](subject.forward, **chosen)
    return made


def subject_of(model: str, data: Path | None, limit: int | None) -> Subject:
    """Finds the model and reads the records.

    Raises:
      ValueError: If there is no such model, or the file holds something else.
    """
    if model == "embedded":
        return of_embedded(data, limit)
    if data is None:
        raise ValueError("pass `--data`: only the embedded model has its own")
    records, targets, slices = _read(data, limit)
    given = {"records": records, "targets": targets, "slices": slices}
    if ":" in model and not Path(model).exists():
        forward, _ = doctor.find_model(model)
        return Subject(forward=forward, shared=(), **given)
    loaded = models.load(Path(model), scan=True)
    if loaded.gives == "features":
        raise ValueError("the model has no classes; name a function that has")
    reads = "position" in loaded.options
    if reads != np.issubdtype(records.dtype, np.integer):
        kind = "token ids, integers" if reads else "pixels, floats"
        raise ValueError(f"the model reads {kind}; {data} holds {records.dtype}")
    if not reads:
        forward, parameters = loaded.functional()
        # All vision models here cut images into patches, square in most.
        side = max(loaded.config.patch)
        return Subject(forward=forward, shared=(parameters,), patch=side, **given)
    words = models.text(Path(model))
    # A decoder is read at its last token.
    position = loaded.options["position"]
    position = -1 if position is None else position
    forward, parameters = loaded.functional(position=position)
    nothing = words.pad_id if words.mask_id is None else words.mask_id
    return Subject(
        forward=forward,
        shared=(parameters,),
        imputers=[
            metrics.imputers.mask_token(nothing),
            metrics.imputers.baseline(baselines.mean(0), name="mean"),
        ],
        baseline=baselines.tokens(words.pad_id),
        query=position,
        **given,
    )


def of_embedded(data: Path | None, limit: int | None) -> Subject:
    """The embedded model and its own images, or others."""
    forward, parameters = embedded.functional()
    targets = slices = None
    if data is None:
        records, labels = embedded.images()
        records = records[:limit]
        names = np.array(embedded.card()["classes"])[labels[: len(records)]]
        # A slice of fewer records says nothing of its own.
        counts = dict(zip(*np.unique(names, return_counts=True), strict=True))
        slices = names if min(counts.values()) >= 8 else None
    else:
        records, targets, slices = _read(data, limit)
    return Subject(
        forward=forward,
        shared=(parameters,),
        records=records,
        imputers=[
            metrics.imputers.baseline(name="black"),
            metrics.imputers.blur(_BLUR),
        ],
        patch=PATCH,
        slices=slices,
        targets=targets,
    )


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


def _read(
    path: Path, limit: int | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Records, and targets and slices where there are any."""
    try:
        found = arrays.load(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no arrays: {error}") from error
    if "" in found:
        found = {"records": found[""]}
    if "records" not in found:
        raise ValueError(f"{path} has no `records`, only {sorted(found)}")
    records = found["records"]
    if records.ndim < 2 or len(records) < 2:
        raise ValueError(f"{path} holds no rows of records: {list(records.shape)}")
    cast = np.int32 if np.issubdtype(records.dtype, np.integer) else np.float32
    rest = [found.get(name) for name in ("targets", "slices")]
    targets, slices = (None if each is None else each[:limit] for each in rest)
    return records[:limit].astype(cast), targets, slices


def _grid(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) not in (2, 3):
        raise ValueError(
            f"`--patch` is for images [height, width] or with channels, got "
            f"{list(shape)}"
        )
    return shape[0], shape[1]


def positions_of(
    subject: Subject, methods: dict[str, Callable[..., Attribution]]
) -> np.ndarray | None:
    """The feature of each position that attention methods score.

    The last positions are the model's own grid of patches, or its tokens; those before
    them, a class token and registers, are no feature.
    """
    shape = subject.records.shape[1:]
    row = jax.ShapeDtypeStruct(shape, jnp.asarray(subject.records[:0]).dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    lengths = set()
    for method in methods.values():
        ask = lambda shared, x, key, method=method: method(*shared, x, key=key).scores
        scores = jax.eval_shape(ask, subject.shared, row, key)
        if getattr(scores, "shape", shape) not in (shape, shape[:1]):
            lengths.add(scores.shape)
    if not lengths:
        return None
    if len(lengths) > 1 or len(min(lengths)) != 1:
        raise ValueError(f"scores of shapes {sorted(lengths)} fit no one input {shape}")
    (count,) = lengths.pop()
    if subject.patch is None:
        length = shape[0]
        return np.concatenate([np.full(count - length, -1), np.arange(length)])
    height, width = _grid(shape)
    side = int(np.sqrt(count))
    if height != width or height % side or subject.patch % (height // side):
        raise ValueError(
            f"{count} positions are no square grid that patches of {subject.patch} "
            f"pixels cut evenly, in an image of {list(shape)}; choose another --patch"
        )
    inner = patches((side, side), subject.patch // (height // side)).ravel()
    return np.concatenate([np.full(count - side**2, -1), inner])
