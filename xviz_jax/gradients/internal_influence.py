"""Internal influence (Leino et al., 2018, arXiv 1802.03788)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attribution import At, Attribution, Target
from xviz_jax.gradients.layers import journey, mean_along
from xviz_jax.gradients.quadrature import rule_nodes


def internal_influence(
    model: Callable,
    *,
    at: At,
    baseline: Any = None,
    steps: int = 32,
    rule: str = "gauss_legendre",
    chunk: int = 8,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Attributes an output to units of a layer by their mean gradient on a path.

    Which units push the output while the input comes into being? The inputs of
    interest are those on the straight path from the baseline to the input. Signed,
    in units of output per activation; not multiplied by the activation, so it
    conserves nothing. Costs `steps` forward and backward passes and two forward
    passes; memory does not grow with `steps`. Averages in float32.

    Args:
      model: Maps one example to logits; any JAX function.
      at: A traced activation (or its name, or several): a named value, an embedding,
        a block's input. Inside a loop, all turns at once.
      baseline: Where the path of inputs starts: None for zeros, a number, an array
        shaped like the input, a function of it, or one of `xv.baselines`.
      steps: Nodes on the path.
      rule: Where they lie, as for `integrated_gradients`.
      chunk: How many nodes are evaluated at once.
      argnums: Which positional arguments move along the path, as in `jax.grad`.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, whose scores are shaped
      like the activation (a dict by name for several), with the diagnostics
      `baseline_output`, the explained scalar at the baseline, and `evaluations`.

    Raises:
      ValueError: If there is no such activation, the input is not made of floats or
        tokens, or the baseline, target or an option does not fit.

    >>> from jax.ad_checkpoint import checkpoint_name
    >>> model = lambda x: checkpoint_name(2 * x, "hidden") ** 2
    >>> explain = internal_influence(model, at="hidden")
    >>> explain(jnp.array([1.0, 3.0]), target=1).scores.round(4).tolist()
    [0.0, 6.0]
    """
    rule_nodes(rule, steps)
    chunks.positive(chunk, "chunk")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        path = journey(model, args, argnums, target, at, baseline)
        found = mean_along(path.slope, rule, steps, chunk)
        return Attribution(
            scores=attribution.named(at, found),
            output=path.output,
            diagnostics={
                "baseline_output": path.begin_output,
                "evaluations": jnp.int32(steps),
            },
        )

    return explain
