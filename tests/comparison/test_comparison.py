"""What a comparison is made of: controls, costs, refusals, files and pictures."""

import dataclasses
import io
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from matplotlib.figure import Figure
from rich.console import Console

import xviz_jax as xv
from tests.comparison.sharing import Programs
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax import cli, compare_command, metrics
from xviz_jax.comparison import Comparison, Interval
from xviz_jax.comparison.description import described
from xviz_jax.comparison.result import CEILING, CONTROLS

imputers = metrics.imputers
ZEROS = [imputers.baseline(name="zeros"), imputers.baseline(0.01, name="near")]
WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)


def model(x):
    """Linear; also what the command line is asked about."""
    return x @ WEIGHTS


def positions(x, target=None, key=None):
    """An attention method's form: a class token before the features."""
    scores = jnp.concatenate([jnp.ones(1), x * WEIGHTS[:, target]])
    return xv.Attribution(scores=scores, output=model(x)[target])


def broken(x, target=None, key=None):
    scores = jnp.where(x[0] > 0, x * WEIGHTS[:, target], jnp.nan)
    return xv.Attribution(scores=scores, output=model(x)[target])


def records(count=24):
    return np.random.default_rng(1).normal(size=(count, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def found():
    explainers = {
        "input_x_gradient": xv.input_x_gradient(model),
        "attention": positions,
        "broken": broken,
    }
    return xv.compare(
        model,
        explainers,
        records(),
        positions=np.arange(-1, 6),
        imputers=ZEROS,
        slices=np.arange(24) % 2,
        microbatch=24,
        key=jax.random.key(0),
    )


def test_what_is_measured(found):
    assert found.settings["records"] == 24
    assert found.settings["metrics"][:2] == found.settings["evidence"]
    assert {each.ranking for each in found.summaries} == {
        *found.methods,
        *CONTROLS,
        CEILING,
    }
    # Sparseness asks no imputer, and is measured once.
    assert [s.imputer for s in found.summaries if s.metric == "sparseness"] == [
        None
    ] * 6
    # 3 methods, 2 controls, 2 metrics, 2 imputers, all records and 2 slices.
    assert len(found.tests) == 3 * 2 * 2 * 2 * 3
    for test in found.tests:
        assert test.difference.low <= test.difference.estimate <= test.difference.high
    assert set(found.methods["attention"].slices) == {"0", "1"}
    # How it was asked, as far as that can be read off.
    assert found.settings["key"] == [0, 0]
    assert found.settings["targets"] == "the predicted classes"
    assert found.settings["explainers"] == {
        "input_x_gradient": {"of": "input_x_gradient", "argnums": 0, "at": None},
        "attention": "positions",
        "broken": "broken",
    }


def test_what_a_method_was_made_with_is_read_off():
    table = jnp.ones((30, 2))
    path = xv.integrated_gradients(model, steps=12, baseline=xv.baselines.tokens(4))
    found = described(xv.smooth(path, samples=6, noise=0.5))
    assert {"of", "samples", "noise", "reduce", "explain"} <= set(found)
    assert (found["samples"], found["noise"], found["reduce"]) == (6, 0.5, "mean")
    inner = found["explain"]
    assert inner["quadrature"]["steps"] == 12
    assert inner["quadrature"]["rule"] == "gauss_legendre"
    assert inner["asked"]["baseline"]["of"]["fill"] == 4
    assert "model" not in inner["asked"]
    adaptive = described(xv.integrated_gradients(model, tolerance=0.2, baseline=table))
    assert adaptive["quadrature"]["tolerance"] == 0.2
    assert adaptive["asked"]["baseline"] == "float32[30, 2]"
    rollout = described(jax.jit(xv.attention_rollout(model, query=jnp.int32(3))))
    assert (rollout["of"], rollout["query"]) == ("attention_rollout", 3)
    assert described(partial(positions, key=jax.random.key(5))) == {
        "of": "positions",
        "key": [0, 5],
    }
    json.dumps([found, adaptive, rollout])


def test_a_class_token_belongs_to_no_feature(found):
    same = found.summary("attention", "abpc", "zeros").value
    assert same == found.summary("input_x_gradient", "abpc", "zeros").value
    assert found.agreement["attention"]["input_x_gradient"] == pytest.approx(1)
    with pytest.raises(ValueError, match="say with `positions=`"):
        xv.compare(model, {"a": positions}, records(), key=jax.random.key(0))


def test_failed_records_are_counted_and_not_dropped(found):
    failed = int(np.sum(records()[:, 0] <= 0))
    method = found.methods["broken"]
    assert 0 < failed < 24
    assert method.not_finite == failed
    assert method.verdict == (
        f"not supported: scores are not finite on {failed} of 24 inputs"
    )
    summary = found.summary("broken", "abpc", "zeros")
    assert (summary.flat, summary.undefined) == (failed, {})
    # Where it says nothing it is worth what luck is worth.
    right = found.summary("attention", "abpc", "zeros").value.estimate
    assert 0 < summary.value.estimate < right


def test_what_scores_do_not_change_with_is_noticed():
    def made(scores):
        def explain(weights, x, target=None, key=None):
            found = scores(weights, x, target)
            return xv.Attribution(scores=found, output=(x @ weights)[target])

        return explain

    more = lambda target: 1.0 + target.astype(jnp.float32)
    explainers = {
        "exact": made(lambda weights, x, target: x * weights[:, target]),
        "input": made(lambda weights, x, target: x * more(target)),
        "class": made(lambda weights, x, target: x * weights[:, 0] * more(target)),
        "flat": made(lambda weights, x, target: jnp.zeros(6) * more(target)),
        "some": made(
            lambda weights, x, target: jnp.where(x[0] > 0, x * weights[:, target], 2.0)
        ),
    }
    found = xv.compare(
        lambda weights, x: x @ weights,
        explainers,
        records(),
        shared=(WEIGHTS,),
        targets=1,
        imputers=ZEROS,
        microbatch=24,
        key=jax.random.key(0),
    )
    assert found.methods["exact"].word == "supported"
    assert found.methods["exact"].untried == []
    assert found.verdict["input"].startswith(
        "not supported: random weights leave its scores as they are, rank correlation "
        "1 [1, 1], n = 24"
    )
    assert found.verdict["class"].startswith(
        "not supported: another class has the same scores, rank correlation 1 [1, 1]"
    )
    # What ranks nothing is not the same for all classes, it is nothing.
    method = found.methods["flat"]
    assert method.verdict == (
        "not supported: it scores all features alike on 24 of 24 inputs"
    )
    assert method.untried == ["random weights", "another class"]
    for similarity in (method.similarity_under_chance, method.similarity_of_classes):
        assert similarity is not None
        assert (similarity.records, similarity.undefined) == (24, 24)
        assert np.isnan(similarity.value.estimate)
    # And where it ranks something, it is that which is compared.
    flat = int(np.sum(records()[:, 0] <= 0))
    method = found.methods["some"]
    assert method.flat == flat
    assert method.similarity_of_classes is not None
    assert method.similarity_of_classes.undefined == flat


def test_padding_gets_nothing():
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 9, (24, 6)).astype(np.int32)
    lengths = rng.integers(3, 7, 24)
    mask = np.arange(6) < lengths[:, None]
    tokens = np.where(mask, tokens, 0)
    table = jnp.asarray(rng.normal(size=(9, 3)), jnp.float32)

    def text(tokens, mask):
        return jnp.sum(table[tokens] * mask[:, None], axis=0)

    def seen(tokens, mask, target=None, key=None):
        scores = table[tokens, target] * mask
        return xv.Attribution(scores=scores, output=text(tokens, mask)[target])

    def filler(tokens, mask, target=None, key=None):
        found = seen(tokens, mask, target)
        return dataclasses.replace(found, scores=jnp.where(mask, found.scores, 0.1))

    programs = Programs()

    def compare(padding):
        with programs.shared():
            return xv.compare(
                text,
                {"seen": seen, "filler": filler},
                (tokens, mask.astype(np.float32)),
                padding=padding,
                imputers=[imputers.baseline(), imputers.baseline(0.01, name="near")],
                key=jax.random.key(0),
            )

    told = compare(~mask)
    padded = int(np.sum(lengths < 6))
    assert told.methods["seen"].padded == 0
    assert told.methods["seen"].untried == ["random weights"]
    assert told.verdict["filler"] == (
        f"not supported: it gives padding a score on {padded} of 24 inputs"
    )
    untold = compare(None)
    assert untold.methods["seen"].padded is None
    assert untold.verdict["seen"].endswith("; not tried: random weights, padding")
    assert untold.methods["filler"].word != "not supported"


def test_a_ranking_that_changes_nothing_is_worth_nothing():
    # Only the first feature counts, and the method names it last.
    first = lambda x: jnp.stack([x[0], -x[0]])

    def last(x, target=None, key=None):
        scores = jnp.arange(6, dtype=x.dtype) + first(x)[target]
        return xv.Attribution(scores=scores, output=first(x)[target])

    rows = records() + 3
    key = jax.random.key(0)
    found = xv.compare(
        first, {"last": last}, rows, imputers=ZEROS, microbatch=24, key=key
    )
    summary = found.summary("last", "comprehensiveness", "zeros")
    assert summary.value.estimate == 0
    assert (summary.flat, summary.undefined) == (0, {})
    assert found.methods["last"].word == "not supported"
    luck = found.summary("random", "comprehensiveness", "zeros").value
    assert luck.low > 0


def test_costs(found):
    cost = found.methods["input_x_gradient"].evaluations
    assert cost is not None
    assert cost > 1
    assert all(method.milliseconds > 0 for method in found.methods.values())


def test_a_comparison_is_the_same_after_saving(found, tmp_path):
    path = tmp_path / "comparison.json"
    found.save(path)
    text = path.read_text()
    assert "NaN" not in text
    read = Comparison.load(path)
    assert read.verdict == found.verdict
    again = tmp_path / "again.json"
    read.save(again)
    assert again.read_text() == text
    assert read.tests == found.tests
    # Broken scores have no shares on some records, which are null, not zero.
    assert json.loads(text)["methods"]["broken"]["not_finite"] > 0
    assert read.methods["attention"] == found.methods["attention"]
    assert read.settings == found.settings
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no comparison"):
        Comparison.load(path)


def test_numbers_that_are_not_numbers_are_null(tmp_path):
    nothing = Interval(float("nan"), float("nan"), float("nan"))
    one = Comparison(
        methods={},
        summaries=[],
        tests=[],
        agreement={"a": {"b": float("nan")}},
        settings={"x": nothing.estimate},
    )
    one.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["agreement"] == {
        "a": {"b": None}
    }
    read = Comparison.load(tmp_path / "c.json")
    assert np.isnan(read.agreement["a"]["b"])


def test_the_figure(found):
    axes = found.plot()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"broken: not supported", "random", "position only"} <= set(labels)
    assert axes.get_ylabel().startswith("abpc")
    mine = Figure().add_subplot()
    assert found.plot(mine, metric="comprehensiveness") is mine
    with pytest.raises(ValueError, match="nothing was measured"):
        found.plot(metric="magic")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"explainers": {}}, "at least one method"),
        ({"explainers": {"random": positions}}, "none called"),
        ({"draws": 5}, "`draws` is at least 20, got 5"),
        ({"level": 1.0}, "`level` between 0 and 1"),
        ({"imputers": [imputers.mean()]}, "at least two, of different names"),
        ({"imputers": [imputers.mean(), imputers.mean()]}, "of different names"),
        ({"targets": np.full(24, 3)}, "classes from 0 to 2, got 3 to 3"),
        ({"targets": np.zeros(5, int)}, "`targets` are None"),
        ({"slices": np.arange(24)}, "at least two records"),
        ({"slices": np.zeros(5)}, "a label for each of 24 records"),
        ({"padding": np.zeros((24, 5), bool)}, "`padding` is bool.24, 6., of"),
        ({"padding": np.zeros((24, 6))}, "of each record's features, got float64"),
        ({"positions": np.arange(5)}, "`positions` are the numbers of 6 features"),
        ({"records": records()[:1]}, "at least two"),
        ({"key": None}, "`compare` is random"),
    ],
)
def test_refusals(options, said):
    call = {
        "explainers": {"a": xv.input_x_gradient(model)},
        "records": records(),
        "key": jax.random.key(0),
        "microbatch": 24,
        **options,
    }
    explainers, rows = call.pop("explainers"), call.pop("records")
    with pytest.raises(ValueError, match=said):
        xv.compare(model, explainers, rows, **call)


