"""Makes `captum.npz`: what captum 0.9.0 (with torch 2.13.0) says of a small network.

Guided integrated gradients, which captum has not, are those of PAIR's saliency 0.2.1.

    python tests/gradients/golden_captum.py draws     # with xviz_jax
    python tests/gradients/golden_captum.py goldens   # with captum and the others

The first step stores the weights, the inputs and the random draws of our methods; the
second one explains the same network with the same draws, in float64. Conductance is
given many steps, since captum's is a sum of differences that converges slowly.
"""

import sys
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "captum.npz"
TARGET, UNIT = 2, (0, 1, 2, 3)
SAMPLES, ORDERS = 6, 8
NOISE = 0.3
SHAPE = (2, 6, 6)


def draws():
    import jax

    from xviz_jax.gradients.expected_gradients import draws as drawn

    generator = np.random.default_rng(0)
    normal = lambda *shape: generator.normal(size=shape).astype(np.float32)
    key = jax.random.key(0)
    row, place, _ = drawn(key, SAMPLES, 3)
    _, inner = jax.random.split(key)
    keys = jax.random.split(inner, (SAMPLES, 2))[:, 0]
    keys = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, 0), 1)[0])(keys)
    noise = jax.vmap(lambda k: jax.random.normal(k, SHAPE))(keys)
    turns = jax.random.split(key, ORDERS)
    orders = jax.vmap(lambda k: jax.random.permutation(k, 4))(turns)
    columns, halves = np.arange(6) // 3, np.arange(6) // 3
    groups = np.broadcast_to(2 * halves[:, None] + columns[None], SHAPE)
    np.savez_compressed(
        FILE,
        kernel=normal(3, 2, 3, 3) / 2,
        bias=normal(3) / 2,
        matrix=normal(4, 48) / 3,
        x=normal(*SHAPE),
        baseline=normal(*SHAPE) / 2,
        rows=normal(3, *SHAPE) / 2,
        row=np.asarray(row),
        place=np.asarray(place),
        noise=NOISE * np.asarray(noise),
        orders=np.asarray(orders),
        groups=groups.astype(np.int32),
    )


