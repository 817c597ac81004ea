"""Publish an adapter of a run: a new folder for the Hub, with card, tokenizer and chat template.

    ./run.sh publish RUN/forgetting/seed-0 OUT              # the adapter, for PEFT and vLLM
    ./run.sh publish RUN/forgetting/seed-0 OUT --merged     # base model and adapter in one checkpoint
    hf upload you/name OUT

A run that read its base model from a folder does not know the model's name on the Hub: --base-model owner/name gives it.
Fill in licence and data set in OUT/README.md before you upload.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
from safetensors import SafetensorError, safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from data import Tokenizer, build_corpus, read_object, write_text  # noqa: E402
from forgetting import DRAWN_STEPS, GROUPS, METHOD_OPTIONS, METHODS, TRUSTED_STEPS  # noqa: E402
from forgetting import is_row, options_of  # noqa: E402
from lora import load_adapter, merge_lora, read_adapter  # noqa: E402
from model import checkpoint_folder, load_model, model_fingerprint, read_config, save_model, weight_files  # noqa: E402

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
# keys of tokenizer_config.json with which transformers reads another file, runs code or cuts special tokens
OTHER_TOKENIZERS = (
    "auto_map",
    "fast_tokenizer_files",
    "tokenizer_file",
    "vocab_file",
    "split_special_tokens",
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
UNLEARNING_GONE = ("ceiling",)  # options of older versions that were read only where N is unlearned
PEFT_IN_PYTHON = """
In Python:

    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ARGUMENTS), "DIR")

The tokenizer is `AutoTokenizer.from_pretrained("DIR")`. Merging (`merge_and_unload`) into weights of bfloat16 rounds the
sum: the answers may differ a little from those of base model and adapter side by side.
"""
MERGED_IN_PYTHON = """
Where these weights are bfloat16, merging has rounded the sum of base model and adapter: the answers may differ a little
from those of the two side by side.
"""
QWEN2_TOKENIZER = """
For models of this type AutoTokenizer of transformers 5 puts Qwen's own rules in place of those in `tokenizer.json`; the
ids of the training, whatever the file says, are those of

    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast.from_pretrained("DIR")
"""
TULU_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first and loop.previtem['role'] == 'assistant' %}{{ '\\n' }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def publish(adapter: Path, out: Path, merged: bool = False, base_model: str | None = None) -> None:
    """Make the folder `out` of one adapter of a run; with `merged`, of the checkpoint with the adapter in it.

    base_model is the base's Hub id; without it, it is the run's --model unless that is a folder.
    Raises ValueError for what is no adapter of a run, for a method or an option that is gone, for a base
    model that is not the run's, and where `out` holds files already.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there already: give a new folder")
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise ValueError(f"--base-model {base_model} is not a Hub id: owner/name or owner/name@revision")
    name, config = read_run(adapter)
    lora_config, _ = read_adapter(adapter)  # raises ValueError for files that are not whole
    checkpoint = checkpoint_folder(config["model"])
    if model_fingerprint(checkpoint) != config["inputs"].get("model"):
        raise ValueError(f"{config['model']}: its files are not those that the run was made from")
    if base_model is None and not os.path.isdir(config["model"]):
        base_model = config["model"]
    tokenizer = Tokenizer(checkpoint, config["template"])
    with whole_folder(out) as folder:
        if merged:
            write_merged(adapter, checkpoint, folder)
        else:
            write_adapter(adapter, base_model, folder)
        write_tokenizer(tokenizer, checkpoint, folder)
        write_text(chat_template(tokenizer), folder / "chat_template.jinja")
        rank = None if merged else lora_config["r"]
        options = trained_options(name, config) | {"alpha": lora_config["alpha"]}  # 16, not 16.0
        card = model_card(name, options, base_model, rank)
        if merged and read_config(checkpoint).model_type == "qwen2":
            card += QWEN2_TOKENIZER
        write_text(card, folder / "README.md")
    if base_model is None:
        print(f"{out} does not name its base model: give --base-model owner/name before you upload it")


def read_run(adapter: Path) -> tuple[str, dict]:
    """Name of the method that made an adapter, or "reference", and the run's config.json."""
    method, run = adapter.resolve().parent, adapter.resolve().parent.parent
    name = method.name
    if adapter.resolve().name == "reference":
        name, run = "reference", method
    config = read_object(run / "config.json") if (run / "config.json").is_file() else {}
    if not isinstance(config.get("inputs"), dict):
        raise ValueError(
            f"{adapter} is not an adapter of a run, such as RUN/forgetting/seed-0 or RUN/reference"
        )
    mend = "publish it with the version that trained it"
    if name.partition(":")[0] not in ("reference", *METHODS) or not is_row(name):
        raise ValueError(f"{adapter}: {name} is no method of today's; {mend}")
    if gone := options_gone(name, config["inputs"]):
        raise ValueError(f"{adapter}: trained with {', '.join(gone)}, no option of today's; {mend}")
    return name, config


