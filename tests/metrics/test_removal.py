"""Metrics that take features away, worked out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.metrics import Reason, curves, features, imputers

KEY = jax.random.key(0)
WEIGHTS = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
X = np.random.default_rng(1).normal(size=8).astype(np.float32)
SCORES = np.random.default_rng(2).normal(size=8).astype(np.float32)
# Three features: of 2, 5 and 1 elements.
GROUPS = np.array([0, 0, 1, 1, 1, 2, 1, 1])
linear = lambda x: jnp.asarray(WEIGHTS) @ x


def outputs(kind, present, baseline=0.0, target=1):
    """What is measured of the linear model with only some elements present."""
    logits = WEIGHTS.astype(np.float64) @ np.where(present, X, baseline)
    if kind == "probability":
        return scipy.special.softmax(logits)[target]
    if kind == "margin":
        return logits[target] - np.delete(logits, target).max()
    return logits[target]


def slow_curve(kind, sizes, keep=False, baseline=0.0):
    place = np.argsort(np.argsort(-SCORES))
    return [outputs(kind, (place < n) == keep, baseline) for n in sizes]


def trapezoids(fraction, curve):
    fraction, curve = np.asarray(fraction), np.asarray(curve)
    return float((np.diff(fraction) * (curve[1:] + curve[:-1]) / 2).sum())


@pytest.mark.parametrize("kind", ["logit", "probability", "margin"])
def test_curves(kind):
    sizes = np.arange(9)
    options = {"output": kind, "chunk": 3, "imputer": imputers.baseline(0.5)}
    of = lambda metric: jax.jit(
        lambda x, scores: metric(linear, **options)(x, scores, target=1)
    )(X, SCORES)
    falling = slow_curve(kind, sizes, baseline=0.5)
    rising = slow_curve(kind, sizes, keep=True, baseline=0.5)
    found = of(xv.metrics.deletion)
    np.testing.assert_allclose(found.details["curve"], falling, atol=1e-5)
    np.testing.assert_allclose(found.details["fraction"], sizes / 8)
    np.testing.assert_allclose(found.value, trapezoids(sizes / 8, falling), atol=1e-5)
    other = of(xv.metrics.insertion)
    np.testing.assert_allclose(other.details["curve"], rising, atol=1e-5)
    np.testing.assert_allclose(other.value, trapezoids(sizes / 8, rising), atol=1e-5)
    both = of(xv.metrics.abpc)
    np.testing.assert_allclose(both.details["morf"], falling, atol=1e-5)
    np.testing.assert_allclose(both.details["lerf"], rising[::-1], atol=1e-5)
    np.testing.assert_allclose(both.value, other.value - found.value, atol=1e-5)


def test_curves_with_fewer_points_than_features():
    options = {"steps": 3, "chunk": 2}
    measure = lambda metric: jax.jit(
        lambda x: metric(linear, **options)(x, SCORES, target=1)
    )(X)
    sizes = [0, 3, 5, 8]
    found = measure(xv.metrics.deletion)
    np.testing.assert_allclose(
        found.details["curve"], slow_curve("logit", sizes), atol=1e-5
    )
    difference = measure(xv.metrics.insertion).value - found.value
    np.testing.assert_allclose(measure(xv.metrics.abpc).value, difference, atol=1e-5)
    for count in range(1, 40):
        for steps in range(1, 40):
            sizes = curves.sizes(count, steps)
            assert sizes[0] == 0 and sizes[-1] == count
            assert len(sizes) == 1 + min(count, steps) and (np.diff(sizes) > 0).all()


@pytest.mark.parametrize("kind", ["logit", "probability", "margin"])
def test_comprehensiveness_and_sufficiency(kind):
    # 1 % of eight features is one; 30 % are 2.4, so two.
    fractions, sizes = (0.01, 0.3, 0.5), [1, 2, 4]
    whole = outputs(kind, np.ones(8, bool))
    for metric, keep in (
        (xv.metrics.comprehensiveness, 0),
        (xv.metrics.sufficiency, 1),
    ):
        measure = metric(linear, fractions=fractions, output=kind, chunk=2)
        found = measure(X, SCORES, target=1)
        drop = whole - np.array(slow_curve(kind, sizes, keep=bool(keep)))
        np.testing.assert_allclose(found.details["drop"], drop, atol=1e-5)
        np.testing.assert_allclose(found.details["fraction"], np.array(sizes) / 8)
        np.testing.assert_allclose(found.value, drop.mean(), atol=1e-5)


def test_scores_are_summed_within_features_or_taken_as_they_are():
    measure = xv.metrics.deletion(linear, groups=GROUPS)
    whole = measure(X, SCORES, target=1)
    summed = np.array([SCORES[GROUPS == n].sum() for n in range(3)])
    order = np.argsort(-summed)
    gone = [np.isin(GROUPS, order[:n]) for n in range(4)]
    expected = [outputs("logit", ~each) for each in gone]
    np.testing.assert_allclose(whole.details["curve"], expected, atol=1e-5)
    each = measure(X, summed, target=1)
    jax.tree.map(np.testing.assert_array_equal, whole, each)
    by_function = xv.metrics.deletion(linear, groups=lambda x: GROUPS)
    jax.tree.map(np.testing.assert_array_equal, whole, by_function(X, SCORES, target=1))


@pytest.mark.parametrize("count", [4, 40])
def test_sums_within_features_of_any_size(count):
    """Even ones, and one that is much larger than the others."""
    numbers = (
        np.arange(120) % count if count == 4 else np.maximum(np.arange(120) - 80, 0)
    )
    numbers = np.random.default_rng(4).permutation(numbers)
    scores = np.random.default_rng(5).normal(size=120).astype(np.float32)
    found = features.by_feature(scores, numbers, count)
    np.testing.assert_allclose(
        found, np.bincount(numbers, scores, minlength=count), atol=1e-5
    )


def test_a_pytree_is_one_input():
    model = lambda x: linear(jnp.concatenate([x["a"], x["b"].ravel()]))
    split = lambda row: {
        "a": jnp.asarray(row[:4]),
        "b": jnp.asarray(row[4:].reshape(2, 2)),
    }
    found = xv.metrics.deletion(model)(split(X), split(SCORES), target=1)
    np.testing.assert_allclose(
        found.details["curve"], slow_curve("logit", range(9)), atol=1e-5
    )


def test_a_pair_of_classes_is_its_own_margin():
    value = lambda **given: xv.metrics.deletion(linear, **given)
    pair = value(output="margin")(X, SCORES, target=(0, 2)).value
    logit = value()(X, SCORES, target=(0, 2)).value
    one, other = (value()(X, SCORES, target=each).value for each in (0, 2))
    np.testing.assert_allclose([pair, logit], one - other, atol=1e-5)


@pytest.mark.parametrize("name", ["sensitivity_n", "faithfulness_correlation"])
def test_correlations_of_a_linear_model(name):
    true = WEIGHTS[1] * X
    options = {"fractions": (0.1, 0.5, 0.9)} if name == "sensitivity_n" else {}
    measure = getattr(xv.metrics, name)(linear, samples=20, **options)
    program = jax.jit(lambda scores: measure(X, scores, target=1, key=KEY))
    for scores, expected in ((true, 1), (3 * true + 0, 1), (-true, -1)):
        found = program(scores)
        np.testing.assert_allclose(found.value, expected, atol=1e-5)
        np.testing.assert_allclose(found.details["correlation"], expected, atol=1e-5)
    if name == "sensitivity_n":
        np.testing.assert_allclose(found.details["fraction"], [1 / 8, 4 / 8, 7 / 8])
    assert abs(program(SCORES).value) < 0.9


def test_infidelity_of_a_linear_model():
    true = WEIGHTS[1] * X

    def of(**options):
        measure = xv.metrics.infidelity(linear, **options)
        return jax.jit(lambda scores: measure(X, scores, target=1, key=KEY))

    fitted, plain = of(), of(normalize=False)
    for scale in np.array([1, 5, 1e30], np.float32):
        found = fitted(true * scale)
        assert found.value < 1e-9 and found.details["unexplained"] < 1e-9
        np.testing.assert_allclose(found.details["scaling"] * scale, 1, rtol=1e-5)
    # The opposite is no better than nothing.
    opposite = fitted(-true)
    assert opposite.details["scaling"] == 0
    np.testing.assert_allclose(opposite.details["unexplained"], 1, rtol=1e-5)
    assert plain(true).value < 1e-9
    # Scores twice as large are off by as much as the output loses.
    np.testing.assert_allclose(plain(2 * true).details["unexplained"], 1, rtol=1e-4)
    # With moves of the input, the gradient is what is faithful.
    moved = of(perturbation=0.3, normalize=False)
    assert moved(WEIGHTS[1]).value < 1e-9
    assert moved(true).value > 1e-3


def test_completeness():
    measure = xv.metrics.completeness(linear, baseline=0.5)
    true = WEIGHTS[1] * (X - 0.5)
    assert measure(X, true, target=1).value < 1e-5
    found = measure(X, true + 0.25, target=1)
    change = WEIGHTS[1] @ (X - 0.5)
    np.testing.assert_allclose(found.details["absolute_gap"], 2, rtol=1e-5)
    np.testing.assert_allclose(found.value, 2 / abs(change), rtol=1e-5)
    still = xv.metrics.completeness(linear, baseline=X)(X, true, target=1)
    assert np.isnan(still.value) and still.reason == Reason.NO_CHANGE
    np.testing.assert_allclose(
        still.details["absolute_gap"], abs(true.sum()), rtol=1e-5
    )


def test_road_counts_where_the_class_stays():
    """A bright square, and a model that looks at nothing else."""
    image = jnp.zeros((8, 8)).at[2:4, 2:4].set(1.0)
    model = lambda x: jnp.stack([jnp.sum(x[2:4, 2:4]) - 1.0, 0.0])
    measure = xv.metrics.road(model, fractions=(0.03125, 0.0625, 0.5), noise=0.0)
    at_once = jax.jit(lambda scores: measure(image, scores, key=KEY))
    found = at_once(image)
    # Half of the square goes, then all; what is painted over stays dark.
    np.testing.assert_array_equal(found.details["kept"], [1, 0, 0])
    np.testing.assert_allclose(found.value, 1 / 3, rtol=1e-6)
    assert found.details["margin"][0] == 3
    assert at_once(-image + 1e-3 * jnp.arange(64.0).reshape(8, 8)).value == 1


@pytest.mark.parametrize(
    ("options", "given", "said"),
    [
        ({}, (X,), "with the attribution right after argument 0"),
        ({"argnums": 1}, (X, SCORES), "right after argument 1"),
        ({}, (X, SCORES[1:]), r"cut off first, by `scores\[1:\]`"),
        ({}, (X, SCORES > 0), "made of numbers"),
        ({"groups": GROUPS[1:]}, (X, SCORES), r"shape \(7,\), but the input"),
        ({"imputer": 0.0}, (X, SCORES), "one of `xv.metrics.imputers`"),
        ({"output": "loss"}, (X, SCORES), "`output` is one of"),
        ({"steps": 0}, (X, SCORES), "`steps` is a positive integer"),
        ({"chunk": 0}, (X, SCORES), "`chunk` is a positive integer"),
        ({"imputer": imputers.drop(1)}, (X, SCORES), "`mask_argnum` is 1"),
        ({"imputer": imputers.mask_token(0)}, (X, SCORES), "but the input is float32"),
        ({"imputer": imputers.baseline(X[1:])}, (X, SCORES), "`baseline` has shape"),
    ],
)
def test_wrong_calls_are_refused(options, given, said):
    with pytest.raises(ValueError, match=said):
        xv.metrics.deletion(linear, **options)(*given, target=1)


def test_a_probability_needs_a_class():
    measure = xv.metrics.comprehensiveness(linear)
    with pytest.raises(ValueError, match="for a target that is a class; use"):
        measure(X, SCORES, target=lambda logits: logits.sum())
    with pytest.raises(ValueError, match="for a target that is a class; use"):
        xv.metrics.comprehensiveness(jnp.sum)(X, SCORES)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        xv.metrics.sufficiency(lambda x: x.sum()[None])(X, SCORES)
    with pytest.raises(ValueError, match="`road` is for a target that is a class"):
        xv.metrics.road(linear)(X, SCORES, target=(0, 1), key=KEY)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: xv.metrics.sufficiency(linear, fractions=(0.5, 1.5)), "from above 0"),
        (lambda: xv.metrics.sensitivity_n(linear, fractions=(1,)), "between 0 and 1"),
        (lambda: xv.metrics.sensitivity_n(linear, samples=2), "at least 3 `samples`"),
        (lambda: xv.metrics.road(linear, fractions=()), "between 0 and 1"),
        (lambda: xv.metrics.infidelity(linear, perturbation=-1.0), "a size above zero"),
        (
            lambda: xv.metrics.infidelity(linear, perturbation=1.0, groups=GROUPS),
            "neither `imputer` nor `groups`",
        ),
        (
            lambda: xv.metrics.infidelity(
                linear, perturbation=lambda x, key: jnp.ones((3, 7))
            )(X, SCORES, key=KEY),
            r"an input of \[\(8,\)\], got \[\(3, 7\)\]",
        ),
        (
            lambda: xv.metrics.infidelity(linear, perturbation=0.1)(
                X, SCORES[1:], key=KEY
            ),
            "scores are shaped like the input",
        ),
        (
            lambda: xv.metrics.sensitivity_n(jnp.sum)(X[:1], X[:1], key=KEY),
            "at least 2 features, got 1",
        ),
    ],
)
def test_wrong_options_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
