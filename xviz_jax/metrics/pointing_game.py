"""Pointing game (Zhang et al., 2016, arXiv 1608.00507)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from xviz_jax.attribution import Target
from xviz_jax.metrics.features import mask_checks, pointed
from xviz_jax.metrics.measurement import Measurement, Metric, Reason, conclude


def pointing_game(
    model: Callable | None = None,
    *,
    groups: Any = None,
    argnums: int = 0,
) -> Metric:
    """Whether the highest score lies inside a mask: 1 or 0.

    For inputs whose cause is known. Of several highest scores, the share inside. The
    paper also counts what lies up to 15 pixels outside; widen the mask for that. Costs
    next to nothing.

    Args:
      model: Not run; here so that all metrics have one form.
      groups: The number of the feature that each element belongs to, as for
        `deletion`. By default scores are taken as they are, whatever their shape.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, higher is better, called with `mask=`: nonzero inside, shaped like the
      leading axes of the scores (with groups, of the input), or `[features]`. A feature
      is inside if at least half of it is. Undefined where the mask is empty or covers
      everything, or all scores are equal.

    Raises:
      ValueError: If the scores, groups or mask do not fit, or there is no mask.

    >>> x = jnp.array([1.0, 3.0, 2.0])
    >>> float(pointing_game()(x, x, mask=jnp.array([0, 1, 1])).value)
    1.0

    """
    del model

    def measure(
        *args: Any, target: Target = None, key: Any = None, mask: Any
    ) -> Measurement:
        del target, key
        row, inside = pointed("pointing_game", args, argnums, groups, mask)
        highest = row == jnp.max(row)
        hit = jnp.sum(highest & inside) / jnp.sum(highest)
        equal = (Reason.NO_VARIANCE, jnp.all(highest))
        return conclude(hit, [*mask_checks(row, inside), equal])

    return Metric("pointing_game", "higher", frozenset({"mask"}), measure)
