"""The engine `ray`, on a cluster that a process of its own starts."""

import importlib.util

import pytest

from tests.audit import harness

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed"
)

IDS = [f"r{number}" for number in range(40)]


def test_a_worker_that_dies_for_good(clean, tmp_path):
    """10: the other one does what it held, and a rerun has nothing to do."""
    out, note = tmp_path / "out", tmp_path / "note"
    source = {"faults": {19: "once"}, "note": str(note)}
    options = {"engine": "ray", "ray": {"actors": 2, "restarts": 0}, "source": source}
    code, said, errors = harness.ended(harness.start(out, **options), timeout=300)
    assert code == 0, errors
    assert note.exists()
    assert "5 of 5 shards" in said
    assert "is given up, workers left: 1" in (out / "audit.log").read_text()
    harness.check(out, clean)
    assert harness.run(out).computed == 0


def test_a_record_that_kills_every_worker(clean, tmp_path):
    """34: Ray starts it again each time."""
    source = {"faults": {21: "kill"}}
    ray = {"actors": 1, "retries": 0}
    process = harness.start(tmp_path, engine="ray", ray=ray, source=source)
    code, _, errors = harness.ended(process, timeout=300)
    assert code == 0, errors
    assert harness.quarantined(tmp_path) == {"r21": "CRASH"}
    harness.check(tmp_path, clean, IDS)
