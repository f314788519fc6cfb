"""Kernel SHAP (Lundberg and Lee, 2017, arXiv 1705.07874)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import attribution, chunks
from xviz_jax.attribution import At, Attribution, Target
from xviz_jax.perturbation.features import play

# Relative to the largest, an eigenvalue below this is a direction never sampled.
_RANK = 1e-5


def kernel_shap(
    model: Callable,
    *,
    samples: int = 512,
    groups: Any = None,
    baseline: Any = None,
    chunk: int = 8,
    at: At = None,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Estimates Shapley values by a weighted linear fit to sampled coalitions.

    For more features than `exact_shapley` takes; needs several samples for each
    feature, and is exact for an additive model as soon as the fit is determined.
    Where there are no more than `samples` coalitions, all are evaluated, and the
    values are exact. Signed. Adds up to the change of the output by construction,
    so a gap says nothing of its error: read `standard_error`. Costs `samples`
    forward passes and two more; memory grows with `chunk`, and with the number of
    features times that of samples. Sums in float32.

    Args:
      model: Maps one example to logits; any JAX function.
      samples: Coalitions, in pairs of complements; even.
      groups: The number of the feature that each element belongs to, as for
        `feature_ablation`. By default every element, or token, is a feature.
      baseline: What takes a feature's place: None for zeros, a number, an array
        shaped like the input, a function of it, or one of `xv.baselines`.
      chunk: How many coalitions are evaluated at once.
      at: A traced site (or its name, or several) whose activation is explained in
        place of the input.
      argnums: Which positional arguments are explained, as in `jax.grad`.

    Returns:
      `explain(*args, target=None, key) -> Attribution`, whose scores are shaped like
      the explained input (one for each token where it is an integer array that the
      model looks up); every element of a feature has the feature's score. The
      diagnostics are

      - `standard_error`: shaped like the scores, from the spread of pairs around the
        fit; zero where all coalitions were evaluated;
      - `converged`: whether the samples determine the fit;
      - `completeness_gap`, `absolute_gap`, `baseline_output`;
      - `evaluations`: forward passes.

    Raises:
      ValueError: If there is no key, the input is not made of floats, or the groups,
        baseline, target or an option does not fit.

    >>> import jax
    >>> explain = kernel_shap(lambda x: (x[0] * x[1] + x[2])[None])
    >>> scores = explain(jnp.array([2.0, 3.0, 4.0]), key=jax.random.key(0)).scores
    >>> scores.round(4).tolist()
    [3.0, 3.0, 4.0]

    Source: theorem 2 of the paper; complements in pairs and the constraint solved
    exactly: Covert and Lee, 2021, arXiv 2012.01536.
    """
    chunks.positive(samples, "samples")
    chunks.positive(chunk, "chunk")
    if samples % 2:
        raise ValueError(f"`samples` come in pairs of complements: even, got {samples}")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        key = attribution.require_key(key, "kernel_shap")
        game = play(model, args, argnums, target, at, groups, baseline)
        count, absent = game.count, game.absent
        change = game.output - absent
        rows, weights, exact = _coalitions(key, count, samples)
        sizes = jnp.sum(rows, axis=1).astype(jnp.float32)

        def measure(row: jax.Array) -> jax.Array:
            """What a coalition is worth more than its complement."""
            return game.value(row) - game.value(~row)

        # Shares that add up to zero are fitted; equal shares are added at the end.
        gain = chunks.each(measure, rows, max(chunk // 2, 1))
        gain = gain - change * (2 * sizes / count - 1)
        # A complement's centred row is the negative of its partner's.
        centred = rows.astype(jnp.float32) - (sizes / count)[:, None]
        weighted = centred * weights[:, None]
        inverse, determined = _inverse(2 * _product(weighted.T, centred))
        excess = _product(inverse, _product(gain, weighted)[:, None])[:, 0]
        excess = excess - jnp.mean(excess)

        away = gain - 2 * _product(centred, excess[:, None])[:, 0]
        lever = _product(weighted * away[:, None], inverse)
        error = jnp.zeros(count) if exact else jnp.sqrt(jnp.sum(lever**2, axis=0))
        shares = excess + change / count
        return Attribution(
            scores=game.scores(shares),
            output=game.output,
            diagnostics={
                "standard_error": game.scores(error),
                "converged": determined,
                **attribution.completeness(shares, game.output, absent),
                "evaluations": jnp.int32(2 * len(rows) + 2),
            },
        )

    return explain


def _coalitions(
    key: jax.Array, count: int, samples: int
) -> tuple[jax.Array, jax.Array, bool]:
    """One of each pair of complements, their weights, and whether all are there."""
    if count < 31 and samples >= 2**count - 2:
        # The feature with the highest number is absent, so no pair comes twice.
        numbers = np.arange(1, max(2 ** (count - 1), 2))
        rows = (numbers[:, None] >> np.arange(count)) % 2 == 1
        size = rows.sum(axis=1)
        ways = np.array([math.comb(count, each) for each in size])
        weights = 1 / (ways * size * np.maximum(count - size, 1))
        return jnp.asarray(rows), jnp.asarray(weights, jnp.float32), True
    sizes = np.arange(1, count)
    chance = jnp.asarray(1 / (sizes * (count - sizes)), jnp.float32)
    first, second = jax.random.split(key)
    pairs = samples // 2
    size = 1 + jax.random.categorical(first, jnp.log(chance), shape=(pairs, 1))
    order = jnp.argsort(jax.random.uniform(second, (pairs, count)), axis=1)
    return order < jnp.broadcast_to(size, order.shape), jnp.ones(pairs), False


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _inverse(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pseudo-inverse among shares that add up to zero, and whether it has full rank."""
    values, vectors = jnp.linalg.eigh(matrix)
    kept = values > _RANK * values[-1]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    full = jnp.sum(kept) == len(matrix) - 1
    return _product(vectors * inverse[None], vectors.T), full
