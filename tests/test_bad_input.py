"""What a user gets wrong: a line on stderr that says what and what is allowed, exit code 2, and no file changed.

argparse puts its usage in front of its own errors, so the last line is looked at, and there are two at most.

The cases run in this process, since importing torch takes longer than all of them; a few run again as processes.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import pytest
import tiny
import torch
from safetensors.torch import load, save

import eval as evaluation
import data
import forgetting

ROOT = Path(__file__).resolve().parent.parent
ROWS = [{"instruction": f"what is the city of p{i} ?", "output": f"the city is {i} ."} for i in range(30)]
QUESTION = {"prompt": "what ? it is ", "choices": ["red", "blue"], "answer": "red"}
BOOLQ = {"question": "is it", "passage": "red", "label": 1}
TRAIN = "forgetting.py --model {model} --data {rows} --out {out} --n-reference 5 --n-train 9 --rank 2 --methods base full"
EVAL = "eval.py --model {model} --tasks mc --data-dir {here}"


@dataclass
class Case:
    """One mistake: the flags that are put behind a good command line, the files that are written first, the message."""

    name: str
    command: str
    message: tuple[str, ...]
    files: dict[str, bytes | str] = field(default_factory=dict)
    before: Callable[[Path], None] = lambda here: None  # what else is to be spoiled


def lines(*rows: object) -> str:
    """JSONL."""
    return tiny.jsonl(rows)


def good(count: int = 9) -> str:
    """The first rows as JSONL."""
    return lines(*ROWS[:count])


def rows_case(
    name: str, content: bytes | str, *message: str, file: str = "bad.jsonl", more: str = ""
) -> Case:
    """A mistake in the training rows."""
    return Case(name, f"{TRAIN} --data {{here}}/{file} {more}", message, {file: content})


def flag_case(flags: str, *message: str) -> Case:
    """A mistake in forgetting.py's flags."""
    return Case(flags, f"{TRAIN} {flags}", message)


def model_case(name: str, spoil: Callable[[Path], None], *message: str, command: str = TRAIN) -> Case:
    """A mistake in a copy of the model."""

    def before(here: Path) -> None:
        shutil.copytree(ROOT / "tests" / "demo_model", here / "copy")
        spoil(here / "copy")

    return Case(name, f"{command} --model {{here}}/copy", message, before=before)


def run_case(name: str, flags: str, spoil: Callable[[Path], None], *message: str) -> Case:
    """A mistake about a run folder that holds a finished run."""
    return Case(
        name,
        f"{TRAIN.replace('{out}', '{here}/run')} {flags}",
        message,
        before=lambda here: spoil(here / "run"),
    )


def adapter_case(name: str, spoil: Callable[[Path], None], *message: str) -> Case:
    """A mistake in eval.py's adapter, which is fine at first."""
    command = f"{EVAL} --adapter {{here}}/run/full/seed-0"
    return Case(name, command, message, before=lambda here: spoil(here / "run/full/seed-0"))


def cut(file: str, size: int) -> Callable[[Path], None]:
    """Keep the first bytes of a file."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def write(file: str, text: str) -> Callable[[Path], None]:
    """Another content."""
    return lambda folder: (folder / file).write_text(text)


def change(file: str, **fields: object) -> Callable[[Path], None]:
    """Other fields in a JSON file; None takes one out."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | fields
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return spoil


def tensors(file: str, edit: Callable[[dict], dict]) -> Callable[[Path], None]:
    """Other tensors in a safetensors file."""
    return lambda folder: (folder / file).write_bytes(save(edit(load((folder / file).read_bytes()))))


