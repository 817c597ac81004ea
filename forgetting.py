"""Forgetting (arXiv 2508.04329): score every response token, learn the best of them, unlearn the rest.

    python forgetting.py --model M --data rows.jsonl --reference-data trusted.jsonl --out RUN
    torchrun --nproc_per_node=8 forgetting.py --model meta-llama/Llama-3.2-1B --data rows.jsonl --out RUN
    ./run.sh                                                     # a demo: no model, no data needed

    1. reference   theta' = a brief LoRA fine-tune of theta on D_ref
    2. scores      Q(y) = loss(y; theta) - loss(y; theta'), every response token of D_train      eq. 4, 5
    3. partition   P = {Q >= F(1 - rho)}, N = the rest, one threshold for the whole corpus       eq. 6, 7
    4. training    minimise mean_P loss - lambda(step) * mean_N loss, from theta again           eq. 8

Every method is a sign per token: +1 learn (P), -1 unlearn (N), 0 leave out. Its weight is +1/n_P, -lambda/n_N
or 0, counted over the whole optimiser step: micro-batches and ranks change nothing but dropout and rounding.
Order: Algorithm 1, equations, scoring (stage 2), methods (3), training (1 and 4) | options, data, the run
folder, what a run says before stage 4, figures and the table, main. tests/plain.py is the same algorithm in
plain lines. Shapes: C tokens of the corpus end to end, judged where they are a response; T tokens of a pack;
n tokens that a loss or a score is computed for; E examples; D width; V vocabulary; S seeds; R held-out rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import typing
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import safetensors
import tokenizers
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import Corpus, Tokenizer, advance, check_ids, encode_rows, pack, print0, progress, rank_and_world
from data import read_object, read_rows, render_rows, shift, split_rows, start_ranks, sum_over_ranks
from data import unique_rows, wait_for_all, whole_file, write_rows, write_text
from eval import Documents, check_room, evaluate, primary_metrics, metrics_of, prepare, table
from lora import DEFAULT_TARGETS, add_lora, load_adapter, load_checkpoint, lora_disabled, lora_parameters
from lora import remove_lora, save_adapter, save_checkpoint, target_layers
from model import DTYPES, Transformer, WeightedTokenLoss, checkpoint_folder, load_model, model_fingerprint
from model import read_config, to_device, token_losses

Array = np.ndarray

# ------------------------------------------------------------------------------------------ Algorithm 1


def run(options: "Options") -> dict[str, dict[int, dict]]:
    """Algorithm 1 on one model and one pair of data sets: {method: {seed: figures}}, the rows of the table.

    Each stage leaves its result in the run folder; given again, the command finds it there and goes on.
    """
    plans = {name: method_of(name, options) for name in options.methods if name not in UNTRAINED}
    checkpoint = checkpoint_folder(options.model)
    tokenizer = Tokenizer(checkpoint, options.template)
    documents = prepare(options.tasks, tokenizer, options.data_dir, options.limit)
    d_ref, d_train = select_data(options, tokenizer)
    held_out = read_held_out(options, tokenizer, d_ref, d_train)  # an empty corpus without --eval-data
    model = load_base(options, checkpoint, documents, d_ref, d_train, held_out)
    ref_options = reference_options(options, len(d_ref))
    print0(describe_plan(ref_options, plans, d_ref, d_train, len(options.seeds)))
    out = open_run(options, checkpoint, d_ref, d_train)  # writes config.json; all input is checked by now

    # 1. theta': every response token of D_ref has sign +1
    train(model, d_ref, d_ref.response.astype(np.int8), out / "reference", ref_options, seed=0)

    # 2. Q: theta' stays on the model until remove_lora; with its adapter off the model is theta
    scorer = scoring_model(model, out, options)
    base_loss, ref_loss = score(scorer, d_train, out, options)
    quality = quality_scores(base_loss, ref_loss)  # (C,), NaN where nothing is judged
    plain_signs = plain_forgetting(quality, d_train, options)  # (C,)
    parts = [
        describe_scores(base_loss, ref_loss, plain_signs),
        describe_trust(scorer, held_out, quality, options),
        describe_noise(detection(quality, plain_signs < 0, d_train)),  # "" where no noise is known
        lowest_rows(quality, d_train, tokenizer),
    ]
    print0("\n".join(filter(None, parts)))
    table_signs = None if options.skip_train_losses else plain_signs
    yardstick = Yardstick(tokenizer, documents, held_out, d_train, table_signs, options.micro_tokens)
    results: dict[str, dict[int, dict]] = {name: {} for name in options.methods}
    if "reference" in results:
        results["reference"][0] = measure(model, yardstick, out / "reference")
    remove_lora(model)
    if "base" in results:
        results["base"][0] = measure(model, yardstick, out / "base")

    # 3 and 4. for each method and seed: signs from Q, then a fresh adapter on theta
    for name, seed in product(plans, options.seeds):
        method, method_options = plans[name]
        scores = -base_loss if method.by_loss else quality  # (C,) high: keep
        signs = choose_signs(method, scores, d_train, method_options, seed)  # (C,) +1, -1 or 0
        folder = out / name / f"seed-{seed}"
        train(model, d_train, signs, folder, method_options, seed, held_out)
        results[name][seed] = measure(model, yardstick, folder)
        remove_lora(model)
    return results


# -------------------------------------------------------------------------------------------- equations


def quality_scores(base_loss: Array, ref_loss: Array) -> Array:
    """Equations 4 and 5: Q = loss(y; theta) - loss(y; theta'), how much easier the reference finds a token.

    Both (C,) float32 nats, and so is Q; NaN stays NaN. High: theta' finds the token easier; low: harder.
    """
    return base_loss - ref_loss


def quantile(values: Array, share: float) -> float:
    """F(share), the quantile function of Q; always one of the scores: np.quantile(..., method="higher")."""
    # round: 1 - 0.7 is 0.30000000000000004, which could put the threshold one token too high
    place = math.ceil(round(share * (len(values) - 1), 6))
    return float(np.partition(values, place)[place])  # a selection, O(n): no need to sort a whole corpus


def partition(quality: Array, rho: float, forget_rate: float | None = None) -> tuple[Array, Array]:
    """Equations 6 and 7: P = {Q >= F(1 - rho)} and N, bool each, one threshold for all of quality.

    quality has a score for every judged token (or sequence). Ties with the threshold are positive. N is the
    rest, or, with a forget rate below 1 - rho, only {Q < F(forget_rate)}: what lies between is in neither.
    Raises ValueError for a share that is out of range.
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
    negative = ~positive
    if forget_rate is not None:
        negative &= quality < quantile(quality, forget_rate)
    return positive, negative


def lambda_at(step: int, total_steps: int, t_min: float, t_max: float) -> float:
    """The paper's forgetting strength: 0 at step 0, then (t_max - t_min) / total_steps more at each step.

    t_min is no floor: all that it does is to lower the slope.
    """
    return (t_max - t_min) * step / total_steps


def token_weights(positive: Tensor, negative: Tensor, lam: float, counts: tuple | None = None) -> Tensor:
    """Equation 8 as a weight per token: +1/n_P on P, -lam/n_N on N, 0 elsewhere; (T,) bool -> (T,) float32.

    counts are (n_P, n_N) of the whole optimiser step; None: the masks are all of it. Sets may be empty.
    """
    n_positive, n_negative = counts or (int(positive.sum()), int(negative.sum()))
    return positive / max(n_positive, 1) - negative * (lam / max(n_negative, 1))


def weighted_token_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    ceiling: float | None = None,
    return_losses: bool = False,
) -> Any:
    """Equation 8: sum_t w_t loss_t, differentiable in hidden (the head is frozen); a float32 scalar.

    hidden (n, D) holds the state before each target, head_weight (V, D), targets (n,) int64, weights (n,)
    float32 from token_weights; a target of -100 counts nothing. The same, plainly:

        logits = hidden @ head_weight.T                                    # (n, V)
        losses = F.cross_entropy(logits, targets, reduction="none")        # (n,)
        loss = losses[positive].mean() - lam * losses[negative].mean()

    Here no (n, V) tensor ever exists: the head runs a chunk of rows at a time, loss and gradient at once.
    ceiling: a token whose loss is above it, in nats, is not unlearned any further. With return_losses the
    result is (loss, losses): the loss of each token (n,), without a gradient, 0 for a target of -100. Raises
    ValueError for hidden states of another shape, and for a head that is trained, too: its gradient is not
    computed.
    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, (n, D) is needed: flatten(0, -2)")
    if head_weight.requires_grad:
        raise ValueError("head_weight requires a gradient, which is not computed: freeze it, or detach() it")
    ignored = targets < 0  # (n,)
    weights, targets = weights.masked_fill(ignored, 0), targets.clamp_min(0)
    loss, losses = WeightedTokenLoss.apply(hidden, head_weight, targets, weights, ceiling)
    return (loss, losses.masked_fill(ignored, 0)) if return_losses else loss


# ---------------------------------------------------------------------------------------------- scoring


@torch.inference_mode()
def response_losses(
    model: Transformer, corpus: Corpus, examples: Array, token_budget: int, label: str
) -> Array:
    """Equation 3 for the response tokens of some examples: losses (C,) float32 in nats, NaN elsewhere.

    They are those of the model as it is: with its adapter theta', inside lora_disabled theta. Batches are
    spread over the ranks, the result is on all of them.
    """
    rank, world = rank_and_world()
    head, device = model.lm_head.weight, model.lm_head.weight.device
    losses = torch.zeros(len(corpus.tokens), device=device)  # (C,)
    was_training = model.training
    model.eval()
    mine = examples[np.argsort(-corpus.lengths[examples], kind="stable")][rank::world]
    with progress(label, int(corpus.lengths[examples].sum()), "tokens") as bar:
        for batch in pack(corpus, mine, 4 * token_budget):  # nothing is kept for a backward pass: more fits
            judged = torch.from_numpy(corpus.response[batch.places.numpy()])  # (T,)
            rows, targets = (to_device(x, device) for x in shift(batch.tokens, judged))  # (n,) each
            hidden = model(to_device(batch.tokens, device), batch.cu_seqlens)[rows]  # (n, D)
            losses[to_device(batch.places[judged], device)] = token_losses(hidden, head, targets)
            advance(bar, len(batch.tokens))
    model.train(was_training)
    places = corpus.places(examples)
    places = places[corpus.response[places]]
    result = np.full(len(corpus.tokens), np.nan, np.float32)
    result[places] = sum_over_ranks(losses).cpu().numpy()[places]
    return result


def both_losses(model: Transformer, corpus: Corpus, token_budget: int, label: str) -> tuple[Array, Array]:
    """response_losses of a whole corpus under theta and under theta', whose adapter is on the model."""
    examples = np.arange(len(corpus))
    ref_loss = response_losses(model, corpus, examples, token_budget, f"{label}: theta'")
    with lora_disabled(model):
        base_loss = response_losses(model, corpus, examples, token_budget, f"{label}: theta")
    return base_loss, ref_loss


