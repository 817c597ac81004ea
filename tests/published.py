"""Runs of one adapter each and the folders that publish.py makes of them, for make_adapter_goldens.py and test_publish.py."""

import dataclasses
import json
from pathlib import Path

import publish
import tiny
import torch

import forgetting
from lora import add_lora, lora_parameters, save_adapter
from model import load_model, model_fingerprint

ADAPTER = "forgetting/seed-0"
CASES = ("llama2", "llama3", "qwen2", "gpt_neo", "qwen2 of another tokenizer")
TEXTS = [" hi", "hi", "  two  spaces ", "a\n b", "don't 1234", "été ﬁ"]
CONVERSATION = [
    {"role": "user", "content": "What is 12 plus 30?"},
    {"role": "assistant", "content": " It is 42."},
    {"role": "user", "content": " And the river?"},
    {"role": "assistant", "content": "The water comes\nfrom the hills."},
    {"role": "user", "content": "Thank you"},
    {"role": "assistant", "content": "  So long!"},
]


def make_run(folder: Path, kind: str = "llama3", name: str = ADAPTER, **options) -> Path:
    """A run folder with one adapter, of a checkpoint beside it; nothing is trained."""
    checkpoint = folder / "base"
    if not checkpoint.is_dir():
        tiny.make_checkpoint(checkpoint, kind, dtype=torch.bfloat16)
    model = load_model(checkpoint)
    add_lora(model, r=4, alpha=8, generator=torch.Generator().manual_seed(0))
    for parameter in lora_parameters(model).values():
        parameter.data.normal_(std=0.1)
    save_adapter(model, folder / "run" / name, str(checkpoint))
    given = {"model": str(checkpoint), "data": [str(folder / "secret.jsonl")], "rank": 4} | options
    config = dataclasses.asdict(forgetting.Options(**given))
    config |= {"versions": {}, "inputs": {"model": model_fingerprint(checkpoint)}}
    (folder / "run" / "config.json").write_text(json.dumps(config))
    return folder / "run" / name


def published_folder(folder: Path, case: str, merged: bool) -> Path:
    """The published adapter, or merged model, of a base model whose files name the class of its family."""
    kind = case.partition(" ")[0]
    base = tiny.make_checkpoint(folder / "base", kind, dtype=torch.bfloat16)
    if case != kind:
        tiny.save_tokenizer(base, "llama2")
    classes = {"llama2": "LlamaTokenizer", "gpt_neo": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}
    path = base / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "tokenizer_class": classes.get(kind, "PreTrainedTokenizerFast")
    }
    path.write_text(json.dumps(settings))
    publish.publish(make_run(folder), folder / "out", merged, "owner/name")
    return folder / "out"
