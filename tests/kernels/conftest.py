"""A slow float64 numpy oracle, written apart from the library, and its problems."""

import types

import numpy as np
import pytest


def make(*, batch=(), nq=7, nk=None, heads=2, kv_heads=None, dim=16, m=1, seed=0):
    """Random q, k, v, dout and weights r that sum to one, as float32 numpy."""
    nk, kv_heads = nk or nq, kv_heads or heads
    rng = np.random.default_rng(seed)
    normal = lambda *s: rng.standard_normal((*batch, *s)).astype(np.float32)
    r = rng.random((*batch, m, nq))
    return types.SimpleNamespace(
        q=1.5 * normal(nq, heads, dim),
        k=normal(nk, kv_heads, dim),
        v=normal(nk, kv_heads, dim),
        dout=normal(nq, heads, dim),
        r=(r / r.sum(-1, keepdims=True)).astype(np.float32),
    )


def scores(
    q,
    k,
    *,
    scale=None,
    causal=False,
    window=None,
    q_offset=None,
    key_mask=None,
    mask=None,
    bias=None,
    softcap=None,
):
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (nq, heads, dim), (nk, kv_heads, _) = q.shape[-3:], k.shape[-3:]
    k = np.repeat(k, heads // kv_heads, -2)
    s = np.einsum("...ihd,...jhd->...hij", q, k) * (scale or dim**-0.5)
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
    if bias is not None:
        s = s + np.asarray(bias, np.float64)
    i = np.arange(nq)[:, None] + (nk - nq if q_offset is None else q_offset)
    j = np.arange(nk)[None]
    ok = np.ones(s.shape, bool)
    if causal:
        ok &= j <= i
    left, right = window or (None, None)
    if left is not None:
        ok &= j >= i - left
    if right is not None:
        ok &= j <= i + right
    if key_mask is not None:
        ok &= np.asarray(key_mask)[..., None, None, :]
    if mask is not None:
        ok &= np.asarray(mask)
    return np.where(ok, s, -np.inf)


def lse(q, k, **scoring):
    s = scores(q, k, **scoring)
    top = s.max(-1)
    safe = np.where(np.isfinite(top), top, 0.0)
    total = np.exp(s - safe[..., None]).sum(-1)
    with np.errstate(divide="ignore"):
        return np.log(total) + safe


def probabilities(q, k, **scoring):
    norm = lse(q, k, **scoring)
    norm = np.where(np.isfinite(norm), norm, 0.0)
    return np.exp(scores(q, k, **scoring) - norm[..., None])


def fused(
    q,
    k,
    *,
    v=None,
    dout=None,
    relevance="attention",
    head_fusion="mean",
    head_weights=None,
    threshold=None,
    **scoring,
):
    p = probabilities(q, k, **scoring)
    if relevance != "attention":
        v, dout = np.asarray(v, np.float64), np.asarray(dout, np.float64)
        v = np.repeat(v, dout.shape[-2] // v.shape[-2], -2)
        p = p * np.einsum("...ihd,...jhd->...hij", dout, v)
        if relevance == "relu_gradient_x_attention":
            p = np.maximum(p, 0.0)
    if head_fusion == "weighted":
        out = (p * np.asarray(head_weights, np.float64)[..., None, None]).sum(-3)
    else:
        out = getattr(np, head_fusion)(p, -3)
    if threshold is not None:
        out = np.where(out < np.asarray(threshold)[..., None, None], 0.0, out)
    return out


def statistics(q, k, *, marked=None, top_k=0, **scoring):
    """Every field of `AttentionStatistics` but the keys, and P itself."""
    p = probabilities(q, k, **scoring)
    nq, nk = p.shape[-2:]
    offset = scoring.get("q_offset")
    i = np.arange(nq)[:, None] + (nk - nq if offset is None else offset)
    j = np.arange(nk)
    with np.errstate(divide="ignore", invalid="ignore"):
        plogp = np.where(p > 0, p * np.log(p), 0)
    marked = np.zeros(nk, bool) if marked is None else np.asarray(marked)
    return p, {
        "entropy": -plogp.sum(-1),
        "distance": (p * abs(i - j)).sum(-1),
        "self_mass": (p * (i == j)).sum(-1),
        "first_mass": p[..., 0],
        "marked_mass": (p * marked[..., None, None, :]).sum(-1),
        "maximum": p.max(-1),
        "top_weights": np.sort(p, -1)[..., ::-1][..., :top_k],
    }


def check_statistics(got, q, k, *, tolerance=2e-6, **options):
    """Holds an `AttentionStatistics` against float64."""
    p, want = statistics(q, k, **options)
    for name, value in want.items():
        found = np.asarray(getattr(got, name))
        assert found.shape == value.shape, name
        worst = np.abs(found - value).max(initial=0.0)
        assert worst <= tolerance * np.abs(value).max(initial=1e-30), name
    keys, weights = np.asarray(got.top_keys), want["top_weights"]
    assert ((keys == -1) == (weights == 0)).all()
    listed = np.take_along_axis(p, np.maximum(keys, 0), -1)
    np.testing.assert_allclose(np.where(keys < 0, 0, listed), weights, atol=tolerance)
    # No key is named twice.
    ordered = np.sort(np.where(keys < 0, -np.arange(1, keys.shape[-1] + 1), keys), -1)
    assert (np.diff(ordered, axis=-1) != 0).all()


def rollout(layers, residual):
    """R = A_L ... A_1, float64, from a list of keyword arguments of `fused`."""
    product = None
    for layer in layers:
        a = fused(**layer)
        eye = np.eye(a.shape[-1])
        if residual == "half":
            a = (a + eye) / 2
        elif residual == "add":
            a = a + eye
        elif residual == "normalize":
            a = (a + eye) / (a + eye).sum(-1, keepdims=True)
        product = a if product is None else a @ product
    return product


@pytest.fixture
def oracle():
    return types.SimpleNamespace(
        make=make,
        lse=lse,
        probabilities=probabilities,
        fused=fused,
        check_statistics=check_statistics,
        rollout=rollout,
    )
