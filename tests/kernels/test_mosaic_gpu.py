"""The Hopper kernel without a GPU: simulated, and lowered."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu

from xviz_jax.kernels.attention_row_product import attention_row_product

RELU = "relu_gradient_x_attention"
SIGNED = "gradient_x_attention"

# Absent from the oldest supported JAX, and so from its types.
InterpretGPUParams: Any = getattr(plgpu, "InterpretGPUParams", None)

simulated = pytest.mark.skipif(
    InterpretGPUParams is None,
    reason=f"JAX {jax.__version__} has no GPU simulator; needs >= 0.11",
)


def half(x, names=("q", "k", "v", "dout")) -> Any:
    return {name: jnp.asarray(getattr(x, name), jnp.bfloat16) for name in names}


@simulated
@pytest.mark.parametrize(
    "shape,relevance,fusion,scoring",
    [
        (dict(nq=100, heads=2), "attention", "mean", {}),
        (dict(nq=197, heads=2, kv_heads=1, m=3), RELU, "sum", dict(causal=True)),
        (dict(nq=197, m=9), "attention", "mean", dict(causal=True, window=(20, None))),
        (dict(nq=70, nk=150), SIGNED, "weighted", dict(window=(30, 5))),
        (dict(nq=70, nk=300, batch=(2,)), "attention", "mean", dict(key_mask=True)),
    ],
    ids=str,
)
def test_row_product_simulated(oracle, shape, relevance, fusion, scoring):
    x = oracle.make(dim=64, **shape)
    arrays = half(x, ("q", "k") if relevance == "attention" else vars(x).keys() - {"r"})
    options: Any = dict(relevance=relevance, head_fusion=fusion) | scoring
    if fusion == "weighted":
        options["head_weights"] = np.linspace(-0.5, 1, 2, dtype=np.float32)
    if options.get("key_mask"):
        options["key_mask"] = np.random.default_rng(0).random((2, 300)) < 0.6
    product = functools.partial(
        attention_row_product,
        implementation="mosaic_gpu",
        interpret=InterpretGPUParams(),
        config=dict(block_q=64, block_k=64),
        **options,
    )
    got = jax.jit(product)(x.r, **arrays)
    exact = {name: np.asarray(a, np.float64) for name, a in arrays.items()}
    want = x.r.astype(np.float64) @ oracle.fused(**exact, **options)
    assert np.abs(np.asarray(got) - want).max() <= 2e-6 * np.abs(want).max()


@simulated
def test_vmap_equals_batch(oracle):
    x = oracle.make(batch=(2,), nq=64, dim=64)
    product = functools.partial(
        attention_row_product,
        implementation="mosaic_gpu",
        interpret=InterpretGPUParams(),
        config=dict(block_q=64, block_k=64),
    )
    arrays = (jnp.asarray(x.r), *half(x, ("q", "k")).values())
    got, want = (jax.jit(f)(*arrays) for f in (jax.vmap(product), product))
    np.testing.assert_array_equal(got, want)


@simulated
@pytest.mark.parametrize("relevance", ["attention", RELU])
def test_lowers_for_cuda(relevance):
    array = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    arrays: Any = dict(
        r=array((2, 3, 1000), jnp.float32),
        q=array((2, 1000, 4, 64)),
        k=array((2, 1000, 2, 64)),
    )
    if relevance != "attention":
        arrays |= dict(v=array((2, 1000, 2, 64)), dout=array((2, 1000, 4, 64)))
    product = functools.partial(
        attention_row_product,
        implementation="mosaic_gpu",
        relevance=relevance,
        causal=True,
    )
    exported = export.export(
        jax.jit(product),
        platforms=["cuda"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )(**arrays)
    assert "mosaic_gpu_v2" in exported.mlir_module()


@simulated
def test_derivative_is_that_of_the_definition(oracle):
    x = oracle.make(nq=64, heads=2, dim=64)

    def loss(implementation, interpret, r):
        out = attention_row_product(
            r, **half(x, ("q", "k")), implementation=implementation, interpret=interpret
        )
        return (out**2).sum()

    how = (("mosaic_gpu", InterpretGPUParams()), ("reference", False))
    got, want = (jax.jit(jax.grad(functools.partial(loss, *h)))(x.r) for h in how)
    assert jnp.abs(got - want).max() <= 1e-5 * jnp.abs(want).max()


@simulated
def test_what_it_cannot_do_it_says(oracle):
    x = oracle.make(nq=7, dim=64)

    def fails(text, dtype=jnp.bfloat16, **options):
        arrays: Any = dict(r=x.r, **half(x, ("q", "k")))
        arrays |= {name: arrays[name].astype(dtype) for name in ("q", "k")}
        with pytest.raises(NotImplementedError, match=text):
            attention_row_product(**(arrays | options), implementation="mosaic_gpu")

    fails("mask", mask=np.ones((7, 7), bool))
    fails("bias", bias=np.ones((7, 7), np.float32))
    fails("threshold", threshold=np.float32(0.1))
    fails("softcap", softcap=1.0)
    fails("head_fusion='max'", head_fusion="max")
    fails("float32", dtype=jnp.float32)
    fails(
        "multiples of 64",
        q=jnp.ones((7, 2, 8), jnp.bfloat16),
        k=jnp.ones((7, 2, 8), jnp.bfloat16),
    )
    fails("at most 32 vectors", r=np.ones((33, 7), np.float32))


@pytest.mark.skipif(InterpretGPUParams is not None, reason="JAX is new enough")
def test_says_that_jax_is_too_old(oracle):
    x = oracle.make()
    with pytest.raises(NotImplementedError, match=r"JAX >= 0\.11"):
        attention_row_product(x.r, x.q, x.k, implementation="mosaic_gpu")
