#!/bin/bash
# transformers 5.23.0 checks the types of a config's fields, and not all alike.
# Guessed: a whole number is a number wherever a decimal one is; a head_dim that is given makes hidden_size free.
# Seen: rms_norm_eps = 1 is refused, attention_dropout = 0 and rope_theta = 10000 are taken; hidden_size 100 with 3 heads is
# refused although head_dim says 32 (4.57.1 reads both).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0
TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'END'
from transformers import LlamaConfig

def verdict(**fields):
    try:
        LlamaConfig(**fields)
        return "taken"
    except Exception as error:
        return "refused: " + str(error).strip().splitlines()[-1].strip()

cases = [
    {"rms_norm_eps": 1},
    {"attention_dropout": 0},
    {"rope_theta": 10000},
    {"hidden_size": 100, "num_attention_heads": 3, "head_dim": 32},
]
verdicts = [verdict(**case) for case in cases]
for case, said in zip(cases, verdicts):
    print(case, said)
assert [said[:7] for said in verdicts] == ["refused", "taken", "taken", "refused"]
END
python3 -m venv old
old/bin/pip install --quiet transformers==4.57.1
TRANSFORMERS_VERBOSITY=error old/bin/python - <<'END'
from transformers import LlamaConfig

assert LlamaConfig(rms_norm_eps=1).rms_norm_eps == 1
assert LlamaConfig(hidden_size=100, num_attention_heads=3, head_dim=32).head_dim == 32
print("4.57.1 takes all four")
END
