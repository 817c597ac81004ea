"""The public benchmarks, example by example, against what lm-evaluation-harness 0.4.13 gives (stored; not imported)."""

import json
import math
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from rows import IFEVAL, ROWS, TRUTHFULQA_PROMPT

from data import Tokenizer
import eval as evaluation
import get_data
from eval import IFEVAL as CHECKERS
from eval import (
    SUBTASKS,
    TASKS,
    Answer,
    encode_pair,
    evaluate,
    expand_tasks,
    f1_score,
    follows,
    primary_metrics,
    ifeval_score,
)
from eval import prepare, requests_of, summarise, task_rows, trimmed_replies, words_of
from model import load_model

NAMES = (
    "arc_challenge",
    "arithmetic",
    "asdiv",
    "boolq",
    "lambada",
    "logiqa",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
)


def compare_with_golden(golden: dict, model, tokenizer, data_dir) -> None:
    """Log-likelihoods to 1e-3 of their size; greedy flags, predictions and metrics exactly; token counts too."""
    samples = golden["samples"]
    names = sorted({sample["task"] for sample in samples})
    wanted = {(sample["task"], sample["doc"]): sample for sample in samples}
    per_task = len(samples) // len(names)
    _, ours = evaluate(model, tokenizer, prepare(names, tokenizer, data_dir, limit=per_task))
    assert len(ours) == len(samples)
    for name in names:
        rows = task_rows(name, Path(data_dir))[:per_task]
        for row, document in zip(rows, [d for d in ours if d["task"] == name]):
            sample = (
                wanted[name, row["_doc"]] if (name, row["_doc"]) in wanted else wanted[name, rows.index(row)]
            )
            pairs = [
                encode_pair(tokenizer, r.context, r.continuation)
                for r in requests_of(TASKS[name], row, tokenizer)
            ]
            assert [len(ids) for _, ids in pairs] == sample["continuation_tokens"]
            assert {len(ids) for ids, _ in pairs} == {sample["context_tokens"]}
            assert document["loglikelihoods"] == pytest.approx(sample["loglikelihoods"], rel=1e-3)
            assert document["is_greedy"] == sample["is_greedy"]
            if "predicted" in sample:
                assert document["prediction"] == sample["predicted"]
            for metric in ("acc", "acc_norm"):
                if metric in sample:
                    assert document["metrics"][metric] == pytest.approx(sample[metric], rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_tiny_llama2_goldens(shared, name):
    """A model whose tokenizer puts a bos, with 128 positions: bos handling and truncation from the left."""
    path = shared / "data" / "goldens" / f"tiny_llama2_{name}.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} among the goldens")
    folder = shared / "data" / "checkpoints" / "tiny_llama2"
    compare_with_golden(
        json.loads(path.read_text()), load_model(folder), Tokenizer(folder), shared / "data" / "benchmarks"
    )


@pytest.fixture(scope="module")
def smollm2():
    folder = os.environ.get("SMOLLM2")
    if not folder:
        pytest.skip("set SMOLLM2 to a folder made by shared/tools/get_smollm2.py (1 min a task)")
    return load_model(folder), Tokenizer(folder)


@pytest.mark.parametrize("name", NAMES)
def test_smollm2_goldens(shared, smollm2, name):
    golden = json.loads((shared / "data" / "goldens" / f"smollm2_{name}.json").read_text())
    compare_with_golden(golden, *smollm2, shared / "data" / "benchmarks")


def test_ifeval_scoring_is_lm_evals(shared):
    """Canned replies, every checker that needs no package: strict and loose, instruction by instruction."""
    golden = json.loads((shared / "data" / "goldens" / "ifeval_checks.json").read_text())
    rows = [
        json.loads(line)
        for line in (shared / "data" / "benchmarks" / "ifeval.jsonl").read_text().splitlines()
    ]
    seen: dict = {}
    for sample in golden["samples"]:
        row, reply = rows[sample["row"]], sample["reply"]
        if reply == "built":
            text = seen[sample["row"]] = sample["text"]
        elif reply == "wrapped":
            text = "Sure! Here it is:\n" + seen[sample["row"]] + "\nHope this helps."
        else:
            text = golden["generic_replies"][reply]
        metrics = ifeval_score(row, [Answer(text=text)])["metrics"]
        assert metrics["inst_level_strict_acc"] == sample["strict"], (row["instruction_id_list"], text)
        assert metrics["inst_level_loose_acc"] == sample["loose"], (row["instruction_id_list"], text)


