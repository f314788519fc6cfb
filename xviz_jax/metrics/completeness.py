"""Completeness (Sundararajan et al., 2017, arXiv 1703.01365)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attribution import Target
from xviz_jax.metrics.features import flattened, rounding, split
from xviz_jax.metrics.measurement import Measurement, Metric, Reason, conclude


def completeness(model: Callable, *, baseline: Any = None, argnums: int = 0) -> Metric:
    """How far scores are from adding up to the change of the output, relative to it.

    For methods that promise to add up. Necessary, not sufficient: any scores can be
    shifted until they do. Costs two forward passes.

    Args:
      model: Maps one example to logits; any JAX function.
      baseline: The method's own: None for zeros, a number, an array shaped like the
        input, a function of it, or one of `xv.baselines`.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, lower is better. Its details are `absolute_gap`, in units of the
      output, which stays meaningful where the output does not change and the value is
      undefined, and `baseline_output`.

    Raises:
      ValueError: If the baseline, target or input does not fit.

    >>> measure = completeness(lambda x: jnp.sum(x)[None])
    >>> float(measure(jnp.ones(2), jnp.array([1.0, 2.0])).value)
    0.5

    Source: proposition 1 of the paper.
    """

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        del key
        given, number, scores = split("completeness", args, argnums)
        question = attribution.ask(model, given, number)
        output, scalar = question.fix(target)
        begin = scalar(attribution.start(baseline, question))
        found = attribution.completeness(flattened(scores), output, begin)
        ends = jnp.stack([output, begin])
        checks = [
            (Reason.SCORES_NOT_FINITE, ~jnp.all(jnp.isfinite(flattened(scores)))),
            (Reason.OUTPUT_NOT_FINITE, ~jnp.all(jnp.isfinite(ends))),
            (Reason.NO_CHANGE, jnp.abs(output - begin) <= rounding(ends)),
        ]
        gap = found.pop("completeness_gap")
        return conclude(gap, checks, **found)

    return Metric("completeness", "lower", frozenset({"signed"}), measure)
