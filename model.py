"""A decoder-only transformer over packed sequences, under the parameter names of its Hugging Face checkpoint.

    python -c "from model import load_model; print(load_model('tests/demo_model'))"

    model = load_model("meta-llama/Llama-3.2-1B", device="cuda", dtype=torch.bfloat16)
    hidden = model(tokens, cu_seqlens)              # (T, D): no padding, sequences lie end to end
    logits = model.lm_head(hidden)                  # (T, V): fine for a few rows, see token_losses for many

Shapes, here and in the other files:
    T tokens of a pack   B sequences   D width       V vocabulary     F width of the MLP
    H query heads        G key/value heads           K width of a head    R rows of a key/value cache

Families: LLaMA, Mistral, Qwen2, Qwen3, SmolLM3, GPT-Neo. config.json means what it means to transformers;
what would change the computation and is not computed here is refused.
Precision: the residual stream, the norms' arithmetic, the rotation, the softmax and the losses are float32
whatever the dtype of the weights; what goes into a matrix product, and comes out of those inside a block, has
that dtype. Scoring subtracts losses: bfloat16 sums would bury the difference.
Order: Config, attention, layers, the model, losses, config.json, checkpoint folders.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# ------------------------------------------------------------------------------------------------- Config


@dataclass(frozen=True)
class Config:
    """What shapes the computation, whatever the architecture calls it; `raw` is what save_model writes."""

    model_type: str
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
    rope: dict  # rope_type, rope_theta and what the type needs; empty: positions are learned
    rotates: tuple[bool, ...]  # by layer: whether q and k are rotated
    windows: tuple[int | None, ...]  # by layer: tokens that a query sees, itself included; None: all before
    score_scale: float  # of the attention scores: 1/sqrt(K), but 1 in GPT-Neo
    raw: dict
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False


# ------------------------------------------------------------------------------------------- attention


@dataclass
class PackedSequences:
    """Where the sequences of a pack lie, and their angles, worked out once for all layers.

    The rule of attention: a query sees the keys of its own sequence, up to itself.
    """

    positions: Tensor  # (T,) place of each token in its own sequence, counted from 0
    cu_seqlens_q: Tensor  # (B+1,) int32: where each sequence's queries begin, and the end
    cu_seqlens_k: Tensor  # (B+1,) int32, of keys: the same unless a cache holds earlier tokens
    runs: list[tuple[int, int, int]]  # neighbours of equal lengths: (sequences, queries each, keys each)
    run_keys: list[slice | Tensor]  # rows of each run's keys, in the pack or in the cache
    longest_q: int  # the greatest lengths are all that the kernel, and so a compiled block, asks for
    longest_k: int
    new_rows: Tensor | None  # (T,) rows of the cache for the pack's own keys and values; None: no cache
    key_rows: Tensor | None  # (keys,) rows in the order of cu_seqlens_k; None: the pack's tokens as they lie
    rotation: tuple[Tensor, Tensor] | None = None  # cosines, sines (T, 1, K); None: positions are learned


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; from pinned memory, so that the host packs the next batch while the GPU computes."""
    if device.type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def locate_sequences(
    cu_seqlens: Tensor,
    device: torch.device,
    rows: Tensor | None = None,
    past: list[Tensor] | None = None,
) -> PackedSequences:
    """Say where the sequences of a pack lie, from their boundaries cu_seqlens (B+1,).

    These are best kept on the CPU: reading a GPU's makes it wait. With a cache the pack's keys and values go
    to its rows `rows` (T,), and past[b] are the rows that sequence b follows; without one the pack's tokens
    are the rows.
    """
    queries = cu_seqlens.diff().tolist()  # B lengths
    before = [0] * len(queries)
    if past is not None:
        before = [len(earlier) for earlier in past]
    keys = [old + new for old, new in zip(before, queries)]
    positions = [torch.arange(old, end) for old, end in zip(before, keys)]
    cu_keys, key_rows = cu_seqlens, None
    if past is not None:
        cu_keys = torch.tensor([0, *keys]).cumsum(0).to(cu_seqlens.dtype)
        own = rows
        if rows is None:
            own = torch.arange(sum(queries))
        seen = []
        for earlier, new in zip(past, own.split(queries)):
            seen += [earlier, new]
        key_rows = torch.cat(seen)
    runs, run_keys = [], []
    start = 0
    for (length_q, length_k), same in groupby(zip(queries, keys)):
        n = len(list(same))
        end = start + n * length_k
        runs.append((n, length_q, length_k))
        run_keys.append(slice(start, end))
        if key_rows is not None:
            run_keys[-1] = _as_slice(key_rows[start:end], device)
        start = end
    return PackedSequences(
        positions=to_device(torch.cat(positions), device),
        cu_seqlens_q=to_device(cu_seqlens, device),
        cu_seqlens_k=to_device(cu_keys, device),
        runs=runs,
        run_keys=run_keys,
        longest_q=max(queries),
        longest_k=max(keys),
        new_rows=None if rows is None else to_device(rows, device),
        key_rows=None if key_rows is None else to_device(key_rows, device),
    )


def _as_slice(rows: Tensor, device: torch.device) -> slice | Tensor:
    """Rows that follow one another as a slice, which nothing has to be copied for; others on the device."""
    steps = rows.diff()
    if bool((steps == 1).all()):
        first, last = int(rows[0]), int(rows[-1])
        return slice(first, last + 1)
    return to_device(rows, device)


def flash_runs_on(x: Tensor) -> bool:
    """Whether torch's variable-length flash kernel takes x: 16 bits, compute capability 8.0 or above."""
    narrow = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return narrow and torch.cuda.get_device_capability(x.device) >= (8, 0)


def attend(q, k, v, packed: PackedSequences, scale: float, window: int | None) -> Tensor:
    """Causal attention inside each sequence: q (T, H, K) -> (T, H, K).

    k and v are the pack's own (T, G, K), or all rows of a cache (R, G, K), some of which are seen.
    With a window a query sees only that many tokens, itself included.
    """
    if flash_runs_on(v):  # v has the dtype of the products; q and k may be float32, from the rotation
        return flash_attention(q, k, v, packed, scale, window)
    return dense_attention(q, k, v, packed, scale, window)


