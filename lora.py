"""Low-rank adapters on the linear layers of any torch model: add, switch off, merge, save, load.

    add_lora(model, r=64, alpha=16)                 # in place; only the adapter is trainable afterwards
    with lora_disabled(model):                      # the untouched base model, bit for bit
        base = model(tokens, cu_seqlens)
    save_adapter(model, "adapter", "meta-llama/Llama-3.2-1B")   # PeftModel.from_pretrained reads it

y = x W^T + alpha / r * dropout(x) A^T B^T      x (..., in)   A (r, in)   B (out, r)
Order: LoRA layers, PEFT's files, checkpoints.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# every linear layer of a block: seven in the LLaMA-like families; GPT-Neo has q, k, v and the last three
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT_TARGETS += ("out_proj", "c_fc", "c_proj")

# -------------------------------------------------------------------------------------------- LoRA layers


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1, for every element of x; uint8. The factor 1 / (1 - p) is the caller's."""
    if x.is_cuda:
        keep = torch.empty_like(x, dtype=torch.uint8)
        return keep.bernoulli_(1 - p)
    # Random bits cost more than the product they mask on a CPU: each int64 is cut into four int16 draws. So p
    # becomes a multiple of 1/65536: of the values -32768 to 32767 the lowest p * 65536 mean "drop".
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64)
    bits.random_(-(2**63), None)
    draws = bits.view(torch.int16)[: x.numel()]
    dropped = round(p * 65536)
    dropped = min(dropped, 65535)  # the highest value is always kept
    keep = draws >= dropped - 32768
    return keep.view(torch.uint8).view_as(x)


def apply_mask(x: Tensor, keep: Tensor) -> Tensor:
    """x * keep in x's dtype. CUDA's product reads the bytes as they are; a CPU's is faster after a cast."""
    if x.is_cuda:
        return x * keep
    return keep.to(x.dtype).mul_(x)


