"""data.py: from rows to masks to packs."""

import gzip
import io
import json
import os
import re
import sys

import numpy as np
import pytest
import tiny
import torch

import data
import get_data
from data import Tokenizer, build_corpus, pack, read_rows, render, render_rows, shift, split_rows, unique_rows
from data import usable_cores
from publish import chat_template

STYLES = tuple(tiny.SPECIAL)
ROWS = {  # format: (row, its responses in order)
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is 12 plus 30?"},
                {"role": "assistant", "content": "It is 42.\n\nThank you!"},
                {"role": "user", "content": "And why?"},
                {"role": "assistant", "content": " Because: “so” 🦊"},
            ]
        },
        ["It is 42.\n\nThank you!", " Because: “so” 🦊"],
    ),
    "prompt + completion": ({"prompt": "The quick brown", "completion": "fox jumps"}, ["fox jumps"]),
    "prompt + response": (
        {"prompt": "### Response:\n", "response": "The river is long."},
        ["The river is long."],
    ),
    "instruction + input": ({"instruction": "Name it.", "input": "the dog", "output": "lazy 7"}, ["lazy 7"]),
    "instruction alone": ({"instruction": "Name it.", "input": "", "output": "naïve café"}, ["naïve café"]),
    "instruction + context": (
        {"instruction": "Who?", "context": "a fox", "response": "The fox"},
        ["The fox"],
    ),
    "inputs + targets": ({"inputs": "Tell me: ", "targets": "42"}, ["42"]),
}


@pytest.fixture(scope="module", params=STYLES)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save_tokenizer(folder, request.param)
    return Tokenizer(folder)


@pytest.mark.parametrize("name", ROWS)
def test_masked_tokens_decode_to_the_responses(tokenizer, name):
    """Of every format and style of tokenizer; the eos of each turn is a response token, the very last one included."""
    row, responses = ROWS[name]
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
    corpus = build_corpus([{"prompt": "Write", "completion": response}], tokenizer)
    assert (
        tokenizer.decode(corpus.tokens[corpus.response].tolist(), skip_special=False)
        == response + tokenizer.eos
    )


def test_an_eos_that_the_tokenizer_adds_is_taken_off(tmp_path):
    """Some tokenizers end every text with eos; render() has put one already, and a prompt must not end in one."""
    tiny.save_tokenizer(tmp_path, "llama2")
    raw = tiny.make_tokenizer("llama2")
    pair = [("<s>", raw.token_to_id("<s>")), ("</s>", raw.token_to_id("</s>"))]
    raw.post_processor = tiny.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=pair
    )
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


