"""Log-likelihoods and greedy generation, and the tasks that are made of them. Works on any model and adapter.

    python eval.py --model tests/demo_model --tasks demo_mc demo_qa --data-dir runs/demo/world-0
    python eval.py --model M --adapter RUN/forgetting/seed-0 --tasks paper \
                   --output results.json --samples samples.jsonl
    python eval.py --model M --adapter RUN/full/seed-0 RUN/forgetting/seed-0 --prompt "Why is the sky blue?"
    torchrun --nproc_per_node=2 eval.py ...             # documents spread over ranks, the same results

A task is a function from a data row to requests, and one from the answers to figures; TASKS lists them.
Requests with one context share its computation: it runs once, and each continuation goes on from the cache.
Order: requests, log-likelihoods and generation, tasks, evaluation, tables, ranks, command line.
Shapes: T tokens of a pack; D width; V vocabulary; n tokens of continuations.
"""

import argparse, datetime, functools, hashlib, importlib.util, json, math, os, random, re, string, sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data import Tokenizer, check_ids, read_rows, render, split_by_tokens, write_rows, write_text
from lora import load_adapter, remove_lora
from model import DTYPES, Cache, Transformer, checkpoint_folder, head_chunks, load_model, to_device

# --------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Request:
    """Score `continuation` after `context`, or, if it is None, write on from `context` greedily."""

    context: str
    continuation: str | None = None
    max_new_tokens: int = 0
    stop: str | None = None  # generation ends before this text, and at an eos


@dataclass(frozen=True)
class Answer:
    """What a model makes of a request."""

    loglikelihood: float = 0.0  # sum over the continuation's tokens, nats
    greedy: bool = False  # every token was the most probable one
    text: str = ""  # what was written


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of context and continuation, split as lm-evaluation-harness splits them.

    Trailing whitespace of the context moves to the continuation; both together are encoded once, and what
    exceeds the encoded context is the continuation. An empty context becomes the bos token, or the eos.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        ids = tokenizer.encode([continuation], special=False)[0][0]
        return [first], ids[1:] if ids[0] == first else ids
    (whole, _), (context_ids, _) = tokenizer.encode([stripped + continuation, stripped])
    if len(whole) <= len(context_ids):
        raise ValueError(f"continuation {continuation!r} adds no token to its context")
    return context_ids, whole[len(context_ids) :]


def check_length(model: Transformer, continuation: list[int]) -> None:
    """A continuation must fit the model's positions whole: only contexts are cut."""
    limit = model.config.max_position_embeddings
    if len(continuation) > limit:
        length = len(continuation)
        raise ValueError(f"a continuation of {length} tokens exceeds the model's {limit} positions")


# ----------------------------------------------------------------------- log-likelihoods and generation


@torch.inference_mode()
def loglikelihoods(
    model: Transformer, pairs: list[tuple[list[int], list[int]]], batch_tokens: int = 4096,
    bar: tqdm | None = None,
) -> list[Answer]:
    """Log-likelihood and greedy flag of each pair (context ids, continuation ids), neither of them empty.

    An input longer than the model's positions loses tokens from the left. Contexts run packed, each distinct
    one once; then all but the last token of every continuation run on from the cache. Ranks share the work.
    """
    rank, world = rank_and_world()
    limit = model.config.max_position_embeddings
    members: dict[tuple[int, ...], list[int]] = {}  # context: the pairs that begin with it
    for i, (context, continuation) in enumerate(pairs):
        check_length(model, continuation)
        cut = (context + continuation)[-(limit + 1) : -len(continuation)]
        members.setdefault(tuple(cut), []).append(i)
    contexts = list(members)
    sizes = [len(context) + sum(len(pairs[i][1]) - 1 for i in members[context]) for context in contexts]
    results = torch.zeros(len(pairs), 2, dtype=torch.float64, device=model.lm_head.weight.device)
    for group in split_by_tokens(sizes, batch_tokens)[rank::world]:
        packed = [contexts[g] for g in group]
        order = [i for context in packed for i in members[context]]
        counts = [len(members[context]) for context in packed]
        results[order] = _score_pack(model, packed, counts, [pairs[i][1] for i in order])
        if bar is not None:
            bar.update(len(order))
    figures = sum_over_ranks(results).tolist()
    return [Answer(loglikelihood=total, greedy=misses == 0) for total, misses in figures]


