"""Writes `truth/tracr_*.npz`: transformers compiled from programs, and their truth.

In an environment of its own:

    pip install tracr-pypi==1.0.0 dm-haiku==0.0.17 jax==0.10.2
    python tests/comparison/make_tracr.py

Each file holds the weights that tracr (Lindner et al., 2023, arXiv 2301.05062)
compiles from one program for sequences of five out of three tokens, every such
sequence, the model's logits there, and the exact Shapley values of each output: the
game shows some of the tokens and draws the others uniformly.
"""

import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

LENGTH = 5
FOLDER = Path(__file__).parent / "truth"

PROGRAMS = {
    "reverse": (lib.make_reverse(rasp.tokens), ["a", "b", "c"]),
    "frac_prevs": (
        lib.make_frac_prevs(rasp.numerical(rasp.tokens == "x")),
        ["x", "y", "z"],
    ),
    "pair_balance": (lib.make_pair_balance(rasp.tokens, "(", ")"), ["(", ")", "a"]),
    "hist": (lib.make_hist(), ["a", "b", "c"]),
    "sort": (
        lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=LENGTH, min_key=1),
        [1, 2, 3],
    ),
}


def weights(assembled) -> dict[str, np.ndarray]:
    """Weights with layers stacked and heads apart; tracr's biases are all zero."""
    params = jax.device_get(assembled.params)
    layers = 1 + max(
        int(name.split("layer_")[1].split("/")[0]) for name in params if "layer" in name
    )
    for name, module in params.items():
        assert not np.any(module.get("b", 0)), name
    heads = params["transformer/layer_0/attn/query"]["w"].shape[1]
    stacked = {}
    for name in ("attn/query", "attn/key", "attn/value", "attn/linear"):
        stacked[name.split("/")[1]] = [
            params[f"transformer/layer_{i}/{name}"]["w"] for i in range(layers)
        ]
    for name, short in (("mlp/linear_1", "up"), ("mlp/linear_2", "down")):
        stacked[short] = [
            params[f"transformer/layer_{i}/{name}"]["w"] for i in range(layers)
        ]
    found = {name: np.stack(each) for name, each in stacked.items()}
    size = key_size(assembled)
    shape = (layers, -1, heads // size, size)
    for name in ("query", "key", "value"):
        found[name] = found[name].reshape(shape)
    found["linear"] = found["linear"].reshape(layers, heads // size, size, -1)
    found["token_embed"] = params["token_embed"]["embeddings"]
    found["pos_embed"] = params["pos_embed"]["embeddings"]
    return {name: np.asarray(each, np.float32) for name, each in found.items()}


def key_size(assembled) -> int:
    return assembled.model_config.key_size


def unembedding(assembled, program, size: int) -> np.ndarray:
    """The directions of the residual stream that hold the output."""
    name = program.label
    rows = [
        index
        for index, label in enumerate(assembled.residual_labels)
        if label == name or label.startswith(f"{name}:")
    ]
    return np.eye(size, dtype=np.float32)[rows].T


def shapley(values: np.ndarray) -> np.ndarray:
    """Of `values [V] * n + [...]`, the game of shown tokens, `[V ** n, ..., n]`."""
    vocabulary, shape = values.shape[0], values.shape[:LENGTH]
    found = np.zeros((*values.shape, LENGTH))
    mean = {}
    for size in range(LENGTH + 1):
        for shown in itertools.combinations(range(LENGTH), size):
            hidden = tuple(axis for axis in range(LENGTH) if axis not in shown)
            each = values.mean(axis=hidden, keepdims=True)
            mean[shown] = np.broadcast_to(each, values.shape)
    for player in range(LENGTH):
        for shown, value in mean.items():
            if player in shown:
                continue
            joined = tuple(sorted((*shown, player)))
            share = 1 / (LENGTH * math.comb(LENGTH - 1, len(shown)))
            found[..., player] += share * (mean[joined] - value)
    assert shape == (vocabulary,) * LENGTH
    return found.reshape(vocabulary**LENGTH, *values.shape[LENGTH:], LENGTH)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (program, vocabulary) in PROGRAMS.items():
        assembled = compiling.compile_rasp_to_model(
            program, set(vocabulary), max_seq_len=LENGTH, compiler_bos="bos"
        )
        inputs = list(itertools.product(vocabulary, repeat=LENGTH))
        encode = assembled.input_encoder.encode
        tokens = np.array([encode(["bos", *each]) for each in inputs], np.int32)
        output = assembled.forward(assembled.params, jnp.asarray(tokens))
        residuals = np.asarray(output.transformer_output.output, np.float32)
        head = unembedding(assembled, program, residuals.shape[-1])
        logits = (residuals @ head)[:, 1:]
        decoded = np.asarray(output.unembedded_output)[:, 1:]
        categorical = head.shape[1] > 1
        said = logits.argmax(axis=-1) if categorical else logits[..., 0]
        np.testing.assert_allclose(said, decoded, atol=1e-5)
        for given in inputs[::20]:
            got = assembled.apply(["bos", *given]).decoded[1:]
            for one, wanted in zip(got, program(list(given)), strict=True):
                assert one == wanted or abs(one - wanted) < 1e-2, (name, given)
        chosen = said.astype(int) if categorical else np.zeros(said.shape, int)
        cube = logits.reshape(*(len(vocabulary),) * LENGTH, LENGTH, -1)
        each = shapley(cube.astype(np.float64))
        rows = np.arange(len(inputs))[:, None]
        values = each[rows, np.arange(LENGTH), chosen]
        np.savez_compressed(
            FOLDER / f"tracr_{name}.npz",
            allow_pickle=False,
            **weights(assembled),
            head=head,
            tokens=tokens,
            logits=logits,
            shapley=values.astype(np.float32),
        )
        print(name, {k: v.shape for k, v in weights(assembled).items()}, head.shape)


if __name__ == "__main__":
    main()
