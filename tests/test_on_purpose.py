"""Changes on purpose that passed the whole suite once: for each the rule it broke, with two values where one does not tell."""

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import get_data
import look
import numpy as np
import plain
import pytest
import tiny
import torch
from hub_server import Hub
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import eval as evaluation
import forgetting
from data import Tokenizer, encode_rows, read_rows, render_rows, split_rows
from lora import dropout_mask, load_adapter
from model import RMSNorm, load_model

WORDS = tiny.TEXT.split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint in `model`, 9 rows of D_ref and 12 of D_train."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("on_purpose")
    tiny.make_checkpoint(folder / "model", "llama2")
    rows = [
        {"instruction": f"Tell me {i}", "output": " ".join(WORDS[i : i + 2 + 3 * i % 7])} for i in range(21)
    ]
    for name, part in (("trusted", rows[:9]), ("rows", rows[9:])):
        (folder / f"{name}.jsonl").write_text(tiny.jsonl(part))
    return folder


def run(folder, out: str, *flags: str) -> None:
    """A small run of forgetting.py."""
    given = [
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "rows.jsonl"),
        "--out",
        str(folder / out),
    ]
    given += [
        "--reference-data",
        str(folder / "trusted.jsonl"),
        "--rank",
        "4",
        "--lr",
        "0.01",
        "--dropout",
        "0",
    ]
    forgetting.run(forgetting.parse_options([*given, "--device", "cpu", "--dtype", "float32", *flags]))


# -------------------------------------------------------------------------------------------- training


def test_a_small_reference_of_trusted_rows_takes_at_least_24_steps(folder):
    """9 examples are 2 steps of 5, and 3 of 4: 12 and 8 epochs."""
    for batch_size in ("5", "4"):
        run(folder, f"small-{batch_size}", "--methods", "reference", "--batch-size", batch_size)
        log = (folder / f"small-{batch_size}/reference/metrics.jsonl").read_text()
        assert len(log.splitlines()) == 24


def test_a_run_measures_what_scoring_knows_without_the_model(folder, monkeypatch):
    """L_P, L_N and held-out losses of base and reference: 11 % of a small run were computed twice.

    Figures are those that the models themselves give; scores in another dtype are of other weights.
    """
    (folder / "held.jsonl").write_text(
        tiny.jsonl([{"instruction": f"Say {word}", "output": word * 2} for word in WORDS[:4]])
    )
    original, labels = forgetting.response_losses, []

    def recorded(model, corpus, examples, token_budget, label):
        labels.append(label)
        return original(model, corpus, examples, token_budget, label)

    monkeypatch.setattr(forgetting, "response_losses", recorded)
    measured = ["--methods", "base", "reference", "full", "--eval-data", str(folder / "held.jsonl")]
    run(folder, "known", *measured)
    of_full = ["full/seed-0: L_P and L_N", "full/seed-0: held-out"]
    scoring = ["scores to example 12 of 12: theta'", "scores to example 12 of 12: theta"]
    trust = ["held-out: theta'", "held-out: theta"]
    assert labels == scoring + trust + of_full
    labels.clear()
    run(folder, "narrow", *measured, "--score-dtype", "bfloat16")
    of_both = [
        f"narrow/{name}: {what}" for name in ("reference", "base") for what in ("L_P and L_N", "held-out")
    ]
    assert labels == scoring + trust + of_both + of_full

    model = load_model(folder / "model")
    scored = look.read_run(folder / "known")
    (held_out,), _ = render_rows([read_rows([str(folder / "held.jsonl")])], Tokenizer(folder / "model"))
    held_out = encode_rows(held_out, Tokenizer(folder / "model"), 2048)
    suite = forgetting.EvalSuite(None, [], held_out, scored.corpus, scored.signs, 1024)
    for name in ("base", "reference"):
        if name == "reference":
            load_adapter(model, folder / "known/reference")
        asked = forgetting.measure(model, suite, folder / "asked" / name)
        for file in ("results.json", "held-out.jsonl"):
            there = (folder / "known" / name / file).read_text()
            assert there == (folder / "asked" / name / file).read_text()
        assert asked["L_P"] and asked["L_N"] and asked["held-out"]


def test_every_epoch_of_every_seed_has_its_own_order():
    """With seed + epoch for (seed, epoch), epoch 1 of seed 0 was epoch 0 of seed 1."""
    steps_per_epoch = math.ceil(30 / 7)
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
            order = np.concatenate([forgetting.examples_of(step, 30, 7, seed) for step in steps])
            assert sorted(order) == list(range(30))
            orders[seed, epoch] = tuple(order)
    assert len(set(orders.values())) == 9


