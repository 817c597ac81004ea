"""Chat templates, conversations and tokenizer folders for make_row_goldens.py and the tests that read its goldens.

The templates are ours, in the shape of each family's: what they write, trim, refuse and add is the same.
"""

import json
from datetime import datetime
from pathlib import Path

import tiny

CONVERSATIONS = {
    "one turn": [("user", "What is 12 plus 30?"), ("assistant", "It is 42.")],
    "system": [("system", " Be brief. "), ("user", "Who jumps?"), ("assistant", "  The fox, “so”.\n")],
    "two turns": [
        ("user", " Tell me \n"),
        ("assistant", "The river\n\nis long. "),
        ("user", "And <b>why</b>?"),
        ("assistant", "é 🦊"),
    ],
    "system, two turns": [
        ("system", "Short."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ],
    "a question at the end": [("user", "a"), ("assistant", "b"), ("user", "c")],
}
TWO_LISTS = {
    "prompt": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "r"},
        {"role": "user", "content": "a"},
    ],
    "completion": [{"role": "assistant", "content": "b"}],
}
CHATML = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
TEMPLATES = {  # family: (template, eos)
    "llama3": (
        "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set first = messages[0]['content'] | trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set first = '' %}{%- endif %}\n"
        "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n\\n' + first + '<|eot_id|>' }}\n"
        "{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
        "    {{- message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
        "<|eot_id|>",
    ),
    "qwen2.5": (
        "{%- if tools %}\n    {{- tools | tojson }}\n{%- elif messages[0]['role'] != 'system' %}\n"
        "    {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}\n{%- endif %}\n{%- for message in messages %}\n"
        "    {%- if message.role in ('user', 'system') or not message.tool_calls %}\n        "
        + CHATML.replace("{{", "{{-")
        + "\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
        "<|im_end|>",
    ),
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
        + CHATML
        + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "mistral": (
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content'] %}\n    {%- set turns = messages[1:] %}\n"
        "{%- else %}\n    {%- set turns = messages %}\n{%- endif %}\n{{- bos_token }}\n{%- for message in turns %}\n"
        "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
        "        {{- raise_exception('After the optional system message, roles must alternate user and assistant') }}\n    {%- endif %}\n"
        "    {%- if message['role'] == 'user' %}\n        {%- if loop.first and system is defined %}\n"
        "            {{- ' [INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}\n        {%- else %}\n"
        "            {{- ' [INST] ' + message['content'] + ' [/INST]' }}\n        {%- endif %}\n    {%- else %}\n"
        "        {{- ' ' + message['content'] + eos_token }}\n    {%- endif %}\n{%- endfor %}\n",
        "</s>",
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
        "{% else %}\n{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "</s>",
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}",
        "<end_of_turn>",
    ),
    # what else a template may use: marks of the answer, loop controls, namespaces, tojson with arguments, names of tokens
    "marked": (
        "{%- set n = namespace(seen=0) %}{%- for message in messages %}{%- set n.seen = n.seen + 1 %}{%- if n.seen > 9 %}{%- break %}"
        "{%- endif %}{%- if message.role == 'system' %}{{- pad_token }}{%- continue %}{%- endif %}{{- message.role + ':' }}"
        "{%- if message.role == 'user' %}{{- message.content | tojson(ensure_ascii=True) }}{%- else %}"
        "{%- generation %}{{- message.content }}{%- endgeneration %}{%- endif %}{{- eos_token }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}",
        "</s>",
    ),
    # Llama 3.2's kind: a date, tools, JSON in three styles, and tags that are indented
    "dated": (
        "{{- bos_token }}\n{%- if strftime_now is defined %}\n    {%- set day = strftime_now('%d %b %Y, %H') %}\n{%- endif %}\n"
        "{{- 'Today: ' + day + '\\n' }}\n{%- if tools is not none %}\n    {{- 'Tools: ' + (tools | tojson) + '\\n' }}\n{%- endif %}\n"
        "{{- {'b': [1, 'é'], 'a': messages[0].content} | tojson(indent=2, sort_keys=True) }}\n"
        "{{ {'b': 1, 'a': '<é>'} | tojson(ensure_ascii=true, separators=(',', ':')) }}\n"
        "{% for message in messages %}\n    {% if message.role == 'assistant' %}\n"
        "    {% set head = 'A' %}\n    {% else %}\n    {% set head = message.role | upper %}\n    {% endif %}\n"
        "{{ '<|start_header_id|>' + head + '<|end_header_id|>' + message.content | trim + eos_token }}\n    {% endfor %}\n"
        "{% if add_generation_prompt %}\n{{ '<|start_header_id|>A<|end_header_id|>' }}{% endif %}",
        "<|eot_id|>",
    ),
}
NOW = datetime(2026, 7, 4, 9, 30)  # the date that these templates write
# Qwen3's kind: the thoughts of every turn but the last are taken out, so that earlier turns change
REWRITING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' and loop.last %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOKENS = (
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "[INST]",
    "[/INST]",
    "</s>",
    "<start_of_turn>",
    "<end_of_turn>",
)
HARD_TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "\n\n\tdef f(x):\n    return x  \n",
    "It's 12+30=42, isn't it?",
    "naïve café “quotes” — 🦊👩‍🚀",
    "e\u0301 \u00a0\u2028\u0085\x0c\r\n",
    "<|endoftext|>",
    "a<|endoftext|> b",
    "<|im_start|>user\nTell me<|im_end|>\n",
    " <|im_end|>",
    "<|pad|>x<|pad|>",
    "<s>The dog.</s>",
    "Ünïcödé 中文 العربية",
    "<|begin_of_text|>The quick<|end_of_text|>",
]


