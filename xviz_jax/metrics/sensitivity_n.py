"""Sensitivity-n (Ancona et al., 2018, arXiv 1711.06104)."""

from collections.abc import Callable, Sequence
from typing import Any

from xviz_jax.metrics import imputers, subsets
from xviz_jax.metrics.features import Output
from xviz_jax.metrics.measurement import Metric


def sensitivity_n(
    model: Callable,
    *,
    fractions: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.5, 0.8),
    samples: int = 32,
    imputer: imputers.Imputer | None = None,
    groups: Any = None,
    output: Output = "logit",
    chunk: int = 8,
    argnums: int = 0,
) -> Metric:
    """Do scores of random sets add up to what the output loses without the set?

    The correlation of the two over sets of one size, and its mean over sizes. 1 for
    the exact scores of an additive model. Costs `samples` forward passes for each
    size and one more; memory grows with `chunk` only.

    Args:
      model: Maps one example to logits; any JAX function.
      fractions: Sizes of sets, as shares of the features between 0 and 1; rounded to
        whole features, from one to all but one, and each size once.
      samples: Sets of each size.
      imputer: What takes the place of absent features, of `xv.metrics.imputers`; None
        for zeros (of tokens, their embeddings).
      groups: The number of the feature that each element belongs to, as for
        `deletion`. By default every element, or token, is a feature.
      output: What is measured of the logits: `logit`, the explained scalar itself;
        `probability`, that of the class; `margin`, its logit less the largest other.
      chunk: How many inputs are evaluated at once.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, higher is better, from -1 to 1, that needs a `key`. Its details are
      `fraction`, of features, after rounding, and `correlation`, both `[sizes]`.
      Undefined if it is at any size, which never stands for no correlation.

    Raises:
      ValueError: If there is no key, there are fewer than two features, or an option,
        the scores, groups, target or input does not fit.

    >>> import jax, jax.numpy as jnp
    >>> measure = sensitivity_n(lambda x: jnp.sum(x)[None])
    >>> x = jnp.arange(8.0)
    >>> round(float(measure(x, x, key=jax.random.key(0)).value), 4)
    1.0

    Source: the paper, whose plots are of `correlation` over n.
    """
    return subsets.correlation(
        "sensitivity_n",
        model,
        fractions,
        samples,
        imputer,
        groups,
        output,
        chunk,
        argnums,
    )
