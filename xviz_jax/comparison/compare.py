"""Compare methods on one model and its records, and say which may be believed.

The protocol follows the critics of explanations: perturbation metrics hardly tell some
methods from a random ranking, so controls must lose (Wu et al., 2024, arXiv
2404.01415); a method that does not notice random weights shows the input (Adebayo et
al., 2018, arXiv 1810.03292); one that does not notice the class cannot explain it
(Sixt et al., 2020, arXiv 1912.09818).
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import attribution, baselines, metrics
from xviz_jax.attribution import Attribution
from xviz_jax.comparison import measuring
from xviz_jax.comparison.description import described
from xviz_jax.comparison.judging import Judge
from xviz_jax.comparison.problem import Problem
from xviz_jax.comparison.result import CEILING, CONTROLS, Comparison
from xviz_jax.metrics.imputers import Imputer
from xviz_jax.metrics.measurement import Metric
from xviz_jax.metrics.shuffling import shuffled
from xviz_jax.perturbation.features import labelled

EVIDENCE = ("abpc", "comprehensiveness")
_LEAST_DRAWS = 20


def compare(
    model: Callable,
    explainers: Mapping[str, Callable[..., Attribution]],
    records: Any,
    *,
    key: jax.Array,
    shared: Sequence[Any] = (),
    targets: Any = None,
    class_specific: bool = True,
    groups: Any = None,
    positions: Any = None,
    padding: Any = None,
    imputers: Sequence[Imputer] | None = None,
    metrics: Sequence[Callable[..., Metric]] | None = None,
    slices: Sequence[Any] | np.ndarray | None = None,
    draws: int = _LEAST_DRAWS,
    resamples: int = 2000,
    level: float = 0.95,
    share: float = 0.2,
    times: float = 4.0,
    microbatch: int = 8,
    progress: Callable[[str], Any] | None = None,
) -> Comparison:
    """Says which of several methods may be believed, and shows the numbers behind it.

    Every method's scores are brought to one score for each feature, and its ranking of
    the features is measured beside three that need no method: random ones; the
    position-only one, which is what the other records' features at the same places are
    worth; and leave-one-out, the yardstick. A method is

    - *supported* if on 99% of the records its scores are numbers, it converged and
      padding has no score; if it notices random weights and another class; and if it
      beats both controls by every metric that is evidence, under every imputer: the
      paired bootstrap interval is above zero. What could not be tried is named;
    - *not supported* if one of these fails;
    - *not applicable* if it is the same for every class and the question is why this
      one;
    - *inconclusive* if imputers disagree on the sign, an interval holds zero, or most
      records cannot be measured at all.

    Failed records are counted and never dropped: where a method ranks nothing, it
    counts as random. Costs, for each record, one explanation by each method, a forward
    pass for each feature and imputer, and what the metrics cost for each method, each
    of `draws` and two more rankings. Each program is compiled once.

    Args:
      model: Maps one example to logits; any JAX function of `(*shared, x, *rest)`.
      explainers: By name, what a method returned, or any function of its form that
        explains `x`: with `shared`, made with `argnums=len(shared)`.
      records: The explained argument with a row for each record; or a tuple of it and
        the model's further arguments, likewise.
      key: A PRNG key.
      shared: Arguments before `x`, the same for all records: a model's parameters.
        Where they hold floats, methods are run with random ones too.
      targets: What is explained: None for the predicted classes, a class, one for each
        record, `[records, 2]` for pairs, or a function of the logits.
      class_specific: Whether the question is why this class and no other.
      groups: The number of the feature that each element of `x` belongs to, as for
        `xv.feature_ablation`; `xv.patches(shape, 4)` of an image. By default every
        element, or token.
      positions: The feature of each position that attention methods score, int
        `[positions]`, -1 for none, as for a class token. By default positions are the
        features.
      padding: Which features a record only has to fill it up, bool `[records,
        features]`, for texts of one length. A method must give them nothing.
      imputers: What takes the place of absent features: at least two of
        `xv.metrics.imputers`. By default zeros and the input's mean; of tokens, the
        mean of its embeddings.
      metrics: `xv.metrics.abpc`, `comprehensiveness` and others that need a model, an
        input and scores, made with options by `functools.partial`. The two named are
        evidence, and always there; others are shown.
      slices: A label for each record, such as its class. Verdicts of slices are
        corrected for their number, after Holm.
      draws: Random rankings of each record, at least 20.
      resamples: Of the bootstrap.
      level: Of the intervals.
      share: Of a slice's absolute scores; a feature that carries more is raised,
      times: if it is this many times what it carries in the other records.
      microbatch: Records computed at once.
      progress: Called with the name of what is computed next.

    Returns:
      The comparison.

    Raises:
      ValueError: If the call does not fit, or a method's scores have another form.

    >>> weights = jnp.array([[3.0, 0.0], [0.0, 2.0], [0.5, 0.0], [0.0, 0.1]])
    >>> model = lambda x: jnp.square(x) @ weights
    >>> x = jax.random.normal(jax.random.key(0), (32, 4))
    >>> explainers = {"exact": lambda x, target=None, key=None: Attribution(
    ...     scores=jnp.square(x) * weights[:, target], output=model(x)[target])}
    >>> found = compare(model, explainers, x, targets=0, key=jax.random.key(1))
    >>> found.methods["exact"].word
    'supported'
    """
    if progress is None:
        progress = lambda _: None
    _check(explainers, draws, resamples, level)
    problem, logits = _problem(
        model, records, shared, targets, groups, positions, padding, key, microbatch
    )
    members = _members(slices, problem.count)
    used = _imputers(imputers, problem)
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())

    classes = logits.shape[1] if logits.ndim == 2 else 0
    others = _other_classes(problem, classes, random) if class_specific else None
    chance = _at_random(problem)
    explained = {}
    for name, explain in explainers.items():
        progress(name)
        explained[name] = measuring.explained(explain, problem, others, chance)

    scores = np.stack([each.scores for each in explained.values()], axis=1)
    luck = random.standard_normal((problem.count, draws, problem.features))
    luck = luck.astype(np.float32)
    judge = Judge(
        problem=problem,
        explained=explained,
        members=members,
        class_specific=class_specific,
        draws=draws,
        level=level,
        random=random,
        resamples=resamples,
    )
    free = []
    for imputer in used:
        progress(f"leave one out, {imputer.name}")
        ceiling = measuring.left_out(problem, imputer)
        # What a place is worth in the other records, and nothing of this one.
        place = (ceiling.sum(axis=0) - ceiling) / (problem.count - 1)
        rankings = np.concatenate(
            [scores, luck, place[:, None], ceiling[:, None]], axis=1
        )
        for factory in _factories(metrics):
            metric, imputes = _made(factory, problem, imputer, classes)
            # Without an imputer it is the same under each.
            if not imputes and metric.name in free:
                continue
            free += [] if imputes else [metric.name]
            progress(f"{metric.name}, {imputer.name}")
            values, reasons = measuring.measured(problem, metric, rankings)
            judge.add(metric, imputer.name if imputes else None, values, reasons)

    return Comparison(
        methods=judge.methods(share, times),
        summaries=judge.summaries,
        tests=judge.tests,
        agreement=judge.agreement(),
        settings={
            "records": problem.count,
            "features": problem.features,
            "class_specific": class_specific,
            "targets": _said(targets),
            "explainers": {name: described(each) for name, each in explainers.items()},
            "evidence": list(EVIDENCE),
            "metrics": list(dict.fromkeys(each.metric for each in judge.summaries)),
            "imputers": [each.name for each in used],
            "controls": list(CONTROLS),
            "ceiling": CEILING,
            "slices": {name: int(each.sum()) for name, each in members.items()},
            "draws": draws,
            "resamples": resamples,
            "level": level,
            "microbatch": microbatch,
            "key": np.asarray(jax.random.key_data(key)).ravel().tolist(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        },
    )


def _check(
    explainers: Mapping[str, Callable], draws: int, resamples: int, level: float
) -> None:
    taken = {*CONTROLS, CEILING}
    if not explainers or taken & set(explainers):
        raise ValueError(
            f"`explainers` has at least one method, and none called {sorted(taken)}; "
            f"got {list(explainers)}"
        )
    if draws < _LEAST_DRAWS:
        raise ValueError(f"`draws` is at least {_LEAST_DRAWS}, got {draws}")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"`resamples` is positive and `level` between 0 and 1, got {resamples} and "
            f"{level}"
        )


def _problem(
    model: Callable,
    records: Any,
    shared: Sequence[Any],
    targets: Any,
    groups: Any,
    positions: Any,
    padding: Any,
    key: Any,
    microbatch: int,
) -> tuple[Problem, np.ndarray]:
    """The problem, and the model's logits of all records."""
    args = records if isinstance(records, tuple) else (records,)
    args = jax.tree.map(np.asarray, args)
    counts = {len(leaf) for leaf in jax.tree.leaves(args) if leaf.ndim}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            "`records` have one and the same number of rows, at least two, got "
            f"{sorted(counts)}"
        )
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), args[0])
    labels = labelled(first, groups)
    features = 1 + max(int(leaf.max()) for leaf in jax.tree.leaves(labels))
    known = None
    if positions is not None:
        known = np.asarray(positions)
        whole = set(np.unique(known)) - {-1} == set(range(features))
        if known.ndim != 1 or not np.issubdtype(known.dtype, np.integer) or not whole:
            raise ValueError(
                f"`positions` are the numbers of {features} features, or -1, one for "
                f"each position; got {known.tolist()[:20]}"
            )
    count = counts.pop()
    filler = None if padding is None else np.asarray(padding)
    if filler is not None and (filler.shape, filler.dtype) != ((count, features), bool):
        raise ValueError(
            f"`padding` is bool{[count, features]}, of each record's features, got "
            f"{filler.dtype}{list(filler.shape)}"
        )
    problem = Problem(
        model=model,
        shared=tuple(shared),
        args=args,
        count=count,
        targets=None,
        question=targets if callable(targets) else None,
        labels=labels,
        features=features,
        positions=known,
        padding=filler,
        key=attribution.require_key(key, "compare"),
        microbatch=microbatch,
    )

    def forward(*args: Any) -> Any:
        _, *shared, row = args
        return problem.model(*shared, *row["args"])

    logits = np.asarray(problem.run(forward, problem.rows()).attribution)
    if not callable(targets):
        chosen = _targets(targets, logits)
        problem = dataclasses.replace(problem, targets=chosen)
    return problem, logits


