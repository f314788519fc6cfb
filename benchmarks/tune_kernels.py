"""Finds the block sizes of the Mosaic kernels that the library then looks up.

    python benchmarks/tune_kernels.py --save                      # times a device
    python benchmarks/tune_kernels.py --topology v5e:2x2 --save   # no TPU needed
    python benchmarks/tune_kernels.py --small                     # shows that it runs

With a device, each candidate is timed. Without one, libtpu compiles it ahead of time
and the bundles of its schedule are counted: one bundle is one cycle of the core, stalls
for memory aside. Both write `kernels/block_sizes.json`, saying which it was.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RELU = "relu_gradient_x_attention"
HEADS = 12


@dataclasses.dataclass(frozen=True)
class Case:
    """One entry of the table: an operation, and what changes its course."""

    operation: str
    vectors: int = 0
    relevance: str = "attention"
    fusion: str = "mean"
    dim: int = 64
    dtype: str = "bfloat16"
    causal: bool = False

    @property
    def name(self) -> str:
        """What the kernel is called in a compiled program."""
        fused = self.operation not in ("attention_lse", "attention_statistics")
        variant = f"_{self.relevance}_{self.fusion}" if fused else ""
        return self.operation + variant

    def options(self) -> dict[str, Any]:
        """The static options of the operation."""
        options: dict[str, Any] = {"causal": self.causal}
        if self.operation == "attention_statistics":
            options["top_k"] = self.vectors
        elif self.operation != "attention_lse":
            options |= {"relevance": self.relevance, "head_fusion": self.fusion}
        return options

    def shapes(self, n: int, heads: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each array it takes, for `n` tokens."""
        features = ((1, n, heads, self.dim), self.dtype)
        found: dict[str, Any] = {"q": features, "k": features}
        vectors = {"attention_row_product": "r", "attention_col_product": "x"}
        if self.operation in vectors:
            found[vectors[self.operation]] = ((1, self.vectors, n), "float32")
        if self.options().get("relevance", "attention") != "attention":
            found |= {"v": features, "dout": features}
        if self.name not in ("attention_lse", "attention_statistics"):
            found["lse"] = ((1, heads, n), "float32")
        return found

    def function(self) -> Callable[..., Any]:
        """The operation itself."""
        import importlib

        module = importlib.import_module(f"xviz_jax.kernels.{self.operation}.api")
        return functools.partial(getattr(module, self.operation), **self.options())


def cases(small: bool) -> Iterator[Case]:
    """What the table holds; lengths, widths and dtypes near these share an entry."""
    if small:
        yield Case("attention_row_product", vectors=1, dtype="float32", dim=16)
        return
    for causal in (False, True):
        for dim in (64, 128):
            yield Case("attention_lse", dim=dim, causal=causal)
            yield Case("attention_statistics", 4, dim=dim, causal=causal)
            for relevance in ("attention", RELU):
                for vectors in (1, 8) if dim == 64 else (1,):
                    yield Case(
                        "attention_row_product",
                        vectors,
                        relevance,
                        dim=dim,
                        causal=causal,
                    )
    yield Case("attention_row_product", 1, dtype="float32")
    yield Case("attention_row_product", 1, fusion="max")
    yield Case("attention_row_product", 1, RELU, "max")
    yield Case("attention_col_product", 1, fusion="max")
    yield Case("attention_col_product", 1, RELU)
    yield Case("attention_fused_matrix")
    yield Case("attention_fused_matrix", 0, RELU)


def candidates(platform: str, case: Case, small: bool) -> Iterator[dict[str, int]]:
    """Block sizes worth a try; larger tiles than these only compile longer."""
    if small:
        yield from ({"block_q": 128, "block_k": 128}, {"block_q": 256, "block_k": 128})
        return
    if platform == "gpu":
        # Of larger ones ptxas spills registers.
        for bq in (64, 128):
            for bk in (64, 128):
                for groups in (1, 2, 3):
                    yield {"block_q": bq, "block_k": bk, "warp_groups": groups}
        return
    for bq in (256, 512, 1024):
        for bk in (256, 512, 1024):
            if bq * bk >= 2**18:
                yield {"block_q": bq, "block_k": bk}


