"""Tiny random checkpoints in the layout of the Hub, made on the spot: weights from numpy's PCG64, tokenizers trained here.

tests/tools/make_goldens.py computes transformers' logits for the same folders, so a golden needs no weights in the repo.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

KINDS = ("llama2", "llama3", "qwen2", "gpt_neo")
FAMILIES = ("mistral", "qwen3", "smollm3")  # goldens of their own: families.safetensors
VOCAB = 384
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip  # short, so that all three regimes occur at width 8
CONFIGS = {
    "llama2": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 128,
        "rope": (10000.0, None),
    },
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "head_dim": 8,
        "rope": (500000.0, LLAMA3_ROPE),
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "use_sliding_window": False,
        "rope": (1000000.0, None),
    },
    "gpt_neo": {
        "architectures": ["GPTNeoForCausalLM"],
        "model_type": "gpt_neo",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 5,
        "attention_layers": ["global", "local"] * 2,
        "intermediate_size": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
        "resid_dropout": 0.0,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "sliding_window": 9,
        "rope": (10000.0, None),
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 2,
        "rope": (1000000.0, None),
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "hidden_act": "silu",
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": 1,
        "rope": (5000000.0, None),
    },
}
TOKENIZER = {
    "mistral": "llama2",
    "qwen3": "qwen2",
    "smollm3": "llama3",
}  # the family whose tokenizer they have
SPECIAL = {  # special tokens, bos, eos, whether the tokenizer puts the bos first
    "llama2": (["<unk>", "<s>", "</s>"], "<s>", "</s>", True),
    "llama3": (["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|>", "<|end_of_text|>", True),
    "qwen2": (["<|endoftext|>", "<|im_start|>"], None, "<|endoftext|>", False),
    "gpt_neo": (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>", False),  # GPT-2's tokenizer
}
LETTERS = r"'s|'t|'re|'ve|'m|'ll|'d"
SPLITS = {
    "gpt_neo": LETTERS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": f"(?i:{LETTERS})"
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": f"(?i:{LETTERS})"
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
TEXT = """The quick brown fox jumps over the lazy dog. Tell me the name of the river, and why it is so long.
<|user|> asks and <|assistant|> answers: the answer is that the water comes from the hills in the north.
What is 12 plus 30? It is 42. Write a short list of things: first, second, third. Thank you for the question!"""


def make_tokenizer(kind: str) -> Tokenizer:
    """A small tokenizer of the family's style; "llama2" is sentencepiece-like (words carry a mark, bytes fall back)."""
    kind = TOKENIZER.get(kind, kind)
    special, bos, _, puts_bos = SPECIAL[kind]
    if kind == "llama2":
        raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        letters = sorted({c for c in TEXT if not c.isspace()} | {"▁"})
        first = special + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=first, initial_alphabet=letters, show_progress=False
        )
        raw.train_from_iterator(TEXT.split("\n"), trainer)
        raw = Tokenizer.from_str(_bytes_are_not_special(raw))
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        raw = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated")
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        raw.decoder = decoders.ByteLevel()
        if kind == "qwen2":
            raw.normalizer = normalizers.NFC()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        raw.train_from_iterator(TEXT.split("\n"), trainer)
    if puts_bos:
        pair = [(bos, raw.token_to_id(bos))]
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=pair
        )
    return raw


def _bytes_are_not_special(raw: Tokenizer) -> str:
    """The tokenizer's JSON with the byte tokens in the vocabulary only, and without the training's pre-tokenizer."""
    content = json.loads(raw.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token["content"].startswith("<0x")
    ]
    content["pre_tokenizer"] = None
    return json.dumps(content)


