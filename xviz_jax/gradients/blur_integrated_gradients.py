"""Blur integrated gradients (Xu et al., 2020, arXiv 2004.03383)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from xviz_jax import baselines
from xviz_jax.attribution import At, Attribution
from xviz_jax.gradients.adaptive import Adaptive
from xviz_jax.gradients.path import explainer


def blur_integrated_gradients(
    model: Callable,
    *,
    sigma: float = 50.0,
    axes: Sequence[int] = (0, 1),
    tolerance: float = 0.01,
    max_evaluations: int = 512,
    chunk: int = 9,
    at: At = None,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Integrates gradients while the input comes into focus.

    For images, where black or gray is not "nothing": the path starts at the input
    blurred and ends at the input, so edges and textures are scored by what they add,
    and no colour is singled out. Signed. Adds up to the output less that of the
    blurred input. Nodes are placed where this input needs them: costs a forward pass
    and from 17 to `max_evaluations` forward and backward passes; memory does not
    grow with them. Sums in float32.

    Args:
      model: Maps one example to logits; any JAX function.
      sigma: Width of the Gaussian at the start of the path, in pixels; it shrinks
        linearly to 0.
      axes: The axes to blur along; of an input with fewer axes, those it has.
      tolerance: Relative error of the scores (L1 norm) to stop at.
      max_evaluations: Nodes at most.
      chunk: How many nodes are evaluated at once.
      at: A traced site (or its name, or several) whose activation is explained in
        place of the input.
      argnums: Which positional arguments are explained, as in `jax.grad`.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, whose scores are shaped
      like the explained input (one for each token where it is an integer array that
      the model looks up), and whose diagnostics are those of
      `integrated_gradients`, with the blurred input as the baseline.

    Raises:
      ValueError: If the input is not made of floats, or the target or an option does
        not fit.

    >>> import jax.numpy as jnp
    >>> explain = blur_integrated_gradients(lambda x: 2.0 * x, axes=(0,))
    >>> explain(jnp.array([0.0, 3.0, 0.0]), target=1).scores.round(1).tolist()
    [0.0, 4.0, 0.0]

    Source: section 3 of the paper; the blur is Lindeberg's on a grid without edges
    (`baselines.diffuse`), so the path's speed is exact.
    """
    if not sigma > 0:
        raise ValueError(f"`sigma` is a width in pixels, got {sigma}")

    def focus(x: Any, begin: Any, alpha: jax.Array) -> Any:
        del begin
        time = (sigma * (1 - alpha)) ** 2 / 2
        return jax.tree.map(lambda leaf: baselines.diffuse(leaf, time, axes), x)

    return explainer(
        model,
        focus,
        quadrature=Adaptive(
            tolerance=tolerance, max_evaluations=max_evaluations, chunk=chunk
        ),
        baseline=baselines.blur(sigma, axes),
        at=at,
        argnums=argnums,
    )
