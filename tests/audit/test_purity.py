"""A row's bits depend on its record, whoever computes it and beside whom."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tests.audit import harness, tiny
from xviz_jax import audit, batch
from xviz_jax.audit import canary, job

METHODS = {
    # Inputs that need different numbers of steps share lanes, and change them.
    "integrated_gradients": {"tolerance": 1e-3},
    "expected_gradients": {
        "samples": 3,
        "baselines": np.eye(8, dtype=np.float32).tolist(),
    },
}


def values(out):
    """Rows by id, without what says which run they are of."""
    table = harness.read(out)
    rows = table.drop_columns(["index", "numerics_id"]).to_pylist()
    return {row["id"]: row for row in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    done = harness.run(out, methods=METHODS, devices=2)
    assert done.bitwise and done.explained == 40
    return out


def test_neighbours_order_shards_and_devices_change_no_bit(whole, tmp_path):
    order = [*np.random.default_rng(0).permutation(40)[:21].tolist()]
    some = tiny.Records(order=order)
    harness.run(tmp_path, methods=METHODS, devices=1, data=some, shard_size=13)
    known, found = values(whole), values(tmp_path)
    assert [*found] == [f"r{number}" for number in order]
    for name, row in found.items():
        assert row == known[name], name
    # Lanes were refilled: inputs did need different numbers of steps.
    each = [row["diagnostics"]["integrated_gradients"] for row in known.values()]
    assert len({said["evaluations"] for said in each}) > 2
    # The same record under another name has another key, and other samples.
    assert (
        len({str(row["scores"]["expected_gradients"]) for row in known.values()}) == 40
    )


def test_one_name_for_what_bits_depend_on(whole, tmp_path):
    names = set(harness.read(whole).column("numerics_id").to_pylist())
    assert len(names) == 1
    harness.run(tmp_path, methods=METHODS, microbatch=8)
    assert names.isdisjoint(harness.read(tmp_path).column("numerics_id").to_pylist())


def test_a_row_that_depends_on_its_neighbours_is_found(tmp_path):
    done = harness.run(tmp_path, model="tests.audit.tiny:neighbours", devices=2)
    assert done.state == "complete"
    assert done.bitwise is False
    assert "prediction alone" in done.notes
    assert "bit for bit" in (tmp_path / "audit.log").read_text()


def test_every_program_is_proved(tmp_path, monkeypatch):
    """Of each shape, and of a microbatch that was made smaller."""

    def forward(weights, x):
        mean = jax.pure_callback(
            lambda rows: np.full(rows.shape[:-1], np.mean(rows), np.float32),
            jax.ShapeDtypeStruct((), jnp.float32),
            jax.lax.stop_gradient(x),
            vmap_method="expand_dims",
        )
        # Of records of 9 numbers, a row depends on the whole batch.
        return tiny._forward(weights, x[:8]) + (mean if x.shape == (9,) else 0)

    model = dataclasses.replace(tiny.MODEL, forward=forward)
    given = {"model": model, "devices": 2}
    source = tiny.Records(24, {n: "long" for n in range(9, 13)})
    done = harness.run(tmp_path / "long", data=source, **given)
    assert done.state == "complete" and done.bitwise is False
    assert "prediction alone, of float32[9], 4 at once" in done.notes
    said = json.loads((tmp_path / "long/run.json").read_text())
    assert said["bitwise"] is False
    assert "not bit for bit: prediction" in (tmp_path / "long/audit.log").read_text()
    proved, prove = [], canary.prove

    def noted(programs, batch, key, microbatch, check):
        proved.append((key, microbatch))
        return prove(programs, batch, key, microbatch, check)

    monkeypatch.setattr(canary, "prove", noted)
    call, tried = batch.Program.__call__, []

    def limited(self, inputs, **options):
        tried.append(self.microbatch)
        if self.microbatch == 4 and len(inputs["words"]) > 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return call(self, inputs, **options)

    monkeypatch.setattr(batch.Program, "__call__", limited)
    harness.run(tmp_path / "less")
    assert proved == [("float32[8]", 4), ("float32[8]", 2)]
    # 30: logged.
    said = (tmp_path / "less/audit.log").read_text()
    one = "shard 0: out of memory for float32[8]: one microbatch at a time on a device"
    two = "shard 0: out of memory for float32[8]: 2 records at once, not 4"
    assert said.count(one) == said.count(two) == 1


def test_what_bits_depend_on_is_said(monkeypatch):
    """A key's numbers depend on how JAX draws them, and a TPU's on its own flags."""
    before = job.numerics()
    assert before["random"] == "threefry2x32"
    assert before["random_partitionable"] is True
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_b=2 --xla_a=1")
    with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        after = job.numerics()
        assert job.settings()["jax_default_prng_impl"] == "rbg"
    changed = {key: after[key] for key in after if after[key] != before[key]}
    assert changed == {
        "libtpu_flags": "--xla_a=1 --xla_b=2",
        "random": "rbg",
        "random_partitionable": False,
    }


@pytest.mark.parametrize("name", ["random", "random_trace"])
def test_a_random_model_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="draws random numbers"):
        harness.run(tmp_path, model=f"tests.audit.tiny:{name}")
    assert not (tmp_path / "run.json").exists()


def test_buckets_depend_on_the_record_and_padding_changes_nothing(tmp_path):
    lengths = [1, 3, 4, 5]
    rows = [
        np.random.default_rng(n).integers(1, 11, n).astype(np.int32) for n in lengths
    ]
    source = [audit.Record(f"t{n}", {"tokens": each}) for n, each in enumerate(rows)]
    given = {
        "model": "tests.audit.tiny:tokens",
        "data": tiny.Listed(source),
        "devices": 1,
    }
    buckets = audit.Buckets(column="tokens", lengths=(4, 8))
    methods = ("integrated_gradients", "saliency")
    options = {"methods": methods, "buckets": buckets, "vocabulary": 11, **given}
    done = harness.run(tmp_path / "a", **options)
    assert done.bitwise and done.explained == 4
    # One bucket's rows have one name, the other's another.
    assert sorted(done.numerics.values()) == [1, 3]
    table = harness.read(tmp_path / "a").to_pylist()
    for row, ids in zip(table[1::2], rows[1::2], strict=True):
        expected = alone(ids)
        for name in methods:
            scores = row["scores"][name]
            assert row["shapes"][name] == [len(ids)]
            np.testing.assert_allclose(scores, expected[name], rtol=2e-4, atol=1e-5)
    reverse = tiny.Listed(source[::-1])
    harness.run(tmp_path / "b", **{**options, "data": reverse})
    assert values(tmp_path / "a") == values(tmp_path / "b")


def alone(ids):
    """The same without padding."""
    import xviz_jax as xv

    args = jnp.asarray(ids), jnp.ones(len(ids), bool)
    return {
        name: np.asarray(jax.jit(getattr(xv, name)(tiny.tokens))(*args).scores)
        for name in ("integrated_gradients", "saliency")
    }


def test_a_model_on_a_mesh_inside_one_worker(tmp_path, clean):
    devices = np.array(jax.local_devices())
    mesh = Mesh(devices, ("model",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("model"))
    weights = jax.device_put(jnp.asarray(tiny.WEIGHTS), split)
    model = audit.Model(forward=tiny._forward, parameters=weights, mesh=mesh)
    methods = ("integrated_gradients",)
    done = harness.run(tmp_path / "mesh", model=model, methods=methods)
    assert done.bitwise and done.explained == 40
    assert len(done.devices) == len(devices)
    harness.run(tmp_path / "one", methods=methods)
    split, one = values(tmp_path / "mesh"), values(tmp_path / "one")
    for name, row in split.items():
        here, there = (each["scores"][methods[0]] for each in (row, one[name]))
        np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-4)
    # Another layout is another computation, and its rows say so.
    assert clean.keys() == split.keys()
    with pytest.raises(audit.Changed, match="mesh"):
        harness.run(tmp_path / "mesh", methods=methods)