def flash_attention(q, k, v, packed: PackedSequences, scale: float, window: int | None) -> Tensor:
    """attend() by torch's kernel for sequences of unequal lengths, in 16 bits on CUDA."""
    from torch.nn.attention import varlen  # here, as it takes two seconds to load and a CPU never needs it

    if packed.key_rows is not None:
        k, v = k[packed.key_rows], v[packed.key_rows]  # (keys, G, K)
    seen = (-1, 0)  # tokens to the left and to the right that a query sees; -1: all
    if window is not None:
        seen = (window - 1, 0)
    elif packed.longest_q == 1:
        seen = (-1, -1)  # decoding: no key lies to the right; without a bound the kernel spreads them out
    return varlen.varlen_attn(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        packed.cu_seqlens_q,
        packed.cu_seqlens_k,
        packed.longest_q,
        packed.longest_k,
        scale=scale,
        window_size=seen,
        enable_gqa=q.shape[1] != k.shape[1],  # several query heads share a key head
    )


def dense_attention(q, k, v, packed: PackedSequences, scale: float, window: int | None) -> Tensor:
    """attend() for CPUs and float32: neighbouring sequences of equal lengths share one product.

    Always in float32: a CPU's backward pass of bfloat16 attention is several times slower.
    """
    q, k, v = q.float(), k.float(), v.float()
    counts = [n * queries for n, queries, _ in packed.runs]
    outputs = []
    for (n, queries, keys), run_q, seen in zip(packed.runs, q.split(counts), packed.run_keys):
        run_k, run_v = _pick(k, seen), _pick(v, seen)  # (n * keys, G, K)
        if q.is_cuda:  # CUDA's memory-efficient kernel wants a key head for every query head
            sharing = q.shape[1] // k.shape[1]
            run_k = run_k.repeat_interleave(sharing, dim=1)
            run_v = run_v.repeat_interleave(sharing, dim=1)
        windowed = window is not None and keys > window
        causal = queries == keys and not windowed
        mask = None  # causal needs none, nor does a single query that sees all keys
        if windowed or 1 < queries < keys:
            mask = attention_mask(queries, keys, window, q.device)
        output = F.scaled_dot_product_attention(
            run_q.unflatten(0, (n, queries)).transpose(1, 2),  # (n, H, queries, K)
            run_k.unflatten(0, (n, keys)).transpose(1, 2),  # (n, G, keys, K)
            run_v.unflatten(0, (n, keys)).transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=run_k.shape[1] != q.shape[1],  # several query heads share a key head
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (n * queries, H, K)
    return torch.cat(outputs)  # (T, H, K)


def _pick(x: Tensor, rows: slice | Tensor) -> Tensor:
    """Rows of x: a view for a slice, else a copy, which index_select makes five times as fast as x[rows]."""
    if isinstance(rows, slice):
        return x[rows]
    return x.index_select(0, rows)


def attention_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: which keys each of a sequence's last tokens sees."""
    past = keys - queries  # query i is token past + i of its sequence
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    mask = mask.tril(past)  # key <= past + i
    if window is not None:
        mask = mask.triu(past - window + 1)  # key > past + i - window
    return mask


def rope_frequencies(config: Config) -> Tensor:
    """Angle per position of each pair of coordinates (K/2,), float32; "llama3" slows the slowest further."""
    rope, width = config.rope, config.head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width  # (K/2,)
    frequencies = 1.0 / rope["rope_theta"] ** exponents
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        old_length = rope["original_max_position_embeddings"]
        turns = old_length * frequencies / (2 * math.pi)  # of each wave in the context of the first training
        smooth = (turns - low) / (high - low)
        smooth = smooth.clamp(0, 1)  # 1: fast waves stay; 0: slow ones are stretched
        return frequencies * (smooth + (1 - smooth) / rope["factor"])
    return frequencies


def rotary_angles(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, 1, K) by which apply_rotary turns tokens at these positions (T,)."""
    frequencies = to_device(rope_frequencies(config), positions.device)  # (K/2,)
    angles = positions[:, None] * frequencies  # (T, K/2)
    angles = angles.repeat(1, 2)[:, None]  # (T, 1, K)
    return angles.cos(), angles.sin()


def rotate_half(x: Tensor) -> Tensor:
    """(first, second) -> (-second, first), the halves of the last dimension: x turned by 90 degrees."""
    first, second = x.chunk(2, dim=-1)  # (T, heads, K/2) each
    return torch.cat((-second, first), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, heads, K) turned by the angles, float32: coordinates i and i + K/2 turn together."""
    return x * cos + rotate_half(x) * sin


class Cache:
    """Keys and values of tokens already run, flat: row r holds one token of some sequence, in every layer.

    A sequence is a list of rows, so sequences of any length lie side by side, and several may begin with the
    same rows: the choices of a question share the rows of its text. A row that no sequence uses is free.
    """

    def __init__(self, model: Transformer, rows: int):
        config, weight = model.config, model.lm_head.weight
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, config.head_dim)
        dtype = torch.float32  # what attend() computes in
        if flash_runs_on(weight):
            dtype = weight.dtype
        self.keys = torch.empty(shape, dtype=dtype, device=weight.device)  # (layers, R, G, K)
        self.values = torch.empty_like(self.keys)
        self.users = torch.zeros(rows, dtype=torch.int32)  # sequences that use each row; on the CPU

    def free_rows(self) -> Tensor:
        """The rows that no sequence uses, int64."""
        return (self.users == 0).nonzero().squeeze(1)

    def take(self, count: int) -> Tensor:
        """The first `count` free rows, (count,), for a sequence that uses them from now on."""
        rows = self.free_rows()[:count]
        if len(rows) < count:
            raise ValueError(f"the cache has {len(rows)} free rows, {count} are needed")
        self.users[rows] = 1
        return rows

    def share(self, rows: Tensor) -> None:
        """One more sequence uses these rows."""
        self.users[rows] += 1

    def release(self, rows: Tensor) -> None:
        """A sequence that used these rows has ended."""
        self.users[rows] -= 1

    def write(self, layer: int, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (T, G, K) of a layer into these rows (T,); return all of the layer's, (R, G, K)."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(0, rows, k.to(keys.dtype))
        values.index_copy_(0, rows, v.to(values.dtype))
        return keys, values


# ---------------------------------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    """Scale to unit root mean square in float32; the result has the weight's dtype, ready for a product."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        weight = self.weight.float()
        normed = F.rms_norm(x.float(), x.shape[-1:], weight, self.eps)
        return normed.to(self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """The usual layer norm, in float32; the result has the weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:  # (T, D) -> (T, D)
        weight, bias = self.weight.float(), self.bias.float()
        normed = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return normed.to(self.weight.dtype)


def mark_float32_output(*layers: nn.Linear) -> None:
    """Give these layers the attribute float32_output; without an adapter it changes nothing.

    If a linear layer has the attribute float32_output = True, LoRALinear adds the adapter's path to it in
    float32 and returns float32, in eval mode only.
    """
    for layer in layers:
        layer.float32_output = True


class Attention(nn.Module):
    """softmax(scale q k^T) v W_o within each sequence; q and k are normed (Qwen3) and rotated before.

    The last projection is the submodule called `output_name`: o_proj in LLaMA, out_proj in GPT-Neo.
    """

    def __init__(self, config: Config, layer: int, output_name: str):
        super().__init__()
        self.layer = layer
        self.output_name = output_name
        self.head_dim = config.head_dim
        self.scale = config.score_scale
        self.window = config.windows[layer]
        self.rotates = config.rotates[layer]
        width = config.hidden_size
        queries = config.num_attention_heads * config.head_dim  # H K
        keys = config.num_key_value_heads * config.head_dim  # G K
        self.q_proj = nn.Linear(width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.add_module(output_name, nn.Linear(queries, width, bias=config.out_bias))
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        # q and k are rotated in float32, the output is added to the float32 residual stream
        mark_float32_output(self.q_proj, self.k_proj, self.output_proj)

    @property
    def output_proj(self) -> nn.Linear:
        """The projection back to the width of the residual stream, under the checkpoint's name for it."""
        return getattr(self, self.output_name)

    def forward(self, x: Tensor, packed: PackedSequences, cache: Cache | None) -> Tensor:  # (T, D) -> (T, D)
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(1, heads)  # (T, H, K)
        k = self.k_proj(x).unflatten(1, heads)  # (T, G, K)
        v = self.v_proj(x).unflatten(1, heads)
        q, k = self.q_norm(q), self.k_norm(k)  # each head by itself
        if self.rotates:
            q = apply_rotary(q, *packed.rotation)
            k = apply_rotary(k, *packed.rotation)
        if cache is not None:
            k, v = cache.write(self.layer, k, v, packed.new_rows)  # (R, G, K): all the cache
        mixed = attend(q, k, v, packed, self.scale, self.window)  # (T, H, K)
        mixed = mixed.flatten(1).to(x.dtype)  # (T, H K)
        return self.output_proj(mixed)


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias)
        self.up_proj = nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)
        mark_float32_output(self.down_proj)  # it is added to the float32 residual stream

    def forward(self, x: Tensor) -> Tensor:  # (T, D) -> (T, F) -> (T, D)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); RMS norms."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer, "o_proj")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor, packed: PackedSequences, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), packed, cache)  # (T, D) float32
        return x + self.mlp(self.post_attention_layernorm(x))


