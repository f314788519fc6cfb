"""What is not attention is not reported as such; what cannot be read is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tracing import zoo_negative
from tests.tracing.cases import ATTENTION_LIKE, compiled, normal, tokens
from xviz_jax import tracing

REPORTED = (*ATTENTION_LIKE, "router", "unknown")


@pytest.mark.parametrize(
    ("build", "kinds"), [pytest.param(b, k, id=n) for n, b, k in zoo_negative.CASES]
)
def test_kinds(build, kinds):
    model, args = build()
    sites = [site for site in tracing.sites(model, *args) if site.kind in REPORTED]
    assert len(sites) == len(kinds), sites
    for site, kind in zip(sites, kinds, strict=True):
        assert site.kind in kind.split("|"), site
    for site in sites:
        if site.kind == "unknown":
            assert len(site.why.split()) > 3


@pytest.mark.parametrize(
    "build", [pytest.param(b, id=n) for n, b, k in zoo_negative.CASES if not k]
)
def test_capture_of_nothing_is_the_model(build):
    model, args = build()
    output, values = compiled(tracing.capture(model))(*args)
    assert values == {}
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    jax.tree.map(same, output, compiled(model)(*args))


ROUTERS = [(n, b) for n, b, k in zoo_negative.CASES if k == ("router",)]


@pytest.mark.parametrize("build", [pytest.param(b, id=n) for n, b in ROUTERS[:2]])
def test_router_probabilities(build):
    """A router is read when asked for: one distribution over the experts per token."""
    model, args = build()
    capture = tracing.capture(model, sites=lambda site: site.kind == "router")
    _, values = compiled(capture)(*args)
    ((name, values),) = values.items()
    (site,) = (s for s in tracing.sites(model, *args) if s.name == name)
    x, gate, _ = args
    want = jax.nn.softmax(jnp.einsum("bte,ex->btx", x, gate))
    got = values["probabilities"]
    assert got.shape == site.shape
    assert got.ndim == 4
    assert got.shape[-1] == zoo_negative.EXPERTS
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-6)


def test_router_in_a_scan_has_a_loop_axis():
    model, args = zoo_negative.experts_in_a_scan_over_layers()
    (site,) = (s for s in tracing.sites(model, *args) if s.kind == "router")
    assert site.loops == (3,)
    assert site.shape[0] == 3 and len(site.shape) == 5


def test_a_sequence_that_attends_itself_as_it_came_is_no_router():
    """Keys are the bare input, and values are made of it."""
    w = jnp.ones((4, 4))

    def model(x):
        maps = jax.nn.softmax((x @ w) @ x.T)
        return (maps @ (x @ w)) @ w

    (site,) = tracing.sites(model, jnp.ones((5, 4)))
    assert site.kind == "attention"


UNKNOWN = [(n, b) for n, b, k in zoo_negative.CASES if "unknown" in k]


@pytest.mark.parametrize("build", [pytest.param(b, id=n) for n, b in UNKNOWN])
def test_unknown_sites_are_never_zeros(build):
    """By default they are left out; asked for, they raise and are named."""
    model, args = build()
    (site,) = (s for s in tracing.sites(model, *args) if s.kind == "unknown")
    output, values = compiled(tracing.capture(model))(*args)
    assert values == {}
    np.testing.assert_array_equal(output, compiled(model)(*args))
    with pytest.raises((ValueError, NotImplementedError)) as error:
        jax.eval_shape(tracing.capture(model, sites=[site]), *args)
    assert site.name in str(error.value)


def test_a_loss_keeps_the_sites_of_its_model():
    """Softmax, attention and cross-entropy together; and the gradient of it all."""

    def loss(w, x, labels):
        q, k, v = (x @ w[name] for name in "qkv")
        x = x + jax.nn.softmax(q @ k.mT) @ v
        logits = jax.nn.log_softmax(x @ w["out"])
        return -jnp.mean(jnp.sum(logits * jax.nn.one_hot(labels, 5), axis=-1))

    w = {name: normal(i, 2, 6, 6) for i, name in enumerate("qkv")}
    w["out"] = normal(4, 2, 6, 5)
    args = (w, tokens(), jnp.array([[0, 1, 2, 3, 4]] * 2))
    for model in (loss, jax.grad(loss), jax.value_and_grad(jax.checkpoint(loss))):
        sites = [s for s in tracing.sites(model, *args) if s.kind in REPORTED]
        assert [site.kind for site in sites] == ["attention"]
