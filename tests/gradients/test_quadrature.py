import numpy as np
import pytest

from xviz_jax.gradients.quadrature import RULES, embedded_weights, rule_nodes


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [2, 3, 16, 101])
def test_weights_sum_to_one_and_nodes_lie_on_the_path(rule, steps):
    nodes, weights = rule_nodes(rule, steps)
    assert nodes.shape == weights.shape == (steps,)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-13)
    assert np.all(np.diff(nodes) > 0)
    assert 0 <= nodes[0]
    assert nodes[-1] <= 1


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        ("left", 1),
        ("right", 1),
        ("midpoint", 2),
        ("trapezoid", 2),
    ],
)
def test_order_of_convergence(rule, order):
    """The error of the integral of exp falls by 2 ** order when steps double."""

    def error(intervals):
        steps = intervals + 1 if rule == "trapezoid" else intervals
        nodes, weights = rule_nodes(rule, steps)
        return abs(weights @ np.exp(nodes) - (np.e - 1))

    np.testing.assert_allclose(error(64) / error(128), 2**order, rtol=0.02)


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_gauss_legendre_is_exact_to_degree(steps):
    nodes, weights = rule_nodes("gauss_legendre", steps)
    for degree in range(2 * steps):
        np.testing.assert_allclose(
            weights @ nodes**degree, 1 / (degree + 1), rtol=1e-12
        )
    missed = weights @ nodes ** (2 * steps) - 1 / (2 * steps + 1)
    assert abs(missed) > 1e-12


@pytest.mark.parametrize("steps", [2, 3, 6, 9])
def test_clenshaw_curtis_is_exact_to_degree(steps):
    nodes, weights = rule_nodes("clenshaw_curtis", steps)
    # Of an odd number, the symmetry gives one degree more.
    exact = steps + steps % 2
    for degree in range(exact):
        np.testing.assert_allclose(
            weights @ nodes**degree, 1 / (degree + 1), rtol=1e-12
        )
    assert abs(weights @ nodes**exact - 1 / (exact + 1)) > 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [2, 3, 16, 101])
def test_embedded_weights_are_a_coarser_rule_on_the_same_nodes(rule, steps):
    weights = embedded_weights(rule, steps)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    assert np.count_nonzero(weights) == -(-steps // 2)
    assert np.all(weights >= 0)


@pytest.mark.parametrize("rule", RULES)
def test_embedded_weights_see_the_error(rule):
    nodes, weights = rule_nodes(rule, 6)
    function = 1 / (1 + nodes)
    error = abs(weights @ function - np.log(2))
    assert error < 1.5 * abs((weights - embedded_weights(rule, 6)) @ function) < 1


def test_nothing_is_coarser_than_one_node():
    assert embedded_weights("midpoint", 1) == 0


@pytest.mark.parametrize(
    ("rule", "steps", "said"),
    [
        ("simpson", 8, "one of .*'midpoint'.* got 'simpson'"),
        ("left", 0, "positive integer, got 0"),
        ("left", 2.0, "positive integer, got 2.0"),
        ("left", True, "positive integer, got True"),
        ("trapezoid", 1, "at least 2 steps, got 1"),
        ("clenshaw_curtis", 1, "at least 2 steps, got 1"),
    ],
)
def test_wrong_calls(rule, steps, said):
    with pytest.raises(ValueError, match=said):
        rule_nodes(rule, steps)
