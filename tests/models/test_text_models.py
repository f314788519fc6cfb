"""Every text architecture and head agrees with transformers, seen from outside."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax import attribution, tracing

GOLDENS = Path(__file__).parent / "goldens" / "text"
NAMES = sorted(folder.name for folder in GOLDENS.iterdir())
# tests/models/test_real.py has the others.
SCANNED = ["gpt2_lm", "qwen2_lm"]
# One program each, and nothing to gain from a fast one.
QUICKLY = {"xla_backend_optimization_level": 0}
# A token in the middle of a text of five, where the goldens have one for each.
POSITION, CLASS = 4, 1
EACH = ("masked", "untied", "tokens", "lm", "tied", "gpt2", "llama")


def opened(name, **options):
    """A model, its golden, its arguments, and the function that is explained."""
    model = xv.models.load(GOLDENS / name, **options)
    golden = dict(np.load(GOLDENS / name / "golden.npz"))
    args = [golden[key] for key in ("tokens", "mask", "segments") if key in golden]
    positions = {"position": POSITION} if name.split("_")[-1] in EACH else {}
    return model, golden, args, model.explainable(**positions)


def seen(model, function, args):
    """Its output, the whole output, attentions, and the gradient at its words.

    Not compiled as a whole: the models share the shapes of most operations.
    """
    whole, captured = tracing.capture(model.module, ("probabilities",))(*args)
    question = attribution.ask(function, args, 0)

    def explained(x):
        output = question.model(x)
        return output[CLASS], output

    gradients, output = jax.grad(explained, has_aux=True)(question.x)
    (gradient,) = gradients.values()
    maps = [each["probabilities"] for each in captured.values()]
    maps = [each.reshape(-1, *each.shape[-3:]) for each in maps]
    return output, whole, jnp.concatenate(maps), gradient


@pytest.mark.parametrize(
    ("name", "scan"),
    [(name, False) for name in NAMES] + [(name, True) for name in SCANNED],
)
def test_agrees_with_transformers(name, scan):
    model, golden, args, function = opened(name, scan=scan)
    run = lambda *args: seen(model, function, args)
    if scan:
        # Its loop is compiled in any case.
        run = jax.jit(run, compiler_options=QUICKLY)
    output, whole, maps, gradient = run(*args)
    real = golden["mask"].sum()
    wanted = golden["output"]
    if wanted.ndim == 2:
        np.testing.assert_allclose(whole[:real], wanted[:real], atol=1e-5)
        wanted = wanted[POSITION]
    np.testing.assert_allclose(output, wanted, atol=1e-5)
    attentions = golden["attentions"]
    assert maps.shape == attentions.shape
    np.testing.assert_allclose(maps[:, :, :real], attentions[:, :, :real], atol=1e-5)
    np.testing.assert_allclose(
        gradient[:real], golden["gradient"][:real], rtol=1e-5, atol=1e-5
    )


def test_poolings_of_states():
    model, _, args, _ = opened("bert")
    states = cast(Any, model.module).encode(*args)
    first = model.explainable(pooling="first")(*args)
    np.testing.assert_allclose(first, states[0], atol=1e-6)
    mean = model.explainable(pooling="mean")
    np.testing.assert_allclose(mean(*args), states[:5].mean(axis=0), atol=1e-6)


def test_a_folder_of_sentence_transformers_says_its_pooling(tmp_path):
    folder = shutil.copytree(GOLDENS / "bert", tmp_path / "bert")
    (folder / "1_Pooling").mkdir()
    said = {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    model = xv.models.load(folder)
    assert model.config.pooling == "mean"
    assert "pooler.dense.weight" in model.ignored
    assert model.fingerprint != xv.models.load(GOLDENS / "bert").fingerprint


def test_names_of_the_first_releases(tmp_path):
    folder = shutil.copytree(GOLDENS / "bert_masked", tmp_path / "bert")
    found = load_file(folder / "model.safetensors")
    old = {}
    for name, value in found.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    old["bert.embeddings.position_ids"] = np.arange(10)[None]
    old["bert.pooler.dense.bias"] = np.ones(8, np.float32)
    old["cls.seq_relationship.bias"] = np.ones(2, np.float32)
    old["cls.predictions.decoder.bias"] = found["cls.predictions.bias"]
    save_file(old, folder / "model.safetensors")
    model, plain = xv.models.load(folder), xv.models.load(GOLDENS / "bert_masked")
    assert len(model.ignored) == 4
    assert not plain.ignored
    for one, other in zip(
        jax.tree.leaves(nnx.state(model.module)),
        jax.tree.leaves(nnx.state(plain.module)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
