"""Adaptive path integrals: right, or marked as not converged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from tests.contract.table import CLASSES, WIDTH, example
from tests.gradients import convolutional
from tests.gradients.golden_paths import FIRST, GOLDENS
from xviz_jax.gradients.adaptive import FIRST as FIRST_ROUND
from xviz_jax.gradients.adaptive import Adaptive
from xviz_jax.gradients.path import Stepwise
from xviz_jax.models import embedded

WEIGHTS = jax.random.normal(jax.random.key(1), (WIDTH, CLASSES))
# Paths are tables of this many intervals, so that one program serves all of them.
TABLE, ELEMENTS = 2**14, 3


@jax.jit
def walk(values, vectors, tolerance):
    """Integrates a path that is given by its values and vectors at all nodes."""

    def integrand(alpha):
        index = jnp.round(alpha * TABLE).astype(jnp.int32)
        return values[index], vectors[index]

    adaptive = Adaptive(tolerance=0.5, max_evaluations=512, chunk=1)
    # Only a tolerance that is a number is checked, and one program needs it traced.
    object.__setattr__(adaptive, "tolerance", tolerance)
    done = adaptive.integrate(integrand, vectors[0])
    return done.total(), done.estimate, done.converged, done.evaluations


def tabled(gradients):
    """A path of a function's gradients [alphas] -> [elements, alphas]."""
    alphas = np.arange(TABLE + 1) / TABLE
    vectors = gradients(alphas).T
    middles = (np.cumsum(vectors, axis=0) - vectors / 2 - vectors[0] / 2) / TABLE
    return middles.sum(axis=1), vectors, middles[-1]


def explore(gradients, tolerance):
    """The relative error, the estimate of it, and whether it converged."""
    values, vectors, exact = tabled(gradients)
    total, estimate, converged, evaluations = walk(
        jnp.float32(values), jnp.float32(vectors), jnp.float32(tolerance)
    )
    assert FIRST_ROUND <= evaluations <= 512
    scale = max(np.abs(exact).sum(), 1e-30)
    return np.abs(total - exact).sum() / scale, float(estimate), bool(converged)


PATHS = {
    "constant": lambda a: np.stack([a * 0 + 1, a * 0 - 2, a * 0]),
    "linear": lambda a: np.stack([a, 1 - a, 2 * a]),
    "waves": lambda a: np.stack([np.cos(5 * a), np.sin(9 * a), np.cos(2 * a)]),
    "early": lambda a: np.stack([np.exp(-50 * a), np.exp(-20 * a), a]),
    "late": lambda a: np.stack([a**20, a**9, 1 - a]),
    "a sudden change": lambda a: np.stack(
        [np.exp(-(((a - 0.37) / 0.01) ** 2)), 0.01 * a, -0.01 * a]
    ),
    "jumps": lambda a: np.stack([a > 0.213, a < 0.67, (a > 0.4) & (a < 0.45)]) * 1.0,
    "cancelling": lambda a: np.stack(
        [np.cos(7 * a), -np.cos(7 * a), 1e-3 * np.sin(3 * a)]
    ),
}


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("path", PATHS)
def test_stated_errors_hold(path, tolerance):
    error, estimate, converged = explore(PATHS[path], tolerance)
    assert converged
    assert error <= 2 * tolerance
    # Errors of panels add in squares where they meet in the same elements.
    assert error <= (3 if path == "jumps" else 1) * estimate + 2e-6


