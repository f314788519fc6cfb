"""Leave one out (Li et al., 2016, arXiv 1612.08220): one position at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import attribution, chunks
from xviz_jax.attribution import Attribution, Target
from xviz_jax.perturbation.features import play


def leave_one_out(
    model: Callable,
    *,
    mask_argnum: int | None = None,
    baseline: Any = None,
    chunk: int = 8,
    argnums: int = 0,
) -> Callable[..., Attribution]:
    """Attributes to each position of a sequence what the output loses without it.

    For texts and other sequences: each token, or row of features, is left out in
    turn. With `mask_argnum` it is left out indeed, by clearing its entry of the
    model's own attention mask; otherwise a baseline takes its place, which the model
    can see. Signed. Adds up to the change of the output for additive models only.
    Costs one forward pass for each position and one more; memory grows with `chunk`
    only.

    Args:
      model: Maps one example to logits; any JAX function.
      mask_argnum: The positional argument that is the mask, `[length]`, nonzero or
        true where a position may be seen. Positions that are masked already score
        zero.
      baseline: What takes a position's place, without a mask: None for zeros, a
        number, an array shaped like the input, a function of it, or one of
        `xv.baselines`; `tokens(pad)` for instance.
      chunk: How many inputs are evaluated at once.
      argnums: Which positional argument is the sequence: tokens `[length]`, or
        floats `[length, ...]`.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for each
      position. The diagnostic `evaluations` counts forward passes.

    Raises:
      ValueError: If the input is not one sequence, or the mask, baseline, target or
        chunk does not fit.

    >>> explain = leave_one_out(lambda x: jnp.sum(x, axis=0))
    >>> explain(jnp.array([[1.0, 2.0], [3.0, 4.0]]), target=1).scores.tolist()
    [2.0, 4.0]
    """
    chunks.positive(chunk, "chunk")
    if mask_argnum is not None and baseline is not None:
        raise ValueError("`mask_argnum` leaves positions out: it takes no `baseline`")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        question = attribution.ask(model, args, argnums)
        x = question.x if question.tokens is None else question.tokens
        if not hasattr(x, "ndim") or x.ndim < 1:
            raise ValueError("`leave_one_out` takes one sequence `[length, ...]`")
        length = x.shape[0]
        if mask_argnum is None:
            rows = np.arange(length, dtype=np.int32)
            rows = np.broadcast_to(rows.reshape(-1, *(1,) * (x.ndim - 1)), x.shape)
            game = play(model, args, argnums, target, None, rows, baseline)
            output = game.output
            value = lambda place: game.value(jnp.arange(length) != place)
        else:
            output, value = _masking(model, args, target, mask_argnum, length)
        left = chunks.each(value, jnp.arange(length), chunk)
        return Attribution(
            scores=output - left,
            output=output,
            diagnostics={"evaluations": jnp.int32(length + 1)},
        )

    return explain


def _masking(
    model: Callable, args: Sequence[Any], target: Target, number: int, length: int
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    if not -len(args) <= number < len(args):
        raise ValueError(
            f"`mask_argnum` is {number}, but {len(args)} positional arguments came"
        )
    mask = jnp.asarray(args[number])
    if mask.shape != (length,):
        raise ValueError(
            f"the mask has shape {mask.shape}, but the sequence has length {length}"
        )
    logits = model(*args)
    held = attribution.hold(target, logits)

    def value(place: jax.Array) -> jax.Array:
        filled = list(args)
        filled[number] = jnp.where(
            jnp.arange(length) == place, jnp.zeros_like(mask), mask
        )
        return attribution.explained(held, model(*filled))

    return attribution.explained(held, logits), value
