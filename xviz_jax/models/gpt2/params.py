"""Where the parameters of GPT-2 are in a published checkpoint."""

from collections.abc import Mapping as MappingType
from typing import Any

from xviz_jax.models import settings
from xviz_jax.models.gpt2.modeling import Config
from xviz_jax.models.mapping import Mapping, Source, linear, norm

_HEADS = {
    "GPT2Model": None,
    "GPT2LMHeadModel": "causal_lm",
    "GPT2ForSequenceClassification": "sequence",
}


def configure(raw: MappingType[str, Any]) -> Config:
    """Reads `config.json`, with transformers' defaults for what it does not say.

    Raises:
      ValueError: If it asks for something that is not implemented.
    """
    settings.refuse(
        raw, {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    )
    width = settings.integer(raw, "n_embd", 768)
    return Config(
        vocabulary=settings.integer(raw, "vocab_size", 50257),
        positions=settings.integer(raw, "n_positions", 1024),
        width=width,
        depth=settings.integer(raw, "n_layer", 12),
        heads=settings.heads(raw, "n_head", 12, width),
        hidden=settings.integer(raw, "n_inner", 4 * width),
        activation=settings.activation(raw, "activation_function", "gelu_new"),
        epsilon=settings.number(raw, "layer_norm_epsilon", 1e-5),
        scaled=settings.flag(raw, "scale_attn_weights", True),
        head=_HEADS[settings.architecture(raw, _HEADS)],
        classes=settings.classes(raw),
        tied=settings.flag(raw, "tie_word_embeddings", True),
    )


def mapping(config: Config) -> Mapping:
    """The tensors of `save_pretrained`; linear maps are kept [in, out] there."""
    layer, name = "layers/{layer}", "h.{layer}"
    tensors: dict[str, str | Source] = {
        "words/embedding": "wte.weight",
        "positions/embedding": "wpe.weight",
    }
    for path, part in {
        "attention/qkv": "attn.c_attn",
        "attention/out": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }.items():
        tensors[f"{layer}/{path}/kernel"] = f"{name}.{part}.weight"
        tensors[f"{layer}/{path}/bias"] = f"{name}.{part}.bias"
    tensors |= norm(f"{layer}/attention_norm", f"{name}.ln_1")
    tensors |= norm(f"{layer}/mlp_norm", f"{name}.ln_2")
    tensors |= norm("norm", "ln_f")
    copies = {}
    if config.head == "sequence":
        tensors |= linear("head", "score", bias=False)
    elif config.head == "causal_lm" and not config.tied:
        tensors |= linear("head", "lm_head", bias=False)
    else:
        copies["lm_head.weight"] = "wte.weight"
    return Mapping(
        depths={"layers": config.depth},
        tensors=tensors,
        renames={r"^transformer\.": ""},
        ignored={r"\.attn\.(masked_)?bias$": "a buffer: which keys a query may see"},
        copies=copies,
    )
