"""Deletion (Petsiuk et al., 2018, arXiv 1806.07421): most relevant first."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from xviz_jax import chunks
from xviz_jax.attribution import Target
from xviz_jax.metrics import curves, imputers
from xviz_jax.metrics.features import Output, check_output, prepare
from xviz_jax.metrics.measurement import Measurement, Metric, conclude


def deletion(
    model: Callable,
    *,
    imputer: imputers.Imputer | None = None,
    groups: Any = None,
    output: Output = "logit",
    steps: int = 16,
    chunk: int = 8,
    argnums: int = 0,
) -> Metric:
    """The area under the output's curve as the highest scores are taken away.

    How fast does the output fall? Known as the MoRF curve of pixel flipping. Read it
    beside `insertion`, or as their difference `abpc`: taking away makes inputs that
    the model has never seen, and the imputer may decide the winner. In units of the
    output. Costs `steps` forward passes and one more; memory grows with `chunk` only.

    Args:
      model: Maps one example to logits; any JAX function.
      imputer: What takes the place of absent features, of `xv.metrics.imputers`; None
        for zeros (of tokens, their embeddings).
      groups: The number of the feature that each element belongs to: integers from 0
        shaped like the input (for tokens, like the tokens), or a function of the
        input that returns them, such as `lambda x: xv.patches(x.shape, 4)`. By default
        every element, or token, is a feature.
      output: What is measured of the logits: `logit`, the explained scalar itself;
        `probability`, that of the class, as in the paper, which saturates; `margin`,
        the class's logit less the largest other one.
      steps: Points of the curve after the first, equally spaced but for whole
        features; at most one for each feature.
      chunk: How many inputs are evaluated at once.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, lower is better. Its details are `fraction`, of features gone, and
      `curve`, both `[steps + 1]`. Scores shaped like the input are summed within
      features, `[features]` are used as they are; equal scores go by their number.

    Raises:
      ValueError: If an option, the scores, groups, target or input does not fit.

    >>> measure = deletion(lambda x: jnp.sum(x)[None])
    >>> x = jnp.array([1.0, 3.0])
    >>> float(measure(x, x).value)  # of 4, 1, 0
    1.5

    Source: the paper; Samek et al., 2017, arXiv 1509.06321.
    """
    chunks.positive(steps, "steps")
    chunks.positive(chunk, "chunk")
    check_output(output)
    taken = imputers.check(imputer)

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        seen = prepare("deletion", model, args, argnums, target, groups, taken, output)
        gone = curves.sizes(seen.count, steps)
        rest = curves.values(seen, key, chunk, remove=gone[1:])
        curve = jnp.concatenate([seen.output[None], rest])
        fraction = gone / seen.count
        return conclude(
            curves.area(fraction, curve),
            [*seen.checks(rest), seen.equal],
            fraction=jnp.asarray(fraction, jnp.float32),
            curve=curve,
        )

    needs = frozenset({"key"} if taken.random else ())
    return Metric("deletion", "lower", needs, measure)