def messages_of(name: str) -> list[dict]:
    """A conversation as messages."""
    return [{"role": role, "content": content} for role, content in CONVERSATIONS[name]]


def write(folder: Path, **files: dict) -> None:
    """Write JSON files: tokenizer_config={...}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def token(content: str, special: bool = True) -> dict:
    """An added token as config files have it."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": not special}
    return {"content": content, "special": special} | flags


def template_folder(folder: Path, name: str) -> Path:
    """A tokenizer with the template of a family and its tokens."""
    template, eos = TEMPLATES[name]
    tiny.save_tokenizer(folder, "llama3")
    first = tiny.make_tokenizer("llama3").get_vocab_size()
    added = {str(first + i): token(text) for i, text in enumerate(TOKENS)}
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": eos,
        "pad_token": "</s>",
    }
    write(folder, tokenizer_config=named | {"added_tokens_decoder": added}, config={"model_type": "llama"})
    (folder / "chat_template.jinja").write_text(template)
    return folder


def gpt_neo_pair(folder: Path) -> None:
    """vocab.json and merges.txt, as EleutherAI/gpt-neo-2.7B has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.make_tokenizer("gpt_neo").model.save(str(folder))


def pair(folder: Path) -> None:
    """GPT-Neo's own files."""
    gpt_neo_pair(folder)
    end = "<|endoftext|>"
    write(
        folder,
        special_tokens_map={"bos_token": end, "eos_token": end, "unk_token": end},
        tokenizer_config={
            "add_prefix_space": False,
            "model_max_length": 2048,
            "special_tokens_map_file": None,
        },
        config={"model_type": "gpt_neo", "bos_token_id": 0, "eos_token_id": 0},
    )


def pair_alone(folder: Path) -> None:
    """The two files and nothing that names a token."""
    gpt_neo_pair(folder)
    write(
        folder,
        tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        config={"model_type": "gpt_neo"},
    )


def pair_with_tokens(folder: Path) -> None:
    """Tokens added later, as older versions of transformers write them; a bos is asked for."""
    pair(folder)
    first = tiny.make_tokenizer("gpt_neo").get_vocab_size()
    write(
        folder,
        added_tokens={"<|im_start|>": first, "<|im_end|>": first + 1, "<|pad|>": first + 2},
        tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True},
        special_tokens_map={
            "bos_token": token("<|endoftext|>"),
            "eos_token": "<|im_end|>",
            "pad_token": "<|pad|>",
        },
    )


def decoder(folder: Path) -> None:
    """added_tokens_decoder lists what tokenizer.json lacks; special_tokens_map.json then has no say about the eos."""
    tiny.save_tokenizer(folder, "llama3")
    first = tiny.make_tokenizer("llama3").get_vocab_size()
    added = {
        str(first + 1): token("<|im_end|>"),
        str(first): token("<|im_start|>"),
        str(first + 2): token("<|pad|>", False),
    }
    write(
        folder,
        config={"model_type": "llama"},
        special_tokens_map={"eos_token": "<|end_of_text|>"},
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": added,
        },
    )


def special_map(folder: Path) -> None:
    """No added_tokens_decoder: special_tokens_map.json overrules tokenizer_config.json and brings tokens of its own."""
    tiny.save_tokenizer(folder, "qwen2")
    write(
        folder,
        config={"model_type": "qwen2"},
        special_tokens_map={
            "eos_token": token("<|im_end|>"),
            "additional_special_tokens": ["<|im_start|>", "<|end_of_text|>"],
        },
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|pad|>",
        },
    )


def bos_by_both(folder: Path) -> None:
    """tokenizer.json puts a bos, tokenizer_config.json says that there is none: the first has the say."""
    tiny.save_tokenizer(folder, "llama3")
    write(
        folder,
        config={"model_type": "llama"},
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "add_bos_token": False,
            "image_token": "<|im_start|>",
        },
    )


TOKENIZERS = {f.__name__: f for f in (pair, pair_alone, pair_with_tokens, decoder, special_map, bos_by_both)}
STOPS = {  # what generation_config.json and config.json say of the eos, and the eos of the tokenizer is id 1
    "three of Llama 3": ({"eos_token_id": [1, 5, 7]}, {"eos_token_id": 1}),
    "another one": ({"eos_token_id": 5}, {"eos_token_id": 1}),
    "config alone": (None, {"eos_token_id": [1, 9]}),
    "no eos in the generation config": ({"bos_token_id": 0}, {"eos_token_id": 9}),
    "empty lists": ({"eos_token_id": [], "bos_token_id": []}, {"eos_token_id": 1, "bos_token_id": []}),
}
