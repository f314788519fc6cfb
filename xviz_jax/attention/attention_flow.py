"""Attention flow (Abnar and Zuidema, 2020, arXiv 2005.00928)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks
from xviz_jax.attention import joint, layers, masking, max_flow, queries, rows, stack
from xviz_jax.attention.attention_rollout import Heads, check_heads
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.sites import readable, self_attention
from xviz_jax.attention.steps import Step
from xviz_jax.attention.streams import Naming, several
from xviz_jax.attribution import Attribution, Target
from xviz_jax.tracing.program import trace

# Of sequences, each after so many of the layers that write to it.
_Slices = dict[tuple[str, int], slice]


def attention_flow(
    model: Callable,
    *,
    query: joint.Query = 0,
    heads: Heads = "mean",
    residual: float = 0.5,
    start_layer: int = 0,
    chunk: int = 16,
    streams: Naming | None = None,
) -> Callable[..., Attribution]:
    """How much could flow from a position to each input, if attention were pipes.

    The layers are a network: from each position of a layer to each of the one below
    leads an edge, as wide as attention with its residual connection. A score is the
    maximum flow from the explained position at the top to one input, each input
    alone: where rollout multiplies along a path and adds up paths, a path here carries
    what its narrowest edge lets through, and paths share edges. Class-blind. Never
    negative; scores are divided by their sum, and so add up to one. Costs one forward
    pass, and to each input a flow by tens of sweeps over all maps, or a hundred where
    they are causal, `chunk` inputs at once: memory grows with
    `chunk * depth * length ** 2`, and time with `depth * length ** 3`. For short
    sequences; `attention_rollout` is for longer ones. Computes in float32; flows are
    found in integers, and so to the end.

    With cross-attention the network is of the positions of all sequences, and `length`
    is theirs together, an earlier state of one that is read later included; what a
    layer does not write to goes through it as it is.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing.
      query: The position that is explained: 0 for a class token, -1 for the last
        token of a decoder. May be traced. Weights of rows, float `[length]`, `mean` or
        `pooled` as for `attention_rollout`: a position whose edges are the rows'
        weighted mean. None for all of them, padding's zero, at as many times the cost.
        Where the output is read from several sequences, any of these for one of them,
        by its name: `{name: position}`.
      heads: How heads are fused: `mean`, `max` or `min`. Rows that no longer sum to
        one are normalised after the residual is added.
      residual: Weight of the identity in each layer, from 0 (none) to 1.
      start_layer: The first layer taken along; earlier ones are left out.
      chunk: To how many inputs flows are found at once.
      streams: Names the sequences, if tracing cannot tell them apart: of each
        attention site, by its name, those of its queries and of its keys.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position, `[length]` or, of all queries, `[length, length]`; for several
      sequences a dict of these as of `attention_rollout`. Diagnostics:

      - `flow`: the flows before they are divided by their sum, shaped like the scores,
        each at most 1; of several sequences `flow/NAME` for each;
      - `self_share`: the score of the explained position itself, of each query;
      - `optimality_gap`: by how much a flow may be off at most, of each query: each
        is the width of a cut that no flow can pass, less a flow that was found.

    Raises:
      ValueError: If the model has no attention, or some that is not understood; if
        its sequences cannot be told apart, with the name of the site; if an option
        does not fit.

    Source: section 3 of the paper; rows are queries.

    >>> model = lambda x: (jax.nn.softmax(x @ x.T) @ x)[0]
    >>> attention_flow(model)(jnp.zeros((2, 3))).diagnostics["flow"].tolist()
    [0.75, 0.25]
    """
    check_heads(heads)
    chunks.positive(chunk, "chunk")
    if isinstance(residual, str) or not 0 <= residual <= 1:
        raise ValueError(f"`residual` is a weight from 0 to 1, got {residual!r}")
    fusion = Fusion(heads)

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        program = trace(model, args, {})
        found = several(program, readable(program.sites), streams)
        if found is not None:
            walk = joint.read(program, found, query, fusion, start_layer=start_layer)
            logits, own, explained = walk.output, walk.start, walk.stream
            widths, top, places = _network(walk, fusion, float(residual))
        else:
            asked, explained = joint.of_one(query), ""
            logits, read = layers.capture_of(program, self_attention(program.sites))
            widths = rows.matrices(
                stack.since(read, start_layer),
                fusion,
                residual=float(residual),
                normalize=True,
            )
            length = widths.shape[-1]
            places = {"": slice(0, length)}
            if asked is None:
                # Nothing flows from a position that no query may attend.
                own = jnp.diag(masking.attended(read).astype(jnp.float32))
            else:
                start = queries.resolve(asked, read, model, args)
                own = queries.row_weights(start, length)
            top = own
        flow, least = jax.lax.map(
            lambda one: max_flow.from_position(widths, one, chunk), jnp.atleast_2d(top)
        )
        if own.ndim == 1:
            flow, least = flow[0], least[0]
        total = jnp.sum(flow, axis=-1, keepdims=True)
        scores = flow / jnp.where(total == 0, 1, total)
        # The bounds meet, but one is summed in float32.
        gap = jnp.max(jnp.maximum(flow - least, 0), axis=-1)
        self_share = jnp.sum(scores[..., places[explained]] * own, axis=-1)
        flows = {"flow": flow}
        if found is not None:
            cut = lambda x, as_: {as_(n): x[..., place] for n, place in places.items()}
            scores = cut(scores, str)
            flows = cut(flow, "flow/{}".format)
        return Attribution(
            scores=scores,
            output=attribution.explained(attribution.hold(target, logits), logits),
            diagnostics={
                **flows,
                "self_share": self_share,
                "optimality_gap": gap,
            },
        )

    return explain


def _network(
    walk: joint.Walk, fusion: Fusion, residual: float
) -> tuple[jax.Array, jax.Array, dict[str, slice]]:
    """Layers over several sequences as layers of one.

    Returns:
      Widths of edges, first layer first, `[depth, size, size]`; the explained rows
      `[..., size]`, over what the highest layer writes; and where each sequence lies in
      what the lowest one reads.
    """
    kept, mixed = rows.shares(residual)
    # Each sequence, after so many of the layers that write to it.
    above: list[tuple[str, int]] = [(walk.stream, walk.top)]
    between, crossed = [above], list[Step]()
    for step in reversed(walk.steps):
        written = (step.query, step.own + 1)
        if written in above:
            read = [(step.query, step.own), (step.key, step.other)]
            above = list(dict.fromkeys([*(p for p in above if p != written), *read]))
            between.append(above)
            crossed.append(step)
    # Those that no layer reads get nothing.
    lengths, reached = walk.streams.lengths, {name for name, _ in above}
    between[-1] = above + [(name, 0) for name in lengths if name not in reached]
    size = max(sum(lengths[name] for name, _ in each) for each in between)
    slices = [_slices(lengths, each) for each in between]

    def widths(step: Step, above: _Slices, below: _Slices) -> jax.Array:
        written = above[step.query, step.own + 1]
        fused = mixed * rows.matrix(step.layer, fusion)
        total = kept + jnp.sum(fused, axis=-1, keepdims=True)
        total = jnp.where(total == 0, 1, total)
        one = jnp.zeros((size, size), jnp.float32)
        for place, at in above.items():
            if at != written:
                # As wide as all that leaves the explained position.
                one = one.at[at, below[place]].add(jnp.eye(lengths[place[0]]))
        own = jnp.eye(lengths[step.query], dtype=jnp.float32)
        one = one.at[written, below[step.query, step.own]].add(kept * own / total)
        return one.at[written, below[step.key, step.other]].add(fused / total)

    layered = [widths(*each) for each in zip(crossed, slices, slices[1:], strict=False)]
    missing = size - walk.start.shape[-1]
    top = jnp.pad(walk.start, [(0, 0)] * (walk.start.ndim - 1) + [(0, missing)])
    lowest = {name: slices[-1][name, 0] for name in lengths}
    # Where no layer writes to what is explained, it stays as it is.
    return jnp.stack(layered[::-1] or [jnp.eye(size)]), top, lowest


def _slices(lengths: dict[str, int], places: list[tuple[str, int]]) -> _Slices:
    """Where each lies if they lie one after another."""
    found, begin = {}, 0
    for name, number in places:
        found[name, number] = slice(begin, begin + lengths[name])
        begin += lengths[name]
    return found
