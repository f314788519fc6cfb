"""One row of a 12-layer rollout, from q and k, against stored attention maps.

    python benchmarks/attention_rows.py            # the table and the memory fit
    python benchmarks/attention_rows.py --small    # tiny shapes, shows that it runs

Every measurement is a process of its own, pinned to one core. Time is that process's
CPU time, the least of the rounds, which neighbours on a shared machine disturb less
than wall time. Memory is the peak resident set of a run, compiled before, less the
resident set before it, so arguments are not counted. The peers compute what a hook on
an eager model stores, every layer's maps, and multiply the whole matrices.
"""

import argparse
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from timing import replace_section

HEADS, DIM = 12, 64
PEERS = ("torch maps", "jax maps", "jax layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--save", action="store_true", help="write into RESULTS.md")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=3, metavar=("METHOD", "LENGTH", "LAYERS"))
    options = parser.parse_args()
    if options.worker:
        method, length, layers = options.worker
        measured = worker(method, int(length), int(layers), options.rounds)
        print(json.dumps(measured))
        return

    lengths, layers = ((16, 48), 2) if options.small else ((197, 512, 1024, 2048), 12)
    names = ["rollout_rows", *PEERS]
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: its column is left out\n")
        names.remove("torch maps")
    title = "A row of a rollout from queries and keys, against stored maps"
    versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib")}
    if "torch maps" in names:
        versions["torch"] = importlib.metadata.version("torch")
    lines = [
        f"## {title}",
        "",
        f"`python benchmarks/attention_rows.py --save`, one core "
        f"({platform.machine()}), "
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". {layers} layers, {HEADS} heads of {DIM}, float32. Processor's time in "
        "milliseconds, peak memory beyond the inputs in MB, and both over those of "
        "`rollout_rows`.",
        "",
        "| tokens | " + " | ".join(names) + " | error to float64 |",
        "|---" * (len(names) + 2) + "|",
    ]
    for n in lengths:
        results = [measure(name, n, layers, options.rounds) for name in names]
        mine = results[0]
        cells = [f"{1e3 * mine['seconds']:.1f} ms, {mine['bytes'] / 1e6:.0f} MB"]
        for other in results[1:]:
            time_ratio = other["seconds"] / mine["seconds"]
            memory_ratio = other["bytes"] / max(mine["bytes"], 1)
            cells.append(
                f"{1e3 * other['seconds']:.1f} ms ({time_ratio:.2f}x), "
                f"{other['bytes'] / 1e6:.0f} MB ({memory_ratio:.1f}x)"
            )
        cells.append(f"{mine['error']:.1e}")
        lines.append(f"| {n} | " + " | ".join(cells) + " |")

    lengths = (64, 128) if options.small else (1024, 2048, 4096, 8192, 16384)
    used = [measure("rollout_rows", n, 2, 1)["bytes"] for n in lengths]
    slope, offset = np.polyfit(lengths, used, 1)
    exponent = np.polyfit(np.log(lengths), np.log(np.maximum(used, 1)), 1)[0]
    fit = ", ".join(f"{n}: {b / 1e6:.0f}" for n, b in zip(lengths, used, strict=True))
    lines += [
        "",
        f"Peak memory of two layers in MB by tokens: {fit}; "
        f"{slope / 1e3:.1f} kB a token and {offset / 1e6:.0f} MB, bytes ~ "
        f"tokens^{exponent:.2f}.",
    ]
    if not options.small:
        deep = measure("rollout_rows", 8192, layers, 1)
        lines.append(
            f"{layers} layers of 8,192 tokens: {deep['seconds']:.1f} s, "
            f"{deep['bytes'] / 1e6:.0f} MB."
        )
    lines.append("")
    print("\n".join(lines))
    if options.save:
        replace_section(title, lines)


