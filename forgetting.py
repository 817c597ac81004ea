"""Forgetting: score every response token, keep the best, unlearn the rest (arXiv 2508.04329, Algorithm 1).

    python forgetting.py                                                    # the embedded demo: no model, no data needed
    python forgetting.py --model M --data rows.jsonl --out RUN              # a Llama-style checkpoint and your rows
    torchrun --nproc_per_node=8 forgetting.py --model meta-llama/Llama-3.2-1B --data rows.jsonl --out RUN

    1. reference   theta' = LoRA fine-tune of theta on D_ref
    2. scores      Q(y) = loss(y; theta) - loss(y; theta'), every response token of D_train       equations 4, 5
    3. partition   P = {Q >= F(1 - rho)} over the whole corpus, N = the rest                      equations 6, 7
    4. training    minimise mean_P loss - lambda(step) mean_N loss, from theta again              equation 8

One idea carries the file: every method is a *signed weight per token*, +1/n_P, -lambda/n_N or 0, with n_P and n_N counted
over the whole optimiser step. The weights are known before the forward pass, so the output head runs only where they are
not 0, and splitting a step into micro-batches, or over ranks, changes nothing but the draw of the dropout masks.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import data
from data import Corpus, Tokenizer, build_corpus, check_ids, detection, pack, read_rows, shift, unique_rows
from eval import (
    Parser,
    data_digests,
    evaluate,
    expand_tasks,
    first_rank_first,
    headlines,
    prepare,
    rank_and_world,
    say,
    spread,
    start_ranks,
    sum_over_ranks,
    table,
    wait_for_all,
    write_text,
)
from lora import (
    DEFAULT_TARGETS,
    add_lora,
    load_adapter,
    lora_disabled,
    lora_parameters,
    merge_lora,
    read_object,
    remove_lora,
    save_adapter,
    target_layers,
    whole_file,
)
from model import (
    DTYPES,
    Transformer,
    checkpoint_folder,
    head_chunks,
    load_model,
    model_fingerprint,
    read_config,
    save_model,
    to_device,
    token_losses,
)

# ------------------------------------------------------------------------------------------------------ the equations


def quality_scores(base_loss: np.ndarray, ref_loss: np.ndarray) -> np.ndarray:
    """Equations 4 and 5: Q = loss(y; theta) - loss(y; theta'), how much easier the reference finds a token.

    Both (n,) float32 nats; (n,) float32 comes back. High: worth learning. Low or negative: the reference moved away.
    """
    return base_loss - ref_loss


def quantile(values: np.ndarray, share: float) -> float:
    """F(share), exactly: np.quantile(values, share, method="higher"), safe from the rounding of 1 - 0.7.

    One selection, O(n): a threshold over 20 million tokens is found without sorting them.
    """
    place = math.ceil(round(share * (len(values) - 1), 6))
    return float(np.partition(values, place)[place])


def partition(quality: np.ndarray, rho: float, forget_rate: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Equations 6 and 7: P = {Q >= F(1 - rho)} and N, (n,) bool each, with one threshold over all of `quality` (n,).

    Ties with the threshold are positive. N is the rest, or, with a forget rate below 1 - rho, only {Q < F(forget_rate)}:
    what lies between is in neither. Raises ValueError for a share that is out of range.
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho {rho} is not allowed: more than 0, at most 1")
    if forget_rate is not None and not 0 <= forget_rate <= 1 - rho + 1e-9:
        raise ValueError(f"forget rate {forget_rate} is not allowed: from 0 to 1 - rho = {1 - rho:.4g}")
    if len(quality) == 0:
        raise ValueError("nothing to partition: no response token was scored")
    if not np.isfinite(quality).all():
        raise ValueError(f"{int((~np.isfinite(quality)).sum())} quality scores are not finite")
    positive = quality >= quantile(quality, 1 - rho)
    negative = ~positive if forget_rate is None else ~positive & (quality < quantile(quality, forget_rate))
    return positive, negative


def lambda_at(step: int, total_steps: int, t_min: float, t_max: float) -> float:
    """The paper's schedule of the forgetting strength, (t_max - t_min) * step / total_steps; step counts from 0."""
    return (t_max - t_min) * step / total_steps


def token_weights(positive: Tensor, negative: Tensor, lam: float, counts: tuple[int, int] | None = None) -> Tensor:
    """Equation 8 as a weight per token: +1/n_P on P, -lam/n_N on N, 0 elsewhere; masks (T,) bool -> (T,) float32.

    counts are n_P and n_N of the whole optimiser step when the masks cover only a part of it. An empty set weighs nothing.
    """
    n_positive, n_negative = counts or (int(positive.sum()), int(negative.sum()))
    return positive / max(n_positive, 1) - negative * (lam / max(n_negative, 1))


class _WeightedTokenLoss(torch.autograd.Function):
    """Loss and gradient with respect to the hidden states in one sweep: logits of a chunk live only inside its turn."""

    @staticmethod
    def forward(ctx, hidden, head_weight, targets, weights, max_negative_loss, losses):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)  # (n, D)
        for rows, logprobs, loss in head_chunks(hidden.detach(), head_weight, targets):
            weight = weights[rows]
            if max_negative_loss is not None:
                weight = weight.masked_fill((weight < 0) & (loss > max_negative_loss), 0)
            total += weight @ loss
            if losses is not None:
                losses[rows] = loss
            dlogits = logprobs.exp_()  # (chunk, V): softmax - one_hot, times the weight
            dlogits[torch.arange(len(loss), device=loss.device), targets[rows]] -= 1
            grad[rows] = dlogits.mul_(weight[:, None]).to(head_weight.dtype) @ head_weight
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None, None, None, None, None


def weighted_token_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    max_negative_loss: float | None = None,
    losses: Tensor | None = None,
) -> Tensor:
    """Equation 8: sum_t w_t loss_t, differentiable in hidden (the head is frozen); a float32 scalar.

    hidden (n, D) holds the state before each target, head_weight (V, D), targets (n,) int64, weights (n,) float32 from
    token_weights. No (n, V) tensor ever exists. max_negative_loss (nats) stops the ascent on tokens less probable than
    exp(-it): the forgetting-clipped variant. If `losses` (n,) float32 is given, the loss of each token is stored there.
    """
    return _WeightedTokenLoss.apply(hidden, head_weight, targets, weights, max_negative_loss, losses)


