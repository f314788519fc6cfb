"""What a configuration asks for is read as published, or refused by name."""

import json
from pathlib import Path

import pytest

from xviz_jax.models import bert, registry
from xviz_jax.models.llama.modeling import UNBOUNDED
from xviz_jax.models.llama.rope import Rope

GOLDENS = Path(__file__).parent / "goldens" / "text"


def configured(name, **settings):
    raw = json.loads((GOLDENS / name / "config.json").read_text()) | settings
    return registry.find(raw).configure(raw)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "only 'absolute' is read",
        ),
        ("bert", {"is_decoder": True}, "only False is read"),
        ("bert", {"tie_word_embeddings": "yes"}, "is 'yes'; read are"),
        (
            "bert",
            {"pooling": {"pooling_mode_max_tokens": True}},
            "max_tokens.* is read",
        ),
        ("gpt2_lm", {"scale_attn_by_inverse_layer_idx": True}, "only False is read"),
        ("llama_lm", {"num_key_value_heads": 3}, "3 key heads do not divide 4"),
        ("llama_lm", {"head_dim": 3}, "even head width, got 3"),
        ("llama_lm", {"head_dim": None, "hidden_size": 9}, "4 heads do not divide"),
        ("llama_lm", {"rope_parameters": {"rope_type": "yarn"}}, "kind 'yarn' are not"),
        ("llama_lm", {"rope_parameters": [1]}, r"config.json are \[1\]"),
        ("llama_lm", {"partial_rotary_factor": 0.5}, "only 1.0 is read"),
        ("llama_lm", {"hidden_size": None}, "`hidden_size` .* got None"),
        ("qwen2_lm", {"layer_types": ["full_attention"]}, "for 2 layers"),
        ("qwen2_lm", {"layer_types": ["linear_attention"] * 2}, "for 2 layers"),
    ],
)
def test_what_is_not_implemented_is_refused(name, settings, said):
    with pytest.raises(ValueError, match=said):
        configured(name, **settings)


def test_rotary_positions_of_transformers_4_and_5():
    four = {"rope_parameters": None, "rope_theta": 1e5}
    assert configured("llama", **four).rope == Rope(theta=1e5)
    scaled = {"type": "linear", "factor": 2.0}
    rope = configured("llama", **four, rope_scaling=scaled).rope
    assert (rope.kind, rope.factor, rope.theta) == ("linear", 2.0, 1e5)


def test_windows():
    assert configured("llama", sliding_window=3).windows is None
    assert configured("mistral_lm").windows == (3, 3)
    assert configured("mistral_lm", sliding_window=None).windows is None
    assert configured("qwen2_lm", layer_types=None).windows == (UNBOUNDED, 2)
    assert configured("qwen2_lm", use_sliding_window=False).windows is None


def test_what_stands_for_a_text():
    assert configured("bert").pooling == "pooler"
    assert configured("distilbert").pooling == "first"
    mean = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    config = configured("bert", pooling=mean)
    assert (config.pooling, config.pooler) == ("mean", None)
    with pytest.raises(ValueError, match=r"one of \('mean', 'first'\), got 'pooler'"):
        bert.output(config, pooling="pooler")
    with pytest.raises(ValueError, match="'tokens' wants a `position`"):
        bert.output(configured("bert_tokens"))
    with pytest.raises(ValueError, match="'sequence' takes no `position`"):
        bert.output(configured("bert_sequence"), position=1)
    with pytest.raises(ValueError, match="'sequence' takes no `pooling`"):
        bert.output(configured("bert_sequence"), pooling="mean")
