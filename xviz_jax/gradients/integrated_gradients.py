"""Integrated gradients (Sundararajan et al., 2017, arXiv 1703.01365)."""

from collections.abc import Callable, Sequence
from typing import Any

from xviz_jax.attribution import At, Attribution
from xviz_jax.gradients.adaptive import Adaptive
from xviz_jax.gradients.path import Fixed, explainer, straight

# The first round is 17 nodes, two of these; fixed rules like powers of two.
_CHUNK, _FIXED_CHUNK = 9, 8
_STEPS, _RULE = 64, "gauss_legendre"


def integrated_gradients(
    model: Callable,
    *,
    tolerance: float = 0.01,
    max_evaluations: int = 512,
    baseline: Any = None,
    steps: int | None = None,
    rule: str | None = None,
    chunk: int | None = None,
    at: At = None,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Attributes the change of an output between a baseline and the input.

    The gradient is averaged along the straight path from the baseline, so scores
    add up to the change of the output (completeness) even where the output
    saturates. Signed. The choice of the baseline is part of the question.

    Nodes are placed on each input's path where it needs them, until the estimated
    error of the scores is below `tolerance`. Costs a forward pass and from 17 to
    `max_evaluations` forward and backward passes: some 20 to 40 for 1% of smooth
    models, twice that where activations kink. With `steps` or `rule`, the nodes are
    those of a rule instead, and it costs `steps` of these and two forward passes.
    Memory does not grow with either. Sums in float32.

    Args:
      model: Maps one example to logits; any JAX function.
      tolerance: The relative error of the scores, in the L1 norm, at which an
        adaptive path ends; of either form, the one that counts as converged.
      max_evaluations: Nodes on an adaptive path at most.
      baseline: Where the path starts: None for zeros, a number, an array shaped
        like the input, a function of the input, or one of `xv.baselines`. Arrays
        with one more axis in front are several baselines: scores are the mean over
        their paths, at as many times the cost.
      steps: Nodes on a path of fixed nodes; 64 where only `rule` is given.
      rule: Where they lie: `gauss_legendre` (where only `steps` is given),
        `clenshaw_curtis`, `midpoint`, `trapezoid`, `left` or `right`.
      chunk: How many nodes are evaluated at once; by default 9, or 8 fixed ones.
        Under `vmap` over many examples 1 is best: the batch fills the machine.
      at: A traced site (or its name, or several) whose activation is explained in
        place of the input; the baseline is an activation then.
      argnums: Which positional arguments are explained, as in `jax.grad`.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, whose scores are
      shaped like the explained input (one for each token where it is an integer
      array that the model looks up), and whose diagnostics are

      - `error_estimate`: of the scores before tokens are summed, relative, in the
        L1 norm; of an adaptive path, the true error is below it on 95% of inputs
        or more. Of fixed nodes, the distance to what half of them give, which is
        far above the error of a rule that has converged;
      - `completeness_gap`: |sum of scores - change of the output|, relative to the
        change of the output;
      - `absolute_gap`: the same in units of the output, which stays meaningful
        where the output hardly changes;
      - `baseline_output`: the explained scalar at the baseline;
      - `evaluations`: forward and backward passes along the path;
      - `converged`: whether the estimate, which is never below the gap, is within
        the tolerance. A small gap alone proves nothing.

      An adaptive explainer cannot be differentiated in reverse mode, and it
      evaluates the ends of the path: a gradient that is infinite at the baseline
      makes it stop there, unconverged. Fixed nodes have neither limit.

    Raises:
      ValueError: If the input is not made of floats, or the baseline, target or an
        option does not fit.

    >>> import jax.numpy as jnp
    >>> explain = integrated_gradients(lambda x: jnp.stack([x @ x, -x @ x]))
    >>> found = explain(jnp.array([1.0, 2.0]), target=0)
    >>> found.scores.round(4).tolist(), int(found.diagnostics["evaluations"])
    ([1.0, 4.0], 17)
    """
    if steps is None and rule is None:
        quadrature = Adaptive(
            tolerance=tolerance,
            max_evaluations=max_evaluations,
            chunk=_CHUNK if chunk is None else chunk,
        )
    else:
        steps = _STEPS if steps is None else steps
        quadrature = Fixed(
            rule=_RULE if rule is None else rule,
            steps=steps,
            chunk=min(_FIXED_CHUNK, steps) if chunk is None else chunk,
            tolerance=tolerance,
        )
    return explainer(
        model,
        straight,
        quadrature=quadrature,
        baseline=baseline,
        at=at,
        argnums=argnums,
    )
