#!/bin/bash
# peft 0.21.2: load_adapter under the name of an adapter that is there, to go through several checkpoints with one model.
# Guessed: the new adapter takes the place of the old one, or the name is refused.
# Seen: the new weights with the old lora_alpha: alpha 64 loaded over alpha 4 acts at a sixteenth of its strength. No warning,
# "All keys matched successfully", and save_pretrained writes the wrong alpha next to the right weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet peft==0.21.2 transformers==5.23.0 torch==2.13.0
TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'END'
import json
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.filterwarnings("ignore", category=FutureWarning)
size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=20, **size)

def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(config)

def save(folder, alpha):
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder)

def delta(model, name="default"):
    return model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight(name)

save("one", 4)
save("two", 64)
right = delta(PeftModel.from_pretrained(base(), "two"))
model = PeftModel.from_pretrained(base(), "one")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = model.load_adapter("two", "default")
assert not [warning for warning in caught if warning.category is not FutureWarning]
factor = (delta(model) / right).median().item()
print("load_adapter over it says:", result, " weight change, over the right one:", factor)
assert not result.missing_keys and not result.unexpected_keys
assert abs(factor - 4 / 64) < 1e-6
model.save_pretrained("again")
with open("again/adapter_config.json") as file:
    alpha = json.load(file)["lora_alpha"]
print("lora_alpha saved:", alpha)
assert alpha == 4
model.load_adapter("two", "another")
assert torch.equal(delta(model, "another"), right)
print("under a new name: right")
END
