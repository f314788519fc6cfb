"""The attention kernels on a GPU: are they right, how fast, and in how much memory?

    python benchmarks/gpu.py --save     # on a GPU: all of it, into RESULTS.md
    python benchmarks/gpu.py --small    # tiny shapes on whatever is here

First every kernel against its definition in float64; a wrong one ends the run. Then
products of one row, relevance and statistics of one layer, 12 heads of 64, against
what a Hopper GPU can do at best: one exponential per score on its special-function
units, or the products on its tensor cores, whichever takes longer. Beside them what
others do: form the maps (in JAX, and in PyTorch where it is installed), or take the
derivative of cuDNN's attention by its values. Contenders take turns, A B C A B C. Last,
rollout and relevance of 131,072 tokens through 12 layers, with their peak memory.

Programs are compiled side by side before any is timed, so the whole takes minutes. To
start one from Python takes some 0.06 ms, which is what short inputs are measured by.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Memory that JAX does not use is PyTorch's.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from timing import Pair, arguments, report

from xviz_jax.kernels.attention_col_product import attention_col_product
from xviz_jax.kernels.attention_fused_matrix import attention_fused_matrix
from xviz_jax.kernels.attention_lse import attention_lse
from xviz_jax.kernels.attention_row_product import attention_row_product
from xviz_jax.kernels.attention_statistics import attention_statistics
from xviz_jax.kernels.rollout_rows import rollout_rows

RELU = "relu_gradient_x_attention"
HEADS, DIM = 12, 64
TOP_K = 1
MASKS: Any = ({}, {"causal": True}, {"window": (40, 9)})
TITLE = "One layer of attention over the floor of a Hopper GPU"

Arrays = Mapping[str, Any]
# The shapes it will get -> the arrays -> a call. The first part compiles, the last
# only starts the device.
Contender = Callable[[Arrays], Callable[[Arrays], Callable[[], Any]]]


class Row(Pair):
    """A pair whose times are too short for the digits of others."""

    def row(self) -> str:
        """One line of a table."""
        low, high = min(self.ratios), max(self.ratios)
        times = f"{1e3 * self.seconds:.4f} | {1e3 * self.floor_seconds:.4f}"
        ratio = f"{self.seconds / self.floor_seconds:.2f} | {low:.2f} - {high:.2f}"
        return f"| {self.name} | {times} | {ratio} | {self.error} |"


def main() -> None:
    if sys.argv[1:2] == ["--long"]:
        print(json.dumps(long_context(sys.argv[2], *map(int, sys.argv[3:]))))
        return
    if sys.argv[1:2] == ["--check"]:
        n, masks = map(int, sys.argv[2:])
        sys.exit(min(check(n, MASKS[:masks]), 100))
    options = arguments(__doc__)
    here = jax.default_backend()
    if here != "gpu" and not options.small:
        sys.exit(f"benchmarks/gpu.py wants an NVIDIA GPU, and JAX sees only a {here}.")
    wrong = check(70, MASKS[1:2], every=4) if options.small else check_side_by_side()
    if wrong:
        sys.exit(f"{wrong} kernels are wrong: nothing is timed.")

    lengths = (96,) if options.small else (512, 2048, 8192, 32768, 131072)
    dtypes = ("bfloat16",) if options.small else ("bfloat16", "float32")
    rows = list(compare(lengths, dtypes, 2 if options.small else 9))
    report(TITLE, "python benchmarks/gpu.py --save", rows, save=options.save)

    shape = (2, 96, 2) if options.small else (12, 131072, HEADS)
    for relevance in (RELU,) if options.small else ("attention", RELU):
        command = [sys.executable, __file__, "--long", relevance, *map(str, shape)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"{shape[1]} tokens, {shape[0]} layers, {relevance}: {found.stdout}")


def check_side_by_side() -> int:
    """All checks, each length in a process of its own; how many kernels are wrong."""
    masks = {1: 1, 129: 1, 777: 3, 2048: 2}

    def one(n: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, __file__, "--check", str(n), str(masks[n])]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(one, masks))
    for each in found:
        print(each.stdout, each.stderr if each.returncode else "")
    # A process that a signal ends returns less than zero.
    return sum(abs(each.returncode) for each in found)


def check(n: int, masks: Sequence[dict[str, Any]], every: int = 1) -> int:
    """Prints the error of every kernel to its definition; how many are wrong."""
    x = inputs(n, "bfloat16", heads=4, kv_heads=2, vectors=3)
    score = {name: x[name] for name in ("q", "k")}
    gradient = score | {name: x[name] for name in ("v", "dout")}
    signed = {"relevance": "gradient_x_attention"}
    cases = [
        (attention_lse, score, {}),
        (attention_statistics, score, {"top_k": 1}),
        (attention_fused_matrix, score, {"head_fusion": "max"}),
    ]
    for fusion in ("mean", "max", "min"):
        cases += [
            (attention_row_product, score | {"r": x["r"]}, {"head_fusion": fusion}),
            (
                attention_row_product,
                gradient | {"r": x["r"]},
                {"head_fusion": fusion, "relevance": RELU},
            ),
        ]
    cases += [
        (attention_row_product, gradient | {"r": x["r"]}, signed),
        (attention_col_product, score | {"x": x["r"]}, {}),
        (attention_col_product, gradient | {"x": x["r"]}, signed),
    ]
    wrong = 0
    for operation, arrays, static in cases[::every]:
        for scoring in masks:
            call = functools.partial(operation, **static, **scoring)
            want = defined(call, arrays)
            for backend in implementations():
                name = f"{backend:10} N={n:4} {operation.__name__} {static} {scoring}"
                try:
                    program = jax.jit(functools.partial(call, implementation=backend))
                    error = distance(program(**arrays), want)
                except NotImplementedError:
                    continue
                except Exception as failure:
                    # The others are checked all the same.
                    print(f"{name}: {type(failure).__name__}: {failure}", flush=True)
                    wrong += 1
                    continue
                ok = error <= 2e-5
                wrong += not ok
                print(f"{name}: {error:.1e}{'' if ok else '  WRONG'}", flush=True)
    return wrong


def implementations() -> tuple[Any, ...]:
    """Each backend that runs here."""
    return ("xla", "mosaic_gpu") if jax.default_backend() == "gpu" else ("xla",)


def defined(call: Callable[..., Any], arrays: Arrays) -> Any:
    """The definition of an operation, in float64, on the host."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
        program = jax.jit(functools.partial(call, implementation="reference"))
        return jax.tree.map(np.asarray, program(**wide))


