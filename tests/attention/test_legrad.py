"""LeGrad against float64 gradients of every layer by itself, and by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.attention.test_methods import (
    CLASSES,
    NETWORKS,
    SHAPES,
    WIDTH,
    Network,
    relu,
)
from tests.contract.quick import quick_compilation as quick_compilation


def own_slopes(network, target):
    """Of what the head says of each layer's output, at the layer's map, in float64."""
    maps, _, streams, _ = network.truth(target)
    with jax.enable_x64(True):
        weights = jax.tree.map(jnp.asarray, network.weights())
        head = weights.pop("head")

        def answer(added, layer):
            own = jax.tree.map(lambda w: w[layer], weights)
            out, _ = network.block(jnp.asarray(streams[layer]), own, added)
            return out[network.query] @ head[:, target]

        slopes = jnp.stack(
            [jax.grad(answer)(jnp.zeros(maps.shape[1:]), n) for n in range(len(maps))]
        )
    return maps, np.asarray(slopes)


def formula(network, target, start=0):
    maps, slopes = own_slopes(network, target)
    counted = np.where(maps > 0, relu(slopes), 0)[:, :, : network.length]
    return counted.mean(axis=(1, 2))[start:].sum(axis=0)


@pytest.mark.parametrize("name", SHAPES)
def test_formulae(name):
    network = NETWORKS[name]
    x = jnp.float32(network.input())
    found = jax.jit(partial(xv.legrad(network), target=1))(x)
    expected = formula(network, 1)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.scores, expected, atol=2e-5 * scale, rtol=2e-5)
    np.testing.assert_allclose(found.output, network(x)[1], rtol=1e-5)
    assert not np.asarray(found.scores)[network.length :].any()
    if len(network.truth(1)[0]) > 1:
        # An earlier layer's gradient through the later ones is another one.
        maps, through, *_ = network.truth(1)
        through = np.where(maps > 0, relu(through), 0)[:, :, : network.length]
        other = through.mean(axis=(1, 2)).sum(axis=0)
        assert np.abs(other - expected).max() > 0.05 * scale


def test_the_predicted_class_is_the_models_own():
    """And not what each layer would predict."""
    network = Network(depth=5)
    x = jnp.float32(network.input())
    best = int(jnp.argmax(network(x)))
    streams = network.truth(best)[2]
    early = [np.argmax(h[0] @ network.weights()["head"]) for h in streams[1:]]
    assert best not in early
    found = jax.jit(xv.legrad(network))(x)
    np.testing.assert_allclose(
        found.scores, formula(network, best), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("scan", [True, False])
def test_later_layers_alone(scan):
    network = Network(depth=3, scan=scan)
    x = jnp.float32(network.input())
    found = jax.jit(partial(xv.legrad(network, start_layer=1), target=2))(x)
    np.testing.assert_allclose(
        found.scores, formula(network, 2, start=1), rtol=1e-4, atol=1e-6
    )


def test_maps_that_are_not_a_plain_product():
    """Heads that are mixed after the softmax have their map read, and its gradient."""
    weights = np.random.default_rng(0).normal(size=(2, 4, WIDTH, WIDTH)) / WIDTH**0.5
    mixing = jnp.array([[1.0, 0.5], [-0.5, 1.0]])
    head = np.random.default_rng(1).normal(size=(WIDTH, CLASSES))

    def block(x, w, added=0.0):
        split = lambda n: (x @ jnp.asarray(w[n], x.dtype)).reshape(len(x), 2, -1)
        maps = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", split(0), split(1))) + added
        mixed = jnp.einsum("hqk,hg->gqk", maps, mixing.astype(x.dtype))
        out = jnp.einsum("hqk,khd->qhd", mixed, split(2)).reshape(x.shape)
        return jnp.tanh(x + out @ jnp.asarray(w[3], x.dtype))

    def model(x):
        for w in weights:
            x = block(x, w)
        return x[0] @ jnp.asarray(head, x.dtype)

    x, expected = jnp.float32(Network().input()), 0.0
    found = jax.jit(xv.legrad(model))(x, target=0)
    with jax.enable_x64(True):
        h, zeros = jnp.float64(x), jnp.zeros((2, 7, 7))
        for w in weights:
            answer = lambda added, h=h, w=w: block(h, w, added)[0] @ head[:, 0]
            expected += relu(np.asarray(jax.grad(answer)(zeros))).mean(axis=(0, 1))
            h = block(h, w)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-6)


def test_two_layers_by_hand():
    """Uniform attention to values 1 and -3, then to 2 and 1; the mean of two outputs.

    Of the mean of a layer's tokens, the gradient at an entry of its map is half of the
    value there: of both queries [1/2, -3/2], of which [1/2, 0] counts, and [1, 1/2].
    """

    def two_layers(x):
        for value in (jnp.array([[1.0], [-3.0]]), jnp.array([[2.0], [1.0]])):
            x = x + jax.nn.softmax((0.0 * x) @ x.T) @ value
        return jnp.mean(x, axis=0)

    for start, expected in ((0, [1.5, 0.5]), (1, [1.0, 0.5])):
        explain = jax.jit(partial(xv.legrad(two_layers, start_layer=start), target=0))
        found = explain(jnp.ones((2, 1)))
        np.testing.assert_allclose(found.scores, expected, rtol=1e-6)


def test_padding_changes_nothing():
    network = NETWORKS["padded"]
    explain = jax.jit(partial(xv.legrad(network), target=1))
    few, many = (explain(jnp.float32(network.input(pad))).scores for pad in (1, 6))
    own = slice(network.length)
    np.testing.assert_allclose(few[own], many[own], rtol=2e-5, atol=1e-7)