def test_tydiqa_scoring_is_squads(shared):
    golden = json.loads((shared / "data" / "goldens" / "tydiqa_scores.json").read_text())
    path = shared / "data" / "benchmarks" / "tydiqa.jsonl"
    rows = {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    metrics, languages = [], []
    for sample in golden["samples"]:
        row = rows[sample["id"]]
        scored = TASKS["tydiqa"].score(row, [Answer(text=sample["prediction"])])["metrics"]
        assert scored["f1"] == pytest.approx(sample["squad"]["f1"])
        assert scored["exact_match"] == sample["squad"]["exact_match"]
        metrics.append(scored)
        languages.append(TASKS["tydiqa"].group(row))
    summary, stored = summarise(metrics, languages), golden["aggregate_percent"]["squad"]
    assert 100 * summary["f1"] == pytest.approx(stored["average"]["f1"])
    for name in set(languages):
        own = summarise([m for m, language in zip(metrics, languages) if language == name])
        assert 100 * own["f1"] == pytest.approx(stored[name]["f1"])


# ------------------------------------- without shared/: documents of our own, and what lm-eval gives for them on tiny.py's model

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "lm_eval.json").read_text())


def write(folder: Path, rows: dict) -> Path:
    for name, content in rows.items():
        (folder / name).write_text(tiny.jsonl(content), encoding="utf-8")
    (folder / "truthfulqa_prompt.txt").write_text(TRUTHFULQA_PROMPT, encoding="utf-8")
    return folder


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_requests_are_lm_evals(tmp_path, batch_tokens):
    """Eight tasks: log-likelihoods, greedy flags, metrics, aggregates; stored by make_lm_eval_goldens.py."""
    model = load_model(tiny.make_checkpoint(tmp_path / "m", "llama2"))
    names = list(GOLDENS["requests"])
    tokenizer = Tokenizer(tmp_path / "m")
    results, samples = evaluate(
        model, tokenizer, prepare(names, tokenizer, write(tmp_path, ROWS)), evaluation.Budget(batch_tokens)
    )
    for name in names:
        golden = GOLDENS["requests"][name]
        documents = [sample for sample in samples if sample["task"] == name]
        for document, expected in zip(documents, golden["documents"], strict=True):
            assert document["loglikelihoods"] == pytest.approx(expected["loglikelihoods"], rel=1e-3)
            for metric in ("acc", "acc_norm"):
                if metric in expected:
                    assert document["metrics"][metric] == pytest.approx(expected[metric], rel=1e-3)
            assert document["is_greedy"] == expected["greedy"]
        for metric, value in golden["aggregate"].items():
            assert results[name][metric] == pytest.approx(value, rel=1e-3)


def test_ifeval_verdicts_are_lm_evals():
    replies = [(ids, arguments, reply) for ids, arguments, said in IFEVAL for reply in said]
    for (ids, arguments, reply), (strict, loose) in zip(replies, GOLDENS["ifeval"], strict=True):
        metrics = ifeval_score({"instruction_id_list": ids, "kwargs": arguments}, [Answer(text=reply)])[
            "metrics"
        ]
        assert (metrics["inst_level_strict_acc"], metrics["inst_level_loose_acc"]) == (strict, loose), (
            ids,
            reply,
        )