def measure(method: str, length: int, layers: int, rounds: int) -> dict[str, float]:
    """The result of `worker`, in a process of its own."""
    command = [sys.executable, __file__, "--rounds", str(rounds), "--worker"]
    command += [method, str(length), str(layers)]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def worker(method: str, length: int, layers: int, rounds: int) -> dict[str, float]:
    """CPU seconds, peak bytes, and the error of our row where N is at most 2,048."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rng = np.random.default_rng(0)
    shape = (layers, length, HEADS, DIM)
    q = rng.standard_normal(shape, np.float32) * np.float32(1.5)
    k = rng.standard_normal(shape, np.float32)
    run = {
        "rollout_rows": jax_rows,
        "jax layer": jax_layers,
        "jax maps": jax_maps,
        "torch maps": torch_maps,
    }[method](q, k)
    row = run()
    before = reset_peak()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    used = status("VmHWM") - before
    error = float("nan")
    if method == "rollout_rows" and length <= 2048:
        exact = row_in_float64(q, k)
        error = float(np.abs(row - exact).max() / exact.max())
    return {"seconds": min(times), "bytes": float(used), "error": error}


def jax_rows(q, k):
    import jax

    from xviz_jax.kernels.rollout_rows import rollout_rows

    program = jax.jit(functools.partial(rollout_rows, rows=[0]))
    q, k = jax.numpy.asarray(q), jax.numpy.asarray(k)
    return lambda: np.asarray(program(q, k)[0][0])


def jax_layers(q, k):
    """The same chain of rows with one layer's maps at a time formed in full."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def program(q, k):
        def step(r, qk):
            maps = jax.nn.softmax(jnp.einsum("ihd,jhd->hij", *qk) * DIM**-0.5)
            return r / 2 + jnp.einsum("i,hij->j", r, maps) / (2 * HEADS), None

        first = jnp.zeros(q.shape[1]).at[0].set(1)
        return jax.lax.scan(step, first, (q, k), reverse=True)[0]

    q, k = jnp.asarray(q), jnp.asarray(k)
    return lambda: np.asarray(program(q, k))


def jax_maps(q, k):
    """Every layer's maps, then the product of the whole matrices."""
    import jax
    import jax.numpy as jnp

    attend = jax.jit(
        lambda q, k: jax.nn.softmax(jnp.einsum("ihd,jhd->hij", q, k) * DIM**-0.5)
    )

    @jax.jit
    def multiply(maps):
        eye = jnp.eye(maps[0].shape[-1])
        product = eye
        for a in maps:
            product = (eye + a.mean(0)) / 2 @ product
        return product[0]

    layers = [(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(q, k, strict=True)]
    return lambda: np.asarray(multiply([attend(*qk) for qk in layers]))


def torch_maps(q, k):
    """Every layer's maps in eager PyTorch, then the product of whole matrices."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    q, k = (torch.from_numpy(x).transpose(1, 2) for x in (q, k))

    @torch.inference_mode()
    def run():
        maps = [
            torch.softmax(a @ b.transpose(1, 2) * DIM**-0.5, -1)
            for a, b in zip(q, k, strict=True)
        ]
        eye = torch.eye(q.shape[2])
        product = eye
        for a in maps:
            product = (eye + a.mean(0)) / 2 @ product
        return product[0].numpy()

    return run


def row_in_float64(q, k):
    """The row, one head's map at a time."""
    r = np.eye(q.shape[1])[0]
    for layer in reversed(range(len(q))):
        total = np.zeros_like(r)
        for head in range(HEADS):
            a, b = (x[layer, :, head].astype(np.float64) for x in (q, k))
            s = np.exp(a @ b.T * DIM**-0.5)
            total += r @ (s / s.sum(-1, keepdims=True))
        r = r / 2 + total / (2 * HEADS)
    return r


def reset_peak() -> int:
    """Starts a new peak of the resident set; returns that set, in bytes.

    A program may let its memory go after its answer is there, and the allocator keeps
    what was let go: both would hide what the next call takes.
    """
    gc.collect()
    time.sleep(0.5)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
