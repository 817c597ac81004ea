"""Tiny random checkpoints in the layout of the Hub, made on the spot: weights from numpy's PCG64, tokenizers trained here.

tests/tools/make_goldens.py computes transformers' logits for the same folders, so a golden needs no weights in the repo.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

KINDS = ("llama2", "llama3", "qwen2", "gpt_neo")
VOCAB = 384
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip  # short, so that all three regimes occur at width 8
CONFIGS = {
    "llama2": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "num_key_value_heads": 4,
               "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 128, "rope": (10000.0, None)},
    "llama3": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "num_key_value_heads": 2,
               "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 512, "head_dim": 8,
               "rope": (500000.0, LLAMA3_ROPE)},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "num_key_value_heads": 2,
              "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 512, "use_sliding_window": False,
              "rope": (1000000.0, None)},
    "gpt_neo": {"architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo", "vocab_size": VOCAB, "hidden_size": 32,
                "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 5,
                "attention_layers": ["global", "local"] * 2, "intermediate_size": None, "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-5, "max_position_embeddings": 128, "tie_word_embeddings": True, "embed_dropout": 0.0,
                "attention_dropout": 0.0, "resid_dropout": 0.0},
}  # fmt: skip
SPECIAL = {  # special tokens, bos, eos, whether the tokenizer puts the bos first
    "llama2": (["<unk>", "<s>", "</s>"], "<s>", "</s>", True),
    "llama3": (["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|>", "<|end_of_text|>", True),
    "qwen2": (["<|endoftext|>", "<|im_start|>"], None, "<|endoftext|>", False),
    "gpt_neo": (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>", False),  # GPT-2's tokenizer
}
LETTERS = r"'s|'t|'re|'ve|'m|'ll|'d"
SPLITS = {
    "gpt_neo": LETTERS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": f"(?i:{LETTERS})" + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": f"(?i:{LETTERS})" + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
TEXT = """The quick brown fox jumps over the lazy dog. Tell me the name of the river, and why it is so long.
<|user|> asks and <|assistant|> answers: the answer is that the water comes from the hills in the north.
What is 12 plus 30? It is 42. Write a short list of things: first, second, third. Thank you for the question!"""


def make_tokenizer(kind: str) -> Tokenizer:
    """A small tokenizer of the family's style; "llama2" is sentencepiece-like (words carry a mark, bytes fall back)."""
    special, bos, _, puts_bos = SPECIAL[kind]
    if kind == "llama2":
        raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        letters = sorted({c for c in TEXT if not c.isspace()} | {"▁"})
        first = special + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=first, initial_alphabet=letters, show_progress=False)
        raw.train_from_iterator(TEXT.split("\n"), trainer)
        raw = Tokenizer.from_str(_bytes_are_not_special(raw))
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        raw = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated")
        raw.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        raw.decoder = decoders.ByteLevel()
        if kind == "qwen2":
            raw.normalizer = normalizers.NFC()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        raw.train_from_iterator(TEXT.split("\n"), trainer)
    if puts_bos:
        pair = [(bos, raw.token_to_id(bos))]
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=pair)
    return raw


def _bytes_are_not_special(raw: Tokenizer) -> str:
    """The tokenizer's JSON with the byte tokens in the vocabulary only, and without the training's pre-tokenizer."""
    content = json.loads(raw.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    content["pre_tokenizer"] = None
    return json.dumps(content)


def save_tokenizer(folder: Path, kind: str) -> None:
    """tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    _, bos, eos, _ = SPECIAL[kind]
    make_tokenizer(kind).save(str(folder / "tokenizer.json"))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": {"__type": "AddedToken", "content": eos},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def config_of(kind: str, dialect: int) -> dict:
    """config.json as transformers 4 or 5 writes it."""
    config = dict(CONFIGS[kind]) if kind == "gpt_neo" else SHAPE | CONFIGS[kind]
    raw, (_, bos, eos, _) = make_tokenizer(kind), SPECIAL[kind]
    config |= {"bos_token_id": raw.token_to_id(bos) if bos else None, "eos_token_id": raw.token_to_id(eos)}
    if kind == "gpt_neo":
        return config | {"torch_dtype" if dialect == 4 else "dtype": "float32"}
    theta, scaling = config.pop("rope")
    if dialect == 4:
        return config | {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "float32"}
    return config | {"rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": theta}, "dtype": "float32"}


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, written down apart from model.py so that a wrong name there is noticed."""
    if config["model_type"] == "gpt_neo":
        return gpt_neo_shapes(config)
    d, f, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    k = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * k, config["num_key_value_heads"] * k
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (d,), p + "post_attention_layernorm.weight": (d,)}
        for name, out in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (out, d)
            if config["model_type"] == "qwen2":
                shapes[f"{p}self_attn.{name}_proj.bias"] = (out,)
        shapes |= {p + "self_attn.o_proj.weight": (d, q), p + "mlp.gate_proj.weight": (f, d)}
        shapes |= {p + "mlp.up_proj.weight": (f, d), p + "mlp.down_proj.weight": (d, f)}
    return shapes


def gpt_neo_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The same for GPT-Neo."""
    d = config["hidden_size"]
    shapes = {
        "transformer.wte.weight": (config["vocab_size"], d),
        "transformer.wpe.weight": (config["max_position_embeddings"], d),
    }
    shapes |= {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
    for i in range(config["num_layers"]):
        p = f"transformer.h.{i}."
        shapes |= {f"{p}{norm}.{leaf}": (d,) for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")}
        shapes |= {f"{p}attn.attention.{name}_proj.weight": (d, d) for name in ("q", "k", "v", "out")}
        shapes |= {p + "attn.attention.out_proj.bias": (d,), p + "mlp.c_fc.weight": (4 * d, d), p + "mlp.c_fc.bias": (4 * d,)}
        shapes |= {p + "mlp.c_proj.weight": (d, 4 * d), p + "mlp.c_proj.bias": (d,)}
    return shapes


def make_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights, drawn in name order; wide enough that a mistake moves the logits by far more than a tolerance."""
    rng = np.random.Generator(np.random.PCG64(seed))
    weights = {}
    for name, shape in sorted(shapes_of(config).items()):
        x = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        if len(shape) == 1:
            weights[name] = (
                1 + 0.2 * x if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.2 * x
            )
        else:
            weights[name] = x * (
                0.5
                if "embed" in name or "wte" in name or "wpe" in name
                else (1.5 if "q_proj" in name or "k_proj" in name else 1.0) / shape[1] ** 0.5
            )
    return weights


def make_checkpoint(
    folder: Path, kind: str, dialect: int = 4, shards: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """A whole checkpoint folder."""
    folder = Path(folder)
    save_tokenizer(folder, kind)
    config = config_of(kind, dialect)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.to(dtype) for name, tensor in make_weights(config, seed).items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    weight_map = {name: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: weights[n] for n in names if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def golden_inputs(kind: str) -> list[torch.Tensor]:
    """The sequences whose logits the goldens hold."""
    rng = np.random.Generator(np.random.PCG64(7))
    return [torch.from_numpy(rng.integers(3, VOCAB, length)) for length in (1, 6, 23, 23, 61)]


def adapter_weights(shapes: dict[str, tuple[int, ...]], seed: int = 1) -> dict[str, torch.Tensor]:
    """Random LoRA weights for these keys, drawn in name order."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return {name: torch.from_numpy(0.2 * rng.standard_normal(shapes[name]).astype(np.float32)) for name in sorted(shapes)}
