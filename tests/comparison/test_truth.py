"""The ground truth itself: what is stored is what it is said to be."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

import xviz_jax as xv
from tests.comparison import compiled, planted, shortcut
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax import tracing
from xviz_jax.models import embedded

SAID = {
    "reverse": lambda text: text[::-1],
    "frac_prevs": lambda text: [
        np.mean([t == "x" for t in text[: i + 1]]) for i in range(len(text))
    ],
    "pair_balance": lambda text: [
        np.mean([(t == "(") - (t == ")") for t in text[: i + 1]])
        for i in range(len(text))
    ],
    "hist": lambda text: [text.count(t) for t in text],
    "sort": lambda text: sorted(text),
}
WORDS = {
    "reverse": "abc",
    "frac_prevs": "xyz",
    "pair_balance": "()a",
    "hist": "abc",
    "sort": "123",
}


@pytest.mark.parametrize("name", compiled.NAMES)
def test_compiled_programs_answer_as_tracr_and_as_the_program(name):
    program = compiled.load(name)
    every = jax.vmap(compiled.forward, in_axes=(None, None, 0))
    every = jax.jit(jax.vmap(every, in_axes=(None, 0, None)))
    places = jnp.arange(compiled.LENGTH)
    logits = every(program.weights, jnp.asarray(program.tokens), places)
    np.testing.assert_allclose(logits, program.logits, atol=1e-5)

    texts = list(itertools.product(WORDS[name], repeat=compiled.LENGTH))
    wanted = np.array([SAID[name](list(text)) for text in texts])
    if program.logits.shape[-1] == 1:
        np.testing.assert_allclose(program.logits[..., 0], wanted, atol=1e-4)
    else:
        said = program.logits.argmax(axis=-1)
        names = {str(w): i for i, w in enumerate(WORDS[name])}
        numbers = [[names.get(str(w), w) for w in row] for row in wanted.tolist()]
        np.testing.assert_array_equal(said, np.array(numbers, int))


@pytest.mark.parametrize("name", compiled.NAMES)
def test_shapley_values_are_what_all_orders_give(name):
    program = compiled.load(name)
    chosen = program.logits.argmax(axis=-1)
    rows, length = np.arange(len(chosen)), compiled.LENGTH
    values = program.logits.astype(np.float64)
    own = np.take_along_axis(values, chosen[..., None], axis=-1)[..., 0]
    number, place = 137, 3
    one = values[:, place, chosen[number, place]]
    same = program.tokens == program.tokens[number]
    marginal = np.zeros(length)
    for order in itertools.permutations(range(length)):
        shown: list[int] = []
        before = one.mean()
        for player in order:
            shown.append(player)
            after = one[same[:, shown].all(axis=1)].mean()
            marginal[player] += (after - before) / math.factorial(length)
            before = after
    np.testing.assert_allclose(program.shapley[number, place], marginal, atol=1e-6)
    # They add up to what the input says beyond the mean of all inputs.
    means = values.mean(axis=0)[np.arange(length), chosen]
    np.testing.assert_allclose(program.shapley.sum(-1), own - means, atol=1e-5)
    assert rows.shape == (243,)


# What the page of this project's reference measured on 24 other inputs, of all five
# positions: how often the highest score is where the largest Shapley value is, and the
# mean rank correlation of their sizes. Straight paths from the mean token, of 64 nodes;
# on `hist` they find nothing, and say that they did not converge.
LEFT_OUT = {
    "reverse": (1.0, 1.0),
    "frac_prevs": (1.0, 1.0),
    "pair_balance": (0.98, 0.87),
    "hist": (0.75, 0.88),
    "sort": (0.85, 0.90),
}
PATHS = {
    "reverse": (1.0, 0.79),
    "frac_prevs": (1.0, 0.97),
    "pair_balance": (0.98, 0.88),
    "hist": None,
    "sort": (0.78, 0.48),
}
# By how much a share and a mean of these inputs may fall short; set on these.
SHARE, MEAN = 0.12, 0.15


def agreement(scores, truth):
    """How often the top is right, and the mean rank correlation where there is one."""
    # Beyond this all is rounding, in which ties would have an order.
    size, real = (np.round(np.abs(each), 5) for each in (scores, truth))
    rows = np.arange(len(real))
    hits = real[rows, size.argmax(axis=1)] >= real.max(axis=1) - 1e-4
    varies = (np.ptp(size, axis=1) > 0) & (np.ptp(real, axis=1) > 0)
    ranks = [np.asarray(spearmanr(size[n], real[n]))[0] for n in np.flatnonzero(varies)]
    return np.mean(hits), np.mean(ranks) if ranks else np.nan


@pytest.mark.parametrize("name", compiled.NAMES)
def test_methods_agree_with_exact_shapley_values_as_was_measured(name):
    program = compiled.load(name)
    random = np.random.default_rng(0)
    rows = np.repeat(random.choice(len(program.tokens), 24, replace=False), 5)
    places = np.tile(np.arange(compiled.LENGTH), 24).astype(np.int32)
    chosen = program.logits[rows, places].argmax(axis=-1).astype(np.int32)
    truth = program.shapley[rows, places]
    every, logits = jnp.asarray(program.tokens), jnp.asarray(program.logits)
    embeddings = np.asarray(program.weights["token_embed"])[program.vocabulary]
    nothing = xv.baselines.embedding(embeddings.mean(axis=0))

    def game(present, tokens, place):
        """The mean answer to all inputs that have the present tokens."""
        alike = jnp.all((every == tokens[None]) | (present < 0.5)[None], axis=1)
        share = alike.astype(jnp.float32)
        return share @ logits[:, place] / jnp.sum(share)

    exact, left_out = xv.exact_shapley(game), xv.leave_one_out(game)
    path = xv.integrated_gradients(
        partial(compiled.forward, program.weights), baseline=nothing, steps=64
    )

    @jax.jit
    @jax.vmap
    def explained(tokens, place, target):
        whole = jnp.ones(compiled.LENGTH)
        return {
            "exact": exact(whole, tokens, place, target=target).scores,
            "left out": left_out(whole, tokens, place, target=target).scores,
            "path": path(tokens, place, target=target),
        }

    found = jax.device_get(explained(program.tokens[rows], places, chosen))
    np.testing.assert_allclose(found["exact"], truth, atol=1e-5)
    hits, ranks = agreement(found["left out"], truth)
    assert hits >= LEFT_OUT[name][0] - SHARE
    assert ranks >= LEFT_OUT[name][1] - MEAN
    converged = found["path"].diagnostics["converged"]
    hits, ranks = agreement(found["path"].scores, truth)
    if PATHS[name] is None:
        assert not converged.any()
        gap = found["path"].diagnostics["completeness_gap"]
        assert np.median(gap) == pytest.approx(1, abs=0.01)
        assert np.mean(np.ptp(found["path"].scores, axis=1) < 1e-5) > 0.75
        return
    # On `sort` too: what is not converged is flagged, right or wrong.
    assert converged.all() == (name != "sort")
    assert converged.any() == (name != "sort")
    assert hits >= PATHS[name][0] - SHARE
    assert ranks >= PATHS[name][1] - MEAN


def test_compiled_programs_are_seen_into():
    for name in compiled.NAMES:
        program = compiled.load(name)
        args = (program.weights, program.tokens[0], jnp.int32(0))
        sites = tracing.sites(compiled.forward, *args)
        attention = [site for site in sites if site.kind == "attention"]
        assert len(attention) == len(program.weights["query"])


@pytest.mark.parametrize("seed", range(planted.SEEDS))
def test_planted_tokens_decide_and_decoys_cannot(seed):
    texts, weights = planted.texts(256), planted.load(seed)
    every = jax.jit(jax.vmap(planted.forward, in_axes=(None, 0)))
    logits = every(weights, texts.tokens)
    assert np.mean(logits.argmax(axis=-1) == texts.label) > 0.99
    # Whatever decoy there is, or none: not one bit of the answer changes.
    rows = np.arange(len(texts.tokens))
    for other in (planted.NOTHING, 4, 5, 6):
        tokens = texts.tokens.copy()
        tokens[rows, texts.decoy] = other
        np.testing.assert_array_equal(every(weights, tokens), logits)
    tokens = texts.tokens.copy()
    tokens[rows, texts.place] = planted.NOTHING
    left = jax.nn.softmax(every(weights, tokens))
    assert np.median(np.max(left, axis=-1)) < 0.6


def test_the_twin_reads_the_mark_and_the_embedded_model_does_not():
    forward, clean, twin = shortcut.twin()
    images, labels = embedded.images()
    images, labels = images[:64], labels[:64]
    others = images[labels != shortcut.LABEL]
    marked = shortcut.mark(others, np.full(len(others), shortcut.LABEL))
    every = jax.jit(jax.vmap(forward, in_axes=(None, 0)))
    called = lambda parameters, data: np.mean(
        every(parameters, data).argmax(axis=-1) == shortcut.LABEL
    )
    assert called(twin, others) < 0.1
    assert called(twin, marked) > 0.9
    assert called(clean, marked) < 0.1
