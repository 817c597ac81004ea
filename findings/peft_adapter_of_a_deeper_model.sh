#!/bin/bash
# peft 0.21.2: an adapter of a model of four layers is loaded onto one of two, and one of two layers onto one of four.
# Guessed: both warn: half of the adapter's file, or half of the model, was left out.
# Seen: only the second does. from_pretrained drops the surplus half of a file without a word; load_adapter returns the names
# among its unexpected_keys, but does not warn either.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet peft==0.21.2 transformers==5.23.0 torch==2.13.0
TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'END'
import warnings

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

def base(layers):
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_hidden_layers=layers, **size))

def warned(layers, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base(layers), folder)
    texts = [str(warning.message) for warning in caught if warning.category is not FutureWarning]
    print(f"adapter of {folder} layers on a model of {layers}:", [text[:58] for text in texts] or "no warning")
    return model, bool(texts)

for layers in (2, 4):
    get_peft_model(base(layers), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(layers))
assert warned(2, "2")[1] is False
assert warned(4, "2")[1] is True
model, said = warned(2, "4")
assert said is False
result = model.load_adapter("4", "again")
print("load_adapter returns", len(result.unexpected_keys), "unexpected keys of 8")
assert not result.missing_keys and len(result.unexpected_keys) == 4
END
