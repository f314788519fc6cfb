"""Special tokens and pooled rows, by hand and against sums of rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.attention.test_methods import NETWORKS
from tests.contract.quick import quick_compilation as quick_compilation
from tests.contract.table import (
    LENGTH,
    example,
    parameters,
    transformer,
)

X = example()
FIRST = jnp.arange(LENGTH) == 0
model = partial(transformer, parameters())
rollout = xv.attention_rollout(model)


def treated(explain=rollout, *args, **options):
    return xv.special_tokens(explain, **options)(*(args or (X,)))


def test_kept_dropped_and_renormalised():
    plain = np.asarray(rollout(X).scores)
    kept, dropped, shared = (
        treated(special=lambda x: jnp.arange(len(x)) == 0, treat=treat)
        for treat in ("keep", "drop", "renormalise")
    )
    np.testing.assert_array_equal(kept.scores, plain)
    np.testing.assert_array_equal(dropped.scores, [0, *plain[1:]])
    np.testing.assert_allclose(
        shared.scores[1:], plain[1:] / plain[1:].sum(), rtol=1e-5
    )
    assert shared.scores[0] == 0
    for found in (kept, dropped, shared):
        np.testing.assert_allclose(found.diagnostics["special_share"], plain[0])
        assert found.diagnostics["mass"] == kept.diagnostics["mass"]


def test_of_every_row_and_of_a_batch():
    explain = xv.attention_rollout(model, query=None)
    found = treated(explain, special=FIRST, treat="renormalise")
    assert not np.asarray(found.scores)[:, 0].any()
    np.testing.assert_allclose(found.scores.sum(axis=-1), 1, rtol=1e-5)
    assert found.diagnostics["special_share"].shape == (LENGTH,)
    many = jax.vmap(xv.special_tokens(rollout, special=FIRST))(example(2))
    assert not np.asarray(many.scores)[:, 0].any()


def test_nothing_but_special_tokens_leaves_zeros():
    found = treated(special=jnp.ones(LENGTH, bool), treat="renormalise")
    assert not np.asarray(found.scores).any()


def test_of_several_sequences():
    cross = lambda x, y: (jax.nn.softmax(x @ y.T) @ y)[0] + x[0]
    explain = xv.attention_relevance(cross)
    marks = {"attention": FIRST, "attention/key": jnp.arange(3) == 2}
    plain = explain(X, X[:3] + 1.0)
    found = treated(explain, X, X[:3] + 1.0, special=marks)
    for name, mark in marks.items():
        expected = np.where(mark, 0, plain.scores[name])
        np.testing.assert_array_equal(found.scores[name], expected)
    shares = [plain.scores[name][mark].sum() for name, mark in marks.items()]
    np.testing.assert_allclose(found.diagnostics["special_share"], shares, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"special": FIRST, "treat": "hide"}, "got 'hide'"),
        ({"special": FIRST[1:]}, r"is bool\[5\], got bool\[4\]"),
        ({"special": jnp.ones(LENGTH)}, r"is bool\[5\], got float32\[5\]"),
        ({"special": {"a": FIRST}}, "is one array as the scores are"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(ValueError, match=said):
        treated(**options)


def test_scores_must_be_of_positions():
    with pytest.raises(ValueError, match=r"got scores of \[5, 8\]"):
        treated(xv.input_x_gradient(model), special=FIRST)


ROWS = {
    "attention_rollout": xv.attention_rollout,
    "attention_relevance": xv.attention_relevance,
    "gradient_rollout": xv.gradient_rollout,
    "raw_attention": xv.raw_attention,
}


@pytest.mark.parametrize("small", [0, 8 * 2**20])
@pytest.mark.parametrize("name", ROWS)
def test_weights_of_rows_are_sums_of_rows(name, small, monkeypatch):
    """And `mean` is that of all rows but padding's; of maps, and tile by tile."""
    for limit in ("_SMALL_MAP", "_FUSED_MAP"):
        monkeypatch.setattr(xv.attention.layers, limit, small)
    network = NETWORKS["padded"]
    x = jnp.float32(network.input())
    share = jnp.linspace(-1, 1, len(x))
    mean = jnp.where(jnp.arange(len(x)) < network.length, 1 / network.length, 0)

    @jax.jit
    def found(x):
        of = lambda query: ROWS[name](network, query=query)(x, target=1)
        return jax.vmap(of)(jnp.arange(len(x))), of(share), of("mean"), of(mean)

    rows, weighed, pooled, alike = found(x)
    for one, weights in ((weighed, share), (pooled, mean)):
        np.testing.assert_allclose(
            one.scores, weights @ rows.scores, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(one.diagnostics["mass"], one.scores.sum(), atol=1e-6)
        own = one.scores @ weights
        np.testing.assert_allclose(one.diagnostics["self_share"], own, atol=1e-6)
    np.testing.assert_allclose(pooled.scores, alike.scores, rtol=1e-5, atol=1e-7)
    assert not np.asarray(pooled.scores)[network.length :].any()


def test_grad_cam_of_pooled_rows():
    """Of a model that pools: heads are weighed by gradients averaged over queries."""
    network = NETWORKS["two layers"]
    x = jnp.float32(network.input())
    maps, slopes, *_ = network.truth(1)
    share = np.linspace(0, 1, len(x))
    heads = np.einsum("hqk,q->h", slopes[-1], share) / len(x)
    row = np.einsum("hqk,q,h->k", maps[-1], share, heads) / len(heads)
    found = xv.attention_grad_cam(network, query=jnp.float32(share))(x, target=1)
    np.testing.assert_allclose(found.scores, np.maximum(row, 0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (jnp.ones(4), r"are float\[5\], got float32\[4\]"),
        (jnp.ones(5, int), r"are float\[5\], got int32\[5\]"),
        ("last", "weights of rows, 'mean' or 'pooled', got 'last'"),
    ],
)
@pytest.mark.parametrize("name", [*ROWS, "attention_grad_cam"])
def test_wrong_rows(name, query, said):
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(getattr(xv, name)(model, query=query), X)


def test_several_rows_have_no_self_to_exclude():
    for query in ("mean", jnp.ones(5) / 5):
        with pytest.raises(ValueError, match="needs one position, got several"):
            xv.attention_rollout(model, query=query, exclude_self=True)