def time_on_device(
    case: Case, configs: Sequence[dict[str, int]], n: int, small: bool
) -> list[float | Exception]:
    """Milliseconds of a call with each config, the median of several; or what failed.

    They are compiled side by side, and take turns.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    heads = 2 if small else HEADS
    arrays = {
        name: jnp.asarray(rng.standard_normal(shape), dtype)
        for name, (shape, dtype) in case.shapes(n, heads).items()
    }
    on_cpu = jax.default_backend() == "cpu"
    kernel = "mosaic_gpu" if jax.default_backend() == "gpu" else "mosaic_tpu"

    def ready(config: dict[str, int]) -> Any:
        function = functools.partial(
            case.function(), config=config, implementation=kernel, interpret=on_cpu
        )
        try:
            program = jax.jit(function).lower(**arrays).compile()
            jax.block_until_ready(program(**arrays))
            return program
        except Exception as error:
            return error

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(ready, configs))
    times: dict[int, list[float]] = {
        at: [] for at, each in enumerate(found) if not isinstance(each, Exception)
    }
    calls = 1 if small else 5
    for _ in range(2 if small else 9):
        for at, taken in times.items():
            out = None
            start = time.perf_counter()
            # Several, for launches are asynchronous.
            for _ in range(calls):
                out = found[at](**arrays)
            jax.block_until_ready(out)
            taken.append(1e3 * (time.perf_counter() - start) / calls)
    return [
        statistics.median(times[at]) if at in times else each
        for at, each in enumerate(found)
    ]


class Schedules:
    """Compiles for a TPU that is not there and reads the compiler's schedule."""

    def __init__(self, topology: str):
        """Must come before anything else makes libtpu start."""
        self.directory = Path(tempfile.mkdtemp(prefix="schedules-"))
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "LIBTPU_INIT_ARGS": (
                f"--xla_jf_dump_to={self.directory} --xla_jf_dump_llo_text=true"
            ),
        }
        from jax.experimental import topologies

        description = topologies.get_topology_desc(topology, platform="tpu")
        self.device = description.devices[0]

    def of(
        self, case: Case, configs: Sequence[dict[str, int]], n: int
    ) -> list[tuple[float, int] | Exception]:
        """What each config costs; or what failed."""
        found: list[tuple[float, int] | Exception] = []
        for config in configs:
            try:
                found.append(self(case, config, n))
            except Exception as error:
                found.append(error)
        return found

    def __call__(self, case: Case, config: dict[str, int], n: int) -> tuple[float, int]:
        """Bundles that one head of the kernel takes, and the vector spills in it."""
        import jax
        from jax.sharding import SingleDeviceSharding

        from xviz_jax.kernels.attention_map import attention_map
        from xviz_jax.kernels.mosaic_tpu import Band

        sharding = SingleDeviceSharding(self.device)
        shapes = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, (shape, dtype) in case.shapes(n, HEADS).items()
        }
        function = functools.partial(
            case.function(), config=config, implementation="mosaic_tpu"
        )
        for dumped in self.directory.iterdir():
            dumped.unlink()
        jax.jit(function).lower(**shapes).compile()
        (path,) = (
            path
            for path in self.directory.glob(f"*-{case.name}.*-final_bundles.txt")
            if "schedule-analysis" not in path.name
        )
        bundles, spills = step_of(path.read_text())
        blocks = jax.eval_shape(
            lambda q, k: attention_map(q, k, causal=case.causal),
            shapes["q"],
            shapes["k"],
        )
        band = Band.of(blocks, config["block_q"], config["block_k"])
        met = 0
        for i in range(-(-n // band.bq)):
            first, last = (int(x) for x in band.key_blocks(jax.numpy.int32(i)))
            met += last - first + 1
        return bundles * met, spills


def step_of(schedule: str) -> tuple[int, int]:
    """Bundles and vector spills of one step of a kernel's grid.

    That is the region with most bundles of its own, where a tile is computed, and
    those around it that start the copies; what only the first or last step runs lies
    in regions beside it.
    """
    starts, spans, spills, at = {}, set(), [], 0
    for line in schedule.splitlines():
        # A bundle may go on over several lines, which have no number of their own.
        bundle = re.match(r"\s*(0x[0-9a-f]+|0)\s", line)
        at = int(bundle[1], 16) if bundle else at
        starts |= {region: at for region in re.findall(r"Start region (\d+)", line)}
        spills += [at] * len(re.findall(r"vst\S* \[vmem:\[[^\]]*_spill", line))
        ended = re.findall(r"End region (\d+)", line)
        spans |= {(starts[region], at) for region in ended if region in starts}
    own = {}
    for start, end in spans:
        inside = set()
        for a, b in spans:
            if start <= a <= b <= end and (a, b) != (start, end):
                inside.update(range(a, b + 1))
        own[start, end] = end - start + 1 - len(inside)
    start, end = max(own, key=lambda span: own[span])
    bundles = sum(n for (a, b), n in own.items() if a <= start <= end <= b)
    return bundles, sum(start <= at <= end for at in spills)


def save(device_kind: str, how: str, measured: dict[str, Any]) -> None:
    """Merges what was measured into the table that the library reads."""
    import jax

    from xviz_jax.kernels import tuning

    table = json.loads(tuning.TABLE.read_text())
    minor = ".".join(jax.__version__.split(".")[:2])
    section = table.setdefault(device_kind, {}).setdefault(minor, {})
    section["how"] = how
    section["measured"] = dict(sorted((section.get("measured", {}) | measured).items()))
    tuning.TABLE.write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", help="compile for this TPU, such as v5e:2x2")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--only", default="", help="cases whose key this regex matches")
    parser.add_argument("--small", action="store_true", help="one case, interpreted")
    parser.add_argument("--save", action="store_true", help="write block_sizes.json")
    options = parser.parse_args()
    schedules = Schedules(options.topology) if options.topology else None

    import jax

    from xviz_jax.kernels import tuning
    from xviz_jax.kernels.attention_map import attention_map

    platform = "tpu" if schedules else jax.default_backend()
    if platform == "cpu" and not options.small:
        sys.exit("There is no accelerator here: pass --topology to compile for a TPU.")
    n = 200 if options.small else options.length
    if schedules:
        import importlib.metadata

        kind = schedules.device.device_kind
        version = importlib.metadata.version("libtpu")
        how = f"bundles scheduled by libtpu {version}, ahead of time; never run"
    else:
        kind, how = jax.devices()[0].device_kind, "ms on the device"
    print(
        f"{kind}, jax {jax.__version__}, {how}\n\n"
        "| key | config | cost |\n|---|---|---|"
    )

    measured = {}
    for case in cases(options.small):
        arrays = {
            name: jax.ShapeDtypeStruct(shape, dtype)
            for name, (shape, dtype) in case.shapes(n, HEADS).items()
            if name not in ("r", "x")
        }
        scoring = {
            name: value for name, value in case.options().items() if name != "top_k"
        }
        attention = jax.eval_shape(
            functools.partial(attention_map, **scoring), **arrays
        )
        key = tuning.key(case.operation, attention, case.vectors)
        if not re.search(options.only, key):
            continue
        configs = list(candidates(platform, case, options.small))
        if schedules:
            costs = schedules.of(case, configs, n)
        else:
            costs = time_on_device(case, configs, n, options.small)
        best: tuple[float, dict[str, Any]] = (math.inf, {})
        for config, cost in zip(configs, costs, strict=True):
            if isinstance(cost, Exception):
                print(f"| {key} | {config} | {str(cost).splitlines()[0][:90]} |")
                continue
            entry: dict[str, Any] = {"config": config}
            if isinstance(cost, tuple):
                cost, entry["spills"] = cost
                entry["bundles_per_head"] = cost
            else:
                entry["ms"] = round(cost, 4)
            print(f"| {key} | {config} | {cost:.4g} |", flush=True)
            if cost < best[0]:
                best = cost, entry
        if best[1]:
            measured[key] = best[1]
            # At once, for the machine may be gone before all are measured.
            if options.save and not options.small:
                save(kind, how, measured)


if __name__ == "__main__":
    main()
