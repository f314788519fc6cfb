"""Integrated gradients (Sundararajan et al., 2017, arXiv 1703.01365)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import attribution
from xviz_jax.attribution import Attribution, Target
from xviz_jax.gradients.quadrature import rule_nodes

# Chunks of this many nodes fill a core without holding many gradients at once.
_CHUNK = 8
# The gap, relative to the change of the output, below which a path is resolved.
TOLERANCE = 0.01


def integrated_gradients(
    model: Callable,
    *,
    baseline: Any = None,
    steps: int = 64,
    rule: str = "gauss_legendre",
    chunk: int | None = None,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Attributes the change of an output between a baseline and the input.

    The gradient is averaged along the straight path from the baseline, so scores
    add up to the change of the output (completeness) even where the output
    saturates. Signed. The choice of the baseline is part of the question. Costs
    `steps` forward and backward passes and two forward passes; memory does not grow
    with `steps`. Averages in float32.

    Args:
      model: Maps one example to logits; any JAX function.
      baseline: Where the path starts: None for zeros, a number, an array shaped
        like the input, or a function of the input.
      steps: Nodes on the path.
      rule: Where they lie: `gauss_legendre`, `midpoint`, `trapezoid`, `left` or
        `right`.
      chunk: How many nodes are evaluated at once, at most `steps`; by default 8.
        Under `vmap` over many examples 1 is best: the batch fills the machine.
      argnums: Which positional arguments are explained, as in `jax.grad`.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, whose scores are
      shaped like the explained input (one for each token where it is an integer
      array that the model looks up), and whose diagnostics are

      - `completeness_gap`: |sum of scores - change of the output|, relative to the
        change of the output;
      - `absolute_gap`: the same in units of the output, which stays meaningful
        where the output hardly changes;
      - `baseline_output`: the explained scalar at the baseline;
      - `evaluations`: forward and backward passes along the path;
      - `converged`: whether the relative gap is below 1%. A gap can be small by
        chance: it refutes, it does not prove.

    Raises:
      ValueError: If the input is not made of floats, or the baseline, target,
        steps, rule or chunk does not fit.

    >>> import jax.numpy as jnp
    >>> explain = integrated_gradients(lambda x: jnp.stack([x @ x, -x @ x]), steps=4)
    >>> explain(jnp.array([1.0, 2.0]), target=0).scores.round(4).tolist()
    [1.0, 4.0]
    """
    nodes, weights = rule_nodes(rule, steps)
    size = min(_CHUNK, steps) if chunk is None else chunk
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= steps:
        raise ValueError(
            f"`chunk` is an integer from 1 to {steps} steps, got {chunk!r}"
        )

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        question = attribution.ask(model, args, argnums)
        x, begin = question.x, attribution.start(baseline, question)
        logits = question.model(x)
        fixed = attribution.hold(target, logits)
        output = attribution.explained(fixed, logits)

        def scalar(point: Any) -> jax.Array:
            return attribution.explained(fixed, question.model(point))

        baseline_output = scalar(begin)
        average = _average_gradient(scalar, begin, x, nodes, weights, size)
        scores = jax.tree.map(lambda a, b: a * b, _difference(x, begin), average)
        return Attribution(
            scores=question.scores(scores),
            output=output,
            diagnostics=_diagnose(scores, output, baseline_output, steps),
        )

    return explain


def _difference(x: Any, begin: Any) -> Any:
    return jax.tree.map(
        lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), x, begin
    )


def _average_gradient(
    scalar: Callable[[Any], jax.Array],
    begin: Any,
    x: Any,
    nodes: np.ndarray,
    weights: np.ndarray,
    chunk: int,
) -> Any:
    """Weighted mean of the gradient along the path, float32, chunk by chunk."""
    padding = -len(nodes) % chunk
    # The padding repeats a real node, where the gradient is as finite as there.
    nodes = np.concatenate([nodes, np.repeat(nodes[-1:], padding)])
    weights = np.concatenate([weights, np.zeros(padding)])
    distance = _difference(x, begin)

    def gradient(node: jax.Array) -> Any:
        point = jax.tree.map(
            lambda a, d: (a.astype(jnp.float32) + node * d).astype(a.dtype),
            begin,
            distance,
        )
        return jax.grad(scalar)(point)

    def add(total: Any, chunked: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        node, weight = chunked
        if chunk == 1:
            found = jax.tree.map(lambda g: g[None], gradient(node[0]))
        else:
            found = jax.vmap(gradient)(node)
        total = jax.tree.map(
            lambda t, g: t + jnp.tensordot(weight, g.astype(jnp.float32), axes=1),
            total,
            found,
        )
        return total, None

    chunked = (
        jnp.asarray(nodes.reshape(-1, chunk), jnp.float32),
        jnp.asarray(weights.reshape(-1, chunk), jnp.float32),
    )
    zeros = jax.tree.map(jnp.zeros_like, distance)
    return jax.lax.scan(add, zeros, chunked)[0]


def _diagnose(
    scores: Any, output: jax.Array, baseline_output: jax.Array, steps: int
) -> dict[str, jax.Array]:
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(scores))
    change = output - baseline_output
    absolute = jnp.abs(total - change)
    # Below this, the change of the output is rounding, and so is the gap.
    rounding = jnp.finfo(jnp.float32).eps * jnp.maximum(
        jnp.abs(output), jnp.abs(baseline_output)
    )
    floor = jnp.maximum(rounding, jnp.finfo(jnp.float32).tiny)
    gap = absolute / jnp.maximum(jnp.abs(change), floor)
    finite = jnp.stack(
        [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(scores)]
    )
    return {
        "completeness_gap": gap,
        "absolute_gap": absolute,
        "baseline_output": baseline_output,
        "evaluations": jnp.int32(steps),
        "converged": (gap < TOLERANCE) & jnp.all(finite),
    }
