"""Compiled programs: for each shape a prediction and one of each method."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xviz_jax import batch
from xviz_jax.attribution import Attribution
from xviz_jax.audit import explainers, rows
from xviz_jax.audit.explainers import ARGUMENTS, QUERY, TARGET, WORDS, Question
from xviz_jax.audit.model import Model, replicated

# Shapes whose programs are kept; buckets keep their number small.
_KEPT = 32
PREDICT = "prediction"


class Programs:
    """Explains rows of one shape at a time, on every device."""

    def __init__(
        self,
        model: Model,
        methods: Mapping[str, Mapping[str, Any]],
        question: Question,
        devices: int | None,
    ):
        """Makes the methods.

        Raises:
          ValueError: If an option does not fit.
        """
        self.model, self.question = model, question
        self.explainers = {
            name: explainers.make(name, options, model, question)
            for name, options in methods.items()
        }
        self._classes: bool | None = None
        self._predict = explainers.predict(model, question)
        if model.mesh is not None:
            self.devices: list[Any] = [replicated(model.mesh)]
        else:
            self.devices = jax.local_devices()[:devices]
        self._placed = batch.Placed((model.parameters,), self.devices)
        self._known: collections.OrderedDict[tuple[str, int], dict] = (
            collections.OrderedDict()
        )

    def functions(self) -> dict[str, Callable[..., Any]]:
        """The prediction and the methods, each of `(parameters, row)`."""
        return {PREDICT: self._predict, **self.explainers}

    def diagnostics(self, row: Any) -> rows.Diagnostics:
        """Dtype and axes of what each method says, and a check that it can.

        Args:
          row: A row of any record.

        Raises:
          ValueError: If a method cannot explain this model.
        """
        parameters = self.model.parameters
        answer = jax.eval_shape(self._predict, parameters, row)
        row = {**row, TARGET: answer["prediction"]} if self._asks(row) else row
        found = {}
        for name, explain in self.explainers.items():
            shapes: Attribution = jax.eval_shape(explain, parameters, row)
            if not hasattr(shapes.scores, "dtype"):
                raise ValueError(
                    f"{name} gives several arrays of scores for this input, an audit "
                    "stores one"
                )
            found[name] = {
                key: (str(each.dtype), each.ndim)
                for key, each in sorted(shapes.diagnostics.items())
            }
        return found

    def _asks(self, row: Any) -> bool:
        """Whether the explained class is the predicted one."""
        if self.question.target is not None or TARGET in row:
            return False
        if self._classes is None:
            arguments = (self.model.parameters, *row[ARGUMENTS])
            logits = jax.eval_shape(self.model.forward, *arguments)
            self._classes = logits.ndim > 0
        return bool(self._classes)

    def run(
        self,
        batch_: Any,
        key: str,
        microbatch: int,
        *,
        in_flight: int = 2,
        check: Callable[[int], Any] | None = None,
        device: int | None = None,
        only: Sequence[str] | None = None,
    ) -> tuple[dict[str, np.ndarray], dict[str, Attribution]]:
        """The prediction and the attributions of rows.

        Args:
          batch_: Rows: a pytree of arrays.
          key: Names their shape.
          microbatch: Rows computed at once.
          in_flight: Microbatches under way at a time on each device.
          check: Called between microbatches; what it raises ends the call.
          device: The number of the only device to use.
          only: Names of methods; by default all.

        Raises:
          Exception: What the model raises, and `RESOURCE_EXHAUSTED`.
        """
        options: dict[str, Any] = {
            "in_flight": in_flight,
            "progress": check,
            "device": device,
        }
        predict = self._program(PREDICT, batch_, key, microbatch)
        predicted = predict(batch_, **options)
        one = jax.tree.map(lambda leaf: leaf[0], batch_)
        if self._asks(one):
            batch_ = {**batch_, TARGET: predicted["prediction"]}
        found = {}
        for name in self.explainers if only is None else only:
            program = self._program(name, batch_, key, microbatch)
            found[name] = program(batch_, **options)
        return predicted, found

    def bytes(self, batch_: Any, key: str, microbatch: int) -> int:
        """Memory that a microbatch takes on a device, beyond parameters and inputs."""
        self.run(batch_, key, microbatch)
        return max(each.bytes for each in self._known[key, microbatch].values())

    def forget(self, key: str, microbatch: int) -> None:
        """Drops programs that do not fit."""
        self._known.pop((key, microbatch), None)

    def _program(
        self, name: str, batch_: Any, key: str, microbatch: int
    ) -> batch.Program:
        known = self._known.setdefault((key, microbatch), {})
        self._known.move_to_end((key, microbatch))
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        if name not in known:
            known[name] = batch.Program(
                self.functions()[name],
                batch_,
                shared=self._placed,
                microbatch=microbatch,
            )
        return known[name]


def row_of(
    args: tuple[np.ndarray, ...], name: str, query: int, target: int | None
) -> dict[str, Any]:
    """A record's row of a microbatch.

    Args:
      args: The model's arguments.
      name: The record's id, for its key.
      query: The position that attention methods explain.
      target: The explained class, where it is known beforehand.
    """
    row = {
        ARGUMENTS: args,
        WORDS: explainers.words_of(name),
        QUERY: np.int32(query),
    }
    return row if target is None else {**row, TARGET: np.int32(target)}


def stacked(each: Sequence[dict[str, Any]]) -> Any:
    """Rows as one pytree of arrays."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *each)
