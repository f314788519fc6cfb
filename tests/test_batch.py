"""The batch runner: rows depend on their own input only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.contract.table import example, parameters, transformer
from xviz_jax import batch


@pytest.fixture(autouse=True, scope="module")
def two_devices():
    """Each has programs of its own to compile, and two are several."""
    devices = jax.local_devices()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: devices)
        yield


@pytest.fixture(scope="module")
def explain():
    return xv.integrated_gradients(transformer, steps=4, chunk=1, argnums=1)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_rows_equal_single_explanations(explain, in_flight):
    inputs = np.asarray(example(11))
    counts = []
    done = batch.run(
        explain,
        inputs,
        shared=(parameters(),),
        microbatch=4,
        in_flight=in_flight,
        progress=counts.append,
    )
    assert done.attribution.scores.shape == inputs.shape
    assert isinstance(done.attribution.scores, np.ndarray)
    assert sorted(counts) == [3, 4, 4]
    assert done.compile_seconds > 0
    assert done.run_seconds > 0
    program = jax.jit(explain)
    for row, scores in zip(inputs, done.attribution.scores, strict=True):
        expected = program(parameters(), row).scores
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_neighbours_and_order_change_no_bit(explain):
    inputs = np.asarray(example(9))
    order = np.random.default_rng(0).permutation(9)
    run = lambda rows: batch.run(explain, rows, shared=(parameters(),), microbatch=4)
    scores, shuffled = run(inputs).attribution.scores, run(inputs[order])
    assert np.array_equal(scores[order], shuffled.attribution.scores)
    alone = np.concatenate([run(inputs[i : i + 1]).attribution.scores for i in (0, 8)])
    assert np.array_equal(scores[[0, 8]], alone)


def test_wrong_calls(explain):
    with pytest.raises(ValueError, match="same number of rows"):
        batch.run(explain, {"a": np.ones((2, 3)), "b": np.ones((3, 3))})
    with pytest.raises(ValueError, match="same number of rows"):
        batch.run(explain, np.ones((0, 3)))
    with pytest.raises(ValueError, match="positive, got 0"):
        batch.run(explain, np.ones((2, 3)), microbatch=0)


def test_pytrees_of_inputs():
    explain = xv.saliency(lambda x: jnp.stack([x["a"] @ x["b"], x["a"].sum()]))
    rows = {"a": np.ones((3, 2), np.float32), "b": np.full((3, 2), 2, np.float32)}
    done = batch.run(explain, rows, microbatch=2)
    assert done.attribution.scores["a"].tolist() == [[2, 2]] * 3


MATRIX = jax.random.normal(jax.random.key(1), (4, 8))


@pytest.fixture(scope="module")
def adaptive():
    return xv.integrated_gradients(
        lambda matrix, x: jax.nn.softmax(matrix @ x), chunk=1, argnums=1
    )


def of_several_kinds(count):
    """Inputs that need different numbers of evaluations."""
    sizes = np.linspace(0.1, 9, count, dtype=np.float32)
    return np.asarray(jax.random.normal(jax.random.key(2), (count, 8))) * sizes[:, None]


def test_inputs_leave_when_they_are_done(adaptive):
    inputs, counts = of_several_kinds(11), []
    done = batch.run(
        adaptive,
        inputs,
        shared=(MATRIX,),
        microbatch=4,
        in_flight=1,
        progress=counts.append,
    )
    assert sum(counts) == 11
    assert len(counts) > 3
    evaluations = done.attribution.diagnostics["evaluations"]
    assert len(np.unique(evaluations)) > 3
    assert np.all(done.attribution.diagnostics["converged"])
    program = jax.jit(adaptive)
    for index, row in enumerate(inputs):
        alone = program(MATRIX, row)
        assert evaluations[index] == alone.diagnostics["evaluations"]
        np.testing.assert_allclose(
            done.attribution.scores[index], alone.scores, rtol=1e-4, atol=1e-5
        )


def test_lanes_change_no_bit(adaptive):
    """Neither who is beside an input, nor in which place, nor who was there before."""
    inputs = of_several_kinds(10)
    order = np.random.default_rng(0).permutation(10)
    run = lambda rows, in_flight: (
        batch.run(
            adaptive, rows, shared=(MATRIX,), microbatch=3, in_flight=in_flight
        ).attribution
    )
    rows, shuffled = run(inputs, 1), run(inputs[order], 2)
    for a, b in zip(jax.tree.leaves(rows), jax.tree.leaves(shuffled), strict=True):
        assert np.array_equal(a[order], b)
    alone = run(inputs[9:], 1)
    assert np.array_equal(alone.scores[0], rows.scores[9])


def test_microbatches_of_one_equal_single_explanations_bit_for_bit(adaptive):
    inputs = of_several_kinds(3)
    done = batch.run(adaptive, inputs, shared=(MATRIX,), microbatch=1)
    for row, scores in zip(inputs, done.attribution.scores, strict=True):
        assert np.array_equal(scores, jax.jit(adaptive)(MATRIX, row).scores)


def test_a_failure_in_one_worker_is_told(adaptive):
    def fail(count):
        raise RuntimeError("the reader has gone")

    with pytest.raises(RuntimeError, match="the reader has gone"):
        batch.run(adaptive, of_several_kinds(2), shared=(MATRIX,), progress=fail)
