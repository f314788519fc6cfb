"""Which backend computes an operation, decided while JAX traces it."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax

Implementation = Literal["reference", "xla", "mosaic_tpu", "mosaic_gpu"]

_PREFERRED = {"tpu": ("mosaic_tpu", "xla"), "gpu": ("mosaic_gpu", "xla")}


def run(
    operation: str,
    available: tuple[Implementation, ...],
    implementation: Implementation | None,
    *args: Any,
    **options: Any,
) -> Any:
    """Calls `operation` of the named backend, or of the first one that can.

    Raises:
      NotImplementedError: the named backend cannot; says which argument stops it.
      ValueError: no backend has that name.
    """
    check(implementation)
    if implementation is None:
        candidates = _PREFERRED.get(platform(), ("xla",))
        candidates = [name for name in candidates if name in available]
    elif implementation in available:
        candidates = [implementation]
    else:
        raise NotImplementedError(
            f"implementation={implementation!r}: {operation} has only {available}"
        )
    *fallible, last = candidates
    for name in fallible:
        try:
            return _backend(operation, name)(*args, **options)
        except (NotImplementedError, ImportError):
            continue
    return _backend(operation, last)(*args, **options)


def check(implementation: Implementation | None) -> None:
    """Raises ValueError for a name that no backend has."""
    known = get_args(Implementation)
    if implementation is not None and implementation not in known:
        raise ValueError(
            f"implementation wants None or one of {known}, got {implementation!r}"
        )


def platform() -> str:
    """The platform that traced code will run on by default: cpu, gpu or tpu."""
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if default is None:
        return jax.default_backend()
    return default if isinstance(default, str) else default.platform


def device_kind() -> str:
    """The model name of the device that traced code will run on by default."""
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(default, jax.Device):
        return default.device_kind
    return jax.devices(default)[0].device_kind


def differentiated_as(plain: Callable, kernel: Callable) -> Callable:
    """`kernel`, with the derivatives of `plain`, which computes the same.

    Forward and reverse; `plain` recomputes what its derivative needs.
    """

    @jax.custom_jvp
    def function(*args):
        return kernel(*args)

    @function.defjvp
    def _(primals, tangents):
        return kernel(*primals), jax.jvp(plain, primals, tangents)[1]

    return function


def block_sizes(config: Mapping[str, int] | None, **defaults: int) -> tuple[int, ...]:
    """The block sizes `config` overrides, in the order of `defaults`."""
    config = config or {}
    unknown = sorted(config.keys() - defaults.keys())
    if unknown:
        raise ValueError(
            f"config of this implementation wants {sorted(defaults)}, got {unknown}"
        )
    if any(size < 1 for size in config.values()):
        raise ValueError(f"config wants block sizes >= 1, got {dict(config)}")
    return tuple((defaults | dict(config)).values())


def _backend(operation, name):
    # Imported on first use: Pallas takes long to import and may be missing.
    module = importlib.import_module(f"xviz_jax.kernels.{operation}.{name}")
    return getattr(module, operation)
