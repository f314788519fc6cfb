"""Weights that are not those wanted are refused before anything is computed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import xviz_jax as xv
from tests.audit import harness, tiny
from tests.audit.test_checkpoints import folder as folder
from tests.audit.test_checkpoints import texts as texts
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax import audit
from xviz_jax.models.checkpoint import open_checkpoint


def spoilt(value, place=0):
    """Weights of the tiny model, one of them no number."""
    weights = tiny.WEIGHTS.copy()
    weights.flat[place] = value
    return weights


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_parameters_that_are_not_finite(bad, tmp_path):
    """22."""
    parameters = {"first": {"kernel": spoilt(bad, 5)}}
    forward = lambda p, x: tiny._forward(p["first"]["kernel"], x)
    model = audit.Model(forward=forward, parameters=parameters)
    named = r"parameters\['first'\]\['kernel'\] \[4, 8\], 1 of 32 numbers"
    # A hash that the caller has made does not speak of it.
    for each in (model, dataclasses.replace(model, fingerprint="mine")):
        with pytest.raises(ValueError, match=named):
            harness.run(tmp_path, model=each)
    assert not (tmp_path / "run.json").exists()


def test_arrays_that_a_function_holds(tmp_path):
    """22. A mask of attention is made of -inf."""

    def held(weights):
        mask = np.array([0, 0, 0, -np.inf], np.float32)
        return lambda x: jax.nn.softmax(jnp.asarray(weights) @ x + jnp.asarray(mask))

    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"array \d that it holds \[4, 8\], 1 of"):
            harness.run(tmp_path, model=held(spoilt(bad)))
    assert not (tmp_path / "run.json").exists()
    data = tiny.Records(4)
    assert harness.run(tmp_path / "a", model=held(tiny.WEIGHTS), data=data).explained
    # Wanted nevertheless: it is the rows that are set aside.
    given = {"data": data, "max_bad_fraction": 1.0, "allow_nonfinite": True}
    found = harness.run(tmp_path / "b", model=held(spoilt(np.nan)), **given)
    assert found.reasons == {"NONFINITE_OUTPUT": 4}


def test_a_checkpoint_of_another_hash_and_one_on_all_devices(folder, texts, tmp_path):
    """21."""
    model, out = folder("gpt2_sequence"), tmp_path / "out"
    given = {"model": str(model), "data": str(texts), "methods": ("saliency",)}
    given["buckets"] = audit.Buckets(column="tokens", lengths=(8,))
    path = model / "model.safetensors"
    original, known = path.read_bytes(), xv.models.load(model).fingerprint
    changed = bytearray(original)
    changed[-3] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=rf"is {known}, and the weights of .* are"):
        harness.run(out, **given, weights_sha256=known)
    assert not (out / "run.json").exists()
    path.write_bytes(original)
    one = harness.run(out, **given, weights_sha256=known)
    assert one.explained == 5 and len(one.devices) == 1
    with pytest.raises(ValueError, match="is for a checkpoint"):
        harness.run(out, weights_sha256=known)
    # The same checkpoint, spread over the devices of the worker.
    split = harness.run(tmp_path / "split", **given, split=True)
    assert split.bitwise and split.explained == 5
    assert len(split.devices) == jax.local_device_count() == 4
    for here, there in zip(
        harness.read(tmp_path / "split").to_pylist(),
        harness.read(out).to_pylist(),
        strict=True,
    ):
        assert here["numerics_id"] != there["numerics_id"]
        np.testing.assert_allclose(
            here["scores"]["saliency"],
            there["scores"]["saliency"],
            rtol=1e-3,
            atol=1e-6,
        )
    with pytest.raises(audit.Changed, match="mesh"):
        harness.run(out, **given, split=True)
    # Numbers that are none, wanted nevertheless.
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: np.full_like(tensors[name], np.nan)}, path)
    given |= {"max_bad_fraction": 1.0, "allow_nonfinite": True}
    assert harness.run(tmp_path / "nan", **given).quarantined == 7


def test_a_header_that_names_a_tensor_twice(folder):
    model = folder("gpt2_sequence")
    path = model / "model.safetensors"
    stored = path.read_bytes()
    size = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + size])
    header.pop("__metadata__", None)
    name = next(iter(header))
    again = json.dumps(header)[:-1] + f", {json.dumps(name)}: "
    again = (again + json.dumps(header[name]) + "}").encode()
    path.write_bytes(len(again).to_bytes(8, "little") + again + stored[8 + size :])
    assert load_file(path).keys() == header.keys()
    with pytest.raises(ValueError, match=rf"names \['{name}'\] twice in its header"):
        open_checkpoint(model)
