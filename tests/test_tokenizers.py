"""Tokenizer folders as they are published: ids, eos and bos of transformers' AutoTokenizer (goldens/rows.json)."""

import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
import row_cases as cases
import tiny
import torch
from tokenizers.normalizers import Lowercase

import model
from data import Tokenizer, build_corpus, render
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
    with pytest.raises(ValueError, match="no config.json in it, and no tokenizer: not the folder of a"):
        Tokenizer(tmp_path)
    cases.write(tmp_path, config={"model_type": "llama"})
    missing = "no tokenizer.json in it, nor vocab.json and merges.txt"
    with pytest.raises(ValueError, match=f"{missing}: is the download complete"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ValueError, match=f"{missing}; a sentencepiece .*python -c"):
        Tokenizer(tmp_path)
    (tmp_path / "config.json").unlink()
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


def test_a_gap_in_the_ids_of_added_tokens_is_refused(tmp_path):
    """tokenizers 0.23.3 ignores the id in tokenizer.json and takes the next free one, silently."""
    tiny.save_tokenizer(tmp_path, "llama3")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    first = tiny.make_tokenizer("llama3").get_vocab_size()
    Tokenizer(tmp_path)
    for index in (first, first + 1):
        added = {"id": index, "lstrip": False, "rstrip": False, "single_word": False}
        added |= {"content": "<|late|>", "normalized": False, "special": True}
        path.write_text(json.dumps(content | {"added_tokens": [*content["added_tokens"], added]}))
        if index == first:
            assert Tokenizer(tmp_path).raw.token_to_id("<|late|>") == first
        else:
            said = rf"its files disagree about the token '<\|late\|>': id {index}, or {first}"
            with pytest.raises(ValueError, match=said):
                Tokenizer(tmp_path)


def test_add_bos_token_is_obeyed_where_no_processor_could_say_so(tmp_path):
    """Of vocab.json and merges.txt. Beside a tokenizer.json transformers 5.23.0 puts none, whatever it says;
    4.57.1 only for the classes of Llama, GPT-NeoX and Cohere."""
    tiny.save_tokenizer(tmp_path / "whole", "qwen2")
    bos = {"add_bos_token": True, "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    cases.write(tmp_path / "whole", tokenizer_config=bos)
    tokenizer = Tokenizer(tmp_path / "whole")
    ((ids, _),) = tokenizer.encode(["The dog."])
    assert tokenizer.bos_id is not None and ids[0] != tokenizer.bos_id
    cases.gpt_neo_pair(tmp_path / "pair")
    for asked in (True, False):
        settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": asked}
        cases.write(tmp_path / "pair", tokenizer_config=settings)
        tokenizer = Tokenizer(tmp_path / "pair")
        ((ids, _),) = tokenizer.encode(["The dog."])
        assert (ids[0] == tokenizer.bos_id) == asked


def test_a_bos_token_of_null_is_none(tmp_path):
    """Qwen2.5's: "bos_token": null, and bos_token_id in config.json. transformers 5.23.0 has none, and nor does
    its template; lm_eval 0.4.13 scores without a context behind the eos then."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    for kind, said in (("with", {}), ("without", {"bos_token": None})):
        tiny.save_tokenizer(tmp_path / kind, "llama3")
        settings = {"eos_token": "<|end_of_text|>", "chat_template": template} | said
        cases.write(tmp_path / kind, tokenizer_config=settings, config={"bos_token_id": 0})
        tokenizer = Tokenizer(tmp_path / kind, "model")
        row = {"messages": cases.messages_of("one turn")}
        text = "".join(text for text, _ in render(row, tokenizer.eos, tokenizer.template))
        assert (tokenizer.bos is None) == (kind == "without") == (not text.startswith("<|begin"))
        assert tokenizer.start_id == (tokenizer.eos_id if kind == "without" else 0)


def test_every_eos_that_the_tokenizer_appends_is_taken_off(tmp_path):
    """A processor may put two; the text's own stays."""
    tiny.save_tokenizer(tmp_path, "llama2")
    raw = tiny.make_tokenizer("llama2")
    tokens = [("<s>", raw.token_to_id("<s>")), ("</s>", raw.token_to_id("</s>"))]
    raw.post_processor = tiny.processors.TemplateProcessing(
        single="<s> $A </s> </s>", pair="<s> $A $B </s> </s>", special_tokens=tokens
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    (prompt, spans), (row, _) = tokenizer.encode(["Tell me", "Tell me</s>"])
    assert prompt.count(tokenizer.eos_id) == 0 and len(spans) == len(prompt)
    assert row == [*prompt, tokenizer.eos_id]


def test_what_an_added_token_says_of_itself_is_kept(tmp_path):
    """special: left out of what is decoded; normalized: looked for in the normalised text."""
    tiny.save_tokenizer(tmp_path, "llama3")
    raw = tiny.make_tokenizer("llama3")
    raw.normalizer = Lowercase()
    raw.save(str(tmp_path / "tokenizer.json"))
    first = raw.get_vocab_size()
    added = {
        str(first): cases.token("<A>", special=True),  # normalized false
        str(first + 1): cases.token("<b>", special=False),  # normalized true
    }
    settings = {"eos_token": "<|end_of_text|>", "added_tokens_decoder": added}
    cases.write(tmp_path, tokenizer_config=settings)
    tokenizer = Tokenizer(tmp_path)
    ((ids, _),) = tokenizer.encode(["<A> <a> <b> <B>"], special=False)
    assert [i for i in ids if i >= first] == [first, first + 1, first + 1]
    assert "<A>" not in tokenizer.decode(ids) and tokenizer.decode(ids).count("<b>") == 2
    # of added_tokens.json the special ones are those that the other files name
    path = tmp_path / "older"
    tiny.save_tokenizer(path, "llama3")
    cases.write(
        path,
        tokenizer_config={"eos_token": "<|end_of_text|>", "pad_token": "<pad>"},
        added_tokens={"<pad>": first, "<more>": first + 1},
    )
    listed = Tokenizer(path).raw.get_added_tokens_decoder()
    assert (listed[first].special, listed[first].normalized) == (True, False)
    assert (listed[first + 1].special, listed[first + 1].normalized) == (False, True)


def test_tokens_that_files_name_are_added_in_order(tmp_path):
    """The seven known names first, then others as they stand, then the extra ones: so the ids follow."""
    tiny.save_tokenizer(tmp_path, "llama3")
    first = tiny.make_tokenizer("llama3").get_vocab_size()
    settings = {"image_token": "<i>", "audio_token": "<a>", "add_eos_token": True, "mask_token": "<m>"}
    settings |= {"eos_token": "<|end_of_text|>", "sep_token": {"content": "<s1>", "__type": "AddedToken"}}
    cases.write(tmp_path, tokenizer_config=settings | {"extra_special_tokens": ["<x>", "<y>"]})
    raw = Tokenizer(tmp_path).raw
    names = ["<s1>", "<m>", "<i>", "<a>", "<x>", "<y>"]
    assert [raw.token_to_id(name) for name in names] == list(range(first, first + 6))


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
