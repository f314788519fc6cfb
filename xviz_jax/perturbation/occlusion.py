"""Occlusion (Zeiler and Fergus, 2014, arXiv 1311.2901)."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import chunks
from xviz_jax.attribution import At, Attribution, Target
from xviz_jax.perturbation.canvas import Canvas, prepare


def occlusion(
    model: Callable,
    *,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    baseline: Any = None,
    chunk: int = 8,
    at: At = None,
    argnums: int = 0,
) -> Callable[..., Attribution]:
    """Slides a window over the input and scores what the output loses beneath it.

    For images and sequences, when a whole part must go before the model misses it.
    An element's score is the mean loss of the windows that cover it. Signed.
    Conserves nothing. Costs one forward pass for each place of the window and one
    more; memory grows with `chunk` only.

    Args:
      model: Maps one example to logits; any JAX function.
      window: Its size along the leading axes of the input; further axes (channels,
        features) are covered whole. One number stands for two axes of an array that
        has three or two, or the only axis of a sequence of tokens.
      stride: How far it moves along each of these axes.
      baseline: What the window shows: None for zeros, a number, an array shaped like
        the input, a function of it, or one of `xv.baselines`.
      chunk: How many inputs are evaluated at once.
      at: A traced site or its name whose activation is explained in place of the
        input.
      argnums: Which positional argument is explained: one array.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, whose scores are shaped
      like the explained input (one for each token where it is an integer array that
      the model looks up). Elements that no window covers score 0. The diagnostic
      `evaluations` counts forward passes.

    Raises:
      ValueError: If the input is not one array of floats or tokens, or the window,
        stride, baseline, target or chunk does not fit.

    >>> explain = occlusion(lambda x: jnp.sum(x)[None], window=(2,))
    >>> explain(jnp.array([1.0, 2.0, 4.0])).scores.tolist()
    [3.0, 4.5, 6.0]
    """
    chunks.positive(chunk, "chunk")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        canvas = prepare("occlusion", model, args, argnums, target, at, baseline)
        sizes = canvas.sizes(window, "window")
        corners = _corners(canvas, sizes, window, stride)

        def loss(corner: jax.Array) -> tuple[jax.Array, jax.Array]:
            inside = jnp.array(True)
            for axis, size in enumerate(sizes):
                place = jnp.arange(canvas.shape[axis]) - corner[axis]
                inside = jnp.logical_and(
                    *jnp.broadcast_arrays(
                        inside[..., None],
                        ((place >= 0) & (place < size)).reshape((1,) * axis + (-1,)),
                    )
                )
            lost = canvas.output - canvas.value(~inside)
            return jnp.where(inside, lost, 0), inside.astype(jnp.float32)

        lost, count = chunks.total(loss, jnp.asarray(corners), chunk)
        return Attribution(
            scores=canvas.scores(lost / jnp.maximum(count, 1)),
            output=canvas.output,
            diagnostics={"evaluations": jnp.int32(len(corners) + 1)},
        )

    return explain


def _corners(
    canvas: Canvas,
    sizes: tuple[int, ...],
    window: int | Sequence[int],
    stride: int | Sequence[int],
) -> np.ndarray:
    """The window's first corner at each of its places, `[places, axes]`."""
    shape = canvas.shape[: len(sizes)]
    strides = (stride,) * len(sizes) if isinstance(stride, int) else tuple(stride)
    if len(strides) != len(sizes) or min(strides) < 1:
        raise ValueError(
            f"`stride` is positive, and for the axes of `window` {window}; got {stride}"
        )
    if any(size > whole for size, whole in zip(sizes, shape, strict=True)):
        raise ValueError(f"`window` fits into {shape}, got {sizes}")
    # The last window reaches the end, or beyond it.
    steps = [
        range(0, whole - size + step, step)
        for whole, size, step in zip(shape, sizes, strides, strict=True)
    ]
    return np.array(list(itertools.product(*steps)), np.int32)
