"""Forgetting (arXiv 2508.04329): score every response token, learn the best of them, unlearn the rest.

    ./run.sh --model M --data rows.jsonl --reference-data trusted.jsonl --out RUN
    torchrun --nproc_per_node=8 forgetting.py --model meta-llama/Llama-3.2-1B --data rows.jsonl --out RUN
    ./run.sh                                                     # a demo: no model, no data needed

    1. reference   theta' = a brief LoRA fine-tune of theta on D_ref
    2. scores      Q(y) = loss(y; theta) - loss(y; theta'), every response token of D_train      eq. 4, 5
    3. partition   P = {Q >= F(1 - rho)}, N = the rest, one threshold for the whole corpus       eq. 6, 7
    4. training    minimise mean_P loss - lambda(step) * mean_N loss, from theta again           eq. 8

Every method is a sign per token: +1 learn (P), -1 unlearn (N), 0 leave out. Its weight is +1/n_P, -lambda/n_N
or 0, counted over the whole optimiser step: micro-batches and ranks change nothing but dropout and rounding.
(Beside the paper: dft and forgetting-wga multiply it by a power of the token's probability, --step released
divides it as the authors' code does.)

tests/plain.py is the same algorithm in plain lines. The first half of this file is the method, the second
half what a command line needs.
Order: Algorithm 1, equations, scoring (stage 2), methods (3), training (1 and 4) | options, data, the run
folder, what a run says before stage 4, figures and the table, held-out differences, main.
Shapes: C tokens of the corpus end to end, judged where they are a response; T tokens of a pack; n tokens that
a loss or a score is computed for; E examples; D width; V vocabulary; S seeds; R held-out rows.
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
from datetime import datetime
from functools import cache
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

from data import Batch, Corpus, RenderedRow, Tokenizer, advance, check_ids, encode_rows, pack
from data import join_over_ranks, question_ids, rank_and_world, read_object, read_rows, render_rows
from data import print0, progress, shift, split_rows, start_ranks, sum_over_ranks
from data import unique_rows, wait_for_all, whole_file, write_rows, write_text
from eval import SHORTEST_PREFIX, Documents, check_room, checked_limit, describe_limit, evaluate
from eval import metrics_of, prepare, primary_metrics, table
from lora import DEFAULT_TARGETS, add_lora, load_adapter, load_checkpoint, lora_disabled, lora_parameters
from lora import remove_lora, save_adapter, save_checkpoint, target_layers
from model import DTYPES, Transformer, WeightedTokenLoss, checkpoint_folder, load_model, model_fingerprint
from model import read_config, to_device, token_losses

Array = np.ndarray
Results = dict[str, dict[int, dict]]  # {method: {seed: figures}}


# ------------------------------------------------------------------------------------------ Algorithm 1


def run(options: Options) -> Results:
    """Algorithm 1 on one model and one pair of data sets: {method: {seed: figures}}, the rows of the table.

    Each stage leaves its result in the run folder; given again, the command finds it there and goes on.
    """
    # What goes in. What can be checked before anything is trained is checked here
    refuse_foreign_files(Path(options.out))
    to_train = {name: method_of(name, options) for name in options.methods if name not in UNTRAINED}
    checkpoint = checkpoint_folder(options.model)
    date = run_date(Path(options.out))
    tokenizer = Tokenizer(checkpoint, options.template, date)
    documents = prepare(options.tasks, tokenizer, options.data_dir, options.limit)
    d_ref, d_train = select_data(options, tokenizer)
    held_out = read_held_out(options, tokenizer, d_ref, d_train)  # an empty corpus without --eval-data
    model = load_base(options, checkpoint, documents, d_ref, d_train, held_out)
    ref_options = reference_options(options, len(d_ref))
    print0(describe_plan(ref_options, to_train, d_ref, d_train, len(options.seeds)))
    out = open_run(options, checkpoint, date, d_ref, d_train)

    # Stage 1. The reference theta' is trained on D_ref, where every response token has sign +1
    all_positive = d_ref.response.astype(np.int8)  # (C,)
    train(model, d_ref, all_positive, out / "reference", ref_options, seed=0)

    log = read_log(out / "reference/metrics.jsonl")
    print0(describe_time(log, unfinished(to_train, options.seeds, out), d_train))

    # Stage 2. Score D_train. With the adapter on, the model is theta'; with it off, theta
    scorer = model
    if options.score_dtype != options.dtype:
        scorer = load_model(checkpoint, options.device, DTYPES[options.score_dtype])
        load_adapter(scorer, out / "reference")
    base_loss, ref_loss = score(scorer, d_train, out, options)
    quality = quality_scores(base_loss, ref_loss)  # (C,), NaN where nothing is judged

    # Reports before stage 4. They, and L_P and L_N of every row of the table, use one P and N: those of
    # forgetting at --rho, without a forget rate
    report_options = dataclasses.replace(options, forget_rate=None)
    report_signs = choose_signs(METHODS["forgetting"], quality, d_train, report_options, seed=0)  # (C,)
    print0(describe_scores(base_loss, ref_loss, report_signs))
    held_out_base, held_out_ref = both_losses(scorer, held_out, options.micro_tokens, "held-out")
    held_out_quality = quality_scores(held_out_base, held_out_ref)
    print0(describe_trust(held_out, held_out_quality, quality, d_train, options))
    detected = detection(quality, report_signs < 0, d_train)
    if detected:  # the rows mark what is known to be noise
        print0(describe_noise(detected))
    print0(describe_rows(quality, base_loss, d_train, tokenizer))
    del scorer  # it may be a second model

    # The two rows of the table that stage 4 does not train. Scoring has their losses if it ran the same model
    table_signs = None if options.skip_train_losses else report_signs
    suite = EvalSuite(tokenizer, documents, held_out, d_train, table_signs, options.micro_tokens)
    same_model = options.score_dtype == options.dtype
    known_of_base = (base_loss, held_out_base) if same_model else None
    known_of_reference = (ref_loss, held_out_ref) if same_model else None
    results: Results = {name: {} for name in options.methods}
    if "reference" in results:
        results["reference"][0] = measure(model, suite, out / "reference", known_of_reference)
    remove_lora(model)  # from here on the model is theta again
    if "base" in results:
        results["base"][0] = measure(model, suite, out / "base", known_of_base)

    # Stages 3 and 4, for each method and seed: signs from Q, then a fresh adapter on theta
    for name, seed in product(to_train, options.seeds):
        method, method_options = to_train[name]
        scores = -base_loss if method.by_loss else quality  # (C,) the higher, the sooner a token is kept
        signs = choose_signs(method, scores, d_train, method_options, seed)  # (C,) +1, -1 or 0
        folder = out / name / f"seed-{seed}"
        train(model, d_train, signs, folder, method_options, seed, held_out)
        results[name][seed] = measure(model, suite, folder)
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
    exact_place = round(share * (len(values) - 1), 6)
    place = math.ceil(exact_place)
    selected = np.partition(values, place)  # O(n): no need to sort a whole corpus
    return float(selected[place])


POSITIVE = "positive"  # a value of rho: the tokens of Q > 0, whatever their share is


def partition(quality: Array, rho: float | str, forget_rate: float | None = None) -> tuple[Array, Array]:
    """Equations 6 and 7: P = {Q >= F(1 - rho)} and N = the rest, bool each, one threshold for all of quality.

    quality has a score for every judged token (or sequence). Ties with the threshold are positive. With a
    forget rate below 1 - rho, N is only {Q < F(forget_rate)}: what lies between is in neither. rho "positive"
    is the paper's first guess, P = {Q > 0}. Raises ValueError for a share that is out of range.
    """
    check_shares(rho, forget_rate)
    if len(quality) == 0:
        raise ValueError("nothing to partition: no response token was scored")
    if not np.isfinite(quality).all():
        count = int((~np.isfinite(quality)).sum())
        raise ValueError(f"{count} quality scores are not finite")
    if isinstance(rho, str):  # positive
        return quality > 0, quality <= 0
    positive = quality >= quantile(quality, 1 - rho)
    negative = ~positive
    if forget_rate is not None:
        negative &= quality < quantile(quality, forget_rate)
    return positive, negative


def check_shares(rho: float | str, forget_rate: float | None) -> None:
    """Raise ValueError for a rho, or a forget rate, that partition does not take."""
    if rho == POSITIVE:
        if forget_rate is not None:
            raise ValueError(f"forget rate {forget_rate} needs a rho that is a number, not {POSITIVE}")
        return
    if isinstance(rho, str) or not 0 < rho <= 1:
        raise ValueError(f"rho {rho} is not allowed: more than 0, at most 1, or {POSITIVE}")
    if forget_rate is None:
        return
    highest = 1 - rho
    if not 0 <= forget_rate <= highest + 1e-9:
        raise ValueError(f"forget rate {forget_rate} is not allowed: 0 to 1 - rho = {highest:.4g}")


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
    learned = positive / max(n_positive, 1)
    unlearned = negative * (lam / max(n_negative, 1))
    return learned - unlearned


def weighted_token_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    powers: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """Equation 8: sum_t w_t loss_t, differentiable in hidden (the head is frozen); a float32 scalar.

    hidden (n, D) holds the state before each target, head_weight (V, D), targets (n,) int64, weights (n,)
    float32 from token_weights; a target of -100 counts nothing. The same, plainly:

        logits = hidden @ head_weight.T                                    # (n, V)
        losses = F.cross_entropy(logits, targets, reduction="none")        # (n,)
        loss = (weights * losses).sum()      # losses[positive].mean() - lam * losses[negative].mean()

    Here no (n, V) tensor ever exists: the head runs a chunk of rows at a time, loss and gradient at once.
    powers (a, b): weights above 0 are multiplied by p^a and those below 0 by p^b, where p =
    exp(-losses.detach()); the loss is the sum with these weights. a = 1 where nothing is unlearned is DFT
    (arXiv 2508.05629), b = 1 is weighted gradient ascent (arXiv 2502.19301), which fades as p does.
    Raises ValueError for hidden states of another shape, and for a head that is trained, too: its gradient is
    not computed.
    """
    loss, _ = weighted_and_token_losses(hidden, head_weight, targets, weights, powers)
    return loss


def weighted_and_token_losses(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    powers: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, Tensor]:
    """weighted_token_loss, and beside it the loss of each token (n,), without a gradient; 0 where ignored."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, (n, D) is needed: flatten(0, -2)")
    if head_weight.requires_grad:
        raise ValueError("head_weight requires a gradient, which is not computed: freeze it, or detach() it")
    ignored = targets < 0  # (n,)
    weights = weights.masked_fill(ignored, 0)
    targets = targets.clamp_min(0)
    loss, losses = WeightedTokenLoss.apply(hidden, head_weight, targets, weights, powers)
    return loss, losses.masked_fill(ignored, 0)


# ---------------------------------------------------------------------------------------------- scoring


