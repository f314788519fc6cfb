"""What is taken away together, and the game of taking it away.

A feature is a set of input elements that are present or absent together: one
element, one token, one patch of an image. A coalition of present features has a
value, the explained scalar of the input whose other elements come from a baseline.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import attribution
from xviz_jax.attribution import At, Target
from xviz_jax.tracing import compat


@dataclasses.dataclass(frozen=True)
class Game:
    """An input as features that can be taken away.

    Attributes:
      count: How many features there are.
      output: The explained scalar at the input, float32.
      value: Maps presence, bool `[count]`, to the explained scalar.
      scores: Spreads values `[count]` over what they are values of: every element of
        a feature gets the feature's value.
    """

    count: int
    output: jax.Array
    value: Callable[[jax.Array], jax.Array]
    scores: Callable[[jax.Array], Any]

    @property
    def absent(self) -> jax.Array:
        """The explained scalar with no feature present."""
        return self.value(jnp.zeros(self.count, bool))


def play(
    model: Callable,
    args: Sequence[Any],
    argnums: int | Sequence[int],
    target: Target,
    at: At,
    groups: Any,
    baseline: Any,
) -> Game:
    """Sets up the game of an input.

    Args:
      model: Maps one example to logits.
      args: Its positional arguments.
      argnums: Which of them are explained.
      target: What is explained.
      at: The site that is explained, in place of the argument.
      groups: The number of the feature that each element belongs to, integers from 0
        shaped like the input (for tokens, like the tokens); a function of the input
        that returns them; None for every element, or token, by itself.
      baseline: What takes the place of absent features.

    Raises:
      ValueError: If the groups do not fit; as `attribution.ask` and
        `attribution.start` do.
    """
    question = attribution.ask(model, args, argnums, at)
    begin = attribution.start(baseline, question)
    output, scalar = question.fix(target)
    shaped = question.x if question.tokens is None else question.tokens
    labels = labelled(shaped, groups)
    count = 1 + max(int(leaf.max()) for leaf in jax.tree.leaves(labels))
    inner = labels
    if question.tokens is not None:
        # A token's embeddings, in whichever tables, are taken away together.
        inner = jax.tree.map(lambda _: labels, question.x)

    def value(present: jax.Array) -> jax.Array:
        def choose(x: jax.Array, other: jax.Array, label: np.ndarray) -> jax.Array:
            kept = look_up(present, label)
            kept = kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim))
            return jnp.where(jnp.broadcast_to(kept, x.shape), x, other)

        return scalar(jax.tree.map(choose, question.x, begin, inner))

    def scores(values: jax.Array) -> Any:
        values = values.astype(jnp.float32)
        return jax.tree.map(lambda label: look_up(values, label), labels)

    return Game(count, output, value, scores)


def patches(shape: Sequence[int], size: int | Sequence[int]) -> np.ndarray:
    """Groups that cut an array into blocks; for `groups=`.

    Args:
      shape: The array's shape. Blocks span axes beyond those of `size` whole.
      size: A block's size along the leading axes; one number stands for two.

    Returns:
      int32 of the given shape.

    Raises:
      ValueError: If there are more sizes than axes.

    >>> patches((2, 4), 2).tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    sizes = (size,) * min(2, len(shape)) if isinstance(size, int) else tuple(size)
    if len(sizes) > len(shape) or min(sizes) < 1:
        raise ValueError(f"`size` is positive and at most {len(shape)}, got {size}")
    labels = np.zeros((1,) * len(shape), np.int32)
    for axis, each in enumerate(sizes):
        blocks = -(-shape[axis] // each)
        place = np.arange(shape[axis], dtype=np.int32) // each
        along = [1] * len(shape)
        along[axis] = shape[axis]
        labels = labels * blocks + place.reshape(along)
    return np.broadcast_to(labels, shape).copy()


def labelled(shaped: Any, groups: Any) -> Any:
    """The number of the feature that each element belongs to.

    Args:
      shaped: The input, or its tokens.
      groups: As for `play`.

    Returns:
      int32 numpy arrays, a pytree shaped like the input.

    Raises:
      ValueError: If the groups do not fit.
    """
    if callable(groups):
        groups = groups(shaped)
    leaves, tree = jax.tree.flatten(shaped)
    if groups is None:
        sizes = [math.prod(leaf.shape) for leaf in leaves]
        ends = np.cumsum([0, *sizes])
        own = [
            np.arange(first, first + size, dtype=np.int32).reshape(leaf.shape)
            for first, size, leaf in zip(ends[:-1], sizes, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, own)
    if jax.tree.structure(groups) != tree:
        raise ValueError(
            f"`groups` has the structure {jax.tree.structure(groups)}, but the input "
            f"has {tree}"
        )
    for label, leaf in zip(jax.tree.leaves(groups), leaves, strict=True):
        if isinstance(label, compat.Tracer):
            raise ValueError(
                "`groups` must be known when the program is made: pass a numpy array"
            )
        if not np.issubdtype(np.asarray(label).dtype, np.integer):
            raise ValueError(f"`groups` are integers, got {np.asarray(label).dtype}")
        if np.shape(label) != leaf.shape:
            raise ValueError(
                f"`groups` has shape {np.shape(label)}, but the input has {leaf.shape}"
            )
    labels = jax.tree.map(lambda label: np.asarray(label, np.int32), groups)
    found = np.unique(
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(labels)])
    )
    if found[0] != 0 or found[-1] != len(found) - 1:
        raise ValueError(
            f"`groups` are numbered from 0 without a gap, got {found.tolist()[:20]}"
        )
    return labels


def look_up(values: jax.Array, label: np.ndarray) -> jax.Array:
    """What each element's feature has, of values `[count]` of features."""
    first = int(label.flat[0])
    if np.array_equal(label.ravel(), np.arange(first, first + label.size)):
        return values[first : first + label.size].reshape(label.shape)
    return values[label]
