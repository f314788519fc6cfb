"""Attention flow against flows by hand, by scipy in integers, by linear programs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse

import xviz_jax as xv
from tests.attention.test_methods import NETWORKS, Network, fused
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.attention import max_flow
from xviz_jax.attention.attention_rollout import Heads

# Of scipy, which takes integers: each edge of a cut loses less than 1 / UNIT.
UNIT = 2**30


def mixed(maps, residual):
    """The widths of all edges, first layer first, in float64."""
    widths = residual * np.eye(maps.shape[-1]) + (1 - residual) * maps
    total = widths.sum(axis=-1, keepdims=True)
    return widths / np.where(total == 0, 1, total)


def edges(widths):
    """Where each edge begins and ends, top layer last, and its width."""
    layer, above, below = np.nonzero(widths)
    length = widths.shape[-1]
    begins, ends = (layer + 1) * length + above, layer * length + below
    return begins, ends, widths[layer, above, below]


def flows(widths, query):
    """Of scipy, one after another."""
    depth, length, _ = widths.shape
    begins, ends, width = edges(widths)
    nodes = (depth + 1) * length
    graph = scipy.sparse.csr_matrix(
        ((width * UNIT).astype(np.int32), (begins, ends)), shape=(nodes, nodes)
    )
    source = depth * length + query % length
    run = scipy.sparse.csgraph.maximum_flow
    return np.array([run(graph, source, j).flow_value for j in range(length)]) / UNIT


def program(widths, query, sink):
    """One flow as a linear program, in float64: what leaves the source, conserved."""
    depth, length, _ = widths.shape
    begins, ends, width = edges(widths)
    number = np.arange(len(width))
    balance = np.zeros(((depth + 1) * length, len(width)))
    balance[begins, number] += 1
    balance[ends, number] -= 1
    source = depth * length + query % length
    inner = np.delete(balance, [source, sink], axis=0)
    found = scipy.optimize.linprog(
        -balance[source],
        A_eq=inner,
        b_eq=np.zeros(len(inner)),
        bounds=np.stack([np.zeros_like(width), width], axis=1),
        method="highs",
    )
    return -found.fun


@pytest.mark.parametrize("name", ["two layers", "causal, four layers", "padded"])
def test_flows_of_scipy(name, monkeypatch):
    if name == "causal, four layers":
        # Maps are made again from queries and keys.
        for limit in ("_SMALL_MAP", "_FUSED_MAP"):
            monkeypatch.setattr(xv.attention.layers, limit, 0)
    network = NETWORKS[name]
    heads = "max" if network.groups == 2 else "mean"
    explain = xv.attention_flow(network, query=network.query, heads=heads, chunk=4)
    x = jnp.float32(network.input())
    found = jax.jit(partial(explain, target=0))(x)
    widths = mixed(fused(network.truth(0)[0], heads), 0.5)
    expected = flows(widths, network.query)
    flow = found.diagnostics["flow"]
    np.testing.assert_allclose(flow, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        found.scores, expected / expected.sum(), rtol=1e-5, atol=1e-6
    )
    own = found.scores[network.query]
    np.testing.assert_allclose(found.diagnostics["self_share"], own, rtol=1e-6)
    assert 0 <= found.diagnostics["optimality_gap"] < 1e-6
    assert not np.asarray(flow)[network.length :].any()
    # No more than leaves the position, or enters the input.
    assert (flow <= 1 + 1e-6).all()
    assert (flow <= widths[0].sum(axis=0) + 1e-6).all()
    np.testing.assert_allclose(found.output, network(x)[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["causal, four layers", "padded"])
def test_flows_of_every_query(name):
    network = NETWORKS[name]
    explain = jax.jit(xv.attention_flow(network, query=None, residual=0.1))
    found = explain(jnp.float32(network.input()))
    widths = mixed(fused(network.truth(0)[0]), 0.1)
    length = widths.shape[-1]
    expected = np.stack([flows(widths, query) for query in range(length)])
    expected[network.length :] = 0
    np.testing.assert_allclose(found.diagnostics["flow"], expected, atol=1e-6)
    assert not np.asarray(found.scores)[network.length :].any()
    if network.causal:
        assert not np.triu(found.scores, 1).any()
    total = expected.sum(axis=-1, keepdims=True)
    scores = expected / np.where(total == 0, 1, total)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    np.testing.assert_allclose(
        found.diagnostics["self_share"], np.diag(scores), atol=1e-6
    )
    assert found.diagnostics["optimality_gap"].shape == (length,)


def maps(seed, depth, length, sharpness, shape=None):
    scores = np.random.default_rng(seed).normal(size=(depth, length, length))
    scores = sharpness * (scores if shape is None else np.where(shape, scores, -1e3))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


bounds = jax.jit(
    lambda widths, query: max_flow.from_position(
        widths, jax.nn.one_hot(query, widths.shape[-1]), chunk=4
    )
)


def test_flows_that_have_to_turn_back():
    """Few, narrow ways: a first push is often wrong, and goes back up."""
    rng = np.random.default_rng(0)
    far = 0
    for seed in range(40):
        widths = maps(seed, 6, 9, 4.0, rng.random((6, 9, 9)) < 0.35)
        widths = np.where(widths > 1e-3, widths, 0).astype(np.float32)
        upper, lower = bounds(widths, seed % 9)
        expected = flows(widths.astype(float), seed % 9)
        np.testing.assert_allclose(upper, expected, atol=5e-7)
        assert (upper - lower < 5e-7).all()
        # Neither what one layer lets through nor the two ends tell the answer.
        ends = np.minimum(widths[-1, seed % 9].sum(), widths[0].sum(axis=0))
        far += (np.abs(ends - expected) > 1e-3).sum()
    assert far > 40


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_flows_of_a_linear_program(depth):
    widths = mixed(maps(depth, depth, 5, 2.0), 0.5).astype(np.float32)
    upper, lower = bounds(widths, 3)
    expected = [program(widths.astype(float), 3, sink) for sink in range(5)]
    np.testing.assert_allclose(upper, expected, atol=3e-7)
    np.testing.assert_allclose(lower, expected, atol=3e-7)


def test_of_one_layer_it_is_the_fused_row():
    network = NETWORKS["one layer"]

    def both(x, heads: Heads):
        rollout = xv.attention_rollout(network, heads=heads)(x)
        return xv.attention_flow(network, heads=heads)(x).diagnostics, rollout.scores

    for heads in ("mean", "max", "min"):
        run = jax.jit(partial(both, heads=heads))
        found, rollout = run(jnp.float32(network.input()))
        np.testing.assert_allclose(found["flow"], rollout, rtol=1e-6)
        assert found["optimality_gap"] == 0


def test_two_layers_by_hand():
    """Maps [[3/4, 1/4], [1/2, 1/2]], then [[1/2, 1/2], [0, 1]], half residual.

    Widths: [[7/8, 1/8], [1/4, 3/4]] and [[3/4, 1/4], [0, 1]]. From position 0 at the
    top, 3/4 gets to 0 below, and of that all to input 0 or 1/8 to input 1; 1/4 gets to
    1, and all of it to either input. Together 3/4 + 1/4 and 1/8 + 1/4.
    """
    first = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]]))
    second = jnp.array([[0.0, 0.0], [-1e9, 0.0]])

    def two_layers(x):
        for bias in (first, second):
            scores = jnp.einsum("qd,kd->qk", jnp.zeros_like(x), x) + bias
            x = x + jax.nn.softmax(scores) @ x
        return x[0]

    found = xv.attention_flow(two_layers)(jnp.ones((2, 3)))
    np.testing.assert_allclose(found.diagnostics["flow"], [1, 3 / 8], rtol=1e-6)
    np.testing.assert_allclose(found.scores, [8 / 11, 3 / 11], rtol=1e-6)
    without = xv.attention_flow(two_layers, start_layer=1)(jnp.ones((2, 3)))
    np.testing.assert_allclose(without.scores, [3 / 4, 1 / 4], rtol=1e-6)


def test_padding_and_chunks_change_nothing():
    network = NETWORKS["padded"]
    few, many = (
        jax.jit(xv.attention_flow(network, chunk=chunk))(
            jnp.float32(network.input(pad))
        )
        for pad, chunk in ((1, 3), (6, 64))
    )
    own = slice(network.length)
    np.testing.assert_allclose(few.scores[own], many.scores[own], rtol=1e-5)


def test_what_is_no_number_stays_none_and_ends():
    network = Network(depth=3)
    x = jnp.float32(network.input())
    explain = jax.jit(lambda x, query: xv.attention_flow(network, query=query)(x))
    for found in (explain(x.at[2].set(jnp.nan), 0), explain(x, network.length)):
        assert np.isnan(found.scores).all()
        assert np.isnan(found.diagnostics["optimality_gap"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": "median"}, "got 'median'"),
        ({"residual": 1.5}, "from 0 to 1, got 1.5"),
        ({"residual": "add"}, "from 0 to 1, got 'add'"),
        ({"chunk": 0}, "`chunk` is a positive integer, got 0"),
        ({"query": 7}, "from -7 to 6, got 7"),
        ({"start_layer": 2}, "from 0 to 1 for 2 layers, got 2"),
    ],
)
def test_wrong_options(options, said):
    network = NETWORKS["two layers"]
    with pytest.raises(ValueError, match=said):
        xv.attention_flow(network, **options)(jnp.float32(network.input()))
