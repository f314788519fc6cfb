"""Attention written in other ways: the numbers are right, or the model is refused.

Each model keeps its maps at hand, and what is expected is worked out of these.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import xviz_jax as xv
from xviz_jax import tracing

LENGTH, WIDTH = 6, 8
RANDOM = np.random.default_rng(7)
X, Y = (jnp.asarray(RANDOM.normal(size=(LENGTH, WIDTH)), jnp.float32) for _ in "xy")
WQ, WK, WV = (
    jnp.asarray(RANDOM.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5, jnp.float32)
    for _ in range(3)
)
HEAD = jnp.asarray(RANDOM.normal(size=(WIDTH, 3)), jnp.float32)
EYE = np.eye(LENGTH)
EARLIER = jnp.tril(jnp.ones((LENGTH, LENGTH)))


def scores(x):
    return jnp.matmul(x @ WQ, (x @ WK).T, precision="highest") / WIDTH**0.5


def layer(x, weights=jax.nn.softmax):
    return x + weights(scores(x)) @ (x @ WV)


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)


# What happens between the softmax and the values.


def masked_softmax(s):
    found = jax.nn.softmax(s * EARLIER) * EARLIER
    return found / (found.sum(-1, keepdims=True) + 1e-13)


def strongest_three(s):
    found = jax.nn.softmax(s)
    found = jnp.where(found >= jnp.sort(found, -1)[:, -3:-2], found, 0)
    return found / found.sum(-1, keepdims=True)


def sharpened(s):
    found = jax.nn.softmax(s) ** 2
    return found / found.sum(-1, keepdims=True)


def leaking(s):
    return 0.9 * jax.nn.softmax(s) + 0.1 / LENGTH


@pytest.mark.parametrize(
    "weights", [masked_softmax, strongest_three, sharpened, leaking]
)
def test_what_weighs_the_values_is_shown(weights):
    model = lambda x: layer(x, weights)[2] @ HEAD
    own = np.asarray(weights(scores(X)))
    found = xv.raw_attention(model, query=2)(X, target=1)
    close(found.scores, own[2])
    found = xv.attention_rollout(model, query=2)(X, target=1)
    close(found.scores, (EYE / 2 + own / 2)[2])

    def moved(change):
        return ((X + (weights(scores(X)) + change) @ (X @ WV))[2] @ HEAD)[1]

    slope = np.asarray(jax.grad(moved)(jnp.zeros((LENGTH, LENGTH))))
    found = xv.attention_relevance(model, query=2)(X, target=1)
    close(found.scores, EYE[2] + np.maximum(own * slope, 0)[2])
    (site,) = [s for s in tracing.sites(model, X) if s.kind == "attention"]
    assert site.scale is None
    assert "is changed before it weighs" in site.why


def test_dropout_leaves_the_probabilities_what_they_are():
    key = jax.random.key(0)

    def dropped(s):
        kept = jax.random.bernoulli(key, 0.5, s.shape)
        return jnp.where(kept, jax.nn.softmax(s) / 0.5, 0)

    model = lambda x: layer(x, dropped)[2] @ HEAD
    found = xv.raw_attention(model, query=2)(X, target=1)
    close(found.scores, jax.nn.softmax(scores(X))[2])


# A division that comes after the product with the values.


def with_sink(x):
    found = jnp.exp(scores(x))
    total = found.sum(-1, keepdims=True) + jnp.exp(0.7)
    return x + (found @ (x @ WV)) / total


def masked_late(x):
    found = jnp.where(EARLIER > 0, jnp.exp(scores(x)), 0)
    return x + (found @ (x @ WV)) / found.sum(-1, keepdims=True)


def by_reciprocal(x):
    found = jnp.exp(scores(x))
    share = 1 / (1 + found.sum(-1, keepdims=True))
    return x + (found @ (x @ WV)) * share


def weights_of(layer):
    """What a layer's values are weighed by: the slope of its output in these."""
    plain = {with_sink: jnp.exp(0.7), masked_late: 0.0, by_reciprocal: 1.0}
    found = np.exp(np.asarray(scores(X), np.float64))
    found = found * np.asarray(EARLIER) if layer is masked_late else found
    return found / (found.sum(-1, keepdims=True) + plain[layer])


