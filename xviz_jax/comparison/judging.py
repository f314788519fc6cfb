"""Intervals, tests and verdicts, from what was measured."""

import itertools
from collections.abc import Mapping

import numpy as np

from xviz_jax.comparison import concentration, verdict
from xviz_jax.comparison.measuring import Explained, correlated
from xviz_jax.comparison.problem import Problem
from xviz_jax.comparison.resampling import Resamples, holm_levels, interval, p_value
from xviz_jax.comparison.result import (
    CEILING,
    CONTROLS,
    Interval,
    Method,
    Similarity,
    Summary,
    Test,
    in_words,
)
from xviz_jax.metrics.measurement import REASONS, Metric, Reason

# Scores of another class that are this near, relatively, are the same.
_SAME = 1e-5
# Scores of one record that are this near are one number.
_ROUNDING = 16 * np.finfo(np.float32).eps
_EVIDENCE = ("abpc", "comprehensiveness")
# Of a ranking that changes nothing, where others change something, these are 0.
_CHANGES = (*_EVIDENCE, "sufficiency")


class Judge:
    """Collects measurements, and draws the conclusions."""

    def __init__(
        self,
        *,
        problem: Problem,
        explained: Mapping[str, Explained],
        members: Mapping[str, np.ndarray],
        class_specific: bool,
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
          class_specific: Whether the question is why this class and no other.
          draws: Random rankings of each record.
          level: Of intervals.
          random: What resamples are drawn with.
          resamples: How many.
        """
        self.problem, self.explained, self.members = problem, explained, members
        self.class_specific, self.draws, self.level = class_specific, draws, level
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
        if metric.name in _CHANGES:
            some = np.isfinite(values).any(axis=1, keepdims=True)
            values = np.where(some & (reasons == Reason.NO_CHANGE), 0.0, values)
        drawn = values[:, count:end]
        defined = np.isfinite(drawn).any(axis=1)
        luck = np.array([_mean(row) for row in drawn])
        # Random rankings are never to blame: it is the record.
        why = reasons[:, count]
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
        # How far luck alone may get: the means of single draws.
        single = [_mean(column) for column in values[:, count:end].T]
        for name, column in filled.items():
            value = self._interval(column)
            place = None
            if metric.better is not None:
                place = self._place(column, filled[CONTROLS[0]], filled[CEILING], sign)
            if name == CONTROLS[0] and place is not None:
                start, room = _mean(column), _mean(filled[CEILING]) - _mean(column)
                reached = (np.array(single) - start) / room
                place = Interval(0.0, *interval(reached, self.level))
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
        similar = self._similarities()
        return {
            name: self._method(name, similar, share, times) for name in self.explained
        }

    def agreement(self) -> dict[str, dict[str, float]]:
        """Mean rank correlation of each two methods."""
        pairs = list(itertools.product(self.explained, repeat=2))
        stacked = [
            np.stack([self.explained[pair[side]].scores for pair in pairs], axis=1)
            for side in (0, 1)
        ]
        found: dict[str, dict[str, float]] = {name: {} for name in self.explained}
        for (name, other), each in zip(pairs, correlated(*stacked).T, strict=True):
            found[name][other] = _mean(each)
        return found

    def _similarities(self) -> dict[tuple[str, str], Similarity]:
        """Of the scores of another class, and of those under random weights."""
        about, one, two = [], [], []
        for name, each in self.explained.items():
            for kind in ("of_another", "of_chance"):
                other = getattr(each, kind)
                if other is not None:
                    about.append((name, kind))
                    one.append(each.scores[: len(other)])
                    two.append(other)
        if not about:
            return {}
        columns = correlated(np.stack(one, axis=1), np.stack(two, axis=1)).T
        found = {}
        for pair, column in zip(about, columns, strict=True):
            filled = np.full(self.problem.count, np.nan)
            filled[: len(column)] = column
            undefined = int(np.sum(~np.isfinite(column)))
            found[pair] = Similarity(
                value=self._interval(filled), records=len(column), undefined=undefined
            )
        return found

    def _note_undefined(self, slice_: str | None, found: dict[str, int]) -> None:
        known = self.undefined.setdefault(slice_, found)
        if sum(found.values()) > sum(known.values()):
            self.undefined[slice_] = found

    def _interval(self, column: np.ndarray) -> Interval:
        return Interval(_mean(column), *interval(self.all.means(column), self.level))

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

    def _test(self, about: tuple[str, str, str, str], difference: np.ndarray) -> None:
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
            self.tests.append(
                Test(
                    method=method,
                    control=control,
                    metric=metric,
                    imputer=imputer,
                    slice=slice_,
                    records=len(values),
                    difference=Interval(_mean(values), *interval(means, level)),
                    p=p_value(means),
                )
            )

    def _method(
        self,
        name: str,
        similar: Mapping[tuple[str, str], Similarity],
        share: float,
        times: float,
    ) -> Method:
        found = self.explained[name]
        classes, chance = (similar.get((name, k)) for k in ("of_another", "of_chance"))
        blind = None
        if found.of_another is not None:
            blind = _same(found.scores[: len(found.of_another)], found.of_another)
        untried = self._untried(classes, chance)
        flat, padded = _flat(found.scores), self._padded(found.scores)
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
                    flat=int((member & flat).sum()),
                    padded=int((member & padded).sum()),
                    classes=classes,
                    chance=chance,
                    untried=untried,
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
        raised = concentration.raised(
            shares, self.members, self.of, self.level, share, times
        )
        slices = {key: [judged(key, each)] for key, each in self.members.items()}
        for slice_, feature, carried, elsewhere in raised:
            slices[slice_].append(in_words(feature, carried, elsewhere))
        return Method(
            verdict=judged(None, everyone),
            slices={key: "; ".join(said) for key, said in slices.items()},
            not_finite=int((~found.finite).sum()),
            unconverged=int((~found.converged).sum()),
            flat=int(flat.sum()),
            padded=None if self.problem.padding is None else int(padded.sum()),
            class_blind=blind,
            similarity_of_classes=classes,
            similarity_under_chance=chance,
            untried=untried,
            evaluations=found.evaluations,
            milliseconds=found.milliseconds,
            compile_seconds=found.compile_seconds,
            shares={
                key: concentration.mean_shares(shares[each]).tolist()
                for key, each in parts.items()
            },
            raised=raised,
        )

    def _untried(
        self, classes: Similarity | None, chance: Similarity | None
    ) -> list[str]:
        """What a method might have failed by, had there been a way to try it."""
        found = []
        if chance is None or not chance.tried:
            found.append("random weights")
        if self.class_specific and (classes is None or not classes.tried):
            found.append("another class")
        if self.problem.of_tokens and self.problem.padding is None:
            found.append("padding")
        return found

    def _padded(self, scores: np.ndarray) -> np.ndarray:
        """On which records padding has a score, beyond rounding."""
        if self.problem.padding is None:
            return np.zeros(len(scores), bool)
        size = np.abs(scores)
        there = np.where(self.problem.padding, size, 0).max(axis=1)
        return there > _SAME * size.max(axis=1)


def _flat(scores: np.ndarray) -> np.ndarray:
    """On which records all features have the same score."""
    with np.errstate(invalid="ignore"):
        spread = scores.max(axis=1) - scores.min(axis=1)
    return spread <= _ROUNDING * np.abs(scores).max(axis=1)


def _mean(values: np.ndarray) -> float:
    """The mean of what is a number."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _counted(why: np.ndarray) -> dict[str, int]:
    """How many records have each reason, in words."""
    numbers, counts = np.unique(why, return_counts=True)
    return {REASONS[n]: int(c) for n, c in zip(numbers, counts, strict=True)}


def _same(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether scores are the same but for rounding, wherever they are numbers."""
    finite = np.isfinite(one).all(axis=1) & np.isfinite(two).all(axis=1)
    if not finite.any():
        return False
    size = np.abs(one[finite]).max(axis=1, keepdims=True, initial=0)
    return bool(np.all(np.abs(one[finite] - two[finite]) <= _SAME * size))