def options_gone(name: str, inputs: dict) -> list[str]:
    """Those of a run's inputs that change the training of a method, and are no option of this version."""
    known = ["reference data", "training data", *options_of(*GROUPS)]
    stem = name.partition(":")[0]
    if stem == "reference" or not METHODS[stem].unlearn:
        known += UNLEARNING_GONE
    gone = []
    for name, value in inputs.items():
        if name not in known and value is not None:
            gone.append(f"{name} {value!r}")
    return gone


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, which takes out's name when the block ends, and goes after an error."""
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            folder = Path(temporary) / out.name
            folder.mkdir()
            yield folder
            for path in folder.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())  # it is on the disk before the folder has its name
            os.replace(folder, out)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{out} could not be written ({error})") from None


def write_adapter(adapter: Path, base_model: str | None, folder: Path) -> None:
    """PEFT's two files; they name the base model by its Hub id, or not at all: never by a path on this disk."""
    base, _, revision = (base_model or "").partition("@")
    config = read_object(adapter / "adapter_config.json")
    config |= {"base_model_name_or_path": base or None, "revision": revision or None}
    write_text(json.dumps(config, indent=2) + "\n", folder / "adapter_config.json")
    shutil.copyfile(adapter / "adapter_model.safetensors", folder / "adapter_model.safetensors")


def write_merged(adapter: Path, checkpoint: Path, folder: Path) -> None:
    """The checkpoint with the adapter merged in, in the dtype of the checkpoint's files."""
    model = load_model(checkpoint, "cpu", stored_dtype(checkpoint))
    load_adapter(model, adapter)
    merge_lora(model)
    save_model(model, folder)
    config = read_object(folder / "config.json")
    config.pop("_name_or_path", None)  # a path on the disk of whoever saved the checkpoint
    write_text(json.dumps(config, indent=2) + "\n", folder / "config.json")


def stored_dtype(checkpoint: Path) -> torch.dtype:
    """The dtype of the largest tensor in a checkpoint's first file: small ones may be masks, or norms in float32."""
    with safe_open(weight_files(checkpoint)[0], framework="pt") as file:
        largest = max(file.keys(), key=lambda name: math.prod(file.get_slice(name).get_shape()))
        return file.get_tensor(largest).dtype


def write_tokenizer(tokenizer: Tokenizer, checkpoint: Path, folder: Path) -> None:
    """The tokenizer's files, with the bos and eos that the template needs, and generation_config.json."""
    for name in TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    if not (folder / "tokenizer.json").is_file():  # GPT-Neo's has vocab.json and merges.txt only
        tokenizer.raw.save(str(folder / "tokenizer.json"))
    names = ("tokenizer_config.json", "special_tokens_map.json")
    configs = {name: read_object(checkpoint / name) for name in names if (checkpoint / name).is_file()}
    # Of all classes this one alone takes tokenizer.json as it stands: transformers 5 puts LlamaTokenizer's,
    # GPT2Tokenizer's and others' own rules in place of the file's. transformers 4 knows the name, too.
    tokenizer_config = configs.setdefault("tokenizer_config.json", {})
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in OTHER_TOKENIZERS:
        tokenizer_config.pop(key, None)
    for name, config in configs.items():
        for key, text in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
            there = config.get(key)
            if text is not None and text != (there.get("content") if isinstance(there, dict) else there):
                config[key] = text
        config.pop("name_or_path", None)  # as in config.json
        if tokenizer.template is None:
            config.pop("chat_template", None)
        write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", folder / name)
    generation = generation_config(checkpoint, taught_end(tokenizer))
    write_text(json.dumps(generation, indent=2) + "\n", folder / "generation_config.json")


def generation_config(checkpoint: Path, end: int) -> dict:
    """The checkpoint's generation_config.json, in which generation stops at the token `end`, too."""
    path, model_config = checkpoint / "generation_config.json", read_object(checkpoint / "config.json")
    keys = (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )  # what transformers takes where there is no such file
    config = read_object(path) if path.is_file() else {key: model_config.get(key) for key in keys}
    stops = config.get("eos_token_id")
    if not isinstance(stops, list):
        stops = [] if stops is None else [stops]
    if end in stops:
        return config
    return config | {"eos_token_id": [*stops, end] if stops else end}


