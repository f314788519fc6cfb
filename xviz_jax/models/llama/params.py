"""Where the parameters of Llama and kin are in a published checkpoint."""

from collections.abc import Mapping as MappingType
from typing import Any

from xviz_jax.models import settings
from xviz_jax.models.llama.modeling import UNBOUNDED, Config
from xviz_jax.models.llama.rope import Rope
from xviz_jax.models.mapping import Mapping, Source, linear, norm

_HEADS = {
    "Model": None,
    "ForCausalLM": "causal_lm",
    "ForSequenceClassification": "sequence",
}
_NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_LAYER = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def configure(raw: MappingType[str, Any]) -> Config:
    """Reads `config.json`, with transformers' defaults for what it does not say.

    Raises:
      ValueError: If it asks for something that is not implemented.
    """
    kind = raw["model_type"]
    known = {_NAMES[kind] + suffix: head for suffix, head in _HEADS.items()}
    head = known[settings.architecture(raw, known)]
    width = settings.integer(raw, "hidden_size")
    heads = settings.integer(raw, "num_attention_heads")
    key_heads = settings.integer(raw, "num_key_value_heads", heads)
    if heads % key_heads:
        raise ValueError(f"{key_heads} key heads do not divide {heads} query heads")
    if raw.get("head_dim") is None and width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    head_width = settings.integer(raw, "head_dim", width // heads)
    if head_width % 2:
        raise ValueError(f"rotary positions need an even head width, got {head_width}")
    biased = settings.flag(raw, "attention_bias", False)
    depth = settings.integer(raw, "num_hidden_layers")
    return Config(
        vocabulary=settings.integer(raw, "vocab_size"),
        width=width,
        depth=depth,
        heads=heads,
        key_heads=key_heads,
        head_width=head_width,
        hidden=settings.integer(raw, "intermediate_size"),
        activation=settings.activation(raw, "hidden_act", "silu"),
        epsilon=settings.number(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw),
        qkv_bias=kind == "qwen2" or biased,
        out_bias=kind != "qwen2" and biased,
        mlp_bias=settings.flag(raw, "mlp_bias", False),
        qk_norm=kind == "qwen3",
        windows=_windows(raw, depth),
        head=head,
        classes=settings.classes(raw),
        tied=settings.flag(raw, "tie_word_embeddings", False),
    )


def _rope(raw: MappingType[str, Any]) -> Rope:
    """Rotary positions, as transformers 4 or 5 writes them down."""
    said = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(said, dict):
        raise ValueError(f"the rotary positions of config.json are {said!r}")
    said = {"rope_theta": raw.get("rope_theta"), **said}
    kind = said.get("rope_type") or said.get("type") or "default"
    settings.refuse({**raw, **said}, {"partial_rotary_factor": 1.0})
    theta = settings.number(said, "rope_theta", 10000.0)
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=settings.number(said, "factor"))
    if kind == "llama3":
        length = "original_max_position_embeddings"
        return Rope(
            theta=theta,
            kind=kind,
            factor=settings.number(said, "factor"),
            low=settings.number(said, "low_freq_factor"),
            high=settings.number(said, "high_freq_factor"),
            original=settings.integer(said, length),
        )
    raise ValueError(
        f"rotary positions of the kind {kind!r} are not read; 'default', 'linear' and "
        "'llama3' are"
    )


def _windows(raw: MappingType[str, Any], depth: int) -> tuple[int, ...] | None:
    """How far each layer sees."""
    kind, width = raw["model_type"], raw.get("sliding_window")
    qwen = kind in ("qwen2", "qwen3")
    if kind == "llama" or width is None or (qwen and not raw.get("use_sliding_window")):
        return None
    width = settings.integer(raw, "sliding_window")
    first = settings.integer(raw, "max_window_layers", 28) if qwen else 0
    said = raw.get("layer_types")
    if said is None:
        full = ["full_attention"] * min(first, depth)
        said = full + ["sliding_attention"] * (depth - len(full))
    reach = {"full_attention": UNBOUNDED, "sliding_attention": width}
    if len(said) != depth or not reach.keys() >= set(said):
        raise ValueError(f"`layer_types` in config.json is {said} for {depth} layers")
    return tuple(reach[each] for each in said)


def mapping(config: Config) -> Mapping:
    """The tensors of `save_pretrained`."""
    layer, name = "layers/{layer}", "layers.{layer}"
    biased = {
        "attention/query": config.qkv_bias,
        "attention/key": config.qkv_bias,
        "attention/value": config.qkv_bias,
        "attention/out": config.out_bias,
    }
    tensors: dict[str, str | Source] = {"words/embedding": "embed_tokens.weight"}
    for path, part in _LAYER.items():
        bias = biased.get(path, config.mlp_bias)
        tensors |= linear(f"{layer}/{path}", f"{name}.{part}", bias=bias)
    norms = {
        f"{layer}/attention_norm": f"{name}.input_layernorm",
        f"{layer}/mlp_norm": f"{name}.post_attention_layernorm",
        "norm": "norm",
    }
    if config.qk_norm:
        norms[f"{layer}/attention/query_norm"] = f"{name}.self_attn.q_norm"
        norms[f"{layer}/attention/key_norm"] = f"{name}.self_attn.k_norm"
    for path, part in norms.items():
        tensors |= norm(path, part, bias=False)
    copies = {}
    if config.head == "sequence":
        tensors |= linear("head", "score", bias=False)
    elif config.head == "causal_lm" and not config.tied:
        tensors |= linear("head", "lm_head", bias=False)
    else:
        copies["lm_head.weight"] = "embed_tokens.weight"
    return Mapping(
        depths={"layers": config.depth},
        tensors=tensors,
        renames={r"^model\.": ""},
        ignored={r"rotary_emb\.inv_freq$": "a buffer, counted anew"},
        copies=copies,
    )