def test_prompts_to_the_byte(tmp_path):
    tiny.save_tokenizer(tmp_path, "qwen2")
    tokenizer, folder = Tokenizer(tmp_path), write(tmp_path, ROWS)

    def asked(name):
        row = task_rows(name, folder)[0]
        return [(r.context, r.continuation) for r in requests_of(TASKS[name], row, tokenizer)]

    passage = "River -- The river is long. It comes from the hills.\nQuestion: is the river long?\nAnswer:"
    assert asked("boolq") == [(passage, " no"), (passage, " yes")]
    assert asked("logiqa")[1] == (
        "Passage: All foxes are quick. This is a fox.\nQuestion: What follows?\nChoices:\nA. It is slow\n"
        "B. It is quick, and brown\nC. It is a dog\nD. Nothing\nAnswer:",
        " It is quick, and brown",
    )
    assert asked("arc_challenge")[2] == ("Question: Which thing is long?\nAnswer:", " 42")
    assert asked("truthfulqa_mc1")[0][0] == TRUTHFULQA_PROMPT + "\n\nQ: Why is the river so long?\nA:"
    assert asked("lambada") == [("The quick brown fox jumps over the lazy", " dog")]
    assert asked("asdiv") == [
        ("There are two dogs and three foxes.\nQuestion:How many are there?\nAnswer:", "5")
    ]
    assert asked("arithmetic_2da") == [("Question: What is 12 plus 30?\nAnswer:", " 42")]


def test_scores_by_hand():
    row = {"choices": {"text": ["ab", "abcdef"], "label": ["A", "B"]}, "answerKey": "B", "question": "?"}
    scored = TASKS["arc_challenge"].score(row, [Answer(-2.0), Answer(-3.0)])
    assert scored["prediction"] == 0 and scored["metrics"] == {"acc": 0.0, "acc_norm": 1.0}
    assert (
        TASKS["arc_challenge"].score(row, [Answer(-3.0), Answer(-3.0)])["prediction"] == 0
    )  # the first wins a tie
    row = {"mc2_targets": {"choices": ["a", "b", "c"], "labels": [1, 0, 1]}}
    scored = TASKS["truthfulqa_mc2"].score(
        row, [Answer(math.log(0.2)), Answer(math.log(0.1)), Answer(math.log(0.1))]
    )
    assert scored["metrics"]["acc"] == pytest.approx(0.75)
    assert summarise([{"perplexity": -1.0}, {"perplexity": -3.0}])["perplexity"] == pytest.approx(math.exp(2))
    assert f1_score("The cat", "cat") == 1 and words_of("An (odd) a-b!") == ["odd", "ab"]


def test_a_collapsed_model_still_gets_figures():
    """Ascent without bound can drive log-likelihoods below what exp() takes; that is a result, not a crash."""
    row = {"mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]}}
    scored = TASKS["truthfulqa_mc2"].score(row, [Answer(-2000.0), Answer(-1999.0)])
    assert scored["metrics"]["acc"] == pytest.approx(1 / (1 + math.e)) and scored["prediction"] == 1
    assert summarise([{"perplexity": -5000.0}])["perplexity"] == math.inf


def test_arithmetic_counts_once_in_an_average():
    results = {name: {"acc": 1.0, "acc_stderr": 0.0, "n": 1} for name in SUBTASKS} | {
        "boolq": {"acc": 0.0, "acc_stderr": 0.0}
    }
    assert primary_metrics(results) == {"boolq": 0.0, "arithmetic": 100.0}


def test_ifeval_pools_instructions_and_leaves_out_what_it_cannot_check(monkeypatch):
    monkeypatch.setattr(
        evaluation, "can_check", lambda name: not name.startswith("language:")
    )  # as without langdetect
    names = ["punctuation:no_comma", "startend:quotation"]
    documents = [
        ifeval_score({"instruction_id_list": names, "kwargs": [{}, {}]}, [Answer(text='"so it is"')]),
        ifeval_score(
            {"instruction_id_list": names[:1], "kwargs": [{"relation": None}]}, [Answer(text="a, b\nc")]
        ),
        ifeval_score(
            {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]},
            [Answer(text="x")],
        ),
    ]
    summary = summarise([document["metrics"] for document in documents])
    assert (
        summary["inst_level_strict_acc"] == pytest.approx(2 / 3) and summary["prompt_level_strict_acc"] == 0.5
    )
    assert summary["inst_level_loose_acc"] == 1.0  # without the first line there is no comma
    assert documents[2]["not_scored"] == ["language:response_language"]
    assert (
        primary_metrics({"ifeval": summarise([{}]) | {"n": 1, "not_scored": 1}}) == {}
    )  # nothing could be scored
    assert not follows(" \n", "punctuation:no_comma", {}) and len(CHECKERS) == 25


