"""Forgetting (arXiv 2508.04329): score every response token, learn the best of them, unlearn the rest.

    python forgetting.py                                         # the demo: no model, no data needed
    python forgetting.py --model M --data rows.jsonl --out RUN   # a LLaMA-style checkpoint and your rows
    torchrun --nproc_per_node=8 forgetting.py --model meta-llama/Llama-3.2-1B --data rows.jsonl --out RUN

    1. reference   theta' = a brief LoRA fine-tune of theta on D_ref
    2. scores      Q(y) = loss(y; theta) - loss(y; theta'), every response token of D_train      eq. 4, 5
    3. partition   P = {Q >= F(1 - rho)}, N = the rest, one threshold for the whole corpus       eq. 6, 7
    4. training    minimise mean_P loss - lambda(step) * mean_N loss, from theta again           eq. 8

Every method is a sign per token: +1 learn (P), -1 unlearn (N), 0 leave out. Its weight is +1/n_P, -lambda/n_N
or 0, counted over the whole optimiser step: micro-batches and ranks change nothing but dropout and rounding.
Order: Algorithm 1, equations, methods (stage 3), training (1 and 4), scoring (2), data, run folder, options.
Shapes: C tokens of the corpus end to end, judged where they are a response; T tokens of a pack, n of them
weighted; E examples; D width; V vocabulary.
"""

import dataclasses, hashlib, importlib.metadata, json, math, runpy, shutil, signal, sys, time  # noqa: E401
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Callable

if __name__ == "__main__":  # a mistyped flag ends the program here, before torch's seconds of loading
    with suppress(FileNotFoundError):
        checker = Path(__file__).resolve().parent / "tests" / "tools" / "check_flags.py"
        runpy.run_path(str(checker), {"program": "forgetting.py"})

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays, save_file as save_arrays
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import Corpus, Tokenizer, build_corpus, check_folder, check_ids, locked, pack, read_object
from data import read_rows, shift, split_rows, unique_rows, whole_file, write_rows, write_text
from eval import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, SHARE, UP_TO_1, WHOLE, Parser, add_flags
from eval import first_rank_first, load_tool, local_files, mean_losses, measure, option, prepare, progress
from eval import rank_and_world, response_losses, say, start_ranks, sum_over_ranks, wait_for_all, warn_if_slow
from lora import DEFAULT_TARGETS, add_lora, load_adapter, load_checkpoint, lora_disabled, lora_parameters
from lora import remove_lora, save_adapter, save_checkpoint, target_layers
from model import DTYPES, TEXT_FILES, Transformer, WeightedTokenLoss, checkpoint_folder, load_model
from model import model_fingerprint, read_config, to_device

Array = np.ndarray

# ------------------------------------------------------------------------------------------ Algorithm 1


def run(options: "Options") -> dict[str, dict[int, dict]]:
    """Algorithm 1 on one model and one pair of data sets: {method: {seed: figures}}, the rows of the table.

    Each stage leaves its result in the run folder; given again, the command finds it there and goes on.
    """
    checkpoint = first_rank_first(partial(checkpoint_folder, options.model))
    tokenizer = Tokenizer(checkpoint)
    documents = prepare(options.tasks, tokenizer, options.data_dir, options.limit)
    d_ref, d_train = select_data(options, tokenizer)
    held_out = read_held_out(options, tokenizer, d_ref, d_train)  # an empty corpus without --eval-data
    options = with_reference_epochs(options, len(d_ref))
    model = load_base(options, checkpoint, d_ref, d_train, held_out)
    out = open_run(options, checkpoint, d_ref, d_train)  # the first to write; input was checked above

    # 1. theta': every response token of D_ref has sign +1
    reference_options = dataclasses.replace(options, lr=options.reference_lr, epochs=options.reference_epochs)
    everything = Lesson(d_ref, d_ref.response.astype(np.int8))
    train(model, everything, out / "reference", reference_options, seed=0)

    # 2. Q: theta' stays on the model until remove_lora; with its adapter off the model is theta
    base_loss, ref_loss = score(model, d_train, out, options)
    quality = quality_scores(base_loss, ref_loss)  # (C,), NaN where nothing is judged

    # for the table only: mean loss on plain forgetting's P and N, the same tokens for every row (a sample of
    # at most 512 examples, eval.mean_losses); metrics.jsonl has each step's own, on the method's own P and N
    table_signs = choose_signs(METHODS["forgetting"], quality, d_train, options, seed=0)  # (C,)
    say(load_tool("look").describe_scores(base_loss, ref_loss, table_signs))
    table_masks = [(d_train, {"L_P": table_signs > 0, "L_N": table_signs < 0})]
    table_masks += [(held_out, {"held-out": held_out.response})]
    measured = partial(measure, model, tokenizer, documents, table_masks, options.micro_tokens)
    results: dict[str, dict[int, dict]] = {name: {} for name in options.methods}
    if "reference" in results:
        results["reference"][0] = measured(out / "reference")
    remove_lora(model)
    if "base" in results:
        results["base"][0] = measured(out / "base")

    # 3 and 4. for each method and seed: signs from Q, then a fresh adapter on theta
    trained = [name for name in options.methods if name not in UNTRAINED]
    for name, seed in product(trained, options.seeds):
        method, method_options = method_of(name, options)
        folder = out / name / f"seed-{seed}"
        signs = choose_signs(method, quality, d_train, method_options, seed)  # (C,) +1, -1 or 0
        lesson = Lesson(d_train, signs, method.damping, base_loss if method.damping else None)
        train(model, lesson, folder, method_options, seed, held_out)
        results[name][seed] = measured(folder)
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
    """The paper's forgetting strength: 0 at step 0, rising by (t_max - t_min) / total_steps a step."""
    return (t_max - t_min) * step / total_steps


