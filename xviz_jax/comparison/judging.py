"""Intervals, tests and verdicts, from what was measured."""

from collections.abc import Mapping

import numpy as np

from xviz_jax.comparison import concentration, verdict
from xviz_jax.comparison.measuring import Explained
from xviz_jax.comparison.problem import Problem
from xviz_jax.comparison.ranks import spearman
from xviz_jax.comparison.resampling import Resamples, holm_levels, interval, p_value
from xviz_jax.comparison.result import (
    CEILING,
    CONTROLS,
    Interval,
    Method,
    Summary,
    Test,
)
from xviz_jax.metrics.measurement import REASONS, Metric

# Scores of another class that are this near, relatively, are the same.
_SAME = 1e-5
_EVIDENCE = ("abpc", "comprehensiveness")


class Judge:
    """Collects measurements, and draws the conclusions."""

    def __init__(
        self,
        *,
        problem: Problem,
        explained: Mapping[str, Explained],
        members: Mapping[str, np.ndarray],
        draws: int,
        level: float,
        random: np.random.Generator,
        resamples: int,
    ):
        """Draws the resamples that everything is judged by.

        Args:
          problem: The model and the records.
          explained: By method.
          members: Which records each slice has.
          draws: Random rankings of each record.
          level: Of intervals.
          random: What resamples are drawn with.
          resamples: How many.
        """
        self.problem, self.explained, self.members = problem, explained, members
        self.draws, self.level = draws, level
        self.all = Resamples.draw(problem.count, resamples, random)
        self.of = {
            name: Resamples.draw(int(each.sum()), resamples, random)
            for name, each in members.items()
        }
        self.summaries: list[Summary] = []
        self.tests: list[Test] = []
        self.undefined: dict[str | None, dict[str, int]] = {}

    def add(
        self,
        metric: Metric,
        imputer: str | None,
        values: np.ndarray,
        reasons: np.ndarray,
    ) -> None:
        """Takes a metric's values of all rankings under one imputer.

        Args:
          metric: The metric.
          imputer: The imputer's name.
          values: `[records, rankings]`: methods, random draws, position only,
            leave-one-out.
          reasons: The same.
        """
        names = list(self.explained)
        count, end = len(names), len(names) + self.draws
        luck = values[:, count:end].mean(axis=1)
        defined = np.isfinite(luck)
        first = np.argmax(reasons[:, count:end] > 0, axis=1)
        why = reasons[np.arange(len(values)), count + first]
        columns = {name: values[:, number] for number, name in enumerate(names)}
        columns |= {CONTROLS[0]: luck, CONTROLS[1]: values[:, end]}
        columns |= {CEILING: values[:, end + 1]}
        sign = -1.0 if metric.better == "lower" else 1.0
        filled, flat = {}, {}
        for name, column in columns.items():
            # Of the method's making, not of the record's: it ranks nothing there.
            empty = defined & ~np.isfinite(column)
            flat[name] = int(empty.sum())
            filled[name] = np.where(defined, np.where(empty, luck, column), np.nan)
        undefined = _counted(why[~defined])
        for name, column in filled.items():
            value = self._interval(column)
            place = None
            if metric.better is not None:
                place = self._place(column, filled[CONTROLS[0]], filled[CEILING], sign)
            self.summaries.append(
                Summary(
                    ranking=name,
                    metric=metric.name,
                    imputer=imputer,
                    value=value,
                    place=place,
                    undefined=undefined,
                    flat=flat[name],
                )
            )
        if metric.name not in _EVIDENCE or imputer is None:
            return
        self._note_undefined(None, undefined)
        for slice_, member in self.members.items():
            self._note_undefined(slice_, _counted(why[member & ~defined]))
        for name in names:
            for control in CONTROLS:
                difference = sign * (filled[name] - filled[control])
                self._test((name, control, metric.name, imputer), difference)

    def methods(self, share: float, times: float) -> dict[str, Method]:
        """What is concluded about each method."""
        return {name: self._method(name, share, times) for name in self.explained}

    def _note_undefined(self, slice_: str | None, found: dict[str, int]) -> None:
        known = self.undefined.setdefault(slice_, found)
        if sum(found.values()) > sum(known.values()):
            self.undefined[slice_] = found

    def _interval(self, column: np.ndarray) -> Interval:
        known = column[np.isfinite(column)]
        mean = float(known.mean()) if len(known) else float("nan")
        return Interval(mean, *interval(self.all.means(column), self.level))

    def _place(
        self, column: np.ndarray, luck: np.ndarray, ceiling: np.ndarray, sign: float
    ) -> Interval | None:
        """Where a ranking lies between the random one and leave-one-out."""
        stacked = np.stack([column, luck, ceiling], axis=1)
        mine, low, high = np.moveaxis(self.all.means(stacked), 1, 0)
        room = sign * (high - low)
        if not interval(room, self.level)[0] > 0:
            return None
        own, start, end = np.nanmean(stacked, axis=0)
        ends = interval((mine - low) / (high - low), self.level)
        return Interval(float((own - start) / (end - start)), *ends)

    def _test(
        self, about: tuple[str, str, str, str], difference: np.ndarray
    ) -> None:
        """Of all records; and of each slice, at the level that Holm's method gives."""
        method, control, metric, imputer = about
        parts: list[tuple[str | None, np.ndarray, np.ndarray]] = [
            (name, difference[member], self.of[name].means(difference[member]))
            for name, member in self.members.items()
        ]
        p_values = np.array([p_value(means) for _, _, means in parts])
        levels = [self.level, *holm_levels(p_values, self.level)]
        parts = [(None, difference, self.all.means(difference)), *parts]
        for (slice_, values, means), level in zip(parts, levels, strict=True):
            known = values[np.isfinite(values)]
            mean = float(known.mean()) if len(known) else float("nan")
            self.tests.append(
                Test(
                    method=method,
                    control=control,
                    metric=metric,
                    imputer=imputer,
                    slice=slice_,
                    records=len(values),
                    difference=Interval(mean, *interval(means, level)),
                    p=p_value(means),
                )
            )

    def _method(self, name: str, share: float, times: float) -> Method:
        found = self.explained[name]
        classes = chance = blind = None
        if found.of_another is not None:
            own = found.scores[: len(found.of_another)]
            classes = self._similarity(own, found.of_another)
            blind = _same(own, found.of_another)
        if found.of_chance is not None:
            own = found.scores[: len(found.of_chance)]
            chance = self._similarity(own, found.of_chance)
        everyone = np.ones(self.problem.count, bool)

        def judged(slice_: str | None, member: np.ndarray) -> str:
            places = {
                metric: [
                    each.place
                    for each in self.summaries
                    if each.ranking == name and each.metric == metric and each.place
                ]
                for metric in _EVIDENCE
            }
            return verdict.conclude(
                verdict.Findings(
                    records=int(member.sum()),
                    undefined=self.undefined[slice_],
                    class_blind=bool(blind),
                    not_finite=int((member & ~found.finite).sum()),
                    unconverged=int((member & ~found.converged).sum()),
                    chance=chance,
                    tests=[
                        test
                        for test in self.tests
                        if test.method == name and test.slice == slice_
                    ],
                    places=places if slice_ is None else {},
                )
            )

        shares = concentration.shares(found.scores)
        parts = {"all": everyone, **self.members}
        return Method(
            verdict=judged(None, everyone),
            slices={key: judged(key, each) for key, each in self.members.items()},
            not_finite=int((~found.finite).sum()),
            unconverged=int((~found.converged).sum()),
            class_blind=blind,
            similarity_of_classes=classes,
            similarity_under_chance=chance,
            evaluations=found.evaluations,
            milliseconds=found.milliseconds,
            compile_seconds=found.compile_seconds,
            shares={
                key: concentration.mean_shares(shares[each]).tolist()
                for key, each in parts.items()
            },
            raised=concentration.raised(
                shares, self.members, self.of, self.level, share, times
            ),
        )

    def _similarity(self, one: np.ndarray, two: np.ndarray) -> Interval:
        """Mean rank correlation; scores that do not vary have none in common."""
        found = np.nan_to_num(spearman(one, two))
        padded = np.full(self.problem.count, np.nan)
        padded[: len(found)] = found
        return self._interval(padded)


def _counted(why: np.ndarray) -> dict[str, int]:
    """How many records have each reason, in words."""
    numbers, counts = np.unique(why, return_counts=True)
    return {REASONS[n]: int(c) for n, c in zip(numbers, counts, strict=True)}


def _same(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether scores are the same but for rounding, wherever they are numbers."""
    finite = np.isfinite(one).all(axis=1) & np.isfinite(two).all(axis=1)
    size = np.abs(one[finite]).max(axis=1, keepdims=True, initial=0)
    return bool(np.all(np.abs(one[finite] - two[finite]) <= _SAME * size))