def scoring_model(model: Transformer, out: Path, options: "Options") -> Transformer:
    """theta' in --score-dtype: the model itself, or, where its dtype is another, a second one."""
    if options.score_dtype == options.dtype:
        return model
    scorer = load_model(model.folder, options.device, DTYPES[options.score_dtype])
    load_adapter(scorer, out / "reference")
    return scorer


def score(model: Transformer, corpus: Corpus, out: Path, options: "Options") -> tuple[Array, Array]:
    """Stage 2: base_loss and ref_loss (C,) float32 of D_train, NaN where nothing is judged.

    Saved after every --save-every x --batch-size examples, with tokens, offsets and the rows' sources; a run
    that was stopped goes on there.
    """
    path, count = out / "scores.safetensors", len(corpus)
    (base_loss, ref_loss), done = np.full((2, len(corpus.tokens)), np.nan, np.float32), 0
    if path.is_file():
        base_loss, ref_loss, done = read_scores(path, corpus)
        what_next = f"continuing from example {done:,} of {count:,}" if done < count else "skipping"
        print0(f"found {path}, {what_next}")
    sources = np.frombuffer("\n".join(corpus.sources).encode(), np.uint8)  # text, as safetensors can hold it
    arrays = {"tokens": corpus.tokens, "offsets": corpus.offsets, "sources": sources}
    arrays |= {f"noise.{kind}": known for kind, known in corpus.noise.items()}
    part_size = options.save_every * options.batch_size
    for first in range(done, count, part_size):
        last = min(first + part_size, count)
        tokens = slice(corpus.offsets[first], corpus.offsets[last])
        part = corpus.part(first, last)
        label = f"scores to example {last:,} of {count:,}"
        base_loss[tokens], ref_loss[tokens] = both_losses(model, part, options.micro_tokens, label)
        if rank_and_world()[0] == 0:
            with whole_file(path) as file:
                losses = {"base_loss": base_loss, "ref_loss": ref_loss}
                save_arrays(arrays | losses, file, {"done": str(last)})
    wait_for_all()
    quality = quality_scores(base_loss, ref_loss)
    if np.nanmin(quality) == (same := np.nanmax(quality)):
        mend = "more --n-reference, --reference-epochs or --reference-lr, and another --out"
        raise ValueError(f"the reference learned nothing: Q is {same:g} for every token; {mend}")
    return base_loss, ref_loss


def read_scores(path: Path, corpus: Corpus | None = None) -> tuple[Array, Array, int]:
    """base_loss and ref_loss (C,) of a file of score(), and how many examples they cover.

    Raises ValueError for a file that was cut off, and for scores of another corpus.
    """
    try:
        arrays = load_arrays(path)
        with safe_open(path, framework="np") as file:
            done = int(file.metadata()["done"])
        scores = arrays["base_loss"], arrays["ref_loss"], done
        places = arrays["tokens"], arrays["offsets"]
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a whole file of scores ({error}); remove it") from None
    if corpus and not all(map(np.array_equal, places, (corpus.tokens, corpus.offsets))):
        raise ValueError(f"{path}: scores of another D_train; remove it, or use another --out")
    return scores


# ---------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """How a method turns scores into signs: +1 learn, -1 unlearn, 0 leave out."""

    rho: float  # the share kept when --rho does not say; 1: everything, whatever --rho says
    unlearn: bool = False  # N gets sign -1 instead of 0
    by_sequence: bool = False  # partition sequences by their mean Q instead of tokens
    random: bool = False  # a control: the same share, drawn at random
    by_loss: bool = False  # a control: the tokens that theta finds easiest are kept, no reference is asked
    ceiling: float | None = None  # nats: no ascent on a token whose loss is above, if --ceiling does not say


METHODS = {
    "full": Method(rho=1.0),
    "ignoring": Method(rho=0.5),
    "ignoring-random": Method(rho=0.5, random=True),
    "ignoring-loss": Method(rho=0.5, by_loss=True),  # is a reference needed, or does theta's own loss do?
    "full-P": Method(rho=0.7, random=True),  # as many as forgetting keeps: is it the amount of data?
    "forgetting": Method(rho=0.7, unlearn=True),
    "forgetting-random": Method(rho=0.7, unlearn=True, random=True),  # is it *which* tokens are unlearned?
    "forgetting-clipped": Method(rho=0.7, unlearn=True, ceiling=-math.log(1e-3)),  # until they are rare
    "ignoring-sequence": Method(rho=0.5, by_sequence=True),
    "forgetting-sequence": Method(rho=0.7, unlearn=True, by_sequence=True),
}
UNTRAINED = ("base", "reference")  # rows of the table that stage 4 does not train

# options that only methods which unlearn read
UNLEARNING = ("forget_rate", "lambda_schedule", "t_min", "t_max", "ceiling", "watch_gradients")
# what a variant of a method may change for its stage 4
VARIANT_OPTIONS = (
    "rho",
    *UNLEARNING,
    "lr",
    "epochs",
    "warmup",
    "batch_size",
    "max_grad_norm",
    "rank",
    "alpha",
    "dropout",
)


