"""Store what PEFT's LoraConfig holds, and check by hand that adapters and published folders do in the peers what they do here.

    /path/to/peers/bin/python tests/tools/make_adapter_goldens.py     # by hand, with a Python that has transformers and peft

Writes goldens/lora_config.json, every key of LoraConfig with its default, and goldens/tokenizers.json, the ids that
AutoTokenizer gives in published folders. Fails if a config that load_adapter takes gives other logits in PEFT, or if
transformers and PEFT do not read what publish.py writes.
"""

import contextlib
import io
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent.parent  # tests/, where tiny.py and goldens/ are
sys.path[:0] = [str(HERE), str(HERE.parent)]
import published  # noqa: E402
import tiny  # noqa: E402
from make_goldens import distance, logits_of, our_logits, theirs  # noqa: E402

from data import Tokenizer, build_corpus, write_rows, write_text  # noqa: E402
from lora import load_adapter, merge_lora  # noqa: E402
from model import load_model  # noqa: E402

KIND = "llama3"
TAKEN = {  # configs that load_adapter takes, as arguments of LoraConfig; with q_proj alone where no targets are named
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "names that the model lacks": {"target_modules": ["q_proj", "c_attn", "W_pack"]},
    "a regular expression": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear with exceptions": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "one layer, the first": {"layers_to_transform": 0},
    "layers by a list": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "rslora": {"use_rslora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "gaussian": {"init_lora_weights": "gaussian"},
}
REFUSED = {
    "rank pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    "activated": {"alora_invocation_tokens": [5, 6]},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"modules_to_save": ["norm"]},
}


def difference(their_model, our_model) -> float:
    """Greatest difference of the logits, which must be small."""
    return distance(logits_of(their_model, KIND), our_logits(our_model, KIND))


def write_defaults() -> None:
    """Every key that PEFT writes into adapter_config.json, with its default."""
    defaults = {key: value for key, value in LoraConfig().to_dict().items() if key != "peft_version"}
    text = json.dumps(defaults | {"peft_type": "LORA", "peft_version": None}, indent=1, sort_keys=True)
    (HERE / "goldens" / "lora_config.json").write_text(text + "\n")
    print(len(defaults) + 1, "keys of LoraConfig")


def check_configs(folder: Path) -> None:
    """PEFT writes an adapter of each config, with random weights, and both sides load it."""
    tiny.make_checkpoint(folder / "m", KIND)
    for number, (name, arguments) in enumerate((TAKEN | REFUSED).items()):
        adapter = folder / str(number)
        config = LoraConfig(
            r=4, lora_alpha=8, task_type="CAUSAL_LM", **({"target_modules": ["q_proj"]} | arguments)
        )
        with contextlib.redirect_stderr(io.StringIO()):
            get_peft_model(theirs(folder / "m"), config).save_pretrained(adapter)
        path = adapter / "adapter_model.safetensors"
        shapes = {key: tuple(tensor.shape) for key, tensor in load_file(path).items()}
        save_file(tiny.adapter_weights(shapes), path, metadata={"format": "pt"})
        ours = load_model(folder / "m")
        try:
            load_adapter(ours, adapter)
            assert name in TAKEN, name
        except ValueError as error:
            assert name in REFUSED, (name, error)
            print(f"{name}: refused, {str(error).removeprefix(str(folder))}")
        else:
            worst = difference(PeftModel.from_pretrained(theirs(folder / "m"), adapter).eval(), ours)
            print(f"{name}: {len(shapes)} tensors, logits differ by {worst:.1e}")


def write_tokenizers(folder: Path) -> None:
    """What AutoTokenizer makes of each published folder: ids of texts, and of a conversation by the template there."""
    goldens = {}
    for number, (case, merged) in enumerate(itertools.product(published.CASES, (False, True))):
        out = published.published_folder(folder / str(number), case, merged)
        tokenizer = AutoTokenizer.from_pretrained(out)
        if merged and case == "qwen2 of another tokenizer":  # as the card says
            assert type(tokenizer).__name__ == "Qwen2Tokenizer"
            tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
        name = f"{case}, {'merged' if merged else 'adapter'}"
        goldens[name] = {
            "tokenizer_config.json": json.loads((out / "tokenizer_config.json").read_text()),
            "texts": [tokenizer(text)["input_ids"] for text in published.TEXTS],
            "conversation": tokenizer.apply_chat_template(published.CONVERSATION, return_dict=True)[
                "input_ids"
            ],
        }
        print(f"{name}: {type(tokenizer).__name__}")
    write_text(json.dumps(goldens) + "\n", HERE / "goldens" / "tokenizers.json")


def program(path: str, *arguments: object) -> None:
    """Run a program of ours with these arguments."""
    subprocess.run([sys.executable, "-W", "ignore", HERE.parent / path, *map(str, arguments)], check=True)


def check_published(folder: Path) -> None:
    """A short training of the demo model, published both ways and read by the peers."""
    base, run = folder / "base", folder / "run"
    shutil.copytree(HERE / "demo_model", base)
    # a base model whose generation stops elsewhere, and whose tokenizer_config.json names no eos
    write_text(json.dumps({"eos_token_id": 5}), base / "generation_config.json")
    write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}), base / "tokenizer_config.json")
    messages = [
        [
            {"role": "user", "content": f"What is {i} plus 2?"},
            {"role": "assistant", "content": f"It is {i + 2}."},
        ]
        for i in range(60)
    ]
    write_rows([{"messages": turns} for turns in messages], folder / "rows.jsonl")
    flags = ["--rank", 64, "--epochs", 10, "--batch-size", 8, "--lr", 2e-3]
    program(
        "forgetting.py",
        "--model",
        base,
        "--data",
        folder / "rows.jsonl",
        "--out",
        run,
        "--methods",
        "full",
        *flags,
    )
    adapter = run / "full" / "seed-0"
    program("tests/tools/publish.py", adapter, folder / "adapter")
    program("tests/tools/publish.py", adapter, folder / "merged", "--merged", "--base-model", "owner/name")

    ours = Tokenizer(base)
    prompts = []
    for name in ("adapter", "merged"):
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        (expected,) = build_corpus([{"messages": messages[0]}], ours).split()
        given = tokenizer.apply_chat_template(messages[0], return_dict=True)["input_ids"]
        assert given == expected.tolist(), (name, given, expected)
        assert tokenizer.eos_token == ours.eos, name
        prompts.append(
            tokenizer.apply_chat_template(messages[0][:1], add_generation_prompt=True, return_tensors="pt")
        )
        config = GenerationConfig.from_pretrained(folder / name)
        assert config.eos_token_id == [5, ours.eos_id], (name, config.eos_token_id)

    mine = load_model(base)
    load_adapter(mine, adapter)
    print(
        "published adapter in PEFT:",
        difference(PeftModel.from_pretrained(theirs(base), folder / "adapter").eval(), mine),
    )
    mine = load_model(base, dtype=torch.bfloat16)
    load_adapter(mine, adapter)
    merge_lora(mine)
    merged = theirs(folder / "merged", "auto")
    assert merged.dtype == torch.bfloat16 and merged.get_input_embeddings().weight.dtype == torch.bfloat16
    print("merged, in transformers:", difference(merged.float(), mine.float()))
    answer = merged.generate(**prompts[1], max_new_tokens=60, do_sample=False)[
        0, prompts[1]["input_ids"].shape[1] :
    ]
    print("it answers", repr(ours.decode(answer.tolist(), skip_special=False)))
    assert answer[-1] == ours.eos_id and len(answer) < 60


if __name__ == "__main__":
    write_defaults()
    with tempfile.TemporaryDirectory() as temporary:
        check_configs(Path(temporary))
    with tempfile.TemporaryDirectory() as temporary:
        write_tokenizers(Path(temporary))
    with tempfile.TemporaryDirectory() as temporary:
        check_published(Path(temporary))