class GPTNeoMLP(nn.Module):
    """c_proj(gelu(c_fc(x)))."""

    def __init__(self, config: Config):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.c_fc = nn.Linear(width, inner, bias)
        self.c_proj = nn.Linear(inner, width, bias)
        mark_float32_output(self.c_proj)  # it is added to the float32 residual stream

    def forward(self, x: Tensor) -> Tensor:  # (T, D) -> (T, F) -> (T, D)
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPTNeoBlock(nn.Module):
    """The same with layer norms, under GPT-Neo's names."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.norm_eps)
        self.attn = nn.ModuleDict({"attention": Attention(config, layer, "out_proj")})
        self.ln_2 = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = GPTNeoMLP(config)

    def forward(self, x: Tensor, packed: PackedSequences, cache: Cache | None) -> Tensor:
        x = x + self.attn["attention"](self.ln_1(x), packed, cache)  # (T, D) float32
        return x + self.mlp(self.ln_2(x))


# ------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Family:
    """What an architecture is made of, and what its checkpoints call the parts."""

    architecture: str
    block: type[nn.Module]
    norm: type[nn.Module]
    root_name: str  # the submodule that holds all that follows
    embedding_name: str
    positions_name: str | None  # None: positions are rotary
    blocks_name: str
    norm_name: str  # the norm after the last block


LLAMA_PARTS = LlamaBlock, RMSNorm, "model", "embed_tokens", None, "layers", "norm"
GPT_NEO_PARTS = GPTNeoBlock, LayerNorm, "transformer", "wte", "wpe", "h", "ln_f"
FAMILIES = {  # by the model_type of config.json
    "llama": Family("LlamaForCausalLM", *LLAMA_PARTS),
    "mistral": Family("MistralForCausalLM", *LLAMA_PARTS),
    "qwen2": Family("Qwen2ForCausalLM", *LLAMA_PARTS),
    "qwen3": Family("Qwen3ForCausalLM", *LLAMA_PARTS),
    "smollm3": Family("SmolLM3ForCausalLM", *LLAMA_PARTS),
    "gpt_neo": Family("GPTNeoForCausalLM", *GPT_NEO_PARTS),
}


class Transformer(nn.Module):
    """A decoder of any family. Parameters bear the checkpoint's names, so loading maps nothing."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # True: keep the blocks' inputs only, run blocks again backwards
        self.folder: Path | None = None  # where it was loaded from, tokenizer and all
        self.family = family = FAMILIES[config.model_type]
        width = config.hidden_size
        parts = nn.ModuleDict()
        parts[family.embedding_name] = nn.Embedding(config.vocab_size, width)
        if family.positions_name is not None:
            parts[family.positions_name] = nn.Embedding(config.max_position_embeddings, width)
        blocks = [family.block(config, layer) for layer in range(config.num_hidden_layers)]
        parts[family.blocks_name] = nn.ModuleList(blocks)
        parts[family.norm_name] = family.norm(width, config.norm_eps)
        self.add_module(family.root_name, parts)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.tie()

    def named_part(self, name: str) -> Any:
        """The part that the checkpoint calls so."""
        return getattr(self, self.family.root_name)[name]

    @property
    def embedding(self) -> nn.Embedding:
        return self.named_part(self.family.embedding_name)

    @property
    def learned_positions(self) -> nn.Embedding | None:
        name = self.family.positions_name
        return self.named_part(name) if name is not None else None

    @property
    def blocks(self) -> nn.ModuleList:
        return self.named_part(self.family.blocks_name)

    @property
    def norm(self) -> nn.Module:
        return self.named_part(self.family.norm_name)

    def tie(self) -> None:
        """Make the head the embedding itself, where the checkpoint has one matrix for both."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    def compile_blocks(self, backend: str = "inductor") -> None:
        """torch.compile for every block, once for packs of all lengths: two graphs, with and without adapter.

        Raises ValueError where the flash kernel does not run: other attention looks at every length.
        """
        if not flash_runs_on(self.lm_head.weight):
            raise ValueError("--compile needs a GPU of compute capability 8.0 or above, and --dtype bfloat16")
        for block in self.blocks:
            block.compile(dynamic=True, backend=backend)

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor,
        cache: Cache | None = None,
        rows: Tensor | None = None,
        past: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states (T, D), after the last norm, of tokens (T,) int64 in sequences end to end.

        cu_seqlens (B+1,) int32 holds their boundaries. Sequence b follows the tokens past[b] (int64, may be
        empty), which are places in this pack: a beginning that several sequences share runs once, as a part
        of one of them. With a cache they are its rows instead, and the pack's own keys and values go to the
        rows `rows` (T,). Rows that this pass fills can be followed, too: a layer writes before it reads.
        """
        packed = locate_sequences(cu_seqlens, tokens.device, rows, past)
        x = self.embedding(tokens).float()  # (T, D)
        if self.learned_positions is None:
            packed.rotation = rotary_angles(packed.positions, self.config)
        else:
            longest, limit = packed.longest_k, self.config.max_position_embeddings
            if longest > limit:
                raise ValueError(
                    f"a sequence of {longest} tokens exceeds the model's {limit} learned positions"
                )
            x = x + self.learned_positions(packed.positions)
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, packed, cache, use_reentrant=False)
            else:
                x = block(x, packed, cache)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------- losses


