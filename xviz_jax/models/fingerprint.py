"""Which weights these are: a hash that goes into a run's manifest."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

# These say who wrote the file, not what the model computes.
_ABOUT = ("_name_or_path", "transformers_version")


def digest(stored: np.ndarray, shape: tuple[int, ...], dtype: str) -> bytes:
    """The sha256 of one tensor: its dtype, its shape and its stored bytes."""
    found = hashlib.sha256(f"{dtype}{list(shape)}".encode())
    found.update(np.ascontiguousarray(stored).view(np.uint8).data)
    return found.digest()


def fingerprint(config: Mapping[str, Any], digests: Mapping[str, bytes]) -> str:
    """The sha256 over a configuration and the tensors a model was filled from.

    It does not depend on how tensors are spread over files, nor on their order.

    Args:
      config: As `config.json` has it.
      digests: Of each tensor, by its name in the file.

    >>> one = np.arange(3, dtype=np.float32)
    >>> parts = {"a": digest(one, (3,), "F32")}
    >>> len(fingerprint({"model_type": "bert"}, parts))
    64
    """
    said = {name: value for name, value in config.items() if name not in _ABOUT}
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(digests):
        found.update(len(name).to_bytes(8, "little") + name.encode() + digests[name])
    return found.hexdigest()
