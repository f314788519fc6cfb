"""Explain many inputs with one compiled program of fixed shape."""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from xviz_jax.attribution import Attribution


@dataclasses.dataclass(frozen=True)
class Run:
    """What `run` returns.

    Attributes:
      attribution: One row for each input, as numpy arrays.
      compile_seconds: Time to trace and compile, apart from the rest.
      run_seconds: Time to explain all inputs.
    """

    attribution: Attribution
    compile_seconds: float
    run_seconds: float


def run(
    explain: Callable[..., Attribution],
    inputs: Any,
    *,
    shared: tuple[Any, ...] = (),
    microbatch: int = 8,
    in_flight: int = 2,
    progress: Callable[[int], Any] | None = None,
) -> Run:
    """Explains inputs in microbatches of one shape, compiled once.

    A row depends on its own input and not on its neighbours: the last microbatch is
    filled up with copies of the last input, and the copies are dropped. Microbatches
    go round-robin to every local device.

    Args:
      explain: What a method returns: explains one example.
      inputs: Arrays, or a pytree of them, with one row for each example.
      shared: Arguments of `explain` before the example, the same for all: the
        parameters of a model, say.
      microbatch: Examples computed at once.
      in_flight: Microbatches under way at a time on each device.
      progress: Called with the number of examples that were just done.

    Returns:
      The attributions and the times.

    Raises:
      ValueError: If there are no inputs, or their numbers differ.
    """
    rows = {len(leaf) for leaf in jax.tree.leaves(inputs)}
    if len(rows) != 1 or 0 in rows:
        raise ValueError(f"inputs need one and the same number of rows, got {rows}")
    if microbatch < 1 or in_flight < 1:
        raise ValueError(
            f"`microbatch` and `in_flight` are positive, got {microbatch}, {in_flight}"
        )
    total = rows.pop()
    devices = jax.local_devices()

    def batched(shared: tuple[Any, ...], batch: Any) -> Attribution:
        return jax.vmap(lambda row: explain(*shared, row))(batch)

    begin = time.perf_counter()
    programs = []
    for device in devices:
        resident = jax.device_put(shared, device)
        first = jax.device_put(_rows(inputs, 0, microbatch, total), device)
        programs.append((resident, jax.jit(batched).lower(resident, first).compile()))
    compiled = time.perf_counter()

    def one(index: int) -> Attribution:
        resident, program = programs[index % len(devices)]
        begin = index * microbatch
        batch = _rows(inputs, begin, microbatch, total)
        batch = jax.device_put(batch, devices[index % len(devices)])
        count = min(microbatch, total - begin)
        done = jax.tree.map(
            lambda a: a[:count], jax.device_get(program(resident, batch))
        )
        if progress is not None:
            progress(count)
        return done

    with ThreadPoolExecutor(in_flight * len(devices)) as pool:
        parts = list(pool.map(one, range(-(-total // microbatch))))
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return Run(whole, compiled - begin, time.perf_counter() - compiled)


def _rows(inputs: Any, begin: int, count: int, total: int) -> Any:
    """Rows from `begin` on, always `count` of them."""
    index = np.minimum(np.arange(begin, begin + count), total - 1)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], inputs)
