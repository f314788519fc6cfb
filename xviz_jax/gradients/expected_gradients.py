"""Expected gradients (Erion et al., 2021, arXiv 1906.10670), or GradientSHAP."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attribution import At, Attribution, Target
from xviz_jax.noise import add


def expected_gradients(
    model: Callable,
    *,
    baselines: Any,
    samples: int = 64,
    noise: float = 0.0,
    chunk: int = 8,
    at: At = None,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Averages integrated gradients over many baselines, by sampling.

    For when no single input means "nothing": the baselines are draws from the data,
    and scores say what sets this input apart from them. Signed. Adds up to the
    output less its mean over the baselines, but for sampling error. Costs `samples`
    forward and backward passes and one forward pass; memory does not grow with
    `samples`. Averages in float32.

    Places on the path are stratified and every baseline is drawn equally often
    (give or take one), so the error is below that of independent draws.

    Args:
      model: Maps one example to logits; any JAX function.
      baselines: Where paths start: shaped like the explained input with a leading
        axis of rows, or a function of the input that returns them. Integer rows for
        tokens stand for their embeddings.
      samples: Draws of a baseline and a place on the path from it.
      noise: Standard deviation of normal noise on the input, in its units, drawn
        anew for each sample (GradientSHAP); 0 for none.
      chunk: How many samples are evaluated at once.
      at: A traced site (or its name, or several) whose activation is explained in
        place of the input; baselines are activations then.
      argnums: Which positional arguments are explained, as in `jax.grad`.

    Returns:
      `explain(*args, target=None, key) -> Attribution`, whose scores are shaped like
      the explained input (one for each token where it is an integer array that the
      model looks up), and whose diagnostics are

      - `standard_error`: of each score, from the spread of the samples; an upper
        bound on average, since it ignores the stratification;
      - `evaluations`: forward and backward passes.

    Raises:
      ValueError: If there is no key, the input is not made of floats, or the
        baselines, target or an option does not fit.

    >>> import jax
    >>> explain = expected_gradients(
    ...     lambda x: x * jnp.array([1.0, 3.0]), baselines=jnp.array([[0.0, 1.0]])
    ... )
    >>> scores = explain(jnp.array([1.0, 2.0]), target=1, key=jax.random.key(0)).scores
    >>> scores.tolist()
    [0.0, 3.0]
    """
    chunks.positive(samples, "samples")
    chunks.positive(chunk, "chunk")
    if not noise >= 0:
        raise ValueError(f"`noise` is a standard deviation, got {noise}")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        key = attribution.require_key(key, "expected_gradients")
        question = attribution.ask(model, args, argnums, at)
        output, scalar = question.fix(target)
        begins = baselines(question.x) if callable(baselines) else baselines
        rows = _rows(begins)

        def sample(draw: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
            row, place, own = draw
            baseline = jax.tree.map(lambda leaf: jnp.asarray(leaf)[row], begins)
            begin = attribution.start(baseline, question)
            x = add(question.x, noise, own) if noise else question.x
            way = jax.tree.map(
                lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), x, begin
            )
            point = jax.tree.map(
                lambda b, w: (b.astype(jnp.float32) + place * w).astype(b.dtype),
                begin,
                way,
            )
            slope = jax.grad(scalar)(point)
            each = jax.tree.map(lambda w, s: w * s.astype(jnp.float32), way, slope)
            return question.scores(each)

        scores, variance = chunks.moments(sample, draws(key, samples, rows), chunk)
        error = jax.tree.map(lambda v: jnp.sqrt(v / samples), variance)
        return Attribution(
            scores=scores,
            output=output,
            diagnostics={
                "standard_error": error,
                "evaluations": jnp.int32(samples),
            },
        )

    return explain


def draws(
    key: jax.Array, samples: int, rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each sample: a row of the baselines, a place in [0, 1), and a key."""
    first, second, third, fourth = jax.random.split(key, 4)
    order = jax.random.permutation(first, rows)
    row = order[jnp.arange(samples) % rows]
    stratum = jax.random.permutation(second, samples).astype(jnp.float32)
    place = (stratum + jax.random.uniform(third, (samples,))) / samples
    return row, place, jax.random.split(fourth, samples)


def _rows(baselines: Any) -> int:
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(baselines)}
    if len(counts) != 1 or counts & {(), (0,)}:
        raise ValueError(
            "`baselines` have one and the same number of rows, got arrays of "
            f"{[jnp.shape(leaf) for leaf in jax.tree.leaves(baselines)]}"
        )
    return counts.pop()[0]
