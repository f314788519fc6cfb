"""A GGUF file is the same model as the safetensors it was made from."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import xviz_jax as xv
from xviz_jax.models.gguf import _LAYER_NAMES, _NAMES

GOLDENS = Path(__file__).parent / "goldens" / "text"
TOKENS = ["<pad>", "<s>", "a", "b", "ab", "\u0120", "\u0120a", "1", "2", "!"]


def write(path, name, *, kind="llama", without=(), tokenizer="gpt2", **settings):
    """Writes a golden model as GGUF, its queries and keys laid out as `kind` has."""
    tensors = load_file(GOLDENS / name / "model.safetensors")
    made = gguf.GGUFWriter(path, kind)
    made.add_block_count(2)
    made.add_embedding_length(8)
    made.add_feed_forward_length(12)
    made.add_head_count(4)
    made.add_head_count_kv(2)
    made.add_key_length(4)
    made.add_layer_norm_rms_eps(1e-6)
    made.add_rope_freq_base(10000.0)
    for key, value in settings.items():
        if isinstance(value, str):
            made.add_string(f"{kind}.{key}", value)
        else:
            made.add_uint32(f"{kind}.{key}", value)
    made.add_tokenizer_model(tokenizer)
    made.add_tokenizer_pre("smollm")
    made.add_token_list(TOKENS)
    made.add_token_merges(["a b", "\u0120 a"])
    made.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    made.add_bos_token_id(1)
    made.add_add_bos_token(True)
    made.add_pad_token_id(0)
    parts = {there: here for here, there in (_NAMES | _LAYER_NAMES).items()}
    for title, value in tensors.items():
        stem, _, end = title.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            short = f"blk.{layer}.{parts[part]}"
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
            if heads and kind == "llama":
                value = (
                    value.reshape(heads, 2, 2, -1).swapaxes(1, 2).reshape(value.shape)
                )
        else:
            short = parts[stem]
        if short not in without:
            made.add_tensor(f"{short}.{end}", np.ascontiguousarray(value))
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    return path


def parameters(model):
    return nnx.to_pure_dict(nnx.state(model.module))


@pytest.mark.parametrize(
    ("name", "kind"), [("llama_tied", "llama"), ("qwen3_lm", "qwen3")]
)
def test_the_same_parameters(name, kind, tmp_path):
    write(tmp_path / "model.gguf", name, kind=kind)
    packed, plain = xv.models.load(tmp_path), xv.models.load(GOLDENS / name)
    assert packed.config.tied == plain.config.tied
    assert packed.config.rope == plain.config.rope
    assert packed.gives == "words"
    wanted = nnx.to_flat_state(nnx.state(plain.module))
    found = dict(nnx.to_flat_state(nnx.state(packed.module)))
    assert len(found) == len(wanted)
    for path, leaf in wanted:
        np.testing.assert_array_equal(found[path][...], leaf[...], err_msg=str(path))


def test_its_tokenizer(tmp_path):
    encode = xv.models.text(write(tmp_path / "model.gguf", "llama_tied"))
    found = encode("ab a12!")
    assert found.tokens == ("<s>", "ab", "\u0120a", "1", "2", "!")
    assert found.offsets[2:4].tolist() == [[3, 4], [4, 5]]
    assert found.parts.tolist() == [-1, 0, 0, 0, 0, 0]
    assert encode.decode(found.ids) == "<s>ab a12!"
    write(tmp_path / "other.gguf", "llama_tied", tokenizer="llama")
    with pytest.raises(ValueError, match=r"'llama' split as 'smollm'.* beside it"):
        xv.models.text(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "mamba"}, "holds the architecture 'mamba'"),
        ({"expert_count": 4}, r"asks for \['expert_count'\]"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type = yarn"),
        ({"without": ("blk.1.ffn_up",)}, "missing tensors: layers.1.mlp.up_proj"),
    ],
)
def test_what_is_not_read(options, said, tmp_path):
    write(tmp_path / "model.gguf", "llama_tied", **options)
    with pytest.raises(ValueError, match=said):
        xv.models.load(tmp_path)


def test_bad_files(tmp_path):
    path = write(tmp_path / "model.gguf", "llama_tied")
    data = path.read_bytes()
    for kept in (data[: len(data) // 2], data[:-400], b"", b"x" * 99):
        path.write_bytes(kept)
        with pytest.raises(ValueError, match=r"model.gguf is truncated"):
            xv.models.load(path)
    path.with_name("other.gguf").write_bytes(data)
    with pytest.raises(ValueError, match="several GGUF files"):
        xv.models.load(tmp_path)