def _score_pack(model: Transformer, contexts: list, counts: list[int], continuations: list) -> Tensor:
    """(continuations, 2) float64: log-likelihood, and how many tokens were not the most probable.

    The first counts[0] continuations follow contexts[0], the next counts[1] contexts[1], and so on. All
    indices are made on the CPU, so that a GPU never has to be waited for.
    """
    on_device = functools.partial(to_device, device=model.lm_head.weight.device)
    lengths = [len(ids) for ids in continuations]
    cache = Cache(model, sum(map(len, contexts)) + sum(lengths) - len(lengths))
    hidden, rows = _run(model, cache, contexts, None)
    context_of = np.repeat(np.arange(len(contexts)), counts)  # (continuations,)
    last = hidden[on_device(torch.tensor([int(r[-1]) for r in rows]))]  # (contexts, D)

    # the state before a continuation's first token is its context's last; all but the last token of each
    # continuation run on from there, and give the states before the others
    targets = torch.tensor([token for ids in continuations for token in ids])  # (n,)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # (n,) whose target it is
    first = torch.tensor([0, *lengths[:-1]]).cumsum(0)  # (continuations,)
    later = torch.ones(len(targets), dtype=torch.bool).index_fill_(0, first, False).nonzero().squeeze(1)
    states = hidden.new_empty(len(targets), hidden.shape[1])  # (n, D)
    states[on_device(first)] = last[on_device(torch.from_numpy(context_of))]
    longer = [i for i, length in enumerate(lengths) if length > 1]
    if longer:
        inputs = [continuations[i][:-1] for i in longer]
        states[on_device(later)] = _run(model, cache, inputs, [rows[context_of[i]] for i in longer])[0]

    result = torch.zeros(len(lengths), 2, dtype=torch.float64, device=hidden.device)
    targets, owner = on_device(targets), on_device(owner)
    for part, logprobs, loss in head_chunks(states, model.lm_head.weight, targets):
        result[:, 0].index_add_(0, owner[part], -loss.double())
        result[:, 1].index_add_(0, owner[part], (logprobs.argmax(-1) != targets[part]).double())
    return result


def _run(model: Transformer, cache: Cache, sequences: list, past: list[Tensor] | None) -> tuple[Tensor, list]:
    """Run token lists, each after the cache rows past[i]: hidden states (T, D), the rows each list took."""
    lengths = [len(ids) for ids in sequences]
    tokens = torch.tensor([token for ids in sequences for token in ids])  # (T,)
    rows = torch.arange(cache.used, cache.used + len(tokens)).split(lengths)
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    return model(to_device(tokens, model.lm_head.weight.device), boundaries, cache, past), list(rows)


@torch.inference_mode()
def generate(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int,
    stop: str | None = None, batch_tokens: int = 4096, bar: tqdm | None = None,
) -> list[str]:
    """Greedy continuations of token lists, up to an eos, `stop` or max_new_tokens, without special tokens.

    Prompts are cut from the left to leave room for the new tokens. Many are in flight, each with its length.
    """
    rank, world = rank_and_world()
    positions = model.config.max_position_embeddings
    room = positions - max_new_tokens
    if room < 1:
        raise ValueError(f"{max_new_tokens} new tokens leave no room in {positions} positions")
    prompts = [ids[-room:] for ids in prompts]
    written = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=model.lm_head.weight.device)
    sizes = [len(ids) + max_new_tokens for ids in prompts]
    for group in split_by_tokens(sizes, batch_tokens)[rank::world]:
        replies = _generate_pack(model, tokenizer, [prompts[i] for i in group], max_new_tokens, stop)
        for i, ids in zip(group, replies):
            written[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64) + 1  # 0 stays "nothing written"
        if bar is not None:
            bar.update(len(group))
    texts = [tokenizer.decode([t - 1 for t in ids if t]) for ids in sum_over_ranks(written).tolist()]
    return [text.split(stop)[0] if stop else text for text in texts]


