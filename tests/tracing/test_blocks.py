"""Layers are cut apart however they are looped over, or it is said why not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation

DEPTH, LENGTH, WIDTH = 4, 5, 4
WEIGHTS = jax.random.normal(jax.random.key(0), (DEPTH, 4, WIDTH, WIDTH)) / 2
HEAD = jax.random.normal(jax.random.key(1), (WIDTH, 3))
X = jax.random.normal(jax.random.key(2), (LENGTH, WIDTH))


def attend(x, w):
    q, k, v = x @ w[0], x @ w[1], x @ w[2]
    return jax.nn.softmax(q @ k.T) @ v


def layer(x, w):
    x = x + attend(x, w)
    return x + jnp.tanh(x @ w[3])


def head(x):
    x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))
    return x[0] @ HEAD


def unrolled(x):
    for w in WEIGHTS:
        x = layer(x, w)
    return head(x)


def jitted(x):
    for w in WEIGHTS:
        x = jax.jit(layer)(x, w)
    return head(x)


def rematerialised(x):
    turn = lambda x, w: (jax.checkpoint(layer)(x, w), None)
    return head(jax.lax.scan(turn, x, WEIGHTS)[0])


def pairs(x):
    turn = lambda x, two: (layer(layer(x, two[0]), two[1]), None)
    return head(jax.lax.scan(turn, x, WEIGHTS.reshape(2, 2, 4, WIDTH, WIDTH))[0])


def nested(x):
    inner = lambda x, w: (layer(x, w), None)
    outer = lambda x, two: (jax.lax.scan(inner, x, two)[0], None)
    return head(jax.lax.scan(outer, x, WEIGHTS.reshape(2, 2, 4, WIDTH, WIDTH))[0])


def counted(x):
    """The stream has an axis of examples, and is carried beside a sum."""

    def turn(number, carry):
        x, total = carry
        x = layer(x[0], WEIGHTS[number])[None]
        return x, total + jnp.sum(x)

    return head(jax.lax.fori_loop(0, DEPTH, turn, (x[None], 0.0))[0][0])


def explanations(model, **options):
    def both(x):
        legrad = xv.legrad(model, **options)(x, target=1).scores
        return legrad, xv.value_zeroing(model, query=2, **options)(x).scores

    return jax.jit(both)(X)


expected = functools.cache(lambda: explanations(unrolled))


@pytest.mark.parametrize("model", [jitted, rematerialised, pairs, nested, counted])
def test_loops_change_nothing(model):
    for found, wanted in zip(explanations(model), expected(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def shorter(x):
    """The last layer is another one: attention alone."""
    for w in WEIGHTS[:-1]:
        x = layer(x, w)
    return head(x + attend(x, WEIGHTS[-1]))


def test_an_end_that_is_not_found_can_be_named():
    with pytest.raises(ValueError, match=r"not found: mark .* pass `last='name'`"):
        xv.legrad(shorter)(X)

    def single(x, mark=lambda x: x):
        return head(mark(layer(x, WEIGHTS[0])))

    with pytest.raises(ValueError, match="what leaves the last layer was not found"):
        xv.value_zeroing(single)(X)
    named = lambda x: single(x, lambda x: checkpoint_name(x, "end"))
    found = jax.jit(xv.value_zeroing(named, last="end"))(X).scores
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-5)
    # What a single layer says of its own is what the model says.
    assert jax.jit(xv.legrad(single))(X).scores.max() > 0

    def marked(x):
        for w in WEIGHTS:
            x = layer(x, w)
        return head(checkpoint_name(x, "end"))

    for found, wanted in zip(explanations(marked, last="end"), expected(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


def test_an_end_within_a_loop_is_refused():
    def looped(x):
        turn = lambda x, w: (checkpoint_name(layer(x, w), "each"), None)
        return head(jax.lax.scan(turn, x, WEIGHTS)[0])

    with pytest.raises(
        ValueError, match="'each' is of kind 'named' and lies in 1 loop"
    ):
        xv.legrad(looped, last="each")(X)


def test_ways_around_the_stream_are_refused():
    """Layers that see the first one's stream again, long after."""

    def skipping(x):
        kept = x
        for w in WEIGHTS:
            before, x = x, layer(x, w)
            x = x + kept @ w[3]
            kept = before
        return head(x)

    def carrying(x):
        def turn(carry, w):
            x, kept = carry
            return (layer(x, w) + kept @ w[3], x), None

        return head(jax.lax.scan(turn, (x, x), WEIGHTS)[0][0])

    for model in (skipping, carrying):
        with pytest.raises(ValueError, match="otherwise than through the stream"):
            xv.legrad(model)(X)
