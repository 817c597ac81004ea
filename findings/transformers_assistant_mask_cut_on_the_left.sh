#!/bin/bash
# transformers 5.23.0: apply_chat_template with return_assistant_tokens_mask and truncation, truncation_side "left".
# Guessed: what is left of the assistant's turns is marked, the last one, which is whole, above all.
# Seen: once the cut goes past the first character of the first assistant turn, no token is marked at all: the first turn that
# has lost its beginning ends the search for the others. Nothing is said; such a row adds nothing to a loss on the answers.
# The same row cut on the right, and one cut a token less on the left, are marked as they should be.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'END'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = {word: i for i, word in enumerate("? <user> <assistant> <end> how are you fine and good thanks".split())}
core = Tokenizer(models.WordLevel(words, unk_token="?"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
core.add_special_tokens(["<user>", "<assistant>", "<end>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
template = (
    "{% for message in messages %}{{ '<' + message.role + '>' }}"
    "{% if message.role == 'user' %}{{ message.content }}"
    "{% else %}{% generation %}{{ message.content + '<end>' }}{% endgeneration %}{% endif %}{% endfor %}"
)
turns = ["how are you", "fine and you", "good", "thanks"]
chat = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]

def marked(side, length):
    tokenizer.truncation_side = side
    ids = tokenizer.apply_chat_template(
        chat,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        truncation=True,
        max_length=length,
    )
    tokens = tokenizer.convert_ids_to_tokens(ids["input_ids"])
    mask = ids["assistant_masks"]
    print(f"{side:5} {length:2}:", *(f"[{token}]" if one else token for token, one in zip(tokens, mask)))
    return [token for token, one in zip(tokens, mask) if one]

first, last = ["fine", "and", "you", "<end>"], ["thanks", "<end>"]
assert marked("left", 14) == first + last
assert marked("left", 10) == first + last
assert marked("left", 9) == first + last
assert marked("left", 8) == []
assert marked("left", 4) == []
assert marked("right", 7) == first[:2]
END
