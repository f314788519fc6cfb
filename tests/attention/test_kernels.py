"""Methods of models whose attention is one kernel, against attention written out.

The Pallas kernel runs interpreted, with a backward kernel of its own. That of cuDNN
needs a GPU: its program is traced, and each of its two primitives then given a plain
implementation, which tests what is edited and not cuDNN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from tests.tracing.cases import loose, normal
from tests.tracing.test_fused import cudnn as cudnn
from tests.tracing.test_fused import module

LENGTH, HEADS, DIM, DEPTH = 16, 2, 8, 2
WIDTH = HEADS * DIM


@pytest.fixture(autouse=True)
def relaxed():
    """Kernels rely on the standard promotion rules."""
    with loose():
        yield


def written_out(q, k, v):
    """Causal attention, scores halved, of [batch, length, head, dim]."""
    k, v = (jnp.repeat(each, q.shape[2] // k.shape[2], axis=2) for each in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
    seen = jnp.tril(jnp.ones(scores.shape[2:], bool))
    maps = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", maps, v)


def model(attention):
    """Layers in a loop, with a nonlinear function right after the kernel."""
    weights = normal(1, DEPTH, 3, WIDTH, WIDTH) / WIDTH**0.5
    head = normal(2, WIDTH, 3)

    def layer(x, w):
        q, k, v = (jnp.dot(x, u).reshape(1, LENGTH, HEADS, DIM) for u in w)
        return x + jnp.tanh(attention(q, k, v)).reshape(x.shape), None

    return lambda x: jax.lax.scan(layer, x, weights)[0][-1] @ head


def explained(function, x):
    """Scores by method, of two inputs at once."""

    def one(x):
        return {
            "attn_lrp": xv.attn_lrp(function)(x, target=1).scores,
            "cp_lrp": xv.cp_lrp(function)(x, target=1).scores,
            "relevance": xv.attention_relevance(function, query=-1)(x, target=1).scores,
            "rollout": xv.attention_rollout(function, query=-1)(x).scores,
        }

    return jax.jit(jax.vmap(one))(x)


def test_pallas_kernel_in_a_loop_over_layers():
    gpu = module("jax.experimental.pallas.ops.gpu.attention")

    def kernel(q, k, v):
        options = dict(sm_scale=0.5, causal=True, interpret=True)
        return gpu.mha(q, k, v, segment_ids=None, **options)

    x = normal(3, 2, LENGTH, WIDTH)
    found, expected = explained(model(kernel), x), explained(model(written_out), x)
    for name, scores in expected.items():
        scale = float(jnp.abs(scores).max())
        assert scale > 0.1
        np.testing.assert_allclose(found[name], scores, atol=2e-5 * scale, err_msg=name)
    for one, other in (("attn_lrp", "cp_lrp"), ("relevance", "rollout")):
        assert jnp.abs(expected[one] - expected[other]).max() > 0.01


@pytest.mark.parametrize("method", [xv.attn_lrp, xv.cp_lrp])
def test_a_kernels_bias_that_depends_on_the_input(method):
    """It is part of the map, which only conservatively is a constant."""
    flash = module("jax.experimental.pallas.ops.tpu.flash_attention")

    def biased(x):
        q = x.reshape(1, 1, 128, 8)
        bias = jnp.broadcast_to(jnp.sum(x, axis=1), (1, 1, 128, 128))
        return flash.flash_attention(q, q, q, bias)[0, 0, 0]

    x = jax.ShapeDtypeStruct((128, 8), jnp.float32)
    explain = functools.partial(method(biased), target=0)
    if method is xv.attn_lrp:
        with pytest.raises(ValueError, match=r"a kernel of attention .* a bias may"):
            jax.eval_shape(explain, x)
    else:
        assert jax.eval_shape(explain, x).scores.shape == x.shape


@pytest.mark.parametrize("method", [xv.attn_lrp, xv.cp_lrp])
def test_a_kernel_whose_mask_is_not_known(method):
    """Its derivative knows; traced only."""
    name = "jax.experimental.pallas.ops.tpu.splash_attention"
    kernels = module(f"{name}.splash_attention_kernel")
    masks = module(f"{name}.splash_attention_mask")
    mask = masks.MultiHeadMask([masks.CausalMask((128, 128))] * HEADS)
    kernel = kernels.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1)
    x = jax.ShapeDtypeStruct((HEADS, 128, 128), jnp.float32)
    explain = functools.partial(method(lambda x: kernel(x, 2 * x, x)[0, 0]), target=0)
    assert jax.eval_shape(explain, x).scores.shape == x.shape


def test_a_kernel_that_is_not_known_is_named():
    pl = module("jax.experimental.pallas")

    def kernel(x_ref, o_ref):
        o_ref[...] = jax.nn.softmax(x_ref[...] @ x_ref[...].T) @ x_ref[...]

    def unknown(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x)[0]

    with pytest.raises(ValueError, match="no rule for 'pallas_call'"):
        xv.attn_lrp(unknown)(normal(1, LENGTH, DIM), target=0)


def test_cudnn(cudnn):
    fused = module("jax._src.cudnn.fused_attention_stablehlo")
    wide = lambda arrays: tuple(each.astype(jnp.float32) for each in arrays)

    def forward(q, k, v, *rest, scale, is_training, **options):
        assert scale == 0.5
        out = written_out(*wide((q, k, v))).astype(q.dtype)
        return [out, jnp.zeros((len(q), HEADS, LENGTH))][: 1 + is_training]

    def backward(q, k, v, *rest, **options):
        slopes = jax.vjp(written_out, *wide((q, k, v)))[1](*wide(rest[-1:]))
        return [each.astype(q.dtype) for each in slopes]

    for name, function in (("fwd", forward), ("bwd", backward)):
        primitive = getattr(fused, f"_dot_product_attention_{name}_p_wrapper")
        lowering = mlir.lower_fun(function, multiple_results=True)
        mlir.register_lowering(primitive, lowering, platform="cpu")

    def kernel(*operands):
        operands = (each.astype(jnp.bfloat16) for each in operands)
        options = dict(scale=0.5, is_causal=True, implementation="cudnn")
        return jax.nn.dot_product_attention(*operands, **options).astype(jnp.float32)

    x = normal(3, LENGTH, WIDTH)
    for method in (xv.attn_lrp, xv.cp_lrp):
        found, expected = (
            jax.jit(method(model(attention)))(x, target=1).scores
            for attention in (kernel, written_out)
        )
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, atol=0.02 * scale)
