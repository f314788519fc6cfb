"""Whole audits of files: every format gives the same rows, and what is bad is aside."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.audit import harness, tiny, writers
from tests.contract.quick import quick_compilation as quick_compilation
from xviz_jax import audit
from xviz_jax.models import embedded

COUNT = 3
METHODS = ("saliency",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of the embedded model, in every format that holds images."""
    path = tmp_path_factory.mktemp("images")
    known, labels = embedded.images()
    # One image of each of three classes, in the order in which folders list them.
    chosen = [int(np.flatnonzero(labels == label)[0]) for label in range(COUNT)]
    pixels = np.round(known[chosen] * 255).astype(np.uint8)
    floats = pixels.astype(np.float32) / 255
    names = [f"{label}/a.png" for label in range(COUNT)]
    about = {"id": names, "label": list(range(COUNT))}
    files = []
    for name, image in zip(names, pixels, strict=True):
        held = io.BytesIO()
        Image.fromarray(image).save(held, "PNG")
        files.append(held.getvalue())
        (path / "folder" / name).parent.mkdir(parents=True)
        (path / "folder" / name).write_bytes(held.getvalue())
    paths = {**about, "image": [f"folder/{name}" for name in names]}
    writers.npz(path / "bytes.npz", {**about, "image": pixels})
    writers.csv_file(path / "paths.csv", paths)
    writers.csv_file(path / "arrays.csv", {**about, "image": floats})
    writers.jsonl(path / "arrays.jsonl", {**about, "image": floats})
    writers.parquet(path / "files.parquet", {**about, "image": files})
    return path


def embedded_run(out, data):
    done = harness.run(
        out,
        model="embedded",
        data=str(data),
        methods=METHODS,
        microbatch=2,
        target="label",
    )
    assert done.bitwise and done.explained == COUNT, (data, done.reasons)
    return harness.bits(out)


@pytest.fixture(scope="module")
def known(folder, tmp_path_factory):
    return embedded_run(tmp_path_factory.mktemp("known"), folder / "bytes.npz")


@pytest.mark.parametrize(
    "name",
    [
        "paths.csv",
        "arrays.csv",
        "arrays.jsonl",
        "files.parquet",
        "folder",
    ],
)
def test_the_embedded_model_reads_every_format(name, folder, known, tmp_path):
    assert embedded_run(tmp_path, folder / name) == known


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((5, 4), (5, 4)),
        ((None, None, 1), (5, 4, 1)),
        ((5, 4, 3), (5, 4, 3)),
        (None, (5, 4, 3)),
    ],
)
def test_an_image_has_the_channels_that_are_wanted(shape, wanted, tmp_path):
    (tmp_path / "a.png").write_bytes(writers.png((5, 4, 3)))
    schema = {"image": audit.Column(shape=shape, decode="image")}
    found = audit.open_source(tmp_path, schema=schema)[0].columns["image"]
    assert found.shape == wanted and found.dtype == np.uint8
    rgb = np.array(Image.open(tmp_path / "a.png")).astype(np.float64)
    if wanted[-1] != 3:
        rgb = rgb @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(found.reshape(rgb.shape), rgb, atol=1)


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_a_long_id_is_whole_wherever_its_record_goes(tmp_path):
    x = np.random.default_rng(0).standard_normal((4, 8)).tolist()
    ids = ["a" * 900 + str(number) for number in range(4)]
    rows = [{"id": id, "x": each} for id, each in zip(ids, x, strict=True)]
    rows[1]["x"] = rows[2]["x"] = [*x[1][:-1], "no number" * 200]
    data = lines(tmp_path / "a.jsonl", rows)
    harness.run(tmp_path / "out", data=data)
    harness.check(tmp_path / "out", harness.bits(tmp_path / "out"), ids)
    assert set(harness.quarantined(tmp_path / "out")) == {ids[1], ids[2]}
    messages = harness.read(tmp_path / "out", "quarantine").column("message")
    assert all(len(each) <= 500 for each in messages.to_pylist())


def test_a_label_that_is_no_text_is_one_bad_record(tmp_path):
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    labels = ["fine", "\ud800", 3, "caf\u00e9", None]
    ids = [f"r{number}" for number in range(5)]
    each = [*zip(ids, x, labels, strict=True)]
    rows = [{"id": id, "x": x.tolist(), "label": label} for id, x, label in each]
    data = lines(tmp_path / "a.jsonl", rows)
    # A list of records is opened; a source of the caller's own is taken as it is.
    objects = [audit.Record(id, {"x": x}, label) for id, x, label in each]
    found = []
    for number, given in enumerate((data, objects, Own(objects))):
        out = tmp_path / str(number)
        assert harness.run(out, data=given).reasons == {"BAD_UTF8": 1}
        assert harness.quarantined(out) == {"r1": "BAD_UTF8"}
        table = harness.read(out)
        assert table.column("label").to_pylist() == ["fine", "3", "caf\u00e9", None]
        found.append(harness.bits(out))
        harness.check(out, found[0], ids)


class Own(tiny.Listed):
    """A source of the caller's own, which says what it is."""

    def fingerprint(self):
        return "own"


def test_names_that_bad_records_bring_with_them_stay_apart(tmp_path):
    class Named(Own):
        def __getitem__(self, index):
            if index in (1, 2):
                raise audit.BadRecord("MISSING", "\ud800", f"{chr(0xD800 + index)}")
            return self.records[index]

    objects = [tiny.Records()[number] for number in range(4)]
    harness.run(tmp_path, data=Named(objects))
    assert set(harness.quarantined(tmp_path)) == {"\\ud801", "\\ud802"}
