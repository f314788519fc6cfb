"""The TPU kernels without a TPU: interpreted, simulated, and lowered."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.kernels.attention_col_product import attention_col_product
from xviz_jax.kernels.attention_fused_matrix import attention_fused_matrix
from xviz_jax.kernels.attention_lse import attention_lse
from xviz_jax.kernels.attention_row_product import attention_row_product
from xviz_jax.kernels.attention_statistics import attention_statistics

SMALL_BLOCKS: Any = dict(block_q=128, block_k=128)


def named(value):
    return getattr(value, "__name__", str(value))


def close(got, want, tolerance=3e-6):
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()


def relevance_options(x, relevance="attention", fusion="mean"):
    options: Any = dict(relevance=relevance, head_fusion=fusion)
    if relevance != "attention":
        options |= dict(v=x.v, dout=x.dout)
    if fusion == "weighted":
        heads = x.q.shape[-2]
        options["head_weights"] = np.linspace(-0.5, 1, heads, dtype=np.float32)
    return options


def check_row_product(oracle, shape, relevance, fusion, scoring, interpret: Any = True):
    x = oracle.make(**shape)
    options: Any = relevance_options(x, relevance, fusion) | scoring
    product = functools.partial(
        attention_row_product,
        implementation="mosaic_tpu",
        config=SMALL_BLOCKS,
        interpret=interpret,
        **options,
    )
    got = jax.jit(product)(x.r, x.q, x.k)
    # A few vectors are summed in float32, more from their bfloat16 parts.
    in_float32 = shape.get("m", 1) <= 2 and fusion not in ("max", "min")
    want = x.r.astype(np.float64) @ oracle.fused(x.q, x.k, **options)
    close(got, want, 2e-6 if in_float32 else 1e-5)


RELU = "relu_gradient_x_attention"
SIGNED = "gradient_x_attention"


# Each length, number of vectors, grouping, width, mask, fusion and relevance at
# least once, and those that change the course of the kernel together.
@pytest.mark.parametrize(
    "shape,relevance,fusion,scoring",
    [
        (dict(nq=1), "attention", "mean", {}),
        (dict(nq=7, m=3, heads=4, kv_heads=2), RELU, "mean", dict(causal=True)),
        (dict(nq=129, m=9, heads=2, kv_heads=1), "attention", "sum", {}),
        (dict(nq=197, heads=3, dim=64), "attention", "mean", {}),
        (dict(nq=197, m=2, dim=80), SIGNED, "weighted", dict(causal=True)),
        (dict(nq=300, m=1), "attention", "mean", dict(causal=True)),
        (dict(nq=300, m=3), RELU, "mean", dict(causal=True, window=(40, None))),
        (dict(nq=300, heads=4, kv_heads=2), "attention", "max", dict(causal=True)),
        (dict(nq=130, m=3, heads=3), RELU, "min", dict(window=(30, 20))),
        (dict(nq=130, dim=128, batch=(2,)), "attention", "mean", dict(softcap=1.5)),
        (dict(nq=77, nk=205, m=9), SIGNED, "mean", dict(causal=True)),
        (dict(nq=260, nk=140), "attention", "mean", dict(window=(3, 0))),
        (dict(nq=140, nk=300), RELU, "mean", dict(causal=True, q_offset=30)),
    ],
    ids=str,
)
def test_row_product_interpreted(oracle, shape, relevance, fusion, scoring):
    check_row_product(oracle, shape, relevance, fusion, scoring)


@pytest.mark.parametrize(
    "shape,scoring",
    [
        (dict(nq=7), {}),
        (dict(nq=197, heads=4, kv_heads=2, dim=64), dict(causal=True)),
        (dict(nq=300, batch=(2,)), dict(window=(40, 3), softcap=2.0)),
        (dict(nq=300), dict(causal=True, window=(20, None))),
        (dict(nq=77, nk=205), dict(causal=True, q_offset=3)),
    ],
    ids=str,
)
def test_lse_interpreted(oracle, shape, scoring):
    x = oracle.make(**shape)
    lse = functools.partial(
        attention_lse,
        implementation="mosaic_tpu",
        config=SMALL_BLOCKS,
        interpret=True,
        **scoring,
    )
    close(jax.jit(lse)(x.q, x.k), oracle.lse(x.q, x.k, **scoring))


def check_columns_and_matrix(
    oracle, shape, relevance, fusion, scoring, interpret: Any = True
):
    x = oracle.make(**shape)
    rng = np.random.default_rng(5)
    lengths = (*x.k.shape[:-3], shape.get("m", 1), x.k.shape[-3])
    columns = rng.normal(size=lengths).astype(np.float32)
    options: Any = relevance_options(x, relevance, fusion) | scoring
    how: Any = dict(
        implementation="mosaic_tpu", config=SMALL_BLOCKS, interpret=interpret, **options
    )
    matrix, product = jax.jit(
        lambda x, q, k: (
            attention_fused_matrix(q, k, **how),
            attention_col_product(x, q, k, **how),
        )
    )(columns, x.q, x.k)
    want = oracle.fused(x.q, x.k, **options)
    close(matrix, want)
    close(product, columns @ want.swapaxes(-1, -2), 1e-5)


@pytest.mark.parametrize(
    "shape,relevance,fusion,scoring",
    [
        (dict(nq=300, m=3, heads=4, kv_heads=2), RELU, "max", dict(causal=True)),
        (dict(nq=77, nk=205, m=9, batch=(2,)), SIGNED, "weighted", dict(causal=True)),
        (dict(nq=260, nk=140, dim=64), "attention", "min", dict(window=(3, 0))),
    ],
    ids=str,
)
def test_columns_and_matrix_interpreted(oracle, shape, relevance, fusion, scoring):
    check_columns_and_matrix(oracle, shape, relevance, fusion, scoring)


def check_statistics(oracle, shape, scoring, top_k, interpret: Any = True):
    x = oracle.make(**shape)
    marked = np.random.default_rng(4).random((*x.k.shape[:-3], x.k.shape[-3])) < 0.3
    options = dict(top_k=top_k, **scoring)
    statistics = functools.partial(
        attention_statistics,
        implementation="mosaic_tpu",
        config=SMALL_BLOCKS,
        interpret=interpret,
        **options,
    )
    got = jax.jit(statistics)(x.q, x.k, marked_keys=marked)
    oracle.check_statistics(got, x.q, x.k, marked=marked, tolerance=4e-6, **options)


@pytest.mark.parametrize(
    "shape,scoring,top_k",
    [
        (dict(nq=300, heads=4, kv_heads=2, dim=64), dict(causal=True), 9),
        (dict(nq=129, batch=(2,)), dict(window=(1, 1), softcap=2.0), 4),
        (dict(nq=1, nk=205), dict(q_offset=3), 0),
        (dict(nq=260, nk=140), dict(window=(3, 0)), 2),
    ],
    ids=str,
)
def test_statistics_interpreted(oracle, shape, scoring, top_k):
    check_statistics(oracle, shape, scoring, top_k)


def test_equal_weights_list_the_first_keys():
    q = jnp.zeros((300, 1, 16))
    statistics = functools.partial(
        attention_statistics,
        top_k=3,
        implementation="mosaic_tpu",
        config=SMALL_BLOCKS,
        interpret=True,
        window=(200, 0),
    )
    keys = np.asarray(jax.jit(statistics)(q, q).top_keys[0])
    np.testing.assert_array_equal(keys[299], [99, 100, 101])
    np.testing.assert_array_equal(keys[1], [0, 1, -1])


def test_masked_keys_and_rows_interpreted(oracle):
    x = oracle.make(batch=(2,), nq=150, heads=2)
    key_mask = np.random.default_rng(0).random((2, 150)) < 0.6
    key_mask[0] = False
    want = x.r.astype(np.float64) @ oracle.fused(x.q, x.k, key_mask=key_mask)
    x.k[~key_mask] = np.nan
    how: Any = dict(implementation="mosaic_tpu", interpret=True)
    product = functools.partial(attention_row_product, **how)
    close(jax.jit(product)(x.r, x.q, x.k, key_mask=key_mask), want)
    lse = jax.jit(functools.partial(attention_lse, **how))(x.q, x.k, key_mask=key_mask)
    assert (np.asarray(lse[0]) == -np.inf).all() and np.isfinite(lse[1]).all()


@pytest.mark.parametrize("precision,tolerance", [("default", 1e-5), ("fast", 5e-3)])
def test_bfloat16_interpreted(oracle, precision, tolerance):
    x = oracle.make(nq=129, m=9, dim=64)
    q, k = jnp.asarray(x.q, jnp.bfloat16), jnp.asarray(x.k, jnp.bfloat16)
    product = functools.partial(
        attention_row_product,
        implementation="mosaic_tpu",
        interpret=True,
        precision=precision,
    )
    want = x.r @ oracle.fused(np.asarray(q, np.float64), np.asarray(k, np.float64))
    close(jax.jit(product)(x.r, q, k), want, tolerance)


SIMULATOR: Any = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.mark.parametrize(
    "check,shape,relevance,fusion,scoring",
    [
        (
            check_row_product,
            dict(nq=150, heads=2, kv_heads=1),
            "attention",
            "mean",
            dict(causal=True),
        ),
        (check_row_product, dict(nq=150, m=3), RELU, "mean", dict(window=(9, 9))),
        (check_row_product, dict(nq=130), "attention", "max", {}),
        (check_columns_and_matrix, dict(nq=150), RELU, "max", dict(causal=True)),
    ],
    ids=named,
)
def test_simulated_without_races_or_uninitialised_reads(
    oracle, check, shape, relevance, fusion, scoring
):
    check(oracle, shape, relevance, fusion, scoring, SIMULATOR)


def test_statistics_simulated_without_races_or_uninitialised_reads(oracle):
    shape: Any = dict(nq=150, heads=2, kv_heads=1)
    check_statistics(oracle, shape, dict(window=(9, 2)), 2, SIMULATOR)


def test_derivatives_are_those_of_the_definition(oracle):
    x = oracle.make(nq=20, heads=2, m=2)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(how, *arguments):
        def loss(r, q, k):
            out = attention_row_product(r, q, k, causal=True, **dict(how))
            return (out**2).sum()

        gradients = jax.grad(loss, argnums=(0, 1, 2))(*arguments)
        return gradients, jnp.stack(jax.jvp(loss, arguments, arguments))

    how = (
        (("implementation", "mosaic_tpu"), ("interpret", True)),
        (("implementation", "reference"),),
    )
    arguments = (jnp.asarray(x.r), jnp.asarray(x.q), jnp.asarray(x.k))
    got, want = (jax.tree.leaves(derivatives(h, *arguments)) for h in how)
    for g, w in zip(got, want, strict=True):
        close(g, w, 1e-5)


def test_statistics_have_the_derivatives_of_the_definition(oracle):
    x = oracle.make(nq=20, heads=2)

    def loss(how, q, k):
        found = attention_statistics(q, k, top_k=2, causal=True, **how)
        return (found.entropy * found.maximum).sum() + found.top_weights[..., 1].sum()

    how: Any = (
        dict(implementation="mosaic_tpu", interpret=True),
        dict(implementation="reference"),
    )
    got, want = (
        jax.jit(jax.grad(functools.partial(loss, h), argnums=(0, 1)))(x.q, x.k)
        for h in how
    )
    for g, w in zip(got, want, strict=True):
        close(g, w, 1e-5)


def test_vmap_equals_batch(oracle):
    x = oracle.make(batch=(2,), nq=140, heads=2)
    product = functools.partial(
        attention_row_product, implementation="mosaic_tpu", interpret=True, causal=True
    )
    got = jax.jit(jax.vmap(product))(x.r, x.q, x.k)
    close(got, jax.jit(product)(x.r, x.q, x.k))


@pytest.mark.parametrize(
    "operation,dtype,static,extra",
    [
        (attention_row_product, jnp.float32, dict(causal=True, softcap=30.0), "r"),
        (
            attention_row_product,
            jnp.bfloat16,
            dict(window=(256, 3), relevance=RELU),
            "r",
        ),
        (
            attention_row_product,
            jnp.bfloat16,
            dict(head_fusion="max", relevance=SIGNED),
            "r",
        ),
        (attention_col_product, jnp.bfloat16, dict(relevance=RELU), "x"),
        (attention_fused_matrix, jnp.float32, dict(head_fusion="min"), None),
        (attention_statistics, jnp.bfloat16, dict(causal=True), "marked_keys"),
    ],
    ids=named,
)
def test_lowers_for_tpu(operation, dtype, static, extra):
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    queries, keys = array(2, 1000, 4, 64), array(2, 1000, 2, 64)
    arrays: Any = dict(q=queries, k=keys, key_mask=array(2, 1000, dtype=bool))
    if "relevance" in static:
        arrays |= dict(v=keys, dout=queries)
    if extra == "marked_keys":
        arrays[extra] = array(2, 1000, dtype=bool)
    elif extra is not None:
        arrays[extra] = array(2, 5, 1000, dtype=jnp.float32)
    call = functools.partial(operation, implementation="mosaic_tpu", **static)
    exported = export.export(jax.jit(call), platforms=["tpu"])(**arrays)
    # The logsumexp and the product, or the statistics in one pass.
    kernels = 1 if operation is attention_statistics else 2
    assert exported.mlir_module().count("tpu_custom_call") >= kernels


def test_what_it_cannot_do_it_says(oracle):
    x = oracle.make(nq=7)

    def fails(text, **options):
        with pytest.raises(NotImplementedError, match=text):
            attention_row_product(
                **(dict(r=x.r, q=x.q, k=x.k) | options), implementation="mosaic_tpu"
            )

    fails("mask", mask=np.ones((7, 7), bool))
    fails("bias", bias=np.ones((7, 7), np.float32))
    fails("threshold", threshold=np.float32(0.1))
    fails("float16", q=x.q.astype(np.float16), k=x.k.astype(np.float16))
    fails("at most 512 vectors", r=np.ones((513, 7), np.float32))
    with pytest.raises(NotImplementedError, match="at most top_k=32 keys, got 33"):
        q = np.ones((40, 1, 16), np.float32)
        attention_statistics(q, q, top_k=33, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match="at most 512 vectors x"):
        columns = np.ones((513, 7), np.float32)
        attention_col_product(columns, x.q, x.k, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="multiples of 128"):
        attention_row_product(
            x.r, x.q, x.k, implementation="mosaic_tpu", config=dict(block_q=100)
        )
