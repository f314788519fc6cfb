"""RISE, randomized input sampling (Petsiuk et al., 2018, arXiv 1806.07421)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attribution import At, Attribution, Target
from xviz_jax.perturbation.canvas import prepare


def rise(
    model: Callable,
    *,
    samples: int = 1024,
    cells: int | Sequence[int] = 7,
    probability: float = 0.5,
    baseline: Any = None,
    chunk: int = 8,
    at: At = None,
    argnums: int = 0,
) -> Callable[..., Attribution]:
    """Scores each place by the output's mean under random masks that show it.

    For images and models of which only the output is known. Masks are coarse and
    smooth, so the picture is too. Scores are outputs: compare places, not signs (a
    constant model scores its constant everywhere), and explain a probability, by a
    callable target, for the paper's numbers. Conserves nothing. Costs `samples`
    forward passes and one more, and many are needed: read `standard_error`. Memory
    grows with `chunk` only. Averages in float32.

    Args:
      model: Maps one example to logits; any JAX function.
      samples: Masks.
      cells: Cells of a mask's coarse grid along the leading axes of the input;
        further axes (channels, features) share one mask. One number stands for two
        axes of an array that has them, or the only axis of a sequence of tokens. As
        many cells as places makes the places independent.
      probability: The chance that a cell is shown.
      baseline: What a hidden place shows: None for zeros, a number, an array shaped
        like the input, a function of it, or one of `xv.baselines`.
      chunk: How many masks are evaluated at once.
      at: A traced site or its name whose activation is explained in place of the
        input.
      argnums: Which positional argument is explained: one array.

    Returns:
      `explain(*args, target=None, key) -> Attribution`, whose scores are shaped like
      the explained input (one for each token where it is an integer array that the
      model looks up). The diagnostics are `standard_error`, shaped like the scores,
      and `evaluations`, forward passes.

    Raises:
      ValueError: If there is no key, the input is not one array of floats or tokens,
        or the baseline, target or an option does not fit.

    >>> import jax
    >>> explain = rise(lambda x: x, cells=2, samples=4096, chunk=64)
    >>> scores = explain(jnp.array([0.0, 1.0]), target=1, key=jax.random.key(0)).scores
    >>> scores.round(1).tolist()  # shown half of the time, and whenever it is shown
    [0.5, 1.0]

    Source: equations 5 and 6 of the paper. The coarse grid goes on beyond the edges,
    so that every place is shown equally often.
    """
    chunks.positive(samples, "samples")
    chunks.positive(chunk, "chunk")
    if not 0 < probability < 1:
        raise ValueError(f"`probability` is between 0 and 1, got {probability}")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        key = attribution.require_key(key, "rise")
        canvas = prepare("rise", model, args, argnums, target, at, baseline)
        wanted = canvas.sizes(cells, "cells")
        shape = canvas.shape[: len(wanted)]
        grid = tuple(map(min, wanted, shape))

        def sample(key: jax.Array) -> jax.Array:
            mask = _mask(key, shape, grid, probability)
            return canvas.value(mask) * mask / probability

        keys = jax.random.split(key, samples)
        mean, variance = chunks.moments(sample, keys, chunk)
        return Attribution(
            scores=canvas.scores(mean),
            output=canvas.output,
            diagnostics={
                "standard_error": canvas.scores(jnp.sqrt(variance / samples)),
                "evaluations": jnp.int32(samples + 1),
            },
        )

    return explain


def _mask(
    key: jax.Array, shape: Sequence[int], grid: Sequence[int], probability: float
) -> jax.Array:
    """A coarse random grid, shifted at random and interpolated linearly."""
    first, *shifts = jax.random.split(key, 1 + len(grid))
    knots = tuple(cells + 2 for cells in grid)
    mask = jax.random.bernoulli(first, probability, knots).astype(jnp.float32)
    for axis, (length, cells, own) in enumerate(zip(shape, grid, shifts, strict=True)):
        width = -(-length // cells)
        shift = jax.random.randint(own, (), 0, width)
        place = (jnp.arange(length) + shift).astype(jnp.float32) / width
        distance = jnp.abs(place[:, None] - jnp.arange(cells + 2.0)[None])
        share = jnp.maximum(1 - distance, 0)
        mask = jnp.moveaxis(jnp.tensordot(mask, share, axes=(axis, 1)), -1, axis)
    return mask
