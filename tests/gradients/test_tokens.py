"""Token ids are explained at the embeddings they look up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.contract.quick import quick_compilation as quick_compilation
from tests.contract.table import CLASSES, LENGTH, WIDTH, parameters, transformer

VOCABULARY = 11
TABLE = jax.random.normal(jax.random.key(8), (VOCABULARY, WIDTH))
PLACES = jax.random.normal(jax.random.key(9), (LENGTH, WIDTH))
TOKENS = jnp.array([3, 1, 4, 1, 5])
WEIGHTS = parameters()


def of_embeddings(embeddings):
    return transformer(WEIGHTS, embeddings + PLACES)


def by_index(tokens):
    return of_embeddings(TABLE[tokens])


def by_one_hot(tokens):
    return of_embeddings(jax.nn.one_hot(tokens, VOCABULARY) @ TABLE)


METHODS = {
    "saliency": xv.saliency,
    "input_x_gradient": xv.input_x_gradient,
    "integrated_gradients": lambda m: xv.integrated_gradients(m, steps=16),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", [by_index, by_one_hot])
def test_tokens_score_what_their_embeddings_do(method, model):
    make = METHODS[method]
    tokens = jax.jit(make(model))(TOKENS)
    embedded = make(of_embeddings)(TABLE[TOKENS])
    assert tokens.scores.shape == (LENGTH,)
    np.testing.assert_allclose(tokens.scores, embedded.scores.sum(-1), atol=2e-5)
    np.testing.assert_allclose(tokens.output, embedded.output, rtol=1e-5)


def test_batches_and_parameters():
    def forward(table, tokens):
        return of_embeddings(table[tokens])

    explain = xv.integrated_gradients(forward, steps=16, argnums=1)
    batch = jnp.stack([TOKENS, TOKENS[::-1]])
    stacked = jax.jit(jax.vmap(explain, in_axes=(None, 0)))(TABLE, batch)
    for row, tokens in zip(stacked.scores, batch, strict=True):
        np.testing.assert_allclose(row, explain(TABLE, tokens).scores, atol=2e-5)


def test_a_baseline_of_tokens():
    """The path starts at the embeddings of other tokens; equal ones score zero."""
    other = TOKENS.at[2].set(0)
    explain = xv.integrated_gradients(by_index, steps=128, baseline=other)
    attribution = explain(TOKENS, target=1)
    change = by_index(TOKENS)[1] - by_index(other)[1]
    assert np.all(attribution.scores[jnp.array([0, 1, 3, 4])] == 0)
    np.testing.assert_allclose(attribution.scores[2], change, rtol=1e-3)
    assert attribution.diagnostics["converged"]


def test_segments_are_apart_from_tokens():
    segments = jnp.array([0, 0, 1, 1, 1])
    kinds = jax.random.normal(jax.random.key(3), (2, WIDTH))

    def model(tokens, segments):
        return of_embeddings(TABLE[tokens] + kinds[segments])

    first = xv.input_x_gradient(model)(TOKENS, segments, target=0)
    second = xv.input_x_gradient(model, argnums=1)(TOKENS, segments, target=0)
    slope = jax.grad(lambda e: of_embeddings(e)[0])(TABLE[TOKENS] + kinds[segments])
    np.testing.assert_allclose(first.scores, (TABLE[TOKENS] * slope).sum(-1), atol=1e-5)
    np.testing.assert_allclose(
        second.scores, (kinds[segments] * slope).sum(-1), atol=1e-5
    )


def test_integers_that_look_nothing_up_are_refused():
    with pytest.raises(ValueError, match=r"int32\[5\]: it must look up.*no table"):
        xv.saliency(lambda t: t.astype(jnp.float32)[:CLASSES])(TOKENS)
