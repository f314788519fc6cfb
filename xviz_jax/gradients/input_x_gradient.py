"""Input times gradient (Shrikumar et al., 2016, arXiv 1605.01713)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax.attribution import At, Attribution, Target
from xviz_jax.gradients.gradient import gradient_at


def input_x_gradient(
    model: Callable, *, at: At = None, argnums: int | Sequence[int] = 0
) -> Callable[..., Attribution]:
    """Attributes an output to each input element by its value times its gradient.

    Exact for linear models; for others a first-order guess at what each element
    contributes against zero. Signed. Costs one forward and one backward pass.

    Args:
      model: Maps one example to logits; any JAX function.
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
    >>> explain = input_x_gradient(lambda x: weights @ x)
    >>> explain(jnp.array([2.0, 1.0]), target=0).scores.tolist()
    [2.0, -2.0]
    """

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        question, output, gradient = gradient_at(model, args, argnums, target, at)

        def score(leaf: jax.Array, slope: jax.Array) -> jax.Array:
            return leaf.astype(jnp.float32) * slope.astype(jnp.float32)

        scores = question.scores(jax.tree.map(score, question.x, gradient))
        return Attribution(scores=scores, output=output)

    return explain
