"""Guided integrated gradients (Kapishnikov et al., 2021, arXiv 2106.09788)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from xviz_jax import attribution, chunks
from xviz_jax.attribution import At, Attribution, Target

# The relative gap below which the path counts as resolved.
_TOLERANCE = 0.01


def guided_integrated_gradients(
    model: Callable,
    *,
    baseline: Any = None,
    steps: int = 200,
    fraction: float = 0.25,
    distance: float = 0.02,
    at: At = None,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Integrates gradients along a path that puts off where they are large.

    For images whose straight path crosses regions of large, meaningless gradients:
    at each step the elements with the smallest gradients move first, so less noise
    is gathered. The path depends on the model and on the target, which costs the
    symmetry and linearity of integrated gradients; scores still add up to the change
    of the output, up to the `completeness_gap`. Signed. Costs `steps` forward and
    backward passes, one after the other (`jax.vmap` over examples fills the machine),
    and two forward passes; memory does not grow with `steps`. Sums in float32.

    Args:
      model: Maps one example to logits; any JAX function.
      baseline: Where the path starts: None for zeros, a number, an array shaped like
        the input, a function of it, or one of `xv.baselines`.
      steps: Gradients on the path.
      fraction: The share of elements, those with the smallest gradients, that moves
        at once.
      distance: How far an element may run ahead of or lag behind the straight path,
        from 0 (which is the straight path) to 1 (free).
      at: A traced site (or its name, or several) whose activation is explained in
        place of the input.
      argnums: Which positional arguments are explained, as in `jax.grad`.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, whose scores are
      shaped like the explained input (one for each token where it is an integer
      array that the model looks up), and whose diagnostics are `completeness_gap`,
      `absolute_gap`, `baseline_output`, `evaluations`, and `converged`: whether the
      relative gap is below 1%.

    Raises:
      ValueError: If the input is not made of floats, or the baseline, target or an
        option does not fit.

    >>> explain = guided_integrated_gradients(lambda x: x * jnp.array([1.0, 2.0]))
    >>> explain(jnp.array([3.0, 4.0]), target=1).scores.round(3).tolist()
    [0.0, 8.0]

    Source: algorithm 1 of the paper, with each element's place given as the share
    of its way that it has gone.
    """
    chunks.positive(steps, "steps")
    for name, value in (("fraction", fraction), ("distance", distance)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` is a share from 0 to 1, got {value}")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        question = attribution.ask(model, args, argnums, at)
        begin = attribution.start(baseline, question)
        output, scalar = question.fix(target)
        way, unravel = ravel_pytree(
            jax.tree.map(
                lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32),
                question.x,
                begin,
            )
        )

        def gradient(gone: jax.Array) -> jax.Array:
            point = jax.tree.map(
                lambda a, d: (a.astype(jnp.float32) + d).astype(a.dtype),
                begin,
                unravel(gone * way),
            )
            slope = jax.grad(scalar)(point)
            return ravel_pytree(
                jax.tree.map(lambda leaf: leaf.astype(jnp.float32), slope)
            )[0]

        def step(state: tuple, number: jax.Array) -> tuple[tuple, None]:
            gone, scores = state
            slope = gradient(gone)
            reached = (number + 1) / steps
            further = _advance(
                gone, jnp.abs(way), jnp.abs(slope), reached, fraction, distance
            )
            return (further, scores + (further - gone) * way * slope), None

        # What has no way to go is there already.
        state = (jnp.where(way == 0, 1.0, 0.0), jnp.zeros_like(way))
        numbers = jnp.arange(steps, dtype=jnp.float32)
        (_, flat), _ = jax.lax.scan(step, state, numbers)
        scores = question.scores(unravel(flat))
        diagnostics = attribution.completeness(scores, output, scalar(begin))
        return Attribution(
            scores=scores,
            output=output,
            diagnostics={
                **diagnostics,
                "evaluations": jnp.int32(steps),
                "converged": diagnostics["completeness_gap"] < _TOLERANCE,
            },
        )

    return explain


def _advance(
    gone: jax.Array,
    length: jax.Array,
    slope: jax.Array,
    reached: jax.Array,
    fraction: float,
    distance: float,
) -> jax.Array:
    """Moves elements, those of the smallest slopes first, to the next distance.

    Args:
      gone: The share of its way each element has gone.
      length: Length of its way.
      slope: Size of its gradient.
      reached: The share of the whole way, in the L1 norm, that is to be gone.
      fraction: The share of elements that move at once.
      distance: How far an element may be from `reached`.
    """
    slowest = jnp.maximum(reached - distance, 0)
    fastest = jnp.minimum(reached + distance, 1)
    wanted = jnp.sum(length) * (1 - reached)
    rank = int(fraction * (len(gone) - 1))

    def left(gone: jax.Array) -> jax.Array:
        return jnp.sum(length * (1 - gone)) - wanted

    def going(state: tuple) -> jax.Array:
        return state[1]

    def move(state: tuple) -> tuple:
        gone, _ = state
        free = gone < fastest
        size = jnp.where(free, slope, jnp.inf)
        chosen = free & (size <= jnp.sort(size)[rank])
        room = jnp.sum(jnp.where(chosen, length * (fastest - gone), 0))
        share = left(gone) / jnp.where(room > 0, room, 1)
        partial = gone + share * (fastest - gone)
        further = jnp.where(chosen, jnp.where(share < 1, partial, fastest), gone)
        return further, (room > 0) & (share > 1)

    begin = jnp.maximum(gone, slowest)
    return jax.lax.while_loop(going, move, (begin, left(begin) > 0))[0]
