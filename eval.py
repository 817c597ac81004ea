"""Log-likelihoods and greedy generation, and the tasks that are made of them. Works on any model and adapter.

    python eval.py --model tests/demo_model --tasks demo_mc demo_qa --data-dir runs/demo/world-0
    python eval.py --model M --adapter RUN/forgetting/seed-0 --tasks paper \
                   --output results.json --samples samples.jsonl
    python eval.py --model M --adapter RUN/full/seed-0 RUN/forgetting/seed-0 --prompt "Why is the sky blue?"
    torchrun --nproc_per_node=2 eval.py ...             # documents spread over ranks, the same results

A task is a function from a data row to requests, and one from the answers to figures; those of the paper are
in tests/tools/benchmarks.py. Requests with one context share its computation: it runs once, and each
continuation goes on from the cache. Losses of whole corpora, which Algorithm 1 is made of, are here, too.
Order: requests, log-likelihoods and generation, losses of a corpus, tasks, evaluation, ranks, command line.
Shapes: T tokens of a pack; C of a corpus; D width; V vocabulary; n tokens that are judged.
"""

import argparse, datetime, hashlib, importlib.util, json, math, os, runpy, signal, sys  # noqa: E401
from contextlib import suppress
from functools import cache, partial
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, NoReturn

if __name__ == "__main__":  # a mistyped flag is answered at once: torch takes seconds to load
    with suppress(FileNotFoundError):
        check = Path(__file__).resolve().parent / "tests" / "tools" / "check_flags.py"
        runpy.run_path(str(check), {"program": "eval.py"})

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data import Corpus, Tokenizer, check_ids, pack, read_object, shift, split_by_tokens, write_rows
from data import write_text
from lora import load_adapter
from model import DTYPES, Cache, Transformer, checkpoint_folder, head_chunks, load_model, to_device
from model import token_losses

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
def loglikelihoods(model: Transformer, pairs: list[tuple[list[int], list[int]]], batch_tokens: int = 4096,
                   bar: tqdm | None = None) -> list[Answer]:
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
def generate(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int,
             stop: str | None = None, batch_tokens: int = 4096, bar: tqdm | None = None) -> list[str]:
    """Greedy continuations of token lists, up to an eos, `stop` or max_new_tokens, without special tokens.

    Prompts are cut from the left to leave room for the new tokens. Many are in flight, each with its length.
    """
    rank, world = rank_and_world()
    positions = model.config.max_position_embeddings
    room = positions - max_new_tokens
    if room < 1:
        raise ValueError(f"{max_new_tokens} new tokens leave no room in {positions} positions")
    prompts = [ids[-room:] or [tokenizer.start_id] for ids in prompts]
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


def _generate_pack(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int,
                   stop: str | None) -> list[list[int]]:
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


# ------------------------------------------------------------------------------------ losses of a corpus


@torch.inference_mode()
def response_losses(model: Transformer, corpus: Corpus, examples: np.ndarray, token_budget: int,
                    bar: tqdm | None = None) -> np.ndarray:
    """Equation 1 for the response tokens of some examples: losses (C,) float32 in nats, NaN elsewhere.

    They are those of the model as it is: with its adapter theta', inside lora_disabled theta. Batches are
    spread over the ranks, the result is on all of them.
    """
    rank, world = rank_and_world()
    head, device = model.lm_head.weight, model.lm_head.weight.device
    losses = torch.zeros(len(corpus.tokens), device=device)  # (C,)
    was_training = model.training
    model.eval()
    mine = examples[np.argsort(-corpus.lengths[examples], kind="stable")][rank::world]
    for batch in pack(corpus, mine, 4 * token_budget):  # nothing is kept for a backward pass: more fits
        judged = torch.from_numpy(corpus.response[batch.places.numpy()])  # (T,)
        rows, targets = (to_device(x, device) for x in shift(batch.tokens, judged))  # (n,) each
        hidden = model(to_device(batch.tokens, device), batch.cu_seqlens)[rows]  # (n, D)
        losses[to_device(batch.places[judged], device)] = token_losses(hidden, head, targets)
        if bar is not None:
            bar.update(len(batch.tokens))
    model.train(was_training)
    places = corpus.places(examples)
    places = places[corpus.response[places]]
    result = np.full(len(corpus.tokens), np.nan, np.float32)
    result[places] = sum_over_ranks(losses).cpu().numpy()[places]
    return result


