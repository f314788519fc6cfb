"""Against a float64 reference that shares no code with the library."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from tests.contract.table import example, parameters, transformer
from tests.gradients import convolutional
from tests.gradients.golden_paths import GOLDENS
from xviz_jax.gradients.quadrature import RULES
from xviz_jax.models import embedded


def reference(weights, x, start, target, steps=4000):
    """Midpoint rule in numpy, with gradients by complex steps."""
    path = start + (np.arange(steps) + 0.5)[:, None, None] / steps * (x - start)
    total = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        nudged = path.astype(complex)
        nudged[(slice(None), *index)] += 1e-30j
        total[index] = np.imag(numpy_transformer(weights, nudged)[:, target]).mean()
    return total / 1e-30 * (x - start)


def numpy_transformer(weights, x):
    *layers, last = [
        {name: np.asarray(leaf, np.float64) for name, leaf in layer.items()}
        for layer in weights
    ]
    for layer in layers:
        query, key, value = (
            (x @ layer[name]).reshape(*x.shape[:2], 2, -1)
            for name in ("query", "key", "value")
        )
        scores = np.einsum("nqhd,nkhd->nhqk", query, key)
        exponentials = np.exp(scores)
        maps = exponentials / exponentials.sum(axis=-1, keepdims=True)
        x = x + np.einsum("nhqk,nkhd->nqhd", maps, value).reshape(x.shape)
        x = x + np.tanh(x @ layer["up"]) @ layer["down"]
    return x[:, 0] @ last["head"]


@functools.cache
def expected_scores():
    x = np.float64(example())
    return reference(parameters(), x, np.full_like(x, np.float32(0.3)), target=2)


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_float64_reference(chunk):
    weights, x = parameters(), example()
    start = 0.3 * jnp.ones_like(x)
    explain = xv.integrated_gradients(
        lambda x: transformer(weights, x), baseline=start, steps=32, chunk=chunk
    )
    expected = expected_scores()
    scores = jax.jit(explain, static_argnames="target")(x, target=2).scores
    assert np.abs(scores - expected).sum() < 2e-5 * np.abs(expected).sum()


def test_memory_does_not_grow_with_steps():
    weights, x = parameters(), example()

    def temporary(steps):
        explain = xv.integrated_gradients(
            lambda x: transformer(weights, x), steps=steps, chunk=4
        )
        analysis = jax.jit(explain).lower(x).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    # The nodes and weights themselves: 8 bytes a step.
    assert temporary(512) - temporary(64) <= 8 * (512 - 64)


def test_unresolved_paths_are_marked():
    """A steep step between two nodes is missed, and the gap says so."""
    steep = lambda x: jax.nn.sigmoid(2000 * (x.sum(keepdims=True) - 0.501))
    explain = xv.integrated_gradients(steep, steps=8, rule="midpoint")
    diagnostics = explain(jnp.ones(1), target=0).diagnostics
    assert diagnostics["completeness_gap"] > 0.9
    assert not diagnostics["converged"]
    fine = xv.integrated_gradients(steep, steps=20000, rule="midpoint", chunk=2000)
    assert fine(jnp.ones(1), target=0).diagnostics["converged"]


def test_not_a_number_is_marked():
    explain = xv.integrated_gradients(lambda x: jnp.log(x - 2), steps=4)
    assert not explain(jnp.ones(3), target=0).diagnostics["converged"]


@pytest.mark.parametrize("baseline", ["zeros", "gray"])
def test_captum_goldens(baseline):
    """Gauss-Legendre with 50 steps, in float64; see `golden_convolutional.py`."""
    with np.load(GOLDENS / "convolutional_captum.npz", allow_pickle=False) as stored:
        expected, steps = stored[baseline], int(stored["steps"])
    weights, images = convolutional.load(), embedded.images()[0][: len(expected)]
    explain = xv.integrated_gradients(
        convolutional.forward,
        baseline={"zeros": None, "gray": 0.5}[baseline],
        steps=steps,
        chunk=10,
        argnums=1,
    )
    program = jax.jit(explain)
    for image, wanted in zip(images, expected, strict=True):
        scores = program(weights, image).scores
        assert np.abs(scores - wanted).sum() < 1e-5 * np.abs(wanted).sum()


def exponential(x):
    return jnp.exp(x.sum(keepdims=True))


@pytest.mark.parametrize("rule", RULES)
def test_errors_of_fixed_rules_are_near_their_estimates_or_below(rule):
    x = jnp.array([1.0, 2.0, -0.5])
    found = xv.integrated_gradients(exponential, steps=9, rule=rule)(x)
    expected = x * (jnp.exp(2.5) - 1) / 2.5
    error = np.abs(found.scores - expected).sum() / np.abs(expected).sum()
    assert error < 1.5 * found.diagnostics["error_estimate"] < 1.5


def test_one_node_says_nothing_of_its_error():
    one = xv.integrated_gradients(exponential, steps=1, rule="midpoint")
    assert one(jnp.ones(2)).diagnostics["error_estimate"] > 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 64, "chunk": 0}, "from 1 to 64 steps, got 0"),
        ({"steps": 64, "chunk": 65}, "from 1 to 64 steps, got 65"),
        ({"steps": 64, "chunk": 2.0}, "got 2.0"),
        ({"steps": 0}, "positive integer, got 0"),
        ({"rule": "simpson"}, "got 'simpson'"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(ValueError, match=said):
        xv.integrated_gradients(lambda x: x, **options)


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        (np.zeros(4), r"shape \(4,\), but the input has \(3,\)"),
        (lambda x: x[:2], r"shape \(2,\), but the input has \(3,\)"),
        ([np.zeros(3)], "structure"),
    ],
)
def test_wrong_baselines(baseline, said):
    with pytest.raises(ValueError, match=said):
        xv.integrated_gradients(lambda x: x, baseline=baseline)(jnp.ones(3))