def save_tokenizer(folder: Path, kind: str) -> None:
    """tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    _, bos, eos, _ = SPECIAL[TOKENIZER.get(kind, kind)]
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
    raw, (_, bos, eos, _) = make_tokenizer(kind), SPECIAL[TOKENIZER.get(kind, kind)]
    config |= {"bos_token_id": raw.token_to_id(bos) if bos else None, "eos_token_id": raw.token_to_id(eos)}
    if kind == "gpt_neo":
        return config | {"torch_dtype" if dialect == 4 else "dtype": "float32"}
    theta, scaling = config.pop("rope")
    if dialect == 4:
        return config | {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "float32"}
    return config | {
        "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": theta},
        "dtype": "float32",
    }


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
            if config["model_type"] == "qwen2" or config.get("attention_bias"):
                shapes[f"{p}self_attn.{name}_proj.bias"] = (out,)
        shapes |= {p + "self_attn.o_proj.weight": (d, q), p + "mlp.gate_proj.weight": (f, d)}
        shapes |= {p + "mlp.up_proj.weight": (f, d), p + "mlp.down_proj.weight": (d, f)}
        if config["model_type"] == "qwen3":
            shapes |= {p + "self_attn.q_norm.weight": (k,), p + "self_attn.k_norm.weight": (k,)}
        if config.get("attention_bias"):
            shapes[p + "self_attn.o_proj.bias"] = (d,)
        if config.get("mlp_bias"):
            shapes |= {
                p + "mlp.gate_proj.bias": (f,),
                p + "mlp.up_proj.bias": (f,),
                p + "mlp.down_proj.bias": (d,),
            }
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
        shapes |= {
            p + "attn.attention.out_proj.bias": (d,),
            p + "mlp.c_fc.weight": (4 * d, d),
            p + "mlp.c_fc.bias": (4 * d,),
        }
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
                1 + 0.2 * x
                if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
                else 0.2 * x
            )
        else:
            weights[name] = x * (
                0.5
                if "embed" in name or "wte" in name or "wpe" in name
                else (1.5 if "q_proj" in name or "k_proj" in name else 1.0) / shape[1] ** 0.5
            )
    return weights


def make_checkpoint(
    folder: Path,
    kind: str,
    dialect: int = 4,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
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
    weight_map = {
        name: f"model-{i * shards // len(names) + 1:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        save_file(
            {n: weights[n] for n in names if weight_map[n] == file}, folder / file, metadata={"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def jsonl(rows: Iterable) -> str:
    """The text of a JSONL file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def golden_inputs(kind: str) -> list[torch.Tensor]:
    """The sequences whose logits the goldens hold."""
    rng = np.random.Generator(np.random.PCG64(7))
    return [torch.from_numpy(rng.integers(3, VOCAB, length)) for length in (1, 6, 23, 23, 61)]