@torch.inference_mode()
def response_losses(
    model: Transformer, corpus: Corpus, examples: Array, token_budget: int, label: str
) -> Array:
    """Equation 3 for the response tokens of some examples: losses (C,) float32 in nats, NaN elsewhere.

    They are those of the model as it is: with its adapter theta', inside lora_disabled theta. Batches are
    spread over the ranks, the result is on all of them.
    """
    result = np.full(len(corpus.tokens), np.nan, np.float32)  # (C,)
    if not len(examples):
        return result
    rank, world = rank_and_world()
    head = model.lm_head.weight  # (V, D)
    losses = torch.zeros(len(corpus.tokens), device=head.device)  # (C,)
    was_training = model.training
    model.eval()
    lengths = corpus.lengths[examples]
    longest_first = examples[np.argsort(-lengths, kind="stable")]
    budget = 4 * token_budget  # nothing is kept for a backward pass, so more fits
    common = common_beginning(corpus, examples)
    with progress(label, int(lengths.sum()), "tokens") as bar:
        for batch in pack(corpus, longest_first[rank::world], budget):
            advance(bar, len(batch.tokens))
            past = None
            if common:
                batch, past = share_beginning(batch, common)
            judged = torch.from_numpy(corpus.response[batch.places.numpy()])  # (T,)
            before, targets = shift(batch.tokens, judged)  # (n,) each, one for every judged token
            before, targets = to_device(before, head.device), to_device(targets, head.device)
            places = to_device(batch.places[judged], head.device)  # (n,)
            hidden = model(to_device(batch.tokens, head.device), batch.cu_seqlens, past=past)  # (T, D)
            losses[places] = token_losses(hidden[before], head, targets)
    model.train(was_training)
    of_all_ranks = sum_over_ranks(losses).cpu().numpy()
    places = corpus.places(examples)
    places = places[corpus.response[places]]
    result[places] = of_all_ranks[places]
    return result


def common_beginning(corpus: Corpus, examples: Array) -> int:
    """How many tokens all these examples begin with, well before a response: a template's system text.

    0 where they are too few for prefix sharing to pay.
    """
    begin = corpus.tokens[:0]
    for number, example in enumerate(examples):
        start, end = corpus.offsets[example], corpus.offsets[example + 1]
        before_response = int(corpus.response[start:end].argmax()) - 1  # the state there is the row's own
        tokens = corpus.tokens[start : start + max(before_response, 0)]
        if number == 0:
            begin = tokens
        length = min(len(begin), len(tokens))
        differs = begin[:length] != tokens[:length]
        if differs.any():
            length = int(differs.argmax())
        begin = begin[:length]
        if len(begin) < SHORTEST_PREFIX:
            return 0
    return len(begin)


def share_beginning(batch: Batch, length: int) -> tuple[Batch, list[Tensor]]:
    """Prefix sharing: the first `length` tokens, the same in all sequences, run in the first sequence alone.

    [s s a b | s s c] becomes [s s a b | c]. Also returns what each sequence follows, as Transformer.forward
    takes it: nothing, and the places of [s s].
    """
    starts, lengths = batch.cu_seqlens[:-1], batch.cu_seqlens.diff()
    positions = torch.arange(len(batch.tokens)) - starts.repeat_interleave(lengths)  # (T,)
    runs = positions >= length  # (T,) bool
    runs[:length] = True
    lengths = lengths - length
    lengths[0] += length
    cu_seqlens = torch.zeros_like(batch.cu_seqlens)
    cu_seqlens[1:] = lengths.cumsum(0)
    beginning = torch.arange(length)
    past = [beginning[:0]] + [beginning] * (len(lengths) - 1)
    return Batch(batch.tokens[runs], cu_seqlens, batch.places[runs]), past


def both_losses(model: Transformer, corpus: Corpus, token_budget: int, label: str) -> tuple[Array, Array]:
    """response_losses of a whole corpus under theta and under theta', whose adapter is on the model."""
    ref_loss = response_losses(model, corpus, corpus.everything, token_budget, f"{label}: theta'")
    with lora_disabled(model):
        base_loss = response_losses(model, corpus, corpus.everything, token_budget, f"{label}: theta")
    return base_loss, ref_loss


def score(model: Transformer, corpus: Corpus, out: Path, options: Options) -> tuple[Array, Array]:
    """Stage 2: base_loss and ref_loss (C,) float32 of D_train, NaN where nothing is judged.

    Saved after every --save-every x --batch-size examples, with tokens, offsets and where the rows are; a run
    that was stopped goes on there.
    """
    path = out / "scores.safetensors"
    count = len(corpus)
    done = 0
    base_loss = np.full(len(corpus.tokens), np.nan, np.float32)  # (C,)
    ref_loss = base_loss.copy()  # (C,)
    if path.is_file():
        base_loss, ref_loss, done = read_scores(path, corpus)
        what_next = "skipping" if done == count else f"continuing from example {done:,} of {count:,}"
        print0(f"found {path}, {what_next}")
    found = done

    arrays = {"tokens": corpus.tokens, "offsets": corpus.offsets}
    sources = "\n".join(corpus.locations).encode()
    arrays["sources"] = np.frombuffer(sources, np.uint8)  # safetensors holds no text
    for kind, known in corpus.noise.items():
        arrays[f"noise.{kind}"] = known

    part_size = options.save_every * options.batch_size
    for first in range(done, count, part_size):
        last = min(first + part_size, count)
        part = corpus.part(first, last)
        label = f"scores to example {last:,} of {count:,}"
        tokens = slice(corpus.offsets[first], corpus.offsets[last])
        base_loss[tokens], ref_loss[tokens] = both_losses(model, part, options.micro_tokens, label)
        if rank_and_world()[0] == 0:
            save_scores(path, arrays, base_loss, ref_loss, last)
    if found == count and rank_and_world()[0] == 0 and not marks_are_same(path, corpus):
        save_scores(path, arrays, base_loss, ref_loss, count)
        print0(f"{path} has the noise that the rows mark now, which is not what they marked before")
    wait_for_all()

    quality = quality_scores(base_loss, ref_loss)
    lowest, highest = np.nanmin(quality), np.nanmax(quality)
    if lowest == highest:
        mend = "more --n-reference, --reference-epochs or --reference-lr, and another --out"
        raise ValueError(f"the reference learned nothing: Q is {lowest:g} for every token; {mend}")
    return base_loss, ref_loss


def save_scores(path: Path, arrays: dict[str, Array], base_loss: Array, ref_loss: Array, done: int) -> None:
    """Write the file of score(), whole or not at all."""
    with whole_file(path) as file:
        losses = {"base_loss": base_loss, "ref_loss": ref_loss}
        save_arrays(arrays | losses, file, {"done": str(done)})


def marks_are_same(path: Path, corpus: Corpus) -> bool:
    """Whether the noise in a file of scores is the corpus': marks may come later, they change no loss."""
    kept = {}
    for name, known in load_arrays(path).items():
        if name.startswith("noise."):
            kept[name.removeprefix("noise.")] = known
    if kept.keys() != corpus.noise.keys():
        return False
    return all(np.array_equal(kept[kind], known) for kind, known in corpus.noise.items())


def read_scores(path: Path, corpus: Corpus | None = None) -> tuple[Array, Array, int]:
    """base_loss and ref_loss (C,) of a file of score(), and how many examples they cover.

    Raises ValueError for a file that was cut off, and for scores of another corpus.
    """
    try:
        arrays = load_arrays(path)
        with safe_open(path, framework="np") as file:
            done = int(file.metadata()["done"])
        base_loss, ref_loss = arrays["base_loss"], arrays["ref_loss"]
        tokens, offsets = arrays["tokens"], arrays["offsets"]
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a whole file of scores ({error}); remove it") from None
    if corpus is not None:
        same_tokens = np.array_equal(tokens, corpus.tokens)
        if not same_tokens or not np.array_equal(offsets, corpus.offsets):
            raise ValueError(f"{path}: scores of another D_train; remove it, or use another --out")
    return base_loss, ref_loss, done


# ---------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """How a method turns scores into signs: +1 learn, -1 unlearn, 0 leave out."""

    rho: float  # the share kept when --rho does not say; 1: everything, whatever --rho says
    unlearn: bool = False  # N gets sign -1 instead of 0
    by_sequence: bool = False  # partition sequences by their mean Q instead of tokens
    random: bool = False  # a control: the same share, drawn at random
    by_loss: bool = False  # a control: the tokens that theta finds easiest are kept, no reference is asked
    # An option of the same name, where it is given, replaces these
    learn_power: float | None = None  # a of p^a, which multiplies the weight of a token of P
    unlearn_power: float | None = None  # b of p^b, which multiplies that of a token of N
    meaning: str = ""  # its line in --help


METHODS = {
    "full": Method(rho=1.0, meaning="learn every response token: ordinary fine-tuning, eq. 1"),
    "dft": Method(
        rho=1.0, learn_power=1.0, meaning="full, each token times its probability p: arXiv 2508.05629"
    ),
    "ignoring": Method(rho=0.5, meaning="learn P, leave N out"),
    "forgetting": Method(rho=0.7, unlearn=True, meaning="the paper's: learn P, unlearn N, eq. 8"),
    "forgetting-wga": Method(
        rho=0.7,
        unlearn=True,
        unlearn_power=1.0,
        meaning="forgetting, each token of N times its probability p: arXiv 2502.19301",
    ),
    "ignoring-sequence": Method(
        rho=0.5, by_sequence=True, meaning="ignoring that keeps or drops whole rows, by their mean Q"
    ),
    "forgetting-sequence": Method(
        rho=0.7, unlearn=True, by_sequence=True, meaning="forgetting of whole rows, by their mean Q"
    ),
    "ignoring-loss": Method(
        rho=0.5, by_loss=True, meaning="control: keep what theta finds easiest. Is a reference needed?"
    ),
    "ignoring-random": Method(
        rho=0.5, random=True, meaning="control: keep as many as ignoring, drawn at random"
    ),
    "full-P": Method(rho=0.7, random=True, meaning="control: as many random tokens as forgetting has in P"),
    "forgetting-random": Method(rho=0.7, unlearn=True, random=True, meaning="control: unlearn random tokens"),
}
METHOD_OPTIONS = ("learn_power", "unlearn_power")  # None: as the method says
UNTRAINED = {  # rows of the table that stage 4 does not train
    "base": "theta, as it was before",
    "reference": "theta', trained on D_ref alone",
}


def method_of(name: str, options: Options) -> tuple[Method, Options]:
    """The method of a name, and the options of its stage 4; "forgetting:rho=0.5,t_max=1.0" is a variant.

    Raises ValueError for an unknown method, an option that stage 4 does not read, and a value out of range.
    """
    stem, has_changes, changes = name.partition(":")
    if stem not in METHODS:
        known = ", ".join([*UNTRAINED, *METHODS])
        raise ValueError(f"unknown method {stem}; known: {known}; a variant: forgetting:rho=0.5,t_max=1.0")
    method = METHODS[stem]
    changed: dict[str, Any] = {}
    if not method.unlearn:  # it reads no forget rate, which Options would hold against its rho
        changed["forget_rate"] = None
    for key in METHOD_OPTIONS:
        if getattr(options, key) is None:
            changed[key] = getattr(method, key)
    try:
        if has_changes:
            for change in changes.split(","):
                key, value = read_change(change, stem)
                changed[key] = value
        method_options = dataclasses.replace(options, **changed)
        if method_options.rho == POSITIVE and (method.random or method.by_loss):
            raise ValueError(f"{stem} does not look at Q: rho must be a number, not {POSITIVE}")
    except ValueError as error:
        raise ValueError(f"--methods {name}: {error}") from None
    return method, method_options


def read_change(change: str, stem: str) -> tuple[str, Any]:
    """Name and value of an option that a variant changes, such as "rho=0.5". Raises ValueError."""
    key, _, text = change.partition("=")
    allowed = options_of("training", "unlearning")
    if key not in allowed or not text:
        raise ValueError(f"{change!r} is not option=value; options: {', '.join(allowed)}")
    method = METHODS[stem]
    selects_all = method.rho == 1
    unread = (key == "rho" and selects_all) or (key in options_of("unlearning") and not method.unlearn)
    if unread:
        raise ValueError(f"{stem} does not read {key}")
    kind, _ = value_types()[key]
    try:
        return key, kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a value of {key}") from None


