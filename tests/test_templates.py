"""A model's own chat template: what transformers' apply_chat_template makes of the same messages (goldens/rows.json)."""

import json
from pathlib import Path

import pytest
import row_cases as cases
import tiny

from data import Tokenizer, build_corpus, question_ids, render, render_rows
from forgetting import Options, select_data
from publish import chat_template

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "rows.json").read_text())["templates"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("templates")
    return {name: Tokenizer(cases.template_folder(folder / name, name), "model") for name in cases.TEMPLATES}


@pytest.mark.parametrize("which", cases.CONVERSATIONS)
@pytest.mark.parametrize("name", cases.TEMPLATES)
def test_texts_spans_and_ids_are_those_of_transformers(tokenizers, name, which):
    """A response is the difference of two renderings: up to the question, asked for an answer, and with the answer."""
    tokenizer, golden, row = tokenizers[name], GOLDENS[name][which], {"messages": cases.messages_of(which)}
    if isinstance(golden, str):
        with pytest.raises(ValueError, match=rf"row: the chat template does not take it \({golden}\)"):
            render(row, tokenizer.eos, tokenizer.template)
        return
    pieces = render(row, tokenizer.eos, tokenizer.template)
    assert "".join(text for text, _ in pieces) == golden["text"]
    answers = [after.removeprefix(before) for before, after in golden["turns"]]
    assert [text for text, is_response in pieces if is_response] == answers
    corpus = build_corpus([row], tokenizer)
    assert corpus.tokens.tolist() == golden["ids"]  # with no bos and no eos that the template did not write
    assert tokenizer.decode(corpus.tokens[corpus.response].tolist(), skip_special=False) == "".join(answers)


def test_a_question_is_asked_in_the_template(tokenizers):
    before = GOLDENS["llama3"]["one turn"]["turns"][0][0]
    tokenizer = tokenizers["llama3"]
    assert tokenizer.decode(question_ids("What is 12 plus 30?", tokenizer), skip_special=False) == before
    assert question_ids("What is 12 plus 30?", tokenizer).count(tokenizer.bos_id) == 1


def test_a_turn_that_is_not_learned_is_not_judged(tokenizers):
    messages = cases.messages_of("two turns")
    messages[1]["weight"] = 0
    for tokenizer in tokenizers.values():
        pieces = render({"messages": messages}, tokenizer.eos, tokenizer.template)
        plain = render({"messages": cases.messages_of("two turns")}, tokenizer.eos, tokenizer.template)
        assert [text for text, _ in pieces] == [text for text, _ in plain]
        assert [text for text, is_response in pieces if is_response] == [plain[-1][0]]


def test_two_lists_of_messages_are_learned_as_trl_learns_them(tokenizers):
    golden = json.loads((Path(__file__).parent / "goldens" / "rows.json").read_text())["trl"]
    tokenizer = tokenizers["zephyr"]
    pieces = render(cases.TWO_LISTS, tokenizer.eos, tokenizer.template)
    assert "".join(text for text, is_response in pieces if not is_response) == golden["prompt"]
    assert "".join(text for text, is_response in pieces if is_response) == golden["completion"]


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
    assert shown[1] == ("<think>\n\n</think>\n\nIt is 42.<|im_end|>\n", True)
    with pytest.raises(
        ValueError, match="row: the chat template writes earlier turns anew: it is right for one turn only"
    ):
        render({"messages": cases.messages_of("two turns")}, tokenizer.eos, tokenizer.template)


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
    assert said[:4] == [
        "2 of 7 rows are left out (--skip-bad-rows): 1 x completion is empty; 1 x not valid JSON",
        "fields not used: mood",
        "2 of 5 rows are exact duplicates, and left out",
        "the model has a chat template of its own; conversations take Tulu's (--template)",
    ]
    tokenizer = Tokenizer(folder, "model")
    _, d_train = select_data(Options(model="m", template="model", skip_bad_rows=True, **files), tokenizer)
    assert tokenizer.decode(d_train.split()[0].tolist(), skip_special=False).startswith("<|user|>\nTell ")
    assert "Tulu" not in capsys.readouterr().out and d_train.tokens[0] != tokenizer.bos_id
