"""A decoder-only transformer over packed sequences, under the parameter names of its Hugging Face checkpoint.

    python -c "from model import load_model; print(load_model('tests/demo_model'))"

    model = load_model("meta-llama/Llama-3.2-1B", device="cuda", dtype=torch.bfloat16)
    hidden = model(tokens, cu_seqlens)              # (T, D): no padding, sequences lie end to end
    logits = model.lm_head(hidden)                  # (T, V): fine for a few rows, see token_losses for many

Shapes, here and in the other files:
    T tokens of a pack   B sequences   D width       V vocabulary     F width of the MLP
    H query heads        G key/value heads           K width of a head    R rows of a key/value cache

Precision: the residual stream, the norms, the rotation and the losses are float32 whatever the dtype of the
weights; only matrix products run in it. Scoring subtracts losses: bfloat16 sums would bury the difference.
"""

import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.utils.checkpoint import checkpoint

KNOWN_BUFFERS = re.compile(
    r"rotary_emb\.inv_freq|\.attn\.attention\.(masked_)?bias"
)  # in old checkpoints, not weights
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
CONVERT = "a pickle such as pytorch_model.bin is not read; transformers converts it: load, save_pretrained"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """What shapes the computation, whatever the architecture calls it; `raw` is config.json as it was
    read.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    tie_word_embeddings: bool
    rope: dict | None  # rope_type, rope_theta and what the type needs; None: positions are learned
    windows: tuple[
        int | None, ...
    ]  # by layer: how many tokens a query sees, itself included; None: all before it
    score_scale: float  # of the attention scores: 1/sqrt(K), but 1 in GPT-Neo
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    raw: dict


def llama_config(raw: dict) -> Config:
    """LLaMA 2 to 3.2 and relatives, and Qwen2, which has biases on q, k and v only.

    Rotation parameters come in two dialects: rope_theta + rope_scaling (transformers 4) and rope_parameters
    (5).
    """
    qwen, heads, layers = (
        raw["architectures"][0] == "Qwen2ForCausalLM",
        raw["num_attention_heads"],
        raw["num_hidden_layers"],
    )
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    sliding = raw.get("use_sliding_window", not qwen) and raw["architectures"][0] != "LlamaForCausalLM"
    if sliding and raw.get("sliding_window"):
        raise ValueError(f"sliding_window {raw['sliding_window']} is not supported, only null")
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ValueError(
            f"rope type {rope['rope_type']!r} is not supported; supported: default, linear, llama3"
        )
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    return Config(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        rope=rope,
        windows=(None,) * layers,
        score_scale=head_dim**-0.5,
        qkv_bias=qwen or raw.get("attention_bias", False),
        out_bias=not qwen and raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
        raw=raw,
    )


def gpt_neo_config(raw: dict) -> Config:
    """GPT-Neo: learned positions, layers that see all and layers with a window in turn, scores that are not
    scaled.
    """
    if raw.get("activation_function", "gelu_new") != "gelu_new":
        raise ValueError(
            f"activation_function {raw['activation_function']!r} is not supported, only 'gelu_new'"
        )
    kinds = [kind for pattern, times in raw["attention_types"] for kind in pattern * times]
    width, heads = raw["hidden_size"], raw["num_heads"]
    return Config(
        vocab_size=raw["vocab_size"],
        hidden_size=width,
        intermediate_size=raw.get("intermediate_size") or 4 * width,
        num_hidden_layers=raw["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=raw["max_position_embeddings"],
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=raw.get("tie_word_embeddings", True),
        rope=None,
        windows=tuple(raw["window_size"] if kind == "local" else None for kind in kinds),
        score_scale=1.0,
        qkv_bias=False,
        out_bias=True,
        mlp_bias=True,
        raw=raw,
    )


def read_config(folder: str | os.PathLike) -> Config:
    """Read config.json. Raises ValueError for what this file does not compute, naming what it does."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json in it, so it is not a Hugging Face checkpoint folder")
    raw = _read_json(path)
    named = raw.get("architectures") or ["none named"]
    architecture = named[0] if isinstance(named, list) else named
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    try:
        config = ARCHITECTURES[architecture][0](raw)
        for field in dataclasses.fields(Config):
            value = getattr(config, field.name)
            if field.type is int and not (type(value) is int and value > 0):
                raise ValueError(f"{field.name} = {value!r} is not a whole number of at least 1")
        return config
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: a field is missing or of another type ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------- attention


