"""What tracing costs: running a captured model, and reading its program.

Two models, 12 layers in a loop, of BERT-base's size, and 48 unrolled. Run time is
that of the model with query, key and value captured, over the model's own, in the
processor's time; trace time that of finding its sites, over `jax.make_jaxpr` alone,
also for 12 and 24 unrolled layers, to show that it grows with the equations.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from timing import Pair, arguments, paired, report

from xviz_jax import tracing


def layer(x, weights):
    query, key, value = (
        (x @ weights[name]).reshape(len(x), -1, 32)
        for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
    x = x + mixed @ weights["out"]
    return x + jax.nn.gelu(x @ weights["up"]) @ weights["down"]


def looped(weights, x):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0]


def unrolled(weights, x):
    for index in range(len(weights["up"])):
        x = layer(x, jax.tree.map(lambda leaf, i=index: leaf[i], weights))
    return x


def parameters(depth: int, width: int):
    names = {"query": 1, "key": 1, "value": 1, "out": 1, "up": 4, "down": 4}
    weights = {}
    for seed, (name, wide) in enumerate(names.items()):
        shape = (wide * width, width) if name == "down" else (width, wide * width)
        draw = jax.random.normal(jax.random.key(seed), (depth, *shape))
        weights[name] = draw / shape[0] ** 0.5 / depth
    return weights


def traced(name: str, model, args, rounds: int) -> Pair:
    """Time to find the sites over time to make the jaxpr."""
    mine, base = [], []
    for _ in range(rounds):
        # New functions, because JAX keeps what it traced before.
        for times, function in (
            (mine, lambda *a: tracing.sites(lambda *b: model(*b), *a)),
            (base, lambda *a: jax.make_jaxpr(lambda *b: model(*b))(*a)),
        ):
            jax.clear_caches()
            begin = time.perf_counter()
            function(*args)
            times.append(time.perf_counter() - begin)
    ratios = tuple(a / b for a, b in zip(mine, base, strict=True))
    equations = len(jax.make_jaxpr(model)(*args).eqns)
    note = f"{equations} equations at the top"
    return Pair(name, float(np.median(mine)), float(np.median(base)), ratios, note)


def captured_run(name: str, model, args, rounds: int) -> Pair:
    """Run time with query, key and value captured over plain run time."""
    plain = jax.jit(model)
    captured = jax.jit(tracing.capture(model, ("query", "key", "value")))
    error = jnp.abs(captured(*args)[0] - plain(*args)).max()
    return paired(
        f"{name}: run with query, key, value captured",
        lambda: captured(*args),
        lambda: plain(*args),
        rounds=rounds,
        error=f"{float(error):.0e} to the model",
        clock=time.process_time,
    )


def main() -> None:
    options = arguments(__doc__)
    small, rounds = options.small, 2 if options.small else options.rounds
    length = 16 if small else 128
    pairs = []
    for model, depth, width, timed in (
        (looped, 12, 768, True),
        (unrolled, 12, 384, False),
        (unrolled, 24, 384, False),
        (unrolled, 48, 384, True),
    ):
        depth, width = (depth // 6, 64) if small else (depth, width)
        name = f"{depth} layers, {'scan' if model is looped else 'unrolled'}"
        args = (parameters(depth, width), jnp.ones((length, width)))
        if timed:
            pairs.append(captured_run(name, model, args, rounds))
        pairs.append(traced(f"{name}: find sites", model, args, rounds))
    title = "Tracing over a plain run and a plain trace"
    report(title, "python benchmarks/tracing.py --save", pairs, save=options.save)


if __name__ == "__main__":
    main()