# ------------------------------------------------------------------------------------------------ methods and options


@dataclass(frozen=True)
class Method:
    """How a method turns scores into signs: +1 learn, -1 unlearn, 0 leave out."""

    rho: float  # the share kept when --rho does not say
    unlearn: bool = False  # N gets sign -1 instead of 0
    by_sequence: bool = False  # partition sequences by their mean Q instead of tokens
    random: bool = False  # a control: the same share, drawn at random
    max_negative_loss: float | None = None  # no ascent on a token less probable than exp(-this)


METHODS = {
    "full": Method(rho=1.0),
    "ignoring": Method(rho=0.5),
    "ignoring-random": Method(rho=0.5, random=True),
    "forgetting": Method(rho=0.7, unlearn=True),
    "forgetting-clipped": Method(rho=0.7, unlearn=True, max_negative_loss=-math.log(1e-3)),
    "ignoring-sequence": Method(rho=0.5, by_sequence=True),
    "forgetting-sequence": Method(rho=0.7, unlearn=True, by_sequence=True),
}
UNTRAINED = ("base", "reference")  # rows of the table that stage 4 does not train


def option(default: Any, text: str, **rest: Any) -> Any:
    """A field of Options with its line of --help."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text, **rest})
    return dataclasses.field(default=default, metadata={"help": text, **rest})


@dataclass
class Options:
    """The command line; the defaults are the paper's recipe."""

    model: str | None = option(None, "checkpoint folder or Hub id, with an optional @revision", type=str)
    data: list[str] = option(
        [],
        "training rows: .jsonl or .json files, or named sets (flan_v2, dolly, oasst1, alpaca, wizardlm, paper); :count takes the first",
        nargs="+",
    )
    reference_data: list[str] = option([], "rows of D_ref; without it D_ref is drawn from --data", nargs="+")
    n_reference: int | None = option(None, "examples in D_ref [10,000, or a sixth of a pool under 60,000]", type=int)
    n_train: int | None = option(None, "examples in D_train [50,000, or the rest of a smaller pool]", type=int)
    out: str | None = option(None, "run folder, continued by the same command [runs/demo or runs/latest]", type=str)
    methods: list[str] = option(["base", "reference", "full", "ignoring", "forgetting"], "rows of the table", nargs="+")
    seeds: list[int] = option([0], "one training per method and seed (LoRA init, dropout, order)", nargs="+", type=int)
    world: str = option("popular", "the demo's wrong answers", choices=["popular", "random"])
    rho: float | None = option(None, "share of tokens kept as positive [0.7; ignoring 0.5]", type=float)
    forget_rate: float | None = option(None, "share of lowest-Q tokens unlearned [1 - rho]", type=float)
    lambda_schedule: str = option("linear", "as in the paper, or t-max throughout", choices=["linear", "constant"])
    t_min: float = option(1e-5, "lambda rises with slope t-max - t-min (the paper: 1e-5 for 1B, 1e-4 for 3B and 8B)")
    t_max: float = option(0.25, "lambda nears t-max - t-min at the end of training")
    rank: int = option(64, "LoRA rank")
    alpha: float = option(16.0, "LoRA alpha; the side path is scaled by alpha / rank")
    dropout: float = option(0.1, "LoRA dropout")
    targets: list[str] = option(list(DEFAULT_TARGETS), "layers that get an adapter; of the default, those there are", nargs="+")
    lr: float = option(1e-4, "peak learning rate of AdamW (no weight decay)")
    warmup: float = option(0.03, "share of the steps in which the rate rises from 0; then it falls to 0")
    batch_size: int = option(24, "sequences a step, over all ranks")
    epochs: int = option(1, "passes over D_train")
    reference_lr: float | None = option(None, "peak rate of the reference [--lr]", type=float)
    reference_epochs: int | None = option(None, "passes over D_ref [--epochs]", type=int)
    max_length: int = option(2048, "tokens an example is cut to")
    micro_tokens: int = option(
        8192 if torch.cuda.is_available() else 4096, "tokens of one packed forward pass; with dropout 0 the result is the same"
    )
    max_grad_norm: float = option(0.0, "clip the gradient to this norm; 0: off, as in the paper")
    dtype: str = option("bfloat16" if torch.cuda.is_available() else "float32", "of the frozen weights", choices=sorted(DTYPES))
    score_dtype: str | None = option(None, "of the weights while scoring [--dtype]", choices=sorted(DTYPES))
    checkpoint_activations: bool = option(
        False, "less memory in training: blocks run a second time in the backward pass", action="store_true"
    )
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    save_every: int = option(100, "steps between checkpoints")
    overwrite: bool = option(False, "start over where results of other inputs are", action="store_true")
    export: bool = option(False, "also save each trained model with its adapter merged in", action="store_true")
    tasks: list[str] = option([], "tasks of eval.py for the table", nargs="+")
    data_dir: str | None = option(None, "folder of the tasks' rows [fetched from their public homes]", type=str)
    limit: int | None = option(None, "only the first LIMIT documents of each task", type=int)


DEMO_MODEL = Path(__file__).parent / "tests" / "demo_model"
DEMO = {  # small model, few steps: the paper's rate of 1e-4 would leave it where it was
    "model": str(DEMO_MODEL),
    "seeds": [0, 1, 2],
    "lr": 3e-3,
    "reference_lr": 1e-2,
    "reference_epochs": 2,
    "rho": 0.7,
    "max_grad_norm": 1.0,
    "methods": ["base", "reference", "full", "ignoring-random", "ignoring", "forgetting", "forgetting-clipped"],
}
DEMO_PANELS = {
    "clean": "Reference trained on clean rows",
    "same": "Reference trained on rows as noisy as the training set (the paper's protocol)",
}
REFERENCE_FREE = ("base", "full", "ignoring-random")  # methods that do not look at the reference


