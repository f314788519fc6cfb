"""Axioms of methods that integrate gradients: symmetry, and that of the dummy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation

FEATURES, UNITS, ROWS = 4, 3, 2
KEY = jax.random.key(0)


def drawn(*shape):
    return arrays(np.float32, shape, elements=st.floats(-1, 1, width=32))


# A model, its input and the baselines.
problems = st.fixed_dictionaries(
    {
        "weights": drawn(UNITS, FEATURES),
        "line": drawn(FEATURES),
        "x": drawn(FEATURES),
        "begins": drawn(ROWS, FEATURES),
    }
)


def compiled(method):
    """One program for every problem; it is the mean over the baselines."""

    def explain(weights, line, x, begins, swap):
        bend = lambda x: jnp.tanh(3 * weights @ x).sum()
        model = lambda x: (bend(x) + bend(x[swap]) + line @ x)[None]
        return method(model, begins)(x, key=KEY).scores

    return jax.jit(explain)


METHODS = {
    "integrated_gradients": compiled(
        lambda model, begins: xv.integrated_gradients(model, baseline=begins)
    ),
    "integrated_gradients-fixed": compiled(
        lambda model, begins: xv.integrated_gradients(model, baseline=begins, steps=4)
    ),
    "expected_gradients": compiled(
        lambda model, begins: xv.expected_gradients(model, baselines=begins, samples=6)
    ),
}


@pytest.mark.parametrize("name", METHODS)
@given(problem=problems, order=st.permutations(range(FEATURES)))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_interchangeable_features_get_the_same(name, problem, order):
    left, right = order[:2]
    swap = np.arange(FEATURES)
    swap[[left, right]] = right, left
    for each in ("line", "x", "begins"):
        problem[each][..., right] = problem[each][..., left]
    scores = METHODS[name](**problem, swap=swap)
    np.testing.assert_allclose(scores[left], scores[right], atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
@given(problem=problems, feature=st.integers(0, FEATURES - 1), worth=st.floats(-2, 2))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_feature_that_only_adds_its_own_worth_gets_it(name, problem, feature, worth):
    """The dummy axiom; worth 0 is a feature that the model does not read."""
    problem["weights"][:, feature] = 0
    problem["line"][feature] = worth
    scores = METHODS[name](**problem, swap=np.arange(FEATURES))
    way = problem["x"][feature] - problem["begins"][:, feature].mean()
    np.testing.assert_allclose(scores[feature], worth * way, atol=2e-5)
