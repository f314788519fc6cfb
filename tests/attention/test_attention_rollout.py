"""Rollout against hand-worked maps and an independent float64 product."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.comparison import compiled
from tests.contract.quick import quick_compilation as quick_compilation
from tests.contract.table import LENGTH, example, parameters, transformer
from xviz_jax import tracing
from xviz_jax.attention.sites import self_attention

WEIGHTS = parameters()


def model(x):
    return transformer(WEIGHTS, x)


@pytest.fixture(params=["maps", "tiles"])
def way(request, monkeypatch):
    """Small maps are read as they are; made again from q and k otherwise."""
    if request.param == "tiles":
        for limit in ("_SMALL_MAP", "_FUSED_MAP"):
            monkeypatch.setattr(xv.attention.layers, limit, 0)


def maps(x):
    """Each layer's probabilities [head, query, key], in float64."""
    x, found = np.asarray(x, np.float64), []
    for layer in WEIGHTS[:-1]:
        weights = {name: np.asarray(leaf, np.float64) for name, leaf in layer.items()}
        query, key, value = (
            (x @ weights[name]).reshape(len(x), 2, -1)
            for name in ("query", "key", "value")
        )
        scores = np.einsum("qhd,khd->hqk", query, key)
        exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
        found.append(exponentials / exponentials.sum(axis=-1, keepdims=True))
        x = x + np.einsum("hqk,khd->qhd", found[-1], value).reshape(x.shape)
        x = x + np.tanh(x @ weights["up"]) @ weights["down"]
    return found


def rollout(found, heads, residual, start):
    """The whole product, as the paper writes it."""
    product = np.eye(found[0].shape[-1])
    for layer in found[start:]:
        fused = getattr(np, heads)(layer, axis=0)
        mixed = residual * np.eye(len(fused)) + (1 - residual) * fused
        product = mixed / mixed.sum(axis=-1, keepdims=True) @ product
    return product


@pytest.mark.parametrize("heads", ["mean", "max", "min"])
@pytest.mark.parametrize("residual", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.usefixtures("way")
def test_every_row_of_the_float64_product(heads, residual, start):
    x = example()
    expected = rollout(maps(x), heads, residual, start)

    def row(query):
        explain = xv.attention_rollout(
            model, query=query, heads=heads, residual=residual, start_layer=start
        )
        return explain(x)

    rows = jax.jit(jax.vmap(row))(jnp.arange(LENGTH))
    np.testing.assert_allclose(rows.scores, expected, atol=2e-6)
    np.testing.assert_allclose(rows.diagnostics["mass"], 1, atol=1e-5)
    np.testing.assert_allclose(
        rows.diagnostics["self_share"], np.diag(expected), atol=2e-6
    )


@pytest.mark.usefixtures("way")
def test_two_layers_by_hand():
    """Maps [[3/4, 1/4], [1/2, 1/2]], then [[1/2, 1/2], [0, 1]], half residual.

    Mixed: [[7/8, 1/8], [1/4, 3/4]] and [[3/4, 1/4], [0, 1]]. Row 0 of the product,
    last layer first: 3/4 * [7/8, 1/8] + 1/4 * [1/4, 3/4] = [23/32, 9/32].
    """
    first = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]]))
    second = jnp.array([[0.0, 0.0], [-1e9, 0.0]])

    def two_layers(x):
        for bias in (first, second):
            query = jnp.zeros_like(x)
            scores = jnp.einsum("qd,kd->qk", query, x) + bias
            x = x + jax.nn.softmax(scores) @ x
        return x[0]

    attribution = xv.attention_rollout(two_layers)(jnp.ones((2, 3)))
    np.testing.assert_allclose(attribution.scores, [23 / 32, 9 / 32], rtol=1e-6)


def test_of_a_program_that_reverses_it_tops_the_position_itself():
    """Compiled, with exact Shapley values: one token decides, and rollout misses it.

    All that a rollout promises holds even so; the explained position's own share, of
    the residual, hides what it read.
    """
    program = compiled.load("reverse")
    forward = partial(compiled.forward, program.weights)
    # The middle one reads itself.
    places = np.array([0, 1, 3, 4])

    def both(tokens, place):
        # The token that begins every input comes before.
        make = partial(xv.attention_rollout, forward, query=place + 1)
        plain, other = (make(exclude_self=excluded) for excluded in (False, True))
        return plain(tokens, place), other(tokens, place)

    every = jax.jit(jax.vmap(jax.vmap(both, (None, 0)), (0, None)))
    plain, other = every(jnp.asarray(program.tokens), jnp.asarray(places))
    truth = program.shapley[:, places].argmax(axis=-1)
    assert (truth == compiled.LENGTH - 1 - places).all()
    assert (plain.scores >= 0).all()
    np.testing.assert_allclose(plain.diagnostics["mass"], 1, rtol=1e-5)
    top = lambda found: np.asarray(found.scores)[..., 1:].argmax(axis=-1)
    assert (top(plain) == places).all()
    assert (top(other) == truth).all()


