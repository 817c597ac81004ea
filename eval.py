"""Log-likelihoods, greedy generation, and the benchmarks that are made of them. For any model and adapter.

    python tests/tools/get_data.py boolq arc_challenge           # their rows, into runs/data
    python eval.py --model M --tasks boolq arc_challenge
    python eval.py --model M --adapter RUN/forgetting/seed-0 --tasks paper --output results.json
    python eval.py --model M --tasks mc qa --data-dir my/rows    # your own questions: mc.jsonl, qa.jsonl
    python eval.py --model M --adapter RUN/full/seed-0 RUN/forgetting/seed-0 --prompt "Why is the sky blue?"
    torchrun --nproc_per_node=2 eval.py ...                      # documents spread over ranks, same results

A task turns a row into requests, and the answers into figures. Prompts, delimiters and metrics are those of
lm-evaluation-harness 0.4.13, to the byte; TydiQA's are those of the paper. Requests with the same context
share its computation: it runs once, and each continuation goes on from the cache.
Order: requests, log-likelihoods and generation, kinds of task, benchmarks, evaluation, IFEval, command line.
Shapes: T tokens of a pack; D width; V vocabulary; n tokens that are judged.
"""

import argparse
import hashlib
import json
import math
import os
import re
import string
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data import Tokenizer, advance, check_ids, join_over_ranks, print0, progress, question_ids
from data import rank_and_world, read_object, read_rows, split_by_tokens, start_ranks, sum_over_ranks
from data import write_rows, write_text
from lora import load_adapter, remove_lora
from model import DTYPES, Cache, Transformer, checkpoint_folder, head_chunks, load_model, read_config
from model import to_device

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
        ids = tokenizer.encode([continuation], special=False)[0][0]
        ids = ids[1:] if ids[:1] == [tokenizer.start_id] else ids
        if not ids:
            raise ValueError("context and continuation are both empty")
        return [tokenizer.start_id], ids
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
    model: Transformer,
    pairs: list[tuple[list[int], list[int]]],
    batch_tokens: int = 4096,
    label: str = "log-likelihoods",
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
    with progress(label, len(pairs), "requests") as bar:
        for group in split_by_tokens(sizes, batch_tokens)[rank::world]:
            packed = [contexts[g] for g in group]
            order = [i for context in packed for i in members[context]]
            counts = [len(members[context]) for context in packed]
            results[order] = _score_pack(model, packed, counts, [pairs[i][1] for i in order])
            advance(bar, len(order))
    figures = sum_over_ranks(results).tolist()
    return [Answer(loglikelihood=total, greedy=misses == 0) for total, misses in figures]


def _score_pack(model: Transformer, contexts: list, counts: list[int], continuations: list) -> Tensor:
    """(continuations, 2) float64: log-likelihood, and how many tokens were not the most probable.

    For the context [a b] and the continuation [c d e]: a b run, then c d from the cache; the states of b, c
    and d give the probabilities of c, d and e.
    The first counts[0] continuations follow contexts[0], the next counts[1] contexts[1], and so on. All
    indices are made on the CPU, so that a GPU never has to be waited for.
    """
    on_device = partial(to_device, device=model.lm_head.weight.device)
    lengths = [len(ids) for ids in continuations]
    cache = Cache(model, sum(map(len, contexts)) + sum(lengths) - len(lengths))
    hidden, rows = _run(model, cache, contexts, None)
    context_of = np.repeat(np.arange(len(contexts)), counts)  # (continuations,)
    ends = torch.tensor([len(ids) for ids in contexts]).cumsum(0) - 1
    last = hidden[on_device(ends)]  # (contexts, D)

    # the state before a continuation's first token is its context's last; all but the last token of each
    # continuation run on from there, and give the states before the others
    targets = torch.tensor([token for ids in continuations for token in ids])  # (n,)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # (n,) whose continuation's
    first = torch.tensor([0, *lengths[:-1]]).cumsum(0)  # (continuations,) place of its first target
    is_later = torch.ones(len(targets), dtype=torch.bool).index_fill_(0, first, False)  # (n,)
    later = is_later.nonzero().squeeze(1)  # places of all other targets
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
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: str | None = None,
    batch_tokens: int = 4096,
    label: str = "replies",
) -> list[str]:
    """Greedy continuations of token lists, up to a stop id, `stop` or max_new_tokens, without special tokens.

    Prompts are cut from the left to leave room for the new tokens. Many are in flight, each with its length.
    """
    rank, world = rank_and_world()
    positions = model.config.max_position_embeddings
    room = positions - max_new_tokens
    if room < 1:
        raise ValueError(f"{max_new_tokens} new tokens leave no room in {positions} positions")
    prompts = [ids[-room:] or [tokenizer.start_id] for ids in prompts]
    written: dict[int, list[int]] = {}  # place in prompts: new token ids
    sizes = [len(ids) + max_new_tokens for ids in prompts]
    with progress(label, len(prompts), "replies") as bar:
        for group in split_by_tokens(sizes, batch_tokens)[rank::world]:
            replies = _generate_pack(model, tokenizer, [prompts[i] for i in group], max_new_tokens, stop)
            written |= dict(zip(group, replies))
            advance(bar, len(group))
    written = join_over_ranks(written)
    texts = [tokenizer.decode(written[i]) for i in range(len(prompts))]
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
            if token in tokenizer.stop_ids:
                continue
            written[i].append(token)
            if not stop or stop not in tokenizer.decode(written[i]):
                unfinished.append(place)
        active, past = [active[p] for p in unfinished], [past[p] for p in unfinished]
        inputs = [written[i][-1:] for i in active]
        if not active:
            break
    return written