def mean_losses(model: Transformer, corpus: Corpus, masks: dict[str, np.ndarray], token_budget: int,
                label: str = "") -> dict[str, float | None]:
    """The mean loss, in nats, on each mask of the tokens (C,), of at most 512 examples; None: no token."""
    if not len(corpus):
        return dict.fromkeys(masks)
    sample = np.linspace(0, len(corpus) - 1, min(512, len(corpus))).astype(int)
    total, named = int(corpus.lengths[sample].sum()), " and ".join(masks).replace("L_", "")
    with progress(f"{label} loss on {named}", total, "token") as bar:
        losses = response_losses(model, corpus, sample, token_budget, bar)
    judged = {name: losses[mask & np.isfinite(losses)] for name, mask in masks.items()}
    return {name: float(found.mean()) if len(found) else None for name, found in judged.items()}


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


# ------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Documents:
    """A task's rows with their requests, made once and put to any number of models."""

    name: str
    task: Task
    rows: list[dict]
    requests: list[list[Request]]
    identity: dict  # what results depend on besides the model: version, sha256 of rows, limit, num_fewshot


def prepare(tasks: list[str], tokenizer: Tokenizer, data_dir: str | os.PathLike | None,
            limit: int | None = None, num_fewshot: int = 0) -> list[Documents]:
    """The documents of tasks, or groups of them; all that can be wrong about the rows is found here."""
    documents = []
    benchmarks = load_tool("benchmarks")
    for name in benchmarks.expand_tasks(tasks):
        task = benchmarks.TASKS[name]
        folder = benchmarks.rows_folder(name, task, data_dir)
        rows = benchmarks.task_rows(task, folder / task.file, limit, num_fewshot)
        requests = [requests_of(task, row, tokenizer) for row in rows]
        contents = [(folder / file).read_bytes() for file in (task.file, *task.beside)]
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
        identity = {"version": task.version, "data_sha256": digests[0], "beside_sha256": digests[1:],
                    "limit": limit, "num_fewshot": num_fewshot}
        documents.append(Documents(name, task, rows, requests, identity))
    return documents


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


def evaluate(model: Transformer, tokenizer: Tokenizer, documents: list[Documents],
             batch_tokens: int = 4096) -> tuple[dict[str, dict], list[dict]]:
    """Put prepared tasks to a model; (results, samples).

    results[task] has each metric's mean over the documents that have it, its standard error (sample standard
    deviation over sqrt(n)) as METRIC_stderr, n, and the task's identity. samples has one object per document.
    """
    model.eval()
    results: dict[str, dict] = {}
    samples: list[dict] = []
    summarise = load_tool("benchmarks").summarise
    for prepared in documents:
        name, task = prepared.name, prepared.task
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


def answer_requests(model: Transformer, tokenizer: Tokenizer, documents: Documents,
                    batch_tokens: int) -> list[list[Answer]]:
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


def measure(model: Transformer, tokenizer: Tokenizer, documents: list[Documents],
            table_masks: list[tuple[Corpus, dict[str, np.ndarray]]], token_budget: int, folder: Path) -> dict:
    """The figures of one model, also in folder/results.json: its tasks, and mean_losses by table_masks."""
    path = folder / "results.json"
    identity = {task.name: task.identity for task in documents}
    identity |= {"held-out": c.fingerprint() for c, masks in table_masks if "held-out" in masks and len(c)}
    if path.is_file() and (found := read_object(path)).get("identity") == identity:
        return found
    results: dict[str, Any] = {"identity": identity}
    for corpus, masks in table_masks:
        results |= mean_losses(model, corpus, masks, token_budget, "/".join(folder.parts[-2:]))
    results["tasks"], samples = evaluate(model, tokenizer, documents)
    if rank_and_world()[0] == 0:
        write_rows(samples, folder / "samples.jsonl")
        write_text(json.dumps(results, indent=2) + "\n", path)
    wait_for_all()
    return results


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