def token_weights(positive: Tensor, negative: Tensor, lam: float, counts: tuple | None = None) -> Tensor:
    """Equation 8 as a weight per token: +1/n_P on P, -lam/n_N on N, 0 elsewhere; (T,) bool -> (T,) float32.

    counts are (n_P, n_N) of the whole optimiser step; None: the masks are all of it. Sets may be empty.
    """
    n_positive, n_negative = counts or (int(positive.sum()), int(negative.sum()))
    return positive / max(n_positive, 1) - negative * (lam / max(n_negative, 1))


Damping = Callable[[Tensor, Tensor | None], Tensor]  # (losses, losses under theta) -> factors on N, (n,) each


def weighted_token_loss(hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor,
                        damping: Damping | None = None, base_losses: Tensor | None = None,
                        losses_out: Tensor | None = None) -> Tensor:
    """Equation 8: sum_t w_t loss_t, differentiable in hidden (the head is frozen); a float32 scalar.

    hidden (n, D) holds the state before each target, head_weight (V, D), targets (n,) int64, weights (n,)
    float32 from token_weights; a target of -100 counts nothing. The same, plainly:

        logits = hidden @ head_weight.T                                    # (n, V)
        losses = F.cross_entropy(logits, targets, reduction="none")        # (n,)
        loss = losses[positive].mean() - lam * losses[negative].mean()

    Here no (n, V) tensor ever exists: the head runs a chunk of rows at a time, loss and gradient at once.
    A damping, such as `clipped`, multiplies the negative weights, as a constant; base_losses (n,) are what it
    may compare with. Each token's loss goes into losses_out (n,), if given. Raises ValueError for hidden
    states of another shape, and for a head that is trained, too: its gradient is not computed.
    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, (n, D) is needed: flatten(0, -2)")
    if head_weight.requires_grad:
        raise ValueError("head_weight requires a gradient, which is not computed: freeze it, or detach() it")
    weights, targets = weights.masked_fill(targets < 0, 0), targets.clamp_min(0)
    return WeightedTokenLoss.apply(hidden, head_weight, targets, weights, damping, base_losses, losses_out)


# ---------------------------------------------------------------------------------------------- methods

RARE = -math.log(1e-3)  # the loss, in nats, of a token of probability 1e-3


def clipped(losses: Tensor, base_losses: Tensor | None) -> Tensor:
    """A damping: no ascent on a token that is less probable than 1e-3; (n,) nats -> (n,)."""
    return (losses <= RARE).float()


def npo(losses: Tensor, base_losses: Tensor) -> Tensor:
    """A damping as in negative preference optimisation (beta 1): 2 p / (p + p_theta), (n,) nats -> (n,)."""
    return 2 * torch.sigmoid(base_losses - losses)  # of log p - log p_theta: 1 at theta, to 0 as p falls


@dataclass(frozen=True)
class Method:
    """How a method turns scores into signs: +1 learn, -1 unlearn, 0 leave out."""

    rho: float  # the share kept when --rho does not say; 1: everything, whatever --rho says
    unlearn: bool = False  # N gets sign -1 instead of 0
    by_sequence: bool = False  # partition sequences by their mean Q instead of tokens
    random: bool = False  # a control: the same share, drawn at random
    damping: Damping | None = None  # bounds the ascent


METHODS = {
    "full": Method(rho=1.0),
    "ignoring": Method(rho=0.5),
    "ignoring-random": Method(rho=0.5, random=True),
    "full-P": Method(rho=0.7, random=True),  # as many as forgetting keeps: is it the amount of data?
    "forgetting": Method(rho=0.7, unlearn=True),
    "forgetting-random": Method(rho=0.7, unlearn=True, random=True),  # is it *which* tokens are unlearned?
    "forgetting-clipped": Method(rho=0.7, unlearn=True, damping=clipped),
    "forgetting-npo": Method(rho=0.7, unlearn=True, damping=npo),
    "ignoring-sequence": Method(rho=0.5, by_sequence=True),
    "forgetting-sequence": Method(rho=0.7, unlearn=True, by_sequence=True),
}
UNTRAINED = ("base", "reference")  # rows of the table that stage 4 does not train

# options that only methods which unlearn read
UNLEARNING = ("forget_rate", "lambda_schedule", "t_min", "t_max", "balance", "watch_gradients")
# only stage 4 reads these: theta' and scores survive a change (lr, epochs: if the reference has its own)
STAGE_4_ONLY = ("rho", *UNLEARNING, "lr", "epochs")
# what a variant of a method may change for its stage 4: these, and some that stage 1 reads as well
VARIANT_OPTIONS = STAGE_4_ONLY + ("warmup", "batch_size", "max_grad_norm", "rank", "alpha", "dropout")


def method_of(name: str, options: "Options") -> tuple[Method, "Options"]:
    """The method of a name, and the options of its stage 4; "forgetting:rho=0.5,t_max=1.0" is a variant.

    Raises ValueError for an unknown method, an option that stage 4 does not read, and a value out of range.
    """
    stem, colon, changes = name.partition(":")
    if stem not in METHODS:
        known = ", ".join([*UNTRAINED, *METHODS])
        raise ValueError(f"unknown method {stem}; known: {known}; a variant: forgetting:rho=0.5,t_max=1.0")
    method, flags, keys = METHODS[stem], [], []
    for change in changes.split(",") if colon else []:
        key, _, value = change.partition("=")
        if key not in VARIANT_OPTIONS or not value:
            known = ", ".join(VARIANT_OPTIONS)
            raise ValueError(f"--methods {name}: {change!r} is not option=value; options: {known}")
        if (key == "rho" and method.rho == 1) or (key in UNLEARNING and not method.unlearn):
            raise ValueError(f"--methods {name}: {stem} does not read {key}")
        keys.append(key)
        flags.append(f"--{key.replace('_', '-')}={value}")
    given = make_parser(f"forgetting.py: --methods {name}").parse_args(flags)
    changed = {key: getattr(given, key) for key in keys}
    if not method.unlearn:  # it reads no forget rate, which Options would hold against its rho
        changed["forget_rate"] = None
    return method, dataclasses.replace(options, **changed)


def choose_signs(method: Method, quality: Array, corpus: Corpus, options: "Options", seed: int) -> Array:
    """The sign (C,) int8 of every token: +1 in P, -1 in N of a method that unlearns, 0 elsewhere.

    quality (C,) is NaN where nothing is judged. At sequence level a sequence's Q is the mean over its judged
    tokens, the threshold is over sequences, and all judged tokens share their sequence's side.
    """
    signs, response = np.zeros(len(corpus.tokens), np.int8), corpus.response
    if method.rho == 1:  # full: no score is looked at
        signs[response] = 1
        return signs
    rho = method.rho if options.rho is None else options.rho
    scores = quality[response]  # one a response token; below one a sequence
    if method.by_sequence:
        # never 0: build_corpus keeps no sequence without a response
        judged_counts = np.add.reduceat(response, corpus.offsets[:-1], dtype=np.int64)  # (E,)
        sums = np.add.reduceat(np.where(response, quality, 0), corpus.offsets[:-1], dtype=np.float64)
        scores = sums / judged_counts  # (E,)
    if method.random:
        scores = np.random.default_rng([seed, 1]).random(len(scores))
    positive, negative = partition(scores, rho, options.forget_rate if method.unlearn else None)
    sides = positive.astype(np.int8) - (negative & method.unlearn).astype(np.int8)
    if method.by_sequence:
        sides = np.repeat(sides, judged_counts)  # (response tokens,) each takes its sequence's side
    signs[response] = sides
    return signs


# --------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Lesson:
    """What a training is given: a corpus, and for each of its tokens what to do with it."""

    corpus: Corpus
    signs: Array  # (C,) int8: +1 learn, -1 unlearn, 0 leave out
    damping: Damping | None = None
    base_loss: Array | None = None  # (C,) float32 nats under theta, for a damping that compares


def data_parallel(model: Transformer) -> nn.Module:
    """The model itself, or under torchrun in DistributedDataParallel with gradients summed, not averaged.

    The weights already count all ranks' tokens. DDP divides by the ranks, but not after a communication hook.
    init_sync would broadcast the frozen weights; every rank has read the same file, drawn the same adapter.
    """
    if not dist.is_initialized():
        return model

    def sum_bucket(_, bucket):  # DDP looks for a parameter of the name "bucket"
        summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return summed.then(lambda done: done.value()[0])

    net = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    net.register_comm_hook(None, sum_bucket)
    return net


def step_gradient(net: nn.Module, lesson: Lesson, examples: Array, lam: float,
                  options: "Options") -> tuple[Tensor, tuple[int, int]]:
    """Equation 8 over one optimiser step: leaves its gradient in .grad, over all micro-batches and ranks.

    examples: the whole step's; a rank runs its share. Returns this rank's sums (4,): objective (damped),
    losses on P, on N (undamped; 0 at lambda 0), tokens of N rarer than 1e-3; and the step's (n_P, n_N).
    """
    rank, world = rank_and_world()
    corpus, signs = lesson.corpus, lesson.signs
    head = getattr(net, "module", net).lm_head.weight  # (V, D); DDP keeps the model as its module
    step_signs = signs[corpus.places(examples)]  # all ranks' share, so that counting needs no communication
    counts = int((step_signs > 0).sum()), int((step_signs < 0).sum())
    longest_first = sorted(examples.tolist(), key=lambda example: -corpus.lengths[example])
    mine = longest_first[rank::world]
    # with fewer examples than ranks some have none: DDP waits for every rank, so they run one with signs 0
    micro_batches = list(pack(corpus, mine or longest_first[-1:], options.micro_tokens))
    sums = torch.zeros(4, device=head.device)
    net.zero_grad(set_to_none=False)  # .grad stays a view of DDP's buckets
    for i, batch in enumerate(micro_batches):
        sign = torch.from_numpy(signs[batch.places.numpy()]) * bool(mine)  # (T,) int8, all 0 with no share
        weights = token_weights(sign > 0, sign < 0, lam, counts)  # (T,)
        weighted = weights != 0  # (T,) bool, n of them true; the rest (at lambda 0 N as well) skip the head
        before, targets = (to_device(x, head.device) for x in shift(batch.tokens, weighted))  # (n,) each
        base_losses = None  # (n,)
        if lesson.base_loss is not None:
            base_losses = torch.from_numpy(lesson.base_loss[batch.places[weighted].numpy()])
            base_losses = to_device(base_losses, head.device)
        weights = to_device(weights[weighted], head.device)  # (n,)
        losses = torch.empty(len(targets), device=head.device)  # (n,)
        # DDP reduces after the last micro-batch only; no_sync has to hold the forward pass, too
        quiet = world > 1 and i + 1 < len(micro_batches)
        with net.no_sync() if quiet else nullcontext():
            hidden = net(to_device(batch.tokens, head.device), batch.cu_seqlens)[before]  # (n, D)
            loss = weighted_token_loss(hidden, head, targets, weights, lesson.damping, base_losses, losses)
            loss.backward()  # with n = 0 too: every adapter gets zeros, and DDP its bucket
        on_positive, on_negative = losses @ (weights > 0).float(), losses @ (weights < 0).float()
        rare = ((losses > RARE) & (weights < 0)).sum()
        sums += torch.stack((loss.detach(), on_positive, on_negative, rare))
    return sums, counts


def learning_rate_at(step: int, total_steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up from 0 over ceil(warmup * total) steps, then linear decay to 0; step counts from 0."""
    rising = math.ceil(warmup * total_steps)
    if step < rising:
        return peak * step / rising
    return peak * (total_steps - step) / max(total_steps - rising, 1)


