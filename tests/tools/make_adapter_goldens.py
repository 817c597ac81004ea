"""Store what PEFT's LoraConfig holds, and check by hand that adapters and published folders do in the peers what they do here.

    /path/to/peers/bin/python tests/tools/make_adapter_goldens.py     # by hand, with a Python that has transformers and peft

Writes goldens/lora_config.json, every key of LoraConfig with its default. Fails if a config that load_adapter takes gives
other logits in PEFT, or if transformers and PEFT do not read what publish.py writes.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent.parent  # tests/, where tiny.py and goldens/ are
sys.path[:0] = [str(HERE), str(HERE.parent)]
import tiny  # noqa: E402

from lora import load_adapter  # noqa: E402
from model import load_model  # noqa: E402

KIND = "llama3"
SAME = {  # configs that load_adapter takes, as arguments of LoraConfig
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "names that the model lacks": {"target_modules": ["q_proj", "c_attn", "W_pack"]},
    "a regular expression": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear with exceptions": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "one layer, the first": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers by a list": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "fan_in_fan_out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "rank pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    "activated": {"target_modules": ["q_proj"], "alora_invocation_tokens": [5, 6]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}
REFUSED = list(SAME)[list(SAME).index("rank pattern") :]


def theirs(folder: Path):
    """transformers' model of a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def difference(their_model, our_model) -> float:
    """Greatest difference of the logits of tiny.golden_inputs."""
    sequences = tiny.golden_inputs(KIND)
    logits = torch.cat([their_model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences])
    cu_seqlens = torch.tensor([0] + [len(s) for s in sequences]).cumsum(0).int()
    return (our_model.lm_head(our_model(torch.cat(sequences), cu_seqlens)) - logits).abs().max().item()


def write_defaults() -> None:
    """Every key that PEFT writes into adapter_config.json, with its default."""
    defaults = {key: value for key, value in LoraConfig().to_dict().items() if key != "peft_version"}
    text = json.dumps(defaults | {"peft_type": "LORA", "peft_version": None}, indent=1, sort_keys=True)
    (HERE / "goldens" / "lora_config.json").write_text(text + "\n")
    print(len(defaults) + 1, "keys of LoraConfig")


def check_configs(folder: Path) -> None:
    """Each config of SAME: PEFT writes an adapter, with random weights, and both sides load it."""
    tiny.make_checkpoint(folder / "m", KIND)
    for number, (name, arguments) in enumerate(SAME.items()):
        adapter = folder / str(number)
        config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **arguments)
        with contextlib.redirect_stderr(io.StringIO()):
            get_peft_model(theirs(folder / "m"), config).save_pretrained(adapter)
        path = adapter / "adapter_model.safetensors"
        shapes = {key: tuple(tensor.shape) for key, tensor in load_file(path).items()}
        save_file(tiny.adapter_weights(shapes), path, metadata={"format": "pt"})
        ours = load_model(folder / "m")
        try:
            load_adapter(ours, adapter)
        except ValueError as error:
            assert name in REFUSED, (name, error)
            print(f"{name}: refused, {str(error).removeprefix(str(folder))}")
            continue
        assert name not in REFUSED, name
        worst = difference(PeftModel.from_pretrained(theirs(folder / "m"), adapter).eval(), ours)
        assert worst < 1e-4, (name, worst)
        print(f"{name}: {len(shapes)} tensors, logits differ by {worst:.1e}")


if __name__ == "__main__":
    write_defaults()
    with tempfile.TemporaryDirectory() as temporary:
        check_configs(Path(temporary))
