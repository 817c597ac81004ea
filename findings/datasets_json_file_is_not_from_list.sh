#!/bin/bash
# datasets 5.2.0: the same rows, with dicts that differ in their keys, given as a list and read from a file of JSON lines.
# Guessed: both make one struct of all keys, with None where a row has not the key (a tool call's arguments, say).
# Seen: that is from_list; load_dataset gives the column the type Json and each dict back as it was. So for numbers and a string
# in one column: read from a file they are a Json column, from_list refuses them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0 pyarrow==26.0.1
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'END'
import json
from datasets import Dataset, load_dataset

def read(name, rows):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return load_dataset("json", data_files=name, split="train")

calls = [{"arguments": {"city": "Ulm"}}, {"arguments": {"days": 2}}]
listed, loaded = Dataset.from_list(calls), read("calls.jsonl", calls)
for name, dataset in (("from_list:", listed), ("load_dataset:", loaded)):
    print(name, dataset.features["arguments"], list(dataset["arguments"]))
assert list(listed["arguments"]) == [{"city": "Ulm", "days": None}, {"city": None, "days": 2}]
assert type(loaded.features["arguments"]).__name__ == "Json" and list(loaded["arguments"]) == [{"city": "Ulm"}, {"days": 2}]
mixed = [{"answer": 1}, {"answer": 2}, {"answer": "none"}]
assert list(read("mixed.jsonl", mixed)["answer"]) == [1, 2, "none"]
try:
    Dataset.from_list(mixed)
    raise SystemExit("from_list takes 1, 2, \"none\": this has changed")
except ValueError as error:
    print("from_list of 1, 2, \"none\":", str(error)[:80])
END