@given(
    st.lists(st.floats(-30, 30), min_size=6, max_size=6),
    st.sampled_from([np.tanh, lambda z: np.maximum(z, 0), np.cos]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_converged_is_within_twice_the_tolerance(numbers, activation):
    slopes, shifts = np.array(numbers[:3])[:, None], np.array(numbers[3:])[:, None]
    error, _, converged = explore(lambda a: activation(slopes * a + shifts / 3), 0.01)
    assert not converged or error <= 0.02


def steps(values):
    """Plateaus and steps: vectors are zero at all nodes, outputs are not."""
    total, estimate, converged, _ = walk(
        jnp.float32(values), jnp.zeros((TABLE + 1, ELEMENTS)), jnp.float32(0.01)
    )
    assert not total.any()
    return float(estimate), bool(converged)


@pytest.mark.parametrize(
    "output",
    [
        lambda a: a > 0.3,
        lambda a: np.floor(16 * a) / 16,
        lambda a: np.floor(3 * a) - 3 * (a == 1),
        # As it goes up it comes down, between any two ends of panels.
        lambda a: np.floor(16 * a) % 2,
        lambda a: (a > 0.4) & (a < 0.6),
    ],
)
def test_flat_paths_do_not_fool_it(output):
    """Of the kind of tracr's `hist`: flat attributions, and a large gap."""
    estimate, converged = steps(output(np.arange(TABLE + 1) / TABLE))
    assert not converged
    assert estimate > 0.1


def test_an_output_that_does_not_change_is_explained_by_zeros():
    assert steps(np.full(TABLE + 1, 7.0)) == (0, True)


def test_a_steep_step_is_found_or_marked():
    """One of width 1/2000: too narrow for the first round, not for the last."""
    steep = lambda x: jax.nn.sigmoid(2000 * (x.sum(keepdims=True) - 0.501))
    found = xv.integrated_gradients(steep, max_evaluations=2048)(jnp.ones(1), target=0)
    assert found.diagnostics["converged"]
    np.testing.assert_allclose(found.scores, 1, rtol=0.01)
    few = xv.integrated_gradients(steep, max_evaluations=40)(jnp.ones(1), target=0)
    assert not few.diagnostics["converged"]
    assert few.diagnostics["evaluations"] <= 40


def test_not_a_number_ends_the_walk():
    explain = xv.integrated_gradients(lambda x: jnp.sqrt(x))
    diagnostics = explain(jnp.ones(3), target=0).diagnostics
    assert not diagnostics["converged"]
    assert diagnostics["evaluations"] <= 18


def goldens(name):
    with np.load(GOLDENS / "paths.npz", allow_pickle=False) as stored:
        return stored[name]


def on_images(forward, weights, name, saturated):
    expected = goldens(name)
    images = jnp.asarray(embedded.images()[0][FIRST : FIRST + len(expected)])
    target = None
    if saturated:
        target = lambda logits: jnp.max(jax.nn.softmax(logits))
    explain = xv.integrated_gradients(forward, chunk=1, argnums=1)
    program = jax.jit(lambda weights, x: explain(weights, x, target=target))
    if saturated:
        labels = jax.vmap(lambda x: jnp.argmax(forward(weights, x)))(images)
        held = lambda weights, x, label: explain(
            weights, x, target=lambda logits: jax.nn.softmax(logits)[label]
        )
        held = jax.jit(held)
        found = [held(weights, *row) for row in zip(images, labels, strict=True)]
    else:
        found = [program(weights, x) for x in images]
    for each, wanted in zip(found, expected, strict=True):
        error = np.abs(each.scores - wanted).sum() / np.abs(wanted).sum()
        assert each.diagnostics["converged"]
        assert error <= 0.02
        yield error <= each.diagnostics["error_estimate"]


@pytest.mark.parametrize(
    ("model", "saturated"),
    [("vit", False), ("vit", True), ("convolutional", False), ("convolutional", True)],
)
def test_float64_goldens(model, saturated):
    """2,048 nodes in float64, on trained models that smoothly bend and that kink."""
    forward, weights = (
        embedded.functional()
        if model == "vit"
        else (convolutional.forward, convolutional.load())
    )
    name = f"{model}_{'probability' if saturated else 'logit'}"
    covered = list(on_images(forward, weights, name, saturated))
    assert np.mean(covered) >= 0.85


def test_what_was_measured_holds_what_is_promised():
    """Of inputs that nothing was chosen on; `golden_paths.py` measures it."""
    measured = json.loads((GOLDENS / "paths.json").read_text())
    inputs = {"vit": 100, "convolutional": 200, "minilm": 40}
    assert {name.split()[0] for name in measured} == set(inputs)
    for name, found in measured.items():
        assert found["inputs"] == inputs[name.split()[0]], name
        assert found["error_below_estimate"] >= 0.95, name
        assert found["error_beyond_twice_tolerance"] <= 0.01, name
        assert found["converged"] >= 0.95, name


def saturated(weights, x):
    return jax.nn.softmax(4 * jnp.tanh(x @ weights).sum(axis=0))


def test_stepwise_is_the_whole_bit_for_bit():
    explain = xv.integrated_gradients(saturated, argnums=1, chunk=3)
    assert isinstance(explain, Stepwise)
    x = 2 * example()
    whole = jax.jit(explain)(WEIGHTS, x)
    state = jax.jit(explain.start)(WEIGHTS, x)
    step = jax.jit(explain.step)
    taken = 0
    while explain.running(state):
        state, taken = step(state, WEIGHTS, x), taken + 1
    parts = jax.jit(explain.finish)(state, WEIGHTS, x)
    assert taken > FIRST_ROUND / 3
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert np.array_equal(a, b)
    again = jax.jit(explain)(WEIGHTS, x)
    assert np.array_equal(again.scores, whole.scores)


def test_inputs_under_vmap_stop_each_for_itself():
    explain = xv.integrated_gradients(saturated, argnums=1)
    batch = example(4) * jnp.array([0.1, 1.0, 2.0, 3.0]).reshape(4, 1, 1)
    found = jax.jit(jax.vmap(explain, in_axes=(None, 0)))(WEIGHTS, batch)
    counts = found.diagnostics["evaluations"]
    assert len(np.unique(counts)) > 1
    program = jax.jit(explain)
    for row, scores, count in zip(batch, found.scores, counts, strict=True):
        alone = program(WEIGHTS, row)
        assert alone.diagnostics["evaluations"] == count
        np.testing.assert_allclose(scores, alone.scores, rtol=1e-4, atol=1e-6)


def test_memory_does_not_grow_with_evaluations():
    def temporary(**options):
        explain = xv.integrated_gradients(saturated, argnums=1, chunk=2, **options)
        analysis = jax.jit(explain).lower(WEIGHTS, example()).compile()
        memory = analysis.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary(max_evaluations=10**6) == temporary(max_evaluations=17)


def test_several_baselines_are_averaged():
    x, begins = example(), 0.3 * example(3)[1:]
    every = xv.integrated_gradients(
        saturated, argnums=1, baseline=begins, steps=9, chunk=9
    )
    found = every(WEIGHTS, x, target=1)
    each = [
        xv.integrated_gradients(saturated, argnums=1, baseline=b, steps=9, chunk=9)(
            WEIGHTS, x, target=1
        )
        for b in begins
    ]
    mean = np.mean([one.scores for one in each], axis=0)
    np.testing.assert_allclose(found.scores, mean, rtol=1e-4, atol=1e-6)
    outputs = [one.diagnostics["baseline_output"] for one in each]
    np.testing.assert_allclose(
        found.diagnostics["baseline_output"], np.mean(outputs), rtol=1e-5
    )
    assert found.diagnostics["evaluations"] == 18
    adaptive = xv.integrated_gradients(saturated, argnums=1, baseline=lambda x: begins)
    assert adaptive(WEIGHTS, x, target=1).diagnostics["evaluations"] % 2 == 0
    few = xv.integrated_gradients(
        saturated, baseline=begins, argnums=1, max_evaluations=33
    )
    with pytest.raises(ValueError, match="2 baselines take at least 34 evaluations"):
        few(WEIGHTS, x)


def test_float64_inputs():
    with jax.enable_x64(True):
        x = jnp.asarray(np.array([1.0, 2.0]))
        found = xv.integrated_gradients(lambda x: (x**3).sum(keepdims=True))(x)
        assert found.scores.dtype == jnp.float32
        np.testing.assert_allclose(found.scores, [1, 8], rtol=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tolerance": 0}, "between 0 and 1, got 0"),
        ({"tolerance": "1%"}, "between 0 and 1, got '1%'"),
        ({"max_evaluations": 16}, "from 17 on, got 16"),
        ({"max_evaluations": 32.0}, "from 17 on, got 32.0"),
        ({"chunk": 0}, "from 1 to 512 evaluations, got 0"),
        ({"chunk": 600}, "from 1 to 512 evaluations, got 600"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(ValueError, match=said):
        xv.integrated_gradients(lambda x: x, **options)