# ---------------------------------------------------------------------------------------- kinds of task


@dataclass(frozen=True)
class Task:
    """How a row becomes requests, and how the answers become figures.

    requests(row, tokenizer) lists what to ask. score(row, answers) gives prediction, target and metrics of
    the document; a metric may be a list, which is pooled over all documents. prepare(rows, folder) picks the
    task's rows of the file and adds what else they need, from files beside it.
    """

    file: str
    version: int  # of the protocol: lm-evaluation-harness 0.4.13's number for the task
    requests: Callable[[dict, Tokenizer], list[Request]]
    score: Callable[[dict, list[Answer]], dict]
    prepare: Callable[[list[dict], Path], list[dict]] = lambda rows, folder: rows
    group: Callable[[dict], str] | None = None  # figures are means over the groups' means


def choice_task(
    file: str,
    version: int,
    ask: Callable[[dict], tuple],
    normed: bool = False,
    delimiter: str = " ",
    **rest: Any,
) -> Task:
    """Multiple choice: ask(row) gives context, choices, place of the right one; delimiter + choice is scored.

    acc takes the greatest log-likelihood, acc_norm that per character of the choice; the first wins a tie.
    """

    def requests(row: dict, _: Tokenizer) -> list[Request]:
        context, choices, gold = ask(row)
        if not choices or not 0 <= gold < len(choices):
            raise ValueError(f"{row['_source']}: {len(choices)} choices, the right one is number {gold}")
        return [Request(context, delimiter + choice) for choice in choices]

    def score(row: dict, answers: list[Answer]) -> dict:
        _, choices, gold = ask(row)
        totals = [answer.loglikelihood for answer in answers]
        by_length = [total / max(len(choice), 1) for total, choice in zip(totals, choices)]
        best = totals.index(max(totals))
        metrics = {"acc": float(best == gold)}
        if normed:
            metrics["acc_norm"] = float(by_length.index(max(by_length)) == gold)
        return {"prediction": best, "target": gold, "metrics": metrics}

    return Task(file, version, requests, score, **rest)


def exact_task(
    file: str, version: int, ask: Callable[[dict], tuple[str, str]], perplexity: bool = False, **rest: Any
) -> Task:
    """The model must find every token of one target most probable (acc); on request its perplexity, too."""

    def requests(row: dict, _: Tokenizer) -> list[Request]:
        return [Request(*ask(row))]

    def score(row: dict, answers: list[Answer]) -> dict:
        metrics = {"acc": float(answers[0].greedy)}
        if perplexity:
            metrics["perplexity"] = answers[0].loglikelihood  # summarise() makes it one
        return {"prediction": answers[0].greedy, "target": ask(row)[1], "metrics": metrics}

    return Task(file, version, requests, score, **rest)


