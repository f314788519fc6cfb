"""Where the parameters of BERT and kin are in a published checkpoint."""

import re
from collections.abc import Mapping as MappingType
from typing import Any

from xviz_jax.models import settings
from xviz_jax.models.bert.modeling import Config
from xviz_jax.models.mapping import Mapping, Source, linear, norm

# `architectures` of config.json: the head, after the model's own name.
_HEADS = {
    "Model": None,
    "ForMaskedLM": "masked_lm",
    "ForPreTraining": "masked_lm",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "tokens",
}
_NAMES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
_LAYER = {
    "attention/query": "encoder.layer.{layer}.attention.self.query",
    "attention/key": "encoder.layer.{layer}.attention.self.key",
    "attention/value": "encoder.layer.{layer}.attention.self.value",
    "attention/out": "encoder.layer.{layer}.attention.output.dense",
    "attention_norm": "encoder.layer.{layer}.attention.output.LayerNorm",
    "up": "encoder.layer.{layer}.intermediate.dense",
    "down": "encoder.layer.{layer}.output.dense",
    "mlp_norm": "encoder.layer.{layer}.output.LayerNorm",
}
_DISTILLED_LAYER = {
    "attention/query": "transformer.layer.{layer}.attention.q_lin",
    "attention/key": "transformer.layer.{layer}.attention.k_lin",
    "attention/value": "transformer.layer.{layer}.attention.v_lin",
    "attention/out": "transformer.layer.{layer}.attention.out_lin",
    "attention_norm": "transformer.layer.{layer}.sa_layer_norm",
    "up": "transformer.layer.{layer}.ffn.lin1",
    "down": "transformer.layer.{layer}.ffn.lin2",
    "mlp_norm": "transformer.layer.{layer}.output_layer_norm",
}
# Dense layer, norm, output table and output bias of the masked-LM heads.
_MASKED = {
    "bert": (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
        "cls.predictions.bias",
    ),
    "roberta": (
        "lm_head.dense",
        "lm_head.layer_norm",
        "lm_head.decoder",
        "lm_head.bias",
    ),
    "distilbert": (
        "vocab_transform",
        "vocab_layer_norm",
        "vocab_projector",
        "vocab_projector.bias",
    ),
}
# What reads the first token before the classifier of texts, and that classifier.
_SEQUENCE = {
    "bert": ("pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "classifier"),
}
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}


def configure(raw: MappingType[str, Any]) -> Config:
    """Reads `config.json`, with transformers' defaults for what it does not say.

    Raises:
      ValueError: If it asks for something that is not implemented.
    """
    kind = raw["model_type"]
    known = {_NAMES[kind] + suffix: head for suffix, head in _HEADS.items()}
    head = known[settings.architecture(raw, known)]
    settings.refuse(
        raw,
        {
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "add_cross_attention": False,
        },
    )
    pooling = _pooling(raw)
    common = {
        "kind": kind,
        "vocabulary": settings.integer(raw, "vocab_size", 30522),
        "positions": settings.integer(raw, "max_position_embeddings", 512),
        "head": head,
        "classes": settings.classes(raw),
        "pooling": pooling,
        "tied": settings.flag(raw, "tie_word_embeddings", True),
    }
    if kind == "distilbert":
        width = settings.integer(raw, "dim", 768)
        activation = settings.activation(raw, "activation", "gelu")
        return Config(
            **common,
            first_position=0,
            segments=0,
            width=width,
            depth=settings.integer(raw, "n_layers", 6),
            heads=settings.heads(raw, "n_heads", 12, width),
            hidden=settings.integer(raw, "hidden_dim", 3072),
            activation=activation,
            epsilon=1e-12,
            pooler="relu" if head == "sequence" else None,
            transform=activation,
        )
    # RoBERTa counts positions on from the padding token's row.
    roberta = kind == "roberta"
    first = 1 + settings.integer(raw, "pad_token_id", 1) if roberta else 0
    pooled = head == "sequence" or (head is None and pooling == "pooler")
    width = settings.integer(raw, "hidden_size", 768)
    activation = settings.activation(raw, "hidden_act", "gelu")
    return Config(
        **common,
        first_position=first,
        segments=settings.integer(raw, "type_vocab_size", 2),
        width=width,
        depth=settings.integer(raw, "num_hidden_layers", 12),
        heads=settings.heads(raw, "num_attention_heads", 12, width),
        hidden=settings.integer(raw, "intermediate_size", 3072),
        activation=activation,
        epsilon=settings.number(raw, "layer_norm_eps", 1e-12),
        pooler="tanh" if pooled else None,
        transform="gelu" if roberta else activation,
    )


def _pooling(raw: MappingType[str, Any]) -> str:
    """What stands for a text: as sentence-transformers has it, where it is there."""
    if "pooling" not in raw:
        return "first" if raw["model_type"] == "distilbert" else "pooler"
    asked = {n for n, on in raw["pooling"].items() if n.startswith("pooling_") and on}
    if len(asked) != 1 or not asked <= _POOLINGS.keys():
        raise ValueError(
            f"1_Pooling/config.json asks for {sorted(asked)}; one of "
            f"{sorted(_POOLINGS)} is read"
        )
    return _POOLINGS[asked.pop()]


def mapping(config: Config) -> Mapping:
    """The tensors of `save_pretrained`, and of the first releases."""
    tensors: dict[str, str | Source] = {
        "embeddings/words/embedding": "embeddings.word_embeddings.weight",
        "embeddings/positions/embedding": "embeddings.position_embeddings.weight",
    }
    if config.segments:
        table = "embeddings.token_type_embeddings.weight"
        tensors["embeddings/segments/embedding"] = table
    tensors |= norm("embeddings/norm", "embeddings.LayerNorm")
    layer = _DISTILLED_LAYER if config.kind == "distilbert" else _LAYER
    for path, name in layer.items():
        part = norm if path.endswith("norm") else linear
        tensors |= part(f"layers/{{layer}}/{path}", name)
    ignored = {
        r"^embeddings\.(position_ids|token_type_ids)$": "a buffer, counted anew",
        r"^cls\.seq_relationship\.": "a head for pairs of sentences",
    }
    pooler, classifier = "pooler.dense", "classifier"
    if config.head == "sequence":
        pooler, classifier = _SEQUENCE[config.kind]
    if config.pooler is not None:
        tensors |= linear("pooler", pooler)
    if config.pooler is None or pooler != "pooler.dense":
        ignored[r"^pooler\."] = "what is asked of the model does without"
    copies: dict[str, str] = {}
    if config.head == "masked_lm":
        transform, scale, table, bias = _MASKED[config.kind]
        tensors |= linear("masked_lm/transform", transform)
        tensors |= norm("masked_lm/norm", scale)
        if config.tied:
            tensors["masked_lm/bias"] = bias
            copies[f"{table}.weight"] = "embeddings.word_embeddings.weight"
            copies[f"{table}.bias"] = bias
        else:
            tensors["masked_lm/bias"] = f"{table}.bias"
            tensors |= linear("masked_lm/table", table, bias=False)
            ignored[f"^{re.escape(bias)}$"] = "the output table has its own"
    elif config.head is not None:
        tensors |= linear("classifier", classifier)
    return Mapping(
        depths={"layers": config.depth},
        tensors=tensors,
        renames={
            r"^(bert|roberta|distilbert)\.": "",
            r"\.LayerNorm\.gamma$": ".LayerNorm.weight",
            r"\.LayerNorm\.beta$": ".LayerNorm.bias",
        },
        ignored=ignored,
        copies=copies,
    )
