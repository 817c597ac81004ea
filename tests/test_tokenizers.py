"""Tokenizer folders as they are published: ids, eos and bos of transformers' AutoTokenizer (goldens/rows.json)."""

import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
import row_cases as cases
import tiny
import torch

import model
from data import Tokenizer, build_corpus
from eval import generate
from model import load_model

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "rows.json").read_text())


@pytest.mark.parametrize("name", cases.TOKENIZERS)
def test_ids_are_those_of_transformers(tmp_path, name):
    """GPT-Neo's pair of files, tokens added by four other files, and the file that decides about eos and bos."""
    cases.TOKENIZERS[name](tmp_path)
    tokenizer, golden = Tokenizer(tmp_path), GOLDENS["tokenizers"][name]
    for text, (plain, special) in zip(cases.HARD_TEXTS, golden["ids"], strict=True):
        assert tokenizer.raw.encode(text, add_special_tokens=False).ids == plain, text
        assert tokenizer.raw.encode(text).ids == special, text
    assert [tokenizer.eos, tokenizer.eos_id] == golden["eos"] and [tokenizer.bos, tokenizer.bos_id] == golden[
        "bos"
    ]


@pytest.mark.parametrize("name", cases.STOPS)
def test_stop_ids_are_those_of_transformers(tmp_path, name):
    """Llama 3 Instruct has three, in generation_config.json; the tokenizer's own eos always stops. Empty lists are none."""
    generation, config = cases.STOPS[name]
    tiny.save_tokenizer(tmp_path, "llama3")
    cases.write(tmp_path, config=config, **({"generation_config": generation} if generation else {}))
    tokenizer, golden = Tokenizer(tmp_path), GOLDENS["stops"][name]
    stops = golden if isinstance(golden, list) else [golden] * (golden is not None)
    assert tokenizer.stop_ids == {tokenizer.eos_id, *(stops or [config["eos_token_id"]])}


def test_generation_ends_at_every_stop_id(tmp_path):
    """Llama 3 ends a turn with <|eot_id|>: a reply ran on past it to the limit."""
    net, tokenizer = load_model(tiny.make_checkpoint(tmp_path, "gpt_neo")), Tokenizer(tmp_path)
    prompt = tokenizer.encode(["The quick"])[0][0]
    whole = generate(net, tokenizer, [prompt], 12)[0]
    with torch.inference_mode():
        ids = list(prompt)
        for _ in range(12):
            hidden = net(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))
            ids.append(int(net.lm_head(hidden[-1:]).argmax()))
    written = ids[len(prompt) :]
    assert whole == tokenizer.decode(written)
    third = next(i for i in range(2, 12) if written[i] not in written[:i])
    tokenizer.model_eos_ids = [tokenizer.eos_id, written[third]]
    assert generate(net, tokenizer, [prompt], 12)[0] == tokenizer.decode(written[:third])


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"no tokenizer.json in it, nor vocab.json and merges.txt; a sentencepiece .*python -c",
    ):
        Tokenizer(tmp_path)
    cases.gpt_neo_pair(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ValueError, match="are read as GPT-2's, not as those of Qwen2Tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(ValueError, match="vocab.json: not a tokenizer file"):
        Tokenizer(tmp_path)


def test_files_that_disagree_about_an_id_are_refused(tmp_path):
    """transformers takes the next free id then, and the model another row of its embedding."""
    cases.decoder(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content["added_tokens_decoder"]["999"] = cases.token("<|late|>")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"its files disagree about the token '<\|late\|>': id 999, or 387"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["llama2", "gpt_neo"])
def test_a_response_that_ends_in_eos_gets_no_second(tmp_path, kind):
    """566 of 566 rows of T0's files end in <|endoftext|>; a second one was 5 % of the tokens and took the threshold along."""
    tiny.save_tokenizer(tmp_path, kind)
    tokenizer = Tokenizer(tmp_path)
    rows = [{"prompt": "a", "completion": "b" + end} for end in ("", tokenizer.eos)]
    rows += [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" + end}]}
        for end in ("", tokenizer.eos)
    ]
    corpora = [build_corpus([row], tokenizer) for row in rows]
    assert (
        corpora[0].fingerprint() == corpora[1].fingerprint()
        and corpora[2].fingerprint() == corpora[3].fingerprint()
    )
    assert all(corpus.tokens.tolist().count(tokenizer.eos_id) == 1 for corpus in corpora)


def test_a_list_of_added_tokens_that_is_none_is_named(tmp_path):
    tiny.save_tokenizer(tmp_path, "llama3")
    for content in ({"x": {"content": "a"}}, {"1": 5}, [1], {"1": {"content": 3}}):
        cases.write(
            tmp_path, tokenizer_config={"eos_token": "<|end_of_text|>", "added_tokens_decoder": content}
        )
        with pytest.raises(ValueError, match=f"{tmp_path}: its list of added tokens cannot be read"):
            Tokenizer(tmp_path)


def test_every_file_of_a_tokenizer_is_fetched_and_kept(tmp_path, monkeypatch):
    """GPT-Neo's merges.txt is no JSON, and so was not fetched."""
    cases.pair_with_tokens(tmp_path)
    (tmp_path / "chat_template.jinja").touch()
    asked = {}
    monkeypatch.setattr(
        model, "snapshot_download", lambda repo, **patterns: asked.update(patterns) or tmp_path
    )
    with pytest.raises(ValueError, match="no safetensors in this repository"):
        model.checkpoint_folder("EleutherAI/gpt-neo-2.7B")
    names = {path.name for path in tmp_path.iterdir()}
    assert all(any(fnmatch(name, pattern) for pattern in asked["allow_patterns"]) for name in names)
    assert names - {"config.json", "chat_template.jinja"} <= set(model.TEXT_FILES)