def words_of(text: str) -> list[str]:
    """Words as SQuAD compares them: lower case, no ASCII punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1_score(prediction: str, answer: str) -> float:
    """Word overlap F1 of SQuAD, 0 to 1; 0 if nothing is shared."""
    found, right = words_of(prediction), words_of(answer)
    shared = sum((Counter(found) & Counter(right)).values())
    return 2 * shared / (len(found) + len(right)) if shared else 0.0


def squad_score(reply: str, right: list[str]) -> dict:
    """F1 and exact match as SQuAD counts them, the best over the right answers."""
    f1 = max(f1_score(reply, answer) for answer in right)
    exact = float(any(words_of(reply) == words_of(answer) for answer in right))
    return {"prediction": reply, "target": right, "metrics": {"f1": f1, "exact_match": exact}}


# ------------------------------------------------------------------------------------------- benchmarks


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
    """Each row with the fixed pairs."""
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
    """Arithmetic: the GPT-3 rows, cleaned as lm-evaluation-harness cleans them."""
    context = row["context"].strip().replace("\n\n", "\n").replace("Q:", "Question:").replace("A:", "Answer:")
    return context, row["completion"]


def arithmetic_task(name: str) -> Task:
    """One of the ten subtasks, whose rows are in one file."""

    def own_rows(rows: list[dict], _: Path) -> list[dict]:
        return [row for row in rows if row["subtask"] == name]

    return exact_task("arithmetic.jsonl", 2, arithmetic, prepare=own_rows)


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
    """SQuAD's figures, a mean over the languages."""
    return squad_score(answers[0].text.strip(), row["answers"]["text"])


def mc(row: dict) -> tuple:
    """Your own multiple choice: prompt, choices, and answer: the right choice, or its place from 0.

    A space joins prompt and choice unless the prompt ends in white space, as in prompt + completion rows.
    """
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list):
        raise ValueError(f"choices must be a list of texts, not {type(choices).__name__}")
    if not isinstance(row["prompt"], str):
        raise ValueError(f"prompt must be a text, not {type(row['prompt']).__name__}")
    if answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int:
        raise ValueError(f"answer {answer!r} is none of the choices, nor a place among them")
    joint = "" if row["prompt"][-1:].isspace() else " "
    return row["prompt"] + joint, choices, answer


def qa_requests(row: dict, _: Tokenizer) -> list[Request]:
    """Your own questions with short answers: prompt, and answer or a list of them; one line is written."""
    return [Request(row["prompt"], max_new_tokens=32, stop="\n")]


def qa_score(row: dict, answers: list[Answer]) -> dict:
    """SQuAD's F1 and exact match."""
    right = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not right or not all(isinstance(answer, str) for answer in right):
        raise ValueError(f"answer {row['answer']!r} is no text, nor a list of texts")
    return squad_score(answers[0].text.strip(), right)


def ifeval_requests(row: dict, _: Tokenizer) -> list[Request]:
    """IFEval: the prompt as it stands."""
    return [Request(row["prompt"], max_new_tokens=1280)]


def ifeval_score(row: dict, answers: list[Answer]) -> dict:
    """Which instructions the reply keeps. Strict: the reply as it is; loose: any of eight ways to trim it.

    A row with an instruction whose package is missing is not scored. Raises ValueError for an unknown one.
    """
    reply, names, arguments = answers[0].text, row["instruction_id_list"], row["kwargs"]
    if len(names) != len(arguments):
        raise ValueError(f"{len(names)} instruction ids, but {len(arguments)} kwargs")
    checks = list(zip(names, arguments))
    if unknown := [name for name, _ in checks if name not in IFEVAL]:
        raise ValueError(f"unknown instruction id {unknown[0]!r}")
    if missing := [name for name, _ in checks if not can_check(name)]:
        return {"prediction": reply, "target": None, "metrics": {}, "not_scored": missing}
    lines = reply.split("\n")
    trimmed = [reply] + ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    variants = trimmed + [text.replace("*", "") for text in trimmed]
    strict = [follows(reply, *check) for check in checks]
    loose = [any(follows(variant, *check) for variant in variants) for check in checks]
    metrics: dict[str, Any] = {}
    for kind, kept in (("strict", strict), ("loose", loose)):
        metrics[f"prompt_level_{kind}_acc"] = float(all(kept))
    for kind, kept in (("strict", strict), ("loose", loose)):
        metrics[f"inst_level_{kind}_acc"] = list(map(float, kept))
    return {"prediction": reply, "target": None, "metrics": metrics}


