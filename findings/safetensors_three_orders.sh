#!/bin/bash
# safetensors 0.8.0 has three orders of names, and none is that of the dict that was saved.
# Guessed: keys() and load_file give the names as they were saved, or both as they lie in the file.
# Seen, after saving b (float16), c (float32), a (float32): keys() is sorted, a b c; load_file and offset_keys() go by the
# place in the file, wide types first, a c b. Zipping names with values of the two calls pairs them wrongly.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet safetensors==0.8.0 numpy==2.4.6
venv/bin/python - <<'END'
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

save_file({"b": np.zeros(2, np.float16), "c": np.zeros(2, np.float32), "a": np.zeros(2, np.float32)}, "f.safetensors")
with safe_open("f.safetensors", "np") as file:
    keys, by_place = list(file.keys()), list(file.offset_keys())
loaded = list(load_file("f.safetensors"))
print("saved b c a; keys():", *keys, " offset_keys():", *by_place, " load_file:", *loaded)
assert keys == ["a", "b", "c"] and by_place == loaded == ["a", "c", "b"]
END