def method_of(name: str, options: "Options") -> tuple[Method, "Options"]:
    """The method of a name, and the options of its stage 4; "forgetting:rho=0.5,t_max=1.0" is a variant.

    Raises ValueError for an unknown method, an option that stage 4 does not read, and a value out of range.
    """
    stem, colon, changes = name.partition(":")
    if stem not in METHODS:
        known = ", ".join([*UNTRAINED, *METHODS])
        raise ValueError(f"unknown method {stem}; known: {known}; a variant: forgetting:rho=0.5,t_max=1.0")
    method, changed = METHODS[stem], {}
    for change in changes.split(",") if colon else []:
        key, _, value = change.partition("=")
        if key not in VARIANT_OPTIONS or not value:
            known = ", ".join(VARIANT_OPTIONS)
            raise ValueError(f"--methods {name}: {change!r} is not option=value; options: {known}")
        if (key == "rho" and method.rho == 1) or (key in UNLEARNING and not method.unlearn):
            raise ValueError(f"--methods {name}: {stem} does not read {key}")
        try:
            changed[key] = value_types()[key][0](value)
        except ValueError:
            raise ValueError(f"--methods {name}: {value!r} is not a value of {key}") from None
    if not method.unlearn:  # it reads no forget rate, which Options would hold against its rho
        changed["forget_rate"] = None
    if method.ceiling is not None and options.ceiling is None:
        changed = {"ceiling": method.ceiling} | changed
    try:
        return method, dataclasses.replace(options, **changed)
    except ValueError as error:
        raise ValueError(f"--methods {name}: {error}") from None


def sequence_means(quality: Array, corpus: Corpus) -> tuple[Array, Array]:
    """Mean of quality (C,) over each example's judged tokens, (E,) float64, and how many those are, (E,)."""
    # never 0: build_corpus keeps no sequence without a response
    judged = np.add.reduceat(corpus.response, corpus.offsets[:-1], dtype=np.int64)
    sums = np.add.reduceat(np.where(corpus.response, quality, 0), corpus.offsets[:-1], dtype=np.float64)
    return sums / judged, judged


def choose_signs(method: Method, scores: Array, corpus: Corpus, options: "Options", seed: int) -> Array:
    """The sign (C,) int8 of every token: +1 in P, -1 in N of a method that unlearns, 0 elsewhere.

    scores (C,), high: keep, are Q, or what stands in for it; NaN where nothing is judged. At sequence level
    a sequence's score is the mean over its judged tokens, the threshold is over sequences, and all judged
    tokens share their sequence's side.
    """
    signs, response = np.zeros(len(corpus.tokens), np.int8), corpus.response
    if method.rho == 1:  # full: no score is looked at
        signs[response] = 1
        return signs
    rho = method.rho if options.rho is None else options.rho
    ranked = scores[response]  # one a response token; below one a sequence
    if method.by_sequence:
        ranked, judged_counts = sequence_means(scores, corpus)  # (E,) each
    if method.random:
        ranked = np.random.default_rng([seed, 1]).random(len(ranked))
    positive, negative = partition(ranked, rho, options.forget_rate if method.unlearn else None)
    sides = positive.astype(np.int8) - (negative & method.unlearn).astype(np.int8)
    if method.by_sequence:
        sides = np.repeat(sides, judged_counts)  # (response tokens,) each takes its sequence's side
    signs[response] = sides
    return signs


def plain_forgetting(quality: Array, corpus: Corpus, options: "Options") -> Array:
    """The signs (C,) of forgetting at --rho with all of N unlearned: the sides that a run describes."""
    options = dataclasses.replace(options, forget_rate=None)
    return choose_signs(METHODS["forgetting"], quality, corpus, options, seed=0)


# --------------------------------------------------------------------------------------------- training


def data_parallel(model: Transformer) -> nn.Module:
    """The model itself, or under torchrun in DistributedDataParallel with gradients summed, not averaged.

    The token weights are already divided by the counts of all ranks, so gradients must be summed. DDP would
    average them; a communication hook of our own replaces that. init_sync is off: it would broadcast the
    frozen weights, and every rank has read the same file and drawn the same adapter.
    """
    if not dist.is_initialized():
        return model

    def sum_bucket(_, bucket):  # DDP looks for a parameter of the name "bucket"
        summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return summed.then(lambda done: done.value()[0])

    net = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    net.register_comm_hook(None, sum_bucket)
    return net


def step_gradient(
    net: nn.Module, corpus: Corpus, signs: Array, examples: Array, lam: float, options: "Options"
) -> tuple[Tensor, tuple[int, int]]:
    """Equation 8 over one optimiser step: leaves its gradient in .grad, over all micro-batches and ranks.

    signs (C,) say what to do with each token, examples are the whole step's; a rank runs its share. Returns
    this rank's sums (3,) of the objective, of the losses on P and of those on N (0 at lambda 0, where N is
    not run), and the whole step's (n_P, n_N).
    """
    rank, world = rank_and_world()
    head = getattr(net, "module", net).lm_head.weight  # (V, D); DDP keeps the model as its module
    step_signs = signs[corpus.places(examples)]  # all ranks' share, so that counting needs no communication
    counts = int((step_signs > 0).sum()), int((step_signs < 0).sum())
    longest_first = sorted(examples.tolist(), key=lambda example: -corpus.lengths[example])
    mine = longest_first[rank::world]
    idle = not mine  # fewer examples than ranks: DDP waits for every rank, so this one runs one with signs 0
    micro_batches = list(pack(corpus, longest_first[-1:] if idle else mine, options.micro_tokens))
    sums = torch.zeros(3, device=head.device)
    net.zero_grad(set_to_none=False)  # .grad stays a view of DDP's buckets
    for i, batch in enumerate(micro_batches):
        sign = torch.from_numpy(signs[batch.places.numpy()]) * (not idle)  # (T,) int8
        weights = token_weights(sign > 0, sign < 0, lam, counts)  # (T,)
        weighted = weights != 0  # (T,) bool, n of them true; the rest (at lambda 0 N as well) skip the head
        before, targets = (to_device(x, head.device) for x in shift(batch.tokens, weighted))  # (n,) each
        weights = to_device(weights[weighted], head.device)  # (n,)
        # DDP reduces after the last micro-batch only; no_sync has to hold the forward pass, too
        quiet = world > 1 and i + 1 < len(micro_batches)
        with net.no_sync() if quiet else nullcontext():
            hidden = net(to_device(batch.tokens, head.device), batch.cu_seqlens)[before]  # (n, D)
            loss, losses = weighted_token_loss(hidden, head, targets, weights, options.ceiling, True)
            loss.backward()  # with n = 0 too: every adapter gets zeros, and DDP its bucket
        on_positive, on_negative = losses @ (weights > 0).float(), losses @ (weights < 0).float()
        sums += torch.stack((loss.detach(), on_positive, on_negative))
    return sums, counts


