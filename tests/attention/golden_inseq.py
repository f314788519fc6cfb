# pyright: reportMissingImports=false
"""Attention and value zeroing as inseq has them, for tests/attention/test_goldens.py.

    pip install inseq==0.7.1 torch==2.14.1 transformers==4.53.3 safetensors
    python tests/attention/golden_inseq.py

Runs the tiny GPT-2 of tests/models/goldens over its own words, with eager attention;
the logits are stored too. Writes `goldens/inseq.npz`: maps `[query, key, layer, head]`
and scores `[query, key, layer]`, of every position with a word after it.
"""

from pathlib import Path

import inseq
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).parent
MODEL = HERE.parent / "models" / "goldens" / "text" / "gpt2_lm"


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Of words `w00`, `w01`, ..., by their numbers."""
    words = models.WordLevel({f"w{i:02}": i for i in range(size)}, unk_token="w00")
    plain = Tokenizer(words)
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "w00", "bos_token": "w01", "eos_token": "w02"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **special)


def main() -> None:
    model = GPT2LMHeadModel.from_pretrained(MODEL, attn_implementation="eager").eval()
    golden = np.load(MODEL / "golden.npz")
    tokens = golden["tokens"][: int(golden["mask"].sum())].astype(np.int64)
    assert tokens.min() > 2
    # What newer transformers call the variable that holds the values.
    names = {"self_attention_module": "attn", "value_vector": "value_states"}
    inseq.register_model_config(
        "GPT2LMHeadModel", names, overwrite=True, allow_partial=True
    )
    text = " ".join(f"w{i:02}" for i in (*tokens, tokens[0]))
    found = {"logits": model(torch.tensor(tokens)[None]).logits[0].detach().numpy()}
    # Transformers' last hidden state is of the final norm, which is no layer's.
    model.transformer.ln_f = torch.nn.Identity()
    model = model.double()
    for method in ("attention", "value_zeroing"):
        explainer = inseq.load_model(
            model, method, tokenizer=tokenizer(model.config.vocab_size)
        )
        done = explainer.attribute(text.split()[0], text, show_progress=False)
        scores = done.sequence_attributions[0].target_attributions
        scores = np.nan_to_num(scores.numpy())[: len(tokens)]
        found[method] = np.swapaxes(scores, 0, 1).astype(np.float32)
    np.savez(HERE / "goldens" / "inseq.npz", allow_pickle=False, **found)


if __name__ == "__main__":
    main()
