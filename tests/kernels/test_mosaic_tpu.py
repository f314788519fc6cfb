"""The TPU kernels without a TPU: interpreted, simulated, and lowered."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from xviz_jax.kernels.attention_lse import attention_lse
from xviz_jax.kernels.attention_row_product import attention_row_product

SMALL_BLOCKS: Any = dict(block_q=128, block_k=128)


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


@pytest.mark.parametrize("fusion", ["mean", "max"])
def test_masked_keys_and_rows_interpreted(oracle, fusion):
    x = oracle.make(batch=(2,), nq=150, heads=2)
    key_mask = np.random.default_rng(0).random((2, 150)) < 0.6
    key_mask[0] = False
    want = x.r.astype(np.float64) @ oracle.fused(
        x.q, x.k, key_mask=key_mask, head_fusion=fusion
    )
    x.k[~key_mask] = np.nan
    how = dict(implementation="mosaic_tpu", interpret=True)
    product = functools.partial(attention_row_product, head_fusion=fusion, **how)
    got = jax.jit(product)(x.r, x.q, x.k, key_mask=key_mask)
    close(got, want, 1e-5)
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


@pytest.mark.parametrize(
    "shape,relevance,fusion,scoring",
    [
        (dict(nq=150, heads=2, kv_heads=1), "attention", "mean", dict(causal=True)),
        (dict(nq=150, m=3, heads=2), RELU, "mean", dict(window=(9, 9))),
        (dict(nq=130, heads=2), "attention", "max", {}),
    ],
    ids=str,
)
def test_simulated_without_races_or_uninitialised_reads(
    oracle, shape, relevance, fusion, scoring
):
    simulator = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check_row_product(oracle, shape, relevance, fusion, scoring, simulator)


def test_derivatives_are_those_of_the_definition(oracle):
    x = oracle.make(nq=20, heads=2, m=2)

    def loss(implementation, interpret, r, q, k):
        out = attention_row_product(
            r, q, k, implementation=implementation, interpret=interpret, causal=True
        )
        return (out**2).sum()

    how = (("mosaic_tpu", True), ("reference", False))
    arguments = (jnp.asarray(x.r), jnp.asarray(x.q), jnp.asarray(x.k))
    got, want = (
        jax.jit(jax.grad(functools.partial(loss, *h), argnums=(0, 1, 2)))(*arguments)
        for h in how
    )
    for g, w in zip(got, want, strict=True):
        close(g, w, 1e-5)
    got, want = (
        jax.jit(lambda *a, h=h: jax.jvp(functools.partial(loss, *h), a, a))(*arguments)
        for h in how
    )
    close(jnp.stack(got), jnp.stack(want), 1e-5)


def test_vmap_equals_batch(oracle):
    x = oracle.make(batch=(2,), nq=140, heads=2)
    product = functools.partial(
        attention_row_product, implementation="mosaic_tpu", interpret=True, causal=True
    )
    got = jax.jit(jax.vmap(product))(x.r, x.q, x.k)
    close(got, jax.jit(product)(x.r, x.q, x.k))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "m,relevance,fusion,scoring",
    [
        (1, "attention", "mean", dict(causal=True, softcap=30.0)),
        (5, RELU, "mean", dict(causal=True, window=(256, None))),
        (1, SIGNED, "max", dict(key_mask=True)),
    ],
    ids=str,
)
def test_lowers_for_tpu(dtype, m, relevance, fusion, scoring):
    array = lambda shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    arrays: Any = dict(
        r=array((2, m, 1000), jnp.float32),
        q=array((2, 1000, 4, 64)),
        k=array((2, 1000, 2, 64)),
    )
    if relevance != "attention":
        arrays |= dict(v=array((2, 1000, 2, 64)), dout=array((2, 1000, 4, 64)))
    options = dict(scoring)
    if options.pop("key_mask", False):
        arrays["key_mask"] = array((2, 1000), bool)
    product = functools.partial(
        attention_row_product,
        implementation="mosaic_tpu",
        relevance=relevance,
        head_fusion=fusion,
        **options,
    )
    exported = export.export(jax.jit(product), platforms=["tpu"])(**arrays)
    # The logsumexp and the product.
    assert exported.mlir_module().count("tpu_custom_call") >= 2


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
    with pytest.raises(ValueError, match="multiples of 128"):
        attention_row_product(
            x.r, x.q, x.k, implementation="mosaic_tpu", config=dict(block_q=100)
        )