def float32_product(x: Tensor, weight: Tensor, out: Tensor, rounded: bool) -> None:
    """out (n, V) float32 = x (n, D) weight (V, D)^T, unrounded; not safe beside other threads if `rounded`.

    On a CPU only a float32 product has a float32 result. With `rounded` it may pass its factors through
    bfloat16: so bfloat16 weights, held as float32, run on bfloat16 matrix units. torch has one switch for
    that, for the whole process; it is set here for the length of one product.
    """
    if x.is_cuda and x.dtype != torch.float32:
        torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
        return
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "bf16" if rounded else before
        torch.mm(x, weight.T, out=out)
    finally:
        setting.fp32_precision = before


def head_chunks(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int = 512
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Log-probabilities and losses of `chunk` rows at a time, so that no (n, V) tensor ever exists.

    hidden (n, D), head_weight (V, D), targets (n,) int64. Yields (rows, log-probabilities (chunk, V), loss
    (chunk,)), both float32. The consumer may overwrite them, and must be done with them before the next: all
    chunks share one buffer, and the softmax runs in place.
    """
    on_cpu = not hidden.is_cuda
    rounded = on_cpu and head_weight.dtype == torch.bfloat16
    dtype = torch.float32 if on_cpu else head_weight.dtype
    hidden = hidden.to(dtype)  # once, not for every chunk
    head_weight = head_weight.to(dtype)
    most = min(chunk, len(targets))
    buffer = torch.empty(most, len(head_weight), device=hidden.device)  # (chunk, V) float32
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        tokens = targets[rows, None]  # (chunk, 1)
        logits = buffer[: len(tokens)]
        float32_product(hidden[rows], head_weight, logits, rounded)
        logprobs = torch.log_softmax(logits, dim=-1, out=logits)  # in place
        loss = -logprobs.gather(1, tokens)
        yield rows, logprobs, loss.squeeze(1)


@torch.no_grad()
def token_losses(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """Equation 3: the loss of each token, -log p(y_t | x, y_<t), in nats; (n,) float32, without a gradient.

    hidden (n, D) holds the state *before* each token (data.shift makes the pairing), head_weight (V, D) the
    output head, targets (n,) the tokens. WeightedTokenLoss is the trainable twin.
    """
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for rows, _, loss in head_chunks(hidden, head_weight, targets):
        losses[rows] = loss
    return losses


class WeightedTokenLoss(torch.autograd.Function):
    """Sum of w_t loss_t over n tokens, its gradient computed in the same sweep over the head's chunks.

    apply(hidden (n, D), head_weight (V, D), targets (n,) int64, weights (n,) float32, powers) returns the
    sum, a float32 scalar also under torch.autocast, and the losses (n,) float32, which have no gradient. The
    sum's gradient is that of hidden alone: the head is frozen. powers (a, b): a positive weight is multiplied
    by p^a, a negative one by p^b, p = exp(-loss) held constant, in the sum as in its gradient. p loss is
    greatest at p = 1/e: such a sum is no measure of progress.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, targets, weights, powers=(0.0, 0.0)):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)  # (n,)
        grad = torch.empty_like(hidden)  # (n, D)
        with torch.autocast(hidden.device.type, enabled=False):  # it would round sums and gradient to 16 bits
            for rows, logprobs, loss in head_chunks(hidden.detach(), head_weight, targets):
                weight = weights[rows]  # (chunk,)
                if any(powers):
                    of_positive, of_negative = powers
                    power = torch.where(weight > 0, of_positive, of_negative)  # (chunk,)
                    weight = weight * torch.exp(-power * loss)  # p = exp(-loss)
                total += weight @ loss
                losses[rows] = loss
                # d loss / d logits = softmax - one_hot, times the weight; in the chunk's own buffer
                grad_logits = logprobs.exp_()  # (chunk, V); logprobs are not read again
                token = torch.arange(len(loss), device=loss.device)
                grad_logits[token, targets[rows]] -= 1
                grad_logits *= weight[:, None]
                grad[rows] = grad_logits.to(head_weight.dtype) @ head_weight  # (chunk, D)
        ctx.save_for_backward(grad)  # all that backward needs
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx, upstream, _):  # of the sum; the losses have none
        (grad,) = ctx.saved_tensors
        return grad * upstream, None, None, None, None