def _generate_pack(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int, stop: str | None
) -> list[list[int]]:
    """The new token ids of each prompt."""
    cache, head = Cache(model, sum(len(ids) + max_new_tokens for ids in prompts)), model.lm_head.weight
    written: list[list[int]] = [[] for _ in prompts]
    active, inputs, past = list(range(len(prompts))), prompts, None
    for _ in range(max_new_tokens):
        hidden, rows = _run(model, cache, inputs, past)
        past = rows if past is None else [torch.cat(pair) for pair in zip(past, rows)]
        ends = torch.tensor([len(ids) for ids in inputs]).cumsum(0) - 1
        last = hidden[to_device(ends, hidden.device)]  # (active, D)
        no_target = torch.zeros(len(last), dtype=torch.int64, device=last.device)  # logits alone count
        best = [logprobs.argmax(-1) for _, logprobs, _ in head_chunks(last, head, no_target)]
        unfinished = []
        for place, (i, token) in enumerate(zip(active, torch.cat(best).tolist())):  # the one wait for a GPU
            if token == tokenizer.eos_id:
                continue
            written[i].append(token)
            if not stop or stop not in tokenizer.decode(written[i]):
                unfinished.append(place)
        active, past = [active[p] for p in unfinished], [past[p] for p in unfinished]
        inputs = [written[i][-1:] for i in active]
        if not active:
            break
    return written


# ------------------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class Task:
    """How a row becomes requests, and how the answers become figures.

    requests(row, tokenizer) lists what to ask; score(row, answers) gives prediction, target and metrics of
    the document (a metric may be a list: pooled over all documents). prepare(rows, folder) picks the task's
    rows of the file and puts beside them what else it needs. example(row) is the row as a worked example, for
    --num-fewshot.
    """

    file: str
    version: int  # of the protocol: lm-evaluation-harness 0.4.13's number for the task
    requests: Callable[[dict, Tokenizer], list[Request]]
    score: Callable[[dict, list[Answer]], dict]
    prepare: Callable[[list[dict], Path], list[dict]] = lambda rows, folder: rows
    example: Callable[[dict], str] | None = None
    group: Callable[[dict], str] | None = None  # figures are means over the groups' means
    beside: tuple[str, ...] = ()  # further files that prepare() reads
    lower_is_better: tuple[str, ...] = ()  # metrics


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


# ------------------------------------------------------------------------------------------- evaluation

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


def expand_tasks(names: list[str]) -> list[str]:
    """Task names with the groups spelled out; ValueError for a name that is neither."""
    unknown = [name for name in names if name not in TASKS and name not in GROUPS]
    if unknown:
        raise ValueError(f"unknown task {', '.join(unknown)}; known: {', '.join([*TASKS, *GROUPS])}")
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, [name])))


@dataclass(frozen=True)
class Documents:
    """A task's rows with their requests, made once and put to any number of models."""

    name: str
    rows: list[dict]
    requests: list[list[Request]]
    identity: dict  # what results depend on besides the model: version, sha256 of rows, limit, num_fewshot


