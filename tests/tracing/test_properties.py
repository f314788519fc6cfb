"""Attention written in random ways is found and read like attention in any other."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from tests.tracing.cases import ATTENTION_LIKE, compiled, normal, normalise
from xviz_jax import tracing

WIDTH = 5
quick = settings(deadline=None, derandomize=True, max_examples=20)


def order(axes):
    return st.permutations(axes).map("".join)


MASKS = {
    "none": lambda s, mask: s,
    "additive": lambda s, mask: s + jnp.where(mask, 0.0, -1e30),
    "negated": lambda s, mask: s - 1e30 * (~mask).astype(s.dtype),
    "select": lambda s, mask: jnp.where(mask, s, -1e30),
    "infinite": lambda s, mask: jnp.where(mask, s, -jnp.inf),
}


def _shifted(s, axis):
    return jnp.exp(s - lax.stop_gradient(jnp.max(s, axis=axis, keepdims=True)))


SOFTMAXES = {
    "library": jax.nn.softmax,
    "quotient": lambda s, axis: (
        (e := _shifted(s, axis)) / jnp.sum(e, axis=axis, keepdims=True)
    ),
    "reciprocal": lambda s, axis: (
        (e := _shifted(s, axis)) * (1 / jnp.sum(e, axis=axis, keepdims=True))
    ),
    "logarithm": lambda s, axis: jnp.exp(jax.nn.log_softmax(s, axis=axis)),
    "logsumexp": lambda s, axis: jnp.exp(
        s - jax.nn.logsumexp(s, axis=axis, keepdims=True)
    ),
}


@st.composite
def programs(draw):
    """Sizes, axis orders, the mask's form and shape, the softmax, the scaling."""
    sizes = {axis: draw(st.integers(1, 3)) for axis in "bhd"}
    sizes |= {"q": draw(st.integers(1, 4)), "k": draw(st.integers(2, 4))}
    return dict(
        sizes=sizes,
        query=draw(order("bqhd")),
        key=draw(order("bkhd")),
        value=draw(order("bkhd")),
        logits=draw(order("bhqk")),
        mixed=draw(order("bqhd")),
        swapped=draw(st.booleans()),
        mask=draw(st.sampled_from(sorted(MASKS))),
        broadcast=draw(st.tuples(*[st.booleans()] * 3)),
        softmax=draw(st.sampled_from(sorted(SOFTMAXES))),
        deferred=draw(st.booleans()),
        scale=draw(st.sampled_from(["query", "logits", "divide", "none"])),
    )


def arguments(program):
    size = program["sizes"]
    x = normal(1, size["b"], size["q"], WIDTH)
    source = normal(2, size["b"], size["k"], WIDTH)
    w = [normal(i, WIDTH, size["h"], size["d"]) for i in (3, 4, 5)]
    full = [
        1 if b else size[a] for a, b in zip("bhq", program["broadcast"], strict=True)
    ]
    mask = np.random.default_rng(6).random((*full, size["k"])) < 0.6
    mask[..., 0] = True
    return x, source, *w, jnp.asarray(mask)


def build(program):
    """The model of a program, as a person could have written it."""
    query, key, value = (program[name] for name in ("query", "key", "value"))
    logits, mixed = program["logits"], program["mixed"]
    scale = program["sizes"]["d"] ** -0.5
    axis = logits.index("k")

    def model(x, source, wq, wk, wv, mask):
        q = jnp.einsum(f"bqe,ehd->{query}", x, wq)
        k = jnp.einsum(f"bke,ehd->{key}", source, wk)
        v = jnp.einsum(f"bke,ehd->{value}", source, wv)
        if program["scale"] == "query":
            q = q * scale
        if program["swapped"]:
            s = jnp.einsum(f"{key},{query}->{logits}", k, q)
        else:
            s = jnp.einsum(f"{query},{key}->{logits}", q, k)
        if program["scale"] == "logits":
            s = s * scale
        if program["scale"] == "divide":
            s = s / jnp.sqrt(jnp.float32(program["sizes"]["d"]))
        mask = jnp.einsum(f"bhqk->{logits}", mask) if logits != "bhqk" else mask
        s = MASKS[program["mask"]](s, jnp.broadcast_to(mask, s.shape))
        if program["deferred"]:
            e = _shifted(s, axis)
            out = jnp.einsum(f"{logits},{value}->{mixed}", e, v)
            total = jnp.sum(e, axis=axis, keepdims=False)
            rest = logits.replace("k", "")
            out = out / jnp.einsum(f"{rest}->{mixed.replace('d', '')}", total).reshape(
                [1 if a == "d" else program["sizes"][a] for a in mixed]
            )
        else:
            a = SOFTMAXES[program["softmax"]](s, axis=axis)
            out = jnp.einsum(f"{logits},{value}->{mixed}", a, v)
        return jnp.einsum(f"{mixed}->bqhd", jnp.tanh(out))

    return model


def explicit(program, epsilon, x, source, wq, wk, wv, mask):
    scale = 1.0 if program["scale"] == "none" else program["sizes"]["d"] ** -0.5
    q = jnp.einsum("bqe,ehd->bqhd", x, wq)
    k, v = (jnp.einsum("bke,ehd->bkhd", source, w) for w in (wk, wv))
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if program["mask"] != "none":
        s = jnp.where(jnp.broadcast_to(mask, s.shape), s, -1e30)
    a = normalise(s)
    return jnp.tanh(jnp.einsum("bhqk,bkhd->bqhd", a + epsilon, v)), a