def goldens():
    import captum.attr as ca  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_default_dtype(torch.float64)
    given = dict(np.load(FILE))
    given = {name: given[name] for name in given if not name.startswith("captum_")}
    tensor = {
        name: torch.tensor(each.astype(np.float64) if each.dtype.kind == "f" else each)
        for name, each in given.items()
    }

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.Conv2d(2, 3, 3)
            self.convolution.weight.data = tensor["kernel"]
            self.convolution.bias.data = tensor["bias"]
            self.maps = torch.nn.Tanh()
            self.linear = torch.nn.Linear(48, 4, bias=False)
            self.linear.weight.data = tensor["matrix"]

        def forward(self, x):
            return self.linear(self.maps(self.convolution(x)).flatten(1)) ** 2

    network = Network()
    x, baseline = tensor["x"][None], tensor["baseline"][None]
    groups = tensor["groups"].long()[None]
    path = dict(n_steps=16, method="gausslegendre", baselines=baseline, target=TARGET)
    rule = dict(baselines=baseline, feature_mask=groups, target=TARGET)

    def tunnel(kind):
        drawn = iter(tensor["noise"])
        torch.normal, kept = lambda *_, **__: next(drawn)[None], torch.normal
        tunnel = ca.NoiseTunnel(ca.Saliency(network))
        try:
            return tunnel.attribute(
                x, nt_type=kind, nt_samples=SAMPLES, nt_samples_batch_size=1,
                stdevs=NOISE, target=TARGET, abs=False,
            )  # fmt: skip
        finally:
            torch.normal = kept

    def gradient_shap():
        total = 0
        for row, place in zip(given["row"], given["place"], strict=True):
            begin = tensor["rows"][int(row)][None]
            np.random.uniform, kept = (
                (lambda *_, p=place, **__: np.array([p])),
                (np.random.uniform),
            )
            try:
                shap = ca.GradientShap(network)
                total = total + shap.attribute(
                    x, baselines=begin, n_samples=1, stdevs=0.0, target=TARGET
                )
            finally:
                np.random.uniform = kept
        return total / SAMPLES

    def sampling():
        shapley = ca.ShapleyValueSampling(network)
        drawn = iter(given["orders"])
        shapley.permutation_generator = lambda *_: iter(
            [next(drawn).tolist() for _ in range(ORDERS)]
        )
        return shapley.attribute(x, n_samples=ORDERS, **rule)

    def kernel_shap():
        torch.manual_seed(0)
        additive = lambda x: x.flatten(1) @ tensor["matrix"].T.repeat(2, 1)[:72]
        return ca.KernelShap(additive).attribute(x, n_samples=200, **rule)

    def guided():
        from saliency.core import (  # pyright: ignore[reportMissingImports]
            INPUT_OUTPUT_GRADIENTS,
            GuidedIG,
        )

        quantile = np.quantile
        # It was written for a numpy that had another word for this.
        np.quantile = lambda array, q, interpolation: quantile(
            array, q, method=interpolation
        )

        def call(points, call_model_args=None, expected_keys=None):
            points = torch.tensor(np.asarray(points), requires_grad=True)
            output = network(points)[:, TARGET].sum()
            return {INPUT_OUTPUT_GRADIENTS: torch.autograd.grad(output, points)[0]}

        def numbers(*args, **options):
            return {name: each.numpy() for name, each in call(*args, **options).items()}

        found = GuidedIG().GetMask(
            x[0].numpy(), numbers, x_baseline=baseline[0].numpy(), x_steps=50,
            fraction=0.25, max_dist=0.1,
        )  # fmt: skip
        return torch.tensor(found)[None]

    maps = network.maps
    neuron = UNIT[1:]
    found = {
        "saliency": ca.Saliency(network).attribute(x, target=TARGET),
        "input_x_gradient": ca.InputXGradient(network).attribute(x, target=TARGET),
        "integrated_gradients": ca.IntegratedGradients(network).attribute(x, **path),
        "expected_gradients": gradient_shap(),
        "smooth_mean": tunnel("smoothgrad"),
        "smooth_square": tunnel("smoothgrad_sq"),
        "smooth_variance": tunnel("vargrad"),
        "layer_gradient_x_activation": ca.LayerGradientXActivation(
            network, maps
        ).attribute(x, target=TARGET),
        "layer_integrated_gradients": ca.LayerIntegratedGradients(
            network, maps
        ).attribute(x, **path),
        "internal_influence": ca.InternalInfluence(network, maps).attribute(x, **path),
        "conductance": ca.LayerConductance(network, maps).attribute(
            x, baselines=baseline, target=TARGET, n_steps=200000,
            method="riemann_trapezoid", internal_batch_size=5000,
        ),
        "grad_cam": ca.LayerGradCam(network, maps).attribute(
            x, target=TARGET, relu_attributions=True
        ),
        "neuron_saliency": ca.NeuronGradient(network, maps).attribute(
            x, neuron_selector=neuron
        ),
        "neuron_integrated_gradients": ca.NeuronIntegratedGradients(
            network, maps
        ).attribute(
            x, neuron_selector=neuron, n_steps=16, method="gausslegendre",
            baselines=baseline,
        ),
        "feature_ablation": ca.FeatureAblation(network).attribute(x, **rule),
        "occlusion": ca.Occlusion(network).attribute(
            x, sliding_window_shapes=(2, 3, 3), strides=(2, 1, 2), baselines=baseline,
            target=TARGET,
        ),
        "exact_shapley": ca.ShapleyValues(network).attribute(x, **rule),
        "shapley_value_sampling": sampling(),
        "kernel_shap": kernel_shap(),
        "guided_integrated_gradients": guided(),
    }  # fmt: skip
    answers = {
        f"captum_{name}": each.detach().numpy()[0] for name, each in found.items()
    }
    np.savez_compressed(FILE, **given, **answers)


if __name__ == "__main__":
    {"draws": draws, "goldens": goldens}[sys.argv[1]]()
