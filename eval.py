"""Log-likelihoods, greedy generation, and the benchmarks that are made of them. For any model and adapter.

    ./run.sh get_data boolq arc_challenge           # their rows, into runs/data
    ./run.sh eval --model M --tasks boolq arc_challenge
    ./run.sh eval --model M --adapter RUN/forgetting/seed-0 --tasks paper --output results.json
    ./run.sh eval --model M --tasks mc qa --data-dir my/rows    # your own questions: mc.jsonl, qa.jsonl
    ./run.sh eval --model M --adapter RUN/full/seed-0 RUN/forgetting/seed-0 --prompt "Why is the sky blue?"
    torchrun --nproc_per_node=2 eval.py ...                      # documents spread over ranks, same results

A task turns a row into requests, and the answers into figures. Prompts, delimiters and metrics are those of
lm-evaluation-harness 0.4.13, to the byte; TydiQA's are those of the paper. Nothing runs twice: what inputs
of a pack begin with in common runs once (prefix sharing), and while replies are written, the next prompt
takes the place of one that has ended (continuous batching).
Order: requests, log-likelihoods and generation, kinds of task, benchmarks, evaluation, IFEval, command line.
Shapes: T tokens of a pack; D width; V vocabulary; n tokens that are judged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import string
import sys
import unicodedata
from collections import Counter, deque
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from data import Tokenizer, asked_in, check_ids, question_ids, render
from data import advance, progress
from data import join_over_ranks, print0, rank_and_world, start_ranks, sum_over_ranks
from data import read_object, read_rows, write_rows, write_text
from lora import load_adapter, remove_lora
from model import DTYPES, check_adapter_base, checkpoint_folder, load_model, read_config
from model import Cache, Transformer, head_chunks, to_device

# --------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Request:
    """Score `continuation` after `context`, or, if it is None, write on from `context` greedily."""

    context: str
    continuation: str | None = None
    max_new_tokens: int = 0
    stop: str | None = None  # generation ends before this text, and at an eos
    in_template: bool = False  # the context is in a chat template, which writes the bos, too


@dataclass(frozen=True)
class Answer:
    """What a model makes of a request."""

    loglikelihood: float = 0.0  # sum over the continuation's tokens, nats
    greedy: bool = False  # every token was the most probable one
    text: str = ""  # what was written


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, special: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of context and continuation, split as lm-evaluation-harness splits them.

    Trailing whitespace of the context moves to the continuation; both together are encoded once, and what
    exceeds the encoded context is the continuation. An empty context becomes the bos token, or the eos.
    special: the tokenizer puts its bos in front.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return [tokenizer.start_id], _encode_alone(tokenizer, continuation)
    whole, context_ids = (ids for ids, _ in tokenizer.encode([stripped + continuation, stripped], special))
    if len(whole) <= len(context_ids):
        raise ValueError(f"continuation {continuation!r} adds no token to its context")
    return context_ids, whole[len(context_ids) :]


def _encode_alone(tokenizer: Tokenizer, continuation: str) -> list[int]:
    """Token ids of a continuation without a context, and without a bos."""
    ids, _ = tokenizer.encode([continuation], special=False)[0]
    if ids[:1] == [tokenizer.start_id]:
        ids = ids[1:]
    if not ids:
        raise ValueError("context and continuation are both empty")
    return ids


def check_length(model: Transformer, continuation: list[int]) -> None:
    """A continuation must fit the model's positions whole: only contexts are cut."""
    length, limit = len(continuation), model.config.max_position_embeddings
    if length > limit:
        raise ValueError(f"a continuation of {length} tokens exceeds the model's {limit} positions")


# ----------------------------------------------------------------------- log-likelihoods and generation


@dataclass(frozen=True)
class Budget:
    """How much is computed, and how much is kept, at once."""

    batch_tokens: int = 4096  # of a packed forward pass
    cache_bytes: int | None = None  # of keys and values while replies are written; None: see cache_rows()


# tokens; a reply whose rows do not lie together copies them at every step, which fewer do not make up for
SHORTEST_PREFIX = 8