class Bar(tqdm):
    """A tqdm bar that writes whole lines where there is no terminal, and whose Ctrl-C says where it was."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the bar; msg is "" where it is to be wiped out."""
        if sys.stderr.isatty():
            return super().display(msg, pos)
        if msg != "":
            print(self, file=sys.stderr, flush=True)
        return False

    def __exit__(self, kind: type | None, *rest: object) -> None:
        super().__exit__(kind, *rest)
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt(f"at {self.desc}, {self.n:,} of {self.total:,} {self.unit}s")


def progress(label: str, total: int, unit: str, done: int = 0, keep: bool = False) -> Bar:
    """A bar on rank 0 that fits its terminal; where there is none, a line of text every half minute."""
    shape, often = "{desc} {bar:6} {n_fmt}/{total_fmt} {remaining} {postfix}", {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        shape, keep = "{desc} {percentage:.0f} % of {total_fmt} {unit}s, {remaining} left {postfix}", False
        often = {"mininterval": 30, "delay": 30}
    if len(label) > 28:  # a variant's name: its figures are wanted more
        label = f"{label[:10]}...{label[-15:]}"
    return Bar(desc=label, total=total, unit=unit, initial=done, unit_scale=total > 9999, bar_format=shape,
               leave=keep, disable=rank_and_world()[0] > 0, **often)


def warn_if_slow(device: str, *dtypes: str, listed: Path = Path("/proc/cpuinfo")) -> None:
    """Say that bfloat16 is slow here, where Linux lists the CPU's instructions and none is for it."""
    if device == "cpu" and "bfloat16" in dtypes and listed.is_file() and "bf16" not in listed.read_text():
        say("warning: this CPU has no instructions for bfloat16: --dtype float32 is many times faster")


def say(text: str) -> None:
    """Print on rank 0."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)


# ----------------------------------------------------------------------------------------- command line


@cache
def load_tool(name: str) -> ModuleType:
    """A program of tests/tools/ as a module: get_data knows public rows' homes, ifeval scores, demo runs."""
    path = Path(__file__).parent / "tests" / "tools" / f"{name}.py"
    if not path.is_file():
        raise ValueError(f"{path} is not there: the program needs its tools, only its functions do without")
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
                name = str(first_rank_first(partial(get_data.fetch_rows, name)))
        found.append(name + colon + count)
    return found


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose flags cannot be shortened."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Exit code 2, without the usage that argparse prints first."""
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def number(kind: type, allowed: str, fits: Callable[[float], bool]) -> Callable[[str], Any]:
    """An argparse type: a finite number that fits; `allowed` says in words which do."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and fits(value)):
            raise argparse.ArgumentTypeError(f"{text} is not allowed: {allowed}")
        return value

    return parse


AT_LEAST_1 = number(int, "from 1, a whole number", lambda x: x >= 1)
WHOLE = number(int, "from 0, a whole number", lambda x: x >= 0)
AT_LEAST_0 = number(float, "from 0, finite", lambda x: x >= 0)
ABOVE_0 = number(float, "more than 0, finite", lambda x: x > 0)
BELOW_1 = number(float, "from 0 to below 1, finite", lambda x: 0 <= x < 1)
UP_TO_1 = number(float, "from 0 to 1, finite", lambda x: 0 <= x <= 1)
SHARE = number(float, "more than 0 to 1, finite", lambda x: 0 < x <= 1)


def option(default: Any, text: str, **rest: Any) -> Any:
    """A field of a dataclass of options with its line of --help; a default may be a function."""
    place = "default_factory" if callable(default) else "default"
    return field(**{place: default}, metadata={"help": text, **rest})


def add_flags(parser: Parser, options: type, groups: dict[str, str], defaults: dict[str, Any]) -> Parser:
    """A flag for each of the options; `groups`: the field that opens a group, and the group's title."""
    group: Any = parser
    for flag in fields(options):
        settings = dict(flag.metadata)
        default = flag.default_factory() if flag.default is MISSING else flag.default
        default = defaults.get(flag.name, default)
        text = settings.pop("help")
        if isinstance(default, list):
            settings["nargs"] = "+"
        if flag.name in groups:
            group = parser.add_argument_group(groups[flag.name])
        if default not in (None, [], False) and "[" not in text:
            text += f" [{' '.join(map(str, default)) if isinstance(default, list) else default}]"
        group.add_argument(f"--{flag.name.replace('_', '-')}", default=default, help=text, **settings)
    return parser


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises ValueError, before any work, for what cannot be meant."""
    parser = Parser(description=__doc__)
    add, dtype = parser.add_argument, "bfloat16" if torch.cuda.is_available() else "float32"
    add("--model", required=True, help="checkpoint folder or Hub id, with an optional @revision")
    add("--adapter", nargs="+", default=[], help="folder of a PEFT-layout adapter; any number with --prompt")
    add("--tasks", nargs="+", default=[], help="of tests/tools/benchmarks.py; `paper`: its five")
    add("--prompt", help="instead of tasks: answer this, without and with each adapter; -: lines of stdin")
    add("--data-dir", help="folder of the row files; without it they are fetched from their public homes")
    add("--limit", type=AT_LEAST_1, help="only the first LIMIT documents of each task")
    add("--num-fewshot", type=WHOLE, default=0, help="worked examples a question [0]")
    add("--output", help="write the results here (.json)")
    add("--samples", help="write one line per document here (.jsonl)")
    add("--dtype", choices=sorted(DTYPES), default=dtype, help=f"of the weights [{dtype}]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--batch-tokens", type=AT_LEAST_1, default=4096, help="tokens of a packed forward pass [4096]")
    arguments = parser.parse_args()
    if bool(arguments.tasks) == (arguments.prompt is not None):
        raise ValueError("either --tasks or --prompt is needed")
    if arguments.tasks and len(arguments.adapter) > 1:
        raise ValueError(f"--tasks take one --adapter at a time, not {len(arguments.adapter)}")
    load_tool("benchmarks").expand_tasks(arguments.tasks)
    for path in filter(None, (arguments.output, arguments.samples)):
        below_a_file = any(parent.is_file() for parent in Path(path).absolute().parents)
        if below_a_file or Path(path).is_dir():
            flag = "output" if path == arguments.output else "samples"
            raise ValueError(f"--{flag} {path} is not allowed: the path of a file, in a folder")
    return arguments


def write_results(results: dict[str, dict], samples: list[dict], arguments: argparse.Namespace) -> None:
    """Print the table, and write what --output and --samples ask for; rank 0 alone."""
    source = {"model": arguments.model, "adapter": (arguments.adapter or [None])[0], "dtype": arguments.dtype}
    results = {task: result | source for task, result in results.items()}
    say(load_tool("look").show(results))
    if arguments.limit is not None:
        say(f"only the first {arguments.limit} documents of each task (--limit)")
    if arguments.output and rank_and_world()[0] == 0:
        write_text(json.dumps(results, indent=2) + "\n", arguments.output)
    if arguments.samples and rank_and_world()[0] == 0:
        write_rows(samples, arguments.samples)


def main() -> None:
    """The command line: exit code 2, and one line, for what the user can mend."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # while loading, check_flags answered Ctrl-C
    try:
        arguments = parse_arguments()
        device = start_ranks(arguments.device)
        folder = first_rank_first(partial(checkpoint_folder, arguments.model))
        tokenizer = Tokenizer(folder)
        which = (arguments.data_dir, arguments.limit, arguments.num_fewshot)
        documents = prepare(arguments.tasks, tokenizer, *which)
        warn_if_slow(device, arguments.dtype)
        model = load_model(folder, device, DTYPES[arguments.dtype])
        if arguments.prompt is not None:
            lines = sys.stdin.read().splitlines() if arguments.prompt == "-" else [arguments.prompt]
            load_tool("look").answer_prompts(model, tokenizer, lines, arguments.adapter)
        else:
            for adapter in arguments.adapter:
                load_adapter(model, adapter)
            write_results(*evaluate(model, tokenizer, documents, arguments.batch_tokens), arguments)
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        if rank_and_world()[0] == 0:
            print("\neval.py:", f"stopped {stop}".strip(), file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
