"""Where a path starts, and what takes the place of what is taken away.

A baseline means "nothing is there", and that is a choice about the data: every
method that takes `baseline=` takes None (zeros), a number, an array, a function of
the input, or one of these.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax.attribution import Beginning, Question


def zeros() -> Callable[[Any], Any]:
    """Zeros, shaped like the input: black pixels, or embeddings at the origin.

    >>> zeros()(jnp.ones(3)).tolist()
    [0.0, 0.0, 0.0]
    """
    return lambda x: jax.tree.map(jnp.zeros_like, x)


def mean(axis: int | Sequence[int] | None = None) -> Callable[[Any], Any]:
    """The input's own mean, everywhere the same.

    Args:
      axis: Axes to average over; None for all. `(0, 1)` keeps the channels of an
        image `[height, width, channel]` apart, 0 the features of embeddings
        `[token, feature]`.

    >>> mean()(jnp.array([1.0, 3.0])).tolist()
    [2.0, 2.0]
    """

    def average(leaf: jax.Array) -> jax.Array:
        center = jnp.mean(leaf.astype(jnp.float32), axis=axis, keepdims=True)
        return jnp.broadcast_to(center, leaf.shape).astype(leaf.dtype)

    return lambda x: jax.tree.map(average, x)


def blur(sigma: float, axes: Sequence[int] = (0, 1)) -> Callable[[Any], Any]:
    """The input, blurred beyond recognition but as bright as before.

    Args:
      sigma: Width of the Gaussian, in pixels.
      axes: The axes to blur along; of an array with fewer axes, those it has.

    >>> blur(100.0)(jnp.array([0.0, 3.0, 0.0])).round(3).tolist()
    [1.0, 1.0, 1.0]
    """
    if not sigma >= 0:
        raise ValueError(f"`sigma` is a width in pixels, got {sigma}")

    def smeared(leaf: jax.Array) -> jax.Array:
        return diffuse(leaf, jnp.float32(sigma**2 / 2), axes)

    return lambda x: jax.tree.map(smeared, x)


def uniform(
    low: float = 0.0, high: float = 1.0, *, key: jax.Array
) -> Callable[[Any], Any]:
    """Uniform noise, the same for every input under one key.

    Args:
      low: Its smallest value.
      high: Its largest value.
      key: A PRNG key.
    """

    def draw(x: Any) -> Any:
        leaves, tree = jax.tree.flatten(x)
        keys = jax.random.split(key, len(leaves))
        drawn = [
            jax.random.uniform(each, leaf.shape, jnp.float32, low, high)
            for each, leaf in zip(keys, leaves, strict=True)
        ]
        cast = [new.astype(leaf.dtype) for new, leaf in zip(drawn, leaves, strict=True)]
        return jax.tree.unflatten(tree, cast)

    return draw


def tokens(fill: int, keep: Sequence[int] = ()) -> Beginning:
    """The embeddings of one token, a pad or mask token, at every position.

    Args:
      fill: The token's number.
      keep: Tokens that stay where they are, such as those that begin and end a
        sequence.

    Raises:
      ValueError: When it is used, if the explained input is not made of tokens.
    """

    def of(question: Question) -> Any:
        if question.tokens is None:
            raise ValueError(
                "`baselines.tokens` is for integer inputs, explained at their "
                "embeddings; this input is made of floats"
            )
        given = question.tokens
        kept = jnp.zeros(given.shape, bool)
        for each in keep:
            kept |= given == each
        return jnp.where(kept, given, jnp.asarray(fill, given.dtype))

    return Beginning(of)


def embedding(vector: Any) -> Callable[[Any], Any]:
    """One vector at every position, such as the mean of an embedding table.

    Args:
      vector: float `[feature]`.

    >>> embedding(jnp.array([1.0, 2.0]))(jnp.zeros((2, 2))).tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    """
    vector = jnp.asarray(vector)
    if vector.ndim != 1:
        raise ValueError(f"`vector` has one axis, of features, got {vector.shape}")

    def everywhere(leaf: jax.Array) -> jax.Array:
        if leaf.shape[-1:] != vector.shape:
            raise ValueError(
                f"`vector` has {len(vector)} features, but the input is {leaf.shape}"
            )
        many = vector.reshape((1,) * (leaf.ndim - 1) + vector.shape)
        return jnp.broadcast_to(many, leaf.shape).astype(leaf.dtype)

    return lambda x: jax.tree.map(everywhere, x)


def carried(baseline: Any = None) -> Beginning:
    """With `at`: the activation that a baseline of the model's input leads to.

    Args:
      baseline: Of the input: whatever a method without `at` takes.

    Raises:
      ValueError: When it is used, if there is no `at`.
    """

    def of(question: Question) -> Any:
        if question.carry is None:
            raise ValueError("`baselines.carried` is for methods with `at`")
        return question.carry(baseline)

    return Beginning(of)


def diffuse(x: jax.Array, time: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Solves the heat equation on a grid: a Gaussian blur of variance `2 * time`.

    The blur has no edges (what flows out is reflected), keeps the mean, is exact at
    time zero, and blurring twice is blurring for the sum of times. In the cosine
    basis it multiplies frequency k of n by exp(-4 time sin²(pi k / 2n)).

    Args:
      x: float array.
      time: float32 scalar, at least 0; may be traced.
      axes: Axes to blur along; those beyond the array's are left out.

    Source: Lindeberg, 1990, Scale-space for discrete signals.
    """
    smooth = x.astype(jnp.float32)
    for axis in axes:
        if axis >= x.ndim or x.shape[axis] == 1:
            continue
        length = x.shape[axis]
        place = (np.arange(length) + 0.5) * np.pi / length
        basis = np.cos(np.arange(length)[:, None] * place) * np.sqrt(2 / length)
        basis[0] /= np.sqrt(2)
        rate = 4 * np.sin(np.arange(length) * np.pi / (2 * length)) ** 2
        waves = jnp.asarray(basis, jnp.float32)
        fade = jnp.exp(-time * jnp.asarray(rate, jnp.float32))
        matrix = jnp.einsum("ki,k,kj->ij", waves, fade, waves, precision="highest")
        moved = jnp.moveaxis(smooth, axis, -1)
        moved = jnp.matmul(moved, matrix, precision="highest")
        smooth = jnp.moveaxis(moved, -1, axis)
    return smooth.astype(x.dtype)
