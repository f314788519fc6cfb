"""Every model of the zoo: its sites are found, read, perturbed, differentiated."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tracing.cases import ATTENTION_LIKE, compiled, normal
from tests.tracing.zoo import CASES
from xviz_jax import tracing


# Of the module, so that what is asked of one case is asked in a row, by one process.
@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def chosen(request):
    return request.param


@pytest.fixture
def case(chosen):
    if chosen.library and importlib.util.find_spec(chosen.library) is None:
        pytest.skip(f"{chosen.library} is not installed")
    with chosen.context():
        yield chosen


def is_array(leaf):
    return isinstance(leaf, jax.Array | np.ndarray)


def is_float(leaf):
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def over(choose, function, args):
    """`function` of the chosen leaves of `args`, and these leaves."""
    leaves, structure = jax.tree.flatten(args)
    chosen = [leaf for leaf in leaves if choose(leaf)]

    def call(chosen, *before):
        rest = iter(chosen)
        full = [next(rest) if choose(leaf) else leaf for leaf in leaves]
        return function(*before, *jax.tree.unflatten(structure, full))

    return call, chosen


def run(function, args, *before):
    """`function(*before, *args)`, compiled."""
    call, leaves = over(is_array, function, args)
    return compiled(call)(leaves, *before)


def scalar(output):
    """A scalar that no entry of the output leaves unchanged."""
    total = jnp.float32(0)
    for seed, leaf in enumerate(jax.tree.leaves(output)):
        leaf = leaf.astype(jnp.float32)
        total += jnp.sum(normal(seed, *leaf.shape) * (leaf + 0.3 * leaf**2))
    return total


def assert_close(got, want, tolerance, *, floor=0.0):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert got.shape == want.shape
    assert np.isfinite(want).all()
    size = max(np.abs(want).max(initial=0.0), floor) + 1e-30
    assert np.abs(got - want).max(initial=0.0) / size <= tolerance


@functools.cache
def expected(case):
    """What the explicit implementation and its gradients say, with epsilon or not."""
    with case.context():

        def loss(given, *args):
            epsilons, floats = given
            inner, _ = over(is_float, case.explicit, args)
            output, maps = inner(floats, epsilons)
            return scalar(output), (output, maps)

        call, leaves = over(is_array, case.explicit, case.args)
        _, maps = jax.eval_shape(call, leaves, None)
        epsilons = [
            normal(i, *a.shape, scale=0.1, dtype=a.dtype) for i, a in enumerate(maps)
        ]
        call, leaves = over(is_array, jax.grad(loss, has_aux=True), case.args)
        call = compiled(call)
        zeros = jax.tree.map(jnp.zeros_like, epsilons)
        _, floats = over(is_float, case.explicit, case.args)
        (gradients, slopes), (output, maps) = call(leaves, (zeros, floats))
        (moved, _), (moved_output, _) = call(leaves, (epsilons, floats))
        return dict(
            output=output,
            maps=maps,
            gradients=gradients,
            slopes=slopes,
            epsilons=epsilons,
            moved=moved,
            moved_output=moved_output,
        )


@functools.cache
def plain(case):
    """What the model itself says."""
    with case.context():
        return run(case.model, case.args)


@functools.cache
def found(case):
    """The attention-like sites, in program order."""
    with case.context():
        sites = tracing.sites(case.model, *case.args)
        return [site for site in sites if site.kind in ATTENTION_LIKE]


def test_explicit_agrees_with_the_model(case):
    model = plain(case)
    want = expected(case)["output"]
    assert jax.tree.structure(model) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(want), strict=True):
        assert_close(a, b, case.tolerance)
    assert len(expected(case)["maps"]) == len(case.kinds)
    reached = [np.abs(a).max() > 0 for a in expected(case)["maps"]]
    assert any(reached)
    for gradient, live in zip(expected(case)["gradients"], reached, strict=True):
        assert (np.abs(gradient).max() > 0) == live


def test_sites(case):
    sites = tracing.sites(case.model, *case.args)
    likely = [site for site in sites if site.kind in (*ATTENTION_LIKE, "unknown")]
    assert len(likely) == len(case.kinds), [(s.kind, s.name, s.why) for s in likely]
    for site, kind, a in zip(likely, case.kinds, expected(case)["maps"], strict=True):
        assert site.kind in kind.split("|")
        assert site.shape == a.shape
        assert site.loops == a.shape[:-4]
    names = [site.name for site in sites]
    assert all(isinstance(name, str) and name for name in names)
    assert len(set(names)) == len(names)


def made_again(site, values):
    """Probabilities from query and key and from what is known of their scores."""
    query, key = (np.asarray(values[n], np.float64) for n in ("query", "key"))
    key = key.repeat(query.shape[-2] // key.shape[-2], axis=-2)
    scores = np.einsum("...qhd,...khd->...hqk", query, key) * site.scale
    if site.softcap is not None:
        scores = site.softcap * np.tanh(scores / site.softcap)
    if "bias" in values:
        scores = scores + np.asarray(values["bias"], np.float64)
    length = scores.shape[-1]
    rows = np.arange(scores.shape[-2])
    if site.turns[-1:] == ("queries",):
        rows = rows + len(rows) * np.arange(site.loops[-1])[:, None]
    rows = rows + length - rows.size
    gap = rows[..., None] - np.arange(length)
    if rows.ndim == 2:
        gap = gap[:, None, None]
    left, right = site.window or (None, None)
    seen = np.ones(gap.shape, bool)
    seen &= (gap >= 0) if site.causal else True
    seen &= (gap <= left) if left is not None else True
    seen &= (-gap <= right) if right is not None else True
    seen = seen & np.asarray(values.get("remaining_mask", True))
    scores = np.where(seen, scores, -1e30)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_capture(case):
    """Also: where a scale is known, query and key and masks tell everything."""
    names = ("probabilities", "query", "key", "bias", "remaining_mask")
    output, values = run(tracing.capture(case.model, names), case.args)
    model = plain(case)
    assert jax.tree.structure(output) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(output), jax.tree.leaves(model), strict=True):
        assert a.dtype == b.dtype
        if case.bitwise:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        else:
            assert_close(a, b, case.tolerance)
    assert set(values) == {site.name for site in found(case)}
    for site, a in zip(found(case), expected(case)["maps"], strict=True):
        assert set(values[site.name]) == {"probabilities"} | (
            set(names) & set(site.values)
        )
        assert_close(values[site.name]["probabilities"], a, case.tolerance)
        if site.scale is not None and site.kind == "attention":
            again = made_again(site, values[site.name])
            reached = np.asarray(a).any(axis=-1, keepdims=True)
            assert_close(again * reached, a, max(case.tolerance, 1e-4))


def test_perturb(case):
    want = expected(case)
    names = [site.name for site in found(case)]
    assert len(names) == len(case.kinds)

    def loss(epsilons, *args):
        output = tracing.perturb(case.model)(epsilons, *args)
        return scalar(output), output

    call, leaves = over(is_array, jax.grad(loss, has_aux=True), case.args)
    call = compiled(call)
    epsilons = dict(zip(names, want["epsilons"], strict=True))
    zeros = jax.tree.map(jnp.zeros_like, epsilons)
    for given, output, gradients in (
        (zeros, "output", "gradients"),
        (epsilons, "moved_output", "moved"),
    ):
        got_gradients, got = call(leaves, given)
        for a, b in zip(
            jax.tree.leaves(got), jax.tree.leaves(want[output]), strict=True
        ):
            assert_close(a, b, case.tolerance)
        for name, gradient in zip(names, want[gradients], strict=True):
            assert_close(got_gradients[name], gradient, 5 * case.tolerance)


def test_cotangents(case):
    if not case.cotangents:
        pytest.skip("the product with the values does not directly follow")
    transform = tracing.attention_cotangents(case.model, scalar)
    output, values = run(transform, case.args)
    for a, b in zip(
        jax.tree.leaves(output), jax.tree.leaves(expected(case)["output"]), strict=True
    ):
        assert_close(a, b, case.tolerance)
    maps, gradients = expected(case)["maps"], expected(case)["gradients"]
    for site, a, gradient in zip(found(case), maps, gradients, strict=True):
        if site.kind != "attention":
            continue
        assert set(values[site.name]) >= {"query", "key", "value", "output"}
        value, mixed, cotangent, a = (
            np.asarray(array, np.float32)
            for array in (
                *(
                    values[site.name][n]
                    for n in ("value", "output", "output_cotangent")
                ),
                a,
            )
        )
        assert cotangent.shape == mixed.shape
        assert value.shape[:-4] == cotangent.shape[:-4] == site.loops
        value = value.repeat(cotangent.shape[-2] // value.shape[-2], axis=-2)
        got = np.einsum("...qhd,...khd->...hqk", cotangent, value)
        assert_close(got, gradient, 5 * case.tolerance)
        product = np.einsum("...hqk,...khd->...qhd", a, value)
        assert_close(mixed, product, case.tolerance)


def test_gradients_through_capture_are_the_models(case):
    def gradients(model):
        call, leaves = over(is_float, model, case.args)
        return compiled(jax.grad(lambda leaves: scalar(call(leaves))))(leaves)

    got = gradients(lambda *args: tracing.capture(case.model)(*args)[0])
    want = gradients(case.model) if case.own_rule else expected(case)["slopes"]
    floor = max(float(np.abs(g).max()) for g in want)
    assert floor > 0
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 5 * case.tolerance, floor=floor)
