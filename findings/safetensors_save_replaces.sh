#!/bin/bash
# safetensors 0.8.0: save_file does not write into the file that has the name, it puts a new one in its place.
# Guessed: a symbolic link is written through (a run folder linked to a big disk), and an existing file keeps its mode.
# Seen: the link is gone and a plain file stands there, its old target is as it was, and 0644 has become 0600.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet safetensors==0.8.0 numpy==2.4.6
venv/bin/python - <<'END'
import os
import numpy as np
from safetensors.numpy import load_file, save_file

old, new = {"a": np.zeros(2, np.float32)}, {"a": np.ones(2, np.float32)}
save_file(old, "target.safetensors")
os.chmod("target.safetensors", 0o644)
os.symlink("target.safetensors", "link.safetensors")
save_file(new, "link.safetensors")
print("a link still:", os.path.islink("link.safetensors"), " in its target:", load_file("target.safetensors")["a"])
assert not os.path.islink("link.safetensors") and load_file("target.safetensors")["a"].tolist() == [0, 0]
save_file(new, "target.safetensors")
mode = oct(os.stat("target.safetensors").st_mode & 0o777)
print("mode of a file of 0644, written again:", mode)
assert mode == "0o600"
END
