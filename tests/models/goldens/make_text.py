# pyright: reportMissingImports=false
"""What transformers and torch say, for tests/models/test_text_models.py.

    pip install torch==2.13.0 transformers==5.23.0 safetensors
    python tests/models/goldens/make_text.py

Writes a folder for each tiny random model: its checkpoint, and `golden.npz`. The
checkpoints are written by `save_pretrained` and read back by `from_pretrained`
before they are run.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import transformers as hf

OUT = Path(__file__).parent / "text"
LENGTH, REAL, CLASSES = 7, 5, 3
ENCODER = {
    "vocab_size": 24,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "layer_norm_eps": 1e-3,
    "num_labels": CLASSES,
}
DISTILLED = {
    "vocab_size": 24,
    "dim": 8,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 12,
    "max_position_embeddings": 10,
    "num_labels": CLASSES,
}
GPT2 = {
    "vocab_size": 24,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 10,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {
    "vocab_size": 24,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "num_labels": CLASSES,
    "pad_token_id": 0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Class, and settings.
MODELS = {
    "bert": (hf.BertModel, ENCODER),
    "bert_masked": (hf.BertForMaskedLM, ENCODER),
    "bert_untied": (
        hf.BertForMaskedLM,
        {**ENCODER, "tie_word_embeddings": False, "hidden_act": "gelu_new"},
    ),
    "bert_sequence": (hf.BertForSequenceClassification, ENCODER),
    "bert_tokens": (hf.BertForTokenClassification, ENCODER),
    "roberta": (hf.RobertaModel, {**ENCODER, "type_vocab_size": 1}),
    "roberta_masked": (hf.RobertaForMaskedLM, ENCODER),
    "roberta_sequence": (hf.RobertaForSequenceClassification, ENCODER),
    "roberta_tokens": (hf.RobertaForTokenClassification, ENCODER),
    "distilbert": (hf.DistilBertModel, DISTILLED),
    "distilbert_masked": (hf.DistilBertForMaskedLM, DISTILLED),
    "distilbert_sequence": (hf.DistilBertForSequenceClassification, DISTILLED),
    "distilbert_tokens": (hf.DistilBertForTokenClassification, DISTILLED),
    "gpt2": (hf.GPT2Model, GPT2),
    "gpt2_lm": (hf.GPT2LMHeadModel, {**GPT2, "n_inner": 12}),
    "gpt2_sequence": (
        hf.GPT2ForSequenceClassification,
        {**GPT2, "scale_attn_weights": False},
    ),
    "llama": (hf.LlamaModel, DECODER),
    "llama_lm": (
        hf.LlamaForCausalLM,
        {
            **DECODER,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LLAMA3,
        },
    ),
    # As SmolLM ties its tables.
    "llama_tied": (hf.LlamaForCausalLM, {**DECODER, "tie_word_embeddings": True}),
    "llama_sequence": (
        hf.LlamaForSequenceClassification,
        {**DECODER, "rope_parameters": LINEAR},
    ),
    "mistral_lm": (hf.MistralForCausalLM, {**DECODER, "sliding_window": 3}),
    "qwen2_lm": (
        hf.Qwen2ForCausalLM,
        {
            **DECODER,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 2,
            "max_window_layers": 1,
        },
    ),
    "qwen3_lm": (hf.Qwen3ForCausalLM, DECODER),
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draws every weight anew: as initialised, norms do nothing and biases are 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        centre = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
        centre = centre if name.endswith("weight") else 0.0
        weight.data = centre + 0.4 * drawn


def run(model, arguments: dict) -> dict[str, np.ndarray]:
    """The output, all attentions, and the gradient at the word embeddings."""
    kept = []
    table = model.get_input_embeddings()
    table.register_forward_hook(lambda module, args, out: kept.append(out))
    done = model(**arguments, output_attentions=True)
    if "logits" in done:
        output = done.logits[0]
    elif done.get("pooler_output") is not None:
        output = done.pooler_output[0]
    elif isinstance(model, hf.DistilBertModel):
        output = done.last_hidden_state[0, 0]
    else:
        output = done.last_hidden_state[0]
    # Of a token in the middle: the last ones of a decoder read from all others.
    scalar = output[..., 1] if output.ndim == 1 else output[REAL - 1, 1]
    (gradient,) = torch.autograd.grad(scalar, kept[:1])
    return {
        "output": output.detach().numpy(),
        "attentions": torch.stack(done.attentions)[:, 0].detach().numpy(),
        "gradient": gradient[0].numpy(),
    }


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, (name, (kind, settings)) in enumerate(MODELS.items()):
        config = kind.config_class(**settings)
        model = kind(config)
        randomize(model, seed)
        folder = OUT / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        model = kind.from_pretrained(folder, attn_implementation="eager").eval()
        random = np.random.default_rng(seed)
        tokens = random.integers(3, 24, LENGTH)
        tokens[REAL:] = config.pad_token_id
        mask = np.arange(LENGTH) < REAL
        arrays = {"tokens": tokens.astype(np.int32), "mask": mask}
        arguments = {"input_ids": tokens, "attention_mask": mask.astype(np.int64)}
        if kind in (hf.BertModel, hf.BertForSequenceClassification):
            arrays["segments"] = random.integers(0, 2, LENGTH).astype(np.int32)
            arguments["token_type_ids"] = arrays["segments"].astype(np.int64)
        tensors = {key: torch.tensor(value)[None] for key, value in arguments.items()}
        arrays |= run(model, tensors)
        np.savez(folder / "golden.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