def sequence_means(quality: Array, corpus: Corpus) -> tuple[Array, Array]:
    """Mean of quality (C,) over each example's judged tokens, (E,) float64, and how many those are, (E,)."""
    starts = corpus.offsets[:-1]
    judged_quality = np.where(corpus.response, quality, 0)  # (C,)
    sums = np.add.reduceat(judged_quality, starts, dtype=np.float64)
    counts = np.add.reduceat(corpus.response, starts, dtype=np.int64)  # no example is without a response
    return sums / counts, counts


def choose_signs(method: Method, scores: Array, corpus: Corpus, options: Options, seed: int) -> Array:
    """The sign (C,) int8 of every token: +1 in P, -1 in N of a method that unlearns, 0 elsewhere.

    scores (C,) are Q, or what stands in for it: the higher, the sooner a token is kept; NaN where nothing is
    judged. At sequence level a sequence's score is the mean over its judged tokens, the threshold is over
    sequences, and all judged tokens share their sequence's side.
    """
    signs = np.zeros(len(corpus.tokens), np.int8)
    if method.rho == 1:  # full: no score is looked at
        signs[corpus.response] = 1
        return signs

    ranked = scores[corpus.response]  # one score a response token
    token_counts = np.ones(len(ranked), np.int64)
    if method.by_sequence:
        ranked, token_counts = sequence_means(scores, corpus)  # (E,) each: one score a sequence
    if method.random:
        ranked = np.random.default_rng([seed, 1]).random(len(ranked))

    rho = method.rho if options.rho is None else options.rho
    forget_rate = options.forget_rate if method.unlearn else None
    positive, negative = partition(ranked, rho, forget_rate)
    sides = np.zeros(len(ranked), np.int8)
    sides[positive] = 1
    if method.unlearn:
        sides[negative] = -1

    if method.by_sequence:
        sides = np.repeat(sides, token_counts)  # each token takes its sequence's side
    signs[corpus.response] = sides
    return signs


# --------------------------------------------------------------------------------------------- training