@pytest.mark.parametrize(
    "reply, right",
    [
        ("one******two", True),
        ("******one******two******\n", True),
        ("one******one", False),
        ("one******two******three", False),
        ("one****** ******two", False),
        ("one", False),
    ],
)
def test_two_different_responses(reply, right):
    """IFEval's combination:two_responses (lm-eval 0.4.13, ifeval/instructions.py): blank ends are dropped, no middle."""
    assert follows(reply, "combination:two_responses", {}) is right


def test_the_eight_loose_variants():
    """IFEval: the first line, the last or both away, stripped; each with and without asterisks."""
    assert trimmed_replies("Sure:\n *a* \nbye") == [
        "Sure:\n *a* \nbye",
        "*a* \nbye",
        "Sure:\n *a*",
        "*a*",
        "Sure:\n a \nbye",
        "a \nbye",
        "Sure:\n a",
        "a",
    ]


def test_groups_are_averaged_not_documents():
    found = summarise([{"f1": 1.0}, {"f1": 0.0}, {"f1": 0.0}, {"f1": 0.0}], ["a", "b", "b", "b"])
    assert found["f1"] == 0.5 and found["f1_stderr"] == 0
    found = summarise(
        [{"f1": 1.0}, {"f1": 0.0}, {"f1": 1.0}, {"f1": 0.0}, {"f1": 0.0}], ["a", "a", "b", "b", "b"]
    )
    parts = (1 / 2) ** 2, (1 / 3) ** 2  # squared standard errors: of 1, 0 and of 1, 0, 0
    assert found["f1"] == pytest.approx((1 / 2 + 1 / 3) / 2) and found["f1_stderr"] == pytest.approx(
        sum(parts) ** 0.5 / 2
    )


def test_tydiqa_prompt_and_the_cut_passage(tmp_path):
    """A passage of more than 512 tokens is decoded from its first 512, with the bos that encoding put there."""
    tiny.save_tokenizer(tmp_path, "llama3")
    tokenizer = Tokenizer(tmp_path)
    words = {"instruction": "Answer.", "passage": "Passage:", "question": "Question:", "answer": "Answer:"}
    shot = {"id": "english-1", "context": "the dog", "question": "who?", "answers": {"text": ["a fox", "b"]}}
    row = {
        "id": "english-2-0",
        "context": "the river " * 600,
        "question": "why?",
        "answers": {"text": ["hills"]},
        "_source": "x",
    }
    request = requests_of(TASKS["tydiqa"], row | {"_words": words, "_shot": shot}, tokenizer)[0]
    head = "Answer.\n\nPassage: the dog\nQuestion: who?\nAnswer: a fox\n\nPassage: "
    cut = tokenizer.decode(tokenizer.encode([row["context"]])[0][0][:512], skip_special=False)
    assert request.context == head + cut + "\nQuestion: why?\nAnswer:" and cut.startswith("<|begin_of_text|>")
    assert (request.max_new_tokens, request.stop) == (50, "\n")


# ------------------------------------------------------------------------------- from the originals' formats to our rows

