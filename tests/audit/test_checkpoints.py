"""Audits of published checkpoints: texts in buckets, and weights that changed."""

import json
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

TEXTS = ["the film was not good .", "good film", "the", "[UNK] was good ."]
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
    lines = [json.dumps({"text": text, "id": text[:8]}) for text in TEXTS]
    path.write_text("\n".join([*lines, json.dumps({"text": "good " * 99})]) + "\n")
    return path


@pytest.mark.parametrize("name", ["bert_sequence", "gpt2_sequence"])
def test_padded_texts_are_as_they_are_alone(name, folder, texts, tmp_path):
    model = folder(name)
    given = {"model": str(model), "data": str(texts), "methods": METHODS}
    given["buckets"] = audit.Buckets(column="tokens", lengths=(4, 8))
    out = tmp_path / "out"
    done = harness.run(out, **given, microbatch=2)
    assert done.bitwise and done.explained == 4
    assert done.reasons == {"TOO_LONG": 1}
    forward, parameters = xv.models.load(model).functional()
    encode = xv.models.text(model)
    last = name.startswith("gpt2")
    methods = {
        "attention_rollout": xv.attention_rollout(forward, query=-1 if last else 0),
        "saliency": xv.saliency(forward, argnums=1),
    }
    for row, text in zip(harness.read(out).to_pylist(), TEXTS, strict=True):
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
    model, out = folder("gpt2_sequence"), tmp_path / "out"
    given = {"model": str(model), "data": str(texts), "methods": ("saliency",)}
    given["buckets"] = audit.Buckets(column="tokens", lengths=(8,))
    harness.run(out, **given)
    path = model / "model.safetensors"
    original, tensors = path.read_bytes(), load_file(path)
    changed = bytearray(original)
    changed[-3] ^= 1
    path.write_bytes(changed)
    with pytest.raises(audit.Changed, match="weights"):
        harness.run(out, **given)
    path.write_bytes(original[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        harness.run(out, **given)
    name = next(iter(tensors))
    spoilt = np.array(tensors[name])
    spoilt.flat[0] = np.nan
    save_file({**tensors, name: spoilt}, path)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        harness.run(out, **given)
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(ValueError, match="missing tensors"):
        harness.run(out, **given)
    path.write_bytes(original)
    assert harness.run(out, **given).computed == 0
