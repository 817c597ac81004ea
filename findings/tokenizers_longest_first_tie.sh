#!/bin/bash
# tokenizers 0.23.3 and transformers 5.23.0: a pair of two equally long texts, truncated longest_first to an odd length.
# Guessed: 5 and 5 tokens to 7 leave 4 and 3, as with the tokenizers that transformers has in Python.
# Seen: the Python ones leave 4 and 3, the fast ones 3 and 4. The odd token goes to the first text in Python, of 5 and 6 as well;
# the fast ones give it to the longer, and to the second of two that are equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3 transformers==5.23.0
TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'END'
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, PythonBackend

class Words(PythonBackend):
    vocab_size = 2

    def get_vocab(self):
        return {"a": 0, "b": 1}

    def _tokenize(self, text):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.get_vocab()[token]

    def _convert_id_to_token(self, index):
        return "ab"[index]

raw = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
raw.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])

def left(tokenizer, first, second):
    ids = tokenizer("a " * first, "b " * second, truncation="longest_first", max_length=7)["input_ids"]
    return ids.count(0), ids.count(1)

lengths = [(5, 5), (6, 5), (5, 6), (9, 2)]
python = [left(Words(), *pair) for pair in lengths]
fast = [left(PreTrainedTokenizerFast(tokenizer_object=raw), *pair) for pair in lengths]
for pair, one, other in zip(lengths, python, fast):
    print("of", *pair, "tokens to 7: Python", *one, " fast", *other)
assert python == [(4, 3), (4, 3), (4, 3), (5, 2)]
assert fast == [(3, 4), (4, 3), (3, 4), (5, 2)]
END
