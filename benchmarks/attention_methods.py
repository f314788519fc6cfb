"""Attention methods over their floors, and beside the usual PyTorch code.

Rollout of the class token's row and the statistics of all heads over one forward pass,
relevance over one forward and backward pass; and each beside transformers' eager model
with `output_attentions=True`, whose maps are multiplied in torch, batched, as whole
matrices. Both run the same weights, of a ViT-S/16-like and a MiniLM-like classifier
that transformers makes and `xv.models.load` reads.

    python benchmarks/attention_methods.py            # the table
    python benchmarks/attention_methods.py --small    # tiny shapes, without the peer

Every size is a process of its own. Within one, a method takes turns with its floor, and
then with its peer: how long a call takes depends on what the one before it left behind.
Where a call over all inputs takes a minute, each that counts follows one of its own
kind: pages that the other leaves alone for so long, a virtual machine may give back to
its host, and to have them again takes many times as long (RESULTS.md has figures).
Where what a backward pass keeps of all inputs does not fit the machine, relevance, its
floor and what torch does take as many inputs at once as fit, within one call.
Peak memory is of yet another process for each, beyond what it held with the weights
and the input, after a first call where that takes less than a minute: of JAX it is a
compiled program's run.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_rows import reset_peak, status
from timing import replace_section

import xviz_jax as xv
from xviz_jax import tracing

# Each method's floor.
FLOORS = {
    "rollout": "forward",
    "statistics": "forward",
    "relevance": "forward + backward",
}
GOLDENS = Path(__file__).parents[1] / "tests" / "models" / "goldens"
# Beyond this, maps and what a backward pass keeps of them do not fit the machine.
MOST_BYTES = 12e9
# What takes parts of a batch where the whole does not fit.
BACKWARD = ("forward + backward", "relevance", "torch rollout", "torch relevance")
TARGET = 1


@dataclasses.dataclass(frozen=True)
class Size:
    """A model's kind, a length or an image's side in patches, and a batch."""

    kind: str
    length: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.length if self.kind == "text" else self.length**2 + 1

    @property
    def large(self) -> bool:
        """Whether a round takes a minute: then two are run."""
        return self.tokens * self.batch > 16_000

    @property
    def huge(self) -> bool:
        """Whether a call takes a minute."""
        return self.tokens * self.batch > 60_000

    @property
    def at_once(self) -> int:
        """How many inputs a backward pass fits the machine with, a power of two."""
        fit = int(MOST_BYTES / map_bytes(self, 1))
        return min(self.batch, 1 << (fit.bit_length() - 1))

    @property
    def name(self) -> str:
        like = "MiniLM-like" if self.kind == "text" else "ViT-S/16-like"
        return f"{like}, {self.tokens} tokens, batch {self.batch}"


# Images of about as many tokens as the texts.
SIZES = [
    *(Size("image", 14, batch) for batch in (1, 8, 32)),
    *(Size("image", 23, batch) for batch in (1, 8)),
    Size("image", 45, 1),
    *(Size("text", 197, batch) for batch in (1, 8, 32)),
    *(Size("text", 512, batch) for batch in (1, 8)),
    Size("text", 2048, 1),
    # These take minutes.
    *(Size("image", 23, 32), Size("text", 512, 32)),
    *(Size("image", 45, 8), Size("text", 2048, 8)),
    # And these a quarter of an hour.
    *(Size("image", 45, 32), Size("text", 2048, 32)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--save", action="store_true", help="write into RESULTS.md")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--worker", nargs=2, metavar=("TASK", "JSON"))
    options = parser.parse_args()
    if options.worker:
        task, argument = options.worker
        print(json.dumps(TASKS[task](json.loads(argument))))
        return
    sizes = [Size("image", 14, 2)] if options.small else SIZES
    peer = importlib.util.find_spec("transformers") is not None and not options.small
    if not peer and not options.small:
        raise SystemExit("transformers and torch make the models: install both")
    title = "Attention methods over their floors, beside eager PyTorch"
    packages = ("jax", "jaxlib", *(("torch", "transformers") if peer else ()))
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in packages)
    lines = [
        f"## {title}",
        "",
        f"`python benchmarks/attention_methods.py --save`, cpu ({platform.machine()}), "
        f"Python {platform.python_version()}, {versions}. Ours, the {options.clock} "
        "time: milliseconds, median; over the floor, of neighbours in time, median and "
        "spread; torch over ours; peak memory beyond weights and input, ours, the "
        "floor's and torch's; the error of a row to torch's, of its greatest entry.",
        "",
        "| model | method | ms | over its floor | spread | torch / ours | MB | "
        "floor MB | torch MB | error |",
        "|---" * 10 + "|",
    ]
    for size in sizes:
        if options.only not in size.name:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            base = {
                **dataclasses.asdict(size),
                "folder": str(folder(size, Path(scratch), options.small)),
                "rounds": 2 if options.small or size.large else options.rounds,
                "clock": options.clock,
                "peer": peer,
            }
            times = worker("times", base)
            measured = ["rollout", "forward"]
            if not options.small:
                measured = [*FLOORS, *dict.fromkeys(FLOORS.values())]
            if peer:
                measured += ["torch rollout", "torch relevance"]
            used = {n: worker("memory", {**base, "method": n}) for n in measured}
        for n in times:
            lines.append(row(size.name, n, times[n], used))
            print(lines[-1], flush=True)
    lines.append("")
    print("\n".join(lines))
    if options.save:
        replace_section(title, lines)


def row(model: str, name: str, times: dict, used: dict) -> str:
    mine, base = times["own"], times["floor"]
    ratios = [a / b for a, b in zip(mine, base, strict=True)]
    spread = f"{min(ratios):.3f} - {max(ratios):.3f}"
    cells = [f"{1e3 * statistics.median(mine):.1f}"]
    cells += [f"{statistics.median(ratios):.3f}", spread]
    size = lambda n: f"{used[n] / 1e6:.0f}" if n in used else "-"
    ratio, error = "-", "-"
    if "peer" in times:
        theirs = [a / b for a, b in zip(times["peer"], times["beside"], strict=True)]
        ratio, error = f"{statistics.median(theirs):.2f}", f"{times['error']:.0e}"
    cells += [ratio, size(name), size(FLOORS[name]), size(f"torch {name}"), error]
    return f"| {model} | {name} | " + " | ".join(cells) + " |"


def map_bytes(size: Size, batch: int) -> float:
    """Bytes of all maps and of as much again: of gradients, or of exponentials."""
    layers, heads = (12, 6) if size.kind == "image" else (6, 12)
    return 8.0 * layers * heads * size.tokens**2 * batch


def worker(task: str, argument: dict):
    command = [sys.executable, __file__, "--worker", task, json.dumps(argument)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def folder(size: Size, scratch: Path, small: bool) -> Path:
    """A checkpoint: of transformers' making, or a tiny one of the tests."""
    if small:
        name = "vision/vit" if size.kind == "image" else "text/bert_sequence"
        return GOLDENS / name
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    common = {"hidden_size": 384, "intermediate_size": 1536, "num_labels": 10}
    if size.kind == "image":
        side = 16 * size.length
        config = transformers.ViTConfig(
            num_hidden_layers=12, num_attention_heads=6, image_size=side, **common
        )
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.BertConfig(
            num_hidden_layers=6,
            num_attention_heads=12,
            vocab_size=8192,
            max_position_embeddings=2048,
            **common,
        )
        model = transformers.BertForSequenceClassification(config)
    # Maps of random weights are all but flat; these look somewhere.
    for name, weight in model.named_parameters():
        if name.endswith(
            ("query.weight", "key.weight", "q_proj.weight", "k_proj.weight")
        ):
            weight.data *= 4
    model.save_pretrained(scratch)
    return scratch


