"""Relevance by edited gradients, against rules written out and against conservation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import xviz_jax as xv
from tests.attention.rules import Part, Rules
from tests.attention.test_co_attention import HEAD as CROSS_HEAD
from tests.attention.test_co_attention import EncoderDecoder
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.attention.relevance_rules import propagating

WIDTH, HEADS, LENGTH = 8, 4, 5


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape) / shape[0] ** 0.5


X = draw(0, LENGTH, WIDTH) * 2
NAMES = ("query", "key", "value", "out", "up", "gate", "down")


def draw_layers(depth, groups=1, biased=False):
    """Weights; of keys and values as many heads as there are groups of queries'."""
    layers = []
    for layer in range(1, depth + 1):
        wide = lambda name: WIDTH // (groups if name in ("key", "value") else 1)
        w = {n: draw(10 * layer + i, WIDTH, wide(n)) for i, n in enumerate(NAMES)}
        if biased:
            named = enumerate((*NAMES, "norm"))
            w |= {f"{n}_bias": draw(200 * layer + i, 1, wide(n)) for i, n in named}
        layers.append(w)
    return layers


LAYERS = draw_layers(2)
HEAD = draw(99, WIDTH, 3)


def rms(x):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def layer_norm(x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + 1e-6)


def dense(x, w, name):
    return x @ w[name] + w.get(f"{name}_bias", 0.0)


def gated(x, w):
    return dense(jax.nn.silu(dense(x, w, "gate")) * dense(x, w, "up"), w, "down")


def plain(activation):
    return lambda x, w: activation(x @ w["up"]) @ w["down"]


def attend(h, w, causal):
    dim = WIDTH // HEADS
    key, value = (dense(h, w, n).reshape(len(h), -1, dim) for n in ("key", "value"))
    query = dense(h, w, "query").reshape(len(h), key.shape[1], -1, dim)
    scores = jnp.einsum("qhgd,khd->hgqk", query, key) / 2
    seen = jnp.tril(jnp.ones((len(h), len(h)), bool)) | (not causal)
    maps = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return dense(jnp.einsum("hgqk,khd->qhgd", maps, value).reshape(h.shape), w, "out")


def block(x, w, norm=rms, mlp=gated, causal=True):
    normed = lambda x: norm(x) + w.get("norm_bias", 0.0)
    x = x + attend(normed(x), w, causal)
    return x + mlp(normed(x), w)


def network(x, layers=LAYERS, norm=rms, **options):
    for w in layers:
        w = jax.tree.map(lambda a, x=x: jnp.asarray(a, x.dtype), w)
        x = block(x, w, norm=norm, **options)
    return norm(x)[-1] @ jnp.asarray(HEAD, x.dtype)


def scanned(x, wrap=lambda f: f):
    stack = jax.tree.map(lambda *a: jnp.asarray(np.stack(a), x.dtype), *LAYERS)
    step = wrap(lambda x, w: (block(x, w), None))
    return rms(jax.lax.scan(step, x, stack)[0])[-1] @ jnp.asarray(HEAD, x.dtype)


def silu(x):
    return x / (1 + np.exp(-x))


def by_rules(rules, x, layers, causal=True):
    """The network again, for float64 rules."""
    seen = np.tril(np.ones((LENGTH, LENGTH), bool)) | (not causal)
    for w in layers:
        normed = lambda x, w=w: (
            rules.bias(rules.norm(x), w["norm_bias"])
            if "norm_bias" in w
            else rules.norm(x)
        )
        h = normed(x)
        x = rules.add(x, rules.attend(h, h, w, HEADS, seen))
        h = normed(x)
        gate = rules.curved(rules.dense(h, w, "gate"), silu)
        product = rules.gated(gate, rules.dense(h, w, "up"))
        x = rules.add(x, rules.dense(product, w, "down"))
    return rules.linear(rules.row(rules.norm(x), -1), HEAD)


METHODS = [xv.attn_lrp, xv.cp_lrp]
NETWORKS = {
    "one layer": {"layers": draw_layers(1)},
    "two layers, grouped, with biases, all seen": {
        "layers": draw_layers(2, groups=2, biased=True),
        "causal": False,
    },
    "three layers, one head of keys, with biases": {
        "layers": draw_layers(3, groups=HEADS, biased=True)
    },
}


