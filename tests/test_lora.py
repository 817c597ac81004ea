"""lora.py: the side path, its files, and the way back to the untouched model."""

import json
import os
import shlex
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import lora
from lora import (
    DEFAULT_TARGETS,
    LoRALinear,
    add_lora,
    dropout_mask,
    load_adapter,
    lora_disabled,
    lora_layers,
    lora_parameters,
    merge_lora,
    read_adapter_config,
    remove_lora,
    save_adapter,
)
from model import load_model

TOKENS, CU = torch.arange(3, 30), torch.tensor([0, 12, 27], dtype=torch.int32)


def adapted(folder, kind="llama3", **options):
    """A model with an adapter that does something."""
    model = load_model(tiny.make_checkpoint(folder, kind) if not folder.exists() else folder)
    add_lora(model, **({"r": 4, "alpha": 8, "dropout": 0.0} | options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora_parameters(model).items():
        parameter.data.normal_(std=0.1, generator=generator)
    return model


def test_a_fresh_adapter_changes_nothing_and_alone_is_trainable(tmp_path):
    model = load_model(tiny.make_checkpoint(tmp_path, "llama2"))
    before = model(TOKENS, CU)
    names = set(dict(model.named_parameters()))
    add_lora(model, r=4, dropout=0.5)
    model.eval()
    assert torch.equal(model(TOKENS, CU), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(lora_parameters(model))
    assert len(lora_layers(model)) == 7 * 2
    remove_lora(model)
    assert set(dict(model.named_parameters())) == names and torch.equal(model(TOKENS, CU), before)


@torch.inference_mode()
def test_the_side_path_is_the_formula(tmp_path):
    for rslora in (False, True):
        layer = next(iter(lora_layers(adapted(tmp_path / "m", rslora=rslora)).values()))
        base = layer.base_layer
        x = torch.randn(5, base.in_features)
        delta = layer.lora_B.weight.double() @ layer.lora_A.weight.double() * 8 / (2 if rslora else 4)
        assert torch.allclose(layer(x).double(), x.double() @ (base.weight.double() + delta).T, atol=1e-5)


@torch.inference_mode()
def test_disabled_is_the_untouched_model_bit_for_bit(tmp_path):
    model = adapted(tmp_path / "m")
    untouched = load_model(tmp_path / "m")(TOKENS, CU)
    with_adapter = model(TOKENS, CU)
    assert not torch.allclose(with_adapter, untouched, atol=1e-2)
    with pytest.raises(RuntimeError), lora_disabled(model):
        assert torch.equal(model(TOKENS, CU), untouched)
        raise RuntimeError("restored after an exception too")
    assert torch.equal(model(TOKENS, CU), with_adapter)


@torch.inference_mode()
def test_merging_keeps_the_outputs(tmp_path):
    model = adapted(tmp_path / "m", kind="qwen2")
    before = model(TOKENS, CU)
    merge_lora(model)
    assert not lora_layers(model) and torch.allclose(model(TOKENS, CU), before, atol=1e-4)


def test_dropout_keeps_its_share():
    torch.manual_seed(0)
    x = torch.ones(400, 500)
    keep = dropout_mask(x, 0.1)
    assert keep.dtype == torch.uint8 and set(keep.unique().tolist()) == {0, 1}
    assert abs((keep == 0).float().mean().item() - 0.1) < 0.003
    assert not torch.equal(dropout_mask(x, 0.1), keep)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("wide_output", [False, True])
def test_the_adapted_product_and_its_gradients_are_autograds(dtype, tolerance, bias, dropout, wide_output):
    """One node against the same formula in plain torch, in float32, with the same dropout mask."""
    torch.manual_seed(0)
    base = torch.nn.Linear(24, 16, bias=bias).to(dtype).requires_grad_(False)
    base.float32_output = wide_output
    layer = LoRALinear(base, r=4, alpha=8, dropout=dropout).train(dropout > 0)
    for low_rank in (layer.lora_A, layer.lora_B):
        low_rank.weight.data.normal_()
    x = torch.randn(3, 10, 24).to(dtype).requires_grad_()
    upstream = torch.randn(3, 10, 16)
    torch.manual_seed(1)
    y = layer(x)
    (y.float() * upstream).sum().backward()
    torch.manual_seed(1)
    keep = (
        dropout_mask(x.detach().flatten(0, 1), dropout).view_as(x) / (1 - dropout)
        if dropout
        else torch.ones_like(x)
    )
    wide = x.detach().float().requires_grad_()
    a, b = (low_rank.weight.detach().clone().requires_grad_() for low_rank in (layer.lora_A, layer.lora_B))
    expected = (
        wide @ base.weight.float().T + 2 * (wide * keep) @ a.T @ b.T + (base.bias.float() if bias else 0)
    )
    (expected * upstream).sum().backward()
    pairs = (
        (y, expected),
        (x.grad, wide.grad),
        (layer.lora_A.weight.grad, a.grad),
        (layer.lora_B.weight.grad, b.grad),
    )
    for ours, theirs in pairs:
        assert (ours.float() - theirs).abs().max() < tolerance * theirs.abs().max()
    assert y.dtype == (torch.float32 if wide_output and not layer.training else dtype)
    assert layer.lora_A.weight.grad.dtype == torch.float32


@torch.inference_mode()
def test_adapter_files_are_pefts(tmp_path):
    model = adapted(tmp_path / "m")
    save_adapter(model, tmp_path / "a", "some/model")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    assert tensors[key.format("A")].shape == (4, 80) and tensors[key.format("B")].shape == (32, 4)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (
        config["peft_type"] == "LORA"
        and config["lora_alpha"] == 8
        and config["base_model_name_or_path"] == "some/model"
    )
    again = load_model(tmp_path / "m")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again(TOKENS, CU), model(TOKENS, CU))


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "gpt_neo"])
@torch.inference_mode()
def test_pefts_adapter_gives_pefts_logits_and_ours_has_its_keys(tmp_path, kind):
    """The golden holds the keys and shapes that PEFT wrote for this model, and the logits it computed with such weights."""
    golden = load_file(Path(__file__).parent / "goldens" / "adapters.safetensors")
    shapes = {
        name.removeprefix(f"{kind}/"): tuple(s.tolist())
        for name, s in golden.items()
        if name.startswith(f"{kind}/")
    }
    model = load_model(tiny.make_checkpoint(tmp_path / "m", kind))
    add_lora(model, r=4, alpha=8)
    save_adapter(model, tmp_path / "a", "m")
    written = {
        name: tuple(tensor.shape)
        for name, tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").items()
    }
    assert written == shapes
    save_file(tiny.adapter_weights(shapes), tmp_path / "a" / "adapter_model.safetensors")
    remove_lora(model)
    load_adapter(model, tmp_path / "a")
    sequences = tiny.golden_inputs(kind)
    logits = model.lm_head(
        model(torch.cat(sequences), torch.tensor([0] + [len(s) for s in sequences]).cumsum(0).int())
    )
    assert (logits[:, ::3] - golden[f"{kind}.logits"]).abs().max() < 1e-4
    plain = load_file(Path(__file__).parent / "goldens" / "logits.safetensors")[kind]
    assert (logits[:, ::3] - plain).abs().max() > 0.1


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder, old, new):
    """Tensors under other names; without a new one they go."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(
        {name.replace(old, new): tensor for name, tensor in tensors.items() if new or old not in name}, path
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: edit(a, use_dora=True), "use_dora = True is not supported"),
        (lambda a: edit(a, bias="all"), "bias = 'all' is not supported"),
        (lambda a: edit(a, peft_type="IA3"), "peft_type = 'IA3' is not supported"),
        (lambda a: edit(a, modules_to_save=["lm_head"]), "modules_to_save = "),
        (lambda a: edit(a, target_modules=["c_attn"]), "LoRA target c_attn names no linear layer"),
        (lambda a: edit(a, r=8), "has shape"),
        (lambda a: edit(a, target_modules=["q_proj"]), "is of no layer that has an adapter"),
        (lambda a: save_file({"x": torch.ones(1)}, a / "adapter_model.safetensors"), "is missing"),
        (lambda a: (a / "adapter_model.safetensors").write_bytes(b"abc"), "not a whole safetensors file"),
        (lambda a: (a / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda a: edit(a, lora_alpha=None), "lora_alpha = None is not a number"),
        (
            lambda a: rename(a, "model.layers.0.mlp.up_proj", "lm_head"),
            "lm_head.lora_A.weight is of no layer",
        ),
        (
            lambda a: (edit(a, target_modules=None), rename(a, "model.layers.0.mlp.up_proj", "lm_head")),
            "lm_head cannot be",
        ),
        (
            lambda a: rename(a, "self_attn.q_proj", "self_attn.c_attn"),
            "c_attn.lora_A.weight is of no layer .*and 7 more",
        ),
        (
            lambda a: rename(a, "layers.1.mlp.up_proj", ""),
            "model.layers.1.mlp.up_proj.lora_A.weight is missing .and 1 more",
        ),
        (
            lambda a: (edit(a, target_modules=[]), save_file({}, a / "adapter_model.safetensors")),
            "targets are an empty list",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_whole(tmp_path, change, message):
    save_adapter(adapted(tmp_path / "m"), tmp_path / "a", "m")
    change(tmp_path / "a")
    model = load_model(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "a")
    assert not lora_layers(model)


def test_default_targets_are_those_the_model_has(tmp_path):
    model = load_model(tiny.make_checkpoint(tmp_path, "gpt_neo"))
    add_lora(model, r=4)
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "c_fc",
        "c_proj",
    }
    remove_lora(model)
    with pytest.raises(ValueError, match="LoRA target o_proj names no linear layer"):
        add_lora(model, r=4, targets=("q_proj", "o_proj"))


def test_a_seed_means_one_initialisation(tmp_path):
    model = load_model(tiny.make_checkpoint(tmp_path, "llama2"))
    drawn = []
    for seed in (3, 3, 4):
        add_lora(model, r=4, generator=torch.Generator().manual_seed(seed))
        drawn.append(next(iter(lora_parameters(model).values())).detach().clone())
        remove_lora(model)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_is_drawn_within_one_over_the_root_of_its_inputs(tmp_path):
    """PEFT's kaiming_uniform(a=sqrt 5); drawn by the outputs instead, down_proj would start 1.6 times too wide."""
    model = load_model(tiny.make_checkpoint(tmp_path / "m", "llama3"))
    add_lora(model, r=16)
    for layer in lora_layers(model).values():
        inputs, outputs = layer.base_layer.in_features, layer.base_layer.out_features
        a = layer.lora_A.weight.abs()
        assert a.max() <= inputs**-0.5 and a.max() > 0.97 * inputs**-0.5
        assert abs(a.mean().item() * 2 * inputs**0.5 - 1) < 0.1, (inputs, outputs)


