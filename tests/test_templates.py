"""A model's own chat template: what transformers' apply_chat_template makes of the same messages (goldens/rows.json)."""

import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import row_cases as cases
import tiny
from safetensors.numpy import load_file

import forgetting
from data import Tokenizer, Turn, build_corpus, question_ids, render, render_rows
from eval import dates_of, run_config
from forgetting import Options, read_held_out, select_data
from publish import chat_template

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "rows.json").read_text())["templates"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("templates")
    return {
        name: Tokenizer(cases.template_folder(folder / name, name), "model", cases.NOW)
        for name in cases.TEMPLATES
    }


@pytest.mark.parametrize("which", cases.CONVERSATIONS)
@pytest.mark.parametrize("name", cases.TEMPLATES)
def test_texts_spans_and_ids_are_those_of_transformers(tokenizers, name, which):
    """A response is the difference of two renderings: up to the question, asked for an answer, and with the answer.

    Without the white space behind its end of turn, which is never generated. dated: tools that are none,
    indented tags, tojson's arguments, the date, the bos (transformers 5.23.0; its clock stood still).
    """
    tokenizer, golden, row = tokenizers[name], GOLDENS[name][which], {"messages": cases.messages_of(which)}
    if isinstance(golden, str):
        with pytest.raises(ValueError, match=rf"row: the chat template does not take it \({golden}\)"):
            render(row, tokenizer.eos, tokenizer.template)
        return
    pieces = render(row, tokenizer.eos, tokenizer.template)
    assert "".join(text for text, _ in pieces) == golden["text"]
    answers = [after.removeprefix(before).rstrip() for before, after in golden["turns"]]
    assert [text for text, is_response in pieces if is_response] == answers
    corpus = build_corpus([row], tokenizer)
    assert corpus.tokens.tolist() == golden["ids"]  # with no bos and no eos that the template did not write
    assert tokenizer.decode(corpus.tokens[corpus.response].tolist(), skip_special=False) == "".join(answers)


def test_a_question_is_asked_in_the_template(tokenizers):
    before = GOLDENS["llama3"]["one turn"]["turns"][0][0]
    tokenizer = tokenizers["llama3"]
    assert tokenizer.decode(question_ids("What is 12 plus 30?", tokenizer), skip_special=False) == before
    assert question_ids("What is 12 plus 30?", tokenizer).count(tokenizer.bos_id) == 1
    # zephyr's writes no bos, and then there is none, though the tokenizer puts one
    before = GOLDENS["zephyr"]["one turn"]["turns"][0][0]
    ids = question_ids("What is 12 plus 30?", tokenizers["zephyr"])
    assert tokenizers["zephyr"].bos_id not in ids
    assert tokenizers["zephyr"].decode(ids, skip_special=False) == before


def text_of(pieces: list) -> str:
    return "".join(text for text, _ in pieces)


def answers_of(pieces: list) -> list[str]:
    return [text for text, is_response in pieces if is_response]


def test_a_turn_that_is_not_learned_is_not_judged(tokenizers):
    messages = cases.messages_of("two turns")
    messages[1]["weight"] = 0
    for tokenizer in tokenizers.values():
        pieces = render({"messages": messages}, tokenizer.eos, tokenizer.template)
        plain = render({"messages": cases.messages_of("two turns")}, tokenizer.eos, tokenizer.template)
        assert text_of(pieces) == text_of(plain)
        assert answers_of(pieces) == answers_of(plain)[1:]


def test_two_lists_of_messages_are_learned_as_trl_learns_them(tokenizers):
    golden = json.loads((Path(__file__).parent / "goldens" / "rows.json").read_text())["trl"]
    tokenizer = tokenizers["zephyr"]
    pieces = render(cases.TWO_LISTS, tokenizer.eos, tokenizer.template)
    assert text_of(pieces[: pieces.index((answers_of(pieces)[0], True))]) == golden["prompt"]
    assert "".join(answers_of(pieces)) == golden["completion"].rstrip()  # zephyr's ends in a line break
    assert text_of(pieces) == golden["prompt"] + golden["completion"]


def folder_with(folder: Path, template: object) -> Path:
    """A model's folder whose tokenizer_config.json has a template."""
    tiny.save_tokenizer(folder, "llama3")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


def test_where_the_template_is_found(tmp_path):
    """chat_template.jinja comes before tokenizer_config.json; of several named ones it is "default"."""
    folder = folder_with(
        tmp_path, [{"name": "rag", "template": "x"}, {"name": "default", "template": "{{ eos_token }}y"}]
    )
    assert Tokenizer(folder).chat_template == "{{ eos_token }}y" and Tokenizer(folder).template is None
    (folder / "chat_template.jinja").write_text("z")
    assert Tokenizer(folder, "model").chat_template == "z" == chat_template(Tokenizer(folder, "model"))
    tiny.save_tokenizer(tmp_path / "none", "llama3")
    with pytest.raises(ValueError, match="none: it has no chat template, which --template model needs"):
        Tokenizer(tmp_path / "none", "model")
    with pytest.raises(ValueError, match="broken: its chat template is not valid .*endfor"):
        Tokenizer(folder_with(tmp_path / "broken", "{% for x in y %}"), "model")


def test_a_template_that_rewrites_earlier_turns_is_for_one_turn_only(tmp_path):
    """Qwen3's takes the thoughts of earlier turns out: what was learned would not be what the model sees later."""
    tokenizer = Tokenizer(folder_with(tmp_path, cases.REWRITING), "model")
    shown = render({"messages": cases.messages_of("one turn")}, tokenizer.eos, tokenizer.template)
    assert shown[1:] == [("<think>\n\n</think>\n\nIt is 42.<|im_end|>", True), ("\n", False)]
    messages = cases.messages_of("two turns")
    how = "writes earlier turns anew: make a row of each answer, with weight 0 on the answers before it"
    with pytest.raises(ValueError, match=f"row: the chat template {how}"):
        render({"messages": messages}, tokenizer.eos, tokenizer.template)
    messages[1]["weight"] = 0
    pieces = render({"messages": messages}, tokenizer.eos, tokenizer.template)  # what the message says is so
    assert answers_of(pieces) == ["<think>\n\n</think>\n\né 🦊<|im_end|>"]
    assert text_of(pieces).count("<think>") == 1


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}{% for part in m.content %}{{ part.text }}{% endfor %}</s>{% endfor %}",
        "{% for m in messages %}{{ m.role }}{{ m.content | upper }}</s>{% endfor %}",
        "{% for m in messages %}{{ m.role }}{{ m.content.split('is')[-1] }}</s>{% endfor %}",
    ],
)
def test_an_answer_that_the_template_does_not_write_is_refused(tmp_path, template):
    """llava's, smolvlm's and idefics' write a list of parts, and of a string nothing but the end of turn."""
    ask = "{% if add_generation_prompt %}assistant{% endif %}"
    tokenizer = Tokenizer(folder_with(tmp_path, template + ask), "model")
    row = {"messages": cases.messages_of("one turn")}
    with pytest.raises(ValueError, match="does not write the answer as it is .or --template tulu."):
        render(row, tokenizer.eos, tokenizer.template)


