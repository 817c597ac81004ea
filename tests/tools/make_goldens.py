"""Store what transformers and PEFT compute for the checkpoints of tiny.py, and check both directions of exchange.

    /path/to/peers/bin/python tests/tools/make_goldens.py        # by hand, with a Python that has transformers and peft

Writes goldens/logits.safetensors, adapters.safetensors, families.safetensors and configs.json. Fails if PEFT does not read
our adapters with equal logits, or transformers our merged exports.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).resolve().parent.parent  # tests/, where tiny.py and goldens/ are
sys.path[:0] = [str(HERE), str(HERE.parent)]
import tiny  # noqa: E402

import lora  # noqa: E402
import model as ours  # noqa: E402

ADAPTED = ("llama3", "qwen2", "gpt_neo")


def theirs(folder: str, dtype: torch.dtype = torch.float32):
    """transformers' model of a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()


@torch.no_grad()
def logits_of(model, kind: str) -> torch.Tensor:
    """(all tokens, V): the sequences one by one."""
    return torch.cat(
        [model(input_ids=ids[None], use_cache=False).logits[0] for ids in tiny.golden_inputs(kind)]
    )


@torch.no_grad()
def our_logits(model, kind: str) -> torch.Tensor:
    """The same from one packed call."""
    sequences = tiny.golden_inputs(kind)
    return model.lm_head(
        model(torch.cat(sequences), torch.tensor([0] + [len(s) for s in sequences]).cumsum(0).int())
    )


def plain_goldens() -> dict[str, torch.Tensor]:
    """Logits of every kind of checkpoint; the two dialects of config.json mean the same."""
    goldens = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in tiny.KINDS:
            goldens[kind] = logits_of(theirs(tiny.make_checkpoint(Path(folder) / kind, kind, 5)), kind)
            old = theirs(tiny.make_checkpoint(Path(folder) / f"{kind}-4", kind, 4))
            assert torch.equal(goldens[kind], logits_of(old, kind)), kind
        rounded = tiny.make_checkpoint(Path(folder) / "bf16", "llama3", dtype=torch.bfloat16)
        goldens["llama3.bfloat16"] = logits_of(theirs(rounded), "llama3")
    return goldens


def adapter_goldens() -> dict[str, torch.Tensor]:
    """An adapter as PEFT writes it (keys and shapes; weights are tiny.adapter_weights) and the logits it gives there."""
    goldens = {}
    for kind in ADAPTED:
        with tempfile.TemporaryDirectory() as folder:
            tiny.make_checkpoint(Path(folder) / "m", kind)
            targets = [
                t
                for t in lora.DEFAULT_TARGETS
                if any(t in n for n in tiny.shapes_of(tiny.config_of(kind, 4)))
            ]
            config = LoraConfig(
                r=4, lora_alpha=8, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM"
            )
            get_peft_model(theirs(f"{folder}/m"), config).save_pretrained(f"{folder}/a")
            path = Path(folder) / "a" / "adapter_model.safetensors"
            shapes = {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}
            save_file(tiny.adapter_weights(shapes), path, metadata={"format": "pt"})
            with_adapter = logits_of(
                PeftModel.from_pretrained(theirs(f"{folder}/m"), f"{folder}/a").eval(), kind
            )
            goldens[f"{kind}.logits"] = with_adapter[:, ::3].contiguous()
            goldens |= {f"{kind}/{name}": torch.tensor(shape) for name, shape in shapes.items()}

            mine = ours.load_model(f"{folder}/m")
            lora.load_adapter(mine, f"{folder}/a")
            print(kind, "PEFT's adapter here:", distance(our_logits(mine, kind), with_adapter))
            lora.save_adapter(mine, f"{folder}/b", f"{folder}/m")
            back = logits_of(PeftModel.from_pretrained(theirs(f"{folder}/m"), f"{folder}/b").eval(), kind)
            print(kind, "our adapter in PEFT:", distance(our_logits(mine, kind), back))
            lora.merge_lora(mine)
            ours.save_model(mine, f"{folder}/merged")
            merged = logits_of(theirs(f"{folder}/merged"), kind)
            print(
                kind,
                "our merged export in transformers:",
                distance(our_logits(mine, kind), merged),
                distance(merged, back),
            )
    return goldens


def family_goldens() -> dict[str, torch.Tensor]:
    """Logits of the later families, in both dialects, and our copies of them read back there."""
    goldens = {}
    for kind in tiny.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            logits = logits_of(theirs(tiny.make_checkpoint(Path(folder) / "m", kind, 5)), kind)
            assert torch.equal(
                logits, logits_of(theirs(tiny.make_checkpoint(Path(folder) / "m", kind, 4)), kind)
            ), kind
            goldens[kind] = logits[:, ::9].contiguous()
            mine = ours.load_model(f"{folder}/m")
            print(kind, "here:", distance(our_logits(mine, kind), logits))
            ours.save_model(mine, f"{folder}/copy")
            print(
                kind, "our copy in transformers:", distance(logits_of(theirs(f"{folder}/copy"), kind), logits)
            )
    return goldens


@torch.no_grad()
def config_goldens() -> dict:
    """Every case of tiny.CONFIG_CASES: a few logits, or null where transformers fails; and the fields of every class."""
    cases = {}
    for kind, changes, _ in tiny.CONFIG_CASES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                model = theirs(tiny.make_config_case(Path(folder), kind, changes))
                logits = tiny.case_logits(model(input_ids=tiny.CASE_TOKENS[None], use_cache=False).logits[0])
            except Exception as error:  # of many types
                print(kind, changes, "fails there:", type(error).__name__, " ".join(str(error).split())[:80])
                logits = None
        cases[tiny.case_name(kind, changes)] = logits
    fields = {}
    for kind in ("llama2", "mistral", "qwen2", "qwen3", "smollm3", "gpt_neo"):
        configuration = AutoConfig.for_model(tiny.CONFIGS[kind]["model_type"]).__class__
        fields[configuration.model_type] = {
            field.name: field.default for field in dataclasses.fields(configuration)
        }
        if kind != "gpt_neo":
            fields[configuration.model_type]["rope_theta"] = configuration.default_theta
    return {"fields": fields, "cases": cases}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Greatest difference, which must be small."""
    worst = (a - b).abs().max().item()
    assert worst < 2e-4, worst
    return worst


if __name__ == "__main__":
    folder = HERE / "goldens"
    folder.mkdir(exist_ok=True)
    # a third of the columns is plenty to notice a mistake and keeps the files small
    save_file(
        {name: logits[:, ::3].contiguous() for name, logits in plain_goldens().items()},
        folder / "logits.safetensors",
    )
    save_file(adapter_goldens(), folder / "adapters.safetensors")
    save_file(family_goldens(), folder / "families.safetensors")
    parts = {}
    for part, entries in config_goldens().items():  # a line for each entry; a default factory has no value
        lines = [
            f"  {json.dumps(name)}: {json.dumps(entry, default=lambda x: None)}"
            for name, entry in entries.items()
        ]
        parts[part] = "{\n" + ",\n".join(lines) + "\n }"
    text = ",\n".join(f" {json.dumps(part)}: {lines}" for part, lines in parts.items())
    (folder / "configs.json").write_text("{\n" + text + "\n}\n")
