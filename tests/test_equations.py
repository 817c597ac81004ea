"""Each equation of the paper against a naive float64 oracle: loops that read like the formula."""

import math

import numpy as np
import pytest
import torch
from test_data import position_corpus

from data import Corpus
from forgetting import (
    METHODS,
    Method,
    Options,
    choose_signs,
    examples_of,
    lambda_at,
    learning_rate_at,
    partition,
    quality_scores,
    seed_dropout,
    token_weights,
    weighted_and_token_losses,
    weighted_token_loss,
)
from lora import add_lora, lora_parameters


def make_problem(n=700, width=12, vocab=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(n, width, generator=g), torch.randn(vocab, width, generator=g)
    targets = torch.randint(vocab, (n,), generator=g)
    side = torch.randint(-1, 2, (n,), generator=g)
    return hidden, head, targets, side > 0, side < 0


def naive_losses(hidden, head, targets) -> list[torch.Tensor]:
    """Equation 3, token by token: -log softmax(W h)_y."""
    return [-torch.log_softmax(head.double() @ h, 0)[y] for h, y in zip(hidden, targets)]


def naive_equation_8(hidden, head, targets, positive, negative, lam) -> torch.Tensor:
    losses = naive_losses(hidden, head, targets)
    kept = [loss for loss, p in zip(losses, positive) if p]
    unlearned = [loss for loss, n in zip(losses, negative) if n]
    total = torch.zeros((), dtype=torch.float64)
    total = total + sum(kept) / len(kept) if kept else total
    return total - lam * sum(unlearned) / len(unlearned) if unlearned else total


def test_the_plain_version_of_the_docstring():
    """The three lines that weighted_token_loss gives to copy."""
    hidden, head_weight, targets, positive, negative = make_problem()
    hidden.requires_grad_()
    lines = [line.strip() for line in weighted_token_loss.__doc__.splitlines()]
    plain = [line for line in lines if line.startswith(("logits = ", "losses = ", "loss = "))]
    assert len(plain) == 3
    names = {
        "hidden": hidden,
        "head_weight": head_weight,
        "targets": targets,
        "positive": positive,
        "negative": negative,
        "weights": token_weights(positive, negative, 0.2),
        "F": torch.nn.functional,
    }
    exec("\n".join(plain), names)
    loss = weighted_token_loss(hidden, head_weight, targets, token_weights(positive, negative, 0.2))
    assert loss.item() == pytest.approx(names["loss"].item(), rel=1e-5)
    gradients = [torch.autograd.grad(x, hidden)[0] for x in (loss, names["loss"])]
    assert torch.allclose(*gradients, atol=1e-7)


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("empty", [None, "positive", "negative", "both"])
def test_equation_8_value_and_gradient(lam, empty):
    hidden, head, targets, positive, negative = make_problem()
    if empty in ("positive", "both"):
        positive[:] = False
    if empty in ("negative", "both"):
        negative[:] = False
    oracle_hidden = hidden.double().requires_grad_()
    oracle = naive_equation_8(oracle_hidden, head, targets, positive, negative, lam)
    oracle_gradient = (
        torch.autograd.grad(oracle, oracle_hidden)[0]
        if oracle.requires_grad
        else torch.zeros_like(oracle_hidden)
    )
    hidden.requires_grad_()
    weights = token_weights(positive, negative, lam)
    loss, losses = weighted_and_token_losses(hidden, head, targets, weights)
    (3 * loss).backward()
    assert torch.isfinite(loss) and not losses.requires_grad and abs(loss.item() - oracle.item()) < 1e-5
    assert torch.allclose(hidden.grad.double(), 3 * oracle_gradient, atol=1e-7, rtol=1e-5)
    assert torch.allclose(
        losses.double(), torch.stack(naive_losses(hidden.detach().double(), head, targets)), atol=1e-5
    )


@pytest.mark.parametrize("powers", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 2.0)])
def test_weights_times_a_power_of_p(powers):
    """DFT and weighted gradient ascent against autograd in float64, p without a gradient; two chunks of the head."""
    hidden, head, targets, positive, negative = make_problem()
    weights = token_weights(positive, negative, 0.25)
    oracle_hidden = hidden.double().requires_grad_()
    losses = torch.stack(naive_losses(oracle_hidden, head, targets))
    p = torch.exp(-losses.detach())
    on_positive = (p ** powers[0] * losses)[positive].mean()
    on_negative = (p ** powers[1] * losses)[negative].mean()
    oracle = on_positive - 0.25 * on_negative
    oracle.backward()
    hidden.requires_grad_()
    loss, plain = weighted_and_token_losses(hidden, head, targets, weights, powers=powers)
    (3 * loss).backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(oracle.item(), abs=1e-5)
    assert torch.allclose(hidden.grad.double(), 3 * oracle_hidden.grad, atol=1e-7, rtol=1e-5)
    assert torch.allclose(plain.double(), losses.detach(), atol=1e-5), "the losses stay those of eq. 3"