def test_metrics_that_need_more_than_scores_are_refused():
    with pytest.raises(ValueError, match="measures scores alone"):
        xv.compare(
            model,
            {"a": xv.saliency(model)},
            records(),
            imputers=ZEROS,
            metrics=[partial(metrics.random_logit, explain=xv.saliency(model))],
            microbatch=24,
            key=jax.random.key(0),
        )


# Two pairs of features that can partly stand in for each other, and four others. Of
# equal values each of a pair deserves half of what they share, and leaving out one of
# them shows only what is its own.
SHARED, OWN = 2.0, 1.0
OTHERS = np.array([1.5, 1.0, 0.5, 0.25], np.float32)


def redundant(x):
    pairs = jnp.maximum(x[0], x[1]) + jnp.maximum(x[2], x[3])
    alone = OWN * jnp.sum(x[:4]) + jnp.sum(jnp.asarray(OTHERS) * x[4:])
    return (SHARED * pairs + alone)[None]


FAITHFUL = {
    "deletion": metrics.deletion,
    "insertion": metrics.insertion,
    "abpc": metrics.abpc,
    "comprehensiveness": partial(metrics.comprehensiveness, output="logit"),
    "sufficiency": partial(metrics.sufficiency, output="logit"),
    # The best scaling may be negative, and then the inverse is as good.
    "infidelity": partial(metrics.infidelity, normalize=False),
    "sensitivity_n": metrics.sensitivity_n,
    "faithfulness_correlation": partial(metrics.faithfulness_correlation, fraction=0.5),
}


