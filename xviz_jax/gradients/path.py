"""Path methods: a gradient, integrated along a path from a baseline to the input.

Integrated gradients and its kin differ in the path, a function

    path(x, begin, alpha) -> point

of pytrees of float32 and a scalar, which is `begin` at 0 and `x` at 1 and can be
differentiated by alpha. `explainer` makes the method of it:

    explainer(model, straight, quadrature=Adaptive(tolerance=0.01, ...))

Whoever has another integrand (of a layer, say) takes the pieces: `along` makes an
`integrand.Integrand`, `Adaptive.integrate` or `Fixed.integrate` integrates one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import attribution
from xviz_jax.attribution import At, Attribution, Question, Target
from xviz_jax.gradients.adaptive import FIRST, Adaptive, Walk
from xviz_jax.gradients.integrand import (
    Integrand,
    integrate_fixed,
    judge,
    norm_of,
    total_of,
)
from xviz_jax.gradients.quadrature import embedded_weights, rule_nodes

Path = Callable[[Any, Any, jax.Array], Any]


def straight(x: Any, begin: Any, alpha: jax.Array) -> Any:
    """The straight line, exact at both ends."""
    return jax.tree.map(lambda a, b: (1 - alpha) * b + alpha * a, x, begin)


def along(
    path: Path, scalar: Callable[[Any], jax.Array], x: Any, begin: Any
) -> Integrand:
    """What each element of the input adds to the change of a scalar along a path.

    Args:
      path: The path.
      scalar: The explained scalar of an input, in its own dtypes.
      x: The input, where the path ends.
      begin: The baseline, where it starts.

    Returns:
      An integrand: the scalar, and its gradient times the path's velocity.
    """
    wide = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    end, start = wide(x), wide(begin)

    def integrand(alpha: jax.Array) -> tuple[jax.Array, Any]:
        point, velocity = jax.jvp(
            lambda alpha: path(end, start, alpha), (alpha,), (jnp.ones_like(alpha),)
        )
        point = jax.tree.map(lambda p, leaf: p.astype(leaf.dtype), point, x)
        value, slope = jax.value_and_grad(scalar)(point)
        return value, jax.tree.map(jnp.multiply, velocity, wide(slope))

    return integrand


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
    """Integrates along a path with the nodes of a rule.

    Attributes:
      rule: Where the nodes lie; see `quadrature.rule_nodes`.
      steps: How many there are.
      chunk: Nodes evaluated at once.
      tolerance: Estimated relative error below which the result has converged.
    """

    rule: str
    steps: int
    chunk: int
    tolerance: float

    def __post_init__(self) -> None:
        """Checks the options."""
        rule_nodes(self.rule, self.steps)
        integer = isinstance(self.chunk, int) and not isinstance(self.chunk, bool)
        if not integer or not 1 <= self.chunk <= self.steps:
            raise ValueError(
                f"`chunk` is an integer from 1 to {self.steps} steps, got "
                f"{self.chunk!r}"
            )

    def integrate(self, integrand: Integrand, like: Any) -> tuple[Any, jax.Array]:
        """The integral, and how far it is from that of half of its nodes (L1)."""
        nodes, weights = rule_nodes(self.rule, self.steps)
        both = np.stack([weights, embedded_weights(self.rule, self.steps)])
        sums = integrate_fixed(integrand, like, nodes, both, self.chunk)
        whole, half = (jax.tree.map(lambda s, i=i: s[i], sums) for i in (0, 1))
        return whole, norm_of(jax.tree.map(jnp.subtract, whole, half))


def explainer(
    model: Callable,
    path: Path,
    *,
    quadrature: Adaptive | Fixed,
    baseline: Any = None,
    at: At = None,
    argnums: int | Sequence[int] = 0,
) -> Callable[..., Attribution]:
    """Makes a path method of a path.

    Args:
      model: Maps one example to logits.
      path: Where the gradient is taken.
      quadrature: How it is integrated.
      baseline: Where the path starts, as for `integrated_gradients`.
      at: The site that is explained, in place of the argument.
      argnums: Which positional arguments are explained.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution` with the diagnostics of
      `integrated_gradients`. An adaptive one has further methods, which a host that
      explains many inputs calls between evaluations; see `Stepwise`.
    """
    asked = _Asked(model, path, baseline, at, argnums)
    if isinstance(quadrature, Adaptive):
        return Stepwise(asked, quadrature)

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        problem = asked.pose(args)
        output, held = problem.hold(target)
        integrand = problem.integrand(target, held)
        vector, error = quadrature.integrate(integrand, problem.question.x)
        begin_output = problem.begin_output(target, held)
        estimate, converged = judge(
            vector,
            error,
            begin_output,
            output,
            resolution=problem.resolution(target),
            tolerance=quadrature.tolerance,
        )
        return problem.answer(
            vector,
            output,
            begin_output,
            evaluations=jnp.int32(quadrature.steps * problem.paths),
            estimate=estimate,
            converged=converged,
        )

    return explain


@dataclasses.dataclass(frozen=True, eq=False)
class Stepwise:
    """An adaptive path method: explains one example, at once or step by step.

    `explain(*args)` is `finish(state, *args)` of a `state = start(*args)` that went
    through `state = step(state, *args)` while `running(state)` held. All take the
    same arguments as `explain` and may be under `jit` and `vmap`. A step evaluates
    the next `chunk` nodes, whichever round they belong to, so inputs in different
    places of their paths share a batch.
    """

    asked: "_Asked"
    quadrature: Adaptive

    def __call__(
        self, *args: Any, target: Target = None, key: Any = None
    ) -> Attribution:
        """Explains one example."""
        del key
        problem = self.asked.pose(args)
        output, held = problem.hold(target)
        quadrature = self._fit(problem, target)
        walk = quadrature.integrate(problem.integrand(target, held), problem.question.x)
        return self._answer(problem, output, walk)

    def start(self, *args: Any, target: Target = None, key: Any = None) -> Any:
        """One forward pass: the output, the held class, and an empty walk."""
        del key
        problem = self.asked.pose(args)
        output, held = problem.hold(target)
        walk = self._fit(problem, target).start(problem.question.x)
        return output, held, walk

    def step(
        self, state: Any, *args: Any, target: Target = None, key: Any = None
    ) -> Any:
        """Evaluates the next nodes of the path."""
        del key
        output, held, walk = state
        problem = self.asked.pose(args)
        integrand = problem.integrand(target, held)
        return output, held, self._fit(problem, target).step(integrand, walk)

    def running(self, state: Any) -> jax.Array:
        """Whether another step is needed."""
        return state[2].running

    def finish(
        self, state: Any, *args: Any, target: Target = None, key: Any = None
    ) -> Attribution:
        """The explanation as it is now."""
        del target, key
        return self._answer(self.asked.pose(args), state[0], state[2])

    def _fit(self, problem: "_Problem", target: Target) -> Adaptive:
        """The quadrature, for this many baselines and this kind of output."""
        most = self.quadrature.max_evaluations // problem.paths
        if most < FIRST:
            raise ValueError(
                f"{problem.paths} baselines take at least {problem.paths * FIRST} "
                f"evaluations, got `max_evaluations` of "
                f"{self.quadrature.max_evaluations}"
            )
        return dataclasses.replace(
            self.quadrature,
            max_evaluations=most,
            chunk=min(self.quadrature.chunk, most),
            resolution=problem.resolution(target),
        )

    def _answer(
        self, problem: "_Problem", output: jax.Array, walk: Walk
    ) -> Attribution:
        return problem.answer(
            walk.total(),
            output,
            walk.values[0],
            evaluations=walk.evaluations * problem.paths,
            estimate=walk.estimate,
            converged=walk.converged,
        )


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What a path method was made with."""

    model: Callable
    path: Path
    baseline: Any
    at: At
    argnums: int | Sequence[int]

    def pose(self, args: Sequence[Any]) -> "_Problem":
        question = attribution.ask(self.model, args, self.argnums, self.at)
        return _Problem(question, self.path, _starts(self.baseline, question))


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What is explained of one example, and from where.

    Attributes:
      question: The input and the model of it.
      path: The path.
      begins: Baselines, a pytree like the input with a leading axis.
    """

    question: Question
    path: Path
    begins: Any

    @property
    def paths(self) -> int:
        return len(jax.tree.leaves(self.begins)[0])

    def hold(self, target: Target) -> tuple[jax.Array, Target]:
        """The explained scalar, and the predicted class where no target was given."""
        logits = self.question.model(self.question.x)
        held = attribution.hold(target, logits)
        output = attribution.explained(held, logits)
        return output, held if target is None else None

    def scalar(self, target: Target, held: Target) -> Callable[[Any], jax.Array]:
        fixed = tuple(target) if isinstance(target, list) else target
        if fixed is None:
            fixed = held
        return lambda x: attribution.explained(fixed, self.question.model(x))

    def integrand(self, target: Target, held: Target) -> Integrand:
        """The mean over baselines of what each element adds."""
        scalar, x = self.scalar(target, held), self.question.x

        def mean(alpha: jax.Array) -> tuple[jax.Array, Any]:
            each = lambda begin: along(self.path, scalar, x, begin)(alpha)
            return _mean(each, self.begins)

        return mean

    def begin_output(self, target: Target, held: Target) -> jax.Array:
        """The mean of the explained scalar over baselines."""
        return _mean(self.scalar(target, held), self.begins)

    def resolution(self, target: Target) -> float:
        """The coarsest relative rounding among the input's and the output's dtypes."""
        leaves = jax.tree.leaves(self.question.x)
        if not callable(target):
            leaves = [*leaves, jax.eval_shape(self.question.model, self.question.x)]
        return max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)

    def answer(
        self,
        vector: Any,
        output: jax.Array,
        begin_output: jax.Array,
        *,
        evaluations: jax.Array,
        estimate: jax.Array,
        converged: jax.Array,
    ) -> Attribution:
        change = output - begin_output
        absolute = jnp.abs(total_of(vector) - change)
        # Below this, the change of the output is rounding, and so is the gap.
        rounding = jnp.finfo(jnp.float32).eps * jnp.maximum(
            jnp.abs(output), jnp.abs(begin_output)
        )
        floor = jnp.maximum(rounding, jnp.finfo(jnp.float32).tiny)
        return Attribution(
            scores=self.question.scores(vector),
            output=output,
            diagnostics={
                "error_estimate": estimate,
                "completeness_gap": absolute / jnp.maximum(jnp.abs(change), floor),
                "absolute_gap": absolute,
                "baseline_output": begin_output,
                "evaluations": evaluations,
                "converged": converged,
            },
        )


def _mean(function: Callable[[Any], Any], rows: Any) -> Any:
    """The function's mean over rows; one alone is not batched."""
    if len(jax.tree.leaves(rows)[0]) == 1:
        return function(jax.tree.map(lambda leaf: leaf[0], rows))
    found = jax.vmap(function)(rows)
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), found)


def _starts(baseline: Any, question: Question) -> Any:
    """Baselines as rows: of one, or of a stack of them."""
    if isinstance(baseline, attribution.Beginning):
        baseline = baseline.of(question)
    if callable(baseline):
        baseline = baseline(question.x)
    leaves = jax.tree.leaves(baseline)
    tokens = leaves and jnp.issubdtype(jnp.asarray(leaves[0]).dtype, jnp.integer)
    like = question.tokens if tokens and question.embed is not None else question.x
    if _stacked(baseline, like):
        return jax.vmap(lambda row: attribution.start(row, question))(baseline)
    one = attribution.start(baseline, question)
    return jax.tree.map(lambda leaf: leaf[None], one)


def _stacked(baseline: Any, like: Any) -> bool:
    """Whether every leaf has one axis more than the input's, in front."""
    if jax.tree.structure(baseline) != jax.tree.structure(like):
        return False
    pairs = zip(jax.tree.leaves(baseline), jax.tree.leaves(like), strict=True)
    shapes = [(jnp.shape(begin), leaf.shape) for begin, leaf in pairs]
    counts = {begin[:1] for begin, _ in shapes}
    fits = all(begin[1:] == leaf and len(begin) > len(leaf) for begin, leaf in shapes)
    return fits and len(counts) == 1 and counts != {(0,)}