def shared_length(ids: list[int], before: list[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = 0
    for mine, other in zip(ids, before):
        if mine != other:
            break
        length += 1
    return length


@torch.inference_mode()
def loglikelihoods(
    model: Transformer,
    pairs: list[tuple[list[int], list[int]]],
    batch_tokens: int = 4096,
    label: str = "log-likelihoods",
) -> list[Answer]:
    """Log-likelihood and greedy flag of each pair (context ids, continuation ids), neither of them empty.

    An input longer than the model's positions loses tokens from the left. What inputs have in common at their
    beginning, be it a question or a few-shot prompt, runs once a pack. Ranks share the work.
    """
    limit = model.config.max_position_embeddings
    inputs = []
    for context, continuation in pairs:
        check_length(model, continuation)
        whole = context + continuation
        inputs.append(whole[-(limit + 1) : -1])  # the last token is only judged
    device = model.lm_head.weight.device
    results = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
    rank, world = rank_and_world()
    with progress(label, len(pairs), "requests") as bar:
        for places in packs_with_prefixes(inputs, batch_tokens)[rank::world]:
            packed = [inputs[place] for place in places]
            continuations = [pairs[place][1] for place in places]
            results[places] = _score_pack(model, packed, continuations)
            advance(bar, len(places))
    figures = sum_over_ranks(results).tolist()
    return [Answer(loglikelihood=total, greedy=misses == 0) for total, misses in figures]


def packs_with_prefixes(inputs: list[list[int]], batch_tokens: int) -> list[list[int]]:
    """Places in `inputs` as packs of which at most batch_tokens run, or one longer input.

    They are sorted by token ids, so that each has the most in common with the one before it.
    """
    packs: list[list[int]] = []
    before: list[int] = []
    room = 0
    for place in sorted(range(len(inputs)), key=inputs.__getitem__):
        ids = inputs[place]
        needed = len(ids) - shared_length(ids, before)
        if not packs or needed > room:
            packs.append([])
            room = batch_tokens
            needed = len(ids)
        packs[-1].append(place)
        room -= needed
        before = ids
    return packs


def _score_pack(model: Transformer, inputs: list[list[int]], continuations: list[list[int]]) -> Tensor:
    """(continuations, 2) float64: log-likelihood, and how many tokens were not the most probable.

    An input is a context and all of its continuation but the last token: for the context [a b] and the
    continuation [c d e] it is [a b c d], and the states of b, c and d give the probabilities of c, d and e.
    All indices are made on the CPU, so that a GPU never has to be waited for.
    """
    tokens, boundaries, past, before_targets = [], [0], [], []
    earlier: list[int] = []
    places = torch.empty(0, dtype=torch.int64)  # of the earlier input's tokens in the pack
    for ids, continuation in zip(inputs, continuations):
        shared = shared_length(ids, earlier)
        first = len(tokens)
        tokens += ids[shared:]
        own = torch.arange(first, len(tokens))
        if len(own):
            boundaries.append(len(tokens))
            past.append(places[:shared])
        places = torch.cat([places[:shared], own])
        before_targets.append(places[-len(continuation) :])
        earlier = ids
    device = model.lm_head.weight.device
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    hidden = model(to_device(torch.tensor(tokens), device), cu_seqlens, past=past)  # (T, D)
    states = hidden[to_device(torch.cat(before_targets), device)]  # (n, D)
    return _judge(model, states, continuations)


def _judge(model: Transformer, states: Tensor, continuations: list[list[int]]) -> Tensor:
    """The figures of _score_pack from the states (n, D) before the n tokens of all continuations."""
    device = states.device
    lengths = torch.tensor([len(ids) for ids in continuations])
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)  # (n,) the continuation of each token
    owner = to_device(owner, device)
    targets = torch.tensor([token for ids in continuations for token in ids])
    targets = to_device(targets, device)  # (n,)
    totals = torch.zeros(len(lengths), dtype=torch.float64, device=device)
    misses = torch.zeros_like(totals)
    for part, logprobs, loss in head_chunks(states, model.lm_head.weight, targets):
        missed = logprobs.argmax(-1) != targets[part]
        totals.index_add_(0, owner[part], -loss.double())
        misses.index_add_(0, owner[part], missed.double())
    return torch.stack([totals, misses], dim=1)


@torch.inference_mode()
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: str | None = None,
    budget: Budget = Budget(),
    label: str = "replies",
) -> list[str]:
    """Greedy continuations of token lists, up to a stop id, `stop` or max_new_tokens, without special tokens.

    Prompts are cut from the left to leave room for the new tokens. Ranks share them.
    """
    positions = model.config.max_position_embeddings
    room = positions - max_new_tokens
    if room < 1:
        raise ValueError(f"{max_new_tokens} new tokens leave no room in {positions} positions")
    prompts = [ids[-room:] or [tokenizer.start_id] for ids in prompts]

    def has_ended(new: list[int]) -> bool:
        if new[-1] in tokenizer.stop_ids or len(new) == max_new_tokens:
            return True
        return stop is not None and stop in tokenizer.decode(new)

    rank, world = rank_and_world()
    in_order = sorted(range(len(prompts)), key=prompts.__getitem__)  # neighbours share their beginnings
    mine = {place: prompts[place] for place in in_order[rank::world]}
    written: dict[int, list[int]] = {}  # place in prompts: new token ids
    with progress(label, len(prompts), "replies") as bar:
        for place, new in continuous_batching(model, mine, max_new_tokens, has_ended, budget):
            written[place] = new[:-1] if new[-1] in tokenizer.stop_ids else new
            advance(bar, 1)
    written = join_over_ranks(written)
    texts = [tokenizer.decode(written[place]) for place in range(len(prompts))]
    if stop is None:
        return texts
    return [text.split(stop)[0] for text in texts]


@dataclass
class Reply:
    """A prompt and what was written on from it, the cache rows of both, and how many tokens have run."""

    ids: list[int]
    rows: Tensor  # (prompt + most new tokens,) int64
    done: int  # the first `done` tokens have run, or run in this pass as another reply's


def continuous_batching(
    model: Transformer,
    prompts: dict[int, list[int]],
    max_new_tokens: int,
    has_ended: Callable[[list[int]], bool],
    budget: Budget,
) -> Iterator[tuple[int, list[int]]]:
    """Each prompt's key with the new token ids of its reply, in the order in which they end.

    A pass runs one token of every reply in flight, and the prompts that join. A reply that has ended gives
    its cache rows back, and the next prompt joins as soon as what it may come to need is free: so many are in
    flight until none waits, and a short reply does not wait for a long one.
    """
    if not prompts:
        return
    needed = [len(ids) + max_new_tokens for ids in prompts.values()]
    rows = max(cache_rows(model, budget), max(needed))
    cache = Cache(model, min(rows, sum(needed)))
    waiting = deque(prompts.items())
    in_flight: dict[int, Reply] = {}
    while waiting or in_flight:
        _let_join(cache, waiting, in_flight, max_new_tokens, budget.batch_tokens)
        next_tokens = _step(model, cache, list(in_flight.values()))
        for (place, reply), token in zip(list(in_flight.items()), next_tokens):
            reply.ids.append(token)
            new = reply.ids[len(prompts[place]) :]
            if has_ended(new):
                cache.release(reply.rows)
                del in_flight[place]
                yield place, new


def _let_join(
    cache: Cache, waiting: deque, in_flight: dict[int, Reply], max_new_tokens: int, batch_tokens: int
) -> None:
    """Move prompts from `waiting` to `in_flight` while the cache has rows for them, and the pass room."""
    room = batch_tokens - len(in_flight)
    while waiting:
        place, ids = waiting[0]
        common = torch.empty(0, dtype=torch.int64)
        if in_flight:
            *_, nearest = in_flight.values()  # sorted as prompts are, the last one begins most alike
            length = shared_length(ids[:-1], nearest.ids)  # the last token runs: its state is needed
            if length >= SHORTEST_PREFIX:
                common = nearest.rows[:length]
        own = len(ids) - len(common)
        if in_flight and own > room or own + max_new_tokens > len(cache.free_rows()):
            return
        waiting.popleft()
        room -= own
        cache.share(common)
        rows = torch.cat([common, cache.take(own + max_new_tokens)])
        in_flight[place] = Reply(list(ids), rows, done=len(common))


