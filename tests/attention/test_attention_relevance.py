"""Relevance against an independent product in float64, of every row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from tests.contract.table import CLASSES, HEADS, LENGTH, example, parameters
from xviz_jax.attention import layers

WEIGHTS = parameters()


def model(x, added=None):
    """A transformer of two layers; `added` moves its probabilities."""
    *blocks, last = WEIGHTS
    for number, block in enumerate(blocks):
        split = lambda name, x=x, block=block: (x @ block[name]).reshape(LENGTH, 2, -1)
        scores = jnp.einsum("qhd,khd->hqk", split("query"), split("key"))
        weights = jax.nn.softmax(scores)
        if added is not None:
            weights = weights + added[number]
        mixed = jnp.einsum("hqk,khd->qhd", weights, split("value"))
        x = x + mixed.reshape(x.shape)
        x = x + jnp.tanh(x @ block["up"]) @ block["down"]
    return x[0] @ last["head"]


def relevance(x, target, heads="mean"):
    """R of equations 5 and 6, in float64, with gradients through the maps."""
    zeros = jnp.zeros((2, HEADS, LENGTH, LENGTH))
    gradients = jax.grad(lambda added: model(x, added)[target])(zeros)
    _, captured = xv.tracing.capture(model)(x)
    product = np.eye(LENGTH)
    for own, gradient in zip(captured.values(), gradients, strict=True):
        weights = np.asarray(own["probabilities"][0], np.float64)
        kept = np.maximum(weights * np.asarray(gradient, np.float64), 0)
        fused = getattr(np, heads)(kept, axis=0)
        step = np.eye(LENGTH) + fused
        if heads != "mean":
            step /= step.sum(axis=-1, keepdims=True)
        product = step @ product
    return product


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_every_row_of_the_float64_product(heads):
    x, targets = example(), range(CLASSES)
    expected = np.stack([relevance(x, target, heads) for target in targets])

    def row(target, query):
        explain = xv.attention_relevance(model, query=query, heads=heads)
        return explain(x, target=target)

    every = jax.vmap(jax.vmap(row, (None, 0)), (0, None))
    rows = jax.jit(every)(jnp.arange(CLASSES), jnp.arange(LENGTH))
    np.testing.assert_allclose(rows.scores, expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(rows.diagnostics["mass"], expected.sum(-1), rtol=1e-5)
    np.testing.assert_allclose(
        rows.diagnostics["self_share"],
        np.diagonal(expected, axis1=1, axis2=2),
        rtol=1e-5,
    )


def test_mixed_heads_have_gradients_at_their_maps():
    """Where heads are mixed after the softmax, values of one head do not exist."""
    mixing = jnp.array([[0.7, 0.3], [-0.2, 1.0]])

    def talking(x, added=0.0):
        split = lambda name: (x @ WEIGHTS[0][name]).reshape(LENGTH, 2, -1)
        scores = jnp.einsum("qhd,khd->hqk", split("query"), split("key"))
        weights = jax.nn.softmax(scores) + added
        weights = jnp.einsum("hqk,hg->gqk", weights, mixing)
        mixed = jnp.einsum("hqk,khd->qhd", weights, split("value"))
        return mixed.reshape(x.shape)[0]

    x = example()
    zeros = jnp.zeros((HEADS, LENGTH, LENGTH))
    gradient = jax.grad(lambda added: talking(x, added)[1])(zeros)
    (own,) = xv.tracing.capture(talking)(x)[1].values()
    kept = np.maximum(np.asarray(own["probabilities"][0] * gradient), 0).mean(axis=0)
    got = xv.attention_relevance(talking)(x, target=1)
    np.testing.assert_allclose(got.scores, np.eye(LENGTH)[0] + kept[0], atol=1e-6)


def test_start_layer_and_refusals():
    x = example()
    late = xv.attention_relevance(model, start_layer=1)(x, target=2)
    every = layers.capture(model, (x,), lambda logits: logits[2])[1]
    assert len(every) == 2
    assert float(late.scores.sum()) < float(
        xv.attention_relevance(model)(x, target=2).scores.sum()
    )
    with pytest.raises(ValueError, match="from 0 to 1 for 2 layers, got 2"):
        xv.attention_relevance(model, start_layer=2)(x)
    with pytest.raises(ValueError, match="got 'median'"):
        xv.attention_relevance(model, heads="median")  # pyright: ignore
    with pytest.raises(ValueError, match="no attention to explain"):
        xv.attention_relevance(lambda x: x.sum(axis=0))(x)
