"""Fused attention kernels: read at their operands, run only where interpreted.

Queries, keys and values must come out in the layout of `jax.nn`, whatever the layout
of the kernel; probabilities are recomputed from them. A kernel that is not known is an
`unknown` site with a reason.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tracing.cases import attend, causal, loose, normal
from xviz_jax import tracing

BATCH, HEADS, LENGTH, DIM = 2, 2, 16, 8


@pytest.fixture(autouse=True)
def relaxed():
    """Kernels rely on the standard promotion rules."""
    with loose():
        yield


def module(name):
    """A module of JAX that some versions or machines lack."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))


def drawn(*shape, dtype=jnp.float32):
    return tuple(normal(i, *shape, dtype=dtype) for i in range(3))


def only_site(model, *args):
    likely = [
        site
        for site in tracing.sites(model, *args)
        if site.kind not in ("block", "convolution", "embedding", "named")
    ]
    assert len(likely) == 1, likely
    assert likely[0].kind == "attention", likely[0].why
    return likely[0]


def check_shapes(model, args, heads=HEADS, kv_heads=HEADS, dtype=jnp.float32):
    """What can be read without running anything."""
    site = only_site(model, *args)
    assert site.shape == (BATCH, heads, LENGTH, LENGTH)
    values = ("query", "key", "value", "probabilities", "logsumexp", "output")
    capture = tracing.capture(model, values=values)
    output, captured = jax.eval_shape(capture, *args)
    assert output == jax.eval_shape(model, *args)
    (captured,) = captured.values()
    query, key = ((BATCH, LENGTH, n, DIM) for n in (heads, kv_heads))
    want = dict(query=query, key=key, value=key, output=query)
    want |= dict(probabilities=site.shape, logsumexp=site.shape[:-1])
    assert {name: captured[name].shape for name in values} == want
    assert captured["query"].dtype == dtype
    return site


def check_values(model, args, explicit, tolerance=2e-5):
    """What can be compared where the kernel runs interpreted."""
    site = only_site(model, *args)
    values = ("query", "key", "value", "probabilities", "output")
    output, captured = jax.jit(tracing.capture(model, values=values))(*args)
    np.testing.assert_array_equal(output, jax.jit(model)(*args))
    seen = []
    record = lambda a, **place: seen.append(a) or a
    q, k, v, out = explicit(record, *args)
    for name, want in zip(values, (q, k, v, seen[0], out), strict=True):
        got = captured[site.name][name]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=tolerance, err_msg=name)


def check_cotangents(model, args, explicit, tolerance=1e-4):
    """The gradient with respect to the probabilities, from the output's alone."""
    site = only_site(model, *args)
    scalar = lambda y: jnp.sum(jnp.sin(y))
    transform = tracing.attention_cotangents(model, scalar)
    output, values = jax.jit(transform)(*args)
    np.testing.assert_allclose(output, model(*args), atol=1e-6)
    values = values[site.name]
    got = jnp.einsum("bqhd,bkhd->bhqk", values["output_cotangent"], values["value"])

    def loss(epsilon):
        return scalar(explicit(lambda a, **place: a + epsilon, *args)[-1])

    want = jax.grad(loss)(jnp.zeros(site.shape))
    np.testing.assert_allclose(got, want, atol=tolerance)


# The GPU kernel of Pallas.


@pytest.mark.parametrize("is_causal", [False, True])
def test_pallas_gpu_attention(is_causal):
    attention = module("jax.experimental.pallas.ops.gpu.attention")

    def model(q, k, v):
        options = dict(sm_scale=0.5, causal=is_causal, interpret=True)
        return attention.mha(q, k, v, segment_ids=None, **options)

    def explicit(tap, q, k, v):
        mask = causal(LENGTH) if is_causal else None
        out = attend(tap, q, k, v, scale=0.5, mask=mask)
        return q, k, v, out

    args = drawn(BATCH, LENGTH, HEADS, DIM)
    check_shapes(model, args)
    check_values(model, args, explicit)
    check_cotangents(model, args, explicit)


def test_pallas_gpu_attention_with_segments():
    attention = module("jax.experimental.pallas.ops.gpu.attention")

    def model(q, k, v, segments):
        return attention.mha(q, k, v, segments, sm_scale=0.5, interpret=True)

    def explicit(tap, q, k, v, segments):
        mask = segments[:, None, :, None] == segments[:, None, None]
        return q, k, v, attend(tap, q, k, v, scale=0.5, mask=mask)

    segments = jnp.arange(LENGTH) // jnp.array([[5], [9]])
    args = (*drawn(BATCH, LENGTH, HEADS, DIM), segments)
    check_shapes(model, args)
    check_values(model, args, explicit)


def test_pallas_gpu_attention_in_scan():
    """Three layers in a loop: the site has a loop axis."""
    attention = module("jax.experimental.pallas.ops.gpu.attention")

    def step(x, w):
        q, k, v = (jnp.einsum("bthd,de->bthe", x, u) for u in w)
        return x + attention.mha(q, k, v, None, interpret=True), None

    def model(x, w):
        return jax.lax.scan(step, x, w)[0]

    x, w = normal(1, BATCH, LENGTH, HEADS, DIM), normal(2, 3, 3, DIM, DIM)
    site = only_site(model, x, w)
    assert site.shape == (3, BATCH, HEADS, LENGTH, LENGTH)
    assert site.loops == (3,)


