"""Path integrals whose nodes lie where the path needs them.

The path is cut into eight panels, shorter ones near its start: a model that normalises
or saturates changes most where its input is faint. Each has its own trapezoid sum of
the attribution vector, and a panel that is refined takes the midpoints of all its
intervals, which halves the weight of the nodes it had: its sum is enough, no node is
remembered. The panel that promises the most for its cost goes next.

What is still wrong with a panel is told by the larger of two numbers. One is by how
much its vector changed when it was last refined, in the L1 norm. The other sees what
gradients are blind to: by how far the change of the output between neighbouring
nodes is from what the slopes at both say, added up over the panel. On a path of
plateaus and steps all vectors agree, at zero, and the outputs do not. Panels err
independently of each other, so the squares of their errors add.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax.gradients.integrand import (
    Integrand,
    beyond_rounding,
    judge,
    norm_of,
    several,
    total_of,
    weigh,
    zeros_of,
)

_ENDS = np.array([0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1], np.float32)
_WIDTHS = np.diff(_ENDS)
PANELS = len(_WIDTHS)
# The first round: the ends and the middle of every panel, and how far each node is
# from the one before.
_NODES = np.interp(np.arange(0, PANELS + 0.5, 0.5), np.arange(PANELS + 1), _ENDS)
_GAPS = np.diff(_NODES, prepend=0)
FIRST = len(_NODES)
# What is left of a panel's last change once its midpoints are in: two thirds where
# activations kink, a third or less on smooth paths.
_LEFT_OF_CHANGE = 0.8
# What is left of its disagreement of outputs and slopes: of the second order.
_LEFT_OF_BEND = 0.25
# Nodes of a panel that was halved this often are still apart in float32.
_DEEPEST = 18


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """A path integral under way.

    Attributes:
      trapezoid: Sums of the vector, a pytree `[panels, ...]`.
      midpoints: The same of the nodes of the present round.
      values: Outputs at the ends of the panels, `[panels + 1]`.
      slopes: Derivatives along the path there, `[panels + 1]`.
      level: How often each panel was halved, `[panels]`.
      bend: Disagreement of outputs and slopes in the present round, `[panels]`.
      error: What each panel may be wrong by, in units of the output, `[panels]`.
      queue: The panels that are refined in the present round, `[panels]`.
      position: Nodes of the present round that are done.
      previous: Output and slope at the last of them.
      evaluations: Nodes so far.
      estimate: Estimated error of the vector, relative, L1.
      converged: Whether it and the completeness gap are within the tolerance.
      running: Whether there is more to do.
    """

    trapezoid: Any
    midpoints: Any
    values: jax.Array
    slopes: jax.Array
    level: jax.Array
    bend: jax.Array
    error: jax.Array
    queue: jax.Array
    position: jax.Array
    previous: tuple[jax.Array, jax.Array]
    evaluations: jax.Array
    estimate: jax.Array
    converged: jax.Array
    running: jax.Array

    def total(self) -> Any:
        """The integral so far, float32."""
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), self.trapezoid)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Nodes:
    """Nodes that are evaluated together, `[chunk]` or `[panels, chunk]`.

    Attributes:
      alphas: Where they lie.
      count: How many of them are new.
      last: Whether they end the round.
      ends: Their weights in the trapezoid sums.
      middles: Their weights in the midpoint sums.
      at_end: Which of the `[panels + 1]` ends each one is, if any.
      of: The panel whose bend the interval before each one adds to.
      step: The length of that interval; 0 where there is none.
      opens: Whether that interval begins at the panel's end.
      closes: Whether another interval, to the panel's other end, comes after.
    """

    alphas: jax.Array
    count: jax.Array
    last: jax.Array
    ends: jax.Array
    middles: jax.Array
    at_end: jax.Array
    of: jax.Array
    step: jax.Array
    opens: jax.Array
    closes: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Integrates along a path until the vector is known to a relative error.

    A `Walk` begins with `start` and goes on with `step` while it is `running`;
    `integrate` does both. One `step` evaluates `chunk` nodes and is the only place
    where the integrand is evaluated. Memory is that of 17 vectors.

    Attributes:
      tolerance: Relative error of the vector, in the L1 norm, to stop at.
      max_evaluations: Nodes at most.
      chunk: Nodes evaluated at once.
      resolution: The relative rounding of the output, as `jnp.finfo(dtype).eps`.
    """

    tolerance: float
    max_evaluations: int
    chunk: int
    resolution: float = float(jnp.finfo(jnp.float32).eps)

    def __post_init__(self) -> None:
        """Checks the options."""
        number = isinstance(self.tolerance, int | float)
        if not number or not 0 < self.tolerance < 1:
            raise ValueError(f"`tolerance` is between 0 and 1, got {self.tolerance!r}")
        most, chunk = self.max_evaluations, self.chunk
        if isinstance(most, bool) or not isinstance(most, int) or most < FIRST:
            raise ValueError(
                f"`max_evaluations` is an integer from {FIRST} on, got {most!r}"
            )
        if (
            isinstance(chunk, bool)
            or not isinstance(chunk, int)
            or not 0 < chunk <= most
        ):
            raise ValueError(
                f"`chunk` is an integer from 1 to {most} evaluations, got {chunk!r}"
            )

    def integrate(self, integrand: Integrand, like: Any) -> Walk:
        """Walks until the tolerance is met or the evaluations are spent.

        Args:
          integrand: The path.
          like: Arrays shaped like its vector.
        """
        return jax.lax.while_loop(
            lambda walk: walk.running,
            lambda walk: self.step(integrand, walk),
            self.start(like),
        )

    def start(self, like: Any) -> Walk:
        """A walk before its first node; nothing is evaluated."""
        # Made of `like`, so that all lies on its mesh.
        one = jnp.sum(jax.tree.leaves(like)[0])

        def fill(value: Any, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
            return jnp.broadcast_to(jnp.full_like(one, value, dtype), shape)

        return Walk(
            trapezoid=zeros_of(like, PANELS),
            midpoints=zeros_of(like, PANELS),
            values=fill(0, PANELS + 1),
            slopes=fill(0, PANELS + 1),
            level=fill(0, PANELS, dtype=jnp.int32),
            bend=fill(0, PANELS),
            error=fill(0, PANELS),
            queue=fill(True, PANELS, dtype=bool),
            position=fill(0, dtype=jnp.int32),
            previous=(fill(0), fill(0)),
            evaluations=fill(0, dtype=jnp.int32),
            estimate=fill(jnp.inf),
            converged=fill(False, dtype=bool),
            running=fill(True, dtype=bool),
        )

    def step(self, integrand: Integrand, walk: Walk) -> Walk:
        """Evaluates the next nodes, and ends the round with its last."""
        first, later = self._first(walk), self._later(walk)
        opening = walk.evaluations < FIRST
        nodes = jax.tree.map(lambda a, b: jnp.where(opening, a, b), first, later)
        values, vectors = several(integrand, nodes.alphas)
        slopes = jax.vmap(total_of)(vectors)

        sums = weigh(jnp.concatenate([nodes.ends, nodes.middles]), vectors)
        spread = lambda ends, each: ends + _across(nodes.at_end, each)
        ends = spread(walk.values, values), spread(walk.slopes, slopes)
        walk = dataclasses.replace(
            walk,
            trapezoid=jax.tree.map(lambda t, s: t + s[:PANELS], walk.trapezoid, sums),
            midpoints=jax.tree.map(lambda m, s: m + s[PANELS:], walk.midpoints, sums),
            values=ends[0],
            slopes=ends[1],
            bend=walk.bend + self._bends(nodes, walk, values, slopes),
            position=walk.position + nodes.count,
            previous=(values[-1], slopes[-1]),
            evaluations=walk.evaluations + nodes.count,
        )
        settled = self._settle(walk)
        return jax.tree.map(lambda a, b: jnp.where(nodes.last, a, b), settled, walk)

    def _first(self, walk: Walk) -> _Nodes:
        """Nodes of the first round, where panels share their ends."""
        order, count = self._order(walk.position, FIRST)
        new = _count(self.chunk) < count
        panels, ends = _count(PANELS), _count(PANELS + 1)
        # A lookup would ask for one sharding of the batch.
        node = _equal(_count(FIRST), order)
        middles = _equal(2 * panels + 1, order) & new[None]
        touching = _equal(2 * panels, order) | _equal(2 * panels + 2, order)
        never = jnp.zeros(self.chunk, bool)
        return _Nodes(
            alphas=_along(node, jnp.asarray(_NODES, jnp.float32)),
            count=count,
            last=walk.position + count == FIRST,
            ends=_weight(touching & new[None], _WIDTHS[:, None] / 2),
            middles=_weight(middles, _WIDTHS[:, None]),
            at_end=_equal(2 * ends, order) & new[None],
            of=_equal(panels, (order - 1) // 2) & new[None],
            step=_along(node, jnp.asarray(_GAPS, jnp.float32)),
            opens=never,
            closes=never,
        )

    def _later(self, walk: Walk) -> _Nodes:
        """Nodes of a later round: the middles of all intervals of queued panels."""
        counts = jnp.where(walk.queue, _cost(walk.level), 0)
        ends = jnp.cumsum(counts, dtype=jnp.int32)
        order, count = self._order(walk.position, ends[-1])
        new = _count(self.chunk) < count
        begins = ends - counts
        owner = (order[None] >= begins[:, None]) & (order[None] < ends[:, None])
        pick = lambda each: _along(owner, each)
        index = order - pick(begins)
        step = pick(_WIDTHS * _share(walk.level))
        opens = index == 0
        return _Nodes(
            alphas=pick(jnp.asarray(_ENDS[:-1]))
            + (index.astype(jnp.float32) + 0.5) * step,
            count=count,
            last=walk.position + count == ends[-1],
            ends=jnp.zeros((PANELS, self.chunk), jnp.float32),
            middles=_weight(owner & new[None], step[None]),
            at_end=jnp.zeros((PANELS + 1, self.chunk), bool),
            of=owner & new[None],
            step=jnp.where(opens, step / 2, step),
            opens=opens,
            closes=index == pick(counts) - 1,
        )

    def _order(self, position: jax.Array, size: Any) -> tuple[jax.Array, jax.Array]:
        """Numbers of the next nodes of a round, and how many are new."""
        count = jnp.minimum(size - position, self.chunk)
        # Beyond the round, its last node again, which is as finite as there.
        return position + jnp.minimum(_count(self.chunk), count - 1), count

    def _bends(
        self, nodes: _Nodes, walk: Walk, values: jax.Array, slopes: jax.Array
    ) -> jax.Array:
        """How far outputs and slopes disagree on the new intervals, by panel."""

        def bend(left: Any, right: Any, step: jax.Array) -> jax.Array:
            found = right[0] - left[0] - step * (left[1] + right[1]) / 2
            return beyond_rounding(found, left[0], right[0], self.resolution)

        def before(last: jax.Array, each: jax.Array, edge: jax.Array) -> jax.Array:
            shifted = jnp.append(last, each[:-1])
            return jnp.where(nodes.opens, _along(nodes.of, edge[:-1]), shifted)

        here = (values, slopes)
        left = (
            before(walk.previous[0], values, walk.values),
            before(walk.previous[1], slopes, walk.slopes),
        )
        right = (
            _along(nodes.of, walk.values[1:]),
            _along(nodes.of, walk.slopes[1:]),
        )
        # Middles lie half an interval from the panel's ends.
        width = jnp.where(nodes.opens, nodes.step, nodes.step / 2)
        found = jnp.where(nodes.step > 0, bend(left, here, nodes.step), 0.0)
        found = found + jnp.where(nodes.closes, bend(here, right, width), 0.0)
        return _across(nodes.of, found)

    def _settle(self, walk: Walk) -> Walk:
        """Takes the midpoints in, judges the result, and queues the next panels."""
        change = jax.tree.map(lambda m, t: (m - t) / 2, walk.midpoints, walk.trapezoid)
        moved = _LEFT_OF_CHANGE * jax.vmap(norm_of)(change)
        found = jnp.maximum(moved, _LEFT_OF_BEND * walk.bend)

        def take(total: jax.Array, each: jax.Array) -> jax.Array:
            queue = walk.queue.reshape(-1, *(1,) * (each.ndim - 1))
            return total + jnp.where(queue, each, 0)

        trapezoid = jax.tree.map(take, walk.trapezoid, change)
        walk = dataclasses.replace(
            walk,
            trapezoid=trapezoid,
            midpoints=jax.tree.map(jnp.zeros_like, walk.midpoints),
            level=walk.level + walk.queue.astype(jnp.int32),
            bend=jnp.zeros_like(walk.bend),
            error=jnp.where(walk.queue, found, walk.error),
            position=jnp.zeros_like(walk.position),
        )
        estimate, converged = judge(
            walk.total(),
            jnp.sqrt(jnp.sum(walk.error**2)),
            walk.values[0],
            walk.values[-1],
            resolution=self.resolution,
            tolerance=self.tolerance,
        )
        queue = self._next(walk)
        # What is not finite now never will be.
        hopeless = ~jnp.isfinite(estimate) | ~jnp.any(queue)
        return dataclasses.replace(
            walk,
            queue=queue,
            estimate=estimate,
            converged=converged,
            running=~converged & ~hopeless,
        )

    def _next(self, walk: Walk) -> jax.Array:
        """The panels of the next round: the best for their cost, up to a chunk."""
        cost, left = _cost(walk.level), self.max_evaluations - walk.evaluations
        possible = (cost <= left) & (walk.level < _DEEPEST)
        worth = walk.error * _share(walk.level)
        worth = jnp.where(possible, worth, -1.0)
        number = _count(PANELS)
        better = worth[:, None] > worth[None]
        earlier = (worth[:, None] == worth[None]) & (number[:, None] <= number[None])
        ahead = better | earlier
        spent = _along(ahead, cost)
        best = _along(ahead, jnp.ones_like(cost)) == 1
        return possible & (best | (spent <= jnp.minimum(self.chunk, left)))


def _count(number: int) -> jax.Array:
    return jnp.arange(number, dtype=jnp.int32)


def _cost(level: jax.Array) -> jax.Array:
    """How many nodes halve every interval of a panel."""
    return jnp.left_shift(jnp.int32(1), level)


def _share(level: jax.Array) -> jax.Array:
    """The length of a panel's intervals, of the panel's."""
    return jnp.float32(0.5) ** level.astype(jnp.float32)


def _weight(chosen: jax.Array, weight: Any) -> jax.Array:
    return jnp.where(chosen, jnp.broadcast_to(weight, chosen.shape), jnp.float32(0))


def _equal(rows: jax.Array, columns: jax.Array) -> jax.Array:
    return rows[:, None] == columns[None]


def _across(chosen: jax.Array, each: jax.Array) -> jax.Array:
    """Sums over nodes: `[rows]` from `[rows, nodes]` and `[nodes]`."""
    return jnp.sum(jnp.where(chosen, each[None], 0), axis=1, dtype=each.dtype)


def _along(chosen: jax.Array, each: jax.Array) -> jax.Array:
    """The chosen row's entry for each node: `[nodes]`."""
    return jnp.sum(jnp.where(chosen, each[:, None], 0), axis=0, dtype=each.dtype)