@pytest.mark.parametrize("layer", [with_sink, masked_late, by_reciprocal])
def test_a_division_that_comes_later(layer):
    model = lambda x: layer(x)[2] @ HEAD
    own = weights_of(layer)
    close(xv.raw_attention(model, query=2)(X, target=1).scores, own[2])
    found = xv.attention_rollout(model, query=2)(X, target=1)
    close(found.scores, (EYE / 2 + own / 2)[2])
    close(xv.attention_statistics(model)(X).scores, own.mean(0))
    slope = np.asarray((HEAD[:, 1] @ (X @ WV).T)[None])
    found = xv.attention_relevance(model, query=2)(X, target=1)
    close(found.scores, EYE[2] + np.maximum(own[2] * slope[0], 0))


def test_a_sum_that_comes_later_and_is_of_more():
    """To change weights, their sum would have to be known before."""

    def model(x):
        found = jnp.exp(scores(x))
        return ((found @ (x @ WV)) / (found.sum(-1, keepdims=True) + 1))[2] @ HEAD

    found = np.exp(np.asarray(scores(X), np.float64))
    own = found / (1 + found.sum(-1, keepdims=True))
    close(xv.raw_attention(model, query=2)(X, target=1).scores, own[2])
    with pytest.raises(ValueError, match="its map can be read, but not changed"):
        xv.attention_relevance(model, query=2)(X, target=1)


# Layers that are no softmax of a product must not be passed over.


def float_mask(x):
    found = jnp.exp(scores(x)) * EARLIER
    return found / found.sum(-1, keepdims=True)


def distances(x):
    return jax.nn.softmax(-jnp.sum(((x @ WQ)[:, None] - (x @ WK)[None]) ** 2, -1))


def over_queries(x):
    return jax.nn.softmax(scores(x), axis=0)


UNKNOWN = {
    float_mask: "a function of scores that is no softmax",
    lambda x: jax.nn.sigmoid(scores(x)) / LENGTH: "that is no softmax",
    lambda x: jax.nn.relu(scores(x)) ** 2 / LENGTH: "that is no softmax",
    distances: "no product of queries and keys",
    over_queries: "is over queries, not over keys",
}


@pytest.mark.parametrize("weights", UNKNOWN)
def test_no_layer_is_passed_over(weights):
    model = lambda x: layer(x + weights(x) @ (x @ WV))[3] @ HEAD
    for method in (xv.attention_rollout, xv.attention_relevance, xv.raw_attention):
        with pytest.raises(ValueError, match=UNKNOWN[weights]):
            method(model)(X, target=1)


def test_what_is_no_layer_is_no_obstacle():
    """Gates, routers, a pooling by one learned query, and derivatives of it all."""

    def model(x):
        x = layer(x)
        x = x + jax.nn.sigmoid(x @ WQ) * (x @ WK)
        x = x + jax.nn.softmax(x @ WK[:, :2]) @ jnp.stack([WV[0], WV[1]])
        return jax.nn.softmax(layer(x) @ HEAD[:, 0]) @ x @ HEAD

    found = xv.attention_rollout(model, query="mean")(X, target=1)
    np.testing.assert_allclose(found.diagnostics["mass"], 1, rtol=1e-5)
    push = jax.grad(lambda x: model(x)[1])
    kinds = {site.kind for site in tracing.sites(push, X)}
    assert "unknown" not in kinds


# Where positions go.

ORDERS = {
    "rev": lambda x: x[::-1],
    "gather": lambda x: x[np.array([2, 0, 1, 5, 3, 4])],
    "concatenate": lambda x: jnp.roll(x, 2, axis=0),
}


@pytest.mark.parametrize("name", ORDERS)
def test_positions_in_another_order(name):
    between = lambda x: layer(ORDERS[name](layer(x)))[0] @ HEAD
    placed = lambda x: layer(ORDERS[name](layer(x)) + Y)[0] @ HEAD
    around = lambda x: (x + ORDERS[name](layer(ORDERS[name](x))))[0] @ HEAD
    for model in (between, placed, around):
        for method in (xv.attention_rollout, xv.raw_attention, xv.grad_sam):
            with pytest.raises(ValueError, match=f"{name!r} puts positions .* order"):
                method(model)(X, target=1)


def test_what_keeps_the_order():
    """Shifted tokens and sorted ones beside their own, prompts put in place."""

    def model(x):
        x = layer(x)
        x = x + 0.5 * jnp.concatenate([jnp.zeros((1, WIDTH)), x[:-1]])
        order = jnp.argsort(x[:, 0])
        x = x + jnp.tanh(x[order] @ WQ)[jnp.argsort(order)]
        x = layer(jnp.concatenate([Y[:2], x[2:]])[np.arange(LENGTH)])
        own = jnp.stack([x @ WQ, x @ WK], axis=1)[jnp.arange(LENGTH), order % 2]
        return (layer(x + own)[::-1][3] + x[np.arange(LENGTH)][2]) @ HEAD

    found = xv.attention_rollout(model, query=2)(X, target=1)
    assert found.scores.shape == (LENGTH,)