@pytest.mark.parametrize("name", FAITHFUL)
def test_oracle_before_leave_one_out_before_luck_before_the_inverse(name):
    metric = FAITHFUL[name](redundant)
    random = np.random.default_rng(3)
    values = random.uniform(0.5, 1.5, (32, 6)).astype(np.float32)
    x = np.repeat(values, [2, 2, 1, 1, 1, 1], axis=1)
    oracle = x * np.concatenate([np.full(4, SHARED / 2 + OWN), OTHERS])
    left_out = x * np.concatenate([np.full(4, OWN), OTHERS])
    luck = random.normal(size=x.shape)
    scores = np.stack([oracle, left_out, luck, -oracle], axis=1).astype(np.float32)

    @jax.jit
    @jax.vmap
    def measured(x, scores, key):
        return jax.vmap(lambda each: metric(x, each, target=0, key=key).value)(scores)

    keys = jax.random.split(jax.random.key(4), 32)
    found = np.asarray(measured(x, scores, keys), np.float64).mean(axis=0)
    if metric.better == "lower":
        found = -found
    assert list(np.argsort(-found)) == [0, 1, 2, 3], found


def test_road_of_images_orders_them_so_too():
    """Bright pixels apart on a dark ground, so that painting over takes them away."""
    places = np.array([0, 2, 4, 12, 14, 16, 24, 26])

    def model(image):
        return jnp.append(redundant(image.ravel()[places]), 6.0)

    metric = metrics.road(model, fractions=[n / 36 for n in range(1, 9)], noise=0.0)
    random = np.random.default_rng(3)
    values = random.uniform(0.5, 1.5, (48, 6)).astype(np.float32)
    values = np.repeat(values, [2, 2, 1, 1, 1, 1], axis=1)
    images, oracle, left_out = (np.zeros((48, 36), np.float32) for _ in range(3))
    images[:, places] = values
    oracle[:, places] = values * np.concatenate([np.full(4, SHARED / 2 + OWN), OTHERS])
    left_out[:, places] = values * np.concatenate([np.full(4, OWN), OTHERS])
    luck = random.normal(size=images.shape)
    scores = np.stack([oracle, left_out, luck, -oracle], axis=1).astype(np.float32)

    @jax.jit
    @jax.vmap
    def measured(image, scores, key):
        one = lambda each: metric(
            image.reshape(6, 6), each.reshape(6, 6), target=0, key=key
        )
        return jax.vmap(lambda each: one(each).value)(scores)

    keys = jax.random.split(jax.random.key(4), 48)
    found = np.asarray(measured(images, scores, keys), np.float64).mean(axis=0)
    assert metric.better == "lower"
    assert list(np.argsort(found)) == [0, 1, 2, 3], found
    # What is dark already says nothing.
    assert found[3] == 1


