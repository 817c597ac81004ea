"""data.py: from rows to masks to packs."""

import json

import numpy as np
import pytest
import tiny
import torch

import data
from data import Tokenizer, build_corpus, pack, read_rows, render, shift, unique_rows
from tools.publish import chat_template

STYLES = tuple(tiny.SPECIAL)
ROWS = {  # layout: (row, its responses in order)
    "messages": ({"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 12 plus 30?"},
        {"role": "assistant", "content": "It is 42.\n\nThank you!"},
        {"role": "user", "content": "And why?"},
        {"role": "assistant", "content": " Because: “so” 🦊"}]}, ["It is 42.\n\nThank you!", " Because: “so” 🦊"]),
    "prompt + completion": ({"prompt": "The quick brown", "completion": "fox jumps"}, ["fox jumps"]),
    "prompt + response": ({"prompt": "### Response:\n", "response": "The river is long."}, ["The river is long."]),
    "instruction + input": ({"instruction": "Name it.", "input": "the dog", "output": "lazy 7"}, ["lazy 7"]),
    "instruction alone": ({"instruction": "Name it.", "input": "", "output": "naïve café"}, ["naïve café"]),
    "instruction + context": ({"instruction": "Who?", "context": "a fox", "response": "The fox"}, ["The fox"]),
    "inputs + targets": ({"inputs": "Tell me: ", "targets": "42"}, ["42"]),
}  # fmt: skip


@pytest.fixture(scope="module", params=STYLES)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save_tokenizer(folder, request.param)
    return Tokenizer(folder)


@pytest.mark.parametrize("layout", ROWS)
def test_masked_tokens_decode_to_the_responses(tokenizer, layout):
    """Of every layout and style of tokenizer; the eos of each turn is a response token, the very last one included."""
    row, responses = ROWS[layout]
    corpus = build_corpus([row], tokenizer)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], corpus.response, [False]))))
    spans = [corpus.tokens[start:end].tolist() for start, end in edges.reshape(-1, 2)]
    said = [tokenizer.decode(span, skip_special=False) for span in spans]
    for response, text in zip(responses, said, strict=True):
        # a joining space, or the word mark of sentencepiece, may be part of a response's first token
        assert text == response + tokenizer.eos or text.lstrip() == response.lstrip() + tokenizer.eos
    assert corpus.response[-1] and corpus.tokens[-1] == tokenizer.eos_id
    assert not corpus.response[0]


@pytest.mark.parametrize("kind", STYLES)
def test_bos_count_by_style(tmp_path, kind):
    tiny.save_tokenizer(tmp_path, kind)
    tokenizer = Tokenizer(tmp_path)
    bos, puts_bos = tiny.SPECIAL[kind][1], tiny.SPECIAL[kind][3]
    texts = ["The dog."] + ([bos + "The dog."] if puts_bos else [])
    for ids, spans in tokenizer.encode(texts):
        assert [i == tokenizer.bos_id for i in ids[:2]] == [puts_bos, False]
        assert len(ids) == len(spans)
    assert tokenizer.encode(["The dog."], special=False)[0][0][0] != tokenizer.bos_id


def test_whitespace_tokens_are_response_tokens(tmp_path):
    """LLaMA-3's and GPT-2's files trim offsets: an indentation then covers no character, and would get no loss."""
    tiny.save_tokenizer(tmp_path, "qwen2")
    raw = tiny.make_tokenizer("qwen2")
    raw.post_processor = tiny.processors.ByteLevel(trim_offsets=True)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer, response = Tokenizer(tmp_path), "def f(x):\n    return x 🙂 é   \n"
    corpus = build_corpus([{"instruction": "Write", "output": response}], tokenizer)
    assert tokenizer.decode(corpus.tokens[corpus.response].tolist(), skip_special=False) == response + tokenizer.eos


def test_an_eos_that_the_tokenizer_adds_is_taken_off(tmp_path):
    """Some tokenizers end every text with eos; render() has put one already, and a prompt must not end in one."""
    tiny.save_tokenizer(tmp_path, "llama2")
    raw = tiny.make_tokenizer("llama2")
    pair = [("<s>", raw.token_to_id("<s>")), ("</s>", raw.token_to_id("</s>"))]
    raw.post_processor = tiny.processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=pair)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    (prompt, _), (row, _) = tokenizer.encode(["Tell me", "Tell me</s>"])
    assert prompt[-1] != tokenizer.eos_id and row == prompt + [tokenizer.eos_id]


def test_the_template_is_tulus():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2}
    text = "".join(piece for piece, _ in render(row, "</s>"))
    assert text == "<|user|>\na\n<|assistant|>\nb</s>\n<|user|>\na\n<|assistant|>\nb</s>"
    assert render({"prompt": "p ", "completion": "c"}, "$") == [("p ", False), ("c$", True)]
    assert render({"prompt": "p", "completion": "c"}, "$") == [("p ", False), ("c$", True)]


def test_rows_without_a_response_token_are_dropped_and_counted(tokenizer):
    long = {"prompt": "the dog " * 50, "completion": "x"}
    corpus = build_corpus([long, ROWS["inputs + targets"][0], long], tokenizer, max_length=60)
    assert corpus.dropped == 2 and len(corpus) == 1
    with pytest.raises(ValueError, match="all 1 rows were dropped"):
        build_corpus([long], tokenizer, max_length=60)


