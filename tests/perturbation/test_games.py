"""Small games against axioms, closed forms and a slow float64 enumeration."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation

PLAYERS = 4
KEY = jax.random.key(0)
ONES = jnp.ones(PLAYERS)
# A game: the value of each coalition, by its bits.
games = st.lists(
    st.floats(-4, 4, width=32), min_size=2**PLAYERS, max_size=2**PLAYERS
).map(lambda values: np.array(values, np.float32))


def model(values):
    """The explained scalar of an input of zeros and ones is the coalition's value."""

    def of(x):
        bits = jnp.arange(2**PLAYERS)[:, None] >> jnp.arange(PLAYERS)[None] & 1
        alike = jnp.prod(jnp.where(bits == 1, x[None], 1 - x[None]), axis=1)
        return (values @ alike)[None]

    return of


def compiled(method, **options):
    """One program for every game: its values are an argument."""

    def explain(values):
        found = method(model(values), **options)(ONES, key=KEY)
        return found.scores, found.diagnostics

    return jax.jit(explain)


EXACT = compiled(xv.exact_shapley, chunk=5)
SHAPLEY = {
    "exact_shapley": EXACT,
    "kernel_shap": compiled(xv.kernel_shap, samples=14, chunk=4),
    "shapley_value_sampling": compiled(xv.shapley_value_sampling, samples=4),
}


def slow_shapley(values):
    """By the definition, over all orders, in float64."""
    shares = np.zeros(PLAYERS)
    for order in itertools.permutations(range(PLAYERS)):
        present = 0
        for player in order:
            joined = present | 1 << player
            shares[player] += float(values[joined]) - float(values[present])
            present = joined
    return shares / math.factorial(PLAYERS)


@given(games)
@settings(max_examples=40, deadline=None)
def test_enumerations_are_exact(values):
    expected = slow_shapley(values)
    for name in ("exact_shapley", "kernel_shap"):
        np.testing.assert_allclose(SHAPLEY[name](values)[0], expected, atol=2e-5)


@pytest.mark.parametrize("name", SHAPLEY)
@given(values=games)
@settings(max_examples=20, deadline=None)
def test_efficiency(name, values):
    scores, diagnostics = SHAPLEY[name](values)
    change = float(values[-1]) - float(values[0])
    np.testing.assert_allclose(scores.sum(), change, atol=2e-5)
    assert diagnostics["absolute_gap"] < 2e-5


@pytest.mark.parametrize("name", SHAPLEY)
@given(values=games, player=st.integers(0, PLAYERS - 1), worth=st.floats(-2, 2))
@settings(max_examples=20, deadline=None)
def test_a_player_who_only_adds_its_own_worth_gets_it(name, values, player, worth):
    """The dummy axiom; worth 0 is the null player."""
    number = np.arange(2**PLAYERS)
    joined = number >> player & 1
    values = values[number & ~(1 << player)] + np.float32(worth) * joined
    scores, _ = SHAPLEY[name](values.astype(np.float32))
    np.testing.assert_allclose(scores[player], worth, atol=2e-5)


@given(values=games, pair=st.permutations(range(PLAYERS)))
@settings(max_examples=20, deadline=None)
def test_interchangeable_players_get_the_same(values, pair):
    left, right = pair[:2]
    number = np.arange(2**PLAYERS)
    bits = number[:, None] >> np.arange(PLAYERS) & 1
    swapped = bits.copy()
    swapped[:, [left, right]] = bits[:, [right, left]]
    other = swapped @ (1 << np.arange(PLAYERS))
    symmetric = ((values + values[other]) / 2).astype(np.float32)
    for name in ("exact_shapley", "kernel_shap"):
        scores, _ = SHAPLEY[name](symmetric)
        np.testing.assert_allclose(scores[left], scores[right], atol=2e-5)


