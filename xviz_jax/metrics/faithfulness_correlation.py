"""Faithfulness correlation (Bhatt et al., 2020, arXiv 2005.00631)."""

from collections.abc import Callable
from typing import Any

from xviz_jax.metrics import imputers, subsets
from xviz_jax.metrics.features import Output
from xviz_jax.metrics.measurement import Metric


def faithfulness_correlation(
    model: Callable,
    *,
    fraction: float = 0.2,
    samples: int = 64,
    imputer: imputers.Imputer | None = None,
    groups: Any = None,
    output: Output = "logit",
    chunk: int = 8,
    argnums: int = 0,
) -> Metric:
    """Do scores of random sets add up to what the output loses without the set?

    The correlation of the two over sets of one size: `sensitivity_n` for one n. Costs
    `samples` forward passes and one more; memory grows with `chunk` only.

    Args:
      model: Maps one example to logits; any JAX function.
      fraction: Size of the sets, as a share of the features between 0 and 1; rounded to
        whole features, from one to all but one.
      samples: Sets.
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
      `fraction`, of features, after rounding, and `correlation`, both `[1]`.

    Raises:
      ValueError: If there is no key, there are fewer than two features, or an option,
        the scores, groups, target or input does not fit.

    >>> import jax, jax.numpy as jnp
    >>> measure = faithfulness_correlation(lambda x: jnp.sum(x)[None])
    >>> x = jnp.arange(8.0)
    >>> round(float(measure(x, -x, key=jax.random.key(0)).value), 4)
    -1.0
    """
    return subsets.correlation(
        "faithfulness_correlation",
        model,
        (fraction,),
        samples,
        imputer,
        groups,
        output,
        chunk,
        argnums,
    )
