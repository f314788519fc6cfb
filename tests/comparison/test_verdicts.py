"""The comparison says of models whose truth is known what is true of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.comparison import compiled, planted
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax import metrics

imputers = metrics.imputers
SHORT = partial(metrics.abpc, steps=5)


def of_program(name, methods, *, count=48, quadrature=None, **options):
    """A comparison on random inputs and positions of one compiled program."""
    program = compiled.load(name)
    random = np.random.default_rng(0)
    rows = random.choice(len(program.tokens), count, replace=False)
    places = random.integers(0, compiled.LENGTH, count).astype(np.int32)
    embeddings = np.asarray(program.weights["token_embed"])[program.vocabulary]
    nothing = xv.baselines.embedding(embeddings.mean(axis=0))
    vocabulary = jnp.asarray(program.vocabulary)

    def draw(tokens, present, key):
        other = jax.random.choice(key, vocabulary, tokens.shape)
        return jnp.where(present, tokens, other)

    forward = partial(compiled.forward, program.weights)

    def rollout(*args, target=None, key=None):
        # Read where the answer is, behind the token that begins every input.
        explain = xv.attention_rollout(forward, query=args[-1] + 1)
        return explain(*args, target=target, key=key)

    known = {
        "attention_rollout": rollout,
        "integrated_gradients": xv.integrated_gradients(
            forward, baseline=nothing, **(quadrature or {})
        ),
    }
    return xv.compare(
        forward,
        {method: known[method] for method in methods},
        (program.tokens[rows], places),
        positions=np.arange(-1, compiled.LENGTH),
        imputers=[
            imputers.custom(draw, name="uniform", random=True),
            imputers.baseline(nothing, name="mean"),
        ],
        metrics=[],
        microbatch=count,
        key=jax.random.key(0),
        **options,
    )


def test_rollout_is_refused_on_reverse():
    both = ("attention_rollout", "integrated_gradients")
    few = {"steps": 16, "tolerance": 0.1}
    found = of_program("reverse", both, quadrature=few)
    assert found.verdict["attention_rollout"].startswith("not applicable: ")
    assert found.methods["attention_rollout"].class_blind
    assert found.verdict["integrated_gradients"].startswith("supported: ")
    truth = found.summary("integrated_gradients", "abpc", "uniform").value
    chance = found.summary("random", "abpc", "uniform").value
    assert chance.low < 0 < chance.high
    assert truth.low > chance.high
    # Not even where the class is not the question.
    other = of_program("reverse", both[:1], class_specific=False)
    assert other.methods["attention_rollout"].class_blind is None
    assert not other.verdict["attention_rollout"].startswith("supported")


def test_unconverged_integrated_gradients_are_flagged_on_hist():
    found = of_program("hist", ("integrated_gradients",))
    method = found.methods["integrated_gradients"]
    assert method.word == "not supported"
    assert "did not converge on 48 of 48 inputs" in method.verdict
    assert method.unconverged == 48


def of_planted(seed, texts):
    weights, nothing = planted.load(seed), planted.NOTHING
    pad = xv.baselines.tokens(nothing)
    explainers = {
        "integrated_gradients": xv.integrated_gradients(
            planted.forward, baseline=pad, steps=64, tolerance=0.1, argnums=1
        ),
    }
    found = xv.compare(
        planted.forward,
        explainers,
        texts.tokens,
        targets=texts.label,
        shared=(weights,),
        imputers=[
            imputers.mask_token(nothing),
            imputers.baseline(xv.baselines.mean(0), name="mean"),
        ],
        metrics=[SHORT],
        microbatch=len(texts.tokens),
        key=jax.random.key(seed),
    )
    explain = jax.jit(jax.vmap(explainers["integrated_gradients"], in_axes=(None, 0)))
    return found, explain(weights, texts.tokens).scores


def test_planted_tokens_are_found_by_supported_methods_and_decoys_never():
    texts = planted.texts(24)
    rows, hits = np.arange(24), []
    for seed in range(planted.SEEDS):
        found, scores = of_planted(seed, texts)
        assert found.methods["integrated_gradients"].word == "supported", seed
        top = np.asarray(scores).argmax(axis=1)
        hits.append(np.mean(top == texts.place))
        assert not np.any(top == texts.decoy), seed
        # A decoy is nothing, and gets nothing.
        np.testing.assert_array_equal(np.asarray(scores)[rows, texts.decoy], 0.0)
        # The weights are noticed.
        chance = found.methods["integrated_gradients"].similarity_under_chance
        assert chance is not None
        assert chance.high < 0.5
        place = found.summary("integrated_gradients", "abpc", "mask_token").place
        assert place is not None
        assert place.low > 0.8
    assert np.median(hits) >= 0.9


def test_a_constant_model_says_nothing():
    weights = np.zeros((6, 3), np.float32)

    def model(x):
        return x @ weights + jnp.arange(3, dtype=x.dtype)

    x = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    explainers = {
        "integrated_gradients": xv.integrated_gradients(model, steps=2),
        "saliency": xv.saliency(model),
    }
    found = xv.compare(model, explainers, x, microbatch=16, key=jax.random.key(0))
    for name, method in found.methods.items():
        assert method.verdict == (
            "inconclusive: 16 of 16 inputs cannot be measured, for the model's output "
            "does not change"
        )
        assert np.all(np.isnan(method.shares["all"]))
        for imputer in ("zeros", "mean"):
            summary = found.summary(name, "abpc", imputer)
            assert np.isnan(summary.value.estimate)
            assert summary.place is None
            assert summary.undefined == {"the model's output does not change": 16}


def exact(weights, squared):
    """A linear or additive model, its exact explainer and one that is its inverse."""

    def parts(x, target):
        moved = jnp.square(x) if squared else x
        return moved * weights[:, target]

    def model(x):
        return (jnp.square(x) if squared else x) @ weights

    def explain(x, target=None, key=None):
        return xv.Attribution(scores=parts(x, target), output=model(x)[target])

    def inverse(x, target=None, key=None):
        return xv.Attribution(scores=-parts(x, target), output=model(x)[target])

    def luck(x, target=None, key=None):
        assert key is not None
        scores = jax.random.normal(key, x.shape)
        return xv.Attribution(scores=scores, output=model(x)[target])

    explainers = {"exact": explain, "inverse": inverse, "luck": luck}
    return model, explainers


@pytest.mark.parametrize("squared", [False, True], ids=["linear", "additive"])
def test_what_is_exact_is_supported_and_its_inverse_is_not(squared):
    random = np.random.default_rng(1)
    weights = jnp.asarray(random.normal(size=(8, 3)), jnp.float32)
    x = random.normal(size=(48, 8)).astype(np.float32)
    model, explainers = exact(weights, squared)
    labels = np.where(x[:, 0] > 0, "up", "down")
    # Of an additive model zeros are nothing, and the mean is something.
    nothing = [imputers.baseline(name="zeros"), imputers.baseline(0.01, name="near")]
    found = xv.compare(
        model,
        explainers,
        x,
        slices=labels,
        imputers=nothing,
        microbatch=48,
        key=jax.random.key(2),
    )
    assert found.methods["exact"].word == "supported"
    assert found.methods["inverse"].word == "not supported"
    assert found.methods["luck"].word != "supported"
    assert {v.partition(":")[0] for v in found.methods["exact"].slices.values()} == {
        "supported"
    }
    place = found.summary("exact", "abpc", "zeros").place
    ceiling = found.summary("leave one out", "abpc", "zeros").place
    assert place is not None
    assert ceiling is not None
    # Leaving out one is exact here, so both stand at 1, and luck at 0.
    assert place.estimate == pytest.approx(1, abs=1e-5)
    assert ceiling.estimate == 1
    assert found.agreement["exact"]["inverse"] == pytest.approx(-1, abs=1e-5)
    assert found.agreement["exact"]["exact"] == pytest.approx(1, abs=1e-5)
