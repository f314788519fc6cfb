# pyright: reportMissingImports=false
"""What LXT, of the authors of AttnLRP, says; for tests/attention/test_goldens.py.

    pip install lxt==2.1 torch==2.14.1 transformers==4.52.4 safetensors
    python tests/attention/golden_lxt.py

Runs tiny checkpoints of tests/models/goldens whose settings that older transformers
reads alike: the logits are stored too. Writes `goldens/lxt.npz`.
"""

import importlib
from pathlib import Path

import numpy as np
import torch
from lxt.efficient import monkey_patch

HERE = Path(__file__).parent
MODELS = HERE.parent / "models" / "goldens" / "text"
CLASS = 1
# The class, and the position that is read, if the output has one for each.
CHECKPOINTS = {
    "bert_sequence": ("BertForSequenceClassification", None),
    "llama_tied": ("LlamaForCausalLM", 4),
    "qwen3_lm": ("Qwen3ForCausalLM", 4),
}


def main() -> None:
    found = {}
    for name, (kind, position) in CHECKPOINTS.items():
        family = name.split("_")[0]
        module = importlib.import_module(
            f"transformers.models.{family}.modeling_{family}"
        )
        monkey_patch(module)
        loaded = getattr(module, kind).from_pretrained(
            MODELS / name, attn_implementation="eager"
        )
        model = loaded.eval().requires_grad_(False)
        golden = np.load(MODELS / name / "golden.npz")
        integers = lambda key, golden=golden: torch.tensor(
            golden[key].astype(np.int64)
        )[None]
        words = model.get_input_embeddings()(integers("tokens")).requires_grad_()
        options = {"attention_mask": integers("mask")}
        if "segments" in golden:
            options["token_type_ids"] = integers("segments")
        logits = model(inputs_embeds=words, **options).logits[0]
        logits = logits if position is None else logits[position]
        (gradient,) = torch.autograd.grad(logits[CLASS], words)
        found[name] = (words * gradient).sum(dim=-1)[0].detach().numpy()
        found[f"{name}_logits"] = logits.detach().numpy()
    np.savez(HERE / "goldens" / "lxt.npz", allow_pickle=False, **found)


if __name__ == "__main__":
    main()