def scheduled_lambda(step: int, total_steps: int, options: "Options", log: list[dict]) -> float:
    """lambda by --lambda-schedule: the paper's (linear), t_max throughout (constant), or `balanced`.

    Balanced: the paper's, but at most --balance times |grad mean_P loss| / |grad mean_N loss| (damped, if the
    method is) of the latest earlier step that --watch-gradients looked at and that had both; step 0 is one.
    """
    if options.lambda_schedule == "constant":
        return options.t_max
    lam = lambda_at(step, total_steps, options.t_min, options.t_max)
    ratios = [line["ratio"] for line in log if line.get("ratio")]
    if options.lambda_schedule == "balanced" and ratios:
        lam = min(lam, options.balance * ratios[-1])
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


def train(model: Transformer, lesson: Lesson, folder: Path, options: "Options", seed: int,
          held_out: Corpus | None = None) -> None:
    """Put an adapter on the model: towards tokens of sign +1, away from those of -1.

    The one loop: the reference and every method are this with other signs. A finished adapter in `folder` is
    loaded, a checkpoint continued: all that is random is drawn anew from the seed at every step. Raises
    FloatingPointError, with the step's figures and examples, when loss or gradient is not finite.
    """
    finished, state_file = folder / "adapter_model.safetensors", folder / "checkpoint" / "state.safetensors"
    if finished.is_file():
        say(f"found {finished}, skipping (metrics.jsonl beside it stays as it is)")
        return load_adapter(model, folder)
    add_lora(model, options.rank, options.alpha, options.dropout, tuple(options.targets),
             generator=torch.Generator().manual_seed(seed))  # fmt: skip
    parameters, rank = list(lora_parameters(model).values()), rank_and_world()[0]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    first = load_checkpoint(state_file, model, optimizer)  # steps done: 0 without a checkpoint
    total = options.epochs * math.ceil(len(lesson.corpus) / options.batch_size)
    if total == 1 and options.warmup:
        say(f"warning: {folder} is a single step, of rate 0: use more data or epochs, or --warmup 0")
    net = data_parallel(model.train())
    with StepLog(folder, first, total) as log:
        for step in range(first, total):
            examples = examples_of(step, len(lesson.corpus), options.batch_size, seed)
            lam = scheduled_lambda(step, total, options, log.lines)
            rate = learning_rate_at(step, total, options.lr, options.warmup)
            watched = watch_gradients(net, lesson, examples, lam, options, seed, step)
            began = time.perf_counter()
            seed_dropout(seed, step)
            sums, counts = step_gradient(net, lesson, examples, lam, options)
            # inf: the norm is measured only; it is the same on all ranks, as the gradient is
            norm = nn.utils.clip_grad_norm_(parameters, options.max_grad_norm or math.inf)
            totals = torch.cat((sum_over_ranks(sums), norm[None])).tolist()  # (5,) the one wait for a GPU
            figures = step_figures(step, totals, counts, lam, rate) | watched
            if not math.isfinite(figures["loss"] + figures["grad_norm"]):
                raise FloatingPointError(f"{folder}: not finite: {figures}, examples {examples.tolist()}")
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            tokens = int(lesson.corpus.lengths[examples].sum())
            figures["tokens/s"] = tokens / (time.perf_counter() - began)
            if held_out and options.eval_every and (step + 1) % options.eval_every == 0:
                figures |= mean_losses(model, held_out, {"held-out": held_out.response}, options.micro_tokens)
            log.add(figures)
            if rank == 0 and (step + 1) % options.save_every == 0 and step + 1 < total:
                save_checkpoint(state_file, model, optimizer)
    if rank == 0:
        save_adapter(model, folder, options.model)
        shutil.rmtree(state_file.parent, ignore_errors=True)
    wait_for_all()


