#!/bin/bash
# datasets 5.2.0 (pyarrow 26.0.1): a JSON lines file with integers of which one does not fit into 64 bits with a sign.
# Guessed: an error, or uint64, which holds all of them.
# Seen: the column is float64, without a warning, and its other rows lose digits too: an id of 2^53 + 1 is no longer odd. Without
# the row of 2^63 it is int64 and exact. from_list of the same rows refuses.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0 pyarrow==26.0.1
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'END'
import json
from datasets import Dataset, load_dataset

def column(name, numbers):
    with open(name, "w") as file:
        file.writelines(json.dumps({"id": number}) + "\n" for number in numbers)
    dataset = load_dataset("json", data_files=name, split="train")
    return dataset.features["id"].dtype, list(dataset["id"])

odd = 2**53 + 1
without = column("without.jsonl", [odd, 1])
with_big = column("with.jsonl", [odd, 2**63])
print("written", odd, " read without 2^63:", *without, " with it:", *with_big)
assert without == ("int64", [odd, 1])
assert with_big[0] == "float64" and int(with_big[1][0]) == odd - 1
try:
    Dataset.from_list([{"id": odd}, {"id": 2**63}])
    raise SystemExit("from_list takes it: this has changed")
except OverflowError as error:
    print("from_list:", error)
END
