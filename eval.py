"""Log-likelihoods and greedy generation, and the tasks that are made of them. Works on any model and adapter.

    python eval.py --model tests/demo_model --tasks demo_mc demo_qa --data-dir runs/demo/world-0
    python eval.py --model M --adapter runs/demo/world-0/clean/forgetting/seed-0 --tasks demo_mc --data-dir D \
                   --output results.json --samples samples.jsonl
    torchrun --nproc_per_node=2 eval.py ...                      # documents spread over ranks, the same results

A task is a function from a data row to requests, and one from the answers to figures; TASKS lists them. Requests with
one context share its computation: the context runs once, and each continuation goes on from its rows of the cache.
"""

import argparse
import json
import math
import os
import re
import string
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data import Tokenizer, read_rows, split_by_tokens, write_rows
from lora import load_adapter
from model import DTYPES, Cache, Transformer, checkpoint_folder, head_chunks, load_model

# ------------------------------------------------------------------------------------------------------------- ranks


def start_ranks(device: str) -> str:
    """Join the process group when started by torchrun; the device of this rank ("cuda" becomes "cuda:LOCAL_RANK")."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
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


def say(text: str) -> None:
    """Print on rank 0."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Request:
    """Score `continuation` after `context`, or, if it is None, write on from `context` greedily."""

    context: str
    continuation: str | None = None
    max_new_tokens: int = 0
    stop: str | None = None  # generation ends before this text, and at an eos


@dataclass(frozen=True)
class Answer:
    loglikelihood: float = 0.0  # sum over the continuation's tokens, nats
    greedy: bool = False  # every token was the most probable one
    text: str = ""  # what was written


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of context and continuation, split as lm-evaluation-harness splits them.

    Trailing whitespace of the context moves to the continuation; both together are encoded once, and what exceeds the
    encoded context is the continuation. An empty context becomes the bos token (eos, if there is none).
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


@torch.inference_mode()
def loglikelihoods(
    model: Transformer, pairs: list[tuple[list[int], list[int]]], batch_tokens: int = 4096, bar: tqdm | None = None
) -> list[Answer]:
    """Log-likelihood and greedy flag of each continuation; pairs hold (context ids, continuation ids), neither empty.

    An input longer than the model's positions loses tokens from the left. Contexts run packed, each distinct one once;
    then all but the last token of every continuation run on from the cache. The work is spread over the ranks.
    """
    rank, world = rank_and_world()
    limit = model.config.max_position_embeddings
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        if len(continuation) > limit:
            raise ValueError(f"a continuation of {len(continuation)} tokens exceeds the model's {limit} positions")
        groups.setdefault(tuple((context + continuation)[-(limit + 1) : -len(continuation)]), []).append(i)
    contexts = list(groups)
    sizes = [len(c) + sum(len(pairs[i][1]) - 1 for i in groups[c]) for c in contexts]
    table = torch.zeros(len(pairs), 2, dtype=torch.float64, device=model.lm_head.weight.device)
    for batch in split_by_tokens(sizes, batch_tokens)[rank::world]:
        packed = [contexts[g] for g in batch]
        members = [groups[context] for context in packed]
        table[[i for group in members for i in group]] = _score_pack(model, packed, members, pairs)
        if bar is not None:
            bar.update(sum(map(len, members)))
    return [Answer(loglikelihood=total, greedy=misses == 0) for total, misses in sum_over_ranks(table).tolist()]


def _score_pack(model: Transformer, contexts: list[tuple], members: list[list[int]], pairs: list) -> Tensor:
    """(continuations, 2): log-likelihood, and how many tokens were not the most probable; in the order of `members`."""
    device = model.lm_head.weight.device
    later = [(c, pairs[i][1][:-1]) for c, group in enumerate(members) for i in group]  # (context, all but the last token)
    cache = Cache(model, sum(map(len, contexts)) + sum(len(ids) for _, ids in later))
    hidden, rows = _run(model, cache, contexts, None)
    ends = torch.tensor([own[-1].item() for own in rows], device=device)
    last = hidden[ends]  # (contexts, D): predicts the first token of each continuation
    going_on = [(c, ids) for c, ids in later if ids]
    after = iter(())
    if going_on:
        more, own = _run(model, cache, [ids for _, ids in going_on], [rows[c] for c, _ in going_on])
        after = iter(more.split([len(r) for r in own]))
    states = [torch.cat((last[c : c + 1], next(after))) if ids else last[c : c + 1] for c, ids in later]
    targets = torch.tensor([t for group in members for i in group for t in pairs[i][1]], device=device)
    owner = torch.repeat_interleave(torch.tensor([len(s) for s in states], device=device))
    result = torch.zeros(len(states), 2, dtype=torch.float64, device=device)
    for part, logprobs, loss in head_chunks(torch.cat(states), model.lm_head.weight, targets):
        result[:, 0].index_add_(0, owner[part], -loss.double())
        result[:, 1].index_add_(0, owner[part], (logprobs.argmax(-1) != targets[part]).double())
    return result


