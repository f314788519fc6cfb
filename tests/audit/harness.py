"""Runs audits here or elsewhere, and holds what must be true after any fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.audit import tiny
from tests.conftest import CACHE, SHARED
from xviz_jax import audit
from xviz_jax.audit import rows

ROOT = Path(__file__).parent.parent.parent
_STARTED = []


def run(out, **options):
    """An audit of the tiny model in this process."""
    given = {"model": tiny.MODEL, "methods": ("saliency",), "data": tiny.Records()}
    given |= {"microbatch": 4, "shard_size": 8, "max_bad_fraction": 0.5, "devices": 1}
    return audit.run(out, **{**given, **options})


def start(out, failpoint="", cache=CACHE, **options):
    """The same in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        **SHARED,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "XVIZ_FAILPOINT": failpoint,
    }
    options = {"max_bad_fraction": 0.5, **options}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.audit.process", str(out), json.dumps(options)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    _STARTED.append(process)
    return process


def leave():
    """Ends what a test that failed has left."""
    while _STARTED:
        process = _STARTED.pop()
        process.kill()
        process.communicate()


def ended(process, timeout=300):
    """Its exit code, and what it said."""
    said, errors = process.communicate(timeout=timeout)
    return process.returncode, said, errors


def read(out, name="shards"):
    """All rows in the order of the files."""
    files = sorted((Path(out) / name).glob("*.parquet"))
    return pa.concat_tables([pq.ParquetFile(file).read() for file in files])


def bits(out):
    """The bytes of each row, by id."""
    table = read(out).drop_columns(["index"])
    found = {}
    for number, name in enumerate(table.column("id").to_pylist()):
        row = table.slice(number, 1).combine_chunks()
        found[name] = rows.checksum(row)
    return found


def quarantined(out):
    """Reasons by id."""
    if not [*(Path(out) / "quarantine").iterdir()]:
        return {}
    table = read(out, "quarantine")
    ids = table.column("id").to_pylist()
    assert len(ids) == len(set(ids))
    return dict(zip(ids, table.column("reason").to_pylist(), strict=True))


def written(out):
    """The bytes of every file of rows, and of what they say they are."""
    kept = [path for each in ("shards/*", "quarantine/*") for path in out.glob(each)]
    return {path: path.read_bytes() for path in [*kept, *out.glob("run.json")]}


def refused(out, said, kind=ValueError, **options):
    """A call of `run` that raises, writes nothing and changes nothing."""
    before = written(out)
    with pytest.raises(kind, match=said):
        run(out, **options)
    assert written(out) == before


def check(out, clean, inputs=None):
    """The invariant: nothing lost, nothing twice, every row a clean run's.

    Args:
      out: The folder.
      clean: `bits` of a run without faults.
      inputs: Ids of all records; by default those of the clean run.
    """
    table = read(out)
    ids = table.column("id").to_pylist()
    inputs = set(clean) if inputs is None else set(inputs)
    assert len(ids) == len(set(ids))
    bad = set(quarantined(out))
    assert not bad & set(ids)
    assert bad | set(ids) == inputs
    found = bits(out)
    for name in ids:
        assert found[name] == clean[name], name
    left = [*Path(out).rglob("*.tmp")]
    assert not left