def distance(got: Any, want: Any) -> float:
    """The largest error of any leaf over its largest entry; NaN if any error is."""
    found = 0.0
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        with np.errstate(invalid="ignore"):
            apart = np.where(g == w, 0.0, np.abs(g - w)).max()
        largest = np.abs(w, where=np.isfinite(w), out=np.zeros_like(w)).max()
        # Of one query the entropy is zero, and what is not is an error of its own.
        found = np.maximum(found, apart / (largest or 1.0))
    return float(found)


def inputs(n, dtype, *, heads=HEADS, kv_heads=None, vectors=1) -> dict[str, jax.Array]:
    """Random q, k, v, dout and weights r that sum to one, of one example."""
    keys = jax.random.split(jax.random.key(0), 5)
    kv_heads = kv_heads or heads
    by_head = {"q": heads, "k": kv_heads, "v": kv_heads, "dout": heads}
    found = {
        name: jax.random.normal(key, (1, n, h, DIM), dtype)
        for key, (name, h) in zip(keys[:4], by_head.items(), strict=True)
    }
    r = jax.nn.softmax(jax.random.normal(keys[4], (1, vectors, n)))
    return found | {"r": r}


def floor_seconds(operation: str, n: int, dtype: str) -> float:
    """The least time of an H100 or H200 SXM: 132 processors at 1.98 GHz."""
    scores = HEADS * n * n
    products = 2 * scores * DIM * (2 if operation == "relevance" else 1)
    exponentials = scores / (16 * 132 * 1.98e9)
    return max(exponentials, products / (800e12 if dtype == "bfloat16" else 67e12))


