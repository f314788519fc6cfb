"""What takes the place of features that are taken away.

A metric that takes features away can say only what the model makes of what is put
there instead. Every such metric takes `imputer=`, one of these.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, baselines

# The neighbours of a pixel and their weights, of the paper.
_STEPS = [(1, 0, 1 / 6), (0, 1, 1 / 6), (1, 1, 1 / 12), (1, -1, 1 / 12)]
_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Imputer:
    """Computes a model's logits with part of its input absent.

    Attributes:
      name: What it is called in a table.
      random: Whether it needs a key.
      prepare: `prepare(model, args, number)` returns `logits(present, key)`, for the
        model's positional arguments, of which `number` is the explained one. `present`
        is bool and shaped like that argument (tokens: one for each); where all is
        present, the logits are the model's own.
    """

    name: str
    random: bool
    prepare: Callable[[Callable, Sequence[Any], int], Callable[[Any, Any], jax.Array]]


def custom(
    function: Callable[[Any, Any, Any], Any], *, name: str, random: bool = False
) -> Imputer:
    """An imputer from a function of the explained argument.

    Args:
      function: `function(x, present, key) -> x'`, where `x` and `x'` are the model's
        own argument (tokens too) and `present` is bool, shaped like it. The key is
        None unless `random`.
      name: What it is called in a table.
      random: Whether it needs a key.
    """

    def prepare(model: Callable, args: Sequence[Any], number: int) -> Callable:
        def logits(present: Any, key: Any) -> jax.Array:
            filled = list(args)
            filled[number] = function(args[number], present, key)
            return model(*filled)

        return logits

    return Imputer(name, random, prepare)


def baseline(value: Any = None, *, name: str = "baseline") -> Imputer:
    """A baseline shows through; the imputer of most path methods.

    Of tokens it is the embeddings that are replaced.

    Args:
      value: None for zeros, a number, an array shaped like the input, a function of
        it, or one of `xv.baselines`.
      name: What it is called in a table.
    """

    def prepare(model: Callable, args: Sequence[Any], number: int) -> Callable:
        question = attribution.ask(model, args, number)
        begin = attribution.start(value, question)

        def logits(present: Any, key: Any) -> jax.Array:
            del key
            if question.tokens is not None:
                # A token's embeddings, in whichever tables, go together.
                present = jax.tree.map(lambda _: present, question.x)
            return question.model(jax.tree.map(_choose, present, question.x, begin))

        return logits

    return Imputer(name, False, prepare)


def mean(axis: int | Sequence[int] | None = None) -> Imputer:
    """The input's own mean; `axis` is that of `xv.baselines.mean`."""
    return baseline(baselines.mean(axis), name="mean")


def blur(sigma: float, axes: Sequence[int] = (0, 1)) -> Imputer:
    """The input out of focus; the options are those of `xv.baselines.blur`."""
    return baseline(baselines.blur(sigma, axes), name="blur")


def mask_token(token: int) -> Imputer:
    """One token, such as `[MASK]` or padding, in place of absent tokens.

    Args:
      token: Its number.
    """

    def function(x: Any, present: Any, key: Any) -> jax.Array:
        del key
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"`mask_token` replaces tokens, but the input is {x.dtype}"
            )
        return jnp.where(present, x, jnp.asarray(token, x.dtype))

    return custom(function, name="mask_token")


def drop(mask_argnum: int) -> Imputer:
    """Nothing: absent positions are cleared in the model's own attention mask.

    Args:
      mask_argnum: The model's positional argument that is the mask, `[length]`,
        nonzero or true where a position may be seen.
    """

    def prepare(model: Callable, args: Sequence[Any], number: int) -> Callable:
        if not -len(args) <= mask_argnum < len(args):
            raise ValueError(
                f"`mask_argnum` is {mask_argnum}, but the model has {len(args)} "
                "positional arguments"
            )
        mask = jnp.asarray(args[mask_argnum])
        shape = jnp.shape(args[number])
        if mask.ndim != 1 or mask.shape != shape[:1]:
            raise ValueError(
                f"the mask has shape {mask.shape}, but the input has shape {shape}"
            )

        def logits(present: Any, key: Any) -> jax.Array:
            del key
            # A position goes when all of it is absent.
            seen = jnp.any(present.reshape(len(mask), -1), axis=1)
            filled = list(args)
            filled[mask_argnum] = jnp.where(seen, mask, jnp.zeros_like(mask))
            return model(*filled)

        return logits

    return Imputer("drop", False, prepare)


