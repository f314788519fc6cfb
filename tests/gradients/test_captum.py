"""Against captum's answers, for every method that both have.

`golden_captum.py` made them, with the random draws of ours.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from tests.gradients.golden_captum import (
    FILE,
    NOISE,
    ORDERS,
    SAMPLES,
    TARGET,
    UNIT,
)

GOLDEN = dict(np.load(Path(FILE)))
X, BASELINE, GROUPS = (jnp.asarray(GOLDEN[n]) for n in ("x", "baseline", "groups"))
KERNEL, BIAS, MATRIX = (jnp.asarray(GOLDEN[n]) for n in ("kernel", "bias", "matrix"))


def network(x):
    convolved = jax.lax.conv_general_dilated(x[None], KERNEL, (1, 1), "VALID")
    maps = jnp.tanh(convolved + BIAS.reshape(1, 3, 1, 1))
    return (MATRIX @ checkpoint_name(maps, "maps").ravel()) ** 2


def additive(x):
    return x.reshape(-1) @ jnp.tile(MATRIX.T, (2, 1))[:72]


MAPS = xv.baselines.carried(BASELINE)
path = {"baseline": BASELINE, "steps": 16}
rule = {"baseline": BASELINE, "groups": np.asarray(GROUPS), "chunk": 3}
unit = partial(xv.neuron, network, at="maps", index=UNIT)
noisy = partial(xv.smooth, xv.saliency(network, signed=True), samples=SAMPLES)
METHODS = {
    "saliency": xv.saliency(network),
    "input_x_gradient": xv.input_x_gradient(network),
    "integrated_gradients": xv.integrated_gradients(network, **path),
    "expected_gradients": xv.expected_gradients(
        network, baselines=jnp.asarray(GOLDEN["rows"]), samples=SAMPLES, chunk=4
    ),
    "smooth_mean": noisy(noise=NOISE),
    "smooth_square": noisy(noise=NOISE, reduce="square"),
    "smooth_variance": noisy(noise=NOISE, reduce="variance"),
    "layer_gradient_x_activation": xv.input_x_gradient(network, at="maps"),
    "layer_integrated_gradients": xv.integrated_gradients(
        network, at="maps", steps=16, baseline=MAPS
    ),
    "internal_influence": xv.internal_influence(network, at="maps", **path),
    "conductance": xv.conductance(network, at="maps", **path),
    "grad_cam": xv.grad_cam(network, at="maps", channel_axis=1),
    "neuron_saliency": xv.saliency(unit(), signed=True),
    "neuron_integrated_gradients": xv.integrated_gradients(unit(), **path),
    "feature_ablation": xv.feature_ablation(network, **rule),
    "occlusion": xv.occlusion(
        network, window=(2, 3, 3), stride=(2, 1, 2), baseline=BASELINE
    ),
    "exact_shapley": xv.exact_shapley(network, **rule),
    "shapley_value_sampling": xv.shapley_value_sampling(
        network, samples=ORDERS, antithetic=False, **rule
    ),
    "guided_integrated_gradients": xv.guided_integrated_gradients(
        network, baseline=BASELINE, steps=50, fraction=0.25, distance=0.1
    ),
    # Captum samples with replacement, which is exact for additive models only.
    "kernel_shap": xv.kernel_shap(additive, samples=14, **rule),
}


def test_none_is_left_out():
    assert {f"captum_{name}" for name in METHODS} == {
        name for name in GOLDEN if name.startswith("captum_")
    }


@pytest.mark.parametrize("name", METHODS)
def test_captum(name):
    target = None if name.startswith("neuron") else TARGET
    explain = partial(METHODS[name], target=target, key=jax.random.key(0))
    scores = jax.jit(explain)(X).scores
    expected = GOLDEN[f"captum_{name}"].reshape(scores.shape)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 * scale)
