"""What runs on the device: explanations, ceilings and metrics of all rankings."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import batch, chunks, metrics
from xviz_jax.comparison.arithmetic import arithmetic
from xviz_jax.comparison.problem import Problem, explaining
from xviz_jax.metrics.features import prepare
from xviz_jax.metrics.imputers import Imputer
from xviz_jax.metrics.measurement import Metric

# Records on which it is tried whether a method notices the class and the weights.
PROBES = 64
# Features that are left out at once.
_CHUNK = 8


@dataclasses.dataclass(frozen=True)
class Explained:
    """A method's explanations of all records.

    Attributes:
      scores: `[records, features]`.
      finite: Whether all the method's scores are numbers, bool `[records]`.
      converged: Whether the method says that it converged, bool `[records]`.
      of_another: Scores for another class of the first records, `[probes,
        features]`, or None.
      of_chance: The same with random weights, or None.
      evaluations: Of the model, for each record, or None where nothing tells.
      milliseconds: For each record.
      compile_seconds: Once.
    """

    scores: np.ndarray
    finite: np.ndarray
    converged: np.ndarray
    of_another: np.ndarray | None
    of_chance: np.ndarray | None
    evaluations: float | None
    milliseconds: float
    compile_seconds: float


def explained(
    explain: Callable,
    problem: Problem,
    others: np.ndarray | None,
    chance: tuple[Any, ...] | None,
) -> Explained:
    """Explains all records, and some of them for another class or other weights.

    Args:
      explain: What a method returned.
      problem: The model and the records.
      others: Other targets of the first records, or None.
      chance: Shared arguments with random weights, or None.
    """
    rows = problem.rows()
    if others is not None:
        again = problem.rows(np.arange(len(others)), target=others)
        rows = jax.tree.map(lambda a, b: np.concatenate([a, b]), rows, again)
    method = explaining(explain, problem)
    run = problem.run(method, rows)
    found, count = run.attribution, problem.count
    diagnostics = found.diagnostics
    evaluations = diagnostics.get("evaluations")
    if evaluations is None:
        evaluations = _evaluations(method, problem, rows)
    else:
        evaluations = float(np.mean(evaluations[:count]))
    of_chance = None
    if chance is not None:
        probes = problem.rows(np.arange(min(PROBES, count)))
        of_chance = problem.run(method, probes, chance).attribution.scores
    everywhere = np.ones(count, bool)
    return Explained(
        scores=found.scores[:count],
        finite=np.asarray(diagnostics["finite"])[:count],
        converged=np.asarray(diagnostics.get("converged", everywhere))[:count],
        of_another=None if others is None else found.scores[count:],
        of_chance=of_chance,
        evaluations=evaluations,
        milliseconds=1e3 * run.run_seconds / len(rows["number"]),
        compile_seconds=run.compile_seconds,
    )


def _evaluations(method: Callable, problem: Problem, rows: Any) -> float | None:
    """A method's arithmetic in units of the model's, where both can be counted."""
    row = jax.tree.map(lambda leaf: leaf[0], rows)

    def forward(*args: Any) -> jax.Array:
        _, *shared, row = args
        return problem.model(*shared, *row["args"])

    args = (problem.key, *problem.shared, row)
    mine, floor = arithmetic(method, *args), arithmetic(forward, *args)
    return mine / floor if floor > 0 and math.isfinite(mine + floor) else None


def left_out(problem: Problem, imputer: Imputer) -> np.ndarray:
    """What the output loses without each feature, `[records, features]`."""
    nothing = jnp.zeros(problem.features)

    def one(*args: Any) -> Any:
        key, *shared, row = args
        x, *rest = row["args"]
        given = (*shared, x, nothing, *rest)
        target = problem.target(row)
        seen = prepare(
            "compare",
            problem.model,
            given,
            problem.argnum,
            target,
            problem.labels,
            imputer,
            "logit",
        )
        own = seen.keys(jax.random.fold_in(key, row["number"]), problem.features)

        def without(item: tuple[jax.Array, Any]) -> jax.Array:
            return seen.value(jnp.arange(problem.features) != item[0], item[1])

        items = (jnp.arange(problem.features), own)
        return seen.output - chunks.each(without, items, _CHUNK)

    return np.asarray(problem.run(one, problem.rows()).attribution)


def measured(
    problem: Problem, metric: Metric, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Measures several rankings of each record, by one compiled program.

    Args:
      problem: The model and the records.
      metric: What measures.
      scores: `[records, rankings, features]`.

    Returns:
      Values and reasons, `[records, rankings]`. A metric that draws at random draws
      the same for all rankings of a record.
    """

    def one(*args: Any) -> Any:
        key, *shared, row = args
        x, *rest = row["args"]
        options = {"target": problem.target(row)}
        if "key" in metric.needs:
            options["key"] = jax.random.fold_in(key, row["number"])

        def each(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = metric(*shared, x, scores, *rest, **options)
            return found.value, found.reason

        return jax.lax.map(each, row["scores"])

    rows = problem.rows(scores=scores.astype(np.float32))
    found: Any = problem.run(one, rows).attribution
    values, reasons = found
    return np.asarray(values, np.float64), np.asarray(reasons)


def correlated(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Rank correlations of many pairs of scores of each record.

    Args:
      one: `[records, pairs, features]`.
      two: The same.

    Returns:
      `[records, pairs]`, not a number where scores do not vary or are no numbers.
    """

    def each(row: dict[str, jax.Array]) -> Any:
        return jax.vmap(metrics.spearman)(row["one"], row["two"]).value

    rows = {"one": one, "two": two}
    found = batch.run(each, rows, microbatch=min(PROBES, len(one)))
    return np.asarray(found.attribution, np.float64)