@given(values=games, other=games)
@settings(max_examples=20, deadline=None)
def test_scores_of_a_sum_are_the_sum_of_scores(values, other):
    for program in SHAPLEY.values():
        both = program(values)[0] + program(other)[0]
        np.testing.assert_allclose(program(values + other)[0], both, atol=5e-5)


@given(values=games)
@settings(max_examples=20, deadline=None)
def test_ablation_is_the_loss_of_each_alone(values):
    scores, _ = ABLATION(values)
    full = 2**PLAYERS - 1
    lost = [values[full] - values[full & ~(1 << i)] for i in range(PLAYERS)]
    np.testing.assert_allclose(scores, lost, atol=1e-5)


ABLATION = compiled(xv.feature_ablation, chunk=3)


@pytest.mark.parametrize(
    "method",
    [
        partial(xv.shapley_value_sampling, samples=64, chunk=16),
        partial(xv.kernel_shap, samples=256, chunk=16),
    ],
    ids=["shapley_value_sampling", "kernel_shap"],
)
def test_sampling_errs_by_its_standard_error(method):
    """Over many keys: unbiased, and as far off as it says."""
    root = jax.random.normal(jax.random.key(5), (10, 10)) / 3
    quadratic = lambda x: (jnp.tanh(x @ root) @ (root @ x))[None]
    exact = xv.exact_shapley(quadratic, chunk=64)
    explain = method(quadratic)
    x = jax.random.normal(jax.random.key(6), (10,))
    keys = jax.random.split(jax.random.key(7), 40)
    truth = jax.jit(exact)(x).scores
    found = jax.jit(jax.vmap(lambda key: explain(x, key=key)))(keys)
    error = np.asarray(found.scores - truth[None])
    stated = np.asarray(found.diagnostics["standard_error"])
    ratio = np.sqrt((error**2).mean() / (stated**2).mean())
    assert 0.7 < ratio < 1.4
    off = error.mean(0) / (error.std(0) / np.sqrt(len(keys)))
    assert np.abs(off).max() < 5


def test_too_few_samples_are_marked():
    explain = jax.jit(xv.kernel_shap(lambda x: x.sum()[None], samples=4))
    assert not explain(jnp.ones(12), key=KEY).diagnostics["converged"]
    few = jax.jit(xv.shapley_value_sampling(lambda x: x.sum()[None], samples=2))
    error = few(jnp.ones(3), key=KEY).diagnostics["standard_error"]
    assert np.isnan(error).all()


def test_too_many_features_are_refused():
    with pytest.raises(ValueError, match="at most 16 features, got 17"):
        xv.exact_shapley(lambda x: x)(jnp.ones(17), target=0)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (np.zeros(3), "`groups` are integers, got float64"),
        (np.zeros(2, int), r"shape \(2,\), but the input has \(3,\)"),
        (np.array([0, 2, 2]), r"without a gap, got \[0, 2\]"),
        ([np.zeros(3, int)], "structure"),
    ],
)
def test_wrong_groups_are_refused(groups, said):
    with pytest.raises(ValueError, match=said):
        xv.feature_ablation(lambda x: x, groups=groups)(jnp.ones(3), target=0)


def test_traced_groups_are_refused():
    explain = lambda groups: xv.feature_ablation(lambda x: x, groups=groups)(ONES)
    with pytest.raises(ValueError, match="must be known when the program is made"):
        jax.eval_shape(explain, jnp.zeros(PLAYERS, jnp.int32))


def test_every_element_of_a_group_has_its_score():
    groups = xv.patches((4, 4), 2)
    weights = jax.random.normal(KEY, (4, 4))
    explain = xv.feature_ablation(lambda x: jnp.sum(weights * x)[None], groups=groups)
    scores = explain(jnp.ones((4, 4))).scores
    blocks = weights.reshape(2, 2, 2, 2).sum((1, 3))
    np.testing.assert_allclose(scores, np.kron(blocks, np.ones((2, 2))), rtol=1e-5)
