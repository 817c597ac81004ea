#!/bin/bash
# datasets 5.2.0: a function given to map that returns a dict for some rows and None for others.
# Guessed: an error, or the rows of None stay as they were ("returns nothing" leaves a dataset unchanged, says the documentation).
# Seen: a row of None is gone from the result; but if the last call returns None, every result is thrown away and the old
# dataset comes back whole. Row by row and in batches alike, without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0 pyarrow==26.0.1
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'END'
from datasets import Dataset

rows = Dataset.from_dict({"x": [1, 2, 3, 4]})

def times_ten(unless):
    return lambda row: None if row["x"] == unless else {"x": row["x"] * 10}

def batch_times_ten(unless):
    return lambda batch: None if unless in batch["x"] else {"x": [value * 10 for value in batch["x"]]}

second = list(rows.map(times_ten(2))["x"])
last = list(rows.map(times_ten(4))["x"])
print("of 1 2 3 4, times ten, None for the 2:", *second, " None for the 4:", *last)
assert second == [10, 30, 40] and last == [1, 2, 3, 4]
middle_batch = list(rows.map(batch_times_ten(2), batched=True, batch_size=1)["x"])
last_batch = list(rows.map(batch_times_ten(4), batched=True, batch_size=2)["x"])
print("in batches, None for the one with the 2:", *middle_batch, " for the one with the 4:", *last_batch)
assert middle_batch == [10, 30, 40] and last_batch == [1, 2, 3, 4]
END
