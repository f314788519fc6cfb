"""Model parameter randomisation test (Adebayo et al., 2018, arXiv 1810.03292)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attribution import Attribution, Target
from xviz_jax.metrics import again, shuffling
from xviz_jax.metrics.features import flattened, split
from xviz_jax.metrics.measurement import Measurement, Metric, Reason, conclude
from xviz_jax.metrics.similarity import Similarity, named

Order = Literal["bottom_up", "top_down"]


def mprt(
    model: Callable,
    *,
    explain: Callable[..., Attribution],
    layers: Sequence[str] | None = None,
    order: Order = "bottom_up",
    randomize: shuffling.Randomize = "permute",
    similarity: Similarity = "spearman",
    parameters_argnum: int = 0,
    argnums: int = 1,
) -> Metric:
    """How alike scores stay as the model's layers are randomised, one after another.

    What does not change with the parameters is not about this model. From the layer
    next to the input upward, since from the output downward much of the input reaches
    the last layers still (Hedström et al., 2024, arXiv 2401.06465). Likeness depends on
    how it is measured; prefer `efficient_mprt` beside it. For noisy gradients, pass
    `xv.smooth(explain, ...)`. Costs one explanation for each layer and a forward pass,
    one layer at a time, and the memory of the parameters twice over.

    Args:
      model: Maps parameters and one example to logits; any JAX function.
      explain: What the method that made the attribution returned, of the same
        arguments.
      layers: Where each layer's parameters lie in their pytree, from the input to the
        output: `("embed", "blocks/0", "blocks/1", "head")`. Together they are all
        parameters. None for the entries of a list.
      order: `bottom_up` or `top_down`.
      randomize: `permute` shuffles the entries of each array; `normal` draws them anew
        with the mean and the spread they have; or a function `(array, key) -> array`.
        Integers stay as they are.
      similarity: `spearman`, of ranks, `pearson` or `cosine`.
      parameters_argnum: Which of the model's positional arguments are the parameters.
      argnums: Which of the model's positional arguments is explained.

    Returns:
      A `Metric`, lower is better, from -1 to 1, that needs a `key`: the mean over
      layers. Its detail is `similarity`, `[layers]`, with one more layer randomised
      each. Undefined if it is after any layer.

    Raises:
      ValueError: If there is no key, the layers do not make up the parameters, scores
        of two explanations differ in shape, or an option does not fit.

    >>> from xviz_jax.gradients import saliency
    >>> model = lambda layers, x: layers[1] @ (layers[0] @ x)
    >>> layers = [jnp.diag(jnp.arange(1.0, 5.0)), jnp.ones((1, 4))]
    >>> explain, x = saliency(model, argnums=1), jnp.ones(4)
    >>> found = mprt(model, explain=explain)(
    ...     layers, x, explain(layers, x), key=jax.random.key(1)
    ... )
    >>> found.details["similarity"].shape
    (2,)
    """
    again.check("mprt", explain)
    shuffling.check(randomize)
    alike = named(similarity)
    if order not in get_args(Order):
        raise ValueError(f"`order` is one of {get_args(Order)}, got {order!r}")

    def measure(*args: Any, target: Target = None, key: Any = None) -> Measurement:
        given, _, scores = split("mprt", args, argnums)
        place = shuffling.place_of(given, parameters_argnum)
        parameters = given[place]
        numbers = shuffling.layers_of(parameters, layers)
        count = 1 + max(numbers)
        if order == "top_down":
            numbers = [count - 1 - number for number in numbers]
        held = attribution.hold(target, model(*given))
        row = flattened(scores)
        first, second = jax.random.split(key)
        wrong = shuffling.shuffled(parameters, randomize, first)

        def after(turn: jax.Array) -> tuple[jax.Array, jax.Array]:
            """The likeness with this layer and those before it randomised."""
            leaves, tree = jax.tree.flatten(parameters)
            triples = zip(numbers, jax.tree.leaves(wrong), leaves, strict=True)
            mixed = [
                jnp.where(number <= turn, new, old) for number, new, old in triples
            ]
            filled = list(given)
            filled[place] = jax.tree.unflatten(tree, mixed)
            found = again.scores(explain, filled, held, second, scores)
            return alike(row, found), jnp.all(jnp.isfinite(found))

        found, finite = chunks.each(after, jnp.arange(count), 1)
        checks = [
            again.finite(row, jnp.where(finite, 0, jnp.nan)),
            (Reason.NO_VARIANCE, jnp.any(jnp.isnan(found))),
        ]
        return conclude(jnp.mean(found), checks, similarity=found)

    needs = frozenset({"key", "explain", "parameters"})
    return Metric("mprt", "lower", needs, measure)
