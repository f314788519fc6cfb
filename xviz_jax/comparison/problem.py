"""Records, targets and features: what every part of a comparison works on."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import batch
from xviz_jax.attribution import Attribution
from xviz_jax.metrics.features import by_feature


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A model and the records it is explained on.

    Attributes:
      model: Maps `(*shared, x, *rest)` to logits.
      shared: The arguments that are the same for all records.
      args: The others, the explained one first, with a row for each record.
      count: How many records there are.
      targets: int `[count]` or `[count, 2]`; None for a model of one output.
      question: A callable target, the same for all records, or None.
      labels: The feature of each element of the explained argument, a pytree of
        numpy arrays.
      features: How many features there are.
      positions: The feature of each position that an attention method scores, or -1;
        None where the two are the same.
      padding: Features that a record only has to fill it up, bool `[count,
        features]`, or None.
      key: A PRNG key.
      microbatch: Records computed at once.
    """

    model: Callable
    shared: tuple[Any, ...]
    args: tuple[Any, ...]
    count: int
    targets: np.ndarray | None
    question: Callable | None
    labels: Any
    features: int
    positions: np.ndarray | None
    padding: np.ndarray | None
    key: jax.Array
    microbatch: int

    @property
    def argnum(self) -> int:
        """Which of the model's arguments is explained."""
        return len(self.shared)

    @property
    def of_tokens(self) -> bool:
        """Whether the explained argument is made of integers."""
        leaves = jax.tree.leaves(self.args[0])
        return any(np.issubdtype(leaf.dtype, np.integer) for leaf in leaves)

    def rows(self, chosen: np.ndarray | None = None, **more: Any) -> dict[str, Any]:
        """One row for each record, or for some of them.

        Args:
          chosen: Numbers of records.
          **more: Arrays with a row for each record, or each chosen one.
        """
        numbers = np.arange(self.count, dtype=np.int32)
        rows = {"args": self.args, "number": numbers}
        if self.targets is not None:
            rows["target"] = self.targets
        if chosen is not None:
            rows = jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], rows)
        return {**rows, **more}

    def target(self, row: Mapping[str, Any]) -> Any:
        """What is explained of a row, as a method takes it."""
        if "target" not in row:
            return self.question
        target = row["target"]
        return target if target.ndim == 0 else (target[0], target[1])

    def run(
        self,
        function: Callable[..., Any],
        rows: dict[str, Any],
        shared: tuple[Any, ...] | None = None,
    ) -> batch.Run:
        """Maps rows through a function of `(key, *shared, row)`, in microbatches.

        Args:
          function: Of one row, with a key of the record's own.
          rows: As `rows` returns them.
          shared: Other arguments in place of the problem's.
        """
        shared = self.shared if shared is None else shared
        size = min(self.microbatch, len(rows["number"]))
        return batch.run(function, rows, shared=(self.key, *shared), microbatch=size)

    def grouped(self, scores: Any) -> jax.Array:
        """One score for each feature, float32 `[features]`.

        Raises:
          ValueError: If the scores are laid out neither like the input nor like the
            features or the positions.
        """
        shape = jnp.shape(scores) if not isinstance(scores, dict | tuple) else None
        if self.positions is not None and shape == self.positions.shape:
            inside = self.positions >= 0
            kept = jnp.asarray(scores)[np.flatnonzero(inside)].astype(jnp.float32)
            return jax.ops.segment_sum(kept, self.positions[inside], self.features)
        elements = [leaf.shape for leaf in jax.tree.leaves(self.labels)]
        if shape not in (None, (self.features,)) and [shape] != elements:
            raise ValueError(
                f"a method's scores have the shape {shape}, but there are "
                f"{self.features} features of an input of {elements}; say with "
                "`positions=` which feature each score is of, -1 for none, as for a "
                "class token"
            )
        return by_feature(scores, self.labels, self.features)


class Explaining:
    """A method's explanations of rows, with one score for each feature."""

    def __init__(self, explain: Callable[..., Attribution], problem: Problem):
        """Wraps what a method returned."""
        self.explain, self.problem = explain, problem

    def __call__(self, *args: Any) -> Attribution:
        """Explains one row."""
        given, options = self.asked(args)
        return self.answer(self.explain(*given, **options))

    def asked(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The method's own arguments, and its target and key."""
        key, *shared, row = args
        own = jax.random.fold_in(key, row["number"])
        return (*shared, *row["args"]), {"target": self.problem.target(row), "key": own}

    def answer(self, found: Attribution) -> Attribution:
        """Scores of features, and whether the method's own are finite."""
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(found.scores)]
        kept = {
            name: jnp.asarray(found.diagnostics[name])
            for name in ("converged", "evaluations")
            if jnp.ndim(found.diagnostics.get(name, np.zeros(1))) == 0
        }
        finite = jnp.all(jnp.stack(finite)) & jnp.isfinite(found.output)
        return Attribution(
            scores=self.problem.grouped(found.scores),
            output=found.output,
            diagnostics={"finite": finite, **kept},
        )


class ExplainingInSteps(Explaining):
    """The same of a method whose records take different numbers of steps."""

    explain: Any

    def start(self, *args: Any) -> Any:
        """The state before the first step."""
        given, options = self.asked(args)
        return self.explain.start(*given, **options)

    def step(self, state: Any, *args: Any) -> Any:
        """The state after the next evaluations."""
        given, options = self.asked(args)
        return self.explain.step(state, *given, **options)

    def running(self, state: Any) -> jax.Array:
        """Whether another step is needed."""
        return self.explain.running(state)

    def finish(self, state: Any, *args: Any) -> Attribution:
        """The explanation that a state holds."""
        given, options = self.asked(args)
        return self.answer(self.explain.finish(state, *given, **options))


def explaining(explain: Callable[..., Attribution], problem: Problem) -> Explaining:
    """Wraps what a method returned, in steps if it goes in steps."""
    stepwise = isinstance(explain, batch.Stepwise)
    return (ExplainingInSteps if stepwise else Explaining)(explain, problem)
