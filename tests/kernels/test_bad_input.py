"""Every operation refuses what cannot be meant, before any backend is chosen."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.kernels.attention_col_product import attention_col_product
from xviz_jax.kernels.attention_fused_matrix import attention_fused_matrix
from xviz_jax.kernels.attention_fused_quantile import attention_fused_quantile
from xviz_jax.kernels.attention_lse import attention_lse
from xviz_jax.kernels.attention_row_product import attention_row_product
from xviz_jax.kernels.attention_statistics import attention_statistics
from xviz_jax.kernels.rollout_full import rollout_full
from xviz_jax.kernels.rollout_rows import rollout_rows

ones = lambda *shape: np.ones(shape, np.float32)
VECTOR = ones(1, 7)
OPERATIONS: dict[str, Any] = {
    "attention_lse": attention_lse,
    "attention_statistics": attention_statistics,
    "attention_row_product": functools.partial(attention_row_product, VECTOR),
    "attention_col_product": functools.partial(attention_col_product, VECTOR),
    "attention_fused_matrix": attention_fused_matrix,
    "attention_fused_quantile": functools.partial(attention_fused_quantile, ratio=0.5),
    "rollout_rows": lambda q, k, **options: rollout_rows(
        2 * [q], 2 * [k], [0], **in_lists(options)
    ),
    "rollout_full": lambda q, k, **options: rollout_full(
        2 * [q], 2 * [k], **in_lists(options)
    ),
}
# What neither the logsumexp nor the statistics takes.
WEIGHING = list(OPERATIONS)[2:]


def in_lists(options) -> Any:
    stacks = {"lse": "lses", "v": "vs", "dout": "douts"}
    return {
        stacks.get(name, name): 2 * [value] if name in stacks else value
        for name, value in options.items()
    }


@pytest.mark.parametrize("name", OPERATIONS)
def test_queries_and_keys(name):
    call = OPERATIONS[name]
    q = ones(7, 2, 16)
    with pytest.raises(TypeError, match=r"q wants a floating dtype .* got int32"):
        call(q.astype(np.int32), q)
    with pytest.raises(ValueError, match="q and k want one dtype, got float32 and bf"):
        call(q, jnp.asarray(q, jnp.bfloat16))
    with pytest.raises(ValueError, match="multiple of the key heads, got 2 and 3"):
        call(q, ones(7, 3, 16))
    with pytest.raises(ValueError, match=r"head_dim: \(7, 2, 16\) and \(7, 2, 8\)"):
        call(q, ones(7, 2, 8))
    with pytest.raises(ValueError, match=r"window wants integers >= 0 .* got \(-1, 2"):
        call(q, q, window=(-1, 2))
    with pytest.raises(ValueError, match="7 queries and 5 keys"):
        call(q, ones(5, 2, 16), causal=True)
    with pytest.raises(ValueError, match="implementation wants None or one of"):
        call(q, q, implementation="triton")


@pytest.mark.parametrize("name", WEIGHING)
def test_relevance(name):
    call = OPERATIONS[name]
    q = ones(7, 2, 16)
    relu = dict(relevance="relu_gradient_x_attention")
    with pytest.raises(ValueError, match="wants both v and dout; v is missing"):
        call(q, q, **relu, dout=q)
    with pytest.raises(ValueError, match="wants both v and dout; dout is missing"):
        call(q, q, **relu, v=q)
    with pytest.raises(ValueError, match=r"v wants shape \(7, 2, 16\), got \(6, 2"):
        call(q, q, **relu, v=ones(6, 2, 16), dout=q)
    with pytest.raises(ValueError, match="takes no dout"):
        call(q, q, dout=q)
    with pytest.raises(ValueError, match="lse wants dtype float32, got bfloat16"):
        call(q, q, lse=jnp.zeros((2, 7), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"lse wants shape \(2, 7\), got \(7, 2\)"):
        call(q, q, lse=ones(7, 2))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("implementation", ["mosaic_tpu", "mosaic_gpu"])
def test_a_named_backend_that_cannot_says_so(name, implementation):
    q = jnp.ones((7, 2, 13), jnp.float16)
    with pytest.raises(NotImplementedError, match=implementation):
        OPERATIONS[name](q, q, implementation=implementation, bias=ones(7, 7))