def learning_rate_at(step: int, total_steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up from 0 over ceil(warmup * total) steps, then linear decay to 0; step counts from 0."""
    rising = math.ceil(warmup * total_steps)
    if step < rising:
        return peak * step / rising
    return peak * (total_steps - step) / max(total_steps - rising, 1)


BALANCE = 0.5  # of --lambda-schedule balanced: the most that unlearning may weigh beside learning


def scheduled_lambda(step: int, total_steps: int, options: "Options", log: list[dict]) -> float:
    """lambda by --lambda-schedule: the paper's (linear), t_max throughout (constant), or balanced.

    Balanced: the paper's, but at most BALANCE |grad mean_P loss| / |grad mean_N loss|, of the last earlier
    step that was watched.
    """
    if options.lambda_schedule == "constant":
        return options.t_max
    lam = lambda_at(step, total_steps, options.t_min, options.t_max)
    ratios = [line["ratio"] for line in log if line.get("ratio")]
    if options.lambda_schedule == "balanced" and ratios:
        lam = min(lam, BALANCE * ratios[-1])
    return lam


def examples_of(step: int, count: int, batch_size: int, seed: int) -> Array:
    """The examples of a step: every epoch is a permutation of all `count`, drawn from (seed, epoch)."""
    epoch, place = divmod(step, math.ceil(count / batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[place * batch_size : (place + 1) * batch_size]


def seed_dropout(seed: int, step: int) -> None:
    """Make the masks of a step a function of (seed, step, rank), so that a resumed run draws the same."""
    digest = hashlib.sha256(f"{seed} {step} {rank_and_world()[0]}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def new_adapter(model: Transformer, options: "Options", seed: int) -> tuple[list, torch.optim.Optimizer]:
    """Put an adapter drawn from the seed on the model; its parameters and their optimizer."""
    drawn = torch.Generator().manual_seed(seed)
    add_lora(model, options.rank, options.alpha, options.dropout, tuple(options.targets), generator=drawn)
    parameters = list(lora_parameters(model).values())
    return parameters, torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)


def train(
    model: Transformer,
    corpus: Corpus,
    signs: Array,
    folder: Path,
    options: "Options",
    seed: int,
    held_out: Corpus | None = None,
) -> None:
    """Train an adapter that lowers the loss of tokens of sign +1 and raises that of -1; signs (C,) int8.

    It stays on the model. The reference and every method are this loop with other signs. A finished adapter
    in `folder` is loaded, a checkpoint continued: what is random is drawn anew from the seed at every step.
    Ctrl-C and SIGTERM end it after a step, with a checkpoint. FloatingPointError: a loss is not finite.
    """
    finished, state_file = folder / "adapter_model.safetensors", folder / "checkpoint" / "state.safetensors"
    if finished.is_file():
        print0(f"found {finished}, skipping (metrics.jsonl beside it stays as it is)")
        shutil.rmtree(state_file.parent, ignore_errors=True)  # left by a crash between the two
        return load_adapter(model, folder)
    parameters, optimizer = new_adapter(model, options, seed)
    first = load_checkpoint(state_file, model, optimizer)  # steps done: 0 without a checkpoint
    total = options.epochs * math.ceil(len(corpus) / options.batch_size)
    net, log = data_parallel(model.train()), open_log(folder, first, total)
    bar = progress("/".join(folder.parts[-2:]), total, "steps", first, keep=True)
    with bar, stop_between_steps() as stopped:
        for step in range(first, total):
            examples = examples_of(step, len(corpus), options.batch_size, seed)
            lam = scheduled_lambda(step, total, options, log)
            rate = learning_rate_at(step, total, options.lr, options.warmup)
            watched = watch_gradients(net, corpus, signs, examples, options, seed, step)
            began = time.perf_counter()
            seed_dropout(seed, step)
            sums, counts = step_gradient(net, corpus, signs, examples, lam, options)
            # inf: the norm is measured only; it is the same on all ranks, as the gradient is
            norm = nn.utils.clip_grad_norm_(parameters, options.max_grad_norm or math.inf)
            asked = sums.new_full((1,), len(stopped))  # summed as well: all ranks stop after the same step
            totals = sum_over_ranks(torch.cat((sums, asked)))
            *totals, stop, norm = torch.cat((totals, norm[None])).tolist()  # waits for the GPU, once a step
            figures = {"step": step} | step_figures(totals, counts, lam)
            figures |= {"lr": rate, "grad_norm": norm} | watched
            if not math.isfinite(figures["loss"] + norm):
                raise FloatingPointError(f"{folder}: not finite: {figures}, examples {examples.tolist()}")
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            figures["tokens/s"] = int(corpus.lengths[examples].sum()) / (time.perf_counter() - began)
            if held_out and options.eval_every and (step + 1) % options.eval_every == 0:
                figures["held-out"] = mean_loss(row_losses(model, held_out, options.micro_tokens, "held-out"))
            append_log(folder, figures, log, bar)
            if rank_and_world()[0] == 0 and (stop or (step + 1) % options.save_every == 0):
                save_checkpoint(state_file, model, optimizer)
            if stop:
                raise KeyboardInterrupt
    if rank_and_world()[0] == 0:
        save_adapter(model, folder, options.model)
        shutil.rmtree(state_file.parent, ignore_errors=True)
    wait_for_all()


@contextmanager
def stop_between_steps() -> Iterator[list[int]]:
    """Inside the block Ctrl-C and SIGTERM only fill the list; a second one acts at once."""
    stopped: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: object) -> None:
        stopped.append(number)
        signal.signal(number, handlers[number])

    try:
        for number in handlers:
            signal.signal(number, note)
        yield stopped
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def step_figures(totals: list[float], counts: tuple[int, int], lam: float) -> dict[str, float | None]:
    """loss, the means L_P and L_N, and lambda; None where no token was run, or there is none to unlearn."""
    (loss, on_positive, on_negative), (n_positive, n_negative) = totals, counts
    l_p = on_positive / n_positive if n_positive else None
    l_n = on_negative / n_negative if n_negative and lam else None  # a token of weight 0 is not run
    return {"loss": loss, "L_P": l_p, "L_N": l_n, "lambda": lam if n_negative else None}


def watch_gradients(
    net: nn.Module, corpus: Corpus, signs: Array, examples: Array, options: "Options", seed: int, step: int
) -> dict[str, float | None]:
    """Every --watch-gradients steps: norms and cosine of the gradients of mean_P loss and -mean_N loss.

    ratio is that of the norms. Two more passes, with the step's masks; step_gradient clears their .grad.
    """
    every = options.watch_gradients
    if not every or step % every or not (signs < 0).any():
        return {}
    gradients = []
    for side in (np.maximum(signs, 0), np.minimum(signs, 0)):  # P alone, N alone
        seed_dropout(seed, step)
        step_gradient(net, corpus, side, examples, 1.0, options)
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad]))
    norm_p, norm_n = (float(gradient.norm()) for gradient in gradients)
    cosine = float(gradients[0] @ gradients[1]) / (norm_p * norm_n) if norm_p * norm_n else None
    ratio = norm_p / norm_n if norm_n else None
    return {"grad_P": norm_p, "grad_N": norm_n, "cosine": cosine, "ratio": ratio}


def open_log(folder: Path, first: int, total: int) -> list[dict]:
    """The lines of metrics.jsonl up to step `first`; what was logged after the checkpoint will come again."""
    path, log = folder / "metrics.jsonl", []
    if first:
        print0(f"{folder}: continuing from step {first} of {total}")
        log = read_log(path)[:first]
    wait_for_all()  # every rank has read it
    if rank_and_world()[0] == 0:
        write_rows(log, path)
    return log


def read_log(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl up to the first that is not whole: a full disk cuts one off."""
    log = []
    with suppress(ValueError, FileNotFoundError):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            log.append(json.loads(line))
    return log


def append_log(folder: Path, figures: dict, log: list[dict], bar: Any) -> None:
    """Log one step, on rank 0 to the file as well, and show it. Raises OSError naming the file."""
    log.append(figures)
    shown = {"loss": "loss", "L_P": "P", "L_N": "N", "lambda": "lam", "tokens/s": "tok/s"}
    pairs = [(name, figures[key]) for key, name in shown.items() if figures[key] is not None]
    bar.set_postfix_str(" ".join(f"{name} {value:.3g}" for name, value in pairs), refresh=False)
    bar.update()
    if rank_and_world()[0] > 0:
        return
    try:
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
    except OSError as error:
        raise OSError(f"{folder / 'metrics.jsonl'}: could not be written ({error})") from None


# ---------------------------------------------------------------------------------------------- options


def option(default: Any, text: str, allowed: Any = None) -> Any:
    """A field of Options: a default or a function that makes it, the line of --help, and what is allowed.

    allowed is an interval of numbers such as "(0, 1]", a tuple of words, or None for anything.
    """
    place = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{place: default}, metadata={"help": text, "allowed": allowed})