def prepare(
    tasks: list[str], tokenizer: Tokenizer, data_dir: str | os.PathLike | None, limit: int | None = None,
    num_fewshot: int = 0,
) -> list[Documents]:
    """The documents of tasks, or groups of them; all that can be wrong about the rows is found here."""
    documents = []
    for name in expand_tasks(tasks):
        task, folder = TASKS[name], rows_folder(name, data_dir)
        rows = task_rows(task, folder / task.file, limit, num_fewshot)
        requests = [requests_of(task, row, tokenizer) for row in rows]
        contents = [(folder / file).read_bytes() for file in (task.file, *task.beside)]
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
        identity = {"version": task.version, "data_sha256": digests[0], "beside_sha256": digests[1:],
                    "limit": limit, "num_fewshot": num_fewshot}
        documents.append(Documents(name, rows, requests, identity))
    return documents


def rows_folder(name: str, data_dir: str | os.PathLike | None) -> Path:
    """Where a task's rows are: data_dir, or the cache of public ones, which a node's first rank fetches."""
    if data_dir is not None:
        return Path(data_dir)
    get_data = load_tool("get_data")
    if TASKS[name].file not in get_data.BENCHMARKS:
        raise ValueError(f"{name}: --data-dir is needed, these rows have no public home")
    files = (TASKS[name].file, *TASKS[name].beside)
    return first_rank_first(functools.partial(get_data.fetch_benchmarks, files))


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


def requests_of(task: Task, row: dict, tokenizer: Tokenizer) -> list[Request]:
    """A row's requests; a row that lacks what the task needs is a ValueError that names it."""
    try:
        requests = task.requests(row, tokenizer)
        if not requests:
            raise ValueError("no choices")
        task.score(row, [Answer()] * len(requests))  # a dry run: what scoring needs must be there
    except KeyError as error:
        raise ValueError(f"{row['_source']}: no field {error}") from None
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        named = str(error).startswith(row["_source"])
        raise ValueError(str(error) if named else f"{row['_source']}: {error}") from None
    return requests


def evaluate(
    model: Transformer, tokenizer: Tokenizer, documents: list[Documents], batch_tokens: int = 4096
) -> tuple[dict[str, dict], list[dict]]:
    """Put prepared tasks to a model; (results, samples).

    results[task] has each metric's mean over the documents that have it, its standard error (sample standard
    deviation over sqrt(n)) as METRIC_stderr, n, and the task's identity. samples has one object per document.
    """
    model.eval()
    results: dict[str, dict] = {}
    samples: list[dict] = []
    for prepared in documents:
        name, task = prepared.name, TASKS[prepared.name]
        answers = answer_requests(model, tokenizer, prepared, batch_tokens)
        scored = []
        for row, requests, replies in zip(prepared.rows, prepared.requests, answers):
            shown: dict[str, Any] = {"text": replies[0].text}
            if requests[0].continuation is not None:
                shown = {"loglikelihoods": [reply.loglikelihood for reply in replies],
                         "is_greedy": [reply.greedy for reply in replies]}
            scored.append({"task": name, "doc_id": row["_doc"]} | shown | task.score(row, replies))
        groups = [task.group(row) for row in prepared.rows] if task.group else None
        results[name] = summarise([document["metrics"] for document in scored], groups)
        results[name] |= {"n": len(prepared.rows)} | prepared.identity
        not_scored = sum("not_scored" in document for document in scored)
        if not_scored:
            results[name]["not_scored"] = not_scored
        samples += scored
    return results, samples


