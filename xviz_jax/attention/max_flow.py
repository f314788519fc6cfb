"""Maximum flows through layers of edges, by push-relabel (Goldberg and Tarjan, 1988).

Widths are rounded down to integers, so that pushes are exact, in any order, and end.
What was found is a flow for the widths as they were, and so a lower bound; the cut
that it fills gives an upper bound. Both meet but for the rounding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xviz_jax import chunks

# Of a width of 1; sums of what a row of width 1 sends stay far below the largest int32.
_UNIT = 2**29
_FULL = 2**30 - 1
_FAR = 2**30


class _Network(NamedTuple):
    """Edges between the layers that are neither top nor bottom, first layer lowest.

    Attributes:
      between: int32 `[depth - 2, above, below]`.
      into: Edges from the lowest of these layers to the sink, int32 `[length]`.
    """

    between: jax.Array
    into: jax.Array


class _State(NamedTuple):
    """A preflow.

    Attributes:
      sent: On each edge, int32, shaped like `between`.
      out: On each edge into the sink, int32 `[length]`.
      excess: What came to a position and has not left, int32 `[depth - 1, length]`.
      far: How many edges that are not full lead to the sink, int32, shaped likewise.
    """

    sent: jax.Array
    out: jax.Array
    excess: jax.Array
    far: jax.Array


def from_position(
    widths: jax.Array, own: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """The largest flow from one position at the top to each at the bottom, by itself.

    Args:
      widths: Of the edges of each layer, first layer first, float32
        `[depth, above, below]`, from 0 to 1; those from a position sum to 1 at most.
      own: Which position, one-hot, float32 `[length]`.
      chunk: How many flows are found at once.

    Returns:
      An upper and a lower bound, each float32 `[length]`; not a number where a width
      or `own` is none.
    """
    # 1, or not a number.
    known = 1 + 0 * (jnp.sum(widths) + jnp.sum(own))
    widths, own = jnp.nan_to_num(widths), jnp.nan_to_num(own)
    begin = jnp.sum(own[:, None] * widths[-1], axis=0)
    if len(widths) == 1:
        return known * begin, known * begin
    middle, last = widths[1:-1], widths[0]
    bound = lambda column: _bounds(begin, middle, column)
    upper, lower = chunks.each(bound, last.T, chunk)
    return known * upper, known * lower


def _bounds(
    begin: jax.Array, middle: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of the flow from what enters the highest layer between, to one sink."""
    whole = lambda width: jnp.floor(width * _UNIT).astype(jnp.int32)
    network = _Network(whole(middle), whole(last))
    length = len(last)
    excess = _filled(jnp.broadcast_to(network.into, (len(middle), length)), 0)
    excess = jnp.concatenate([excess, whole(begin)[None]])
    sent, out = _filled(network.between, 0), _filled(network.into, 0)
    # Nothing moves in the first turn, which finds how far it is.
    start = _State(sent, out, excess, 0 * excess)

    def turn(state: _State) -> _State:
        state = _push_up(network, _push_down(network, state))
        return state._replace(far=_distances(network, state.sent, state.out))

    # It ends: a position that keeps some has filled its shortest ways, and gets farther
    # off, which is bounded; where none keeps any, all have come nearer to the sink.
    active = lambda state: jnp.any((state.excess > 0) & (state.far < _FAR))
    state = jax.lax.while_loop(active, turn, start)
    # What cannot reach the sink any more lies on the source's side of the cut.
    near = state.far < _FAR
    cut = jnp.sum(jnp.where(near[-1], begin, 0))
    cut += jnp.sum(jnp.where(~near[1:, :, None] & near[:-1, None], middle, 0))
    cut += jnp.sum(jnp.where(~near[0], last, 0))
    return cut, jnp.sum(state.out).astype(jnp.float32) / _UNIT


def _push_down(network: _Network, state: _State) -> _State:
    """Pushes to the layer below, from the highest layer to the sink."""

    def through(arrived: jax.Array, layer: tuple) -> tuple:
        room, excess, far, below = layer
        excess = excess + arrived
        room = jnp.where(far[None] == below[:, None] + 1, room.T, 0)
        amounts = _amounts(excess, room)
        return jnp.sum(amounts, axis=1), (amounts.T, excess - jnp.sum(amounts, axis=0))

    room = network.between - state.sent
    arrived, (amounts, left) = jax.lax.scan(
        through,
        _filled(network.into, 0),
        (room, state.excess[1:], state.far[1:], state.far[:-1]),
        reverse=True,
    )
    lowest = state.excess[0] + arrived
    room = jnp.where(state.far[0] == 1, network.into - state.out, 0)
    last = jnp.minimum(lowest, room)
    return state._replace(
        sent=state.sent + amounts,
        out=state.out + last,
        excess=jnp.concatenate([(lowest - last)[None], left]),
    )


def _push_up(network: _Network, state: _State) -> _State:
    """Pushes back to the layer above what had come from there, lowest layer first."""

    def through(arrived: jax.Array, layer: tuple) -> tuple:
        sent, excess, far, above = layer
        excess = excess + arrived
        amounts = _amounts(excess, jnp.where(far[None] == above[:, None] + 1, sent, 0))
        return jnp.sum(amounts, axis=1), (amounts, excess - jnp.sum(amounts, axis=0))

    arrived, (amounts, left) = jax.lax.scan(
        through,
        _filled(network.into, 0),
        (state.sent, state.excess[:-1], state.far[:-1], state.far[1:]),
    )
    return state._replace(
        sent=state.sent - amounts,
        excess=jnp.concatenate([left, (state.excess[-1] + arrived)[None]]),
    )


def _amounts(excess: jax.Array, room: jax.Array) -> jax.Array:
    """Fills edges one after another, int32 `[to, from]`, until nothing is left."""
    before = jax.lax.associative_scan(lambda a, b: jnp.minimum(a + b, _FULL), room)
    before = jnp.pad(before[:-1], ((1, 0), (0, 0)))
    return jnp.clip(excess[None] - before, 0, room)


def _filled(like: jax.Array, value: int) -> jax.Array:
    """An array of one value, batched and sharded as another is, as loops require."""
    return 0 * like + value


def _distances(network: _Network, sent: jax.Array, out: jax.Array) -> jax.Array:
    """How many edges with room lead to the sink at least, `[depth - 1, length]`."""
    down, up = network.between > sent, sent > 0
    direct = jnp.where(network.into > out, _filled(out, 1), _FAR)[None]

    def climb(below: jax.Array, layer: tuple) -> tuple:
        far, open_ = layer
        steps = jnp.min(jnp.where(open_, below[None], _FAR), axis=1) + 1
        far = jnp.minimum(far, steps)
        return far, far

    def descend(above: jax.Array, layer: tuple) -> tuple:
        far, open_ = layer
        steps = jnp.min(jnp.where(open_, above[:, None], _FAR), axis=0) + 1
        far = jnp.minimum(far, steps)
        return far, far

    def nearer(far: jax.Array) -> jax.Array:
        _, higher = jax.lax.scan(climb, far[0], (far[1:], down))
        far = jnp.concatenate([far[:1], higher])
        _, lower = jax.lax.scan(descend, far[-1], (far[:-1], up), reverse=True)
        return jnp.concatenate([lower, far[-1:]])

    def turn(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return pair[1], nearer(pair[1])

    far = jnp.concatenate([direct, _filled(network.between[:, 0], _FAR)])
    changed = lambda pair: jnp.any(pair[0] != pair[1])
    return jax.lax.while_loop(changed, turn, (0 * far, far))[1]
