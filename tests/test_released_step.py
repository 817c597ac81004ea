"""--step released against an oracle of its own: padded pairs of rows, full logits, plain autograd."""

import json

import numpy as np
import pytest
import tiny
import torch
import torch.multiprocessing
from test_training import adapt, adapter_after, gradient_of, setting

from data import Tokenizer
from forgetting import RELEASED, Options, check_inputs, lambda_at, learning_rate_at, method_of, options_of
from forgetting import released_shares, select_data, train
from lora import add_lora, lora_parameters, remove_lora

LAM, BATCH = 0.2, 6


def uneven(folder):
    """23 rows in an order that is not theirs: a last pair of one row, a last step of two and a half pairs.

    Of the first pairs one has no P, one no N, and in one both rows are equally long.
    """
    model, corpus, signs = setting(folder)
    order = np.random.default_rng(1).permutation(23)
    lengths = corpus.lengths
    twins = [i for i in range(23) if (lengths[:23] == lengths[i]).sum() > 1]
    first = twins[0]
    second = next(i for i in twins[1:] if lengths[i] == lengths[first])
    rest = [i for i in order if i not in (first, second)]
    order = np.array([*rest[:4], first, second, *rest[4:]])
    signs[corpus.places(order[0:2])] *= signs[corpus.places(order[0:2])] < 0
    signs[corpus.places(order[2:4])] *= signs[corpus.places(order[2:4])] > 0
    ends = corpus.offsets[order + 1] - 1
    assert (signs[ends] != 0).sum() > 8 and lengths[order[4]] == lengths[order[5]]
    corpus = corpus.part(0, 23)
    corpus.file_order = order
    return model, corpus, signs[: len(corpus.tokens)]


def pair_loss(model, corpus, signs, pair, lam, loses_last=True) -> torch.Tensor:
    """A micro-batch of the released code: losses (2, L - 1), whose last column is in neither of two means."""
    longest = max(corpus.lengths[pair])
    losses = torch.zeros(len(pair), longest - 1)
    sides = torch.zeros(len(pair), longest - 1)
    for row, example in enumerate(pair):
        start, end = corpus.offsets[example], corpus.offsets[example + 1]
        tokens = torch.from_numpy(corpus.tokens[start:end]).long()
        logits = model.lm_head(model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32)))
        width = len(tokens) - 1
        losses[row, :width] = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        sides[row, :width] = torch.from_numpy(signs[start + 1 : end])
    if loses_last:
        losses, sides = losses[:, :-1], sides[:, :-1]
    total = torch.zeros(())
    if (sides > 0).any():
        total = total + losses[sides > 0].mean()
    if (sides < 0).any():
        total = total - lam * losses[sides < 0].mean()
    return total


def step_loss(model, corpus, signs, rows, lam, loses_last=True) -> torch.Tensor:
    """Gradients are averaged over as many micro-batches as a whole step has."""
    pairs = [rows[first : first + 2] for first in range(0, len(rows), 2)]
    return sum(pair_loss(model, corpus, signs, pair, lam, loses_last) for pair in pairs) / (BATCH // 2)


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("unlearns", [True, False])
def test_loss_and_gradient_of_a_step(tmp_path, step, unlearns):
    """Step 0 has the pairs without a side and the equal lengths, step 3 the row that is alone."""
    model, corpus, signs = uneven(tmp_path / "m")
    if not unlearns:
        signs = np.maximum(signs, 0)
    adapt(model)
    order = corpus.file_order
    rows = order[BATCH * step : BATCH * (step + 1)]
    loss = step_loss(model, corpus, signs, rows, LAM, loses_last=unlearns)
    gradient = torch.autograd.grad(loss, list(lora_parameters(model).values()))
    oracle = torch.cat([part.flatten() for part in gradient])
    divided = released_shares(signs, corpus, order, BATCH)
    for budget in (10_000, 60, 1):  # packs need not be pairs
        found = gradient_of(model, corpus, divided, budget, LAM, rows)
        assert torch.allclose(found[:-3], oracle, atol=1e-6)
        assert found[-3].item() == pytest.approx(loss.item(), abs=1e-5)
    plain = gradient_of(model, corpus, signs, 60, LAM, rows)
    assert not torch.allclose(plain[:-3], oracle, atol=1e-4), "equation 8 is another step"


def released_options(**changes) -> Options:
    given = {"model": "m", "rank": 4, "alpha": 8.0, "dropout": 0.0, "lr": 1e-2, "warmup": 0.1, "epochs": 3}
    return Options(**given | {"step": RELEASED, "batch_size": BATCH} | changes)


def oracle_training(model, corpus, signs, options) -> tuple[torch.Tensor, list[float]]:
    """The rows in the order of their files in every epoch; AdamW, rates and lambda as everywhere."""
    add_lora(model, 4, 8.0, dropout=0.0, generator=torch.Generator().manual_seed(5))
    parameters = list(lora_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    order = corpus.file_order
    steps = [order[first : first + BATCH] for first in range(0, len(order), BATCH)] * options.epochs
    losses = []
    for step, rows in enumerate(steps):
        lam = lambda_at(step, len(steps), options.t_min, options.t_max)
        optimizer.zero_grad()
        loss = step_loss(model, corpus, signs, rows, lam)
        loss.backward()
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, len(steps), options.lr, options.warmup)
        optimizer.step()
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    remove_lora(model)
    return flat, losses


def test_a_training_of_twelve_steps(tmp_path):
    """The adapter at the end, and what each step logs: the loss is the oracle's, L_P is over the step's tokens."""
    model, corpus, signs = uneven(tmp_path / "m")
    options = released_options(t_max=0.5)
    found = adapter_after(model, corpus, signs, tmp_path / "run", options)
    oracle, losses = oracle_training(model, corpus, signs, options)
    by_equation_8 = adapter_after(model, corpus, signs, tmp_path / "8", released_options(step="paper"))
    assert (found - oracle).norm() < 1e-4 * oracle.norm()
    assert (by_equation_8 - oracle).norm() > 1e-1 * oracle.norm()
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in log] == pytest.approx(losses, abs=1e-4) and len(log) == 12
    assert all(line["L_P"] > 1 for line in log)


