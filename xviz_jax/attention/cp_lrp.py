"""CP-LRP, conservative propagation (Ali et al., 2022, arXiv 2202.07304)."""

from collections.abc import Callable, Sequence

from xviz_jax.attention.attn_lrp import relevance
from xviz_jax.attribution import At, Attribution


def cp_lrp(
    model: Callable, *, argnums: int | Sequence[int] = 0, at: At = None
) -> Callable[..., Attribution]:
    """Attributes an output by relevance that passes through values, never through maps.

    As `attn_lrp`, but attention's probabilities and gates count as constants, so that
    nothing is lost in them. What made the model look where it looked is not explained.
    Needs a target. Signed. Conserves the output but for what biases take in:
    `conserved` says how much arrived. Costs one forward and one backward pass, and a
    gradient's memory: attention inside a known kernel stays there. This is the paper's
    own convention, which holds maps and norms' divisors fixed, with an epsilon of zero
    for linear operations; that gates are held too is Achtibat et al.'s reading of it
    for newer models (2024, arXiv 2402.05602). Sums in float32.

    Layer-wise relevance propagation is patented for commercial use in some countries:
    ask before you sell.

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

    >>> import jax, jax.numpy as jnp
    >>> model = lambda x: jax.nn.softmax(x @ x.T) @ x @ jnp.ones((2, 1))
    >>> found = cp_lrp(lambda x: model(x)[0])(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> bool(abs(found.scores.sum() - found.output) < 1e-5)
    True

    Source: sections 3.1 and 3.2 of the paper.
    """
    return relevance(model, argnums, at, conservative=True)