@torch.no_grad()
def test_merging_bfloat16_weights_rounds_once():
    """W + s B A is rounded, not B A and then the sum."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 48, bias=False).bfloat16()})
    add_lora(model, r=8, alpha=8, targets=["q_proj"])
    layer = model["q_proj"]
    layer.lora_B.weight.normal_()
    weight, delta = layer.base_layer.weight.float(), layer.lora_B.weight @ layer.lora_A.weight
    merge_lora(model)
    once, twice = (weight + delta).bfloat16(), (weight.bfloat16() + delta.bfloat16())
    assert torch.equal(model["q_proj"].weight, once) and not torch.equal(once, twice)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_an_adapter_whose_init_changed_the_base_weights_is_refused(tmp_path, init):
    """Found at d954c0b: such files loaded without a word and gave logits that were off by 10."""
    save_adapter(adapted(tmp_path / "m"), tmp_path / "a", "m")
    edit(tmp_path / "a", init_lora_weights=init)
    with pytest.raises(ValueError, match=f"init_lora_weights = '{init}' is not supported"):
        load_adapter(load_model(tmp_path / "m"), tmp_path / "a")


@torch.inference_mode()
def test_layers_are_read_from_the_keys_where_a_list_has_exceptions(tmp_path):
    """PEFT's "all-linear" with exclude_modules: the names in the file are what was trained."""
    model = load_model(tiny.make_checkpoint(tmp_path / "m", "llama3"))
    add_lora(model, r=4, targets=["q_proj", "up_proj"])
    for parameter in lora_parameters(model).values():
        parameter.normal_()
    save_adapter(model, tmp_path / "a", "m")
    edit(tmp_path / "a", target_modules=list(DEFAULT_TARGETS), exclude_modules=["k_proj", "lm_head"])
    again = load_model(tmp_path / "m")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again(TOKENS, CU), model(TOKENS, CU)) and len(lora_layers(again)) == 4