def _step(model: Transformer, cache: Cache, replies: list[Reply]) -> list[int]:
    """Run what is new in every reply, in one pass; the most probable token after each."""
    tokens, rows, past = [], [], []
    boundaries = [0]
    for reply in replies:
        end = len(reply.ids)
        tokens += reply.ids[reply.done :]
        boundaries.append(len(tokens))
        rows.append(reply.rows[reply.done : end])
        past.append(reply.rows[: reply.done])
        reply.done = end
    device = model.lm_head.weight.device
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)  # (B+1,)
    hidden = model(to_device(torch.tensor(tokens), device), cu_seqlens, cache, torch.cat(rows), past)
    ends = to_device(cu_seqlens[1:] - 1, device)
    states = hidden[ends]  # (B, D)
    unused = states.new_zeros(len(states), dtype=torch.int64)  # targets, whose losses nobody reads
    best = []
    for _, logprobs, _ in head_chunks(states, model.lm_head.weight, unused):
        best.append(logprobs.argmax(-1))
    return torch.cat(best).tolist()  # the one wait for a GPU


def cache_rows(model: Transformer, budget: Budget) -> int:
    """How many tokens' keys and values may be kept while replies are written.

    Without a budget they may take as much memory as the weights, at least 2 GiB; on a GPU at most half of
    what is free.
    """
    one = Cache(model, 1)
    row_bytes = one.keys.nbytes + one.values.nbytes
    size = budget.cache_bytes
    if size is None:
        weights = sum(parameter.nbytes for parameter in model.parameters())
        size = max(weights, 2 * 2**30)
        device = model.lm_head.weight.device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            size = min(size, free // 2)
    return size // row_bytes


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
    chat: bool = False,
    **rest: Any,
) -> Task:
    """Multiple choice: ask(row) gives context, choices, place of the right one; delimiter + choice is scored.

    acc takes the greatest log-likelihood, acc_norm that per character of the choice; the first wins a tie.
    chat: a model with a chat template is asked in it.
    """

    def requests(row: dict, tokenizer: Tokenizer) -> list[Request]:
        context, choices, gold = ask(row)
        if not choices or not 0 <= gold < len(choices):
            raise ValueError(f"{len(choices)} choices, the right one is number {gold}")
        if chat and tokenizer.template is not None:
            asked = in_template(context, tokenizer)
            return [Request(asked, choice, in_template=True) for choice in choices]
        return [Request(context, delimiter + choice) for choice in choices]

    def score(row: dict, answers: list[Answer]) -> dict:
        _, choices, gold = ask(row)
        totals = [answer.loglikelihood for answer in answers]
        best = totals.index(max(totals))
        metrics = {"acc": float(best == gold)}
        if normed:
            by_length = [total / max(len(choice), 1) for total, choice in zip(totals, choices)]
            best_normed = by_length.index(max(by_length))
            metrics["acc_norm"] = float(best_normed == gold)
        return {"prediction": best, "target": gold, "metrics": metrics}

    return Task(file, version, requests, score, **rest)


def exact_task(
    file: str,
    version: int,
    ask: Callable[[dict], tuple[str, str]],
    perplexity: bool = False,
    **rest: Any,
) -> Task:
    """The model must find every token of one target most probable (acc); on request its perplexity, too."""

    def requests(row: dict, _: Tokenizer) -> list[Request]:
        context, target = ask(row)
        return [Request(context, target)]

    def score(row: dict, answers: list[Answer]) -> dict:
        (answer,) = answers
        _, target = ask(row)
        metrics = {"acc": float(answer.greedy)}
        if perplexity:
            metrics["perplexity"] = answer.loglikelihood  # summarise() makes it one
        return {"prediction": answer.greedy, "target": target, "metrics": metrics}

    return Task(file, version, requests, score, **rest)


def in_template(question: str, tokenizer: Tokenizer) -> str:
    """A question in the tokenizer's template, up to where the answer begins."""
    row = {"instruction": question.rstrip(), "output": "-"}
    return asked_in(render(row, tokenizer.eos, tokenizer.template))


def words_of(text: str) -> list[str]:
    """Words as SQuAD compares them: lower case, no ASCII punctuation, no articles."""
    lower = text.lower()
    letters = "".join(c for c in lower if c not in string.punctuation)
    without_articles = re.sub(r"\b(a|an|the)\b", " ", letters)
    return without_articles.split()


# scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana, Han
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


def words_of_any_language(text: str) -> list[str]:
    """Words as MLQA compares them: punctuation is what Unicode says, and characters of UNSPACED are words.

    As DRCD does it, too. Articles are the English ones: a row does not say its language.
    """
    letters = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    spaced = re.sub(f"([{UNSPACED}])", r" \1 ", letters)
    return words_of(spaced)


def f1_score(prediction: str, answer: str, words: Callable[[str], list[str]] = words_of) -> float:
    """Word overlap F1 of SQuAD, 0 to 1; 0 if nothing is shared."""
    found = Counter(words(prediction))
    right = Counter(words(answer))
    shared = (found & right).total()
    if shared == 0:
        return 0.0
    return 2 * shared / (found.total() + right.total())


def squad_score(
    reply: str, right: list[str], words: Callable[[str], list[str]] = words_of_any_language
) -> dict:
    """F1 and exact match as SQuAD counts them, the best over the right answers."""
    f1 = max(f1_score(reply, answer, words) for answer in right)
    same_words = [words(reply) == words(answer) for answer in right]
    metrics = {"f1": f1, "exact_match": float(any(same_words))}
    return {"prediction": reply, "target": right, "metrics": metrics}


# ------------------------------------------------------------------------------------------- benchmarks


def boolq(row: dict) -> tuple:
    """BoolQ: yes or no after a passage that begins with its title."""
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return context, ["no", "yes"], row["label"]


