"""One training loop: what must not change its result does not, and what must, does."""

import json

import numpy as np
import pytest
import tiny
import torch
import torch.multiprocessing

from data import Tokenizer, build_corpus
from forgetting import (
    BALANCE,
    METHODS,
    Options,
    choose_signs,
    data_parallel,
    lambda_at,
    response_losses,
    scheduled_lambda,
)
from forgetting import step_gradient, train, watch_gradients
from lora import add_lora, lora_disabled, lora_parameters, remove_lora
from model import load_model, token_losses

ROWS = [
    {"instruction": f"Tell me {i} of {i * i}", "output": " ".join(tiny.TEXT.split()[i : i + 3 + i % 7])}
    for i in range(24)
]
LAM = 0.2


def setting(folder):
    """A tiny model, a corpus of 24 examples, and signs with both sides and tokens on neither."""
    torch.set_num_threads(1)  # two ranks and one process then add up in the same order
    if not folder.exists():
        tiny.make_checkpoint(folder, "llama3")
    model, tokenizer = load_model(folder), Tokenizer(folder)
    corpus = build_corpus(ROWS, tokenizer)
    signs = np.random.default_rng(0).integers(-1, 2, len(corpus.tokens)).astype(np.int8)
    signs[~corpus.response] = 0
    return model, corpus, signs


def adapt(model):
    add_lora(model, r=4, alpha=8, dropout=0.0, generator=torch.Generator().manual_seed(0))
    for parameter in lora_parameters(model).values():
        parameter.data += 0.05  # B = 0 would give A no gradient


def gradient_of(model, corpus, signs, budget, lam=LAM, examples=None, **changes) -> torch.Tensor:
    for parameter in lora_parameters(model).values():
        parameter.grad = None
    examples = np.arange(len(corpus)) if examples is None else examples
    options = Options(micro_tokens=budget, **changes)
    sums, counts = step_gradient(data_parallel(model), corpus, signs, examples, lam, options)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)  # train() does; the gradient DDP has summed already
    flat = [
        p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
        for p in lora_parameters(model).values()
    ]
    return torch.cat([*flat, sums])


def naive_gradient(model, corpus, signs, lam=LAM, powers=(0.0, 0.0)) -> torch.Tensor:
    """Equation 8, sequence by sequence through plain autograd, in the order it is written.

    powers are those of a token's probability that its loss on P, and on N, is multiplied by.
    """
    sums, counts = [0.0, 0.0], [(signs > 0).sum(), (signs < 0).sum()]
    for start, end in zip(corpus.offsets, corpus.offsets[1:]):
        tokens = torch.from_numpy(corpus.tokens[start:end]).long()
        logits = model.lm_head(model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32)))
        losses = -torch.log_softmax(logits[:-1], -1).gather(1, tokens[1:, None]).squeeze(1)
        for place, sign in enumerate(signs[start + 1 : end]):
            if sign:
                side = int(sign < 0)
                probability = torch.exp(-losses[place].detach())
                sums[side] = sums[side] + probability ** powers[side] * losses[place]
    loss = sums[0] / counts[0] - lam * sums[1] / max(counts[1], 1)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(lora_parameters(model).values()))])


