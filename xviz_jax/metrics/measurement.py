"""What a metric is, what it returns, and why it may return nothing."""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from xviz_jax import attribution

# Why a measurement is not a number, at the place of its `reason`; 0 is none of these.
REASONS = (
    "the measurement is defined",
    "the scores are not all finite",
    "the model's output is not finite",
    "the model's output does not change",
    "the scores, or what is compared with them, do not vary",
    "the scores are all zero",
    "no score is positive",
    "the mask is empty, or covers every feature",
    "the result is beyond float32",
)

# What a metric may need beyond an input and an attribution.
NEEDS = frozenset(
    {"key", "mask", "explain", "parameters", "class_sensitive", "signed", "image"}
)


class Reason(enum.IntEnum):
    """The places in `REASONS`."""

    DEFINED = 0
    SCORES_NOT_FINITE = 1
    OUTPUT_NOT_FINITE = 2
    NO_CHANGE = 3
    NO_VARIANCE = 4
    ALL_ZERO = 5
    NONE_POSITIVE = 6
    MASK = 7
    OVERFLOW = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a metric says of one attribution of one example.

    Attributes:
      value: float32 scalar; not a number where the metric is undefined, never 0.
      reason: int32 scalar: 0, or the place in `REASONS` that says why it is undefined.
      details: Curves, fractions and the like, under the names in the metric's
        docstring.
    """

    value: jax.Array
    reason: jax.Array
    details: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of attributions, ready to measure; what `xv.metrics.deletion` returns.

    Pure and of one example, so that `jax.jit` and `jax.vmap` apply. No statistic
    crosses a batch.

    Attributes:
      name: As in `xv.metrics`.
      better: Whether a `higher` or `lower` value speaks for an attribution; None where
        it only describes it.
      needs: What it asks for, some of `NEEDS`:

        - `key`: the keyword `key`, since it draws at random;
        - `mask`: the keyword `mask`, which features the explanation should point at;
        - `explain`: it was made with the method itself, which it runs again;
        - `parameters`: the model's parameters as an argument, which it changes;
        - `class_sensitive`: a method that claims to explain one class and no other;
          said of a class-blind method, the value is no verdict;
        - `signed`: scores whose sign and size mean a change of the output, not only
          an order;
        - `image`: an input with two axes of a grid.
      measure: Does the work.
    """

    name: str
    better: Literal["higher", "lower"] | None
    needs: frozenset[str]
    measure: Callable[..., Measurement]

    def __call__(
        self, *args: Any, target: Any = None, key: Any = None, mask: Any = None
    ) -> Measurement:
        """Measures one attribution of one example.

        Args:
          *args: The model's arguments, with the attribution (an `Attribution`, or its
            scores) right after the explained one.
          target: What was explained, as for the method.
          key: A PRNG key, if the metric needs one.
          mask: Of the features, if the metric needs one.

        Raises:
          ValueError: If something that is needed is missing, or does not fit.
        """
        if "key" in self.needs:
            key = attribution.require_key(key, self.name)
        if ("mask" in self.needs) != (mask is not None):
            raise ValueError(
                f"`{self.name}` needs `mask=`, the features to point at"
                if mask is None
                else f"`{self.name}` takes no `mask`"
            )
        options = {} if mask is None else {"mask": mask}
        return self.measure(*args, target=target, key=key, **options)


def conclude(
    value: jax.Array,
    checks: Sequence[tuple[Reason, jax.Array]],
    **details: jax.Array,
) -> Measurement:
    """A measurement, undefined for the first reason that holds.

    Args:
      value: The value where none holds.
      checks: Reasons, each with whether it holds, the most basic first.
      **details: What else is to be known.
    """
    value = jnp.asarray(value).astype(jnp.float32)
    reason = jnp.where(jnp.isfinite(value), 0, int(Reason.OVERFLOW))
    for code, holds in reversed(checks):
        reason = jnp.where(holds, int(code), reason)
    defined = jnp.where(reason == 0, value, jnp.nan)
    return Measurement(value=defined, reason=reason.astype(jnp.int32), details=details)
