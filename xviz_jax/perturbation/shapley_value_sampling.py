"""Shapley value sampling (Castro et al., 2009; Štrumbelj and Kononenko, 2010)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attribution import At, Attribution, Target
from xviz_jax.perturbation.features import play


def shapley_value_sampling(
    model: Callable,
    *,
    samples: int = 32,
    antithetic: bool = True,
    groups: Any = None,
    baseline: Any = None,
    chunk: int = 8,
    at: At = None,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Estimates Shapley values from random orders in which features arrive.

    For more features than `exact_shapley` takes. Each order pays every feature what
    it adds to those before it; the estimate is unbiased, and every order adds up to
    the change of the output exactly, so the completeness gap says nothing of its
    error: read `standard_error`. Signed. Costs `samples * (features - 1)` forward
    passes and two more; memory grows with `chunk` only. Averages in float32.

    Args:
      model: Maps one example to logits; any JAX function.
      samples: Orders. Even, where `antithetic`.
      antithetic: Follow each order by its reverse, which costs nothing and cancels
        much of the noise (Mitchell et al., 2022, arXiv 2104.12199).
      groups: The number of the feature that each element belongs to, as for
        `feature_ablation`. By default every element, or token, is a feature.
      baseline: What takes a feature's place: None for zeros, a number, an array
        shaped like the input, a function of it, or one of `xv.baselines`.
      chunk: How many inputs are evaluated at once.
      at: A traced site (or its name, or several) whose activation is explained in
        place of the input.
      argnums: Which positional arguments are explained, as in `jax.grad`.

    Returns:
      `explain(*args, target=None, key) -> Attribution`, whose scores are shaped like
      the explained input (one for each token where it is an integer array that the
      model looks up); every element of a feature has the feature's score. The
      diagnostics are `standard_error`, shaped like the scores (from pairs, where
      `antithetic`), `completeness_gap`, `absolute_gap`, `baseline_output`, and
      `evaluations`, forward passes.

    Raises:
      ValueError: If there is no key, the input is not made of floats, or the groups,
        baseline, target or an option does not fit.

    >>> import jax
    >>> explain = shapley_value_sampling(lambda x: (x[0] * x[1] + x[2])[None])
    >>> explain(jnp.array([2.0, 3.0, 4.0]), key=jax.random.key(0)).scores.tolist()
    [3.0, 3.0, 4.0]
    """
    chunks.positive(samples, "samples")
    chunks.positive(chunk, "chunk")
    if antithetic and samples % 2:
        raise ValueError(f"`samples` come in antithetic pairs: even, got {samples}")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        key = attribution.require_key(key, "shapley_value_sampling")
        game = play(model, args, argnums, target, at, groups, baseline)
        absent = game.absent

        def gains(order: jax.Array) -> jax.Array:
            """What each feature adds, in one order of arrival."""
            arrival = jnp.argsort(order)
            value = lambda size: game.value(arrival < size)
            sizes = jnp.arange(1, game.count)
            inner = chunks.each(value, sizes, chunk) if game.count > 1 else sizes
            ends = (absent[None], inner.astype(jnp.float32), game.output[None])
            return jnp.diff(jnp.concatenate(ends))[arrival]

        def sample(key: jax.Array) -> jax.Array:
            order = jax.random.permutation(key, game.count)
            if not antithetic:
                return gains(order)
            return (gains(order) + gains(order[::-1])) / 2

        turns = samples // 2 if antithetic else samples
        # One order fills a chunk, so orders are taken one by one.
        mean, variance = chunks.moments(sample, jax.random.split(key, turns), 1)
        return Attribution(
            scores=game.scores(mean),
            output=game.output,
            diagnostics={
                "standard_error": game.scores(jnp.sqrt(variance / turns)),
                **attribution.completeness(mean, game.output, absent),
                "evaluations": jnp.int32(samples * (game.count - 1) + 2),
            },
        )

    return explain
