"""Methods against stored outputs of transformers' maps, LXT, inseq and LeGrad."""

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


def test_of_inseq():
    """Maps of each head, and each layer's value zeroing, from every position."""
    golden = np.load(HERE / "goldens" / "inseq.npz")
    real, _, depth, heads = golden["attention"].shape
    function, args, _ = opened("text/gpt2_lm", real - 1)

    def row(query, *args):
        options = [(i, n) for i in range(depth) for n in range(heads)]
        each = lambda i, n: xv.raw_attention(function, query=query, layer=i, head=n)
        return jnp.stack([each(i, n)(*args).scores[:real] for i, n in options])

    def found(*args):
        maps = jax.vmap(lambda query: row(query, *args), out_axes=1)(jnp.arange(real))
        each = [xv.value_zeroing(function, query=None, layer=i) for i in range(depth)]
        zeroed = [explain(*args).scores[:real, :real] for explain in each]
        return maps, jnp.stack(zeroed), function(*args)

    maps, zeroed, logits = map(np.asarray, jax.jit(found)(*args))
    np.testing.assert_allclose(logits, golden["logits"][real - 1], atol=1e-5)
    expected = golden["attention"].transpose(2, 3, 0, 1).reshape(maps.shape)
    np.testing.assert_allclose(maps, expected, atol=1e-5)
    expected = golden["value_zeroing"].transpose(2, 0, 1)
    # What is below 1e-5 is left out there.
    assert zeroed[expected == 0].max() < 2e-5
    zeroed = np.where(expected > 0, zeroed, 0)
    zeroed = zeroed / zeroed.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(zeroed, expected, atol=1e-5)
    assert (expected > 0).sum() > depth * real * 2


def test_of_legrad():
    """The last two layers of CLIP's image tower, each pooled by the mean."""
    w = dict(np.load(HERE / "goldens" / "legrad.npz"))
    count = 1 + max(int(n.split(".")[2]) for n in w if n.startswith("transformer"))

    def norm(x, name):
        x = jax.nn.standardize(x, epsilon=1e-5)
        return x * w[f"{name}.weight"][None] + w[f"{name}.bias"][None]

    def layer(x, name):
        dense = lambda x, part: x @ w[f"{part}weight"].T + w[f"{part}bias"][None]
        h = dense(norm(x, f"{name}.ln_1"), f"{name}.attn.in_proj_")
        q, k, v = (each.reshape(len(x), -1, 4) for each in jnp.split(h, 3, axis=1))
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + dense(mixed, f"{name}.attn.out_proj.")
        h = jax.nn.gelu(dense(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc."), False)
        return x + dense(h, f"{name}.mlp.c_proj.")

    def model(pixels):
        x = pixels.reshape(3, -1).T @ w["conv1.weight"][:, :, 0, 0].T
        x = jnp.concatenate([w["class_embedding"][None], x]) + w["positional_embedding"]
        x = norm(x, "ln_pre")
        for number in range(count):
            x = layer(x, f"transformer.resblocks.{number}")
        x = norm(jnp.mean(x, axis=0)[None], "ln_post")[0] @ w["proj"]
        return (x / jnp.linalg.norm(x) @ w["text"])[None]

    explain = jax.jit(xv.legrad(model, start_layer=count - 2))
    scores = explain(w["image"], target=0).scores[1:]
    scores = (scores - scores.min()) / (scores.max() - scores.min())
    np.testing.assert_allclose(scores, w["map"].ravel(), atol=1e-5)
