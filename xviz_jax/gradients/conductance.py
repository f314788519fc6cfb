"""Conductance (Dhamdhere et al., 2018, arXiv 1805.12233)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attribution import At, Attribution, Target
from xviz_jax.gradients.layers import journey, mean_along
from xviz_jax.gradients.quadrature import rule_nodes


def conductance(
    model: Callable,
    *,
    at: At,
    baseline: Any = None,
    steps: int = 32,
    rule: str = "gauss_legendre",
    chunk: int = 8,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Attributes the change of an output to what flows through units of a layer.

    Integrated gradients, seen from inside: at each place on the path from the
    baseline to the input, the gradient at a unit times the speed at which the unit
    changes. Over a layer that all of the input passes through, scores add up to the
    change of the output; around a residual connection they do not. Signed. Costs
    `steps` forward and backward passes, as many forward-mode passes up to the layer,
    and two forward passes; memory does not grow with `steps`. Averages in float32.

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

      - `absolute_gap`: |sum of scores - change of the output| at each site: what did
        not pass through it, and what the rule missed;
      - `baseline_output`: the explained scalar at the baseline;
      - `evaluations`: forward and backward passes.

    Raises:
      ValueError: If there is no such activation, the input is not made of floats or
        tokens, or the baseline, target or an option does not fit.

    >>> from jax.ad_checkpoint import checkpoint_name
    >>> model = lambda x: checkpoint_name(2 * x, "hidden") ** 2
    >>> explain = conductance(model, at="hidden")
    >>> explain(jnp.array([1.0, 3.0]), target=1).scores.round(4).tolist()
    [0.0, 36.0]
    """
    rule_nodes(rule, steps)
    chunks.positive(chunk, "chunk")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        path = journey(model, args, argnums, target, at, baseline)

        def flow(where: jax.Array) -> dict[str, jax.Array]:
            return jax.tree.map(jnp.multiply, path.slope(where), path.speed(where))

        found = mean_along(flow, rule, steps, chunk)
        change = path.output - path.begin_output
        gaps = {name: jnp.abs(jnp.sum(each) - change) for name, each in found.items()}
        return Attribution(
            scores=attribution.named(at, found),
            output=path.output,
            diagnostics={
                "absolute_gap": attribution.named(at, gaps),
                "baseline_output": path.begin_output,
                "evaluations": jnp.int32(steps),
            },
        )

    return explain
