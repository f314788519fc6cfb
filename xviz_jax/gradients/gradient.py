"""The gradient that every method of this school starts from."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from xviz_jax import attribution
from xviz_jax.attribution import At, Question, Target


def gradient_at(
    model: Callable,
    args: Sequence[Any],
    argnums: int | Sequence[int],
    target: Target,
    at: At = None,
) -> tuple[Question, jax.Array, Any]:
    """Question, explained scalar and its gradient, in one forward and backward.

    Args:
      model: Maps one example to logits.
      args: Positional arguments of the model.
      argnums: Which of them are explained.
      target: What is explained.
      at: The site that is explained, in place of the argument.

    Returns:
      What is explained, the scalar (float32), and the gradient in the input's
      dtype.
    """
    question = attribution.ask(model, args, argnums, at)

    def scalar(x: Any) -> jax.Array:
        logits = question.model(x)
        return attribution.explained(attribution.hold(target, logits), logits)

    output, gradient = jax.value_and_grad(scalar)(question.x)
    return question, output, gradient
