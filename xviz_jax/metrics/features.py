"""The features of an input, their scores, and what the model makes of parts of it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import attribution
from xviz_jax.attribution import Attribution, Target
from xviz_jax.metrics import imputers
from xviz_jax.metrics.measurement import Reason
from xviz_jax.perturbation.features import labelled, look_up

Output = Literal["logit", "probability", "margin"]
_OUTPUTS = ("logit", "probability", "margin")


@dataclasses.dataclass(frozen=True)
class Features:
    """An input as features with scores, any of which can be absent.

    Attributes:
      count: How many features there are.
      scores: float32 `[count]`.
      output: What is measured of the model, at the input.
      value: Maps presence, bool `[count]`, and a key to the same of what is present.
      random: Whether `value` needs a key.
    """

    count: int
    scores: jax.Array
    output: jax.Array
    value: Callable[[jax.Array, Any], jax.Array]
    random: bool

    def keys(self, key: Any, count: int) -> Any:
        """A key for each of several values, or None."""
        return jax.random.split(key, count) if self.random else None

    def checks(self, *values: jax.Array) -> list[tuple[Reason, jax.Array]]:
        """What makes every metric of these features undefined.

        Args:
          *values: All that was evaluated.
        """
        outputs = [self.output[None], *map(jnp.atleast_1d, values)]
        return checks(self.scores, jnp.concatenate(outputs))

    @property
    def equal(self) -> tuple[Reason, jax.Array]:
        """All scores are the same, so that they order nothing."""
        same = jnp.max(self.scores) == jnp.min(self.scores)
        return Reason.NO_VARIANCE, same


def checks(scores: jax.Array, outputs: jax.Array) -> list[tuple[Reason, jax.Array]]:
    """What makes a metric undefined that sets scores beside changes of the output.

    Args:
      scores: float32 `[count]`.
      outputs: All that was evaluated, float32 `[evaluations]`.
    """
    spread = jnp.max(outputs) - jnp.min(outputs)
    return [
        (Reason.SCORES_NOT_FINITE, ~jnp.all(jnp.isfinite(scores))),
        (Reason.OUTPUT_NOT_FINITE, ~jnp.all(jnp.isfinite(outputs))),
        (Reason.NO_CHANGE, spread <= rounding(outputs)),
    ]


def rounding(values: jax.Array) -> jax.Array:
    """A change below this may be rounding, float32."""
    return 16 * jnp.finfo(jnp.float32).eps * jnp.max(jnp.abs(values))


def prepare(
    name: str,
    model: Callable,
    args: Sequence[Any],
    argnums: int,
    target: Target,
    groups: Any,
    imputer: imputers.Imputer,
    output: Output,
) -> Features:
    """Sets up the features of an input.

    Args:
      name: The metric's.
      model: Maps one example to logits.
      args: The metric's arguments.
      argnums: Which of the model's is explained.
      target: What was explained.
      groups: The number of the feature that each element belongs to, as for
        `xv.feature_ablation`.
      imputer: What takes the place of absent features.
      output: What is measured of the logits.

    Raises:
      ValueError: If the arguments, scores, groups, target or imputer do not fit.
    """
    given, number, scores = split(name, args, argnums)
    labels = labelled(given[number], groups)
    count = 1 + max(int(leaf.max()) for leaf in jax.tree.leaves(labels))
    logits = model(*given)
    read = reader(output, attribution.hold(target, logits), logits)
    imputed = imputer.prepare(model, given, number)

    def value(present: jax.Array, key: Any) -> jax.Array:
        shown = jax.tree.map(lambda label: look_up(present, label), labels)
        return read(imputed(shown, key))

    return Features(
        count, by_feature(scores, labels, count), read(logits), value, imputer.random
    )


def split(
    name: str, args: Sequence[Any], argnums: int
) -> tuple[tuple[Any, ...], int, Any]:
    """The model's arguments, which of them is explained, and the scores.

    Raises:
      ValueError: If there are too few arguments.
    """
    count = len(args) - 1
    if not isinstance(argnums, int) or not -count <= argnums < count:
        raise ValueError(
            f"`{name}` takes the model's arguments with the attribution right after "
            f"argument {argnums!r}, one integer; got {len(args)} arguments"
        )
    number = argnums % count
    given = args[number + 1]
    scores = given.scores if isinstance(given, Attribution) else given
    return (*args[: number + 1], *args[number + 2 :]), number, scores


def by_feature(scores: Any, labels: Any, count: int) -> jax.Array:
    """One score for each feature.

    Args:
      scores: Shaped like the input, to be summed within features; or `[count]`, one
        for each feature already.
      labels: The feature of each element.
      count: How many features there are.

    Raises:
      ValueError: If the scores have any other shape.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(scores)]
    wanted = [label.shape for label in jax.tree.leaves(labels)]
    alike = jax.tree.structure(scores) == jax.tree.structure(labels)
    if alike and shapes == wanted:
        flat = flattened(scores)
        numbers = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(labels)])
        return _sums(flat, numbers, count)
    if shapes == [(count,)]:
        return flattened(scores)
    raise ValueError(
        f"the scores have the shapes {shapes}, but the input has {wanted} and "
        f"{count} features: give one score for each element, or `[{count}]` (by "
        "`scores.ravel()` for a grid); what belongs to no feature, like a class token, "
        "is cut off first, by `scores[1:]`"
    )