def messages(*contents: str, **more: object) -> list[dict]:
    """A conversation; `more` goes into its first answer."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [turn | more if i == 1 else turn for i, turn in enumerate(turns)]


def test_duplicates_are_equal_text_and_equal_spans(tokenizer):
    """Found at fe070b7: the key counted pieces, so a rendered copy of a conversation was not a duplicate of it."""
    eos = tokenizer.eos
    rows = [
        {"messages": messages("a", "b")},
        {"prompt": "<|user|>\na\n<|assistant|>\n", "completion": "b" + eos},  # the same, rendered elsewhere
        {"instruction": "a", "output": "b", "id": 7},
        {"messages": messages("a", "b", "c", "d")},
        {"messages": messages("a", "b", "c", "d", weight=0)},  # the same text, of which less is learned
    ]
    (rendered,), _ = render_rows([rows], tokenizer)
    assert len({row.text for row in rendered}) == 2
    assert [row.row for row in unique_rows(rendered)] == [rows[0], rows[3], rows[4]]
    d_ref, d_train, lines = split_rows(rendered, [], None, None)
    assert len(d_ref) + len(d_train) == 3 and lines == ["2 of 5 rows are exact duplicates, and left out"]
    d_ref, d_train, lines = split_rows(rendered, rendered[1:2], None, None)
    assert [row.row for row in d_ref] == rows[1:2] and len(d_train) == 2
    assert lines == [
        "2 of 6 rows are exact duplicates, and left out",
        "1 of 3 rows of --data are in D_ref, too: they are left out of D_train",
    ]


def test_rows_of_d_ref_among_those_of_d_train_are_counted(tokenizer):
    """One line said "exact duplicates" of both, and --n-train 50000 was refused without saying why."""
    rows = [{"prompt": f"{i}", "completion": "x"} for i in (*range(30), 3, 4)]
    trusted = rows[:12] + [{"prompt": "none of them", "completion": "x"}] + rows[:2]
    (rendered, reference), _ = render_rows([rows, trusted], tokenizer)
    d_ref, d_train, lines = split_rows(rendered, reference, None, None)
    assert (len(d_ref), len(d_train)) == (13, 18) and not {r.text for r in d_ref} & {r.text for r in d_train}
    assert lines == [
        "4 of 47 rows are exact duplicates, and left out",
        "12 of 30 rows of --data are in D_ref, too: they are left out of D_train",
    ]
    why = "--n-train 19: from 1 to 18 are there (of 32 rows 2 are exact duplicates, 12 are in D_ref)"
    with pytest.raises(ValueError, match=re.escape(why)):
        split_rows(rendered, reference, None, 19)
    _, d_train, lines = split_rows(rendered, reference, 5, 25)  # the other trusted rows are no part of D_ref
    assert len(d_train) == 25 and lines[1].startswith("5 of 30 rows of --data are in D_ref")
    with pytest.raises(
        ValueError, match=re.escape("--n-reference 14: from 1 to 13 are there (duplicates left")
    ):
        split_rows(rendered, reference, 14, None)
    with pytest.raises(ValueError, match="none is left .of 32 rows 2 are exact duplicates, 30 are in D_ref"):
        split_rows(rendered, rendered, None, None)
    with pytest.raises(ValueError, match="none is left .duplicates left out, one row kept for D_train"):
        split_rows(rendered[:1], [], None, None)


def test_files_and_counts(tmp_path):
    rows = [{"prompt": str(i), "completion": "x"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    read = read_rows([f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.json"])
    assert [row["prompt"] for row in read] == ["0", "1", "0", "1", "2", "3", "4"]
    assert read[1]["_source"].endswith("a.jsonl:2")


def test_the_forms_that_files_have(tmp_path):
    """A list, lines (in .json, too), an object with the list under `data`; gzipped; capital letters; a table."""
    rows = [{"prompt": str(i), "completion": "x"} for i in range(3)]
    lines = tiny.jsonl(rows)
    files = {
        "list.JSON": json.dumps(rows),
        "lines.json": lines,
        "data.json": json.dumps({"version": "1", "data": rows}),
        "lines.JSONL": lines,
        "lines.jsonl.gz": lines,
        "list.json.gz": json.dumps(rows),
    }
    for name, text in files.items():
        content = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        (tmp_path / name).write_bytes(content)
        assert [row["prompt"] for row in read_rows([str(tmp_path / name)])] == ["0", "1", "2"], name
    (tmp_path / "two.json").write_text(json.dumps({"data": rows, "more": rows}))
    with pytest.raises(
        ValueError,
        match="two.json: a list of rows is expected, or an object with one under `data` alone, not dict",
    ):
        read_rows([str(tmp_path / "two.json")])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:30])
    with pytest.raises(ValueError, match="cut.jsonl.gz: not a whole gzip file"):
        read_rows([str(tmp_path / "cut.jsonl.gz")])


def test_a_table_is_read_where_pyarrow_is(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"messages": messages("a", "b")}, {"messages": messages("c", "d")}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row["messages"] for row in read_rows([f"{tmp_path}/rows.parquet:2"])] == [
        row["messages"] for row in rows
    ]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="bad.parquet: not a whole parquet file"):
        read_rows([str(tmp_path / "bad.parquet")])


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
        ({"text": "x"}, "unknown format, fields found: text: which part is the response"),
        ({"a": "x"}, "unknown format, fields found: a; known: messages; conversations; prompt . completion"),
        ({"prompt": "a", "completion": 3}, "completion must be a string, not int"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": None, "instruction": None, "output": None}, "completion is empty"),
        ({"response": "b"}, "unknown format, fields found: response"),
        ({"instruction": "a", "input": 0, "output": "b"}, "input must be a string, not int"),
        (
            {"instruction": "a", "input": "x", "context": "y", "output": "b"},
            "input and context are both there",
        ),
        ({"messages": "x"}, "must be a list"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "must be a string, or a list of text parts, not int",
        ),
        ({"messages": [{"role": "user"}]}, "a message must be an object with role and content"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot' is not allowed"),
        (
            {"messages": [{"content": "x"}]},
            "a message must be an object with role and content, or from and value",
        ),
        ({"messages": ["x"]}, "a message must be an object with role and content, or from and value"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "take turns, starting with user"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message with text"),
        ({"messages": messages("a", "b", weight=0)}, "no assistant message is to be learned"),
        ({"messages": messages("a", "b", weight=0.5)}, "weight can only be 0, 1, false or true, not 0.5"),
        (
            {"instruction": "a", "output": "b", "weight": 0},
            "its weight says that the row is not to be learned",
        ),
        # what cannot be rendered, by the name of the field
        (
            {"messages": messages("a", "b"), "tools": [{"type": "function"}]},
            r"tools cannot be rendered \(tool use\)",
        ),
        ({"messages": messages("a", "b"), "functions": [{"name": "f"}]}, "functions cannot be rendered"),
        ({"messages": messages("a", "b"), "tool_choice": "auto"}, "tool_choice cannot be rendered"),
        (
            {"messages": messages("a", "b", tool_calls=[{"id": "1"}])},
            "a message's tool_calls cannot be rendered",
        ),
        (
            {"messages": messages("a", "b", function_call={"name": "f"})},
            "a message's function_call cannot be rendered",
        ),
        (
            {"messages": messages("a", "b", reasoning_content="so")},
            "a message's reasoning_content cannot be rendered",
        ),
        ({"messages": messages("a", "b", thinking="so")}, "a message's thinking cannot be rendered"),
        ({"messages": messages("a", "b", name="Ann")}, "a speaker's name cannot be rendered"),
        ({"messages": messages("a", "b") + [{"role": "tool", "content": "x"}]}, "role 'tool' is not allowed"),
        ({"messages": messages("a", "b"), "images": ["a.png"]}, r"images cannot be rendered \(media\)"),
        ({"instruction": "a", "output": "b", "audio": {"path": "a.wav"}}, "audio cannot be rendered"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "must be of type text, not image_url",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "must be of type text, not str"),
        (
            {"prompt": "a", "completion": "b", "label": False},
            "label False marks a bad answer: leave such rows out",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            r"chosen cannot be rendered \(one of two answers: keep the better",
        ),
        ({"messages": messages("a", "b"), "rejected": "c"}, "rejected cannot be rendered"),
        (
            {"instruction": "a", "output": "b", "rejected_response": "c"},
            "rejected_response cannot be rendered",
        ),
        # text that another format would use
        ({"messages": messages("a", "b"), "prompt": "x"}, "prompt has no place in this format"),
        ({"messages": messages("a", "b"), "context": "x"}, "context has no place in this format"),
        ({"instruction": "a", "output": "b", "response": "c"}, "response has no place in this format"),
        ({"instruction": "a", "output": "b", "question": "c"}, "question has no place in this format"),
        (
            {"messages": [{"role": "system", "content": "s"}, *messages("a", "b")], "system": "t"},
            "must take turns",
        ),
        (
            {"instruction": "a", "output": "b", "history": "x"},
            "history must be a list of messages, or of pairs",
        ),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match="f.jsonl:7: .*" + message):
        render(row | {"_source": "f.jsonl:7"}, "$")


EARLIER = {"messages": messages("q", "r", "a", "b")}
WITH_SYSTEM = {"messages": [{"role": "system", "content": "s"}, *messages("a", "b")]}


@pytest.mark.parametrize(
    "row, same",
    [
        ({"instruction": "a", "input": "x", "response": "b"}, {"instruction": "a\n\nx", "output": "b"}),
        ({"instruction": "a", "context": "x", "output": "b"}, {"instruction": "a\n\nx", "output": "b"}),
        ({"inputs": "a", "input": "x", "targets": "b"}, {"instruction": "a\n\nx", "output": "b"}),
        ({"prompt": "a", "input": "x", "completion": "b"}, {"prompt": "a\n\nx", "response": "b"}),
        ({"prompt": "a", "context": "x", "response": "b"}, {"prompt": "a\n\nx", "response": "b"}),
        (
            {"instruction": "a", "input": "x", "context": "x", "output": "b"},
            {"instruction": "a\n\nx", "output": "b"},
        ),
        ({"instruction": "", "input": "a", "output": "b"}, {"instruction": "a", "output": "b"}),
        ({"instruction": "a", "output": "b", "system": "s"}, WITH_SYSTEM),
        ({"conversations": messages("a", "b"), "system": "s"}, WITH_SYSTEM),
        ({"messages": messages("a", "b"), "system_message": "s"}, WITH_SYSTEM),
        (
            {"prompt": "a", "response": "b", "system_prompt": "s"},
            WITH_SYSTEM,
        ),  # a system turn: no raw text any more
        (
            {"instruction": "a", "output": "b", "history": [["q", "r"]]},
            EARLIER,
        ),  # LLaMA-Factory learns these, too
        ({"prompt": "a", "completion": "b", "history": messages("q", "r")}, EARLIER),
        (
            {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"messages": messages("a", "b")},
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}]},
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "value": "b"}, {"type": "text", "text": "c"}],
                    },
                ]
            },
            {"messages": messages("a", "bc")},
        ),
        # null, "", [] and {} are absent: a concatenated set has the columns of all
        (
            {
                "messages": None,
                "prompt": "a",
                "completion": "b",
                "instruction": "",
                "output": None,
                "tools": [],
                "chosen": {},
            },
            {"prompt": "a", "completion": "b"},
        ),
        (
            {"messages": messages("a", "b", tool_calls=[], reasoning_content=None, name=""), "prompt": None},
            {"messages": messages("a", "b")},
        ),
        # copies, descriptions and yeses
        (
            {
                "messages": messages("a", "b"),
                "prompt": "a",
                "prompt_id": "7",
                "image_id": 3,
                "has_image": False,
            },
            {"messages": messages("a", "b")},
        ),
        (
            {"prompt": "a", "completion": "b", "label": True, "weight": 1.0},
            {"prompt": "a", "completion": "b"},
        ),
    ],
)
def test_what_a_row_says_is_used(row, same):
    assert render(row, "$") == render(same, "$")


@pytest.mark.parametrize(
    "flag",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"trainable": False},
        {"loss_mask": 0},
        {"loss_weight": 0},
        {"train_on_turn": False},
        {"loss": False},
        {"masked": True},
    ],
)
def test_a_turn_that_says_so_is_not_learned(flag):
    """OpenAI's and Mistral's weight, axolotl's train, ms-swift's loss, torchtune's masked."""
    pieces = render({"messages": messages("q", "r", "a", "b", **flag)}, "$")
    plain = render(EARLIER, "$")
    assert [text for text, _ in pieces] == [text for text, _ in plain]
    assert [text for text, is_response in pieces if is_response] == ["b$"]