# -------------------------------------------------------------------------------------------- config.json


@dataclass(frozen=True)
class Kind:
    """What a field of config.json may hold: its name in an error message, and the test of a value."""

    name: str
    allows: Callable[[object], bool]


@dataclass(frozen=True)
class Field:
    """A field that is read, with what transformers fills in where config.json lacks it."""

    kind: Kind
    default: object = None
    nullable: bool = False


def is_whole(value, least: int) -> bool:
    """Whether a value of a config is a whole number, true and false not among them."""
    return type(value) is int and value >= least


def is_number(value) -> bool:
    """Whether a value of a config is a number above 0 that a float can hold, a whole one too."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def only(value: str) -> Kind:
    """The kind of a field that has one supported value."""
    return Kind(f"{value!r}, the only one supported", lambda given: given == value)


SIZE = Kind("a whole number of at least 1", lambda value: is_whole(value, 1))
COUNT = Kind("a whole number of at least 0", lambda value: is_whole(value, 0))
NUMBER = Kind("a number above 0", is_number)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
LIST = Kind("a list", lambda value: isinstance(value, list))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))

# The fields of each model_type, first those that have no default.
SIZES = {
    "vocab_size": Field(SIZE),
    "hidden_size": Field(SIZE),
    "num_hidden_layers": Field(SIZE),
    "num_attention_heads": Field(SIZE),
}
LLAMA = SIZES | {
    "intermediate_size": Field(SIZE, 11008),
    "num_key_value_heads": Field(SIZE, nullable=True),
    "head_dim": Field(SIZE, nullable=True),
    "hidden_act": Field(only("silu"), "silu"),
    "max_position_embeddings": Field(SIZE, 2048),
    "rms_norm_eps": Field(NUMBER, 1e-6),
    "tie_word_embeddings": Field(FLAG, False),
    "rope_theta": Field(NUMBER, 1e4),
    "rope_scaling": Field(OBJECT, nullable=True),
    "rope_parameters": Field(OBJECT, nullable=True),
    "original_max_position_embeddings": Field(SIZE, nullable=True),
}
BIASES = {
    "attention_bias": Field(FLAG, False),
    "mlp_bias": Field(FLAG, False),
}
MISTRAL = LLAMA | {
    "intermediate_size": Field(SIZE, 14336),
    "num_key_value_heads": Field(SIZE, 8, nullable=True),
    "sliding_window": Field(SIZE, 4096, nullable=True),
    "max_position_embeddings": Field(SIZE, 131072),
}
QWEN2 = LLAMA | {
    "intermediate_size": Field(SIZE, 22016),
    "num_key_value_heads": Field(SIZE, 32, nullable=True),
    "max_position_embeddings": Field(SIZE, 32768),
    "use_sliding_window": Field(FLAG, False),
    "sliding_window": Field(SIZE, 4096, nullable=True),
    "max_window_layers": Field(COUNT, 28),
    "layer_types": Field(LIST, nullable=True),
}
QWEN3 = QWEN2 | {
    "head_dim": Field(SIZE, 128, nullable=True),
    "attention_bias": Field(FLAG, False),
}
SMOLLM3 = LLAMA | BIASES
SMOLLM3 |= {
    "num_key_value_heads": Field(SIZE, 4, nullable=True),
    "max_position_embeddings": Field(SIZE, 32768),
    "tie_word_embeddings": Field(FLAG, True),
    "rope_theta": Field(NUMBER, 2e6),
    "no_rope_layers": Field(LIST, nullable=True),
    "no_rope_layer_interval": Field(SIZE, 4),
    "use_sliding_window": Field(FLAG, False),
    "sliding_window": Field(SIZE, nullable=True),
    "layer_types": Field(LIST, nullable=True),
}
GPT_NEO = SIZES | {
    "intermediate_size": Field(SIZE, nullable=True),  # null: four times hidden_size
    "max_position_embeddings": Field(SIZE, 2048),
    "tie_word_embeddings": Field(FLAG, True),
    "attention_types": Field(LIST, nullable=True),
    "attention_layers": Field(LIST, nullable=True),
    "window_size": Field(SIZE, 256),
    "activation_function": Field(only("gelu_new"), "gelu_new"),
    "layer_norm_epsilon": Field(NUMBER, 1e-5),
}
FIELDS = {
    "llama": LLAMA | BIASES,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
    "gpt_neo": GPT_NEO,
}
# names of fields that change the computation in other models and leave no tensor that would be missed here
FOREIGN = re.compile(
    "multiplier|scal|softcap|clip|rope|rotary|alibi|qk_norm|bidirectional|layer_types|pruned_heads"
    "|attn_temperature|per_layer|parallel_(residual|attn|block)|transformers_weights|configuration_files"
)
# entries of auto_map: other loaders may run the code that they name instead of the architecture's own
CUSTOM_CODE = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")


def parse_config(raw: dict) -> Config:
    """What a config.json means to transformers. Raises ValueError for what this file does not compute."""
    model_type = model_type_of(raw)
    refuse_foreign_fields(raw, model_type)
    values = read_fields(raw, model_type)
    if model_type == "gpt_neo":
        shape = gpt_neo_shape(values)
    else:
        shape = llama_shape(values, model_type)
    return Config(
        model_type=model_type,
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        max_position_embeddings=values["max_position_embeddings"],
        tie_word_embeddings=values["tie_word_embeddings"],
        raw=raw,
        **shape,
    )


def llama_shape(values: dict, model_type: str) -> dict:
    """The other fields of Config for a model of LLaMA's kind."""
    heads = values["num_attention_heads"]
    key_heads = values["num_key_value_heads"] or heads
    if heads % key_heads:
        raise ValueError(f"num_key_value_heads = {key_heads} does not divide num_attention_heads = {heads}")
    head_dim = values["head_dim"] or values["hidden_size"] // heads
    if head_dim == 0 or head_dim % 2:
        raise ValueError(f"head_dim = {head_dim}, but coordinates are rotated in pairs")
    rotates = rotated_layers(values)
    attention_bias = values.get("attention_bias", False)
    return {
        "intermediate_size": values["intermediate_size"],
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "norm_eps": values["rms_norm_eps"],
        "rope": rope_config(values),
        "rotates": rotates,
        "windows": sliding_windows(values, model_type, rotates),
        "score_scale": head_dim**-0.5,
        "qk_norm": model_type == "qwen3",
        "qkv_bias": attention_bias or model_type == "qwen2",
        "out_bias": attention_bias,
        "mlp_bias": values.get("mlp_bias", False),
    }