def parse_options(argv: list[str] | None = None) -> tuple[Options, bool]:
    """The command line as Options, and whether it asks for the demo (neither --model nor --data)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Options):
        rest = dict(field.metadata)
        text = rest.pop("help")
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if default not in (None, [], False) and "[" not in text:
            text += f" [{' '.join(map(str, default)) if isinstance(default, list) else default}]"
        if "type" not in rest and "action" not in rest and isinstance(default, (int, float)):
            rest["type"] = type(default)
        parser.add_argument("--" + field.name.replace("_", "-"), default=default, help=text, **rest)
    parsed = parser.parse_args(argv)
    demo = parsed.model is None and not parsed.data
    if demo:
        parser.set_defaults(**DEMO)
        parsed = parser.parse_args(argv)
    return Options(**vars(parsed)), demo


def check_options(options: Options) -> None:
    """Raise ValueError, before any work, for options that cannot be meant."""
    known = [*UNTRAINED, *METHODS]
    if unknown := [m for m in options.methods if m not in known]:
        raise ValueError(f"unknown method {', '.join(unknown)}; known: {', '.join(known)}")
    for name in ("methods", "seeds"):
        values = getattr(options, name)
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise ValueError(f"--{name} names {twice[0]} twice")
    if Path(options.out).exists() and not Path(options.out).is_dir():
        raise ValueError(f"--out {options.out} is a file: a folder is needed")
    expand_tasks(options.tasks)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit {options.limit} is not allowed: at least 1")
    if min(options.seeds) < 0:
        raise ValueError(f"--seeds {min(options.seeds)} is not allowed: at least 0")
    for name in ("lr", "reference_lr", "alpha"):
        if getattr(options, name) is not None and not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} is not allowed: more than 0, and finite")
    for name in ("t_min", "t_max", "max_grad_norm"):
        if not 0 <= getattr(options, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} is not allowed: at least 0, and finite")
    if options.rho is not None or options.forget_rate is not None:
        partition(np.zeros(1), 0.7 if options.rho is None else options.rho, options.forget_rate)
    if options.t_max < options.t_min:
        raise ValueError(f"--t-max {options.t_max} is below --t-min {options.t_min}")
    for name in ("batch_size", "epochs", "reference_epochs", "rank", "max_length", "micro_tokens", "save_every"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} is not allowed: at least 1")
    for name, high in (("dropout", 1.0), ("warmup", 1.0)):
        if not 0 <= getattr(options, name) < high:
            raise ValueError(f"--{name} {getattr(options, name)} is not allowed: from 0 to below {high:g}")


# ----------------------------------------------------------------------------------------------------------- the data


def select_data(options: Options, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """D_ref and D_train as corpora: exact duplicates removed, then disjoint draws, the same for every seed and method."""
    rows = unique_rows(first_rank_first(lambda: read_rows(options.data)), tokenizer.eos)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    if options.reference_data:
        reference = unique_rows(first_rank_first(lambda: read_rows(options.reference_data)), tokenizer.eos)
        reference = reference[: _count(options.n_reference, len(reference), len(reference), "--n-reference", "given apart")]
        shuffled = unique_rows(reference + shuffled, tokenizer.eos)[len(reference) :]
    else:
        if len(rows) < 2:
            raise ValueError(f"{' '.join(options.data)}: one distinct row cannot be split into D_ref and D_train: at least 2")
        paper = 10_000 if len(rows) >= 60_000 else max(len(rows) // 6, 1)
        n_reference = _count(options.n_reference, paper, len(rows) - 1, "--n-reference")
        reference, shuffled = shuffled[:n_reference], shuffled[n_reference:]
    if not shuffled:
        raise ValueError(f"{' '.join(options.data)}: no row is left for D_train, all {len(rows)} are in --reference-data")
    besides = f"{len(reference)} more are D_ref"
    train = shuffled[: _count(options.n_train, min(50_000, len(shuffled)), len(shuffled), "--n-train", besides)]
    return tuple(build_corpus(part, tokenizer, options.max_length) for part in (reference, train))


def _count(asked: int | None, default: int, most: int, flag: str, besides: str = "at least 1 more must be left") -> int:
    count = default if asked is None else asked
    if not 1 <= count <= most:
        raise ValueError(f"{flag} {count}: from 1 to {most} are there, exact duplicates taken out; {besides}")
    return count


# ----------------------------------------------------------------------------------------------------- stages 1 and 4


def learning_rate_at(step: int, total_steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up from 0 over ceil(warmup * total) steps, then linear decay to 0; step counts from 0."""
    rising = math.ceil(warmup * total_steps)
    if step < rising:
        return peak * step / rising
    return peak * (total_steps - step) / max(total_steps - rising, 1)


def accumulate(
    model: Transformer,
    corpus: Corpus,
    signs: np.ndarray,
    examples: np.ndarray,
    lam: float,
    token_budget: int,
    max_negative_loss: float | None = None,
) -> tuple[Tensor, tuple[int, int]]:
    """Add the gradient of equation 8 over one optimiser step to the parameters' .grad, micro-batch by micro-batch.

    examples are those of the whole step; this rank runs its share of them, with weights that count P and N over all.
    Returns (3,) this rank's part of the objective and its sums of losses over P and over N (a token of weight 0 is not
    run), and n_P and n_N of the step.
    """
    rank, world = rank_and_world()
    head, device = model.lm_head.weight, model.lm_head.weight.device
    step_signs = signs[corpus.places(examples)]
    counts = int((step_signs > 0).sum()), int((step_signs < 0).sum())
    sums = torch.zeros(3, device=device)
    by_length = sorted(examples.tolist(), key=lambda example: -corpus.lengths[example])
    for batch in pack(corpus, by_length[rank::world], token_budget):
        sign = torch.from_numpy(signs[batch.places.numpy()])  # (T,) int8
        weights = token_weights(sign > 0, sign < 0, lam, counts)  # (T,)
        rows, targets = (to_device(x, device) for x in shift(batch.tokens, weights != 0))  # (n,) each
        if not len(rows):
            continue  # nothing here is in P or N: no contribution
        weights = to_device(weights[weights != 0], device)  # (n,)
        hidden = model(to_device(batch.tokens, device), batch.cu_seqlens)[rows]  # (n, D)
        losses = torch.empty(len(rows), device=device)
        loss = weighted_token_loss(hidden, head, targets, weights, max_negative_loss, losses)
        loss.backward()
        sums += torch.stack((loss.detach(), losses @ (weights > 0).float(), losses @ (weights < 0).float()))
    return sums, counts