def test_of_trls_two_lists_the_completion_is_learned():
    row = {"prompt": messages("q", "r", "a"), "completion": [{"role": "assistant", "content": "b"}]}
    assert [text for text, is_response in render(row, "$") if is_response] == ["b$"]
    assert [text for text, _ in render(row, "$")] == [text for text, _ in render(EARLIER, "$")]


def test_fields_that_nobody_knows_are_said_once(tokenizer):
    rows = [{"instruction": "a", "output": f"{i}", "mood": "x", "id": i, "category": "y"} for i in range(3)]
    rows.append(
        {
            "messages": [
                {"role": "user", "content": "a", "weight": 1},
                {"role": "assistant", "content": "b", "tone": "z"},
            ]
        }
    )
    _, notes = render_rows([rows], tokenizer)
    assert notes == [
        "fields not used: a message's tone, a message's weight, where it is not the assistant's, mood"
    ]


def test_rows_in_two_voices_are_said(tokenizer):
    rows = (
        [{"prompt": "a", "completion": "b"}] * 2
        + [{"prompt": "a", "response": "b"}]
        + [{"messages": messages("a", "b")}] * 2
    )
    _, notes = render_rows([rows], tokenizer)
    assert notes == [
        "3 of 5 rows are raw text without turn markers (prompt + completion and prompt + response)"
    ]
    assert render_rows([rows[:3]], tokenizer)[1] == render_rows([rows[3:]], tokenizer)[1] == []


