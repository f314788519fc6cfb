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
    MAP_BASELINE,
    MAP_GROUPS,
    NOISE,
    ORDERS,
    OTHERS,
    SAMPLES,
    TARGET,
    TOKENS,
    UNIT,
)

GOLDEN = dict(np.load(Path(FILE)))
X, BASELINE, GROUPS, ROWS = (
    jnp.asarray(GOLDEN[name]) for name in ("x", "baseline", "groups", "rows")
)
KERNEL, BIAS, MATRIX = (jnp.asarray(GOLDEN[n]) for n in ("kernel", "bias", "matrix"))
TABLE, MIXER, HEAD = (jnp.asarray(GOLDEN[n]) for n in ("table", "mixer", "head"))


def convolution(x):
    convolved = jax.lax.conv_general_dilated(x[None], KERNEL, (1, 1), "VALID")
    return convolved + BIAS.reshape(1, 3, 1, 1)


def network(x):
    maps = jnp.tanh(checkpoint_name(convolution(x), "convolution"))
    return (MATRIX @ checkpoint_name(maps, "maps").ravel()) ** 2


def additive(x):
    return x.reshape(-1) @ jnp.tile(MATRIX.T, (2, 1))[:72]


def of_tokens(tokens):
    return (jnp.tanh(TABLE[tokens] @ MIXER).sum(axis=0) @ HEAD) ** 2


MAPS = xv.baselines.carried(BASELINE)
path = {"baseline": BASELINE, "steps": 16}
rule = {"baseline": BASELINE, "groups": np.asarray(GROUPS), "chunk": 3}
unit = partial(xv.neuron, network, at="maps", index=UNIT)
others = jnp.asarray(OTHERS)
drawn = partial(xv.expected_gradients, samples=SAMPLES, chunk=4)
noisy = partial(xv.smooth, xv.saliency(network, signed=True), samples=SAMPLES)
METHODS = {
    "saliency": xv.saliency(network),
    "input_x_gradient": xv.input_x_gradient(network),
    "integrated_gradients": xv.integrated_gradients(network, **path),
    "expected_gradients": drawn(network, baselines=ROWS),
    "expected_gradients_noise": drawn(network, baselines=ROWS, noise=NOISE),
    "layer_expected_gradients": drawn(
        network, at="convolution", baselines=lambda _: jax.vmap(convolution)(ROWS)
    ),
    "neuron_expected_gradients": drawn(unit(), baselines=ROWS),
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
    "layer_feature_ablation": xv.feature_ablation(
        network, at="maps", groups=MAP_GROUPS, baseline=MAP_BASELINE
    ),
    "neuron_feature_ablation": xv.feature_ablation(unit(), **rule),
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
    "kernel_shap": xv.kernel_shap(network, samples=14, **rule),
    # As captum draws it, with replacement, it is exact for additive models only.
    "kernel_shap_additive": xv.kernel_shap(additive, samples=14, **rule),
    "tokens_integrated_gradients": xv.integrated_gradients(
        of_tokens, steps=16, baseline=others
    ),
    "tokens_feature_ablation": xv.feature_ablation(of_tokens, baseline=others),
    "tokens_occlusion": xv.occlusion(of_tokens, window=2, baseline=others),
}

RELU = "changes what a ReLU passes back; nothing here does"
DIFFERENCES = "propagates differences by rules of its own; nothing here does"
RULES = "rules for layers; those of `attn_lrp` and `cp_lrp` are others, compared to LXT"
BATCH = "permutes features among examples; a method here sees one"
WRAPPER = "feeds other methods, and has no scores of its own"
ABSTRACT = "a base class"
# What captum calls a method, and what it is here: the goldens, or why there are none.
PEERS = {
    "Attribution": ABSTRACT,
    "DataLoaderAttribution": WRAPPER,
    "Deconvolution": RELU,
    "DeepLift": DIFFERENCES,
    "DeepLiftShap": DIFFERENCES,
    "FeatureAblation": ["feature_ablation", "tokens_feature_ablation"],
    "FeaturePermutation": BATCH,
    "GradientAttribution": ABSTRACT,
    "GradientShap": ["expected_gradients", "expected_gradients_noise"],
    "GuidedBackprop": RELU,
    "GuidedGradCam": RELU,
    "InputXGradient": ["input_x_gradient"],
    "IntegratedGradients": ["integrated_gradients"],
    "InternalInfluence": ["internal_influence"],
    "KernelShap": ["kernel_shap", "kernel_shap_additive"],
    "LLMAttribution": WRAPPER,
    "LLMGradientAttribution": WRAPPER,
    "LRP": RULES,
    "LayerActivation": "reads an activation, as `tracing.capture` does",
    "LayerAttribution": ABSTRACT,
    "LayerConductance": ["conductance"],
    "LayerDeepLift": DIFFERENCES,
    "LayerDeepLiftShap": DIFFERENCES,
    "LayerFeatureAblation": ["layer_feature_ablation"],
    "LayerFeaturePermutation": BATCH,
    "LayerGradCam": ["grad_cam"],
    "LayerGradientShap": ["layer_expected_gradients"],
    "LayerGradientXActivation": ["layer_gradient_x_activation"],
    "LayerIntegratedGradients": [
        "layer_integrated_gradients",
        "tokens_integrated_gradients",
    ],
    "LayerLRP": RULES,
    "Lime": "fits coalitions by their nearness; here `kernel_shap` alone fits them",
    "LimeBase": ABSTRACT,
    "NeuronAttribution": ABSTRACT,
    "NeuronConductance": "of one unit, by inputs; `conductance` is of units",
    "NeuronDeconvolution": RELU,
    "NeuronDeepLift": DIFFERENCES,
    "NeuronDeepLiftShap": DIFFERENCES,
    "NeuronFeatureAblation": ["neuron_feature_ablation"],
    "NeuronGradient": ["neuron_saliency"],
    "NeuronGradientShap": ["neuron_expected_gradients"],
    "NeuronGuidedBackprop": RELU,
    "NeuronIntegratedGradients": ["neuron_integrated_gradients"],
    "NoiseTunnel": ["smooth_mean", "smooth_square", "smooth_variance"],
    "Occlusion": ["occlusion", "tokens_occlusion"],
    "PerturbationAttribution": ABSTRACT,
    "RemoteLLMAttribution": WRAPPER,
    "Saliency": ["saliency"],
    "ShapleyValueSampling": ["shapley_value_sampling"],
    "ShapleyValues": ["exact_shapley"],
}
# PAIR's, in the same file.
OTHER = {"guided_integrated_gradients"}


def test_none_is_left_out():
    """Of what captum itself lists, by the name that it has there."""
    assert set(GOLDEN["captum"].tolist()) == set(PEERS)
    compared = [
        name for ours in PEERS.values() if isinstance(ours, list) for name in ours
    ]
    assert len(set(compared)) == len(compared)
    assert set(METHODS) == set(compared) | OTHER
    assert {f"captum_{name}" for name in METHODS} <= set(GOLDEN)


@pytest.mark.parametrize("name", METHODS)
def test_captum(name):
    target = None if name.startswith("neuron") else TARGET
    explain = partial(METHODS[name], target=target, key=jax.random.key(0))
    given = jnp.asarray(TOKENS) if name.startswith("tokens") else X
    scores = jax.jit(explain)(given).scores
    expected = GOLDEN[f"captum_{name}"].reshape(scores.shape)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 * scale)