@pytest.mark.usefixtures("way")
def test_layers_in_a_scan_are_layers():
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *WEIGHTS[:-1])

    def scanned(x):
        def layer(x, weights):
            split = lambda name: (x @ weights[name]).reshape(len(x), 2, -1)
            scores = jnp.einsum("qhd,khd->hqk", split("query"), split("key"))
            mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), split("value"))
            x = x + mixed.reshape(x.shape)
            return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

        return jax.lax.scan(layer, x, stacked)[0][0] @ WEIGHTS[-1]["head"]

    plain = xv.attention_rollout(model)(example())
    looped = xv.attention_rollout(scanned)(example())
    np.testing.assert_allclose(looped.scores, plain.scores, atol=1e-6)


@pytest.mark.usefixtures("way")
def test_two_sites_in_one_loop_run_turn_by_turn():
    keys = jax.random.split(jax.random.key(0), 6).reshape(3, 2)

    def attend(x, key):
        projected = x @ jax.random.normal(key, (4, 4))
        return x + jax.nn.softmax(projected @ x.T) @ x

    def looped(x):
        turn = lambda x, pair: (attend(attend(x, pair[0]), pair[1]), None)
        return jax.lax.scan(turn, x, keys)[0][0]

    def unrolled(x):
        for key in keys.reshape(-1):
            x = attend(x, key)
        return x[0]

    x = jax.random.normal(jax.random.key(1), (5, 4))
    np.testing.assert_allclose(
        xv.attention_rollout(looped)(x).scores,
        xv.attention_rollout(unrolled)(x).scores,
        atol=1e-6,
    )


@pytest.mark.usefixtures("way")
def test_identity_residual_keeps_the_row():
    explain = xv.attention_rollout(model, query=2, residual=1.0)
    assert explain(example()).scores.tolist() == [0, 0, 1, 0, 0]


@pytest.mark.usefixtures("way")
def test_a_position_outside_is_not_a_number():
    outside = jax.jit(lambda q: xv.attention_rollout(model, query=q)(example()))
    assert np.all(np.isnan(outside(LENGTH).scores))
    assert np.all(np.isfinite(outside(-LENGTH).scores))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": "median"}, "got 'median'"),
        ({"residual": 1.5}, "from 0 to 1 or .add., got 1.5"),
        ({"query": 5}, "from -5 to 4, got 5"),
        ({"query": 0.5}, "one integer position"),
        ({"start_layer": 2}, "from 0 to 1 for 2 layers, got 2"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(ValueError, match=said):
        xv.attention_rollout(model, **options)(example())


def test_models_without_attention_are_refused():
    with pytest.raises(ValueError, match="no attention to explain; tracing found noth"):
        xv.attention_rollout(lambda x: x @ jnp.ones((8, 3)) @ jnp.ones((3,)))(example())


def test_queries_that_are_some_of_the_keys_are_refused():
    def cross(x):
        return (jax.nn.softmax(x[:2] @ x.T) @ x)[0]

    with pytest.raises(ValueError, match="the queries of 'attention' are made of"):
        xv.attention_rollout(cross)(example())


def test_sealed_and_unknown_attention_is_refused():
    sealed = tracing.Site("splash", "attention", shape=(1, 1, 5, 5), why="no mask")
    with pytest.raises(ValueError, match="'splash' cannot be read: no mask"):
        self_attention([sealed])
    unknown = tracing.Site("kernel", "unknown", why="no signature")
    with pytest.raises(ValueError, match="not understood: 'kernel': no signature"):
        self_attention([unknown])


def test_batches_are_refused():
    def batched(x):
        return jax.vmap(model)(x)[0]

    with pytest.raises(ValueError, match="a batch of 3"):
        xv.attention_rollout(batched)(example(3))


def test_what_the_model_attends_to_is_what_is_captured():
    _, captured = tracing.capture(model)(example())
    for own, expected in zip(captured.values(), maps(example()), strict=True):
        np.testing.assert_allclose(own["probabilities"][0], expected, atol=1e-6)