def fresh_adapter(model: Transformer, options: Options, seed: int) -> tuple[dict, torch.optim.Optimizer, Tensor]:
    """A new adapter on the model, its AdamW, and one flat buffer (n,) that is the gradient of all its parameters."""
    generator = torch.Generator().manual_seed(seed)
    add_lora(model, options.rank, options.alpha, options.dropout, tuple(options.targets), generator=generator)
    parameters = lora_parameters(model)
    gradient = torch.zeros(sum(p.numel() for p in parameters.values()), device=model.lm_head.weight.device)
    for parameter, view in zip(parameters.values(), gradient.split([p.numel() for p in parameters.values()])):
        parameter.grad = view.view_as(parameter)  # backward adds straight into the buffer that the ranks sum
    return parameters, torch.optim.AdamW(parameters.values(), weight_decay=0.0, fused=True), gradient


def examples_of(step: int, count: int, batch_size: int, seed: int) -> np.ndarray:
    """The examples of an optimiser step: every epoch is a permutation of all `count`, drawn from (seed, epoch)."""
    epoch, place = divmod(step, math.ceil(count / batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[place * batch_size : (place + 1) * batch_size]


def train(
    model: Transformer,
    corpus: Corpus,
    signs: np.ndarray,
    folder: Path,
    options: Options,
    seed: int,
    lr: float,
    epochs: int,
    max_negative_loss: float | None = None,
) -> None:
    """Fine-tune a fresh adapter towards the tokens whose sign (N,) int8 is +1, and away from those with -1.

    All methods, the reference included, are this loop with other signs. Leaves the adapter on the model and in `folder`,
    with metrics.jsonl; a checkpoint in the folder is continued. Randomness is a function of (seed, step, rank) alone.
    The dropout masks are therefore those of this number of ranks and this --micro-tokens; all else does not depend on them.
    Raises FloatingPointError, with the step's figures and examples, when loss or gradient is not finite.
    """
    rank, _ = rank_and_world()
    parameters, optimizer, gradient = fresh_adapter(model, options, seed)
    total_steps = epochs * math.ceil(len(corpus) / options.batch_size)
    if learning_rate_at(total_steps - 1, total_steps, lr, options.warmup) == 0:
        say(f"warning: {folder} is a single step, which warm-up gives rate 0: use more data or epochs, or --warmup 0")
    first = load_checkpoint(folder / "checkpoint", parameters, optimizer)
    log, warned = keep_lines(folder / "metrics.jsonl", first), False
    model.train()
    bar = tqdm(range(first, total_steps), desc=label_of(folder), initial=first, total=total_steps, disable=rank > 0)
    for step in bar:
        began = time.perf_counter()
        examples = examples_of(step, len(corpus), options.batch_size, seed)
        linear = lambda_at(step, total_steps, options.t_min, options.t_max)
        lam = linear if options.lambda_schedule == "linear" else options.t_max
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7], "big"))

        gradient.zero_()
        sums, counts = accumulate(model, corpus, signs, examples, lam, options.micro_tokens, max_negative_loss)
        sum_over_ranks(gradient)
        measured = torch.cat((sum_over_ranks(sums), torch.linalg.vector_norm(gradient)[None]))
        loss, *totals, norm = measured.tolist()  # the one place in a step where the host waits for a GPU
        l_positive, l_negative = (total / max(n, 1) for total, n in zip(totals, counts))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            state = f"lambda {lam:.4g}, L_P {l_positive:.4g}, L_N {l_negative:.4g}, gradient norm {norm:.4g}"
            raise FloatingPointError(f"{folder}: not finite at step {step}: {state}, examples {examples.tolist()}")
        if options.max_grad_norm > 0:
            gradient *= min(1.0, options.max_grad_norm / (norm + 1e-6))
        rate = optimizer.param_groups[0]["lr"] = learning_rate_at(step, total_steps, lr, options.warmup)
        optimizer.step()

        speed = int(corpus.lengths[examples].sum()) / (time.perf_counter() - began)
        figures = {"step": step, "loss": loss, "L_P": l_positive, "L_N": l_negative if lam and counts[1] else None,
                   "lambda": lam, "lr": rate, "grad_norm": norm, "tokens/s": speed}  # fmt: skip
        watch(bar, figures)
        log.append(figures)
        if not warned and len(log) % 10 == 0 and (warned := forgetting_hurts(log)):
            say(f"warning: {folder}, step {step}: L_P is above its start, and L_N too: lambda {lam:.3g} unlearns more than it "
                "teaches; use a lower --t-max or --lr, or forgetting-clipped")  # fmt: skip
        if rank == 0:
            add_line(figures, folder / "metrics.jsonl")
            if (step + 1) % options.save_every == 0 and step + 1 < total_steps:
                save_checkpoint(folder / "checkpoint", parameters, optimizer, step + 1)
    if rank == 0:
        save_adapter(model, folder, options.model)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    wait_for_all()


def watch(bar: tqdm, figures: dict) -> None:
    """Show beside a progress bar what a person watches; L_P, L_N and lambda where something is unlearned."""
    names = ("loss", "L_P", "L_N", "lambda", "tokens/s") if figures["L_N"] is not None else ("loss", "tokens/s")
    bar.set_postfix({name: f"{figures[name]:.4g}" for name in names}, refresh=False)


def label_of(folder: Path) -> str:
    """The last parts of a run folder's path, for a progress bar."""
    return "/".join(folder.parts[-2:])