def logiqa(row: dict) -> tuple:
    """LogiQA: the options are listed with letters, and scored as texts."""
    options = row["options"]
    listed = ""
    for letter, option in zip("ABCD", options):
        listed += f"\n{letter}. {option}"
    context = f"Passage: {row['context']}\nQuestion: {row['question']}\nChoices:{listed}\nAnswer:"
    right = row["label"].strip()
    return context, options, "abcd".index(right)


def arc_challenge(row: dict) -> tuple:
    """ARC: three to five choices, whatever their labels."""
    context = f"Question: {row['question']}\nAnswer:"
    choices = row["choices"]
    right = choices["label"].index(row["answerKey"])
    return context, choices["text"], right


def truthfulqa_mc1(row: dict) -> tuple:
    """TruthfulQA: six fixed pairs in front; the first choice is the true one."""
    context = f"{row['_prompt']}\n\nQ: {row['question']}\nA:"
    return context, row["mc1_targets"]["choices"], 0


def truthfulqa_mc2_requests(row: dict, _: Tokenizer) -> list[Request]:
    """TruthfulQA mc2: every true and false answer."""
    context, _, _ = truthfulqa_mc1(row)
    choices = row["mc2_targets"]["choices"]
    return [Request(context, " " + choice) for choice in choices]


def truthfulqa_mc2_score(row: dict, answers: list[Answer]) -> dict:
    """The share of probability that true answers get."""
    labels = row["mc2_targets"]["labels"]
    totals = [answer.loglikelihood for answer in answers]
    best = max(totals)
    probabilities = [math.exp(total - best) for total in totals]  # over the best one's: not all underflow
    true = sum(p for p, label in zip(probabilities, labels) if label == 1)
    metrics = {"acc": true / sum(probabilities)}
    return {"prediction": totals.index(best), "target": labels, "metrics": metrics}


def truthfulqa_rows(rows: list[dict], folder: Path) -> list[dict]:
    """Each row with the fixed pairs."""
    path = folder / "truthfulqa_prompt.txt"
    prompt = path.read_text(encoding="utf-8")
    return [row | {"_prompt": prompt} for row in rows]


def lambada(row: dict) -> tuple[str, str]:
    """LAMBADA: the last word, split at spaces alone."""
    context, _, word = row["text"].rpartition(" ")
    return context, " " + word


def asdiv(row: dict) -> tuple[str, str]:
    """ASDiv: the number alone, with no space in front."""
    context = f"{row['body']}\nQuestion:{row['question']}\nAnswer:"
    number, *_ = row["answer"].split(" (")
    return context, number


def arithmetic(row: dict) -> tuple[str, str]:
    """Arithmetic: the GPT-3 rows, cleaned as lm-evaluation-harness cleans them."""
    context = row["context"].strip()
    context = context.replace("\n\n", "\n")
    context = context.replace("Q:", "Question:").replace("A:", "Answer:")
    return context, row["completion"]


def arithmetic_task(name: str) -> Task:
    """One of the ten subtasks, whose rows are in one file."""

    def own_rows(rows: list[dict], _: Path) -> list[dict]:
        return [row for row in rows if row["subtask"] == name]

    return exact_task("arithmetic.jsonl", 2, arithmetic, prepare=own_rows)


def language_of(row: dict) -> str:
    """TydiQA: the first part of a row's id."""
    language, _, _ = row["id"].partition("-")
    return language


def tydiqa_rows(rows: list[dict], folder: Path) -> list[dict]:
    """Each row with its language's words and demonstration."""
    templates = json.loads((folder / "tydiqa_templates.json").read_text(encoding="utf-8"))
    words = templates["with_context"]
    shots = {}
    for shot in read_rows([str(folder / "tydiqa_1shot.jsonl")]):
        shots[language_of(shot)] = shot
    found = []
    for row in rows:
        language = language_of(row)
        found.append(row | {"_words": words[language], "_shot": shots[language]})
    return found


def tydiqa_requests(row: dict, tokenizer: Tokenizer) -> list[Request]:
    """One demonstration, then the question; passages are cut to 512 tokens (a bos among them stays)."""
    words, shot = row["_words"], row["_shot"]

    def question(of: dict) -> str:
        passage = of["context"]
        ids, _ = tokenizer.encode([passage])[0]
        if len(ids) > 512:
            passage = tokenizer.decode(ids[:512], skip_special=False)
        return f"{words['passage']} {passage}\n{words['question']} {of['question']}\n{words['answer']}"

    shown = f"{question(shot)} {shot['answers']['text'][0]}"
    prompt = f"{words['instruction']}\n\n{shown}\n\n{question(row)}"
    return [Request(prompt, max_new_tokens=50, stop="\n")]


def tydiqa_score(row: dict, answers: list[Answer]) -> dict:
    """SQuAD's figures, a mean over the languages."""
    (answer,) = answers
    return squad_score(answer.text.strip(), row["answers"]["text"], words_of)


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


def qa_requests(row: dict, tokenizer: Tokenizer) -> list[Request]:
    """Your own questions with short answers: prompt, and answer or a list of them; one line is written."""
    prompt = row["prompt"]
    chat = tokenizer.template is not None and isinstance(prompt, str)
    if chat:
        prompt = in_template(prompt, tokenizer)
    return [Request(prompt, max_new_tokens=32, stop="\n", in_template=chat)]


def qa_score(row: dict, answers: list[Answer]) -> dict:
    """SQuAD's F1 and exact match."""
    (answer,) = answers
    right = row["answer"]
    if isinstance(right, str):
        right = [right]
    texts = isinstance(right, list) and all(isinstance(text, str) for text in right)
    if not right or not texts:
        raise ValueError(f"answer {row['answer']!r} is no text, nor a list of texts")
    return squad_score(answer.text.strip(), right)


def ifeval_requests(row: dict, _: Tokenizer) -> list[Request]:
    """IFEval: the prompt as it stands."""
    return [Request(row["prompt"], max_new_tokens=1280)]


