#!/bin/bash
# transformers 5.23.0: PreTrainedTokenizerFast(...).save_pretrained writes a class name that transformers 4 does not know.
# Guessed: tokenizer_class "PreTrainedTokenizerFast", the class that was saved.
# Seen: "TokenizersBackend"; AutoTokenizer of 4.57.1 refuses the folder, and reads it when the old name is put back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0
TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'END'
import json
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

raw = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<e>": 2}, unk_token="<e>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>").save_pretrained("saved")
with open("saved/tokenizer_config.json") as file:
    name = json.load(file)["tokenizer_class"]
print("saved as", name)
assert name == "TokenizersBackend"
assert AutoTokenizer.from_pretrained("saved")("a b")["input_ids"] == [0, 1]
END
python3 -m venv old
old/bin/pip install --quiet transformers==4.57.1
TRANSFORMERS_VERBOSITY=error old/bin/python - <<'END'
import json
from transformers import AutoTokenizer

try:
    AutoTokenizer.from_pretrained("saved")
    raise SystemExit("4.57.1 reads it: this has changed")
except ValueError as error:
    print("4.57.1:", " ".join(str(error).split())[:90])
with open("saved/tokenizer_config.json") as file:
    config = json.load(file)
with open("saved/tokenizer_config.json", "w") as file:
    json.dump(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, file)
assert AutoTokenizer.from_pretrained("saved")("a b")["input_ids"] == [0, 1]
print("4.57.1 with the old name: read")
END