def compare(
    lengths: Sequence[int], dtypes: Sequence[str], rounds: int
) -> Iterator[Row]:
    """Times every contender at every length, in turns."""
    sizes = [(n, dtype) for n in lengths for dtype in dtypes]
    jobs = [
        (*size, operation, name)
        for size in sizes
        for operation, contenders in CONTENDERS.items()
        for name in contenders
    ]
    with ThreadPoolExecutor() as pool:
        exact = {size: pool.submit(in_float64, shapes(*size)) for size in sizes}
        ready = {job: pool.submit(prepare, *job) for job in jobs}
    for n, dtype in sizes:
        x = inputs(n, dtype)
        x["lse"] = jax.jit(attention_lse)(x["q"], x["k"])
        want = exact[n, dtype].result()(x)
        for operation in CONTENDERS:
            candidates = {
                name: ready[n, dtype, operation, name].result()
                for name in CONTENDERS[operation]
            }
            title = f"{operation}, {n} tokens, {dtype}"
            floor = floor_seconds(operation, n, dtype)
            for name, seconds, error in race(
                title, candidates, x, want[operation], rounds
            ):
                ratios = tuple(t / floor for t in seconds)
                median = float(np.median(seconds))
                row = Row(f"{title}: {name}", median, floor, ratios, f"{error:.0e}")
                print(row.row(), flush=True)
                yield row


def prepare(n: int, dtype: str, operation: str, name: str) -> Any:
    """The contender, compiled; or why it does not take part."""
    try:
        return CONTENDERS[operation][name](shapes(n, dtype))
    except (NotImplementedError, ImportError, MemoryError) as reason:
        return reason
    except RuntimeError as error:
        # XLA tries its products while it compiles, at their full size.
        require_out_of_memory(error)
        return MemoryError("out of memory")


def require_out_of_memory(error: RuntimeError) -> None:
    """Raises it again if it is about anything else."""
    if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error)):
        raise error


def race(
    title: str, candidates: Mapping[str, Any], x: Arrays, want: Any, rounds: int
) -> list[tuple[str, list[float], float]]:
    """Name, seconds of each turn, and error of all that take part."""
    running, errors, turns, times = {}, {}, {}, {}
    for name, candidate in candidates.items():
        if isinstance(candidate, Exception):
            print(f"{title}: {name}: {candidate}", flush=True)
            continue
        try:
            run = candidate(x)
            errors[name] = distance(numbers(run()), want)
            start = time.perf_counter()
            wait_for(run())
            once = time.perf_counter() - start
        except RuntimeError as error:
            require_out_of_memory(error)
            print(f"{title}: {name}: out of memory", flush=True)
            continue
        # Launches are asynchronous: a batch of calls measures the device.
        calls = max(1, min(50, int(5e-3 / once)))
        turns[name] = calls, max(min(rounds, 3), min(rounds, int(1 / (calls * once))))
        running[name], times[name] = run, []
    for turn in range(rounds):
        for name, run in running.items():
            calls, most = turns[name]
            if turn >= most:
                continue
            out = None
            start = time.perf_counter()
            for _ in range(calls):
                out = run()
            wait_for(out)
            times[name].append((time.perf_counter() - start) / calls)
    if "torch" in sys.modules:
        # What PyTorch keeps for itself is lost to the others.
        sys.modules["torch"].cuda.empty_cache()
    return [(name, times[name], errors[name]) for name in running]


def is_torch(out: Any) -> bool:
    return type(out).__module__ == "torch"


def wait_for(out: Any) -> None:
    """Until the device has computed `out`, of JAX or of PyTorch."""
    if is_torch(out):
        import torch  # pyright: ignore[reportMissingImports]

        if out.is_cuda:
            torch.cuda.synchronize()
    else:
        jax.block_until_ready(out)


def numbers(out: Any) -> np.ndarray:
    return out.cpu().numpy() if is_torch(out) else np.asarray(out)