def _run(model: Transformer, cache: Cache, sequences: list, past: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """Run token lists through the model; hidden states (T, D) and the cache rows that each sequence took."""
    lengths = [len(ids) for ids in sequences]
    tokens = torch.tensor([t for ids in sequences for t in ids], device=model.lm_head.weight.device)
    rows = torch.arange(cache.used, cache.used + len(tokens)).split(lengths)
    hidden = model(tokens, torch.tensor([0, *lengths]).cumsum(0).int(), cache, past)
    return hidden, list(rows)


@torch.inference_mode()
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: str | None = None,
    batch_tokens: int = 4096,
    bar: tqdm | None = None,
) -> list[str]:
    """Greedy continuations of token lists, up to an eos, `stop` or max_new_tokens, without special tokens.

    Prompts are cut from the left to leave room for the new tokens. Many are in flight at once, each with its own length.
    """
    rank, world = rank_and_world()
    room = model.config.max_position_embeddings - max_new_tokens
    if room < 1:
        raise ValueError(f"{max_new_tokens} new tokens leave no room in {model.config.max_position_embeddings} positions")
    prompts = [ids[-room:] for ids in prompts]
    written = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=model.lm_head.weight.device)
    for batch in split_by_tokens([len(ids) + max_new_tokens for ids in prompts], batch_tokens)[rank::world]:
        for i, ids in zip(batch, _generate_pack(model, tokenizer, [prompts[i] for i in batch], max_new_tokens, stop)):
            written[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64) + 1  # 0 stays "nothing written"
        if bar is not None:
            bar.update(len(batch))
    texts = [tokenizer.decode([t - 1 for t in ids if t]) for ids in sum_over_ranks(written).tolist()]
    return [text.split(stop)[0] if stop else text for text in texts]


def _generate_pack(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int, stop: str | None
) -> list[list[int]]:
    cache = Cache(model, sum(len(ids) + max_new_tokens for ids in prompts))
    written: list[list[int]] = [[] for _ in prompts]
    active, inputs, past = list(range(len(prompts))), prompts, None
    for _ in range(max_new_tokens):
        hidden, rows = _run(model, cache, inputs, past)
        past = rows if past is None else [torch.cat(pair) for pair in zip(past, rows)]
        ends = torch.tensor([len(ids) for ids in inputs]).cumsum(0) - 1
        tokens = model.lm_head(hidden[ends.to(hidden.device)]).argmax(-1).tolist()  # (active,)
        going = []
        for place, (i, token) in enumerate(zip(active, tokens)):
            if token != tokenizer.eos_id:
                written[i].append(token)
                if not stop or stop not in tokenizer.decode(written[i]):
                    going.append(place)
        active, past = [active[p] for p in going], [past[p] for p in going]
        inputs = [written[i][-1:] for i in active]
        if not active:
            break
    return written


# ------------------------------------------------------------------------------------------------------------- tasks