def test_the_command_compares_a_function(tmp_path, capsys):
    data, out = tmp_path / "data.npz", tmp_path / "out"
    np.savez(data, records=records(16), slices=np.array(["a", "b"] * 8))
    asked = ["compare", "--model", "tests.comparison.test_comparison:model"]
    asked += ["--data", str(data), "--out", str(out), "--microbatch", "16"]
    assert cli.main([*asked, "--methods", "input_x_gradient,saliency"]) == 0
    said = capsys.readouterr().out
    read = Comparison.load(out / "comparison.json")
    assert set(read.verdict) == {"input_x_gradient", "saliency"}
    assert set(read.methods["saliency"].slices) == {"a", "b"}
    for name, method in read.methods.items():
        assert f"{name}: {method.word}" in said
    assert "slices, with the features that carry one alone" in said
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_raised_is_printed(found):
    share = Interval(0.5, 0.4, 0.6)
    method = dataclasses.replace(
        found.methods["attention"], raised=[("1", 3, share, 0.05)]
    )
    console = Console(width=120, record=True, file=io.StringIO())
    shown = dataclasses.replace(found, methods={**found.methods, "attention": method})
    compare_command.show(shown, console)
    said = console.export_text()
    assert "feature 3: 50%, else 5%" in said
    assert (
        "attention, 1: feature 3 carries 0.5 [0.4, 0.6] of its scores, 0.05 elsewhere"
    ) in said