def step_figures(step: int, totals: list[float], counts: tuple[int, int], lam: float, rate: float) -> dict:
    """A line of metrics.jsonl. L_P and L_N are means over the step's P and N, None where nothing was run."""
    (loss, on_positive, on_negative, rare, norm), (n_positive, n_negative) = totals, counts
    ran = n_negative if lam else 0  # a token of weight 0 is not run
    losses = {"loss": loss, "L_P": on_positive / n_positive if n_positive else None}
    losses |= {"L_N": on_negative / ran if ran else None, "rare_N": rare / ran if ran else None}
    return {"step": step} | losses | {"lambda": lam, "lr": rate, "grad_norm": norm}


def watch_gradients(net: nn.Module, lesson: Lesson, examples: Array, lam: float, options: "Options",
                    seed: int, step: int) -> dict[str, float | None]:
    """Every --watch-gradients steps: norms, cosine of the gradients of mean_P loss and -lambda mean_N loss.

    ratio: of the norms, without lambda. Two passes with the step's masks; step_gradient clears their .grad.
    """
    every = options.watch_gradients
    if not every or step % every or not (lesson.signs < 0).any():
        return {}
    gradients = []
    for signs in (np.maximum(lesson.signs, 0), np.minimum(lesson.signs, 0)):  # P alone, N alone
        seed_dropout(seed, step)
        step_gradient(net, dataclasses.replace(lesson, signs=signs), examples, 1.0, options)
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad]))
    norm_p, norm_n = (float(gradient.norm()) for gradient in gradients)
    cosine = float(gradients[0] @ gradients[1]) / (norm_p * norm_n) if norm_p * norm_n else None
    ratio = norm_p / norm_n if norm_n else None
    return {"grad_P": norm_p, "grad_N": lam * norm_n, "cosine": cosine, "ratio": ratio}