def adapter_weights(shapes: dict[str, tuple[int, ...]], seed: int = 1) -> dict[str, torch.Tensor]:
    """Random LoRA weights for these keys, drawn in name order."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return {
        name: torch.from_numpy(0.2 * rng.standard_normal(shapes[name]).astype(np.float32))
        for name in sorted(shapes)
    }


GONE = "(gone)"  # as a value: the key is taken out of config.json
L3 = LLAMA3_ROPE | {"factor": 4.0}
WINDOWED = {"use_sliding_window": True, "sliding_window": 8}
LINEAR = {"rope_type": "linear", "factor": 4.0}
SHAPING = (
    "attention_bias",
    "mlp_bias",
    "head_dim",
    "num_key_value_heads",
    "intermediate_size",
    "tie_word_embeddings",
)
CONFIG_CASES = [  # a kind, what is changed in its config.json, and the error if it is refused (None: equal to transformers)
    ("llama2", {"architectures": "LlamaForCausalLM"}, None),
    ("llama2", {"architectures": None}, None),
    ("llama2", {"architectures": []}, None),
    ("llama2", {"architectures": {"0": "LlamaForCausalLM"}}, "architectures = {.*} is not a list of names"),
    ("llama2", {"architectures": [["LlamaForCausalLM"]]}, "is not supported; supported: LlamaForCausalLM"),
    (
        "llama2",
        {"architectures": ["LlamaModel"]},
        "LlamaModel is not supported; supported: LlamaForCausalLM, Mistral",
    ),
    ("llama2", {"architectures": ["LLaMAForCausalLM"]}, None),
    ("llama2", {"architectures": ["FlashLlamaForCausalLM"]}, None),
    ("llama2", {"architectures": ["Other", "LlamaForCausalLM"]}, None),
    ("qwen2", {"architectures": ["QWen2ForCausalLM", "Other"]}, None),
    (
        "llama2",
        {"architectures": ["LlamaForSequenceClassification"]},
        "architecture LlamaForSequenceClassification is not supported; supported: ",
    ),
    (
        "qwen2",
        {"architectures": ["Qwen2ForProcessRewardModel"]},
        "Qwen2ForProcessRewardModel is not supported",
    ),
    ("gpt_neo", {"architectures": ["GPTNeoForTokenClassification"]}, "GPTNeoForTokenClassification is not"),
    ("qwen2", {"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM is not supported"),
    ("llama2", {"architectures": None, "model_type": "bloom"}, "architecture none named is not supported"),
    ("llama2", {"model_type": "mistral"}, "model_type = 'mistral' is not 'llama', that of LlamaForCausalLM"),
    ("llama2", {"vocab_size": 384.0}, "vocab_size = 384.0 is not a whole number of at least 1"),
    ("llama2", {"hidden_size": GONE}, "hidden_size = None is not a whole number of at least 1"),
    ("llama2", {"num_hidden_layers": True}, "num_hidden_layers = True is not a whole number"),
    ("llama2", {"intermediate_size": 100, "attention_bias": True, "mlp_bias": True}, None),
    ("llama2", {"attention_bias": GONE, "mlp_bias": GONE}, None),
    ("llama2", {"attention_bias": "true"}, "attention_bias = 'true' is not true or false"),
    ("llama2", {"mlp_bias": None}, "mlp_bias = None is not true or false"),
    ("llama2", {"num_key_value_heads": 2}, None),
    ("llama2", {"num_key_value_heads": None}, None),
    ("llama2", {"num_key_value_heads": GONE}, None),
    ("llama2", {"num_key_value_heads": 0}, "num_key_value_heads = 0 is not a whole number of at least 1"),
    ("llama2", {"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads = 4"),
    ("llama2", {"head_dim": None}, None),
    ("llama2", {"head_dim": 16}, None),
    ("llama2", {"head_dim": 7}, "head_dim = 7, but coordinates are rotated in pairs"),
    ("llama2", {"head_dim": "8"}, "head_dim = '8' is not a whole number"),
    ("llama2", {"hidden_act": GONE}, None),
    ("llama2", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not 'silu', the only one supported"),
    ("llama2", {"hidden_act": None}, "hidden_act = None is not 'silu'"),
    ("llama2", {"max_position_embeddings": GONE}, None),
    ("llama2", {"max_position_embeddings": "2k"}, "max_position_embeddings = '2k' is not a whole number"),
    ("llama2", {"rms_norm_eps": 0.5}, None),
    ("llama2", {"rms_norm_eps": GONE}, None),
    ("llama2", {"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5' is not a number above 0"),
    ("llama2", {"rms_norm_eps": None}, "rms_norm_eps = None is not a number above 0"),
    ("llama2", {"tie_word_embeddings": None}, "tie_word_embeddings = None is not true or false"),
    ("llama3", {"tie_word_embeddings": True}, None),
    # the rotation
    ("llama2", {"rope_theta": 500}, None),
    ("llama2", {"rope_theta": 10**10}, None),
    ("llama2", {"rope_theta": GONE}, None),
    ("llama2", {"rope_theta": None}, "rope_theta = None is not a number above 0"),
    ("llama2", {"rope_theta": "1e4"}, "rope_theta = '1e4' is not a number above 0"),
    ("llama2", {"rope_scaling": LINEAR}, None),
    ("llama2", {"rope_scaling": {"type": "linear", "factor": 4.0}}, None),
    ("llama2", {"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 4.0}}, None),
    ("llama2", {"rope_scaling": LINEAR | {"rope_theta": 300.0}}, None),
    (
        "llama2",
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
        None,
    ),
    ("llama2", {"rope_scaling": LINEAR, "rope_theta": GONE, "rope_parameters": {"rope_theta": 7.0}}, None),
    (
        "llama2",
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
        None,
    ),
    ("llama2", {"rope_scaling": {}, "rope_parameters": LINEAR}, None),
    ("llama2", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 1.0}}, None),
    ("llama2", {"rope_scaling": {"factor": 4.0}}, "factor = 4.0 is not a parameter of rope type 'default'"),
    (
        "llama2",
        {"rope_scaling": {"full_attention": LINEAR}},
        "full_attention = .* is not a parameter of rope type 'default'",
    ),
    (
        "llama2",
        {"rope_scaling": {"type": "linear"}},
        "factor = None of rope type 'linear' is not a number above 0",
    ),
    (
        "llama2",
        {"rope_scaling": LINEAR | {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5 is not a parameter",
    ),
    ("llama2", {"rope_scaling": [4.0]}, "rope_scaling = .* is not an object"),
    (
        "llama2",
        {"rope_scaling": {"rope_type": ["linear"]}},
        "rope type .'linear'. is not supported; supported: ",
    ),
    ("llama2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
    (
        "llama2",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        "rope type 'dynamic' is not supported",
    ),
    (
        "llama2",
        {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}},
        "rope type 'longrope' is not supported",
    ),
    (
        "llama2",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor = 0.5 is not a field of model_type 'llama'",
    ),
    ("llama3", {"original_max_position_embeddings": 16}, None),
    (
        "llama3",
        {"rope_scaling": {k: v for k, v in L3.items() if k != "original_max_position_embeddings"}},
        None,
    ),
    ("llama3", {"rope_scaling": L3, "max_position_embeddings": 64}, None),
    (
        "llama3",
        {"rope_scaling": L3 | {"attention_factor": 2.0}},
        "attention_factor = 2.0 is not a parameter of rope type",
    ),
    (
        "llama3",
        {"rope_scaling": L3 | {"low_freq_factor": 4.0}},
        "low_freq_factor of rope type 'llama3' is not below",
    ),
    # windows, and layers without rotation
    ("llama2", {"sliding_window": 8}, None),
    ("llama2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, None),
    (
        "llama2",
        {"layer_types": ["sliding_attention"] * 2},
        "layer_types = .* is not a field of model_type 'llama'",
    ),
    ("mistral", {"sliding_window": 5}, None),
    ("mistral", {"sliding_window": None}, None),
    ("mistral", {"use_sliding_window": False}, None),
    ("mistral", {"sliding_window": 0}, "sliding_window = 0 is not a whole number of at least 1"),
    ("mistral", {"sliding_window": "9"}, "sliding_window = '9' is not a whole number of at least 1"),
    ("mistral", {"attention_bias": GONE, "tie_word_embeddings": GONE}, None),
    ("qwen2", WINDOWED | {"max_window_layers": 1}, None),
    ("qwen2", WINDOWED | {"max_window_layers": 0}, None),
    ("qwen2", WINDOWED, None),
    ("qwen2", WINDOWED | {"use_sliding_window": GONE}, None),
    (
        "qwen2",
        WINDOWED | {"layer_types": ["sliding_attention", "full_attention"], "max_window_layers": 1},
        None,
    ),
    ("qwen2", WINDOWED | {"layer_types": ["sliding_attention"]}, "layer_types = .* for each of 2 layers"),
    (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types = .* one of .'full_attention',. for each",
    ),
    (
        "qwen2",
        {"layer_types": ["full_attention", "chunked_attention"]},
        "layer_types = .* for each of 2 layers",
    ),
    ("qwen2", {"layer_types": "full_attention"}, "layer_types = 'full_attention' is not a list"),
    ("qwen2", {"max_window_layers": None}, "max_window_layers = None is not a whole number of at least 0"),
    ("qwen2", {"head_dim": 16}, None),
    ("qwen2", {"attention_bias": False, "num_key_value_heads": None}, None),
    ("qwen2", {"use_mrope": True}, "use_mrope = True is not a field of model_type 'qwen2'"),
    ("qwen3", WINDOWED | {"max_window_layers": 1}, None),
    ("qwen3", {"attention_bias": True, "head_dim": 8}, None),
    ("qwen3", {"rope_scaling": LINEAR}, None),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 0]}, None),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 0, 1, 1]}, None),
    ("smollm3", {"no_rope_layer_interval": 2}, None),
    ("smollm3", {"no_rope_layer_interval": GONE, "tie_word_embeddings": GONE, "rope_theta": GONE}, None),
    (
        "smollm3",
        {"no_rope_layers": []},
        r"no_rope_layers = \[\] does not hold one of \(0, 1\) for each of 5 layers",
    ),
    (
        "smollm3",
        {"no_rope_layer_interval": 0},
        "no_rope_layer_interval = 0 is not a whole number of at least 1",
    ),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers = .* for each of 5 layers"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1, "0"]}, "no_rope_layers = .* for each of 5 layers"),
    ("smollm3", WINDOWED, None),
    (
        "smollm3",
        WINDOWED | {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]},
        None,
    ),
    ("smollm3", WINDOWED | {"use_sliding_window": False}, None),
    ("smollm3", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}, None),
    # GPT-Neo
    ("gpt_neo", {"window_size": 3}, None),
    ("gpt_neo", {"window_size": "8"}, "window_size = '8' is not a whole number of at least 1"),
    ("gpt_neo", {"window_size": 0}, "window_size = 0 is not a whole number"),
    ("gpt_neo", {"attention_types": [[["global"], 4]]}, None),
    ("gpt_neo", {"attention_types": [[["global"], 4]], "attention_layers": GONE}, None),
    ("gpt_neo", {"attention_types": [[["global"], 3], [["local"], 1]], "attention_layers": GONE}, None),
    ("gpt_neo", {"attention_layers": ["local"] * 4}, None),
    ("gpt_neo", {"attention_types": GONE}, None),
    (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "attention_layers": GONE},
        "attention_types gives",
    ),
    (
        "gpt_neo",
        {"attention_types": [["global", 4]], "attention_layers": GONE},
        "'g', 'l', .* for each of 4 layers",
    ),
    (
        "gpt_neo",
        {"attention_types": [[["global"], "4"]], "attention_layers": GONE},
        "attention_types = .* is not a list of",
    ),
    (
        "gpt_neo",
        {"attention_types": ["global"], "attention_layers": GONE},
        r"attention_types = .* is not a list of \[\[kinds",
    ),
    ("gpt_neo", {"attention_layers": ["sparse"] * 4}, "'sparse'.* for each of 4 layers"),
    ("gpt_neo", {"num_hidden_layers": 2, "attention_layers": ["global", "local"]}, None),
    ("gpt_neo", {"num_attention_heads": 2}, None),
    ("gpt_neo", {"num_heads": 2}, None),
    ("gpt_neo", {"layer_norm_epsilon": 0.5}, None),
    ("gpt_neo", {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon = '1e-5' is not a number above 0"),
    ("gpt_neo", {"intermediate_size": GONE, "activation_function": GONE, "tie_word_embeddings": GONE}, None),
    ("gpt_neo", {"activation_function": "gelu"}, "activation_function = 'gelu' is not 'gelu_new'"),
    ("gpt_neo", {"rope_scaling": LINEAR}, "rope_scaling = .* is not a field of model_type 'gpt_neo'"),
    # what no family has
    ("llama2", {"is_causal": False}, "is_causal = False is not supported, only true"),
    ("llama2", {"per_layer_config": {"0": {"rms_norm_eps": 0.5}}}, "per_layer_config = .* is not a field of"),
    (
        "llama2",
        {"transformers_weights": "other.safetensors"},
        "transformers_weights = 'other.safetensors' is not a field of",
    ),
    (
        "llama2",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config: a quantised checkpoint",
    ),
    (
        "llama2",
        {"embedding_multiplier": 12.0},
        "embedding_multiplier = 12.0 is not a field of model_type 'llama'",
    ),
    (
        "llama2",
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.LlamaForCausalLM"}},
        "auto_map: AutoModelForCausalLM = 'modeling_x.LlamaForCausalLM' is not supported .its code is not run",
    ),
    ("llama2", {"auto_map": {"AutoConfig": "configuration_x.Config"}}, "auto_map: AutoConfig = "),
    ("llama2", {"auto_map": ["modeling_x.Model"]}, "auto_map = .* is not an object"),
    ("llama2", {"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}}, None),
    ("llama2", {"configuration_files": ["config.4.0.0.json"]}, "configuration_files = .* is not a field of"),
    ("llama2", {"pruned_heads": {"0": [1]}}, "pruned_heads = .* is not a field of model_type 'llama'"),
    ("llama2", {"pruned_heads": {}}, None),
    ("llama2", {"alibi": True}, "alibi = True is not a field of model_type 'llama'"),
    ("llama2", {"use_qk_norm": True}, "use_qk_norm = True is not a field of model_type 'llama'"),
    ("llama2", {"scale_emb": 12}, "scale_emb = 12 is not a field of model_type 'llama'"),
    ("llama2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not a field of"),
    ("llama2", {"embedding_multiplier": 1.0, "logit_scale": None, "rope_interleaved": False}, None),
    (
        "llama2",
        {"pretraining_tp": 2, "use_cache": False, "unsloth_version": "2026.1", "temperature": 0.6},
        None,
    ),
]


def case_name(kind: str, changes: dict) -> str:
    """How a case is called in goldens/configs.json."""
    return f"{kind} {json.dumps(changes)}"


def make_config_case(folder: Path, kind: str, changes: dict) -> Path:
    """The kind's checkpoint with another config.json, and weights of the shapes that it asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(kind, 4)
    shaping = {
        name: value
        for name, value in changes.items()
        if name in SHAPING and isinstance(value, (int, bool)) and value
    }
    if changes.get("num_key_value_heads", 0) is None:
        shaping["num_key_value_heads"] = config["num_attention_heads"]
    if kind == "gpt_neo" and "num_hidden_layers" in changes:
        shaping["num_layers"] = changes["num_hidden_layers"]
    save_file(make_weights(config | shaping), folder / "model.safetensors", metadata={"format": "pt"})
    config = {name: value for name, value in (config | changes).items() if value != GONE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CASE_TOKENS = torch.arange(3, 43)  # (40,): longer than every window above


def case_logits(logits: torch.Tensor) -> list[float]:
    """Eight of the last token's logits (40, V), which all that comes before has a part in."""
    return [round(x, 5) for x in logits[-1, ::48].tolist()]