def gpt_neo_shape(values: dict) -> dict:
    """The other fields of Config for GPT-Neo."""
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width < heads:
        raise ValueError(f"hidden_size = {width} is less than num_attention_heads = {heads}")
    return {
        "intermediate_size": values["intermediate_size"] or 4 * width,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "norm_eps": values["layer_norm_epsilon"],
        "rope": {},
        "rotates": (False,) * values["num_hidden_layers"],
        "windows": gpt_neo_windows(values),
        "score_scale": 1.0,
        "out_bias": True,
        "mlp_bias": True,
    }


def model_type_of(raw: dict) -> str:
    """The key of FAMILIES: `model_type` decides, as in transformers, and one of `architectures` confirms it.

    Real checkpoints write LLaMAForCausalLM, or a fork's name before it. Other heads and other families, which
    another loader may build from the name, are refused; where no name is given, none is missed.
    """
    names = raw.get("architectures") or []
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list):
        raise ValueError(f"architectures = {names!r} is not a list of names")
    found = []
    for model_type, family in FAMILIES.items():
        ending = family.architecture.lower()
        if any(isinstance(name, str) and name.lower().endswith(ending) for name in names):
            found.append(model_type)
    model_type = raw.get("model_type", found[0] if found else None)
    confirmed = model_type in found if names else model_type in list(FAMILIES)
    if confirmed:
        return model_type
    architecture = names[0] if names else "none named"
    if found:
        raise ValueError(f"model_type = {model_type!r} is not {found[0]!r}, that of {architecture}")
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    raise ValueError(f"architecture {architecture} is not supported; supported: {supported}")


def refuse_foreign_fields(raw: dict, model_type: str) -> None:
    """Raise ValueError for a field that may change the computation and that this family does not have.

    transformers ignores it; whoever wrote it meant something by it.
    """
    for name in ("quantization_config", "compression_config"):
        if raw.get(name):
            raise ValueError(f"{name}: {QUANTISED}")
    if raw.get("is_causal", True) is not True:
        raise ValueError(f"is_causal = {raw['is_causal']!r} is not supported, only true")
    code = raw.get("auto_map") or {}
    if not isinstance(code, dict):
        raise ValueError(f"auto_map = {code!r} is not an object")
    for name in CUSTOM_CODE:
        if code.get(name):
            hint = "its code is not run; remove it if the model does not need it"
            raise ValueError(f"auto_map: {name} = {code[name]!r} is not supported ({hint})")
    for name, value in raw.items():
        foreign = name not in FIELDS[model_type] and name[:1] != "_" and FOREIGN.search(name)
        if foreign and not is_neutral(value):
            hint = "remove it if the model does not need it"
            raise ValueError(f"{name} = {value!r} is not a field of model_type {model_type!r} ({hint})")


def is_neutral(value) -> bool:
    """Whether a field says nothing: null, false, 0, empty, or a factor of 1."""
    return not value or (type(value) in (int, float) and value == 1)


def read_fields(raw: dict, model_type: str) -> dict:
    """The family's fields, checked: as config.json has them, or with the default where it lacks one."""
    if model_type == "gpt_neo":  # it has names of its own for these two; the common ones go first
        own = {"num_hidden_layers": raw.get("num_layers"), "num_attention_heads": raw.get("num_heads")}
        raw = own | raw
    values = {}
    for name, field in FIELDS[model_type].items():
        value = raw.get(name, field.default)
        is_null = field.nullable and value is None
        if not is_null and not field.kind.allows(value):
            raise ValueError(f"{name} = {value!r} is not {field.kind.name}")
        values[name] = (
            float(value) if field.kind is NUMBER else value
        )  # torch takes no whole number above 2^63
    return values


def check_layers(name: str, entries: list, allowed: Sequence, layers: int) -> None:
    """Raise ValueError unless a list has an allowed entry for each layer."""
    fits = len(entries) == layers and all(entry in allowed for entry in entries)
    if not fits:
        raise ValueError(
            f"{name} = {entries!r} does not hold one of {tuple(allowed)} for each of {layers} layers"
        )