def train(
    model: Transformer,
    corpus: Corpus,
    signs: Array,
    folder: Path,
    options: Options,
    seed: int,
    held_out: Corpus | None = None,
) -> None:
    """Train an adapter that lowers the loss of tokens of sign +1 and raises that of -1; signs (C,) int8.

    It stays on the model. The reference and every method are this loop with other signs. A finished adapter
    in `folder` is loaded, a checkpoint continued: what is random is drawn anew from the seed at every step.
    Ctrl-C and SIGTERM end it after a step, with a checkpoint, or at its end, with the adapter.
    FloatingPointError: a loss is not finite.
    """
    finished = folder / "adapter_model.safetensors"
    checkpoint = folder / "checkpoint" / "state.safetensors"
    if finished.is_file():
        print0(f"found {finished}, skipping (metrics.jsonl beside it stays as it is)")
        shutil.rmtree(checkpoint.parent, ignore_errors=True)  # left by a crash between the two
        load_adapter(model, folder)
        return

    # A fresh adapter, or the one of a checkpoint with its optimizer
    drawn = torch.Generator().manual_seed(seed)
    add_lora(model, options.rank, options.alpha, options.dropout, tuple(options.targets), generator=drawn)
    parameters = list(lora_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    first_step = load_checkpoint(checkpoint, model, optimizer)  # 0 without a checkpoint
    total_steps = options.epochs * math.ceil(len(corpus) / options.batch_size)
    signs_or_shares, order = signs, None  # without an order examples_of draws one for every epoch
    if options.step == RELEASED:
        order = corpus.file_order
        signs_or_shares = released_shares(signs, corpus, order, options.batch_size)
    net = data_parallel(model.train())
    log = open_log(folder, first_step, total_steps)
    is_main = rank_and_world()[0] == 0

    bar = progress("/".join(folder.parts[-2:]), total_steps, "steps", first_step, keep=True)
    with bar, stop_between_steps() as signals:
        for step in range(first_step, total_steps):
            examples = examples_of(step, len(corpus), options.batch_size, seed, order)
            lam = scheduled_lambda(step, total_steps, options, log)
            rate = learning_rate_at(step, total_steps, options.lr, options.warmup)
            watched = watch_gradients(net, corpus, signs_or_shares, examples, options, seed, step)
            began = time.perf_counter()

            # The gradient of equation 8, summed over all ranks; the sums of losses are this rank's alone
            seed_dropout(seed, step)
            sums, counts = step_gradient(net, corpus, signs_or_shares, examples, lam, options)
            n_positive, n_negative = counts
            norm = nn.utils.clip_grad_norm_(parameters, options.max_grad_norm or math.inf)  # inf: no clipping

            # All ranks share their sums, and whether one of them was asked to stop: then all do, at this step
            stop_requests = sums.new_full((1,), len(signals))
            totals = sum_over_ranks(torch.cat((sums, stop_requests)))  # (4,)
            shared = torch.cat((totals, norm[None])).tolist()  # waits for the GPU, once a step
            loss, on_positive, on_negative, stops, grad_norm = shared

            figures = {"step": step, "loss": loss, "L_P": None, "L_N": None, "lambda": None}
            if n_positive:
                figures["L_P"] = on_positive / n_positive
            if n_negative and lam:  # at lambda 0 the head does not run for N
                figures["L_N"] = on_negative / n_negative
            if n_negative:
                figures["lambda"] = lam
            figures |= {"lr": rate, "grad_norm": grad_norm} | watched
            if not math.isfinite(loss + grad_norm):
                raise FloatingPointError(f"{folder}: not finite: {figures}, examples {examples.tolist()}")

            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()

            seconds = time.perf_counter() - began
            figures["tokens/s"] = int(corpus.lengths[examples].sum()) / seconds
            if held_out and options.eval_every and (step + 1) % options.eval_every == 0:
                every_row = held_out.everything
                losses = response_losses(model, held_out, every_row, options.micro_tokens, "held-out")
                figures["held-out"] = mean_loss(losses_by_example(losses, held_out))
            append_log(folder, figures, log, bar)
            if is_main and (stops or (step + 1) % options.save_every == 0):
                save_checkpoint(checkpoint, model, optimizer)
            if stops:
                raise KeyboardInterrupt
        if is_main:
            save_adapter(model, folder, options.model)
            shutil.rmtree(checkpoint.parent, ignore_errors=True)
    # The last step may have asked for stops before a signal came. The ranks wait here for the adapter, too
    late_stops = sum_over_ranks(parameters[0].new_full((1,), len(signals)))
    if late_stops.item():
        raise KeyboardInterrupt


def step_gradient(
    net: nn.Module, corpus: Corpus, signs: Array, examples: Array, lam: float, options: Options
) -> tuple[Tensor, tuple[int, int]]:
    """Equation 8 over one optimiser step: leaves its gradient in .grad, over all micro-batches and ranks.

    signs (C,) int8 say what to do with each token, or are the float32 of released_shares; examples are the
    whole step's, and a rank runs its part. Returns this rank's sums (3,) of the objective, of the losses on P
    and of those on N (0 at lambda 0, where N is not run), and (n_P, n_N) of the whole step.
    """
    rank, world = rank_and_world()
    model: Transformer = getattr(net, "module", net)  # DDP keeps the model as its module
    head = model.lm_head.weight  # (V, D)
    device = head.device

    # Every rank knows the signs of the whole step, so counting needs no communication
    step_signs = signs[corpus.places(examples)]
    counts = int((step_signs > 0).sum()), int((step_signs < 0).sum())

    longest_first = sorted(examples.tolist(), key=lambda example: -corpus.lengths[example])
    mine = longest_first[rank::world]
    if not mine:  # fewer examples than ranks; DDP waits for every rank, so this one runs the shortest example
        mine = longest_first[-1:]
        signs = np.zeros_like(signs)  # and learns nothing from it
    micro_batches = list(pack(corpus, mine, options.micro_tokens))
    powers = options.learn_power or 0.0, options.unlearn_power or 0.0

    sums = torch.zeros(3, device=device)
    net.zero_grad(set_to_none=False)  # .grad stays a view of DDP's buckets
    for batch in micro_batches:
        # The weight of each token is known before the model runs; the head runs where it is not 0
        sign = torch.from_numpy(signs[batch.places.numpy()])  # (T,)
        if sign.is_floating_point():  # shares: only lambda is missing
            weights = torch.where(sign < 0, lam * sign, sign)  # (T,)
        else:
            weights = token_weights(sign > 0, sign < 0, lam, counts)  # (T,)
        weighted = weights != 0  # (T,) bool, n of them true; at lambda 0 none of N
        before, targets = shift(batch.tokens, weighted)  # (n,) each
        before, targets = to_device(before, device), to_device(targets, device)
        weights = to_device(weights[weighted], device)  # (n,)

        # DDP reduces after the last micro-batch only; no_sync has to hold the forward pass, too
        is_last = batch is micro_batches[-1]
        with nullcontext() if world == 1 or is_last else net.no_sync():
            hidden = net(to_device(batch.tokens, device), batch.cu_seqlens)[before]  # (n, D)
            loss, losses = weighted_and_token_losses(hidden, head, targets, weights, powers)
            loss.backward()  # with n = 0 too: every adapter gets zeros, and DDP its bucket
        loss_p = losses @ (weights > 0).float()
        loss_n = losses @ (weights < 0).float()
        sums += torch.stack((loss.detach(), loss_p, loss_n))
    return sums, counts


RELEASED = "released"  # a value of --step: what the authors' code does in a step beside equation 8


def released_shares(signs: Array, corpus: Corpus, order: Array, batch_size: int) -> Array:
    """The authors' weights at lambda 1, (C,) float32: 2 / batch_size times +1/n_P or -1/n_N of a row pair.

    Their micro-batch is two rows that follow one another in the order (E,), and their step the mean over
    batch_size / 2 of them, whatever the ranks (also where the last step has fewer). A pair without N unlearns
    nothing. Where a method unlearns, the masks of P and N end a place too early: the last token of the longer
    row, mostly an eos, is in neither (of both rows, if they are equally long).
    """
    unlearns = (signs < 0).any()
    shares = np.zeros(len(signs), np.float32)
    for first in range(0, len(order), 2):
        pair = order[first : first + 2]  # the last row may be alone
        places = corpus.places(pair)
        sign = torch.from_numpy(signs[places])
        if unlearns:
            lengths = corpus.lengths[pair]
            last_tokens = lengths.cumsum() - 1
            longest = lengths == lengths.max()
            sign[last_tokens[longest]] = 0
        shares[places] = token_weights(sign > 0, sign < 0, lam=1.0)
    return shares * np.float32(2 / batch_size)


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


def examples_of(step: int, count: int, batch_size: int, seed: int, order: Array | None = None) -> Array:
    """The examples of a step: every epoch is a permutation of all `count`, drawn from (seed, epoch).

    Where an order is given, it is that of every epoch.
    """
    steps_per_epoch = math.ceil(count / batch_size)
    epoch, place = divmod(step, steps_per_epoch)
    if order is None:
        order = np.random.default_rng([seed, epoch]).permutation(count)
    first = place * batch_size
    return order[first : first + batch_size]


def learning_rate_at(step: int, total_steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up from 0 over ceil(warmup * total) steps, then linear decay to 0; step counts from 0."""
    rising = math.ceil(warmup * total_steps)
    if step < rising:
        return peak * step / rising
    return peak * (total_steps - step) / max(total_steps - rising, 1)


BALANCE = 0.5  # of --lambda-schedule balanced: the most that unlearning may weigh beside learning


def scheduled_lambda(step: int, total_steps: int, options: Options, log: list[dict]) -> float:
    """lambda by --lambda-schedule: the paper's (linear), t_max throughout (constant), or balanced.

    Balanced: the paper's, but at most BALANCE times the ratio of gradients at the last earlier step that was
    watched.
    """
    if options.lambda_schedule == "constant":
        return options.t_max
    lam = lambda_at(step, total_steps, options.t_min, options.t_max)
    ratios = [line["ratio"] for line in log if line.get("ratio")]
    if options.lambda_schedule == "balanced" and ratios:
        lam = min(lam, BALANCE * ratios[-1])
    return lam


def watch_gradients(
    net: nn.Module, corpus: Corpus, signs: Array, examples: Array, options: Options, seed: int, step: int
) -> dict[str, float | None]:
    """Every --watch-gradients steps: norms and cosine of the gradients of P alone and N alone, at lambda 1.

    They are those of mean_P loss and -mean_N loss, with the powers or the --step of the options, if any.
    ratio is that of the norms. Two more passes, with the step's dropout masks; step_gradient clears .grad.
    """
    every = options.watch_gradients
    if not every or step % every or not (signs < 0).any():
        return {}
    gradients = []
    for side in (np.maximum(signs, 0), np.minimum(signs, 0)):  # P alone, N alone
        seed_dropout(seed, step)
        step_gradient(net, corpus, side, examples, 1.0, options)
        of_adapter = [p.grad.flatten() for p in net.parameters() if p.requires_grad]
        gradients.append(torch.cat(of_adapter))
    gradient_p, gradient_n = gradients
    norm_p, norm_n = float(gradient_p.norm()), float(gradient_n.norm())
    figures: dict[str, float | None] = {"grad_P": norm_p, "grad_N": norm_n, "cosine": None, "ratio": None}
    if norm_p * norm_n:
        figures["cosine"] = float(gradient_p @ gradient_n) / (norm_p * norm_n)
    if norm_n:
        figures["ratio"] = norm_p / norm_n
    return figures


def seed_dropout(seed: int, step: int) -> None:
    """Make the masks of a step a function of (seed, step, rank), so that a resumed run draws the same."""
    rank, _ = rank_and_world()
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def stop_between_steps() -> Iterator[list[int]]:
    """Inside the block Ctrl-C and SIGTERM only fill the list; a second one acts at once."""
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, handlers[number])

    try:
        for number in handlers:
            signal.signal(number, note)
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def open_log(folder: Path, first_step: int, total_steps: int) -> list[dict]:
    """The lines of metrics.jsonl up to the first step; what was logged after a checkpoint will come again."""
    path = folder / "metrics.jsonl"
    log = []
    if first_step:
        print0(f"{folder}: continuing from step {first_step} of {total_steps}")
        log = read_log(path)[:first_step]
    wait_for_all()  # every rank has read it
    if rank_and_world()[0] == 0:
        write_rows(log, path)
    return log


def read_log(path: Path) -> list[dict]:
    """The lines of a .jsonl of a run up to the first that is not whole: a full disk cuts one off."""
    log = []
    with suppress(ValueError, FileNotFoundError):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            log.append(json.loads(line))
    return log


def append_log(folder: Path, figures: dict, log: list[dict], bar: Any) -> None:
    """Log one step, on rank 0 to the file as well, and show it. Raises OSError naming the file."""
    log.append(figures)
    names = {"loss": "loss", "L_P": "P", "L_N": "N", "lambda": "lam", "tokens/s": "tok/s"}
    shown = [f"{name} {figures[key]:.3g}" for key, name in names.items() if figures[key] is not None]
    bar.set_postfix_str(" ".join(shown), refresh=False)
    bar.update()
    if rank_and_world()[0] > 0:
        return
    path = folder / "metrics.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error})") from None


# ---------------------------------------------------------------------------------------------- options

GROUPS = {  # of options, with what --help says of them
    "rows": "The model and the rows. A run is continued where these hold the same, whatever they are called.",
    "training": "Stage 4; stage 1, too, but for --rho, and for --lr and --epochs where --reference-lr and "
    "--reference-epochs say otherwise. A variant may change these.",
    "unlearning": "Read by methods that unlearn. A variant may change these.",
    "setting": "One for all of a run.",
    "measuring": "What the table shows. It may change when a run is continued.",
    "machine": "Where it runs, and what it writes. It may change when a run is continued.",
}


def option(group: str, default: Any, text: str, allowed: Any = None) -> Any:
    """A field of Options: group, default or a function that makes it, line of --help, what is allowed.

    allowed is an interval of numbers such as "(0, 1]", a tuple of words, or None for anything.
    """
    metadata = {"group": group, "help": text, "allowed": allowed}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_device() -> str:
    """cuda where torch has it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Options:
    """The command line; the defaults are the paper's recipe. What follows another option begins as None."""

    model: str = option("rows", None, "checkpoint folder or Hub id, with an optional @revision")
    data: list[str] = option(
        "rows", list, "rows: .jsonl, .json or .parquet files, each with an optional :count"
    )
    reference_data: list[str] = option(
        "rows", list, "rows of D_ref that you trust; else D_ref is drawn from --data"
    )
    n_reference: int | None = option(
        "rows", None, "examples in D_ref [10,000; a sixth of a small pool]", "[1, inf)"
    )
    n_train: int | None = option(
        "rows", None, "examples in D_train [50,000; the rest of a small pool]", "[1, inf)"
    )
    max_length: int = option("rows", 2048, "tokens an example is cut to", "[1, inf)")
    skip_bad_rows: bool = option("rows", False, "train without the rows that cannot be used")

    rho: float | str | None = option(
        "training",
        None,
        "share of tokens kept as positive [0.7; ignoring 0.5]; positive: those of Q > 0",
        "(0, 1]",
    )
    lr: float = option("training", 1e-4, "peak learning rate of AdamW (no weight decay)", "(0, inf)")
    warmup: float = option(
        "training", 0.03, "share of the steps in which the rate rises; then it falls", "[0, 1)"
    )
    batch_size: int = option("training", 24, "sequences a step, over all ranks", "[1, inf)")
    epochs: int = option("training", 1, "passes over D_train", "[1, inf)")
    max_grad_norm: float = option(
        "training", 0.0, "clip the gradient to this norm; 0: off, the paper's", "[0, inf)"
    )
    step: str = option(
        "training",
        "paper",
        "paper: eq. 8; released: as the authors' code, whose means are over pairs of rows in the order of "
        "the files (the seed shuffles nothing), and lack a last token where it unlearns",
        ("paper", RELEASED),
    )
    learn_power: float | None = option(
        "training",
        None,
        "multiply the weight of a learned token by its probability to this power [0; dft 1]",
        "[0, inf)",
    )
    rank: int = option("training", 64, "LoRA rank", "[1, inf)")
    alpha: float = option("training", 16.0, "LoRA alpha; the side path is scaled by alpha / rank", "(0, inf)")
    dropout: float = option("training", 0.1, "LoRA dropout", "[0, 1)")

    forget_rate: float | None = option("unlearning", None, "share of tokens unlearned [1 - rho]", "[0, 1]")
    lambda_schedule: str = option(
        "unlearning",
        "linear",
        "linear: lambda grows as the paper's; constant: t-max throughout; balanced: the paper's, but at most "
        "half of the ratio that --watch-gradients saw",
        ("linear", "constant", "balanced"),
    )
    t_min: float = option("unlearning", 1e-5, "lowers the slope of lambda (paper's 3B, 8B: 1e-4)", "[0, inf)")
    t_max: float = option("unlearning", 0.25, "lambda nears t-max - t-min at the last step", "[0, inf)")
    unlearn_power: float | None = option(
        "unlearning",
        None,
        "multiply the weight of an unlearned token by its probability to this power [0; forgetting-wga 1]",
        "[0, inf)",
    )
    watch_gradients: int = option(
        "unlearning", 0, "log both gradients every so many steps; 0: never", "[0, inf)"
    )

    template: str = option(
        "setting", "tulu", "of conversations; model: the checkpoint's own", ("tulu", "model")
    )
    targets: list[str] = option(
        "setting", lambda: list(DEFAULT_TARGETS), "layers with an adapter, if they are there"
    )
    reference_lr: float = option("setting", None, "peak rate of the reference [--lr]", "(0, inf)")
    reference_epochs: int | None = option(
        "setting",
        None,
        "passes over D_ref [as --epochs, but at least 24 steps; 8 if D_ref is drawn from --data]",
        "[1, inf)",
    )
    # not float16, whose gradients would underflow
    dtype: str = option(
        "setting", None, "of the frozen weights [bfloat16; CPU float32]", ("bfloat16", "float32")
    )
    score_dtype: str = option(
        "setting", None, "of the weights while scoring [--dtype]", tuple(sorted(DTYPES))
    )

    methods: list[str] = option(
        "measuring",
        lambda: ["base", "reference", "full", "ignoring", "forgetting"],
        "rows of the table, see below",
    )
    seeds: list[int] = option("measuring", lambda: [0], "one training per method and seed", "[0, 2147483647]")
    eval_data: list[str] = option("measuring", list, "rows held out: their response loss, in the table")
    eval_every: int = option(
        "measuring", 0, "their loss in metrics.jsonl, too, every so many steps; 0: never", "[0, inf)"
    )
    skip_train_losses: bool = option(
        "measuring", False, "leave L_P and L_N out of the table, which takes a pass less"
    )
    tasks: list[str] = option("measuring", list, "tasks of eval.py for the table")
    data_dir: str = option("measuring", "runs/data", "folder of the tasks' rows")
    limit: float | None = option(
        "measuring", None, "only the first LIMIT documents of each task; below 1: that share of them"
    )

    out: str = option("machine", "runs/latest", "run folder, continued by the same command")
    save_every: int = option(
        "machine", 100, "steps between checkpoints, of training and of scoring", "[1, inf)"
    )
    device: str = option("machine", default_device, "cpu or cuda")
    micro_tokens: int = option("machine", None, "tokens a pass [8192; CPU 1024, bfloat16 4096]", "[1, inf)")
    checkpoint_activations: bool = option("machine", False, "less memory: blocks run twice")
    compile: bool = option("machine", False, "compile the blocks, on a GPU (no GPU has tried it)")

    def __post_init__(self) -> None:
        """Check each option, then those that go together, then fill in those that follow others."""
        for field in dataclasses.fields(self):
            check_option(field.name, getattr(self, field.name), field.metadata["allowed"])
        check_shares(METHODS["forgetting"].rho if self.rho is None else self.rho, self.forget_rate)
        if self.eval_every and not self.eval_data:
            raise ValueError("--eval-every needs --eval-data, the rows whose loss it logs")
        if self.lambda_schedule == "balanced" and not self.watch_gradients:
            raise ValueError("--lambda-schedule balanced needs --watch-gradients, whose figures it follows")
        if self.t_max < self.t_min and self.lambda_schedule != "constant":
            raise ValueError(f"--t-max {self.t_max} is below --t-min {self.t_min}")
        if self.step == RELEASED and self.batch_size % 2:
            raise ValueError(f"--step {RELEASED} takes rows in pairs: --batch-size {self.batch_size} is odd")
        self.limit = checked_limit(self.limit)
        self.methods = list(dict.fromkeys(self.methods))
        self.seeds = list(dict.fromkeys(self.seeds))
        if self.reference_lr is None:
            self.reference_lr = self.lr
        on_cpu = self.device == "cpu"
        if self.dtype is None:
            self.dtype = "float32" if on_cpu else "bfloat16"
        if self.score_dtype is None:
            self.score_dtype = self.dtype
        if self.micro_tokens is None:
            small_packs = 4096 if self.dtype == "bfloat16" else 1024  # save memory; bfloat16 is cast in each
            self.micro_tokens = small_packs if on_cpu else 8192


def options_of(*groups: str) -> list[str]:
    """The names of the options of some groups."""
    return [field.name for field in dataclasses.fields(Options) if field.metadata["group"] in groups]


def check_option(name: str, value: Any, allowed: Any) -> None:
    """Raise ValueError for a value outside its interval or choice; a list is looked at value by value."""
    flag = "--" + name.replace("_", "-")
    for one in value if isinstance(value, list) else [value]:
        if one is None or allowed is None:
            continue
        if isinstance(allowed, tuple):
            if one not in allowed:
                raise ValueError(f"{flag} {one} is not one of {', '.join(allowed)}")
            continue
        if name == "rho" and one == POSITIVE:
            continue
        low, high = map(float, allowed[1:-1].split(","))
        above = low <= one if allowed[0] == "[" else low < one
        below = one <= high if allowed[-1] == "]" else one < high
        if not (above and below):
            raise ValueError(f"{flag} {one} is not in {allowed}")


def value_types() -> dict[str, tuple[Any, bool]]:
    """For every option what makes a value of a text, and whether there may be several."""
    types = {}
    for name, hint in typing.get_type_hints(Options).items():
        several = typing.get_origin(hint) is list
        parts = typing.get_args(hint)  # (str,) of list[str]; (int, NoneType) of int | None
        kind = parts[0] if parts else hint
        types[name] = (read_rho if name == "rho" else kind, several)
    return types


def read_rho(text: str) -> float | str:
    """A share, or the word that stands for Q > 0. Raises ValueError."""
    return text if text == POSITIVE else float(text)


def parse_options(argv: list[str] | None = None, **defaults: Any) -> Options:
    """The command line as Options; `defaults` stand in for some of theirs. Raises ValueError."""
    parser = argparse.ArgumentParser(
        usage="./run.sh --model M --data rows.jsonl --out RUN ... (--help lists the options)",
        description=(__doc__ or "").partition("\n\ntests/plain.py")[0],
        epilog=describe_methods(),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    headings = {name: parser.add_argument_group(name, sentence) for name, sentence in GROUPS.items()}
    for field in dataclasses.fields(Options):
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        add_flag(headings[field.metadata["group"]], field, defaults.get(field.name, default))
    return Options(**vars(parser.parse_args(argv)))


def add_flag(group: Any, field: dataclasses.Field, default: Any) -> None:
    """Give an option its flag, in its group of --help."""
    kind, several = value_types()[field.name]
    text = field.metadata["help"]
    if default not in (None, [], False) and "[" not in text:
        shown = " ".join(map(str, default)) if several else default
        text += f" [{shown}]"
    settings: dict[str, Any] = {"default": default, "help": text}
    if kind is bool:
        settings["action"] = "store_true"
    else:
        settings["type"] = kind
    if several:
        settings["nargs"] = "+"
    if isinstance(field.metadata["allowed"], tuple):
        settings["choices"] = field.metadata["allowed"]
    group.add_argument("--" + field.name.replace("_", "-"), **settings)


def describe_methods() -> str:
    """The methods with a line each, as they stand below the options in --help."""
    meanings = UNTRAINED | {name: method.meaning for name, method in METHODS.items()}
    lines = [f"  {name:<21} {meaning}" for name, meaning in meanings.items()]
    variants = "  A variant changes options of training and unlearning: forgetting:rho=0.5,t_max=1.0"
    return "\n".join(["methods:", *lines, variants])


# ------------------------------------------------------------------------------------------------- data


def select_data(options: Options, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """D_ref and D_train, the same for every seed and method."""
    read = [read_rows(options.data, keep_bad=True), read_rows(options.reference_data, keep_bad=True)]
    (rows, reference), notes = render_rows(read, tokenizer, options.skip_bad_rows)
    for_reference, for_training, lines = split_rows(rows, reference, options.n_reference, options.n_train)
    notes += lines
    if tokenizer.chat_template and tokenizer.template is None:
        notes.append("the model has a chat template of its own; conversations take Tulu's (--template)")
    for note in notes:
        print0(note)
    d_ref = encode_rows(for_reference, tokenizer, options.max_length)
    d_train = encode_rows(for_training, tokenizer, options.max_length)
    d_ref.file_order = order_of_files(d_ref, reference or rows)
    d_train.file_order = order_of_files(d_train, rows)
    for name, corpus in (("D_ref", d_ref), ("D_train", d_train)):
        counts = f"{len(corpus.tokens):,} tokens, {corpus.response.sum():,} of them response"
        dropped = f"{corpus.dropped} rows dropped: no response within {options.max_length} tokens"
        print0(f"{name} {len(corpus):,} examples, {counts}; {dropped}")
        print_cut(name, corpus, options)
    return d_ref, d_train


def order_of_files(corpus: Corpus, rows: list[RenderedRow]) -> Array:
    """The examples of a corpus (E,) in the order in which their rows were read."""
    read = {row.row["_source"]: place for place, row in enumerate(rows)}
    places = [read[location] for location in corpus.locations]
    return np.argsort(places)


def print_cut(name: str, corpus: Corpus, options: Options) -> None:
    """Say how many answers are not whole."""
    if corpus.cut:
        lost = f"{corpus.cut} answers are cut: they lose their end and eos to --max-length"
        print0(f"{name} {lost} {options.max_length}")


def read_held_out(options: Options, tokenizer: Tokenizer, *trained: Corpus) -> Corpus:
    """The rows of --eval-data, none without it. Raises ValueError if some are in D_ref or D_train."""
    if not options.eval_data:
        return trained[0].part(0, 0)  # an empty corpus
    read = read_rows(options.eval_data, keep_bad=True)
    (rows,), notes = render_rows([read], tokenizer, options.skip_bad_rows)
    for note in notes:
        print0(f"--eval-data: {note}")
    held_out = encode_rows(unique_rows(rows), tokenizer, options.max_length)
    print_cut("--eval-data", held_out, options)
    known = set()
    for corpus in trained:
        known |= {tokens.tobytes() for tokens in corpus.split()}
    shared = sum(tokens.tobytes() in known for tokens in held_out.split())
    if shared:
        raise ValueError(f"--eval-data: {shared} of its {len(held_out)} rows are in D_ref or D_train, too")
    return held_out


TRUSTED_STEPS, DRAWN_STEPS = 24, 8  # the fewest steps of a reference, by where D_ref comes from


def reference_options(options: Options, n_reference: int) -> Options:
    """The options of stage 1: --reference-lr, and --reference-epochs or as many as make enough steps.

    On rows that are trusted a reference needs 24 steps, however few rows there are: after 8 its Q tells
    nothing yet (tests/README.md). A D_ref that was drawn from --data gets the paper's single pass, but at
    least 8 steps: the rate begins at 0 and ends near it, and fewer teach nothing.
    """
    fewest = TRUSTED_STEPS if options.reference_data else DRAWN_STEPS
    steps_per_epoch = math.ceil(n_reference / options.batch_size)
    enough = math.ceil(fewest / steps_per_epoch)
    epochs = options.reference_epochs or max(options.epochs, enough)
    if epochs > options.epochs and options.reference_epochs is None:
        steps = epochs * steps_per_epoch
        print0(f"D_ref has {n_reference} examples: {epochs} epochs, {steps} steps (--reference-epochs)")
    if epochs * steps_per_epoch == 1 and options.warmup:
        reason = "a single step, whose rate is 0, teaches the reference nothing"
        raise ValueError(f"{reason}: more --reference-epochs, a smaller --batch-size, or --warmup 0")
    return dataclasses.replace(options, lr=options.reference_lr, epochs=epochs)


def load_base(
    options: Options, checkpoint: Path, documents: list[Documents], *corpora: Corpus
) -> Transformer:
    """theta, after all that can be wrong between model, tokens and LoRA targets has been looked for."""
    config = read_config(checkpoint)
    limit = config.max_position_embeddings
    check_room(documents, limit)
    for corpus in corpora:
        check_ids(corpus.tokens, config.vocab_size, checkpoint)
        longest = int(corpus.lengths.max(initial=0))
        if not config.rope and longest > limit:
            reason = f"an example of {longest} tokens exceeds the model's {limit} learned positions"
            raise ValueError(f"--max-length {options.max_length}: {reason}")
    model = load_model(checkpoint, options.device, DTYPES[options.dtype])
    model.checkpoint_activations = options.checkpoint_activations
    if options.compile:
        model.compile_blocks()
    target_layers(model, tuple(options.targets))  # raises ValueError for one that is not there
    return model


# --------------------------------------------------------------------------------------- the run folder


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


def run_date(out: Path) -> datetime:
    """The date that a chat template may write into the rows: that of the run's first start, on every rank.

    It is kept in config.json, so that the same command makes the same rows tomorrow.
    """
    rank, _ = rank_and_world()
    date = datetime.now().replace(microsecond=0)
    config = out / "config.json"
    if rank == 0 and config.is_file():
        kept = read_object(config).get("date", date.isoformat())  # an older run has none
        try:
            date = datetime.fromisoformat(kept)
        except (TypeError, ValueError):
            raise ValueError(f"{config}: date {kept!r} is not a date") from None
    return join_over_ranks({rank: date})[0]


def open_run(options: Options, checkpoint: Path, date: datetime, d_ref: Corpus, d_train: Corpus) -> Path:
    """The run folder, with config.json: every option, the packages' versions, what the run is made from.

    Raises ValueError for a folder with files of somebody else, and for a run that was made from other inputs.
    """
    out = Path(options.out)
    inputs = {"model": model_fingerprint(checkpoint)}
    inputs |= {"reference data": d_ref.fingerprint(), "training data": d_train.fingerprint()}
    inputs |= {name: getattr(options, name) for name in options_of("training", "unlearning", "setting")}
    check_inputs(out, inputs)
    scores = out / "scores.safetensors"
    if scores.is_file():
        read_scores(scores, d_train)  # what is wrong is found before anything is written
    wait_for_all()  # every rank has looked before rank 0 writes
    if rank_and_world()[0] == 0:
        versions = {package.__name__: package.__version__ for package in (torch, np, safetensors, tokenizers)}
        content = dataclasses.asdict(options) | {"date": date.isoformat(), "versions": versions}
        content["inputs"] = inputs
        write_text(json.dumps(content, indent=2) + "\n", out / "config.json")
    print0(f"{out}: {options.model}")
    return out


def refuse_foreign_files(out: Path) -> None:
    """Raise ValueError for a folder that holds files, but no config.json of a run."""
    if not (out / "config.json").is_file() and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} holds files that are not of a run: use another --out")


def check_inputs(out: Path, inputs: dict[str, Any]) -> None:
    """Raise ValueError where a folder holds files, but not those of a run that was made from these inputs."""
    config = out / "config.json"
    refuse_foreign_files(out)
    if not config.is_file():
        return
    before = read_object(config).get("inputs")
    if not isinstance(before, dict):
        raise ValueError(f"{out}: its config.json is not of a run: use another --out")
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    differing = []
    for name in before | inputs:
        there = before.get(name, defaults.get(name))  # an option may be younger than the run
        now = inputs.get(name)
        if there != now:
            differing.append(f"{name} (there {there!r}, now {now!r})")
    if differing:
        raise ValueError(f"{out} was made with other {'; '.join(differing)}: use another --out")


# ----------------------------------------------------------------------- what a run says before stage 4


def describe_plan(ref_options: Options, trained: dict, d_ref: Corpus, d_train: Corpus, seeds: int) -> str:
    """How many steps, trainings and tokens are to come; a note where so few steps teach nothing."""
    trainings = [("the reference", d_ref, ref_options, 1)]
    for name, (_, method_options) in trained.items():
        trainings.append((name, d_train, method_options, seeds))
    lines = []
    notes: dict[str, None] = {}  # each once, in order
    for name, corpus, options, times in trainings:
        steps = options.epochs * math.ceil(len(corpus) / options.batch_size)
        tokens = options.epochs * len(corpus.tokens) * times
        lines.append([name, str(times), str(steps), f"{options.lr:g}", f"{tokens:,}"])
        if steps == 1 and options.warmup:
            notes["warning: a single step has rate 0 and teaches nothing: --warmup 0, or more epochs"] = None
        elif steps * options.lr < 0.006:  # 17 steps at 3e-4 hardly told methods apart, 20 at 5e-4 did
            notes["note: so few steps at such a rate teach little: more --epochs, or a higher --lr"] = None
    plan = table(["plan", "trainings", "steps each", "rate", "tokens"], lines)
    return "\n".join([plan, *notes])


def unfinished(to_train: dict, seeds: list[int], out: Path) -> list[Options]:
    """The options of each training of stage 4 that the run folder does not hold yet."""
    left = []
    for name, seed in product(to_train, seeds):
        if not (out / name / f"seed-{seed}" / "adapter_model.safetensors").is_file():
            _, method_options = to_train[name]
            left.append(method_options)
    return left


def describe_time(log: list[dict], trainings: list[Options], d_train: Corpus) -> str:
    """How long these trainings on D_train take, at the speed that the log of the reference shows."""
    speeds = [line["tokens/s"] for line in log if line.get("tokens/s")]
    epochs = sum(options.epochs for options in trainings)
    if not speeds or not epochs:
        return "no training of stage 4 is to come"
    minutes = epochs * len(d_train.tokens) / float(np.median(speeds)) / 60
    about = f"about {minutes:.0f} minutes" if minutes >= 2 else f"about {minutes:.1f} minutes"
    if minutes < 0.5:
        about = "less than a minute"
    return f"the trainings to come take {about}; scores and figures come on top"


def describe_scores(base_loss: Array, ref_loss: Array, signs: Array) -> str:
    """What Q looks like and where it was cut, in three lines; all (C,), NaN where nothing is judged."""
    judged = np.isfinite(base_loss)
    base_loss, ref_loss, signs = base_loss[judged], ref_loss[judged], signs[judged]  # (n,) each
    quality = quality_scores(base_loss, ref_loss)
    low, middle, high = np.quantile(quality, (0.05, 0.5, 0.95))
    share = (quality > 0).mean()
    lines = [
        f"Q of {len(quality):,} response tokens: mean {quality.mean():.3f}, deviation {quality.std():.3f}, "
        f"5 / 50 / 95 % at {low:.3f} / {middle:.3f} / {high:.3f}",
        f"mean loss {base_loss.mean():.3f} under theta, {ref_loss.mean():.3f} under theta'; "
        f"{share:.0%} of the tokens have Q > 0, the paper's first guess for --rho",
    ]
    positive, negative = quality[signs > 0], quality[signs < 0]
    if len(positive) and len(negative):
        lines.append(
            f"lowest Q in P {positive.min():.3f}: {len(positive):,} tokens in P, {len(negative):,} in N"
        )
    elif len(positive):
        lines.append("warning: no token is in N, forgetting is full: Q has too many ties, or rho is 1")
    else:
        lines.append("warning: no token is in P: nothing is learned, only unlearned")
    return "\n".join(lines)


def describe_trust(
    held_out: Corpus, held_out_quality: Array, quality: Array, d_train: Corpus, options: Options
) -> str:
    """Where D_ref comes from, and the trust gap, with what it told in our runs; (C,) Q of each corpus."""
    origin = "D_ref is --reference-data"
    if not options.reference_data:
        origin = "D_ref was drawn from --data and is as noisy as it: --reference-data takes rows you trust"
    if len(held_out) < 3:
        given = f"--eval-data has {len(held_out)} of the 3 rows needed" if len(held_out) else "no --eval-data"
        return f"{origin}\n{given}: only rows that you trust could tell whether Q points the right way"
    trusted = sequence_means(held_out_quality, held_out)
    deviation = float(np.nanstd(quality))
    gap, low, high = trust_gap(trusted, sequence_means(quality, d_train), deviation)
    than = f"Q of the {len(held_out)} rows of --eval-data against rows of D_train of the same length"
    lines = [origin, f"trust gap {gap:+.2f} [{low:+.2f}, {high:+.2f}] deviations of Q: {than}"]
    # what it told in the 66 runs of tests/README.md, in two small worlds
    if high < 0:
        lines.append(
            "warning: Q is lower on rows you trust. In 11 of our 11 such runs ignoring lost to full:"
        )
        lines.append("use full, or a cleaner D_ref")
    elif low <= 0:
        lines.append("so it cannot be told whether Q points the right way: in 5 of our 12 such runs ignoring")
        mend = "more --reference-epochs" if options.reference_data else "rows you trust as --reference-data"
        lines.append(f"beat full. More trusted rows in --eval-data, or {mend}")
    else:
        lines.append(
            "so the reference has learned what rows you trust have and D_train lacks: in 40 of our 43"
        )
        lines.append("such runs ignoring beat full. Whether what Q ranks low is wrong, look: ./run.sh look")
    return "\n".join(lines)


def trust_gap(
    trusted: tuple[Array, Array], untrusted: tuple[Array, Array], deviation: float
) -> tuple[float, float, float]:
    """How much higher Q is on trusted rows than on rows of D_train of the same length, in deviations of Q.

    Each is (mean Q (R,), tokens (R,)) of its rows, as sequence_means has them. Short answers have another Q
    than long ones whatever they say, so a line of mean Q over the logarithm of the length is fitted to the
    rows of D_train; the tokens of the trusted rows are compared with it. Returns the gap and its 95 %
    interval over rows.
    """
    means, tokens = untrusted
    lengths = np.log(tokens)
    slope, level = 0.0, float(means.mean())
    if len(means) > 2 and lengths.std() > 0:
        slope, level = np.polyfit(lengths, means, 1)
    scatter = float((means - level - slope * lengths).std()) / math.sqrt(len(means))

    trusted_means, trusted_tokens = trusted
    above = trusted_means - level - slope * np.log(trusted_tokens)  # (R,)
    weights = trusted_tokens / trusted_tokens.sum()
    gap = float(weights @ above)
    rows = len(above)
    error = math.sqrt(float(weights**2 @ (above - gap) ** 2) * rows / (rows - 1))
    reach = student_t_quantile(0.05, rows - 1) * math.hypot(error, scatter)
    return gap / deviation, (gap - reach) / deviation, (gap + reach) / deviation


def roc_auc(low: Array, high: Array) -> float:
    """The chance that a value of `low` is below one of `high`, ties counting half: the area under the ROC."""
    if not len(low) or not len(high):
        return math.nan
    ordered = np.sort(high)
    below = np.searchsorted(ordered, low, "left")  # values of `high` below each of `low`
    not_above = np.searchsorted(ordered, low, "right")  # and those equal to it
    above = len(high) - (below + not_above) / 2
    return float(above.mean() / len(high))


def detection(quality: Array, negative: Array, corpus: Corpus) -> dict[str, float]:
    """How well a low Q (C,) finds noise that the rows mark: AUC by token and by row, precision, recall of N.

    negative (C,) bool is N. A kind's AUC is against what is no noise at all; a row's score is its mean Q. {}
    where no token is known to be noise.
    """
    noisy = corpus.noisy  # (C,)
    if not noisy.any():
        return {}
    means, _ = sequence_means(quality, corpus)  # (E,)
    kinds = {"": noisy}
    for kind in sorted(corpus.noise):
        kinds[f" {kind}"] = corpus.noise[kind]
    starts = corpus.offsets[:-1]
    noisy_rows = {kind: np.logical_or.reduceat(known, starts) for kind, known in kinds.items()}  # (E,) each
    clean = quality[corpus.response & ~noisy]
    clean_rows = means[~noisy_rows[""]]

    figures = {"noise share": float(noisy.sum() / corpus.response.sum())}
    for kind, known in kinds.items():
        figures[f"AUC{kind}"] = roc_auc(quality[known], clean)
    for kind, known in noisy_rows.items():
        figures[f"row AUC{kind}"] = roc_auc(means[known], clean_rows)
    found = (noisy & negative).sum()
    figures["precision of N"] = float(found / max(negative.sum(), 1))
    figures["recall of N"] = float(found / noisy.sum())
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def describe_noise(figures: dict[str, float]) -> str:
    """detection() in a line."""
    found = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
    return f"does a low Q find the known noise? (AUC of chance: 0.5) {found}"


def describe_rows(
    quality: Array, base_loss: Array, corpus: Corpus, tokenizer: Tokenizer, count: int = 3
) -> str:
    """Rows to look at first, in two orders: lowest mean Q, and highest mean loss under theta; all (C,)."""
    means, _ = sequence_means(quality, corpus)  # (E,)
    losses, _ = sequence_means(base_loss, corpus)  # (E,)
    lines = ["rows to look at first: of lowest Q, where the reference disagrees with the row"]
    for example in np.argsort(means, kind="stable")[:count]:
        lines.append(f"  {show_row(corpus, example, tokenizer)}  Q {means[example]:.2f}")
    lines.append("and of highest loss, which theta itself finds odd: on real rows often the better list")
    for example in np.argsort(-losses, kind="stable")[:count]:
        lines.append(f"  {show_row(corpus, example, tokenizer)}  loss {losses[example]:.2f}")
    return "\n".join(lines)


def show_row(corpus: Corpus, example: int, tokenizer: Tokenizer) -> str:
    """Where a row stands, the end of its question and the beginning of its answer."""
    first, last = corpus.offsets[example], corpus.offsets[example + 1]
    tokens = corpus.tokens[first:last]  # (length,)
    response = corpus.response[first:last]
    before = response.argmax()  # how many tokens there are before the first of a response
    asked = tokenizer.decode(tokens[:before].tolist())
    opening, closing = around_question(tokenizer)
    question = asked.removeprefix(opening).removesuffix(closing).rstrip()
    answer = tokenizer.decode(tokens[response].tolist())
    return f"{corpus.locations[example]}  {question[-60:]!r} -> {answer[:60]!r}"


def around_question(tokenizer: Tokenizer) -> tuple[str, str]:
    """What the template writes before and after a question, as it is shown: without special tokens."""
    shown = tokenizer.decode(question_ids("7", tokenizer))
    before, _, after = shown.rpartition("7")
    return before, after


# ---------------------------------------------------------------------------------- figures and the table


@dataclass(frozen=True)
class EvalSuite:
    """What every model of a run is measured by."""

    tokenizer: Tokenizer
    documents: list[Documents]
    held_out: Corpus
    d_train: Corpus
    signs: Array | None  # (C,) plain forgetting's, so that L_P and L_N are over the same tokens in every row
    token_budget: int

    @property
    def sample(self) -> Array:
        """The examples of D_train that L_P and L_N are over: up to 512, evenly spread."""
        count = len(self.d_train)
        return np.linspace(0, count - 1, min(512, count)).astype(int)


def losses_by_example(losses: Array, corpus: Corpus) -> list[dict]:
    """Of every example its source, the mean loss of its response tokens in nats, and how many there are.

    losses (C,) are those of the corpus' tokens.
    """
    if not len(corpus):
        return []
    means, counts = sequence_means(losses, corpus)  # (E,) each
    rows = []
    for source, loss, tokens in zip(corpus.locations, means.tolist(), counts.tolist()):
        rows.append({"row": source, "loss": loss, "tokens": tokens})
    return rows


def mean_loss(rows: list[dict]) -> float:
    """The mean loss over the tokens of losses_by_example. Raises ValueError where one is not finite."""
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise ValueError(f"{row['row']}: its held-out loss is {row['loss']}")
    total = sum(row["loss"] * row["tokens"] for row in rows)
    return total / sum(row["tokens"] for row in rows)


def train_losses(losses: Array, suite: EvalSuite, label: str) -> dict[str, float | None]:
    """L_P and L_N of a model with these losses (C,), over the sample; None where there is no token."""
    places = suite.d_train.places(suite.sample)
    means: dict[str, float | None] = {}
    for name, sign in (("L_P", 1), ("L_N", -1)):
        on_side = places[suite.signs[places] == sign]
        found = losses[on_side]
        means[name] = float(found.mean()) if len(found) else None
        if not np.isfinite(found).all():
            raise ValueError(f"{label}: {name} is {means[name]}")
    return means


def suite_losses(model: Transformer, suite: EvalSuite, label: str) -> tuple[Array, Array]:
    """Losses on the sample of D_train, if L_P and L_N are wanted, and on the held-out rows; (C,) each."""
    sample = suite.sample if suite.signs is not None else np.arange(0)
    budget = suite.token_budget
    on_train = response_losses(model, suite.d_train, sample, budget, f"{label}: L_P and L_N")
    held_out = suite.held_out
    on_held_out = response_losses(model, held_out, held_out.everything, budget, f"{label}: held-out")
    return on_train, on_held_out


def measure(
    model: Transformer, suite: EvalSuite, folder: Path, known: tuple[Array, Array] | None = None
) -> dict:
    """The figures of one model, also in folder/results.json; those of rows and documents in files beside.

    known: its losses on D_train and on the held-out rows, (C,) each, where scoring has computed them already.
    What an earlier command measured stays there; a task that it measured the same way is not measured again.
    """
    path = folder / "results.json"
    label = "/".join(folder.parts[-2:])
    identity = {task.name: task.identity for task in suite.documents}
    if len(suite.held_out):
        identity["held-out"] = suite.held_out.fingerprint()
    results: dict[str, Any] = {"identity": {}, "tasks": {}}
    if path.is_file():
        results |= read_object(path)
        has_losses = suite.signs is None or "L_P" in results
        if has_losses and identity.items() <= results["identity"].items():
            return results

    before = results["identity"]
    to_evaluate = [task for task in suite.documents if before.get(task.name) != task.identity]
    results["identity"] = before | identity
    on_train, on_held_out = known or suite_losses(model, suite, label)  # (C,) each
    if suite.signs is not None:
        results |= train_losses(on_train, suite, label)
    rows = losses_by_example(on_held_out, suite.held_out)
    if rows:
        results["held-out"] = mean_loss(rows)
    tasks, samples = evaluate(model, suite.tokenizer, to_evaluate)
    results["tasks"] |= tasks
    wait_for_all()  # every rank has looked for results before rank 0 writes some
    if rank_and_world()[0] == 0:
        path.unlink(missing_ok=True)  # if this ends half-way, old figures must not vouch for new files
        if rows:
            write_rows(rows, folder / "held-out.jsonl")
        if samples:
            there = read_log(folder / "samples.jsonl")
            of_other_tasks = [sample for sample in there if sample["task"] not in tasks]
            write_rows(of_other_tasks + samples, folder / "samples.jsonl")
        write_text(json.dumps(results, indent=2) + "\n", path)
    wait_for_all()
    return results


def columns(figures: dict) -> dict[str, float]:
    """A model's row of the table: the average of its tasks, every metric in percent, and its losses."""
    row = {}
    main_metrics = primary_metrics(figures["tasks"])
    if main_metrics:
        row["average"] = sum(main_metrics.values()) / len(main_metrics)
    for task, result in figures["tasks"].items():
        for metric in metrics_of(result):
            scale = 1 if metric == "perplexity" else 100
            row[f"{task} {metric}"] = result[metric] * scale
    for name in ("L_P", "L_N", "held-out"):
        if figures.get(name) is not None:
            row[name] = figures[name]
    return row


LOSSES = ("L_P", "L_N", "held-out")  # shown with three digits


def comparison(results: Results) -> str:
    """The table: a row per method, its figures as mean +- sample standard deviation over seeds."""
    rows_by_method = {}
    names: dict[str, None] = {}  # of the columns, in order
    for method, by_seed in results.items():
        rows_by_method[method] = [columns(figures) for figures in by_seed.values()]
        for row in rows_by_method[method]:
            names |= dict.fromkeys(row)
    lines = []
    for method, rows in rows_by_method.items():
        cells = [method, str(len(rows))]
        for name in names:
            values = [row[name] for row in rows if name in row]
            digits = 3 if name in LOSSES else 1
            cells.append(spread(values, digits) if values else "")
        lines.append(cells)
    return table(["method", "seeds", *names], lines)


def spread(values: list[float], digits: int = 1, sign: str = "") -> str:
    """mean +- sample standard deviation; the mean alone of a single value."""
    text = f"{np.mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        text += f" +- {np.std(values, ddof=1):.{digits}f}"
    return text


def is_row(name: str) -> bool:
    """Whether a folder of a run has the name of a row of the table: a method, or a variant of one."""
    stem, has_changes, changes = name.partition(":")
    if not has_changes:
        return stem in (*UNTRAINED, *METHODS, "oracle")
    if stem == "oracle":  # the demo's, with the options of forgetting
        stem = "forgetting"
    if stem not in METHODS:
        return False
    try:
        for change in changes.split(","):
            read_change(change, stem)
    except ValueError:
        return False
    return True


def finished(out: Path, results: Results) -> tuple[Results, list[str]]:
    """All that is finished in a run folder, as far as it was measured on the same; what is left out, and why.

    The same is what all of `results` were measured on. Without results it is the smallest set of tasks and
    held-out rows that a row was measured on.
    """
    order = [*UNTRAINED, *METHODS, *results]
    everything = {name: dict(by_seed) for name, by_seed in results.items()}
    identities = [figures["identity"] for by_seed in results.values() for figures in by_seed.values()]
    rows, left_out = rows_of_folder(out)
    if identities:
        shared = common_items(identities)
    else:
        shared = min((figures["identity"] for figures in rows.values()), key=len, default={})
    for place, figures in rows.items():
        method, _, seed = place.partition("/seed-")
        if shared.items() <= figures["identity"].items():
            everything.setdefault(method, {}).setdefault(int(seed or 0), figures)
            identities.append(figures["identity"])
        else:
            left_out.append(f"{place}: measured on other tasks or held-out rows")
    for name in sorted(set().union(*identities) - set(shared)):
        left_out.append(f"{name}: not every row was measured on the same")

    def place_of(name: str) -> int:
        stem = name.partition(":")[0]
        return order.index(stem) if stem in order else len(order)

    table_rows = {}
    for name in sorted(everything, key=place_of):
        table_rows[name] = {seed: limited_to(figures, shared) for seed, figures in everything[name].items()}
    return table_rows, left_out


def rows_of_folder(out: Path) -> tuple[dict[str, dict], list[str]]:
    """The figures of all rows of the table that a run folder has, by place; measured models that are no row.

    A place is the model's folder, such as full/seed-0.
    """
    rows, left_out = {}, []
    for path in sorted([*out.glob("*/results.json"), *out.glob("*/seed-*/results.json")]):
        place = path.parent.relative_to(out).as_posix()
        if not re.fullmatch(r"[\w-]+(:[^/]+=[^/]+)?(/seed-\d+)?", place):
            continue  # a copy that somebody keeps, say full.bak/seed-0 or full/seed-0.bak
        if is_row(place.partition("/seed-")[0]):
            figures = read_object(path)
            rows[place] = figures | {"identity": figures.get("identity") or {}}
            continue
        with suppress(ValueError, OSError):  # what is no row may be anything
            if read_object(path).get("identity"):
                left_out.append(f"{place}: no method of today's")
    return rows, left_out


def common_items(dicts: list[dict]) -> dict:
    """The entries that all of some dicts have, with equal values."""
    first, *others = dicts
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def limited_to(figures: dict, identity: dict) -> dict:
    """A model's figures without the tasks and the held-out loss that an identity does not name."""
    tasks = figures.get("tasks", {})
    named = {name: tasks[name] for name in tasks if name in identity}
    shown = figures | {"identity": identity, "tasks": named}
    if "held-out" not in identity:
        shown.pop("held-out", None)
    return shown


def warnings_of(results: Results) -> list[str]:
    """Methods above base: in held-out loss, or on forgetting's P, which they are to learn."""
    found = []
    base = mean_figure(results.get("base", {}))
    for name, by_seed in results.items():
        mean = mean_figure(by_seed)
        if base < mean < math.inf:
            compared = f"held-out loss of {name}, {mean:.3f}, is above base's, {base:.3f}"
            found.append(f"note: {compared} (whether that can be told, the verdicts say)")
    base = mean_figure(results.get("base", {}), "L_P")
    mends = {"full": "a lower --lr", "forgetting": "a lower --t-max or --lr"}
    for name, by_seed in results.items():
        mean = mean_figure(by_seed, "L_P")
        mend = mends.get(name.partition(":")[0])
        learns_all_of_it = mend and "rho=" not in name
        if learns_all_of_it and base < mean < math.inf:
            compared = f"L_P of {name}, {mean:.3f}, is above base's, {base:.3f}"
            found.append(f"warning: {compared}: it harms what it is to learn; {mend}")
    return found


def report(results: Results, options: Options) -> None:
    """The end of a run: the table of all that is finished, on screen and in results.md and results.json."""
    out = Path(options.out)
    results, left_out = finished(out, results)
    notes = warnings_of(results)
    notes.append("mean +- sample standard deviation over seeds; tasks in percent")
    measured = [figures for by_seed in results.values() for figures in by_seed.values()]
    if any("L_P" in figures for figures in measured):
        notes.append("L_P, L_N: mean loss, in nats, on the tokens that forgetting keeps and unlearns")
    if any("held-out" in figures for figures in measured):
        notes.append("held-out: mean loss, in nats, over all response tokens of --eval-data")
    if measured:
        notes += describe_limits(measured[0])
    notes += [f"not in the table: {what}" for what in left_out]
    title = f"{options.model} on {', '.join(options.data)}"
    parts = [
        title,
        comparison(results),
        paired_losses(out, results, bool(options.reference_data)),
        "\n".join(notes),
    ]
    text = "\n\n".join(filter(None, parts)) + "\n"
    write_text(json.dumps(results, indent=2) + "\n", out / "results.json")
    write_text(text, out / "results.md")
    print0(f"\n{text}\nevery token with its Q: ./run.sh look {out}")


def describe_limits(figures: dict) -> list[str]:
    """Notes on the tasks of which a row of the table was asked a part only; all rows share them."""
    tasks_of: dict[float, list[str]] = {}
    for task in figures["tasks"]:
        limit = figures["identity"][task]["limit"]
        if limit is not None:
            tasks_of.setdefault(limit, []).append(task)
    return [f"{', '.join(tasks)}: {describe_limit(limit)}" for limit, tasks in tasks_of.items()]


# ------------------------------------------------------------------------------------ held-out differences


@dataclass(frozen=True)
class PairedDifference:
    """How much lower or higher one method's loss is than another's, on the same held-out rows and seeds.

    Every row counts the same, long or short. Rows and seeds are both drawn at random: the error of the mean
    has a part of each.
    """

    mean: float  # nats a row: mean over rows of the difference of their mean losses
    row_error: float  # standard error that comes from which rows were held out
    seed_error: float  # and from the seeds of the training; 0 of a single seed, where it cannot be had
    rows: int
    seeds: int
    studentised: Array  # (draws,) sorted: (mean of drawn rows - mean) / error of drawn rows

    def interval(self, alpha: float = 0.05) -> tuple[float, float]:
        """The two-sided interval of confidence 1 - alpha.

        Rows: bootstrap-t, as few rows may be far from normal, but no narrower than Student's t. Seeds:
        Student's t with one degree of freedom less than there are seeds. The parts add up as squares.
        """
        least = student_t_quantile(alpha, self.rows - 1)
        lowest, highest = np.quantile(self.studentised, (alpha / 2, 1 - alpha / 2))
        # a bootstrap-t turns round: the highest t of the draws says how far the mean may lie below
        below = max(highest, least) * self.row_error
        above = max(-lowest, least) * self.row_error
        of_seeds = 0.0
        if self.seeds > 1:
            of_seeds = student_t_quantile(alpha, self.seeds - 1) * self.seed_error
        return self.mean - math.hypot(below, of_seeds), self.mean + math.hypot(above, of_seeds)

    def p_value(self) -> float:
        """The greatest alpha whose interval still holds 0."""
        holds, fails = 0.0, 1.0
        for _ in range(16):
            alpha = (holds + fails) / 2
            low, high = self.interval(alpha)
            if low <= 0 <= high:
                holds = alpha
            else:
                fails = alpha
        return fails


def paired_difference(differences: Array, draws: int = 1000) -> PairedDifference:
    """PairedDifference of (S, R) differences: by seed, a row's mean loss under one method minus the other's.

    The analysis of a two-way table of seeds and rows, both random. Raises ValueError for fewer than two rows.
    """
    seeds, rows = differences.shape
    if rows < 2:
        raise ValueError(f"an interval needs two held-out rows at least, there is {rows}")
    of_rows = differences.mean(axis=0)  # (R,)
    mean = float(of_rows.mean())
    row_variance = float(of_rows.var(ddof=1)) / rows
    seed_variance = 0.0
    if seeds > 1:
        of_seeds = differences.mean(axis=1)  # (S,)
        seed_variance = float(of_seeds.var(ddof=1)) / seeds
        # what neither a row nor a seed explains is in both parts: it is taken out of the rows'
        residuals = differences - of_rows - of_seeds[:, None] + mean  # (S, R)
        noise = float((residuals**2).sum()) / ((seeds - 1) * (rows - 1))
        row_variance = max(row_variance - noise / (seeds * rows), 0.0)

    drawn = np.random.default_rng(0).integers(rows, size=(draws, rows))
    samples = of_rows[drawn]  # (draws, R)
    errors = samples.std(axis=1, ddof=1) / math.sqrt(rows)
    varied = errors > 0
    studentised = (samples.mean(axis=1)[varied] - mean) / errors[varied]
    if not varied.any():
        studentised = np.zeros(1)
    row_error, seed_error = math.sqrt(row_variance), math.sqrt(seed_variance)
    return PairedDifference(mean, row_error, seed_error, rows, seeds, np.sort(studentised))


def student_t_tail(t: float, df: int) -> float:
    """P(|T| > t) of Student's t with df degrees of freedom, a whole number: Abramowitz, Stegun 26.7.3, 4."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2 == 1
    term = cosine if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(3 if odd else 2, df - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = sine * total
    if odd:
        inside = 2 / math.pi * (angle + sine * total)
    return 1 - inside


@cache
def student_t_quantile(alpha: float, df: int) -> float:
    """The t that |T| exceeds with probability alpha."""
    low, high = 0.0, 1.0
    while student_t_tail(high, df) > alpha:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        if student_t_tail(middle, df) > alpha:
            low = middle
        else:
            high = middle
    return high


def holm(p_values: list[float], alpha: float = 0.05) -> list[bool]:
    """Which of several hypotheses fall, so that one falls wrongly in at most a share alpha of all runs."""
    order = np.argsort(p_values, kind="stable")
    fallen = [False] * len(p_values)
    for place, i in enumerate(order):
        if p_values[i] > alpha / (len(p_values) - place):
            break
        fallen[i] = True
    return fallen


def held_out_losses(out: Path, method: str, seeds: list[int]) -> Array:
    """Each held-out row's mean loss by seed, (S, R), as measure() wrote it."""
    losses = []
    for seed in seeds:
        folder = out / method if method in UNTRAINED else out / method / f"seed-{seed}"
        rows = read_rows([str(folder / "held-out.jsonl")])
        losses.append([row["loss"] for row in rows])
    return np.array(losses)


def shared_seeds(results: Results, *methods: str) -> list[int]:
    """The seeds that all of these methods have held-out losses of; base and reference fit every seed."""
    for name in methods:
        figures = results.get(name, {}).values()
        if not figures or any("held-out" not in one for one in figures):
            return []
    trained = [set(results[name]) for name in methods if name not in UNTRAINED]
    return sorted(set.intersection(*trained)) if trained else [0]


def pairs_to_compare(results: Results) -> list[tuple[str, str]]:
    """Each method with full and with base, those that unlearn with ignoring, the reference with each."""
    pairs = []
    for name in results:
        if name not in ("base", "full"):
            pairs.append((name, "full"))
        if name.startswith("forgetting"):
            pairs.append((name, "ignoring"))
        if name != "base":
            pairs.append((name, "base"))
        if name not in ("full", *UNTRAINED):
            pairs.append(("reference", name))
    return [pair for pair in pairs if shared_seeds(results, *pair)]


def is_shown(pair: tuple[str, str], losses: dict[str, float]) -> bool:
    """All pairs are tested; of those with base or the reference the table shows fewer.

    Shown are the best training and the reference against base, and the reference against the best and full.
    """
    trained = [name for name in losses if name not in UNTRAINED]
    best = min(trained, key=lambda name: losses[name], default="full")
    ours, theirs = pair
    if theirs == "base":
        return ours in (best, "reference")
    return ours != "reference" or theirs in (best, "full")


def losses_by_row(out: Path, results: Results) -> dict[str, float]:
    """Each method's held-out loss, every row the same: the mean over rows and seeds."""
    losses = {}
    for name, by_seed in results.items():
        seeds = [seed for seed, figures in by_seed.items() if "held-out" in figures]
        if seeds:
            losses[name] = float(held_out_losses(out, name, seeds).mean())
    return losses


def mean_figure(by_seed: dict[int, dict], figure: str = "held-out") -> float:
    """The mean of a figure of a method over its seeds; infinite where it was not measured."""
    values = [figures[figure] for figures in by_seed.values() if figures.get(figure) is not None]
    return sum(values) / len(values) if values else math.inf


def paired_losses(out: Path, results: Results, trusted: bool) -> str:
    """Differences in held-out loss with intervals and verdicts, best first; "" without held-out rows.

    trusted: D_ref is --reference-data, not drawn from --data.
    """
    losses = losses_by_row(out, results)
    pairs = pairs_to_compare(results)
    found = []
    for ours, theirs in pairs:
        seeds = shared_seeds(results, ours, theirs)
        differences = held_out_losses(out, ours, seeds) - held_out_losses(out, theirs, seeds)  # (S, R)
        if differences.shape[1] < 2:
            return ""
        better = f"{(differences.mean(axis=0) < 0).sum()} of {differences.shape[1]}"
        found.append((paired_difference(differences), better))
    if not found:
        return ""

    gain = 0.0  # of full over base, nats a row: what a difference is worth beside it
    seeds = shared_seeds(results, "base", "full")
    if seeds:
        gain = float((held_out_losses(out, "base", seeds) - held_out_losses(out, "full", seeds)).mean())
    # Which training is the best is seen in the same losses: pairs that might have been shown count, too
    told_apart = holm([difference.p_value() for difference, _ in found])
    verdicts, lines = {}, []
    for pair, (difference, better), told in zip(pairs, found, told_apart):
        low, high = difference.interval()
        verdict = "cannot be told"
        if told:
            verdict = "better" if difference.mean < 0 else "worse"
        verdicts[pair] = verdict
        worth = f"{-difference.mean / gain:+.0%}" if gain > 0 else ""
        interval = f"{difference.mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        cells = [" - ".join(pair), interval, worth, better, str(difference.seeds), verdict]
        if is_shown(pair, losses):
            lines.append((difference.mean, cells))
    lines.sort(key=lambda line: line[0])
    header = ["pair", "difference, 95 % interval", "of full's gain", "better on rows", "seeds", "verdict"]
    differences = table(header, [cells for _, cells in lines])
    promise = describe_verdicts(len(lines), len(found), {difference.seeds for difference, _ in found})
    return "\n\n".join([differences, promise, best_of_all(losses, verdicts, trusted)])


def describe_verdicts(shown: int, tested: int, seeds: set[int]) -> str:
    """What an interval and a verdict of paired_losses promise; seeds: how many the pairs have."""
    over = "over rows and seeds, which share one reference"
    if seeds == {1}:
        over = "over rows; the verdicts are about this seed, another may differ"
    elif 1 in seeds:
        over += "; a verdict of one seed is about that seed, another may differ"
    if 2 in seeds:
        over += "; two seeds tell little of a third, so their intervals are wide"
    family = "the verdict is wrong in at most 5 % of such runs"
    if tested > 1:
        verdicts = "the verdict is" if shown == 1 else f"all {shown} verdicts together are"
        family = f"{verdicts} wrong in at most 5 % of such runs (Holm, of {tested} pairs)"
        family += ", so a verdict asks more than an interval of its pair alone"
    meaning = "Nats of held-out loss; below 0 the first of a pair is better, as is a gain above 0 %"
    return f"{meaning}. Every row counts the same (every token in the table above), {over}; {family}."


def best_of_all(losses: dict[str, float], verdicts: dict[tuple[str, str], str], trusted: bool) -> str:
    """The method of the lowest held-out loss by row, what it is better than, and what that means."""
    best = min(losses, key=lambda name: losses[name])
    worse, unclear, ahead = [], [], []
    for (ours, theirs), verdict in verdicts.items():
        if best == ours:
            other, winning = theirs, "better"
        elif best == theirs:
            other, winning = ours, "worse"
        else:
            continue
        if verdict == winning:
            worse.append(other)
        elif verdict == "cannot be told":
            unclear.append(other)
        else:
            ahead.append(other)
    apart = set(losses) - {best, *worse, *unclear, *ahead}
    clauses = [f"Lowest: {best}"]
    if worse:
        clauses.append(f"better than {', '.join(worse)}")
    if unclear:
        clauses.append(f"from {', '.join(unclear)} it cannot be told")
    if ahead:
        clauses.append(f"worse than {', '.join(ahead)} on the seeds of both")
    if apart:
        clauses.append(f"without a seed in common with {', '.join(sorted(apart))}")
    if "full" not in losses:
        clauses.append("without full in --methods nothing says whether leaving tokens out helped")
    text = "; ".join(clauses) + "."
    if unclear or ahead or apart or "full" not in losses:
        return text
    if best == "base":
        return f"{text} No training at all is best here."
    if best == "reference" and trusted:
        return f"{text} The trusted rows alone are best here: leave D_train out."
    if best == "reference":
        return f"{text} D_ref alone, fewer of the same rows, is best here."
    if best == "full" and any(is_selective(name) for name in worse):
        return f"{text} Nothing that leaves tokens out or unlearns them helps here."
    return text


def is_selective(name: str) -> bool:
    """Whether a row of the table leaves tokens out or unlearns them."""
    stem = name.partition(":")[0]
    return stem == "oracle" or (stem in METHODS and METHODS[stem].rho < 1)


# ------------------------------------------------------------------------------------------------- main

USER_ERRORS = (ValueError, FloatingPointError, OSError, SafetensorError)  # what a user can mend


def main() -> None:
    """The command line: exit code 2, and a line or two, for what the user can mend."""
    try:
        options = parse_options()
        if options.model is None or not options.data:
            raise ValueError("--model and --data are needed (./run.sh alone runs a demo that needs neither)")
        options.device = start_ranks(options.device)
        is_main = rank_and_world()[0] == 0
        with locked(Path(options.out)) if is_main else nullcontext():
            results = run(options)
            if is_main:
                report(results, options)
    except USER_ERRORS as error:
        print(f"forgetting.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print0("\nstopped; the same command goes on from what was saved")
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