def answer_requests(
    model: Transformer, tokenizer: Tokenizer, documents: Documents, batch_tokens: int
) -> list[list[Answer]]:
    """The answers to a task's requests, document by document, under one progress bar."""
    requests = [request for group in documents.requests for request in group]
    sources = [row["_source"] for row, group in zip(documents.rows, documents.requests) for _ in group]
    answers: list[Answer] = [Answer()] * len(requests)
    scored, pairs = [], []
    written: dict[tuple, list[int]] = {}  # (max_new_tokens, stop): the requests to write on from
    for i, request in enumerate(requests):
        if request.continuation is None:
            written.setdefault((request.max_new_tokens, request.stop), []).append(i)
            continue
        try:
            pair = encode_pair(tokenizer, request.context, request.continuation)
            check_length(model, pair[1])
        except ValueError as error:
            raise ValueError(f"{sources[i]}: {error}") from None
        check_ids(pair[0] + pair[1], model.config.vocab_size, model.folder)
        scored.append(i)
        pairs.append(pair)
    with progress(documents.name, len(requests), "request") as bar:
        for i, answer in zip(scored, loglikelihoods(model, pairs, batch_tokens, bar)):
            answers[i] = answer
        for (max_new_tokens, stop), group in written.items():
            prompts = [ids for ids, _ in tokenizer.encode([requests[i].context for i in group])]
            check_ids([token for ids in prompts for token in ids], model.config.vocab_size, model.folder)
            texts = generate(model, tokenizer, prompts, max_new_tokens, stop, batch_tokens, bar)
            for i, text in zip(group, texts):
                answers[i] = Answer(text=text)
    ends = np.cumsum([len(group) for group in documents.requests]).tolist()
    return [answers[start:end] for start, end in zip([0, *ends], ends)]


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


# ----------------------------------------------------------------------------------------------- tables


def metrics_of(result: dict) -> list[str]:
    """The metrics of a task's result; the first stands for the task."""
    return [key for key in result if f"{key}_stderr" in result]


def headlines(results: dict[str, dict]) -> dict[str, float]:
    """What stands for each task, in percent: its first metric; arithmetic is one, the mean of ten."""
    percents = {}
    for task, result in results.items():
        for first in metrics_of(result)[:1]:  # none, if no document could be scored
            percents[task] = 100 * result[first]
    sums = [percents.pop(task) for task in SUBTASKS if task in percents]
    return percents | ({"arithmetic": sum(sums) / len(sums)} if sums else {})


def spread(values: list[float], digits: int = 1, sign: str = "") -> str:
    """mean +- sample standard deviation; the mean alone of a single value."""
    deviation = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{deviation}"


def table(header: list[str], rows: list[list[str]], width: int = 100) -> str:
    """A Markdown table that also reads well on a screen.

    Columns beyond `width` characters go into further tables below, which begin with the first column again.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    blocks, room = [[0]], width - widths[0] - 4
    for i in range(1, len(header)):
        if widths[i] + 3 > room and len(blocks[-1]) > 1:
            blocks.append([0])
            room = width - widths[0] - 4
        blocks[-1].append(i)
        room -= widths[i] + 3
    ruled = [header, ["-" * w for w in widths], *rows]
    return "\n\n".join(
        "\n".join("| " + " | ".join(cells[i].ljust(widths[i]) for i in block) + " |" for cells in ruled)
        for block in blocks
    )


def show(results: dict[str, dict]) -> str:
    """A table for the screen: every metric, and the average of what stands for the tasks."""
    rows = []
    for task, result in results.items():
        for metric in metrics_of(result):
            cells = [f"{result[metric]:.4f}", f"{result[metric + '_stderr']:.4f}", str(result["n"])]
            rows.append([task, metric, *cells])
        if "not_scored" in result:
            what = "not scored (a checker's package is missing)"
            rows.append([task, what, "", "", str(result["not_scored"])])
        if "by_group" in result:
            rows.append([task, f"unweighted mean over {', '.join(result['by_group'])}", "", "", ""])
    percents = headlines(results).values()
    average = sum(percents) / max(len(percents), 1)
    rows.append(["average", "of the tasks' first metrics, percent", f"{average:.2f}", "", ""])
    return table(["task", "metric", "value", "stderr", "n"], rows)


# ------------------------------------------------------------------------------------------------ ranks


def start_ranks(device: str) -> str:
    """Join the process group when started by torchrun; this rank's device ("cuda" becomes "cuda:0", ...)."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device} is not supported: cpu or cuda (see CUDA_VISIBLE_DEVICES)")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device here")
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    settings: dict[str, Any] = {"backend": "gloo", "timeout": datetime.timedelta(hours=2)}  # for exports
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        settings |= {"backend": "nccl", "device_id": torch.device(device)}
    try:
        dist.init_process_group(**settings)
    except dist.DistError as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = f"{where} (MASTER_ADDR:MASTER_PORT; is the port in use?): {str(error).splitlines()[0]}"
        raise ValueError(f"the ranks cannot meet at {reason}") from None
    return device