TYDIQA_FILE = {
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "c",
                    "qas": [
                        {
                            "id": f"{language}-{i}-0",
                            "question": f"q{i}",
                            "answers": [{"text": "a", "answer_start": 0}],
                        }
                        for language in ("swahili", "arabic")
                        for i in range(102)
                    ],
                }
            ],
        }
    ]
}
ORIGINALS = {  # converter: (original texts, the rows they become)
    "convert_boolq": (
        ['{"question": "is it", "title": "Fox", "answer": true, "passage": "So it is."}\n'],
        [{"question": "is it", "passage": "Fox -- So it is.", "idx": 0, "label": 1}],
    ),
    "convert_logiqa": (
        ["\nb\nOne.Two. \nWhy so?\nA.No.\nB. Yes\nC.x\nD.y\n\na\nThree\nWho?\nA.1\nB.2\nC.3\nD.4\n"],
        [
            {
                "label": "b",
                "context": "One. Two.",
                "question": "Why so?",
                "options": ["No.", "Yes", "x", "y"],
            },
            {"label": "a", "context": "Three", "question": "Who?", "options": ["1", "2", "3", "4"]},
        ],
    ),
    "convert_asdiv": (
        [
            "<M><ProblemSet><Problem><Body>Two dogs.</Body><Question>How many? </Question><Solution-Type>Sum</Solution-Type>"
            "<Answer>2 (dogs)</Answer><Formula>2=2</Formula></Problem></ProblemSet></M>"
        ],
        [
            {
                "body": "Two dogs.",
                "question": "How many? ",
                "solution_type": "Sum",
                "answer": "2 (dogs)",
                "formula": "2=2",
            }
        ],
    ),
    "convert_truthfulqa": (
        ['[{"question": "q", "mc1_targets": {"b": 1, "a": 0}, "mc2_targets": {"x": 0, "w": 1}}]'],
        [
            {
                "question": "q",
                "mc1_targets": {"choices": ["b", "a"], "labels": [1, 0]},
                "mc2_targets": {"choices": ["x", "w"], "labels": [0, 1]},
            }
        ],
    ),
    "convert_truthfulqa_prompt": (
        [
            "doc_to_text: \"\\\n  {% set prompt_qa = '\\\n  Q: Who?\\n\\\n  A: It.\\n\\n\\\n  Q: Why?\\n\\\n  A: So.\\\n  '%}\\\n  {{x}}\""
        ],
        "Q: Who?\nA: It.\n\nQ: Why?\nA: So.",
    ),
    "convert_ifeval": (
        ['{"key": 1, "prompt": "p", "instruction_id_list": ["a"], "kwargs": [{"n": 2, "m": null}]}\n'],
        [{"key": 1, "prompt": "p", "instruction_id_list": ["a"], "kwargs": [{"n": 2}]}],
    ),
    "convert_arc": (
        ['{"rows": [{"row_idx": 0, "row": {"id": "x"}}]}', '{"rows": [{"row_idx": 1, "row": {"id": "y"}}]}'],
        [{"id": "x"}, {"id": "y"}],
    ),
    "convert_tydiqa_templates": (
        [
            'import vllm\nencoding_templates_with_context = {"english": ("I", "P:", "Q:", "A:")}\nraise SystemExit'
        ],
        '{"with_context": {"english": {"instruction": "I", "passage": "P:", "question": "Q:", "answer": "A:"}}}',
    ),
}


@pytest.mark.parametrize("converter", ORIGINALS)
def test_converters(converter):
    originals, rows = ORIGINALS[converter]
    found = getattr(get_data, converter)(*originals)
    assert (
        (json.loads(found) == json.loads(rows)) if converter == "convert_tydiqa_templates" else found == rows
    )


def test_the_tydiqa_draw():
    """Languages sorted, 100 of each, then one training row of each from the same generator."""
    text = json.dumps(TYDIQA_FILE)
    rows = get_data.convert_tydiqa(text)
    assert [row["id"].split("-")[0] for row in rows] == ["arabic"] * 100 + ["swahili"] * 100
    rng = random.Random(42)
    ids = [f"arabic-{i}-0" for i in range(102)]
    assert [row["id"] for row in rows[:100]] == rng.sample(ids, 100)
    rng.sample(ids, 100)
    shots = get_data.convert_tydiqa(text, text)
    assert [row["id"] for row in shots] == [
        rng.sample([f"{name}-{i}-0" for i in range(102)], 1)[0] for name in ("arabic", "swahili")
    ]
    assert shots[0]["answers"] == {"text": ["a"], "answer_start": [0]}


def test_fetching_checks_caches_and_says_what_failed(tmp_path, monkeypatch):
    """Through a stand-in for the network: one fetch, a check of what came, and one line when it is not there."""
    monkeypatch.setattr(get_data.constants, "HF_HOME", str(tmp_path))
    fetched = []
    monkeypatch.setattr(
        get_data, "fetch_text", lambda source: fetched.append(source) or ORIGINALS["convert_arc"][0][0]
    )
    folder = get_data.fetch_benchmarks(["arc_challenge.jsonl"])
    assert (
        json.loads((folder / "arc_challenge.jsonl").read_text().split("\n")[0]) == {"id": "x"}
        and len(fetched) == 12
    )
    get_data.fetch_benchmarks(["arc_challenge.jsonl"])
    assert len(fetched) == 12 and [path.name for path in folder.iterdir()] == ["arc_challenge.jsonl"]
    monkeypatch.setattr(get_data, "fetch_text", lambda source: ORIGINALS["convert_boolq"][0][0])
    with pytest.raises(ValueError, match=r"boolq.jsonl: https://\S+ is not what it was \(sha256"):
        get_data.fetch_benchmarks(["boolq.jsonl"])
    monkeypatch.undo()
    monkeypatch.setattr(get_data.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match="https://nowhere.invalid/x: could not be fetched .HF_HUB_OFFLINE is set.; put the rows",
    ):
        get_data.fetch_text("https://nowhere.invalid/x")