def keep_lines(path: Path, count: int) -> list[dict]:
    """Cut a log to its first lines, and read them: what lies behind the checkpoint that is continued comes again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count] if path.is_file() else []
    try:
        log = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path}: not a whole log ({error}); remove it, the run does not need it") from None
    wait_for_all()
    if rank_and_world()[0] == 0:
        write_text("".join(lines), path)
    return log


def add_line(figures: dict, path: Path) -> None:
    """Append a step's figures to the log. Raises OSError naming it."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
    except OSError as error:
        raise OSError(f"{path}: could not be written, what was there before still is ({error})") from None


def forgetting_hurts(log: list[dict], window: int = 10) -> bool:
    """Whether L_P and L_N are both above their start, as means over the first and the last `window` steps that have both."""
    both = [(line["L_P"], line["L_N"]) for line in log if line["L_N"] is not None]
    if len(both) < 2 * window:
        return False
    start, now = np.mean(both[:window], axis=0), np.mean(both[-window:], axis=0)
    return bool((now > start).all())


def save_checkpoint(folder: Path, parameters: dict, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Adapter, both AdamW moments and the number of steps done, in one file; the one before stays until it is whole."""
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        tensors |= {f"{name}.{key}": optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")}
    with whole_file(folder / "state.safetensors") as file:
        save_file(tensors, file, metadata={"step": str(step)})


def load_checkpoint(folder: Path, parameters: dict, optimizer: torch.optim.Optimizer) -> int:
    """Restore what save_checkpoint wrote, if anything; the number of steps done."""
    path = folder / "state.safetensors"
    if not path.is_file():
        return 0
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a whole checkpoint ({error}); remove it") from None
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])
        moments = {key: tensors[f"{name}.{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}
    return step


# ------------------------------------------------------------------------------------------------------ stages 2 and 3


@torch.inference_mode()
def response_losses(
    model: Transformer, corpus: Corpus, examples: np.ndarray, token_budget: int, label: str, with_base: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Losses (N,) float32 of the examples' response tokens under theta and under theta' = theta with its adapter on.

    NaN elsewhere. One pass over the data runs both on each packed batch, with one copy of the weights. The batches are
    spread over the ranks and the result is on all of them. Without with_base the first array is all NaN.
    """
    rank, world = rank_and_world()
    device, head = model.lm_head.weight.device, model.lm_head.weight
    model.eval()
    table = torch.zeros(2, len(corpus.tokens), device=device)
    mine = examples[np.argsort(-corpus.lengths[examples], kind="stable")][rank::world]
    with tqdm(total=int(corpus.lengths[mine].sum()), desc=label, unit="token", disable=rank > 0) as bar:
        for batch in pack(corpus, mine, 4 * token_budget):  # nothing is kept for a backward pass
            judged = torch.from_numpy(corpus.response[batch.places.numpy()])  # (T,)
            rows, targets = (to_device(x, device) for x in shift(batch.tokens, judged))  # (n,) each
            tokens, places = to_device(batch.tokens, device), to_device(batch.places[judged], device)
            hidden = [model(tokens, batch.cu_seqlens)[rows]]  # under theta', and under theta: (n, D) each
            if with_base:
                with lora_disabled(model):
                    hidden.append(model(tokens, batch.cu_seqlens)[rows])
            losses = token_losses(torch.cat(hidden), head, targets.repeat(len(hidden)))  # one call: the head is read once
            for place, of_model in zip((1, 0), losses.split(len(rows))):
                table[place, places] = of_model
            bar.update(len(tokens))
    table = sum_over_ranks(table).cpu().numpy()
    judged = np.zeros(len(corpus.tokens), bool)
    judged[corpus.places(examples)] = True
    judged &= corpus.response
    base_loss, ref_loss = (
        np.where(judged & shown, losses, np.float32(np.nan)) for losses, shown in zip(table, (with_base, True))
    )
    return base_loss, ref_loss


def choose_signs(method: Method, quality: np.ndarray, corpus: Corpus, options: Options, seed: int) -> np.ndarray:
    """The sign (N,) int8 of every token: +1 in P, -1 in N of a method that unlearns, 0 elsewhere.

    quality (N,) is NaN where nothing is judged. At sequence level a sequence's Q is the mean over its response tokens, the
    threshold is over sequences, and all response tokens share their sequence's side.
    """
    signs = np.zeros(len(corpus.tokens), np.int8)
    response = corpus.response
    rho = options.rho if options.rho is not None and method.rho < 1 else method.rho
    if method.rho == 1:
        signs[response] = 1
        return signs
    if method.by_sequence:
        counts = np.add.reduceat(response, corpus.offsets[:-1], dtype=np.int64)  # (E,)
        scores = np.add.reduceat(np.where(response, quality, 0), corpus.offsets[:-1], dtype=np.float64) / counts
    else:
        scores = quality[response]
    if method.random:
        scores = np.random.default_rng([seed, 1]).random(len(scores))
    positive, negative = partition(scores, rho, options.forget_rate if method.unlearn else None)
    side = positive.astype(np.int8) - negative.astype(np.int8) * method.unlearn
    signs[response] = np.repeat(side, counts) if method.by_sequence else side
    return signs


# --------------------------------------------------------------------------------------------------------- run folder


def same_inputs(where: Path, before: dict | None, now: dict, overwrite: bool) -> bool:
    """Whether an artifact made from the inputs `before` serves `now`. False if there is none, or with `overwrite`.

    Otherwise inputs that differ are a ValueError that names them.
    """
    if before is None or before == now:
        return before is not None
    differing = [f"{k} (there {before.get(k)!r}, now {now.get(k)!r})" for k in before | now if before.get(k) != now.get(k)]
    if not overwrite:
        raise ValueError(f"{where} was made with other {'; '.join(differing)}: use another --out, or --overwrite")
    return False


def read_inputs(folder: Path) -> dict | None:
    """What the adapter or checkpoint in a folder was made from, as claim() noted it; None if there is neither."""
    path = folder / "inputs.json"
    if not path.is_file() and folder.is_dir() and any(file.suffix != ".tmp" for file in folder.iterdir()):
        raise ValueError(f"{folder} holds files that are not of a run: use another --out")
    begun = (folder / "adapter_model.safetensors").is_file() or (folder / "checkpoint").is_dir()
    return read_object(path) if path.is_file() and begun else None


def claim(folder: Path, inputs: dict, overwrite: bool) -> bool:
    """Whether stage `folder` is done: its adapter is there, made from the same inputs (kept in inputs.json).

    What was made from other inputs is an error, or, with overwrite, removed. Every rank gets the same answer.
    """
    rank, _ = rank_and_world()
    adapter = folder / "adapter_model.safetensors"
    serves = same_inputs(folder, read_inputs(folder), inputs, overwrite)
    done = serves and adapter.is_file()
    wait_for_all()
    if rank == 0 and not serves:
        for path in folder.glob("*"):
            if path.name != "inputs.json":  # it says whose folder this is, should the run be killed right here
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_text(json.dumps(inputs, indent=2) + "\n", folder / "inputs.json")
    wait_for_all()
    if done:
        say(f"found {adapter}, skipping")
        if rank == 0:
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)  # of a run stopped between the last two lines of train()
    return done


