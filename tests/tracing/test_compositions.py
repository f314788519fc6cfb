"""Tracing composes: with jit, grad, vmap, shard_map and itself, in any order."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.tracing.cases import (
    ATTENTION_LIKE,
    BATCH,
    DIM,
    HEADS,
    LENGTH,
    WIDTH,
    attend,
    compiled,
    loose,
    merge,
    normal,
    project,
    tokens,
    weights,
)
from xviz_jax import tracing

SCALE = DIM**-0.5
LAYERS = 2


def attention(x, w):
    q, k, v = project(x, w)
    a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
    return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)


def model(w, x):
    """Two layers, [batch, length, width] to one logit per example."""
    for i, layer in enumerate(w):
        with jax.named_scope(f"layer_{i}"):
            x = x + attention(x, layer)
    return jnp.tanh(x).sum((1, 2))


def scanned(w, x):
    """The same in a loop."""
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *w)
    x, _ = lax.scan(lambda x, layer: (x + attention(x, layer), None), x, stack)
    return jnp.tanh(x).sum((1, 2))


def one(w, x):
    """For one example, [length, width]."""
    return model(w, x[None])[0]


def explicit(epsilons, w, x):
    """The output and both maps, with epsilons added."""
    maps = []

    def tap(a, *, i):
        maps.append(a)
        return a + epsilons[i]

    for i, layer in enumerate(w):
        out = attend(functools.partial(tap, i=i), *project(x, layer))
        x = x + merge(out, layer)
    return jnp.tanh(x).sum((1, 2)), maps


expected = compiled(explicit)
W = [weights(seed=10 * i) for i in range(LAYERS)]
X = tokens()
ZEROS = [jnp.zeros((BATCH, HEADS, LENGTH, LENGTH))] * LAYERS


def attention_sites(function, *args):
    sites = tracing.sites(function, *args)
    return [site for site in sites if site.kind in ATTENTION_LIKE]


def probabilities(values):
    return [v["probabilities"] for v in values.values()]


def close(a, b, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance),
        a,
        b,
    )


def same(a, b):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), a, b
    )


# Sites.


def test_sites_are_frozen_and_hashable():
    sites = tracing.sites(model, W, X)
    assert isinstance(sites, tuple)
    assert len({*sites, *tracing.sites(model, W, X)}) == len(sites)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sites[0].__setattr__("name", "other")


def test_sites_are_stable():
    """The same program gives the same sites, whatever else was traced in between."""
    first = tracing.sites(model, W, X)
    tracing.sites(scanned, W, X)
    again = tracing.sites(lambda w, x: model(w, x), W, 2 * X)
    assert first == again
    assert len(attention_sites(model, W, X)) == LAYERS


def test_names_follow_scopes_in_program_order():
    names = [site.name for site in attention_sites(model, W, X)]
    assert len(set(names)) == LAYERS
    for i, name in enumerate(names):
        assert f"layer_{i}" in name


def test_names_do_not_depend_on_the_batch():
    batched = [site.name for site in attention_sites(model, W, X)]
    assert [site.name for site in attention_sites(model, W, X[:1])] == batched


def test_names_of_one_scope_differ():
    def twice(w, x):
        return attention(attention(x, w[0]), w[1])

    names = [site.name for site in attention_sites(twice, W, X)]
    assert len(set(names)) == 2


def test_abstract_shapes_suffice():
    shapes = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype), (W, X))
    assert tracing.sites(model, *shapes) == tracing.sites(model, W, X)


def test_nothing_is_run():
    """A length whose maps no machine could hold."""
    length = 10**7
    x = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)
    sites = attention_sites(model, W, x)
    assert sites[0].shape == (1, HEADS, length, length)


def test_sites_inside_jit():
    def both(w, x):
        assert len(attention_sites(model, w, x)) == LAYERS
        return model(w, x)

    same(compiled(both)(W, X), compiled(model)(W, X))


def test_keyword_and_static_arguments():
    def options(w, x, *, scale=1.0, flip=False, activation=jnp.tanh):
        x = x[:, ::-1] if flip else x
        return activation(model(w, scale * x))

    keywords: dict[str, Any] = dict(scale=0.5, flip=True, activation=jnp.sin)
    found = attention_sites(functools.partial(options, **keywords), W, X)
    direct = tracing.sites(options, W, X, **keywords)
    assert [s.shape for s in direct if s.kind == "attention"] == [
        s.shape for s in found
    ]
    output, values = tracing.capture(options)(W, X, **keywords)
    close(output, options(W, X, **keywords))
    assert len(values) == LAYERS


def test_causal_is_said_only_where_it_is_proven():
    def attend_with(mask, **options):
        q, k, v = project(X, W[0])
        call = lambda q, k, v, m: jax.nn.dot_product_attention(
            q, k, v, mask=m, **options
        )
        (site,) = attention_sites(call, q, k, v, mask)
        return site.causal

    assert attend_with(None, is_causal=True) is True
    assert attend_with(None) is not True
    assert attend_with(jnp.tril(jnp.ones((1, 1, 5, 5), bool))) is not True
    assert attend_with(None, local_window_size=1) is not True


# Capture: which sites and which values.


def test_choice_of_sites():
    sites = attention_sites(model, W, X)
    last = sites[-1].name
    for choice in ([sites[-1]], [last], (last,), lambda site: site.name == last):
        output, values = tracing.capture(model, sites=choice)(W, X)
        assert set(values) == {last}
        close(output, model(W, X))
    assert tracing.capture(model, sites=[])(W, X)[1] == {}


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="nowhere"):
        tracing.capture(model, sites=["nowhere"])(W, X)
    with pytest.raises(ValueError, match="wieghts"):
        tracing.capture(model, values=("wieghts",))(W, X)
    with pytest.raises(ValueError, match="nowhere"):
        tracing.perturb(model)({"nowhere": ZEROS[0]}, W, X)


def test_wrong_shape_of_a_perturbation_raises():
    name = attention_sites(model, W, X)[0].name
    with pytest.raises(ValueError, match=str(LENGTH)):
        tracing.perturb(model)({name: jnp.zeros((LENGTH, LENGTH))}, W, X)


def test_values():
    """Everything a site can give, against the parts it is made of."""

    def biased(x, w, bias, mask):
        q, k, v = project(x, w)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE + bias
        s = jnp.where(jnp.broadcast_to(mask, s.shape), s, -1e30)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v)

    names = ("query", "key", "value", "bias", "mask", "logsumexp")
    names += ("probabilities", "output")
    bias = normal(3, BATCH, HEADS, LENGTH, LENGTH)
    mask = jnp.tril(jnp.ones((1, 1, LENGTH, LENGTH), bool))
    args = (X, W[0], bias, mask)
    (site,) = attention_sites(biased, *args)
    output, values = compiled(tracing.capture(biased, values=names))(*args)
    values = values[site.name]
    assert set(values) == set(names)
    q, k, v = project(X, W[0])
    for name, want in (("query", q), ("key", k), ("value", v), ("output", output)):
        close(values[name], want)
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE + bias
    s = jnp.where(jnp.broadcast_to(mask, s.shape), s, -jnp.inf)
    close(values["probabilities"], jax.nn.softmax(s))
    assert values["logsumexp"].dtype == jnp.float32
    close(values["logsumexp"], jax.nn.logsumexp(s, axis=-1))
    seen = jnp.broadcast_to(values["mask"], site.shape)
    same(seen.astype(bool), jnp.broadcast_to(mask, site.shape))
    visible = jnp.where(seen, jnp.broadcast_to(values["bias"], site.shape), 0.0)
    close(visible, jnp.where(jnp.broadcast_to(mask, site.shape), bias, 0.0))


def test_values_of_grouped_heads_keep_their_heads():
    w = weights(heads=4, kv_heads=2)
    grouped = lambda x, w: jax.nn.dot_product_attention(*project(x, w))
    names = ("query", "key", "value", "output", "logsumexp")
    _, values = compiled(tracing.capture(grouped, values=names))(X, w)
    (values,) = values.values()
    q, k, v = project(X, w)
    for name, want in (("query", q), ("key", k), ("value", v)):
        close(values[name], want)
    close(values["output"], grouped(X, w))
    s = jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, 2, axis=2)) * SCALE
    close(values["logsumexp"], jax.nn.logsumexp(s, axis=-1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_output_is_bit_identical_as_xla_compiles_by_default(dtype):
    w, x = jax.tree.map(lambda y: y.astype(dtype), (W, X))
    names = ("query", "key", "value")
    output, _ = jax.jit(tracing.capture(model, values=names))(w, x)
    same(output, jax.jit(model)(w, x))


def test_output_is_bit_identical_without_jit():
    same(tracing.capture(model)(W, X)[0], model(W, X))


def test_types_and_structure_of_the_output_are_the_models():
    def odd(w, x):
        y = model(w, x)
        return {"y": (y, None), "n": 3, "i": jnp.argmax(y), "weak": jnp.asarray(2.0)}

    output, _ = tracing.capture(odd)(W, X)
    want = odd(W, X)
    assert jax.tree.structure(output) == jax.tree.structure(want)
    got = jax.eval_shape(lambda *a: tracing.capture(odd)(*a)[0], W, X)
    assert got == jax.eval_shape(odd, W, X)
    same(output["i"], want["i"])


def test_a_model_without_sites():
    plain = lambda x: jnp.tanh(x)
    output, values = tracing.capture(plain)(X)
    same(output, plain(X))
    assert values == {}
    same(tracing.perturb(plain)({}, X), plain(X))


# jit.


ORDERS = {
    "eager": lambda f, t: t(f),
    "jit_outside": lambda f, t: compiled(t(f)),
    "jit_inside": lambda f, t: t(jax.jit(f)),
    "jit_twice": lambda f, t: compiled(t(jax.jit(f))),
    "remat_outside": lambda f, t: jax.checkpoint(t(f)),
    "remat_inside": lambda f, t: compiled(t(jax.checkpoint(f))),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("function", [model, scanned])
def test_jit_and_remat_in_any_order(order, function):
    output, values = ORDERS[order](function, tracing.capture)(W, X)
    want, maps = expected(ZEROS, W, X)
    close(output, want)
    got = probabilities(values)
    close(list(got[0]) if function is scanned else got, maps)


def test_one_trace_per_shape():
    traces = []

    def counted(w, x):
        traces.append(x.shape)
        return model(w, x)

    transforms = {
        "capture": tracing.capture(counted),
        "cotangents": tracing.attention_cotangents(counted, jnp.sum),
        "perturb": functools.partial(tracing.perturb(counted), {}),
        "replace": tracing.replace(counted, lambda site, a: a),
    }
    for name, transform in transforms.items():
        call: Any = compiled(transform)
        call(W, X)
        first = len(traces)
        for i in range(10):
            call(W, X + i)
        assert len(traces) == first, name
        call(W, X[:1])
        assert len(traces) > first, name
        assert call._cache_size() == 2


def test_parameters_stay_arguments():
    """No weight is baked into the program, and new weights give new answers."""
    closed = jax.make_jaxpr(tracing.capture(model))(W, X)
    assert all(np.size(c) < 8 for c in closed.consts)
    call = compiled(tracing.capture(model))
    call(W, X)
    doubled = jax.tree.map(lambda y: 2 * y, W)
    output, values = call(doubled, X)
    want, maps = expected(ZEROS, doubled, X)
    close(output, want)
    close(probabilities(values), maps)


def test_rebinding_a_transform_sees_new_arguments():
    """Ten calls without jit, each with other weights: nothing stale is kept."""
    transform = tracing.capture(model)
    for i in range(3):
        w = jax.tree.map(lambda y, i=i: (1 + i) * y, W)
        close(probabilities(transform(w, X)[1]), expected(ZEROS, w, X)[1])


def test_closed_over_tracers():
    """The model closes over values of an outer transformation."""

    @compiled
    def outer(w, x):
        return tracing.capture(lambda x: model(w, x))(x)

    output, values = outer(W, X)
    want, maps = expected(ZEROS, W, X)
    close(output, want)
    close(probabilities(values), maps)
    loss = lambda w: tracing.capture(lambda x: model(w, x))(X)[0].sum()
    want = compiled(jax.grad(lambda w: model(w, X).sum()))(W)
    close(compiled(jax.grad(loss))(W), want)


def test_effects_happen_once():
    seen = []

    def talkative(w, x):
        jax.debug.callback(lambda y: seen.append(float(y)), x.sum())
        return model(w, x)

    jax.block_until_ready(compiled(tracing.capture(talkative))(W, X))
    jax.effects_barrier()
    assert len(seen) == 1


# grad, jvp.


@pytest.mark.parametrize("function", [model, scanned])
def test_gradient_through_capture(function):
    for argnum in (0, 1):
        plain = jax.grad(lambda *a: function(*a).sum(), argnum)
        through = jax.grad(lambda *a: tracing.capture(function)(*a)[0].sum(), argnum)
        close(compiled(through)(W, X), compiled(plain)(W, X))


def test_gradient_of_captured_probabilities():
    """What is captured can itself be differentiated."""

    def entropy(w, x):
        _, values = tracing.capture(model)(w, x)
        return sum(jnp.sum(a * jnp.log(a)) for a in probabilities(values))

    def wanted(w, x):
        return sum(jnp.sum(a * jnp.log(a)) for a in explicit(ZEROS, w, x)[1])

    got, want = (compiled(jax.grad(f, (0, 1)))(W, X) for f in (entropy, wanted))
    close(got, want, 1e-4)


def test_capture_of_a_gradient():
    """The function may itself be a gradient: its forward sites are read."""
    gradient = jax.grad(lambda x, w: model(w, x).sum())
    output, values = compiled(tracing.capture(gradient))(X, W)
    close(output, compiled(gradient)(X, W))
    close(probabilities(values), expected(ZEROS, W, X)[1])


def test_forward_mode():
    names = [site.name for site in attention_sites(model, W, X)]
    epsilons = [normal(i, *ZEROS[0].shape) for i in range(LAYERS)]

    def moved(epsilons):
        return tracing.perturb(model)(dict(zip(names, epsilons, strict=True)), W, X)

    got = compiled(lambda e, d: jax.jvp(moved, (e,), (d,)))(ZEROS, epsilons)
    straight = lambda e: explicit(e, W, X)[0]
    want = compiled(lambda e, d: jax.jvp(straight, (e,), (d,)))(ZEROS, epsilons)
    close(got, want, 1e-4)
    output, linear = jax.linearize(moved, ZEROS)
    close((output, linear(epsilons)), want, 1e-4)


def test_second_derivative():
    """A Hessian-vector product with respect to the probabilities."""
    names = [site.name for site in attention_sites(model, W, X)]
    direction = [normal(i, *ZEROS[0].shape) for i in range(LAYERS)]

    def product(function):
        gradient = jax.grad(lambda e: function(e).sum())
        return compiled(lambda d: jax.jvp(gradient, (ZEROS,), (d,))[1])(direction)

    def moved(epsilons):
        return tracing.perturb(model)(dict(zip(names, epsilons, strict=True)), W, X)

    close(product(moved), product(lambda e: explicit(e, W, X)[0]), 1e-4)


# vmap.


def test_vmap_is_a_loop():
    single = tracing.capture(one)
    output, values = compiled(jax.vmap(single, in_axes=(None, 0)))(W, X)
    each = [compiled(single)(W, x) for x in X]
    close(output, jnp.stack([y for y, _ in each]))
    for name, value in values.items():
        want = jnp.stack([v[name]["probabilities"] for _, v in each])
        assert value["probabilities"].shape == (BATCH, 1, HEADS, LENGTH, LENGTH)
        close(value["probabilities"], want)


def test_capture_of_a_vmap():
    mapped = jax.vmap(one, in_axes=(None, 0))
    output, values = compiled(tracing.capture(mapped))(W, X)
    want, maps = expected(ZEROS, W, X)
    close(output, want)
    close(probabilities(values), maps)


def test_vmap_of_perturb_and_of_cotangents():
    names = [site.name for site in attention_sites(one, W, X[0])]
    gradient = jax.grad(lambda e, x: tracing.perturb(one)(e, W, x))
    zeros = {name: jnp.zeros((1, *ZEROS[0].shape[1:])) for name in names}
    got = compiled(jax.vmap(gradient, in_axes=(None, 0)))(zeros, X)
    want = compiled(jax.grad(lambda e: explicit(e, W, X)[0].sum()))(ZEROS)
    close([got[name][:, 0] for name in names], want)
    transform = tracing.attention_cotangents(one, lambda y: y)
    _, values = compiled(jax.vmap(transform, in_axes=(None, 0)))(W, X)
    for name, gradient in zip(names, want, strict=True):
        cotangent, value = (values[name][n] for n in ("output_cotangent", "value"))
        got = jnp.einsum("bqhd,bkhd->bhqk", cotangent[:, 0], value[:, 0])
        close(got, gradient)


def test_vmap_of_grad_of_vmap():
    """Per-example gradients with respect to the input, through capture."""
    per_example = jax.vmap(jax.grad(lambda x: tracing.capture(one)(W, x)[0]), in_axes=0)
    close(compiled(per_example)(X), compiled(jax.grad(lambda x: model(W, x).sum()))(X))


# Control flow around a transform.


def test_capture_inside_the_callers_control_flow():
    want, maps = expected(ZEROS, W, X)

    def step(total, x):
        output, values = tracing.capture(model)(W, x)
        return total + output, probabilities(values)

    total, stacked = lax.scan(step, jnp.zeros(BATCH), jnp.stack([X, X]))
    close(total, 2 * want)
    close([a[1] for a in stacked], maps)
    output, values = lax.cond(
        True,
        tracing.capture(model),
        lambda w, x: jax.tree.map(jnp.zeros_like, tracing.capture(model)(w, x)),
        W,
        X,
    )
    close(probabilities(values), maps)
    body = lambda state: (state[0] + 1, tracing.capture(model)(W, X)[0])
    _, output = lax.while_loop(lambda s: s[0] < 2, body, (0, jnp.zeros(BATCH)))
    close(output, want)


# Transforms of transforms.


def test_capture_of_capture():
    (output, inner), outer = compiled(tracing.capture(tracing.capture(model)))(W, X)
    want, maps = expected(ZEROS, W, X)
    close(output, want)
    close(probabilities(inner), maps)
    close(probabilities(outer), maps)


def test_capture_of_perturb():
    """A map is read before its own perturbation and after those of earlier sites."""
    names = [site.name for site in attention_sites(model, W, X)]
    epsilon = normal(1, *ZEROS[0].shape, scale=0.1)
    moved = lambda w, x: tracing.perturb(model)({names[0]: epsilon}, w, x)
    output, values = compiled(tracing.capture(moved))(W, X)
    want, maps = expected([epsilon, ZEROS[1]], W, X)
    close(output, want)
    assert len(values) == LAYERS
    close(probabilities(values)[1], maps[1])


def test_perturb_of_perturb_adds():
    names = [site.name for site in attention_sites(model, W, X)]
    epsilon = normal(1, *ZEROS[0].shape, scale=0.1)
    first = lambda w, x: tracing.perturb(model)({names[0]: epsilon}, w, x)
    second = attention_sites(first, W, X)[1].name
    output = compiled(tracing.perturb(first))({second: epsilon}, W, X)
    close(output, expected([epsilon, epsilon], W, X)[0])


# Perturb, replace, cotangents.


def test_sites_not_named_are_not_perturbed():
    names = [site.name for site in attention_sites(model, W, X)]
    epsilon = normal(1, *ZEROS[0].shape, scale=0.1)
    close(
        compiled(tracing.perturb(model))({names[1]: epsilon}, W, X),
        expected([ZEROS[0], epsilon], W, X)[0],
    )
    same(tracing.perturb(model)({}, W, X), model(W, X))


@pytest.mark.parametrize("function", [model, scanned])
def test_replace(function):
    """A head is ablated in every layer; the rule knows the site it is at."""
    seen = []

    def ablate(site, a):
        seen.append((site.name, site.kind, a.shape[-4:]))
        return a * jnp.array([1.0, 0.0, 1.0])[None, :, None, None]

    output = compiled(tracing.replace(function, ablate))(W, X)

    def explicit_ablated(w, x):
        for layer in w:
            tap = lambda a: a.at[:, 1].set(0.0)
            x = x + merge(attend(tap, *project(x, layer)), layer)
        return jnp.tanh(x).sum((1, 2))

    close(output, explicit_ablated(W, X))
    assert {kind for _, kind, _ in seen} == {"attention"}
    assert {shape for *_, shape in seen} == {ZEROS[0].shape}
    got, want = (
        compiled(jax.grad(lambda x, f=f: f(W, x).sum()))(X)
        for f in (tracing.replace(function, ablate), explicit_ablated)
    )
    close(got, want)


def test_replace_by_itself_and_at_chosen_sites():
    identity = compiled(tracing.replace(model, lambda site, a: a))
    close(identity(W, X), compiled(model)(W, X), 1e-6)
    last = attention_sites(model, W, X)[-1]
    uniform = lambda site, a: jnp.full_like(a, 1 / LENGTH)
    output = compiled(tracing.replace(model, uniform, sites=[last]))(W, X)
    epsilons = [ZEROS[0], 1 / LENGTH - expected(ZEROS, W, X)[1][1]]
    close(output, expected(epsilons, W, X)[0])


def test_a_replacement_of_another_shape_raises():
    with pytest.raises(ValueError, match=str(LENGTH)):
        tracing.replace(model, lambda site, a: a[..., :2])(W, X)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("function", [model, scanned])
def test_cotangents_in_any_order(order, function):
    transform = lambda f: tracing.attention_cotangents(f, lambda y: jnp.sum(y**2))
    output, values = ORDERS[order](function, transform)(W, X)
    close(output, model(W, X))
    want = compiled(jax.grad(lambda e: jnp.sum(explicit(e, W, X)[0] ** 2)))(ZEROS)
    got = [
        jnp.einsum("...qhd,...khd->...hqk", v["output_cotangent"], v["value"])
        for v in values.values()
    ]
    close(list(got[0]) if function is scanned else got, want, 1e-4)


def test_cotangents_of_a_traced_target():
    """The scalar may choose what it explains at run time."""

    @compiled
    def explain(w, x, target):
        transform = tracing.attention_cotangents(model, lambda y: y[target])
        return transform(w, x)[1]

    for target in range(BATCH):
        values = explain(W, X, target)
        for value in values.values():
            size = jnp.abs(value["output_cotangent"]).max((1, 2, 3))
            assert size[target] > 0
            assert size[1 - target] == 0


def test_cotangents_need_a_scalar():
    with pytest.raises((ValueError, TypeError)):
        tracing.attention_cotangents(model, lambda y: y)(W, X)


# Devices.


def mesh():
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    return jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


X4 = tokens(batch=8, seed=3)


def test_sharded_inputs_change_nothing():
    sharding = NamedSharding(mesh(), P("data"))
    put = jax.device_put(X4, sharding)
    output, values = compiled(tracing.capture(model))(W, put)
    zeros = [jnp.zeros((8, *ZEROS[0].shape[1:]))] * LAYERS
    want, maps = expected(zeros, W, X4)
    close(output, want)
    close(probabilities(values), maps)


def sharded(function):
    along = P("data")
    return jax.shard_map(function, mesh=mesh(), in_specs=(P(), along), out_specs=along)


def test_shard_map_of_capture():
    """Each shard captures its own part; the specs put the parts together."""
    output, values = compiled(sharded(tracing.capture(model)))(W, X4)
    zeros = [jnp.zeros((8, *ZEROS[0].shape[1:]))] * LAYERS
    want, maps = expected(zeros, W, X4)
    close(output, want)
    close(probabilities(values), maps)


@pytest.mark.parametrize("order", ["jit_outside", "jit_twice", "remat_inside"])
@pytest.mark.parametrize("function", [model, scanned])
def test_capture_of_shard_map(order, function):
    """Shards are the outermost loop axis of the sites inside."""
    inside = sharded(function)
    sites = attention_sites(inside, W, X4)
    for site in sites:
        assert site.loops == ((4,) if function is model else (4, LAYERS))
        assert site.shape == (*site.loops, 2, *ZEROS[0].shape[1:])
    output, values = ORDERS[order](inside, tracing.capture)(W, X4)
    zeros = [jnp.zeros((8, *ZEROS[0].shape[1:]))] * LAYERS
    want, maps = expected(zeros, W, X4)
    close(output, want)
    maps = [a.reshape(4, 2, *a.shape[1:]) for a in maps]
    got = probabilities(values)
    close(got, maps if function is model else [jnp.stack(maps, axis=1)])


def test_perturb_and_cotangents_of_shard_map():
    inside = sharded(model)
    names = [site.name for site in attention_sites(inside, W, X4)]
    zeros = [jnp.zeros((8, *ZEROS[0].shape[1:]))] * LAYERS
    want = compiled(jax.grad(lambda e: explicit(e, W, X4)[0].sum()))(zeros)
    want = [a.reshape(4, 2, *a.shape[1:]) for a in want]
    given = {name: jnp.zeros_like(a) for name, a in zip(names, want, strict=True)}
    loss = lambda e: tracing.perturb(inside)(e, W, X4).sum()
    got = compiled(jax.grad(loss))(given)
    close([got[name] for name in names], want)
    _, values = compiled(tracing.attention_cotangents(inside, jnp.sum))(W, X4)
    for name, gradient in zip(names, want, strict=True):
        v = values[name]
        got = jnp.einsum("...qhd,...khd->...hqk", v["output_cotangent"], v["value"])
        close(got, gradient)


def test_collectives_inside_shard_map():
    """Keys and values gathered from all shards: sequence parallelism."""

    def local(w, x):
        q, _, _ = project(x, w)
        everywhere = lax.all_gather(x, "data", axis=1, tiled=True)
        _, k, v = project(everywhere, w)
        a = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * SCALE)
        return merge(jnp.einsum("bhqk,bkhd->bqhd", a, v), w)

    along = P(None, "data")
    inside = jax.shard_map(local, mesh=mesh(), in_specs=(P(), along), out_specs=along)
    x = tokens(8)
    (site,) = attention_sites(inside, W[0], x)
    assert site.shape == (4, BATCH, HEADS, 2, 8)
    output, values = compiled(tracing.capture(inside))(W[0], x)
    maps = []
    tap = lambda a: maps.append(a) or a
    close(output, merge(attend(tap, *project(x, W[0])), W[0]))
    want = jnp.moveaxis(maps[0].reshape(BATCH, HEADS, 4, 2, 8), 2, 0)
    close(values[site.name]["probabilities"], want)


def test_gradient_of_capture_of_shard_map():
    inside = sharded(model)
    got, want = (
        compiled(jax.grad(lambda x, f=f: f(W, x).sum()))(X4)
        for f in (lambda *a: tracing.capture(inside)(*a)[0], inside)
    )
    close(got, want)


# Models that are objects.


def test_a_module_with_static_leaves_as_argument():
    if importlib.util.find_spec("equinox") is None:
        pytest.skip("equinox is not installed")
    with loose():
        import equinox as eqx

        class Model(eqx.Module):
            attention: eqx.nn.MultiheadAttention
            activation: Callable
            inference: bool

            def __call__(self, x):
                y = self.attention(x, x, x, inference=self.inference)
                return self.activation(y).sum()

        key = jax.random.key(0)
        module = Model(
            eqx.nn.MultiheadAttention(2, WIDTH, dropout_p=0.5, key=key), jnp.tanh, True
        )
        call = lambda module, x: module(x)
        (site,) = attention_sites(call, module, X[0])
        assert site.shape == (1, 2, LENGTH, LENGTH)
        want = compiled(lambda x: module(x))(X[0])
        output, values = tracing.capture(call)(module, X[0])
        close(output, want)
        assert set(values) == {site.name}
        output, _ = compiled(lambda x: tracing.capture(module)(x))(X[0])
        close(output, want)


def test_an_nnx_module_closed_over():
    with loose():
        from flax import nnx

        module = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
        (site,) = attention_sites(module, X)
        assert site.shape == (BATCH, 2, LENGTH, LENGTH)
        output, values = compiled(lambda x: tracing.capture(module)(x))(X)
        close(output, compiled(lambda x: module(x))(X))
        assert set(values) == {site.name}


def test_names_of_linen_modules_are_their_paths():
    with loose():
        from flax import linen as nn

        class Encoder(nn.Module):
            @nn.compact
            def __call__(self, x):
                for i in range(LAYERS):
                    attention = nn.MultiHeadDotProductAttention(2, name=f"self_{i}")
                    x = x + attention(x)
                return x

        module = Encoder()
        params = jax.eval_shape(module.init, jax.random.key(0), X)
        names = [site.name for site in attention_sites(module.apply, params, X)]
        assert ["self_0" in names[0], "self_1" in names[1]] == [True, True]
