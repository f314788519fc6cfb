"""Feature ablation, or erasure (Li et al., 2016, arXiv 1612.08220)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import chunks
from xviz_jax.attribution import At, Attribution, Target
from xviz_jax.perturbation.features import play


def feature_ablation(
    model: Callable,
    *,
    groups: Any = None,
    baseline: Any = None,
    chunk: int = 8,
    at: At = None,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Attributes to each feature what the output loses when it alone is taken away.

    The plainest question, and no gradient is needed; but features that can stand in
    for each other all look unimportant, since none is missed alone. Signed. Adds up
    to the change of the output for additive models only. Costs one forward pass for
    each feature and one more; memory grows with `chunk` only.

    Args:
      model: Maps one example to logits; any JAX function.
      groups: The number of the feature that each element belongs to: integers from 0
        shaped like the input (for tokens, like the tokens), or a function of the
        input that returns them, such as `lambda x: patches(x.shape, 4)`. By default
        every element, or token, is a feature.
      baseline: What takes a feature's place: None for zeros, a number, an array
        shaped like the input, a function of it, or one of `xv.baselines`.
      chunk: How many inputs are evaluated at once.
      at: A traced site (or its name, or several) whose activation is explained in
        place of the input.
      argnums: Which positional arguments are explained, as in `jax.grad`.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, whose scores are shaped
      like the explained input (one for each token where it is an integer array that
      the model looks up); every element of a feature has the feature's score. The
      diagnostic `evaluations` counts forward passes.

    Raises:
      ValueError: If the input is not made of floats, or the groups, baseline, target
        or chunk does not fit.

    >>> explain = feature_ablation(lambda x: (x[0] * x[1] + x[2])[None])
    >>> explain(jnp.array([2.0, 3.0, 4.0])).scores.tolist()
    [6.0, 6.0, 4.0]
    """
    chunks.positive(chunk, "chunk")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        game = play(model, args, argnums, target, at, groups, baseline)

        def without(feature: jax.Array) -> jax.Array:
            return game.value(jnp.arange(game.count) != feature)

        left = chunks.each(without, jnp.arange(game.count), chunk)
        return Attribution(
            scores=game.scores(game.output - left),
            output=game.output,
            diagnostics={"evaluations": jnp.int32(game.count + 1)},
        )

    return explain
