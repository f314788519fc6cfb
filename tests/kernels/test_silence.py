"""What is masked contributes zero, and what is not a number stays where it was met."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.kernels.attention_col_product import attention_col_product
from xviz_jax.kernels.attention_fused_matrix import attention_fused_matrix
from xviz_jax.kernels.attention_lse import attention_lse
from xviz_jax.kernels.attention_row_product import attention_row_product
from xviz_jax.kernels.attention_statistics import attention_statistics

# Absent from the oldest supported JAX, and so from its types.
InterpretGPUParams: Any = getattr(plgpu, "InterpretGPUParams", None)
RELU: Any = dict(relevance="relu_gradient_x_attention")
N = 70


@pytest.fixture(params=["reference", "xla", "mosaic_tpu", "mosaic_gpu"])
def backend(request):
    """Arguments that run a backend here, and the dtype it takes."""
    how: dict[str, Any] = dict(implementation=request.param)
    if request.param == "mosaic_tpu":
        how["interpret"] = True
    if request.param == "mosaic_gpu":
        if InterpretGPUParams is None:
            pytest.skip(f"JAX {jax.__version__} has no GPU simulator; needs >= 0.11")
        how["interpret"] = InterpretGPUParams()
    return how, jnp.bfloat16 if request.param == "mosaic_gpu" else jnp.float32


@functools.partial(jax.jit, static_argnames=("how", "causal"))
def everything(x, key_mask, how, causal):
    """Every operation on one attention, in one program."""
    how = dict(how, causal=causal, key_mask=key_mask)
    qk = x["q"], x["k"]
    gradient = dict(RELU, v=x["v"], dout=x["dout"])
    found = {
        "lse": attention_lse(*qk, **how),
        "row": attention_row_product(x["r"], *qk, **how, **gradient, head_fusion="max"),
        "col": attention_col_product(x["x"], *qk, **how, **gradient),
        "statistics": attention_statistics(*qk, top_k=2, **how),
    }
    if how["implementation"] != "mosaic_gpu":
        found["matrix"] = attention_fused_matrix(
            *qk, **how, **gradient, head_fusion="min"
        )
    return found


def draw(oracle, dtype):
    x = oracle.make(batch=(2,), nq=N, heads=2, kv_heads=1, dim=64)
    found = {name: jnp.asarray(getattr(x, name), dtype) for name in ("q", "k", "v")}
    found |= dict(dout=jnp.asarray(x.dout, dtype), r=jnp.asarray(x.r))
    return found | dict(x=jnp.asarray(x.r[..., ::-1]))


def test_masked_queries_and_keys(oracle, backend):
    how, dtype = backend
    x = draw(oracle, dtype)
    key_mask = np.ones((2, N), bool)
    key_mask[0] = False
    key_mask[1, 50:] = False
    clean = everything(x, key_mask, tuple(how.items()), causal=False)
    for name in ("k", "v", "x"):
        x[name] = jnp.where(
            key_mask[:, None] if name == "x" else key_mask[..., None, None],
            x[name],
            jnp.nan,
        )
    found = everything(x, key_mask, tuple(how.items()), causal=False)
    jax.tree.map(np.testing.assert_array_equal, found, clean)
    assert all(np.isfinite(y[1]).all() for y in jax.tree.leaves(found))
    assert (found["lse"][0] == -np.inf).all()
    assert (found["statistics"].top_keys[0] == -1).all()
    assert (found["statistics"].top_keys[1] < 50).all()
    for name in ("row", "col", "matrix"):
        if name in found:
            assert (found[name][0] == 0).all(), name
    for name in ("entropy", "distance", "self_mass", "first_mass", "maximum"):
        assert (getattr(found["statistics"], name)[0] == 0).all(), name
    assert (found["row"][1, :, 50:] == 0).all()


@pytest.mark.parametrize("source", ["q", "dout"])
def test_nan_stays_in_its_row_and_columns(oracle, backend, source):
    how, dtype = backend
    x = draw(oracle, dtype)
    key_mask = np.ones((2, N), bool)
    clean = everything(x, key_mask, tuple(how.items()), causal=True)
    x[source] = x[source].at[1, 8, 0].set(jnp.nan)
    found = everything(x, key_mask, tuple(how.items()), causal=True)
    # Query 8 of the second example, with one bad head, sees keys 0 to 8.
    row = np.zeros((2, 1, N), bool)
    row[1, :, 8] = True
    columns = np.zeros((2, 1, N), bool)
    columns[1, :, :9] = True
    head = row & (np.arange(2) == 0)[:, None]
    head = head if source == "q" else np.zeros_like(head)

    def only(got, want, where, name):
        got, want = np.asarray(got), np.asarray(want)
        assert np.isnan(got[where]).all(), name
        np.testing.assert_array_equal(got[~where], want[~where], err_msg=name)

    only(found["lse"], clean["lse"], head, "lse")
    only(found["col"], clean["col"], row, "col")
    only(found["row"], clean["row"], columns, "row")
    if "matrix" in found:
        where = row[:, 0, :, None] & columns
        only(found["matrix"], clean["matrix"], where, "matrix")
    for name in ("entropy", "distance", "self_mass", "maximum"):
        got, want = (getattr(each["statistics"], name) for each in (found, clean))
        only(got, want, head, name)