class _LoRAProduct(torch.autograd.Function):
    """x W^T + bias + scaling * (x * keep) A^T B^T as one node; W and bias are frozen.

    x (n, in), keep (n, in) uint8 or None -> (n, out). Left to autograd, the formula would keep the masked x
    of every layer for the backward pass; this keeps x, which layers share, and the mask's bytes.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, keep, scaling, float32_output):
        if any(ctx.needs_input_grad[1:3]):
            raise ValueError("a layer with an adapter requires a gradient, which is not computed: freeze it")
        weight, a, b = weight.to(x.dtype), a.to(x.dtype), b.to(x.dtype)
        if bias is not None:
            bias = bias.to(x.dtype)
        masked_x = x if keep is None else apply_mask(x, keep)  # (n, in)
        low = F.linear(masked_x, a)  # (n, r)
        low *= scaling
        ctx.save_for_backward(x, weight, a, b, low, keep)
        ctx.scaling = scaling
        y = F.linear(x, weight, bias)  # (n, out)
        if float32_output and x.dtype != torch.float32:
            side = F.linear(low, b)
            return y.float().add_(side)
        return y.addmm_(low, b.T)

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, low, keep = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad = grad.to(x.dtype)  # (n, out)
            grad_b = grad.T @ low  # (out, r): low has the scaling in it
            grad_low = grad @ b  # (n, r)
            grad_low *= ctx.scaling
            masked_x = x if keep is None else apply_mask(x, keep)  # (n, in)
            grad_a = grad_low.T @ masked_x  # (r, in)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = grad_low @ a  # (n, in), through the adapter
                if keep is not None:
                    grad_x = apply_mask(grad_x, keep)
                grad_x.addmm_(grad, weight)  # and through the frozen weight
        return grad_x, None, None, grad_a.float(), grad_b.float(), None, None, None


class LoRALinear(nn.Module):
    """y = x W^T + bias + alpha / r * dropout(x) A^T B^T, W frozen; A (r, in) and B (out, r) float32.

    Products run in x's dtype, or under torch.autocast in autocast's, and the result has that dtype.

    If a linear layer has the attribute float32_output = True, LoRALinear adds the adapter's path to it in
    float32 and returns float32, in eval mode only. Scores are differences of losses, and rounded sums would
    bury them; training can bear the rounding.
    """

    base_layer: nn.Linear
    lora_A: nn.Linear
    lora_B: nn.Linear

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float, rslora: bool = False):
        super().__init__()
        self.base_layer = base
        new = {"bias": False, "dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.utils.skip_init(nn.Linear, base.in_features, r, **new)
        self.lora_B = nn.utils.skip_init(nn.Linear, r, base.out_features, **new)
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.rslora = rslora
        self.enabled = True

    @property
    def scaling(self) -> float:
        if self.rslora:
            return self.alpha / math.sqrt(self.r)
        return self.alpha / self.r

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if not self.enabled:
            return self.base_layer(x)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        p, keep = 0.0, None
        if self.training and self.dropout > 0:
            p = self.dropout
            keep = dropout_mask(rows, p)  # (n, in)
        scaling = self.scaling / (1 - p)  # with dropout's factor: a product with (n, r), not with (n, in)
        base, a, b = self.base_layer, self.lora_A.weight, self.lora_B.weight
        float32_output = not self.training and getattr(base, "float32_output", False)
        with torch.autocast(device, enabled=False):  # sums in place need one dtype: it is chosen above
            y = _LoRAProduct.apply(rows, base.weight, base.bias, a, b, keep, scaling, float32_output)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name, in the model's order."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name (`...q_proj.lora_A.weight`), in the model's order."""
    parameters = {}
    for name, layer in lora_layers(model).items():
        parameters[f"{name}.lora_A.weight"] = layer.lora_A.weight  # (r, in)
        parameters[f"{name}.lora_B.weight"] = layer.lora_B.weight  # (out, r)
    return parameters


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
    on any device; B = 0, so the model's output does not change. Raises ValueError as target_layers does.
    """
    if lora_layers(model):
        raise ValueError("the model has an adapter already: remove_lora or merge_lora first")
    if r < 1:
        raise ValueError(f"rank {r} is not allowed: at least 1")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout!r} is not allowed: from 0 to below 1")
    chosen = target_layers(model, targets)
    model.requires_grad_(False)
    for name, linear in chosen.items():
        layer = LoRALinear(linear, r, alpha, dropout, rslora)
        layer.train(linear.training)
        a = torch.empty(r, linear.in_features)
        bound = 1 / math.sqrt(linear.in_features)
        a.uniform_(-bound, bound, generator=generator)
        layer.lora_A.weight.data.copy_(a)
        layer.lora_B.weight.data.zero_()
        _replace(model, name, layer)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def target_layers(model: nn.Module, targets: tuple[str, ...] = DEFAULT_TARGETS) -> dict[str, nn.Linear]:
    """The linear layers that add_lora would replace, by name, in the model's order.

    Names of DEFAULT_TARGETS that the model lacks are passed over. In any other list a name that no linear
    layer has is a ValueError, and so is lm_head: losses are computed from its weight, past any adapter.
    """
    if isinstance(targets, str):
        raise ValueError(f"LoRA targets are a list of names, not the string {targets!r}: [{targets!r}]")
    if not targets:
        raise ValueError("LoRA targets are an empty list: the names of linear layers are needed")
    if "lm_head" in targets:
        raise ValueError("lm_head cannot be a LoRA target here: losses are computed from its weight directly")
    found = matching_layers(model, targets)
    unknown = sorted(target for target, names in found.items() if not names)
    may_lack = tuple(targets) == DEFAULT_TARGETS and len(unknown) < len(targets)
    if unknown and not may_lack:
        known = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
        names = ", ".join(unknown[:3])
        if len(unknown) > 3:
            names += f" (and {len(unknown) - 3} more)"
        raise ValueError(f"LoRA target {names} names no linear layer of the model; it has {', '.join(known)}")
    chosen = set()
    for names in found.values():
        chosen.update(names)
    return {name: layer for name, layer in linear_layers(model).items() if name in chosen}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that may have an adapter, by name, in the model's order; lm_head is none of them."""
    # no subclass of Linear: torch's MultiheadAttention, for one, reads its out_proj.weight past an adapter
    layers = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.endswith("lm_head"):
            layers[name] = module
    return layers


def matching_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, list[str]]:
    """For each target the linear layers whose name is the target, or ends in it after a dot."""
    layers = list(linear_layers(model))
    found = {}
    for target in targets:
        end = "." + target
        found[target] = [name for name in layers if name == target or name.endswith(end)]
    return found


