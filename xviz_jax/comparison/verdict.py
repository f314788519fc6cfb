"""From numbers to words: what speaks for a method, and what is missing.

A method is supported if its scores are numbers and converged on 99% of the records,
if it notices the class (where that is the question) and the weights, and if it beats
each control by each metric under each imputer. Whatever else methods have in common is
no evidence.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from xviz_jax.comparison.result import Interval, Test

PASSING = 0.99
# Scores that keep more of their order than this under random weights show the input.
MOST_SIMILAR = 0.5
# Of records that can be measured at all.
_LEAST_DEFINED = 0.5
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
      chance: Rank correlation with what random weights give, if that was tried.
      tests: Against each control.
      places: Between random and leave-one-out, by the metric's name.
    """

    records: int
    undefined: Mapping[str, int]
    class_blind: bool
    not_finite: int
    unconverged: int
    chance: Interval | None
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
    if found.class_blind:
        return (
            "not applicable: its scores are the same for every class, so they cannot "
            "say why this class and no other"
        )
    if failed := _failed(found):
        return f"not supported: {failed}"
    return _against_controls(found)


def _failed(found: Findings) -> str | None:
    """The first gate that the method does not pass."""
    most = (1 - PASSING) * found.records
    if found.not_finite > most:
        return f"scores are not finite on {found.not_finite} of {found.records} inputs"
    if found.unconverged > most:
        return f"it did not converge on {found.unconverged} of {found.records} inputs"
    if found.chance is not None and found.chance.low > MOST_SIMILAR:
        return (
            f"random weights leave its scores as they are, rank correlation "
            f"{found.chance}"
        )
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
        f"{imputers}, {count}{_headroom(found.places)}"
    )


def _paired(tests: Sequence[Test]) -> dict[tuple[str, str], list[Test]]:
    """Tests of one metric and control together, one for each imputer."""
    found: dict[tuple[str, str], list[Test]] = {}
    for test in tests:
        found.setdefault((test.metric, test.control), []).append(test)
    return found


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