SUBTASKS = [f"arithmetic_{kind}" for kind in "1dc 2da 2ds 2dm 3da 3ds 4da 4ds 5da 5ds".split()]
# a plain dict: another program may add its own tasks
TASKS = {
    "truthfulqa_mc1": choice_task("truthfulqa.jsonl", 2, truthfulqa_mc1, prepare=truthfulqa_rows),
    "truthfulqa_mc2": Task(
        "truthfulqa.jsonl", 3, truthfulqa_mc2_requests, truthfulqa_mc2_score, prepare=truthfulqa_rows
    ),
    "boolq": choice_task("boolq.jsonl", 2, boolq),
    "logiqa": choice_task("logiqa.jsonl", 1, logiqa, normed=True),
    "tydiqa": Task("tydiqa.jsonl", 1, tydiqa_requests, tydiqa_score, tydiqa_rows, group=language_of),
    "asdiv": exact_task("asdiv.jsonl", 1, asdiv),
    "arc_challenge": choice_task("arc_challenge.jsonl", 1, arc_challenge, normed=True),
    "lambada": exact_task("lambada.jsonl", 1, lambada, perplexity=True),
    "ifeval": Task("ifeval.jsonl", 4, ifeval_requests, ifeval_score),
    **{name: arithmetic_task(name) for name in SUBTASKS},
    "mc": choice_task("mc.jsonl", 1, mc, normed=True, delimiter=""),
    "qa": Task("qa.jsonl", 1, qa_requests, qa_score),
}
GROUPS = {
    "truthfulqa": ["truthfulqa_mc1", "truthfulqa_mc2"],
    "arithmetic": SUBTASKS,
    "paper": ["truthfulqa_mc2", "boolq", "logiqa", "tydiqa", "asdiv"],
    "paper-appendix": ["ifeval", "arc_challenge", "lambada", *SUBTASKS],
}


# ------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Documents:
    """A task's rows with their requests, made once and put to any number of models."""

    name: str
    task: Task
    rows: list[dict]
    requests: list[list[Request]]
    identity: dict  # what results depend on besides the model: version, sha256 of rows and requests, limit


def expand_tasks(names: list[str]) -> list[str]:
    """Task names with the groups spelled out; ValueError for a name that is neither."""
    unknown = [name for name in names if name not in TASKS and name not in GROUPS]
    if unknown:
        raise ValueError(f"unknown task {', '.join(unknown)}; known: {', '.join([*TASKS, *GROUPS])}")
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, [name])))


def prepare(
    tasks: list[str], tokenizer: Tokenizer, data_dir: str | os.PathLike, limit: int | None = None
) -> list[Documents]:
    """The documents of tasks, or groups of them; all that can be wrong about the rows is found here."""
    documents = []
    for name in expand_tasks(tasks):
        task = TASKS[name]
        rows = task_rows(name, Path(data_dir))[:limit]
        if not rows:
            raise ValueError(f"{Path(data_dir) / task.file}: no document of {name} to evaluate")
        requests = [requests_of(task, row, tokenizer) for row in rows]
        content = [{key: value for key, value in row.items() if key[0] != "_"} for row in rows]
        text = json.dumps([content, [[vars(request) for request in group] for group in requests]])
        digest = hashlib.sha256(text.encode()).hexdigest()
        identity = {"version": task.version, "data_sha256": digest[:16], "limit": limit}
        documents.append(Documents(name, task, rows, requests, identity))
    return documents


def check_room(documents: list[Documents], positions: int) -> None:
    """Raise ValueError for a task whose new tokens leave no room for a prompt in the model's positions."""
    for prepared in documents:
        most = max(request.max_new_tokens for group in prepared.requests for request in group)
        if most >= positions:
            reason = f"{most} new tokens leave no room in the model's {positions} positions"
            raise ValueError(f"--tasks {prepared.name}: {reason}")


