"""The benchmarks: what each asks of a model, and how answers are scored; eval.py puts them to models.

    python eval.py --model M --tasks paper               # any of TASKS and GROUPS, at the end of this file

Prompts, delimiters and metrics are those of lm-evaluation-harness 0.4.13, to the byte, but for tydiqa and the demo's.
get_data.py knows where the rows live, ifeval.py checks IFEval's instructions.
"""

import json, math, os, random, re, string, sys  # noqa: E401
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from data import Tokenizer, read_rows  # noqa: E402
from eval import Answer, Request, Task, first_rank_first, load_tool  # noqa: E402

# ------------------------------------------------------------------------------------- two kinds of task


def choice_task(
    file: str, version: int, ask: Callable[[dict], tuple], normed: bool = False, delimiter: str = " ",
    fewshot: bool = True, **rest: Any,
) -> Task:
    """Multiple choice: ask(row) gives context, choices, place of the right one; delimiter + choice is scored.

    acc takes the greatest log-likelihood, acc_norm that per character of the choice; the first wins a tie.
    """

    def requests(row: dict, _: Tokenizer) -> list[Request]:
        context, choices, gold = ask(row)
        if not choices or not 0 <= gold < len(choices):
            raise ValueError(f"{row['_source']}: {len(choices)} choices, the right one is number {gold}")
        return [Request(row.get("_examples", "") + context, delimiter + choice) for choice in choices]

    def score(row: dict, answers: list[Answer]) -> dict:
        _, choices, gold = ask(row)
        totals = [answer.loglikelihood for answer in answers]
        by_length = [total / max(len(choice), 1) for total, choice in zip(totals, choices)]
        best = totals.index(max(totals))
        metrics = {"acc": float(best == gold)}
        if normed:
            metrics["acc_norm"] = float(by_length.index(max(by_length)) == gold)
        return {"prediction": best, "target": gold, "metrics": metrics}

    def example(row: dict) -> str:
        context, choices, gold = ask(row)
        return f"{context}{delimiter}{choices[gold]}\n\n"

    return Task(file, version, requests, score, example=example if fewshot else None, **rest)


def exact_task(
    file: str, version: int, ask: Callable[[dict], tuple[str, str]], delimiter: str = " ",
    perplexity: bool = False, **rest: Any,
) -> Task:
    """The model must find every token of one target most probable (acc); on request its perplexity, too."""

    def requests(row: dict, _: Tokenizer) -> list[Request]:
        context, target = ask(row)
        return [Request(row.get("_examples", "") + context, target)]

    def score(row: dict, answers: list[Answer]) -> dict:
        metrics = {"acc": float(answers[0].greedy)}
        if perplexity:
            metrics["perplexity"] = answers[0].loglikelihood  # summarise() makes it one
        return {"prediction": answers[0].greedy, "target": ask(row)[1], "metrics": metrics}

    def example(row: dict) -> str:
        return delimiter.join(ask(row)) + "\n\n"

    return Task(file, version, requests, score, example=example, **rest)


# ------------------------------------------------------------------------------------------ benchmarks


def boolq(row: dict) -> tuple:
    """BoolQ: yes or no after a passage that begins with its title."""
    return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], row["label"]


def logiqa(row: dict) -> tuple:
    """LogiQA: the options are listed with letters, and scored as texts."""
    listed = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", row["options"]))
    context = f"Passage: {row['context']}\nQuestion: {row['question']}\nChoices:{listed}\nAnswer:"
    return context, row["options"], "abcd".index(row["label"].strip())


def arc_challenge(row: dict) -> tuple:
    """ARC: three to five choices, whatever their labels."""
    choices = row["choices"]
    return f"Question: {row['question']}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"])


def truthfulqa_mc1(row: dict) -> tuple:
    """TruthfulQA: six fixed pairs in front; the first choice is the true one."""
    return f"{row['_prompt']}\n\nQ: {row['question']}\nA:", row["mc1_targets"]["choices"], 0


