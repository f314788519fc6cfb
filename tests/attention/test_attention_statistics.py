"""Statistics strip by strip, and the search for the largest weights."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.kernels.attention_statistics.statistics import (
    largest,
    summarise,
    total,
)

MODULE = importlib.import_module("xviz_jax.attention.head_statistics")


WEIGHTS = np.random.default_rng(2).normal(size=(3, 8, 8)).astype(np.float32) / 3


def model(x):
    """Two heads, of which queries see positions up to their own; three classes."""
    query, key, value = ((x @ w).reshape(len(x), 2, 4) for w in jnp.asarray(WEIGHTS))
    scores = jnp.einsum("qhd,khd->hqk", query, key)
    seen = jnp.tril(jnp.ones((len(x), len(x)), bool))
    maps = jax.nn.softmax(jnp.where(seen[None], scores, -jnp.inf))
    mixed = jnp.einsum("hqk,khd->qhd", maps, value).reshape(len(x), 8)
    return (x + mixed)[-1, :3]


def test_strips_change_nothing(monkeypatch):
    """37 queries are three strips of 13, and two of them twice."""
    x = jax.random.normal(jax.random.key(0), (37, 8))
    pad = lambda x: jnp.arange(len(x)) >= 30
    found = []
    for strip in (1, 2**20):
        monkeypatch.setattr(MODULE, "_STRIP", strip)
        explain = xv.attention_statistics(model, pad=pad, top_k=3)
        text = str(jax.make_jaxpr(explain)(x))
        assert ("dynamic_slice" in text) and ("length=3" in text) == (strip == 1)
        found.append(jax.jit(explain)(x))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *found
    )
    np.testing.assert_allclose(found[0].scores.sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("length", [7, 256, 517])
@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_largest_is_top_k(count, length):
    """With equals, zeros, and rows that are all alike; whole and in pieces."""
    shape, key = (3, 50, length), jax.random.key(0)
    p = jax.random.randint(key, shape, 0, length // 2).astype(jnp.float32)
    p = p.at[0, 0].set(0.25)
    for got, wanted in zip(largest(p, count), jax.lax.top_k(p, count), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("length", [7, 256, 517])
def test_total_is_the_sum(length):
    x = jax.random.randint(jax.random.key(0), (3, 50, length), -9, 9)
    np.testing.assert_array_equal(total(x.astype(jnp.float32)), x.sum(-1))


def test_no_number_stays_none():
    p = jnp.asarray([[0.5, 0.5, 0.0], [jnp.nan, jnp.nan, 0.0]])
    found = summarise(p, jnp.log(p), jnp.arange(2)[:, None], None, 2)
    np.testing.assert_array_equal(found.top_keys, [[0, 1], [-1, -1]])
    np.testing.assert_array_equal(np.isnan(found.top_weights).all(-1), [False, True])
    np.testing.assert_array_equal(np.isnan(found.maximum), [False, True])