def measure(
    model: Transformer, tokenizer: Tokenizer, corpus: Corpus, sides: np.ndarray, folder: Path, inputs: dict, options: Options
) -> dict:
    """The figures of one model, also in folder/results.json: the tasks' results, and its mean loss on P and on N.

    The losses are over up to 512 examples of D_train; sides (N,) int8 are forgetting's, the same for every method.
    """
    path = folder / "results.json"
    asked = {"tasks": data_digests(options.tasks, options.data_dir), "limit": options.limit, "inputs": inputs}
    if path.is_file() and (found := read_object(path)).get("asked") == asked:
        return found
    some = np.linspace(0, len(corpus) - 1, min(512, len(corpus))).astype(int)
    _, losses = response_losses(model, corpus, some, options.micro_tokens, f"{label_of(folder)} losses", with_base=False)
    results: dict[str, Any] = {"asked": asked}
    for name, sign in (("L_P", 1), ("L_N", -1)):
        judged = losses[(sides == sign) & np.isfinite(losses)]
        results[name] = float(judged.mean()) if len(judged) else None
    results["tasks"], samples = {}, []
    if options.tasks:
        results["tasks"], samples = evaluate(model, tokenizer, options.tasks, options.data_dir, options.limit)
    if rank_and_world()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        data.write_rows(samples, folder / "samples.jsonl")
        write_text(json.dumps(results, indent=2) + "\n", path)
    wait_for_all()
    return results


def score_inputs(path: Path) -> dict | None:
    """What the scores in a file were made from; None if there is no file."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            return json.loads(file.metadata()["inputs"])
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a whole file of scores ({error}); remove it") from None


def score(model: Transformer, corpus: Corpus, path: Path, inputs: dict, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Stage 2: base_loss and ref_loss (N,) of D_train, from `path` if it was made from the same inputs.

    What is scored is kept beside it every --save-every x --batch-size examples; a run that was stopped goes on from there.
    """
    rank, kept = rank_and_world()[0], partial_scores(path)
    if same_inputs(path, score_inputs(path), inputs, options.overwrite):
        say(f"found {path}, skipping")
        if rank == 0:
            kept.unlink(missing_ok=True)  # of a run stopped before it could do so
        arrays = load_arrays(path)
        return arrays["base_loss"], arrays["ref_loss"]
    at_once = options.save_every * options.batch_size
    losses, done = np.full((2, len(corpus.tokens)), np.nan, np.float32), 0
    if same_inputs(kept, score_inputs(kept), inputs, options.overwrite):
        arrays = load_arrays(kept)
        losses = np.stack((arrays["base_loss"], arrays["ref_loss"]))
        with safe_open(kept, framework="np") as file:
            done = int(file.metadata()["done"])  # examples
    for first in range(done, len(corpus), at_once):
        last = min(first + at_once, len(corpus))
        part, label = corpus.part(first, last), f"{path.parent.name}/scores {last:,}/{len(corpus):,}"
        tokens = slice(corpus.offsets[first], corpus.offsets[last])
        losses[:, tokens] = response_losses(model, part, np.arange(len(part)), options.micro_tokens, label)
        if rank == 0:
            arrays = {"base_loss": losses[0], "ref_loss": losses[1], "offsets": corpus.offsets}
            target, metadata = path, {"inputs": json.dumps(inputs)}
            if last < len(corpus):
                target, metadata = kept, metadata | {"done": str(last)}
            with whole_file(target) as file:
                save_arrays(arrays, file, metadata=metadata)
    if rank == 0:
        kept.unlink(missing_ok=True)
    wait_for_all()
    return losses[0], losses[1]


def partial_scores(path: Path) -> Path:
    """Where the scores of a part of the corpus are kept."""
    return path.with_stem(path.stem + ".part")


def stage_inputs(options: Options, checkpoint: Path, reference_set: Corpus, train_set: Corpus) -> tuple[dict, dict]:
    """What theta' and the scores are made from: equal inputs, equal artifacts."""
    recipe = ("dtype", "rank", "alpha", "dropout", "targets", "warmup", "batch_size", "max_grad_norm")
    common = {"model": model_fingerprint(checkpoint)} | {name: getattr(options, name) for name in recipe}
    reference = {
        "reference data": reference_set.fingerprint(),
        "reference lr": options.lr if options.reference_lr is None else options.reference_lr,
        "reference epochs": options.epochs if options.reference_epochs is None else options.reference_epochs,
    }
    scores = {"reference score dtype": options.score_dtype or options.dtype, "training data": train_set.fingerprint()}
    return common | reference, common | reference | scores


def method_inputs(name: str, seed: int, for_scores: dict, options: Options) -> dict:
    """What a trained adapter is made from; options that its method does not look at may change without harm."""
    method = METHODS[name]
    seen = {key: value for key, value in for_scores.items() if name not in REFERENCE_FREE or not key.startswith("reference")}
    schedule = ["lr", "epochs"] + ["rho"] * (method.rho < 1)
    schedule += ["forget_rate", "lambda_schedule", "t_min", "t_max"] * method.unlearn
    return seen | {key: getattr(options, key) for key in schedule} | {"method": name, "seed": seed}