def test_the_gradient_of_a_power_by_finite_differences():
    """Those of sum w p^a loss with p held at its value, along random directions."""
    hidden, head, targets, positive, negative = make_problem(n=40)
    weights, powers = token_weights(positive, negative, 0.25).double(), (1.0, 1.0)
    held = torch.exp(-torch.stack(naive_losses(hidden.double(), head, targets))) * weights

    def value(at: torch.Tensor) -> float:
        return float(held @ torch.stack(naive_losses(at, head, targets)))

    gradient = torch.autograd.grad(
        weighted_token_loss(hidden.requires_grad_(), head, targets, weights.float(), powers=powers), hidden
    )[0].double()
    for seed in range(5):
        direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed)).double()
        at, small = hidden.detach().double(), 1e-5
        slope = (value(at + small * direction) - value(at - small * direction)) / (2 * small)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-3)


def test_weighted_ascent_fades_where_a_token_is_improbable():
    """Twice the logit, and the push on N is nearly gone; without the power it stays."""
    head, targets, weights = torch.eye(8), torch.tensor([0]), torch.tensor([-1.0])
    norms: dict = {}
    for powers in ((0.0, 0.0), (0.0, 1.0)):
        for depth in (1.0, 10.0):
            hidden = torch.zeros(1, 8)
            hidden[0, 1] = depth  # another token is the probable one
            hidden.requires_grad_()
            weighted_token_loss(hidden, head, targets, weights, powers=powers).backward()
            norms[powers, depth] = float(hidden.grad.norm())
    assert norms[(0.0, 0.0), 10.0] > norms[(0.0, 0.0), 1.0]
    assert norms[(0.0, 1.0), 10.0] < 1e-3 * norms[(0.0, 1.0), 1.0]


def test_lambda_is_the_papers():
    for step in range(7):
        assert lambda_at(step, 7, 1e-4, 0.25) == pytest.approx((0.25 - 1e-4) * step / 7, rel=1e-15)
    assert lambda_at(0, 7, 1e-4, 0.25) == 0  # there is no "+ t_min"


def test_quality_is_base_minus_reference():
    base, ref = np.float32([3, 1, 2]), np.float32([1, 2, 2])
    assert quality_scores(base, ref).tolist() == [2, -1, 0]


@pytest.mark.parametrize("n", [1, 2, 10, 11, 1000, 1001])
@pytest.mark.parametrize("rho", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_partition_without_ties(n, rho):
    """P is every score from the (1 - rho) quantile up. In exact arithmetic; 1 - 0.7 is 0.30000000000000004 in floats."""
    quality = np.random.default_rng(n).permutation(n).astype(np.float32)
    positive, negative = partition(quality, rho)
    place = math.ceil(round((1 - rho) * 1000) * (n - 1) / 1000 - 1e-9)  # F(1 - rho), rounded up to a score
    assert (positive == (quality >= place)).all() and (negative == ~positive).all()
    assert positive.sum() == n - place and abs(positive.mean() - rho) <= 1 / n


def test_partition_with_ties_and_extremes():
    quality = np.float32([0, 1, 1, 1, 1, 1, 1, 1, 1, 2])
    positive, negative = partition(quality, 0.5)
    assert positive.sum() == 9 and negative.tolist() == [True] + [False] * 9  # the whole tie is positive
    positive, negative = partition(np.zeros(5, np.float32), 0.3)
    assert positive.all() and not negative.any()
    positive, negative = partition(quality, 1.0)
    assert positive.all() and not negative.any()


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.3])
def test_forget_rate_drops_what_lies_between(rate):
    quality = np.random.default_rng(0).permutation(101).astype(np.float32)
    positive, negative = partition(quality, 0.7, rate)
    assert (positive == partition(quality, 0.7)[0]).all() and not (positive & negative).any()
    assert (negative == (quality < round(rate * 100))).all()