def _targets(targets: Any, logits: np.ndarray) -> np.ndarray | None:
    """A class or a pair for each record; None of a model of one output."""
    if logits.ndim == 1 and targets is None:
        return None
    if logits.ndim != 2:
        raise ValueError(
            "the model must return logits of shape (classes,) for one example, got "
            f"{logits.shape[1:]}; use a callable target for any other output"
        )
    count, classes = logits.shape
    if targets is None:
        return logits.argmax(axis=1).astype(np.int32)
    chosen = np.asarray(targets)
    if chosen.ndim == 0:
        chosen = np.full(count, chosen)
    fits = chosen.shape in ((count,), (count, 2))
    if not fits or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(
            f"`targets` are None, a class, `[{count}]` classes, `[{count}, 2]` pairs "
            f"or a function, got {chosen.dtype}{list(chosen.shape)}"
        )
    if chosen.min() < 0 or chosen.max() >= classes:
        raise ValueError(
            f"`targets` are classes from 0 to {classes - 1}, got {chosen.min()} to "
            f"{chosen.max()}"
        )
    return chosen.astype(np.int32)


def _said(targets: Any) -> str:
    """What is explained, in words."""
    if targets is None:
        return "the predicted classes"
    if callable(targets):
        return "a function of the logits"
    shape = np.shape(targets)
    return f"class {targets}" if not shape else f"given, {list(shape)}"


