"""Hostile data through every source and every sink: refused, or harmless."""

import io
import json
import os
import pickle
import struct
import unicodedata
import zipfile
import zlib
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin
from rich.console import Console

from tests.audit import corpus, harness, writers
from xviz_jax import audit, escape
from xviz_jax.audit.sources import BadRecord, Limits, Record, open_source
from xviz_jax.explain.show import plain
from xviz_jax.plotting import gallery, text_attribution


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def reason(source, row: int = 0) -> str:
    with pytest.raises(BadRecord) as caught:
        source[row]
    return caught.value.reason


def png_of(width: int, height: int, *, real: bool = False) -> bytes:
    """A PNG of one bit a pixel, whose rows are there only if `real`."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * height if real else 9), 9)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("side", [8_200, 9_460, 10_000, 100_000])
def test_image_bombs_are_refused_by_their_header(side, tmp_path):
    # The second would be let through by Pillow, the third with a warning.
    bomb = png_of(side, side, real=side == 8_200)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(bomb)
    (tmp_path / "images" / "b.gif").write_bytes(
        b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\0\0" + bytes(9)
    )
    pq.write_table(pa.table({"image": [bomb]}), tmp_path / "a.parquet")
    writers.jsonl(tmp_path / "a.jsonl", {"image": ["images/a.png"]})
    writers.csv_file(tmp_path / "a.csv", {"image": ["images/a.png"]})
    for data in ("images", "a.parquet", "a.jsonl", "a.csv"):
        assert reason(open_source(tmp_path / data)) == "TOO_LARGE", data
    assert reason(open_source([{"image": bomb}])) == "TOO_LARGE"
    assert reason(open_source(tmp_path / "images"), 1) in ("TOO_LARGE", "UNDECODABLE")


def test_bombs_beside_the_pixels_are_refused(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 3_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    (tmp_path / "b.png").write_bytes(writers.png((4, 4, 3)) + bytes(10_000))
    source = open_source(tmp_path, limits=Limits(bytes=9_000))
    assert [reason(source, row) for row in (0, 1)] == ["UNDECODABLE", "TOO_LARGE"]


def npy(shape: tuple[int, ...], descr: str, data: bytes) -> bytes:
    """An array whose header claims what it likes."""
    said = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(said)) + said + data


def test_npz_bombs_are_refused_at_opening(tmp_path):
    # 64 MB of zeros in 64 kB; they would be one row.
    np.savez_compressed(tmp_path / "row.npz", x=np.zeros((1, 16 * 2**20), np.float32))
    assert (tmp_path / "row.npz").stat().st_size < 100_000
    (tmp_path / "claims.npy").write_bytes(npy((2**40, 8), "<f8", bytes(64)))
    (tmp_path / "overflow.npy").write_bytes(npy((2**62, 2**62), "<f8", bytes(64)))
    (tmp_path / "negative.npy").write_bytes(npy((-1, 8), "<f8", bytes(64)))
    (tmp_path / "zero.npy").write_bytes(npy((2**60, 0), "<f8", b""))
    (tmp_path / "code.npy").write_bytes(npy((1,), "__import__('os')", bytes(8)))
    (tmp_path / "long.npy").write_bytes(npy((1,), "<f8" + " " * 20_000, bytes(8)))
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("x.npy", npy((1,), "<f8", bytes(8)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", npy((1,), "<f8", bytes(8)))
    with zipfile.ZipFile(tmp_path / "foreign.npz", "w") as archive:
        archive.writestr("../../evil.sh", "rm")
    limits = Limits(bytes=2**20)
    for name, said in {
        "row.npz": "a row of 'x' has 67108864 bytes",
        "claims.npy": "declares .* 70368744177664 bytes, and has 64",
        "overflow.npy": "declares",
        "negative.npy": "rows of values are wanted",
        "zero.npy": "rows of values are wanted",
        "code.npy": "'x' is no array",
        "long.npy": "'x' is no array",
        "twice.npz": "holds 'x' twice",
        "foreign.npz": r"'\.\./\.\./evil\.sh', which is no array",
    }.items():
        with pytest.raises(ValueError, match=said):
            open_source(tmp_path / name, limits=limits)


def test_nothing_is_ever_unpickled(tmp_path):
    canary = tmp_path / "canary"
    evil = pickle.dumps(Canary(canary))
    objects = np.array([Canary(canary)], object)
    np.savez(tmp_path / "a.npz", allow_pickle=True, x=objects)
    np.save(tmp_path / "b.npy", objects, allow_pickle=True)
    (tmp_path / "c.npy").write_bytes(evil)
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", evil)
    for name in ("a.npz", "b.npy", "c.npy", "d.npz"):
        with pytest.raises(ValueError, match=r"pickled|is no array"):
            open_source(tmp_path / name)
    # An extension type that old versions of pyarrow unpickled, CVE-2023-47248.
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": evil,
    }
    field = pa.field("x", pa.list_(pa.int32()), metadata=metadata)
    table = pa.table([pa.array([[1, 2]])], schema=pa.schema([field]))
    pq.write_table(table, tmp_path / "e.parquet")
    assert open_source(tmp_path / "e.parquet")[0].columns["x"].tolist() == [1, 2]
    assert not canary.exists()
    pickle.loads(evil)
    assert canary.exists()


def test_names_in_the_data_never_leave_its_folder(tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(writers.png((2, 2, 3)))
    (data / "images" / "a.png").write_bytes(writers.png((2, 2, 3)))
    (data / "images" / "inside.png").symlink_to("a.png")
    (data / "images" / "outside.png").symlink_to(tmp_path / "secret.png")
    (data / "images" / "loop.png").symlink_to("loop.png")
    (data / "images" / "gone.png").symlink_to("nothing.png")
    (data / "up").symlink_to(tmp_path)
    os.mkfifo(data / "images" / "pipe.png")
    names = [*corpus.OUTSIDE, "images/outside.png", "up/secret.png"]
    names += [f"images/{name}.png" for name in ("loop", "gone", "pipe", "nothing")]
    names += ["images", "images/inside.png", "images/a.png"]
    for path, write in ((data / "a.jsonl", writers.jsonl), (data / "a.csv", None)):
        kept = [name for name in names if write or (name and "\0" not in name)]
        if write:
            write(path, {"image": kept})
        else:
            writers.csv_file(path, {"image": kept, "n": list(range(len(kept)))})
        found = list(open_source(path).rows(0, len(kept)))
        assert all(isinstance(one, Record) for one in found[-2:]), found[-2:]
        refused = [one for one in found[:-2] if isinstance(one, BadRecord)]
        assert len(refused) == len(kept) - 2
        unsafe = [n for n, one in zip(kept, refused, strict=False)
                  if one.reason == "UNSAFE_PATH"]  # fmt: skip
        assert unsafe == [n for n in kept if n in names[: len(corpus.OUTSIDE) + 2]]
    # The same links, met in a folder of images.
    (data / "up").unlink()
    (data / "a.jsonl").unlink()
    (data / "a.csv").unlink()
    source = open_source(data)
    found = {one.id: getattr(one, "reason", "") for one in source.rows(0, len(source))}
    assert found == {
        "images/a.png": "",
        "images/gone.png": "UNREADABLE",
        "images/inside.png": "",
        "images/loop.png": "UNREADABLE",
        "images/outside.png": "UNSAFE_PATH",
    }
    (data / "up").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="link 'up' to a folder"):
        open_source(data)
    alias = tmp_path / "alias"
    alias.symlink_to(data / "images")
    assert reason(open_source(alias), 4) == "UNSAFE_PATH"


@pytest.mark.parametrize("name", writers.FORMATS)
def test_texts_are_data(name, tmp_path):
    texts = [text for text in corpus.TEXTS if name != "e.csv" or text.strip() == text]
    found = {"id": texts, "text": texts}
    source = open_source(writers.FORMATS[name](tmp_path / name, found))
    for row, text in enumerate(texts):
        record = source[row]
        assert (record.id, record.columns["text"]) == (text, text)


def test_json_that_breaks_readers_breaks_one_record(tmp_path):
    deep, wide = "[" * 100_000, "[" * 65 + "]" * 65
    lines = {
        f'{{"x": {deep}}}': "UNDECODABLE",
        '{"x":' * 50_000 + "1" + "}" * 50_000: "UNDECODABLE",
        f'{{"x": {wide}}}': "UNDECODABLE",
        f'{{"x": {"9" * 5000}}}': "UNDECODABLE",
        '{"x": 1e999}': "NONFINITE_INPUT",
        '{"x": [1, NaN]}': "NONFINITE_INPUT",
        '{"x": -Infinity}': "NONFINITE_INPUT",
        '{"x": 1, "x": 2}': "UNDECODABLE",
        '{"x": [1, null]}': "WRONG_DTYPE",
        '{"x": [[1], 2]}': "WRONG_SHAPE",
        '{"x": {"bytes": "AAAA"}}': "WRONG_DTYPE",
        '{"x": [' + "[]," * 1000 + "[]]}": "EMPTY",
        f'{{"x": 1, "text": "{"[{" * 5000}"}}': "",
        f'{{"x": 1, "text": "{"[" * 500}': "UNDECODABLE TRUNCATED",
        '{"x": 1, "\\ud800": 1}': "",
    }
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    source = open_source(path, columns=["x"])
    for row, wanted in enumerate(lines.values()):
        found = next(source.rows(row, row + 1))
        got = getattr(found, "reason", "")
        assert got in wanted.split() or got == wanted, (row, found)


def test_parquet_that_stands_for_more_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    # A million equal numbers in a row take no place in the file.
    pq.write_table(pa.table({"x": [np.zeros(10**6, np.int32)]}), path)
    assert path.stat().st_size < 20_000
    assert reason(open_source(path, limits=Limits(bytes=2**20))) == "TOO_LARGE"
    assert len(open_source(path)[0].columns["x"]) == 10**6
    # What the file itself declares is refused before it is read.
    pq.write_table(pa.table({"image": [bytes(2**21)]}), path)
    with pytest.raises(BadRecord, match=r"TOO_LARGE: [0-9]+ bytes a row"):
        open_source(path, limits=Limits(bytes=2**20))[0]


def damaged(good: bytes, seed: int) -> bytes:
    """A file with a few bytes changed or missing, more often near its end."""
    rng = np.random.default_rng(seed)
    found = bytearray(good)
    for _ in range(rng.integers(1, 4)):
        near = len(found) - 1 - rng.integers(min(len(found), 1500))
        place = rng.choice([near, rng.integers(len(found))])
        if rng.integers(3):
            found[place] = rng.choice([0, 127, 128, 255, found[place] ^ 1])
        else:
            del found[place : place + rng.integers(1, 9)]
    return bytes(found)


@pytest.mark.parametrize("name", [*writers.FORMATS, "folder"])
def test_damaged_bytes_give_records_or_what_is_wrong_and_nothing_else(name, tmp_path):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        for kind in ("png", "jpeg", "gif", "tiff", "webp", "bmp"):
            pixels = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
            Image.fromarray(pixels).save(path / f"a.{kind}")
        good = {file: file.read_bytes() for file in path.iterdir()}
    else:
        writers.FORMATS[name](path, writers.records(20))
        good = {path: path.read_bytes()}
    outcomes = set()
    for seed in range(60):
        for file, data in good.items():
            file.write_bytes(damaged(data, seed))
        try:
            source = open_source(path, duplicates="number", limits=Limits(bytes=2**20))
        except ValueError:
            outcomes.add("refused")
            continue
        outcomes |= {type(one).__name__ for one in source.rows(0, min(len(source), 99))}
    assert outcomes <= {"refused", "Record", "BadRecord"} and len(outcomes) > 1


@pytest.mark.parametrize("text", [*corpus.TEXTS, corpus.HALF])
def test_no_terminal_obeys_a_text(text):
    shown = escape.terminal(text)
    assert not any(
        unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in shown
    )
    assert not set("\u202e\u2066\x1b\x9b") & set(shown)


class Hostile:
    """The corpus as ids and labels; each text once more, of a record that is bad."""

    texts = corpus.TEXTS

    def __len__(self):
        return 2 * len(self.texts) + 2

    def __getitem__(self, index):
        number, again = divmod(index, len(self.texts))
        if number == 2:
            name, label = [(corpus.HALF, "a label"), ("an id", corpus.HALF)][again]
            return Record(name, {"x": np.ones(8, np.float32)}, label)
        text = self.texts[again]
        if number == 1:
            raise BadRecord("UNDECODABLE", text, f"{text}!")
        x = np.random.default_rng(index).standard_normal(8).astype(np.float32)
        return Record(text, {"x": x}, text)

    def fingerprint(self):
        return "the corpus"


def test_an_audit_writes_every_text_as_it_is_and_obeys_none(tmp_path):
    texts = Hostile.texts
    done = harness.run(tmp_path, data=Hostile(), max_bad_fraction=0.6)
    assert done.state == "complete" and done.explained == len(texts)
    assert done.reasons == {"BAD_UTF8": 2, "UNDECODABLE": len(texts)}
    table = harness.read(tmp_path)
    assert table.column("id").to_pylist() == texts
    assert table.column("label").to_pylist() == texts
    found = audit.open(tmp_path)
    assert [found.rows(text)[0]["label"] for text in texts[:3]] == texts[:3]
    bad = harness.read(tmp_path, "quarantine").to_pylist()
    named = [*(f"{text}!" for text in texts), repr(corpus.HALF), "an id"]
    assert [row["id"] for row in bad] == named
    assert [row["message"] for row in bad[:-2]] == texts
    assert found.summary["reasons"] == done.reasons
    # What is read in a terminal, and what is found in the folder.
    for name in ("audit.log", "summary.json", "run.json"):
        said = (tmp_path / name).read_text()
        assert said == escape.terminal(said), name
    left = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    kept = {"audit.log", "lock", "run.json", "state", "summary.json"}
    assert left == {*kept, "shards", "quarantine"}
    names = {path.stem for path in (tmp_path / "shards").iterdir()}
    assert all(name.isdecimal() for name in names)
    # Drawn from the audit, they change nothing in it.
    before = harness.bits(tmp_path)
    scores = table.column("output").to_numpy()
    text_attribution(table.column("id").to_pylist(), scores)
    assert harness.bits(tmp_path) == before


# What a reader of PDF would do, and of SVG.
COMMANDS = [b"/JavaScript", b"/JS", b"/URI", b"/Launch", b"/OpenAction"]
ACTIVE = {"script", "a", "foreignObject"}


def test_a_picture_draws_every_text_as_it_is():
    texts = [*corpus.TEXTS, corpus.HALF]
    axes = text_attribution(texts, np.linspace(-1, 1, len(texts)))
    assert not any(text.get_parse_math() for text in axes.texts)
    figure = axes.get_figure(root=True)
    assert figure is not None
    titled = gallery(np.zeros((len(texts), 2, 2)), {}, titles=texts)
    options = {"svg.fonttype": "none", "pdf.compression": 0}
    said = set()
    with matplotlib.rc_context(options):  # pyright: ignore[reportArgumentType]
        for each in (figure, titled):
            png, svg, pdf = (io.BytesIO() for _ in range(3))
            each.savefig(png, format="png", dpi=20)
            each.savefig(pdf, format="pdf")
            page = pdf.getvalue()
            assert page.startswith(b"%PDF")
            assert not [command for command in COMMANDS if command in page]
            each.savefig(svg, format="svg")
            for node in ElementTree.fromstring(svg.getvalue()).iter():
                assert node.tag.rpartition("}")[2] not in ACTIVE
                assert not any(name.startswith("on") for name in node.attrib)
                assert not any("javascript:" in v for v in node.attrib.values())
                said.add((node.text or "").strip())
    assert {text.get_text().strip() for text in axes.texts} <= said


def test_a_terminal_shows_every_text_as_it_is():
    texts = [*corpus.TEXTS, corpus.HALF]
    shown = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for text in texts:
        shown.print(plain(text))
    assert isinstance(shown.file, io.StringIO)
    written = shown.file.getvalue()
    assert not {"\x1b", "\x9b", "\x07", "\u202e"} & set(written)
    assert "[red]markup[/red]" in written


def test_half_of_a_pair_is_refused_by_sources(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": corpus.HALF}))
    assert reason(open_source(tmp_path / "a.jsonl")) == "BAD_UTF8"
    np.savez(tmp_path / "a.npz", text=np.array([corpus.HALF]))
    assert reason(open_source(tmp_path / "a.npz")) == "BAD_UTF8"
    assert reason(open_source([corpus.HALF])) == "BAD_UTF8"
    named = os.fsencode(str(tmp_path)) + b"/\xff.png"
    with open(named, "wb") as file:  # noqa: PTH123, a name of bytes
        file.write(writers.png((2, 2, 3)))
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.npz").unlink()
    fault = next(open_source(tmp_path).rows(0, 1))
    assert isinstance(fault, BadRecord)
    assert (fault.reason, fault.id) == ("BAD_UTF8", "0")