@pytest.mark.parametrize("rho, rate", [(0.0, None), (1.1, None), (-0.5, None), (0.7, 0.31), (0.7, -0.1)])
def test_partition_refuses_shares_out_of_range(rho, rate):
    with pytest.raises(ValueError, match="is not allowed"):
        partition(np.arange(5.0), rho, rate)
    with pytest.raises(ValueError, match="2 quality scores are not finite"):
        partition(np.float32([1, np.nan, np.inf]), 0.5)


def test_rho_positive_keeps_what_the_reference_finds_easier():
    """The paper's first threshold, Q > 0: it keeps another share on every corpus, and a tie with 0 is not kept."""
    quality = np.float32([-1, 0, 0.5, -0.0, 2])
    positive, negative = partition(quality, "positive")
    assert positive.tolist() == [False, False, True, False, True] and (negative == ~positive).all()
    with pytest.raises(ValueError, match="forget rate 0.1 needs a rho that is a number"):
        partition(quality, "positive", 0.1)
    with pytest.raises(ValueError, match="rho best is not allowed"):
        partition(quality, "best")


def test_warmup_and_decay_are_those_of_transformers():
    """get_linear_schedule_with_warmup: the first step has rate 0, the last is one slope above 0."""
    rates = [learning_rate_at(step, 100, 2.0, 0.03) for step in range(100)]
    assert rates[:4] == [0, pytest.approx(2 / 3), pytest.approx(4 / 3), 2] and rates[-1] == pytest.approx(
        2 / 97
    )


# ------------------------------------------------------------------------------------------------------------- signs


def scored_corpus():
    corpus = position_corpus([30, 12, 50, 21])
    quality = np.full(len(corpus.tokens), np.nan, np.float32)
    quality[corpus.response] = np.random.default_rng(0).normal(size=corpus.response.sum())
    return corpus, quality


@pytest.mark.parametrize("name", METHODS)
def test_signs_of_every_method(name):
    corpus, quality = scored_corpus()
    method, options = METHODS[name], Options()
    signs = choose_signs(method, quality, corpus, options, seed=1)
    inside = signs[corpus.response]
    assert (signs[~corpus.response] == 0).all()
    assert set(inside.tolist()) == ({1} if name in ("full", "dft") else {1, -1} if method.unlearn else {1, 0})
    if not method.by_sequence:
        assert abs((inside == 1).mean() - method.rho) < 0.02
    elif name == "forgetting-sequence":
        means = [np.nanmean(quality[a:b]) for a, b in zip(corpus.offsets, corpus.offsets[1:])]
        sides = [set(signs[a + 1 : b].tolist()) for a, b in zip(corpus.offsets, corpus.offsets[1:])]
        threshold = sorted(means)[math.ceil(0.3 * 3)]
        assert sides == [{1} if mean >= threshold else {-1} for mean in means]
    elif name == "ignoring-sequence":
        assert sum(signs[a + 1] == 1 for a in corpus.offsets[:-1]) == 2


def test_rho_overrides_and_random_is_drawn_by_seed():
    corpus, quality = scored_corpus()
    signs = {
        seed: choose_signs(METHODS["ignoring-random"], quality, corpus, Options(rho=0.7), seed)
        for seed in (1, 2)
    }
    assert abs(signs[1][corpus.response].mean() - 0.7) < 0.02 and (signs[1] != signs[2]).any()
    assert (choose_signs(METHODS["full"], quality, corpus, Options(rho=0.7), 0)[corpus.response] == 1).all()
    signs = choose_signs(METHODS["forgetting"], quality, corpus, Options(forget_rate=0.1), 0)[corpus.response]
    assert abs((signs == -1).mean() - 0.1) < 0.02 and abs((signs == 1).mean() - 0.7) < 0.02


def test_a_new_method_is_one_line():
    corpus, quality = scored_corpus()
    signs = choose_signs(Method(rho=0.9, unlearn=True), quality, corpus, Options(), 0)[corpus.response]
    assert abs((signs == -1).mean() - 0.1) < 0.02


def test_a_head_that_is_trained_and_other_shapes_are_refused():
    """Found at d954c0b: the head's gradient stayed None without a word."""
    hidden, head, targets, weights = torch.randn(2, 4), torch.randn(9, 4), torch.tensor([1, 2]), torch.ones(2)
    with pytest.raises(ValueError, match="head_weight requires a gradient"):
        weighted_token_loss(hidden, head.requires_grad_(), targets, weights)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 4\), \(n, D\) is needed"):
        weighted_token_loss(hidden[None], head.detach(), targets, weights)