def _sums(flat: jax.Array, numbers: np.ndarray, count: int) -> jax.Array:
    """The sum of each feature's scores, in an order that no device changes."""
    if np.array_equal(numbers, np.arange(count)):
        return flat
    sizes = np.bincount(numbers, minlength=count)
    if count * sizes.max() > 16 * len(numbers):
        return jax.ops.segment_sum(flat, numbers, count)
    # A row for each feature, filled up to the largest one.
    place = np.arange(sizes.max())[None]
    own = place < sizes[:, None]
    first = (np.cumsum(sizes) - sizes)[:, None]
    where = np.argsort(numbers, kind="stable")[np.where(own, first + place, 0)]
    return jnp.sum(jnp.where(own, flat[where], 0), axis=1)


def flattened(scores: Any) -> jax.Array:
    """All scores in a row, float32.

    Raises:
      ValueError: If there are none, or they are not numbers.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(scores)]
    if not leaves or any(jnp.issubdtype(leaf.dtype, jnp.bool_) for leaf in leaves):
        raise ValueError(
            "an attribution, or its scores, is made of numbers; got "
            f"{[leaf.dtype for leaf in leaves] or scores!r}"
        )
    return jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in leaves])


def check_output(output: str) -> None:
    """Raises ValueError unless `output` is known."""
    if output not in _OUTPUTS:
        raise ValueError(f"`output` is one of {_OUTPUTS}, got {output!r}")


def reader(
    output: Output, held: Target, logits: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """Maps logits to what is measured of them.

    Args:
      output: `logit`, the explained scalar itself; `probability`, that of the class;
        `margin`, its logit less the largest other one.
      held: As `attribution.hold` returns it.
      logits: The model's output at the input.

    Raises:
      ValueError: If the target has no probability or margin.
    """
    if output == "logit":
        return lambda logits: attribution.explained(held, logits)
    if callable(held) or held is None or logits.ndim != 1:
        raise ValueError(
            f"`output={output!r}` is for a target that is a class; use "
            "`output='logit'` for any other"
        )
    if logits.shape[0] < 2:
        raise ValueError(f"`output={output!r}` takes at least 2 classes, got 1")
    if output == "probability":
        return lambda logits: attribution.explained(
            held, jax.nn.softmax(logits.astype(jnp.float32))
        )

    def margin(logits: jax.Array) -> jax.Array:
        own = attribution.explained(held, logits)
        if isinstance(held, tuple):
            return own
        classes = jnp.arange(logits.shape[0])
        others = jnp.where(classes == held, -jnp.inf, logits.astype(jnp.float32))
        return own - jnp.max(others)

    return margin


def grouped(name: str, args: Sequence[Any], argnums: int, groups: Any) -> jax.Array:
    """The scores in a row, float32, for a metric of nothing else.

    Args:
      name: The metric's.
      args: The metric's arguments.
      argnums: Which of the model's is explained.
      groups: As for `prepare`; None for all scores as they are, of any shape.

    Raises:
      ValueError: If the arguments, scores or groups do not fit.
    """
    given, number, scores = split(name, args, argnums)
    if groups is None:
        return flattened(scores)
    labels = labelled(given[number], groups)
    count = 1 + max(int(leaf.max()) for leaf in jax.tree.leaves(labels))
    return by_feature(scores, labels, count)


def pointed(
    name: str, args: Sequence[Any], argnums: int, groups: Any, mask: Any
) -> tuple[jax.Array, jax.Array]:
    """The scores in a row, and which of them are inside a mask.

    Args:
      name: The metric's.
      args: The metric's arguments.
      argnums: Which of the model's is explained.
      groups: As for `grouped`.
      mask: Nonzero inside. Shaped like the leading axes of the scores (with groups, of
        the input), or `[features]`. A feature is inside if at least half of it is.

    Raises:
      ValueError: If something does not fit.
    """
    row = grouped(name, args, argnums, groups)
    given, number, scores = split(name, args, argnums)
    whole = jnp.shape(scores if groups is None else given[number])
    mask = jnp.asarray(mask).astype(bool)
    if mask.shape == row.shape:
        return row, mask
    if mask.ndim == 0 or mask.shape != whole[: mask.ndim]:
        raise ValueError(
            f"the mask has shape {mask.shape}: it is shaped like the leading axes of "
            f"{whole}, or like the features, {row.shape}"
        )
    mask = mask.reshape(mask.shape + (1,) * (len(whole) - mask.ndim))
    mask = jnp.broadcast_to(mask, whole)
    if groups is None:
        return row, mask.ravel()
    labels = labelled(given[number], groups)
    inside = by_feature(mask.astype(jnp.float32), labels, len(row))
    size = np.bincount(labels.ravel(), minlength=len(row))
    return row, inside >= jnp.asarray(size / 2, jnp.float32)


def mask_checks(row: jax.Array, inside: jax.Array) -> list[tuple[Reason, jax.Array]]:
    """What makes every metric of a mask undefined."""
    return [
        (Reason.SCORES_NOT_FINITE, ~jnp.all(jnp.isfinite(row))),
        (Reason.MASK, jnp.all(inside) | ~jnp.any(inside)),
    ]
