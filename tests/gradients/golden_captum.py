"""Makes `captum.npz`: what captum 0.9.0 (with torch 2.13.0) says of a small network.

Guided integrated gradients, which captum has not, are those of PAIR's saliency 0.2.1.

    python tests/gradients/golden_captum.py draws     # with xviz_jax
    python tests/gradients/golden_captum.py goldens   # with captum and the others

The first step stores the weights, the inputs and the random draws of our methods; the
second one explains the same networks with the same draws, in float64, and stores the
names of all of captum's methods. Conductance is given many steps, since captum's is a
sum of differences that converges slowly.
"""

import itertools
import sys
from pathlib import Path
from unittest import mock

import numpy as np

FILE = Path(__file__).parent / "captum.npz"
TARGET, UNIT = 2, (0, 1, 2, 3)
SAMPLES, ORDERS = 6, 8
NOISE = 0.3
SHAPE = (2, 6, 6)
# Of the maps inside the network, and of a network of tokens.
MAP_GROUPS, MAP_BASELINE = np.arange(48).reshape(1, 3, 4, 4) // 8, 0.1
TOKENS, OTHERS = np.array([5, 1, 4, 1, 2]), np.array([0, 3, 0, 0, 0])


def draws():
    import jax

    from xviz_jax import noise
    from xviz_jax.gradients.expected_gradients import draws as drawn

    generator = np.random.default_rng(0)
    normal = lambda *shape: generator.normal(size=shape).astype(np.float32)
    key = jax.random.key(0)
    row, place, own = drawn(key, SAMPLES, 3)
    moved = jax.vmap(lambda k: noise.add(np.zeros(SHAPE, np.float32), NOISE, k))(own)
    _, inner = jax.random.split(key)
    keys = jax.random.split(inner, (SAMPLES, 2))[:, 0]
    keys = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, 0), 1)[0])(keys)
    shaken = jax.vmap(lambda k: jax.random.normal(k, SHAPE))(keys)
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
        noise=NOISE * np.asarray(shaken),
        orders=np.asarray(orders),
        groups=groups.astype(np.int32),
        moved=np.asarray(moved),
        table=normal(6, 5),
        mixer=normal(5, 5) / 2,
        head=normal(5, 4) / 2,
    )


def goldens():
    import captum.attr as ca  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_default_dtype(torch.float64)
    given = dict(np.load(FILE))
    given = {name: given[name] for name in given if not name.startswith("captum")}
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

    class OfTokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding.from_pretrained(tensor["table"])

        def forward(self, tokens):
            mixed = torch.tanh(self.embedding(tokens) @ tensor["mixer"])
            return (mixed.sum(dim=1) @ tensor["head"]) ** 2

    network, of_tokens = Network(), OfTokens()
    tokens, others = torch.tensor(TOKENS)[None], torch.tensor(OTHERS)[None]
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

    def gradient_shap(method, stdevs=0.0, **options):
        total = 0
        for row, place, moved in zip(
            given["row"], given["place"], tensor["moved"], strict=True
        ):
            uniform = lambda *_, place=place: np.array([place])
            normal = lambda _, stdevs, moved=moved: moved * (stdevs > 0)
            with (
                mock.patch.object(np.random, "uniform", uniform),
                mock.patch.object(torch, "normal", normal),
            ):
                begin = tensor["rows"][int(row)][None]
                total = total + method.attribute(
                    x, baselines=begin, n_samples=1, stdevs=stdevs, **options
                )
        return total / SAMPLES

    def sampling():
        shapley = ca.ShapleyValueSampling(network)
        drawn = iter(given["orders"])
        shapley.permutation_generator = lambda *_: iter(
            [next(drawn).tolist() for _ in range(ORDERS)]
        )
        return shapley.attribute(x, n_samples=ORDERS, **rule)

    def kernel_shap():
        """Each coalition as often as captum draws it, with its fit of the answers."""

        def coalitions(*_, **__):
            yield torch.ones(1, 4, dtype=torch.long)
            yield torch.zeros(1, 4, dtype=torch.long)
            for row in itertools.product((0, 1), repeat=4):
                for _ in range((0, 2, 1, 2, 0)[sum(row)]):
                    yield torch.tensor([row])

        explain = ca.KernelShap(network)
        explain.perturb_func = coalitions
        # The ends are met as if exactly.
        explain.inf_weight = 1e9
        return explain.attribute(x, n_samples=24, **rule)

    def kernel_shap_additive():
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
        "expected_gradients": gradient_shap(ca.GradientShap(network), target=TARGET),
        "expected_gradients_noise": gradient_shap(
            ca.GradientShap(network), stdevs=NOISE, target=TARGET
        ),
        # At a layer that is affine, where a path of inputs is one of activations.
        "layer_expected_gradients": gradient_shap(
            ca.LayerGradientShap(network, network.convolution), target=TARGET
        ),
        "neuron_expected_gradients": gradient_shap(
            ca.NeuronGradientShap(network, maps), neuron_selector=neuron
        ),
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
        "layer_feature_ablation": ca.LayerFeatureAblation(network, maps).attribute(
            x, layer_baselines=MAP_BASELINE, layer_mask=torch.tensor(MAP_GROUPS),
            target=TARGET,
        ),
        "neuron_feature_ablation": ca.NeuronFeatureAblation(network, maps).attribute(
            x, neuron_selector=neuron, baselines=baseline, feature_mask=groups
        ),
        "occlusion": ca.Occlusion(network).attribute(
            x, sliding_window_shapes=(2, 3, 3), strides=(2, 1, 2), baselines=baseline,
            target=TARGET,
        ),
        "exact_shapley": ca.ShapleyValues(network).attribute(x, **rule),
        "shapley_value_sampling": sampling(),
        "kernel_shap": kernel_shap(),
        "kernel_shap_additive": kernel_shap_additive(),
        "tokens_integrated_gradients": ca.LayerIntegratedGradients(
            of_tokens, of_tokens.embedding
        ).attribute(
            tokens, baselines=others, target=TARGET, n_steps=16, method="gausslegendre"
        ).sum(dim=-1),
        "tokens_feature_ablation": ca.FeatureAblation(of_tokens).attribute(
            tokens, baselines=others, target=TARGET
        ),
        "tokens_occlusion": ca.Occlusion(of_tokens).attribute(
            tokens, sliding_window_shapes=(2,), baselines=others, target=TARGET
        ),
        "guided_integrated_gradients": guided(),
    }  # fmt: skip
    answers = {
        f"captum_{name}": each.detach().numpy()[0] for name, each in found.items()
    }
    kinds = {name: getattr(ca, name) for name in ca.__all__}
    methods = [
        name
        for name, kind in kinds.items()
        if isinstance(kind, type) and issubclass(kind, ca.Attribution)
    ]
    np.savez_compressed(FILE, **given, **answers, captum=np.array(sorted(methods)))


if __name__ == "__main__":
    {"draws": draws, "goldens": goldens}[sys.argv[1]]()