def test_ranks_steps_and_seeds_drop_other_inputs(monkeypatch):
    """Dropout is drawn from (seed, step, rank): a mask comes again for the same three and for no others."""
    masks = {}
    for seed, step, rank in [(7, 3, 0), (7, 3, 1), (7, 4, 0), (8, 3, 0), (7, 3, 2)]:
        monkeypatch.setattr(forgetting, "rank_and_world", lambda: (rank, 3))
        for _ in range(2):
            forgetting.seed_dropout(seed, step)
            masks.setdefault((seed, step, rank), set()).add(
                bytes(dropout_mask(torch.ones(400), 0.5).tolist())
            )
    assert all(len(drawn) == 1 for drawn in masks.values())
    assert len(set.union(*masks.values())) == len(masks)


def test_a_clipped_training_is_a_plain_training_with_a_clip(folder):
    """A limit that every step exceeds, but not equally: AdamW forgives a factor only if all steps have the same one."""
    limit, settings = (
        0.5,
        {"rank": 4, "alpha": 16.0, "lr": 0.01, "batch_size": 3, "epochs": 2, "t_min": 0.0, "t_max": 0.0},
    )
    run(
        folder,
        "clipped",
        "--methods",
        "full",
        "--batch-size",
        "3",
        "--epochs",
        "2",
        "--max-grad-norm",
        str(limit),
    )
    of_run = load_file(folder / "clipped/full/seed-0/adapter_model.safetensors")
    norms = [
        json.loads(line)["grad_norm"]
        for line in (folder / "clipped/full/seed-0/metrics.jsonl").read_text().splitlines()
    ]
    assert min(norms) > limit and max(norms) > 1.2 * min(norms)

    files = [str(folder / "rows.jsonl")], [str(folder / "trusted.jsonl")]
    tokenizer = Tokenizer(folder / "model")
    (rows, trusted), _ = render_rows(list(map(read_rows, files)), tokenizer)
    examples = plain.sequences_of(encode_rows(split_rows(rows, trusted, None, None)[1], tokenizer))
    everything = [torch.ones(int(response.sum()), dtype=torch.bool) for _, response in examples]

    def clip(optimizer, *_):
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], limit)

    for clipped in (True, False):
        model = load_model(folder / "model")
        hook = register_optimizer_step_pre_hook(clip) if clipped else None
        plain.train(
            model, examples, everything, [~mask for mask in everything], 0, SimpleNamespace(**settings)
        )
        if hook:
            hook.remove()
        plain.save_adapter(model, folder / "by_hand", "tiny")
        by_hand = load_file(folder / "by_hand/adapter_model.safetensors")
        largest = max(float((by_hand[name] - of_run[name]).abs().max()) for name in of_run)
        assert largest < 1e-5 if clipped else largest > 1e-3


def test_a_method_that_does_not_unlearn_reads_no_forget_rate():
    """--forget-rate 0.2 was held against the rho of ignoring:rho=0.9, which unlearns nothing."""
    options = forgetting.Options(methods=["ignoring:rho=0.9", "forgetting"], forget_rate=0.2)
    method, of_ignoring = forgetting.method_of("ignoring:rho=0.9", options)
    assert of_ignoring.forget_rate is None and of_ignoring.rho == 0.9
    assert forgetting.method_of("forgetting", options)[1].forget_rate == 0.2
    with pytest.raises(ValueError, match="forgetting:rho=0.9: forget rate 0.2 is not allowed"):
        forgetting.method_of("forgetting:rho=0.9", options)
    corpus = SimpleNamespace(tokens=np.zeros(10), response=np.ones(10, bool))
    signs = forgetting.choose_signs(method, np.arange(10.0), corpus, of_ignoring, 0)
    assert signs.tolist() == [0] + [1] * 9


# ------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_the_norm_adds_its_own_eps(eps):
    """Against the formula, for a row so small that eps decides; torch's own default, 1.2e-7, is neither."""
    norm, x = RMSNorm(8, eps), 1e-3 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    norm.weight.data.uniform_(0.5, 1.5)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    assert torch.allclose(norm(x), expected, rtol=1e-5, atol=0)
    norm.weight.requires_grad_(False)  # as in a training with an adapter
    assert torch.allclose(norm(x), expected, rtol=1e-5, atol=0)