def truthfulqa_mc2_requests(row: dict, _: Tokenizer) -> list[Request]:
    """TruthfulQA mc2: every true and false answer."""
    return [Request(truthfulqa_mc1(row)[0], " " + choice) for choice in row["mc2_targets"]["choices"]]


def truthfulqa_mc2_score(row: dict, answers: list[Answer]) -> dict:
    """The share of probability that true answers get."""
    labels = row["mc2_targets"]["labels"]
    best = max(answer.loglikelihood for answer in answers)  # taken off everywhere, so that not all underflow
    probabilities = [math.exp(answer.loglikelihood - best) for answer in answers]
    true = sum(p for p, label in zip(probabilities, labels) if label == 1)
    metrics = {"acc": true / sum(probabilities)}
    return {"prediction": probabilities.index(1.0), "target": labels, "metrics": metrics}


def truthfulqa_rows(rows: list[dict], folder: Path) -> list[dict]:
    """The rows with the fixed pairs beside them."""
    prompt = (folder / "truthfulqa_prompt.txt").read_text(encoding="utf-8")
    return [row | {"_prompt": prompt} for row in rows]


def lambada(row: dict) -> tuple[str, str]:
    """LAMBADA: the last word, split at spaces alone."""
    context, _, word = row["text"].rpartition(" ")
    return context, " " + word


def asdiv(row: dict) -> tuple[str, str]:
    """ASDiv: the number alone, with no space in front."""
    return f"{row['body']}\nQuestion:{row['question']}\nAnswer:", row["answer"].split(" (")[0]


def arithmetic(row: dict) -> tuple[str, str]:
    """Arithmetic: the GPT-3 rows, cleaned as the task does."""
    context = row["context"].strip().replace("\n\n", "\n").replace("Q:", "Question:").replace("A:", "Answer:")
    return context, row["completion"]


def arithmetic_task(name: str) -> Task:
    """One of the ten subtasks, whose rows are in one file."""

    def own_rows(rows: list[dict], _: Path) -> list[dict]:
        return [row for row in rows if row["subtask"] == name]

    return exact_task("arithmetic.jsonl", 2, arithmetic, delimiter="", prepare=own_rows)


def language_of(row: dict) -> str:
    """TydiQA: the first part of a row's id."""
    return row["id"].split("-")[0]


def tydiqa_rows(rows: list[dict], folder: Path) -> list[dict]:
    """Each row with its language's words and demonstration."""
    words = json.loads((folder / "tydiqa_templates.json").read_text(encoding="utf-8"))["with_context"]
    shots = {language_of(row): row for row in read_rows([str(folder / "tydiqa_1shot.jsonl")])}
    return [row | {"_words": words[language_of(row)], "_shot": shots[language_of(row)]} for row in rows]


def tydiqa_requests(row: dict, tokenizer: Tokenizer) -> list[Request]:
    """One demonstration, then the question; passages are cut to 512 tokens (a bos among them stays)."""
    words, shot = row["_words"], row["_shot"]

    def question(of: dict) -> str:
        ids = tokenizer.encode([of["context"]])[0][0]
        passage = of["context"] if len(ids) <= 512 else tokenizer.decode(ids[:512], skip_special=False)
        return f"{words['passage']} {passage}\n{words['question']} {of['question']}\n{words['answer']}"

    prompt = f"{words['instruction']}\n\n{question(shot)} {shot['answers']['text'][0]}\n\n{question(row)}"
    return [Request(prompt, max_new_tokens=50, stop="\n")]


def tydiqa_score(row: dict, answers: list[Answer]) -> dict:
    """SQuAD's F1 and exact match, the best over the answers."""
    reply, right = answers[0].text.strip(), row["answers"]["text"]
    f1 = max(f1_score(reply, answer) for answer in right)
    exact = float(any(words_of(reply) == words_of(answer) for answer in right))
    return {"prediction": reply, "target": right, "metrics": {"f1": f1, "exact_match": exact}}