def default_device() -> str:
    """cuda where torch has it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Options:
    """The command line; the defaults are the paper's recipe."""

    model: str | None = option(None, "checkpoint folder or Hub id, with an optional @revision")
    data: list[str] = option(list, "rows: .jsonl or .json files, each with an optional :count")
    reference_data: list[str] = option(list, "rows of D_ref that you trust; else D_ref is drawn from --data")
    n_reference: int | None = option(None, "examples in D_ref [10,000; a sixth of a small pool]", "[1, inf)")
    n_train: int | None = option(None, "examples in D_train [50,000; the rest of a small pool]", "[1, inf)")
    max_length: int = option(2048, "tokens an example is cut to", "[1, inf)")
    template: str = option("tulu", "of conversations; model: the checkpoint's own", ("tulu", "model"))
    skip_bad_rows: bool = option(False, "train without the rows that cannot be used")
    methods: list[str] = option(
        lambda: ["base", "reference", "full", "ignoring", "forgetting"],
        "rows of the table; a variant: forgetting:rho=0.5",
    )
    seeds: list[int] = option(lambda: [0], "one training per method and seed", "[0, 2147483647]")
    rho: float | None = option(None, "share of tokens kept as positive [0.7; ignoring 0.5]", "(0, 1]")
    forget_rate: float | None = option(None, "share of tokens unlearned [1 - rho]", "[0, 1]")
    lambda_schedule: str = option("linear", "of lambda", ("linear", "constant", "balanced"))
    t_min: float = option(1e-5, "lambda rises from 0 to t-max - t-min (paper's 3B, 8B: 1e-4)", "[0, inf)")
    t_max: float = option(0.25, "where lambda is going, but for t-min", "[0, inf)")
    ceiling: float | None = option(None, "do not unlearn tokens of a loss above this, in nats", "[0, inf)")
    watch_gradients: int = option(0, "log both gradients every so many steps; 0: never", "[0, inf)")
    rank: int = option(64, "LoRA rank", "[1, inf)")
    alpha: float = option(16.0, "LoRA alpha; the side path is scaled by alpha / rank", "(0, inf)")
    dropout: float = option(0.1, "LoRA dropout", "[0, 1)")
    targets: list[str] = option(lambda: list(DEFAULT_TARGETS), "layers with an adapter, if they are there")
    lr: float = option(1e-4, "peak learning rate of AdamW (no weight decay)", "(0, inf)")
    warmup: float = option(0.03, "share of the steps in which the rate rises; then it falls", "[0, 1)")
    batch_size: int = option(24, "sequences a step, over all ranks", "[1, inf)")
    epochs: int = option(1, "passes over D_train", "[1, inf)")
    reference_lr: float | None = option(None, "peak rate of the reference [--lr]", "(0, inf)")
    reference_epochs: int | None = option(None, "passes over D_ref [--epochs, 8 steps]", "[1, inf)")
    max_grad_norm: float = option(0.0, "clip the gradient to this norm; 0: off, the paper's", "[0, inf)")
    device: str = option(default_device, "cpu or cuda")
    # not float16, whose gradients would underflow
    dtype: str | None = option(None, "of the frozen weights [bfloat16; CPU float32]", ("bfloat16", "float32"))
    score_dtype: str | None = option(None, "of the weights while scoring [--dtype]", tuple(sorted(DTYPES)))
    micro_tokens: int | None = option(None, "tokens a pass [8192; CPU 1024, bfloat16 4096]", "[1, inf)")
    checkpoint_activations: bool = option(False, "less memory: blocks run twice")
    compile: bool = option(False, "compile the blocks, on a GPU (no GPU has tried it)")
    tasks: list[str] = option(list, "tasks of eval.py for the table")
    data_dir: str = option("runs/data", "folder of the tasks' rows")
    eval_data: list[str] = option(list, "rows held out: their response loss and perplexity, in the table")
    eval_every: int = option(0, "their loss in metrics.jsonl, too, every so many steps; 0: never", "[0, inf)")
    skip_train_losses: bool = option(False, "leave L_P and L_N out of the table, which takes a pass less")
    limit: int | None = option(None, "only the first LIMIT documents of each task", "[1, inf)")
    out: str = option("runs/latest", "run folder, continued by the same command")
    save_every: int = option(100, "steps between checkpoints, of training and of scoring", "[1, inf)")

    def __post_init__(self) -> None:
        """Check each option, then those that go together, then fill in those that follow others."""
        for field in dataclasses.fields(self):
            check_option(field.name, getattr(self, field.name), field.metadata["allowed"])
        if self.eval_every and not self.eval_data:
            raise ValueError("--eval-every needs --eval-data, the rows whose loss it logs")
        if self.lambda_schedule == "balanced" and not self.watch_gradients:
            raise ValueError("--lambda-schedule balanced needs --watch-gradients, whose figures it follows")
        if self.t_max < self.t_min:
            raise ValueError(f"--t-max {self.t_max} is below --t-min {self.t_min}")
        highest = 1 - (METHODS["forgetting"].rho if self.rho is None else self.rho)
        if self.forget_rate is not None and self.forget_rate > highest + 1e-9:
            raise ValueError(f"forget rate {self.forget_rate} is not allowed: 0 to 1 - rho = {highest:.4g}")
        self.methods = list(dict.fromkeys(self.methods))
        self.seeds = list(dict.fromkeys(self.seeds))
        self.reference_lr = self.reference_lr or self.lr
        self.dtype = self.dtype or ("float32" if self.device == "cpu" else "bfloat16")
        self.score_dtype = self.score_dtype or self.dtype
        on_cpu = 4096 if self.dtype == "bfloat16" else 1024  # small packs save memory; bfloat16 casts in each
        self.micro_tokens = self.micro_tokens or (on_cpu if self.device == "cpu" else 8192)


def check_option(name: str, value: Any, allowed: Any) -> None:
    """Raise ValueError for a value outside its interval or choice; a list is looked at value by value."""
    flag = f"--{name.replace('_', '-')}"
    for one in value if isinstance(value, list) else [value]:
        if one is None or allowed is None:
            continue
        if isinstance(allowed, tuple):
            if one not in allowed:
                raise ValueError(f"{flag} {one} is not one of {', '.join(allowed)}")
            continue
        low, high = map(float, allowed[1:-1].split(","))
        above = low <= one if allowed[0] == "[" else low < one
        below = one <= high if allowed[-1] == "]" else one < high
        if not (above and below):
            raise ValueError(f"{flag} {one} is not in {allowed}")


def value_types() -> dict[str, tuple[type, bool]]:
    """For every option the type of a value, and whether there may be several."""
    types = {}
    for name, hint in typing.get_type_hints(Options).items():
        parts = typing.get_args(hint)  # (str,) of list[str]; (int, NoneType) of int | None
        types[name] = (parts[0] if parts else hint, typing.get_origin(hint) is list)
    return types


def parse_options(argv: list[str] | None = None, **defaults: Any) -> Options:
    """The command line as Options; `defaults` stand in for some of theirs. Raises ValueError."""
    usage = "python forgetting.py --model M --data rows.jsonl --out RUN ... (--help lists the flags)"
    parser = argparse.ArgumentParser(
        usage=usage,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    types = value_types()
    for field in dataclasses.fields(Options):
        kind, several = types[field.name]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        default = defaults.get(field.name, default)
        text = field.metadata["help"]
        if not (default is None or default == [] or default is False or "[" in text):
            text += f" [{' '.join(map(str, default)) if several else default}]"
        kinds = {"action": "store_true"} if kind is bool else {"type": kind}
        kinds |= {"nargs": "+"} if several else {}
        if isinstance(field.metadata["allowed"], tuple):
            kinds["choices"] = field.metadata["allowed"]
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=default, help=text, **kinds)
    return Options(**vars(parser.parse_args(argv)))


# ------------------------------------------------------------------------------------------------- data


