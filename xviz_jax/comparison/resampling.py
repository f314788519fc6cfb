"""Paired bootstrap intervals (Efron, 1979), and Holm's correction (Holm, 1979)."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Resamples:
    """Draws of records with replacement, the same ones for all that is compared.

    Attributes:
      counts: How often each record was drawn, `[resamples, records]`.
    """

    counts: np.ndarray

    @classmethod
    def draw(cls, records: int, resamples: int, random: np.random.Generator):
        """Draws as many records as there are, again and again."""
        share = np.full(records, 1 / records)
        return cls(random.multinomial(records, share, resamples).astype(np.float64))

    def means(self, values: np.ndarray) -> np.ndarray:
        """The mean of each resample; of several columns at once.

        Args:
          values: `[records, ...]`. Records that are not a number are in no mean.

        Returns:
          `[resamples, ...]`, not a number where a resample has nothing else.
        """
        flat = values.reshape(len(values), -1)
        known = np.isfinite(flat)
        total = self.counts @ np.where(known, flat, 0.0)
        number = self.counts @ known.astype(np.float64)
        with np.errstate(invalid="ignore"):
            means = np.where(number > 0, total / np.maximum(number, 1.0), np.nan)
        return means.reshape(len(means), *values.shape[1:])


def interval(means: np.ndarray, level: float) -> tuple[float, float]:
    """The percentile interval of resampled means.

    Args:
      means: `[resamples]`; those that are not a number are left out.
      level: Such as 0.95.

    Returns:
      The lower and the upper end, not numbers where there is no mean.
    """
    means = means[np.isfinite(means)]
    if not len(means):
        return float("nan"), float("nan")
    outside = (1 - level) / 2
    low, high = np.quantile(means, [outside, 1 - outside])
    return float(low), float(high)


def p_value(means: np.ndarray) -> float:
    """How seldom a mean that is not positive would be drawn, two-sided.

    Never below 2 / (resamples + 1): more cannot be known from so many.
    """
    means = means[np.isfinite(means)]
    return min(1.0, 2 * float(1 + np.sum(means <= 0)) / (1 + len(means)))


def holm_levels(p_values: np.ndarray, level: float) -> np.ndarray:
    """The level of each test's own interval, so that all are right at once.

    The smallest p-value is judged as if each of the tests were it, the next as if
    there were one test less, until one fails; those after it are judged as it was.

    Args:
      p_values: Two-sided, one for each test.
      level: That all intervals hold together, such as 0.95.

    Returns:
      A level for each test.
    """
    count, error = len(p_values), 1 - level
    levels = np.empty(count)
    share = error / max(count, 1)
    for place, number in enumerate(np.argsort(p_values, kind="stable")):
        share = error / (count - place)
        levels[number] = 1 - share
        if p_values[number] > share:
            rest = np.argsort(p_values, kind="stable")[place:]
            levels[rest] = 1 - share
            break
    return levels
