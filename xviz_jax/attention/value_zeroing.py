"""Value zeroing (Mohebbi et al., 2023, arXiv 2301.12971)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from xviz_jax import attribution, chunks
from xviz_jax.attention import layers, masking, queries, residual, stack
from xviz_jax.attention.sites import named, readable, self_attention
from xviz_jax.attention.streams import Naming, Streams, several
from xviz_jax.attribution import Attribution, Target
from xviz_jax.tracing import Site
from xviz_jax.tracing.blocks import LAST, Blocks, Leaving
from xviz_jax.tracing.program import Program, trace
from xviz_jax.tracing.site import positions
from xviz_jax.tracing.transforms import read

Distance = Literal["cosine", "euclidean"]


def value_zeroing(
    model: Callable,
    *,
    query: queries.Query | None = 0,
    layer: int | str | None = None,
    start_layer: int = 0,
    distance: Distance = "cosine",
    chunk: int = 16,
    last: str | None = None,
    streams: Naming | None = None,
) -> Callable[..., Attribution]:
    """How much each position changes when a layer reads nothing from another.

    In each layer, one position's value vectors are set to zero in all heads while
    what enters the layer stays as it was; a score is how far what leaves the layer
    moves at each position, through residual, normalisation and feed-forward alike.
    Scores of a position are divided by their sum, and the layers are multiplied, with
    no residual added, because they hold it already. Class-blind. Never negative; sums
    to one, or to zero where nothing moves. Costs a forward pass for each position and
    two more, `chunk` at once, and holds every layer's map, in memory that grows with
    the square of the length: for short sequences. Distances are taken in float32, of
    layers in the model's own precision.

    Args:
      model: Maps one example to logits; any JAX function, with its attention and
        residual streams found by tracing. One sequence, unless `layer` is a name:
        through a residual connection beside attention to another sequence nothing says
        how much is passed on, and such layers are not multiplied.
      query: The position that is explained: 0 for a class token, -1 for the last
        token of a decoder. May be traced. Weights of rows, float `[length]`, `mean` or
        `pooled` as for `attention_rollout`, for another forward pass. None for all
        of them; padding's are zero, where keys are of the same sequence.
      layer: Scores of this layer alone, in the order they run; -1 is the last. Or the
        name of an attention site of any model, as for `raw_attention`: from one
        sequence to another too. None to multiply all.
      start_layer: The first layer taken along where they are multiplied.
      distance: `cosine`, the paper's, 1 less the cosine; or `euclidean`.
      chunk: How many positions are zeroed at once.
      last: The name, given by `jax.ad_checkpoint.checkpoint_name`, of what the last
        layer returns. None to find it by tracing: what a loop over layers ends with,
        or where layers that are written out stop repeating; a single layer does not.
        Of a layer by name, the last one of its queries' sequence.
      streams: Names the sequences, if tracing cannot tell them apart: of each
        attention site, by its name, those of its queries and of its keys.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position, `[length]` or, of all queries, `[length, length]`; and these
      diagnostics, of each query:

      - `mass`: sum of the scores;
      - `self_share`: the score of the explained position itself; not where keys are
        another sequence's.

      And, of the whole, `evaluations`: forward passes.

    Positions that no head of a layer attends score exactly zero there.

    Raises:
      ValueError: If the model has attention over several sequences and no layer is
        named, attention that is not understood, or a layer without a residual stream;
        if what leaves the last layer is not found, or a layer sees earlier ones around
        the stream; or an option does not fit.

    Source: section 3 of the paper.
    """
    if distance not in get_args(Distance):
        raise ValueError(
            f"`distance` is one of {list(get_args(Distance))}, got {distance!r}"
        )
    chunks.positive(chunk, "chunk")

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        program = trace(model, args, {})
        found = several(program, readable(program.sites), streams)
        sites, chosen = _chosen(program, layer, found)
        blocks = residual.cut(program, sites, last, found and found.keys)
        logits, each, attended = _matrices(blocks, sites, chosen, distance, chunk)
        # Whether queries and keys are of one sequence.
        within = found is None or len(set(found.of[chosen[0].name])) == 1
        depth, length, _ = each.shape
        number = start_layer if layer is None else layer
        if isinstance(number, str):
            # Of a loop's, the last turn.
            number = -1
        least = 0 if layer is None else -depth
        if not least <= number < depth:
            name = "start_layer" if layer is None else "layer"
            raise ValueError(
                f"`{name}` is from {least} to {depth - 1} for {depth} layers, got "
                f"{number}"
            )
        taken = each[number:] if layer is None else each[number][None]
        own = jnp.eye(length, dtype=jnp.float32)
        if isinstance(query, str) and not isinstance(layer, str):
            _, captured = layers.capture(model, args)
            start = queries.resolve(query, captured, model, args)
            own = queries.row_weights(start, length)
        elif query is not None:
            own = queries.of_named(query, length)
        scores = own
        for matrix in taken[::-1]:
            scores = jnp.matmul(scores, matrix, precision="highest")
        if query is None and within:
            # A product, so that what is no number stays none.
            scores = scores * attended.astype(jnp.float32)[:, None]
        diagnostics = {"mass": jnp.sum(scores, axis=-1)}
        if within:
            diagnostics["self_share"] = jnp.sum(scores * own, axis=-1)
        passes = each.shape[-1] + 2 + isinstance(query, str)
        return Attribution(
            scores=scores,
            output=attribution.explained(attribution.hold(target, logits), logits),
            diagnostics={**diagnostics, "evaluations": jnp.int32(passes)},
        )

    return explain


def _chosen(
    program: Program, layer: int | str | None, streams: Streams | None
) -> tuple[Sequence[Site], Sequence[Site]]:
    """The layers of a sequence, and those of which scores are asked for."""
    if not isinstance(layer, str):
        if streams is not None:
            names = [site.name for site in readable(program.sites)]
            raise ValueError(
                f"layers over the sequences {list(streams.lengths)} are not "
                f"multiplied: name one as `layer`, of {names}"
            )
        sites = self_attention(program.sites)
        return sites, sites
    site = named(program.sites, layer)
    if streams is None:
        return self_attention(program.sites), [site]
    query, _ = streams.of[site.joins or layer]
    return streams.by_queries(readable(program.sites))[query], [site]


def _matrices(
    blocks: Blocks,
    sites: Sequence[Site],
    chosen: Sequence[Site],
    distance: Distance,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalised scores of some layers of a sequence.

    Args:
      blocks: A program that is cut between the layers of the sequence.
      sites: All of them.
      chosen: Those of which scores are made, all with as many keys.
      distance: As for `value_zeroing`.
      chunk: As there.

    Returns:
      The output, scores `[depth, query, key]`, and which keys are no padding.
    """
    for site in chosen:
        if "probabilities" not in site.values:
            raise ValueError(
                f"the probabilities of {site.name!r} cannot be read: {site.why}"
            )
    wanted = {site.name: ("probabilities", "value") for site in chosen}
    wanted |= {entry.site.name: ("activation",) for entry in blocks.entries.values()}
    logits, found = read(blocks.program, wanted)
    kept = {
        name: found[entry.site.name]["activation"]
        for name, entry in blocks.entries.items()
    }
    leaving = Leaving(blocks)
    before = _in_order(blocks, sites, chosen, leaving(kept, {}))

    def moved(position: jax.Array) -> jax.Array:
        """How far all positions move, by layer, without the values of one."""
        changes = {
            site.name: _change(site, found[site.name], position, leaving.direct)
            for site in chosen
        }
        after = _in_order(blocks, sites, chosen, leaving(kept, changes))
        return _distance(before, after, distance)

    keys = chosen[0].shape[-1]
    columns = chunks.each(moved, jnp.arange(keys), chunk)
    maps = {
        site.name: {"probabilities": found[site.name]["probabilities"]}
        for site in chosen
    }
    ordered = stack.in_order(chosen, maps)
    # What is no number is not taken for unseen.
    seen = [
        jnp.any(layer.values["probabilities"] != 0, axis=(-4, -3)).reshape(
            layer.length, -1, keys
        )
        for layer in ordered
    ]
    scores = jnp.where(jnp.concatenate(seen), jnp.moveaxis(columns, 0, -1), 0)
    total = jnp.sum(scores, axis=-1, keepdims=True)
    normalised = scores / jnp.where(total == 0, 1, total)
    return logits, normalised, masking.attended(ordered)