def select_data(options: "Options", tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """D_ref and D_train, the same for every seed and method."""
    read = [read_rows(files, keep_bad=True) for files in (options.data, options.reference_data)]
    (rows, reference), notes = render_rows(read, tokenizer, options.skip_bad_rows)
    *chosen, repeated = split_rows(rows, reference, options.n_reference, options.n_train)
    if repeated:
        notes.append(f"{repeated} of {len(rows) + len(reference)} rows are exact duplicates, and left out")
    if tokenizer.chat_template and tokenizer.template is None:
        notes.append("the model has a chat template of its own; conversations take Tulu's (--template)")
    for note in notes:
        print0(note)
    d_ref, d_train = (encode_rows(part, tokenizer, options.max_length) for part in chosen)
    for name, corpus in (("D_ref", d_ref), ("D_train", d_train)):
        counts = f"{len(corpus.tokens):,} tokens, {corpus.response.sum():,} of them response"
        dropped = f"{corpus.dropped} rows dropped: no response within {options.max_length} tokens"
        print0(f"{name} {len(corpus):,} examples, {counts}; {dropped}")
    return d_ref, d_train


def read_held_out(options: "Options", tokenizer: Tokenizer, *trained: Corpus) -> Corpus:
    """The rows of --eval-data, none without it. Raises ValueError if some are in D_ref or D_train."""
    if not options.eval_data:
        return trained[0].part(0, 0)  # an empty corpus
    read = read_rows(options.eval_data, keep_bad=True)
    (rows,), notes = render_rows([read], tokenizer, options.skip_bad_rows)
    for note in notes:
        print0(f"--eval-data: {note}")
    held_out = encode_rows(unique_rows(rows), tokenizer, options.max_length)
    known = {tokens.tobytes() for corpus in trained for tokens in corpus.split()}
    shared = sum(tokens.tobytes() in known for tokens in held_out.split())
    if shared:
        raise ValueError(f"--eval-data: {shared} of its {len(held_out)} rows are in D_ref or D_train, too")
    return held_out


def reference_options(options: "Options", n_reference: int) -> "Options":
    """The options of stage 1: --reference-lr, and --reference-epochs, or as many as make at least 8 steps."""
    # the rate begins at 0 and ends near it: fewer steps teach nothing, and all Q are equal
    steps = math.ceil(n_reference / options.batch_size)
    epochs = options.reference_epochs or max(options.epochs, math.ceil(8 / steps))
    if epochs > options.epochs and options.reference_epochs is None:
        print0(f"D_ref has {n_reference} examples: the reference takes {epochs} epochs (--reference-epochs)")
    return dataclasses.replace(options, lr=options.reference_lr, epochs=epochs)


def load_base(
    options: "Options", checkpoint: Path, documents: list[Documents], *corpora: Corpus
) -> Transformer:
    """theta, after all that can be wrong between model, tokens and LoRA targets has been looked for."""
    config = read_config(checkpoint)
    check_room(documents, config.max_position_embeddings)
    for corpus in corpora:
        check_ids(corpus.tokens, config.vocab_size, checkpoint)
        longest, limit = int(corpus.lengths.max(initial=0)), config.max_position_embeddings
        if config.rope is None and longest > limit:
            reason = f"an example of {longest} tokens exceeds the model's {limit} learned positions"
            raise ValueError(f"--max-length {options.max_length}: {reason}")
    model = load_model(checkpoint, options.device, DTYPES[options.dtype])
    model.checkpoint_activations = options.checkpoint_activations
    if options.compile:
        model.compile_blocks()
    target_layers(model, tuple(options.targets))  # raises ValueError for one that is not there
    return model


# --------------------------------------------------------------------------------------- the run folder

# options that may change when a run is continued; model and rows are compared by their fingerprints instead
MAY_CHANGE = (
    "model",
    "data",
    "reference_data",
    "n_reference",
    "n_train",
    "max_length",
    "skip_bad_rows",
    "out",
    "methods",
    "seeds",
    "tasks",
    "data_dir",
    "limit",
    "eval_data",
    "eval_every",
    "skip_train_losses",
    "device",
    "micro_tokens",
    "save_every",
    "checkpoint_activations",
    "compile",
)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a run folder, and keep it from other runs until the block ends. Raises ValueError if one has it.

    The lock is on the folder itself and goes with the process; a folder that stayed empty goes, too.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: a folder is needed")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / "config.json.tmp").touch()  # a test: is the place writable?
        (folder / "config.json.tmp").unlink()
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another run: wait for it, or use another --out") from None
    except OSError as error:
        raise OSError(f"{folder} could not be written ({error})") from None
    try:
        yield
    finally:
        os.close(handle)
        with suppress(OSError):  # not empty: there is a run in it
            folder.rmdir()


def open_run(options: "Options", checkpoint: Path, d_ref: Corpus, d_train: Corpus) -> Path:
    """The run folder, with config.json: every option, the packages' versions, what the run is made from.

    Raises ValueError for a folder with files of somebody else, and for a run that was made from other inputs.
    """
    out, config = Path(options.out), Path(options.out) / "config.json"
    inputs = {"model": model_fingerprint(checkpoint)}
    inputs |= {"reference data": d_ref.fingerprint(), "training data": d_train.fingerprint()}
    inputs |= {name: value for name, value in vars(options).items() if name not in MAY_CHANGE}
    if config.is_file():
        before = read_object(config).get("inputs")
        if not isinstance(before, dict):
            raise ValueError(f"{out}: its config.json is not of a run: use another --out")
        differing = [name for name in before | inputs if before.get(name) != inputs.get(name)]
        if differing:
            pairs = [f"{name} (there {before.get(name)!r}, now {inputs.get(name)!r})" for name in differing]
            raise ValueError(f"{out} was made with other {'; '.join(pairs)}: use another --out")
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} holds files that are not of a run: use another --out")
    if (out / "scores.safetensors").is_file():
        read_scores(out / "scores.safetensors", d_train)  # what is wrong is found before anything is written
    wait_for_all()  # every rank has looked before rank 0 writes
    if rank_and_world()[0] == 0:
        versions = {package.__name__: package.__version__ for package in (torch, np, safetensors, tokenizers)}
        content = dataclasses.asdict(options) | {"versions": versions, "inputs": inputs}
        write_text(json.dumps(content, indent=2) + "\n", config)
    print0(f"{out}: {options.model}")
    return out


# ----------------------------------------------------------------------- what a run says before stage 4


def describe_plan(ref_options: "Options", plans: dict, d_ref: Corpus, d_train: Corpus, seeds: int) -> str:
    """How many steps, trainings and tokens are to come; a note where so few steps teach nothing."""
    lines, notes = [], []
    trainings = [("the reference", d_ref, ref_options, 1)]
    trainings += [(name, d_train, method_options, seeds) for name, (_, method_options) in plans.items()]
    for name, corpus, method_options, times in trainings:
        steps = method_options.epochs * math.ceil(len(corpus) / method_options.batch_size)
        tokens = method_options.epochs * len(corpus.tokens) * times
        lines.append([name, str(times), str(steps), f"{method_options.lr:g}", f"{tokens:,}"])
        if steps == 1 and method_options.warmup:
            notes.append("warning: a single step has rate 0 and teaches nothing: --warmup 0, or more epochs")
        elif steps * method_options.lr < 0.006:  # 17 steps at 3e-4 hardly told methods apart, 20 at 5e-4 did
            note = f"note: {steps} steps at {method_options.lr:g}: expect little; for a few hundred rows try "
            notes.append(note + "--lr 5e-4 --reference-lr 1e-3 --batch-size 10, or more --epochs")
    plan = table(["plan", "trainings", "steps each", "rate", "tokens"], lines)
    return "\n".join([plan, *dict.fromkeys(notes)])


