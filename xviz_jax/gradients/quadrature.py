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


def _clenshaw_curtis(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact for polynomials below degree `steps` (Clenshaw and Curtis, 1960)."""
    if steps < 2:
        raise ValueError(
            f"the Clenshaw-Curtis rule takes at least 2 steps, got {steps}"
        )
    angles = np.linspace(0, np.pi, steps)
    twice = np.arange(2, steps, 2)
    shares = 2 / (twice**2 - 1)
    shares[twice == steps - 1] /= 2
    weights = (1 - np.cos(np.outer(angles, twice)) @ shares) / (steps - 1)
    weights[[0, -1]] /= 2
    return (1 - np.cos(angles)) / 2, weights


RULES: dict[str, Callable[[int], tuple[np.ndarray, np.ndarray]]] = {
    "left": _left,
    "right": _right,
    "midpoint": _midpoint,
    "trapezoid": _trapezoid,
    "gauss_legendre": _gauss_legendre,
    "clenshaw_curtis": _clenshaw_curtis,
}
# Between whose nodes a function is taken for a polynomial.
_SPECTRAL = ("gauss_legendre", "clenshaw_curtis")


def rule_nodes(rule: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in [0, 1] and weights of a rule, float64 [steps].

    Args:
      rule: `left`, `right`, `midpoint`, `trapezoid`, `gauss_legendre` or
        `clenshaw_curtis`.
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


def embedded_weights(rule: str, steps: int) -> np.ndarray:
    """Weights of a coarser rule on every other node of a rule, float64 [steps].

    The integrals of the two differ by about the error of the coarser one. It is
    exact for polynomials as far as its nodes allow where the rule is. Otherwise a
    node stands for the part of the path that is nearest to it, or that lies to one
    side of it.

    Args:
      rule: As for `rule_nodes`.
      steps: How many nodes; there is nothing coarser than one, and its weight is 0.

    >>> embedded_weights("trapezoid", 5).tolist()
    [0.25, 0.0, 0.5, 0.0, 0.25]
    """
    nodes, _ = rule_nodes(rule, steps)
    weights = np.zeros(steps)
    if steps == 1:
        return weights
    first = (steps - 1) % 2 if rule == "right" else 0
    kept = nodes[first::2]
    if rule in _SPECTRAL:
        # Each Legendre polynomial but the first integrates to zero.
        values = np.polynomial.legendre.legvander(2 * kept - 1, len(kept) - 1)
        weights[first::2] = np.linalg.solve(values.T, np.eye(len(kept))[0])
        return weights
    edges = {
        "left": np.append(kept, 1),
        "right": np.insert(kept, 0, 0),
    }.get(rule, np.concatenate([[0], (kept[1:] + kept[:-1]) / 2, [1]]))
    weights[first::2] = np.diff(edges)
    return weights
