"""Metrics that run the method again, and those of scores alone, worked by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.metrics import Reason

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=6).astype(np.float32)
square = lambda x: jnp.stack([jnp.sum(x**2) / 2, jnp.sum(x)])
gradient = xv.saliency(square, signed=True)


def constant(*args, target=None, key=None):
    """A method that says the same of everything."""
    return xv.Attribution(scores=jnp.arange(6.0), output=jnp.float32(0))


def test_sensitivity_of_a_gradient():
    """The gradient of half a square is the input, so its change is the move."""
    at = lambda **options: jax.jit(
        xv.metrics.sensitivity_max(square, explain=gradient, **options)
    )(X, X, target=0, key=KEY)
    size = np.linalg.norm(X)
    for relative, radius in ((False, 0.1), (True, 0.1 * size / np.sqrt(6))):
        found = at(radius=0.1, relative=relative, samples=200, chunk=64)
        change = np.asarray(found.details["change"]) * size
        assert found.value == found.details["change"].max()
        assert change.max() <= radius * np.sqrt(6)
        # Uniform in the box.
        np.testing.assert_allclose((change**2).mean(), 2 * radius**2, rtol=0.1)
    moves = jnp.array([[0.0, 0, 3, 4, 0, 0], [0.0, 1, 0, 0, 0, 0]])
    found = at(radius=lambda x, key: moves)
    np.testing.assert_allclose(found.details["change"] * size, [5, 1], rtol=1e-5)


def test_the_target_is_held_where_the_input_is():
    """The moved inputs are of another class."""
    model = lambda x: jnp.stack([3 * x[0], -x[0]])
    explain = xv.saliency(model, signed=True)
    measure = xv.metrics.sensitivity_max(
        model, explain=explain, radius=lambda x, key: jnp.array([[-2.0]])
    )
    assert jax.jit(measure)(jnp.ones(1), jnp.array([3.0]), key=KEY).value == 0


def test_embeddings_of_tokens_move():
    table = np.random.default_rng(3).normal(size=(9, 64)).astype(np.float32)
    model = lambda ids: jnp.sum(jnp.asarray(table)[ids] ** 2)[None] / 2
    explain = xv.input_x_gradient(model)
    ids = jnp.array([1, 4, 2, 8, 8])
    rows = table[np.asarray(ids)]
    scores = (rows**2).sum(1)
    measure = xv.metrics.sensitivity_max(
        model, explain=explain, radius=0.01, relative=True, samples=40, chunk=40
    )
    found = jax.jit(measure)(ids, scores, key=KEY)
    # Of |e + d|^2, with d of 1 % of the size of e: about 2 e d.
    width = 0.01 * np.sqrt((rows**2).mean())
    expected = 2 * width * np.linalg.norm(rows) / np.linalg.norm(scores)
    change = np.sqrt((np.asarray(found.details["change"]) ** 2).mean())
    np.testing.assert_allclose(change, expected, rtol=0.25)
    rollout = lambda x, **given: xv.Attribution(scores=x + 1.0, output=jnp.float32(0))
    with pytest.raises(ValueError, match="not explained at embeddings"):
        xv.metrics.sensitivity_max(model, explain=rollout)(ids, scores, key=KEY)


def test_random_logit():
    weights = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
    model = lambda x: jnp.asarray(weights) @ x
    explain = xv.saliency(model, signed=True)
    measure = xv.metrics.random_logit(model, explain=explain)
    scores = weights[3]
    keys = jax.random.split(KEY, 60)
    found = jax.jit(jax.vmap(lambda key: measure(X, scores, target=3, key=key)))(keys)
    other = np.asarray(found.details["other"])
    assert set(other) == {0, 1, 2, 4}
    expected = np.array(
        [scipy.stats.spearmanr(weights[3], weights[n])[0] for n in other]
    )
    np.testing.assert_allclose(found.value, expected, atol=1e-5)
    blind = xv.metrics.random_logit(model, explain=constant, similarity="cosine")
    assert jax.jit(blind)(X, constant(), key=KEY).value == 1
    for target in ((0, 1), jnp.sum):
        with pytest.raises(ValueError, match="for a target that is a class"):
            measure(X, scores, target=target, key=KEY)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        xv.metrics.random_logit(lambda x: x.sum()[None], explain=constant)(
            X, constant(), key=KEY
        )


def deep(parameters, x):
    for name in ("one", "two"):
        x = jnp.tanh(parameters[name]["kernel"] @ x)
    return parameters["head"] @ x


def weights():
    draw = np.random.default_rng(2).normal
    square = lambda: {"kernel": jnp.asarray(draw(size=(6, 6)), jnp.float32)}
    return {
        "one": square(),
        "two": square(),
        "head": jnp.ones((1, 6)),
        "step": jnp.int32(3),
    }


LAYERS = ("one", "two", "head", "step")


@pytest.mark.parametrize("order", ["bottom_up", "top_down"])
def test_layers_are_randomised_one_after_another(order: Any):
    """Against a loop that changes one more layer each time."""
    parameters = weights()
    explain = xv.saliency(deep, signed=True, argnums=1)
    gradient_of_deep = jax.jit(jax.grad(lambda *args: deep(*args)[0], argnums=1))
    negated = lambda leaf, key: -leaf
    metric = xv.metrics.mprt(
        deep, explain=explain, layers=LAYERS, order=order, randomize=negated,
        similarity="pearson",
    )  # fmt: skip
    scores = explain(parameters, X).scores
    found = jax.jit(metric)(parameters, X, scores, key=KEY)
    changed, expected = dict(parameters), []
    for name in LAYERS if order == "bottom_up" else LAYERS[::-1]:
        if name != "step":
            changed[name] = jax.tree.map(jnp.negative, changed[name])
        other = gradient_of_deep(changed, X)
        expected.append(np.corrcoef(scores, other)[0, 1])
    np.testing.assert_allclose(found.details["similarity"], expected, atol=1e-5)
    np.testing.assert_allclose(found.value, np.mean(expected), atol=1e-5)


@pytest.mark.parametrize("randomize", ["permute", "normal"])
def test_what_ignores_the_parameters_is_found_out(randomize):
    parameters = weights()
    explain = xv.saliency(deep, signed=True, argnums=1)
    options: Any = {"layers": LAYERS, "randomize": randomize}
    blind = xv.metrics.mprt(deep, explain=constant, **options)
    rise = xv.metrics.efficient_mprt(
        deep, explain=constant, randomize=options["randomize"]
    )
    metric = xv.metrics.mprt(deep, explain=explain, **options)

    @jax.jit
    def measure(parameters, keys):
        scores = explain(parameters, X)
        real = jax.vmap(lambda key: metric(parameters, X, scores, key=key))(keys)
        given = (parameters, X, constant())
        return real, blind(*given, key=KEY), rise(*given, key=KEY)

    real, same, none = measure(parameters, jax.random.split(KEY, 30))
    np.testing.assert_allclose(same.details["similarity"], 1)
    assert none.value == 0 and none.reason == 0
    assert (real.reason == 0).all()
    assert abs(real.value.mean()) < 0.3


def test_permuted_arrays_hold_the_same_entries():
    from xviz_jax.metrics.shuffling import shuffled

    parameters = weights()
    mixed = shuffled(parameters, "permute", KEY)
    before, after = parameters["one"]["kernel"], mixed["one"]["kernel"]
    assert (before != after).any() and mixed["step"] == 3
    np.testing.assert_array_equal(np.sort(before.ravel()), np.sort(after.ravel()))
    big = {"kernel": 2 + 3 * jax.random.normal(KEY, (100, 100))}
    drawn = shuffled(big, "normal", KEY)["kernel"]
    np.testing.assert_allclose(drawn.mean(), 2, atol=0.1)
    np.testing.assert_allclose(drawn.std(), 3, atol=0.1)


def test_entropy_rises_from_one_feature_to_noise():
    """The real model looks at one element; a shuffled one at all alike."""
    model = lambda layer, x: layer @ x
    layer = jnp.zeros((1, 64)).at[0, 5].set(1.0)
    explain = xv.saliency(model, argnums=1)
    noise = lambda leaf, key: jax.random.uniform(key, leaf.shape)
    x = jnp.ones(64)
    metric = xv.metrics.efficient_mprt(model, explain=explain, randomize=noise, bins=16)
    measure = jax.jit(lambda scores: metric(layer, x, scores, key=KEY))
    found = measure(jnp.abs(layer[0]))
    spread = np.histogram([1.0] + [0.0] * 63, 16)[0]
    before = scipy.stats.entropy(spread)
    np.testing.assert_allclose(found.details["entropy"], before, rtol=1e-5)
    np.testing.assert_allclose(
        found.value, found.details["random_entropy"] / before - 1, rtol=1e-5
    )
    assert found.value > 10
    flat = measure(jnp.ones(64))
    assert flat.reason == Reason.NO_VARIANCE and np.isnan(flat.value)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (None, r"here are \['head', 'one', 'step', 'two'\]"),
        (("one", "two", "head"), "the parameter 'step' is in 0 of the layers"),
        ((*LAYERS, "one/kernel"), "the parameter 'one/kernel' is in 2 of the layers"),
        ((*LAYERS, "three"), "'three' is no layer of the parameters"),
    ],
)
def test_wrong_layers_are_refused(layers, said):
    metric = xv.metrics.mprt(deep, explain=constant, layers=layers)
    with pytest.raises(ValueError, match=said):
        metric(weights(), X, constant(), key=KEY)


def test_wrong_calls_are_refused():
    metrics: Any = xv.metrics
    with pytest.raises(ValueError, match="pass `explain=`"):
        metrics.random_logit(square, explain=constant())
    with pytest.raises(ValueError, match="`randomize` is 'permute', 'normal' or"):
        metrics.mprt(deep, explain=constant, randomize="zeros")
    with pytest.raises(ValueError, match="`order` is one of"):
        metrics.mprt(deep, explain=constant, order="sideways")
    with pytest.raises(ValueError, match="`bins` is a positive integer"):
        metrics.efficient_mprt(deep, explain=constant, bins=0)
    with pytest.raises(ValueError, match="`parameters_argnum` is 2"):
        metrics.efficient_mprt(deep, explain=constant, parameters_argnum=2)(
            weights(), X, constant(), key=KEY
        )
    with pytest.raises(ValueError, match="`relative` is for a radius that is a number"):
        metrics.sensitivity_max(
            square, explain=gradient, radius=lambda x, key: x, relative=True
        )
    with pytest.raises(ValueError, match="bring both to one form"):
        metrics.sensitivity_max(square, explain=constant)(X, X[1:], key=KEY)


SCORES, MASK = np.array([3.0, -1.0, 2.0, 2.0, 0.0, 0.0]), np.array([1, 0, 1, 0, 0, 1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pointing_game", 1.0),
        ("relevance_mass", 5 / 7),
        # 3 and both 2 fill three places; a mask of three holds two of them.
        ("relevance_rank", 2 / 3),
    ],
)
def test_masks(name, expected):
    found = getattr(xv.metrics, name)()(X, SCORES, mask=MASK)
    np.testing.assert_allclose(found.value, expected, rtol=1e-6)
    if name != "pointing_game":
        np.testing.assert_allclose(found.details["chance"], 0.5)
    for mask in (0 * MASK, 0 * MASK + 1):
        bad = getattr(xv.metrics, name)()(X, SCORES, mask=mask)
        assert np.isnan(bad.value) and bad.reason == Reason.MASK


def test_equal_scores_favour_no_position():
    rank, point = xv.metrics.relevance_rank(), xv.metrics.pointing_game()
    scores = np.array([5.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    for place in ([0, 1], [0, 3]):
        mask = np.isin(np.arange(6), place)
        # One certain place, and a third of one of three.
        np.testing.assert_allclose(rank(X, scores, mask=mask).value, 2 / 3, rtol=1e-6)
    tied = np.array([1.0, 1.0, 0, 0, 0, 0])
    np.testing.assert_allclose(point(X, tied, mask=[0, 1, 0, 1, 0, 0]).value, 0.5)


def test_masks_of_features():
    x = jnp.zeros((4, 4, 3))
    scores = jax.random.uniform(KEY, x.shape)
    groups = lambda x: xv.patches(x.shape, 2)
    mask = np.zeros((4, 4))
    mask[:2] = 1
    # Half of a patch is inside, a quarter is not.
    mask[2:, 0], mask[3, 3] = 1, 1
    metric = jax.jit(xv.metrics.relevance_mass(groups=groups))
    found = metric(x, scores, mask=mask).value
    summed = np.asarray(scores).reshape(2, 2, 2, 2, 3).sum((1, 3, 4)).ravel()
    np.testing.assert_allclose(found, summed[:3].sum() / summed.sum(), rtol=1e-5)
    same = metric(x, summed, mask=np.array([1, 1, 1, 0])).value
    np.testing.assert_allclose(same, found, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"shaped like the leading axes of \(4, 4, 3\)"
    ):
        metric(x, scores, mask=np.ones((4, 3)))


def test_gini_and_entropy():
    generator = np.random.default_rng(5)
    row = generator.normal(size=40).astype(np.float32)
    size = np.abs(row).astype(np.float64)
    gini = np.abs(size[:, None] - size).sum() / (2 * 40 * size.sum())
    sparseness = jax.jit(xv.metrics.sparseness())
    complexity = jax.jit(xv.metrics.complexity())
    for scale in (1.0, -1e36, 1e-36):
        scaled = row * np.float32(scale)
        found = sparseness(X, scaled).value
        np.testing.assert_allclose(found, gini, rtol=1e-5)
        found = complexity(X, scaled).value
        np.testing.assert_allclose(found, scipy.stats.entropy(size), rtol=1e-5)
    one = np.eye(40, dtype=np.float32)[3]
    assert complexity(X, one).value == 0
    np.testing.assert_allclose(sparseness(X, one).value, 39 / 40, rtol=1e-6)
