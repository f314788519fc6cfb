"""Windows, random masks and learned masks against closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation

KEY = jax.random.key(0)
WEIGHTS = jax.random.normal(jax.random.key(1), (6, 5, 2))


def linear(x):
    return jnp.sum(WEIGHTS * x)[None]


def slow_occlusion(window, stride):
    """Of the linear model at ones, from zeros, in numpy."""
    weights = np.asarray(WEIGHTS, np.float64)
    total, count = np.zeros((6, 5)), np.zeros((6, 5))
    for top in range(0, 6 - window[0] + stride[0], stride[0]):
        for left in range(0, 5 - window[1] + stride[1], stride[1]):
            place = np.s_[top : top + window[0], left : left + window[1]]
            total[place] += weights[place].sum()
            count[place] += 1
    return total / np.maximum(count, 1)


@pytest.mark.parametrize(
    ("window", "stride"), [((3, 2), (1, 1)), ((2, 3), (2, 2)), ((4, 4), (4, 3))]
)
def test_occlusion(window, stride):
    explain = xv.occlusion(linear, window=window, stride=stride, chunk=4)
    scores = jax.jit(explain)(jnp.ones((6, 5, 2))).scores
    expected = np.repeat(slow_occlusion(window, stride)[..., None], 2, axis=-1)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 7}, r"`window` fits into \(6, 5\), got \(7, 7\)"),
        ({"window": (1, 1, 1, 1)}, "for leading axes of"),
        ({"window": 0}, "is positive"),
        ({"window": 2, "stride": 0}, "`stride` is positive"),
        ({"window": 2, "chunk": 0}, "`chunk` is a positive integer, got 0"),
    ],
)
def test_wrong_windows_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        xv.occlusion(linear, **options)(jnp.ones((6, 5, 2)))


def test_rise_of_independent_places_is_their_conditional_mean():
    """E[f | place shown] of a linear model is half of the others plus all of it."""
    weights = jnp.array([1.0, -2.0, 0.5, 3.0])
    explain = xv.rise(lambda x: (weights @ x)[None], cells=4, samples=4096, chunk=512)
    found = jax.jit(explain)(jnp.ones(4), key=KEY)
    expected = weights.sum() / 2 + weights / 2
    error = np.abs(found.scores - expected) / found.diagnostics["standard_error"]
    assert error.max() < 4


def test_rise_shows_every_place_equally_often():
    explain = xv.rise(lambda x: jnp.ones(1), cells=3, samples=4096, chunk=512)
    found = jax.jit(explain)(jnp.ones((10, 7)), key=KEY)
    assert np.abs(found.scores - 1).max() < 0.06
    assert found.scores.shape == (10, 7)


@pytest.mark.parametrize("keep", [True, False])
def test_extremal_mask_finds_what_the_output_rests_on(keep):
    """Two of eight places matter, and only together."""
    model = lambda x: jnp.tanh(x[2] * x[5])[None]
    explain = xv.learned_mask(model, area=0.25, keep=keep, cells=8)
    found = jax.jit(explain)(2 * jnp.ones(8))
    if keep:
        assert set(np.argsort(found.scores)[-2:]) == {2, 5}
        assert found.diagnostics["masked_output"] > 0.95 * found.output
    else:
        assert np.argmax(found.scores) in (2, 5)
        assert found.diagnostics["masked_output"] < 0.1 * found.output
    assert abs(found.diagnostics["area"] - 0.25) < 0.06


def test_meaningful_mask_is_sparse_where_nothing_is_lost():
    model = lambda x: (x[1, 1] + x[1, 2])[None]
    explain = xv.learned_mask(model, area=None, sparsity=0.5, cells=(4, 4), steps=300)
    mask = jax.jit(explain)(jnp.ones((4, 4))).scores
    assert mask[1, 1] > 0.8 and mask[1, 2] > 0.8
    rest = np.delete(np.asarray(mask).ravel(), [5, 6])
    assert rest.max() < 0.2


@pytest.mark.parametrize("keep", [True, False])
def test_the_mask_is_the_given_optimizers(keep):
    """One step from a mask of halves has a closed form, one for both questions."""
    weights = jnp.array([1.0, -2.0, 0.5, 3.0])
    explain = xv.learned_mask(
        lambda x: (weights @ x)[None],
        area=None, keep=keep, cells=4, sparsity=0.2, smoothness=0.0, steps=1,
        optimizer=optax.sgd(0.8),
    )  # fmt: skip
    found = explain(jnp.ones(4)).scores
    # Of the gain in units of the change, less a mean of the mask; halves' slope is 1/4.
    slope = (weights / weights.sum() - 0.2 / 4) / 4
    np.testing.assert_allclose(found, jax.nn.sigmoid(0.8 * slope), rtol=1e-5)


TABLE = jax.random.normal(jax.random.key(2), (7, 3))
TOKENS, PAD = jnp.array([5, 1, 4, 1, 2]), 3
EACH = WEIGHTS[:5, 0].sum(axis=-1)


def of_embeddings(rows):
    return jnp.tanh(EACH @ rows)


@pytest.mark.parametrize(
    "make",
    [
        partial(xv.feature_ablation, groups=lambda x: xv.patches(x.shape, (1,))),
        partial(xv.occlusion, window=(2,)),
        partial(xv.learned_mask, cells=(4,), area=0.4, steps=5),
    ],
)
def test_a_token_is_taken_away_with_all_its_features(make):
    """Tokens score what the rows of the table do that they look up."""
    tokens = make(lambda t: of_embeddings(TABLE[t]), baseline=xv.baselines.tokens(PAD))
    rows = make(of_embeddings, baseline=xv.baselines.embedding(TABLE[PAD]))
    found = jax.jit(tokens)(TOKENS, target=1)
    wanted = jax.jit(rows)(TABLE[TOKENS], target=1)
    assert found.scores.shape == TOKENS.shape
    assert np.abs(found.scores).max() > 0.1
    each = jnp.broadcast_to(found.scores[:, None], wanted.scores.shape)
    np.testing.assert_allclose(wanted.scores, each, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.output, wanted.output, rtol=1e-6)


def test_what_a_token_is_worth():
    """Of a sum over tokens, it is how far its row is from that of padding."""
    model = lambda tokens: EACH @ TABLE[tokens]
    explain = xv.feature_ablation(model, baseline=xv.baselines.tokens(PAD, keep=(1,)))
    scores = explain(TOKENS, target=2).scores
    worth = EACH * (TABLE[TOKENS, 2] - TABLE[PAD, 2])
    expected = jnp.where(TOKENS == 1, 0, worth)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_methods_of_one_array_refuse_several():
    for explain in (xv.occlusion(linear, window=1), xv.learned_mask(linear)):
        with pytest.raises(ValueError, match="takes one array with axes"):
            explain((jnp.ones(3), jnp.ones(3)))
    with pytest.raises(ValueError, match="takes one array with axes"):
        xv.rise(linear)(jnp.float32(1), key=KEY)


def test_leaving_out_by_the_mask():
    """A masked mean: a token left out is not the same as a token of zeros."""

    def model(x, mask):
        weights = mask.astype(jnp.float32)
        return (weights @ x) / jnp.maximum(weights.sum(), 1)

    x, mask = jnp.array([[1.0], [2.0], [6.0], [9.0]]), jnp.array([1, 1, 1, 0])
    explain = xv.leave_one_out(model, mask_argnum=1, chunk=3)
    scores = jax.jit(explain)(x, mask, target=0).scores
    np.testing.assert_allclose(scores, [3 - 4, 3 - 3.5, 3 - 1.5, 0], atol=1e-6)
    batch = jax.vmap(explain, in_axes=(0, None))(jnp.stack([x, 2 * x]), mask)
    np.testing.assert_allclose(batch.scores, [scores, 2 * scores], atol=1e-5)
    with pytest.raises(ValueError, match="length 4"):
        explain(x, jnp.ones(3))
    with pytest.raises(ValueError, match="takes no `baseline`"):
        xv.leave_one_out(model, mask_argnum=1, baseline=0.0)


def test_memory_does_not_grow_with_samples():
    def temporary(samples):
        explain = xv.rise(linear, samples=samples, cells=3)
        program = jax.jit(lambda x: explain(x, key=KEY))
        analysis = program.lower(jnp.ones((6, 5, 2))).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    # Each sample's key, as it is drawn and as it is chunked.
    assert temporary(1024) - temporary(128) <= 24 * (1024 - 128)