def words_of(text: str) -> list[str]:
    """Words as SQuAD compares them: lower case, no ASCII punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1_score(prediction: str, answer: str) -> float:
    """Word overlap F1 of SQuAD, 0 to 1; 0 if nothing is shared."""
    said, right = words_of(prediction), words_of(answer)
    shared = sum((Counter(said) & Counter(right)).values())
    return 2 * shared / (len(said) + len(right)) if shared else 0.0


@dataclass(frozen=True)
class Task:
    """`requests(row)` lists what to ask; `score(row, answers)` gives prediction, target and metrics of the document."""

    file: str
    requests: Callable[[dict], list[Request]]
    score: Callable[[dict, list[Answer]], dict]


def demo_mc_requests(row: dict) -> list[Request]:
    return [Request(row["prompt"] + row["head"], choice) for choice in row["choices"]]


def demo_mc_score(row: dict, answers: list[Answer]) -> dict:
    best = max(range(len(answers)), key=lambda i: answers[i].loglikelihood)
    gold = row["choices"].index(row["answer"])
    return {"prediction": best, "target": gold, "metrics": {"acc": float(best == gold)}}


def demo_qa_requests(row: dict) -> list[Request]:
    return [Request(row["prompt"], max_new_tokens=16)]


def demo_qa_score(row: dict, answers: list[Answer]) -> dict:
    """F1; and, where people never seen in training are asked about a misconceived attribute, is the popular error said?"""
    said = answers[0].text
    metrics = {"f1": f1_score(said, row["answer"])}
    if row["group"] == "unseen, misconceived":
        metrics["popular"] = float(row["popular"] in said.split())
    return {"prediction": said, "target": row["answer"], "metrics": metrics}


TASKS = {
    "demo_mc": Task("demo_mc.jsonl", demo_mc_requests, demo_mc_score),
    "demo_qa": Task("demo_qa.jsonl", demo_qa_requests, demo_qa_score),
}


def check_tasks(names: list[str]) -> None:
    """Raise ValueError for a task that is not in TASKS."""
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"unknown task {', '.join(unknown)}; known: {', '.join(TASKS)}")


def answer_requests(
    model: Transformer, tokenizer: Tokenizer, requests: list[Request], batch_tokens: int, label: str
) -> list[Answer]:
    """The answers in the order of the requests, under one progress bar."""
    answers: list[Answer] = [Answer()] * len(requests)
    scored = [i for i, request in enumerate(requests) if request.continuation is not None]
    kinds: dict[tuple, list[int]] = {}
    for i, request in enumerate(requests):
        if request.continuation is None:
            kinds.setdefault((request.max_new_tokens, request.stop), []).append(i)
    rank, _ = rank_and_world()
    with tqdm(total=len(requests), desc=label, unit="request", disable=rank > 0, leave=False) as bar:
        pairs = [encode_pair(tokenizer, requests[i].context, requests[i].continuation) for i in scored]
        for i, answer in zip(scored, loglikelihoods(model, pairs, batch_tokens, bar)):
            answers[i] = answer
        for (max_new_tokens, stop), group in kinds.items():
            prompts = [ids for ids, _ in tokenizer.encode([requests[i].context for i in group])]
            texts = generate(model, tokenizer, prompts, max_new_tokens, stop, batch_tokens, bar)
            for i, text in zip(group, texts):
                answers[i] = Answer(text=text)
    return answers


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: list[str],
    data_dir: str | os.PathLike,
    limit: int | None = None,
    batch_tokens: int = 4096,
) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """Run tasks on the rows of data_dir; (results, samples).

    results[task] has each metric's mean over the documents that have it, its standard error (sample standard deviation
    over sqrt(n)) as METRIC_stderr, and n, the number of documents. samples has one object per task and document.
    """
    check_tasks(tasks)
    model.eval()
    results: dict[str, dict[str, float]] = {}
    samples: list[dict] = []
    for name in tasks:
        task = TASKS[name]
        rows = read_rows([str(Path(data_dir) / task.file)])[:limit]
        try:
            requests = [task.requests(row) for row in rows]
        except KeyError as error:
            raise ValueError(f"{Path(data_dir) / task.file}: a row has no field {error}") from None
        flat = [request for group in requests for request in group]
        answers = iter(answer_requests(model, tokenizer, flat, batch_tokens, name))
        documents = []
        for doc_id, (row, group) in enumerate(zip(rows, requests)):
            own = [next(answers) for _ in group]
            said = {"loglikelihoods": [a.loglikelihood for a in own]} if group[0].continuation else {"text": own[0].text}
            documents.append({"task": name, "doc_id": doc_id} | said | task.score(row, own))
        results[name] = summarise([document["metrics"] for document in documents]) | {"n": len(rows)}
        samples += documents
    return results, samples


def summarise(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Mean and standard error of every metric over the documents that have it."""
    summary: dict[str, float] = {}
    for key in dict.fromkeys(key for one in metrics for key in one):
        values = [one[key] for one in metrics if key in one]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
        summary |= {key: mean, f"{key}_stderr": math.sqrt(variance / len(values))}
    return summary


def spread(values: list[float], digits: int = 1, sign: str = "") -> str:
    """mean +- sample standard deviation; the mean alone of a single value."""
    deviation = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{deviation}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that also reads well on a screen."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id, with an optional @revision")
    parser.add_argument("--adapter", help="folder of a PEFT-layout LoRA adapter")
    parser.add_argument("--tasks", nargs="+", required=True, help=f"any of {', '.join(TASKS)}")
    parser.add_argument("--data-dir", required=True, help="folder of the row files")
    parser.add_argument("--limit", type=int, help="only the first LIMIT documents of each task")
    parser.add_argument("--output", help="write the results here (.json)")
    parser.add_argument("--samples", help="write one line per document here (.jsonl)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens of a packed forward pass")
    arguments = parser.parse_args()
    try:
        check_tasks(arguments.tasks)
        device = start_ranks(arguments.device)
        folder = checkpoint_folder(arguments.model)
        model, tokenizer = load_model(folder, device, DTYPES[arguments.dtype]), Tokenizer(folder)
        if arguments.adapter:
            load_adapter(model, arguments.adapter)
        results, samples = evaluate(
            model, tokenizer, arguments.tasks, arguments.data_dir, arguments.limit, arguments.batch_tokens
        )
    except ValueError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    if rank_and_world()[0] == 0:
        for task, metrics in results.items():
            figures = (f"{k} {v:.4f} +- {metrics[k + '_stderr']:.4f}" for k, v in metrics.items() if k + "_stderr" in metrics)
            print(f"{task:24} n {metrics['n']:6}  {'  '.join(figures)}")
        if arguments.limit is not None:
            print(f"only the first {arguments.limit} documents of each task (--limit)")
        if arguments.output:
            write_text(json.dumps(results, indent=2) + "\n", arguments.output)
        if arguments.samples:
            write_rows(samples, arguments.samples)
    if dist.is_initialized():
        dist.destroy_process_group()


def write_text(text: str, path: str | os.PathLike) -> None:
    """Write a text file, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