@dataclass
class Layout:
    """Where the sequences of a pack lie, worked out once for all layers. A query sees its own sequence, not
    later.
    """

    positions: Tensor  # (T,) place of each token in its own sequence, counted from 0
    cu_queries: Tensor  # (B+1,) int32 on the model's device
    cu_keys: Tensor  # (B+1,) int32; equals cu_queries unless a cache holds earlier tokens
    lengths: list[tuple[int, int]]  # (B,) of (queries, keys)
    key_rows: (
        Tensor | None
    )  # rows of the cache that the keys are, in the order of cu_keys; None: the pack's own tokens
    rotation: tuple[Tensor, Tensor] | None = (
        None  # cosines and sines (T, 1, K) of the positions; None: they are learned
    )


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. From pinned memory the host need not wait: it packs the next batch while the GPU
    computes.
    """
    return (
        x.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and not x.is_cuda
        else x.to(device)
    )


def make_layout(
    cu_seqlens: Tensor, device: torch.device, past: list[Tensor] | None = None, first_row: int = 0
) -> Layout:
    """Lay out a pack with boundaries cu_seqlens (B+1,); past[b] are the cache rows of what sequence b has
    already run.

    cu_seqlens is best kept on the CPU: reading the lengths from a GPU would make the host wait for it.
    """
    starts = cu_seqlens.tolist()
    queries = [end - start for start, end in zip(starts, starts[1:])]
    before = [len(rows) for rows in past] if past is not None else [0] * len(queries)
    keys = [p + q for p, q in zip(before, queries)]
    positions = torch.cat([torch.arange(p, k) for p, k in zip(before, keys)])  # (T,)
    key_rows, cu_keys = None, cu_seqlens
    if past is not None:
        new = torch.arange(first_row, first_row + starts[-1]).split(queries)
        key_rows = torch.cat([row for pair in zip(past, new) for row in pair]).to(device)  # (sum of keys,)
        cu_keys = torch.tensor([0, *keys]).cumsum(0).to(cu_seqlens.dtype)
    positions, *ends = (to_device(x, device) for x in (positions, cu_seqlens, cu_keys))
    return Layout(positions, *ends, list(zip(queries, keys)), key_rows)


def flash_runs_on(x: Tensor) -> bool:
    """Whether torch's variable-length flash kernel takes x."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention inside each sequence: q (T, H, K), k and v (keys, G, K) -> (T, H, K).

    With a window a query sees only that many tokens, itself included. Half precision on CUDA takes torch's
    variable-length flash kernel. Elsewhere neighbouring sequences of equal lengths share one
    scaled_dot_product_attention in float32 (on a CPU its bfloat16 backward is several times slower).
    """
    gqa = q.shape[1] != k.shape[1]
    if flash_runs_on(v):
        longest = [max(side) for side in zip(*layout.lengths)]
        reach = (-1 if window is None else window - 1, 0)  # tokens to the left, to the right
        ends = layout.cu_queries, layout.cu_keys
        shared = {"enable_gqa": gqa}
        if (
            "enable_gqa" not in inspect.signature(varlen.varlen_attn).parameters
        ):  # torch 2.11: a key head for every query head
            shared, (k, v) = {}, (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return varlen.varlen_attn(q, k, v, *ends, *longest, scale=scale, window_size=reach, **shared)
    runs = [(len(list(same)), *pair) for pair, same in groupby(layout.lengths)]
    qs = q.float().split([n * queries for n, queries, _ in runs])
    ks, vs = (x.float().split([n * keys for n, _, keys in runs]) for x in (k, v))
    outputs = []
    for (n, queries, keys), *parts in zip(runs, qs, ks, vs):
        qkv = [part.unflatten(0, (n, -1)).transpose(1, 2) for part in parts]  # (n, H or G, length, K)
        mask = None
        windowed = window is not None and keys > window
        if (
            windowed or 1 < queries < keys
        ):  # the last query sees the last key: the triangle sits in the lower right corner
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
            mask = mask.triu(keys - queries - window + 1) if windowed else mask
        causal = queries == keys and mask is None
        out = F.scaled_dot_product_attention(
            *qkv, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (n * queries, H, K)
    return torch.cat(outputs)  # (T, H, K)


def rope_frequencies(config: Config) -> Tensor:
    """Angle per position of each pair of coordinates (K/2,), float32; LLaMA 3.1+ slows the long waves
    ("llama3").
    """
    rope, width = config.rope, config.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** (
        torch.arange(0, width, 2, dtype=torch.float32) / width
    )  # (K/2,)
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = (
            rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        )  # full turns in the old context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(
            0, 1
        )  # 1: fast waves stay; 0: slow ones are stretched by `factor`
        return frequencies * (keep + (1 - keep) / rope["factor"])
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (T, heads, K), float32: coordinate i turns together with i + K/2."""
    x = x.float()
    first, second = x.chunk(2, dim=-1)  # (T, heads, K/2) each
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Cache:
    """Keys and values of tokens already run, flat: row r holds one token of some sequence, in every layer.

    A sequence is a list of rows, so sequences of any length lie side by side, and several may begin with the
    same rows: the choices of a question share the rows of its text.
    """

    def __init__(self, model: "Transformer", rows: int):
        config, weight = model.config, model.lm_head.weight
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, config.head_dim)
        dtype = weight.dtype if weight.is_cuda else torch.float32  # what attend() computes in
        self.keys = torch.empty(shape, dtype=dtype, device=weight.device)  # (layers, R, G, K)
        self.values = torch.empty_like(self.keys)
        self.used = 0

    def extend(self, layer: int, k: Tensor, v: Tensor, key_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (T, G, K) of a layer; return what the queries see, (keys, G, K) each."""
        new = slice(self.used, self.used + len(k))
        self.keys[layer, new] = k
        self.values[layer, new] = v
        return self.keys[layer, key_rows], self.values[layer, key_rows]


# ---------------------------------------------------------------------------------------------- layers


class _CpuRMSNorm(torch.autograd.Function):
    """F.rms_norm with a frozen weight. On a CPU torch has it from a dozen elementwise operations: 3 times
    slower.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)  # (T, 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad = grad * weight.float()  # (T, D)
        radial = torch.linalg.vecdot(grad, x).unsqueeze(-1) * scale * scale / x.shape[-1]  # (T, 1)
        return grad.addcmul_(x, radial, value=-1).mul_(scale), None, None