def task_rows(name: str, folder: Path) -> list[dict]:
    """All documents of a task, each with its number in the file. Raises ValueError where a file is not."""
    path = folder / TASKS[name].file
    if not path.is_file():
        public = any(name in tasks for tasks in GROUPS.values())
        fetch = f" (python tests/tools/get_data.py {name} --out {folder} fetches it)" if public else ""
        raise ValueError(f"--data-dir {folder} has no {path.name}, the rows of {name}{fetch}")
    rows = [row | {"_doc": i} for i, row in enumerate(read_rows([str(path)]))]
    try:
        return TASKS[name].prepare(rows, folder)
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        what = "a row, or what belongs beside the rows, is missing or malformed"
        raise ValueError(f"{path}: {what} ({type(error).__name__}: {error})") from None


def requests_of(task: Task, row: dict, tokenizer: Tokenizer) -> list[Request]:
    """A row's requests; a row that lacks what the task needs is a ValueError that names it."""
    try:
        requests = task.requests(row, tokenizer)
        if not requests:
            raise ValueError("no choices")
        for request in requests:
            if not isinstance(request.context, str):
                raise ValueError(f"a prompt must be a text, not {type(request.context).__name__}")
        task.score(row, [Answer()] * len(requests))  # a dry run: what scoring needs must be there
    except KeyError as error:
        raise ValueError(f"{row['_source']}: no field {error}") from None
    except (TypeError, ValueError, IndexError, AttributeError, re.error) as error:
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
        name, task = prepared.name, prepared.task
        answers = answer_requests(model, tokenizer, prepared, batch_tokens)
        scored = []
        for row, requests, replies in zip(prepared.rows, prepared.requests, answers):
            shown: dict[str, Any] = {"text": replies[0].text}
            if requests[0].continuation is not None:
                shown = {
                    "loglikelihoods": [reply.loglikelihood for reply in replies],
                    "is_greedy": [reply.greedy for reply in replies],
                }
            scored.append({"task": name, "doc_id": row["_doc"]} | shown | task.score(row, replies))
        groups = [task.group(row) for row in prepared.rows] if task.group else None
        results[name] = summarise([document["metrics"] for document in scored], groups)
        results[name] |= {"n": len(prepared.rows)} | prepared.identity
        if not_scored := sum("not_scored" in document for document in scored):
            results[name]["not_scored"] = not_scored
        samples += scored
    return results, samples


def answer_requests(
    model: Transformer, tokenizer: Tokenizer, documents: Documents, batch_tokens: int
) -> list[list[Answer]]:
    """The answers to a task's requests, document by document. Raises ValueError where one is not finite."""
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
    for i, answer in zip(scored, loglikelihoods(model, pairs, batch_tokens, documents.name)):
        if not math.isfinite(answer.loglikelihood):  # an argmax of NaN would look like an answer
            raise ValueError(f"{sources[i]}: {documents.name} has the log-likelihood {answer.loglikelihood}")
        answers[i] = answer
    for (max_new_tokens, stop), group in written.items():
        prompts = [ids for ids, _ in tokenizer.encode([requests[i].context for i in group])]
        check_ids([token for ids in prompts for token in ids], model.config.vocab_size, model.folder)
        texts = generate(model, tokenizer, prompts, max_new_tokens, stop, batch_tokens, documents.name)
        for i, text in zip(group, texts):
            answers[i] = Answer(text=text)
    ends = np.cumsum([len(group) for group in documents.requests]).tolist()
    return [answers[start:end] for start, end in zip([0, *ends], ends)]


def summarise(metrics: list[dict], groups: list[str] | None = None) -> dict:
    """Mean and standard error of every metric over the documents that have it; lists are pooled.

    With groups (a name per document) the figures are unweighted means over the groups' figures. The
    perplexity of a task is exp of minus the mean log-likelihood.
    """
    if groups is not None:
        parts = [summarise([m for m, g in zip(metrics, groups) if g == name]) for name in sorted(set(groups))]
        means = {key: sum(part[key] for part in parts) / len(parts) for key in metrics_of(parts[0])}
        squares = {key: sum(part[f"{key}_stderr"] ** 2 for part in parts) for key in means}
        return means | {f"{key}_stderr": math.sqrt(square) / len(parts) for key, square in squares.items()}
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


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that also reads well on a screen."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    ruled = [header, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, cells, widths))} |" for cells in ruled)