def refuse_other_runs(out: Path, by_folder: dict[Path, dict], for_scores: dict, overwrite: bool) -> None:
    """Raise ValueError, before anything is written, if the run folder holds artifacts made from other inputs."""
    if (out / "config.json").is_file() and "versions" not in read_object(out / "config.json"):
        raise ValueError(f"{out}: its config.json is not of a run: use another --out")
    for folder, inputs in by_folder.items():
        same_inputs(folder, read_inputs(folder), inputs, overwrite)
    scores = out / "scores.safetensors"
    for path in (scores, partial_scores(scores)):
        same_inputs(path, score_inputs(path), for_scores, overwrite)


def run(options: Options) -> dict:
    """Algorithm 1 on one base model and one pair of data sets; returns what report() shows."""
    if options.model is None or not options.data:
        raise ValueError("--model and --data go together (with neither, the embedded demo runs)")
    check_options(options)
    out = Path(options.out)
    checkpoint = first_rank_first(lambda: checkpoint_folder(options.model))
    config, tokenizer = read_config(checkpoint), Tokenizer(checkpoint)
    reference_set, train_set = select_data(options, tokenizer)
    for corpus in (reference_set, train_set):
        check_ids(corpus.tokens, config.vocab_size, checkpoint)
    for_reference, for_scores = stage_inputs(options, checkpoint, reference_set, train_set)
    trainings = [(m, seed, out / m / f"seed-{seed}") for m in options.methods if m in METHODS for seed in options.seeds]
    for_training = {folder: method_inputs(method, seed, for_scores, options) for method, seed, folder in trainings}
    refuse_other_runs(out, {out / "reference": for_reference, **for_training}, for_scores, options.overwrite)
    for task in expand_tasks(options.tasks):  # rows that are missing or malformed: now, not after hours of training
        prepare(task, tokenizer, options.data_dir, options.limit)
    model = load_model(checkpoint, options.device, DTYPES[options.dtype])
    model.checkpoint_activations = options.checkpoint_activations
    target_layers(model, tuple(options.targets))  # what can be wrong is found before anything is written, or overwritten
    write_config(options, for_scores, out)
    say(f"{out}: {options.model}")
    for name, corpus in (("D_ref", reference_set), ("D_train", train_set)):
        say(f"{name} {len(corpus):,} examples, {len(corpus.tokens):,} tokens, {corpus.response.sum():,} of them response; "
            f"{corpus.dropped} rows dropped for want of a response within {options.max_length} tokens")  # fmt: skip

    # Stage 1: theta', a brief fine-tune on every response token of D_ref
    if claim(out / "reference", for_reference, options.overwrite):
        load_adapter(model, out / "reference")
    else:
        everything = reference_set.response.astype(np.int8)
        train(model, reference_set, everything, out / "reference", options, 0,
              for_reference["reference lr"], for_reference["reference epochs"])  # fmt: skip

    # Stage 2: Q of every response token of D_train; theta and theta' are one set of weights
    scorer = model
    if options.score_dtype not in (None, options.dtype):
        scorer = load_model(checkpoint, options.device, DTYPES[options.score_dtype])
        load_adapter(scorer, out / "reference")
    base_loss, ref_loss = score(scorer, train_set, out / "scores.safetensors", for_scores, options)
    del scorer
    quality = quality_scores(base_loss, ref_loss)  # (N,), NaN where nothing is judged

    # Stage 3, for the rows that are not trained here: L_P and L_N are reported on the sides of plain forgetting
    sides = choose_signs(METHODS["forgetting"], quality, train_set, options, seed=0)
    for_figures = for_scores | {"rho": options.rho, "forget_rate": options.forget_rate}
    figures = lambda folder: measure(model, tokenizer, train_set, sides, folder, for_figures, options)
    results: dict[str, dict] = {}
    if "reference" in options.methods:
        results["reference"] = {"0": figures(out / "reference")}
    remove_lora(model)
    if "base" in options.methods:
        results["base"] = {"0": figures(out / "base")}

    # Stages 3 and 4: for each method its signs, and a fresh adapter on theta
    for name, seed, folder in trainings:
        if claim(folder, for_training[folder], options.overwrite):
            load_adapter(model, folder)
        else:
            signs = choose_signs(METHODS[name], quality, train_set, options, seed)
            limit = METHODS[name].max_negative_loss
            train(model, train_set, signs, folder, options, seed, options.lr, options.epochs, limit)
        results.setdefault(name, {})[str(seed)] = figures(folder)
        remove_lora(model)
        if options.export:
            export(checkpoint, folder, DTYPES[options.dtype])
    return {"methods": {name: results[name] for name in options.methods}, "detection": detection(quality, sides < 0, train_set)}


def write_config(options: Options, inputs: dict, out: Path) -> None:
    """RUN/config.json: every argument, the packages' versions, the hashes of model and data."""
    if rank_and_world()[0] == 0:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")}
        content = dataclasses.asdict(options) | {"versions": versions, "inputs": inputs}
        write_text(json.dumps(content, indent=2) + "\n", out / "config.json")


