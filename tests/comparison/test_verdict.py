"""Every sentence that a verdict can be, from made-up findings."""

import pytest

from xviz_jax.comparison import CONTROLS, Interval, Similarity
from xviz_jax.comparison import Test as Difference
from xviz_jax.comparison.verdict import Findings, conclude

METRICS, IMPUTERS = ("abpc", "comprehensiveness"), ("zeros", "mean")
BETTER, WORSE = Interval(0.3, 0.2, 0.4), Interval(-0.3, -0.4, -0.2)
OPEN, SLIGHTLY_WORSE = Interval(0.1, -0.05, 0.25), Interval(-0.1, -0.3, 0.1)
ALIKE = Similarity(value=Interval(0.95, 0.92, 0.97), records=32, undefined=4)


def differences(**changed):
    """Better by everything; `random_abpc=(zeros, mean)` says otherwise."""
    found = []
    for metric in METRICS:
        for control in CONTROLS:
            name = f"{control.replace(' ', '_')}_{metric}"
            differences = changed.get(name, (BETTER, BETTER))
            for imputer, difference in zip(IMPUTERS, differences, strict=True):
                found.append(
                    Difference(
                        method="a",
                        control=control,
                        metric=metric,
                        imputer=imputer,
                        slice=None,
                        records=32,
                        difference=difference,
                        p=0.5,
                    )
                )
    return found


def said(**changed):
    known = {
        "records": 32,
        "undefined": {},
        "class_blind": False,
        "not_finite": 0,
        "unconverged": 0,
        "flat": 0,
        "padded": 0,
        "classes": None,
        "chance": None,
        "untried": [],
        "tests": differences(),
        "places": {},
    }
    return conclude(Findings(**known | changed))


def alike(low, **changed):
    return Similarity(
        **{"value": Interval(0.95, low, 1.0), "records": 32, "undefined": 0, **changed}
    )


SUPPORTED = (
    "supported: it beats the random and position-only rankings by abpc and "
    "comprehensiveness under zeros and mean, n = 32"
)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, SUPPORTED),
        (
            {
                "places": {
                    "abpc": [Interval(0.9, 0.8, 1.0), Interval(0.7, 0.6, 0.8)],
                    "comprehensiveness": [],
                }
            },
            f"{SUPPORTED}; 0.7 [0.6, 0.8] of the way from random to leave-one-out by "
            "abpc",
        ),
        (
            {"untried": ["random weights", "padding"]},
            f"{SUPPORTED}; not tried: random weights, padding",
        ),
        (
            {"undefined": {"the output does not change": 12, "it is not finite": 5}},
            "inconclusive: 17 of 32 inputs cannot be measured, for the output does not "
            "change",
        ),
        ({"undefined": {"the output does not change": 16}}, SUPPORTED),
        ({"records": 7}, "inconclusive: 7 inputs are too few"),
        (
            {"not_finite": 1},
            "not supported: scores are not finite on 1 of 32 inputs",
        ),
        (
            {"unconverged": 1, "flat": 32, "class_blind": True},
            "not supported: it did not converge on 1 of 32 inputs",
        ),
        (
            {"records": 100, "not_finite": 1, "unconverged": 1, "padded": 1},
            SUPPORTED.replace("n = 32", "n = 100"),
        ),
        (
            {"flat": 17, "class_blind": True},
            "not supported: it scores all features alike on 17 of 32 inputs",
        ),
        ({"flat": 16}, SUPPORTED),
        ({"padded": 1}, "not supported: it gives padding a score on 1 of 32 inputs"),
        (
            {"class_blind": True, "chance": ALIKE},
            "not applicable: its scores are the same for every class, so they cannot "
            "say why this class and no other",
        ),
        (
            {"chance": ALIKE},
            "not supported: random weights leave its scores as they are, rank "
            "correlation 0.95 [0.92, 0.97], n = 28",
        ),
        ({"chance": alike(0.5)}, SUPPORTED),
        (
            {"classes": ALIKE},
            "not supported: another class has the same scores, rank correlation "
            "0.95 [0.92, 0.97], n = 28",
        ),
        ({"classes": alike(0.9)}, SUPPORTED),
        # Where most of it is undefined, nothing was tried: neither passed nor failed.
        ({"chance": alike(0.94, undefined=17)}, SUPPORTED),
        (
            {"tests": differences(random_comprehensiveness=(WORSE, SLIGHTLY_WORSE))},
            "not supported: it does not beat the random ranking by comprehensiveness, "
            "-0.3 [-0.4, -0.2] under zeros, n = 32",
        ),
        (
            {"tests": differences(position_only_abpc=(BETTER, WORSE))},
            "inconclusive: imputers disagree on abpc against the position only "
            "ranking: 0.3 [0.2, 0.4] under zeros, -0.3 [-0.4, -0.2] under mean, n = 32",
        ),
        (
            {"tests": differences(position_only_abpc=(BETTER, OPEN))},
            "inconclusive: by abpc it may be no better than the position only ranking, "
            "0.1 [-0.05, 0.25] under mean, n = 32",
        ),
        (
            {"tests": differences(random_abpc=(OPEN, SLIGHTLY_WORSE))},
            "inconclusive: by abpc it may be no better than the random ranking, "
            "-0.1 [-0.3, 0.1] under mean, n = 32",
        ),
        # A disagreement is said before what is merely open.
        (
            {
                "tests": differences(
                    random_abpc=(OPEN, OPEN), random_comprehensiveness=(WORSE, BETTER)
                )
            },
            "inconclusive: imputers disagree on comprehensiveness against the random "
            "ranking: -0.3 [-0.4, -0.2] under zeros, 0.3 [0.2, 0.4] under mean, n = 32",
        ),
    ],
)
def test_sentences(changed, sentence):
    assert said(**changed) == sentence
