"""Attention rollout (Abnar and Zuidema, 2020, arXiv 2005.00928)."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from xviz_jax import attribution
from xviz_jax.attention import joint, layers, queries, rows, stack
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.sites import readable, self_attention
from xviz_jax.attention.streams import Naming, several
from xviz_jax.attribution import Attribution, Target
from xviz_jax.tracing.program import trace

Heads = Literal["mean", "max", "min"]
Convention = Literal["abnar2020", "chefer2021", "vit_explain"]
# The residual, and the fraction of entries that are discarded.
_CONVENTIONS: dict[str, tuple[Literal["add"] | float, float]] = {
    "abnar2020": (0.5, 0.0),
    "chefer2021": ("add", 0.0),
    "vit_explain": (0.5, 0.9),
}


def attention_rollout(
    model: Callable,
    *,
    query: joint.Query = 0,
    heads: Heads | jax.Array = "mean",
    residual: Literal["add"] | float | None = None,
    discard_ratio: float | None = None,
    start_layer: int = 0,
    exclude_self: bool = False,
    convention: Convention = "abnar2020",
    streams: Naming | None = None,
) -> Callable[..., Attribution]:
    """Follows attention from one position down to the input, through every layer.

    Each layer's heads are fused, mixed with the identity for the residual
    connection, and the layers are multiplied. Class-blind: it tells where the
    position looked, not what for, and is the same for every target. What the position
    keeps of itself may hide it: of a compiled program that reverses its input, the top
    token is the explained position, and the right one only with `exclude_self`. Costs
    one forward pass and, for one row, a pass over each layer's map. Long maps are made
    again from queries and keys, tile by tile, so that memory grows with the length
    and not with its square, whatever the model's own attention does. Computes in
    float32.

    With cross-attention, as of an encoder and a decoder or of a text and an image, the
    positions of all sequences are followed as one: a layer mixes the row of a query
    with those of the keys that it reads, whichever sequence they are of. Tracing tells
    the sequences apart by following positions to the arrays in which they began.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing.
      query: The position that is explained: 0 for a class token, -1 for the last
        token of a decoder. May be traced. `pooled` for the rows that the
        output reads, found by tracing, with their weights, for another forward pass;
        `mean` for all rows, averaged, padding's left out; or weights of rows, float
        `[length]`. None for all of them, padding's zero, in memory that grows with the
        square of the length. Where the output is read from several sequences, any of
        these for one of them, by its name: `{name: position}`.
      heads: How heads are fused: `mean`, `max`, `min`, or weights of heads, float
        `[heads]`. Rows that no longer sum to one are normalised after the residual is
        added.
      residual: Weight of the identity in each layer, from 0 (none) to 1; or `add`,
        the identity and all of attention, and rows are never normalised. None for the
        convention's.
      discard_ratio: The fraction of entries of each layer's fused map, its lowest,
        that count as zero. None for the convention's.
      start_layer: The first layer taken along; earlier ones are left out.
      exclude_self: Whether the explained position's own score becomes zero, and the
        others are divided by their sum.
      convention: Whose residual and discarding are the defaults: `abnar2020`, the
        paper's, 0.5 and nothing; `chefer2021`, the baseline of the relevance papers
        for images, `add` and nothing; `vit_explain`, 0.5 and 0.9, of
        github.com/jacobgil/vit-explain, but with rows divided by row sums, not
        columns, and no entry spared.
      streams: Names the sequences, if tracing cannot tell them apart: of each
        attention site, by its name, those of its queries and of its keys.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position, non-negative, `[length]` or, of all queries, `[length, length]`;
      for several sequences a dict of these by the name in `streams`, or else of the
      first attention site whose queries run over it (`NAME/key` if only keys of the
      site NAME do). Diagnostics, of each query:

      - `mass`: sum of the scores, 1 but for rounding, unless the residual is `add` or
        the row is padding's;
      - `self_share`: the score of the explained position itself, before it is
        excluded, which the residual makes large; of several, by their weights.

    Raises:
      ValueError: If the model has no attention, or some that is not understood; if
        its sequences cannot be told apart, with the name of the site; if an option
        does not fit.

    Source: equations 1 and 2 of the paper; rows are queries. For several sequences,
    section 3 of Ferrando et al., 2022 (arXiv 2205.11631), with attention in place of
    its contributions.
    """
    if convention not in _CONVENTIONS:
        raise ValueError(
            f"`convention` is one of {list(_CONVENTIONS)}, got {convention!r}"
        )
    kept, discarded = _CONVENTIONS[convention]
    kept = kept if residual is None else residual
    discarded = discarded if discard_ratio is None else discard_ratio
    if kept != "add" and (isinstance(kept, str) or not 0 <= kept <= 1):
        raise ValueError(f"`residual` is a weight from 0 to 1 or 'add', got {kept!r}")
    if not 0 <= discarded < 1:
        raise ValueError(f"`discard_ratio` is from 0 to less than 1, got {discarded}")
    fusion = _fusion(heads, float(discarded))
    options: dict[str, Any] = {
        "residual": kept if kept == "add" else float(kept),
        "normalize": kept != "add",
    }
    if exclude_self:
        _check_one_position(query)

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key
        program = trace(model, args, {})
        found = several(program, readable(program.sites), streams)
        if found is not None:
            walk = joint.read(program, found, query, fusion, start_layer=start_layer)
            _check_weights(fusion, [step.layer for step in walk.steps])
            scores = joint.propagate(walk, fusion, **options)
            logits, explained, own = walk.output, walk.stream, walk.start
        else:
            asked, explained = joint.of_one(query), ""
            sites = self_attention(program.sites)
            keep = fusion.inside(asked)
            logits, read = layers.capture_of(program, sites, keep=keep)
            _check_weights(fusion, read)
            kept_layers = stack.since(read, start_layer)
            if asked is None:
                row = rows.product(kept_layers, fusion, **options)
                own = jnp.eye(len(row))
            else:
                start = queries.resolve(asked, read, model, args)
                row = rows.propagate(kept_layers, start, fusion, **options)
                own = queries.row_weights(start, len(row))
            scores = {"": row}
        self_share = jnp.sum(scores[explained] * own, axis=-1)
        if exclude_self:
            scores[explained] = jnp.where(own > 0, 0, scores[explained])
            total = joint.mass(scores)[..., None]
            total = jnp.where(total == 0, 1, total)
            scores = {name: each / total for name, each in scores.items()}
        return Attribution(
            scores=scores if found is not None else scores[""],
            output=attribution.explained(attribution.hold(target, logits), logits),
            diagnostics={"mass": joint.mass(scores), "self_share": self_share},
        )

    return explain


def _check_one_position(query: joint.Query) -> None:
    asked = query.values() if isinstance(query, Mapping) else (query,)
    for each in asked:
        if isinstance(each, str) or (each is not None and jnp.ndim(each) == 1):
            raise ValueError("`exclude_self` needs one position, got several")


def _fusion(heads: Heads | jax.Array, discard_ratio: float) -> Fusion:
    if isinstance(heads, str):
        check_heads(heads)
        return Fusion(heads, discard_ratio=discard_ratio)
    weights = jnp.asarray(heads, jnp.float32)
    if weights.ndim != 1:
        raise ValueError(f"`heads` has one weight for each, got shape {weights.shape}")
    return Fusion("weighted", head_weights=weights, discard_ratio=discard_ratio)


def _check_weights(fusion: Fusion, found: list[stack.Layer]) -> None:
    counts = {layer.site.shape[-3] for layer in found}
    if fusion.head_weights is not None and counts != {len(fusion.head_weights)}:
        raise ValueError(
            f"`heads` has {len(fusion.head_weights)} weights for layers of "
            f"{sorted(counts)} heads"
        )


def check_heads(heads: str) -> None:
    """Refuses what is no fusion of heads."""
    if heads not in get_args(Heads):
        raise ValueError(f"`heads` is one of {list(get_args(Heads))}, got {heads!r}")
