"""One method, many targets, one forward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attribution import Attribution, Target


def many_targets(
    explain: Callable[..., Attribution], targets: Sequence[Target] | None = None
) -> Callable[..., Attribution]:
    """Explains several outputs of one input.

    The forward pass does not depend on the target, so it is run and linearised
    once, and only the backward pass is batched over targets. Costs one forward pass
    and one backward pass for each target, wherever `explain` costs one of each; an
    adaptive method places its nodes for each target, and shares less.

    Args:
      explain: What a method returns.
      targets: Classes, pairs of classes or functions of the logits; None for every
        class.

    Returns:
      `explain(*args, key=None) -> Attribution`, each leaf of which has a leading
      axis of targets.

    Raises:
      ValueError: If there are no targets, or one does not fit.

    >>> from xviz_jax.gradients import saliency
    >>> model = lambda x: jnp.array([[1.0, -2.0], [0.0, 3.0]]) @ x
    >>> many_targets(saliency(model))(jnp.ones(2)).scores.tolist()
    [[1.0, 2.0], [0.0, 3.0]]
    """
    if targets is not None:
        targets = list(targets)
        if not targets or any(target is None for target in targets):
            raise ValueError(
                "`targets` are classes, pairs or functions of the logits (or None for "
                f"every class), got {targets}"
            )

    def explain_all(*args: Any, key: Any = None) -> Attribution:
        chosen = targets
        if chosen is None:
            chosen = range(_classes(explain, args, key))

        def values(logits: jax.Array) -> jax.Array:
            """What is explained, one value for each target."""
            if targets is None:
                return logits.astype(jnp.float32)
            held = [attribution.hold(target, logits) for target in targets]
            return jnp.stack([attribution.explained(each, logits) for each in held])

        def one(number: jax.Array) -> Attribution:
            def target(logits: jax.Array) -> jax.Array:
                return attribution.explained(number, values(logits))

            return explain(*args, target=target, key=key)

        return jax.vmap(one)(jnp.arange(len(chosen)))

    return explain_all


def _classes(explain: Callable, args: Sequence[Any], key: Any) -> int:
    shapes = []

    def look(logits: jax.Array) -> jax.Array:
        attribution.hold(0, logits)
        shapes.append(logits.shape)
        return logits[0]

    jax.eval_shape(lambda: explain(*args, target=look, key=key))
    return shapes[0][0]