class RMSNorm(nn.Module):
    """Scale to unit root mean square in float32; the result is in the weight's dtype, ready for a matrix
    product.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:  # (T, D) -> (T, D)
        if not x.is_cuda and not self.weight.requires_grad:
            return _CpuRMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, x.shape[-1:], self.weight.float(), self.eps).to(self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """The usual layer norm, in float32; the result is in the weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:  # (T, D) -> (T, D)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class Attention(nn.Module):
    """Self-attention of one layer. `output` is what the architecture calls its last projection."""

    def __init__(self, config: Config, layer: int, output: str):
        super().__init__()
        self.layer, self.output, self.head_dim = layer, output, config.head_dim
        self.scale, self.window = config.score_scale, config.windows[layer]
        queries, keys = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.add_module(output, nn.Linear(queries, config.hidden_size, bias=config.out_bias))

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:  # (T, D) -> (T, D)
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if layout.rotation is not None:
            q, k = rotate(q, *layout.rotation), rotate(k, *layout.rotation)  # (T, H, K), (T, G, K)
        if flash_runs_on(x):
            q, k, v = (part.to(x.dtype) for part in (q, k, v))  # rotation and adapters leave float32
        if cache is not None:
            k, v = cache.extend(self.layer, k, v, layout.key_rows)
        mixed = attend(q, k, v, layout, self.scale, self.window)  # (T, H, K)
        return self.get_submodule(self.output)(mixed.flatten(1).to(x.dtype))


class LlamaMLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # (T, D) -> (T, F) -> (T, D)
        return self.down_proj(F.silu(self.gate_proj(x).to(x.dtype)) * self.up_proj(x).to(x.dtype))


class LlamaBlock(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer, "o_proj")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layout, cache)  # (T, D) float32
        return x + self.mlp(self.post_attention_layernorm(x))


class GPTNeoMLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # (T, D) -> (T, F) -> (T, D)
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh").to(x.dtype))


class GPTNeoBlock(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.norm_eps)
        self.attn = nn.ModuleDict({"attention": Attention(config, layer, "out_proj")})
        self.ln_2 = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = GPTNeoMLP(config)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        x = x + self.attn["attention"](self.ln_1(x), layout, cache)  # (T, D) float32
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """What all architectures share. Parameters bear the checkpoint's names, so loading maps nothing."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpoint_activations = (
            False  # keep only the blocks' inputs for the backward pass, and run them twice
        )
        self.folder: Path | None = (
            None  # where it was loaded from; save_model copies the tokenizer from there
        )

    def parts(self) -> tuple[nn.Embedding, nn.Embedding | None, nn.ModuleList, nn.Module]:
        """Token embedding, position embedding (None where positions are rotations), blocks, last norm."""
        raise NotImplementedError

    def tie(self) -> None:
        """Make the head the embedding itself, where the checkpoint has one matrix for both."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.parts()[0].weight

    def forward(
        self, tokens: Tensor, cu_seqlens: Tensor, cache: Cache | None = None, past: list[Tensor] | None = None
    ) -> Tensor:
        """Hidden states (T, D), after the last norm, of tokens (T,) int64 in sequences bounded by cu_seqlens
        (B+1,) int32.

        With a cache the new tokens continue the cached ones: sequence b follows the cache rows past[b]
        (int64, may be empty), and the pack's own keys and values are appended as rows cache.used to
        cache.used + T - 1.
        """
        if cache is not None and past is None:
            past = [torch.empty(0, dtype=torch.int64)] * (len(cu_seqlens) - 1)
        layout = make_layout(cu_seqlens, tokens.device, past, cache.used if cache is not None else 0)
        embed, embed_positions, blocks, norm = self.parts()
        x = embed(tokens).float()  # (T, D)
        if embed_positions is None:
            angles = layout.positions[:, None] * to_device(
                rope_frequencies(self.config), tokens.device
            )  # (T, K/2)
            angles = torch.cat((angles, angles), dim=-1)[:, None]  # (T, 1, K)
            layout.rotation = angles.cos(), angles.sin()
        else:
            longest, limit = max(keys for _, keys in layout.lengths), self.config.max_position_embeddings
            if longest > limit:
                raise ValueError(
                    f"a sequence of {longest} tokens exceeds the model's {limit} learned positions"
                )
            x = x + embed_positions(layout.positions)
        for block in blocks:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, layout, cache, use_reentrant=False)
            else:
                x = block(x, layout, cache)
        if cache is not None:
            cache.used += len(tokens)
        return norm(x)


class Llama(Transformer):
    """LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM."""

    def __init__(self, config: Config):
        super().__init__(config)
        blocks = nn.ModuleList(LlamaBlock(config, layer) for layer in range(config.num_hidden_layers))
        embedding, norm = (
            nn.Embedding(config.vocab_size, config.hidden_size),
            RMSNorm(config.hidden_size, config.norm_eps),
        )
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": blocks, "norm": norm})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def parts(self) -> tuple:
        return self.model["embed_tokens"], None, self.model["layers"], self.model["norm"]


class GPTNeo(Transformer):
    """GPTNeoForCausalLM."""

    def __init__(self, config: Config):
        super().__init__(config)
        width = config.hidden_size
        blocks = nn.ModuleList(GPTNeoBlock(config, layer) for layer in range(config.num_hidden_layers))
        wte, wpe = nn.Embedding(config.vocab_size, width), nn.Embedding(config.max_position_embeddings, width)
        self.transformer = nn.ModuleDict(
            {"wte": wte, "wpe": wpe, "h": blocks, "ln_f": LayerNorm(width, config.norm_eps)}
        )
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.tie()

    def parts(self) -> tuple:
        return tuple(self.transformer[name] for name in ("wte", "wpe", "h", "ln_f"))


