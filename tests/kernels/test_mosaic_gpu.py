"""The Hopper kernels without a GPU: simulated, and lowered."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu

from xviz_jax.kernels import mosaic_gpu
from xviz_jax.kernels.attention_col_product import attention_col_product
from xviz_jax.kernels.attention_lse import attention_lse
from xviz_jax.kernels.attention_map import attention_map
from xviz_jax.kernels.attention_row_product import attention_row_product
from xviz_jax.kernels.attention_statistics import attention_statistics

RELU = "relu_gradient_x_attention"
SIGNED = "gradient_x_attention"

# Absent from the oldest supported JAX, and so from its types.
InterpretGPUParams: Any = getattr(plgpu, "InterpretGPUParams", None)

simulated = pytest.mark.skipif(
    InterpretGPUParams is None,
    reason=f"JAX {jax.__version__} has no GPU simulator; needs >= 0.11",
)


BLOCKS: Any = dict(block_q=64, block_k=64)


def simulator() -> Any:
    return InterpretGPUParams(detect_races=True)


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
        (dict(nq=197, heads=4, kv_heads=2), "attention", "max", dict(causal=True)),
        (dict(nq=70, nk=150, heads=3, m=5), RELU, "min", dict(window=(30, 5))),
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
        interpret=simulator(),
        config=BLOCKS,
        **options,
    )
    got = jax.jit(product)(x.r, **arrays)
    exact = {name: np.asarray(a, np.float64) for name, a in arrays.items()}
    want = x.r.astype(np.float64) @ oracle.fused(**exact, **options)
    assert np.abs(np.asarray(got) - want).max() <= 2e-6 * np.abs(want).max()


# The walk along the keys, in one step and in several, that three operations share.
WALKS: Any = [
    (dict(nq=100), dict(scale=-0.1)),
    (dict(nq=197, heads=4, kv_heads=2), dict(causal=True)),
    (dict(nq=70, nk=300, batch=(2,)), dict(window=(90, 5), key_mask=True)),
]


def scoring_of(x, scoring):
    if not scoring.get("key_mask"):
        return scoring
    shape = (*x.k.shape[:-3], x.k.shape[-3])
    return scoring | dict(key_mask=np.random.default_rng(0).random(shape) < 0.6)


def exactly(arrays):
    return {name: np.asarray(a, np.float64) for name, a in arrays.items()}


@simulated
@pytest.mark.parametrize("shape,scoring", WALKS, ids=str)
def test_lse_simulated(oracle, shape, scoring):
    x = oracle.make(dim=64, **shape)
    arrays = half(x, ("q", "k"))
    how: Any = dict(implementation="mosaic_gpu", interpret=simulator(), config=BLOCKS)
    scoring = scoring_of(x, scoring)
    got = jax.jit(functools.partial(attention_lse, **how, **scoring))(**arrays)
    want = oracle.lse(**exactly(arrays), **scoring)
    assert np.abs(np.asarray(got) - want).max() <= 2e-6


@simulated
@pytest.mark.parametrize("shape,scoring", WALKS, ids=str)
def test_statistics_simulated(oracle, shape, scoring):
    x = oracle.make(dim=64, **shape)
    arrays = half(x, ("q", "k"))
    marked = np.random.default_rng(1).random((*x.k.shape[:-3], x.k.shape[-3])) < 0.3
    options: Any = dict(top_k=3, **scoring_of(x, scoring))
    how: Any = dict(implementation="mosaic_gpu", interpret=simulator(), config=BLOCKS)
    statistics = functools.partial(attention_statistics, **how, **options)
    got = jax.jit(statistics)(**arrays, marked_keys=marked)
    exact = exactly(arrays)
    oracle.check_statistics(got, **exact, marked=marked, tolerance=4e-6, **options)


@simulated
@pytest.mark.parametrize("shape,scoring", WALKS[1:], ids=str)
def test_columns_simulated(oracle, shape, scoring):
    x = oracle.make(dim=64, **shape)
    arrays = half(x)
    rng = np.random.default_rng(5)
    columns = rng.random((*x.k.shape[:-3], 3, x.k.shape[-3])).astype(np.float32)
    options: Any = dict(relevance=RELU, **scoring_of(x, scoring))
    how: Any = dict(implementation="mosaic_gpu", interpret=simulator(), config=BLOCKS)
    product = functools.partial(attention_col_product, **how, **options)
    got = jax.jit(product)(columns, **arrays)
    want = columns @ oracle.fused(**exactly(arrays), **options).swapaxes(-1, -2)
    assert np.abs(np.asarray(got) - want).max() <= 2e-6 * np.abs(want).max()


@simulated
def test_vmap_equals_batch(oracle):
    x = oracle.make(batch=(2,), nq=64, dim=64)
    product = functools.partial(
        attention_row_product,
        implementation="mosaic_gpu",
        interpret=simulator(),
        config=BLOCKS,
    )
    arrays = (jnp.asarray(x.r), *half(x, ("q", "k")).values())
    got, want = (jax.jit(f)(*arrays) for f in (jax.vmap(product), product))
    np.testing.assert_array_equal(got, want)


def shapes(extra, static, dim=64) -> Any:
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    queries, keys = array(2, 1000, 4, dim), array(2, 1000, 2, dim)
    arrays: Any = dict(q=queries, k=keys, key_mask=array(2, 1000, dtype=bool))
    if "relevance" in static:
        arrays |= dict(v=keys, dout=queries)
    if extra is not None:
        arrays[extra] = array(2, 3, 1000, dtype=jnp.float32)
    return arrays


@simulated
@pytest.mark.parametrize(
    "operation,static,extra",
    [
        (attention_lse, dict(causal=True), None),
        (attention_row_product, dict(window=(256, 3)), "r"),
        (attention_row_product, dict(causal=True, relevance=RELU), "r"),
        (attention_row_product, dict(head_fusion="max", relevance=SIGNED), "r"),
        (attention_col_product, dict(relevance=RELU), "x"),
        (attention_statistics, dict(causal=True), None),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("dim", [64, 128])
def test_lowers_for_cuda(operation, static, extra, dim):
    call = functools.partial(operation, implementation="mosaic_gpu", **static)
    exported = export.export(
        jax.jit(call),
        platforms=["cuda"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )(**shapes(extra, static, dim))
    assert "mosaic_gpu_v2" in exported.mlir_module()


@simulated
def test_derivative_is_that_of_the_definition(oracle):
    x = oracle.make(nq=64, heads=2, dim=64)

    def loss(implementation, interpret, r):
        out = attention_row_product(
            r, **half(x, ("q", "k")), implementation=implementation, interpret=interpret
        )
        return (out**2).sum()

    how = (("mosaic_gpu", simulator()), ("reference", False))
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
    fails("float32", dtype=jnp.float32)
    fails(
        "multiples of 64",
        q=jnp.ones((7, 2, 8), jnp.bfloat16),
        k=jnp.ones((7, 2, 8), jnp.bfloat16),
    )
    fails("at most 32 vectors", r=np.ones((33, 7), np.float32))
    wide = jnp.ones((7, 2, 1024), jnp.bfloat16)
    fails("bytes of shared memory; head_dim 1024", q=wide, k=wide)
    q, columns = half(x)["q"], np.ones((9, 7), np.float32)
    how: Any = dict(implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="head_fusion='max' here"):
        attention_col_product(columns[:1], q, q, head_fusion="max", **how)
    with pytest.raises(NotImplementedError, match="at most 8 vectors x, got 9"):
        attention_col_product(columns, q, q, **how)
    with pytest.raises(NotImplementedError, match="at most top_k=8 keys, got 9"):
        long = jnp.ones((20, 1, 64), jnp.bfloat16)
        attention_statistics(long, long, top_k=9, **how)
    with pytest.raises(ValueError, match="multiples of 64, got 128 and 96"):
        attention_lse(q, q, config=dict(block_k=96), **how)


@pytest.mark.skipif(InterpretGPUParams is not None, reason="JAX is new enough")
def test_says_that_jax_is_too_old(oracle):
    x = oracle.make()
    with pytest.raises(NotImplementedError, match=r"JAX >= 0\.11"):
        attention_row_product(x.r, x.q, x.k, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    "capability,cuda,scoring,refusal",
    [
        ("9.0", "PJRT C API\ncuda 13000", dict(causal=True), None),
        ("9.0", "PJRT C API\ncuda 12090", {}, None),
        ("9.0", "cuda 12080", dict(causal=True), "CUDA 12.8.0 to 12.9.1"),
        ("9.0", "cuda 12090", dict(window=(3, 3)), "CUDA 12.8.0 to 12.9.1"),
        ("9.0", "cuda 12060", dict(causal=True), None),
        ("8.0", "cuda 13000", {}, "compute capability 9.0"),
    ],
    ids=str,
)
def test_devices_and_their_software(oracle, capability, cuda, scoring, refusal):
    x = oracle.make()
    client = types.SimpleNamespace(platform_version=cuda)
    device = types.SimpleNamespace(compute_capability=capability, client=client)
    attention = attention_map(x.q, x.k, **scoring)
    if refusal is None:
        mosaic_gpu.require_device(attention, device)
    else:
        with pytest.raises(NotImplementedError, match=refusal):
            mosaic_gpu.require_device(attention, device)