def shapes(n: int, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Of `inputs`, and of their logsumexp."""
    features = jax.ShapeDtypeStruct((1, n, HEADS, DIM), dtype)
    return {name: features for name in ("q", "k", "v", "dout")} | {
        "r": jax.ShapeDtypeStruct((1, 1, n), jnp.float32),
        "lse": jax.ShapeDtypeStruct((1, HEADS, n), jnp.float32),
    }


def in_float64(shapes: Arrays) -> Callable[[Arrays], dict[str, np.ndarray]]:
    """All answers, a strip of queries of one head at a time."""
    n = shapes["q"].shape[1]
    strip = min(n, 256)

    def one(x, head, start):
        wide = lambda y: y.astype(jnp.float64)
        own = lambda name: wide(
            jax.lax.dynamic_slice_in_dim(x[name][0][:, head], start, strip)
        )
        s = own("q") @ wide(x["k"][0][:, head]).T * DIM**-0.5
        log_p = jax.nn.log_softmax(s)
        p = jnp.exp(log_p)
        r = wide(jax.lax.dynamic_slice_in_dim(x["r"][0, 0], start, strip))
        gradient = own("dout") @ wide(x["v"][0][:, head]).T
        relevance = p * jnp.maximum(gradient, 0.0)
        return jnp.stack([r @ p, r @ relevance]), -(p * log_p).sum(1)

    def every(**x):
        def of_head(head):
            def step(total, start):
                columns, entropy = one(x, head, start)
                return total + columns, entropy

            begin = jnp.zeros((2, n), jnp.float64)
            return jax.lax.scan(step, begin, jnp.arange(0, n, strip))

        columns, entropy = jax.lax.map(of_head, jnp.arange(HEADS))
        return *(columns.sum(0) / HEADS), entropy.reshape(HEADS, n)

    names = ("q", "k", "v", "dout", "r")
    with jax.enable_x64(True):
        program = jax.jit(every).lower(**{name: shapes[name] for name in names})
        program = program.compile()

    def run(x: Arrays) -> dict[str, np.ndarray]:
        with jax.enable_x64(True):
            found = program(**{name: x[name] for name in names})
        return dict(zip(CONTENDERS, map(np.asarray, found), strict=True))

    return run


def compiled(function: Callable[..., Any], *names: str) -> Contender:
    """A function of the arrays `names`."""

    def compile_for(shapes: Arrays):
        program = jax.jit(function).lower(**{name: shapes[name] for name in names})
        program = program.compile()

        def bind(x: Arrays):
            arrays = {name: x[name] for name in names}
            return lambda: program(**arrays)

        return bind

    return compile_for


def library(operation: str, *names: str, **options: Any) -> Contender:
    """An operation of the library on the arrays `names`; its answer, to compare."""
    calls = {
        "row product": (attention_row_product, {}),
        "relevance": (attention_row_product, {"relevance": RELU}),
        "statistics": (attention_statistics, {"top_k": TOP_K}),
    }
    function, static = calls[operation]

    def answer(**arrays):
        out = function(**arrays, **static, **options)
        if operation != "statistics":
            return out[0, 0]
        # What is not returned might not be computed.
        rest = sum(x.sum() for x in jax.tree.leaves(out))
        return jnp.where(jnp.isfinite(rest), out.entropy[0], jnp.nan)

    return compiled(answer, *names)


def require_room(n: int) -> None:
    """Raises MemoryError where the scores and the maps of a layer do not fit."""
    wanted = 2 * 4 * HEADS * n * n
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 2**34)
    if wanted > limit:
        raise MemoryError(f"its maps want {wanted / 1e9:.0f} of {limit / 1e9:.0f} GB")


def maps_in_jax(operation: str) -> Contender:
    """All maps of the layer, formed in JAX."""

    def program(q, k, v, dout, r):
        product = functools.partial(
            jnp.einsum,
            "ihd,jhd->hij",
            precision="highest",
            preferred_element_type=jnp.float32,
        )
        s = product(q[0], k[0]) * DIM**-0.5
        p = jax.nn.softmax(s)
        if operation == "statistics":
            entropy = -(p * jax.nn.log_softmax(s)).sum(-1)
            n = jnp.arange(p.shape[-1], dtype=jnp.float32)
            distance = (p * jnp.abs(n[:, None] - n)).sum(-1)
            top = jax.lax.top_k(p, TOP_K)[0]
            sinks = jnp.diagonal(p, axis1=1, axis2=2) + p[..., 0]
            # What is not returned would not be computed.
            return jnp.where(distance + top.sum(-1) + sinks < 0, 0.0, entropy)
        if operation == "relevance":
            p = p * jnp.maximum(product(dout[0], v[0]), 0.0)
        return jnp.einsum("i,hij->j", r[0, 0], p, precision="highest") / HEADS

    def compile_for(shapes: Arrays):
        require_room(shapes["q"].shape[1])
        return compiled(program, "q", "k", "v", "dout", "r")(shapes)

    return compile_for


def maps_in_torch(operation: str) -> Contender:
    """All maps of the layer, formed in PyTorch, as a hook would find them."""

    def compile_for(shapes: Arrays):
        if importlib.util.find_spec("torch") is None:
            raise ImportError("torch is not installed")
        require_room(shapes["q"].shape[1])
        return bind

    def bind(x: Arrays):
        import torch  # pyright: ignore[reportMissingImports]

        device = "cuda" if torch.cuda.is_available() else "cpu"
        to = lambda y: torch.tensor(np.asarray(y[0], np.float32), device=device)
        dtype = getattr(torch, x["q"].dtype.name)
        q, k, v, dout = (
            to(x[name]).to(dtype).transpose(0, 1) for name in ("q", "k", "v", "dout")
        )
        r = to(x["r"])[0]

        @torch.inference_mode()
        def run():
            s = (q @ k.transpose(1, 2)).float() * DIM**-0.5
            p = torch.softmax(s, -1)
            if operation == "statistics":
                entropy = -(p * torch.log_softmax(s, -1)).sum(-1)
                n = torch.arange(p.shape[-1], device=device, dtype=torch.float32)
                (p * (n[:, None] - n).abs()).sum(-1)
                torch.topk(p, TOP_K)
                return entropy
            if operation == "relevance":
                p = p * (dout @ v.transpose(1, 2)).float().relu()
            return torch.einsum("i,hij->j", r, p) / HEADS

        return run

    return compile_for


def vjp_of_attention(shapes: Arrays) -> Any:
    """The cotangent of the values, of which one feature is the weights r."""
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and shapes["q"].dtype != jnp.bfloat16:
        raise NotImplementedError("cuDNN's attention takes 16-bit inputs only")
    attend = functools.partial(
        jax.nn.dot_product_attention, implementation="cudnn" if on_gpu else "xla"
    )

    def program(q, k, r):
        cotangent = jnp.zeros_like(q).at[..., 0].set(r[:, 0, :, None].astype(q.dtype))
        (dv,) = jax.vjp(lambda v: attend(q, k, v), jnp.zeros_like(k))[1](cotangent)
        return dv[0, ..., 0].astype(jnp.float32).sum(-1) / HEADS

    return compiled(program, "q", "k", "r")(shapes)


CONTENDERS: dict[str, dict[str, Contender]] = {
    "row product": {
        "library": library("row product", "r", "q", "k", "lse"),
        "library, logsumexp too": library("row product", "r", "q", "k"),
        "library, xla": library("row product", "r", "q", "k", implementation="xla"),
        "maps in JAX": maps_in_jax("row product"),
        "maps in PyTorch": maps_in_torch("row product"),
        "vjp of attention": vjp_of_attention,
    },
    "relevance": {
        "library": library("relevance", "r", "q", "k", "v", "dout", "lse"),
        "library, logsumexp too": library("relevance", "r", "q", "k", "v", "dout"),
        "library, xla": library(
            "relevance", "r", "q", "k", "v", "dout", implementation="xla"
        ),
        "maps in JAX": maps_in_jax("relevance"),
        "maps in PyTorch": maps_in_torch("relevance"),
    },
    "statistics": {
        "library": library("statistics", "q", "k"),
        "library, xla": library("statistics", "q", "k", implementation="xla"),
        "maps in JAX": maps_in_jax("statistics"),
        "maps in PyTorch": maps_in_torch("statistics"),
    },
}


def long_context(relevance: Any, layers: int, n: int, heads: int) -> dict[str, float]:
    """Seconds and bytes of a rollout, in a process of its own for the peak's sake."""

    @functools.partial(jax.jit, static_argnums=0)
    def draw(seed):
        one = lambda key: jax.random.normal(key, (n, heads, DIM), jnp.bfloat16)
        # A layer at a time, so that the peak is not that of drawing.
        return jax.lax.map(one, jax.random.split(jax.random.key(seed), layers))

    names = ("qs", "ks") if relevance == "attention" else ("qs", "ks", "vs", "douts")
    stacks = {name: draw(seed) for seed, name in enumerate(names)}
    jax.block_until_ready(stacks)
    program = functools.partial(
        rollout_rows,
        rows=[-1],
        relevance=relevance,
        residual="half" if relevance == "attention" else "add",
        causal=True,
    )
    compiled = jax.jit(program).lower(**stacks).compile()
    before = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0)
    jax.block_until_ready(compiled(**stacks))
    start = time.perf_counter()
    _, mass = jax.block_until_ready(compiled(**stacks))
    seconds = time.perf_counter() - start
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    planned: Any = compiled.memory_analysis()
    return {
        "seconds": round(seconds, 4),
        "mass": float(mass[0]),
        "GB of arguments": sum(x.nbytes for x in stacks.values()) / 1e9,
        "GB planned beside them": planned.temp_size_in_bytes / 1e9,
        "GB at the peak beside them": (peak - before) / 1e9,
    }


if __name__ == "__main__":
    main()
