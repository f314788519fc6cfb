"""Gradient rollout: attention rollout of maps that are weighed by their gradient.

The method of github.com/jacobgil/vit-explain (2020), an unpublished variant of
attention rollout (Abnar and Zuidema, 2020, arXiv 2005.00928).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from xviz_jax import attribution
from xviz_jax.attention import joint, layers, queries, rows, stack
from xviz_jax.attention.fusion import Fusion
from xviz_jax.attention.sites import readable, self_attention
from xviz_jax.attention.streams import Naming, several
from xviz_jax.attribution import Attribution, Target
from xviz_jax.tracing.program import trace

Convention = Literal["abnar2020", "vit_explain"]
# The fraction of entries that are discarded.
_CONVENTIONS: dict[str, float] = {"abnar2020": 0.0, "vit_explain": 0.9}


def gradient_rollout(
    model: Callable,
    *,
    query: queries.Query | Mapping[str, queries.Query] = 0,
    residual: float = 0.5,
    discard_ratio: float | None = None,
    start_layer: int = 0,
    convention: Convention = "abnar2020",
    streams: Naming | None = None,
) -> Callable[..., Attribution]:
    """Follows what attention contributes to a class through every layer.

    Each layer's attention times its gradient is averaged over heads, its positive
    part is mixed with the identity, rows are divided by their sums, and the layers
    are multiplied. Gradients are small beside the identity, which the model's scale
    therefore weighs: `attention_relevance` is the published form. Needs a target.
    Never negative; sums to one. Costs one forward and one backward pass and two passes
    over each layer's map. A map that the model makes anyway, of up to 2,048 positions,
    is read inside the model with its heads fused, on the way backward: one float32
    `[length, length]` is kept for each layer. Else it is made tile by tile: memory
    grows with the length and not with its square. Computes in float32.

    With cross-attention the positions of all sequences are followed as one, as in
    `attention_rollout`.

    Args:
      model: Maps one example to logits; any JAX function, with its attention found
        by tracing.
      query: The position the class is read from: 0 for a class token, -1 for the
        last token of a decoder. May be traced. `pooled` for the rows that the
        output reads, found by tracing, with their weights, for another forward pass;
        `mean` for all rows, averaged, padding's left out; or weights of rows, float
        `[length]`. Where the output is read from several sequences, any of these for
        one of them, by its name: `{name: position}`.
      residual: Weight of the identity in each layer, from 0 (none) to 1. Without
        any, a row that has nothing positive stays zero.
      discard_ratio: The fraction of entries of each layer's fused map, its lowest,
        that count as zero. None for the convention's.
      start_layer: The first layer taken along; earlier ones are left out.
      convention: Whose discarding is the default: `abnar2020`, of rollout's paper,
        nothing; `vit_explain`, of the repository, 0.9. The residual of both is 0.5.
      streams: Names the sequences, if tracing cannot tell them apart: of each
        attention site, by its name, those of its queries and of its keys.

    Returns:
      `explain(*args, target=None, key=None) -> Attribution`, with one score for
      each position, for several sequences a dict of these as of `attention_rollout`,
      and these diagnostics:

      - `mass`: sum of the scores;
      - `self_share`: the score of the explained position itself; of several, by their
        weights.

    Raises:
      ValueError: If the model has no attention, or some that is not understood; if
        its sequences cannot be told apart, with the name of the site; if an option
        does not fit.

    Source: the repository's description, without two faults of its code: rows, not
    columns, are divided by row sums, and each layer has its own gradient.
    """
    if convention not in _CONVENTIONS:
        raise ValueError(
            f"`convention` is one of {list(_CONVENTIONS)}, got {convention!r}"
        )
    discarded = _CONVENTIONS[convention] if discard_ratio is None else discard_ratio
    if not 0 <= residual <= 1:
        raise ValueError(f"`residual` is a weight from 0 to 1, got {residual}")
    if not 0 <= discarded < 1:
        raise ValueError(f"`discard_ratio` is from 0 to less than 1, got {discarded}")
    fusion = Fusion(
        relevance="gradient_x_attention",
        rectify=True,
        discard_ratio=float(discarded),
    )

    def explain(*args: Any, target: Target = None, key: Any = None) -> Attribution:
        del key

        def scalar(logits: jax.Array) -> jax.Array:
            return attribution.explained(attribution.hold(target, logits), logits)

        options: dict[str, Any] = {"residual": float(residual), "normalize": True}
        program = trace(model, args, {})
        found = several(program, readable(program.sites), streams)
        if found is not None:
            walk = joint.read(program, found, query, fusion, scalar, start_layer)
            scores = joint.propagate(walk, fusion, **options)
            return Attribution(
                scores=scores,
                output=scalar(walk.output),
                diagnostics=joint.diagnostics(walk, scores),
            )
        asked = joint.of_one(query)
        sites = self_attention(program.sites)
        keep = fusion.inside(asked)
        logits, read = layers.capture_of(program, sites, scalar, keep=keep)
        start = queries.resolve(asked, read, model, args)
        row = rows.propagate(stack.since(read, start_layer), start, fusion, **options)
        return Attribution(
            scores=row,
            output=scalar(logits),
            diagnostics=queries.diagnostics(row, start),
        )

    return explain
