"""Comprehensiveness (DeYoung et al., 2020, arXiv 1911.03429)."""

from collections.abc import Callable, Sequence
from typing import Any

from xviz_jax.metrics import imputers, rationale
from xviz_jax.metrics.features import Output
from xviz_jax.metrics.measurement import Metric


def comprehensiveness(
    model: Callable,
    *,
    fractions: Sequence[float] = rationale.FRACTIONS,
    imputer: imputers.Imputer | None = None,
    groups: Any = None,
    output: Output = "probability",
    chunk: int = 8,
    argnums: int = 0,
) -> Metric:
    """The output's mean drop when the highest scores are taken away.

    Is all that matters among them? Costs one forward pass for each fraction and two
    more.

    Args:
      model: Maps one example to logits; any JAX function.
      fractions: Of the features, from above 0 to 1, rounded to whole features and at
        least one. The paper's average also counts a fraction of 0, whose drop is 0;
        this one does not.
      imputer: What takes the place of absent features, of `xv.metrics.imputers`; None
        for zeros (of tokens, their embeddings). The paper deletes tokens: `drop`.
      groups: The number of the feature that each element belongs to, as for
        `deletion`. By default every element, or token, is a feature.
      output: What is measured of the logits: `probability`, that of the class, as in
        the paper; `margin`, its logit less the largest other one, which does not
        saturate; `logit`, the explained scalar itself, for any target.
      chunk: How many inputs are evaluated at once.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, higher is better. Its details are `fraction`, of features, after
      rounding, and `drop`, both `[fractions]`.

    Raises:
      ValueError: If an option, the scores, groups, target or input does not fit.

    >>> import jax.numpy as jnp
    >>> total = lambda x: jnp.sum(x)[None]
    >>> measure = comprehensiveness(total, fractions=(0.5,), output="logit")
    >>> x = jnp.array([1.0, 3.0])
    >>> float(measure(x, x).value)
    3.0

    Source: the paper, whose AOPC the average over fractions is.
    """
    return rationale.average_drop(
        "comprehensiveness",
        model,
        False,
        fractions,
        imputer,
        groups,
        output,
        chunk,
        argnums,
    )