# ----------------------------------------------------------------------------------------------- IFEval
#
# A checker takes a reply v and the instruction's arguments, named as in the data's kwargs. Over patterns
# all() and any() get lists, no generators: so the dry run in requests_of meets every pattern of a row.


def follows(reply: str, name: str, arguments: dict) -> bool:
    """Whether a reply that is not blank keeps one instruction."""
    given = {key: value for key, value in arguments.items() if value}
    return bool(IFEVAL[name](reply, **given)) and bool(reply.strip())


def related(count: int, relation: str, bound: int) -> bool:
    """The two relations of IFEval."""
    if relation not in ("less than", "at least"):
        raise ValueError(f"relation {relation!r} is not one of less than, at least")
    return count < bound if relation == "less than" else count >= bound


def split_ends(text: str, pattern: str) -> list[str]:
    """Parts between separators; a blank first or last one is dropped, a blank one in between leaves none."""
    parts = re.split(pattern, text)
    parts = parts[not parts[0].strip() : len(parts) - (not parts[-1].strip())]
    return parts if all(part.strip() for part in parts) else []


def nth_first_word(v: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """The first word of the nth of exactly so many paragraphs."""
    parts, first_word = v.split("\n\n"), first_word.lower()
    if sum(bool(part.strip()) for part in parts) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    words = parts[nth_paragraph - 1].split()
    return bool(words) and re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0].lower() == first_word


def postscript(v: str, postscript_marker: str) -> bool:
    """A postscript with the marker."""
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = known.get(postscript_marker, rf"\s*{postscript_marker.lower()}.*$")
    return bool(re.findall(pattern, v.lower(), re.M))


def highlighted(v: str, num_highlights: int) -> bool:
    """Enough spans between asterisks that are not blank."""
    spans = re.findall(r"\*[^\n\*]*\*", v) + re.findall(r"\*\*[^\n\*]*\*\*", v)
    return sum(bool(span.strip("*").strip()) for span in spans) >= num_highlights


