"""What a site inside a model does while the input moves from a baseline."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xviz_jax import attribution, chunks, tracing
from xviz_jax.attribution import At, Target
from xviz_jax.gradients.quadrature import rule_nodes


@dataclasses.dataclass(frozen=True)
class Journey:
    """A straight path of inputs, seen from sites inside the model.

    Attributes:
      output: The explained scalar at the input.
      begin_output: The explained scalar at the baseline.
      slope: Maps a place on the path, from 0 to 1, to the gradient of the output at
        each site.
      speed: Maps it to the derivative of each site's activation by the place.
    """

    output: jax.Array
    begin_output: jax.Array
    slope: Callable[[jax.Array], dict[str, jax.Array]]
    speed: Callable[[jax.Array], dict[str, jax.Array]]


def journey(
    model: Callable,
    args: Sequence[Any],
    argnums: int | Sequence[int],
    target: Target,
    at: At,
    baseline: Any,
) -> Journey:
    """Prepares a path from a baseline of the input to the input.

    Raises:
      ValueError: If there is no such site, or it is not one activation; as
        `attribution.ask` and `attribution.start` do.
    """
    question = attribution.ask(model, args, argnums)
    assert question.place is not None
    sites = attribution.sites_at(*question.place(question.x), at)
    for site in sites:
        if "activation" not in site.values:
            raise ValueError(
                f"`at` names activations; {site.name!r} is a site of {site.kind}"
            )
    names = [site.name for site in sites]
    begin = attribution.start(baseline, question)
    logits = question.model(question.x)
    held = attribution.hold(target, logits)

    def scalar(logits: jax.Array) -> jax.Array:
        return attribution.explained(held, logits)

    def place(where: jax.Array) -> tuple[Callable, Sequence[Any]]:
        def point(a: jax.Array, b: jax.Array) -> jax.Array:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            return a + where * (b - a)

        between = jax.tree.map(
            lambda a, b: point(a, b).astype(b.dtype), begin, question.x
        )
        assert question.place is not None
        return question.place(between)

    def slope(where: jax.Array) -> dict[str, jax.Array]:
        function, filled = place(where)
        read = tracing.attention_cotangents(function, scalar, names, ())
        _, found = read(*filled)
        return {name: found[name]["output_cotangent"] for name in names}

    def speed(where: jax.Array) -> dict[str, jax.Array]:
        def read(where: jax.Array) -> dict[str, jax.Array]:
            function, filled = place(where)
            _, found = tracing.capture(function, ("activation",), names)(*filled)
            return {
                name: found[name]["activation"].astype(jnp.float32) for name in names
            }

        return jax.jvp(read, (where,), (jnp.ones_like(where),))[1]

    return Journey(scalar(logits), scalar(question.model(begin)), slope, speed)


def mean_along(
    function: Callable[[jax.Array], Any], rule: str, steps: int, chunk: int
) -> Any:
    """The mean of a function of the place on a path, by a quadrature rule."""
    nodes, weights = rule_nodes(rule, steps)
    return chunks.total(
        function,
        jnp.asarray(nodes, jnp.float32),
        chunk,
        jnp.asarray(weights, jnp.float32),
    )