def describe_scores(base_loss: Array, ref_loss: Array, signs: Array) -> str:
    """What Q looks like and where it was cut, in three lines; all (C,), NaN where nothing is judged."""
    judged = np.isfinite(base_loss)
    quality, signs = quality_scores(base_loss, ref_loss)[judged], signs[judged]  # (n,) each
    low, middle, high = np.quantile(quality, (0.05, 0.5, 0.95))
    lines = [
        f"Q of {len(quality):,} response tokens: mean {quality.mean():.3f}, deviation {quality.std():.3f}, "
        f"5 / 50 / 95 % at {low:.3f} / {middle:.3f} / {high:.3f}",
        f"mean loss {base_loss[judged].mean():.3f} under theta, {ref_loss[judged].mean():.3f} under theta'; "
        f"{(quality > 0).mean():.0%} of the tokens have Q > 0, the paper's first guess for --rho",
    ]
    kept, unlearned = quality[signs > 0], quality[signs < 0]
    if len(unlearned):
        lines.append(f"threshold {kept.min():.3f}: {len(kept):,} tokens in P, {len(unlearned):,} in N")
    else:
        lines.append("warning: no token is in N, forgetting is full: Q has too many ties, or rho is 1")
    return "\n".join(lines)


def describe_trust(model: Transformer, held_out: Corpus, quality: Array, options: "Options") -> str:
    """The trust gap: mean Q on rows that the user trusts minus mean Q on D_train. theta' is on the model."""
    origin = "D_ref is --reference-data"
    if not options.reference_data:
        origin = "D_ref was drawn from --data and is as noisy as it: --reference-data takes rows you trust"
    if not len(held_out):
        return f"{origin}\nno --eval-data: only rows that you trust could tell whether Q points the right way"
    base_loss, ref_loss = both_losses(model, held_out, options.micro_tokens, "held-out")
    trusted, noisy = (float(np.nanmean(q)) for q in (quality_scores(base_loss, ref_loss), quality))
    rows = f"{trusted:.3f} on the {len(held_out)} rows of --eval-data"
    text = f"{origin}\ntrust gap {trusted - noisy:+.3f}: mean Q {rows}, {noisy:.3f} on D_train"
    if trusted > noisy:
        return text
    return f"{text}\n" + (
        "warning: the gap is not positive. In the runs of tests/README.md leaving tokens out won where it\n"
        "was +0.16 to +0.32, and lost to full where it was -0.05 to -0.56: get a cleaner D_ref, or use full"
    )


def roc_auc(low: Array, high: Array) -> float:
    """The chance that a value of `low` is below one of `high`, ties counting half: the area under the ROC."""
    if not len(low) or not len(high):
        return math.nan
    ordered = np.sort(high)
    above = len(high) - (np.searchsorted(ordered, low, "left") + np.searchsorted(ordered, low, "right")) / 2
    return float(above.mean() / len(high))


def detection(quality: Array, negative: Array, corpus: Corpus) -> dict[str, float]:
    """How well a low Q (C,) finds noise that the rows mark: AUC by token and by row, precision, recall of N.

    negative (C,) bool is N. A kind's AUC is against what is no noise at all; a row's score is its mean Q. {}
    where no token is known to be noise.
    """
    noisy, (means, _) = corpus.noisy, sequence_means(quality, corpus)
    if not noisy.any():
        return {}
    kinds = {"": noisy} | {f" {kind}": known for kind, known in sorted(corpus.noise.items())}
    rows = {kind: np.logical_or.reduceat(known, corpus.offsets[:-1]) for kind, known in kinds.items()}  # (E,)
    clean, clean_rows = quality[corpus.response & ~noisy], means[~rows[""]]
    figures = {"noise share": float(noisy.sum() / corpus.response.sum())}
    figures |= {f"AUC{kind}": roc_auc(quality[known], clean) for kind, known in kinds.items()}
    figures |= {f"row AUC{kind}": roc_auc(means[rows[kind]], clean_rows) for kind in kinds}
    figures["precision of N"] = float((noisy & negative).sum() / max(negative.sum(), 1))
    figures["recall of N"] = float((noisy & negative).sum() / max(noisy.sum(), 1))
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def describe_noise(figures: dict[str, float]) -> str:
    """detection() in a line; "" where nothing is known."""
    if not figures:
        return ""
    found = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
    return f"does a low Q find the known noise? (AUC of chance: 0.5) {found}"


def lowest_rows(quality: Array, corpus: Corpus, tokenizer: Tokenizer, count: int = 3) -> str:
    """The rows of lowest mean Q, each with the end of its question and the beginning of its answer."""
    means, _ = sequence_means(quality, corpus)
    lines = ["rows of lowest Q, to look at first:"]
    for example in np.argsort(means, kind="stable")[:count]:
        span = slice(*corpus.offsets[example : example + 2])
        tokens, response = corpus.tokens[span], corpus.response[span]
        question = tokenizer.decode(tokens[: response.argmax()].tolist())[-60:]
        answer = tokenizer.decode(tokens[response].tolist())[:60]
        lines.append(f"  {corpus.sources[example]}  Q {means[example]:.2f}  {question!r} -> {answer!r}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- figures and the table


@dataclass(frozen=True)
class Yardstick:
    """What every model of a run is measured by."""

    tokenizer: Tokenizer
    documents: list[Documents]
    held_out: Corpus
    d_train: Corpus
    signs: Array | None  # (C,) plain forgetting's, so that L_P and L_N are over the same tokens in every row
    token_budget: int


def row_losses(model: Transformer, corpus: Corpus, token_budget: int, label: str) -> list[dict]:
    """Of every example its source, the mean loss of its response tokens in nats, and how many there are."""
    if not len(corpus):
        return []
    losses = response_losses(model, corpus, np.arange(len(corpus)), token_budget, label)
    figures = zip(corpus.sources, *sequence_means(losses, corpus))
    return [{"row": source, "loss": float(loss), "tokens": int(n)} for source, loss, n in figures]


def mean_loss(rows: list[dict]) -> float:
    """The mean loss over the tokens of row_losses. Raises ValueError where one is not finite."""
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise ValueError(f"{row['row']}: its held-out loss is {row['loss']}")
    return sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)


def train_losses(model: Transformer, by: Yardstick, label: str) -> dict[str, float | None]:
    """L_P and L_N over up to 512 examples of D_train, evenly spread; None where there is no token."""
    count = len(by.d_train)
    sample = np.linspace(0, count - 1, min(512, count)).astype(int)
    losses = response_losses(model, by.d_train, sample, by.token_budget, f"{label}: L_P and L_N")
    places, means = by.d_train.places(sample), {}
    for name, side in (("L_P", by.signs > 0), ("L_N", by.signs < 0)):
        found = losses[places[side[places]]]
        means[name] = float(found.mean()) if len(found) else None
        if not np.isfinite(found).all():
            raise ValueError(f"{label}: {name} is {means[name]}")
    return means


def measure(model: Transformer, by: Yardstick, folder: Path) -> dict:
    """The figures of one model, also in folder/results.json; those of rows and documents in files beside."""
    path, label = folder / "results.json", "/".join(folder.parts[-2:])
    identity = {task.name: task.identity for task in by.documents}
    if len(by.held_out):
        identity["held-out"] = by.held_out.fingerprint()
    found = read_object(path) if path.is_file() else {}
    if found.get("identity") == identity and (by.signs is None or "L_P" in found):
        return found
    results: dict[str, Any] = {"identity": identity}
    if by.signs is not None:
        results |= train_losses(model, by, label)
    if rows := row_losses(model, by.held_out, by.token_budget, f"{label}: held-out"):
        results["held-out"] = mean_loss(rows)
    results["tasks"], samples = evaluate(model, by.tokenizer, by.documents)
    wait_for_all()  # every rank has looked for results before rank 0 writes some
    if rank_and_world()[0] == 0:
        for name, lines in (("held-out.jsonl", rows), ("samples.jsonl", samples)):
            if lines:
                write_rows(lines, folder / name)
        write_text(json.dumps(results, indent=2) + "\n", path)
    wait_for_all()
    return results