ARCHITECTURES = {
    "LlamaForCausalLM": (llama_config, Llama),
    "MistralForCausalLM": (llama_config, Llama),
    "Qwen2ForCausalLM": (llama_config, Llama),
    "GPTNeoForCausalLM": (gpt_neo_config, GPTNeo),
}


def build(config: Config) -> Transformer:
    """The module of an architecture, with torch's default initialisation."""
    return ARCHITECTURES[config.raw["architectures"][0]][1](config)


# ---------------------------------------------------------------------------------------------- losses


def float32_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (n, V) float32 = x (n, D) weight (V, D)^T, of 16-bit factors too: rounded logits would blur the
    losses.

    A CPU has no such product of bfloat16 matrices, but one of float32 that rounds its factors to bfloat16
    (AMX): the caller passes those as float32, in which they are exact, and says so by setting the precision
    (head_chunks).
    """
    if x.is_cuda and x.dtype != torch.float32:
        torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x, weight.T, out=out)


@contextmanager
def bfloat16_products(on: bool) -> Iterator[None]:
    """Inside the block float32 matrix products on a CPU round their factors to bfloat16; sums and results do
    not round.
    """
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16" if on else before
    try:
        yield
    finally:
        setting.fp32_precision = before


def head_chunks(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int = 512
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Log-probabilities and losses of `chunk` rows at a time, so that no (n, V) tensor ever exists.

    hidden (n, D), head_weight (V, D), targets (n,) int64. Yields (rows, log-probabilities (chunk, V), loss
    (chunk,)), both float32. The consumer may overwrite them, and must be done with them before the next: all
    chunks share one buffer, and the softmax runs in place (fresh buffers of this size cost a CPU more than
    the softmax itself). On a CPU a bfloat16 head is held as float32, too, as long as the chunks last.
    """
    buffer = torch.empty(min(chunk, len(targets)), len(head_weight), device=hidden.device)  # (chunk, V)
    bfloat16_on_cpu = not hidden.is_cuda and head_weight.dtype == torch.bfloat16
    if not hidden.is_cuda:
        hidden, head_weight = hidden.float(), head_weight.float()
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        logits = buffer[: len(targets[rows])]
        with bfloat16_products(bfloat16_on_cpu):
            float32_product(hidden[rows], head_weight, logits)
        logprobs = torch.log_softmax(logits, dim=-1, out=logits)
        yield rows, logprobs, -logprobs.gather(1, targets[rows, None]).squeeze(1)


@torch.no_grad()
def token_losses(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """Equation 1: the loss of each token, -log p(y_t | x, y_<t), in nats.

    hidden (n, D) holds the state *before* each token (data.shift makes the pairing), head_weight (V, D) the
    output head, targets (n,) the tokens. Returns (n,) float32, without a gradient;
    forgetting.weighted_token_loss is its trainable twin.
    """
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for rows, _, loss in head_chunks(hidden, head_weight, targets):
        losses[rows] = loss
    return losses


# ---------------------------------------------------------------------------------- checkpoint folders


def checkpoint_folder(path_or_repo: str) -> Path:
    """The local folder of a checkpoint; a Hub id, with an optional @revision, is fetched first.

    Only what is read here is fetched: the safetensors and JSON files at the top, no pickles, GGUF files or
    subfolders. Raises ValueError saying what is not there, or what the Hub wants first.
    """
    if os.path.isdir(path_or_repo):
        return Path(path_or_repo)
    repo, _, revision = str(path_or_repo).partition("@")
    if repo.startswith((".", "/", "~")) or repo.count("/") != 1:
        raise ValueError(f"{path_or_repo}: no such folder, and not a Hub id of the form owner/name")
    wanted, unwanted = ["*.safetensors", "*.json"], ["*/*", "consolidated*"]
    try:
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted,
                                        ignore_patterns=unwanted))
    except Exception as error:  # the Hub's client has many error types
        if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # "not in the cache either" hides why the Hub was no help
        reason = " ".join(str(error).split())
        raise ValueError(f"{path_or_repo}: not a local folder, and the Hub said: {reason}") from None
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{path_or_repo}: no safetensors in this repository ({CONVERT})")
    return folder