def remove_lora(model: nn.Module) -> None:
    """Drop the adapter: the base model again, with the very weights it had, still frozen."""
    for name, layer in lora_layers(model).items():
        _replace(model, name, layer.base_layer)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Fold the adapter into the weights, W + s B A computed in float32 and cast once, and drop it."""
    for layer in lora_layers(model).values():
        delta = layer.lora_B.weight @ layer.lora_A.weight  # (out, in)
        delta *= layer.scaling
        weight = layer.base_layer.weight
        merged = weight.float() + delta
        merged = merged.to(weight.dtype)
        layer.base_layer.weight = nn.Parameter(merged, requires_grad=False)
    remove_lora(model)


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

KEY_PREFIX = "base_model.model."  # PEFT's wrapper classes leave their attribute names in its files' keys

# adapter_config.json: keys by the values that mean plain LoRA, the first one being PEFT's default
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # how A and B begin; other ways, such as "pissa", change the base weights as well
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
}
# keys that read_adapter_config reads
READ = ("r", "lora_alpha", "lora_dropout", "use_rslora")
READ += ("target_modules", "exclude_modules", "layers_to_transform")
# keys that change no output of a plain LoRA adapter, whatever they say
HARMLESS = ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
HARMLESS += ("inference_mode",)  # load_adapter is for inference anyway
HARMLESS += ("layers_pattern",)  # read with layers_to_transform only
HARMLESS += ("fan_in_fan_out",)  # PEFT ignores it for nn.Linear
HARMLESS += ("eva_config", "megatron_core", "qalora_group_size")  # details of what another key switches on


def save_adapter(model: nn.Module, folder: str | os.PathLike, base_model: str) -> None:
    """Write adapter_model.safetensors (float32) and adapter_config.json, each whole or not at all.

    base_model is a folder or a Hub id, with an optional @revision, as load_model takes it.
    """
    folder, layers = Path(folder), lora_layers(model)
    if not layers:
        raise ValueError(f"{folder}: the model has no adapter to save")
    first = next(iter(layers.values()))
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if any(name.rpartition(".")[2] in leaves for name in linear):
        leaves = list(layers)  # whole names: the last parts alone would match layers without an adapter
    alpha = first.alpha
    base, revision = str(base_model), None
    if not os.path.isdir(base):
        base, _, revision = base.partition("@")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "r": first.r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,  # 16 as PEFT writes it
        "lora_dropout": float(first.dropout),
        "target_modules": leaves,
        "use_rslora": first.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    text = json.dumps(config, indent=2) + "\n"
    tensors = {}
    for name, parameter in lora_parameters(model).items():
        tensors[KEY_PREFIX + name] = parameter.detach().float().cpu().contiguous()
    _write_whole(
        {
            folder / "adapter_config.json": lambda file: file.write_text(text, encoding="utf-8"),
            folder / "adapter_model.safetensors": partial(save_file, tensors, metadata={"format": "pt"}),
        }
    )


def read_adapter_config(path: Path) -> dict:
    """adapter_config.json as arguments of add_lora; targets None: the names of the tensors say which layers.

    Raises ValueError naming the key for anything that asks for more than plain LoRA.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(raw, dict):
            raise ValueError(f"a {type(raw).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON, or no object in it ({error})") from None
    for key, value in raw.items():
        if value and key not in (*PLAIN, *READ, *HARMLESS):
            raise ValueError(f"{path}: {key} = {value!r} is not supported: only plain LoRA is")
    for key, values in PLAIN.items():
        if raw.get(key, values[0]) not in values:
            raise ValueError(f"{path}: {key} = {raw[key]!r} is not supported, only {values[0]!r}")
    rank = raw.get("r")
    alpha = raw.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: r = {rank!r} is not a number above 0, a whole one")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ValueError(f"{path}: lora_alpha = {alpha!r} is not a number above 0")
    return {
        "r": rank,
        "alpha": alpha,
        "dropout": raw.get("lora_dropout") or 0.0,
        "targets": listed_targets(raw),
        "rslora": bool(raw.get("use_rslora")),
    }


def listed_targets(raw: dict) -> tuple[str, ...] | None:
    """The names in target_modules; None where they alone do not say which layers have an adapter."""
    names = raw.get("target_modules")  # a list, a regular expression or "all-linear"
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    some_layers = raw.get("layers_to_transform") not in (None, [])  # it may be 0, the first layer
    if some_layers or raw.get("exclude_modules"):
        return None
    return tuple(names)


