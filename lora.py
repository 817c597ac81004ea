"""Low-rank adapters on the linear layers of any torch model: add, switch off, merge; PEFT's files.

add_lora(model, r=64, alpha=16)                 # in place; only the adapter is trainable afterwards
with lora_disabled(model):                      # the untouched base model, bit for bit
    base = model(tokens, cu_seqlens)
save_adapter(model, "adapter", base_model="meta-llama/Llama-3.2-1B")     # PeftModel.from_pretrained reads it

y = x W^T + alpha / r * dropout(x) A^T B^T      x (..., in)   A (r, in)   B (out, r)
"""

import json
import math
import os
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# every linear layer of a block: seven of LLaMA and Qwen2; GPT-Neo has q, k, v and the last three
DEFAULT_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "out_proj",
    "c_fc",
    "c_proj",
)
KEY_PREFIX = (
    "base_model.model."  # PEFT's wrapper classes leave their attribute names in the keys of its files
)


def keep_mask(x: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1, for every element of x; uint8. The factor 1 / (1 - p) is the caller's.

    On a CPU one 64-bit draw decides four elements (p rounded to 1/65536): 4 times faster than bernoulli_, and
    a product with uint8 is 2 to 3 times faster than one with bool. F.dropout there costs more than the
    low-rank product it precedes.
    """
    if x.is_cuda:
        return torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - p)
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return (bits[: x.numel()].view_as(x) >= round(p * 2**16) - 2**15).view(torch.uint8)


class _AdaptedProduct(torch.autograd.Function):
    """x W^T + bias + scaling * (x * keep) A^T B^T as one node, for a frozen W; x (n, in), keep (n, in) or
    None -> (n, out).

    The backward pass keeps x, which layers share, and a byte an element of mask, not the masked x; sums go
    into results that are there already. A quarter less memory than the same formula left to autograd, at
    equal speed.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling, keep):
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = F.linear(x if keep is None else keep.to(x.dtype).mul_(x), a).mul_(scaling)  # (n, r)
        ctx.save_for_backward(x, weight, a, b, low, keep)
        ctx.scaling = scaling
        y = F.linear(x, weight, bias)
        if x.dtype == torch.float32:
            return y.addmm_(low, b.T)
        return y.float().add_(F.linear(low, b))  # rounded products, an exact sum

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, low, keep = ctx.saved_tensors
        grad = grad.to(x.dtype)  # (n, out)
        grad_low = (grad @ b).mul_(ctx.scaling)  # (n, r)
        grad_b = grad.T @ low  # (out, r)
        kept = None if keep is None else keep.to(x.dtype)  # (n, in), overwritten by the masked x
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ a  # (n, in)
            grad_x = (grad_x if kept is None else grad_x.mul_(kept)).addmm_(grad, weight)
        grad_a = grad_low.T @ (x if kept is None else kept.mul_(x))  # (r, in)
        return grad_x, None, None, grad_a.float(), grad_b.float(), None, None


class LoRALinear(nn.Linear):
    """A frozen linear layer with a trainable low-rank side path. The adapter is float32; products run in x's
    dtype.

    The sum of both paths is float32 whatever x is: rounded to bfloat16 it would double the error of theta'
    (3.5 % of the tokens on another side of the threshold than in float32, instead of 2.1 %).
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float, rslora: bool = False):
        nn.Module.__init__(self)  # not nn.Linear's: it would draw weights only to have them replaced
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        options = {"bias": False, "dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.utils.skip_init(nn.Linear, base.in_features, r, **options)
        self.lora_B = nn.utils.skip_init(nn.Linear, r, base.out_features, **options)
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora
        self.enabled = True

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        rows, keep, scaling = x.flatten(0, -2), None, self.scaling  # (n, in)
        if self.training and self.dropout > 0:
            keep = keep_mask(rows, self.dropout)
            scaling = scaling / (1 - self.dropout)
        a, b = self.lora_A.weight, self.lora_B.weight
        return _AdaptedProduct.apply(rows, self.weight, self.bias, a, b, scaling, keep).unflatten(
            0, x.shape[:-1]
        )


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name (`...q_proj.lora_A.weight`), in the model's order."""
    parts = ("lora_A", "lora_B")
    return {
        f"{n}.{part}.weight": getattr(m, part).weight for n, m in lora_layers(model).items() for part in parts
    }


def add_lora(
    model: nn.Module,
    r: int = 64,
    alpha: float = 16,
    dropout: float = 0.1,
    targets: tuple[str, ...] = DEFAULT_TARGETS,
    rslora: bool = False,
    generator: torch.Generator | None = None,
) -> None:
    """Replace, in place, every linear layer whose name ends in one of `targets`, and freeze all else.

    A ~ U(-1/sqrt(in), 1/sqrt(in)) as in PEFT, drawn on the CPU from `generator` so that a seed means the same
    on any device; B = 0, so the model's output does not change. Of DEFAULT_TARGETS those count that the model
    has; in a list of one's own, a target that names no linear layer is a ValueError.
    """
    if lora_layers(model):
        raise ValueError("the model has an adapter already: remove_lora or merge_lora first")
    if r < 1:
        raise ValueError(f"rank {r} is not allowed: at least 1")
    chosen = target_layers(model, targets)
    model.requires_grad_(False)
    for name, linear in chosen.items():
        layer = LoRALinear(linear, r, alpha, dropout, rslora).train(linear.training)
        bound = 1 / math.sqrt(layer.in_features)
        a = torch.empty(r, layer.in_features).uniform_(-bound, bound, generator=generator)
        layer.lora_A.weight.data.copy_(a)
        layer.lora_B.weight.data.zero_()
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer)


