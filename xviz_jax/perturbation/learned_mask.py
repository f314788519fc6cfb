"""Learned masks: meaningful and extremal perturbations.

Meaningful perturbation is of Fong and Vedaldi, 2017 (arXiv 1704.03296), extremal
perturbation, which fixes the mask's area, of Fong et al., 2019 (arXiv 1910.08485).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import chunks
from xviz_jax.attribution import At, Attribution, Target
from xviz_jax.perturbation.canvas import prepare

_RATE = 0.1


def learned_mask(
    model: Callable,
    *,
    area: float | None = 0.1,
    keep: bool = True,
    cells: int | Sequence[int] = 7,
    sparsity: float = 0.1,
    smoothness: float = 0.01,
    weight: float = 30.0,
    steps: int = 200,
    optimizer: Any = None,
    baseline: Any = None,
    at: At = None,
    argnums: int = 0,
) -> Callable[..., Attribution]:
    """Learns a mask that keeps, or destroys, what the output rests on.

    What small part of the input is enough for the output (`keep`), or must go to
    lose it? A set of places rather than a score for each: those that only matter
    together are found together. Scores are the mask, from 0 to 1, larger where it
    matters; conserves nothing. Costs `steps` forward and backward passes, one after
    the other (`jax.vmap` over examples fills the machine), and three forward passes;
    memory does not grow with `steps`. The result depends on the optimizer.

    Args:
      model: Maps one example to logits; any JAX function.
      area: The share of places that the mask selects (extremal perturbation); None
        to let `sparsity` decide (meaningful perturbation).
      keep: Whether the selected places are kept, to raise the output, or taken away,
        to lower it.
      cells: The mask's resolution along the leading axes of the input, interpolated
        linearly; further axes (channels, features) share one mask. One number stands
        for two axes of an array that has them, or the only axis of a sequence of
        tokens; never more than there are places.
      sparsity: What a mask of ones costs, in units of the change of the output
        between baseline and input; without `area`.
      smoothness: What the mask's total variation costs, in the same units.
      weight: What missing the area costs at the end, in the same units; it grows
        from zero.
      steps: Steps of the optimizer.
      optimizer: From optax; by default Adam with a rate of 0.1.
      baseline: What shows where the input does not: None for zeros, a number, an
        array shaped like the input, a function of it, or one of `xv.baselines`
        (`blur` for images).
      at: A traced site or its name whose activation is explained in place of the
        input.
      argnums: Which positional argument is explained: one array.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, whose scores are shaped
      like the explained input (one for each token where it is an integer array that
      the model looks up). The diagnostics are `masked_output`, the explained scalar
      under the mask; `baseline_output`; `area`, the mask's mean; and `evaluations`,
      forward and backward passes.

    Raises:
      ValueError: If the input is not one array of floats or tokens, or the baseline,
        target or an option does not fit.

    >>> explain = learned_mask(lambda x: x[1:2], area=0.25, cells=4)
    >>> explain(jnp.ones(4)).scores.round(1).tolist()
    [0.0, 1.0, 0.0, 0.0]
    """
    chunks.positive(steps, "steps")
    if area is not None and not 0 < area < 1:
        raise ValueError(f"`area` is a share between 0 and 1, or None, got {area}")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        import optax

        canvas = prepare("learned_mask", model, args, argnums, target, at, baseline)
        wanted = canvas.sizes(cells, "cells")
        shape = canvas.shape[: len(wanted)]
        nothing = canvas.value(jnp.zeros(shape, bool))
        # Penalties are in units of what there is to win.
        unit = jnp.abs(canvas.output - nothing)
        unit = jnp.maximum(unit, jnp.finfo(jnp.float32).tiny)

        def masked(mask: jax.Array) -> jax.Array:
            fine = jax.image.resize(mask, shape, "linear")
            return canvas.value(fine if keep else 1 - fine)

        def loss(raw: jax.Array, grown: jax.Array) -> jax.Array:
            mask = jax.nn.sigmoid(raw)
            gain = masked(mask) / unit
            cost = smoothness * _variation(mask)
            if area is None:
                cost += sparsity * jnp.mean(mask)
            else:
                cost += grown * _area_error(mask, area)
            return cost - gain if keep else cost + gain

        chosen = optax.adam(_RATE) if optimizer is None else optimizer

        def step(state: tuple, number: jax.Array) -> tuple[tuple, None]:
            raw, memory = state
            # From zero, so that the model and not the sorting breaks the first ties.
            grown = weight * number / steps
            slope = jax.grad(loss)(raw, grown)
            # Optimizers mix integers and floats, which not every user allows.
            with jax.numpy_dtype_promotion("standard"):
                updates, memory = chosen.update(slope, memory, raw)
                return (optax.apply_updates(raw, updates), memory), None

        raw = jnp.zeros(tuple(map(min, wanted, shape)))
        numbers = jnp.arange(steps, dtype=jnp.float32)
        (raw, _), _ = jax.lax.scan(step, (raw, chosen.init(raw)), numbers)
        mask = jax.nn.sigmoid(jnp.asarray(raw))
        fine = jax.image.resize(mask, shape, "linear")
        return Attribution(
            scores=canvas.scores(fine),
            output=canvas.output,
            diagnostics={
                "masked_output": masked(mask),
                "baseline_output": nothing,
                "area": jnp.mean(fine),
                "evaluations": jnp.int32(steps),
            },
        )

    return explain


def _variation(mask: jax.Array) -> jax.Array:
    """Mean absolute difference between neighbours."""
    steps = [jnp.abs(jnp.diff(mask, axis=axis)) for axis in range(mask.ndim)]
    return sum((jnp.mean(step) for step in steps if step.size), jnp.float32(0))


def _area_error(mask: jax.Array, area: float) -> jax.Array:
    """Mean square distance of the sorted mask from a step of the wanted area."""
    order = jnp.sort(mask.ravel())
    ones = jnp.arange(len(order)) >= round((1 - area) * len(order))
    return jnp.mean((order - ones.astype(jnp.float32)) ** 2)
