"""Rank correlation of many pairs of rankings at once."""

import numpy as np


def spearman(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation, row by row; ties share their mean rank.

    Args:
      one: `[rows, features]`.
      two: The same.

    Returns:
      `[rows]`; not a number where a row does not vary, or is not all numbers.
    """
    ranked = [_ranks(np.asarray(each, np.float64)) for each in (one, two)]
    centered = [each - each.mean(axis=1, keepdims=True) for each in ranked]
    product = (centered[0] * centered[1]).sum(axis=1)
    size = np.sqrt(np.prod([np.square(each).sum(axis=1) for each in centered], axis=0))
    with np.errstate(invalid="ignore"):
        return np.where(size > 0, product / np.where(size > 0, size, 1), np.nan)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Places from 0 up; those of equal values are averaged."""
    ordered = np.sort(values, axis=1)
    below = np.stack([np.searchsorted(*each) for each in zip(ordered, values)])
    upto = np.stack(
        [np.searchsorted(*each, side="right") for each in zip(ordered, values)]
    )
    ranks = (below + upto - 1) / 2
    whole = np.isfinite(values).all(axis=1, keepdims=True)
    return np.where(whole, ranks, np.nan)