def test_targets_of_minus_100_count_nothing():
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    targets, weights = torch.tensor([1, -100, 3, -100, 8]), torch.tensor([0.5, 0.7, -0.2, 1.0, 0.1])
    loss = weighted_token_loss(hidden, head, targets, weights)
    loss.backward()
    kept = targets >= 0
    losses = torch.nn.functional.cross_entropy(
        hidden.detach()[kept] @ head.T, targets[kept], reduction="none"
    )
    assert loss.item() == pytest.approx(float(losses @ weights[kept]), rel=1e-5)
    assert not hidden.grad[~kept].any() and hidden.grad[kept].any(dim=1).all()


def test_every_epoch_has_an_order_of_its_own():
    """A change that drew every epoch from the seed alone passed all tests once."""
    epochs = [
        np.concatenate([examples_of(step, 50, 8, seed=3) for step in range(7 * e, 7 * e + 7)])
        for e in range(3)
    ]
    assert all(sorted(epoch.tolist()) == list(range(50)) for epoch in epochs)
    assert not any((epochs[i] == epochs[j]).all() for i in range(3) for j in range(i))
    assert (epochs[0] == np.concatenate([examples_of(step, 50, 8, seed=3) for step in range(7)])).all()


class PlainBlock(torch.nn.Module):
    """What a foreign model looks like to lora.py: linear layers under some names, bfloat16."""

    def __init__(self):
        super().__init__()
        self.embed, self.q_proj = torch.nn.Embedding(30, 16), torch.nn.Linear(16, 16)
        self.down_proj, self.lm_head = torch.nn.Linear(16, 16), torch.nn.Linear(16, 30, bias=False)

    def forward(self, tokens):  # (B, S) -> (B, S, D)
        x = self.embed(tokens)
        return x + self.down_proj(torch.tanh(self.q_proj(x)))


def test_the_pieces_work_in_a_plain_loop():
    """README's snippet: add_lora and weighted_token_loss around a model of another library, labels with -100."""
    torch.manual_seed(0)
    model = PlainBlock().bfloat16()
    add_lora(model, r=4, dropout=0.0, targets=["q_proj", "down_proj"])
    tokens, labels = torch.randint(0, 30, (3, 8)), torch.randint(0, 30, (3, 8))
    labels[:, :3] = -100
    positive = torch.rand(3, 8) < 0.7
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=1e-2)
    history = []
    for _ in range(30):
        hidden, targets = model(tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        good, judged = positive[:, 1:].flatten(), targets >= 0
        weights = token_weights(good & judged, ~good & judged, 0.1)
        loss, losses = weighted_and_token_losses(hidden, model.lm_head.weight, targets, weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(losses[good & judged].mean()))
    assert history[-1] < history[0] - 0.3


def test_sequences_are_ranked_by_their_mean_not_their_sum():
    """A long sequence of small Q has the greater sum and the smaller mean."""
    response = np.array([False] + [True] * 9 + [False, True, True])
    quality = np.where(response, [0.0] + [0.4] * 9 + [0.0] + [1.0] * 2, np.nan)
    corpus = Corpus(np.zeros(13, np.int32), response, np.array([0, 10, 13]), ["a", "b"], 0)
    signs = choose_signs(METHODS["ignoring-sequence"], quality, corpus, Options(), seed=0)
    assert not signs[:10].any() and signs[11:].all()


def test_dropout_is_a_function_of_seed_and_step():
    draws = {}
    for seed in (0, 1):
        for step in (0, 1, 2):
            seed_dropout(seed, step)
            draws[seed, step] = torch.rand(4)
    seed_dropout(1, 2)
    assert torch.equal(torch.rand(4), draws[1, 2])
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 6


def test_the_controls_are_of_forgettings_sizes():
    """full-P keeps as many tokens as forgetting, forgetting-random unlearns as many: only which ones differs."""
    corpus = position_corpus([30, 40, 50])
    quality = np.where(corpus.response, np.random.default_rng(0).standard_normal(len(corpus.tokens)), np.nan)
    signs = {
        name: choose_signs(METHODS[name], quality, corpus, Options(), 0)
        for name in ("forgetting", "full-P", "forgetting-random")
    }
    kept = {name: (int((s > 0).sum()), int((s < 0).sum())) for name, s in signs.items()}
    assert kept["full-P"] == (kept["forgetting"][0], 0) and kept["forgetting-random"] == kept["forgetting"]
    assert not np.array_equal(signs["forgetting-random"], signs["forgetting"])