@torch.inference_mode()
def test_one_layer_of_many_is_saved_by_its_whole_name(tmp_path):
    """Found at d954c0b: "q_proj" in the file would adapt every layer, here and in PEFT, and then not load."""
    model = load_model(tiny.make_checkpoint(tmp_path / "m", "llama3"))
    add_lora(model, r=4, targets=["layers.0.self_attn.q_proj"])
    save_adapter(model, tmp_path / "a", "m")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    again = load_model(tmp_path / "m")
    load_adapter(again, tmp_path / "a")
    assert list(lora_layers(again)) == list(lora_layers(model))


def test_dropout_close_to_one_still_drops():
    """p is a multiple of 2^-16 on a CPU: rounded up to 1 it overflowed the comparison and dropped nothing."""
    keep = dropout_mask(torch.ones(1000, 1000), 1 - 2**-18)
    assert 0 < keep.float().mean() < 1e-4


@pytest.mark.parametrize("autocast", [False, True])
def test_any_torch_model_in_its_own_dtype(autocast):
    """Found at d954c0b: a float32 result met bfloat16 weights, in a bfloat16 model and under autocast."""
    dtype = torch.float32 if autocast else torch.bfloat16
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 3)).to(dtype)
    model = torch.nn.ModuleDict({"body": model})
    add_lora(model, r=2, targets=["0", "2"])
    x = torch.randn(4, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model["body"](x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora_parameters(model).values())


def test_a_string_as_targets_is_refused():
    with pytest.raises(ValueError, match="a list of names, not the string 'q_proj'"):
        add_lora(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)}), targets="q_proj")