def rank_and_world() -> tuple[int, int]:
    """This process's place among the ranks, and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The elementwise sum of x over all ranks, on every rank, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def wait_for_all() -> None:
    """No rank goes on before every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def first_rank_first(work: Callable[[], Any]) -> Any:
    """What work() returns, on every rank; a node's first rank fetches, the others find what it fetched."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = work() if first else None
    wait_for_all()
    return result if first else work()


def progress(label: str, total: int, unit: str, done: int = 0, keep: bool = False) -> tqdm:
    """A bar on rank 0 that fits its terminal; where there is none, a line of text every half minute."""
    shape, often = "{desc} {bar:6} {n_fmt}/{total_fmt} {remaining} {postfix}", {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        shape = "{desc} {percentage:.0f} % of {total_fmt} {unit}s, {remaining} left {postfix}\n"
        often = {"mininterval": 30, "delay": 30}
    return tqdm(desc=label, total=total, unit=unit, initial=done, unit_scale=total > 9999, bar_format=shape,
                leave=keep, disable=rank_and_world()[0] > 0, **often)


def say(text: str) -> None:
    """Print on rank 0."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)


# ----------------------------------------------------------------------------------------- command line


@functools.cache
def load_tool(name: str) -> ModuleType:
    """A program of tests/tools/ as a module: get_data knows public rows' homes, ifeval scores, demo runs."""
    path = Path(__file__).parent / "tests" / "tools" / f"{name}.py"
    if not path.is_file():
        raise ValueError(f"{path} is not there: only local rows and models can be used without it")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def local_files(entries: list[str]) -> list[str]:
    """Entries of --data as local files, with their :count; public ones are fetched, once a node.

    An entry is a path, a public set's name, or hf://datasets/owner/name/file; a local file wins over a name.
    """
    found = []
    for entry in entries:
        name, colon, count = entry.rpartition(":")
        if not count.isdigit():
            name, colon, count = entry, "", ""
        if not os.path.exists(name) and (name.startswith("hf://") or "/" not in name):
            get_data = load_tool("get_data")
            if get_data.is_public(name):
                name = str(first_rank_first(functools.partial(get_data.fetch_rows, name)))
        found.append(name + colon + count)
    return found


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose flags cannot be shortened."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Exit code 2, without the usage that argparse prints first."""
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def within(
    kind: type, low: float, high: float = math.inf, above: bool = False, below: bool = False
) -> Callable[[str], Any]:
    """An argparse type: a finite number from low to high; `above`: more than low, `below`: less than high."""
    allowed = f"{'more than' if above else 'from'} {low:g}"
    if high < math.inf:
        allowed += f" {'to below' if below else 'to'} {high:g}"
    allowed += ", a whole number" if kind is int else ", finite"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        large_enough = value > low if above else value >= low
        small_enough = value < high if below or high == math.inf else value <= high
        if not (large_enough and small_enough):  # nan is neither
            raise argparse.ArgumentTypeError(f"{text} is not allowed: {allowed}")
        return value

    return parse


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises ValueError, before any work, for what cannot be meant."""
    parser = Parser(description=__doc__)
    add, dtype = parser.add_argument, "bfloat16" if torch.cuda.is_available() else "float32"
    add("--model", required=True, help="checkpoint folder or Hub id, with an optional @revision")
    add("--adapter", nargs="+", default=[], help="folder of a PEFT-layout adapter; any number with --prompt")
    add("--tasks", nargs="+", default=[], help=f"any of {', '.join([*TASKS, *GROUPS])}")
    add("--prompt", help="instead of tasks: answer this, without and with each adapter; -: lines of stdin")
    add("--data-dir", help="folder of the row files; without it they are fetched from their public homes")
    add("--limit", type=within(int, 1), help="only the first LIMIT documents of each task")
    add("--num-fewshot", type=within(int, 0), default=0, help="worked examples a question [0]")
    add("--output", help="write the results here (.json)")
    add("--samples", help="write one line per document here (.jsonl)")
    add("--dtype", choices=sorted(DTYPES), default=dtype, help=f"of the weights [{dtype}]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--batch-tokens", type=within(int, 1), default=4096, help="tokens of a packed forward pass [4096]")
    arguments = parser.parse_args()
    if bool(arguments.tasks) == (arguments.prompt is not None):
        raise ValueError("either --tasks or --prompt is needed")
    if arguments.tasks and len(arguments.adapter) > 1:
        raise ValueError(f"--tasks take one --adapter at a time, not {len(arguments.adapter)}")
    expand_tasks(arguments.tasks)
    for path in filter(None, (arguments.output, arguments.samples)):
        below_a_file = any(parent.is_file() for parent in Path(path).absolute().parents)
        if below_a_file or Path(path).is_dir():
            flag = "output" if path == arguments.output else "samples"
            raise ValueError(f"--{flag} {path} is not allowed: the path of a file, in a folder")
    return arguments


def answer_prompts(model: Transformer, tokenizer: Tokenizer, prompts: list[str], adapters: list[str]) -> None:
    """Print greedy answers of the model alone and of each adapter, to prompts in the template of training."""
    asked = []
    for prompt in prompts:
        pieces = render({"instruction": prompt, "output": "-"}, tokenizer.eos)
        asked.append("".join(text for text, is_response in pieces if not is_response))
    ids = [ids for ids, _ in tokenizer.encode(asked)]
    length = min(256, model.config.max_position_embeddings // 2)
    answers = {"base": generate(model, tokenizer, ids, length)}
    for adapter in adapters:
        load_adapter(model, adapter)
        answers[adapter] = generate(model, tokenizer, ids, length)
        remove_lora(model)
    for i, prompt in enumerate(prompts):
        say(f"> {prompt}")
        for name, replies in answers.items():
            say(f"[{name}] {replies[i].strip()}")


def write_results(results: dict[str, dict], samples: list[dict], arguments: argparse.Namespace) -> None:
    """Print the table, and write what --output and --samples ask for; rank 0 alone."""
    source = {"model": arguments.model, "adapter": (arguments.adapter or [None])[0], "dtype": arguments.dtype}
    results = {task: result | source for task, result in results.items()}
    say(show(results))
    if arguments.limit is not None:
        say(f"only the first {arguments.limit} documents of each task (--limit)")
    if arguments.output and rank_and_world()[0] == 0:
        write_text(json.dumps(results, indent=2) + "\n", arguments.output)
    if arguments.samples and rank_and_world()[0] == 0:
        write_rows(samples, arguments.samples)


def main() -> None:
    """The command line: exit code 2, and one line, for what the user can mend."""
    try:
        arguments = parse_arguments()
        device = start_ranks(arguments.device)
        folder = first_rank_first(functools.partial(checkpoint_folder, arguments.model))
        tokenizer = Tokenizer(folder)
        which = (arguments.data_dir, arguments.limit, arguments.num_fewshot)
        documents = prepare(arguments.tasks, tokenizer, *which)
        model = load_model(folder, device, DTYPES[arguments.dtype])
        if arguments.prompt is not None:
            lines = sys.stdin.read().splitlines() if arguments.prompt == "-" else [arguments.prompt]
            answer_prompts(model, tokenizer, lines, arguments.adapter)
        else:
            for adapter in arguments.adapter:
                load_adapter(model, adapter)
            write_results(*evaluate(model, tokenizer, documents, arguments.batch_tokens), arguments)
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\neval.py: stopped", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