def inputs(size: Size, config: Any) -> np.ndarray:
    random = np.random.default_rng(0)
    if size.kind == "text":
        shape = (size.batch, size.length)
        return random.integers(0, config.vocabulary, shape, np.int32)
    side = config.grid[0] * config.patch[0]
    return random.standard_normal((size.batch, side, side, 3), np.float32)


def ours(argument: dict, names: Sequence[str]) -> dict[str, Callable]:
    """Methods and floors as compiled functions of nothing, in JAX."""
    size = size_of(argument)
    model = xv.models.load(argument["folder"], scan=True)
    forward, parameters = model.functional()
    x = jnp.asarray(inputs(size, model.config))

    def gradient(parameters, one):
        """At the pixels, or at the embeddings of words."""
        if size.kind == "image":
            return jax.value_and_grad(lambda x: forward(parameters, x)[TARGET])(one)
        sites = tracing.sites(forward, parameters, one)
        words = next(site for site in sites if site.kind == "embedding")
        moved = tracing.perturb(forward, [words.name])
        scalar = lambda zero: moved({words.name: zero}, parameters, one)[TARGET]
        return jax.value_and_grad(scalar)(jnp.zeros(words.shape))

    relevance = functools.partial(xv.attention_relevance(forward), target=TARGET)
    functions = {
        "forward": forward,
        "rollout": xv.attention_rollout(forward),
        "statistics": xv.attention_statistics(forward),
        "forward + backward": gradient,
        "relevance": relevance,
    }

    def call(name):
        function = functions[name]
        batched = jax.vmap(function, in_axes=(None, 0))
        if name in BACKWARD and size.at_once < size.batch:
            batched = lambda parameters, x: jax.lax.map(
                functools.partial(function, parameters), x, batch_size=size.at_once
            )
        program = jax.jit(batched).lower(parameters, x).compile()
        return lambda: jax.block_until_ready(program(parameters, x))

    return {name: call(name) for name in names}


