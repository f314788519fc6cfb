"""Methods by name, as functions of parameters and one row of a microbatch."""

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import attribution, batch
from xviz_jax.attribution import Attribution
from xviz_jax.audit.model import Model
from xviz_jax.methods import methods as known

# What a record's row holds besides the arguments of the model.
TARGET, WORDS, QUERY, ARGUMENTS = "target", "words", "query", "arguments"


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of every record.

    Attributes:
      target: None for the predicted class, a class, `label` for the record's own,
        or two classes, of which the second's logit is subtracted.
      seed: Of random methods.
    """

    target: int | str | tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what is no target."""
        pair = isinstance(self.target, tuple)
        each = self.target if isinstance(self.target, tuple) else (self.target,)
        numbers = all(isinstance(one, int) and one >= 0 for one in each)
        if self.target not in (None, "label") and not (
            numbers and len(each) == 1 + pair
        ):
            raise ValueError(
                "`target` is None, a class, two classes or 'label', got "
                f"{self.target!r}"
            )


def check(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses methods that are not there, and options that they do not take.

    Raises:
      ValueError: Saying which there are.
    """
    if not options:
        raise ValueError("name at least one method")
    for name, given in options.items():
        if name not in known():
            raise ValueError(f"a method is one of {list(known())}, got {name!r}")
        _, *parameters = inspect.signature(known()[name]).parameters.values()
        names = [p.name for p in parameters if p.name not in ("argnums", "model")]
        if unknown := sorted(given.keys() - set(names)):
            raise ValueError(f"{name} takes the options {names}, got {unknown}")
        needed = {p.name for p in parameters if p.default is p.empty}
        if missing := sorted(needed - given.keys()):
            raise ValueError(f"{name} needs the options {missing}")


def make(
    name: str, options: Mapping[str, Any], model: Model, question: Question
) -> Callable[..., Attribution]:
    """A method as a function `(parameters, row) -> Attribution`.

    Args:
      name: Of the method.
      options: Of the method, over the model's defaults.
      model: What is explained.
      question: Of every record.

    Raises:
      ValueError: If an option does not fit.
    """
    method = known()[name]
    takes = inspect.signature(method).parameters
    given: dict[str, Any] = {"argnums": 1, QUERY: model.query, **model.defaults}
    # A microbatch fills the machine: one node of each path at a time.
    if name == "integrated_gradients":
        given["chunk"] = 1
    settings = {k: v for k, v in given.items() if k in takes} | dict(options)
    for each in ("baseline", "baselines"):
        # A file of settings has lists where the method has arrays.
        if isinstance(settings.get(each), list):
            settings[each] = np.asarray(settings[each], np.float32)

    # Behind the last token of a padded record lies padding.
    own = model.buckets is not None and QUERY in takes and QUERY not in options

    def bound(row: Any) -> Any:
        return method(model.forward, **settings | ({QUERY: row[QUERY]} if own else {}))

    # Checks the options, and tells whether the host drives the steps.
    explainer = method(model.forward, **settings)
    if isinstance(explainer, batch.Stepwise):
        return _Stepwise(explainer, question)
    return lambda parameters, row: bound(row)(
        parameters, *row[ARGUMENTS], **_asked(row, question)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Stepwise:
    """The same of a method whose inputs need different numbers of evaluations."""

    explainer: Any
    question: Question

    def __call__(self, parameters: Any, row: Any) -> Attribution:
        return self.explainer(parameters, *row[ARGUMENTS], **_asked(row, self.question))

    def start(self, parameters: Any, row: Any) -> Any:
        asked = _asked(row, self.question)
        return self.explainer.start(parameters, *row[ARGUMENTS], **asked)

    def step(self, state: Any, parameters: Any, row: Any) -> Any:
        asked = _asked(row, self.question)
        return self.explainer.step(state, parameters, *row[ARGUMENTS], **asked)

    def running(self, state: Any) -> jax.Array:
        return self.explainer.running(state)

    def finish(self, state: Any, parameters: Any, row: Any) -> Attribution:
        asked = _asked(row, self.question)
        return self.explainer.finish(state, parameters, *row[ARGUMENTS], **asked)


def _asked(row: Any, question: Question) -> dict[str, Any]:
    """The target of a row, and its key: of the record, wherever it is explained."""
    target = question.target
    if not isinstance(target, tuple):
        target = row.get(TARGET)
    key = jax.random.key(question.seed)
    for word in range(len(row[WORDS])):
        key = jax.random.fold_in(key, row[WORDS][word])
    return {"target": target, "key": key}


def predict(model: Model, question: Question) -> Callable[..., dict[str, jax.Array]]:
    """A function `(parameters, row)` of the predicted class and the explained output.

    Args:
      model: What is explained.
      question: Of every record. Where it is of the predicted class, rows have no
        target yet.
    """

    def of(parameters: Any, row: Any) -> dict[str, jax.Array]:
        logits = model.forward(parameters, *row[ARGUMENTS])
        predicted = attribution.hold(None, logits)
        asked = question.target
        if not isinstance(asked, tuple):
            asked = row.get(TARGET)
        held = predicted if asked is None else attribution.hold(asked, logits)
        first = jnp.int32(0) if predicted is None else predicted.astype(jnp.int32)
        return {"prediction": first, "output": attribution.explained(held, logits)}

    return of


def words_of(name: str) -> np.ndarray:
    """64 bits of a record's id, for its key."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.frombuffer(digest[:8], "<u4").astype(np.uint32)


def shape_key(args: Sequence[np.ndarray]) -> str:
    """What one program is compiled for.

    >>> shape_key([np.zeros((2, 3), np.float32), np.zeros(2, bool)])
    'float32[2,3] bool[2]'
    """
    return " ".join(f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in args)
