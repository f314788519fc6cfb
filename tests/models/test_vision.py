"""ViT, DeiT and DINOv2 compute what transformers computes."""

import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax import tracing
from xviz_jax.models import dinov2, load, vit
from xviz_jax.models.vit import positions

GOLDENS = Path(__file__).parent / "goldens" / "vision"
# Layers as a loop or one by one; each package both ways.
CASES = (
    ("vit", False),
    ("vit", True),
    ("vit_bare", True),
    ("deit", False),
    ("deit_teacher", True),
    ("dinov2", True),
    ("dinov2_bare", False),
    ("dinov2_registers", False),
    ("dinov2_registers", True),
)
TOLERANCE = 1e-5


def raw(name: str, **changes) -> dict:
    return {**json.loads((GOLDENS / name / "config.json").read_text()), **changes}


@pytest.mark.parametrize(("name", "scan"), CASES)
def test_output_attention_and_gradient_are_those_of_transformers(name, scan):
    loaded = load(GOLDENS / name, scan=scan)
    explainable, module = loaded.explainable(), cast(Any, loaded.module)

    @jax.jit
    def everything(pixels):
        def scalar(pixels):
            output, captured = tracing.capture(explainable)(pixels)
            return output[2], (output, captured)

        gradient, (output, captured) = jax.grad(scalar, has_aux=True)(pixels)
        return output, gradient, captured, module.encode(pixels)

    golden = np.load(GOLDENS / name / "golden.npz")
    output, gradient, captured, tokens = everything(golden["pixels"])
    if "logits" in golden:
        np.testing.assert_allclose(output, golden["logits"], rtol=0, atol=TOLERANCE)
    else:
        np.testing.assert_allclose(output, golden["pooled"], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(tokens, golden["hidden"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(gradient, golden["gradient"], rtol=0, atol=TOLERANCE)
    # A loop is one site, with an axis of layers; without it each layer is one.
    assert len(captured) == (1 if scan else len(golden["attentions"]))
    found = np.concatenate(
        [
            np.reshape(site["probabilities"], (-1, *site["probabilities"].shape[-3:]))
            for site in captured.values()
        ]
    )
    np.testing.assert_allclose(found, golden["attentions"], rtol=0, atol=TOLERANCE)


def test_bfloat16_stays_near_float32():
    golden = np.load(GOLDENS / "dinov2_registers" / "golden.npz")
    loaded = load(GOLDENS / "dinov2_registers", dtype="bfloat16", scan=True)
    output = jax.jit(loaded.explainable())(golden["pixels"])
    assert output.dtype == jnp.bfloat16
    wanted = golden["logits"]
    error = np.abs(output.astype(jnp.float32) - wanted).max()
    assert 0 < error < 0.02 * np.abs(wanted).max()


def test_a_batch_is_vmap():
    explainable = load(GOLDENS / "deit_teacher", scan=True).explainable()
    random = np.random.default_rng(0)
    images = random.normal(size=(3, 16, 16, 3)).astype(np.float32)
    together = jax.jit(jax.vmap(explainable))(images)
    one = jax.jit(explainable)
    alone = np.stack([one(image) for image in images])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("name", ["4_7_4", "6_3_5", "37_16_16", "3_3_3"])
def test_positions_are_resized_as_by_torch(name, antialias):
    _, rows, columns = map(int, name.split("_"))
    with np.load(GOLDENS / "positions.npz") as golden:
        table, wanted = golden[f"{name}_table"], golden[f"{name}_{antialias}"]
    found = positions.resize(jnp.asarray(table), (rows, columns), antialias=antialias)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("antialias", [False, True])
def test_a_constant_table_stays_constant(antialias):
    for old in range(1, 12):
        for new in range(1, 12):
            rows = positions.weights(old, new, antialias=antialias).sum(axis=1)
            np.testing.assert_allclose(rows, 1, rtol=0, atol=1e-6)
        same = positions.weights(old, old, antialias=antialias)
        np.testing.assert_allclose(same, np.eye(old), rtol=0, atol=1e-6)


def test_an_image_of_the_wrong_form_is_refused():
    explainable = load(GOLDENS / "vit", scan=True).explainable()
    for shape in ((3, 16, 16), (1, 16, 16, 3), (16, 16)):
        with pytest.raises(ValueError, match="one image"):
            explainable(jnp.zeros(shape))
    with pytest.raises(ValueError, match="no whole patch"):
        explainable(jnp.zeros((3, 16, 3)))


@pytest.mark.parametrize(
    ("package", "change", "message"),
    [
        (vit, {"architectures": ["ViTForMaskedImageModeling"]}, "architectures"),
        (vit, {"architectures": None}, "architectures"),
        (vit, {"head_dim": 4}, "head_dim"),
        (vit, {"num_attention_heads": 3}, "heads"),
        (vit, {"hidden_act": "mish"}, "hidden_act"),
        (vit, {"image_size": 3}, "no patch"),
        (vit, {"patch_size": [4]}, "patch_size"),
        (vit, {"patch_size": [4, 0]}, "patch_size"),
        (dinov2, {"architectures": ["Dinov2Backbone"]}, "architectures"),
    ],
)
def test_configurations_that_are_not_read_are_refused(package, change, message):
    name = "vit" if package is vit else "dinov2"
    with pytest.raises(ValueError, match=message):
        package.configure(raw(name, **change))


def test_what_a_configuration_does_not_say_is_the_published_default():
    config = vit.configure({"model_type": "vit", "architectures": ["ViTModel"]})
    assert (config.width, config.patch, config.grid) == (768, (16, 16), (14, 14))
    assert config.pooler == (768, "tanh")
    assert (config.activation, config.epsilon) == ("gelu", 1e-12)
    giant = dinov2.configure(
        {
            "model_type": "dinov2",
            "architectures": ["Dinov2Model"],
            "hidden_size": 1536,
            "num_attention_heads": 24,
            "use_swiglu_ffn": True,
            "image_size": [518, 518],
        }
    )
    # As published for ViT-g/14.
    assert (giant.hidden, giant.grid) == (4096, (37, 37))


def test_a_bare_model_may_have_no_pooler(tmp_path):
    """As DINO's checkpoints: the class token's features are explained."""
    weights = (GOLDENS / "vit_bare" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = raw("vit_bare", add_pooling_layer=False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(tmp_path, scan=True)
    assert sorted(loaded.ignored) == ["pooler.dense.bias", "pooler.dense.weight"]
    golden = np.load(GOLDENS / "vit_bare" / "golden.npz")
    features = jax.jit(loaded.explainable())(golden["pixels"])
    np.testing.assert_allclose(features, golden["hidden"][0], rtol=0, atol=TOLERANCE)


def test_ignored_tensors_are_named():
    ignored = load(GOLDENS / "dinov2").ignored
    assert list(ignored) == ["dinov2.embeddings.mask_token"]
    assert load(GOLDENS / "dinov2_bare").ignored == {}