def check(scores, output, parts, rules, logit):
    """Scores are the rules'; with what biases and softmaxes take they add up."""
    np.testing.assert_allclose(output, logit, rtol=1e-5)
    scale = max(np.abs(part.relevance).max() for part in parts)
    for found, part in zip(scores, parts, strict=True):
        np.testing.assert_allclose(found, part.relevance, atol=1e-5 * scale)
    total = sum(found.sum() for found in scores) + sum(rules.absorbed.values())
    np.testing.assert_allclose(total, output, atol=1e-4 * scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_rules_written_out_and_what_they_conserve(name, method):
    """Of gates, norms, grouped heads and causal maps, in numpy and float64."""
    options, conservative = NETWORKS[name], method is xv.cp_lrp
    explain = method(lambda x: network(x, **options))
    with jax.enable_x64(True):
        targets = jax.vmap(lambda target: explain(jnp.asarray(X), target=target))
        found = jax.jit(targets)(jnp.arange(3))
    for target in range(3):
        rules, x = Rules(conservative), Part(X)
        logits = by_rules(rules, x, **options)
        rules.explain(logits, target)
        scores, output = found.scores[target], found.output[target]
        check([scores], output, [x], rules, logits.value[target])
        taken = rules.absorbed
        assert abs(taken["softmaxes"]) > 1e-3 or conservative
        assert (abs(taken["biases"]) > 1e-3) == ("norm_bias" in options["layers"][0])
        assert taken["softmaxes"] == 0 or not conservative


@pytest.mark.parametrize("method", METHODS)
def test_cross_attention(method):
    """Relevance of both sequences of an encoder and a causal decoder."""
    model, target = EncoderDecoder(pad=2), 1
    with jax.enable_x64(True):
        x, source = model.inputs()
        explain = method(model, argnums=(0, 1))
        found = jax.jit(lambda x, y: explain(x, y, target=target))(x, source)
    rules, parts = Rules(method is xv.cp_lrp), (Part(x), Part(source))

    def attend(x, y, w, seen):
        return rules.norm(rules.add(x, rules.attend(x, y, w, 2, seen)))

    def layer(x, y, w, seen):
        normed = attend(x, y, w, seen)
        return rules.add(normed, rules.curved(normed, np.tanh))

    h, memory = parts
    seen = np.arange(model.other) < model.other - model.pad
    for w in model.encoder:
        memory = layer(memory, memory, w["own"], seen)
    for w in model.decoder:
        h = attend(h, h, w["own"], np.tril(np.ones((model.own, model.own), bool)))
        h = layer(h, memory, w["cross"], seen)
    logits = rules.linear(rules.row(h, -1), CROSS_HEAD)
    rules.explain(logits, target)
    check(found.scores, found.output, parts, rules, logits.value[target])
    assert not found.scores[1][-model.pad :].any()
    assert np.abs(found.scores[1]).max() > 0.01


def test_two_layers_by_hand():
    """Features 1 and 2 attend to each other, then the first to both.

    Scores log 2 x_q x_k: maps [1/3, 2/3] and [1/5, 4/5], features [5/3, 9/5]. Scores
    9/2 log 3 x_q x_k: the first row is [1/4, 3/4], the output 53/30, and of its scores
    25/2 log 3 and 27/2 log 3 the relevance is [-25, 27] log 3 / 160, of which half is
    the query's and half the keys'. Conservatively, each feature gets itself times
    [1/4, 3/4] of its column of the first maps.
    """

    def model(x):
        for scale in (math.log(2), 4.5 * math.log(3)):
            x = jax.nn.softmax(scale * x[:, None] * x[None]) @ x
        return x[:1]

    two, three = math.log(2), math.log(3)
    first, second = 5 / 24 - 23 * three / 320, 27 / 40 + 27 * three / 320
    expected = [
        first / 10 + (1 / 18 - 2 * two / 45) * second,
        (2 / 5 + two / 15) * first + (4 / 9 + 2 * two / 15) * second,
    ]
    both = jax.jit(lambda x: [method(model)(x) for method in METHODS])
    found, conservative = both(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(found.output, 53 / 30, rtol=1e-5)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)
    np.testing.assert_allclose(conservative.scores, [7 / 30, 46 / 30], rtol=1e-5)


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu-tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "leaky": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
    "squared relu": lambda x: jax.nn.relu(x) ** 2,
    "hard swish": jax.nn.hard_swish,
}
NORMS = {
    "rms": rms,
    "layer": layer_norm,
    "flax": lambda x: nnx.LayerNorm(WIDTH, use_bias=False, rngs=nnx.Rngs(0))(x),
    "length": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "standardized": lambda x: jax.nn.standardize(x),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_conservation_through_activations(activation):
    """What is conserved without biases, and without softmaxes in the way."""
    model = lambda x: network(x, mlp=plain(ACTIVATIONS[activation]))
    found = jax.jit(lambda x: xv.cp_lrp(model)(x, target=1))(jnp.float32(X))
    np.testing.assert_allclose(found.output, model(jnp.float32(X))[1], rtol=1e-4)
    np.testing.assert_allclose(found.scores.sum(), found.output, rtol=2e-4, atol=1e-5)
    assert found.diagnostics["conserved"] == found.scores.sum()


@pytest.mark.parametrize("norm", NORMS)
def test_conservation_through_norms(norm):
    model = lambda x: network(x, norm=NORMS[norm])
    found = jax.jit(lambda x: xv.cp_lrp(model)(x, target=2))(jnp.float32(X))
    np.testing.assert_allclose(found.scores.sum(), found.output, rtol=2e-4, atol=1e-5)


def test_products_share():
    """Three factors: a half to the last, a quarter to each of the first two."""
    model = lambda x: (x[0] * x[1] * x[2])[None]
    scores = xv.attn_lrp(model)(jnp.array([2.0, 3.0, 5.0])).scores
    np.testing.assert_allclose(scores, [7.5, 7.5, 15.0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_loops_are_their_layers(method, wrap):
    x = jnp.float32(X)
    rolled = method(lambda x: scanned(x, wrap))(x, target=0).scores
    flat = method(network)(x, target=0).scores
    np.testing.assert_allclose(rolled, flat, rtol=1e-4, atol=1e-5)


def test_values_stay_as_they_are():
    edited = propagating(network, jnp.float32(X), conservative=False)
    np.testing.assert_array_equal(
        jax.jit(edited)(jnp.float32(X)), jax.jit(network)(jnp.float32(X))
    )


def test_biases_take_their_part():
    """z = 2 * 3 + 4: of the relevance tanh(z), six tenths reach the input."""
    model = lambda x: jnp.tanh(2 * x + jnp.array([4.0]))
    found = xv.attn_lrp(model)(jnp.array([3.0]))
    np.testing.assert_allclose(found.scores, 0.6 * found.output, rtol=1e-6)


def test_tokens_and_branches():
    table = jnp.float32(draw(5, 7, WIDTH))
    tokens = jnp.array([1, 6, 2])
    model = lambda t: network(table[t])
    found = xv.attn_lrp(model)(tokens, target=1)
    rows = xv.attn_lrp(network)(table[tokens], target=1).scores
    np.testing.assert_allclose(found.scores, rows.sum(axis=1), rtol=1e-4, atol=1e-6)
    branch = lambda x, on: jax.lax.cond(on, jnp.tanh, lambda x: x * 3, x)
    both = [xv.attn_lrp(branch)(jnp.ones(2), on).scores for on in (True, False)]
    np.testing.assert_allclose(both[0], [np.tanh(1), 0], rtol=1e-6)
    np.testing.assert_allclose(both[1], [3.0, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda x: jnp.sort(x), "no rule for 'sort'"),
        (lambda x: x / x[::-1], "quotient of two arrays"),
        (lambda x: jax.lax.while_loop(lambda x: x[0] < 1, lambda x: 2 * x, x), "while"),
        (lambda x: jnp.cumprod(x), "no rule for"),
    ],
)
def test_what_has_no_rule_is_named(model, said):
    with pytest.raises(ValueError, match=said):
        xv.attn_lrp(model)(jnp.ones(3), target=0)


def test_what_the_output_does_not_need_needs_no_rule():
    model = lambda x: jax.nn.softmax(x) + 0 * jax.lax.stop_gradient(jnp.sort(x))
    assert xv.attn_lrp(model)(jnp.arange(3.0), target=0).scores.any()
