"""Rank statistics against float64 references, ties among them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.metrics import Reason, similarity

N, K, PAIRS = 30, 7, 60
NAMES = ["kendall_tau", "spearman", "top_k_overlap", "sign_agreement", "rank_agreement"]


def pairs(name):
    options = {"chunk": 7} if name == "kendall_tau" else {"k": K}
    options = {} if name == "spearman" else options
    return partial(getattr(xv.metrics, name), **options)


def draw():
    """Pairs of rows: without ties, with many, nearly alike, alike but for the scale."""
    generator = np.random.default_rng(0)
    a = generator.normal(size=(PAIRS, N)).astype(np.float32)
    b = generator.normal(size=(PAIRS, N)).astype(np.float32)
    coarse = slice(PAIRS // 4, PAIRS // 2)
    a[coarse], b[coarse] = np.round(a[coarse]), np.round(2 * b[coarse])
    near = slice(PAIRS // 2, 3 * PAIRS // 4)
    b[near] = a[near] + 0.1 * b[near]
    same = slice(3 * PAIRS // 4, PAIRS)
    scale = np.repeat(np.array([1, 1e-36, 1e36], np.float32), PAIRS // 12)[:, None]
    a[same] = np.round(2 * a[same])
    b[same] = a[same] * scale
    return a, b


def shares(row):
    """How much of each entry is among the K largest, by the definition, float64."""
    size = np.abs(row.astype(np.float64))
    edge = np.sort(size)[-K]
    level = size == edge
    return np.where(level, (K - (size > edge).sum()) / level.sum(), size > edge)


def slow(name, a, b):
    if name == "kendall_tau":
        return scipy.stats.kendalltau(a.astype(np.float64), b.astype(np.float64))[0]
    if name == "spearman":
        return scipy.stats.spearmanr(a.astype(np.float64), b.astype(np.float64))[0]
    both = np.minimum(shares(a), shares(b))
    rank = lambda row: scipy.stats.rankdata(np.abs(row))
    same = {
        "top_k_overlap": np.ones(N),
        "sign_agreement": np.sign(a) == np.sign(b),
        "rank_agreement": rank(a) == rank(b),
    }[name]
    return (both * same).sum() / K


@pytest.mark.parametrize("name", NAMES)
def test_float64(name):
    a, b = draw()
    found = jax.jit(jax.vmap(pairs(name)))(a, b)
    expected = np.array([slow(name, a[n], b[n]) for n in range(PAIRS)])
    assert (found.reason == 0).all()
    np.testing.assert_allclose(found.value, expected, atol=2e-6)
    np.testing.assert_allclose(found.value[-PAIRS // 4 :], 1, atol=1e-6)

    # Undefined rows, and what is next to them.
    a[0], b[1], a[2, 0], b[3, 5] = 2, 0, np.nan, np.inf
    bad = jax.jit(jax.vmap(pairs(name)))(a, b)
    np.testing.assert_array_equal(bad.reason[:4], [4, 4, 1, 1])
    assert np.isnan(bad.value[:4]).all()
    np.testing.assert_array_equal(bad.value[4:], found.value[4:])
    # An order, of numbers or places, is all that counts.
    place = np.random.default_rng(1).permutation(N)
    moved = jax.jit(jax.vmap(pairs(name)))(a[:, place], b[:, place])
    np.testing.assert_allclose(moved.value, bad.value, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_pairs_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` compares scores of one shape"):
        pairs(name)(jnp.ones(8), jnp.ones((2, 4)))
    if name not in ("kendall_tau", "spearman"):
        with pytest.raises(ValueError, match="at most the number of scores, 3, got 7"):
            pairs(name)(jnp.ones(3), jnp.ones(3))


def test_attributions_are_taken_as_they_are():
    a = xv.Attribution(scores={"x": jnp.arange(3.0)}, output=jnp.float32(0))
    found = xv.metrics.spearman(a, {"x": jnp.array([1.0, 5.0, 9.0])})
    assert found.value == 1 and found.reason == Reason.DEFINED


def test_similarities():
    a, b = draw()
    for name, expected in (
        ("pearson", lambda x, y: np.corrcoef(x, y)[0, 1]),
        ("cosine", lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)),
    ):
        found = jax.jit(jax.vmap(similarity.named(name)))(a, b)
        wide = a.astype(np.float64), b.astype(np.float64)
        exact = np.array([expected(wide[0][n], wide[1][n]) for n in range(PAIRS)])
        np.testing.assert_allclose(found, exact, atol=2e-6)
    # Rounding is no variance.
    nearly = 1e4 + jnp.arange(8.0) * 1e-3
    assert np.isnan(similarity.pearson(nearly, jnp.arange(8.0)))
    with pytest.raises(ValueError, match="`similarity` is one of"):
        similarity.named("ssim")