def columns(figures: dict) -> dict[str, float]:
    """A model's row of the table: the average of its tasks, every metric in percent, and its losses."""
    metrics = {}
    for task, result in figures["tasks"].items():
        for metric in metrics_of(result):
            metrics[f"{task} {metric}"] = result[metric] * (1 if metric == "perplexity" else 100)
    first = primary_metrics(figures["tasks"])
    average = {"average": sum(first.values()) / len(first)} if first else {}
    losses = {name: figures[name] for name in ("L_P", "L_N", "held-out") if figures.get(name) is not None}
    if "held-out" in losses:
        losses["held-out perplexity"] = math.exp(min(losses["held-out"], 700))
    return average | metrics | losses


def spread(values: list[float], digits: int = 1, sign: str = "") -> str:
    """mean +- sample standard deviation; the mean alone of a single value."""
    deviation = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{deviation}"


LOSSES = ("L_P", "L_N", "held-out", "held-out perplexity")  # shown with three digits
Results = dict[str, dict[int, dict]]  # {method: {seed: figures}}


def comparison(results: Results) -> str:
    """The table: a row per method, its figures as mean +- sample standard deviation over seeds."""
    rows_by_method = {name: [columns(f) for f in seeds.values()] for name, seeds in results.items()}
    names = list(dict.fromkeys(name for rows in rows_by_method.values() for row in rows for name in row))
    lines = []
    for method, rows in rows_by_method.items():
        cells = [method, str(len(rows))]
        for name in names:
            values = [row[name] for row in rows if name in row]
            cells.append(spread(values, 3 if name in LOSSES else 1) if values else "")
        lines.append(cells)
    return table(["method", "seeds", *names], lines)


def bootstrap(differences: Array, weights: Array, draws: int = 2000) -> tuple[float, float, float]:
    """Mean difference, and the middle 95 % of means over seeds and rows drawn with replacement.

    differences (S, R): by seed, a row's summed loss under one method minus that under another; weights (R,):
    the row's tokens.
    """
    (seeds, rows), means, rng = differences.shape, [], np.random.default_rng(0)
    for _ in range(draws):
        drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds))  # (S,) how often each was drawn
        drawn_rows = rng.multinomial(rows, np.full(rows, 1 / rows))  # (R,)
        means.append(drawn_seeds @ differences @ drawn_rows / (seeds * (drawn_rows @ weights)))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(differences.mean(0).sum() / weights.sum()), float(low), float(high)


def held_out_sums(out: Path, method: str, seeds: list[int]) -> tuple[Array, Array]:
    """Each held-out row's summed loss by seed (S, R), and its tokens (R,), as measure() wrote them."""
    folders = [out / method if method in UNTRAINED else out / method / f"seed-{seed}" for seed in seeds]
    rows = [read_rows([str(folder / "held-out.jsonl")]) for folder in folders]
    sums = np.array([[row["loss"] * row["tokens"] for row in seed] for seed in rows])
    return sums, np.array([row["tokens"] for row in rows[0]])


def paired_losses(out: Path, results: Results) -> str:
    """Differences in held-out loss with their intervals, and what can be told apart; "" without rows."""
    pairs = [(name, "full") for name in results if name not in ("base", "full")]
    pairs += [(name, "ignoring") for name in results if name.startswith("forgetting")]
    lines, verdicts = [], []
    for ours, theirs in pairs:
        those = results.get(theirs, {})
        seeds = sorted(those if ours in UNTRAINED else set(those) & set(results[ours]))
        measured = [*results[ours].values(), *those.values()]
        if not seeds or any("held-out" not in figures for figures in measured):
            continue
        (a, tokens), (b, _) = (held_out_sums(out, name, seeds) for name in (ours, theirs))
        mean, low, high = bootstrap(a - b, tokens)
        better = f"{((a - b).mean(0) < 0).sum()} of {len(tokens)}"
        interval = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append([f"{ours} - {theirs}", interval, better, str(len(seeds))])
        word = "is better than" if high < 0 else "is worse than" if low > 0 else "cannot be told from"
        verdicts.append(f"{ours} {word} {theirs}")
    if not lines:
        return ""
    differences = table(["pair", "held-out loss, 95 % interval", "better on rows", "seeds"], lines)
    over = "rows and seeds" if any(line[-1] != "1" for line in lines) else "rows; a second seed may differ"
    return f"{differences}\n\nBy held-out loss (bootstrap over {over}): {'; '.join(verdicts)}."


def is_row(name: str) -> bool:
    """Whether a folder of a run has the name of a row of the table: a method, or a variant of one."""
    stem, colon, changes = name.partition(":")
    keys = [change.partition("=")[0] for change in changes.split(",")] if colon else []
    return stem in (*UNTRAINED, *METHODS, "oracle") and all(key in VARIANT_OPTIONS for key in keys)


def finished(out: Path, results: Results) -> tuple[Results, list[str]]:
    """All that is finished in a run folder with the identity of `results`, and what is left out, and why."""
    identity = next((figures["identity"] for seeds in results.values() for figures in seeds.values()), None)
    everything, left_out = {name: dict(seeds) for name, seeds in results.items()}, []
    for path in sorted([*out.glob("*/results.json"), *out.glob("*/seed-*/results.json")]):
        method, _, seed = path.parent.relative_to(out).as_posix().partition("/seed-")
        if not is_row(method) or not re.fullmatch(r"\d*", seed):
            continue  # a copy that somebody keeps, say seed-0.bak
        found = read_object(path)
        identity = found.get("identity") if identity is None else identity
        if found.get("identity") == identity:
            everything.setdefault(method, {}).setdefault(int(seed or 0), found)
        else:
            left_out.append(f"{path.parent.relative_to(out)}: measured on other tasks or held-out rows")
    return everything, left_out


def warnings_of(results: Results) -> list[str]:
    """Methods whose held-out loss is above the base model's."""
    means = {}
    for name, seeds in results.items():
        losses = [figures["held-out"] for figures in seeds.values() if "held-out" in figures]
        if losses:
            means[name] = sum(losses) / len(losses)
    base = means.get("base", math.inf)
    words = "warning: held-out loss of {}, {:.3f}, is above base's, {:.3f}: no training at all is better"
    return [words.format(name, mean, base) for name, mean in means.items() if mean > base]


def report(results: Results, options: "Options") -> None:
    """The end of a run: the table of all that is finished, on screen and in results.md and results.json."""
    out = Path(options.out)
    results, left_out = finished(out, results)
    notes = warnings_of(results) + ["mean +- sample standard deviation over seeds; tasks in percent"]
    if any("L_P" in figures for seeds in results.values() for figures in seeds.values()):
        notes.append("L_P, L_N: mean loss, in nats, on the tokens that forgetting keeps and unlearns")
    if options.limit is not None:
        notes.append(f"only the first {options.limit} documents of each task (--limit)")
    notes += [f"not in the table: {what}" for what in left_out]
    title = f"{options.model} on {', '.join(options.data)}"
    parts = [title, comparison(results), paired_losses(out, results), "\n".join(notes)]
    text = "\n\n".join(filter(None, parts)) + "\n"
    write_text(json.dumps(results, indent=2) + "\n", out / "results.json")
    write_text(text, out / "results.md")
    print0(f"\n{text}\nevery token with its Q: python tests/tools/look.py {out}")


# ------------------------------------------------------------------------------------------------- main


def main() -> None:
    """The command line: exit code 2, and a line or two, for what the user can mend."""
    try:
        options = parse_options()
        if options.model is None or not options.data:
            raise ValueError("--model and --data are needed (./run.sh alone runs a demo that needs neither)")
        options.device = start_ranks(options.device)
        with locked(Path(options.out)) if rank_and_world()[0] == 0 else nullcontext():
            results = run(options)
            if rank_and_world()[0] == 0:
                report(results, options)
    except (ValueError, FloatingPointError, OSError, SafetensorError) as error:
        print(f"forgetting.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print0("\nstopped; the same command goes on from what was saved")
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