def rotated_layers(values: dict) -> tuple[bool, ...]:
    """Whether each layer rotates q and k: SmolLM3's does where no_rope_layers, despite its name, is 1.

    null: every layer rotates but each no_rope_layer_interval-th, the fourth by default.
    """
    layers = values["num_hidden_layers"]
    flags = values.get("no_rope_layers", [1] * layers)
    if flags is None:
        interval = values["no_rope_layer_interval"]
        flags = [(layer + 1) % interval != 0 for layer in range(layers)]
    flags = flags[:layers]  # more are allowed
    check_layers("no_rope_layers", flags, (0, 1), layers)
    return tuple(bool(flag) for flag in flags)


def sliding_windows(values: dict, model_type: str, rotates: tuple[bool, ...]) -> tuple[int | None, ...]:
    """The window of each layer; by model_type, unless layer_types says."""
    layers = len(rotates)
    window = values.get("sliding_window")
    if not values.get("use_sliding_window", True):
        window = None
    if values.get("layer_types") is not None:
        allowed = ["full_attention"]
        if window is not None:
            allowed.append("sliding_attention")
        check_layers("layer_types", values["layer_types"], allowed, layers)
        slides = [kind == "sliding_attention" for kind in values["layer_types"]]
    elif model_type in ("qwen2", "qwen3"):
        slides = [layer >= values["max_window_layers"] for layer in range(layers)]
    elif model_type == "smollm3":
        slides = [not rotated for rotated in rotates]
    else:  # every layer of Mistral; LLaMA has no window
        slides = [True] * layers
    return tuple(window if slide else None for slide in slides)


def gpt_neo_windows(values: dict) -> tuple[int | None, ...]:
    """The window of each layer, from attention_layers or, where that is null, attention_types."""
    kinds, layers = values["attention_layers"], values["num_hidden_layers"]
    if kinds is None:
        kinds = []
        patterns = values["attention_types"] or [[["global", "local"], 12]]
        try:
            for pattern, times in patterns:
                kinds += list(pattern) * times
        except (TypeError, ValueError):
            raise ValueError(f"attention_types = {patterns!r} is not a list of [[kinds], times]") from None
    check_layers("attention_layers, or what attention_types gives,", kinds, ("global", "local"), layers)
    window = values["window_size"]
    return tuple(window if kind == "local" else None for kind in kinds)


