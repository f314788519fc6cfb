"""Exact Shapley values (Shapley, 1953) of few features, by enumeration."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import attribution, chunks
from xviz_jax.attribution import At, Attribution, Target
from xviz_jax.perturbation.features import play

# 65,536 coalitions.
_MOST = 16


def exact_shapley(
    model: Callable,
    *,
    groups: Any = None,
    baseline: Any = None,
    chunk: int = 8,
    at: At = None,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Attributes to each feature its mean contribution over all orders of arrival.

    The one attribution that is complete, symmetric, linear and blind to features
    that do nothing; the yardstick for everything that approximates it. Signed. Adds
    up to the change of the output from the baseline. Costs a forward pass for each
    of 2^n coalitions and one more; refuses more than 16 features. Memory grows with
    `chunk`, and with one number for each coalition. Sums in float32.

    Args:
      model: Maps one example to logits; any JAX function.
      groups: The number of the feature that each element belongs to, as for
        `feature_ablation`. By default every element, or token, is a feature.
      baseline: What takes a feature's place: None for zeros, a number, an array
        shaped like the input, a function of it, or one of `xv.baselines`.
      chunk: How many coalitions are evaluated at once.
      at: A traced site (or its name, or several) whose activation is explained in
        place of the input.
      argnums: Which positional arguments are explained, as in `jax.grad`.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, whose scores are shaped
      like the explained input (one for each token where it is an integer array that
      the model looks up); every element of a feature has the feature's score. The
      diagnostics are `completeness_gap` and `absolute_gap` (of the features' scores,
      each counted once), `baseline_output`, and `evaluations`, forward passes.

    Raises:
      ValueError: If there are more than 16 features, the input is not made of
        floats, or the groups, baseline, target or chunk does not fit.

    >>> explain = exact_shapley(lambda x: (x[0] * x[1] + x[2])[None])
    >>> explain(jnp.array([2.0, 3.0, 4.0])).scores.tolist()
    [3.0, 3.0, 4.0]
    """
    chunks.positive(chunk, "chunk")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        game = play(model, args, argnums, target, at, groups, baseline)
        count = game.count
        if count > _MOST:
            raise ValueError(
                f"`exact_shapley` enumerates coalitions of at most {_MOST} features, "
                f"got {count}: pass `groups`, or use `shapley_value_sampling`"
            )

        def value(coalition: jax.Array) -> jax.Array:
            return game.value((coalition >> jnp.arange(count)) & 1 == 1)

        values = chunks.each(value, jnp.arange(2**count), chunk)
        shares = jnp.stack([_share(values, each, count) for each in range(count)])
        return Attribution(
            scores=game.scores(shares),
            output=game.output,
            diagnostics={
                **attribution.completeness(shares, game.output, values[0]),
                "evaluations": jnp.int32(2**count + 1),
            },
        )

    return explain


def _share(values: jax.Array, feature: int, count: int) -> jax.Array:
    """Mean gain from one feature, over sizes of coalitions and then within them."""
    pairs = values.reshape(2 ** (count - 1 - feature), 2, 2**feature)
    gains = (pairs[:, 1] - pairs[:, 0]).ravel()
    others = np.arange(2 ** (count - 1))
    size = np.array([int(each).bit_count() for each in others])
    ways = np.array([math.comb(count - 1, int(each)) for each in size])
    return jnp.sum(gains * jnp.asarray(1 / (count * ways), jnp.float32))