def target_layers(model: nn.Module, targets: tuple[str, ...] = DEFAULT_TARGETS) -> dict[str, nn.Linear]:
    """The linear layers that add_lora would replace, by name, in the model's order; ValueError for a target
    that is none.
    """
    if "lm_head" in targets:
        raise ValueError(
            "lm_head cannot be a LoRA target here: losses are computed from its weight, a chunk at a time"
        )
    linear = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")
    }
    found = {target: [n for n in linear if n == target or n.endswith("." + target)] for target in targets}
    unknown = sorted(target for target, names in found.items() if not names)
    if unknown and (tuple(targets) != DEFAULT_TARGETS or len(unknown) == len(found)):
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"LoRA target {', '.join(unknown)} names no linear layer of the model; it has {', '.join(known)}"
        )
    chosen = {name for names in found.values() for name in names}
    return {name: layer for name, layer in linear.items() if name in chosen}


def _restore(model: nn.Module, name: str, layer: LoRALinear) -> None:
    plain = nn.utils.skip_init(
        nn.Linear, layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
    )
    plain.weight, plain.bias = layer.weight, layer.bias
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, plain.train(layer.training))


def remove_lora(model: nn.Module) -> None:
    """Drop the adapter: the base model again, with the very weights it had."""
    for name, layer in lora_layers(model).items():
        _restore(model, name, layer)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Fold the adapter into the weights, W + s B A computed in float32 and cast once, and drop it."""
    for name, layer in lora_layers(model).items():
        delta = layer.scaling * (layer.lora_B.weight @ layer.lora_A.weight)  # (out, in)
        merged = (layer.weight.float() + delta).to(layer.weight.dtype)
        layer.weight = nn.Parameter(merged, requires_grad=False)
        _restore(model, name, layer)


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is the base model; afterwards, also after an exception, it is as it was."""
    before = [(layer, layer.enabled) for layer in lora_layers(model).values()]
    try:
        for layer, _ in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


# ---------------------------------------------------------------------------------------- PEFT's files


def save_adapter(model: nn.Module, folder: str | os.PathLike, base_model: str) -> None:
    """Write adapter_model.safetensors (float32) and adapter_config.json, each whole or not at all."""
    folder = Path(folder)
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{folder}: the model has no adapter to save")
    first = next(iter(layers.values()))
    tensors = {
        KEY_PREFIX + name: p.detach().float().cpu().contiguous() for name, p in lora_parameters(model).items()
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "use_rslora": first.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    text = json.dumps(config, indent=2) + "\n"
    _write_whole(folder / "adapter_config.json", lambda file: file.write_text(text, encoding="utf-8"))
    # last: where the weights are, the adapter is whole
    _write_whole(folder / "adapter_model.safetensors", partial(save_file, tensors, metadata={"format": "pt"}))


def read_adapter_config(folder: str | os.PathLike) -> dict:
    """adapter_config.json as the arguments of add_lora; ValueError names what this file does not compute."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no adapter_config.json in it, so it is not an adapter folder")
    raw = _read_json(path)
    allowed = {"peft_type": ("LORA",), "bias": ("none",)}
    empty = (
        "use_dora",
        "modules_to_save",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
    )
    for key, values in (allowed | {key: (None, False, {}, []) for key in empty}).items():
        if raw.get(key, values[0]) not in values:
            raise ValueError(f"{path}: {key} = {raw[key]!r} is not supported, only {values[0]!r}")
    for key, types in (("r", (int,)), ("lora_alpha", (int, float))):
        if type(raw.get(key)) not in types or not 0 < raw[key] < math.inf:
            raise ValueError(
                f"{path}: {key} = {raw.get(key)!r} is not a number above 0{', a whole one' * (key == 'r')}"
            )
    names = raw.get("target_modules")
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"{path}: target_modules = {raw.get('target_modules')!r} is not supported, only a list of names"
        )
    return {
        "r": raw["r"],
        "alpha": raw["lora_alpha"],
        "dropout": raw.get("lora_dropout", 0.0),
        "targets": tuple(raw["target_modules"]),
        "rslora": raw.get("use_rslora", False),
    }


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Put the adapter of a PEFT folder on a model that has none. Raises ValueError before anything is
    half-loaded.
    """
    path = Path(folder) / "adapter_model.safetensors"
    config = read_adapter_config(folder)
    if not path.is_file():
        raise ValueError(f"{folder}: no adapter_model.safetensors in it (only safetensors is read)")
    try:
        tensors = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    try:
        add_lora(model, **config)
    except ValueError as error:
        raise ValueError(f"{folder}: does not fit this model: {error}") from None
    parameters = lora_parameters(model)
    wrong = [f"{name} is missing" for name in parameters.keys() - tensors.keys()]
    wrong += [f"{name} is not a layer of the model" for name in tensors.keys() - parameters.keys()]
    wrong += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model needs {tuple(p.shape)}"
        for name, p in parameters.items()
        if name in tensors and tensors[name].shape != p.shape
    ]
    wrong += [
        f"{name} holds values that are not finite"
        for name, x in tensors.items()
        if not torch.isfinite(x).all()
    ]
    if wrong:
        remove_lora(model)
        raise ValueError(
            f"{path}: does not fit this model: {sorted(wrong)[0]}"
            + f" (and {len(wrong) - 1} more)" * (len(wrong) > 1)
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])


def _read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError naming the file for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: an object is expected, not {type(content).__name__}")
    return content


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """write(temporary name), then the name itself: a crash leaves the old file or the new one, never a
    part.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # on a read-only disk even this fails
            temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written, what was there before still is ({error})") from None