# the parameters of each kind of rotation, beside rope_theta
ROPE_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_config(values: dict) -> dict:
    """The rotation's parameters: rope_scaling (transformers 4), which goes first, or rope_parameters (5)."""
    parameters = values["rope_scaling"] or values["rope_parameters"] or {}
    rope = {"rope_theta": values["rope_theta"]} | parameters
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_type"] = kind
    if kind not in list(ROPE_PARAMETERS):
        supported = ", ".join(ROPE_PARAMETERS)
        raise ValueError(f"rope type {kind!r} is not supported; supported: {supported}")
    # at the top level it goes first; where there is none the model's length is the old one
    old_length = "original_max_position_embeddings"
    rope[old_length] = values[old_length] or rope.get(old_length, values["max_position_embeddings"])
    needed = "rope_theta", *ROPE_PARAMETERS[kind]
    for name in needed:
        if not is_number(rope.get(name)):
            raise ValueError(f"{name} = {rope.get(name)!r} of rope type {kind!r} is not a number above 0")
        rope[name] = float(rope[name])
    known = "rope_type", "type", old_length, *needed
    for name, value in rope.items():
        if name not in known and not is_neutral(value):
            raise ValueError(f"{name} = {value!r} is not a parameter of rope type {kind!r}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError("low_freq_factor of rope type 'llama3' is not below high_freq_factor")
    return rope


def read_config(folder: str | os.PathLike) -> Config:
    """Read config.json. Raises ValueError naming the file, the field, its value and what is allowed."""
    path = Path(folder) / "config.json"
    raw = _read_json(path)
    try:
        return parse_config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------- checkpoint folders

KNOWN_BUFFERS = re.compile(r"rotary_emb\.inv_freq|\.attn\.attention\.(masked_)?bias")  # in old checkpoints
CONVERT = "a pickle such as pytorch_model.bin is not read; transformers converts it: load, save_pretrained"
# files beside config.json and weights with which other loaders build another model
QUANTISED = "a quantised checkpoint is not read; use the one it was made from"
OTHER_MODELS = {
    "adapter_config.json": "transformers adds this adapter to the model; move it to a folder of its own",
    "shard-?????-model-?????-of-?????.safetensors": "a distributed checkpoint of transformers is not read",
    "hf_quant_config.json": QUANTISED,
    "quantize_config.json": QUANTISED,
}
TEXT_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def checkpoint_folder(path_or_repo: str) -> Path:
    """The local folder of a checkpoint; a Hub id, with an optional @revision, is fetched first.

    Only what is read is fetched: safetensors, JSON and tokenizer files at the top, no pickles, GGUF files or
    subfolders. Raises ValueError saying what is not there, or what the Hub wants first.
    """
    is_folder = os.path.isdir(path_or_repo)
    kinds = {Path(at).suffix.lower() for at in (os.listdir(path_or_repo) if is_folder else [path_or_repo])}
    if ".gguf" in kinds and ".safetensors" not in kinds:
        hint = "transformers converts it: from_pretrained(folder, gguf_file=NAME), then save_pretrained"
        raise ValueError(f"{path_or_repo}: GGUF is not read ({hint})")
    if is_folder:
        check_files(Path(path_or_repo))
        return Path(path_or_repo)
    repo, _, revision = str(path_or_repo).partition("@")
    if repo.startswith((".", "/", "~")) or repo.count("/") != 1:
        raise ValueError(f"{path_or_repo}: no such folder, and not a Hub id of the form owner/name")
    files = ["*.safetensors", "*.json", "merges.txt", "chat_template.jinja"]
    try:
        folder = snapshot_download(
            repo,
            revision=revision or None,
            allow_patterns=files,
            ignore_patterns=["*/*", "consolidated*"],
        )
    except Exception as error:  # the Hub's client has many error types
        if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # "not in the cache either" hides why the Hub was no help
        reason = " ".join(str(error).split())
        raise ValueError(f"{path_or_repo}: not a local folder, and the Hub said: {reason}") from None
    if not any(Path(folder).glob("*.safetensors")):
        raise ValueError(f"{path_or_repo}: no safetensors in this repository ({CONVERT})")
    check_files(Path(folder))
    return Path(folder)


def check_files(folder: Path) -> None:
    """Raise ValueError unless a folder is a checkpoint, and all of the model is in its config and weights.

    transformers 5.23 reads the files of OTHER_MODELS as well, vLLM those of quantised models.
    """
    if not (folder / "config.json").is_file():
        reason = "no config.json in it, so it is not a Hugging Face checkpoint folder"
        if (folder / "adapter_config.json").is_file():
            reason += ", but an adapter: --model takes the base model that it was trained on"
        raise ValueError(f"{folder}: {reason}")
    for pattern, reason in OTHER_MODELS.items():
        for path in sorted(folder.glob(pattern)):
            raise ValueError(f"{path}: {reason}")


def model_fingerprint(folder: Path) -> str:
    """sha256 of config.json and of every weight file, in full (about a second per gigabyte)."""
    digest = hashlib.sha256()
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(weight_files(folder)):
        with open(path, "rb") as file:
            file_digest = hashlib.file_digest(file, "sha256")
        digest.update(file_digest.digest())
    return digest.hexdigest()[:16]


def check_adapter_base(adapter: str | os.PathLike, checkpoint: Path) -> None:
    """Raise ValueError for an adapter of a run that was made from another base model than this one."""
    above = Path(adapter).resolve().parents  # RUN/METHOD/seed-S or RUN/reference
    for run in above[:2]:
        path = run / "config.json"
        inputs = _read_json(path).get("inputs") if path.is_file() else None
        if not isinstance(inputs, dict) or "model" not in inputs:
            continue
        if inputs["model"] != model_fingerprint(checkpoint):
            reason = f"the run was made from another base model; {checkpoint} has other files"
            raise ValueError(f"{adapter}: {reason} (inputs of {path})")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or else those that the index names."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():  # as in transformers, whatever an index beside it says
        return [whole]
    if not index.is_file():
        hint = f" ({CONVERT})" if any(folder.glob("*.bin")) else ""
        raise ValueError(f"{folder}: neither {whole.name} nor {index.name} in it{hint}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: no weight_map in it")
    files = set()
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: {name} points to {file!r}, which is not a file of this folder")
        if not (folder / file).is_file():
            raise ValueError(f"{index}: {file} is named there but is not in the folder")
        files.add(folder / file)
    return sorted(files)


def load_model(
    path_or_repo: str | os.PathLike, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """Load a checkpoint, tensor by tensor from memory-mapped safetensors, frozen and in eval mode.

    Raises ValueError naming the tensor for missing, unexpected, mis-shaped or non-finite weights.
    """
    folder = checkpoint_folder(str(path_or_repo))
    config = read_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    expected = dict(model.named_parameters(remove_duplicate=False))  # a tied head under both its names
    loaded: set[str] = set()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if not KNOWN_BUFFERS.search(name)]
            for name in names:
                with safe_open(path, framework="pt") as file:  # anew: the pages read so far are given back
                    tensor = file.get_tensor(name)
                _check_tensor(f"{path}: tensor {name}", tensor, expected.get(name))
                owner, _, leaf = name.rpartition(".")
                parameter = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
                setattr(model.get_submodule(owner), leaf, parameter)
                loaded.add(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    if config.tie_word_embeddings:
        loaded |= tie_loaded(model, loaded)
    if missing := sorted(expected.keys() - loaded):
        raise ValueError(f"{folder}: {len(missing)} tensors missing, the first is {missing[0]}")
    model.folder = folder
    return model.eval()


def tie_loaded(model: Transformer, loaded: set[str]) -> set[str]:
    """Tie embedding and head, of which the files may hold either or both; names of what is there now.

    Two that differ, as in merged or resized models, stay apart: config.json is wrong, as for transformers.
    """
    family = model.family
    embedding = f"{family.root_name}.{family.embedding_name}.weight"
    head = "lm_head.weight"
    if embedding not in loaded and head not in loaded:
        return set()
    if embedding not in loaded:
        model.embedding.weight = model.lm_head.weight
    elif head in loaded and not torch.equal(model.lm_head.weight, model.embedding.weight):
        raw = model.config.raw | {"tie_word_embeddings": False}
        model.config = replace(model.config, tie_word_embeddings=False, raw=raw)
    model.tie()
    return {embedding, head}


def _check_tensor(name: str, tensor: Tensor, expected: Tensor | None) -> None:
    if expected is None:
        raise ValueError(f"{name} is unexpected: the model has no such parameter")
    if tensor.shape != expected.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"{name} is {tensor.dtype}; read are {', '.join(DTYPES)}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds values that are not finite")


def save_model(model: Transformer, folder: str | os.PathLike, shard_bytes: int = 5 * 10**9) -> None:
    """Write a folder that transformers loads: safetensors in shards, tokenizer files, config.json as it was.

    config.json goes first and comes last: where it is, the checkpoint is whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}  # a tied head once
    save_torch_state_dict(weights, folder, max_shard_size=shard_bytes)
    if model.folder is not None and model.folder != folder:
        copy_text_files(model.folder, folder)
    raw = model.config.raw
    dtype_key = "dtype" if "dtype" in raw else "torch_dtype"
    dtype_name = str(model.lm_head.weight.dtype).removeprefix("torch.")
    text = json.dumps(raw | {dtype_key: dtype_name}, indent=2)
    temporary = folder / "config.json.tmp"
    temporary.write_text(text + "\n")
    for path in folder.glob("*.safetensors"):
        path.chmod(temporary.stat().st_mode)  # what the umask gives; safetensors lets the owner alone read
    os.replace(temporary, folder / "config.json")


def copy_text_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files and generation_config.json, those that are there."""
    for name in TEXT_FILES:
        file = source / name
        if file.is_file():
            shutil.copyfile(file, folder / name)


def _read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError naming the file for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not valid JSON, or no object in it")
    return content
