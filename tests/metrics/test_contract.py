"""Every metric: row-local, pure, undefined with a reason, and not fooled."""

from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from tests.metrics.table import METRICS, SHAPE, exact, parameters
from xviz_jax.metrics import NEEDS, REASONS, Reason

INPUTS = 24
# Rows of the batch whose scores or input are bad.
ZERO, NEGATIVE, NAN_SCORES, NAN_INPUT = range(4)
BAD = 4


def batch():
    """Bad rows, then inputs with true scores, with shuffled, and with opposite ones."""
    layers = parameters()
    x = jax.random.normal(jax.random.key(2), (INPUTS, *SHAPE))
    true = jax.vmap(exact, (None, 0))(layers, x)
    keys = jax.random.split(jax.random.key(3), INPUTS)
    shuffle = lambda key, each: jax.random.permutation(key, each.ravel()).reshape(SHAPE)
    shuffled = jax.vmap(shuffle)(keys, true)
    xs = jnp.concatenate([x[:BAD], x, x, x]).at[NAN_INPUT].set(jnp.nan)
    scores = jnp.concatenate([true[:BAD], true, shuffled, -true])
    scores = scores.at[ZERO].set(0).at[NEGATIVE].set(-1 - jnp.abs(true[NEGATIVE]))
    scores = scores.at[NAN_SCORES, 0, 0].set(jnp.nan)
    return layers, xs, scores, jax.random.split(jax.random.key(4), len(xs))


LAYERS, X, SCORES, KEYS = batch()


name = attrgetter("name")


@pytest.fixture(scope="module", params=METRICS, ids=name)
def measured(request):
    """The metric, its compiled batch, how often that was traced, and its values."""
    row, traces = request.param, []

    def measure(*args):
        traces.append(args)
        return row.measure(*args)

    many = jax.jit(jax.vmap(measure, (None, 0, 0, 0)))
    return row, many, traces, many(LAYERS, X, SCORES, KEYS)


def test_a_measurement_is_defined_or_has_a_reason(measured):
    row, _, _, found = measured
    assert found.value.dtype == jnp.float32 and found.reason.dtype == jnp.int32
    assert found.value.shape == found.reason.shape == (len(X),)
    np.testing.assert_array_equal(np.isnan(found.value), found.reason != 0)
    assert ((found.reason >= 0) & (found.reason < len(REASONS))).all()
    assert (found.reason[BAD : BAD + INPUTS] == 0).all(), "good scores are undefined"
    assert found.reason[ZERO] == row.zero
    assert found.reason[NEGATIVE] == row.negative
    assert found.reason[NAN_SCORES] == Reason.SCORES_NOT_FINITE
    assert found.reason[NAN_INPUT] == row.poisoned


def test_a_constant_model_is_undefined(measured):
    row, many, traces, _ = measured
    nothing = jax.tree.map(jnp.zeros_like, LAYERS)
    found = many(nothing, jnp.where(jnp.isnan(X), 0, X), jnp.zeros_like(SCORES), KEYS)
    assert np.isnan(found.value).all()
    assert (found.reason == row.constant).all()
    assert len(traces) == 1, "one shape is traced once"


def test_a_row_depends_on_no_other(measured):
    """To the bit, whatever its neighbours are; where it stands may change rounding."""
    _, many, _, found = measured
    order = np.arange(len(X))
    order[::2] = np.random.default_rng(0).permutation(order[::2])
    other = many(LAYERS, X[order], SCORES[order], KEYS[order])
    for before, after in zip(
        jax.tree.leaves(found), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(after[1::2], before[1::2])
        np.testing.assert_allclose(after, before[order], rtol=2e-5, atol=2e-6)


def test_a_batch_is_a_loop(measured):
    row, _, _, found = measured
    one = jax.jit(row.measure)
    for place in (BAD, BAD + 1, NAN_SCORES):
        alone = one(LAYERS, X[place], SCORES[place], KEYS[place])
        jax.tree.map(
            lambda a, b, place=place: np.testing.assert_allclose(
                a, b[place], rtol=2e-5, atol=2e-6
            ),
            alone,
            found,
        )


@pytest.mark.parametrize(
    "measured", [row for row in METRICS if row.faithful], indirect=True, ids=name
)
def test_true_scores_win_and_opposite_ones_lose(measured):
    row, _, _, found = measured
    true, random, opposite = found.value[BAD:].reshape(3, INPUTS).mean(axis=1)
    sign = {"higher": 1, "lower": -1}[row.make(None).better]
    assert sign * true > sign * random > sign * opposite
    # Every single input's true scores are at least as good as their opposite.
    assert (sign * (found.value[BAD:][:INPUTS] - found.value[-INPUTS:]) >= 0).all()


@pytest.mark.parametrize("row", METRICS, ids=name)
def test_what_it_needs_is_data(row):
    metric = row.make(None)
    assert metric.name == row.name.partition("-")[0]
    assert metric.better in ("higher", "lower", None)
    assert metric.needs <= NEEDS
    layers, x = LAYERS, X[BAD]
    if "key" in metric.needs:
        with pytest.raises(ValueError, match=f"`{metric.name}` is random: pass `key="):
            metric(layers, x, x)
    elif "mask" in metric.needs:
        with pytest.raises(ValueError, match="needs `mask=`"):
            metric(layers, x, x)
    else:
        with pytest.raises(ValueError, match="takes no `mask`"):
            metric(layers, x, x, mask=x)


def test_none_is_left_out():
    names = {row.name.partition("-")[0] for row in METRICS}
    pairs = {"kendall_tau", "spearman", "top_k_overlap", "sign_agreement"}
    public = {
        name
        for name in dir(xv.metrics)
        if callable(getattr(xv.metrics, name)) and name.islower()
    }
    assert public == names | pairs | {"rank_agreement"}
    assert len(REASONS) == len(Reason)