def test_a_base_that_is_trained_is_refused():
    """Its gradient was None, silently."""
    base = torch.nn.Linear(6, 4)
    layer = LoRALinear(base, r=2, alpha=4, dropout=0.0)
    with pytest.raises(ValueError, match="requires a gradient, which is not computed: freeze it"):
        layer(torch.randn(3, 6))
    base.requires_grad_(False)
    assert layer(torch.randn(6)).shape == (4,), "as nn.Linear takes it"


@pytest.mark.parametrize("dropout", [1.0, -0.1, "0.1", True])
def test_a_dropout_out_of_range_is_refused(dropout):
    """1.0 divided by zero at the first step of a training."""
    with pytest.raises(ValueError, match="dropout .* is not allowed: from 0 to below 1"):
        add_lora(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)}), targets=["q_proj"], dropout=dropout)


def test_a_layer_that_is_read_past_its_forward_gets_no_adapter():
    """nn.MultiheadAttention takes its out_proj.weight: an adapter there was an AttributeError."""
    model = torch.nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(ValueError, match="out_proj names no linear layer"):
        add_lora(model, targets=["out_proj"])
    add_lora(model, r=2, targets=["linear1"])
    model(torch.randn(5, 1, 16)).sum().backward()
    assert lora_parameters(model)["linear1.lora_B.weight"].grad is not None