def words_of(text: str) -> list[str]:
    """Words as SQuAD compares them: lower case, no ASCII punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1_score(prediction: str, answer: str) -> float:
    """Word overlap F1 of SQuAD, 0 to 1; 0 if nothing is shared."""
    found, right = words_of(prediction), words_of(answer)
    shared = sum((Counter(found) & Counter(right)).values())
    return 2 * shared / (len(found) + len(right)) if shared else 0.0


def demo_mc(row: dict) -> tuple:
    """The demo's multiple choice."""
    return row["prompt"] + row["head"], row["choices"], row["choices"].index(row["answer"])


def demo_qa_requests(row: dict, _: Tokenizer) -> list[Request]:
    """The demo's short answers."""
    return [Request(row["prompt"], max_new_tokens=16)]


def demo_qa_score(row: dict, answers: list[Answer]) -> dict:
    """F1; and, for people never seen and a misconceived attribute, whether the popular error is given."""
    reply = answers[0].text
    metrics = {"f1": f1_score(reply, row["answer"])}
    if row["group"] == "unseen, misconceived":
        metrics["popular"] = float(row["popular"] in reply.split())
    return {"prediction": reply, "target": row["answer"], "metrics": metrics}


def ifeval_requests(row: dict, _: Tokenizer) -> list[Request]:
    """IFEval: the prompt as it stands."""
    return [Request(row["prompt"], max_new_tokens=1280)]


def ifeval_score(row: dict, answers: list[Answer]) -> dict:
    """IFEval: which of the row's instructions the reply keeps; the checkers are a file of their own."""
    return load_tool("ifeval").score(row, answers[0].text)


def rows_folder(name: str, task: Task, data_dir: str | os.PathLike | None) -> Path:
    """Where a task's rows are: data_dir, or the cache of public ones, which a node's first rank fetches."""
    if data_dir is not None:
        return Path(data_dir)
    get_data = load_tool("get_data")
    if task.file not in get_data.BENCHMARKS:
        raise ValueError(f"{name}: --data-dir is needed, these rows have no public home")
    return first_rank_first(partial(get_data.fetch_benchmarks, (task.file, *task.beside)))


def task_rows(task: Task, path: Path, limit: int | None, num_fewshot: int) -> list[dict]:
    """The documents of a task, with num_fewshot worked examples each where the task takes any.

    They come from NAME_train.jsonl if it lies beside, else from the evaluated rows, never the row itself:
    drawn as lm-evaluation-harness draws them, by one generator that goes on from row to row.
    """
    rows = [row | {"_doc": i} for i, row in enumerate(read_rows([str(path)]))]
    try:
        pool = rows = task.prepare(rows, path.parent)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: what belongs beside its rows is missing or malformed ({error})") from None
    rows = rows[:limit]
    if not rows:
        raise ValueError(f"{path}: no document to evaluate")
    if not num_fewshot or task.example is None:
        return rows
    train = path.with_name(f"{path.stem}_train.jsonl")
    if train.is_file():
        pool = read_rows([str(train)])
    spare = int(not train.is_file())  # one more is drawn where the row itself may be among them
    if len(pool) < num_fewshot + spare:
        raise ValueError(f"{path}: {num_fewshot} examples asked for, {len(pool) - spare} are there")
    rng = random.Random(1234)
    with_examples = []
    for row in rows:
        drawn = [other for other in rng.sample(pool, num_fewshot + spare) if other is not row][:num_fewshot]
        with_examples.append(row | {"_examples": "".join(map(task.example, drawn))})
    return with_examples