def position_corpus(lengths) -> data.Corpus:
    """A corpus whose tokens encode their own place, so that a misaligned array is noticed at once."""
    n = sum(lengths)
    response = np.ones(n, bool)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    response[offsets[:-1]] = False
    return data.Corpus(np.arange(n, dtype=np.int32), response, offsets, [""] * len(lengths), 0)


@pytest.mark.parametrize("budget", [1, 17, 1000])
def test_packing_carries_every_token_to_its_place(budget):
    corpus = position_corpus([3, 9, 1, 9, 4, 16, 2])
    examples, seen = [6, 1, 3, 5, 0, 2], np.zeros(len(corpus.tokens), int)
    for batch in pack(corpus, examples, budget):
        assert torch.equal(batch.tokens, batch.places) and batch.cu_seqlens[-1] == len(batch.tokens)
        assert len(batch.tokens) <= budget or len(batch.cu_seqlens) == 2
        judged = torch.from_numpy(corpus.response[batch.places.numpy()])
        rows, targets = shift(batch.tokens, judged)
        assert torch.equal(batch.tokens[rows] + 1, targets)  # the row before, of the same sequence
        seen[batch.places] += 1
    assert (seen[corpus.places(examples)] == 1).all() and seen.sum() == sum(corpus.lengths[examples])


def test_exact_duplicates_are_removed():
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "response": "b"}, {"prompt": "a", "completion": "c"}]
    assert unique_rows(rows, "$") == [rows[0], rows[2]]


def test_files_and_counts(tmp_path):
    rows = [{"prompt": str(i), "completion": "x"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    read = read_rows([f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.json"])
    assert [row["prompt"] for row in read] == ["0", "1", "0", "1", "2", "3", "4"]
    assert read[1]["_source"].endswith("a.jsonl:2")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no rows"),
        ('{"a": 1}\n{"a": \n', r"a.jsonl:2: not valid JSON"),
        ("[1]\n", "must be an object, not list"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_rows([str(path)])
    with pytest.raises(ValueError, match="no such file"):
        read_rows([str(tmp_path / "b.jsonl")])


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "x"}, "unknown layout, fields found: text; known: messages"),
        ({"prompt": "a", "completion": 3}, "must be strings, not int"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"messages": "x"}, "must be a list"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "must be a string, not list"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot' is not allowed"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "take turns, starting with user"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match="f.jsonl:7: .*" + message):
        render(row | {"_source": "f.jsonl:7"}, "$")


@pytest.mark.parametrize(
    "name", ["instruction_raschka", "alpaca_gpt4_demo", "dolly_fixture", "dolly_hhrlhf", "messages_oasst", "t0_flan_like"]
)
def test_real_rows(shared, tmp_path, name):
    """Every response token decodes back, on real instruction data in its native layouts."""
    tiny.save_tokenizer(tmp_path, "llama3")
    tokenizer = Tokenizer(tmp_path)
    rows = read_rows([str(shared / "data" / "train" / f"{name}.jsonl")])[:100]
    corpus = build_corpus(rows, tokenizer, max_length=100_000)
    for i, row in enumerate(rows):
        span = slice(corpus.offsets[i], corpus.offsets[i + 1])
        said = tokenizer.decode(corpus.tokens[span][corpus.response[span]].tolist(), skip_special=False)
        responses = "".join(text for text, is_response in render(row, tokenizer.eos) if is_response)
        assert "".join(said.split()) == "".join(responses.split())


def test_sharegpt_rows_are_read(tokenizer):
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert render({"conversations": turns}, "</s>") == render({"messages": messages}, "</s>")
    with pytest.raises(ValueError, match="role 'function_call' is not allowed"):
        render({"conversations": [turns[1], {"from": "function_call", "value": "x"}]}, "</s>")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_of_other_formats_are_named_with_their_converter(tmp_path, suffix):
    (tmp_path / f"rows{suffix}").write_bytes(b"PAR1\xff")
    with pytest.raises(ValueError, match=rf"rows\{suffix}: \{suffix} is not read, only .jsonl and .json: pandas"):
        read_rows([str(tmp_path / f"rows{suffix}")])


@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_the_chat_template_is_what_is_trained_on(tmp_path, kind):
    """apply_chat_template gives the text of render(), a bos where the tokenizer puts one, and the prompt of a question."""
    import jinja2  # comes with torch

    tokenizer = Tokenizer(tiny.make_checkpoint(tmp_path, kind))
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": f"text {i} of {role}"} for i, role in enumerate(roles)]
    template = jinja2.Environment().from_string(chat_template(tokenizer))
    names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    pieces = [text for text, _ in render({"messages": messages}, tokenizer.eos)]
    shown = template.render(messages=messages, **names)
    assert tokenizer.encode([shown], special=False)[0][0] == tokenizer.encode(["".join(pieces)])[0][0]
    asked = template.render(messages=messages[:4], add_generation_prompt=True, **names)
    assert tokenizer.encode([asked], special=False)[0][0] == tokenizer.encode(["".join(pieces[:-1])])[0][0]


def test_the_first_token_is_never_judged(tokenizer):
    """An empty prompt and no bos: nothing predicts the first token of the response."""
    corpus = build_corpus([{"prompt": "", "response": "the quick fox"}], tokenizer)
    assert not corpus.response[0] and corpus.response[1:].all()
    assert len(corpus.tokens) == len(tokenizer.encode(["the quick fox" + tokenizer.eos])[0][0])
