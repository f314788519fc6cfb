"""Arithmetic against numbers that are known, and what methods say they cost."""

import math

import jax
import jax.numpy as jnp
import pytest

import xviz_jax as xv
from xviz_jax.comparison.arithmetic import arithmetic

SIZE = 8
WEIGHTS, X = jnp.ones((SIZE, SIZE)), jnp.ones(SIZE)
PRODUCT = 2 * SIZE**2


def layers(w, x):
    for _ in range(5):
        x = w @ x
    return x


def turns(w, x):
    return jax.lax.scan(lambda x, _: (w @ x, None), x, length=5)[0]


def until(w, x):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: w @ x, x)


IMAGE, KERNEL = jnp.ones((1, 6, 6, 3)), jnp.ones((3, 3, 3, 4))


@pytest.mark.parametrize(
    ("function", "args", "wanted"),
    [
        (lambda w, x: w @ x, (WEIGHTS, X), PRODUCT),
        (lambda w: jnp.einsum("ij,kj->ik", w, w[:3]), (WEIGHTS,), 3 * PRODUCT),
        (layers, (WEIGHTS, X), 5 * PRODUCT),
        (turns, (WEIGHTS, X), 5 * PRODUCT),
        (jax.jit(turns), (WEIGHTS, X), 5 * PRODUCT),
        (until, (WEIGHTS, X), math.inf),
        # Once; and a sum of eight.
        (lambda w, x: w @ x + jax.jit(jnp.matmul)(w, x), (WEIGHTS, X), PRODUCT + SIZE),
        # Nobody reads it.
        (lambda w, x: (w @ x, until(w, x + 1))[0], (WEIGHTS, X), PRODUCT),
        (lambda x: jnp.sum(jnp.tanh(x.reshape(4, 2).T)), (X,), 2 * SIZE),
        (
            lambda w, x: jax.lax.cond(x[0] > 0, lambda: layers(w, x), lambda: w @ x),
            (WEIGHTS, X),
            5 * PRODUCT,
        ),
        (
            lambda x, k: jax.lax.conv_general_dilated(
                x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            (IMAGE, KERNEL),
            2 * (4 * 4 * 4) * (3 * 3 * 3),
        ),
    ],
)
def test_known_numbers(function, args, wanted):
    assert arithmetic(function, *args) == pytest.approx(wanted, rel=0.005)


@pytest.mark.parametrize("loop", [False, True], ids=["written out", "a loop"])
def test_a_gradient_is_a_product_forward_and_one_back(loop):
    """Of each layer, whatever the method computes a second time."""
    wide = jnp.ones((64, 64))

    def model(x):
        step = lambda x, _: (jnp.tanh(wide @ x), None)
        if loop:
            return jax.lax.scan(step, x, length=3)[0]
        for _ in range(3):
            x, _ = step(x, None)
        return x

    x = jnp.ones(64)
    explain = xv.saliency(model)
    cost = arithmetic(lambda x: explain(x, target=0).scores, x)
    assert cost / arithmetic(model, x) == pytest.approx(2, rel=0.03)


def test_what_methods_say():
    model = lambda x: jnp.tanh(WEIGHTS @ x)
    key = jax.random.key(0)
    path = xv.integrated_gradients(model, steps=8)
    for inner, each in ((xv.saliency(model), 1), (path, 8)):
        explain = xv.smooth(inner, noise=0.1, samples=6, chunk=4)
        found = explain(X, key=key).diagnostics["evaluations"]
        assert (found, found.dtype) == (6 * each, jnp.int32)

    def different(x, target=None, key=None):
        """Costs 3 or 4, as each copy falls."""
        spent = jnp.where(x[0] > 1, 4, 3)
        return xv.Attribution(
            scores=spent.astype(jnp.float32),
            output=x[0],
            diagnostics={"evaluations": spent},
        )

    explain = xv.smooth(different, noise=1.0, samples=9, chunk=4)
    found = explain(X, target=0, key=key)
    assert found.diagnostics["evaluations"] == round(9 * float(found.scores))
    assert 27 < found.diagnostics["evaluations"] < 36
