"""Every format gives the same records, in any order, thread and process."""

import csv
import io
import json
import multiprocessing
import pickle
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.audit import writers
from xviz_jax.audit.sources import BadRecord, Column, Limits, Record, open_source
from xviz_jax.audit.sources.csv_rows import Csv
from xviz_jax.audit.sources.place import place
from xviz_jax.audit.sources.several import Several

SCHEMA = {"tokens": Column(dtype="int32", shape=(6,), vocabulary=30)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("formats")
    for name, write in writers.FORMATS.items():
        write(path / name, writers.records())
    return path


def equal(one: Record, other: Record) -> bool:
    return (
        (one.id, one.label) == (other.id, other.label)
        and one.columns.keys() == other.columns.keys()
        and all(np.array_equal(v, other.columns[n]) for n, v in one.columns.items())
    )


def wanted() -> list[Record]:
    return [
        Record(
            row["id"],
            {"tokens": np.array(row["tokens"], np.int32), "text": row["text"]},
            row["label"],
        )
        for row in writers.rows(writers.records())
    ]


@pytest.mark.parametrize("name", writers.FORMATS)
def test_records_are_those_that_were_written(name, folder):
    source = open_source(folder / name, schema=SCHEMA)
    found, right = [*source.rows(0, len(source))], wanted()
    assert len(found) == len(right) == writers.COUNT
    for one, other in zip(found, right, strict=True):
        assert isinstance(one, Record)
        assert equal(one, other)
        assert one.columns["tokens"].dtype == np.int32
    order = np.random.default_rng(1).permutation(len(source))[:60]
    for row in order:
        assert equal(source[int(row)], found[row])
    with pytest.raises(IndexError, match="700 records, got 700"):
        source[700]


@pytest.mark.parametrize("name", writers.FORMATS)
def test_a_source_is_pickled_without_handles_and_read_by_threads(name, folder):
    source = open_source(folder / name, schema=SCHEMA)
    source[3]
    sent = pickle.dumps(source)
    assert len(sent) < 4000
    other = pickle.loads(sent)
    assert other.fingerprint() == source.fingerprint()
    faults = []

    def read(seed):
        for row in np.random.default_rng(seed).permutation(700)[:40]:
            if not equal(other[int(row)], source[int(row)]):
                faults.append(row)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def _first(source, sent):
    sent.put((source[699].id, source.fingerprint()))


def test_a_source_is_read_by_another_process(folder):
    source = open_source(folder / "c.parquet", schema=SCHEMA)
    source[0]
    context = multiprocessing.get_context("spawn")
    sent = context.Queue()
    worker = context.Process(target=_first, args=(source, sent))
    worker.start()
    assert sent.get(timeout=60) == (wanted()[699].id, source.fingerprint())
    worker.join()


def test_the_fingerprint_knows_the_data_and_the_checks_and_not_the_place(folder):
    moved = folder / "moved"
    moved.mkdir()
    for name, write in writers.FORMATS.items():
        path = write(moved / name, writers.records())
        one = open_source(folder / name).fingerprint()
        assert open_source(path).fingerprint() == one, name
        found = {n: open_source(path, **o).fingerprint() for n, o in {
            "columns": {"columns": ["tokens"]},
            "renamed": {"columns": {"x": "tokens", "text": "text"}},
            "schema": {"schema": SCHEMA},
            "id": {"id": None},
            "label": {"label": None},
            "prepare": {"prepare": dict},
            "limits": {"limits": Limits(depth=9)},
        }.items()}  # fmt: skip
        assert len({one, *found.values()}) == 8, name
        changed = writers.records()
        changed["text"][350] += "!"
        write(path, changed)
        assert open_source(path).fingerprint() != one, name


def test_a_folder_of_files_is_one_source(tmp_path):
    found = writers.records()
    for part, rows in enumerate(np.array_split(np.arange(writers.COUNT), 4)):
        cut = {n: [v[row] for row in rows] for n, v in found.items()}
        cut["tokens"] = [row.tolist() for row in cut["tokens"]]
        writers.parquet(tmp_path / f"part-{part}.parquet", cut)
    (tmp_path / "_SUCCESS").touch()
    source = open_source(tmp_path, schema=SCHEMA)
    order = [*range(writers.COUNT), 3, 699, 350]
    for row in order:
        assert equal(source[row], wanted()[row]) if row % 50 == 0 else source[row]
    assert equal(pickle.loads(pickle.dumps(source))[200], wanted()[200])
    # Of many files, a thread holds one open.
    assert isinstance(source.reader, Several)
    assert [bool(vars(part.handles)) for part in source.reader.parts] == [
        False, False, True, False
    ]  # fmt: skip
    writers.parquet(tmp_path / "z.parquet", {"tokens": found["tokens"]})
    with pytest.raises(
        ValueError, match=r"z\.parquet has the columns \['tokens int32'"
    ):
        open_source(tmp_path)
    writers.jsonl(tmp_path / "z.jsonl", found)
    with pytest.raises(ValueError, match=r"\['\.jsonl', '\.parquet'\], of one format"):
        open_source(tmp_path)


def test_images_of_a_folder_are_upright_pixels_with_classes(tmp_path):
    for name in ("b/x.png", "a/deep/er/y.PNG", "a/z.jpg", "c/v.gif", "a/.hidden.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(writers.png((5, 4, 3), len(name)))
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"?")
    turned = Image.fromarray(np.zeros((6, 2, 3), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "c" / "w.jpg", exif=exif)
    source = open_source(tmp_path)
    assert [record.id for record in source.rows(0, len(source))] == [
        "a/deep/er/y.PNG", "a/z.jpg", "b/x.png", "c/v.gif", "c/w.jpg"
    ]  # fmt: skip
    assert [source[row].label for row in range(5)] == [0, 0, 1, 2, 2]
    assert source.classes == ("a", "b", "c")
    image = source[2].columns["image"]
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(
        image, np.array(Image.open(io.BytesIO(writers.png((5, 4, 3), len("b/x.png")))))
    )
    assert source[4].columns["image"].shape == (2, 6, 3)
    flat = open_source(tmp_path / "a" / "deep" / "er")
    assert flat[0].label is None and flat[0].id == "y.PNG"


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 4), (5, 4, 2)])
def test_every_mode_becomes_rgb(shape, tmp_path):
    (tmp_path / "a.png").write_bytes(writers.png(shape))
    assert open_source(tmp_path)[0].columns["image"].shape == (5, 4, 3)