def test_all_bad_rows_are_said_at_once(tokenizer, tmp_path):
    """The first ten with their reasons, and the total by reason; with skip_bad they are left out and counted."""
    good = {"prompt": "a", "completion": "b"}
    bad = [{"prompt": "a", "completion": ""}] * 3 + [{"messages": messages("a", "b"), "tools": [1]}] * 8
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [good, *bad])) + "\n{oops\n")
    (tmp_path / "b.jsonl").write_text("[1]\n" + json.dumps(good))
    groups = [read_rows([str(tmp_path / name)], keep_bad=True) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(ValueError) as caught:
        render_rows(groups, tokenizer)
    lines = str(caught.value).split("\n")
    assert lines[0] == "13 of 15 rows cannot be used:" and len(lines) == 13
    assert lines[1].strip() == f"{tmp_path}/a.jsonl:2: completion is empty"
    assert lines[11].strip() == "and 3 more"
    assert lines[12].startswith(
        "  in all: 8 x tools cannot be rendered (tool use): write it into the text, or take the field out; "
    )
    assert lines[12].endswith("; 3 x completion is empty; 1 x not valid JSON; 1 x a row must be an object")
    (first, second), notes = render_rows(groups, tokenizer, skip_bad=True)
    assert [row.row["prompt"] for row in first + second] == ["a", "a"]
    assert notes == ["13 of 15 rows are left out (--skip-bad-rows): " + lines[12].removeprefix("  in all: ")]
    with pytest.raises(ValueError, match="1 of 1 rows|completion is empty"):
        render_rows([bad[:1]], tokenizer, skip_bad=True)  # nothing would be left
    with pytest.raises(ValueError, match="2 of 2 rows cannot be used"):
        read_rows([f"{tmp_path}/b.jsonl:1"] * 2)  # without keep_bad: what other readers of rows see


@pytest.mark.parametrize(
    "name",
    [
        "instruction_raschka",
        "alpaca_gpt4_demo",
        "dolly_fixture",
        "dolly_hhrlhf",
        "messages_oasst",
        "messages_parts_demo",
        "t0_flan_like",
    ],
)
def test_real_rows(shared, tmp_path, name):
    """Every response token decodes back, on real instruction data in its native formats."""
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
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    assert render({"conversations": turns}, "</s>") == render({"messages": messages}, "</s>")
    with pytest.raises(ValueError, match="role 'function_call' is not allowed: system, user, assistant"):
        render({"conversations": [turns[1], {"from": "function_call", "value": "x"}]}, "</s>")


@pytest.mark.parametrize(
    "name, command",
    [
        ("rows.csv", r"python -c .*pandas.read_csv\('.*rows.csv'\)"),
        ("rows.parquet", "pip install pyarrow"),
        ("rows.arrow", ".*datasets"),
        ("rows.jsonl.zst", "unzstd .*rows.jsonl.zst"),
        ("rows.txt", "mv .*rows.txt rows.jsonl, if it holds a JSON object a line"),
    ],
)
def test_files_of_other_formats_are_named_with_their_converter(tmp_path, monkeypatch, name, command):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    (tmp_path / name).write_bytes(b"PAR1\xff")
    with pytest.raises(
        ValueError, match=rf"{name}: \.\w+ is not read, only .jsonl, .json, .parquet: {command}"
    ):
        read_rows([str(tmp_path / name)])


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
    marked = build_corpus([{"prompt": "", "response": "the quick fox", "noise": [[0, 9, "x"]]}], tokenizer)
    assert not marked.noisy[0] and marked.noisy[1:].any(), "what is not judged is no noise either"
    assert len(corpus.tokens) == len(tokenizer.encode(["the quick fox" + tokenizer.eos])[0][0])


def test_public_rows_without_a_response_are_those_that_render_says(capsys):
    """Found at fe070b7: rows in `conversations` ended in an AttributeError, null columns in a KeyError."""
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [
        {"conversations": turns},
        {"conversations": [turns[0], {"from": "gpt", "value": ""}]},
        {"conversations": turns[:1]},
        {"messages": None, "inputs": "a", "targets": "b"},
        {"inputs": "a", "targets": None},
        {"a": "unknown formats stay"},
    ]
    kept = get_data.convert_rows(tiny.jsonl(rows))
    assert kept == [rows[0], rows[3], rows[5]]
    assert "3 of 6 public rows have no response" in capsys.readouterr().out


def test_two_public_files_never_share_a_place(monkeypatch):
    monkeypatch.setattr(get_data, "convert_once", lambda *_: None)
    names = [
        "a_b/c/x.jsonl",
        "a/b_c/x.jsonl",
        "a/b/c_x.jsonl",
        "a/b/c/x.jsonl",
        "a/b/c/x.jsonl@r",
        "a/b/c x.jsonl",
        "a/b/c%20x.jsonl",
    ]
    paths = {path for name in names for path in get_data.fetch_rows(get_data.HUB_PREFIX + name)}
    assert len(paths) == len(names)


def test_what_a_cold_reader_found(tmp_path):
    """A string in a JSON list was parsed as a line; a gzip of a changed byte, and a count in other digits, were tracebacks."""
    (tmp_path / "x.json").write_text(
        json.dumps([{"prompt": "a", "completion": "b"}, json.dumps({"prompt": "c", "completion": "d"})])
    )
    with pytest.raises(ValueError, match="x.json:2: a row must be an object, not str"):
        read_rows([str(tmp_path / "x.json")])
    whole = bytearray(gzip.compress(json.dumps({"prompt": "a", "completion": "b" * 500}).encode()))
    for place in range(10, len(whole) - 8):
        (tmp_path / "x.jsonl.gz").write_bytes(
            whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
        )
        with pytest.raises(ValueError, match="x.jsonl.gz"):
            read_rows([str(tmp_path / "x.jsonl.gz")])
    with pytest.raises(ValueError, match="no such file"):
        read_rows([str(tmp_path / "x.jsonl") + ":\u00b2"])
    row = {"instruction": "a", "output": "b"}
    with pytest.raises(ValueError, match="masked can only be 0, 1, false or true, not 'false'"):
        render(row | {"masked": "false"}, "</s>")
    with pytest.raises(ValueError, match="system and system_message are both there"):
        render(row | {"system": "x", "system_message": "y"}, "</s>")
    assert render(row | {"history": [["hello", ""]]}, "</s>")[3] == ("</s>", False), (
        "an empty answer is not learned"
    )


def test_a_field_noise_of_another_meaning_is_said(tmp_path):
    tiny.save_tokenizer(tmp_path, "llama3")
    rows = [
        {"instruction": "a", "output": "b", "noise": noise} for noise in ([[0, 1, "x"]], 0.3, [[0, "3", "k"]])
    ]
    notes = [render_rows([[row]], Tokenizer(tmp_path))[1] for row in rows]
    assert notes == [[], *[["fields not used: noise, which is not [[start, end, kind], ...]"]] * 2]


BLANKS = [
    "",
    " ",
    "\n\t",
    "\u00a0",
    "\u3000\u2003",
    "\u2028\x85",
    "\u200b",
    "\ufeff\u2060",
    "\u3164",
    "\u2800",
    None,
    float("nan"),
]


@pytest.mark.parametrize("blank", BLANKS, ids=ascii)
def test_a_text_that_says_nothing_is_absent(blank):
    """Found at 14fe823: " " was a system prompt, a NaN of pandas a text that must be a string, and a blank answer
    was learned, or its eos alone."""
    pair = {"instruction": "a", "output": "b"}
    said = render(pair, "$")
    for name in (
        "input",
        "context",
        "system",
        "system_prompt",
        "history",
        "prompt",
        "completion",
        "tools",
        "chosen",
        "weight",
    ):
        assert render(pair | {name: blank}, "$") == said, name
    assert render({"instruction": blank, "input": "a", "output": "b"}, "$") == said
    assert render({"messages": blank, "prompt": blank, "instruction": "a", "response": "b"}, "$") == said
    assert render({"prompt": blank, "completion": "b"}, "$") == [("", False), ("b$", True)]
    row = {"messages": messages("a", "b", "c", "d", tool_calls=blank, name=blank, reasoning_content=blank)}
    assert render(row, "$") == render({"messages": messages("a", "b", "c", "d")}, "$")
    for nothing in (
        {"instruction": "a", "output": blank},
        {"prompt": "a", "completion": blank},
        {"messages": messages("a", blank)},
        {"prompt": messages("a"), "completion": messages("x", blank)[1:]},
    ):
        with pytest.raises(data.NoResponse):
            render(nothing, "$")
    for turns in (messages("a", blank, "c", "d"), messages("a", "b", "c", blank)):
        answers = [text for text, is_response in render({"messages": turns}, "$") if is_response]
        assert answers == [("d$" if turns[1]["content"] is blank else "b$")], "not even its eos is judged"
    history = render(pair | {"history": [["q", blank]]}, "$")
    assert [text for text, is_response in history if is_response] == ["b$"]


def test_an_answer_of_an_eos_alone_has_no_text():
    """Files that wrote the eos already have it behind an empty answer, too."""
    for row in ({"prompt": "a", "completion": " </s>"}, {"messages": messages("a", "</s>")}):
        with pytest.raises(data.NoResponse):
            render(row, "</s>")
    pieces = render({"messages": messages("a", "</s>", "c", "d</s>")}, "</s>")
    assert [text for text, is_response in pieces if is_response] == ["d</s>"]


def test_white_space_inside_a_content_of_parts_is_text():
    parts = [{"type": "text", "text": text} for text in ("a", " ", "b", "\n", None, "c")]
    row = {"messages": [{"role": "user", "content": parts}, *messages("a", "b")[1:]]}
    assert render(row, "$") == render({"messages": messages("a b\nc", "b")}, "$")
    with pytest.raises(ValueError, match="a part of type text must have a text"):
        render({"messages": [{"role": "user", "content": [{"type": "text", "content": "x"}]}]}, "$")


@pytest.mark.parametrize(
    "nothing", ["[]", "null", "{}", " [ ] ", '""', "[null]", '[{}, {"name": null}]', "NaN", "false", "0"]
)
@pytest.mark.parametrize("name", ["tools", "functions", "images", "tool_calls"])
def test_json_text_of_nothing_is_absent(name, nothing):
    """TRL 1.16.0 prefers tools as JSON text; in a column of text the same letters are an answer."""
    assert render({"messages": messages("a", "b"), name: nothing}, "$") == render(
        {"messages": messages("a", "b")}, "$"
    )
    assert render({"messages": messages("a", "b", **{name: nothing})}, "$") == render(
        {"messages": messages("a", "b")}, "$"
    )
    assert ("[]$", True) in render({"instruction": "An empty list?", "output": "[]"}, "$")
    assert ("null$", True) in render({"messages": messages("a", "null")}, "$")


def test_json_text_of_something_is_something():
    for name, text in {
        "tools": '[{"name": "f"}]',
        "functions": "[0, {}, 1]",
        "images": '"a.png"',
        "tool_calls": "[oops",
    }.items():
        with pytest.raises(ValueError, match=f"{name} cannot be rendered"):
            render({"messages": messages("a", "b"), name: text}, "$")
    for name in ("messages", "conversations", "history"):
        assert render({"instruction": "a", "output": "b", name: "[]"}, "$") == render(
            {"instruction": "a", "output": "b"}, "$"
        )
    with pytest.raises(ValueError, match="messages must be a list of messages, not str"):
        render({"messages": json.dumps(messages("a", "b"))}, "$")


OTHER = {"from": "human", "value": "a"}
LONGER = {"messages": [{"role": "system", "content": "s"}, *messages("q", "r", "a", "b")]}


@pytest.mark.parametrize(
    "row, same",
    [
        # nulls of the other format, in both directions; and both, if they say the same
        (
            {"messages": [OTHER | {"role": None, "content": None}, *messages("a", "b")[1:]]},
            {"messages": messages("a", "b")},
        ),
        (
            {"conversations": messages("a", "b", value=None, **{"from": float("nan")})},
            {"messages": messages("a", "b")},
        ),
        (
            {"messages": [OTHER | {"role": "user", "content": "a"}, *messages("a", "b")[1:]]},
            {"messages": messages("a", "b")},
        ),
        # copies of what is said
        (WITH_SYSTEM | {"system": "s"}, WITH_SYSTEM),
        (WITH_SYSTEM | {"system_prompt": " s\n", "system_message": "s"}, WITH_SYSTEM),
        (WITH_SYSTEM | {"instruction": " a", "output": "b "}, WITH_SYSTEM),
        (EARLIER | {"history": [["q", "r"]]}, EARLIER),
        (LONGER | {"history": messages("q", "r"), "system": "s"}, LONGER),
        (EARLIER | {"prompt": messages("q", "r", "a")}, EARLIER),
        (
            EARLIER
            | {"conversations": messages("q", "r", "a", "b"), "chosen": messages("q", "r", "a", "b")[3:]},
            EARLIER,
        ),
        (
            {
                "instruction": "a",
                "input": "x",
                "output": "b",
                "question": "a",
                "context": "x",
                "query": "a\n\nx",
            },
            {"instruction": "a\n\nx", "output": "b"},
        ),
    ],
)
def test_what_is_said_twice_is_said_once(row, same):
    assert render(row, "$") == render(same, "$")


def test_a_question_that_was_asked_before_is_asked_twice():
    """A history that is the whole conversation is no copy: then nothing of it would be earlier."""
    twice = {"messages": messages("a", "b", "a", "b")}
    for row in ({"instruction": "a", "output": "b"}, {"messages": messages("a", "b")}):
        assert render(row | {"history": [["a", "b"]]}, "$") == render(twice, "$")


@pytest.mark.parametrize(
    "row, message",
    [
        (WITH_SYSTEM | {"system": "another"}, "must take turns"),
        ({"messages": messages("a", "b", value="c")}, "content and value are both there"),
        ({"messages": [OTHER | {"role": "assistant"}]}, "role and from are both there"),
        (EARLIER | {"prompt": messages("another")}, "prompt has no place in this format"),
        (EARLIER | {"prompt": messages("q", "another")}, "prompt has no place in this format"),
        (EARLIER | {"completion": []}, None),
    ],
)
def test_what_says_something_else_is_no_copy(row, message):
    if message is None:
        assert render(row, "$") == render(EARLIER, "$")
        return
    with pytest.raises(ValueError, match=message):
        render(row, "$")


def test_tulus_template_strips_as_open_instruct_does():
    """open-instruct's encode_with_messages_format strips every content; the authors' ids are made so: of 2,699 real
    conversations 500 had a line break at an end."""
    row = {
        "messages": [
            {"role": "system", "content": " s "},
            *messages("\n a\u00a0", "b\n\n", " c", " \td </s>"),
        ]
    }
    text = "".join(piece for piece, _ in render(row, "</s>"))
    assert text == "<|system|>\ns\n<|user|>\na\n<|assistant|>\nb</s>\n<|user|>\nc\n<|assistant|>\nd </s>"
    assert render({"prompt": " a ", "completion": " b "}, "$") == [(" a ", False), (" b $", True)], (
        "no template"
    )


@pytest.mark.parametrize("kind", ["llama2", "llama3"])
def test_the_published_template_writes_a_bos_where_the_tokenizer_puts_one(tmp_path, kind):
    """And none where it does not; contents are stripped as in training."""
    import jinja2

    tokenizer = Tokenizer(tiny.make_checkpoint(tmp_path, kind))
    turns = messages(" The quick\n", "fox \n", "\njumps", " over")
    puts_bos = tokenizer.encode(["x"])[0][0][0] == tokenizer.bos_id
    template = chat_template(tokenizer)
    assert puts_bos == template.startswith("{{ bos_token }}") == tiny.SPECIAL[kind][3]
    shown = (
        jinja2.Environment()
        .from_string(template)
        .render(messages=turns, bos_token=tokenizer.bos, eos_token=tokenizer.eos)
    )
    ((ids, _),) = tokenizer.encode([shown], special=False)
    corpus = build_corpus([{"messages": turns}], tokenizer)
    assert ids == corpus.tokens.tolist()
    assert ids.count(tokenizer.bos_id) == (1 if puts_bos else 0) or tokenizer.bos_id == tokenizer.eos_id


def test_noise_without_a_template_counts_in_the_row_too(tokenizer):
    """Of the last response that is trained on; tulu trims, raw text does not."""
    marks = [[0, 3, "space"], [3, 8, "wrong"], [9, 99, "behind"]]
    cases = {
        "tulu": {"messages": messages("q", "x", "a", "\n\n wrong "), "noise": marks},
        "raw": {"prompt": "a", "completion": "\n\n wrong ", "noise": marks},
        "off": {"messages": messages("q", "\n\n wrong ", "a", "wrong", weight=1), "noise": marks},
    }
    cases["off"]["messages"][3]["weight"] = 0
    kinds = {"tulu": ["wrong"], "raw": ["space", "wrong"], "off": ["wrong"]}
    for name, row in cases.items():
        (((rendered,),), notes) = render_rows([[row]], tokenizer)
        assert [kind for _, _, kind in rendered.noise] == kinds[name], name
        start, end, _ = rendered.noise[-1]
        assert rendered.text[start:end] == "wrong"
        assert notes == ["fields not used: marks of noise that are not in the response"]
    corpus = build_corpus([cases["tulu"]], tokenizer)
    marked = tokenizer.decode(corpus.tokens[corpus.noisy].tolist(), skip_special=False)
    assert marked.strip() == "wrong", "the eos is no part of it"


def test_the_fingerprint_is_of_tokens_mask_and_boundaries():
    corpus = position_corpus([3, 4])
    before = corpus.fingerprint()
    changed = position_corpus([3, 4])
    changed.response[2] = False
    assert changed.fingerprint() != before, "of the same text less is judged"
    changed = position_corpus([4, 3])
    changed.response[:] = corpus.response
    assert changed.fingerprint() != before
    corpus.tokens[1] += 1
    assert corpus.fingerprint() != before


def test_answers_that_lose_their_end_are_counted(tokenizer):
    """Whole rows are dropped, and counted apart; an answer that ends with the last token is whole."""
    row = {"messages": messages("a", "the quick fox", "c", "jumps over")}
    whole = build_corpus([row], tokenizer)
    length = len(whole.tokens)
    long = {"prompt": "the dog " * 200, "completion": "x"}
    assert whole.cut == 0 == build_corpus([row], tokenizer, max_length=length).cut
    judged = np.flatnonzero(whole.response)
    second = judged[np.flatnonzero(np.diff(judged) > 1)[0] + 1]  # where the second answer begins
    for end, cut in ((length - 1, 1), (second + 1, 1), (second, 1), (second - 3, 1), (judged[0] + 1, 2)):
        corpus = build_corpus([long, row], tokenizer, max_length=int(end))
        assert (corpus.cut, corpus.dropped, len(corpus.tokens)) == (cut, 1, end)


def test_several_flags_of_one_turn():
    """Each may switch it off; what is not 0 or 1 is refused, whatever the others say."""
    for flags in (
        {"weight": 1, "train": 0},
        {"train": 0, "weight": 1},
        {"masked": 1, "loss": 1},
        {"masked": 0, "loss": 0},
    ):
        pieces = render({"messages": messages("q", "r", "a", "b", **flags)}, "$")
        assert [text for text, is_response in pieces if is_response] == ["b$"], flags
    pieces = render({"messages": messages("q", "r", "a", "b", weight=1, train=True, masked=False)}, "$")
    assert [text for text, is_response in pieces if is_response] == ["r$", "b$"]
    with pytest.raises(ValueError, match="loss can only be 0, 1"):
        render({"messages": messages("q", "r", "a", "b", train=0, loss=2)}, "$")


def test_a_users_weight_does_not_make_it_an_answer(tokenizer):
    turns = messages("a", "b")
    for weight, notes in (
        (0, []),
        (1, ["fields not used: a message's weight, where it is not the assistant's"]),
    ):
        turns[0]["weight"] = weight
        assert render({"messages": turns}, "$") == render({"messages": messages("a", "b")}, "$")
        assert render_rows([[{"messages": turns}]], tokenizer)[1] == notes


def test_a_response_that_begins_with_a_space_gets_no_second():
    for space in (" ", "\n", "\u00a0"):
        assert render({"prompt": "p", "completion": f"{space}c"}, "$") == [("p", False), (f"{space}c$", True)]
        assert render({"prompt": f"p{space}", "completion": "c"}, "$") == [(f"p{space}", False), ("c$", True)]


def test_responses_that_touch_are_one_span(tmp_path):
    """A template may write nothing between two answers: then the text and its duplicate have the same spans."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    tiny.save_tokenizer(tmp_path, "llama3")
    (tmp_path / "chat_template.jinja").write_text(template)
    rows = [{"messages": messages("a", "b", "c", "d")}]
    ((rendered,),), _ = render_rows([rows], Tokenizer(tmp_path, "model"))
    assert (rendered.text, rendered.spans) == ("b</s>d</s>", ((0, 10),))


def test_half_a_character_is_named_in_small_and_capital_letters(tmp_path):
    """json.dumps writes "\\ud83d", Java's and C#'s writers "\\uD83D"; a whole pair is a character."""
    for escape in ("\\ud83d", "\\uD83D", "\\uDE00", "\\uDB40"):
        (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b' + escape + '"}')
        with pytest.raises(ValueError, match=f"a.jsonl:1: .u{escape[2:].lower()} alone is half a character"):
            read_rows([str(tmp_path / "a.jsonl")])
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "\\uD83D\\uDE00"}')
    assert read_rows([str(tmp_path / "a.jsonl")])[0]["completion"] == "\U0001f600"


def test_capital_suffixes_are_read(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    for name in ("a.jsonl.GZ", "a.JSON.Gz", "a.JSONL.gz"):
        content = [row] if ".JSON." in name else row
        (tmp_path / name).write_bytes(gzip.compress(json.dumps(content).encode()))
        assert read_rows([str(tmp_path / name)])[0]["prompt"] == "a"


def test_a_name_that_is_not_utf8_is_refused_before_anything_is_read(tmp_path):
    """Such a name could be kept in no file of a run: it ended after the reference was trained."""
    with pytest.raises(ValueError, match=r"'.*r.udce9.jsonl': a file name that is not UTF-8: rename it"):
        read_rows([str(tmp_path / "r\udce9.jsonl")])


def test_a_terminal_shows_what_it_can(monkeypatch):
    for encoding, shown in (
        ("ascii", b"caf? ?\n"),
        ("latin-1", b"caf\xe9 ?\n"),
        ("utf-8", "café 第\n".encode()),
    ):
        screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", screen)
        data.print0("café 第")
        assert screen.buffer.getvalue() == shown


def json_table(rows: list[dict], path) -> None:
    """A table as datasets 5.2.0 writes it where the objects of a list differ in their keys."""
    import pyarrow
    import pyarrow.parquet

    as_json = pyarrow.json_()
    texts = [json.dumps(message) for row in rows for message in row["messages"]]
    elements = pyarrow.ExtensionArray.from_storage(as_json, pyarrow.array(texts))
    offsets = np.cumsum([0, *(len(row["messages"]) for row in rows)])
    columns = {"messages": pyarrow.ListArray.from_arrays(pyarrow.array(offsets, "int32"), elements)}
    notes = pyarrow.ExtensionArray.from_storage(
        as_json, pyarrow.array([json.dumps(row["noise"]) for row in rows])
    )
    columns["noise"] = notes
    tools = pyarrow.ExtensionArray.from_storage(as_json, pyarrow.array(["[]", "null", None][: len(rows)]))
    columns["extra"] = pyarrow.StructArray.from_arrays(
        [tools, pyarrow.array(["x"] * len(rows))], names=["tools", "tag"]
    )
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_columns_of_json_give_what_their_text_says(tmp_path, monkeypatch):
    """Arrow's type arrow.json, in lists and structs, too: pyarrow 26.0.1's to_pylist gives the JSON text, and
    "Santiago." was trained with its quotation marks."""
    pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {"messages": messages("a", "Santiago.", weight=1), "noise": [[0, 3, "x"]]},
        {"messages": messages("c", 'He said "no"', "d", "e"), "noise": []},
    ]
    json_table(rows, tmp_path / "a.parquet")
    read = read_rows([str(tmp_path / "a.parquet")])
    for row, found in zip(rows, read, strict=True):
        assert {name: found[name] for name in row} == row
        assert found["extra"]["tools"] in ([], None) and found["extra"]["tag"] == "x"
    half = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(['"b\\ud83d"']))
    table = pyarrow.table({"prompt": ["a"], "completion": half})
    pyarrow.parquet.write_table(table, tmp_path / "half.parquet")
    with pytest.raises(ValueError, match="half.parquet:1: .ud83d alone is half a character"):
        read_rows([str(tmp_path / "half.parquet")])
    texts = ['"b"', "oops", '"d"', "[" * 100_000]
    broken = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(texts))
    table = pyarrow.table({"prompt": list("abcd"), "completion": broken})
    pyarrow.parquet.write_table(table, tmp_path / "broken.parquet")  # "not a whole parquet file", it was
    with pytest.raises(
        ValueError, match=r"(?s)^2 of 4 rows .*broken.parquet:2: column completion: not valid JSON"
    ):
        read_rows([str(tmp_path / "broken.parquet")])
    kept = read_rows([str(tmp_path / "broken.parquet")], keep_bad=True)  # --skip-bad-rows
    assert [row.get("completion") for row in kept] == ["b", None, "d", None]
    monkeypatch.delattr(pyarrow, "json_")  # as before pyarrow 19
    with pytest.raises(ValueError, match=r"a.parquet: its columns of JSON need pyarrow 19"):
        read_rows([str(tmp_path / "a.parquet")])


def test_public_tables_are_read_as_rows(tmp_path):
    pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": messages("a", "b"), "noise": []}]
    json_table(rows, tmp_path / "a.parquet")
    (row,) = map(json.loads, get_data.table_as_lines(tmp_path / "a.parquet").splitlines())
    assert row["messages"] == rows[0]["messages"] and "_source" not in row


def test_the_name_of_a_public_file_in_the_cache(monkeypatch):
    """Others' scripts look there; a slash in it would be a folder."""
    monkeypatch.setattr(get_data, "convert_once", lambda *_: None)
    monkeypatch.setattr(get_data.constants, "HF_HOME", "/cache")
    for kind in ("jsonl", "parquet"):
        (path,) = get_data.fetch_rows(f"{get_data.HUB_PREFIX}a/b/c d/rows.{kind}@main")
        assert path.as_posix() == f"/cache/forgetting-rows/a%2Fb%2Fc%20d%2Frows.{kind}%40main.jsonl"


def test_cores_that_a_container_may_use(tmp_path):
    """Its quota counts, that of a group above it, too; torch would start a thread for every core of the host."""
    cores = len(os.sched_getaffinity(0))
    own, above = tmp_path / "sys/fs/cgroup/pod/container", tmp_path / "sys/fs/cgroup/pod"
    own.mkdir(parents=True)
    assert usable_cores(tmp_path) == cores, "no control groups"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:cpu:/\n0::/pod/container\n")
    assert usable_cores(tmp_path) == cores
    (own / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == cores
    (above / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1, "half a core"
    (own / "cpu.max").write_text(f"{100 * cores}50000 100000\n")
    assert usable_cores(tmp_path) == 1, "the smaller of both"
    (above / "cpu.max").unlink()
    assert usable_cores(tmp_path) == cores, "more than there are"


@pytest.mark.parametrize("given, expected", [(None, 1), ("3", 3)])
def test_threads_are_limited_unless_they_are_given(monkeypatch, given, expected):
    """ablations, real_run and reference_steps started a thread for every core of the host."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(data, "usable_cores", lambda: 1)
    torch.set_num_threads(3)
    data.limit_threads()
    found = torch.get_num_threads()
    torch.set_num_threads(before)
    assert found == expected
