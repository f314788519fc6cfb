"""Rollout, relevance and AttnLRP against stored outputs of transformers and LXT."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation

HERE = Path(__file__).parent
MODELS = HERE.parent / "models" / "goldens"
CLASS = 1
# The checkpoint, and the position that is read, if the output has one for each.
CHECKPOINTS = {
    "text/bert_sequence": None,
    "text/gpt2_lm": 4,
    "text/llama_lm": 4,
    "vision/vit": None,
}


def opened(name, position, scan=False, **options):
    """The function that is explained, its arguments, and how many are no padding."""
    given = np.load(MODELS / name / "golden.npz")
    model = xv.models.load(MODELS / name, scan=scan)
    if "pixels" in given:
        return model.explainable(), (jnp.asarray(given["pixels"]),), None
    options |= {} if position is None else {"position": position}
    function = model.explainable(**options)
    names = [name for name in ("tokens", "mask", "segments") if name in given]
    return function, [jnp.asarray(given[n]) for n in names], int(given["mask"].sum())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_of_transformers_maps(name):
    """Every row of both products, of maps and gradients that torch has made."""
    position = CHECKPOINTS[name]
    function, args, real = opened(name, position, scan=position is None)
    golden = np.load(HERE / "goldens" / f"{Path(name).name}.npz")

    def both(query):
        rollout = xv.attention_rollout(function, query=query)
        relevance = xv.attention_relevance(function, query=query)
        return rollout(*args), relevance(*args, target=CLASS)

    size = len(golden["rollout"])
    rollout, relevance = jax.jit(jax.vmap(both))(jnp.arange(size))
    np.testing.assert_allclose(relevance.output, golden["logits"][CLASS], atol=1e-5)
    for found, key in ((rollout, "rollout"), (relevance, "relevance")):
        expected = golden[key][:real]
        np.testing.assert_allclose(found.scores[:real], expected, atol=1e-5)
    assert golden["relevance"].max() > 1.001


@pytest.mark.parametrize("name", ["bert_sequence", "llama_tied", "qwen3_lm"])
def test_attn_lrp_of_lxt(name):
    """Relevance of the words, with biases and norms, gates and grouped keys."""
    position = None if name.startswith("bert") else 4
    function, args, real = opened(f"text/{name}", position)
    golden = np.load(HERE / "goldens" / "lxt.npz")
    assert golden[f"{name}_logits"].shape == jax.eval_shape(function, *args).shape
    found = jax.jit(lambda *args: xv.attn_lrp(function)(*args, target=CLASS))(*args)
    np.testing.assert_allclose(found.output, golden[f"{name}_logits"][CLASS], atol=1e-5)
    np.testing.assert_allclose(found.scores, golden[name], atol=1e-5)
    assert np.abs(golden[name][:real]).min() > 1e-3
    plain = jax.jit(lambda *args: xv.input_x_gradient(function)(*args, target=CLASS))
    assert np.abs(plain(*args).scores - golden[name]).max() > 0.01