def export(checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    """RUN/METHOD/seed-S/merged: the base model with the adapter folded in, a checkpoint of its own."""
    if rank_and_world()[0] == 0 and not (folder / "merged" / "config.json").is_file():
        model = load_model(checkpoint, "cpu", dtype)
        load_adapter(model, folder)
        merge_lora(model)
        save_model(model, folder / "merged")
    wait_for_all()


# --------------------------------------------------------------------------------------------------------- the report


def columns(results: dict) -> dict[str, float]:
    """The columns of one trained model: task metrics in percent, the average of each task's first, the two losses."""
    tasks = {}
    for task, result in results["tasks"].items():
        for metric in (key for key in result if f"{key}_stderr" in result):
            tasks[f"{task} {metric}"] = result[metric] * (1 if metric == "perplexity" else 100)
    firsts = headlines(results["tasks"])
    average = {"average": sum(firsts.values()) / len(firsts)} if firsts else {}
    return average | tasks | {name: results[name] for name in ("L_P", "L_N") if results[name] is not None}


def report(results: dict, title: str) -> str:
    """The comparison of one panel: methods, paired differences over seeds, detection of known noise."""
    methods = {name: {seed: columns(r) for seed, r in seeds.items()} for name, seeds in results["methods"].items()}
    names = list(dict.fromkeys(c for seeds in methods.values() for row in seeds.values() for c in row))
    digits = {name: 3 if name.startswith("L_") else 1 for name in names}
    rows = []
    for method, seeds in methods.items():
        cells = [[row[name] for row in seeds.values() if name in row] for name in names]
        rows.append([method, str(len(seeds)), *(spread(v, digits[n]) if v else "" for v, n in zip(cells, names))])
    parts = [f"## {title}", table(["method", "n", *names], rows)]

    compared = [name for name in names if not name.startswith("L_")]
    rows = []
    for baseline in ("full", "ignoring"):
        for method in methods if compared else ():
            both = [seed for seed in methods[method] if seed in methods.get(baseline, {})]
            if method in (baseline, *UNTRAINED) or not both or (baseline == "ignoring" and method == "full"):
                continue
            cells = []
            for name in compared:
                differences = [methods[method][s][name] - methods[baseline][s][name] for s in both]
                lower_is_better = name.endswith((" popular", " perplexity"))
                wins = sum(d < 0 if lower_is_better else d > 0 for d in differences)
                cells.append(f"{spread(differences, sign='+')} ({wins}/{len(both)})")
            rows.append([f"{method} - {baseline}", *cells])
    if rows:
        parts.append(
            "Paired differences over seeds (in how many the first is better; of perplexity and the popular error, less is better):"
        )
        parts.append(table(["pair", *compared], rows))
    if results["detection"]:
        parts.append("Does a low Q find the known noise? (AUC 0.5: chance; the precision of a random N is the noise share.)")
        found = results["detection"]
        parts.append(table(list(found), [[spread(values, 2) for values in found.values()]]))
    return "\n\n".join(parts)


def write_report(panels: dict[str, dict], out: Path, limit: int | None) -> None:
    """results.json, and results.md, which is also printed."""
    text = "\n\n".join(report(results, title) for title, results in panels.items())
    command = "python forgetting.py " + " ".join(sys.argv[1:])
    text += "\n\nmean +- sample standard deviation over n seeds; tasks in percent; L_P, L_N: mean loss, in nats, on the tokens that "
    text += "forgetting keeps and unlearns.\n"
    if limit is not None:
        text += f"Only the first {limit} documents of each task (--limit).\n"
    text += f"Made by `{command.strip()}`.\n"
    if rank_and_world()[0] == 0:
        write_text(json.dumps(panels, indent=2) + "\n", out / "results.json")
        write_text(text, out / "results.md")
        print(f"\n{text}\nwritten to {out / 'results.md'}")


def run_demo(options: Options) -> dict[str, dict]:
    """The embedded demo: for each seed a corpus of its own, and Algorithm 1 with a clean and with an equally noisy D_ref.

    Methods that do not look at the reference are trained once, for the first panel, and shown in both.
    """
    if options.tasks or options.data_dir or options.reference_data:
        raise ValueError("--tasks, --data-dir and --reference-data need --model and --data: the demo brings its own")
    check_options(options)
    for seed in options.seeds:
        refuse_other_world(Path(options.out) / f"world-{seed}", data.demo_rows(options.world, seed), options.overwrite)
    panels: dict[str, dict] = {panel: {"methods": {}, "detection": {}} for panel in DEMO_PANELS}
    for seed in options.seeds:
        world = Path(options.out) / f"world-{seed}"
        if rank_and_world()[0] == 0:
            world.mkdir(parents=True, exist_ok=True)
            for name, rows in data.demo_rows(options.world, seed).items():
                data.write_rows(rows, world / f"{name}.jsonl")
        wait_for_all()
        first: dict = {}
        for panel in DEMO_PANELS:
            methods = [m for m in options.methods if m not in first or m not in REFERENCE_FREE]
            demo = {"tasks": ["demo_mc", "demo_qa"], "data_dir": str(world), "data": [str(world / "train.jsonl")]}
            demo |= {"reference_data": [str(world / f"reference-{panel}.jsonl")], "out": str(world / panel), "seeds": [seed]}
            results = run(dataclasses.replace(options, methods=methods, **demo))
            first = first or results["methods"]
            for method in options.methods:
                of_method = results["methods"].get(method)
                if of_method is None:  # shared with the first panel, whose P and N are not this one's
                    of_method = {"": next(iter(first[method].values())) | {"L_P": None, "L_N": None}}
                panels[panel]["methods"].setdefault(method, {})[str(seed)] = next(iter(of_method.values()))
            for name, value in results["detection"].items():
                panels[panel]["detection"].setdefault(name, []).append(value)
    return {DEMO_PANELS[panel]: results for panel, results in panels.items()}


def refuse_other_world(folder: Path, files: dict[str, list[dict]], overwrite: bool) -> None:
    """Raise ValueError if rows of another demo, or not of a demo, are where these would be written."""
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        if path.is_file() and not overwrite and data.json_lines(path.read_text(encoding="utf-8")) != rows:
            raise ValueError(f"{path} holds other rows than this demo's: use another --out, or --overwrite")


def main() -> None:
    """The command line: exit code 2, and one line, for what the user can mend."""
    options, demo = parse_options()
    try:
        demo_out = "runs/demo" if options.world == "popular" else "runs/demo-random"
        options.out = options.out or (demo_out if demo else "runs/latest")
        options.device = start_ranks(options.device)
        if demo:
            panels = run_demo(options)
        else:
            results = run(options)
            results["detection"] = {name: [value] for name, value in results["detection"].items()}
            panels = {f"{options.model} on {', '.join(options.data)}": results}
        write_report(panels, Path(options.out), options.limit)
    except (ValueError, FloatingPointError, OSError, SafetensorError) as error:
        print(f"forgetting.py: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
