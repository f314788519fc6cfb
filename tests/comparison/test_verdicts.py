"""The comparison says of models whose truth is known what is true of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xviz_jax as xv
from tests.comparison import compiled, planted
from tests.comparison.sharing import Programs
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax import metrics

imputers = metrics.imputers
SHORT = partial(metrics.abpc, steps=5)


SEEDS = range(5)


def of_program(name, methods, *, count=48, among=range(5), quadrature=None, **options):
    """Comparisons on random inputs and positions of a compiled program, five seeds."""
    program = compiled.load(name)
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
    programs = Programs()
    for seed in SEEDS:
        random = np.random.default_rng(seed)
        rows = random.choice(len(program.tokens), count, replace=False)
        places = random.choice(among, count).astype(np.int32)
        with programs.shared():
            yield xv.compare(
                forward,
                {method: known[method] for method in methods},
                (program.tokens[rows], places),
                positions=np.arange(-1, compiled.LENGTH),
                padding=np.zeros((count, compiled.LENGTH), bool),
                imputers=[
                    imputers.custom(draw, name="uniform", random=True),
                    imputers.baseline(nothing, name="mean"),
                ],
                metrics=[],
                microbatch=count,
                key=jax.random.key(seed),
                **options,
            )


def test_rollout_is_refused_on_reverse():
    both = ("attention_rollout", "integrated_gradients")
    few = {"steps": 16, "tolerance": 0.1}
    for found in of_program("reverse", both, quadrature=few):
        assert found.methods["attention_rollout"].word == "not applicable"
        assert found.methods["attention_rollout"].class_blind
        assert found.methods["integrated_gradients"].word == "supported"
        assert found.methods["integrated_gradients"].untried == ["random weights"]
        truth = found.summary("integrated_gradients", "abpc", "uniform").value
        chance = found.summary("random", "abpc", "uniform").value
        assert chance.low < 0 < chance.high
        assert truth.low > chance.high


def test_rollout_is_refused_on_reverse_where_the_class_is_not_the_question():
    """It names the position that is read, by the residual, and the answer's second.

    In the middle the two are one, and it is right whatever the model does: of records
    of which a fifth are such it is too often right to be refused by all five draws.
    """
    asked = {"class_specific": False, "among": (0, 1, 3, 4)}
    for found in of_program("reverse", ["attention_rollout"], **asked):
        method = found.methods["attention_rollout"]
        assert method.class_blind is None
        assert method.verdict.startswith(
            "not supported: it does not beat the random ranking by comprehensiveness, -"
        )


def test_unconverged_integrated_gradients_are_flagged_on_hist():
    for found in of_program("hist", ["integrated_gradients"]):
        method = found.methods["integrated_gradients"]
        assert method.verdict == "not supported: it did not converge on 48 of 48 inputs"
        assert method.unconverged == 48


def test_planted_tokens_are_found_by_supported_methods_and_decoys_never():
    nothing, model, programs = planted.NOTHING, planted.forward, Programs()
    explainers = {
        "integrated_gradients": xv.integrated_gradients(
            model,
            baseline=xv.baselines.tokens(nothing),
            steps=64,
            tolerance=0.1,
            argnums=1,
        ),
        "attention_rollout": xv.attention_rollout(model),
        "attention_relevance": xv.attention_relevance(model),
        "saliency": xv.saliency(model, argnums=1),
        "input_x_gradient": xv.input_x_gradient(model, argnums=1),
    }

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0, 0))
    def scores_of(weights, tokens, label):
        # The class token is no part of the text.
        return {
            name: explain(weights, tokens, target=label).scores[-planted.LENGTH :]
            for name, explain in explainers.items()
        }

    found_on, fooled_on = ({name: [] for name in explainers} for _ in range(2))
    for seed in SEEDS:
        texts, weights = planted.texts(24, seed), planted.load(seed)
        with programs.shared():
            found = xv.compare(
                model,
                explainers,
                texts.tokens,
                targets=texts.label,
                shared=(weights,),
                positions=np.arange(-1, planted.LENGTH),
                padding=np.zeros(texts.tokens.shape, bool),
                imputers=[
                    imputers.mask_token(nothing),
                    imputers.baseline(xv.baselines.mean(0), name="mean"),
                ],
                metrics=[SHORT],
                microbatch=24,
                key=jax.random.key(seed),
            )
        scores = scores_of(weights, texts.tokens, texts.label)
        for name, method in found.methods.items():
            if method.word == "supported":
                top = np.asarray(scores[name]).argmax(axis=1)
                found_on[name].append(np.mean(top == texts.place))
                fooled_on[name].append(np.mean(top == texts.decoy))
        assert found.methods["attention_rollout"].word == "not applicable"
        method = found.methods["integrated_gradients"]
        assert method.verdict.startswith("supported: "), seed
        assert method.untried == []
        # A decoy is nothing, and gets nothing.
        own = np.asarray(scores["integrated_gradients"])
        np.testing.assert_array_equal(own[np.arange(24), texts.decoy], 0.0)
        # The weights are noticed.
        chance = method.similarity_under_chance
        assert chance is not None
        assert chance.value.high < 0.5
        place = found.summary("integrated_gradients", "abpc", "mask_token").place
        assert place is not None
        assert place.low > 0.8
    # Of those that are not class-blind, all but one are supported on all seeds.
    counts = {name: len(shares) for name, shares in found_on.items()}
    assert counts.pop("attention_rollout") == 0
    assert counts.pop("input_x_gradient") >= 3
    assert set(counts.values()) == {len(SEEDS)}
    for name, shares in found_on.items():
        assert min(shares, default=1) > 0.5, name
    for name in ("integrated_gradients", "saliency", "input_x_gradient"):
        assert np.median(found_on[name]) >= 0.9, name
    # What is worth its embedding, which is zero, is never on top. Gradients alone, of
    # embeddings or of attention, are not: there the decoy is first by accident.
    for name in ("integrated_gradients", "input_x_gradient"):
        assert max(fooled_on[name]) == 0, name
    for name in ("saliency", "attention_relevance"):
        assert np.mean(fooled_on[name]) < 0.5 / planted.LENGTH, name


def test_a_constant_model_says_nothing():
    weights, programs = np.zeros((6, 3), np.float32), Programs()

    def model(x):
        return x @ weights + jnp.arange(3, dtype=x.dtype)

    explainers = {
        "integrated_gradients": xv.integrated_gradients(model, steps=2),
        "saliency": xv.saliency(model),
    }
    for seed in SEEDS:
        x = np.random.default_rng(seed).normal(size=(16, 6)).astype(np.float32)
        key = jax.random.key(seed)
        with programs.shared():
            found = xv.compare(model, explainers, x, microbatch=16, key=key)
        for name, method in found.methods.items():
            assert method.verdict == (
                "inconclusive: 16 of 16 inputs cannot be measured, for the model's "
                "output does not change"
            )
            assert method.flat == 16
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