def ifeval_score(row: dict, answers: list[Answer]) -> dict:
    """Which instructions the reply keeps. Strict: the reply as it is; loose: any of eight ways to trim it.

    A row with an instruction whose package is missing is not scored. Raises ValueError for an unknown one.
    """
    (answer,) = answers
    reply, names, arguments = answer.text, row["instruction_id_list"], row["kwargs"]
    if len(names) != len(arguments):
        raise ValueError(f"{len(names)} instruction ids, but {len(arguments)} kwargs")
    if unknown := [name for name in names if name not in IFEVAL]:
        raise ValueError(f"unknown instruction id {unknown[0]!r}")
    if missing := [name for name in names if not can_check(name)]:
        return {"prediction": reply, "target": None, "metrics": {}, "not_scored": missing}
    variants = trimmed_replies(reply)
    strict, loose = [], []
    for name, values in zip(names, arguments):
        strict.append(follows(reply, name, values))
        kept = [follows(variant, name, values) for variant in variants]
        loose.append(any(kept))
    metrics = {
        "prompt_level_strict_acc": float(all(strict)),
        "prompt_level_loose_acc": float(all(loose)),
        "inst_level_strict_acc": [float(kept) for kept in strict],
        "inst_level_loose_acc": [float(kept) for kept in loose],
    }
    return {"prediction": reply, "target": None, "metrics": metrics}


def trimmed_replies(reply: str) -> list[str]:
    """IFEval's eight: without the first line, the last, both or none, each with and without asterisks."""
    lines = reply.split("\n")
    variants = [reply]
    for rest in (lines[1:], lines[:-1], lines[1:-1]):
        variants.append("\n".join(rest).strip())
    without_asterisks = [text.replace("*", "") for text in variants]
    return variants + without_asterisks


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
    "mc": choice_task("mc.jsonl", 1, mc, normed=True, delimiter="", chat=True),
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
    found: dict[str, None] = {}  # as an ordered set
    unknown = []
    for name in names:
        if name in TASKS:
            found[name] = None
        elif name in GROUPS:
            found |= dict.fromkeys(GROUPS[name])
        else:
            unknown.append(name)
    if unknown:
        known = ", ".join([*TASKS, *GROUPS])
        raise ValueError(f"unknown task {', '.join(unknown)}; known: {known}")
    return list(found)


def prepare(
    tasks: list[str],
    tokenizer: Tokenizer,
    data_dir: str | os.PathLike,
    limit: float | None = None,
) -> list[Documents]:
    """The documents of tasks, or groups of them; all that can be wrong about the rows is found here."""
    documents = []
    for name in expand_tasks(tasks):
        task = TASKS[name]
        rows = task_rows(name, Path(data_dir))
        rows = rows[: document_count(limit, len(rows))]
        if not rows:
            raise ValueError(f"{Path(data_dir) / task.file}: no document of {name} to evaluate")
        requests = [requests_of(task, row, tokenizer) for row in rows]
        identity = {
            "version": task.version,
            "data_sha256": fingerprint(rows, requests),
            "limit": limit,
        }
        documents.append(Documents(name, task, rows, requests, identity))
    return documents


def checked_limit(limit: float | None) -> float | None:
    """--limit as a whole number of documents, an int, or as a share of them below 1. Raises ValueError."""
    if limit is None or 0 < limit < 1:
        return limit
    if limit < 1 or not float(limit).is_integer():
        reason = "a whole number of documents, or a share of them below 1"
        raise ValueError(f"--limit {limit:g} is not allowed: {reason}")
    return int(limit)


def document_count(limit: float | None, count: int) -> int | None:
    """How many of a task's `count` documents a limit leaves, as lm-evaluation-harness rounds a share: up."""
    if limit is None:
        return None
    return math.ceil(count * limit) if limit < 1 else int(limit)


def describe_limit(limit: float) -> str:
    """What a table of limited tasks says of them."""
    if limit >= 1:
        return f"only the first {limit} documents of each task (--limit)"
    return f"only the first {100 * limit:g} % of each task's documents, rounded up (--limit)"


def fingerprint(rows: list[dict], requests: list[list[Request]]) -> str:
    """16 digits of the SHA-256 of rows and requests, without what was added to the rows (_doc, _source)."""
    contents, asked = [], []
    for row, group in zip(rows, requests):
        content = {key: value for key, value in row.items() if not key.startswith("_")}
        contents.append(content)
        fields = [vars(request) for request in group]
        asked.append([{key: value for key, value in one.items() if value is not False} for one in fields])
    text = json.dumps([contents, asked])
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()[:16]


def check_room(documents: list[Documents], positions: int) -> None:
    """Raise ValueError for a task whose new tokens leave no room for a prompt in the model's positions."""
    for prepared in documents:
        most = max(request.max_new_tokens for group in prepared.requests for request in group)
        if most >= positions:
            reason = f"{most} new tokens leave no room in the model's {positions} positions"
            raise ValueError(f"--tasks {prepared.name}: {reason}")


def task_rows(name: str, folder: Path) -> list[dict]:
    """All documents of a task, each with its number in the file. Raises ValueError where a file is not."""
    task = TASKS[name]
    path = folder / task.file
    if not path.is_file():
        message = f"--data-dir {folder} has no {path.name}, the rows of {name}"
        if any(name in tasks for tasks in GROUPS.values()):  # a public benchmark
            message += f" (./run.sh get_data {name} --out {folder} fetches it)"
        raise ValueError(message)
    rows = []
    for number, row in enumerate(read_rows([str(path)])):
        rows.append(row | {"_doc": number})
    try:
        return task.prepare(rows, folder)
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        what = "a row, or what belongs beside the rows, is missing or malformed"
        raise ValueError(f"{path}: {what} ({type(error).__name__}: {error})") from None