def test_backward_inside_an_autocast_block():
    """The forward pass ran in float32, outside; sums in place then met another dtype."""
    layer = LoRALinear(torch.nn.Linear(6, 4).requires_grad_(False), r=2, alpha=4, dropout=0.0)
    layer.lora_A.weight.data.normal_(), layer.lora_B.weight.data.normal_()
    x = torch.randn(3, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    y = layer(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        y.backward()
    assert torch.equal(x.grad, expected)


@torch.inference_mode()
def test_nested_disabling_ends_with_the_outer_block(tmp_path):
    """The inner block restores what it found, which is disabled."""
    model = adapted(tmp_path / "m")
    with_adapter = model(TOKENS, CU)
    with lora_disabled(model):
        untouched = model(TOKENS, CU)
        with lora_disabled(model):
            assert torch.equal(model(TOKENS, CU), untouched)
        assert torch.equal(model(TOKENS, CU), untouched)
    assert torch.equal(model(TOKENS, CU), with_adapter) and not torch.equal(with_adapter, untouched)


# every key of PEFT 0.21's LoraConfig, with its default (tests/tools/make_adapter_goldens.py)
DEFAULTS = json.loads((Path(__file__).parent / "goldens" / "lora_config.json").read_text())
HARMLESS = {  # values that change no output, checked against PEFT's logits by make_adapter_goldens.py
    "task_type": "CAUSAL_LM",
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "peft_version": "0.21.2",
    "base_model_name_or_path": "some/model",
    "revision": "main",
    "inference_mode": True,
    "layers_pattern": "layers",
    "fan_in_fan_out": True,
    "eva_config": {"rho": 2.0},
    "megatron_core": "megatron.core.other",
    "qalora_group_size": 8,
}
READ = {
    "r": 3,
    "lora_alpha": 5,
    "lora_dropout": 0.5,
    "use_rslora": True,
    "target_modules": ["q_proj"],
    "exclude_modules": ["v_proj"],
    "layers_to_transform": 0,
}
OTHER_KINDS = {"peft_type": "IA3", "bias": "lora_only", "init_lora_weights": "lora_ga"}


def config_with(folder, **changes):
    (folder / "adapter_config.json").write_text(
        json.dumps(DEFAULTS | {"target_modules": ["q_proj", "v_proj"]} | changes)
    )
    return read_adapter_config(folder / "adapter_config.json")


@pytest.mark.parametrize("key", [*sorted(DEFAULTS), "a_key_of_the_future"])
def test_every_key_of_pefts_config_is_read_or_harmless_or_refused_by_name(tmp_path, key):
    """Found at fe070b7: what was not on a list of bad keys loaded as plain LoRA, an activated one with logits off by 21."""
    plain = config_with(tmp_path)
    assert plain == {"r": 8, "alpha": 8, "dropout": 0.0, "targets": ("q_proj", "v_proj"), "rslora": False}
    if key in READ:
        assert config_with(tmp_path, **{key: READ[key]}) != plain
    elif key in HARMLESS:
        assert config_with(tmp_path, **{key: HARMLESS[key]}) == plain
    else:
        for value in [OTHER_KINDS[key]] if key in OTHER_KINDS else [True, [1], {"q_proj": 2}]:
            with pytest.raises(ValueError, match=f"adapter_config.json: {key} = .* is not supported"):
                config_with(tmp_path, **{key: value})


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_a_start_that_leaves_the_base_weights_alone_is_taken(tmp_path, init):
    config_with(tmp_path, init_lora_weights=init)


@pytest.mark.parametrize(
    "changes, targets, layers",
    [
        ({"target_modules": ["q_proj", "up_proj", "c_attn", "lm_head"]}, ["q_proj", "up_proj"], 4),
        ({"target_modules": r".*\.(q|up)_proj"}, ["q_proj", "up_proj"], 4),
        ({"target_modules": "all-linear"}, ["q_proj"], 2),
        ({"target_modules": None}, ["q_proj"], 2),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, ["layers.0.self_attn.q_proj"], 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, ["layers.1.self_attn.q_proj"], 1),
    ],
)
@torch.inference_mode()
def test_the_tensors_say_which_layers(tmp_path, changes, targets, layers):
    """Found at fe070b7: a name in target_modules that only other models have was an error."""
    model = adapted(tmp_path / "m", targets=targets)
    save_adapter(model, tmp_path / "a", "m")
    edit(tmp_path / "a", **changes)
    again = load_model(tmp_path / "m")
    load_adapter(again, tmp_path / "a")
    assert len(lora_layers(again)) == layers and torch.equal(again(TOKENS, CU), model(TOKENS, CU))


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path):
    model = adapted(tmp_path / "m")
    save_adapter(model, tmp_path / "an adapter", "m")
    path = tmp_path / "an adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    torch.save(tensors, path.with_suffix(".bin"))
    path.unlink()
    again = load_model(tmp_path / "m")
    with pytest.raises(
        ValueError, match="adapter_model.bin: a pickle is not read; this command converts it: "
    ) as refused:
        load_adapter(again, tmp_path / "an adapter")
    assert "\n" not in str(refused.value)
    program, flag, code = shlex.split(str(refused.value).partition("converts it: ")[2])
    assert (program, flag) == ("python", "-c")
    exec(code, {})  # a process of its own would load torch again
    load_adapter(again, tmp_path / "an adapter")
    assert torch.equal(again(TOKENS, CU), model(TOKENS, CU))


@pytest.mark.parametrize(
    "base, name, revision",
    [
        ("owner/name@v1.0", "owner/name", "v1.0"),
        ("owner/name", "owner/name", None),
        ("{folder}", "{folder}", None),
    ],
)
def test_the_revision_is_written_beside_the_base_model(tmp_path, base, name, revision):
    """Found at fe070b7: the base's name was "owner/name@v1.0", which AutoPeftModel cannot find. A folder may have an @."""
    folder = tmp_path / "m@home"
    save_adapter(adapted(folder), tmp_path / "a", base.format(folder=folder))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (name.format(folder=folder), revision)


