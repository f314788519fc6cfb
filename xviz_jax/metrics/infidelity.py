"""Infidelity (Yeh et al., 2019, arXiv 1901.09392)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attribution import Target
from xviz_jax.metrics import features, imputers, perturbations, subsets
from xviz_jax.metrics.features import (
    Features,
    Output,
    check_output,
    flattened,
    prepare,
)
from xviz_jax.metrics.measurement import Measurement, Metric, Reason, conclude
from xviz_jax.metrics.perturbations import Perturbation


def infidelity(
    model: Callable,
    *,
    perturbation: Perturbation | None = None,
    normalize: bool = True,
    samples: int = 64,
    imputer: imputers.Imputer | None = None,
    groups: Any = None,
    output: Output = "logit",
    chunk: int = 8,
    argnums: int = 0,
) -> Metric:
    """The mean square of what scores say the output loses, less what it does lose.

    By default random sets of features are taken away, of random sizes, and scores are
    what their features are worth, as for methods that add up to a change of the output
    (the paper's square removal, of any shape). With a perturbation I, taken from the
    input, scores are changes of the output per unit of the input, as gradients are, and
    are multiplied by I. In units of the output, squared. Costs `samples` forward passes
    and one more; memory grows with `chunk`, and with `samples` where they are moves.

    Args:
      model: Maps one example to logits; any JAX function.
      perturbation: None to take features away; the standard deviation of normal noise,
        in units of the input; or a function `(x, key) -> [samples, *x.shape]` of what
        is taken from the input, of as many samples as it likes.
      normalize: Whether scores are first multiplied by the one number, at least 0, that
        makes the mean square least, so that only their direction counts.
      samples: Sets, or draws of noise.
      imputer: What takes the place of absent features, of `xv.metrics.imputers`; None
        for zeros (of tokens, their embeddings).
      groups: The number of the feature that each element belongs to, as for
        `deletion`. By default every element, or token, is a feature.
      output: What is measured of the logits: `logit`, the explained scalar itself;
        `probability`, that of the class; `margin`, its logit less the largest other.
      chunk: How many inputs are evaluated at once.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, lower is better, that needs a `key`. Its details are `scaling`, the
      number that scores are multiplied by, and `unexplained`, the value as a share of
      the mean square loss: at most 1 with `normalize`.

    Raises:
      ValueError: If there is no key, or an option, the scores, groups, target or input
        does not fit.

    >>> measure = infidelity(lambda x: jnp.sum(x)[None])
    >>> x = jnp.array([1.0, 3.0])
    >>> round(float(measure(x, 2 * x, key=jax.random.key(0)).value), 4)
    0.0

    Source: definition 2.1 of the paper. The scaling is captum's, but where that is
    negative, so that the opposite of good scores is not good.
    """
    chunks.positive(samples, "samples")
    chunks.positive(chunk, "chunk")
    check_output(output)
    taken = imputers.check(imputer)
    if perturbation is not None and (imputer is not None or groups is not None):
        raise ValueError(
            "with a `perturbation` nothing is taken away: it takes neither `imputer` "
            "nor `groups`"
        )
    if perturbation is not None:
        perturbations.check("perturbation", perturbation)

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        given = (model, args, argnums, target)
        if perturbation is None:
            seen = prepare("infidelity", *given, groups, taken, output)
            row, sums, outputs = _without_sets(seen, samples, key, chunk)
        else:
            row, sums, outputs = _moved(
                *given, perturbation, samples, output, key, chunk
            )
        lost = outputs[0] - outputs[1:]
        size = scaling = jnp.float32(1)
        if normalize:
            # At the size of 1, squares neither overflow nor vanish.
            size = jnp.max(jnp.abs(row))
            sums = sums / size
            # Never below zero, which would take scores for their opposite.
            best = jnp.sum(sums * lost) / jnp.sum(sums * sums)
            scaling = jnp.maximum(best, 0)
        apart = jnp.mean((scaling * sums - lost) ** 2)
        checks = features.checks(row, outputs)
        if normalize:
            checks.append((Reason.ALL_ZERO, size == 0))
            checks.append((Reason.NO_VARIANCE, jnp.all(sums == 0)))
        return conclude(
            apart,
            checks,
            scaling=scaling / size,
            unexplained=apart / jnp.mean(lost**2),
        )

    return Metric("infidelity", "lower", frozenset({"key", "signed"}), measure)


def _without_sets(
    seen: Features, samples: int, key: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scores, what those of each set add up to, and outputs, the whole's first."""
    first, second, third = jax.random.split(key, 3)
    sizes = jax.random.randint(first, (samples,), 1, seen.count + 1)
    sets = subsets.drawn(second, seen.count, sizes)
    left = subsets.outputs(seen, sets, third, chunk)
    outputs = jnp.concatenate([seen.output[None], left])
    return seen.scores, subsets.sums(seen, sets), outputs


def _moved(
    model: Callable,
    args: Sequence[Any],
    argnums: int,
    target: Target,
    perturbation: Perturbation,
    samples: int,
    output: Output,
    key: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scores, their product with each move, and outputs, the whole's first."""
    given, number, scores = features.split("infidelity", args, argnums)
    x = given[number]
    moved = perturbations.moves(perturbation, x, samples, key, jax.random.normal)
    shapes = [jax.tree.map(jnp.shape, each) for each in (scores, x)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "with a `perturbation`, scores are shaped like the input, "
            f"{shapes[1]}; got {shapes[0]}"
        )
    logits = model(*given)
    read = features.reader(output, attribution.hold(target, logits), logits)
    row = flattened(scores)

    def one(move: Any) -> tuple[jax.Array, jax.Array]:
        filled = list(given)
        filled[number] = jax.tree.map(jnp.subtract, x, move)
        return jnp.sum(flattened(move) * row), read(model(*filled))

    sums, left = chunks.each(one, moved, chunk)
    return row, sums, jnp.concatenate([read(logits)[None], left])
