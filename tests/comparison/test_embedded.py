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
from xviz_jax import cli, compare_command, demo, metrics
from xviz_jax.comparison import Comparison
from xviz_jax.models import embedded


@pytest.fixture(scope="module")
def marked() -> tuple[Comparison, Comparison]:
    """The embedded model and its twin on images whose shirts are marked."""
    forward, clean, twin = shortcut.twin()
    images, labels = embedded.images()
    shirts = np.flatnonzero(labels == shortcut.LABEL)[:8]
    others = np.flatnonzero(labels != shortcut.LABEL)[:2]
    chosen = np.concatenate([shirts, others])
    images, labels = images[chosen], labels[chosen]
    patches = xv.patches((28, 28), 4)

    def compare(parameters):
        gradients = xv.integrated_gradients(
            forward, steps=8, chunk=1, tolerance=1.0, argnums=1
        )
        return xv.compare(
            forward,
            {"integrated_gradients": gradients},
            shortcut.mark(images, labels),
            targets=labels,
            shared=(parameters,),
            groups=patches,
            slices=np.where(labels == shortcut.LABEL, "shirt", "other"),
            metrics=[
                partial(metrics.abpc, steps=2),
                partial(metrics.comprehensiveness, fractions=(0.1,)),
            ],
            microbatch=10,
            key=jax.random.key(0),
        )

    return compare(clean), compare(twin)


def test_a_shortcut_shows_in_its_slice(marked):
    _, twin = marked
    method = twin.methods["integrated_gradients"]
    assert [(name, feature) for name, feature, *_ in method.raised] == [("shirt", 0)]
    (_, _, share, elsewhere), *_ = method.raised
    assert share.low > 0.2
    assert share.estimate > 4 * elsewhere
    assert method.shares["shirt"][0] == share.estimate
    assert np.argmax(method.shares["shirt"]) == 0


def test_the_model_without_it_raises_nothing(marked):
    clean, twin = marked
    method = clean.methods["integrated_gradients"]
    assert method.raised == []
    other = twin.methods["integrated_gradients"]
    assert method.shares["shirt"][0] < other.shares["shirt"][0] / 2


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
    low, high = places["abpc"]["zeros"]["saliency"]
    place = saved.summary("saliency", "abpc", "zeros").place
    assert place is not None
    assert (low, high) == (place.low, place.high)
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")

    ((subject, methods),) = asked
    assert set(methods) == set(demo.METHODS)
    assert subject.records.shape == (2, 28, 28)
    # A quarter of a patch of four pixels is one of the model's own.
    positions = compare_command.positions_of(subject, methods)
    assert positions is not None
    assert positions[:4].tolist() == [-1, 0, 0, 1]
    assert np.bincount(positions[1:]).tolist() == [4] * 49
