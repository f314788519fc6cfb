"""Random methods around gradients: unbiased, and as far off as they say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation

WIDTH = 6
ROOT = jax.random.normal(jax.random.key(1), (WIDTH, WIDTH))
SYMMETRIC = ROOT + ROOT.T
X = jax.random.normal(jax.random.key(2), (WIDTH,))
ROWS = jax.random.normal(jax.random.key(3), (3, WIDTH))
KEYS = jax.random.split(jax.random.key(4), 40)


def quadratic(x):
    return (x @ SYMMETRIC @ x)[None] / 2


def over_keys(explain):
    return jax.jit(jax.vmap(lambda key: explain(X, key=key)))(KEYS)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_expected_gradients_are_the_mean_over_baselines(noise):
    """Of a quadratic, each path has a closed form; noise e adds E[e * Qe] / 2."""
    explain = xv.expected_gradients(quadratic, baselines=ROWS, samples=24, noise=noise)
    found = over_keys(explain)
    paths = [(X - row) * (SYMMETRIC @ (X + row)) / 2 for row in ROWS]
    expected = jnp.mean(jnp.stack(paths), axis=0) + noise**2 * jnp.diag(SYMMETRIC) / 2
    error = np.asarray(found.scores - expected[None])
    stated = np.asarray(found.diagnostics["standard_error"])
    assert np.abs(error.mean(0)).max() < 5 * error.std(0).max() / len(KEYS) ** 0.5
    # Stratified draws err less than the spread of samples says; noise has no strata.
    ratio = np.sqrt((error**2).mean() / (stated**2).mean())
    assert ratio < (1.3 if noise else 1)
    np.testing.assert_allclose(found.output, jnp.full(40, quadratic(X)[0]), rtol=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "square", "variance"])
def test_smooth_of_a_quadratic(reduce):
    """Its gradient Qx is normal under noise: mean Qx, variances s² diag(Q²)."""
    noise, samples = 0.5, 24
    explain = xv.smooth(
        xv.saliency(quadratic, signed=True), noise=noise, samples=samples, reduce=reduce
    )
    found = over_keys(explain)
    mean, variance = SYMMETRIC @ X, noise**2 * jnp.diag(SYMMETRIC @ SYMMETRIC)
    expected = {
        "mean": mean,
        "square": mean**2 + variance,
        "variance": variance * (samples - 1) / samples,
    }[reduce]
    error = np.asarray(found.scores - expected[None])
    stated = np.asarray(found.diagnostics["standard_error"])
    off = error.mean(0) / (error.std(0) / np.sqrt(len(KEYS)))
    assert np.abs(off).max() < 5
    ratio = np.sqrt((error**2).mean() / (stated**2).mean())
    assert 0.7 < ratio < 1.4
    np.testing.assert_allclose(found.output, jnp.full(40, quadratic(X)[0]), rtol=1e-5)
    assert np.all(found.diagnostics["evaluations"] == samples)


def test_the_predicted_class_is_that_of_the_clean_input():
    """Under this noise the other class wins half of the time."""
    model = lambda x: jnp.stack([jnp.float32(0.01), 100 * x[0]])
    explain = xv.smooth(xv.saliency(model, signed=True), noise=1.0, samples=32)
    found = explain(jnp.zeros(2), key=KEYS[0])
    assert not found.scores.any()
    assert found.output == np.float32(0.01)


def test_smooth_says_when_a_copy_did_not_converge():
    steep = lambda x: jax.nn.sigmoid(2000 * (x.sum(keepdims=True) - 0.501))
    inner = xv.integrated_gradients(steep, steps=8, rule="midpoint")
    explain = xv.smooth(inner, noise=0.01, samples=2)
    assert not explain(jnp.ones(1), key=KEYS[0]).diagnostics["converged"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise": -1.0}, "standard deviation"),
        ({"noise": 0.1, "reduce": "median"}, "got 'median'"),
        ({"noise": 0.1, "samples": 1, "reduce": "variance"}, "at least 2"),
        ({"noise": 0.1, "samples": 0}, "positive integer, got 0"),
    ],
)
def test_wrong_options_of_smooth(options, said):
    with pytest.raises(ValueError, match=said):
        xv.smooth(xv.saliency(quadratic), **options)


TOKENS = jnp.array([2, 0, 1, 2])


def of_embeddings(rows):
    return jnp.tanh(rows @ SYMMETRIC).sum(axis=0)


def of_tokens(tokens):
    return of_embeddings(ROOT[tokens])


@pytest.mark.parametrize(
    "method",
    [
        partial(xv.saliency, signed=True),
        xv.input_x_gradient,
        partial(xv.integrated_gradients, steps=4),
        partial(xv.leave_one_out, baseline=0.0),
    ],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_noise_on_tokens_is_noise_on_their_embeddings(method, wrap):
    """With the same draws, and with what the model's table holds left alone."""
    noise = lambda rows: 0.2 * (rows.max() - rows.min())
    smooth = lambda model: xv.smooth(wrap(method(model)), noise=noise, samples=6)
    found = smooth(of_tokens)(TOKENS, target=1, key=KEYS[0])
    wanted = smooth(of_embeddings)(ROOT[TOKENS], target=1, key=KEYS[0])
    scores = wanted.scores.reshape(len(TOKENS), -1).sum(axis=1)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.output, of_tokens(TOKENS)[1], rtol=1e-6)
    assert np.abs(found.scores - method(of_tokens)(TOKENS, target=1).scores).max() > 0.1


def test_noise_on_tokens_reaches_a_site_behind_them():
    model = lambda tokens: checkpoint_name(ROOT[tokens], "rows").sum(axis=0) ** 2
    at = partial(xv.saliency, signed=True, at="rows")
    found = xv.smooth(at(model), noise=0.5, reduce="variance")(TOKENS, key=KEYS[0])
    assert (found.scores[:, 0] > 0.1).all()  # the predicted class, on its own


@pytest.mark.parametrize(
    "explain",
    [
        xv.grad_cam(lambda t: checkpoint_name(ROOT[t], "rows").sum(0)),
        xv.leave_one_out(lambda t, mask: mask @ ROOT[t], mask_argnum=1),
    ],
)
def test_noise_that_would_be_lost_is_refused(explain):
    args = (TOKENS, jnp.ones(4))[: 1 + ("leave" in explain.__qualname__)]
    assert explain(*args, target=0).scores.any()
    with pytest.raises(ValueError, match="not explained at embeddings"):
        xv.smooth(explain, noise=0.1)(*args, target=0, key=KEYS[0])


def test_noise_needs_floats_or_tokens():
    explain = xv.smooth(xv.saliency(lambda pair: pair[0][pair[1]]), noise=0.1)
    with pytest.raises(ValueError, match="has \\['float32', 'int32'\\]"):
        explain((ROOT, TOKENS), target=0, key=KEYS[0])


def test_baselines_of_expected_gradients_are_rows():
    with pytest.raises(ValueError, match="one and the same number of rows"):
        xv.expected_gradients(quadratic, baselines=0.0)(X, key=KEYS[0])


def test_memory_of_sampling_is_that_of_a_chunk():
    def temporary(samples):
        explain = xv.expected_gradients(quadratic, baselines=ROWS, samples=samples)
        program = jax.jit(lambda x: explain(x, key=KEYS[0]))
        analysis = program.lower(X).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    # Each sample's row, place and key, as they are drawn and as they are chunked.
    assert temporary(2048) - temporary(512) <= 64 * (2048 - 512)
