"""Which features carry a slice of the records: where a shortcut shows."""

from collections.abc import Mapping

import numpy as np

from xviz_jax.comparison.resampling import Resamples, interval
from xviz_jax.comparison.result import Interval

# Of fewer records an interval says nothing.
_LEAST = 8


def shares(scores: np.ndarray) -> np.ndarray:
    """Each feature's share of the sum of absolute scores, `[records, features]`.

    Records whose scores are all zero, or not numbers, have no shares.
    """
    size = np.abs(scores.astype(np.float64))
    total = size.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.where(total > 0, size / np.where(total > 0, total, 1), np.nan)


def mean_shares(found: np.ndarray) -> np.ndarray:
    """The mean over records that have shares, `[features]`."""
    known = np.isfinite(found).all(axis=1)
    if not known.any():
        return np.full(found.shape[1], np.nan)
    return found[known].mean(axis=0)


def raised(
    found: np.ndarray,
    members: Mapping[str, np.ndarray],
    draws: Mapping[str, Resamples],
    level: float,
    share: float,
    times: float,
) -> list[tuple[str, int, Interval, float]]:
    """Features that carry much in one slice and little in the other records.

    A mark that gives a class away lies where nothing else is, and carries that class
    alone. What a class really looks like is spread over several features, or shared
    with others.

    Args:
      found: `[records, features]`, as `shares` returns them.
      members: Which records each slice has, bool `[records]`.
      draws: Resamples of each slice.
      level: Of the interval of the share, for all slices and features at once.
      share: What a feature carries at least, at the interval's lower end.
      times: How many times what it carries elsewhere.

    Returns:
      Slice, feature, its share there, and its share in the other records.
    """
    # Bonferroni: the intervals are many, and only those far out are asked for.
    tests = max(1, len(members)) * found.shape[1]
    strict = 1 - (1 - level) / tests
    noted = []
    for name, member in members.items():
        if member.sum() < _LEAST or member.all():
            continue
        elsewhere = mean_shares(found[~member])
        inside = mean_shares(found[member])
        means = draws[name].means(found[member])
        for feature in np.flatnonzero(inside > share):
            low, high = interval(means[:, feature], strict)
            rest = float(elsewhere[feature])
            if low > share and not inside[feature] <= times * rest:
                estimate = Interval(float(inside[feature]), low, high)
                noted.append((name, int(feature), estimate, rest))
    return noted
