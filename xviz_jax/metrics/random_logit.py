"""Random logit (Sixt et al., 2020, arXiv 1912.09818)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attribution import Attribution, Target
from xviz_jax.metrics import again
from xviz_jax.metrics.features import flattened, split
from xviz_jax.metrics.measurement import Measurement, Metric, Reason, conclude
from xviz_jax.metrics.similarity import Similarity, named


def random_logit(
    model: Callable,
    *,
    explain: Callable[..., Attribution],
    similarity: Similarity = "spearman",
    argnums: int = 0,
) -> Metric:
    """How alike the scores for the class are to those for another, drawn at random.

    What does not change with the class cannot say why this class. Raw attention and
    rollout are class-blind and give 1 by construction; for them the question, not the
    answer, is wrong. Costs an explanation and a forward pass.

    Args:
      model: Maps one example to logits; any JAX function.
      explain: What the method that made the attribution returned.
      similarity: `spearman`, of ranks, `pearson` or `cosine`.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, lower is better, from -1 to 1, that needs a `key`. Its detail is
      `other`, the other class, int32. Undefined where all scores for one are equal
      (`cosine`: zero).

    Raises:
      ValueError: If there is no key, the target is not a class of two or more, scores
        of the two explanations differ in shape, or an option does not fit.

    >>> from xviz_jax.gradients import saliency
    >>> model = lambda x: x * jnp.arange(1.0, 3.0)
    >>> explain, x = saliency(model), jnp.ones(2)
    >>> measure = random_logit(model, explain=explain)
    >>> float(measure(x, explain(x), key=jax.random.key(0)).value)
    -1.0
    """
    again.check("random_logit", explain)
    alike = named(similarity)

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        given, _, scores = split("random_logit", args, argnums)
        logits = model(*given)
        held = attribution.hold(target, logits)
        if held is None or callable(held) or isinstance(held, tuple):
            raise ValueError(f"`random_logit` is for a target that is a class: {held}")
        if logits.shape[0] < 2:
            raise ValueError("`random_logit` takes at least 2 classes, got 1")
        first, second = jax.random.split(key)
        step = jax.random.randint(first, (), 1, logits.shape[0])
        other = (jnp.asarray(held).astype(jnp.int32) + step) % logits.shape[0]
        row = flattened(scores)
        found = again.scores(explain, given, other, second, scores)
        value = alike(row, found)
        checks = [again.finite(row, found), (Reason.NO_VARIANCE, jnp.isnan(value))]
        return conclude(value, checks, other=other)

    needs = frozenset({"key", "explain", "class_sensitive"})
    return Metric("random_logit", "lower", needs, measure)