def only_site(model, *args):
    likely = (*ATTENTION_LIKE, "router", "unknown")
    (site,) = (s for s in tracing.sites(model, *args) if s.kind in likely)
    assert site.kind == "attention", site
    return site


@quick
@given(programs())
def test_any_way_of_writing_attention(program):
    model, args = build(program), arguments(program)
    size = program["sizes"]
    site = only_site(model, *args)
    assert site.shape == tuple(size[axis] for axis in "bhqk")
    epsilon = normal(7, *site.shape, scale=0.1)

    def wanted(epsilon, *args):
        output, a = explicit(program, epsilon, *args)
        return jnp.sum(output**2), (output, a)

    def got(epsilon, *args):
        output = tracing.perturb(model)({site.name: epsilon}, *args)
        return jnp.sum(output**2), output

    want = compiled(jax.grad(wanted, has_aux=True))
    plain, (output, a) = want(jnp.zeros(site.shape), *args)
    moved, (moved_output, _) = want(epsilon, *args)

    np.testing.assert_allclose(compiled(model)(*args), output, atol=1e-5)
    names = ("probabilities", "query", "key", "value", "output")
    _, values = compiled(tracing.capture(model, values=names))(*args)
    values = values[site.name]
    np.testing.assert_allclose(values["probabilities"], a, atol=1e-5)
    for name, length in (("query", "q"), ("key", "k"), ("value", "k"), ("output", "q")):
        assert values[name].shape == tuple(size[x] for x in f"b{length}hd")
    np.testing.assert_allclose(jnp.tanh(values["output"]), output, atol=1e-5)

    gradient, result = compiled(jax.grad(got, has_aux=True))(epsilon, *args)
    np.testing.assert_allclose(result, moved_output, atol=2e-5)
    np.testing.assert_allclose(gradient, moved, atol=1e-4)

    transform = tracing.attention_cotangents(model, lambda y: jnp.sum(y**2))
    _, values = compiled(transform)(*args)
    values = values[site.name]
    dual = np.einsum("bqhd,bkhd->bhqk", values["output_cotangent"], values["value"])
    np.testing.assert_allclose(dual, plain, atol=1e-4)


# Random nests of calls and loops around one layer.


def _custom(f):
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(
        lambda *args: (f(*args), args), lambda args, g: jax.vjp(f, *args)[1](g)
    )
    return wrapped


def _in_scan(f):
    def call(x, w):
        return lax.scan(lambda x, _: (f(x, w), None), x, None, length=2)[0]

    return call


WRAPPERS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "saved": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
    ),
    "custom": _custom,
    "scope": lambda f: jax.named_scope("scope")(f),
    "cond": lambda f: lambda x, w: lax.cond(jnp.sum(x) < 1e9, f, lambda x, w: -x, x, w),
    "scan": _in_scan,
    "map": lambda f: lambda x, w: lax.map(lambda x: f(x, w), x[None])[0],
    "vmap": lambda f: lambda x, w: jax.vmap(f, in_axes=(0, None))(x[None], w)[0],
}


def _layer(x, w):
    q, k, v = (jnp.einsum("te,ehd->thd", x, w[:, i]) for i in range(3))
    a = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
    return x + jnp.tanh(jnp.einsum("hqk,khd->qhd", a, v)).reshape(x.shape)


def _explicit_layer(x, w, epsilon):
    q, k, v = (jnp.einsum("te,ehd->thd", x, w[:, i]) for i in range(3))
    a = normalise(jnp.einsum("qhd,khd->hqk", q, k))
    out = jnp.einsum("hqk,khd->qhd", a + epsilon, v)
    return x + jnp.tanh(out).reshape(x.shape), a


@quick
@given(st.lists(st.sampled_from(sorted(WRAPPERS)), min_size=1, max_size=4))
def test_any_nest_of_calls(nest):
    model = _layer
    for name in nest:
        model = WRAPPERS[name](model)
    x, w = normal(1, 3, 4), normal(2, 4, 3, 2, 2)
    loops = tuple({"scan": 2, "map": 1}[n] for n in nest[::-1] if n in ("scan", "map"))
    site = only_site(model, x, w)
    assert site.loops == loops
    assert site.shape == (*loops, 1, 2, 3, 3)
    steps = int(np.prod(loops))

    def wanted(epsilon):
        y, maps = x, []
        for i in range(steps):
            y, a = _explicit_layer(y, w, epsilon.reshape(steps, 2, 3, 3)[i])
            maps.append(a)
        return jnp.sum(y**2), jnp.stack(maps).reshape(site.shape)

    def got(epsilon):
        return jnp.sum(tracing.perturb(model)({site.name: epsilon}, x, w) ** 2)

    epsilon = normal(3, *site.shape, scale=0.1)
    want, _ = compiled(jax.grad(wanted, has_aux=True))(epsilon)
    _, maps = compiled(wanted)(jnp.zeros(site.shape))
    output, values = compiled(tracing.capture(model))(x, w)
    np.testing.assert_array_equal(output, compiled(model)(x, w))
    np.testing.assert_allclose(values[site.name]["probabilities"], maps, atol=1e-5)
    np.testing.assert_allclose(compiled(jax.grad(got))(epsilon), want, atol=1e-4)
