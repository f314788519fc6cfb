"""A published checkpoint's folder: its configuration, and tensors not yet read."""

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xviz_jax.models.extra import require

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_CONVERT = """python - <<'END'
import torch
from safetensors.torch import save_file
weights = torch.load({name!r}, map_location="cpu", weights_only=True)
save_file({{k: v.clone() for k, v in weights.items()}}, "model.safetensors")
END"""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file, not yet read.

    Attributes:
      shape: Of the decoded array.
      dtype: As the file calls it: `F32`, `BF16`, `Q4_1`, …
      read: Reads what is stored, as an array of any shape and dtype.
      decode: Turns that into floats of `shape`; None where it holds no floats.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray] | None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a folder holds; no weight is in memory yet.

    Attributes:
      path: The folder, or the GGUF file.
      config: `config.json`, or what stands for it; under `pooling` what
        `1_Pooling/config.json` says, if it is there.
      tensors: By their names in the files.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads the configuration and the headers of a checkpoint.

    Args:
      path: A folder with `config.json` and one or many `*.safetensors` (and their
        index), or a GGUF file, or a folder that holds one and no `config.json`.

    Raises:
      ValueError: If something is missing, truncated or malformed.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no checkpoint at {path}")
    packed = gguf_file(path)
    if packed is not None:
        # GGUF needs a package of its own.
        from xviz_jax.models import gguf

        return gguf.open_gguf(packed)
    if not path.is_dir():
        raise ValueError(f"a checkpoint is a folder or a .gguf file, got {path}")
    config = read_json(path / "config.json")
    # Where sentence-transformers says what stands for a text.
    pooling = path / "1_Pooling" / "config.json"
    if pooling.exists():
        config["pooling"] = read_json(pooling)
    return Checkpoint(path, config, _tensors(path))


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means; None where it means a folder of safetensors.

    Raises:
      ValueError: If a folder holds several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = [file.name for file in found]
        raise ValueError(f"{path} holds several GGUF files, name one of {names}")
    return found[0] if found else None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ValueError: If there is no such file, or it holds anything else.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object, got {type(found).__name__}")
    return found


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's files, all faults of the files in one error."""
    where, faults = _files(folder)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        try:
            found = _headers(folder / name)
        except ValueError as error:
            faults.append(str(error))
            continue
        for twice in sorted(found.keys() & tensors.keys()):
            faults.append(f"{twice!r} is in two files, {name} is the second")
        for tensor, file in where.items():
            if file == name and tensor and tensor not in found:
                faults.append(f"the index says {tensor!r} is in {name}, it is not")
        tensors.update(found)
    if faults:
        raise ValueError(f"{folder} cannot be read: {'; '.join(faults)}")
    return tensors


def _files(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Which file each tensor of the index is in; `{"": file}` without an index."""
    if (folder / _SINGLE).exists():
        return {"": _SINGLE}, []
    if (folder / _INDEX).exists():
        where = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise ValueError(f"{folder / _INDEX} has no `weight_map`")
        files = set(where.values())
        # A name with a folder in it could lead out of this one.
        strange = [f for f in files if not isinstance(f, str) or Path(f).name != f]
        if strange:
            raise ValueError(f"{folder / _INDEX} names {strange}, which are no files")
        gone = sorted(file for file in files if not (folder / file).is_file())
        kept = {name: file for name, file in where.items() if file not in gone}
        return kept, [f"the index names {file}, which is missing" for file in gone]
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(found) == 1:
        return {"": found[0]}, []
    if found:
        raise ValueError(f"{folder} holds {found} and no {_INDEX}")
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    if pickled:
        raise ValueError(
            f"{folder} holds {pickled[0]}, a pickle, which can run code when it is "
            "read; convert it once, where torch is installed and the file is "
            "trusted:\n" + _CONVERT.format(name=pickled[0])
        )
    raise ValueError(f"{folder} has no {_SINGLE}")


def _headers(file: Path) -> dict[str, Tensor]:
    safetensors = require("safetensors")
    try:
        handle = safetensors.safe_open(file, framework="numpy")
        slices = {name: handle.get_slice(name) for name in handle.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{file.name} is truncated or no safetensors file ({error})"
        ) from error
    if twice := _twice(file):
        raise ValueError(f"{file.name} names {twice} twice in its header")

    def tensor(name: str, slice_: Any) -> Tensor:
        shape, dtype = tuple(slice_.get_shape()), slice_.get_dtype()
        decode = (lambda stored: stored) if dtype in _FLOATS else None
        return Tensor(shape, dtype, lambda: handle.get_tensor(name), decode)

    return {name: tensor(name, slice_) for name, slice_ in slices.items()}


def _twice(file: Path) -> list[str]:
    """Keys that the header has twice, of which readers take one in silence."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = opened.read(size)
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = collections.Counter(name for name, _ in pairs)
        found.extend(name for name, count in counts.items() if count > 1)
        return dict(pairs)

    json.loads(header, object_pairs_hook=look)
    return found
