"""Faults of processes: killed at any moment, stopped, hung, and asked to end."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.audit import harness, tiny
from xviz_jax import audit
from xviz_jax.audit import state

IDS = [f"r{number}" for number in range(40)]
PLACES = [
    "after_tmp@3",
    "after_fsync@4",
    "before_rename@3",
    "after_rename@3",
    "after_dir_fsync@2",
]


def committed(out):
    return len([*out.glob("shards/*.parquet")])


def wait_for(condition, process=None, timeout=200):
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until
        assert process is None or process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("place", PLACES)
def test_killed_at_each_step_of_a_commit(place, clean, tmp_path):
    """2."""
    bad = {11: "UNDECODABLE"} if place == "before_rename@3" else {}
    code, _, errors = harness.ended(
        harness.start(tmp_path, place, source={"faults": bad})
    )
    assert code == -signal.SIGKILL, errors
    before = committed(tmp_path)
    assert before < 5
    # Here, with other devices: what was committed is taken as it is.
    done = harness.run(tmp_path, devices=2, data=tiny.Records(faults=bad))
    assert done.state == "complete" and done.damaged == ()
    assert done.computed == 5 - before
    harness.check(tmp_path, clean, IDS)


def kill_at_random(out, kills, **options):
    """Kills a run again and again; returns how often it was really killed.

    A moment after some shards, or before the first: however slow the machine is.
    """
    moments, killed = random.Random(2), 0
    begun = lambda: (out / "audit.log").exists() and (out / "audit.log").stat().st_size
    while killed < kills:
        before, said = committed(out), begun()
        process = harness.start(out, **options)
        wait_for(lambda said=said: begun() > said, process)
        wanted = before + moments.randrange(4)
        wait_for(lambda wanted=wanted: committed(out) >= wanted, process)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        code, _, errors = harness.ended(process)
        killed += code == -signal.SIGKILL
        if code == 0:
            break
        assert code == -signal.SIGKILL, errors
    return killed


@pytest.mark.soak
def test_killed_thirty_times(tmp_path):
    """1."""
    source = {"count": 6000, "pause": 0.002}
    harness.run(tmp_path / "clean", data=tiny.Records(6000), shard_size=50)
    out, options = tmp_path / "out", {"source": source, "shard_size": 50}
    assert kill_at_random(out, 30, **options) == 30
    done = harness.run(out, data=tiny.Records(6000), shard_size=50)
    assert done.state == "complete" and done.computed < 120
    harness.check(out, harness.bits(tmp_path / "clean"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end(number, clean, tmp_path):
    """3, 4."""
    process = harness.start(tmp_path, source={"pause": 0.1})
    wait_for(lambda: committed(tmp_path) > 0, process)
    asked = time.monotonic()
    process.send_signal(number)
    code, _, errors = harness.ended(process)
    assert code == 143, errors
    assert time.monotonic() - asked < 20
    assert "Traceback" not in errors
    assert audit.open(tmp_path).summary["state"] == "preempted"
    assert harness.run(tmp_path).state == "complete"
    harness.check(tmp_path, clean)


def test_asked_twice(clean, tmp_path):
    """3: a reader that hangs does not hold it up."""
    process = harness.start(tmp_path, source={"faults": {7: "hang"}})
    log = tmp_path / "audit.log"
    # From there on it waits for the first shard.
    wait_for(lambda: log.exists() and "shards to do" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: process.poll() is not None, timeout=5)
    assert harness.ended(process)[0] == 143
    assert harness.run(tmp_path).state == "complete"
    harness.check(tmp_path, clean)


# Of a process whose interpreter has taken its handlers back.
_LATE = """
import os, signal, sys
from xviz_jax.audit.stopping import EXIT, Stop, listening

class Last:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGTERM):
        kill(process, number)

last = Last()
with listening(Stop(), to_the_end=True):
    os.kill(os.getpid(), signal.SIGTERM)
