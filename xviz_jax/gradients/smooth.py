"""SmoothGrad (Smilkov et al., 2017, arXiv 1706.03825) and its kin, of any method.

SmoothGrad-squared is of Hooker et al., 2019 (arXiv 1806.10758), VarGrad of Adebayo
et al., 2018 (arXiv 1810.03292).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attribution import Attribution, Target
from xviz_jax.noise import Noise, NoisyTokens, add

_REDUCTIONS = ("mean", "square", "variance")


def smooth(
    explain: Callable[..., Attribution],
    *,
    samples: int = 32,
    noise: Noise,
    reduce: str = "mean",
    chunk: int = 8,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Explains noisy copies of an input, and reduces their scores.

    For gradients that flicker from pixel to pixel: what stays under noise is less
    likely to be an accident of the exact input. Signed as `explain` is for the
    mean; never negative for squares and variance, which show where scores are large
    or unstable. Conserves nothing. Costs `samples` explanations, and a forward pass
    once compiled; memory does not grow with `samples`. Reduces in float32. Of tokens
    it is the embeddings that get noise, for methods that explain those.

    Args:
      explain: What a method returns. The predicted class is that of the clean input.
      samples: How many noisy copies.
      noise: Standard deviation of the normal noise, in units of the input or of the
        embeddings, or a function of these that returns it:
        `lambda x: 0.15 * (x.max() - x.min())` is the paper's middle choice.
      reduce: `mean` (SmoothGrad), `square` (SmoothGrad-squared) or `variance`
        (VarGrad).
      chunk: How many copies are explained at once.
      argnums: Which positional arguments get noise: those that `explain` explains.

    Returns:
      `explain(*args, target=None, key) -> Attribution`, whose `output` is that of
      the clean input, and whose diagnostics are

      - `standard_error`: of each score, from the spread of the samples (for the
        variance, as if they were normal);
      - `converged`: whether all copies' explanations did; only where they say so;
      - `evaluations`: the sum of the copies', each of which counts as one where it does
        not say; without the forward pass.

    Raises:
      ValueError: If there is no key, the input is neither made of floats nor of
        tokens whose embeddings the method explains, or an option does not fit.

    >>> from xviz_jax.gradients import saliency
    >>> explain = smooth(saliency(lambda x: x**2), noise=0.1, reduce="variance")
    >>> spread = explain(jnp.ones(1), key=jax.random.key(0)).scores
    >>> bool(0.01 < spread[0] < 0.1)  # of 2x, so 4 * 0.1**2 = 0.04 is expected
    True
    """
    chunks.positive(samples, "samples")
    chunks.positive(chunk, "chunk")
    if reduce not in _REDUCTIONS:
        raise ValueError(f"`reduce` is one of {_REDUCTIONS}, got {reduce!r}")
    if reduce == "variance" and samples < 2:
        raise ValueError(f"a variance takes at least 2 `samples`, got {samples}")
    if not callable(noise) and not noise >= 0:
        raise ValueError(f"`noise` is a standard deviation or a function, got {noise}")

    def smoothed(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        key = attribution.require_key(key, "smooth")
        clean, inner = jax.random.split(key)
        held = _held(explain, args, target, clean)

        def sample(keys: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            shaken = _shaken(args, argnums, noise, keys[0])
            found = _explained(explain, shaken, target=held, key=keys[1])
            good = jnp.all(jnp.asarray(found.diagnostics.get("converged", True)))
            spent = jnp.asarray(found.diagnostics.get("evaluations", 1))
            about = (good.astype(jnp.float32), spent.astype(jnp.float32))
            return _power(found.scores, reduce), about

        keys = jax.random.split(inner, (samples, 2))
        (mean, (good, spent)), (variance, _) = chunks.moments(sample, keys, chunk)
        at_x = explain(*args, target=held, key=clean)
        diagnostics = {
            "standard_error": _error(variance, reduce, samples),
            "evaluations": jnp.round(spent * samples).astype(jnp.int32),
        }
        if "converged" in at_x.diagnostics:
            diagnostics["converged"] = good == 1
        if reduce == "variance":
            share = (samples - 1) / samples
            mean = jax.tree.map(lambda leaf: leaf * share, variance)
        return Attribution(scores=mean, output=at_x.output, diagnostics=diagnostics)

    return smoothed


def _held(explain: Callable, args: Sequence[Any], target: Target, key: Any) -> Target:
    """The target at the clean input: the predicted class, where none was given."""
    if target is not None:
        return target
    shapes = []

    def predicted(logits: jax.Array) -> jax.Array:
        held = attribution.hold(None, logits)
        shapes.append(logits.shape)
        return jnp.float32(0) if held is None else held.astype(jnp.float32)

    # Compiled, all of this but the forward pass is dropped.
    found = explain(*args, target=predicted, key=key).output
    return found.astype(jnp.int32) if shapes[0] else None


def _shaken(
    args: Sequence[Any], argnums: int | Sequence[int], noise: Noise, key: jax.Array
) -> list[Any]:
    shaken = list(args)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    for place, number in enumerate(numbers):
        if not -len(args) <= number < len(args):
            raise ValueError(
                f"`argnums` is {argnums}, but {len(args)} positional arguments came"
            )
        given, own = shaken[number], jax.random.fold_in(key, place)
        kinds = {jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(given)}
        if all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
            shaken[number] = add(given, noise, own)
        elif hasattr(given, "dtype") and jnp.issubdtype(given.dtype, jnp.integer):
            shaken[number] = NoisyTokens(jnp.asarray(given), own, noise)
        else:
            raise ValueError(
                "`smooth` adds noise to floats, or to the embeddings of one array of "
                f"tokens; the input has {sorted(map(str, kinds))}"
            )
    return shaken


def _explained(explain: Callable, args: Sequence[Any], **options: Any) -> Attribution:
    try:
        return explain(*args, **options)
    except (AttributeError, IndexError, TypeError) as error:
        if not any(isinstance(each, NoisyTokens) for each in args):
            raise
        raise ValueError(
            "`smooth` adds noise to the embeddings of tokens, and this method, or "
            "this argument of it, is not explained at embeddings"
        ) from error


def _power(scores: Any, reduce: str) -> Any:
    scores = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), scores)
    return jax.tree.map(jnp.square, scores) if reduce == "square" else scores


def _error(variance: Any, reduce: str, samples: int) -> Any:
    if reduce == "variance":
        share = (2 / max(samples - 1, 1)) ** 0.5
        return jax.tree.map(lambda leaf: leaf * share, variance)
    return jax.tree.map(lambda leaf: jnp.sqrt(leaf / samples), variance)
