#!/bin/bash
# peft 0.21.2: two keys of rank_pattern fit a layer, one by its last name alone and one by its whole path.
# Guessed: the one that says more decides, wherever it stands, so that a general rank can come first and its exceptions after it.
# Seen: the first that fits in the order of the dict decides: {"q_proj": 8, "layers.0.self_attn.q_proj": 3} is 8 in every layer,
# and nobody is told that the second key did nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet peft==0.21.2 transformers==5.23.0 torch==2.13.0
TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'END'
import warnings
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)

def ranks(pattern):
    lora = LoraConfig(r=2, target_modules=["q_proj"], rank_pattern=pattern)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(LlamaForCausalLM(config), lora)
    found = [layer.self_attn.q_proj.r["default"] for layer in model.base_model.model.model.layers]
    print(pattern, "gives ranks", *found)
    assert not [warning for warning in caught if "rank_pattern" in str(warning.message)]
    return found

assert ranks({"q_proj": 8, "layers.0.self_attn.q_proj": 3}) == [8, 8]
assert ranks({"layers.0.self_attn.q_proj": 3, "q_proj": 8}) == [3, 8]
END