def model_fingerprint(folder: Path) -> str:
    """sha256 of config.json and of every weight file, in full (about a second per gigabyte)."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(weight_files(folder)):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The safetensors files of a checkpoint, each with the tensors the index says it has (None: no index)."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            hint = f" ({CONVERT})" if any(folder.glob("*.bin")) else ""
            names = "neither model.safetensors nor model.safetensors.index.json"
            raise ValueError(f"{folder}: {names} in it{hint}")
        return {folder / "model.safetensors": None}
    files: dict[Path, list[str]] = {}
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: no weight_map in it")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: {name} points to {file!r}, which is not a file of this folder")
        files.setdefault(folder / file, []).append(name)
    for path in files:
        if not path.is_file():
            raise ValueError(f"{index}: {path.name} is named there but is not in the folder")
    return files


def load_model(
    path_or_repo: str | os.PathLike, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """Load a checkpoint, tensor by tensor from memory-mapped safetensors, frozen and in eval mode.

    Raises ValueError naming the tensor for missing, unexpected, mis-shaped or non-finite weights.
    """
    folder = checkpoint_folder(str(path_or_repo))
    config = read_config(folder)
    with torch.device("meta"):
        model = build(config)
    expected = dict(model.named_parameters())  # a tied head is listed once, as the embedding
    loaded: set[str] = set()
    for path, names in weight_files(folder).items():
        try:
            if names is None:
                with safe_open(path, framework="pt") as file:
                    names = list(file.keys())
            for name in names:
                if KNOWN_BUFFERS.search(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
                    continue  # not a weight; a second copy of a tied head
                if name not in expected:
                    raise ValueError(f"{path}: unexpected tensor {name}")
                with safe_open(
                    path, framework="pt"
                ) as file:  # opened anew: the pages read so far are given back
                    tensor = file.get_tensor(name)
                if tensor.shape != expected[name].shape:
                    shapes = f"{tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
                    raise ValueError(f"{path}: tensor {name} has shape {shapes}")
                if tensor.dtype not in DTYPES.values():
                    raise ValueError(f"{path}: tensor {name} is {tensor.dtype}; read are {', '.join(DTYPES)}")
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{path}: tensor {name} holds values that are not finite")
                owner, _, leaf = name.rpartition(".")
                setattr(
                    model.get_submodule(owner),
                    leaf,
                    nn.Parameter(tensor.to(device, dtype), requires_grad=False),
                )
                loaded.add(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    if missing := sorted(expected.keys() - loaded):
        raise ValueError(f"{folder}: {len(missing)} tensors missing, the first is {missing[0]}")
    model.tie()
    model.folder = folder
    return model.eval()


def save_model(model: Transformer, folder: str | os.PathLike, shard_bytes: int = 5 * 10**9) -> None:
    """Write a folder that transformers loads: config.json in the dialect it was read in, safetensors,
    tokenizer files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach().contiguous().cpu() for name, parameter in model.named_parameters()}
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for file, shard in zip(names, shards):
        _write_whole(folder / file, partial(save_file, shard, metadata={"format": "pt"}))
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    else:
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)  # of an earlier, sharded save
    dtype_key = "dtype" if "dtype" in model.config.raw else "torch_dtype"
    dtype_name = str(model.lm_head.weight.dtype).removeprefix("torch.")
    for file in TOKENIZER_FILES:
        if model.folder is not None and (model.folder / file).is_file() and folder != model.folder:
            shutil.copyfile(model.folder / file, folder / file)
    config = json.dumps(model.config.raw | {dtype_key: dtype_name}, indent=2) + "\n"
    # last: where config.json is, the checkpoint is whole
    _write_whole(folder / "config.json", lambda temporary: temporary.write_text(config))


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
