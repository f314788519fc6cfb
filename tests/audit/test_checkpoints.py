"""Audits of published checkpoints: texts in buckets, and weights that changed."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import xviz_jax as xv
from tests.audit import harness
from tests.contract.quick import quick_compilation as quick_compilation
from tests.test_explain import GOLDENS, tokenizer
from xviz_jax import audit

# Of two lengths: each is compiled once more alone.
TEXTS = ["the film was not good", "[UNK] was not good .", "the", "good"]
METHODS = ("attention_rollout", "saliency")


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of a golden model, with a tokenizer."""

    def make(name):
        out = Path(shutil.copytree(GOLDENS / "text" / name, tmp_path / name))
        tokenizer(name.startswith("bert")).save(str(out / "tokenizer.json"))
        return out

    return make


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    named = dict(zip(["a", "b", "c", "d"], TEXTS, strict=True))
    named |= {"special": "[SEP]", "none": "", "long": "good " * 99}
    lines = [json.dumps({"text": text, "id": name}) for name, text in named.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_checkpoint_of_few_tokens(folder, tmp_path):
    """Fewer than the shortest bucket otherwise has."""
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    given = {"model": str(folder("bert_sequence")), "data": str(path)}
    done = harness.run(tmp_path / "out", **given, methods=("saliency",))
    assert (done.state, done.explained) == ("complete", 1)


@pytest.mark.parametrize("name", ["bert_sequence", "gpt2_sequence"])
def test_padded_texts_are_as_they_are_alone(name, folder, texts, tmp_path):
    """27: nothing but special tokens is explained, no text at all is not."""
    model = folder(name)
    given = {"model": str(model), "data": str(texts), "methods": METHODS}
    given["buckets"] = audit.Buckets(column="tokens", lengths=(4, 8))
    out = tmp_path / "out"
    done = harness.run(out, **given, microbatch=2)
    assert done.bitwise and done.explained == 5
    assert done.reasons == {"EMPTY": 1, "TOO_LONG": 1}
    forward, parameters = xv.models.load(model).functional()
    encode = xv.models.text(model)
    last = name.startswith("gpt2")
    methods = {
        "attention_rollout": xv.attention_rollout(forward, query=-1 if last else 0),
        "saliency": xv.saliency(forward, argnums=1),
    }
    rows = harness.read(out).to_pylist()
    assert rows[4]["id"] == "special" and rows[4]["status"] == "OK"
    length = [3 if name.startswith("bert") else 1]
    assert rows[4]["shapes"] == dict.fromkeys(METHODS, length)
    assert all(np.isfinite(rows[4]["scores"][each]).all() for each in METHODS)
    for row, text in zip(rows[:4], TEXTS, strict=True):
        ids = encode(text).ids
        for method, explain in methods.items():
            expected = jax.jit(explain)(parameters, ids)
            np.testing.assert_allclose(row["output"], expected.output, rtol=1e-4)
            assert row["shapes"][method] == list(ids.shape)
            np.testing.assert_allclose(
                row["scores"][method], expected.scores, rtol=1e-3, atol=1e-6
            )


def test_weights_that_changed_or_are_bad(folder, texts, tmp_path):
    """21, 22, 23."""
    model, out, fresh = folder("gpt2_sequence"), tmp_path / "out", tmp_path / "fresh"
    given = {"model": str(model), "data": str(texts), "methods": ("saliency",)}
    given["buckets"] = audit.Buckets(column="tokens", lengths=(8,))
    harness.run(out, **given)
    path = model / "model.safetensors"
    original, tensors = path.read_bytes(), load_file(path)
    changed = bytearray(original)
    changed[-3] ^= 1
    path.write_bytes(changed)
    harness.refused(out, "weights", audit.Changed, **given)
    name = next(key for key, each in tensors.items() if len({*each.shape}) > 1)
    spoilt = tensors[name].copy()
    spoilt.flat[0] = np.nan
    turned = np.ascontiguousarray(tensors[name].T)
    without = {key: value for key, value in tensors.items() if key != name}
    for spoil, said in {
        lambda: path.write_bytes(original[:-100]): r"model\.safetensors",
        lambda: save_file({**tensors, name: spoilt}, path): re.escape(name),
        lambda: save_file(without, path): "missing tensors",
        lambda: save_file({**tensors, "extra": turned}, path): "extra",
        lambda: save_file({**tensors, name: turned}, path): "shape",
    }.items():
        spoil()
        harness.refused(fresh, said, **given)
    assert not harness.written(fresh)
    path.write_bytes(original)
    assert harness.run(out, **given).computed == 0
    assert harness.run(fresh, **given).state == "complete"
    ids = ["a", "b", "c", "d", "special", "none", "long"]
    harness.check(fresh, harness.bits(out), ids)
