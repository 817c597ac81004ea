"""model.py: equal to transformers, the same packed, cached or one by one, and strict about what it loads."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import published
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import model as transformer
from lora import add_lora
from model import Cache, RMSNorm, WeightedTokenLoss, apply_rotary, load_model, read_config, rope_frequencies
from model import save_model, token_losses

GOLDENS = Path(__file__).parent / "goldens" / "logits.safetensors"
FAMILY_GOLDENS = GOLDENS.with_name("families.safetensors")
CONFIG_GOLDENS = json.loads(GOLDENS.with_name("configs.json").read_text())


def boundaries(sequences) -> torch.Tensor:
    return torch.tensor([0] + [len(s) for s in sequences]).cumsum(0).int()


@torch.inference_mode()
def packed_logits(model, sequences) -> torch.Tensor:
    return model.lm_head(model(torch.cat(sequences), boundaries(sequences)))


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("dialect, shards", [(4, 1), (5, 3)])
def test_logits_are_those_of_transformers(tmp_path, kind, dialect, shards):
    model = load_model(tiny.make_checkpoint(tmp_path, kind, dialect, shards))
    golden = load_file(GOLDENS)[kind]
    assert (packed_logits(model, tiny.golden_inputs(kind))[:, ::3] - golden).abs().max() < 1e-4


@pytest.mark.parametrize("kind", tiny.FAMILIES)
@pytest.mark.parametrize("dialect, shards", [(4, 1), (5, 3)])
def test_logits_of_the_later_families_are_those_of_transformers(tmp_path, kind, dialect, shards):
    """And of a copy by save_model; make_goldens.py sees that transformers reads the copy."""
    model = load_model(tiny.make_checkpoint(tmp_path / "m", kind, dialect, shards))
    golden = load_file(FAMILY_GOLDENS)[kind]
    assert (packed_logits(model, tiny.golden_inputs(kind))[:, ::9] - golden).abs().max() < 1e-4
    save_model(model, tmp_path / "copy")
    assert (
        packed_logits(load_model(tmp_path / "copy"), tiny.golden_inputs(kind))[:, ::9] - golden
    ).abs().max() < 1e-4


CASE_NAMES = [tiny.case_name(kind, changes) for kind, changes, _ in tiny.CONFIG_CASES]


@pytest.mark.parametrize("kind, changes, refusal", tiny.CONFIG_CASES, ids=CASE_NAMES)
def test_a_config_means_what_it_means_to_transformers_or_is_refused(tmp_path, kind, changes, refusal):
    folder = tiny.make_config_case(tmp_path, kind, changes)
    if refusal is not None:
        with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: .*{refusal}") as raised:
            load_model(folder)
        assert "\n" not in str(raised.value)
        return
    golden = torch.tensor(CONFIG_GOLDENS["cases"][tiny.case_name(kind, changes)])
    logits = packed_logits(load_model(folder), [tiny.CASE_TOKENS])
    assert (torch.tensor(tiny.case_logits(logits)) - golden).abs().max() < 1e-4


SHAPES = {
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_layers",
    "num_heads",
}  # never left out
WORDS = {"pad_token_id", "bos_token_id", "eos_token_id"}  # the tokenizer's files say them
TRAINING = {
    "initializer_range",
    "attention_dropout",
    "resid_dropout",
    "embed_dropout",
}  # the base is frozen: none in it
OUTPUTS = {"use_cache", "output_hidden_states", "return_dict"}  # what transformers returns besides
CLASSIFIERS = {"id2label", "label2id", "problem_type", "classifier_dropout"}
LABELS = {
    "transformers_version",
    "architectures",
    "dtype",
    "is_encoder_decoder",
    "chunk_size_feed_forward",
    "pretraining_tp",
}
IGNORED = WORDS | TRAINING | OUTPUTS | CLASSIFIERS | LABELS
BEYOND_THE_CLASS = {
    "rope_scaling",
    "rope_theta",
    "original_max_position_embeddings",
    "head_dim",
    "attention_layers",
}


@pytest.mark.parametrize("model_type", CONFIG_GOLDENS["fields"])
def test_every_field_of_transformers_classes_is_read_or_ignored_on_purpose(model_type):
    """And where config.json lacks a field, its default is the one there."""
    theirs, ours = CONFIG_GOLDENS["fields"][model_type], transformer.FIELDS[model_type]
    assert theirs.keys() - ours.keys() - SHAPES - IGNORED == set()
    assert ours.keys() - theirs.keys() - SHAPES - BEYOND_THE_CLASS == set()
    for name, field in ours.items():
        if name in theirs and name not in SHAPES:
            assert (field.default or None) == (theirs[name] or None), name


def test_every_field_that_is_read_has_a_case():
    """Each is tried with another value, left out, or refused above."""
    for model_type, fields in transformer.FIELDS.items():
        tried = {name for kind, changes, _ in tiny.CONFIG_CASES for name in changes}
        assert fields.keys() - tried - SHAPES == set(), model_type


@pytest.mark.parametrize("kind", ["llama3", *tiny.FAMILIES, "qwen2", "gpt_neo"])
def test_no_config_is_a_traceback(kind):
    """Every field with every kind of wrong value: read, or refused in one line."""
    raw = tiny.config_of(kind, 4)
    names = {
        *transformer.FIELDS[raw["model_type"]],
        *raw,
        "is_causal",
        "num_hidden_layers",
        "num_attention_heads",
    }
    odd = [
        None,
        True,
        0,
        -1,
        3.5,
        math.nan,
        math.inf,
        "8",
        "",
        [],
        [1],
        [[]],
        [None],
        ["global"],
        {},
        {"type": []},
        {"a": {}},
    ]
    for name in names:
        for value in odd:
            try:
                transformer.parse_config(raw | {name: value})
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) > 20


def test_mistral_has_a_window_where_its_config_is_silent(tmp_path):
    folder = tiny.make_checkpoint(tmp_path, "mistral")
    edit_config(folder, sliding_window=tiny.GONE)
    assert read_config(folder).windows == (4096, 4096)


def test_bfloat16_files_are_read_into_float32(tmp_path):
    model = load_model(tiny.make_checkpoint(tmp_path, "llama3", dtype=torch.bfloat16))
    golden = load_file(GOLDENS)["llama3.bfloat16"]
    assert model.lm_head.weight.dtype == torch.float32
    assert (packed_logits(model, tiny.golden_inputs("llama3"))[:, ::3] - golden).abs().max() < 1e-4


@pytest.mark.parametrize("kind", tiny.KINDS + tiny.FAMILIES)
@torch.inference_mode()
def test_packed_cached_and_alone_agree(tmp_path, kind):
    """Attention has several faces (runs of equal lengths, one sequence, a cache, a shared prefix) and one meaning."""
    model = load_model(tiny.make_checkpoint(tmp_path, kind))
    sequences = [s for s in tiny.golden_inputs(kind) if len(s) > 20]
    together = model(torch.cat(sequences), boundaries(sequences)).split([len(s) for s in sequences])
    for sequence, packed in zip(sequences, together):
        assert torch.allclose(model(sequence, boundaries([sequence])), packed, atol=1e-5)
    cache, seen = Cache(model, 500), []
    past = [torch.empty(0, dtype=torch.int64)] * len(sequences)
    for cut in (
        (0, 3),
        (3, 4),
        (4, 6),
        (6, 20),
    ):  # a prompt, one token, two at once, and more than the windows
        parts = [s[slice(*cut)] for s in sequences]
        rows = cache.take(sum(len(p) for p in parts))
        hidden = model(torch.cat(parts), boundaries(parts), cache, rows, past)
        past = [torch.cat(pair) for pair in zip(past, rows.split([len(p) for p in parts]))]
        seen.append(hidden.split([len(p) for p in parts]))
    for i, packed in enumerate(together):
        assert torch.allclose(torch.cat([step[i] for step in seen]), packed[:20], atol=1e-5)
    shared = past[2]  # two continuations of the same twenty tokens
    tails = [sequences[2][20:23], sequences[1][20:22]]
    hidden = model(torch.cat(tails), boundaries(tails), cache, cache.take(5), [shared, shared])
    for tail, own in zip(tails, hidden.split([3, 2])):
        alone = torch.cat((sequences[2][:20], tail))
        assert torch.allclose(model(alone, boundaries([alone]))[20:], own, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS + tiny.FAMILIES)
@torch.inference_mode()
def test_a_beginning_is_shared_within_one_pass(tmp_path, kind):
    """The second sequence follows tokens of the first in the same pass: in the pack, and in a cache's rows anywhere."""
    model = load_model(tiny.make_checkpoint(tmp_path, kind))
    first, other = [s for s in tiny.golden_inputs(kind) if len(s) > 20][:2]
    tail = other[:9]
    parts, second = [first, tail], torch.cat([first[:12], tail])
    alone = model(first, boundaries([first])), model(second, boundaries([second]))[12:]
    expected = torch.cat(alone)
    places = torch.arange(12)
    hidden = model(torch.cat(parts), boundaries(parts), past=[places[:0], places])
    assert torch.allclose(hidden, expected, atol=1e-5)
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(0))[: len(expected)]
    hidden = model(torch.cat(parts), boundaries(parts), Cache(model, 60), rows, [rows[:0], rows[:12]])
    assert torch.allclose(hidden, expected, atol=1e-5)