def is_json(v: str) -> bool:
    """JSON, in a code block or not."""
    v = v.strip()
    for opening in ("```json", "```Json", "```JSON", "```"):
        v = v.removeprefix(opening)
    try:
        json.loads(v.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def two_responses(v: str) -> bool:
    """Exactly two different parts around six asterisks."""
    parts = v.split("******")
    found = [part.strip() for i, part in enumerate(parts) if part.strip() or 0 < i < len(parts) - 1]
    return len(found) == 2 and all(found) and found[0] != found[1]


def bullets(v: str) -> int:
    """Lines that begin with one asterisk or a dash."""
    return len(re.findall(r"^\s*\*[^\*].*$", v, re.M)) + len(re.findall(r"^\s*-.*$", v, re.M))


def detected(v: str, language: str) -> bool:
    """Whether langdetect takes a text for this language; a text it cannot judge passes."""
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it draws at random unless told not to
    try:
        return langdetect.detect(v) == language
    except langdetect.LangDetectException:
        return True


def pieces(v: str, of: str) -> list[str]:
    """nltk's sentences or words of a text."""
    import nltk

    return nltk.sent_tokenize(v) if of == "sentences" else nltk.word_tokenize(v)


IFEVAL = {
    "keywords:existence": lambda v, keywords: all([re.search(k, v, re.I) for k in keywords]),
    "keywords:frequency": lambda v, keyword, frequency, relation: related(
        len(re.findall(keyword.strip(), v, re.I)), relation, frequency
    ),
    "keywords:forbidden_words": lambda v, forbidden_words: (
        not any([re.search(rf"\b{word}\b", v, re.I) for word in forbidden_words])
    ),
    "keywords:letter_frequency": lambda v, letter, let_frequency, let_relation: related(
        v.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "length_constraints:number_words": lambda v, num_words, relation: related(
        len(re.findall(r"\w+", v)), relation, num_words
    ),
    "length_constraints:number_paragraphs": lambda v, num_paragraphs: (
        len(split_ends(v, r"\s?\*\*\*\s?")) == num_paragraphs
    ),
    "length_constraints:nth_paragraph_first_word": nth_first_word,
    "length_constraints:number_sentences": lambda v, num_sentences, relation: related(
        len(pieces(v, "sentences")), relation, num_sentences
    ),
    "detectable_content:number_placeholders": lambda v, num_placeholders: (
        len(re.findall(r"\[.*?\]", v)) >= num_placeholders
    ),
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": lambda v, num_bullets: bullets(v) == num_bullets,
    "detectable_format:constrained_response": lambda v: any(
        f"My answer is {answer}." in v for answer in ("yes", "no", "maybe")
    ),
    "detectable_format:number_highlighted_sections": highlighted,
    "detectable_format:multiple_sections": lambda v, section_spliter, num_sections: (
        len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", v)) - 1 >= num_sections
    ),
    "detectable_format:json_format": is_json,
    "detectable_format:title": lambda v: any(t.strip("<>").strip() for t in re.findall(r"<<[^\n]+>>", v)),
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": lambda v, prompt_to_repeat: (
        v.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda v, end_phrase: (
        v.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda v: len(v.strip()) > 1 and v.strip()[0] == v.strip()[-1] == '"',
    "punctuation:no_comma": lambda v: "," not in v,
    "language:response_language": detected,
    "change_case:english_capital": lambda v: v.isupper() and detected(v, "en"),
    "change_case:english_lowercase": lambda v: v.islower() and detected(v, "en"),
    "change_case:capital_word_frequency": lambda v, capital_frequency, capital_relation: related(
        sum(word.isupper() for word in pieces(v, "words")), capital_relation, capital_frequency
    ),
}
IFEVAL_NEEDS = {
    "language:response_language": "langdetect",
    "change_case:english_capital": "langdetect",
    "change_case:english_lowercase": "langdetect",
    "length_constraints:number_sentences": "nltk",
    "change_case:capital_word_frequency": "nltk",
}


@cache
def can_check(name: str) -> bool:
    """Whether what an instruction's checker needs is installed: nltk comes without its tokenizers' data."""
    try:
        if IFEVAL_NEEDS.get(name) == "langdetect":
            detected("One.", "en")
        if IFEVAL_NEEDS.get(name) == "nltk":
            pieces("One. Two.", "sentences")
    except (ImportError, LookupError):
        return False
    return True


# ----------------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises ValueError, before any work, for what cannot be meant."""
    usage = "python eval.py --model M --tasks T ... (--help lists the flags)"
    parser = argparse.ArgumentParser(
        usage=usage,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, dtype = parser.add_argument, "bfloat16" if torch.cuda.is_available() else "float32"
    add("--model", required=True, help="checkpoint folder or Hub id, with an optional @revision")
    add("--adapter", nargs="+", default=[], help="folder of a PEFT-layout adapter; any number with --prompt")
    add("--tasks", nargs="+", default=[], help=f"of {', '.join([*TASKS, *GROUPS])}")
    add("--prompt", help="instead of tasks: answer this, without and with each adapter; -: lines of stdin")
    add("--template", choices=["tulu", "model"], help="of --prompt [that of the adapter's run; tulu]")
    add("--data-dir", default="runs/data", help="folder of the row files [runs/data]")
    add("--limit", type=int, help="only the first LIMIT documents of each task")
    add("--output", help="write the results here (.json)")
    add("--samples", help="write one line per document here (.jsonl)")
    add(
        "--dtype",
        choices=sorted(DTYPES),
        default=dtype,
        help=f"of the weights; bfloat16 is slow on a CPU without instructions for it [{dtype}]",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--batch-tokens", type=int, default=4096, help="tokens of a packed forward pass [4096]")
    arguments = parser.parse_args()
    for flag, value in (("--limit", arguments.limit), ("--batch-tokens", arguments.batch_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value} is not allowed: at least 1")
    if bool(arguments.tasks) == (arguments.prompt is not None):
        raise ValueError("either --tasks or --prompt is needed")
    for flag in ("limit", "output", "samples"):
        if arguments.prompt is not None and getattr(arguments, flag) is not None:
            raise ValueError(f"--{flag} goes with --tasks, not with --prompt")
    if arguments.tasks and len(arguments.adapter) > 1:
        raise ValueError(f"--tasks take one --adapter at a time, not {len(arguments.adapter)}")
    expand_tasks(arguments.tasks)
    return arguments


def prompts_of(argument: str) -> list[str]:
    """The prompt of --prompt, or, for "-", the lines of stdin. Raises ValueError for what is not UTF-8."""
    content = sys.stdin.buffer.read() if argument == "-" else os.fsencode(argument)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt: not UTF-8 (byte {error.start})") from None
    if argument != "-":
        return [text]
    # not splitlines(), for which a form feed or U+2028 ends a line, too
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def write_results(results: dict[str, dict], samples: list[dict], arguments: argparse.Namespace) -> None:
    """Print the table, and write what --output and --samples ask for."""
    rows = []
    for task, result in results.items():
        for metric in metrics_of(result):
            cells = [f"{result[metric]:.4f}", f"{result[metric + '_stderr']:.4f}", str(result["n"])]
            rows.append([task, metric, *cells])
        if "not_scored" in result:
            what = "not scored (a checker's package is missing)"
            rows.append([task, what, "", "", str(result["not_scored"])])
    percents = headlines(results).values()
    average = sum(percents) / max(len(percents), 1)
    rows.append(["average", "of the tasks' first metrics, percent", f"{average:.2f}", "", ""])
    print0(table(["task", "metric", "value", "stderr", "n"], rows))
    if arguments.limit is not None:
        print0(f"only the first {arguments.limit} documents of each task (--limit)")
    source = {"model": arguments.model, "adapter": (arguments.adapter or [None])[0], "dtype": arguments.dtype}
    results = {task: result | source for task, result in results.items()}
    if arguments.output and rank_and_world()[0] == 0:
        write_text(json.dumps(results, indent=2) + "\n", arguments.output)
    if arguments.samples and rank_and_world()[0] == 0:
        write_rows(samples, arguments.samples)


def template_of(adapters: list[str]) -> str:
    """The template that the adapters' runs were trained with, as their config.json says; else Tulu's."""
    found = set()
    for adapter in adapters:
        above = Path(adapter).resolve().parents  # RUN/METHOD/seed-S or RUN/reference
        configs = [folder / "config.json" for folder in above[:2]]
        found |= {read_object(path).get("template", "tulu") for path in configs if path.is_file()}
    if len(found) > 1:
        raise ValueError("the adapters were trained with different templates: give --template")
    return found.pop() if found else "tulu"


def answer_prompts(model: Transformer, tokenizer: Tokenizer, prompts: list[str], adapters: list[str]) -> None:
    """Print greedy answers of the model alone and of each adapter, to prompts in the template of training."""
    ids = [question_ids(prompt, tokenizer) for prompt in prompts]
    length = min(256, model.config.max_position_embeddings // 2)
    answers = {"base": generate(model, tokenizer, ids, length)}
    for adapter in adapters:
        load_adapter(model, adapter)
        answers[adapter] = generate(model, tokenizer, ids, length)
        remove_lora(model)
    for i, prompt in enumerate(prompts):
        print0(f"> {prompt}")
        for name, replies in answers.items():
            print0(f"[{name}] {replies[i].strip()}")


def main() -> None:
    """The command line: exit code 2, and a line or two, for what the user can mend."""
    try:
        arguments = parse_arguments()
        device = start_ranks(arguments.device)
        folder = checkpoint_folder(arguments.model)
        tokenizer = Tokenizer(folder, arguments.template or template_of(arguments.adapter))
        documents = prepare(arguments.tasks, tokenizer, arguments.data_dir, arguments.limit)
        check_room(documents, read_config(folder).max_position_embeddings)
        model = load_model(folder, device, DTYPES[arguments.dtype])
        if arguments.prompt is not None:
            answer_prompts(model, tokenizer, prompts_of(arguments.prompt), arguments.adapter)
        else:
            for adapter in arguments.adapter:
                load_adapter(model, adapter)
            write_results(*evaluate(model, tokenizer, documents, arguments.batch_tokens), arguments)
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