def _change(
    site: Site, values: dict[str, jax.Array], position: jax.Array, direct: dict
) -> jax.Array:
    """What `Leaving` takes to leave out the values of one position."""
    if not direct[site.name]:
        stays = jnp.arange(site.shape[-1]) != position
        return jnp.broadcast_to(stays, (*site.loops, *stays.shape))
    paid = jnp.take(values["probabilities"], position, axis=-1).astype(jnp.float32)
    value = jnp.take(values["value"], position, axis=-3).astype(jnp.float32)
    value = jnp.repeat(value, paid.shape[-2] // value.shape[-2], axis=-2)
    return -jnp.einsum("...hq,...hd->...qhd", paid, value)


def _in_order(
    blocks: Blocks,
    sites: Sequence[Site],
    chosen: Sequence[Site],
    streams: dict[str, jax.Array],
) -> jax.Array:
    """What leaves each chosen layer, float32 `[depth, length, features]`."""
    entering = {
        name: {"stream": residual.sequence(entry.site, streams[name])}
        for name, entry in blocks.entries.items()
    }
    length, _ = positions(sites[0])
    ordered = stack.in_order(sites, entering)
    found = [
        layer.values["stream"].reshape(layer.length, length, -1) for layer in ordered
    ]
    found.append(streams[LAST].reshape(1, length, -1))
    every = jnp.concatenate([each.astype(jnp.float32) for each in found])[1:]
    names = [layer.site.name for layer in ordered for _ in range(layer.length)]
    wanted = {site.name for site in chosen}
    return every[np.array([name in wanted for name in names])]


def _distance(before: jax.Array, after: jax.Array, distance: Distance) -> jax.Array:
    if distance == "euclidean":
        return jnp.linalg.norm(before - after, axis=-1)
    # Half the squared distance of unit vectors is 1 less their cosine, to more digits.
    gap = _unit(before) - _unit(after)
    return jnp.sum(gap * gap, axis=-1) / 2


def _unit(vectors: jax.Array) -> jax.Array:
    size = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.where(size == 0, 1, size)