READOUTS = {
    "gated": lambda x: jax.nn.sigmoid(x @ HEAD[:, 0]) @ x @ HEAD,
    "bilinear": lambda x: (x.T @ x)[0] @ HEAD,
    "quadratic": lambda x: jnp.einsum("nd,nd,dc->c", x @ WQ, x, HEAD),
    "tied": lambda x: (jax.nn.relu(x @ (WQ + WK @ WV)) @ (WQ + WK @ WV).T)[0] @ HEAD,
    "averaged classes": lambda x: (
        jax.nn.softmax(x @ HEAD[:, 0]) @ jax.nn.softmax(x @ HEAD)
    ),
}


@pytest.mark.parametrize("name", READOUTS)
def test_what_comes_after_attention_is_no_attention(name):
    model = lambda x: READOUTS[name](layer(x))
    own = np.asarray(jax.nn.softmax(scores(X)))
    found = xv.attention_rollout(model, query="mean")(X, target=1)
    close(found.scores, (EYE / 2 + own / 2).mean(0))


def test_heads_that_are_picked():
    """Keys and values each by a gather of heads: their positions are one sequence's."""

    def model(x):
        query, key, value = (x @ w for w in (WQ, WK, WV))
        split = lambda y: y.reshape(LENGTH, 2, WIDTH // 2)
        key, value = (split(y)[:, np.array([0, 0, 1, 1])] for y in (key, value))
        query = jnp.concatenate([split(query)] * 2, axis=1)
        own = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", query, key))
        mixed = jnp.einsum("hqk,khd->qhd", own, value)[:, :2].reshape(LENGTH, WIDTH)
        return (x + mixed)[0] @ HEAD

    found = xv.attention_rollout(model)(X, target=1)
    np.testing.assert_allclose(found.diagnostics["mass"], 1, rtol=1e-5)


def test_two_sequences_of_one_length():
    """One tells the other only its mean: no attention leads there."""

    def model(inputs):
        question, passage = inputs
        return layer(passage + layer(question).mean(0, keepdims=True))[0] @ HEAD

    for method in (xv.attention_rollout, xv.attention_relevance):
        with pytest.raises(ValueError, match="name their sequence in `streams`"):
            method(model)((X, Y), target=1)


def test_values_of_another_sequence():
    def model(inputs):
        own, other = inputs
        return (own + jax.nn.softmax(scores(own)) @ (other @ WV))[0] @ HEAD

    with pytest.raises(ValueError, match=r"keys .* of one sequence and its values"):
        xv.attention_rollout(model)((X, Y), target=1)


def test_keys_and_values_that_are_each_shifted():
    """Their positions begin in two arrays, and both of these in one."""
    zero = jnp.zeros((1, WIDTH))
    shift = lambda x: jnp.concatenate([zero, x])[:-1]

    def model(x):
        own = jax.nn.softmax(shift(x @ WQ) @ shift(x @ WK).T)
        return (x + own @ shift(x @ WV))[0] @ HEAD

    own = np.asarray(jax.nn.softmax(shift(X @ WQ) @ shift(X @ WK).T))
    slope = np.zeros((LENGTH, LENGTH))
    slope[0] = np.asarray(HEAD[:, 1] @ shift(X @ WV).T)
    # Queries and keys begin in two arrays, and are two sequences.
    _, keys = xv.grad_sam(model)(X, target=1).scores.values()
    close(keys, (own * np.maximum(slope, 0)).mean(0))


def test_a_deep_layer_is_not_passed_over():
    """However far the inputs are."""

    def model(x):
        for _ in range(60):
            x = layer(jnp.tanh(x * 1.5 + 0.5) - 0.5)
        x = x + jax.nn.sigmoid(scores(x)) @ (x @ WV)
        return layer(x)[0] @ HEAD

    kinds = [site.kind for site in tracing.sites(model, X)]
    assert kinds.count("unknown") == 1


def test_one_map_for_two_layers():
    def model(x):
        own = jax.nn.softmax(scores(x))
        x = jnp.tanh(x + own @ (x @ WV))
        return (x + own @ (x @ WK))[0] @ HEAD

    with pytest.raises(ValueError, match="weighs more values, made of what it gave"):
        xv.attention_rollout(model)(X, target=1)


RELATIVE = jnp.asarray(RANDOM.normal(size=(LENGTH, LENGTH, WIDTH)), jnp.float32)


OWN = jax.nn.softmax(scores(X))


def relative_values(x, change):
    own = jax.nn.softmax(scores(x)) if change is None else OWN + change
    added = own @ (x @ WV) + jnp.einsum("qk,qkd->qd", own, RELATIVE)
    return (x + added)[0] @ HEAD


def copying(x, change):
    own = jax.nn.softmax(scores(x)) if change is None else OWN + change
    # What is read twice is the map by another name.
    own = checkpoint_name(own, "map")
    copied = (
        3 * own[0] @ jnp.asarray(np.eye(3, dtype=np.float32)[np.arange(LENGTH) % 3])
    )
    return (x + own @ (x @ WV))[0] @ HEAD + copied


@pytest.mark.parametrize("model", [relative_values, copying])
def test_a_map_that_is_used_twice(model):
    """The gradient at the map is of all its uses."""
    none = jnp.zeros((LENGTH, LENGTH))
    slope = np.asarray(jax.grad(lambda change: model(X, change)[1])(none))
    own = np.asarray(OWN)
    explained = lambda x: model(x, None)
    found = xv.grad_sam(explained)(X, target=1)
    close(found.scores, (own * np.maximum(slope, 0)).mean(0))
    found = xv.attention_relevance(explained, query="mean")(X, target=1)
    close(found.scores, (EYE + np.maximum(own * slope, 0)).mean(0))


def one_key_for_all_heads(x, change):
    query, value = (x @ w for w in (WQ, WV))
    query, value = (each.reshape(LENGTH, 2, WIDTH // 2) for each in (query, value))
    own = jax.nn.softmax(jnp.einsum("qhd,kd->hqk", query, x @ WK[:, : WIDTH // 2]))
    moved = own if change is None else own + change
    mixed = jnp.einsum("hqk,khd->qhd", moved, value).reshape(LENGTH, WIDTH)
    return (x + mixed)[0] @ HEAD, own


@pytest.mark.parametrize("query", [0, "mean"])
def test_keys_and_values_of_unlike_heads(query):
    none = jnp.zeros((2, LENGTH, LENGTH))
    slope = jax.grad(lambda change: one_key_for_all_heads(X, change)[0][1])(none)
    own = one_key_for_all_heads(X, none)[1]
    cam = np.maximum(np.asarray(own * slope), 0).mean(0) + EYE
    model = lambda x: one_key_for_all_heads(x, None)[0]
    found = xv.attention_relevance(model, query=query)(X, target=1)
    close(found.scores, cam.mean(0) if query == "mean" else cam[0])


# Masks.


MODULE = nn.MultiHeadDotProductAttention(num_heads=2)
VARIABLES = MODULE.init(jax.random.key(9), X)


def padded(x):
    """As flax masks padding: of its rows no key is seen, and softmax is uniform."""
    real = jnp.arange(LENGTH) < 4
    mask = nn.make_attention_mask(real, real)
    x = x + MODULE.apply(VARIABLES, x, x, mask=mask)
    return jnp.where(real[:, None], x, 0).sum(axis=0) / 4 @ HEAD


def test_rows_of_padding_are_no_rows():
    model = padded
    found = tracing.capture(model, values=("probabilities",))(X)[1]
    (own,) = [site["probabilities"][0] for site in found.values() if site]
    own = np.asarray(own.mean(0))
    weights = np.array([1, 1, 1, 1, 0, 0]) / 4
    close(xv.raw_attention(model, query="mean")(X, target=1).scores, weights @ own)
    found = xv.attention_rollout(model, query="mean")(X, target=1)
    close(found.scores, weights @ (EYE / 2 + own / 2))
    every = xv.attention_rollout(model, query=None)(X, target=1).scores
    np.testing.assert_array_equal(every[4:], 0)
    close(every[:4], (EYE / 2 + own / 2)[:4])


@pytest.mark.parametrize("fill", [-1e4 / 64**0.5, -1e3])
def test_padding_that_is_only_far_down(fill):
    bias = jnp.where(jnp.arange(LENGTH) < 4, 0.0, fill)
    model = lambda x: layer(x, lambda s: jax.nn.softmax(s + bias[None]))[0] @ HEAD
    own = np.asarray(jax.nn.softmax(scores(X) + bias[None]))[:4].mean(0)
    close(xv.attention_statistics(model)(X).scores, own)


TIMES = np.arange(LENGTH) * 0.5
SEEN = {
    "less than a fraction ahead": TIMES[:, None] + 1.2 > TIMES,
    "whole parts": TIMES.astype(int)[:, None] >= TIMES.astype(int),
}


def by_times(name, x):
    times = jnp.arange(LENGTH, dtype=jnp.float32) * 0.5
    if name == "whole parts":
        times = times.astype(jnp.int32)
        seen = times[:, None] >= times[None]
    else:
        seen = times[:, None] + 1.2 > times[None]
    return jax.nn.softmax(jnp.where(seen, scores(x), -1e9))


@pytest.mark.parametrize("name", SEEN)
def test_masks_of_times_that_are_no_integers(name):
    model = lambda x: (x + by_times(name, x) @ (x @ WV))[2] @ HEAD
    (site,) = [s for s in tracing.sites(model, X) if s.kind == "attention"]
    assert (site.causal, site.window) == (None, None)
    mask = tracing.capture(model, values=("remaining_mask",))(X)[1]
    np.testing.assert_array_equal(
        np.broadcast_to(mask["attention"]["remaining_mask"][0, 0], (LENGTH, LENGTH)),
        SEEN[name],
    )
    slope = np.zeros((LENGTH, LENGTH))
    slope[2] = np.asarray(HEAD[:, 1] @ (X @ WV).T)
    own = np.asarray(by_times(name, X))
    found = xv.grad_sam(model)(X, target=1)
    close(found.scores, (own * np.maximum(slope, 0)).mean(0))


def test_a_cap_after_the_mask():
    """What is masked still has the lowest score that there is."""

    def capped(s):
        s = jnp.where(EARLIER > 0, s, -1e9)
        return jax.nn.softmax(3 * jnp.tanh(s / 3))

    model = lambda x: layer(x, capped)[2] @ HEAD
    slope = np.zeros((LENGTH, LENGTH))
    slope[2] = np.asarray(HEAD[:, 1] @ (X @ WV).T)
    found = xv.grad_sam(model)(X, target=1)
    own = np.asarray(capped(scores(X)))
    assert own[2, 3:].min() > 0
    close(found.scores, (own * np.maximum(slope, 0)).mean(0))


# Relevance rules.

SOFTMAXES = {
    "logsumexp": lambda s: jnp.exp(s - jax.nn.logsumexp(s, -1, keepdims=True)),
    "log_softmax": lambda s: jnp.exp(jax.nn.log_softmax(s)),
    "written twice": lambda s: jnp.exp(s) / jnp.exp(s).sum(-1, keepdims=True),
    "reciprocal": lambda s: jnp.exp(s) * (1 / jnp.exp(s).sum(-1, keepdims=True)),
    "power": lambda s: jnp.exp(s) * jnp.exp(s).sum(-1, keepdims=True) ** -1,
}


@pytest.mark.parametrize("name", SOFTMAXES)
@pytest.mark.parametrize("method", [xv.attn_lrp, xv.cp_lrp])
def test_relevance_of_a_softmax_written_otherwise(name, method):
    plain = lambda x: layer(layer(x))[0] @ HEAD
    other = lambda x: layer(layer(x, SOFTMAXES[name]), SOFTMAXES[name])[0] @ HEAD
    wanted, found = (method(model)(X, target=1) for model in (plain, other))
    close(found.scores, wanted.scores)
    close(found.diagnostics["conserved"], wanted.diagnostics["conserved"])


def test_relevance_past_a_sink():
    """A column that is cut off again; conservatively, all of it is constant."""

    def model(x):
        s = jnp.concatenate([scores(x), jnp.full((LENGTH, 1), 0.3)], axis=1)
        return (x + jax.nn.softmax(s)[:, :-1] @ (x @ WV))[0] @ HEAD

    found = xv.cp_lrp(model)(X, target=1)
    close(found.diagnostics["conserved"], found.output)


def by_mean(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def by_einsum(x):
    total = jnp.einsum("nd,nd->n", x, x)[:, None]
    return x / jnp.sqrt(total / WIDTH + 1e-6)


def by_flax(x):
    module = nn.RMSNorm(epsilon=1e-6)
    return module.apply(module.init(jax.random.key(0), x), x)


@pytest.mark.parametrize("norm", [by_mean, by_einsum, by_flax])
@pytest.mark.parametrize("method", [xv.attn_lrp, xv.cp_lrp])
def test_relevance_of_norms(norm, method):
    """The divisor is a constant, also of what an activation bends."""
    model = lambda x: norm(jax.nn.silu(x @ WQ))[0] @ HEAD
    divisor = jax.lax.stop_gradient
    hidden = jax.nn.silu(X @ WQ)
    scale = divisor(norm(hidden) / hidden)
    close(
        method(model)(X, target=1).scores,
        method(lambda x: (jax.nn.silu(x @ WQ) * scale)[0] @ HEAD)(X, target=1).scores,
    )
