"""Explain many inputs with compiled programs of one fixed shape."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from xviz_jax.attribution import Attribution

# The share of lanes that may be idle before the host looks for more work.
_IDLE = 8


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


@runtime_checkable
class Stepwise(Protocol):
    """An explainer whose inputs need different numbers of evaluations.

    `explain(*args)` is `finish(state, *args)`, of a `state = start(*args)` that went
    through `state = step(state, *args)` for as long as `running(state)` held. All of
    it can be under `jit` and `vmap`.
    """

    def start(self, *args: Any) -> Any:
        """The state before the first step."""
        ...

    def step(self, state: Any, *args: Any) -> Any:
        """The state after the next evaluations."""
        ...

    def running(self, state: Any) -> jax.Array:
        """Whether another step is needed."""
        ...

    def finish(self, state: Any, *args: Any) -> Attribution:
        """The explanation that a state holds."""
        ...


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

    A row depends on its own input and not on its neighbours: where inputs run out,
    a microbatch is filled up with copies, and what comes of them is dropped. Work is
    spread over all local devices.

    An explainer that is `Stepwise`, as adaptive path methods are, gives each input as
    many steps as it needs: an input that is done leaves its place in the microbatch
    to the next one, so all rows of all steps are work. Rows of the result equal
    `jax.jit(explain)` up to rounding in float32; where rounding decides whether an
    input needs another step, up to its stated error.

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
    total = _count(inputs)
    if microbatch < 1 or in_flight < 1:
        raise ValueError(
            f"`microbatch` and `in_flight` are positive, got {microbatch}, {in_flight}"
        )
    devices = jax.local_devices()[: -(-total // microbatch)]
    begin = time.perf_counter()
    placed = Placed(shared, devices)
    program = Program(explain, inputs, shared=placed, microbatch=microbatch)
    compiled = time.perf_counter()
    attribution = program(inputs, in_flight=in_flight, progress=progress)
    done = time.perf_counter()
    return Run(attribution, compiled - begin, done - compiled)


class Placed:
    """Arguments that all examples share, once on every device."""

    def __init__(self, shared: tuple[Any, ...], devices: Sequence[Any]):
        """Copies them.

        Args:
          shared: The arguments: the parameters of a model, say.
          devices: Devices; or one sharding over a mesh, which what is on a mesh
            already fits, for rows that lie whole on each of its devices.
        """
        self.devices = list(devices)
        self.copies = [_placed(shared, device) for device in devices]


class Program:
    """An explainer, compiled for inputs of one shape; explains any number of them.

    What `run` makes and calls once, for whoever has inputs again and again. A row
    depends on its own input only, not on which device explains it.
    """

    def __init__(
        self,
        explain: Callable[..., Any],
        inputs: Any,
        *,
        shared: "Placed",
        microbatch: int = 8,
    ):
        """Compiles, once for each device.

        Args:
          explain: What a method returns, or any function of one example.
          inputs: Whose rows are shaped like all that will be explained.
          shared: Arguments before the example, the same for all, on every device.
          microbatch: Examples computed at once.
        """
        self.microbatch = microbatch
        first = _rows(inputs, 0, microbatch, _count(inputs))

        def lane(each: Any, device: Any) -> _Steps | _Whole:
            if isinstance(explain, Stepwise):
                return _Steps(explain, each, first, device)
            return _Whole(explain, each, first, device)

        self._lanes = [
            lane(each, device)
            for device, each in zip(shared.devices, shared.copies, strict=True)
        ]

    @property
    def bytes(self) -> int:
        """Memory that one microbatch takes on a device beyond its arguments."""
        return max(lane.bytes for lane in self._lanes)

    def __call__(
        self,
        inputs: Any,
        *,
        in_flight: int = 2,
        device: int | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Any:
        """One row for each input, as numpy arrays.

        Args:
          inputs: Arrays, or a pytree of them, with one row for each example.
          in_flight: Microbatches under way at a time on each device.
          device: The number of the only device to use; by default all are.
          progress: Called with the number of examples that were just done. What it
            raises ends the call, once the microbatches under way are done.
        """
        total = _count(inputs)
        batches = -(-total // self.microbatch)
        results = _Results(total, progress)
        queue = _Queue(inputs, self.microbatch, total)
        # No more of them than there is work; a device's second one after each first.
        devices = self._lanes if device is None else [self._lanes[device]]
        lanes = (devices * in_flight)[:batches]
        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(lambda lane: _work(lane, queue, results), lanes))
        return results.attribution


def _work(lane: "_Whole | _Steps", queue: "_Queue", results: "_Results") -> None:
    try:
        lane.work(queue, results)
    except BaseException:
        queue.close()
        raise


def _count(inputs: Any) -> int:
    rows = {len(leaf) for leaf in jax.tree.leaves(inputs)}
    if len(rows) != 1 or 0 in rows:
        raise ValueError(f"inputs need one and the same number of rows, got {rows}")
    return rows.pop()


class _Queue:
    """Microbatches that nobody has taken: their rows, and the inputs' numbers."""

    def __init__(self, inputs: Any, microbatch: int, total: int):
        self._lock = threading.Lock()
        starts = range(0, total, microbatch)
        self._batches: Iterator[tuple[Any, np.ndarray]] = (
            (
                _rows(inputs, begin, microbatch, total),
                np.arange(begin, min(begin + microbatch, total)),
            )
            for begin in starts
        )

    def take(self) -> tuple[Any, np.ndarray] | None:
        with self._lock:
            return next(self._batches, None)

    def close(self) -> None:
        """Nobody gets another one."""
        with self._lock:
            self._batches = iter(())