class StepLog(AbstractContextManager):
    """metrics.jsonl of a training and its bar; rank 0 writes."""

    def __init__(self, folder: Path, first: int, total: int):
        self.path, self.total = folder / "metrics.jsonl", total
        if first:
            say(f"{folder}: continuing from step {first} of {total}")
        # what was logged after the checkpoint comes again: cut it off
        rows = read_rows([str(self.path)])[:first] if first and self.path.is_file() else []
        self.lines = [{name: value for name, value in row.items() if name != "_source"} for row in rows]
        wait_for_all()  # every rank has read it
        if rank_and_world()[0] == 0:
            write_rows(self.lines, self.path)
        self.bar = progress("/".join(folder.parts[-2:]), total, "step", first, keep=True)

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.bar.close()  # before an error is printed
        if kind is KeyboardInterrupt:  # main shows the text
            raise KeyboardInterrupt(f"at {self.path.parent} after step {len(self.lines)} of {self.total}")

    def add(self, figures: dict) -> None:
        """Log one step. Raises OSError naming the file."""
        self.lines.append(figures)
        if rank_and_world()[0] > 0:
            return
        short = {"loss": "loss", "L_P": "P", "L_N": "N", "lambda": "lam", "tokens/s": "tok/s"}
        names = short if figures["L_N"] is not None else ("loss", "tokens/s")
        shown = [f"{short[name]} {figures[name]:.3g}" for name in names if figures[name] is not None]
        self.bar.set_postfix_str(" ".join(shown), refresh=False)
        self.bar.update()
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")
        except OSError as error:
            raise OSError(f"{self.path}: could not be written ({error})") from None


# ---------------------------------------------------------------------------------------------- scoring


def score(model: Transformer, corpus: Corpus, out: Path, options: "Options") -> tuple[Array, Array]:
    """Stage 2: base_loss and ref_loss (C,) float32 of D_train, NaN where nothing is judged.

    They are written every --save-every x --batch-size examples, beside the tokens and where their examples
    came from; a run that was stopped goes on there.
    """
    path, count = out / "scores.safetensors", len(corpus)
    (base_loss, ref_loss), done = np.full((2, len(corpus.tokens)), np.nan, np.float32), 0
    if path.is_file():
        base_loss, ref_loss, done = read_scores(path)
        what_next = f"continuing from example {done:,} of {count:,}" if done < count else "skipping"
        say(f"found {path}, {what_next}")
    if done < count and options.score_dtype != options.dtype:  # a second model, for this function only
        model = load_model(model.folder, options.device, DTYPES[options.score_dtype])
        load_adapter(model, out / "reference")
    sources = np.frombuffer("\n".join(corpus.sources).encode(), np.uint8)  # text, as safetensors can hold it
    arrays = {"tokens": corpus.tokens, "offsets": corpus.offsets, "sources": sources}
    part_size, work = options.save_every * options.batch_size, 2 * corpus.offsets  # two passes over a token
    with progress(f"{out.name}/scores", int(work[-1]), "token", int(work[done])) as bar:
        for first in range(done, count, part_size):
            last = min(first + part_size, count)
            tokens = slice(corpus.offsets[first], corpus.offsets[last])
            part = corpus.part(first, last), np.arange(last - first)
            ref_loss[tokens] = response_losses(model, *part, options.micro_tokens, bar)
            with lora_disabled(model):
                base_loss[tokens] = response_losses(model, *part, options.micro_tokens, bar)
            if rank_and_world()[0] == 0:
                with whole_file(path) as file:
                    losses = {"base_loss": base_loss, "ref_loss": ref_loss}
                    save_arrays(arrays | losses, file, {"done": str(last)})
    wait_for_all()
    quality = quality_scores(base_loss, ref_loss)
    if np.nanmin(quality) == (same := np.nanmax(quality)):
        mend = "more --n-reference, --reference-epochs or --reference-lr"
        raise ValueError(f"the reference learned nothing: Q is {same:g} for every token; {mend}")
    return base_loss, ref_loss


