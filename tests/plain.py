"""Algorithm 1 of "Forgetting" (arXiv 2508.04329), as plain as it can be: the file to read first.

    ./run.sh plain --model tests/demo_model --data rows.jsonl --reference-data trusted.jsonl \\
                   --batch-size 4 --epochs 8          # few rows need several passes

    1. reference   theta' = a brief fine-tune of theta on D_ref, rows that are trusted
    2. scores      Q = loss under theta - loss under theta', for each response token of D_train
    3. partition   P = the tokens of high Q, N = the rest
    4. training    from theta again: minimise mean loss on P - lambda * mean loss on N

One sequence at a time, a function for each equation, on the CPU. forgetting.py computes the same fast, many
sequences at once: tests/test_plain.py finds the adapters of both equal.
Shapes: L tokens of a sequence, R of them response tokens, V vocabulary.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where model.py, lora.py and data.py are

from data import Tokenizer, encode_rows, read_rows, render_rows, split_rows
from lora import add_lora, lora_disabled, lora_parameters, remove_lora, save_adapter
from model import checkpoint_folder, load_model


def sequences_of(corpus):
    """Each sequence as (tokens (L,), response (L,)); response is equation 2: True at the answer's tokens."""
    tokens = torch.from_numpy(corpus.tokens).long()
    response = torch.from_numpy(corpus.response)
    lengths = corpus.lengths.tolist()
    return list(zip(tokens.split(lengths), response.split(lengths)))


def token_losses(model, tokens, response):
    """Equation 3: -log p(token | all tokens before it), in nats, for each response token; (R,).

    The first token of a sequence is never a response token: nothing predicts it.
    """
    boundaries = torch.tensor([0, len(tokens)], dtype=torch.int32)  # of a pack of one sequence
    logits = model.lm_head(model(tokens, boundaries))  # (L, V)
    losses = F.cross_entropy(logits[:-1], tokens[1:], reduction="none")  # (L-1,) each token predicts the next
    return losses[response[1:]]  # (R,)


@torch.no_grad()
def quality_scores(model, examples):
    """Equations 4 and 5: Q = loss under theta - loss under theta'; a list with one (R,) for each sequence.

    Q is high where theta' finds a token easier than theta does: what D_ref taught has helped. The adapter of
    theta' must be on the model.
    """
    quality = []
    for tokens, response in examples:
        reference_loss = token_losses(model, tokens, response)
        with lora_disabled(model):  # theta' is theta with an adapter; without it the model is theta
            base_loss = token_losses(model, tokens, response)
        quality.append(base_loss - reference_loss)
    return quality


