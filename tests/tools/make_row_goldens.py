"""Store what transformers makes of the chat templates and tokenizer folders of row_cases.py: goldens/rows.json.

    /path/to/peers/bin/python tests/tools/make_row_goldens.py    # by hand, with a Python that has transformers and trl

Fails if a real template that TRL carries gives another text here than there.
"""

import json
import sys
import tempfile
from pathlib import Path

import trl
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import chat_template_utils

HERE = Path(__file__).resolve().parent.parent  # tests/, where row_cases.py and goldens/ are
sys.path[:0] = [str(HERE), str(HERE.parent)]
import row_cases as cases  # noqa: E402
import tiny  # noqa: E402

import data  # noqa: E402


class FixedDate(cases.datetime):
    """The clock of transformers' templates."""

    @classmethod
    def now(cls, tz=None):
        return cases.NOW


def renderings(tokenizer, messages: list[dict]) -> dict | str:
    """The whole text and its ids, and the texts before and after every assistant turn; or the template's refusal."""
    show = lambda part, **settings: tokenizer.apply_chat_template(part, tokenize=False, **settings)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        pairs = [[show(messages[:i], add_generation_prompt=True), show(messages[: i + 1])] for i in turns]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        return {"text": show(messages), "ids": ids, "turns": pairs}
    except Exception as error:
        return str(error)


def template_goldens(folder: Path) -> dict:
    """By template and conversation."""
    goldens = {}
    for name in cases.TEMPLATES:
        tokenizer = AutoTokenizer.from_pretrained(cases.template_folder(folder / name, name))
        goldens[name] = {
            which: renderings(tokenizer, cases.messages_of(which)) for which in cases.CONVERSATIONS
        }
    return goldens


def tokenizer_goldens(folder: Path) -> dict:
    """By folder: the ids of every hard text with and without special tokens, eos and bos."""
    goldens = {}
    for name, make in cases.TOKENIZERS.items():
        make(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        ids = [
            [tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True)]
            for text in cases.HARD_TEXTS
        ]
        goldens[name] = {"ids": ids, "eos": [tokenizer.eos_token, tokenizer.eos_token_id]}
        goldens[name]["bos"] = [tokenizer.bos_token, tokenizer.bos_token_id]
    return goldens


def trl_goldens(folder: Path) -> dict:
    """A row of two lists of messages as TRL renders it: what it asks, and what is learned."""
    tokenizer = AutoTokenizer.from_pretrained(cases.template_folder(folder / "trl", "zephyr"))
    return trl.apply_chat_template(cases.TWO_LISTS, tokenizer)


def stop_goldens(folder: Path) -> dict:
    """By case: the ids at which transformers' generate stops."""
    goldens = {}
    for i, (name, (generation, config)) in enumerate(cases.STOPS.items()):
        place = folder / f"stops{i}"
        cases.write(
            place,
            config={"model_type": "llama"} | config,
            **({"generation_config": generation} if generation else {}),
        )
        if generation is None:
            eos = config["eos_token_id"]
        else:
            eos = GenerationConfig.from_pretrained(place).eos_token_id
        goldens[name] = eos
    return goldens


def check_real_templates(folder: Path) -> None:
    """Every chat template in TRL's package gives the same text here and in transformers, or is refused."""
    tiny.save_tokenizer(folder, "llama3")
    theirs = AutoTokenizer.from_pretrained(folder)
    names = {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token}
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        theirs.chat_template = path.read_text()
        ours = data.ModelTemplate(theirs.chat_template, names, path.name, cases.NOW)
        said = []
        for which in cases.CONVERSATIONS:
            golden = renderings(theirs, cases.messages_of(which))
            try:
                turns = [
                    data.Turn(m["role"], m["content"], m["role"] == "assistant")
                    for m in cases.messages_of(which)
                ]
                pieces = ours.pieces(turns)
            except data.RowError as error:
                said.append(which)
                known = ("not go on", "anew", "as it is")
                assert isinstance(golden, str) or any(text in str(error) for text in known), (path, error)
                continue
            assert "".join(text for text, _ in pieces) == golden["text"], (path.name, which)
            answers = [after.removeprefix(before).rstrip() for before, after in golden["turns"]]
            assert [text for text, is_response in pieces if is_response] == answers, (path.name, which)
        print(path.name, "equal", f"(refused: {', '.join(said)})" if said else "")


if __name__ == "__main__":
    chat_template_utils.datetime = FixedDate
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_real_templates(folder / "real")
        goldens = {
            "templates": template_goldens(folder),
            "tokenizers": tokenizer_goldens(folder),
            "stops": stop_goldens(folder),
        }
        goldens["trl"] = trl_goldens(folder)
    (HERE / "goldens" / "rows.json").write_text(json.dumps(goldens, ensure_ascii=False) + "\n")
