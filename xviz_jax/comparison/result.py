"""What a comparison found: numbers and words, to be saved, read and drawn."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Word = Literal["supported", "not supported", "not applicable", "inconclusive"]
CONTROLS = ("random", "position only")
CEILING = "leave one out"


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval; not numbers where undefined."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        """The estimate with the interval in brackets."""
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Similarity:
    """How alike a method's scores are to other scores of it, by rank correlation.

    Attributes:
      value: Mean over the records on which it is defined.
      records: On how many it was tried.
      undefined: On how many of these it is not, because scores do not vary or are not
        numbers.
    """

    value: Interval
    records: int
    undefined: int

    @property
    def tried(self) -> bool:
        """Whether it is defined on half of the records."""
        return 2 * self.undefined <= self.records

    def __str__(self) -> str:
        """The mean with its interval, and of how many records it is."""
        return f"{self.value}, n = {self.records - self.undefined}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What was found about one method, besides its metrics.

    Attributes:
      verdict: One sentence that begins with the word.
      slices: The same for each slice of the records, and what is raised there.
      not_finite: Records whose scores are not all numbers.
      unconverged: Records on which the method says it did not converge.
      flat: Records on which all features have the same score.
      padded: Records on which padding has a score; None where none was pointed out.
      class_blind: Whether the scores of another class are the same; None where that
        was not tried.
      similarity_of_classes: Of the scores of two classes; None where that was not
        tried.
      similarity_under_chance: Of the scores and those that random weights give; None
        without parameters.
      untried: Gates that were not tried, and so speak neither way.
      evaluations: Of the model, for each record; forward and backward passes as the
        method counts them, else its arithmetic in units of a forward pass.
      milliseconds: For each record, compilation apart.
      compile_seconds: Of the method's program.
      shares: Of each slice (`all` is the whole), the mean share of each feature in
        the sum of absolute scores.
      raised: Features that carry much in one slice and little elsewhere: slice,
        feature, share, and the share in the other records.
    """

    verdict: str
    slices: dict[str, str]
    not_finite: int
    unconverged: int
    flat: int
    padded: int | None
    class_blind: bool | None
    similarity_of_classes: Similarity | None
    similarity_under_chance: Similarity | None
    untried: list[str]
    evaluations: float | None
    milliseconds: float
    compile_seconds: float
    shares: dict[str, list[float]]
    raised: list[tuple[str, int, Interval, float]]

    @property
    def word(self) -> str:
        """The verdict's word."""
        return self.verdict.partition(":")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A metric of one ranking under one imputer.

    Attributes:
      ranking: A method, one of the controls, or the ceiling.
      metric: The metric's name.
      imputer: The imputer's, or None where the metric uses none.
      value: Mean over the records.
      place: Where it lies between the random ranking, 0, and leave-one-out, 1; None
        where the two do not differ or the metric only describes.
      undefined: Records on which no ranking can be measured, with the reason.
      flat: Records on which this ranking cannot be, which count as random.
    """

    ranking: str
    metric: str
    imputer: str | None
    value: Interval
    place: Interval | None
    undefined: dict[str, int]
    flat: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Test:
    """A method against a control: how much better it is, paired by record.

    Attributes:
      method: The method.
      control: `random` or `position only`.
      metric: The metric.
      imputer: The imputer.
      slice: The slice, or None for all records.
      records: How many records it is about.
      difference: Positive where the method is better. Intervals of slices hold for
        all slices at once.
      p: Two-sided, not corrected.
    """

    method: str
    control: str
    metric: str
    imputer: str
    slice: str | None
    records: int
    difference: Interval
    p: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Which of several methods may be believed for a model and its records.

    Attributes:
      methods: What was found about each.
      summaries: Every metric of every ranking, of all records.
      tests: Every method against every control.
      agreement: Mean rank correlation of each two methods' scores: shown, and no
        evidence.
      settings: What was compared, and how.
    """

    methods: dict[str, Method]
    summaries: list[Summary]
    tests: list[Test]
    agreement: dict[str, dict[str, float]]
    settings: dict[str, Any]

    @property
    def verdict(self) -> dict[str, str]:
        """One sentence for each method, which begins with its word."""
        return {name: method.verdict for name, method in self.methods.items()}

    def summary(self, ranking: str, metric: str, imputer: str | None) -> Summary:
        """A metric of one ranking under one imputer.

        Raises:
          ValueError: If there is none.
        """
        for each in self.summaries:
            if (each.ranking, each.metric, each.imputer) == (ranking, metric, imputer):
                return each
        known = sorted({(s.metric, s.imputer or "") for s in self.summaries})
        raise ValueError(
            f"nothing was measured of {ranking!r} by {metric!r} under {imputer!r}; the "
            f"metrics and imputers are {known}"
        )

    def save(self, path: str | Path) -> None:
        """Writes JSON; what is not a number is null."""
        text = json.dumps(_plain(dataclasses.asdict(self)), indent=1, allow_nan=False)
        Path(path).write_text(text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        """Reads what `save` wrote.

        Raises:
          ValueError: If the file holds something else.
        """
        try:
            found = json.loads(Path(path).read_text())
            return cls(
                methods={
                    name: _method(each) for name, each in found["methods"].items()
                },
                summaries=[_summary(each) for each in found["summaries"]],
                tests=[
                    Test(**{**each, "difference": _interval(each["difference"])})
                    for each in map(_numbers, found["tests"])
                ],
                agreement={
                    name: {other: _number(value) for other, value in row.items()}
                    for name, row in found["agreement"].items()
                },
                settings=found["settings"],
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no comparison: {error!r}") from error

    def plot(self, ax: "Axes | None" = None, *, metric: str | None = None) -> "Axes":
        """Draws each method's faithfulness against its cost, the controls shaded.

        Args:
          ax: Where to draw; a new figure by default.
          metric: Whose intervals are drawn; by default the first one's.

        Raises:
          ValueError: If the metric was not measured.
        """
        # Takes longer to import than JAX.
        from xviz_jax.plotting.faithfulness import faithfulness

        chosen: str = self.settings["evidence"][0] if metric is None else metric
        imputers = self.settings["imputers"]

        def place(ranking: str) -> list[tuple[float, float, float]]:
            found = [self.summary(ranking, chosen, each).place for each in imputers]
            none = Interval(math.nan, math.nan, math.nan)
            known = [none if each is None else each for each in found]
            return [(each.estimate, each.low, each.high) for each in known]

        return faithfulness(
            {name: place(name) for name in self.methods},
            {name: each.milliseconds for name, each in self.methods.items()},
            {name: each.word for name, each in self.methods.items()},
            {name: place(name) for name in CONTROLS},
            imputers=imputers,
            metric=chosen,
            ax=ax,
        )


def in_words(feature: int, share: Interval, elsewhere: float) -> str:
    """What is said of a feature that is raised in a slice."""
    return f"feature {feature} carries {share} of its scores, {elsewhere:.2g} elsewhere"


def _plain(value: Any) -> Any:
    """The same with None in place of what is not a number."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "p": _number(row["p"])}


def _interval(value: dict[str, float | None]) -> Interval:
    return Interval(*(_number(value[name]) for name in ("estimate", "low", "high")))


def _maybe(value: dict[str, float | None] | None) -> Interval | None:
    return None if value is None else _interval(value)


def _similarity(value: dict[str, Any] | None) -> Similarity | None:
    if value is None:
        return None
    return Similarity(**{**value, "value": _interval(value["value"])})


def _method(row: dict[str, Any]) -> Method:
    similar = ("similarity_of_classes", "similarity_under_chance")
    raised = [
        (name, feature, _interval(share), _number(elsewhere))
        for name, feature, share, elsewhere in row["raised"]
    ]
    shares = {k: [_number(each) for each in v] for k, v in row["shares"].items()}
    read = {name: _similarity(row[name]) for name in similar}
    return Method(**{**row, **read, "raised": raised, "shares": shares})


def _summary(row: dict[str, Any]) -> Summary:
    return Summary(
        **{**row, "value": _interval(row["value"]), "place": _maybe(row["place"])}
    )