def _other_classes(
    problem: Problem, classes: int, random: np.random.Generator
) -> np.ndarray | None:
    """Another class for each of the first records, if there are such."""
    if problem.targets is None or problem.targets.ndim != 1 or classes < 2:
        return None
    own = problem.targets[: measuring.PROBES]
    moved = random.integers(1, classes, len(own), dtype=np.int32)
    return ((own + moved) % classes).astype(np.int32)


def _at_random(problem: Problem) -> tuple[Any, ...] | None:
    """The shared arguments with the entries of every array of floats shuffled."""
    leaves = map(jnp.asarray, jax.tree.leaves(problem.shared))
    if not any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        return None
    return shuffled(problem.shared, "permute", jax.random.fold_in(problem.key, 0))


def _imputers(given: Sequence[Imputer] | None, problem: Problem) -> list[Imputer]:
    make = metrics.imputers
    if given is None:
        if problem.of_tokens:
            mean = make.baseline(baselines.mean(0), name="mean")
            return [make.baseline(name="zeros"), mean]
        return [make.baseline(name="zeros"), make.mean()]
    names = {each.name for each in map(make.check, given)}
    if len(names) < 2 or len(names) < len(given):
        raise ValueError(
            "`imputers` are at least two, of different names, since one alone may "
            f"decide the winner; got {[each.name for each in given]}"
        )
    return list(given)


def _factories(given: Sequence[Callable[..., Metric]] | None) -> list[Callable]:
    evidence = [metrics.abpc, metrics.comprehensiveness]
    if given is None:
        return [*evidence, metrics.sufficiency, metrics.sparseness]
    names = {_name(factory) for factory in given}
    return [each for each in evidence if each.__name__ not in names] + list(given)


def _name(factory: Any) -> str:
    return getattr(factory, "func", factory).__name__


def _made(
    factory: Callable[..., Metric], problem: Problem, imputer: Imputer, classes: int
) -> tuple[Metric, bool]:
    """The metric, and whether it uses the imputer."""
    known = inspect.signature(factory).parameters
    options = {"argnums": problem.argnum, "groups": problem.labels, "imputer": imputer}
    # One output has no probability.
    if classes < 2 or problem.targets is None:
        options["output"] = "logit"
    set_ = getattr(factory, "keywords", {})
    options = {k: v for k, v in options.items() if k in known and k not in set_}
    metric = factory(problem.model, **options)
    if asked := metric.needs - {"key", "signed", "image"}:
        raise ValueError(
            f"`compare` measures scores alone: {metric.name} needs {sorted(asked)}"
        )
    return metric, "imputer" in options


def _members(slices: Any, count: int) -> dict[str, np.ndarray]:
    """Which records each slice has."""
    if slices is None:
        return {}
    labels = np.asarray(slices)
    if labels.shape != (count,):
        raise ValueError(
            f"`slices` has a label for each of {count} records, got {labels.shape}"
        )
    found = {str(each): labels == each for each in np.unique(labels)}
    small = [name for name, each in found.items() if each.sum() < 2]
    if small:
        raise ValueError(f"each slice has at least two records, not so {small}")
    return found
