"""Every method of the library; a new one joins by one line of `METHODS`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import xviz_jax as xv

LENGTH, WIDTH, HEADS, CLASSES = 5, 8, 2, 4


@dataclasses.dataclass(frozen=True)
class Method:
    """One row: what makes the explainer, and what is promised of it."""

    name: str
    make: Callable[..., Callable[..., xv.Attribution]]
    # Scores are shaped like the input; otherwise one for each position.
    like_input: bool = True
    # Scores add up to the change of the output.
    complete: bool = False
    # Scores of the linear model w @ x, from x and w[target].
    linear: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    # The explained position's scores do not depend on the target.
    class_blind: bool = False


def integrated(rule: str, **options: Any) -> Method:
    return Method(
        "-".join(["integrated_gradients", rule, *map(str, options.values())]),
        partial(xv.integrated_gradients, rule=rule, **options),
        complete=True,
        linear=lambda x, w: w * x,
    )


METHODS = [
    Method("saliency", xv.saliency, linear=lambda x, w: jnp.abs(w)),
    Method("saliency-signed", partial(xv.saliency, signed=True), linear=lambda x, w: w),
    Method("input_x_gradient", xv.input_x_gradient, linear=lambda x, w: w * x),
    integrated("gauss_legendre", steps=16),
    integrated("gauss_legendre", steps=15, chunk=4),
    integrated("midpoint", steps=128, chunk=1),
    Method(
        "attention_rollout", xv.attention_rollout, like_input=False, class_blind=True
    ),
    Method(
        "attention_rollout-max",
        partial(xv.attention_rollout, heads="max", query=-1),
        like_input=False,
        class_blind=True,
    ),
    Method(
        "attention_rollout-min",
        partial(xv.attention_rollout, heads="min", residual=0.2, start_layer=1),
        like_input=False,
        class_blind=True,
    ),
]


def parameters(dtype: Any = jnp.float32) -> list[dict[str, jax.Array]]:
    """Weights of a transformer with two layers and a linear head."""
    keys = iter(jax.random.split(jax.random.key(7), 16))
    draw = lambda *shape: jax.random.normal(next(keys), shape, dtype) / shape[0] ** 0.5
    layers = [
        {name: draw(WIDTH, WIDTH) for name in ("query", "key", "value", "up", "down")}
        for _ in range(2)
    ]
    return [*layers, {"head": draw(WIDTH, CLASSES)}]


def transformer(weights: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Maps one sequence [LENGTH, WIDTH] to logits [CLASSES], read off position 0."""
    *layers, last = weights
    for layer in layers:
        split = lambda name, x=x, layer=layer: (x @ layer[name]).reshape(
            x.shape[0], HEADS, -1
        )
        logits = jnp.einsum("qhd,khd->hqk", split("query"), split("key"))
        mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits), split("value"))
        x = x + mixed.reshape(x.shape)
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x[0] @ last["head"]


def example(count: int | None = None) -> jax.Array:
    """One sequence, or several."""
    shape = (LENGTH, WIDTH) if count is None else (count, LENGTH, WIDTH)
    return jax.random.normal(jax.random.key(3), shape)
