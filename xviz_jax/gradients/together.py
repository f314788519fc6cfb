"""Many explanations of one input in one pass."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from xviz_jax.attribution import Attribution, Target
from xviz_jax.gradients.sharing import shared


def together(
    *explains: Callable[..., Attribution],
) -> Callable[..., tuple[Attribution, ...]]:
    """Explains an input in several ways, computing what they have in common once.

    All are traced into one program, and equal operations in it are emitted once:
    the forward pass behind saliency, input times gradient and attention rollout,
    the gradient behind the first two, the end points of paths, the path itself
    where two methods walk the same one. The same operations on the same values
    as in separate runs, so compiled results equal theirs bit for bit wherever XLA
    fuses both alike. On CPU one exception was found: with JAX 0.10.0, the `output`
    of a method that by itself is forward passes only (a rollout, Shapley values),
    and the gaps made of it, may differ in the last bits. Not for taking gradients of
    its own results.

    What is inside a loop is compared whole: of a model that scans over its layers,
    equal forward passes are shared, but not a forward pass with a gradient's.

    Args:
      *explains: What methods return; of the same model, for anything to be shared.

    Returns:
      `explain(*args, target=None, key=None)`, which returns one `Attribution` for
      each, in order. Random methods are given the same key.

    Raises:
      ValueError: If there is none; as the methods do.

    >>> import jax.numpy as jnp
    >>> from xviz_jax.gradients import input_x_gradient, saliency
    >>> model = lambda x: jnp.array([1.0, 2.0]) * x
    >>> both = together(saliency(model), input_x_gradient(model))
    >>> [each.scores.tolist() for each in both(jnp.array([3.0, 4.0]), target=1)]
    [[0.0, 2.0], [0.0, 8.0]]
    """
    if not explains:
        raise ValueError("`together` takes at least one explainer")

    def explain(
        *args: Any, target: Target = None, key: Any = None
    ) -> tuple[Attribution, ...]:
        leaves, tree = jax.tree.flatten((args, target, key))
        arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

        def everything(*values: jax.Array) -> tuple[Attribution, ...]:
            filled = list(leaves)
            for index, value in zip(arrays, values, strict=True):
                filled[index] = value
            args, target, key = jax.tree.unflatten(tree, filled)
            return tuple(each(*args, target=target, key=key) for each in explains)

        return shared(everything)(*[leaves[index] for index in arrays])

    return explain


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)
