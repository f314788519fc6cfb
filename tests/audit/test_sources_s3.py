"""The same records from an object store: a local S3 server, on loopback."""

import collections
import contextlib
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from tests.audit import corpus, harness, writers
from xviz_jax.audit.sources import BadRecord, Column, open_source
from xviz_jax.audit.sources.place import place

KEY, SECRET = "audit-key", "audit-secret"
SCHEMA = {"tokens": Column(dtype="int32", shape=(6,), vocabulary=30)}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Path:
    """What lies in the bucket, as a folder of this machine."""
    path = tmp_path_factory.mktemp("s3") / "bucket"
    for name, write in writers.FORMATS.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        write(path / name, writers.records())
    for name in ("images/a/x.png", "images/b/y.png", "images/b/.z.png"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(writers.png((4, 5, 3), len(name)))
    for part in range(3):
        (path / "parts").mkdir(exist_ok=True)
        writers.parquet(path / "parts" / f"{part}.parquet", writers.records(50 + part))
    (path / "audit").mkdir()
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    for part in range(2):
        rows = slice(20 * part, 20 * part + 20)
        found = {"id": [f"r{n}" for n in range(40)][rows], "x": x[rows]}
        writers.parquet(path / "audit" / f"{part}.parquet", found)
    writers.jsonl(path / "names.jsonl", {"image": ["images/a/x.png", *corpus.OUTSIDE]})
    (path.parent / "secret.png").write_bytes(writers.png((4, 5, 3)))
    return path


@pytest.fixture(scope="module")
def server(bucket) -> Iterator[str]:
    """Serves the bucket; the end of an address."""
    program = Path(sys.executable).with_name("rclone")
    command = [program, "serve", "s3", bucket.parent, "--addr", "127.0.0.1:0"]
    command += ["--auth-key", f"{KEY},{SECRET}", "--config", os.devnull]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process, pytest.MonkeyPatch.context() as patch:
        said = next((line for line in process.stderr if "Starting s3" in line), "")
        port = said.rpartition("127.0.0.1:")[2].partition("/")[0]
        assert port.isdecimal(), said
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        # Of new checksums this server knows none.
        patch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        yield f"?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{port}"
        process.terminate()


@pytest.mark.parametrize("name", writers.FORMATS)
def test_records_are_those_of_the_local_file(name, bucket, server):
    here = open_source(bucket / name, schema=SCHEMA)
    there = open_source(f"s3://bucket/{name}{server}", schema=SCHEMA)
    assert there.fingerprint() == here.fingerprint()
    assert len(there) == len(here)
    other = pickle.loads(pickle.dumps(there))
    for row in (0, 699, 300, 301):
        assert other[row].id == here[row].id
        np.testing.assert_array_equal(
            other[row].columns["tokens"], here[row].columns["tokens"]
        )


def test_folders_of_files_and_of_images(bucket, server):
    parts = open_source(f"s3://bucket/parts/{server}", id=None, schema=SCHEMA)
    assert len(parts) == 50 + 51 + 52
    assert parts.fingerprint() == (
        open_source(bucket / "parts", id=None, schema=SCHEMA).fingerprint()
    )
    images = open_source(f"s3://bucket/images{server}")
    local = open_source(bucket / "images")
    assert images.fingerprint() == local.fingerprint()
    for row in range(2):
        assert (images[row].id, images[row].label) == (local[row].id, row)
        np.testing.assert_array_equal(
            images[row].columns["image"], local[row].columns["image"]
        )


def test_names_in_the_data_do_not_leave_its_folder(server):
    first, *rest = open_source(f"s3://bucket/names.jsonl{server}").rows(0, 11)
    assert not isinstance(first, BadRecord)
    reasons = {one.reason for one in rest if isinstance(one, BadRecord)}
    assert reasons == {"UNSAFE_PATH"}


def test_errors_name_the_object_and_no_key(server):
    with pytest.raises(ValueError, match="no data at bucket/absent"):
        open_source(f"s3://bucket/absent.parquet{server}")
    address = f"s3://{KEY}:wrong@bucket/c.parquet{server}&unknown=1"
    with pytest.raises(ValueError, match="s3:// address") as caught:
        open_source(address)
    assert "wrong" not in str(caught.value)
    with pytest.raises(OSError, match=r"c\.parquet|ACCESS_DENIED"):
        open_source(f"s3://{KEY}:wrong@bucket/c.parquet{server}")


def test_a_store_that_is_gone_is_no_fault_of_the_record(bucket, server):
    system, path = fs.FileSystem.from_uri(f"s3://bucket/gone.parquet{server}")
    table = pq.read_table(bucket / "c.parquet")
    with system.open_output_stream(path) as file:
        pq.write_table(table, file, row_group_size=250)
    source = open_source("bucket/gone.parquet", filesystem=system)
    assert source[0].id == table["id"][0].as_py()
    system.delete_file(path)
    source.reader.close()
    with pytest.raises(OSError, match="gone"):
        source[600]


def test_an_address_of_google_is_understood():
    # There is no server for it here: what it reads is pyarrow's to test.
    found = place("gs://anonymous@bucket/folder/a.parquet")
    assert isinstance(found.system, fs.GcsFileSystem)
    assert (found.path, found.suffix) == ("bucket/folder/a.parquet", ".parquet")
    assert pickle.loads(pickle.dumps(found)) == found


class Relay:
    """Passes connections on to the server, and keeps what was asked."""

    def __init__(self, port):
        self.asked = bytearray()
        self._server = socket.create_server(("127.0.0.1", 0))
        self._to = "127.0.0.1", port
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._server.accept()
                there = socket.create_connection(self._to)
                for pair in ((here, there, self.asked), (there, here, bytearray())):
                    threading.Thread(target=_pass, args=pair, daemon=True).start()

    def requests(self):
        """Since the last time: how often, by method and object."""
        found = re.findall(rb"(GET|HEAD) /([^ ?]*)\S* HTTP/1.1\r\n", self.asked)
        self.asked.clear()
        return collections.Counter(f"{m.decode()} {path.decode()}" for m, path in found)

    def close(self):
        self._server.close()


def _pass(one, other, kept):
    with contextlib.suppress(OSError), one, other:
        while data := one.recv(2**16):
            kept += data
            other.sendall(data)


def test_an_audit_of_a_bucket_and_what_it_asks_for(bucket, server, tmp_path):
    """`docs/scale.md` counts three requests to open a file, and one pass over ids."""
    port = server.rpartition(":")[2]
    relay = Relay(int(port))
    address = f"s3://bucket/audit{server.replace(port, str(relay.port))}"

    def asked():
        """HEAD and GET of each of the two files, and of the folder."""
        found = relay.requests()
        for name in ("bucket/audit/0.parquet", "bucket/audit/1.parquet"):
            yield found.pop(f"HEAD {name}"), found.pop(f"GET {name}")
        yield sum(found.values())

    open_source(address, id=None)
    assert [*asked()] == [(1, 2), (1, 2), 3]
    open_source(address)
    # The ids: the size, the footer and one column.
    opened = (1 + 1, 2 + 2)
    assert [*asked()] == [opened, opened, 3]
    given = {"shard_size": 10}
    there = harness.run(tmp_path / "there", data=address, **given)
    # A shard: the size, the footer and two columns; the first records once more.
    assert [*asked()] == [(2 + 3 * 1, 4 + 3 * 3), (2 + 2 * 1, 4 + 2 * 3), 3]
    # What is finished reads the first records, and no shard.
    assert harness.run(tmp_path / "there", data=address, **given).computed == 0
    assert [*asked()] == [(2 + 1, 4 + 3), opened, 3]
    relay.close()
    here = harness.run(tmp_path / "here", data=str(bucket / "audit"), **given)
    assert (there.run, there.explained) == (here.run, 40)
    assert harness.bits(tmp_path / "there") == harness.bits(tmp_path / "here")
