#!/bin/bash
# peft 0.21.2 with transformers 5.23.0: "all-linear" on Mixtral, whose experts are two 3-dimensional parameters there.
# Guessed: q, k, v and o get adapters, the experts nothing, as none of them is a linear layer.
# Seen: router and experts get adapters as well, and the experts' first matrix with twice the rank: r = 2 makes
# lora_A of 4 experts x rank 4 for gate_up_proj, of 4 x 2 for down_proj. (torch is a large download where no CPU build is found.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet peft==0.21.2 transformers==5.23.0 torch==2.13.0
TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'END'
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

config = MixtralConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4,
)
model = get_peft_model(MixtralForCausalLM(config), LoraConfig(r=2, target_modules="all-linear"))
shapes = {}
for name, parameter in model.named_parameters():
    if "lora_A" in name:
        shapes[name.partition("layers.0.")[2].partition(".lora_A")[0]] = tuple(parameter.shape)
for name, shape in shapes.items():
    print(name, shape)
assert shapes["self_attn.q_proj"] == (2, 16) and shapes["mlp.gate"] == (2, 16)
assert shapes["mlp.experts.base_layer"] == (4 * 4, 16)  # gate_up_proj, inside the wrapper of down_proj
assert shapes["mlp.experts"] == (4 * 2, 24)
END
