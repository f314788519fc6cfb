"""Efficient randomisation test, eMPRT (Hedström et al., 2024, arXiv 2401.06465)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attribution import Attribution, Target
from xviz_jax.metrics import again, shuffling
from xviz_jax.metrics.features import flattened, split
from xviz_jax.metrics.measurement import Measurement, Metric, Reason, conclude


def efficient_mprt(
    model: Callable,
    *,
    explain: Callable[..., Attribution],
    bins: int = 100,
    randomize: shuffling.Randomize = "permute",
    parameters_argnum: int = 0,
    argnums: int = 1,
) -> Metric:
    """How much the entropy of scores rises when all parameters are randomised.

    A model of noise should be explained by noise. The rise is relative to the entropy
    for the real model, and needs no measure of likeness. Entropy is that of a histogram
    of the scores, from the least to the largest, in nats. Costs one explanation and a
    forward pass, and the memory of the parameters twice over.

    Args:
      model: Maps parameters and one example to logits; any JAX function.
      explain: What the method that made the attribution returned, of the same
        arguments.
      bins: Of equal width, of the histogram.
      randomize: `permute` shuffles the entries of each array; `normal` draws them anew
        with the mean and the spread they have; or a function `(array, key) -> array`.
        Integers stay as they are.
      parameters_argnum: Which of the model's positional arguments are the parameters.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, higher is better, that needs a `key`. Its details are `entropy`, for
      the real model, and `random_entropy`. Undefined where all scores are equal.

    Raises:
      ValueError: If there is no key, scores of the two explanations differ in shape, or
        an option does not fit.

    >>> from xviz_jax.gradients import saliency
    >>> model = lambda weights, x: weights @ x
    >>> weights, x = jnp.array([[1.0, 0.0, 0.0, 0.0]]), jnp.ones(4)
    >>> explain = saliency(model, argnums=1)
    >>> found = efficient_mprt(model, explain=explain)(
    ...     weights, x, explain(weights, x), key=jax.random.key(0)
    ... )
    >>> float(found.value)
    0.0
    """
    again.check("efficient_mprt", explain)
    shuffling.check(randomize)
    chunks.positive(bins, "bins")

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        given, _, scores = split("efficient_mprt", args, argnums)
        place = shuffling.place_of(given, parameters_argnum)
        held = attribution.hold(target, model(*given))
        row = flattened(scores)
        first, second = jax.random.split(key)
        filled = list(given)
        filled[place] = shuffling.shuffled(given[place], randomize, first)
        found = again.scores(explain, filled, held, second, scores)
        before, after = entropy(row, bins), entropy(found, bins)
        return conclude(
            (after - before) / before,
            [again.finite(row, found), (Reason.NO_VARIANCE, before == 0)],
            entropy=before,
            random_entropy=after,
        )

    needs = frozenset({"key", "explain", "parameters"})
    return Metric("efficient_mprt", "higher", needs, measure)


def entropy(row: jax.Array, bins: int) -> jax.Array:
    """The entropy of a histogram from the least to the largest value, in nats."""
    low, high = jnp.min(row), jnp.max(row)
    width = jnp.where(high > low, high - low, 1)
    place = jnp.floor((row - low) / width * bins).astype(jnp.int32)
    number = jnp.clip(place, 0, bins - 1)
    share = jnp.zeros(bins, jnp.int32).at[number].add(1).astype(jnp.float32) / len(row)
    return jnp.sum(jax.scipy.special.entr(share))