def read_scores(path: Path) -> tuple[Array, Array, int]:
    """base_loss and ref_loss (C,) of a file of score(), and how many examples they cover."""
    try:
        arrays = load_arrays(path)
        with safe_open(path, framework="np") as file:
            done = int(file.metadata()["done"])
        return arrays["base_loss"], arrays["ref_loss"], done
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a whole file of scores ({error}); remove it") from None


# ------------------------------------------------------------------------------------------------- data


def select_data(options: "Options", tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """D_ref and D_train, the same for every seed and method."""
    rows, reference = (read_rows(local_files(files)) for files in (options.data, options.reference_data))
    chosen = split_rows(rows, reference, tokenizer.eos, options.n_reference, options.n_train)
    d_ref, d_train = (build_corpus(part, tokenizer, options.max_length) for part in chosen)
    for name, corpus in (("D_ref", d_ref), ("D_train", d_train)):
        say(f"{name} {len(corpus):,} examples, {len(corpus.tokens):,} tokens, {corpus.response.sum():,} of "
            f"them response; {corpus.dropped} rows dropped: no response within {options.max_length} tokens")
    return d_ref, d_train


def read_held_out(options: "Options", tokenizer: Tokenizer, *trained: Corpus) -> Corpus:
    """The rows of --eval-data, none without it. Raises ValueError if some are in D_ref or D_train."""
    if not options.eval_data:
        return trained[0].part(0, 0)  # an empty corpus
    rows = unique_rows(read_rows(local_files(options.eval_data)), tokenizer.eos)
    held_out = build_corpus(rows, tokenizer, options.max_length)
    known = {tokens.tobytes() for corpus in trained for tokens in corpus.split()}
    shared = sum(tokens.tobytes() in known for tokens in held_out.split())
    if shared:
        raise ValueError(f"--eval-data: {shared} of its {len(held_out)} rows are in D_ref or D_train, too")
    return held_out


def with_reference_epochs(options: "Options", n_reference: int) -> "Options":
    """Options with --reference-epochs settled: --epochs, or more, so that theta' takes at least 8 steps."""
    # the rate begins at 0 and ends near it: fewer steps teach nothing, and all Q are equal
    steps = math.ceil(n_reference / options.batch_size)
    epochs = options.reference_epochs or max(options.epochs, math.ceil(8 / steps))
    if epochs > options.epochs and options.reference_epochs is None:
        say(f"D_ref has {n_reference} examples: the reference takes {epochs} epochs (--reference-epochs)")
    return dataclasses.replace(options, reference_epochs=epochs)


def load_base(options: "Options", checkpoint: Path, *corpora: Corpus) -> Transformer:
    """theta, after all that can be wrong between model, tokens and LoRA targets has been looked for."""
    for corpus in corpora:
        check_ids(corpus.tokens, read_config(checkpoint).vocab_size, checkpoint)
    warn_if_slow(options.device, options.dtype, options.score_dtype)
    model = load_model(checkpoint, options.device, DTYPES[options.dtype])
    model.checkpoint_activations = options.checkpoint_activations
    if options.compile:
        model.compile_blocks()
    target_layers(model, tuple(options.targets))  # raises ValueError for one that is not there
    return model


# ------------------------------------------------------------------------------------------- run folder

# options that may change: what was made stays valid (of model and rows open_run compares the fingerprints)
FREE = ("model", "data", "reference_data", "n_reference", "n_train", "max_length", "out", "methods", "seeds",
        "tasks", "data_dir", "limit", "eval_data", "eval_every", "device", "micro_tokens", "save_every",
        "overwrite", "export", "checkpoint_activations", "compile")  # fmt: skip
# what a run writes into its methods' folders; only these and the scores are ever deleted
MEASURED = ("results.json", "samples.jsonl")
TRAINED = ("adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "README.md", *TEXT_FILES,
           "chat_template.jinja", "checkpoint/state.safetensors", "merged/*.json", "merged/*.safetensors",
           "merged/chat_template.jinja")  # fmt: skip


def open_run(options: "Options", checkpoint: Path, d_ref: Corpus, d_train: Corpus) -> Path:
    """The run folder, with config.json: every option, the packages' versions, what the run is made from.

    What was made from other inputs is a ValueError that names them, or, with --overwrite, removed: all of it,
    or, where only options of stage 4 differ, all but theta' and the scores.
    """
    out, (rank, ranks) = Path(options.out), rank_and_world()
    check_folder(out)
    if (out / "scores.safetensors").is_file():
        read_scores(out / "scores.safetensors")  # one that was cut off is found before anything is written
    inputs = {"model": model_fingerprint(checkpoint)}
    inputs |= {"reference data": d_ref.fingerprint(), "training data": d_train.fingerprint()}
    inputs |= {name: value for name, value in vars(options).items() if name not in FREE}
    config = out / "config.json"
    there = read_object(config) if config.is_file() else {"inputs": inputs}
    # an option that the run's config.json does not know yet had its default
    defaults = {name: value for name, value in vars(Options()).items() if name not in FREE}
    before, made = defaults | there["inputs"], made_in(out)
    differing = [name for name in before | inputs if before.get(name) != inputs.get(name)]
    if differing and made and not options.overwrite:
        pairs = [f"{name} (there {before.get(name)!r}, now {inputs.get(name)!r})" for name in differing]
        raise ValueError(f"{out} was made with other {'; '.join(pairs)}: use another --out, or --overwrite")
    packing = {"micro_tokens": options.micro_tokens, "ranks": ranks}
    packings = there.get("packings", []) if made else []  # all that parts of the run were made with
    packings += [packing] * (packing not in packings)
    if len(packings) > 1 and options.dropout:
        say(f"warning: {out} was made with several of {packings}: dropout masks depend on them")
    wait_for_all()  # every rank has looked before rank 0 changes anything
    if rank == 0:
        if differing:  # before config.json is replaced: a crash must not pass old files off as new ones
            for path in made_in(out, keep_reference=set(differing) <= set(STAGE_4_ONLY)):
                path.unlink()
        packages = ("torch", "numpy", "tokenizers", "safetensors")
        versions = {name: importlib.metadata.version(name) for name in packages}
        content = dataclasses.asdict(options) | {"packings": packings, "versions": versions, "inputs": inputs}
        write_text(json.dumps(content, indent=2) + "\n", config)
    wait_for_all()
    say(f"{out}: {options.model}")
    return out


def made_in(out: Path, keep_reference: bool = False) -> list[Path]:
    """The files that stages have left in a run folder; keep_reference leaves out theta' and the scores."""
    patterns = [f"*/seed-*/{name}" for name in MEASURED + TRAINED]
    patterns += [f"{folder}/{name}" for folder in UNTRAINED for name in MEASURED]
    if not keep_reference:
        patterns += [f"reference/{name}" for name in TRAINED] + ["scores.safetensors"]
    return [path for pattern in patterns for path in out.glob(pattern)]


# ---------------------------------------------------------------------------------------------- options

on_cuda = torch.cuda.is_available  # asked when Options are made, not when this file is imported

# the field that opens each group of --help, and the group's title
FLAG_GROUPS = {"model": "data", "methods": "method", "rank": "LoRA", "lr": "training",
               "device": "memory and speed", "tasks": "evaluation", "out": "run"}  # fmt: skip


@dataclass
class Options:
    """The command line; the defaults are the paper's recipe."""

    model: str | None = option(None, "checkpoint folder or Hub id, with an optional @revision")
    data: list[str] = option(list, "rows: .jsonl or .json files, public sets, hf://datasets/...; each :count")
    reference_data: list[str] = option(list, "rows of D_ref; without it D_ref is drawn from --data")
    n_reference: int | None = option(None, "examples in D_ref [10,000; a sixth of a small pool]", type=int)
    n_train: int | None = option(None, "examples in D_train [50,000; the rest of a small pool]", type=int)
    max_length: int = option(2048, "tokens an example is cut to", type=AT_LEAST_1)
    methods: list[str] = option("base reference full ignoring forgetting".split, "or forgetting:rho=0.5")
    seeds: list[int] = option(lambda: [0], "one training per method and seed", type=WHOLE)
    rho: float | None = option(None, "share of tokens kept as positive [0.7; ignoring 0.5]", type=SHARE)
    forget_rate: float | None = option(None, "share of tokens unlearned [1 - rho]", type=UP_TO_1)
    lambda_schedule: str = option("linear", "of lambda", choices=["linear", "constant", "balanced"])
    t_min: float = option(1e-5, "lambda has slope t-max - t-min (paper: 1e-5; 3B, 8B: 1e-4)", type=AT_LEAST_0)
    t_max: float = option(0.25, "lambda nears t-max - t-min at the end of training", type=AT_LEAST_0)
    balance: float = option(0.5, "balanced: most lambda |grad L_N| / |grad L_P|", type=ABOVE_0)
    watch_gradients: int = option(0, "log both gradients every so many steps; 0: never", type=WHOLE)
    rank: int = option(64, "LoRA rank", type=AT_LEAST_1)
    alpha: float = option(16.0, "LoRA alpha; the side path is scaled by alpha / rank", type=ABOVE_0)
    dropout: float = option(0.1, "LoRA dropout", type=BELOW_1)
    targets: list[str] = option(lambda: list(DEFAULT_TARGETS), "layers with an adapter, if they are there")
    lr: float = option(1e-4, "peak learning rate of AdamW (no weight decay)", type=ABOVE_0)
    warmup: float = option(0.03, "share of the steps in which the rate rises; then it falls", type=BELOW_1)
    batch_size: int = option(24, "sequences a step, over all ranks", type=AT_LEAST_1)
    epochs: int = option(1, "passes over D_train", type=AT_LEAST_1)
    reference_lr: float | None = option(None, "peak rate of the reference [--lr]", type=ABOVE_0)
    reference_epochs: int | None = option(None, "passes over D_ref [--epochs, 8 steps]", type=AT_LEAST_1)
    max_grad_norm: float = option(0.0, "clip the gradient to this norm; 0: off, the paper's", type=AT_LEAST_0)
    device: str = option(lambda: "cuda" if on_cuda() else "cpu", "cpu or cuda")
    dtype: str = option(lambda: "bfloat16" if on_cuda() else "float32", "of the frozen weights",
                        choices=["bfloat16", "float32"])  # float16 gradients would underflow
    score_dtype: str | None = option(None, "of the weights while scoring [--dtype]", choices=sorted(DTYPES))
    micro_tokens: int | None = option(None, "tokens a pass [8192; CPU 1024, bfloat16 4096]", type=AT_LEAST_1)
    checkpoint_activations: bool = option(False, "less memory: blocks run twice", action="store_true")
    compile: bool = option(False, "compile the blocks, on a GPU (no GPU has tried it)", action="store_true")
    tasks: list[str] = option(list, "tasks of eval.py for the table")
    data_dir: str | None = option(None, "folder of the tasks' rows [fetched from their public homes]")
    eval_data: list[str] = option(list, "rows held out: their response loss and perplexity, in the table")
    eval_every: int = option(0, "their loss in metrics.jsonl, too, every so many steps; 0: never", type=WHOLE)
    limit: int | None = option(None, "only the first LIMIT documents of each task", type=AT_LEAST_1)
    out: str = option("runs/latest", "run folder, continued by the same command")
    save_every: int = option(100, "steps between checkpoints", type=AT_LEAST_1)
    overwrite: bool = option(False, "start over where results of other inputs are", action="store_true")
    export: bool = option(False, "also save each model with its adapter merged in", action="store_true")

    def __post_init__(self) -> None:
        """Options that follow others unless given, and ValueError for those that do not go together."""
        self.reference_lr = self.reference_lr or self.lr
        self.score_dtype = self.score_dtype or self.dtype
        on_cpu = 4096 if self.dtype == "bfloat16" else 1024  # it saves memory; bfloat16 casts in every pack
        self.micro_tokens = self.micro_tokens or (on_cpu if self.device == "cpu" else 8192)
        if self.eval_every and not self.eval_data:
            raise ValueError("--eval-every needs --eval-data, the rows whose loss it logs")
        if self.lambda_schedule == "balanced" and not self.watch_gradients:
            raise ValueError("--lambda-schedule balanced needs --watch-gradients, whose figures it follows")
        if self.t_max < self.t_min:
            raise ValueError(f"--t-max {self.t_max} is below --t-min {self.t_min}")
        highest = 1 - (METHODS["forgetting"].rho if self.rho is None else self.rho)
        if self.forget_rate is not None and self.forget_rate > highest + 1e-9:
            raise ValueError(f"forget rate {self.forget_rate} is not allowed: 0 to 1 - rho = {highest:.4g}")


def make_parser(prog: str | None = None, **defaults: Any) -> Parser:
    """A flag for every field of Options; `defaults` stand in for some of theirs."""
    return add_flags(Parser(prog=prog, description=__doc__), Options, FLAG_GROUPS, defaults)


def parse_options(argv: list[str] | None = None, **defaults: Any) -> Options:
    """The command line as Options; `defaults` stand in for some of its defaults. Raises ValueError."""
    options = Options(**vars(make_parser(**defaults).parse_args(argv)))
    options.methods = list(dict.fromkeys(options.methods))
    options.seeds = list(dict.fromkeys(options.seeds))
    for name in options.methods:
        if name not in UNTRAINED:
            method_of(name, options)
    return options


# ------------------------------------------------------------------------------------------------- main


def main() -> None:
    """The command line: exit code 2, and one line, for what the user can mend."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # while loading, check_flags answered Ctrl-C
    flags = {word.partition("=")[0] for word in sys.argv[1:]}
    try:
        if not flags & {"--model", "--data", "--help", "-h"}:
            return load_tool("demo").main()
        options = parse_options()
        if options.model is None or not options.data:
            raise ValueError("--model and --data go together (with neither, the embedded demo runs)")
        options.device = start_ranks(options.device)
        rank, publish, look = rank_and_world()[0], load_tool("publish"), load_tool("look")  # before any work
        with locked(Path(options.out)) if rank == 0 else nullcontext():
            results = run(options)
            if rank == 0:
                publish.publish_run(options)
                look.report_run(results, options)
    except (ValueError, FloatingPointError, OSError, SafetensorError) as error:
        print(f"forgetting.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        if rank_and_world()[0] == 0:
            where = f"stopped {stop}".strip()
            print(f"\nforgetting.py: {where}; the same command goes on from what was saved", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