def test_images_in_tables(tmp_path):
    encoded = [writers.png((4, 4, 3), seed) for seed in range(3)]
    pixels = [np.array(Image.open(io.BytesIO(one))) for one in encoded]
    structs = [{"bytes": one, "path": "../../ignored"} for one in encoded]
    pq.write_table(pa.table({"image": structs}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": encoded}), tmp_path / "b.parquet")
    (tmp_path / "images").mkdir()
    for row, one in enumerate(encoded):
        (tmp_path / "images" / f"{row}.png").write_bytes(one)
    names = [f"images/{row}.png" for row in range(3)]
    writers.jsonl(tmp_path / "c.jsonl", {"image": names})
    writers.csv_file(tmp_path / "d.csv", {"image": names, "id": names})
    for name in ("a.parquet", "b.parquet", "c.jsonl", "d.csv"):
        for row, record in enumerate(open_source(tmp_path / name).rows(0, 3)):
            assert isinstance(record, Record)
            np.testing.assert_array_equal(record.columns["image"], pixels[row])


def test_arrays_of_parquet_keep_their_shape(tmp_path):
    images = np.arange(2 * 3 * 4 * 2, dtype=np.float32).reshape(2, 3, 4, 2)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    fixed = pa.FixedSizeListArray.from_arrays(images.ravel(), 24)
    table = pa.table({"image": images.tolist(), "x": fixed, "tensor": tensors})
    pq.write_table(table, tmp_path / "a.parquet")
    schema = {
        "image": Column(dtype="float32", shape=(3, 4, 2)),
        "x": Column(dtype="float32", shape=(24,)),
        "tensor": Column(dtype="float32", shape=(3, 4, 2)),
    }
    source = open_source(tmp_path / "a.parquet", columns=[*schema], schema=schema)
    for row, record in enumerate(source.rows(0, 2)):
        assert isinstance(record, Record), record
        for name in schema:
            np.testing.assert_array_equal(
                record.columns[name].ravel(), images[row].ravel()
            )


class Tens:
    """Grain's protocol."""

    def __len__(self):
        return 10

    def __getitem__(self, row):
        if row == 4:
            raise RuntimeError("disk \x1b[31m on fire")
        return {"x": np.full(3, row, np.float32), "id": row, "label": np.int64(row)}


def test_any_object_with_a_length_and_elements():
    source = open_source(Tens())
    assert source[9].id == "9" and source[9].label == 9
    fault = next(source.rows(4, 5))
    assert isinstance(fault, BadRecord) and fault.id == "4"
    assert fault.reason == "UNREADABLE" and "RuntimeError" in fault.message
    assert pickle.loads(pickle.dumps(fault)).args == fault.args
    assert open_source(["a", "b"])[1].columns == {"text": "b"}
    assert open_source(np.eye(3))[1].columns["x"].tolist() == [0, 1, 0]
    arrays = open_source({"tokens": np.array([[1, 2]]), "id": np.array(["one"])})
    assert arrays[0].id == "one" and arrays[0].columns["tokens"].tolist() == [1, 2]
    record = Record("a", {"x": np.ones(2)}, 3)
    assert equal(open_source([record])[0], record)
    for wrong in (7, {"x": np.array([{}])}, {"x": np.ones(2), "id": ["a"]}, [object()]):
        with pytest.raises(ValueError, match=r"wanted|`data` is|one length"):
            open_source(wrong)


def test_one_array_alone(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(3, dtype=">f4"))
    record = open_source(tmp_path / "a.npy")[2]
    assert record.columns["x"].tolist() == [0, 0, 1]
    assert record.columns["x"].dtype.isnative and record.id == "2"


def test_numbers_of_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeffx,y,tokens\r\n"[1, 2.5]",3,4 5 6\r\n\r\n1 nan,4.5,7\r\n')
    schema = {
        "x": Column(dtype="float32", shape=(2,)),
        "y": Column(dtype="float32", shape=()),
        "tokens": Column(dtype="int32", shape=(None,)),
    }
    source = open_source(path, columns=[*schema], schema=schema)
    assert len(source) == 2
    first = {n: np.asarray(v).tolist() for n, v in source[0].columns.items()}
    assert first == {"x": [1, 2.5], "y": 3, "tokens": [4, 5, 6]}
    with pytest.raises(BadRecord, match="NONFINITE_INPUT"):
        source[1]
    alone = open_source(path, columns=["tokens"], schema={"tokens": schema["tokens"]})
    assert alone[1].columns["tokens"].tolist() == [7]
    (tmp_path / "a.tsv").write_text("id\ttext\na\tone, two\n")
    assert open_source(tmp_path / "a.tsv")[0].columns == {"text": "one, two"}


FIELDS = st.text('a",\n\u00e9', max_size=9)


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(FIELDS, min_size=1, max_size=6).map(",".join), cut=st.integers(1, 5)
)
@example(text='5" pipe,"a ""b""\n,"\n"x"y,"z\n"', cut=1)
def test_records_of_csv_are_cut_where_python_cuts_them(text, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text("one\n" + text, newline="", encoding="utf-8")
    expected = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    reader = Csv(place(path), Limits())
    records = [reader.record(row).decode() for row in range(len(reader))]
    assert [next(csv.reader([record])) for record in records] == expected
    # In pieces, the state is that of the whole.
    data, state = text.encode(), 0
    for begin in range(0, len(data), cut):
        state = reader.unfinished(data[begin : begin + cut], state)
    assert state == reader.unfinished(data, 0)


def test_prepare_makes_what_the_model_gets():
    def tokens(columns):
        return {"tokens": np.frombuffer(columns["text"].encode(), np.uint8)}

    source = open_source(["ab", "c"], prepare=tokens)
    assert source[0].columns["tokens"].tolist() == [97, 98]
    failing = open_source(["ab"], prepare=lambda columns: {"x": columns["nothing"]})
    with pytest.raises(BadRecord, match="UNPREPARED: KeyError"):
        failing[0]


@pytest.mark.parametrize("name", ["a.npz", "b.npz", "c.parquet", "d.jsonl", "e.csv"])
def test_memory_does_not_grow_with_the_records(name, tmp_path):
    write, peaks = writers.FORMATS[name], []
    for count in (2_000, 20_000):
        path = tmp_path / f"{count}{name}"
        found = {
            "id": [f"{row:08}" for row in range(count)],
            "tokens": np.arange(4 * count, dtype=np.int32).reshape(count, 4),
        }
        write(path, found)
        del found
        open_source(path)[0]
        tracemalloc.start()
        source = open_source(path)
        for row in range(0, count, 7):
            source[row]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 16 bytes a record would be 288 kB.
    assert peaks[1] - peaks[0] < 60_000, peaks


def test_what_lies_in_a_json_line_may_be_of_any_kind(tmp_path):
    lines = [{"x": [[1, 2], [3, 4]], "id": 7, "label": "cat"}, {"x": 1.5, "id": None}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = open_source(path)
    assert source[0].columns["x"].shape == (2, 2)
    assert (source[0].id, source[0].label) == ("7", "cat")
    assert source[1].columns["x"].shape == () and source[1].id == "1"
    assert source.names.missing == 1
