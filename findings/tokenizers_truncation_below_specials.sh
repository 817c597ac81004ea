#!/bin/bash
# tokenizers 0.23.3: truncation to fewer tokens than the template adds by itself.
# Guessed: an error, from enable_truncation or from encode, or nothing but special tokens.
# Seen: to 2, with a template of 2, the special tokens alone; to 1 or 0 nothing is truncated at all, the whole text comes back.
# A pair under a template of 3 is whole at 2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3
venv/bin/python - <<'END'
from tokenizers import Tokenizer, models, pre_tokenizers, processors

tokenizer = Tokenizer(models.WordLevel({"a": 0, "[C]": 1, "[S]": 2}, unk_token="a"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer.post_processor = processors.TemplateProcessing(
    single="[C] $A [S]", pair="[C] $A [S] $B [S]", special_tokens=[("[C]", 1), ("[S]", 2)]
)
text = "a " * 6
lengths = {}
for most in (0, 1, 2, 3):
    tokenizer.enable_truncation(most)
    lengths[most] = len(tokenizer.encode(text)), len(tokenizer.encode(text, text))
    print(f"truncated to {most}: of 8 tokens {lengths[most][0]}, of a pair's 15 {lengths[most][1]}")
assert lengths == {0: (8, 15), 1: (8, 15), 2: (2, 15), 3: (3, 3)}
END