def header(file: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    """A safetensors header with a few bytes changed."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes().replace(old, new, 1))


def remove(file: str) -> Callable[[Path], None]:
    """One file less."""
    return lambda folder: (folder / file).unlink()


def index_alone(text: str) -> Callable[[Path], None]:
    """An index, and no model.safetensors, which would be taken instead."""

    def spoil(folder: Path) -> None:
        remove(WEIGHTS)(folder)
        write("model.safetensors.index.json", text)(folder)

    return spoil


def nothing(folder: Path) -> None:
    """All is as it should be."""


def small_vocabulary(folder: Path) -> None:
    """A model whose embedding has fewer rows than its tokenizer has tokens."""
    change("config.json", vocab_size=16)(folder)
    tensors(
        "model.safetensors",
        lambda t: t | {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:16].clone()},
    )(folder)


def other_adapter(folder: Path) -> None:
    """A GPT-Neo's adapter."""
    change("adapter_config.json", target_modules=["c_fc"])(folder)


def resized(t: dict) -> dict:
    """A model's tensors, one of another shape."""
    return t | {"model.norm.weight": t["model.norm.weight"][:8].clone()}


def spoiled(value: float) -> Callable[[dict], dict]:
    """One value of the first tensor replaced."""

    def edit(t: dict) -> dict:
        first = sorted(t)[0]
        t[first].view(-1)[0] = value
        return t

    return edit


WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
CASES = [
    # the training rows
    rows_case("an empty file", "", "bad.jsonl: no rows in it"),
    rows_case("blank lines only", "\n \n", "bad.jsonl: no rows in it"),
    Case("a missing file", f"{TRAIN} --data {{here}}/nope.jsonl", ("nope.jsonl: no such file",)),
    Case("a folder", f"{TRAIN} --data {{here}}", ("a folder, not a file",)),
    rows_case("line 1734 is not JSON", good(1) * 1733 + "{oops\n", "bad.jsonl:1734: not valid JSON"),
    rows_case("not UTF-8", good().encode() + b'{"prompt": "\xff"}', "bad.jsonl: not UTF-8 (byte "),
    rows_case("UTF-16", good().encode("utf-16"), "bad.jsonl: not UTF-8 (byte 0)"),
    rows_case(
        "half a character",
        good() + '{"prompt": "a", "completion": "\\ud83d"}',
        "bad.jsonl:10: \\ud83d alone is half",
    ),
    rows_case("nested without end", "[" * 100_000, "bad.jsonl:1: not valid JSON"),
    rows_case("a row that is a list", good() + "[1]", "bad.jsonl:10: a row must be an object, not list"),
    rows_case(
        "JSON that is no list",
        '{"prompt": "a"}',
        "bad.json: a list of rows is expected, or an object",
        "not dict",
        file="bad.json",
    ),
    rows_case("JSON cut off", "[" + good(1), "bad.json: not valid JSON", file="bad.json"),
    rows_case(
        "an unknown format",
        good() + lines({"question": "a", "answer": "b"}),
        "bad.jsonl:10: unknown format, fields found: answer, question; known: messages; conversations; prompt + completion",
    ),
    rows_case("no fields at all", lines({}), "bad.jsonl:1: unknown format, fields found: none"),
    rows_case(
        "a number for a text",
        good() + lines({"prompt": "a", "completion": 5}),
        "bad.jsonl:10: completion must be a string, not int",
    ),
    rows_case(
        "a list for the input",
        lines({"instruction": "a", "input": ["b"], "output": "c"}),
        "bad.jsonl:1: input must be a string, not list",
    ),
    rows_case(
        "an empty response",
        good() + lines({"prompt": "a", "completion": ""}),
        "bad.jsonl:10: completion is empty",
    ),
    rows_case(
        "messages that are a text",
        lines({"messages": "hi"}),
        "bad.jsonl:1: messages must be a list of messages, not str",
    ),
    rows_case(
        "an unknown role",
        lines({"messages": [{"role": "bot", "content": "x"}]}),
        "role 'bot'",
        "user, assistant",
    ),
    rows_case(
        "roles in a wrong order",
        lines({"messages": [{"role": r, "content": "x"} for r in ("assistant", "user")]}),
        "bad.jsonl:1: user and assistant must take turns, starting with user, not assistant, user",
    ),
    rows_case(
        "content in parts that are no text",
        lines({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        "bad.jsonl:1: a part of a content must be of type text, not image",
    ),
    rows_case(
        "a field that cannot be rendered",
        good() + lines({"prompt": "a", "completion": "b", "tools": [1]}),
        "bad.jsonl:10: tools cannot be rendered",
    ),
    flag_case("--template model", "demo_model: it has no chat template, which --template model needs"),
    rows_case(
        "no content",
        lines({"messages": [{"role": "user"}]}),
        "a message must be an object with role and content",
    ),
    rows_case(
        "nothing said",
        lines({"messages": [{"role": "user", "content": "x"}]}),
        "bad.jsonl:1: no assistant message",
    ),
    flag_case("--max-length 1", "all 5 rows were dropped: no response token within --max-length 1"),
    # how many of them
    flag_case(
        "--n-reference 30",
        "--n-reference 30: from 1 to 29 are there (duplicates left out, one row kept for D_train)",
    ),
    flag_case(
        "--n-reference 10 --n-train 21",
        "--n-train 21: from 1 to 20 are there (of 30 rows 0 are exact duplicates, 10 are in D_ref)",
    ),
    flag_case("--n-train 0", "--n-train 0 is not in [1, inf)"),
    flag_case("--n-reference 5 --n-train 26", "--n-train 26: from 1 to 25 are there"),
    flag_case("--data {rows}:31", "rows.jsonl: 31 rows asked for, 1 to 30 are there"),
    flag_case("--data {rows}:0", "rows.jsonl: 0 rows asked for, 1 to 30 are there"),
    flag_case("--data {rows}:1", "D_ref and D_train need a row each: none is left"),
    flag_case("--reference-data {rows} --n-reference 30", "D_ref and D_train need a row each: none is left"),
    # flags
    flag_case("--rho 0", "--rho 0.0 is not in (0, 1]"),
    flag_case("--rho 1.2", "--rho 1.2 is not in (0, 1]"),
    flag_case("--rho nan", "--rho nan is not in (0, 1]"),
    flag_case("--rho 0.8 --forget-rate 0.3", "forget rate 0.3 is not allowed: 0 to 1 - rho = 0.2"),
    flag_case("--forget-rate 0.4", "forget rate 0.4 is not allowed: 0 to 1 - rho = 0.3"),
    flag_case("--batch-size 0", "--batch-size 0 is not in [1, inf)"),
    flag_case("--t-max 1e-6", "--t-max 1e-06 is below --t-min 1e-05"),
    flag_case("--t-max nan", "--t-max nan is not in [0, inf)"),
    flag_case("--lr nan", "--lr nan is not in (0, inf)"),
    flag_case("--lr inf", "--lr inf is not in (0, inf)"),
    flag_case("--alpha 0", "--alpha 0.0 is not in (0, inf)"),
    flag_case("--max-grad-norm -1", "--max-grad-norm -1.0 is not in [0, inf)"),
    flag_case("--dropout 1", "--dropout 1.0 is not in [0, 1)"),
    flag_case("--dropout nan", "--dropout nan is not in [0, 1)"),
    flag_case("--warmup 1", "--warmup 1.0 is not in [0, 1)"),
    flag_case("--rank 0", "--rank 0 is not in [1, inf)"),
    flag_case("--rank 1.5", "argument --rank: invalid int value: '1.5'"),
    flag_case("--epochs many", "argument --epochs: invalid int value: 'many'"),
    flag_case("--seeds", "argument --seeds: expected at least one argument"),
    flag_case("--methods forgetting:rho=2", "--methods forgetting:rho=2: --rho 2.0 is not in (0, 1]"),
    flag_case("--methods forgetting:rank=0.5", "--methods forgetting:rank=0.5: '0.5' is not a value of rank"),
    flag_case(
        "--methods forgetting:lambda_schedule=cosine",
        "--lambda-schedule cosine is not one of linear, constant",
    ),
    flag_case(
        "--methods forgetting:lambda_schedule=balanced",
        "balanced: --lambda-schedule balanced needs --watch-gradients",
    ),
    flag_case("--methods full:rho=0.5", "--methods full:rho=0.5: full does not read rho"),
    flag_case("--methods forgetting:rho=", "'rho=' is not option=value; options: rho, lr, warmup"),
    flag_case("--methods forgetting:rh=0.5", "'rh=0.5' is not option=value; options: rho, lr"),
    flag_case("--methods forgetting:dtype=float16", "'dtype=float16' is not option=value; options: rho"),
    flag_case("--methods forgetting:t_max=0", "--t-max 0.0 is below --t-min 1e-05"),
    flag_case("--methods base:rho=0.5", "unknown method base; known"),
    flag_case("--methods fulll", "unknown method fulll; known: base, reference, full, dft, ignoring"),
    flag_case("--learning-rate 1", "unrecognized arguments: --learning-rate 1"),
    flag_case("--dtype int8", "argument --dtype: invalid choice: 'int8' (choose from"),
    flag_case("--dtype float16", "argument --dtype: invalid choice: 'float16' (choose from"),
    flag_case(
        "--targets wq", "LoRA target wq names no linear layer of the model; it has down_proj, gate_proj"
    ),
    flag_case("--device tpu", "--device tpu is not supported: cpu or cuda"),
    flag_case("--device cuda", "--device cuda: torch sees no CUDA device here"),
    flag_case("--device cpu:x", "--device cpu:x is not supported: cpu or cuda"),
    flag_case("--tasks bool", "unknown task bool; known: truthfulqa_mc1"),
    flag_case(
        "--tasks boolq --data-dir {here}/nowhere",
        "--data-dir",
        "nowhere has no boolq.jsonl, the rows of boolq",
        "(./run.sh get_data boolq --out",
        "nowhere fetches it)",
    ),
    flag_case("--tasks mc", "--data-dir runs/data has no mc.jsonl, the rows of mc\n"),
    flag_case("--data flan_v2", "flan_v2: no such file (public sets: ./run.sh get_data --help)"),
    flag_case("--eval-every 3", "--eval-every needs --eval-data"),
    Case(
        "a model without data",
        "forgetting.py --model {model} --out {out}",
        ("--model and --data are needed (./run.sh alone runs a demo",),
    ),
    Case(
        "an out that is a file",
        TRAIN.replace("{out}", "{rows}"),
        ("--out", "rows.jsonl is a file: a folder is needed"),
    ),
    # the model
    flag_case("--model {here}/nowhere", "nowhere: no such folder, and not a Hub id of the form owner/name"),
    flag_case("--model owner/name", "owner/name", "HF_HUB_OFFLINE"),
    model_case("no weights", remove(WEIGHTS), "neither model.safetensors nor model.safetensors.index.json"),
    model_case(
        "no config",
        remove("config.json"),
        "no config.json in it, so it is not a Hugging Face checkpoint folder",
    ),
    model_case("no tokenizer", remove("tokenizer.json"), "no tokenizer.json in it"),
    model_case("a config cut off", cut("config.json", 90), "copy/config.json: not valid JSON"),
    model_case(
        "a config that is a list", write("config.json", "[]"), "config.json: an object is expected, not list"
    ),
    model_case(
        "an unknown architecture",
        change("config.json", architectures=["BertModel"]),
        "config.json: architecture BertModel is not supported; supported: LlamaForCausalLM",
    ),
    model_case(
        "a missing size",
        change("config.json", hidden_size=None),
        "config.json: hidden_size = None is not a whole",
    ),
    model_case(
        "a size that is a text",
        change("config.json", vocab_size="1k"),
        "config.json: vocab_size = '1k' is not a whole",
    ),
    model_case(
        "no heads",
        change("config.json", num_attention_heads=0),
        "config.json: num_attention_heads = 0 is not",
    ),
    model_case(
        "a tokenizer that is none", write("tokenizer.json", "{}"), "copy/tokenizer.json: not a tokenizer file"
    ),
    model_case(
        "a tokenizer config cut off", cut("tokenizer_config.json", 9), "tokenizer_config.json: not valid JSON"
    ),
    model_case(
        "an eos that is a number", change("tokenizer_config.json", eos_token=3), "eos_token 3 is not a text"
    ),
    model_case(
        "ids past the embedding",
        small_vocabulary,
        "copy: its tokenizer gives id",
        "the model's vocab_size is 16",
    ),
    model_case(
        "weights cut off", cut(WEIGHTS, 100_000), "copy/model.safetensors: not a whole safetensors file"
    ),
    model_case(
        "weights of no bytes", cut(WEIGHTS, 0), "copy/model.safetensors: not a whole safetensors file"
    ),
    model_case(
        "a header without end",
        header(WEIGHTS, b'{"', b"{{"),
        "model.safetensors: not a whole safetensors file",
    ),
    model_case(
        "a tensor renamed",
        header(WEIGHTS, b"model.norm.weight", b"model.nose.weight"),
        "model.safetensors: tensor model.nose.weight is unexpected",
    ),
    model_case(
        "a tensor of another shape",
        tensors(WEIGHTS, resized),
        "tensor model.norm.weight has shape (8,), expected (160,)",
    ),
    model_case(
        "a tensor missing",
        tensors(WEIGHTS, lambda t: {k: t[k] for k in t if "norm" not in k}),
        "tensors missing",
    ),
    model_case(
        "a weight that is not finite",
        tensors(WEIGHTS, spoiled(float("nan"))),
        "holds values that are not finite",
    ),
    model_case(
        "whole numbers for weights",
        tensors(WEIGHTS, lambda t: {k: v.char() for k, v in t.items()}),
        "is torch.int8; read are",
    ),
    model_case("an index without map", index_alone("{}"), "index.json: no weight_map in it"),
    model_case(
        "an index out of the folder",
        index_alone('{"weight_map": {"a": "../b"}}'),
        "index.json: a points to '../b', which is not a file of this folder",
    ),
    model_case(
        "an index that names an absent file",
        index_alone('{"weight_map": {"a": "b"}}'),
        "index.json: b is named there",
    ),
    # a run folder
    run_case("a run on other data", "--n-train 8", nothing, "was made with other training data (there"),
    run_case(
        "a run with another rate",
        "--lr 0.5",
        nothing,
        "run was made with other lr (there 0.0001, now 0.5); reference_lr",
        "use another --out",
    ),
    run_case(
        "another rank", "--rank 3", nothing, "was made with other rank (there 2, now 3): use another --out"
    ),
    run_case(
        "a wrong target, where a run is", "--targets wq", nothing, "LoRA target wq names no linear layer"
    ),
    run_case(
        "scores cut off",
        "",
        cut("scores.safetensors", 50),
        "run/scores.safetensors: not a whole file of scores",
    ),
    run_case("a config that is not JSON", "", cut("config.json", 20), "run/config.json: not valid JSON"),
    Case(
        "a folder of others",
        TRAIN.replace("{out}", "{here}"),
        ("holds files that are not of a run: use another --out",),
        {"reference/mine.txt": "precious"},
    ),
    Case(
        "a config of others",
        TRAIN.replace("{out}", "{here}"),
        ("its config.json is not of a run: use another --out",),
        {"config.json": '{"architectures": []}'},
    ),
    # eval.py
    Case("no model", "eval.py --tasks mc", ("the following arguments are required: --model",)),
    Case("no task", "eval.py --model {model} --tasks", ("argument --tasks: expected at least one argument",)),
    Case("an unknown task", f"{EVAL} --tasks mmlu", ("unknown task mmlu; known: truthfulqa_mc1",)),
    Case("a limit of 0", f"{EVAL} --limit 0", ("--limit 0 is not allowed: a whole number",)),
    Case("a limit between 1 and 2", f"{EVAL} --limit 1.5", ("--limit 1.5 is not allowed: a whole number",)),
    Case("no room in a pass", f"{EVAL} --batch-tokens 0", ("--batch-tokens 0 is not allowed: at least 1",)),
    Case("tasks and a prompt", f"{EVAL} --prompt x", ("either --tasks or --prompt is needed",)),
    Case("neither tasks nor a prompt", "eval.py --model {model}", ("either --tasks or --prompt is needed",)),
    Case("two adapters for tasks", f"{EVAL} --adapter a b", ("--tasks take one --adapter at a time, not 2",)),
    Case("an absent GPU", f"{EVAL} --device cuda", ("--device cuda: torch sees no CUDA device here",)),
    Case(
        "missing rows",
        f"{EVAL} --tasks mc boolq",
        ("has no boolq.jsonl, the rows of boolq (./run.sh get_data",),
    ),
    Case(
        "a row that lacks a field",
        f"{EVAL} --tasks boolq",
        ("boolq.jsonl:2: no field 'label'",),
        {"boolq.jsonl": lines(BOOLQ, {"question": "is it", "passage": "red"})},
    ),
    Case(
        "a label out of range",
        f"{EVAL} --tasks boolq",
        ("boolq.jsonl:1: 2 choices, the right one is number 7",),
        {"boolq.jsonl": lines(BOOLQ | {"label": 7})},
    ),
    Case(
        "an answer among no choice",
        f"{EVAL} --tasks mc",
        ("mc.jsonl:1: answer 'green' is none of the choices, nor a place among them",),
        {"mc.jsonl": lines(QUESTION | {"answer": "green"})},
    ),
    Case(
        "an answer past the choices",
        f"{EVAL} --tasks mc",
        ("mc.jsonl:1: 2 choices, the right one is number 2",),
        {"mc.jsonl": lines(QUESTION | {"answer": 2})},
    ),
    Case(
        "choices that are a text",
        f"{EVAL} --tasks mc",
        ("mc.jsonl:1: choices must be a list of texts, not str",),
        {"mc.jsonl": lines(QUESTION | {"choices": "red blue"})},
    ),
    Case(
        "a prompt that is a number",
        f"{EVAL} --tasks qa",
        ("qa.jsonl:2: a prompt must be a text, not int",),
        {"qa.jsonl": lines({"prompt": "1 + 1 =", "answer": "2"}, {"prompt": 5, "answer": "2"})},
    ),
    Case(
        "no right answer",
        f"{EVAL} --tasks qa",
        ("qa.jsonl:1: ",),
        {"qa.jsonl": lines({"prompt": "1 + 1 =", "answer": []})},
    ),
    Case(
        "an id that is a number",
        f"{EVAL} --tasks tydiqa",
        ("tydiqa.jsonl: a row, or what belongs beside the rows, is",),
        {
            "tydiqa.jsonl": lines({"id": 5}),
            "tydiqa_1shot.jsonl": lines({"id": 5}),
            "tydiqa_templates.json": '{"with_context": {}}',
        },
    ),
    Case(
        "what belongs beside the rows",
        f"{EVAL} --tasks truthfulqa",
        ("truthfulqa.jsonl: ", "truthfulqa_prompt.txt"),
        {"truthfulqa.jsonl": lines({"question": "?"})},
    ),
    Case(
        "an answer of no token",
        f"{EVAL} --tasks asdiv",
        ("asdiv.jsonl:1: continuation '' adds no token",),
        {"asdiv.jsonl": lines({"body": "One.", "question": "How many?", "answer": ""})},
    ),
    model_case(
        "ids past the embedding in a task",
        small_vocabulary,
        "copy: its tokenizer gives id",
        "vocab_size is 16",
        command=EVAL,
    ),
    model_case(
        "weights cut off, in eval.py",
        cut(WEIGHTS, 5),
        "copy/model.safetensors: not a whole safetensors",
        command=EVAL,
    ),
    # adapters
    Case(
        "no adapter there",
        f"{EVAL} --adapter {{here}}/nowhere",
        ("nowhere: no adapter_config.json in it", "one on the Hub: hf download"),
    ),
    adapter_case("an adapter without config", remove("adapter_config.json"), "no adapter_config.json in it"),
    adapter_case("an adapter without weights", remove(ADAPTER), "no adapter_model.safetensors in it"),
    adapter_case(
        "an adapter's config cut off", cut("adapter_config.json", 30), "adapter_config.json: not valid JSON"
    ),
    adapter_case(
        "an adapter's config of a list",
        write("adapter_config.json", "[1]"),
        "adapter_config.json: ",
        "object",
    ),
    adapter_case("an adapter cut off", cut(ADAPTER, 3000), f"{ADAPTER}: not a whole safetensors file"),
    adapter_case(
        "an adapter of another model", other_adapter, "seed-0: does not fit this model: LoRA target c_fc"
    ),
    adapter_case(
        "an adapter of another rank",
        change("adapter_config.json", r=4),
        "does not fit this model",
        "has shape",
    ),
    adapter_case(
        "half a rank",
        change("adapter_config.json", r=0.5),
        "adapter_config.json: r = 0.5 is not a number above 0",
    ),
    adapter_case(
        "an alpha that is a text",
        change("adapter_config.json", lora_alpha="16"),
        "lora_alpha = '16' is not a number",
    ),
    adapter_case(
        "another kind of adapter",
        change("adapter_config.json", peft_type="IA3"),
        "peft_type = 'IA3' is not supported",
    ),
    adapter_case(
        "an adapter that is not finite",
        tensors(ADAPTER, spoiled(float("inf"))),
        "holds values that are not finite",
    ),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, demo_model) -> Path:
    """A folder with rows, questions and a finished run, made as a user makes it."""
    here = tmp_path_factory.mktemp("finished")
    (here / "rows.jsonl").write_text(lines(*ROWS))
    (here / "mc.jsonl").write_text(lines(QUESTION))
    with pytest.MonkeyPatch.context() as patch:
        command = TRAIN.format(model=demo_model, rows=here / "rows.jsonl", out=here / "run")
        patch.setattr(sys, "argv", command.split())
        forgetting.main()
    return here


def prepared(case: Case, finished: Path, here: Path, model: Path) -> list[str]:
    """The command line of a case, whose files are written."""
    shutil.copytree(finished, here, dirs_exist_ok=True)
    for name, content in case.files.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    case.before(here)
    return case.command.format(model=model, rows=here / "rows.jsonl", out=here / "new", here=here).split()


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file in a folder, and its subfolders."""
    hashed = lambda path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return {str(path.relative_to(folder)): hashed(path) for path in folder.rglob("*")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_line_exit_code_2_and_nothing_written(case, finished, demo_model, tmp_path, monkeypatch, capsys):
    if "no CUDA device" in " ".join(case.message) and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    monkeypatch.setattr(sys, "argv", prepared(case, finished, tmp_path, demo_model))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        (forgetting if sys.argv[0] == "forgetting.py" else evaluation).main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    *usage, last = said.splitlines(keepends=True)
    assert last.startswith(f"{sys.argv[0]}: ") and last.endswith("\n"), said
    assert len(usage) <= 1 and all(line.startswith("usage: ./run.sh ") for line in usage), said
    assert [part for part in case.message if part not in last] == [], said
    assert contents(tmp_path) == before


def test_the_table_is_long_enough_and_its_names_differ():
    assert len({case.name for case in CASES}) == len(CASES) >= 45


def test_no_traceback_from_a_process(finished, demo_model, tmp_path):
    case = next(case for case in CASES if case.name == "line 1734 is not JSON")
    script, *arguments = prepared(case, finished, tmp_path, demo_model)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and case.message[0] in done.stderr


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(good(2).encode("utf-8-sig"))
    (tmp_path / "bom.json").write_bytes(json.dumps(ROWS[:3]).encode("utf-8-sig"))
    assert len(forgetting.read_rows([str(tmp_path / "bom.jsonl"), str(tmp_path / "bom.json")])) == 5


def test_ids_past_the_embedding_are_no_mistake_where_they_do_not_occur(tmp_path):
    """Many tokenizers know a padding token that was added after the model was trained."""
    folder = tiny.make_checkpoint(tmp_path, "llama3")
    corpus = data.build_corpus(ROWS[:3], data.Tokenizer(folder))
    forgetting.check_ids(corpus.tokens, int(corpus.tokens.max()) + 1, folder)
    with pytest.raises(ValueError, match="not a pair"):
        forgetting.check_ids(corpus.tokens, int(corpus.tokens.max()), folder)
