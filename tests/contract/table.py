"""Every method of the library; a new one joins by one line of `METHODS`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import xviz_jax as xv

LENGTH, WIDTH, HEADS, CLASSES = 5, 8, 2, 4


@dataclasses.dataclass(frozen=True)
class Method:
    """One row: what makes the explainer, and what is promised of it.

    A name with a dash is a variant of the method before the dash, and is not tried
    on several devices.
    """

    name: str
    make: Callable[..., Callable[..., xv.Attribution]]
    # Scores are shaped like the `input`, or there is one for each of `positions`.
    scores: str = "input"
    # It needs a key.
    random: bool = False
    # It explains a site inside the model, so a model without one is refused.
    inside: bool = False
    # It takes `argnums`, the argument that is explained.
    argnums: bool = True
    # It explains several arrays at once.
    many: bool = True
    # Scores of a sum of two equal inputs: `each` is the whole's, or their `sum` is.
    halves: str | None = None
    # Scores add up to the change of the output, up to this share of it.
    complete: float | None = None
    # Scores of the linear model w @ x, from x and w[target].
    linear: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    # From a baseline the linear model's scores are w * (x - baseline).
    from_baseline: bool = False
    # Scores of x'Qx are x * Qx.
    quadratic: bool = False
    # Scores of a difference of two outputs are the difference of their scores.
    additive: bool = False
    # A constant model's scores are zeros.
    zero: bool = True
    # The explained position's scores do not depend on the target.
    class_blind: bool = False
    # Padding that the model masks scores nothing and changes nothing; not where a draw,
    # a grid or a mean is over the whole length.
    padding: bool = True
    # How well scores in bfloat16 correlate with those in float32.
    bfloat16: float = 0.99


times = lambda x, w: w * x
integral = partial(
    Method, complete=5e-4, linear=times, from_baseline=True, quadratic=True,
    additive=True, halves="sum",
)  # fmt: skip
inside = partial(Method, inside=True, many=False)
on_positions = partial(inside, scores="positions", argnums=False)
# Their padding is tried beside them.
attention = partial(on_positions, zero=False, padding=False)
game = partial(Method, linear=times, from_baseline=True, additive=True)

shrunk = lambda leaf: (
    jnp.array([0, -0.1], leaf.dtype).reshape(2, *(1,) * leaf.ndim)
    * jnp.broadcast_to(leaf, (2, *leaf.shape))
)

METHODS = [
    Method("saliency", xv.saliency, linear=lambda x, w: jnp.abs(w), halves="each"),
    Method(
        "saliency-signed",
        partial(xv.saliency, signed=True),
        linear=lambda x, w: w,
        additive=True,
        halves="each",
    ),
    Method("input_x_gradient", xv.input_x_gradient, linear=times, additive=True),
    integral("integrated_gradients", xv.integrated_gradients, complete=0.02),
    integral(
        "integrated_gradients-fixed",
        partial(xv.integrated_gradients, steps=15, chunk=4),
    ),
    Method(
        "expected_gradients",
        partial(
            xv.expected_gradients,
            baselines=partial(jax.tree.map, shrunk),
            samples=12,
            chunk=5,
        ),
        random=True,
        linear=lambda x, w: 1.05 * w * x,
        additive=True,
    ),
    Method(
        "blur_integrated_gradients",
        partial(xv.blur_integrated_gradients, axes=(0,), sigma=2.0),
        complete=0.05,
        padding=False,
        halves="sum",
    ),
    Method(
        "guided_integrated_gradients",
        partial(xv.guided_integrated_gradients, steps=20),
        complete=0.2,
        linear=times,
        from_baseline=True,
        padding=False,
        bfloat16=0.9,
    ),
    Method(
        "smooth",
        lambda model, **o: xv.smooth(
            xv.input_x_gradient(model, **o), samples=6, noise=0.1, chunk=4, **o
        ),
        random=True,
        padding=False,
        additive=True,
    ),
    Method(
        "smooth-variance",
        lambda model, **o: xv.smooth(
            xv.saliency(model, signed=True, **o),
            samples=4,
            noise=lambda x: 0.1 * jnp.std(x),
            reduce="variance",
            **o,
        ),
        random=True,
        padding=False,
        bfloat16=0.9,
    ),
    on_positions("grad_cam", xv.grad_cam, padding=False),
    on_positions("hires_cam", xv.hires_cam, additive=True),
    inside("conductance", partial(xv.conductance, at="stream", steps=4, chunk=2)),
    inside(
        "internal_influence",
        partial(xv.internal_influence, at="stream", steps=4),
        additive=True,
    ),
    game("feature_ablation", partial(xv.feature_ablation, chunk=7)),
    game(
        "leave_one_out",
        xv.leave_one_out,
        scores="positions",
        many=False,
        from_baseline=False,
    ),
    game("occlusion", partial(xv.occlusion, window=1, chunk=7), many=False),
    Method(
        "rise",
        partial(xv.rise, samples=20, cells=3, chunk=8),
        random=True,
        many=False,
        zero=False,
        padding=False,
        additive=True,
    ),
    game(
        "shapley_value_sampling",
        partial(xv.shapley_value_sampling, samples=4, chunk=13),
        random=True,
        padding=False,
        complete=5e-4,
        quadratic=True,
    ),
    game(
        "exact_shapley",
        partial(xv.exact_shapley, chunk=8, groups=lambda x: xv.patches(x.shape, (1,))),
        many=False,
    ),
    game(
        "kernel_shap",
        partial(xv.kernel_shap, samples=128, chunk=32),
        random=True,
        padding=False,
        complete=5e-4,
    ),
    Method(
        "learned_mask",
        partial(xv.learned_mask, steps=5, cells=3),
        many=False,
        zero=False,
        padding=False,
        bfloat16=0.9,
    ),
    attention("attention_rollout", xv.attention_rollout, class_blind=True),
    attention(
        "attention_rollout-max",
        partial(xv.attention_rollout, heads="max", query=-1),
        class_blind=True,
    ),
    attention(
        "attention_rollout-min",
        partial(xv.attention_rollout, heads="min", residual=0.2, start_layer=1),
        class_blind=True,
    ),
    attention("attention_relevance", xv.attention_relevance),
    attention(
        "attention_relevance-pooled",
        partial(xv.attention_relevance, query="pooled"),
    ),
    attention("raw_attention", xv.raw_attention, class_blind=True),
    attention("gradient_rollout", xv.gradient_rollout),
    attention("attention_grad_cam", xv.attention_grad_cam),
    attention("grad_sam", xv.grad_sam),
    attention("attcat", xv.attcat, additive=True),
    Method("attn_lrp", xv.attn_lrp, linear=times, quadratic=True, additive=True),
    Method("cp_lrp", xv.cp_lrp, linear=times, quadratic=True, additive=True),
    attention("attention_flow", xv.attention_flow, class_blind=True),
    attention("legrad", xv.legrad),
    attention("value_zeroing", xv.value_zeroing, class_blind=True),
    attention("attention_statistics", xv.attention_statistics, class_blind=True),
    attention(
        "special_tokens",
        lambda model: xv.special_tokens(
            xv.attention_rollout(model), special=jnp.arange(LENGTH) == 0
        ),
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


def transformer(
    weights: list[dict[str, jax.Array]], x: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Maps one sequence [LENGTH, WIDTH] to logits [CLASSES], read off position 0."""
    *layers, last = weights
    for layer in layers:
        split = lambda name, x=x, layer=layer: (x @ layer[name]).reshape(
            x.shape[0], HEADS, -1
        )
        logits = jnp.einsum("qhd,khd->hqk", split("query"), split("key"))
        if mask is not None:
            logits = jnp.where(mask[None, None], logits, -jnp.inf)
        mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits), split("value"))
        x = x + mixed.reshape(x.shape)
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
        x = checkpoint_name(x, "stream")
    return x[0] @ last["head"]


def example(count: int | None = None) -> jax.Array:
    """One sequence, or several."""
    shape = (LENGTH, WIDTH) if count is None else (count, LENGTH, WIDTH)
    return jax.random.normal(jax.random.key(3), shape)