def test_the_step_is_equation_8_whatever_the_micro_batches(tmp_path):
    """24 examples as 1, 5 and 24 micro-batches: one gradient, that of the naive loop; for P alone, N alone, and both."""
    model, corpus, signs = setting(tmp_path / "m")
    adapt(model)
    oracle = naive_gradient(model, corpus, signs)
    total = len(corpus.tokens)
    whole = gradient_of(model, corpus, signs, total)
    assert torch.allclose(whole[:-3], oracle, atol=1e-6)
    for budget in (total // 5 + 20, 1):
        assert torch.allclose(gradient_of(model, corpus, signs, budget), whole, atol=1e-6, rtol=1e-5)
    for side in (1, -1):
        half = np.where(signs == side, signs, 0).astype(np.int8)
        assert torch.allclose(
            gradient_of(model, corpus, half, 1), gradient_of(model, corpus, half, total), atol=1e-6, rtol=1e-5
        )
        assert gradient_of(model, corpus, half, total)[:-3].abs().max() > 1e-3


def test_the_powers_are_those_of_their_sides(tmp_path):
    """With learn_power on N and unlearn_power on P, dft was full, forgetting-wga was no unlearning that fades, and every
    test passed."""
    model, corpus, signs = setting(tmp_path / "m")
    adapt(model)
    total = len(corpus.tokens)
    plain = gradient_of(model, corpus, signs, total)[:-3]
    for powers in ((1.0, 2.0), (1.0, None), (None, 1.0)):
        changes = {"learn_power": powers[0], "unlearn_power": powers[1]}
        oracle = naive_gradient(model, corpus, signs, powers=[power or 0.0 for power in powers])
        for budget in (total, 60):
            found = gradient_of(model, corpus, signs, budget, **changes)[:-3]
            assert torch.allclose(found, oracle, atol=1e-6) and not torch.allclose(found, plain, atol=1e-4)


def one_sided(corpus, signs) -> np.ndarray:
    """Signs that leave every second example, in order of length, without a weighted token: rank 1's share of two."""
    order = sorted(range(len(corpus)), key=lambda example: -corpus.lengths[example])
    signs = signs.copy()
    signs[corpus.places(order[1::2])] = 0
    return signs


def on_rank(rank: int, folder, store: str, world: int) -> None:
    """One of several gloo ranks: the summed gradient must be that of one process, reduced once and by DDP alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.nn.parallel.distributed._sync_module_states = (
        None  # would broadcast the frozen weights: must not be called
    )
    reduce, reductions = torch.distributed.all_reduce, []
    torch.distributed.all_reduce = lambda *args, **rest: reductions.append(1) or reduce(*args, **rest)
    model, corpus, signs = setting(folder)
    adapt(model)
    for budget in (10_000, 60, 1):
        torch.save(gradient_of(model, corpus, signs, budget), f"{store}.{rank}.{budget}")
    lonely = gradient_of(model, corpus, signs, 100, examples=np.array([3]))  # fewer examples than ranks
    torch.save(lonely, f"{store}.{rank}.lonely")
    torch.save(gradient_of(model, corpus, one_sided(corpus, signs), 60), f"{store}.{rank}.one-sided")
    assert len(reductions) == 5 * 2, (
        "a step reduces its gradient once, however many packs a rank has, and its sums"
    )
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_make_the_gradient_of_one_process(tmp_path, world):
    model, corpus, signs = setting(tmp_path / "m")
    adapt(model)
    torch.multiprocessing.spawn(on_rank, (tmp_path / "m", str(tmp_path / "store"), world), nprocs=world)
    whole = gradient_of(model, corpus, signs, 10_000)
    lonely = gradient_of(model, corpus, signs, 100, examples=np.array([3]))
    half = gradient_of(model, corpus, one_sided(corpus, signs), 60)
    for rank in range(world):
        assert torch.allclose(torch.load(tmp_path / f"store.{rank}.one-sided"), half, atol=1e-6, rtol=1e-5)
        for budget in (10_000, 60, 1):
            assert torch.allclose(
                torch.load(tmp_path / f"store.{rank}.{budget}"), whole, atol=1e-6, rtol=1e-5
            )
        assert torch.allclose(torch.load(tmp_path / f"store.{rank}.lonely"), lonely, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("missing", ["P", "N", "both"])
def test_steps_without_a_side_are_finite(tmp_path, missing):
    model, corpus, signs = setting(tmp_path / "m")
    adapt(model)
    signs = np.where({"P": signs > 0, "N": signs < 0, "both": signs != 0}[missing], 0, signs).astype(np.int8)
    gradient = gradient_of(model, corpus, signs, 60)
    assert torch.isfinite(gradient).all()
    assert gradient.any() == (missing != "both")


@torch.inference_mode()
def test_scoring_is_theta_and_theta_prime(tmp_path):
    """Losses land on the token they judge, under both models, whatever the packing."""
    model, corpus, _ = setting(tmp_path / "m")
    adapt(model)
    everything = np.arange(len(corpus))
    ref = response_losses(model, corpus, everything, 90, "losses")
    assert np.allclose(
        ref, response_losses(model, corpus, everything, 10_000, "losses"), atol=1e-5, equal_nan=True
    )
    with lora_disabled(model):
        base = response_losses(model, corpus, everything, 90, "losses")
    assert (np.isfinite(base) == corpus.response).all() and (np.isfinite(ref) == corpus.response).all()
    for start, end in zip(corpus.offsets, corpus.offsets[1:]):
        tokens = torch.from_numpy(corpus.tokens[start:end]).long()
        judged = corpus.response[start + 1 : end]
        for scored, model_of in ((ref, None), (base, lora_disabled)):
            context = model_of(model) if model_of else torch.inference_mode()
            with context:
                hidden = model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))
            naive = token_losses(hidden[:-1], model.lm_head.weight, tokens[1:]).numpy()
            assert np.allclose(scored[start + 1 : end][judged], naive[judged], atol=1e-5)


def options_for(tmp_path, **changes) -> Options:
    return Options(model="m", data=["d"], rank=4, alpha=8.0, batch_size=6, lr=1e-2, epochs=2, **changes)


def adapter_after(model, corpus, signs, folder, options) -> torch.Tensor:
    folder.mkdir(parents=True)
    train(model, corpus, signs, folder, options, seed=5)
    flat = torch.cat([p.detach().flatten() for p in lora_parameters(model).values()])
    remove_lora(model)
    return flat


def test_lambda_zero_is_ignoring_bit_for_bit(tmp_path):
    """With dropout on: the two runs draw the same masks, because randomness depends on seed, step and rank alone."""
    model, corpus, _ = setting(tmp_path / "m")
    quality = np.where(corpus.response, np.random.default_rng(3).normal(size=len(corpus.tokens)), np.nan)
    forgetting = choose_signs(METHODS["forgetting"], quality, corpus, Options(), 0)
    ignoring = choose_signs(METHODS["ignoring"], quality, corpus, Options(rho=0.7), 0)
    assert (forgetting < 0).any() and ((forgetting > 0) == (ignoring > 0)).all()
    flat = [
        adapter_after(model, corpus, forgetting, tmp_path / "a", options_for(tmp_path, t_min=0.0, t_max=0.0)),
        adapter_after(model, corpus, ignoring, tmp_path / "b", options_for(tmp_path)),
        adapter_after(model, corpus, forgetting, tmp_path / "c", options_for(tmp_path)),
    ]
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])


def test_unlearning_raises_the_loss_on_n(tmp_path):
    model, corpus, signs = setting(tmp_path / "m")
    options = options_for(tmp_path, lambda_schedule="constant", dropout=0.0)
    for name, chosen in (("forgetting", signs), ("ignoring", np.maximum(signs, 0))):
        adapter_after(model, corpus, chosen, tmp_path / name, options)
    logged = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("forgetting", "ignoring")
    }
    assert len(logged["forgetting"]) == 8 and logged["forgetting"][-1]["L_N"] > logged["forgetting"][0]["L_N"]
    assert all(
        line["loss"] == pytest.approx(line["L_P"] - 0.25 * line["L_N"]) for line in logged["forgetting"]
    )
    assert all(
        line["L_N"] is None and line["loss"] == pytest.approx(line["L_P"]) for line in logged["ignoring"]
    )


def test_a_run_stopped_at_a_checkpoint_ends_the_same(tmp_path, monkeypatch):
    """The adapter after a crash between two checkpoints is bit for bit that of an undisturbed run; so is the log."""
    model, corpus, signs = setting(tmp_path / "m")
    options = options_for(tmp_path, save_every=3)
    whole = adapter_after(model, corpus, signs, tmp_path / "whole", options)

    import forgetting

    steps = []

    def crash(*arguments):
        steps.append(1)
        if len(steps) == 6:  # step 5: after the checkpoint at 3, before the one at 6
            raise KeyboardInterrupt
        return step_gradient(*arguments)

    monkeypatch.setattr(forgetting, "step_gradient", crash)
    with pytest.raises(KeyboardInterrupt):
        adapter_after(model, corpus, signs, tmp_path / "broken", options)
    remove_lora(model)
    monkeypatch.undo()
    train(model, corpus, signs, tmp_path / "broken", options, seed=5)
    assert torch.equal(torch.cat([p.detach().flatten() for p in lora_parameters(model).values()]), whole)
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "tokens/s"}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "broken")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 8


def test_a_loss_that_is_not_finite_stops_with_its_figures(tmp_path):
    model, corpus, signs = setting(tmp_path / "m")
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"not finite: .*'step': 0, .*'L_P': nan.*examples \[\d"):
        adapter_after(model, corpus, signs, tmp_path / "a", options_for(tmp_path))


def test_gradient_clipping(tmp_path):
    """Clipping to a tiny norm leaves AdamW's first update (scale-free) as it is but must not touch the logged norm."""
    model, corpus, signs = setting(tmp_path / "m")
    norms = []
    for name, limit in (("off", 0.0), ("on", 1e-3)):
        adapter_after(
            model, corpus, signs, tmp_path / name, options_for(tmp_path, dropout=0.0, max_grad_norm=limit)
        )
        norms.append(json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["grad_norm"])
    assert norms[0] == norms[1] > 1e-3


def test_every_step_has_its_own_dropout(tmp_path, monkeypatch):
    """Masks seeded without the step passed every test once: each step would have dropped the same inputs."""
    model, corpus, signs = setting(tmp_path / "m")
    seeded = []
    monkeypatch.setattr("forgetting.seed_dropout", lambda seed, step: seeded.append((seed, step)))
    train(model, corpus, signs, tmp_path / "out", Options(batch_size=6, rank=4), seed=7)
    assert seeded == [(7, 0), (7, 1), (7, 2), (7, 3)]


def test_watched_gradients_are_those_of_the_two_terms(tmp_path):
    """Their norms and cosine against autograd through the naive loop, and the training is the same without watching."""
    model, corpus, signs = setting(tmp_path / "m")
    adapt(model)
    together, alone = (
        naive_gradient(model, corpus, signs),
        naive_gradient(model, corpus, np.maximum(signs, 0), lam=0),
    )
    apart = together - alone
    seen = watch_gradients(model, corpus, signs, np.arange(24), Options(watch_gradients=2), seed=0, step=4)
    assert seen["grad_P"] == pytest.approx(float(alone.norm()), rel=1e-4)
    assert seen["grad_N"] == pytest.approx(float(apart.norm()) / LAM, rel=1e-4)
    assert seen["cosine"] == pytest.approx(float(torch.cosine_similarity(alone, apart, dim=0)), abs=1e-4)
    assert (
        watch_gradients(model, corpus, signs, np.arange(24), Options(watch_gradients=2), seed=0, step=5) == {}
    )
    remove_lora(model)
    adapters = []
    for every in (0, 1):
        options = Options(model="m", rank=4, batch_size=6, dropout=0.2, warmup=0.0, watch_gradients=every)
        train(model, corpus, signs, tmp_path / str(every), options, seed=5)
        remove_lora(model)
        adapters.append((tmp_path / str(every) / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_balanced_lambda_is_held_back_by_the_last_watched_step():
    options = Options(lambda_schedule="balanced", watch_gradients=2, t_max=2.0)
    assert scheduled_lambda(3, 10, options, []) == lambda_at(3, 10, 1e-5, 2.0), "nothing seen yet"
    log = [{"ratio": 0.9}, {"ratio": 0.5}, {"L_P": 1.0}, {"ratio": None}]  # the last watched step had no N
    assert scheduled_lambda(9, 10, options, log) == pytest.approx(BALANCE * 0.5)
    assert scheduled_lambda(1, 10, options, log) == lambda_at(1, 10, 1e-5, 2.0), "never more than the paper's"
    with pytest.raises(ValueError, match="balanced needs --watch-gradients"):
        Options(lambda_schedule="balanced")


def test_a_balanced_run_goes_on_the_same(tmp_path, monkeypatch, capsys):
    """lambda hangs on the log, which a stopped run reads again."""
    model, corpus, signs = setting(tmp_path / "m")
    options = Options(
        model="m",
        rank=4,
        batch_size=4,
        lr=1e-2,
        save_every=1,
        t_max=5.0,
        lambda_schedule="balanced",
        watch_gradients=2,
    )
    train(model, corpus, signs, tmp_path / "whole", options, seed=5)
    remove_lora(model)
    import forgetting

    original = forgetting.step_gradient

    def stop(net, corpus, signs, examples, lam, *rest):
        if lam > 0 and (tmp_path / "broken/metrics.jsonl").read_text().count("\n") == 4:
            raise KeyboardInterrupt
        return original(net, corpus, signs, examples, lam, *rest)

    monkeypatch.setattr(forgetting, "step_gradient", stop)
    with pytest.raises(KeyboardInterrupt):
        train(model, corpus, signs, tmp_path / "broken", options, seed=5)
    monkeypatch.undo()
    remove_lora(model)
    capsys.readouterr()
    train(model, corpus, signs, tmp_path / "broken", options, seed=5)
    assert f"{tmp_path / 'broken'}: continuing from step 4 of 6" in capsys.readouterr().out
    remove_lora(model)
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "broken")]
    lams = [
        json.loads(line)["lambda"] for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    ]
    assert adapters[0] == adapters[1] and any(
        lam < lambda_at(i, len(lams), 1e-5, 5.0) for i, lam in enumerate(lams)
    )


@pytest.mark.parametrize("side", [1, -1])
def test_a_side_without_tokens_is_logged_as_null(tmp_path, side):
    """It logged 0.0, which the warning about lambda then read as a loss."""
    model, corpus, signs = setting(tmp_path / "m")
    signs = np.where(signs == side, signs, 0).astype(np.int8)
    adapter_after(model, corpus, signs, tmp_path / "out", options_for(tmp_path))
    first, *later = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    if side == 1:
        assert all(line["L_P"] and line["L_N"] is None and line["lambda"] is None for line in [first, *later])
    else:
        assert all(line["L_P"] is None for line in [first, *later])
        assert first["lambda"] == 0 and first["L_N"] is None, "at lambda 0 N is not run"
        assert all(line["lambda"] and line["L_N"] for line in later)
