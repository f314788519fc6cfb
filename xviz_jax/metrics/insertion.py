"""Insertion (Petsiuk et al., 2018, arXiv 1806.07421): most relevant, put in first."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from xviz_jax import chunks
from xviz_jax.attribution import Target
from xviz_jax.metrics import curves, imputers
from xviz_jax.metrics.features import Output, check_output, prepare
from xviz_jax.metrics.measurement import Measurement, Metric, conclude


def insertion(
    model: Callable,
    *,
    imputer: imputers.Imputer | None = None,
    groups: Any = None,
    output: Output = "logit",
    steps: int = 16,
    chunk: int = 8,
    argnums: int = 0,
) -> Metric:
    """The area under the output's curve as the highest scores are put in alone.

    How fast does the output rise from nothing? Read backwards it is the curve of
    taking the lowest scores away first (LeRF): sizes are those that `deletion` leaves.
    In units of the output. Costs `steps` forward passes and one more; memory grows
    with `chunk` only.

    Args:
      model: Maps one example to logits; any JAX function.
      imputer: What takes the place of absent features, of `xv.metrics.imputers`; None
        for zeros (of tokens, their embeddings).
      groups: The number of the feature that each element belongs to, as for
        `deletion`. By default every element, or token, is a feature.
      output: What is measured of the logits: `logit`, the explained scalar itself;
        `probability`, that of the class, as in the paper; `margin`, the class's logit
        less the largest other one.
      steps: Points of the curve before the last, equally spaced but for whole
        features; at most one for each feature.
      chunk: How many inputs are evaluated at once.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, higher is better. Its details are `fraction`, of features present,
      and `curve`, both `[steps + 1]`.

    Raises:
      ValueError: If an option, the scores, groups, target or input does not fit.

    >>> measure = insertion(lambda x: jnp.sum(x)[None])
    >>> x = jnp.array([1.0, 3.0])
    >>> float(measure(x, x).value)  # of 0, 3, 4
    2.5
    """
    chunks.positive(steps, "steps")
    chunks.positive(chunk, "chunk")
    check_output(output)
    taken = imputers.check(imputer)

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        seen = prepare("insertion", model, args, argnums, target, groups, taken, output)
        there = seen.count - curves.sizes(seen.count, steps)[::-1]
        rest = curves.values(seen, key, chunk, keep=there[:-1])
        curve = jnp.concatenate([rest, seen.output[None]])
        fraction = there / seen.count
        return conclude(
            curves.area(fraction, curve),
            [*seen.checks(rest), seen.equal],
            fraction=jnp.asarray(fraction, jnp.float32),
            curve=curve,
        )

    needs = frozenset({"key"} if taken.random else ())
    return Metric("insertion", "higher", needs, measure)