@pytest.mark.parametrize("alpha, text", [(16, "16"), (16.0, "16"), (2.5, "2.5"), (1e-3, "0.001")])
def test_numbers_have_the_type_that_peft_writes(tmp_path, alpha, text):
    """PEFT 0.21.2 declares lora_alpha a whole number and lora_dropout a float; programs in Go and Rust hold it to that."""
    model = load_model(tiny.make_checkpoint(tmp_path / "m", "llama2"))
    add_lora(model, r=4, alpha=alpha, dropout=0)
    save_adapter(model, tmp_path / "a", "m")
    written = (tmp_path / "a" / "adapter_config.json").read_text()
    assert f'"lora_alpha": {text},' in written and '"r": 4,' in written and '"lora_dropout": 0.0,' in written


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_an_adapters_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    """safetensors 0.8 writes for the owner alone: others could read adapter_config.json and not its weights."""
    model = adapted(tmp_path / "m")
    before = os.umask(umask)
    try:
        save_adapter(model, tmp_path / "a", "m")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o666 & ~umask}


def test_an_adapter_on_the_hub_is_to_be_fetched_first(tmp_path, monkeypatch):
    """Found at 14fe823: nothing said that --adapter takes no Hub id, as --model does."""
    model = load_model(tiny.make_checkpoint(tmp_path / "m", "llama2"))
    with pytest.raises(
        ValueError, match="^owner/name: .* on the Hub: hf download owner/name --local-dir FOLDER$"
    ):
        load_adapter(model, "owner/name")


@torch.inference_mode()
def test_an_adapter_is_float32_whatever_the_file_and_the_model_are(tmp_path):
    """A file in bfloat16, as some trainers write it, on a model in bfloat16."""
    model = adapted(tmp_path / "m")
    save_adapter(model, tmp_path / "a", "m")
    path = tmp_path / "a" / "adapter_model.safetensors"
    halves = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(halves, path)
    again = load_model(tmp_path / "m", dtype=torch.bfloat16)
    load_adapter(again, tmp_path / "a")
    for name, parameter in lora_parameters(again).items():
        assert parameter.dtype == torch.float32 and torch.equal(
            parameter, halves[f"base_model.model.{name}"].float()
        )
    save_adapter(again.bfloat16(), tmp_path / "b", "m")
    assert {tensor.dtype for tensor in load_file(tmp_path / "b" / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    merge_lora(again)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


def test_a_second_adapter_is_refused(tmp_path):
    model = adapted(tmp_path / "m")
    save_adapter(model, tmp_path / "a", "m")
    before = {name: parameter.clone() for name, parameter in lora_parameters(model).items()}
    for again in (lambda: add_lora(model), lambda: load_adapter(model, tmp_path / "a")):
        with pytest.raises(ValueError, match="the model has an adapter already"):
            again()
    assert all(torch.equal(parameter, before[name]) for name, parameter in lora_parameters(model).items())


def test_a_full_disk_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    """A new config beside old weights is another adapter; and the old one must not go before the new one is written."""
    model = load_model(tiny.make_checkpoint(tmp_path / "m", "llama3"))
    add_lora(model, r=2, alpha=8)
    save_adapter(model, tmp_path / "a", "base")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for layer in lora.lora_layers(model).values():
        layer.alpha = 400

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lora, "save_file", full)
        with pytest.raises(
            OSError, match="adapter_model.safetensors: could not be written, what was there before still is"
        ):
            save_adapter(model, tmp_path / "a", "base")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before

    (tmp_path / "b/adapter_config.json").mkdir(parents=True)  # no file can take its place
    (tmp_path / "b/adapter_model.safetensors").write_bytes(before["adapter_model.safetensors"])
    for there in (
        "what was there before is gone",
        "what was there before still is",
    ):  # the second time nothing was
        with pytest.raises(
            OSError, match=f"adapter_model.safetensors: could not be written, {there} .*directory"
        ):
            save_adapter(model, tmp_path / "b", "base")
        assert [path.name for path in (tmp_path / "b").iterdir()] == ["adapter_config.json"]

    renamed, replace = [], lora.os.replace

    def crash(source, target):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(lora.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(model, tmp_path / "a", "base")
    with pytest.raises(ValueError, match="no adapter_model.safetensors in it"):
        load_adapter(load_model(tmp_path / "m"), tmp_path / "a")
    save_adapter(model, tmp_path / "a", "base")
    assert lora.read_adapter(tmp_path / "a")[0]["alpha"] == 400