class _Results:
    """Rows of finished inputs, in the inputs' order."""

    def __init__(self, total: int, progress: Callable[[int], Any] | None):
        self._lock = threading.Lock()
        self._total, self._progress = total, progress
        self.attribution: Any = None

    def put(self, found: Any, rows: np.ndarray, numbers: np.ndarray) -> None:
        """Keeps some rows of a microbatch under their inputs' numbers."""
        if not len(rows):
            return
        found = jax.device_get(found)
        with self._lock:
            if self.attribution is None:
                self.attribution = jax.tree.map(
                    lambda leaf: np.empty((self._total, *leaf.shape[1:]), leaf.dtype),
                    found,
                )
            for whole, leaf in zip(
                jax.tree.leaves(self.attribution), jax.tree.leaves(found), strict=True
            ):
                whole[numbers] = leaf[rows]
        if self._progress is not None:
            self._progress(len(rows))


class _Whole:
    """Explains a microbatch in one call."""

    def __init__(self, explain: Callable, shared: Any, first: Any, device: Any):
        self._device, self._shared = device, shared

        def batched(shared: Any, rows: Any) -> Any:
            return jax.vmap(lambda row: explain(*shared, row))(rows)

        first = jax.device_put(first, device)
        self._program = _jit(batched, device).lower(self._shared, first).compile()
        self.bytes = _memory(self._program)

    def work(self, queue: _Queue, results: _Results) -> None:
        while (batch := queue.take()) is not None:
            rows, numbers = batch
            found = self._program(self._shared, jax.device_put(rows, self._device))
            results.put(found, np.arange(len(numbers)), numbers)


