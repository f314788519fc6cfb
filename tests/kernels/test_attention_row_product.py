"""`attention_row_product` and `attention_lse` against float64, and their properties."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax.kernels.attention_col_product import attention_col_product
from xviz_jax.kernels.attention_lse import attention_lse
from xviz_jax.kernels.attention_row_product import attention_row_product

SHAPES: dict[str, Any] = {
    "one": dict(nq=1),
    "small": dict(nq=7, heads=4, kv_heads=2, m=3),
    "odd": dict(batch=(2,), nq=129, heads=4, kv_heads=1, m=9),
    "vit": dict(batch=(2, 2), nq=197, heads=3, dim=64),
    "cross": dict(batch=(1,), nq=30, nk=77, heads=2, dim=80, m=3),
    "strips": dict(batch=(2,), nq=300, heads=4, kv_heads=2, dim=128),
}
# How each shape is cut, so that every loop of the tiling is walked at least once.
CONFIGS = {
    "one": None,
    "small": dict(block_h=1, block_q=2),
    "odd": dict(block_b=1, block_q=50),
    "vit": None,
    "cross": dict(block_h=1),
    "strips": dict(block_b=1, block_h=1, block_q=64),
}
MASKS: dict[str, Any] = {
    "full": lambda nq, nk: {},
    "causal": lambda nq, nk: dict(causal=True),
    "window": lambda nq, nk: dict(window=(nk // 3, 2), softcap=1.5),
    "causal_window": lambda nq, nk: dict(causal=True, window=(nk // 4, None)),
    "scale": lambda nq, nk: dict(scale=0.3, causal=True, q_offset=nk // 2),
}
RELEVANCES = ("attention", "gradient_x_attention", "relu_gradient_x_attention")
FUSIONS = ("mean", "sum", "weighted", "max", "min")


def close(got, want, tolerance=3e-6):
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()


def options_of(x, relevance, fusion, heads, batch):
    options: Any = dict(relevance=relevance, head_fusion=fusion)
    if relevance != "attention":
        options |= dict(v=x.v, dout=x.dout)
    if fusion == "weighted":
        rng = np.random.default_rng(1)
        options["head_weights"] = rng.normal(size=(*batch, heads)).astype(np.float32)
    return options


# Every other shape and mask; relevances and fusions are dealt out over them.
CASES = [
    (shape, mask, RELEVANCES[(n + m) % 3], FUSIONS[(2 * n + m) % 5])
    for n, shape in enumerate(SHAPES)
    for m, mask in enumerate(MASKS)
    if (n + m) % 2 == 0
]


@pytest.mark.parametrize(
    "implementation,shape,mask,relevance,fusion",
    [("xla", *case) for case in CASES] + [("reference", *case) for case in CASES[1::4]],
)
def test_row_product(oracle, implementation, shape, mask, relevance, fusion):
    x = oracle.make(**SHAPES[shape])
    batch, (nq, heads, _), nk = x.q.shape[:-3], x.q.shape[-3:], x.k.shape[-3]
    options: Any = MASKS[mask](nq, nk) | options_of(x, relevance, fusion, heads, batch)
    want = x.r.astype(np.float64) @ oracle.fused(x.q, x.k, **options)
    static = {
        name: options.pop(name)
        for name in list(options)
        if not isinstance(options[name], np.ndarray)
    }
    config = CONFIGS[shape] if implementation == "xla" else None
    product = functools.partial(
        attention_row_product, implementation=implementation, config=config, **static
    )
    close(jax.jit(product)(x.r, x.q, x.k, **options), want)


LSE_CASES = list(zip(SHAPES, ["full", "window", "scale"] * 2, strict=True))


@pytest.mark.parametrize(
    "implementation,shape,mask",
    [("xla", *case) for case in LSE_CASES]
    + [("reference", *case) for case in LSE_CASES[:3]],
)
def test_lse(oracle, implementation, shape, mask):
    x = oracle.make(**SHAPES[shape])
    options: Any = MASKS[mask](x.q.shape[-3], x.k.shape[-3])
    config = CONFIGS[shape] if implementation == "xla" else None
    got = jax.jit(
        functools.partial(
            attention_lse, implementation=implementation, config=config, **options
        )
    )(x.q, x.k)
    close(got, oracle.lse(x.q, x.k, **options))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("mask_shape", [(33, 33), (4, 1, 33), (2, 1, 33, 33)])
def test_mask_bias_and_key_mask(oracle, implementation, mask_shape):
    x = oracle.make(batch=(2,), nq=33, heads=4, kv_heads=2, m=2)
    rng = np.random.default_rng(3)
    options: Any = dict(
        mask=rng.random(mask_shape) < 0.8,
        bias=rng.normal(size=mask_shape[-2:]).astype(np.float32),
        key_mask=rng.random((2, 33)) < 0.7,
        threshold=np.asarray([0.01, 0.03], np.float32),
    )
    config = dict(block_b=1, block_h=1, block_q=8) if implementation == "xla" else None
    product = functools.partial(
        attention_row_product, implementation=implementation, config=config
    )
    got = jax.jit(product)(x.r, x.q, x.k, **options)
    close(got, x.r.astype(np.float64) @ oracle.fused(x.q, x.k, **options))


def test_lse_given_equals_lse_computed(oracle):
    x = oracle.make(batch=(2,), nq=50, heads=4, kv_heads=2)
    lse = jax.jit(functools.partial(attention_lse, causal=True))(x.q, x.k)
    product = jax.jit(functools.partial(attention_row_product, causal=True))
    close(product(x.r, x.q, x.k, lse=lse), product(x.r, x.q, x.k))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inputs_are_summed_in_float32(oracle, dtype):
    x = oracle.make(nq=64, heads=2, dim=64)
    q, k = jnp.asarray(x.q, dtype), jnp.asarray(x.k, dtype)
    got = attention_row_product(x.r, q, k, implementation="xla")
    assert got.dtype == jnp.float32
    want = x.r @ oracle.fused(np.asarray(q, np.float64), np.asarray(k, np.float64))
    close(got, want)
    assert attention_lse(q, k).dtype == jnp.float32


def test_double_precision_stays_double(oracle):
    x = oracle.make(nq=40, heads=2, m=2)
    with jax.enable_x64(True):
        q, k = x.q.astype(np.float64), x.k.astype(np.float64)
        product = functools.partial(
            attention_row_product, causal=True, config=dict(block_h=1, block_q=16)
        )
        got = np.asarray(jax.jit(product)(x.r, q, k))
        lse = attention_lse(q, k)
        with pytest.raises(NotImplementedError, match="float64"):
            attention_row_product(x.r, q, k, implementation="mosaic_tpu")
    assert got.dtype == lse.dtype == np.float64
    close(got, x.r @ oracle.fused(q, k, causal=True), 1e-14)


def test_is_the_cotangent_of_values_in_attention(oracle):
    x = oracle.make(batch=(2,), nq=40, heads=4, kv_heads=2, m=3)
    values = jnp.zeros((2, 40, 2, 16))
    cotangent = jnp.zeros((2, 40, 4, 16))
    cotangent = cotangent.at[..., :3].set(jnp.moveaxis(x.r, 1, 2)[:, :, None])
    attend = lambda v: jax.nn.dot_product_attention(x.q, x.k, v, is_causal=True)
    dv = jax.vjp(attend, values)[1](cotangent)[0].sum(2)
    product = functools.partial(attention_row_product, causal=True, head_fusion="sum")
    got = jax.jit(product)(x.r, x.q, x.k)
    close(jnp.moveaxis(got, 1, 2), dv[..., :3], 1e-5)


def test_gradient_relevance_is_the_gradient_of_the_attention(oracle):
    x = oracle.make(nq=20, heads=2, dim=8, m=20)
    p = jnp.asarray(oracle.probabilities(x.q, x.k), jnp.float32)
    loss = lambda p: (jnp.einsum("hij,jhd->ihd", p, x.v) * x.dout).sum()
    want = (p * jax.grad(loss)(p)).mean(0)
    got = attention_row_product(
        jnp.eye(20), x.q, x.k, v=x.v, dout=x.dout, relevance="gradient_x_attention"
    )
    close(got, want, 1e-5)


def _strips(**options):
    return functools.partial(
        attention_row_product,
        causal=True,
        implementation="xla",
        config=dict(block_b=1, block_h=1, block_q=16),
        **options,
    )


@pytest.mark.parametrize("fusion", ["mean", "max"])
def test_gradient_equals_that_of_the_definition(oracle, fusion):
    x = oracle.make(batch=(2,), nq=70, heads=4, kv_heads=2, m=2)

    def loss(implementation, config, r, q, k, v, dout):
        out = attention_row_product(
            r,
            q,
            k,
            v=v,
            dout=dout,
            relevance="relu_gradient_x_attention",
            head_fusion=fusion,
            causal=True,
            implementation=implementation,
            config=config,
        )
        return (out**2).sum()

    arguments = (x.r, x.q, x.k, x.v, x.dout)
    grad = lambda *a: jax.grad(functools.partial(loss, *a), argnums=tuple(range(5)))
    config = dict(block_b=1, block_h=1, block_q=16)
    got = jax.jit(grad("xla", config))(*arguments)
    for g, w in zip(got, jax.jit(grad("reference", None))(*arguments), strict=True):
        close(g, w, 1e-5)


def test_vmap_equals_loop_equals_batch(oracle):
    x = oracle.make(batch=(3,), nq=40, heads=4, kv_heads=2)
    product = jax.jit(_strips())
    batched = product(x.r, x.q, x.k)
    close(jax.jit(jax.vmap(_strips()))(x.r, x.q, x.k), batched)
    looped = [product(*a) for a in zip(x.r, x.q, x.k, strict=True)]
    close(jnp.stack(looped), batched)


@pytest.mark.parametrize("fusion", ["mean", "max"])
def test_sharded_equals_single_device(oracle, fusion):
    x = oracle.make(batch=(4,), nq=40, heads=4)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    product = _strips(head_fusion=fusion)
    sharded = jax.shard_map(product, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    got = jax.jit(sharded)(x.r, x.q, x.k)
    close(got, jax.jit(product)(x.r, x.q, x.k))


@pytest.mark.parametrize(
    "mask",
    [
        dict(causal=True),
        dict(causal=True, window=(11, None)),
        dict(window=(5, 9), causal=True, q_offset=40),
        dict(window=(None, 3)),
        dict(window=(2, 0), q_offset=150),
    ],
    ids=str,
)
def test_bands_leave_out_only_what_is_masked(oracle, mask):
    x = oracle.make(nq=100, nk=120, heads=2, m=2)
    how: Any = dict(config=dict(block_q=10), implementation="xla", **mask)
    columns = np.random.default_rng(0).normal(size=(1, 120)).astype(np.float32)

    @jax.jit
    def all_three(r, q, k):
        return (
            attention_row_product(r, q, k, **how),
            attention_lse(q, k, **how),
            attention_col_product(columns, q, k, **how),
        )

    row, lse, col = all_three(x.r, x.q, x.k)
    fused = oracle.fused(x.q, x.k, **mask)
    close(row, x.r @ fused)
    close(col, columns @ fused.T)
    wanted = oracle.lse(x.q, x.k, **mask)
    np.testing.assert_array_equal(np.isfinite(lse), np.isfinite(wanted))
    seen = np.isfinite(wanted)
    np.testing.assert_allclose(np.asarray(lse)[seen], wanted[seen], atol=1e-5)


def test_one_trace_per_shape(oracle):
    x = oracle.make(nq=40)
    traces = []

    @jax.jit
    def product(r, q, k):
        traces.append(None)
        return attention_row_product(r, q, k)

    product(x.r, x.q, x.k)
    product(2 * x.r, x.k, x.q)
    assert len(traces) == 1


def test_memory_is_linear_in_length():
    def temporary(n):
        qk = jax.ShapeDtypeStruct((n, 4, 16), jnp.float32)
        r = jax.ShapeDtypeStruct((1, n), jnp.float32)
        loss = lambda r, q, k: attention_row_product(r, q, k, causal=True).sum()
        both = lambda r, q, k: (loss(r, q, k), jax.grad(loss, 1)(r, q, k))
        sizes: Any = jax.jit(both).lower(r, qk, qk).compile().memory_analysis()
        return sizes.temp_size_in_bytes

    short, long = temporary(4096), temporary(8192)
    assert long < 2.2 * short
    assert long < 8192 * 8192 * 4 / 4  # a quarter of one head's map alone


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_query_without_weight_is_silent(oracle, implementation):
    x = oracle.make(nq=12, heads=2)
    product = jax.jit(
        functools.partial(
            attention_row_product, causal=True, implementation=implementation
        )
    )
    x.q[8] = np.nan
    assert np.isnan(product(x.r, x.q, x.k)).any()
    x.r[:, 8] = 0.0
    assert np.isfinite(product(x.r, x.q, x.k)).all()


def test_mass_is_kept_under_every_mask_that_leaves_a_key(oracle):
    x = oracle.make(batch=(2,), nq=50, heads=4, kv_heads=2, m=3)
    for mask in MASKS.values():
        product = functools.partial(attention_row_product, **mask(50, 50))
        got = jax.jit(product)(x.r, x.q, x.k)
        np.testing.assert_allclose(np.asarray(got.sum(-1)), 1, rtol=1e-5)


BAD: dict[str, Any] = {
    "integer q": (TypeError, "q wants a floating", dict(q=np.ones((7, 2, 16), int))),
    "q rank": (ValueError, "q wants shape", dict(q=np.ones((7, 16), np.float32))),
    "empty": (ValueError, "k is empty", dict(k=np.ones((0, 2, 16), np.float32))),
    "head_dim": (ValueError, "head_dim", dict(k=np.ones((7, 2, 8), np.float32))),
    "batch": (ValueError, "batch", dict(k=np.ones((1, 7, 2, 16), np.float32))),
    "GQA": (ValueError, "multiple", dict(k=np.ones((7, 3, 16), np.float32))),
    "dtypes": (ValueError, "one dtype", dict(k=np.ones((7, 2, 16), np.float16))),
    "r shape": (ValueError, "r wants shape", dict(r=np.ones((1, 8), np.float32))),
    "r dtype": (TypeError, "r wants a floating", dict(r=np.ones((1, 7), int))),
    "no rows": (ValueError, "r is empty", dict(r=np.ones((0, 7), np.float32))),
    "more queries than keys": (
        ValueError,
        "7 queries and 5 keys",
        dict(k=np.ones((5, 2, 16), np.float32), causal=True),
    ),
    "window": (ValueError, "window wants integers", dict(window=(-1, None))),
    "window pair": (ValueError, "a pair", dict(window=3)),
    "q_offset": (ValueError, "q_offset", dict(q_offset=-1)),
    "softcap": (ValueError, "softcap", dict(softcap=0.0)),
    "traced scale": (TypeError, "scale", dict(scale=np.ones(2))),
    "no v": (
        ValueError,
        "v is missing",
        dict(relevance="gradient_x_attention", dout=np.ones((7, 2, 16), np.float32)),
    ),
    "unused v": (ValueError, "takes no v", dict(v=np.ones((7, 2, 16), np.float32))),
    "relevance": (ValueError, "relevance wants one of", dict(relevance="attn")),
    "fusion": (ValueError, "head_fusion wants one of", dict(head_fusion="median")),
    "weights": (
        ValueError,
        "head_weights go with",
        dict(head_fusion="max", head_weights=np.ones(2, np.float32)),
    ),
    "no weights": (ValueError, "head_weights go", dict(head_fusion="weighted")),
    "lse dtype": (
        ValueError,
        "lse wants dtype float32, got bfloat16",
        dict(lse=np.ones((2, 7), jnp.bfloat16)),
    ),
    "lse shape": (ValueError, "lse wants", dict(lse=np.ones((7, 2), np.float32))),
    "key_mask dtype": (TypeError, "key_mask", dict(key_mask=np.ones(7, np.float32))),
    "key_mask shape": (ValueError, "key_mask", dict(key_mask=np.ones(8, bool))),
    "mask shape": (ValueError, "mask wants", dict(mask=np.ones((3, 7, 7), bool))),
    "bias dtype": (TypeError, "bias wants", dict(bias=np.ones((7, 7), int))),
    "implementation": (ValueError, "'triton'", dict(implementation="triton")),
    "config": (ValueError, "block_z", dict(config=dict(block_z=1))),
    "block size": (ValueError, ">= 1", dict(config=dict(block_q=0))),
    "heads": (
        ValueError,
        "divides 3 key heads, got 2",
        dict(
            q=np.ones((7, 3, 16), np.float32),
            k=np.ones((7, 3, 16), np.float32),
            config=dict(block_h=2),
        ),
    ),
    "precision": (ValueError, "precision wants", dict(precision="high")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_was_got_and_wanted(oracle, name):
    error, text, change = BAD[name]
    x = oracle.make()
    with pytest.raises(error, match=text):
        attention_row_product(**({"r": x.r, "q": x.q, "k": x.k} | change))


def test_no_mosaic_fallback_is_silent_when_named(oracle):
    x = oracle.make()
    with pytest.raises(NotImplementedError, match="implementation='mosaic_gpu'"):
        attention_lse(x.q, x.k, implementation="mosaic_gpu")
