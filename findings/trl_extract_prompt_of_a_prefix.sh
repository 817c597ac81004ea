#!/bin/bash
# trl 1.16.0: extract_prompt, by its documentation the longest common prefix, where the rejected answer goes on after the chosen.
# Guessed: the whole chosen text is the prompt, and nothing is left to choose.
# Seen: all but its last character is the prompt, which is chosen as an answer: "Say yes" against "Say yes, sir" makes "Say ye",
# "s" and "s, sir". Two equal texts lose theirs as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet trl==1.16.0 transformers==5.23.0 torch==2.13.0
TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'END'
from trl import extract_prompt

def parts(chosen, rejected):
    found = extract_prompt({"chosen": chosen, "rejected": rejected})
    print(repr(chosen), "and", repr(rejected), "make", found)
    return [found[name] for name in ("prompt", "chosen", "rejected")]

assert parts("Say yes", "Say no") == ["Say", " yes", " no"]
assert parts("Say yes", "Say yes, sir") == ["Say ye", "s", "s, sir"]
assert parts("a b", "a b c") == ["a ", "b", "b c"]
assert parts("same", "same") == ["sam", "e", "e"]
END
