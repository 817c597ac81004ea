#!/bin/bash
# peft 0.21.2: two adapters with modules_to_save=["lm_head"], of which merge_and_unload(adapter_names=[...]) names one.
# Guessed: the result is the model with that adapter, its lm_head included.
# Seen: its LoRA weights with the lm_head of the adapter that is active: a model that nobody trained, and no warning.
# With set_adapter before it the merge is right. (Two names at once are refused because of modules_to_save.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet peft==0.21.2 transformers==5.23.0 torch==2.13.0
TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'END'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.filterwarnings("ignore", category=FutureWarning)
size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=20, tie_word_embeddings=False, **size)
tokens = torch.arange(6)[None]

def two_adapters():
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name="first")
    model.add_adapter("second", lora)
    with torch.no_grad():
        for head in model.base_model.model.lm_head.modules_to_save.values():
            head.weight.normal_()
    return model.eval()

def same(merged, want, active):
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model = two_adapters()
        model.set_adapter(active)
        result = merged(model)(tokens).logits
    assert not [warning for warning in caught if warning.category is not FutureWarning]
    return torch.allclose(result, want, atol=1e-5)

with torch.no_grad():
    model = two_adapters()
    heads = model.base_model.model.lm_head.modules_to_save
    model.set_adapter("second")
    second = model(tokens).logits
    hidden = model.base_model.model.model(tokens).last_hidden_state
    mixture = hidden @ heads["first"].weight.T

def merge_second(model):
    return model.merge_and_unload(adapter_names=["second"])

print("second named, second active, is the second adapter's model:", same(merge_second, second, "second"))
print("second named, first active, is the second adapter's model:", same(merge_second, second, "first"))
print("second named, first active, is the second's LoRA under the first's lm_head:", same(merge_second, mixture, "first"))
assert same(merge_second, second, "second")
assert not same(merge_second, second, "first")
assert same(merge_second, mixture, "first")
END
