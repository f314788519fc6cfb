# pyright: reportMissingImports=false
"""Rollout and relevance of transformers' own maps, for tests/attention/test_goldens.py.

    pip install torch==2.14.1 transformers==5.23.0 safetensors
    python tests/attention/golden_transformers.py

Runs tiny checkpoints of tests/models/goldens with eager attention, and multiplies out
its maps, and their gradients by autograd, in torch. Writes `goldens/NAME.npz`.
"""

from pathlib import Path

import numpy as np
import torch
import transformers as hf

HERE = Path(__file__).parent
MODELS = HERE.parent / "models" / "goldens"
# The class, and the position that is read, if the output has one for each.
CHECKPOINTS = {
    "text/bert_sequence": (hf.BertForSequenceClassification, None),
    "text/gpt2_lm": (hf.GPT2LMHeadModel, 4),
    "text/llama_lm": (hf.LlamaForCausalLM, 4),
    "vision/vit": (hf.ViTForImageClassification, None),
}
CLASS = 1


def arguments(golden) -> dict[str, torch.Tensor]:
    if "pixels" in golden:
        return {"pixel_values": torch.tensor(golden["pixels"]).permute(2, 0, 1)[None]}
    found = {
        "input_ids": torch.tensor(golden["tokens"].astype(np.int64))[None],
        "attention_mask": torch.tensor(golden["mask"].astype(np.int64))[None],
    }
    if "segments" in golden:
        segments = golden["segments"].astype(np.int64)
        found["token_type_ids"] = torch.tensor(segments)[None]
    return found


def main() -> None:
    for name, (kind, position) in CHECKPOINTS.items():
        folder = MODELS / name
        model = kind.from_pretrained(folder, attn_implementation="eager").eval()
        golden = np.load(folder / "golden.npz")
        done = model(**arguments(golden), output_attentions=True)
        logits = done.logits[0] if position is None else done.logits[0, position]
        gradients = torch.autograd.grad(logits[CLASS], done.attentions)
        size = done.attentions[0].shape[-1]
        identity = torch.eye(size, dtype=torch.float64)
        rollout, relevance = identity, identity
        for maps, gradient in zip(done.attentions, gradients, strict=True):
            maps, gradient = maps[0].double(), gradient[0].double()
            rollout = (maps.mean(dim=0) + identity) / 2 @ rollout
            kept = (gradient * maps).clamp(min=0).mean(dim=0)
            relevance = relevance + kept @ relevance
        np.savez(
            HERE / "goldens" / f"{Path(name).name}.npz",
            allow_pickle=False,
            rollout=rollout.detach().numpy(),
            relevance=relevance.detach().numpy(),
            logits=logits.detach().numpy(),
        )


if __name__ == "__main__":
    main()