def test_every_norm_takes_its_eps_from_the_config(tmp_path):
    config = json.loads((tiny.make_checkpoint(tmp_path, "llama3") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    norms = [module for module in load_model(tmp_path).modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 5 and all(norm.eps == 0.25 for norm in norms)


# ------------------------------------------------------------------------------------------ evaluation


def test_the_figures_of_tydiqa_are_those_of_languages(folder):
    """Four documents of one language and two of another: both languages count the same, in the mean and in its error."""
    scores = {"xx-0": 1.0, "xx-1": 0.0, "xx-2": 0.0, "xx-3": 0.0, "yy-0": 1.0, "yy-1": 0.5}
    task = replace(
        evaluation.TASKS["tydiqa"],
        requests=lambda row, _: [evaluation.Request("Tell me", " 42")],
        score=lambda row, _: {"prediction": "", "target": "", "metrics": {"f1": scores[row["id"]]}},
    )
    rows = [{"id": name, "_source": f"rows:{i}", "_doc": i} for i, name in enumerate(scores)]
    model, tokenizer = load_model(folder / "model"), Tokenizer(folder / "model")
    documents = evaluation.Documents(
        "tydiqa", task, rows, [task.requests(row, tokenizer) for row in rows], {}
    )
    result = evaluation.evaluate(model, tokenizer, [documents])[0]["tydiqa"]
    languages = np.array([1.0, 0.0, 0.0, 0.0]), np.array([1.0, 0.5])
    errors = [values.std(ddof=1) / math.sqrt(len(values)) for values in languages]
    assert result["f1"] == pytest.approx((0.25 + 0.75) / 2) != np.mean(list(scores.values()))
    assert result["f1_stderr"] == pytest.approx(math.hypot(*errors) / 2)


def test_a_long_prompt_loses_its_beginning(folder):
    """The end of a prompt is the question: 128 positions, of which the reply's 8 tokens are kept free."""
    model, tokenizer = load_model(folder / "model"), Tokenizer(folder / "model")
    prompt = np.random.default_rng(3).integers(300, tiny.VOCAB, 200).tolist()
    whole, end, beginning = evaluation.generate(model, tokenizer, [prompt, prompt[-120:], prompt[:120]], 8)
    assert whole == end != beginning


def test_a_long_context_loses_its_beginning(folder):
    """128 inputs are left for 200 tokens of context and 3 of continuation, the last of which is no input."""
    model = load_model(folder / "model")
    context, continuation = np.split(np.random.default_rng(4).integers(300, tiny.VOCAB, 203), [200])
    contexts = [context, context[-126:], context[-125:], context[:126]]
    pairs = [(ids.tolist(), continuation.tolist()) for ids in contexts]
    whole, end, *others = (answer.loglikelihood for answer in evaluation.loglikelihoods(model, pairs))
    assert whole == pytest.approx(end, abs=1e-5) and all(abs(whole - other) > 1e-3 for other in others)


def test_the_first_of_several_eos_ids_counts(folder):
    """config.json may list several, in any order; the tokenizer's own file then names none."""
    for ids in ([2, 1], [1, 2]):
        (folder / "eos").mkdir(exist_ok=True)
        (folder / "eos/tokenizer.json").write_bytes((folder / "model/tokenizer.json").read_bytes())
        (folder / "eos/config.json").write_text(json.dumps({"eos_token_id": ids}))
        tokenizer = Tokenizer(folder / "eos")
        assert tokenizer.eos_id == ids[0] and tokenizer.eos == ["<unk>", "<s>", "</s>"][ids[0]]


# ---------------------------------------------------------------------------------------- public rows


def test_a_server_that_answers_a_range_with_the_whole_file():
    """The first answer breaks off; the second is whole, status 200, and must not be put behind the first half."""
    text = "".join(f"{i}\n" for i in range(1000))
    with Hub({}, {"/rows": text.encode()}, tokens=(), cut={"/rows"}, whole={"/rows"}) as hub:
        assert get_data.fetch_text(f"{hub.endpoint}/rows") == text
    ranges = [headers.get("range") for _, _, headers in hub.requests]
    assert ranges == [None, f"bytes={len(text) // 2}-"]


def test_a_language_of_exactly_100_rows_is_taken_as_it_is():
    """It is not drawn from: it keeps its order, and the next language's draw is the first that is made."""

    def article(language: str, count: int) -> dict:
        answers = [{"text": "x", "answer_start": 0}]
        questions = [{"id": f"{language}-{i}", "question": "?", "answers": answers} for i in range(count)]
        return {"paragraphs": [{"context": "x", "qas": questions}]}

    dev = json.dumps({"data": [article("aa", 100), article("bb", 101), article("cc", 99)]})
    drawn = [row["id"] for row in get_data.convert_tydiqa(dev)]
    sample = random.Random(42).sample([f"bb-{i}" for i in range(101)], 100)
    assert drawn == [f"aa-{i}" for i in range(100)] + sample + [f"cc-{i}" for i in range(99)]