def summarise(metrics: list[dict], groups: list[str] | None = None) -> dict:
    """Mean and standard error of every metric over the documents that have it; lists are pooled.

    With groups (one name per document) the figures are unweighted means over the groups, which stand in
    "by_group". The perplexity of a task is exp of minus the mean log-likelihood.
    """
    if groups is not None:
        return summarise_groups(metrics, groups)
    summary = {}
    for key in dict.fromkeys(key for one in metrics for key in one):
        found = [one[key] for one in metrics if key in one]
        values = [x for value in found for x in (value if isinstance(value, list) else [value])]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
        error = math.sqrt(variance / len(values))
        if key == "perplexity":
            mean = math.exp(-mean) if mean > -700 else math.inf
            error *= mean
        summary |= {key: mean, f"{key}_stderr": error}
    return summary


def summarise_groups(metrics: list[dict], groups: list[str]) -> dict:
    """The unweighted means over groups of documents, and each group's own figures."""
    names = sorted(set(groups))
    parts = {name: summarise([m for m, g in zip(metrics, groups) if g == name]) for name in names}
    summary: dict[str, Any] = {}
    for key in [key for key in parts[names[0]] if not key.endswith("_stderr")]:
        summary[key] = sum(part[key] for part in parts.values()) / len(names)
    for key in list(summary):
        squares = sum(part[f"{key}_stderr"] ** 2 for part in parts.values())
        summary[f"{key}_stderr"] = math.sqrt(squares) / len(names)
    return summary | {"by_group": parts}


def expand_tasks(names: list[str]) -> list[str]:
    """Task names with the groups spelled out; ValueError for a name that is neither."""
    unknown = [name for name in names if name not in TASKS and name not in GROUPS]
    if unknown:
        raise ValueError(f"unknown task {', '.join(unknown)}; known: {', '.join([*TASKS, *GROUPS])}")
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, [name])))


# --------------------------------------------------------------------------------------------- tables

SUBTASKS = [f"arithmetic_{kind}" for kind in "1dc 2da 2ds 2dm 3da 3ds 4da 4ds 5da 5ds".split()]
TRUTHFULQA = {"prepare": truthfulqa_rows, "beside": ("truthfulqa_prompt.txt",)}
TYDIQA_FILES = ("tydiqa_templates.json", "tydiqa_1shot.jsonl")
TASKS = {
    "truthfulqa_mc1": choice_task("truthfulqa.jsonl", 2, truthfulqa_mc1, fewshot=False, **TRUTHFULQA),
    "truthfulqa_mc2": Task("truthfulqa.jsonl", 3, truthfulqa_mc2_requests, truthfulqa_mc2_score,
                           **TRUTHFULQA),
    "boolq": choice_task("boolq.jsonl", 2, boolq),
    "logiqa": choice_task("logiqa.jsonl", 1, logiqa, normed=True),
    "tydiqa": Task("tydiqa.jsonl", 1, tydiqa_requests, tydiqa_score, tydiqa_rows, group=language_of,
                   beside=TYDIQA_FILES),
    "asdiv": exact_task("asdiv.jsonl", 1, asdiv),
    "arc_challenge": choice_task("arc_challenge.jsonl", 1, arc_challenge, normed=True),
    "lambada": exact_task("lambada.jsonl", 1, lambada, perplexity=True, lower_is_better=("perplexity",)),
    "ifeval": Task("ifeval.jsonl", 4, ifeval_requests, ifeval_score),
    "demo_mc": choice_task("demo_mc.jsonl", 1, demo_mc, delimiter=""),
    "demo_qa": Task("demo_qa.jsonl", 1, demo_qa_requests, demo_qa_score, lower_is_better=("popular",)),
    **{name: arithmetic_task(name) for name in SUBTASKS},
}
GROUPS = {
    "truthfulqa": ["truthfulqa_mc1", "truthfulqa_mc2"],
    "arithmetic": SUBTASKS,
    "paper": ["truthfulqa_mc2", "boolq", "logiqa", "tydiqa", "asdiv"],
    "paper-appendix": ["ifeval", "arc_challenge", "lambada", *SUBTASKS],
}