def requests_of(task: Task, row: dict, tokenizer: Tokenizer) -> list[Request]:
    """A row's requests; a row that lacks what the task needs is a ValueError that names it."""
    try:
        requests = task.requests(row, tokenizer)
        check_requests(requests)
        answers = [Answer()] * len(requests)
        task.score(row, answers)  # a dry run: what scoring needs must be there
    except KeyError as error:
        raise ValueError(f"{row['_source']}: no field {error}") from None
    except (TypeError, ValueError, IndexError, AttributeError, re.error) as error:
        raise ValueError(f"{row['_source']}: {error}") from None
    return requests


def check_requests(requests: list[Request]) -> None:
    """A row asks something, and its prompts are texts."""
    if not requests:
        raise ValueError("no choices")
    for request in requests:
        if not isinstance(request.context, str):
            raise ValueError(f"a prompt must be a text, not {type(request.context).__name__}")


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: list[Documents],
    budget: Budget = Budget(),
) -> tuple[dict[str, dict], list[dict]]:
    """Put prepared tasks to a model; (results, samples).

    results[task] has each metric's mean over the documents that have it, its standard error (sample standard
    deviation over sqrt(n)) as METRIC_stderr, n, and the task's identity. samples has one object per document.
    """
    model.eval()
    results: dict[str, dict] = {}
    samples: list[dict] = []
    for prepared in documents:
        scored = score_documents(model, tokenizer, prepared, budget)
        metrics = [sample["metrics"] for sample in scored]
        group = prepared.task.group
        groups = [group(row) for row in prepared.rows] if group else None
        result = summarise(metrics, groups)
        result["n"] = len(prepared.rows)
        result |= prepared.identity
        not_scored = sum("not_scored" in sample for sample in scored)
        if not_scored:
            result["not_scored"] = not_scored
        results[prepared.name] = result
        samples += scored
    return results, samples


def score_documents(
    model: Transformer, tokenizer: Tokenizer, documents: Documents, budget: Budget
) -> list[dict]:
    """A task's samples: for each document what the model answered, and what that is worth."""
    answers = answer_requests(model, tokenizer, documents, budget)
    samples = []
    for row, requests, replies in zip(documents.rows, documents.requests, answers):
        sample: dict[str, Any] = {"task": documents.name, "doc_id": row["_doc"]}
        if requests[0].continuation is None:
            sample["text"] = replies[0].text
        else:
            sample["loglikelihoods"] = [reply.loglikelihood for reply in replies]
            sample["is_greedy"] = [reply.greedy for reply in replies]
        samples.append(sample | documents.task.score(row, replies))
    return samples


def answer_requests(
    model: Transformer, tokenizer: Tokenizer, documents: Documents, budget: Budget
) -> list[list[Answer]]:
    """The answers to a task's requests, document by document. Raises ValueError where one is not finite.

    Says how many prompts lose their beginning, as they do not fit the model's positions.
    """
    requests, sources = [], []
    for row, group in zip(documents.rows, documents.requests):
        requests += group
        sources += [row["_source"]] * len(group)
    positions, cut = model.config.max_position_embeddings, 0
    scored, pairs = [], []
    to_write: dict[tuple, list[int]] = {}  # requests to write on from, by what they have in common
    for i, request in enumerate(requests):
        if request.continuation is None:
            kind = request.max_new_tokens, request.stop, request.in_template
            to_write.setdefault(kind, []).append(i)
            continue
        try:
            special = not request.in_template
            context, continuation = encode_pair(tokenizer, request.context, request.continuation, special)
            check_length(model, continuation)
        except ValueError as error:
            raise ValueError(f"{sources[i]}: {error}") from None
        check_ids(context + continuation, model.config.vocab_size, model.folder)
        cut += len(context) + len(continuation) > positions + 1
        scored.append(i)
        pairs.append((context, continuation))

    answers = [Answer()] * len(requests)
    found = loglikelihoods(model, pairs, budget.batch_tokens, documents.name)
    for i, answer in zip(scored, found):
        total = answer.loglikelihood
        if not math.isfinite(total):  # an argmax of NaN would look like an answer
            raise ValueError(f"{sources[i]}: {documents.name} has the log-likelihood {total}")
        answers[i] = answer
    for (max_new_tokens, stop, chat), places in to_write.items():
        contexts = [requests[i].context for i in places]
        prompts = [ids for ids, _ in tokenizer.encode(contexts, special=not chat)]
        for ids in prompts:
            check_ids(ids, model.config.vocab_size, model.folder)
            cut += len(ids) + max_new_tokens > positions
        texts = generate(model, tokenizer, prompts, max_new_tokens, stop, budget, documents.name)
        for i, text in zip(places, texts):
            answers[i] = Answer(text=text)
    if cut:
        what = f"{cut} of {len(requests)} prompts are cut at their beginning"
        print0(f"{documents.name}: {what} to fit the model's {positions} positions")

    rest = iter(answers)
    return [list(islice(rest, len(group))) for group in documents.requests]


def summarise(metrics: list[dict], groups: list[str] | None = None) -> dict:
    """Mean and standard error of every metric over the documents that have it; lists are pooled.

    With groups (a name per document) the figures are unweighted means over the groups' figures. The
    perplexity of a task is exp of minus the mean log-likelihood.
    """
    if groups is not None:
        members: dict[str, list[dict]] = {}
        for name, metric in zip(groups, metrics):
            members.setdefault(name, []).append(metric)
        return mean_of_summaries([summarise(members[name]) for name in sorted(members)])
    pooled: dict[str, list[float]] = {}
    for document in metrics:
        for key, value in document.items():
            values = value if isinstance(value, list) else [value]
            pooled.setdefault(key, []).extend(values)
    summary = {}
    for key, values in pooled.items():
        mean, error = mean_and_error(values)
        if key == "perplexity":
            mean = math.exp(-mean) if mean > -700 else math.inf
            error *= mean
        summary[key] = mean
        summary[f"{key}_stderr"] = error
    return summary


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, sample standard deviation over sqrt(n); 0 for a single value."""
    count = len(values)
    mean = sum(values) / count
    squares = sum((value - mean) ** 2 for value in values)
    variance = squares / max(count - 1, 1)
    return mean, math.sqrt(variance / count)


def mean_of_summaries(summaries: list[dict]) -> dict:
    """The unweighted mean of every metric, and its standard error from those of the summaries."""
    count, means, errors = len(summaries), {}, {}
    for key in metrics_of(summaries[0]):
        name = f"{key}_stderr"
        means[key] = sum(summary[key] for summary in summaries) / count
        squares = sum(summary[name] ** 2 for summary in summaries)
        errors[name] = math.sqrt(squares) / count
    return means | errors


def metrics_of(result: dict) -> list[str]:
    """The metrics of a task's result; the first is its primary metric."""
    return [key for key in result if f"{key}_stderr" in result]