def noisy_linear(noise: float = 0.01, axes: Sequence[int] = (0, 1)) -> Imputer:
    """Each absent pixel becomes the mean of its eight neighbours, and a little noise.

    Direct neighbours weigh twice as much as diagonal ones. Absent neighbours are
    unknowns of the same equations, which conjugate gradients solve, so that no trace
    of the shape of what was taken away is left but its blur. Of an image with nothing
    present, the mean of each channel is left.

    Args:
      noise: Standard deviation of the normal noise, in units of the input.
      axes: The two axes of the grid.

    Source: Rong et al., 2022, arXiv 2202.00449.
    """
    if len(axes) != 2:
        raise ValueError(f"`axes` are the two of a grid, got {tuple(axes)}")
    if not noise >= 0:
        raise ValueError(f"`noise` is a standard deviation, got {noise}")

    def function(x: Any, present: Any, key: Any) -> jax.Array:
        image = jnp.asarray(x)
        if image.ndim < 2 or not jnp.issubdtype(image.dtype, jnp.floating):
            raise ValueError(
                "`noisy_linear` is for one image of floats, got "
                f"{image.dtype}{list(image.shape)}"
            )
        image = jnp.moveaxis(image.astype(jnp.float32), axes, (0, 1))
        known = jnp.moveaxis(present, axes, (0, 1))
        # About its mean, where nothing is known the right side is exactly zero.
        center = jnp.mean(image, axis=(0, 1), keepdims=True)
        center = jnp.broadcast_to(center, image.shape)
        filled = center + interpolated(image - center, known)
        filled = filled + noise * jax.random.normal(key, image.shape)
        filled = jnp.where(known, image, filled)
        return jnp.moveaxis(filled, (0, 1), axes).astype(jnp.asarray(x).dtype)

    return custom(function, name="noisy_linear", random=True)


def interpolated(image: jax.Array, known: jax.Array) -> jax.Array:
    """Solves for unknown pixels that are the weighted mean of their neighbours.

    Args:
      image: float32 `[height, width, ...]`; further axes are solved apart.
      known: bool, of the same shape.

    Returns:
      The image with unknown pixels solved for; 0 where none is known.
    """
    weight = _neighbours(jnp.ones_like(image))

    def apply(unknown: jax.Array) -> jax.Array:
        inside = jnp.where(known, 0, unknown)
        return jnp.where(known, unknown, weight * inside - _neighbours(inside))

    right = jnp.where(known, 0, _neighbours(jnp.where(known, image, 0)))
    solved, _ = jax.scipy.sparse.linalg.cg(apply, right, tol=_TOLERANCE)
    return jnp.where(known, image, solved)


def _neighbours(image: jax.Array) -> jax.Array:
    """The weighted sum of each pixel's neighbours, of those that it has."""
    height, width = image.shape[:2]
    padded = jnp.pad(image, [(1, 1), (1, 1)] + [(0, 0)] * (image.ndim - 2))
    total = jnp.zeros_like(image)
    for down, right, weight in _STEPS:
        for sign in (1, -1):
            top, left = 1 + sign * down, 1 + sign * right
            total += weight * padded[top : top + height, left : left + width]
    return total


def _choose(present: Any, x: jax.Array, other: jax.Array) -> jax.Array:
    kept = jnp.asarray(present)
    kept = kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim))
    return jnp.where(jnp.broadcast_to(kept, x.shape), x, other)


def check(imputer: Any) -> Imputer:
    """Returns the imputer that an option means; None is a baseline of zeros.

    Raises:
      ValueError: If it is none.
    """
    if imputer is None:
        return baseline()
    if not isinstance(imputer, Imputer):
        raise ValueError(
            "`imputer` is one of `xv.metrics.imputers`, such as "
            f"`imputers.baseline(0.0)`, got {imputer!r}"
        )
    return imputer
