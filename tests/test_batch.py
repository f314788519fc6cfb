"""The batch runner: rows depend on their own input only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.contract.table import example, parameters, transformer
from xviz_jax import batch


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
