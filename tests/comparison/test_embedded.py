"""The embedded model, with and without a shortcut; and the demo's verdict.

Compiled with all optimizations, for here programs run longer than they compile.
"""

import json
from functools import partial

import jax
import numpy as np
import pytest

import xviz_jax as xv
from tests.comparison import shortcut
from tests.comparison.sharing import Programs
from xviz_jax import batch, cli, compare_command, compare_subject, demo, metrics
from xviz_jax.comparison import Comparison, concentration, in_words
from xviz_jax.comparison.resampling import Resamples
from xviz_jax.models import embedded

SHIRTS, OTHERS = 24, 32


def path(forward):
    """Integrated gradients, as exactly as a share of them is asked for."""
    return xv.integrated_gradients(forward, steps=6, chunk=1, tolerance=1.0, argnums=1)


@pytest.fixture(scope="module")
def marked() -> tuple[np.ndarray, np.ndarray]:
    """Images whose shirts are marked, these first, and their labels."""
    images, labels = embedded.images()
    shirts = np.flatnonzero(labels == shortcut.LABEL)[:SHIRTS]
    others = np.flatnonzero(labels != shortcut.LABEL)[:OTHERS]
    chosen = np.concatenate([shirts, others])
    return shortcut.mark(images[chosen], labels[chosen]), labels[chosen]


def test_a_comparison_exposes_a_shortcut(marked):
    """Of the fine-tuned twin; and says nothing of the kind of the model itself."""
    forward, clean, twin = shortcut.twin()
    chosen = np.concatenate([np.arange(8), SHIRTS + np.arange(4)])
    images, labels = (each[chosen] for each in marked)
    programs = Programs()

    def compare(parameters):
        with programs.shared():
            found = xv.compare(
                forward,
                {"integrated_gradients": path(forward)},
                images,
                targets=labels,
                class_specific=False,
                shared=(parameters,),
                groups=xv.patches((28, 28), 4),
                slices=np.where(labels == shortcut.LABEL, "shirt", "other"),
                metrics=[
                    partial(metrics.abpc, steps=2),
                    partial(metrics.comprehensiveness, fractions=(0.1,)),
                ],
                microbatch=12,
                key=jax.random.key(0),
            )
        return found.methods["integrated_gradients"]

    found, other = compare(twin), compare(clean)
    ((name, feature, share, elsewhere),) = found.raised
    assert (name, feature) == ("shirt", 0)
    assert share.low > 0.2
    assert share.estimate > 4 * elsewhere
    assert found.shares["shirt"][0] == share.estimate
    assert np.argmax(found.shares["shirt"]) == 0
    said = found.slices["shirt"]
    assert said.endswith(f"; {in_words(0, share, elsewhere)}")
    assert "feature 0 carries 0." in said
    assert "feature" not in found.slices["other"]
    assert other.raised == []
    assert "feature" not in "".join(other.slices.values())
    assert other.shares["shirt"][0] < found.shares["shirt"][0] / 2


def test_five_draws_of_records_expose_it_and_clear_the_model_without(marked):
    """As the comparison does; of one twin, for five would take five trainings."""
    forward, clean, twin = shortcut.twin()
    images, labels = marked
    groups = xv.patches((28, 28), 4)

    def explain(parameters, row):
        image, label = row
        return path(forward)(parameters, image, target=label)

    for parameters, wanted in ((twin, [("shirt", 0)]), (clean, [])):
        run = batch.run(
            explain, (images, labels.astype(np.int32)), shared=(parameters,)
        )
        scores = run.attribution.scores.reshape(len(labels), -1)
        by_patch = scores @ np.eye(49)[groups.ravel()]
        for seed in range(5):
            random = np.random.default_rng(seed)
            rows = np.concatenate(
                [
                    random.choice(SHIRTS, 16, replace=False),
                    SHIRTS + random.choice(OTHERS, 20, replace=False),
                ]
            )
            shirt = labels[rows] == shortcut.LABEL
            assert shirt.sum() == 16
            members = {"shirt": shirt, "other": ~shirt}
            raised = concentration.raised(
                concentration.shares(by_patch[rows]),
                members,
                {
                    k: Resamples.draw(int(m.sum()), 2000, random)
                    for k, m in members.items()
                },
                level=0.95,
                share=0.2,
                times=4.0,
            )
            assert [(slice_, feature) for slice_, feature, *_ in raised] == wanted, seed


def test_the_command_compares_the_embedded_model(tmp_path, capsys):
    """All of it as it is, cheaply: one method and short curves on eight images."""
    out = tmp_path / "out"
    asked = ["compare", "--limit", "8", "--steps", "2", "--out", str(out)]
    assert cli.main([*asked, "--methods", "attention_rollout"]) == 0
    said = capsys.readouterr().out
    read = Comparison.load(out / "comparison.json")
    method = read.methods["attention_rollout"]
    assert method.word == "not applicable"
    assert f"attention_rollout: {method.verdict}"[:60] in said.replace("\n", " ")
    assert method.untried == []
    assert (read.settings["records"], read.settings["features"]) == (8, 49)
    assert read.settings["explainers"]["attention_rollout"]["query"] == 0
    # Leave-one-out is at 1 where it differs from luck, and luck at 0.
    for imputer in ("black", "blur"):
        ceiling = read.summary("leave one out", "comprehensiveness", imputer)
        assert ceiling.place is not None
        assert ceiling.place.estimate == 1
        luck = read.summary("random", "comprehensiveness", imputer)
        assert ceiling.value.estimate > luck.value.estimate
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_says_which_method_may_be_believed(tmp_path, monkeypatch):
    weights = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    model = lambda x: x @ weights
    x = np.random.default_rng(1).normal(size=(16, 6)).astype(np.float32)
    asked = []

    def judged(subject, methods, *, key, **options):
        # The embedded model itself is compared above; here it would take too long.
        asked.append((subject, methods))
        saliency = {"saliency": xv.saliency(model)}
        return xv.compare(model, saliency, x, microbatch=16, key=key)

    monkeypatch.setattr(compare_command, "judged", judged)
    out = tmp_path / "demo"
    command = ["demo", "--out", str(out), "--limit", "2", "--methods", "saliency"]
    assert cli.main([*command, "--compare", "2"]) == 0
    summary = json.loads((out / "summary.json").read_text())["comparison"]
    saved = Comparison.load(out / "comparison.json")
    assert summary["verdict"] == saved.verdict
    places = summary["random 0, leave one out 1"]
    assert set(places) == {"abpc", "comprehensiveness"}
    place = saved.summary("saliency", "abpc", "zeros").place
    assert place is not None
    assert places["abpc"]["zeros"]["saliency"] == {
        "estimate": place.estimate,
        "low": place.low,
        "high": place.high,
    }
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")

    ((subject, methods),) = asked
    assert set(methods) == set(demo.METHODS)
    assert subject.records.shape == (2, 28, 28)
    # A quarter of a patch of four pixels is one of the model's own.
    positions = compare_subject.positions_of(subject, methods)
    assert positions is not None
    assert positions[:4].tolist() == [-1, 0, 0, 1]
    assert np.bincount(positions[1:]).tolist() == [4] * 49
