"""publish.py: a folder of one adapter, or of the merged model, that others can use.

tests/tools/make_adapter_goldens.py has transformers and PEFT read such folders, by hand.
"""

import json
import os
import re
import sys
from pathlib import Path

import publish
import published
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from published import ADAPTER, make_run
from safetensors.torch import load_file, save_file

from data import ModelTemplate, Tokenizer, Turn, build_corpus
from lora import load_adapter, merge_lora
from model import load_model, model_fingerprint

TOKENS, CU = torch.arange(3, 30), torch.tensor([0, 12, 27], dtype=torch.int32)


def edit(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


def read(path):
    return json.loads(path.read_text())


@torch.inference_mode()
def test_an_adapter_folder_is_whole_and_names_no_local_path(tmp_path):
    adapter, out = make_run(tmp_path), tmp_path / "new" / "out"
    publish.publish(adapter, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert read(out / "adapter_config.json") == read(adapter / "adapter_config.json") | {
        "base_model_name_or_path": None
    }
    assert not any(
        str(tmp_path) in path.read_text() for path in out.iterdir() if path.suffix != ".safetensors"
    )
    assert (out / "chat_template.jinja").read_text() == publish.chat_template(Tokenizer(tmp_path / "base"))
    models = []
    for folder in (adapter, out):
        models.append(load_model(tmp_path / "base"))
        load_adapter(models[-1], folder)
    assert torch.equal(models[0](TOKENS, CU), models[1](TOKENS, CU))
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("kind", ["llama3", "gpt_neo"])
@torch.inference_mode()
def test_a_merged_folder_is_the_model_in_the_dtype_of_the_checkpoint(tmp_path, kind):
    """Found at fe070b7: float32 on a CPU, twice the size of a checkpoint in bfloat16."""
    adapter, out = make_run(tmp_path, kind), tmp_path / "out"
    edit(tmp_path / "base" / "config.json", _name_or_path="/home/me/base")
    edit(adapter.parent.parent / "config.json", inputs={"model": model_fingerprint(tmp_path / "base")})
    publish.publish(adapter, out, merged=True)
    expected = load_model(tmp_path / "base", dtype=torch.bfloat16)
    load_adapter(expected, adapter)
    merge_lora(expected)
    merged = load_model(out)
    assert torch.equal(merged(TOKENS, CU), expected.float()(TOKENS, CU))
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    config = read(out / "config.json")
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16" and "_name_or_path" not in config
    assert not list(out.glob("adapter*")) and "vllm serve DIR\n" in (out / "README.md").read_text()
    assert ModelCard.load(out / "README.md").data.library_name == "transformers"


def test_a_few_float32_tensors_do_not_double_a_checkpoint(tmp_path):
    """Vectors in float32 beside matrices in bfloat16: more tensors, few values."""
    folder = tiny.make_checkpoint(tmp_path, "gpt_neo", dtype=torch.bfloat16)
    assert publish.stored_dtype(folder) == torch.bfloat16
    tensors = load_file(folder / "model.safetensors")
    assert sum(t.dim() == 1 for t in tensors.values()) > len(tensors) / 2
    save_file({n: t.float() if t.dim() == 1 else t for n, t in tensors.items()}, folder / "model.safetensors")
    assert publish.stored_dtype(folder) == torch.bfloat16
    save_file({n: t.float() for n, t in tensors.items()}, folder / "model.safetensors")
    assert publish.stored_dtype(folder) == torch.float32


@pytest.mark.parametrize(
    "generation, eos_of_config, expected",
    [
        ({"eos_token_id": 7, "do_sample": True}, 1, {"eos_token_id": [7, 1], "do_sample": True}),
        ({"eos_token_id": [9, 1, 7]}, 1, {"eos_token_id": [9, 1, 7]}),
        ({"eos_token_id": [1]}, 1, {"eos_token_id": [1]}),
        ({"eos_token_id": 1}, 1, {"eos_token_id": 1}),
        ({"do_sample": True}, 1, {"eos_token_id": 1, "do_sample": True}),
        (None, 7, {"eos_token_id": [7, 1], "bos_token_id": 0, "pad_token_id": None}),
        (None, None, {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": None}),
    ],
)
def test_generation_stops_at_the_eos_that_was_taught_too(tmp_path, generation, eos_of_config, expected):
    """Found at fe070b7: the merged model never stopped, where the checkpoint's files name another eos for generation."""
    folder = tiny.make_checkpoint(tmp_path, "llama3")
    edit(folder / "config.json", eos_token_id=eos_of_config)
    if generation is not None:
        edit(folder / "generation_config.json", **generation)
    tokenizer = Tokenizer(folder)
    assert tokenizer.eos_id == 1
    assert publish.generation_config(folder, publish.taught_end(tokenizer)) == expected


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_tokenizers_files_name_the_tokens_that_the_template_needs(tmp_path, kind):
    folder, out = tiny.make_checkpoint(tmp_path / "m", kind), tmp_path / "out"
    tokenizer = Tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    edit(
        folder / "tokenizer_config.json",
        name_or_path="/home/me",
        padding_side="left",
        chat_template="{{ 'another' }}",
    )
    edit(folder / "special_tokens_map.json", eos_token={"content": tokenizer.eos}, pad_token="!")
    out.mkdir()
    publish.write_tokenizer(tokenizer, folder, out)
    named = {"padding_side": "left", "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eos}
    assert read(out / "tokenizer_config.json") == named | (
        {"bos_token": tokenizer.bos} if tokenizer.bos else {}
    )
    assert read(out / "special_tokens_map.json")["eos_token"] == {"content": tokenizer.eos}
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_tokenizer_in_another_form_is_published_as_tokenizer_json(tmp_path):
    """GPT-Neo's checkpoint has vocab.json and merges.txt, from which an adapter's folder alone is not read."""
    folder, out = tiny.make_checkpoint(tmp_path / "m", "gpt_neo"), tmp_path / "out"
    tokenizer = Tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    out.mkdir()
    publish.write_tokenizer(tokenizer, folder, out)
    assert Tokenizer(out).encode([tiny.TEXT]) == tokenizer.encode([tiny.TEXT])
    assert read(out / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not (out / "special_tokens_map.json").exists()


def test_the_models_own_template_is_published_unchanged(tmp_path):
    """And generation stops where its answers end, which need not be the tokenizer's eos."""
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_start|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    checkpoint = tiny.make_checkpoint(tmp_path / "base", "qwen2", dtype=torch.bfloat16)
    edit(checkpoint / "tokenizer_config.json", chat_template=template)
    adapter = make_run(tmp_path, template="model")
    publish.publish(adapter, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    assert read(tmp_path / "out" / "tokenizer_config.json")["chat_template"] == template
    assert read(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [0, 1]


@pytest.mark.parametrize(
    "model, given, base, revision",
    [
        ("owner/name@v1", None, "owner/name", "v1"),
        ("owner/name", None, "owner/name", None),
        ("owner/name", "0x1/no@refs/pr/2", "0x1/no", "refs/pr/2"),
        (None, "owner/name", "owner/name", None),
    ],
)
def test_the_base_model_is_named_by_its_hub_id(tmp_path, monkeypatch, capsys, model, given, base, revision):
    adapter = make_run(tmp_path)
    if model:
        edit(tmp_path / "run" / "config.json", model=model)
        monkeypatch.setattr(publish, "checkpoint_folder", lambda _: tmp_path / "base")
    publish.publish(adapter, tmp_path / "out", base_model=given)
    config = read(tmp_path / "out" / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == (base, revision)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == base and (revision is None or f"{base}, revision {revision}" in card.text)
    assert f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules forgetting=DIR" in card.text
    assert capsys.readouterr().out == ""


def test_a_base_model_without_a_name_is_to_be_named(tmp_path, capsys):
    publish.publish(make_run(tmp_path), tmp_path / "out")
    assert "give --base-model owner/name before you upload it" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.license, card.data.datasets) == (None, None, None)
    assert card.data.tags == ["lora", "forgetting", "arxiv:2508.04329"]
    text = (tmp_path / "out" / "README.md").read_text()
    fields = ("# license: fill in", "# datasets: fill in", "- base model: fill in", "- data: fill in")
    assert all(f"\n{field}" in text for field in fields) and "vllm serve BASE " in text


@pytest.mark.parametrize("rank, limit", [(1, 8), (8, 8), (9, 16), (64, 64), (65, 128), (300, 512)])
def test_vllm_is_told_the_rank(rank, limit):
    """Its default is 16, which refuses the paper's 64; it takes some numbers only, all powers of two from 8 to 512 among them."""
    assert f"vllm serve b --enable-lora --max-lora-rank {limit} --lora" in publish.model_card(
        "full", {}, "b", rank
    )


@pytest.mark.parametrize(
    "name, options, there, absent",
    [
        (
            ADAPTER,
            {"t_max": 0.5},
            ["rho: 0.7", "t_max: 0.5", "lr: 0.0001", "rank: 4", "alpha: 8", "epochs: 1"],
            ["forget_rate", "power"],
        ),
        ("full/seed-1", {"rho": 0.6}, ["rho: 1.0", "epochs: 1"], ["t_max", "lambda_schedule"]),
        ("ignoring/seed-0", {"rho": 0.6}, ["rho: 0.6"], ["t_min"]),
        ("forgetting:rho=0.5,lr=0.002/seed-0", {}, ["rho: 0.5", "lr: 0.002", "t_max: 0.25"], []),
        (
            "reference",
            {"reference_lr": 0.003, "reference_epochs": 4},
            ["lr: 0.003", "epochs: 4", "rho: 1.0"],
            ["t_max"],
        ),
        ("forgetting-wga/seed-0", {}, ["rho: 0.7", "unlearn_power: 1.0"], ["learn_power:"]),
        ("forgetting-wga/seed-0", {"unlearn_power": 0.5}, ["unlearn_power: 0.5"], []),
        ("dft/seed-0", {"unlearn_power": 1.0}, ["learn_power: 1.0", "rho: 1.0"], ["unlearn_power"]),
        ("forgetting:step=released/seed-0", {}, ["step: released", "t_max: 0.25"], ["learn_power"]),
        ("reference", {"epochs": 2}, ["lr: 0.0001", "epochs: at least 2, and at least 8 steps"], []),
    ],
)
def test_the_card_has_the_options_that_the_training_read(tmp_path, name, options, there, absent):
    publish.publish(make_run(tmp_path, name=name, **options), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# {name.partition('/')[0]}\n" in card
    assert [option for option in there if f"\n- {option}\n" not in card] == []
    assert [option for option in absent if f"\n- {option}" in card] == []


FULL = "out could not be written ([Errno 28] No space left on device)"


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "change, arguments, message",
    [
        (
            lambda at, _: at.joinpath("out").mkdir() or (at / "out" / "x").write_text(""),
            ["{a}", "{o}"],
            "out is there already",
        ),
        (
            lambda at, _: at.joinpath("out").write_text(""),
            ["{a}", "{o}"],
            "out is there already: give a new folder",
        ),
        (
            lambda *_: None,
            ["{a}", "{o}", "--base-model", "/home/me/base"],
            "--base-model /home/me/base is not a Hub id",
        ),
        (lambda *_: None, ["{a}/..", "{o}"], "is not an adapter of a run, such as"),
        (
            lambda at, _: (at / "run" / ADAPTER / "adapter_config.json").unlink(),
            ["{a}", "{o}"],
            "no adapter_config.json in it",
        ),
        (
            lambda at, _: (at / "run" / "config.json").unlink(),
            ["{a}", "{o}"],
            "is not an adapter of a run, such as",
        ),
        (
            lambda at, _: (at / "run" / ADAPTER / "adapter_model.safetensors").write_bytes(b"x"),
            ["{a}", "{o}"],
            "not a whole",
        ),
        (
            lambda at, _: edit(at / "base" / "config.json", rms_norm_eps=1e-3),
            ["{a}", "{o}"],
            "base: its files are not those",
        ),
        (lambda _, patch: patch.setattr(publish, "model_card", no_space), ["{a}", "{o}"], FULL),
        (lambda _, patch: patch.setattr(publish, "save_model", no_space), ["{a}", "{o}", "--merged"], FULL),
    ],
)
def test_what_cannot_be_published_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, change, arguments, message
):
    adapter = make_run(tmp_path)
    change(tmp_path, monkeypatch)
    before = sorted(path for path in tmp_path.rglob("*"))
    monkeypatch.setattr(
        sys, "argv", ["publish.py", *(word.format(a=adapter, o=tmp_path / "out") for word in arguments)]
    )
    with pytest.raises(SystemExit) as stop:
        publish.main()
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and error.startswith("publish.py: ")
        and message in error
        and error.count("\n") == 1
    )
    assert sorted(path for path in tmp_path.rglob("*")) == before


AN_OLDER_VERSION = "; publish it with the version that trained it"


@pytest.mark.parametrize(
    "name, inputs, message",
    [
        ("forgetting-clipped/seed-0", {}, "forgetting-clipped is no method of today's"),
        ("forgetting:ceiling=4/seed-0", {}, "forgetting:ceiling=4 is no method of today's"),
        (ADAPTER, {"ceiling": 4.0}, "trained with ceiling 4.0, no option of today's"),
        ("reference", {"decay": 4.0}, "trained with decay 4.0, no option of today's"),
    ],
)
def test_what_an_older_version_trained_is_named(tmp_path, name, inputs, message):
    """A method that is gone was "not an adapter of a run"; an option that is gone was missing on the card."""
    adapter = make_run(tmp_path, name=name)
    config = tmp_path / "run" / "config.json"
    edit(config, inputs=read(config)["inputs"] | inputs)
    with pytest.raises(ValueError, match=re.escape(f"{adapter}: {message}{AN_OLDER_VERSION}")):
        publish.publish(adapter, tmp_path / "out")


def test_an_option_that_was_not_used_may_be_gone(tmp_path):
    """Its None says that it changed nothing, as where a run is continued."""
    adapter, config = make_run(tmp_path), tmp_path / "run" / "config.json"
    inputs = dict.fromkeys(publish.options_of("training", "unlearning", "setting"), 1)
    edit(config, inputs=inputs | read(config)["inputs"] | {"ceiling": None})
    publish.publish(adapter, tmp_path / "out")
    assert (tmp_path / "out/README.md").is_file()


@pytest.mark.parametrize("name", ["full/seed-0", "full:lr=0.1/seed-0", "reference"])
def test_an_option_of_unlearning_may_be_gone_where_nothing_is_unlearned(tmp_path, name):
    """full and the reference of a run with a ceiling were refused: they had not read it."""
    config = tmp_path / "run" / "config.json"
    adapter = make_run(tmp_path, name=name)
    edit(config, inputs=read(config)["inputs"] | {"ceiling": 4.0})
    assert publish.read_run(adapter)[0] == name.removesuffix("/seed-0")


def test_the_command_line_fills_an_empty_folder(tmp_path, monkeypatch, capsys):
    adapter, out = make_run(tmp_path), tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["publish.py", str(adapter.relative_to(tmp_path)), "out", "--base-model", "a/b"]
    )
    publish.main()
    assert "hf upload you/name out" in capsys.readouterr().out and (out / "README.md").is_file()
    assert out.stat().st_mode & 0o777 == adapter.stat().st_mode & 0o777, "readable as other folders are"


GOLDEN_TOKENIZERS = json.loads((Path(__file__).parent / "goldens" / "tokenizers.json").read_text())


@pytest.mark.parametrize("name", GOLDEN_TOKENIZERS)
def test_a_published_tokenizer_gives_the_ids_of_the_training(tmp_path, name):
    """AutoTokenizer of transformers 5.23 gave these ids in such folders (make_adapter_goldens.py); under the class names
    that checkpoints have (LlamaTokenizer, GPT2Tokenizer) it puts rules of its own in place of the file's: " hi" of LLaMA-2
    got another id. Under model_type qwen2 it does so whatever the class, and the card of a merged model says how to load.
    """
    case, _, kind = name.partition(", ")
    golden, out = GOLDEN_TOKENIZERS[name], published.published_folder(tmp_path, case, kind == "merged")
    tokenizer = Tokenizer(tmp_path / "base")
    assert read(out / "tokenizer_config.json") == golden["tokenizer_config.json"]
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
    assert [ids for ids, _ in tokenizer.encode(published.TEXTS)] == golden["texts"]
    corpus = build_corpus([{"messages": published.CONVERSATION}], tokenizer)
    assert corpus.tokens.tolist() == golden["conversation"]
    card = (out / "README.md").read_text()
    assert ("PreTrainedTokenizerFast.from_pretrained" in card) == (kind == "merged" and "qwen2" in case)


def test_keys_with_which_another_tokenizer_is_read_are_not_published(tmp_path):
    """transformers reads the newest of fast_tokenizer_files, none of which is copied, and asks to run the code of auto_map."""
    folder, out = tiny.make_checkpoint(tmp_path / "m", "llama3"), tmp_path / "out"
    others = {"fast_tokenizer_files": ["tokenizer.4.0.json"], "auto_map": {"AutoTokenizer": ["x.T", None]}}
    edit(folder / "tokenizer_config.json", **others, split_special_tokens=True, padding_side="left")
    out.mkdir()
    publish.write_tokenizer(Tokenizer(folder), folder, out)
    written = read(out / "tokenizer_config.json")
    assert written["padding_side"] == "left" and not {*others, "split_special_tokens"} & {*written}


def test_the_card_shows_peft_and_says_that_merging_rounds(tmp_path):
    adapter = make_run(tmp_path)
    publish.publish(adapter, tmp_path / "a", base_model="owner/name@v1")
    card = (tmp_path / "a" / "README.md").read_text()
    loads = (
        'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("owner/name", revision="v1"), "DIR")'
    )
    assert "from peft import PeftModel\n" in card and loads in card
    assert "into weights of bfloat16 rounds" in card
    publish.publish(adapter, tmp_path / "b", merged=True, base_model="owner/name")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "PeftModel" not in card and "merging has rounded the sum" in card


def test_a_published_folder_has_its_name_when_it_is_whole(tmp_path, monkeypatch):
    """It is renamed, not copied: who copies leaves a part of a folder after a crash."""
    adapter, out = make_run(tmp_path), tmp_path / "out"
    replace, folders = publish.os.replace, []

    def watch(source, target):
        if Path(target) == out:
            folders.append((sorted(path.name for path in Path(source).iterdir()), out.exists()))
        replace(source, target)

    monkeypatch.setattr(publish.os, "replace", watch)
    publish.publish(adapter, out)
    assert folders == [(sorted(path.name for path in out.iterdir()), False)] and "README.md" in folders[0][0]


@pytest.mark.parametrize("merged", [False, True])
def test_published_files_have_the_mode_that_the_umask_gives(tmp_path, merged):
    adapter, before = make_run(tmp_path), os.umask(0o022)
    try:
        publish.publish(adapter, tmp_path / "out", merged)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


@pytest.mark.parametrize("kind", ["llama2", "llama3", "qwen2", "gpt_neo"])
def test_the_published_tulu_template_writes_what_was_trained(tmp_path, kind):
    """A bos where the tokenizer of the training puts one, and only there: a chat template is encoded without special
    tokens (transformers' apply_chat_template), so without it every conversation began otherwise than in training."""
    tokenizer = Tokenizer(tiny.make_checkpoint(tmp_path / "m", kind))
    tokens = {"bos_token": tokenizer.bos or "", "eos_token": tokenizer.eos}
    template = ModelTemplate(publish.chat_template(tokenizer), tokens, "x")
    turns = [Turn(turn["role"], turn["content"], False) for turn in published.CONVERSATION]
    ((ids, _),) = tokenizer.encode([template.text(turns)], special=False)
    trained = build_corpus([{"messages": published.CONVERSATION}], tokenizer)
    assert ids == trained.tokens.tolist()
    puts_bos = kind in ("llama2", "llama3")
    assert (ids[0] == tokenizer.bos_id) == puts_bos and ids.count(tokenizer.bos_id) <= 1 + 3 * (not puts_bos)
