"""AttnLRP (Achtibat et al., 2024, arXiv 2402.05602), in its form with gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attention.relevance_rules import propagating
from xviz_jax.attribution import At, Attribution, Target


def attn_lrp(
    model: Callable, *, argnums: int | Sequence[int] = 0, at: At = None
) -> Callable[..., Attribution]:
    """Attributes an output by passing its relevance back, operation by operation.

    Layer-wise relevance propagation for transformers: linear operations pass
    relevance on by what each input contributed, elementwise functions unchanged, a
    norm's divisor is a constant, and a product of two arrays gives half to each. For
    one backward pass it is far less noisy than `input_x_gradient`. Needs a target.
    Signed. Conserves the output but for what biases and softmaxes take in: `conserved`
    says how much arrived. Costs one forward and one backward pass, and a gradient's
    memory: attention inside a known kernel stays there. This is the paper's own
    convention for language models, with an epsilon of zero, in every layer; the gamma
    rules that it tunes for vision transformers are not applied. Sums in float32.

    The rules are found by tracing, whatever the model's code. Layer-wise relevance
    propagation is patented for commercial use in some countries: ask before you sell.

    Args:
      model: Maps one example to logits; any JAX function of operations that have a
        rule.
      argnums: Which positional arguments are explained.
      at: Sites that tracing found, or their names; explained in place of the
        arguments. Scores of several are a dict by name.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, whose scores are shaped
      like the explained arguments, or like tokens where those are integers, and
      whose diagnostic is `conserved`, the sum of all scores.

    Raises:
      ValueError: If an operation has no rule, with its name and place; if an option
        or the target does not fit.

    >>> model = lambda x: jnp.stack([x[0] * x[1], x[1] - x[0]])
    >>> attn_lrp(model)(jnp.array([2.0, 3.0]), target=0).scores.tolist()
    [3.0, 3.0]

    Source: section 3 of the paper; as edits of the gradient, section 3 of Arras et
    al., 2025 (arXiv 2502.15886).
    """
    return relevance(model, argnums, at, conservative=False)


def relevance(
    model: Callable, argnums: int | Sequence[int], at: At, *, conservative: bool
) -> Callable[..., Attribution]:
    """The form that AttnLRP and CP-LRP share; `conservative` as in `propagating`."""

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        question = attribution.ask(model, args, argnums, at)
        edited = propagating(question.model, question.x, conservative=conservative)

        def scalar(x: Any) -> jax.Array:
            logits = edited(x)
            return attribution.explained(attribution.hold(target, logits), logits)

        output, gradient = jax.value_and_grad(scalar)(question.x)
        scores = jax.tree.map(
            lambda x, slope: x.astype(jnp.float32) * slope.astype(jnp.float32),
            question.x,
            gradient,
        )
        conserved = sum(map(jnp.sum, jax.tree.leaves(scores)), jnp.float32(0))
        return Attribution(
            scores=question.scores(scores),
            output=output,
            diagnostics={"conserved": conserved},
        )

    return explain
