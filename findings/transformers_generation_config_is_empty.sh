#!/bin/bash
# transformers 5.23.0: GenerationConfig() holds None for what its documentation gives defaults of, and whether a config can
# be saved depends on where it came from.
# Guessed: temperature 1.0, top_k 50, do_sample False, max_length 20; saving warns about a temperature without sampling.
# Seen: None four times (generate fills them in). GenerationConfig(temperature=0.6) is refused by save_pretrained, the same
# config read from a file is written.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0
TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'END'
import json
from transformers import GenerationConfig

config = GenerationConfig()
found = [getattr(config, name) for name in ("temperature", "top_k", "do_sample", "max_length")]
print("temperature, top_k, do_sample, max_length:", *found)
assert found == [None] * 4
with open("generation_config.json", "w") as file:
    json.dump({"temperature": 0.6, "eos_token_id": 2}, file)
config = GenerationConfig.from_pretrained(".")
assert config.temperature == 0.6
config.save_pretrained("copy")
print("read from a file: saved")
try:
    GenerationConfig(temperature=0.6, eos_token_id=2).save_pretrained("copy")
    raise SystemExit("made here: saved; this has changed")
except ValueError as error:
    print("made here:", " ".join(str(error).split())[:90])
END
