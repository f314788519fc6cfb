"""The attention kernels on a GPU: are they right, how fast, and in how much memory?

    python benchmarks/gpu.py --save     # on a GPU: all of it, into RESULTS.md
    python benchmarks/gpu.py --small    # tiny shapes on whatever is here

First every kernel against its definition in float64; a wrong one ends the run. Then
products of one row, relevance and statistics of one layer, 12 heads of 64, against
what an H100 can do at best: one exponential per score on its special-function units,
or the products on its tensor cores, whichever takes longer. Beside them what others
do: form the maps (in JAX, and in PyTorch where it is installed), or take the derivative
of cuDNN's attention by its values. Contenders take turns, A B C A B C. Last, rollout
and relevance of 131,072 tokens through 12 layers, with their peak memory.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
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
TOP_K = 4
TITLE = "One layer of attention over the floor of an H100"


class Contender(Pair):
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
    options = arguments(__doc__)
    here = jax.default_backend()
    if here != "gpu" and not options.small:
        sys.exit(f"benchmarks/gpu.py wants an NVIDIA GPU, and JAX sees only a {here}.")
    masks = ({}, {"causal": True}, {"window": (40, 9)})
    if options.small:
        wrong = check((70,), masks[1:2], every=4)
    else:
        wrong = check((1, 129, 777, 2048), masks)
    if wrong:
        sys.exit(f"{wrong} kernels are wrong: nothing is timed.")

    lengths = (96,) if options.small else tuple(2**n for n in range(9, 18))
    dtypes = ("bfloat16",) if options.small else ("bfloat16", "float32")
    rows = []
    for n in lengths:
        for dtype in dtypes:
            for operation in CONTENDERS:
                rows += compare(operation, n, dtype, 2 if options.small else 9)
    report(TITLE, "python benchmarks/gpu.py --save", rows, save=options.save)

    shape = (2, 96, 2) if options.small else (12, 131072, HEADS)
    for relevance in (RELU,) if options.small else ("attention", RELU):
        command = [sys.executable, __file__, "--long", relevance, *map(str, shape)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"{shape[1]} tokens, {shape[0]} layers, {relevance}: {found.stdout}")


def check(
    lengths: tuple[int, ...], masks: tuple[dict[str, Any], ...], every: int = 1
) -> int:
    """Prints the error of every kernel to its definition; how many are wrong."""
    wrong = 0
    for n in lengths:
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
        for operation, arrays, static in cases[::every]:
            for scoring in masks:
                call = functools.partial(operation, **static, **scoring)
                for how in implementations():
                    try:
                        got = jax.jit(functools.partial(call, **how))(**arrays)
                    except NotImplementedError:
                        continue
                    error = distance(got, defined(call, arrays))
                    ok = error <= 2e-5
                    wrong += not ok
                    name = f"{operation.__name__} {static} {scoring}"
                    mark = "" if ok else "  WRONG"
                    backend = how["implementation"]
                    print(f"{backend:10} N={n:4} {name}: {error:.1e}{mark}", flush=True)
    return wrong


def implementations() -> list[dict[str, Any]]:
    """Arguments that name each backend that runs here."""
    if jax.default_backend() == "gpu":
        return [{"implementation": "xla"}, {"implementation": "mosaic_gpu"}]
    return [{"implementation": "xla"}]


def defined(call: Callable[..., Any], arrays: dict[str, Any]) -> Any:
    """The definition of an operation, in float64."""
    with jax.enable_x64(True):
        wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
        program = jax.jit(functools.partial(call, implementation="reference"))
        return jax.tree.map(np.asarray, program(**wide))


def distance(got: Any, want: Any) -> float:
    """The largest error of any leaf over the largest entry of that leaf."""
    found = 0.0
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        apart = np.where(g == w, 0.0, np.abs(g - w)).max()
        found = max(found, float(apart / max(np.abs(w[np.isfinite(w)]).max(), 1e-30)))
    return found


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
    """The least time an H100 SXM takes: 132 processors at 1.755 GHz."""
    scores = HEADS * n * n
    products = 2 * scores * DIM * (2 if operation == "relevance" else 1)
    exponentials = scores / (16 * 132 * 1.755e9)
    return max(exponentials, products / (800e12 if dtype == "bfloat16" else 67e12))


def compare(operation: str, n: int, dtype: str, rounds: int) -> list[Contender]:
    """Times every contender at one length, in turns."""
    x = inputs(n, dtype)
    x["lse"] = jax.jit(attention_lse)(x["q"], x["k"])
    exact = in_float64(operation, x)
    running, errors = {}, {}
    for name, make in CONTENDERS[operation].items():
        try:
            run = make(x, dtype)
            errors[name] = distance(run(), exact)
        except (NotImplementedError, ImportError, MemoryError) as error:
            print(f"{operation} {n} {dtype}: {name}: {error}")
        except RuntimeError as error:
            if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error)):
                raise
            print(f"{operation} {n} {dtype}: {name}: out of memory")
        else:
            running[name] = run
    times = {name: [] for name in running}
    floor = floor_seconds(operation, n, dtype)
    # Launches are asynchronous: a batch of calls measures the device.
    calls = max(1, min(50, int(2e-3 / floor)))
    for _ in range(rounds):
        for name, run in running.items():
            out = None
            start = time.perf_counter()
            for _ in range(calls):
                out = run(wait=False)
            wait_for(out)
            times[name].append((time.perf_counter() - start) / calls)
    return [
        Contender(
            f"{operation}, {n} tokens, {dtype}: {name}",
            float(np.median(seconds)),
            floor,
            tuple(t / floor for t in seconds),
            f"{errors[name]:.0e}",
        )
        for name, seconds in times.items()
    ]


def wait_for(out: Any) -> None:
    """Until the device has computed `out`, of JAX or of PyTorch."""
    if type(out).__module__ == "torch":
        import torch  # pyright: ignore[reportMissingImports]

        if out.is_cuda:
            torch.cuda.synchronize()
    else:
        jax.block_until_ready(out)


def in_float64(operation: str, x: dict[str, jax.Array]) -> np.ndarray:
    """The answer, a strip of queries of one head at a time."""
    with jax.enable_x64(True):
        n = x["q"].shape[1]
        strip = min(n, 256)
        wide = {name: jnp.asarray(y[0], jnp.float64) for name, y in x.items()}

        def one(head, start):
            take = lambda name: jax.lax.dynamic_slice_in_dim(
                wide[name][:, head], start, strip
            )
            s = take("q") @ wide["k"][:, head].T * DIM**-0.5
            p = jax.nn.softmax(s)
            if operation == "statistics":
                return -(p * jax.nn.log_softmax(s)).sum(1)
            if operation == "relevance":
                p = p * jnp.maximum(take("dout") @ wide["v"][:, head].T, 0.0)
            r = jax.lax.dynamic_slice_in_dim(wide["r"][0], start, strip)
            return r @ p / HEADS

        @jax.jit
        def heads():
            def strips(head):
                if operation == "statistics":
                    starts = jnp.arange(0, n, strip)
                    return jax.lax.map(lambda i: one(head, i), starts).reshape(-1)
                body = lambda i, total: total + one(head, i * strip)
                return jax.lax.fori_loop(0, n // strip, body, jnp.zeros(n))

            return jax.lax.map(strips, jnp.arange(HEADS))

        found = np.asarray(heads())
    return found if operation == "statistics" else found.sum(0)


def library(operation: str, *names: str, **options: Any) -> Callable[..., Any]:
    """An operation of the library on the arrays `names`; its answer, to compare."""
    calls = {
        "row product": (attention_row_product, {}),
        "relevance": (attention_row_product, {"relevance": RELU}),
        "statistics": (attention_statistics, {"top_k": TOP_K}),
    }
    function, static = calls[operation]
    answer = lambda out: out.entropy[0] if operation == "statistics" else out[0, 0]

    def make(x, dtype):
        program = jax.jit(
            lambda **arrays: answer(function(**arrays, **static, **options))
        )
        return jax_runner(program, {name: x[name] for name in names})

    return make


def jax_runner(program: Callable[..., Any], arrays: dict[str, Any]):
    """A function of no arguments, compiled; `wait=False` only starts it."""

    def run(wait=True):
        out = program(**arrays)
        return np.asarray(out) if wait else out

    return run


def require_room(n: int) -> None:
    """Raises MemoryError where the scores and the maps of a layer do not fit."""
    wanted = 2 * 4 * HEADS * n * n
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 2**34)
    if wanted > limit:
        raise MemoryError(f"its maps want {wanted / 1e9:.0f} of {limit / 1e9:.0f} GB")


def dense_jax(operation: str) -> Callable[..., Any]:
    """All maps of the layer, formed in JAX."""

    def program(q, k, v, dout, r):
        product = functools.partial(
            jnp.einsum, "ihd,jhd->hij", preferred_element_type=jnp.float32
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
        return jnp.einsum("i,hij->j", r[0, 0], p) / HEADS

    def make(x, dtype):
        require_room(x["q"].shape[1])
        names = ("q", "k", "v", "dout", "r")
        return jax_runner(jax.jit(program), {name: x[name] for name in names})

    return make


def dense_torch(operation: str) -> Callable[..., Any]:
    """All maps of the layer, formed in PyTorch, as a hook would find them."""

    def make(x, dtype):
        if importlib.util.find_spec("torch") is None:
            raise ImportError("torch is not installed")
        require_room(x["q"].shape[1])
        import torch  # pyright: ignore[reportMissingImports]

        device = "cuda" if torch.cuda.is_available() else "cpu"
        to = lambda y: torch.tensor(np.asarray(y[0], np.float32), device=device)
        q, k, v, dout = (
            to(x[name]).to(getattr(torch, dtype)).transpose(0, 1)
            for name in ("q", "k", "v", "dout")
        )
        r = to(x["r"])[0]

        @torch.inference_mode()
        def run(wait=True):
            s = (q @ k.transpose(1, 2)).float() * DIM**-0.5
            p = torch.softmax(s, -1)
            if operation == "statistics":
                out = -(p * torch.log_softmax(s, -1)).sum(-1)
                torch.topk(p, TOP_K)
            else:
                if operation == "relevance":
                    p = p * (dout @ v.transpose(1, 2)).float().relu()
                out = torch.einsum("i,hij->j", r, p) / HEADS
            return out.cpu().numpy() if wait else out

        return run

    return make


def vjp_of_attention(x: dict[str, jax.Array], dtype: str) -> Callable[..., Any]:
    """The cotangent of the values, of which one feature is the weights r."""
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and dtype != "bfloat16":
        raise NotImplementedError("cuDNN's attention takes 16-bit inputs only")
    attend = functools.partial(
        jax.nn.dot_product_attention, implementation="cudnn" if on_gpu else "xla"
    )

    def program(q, k, r):
        cotangent = jnp.zeros_like(q).at[..., 0].set(r[:, 0, :, None].astype(q.dtype))
        (dv,) = jax.vjp(lambda v: attend(q, k, v), jnp.zeros_like(k))[1](cotangent)
        return dv[0, ..., 0].astype(jnp.float32).sum(-1) / HEADS

    return jax_runner(jax.jit(program), {name: x[name] for name in ("q", "k", "r")})


CONTENDERS: dict[str, dict[str, Callable[..., Any]]] = {
    "row product": {
        "library": library("row product", "r", "q", "k", "lse"),
        "library, logsumexp too": library("row product", "r", "q", "k"),
        "library, xla": library("row product", "r", "q", "k", implementation="xla"),
        "maps in JAX": dense_jax("row product"),
        "maps in PyTorch": dense_torch("row product"),
        "vjp of attention": vjp_of_attention,
    },
    "relevance": {
        "library": library("relevance", "r", "q", "k", "v", "dout", "lse"),
        "library, logsumexp too": library("relevance", "r", "q", "k", "v", "dout"),
        "library, xla": library(
            "relevance", "r", "q", "k", "v", "dout", implementation="xla"
        ),
        "maps in JAX": dense_jax("relevance"),
        "maps in PyTorch": dense_torch("relevance"),
    },
    "statistics": {
        "library": library("statistics", "q", "k"),
        "library, xla": library("statistics", "q", "k", implementation="xla"),
        "maps in JAX": dense_jax("statistics"),
        "maps in PyTorch": dense_torch("statistics"),
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