def partition(quality, rho):
    """Equations 6 and 7: the threshold F(1 - rho), then the masks of P and of N, one (R,) for each sequence.

    F is the quantile function of Q: about a share rho of all tokens has Q at the threshold or above.
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho {rho} is not allowed: more than 0, at most 1")
    ranked = torch.cat(quality).sort().values
    place = math.ceil(round((1 - rho) * (len(ranked) - 1), 6))  # round: 1 - 0.7 is 0.30000000000000004
    threshold = ranked[place]
    positive = [scores >= threshold for scores in quality]
    negative = [scores < threshold for scores in quality]
    return float(threshold), positive, negative


def lambda_at(step, total_steps, t_min, t_max):
    """How strongly N is unlearned: not at all at step 0, then more at each step. t_min lowers the slope."""
    return (t_max - t_min) * step / total_steps


def learning_rate_at(step, total_steps, options):
    """Linear: up from 0 over the first 3 % of the steps, then down to 0."""
    rising = math.ceil(0.03 * total_steps)
    if step < rising:
        return options.lr * step / rising
    return options.lr * (total_steps - step) / (total_steps - rising)


def batches_of(count, options, seed):
    """The examples of each step: every epoch goes through all of them, in a random order of its own."""
    for epoch in range(options.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        for first in range(0, count, options.batch_size):
            yield order[first : first + options.batch_size]


def train(model, examples, positive, negative, seed, options):
    """Equation 8: train a new adapter to minimise mean loss on P - lambda * mean loss on N; it stays on.

    With every response token in P and none in N this is equation 1, ordinary fine-tuning.
    """
    add_lora(model, options.rank, options.alpha, dropout=0.0, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), weight_decay=0.0)
    batches = list(batches_of(len(examples), options, seed))
    for step, batch in enumerate(batches):
        # the means are over all tokens of the step: one counts the same in a long sequence as in a short one
        n_positive = sum(int(positive[i].sum()) for i in batch)
        n_negative = sum(int(negative[i].sum()) for i in batch)
        lam = lambda_at(step, len(batches), options.t_min, options.t_max)
        mean_positive, mean_negative = 0.0, 0.0
        optimizer.zero_grad()
        for i in batch:
            losses = token_losses(model, *examples[i])  # (R,)
            # this sequence's part of the two means; max, because a step may have no token in N
            on_positive = losses[positive[i]].sum() / max(n_positive, 1)
            on_negative = losses[negative[i]].sum() / max(n_negative, 1)
            (on_positive - lam * on_negative).backward()  # its gradient is added to those of the others
            mean_positive += on_positive.item()
            mean_negative += on_negative.item()
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, len(batches), options)
        optimizer.step()
        on_n = f", on N {mean_negative:.4f}, lambda {lam:.4f}" if n_negative else ""
        print(f"   step {step}: loss on P {mean_positive:.4f}{on_n}")


def algorithm_1(model, d_ref, d_train, options):
    """All four stages. Saves theta' and the adapter of the last; returns Q, the threshold, P and N."""
    print(f"1. reference: {len(d_ref)} sequences of D_ref")
    everything = [torch.ones(int(response.sum()), dtype=torch.bool) for _, response in d_ref]  # (R,) each
    nothing = [~mask for mask in everything]
    train(model, d_ref, everything, nothing, 0, options)
    save_adapter(model, Path(options.out) / "reference", options.model)

    print(f"2. scores: {len(d_train)} sequences of D_train")
    quality = quality_scores(model, d_train)
    remove_lora(model)  # theta' was only there to judge: training begins with theta again
    if len(torch.cat(quality).unique()) == 1:
        raise ValueError(
            "the reference learned nothing, all Q are equal: a smaller --batch-size, more --epochs"
        )

    threshold, positive, negative = partition(quality, options.rho)
    n_positive, n_negative = (int(torch.cat(masks).sum()) for masks in (positive, negative))
    print(f"3. partition: {n_positive} tokens of Q >= {threshold:.4f} in P, {n_negative} in N")

    print("4. training")
    train(model, d_train, positive, negative, options.seed, options)
    save_adapter(model, Path(options.out) / "forgetting", options.model)
    print(f"   {options.out}/forgetting: the adapter, in PEFT's format")
    return quality, threshold, positive, negative


def main(arguments=None):
    """The command line. Its defaults are the paper's recipe without dropout.

    forgetting.py ends in the same adapter with --dropout 0 and as many --reference-epochs as --epochs.
    """
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="./run.sh plain", description=__doc__, formatter_class=as_written)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--data", nargs="+", required=True, help="rows of D_train (FILE:100: its first 100)")
    parser.add_argument("--reference-data", nargs="+", default=[], help="rows of D_ref [a sixth of --data]")
    recipe = {"rho": 0.7, "t_min": 1e-5, "t_max": 0.25, "lr": 1e-4, "batch_size": 24, "epochs": 1}
    recipe |= {"rank": 64, "alpha": 16.0, "max_length": 2048, "seed": 0, "out": "runs/plain"}
    for name, default in recipe.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args(arguments)

    folder = checkpoint_folder(options.model)
    tokenizer = Tokenizer(folder)
    files = [read_rows(options.data), read_rows(options.reference_data)]
    (rows, trusted), _ = render_rows(files, tokenizer)
    reference, train_rows, _ = split_rows(rows, trusted, None, None)  # disjoint: no row is in both
    d_ref, d_train = (
        sequences_of(encode_rows(part, tokenizer, options.max_length)) for part in (reference, train_rows)
    )
    return algorithm_1(load_model(folder), d_ref, d_train, options)


if __name__ == "__main__":
    main()
