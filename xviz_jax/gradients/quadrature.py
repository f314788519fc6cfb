"""Rules that place nodes on a path from 0 to 1, with weights that sum to one."""

from collections.abc import Callable

import numpy as np


def _left(steps: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(steps) / steps, np.full(steps, 1 / steps)


def _right(steps: int) -> tuple[np.ndarray, np.ndarray]:
    return (np.arange(steps) + 1) / steps, np.full(steps, 1 / steps)


def _midpoint(steps: int) -> tuple[np.ndarray, np.ndarray]:
    return (np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps)


def _trapezoid(steps: int) -> tuple[np.ndarray, np.ndarray]:
    if steps < 2:
        raise ValueError(f"the trapezoid rule takes at least 2 steps, got {steps}")
    weights = np.full(steps, 1 / (steps - 1))
    weights[[0, -1]] /= 2
    return np.linspace(0, 1, steps), weights


def _gauss_legendre(steps: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return (nodes + 1) / 2, weights / 2


RULES: dict[str, Callable[[int], tuple[np.ndarray, np.ndarray]]] = {
    "left": _left,
    "right": _right,
    "midpoint": _midpoint,
    "trapezoid": _trapezoid,
    "gauss_legendre": _gauss_legendre,
}


def rule_nodes(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in [0, 1] and weights of a rule, float64 [steps].

    Args:
      rule: `left`, `right`, `midpoint`, `trapezoid` or `gauss_legendre`.
      steps: How many nodes.

    Raises:
      ValueError: If there is no such rule, or too few steps for it.

    >>> nodes, weights = rule_nodes("midpoint", 2)
    >>> nodes.tolist(), weights.tolist()
    ([0.25, 0.75], [0.5, 0.5])
    """
    if rule not in RULES:
        raise ValueError(f"`rule` is one of {list(RULES)}, got {rule!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` is a positive integer, got {steps!r}")
    return RULES[rule](steps)
