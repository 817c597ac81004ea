#!/bin/bash
# transformers 5.23.0: DataCollatorWithFlattening joins two rows into one, with position_ids that restart; sdpa attention.
# Guessed: the model keeps the rows apart, whether it returns a cache or not: the cache is empty when the forward pass begins.
# Seen: with use_cache=True, which is a config's default, in train mode too, the second row sees the first, without a warning.
# Only use_cache=False gives the loss of the rows alone. Trainer switches the cache off; a loop of one's own must do it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0 torch==2.13.0
TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'END'
import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=20, initializer_range=0.5, attn_implementation="sdpa", **size)
model = LlamaForCausalLM(config)
rows = [[3, 4, 5, 6], [7, 8, 9, 2, 1]]
packed = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": row} for row in rows])
print("position_ids:", *packed["position_ids"][0].tolist(), " labels:", *packed["labels"][0].tolist())
assert "attention_mask" not in packed

def loss(**inputs):
    with torch.no_grad():
        return model(**inputs).loss.item()

for train in (False, True):
    model.train(train)
    alone = 0
    for row in rows:
        row = torch.tensor([row])
        alone += loss(input_ids=row, labels=row) * (row.numel() - 1) / 7
    default, without = loss(**packed), loss(**packed, use_cache=False)
    mode = "train" if train else "eval"
    print(f"{mode}: rows alone {alone:.4f}, packed {default:.4f}, packed with use_cache=False {without:.4f}")
    assert abs(alone - without) < 1e-5 < 1e-3 < abs(alone - default)
changed = torch.cat([torch.tensor([[12, 13, 14, 15]]), packed["input_ids"][:, 4:]], dim=1)
with torch.no_grad():
    for cache, differ in ((True, True), (False, False)):
        first, second = (
            model(input_ids=ids, position_ids=packed["position_ids"], use_cache=cache).logits[0, 4:]
            for ids in (packed["input_ids"], changed)
        )
        print(f"use_cache={cache}: another first row changes the second's logits by {(first - second).abs().max():.2f}")
        assert (not torch.equal(first, second)) is differ
END