def test_every_task_has_a_public_home_or_is_a_users():
    for name, task in TASKS.items():
        assert name.startswith("demo_") or name in ("mc", "qa") or task.file in get_data.BENCHMARKS, name


@pytest.mark.parametrize(
    "name, row, message",
    [
        (
            "arc_challenge",
            {"question": "?", "choices": {"text": [], "label": []}, "answerKey": "A"},
            "'A' is not in list",
        ),
        (
            "arc_challenge",
            {"question": "?", "choices": {"text": ["x"], "label": ["A"]}},
            "no field 'answerKey'",
        ),
        ("logiqa", {"label": "e", "context": "", "question": "", "options": ["x"]}, "substring not found"),
        ("boolq", {"question": "?", "passage": "x", "label": 2}, "2 choices, the right one is number 2"),
        (
            "truthfulqa_mc2",
            {"question": "?", "mc1_targets": {"choices": []}, "mc2_targets": {"choices": []}},
            "no choices",
        ),
        (
            "truthfulqa_mc2",
            {"question": "?", "mc1_targets": {"choices": []}, "mc2_targets": {"choices": ["x"]}},
            "no field 'labels'",
        ),
        ("qa", {"prompt": "x"}, "no field 'answer'"),
        ("ifeval", {"prompt": "x"}, "no field 'instruction_id_list'"),
        (
            "ifeval",
            {"prompt": "x", "instruction_id_list": ["no:such"], "kwargs": [{}]},
            "unknown instruction id 'no:such'",
        ),
        (
            "ifeval",
            {"prompt": "x", "instruction_id_list": ["keywords:existence"], "kwargs": [{}]},
            ".* argument: 'keywords'",
        ),
        (
            "ifeval",
            {
                "prompt": "x",
                "instruction_id_list": ["keywords:existence"],
                "kwargs": [{"keywords": ["a", 5]}],
            },
            "first argument must be string or compiled pattern",
        ),
        (
            "ifeval",
            {"prompt": "x", "instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["("]}]},
            "missing .*, unterminated subpattern",
        ),
        (
            "ifeval",
            {"prompt": "x", "instruction_id_list": ["punctuation:no_comma"] * 2, "kwargs": [{}]},
            "2 instruction ids, but 1 kw",
        ),
        (
            "ifeval",
            {
                "prompt": "x",
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 5, "relation": "atleast"}],
            },
            "relation 'atleast' is not one of less than, at least",
        ),
        ("asdiv", {"body": "x", "question": "?", "answer": 5}, "'int' object has no attribute 'split'"),
    ],
)
def test_malformed_rows_are_named(tmp_path, name, row, message):
    folder = write(tmp_path, {TASKS[name].file: [row]})
    loaded = task_rows(name, folder)[0]
    tokenizer = SimpleNamespace(template=None)
    with pytest.raises(ValueError, match=f"{TASKS[name].file}:1: {message}"):
        requests_of(TASKS[name], loaded, tokenizer)


def test_groups_of_tasks():
    assert expand_tasks(["truthfulqa", "boolq", "truthfulqa_mc1"]) == [
        "truthfulqa_mc1",
        "truthfulqa_mc2",
        "boolq",
    ]
    assert expand_tasks(["arithmetic"]) == SUBTASKS and len(SUBTASKS) == 10
    assert len(expand_tasks(["paper"])) == 5 and "ifeval" in expand_tasks(["paper-appendix"])
    with pytest.raises(ValueError, match="unknown task boolque"):
        expand_tasks(["boolque"])
