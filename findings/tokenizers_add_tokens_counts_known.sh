#!/bin/bash
# tokenizers 0.23.3: add_tokens of a token that the model's vocabulary has already.
# Guessed: 0, as the documentation has it return "the number of tokens that were created in the vocabulary".
# Seen: 1, while the id and the size of the vocabulary stay (an embedding enlarged by that number gets a row of no token).
# And no merge takes the token in any more: banana is six pieces where it was three.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3
venv/bin/python - <<'END'
from tokenizers import Tokenizer, models

vocabulary = {"a": 0, "b": 1, "n": 2, "an": 3, "ban": 4}
tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "n"), ("b", "an")]))
before = tokenizer.encode("banana").tokens
said = tokenizer.add_tokens(["a"])
after = tokenizer.encode("banana").tokens
print("add_tokens says", said, " vocabulary", len(vocabulary), "and", tokenizer.get_vocab_size(), " ", *before, "->", *after)
assert said == 1 and tokenizer.get_vocab_size() == 5 and tokenizer.token_to_id("a") == 0
assert before == ["ban", "an", "a"] and after == list("banana")
END
