"""Llama-type GGUF files: their tensors under the names of safetensors files.

Weights are dequantised by the package `gguf`, llama.cpp's own.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from xviz_jax.models.checkpoint import Checkpoint, Tensor
from xviz_jax.models.extra import require
from xviz_jax.models.gguf_header import Entry, Header, read_header

# `general.architecture`: `model_type`, and the class of its language models.
_KINDS = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_INTEGERS = ("I8", "I16", "I32", "I64")


def open_gguf(file: Path) -> Checkpoint:
    """Reads the metadata of a GGUF file, as a checkpoint whose weights are not read.

    Raises:
      ValueError: If the file is malformed, or of an architecture that is not read.
    """
    header = read_header(file)
    config = _config(header, file)
    heads = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }
    tensors = {}
    for short, entry in header.tensors.items():
        name = _name(short)
        part = name.rpartition(".")[0].partition("layers.")[2].partition(".")[2]
        # Llama's own files pair features next to each other; Qwen's do not.
        count = heads.get(part) if config["model_type"] == "llama" else None
        tensors[name] = _tensor(file, header.data, short, entry, count)
    return Checkpoint(file, config, tensors)


def _config(header: Header, file: Path) -> dict[str, Any]:
    kind = header.fields.get("general.architecture")
    if kind not in _KINDS:
        raise ValueError(
            f"{file.name} holds the architecture {kind!r}; read are {list(_KINDS)}"
        )
    get = lambda key, default=None: header.fields.get(f"{kind}.{key}", default)
    heads, width = get("attention.head_count"), get("embedding_length")
    odd = [
        key
        for key in ("expert_count", "attention.sliding_window")
        if get(key) not in (None, 0)
    ]
    scaling = get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        odd.append(f"rope.scaling.type = {scaling}")
    head_width = get("attention.key_length") or (width // heads if heads else None)
    if get("rope.dimension_count", head_width) != head_width:
        odd.append("rope.dimension_count")
    if odd:
        raise ValueError(f"{file.name} asks for {odd}, which is not read")
    words = header.tensors.get("token_embd.weight")
    rope: dict[str, Any] = {"rope_theta": get("rope.freq_base", 10000.0)}
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    return {
        "model_type": kind,
        "architectures": [_KINDS[kind]],
        "vocab_size": words.shape[0] if words is not None else None,
        "hidden_size": width,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_width,
        "intermediate_size": get("feed_forward_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }


def _name(name: str) -> str:
    """The name that safetensors files have for a tensor."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{_LAYER_NAMES.get(part, part)}.{kind}"
    return f"{_NAMES.get(stem, stem)}.{kind}"


def _tensor(
    file: Path, data: np.ndarray, name: str, entry: Entry, heads: int | None
) -> Tensor:
    gguf = require("gguf")
    try:
        kind = gguf.GGMLQuantizationType(entry.kind)
        stored = gguf.quant_shape_to_byte_shape(entry.shape, kind)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{name!r} of {file.name} is not understood: {error}"
        ) from None
    end = entry.begin + math.prod(stored)
    if end > data.size:
        raise ValueError(
            f"{file.name} is truncated: {name!r} ends at {end}, the file at {data.size}"
        )
    # Each must divide the rows into pairs of halves.
    if heads is not None and entry.shape[0] % (2 * heads):
        raise ValueError(f"{name!r} has {entry.shape[0]} rows for {heads} heads")
    decode = partial(_decode, kind, entry.shape, heads)
    return Tensor(
        entry.shape,
        kind.name,
        lambda: data[entry.begin : end].reshape(stored),
        None if kind.name in _INTEGERS else decode,
    )


def _decode(
    kind: Any, shape: tuple[int, ...], heads: int | None, stored: np.ndarray
) -> np.ndarray:
    found = require("gguf").dequantize(stored, kind).reshape(shape)
    if heads is None:
        return found
    # Features 2i and 2i + 1 of a head become i and i + half.
    paired = found.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    return paired.swapaxes(1, 2).reshape(shape)
