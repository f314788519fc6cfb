"""The gradient that every method of this school starts from."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from xviz_jax import attribution
from xviz_jax.attribution import Target


def gradient_at(
    model: Callable, args: Sequence[Any], argnums: int | Sequence[int], target: Target
) -> tuple[Any, jax.Array, Any]:
    """Input, explained scalar and its gradient there, in one forward and backward.

    Args:
      model: Maps one example to logits.
      args: Positional arguments of the model.
      argnums: Which of them are explained.
      target: What is explained.

    Returns:
      The explained input, the scalar (float32), and the gradient in the input's
      dtype.
    """
    x, put = attribution.choose(args, argnums)

    def scalar(x: Any) -> jax.Array:
        logits = model(*put(x))
        return attribution.explained(attribution.hold(target, logits), logits)

    output, gradient = jax.value_and_grad(scalar)(x)
    return x, output, gradient
