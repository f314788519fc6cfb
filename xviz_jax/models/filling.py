"""Match a checkpoint's tensors to a model's parameters, check them, and place them.

Nothing is raised where a fault is found: faults are collected, because a reader who
repairs a folder wants all of them at once.
"""

import dataclasses
import os
import re
from collections.abc import Callable
from collections.abc import Mapping as MappingType
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from xviz_jax.models.checkpoint import Tensor
from xviz_jax.models.fingerprint import digest
from xviz_jax.models.mapping import Mapping, Source

# Puts the value of a parameter, by its path, on devices.
Place = Callable[[str, np.ndarray], jax.Array]
# So many names of a kind are listed; the rest is counted.
_LISTED = 8


@dataclasses.dataclass(frozen=True)
class Fill:
    """What fills one parameter: tensors of one layer, or of each of a stack."""

    layers: tuple[tuple[str, ...], ...]
    transform: Callable[..., np.ndarray]
    stacked: bool = False

    def value(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The parameter's value, where `read` gives a tensor by its name."""
        parts = [self.transform(*map(read, names)) for names in self.layers]
        return np.stack(parts) if self.stacked else parts[0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which tensors fill which parameters.

    Attributes:
      fills: By the parameter's path.
      tensors: By the mapping's name for them: the file's name, and the tensor.
      copies: Tensors that must equal another, by the mapping's names.
      ignored: Reasons, by the file's names.
      faults: Sentences; the plan holds nothing that has one.
    """

    fills: dict[str, Fill]
    tensors: dict[str, tuple[str, Tensor]]
    copies: dict[str, str]
    ignored: dict[str, str]
    faults: list[str]


def plan(
    stored: MappingType[str, Tensor], mapping: Mapping, leaves: MappingType[str, Any]
) -> Plan:
    """Matches tensors to parameters by name and shape; reads none.

    Args:
      stored: The checkpoint's tensors, by the file's names.
      mapping: The architecture's.
      leaves: The model's parameters, or their shapes, by path.
    """
    faults: list[str] = []
    tensors: dict[str, tuple[str, Tensor]] = {}
    for original, tensor in stored.items():
        name = original
        for pattern, replacement in mapping.renames.items():
            name = re.sub(pattern, replacement, name)
        if name in tensors:
            faults.append(f"{tensors[name][0]!r} and {original!r} are the same tensor")
        tensors[name] = original, tensor
    fills = _fills(mapping, leaves)
    wanted = {n for fill in fills.values() for names in fill.layers for n in names}
    _note(faults, "missing tensors", wanted - tensors.keys())
    copies = {n: of for n, of in mapping.copies.items() if n in tensors.keys() - wanted}
    ignored = {tensors[n][0]: f"a copy of {of!r}" for n, of in copies.items()}
    extra = []
    for name in tensors.keys() - wanted - copies.keys():
        why = [w for p, w in mapping.ignored.items() if re.search(p, name)]
        if why:
            ignored[tensors[name][0]] = why[0]
        else:
            extra.append(tensors[name][0])
    _note(faults, "tensors that the model has no place for", extra)
    whole = {name for name, (_, t) in tensors.items() if t.decode is not None}
    odd = [tensors[name] for name in wanted & tensors.keys() - whole]
    _note(faults, "tensors that are not floats", [f"{n} ({t.dtype})" for n, t in odd])
    usable = {
        path: fill
        for path, fill in fills.items()
        if whole.issuperset(name for names in fill.layers for name in names)
    }
    misfits = {p: _misfit(p, fill, tensors, leaves[p]) for p, fill in usable.items()}
    _note(faults, "wrong shapes", filter(None, misfits.values()))
    usable = {path: fill for path, fill in usable.items() if not misfits[path]}
    return Plan(usable, tensors, copies, dict(sorted(ignored.items())), faults)


def _fills(mapping: Mapping, leaves: MappingType[str, Any]) -> dict[str, Fill]:
    """What the mapping says of each parameter, `{layer}` spelled out.

    Raises:
      KeyError: If mapping and model do not have the same parameters, which is the
        architecture's own fault.
    """
    fills: dict[str, Fill] = {}
    for pattern, source in mapping.tensors.items():
        source = Source(source) if isinstance(source, str) else source
        group, layered, _ = pattern.partition("/{layer}")
        if not layered:
            fills[pattern] = Fill((source.names,), source.transform)
            continue
        depth = range(mapping.depths[group])
        names = tuple(
            tuple(name.replace("{layer}", str(index)) for name in source.names)
            for index in depth
        )
        together = pattern.replace("/{layer}", "")
        if together in leaves:
            fills[together] = Fill(names, source.transform, stacked=True)
            continue
        for index in depth:
            path = pattern.replace("{layer}", str(index))
            fills[path] = Fill((names[index],), source.transform)
    strays = sorted(fills.keys() ^ leaves.keys())
    if strays:
        raise KeyError(f"the mapping and the model do not both have {strays}")
    return fills


def _misfit(
    path: str, fill: Fill, tensors: MappingType[str, tuple[str, Tensor]], leaf: Any
) -> str:
    """What is wrong with the shapes of a parameter's tensors, if anything is."""
    inner = leaf.shape[1:] if fill.stacked else leaf.shape
    for names in fill.layers:
        shapes = [tensors[name][1].shape for name in names]
        try:
            # Views of one zero: a shape costs no memory.
            empty = [np.broadcast_to(np.float32(0), shape) for shape in shapes]
            got = fill.transform(*empty).shape
        except ValueError:
            got = None
        if got != inner:
            said = " and ".join(
                f"{tensors[name][0]} {list(shape)}"
                for name, shape in zip(names, shapes, strict=True)
            )
            return f"{said} for {path} {list(inner)}"
    return ""


def _note(faults: list[str], what: str, names: Any) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        faults.append(f"{what}: {', '.join(names[:_LISTED])}{more}")


def fill(
    plan: Plan,
    dtypes: MappingType[str, Any],
    place: Place,
    *,
    allow_nonfinite: bool,
) -> tuple[dict[str, jax.Array], dict[str, bytes], list[str]]:
    """Reads, checks, hashes and places what fills each parameter.

    A parameter at a time on each core: no more than that is held twice.

    Args:
      plan: As `plan` makes it.
      dtypes: Of each parameter, by path.
      place: Puts a value on devices.
      allow_nonfinite: Take NaN and infinity.

    Returns:
      The parameters, by path; the digest of each tensor, by the file's name; and
      what is wrong with the numbers.
    """
    digests: dict[str, bytes] = {}
    strange: list[str] = []

    def checked(dtype: Any, name: str) -> np.ndarray:
        original, tensor = plan.tensors[name]
        stored = tensor.read()
        digests[original] = digest(stored, tensor.shape, tensor.dtype)
        with np.errstate(over="ignore"):
            value = _decoded(tensor, stored).astype(dtype, copy=False)
        bad = 0 if allow_nonfinite else value.size - np.isfinite(value).sum()
        if bad:
            strange.append(f"{original} ({bad} of {value.size} numbers)")
        return value

    def one(path: str) -> jax.Array:
        return place(path, plan.fills[path].value(partial(checked, dtypes[path])))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        arrays = dict(zip(plan.fills, pool.map(one, plan.fills), strict=True))
    faults: list[str] = []
    _note(faults, "weights that are not finite", strange)
    other = [
        f"{plan.tensors[copy][0]} is not {plan.tensors[of][0]}"
        for copy, of in plan.copies.items()
        if of in plan.tensors and not _equal(plan.tensors[copy][1], plan.tensors[of][1])
    ]
    _note(faults, "copies that differ", other)
    return arrays, digests, faults


def _decoded(tensor: Tensor, stored: np.ndarray) -> np.ndarray:
    if tensor.decode is None:
        raise ValueError(f"{tensor.dtype} is not read as floats")
    return tensor.decode(stored)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return np.array_equal(one.read(), other.read())