def primary_metrics(results: dict[str, dict]) -> dict[str, float]:
    """Each task's primary metric in percent; arithmetic's ten subtasks are one, their mean."""
    percents, of_subtasks = {}, []
    for task, result in results.items():
        metrics = metrics_of(result)
        if not metrics:  # no document could be scored
            continue
        percent = 100 * result[metrics[0]]
        if task in SUBTASKS:
            of_subtasks.append(percent)
        else:
            percents[task] = percent
    if of_subtasks:
        percents["arithmetic"] = sum(of_subtasks) / len(of_subtasks)
    return percents


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that also reads well on a screen."""
    columns = zip(header, *rows)
    widths = [max(len(cell) for cell in column) for column in columns]
    rule = ["-" * width for width in widths]
    lines = []
    for cells in (header, rule, *rows):
        padded = map(str.ljust, cells, widths)
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------- IFEval
#
# A checker takes a reply v and the instruction's arguments, named as in the data's kwargs. Over patterns
# all() and any() get lists, no generators: so the dry run in requests_of meets every pattern of a row.


def follows(reply: str, name: str, arguments: dict) -> bool:
    """Whether a reply that is not blank keeps one instruction."""
    given = {key: value for key, value in arguments.items() if value}
    keeps = IFEVAL[name]
    return bool(keeps(reply, **given) and reply.strip())


def related(count: int, relation: str, bound: int) -> bool:
    """The two relations of IFEval."""
    if relation == "less than":
        return count < bound
    if relation == "at least":
        return count >= bound
    raise ValueError(f"relation {relation!r} is not one of less than, at least")


def split_ends(text: str, pattern: str) -> list[str]:
    """Parts between separators; a blank first or last one is dropped, a blank one in between leaves none."""
    parts = re.split(pattern, text)
    if not parts[0].strip():
        parts = parts[1:]
    if parts and not parts[-1].strip():
        parts = parts[:-1]
    if all(part.strip() for part in parts):
        return parts
    return []


def nth_first_word(v: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """The first word of the nth of exactly so many paragraphs."""
    paragraphs = v.split("\n\n")
    not_blank = [paragraph for paragraph in paragraphs if paragraph.strip()]
    if len(not_blank) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    if not words:
        return False
    word = words[0].lstrip("'").lstrip('"')
    word, *_ = re.split(r"[.,?!'\"]", word)  # it ends at the first of these
    return word.lower() == first_word.lower()


def postscript(v: str, postscript_marker: str) -> bool:
    """A postscript with the marker."""
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = known.get(postscript_marker, rf"\s*{postscript_marker.lower()}.*$")
    return bool(re.findall(pattern, v.lower(), re.M))


def highlighted(v: str, num_highlights: int) -> bool:
    """Enough spans between asterisks that are not blank."""
    spans = re.findall(r"\*[^\n\*]*\*", v)
    spans += re.findall(r"\*\*[^\n\*]*\*\*", v)
    not_blank = [span for span in spans if span.strip("*").strip()]
    return len(not_blank) >= num_highlights


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
    responses = [part.strip() for part in v.split("******")]
    if not responses[0]:
        responses = responses[1:]
    if responses and not responses[-1]:
        responses = responses[:-1]
    if len(responses) != 2 or "" in responses:
        return False
    first, second = responses
    return first != second


def bullets(v: str) -> int:
    """Lines that begin with one asterisk or a dash."""
    asterisks = re.findall(r"^\s*\*[^\*].*$", v, re.M)
    dashes = re.findall(r"^\s*-.*$", v, re.M)
    return len(asterisks) + len(dashes)


def detected(v: str, language: str) -> bool:
    """Whether langdetect takes a text for this language; a text it cannot judge passes."""
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it draws at random unless told not to
    try:
        return langdetect.detect(v) == language
    except langdetect.LangDetectException:
        return True


def sentences(v: str) -> list[str]:
    """The sentences of a text, as nltk finds them."""
    import nltk

    return nltk.sent_tokenize(v)


def capital_words(v: str) -> int:
    """How many words, as nltk finds them, are in capitals."""
    import nltk

    words = nltk.word_tokenize(v)
    return sum(word.isupper() for word in words)


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
        len(sentences(v)), relation, num_sentences
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
        capital_words(v), capital_relation, capital_frequency
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
            sentences("One. Two.")
    except (ImportError, LookupError):
        return False
    return True


# ----------------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises ValueError, before any work, for what cannot be meant."""
    usage = "./run.sh eval --model M --tasks T ... (--help lists the flags)"
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
    add(
        "--template",
        choices=["tulu", "model"],
        help="of --prompt, and of mc and qa if it is the model's own [that of the adapter's run; tulu]",
    )
    add("--data-dir", default="runs/data", help="folder of the row files [runs/data]")
    add(
        "--limit", type=float, help="only the first LIMIT documents of each task; below 1: that share of them"
    )
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
    add(
        "--cache-gib",
        type=float,
        help="memory for the keys and values of replies in flight [that of the weights; at least 2]",
    )
    arguments = parser.parse_args()
    arguments.limit = checked_limit(arguments.limit)
    if arguments.batch_tokens < 1:
        raise ValueError(f"--batch-tokens {arguments.batch_tokens} is not allowed: at least 1")
    if arguments.cache_gib is not None and not 0 < arguments.cache_gib < math.inf:
        raise ValueError(f"--cache-gib {arguments.cache_gib} is not allowed: a number above 0")
    if bool(arguments.tasks) == (arguments.prompt is not None):
        raise ValueError("either --tasks or --prompt is needed")
    for flag in ("limit", "output", "samples"):
        if arguments.prompt is not None and getattr(arguments, flag) is not None:
            raise ValueError(f"--{flag} goes with --tasks, not with --prompt")
    if arguments.tasks and len(arguments.adapter) > 1:
        raise ValueError(f"--tasks take one --adapter at a time, not {len(arguments.adapter)}")
    expand_tasks(arguments.tasks)
    return arguments