sys.exit(EXIT)
"""


def test_asked_twice_at_the_very_end():
    ended = subprocess.run([sys.executable, "-c", _LATE], check=False, cwd=harness.ROOT)
    assert ended.returncode == 143


def test_a_stopped_runner_keeps_its_lock(clean, tmp_path):
    """8, 9: another one never commits beside it."""
    process = harness.start(tmp_path, "before_rename@3:stop")
    stopped = lambda: os.waitid(
        os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT
    )
    wait_for(stopped)
    with pytest.raises(audit.Busy):
        harness.run(tmp_path)
    process.send_signal(signal.SIGCONT)
    assert harness.ended(process)[0] == 0
    harness.check(tmp_path, clean)
    assert harness.run(tmp_path).computed == 0


def test_a_record_that_kills_its_process(clean, tmp_path):
    """33: after two deaths the record is looked for, and found."""
    source = tiny.Records(faults={21: "memory"})
    marks = state.Marks(tmp_path)
    marks.begin(10)
    marks.begin(10)
    done = harness.run(tmp_path, data=source, shard_size=2)
    assert done.state == "complete"
    assert harness.quarantined(tmp_path) == {"r21": "CRASH"}
    (message,) = harness.read(tmp_path, "quarantine").column("message").to_pylist()
    assert message == "the process ended with exit code -9"
    harness.check(tmp_path, clean, IDS)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("number", "fault", "died"),
    [(0, "kill", signal.SIGSEGV), (21, "memory", signal.SIGKILL)],
)
def test_deaths_are_counted(number, fault, died, clean, tmp_path):
    """33, 34: as above, from the first death on; the first record too."""
    options = {"source": {"faults": {number: fault}}, "shard_size": 2}
    for _ in range(2):
        code, _, errors = harness.ended(harness.start(tmp_path, **options))
        assert code == -died, errors
    code, _, errors = harness.ended(harness.start(tmp_path, **options))
    assert code == 0, errors
    assert harness.quarantined(tmp_path) == {f"r{number}": "CRASH"}
    harness.check(tmp_path, clean, IDS)


@pytest.mark.soak
def test_a_reader_that_hangs(clean, tmp_path):
    """35."""
    source = tiny.Records(faults={22: "hang"})
    done = harness.run(tmp_path, data=source, deadline=3.0, shard_size=2)
    assert done.state == "complete" and done.hung
    assert harness.quarantined(tmp_path) == {"r22": "TIMEOUT"}
    harness.check(tmp_path, clean, IDS)


@pytest.mark.soak
def test_a_computation_that_hangs(tmp_path):
    """35: nothing in this process can end it, so the process ends itself."""
    out, model = tmp_path / "out", "tests.audit.tiny:endless"
    source = {"count": 8, "faults": {5: "endless"}}
    process = harness.start(out, model=model, source=source, deadline=5.0, shard_size=2)
    code, _, errors = harness.ended(process, timeout=400)
    assert code == 0, errors
    assert harness.quarantined(out) == {"r5": "TIMEOUT"}
    harness.run(tmp_path / "clean", model=model, data=tiny.Records(8))
    harness.check(out, harness.bits(tmp_path / "clean"))


def test_a_damaged_cache_of_programs(clean, tmp_path):
    """38."""
    cache = tmp_path / "cache"
    for out in ("a", "b"):
        process = harness.start(tmp_path / out, cache=cache)
        assert harness.ended(process)[0] == 0
        harness.check(tmp_path / out, clean)
        entries = [path for path in cache.rglob("*") if path.is_file()]
        assert entries
        for path in entries:
            path.write_bytes(b"no program")


@pytest.mark.soak
def test_a_hundred_thousand_records(tmp_path):
    """Nothing is lost, and memory does not grow."""
    peaks = []
    for count in (10_000, 100_000):
        out, bad = tmp_path / str(count), range(0, count, 997)
        source = {"count": count, "faults": dict.fromkeys(bad, "TRUNCATED")}
        process = harness.start(out, source=source, shard_size=1024, microbatch=64)
        code, said, errors = harness.ended(process, timeout=400)
        assert code == 0, errors
        peaks += map(int, re.findall(r"^peak (\d+) kB$", said, re.MULTILINE))
        found = audit.open(out)
        assert found.complete and found.quarantine.count_rows() == len(bad)
        ids = found.dataset.to_table(columns=["id"]).column("id").to_pylist()
        assert len(ids) == count - len(bad)
        ids += found.quarantine.to_table(columns=["id"]).column("id").to_pylist()
        assert {*ids} == {f"r{number}" for number in range(count)}
    few, many = peaks
    assert many < 1.05 * few