# The TPU kernels of Pallas: traced only.


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_pallas_tpu_flash_attention(is_causal, biased):
    flash = module("jax.experimental.pallas.ops.tpu.flash_attention")
    length = 128

    def model(q, k, v, *bias):
        return flash.flash_attention(q, k, v, *bias, causal=is_causal, sm_scale=0.5)

    args = [jax.ShapeDtypeStruct((BATCH, HEADS, length, DIM), jnp.float32)] * 3
    if biased:
        args.append(jax.ShapeDtypeStruct((BATCH, HEADS, length, length), jnp.float32))
    site = only_site(model, *args)
    assert site.shape == (BATCH, HEADS, length, length)
    values = ("query", "key", "value", "probabilities", "output")
    _, captured = jax.eval_shape(tracing.capture(model, values=values), *args)
    captured = captured[site.name]
    for name in ("query", "key", "value", "output"):
        assert captured[name].shape == (BATCH, length, HEADS, DIM)
    assert captured["probabilities"].shape == site.shape


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_pallas_tpu_splash_attention(batched, kv_heads):
    name = "jax.experimental.pallas.ops.tpu.splash_attention"
    kernels = module(f"{name}.splash_attention_kernel")
    masks = module(f"{name}.splash_attention_mask")
    length, dim = 128, 128
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * HEADS)
    make = kernels.make_splash_mha if kv_heads == 2 else kernels.make_splash_mqa
    kernel = make(mask=mask, head_shards=1, q_seq_shards=1)

    def model(q, k, v):
        return jax.vmap(kernel)(q, k, v) if batched else kernel(q, k, v)

    batch = (BATCH,) if batched else ()
    kv = (kv_heads,) if kv_heads > 1 else ()
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    args = [
        shape((*batch, HEADS, length, dim)),
        shape((*batch, *kv, length, dim)),
        shape((*batch, *kv, length, dim)),
    ]
    site = only_site(model, *args)
    size = BATCH if batched else 1
    assert site.shape == (size, HEADS, length, length)
    values = ("query", "key", "value", "output")
    _, captured = jax.eval_shape(tracing.capture(model, values=values), *args)
    captured = captured[site.name]
    assert captured["query"].shape == (size, length, HEADS, dim)
    assert captured["key"].shape == (size, length, kv_heads, dim)
    assert captured["value"].shape == (size, length, kv_heads, dim)
    assert captured["output"].shape == (size, length, HEADS, dim)


# The kernel of cuDNN: traced only, on a machine made to look as if it had it.


@pytest.fixture
def cudnn(monkeypatch):
    fused = module("jax._src.cudnn.fused_attention_stablehlo")
    names = {
        "check_cudnn_version": 91200,
        "check_compute_capability": True,
        "is_cuda_compute_capability_equal": False,
    }
    for name, answer in names.items():
        if not hasattr(fused, name):
            pytest.skip(f"this JAX has no {name}")
        monkeypatch.setattr(fused, name, lambda *_, answer=answer: answer)


def cudnn_model(**options):
    return functools.partial(
        jax.nn.dot_product_attention, implementation="cudnn", **options
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"is_causal": True, "local_window_size": (4, 0)}],
    ids=["plain", "causal", "window"],
)
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_cudnn(cudnn, options, kv_heads):
    q, _, _ = drawn(BATCH, LENGTH, HEADS, DIM, dtype=jnp.bfloat16)
    k, v, _ = drawn(BATCH, LENGTH, kv_heads, DIM, dtype=jnp.bfloat16)
    site = check_shapes(
        cudnn_model(**options), (q, k, v), kv_heads=kv_heads, dtype=jnp.bfloat16
    )
    if "is_causal" in options:
        assert site.causal is True


def test_cudnn_bias_and_mask(cudnn):
    q, k, v = drawn(BATCH, LENGTH, HEADS, DIM, dtype=jnp.bfloat16)
    bias = jnp.zeros((1, HEADS, LENGTH, LENGTH), jnp.bfloat16)
    model = lambda q, k, v, bias, mask: cudnn_model()(q, k, v, bias, mask)
    args = (q, k, v, bias, causal(LENGTH))
    check_shapes(model, args, dtype=jnp.bfloat16)
    _, values = jax.eval_shape(tracing.capture(model, values=("bias",)), *args)
    (values,) = values.values()
    assert len(values["bias"].shape) == 4


def test_cudnn_in_a_scan_over_layers(cudnn):
    def step(x, w):
        q, k, v = (jnp.einsum("bthd,de->bthe", x, u) for u in w)
        return x + cudnn_model(is_causal=True)(q, k, v), None

    x = normal(1, BATCH, LENGTH, HEADS, DIM, dtype=jnp.bfloat16)
    w = normal(2, 3, 3, DIM, DIM, dtype=jnp.bfloat16)
    site = only_site(lambda x, w: jax.lax.scan(step, x, w)[0], x, w)
    assert site.shape == (3, BATCH, HEADS, LENGTH, LENGTH)


# Kernels that nobody knows.


def test_an_unknown_kernel_is_reported():
    """Attention in a kernel of one's own cannot be read; it must be said, and why."""
    pl = module("jax.experimental.pallas")

    def kernel(q_ref, k_ref, v_ref, o_ref):
        a = jax.nn.softmax(q_ref[...] @ k_ref[...].T)
        o_ref[...] = a @ v_ref[...]

    def model(q, k, v):
        shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(q, k, v)

    args = drawn(LENGTH, DIM)
    unknown = [s for s in tracing.sites(model, *args) if s.kind == "unknown"]
    assert len(unknown) == 1
    assert unknown[0].why
    assert not [s for s in tracing.sites(model, *args) if s.kind == "attention"]


def test_a_kernel_without_attention_is_no_attention():
    pl = module("jax.experimental.pallas")

    def kernel(x_ref, o_ref):
        o_ref[...] = jnp.exp(x_ref[...]) + 1.0

    def model(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x)

    kinds = {site.kind for site in tracing.sites(model, normal(1, LENGTH, DIM))}
    assert not kinds & {"attention", "inverted", "pooling"}