def read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """An adapter folder: read_adapter_config, and the tensors under the names of lora_parameters."""
    config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not path.is_file() and (pickle := path.with_suffix(".bin")).is_file():
        command = f"save_file(torch.load({str(pickle)!r}, weights_only=True), {str(path)!r})"
        command = f'python -c "import torch; from safetensors.torch import save_file; {command}"'
        raise ValueError(f"{pickle}: a pickle is not read; this command converts it: {command}")
    for file in (config_path, path):
        if not file.is_file():
            hint = "" if folder.is_dir() else f"; one on the Hub: hf download {folder} --local-dir FOLDER"
            raise ValueError(f"{folder}: no {file.name} in it, so it is not an adapter folder{hint}")
    config = read_adapter_config(config_path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    return config, {name.removeprefix(KEY_PREFIX): tensor for name, tensor in tensors.items()}


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Put the adapter of a PEFT folder on a model that has none; after a ValueError it still has none.

    target_modules may name layers that the model lacks. Each layer that it does name must have its tensors
    in the file, and each tensor must have its layer. Where target_modules is not a plain list of names, or
    other keys make exceptions to it, the names of the tensors alone say which layers.
    """
    folder = Path(folder)
    config, tensors = read_adapter(folder)
    in_file = {name.rpartition(".lora_")[0] or name for name in tensors}  # whole names of layers
    targets = config["targets"] or sorted(in_file)
    known = matching_layers(model, targets)
    config["targets"] = tuple(name for name in targets if known[name] or name in in_file) or targets
    try:
        add_lora(model, **config)
    except ValueError as error:
        raise ValueError(f"{folder}: does not fit this model: {error}") from None
    parameters = lora_parameters(model)
    if wrong := mismatches(parameters, tensors):
        remove_lora(model)
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        where = folder / "adapter_model.safetensors"
        raise ValueError(f"{where}: does not fit this model: {wrong[0]}{more}")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])


def mismatches(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> list[str]:
    """What keeps the tensors of a file from being these parameters, in sentences, sorted."""
    wrong = []
    for name in parameters.keys() | tensors.keys():
        if name not in tensors:
            wrong.append(f"{name} is missing")
        elif name not in parameters:
            wrong.append(f"{name} is of no layer that has an adapter")
        elif tensors[name].shape != parameters[name].shape:
            found, needed = tuple(tensors[name].shape), tuple(parameters[name].shape)
            wrong.append(f"{name} has shape {found}, the model needs {needed}")
        elif not torch.isfinite(tensors[name]).all():
            wrong.append(f"{name} holds values that are not finite")
    return sorted(wrong)


# ----------------------------------------------------------------------------------------- checkpoints


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a training goes on from, by name: the adapter, AdamW's two moments and its count of steps."""
    tensors = {}
    for name, parameter in lora_parameters(model).items():
        state = optimizer.state[parameter]
        if not state:  # what a fused AdamW begins with at its first step
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors[name] = parameter.detach()
        for key in ("step", "exp_avg", "exp_avg_sq"):
            tensors[f"{name}.{key}"] = state[key].detach()
    return tensors


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the training_state, whole or not at all."""
    _write_whole({path: partial(save_file, training_state(model, optimizer))})


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put the training_state of a file in place, if there is one; the number of steps done."""
    if not path.is_file():
        return 0
    try:
        saved = load_file(path)
        for name, tensor in training_state(model, optimizer).items():
            tensor.copy_(saved[name])
        return int(saved[f"{next(iter(lora_parameters(model)))}.step"])
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole checkpoint ({error}); remove it") from None


def _write_whole(writes: dict[Path, Callable[[Path], object]]) -> None:
    """Write files under temporary names, then rename them: a full disk leaves the old ones, never a part.

    Of several files the last is a marker: removed before the others are replaced, written after them. Where
    it is, the files belong together.
    """
    temporaries = {path: path.with_name(path.name + ".tmp") for path in writes}
    *_, last = writes
    before = "what was there before still is"
    try:
        for path, write in writes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporaries[path]
            temporary.unlink(missing_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode  # what the umask gives; safetensors lets the owner alone read
            write(temporary)
            temporary.chmod(mode)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        if len(writes) > 1 and last.exists():
            last.unlink()
            before = "what was there before is gone"
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        for temporary in temporaries.values():
            with suppress(OSError):  # on a read-only disk even this fails
                temporary.unlink(missing_ok=True)
        raise OSError(f"{last}: could not be written, {before} ({error})") from None
