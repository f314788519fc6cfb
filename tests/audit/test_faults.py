"""Faults of disks, data, memory and settings: the invariant holds after each.

Numbers are those of the fault table the audit was designed by.
"""

import dataclasses
import errno
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.audit import harness, tiny
from xviz_jax import audit, batch
from xviz_jax.audit import files, lock, shard, state
from xviz_jax.audit.manifest import Manifest
from xviz_jax.audit.worker import Unusable

IDS = [f"r{number}" for number in range(40)]


@pytest.fixture
def done(finished, tmp_path):
    """A finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path, dirs_exist_ok=True))


def test_resume_with_other_devices_and_elsewhere(clean, tmp_path):
    """5, 6."""
    for devices in (3, 1):
        stop = audit.Stop()
        found = harness.run(
            tmp_path,
            devices=devices,
            stop=stop,
            progress=lambda now, stop=stop: stop.ask() if now.done > 6 else None,
        )
        assert found.state == "preempted"
    assert 0 < len([*tmp_path.glob("shards/*")]) < 5
    assert harness.run(tmp_path, devices=2, isolate=True).state == "complete"
    harness.check(tmp_path, clean)


def others():
    """What changes the rows of a run, by what the refusal says of it."""
    weights = tiny.WEIGHTS.copy()
    weights[0, 0] += 1e-6
    model = dataclasses.replace(tiny.MODEL, parameters=jnp.asarray(weights))
    return {
        "weights: ": {"model": model},
        "methods.saliency: {} -> None": {"methods": ("input_x_gradient",)},
        "target: None -> 2": {"target": 2},
        "microbatch: 4 -> 8": {"microbatch": 8},
        "source: ": {"data": tiny.Records(order=[*range(40)])},
        "seed: 0 -> 1": {"seed": 1},
        "records: 40 -> 39": {"limit": 39},
    }


def test_a_changed_run_is_refused(done, clean):
    """6, 7: of a microbatch too, on which bits depend."""
    before = harness.bits(done)
    for said, options in others().items():
        wanted = rf"--new-run to put it aside:(.|\n)*\n  {re.escape(said)}"
        harness.refused(done, wanted, audit.Changed, **options)
    harness.check(done, clean)
    assert harness.run(done).computed == 0
    found = harness.run(done, new_run=True, **others()["weights: "])
    assert found.state == "complete" and found.computed == 5
    (aside,) = (done / "previous").iterdir()
    assert harness.bits(aside) == before
    assert harness.bits(done).keys() == before.keys()
    assert not {*harness.bits(done).values()} & {*before.values()}


def test_another_baseline_is_refused(tmp_path):
    """7."""
    path = lambda baseline: {
        "methods": {"integrated_gradients": {"steps": 2, "baseline": baseline}},
        "data": tiny.Records(8),
    }
    assert harness.run(tmp_path, **path(0.0)).explained == 8
    wanted = r"methods\.integrated_gradients\.baseline: 0\.0 -> 0\.5"
    harness.refused(tmp_path, wanted, audit.Changed, **path(0.5))
    assert harness.run(tmp_path, **path(0.0)).computed == 0


def test_another_version_or_device_is_refused(done, clean, monkeypatch):
    """7."""
    monkeypatch.setattr("xviz_jax.audit.job.__version__", "0.0.1")
    wanted = r"numerics\.xviz_jax: '.*' -> '0\.0\.1'"
    harness.refused(done, wanted, audit.Changed)
    monkeypatch.undo()
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        wanted = r"numerics\.optimized: True -> False"
        harness.refused(done, wanted, audit.Changed)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    text = (done / "run.json").read_text()
    (done / "run.json").write_text(text.replace('"seed": 0', '"seed": 7'))
    harness.refused(done, r"run\.json is no run's fingerprint")
    (done / "run.json").write_text(text)
    assert harness.run(done).computed == 0
    harness.check(done, clean)


def test_weights_that_a_function_closes_over(tmp_path, monkeypatch):
    """37: they are part of what a run is, whatever was compiled before."""
    given = {"model": tiny.dense, "data": tiny.Records(8)}
    harness.run(tmp_path / "a", **given)
    before = harness.bits(tmp_path / "a")
    monkeypatch.setattr(tiny, "WEIGHTS", tiny.WEIGHTS + 1)
    harness.refused(tmp_path / "a", "weights", audit.Changed, **given)
    harness.run(tmp_path / "a", new_run=True, **given)
    harness.run(tmp_path / "b", **given)
    harness.check(tmp_path / "a", harness.bits(tmp_path / "b"))
    assert not {*before.values()} & {*harness.bits(tmp_path / "b").values()}


def test_two_runners(done, clean):
    """8."""
    (done / "shards/00000001.parquet").unlink()
    with lock.held(done):
        with pytest.raises(audit.Busy, match="another runner"):
            harness.run(done)
        with pytest.raises(audit.Busy):
            harness.run(done, wait=0.5)
    assert harness.run(done).computed == 1
    harness.check(done, clean)


def test_a_lock_outlives_no_process(done, clean):
    """41. What the file says of a living process does not count; the kernel does."""
    (done / "lock").write_text(json.dumps({"host": "here", "process": 1}))
    assert harness.run(done).state == "complete"
    harness.check(done, clean)


@pytest.mark.parametrize("place", ["after_tmp@3:full", "after_fsync@4:full"])
def test_a_full_disk(place, clean, tmp_path, monkeypatch):
    """13."""
    monkeypatch.setenv("XVIZ_FAILPOINT", place)
    monkeypatch.setattr("xviz_jax.audit.failpoints._seen", {})
    with pytest.raises(OSError, match="No space left"):
        harness.run(tmp_path)
    monkeypatch.delenv("XVIZ_FAILPOINT")
    assert json.loads((tmp_path / "summary.json").read_text())["state"] == "fault"
    there = len([*tmp_path.glob("shards/*")])
    assert there in (1, 2)
    assert harness.run(tmp_path).computed == 5 - there
    harness.check(tmp_path, clean)


def test_a_limit_of_the_kernel(tmp_path):
    """13. Not a failpoint: the kernel cuts the file off."""
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError) as raised:
            files.write(tmp_path / "a", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.errno == errno.EFBIG
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_at_the_manifest_and_the_log(clean, tmp_path, monkeypatch):
    """14."""
    monkeypatch.setenv("XVIZ_FAILPOINT", "after_tmp@1:full")
    monkeypatch.setattr("xviz_jax.audit.failpoints._seen", {})
    with pytest.raises(OSError, match="No space left"):
        harness.run(tmp_path)
    assert not (tmp_path / "run.json").exists()
    monkeypatch.delenv("XVIZ_FAILPOINT")
    (tmp_path / "audit.log").unlink(missing_ok=True)
    (tmp_path / "audit.log").mkdir()
    assert harness.run(tmp_path).state == "complete"
    harness.check(tmp_path, clean)


def test_errors_that_pass(clean, tmp_path, monkeypatch):
    """16."""
    monkeypatch.setattr("xviz_jax.audit.failpoints._seen", {})
    monkeypatch.setenv("XVIZ_FAILPOINT", "after_tmp@2:eio,after_tmp@3:eio")
    assert harness.run(tmp_path).state == "complete"
    harness.check(tmp_path, clean)
    monkeypatch.setenv("XVIZ_FAILPOINT", "after_tmp:eio")
    with pytest.raises(OSError, match="Input/output error"):
        files.write(tmp_path / "a", b"")


def test_truncated_changed_and_missing_shards(done, clean):
    """18, 19, 20."""
    paths = sorted(done.glob("shards/*.parquet"))
    paths[0].write_bytes(paths[0].read_bytes()[:-100])
    data = bytearray(paths[1].read_bytes())
    data[len(data) // 3] ^= 1
    paths[1].write_bytes(data)
    paths[2].unlink()
    paths[3].write_bytes(paths[4].read_bytes())
    found = harness.run(done)
    assert found.damaged == (0, 1, 3)
    assert found.computed == 4
    harness.check(done, clean)
    said = (done / "audit.log").read_text()
    assert "shard 1 is computed again" in said


def test_no_changed_byte_is_read_in_silence(done):
    """19. Every flipped bit is found, or says the same as before."""
    plan = Manifest(json.loads((done / "run.json").read_text())["fingerprint"])
    path = shard.path_of(done, 2)
    original = path.read_bytes()
    before = shard.read(path)[0]
    found = 0
    for place in range(0, len(original), 7):
        data = bytearray(original)
        data[place] ^= 1 << (place % 8)
        path.write_bytes(data)
        try:
            shard.verify(done, 2, plan.run, 8)
        except shard.Damaged:
            found += 1
            continue
        assert shard.read(path)[0].equals(before), place
    assert found > 0.5 * len(original) / 7


def test_quarantined_records_are_part_of_their_shard(clean, tmp_path):
    """18, 25."""
    source = tiny.Records(faults={3: "UNDECODABLE", 17: "BAD_UTF8", 18: "TRUNCATED"})
    found = harness.run(tmp_path, data=source)
    assert found.reasons == {"BAD_UTF8": 1, "TRUNCATED": 1, "UNDECODABLE": 1}
    harness.check(tmp_path, clean, IDS)
    aside = tmp_path / "quarantine/00000002.parquet"
    aside.unlink()
    (tmp_path / "quarantine/00000004.parquet").write_bytes(b"of a dead writer")
    found = harness.run(tmp_path, data=source)
    assert found.damaged == (2,) and found.computed == 1
    harness.check(tmp_path, clean, IDS)
    assert harness.quarantined(tmp_path) == {
        "r3": "UNDECODABLE",
        "r17": "BAD_UTF8",
        "r18": "TRUNCATED",
    }


def test_numbers_that_are_none(clean, tmp_path):
    """24: others are the same to the bit."""
    faults = {2: "nan", 3: "inf", 4: "huge", 5: "surrogate", 6: "ints"}
    harness.run(tmp_path, data=tiny.Records(faults=faults))
    found = harness.quarantined(tmp_path)
    assert found.pop("'\\ud800'") == "BAD_UTF8"
    assert found.pop("r2") == found.pop("r3") == "NONFINITE_INPUT"
    assert found.pop("r6") == "WRONG_DTYPE"
    # The tangent saturates: a huge number is explained, and its gradient is zero.
    assert not found
    rows = harness.bits(tmp_path)
    assert [name for name in IDS if rows.get(name) != clean[name]] == [
        f"r{number}" for number in faults
    ]


def test_outputs_that_are_no_numbers(tmp_path):
    """24."""
    model = lambda weights, x: tiny._forward(weights, x) + 0 * jnp.exp(x[0] / 1e3)
    model = dataclasses.replace(tiny.MODEL, forward=model)
    source = tiny.Records(count=8, faults={4: "huge"})
    found = harness.run(tmp_path / "out", data=source, model=model)
    assert found.reasons == {"NONFINITE_OUTPUT": 1} and found.explained == 7
    harness.run(tmp_path / "clean", data=tiny.Records(count=8), model=model)
    harness.check(tmp_path / "out", harness.bits(tmp_path / "clean"))


def test_too_many_bad_records_end_a_run_early(clean, tmp_path):
    """25, 26."""
    every = tiny.Records(5000, dict.fromkeys(range(5000), "UNDECODABLE"))
    wanted = r"none of the first 1000 .*UNDECODABLE"
    harness.refused(tmp_path / "all", wanted, Unusable, data=every)
    assert not harness.written(tmp_path / "all")
    faults = dict.fromkeys(range(8, 5000), "UNDECODABLE")
    source, out = tiny.Records(5000, faults), tmp_path / "most"
    found = harness.run(out, data=source, max_bad_fraction=0.01, shard_size=100)
    assert found.state == "too_many_bad"
    assert "a" in found.why and found.computed == 1
    # What is done is done, and another bound goes on.
    assert (
        harness.run(out, data=source, max_bad_fraction=0.01, shard_size=100).computed
        == 0
    )
    found = harness.run(out, data=source, max_bad_fraction=1.0, shard_size=100)
    assert found.state == "complete" and found.quarantined == 4992
    harness.check(out, clean, [f"r{number}" for number in range(5000)])


class Tokens:
    """Token records of every kind."""

    rows = (
        [1, 2, 3],
        [],
        [5],
        [0, 0, 0],
        [1] * 9,
        [10, 10],
        [1, 11],
        [-1, 2],
        [1.5, 2.0],
        [[1, 2]],
    )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        ids = np.array(self.rows[index])
        return audit.Record(str(index), {"tokens": ids.astype(ids.dtype)})


def test_odd_tokens(tmp_path):
    """27, 28: JAX would look up another row in silence."""
    found = harness.run(
        tmp_path,
        model="tests.audit.tiny:tokens",
        data=Tokens(),
        vocabulary=11,
        buckets=audit.Buckets(column="tokens", lengths=(4, 8)),
        max_bad_fraction=1.0,
    )
    assert found.explained == 3
    assert harness.read(tmp_path).column("id").to_pylist() == ["0", "2", "5"]
    assert harness.quarantined(tmp_path) == {
        "1": "EMPTY",
        "3": "EMPTY",
        "4": "TOO_LONG",
        "6": "OUT_OF_VOCABULARY",
        "7": "NEGATIVE_ID",
        "8": "WRONG_DTYPE",
        "9": "WRONG_SHAPE",
    }


def test_repeated_ids(tmp_path):
    """29."""
    x = np.ones((4, 8), np.float32)
    np.savez(tmp_path / "d.npz", x=x, id=np.array(["a", "b", "a", "c"]))
    data, out = tmp_path / "d.npz", tmp_path / "out"
    with pytest.raises(ValueError, match="occur twice"):
        harness.run(out, data=data)
    harness.run(out, data=data, duplicates="number")
    assert harness.read(out).column("id").to_pylist() == ["a", "b", "a#2", "c"]


def exhausted(monkeypatch, fits):
    """A device on which only some calls fit; returns what was tried."""
    tried, call = [], batch.Program.__call__

    def limited(self, inputs, **options):
        tried.append((self.microbatch, options["in_flight"]))
        if not fits(self.microbatch, options["in_flight"], inputs):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."
            )
        return call(self, inputs, **options)

    monkeypatch.setattr(batch.Program, "__call__", limited)
    return tried


def test_fewer_microbatches_in_flight_are_the_same_bits(clean, tmp_path, monkeypatch):
    """30."""
    tried = exhausted(monkeypatch, lambda size, in_flight, rows: in_flight == 1)
    assert harness.run(tmp_path).state == "complete"
    harness.check(tmp_path, clean)
    assert {size for size, _ in tried} == {4}


def test_a_smaller_microbatch_has_another_name(tmp_path, monkeypatch):
    """30."""
    proved = []

    def fits(size, in_flight, rows):
        # The canary comes first, and fits.
        proved.append(len(rows["words"]))
        return size <= 2 or len(rows["words"]) <= 3

    tried = exhausted(monkeypatch, fits)
    found = harness.run(tmp_path)
    assert found.state == "complete" and found.explained == 40
    assert len(found.numerics) == 1
    names = set(harness.read(tmp_path).column("numerics_id").to_pylist())
    monkeypatch.undo()
    harness.run(tmp_path / "two", microbatch=2)
    assert names == set(
        harness.read(tmp_path / "two").column("numerics_id").to_pylist()
    )
    assert harness.bits(tmp_path) == harness.bits(tmp_path / "two")
    assert min(size for size, _ in tried) == 2


def test_a_record_for_which_there_is_no_memory(tmp_path):
    """31, 32: a real allocation fails, and others keep their microbatch."""
    out, model = tmp_path / "out", "tests.audit.tiny:hungry"
    source = tiny.Records(12, {5: "long", 6: "long"})
    found = harness.run(out, model=model, data=source)
    assert found.state == "complete"
    assert harness.quarantined(out) == {"r5": "OOM", "r6": "OOM"}
    assert len(found.numerics) == 1
    harness.run(tmp_path / "clean", model=model, data=tiny.Records(12))
    harness.check(out, harness.bits(tmp_path / "clean"))


def test_a_path_that_is_not_resolved(tmp_path):
    """39: its value is kept and marked, and is the same whoever is beside it."""
    options = {"max_evaluations": 17, "tolerance": 1e-4}
    given = {
        "model": "tests.audit.tiny:steps",
        "methods": {"integrated_gradients": options},
        "data": tiny.Records(8),
    }
    found = harness.run(tmp_path / "a", **given)
    assert found.unconverged == found.explained == 8
    for row in harness.read(tmp_path / "a").to_pylist():
        assert row["status"] == "UNCONVERGED"
        assert row["diagnostics"]["integrated_gradients"]["converged"] is False
        assert any(row["scores"]["integrated_gradients"])
    harness.run(tmp_path / "b", **given, shard_size=3)
    harness.check(tmp_path / "a", harness.bits(tmp_path / "b"))


def test_a_refused_model_leaves_nothing(clean, tmp_path):
    """36, 40: and does not stand in the way of a good one."""
    random = "tests.audit.tiny:random"
    harness.refused(tmp_path, "draws random numbers", model=random)
    harness.refused(tmp_path, "attention", methods=("attention_rollout",))
    assert not harness.written(tmp_path)
    assert harness.run(tmp_path).state == "complete"
    harness.check(tmp_path, clean)


def test_a_model_that_fails_on_one_record(tmp_path):
    """28: what the model raises is that record's, whatever it is."""

    def forward(weights, x):
        def look(rows):
            if np.any(rows > 1e38):
                raise RuntimeError("no such input")
            return rows

        seen = jax.pure_callback(
            look, x, jax.lax.stop_gradient(x), vmap_method="expand_dims"
        )
        return tiny._forward(weights, x + 0 * seen)

    model = dataclasses.replace(tiny.MODEL, forward=forward)
    out, source = tmp_path / "out", tiny.Records(8, {4: "huge"})
    found = harness.run(out, model=model, data=source)
    assert harness.quarantined(out) == {"r4": "FAILED"}
    assert found.explained == 7
    harness.run(tmp_path / "clean", model=model, data=tiny.Records(8))
    harness.check(out, harness.bits(tmp_path / "clean"))


def test_marks_of_shards_under_way(tmp_path):
    """33: one death is bad luck, two in one shard are a reason."""
    marks = state.Marks(tmp_path)
    marks.begin(3)
    assert not marks.crashing()
    marks.begin(3)
    assert marks.crashing()
    marks.end(3)
    assert not marks.crashing()
    (tmp_path / "state/3").write_text("")
    assert not marks.crashing()