def test_the_command_compares_a_published_vision_transformer(tmp_path):
    folder = Path(__file__).parents[1] / "models" / "goldens" / "vision" / "vit"
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 3))
    np.save(tmp_path / "images.npy", images.astype(np.float32))
    asked = ["compare", "--model", str(folder), "--out", str(tmp_path / "out")]
    asked += ["--data", str(tmp_path / "images.npy"), "--microbatch", "8"]
    asked += ["--methods", "attention_rollout", "--steps", "2"]
    assert cli.main(asked) == 0
    read = Comparison.load(tmp_path / "out" / "comparison.json")
    # Patches of four pixels, as the model's own; its class token is none of them.
    assert read.settings["features"] == 16
    method = read.methods["attention_rollout"]
    assert method.word == "not applicable"
    assert method.similarity_under_chance is not None
    assert sum(method.shares["all"]) == pytest.approx(1)


def text_checkpoint(name, folder):
    """A stored checkpoint with a tokenizer of its own, and padded texts for it."""
    stored = Path(__file__).parents[1] / "models" / "goldens" / "text" / name
    folder = shutil.copytree(stored, folder / name)
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: n for n, word in enumerate([*special, *map(str, range(4, 24))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[PAD]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 24, (10, 8))
    ids[:, 0], lengths = 1, rng.integers(5, 9, 10)
    ids[np.arange(10), lengths - 1] = 2
    ids[np.arange(8) >= lengths[:, None]] = 0
    np.save(folder / "texts.npy", ids)
    return folder


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("bert_sequence", "integrated_gradients"),
        # Read at the last token that is no padding.
        ("llama_sequence", "attention_relevance"),
        ("bert", "saliency"),
    ],
)
def test_the_command_compares_a_published_text_model(name, method, tmp_path, capsys):
    folder = text_checkpoint(name, tmp_path)
    asked = ["compare", "--model", str(folder), "--out", str(tmp_path / "out")]
    asked += ["--data", str(folder / "texts.npy"), "--microbatch", "10"]
    asked += ["--methods", method, "--steps", "2"]
    classes = name != "bert"
    if not classes:
        # A model of features answers no question of its own.
        assert cli.main(asked) == 2
        assert "of `--against`" in capsys.readouterr().err
        asked += ["--against", "7 9"]
    assert cli.main(asked) == 0
    read = Comparison.load(tmp_path / "out" / "comparison.json")
    assert read.settings["features"] == 8
    assert read.settings["class_specific"] == classes
    found = read.methods[method]
    assert found.padded == 0
    assert found.untried == []
    assert (found.similarity_of_classes is not None) == classes
    made = read.settings["explainers"][method]
    if method == "integrated_gradients":
        # Padding stands for words, and what begins and ends a text stays.
        fill = {"of": "tokens", "fill": 0, "keep": [1, 2]}
        assert made["asked"]["baseline"]["of"] == fill


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "magic"], "`--methods` are among"),
        (["--methods", "conductance"], "conductance needs ['at']"),
        (["--model", "nowhere:model", "--data", "x.npy"], "holds no arrays"),
        (["--model", "tests.comparison.test_comparison:model"], "pass `--data`"),
        (["--limit", "1"], "at least 2, got 1"),
        (["--against", "a text"], "for a checkpoint without classes"),
        (["--data", "DATA"], "holds no rows of records"),
    ],
)
def test_a_bad_call_is_told(arguments, said, tmp_path, capsys):
    np.save(tmp_path / "flat.npy", np.zeros(3))
    arguments = [str(tmp_path / "flat.npy") if a == "DATA" else a for a in arguments]
    assert cli.main(["compare", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