def taught_end(tokenizer: Tokenizer) -> int:
    """The id of the token that ends an answer in the training: the first special one of a rendered answer."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    corpus = build_corpus([{"messages": messages}], tokenizer)
    special = {tokenizer.eos_id, *tokenizer.raw.get_added_tokens_decoder()}
    return next((int(i) for i in corpus.tokens[corpus.response] if i in special), tokenizer.eos_id)


def chat_template(tokenizer: Tokenizer) -> str:
    """The template of the training as jinja, for transformers' tokenizer.apply_chat_template."""
    if tokenizer.template is not None:
        return tokenizer.chat_template
    puts_bos = tokenizer.bos is not None and tokenizer.encode(["x"])[0][0][0] == tokenizer.bos_id
    return ("{{ bos_token }}" if puts_bos else "") + TULU_TEMPLATE


def trained_options(name: str, config: dict) -> dict:
    """The options that the training of this adapter read, by name; a variant's are part of the method's name."""
    stem, _, changes = name.partition(":")
    method = METHODS.get(stem, METHODS["full"])  # the reference is trained as full is
    if stem == "reference":
        fewest = TRUSTED_STEPS if config.get("reference_data") else DRAWN_STEPS
        epochs = config["reference_epochs"] or f"at least {config['epochs']}, and at least {fewest} steps"
        config = config | {"lr": config["reference_lr"], "epochs": epochs}
    config = config | dict(change.split("=", 1) for change in changes.split(",") if change)
    for key in ("rho", *METHOD_OPTIONS):  # the method's own where none is given
        if config.get(key) is None or (key == "rho" and method.rho == 1):
            config[key] = getattr(method, key)
    read = options_of("training", "unlearning") if method.unlearn else options_of("training")
    return {key: config[key] for key in read if config.get(key) is not None}


def model_card(name: str, options: dict, base_model: str | None, rank: int | None) -> str:
    """README.md as the Hub reads it; rank is None for a merged checkpoint."""
    base, _, revision = (base_model or "").partition("@")
    base_line = f"base_model: {json.dumps(base)}\n" if base else ""  # JSON's strings are YAML's, too
    where = f"{base}, revision {revision}" if revision else base
    unnamed = "fill in: the run read it from a folder, publish.py's `--base-model owner/name` names it"
    settings = "\n".join(f"- {key}: {value}" for key, value in options.items())
    if rank is None:
        library, kind = "transformers", "A merged model"
        command, python = "vllm serve DIR", MERGED_IN_PYTHON
    else:
        library, kind = "peft", "A LoRA adapter"
        limit = max(8, 2 ** math.ceil(math.log2(rank)))  # vLLM takes powers of two
        command = (
            f"vllm serve {base or 'BASE'} --enable-lora --max-lora-rank {limit} --lora-modules forgetting=DIR "
            "--chat-template DIR/chat_template.jinja"
        )
        arguments = json.dumps(base or "BASE")
        if revision:
            arguments += f", revision={json.dumps(revision)}"
        python = PEFT_IN_PYTHON.replace("ARGUMENTS", arguments)
    return f"""---
{base_line}library_name: {library}
pipeline_tag: text-generation
tags:
- "lora"
- "forgetting"
- "arxiv:2508.04329"
# license: fill in (the base model's licence may bind yours)
# datasets: fill in (a list of Hub ids)
---

# {name}

{kind}, trained by the method `{name}` of Forgetting (arXiv 2508.04329).

- base model: {where or unnamed}
- data: fill in
{settings}

Conversations take the template in `chat_template.jinja`. Served by vLLM, where DIR is a copy of this folder:

    {command}
{python}"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="./run.sh publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "adapter", type=Path, help="folder of one adapter of a run: RUN/METHOD/seed-S, RUN/reference"
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument(
        "--merged", action="store_true", help="the whole model, with the adapter in its weights"
    )
    parser.add_argument("--base-model", help="Hub id of the base model, with an optional @revision")
    arguments = parser.parse_args()
    try:
        publish(arguments.adapter, arguments.out, arguments.merged, arguments.base_model)
    except (ValueError, OSError) as error:
        print(f"publish.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        f"{arguments.out}: fill in licence and data set in README.md, then: hf upload you/name {arguments.out}"
    )


if __name__ == "__main__":
    main()