def test_the_seed_moves_the_adapter_alone(tmp_path):
    """No shuffling: every seed and every epoch goes through the rows as their files have them."""
    model, corpus, signs = uneven(tmp_path / "m")
    logs = []
    for seed in (0, 1):
        train(model, corpus, signs, tmp_path / str(seed), released_options(lr=1e-9), seed)
        remove_lora(model)
        lines = (tmp_path / str(seed) / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["L_P"] for line in lines])
    assert logs[0] == pytest.approx(logs[1], abs=1e-5), "before it has learned anything"
    assert logs[0][:4] == pytest.approx(logs[0][4:8], abs=1e-5) and max(logs[0]) - min(logs[0]) > 0.01


def train_on_rank(rank: int, folder, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, corpus, signs = uneven(folder)
    train(model, corpus, signs, folder.parent / "two", released_options(t_max=0.5), seed=5)
    flat = torch.cat([parameter.detach().flatten() for parameter in lora_parameters(model).values()])
    torch.save(flat, f"{store}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_pairs_of_one(tmp_path):
    model, corpus, signs = uneven(tmp_path / "m")
    alone = adapter_after(model, corpus, signs, tmp_path / "one", released_options(t_max=0.5))
    (tmp_path / "two").mkdir()
    torch.multiprocessing.spawn(train_on_rank, (tmp_path / "m", str(tmp_path / "store")), nprocs=2)
    for rank in range(2):
        assert (torch.load(tmp_path / f"store.{rank}") - alone).norm() < 1e-4 * alone.norm()


@pytest.mark.parametrize("trusted", [True, False])
def test_the_order_of_the_files(tmp_path, trusted):
    """Of two files, one begun twice, with a row that is too short and one that comes again, D_ref drawn or given."""
    tiny.make_checkpoint(tmp_path / "m", "llama3")
    words = tiny.TEXT.split()
    rows = [{"prompt": f"row {i}", "completion": " ".join(words[i : i + 4])} for i in range(30)]
    (tmp_path / "b.jsonl").write_text(tiny.jsonl(rows[:12] + rows[3:5]))
    (tmp_path / "a.jsonl").write_text(tiny.jsonl([{"prompt": "long " * 40, "completion": "x"}, *rows[12:20]]))
    (tmp_path / "trusted.jsonl").write_text(tiny.jsonl(rows[20:]))
    data = [f"{tmp_path}/b.jsonl:4", f"{tmp_path}/b.jsonl", f"{tmp_path}/a.jsonl"]
    reference = [str(tmp_path / "trusted.jsonl")] if trusted else []
    options = Options(model=str(tmp_path / "m"), data=data, reference_data=reference, max_length=40)
    d_ref, d_train = select_data(options, Tokenizer(tmp_path / "m"))
    lines = {}
    for name, corpus in (("D_ref", d_ref), ("D_train", d_train)):
        places = [corpus.locations[i].removeprefix(f"{tmp_path}/") for i in corpus.file_order]
        lines[name] = [(file, int(line)) for file, line in (place.split(":") for place in places)]
        assert sorted(corpus.file_order) == list(range(len(corpus)))
    in_order = [("b.jsonl", line) for line in range(1, 13)] + [("a.jsonl", line) for line in range(2, 10)]
    if trusted:
        assert lines["D_ref"] == [("trusted.jsonl", line) for line in range(1, 11)]
    else:
        assert lines["D_ref"] == [place for place in in_order if place in lines["D_ref"]]
        assert len(lines["D_ref"]) == 3
    assert lines["D_train"] == [place for place in in_order if place not in lines["D_ref"]]
    assert d_train.locations != [d_train.locations[i] for i in d_train.file_order], "it is permuted"


def test_an_odd_batch_is_refused():
    with pytest.raises(ValueError, match="--step released takes rows in pairs: --batch-size 5 is odd"):
        released_options(batch_size=5)
    with pytest.raises(ValueError, match="forgetting:batch_size=3: --step released takes rows in pairs"):
        method_of("forgetting:batch_size=3", released_options())
    with pytest.raises(ValueError, match="--step theirs is not one of paper, released"):
        Options(step="theirs")
    assert method_of("full:step=released", Options())[1].step == RELEASED


def test_a_run_from_before_the_option_goes_on(tmp_path):
    """config.json then has none of the three: it was made by equation 8, without a power."""
    options = Options(model="m", data=["d"])
    names = options_of("training", "unlearning", "setting")
    inputs = {name: getattr(options, name) for name in names}
    younger = ("step", "learn_power", "unlearn_power")
    before = {name: value for name, value in inputs.items() if name not in younger}
    (tmp_path / "config.json").write_text(json.dumps({"inputs": before}))
    check_inputs(tmp_path, inputs)
    with pytest.raises(ValueError, match=r"step \(there 'paper', now 'released'\)"):
        check_inputs(tmp_path, inputs | {"step": RELEASED})
