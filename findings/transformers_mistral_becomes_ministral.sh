#!/bin/bash
# transformers 5.23.0: a config.json with model_type "mistral" and a key layer_types is read as another class.
# Guessed: MistralConfig, which ignores the key as it does every other that it does not have.
# Seen: AutoConfig gives MinistralConfig, with a window in some layers only, where MistralConfig has it in all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0
TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'END'
import json
from transformers import AutoConfig, MistralConfig

MistralConfig(num_hidden_layers=2, sliding_window=8).save_pretrained(".")
with open("config.json") as file:
    config = json.load(file)
classes = [type(AutoConfig.from_pretrained(".")).__name__]
with open("config.json", "w") as file:
    json.dump(config | {"layer_types": ["full_attention", "sliding_attention"]}, file)
classes.append(type(AutoConfig.from_pretrained(".")).__name__)
classes.append(type(MistralConfig.from_pretrained(".")).__name__)
print(config["model_type"], "read by AutoConfig:", classes[0], " with layer_types:", classes[1], " by name:", classes[2])
assert classes == ["MistralConfig", "MinistralConfig", "MistralConfig"]
END
