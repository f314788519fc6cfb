"""The same records, written in each format."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

# More than one block of lines, and several row groups.
COUNT = 700


def records(count: int = COUNT) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "id": [f"r{row}, \u00e9" for row in range(count)],
        "label": [int(label) for label in rng.integers(0, 5, count)],
        "tokens": rng.integers(0, 30, (count, 6)).astype(np.int32),
        "text": [f'line "{row}"\nand, more' for row in range(count)],
    }


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The same, row by row, as plain values."""
    plain = {n: v.tolist() if hasattr(v, "tolist") else v for n, v in found.items()}
    return [
        dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)
    ]


def npz(path: Path, found: dict[str, Any]) -> Path:
    np.savez(path, **found)
    return path


def compressed(path: Path, found: dict[str, Any]) -> Path:
    np.savez_compressed(path, **found)
    return path


def parquet(path: Path, found: dict[str, Any], **options: Any) -> Path:
    plain = {n: list(v) if isinstance(v, np.ndarray) else v for n, v in found.items()}
    pq.write_table(pa.table(plain), path, **{"row_group_size": 250, **options})
    return path


def jsonl(path: Path, found: dict[str, Any]) -> Path:
    lines = [json.dumps(row) for row in rows(found)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def csv_file(path: Path, found: dict[str, Any]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found))
        writer.writeheader()
        writer.writerows(rows(found))
    return path


def png(shape: tuple[int, ...], seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


FORMATS = {
    "a.npz": npz,
    "b.npz": compressed,
    "c.parquet": parquet,
    "d.jsonl": jsonl,
    "e.csv": csv_file,
}
