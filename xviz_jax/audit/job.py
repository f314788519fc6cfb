"""What a worker is told: enough to do any shard, in any process, with the same bits."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from xviz_jax._version import __version__
from xviz_jax.audit.model import Model
from xviz_jax.audit.sources import Buckets

# These say how many devices there are, on which no row depends.
_COUNTS = "--xla_force_host_platform_device_count"
# Vector instructions that change how sums are associated.
_INSTRUCTIONS = ("sse4_2", "avx2", "fma", "avx512f", "amx_tile", "asimd", "sve")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is explained, and how.

    Attributes:
      model: As `model.find` takes it.
      data: As `open_source` takes it, or a source.
      methods: Names, or the options of each method by name.
      columns: Columns that are the model's arguments, in order.
      target: None, a class, `label`, or two classes.
      microbatch: Records computed at once; None chooses by device and memory.
      shard_size: Records of a shard; None chooses by the size of a row.
      limit: Only that many records, from the first on.
      seed: Of random methods.
      vocabulary: Tokens that a function knows.
      buckets: Lengths that tokens are padded to.
      devices: How many local devices are used; None for all.
      split: Spread a checkpoint's parameters over the devices.
      duplicates: What to do about ids that occur twice, as for `open_source`.
      weights_sha256: The fingerprint that a checkpoint must have.
      allow_nonfinite: Take weights that hold NaN or infinity.
    """

    model: str | Callable | Model
    data: Any
    methods: Mapping[str, Mapping[str, Any]] | Sequence[str]
    columns: tuple[str, ...] | None = None
    target: int | str | tuple[int, int] | None = None
    microbatch: int | None = None
    shard_size: int | None = None
    limit: int | None = None
    seed: int = 0
    vocabulary: int | None = None
    buckets: Buckets | None = None
    devices: int | None = None
    split: bool = False
    duplicates: Literal["refuse", "number", "trust"] = "refuse"
    weights_sha256: str | None = None
    allow_nonfinite: bool = False

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """Of each method, by name."""
        if isinstance(self.methods, Mapping):
            return {name: dict(given) for name, given in self.methods.items()}
        return {name: {} for name in self.methods}

    def __post_init__(self) -> None:
        """Refuses numbers that are not positive."""
        for name in ("microbatch", "shard_size", "limit", "devices", "vocabulary"):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise ValueError(f"`{name}` is a positive integer, got {value!r}")


# What processes of one run must agree on, for the same bits and the same cache.
_SETTINGS = (
    "jax_num_cpu_devices",
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_disable_most_optimizations",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


def settings() -> dict[str, Any]:
    """JAX's settings here, for another process of the same run."""
    return {name: _setting(name) for name in _SETTINGS}


def configure(settings: Mapping[str, Any]) -> None:
    """Takes the settings of another process over, before a device is used."""
    for name, value in settings.items():
        # Devices are there already where the main module uses JAX when imported; on
        # their number nothing depends.
        with contextlib.suppress(RuntimeError):
            jax.config.update(name, value)


def _setting(name: str) -> Any:
    # Settings with a context manager are attributes, and cannot be read otherwise.
    known = hasattr(jax.config, name)
    return getattr(jax.config, name) if known else jax.config.read(name)


def numerics() -> dict[str, Any]:
    """What the bits of all rows depend on besides the question: versions and device."""
    device = jax.local_devices()[0]
    found = {
        "xviz_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "platform": device.platform,
        "device": device.device_kind,
        "xla_flags": _flags("XLA_FLAGS"),
        "libtpu_flags": _flags("LIBTPU_INIT_ARGS"),
        "matmul_precision": str(_setting("jax_default_matmul_precision")),
        "x64": bool(_setting("jax_enable_x64")),
        "optimized": not _setting("jax_disable_most_optimizations"),
        "random": str(_setting("jax_default_prng_impl")),
        "random_partitionable": bool(_setting("jax_threefry_partitionable")),
    }
    if device.platform == "cpu":
        found["instructions"] = _instructions()
    return found


def _flags(variable: str) -> str:
    flags = os.environ.get(variable, "").split()
    return " ".join(sorted(flag for flag in flags if not flag.startswith(_COUNTS)))


def _instructions() -> str:
    said = Path("/proc/cpuinfo")
    known: set[str] = set()
    if said.exists():
        for line in said.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                known = set(line.split())
                break
    has = [name for name in _INSTRUCTIONS if name in known]
    return " ".join([platform.machine(), *has])
