"""Special tokens: kept, dropped or renormalised, in any method's scores of positions.

Class and separator tokens draw much of a model's attention and carry little of its
input (Clark et al., 2019, arXiv 1906.04341, section 3.2).
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from xviz_jax.attribution import Attribution, Target

Treatment = Literal["keep", "drop", "renormalise"]


def special_tokens(
    explain: Callable[..., Attribution],
    *,
    special: Any,
    treat: Treatment = "drop",
) -> Callable[..., Attribution]:
    """Keeps, drops or renormalises the scores of class, separator and padding tokens.

    For any method that has one score for each position. What is dropped is exactly
    zero; the others stay as they are, or share what was dropped in proportion. Costs
    nothing beside the explanation.

    Args:
      explain: What a method returns.
      special: Which positions are special: bool `[length]`, or a function of the
        explained arguments that returns it, such as `lambda ids: ids < 4`. For scores
        of several sequences, a dict of these by the same names.
      treat: `keep`, for comparison; `drop`; or `renormalise`, so that the sum of the
        scores stays what it was. Where nothing else has a score there is nothing to
        share, and all are zero. Signed scores may nearly cancel: drop those.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, as the method's own, and
      with the diagnostic `special_share`: the sum of the scores of special positions
      before they are dropped, of each row, or of each sequence in their order.

    Raises:
      ValueError: If `special` is not one bool for each position, or the method's
        scores are not of positions, or an option does not fit.

    >>> from xviz_jax.attention import raw_attention
    >>> model = lambda x: (jax.nn.softmax(x @ x.T) @ x)[0]
    >>> first = jnp.arange(4) == 0
    >>> explain = special_tokens(raw_attention(model), special=first)
    >>> explain(jnp.zeros((4, 2))).scores.tolist()
    [0.0, 0.25, 0.25, 0.25]
    """
    if treat not in get_args(Treatment):
        raise ValueError(
            f"`treat` is one of {list(get_args(Treatment))}, got {treat!r}"
        )

    def treated(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        found = explain(*args, target=target, key=key)
        marks: Any = special(*args) if callable(special) else special
        scores = found.scores
        several = isinstance(scores, dict)
        if several != isinstance(marks, dict) or (
            several and set(marks) != set(scores)
        ):
            wanted = f"a dict of {list(scores)}" if several else "one array"
            raise ValueError(f"`special` is {wanted} as the scores are, got {marks!r}")
        if not several:
            scores, share = _treated(scores, marks, treat, square=True)
        else:
            both = {
                name: _treated(scores[name], marks[name], treat, square=False)
                for name in scores
            }
            scores = {name: own for name, (own, _) in both.items()}
            share = jnp.stack([own for _, own in both.values()])
        return Attribution(
            scores=scores,
            output=found.output,
            diagnostics={**found.diagnostics, "special_share": share},
        )

    return treated


def _treated(
    scores: jax.Array, marks: Any, treat: Treatment, *, square: bool
) -> tuple[jax.Array, jax.Array]:
    marks = jnp.asarray(marks)
    length = scores.shape[-1] if scores.ndim else 0
    rows = scores.ndim == 2 and not (square and scores.shape[0] != length)
    if not (scores.ndim == 1 or rows):
        raise ValueError(
            "special tokens are those of scores [length], one for each position, got "
            f"scores of {list(scores.shape)}"
        )
    if marks.shape != (length,) or marks.dtype != bool:
        raise ValueError(
            f"`special` is bool[{length}], got {marks.dtype}{list(marks.shape)}"
        )
    marks = jnp.broadcast_to(marks, scores.shape)
    share = jnp.sum(jnp.where(marks, scores, 0), axis=-1)
    if treat == "keep":
        return scores, share
    left = jnp.where(marks, 0, scores)
    if treat == "renormalise":
        total = jnp.sum(left, axis=-1, keepdims=True)
        before = jnp.sum(scores, axis=-1, keepdims=True)
        left = left * (before / jnp.where(total == 0, 1, total))
    return left, share
