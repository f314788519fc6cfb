"""Every metric of one attribution; a new one joins by one line of `METRICS`."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

import xviz_jax as xv
from xviz_jax.metrics import Measurement, Metric, Reason

SHAPE = (4, 4)
MASK = jnp.zeros(SHAPE, jnp.int32).at[1:3, 1:3].set(1)


def model(layers: list[jax.Array], x: jax.Array) -> jax.Array:
    """Additive, with two classes that are each other's opposite."""
    half = layers[1] @ jnp.tanh(layers[0] * x.ravel())
    return jnp.stack([half, -half])


def parameters() -> list[jax.Array]:
    first, second = jax.random.split(jax.random.key(1))
    return [
        1 + jax.random.uniform(first, (16,)),
        jax.random.normal(second, (16,)),
    ]


def exact(layers: list[jax.Array], x: jax.Array) -> jax.Array:
    """What each element is worth for the predicted class, over zeros."""
    half = layers[1] * jnp.tanh(layers[0] * x.ravel())
    return (jnp.sign(jnp.sum(half)) * half).reshape(x.shape)


explain = xv.input_x_gradient(model, argnums=1)


@dataclasses.dataclass(frozen=True)
class Row:
    """A metric, and where it is undefined."""

    name: str
    make: Callable[..., Metric]
    # All scores zero; all negative; of a constant model; of an input that is NaN.
    zero: Reason = Reason.NO_VARIANCE
    negative: Reason = Reason.DEFINED
    constant: Reason = Reason.NO_CHANGE
    poisoned: Reason = Reason.OUTPUT_NOT_FINITE
    # It must tell true scores from random ones, and these from their opposite.
    faithful: bool = False

    def measure(self, layers, x, scores, key) -> Measurement:
        metric = self.make(model, argnums=1)
        given = {"key": key} if "key" in metric.needs else {}
        if "mask" in metric.needs:
            given["mask"] = MASK
        return metric(layers, x, scores, **given)


faithful = partial(Row, faithful=True)
# Of the scores alone.
alone = partial(Row, poisoned=Reason.DEFINED)
# Runs the method again.
again = partial(Row, constant=Reason.NO_VARIANCE, poisoned=Reason.SCORES_NOT_FINITE)
with_explain = lambda metric, **options: partial(metric, explain=explain, **options)
metrics = xv.metrics

METRICS = [
    faithful("deletion", partial(metrics.deletion, steps=8, chunk=3)),
    faithful("insertion", partial(metrics.insertion, steps=5, output="margin")),
    faithful("abpc", partial(metrics.abpc, chunk=5)),
    faithful("comprehensiveness", metrics.comprehensiveness),
    faithful("sufficiency", partial(metrics.sufficiency, chunk=2)),
    faithful("infidelity", metrics.infidelity, zero=Reason.ALL_ZERO),
    Row(
        "infidelity-noise",
        partial(metrics.infidelity, perturbation=0.1, samples=8, normalize=False),
        zero=Reason.DEFINED,
    ),
    faithful("sensitivity_n", partial(metrics.sensitivity_n, samples=16)),
    faithful("faithfulness_correlation", metrics.faithfulness_correlation),
    faithful("road", partial(metrics.road, chunk=3)),
    Row("completeness", metrics.completeness, zero=Reason.DEFINED),
    again(
        "sensitivity_max",
        with_explain(metrics.sensitivity_max, samples=5),
        zero=Reason.ALL_ZERO,
        constant=Reason.ALL_ZERO,
    ),
    again("random_logit", with_explain(metrics.random_logit)),
    again("mprt", with_explain(metrics.mprt)),
    again("efficient_mprt", with_explain(metrics.efficient_mprt, bins=8)),
    alone("sparseness", metrics.sparseness, Reason.ALL_ZERO, constant=Reason.ALL_ZERO),
    alone("complexity", metrics.complexity, Reason.ALL_ZERO, constant=Reason.ALL_ZERO),
    alone("pointing_game", metrics.pointing_game, constant=Reason.NO_VARIANCE),
    alone(
        "relevance_mass",
        metrics.relevance_mass,
        Reason.NONE_POSITIVE,
        Reason.NONE_POSITIVE,
        Reason.NONE_POSITIVE,
    ),
    alone("relevance_rank", metrics.relevance_rank, constant=Reason.NO_VARIANCE),
]