def jinja_text(text: str) -> str:
    return "{{ " + json.dumps(text) + " }}"


def test_only_white_space_behind_an_end_of_turn_is_not_judged(tmp_path):
    """Where white space ends the turn it is judged, as is what is part of the answer."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}END{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    ends = {"</s>\n": ["b \n</s>"], "\n": ["b \n\n"], "": ["b \n"], " </s>\u00a0\u2028": ["b \n </s>"]}
    for i, (end, answers) in enumerate(ends.items()):
        tokenizer = Tokenizer(
            folder_with(tmp_path / str(i), template.replace("END", jinja_text(end))), "model"
        )
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b \n"}]}
        pieces = render(row, tokenizer.eos, tokenizer.template)
        assert answers_of(pieces) == answers, end
        assert text_of(pieces) == f"user: a{end}assistant: b \n{end}"


def test_a_template_has_the_date_that_it_is_given(tmp_path):
    """Two rows of a run, and two runs of a run folder, never have two dates; nothing is drawn at random."""
    folder = folder_with(
        tmp_path, "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{{ messages | map(attribute='content') | join }}"
    )
    row = {"messages": cases.messages_of("one turn")}
    for now in (datetime(2024, 2, 29, 23, 59, 59), datetime(2031, 1, 1)):
        template = Tokenizer(folder, "model", now).template
        assert template.text([Turn("user", "x", False)]) == f"{now}x"
        assert text_of(render(row, "</s>", template)).startswith(f"{now}")
    for drawn in ("{{ [1, 2, 3] | random }}", "{{ lipsum() }}{{ messages[0].content }}"):
        with pytest.raises(ValueError, match="No filter named 'random'|'lipsum' is undefined"):
            drawing = Tokenizer(folder_with(tmp_path / "random", drawn), "model")
            render(row, "</s>", drawing.template)


def test_noise_counts_in_the_rows_own_characters(tokenizers, tmp_path):
    """A template may put thoughts in front of an answer, trim it, or write its words there, too."""
    rewriting = Tokenizer(folder_with(tmp_path, cases.REWRITING), "model")
    for tokenizer in [*tokenizers.values(), rewriting]:
        for content, marks in ((" \n think: wrong \n", [[10, 15, "a"]]), ("a", [[0, 1, "a"]])):
            rows = [{"instruction": "q", "output": content, "noise": marks}]
            (((rendered,),), notes) = render_rows([rows], tokenizer)
            marked = [rendered.text[start:end] for start, end, _ in rendered.noise]
            assert (marked, notes) == ([content[start:end] for start, end, _ in marks], []), content
            assert build_corpus(rows, tokenizer).noisy.any()


def test_noise_is_found_behind_what_a_template_writes(tmp_path):
    """Letters of the answer may stand in the thoughts that the template puts in front of it."""
    tokenizer = Tokenizer(folder_with(tmp_path, cases.REWRITING), "model")
    rows = [{"instruction": "q", "output": "think", "noise": [[0, 5, "a"]]}]
    ((rendered,),), _ = render_rows([rows], tokenizer)
    ((start, end, _),) = rendered.noise
    assert rendered.text[:start].endswith("</think>\n\n") and rendered.text[end:] == "<|im_end|>\n"


def test_marks_that_are_nowhere_in_the_answer_are_said(tokenizers):
    for tokenizer in (tokenizers["llama3"], tokenizers["zephyr"]):
        marks = [[0, 2, "white space"], [2, 7, "kept"], [8, 40, "the eos"], [-3, -1, "in front"], [4, 4, "x"]]
        rows = [{"instruction": "q", "output": "\n\nwrong ", "noise": marks}]
        (((rendered,),), notes) = render_rows([rows], tokenizer)
        assert notes == ["fields not used: marks of noise that are not in the response"]
        kinds = ["kept"] if tokenizer is tokenizers["llama3"] else ["white space", "kept"]
        assert [kind for _, _, kind in rendered.noise] == kinds  # zephyr's does not trim


@pytest.mark.parametrize("attack", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ 1 // 0 }}"])
def test_a_template_can_do_no_harm(tmp_path, attack):
    tokenizer = Tokenizer(folder_with(tmp_path, attack), "model")
    with pytest.raises(ValueError, match="f:1: the chat template does not take it"):
        render(
            {"messages": cases.messages_of("one turn"), "_source": "f:1"}, tokenizer.eos, tokenizer.template
        )


def test_raw_text_takes_no_template(tokenizers):
    """It has the bos and the eos that the template does not write for it."""
    tokenizer, rows = (
        tokenizers["gemma"],
        [{"prompt": "a", "completion": "b"}, {"messages": cases.messages_of("one turn")}],
    )
    corpus = build_corpus(rows, tokenizer)
    assert corpus.tokens[0] == tokenizer.bos_id and corpus.tokens[corpus.offsets[1] - 1] == tokenizer.eos_id
    assert corpus.tokens[corpus.offsets[1] :].tolist() == GOLDENS["gemma"]["one turn"]["ids"]
    _, notes = render_rows([rows], tokenizer)
    assert notes == ["1 of 2 rows are raw text without turn markers (prompt + completion)"]


def test_a_run_takes_the_rows_that_can_be_used_and_says_so(tmp_path, capsys):
    """Of D_train and D_ref together: what is left out, what is a duplicate, what is not used, whose template it is."""
    tiny.make_checkpoint(tmp_path, "llama3")
    folder = folder_with(tmp_path, cases.TEMPLATES["zephyr"][0])
    rows = [{"instruction": f"Tell {i}", "output": f"It is {i}", "mood": "x"} for i in (1, 2, 3, 3)]
    (tmp_path / "rows.jsonl").write_text(tiny.jsonl([*rows, {"prompt": "a", "completion": ""}]))
    (tmp_path / "ref.jsonl").write_text(json.dumps(rows[0]) + "\n{oops")
    files = {"data": [str(tmp_path / "rows.jsonl")], "reference_data": [str(tmp_path / "ref.jsonl")]}
    with pytest.raises(
        ValueError,
        match=r"(?s)^2 of 7 rows cannot be used:.*rows.jsonl:5: completion is empty.*ref.jsonl:2: not valid",
    ):
        select_data(Options(model="m", **files), Tokenizer(folder))
    capsys.readouterr()
    d_ref, d_train = select_data(Options(model="m", skip_bad_rows=True, **files), Tokenizer(folder))
    assert (len(d_ref), len(d_train)) == (1, 2)
    said = capsys.readouterr().out.splitlines()
    assert said[:5] == [
        "2 of 7 rows are left out (--skip-bad-rows): 1 x completion is empty; 1 x not valid JSON",
        "fields not used: mood",
        "1 of 5 rows are exact duplicates, and left out",
        "1 of 3 rows of --data are in D_ref, too: they are left out of D_train",
        "the model has a chat template of its own; conversations take Tulu's (--template)",
    ]
    tokenizer = Tokenizer(folder, "model")
    _, d_train = select_data(Options(model="m", template="model", skip_bad_rows=True, **files), tokenizer)
    assert tokenizer.decode(d_train.split()[0].tolist(), skip_special=False).startswith("<|user|>\nTell ")
    assert "Tulu" not in capsys.readouterr().out and d_train.tokens[0] != tokenizer.bos_id


def test_a_run_goes_on_tomorrow_with_the_date_of_its_first_start(tmp_path, monkeypatch, capsys):
    """Llama 3.2's template writes today's date: the same command a day later was refused, "made with other
    training data". And noise that the rows mark by then is kept beside the scores, which it does not change."""
    model = tiny.make_checkpoint(tmp_path / "model", "llama3")
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.role + m.content }}</s>{% endfor %}"
    folder_with(model, template + "{% if add_generation_prompt %}assistant{% endif %}")
    rows = [{"instruction": f"Tell {i}", "output": f"It is {i} so"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text(tiny.jsonl(rows))
    options = Options(
        model=str(model),
        data=[str(tmp_path / "rows.jsonl")],
        out=str(tmp_path / "run"),
        template="model",
        methods=["forgetting"],
        rank=2,
        batch_size=2,
        n_reference=4,
        reference_epochs=4,
        reference_lr=0.01,
    )
    scores, config = tmp_path / "run/scores.safetensors", tmp_path / "run/config.json"
    for day, marks in ((3, []), (4, [[0, 2, "wrong"]]), (5, [[0, 2, "wrong"], [3, 5, "other"]]), (6, [])):
        now = datetime(2026, 7, day, 8)
        monkeypatch.setattr(forgetting, "datetime", clock(now))
        (tmp_path / "rows.jsonl").write_text(tiny.jsonl([row | {"noise": marks} for row in rows]))
        before = load_file(scores) if day > 3 else None
        forgetting.run(options)
        assert json.loads(config.read_text())["date"] == "2026-07-03T08:00:00"
        after = load_file(scores)
        assert {name for name in after if name.startswith("noise.")} == {
            f"noise.{kind}" for *_, kind in marks
        }
        assert ("the noise that the rows mark now" in capsys.readouterr().out) == (before is not None)
        if before is not None:
            for name in ("tokens", "base_loss", "ref_loss"):
                np.testing.assert_array_equal(before[name], after[name])
    for name in ("run/forgetting/seed-0", "run/reference"):
        adapter = str(tmp_path / name)
        assert dates_of({adapter: run_config(adapter)}) == [datetime(2026, 7, 3, 8)]
    assert dates_of({}) == dates_of({"elsewhere": run_config(str(tmp_path))}) == []
    config.write_text(json.dumps(json.loads(config.read_text()) | {"date": "yesterday"}))
    with pytest.raises(ValueError, match="config.json: date 'yesterday' is not a date"):
        forgetting.run(options)
    for date in ("yesterday", 5):
        with pytest.raises(ValueError, match=f"a: config.json of its run: date {date!r} is not a date"):
            dates_of({"a": {"date": date}})


def clock(now: datetime) -> type:
    """datetime, at which it is always the same time."""
    return type("Clock", (datetime,), {"now": classmethod(lambda cls, tz=None: now)})


def test_cut_answers_are_said(tmp_path, capsys):
    tokenizer = Tokenizer(tiny.make_checkpoint(tmp_path, "llama3"))
    rows = [{"instruction": f"Tell {i}", "output": f"It is {i} " + "and so on " * (i % 3)} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text(tiny.jsonl(rows))
    for max_length, cut in ((24, True), (400, False)):
        files = {"data": [str(tmp_path / "rows.jsonl")], "n_reference": 3, "max_length": max_length}
        corpora = select_data(Options(model="m", **files), tokenizer)
        said = capsys.readouterr().out
        for name, corpus in zip(("D_ref", "D_train"), corpora, strict=True):
            line = f"{name} {corpus.cut} answers are cut: they lose their end and eos to --max-length {max_length}"
            assert (line in said) == (corpus.cut > 0) == cut


def test_duplicates_among_held_out_rows_are_measured_once(tmp_path):
    tokenizer = Tokenizer(tiny.make_checkpoint(tmp_path, "llama3"))
    rows = [{"instruction": f"Tell {i}", "output": f"It is {i}"} for i in (1, 2, 2, 1, 3)]
    (tmp_path / "held.jsonl").write_text(tiny.jsonl(rows))
    trained = build_corpus([{"instruction": "another", "output": "row"}], tokenizer)
    options = Options(model="m", data=["d"], eval_data=[str(tmp_path / "held.jsonl")])
    held_out = read_held_out(options, tokenizer, trained)
    assert [location.rpartition(":")[2] for location in held_out.locations] == ["1", "2", "5"]
    with pytest.raises(ValueError, match="1 of its 3 rows are in D_ref or D_train"):
        read_held_out(options, tokenizer, trained, build_corpus(rows[1:2], tokenizer))
