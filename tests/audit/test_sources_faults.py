"""A bad record is refused alone, with its reason; bad data as a whole at opening."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.audit import writers
from xviz_jax.audit.sources import (
    BadRecord,
    Buckets,
    Column,
    Limits,
    Record,
    open_source,
)

TOKENS = {"tokens": Column(dtype="int32", shape=(None,), vocabulary=10, max_length=8)}


def reasons(source) -> list[str]:
    return [getattr(found, "reason", "") for found in source.rows(0, len(source))]


def refused(column: Column, value, *, loose: bool = False) -> str:
    with pytest.raises(BadRecord) as caught:
        column.check("x", value, loose=loose)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "objects"])
def test_tokens_are_checked_one_by_one(kind, tmp_path):
    rows = [[1, 2], [9], [10], [-1, 3], [], list(range(9)), [2**40], None, [0] * 8]
    wanted = [
        "", "", "OUT_OF_VOCABULARY", "NEGATIVE_ID", "EMPTY", "TOO_LONG",
        "OUT_OF_VOCABULARY", "MISSING", "",
    ]  # fmt: skip
    ids = [f"r{row}" for row in range(len(rows))]
    if kind == "jsonl":
        data = writers.jsonl(tmp_path / "a.jsonl", {"id": ids, "tokens": rows})
    elif kind == "csv":
        texts = [None if row is None else json.dumps(row) for row in rows]
        data = writers.csv_file(tmp_path / "a.csv", {"id": ids, "tokens": texts})
    elif kind == "parquet":
        data = tmp_path / "a.parquet"
        pq.write_table(pa.table({"id": ids, "tokens": rows}), data)
    else:
        data = [
            {"id": name, "tokens": None if row is None else np.array(row, int)}
            for name, row in zip(ids, rows, strict=True)
        ]
    source = open_source(data, schema=TOKENS)
    assert reasons(source) == wanted
    found = list(source.rows(0, len(source)))
    # Output and quarantine together are the input.
    assert [one.id for one in found] == ids
    assert all(f"[{row}]" not in str(one) for row, one in enumerate(found))


def test_numbers_keep_their_meaning():
    float32, int32 = Column(dtype="float32"), Column(dtype="int32")
    assert float32.check("x", np.ones(2, np.float64), loose=False).dtype == np.float32
    assert int32.check("x", np.ones(2, np.int64), loose=False).dtype == np.int32
    assert float32.check("x", [1, 2], loose=True).dtype == np.float32
    image = np.ones((2, 2, 3), np.uint8)
    assert refused(float32, image) == "WRONG_DTYPE"
    assert refused(int32, np.ones(2)) == "WRONG_DTYPE"
    assert refused(int32, [1, 2.5], loose=True) == "WRONG_DTYPE"
    assert refused(int32, [2**31]) == "WRONG_DTYPE"
    assert refused(Column(dtype="uint8"), [-1]) == "WRONG_DTYPE"
    assert refused(Column(dtype="uint8"), [2**70]) == "WRONG_DTYPE"
    assert refused(int32, [[1], [2, 3]]) == "WRONG_SHAPE"
    assert refused(int32, ["1"]) == "WRONG_DTYPE"
    assert refused(int32, [{}]) == "WRONG_DTYPE"
    assert refused(Column(dtype="text"), 7) == "WRONG_DTYPE"
    assert refused(Column(dtype="text"), b"\xff") == "BAD_UTF8"
    assert refused(Column(vocabulary=9), np.array([1.5])) == "WRONG_DTYPE"
    assert refused(Column(dtype="float32", vocabulary=9), [1, 9], loose=True) == (
        "OUT_OF_VOCABULARY"
    )
    assert refused(int32, "text") == "WRONG_DTYPE"
    # What becomes infinite in the wanted dtype is refused as well.
    for value in (np.nan, np.inf, 1e300):
        assert refused(float32, np.array([1.0, value])) == "NONFINITE_INPUT"
    assert np.isnan(Column(finite=False).check("x", [np.nan], loose=False)).all()
    shaped = Column(shape=(None, 4, 3))
    assert refused(shaped, np.ones((3, 4, 4))) == "WRONG_SHAPE"
    assert refused(shaped, np.ones((4, 3))) == "WRONG_SHAPE"
    assert refused(shaped, np.ones((0, 4, 3))) == "EMPTY"
    assert refused(Column(min_length=3), [1, 2]) == "WRONG_SHAPE"
    assert refused(Column(dtype="text"), "") == "EMPTY"
    assert refused(Column(dtype="text", max_length=3), "four") == "TOO_LONG"


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "object"},
        {"dtype": "text", "vocabulary": 3},
        {"vocabulary": 0},
        {"min_length": 3, "max_length": 2},
    ],
)
def test_a_column_that_nothing_meets_is_refused(options):
    with pytest.raises(ValueError, match=r"`|text"):
        Column(**options)
    with pytest.raises(ValueError, match="`reason` is one of"):
        BadRecord("OOPS", "no such reason")


def test_lines_are_refused_alone(tmp_path):
    lines = [
        b'{"text": "good", "id": "a"}',
        b'{"text": "\xff\xfe", "id": "b"}',
        b'{"text": "cut, "id": "c"}',
        b'["text"]',
        b'{"text": NaN}',
        b'{"text": "half", "text": "other"}',
        b'{"id": "g"}',
        b'{"text": "\\ud800", "id": "h"}',
        b'{"text": "fine", "id": "\\udfff"}',
        b'{"text": "fine", "id": 1.5}',
        b'{"text": "fine", "id": "' + b"k" * 2000 + b'"}',
        b'{"text": "' + b"x" * 200_000 + b'"}',
        b'{"text": "last", "id": "m',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    source = open_source(path, limits=Limits(bytes=100_000))
    assert reasons(source) == [
        "", "BAD_UTF8", "UNDECODABLE", "UNDECODABLE", "NONFINITE_INPUT", "UNDECODABLE",
        "MISSING", "BAD_UTF8", "BAD_UTF8", "WRONG_DTYPE", "TOO_LONG", "TOO_LARGE",
        "TRUNCATED",
    ]  # fmt: skip
    # What is kept of a bad record does not hold the record.
    assert all(
        found.__traceback__ is None and found.__context__ is None
        for found in source.rows(1, len(source))
        if isinstance(found, BadRecord)
    )
    named = [found.id for found in source.rows(0, len(source))]
    assert named == ["a", "1", "2", "3", "4", "5", "g", "h", *map(str, range(8, 13))]


def test_rows_of_csv_are_refused_alone(tmp_path):
    lines = [
        "id,text",
        "a,good",
        "b",
        "c,one,two",
        'd,"x"y',
        f"e,{'x' * 200_000}",
        f'f,"{"x," * 90_000}\n"',
        "g,",
        "h,\ud800",
        'i,"cut',
    ]
    path = tmp_path / "a.csv"
    path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    source = open_source(path, limits=Limits(bytes=150_000))
    assert reasons(source) == [
        "", "TRUNCATED", "WRONG_SHAPE", "UNDECODABLE", "TOO_LARGE", "TOO_LARGE",
        "MISSING", "BAD_UTF8", "TRUNCATED",
    ]  # fmt: skip
    # Within the limit of bytes, Python's own limit of a field holds.
    assert reasons(open_source(path))[4] == "TOO_LARGE"


def test_images_are_refused_alone(tmp_path):
    good = writers.png((40, 30, 3))
    jpeg = tmp_path / "a.jpg"
    Image.new("RGB", (64, 64), "red").save(jpeg)
    Image.fromarray(np.ones((4, 4), np.uint16)).save(tmp_path / "b.png")
    cut = jpeg.read_bytes()
    (tmp_path / "c.jpg").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "d.png").write_bytes(good[:-200])
    (tmp_path / "e.png").write_bytes(b"")
    (tmp_path / "f.png").write_bytes(b"<svg onload='alert(1)'/>")
    (tmp_path / "g.png").write_bytes(good)
    (tmp_path / "h.png").write_bytes(good)
    (tmp_path / "i.jpg").mkdir()
    source = open_source(tmp_path)
    (tmp_path / "h.png").unlink()
    assert reasons(source) == [
        "", "WRONG_DTYPE", "TRUNCATED", "TRUNCATED", "UNDECODABLE", "UNDECODABLE", "",
        "UNREADABLE",
    ]  # fmt: skip
    assert reasons(open_source(tmp_path, limits=Limits(pixels=1199)))[6] == "TOO_LARGE"


def test_half_a_surrogate_pair_in_an_array_of_texts():
    source = open_source({"text": np.array(["fine", "\ud800"])})
    assert reasons(source) == ["", "BAD_UTF8"]


def test_texts_of_bytes_are_texts(tmp_path):
    texts = ["fine", "caf\u00e9"]
    encoded = [text.encode() for text in texts]
    np.savez(
        tmp_path / "a.npz",
        text=np.array([*encoded, b"\xff"]),
        id=np.array([*encoded, b"c"]),
    )
    pq.write_table(pa.table({"text": [*encoded, b"\xff"]}), tmp_path / "a.parquet")
    for name in ("a.npz", "a.parquet"):
        source = open_source(tmp_path / name)
        assert [source[row].columns["text"] for row in (0, 1)] == texts
        assert reasons(source) == ["", "", "BAD_UTF8"]
    assert open_source(tmp_path / "a.npz")[1].id == "caf\u00e9"


def test_ids_are_unique(tmp_path):
    found = {"id": ["a", "b", "a", "", "a", "3"], "tokens": np.ones((6, 2), np.int32)}
    path = writers.jsonl(tmp_path / "a.jsonl", found)
    with pytest.raises(
        ValueError, match=r"'a' \(row 2\), 'a' \(row 4\), '3' \(row 5\)"
    ):
        open_source(path)
    source = open_source(path, duplicates="number")
    names = [source[row].id for row in (5, 4, 3, 2, 1, 0)]
    assert names == ["3#5", "a#4", "3", "a#2", "b", "a"]
    assert source.names.repeated == 3 and source.names.missing == 1
    assert [r.id for r in open_source(path, id=None).rows(0, 6)] == list("012345")
    assert open_source(path, duplicates="trust")[4].id == "a"
    taken = writers.jsonl(tmp_path / "b.jsonl", {**found, "id": [*"aaaab", "a#2"]})
    with pytest.raises(ValueError, match="would be named as another"):
        open_source(taken, duplicates="number")


def test_a_bad_record_keeps_its_own_id_even_where_ids_repeat(tmp_path):
    found = {"id": ["a", "a"], "tokens": [[1], [99]]}
    path = writers.jsonl(tmp_path / "a.jsonl", found)
    source = open_source(path, duplicates="number", schema=TOKENS)
    assert [one.id for one in source.rows(0, 2)] == ["a", "a#1"]
    # A row whose id cannot be read has its number, which may be another's id.
    path.write_text('{"id": "2", "tokens": [1]}\n{"id": "b", "tokens": [2]}\n{"cut\n')
    with pytest.raises(ValueError, match=r"'2' \(row 2\), 1 rows in all"):
        open_source(path)
    source = open_source(path, duplicates="number")
    assert [one.id for one in source.rows(0, 3)] == ["2", "b", "2#2"]


def _wrong(path: Path) -> dict[str, str]:
    """Damaged files, and what is said of them."""
    found = writers.records(40)
    parquet = writers.parquet(path / "good.parquet", found).read_bytes()
    npz = writers.npz(path / "good.npz", found).read_bytes()
    (path / "cut.parquet").write_bytes(parquet[:-100])
    (path / "no.parquet").write_bytes(b"PAR1 no")
    (path / "empty.parquet").write_bytes(b"")
    (path / "cut.npz").write_bytes(npz[:-100])
    (path / "no.npz").write_bytes(b"no archive")
    np.savez(path / "uneven.npz", x=np.ones(3), id=np.arange(4))
    np.savez(path / "columns.npz", x=np.asfortranarray(np.ones((3, 4))))
    np.savez(path / "single.npz", x=np.float32(1))
    np.savez(path / "complex.npz", x=np.ones(3, complex))
    np.savez(path / "named.npz", y=np.ones(3))
    np.savez(path / "float.npz", tokens=np.ones((3, 2)))
    (path / "empty.jsonl").write_text("\n \n")
    (path / "list.jsonl").write_text("[1]\n2\n")
    (path / "empty.csv").write_text("")
    (path / "twice.csv").write_text("x,x\n1,2\n")
    (path / "latin.csv").write_bytes("t\u00e9xt\n1\n".encode("latin-1"))
    (path / "what.zip").write_bytes(npz)
    (path / "images").mkdir()
    return {
        "cut.parquet": "cut.parquet is truncated or no Parquet",
        "no.parquet": "truncated or no Parquet",
        "empty.parquet": "truncated or no Parquet",
        "cut.npz": "cut.npz is truncated or no npz",
        "no.npz": "truncated or no npz",
        "uneven.npz": r"different lengths: {'x': 3, 'id': 4}",
        "columns.npz": "stored column by column",
        "single.npz": "rows of values are wanted",
        "complex.npz": r"complex128\[3\], numbers or texts are wanted",
        "named.npz": r"none of the columns \['image', 'x', .* it has \['y'\]",
        "float.npz": "column 'tokens' holds float64, int32 is wanted",
        "empty.jsonl": "no JSON objects: it is empty",
        "list.jsonl": "no JSON objects: UNDECODABLE",
        "empty.csv": "one for each column is wanted",
        "twice.csv": r"\['x'\] twice",
        "latin.csv": "no line of names: BAD_UTF8",
        "what.zip": "of no known format",
        "images": "holds no images",
        "absent.npz": "there is no data at",
    }


def test_damaged_data_is_one_clear_error_at_opening(tmp_path):
    for name, said in _wrong(tmp_path).items():
        schema = TOKENS if name == "float.npz" else None
        with pytest.raises(ValueError, match=said):
            open_source(tmp_path / name, schema=schema)


def test_wrong_calls_are_refused(tmp_path):
    path = writers.parquet(tmp_path / "a.parquet", writers.records(9))
    for options, said in [
        ({"columns": ["x"]}, r"no column \['x'\], it has \['id', 'label', 'tokens'"),
        ({"columns": "tokens"}, "several names"),
        ({"columns": []}, "names none"),
        ({"id": "name"}, "no column 'name' for `id`"),
        ({"label": "class"}, "no column 'class' for `label`"),
        ({"schema": {"x": Column()}}, r"`schema` names \['x'\]"),
        ({"schema": {"text": Column(dtype="int32")}}, "'text' holds <U0, int32 is"),
        ({"schema": {"tokens": Column(dtype="text")}}, "holds int32, text is wanted"),
    ]:
        with pytest.raises(ValueError, match=said):
            open_source(path, **options)
    with pytest.raises(ValueError, match="gs:// or s3://, got ftp://"):
        open_source("ftp://host/a.parquet")


def test_damaged_pages_cost_their_row_group(tmp_path):
    found = writers.records()
    found["tokens"] = np.arange(4200, dtype=np.int32).reshape(700, 6)
    path = writers.parquet(
        tmp_path / "a.parquet", found, write_page_checksum=True, use_dictionary=False,
        compression="none",
    )  # fmt: skip
    data = bytearray(path.read_bytes())
    # A token of the second of three groups.
    place = data.index(np.arange(1800, 1806, dtype=np.int32).tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    source = open_source(path)
    damaged = [row for row, reason in enumerate(reasons(source)) if reason]
    assert damaged == list(range(250, 500))
    # What was read before the damage can be read after it.
    assert source[249].id and source[500].id
    assert source[100].columns["tokens"].tolist() == list(range(600, 606))
    fault = next(source.rows(499, 500))
    assert isinstance(fault, BadRecord) and "CRC" in fault.message


def test_a_file_that_shrinks_gives_bad_records(tmp_path):
    for name in ("a.npz", "d.jsonl"):
        path = writers.FORMATS[name](tmp_path / name, writers.records())
        source = open_source(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        found = reasons(source)
        assert "TRUNCATED" in found, name


def test_storage_that_fails_is_no_fault_of_the_record(tmp_path):
    for name in ("a.npz", "b.npz", "c.parquet", "d.jsonl"):
        path = writers.FORMATS[name](tmp_path / name, writers.records())
        source = open_source(path)
        source.reader.close()
        path.unlink()
        with pytest.raises(OSError, match=name):
            source[0]


def test_buckets_depend_on_the_record_alone():
    buckets = Buckets(column="tokens", shortest=5, longest=100)
    assert buckets.all() == (8, 16, 32, 64, 100)
    given = Buckets(column="tokens", lengths=(3, 10), pad=-1)
    for length, wanted in [(1, 3), (3, 3), (4, 10), (10, 10)]:
        tokens = np.arange(length, dtype=np.int32)
        record = Record("a", {"tokens": tokens, "other": "kept"})
        assert given.bucket_of(record) == wanted
        columns, mask = given.padded(record)
        assert columns["other"] == "kept" and mask.sum() == length
        padded = np.asarray(columns["tokens"])
        assert padded.shape == mask.shape == (wanted,)
        np.testing.assert_array_equal(padded[mask], tokens)
        assert (padded[~mask] == -1).all()
        # Padded before, by any amount, it is the same.
        again, other = given.padded(Record("a", columns))
        np.testing.assert_array_equal(again["tokens"], padded)
        np.testing.assert_array_equal(mask, other)
    vectors = Record("a", {"tokens": np.zeros((4, 2), np.float32)})
    columns, mask = given.padded(vectors)
    assert columns["tokens"].shape == (10, 2) and mask.sum() == 4


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (np.zeros(4, np.int32), "EMPTY"),
        (np.zeros(0, np.int32), "EMPTY"),
        (np.ones(101, np.int32), "TOO_LONG"),
        (np.int32(3), "WRONG_SHAPE"),
        ("text", "WRONG_SHAPE"),
        (None, "MISSING"),
    ],
)
def test_no_record_is_cut_to_a_bucket(tokens, reason):
    columns = {} if tokens is None else {"tokens": tokens}
    with pytest.raises(BadRecord) as caught:
        Buckets(column="tokens", longest=100).bucket_of(Record("a", columns))
    assert (caught.value.reason, caught.value.id) == (reason, "a")


def test_buckets_that_do_not_ascend_are_refused():
    for lengths in ((), (4, 4), (0, 3), (8, 4)):
        with pytest.raises(ValueError, match="ascend"):
            Buckets(column="tokens", lengths=lengths)
    with pytest.raises(ValueError, match="`shortest`"):
        Buckets(column="tokens", shortest=9, longest=8)