class _Steps:
    """Keeps lanes, each with an input and how far it has come.

    Inputs start a microbatch at a time and wait in a pool for a free lane.
    """

    def __init__(self, explain: Stepwise, shared: Any, first: Any, device: Any):
        self._device, self._shared = device, shared
        self._size = len(jax.tree.leaves(first)[0])

        def start(shared: Any, rows: Any) -> Any:
            return rows, jax.vmap(lambda row: explain.start(*shared, row))(rows)

        def refill(lanes: Any, pool: Any, take: jax.Array) -> Any:
            """Lanes, where `take` is not negative, begin with a row of the pool."""

            def pick(old: jax.Array, new: jax.Array) -> jax.Array:
                fresh = (take >= 0).reshape(-1, *(1,) * (old.ndim - 1))
                return jnp.where(fresh, new[jnp.maximum(take, 0)], old)

            return jax.tree.map(pick, lanes, pool)

        def advance(
            shared: Any, lanes: Any, used: jax.Array, least: jax.Array
        ) -> tuple[Any, jax.Array, Attribution]:
            """Steps for as long as `least` lanes are busy."""
            rows, states = lanes

            def busy(states: Any) -> jax.Array:
                return used & jax.vmap(explain.running)(states)

            def one(row: Any, state: Any, go: jax.Array) -> Any:
                after = explain.step(state, *shared, row)
                return jax.tree.map(lambda a, b: jnp.where(go, a, b), after, state)

            states = jax.lax.while_loop(
                lambda states: jnp.sum(busy(states)) >= least,
                lambda states: jax.vmap(one)(rows, states, busy(states)),
                states,
            )
            found = jax.vmap(lambda row, s: explain.finish(s, *shared, row))(
                rows, states
            )
            return (rows, states), busy(states), found

        flags = jax.device_put(np.zeros(self._size, bool), device)
        number = jax.device_put(np.int32(1), device)
        take = jax.device_put(np.zeros(self._size, np.int32), device)
        first = jax.device_put(first, device)
        lanes = jax.eval_shape(start, self._shared, first)
        placed = device
        if not isinstance(device, Sharding):
            placed = jax.sharding.SingleDeviceSharding(device)
        lanes = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed), lanes
        )
        compile_of = lambda function, *args: (
            _jit(function, device).lower(*args).compile()
        )
        self._start = compile_of(start, self._shared, first)
        self._refill = compile_of(refill, lanes, lanes, take)
        self._advance = compile_of(advance, self._shared, lanes, flags, number)
        self.bytes = _memory(self._advance)

    def work(self, queue: _Queue, results: _Results) -> None:
        lanes = pool = None
        waiting = np.array([], int)  # Rows of the pool that no lane has taken.
        inside, pooled = np.full(self._size, -1), np.array([], int)
        more = True
        while more or len(waiting) or np.any(inside >= 0):
            while np.any(inside < 0) and (more or len(waiting)):
                if not len(waiting):
                    batch = queue.take()
                    if batch is None:
                        more = False
                        break
                    rows, pooled = batch
                    pool = self._start(self._shared, self._put(rows))
                    waiting = np.arange(len(pooled))
                    lanes = pool if lanes is None else lanes
                free = np.flatnonzero(inside < 0)[: len(waiting)]
                chosen, waiting = waiting[: len(free)], waiting[len(free) :]
                take = np.full(self._size, -1, np.int32)
                take[free], inside[free] = chosen, pooled[chosen]
                lanes = self._refill(lanes, pool, self._put(take))
            used = inside >= 0
            if not np.any(used):
                break
            # With nothing to put in their place, idle lanes are no reason to stop.
            least = self._size - self._size // _IDLE if more or len(waiting) else 1
            least = np.int32(min(least, used.sum()))
            lanes, busy, found = self._advance(
                self._shared, lanes, self._put(used), self._put(least)
            )
            done = np.flatnonzero(used & ~np.asarray(busy))
            results.put(found, done, inside[done])
            inside[done] = -1

    def _put(self, value: Any) -> Any:
        return jax.device_put(value, self._device)


def _placed(shared: Any, device: Any) -> Any:
    """What all inputs share, on the device; on a mesh it lies already."""
    return shared if isinstance(device, Sharding) else jax.device_put(shared, device)


def _jit(function: Callable, device: Any) -> Any:
    out = device if isinstance(device, Sharding) else None
    return jax.jit(function, out_shardings=out)


def _memory(program: Any) -> int:
    """What a program takes for intermediate values and results, where it is known."""
    found = program.memory_analysis()
    if found is None:
        return 0
    return int(found.temp_size_in_bytes + found.output_size_in_bytes)


def _rows(inputs: Any, begin: int, count: int, total: int) -> Any:
    """Rows from `begin` on, always `count` of them."""
    index = np.minimum(np.arange(begin, begin + count), total - 1)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], inputs)