def test_rows_of_the_cache_are_free_when_their_last_sequence_ends(tmp_path):
    cache = Cache(load_model(tiny.make_checkpoint(tmp_path, "llama3")), 6)
    first = cache.take(4)
    cache.share(first[:2])
    assert first.tolist() == [0, 1, 2, 3] and cache.free_rows().tolist() == [4, 5]
    cache.release(first)
    assert cache.take(3).tolist() == [2, 3, 4]
    cache.release(first[:2])
    assert cache.free_rows().tolist() == [0, 1, 5]
    with pytest.raises(ValueError, match="the cache has 3 free rows, 4 are needed"):
        cache.take(4)


@torch.inference_mode()
def naive_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch.nn.attention.varlen computes, sequence by sequence and query by query; its arguments, and its demands."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and q.dtype == k.dtype == v.dtype
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max() and window_size[1] == 0
    assert enable_gqa == (q.shape[1] != k.shape[1])
    out, share = torch.empty_like(q), q.shape[1] // k.shape[1]
    for b in range(len(cu_q) - 1):
        first, last, keys = cu_q[b], cu_q[b + 1], slice(cu_k[b], cu_k[b + 1])
        ahead = (cu_k[b + 1] - cu_k[b]) - (last - first)
        for i in range(last - first):
            low = 0 if window_size[0] < 0 else max(0, ahead + i - window_size[0])
            for head in range(q.shape[1]):
                seen_k = k[keys, head // share][low : ahead + i + 1].float()
                seen_v = v[keys, head // share][low : ahead + i + 1].float()
                out[first + i, head] = ((seen_k @ q[first + i, head].float()) * scale).softmax(0) @ seen_v
    return out


@pytest.mark.parametrize("kind", ["llama3", "gpt_neo", "mistral", "qwen3"])
@torch.inference_mode()
def test_the_flash_path_gives_what_the_cpu_path_gives(tmp_path, monkeypatch, kind):
    """No GPU here: the kernel's place is taken by a naive loop, everything around it is what a GPU runs."""
    model = load_model(tiny.make_checkpoint(tmp_path / "m", kind))
    tokens, cu = torch.randint(0, 90, (29,)), torch.tensor([0, 11, 20, 29], dtype=torch.int32)
    later, cu_later = torch.randint(0, 90, (5,)), torch.tensor([0, 2, 5], dtype=torch.int32)

    def both():
        cache = Cache(model, 40)
        rows = cache.take(29)
        first = model(tokens, cu, cache, rows, [rows[:0]] * 3)
        past = [rows[:11], rows[20:29]]
        return model(tokens, cu), first, model(later, cu_later, cache, cache.take(5), past)

    expected = both()
    monkeypatch.setattr("model.flash_runs_on", lambda x: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", naive_varlen)
    assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(both(), expected))


@torch.inference_mode()
def test_the_flash_kernel_gets_half_precision_from_adapted_layers(tmp_path, monkeypatch):
    """Rotations and adapted projections are float32; a GPU's kernel must still get bfloat16, or it would not be used."""
    model = load_model(tiny.make_checkpoint(tmp_path / "m", "llama3"), dtype=torch.bfloat16)
    add_lora(model, r=4)
    seen = []

    def kernel(q, *args, enable_gqa, **rest):
        seen.append(q.dtype)
        return naive_varlen(q, *args, enable_gqa=enable_gqa, **rest)

    monkeypatch.setattr("model.flash_runs_on", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    model(torch.randint(0, 90, (9,)), torch.tensor([0, 4, 9], dtype=torch.int32))
    assert seen == [torch.bfloat16] * model.config.num_hidden_layers


def test_bfloat16_logits_are_not_rounded():
    """Products of bfloat16 numbers are kept in float32; rounded to bfloat16 the losses would be .03 off."""
    torch.manual_seed(0)
    hidden, head = torch.randn(50, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    targets = torch.randint(0, 300, (50,))
    exact = -torch.log_softmax(hidden.double() @ head.double().T, -1).gather(1, targets[:, None]).squeeze(1)
    rounded = -torch.log_softmax((hidden @ head.T).double(), -1).gather(1, targets[:, None]).squeeze(1)
    assert (token_losses(hidden, head, targets) - exact).abs().max() < 1e-4 < (rounded - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_float32_inside(dtype):
    """x / sqrt(mean x^2 + eps) * weight in float64; only the result is rounded to the weight's dtype."""
    torch.manual_seed(0)
    norm = RMSNorm(48, 1e-2).to(dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(20, 48)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-2).sqrt() * norm.weight.double()
    found = norm(x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert found.dtype == dtype and torch.allclose(found.float(), exact.to(dtype).float(), rtol=tolerance)


def test_losses_stay_float32_under_autocast():
    """Found at fe070b7: torch.autocast(bfloat16) rounded the sum, 2.171875 for 2.1429, and the gradient with it."""
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(700, 16), torch.randn(50, 16), torch.randint(50, (700,))
    weights = torch.randn(700) / 700
    exact = -torch.log_softmax(hidden.double() @ head.double().T, -1).gather(1, targets[:, None]).squeeze(1)
    found = {}
    for autocast in (False, True):
        x = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total, losses = WeightedTokenLoss.apply(x, head, targets, weights)
            total.backward()
            assert torch.equal(token_losses(hidden, head, targets), losses)
        assert total.dtype == losses.dtype == torch.float32 and not losses.requires_grad
        assert (
            abs(total.item() - (weights.double() @ exact).item()) < 1e-5
            and (losses - exact).abs().max() < 1e-5
        )
        found[autocast] = total.detach(), x.grad
    assert all(torch.equal(a, b) for a, b in zip(found[False], found[True]))


def test_a_hidden_state_that_is_not_a_number_gives_a_loss_that_is_none():
    """Nothing on the way from logits to losses hides it: neither a power nor a weight of zero."""
    hidden, head, targets = torch.randn(5, 16), torch.randn(50, 16), torch.arange(5)
    hidden[3] = torch.nan
    assert token_losses(hidden, head, targets).isnan().tolist() == [False, False, False, True, False]
    for weight in (1.0, -1.0, 0.0):
        total, losses = WeightedTokenLoss.apply(hidden, head, targets, torch.full((5,), weight), (1.0, 1.0))
        assert total.isnan() and losses.isnan().tolist() == [False, False, False, True, False]


def test_token_losses_in_chunks(tmp_path):
    """Equation 3 against log_softmax in float64, over more rows than one chunk of the head holds."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(1300, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets = torch.randint(50, (1300,), generator=generator)
    oracle = -torch.log_softmax(hidden.double() @ head.double().T, -1)[torch.arange(1300), targets]
    assert torch.allclose(token_losses(hidden, head, targets).double(), oracle, atol=1e-5)


@pytest.mark.parametrize("kind, shard_bytes", [("llama2", 10**9), ("llama3", 30_000)])
def test_saved_model_loads_again(tmp_path, kind, shard_bytes):
    model = load_model(tiny.make_checkpoint(tmp_path / "a", kind))
    save_model(model, tmp_path / "b", shard_bytes)
    again = load_model(tmp_path / "b")
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (
        tmp_path / "a" / "tokenizer.json"
    ).read_bytes()
    assert (len(list((tmp_path / "b").glob("*.safetensors"))) > 1) == (shard_bytes < 10**6)
    assert not list((tmp_path / "b").glob("*.tmp"))


@pytest.mark.parametrize("dialect, key", [(4, "torch_dtype"), (5, "dtype")])
def test_a_saved_config_says_the_dtype_of_its_weights(tmp_path, dialect, key):
    save_model(
        load_model(tiny.make_checkpoint(tmp_path / "a", "qwen3", dialect), dtype=torch.bfloat16),
        tmp_path / "b",
    )
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert after == before | {key: "bfloat16"}
    assert {tensor.dtype for tensor in load_file(tmp_path / "b" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value != tiny.GONE}))


NAME = "model.layers.0.mlp.up_proj.weight"
BROKEN = {
    "missing": (lambda f: edit_weights(f, lambda t: t.pop(NAME)), f"missing, the first is {NAME}"),
    "unexpected": (
        lambda f: edit_weights(f, lambda t: t.update(extra=torch.ones(1))),
        "tensor extra is unexpected",
    ),
    "mis-shaped": (
        lambda f: edit_weights(f, lambda t: t.update({NAME: torch.ones(3, 4)})),
        r"up_proj.weight has shape \(3, 4\)",
    ),
    "not finite": (
        lambda f: edit_weights(f, lambda t: t[NAME].fill_(torch.inf)),
        "up_proj.weight holds values that are not",
    ),
    "architecture": (
        lambda f: edit_config(f, architectures=["BloomForCausalLM"]),
        "BloomForCausalLM is not supported",
    ),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:900]),
        "not a whole",
    ),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is not read",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused(tmp_path, case):
    breaks, message = BROKEN[case]
    folder = tiny.make_checkpoint(tmp_path, "llama2")
    breaks(folder)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_an_index_may_not_leave_its_folder(tmp_path):
    folder = tiny.make_checkpoint(tmp_path, "llama2", shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(ValueError, match="not a file of this folder"):
        load_model(folder)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    index.write_text(index.read_text().replace("../", ""))
    with pytest.raises(
        ValueError, match="model-00002-of-00002.safetensors is named there but is not in the folder"
    ):
        load_model(folder)


def test_buffers_of_old_checkpoints_are_skipped(tmp_path):
    """GPT-Neo's files of before 2023 carry each layer's causal mask, and old LLaMAs their rotary frequencies."""
    for kind, names in (
        ("gpt_neo", ("transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias")),
        ("llama2", ("model.layers.0.self_attn.rotary_emb.inv_freq",)),
    ):
        folder = tiny.make_checkpoint(tmp_path / kind, kind)
        edit_weights(folder, lambda t: t.update({name: torch.ones(1) for name in names}))
        golden = load_file(GOLDENS)[kind]
        assert (
            packed_logits(load_model(folder), tiny.golden_inputs(kind))[:, ::3] - golden
        ).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama3", "gpt_neo"])
@pytest.mark.parametrize("held", ["both", "head alone"])
def test_a_tied_matrix_may_be_stored_twice_or_as_the_head(tmp_path, kind, held):
    """safetensors' save_model writes one of two shared names, and it may be the head's."""
    folder = tiny.make_checkpoint(tmp_path, kind)
    embedding = {"llama3": "model.embed_tokens.weight", "gpt_neo": "transformer.wte.weight"}[kind]
    take = (lambda t: t[embedding].clone()) if held == "both" else (lambda t: t.pop(embedding))
    edit_weights(folder, lambda t: t.update({"lm_head.weight": take(t)}))
    model = load_model(folder)
    assert model.lm_head.weight is model.embedding.weight and model.config.tie_word_embeddings
    assert (
        packed_logits(model, tiny.golden_inputs(kind))[:, ::3] - load_file(GOLDENS)[kind]
    ).abs().max() < 1e-4


def test_another_head_in_a_tied_file_is_used_and_exported_untied(tmp_path):
    """Found at fe070b7: merged and resized models hold one; it was skipped, and logits were off by 15."""
    folder = tiny.make_checkpoint(tmp_path / "m", "llama3")
    head = torch.randn(tiny.VOCAB, 32, generator=torch.Generator().manual_seed(0))
    edit_weights(folder, lambda t: t.update({"lm_head.weight": head}))
    model = load_model(folder)
    assert torch.equal(model.lm_head.weight, head) and not torch.equal(model.embedding.weight, head)
    save_model(model, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["tie_word_embeddings"] is False
    copy = load_model(tmp_path / "copy")
    assert torch.equal(copy.lm_head.weight, head) and torch.equal(
        copy.embedding.weight, model.embedding.weight
    )


def test_a_checkpoint_without_a_tensor_is_refused_by_its_name(tmp_path):
    """Its parameter would stay on the meta device, or be what a fresh layer draws."""
    folder = tiny.make_checkpoint(tmp_path, "llama3")
    edit_weights(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match="1 tensors missing, the first is model.layers.1.mlp.up_proj.weight"):
        load_model(folder)


@pytest.mark.parametrize(
    "name, message",
    [
        ("adapter_config.json", "transformers adds this adapter to the model"),
        (
            "shard-00001-model-00001-of-00002.safetensors",
            "a distributed checkpoint of transformers is not read",
        ),
        ("hf_quant_config.json", "a quantised checkpoint is not read"),
        ("quantize_config.json", "a quantised checkpoint is not read"),
    ],
)
def test_a_file_that_makes_another_model_elsewhere_is_refused_by_name(tmp_path, name, message):
    """transformers 5.23 with peft 0.21 puts an adapter in the folder on top (logits of a tiny model moved by 11), and
    looks for its own shards before model.safetensors; modelopt's checkpoints are quantised by what hf_quant_config.json says.
    """
    folder = tiny.make_checkpoint(tmp_path, "llama3")
    (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        load_model(folder)


@pytest.mark.parametrize(
    "name", ["model.fp16.safetensors", "consolidated.safetensors", "pytorch_model.bin", "params.json"]
)
def test_files_that_transformers_does_not_open_are_passed_over(tmp_path, name):
    """A variant is read where somebody asks for it by name, and a pickle only where there is no safetensors file."""
    folder = tiny.make_checkpoint(tmp_path, "llama3")
    (folder / name).write_text("{}")
    load_model(folder)


def test_a_folder_without_a_config_is_called_that(tmp_path):
    """Found at 14fe823: a folder of an adapter, or of anything, was lectured about sentencepiece."""
    with pytest.raises(
        ValueError, match="no config.json in it, so it is not a Hugging Face checkpoint folder$"
    ):
        transformer.checkpoint_folder(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="but an adapter: --model takes the base model"):
        transformer.checkpoint_folder(str(tmp_path))


@pytest.mark.parametrize("theta", [10**18, 10**19, 10**40])
def test_a_huge_whole_number_is_a_number(theta):
    """torch takes no whole number of 64 bits or more; transformers 5.23 fails at 10^19 (int too big to convert)."""
    raw = tiny.config_of("llama2", 4)
    whole, decimal = (transformer.parse_config(raw | {"rope_theta": x}) for x in (theta, float(theta)))
    assert torch.equal(rope_frequencies(whole), rope_frequencies(decimal))
    scaling = tiny.LLAMA3_ROPE | {"original_max_position_embeddings": theta}
    rope_frequencies(transformer.parse_config(raw | {"rope_scaling": scaling}))


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps"])
def test_what_no_float_holds_is_no_number(name):
    with pytest.raises(ValueError, match=f"{name} = 10+ .*is not a number above 0"):
        transformer.parse_config(tiny.config_of("llama2", 4) | {name: 10**309})


def test_an_adapter_of_another_base_is_refused(tmp_path):
    """Its run's config.json has the fingerprint of the base; shapes alone fit every model of a size."""
    adapter = published.make_run(tmp_path)
    transformer.check_adapter_base(adapter, tmp_path / "base")
    other = tiny.make_checkpoint(tmp_path / "other", "llama3", seed=9)
    with pytest.raises(
        ValueError, match="seed-0: the run was made from another base model; .*other has other files"
    ):
        transformer.check_adapter_base(adapter, other)
    reference = published.make_run(tmp_path, name="reference")
    with pytest.raises(ValueError, match="reference: the run was made from another base model"):
        transformer.check_adapter_base(reference, other)
    (tmp_path / "run" / "config.json").write_text("{}")  # of something else
    transformer.check_adapter_base(adapter, other)


def test_eval_refuses_an_adapter_of_another_base(tmp_path, monkeypatch, capsys):
    adapter = published.make_run(tmp_path)
    other = tiny.make_checkpoint(tmp_path / "other", "llama3", seed=9)
    command = [
        "eval.py",
        "--model",
        str(other),
        "--adapter",
        str(adapter),
        "--prompt",
        "Hello",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        evaluation.main()
    assert stop.value.code == 2 and "made from another base model" in capsys.readouterr().err


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    """safetensors 0.8 writes for the owner alone, 0600, beside JSON files of 0644."""
    model = load_model(tiny.make_checkpoint(tmp_path / "m", "llama2"))
    before = os.umask(umask)
    try:
        save_model(model, tmp_path / "copy", shard_bytes=40_000)
    finally:
        os.umask(before)
    files = list((tmp_path / "copy").iterdir())
    assert len(files) > 4 and {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_neither_head_nor_embedding_is_a_missing_tensor(tmp_path):
    folder = tiny.make_checkpoint(tmp_path, "llama3")
    edit_weights(folder, lambda t: t.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match="2 tensors missing, the first is lm_head.weight"):
        load_model(folder)


@pytest.mark.parametrize("stale", ["whole shards", "missing shards", "no JSON"])
def test_a_whole_file_goes_before_an_index(tmp_path, stale):
    """As in transformers; the index may be left over from another model, or name files that are gone."""
    folder = tiny.make_checkpoint(tmp_path, "llama2", shards=2, seed=9)
    tiny.make_checkpoint(tmp_path, "llama2")
    if stale == "missing shards":
        (folder / "model-00002-of-00002.safetensors").unlink()
    if stale == "no JSON":
        (folder / "model.safetensors.index.json").write_text("{")
    logits = packed_logits(load_model(folder), tiny.golden_inputs("llama2"))
    assert (logits[:, ::3] - load_file(GOLDENS)["llama2"]).abs().max() < 1e-4


def test_tensors_are_looked_for_in_the_files_not_in_the_index(tmp_path):
    """transformers opens the files that an index names and reads all that is in them."""
    folder = tiny.make_checkpoint(tmp_path, "llama2", shards=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": files[1], "model.norm.weight": files[0]}}))
    logits = packed_logits(load_model(folder), tiny.golden_inputs("llama2"))
    assert (logits[:, ::3] - load_file(GOLDENS)["llama2"]).abs().max() < 1e-4


def test_learned_positions_end(tmp_path):
    model = load_model(tiny.make_checkpoint(tmp_path, "gpt_neo"))
    with pytest.raises(ValueError, match="129 tokens exceeds the model's 128 learned positions"):
        model(torch.full((129,), 5), torch.tensor([0, 129], dtype=torch.int32))


def test_checkpoints_of_the_team(shared):
    """A checkpoint made elsewhere, with transformers' logits beside it."""
    folder = shared / "data" / "checkpoints" / "tiny_llama2"
    reference = load_file(folder / "reference.safetensors")
    sequences = [reference[f"input_{i}"] for i in range(4)]
    logits = packed_logits(load_model(folder), sequences).split([len(s) for s in sequences])
    assert all((ours - reference[f"logits_{i}"]).abs().max() < 2e-4 for i, ours in enumerate(logits))


def test_neither_folder_nor_hub_id():
    with pytest.raises(ValueError, match="no such folder"):
        load_model("./not/here")


def test_llama3_slows_only_the_long_waves():
    """LLaMA-3.2's own parameters have frequencies in the smooth band, which the tiny checkpoints lack."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    expected, between = [], 0
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / 32)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 32 + smooth * frequency)
            between += 1
    config = types.SimpleNamespace(rope=rope, head_dim=64)
    assert between > 1 and np.allclose(rope_frequencies(config).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("field", ["factor", "low_freq_factor", "high_freq_factor"])
def test_rope_scaling_without_its_fields_is_refused_at_once(tmp_path, field):
    """Found at d954c0b: a KeyError in the first forward pass, after the run folder was begun."""
    folder = tiny.make_checkpoint(tmp_path, "llama3")
    config = json.loads((folder / "config.json").read_text())
    scaling = config.get("rope_scaling") or config["rope_parameters"]
    del scaling[field]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: {field} = None of rope type 'llama3'"):
        read_config(folder)


def test_the_gpu_check_rehearses_on_a_cpu():
    """tests/tools/gpu_check.py is run first on a GPU: that it runs, and that its comparisons hold here, is seen here."""
    command = [sys.executable, str(Path(__file__).parent / "tools" / "gpu_check.py"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "24 of 24 agree" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_turns_pairs_in_float32(dtype):
    """Coordinates i and i + K/2 are the parts of a complex number that is multiplied by e^(i angle)."""
    torch.manual_seed(0)
    x, angles = torch.randn(11, 3, 8).to(dtype), torch.randn(11, 1, 4)
    turned = torch.complex(*x.float().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    both = angles.repeat(1, 1, 2)
    found = apply_rotary(x, both.cos(), both.sin())
    assert found.dtype == torch.float32 and torch.allclose(
        found, torch.cat((turned.real, turned.imag), -1), atol=1e-6
    )