def theirs(argument: dict) -> dict[str, Callable]:
    """The usual code: eager maps, and products of whole matrices, in torch."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    size = size_of(argument)
    own = xv.models.load(argument["folder"], scan=True)
    x = torch.from_numpy(inputs(size, own.config))
    if size.kind == "image":
        x, auto = x.permute(0, 3, 1, 2), transformers.AutoModelForImageClassification
    else:
        x, auto = x.long(), transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(argument["folder"], attn_implementation="eager")
    model = model.eval().requires_grad_(False)
    identity = torch.eye(size.tokens)

    def rollout(x):
        with torch.no_grad():
            maps = model(x, output_attentions=True).attentions
            product = identity
            for each in maps:
                product = (each.mean(dim=1) + identity) / 2 @ product
            return product[:, 0].numpy()

    def relevance(x):
        embeddings = model.base_model.embeddings
        hidden = []
        handle = embeddings.register_forward_hook(
            lambda *a: hidden.append(a[2].requires_grad_()) or hidden[-1]
        )
        out = model(x, output_attentions=True)
        handle.remove()
        chosen = out.logits[:, TARGET].sum()
        slopes = torch.autograd.grad(chosen, out.attentions)
        product = identity.expand(len(x), -1, -1)
        for each, slope in zip(out.attentions, slopes, strict=True):
            product = product + (each * slope).relu().mean(dim=1) @ product
        return product[:, 0].detach().numpy()

    def call(function):
        return lambda: np.concatenate([function(x) for x in x.split(size.at_once)])

    return {"torch rollout": call(rollout), "torch relevance": call(relevance)}


def size_of(argument: dict) -> Size:
    return Size(argument["kind"], argument["length"], argument["batch"])


def times(argument: dict) -> dict:
    """Of each method, seconds in turns with its floor and its peer, and the error."""
    size = size_of(argument)
    calls = ours(argument, [*FLOORS, *dict.fromkeys(FLOORS.values())])
    calls |= theirs(argument) if argument["peer"] else {}
    clock = time.perf_counter if argument["clock"] == "wall" else time.process_time

    def turns(*names: str) -> list[list[float]]:
        found = []
        # The first turn is not counted, as it comes after other calls.
        first = 0 if size.huge else 1
        for _ in range(argument["rounds"] + first):
            found.append([])
            for name in names:
                if size.huge and name not in BACKWARD:
                    calls[name]()
                begin = clock()
                answers[name] = calls[name]()
                found[-1].append(clock() - begin)
        return [list(each) for each in zip(*found[first:], strict=True)]

    found, answers = {}, {}
    for name, floor in FLOORS.items():
        base, own = turns(floor, name)
        found[name] = {"own": own, "floor": base}
        if argument["peer"] and f"torch {name}" in calls:
            beside, peer = turns(name, f"torch {name}")
            mine, other = np.asarray(answers[name].scores), answers[f"torch {name}"]
            error = float(np.abs(mine - other).max() / other.max())
            found[name] |= {"beside": beside, "peer": peer, "error": error}
        answers.clear()
    return found


def memory(argument: dict) -> int:
    """Peak bytes of one call, after a first where that takes no minute."""
    name = argument["method"]
    peer = name.startswith("torch")
    call = theirs(argument)[name] if peer else ours(argument, [name])[name]
    if not size_of(argument).large:
        call()
    before = reset_peak()
    call()
    return max(status("VmHWM") - before, 0)


TASKS = {"times": times, "memory": memory}

if __name__ == "__main__":
    main()
