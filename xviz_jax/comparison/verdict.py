"""From numbers to words: what speaks for a method, and what is missing.

A method is supported if on 99% of the records its scores are numbers, converged, and
give padding nothing, if it notices the class (where that is the question) and the
weights, and if it beats each control by each metric under each imputer. Whatever else
methods have in common is no evidence. A gate that could not be tried is passed by no
method: the sentence names it.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from xviz_jax.comparison.result import Interval, Similarity, Test

PASSING = 0.99
# Scores that keep more of their order than this under random weights show the input.
MOST_SIMILAR = 0.5
# Two classes may hang on the same features; scores without a sign are alike then.
MOST_SIMILAR_OF_CLASSES = 0.9
# Of records that can be measured at all.
_LEAST_DEFINED = 0.5
# Of records that a method ranks nothing on; it counts as random there.
_MOST_FLAT = 0.5
# Of fewer records an interval says nothing.
_LEAST_RECORDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What is known about a method on some records.

    Attributes:
      records: How many there are.
      undefined: On how many of them nothing can be measured, by the reason.
      class_blind: Whether its scores are the same for every class, where that matters.
      not_finite: Records whose scores are not all numbers.
      unconverged: Records on which it did not converge.
      flat: Records on which all features have the same score.
      padded: Records on which padding has a score.
      classes: Of the scores and those of another class, if that was tried.
      chance: Of the scores and those that random weights give, if that was tried.
      untried: What else it might have failed by, in words.
      tests: Against each control.
      places: Between random and leave-one-out, by the metric's name.
    """

    records: int
    undefined: Mapping[str, int]
    class_blind: bool
    not_finite: int
    unconverged: int
    flat: int
    padded: int
    classes: Similarity | None
    chance: Similarity | None
    untried: Sequence[str]
    tests: Sequence[Test]
    places: Mapping[str, Sequence[Interval]]


def conclude(found: Findings) -> str:
    """One sentence that begins with its word."""
    undefined = sum(found.undefined.values())
    if undefined > (1 - _LEAST_DEFINED) * found.records:
        reason = max(found.undefined, key=lambda name: found.undefined[name])
        return (
            f"inconclusive: {undefined} of {found.records} inputs cannot be measured, "
            f"for {reason}"
        )
    if found.records < _LEAST_RECORDS:
        return f"inconclusive: {found.records} inputs are too few"
    if failed := _unusable(found):
        return f"not supported: {failed}"
    if found.class_blind:
        return (
            "not applicable: its scores are the same for every class, so they cannot "
            "say why this class and no other"
        )
    if failed := _insensitive(found):
        return f"not supported: {failed}"
    return _against_controls(found)


def _unusable(found: Findings) -> str | None:
    """What is wrong with the scores themselves."""
    most, of = (1 - PASSING) * found.records, f"of {found.records} inputs"
    if found.not_finite > most:
        return f"scores are not finite on {found.not_finite} {of}"
    if found.unconverged > most:
        return f"it did not converge on {found.unconverged} {of}"
    if found.flat > _MOST_FLAT * found.records:
        return f"it scores all features alike on {found.flat} {of}"
    if found.padded > most:
        return f"it gives padding a score on {found.padded} {of}"
    return None


def _insensitive(found: Findings) -> str | None:
    """What the scores should change with, and do not."""
    for alike, most, said in (
        (found.chance, MOST_SIMILAR, "random weights leave its scores as they are"),
        (found.classes, MOST_SIMILAR_OF_CLASSES, "another class has the same scores"),
    ):
        if alike is not None and alike.tried and alike.value.low > most:
            return f"{said}, rank correlation {alike}"
    return None


def _against_controls(found: Findings) -> str:
    disputed, open_, count = [], [], f"n = {found.records}"
    for (metric, control), tests in _paired(found.tests).items():
        estimates = np.array([test.difference.estimate for test in tests])
        worst = min(tests, key=lambda test: test.difference.low)
        if not np.any(estimates > 0):
            return (
                f"not supported: it does not beat the {control} ranking by {metric}, "
                f"{tests[0].difference} under {tests[0].imputer}, {count}"
            )
        lows = np.array([test.difference.low for test in tests])
        highs = np.array([test.difference.high for test in tests])
        if not np.all(estimates > 0) and np.any((lows > 0) | (highs < 0)):
            signs = ", ".join(f"{t.difference} under {t.imputer}" for t in tests)
            disputed.append(
                f"imputers disagree on {metric} against the {control} ranking: {signs}"
            )
        elif not np.all(lows > 0):
            open_.append(
                f"by {metric} it may be no better than the {control} ranking, "
                f"{worst.difference} under {worst.imputer}"
            )
    if disputed or open_:
        return f"inconclusive: {(disputed + open_)[0]}, {count}"
    imputers = " and ".join(dict.fromkeys(test.imputer for test in found.tests))
    metrics = " and ".join(dict.fromkeys(test.metric for test in found.tests))
    return (
        f"supported: it beats the random and position-only rankings by {metrics} under "
        f"{imputers}, {count}{_headroom(found.places)}{_untried(found.untried)}"
    )


def _paired(tests: Sequence[Test]) -> dict[tuple[str, str], list[Test]]:
    """Tests of one metric and control together, one for each imputer."""
    found: dict[tuple[str, str], list[Test]] = {}
    for test in tests:
        found.setdefault((test.metric, test.control), []).append(test)
    return found


def _untried(names: Sequence[str]) -> str:
    return f"; not tried: {', '.join(names)}" if names else ""


def _headroom(places: Mapping[str, Sequence[Interval]]) -> str:
    known = [
        (name, min(each, key=lambda place: place.estimate))
        for name, each in places.items()
        if each
    ]
    if not known:
        return ""
    name, place = known[0]
    return f"; {place} of the way from random to leave-one-out by {name}"