def budget_of(arguments: argparse.Namespace) -> Budget:
    """What --batch-tokens and --cache-gib allow."""
    cache_bytes = None
    if arguments.cache_gib is not None:
        cache_bytes = int(arguments.cache_gib * 2**30)
    return Budget(arguments.batch_tokens, cache_bytes)


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
    print0(table(["task", "metric", "value", "stderr", "n"], table_rows(results)))
    if arguments.limit is not None:
        print0(describe_limit(arguments.limit))
    if rank_and_world()[0] != 0:
        return
    if arguments.output:
        source = {"model": arguments.model, "adapter": None, "dtype": arguments.dtype}
        if arguments.adapter:
            source["adapter"] = arguments.adapter[0]
        with_source = {task: result | source for task, result in results.items()}
        write_text(json.dumps(with_source, indent=2) + "\n", arguments.output)
    if arguments.samples:
        write_rows(samples, arguments.samples)


def table_rows(results: dict[str, dict]) -> list[list[str]]:
    """Task, metric, value, standard error and number of documents, a line each; last the tasks' average."""
    rows = []
    for task, result in results.items():
        for metric in metrics_of(result):
            value, error = result[metric], result[f"{metric}_stderr"]
            rows.append([task, metric, f"{value:.4f}", f"{error:.4f}", str(result["n"])])
        if "not_scored" in result:
            what = "not scored (a checker's package is missing)"
            rows.append([task, what, "", "", str(result["not_scored"])])
    percents = primary_metrics(results).values()
    average = sum(percents) / max(len(percents), 1)
    rows.append(["average", "of the tasks' first metrics, percent", f"{average:.2f}", "", ""])
    return rows


def run_config(adapter: str) -> dict:
    """config.json of the run that an adapter lies in, {} where it lies in none."""
    above = Path(adapter).resolve().parents  # RUN/METHOD/seed-S or RUN/reference
    for folder in above[:2]:
        path = folder / "config.json"
        if path.is_file():
            config = read_object(path)
            if "inputs" in config:  # else it may be a model's
                return config
    return {}


def template_of(configs: dict[str, dict]) -> str:
    """The template that the adapters' runs were trained with; else Tulu's. configs: run_config of each."""
    found = {config.get("template", "tulu") for config in configs.values() if config}
    if len(found) > 1:
        raise ValueError("the adapters were trained with different templates: give --template")
    return found.pop() if found else "tulu"


def dates_of(configs: dict[str, dict]) -> list[datetime]:
    """The dates that a template wrote in the adapters' runs, in order."""
    dates = []
    for adapter, config in configs.items():
        if "date" in config:
            try:
                dates.append(datetime.fromisoformat(config["date"]))
            except (TypeError, ValueError):
                what = f"date {config['date']!r} is not a date"
                raise ValueError(f"{adapter}: config.json of its run: {what}") from None
    return sorted(dates)


def describe_template(
    arguments: argparse.Namespace, configs: dict[str, dict], template: str, tokenizer: Tokenizer
) -> list[str]:
    """Notes on questions whose template, or the date in it, not every adapter's run says."""
    if arguments.prompt is None and not {"mc", "qa"} & set(arguments.tasks):
        return []
    lines = []
    for adapter in filter(os.path.isdir, arguments.adapter):  # of one that is not there, load_adapter says so
        if arguments.template is None and not configs[adapter]:
            unknown = f"{adapter} lies in no run, which would say the template that it was trained in"
            lines.append(f"note: {unknown}: --template {template} is taken")
    days = sorted({f"{date:%Y-%m-%d}" for date in dates_of(configs)})
    if len(days) > 1 and tokenizer.template is not None and "strftime_now" in tokenizer.chat_template:
        differing = f"the adapters' runs wrote other dates ({', '.join(days)})"
        lines.append(f"note: {differing}: all are asked with the last")
    return lines


def answer_prompts(
    model: Transformer, tokenizer: Tokenizer, prompts: list[str], adapters: list[str], budget: Budget
) -> None:
    """Print greedy answers of the model alone and of each adapter, to prompts in the template of training."""
    ids = [question_ids(prompt, tokenizer) for prompt in prompts]
    for prompt_ids in ids:
        check_ids(prompt_ids, model.config.vocab_size, model.folder)
    length = min(256, model.config.max_position_embeddings // 2)
    answers = {"base": generate(model, tokenizer, ids, length, budget=budget)}
    for adapter in adapters:
        load_adapter(model, adapter)
        answers[adapter] = generate(model, tokenizer, ids, length, budget=budget)
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
        for adapter in arguments.adapter:
            check_adapter_base(adapter, folder)
        configs = {adapter: run_config(adapter) for adapter in arguments.adapter}
        template = arguments.template or template_of(configs)
        dates = dates_of(configs)
        tokenizer = Tokenizer(folder, template, dates[-1] if dates else None)
        if rank_and_world()[0] == 0:
            for line in describe_template(arguments, configs, template, tokenizer):
                print(line, file=sys.stderr)
        documents = prepare(arguments.tasks, tokenizer, arguments.data_dir, arguments.limit)
        check_room(documents, read_config(folder).max_position_embeddings)
        model = load_model(folder, device, DTYPES[arguments.dtype])
        if arguments.prompt is not None:
            answer_prompts(
                model, tokenizer, prompts_of(arguments.prompt), arguments.adapter, budget_of(arguments)
            )
        else:
            for adapter in arguments.adapter:
                load_adapter(model, adapter)
            write_results(*evaluate(model, tokenizer, documents, budget_of(arguments)), arguments)
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
