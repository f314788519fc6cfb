"""Sensitivity-max (Yeh et al., 2019, arXiv 1901.09392)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attribution import Attribution, Target
from xviz_jax.metrics import again, perturbations
from xviz_jax.metrics.features import flattened, split
from xviz_jax.metrics.measurement import Measurement, Metric, Reason, conclude
from xviz_jax.metrics.perturbations import Perturbation
from xviz_jax.noise import NoisyTokens


def sensitivity_max(
    model: Callable,
    *,
    explain: Callable[..., Attribution],
    radius: Perturbation = 0.02,
    relative: bool = False,
    samples: int = 10,
    chunk: int = 4,
    argnums: int = 0,
) -> Metric:
    """How far scores move, at most, when the input moves a little; relative to them.

    The norm of the change of the scores over their own. Constant scores are perfectly
    stable, so it says nothing by itself. Moves are uniform in the box of that radius;
    of tokens it is their embeddings that move, by normal noise of that standard
    deviation. Costs `samples` explanations and a forward pass; memory grows with
    `chunk`.

    Args:
      model: Maps one example to logits; any JAX function.
      explain: What the method that made the attribution returned. The target is held
        at the clean input. A random method gets the metric's key, so that its own noise
        counts too.
      radius: In units of the input; or a function `(x, key) -> [samples, *x.shape]` of
        moves, of as many samples as it likes.
      relative: Whether the radius is a share of the root mean square of the input, or
        of the embeddings, whose scale means nothing by itself.
      samples: Moves.
      chunk: How many inputs are explained at once.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, lower is better, that needs a `key`. Its detail is `change`, of each
      sample, `[samples]`. Undefined where all scores are zero.

    Raises:
      ValueError: If there is no key, scores of the two explanations differ in shape, or
        an option, the target or the input does not fit.

    >>> from xviz_jax.gradients import saliency
    >>> square = lambda x: x**2
    >>> explain, x = saliency(square), jnp.array([1.0])
    >>> measure = sensitivity_max(
    ...     square, explain=explain, radius=lambda x, key: jnp.array([[0.1]])
    ... )
    >>> round(float(measure(x, explain(x), key=jax.random.key(0)).value), 4)
    0.1

    Source: definition 3.1 of the paper, with its code's division by the norm.
    """
    chunks.positive(samples, "samples")
    chunks.positive(chunk, "chunk")
    again.check("sensitivity_max", explain)
    perturbations.check("radius", radius)
    if relative and callable(radius):
        raise ValueError("`relative` is for a radius that is a number")

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        given, number, scores = split("sensitivity_max", args, argnums)
        held = attribution.hold(target, model(*given))
        row = flattened(scores)
        size = jnp.max(jnp.abs(row))
        first, second = jax.random.split(key)

        def change(other: Any) -> jax.Array:
            filled = list(given)
            filled[number] = other
            found = _explained(explain, filled, held, second, scores)
            return jnp.linalg.norm((found - row) / size)

        others = _others(given[number], radius, relative, samples, first)
        moved = chunks.each(change, others, chunk) / jnp.linalg.norm(row / size)
        # Without a size, every change is 0 / 0, and not finite either.
        checks = [(Reason.ALL_ZERO, size == 0), again.finite(row, moved)]
        return conclude(jnp.max(moved), checks, change=moved)

    return Metric("sensitivity_max", "lower", frozenset({"key", "explain"}), measure)


def _explained(
    explain: Callable, args: list[Any], held: Any, key: jax.Array, scores: Any
) -> jax.Array:
    try:
        return again.scores(explain, args, held, key, scores)
    except (AttributeError, IndexError, TypeError) as error:
        if not any(isinstance(each, NoisyTokens) for each in args):
            raise
        raise ValueError(
            "`sensitivity_max` moves the embeddings of tokens, and this method is not "
            "explained at embeddings"
        ) from error


def _others(
    x: Any, radius: Perturbation, relative: bool, samples: int, key: jax.Array
) -> Any:
    """The moved inputs, with a leading axis of samples."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(x)]
    tokens = len(leaves) == 1 and jnp.issubdtype(leaves[0].dtype, jnp.integer)
    if tokens and not callable(radius):
        width = (lambda vectors: radius * _size(vectors)) if relative else radius
        keys = jax.random.split(key, samples)
        many = jnp.broadcast_to(leaves[0], (samples, *leaves[0].shape))
        return NoisyTokens(many, keys, width)
    draw = lambda own, shape: jax.random.uniform(own, shape, minval=-1, maxval=1)
    moves = perturbations.moves(radius, x, samples, key, draw)
    scale = _size(x) if relative else jnp.float32(1)

    def add(leaf: jax.Array, by: jax.Array) -> jax.Array:
        return (leaf + scale * by.astype(jnp.float32)).astype(jnp.asarray(leaf).dtype)

    return jax.vmap(lambda by: jax.tree.map(add, x, by))(moves)


def _size(x: Any) -> jax.Array:
    """The root mean square of all elements."""
    return jnp.sqrt(jnp.mean(flattened(x) ** 2))
