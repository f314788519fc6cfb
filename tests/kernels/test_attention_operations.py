"""Column product, fused matrix, statistics and quantile against float64."""

import functools
from typing import Any

import jax
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

SHAPE: Any = dict(batch=(2,), nq=37, heads=4, kv_heads=2, m=3)
STRIPS: Any = dict(block_b=1, block_h=1, block_q=10)


def close(got, want, tolerance=2e-6):
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()


def relevance_options(x, relevance, fusion):
    options: Any = dict(relevance=relevance, head_fusion=fusion, causal=True)
    if relevance != "attention":
        options |= dict(v=x.v, dout=x.dout)
    if fusion == "weighted":
        options["head_weights"] = np.asarray([0.3, -0.2, 0.5, 1.0], np.float32)
    return options


@pytest.mark.parametrize(
    "implementation,config", [("reference", None), ("xla", None), ("xla", STRIPS)]
)
@pytest.mark.parametrize(
    "relevance,fusion",
    [
        ("attention", "mean"),
        ("gradient_x_attention", "weighted"),
        ("relu_gradient_x_attention", "max"),
    ],
)
def test_fused_matrix_and_column_product(
    oracle, implementation, config, relevance, fusion
):
    x = oracle.make(**SHAPE)
    columns = np.random.default_rng(2).normal(size=(2, 3, 37)).astype(np.float32)
    options: Any = relevance_options(x, relevance, fusion)
    options["threshold"] = np.asarray([-1.0, 0.02], np.float32)
    want = oracle.fused(x.q, x.k, **options)
    how = dict(implementation=implementation, config=config)

    @jax.jit
    def both(columns, q, k):
        return (
            attention_fused_matrix(q, k, **options, **how),
            attention_col_product(columns, q, k, **options, **how),
        )

    matrix, product = both(columns, x.q, x.k)
    close(matrix, want)
    close(product, columns @ want.swapaxes(1, 2))
    del options["threshold"]
    linear = functools.partial(attention_col_product, **options, **how)
    want = columns @ oracle.fused(x.q, x.k, **options).swapaxes(1, 2)
    close(jax.jit(linear)(columns, x.q, x.k), want)


def test_column_product_is_the_transpose_of_the_row_product(oracle):
    x = oracle.make(**SHAPE)
    columns = np.random.default_rng(2).normal(size=(2, 3, 37)).astype(np.float32)
    rows = lambda r: attention_row_product(r, x.q, x.k, causal=True)
    (pulled,) = jax.jit(lambda c: jax.vjp(rows, x.r)[1](c))(columns)
    product = functools.partial(attention_col_product, causal=True)
    close(jax.jit(product)(columns, x.q, x.k), pulled)


@pytest.mark.parametrize(
    "implementation,config", [("reference", None), ("xla", STRIPS)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_statistics(oracle, implementation, config, masked):
    x = oracle.make(**SHAPE)
    rng = np.random.default_rng(4)
    marked = rng.random((2, 37)) < 0.3
    scoring: Any = dict(causal=True)
    if masked:
        scoring = dict(key_mask=rng.random((2, 37)) < 0.5, window=(2, 2))
    statistics = jax.jit(
        functools.partial(
            attention_statistics,
            implementation=implementation,
            config=config,
            top_k=3,
            **scoring,
        )
    )(x.q, x.k, marked_keys=marked)
    oracle.check_statistics(
        statistics, x.q, x.k, marked=marked, top_k=3, tolerance=3e-6, **scoring
    )


@pytest.mark.parametrize(
    "relevance,fusion,ratio",
    [
        ("attention", "mean", 0.0),
        ("attention", "min", 0.93),
        ("gradient_x_attention", "mean", 0.5),
        ("gradient_x_attention", "min", 0.93),
    ],
)
def test_quantile_is_the_sorted_entry(oracle, relevance, fusion, ratio):
    x = oracle.make(**SHAPE)
    options: Any = relevance_options(x, relevance, fusion)
    options |= dict(implementation="xla", config=STRIPS)

    @jax.jit
    def both(q, k):
        threshold = attention_fused_quantile(q, k, ratio, **options)
        kept = attention_fused_matrix(q, k, threshold=threshold, **options)
        return threshold, kept, attention_fused_matrix(q, k, **options)

    threshold, kept, fused = map(np.asarray, both(x.q, x.k))
    ordered = np.sort(fused.reshape(2, -1), -1)
    np.testing.assert_array_equal(threshold, ordered[:, int(ratio * 37 * 37)])
    np.testing.assert_array_equal(
        kept, np.where(fused < threshold[:, None, None], 0, fused)
    )


def test_quantile_of_the_definition_agrees(oracle):
    x = oracle.make(**SHAPE)
    for ratio in (0.2, 0.9):
        got = [
            jax.jit(
                functools.partial(
                    attention_fused_quantile, ratio=ratio, implementation=how
                )
            )(x.q, x.k)
            for how in ("reference", "xla")
        ]
        close(got[0], got[1])


def test_bad_input_says_what_was_got_and_wanted(oracle):
    x = oracle.make()
    with pytest.raises(ValueError, match=r"ratio wants to lie in \[0, 1\), got 1.0"):
        attention_fused_quantile(x.q, x.k, 1.0)
    with pytest.raises(ValueError, match="top_k wants an integer from 0 to 7"):
        attention_statistics(x.q, x.k, top_k=8)
    with pytest.raises(TypeError, match="marked_keys wants booleans"):
        attention_statistics(x.q, x.k, marked_keys=np.ones(7))
    with pytest.raises(ValueError, match=r"marked_keys wants shape \(7,\)"):
        attention_statistics(x.q, x.k, marked_keys=np.ones(8, bool))
    with pytest.raises(ValueError, match="x wants shape"):
        attention_col_product(np.ones((2, 1, 7), np.float32), x.q, x.k)
    with pytest.raises(TypeError, match="q wants a floating"):
        attention_fused_matrix(x.q.astype(int), x.k)


@pytest.mark.parametrize(
    "operation",
    [
        attention_lse,
        attention_fused_matrix,
        attention_statistics,
        functools.partial(attention_fused_quantile, ratio=0.5),
    ],
)
def test_vmap_equals_batch(oracle, operation):
    x = oracle.make(batch=(2,), nq=12, heads=4, kv_heads=2)
    strips = functools.partial(
        operation, implementation="xla", config=dict(block_h=1, block_q=5)
    )
    batched, mapped = jax.jit(lambda q, k: (strips(q, k), jax.vmap(strips)(q, k)))(
        jnp.asarray(x.q), jnp.asarray(x.k)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), batched, mapped)
