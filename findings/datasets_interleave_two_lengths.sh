#!/bin/bash
# datasets 5.2.0: interleave_datasets with the same arguments, on datasets and on the iterable datasets made of them.
# Guessed: the same rows, one process and one shard as it is: 4 of lengths 2 and 5 with first_exhausted, 10 with all_exhausted.
# Seen: with the short one first, first_exhausted gives 4 rows and, iterable, 3; with the long one first, all_exhausted gives
# 10 and, iterable, 9. In the other order of each, and with probabilities, both kinds agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0 pyarrow==26.0.1
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'END'
from datasets import Dataset, interleave_datasets

short = Dataset.from_dict({"x": ["s0", "s1"]})
long = Dataset.from_dict({"x": ["l0", "l1", "l2", "l3", "l4"]})

def both_kinds(parts, **how):
    listed = list(interleave_datasets(parts, **how)["x"])
    streams = [part.to_iterable_dataset() for part in parts]
    return listed, [row["x"] for row in interleave_datasets(streams, **how)]

found = {}
for order, parts in {"short, long": [short, long], "long, short": [long, short]}.items():
    for strategy in ("first_exhausted", "all_exhausted"):
        listed, streamed = both_kinds(parts, stopping_strategy=strategy)
        print(f"{order}; {strategy}:", *listed, "| iterable:", *streamed)
        assert streamed == listed[: len(streamed)]
        found[order, strategy] = len(listed), len(streamed)
assert found["short, long", "first_exhausted"] == (4, 3) and found["long, short", "first_exhausted"] == (4, 4)
assert found["short, long", "all_exhausted"] == (10, 10) and found["long, short", "all_exhausted"] == (10, 9)
listed, streamed = both_kinds([short, long], probabilities=[0.5, 0.5], seed=0)
assert listed == streamed
END
