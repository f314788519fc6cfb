"""Metrics of a small network, beside captum 0.9.0 and Quantus 0.6.0."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from tests.metrics.golden_quantus import BINS, SAMPLES, SIZE
from xviz_jax.metrics import imputers
from xviz_jax.metrics.efficient_mprt import entropy

FOLDER = Path(__file__).parent
CAPTUM, QUANTUS = (
    dict(np.load(FOLDER / name)) for name in ("captum.npz", "quantus.npz")
)
KEY, TARGET = jax.random.key(0), 2
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def network(golden):
    first, second = jnp.asarray(golden["first"]), jnp.asarray(golden["second"])
    return lambda x: second @ jnp.tanh(first @ x.ravel())


def measured(metric, golden, **given):
    x, scores = jnp.asarray(golden["x"]), jnp.asarray(golden["scores"], jnp.float32)
    measure = partial(metric, target=TARGET, **given)
    return jax.jit(measure)(x, scores)


def test_captum_infidelity():
    moves = lambda x, key: CAPTUM["moves"]
    for normalize, name in ((False, "infidelity"), (True, "infidelity_normalized")):
        metric = xv.metrics.infidelity(
            network(CAPTUM), perturbation=moves, normalize=normalize, chunk=5
        )
        close(measured(metric, CAPTUM, key=KEY).value, CAPTUM[name].item())


def test_captum_sensitivity_max():
    model = network(CAPTUM)
    metric = xv.metrics.sensitivity_max(
        model,
        explain=xv.saliency(model, signed=True),
        radius=lambda x, key: CAPTUM["moves"],
        chunk=5,
    )
    found = measured(metric, CAPTUM, key=KEY)
    close(found.value, CAPTUM["sensitivity_max"].item())
    assert found.details["change"].shape == (len(CAPTUM["moves"]),)


def test_quantus_faithfulness_correlation():
    metric = xv.metrics.faithfulness_correlation(
        network(QUANTUS), fraction=SIZE / 36, samples=SAMPLES
    )
    expected = QUANTUS["quantus_faithfulness_correlation"]
    close(measured(metric, QUANTUS, key=KEY).value, expected)


def test_quantus_pixel_flipping():
    metric = xv.metrics.deletion(network(QUANTUS), steps=36)
    curve = measured(metric, QUANTUS).details["curve"]
    close(curve[1:], QUANTUS["quantus_deletion"], atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["sparseness", "complexity", "pointing_game", "relevance_mass", "relevance_rank"],
)
def test_quantus_of_scores(name):
    metric = getattr(xv.metrics, name)()
    given = {"mask": QUANTUS["mask"]} if "mask" in metric.needs else {}
    close(measured(metric, QUANTUS, **given).value, QUANTUS[f"quantus_{name}"])


def test_quantus_entropy_of_a_histogram():
    row = jnp.asarray(QUANTUS["scores"].ravel())
    close(entropy(row, BINS), QUANTUS["quantus_entropy"])


def test_quantus_noisy_linear_imputation():
    imputer = imputers.noisy_linear(noise=0.0)
    x, known = jnp.asarray(QUANTUS["x"]), jnp.asarray(QUANTUS["known"])
    image = imputer.prepare(lambda x: x, (x,), 0)(known, KEY)
    close(image, QUANTUS["quantus_noisy_linear"], atol=2e-5)
