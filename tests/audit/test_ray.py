"""The engine `ray`, on a cluster that a process of its own starts."""

import importlib.util

import pytest

from tests.audit import harness

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed"
)

IDS = [f"r{number}" for number in range(40)]


def test_a_worker_that_is_killed_in_a_shard(clean, tmp_path):
    """10: Ray starts another, the run completes, and a rerun has nothing to do."""
    note = str(tmp_path / "note")
    source = {"faults": {19: "once"}, "note": note}
    options = {"engine": "ray", "ray": {"actors": 2}, "source": source}
    process = harness.start(tmp_path / "out", **options)
    code, said, errors = harness.ended(process, timeout=300)
    assert code == 0, errors
    assert (tmp_path / "note").exists()
    assert "5 of 5 shards" in said
    harness.check(tmp_path / "out", clean)
    assert harness.run(tmp_path / "out").computed == 0


def test_a_record_that_kills_every_worker(clean, tmp_path):
    """34."""
    source = {"faults": {21: "kill"}}
    ray = {"actors": 1, "retries": 0}
    process = harness.start(tmp_path, engine="ray", ray=ray, source=source)
    code, _, errors = harness.ended(process, timeout=300)
    assert code == 0, errors
    assert harness.quarantined(tmp_path) == {"r21": "CRASH"}
    harness.check(tmp_path, clean, IDS)
