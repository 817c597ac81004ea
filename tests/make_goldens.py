"""Store transformers' logits for the checkpoints of tiny.py. By hand, with a Python that has transformers:

    /path/to/peers/bin/python tests/make_goldens.py
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tiny  # noqa: E402


@torch.no_grad()
def logits_of(kind: str, dialect: int, dtype: torch.dtype) -> torch.Tensor:
    """(all tokens, V): the sequences one by one, eager attention, float32."""
    with tempfile.TemporaryDirectory() as folder:
        tiny.make_checkpoint(Path(folder), kind, dialect, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in tiny.golden_inputs(kind)])


if __name__ == "__main__":
    goldens = {}
    for kind in tiny.KINDS:
        goldens[kind] = logits_of(kind, 5, torch.float32)
        assert torch.equal(goldens[kind], logits_of(kind, 4, torch.float32)), "the dialects mean the same"
    goldens["llama3.bfloat16"] = logits_of("llama3", 5, torch.bfloat16)
    folder = Path(__file__).parent / "goldens"
    folder.mkdir(exist_ok=True)
    # a third of the columns is plenty to notice a mistake and keeps the file small
    save_file({name: logits[:, ::3].contiguous() for name, logits in goldens.items()}, folder / "logits.safetensors")
    print({name: tuple(logits.shape) for name, logits in goldens.items()})
