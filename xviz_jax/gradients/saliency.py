"""Saliency (Simonyan et al., 2014, arXiv 1312.6034)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.attribution import At, Attribution, Target
from xviz_jax.gradients.gradient import gradient_at


def saliency(
    model: Callable,
    *,
    signed: bool = False,
    at: At = None,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Attributes an output to each input element by the size of its gradient.

    The cheapest method: where would a small change matter? It says nothing of how
    much the present value contributed, and it is blind where the output saturates.
    Costs one forward and one backward pass.

    Args:
      model: Maps one example to logits; any JAX function.
      signed: Keep the gradient's sign; by default scores are magnitudes.
      at: A traced site (or its name, or several) whose activation is explained in
        place of the input: the layer variant.
      argnums: Which positional arguments are explained, as in `jax.grad`.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, whose scores are
      shaped like the explained input (one for each token where it is an integer
      array that the model looks up). No diagnostics.

    Raises:
      ValueError: If the input is not made of floats, or the target does not fit.

    >>> import jax.numpy as jnp
    >>> weights = jnp.array([[1.0, -2.0], [0.0, 3.0]])
    >>> saliency(lambda x: weights @ x)(jnp.ones(2), target=0).scores.tolist()
    [1.0, 2.0]
    """

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        question, output, gradient = gradient_at(model, args, argnums, target, at)

        def score(leaf: jax.Array) -> jax.Array:
            leaf = leaf.astype(jnp.float32)
            return leaf if signed else jnp.abs(leaf)

        scores = question.scores(jax.tree.map(score, gradient))
        return Attribution(scores=scores, output=output)

    return explain
