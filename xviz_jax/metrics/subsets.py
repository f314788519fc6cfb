"""Random sets of features: what their scores add up to, and what the output loses."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import chunks
from xviz_jax.attribution import Target
from xviz_jax.metrics import imputers, similarity
from xviz_jax.metrics.features import Features, Output, check_output, prepare
from xviz_jax.metrics.measurement import Measurement, Metric, Reason, conclude


def drawn(key: jax.Array, count: int, sizes: jax.Array) -> jax.Array:
    """A random set of each size, bool `[sizes, count]`."""
    order = jnp.argsort(jax.random.uniform(key, (len(sizes), count)), axis=1)
    return order < sizes[:, None]


def sums(features: Features, sets: jax.Array) -> jax.Array:
    """What the scores of each set add up to, float32 `[sets]`."""
    return jnp.sum(jnp.where(sets, features.scores[None], 0), axis=1)


def outputs(features: Features, sets: jax.Array, key: Any, chunk: int) -> jax.Array:
    """The output without each set, float32 `[sets]`.

    Args:
      features: The input.
      sets: bool `[sets, count]`.
      key: A PRNG key, if the imputer needs one.
      chunk: How many inputs are evaluated at once.
    """
    value = lambda item: features.value(~item[0], item[1])
    return chunks.each(value, (sets, features.keys(key, len(sets))), chunk)


def correlation(
    name: str,
    model: Callable,
    fractions: Sequence[float],
    samples: int,
    imputer: imputers.Imputer | None,
    groups: Any,
    output: Output,
    chunk: int,
    argnums: int,
) -> Metric:
    """The mean, over sizes of sets, of the correlation of sums with losses."""
    chunks.positive(samples, "samples")
    chunks.positive(chunk, "chunk")
    check_output(output)
    taken = imputers.check(imputer)
    shares = np.asarray(fractions, np.float64)
    if shares.ndim != 1 or not len(shares) or not ((shares > 0) & (shares < 1)).all():
        raise ValueError(f"fractions are between 0 and 1, got {fractions}")
    if samples < 3:
        raise ValueError(f"a correlation takes at least 3 `samples`, got {samples}")

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        seen = prepare(name, model, args, argnums, target, groups, taken, output)
        if seen.count < 2:
            raise ValueError(f"`{name}` takes at least 2 features, got {seen.count}")
        sizes = np.floor(shares * seen.count + 0.5).astype(np.int32)
        sizes = np.unique(np.clip(sizes, 1, seen.count - 1))
        first, second = jax.random.split(key)
        each = jnp.asarray(np.repeat(sizes, samples))
        sets = drawn(first, seen.count, each)
        left = outputs(seen, sets, second, chunk)
        # The output falls as the loss rises.
        found = -jax.vmap(similarity.pearson)(
            sums(seen, sets).reshape(-1, samples), left.reshape(-1, samples)
        )
        # Sums of equal scores differ by rounding alone, and so may losses.
        still = jnp.any(jnp.isnan(found))
        return conclude(
            jnp.mean(found),
            [*seen.checks(left), seen.equal, (Reason.NO_VARIANCE, still)],
            fraction=jnp.asarray(sizes / seen.count, jnp.float32),
            correlation=found,
        )

    return Metric(name, "higher", frozenset({"key", "signed"}), measure)
