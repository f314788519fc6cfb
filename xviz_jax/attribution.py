"""What is explained, from where, and the answer.

Every method of the library has one form,

    method(model, *, options) -> explain(x, *rest, target=None, key=None)

and returns an `Attribution`. This module holds what they share: the answer, the
target that turns logits into the explained scalar, the baseline a path starts
from, and the choice among positional arguments.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import tracing
from xviz_jax.noise import NoisyTokens
from xviz_jax.tracing import Site
from xviz_jax.tracing.site import select

# A site, its name, or several of them; None for the argument itself.
At = str | Site | Sequence[str | Site] | None
# None, a class, a pair of classes, or a function of the logits.
Target = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Attribution:
    """An explanation of one output for one example.

    Attributes:
      scores: float32, shaped like the explained input, or one score per token or
        position; the method's docstring says which.
      output: The explained scalar at the input, float32.
      diagnostics: Arrays that say how far the scores can be trusted, under the
        names in the method's docstring.
    """

    scores: Any
    output: jax.Array
    diagnostics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """A baseline that is made of more than the explained input.

    Attributes:
      of: Maps a question to a baseline of its input.
    """

    of: Callable[["Question"], Any]


def hold(target: Target, logits: jax.Array) -> Target:
    """Checks a target against a model's logits, and fixes the predicted class.

    Args:
      target: As a user gives it; None is the class with the largest logit.
      logits: The model's output at the explained input.

    Returns:
      A target that `explained` takes, the same at every other input.

    Raises:
      ValueError: If the target, or the model's output, has the wrong form.
    """
    if not hasattr(logits, "dtype") or not hasattr(logits, "shape"):
        raise ValueError(
            f"the model must return one array of logits, got {type(logits).__name__}"
        )
    if callable(target):
        return target
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"the model must return floats, got {logits.dtype}")
    if logits.ndim == 0 and target is None:
        return None
    if logits.ndim != 1:
        raise ValueError(
            "the model must return logits of shape (classes,) for one example, got "
            f"{logits.shape}; use `xv.single` for a model of batches, or a callable "
            "target for any other output"
        )
    if target is None:
        return jax.lax.stop_gradient(jnp.argmax(logits))
    if isinstance(target, tuple | list):
        if len(target) != 2:
            raise ValueError(
                f"a target pair is (class, other class), got {len(target)} entries"
            )
        return tuple(_check_class(each, logits.shape[0]) for each in target)
    return _check_class(target, logits.shape[0])


def _check_class(target: Target, classes: int) -> Target:
    if isinstance(target, int | np.integer) and not isinstance(target, bool):
        if not 0 <= target < classes:
            raise ValueError(
                f"`target` is a class from 0 to {classes - 1}, got {target}"
            )
        return int(target)
    array = isinstance(target, jax.Array | np.ndarray)
    if not array or not jnp.issubdtype(target.dtype, jnp.integer):
        raise ValueError(
            "`target` is None, an integer, a pair of integers or a callable, got "
            f"{target!r}"
        )
    if target.shape != ():
        raise ValueError(
            f"`target` is one integer for one example, got shape {target.shape}; "
            "use `jax.vmap` for a batch"
        )
    return jnp.asarray(target)


def explained(target: Target, logits: jax.Array) -> jax.Array:
    """The scalar that is explained, in float32.

    A traced class outside the logits gives NaN, and so do its gradients.

    Args:
      target: As `hold` returns it.
      logits: The model's output.

    Raises:
      ValueError: If a callable target returns anything but a float scalar.
    """
    if callable(target):
        value: Any = target(logits)
        if not isinstance(value, jax.Array | np.ndarray | np.generic) or value.shape:
            got = getattr(value, "shape", type(value).__name__)
            raise ValueError(f"a callable target returns one float, got {got}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"a callable target returns one float, got {value.dtype}")
        return jnp.asarray(value).astype(jnp.float32)
    if target is None:
        return logits.astype(jnp.float32)
    if isinstance(target, tuple):
        return _logit(target[0], logits) - _logit(target[1], logits)
    return _logit(target, logits)


def _logit(target: Target, logits: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    if isinstance(target, int):
        return logits[target]
    # A masked sum, because a lookup would ask for one sharding of the batch.
    chosen = jnp.arange(logits.shape[0], dtype=target.dtype) == target
    # 1, or 0 / 0; choosing between constants would ask for one sharding as well.
    known = jnp.any(chosen).astype(jnp.float32)
    return known / known * jnp.sum(jnp.where(chosen, logits, 0))


@dataclasses.dataclass(frozen=True)
class Question:
    """What is explained of which function: a model, seen from the explained input.

    Attributes:
      x: The explained input, a pytree of floats: the argument itself, or the
        embeddings that a token argument looks up.
      model: Maps such an input to the model's logits.
      scores: Brings float32 scores shaped like `x` into the form that is returned.
      embed: For tokens, the embeddings of other tokens of the same shape.
      tokens: For tokens, the explained argument itself.
      carry: With `at`, the activation that another value of the argument leads to.
      place: A function and its arguments that compute the logits of such an input;
        unlike `model`, they can be traced for sites by name.
    """

    x: Any
    model: Callable[[Any], jax.Array]
    scores: Callable[[Any], Any]
    embed: Callable[[Any], Any] | None = None
    tokens: jax.Array | None = None
    carry: Callable[[Any], Any] | None = None
    place: Callable[[Any], tuple[Callable, Sequence[Any]]] | None = None

    def fix(self, target: Target) -> tuple[jax.Array, Callable[[Any], jax.Array]]:
        """Holds a target at the explained input.

        Args:
          target: As a user gives it.

        Returns:
          The explained scalar there, and the function that computes it of any input.
        """
        logits = self.model(self.x)
        held = hold(target, logits)

        def scalar(other: Any) -> jax.Array:
            return explained(held, self.model(other))

        return explained(held, logits), scalar


def ask(
    model: Callable,
    args: Sequence[Any],
    argnums: int | Sequence[int],
    at: At = None,
) -> Question:
    """Splits what is explained from the other positional arguments.

    Float arguments are explained themselves. An integer argument is explained at
    the rows of the tables it looks up, found by tracing, with one score for each
    token. With `at`, the activation of a traced site is explained instead, and what
    the model computes before it is not evaluated again.

    Args:
      model: Maps one example to logits.
      args: Its positional arguments.
      argnums: Which of them are explained, as in `jax.grad`.
      at: A site or its name, or several; scores of several are a dict by name.

    Raises:
      ValueError: If there is no such argument, or it is neither made of floats nor
        an array of tokens that the model looks up; if there is no such site.
    """
    question = _ask_of_argument(model, args, argnums)
    if at is None:
        return question
    if any(isinstance(each, NoisyTokens) for each in args):
        assert question.place is not None
        model, args = question.place(question.x)
    return _ask_of_site(model, args, question, at)


def _ask_of_argument(
    model: Callable, args: Sequence[Any], argnums: int | Sequence[int]
) -> Question:
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    for number in numbers:
        if not -len(args) <= number < len(args):
            raise ValueError(
                f"`argnums` is {argnums}, but {len(args)} positional arguments came"
            )
    numbers = tuple(number % len(args) for number in numbers)
    picked = tuple(args[number] for number in numbers)
    x = picked[0] if isinstance(argnums, int) else picked
    if isinstance(x, NoisyTokens):
        return _ask_of_tokens(model, args, numbers[0])
    leaves = jax.tree.leaves(x)
    if not leaves:
        raise ValueError("the explained input has no arrays")
    if len(leaves) == 1 and x is leaves[0] and _has_kind(x, jnp.integer):
        return _ask_of_tokens(model, args, numbers[0])
    for leaf in leaves:
        if not _has_kind(leaf, jnp.floating):
            got = getattr(leaf, "dtype", type(leaf).__name__)
            raise ValueError(f"the explained input must be a float array, got {got}")

    def place(other: Any) -> tuple[Callable, list[Any]]:
        filled = list(args)
        others = (other,) if isinstance(argnums, int) else other
        for number, each in zip(numbers, others, strict=True):
            filled[number] = each
        return model, filled

    return Question(x, _run(place), lambda scores: scores, place=place)


def _run(place: Callable[[Any], tuple[Callable, Sequence[Any]]]) -> Callable:
    def seen(other: Any) -> jax.Array:
        function, args = place(other)
        return function(*args)

    return seen


def _has_kind(leaf: Any, kind: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, kind)


def _ask_of_tokens(model: Callable, args: Sequence[Any], number: int) -> Question:
    given = args[number]
    tokens = given.tokens if isinstance(given, NoisyTokens) else given
    args = [*args[:number], tokens, *args[number + 1 :]]
    before = sum(map(_is_array, jax.tree.leaves(list(args[:number]))))
    sites = tracing.sites(model, *args)
    lookups = [s for s in sites if s.kind == "embedding" and before in s.inputs]
    usable = [s for s in lookups if s.shape[: tokens.ndim] == tokens.shape]
    if not usable or len(usable) < len(lookups):
        found = [f"{s.name!r} of shape {s.shape}" for s in lookups] or "no table"
        raise ValueError(
            f"the explained input is {tokens.dtype}{list(tokens.shape)}: it must look "
            f"up embeddings, one for each token, but tracing found {found}"
        )
    names = [site.name for site in usable]

    def embed(other: Any) -> dict[str, jax.Array]:
        filled = [*args[:number], other, *args[number + 1 :]]
        _, captured = tracing.capture(model, ("activation",), names)(*filled)
        return {name: captured[name]["activation"] for name in names}

    clean = embed(tokens)
    x = given.shake(clean) if isinstance(given, NoisyTokens) else clean

    def place(other: dict[str, jax.Array]) -> tuple[Callable, list[Any]]:
        moved = jax.tree.map(lambda new, old: new - old, other, clean)
        return tracing.perturb(model, names), [moved, *args]

    def scores(each: dict[str, jax.Array]) -> jax.Array:
        """One score for each token, summed over features and tables."""
        summed = [
            leaf.reshape(*tokens.shape, -1).sum(axis=-1) for leaf in each.values()
        ]
        return sum(summed[1:], summed[0])

    return Question(x, _run(place), scores, embed, tokens, place=place)


def sites_at(model: Callable, args: Sequence[Any], at: At) -> tuple[Site, ...]:
    """The sites that `at` names.

    Raises:
      ValueError: If there are none.
    """
    wanted = (at,) if isinstance(at, str | Site) else tuple(at or ())
    sites = select(tracing.sites(model, *args), wanted)
    if not sites:
        raise ValueError(f"`at` names at least one site, got {at!r}")
    return sites


def named(at: At, values: dict[str, Any]) -> Any:
    """What was found at each site: bare for one site, a dict for several."""
    return next(iter(values.values())) if isinstance(at, str | Site) else values


def _ask_of_site(
    model: Callable, args: Sequence[Any], question: Question, at: At
) -> Question:
    """The same question of what a site holds, in place of the argument."""
    sites = sites_at(model, args, at)
    values = {site.name: _value(site) for site in sites}
    one = isinstance(at, str | Site)

    def read(function: Callable, args: Sequence[Any]) -> Any:
        capture = tracing.capture(function, tuple(values.values()), list(values))
        _, found = capture(*args)
        named = {name: found[name][value] for name, value in values.items()}
        return named[sites[0].name] if one else named

    def carry(other: Any) -> Any:
        assert question.place is not None
        return read(*question.place(start(other, question)))

    x = read(model, args)
    # Inside a loop a rule cannot tell the turns apart; what is added can.
    looped = [site.name for site in sites if site.loops]
    plain = [site.name for site in sites if not site.loops]

    def seen(other: Any) -> jax.Array:
        new = {sites[0].name: other} if one else other
        old = {sites[0].name: x} if one else x
        function = model
        if plain:
            function = tracing.replace(function, lambda site, _: new[site.name], plain)
        if not looped:
            return function(*args)
        moved = {name: new[name] - old[name] for name in looped}
        return tracing.perturb(function, looped)(moved, *args)

    return Question(x, seen, lambda scores: scores, carry=carry)


def _value(site: Site) -> str:
    for value in ("activation", "probabilities"):
        if value in site.values:
            return value
    raise ValueError(f"nothing of {site.name!r} can be explained: {site.why}")


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def start(baseline: Any, question: Question) -> Any:
    """The input a path starts from, shaped like the question's.

    Args:
      baseline: None for zeros, a number, an array or pytree shaped like the input,
        or a function of the input that returns one of these; a `Beginning` of
        `xv.baselines`. For tokens, the input is their embeddings; an integer array
        of other tokens stands for theirs. With `at` it is the activation.
      question: What is explained.

    Raises:
      ValueError: If the shapes differ.
    """
    x = question.x
    if isinstance(baseline, Beginning):
        baseline = baseline.of(question)
    if callable(baseline):
        baseline = baseline(x)
    if baseline is None:
        baseline = 0.0
    if question.embed is not None and _has_kind(baseline, jnp.integer):
        return question.embed(jnp.asarray(baseline))
    if _is_number(baseline):
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, baseline), x)
    if jax.tree.structure(baseline) != jax.tree.structure(x):
        raise ValueError(
            f"`baseline` has the structure {jax.tree.structure(baseline)}, but the "
            f"input has {jax.tree.structure(x)}"
        )

    def match(begin: Any, leaf: jax.Array) -> jax.Array:
        if jnp.shape(begin) != leaf.shape:
            raise ValueError(
                f"`baseline` has shape {jnp.shape(begin)}, but the input has "
                f"{leaf.shape}"
            )
        return jnp.asarray(begin).astype(leaf.dtype)

    return jax.tree.map(match, baseline, x)


def _is_number(value: Any) -> bool:
    array = isinstance(value, np.ndarray | np.generic | jax.Array)
    return isinstance(value, int | float) or (array and value.ndim == 0)


def completeness(
    scores: Any, output: jax.Array, baseline_output: jax.Array
) -> dict[str, jax.Array]:
    """How far scores are from adding up to the change of the output.

    Args:
      scores: float32 pytree.
      output: The explained scalar at the input.
      baseline_output: The same at the baseline.

    Returns:
      `completeness_gap`, relative to the change; `absolute_gap`, in units of the
      output, which stays meaningful where the output hardly changes; and
      `baseline_output`.
    """
    summed = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(scores))
    change = output - baseline_output
    absolute = jnp.abs(summed - change)
    # Below this, the change of the output is rounding, and so is the gap.
    rounding = jnp.finfo(jnp.float32).eps * jnp.maximum(
        jnp.abs(output), jnp.abs(baseline_output)
    )
    floor = jnp.maximum(rounding, jnp.finfo(jnp.float32).tiny)
    return {
        "completeness_gap": absolute / jnp.maximum(jnp.abs(change), floor),
        "absolute_gap": absolute,
        "baseline_output": baseline_output,
    }


def require_key(key: Any, method: str) -> jax.Array:
    """Returns the key of a random method.

    Raises:
      ValueError: If there is none.
    """
    if key is None:
        raise ValueError(f"`{method}` is random: pass `key=jax.random.key(...)`")
    return key


def single(batched_model: Callable) -> Callable:
    """Makes a model of one example from a model of batches.

    The first argument, and the output, lose their leading axis of length 1.

    Args:
      batched_model: Maps `[batch, ...]` (and further arguments, passed through) to
        an output with a leading batch axis.

    Returns:
      A function of one example.

    >>> import jax.numpy as jnp
    >>> single(lambda batch: batch.sum(axis=-1))(jnp.ones(3)).shape
    ()
    """

    def model(x: Any, *rest: Any) -> Any:
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], x)
        return jax.tree.map(lambda leaf: leaf[0], batched_model(batch, *rest))

    return model
