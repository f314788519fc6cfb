"""Rows that a model's output reads: by tracing, against weights that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.attention.test_goldens import opened
from tests.attention.test_methods import NETWORKS, WIDTH, Network
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.tracing import pooling
from xviz_jax.tracing.program import trace

NETWORK = NETWORKS["padded"]
REAL, LENGTH = NETWORK.length, NETWORK.length + NETWORK.pad
SEEN = np.arange(LENGTH) < REAL
HEAD = np.float32(np.random.default_rng(0).normal(size=(WIDTH, 3)))
SHARES = np.float32(np.arange(LENGTH))


def pooled(pool, network: Network = NETWORK):
    """The padded network, read by `pool` of its last tokens and of the mask."""

    def model(x, seen):
        weights = jax.tree.map(jnp.float32, network.weights())
        weights.pop("head")
        step = lambda x, w: (network.block(x, w)[0], None)
        x, _ = jax.lax.scan(step, x, weights)
        return pool(x, seen)

    return model


def masked(x, seen):
    count = jnp.sum(seen, dtype=jnp.float32)
    return jnp.sum(jnp.where(seen[:, None], x, 0), axis=0) / count @ HEAD


def weighed(x, seen):
    share = seen.astype(jnp.float32)[:, None]
    return jnp.sum(x * share, axis=0) / jnp.sum(share) @ HEAD


def normed(x, seen):
    """The mean of a norm, whose scale comes before it, and whose bias after."""
    x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))
    scale = jnp.linspace(0.0, 1.0, WIDTH)
    return jnp.mean(x * scale[None] + 1.0, axis=0) @ HEAD


alike = np.full(LENGTH, 1 / LENGTH)
one = lambda position: np.eye(LENGTH)[position]
# How the output reads the sequence, and the weights that this means.
POOLS = {
    "first": (lambda x, seen: x[0] @ HEAD, one(0)),
    "last, after the head": (lambda x, seen: (x @ HEAD)[-1], one(-1)),
    "the last that is seen": (
        lambda x, seen: x[jnp.sum(seen) - 1] @ HEAD,
        one(REAL - 1),
    ),
    "mean": (lambda x, seen: jnp.mean(x, axis=0) @ HEAD, alike),
    "mean of what is seen": (masked, SEEN / REAL),
    "product with the mask": (weighed, SEEN / REAL),
    "mean after a norm": (normed, alike),
    "weights of positions": (
        lambda x, seen: jnp.tanh(SHARES @ x) @ HEAD,
        SHARES / SHARES.sum(),
    ),
}


@pytest.mark.parametrize("name", POOLS)
def test_weights(name):
    pool, expected = POOLS[name]
    x = jnp.float32(NETWORK.input())
    weights = lambda x, seen: pooling.weights(trace(pooled(pool), (x, seen), {}))
    found = jax.jit(weights)(x, jnp.asarray(SEEN))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def attended(x, seen):
    share = jax.nn.softmax(x @ jnp.asarray(HEAD)[:, 0])
    return share @ x @ HEAD


def flat(x, seen):
    return x.reshape(-1) @ jnp.ones((LENGTH * WIDTH, 3))


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        (lambda x, seen: jnp.max(x, axis=0) @ HEAD, "by 'reduce_max'"),
        (lambda x, seen: (x[0] + jnp.mean(x, axis=0)) @ HEAD, "found '.*', '.*'"),
        (flat, "by 'dot_general'"),
        (attended, "reads its sequence at one place"),
        (lambda x, seen: seen[:3].astype(jnp.float32), "tracing found none"),
    ],
)
def test_other_poolings_are_refused(pool, said):
    with pytest.raises(ValueError, match=said):
        explain = xv.attention_rollout(pooled(pool), query="pooled")
        jax.eval_shape(explain, jnp.float32(NETWORK.input()), SEEN)


METHODS = [
    "attention_rollout",
    "attention_relevance",
    "gradient_rollout",
    "raw_attention",
    "attention_grad_cam",
    "attention_flow",
    "value_zeroing",
]


@pytest.mark.parametrize("name", METHODS)
def test_methods_explain_the_rows_that_are_read(name):
    model = pooled(masked)
    x, seen = jnp.float32(NETWORK.input()), jnp.asarray(SEEN)

    @jax.jit
    def found(x, seen):
        of = lambda query: getattr(xv, name)(model, query=query)(x, seen, target=1)
        return of("pooled"), of("mean")

    traced, given = found(x, seen)
    np.testing.assert_allclose(traced.scores, given.scores, rtol=1e-5, atol=1e-7)
    assert not np.asarray(traced.scores)[REAL:].any()


@pytest.mark.parametrize(
    ("name", "position", "options", "expected"),
    [
        ("text/bert", None, {"pooling": "mean"}, np.repeat([0.2, 0], [5, 2])),
        ("text/gpt2_sequence", None, {}, np.eye(7)[4]),
        ("text/bert_sequence", None, {}, np.eye(7)[0]),
    ],
)
def test_published_architectures(name, position, options, expected):
    function, args, _ = opened(name, position, **options)
    found = jax.jit(lambda *args: pooling.weights(trace(function, args, {})))(*args)
    np.testing.assert_allclose(found, expected, atol=1e-6)
