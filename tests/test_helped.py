"""Did it help? What a run says before stage 4 and under its table, and what must not wedge a run folder."""

import dataclasses
import json
import os
import re
import signal
import subprocess

import numpy as np
import pytest
import tiny
import torch
from test_training import ROWS, adapt, setting

import forgetting
from data import Corpus, Tokenizer, progress, write_rows
from forgetting import (
    EvalSuite,
    Options,
    append_log,
    both_losses,
    describe_plan,
    describe_rows,
    describe_time,
    describe_trust,
    finished,
    holm,
    is_shown,
    losses_by_row,
    method_of,
)
from forgetting import (
    open_log,
    paired_difference,
    paired_losses,
    pairs_to_compare,
    read_log,
    read_scores,
    reference_options,
    save_arrays,
    sequence_means,
    student_t_quantile,
    student_t_tail,
    suite_losses,
    train,
    trust_gap,
    unfinished,
    warnings_of,
)
from lora import lora_parameters, remove_lora


def test_the_plan_counts_steps_and_says_where_they_teach_nothing(tmp_path):
    _, corpus, _ = setting(tmp_path / "m")  # 24 examples
    options = Options(batch_size=5, epochs=3, methods=["full", "forgetting:lr=0.1"])
    plans = {name: method_of(name, options) for name in options.methods}
    text = describe_plan(options, plans, corpus, corpus, seeds=2)
    tokens = 3 * len(corpus.tokens)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n") if line.startswith("|")
    ][2:]
    assert rows == [
        ["the reference", "1", "15", "0.0001", f"{tokens:,}"],
        ["full", "2", "15", "0.0001", f"{2 * tokens:,}"],
        ["forgetting:lr=0.1", "2", "15", "0.1", f"{2 * tokens:,}"],
    ]
    assert text.count("note:") == 1 and "more --epochs, or a higher --lr" in text
    one = Options(batch_size=24, lr=1.0)
    assert "a single step has rate 0" in describe_plan(one, {}, corpus, corpus, 1)
    assert "note" not in describe_plan(Options(batch_size=24, lr=1.0, warmup=0.0), {}, corpus, corpus, 1)


def test_the_reference_on_trusted_rows_gets_24_steps(capsys):
    """After 8 steps, what README's quick start gave, its Q told bad rows no better than chance (row AUC .45 to .64 on
    three splits; .82 to .92 after 24). A D_ref drawn from --data keeps the paper's pass."""
    trusted, drawn_rows = Options(reference_data=["t.jsonl"], batch_size=10), Options(batch_size=10)
    assert reference_options(trusted, 35).epochs == 6 and "6 epochs, 24 steps" in capsys.readouterr().out
    assert reference_options(trusted, 300).epochs == 1 and reference_options(trusted, 80).epochs == 3
    assert reference_options(drawn_rows, 35).epochs == 2 and reference_options(drawn_rows, 300).epochs == 1
    asked = Options(reference_data=["t.jsonl"], batch_size=10, reference_epochs=1, reference_lr=1e-3)
    assert reference_options(asked, 35).epochs == 1 and reference_options(asked, 35).lr == 1e-3


def test_the_time_to_come_is_that_of_the_reference(tmp_path):
    _, corpus, _ = setting(tmp_path / "m")
    trained = {name: method_of(name, Options(epochs=3)) for name in ("full", "forgetting:epochs=1")}
    speed = len(corpus.tokens) / 60  # a pass a minute
    log = [{"tokens/s": speed / 9}, {"tokens/s": speed}, {"tokens/s": speed}]
    left = unfinished(trained, [0, 1], tmp_path)
    assert describe_time(log, left, corpus).startswith("the trainings to come take about 8 minutes")
    (tmp_path / "full/seed-0").mkdir(parents=True)
    (tmp_path / "full/seed-0/adapter_model.safetensors").touch()
    assert "about 5 minutes" in describe_time(log, unfinished(trained, [0, 1], tmp_path), corpus)
    assert "no training" in describe_time([], left, corpus) and "no training" in describe_time(
        log, [], corpus
    )
    assert "less than a minute" in describe_time([{"tokens/s": speed * 99}], left, corpus)


def test_the_trust_gap_compares_rows_of_the_same_length():
    """The plain difference of means measured the mixture: with the same theta' it was +.84 to +1.79 by the length of
    the trusted rows. Here Q falls with the length, and the trusted rows are as D_train's, but short."""
    rng = np.random.default_rng(3)

    def rows(count, shortest, longest, shift):
        tokens = rng.integers(shortest, longest, count)
        return 2 - 0.4 * np.log(tokens) + shift + rng.normal(0, 0.2, count), tokens

    d_train = rows(400, 2, 100, 0.0)
    for shortest, longest in ((2, 6), (2, 100), (50, 100)):
        gap, low, high = trust_gap(rows(60, shortest, longest, 0.0), d_train, 0.5)
        assert low < 0 < high and abs(gap) < 0.2
        gap, low, high = trust_gap(rows(60, shortest, longest, 0.3), d_train, 0.5)
        assert 0 < low < gap < high and gap == pytest.approx(0.6, abs=0.2)


def test_the_interval_of_the_trust_gap_holds():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        d_train = rng.normal(0, 1, 200), rng.integers(5, 50, 200)
        _, low, high = trust_gap((rng.normal(0, 1, 20), rng.integers(5, 50, 20)), d_train, 1.0)
        held += low <= 0 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_the_trust_gap_says_what_can_be_told(tmp_path):
    model, corpus, _ = setting(tmp_path / "m")
    adapt(model)
    held_out = corpus.part(3, 15)
    options = Options(reference_data=["trusted.jsonl"], eval_data=["held.jsonl"])
    base_loss, ref_loss = both_losses(model, held_out, 1000, "x")
    means, tokens = sequence_means(base_loss - ref_loss, held_out)
    noise = np.random.default_rng(0).normal(0, means.std(), len(corpus.tokens))
    for shift, words in (
        (-9.0, "has learned what rows you trust have"),
        (9.0, "warning: Q is lower"),
        (0.0, "cannot be told"),
    ):
        quality = np.where(corpus.response, means.mean() + noise + shift * means.std(), np.nan).astype(
            np.float32
        )
        text = describe_trust(held_out, base_loss - ref_loss, quality, corpus, options)
        gap, low, high = trust_gap(
            (means, tokens), sequence_means(quality, corpus), float(np.nanstd(quality))
        )
        assert f"trust gap {gap:+.2f} [{low:+.2f}, {high:+.2f}] deviations of Q: Q of the 12 rows" in text
        assert words in text and text.startswith("D_ref is --reference-data\n")
    assert text.endswith("More trusted rows in --eval-data, or more --reference-epochs")
    drawn = describe_trust(held_out, base_loss - ref_loss, quality, corpus, Options(eval_data=["held.jsonl"]))
    assert drawn.endswith("or rows you trust as --reference-data"), "more passes over noisy rows do harm"
    nothing = np.zeros(0, np.float32)
    text = describe_trust(corpus.part(0, 0), nothing, quality, corpus, Options())
    assert "D_ref was drawn from --data" in text and "no --eval-data" in text


def test_the_rows_to_look_at_come_in_both_orders_with_their_questions(tmp_path):
    """On real rows theta's own loss found bad rows better than mean Q did (row AUC .93 against .65)."""
    _, corpus, _ = setting(tmp_path / "m")
    quality = np.where(corpus.response, 1.0, np.nan)
    losses = quality.copy()
    for values, example, value in (
        (quality, 7, -3.0),
        (quality, 2, -1.0),
        (losses, 4, 9.0),
        (losses, 1, 5.0),
    ):
        span = slice(*corpus.offsets[example : example + 2])
        values[span] = np.where(corpus.response[span], value, np.nan)
    text = describe_rows(quality, losses, corpus, Tokenizer(tmp_path / "m"), count=2)
    of_lowest_q, of_highest_loss = text.split("and of highest loss")
    for part, figures in (
        (of_lowest_q, {7: "Q -3.00", 2: "Q -1.00"}),
        (of_highest_loss, {4: "loss 9.00", 1: "loss 5.00"}),
    ):
        for line, (example, figure) in zip(part.split("\n")[1:3], figures.items(), strict=True):
            assert line.endswith(figure) and f"Tell me {example} of" in line
            assert ROWS[example]["output"][:20] in line


def test_ignoring_loss_keeps_what_theta_finds_easiest(tmp_path):
    """Through run(): the control asks no reference."""
    tiny.make_checkpoint(tmp_path / "m", "llama3")
    write_rows(ROWS, tmp_path / "rows.jsonl")
    options = Options(
        model=str(tmp_path / "m"),
        data=[str(tmp_path / "rows.jsonl")],
        out=str(tmp_path / "run"),
        rank=2,
        lr=1e-2,
        methods=["ignoring-loss", "full"],
        dropout=0.0,
        batch_size=6,
    )
    seen = {}
    original = forgetting.train

    def watch(model, corpus, signs, folder, *rest, **named):
        seen[folder.parent.name] = signs
        return original(model, corpus, signs, folder, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forgetting, "train", watch)
        forgetting.run(options)
    base_loss, _, _ = read_scores(tmp_path / "run" / "scores.safetensors")
    judged = np.isfinite(base_loss)
    assert (
        seen["ignoring-loss"][judged]
        == (base_loss[judged] <= np.quantile(base_loss[judged], 0.5, method="lower"))
    ).all()
    lines = [
        json.loads(line)
        for line in (tmp_path / "run/ignoring-loss/seed-0/metrics.jsonl").read_text().splitlines()
    ]
    assert {line["lambda"] for line in lines} == {None}, "nothing is unlearned"
    assert not list((tmp_path / "run").rglob("samples.jsonl")), "there are no tasks"


# ------------------------------------------------------------------------------------------------ differences


def drawn(rng, rows: int, seeds: int, seed_noise: float, heavy: bool) -> np.ndarray:
    """(S, R) differences without any true one: a row's own, a seed's own, and noise; rows of 1 have deviation 1.

    Heavy: lengths are log-normal, and the shorter a row the noisier its mean loss.
    """
    lengths = np.exp(rng.normal(3.5, 1.0, rows)) if heavy else np.ones(rows)
    of_rows = rng.normal(0, 1, rows) * np.sqrt(lengths.mean() / lengths)
    return of_rows + rng.normal(0, seed_noise, (seeds, 1)) + rng.normal(0, 0.3, (seeds, rows))


SETTINGS = [(1, 0.0), (2, 0.0), (2, 0.2), (2, 0.5), (3, 0.2), (3, 0.5), (5, 0.2), (5, 0.5)]


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("rows", [20, 50, 200])
def test_an_interval_of_95_percent_holds_95_percent(rows, heavy):
    """At 14fe823 it held 81 % of heavy lengths with one seed, and 80 % over seeds that differ by a fifth of the rows.

    Seeds 1 (rows only), 2, 3, 5; 150 draws each, so a single coverage of .95 is seen within .90 and .99. Two parts that
    are added as squares promise a little too much where neither is small: hence .98 above.
    """
    rng = np.random.default_rng(rows)
    coverage = []
    for seeds, seed_noise in SETTINGS:
        held = 0
        for _ in range(150):
            low, high = paired_difference(drawn(rng, rows, seeds, seed_noise, heavy), draws=300).interval()
            held += low <= 0 <= high
        coverage.append(held / 150)
    assert min(coverage) >= 0.9 and 0.93 <= np.mean(coverage) <= 0.98, coverage


@pytest.mark.parametrize("rows, seeds, seed_noise", [(50, 1, 0.0), (200, 2, 0.2), (200, 3, 0.2)])
def test_a_family_of_verdicts_is_wrong_in_five_percent(rows, seeds, seed_noise):
    """Six methods that do not differ, nine pairs. At 14fe823 something false was said in 20 to 62 % of such runs."""
    rng = np.random.default_rng(seeds)
    wrong = 0
    for _ in range(80):
        own = rng.normal(0, 1, rows)
        methods = [own + drawn(rng, rows, seeds, seed_noise, heavy=False) / 2 for _ in range(6)]
        pairs = [(i, 0) for i in range(1, 6)] + [(i, 1) for i in range(2, 6)]
        p_values = [paired_difference(methods[i] - methods[j], draws=200).p_value() for i, j in pairs]
        wrong += any(holm(p_values))
    assert wrong / 80 <= 0.11  # .05, and two and a half standard errors


def test_a_difference_that_is_there_is_told():
    """Power: half a deviation of the rows is seen with 50 rows and one seed, or three seeds that agree."""
    rng = np.random.default_rng(0)
    one = [
        paired_difference(0.5 + drawn(rng, 50, 1, 0.0, False), draws=200).p_value() < 0.05 for _ in range(40)
    ]
    three = [
        paired_difference(0.5 + drawn(rng, 50, 3, 0.05, False), draws=200).p_value() < 0.05 for _ in range(40)
    ]
    assert np.mean(one) > 0.8 and np.mean(three) > 0.6


def test_student_t_and_holm_are_those_of_the_tables():
    """Quantiles of printed tables; Holm's own example of order: the first that stands keeps the rest."""
    table = {(0.05, 1): 12.706, (0.05, 2): 4.303, (0.01, 5): 4.032, (0.05, 19): 2.093, (0.05, 199): 1.972}
    for (alpha, df), value in table.items():
        assert student_t_quantile(alpha, df) == pytest.approx(value, abs=5e-4)
        assert student_t_tail(value, df) == pytest.approx(alpha, rel=1e-3)
    assert holm([0.04, 0.01, 0.02, 0.9]) == [False, True, False, False]  # .01 < .05/4, .02 > .05/3
    assert holm([0.001, 0.02, 0.012]) == [True, True, True] and holm([]) == []


def test_rows_that_are_all_alike_and_a_single_row():
    same = paired_difference(np.full((1, 10), -0.2))
    assert same.interval() == (-0.2, -0.2) and same.p_value() < 0.001
    two_seeds = paired_difference(np.array([[0.1] * 10, [0.3] * 10]))
    low, high = two_seeds.interval()
    assert (low, high) == pytest.approx((0.2 - 12.706 * 0.1, 0.2 + 12.706 * 0.1), rel=1e-3), (
        "seeds alone vary"
    )
    with pytest.raises(ValueError, match="two held-out rows at least, there is 1"):
        paired_difference(np.zeros((2, 1)))


def write_run(folder, losses: dict[str, dict[int, list[float]]]) -> dict:
    """A run folder with held-out.jsonl and results.json of each method and seed, as measure() leaves them."""
    results = {}
    for method, seeds in losses.items():
        for seed, values in seeds.items():
            rows = [
                {"row": f"h.jsonl:{i + 1}", "loss": value, "tokens": 10} for i, value in enumerate(values)
            ]
            place = folder / method if method in ("base", "reference") else folder / method / f"seed-{seed}"
            figures = {"identity": {"held-out": "x"}, "tasks": {}, "held-out": float(np.mean(values))}
            write_rows(rows, place / "held-out.jsonl")
            (place / "results.json").write_text(json.dumps(figures))
            results.setdefault(method, {})[seed] = figures
    return results


def test_a_run_says_what_can_be_told_apart(tmp_path):
    rng = np.random.default_rng(0)
    full = rng.normal(2, 0.3, 40)
    better, like = full - 0.2 + rng.normal(0, 0.1, 40), full - 0.2 + rng.normal(0, 0.1, 40)
    results = write_run(
        tmp_path,
        {
            "base": {0: full + 0.5},
            "reference": {0: full + 0.9},
            "full": {0: full, 1: full},
            "ignoring": {0: better, 1: better},
            "forgetting": {1: like},
        },
    )
    text = paired_losses(tmp_path, results, trusted=True)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n") if " - " in line]
    cells = {line[0]: line[1:] for line in lines}
    assert [line[0] for line in lines[:1]] in (["ignoring - base"], ["forgetting - base"]), "the best first"
    interval, worth, better_rows, seeds, verdict = cells["ignoring - full"]
    assert interval.startswith(f"{np.mean(better - full):+.3f} [") and seeds == "2" and verdict == "better"
    assert better_rows == f"{(better < full).sum()} of 40"
    assert worth == f"{np.mean(full - better) / 0.5:+.0%}"
    assert cells["forgetting - ignoring"][3:] == ["1", "cannot be told"]
    assert cells["reference - full"][-1] == "worse"
    assert "; all 7 verdicts together are wrong in at most 5 % of such runs (Holm, of 10 pairs)" in text
    assert "two seeds tell little of a third" in text
    assert re.search(r"\nLowest: (ignoring|forgetting); better than .*full.*\.$", text)
    assert warnings_of(results) == [
        "note: held-out loss of reference, "
        f"{results['reference'][0]['held-out']:.3f}, is above base's, "
        f"{results['base'][0]['held-out']:.3f} (whether that can be told, the verdicts say)"
    ]
    assert paired_losses(tmp_path, {"full": results["full"]}, trusted=True) == ""


def test_a_whole_report_is_wrong_in_five_percent(tmp_path, monkeypatch):
    """Nothing differs from anything. The best training is chosen in the same losses: at 00fd524 its pairs with base
    and reference were tested as if somebody had named them before.

    That is too little to be seen in the share of 60 reports, so the same reports are judged that way, too: one more of
    them is wrong.
    """
    p_values = []
    monkeypatch.setattr(forgetting, "holm", lambda found: p_values.append(found) or holm(found))
    rng = np.random.default_rng(7)
    names = ("base", "reference", "full", "ignoring", "ignoring-loss", "forgetting", "forgetting-sequence")
    wrong = wrong_as_before = 0
    for number in range(60):
        own = rng.normal(2, 0.3, 50)
        losses = {name: {0: own + rng.normal(0, 0.1, 50)} for name in names}
        results = write_run(tmp_path / str(number), losses)
        text = paired_losses(tmp_path / str(number), results, trusted=True)
        wrong += bool(re.search(r"\| (better|worse) +\|", text))
        means = losses_by_row(tmp_path / str(number), results)
        pairs = zip(pairs_to_compare(results), p_values[-1], strict=True)
        wrong_as_before += any(holm([p for pair, p in pairs if is_shown(pair, means)]))
    assert wrong / 60 <= 0.12  # .05, and two and a half standard errors
    assert wrong < wrong_as_before


def test_a_warning_says_what_mends_it():
    """Only of full and forgetting, which learn forgetting's P: ignoring, and another rho, learn other tokens."""
    l_p = {"base": 2.0, "full": 2.1, "full:lr=1": 2.1, "forgetting": 2.1, "forgetting:t_max=9": 2.1}
    l_p |= {"forgetting:rho=0.5": 2.1, "forgetting-wga": 2.1, "ignoring": 2.1, "reference": 2.1}
    harm = "L_P of {}, 2.100, is above base's, 2.000: it harms what it is to learn; "
    expected = {
        "full": "a lower --lr",
        "full:lr=1": "a lower --lr",
        "forgetting": "a lower --t-max or --lr",
        "forgetting:t_max=9": "a lower --t-max or --lr",
    }
    results = {name: {0: {"L_P": value}} for name, value in l_p.items()}
    found = [f"warning: {harm.format(name)}{mend}" for name, mend in expected.items()]
    assert warnings_of(results) == found
    results["full"][1] = {"L_P": 1.8}  # the mean over the seeds counts, and what was measured
    results["forgetting"][0] = {"L_P": None}
    assert warnings_of(results) == [found[1], found[3]]
    del results["base"]
    assert warnings_of(results) == []


@pytest.mark.parametrize("lowest", ["reference", "base", "full"])
def test_the_last_sentence_names_what_is_best(tmp_path, lowest):
    rng = np.random.default_rng(0)
    own = rng.normal(2, 0.3, 60)
    names = ("base", "reference", "full", "ignoring")
    losses = {name: {0: own + rng.normal(0, 0.05, 60) - 0.5 * (name == lowest)} for name in names}
    results = write_run(tmp_path, losses)
    text = paired_losses(tmp_path, results, trusted=True)
    assert "the verdicts are about this seed, another may differ" in text
    sentence = {
        "reference": "The trusted rows alone are best here: leave D_train out.",
        "base": "No training at all is best here.",
        "full": "Nothing that leaves tokens out or unlearns them helps here.",
    }
    assert f"\nLowest: {lowest}; better than " in text and text.endswith(sentence[lowest])
    drawn_from_data = paired_losses(tmp_path, results, trusted=False)
    sentence["reference"] = "D_ref alone, fewer of the same rows, is best here."
    assert drawn_from_data.endswith(sentence[lowest]), "nobody has said that rows of --data can be trusted"


def test_the_last_sentence_says_no_more_than_its_table(tmp_path):
    """One pair that could not be told hid those that could; without a method that leaves tokens out, or without
    full, something was said about them."""
    rng = np.random.default_rng(0)
    own = rng.normal(2, 0.3, 60)
    losses = {name: {0: own + rng.normal(0, 0.05, 60)} for name in ("base", "reference", "full", "ignoring")}
    losses["base"] = {0: own + 0.5}
    losses["ignoring"] = {0: own + 0.5}
    of_rows = rng.normal(0, 0.05, 60)
    losses["full"] = {0: losses["reference"][0] + of_rows - of_rows.mean() - 0.001}
    text = paired_losses(tmp_path / "a", write_run(tmp_path / "a", losses), trusted=True)
    assert text.endswith("Lowest: full; better than base, ignoring; from reference it cannot be told.")
    two = {name: {0: own + shift} for name, shift in (("base", 0.5), ("full", 0.0))}
    text = paired_losses(tmp_path / "b", write_run(tmp_path / "b", two), trusted=True)
    assert text.endswith("Lowest: full; better than base.") and "the verdict is wrong in" in text
    alone = {name: {0: own + shift} for name, shift in (("base", 0.5), ("reference", 0.0))}
    text = paired_losses(tmp_path / "c", write_run(tmp_path / "c", alone), trusted=True)
    assert text.endswith("without full in --methods nothing says whether leaving tokens out helped.")


@pytest.mark.parametrize(
    "other, is_tested",
    [("full:lr=0.001", False), ("dft", False), ("dft:lr=0.001", False)]
    + [("forgetting:lr=0.001", True), ("full-P", True), ("oracle", True)],
)
def test_nothing_helps_is_said_where_something_was_tried(tmp_path, other, is_tested):
    """Every name but three counted: full at two rates said that nothing which leaves tokens out helps."""
    own = np.random.default_rng(0).normal(2, 0.3, 60)
    losses = {name: {0: own + shift} for name, shift in (("base", 0.5), ("full", 0.0), (other, 0.2))}
    text = paired_losses(tmp_path, write_run(tmp_path, losses), trusted=True)
    assert f"Lowest: full; better than base, {other}." in text
    assert text.endswith("Nothing that leaves tokens out or unlearns them helps here.") == is_tested


def test_the_last_sentence_where_methods_have_other_seeds(tmp_path):
    """A pair is compared on the seeds of both, "lowest" is a mean over all: a lost pair was called undecided, and one
    that nobody compared passed for beaten."""
    own = np.random.default_rng(0).normal(2, 0.3, 60)
    losses = {
        "base": {0: own + 2},
        "full": {0: own, 1: own + 1, 2: own + 1},
        "forgetting": {0: own + 0.3},
        "ignoring": {5: own + 3},
    }
    text = paired_losses(tmp_path, write_run(tmp_path, losses), trusted=True)
    wanted = "worse than full on the seeds of both; without a seed in common with ignoring."
    assert text.endswith(f"Lowest: forgetting; better than base; {wanted}")
    losses["forgetting"] = {0: own + 2.9}
    text = paired_losses(tmp_path / "b", write_run(tmp_path / "b", losses), trusted=True)
    assert text.endswith("without a seed in common with ignoring.") and "Nothing that leaves" not in text


def test_a_copy_of_a_variant_is_no_row():
    """ "forgetting:rho=0.5.bak" was a line of the table, and counted in Holm's family."""
    assert all(map(forgetting.is_row, ("full", "oracle:lr=0.001", "forgetting:rho=0.5,t_max=1", "reference")))
    copies = ("forgetting:rho=0.5.bak", "forgetting:rho=0.5 copy", "base:lr=1", "full:rho=0.5", "old")
    assert not any(map(forgetting.is_row, copies))


def test_a_limit_is_said_of_its_tasks():
    """Tasks that an earlier command measured with another --limit stand in the same table."""
    tasks = {"mc": {}, "qa": {}, "boolq": {}}
    identity = {"mc": {"limit": 2}, "qa": {"limit": None}, "boolq": {"limit": 2}}
    notes = forgetting.describe_limits({"tasks": tasks, "identity": identity})
    assert notes == ["mc, boolq: only the first 2 documents of each task (--limit)"]


def test_figures_do_not_vouch_for_files_of_another_measurement(tmp_path, monkeypatch):
    """A full disk between held-out.jsonl and results.json left old figures beside new rows, and nothing measured again."""
    model, corpus, _ = setting(tmp_path / "m")
    suite = EvalSuite(None, [], corpus.part(0, 4), corpus, None, 4000)
    forgetting.measure(model, suite, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(forgetting, "write_text", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            forgetting.measure(
                model, dataclasses.replace(suite, held_out=corpus.part(4, 8)), tmp_path / "run"
            )
    again = forgetting.measure(model, suite, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/held-out.jsonl").read_text().splitlines()]
    assert again["held-out"] == pytest.approx(forgetting.mean_loss(rows))


def test_all_held_out_rows_count_not_the_first_512(tmp_path):
    """At fe070b7 held-out loss was that of 512 rows, in silence."""
    model, corpus, _ = setting(tmp_path / "m")
    copies = 22
    many = Corpus(
        np.tile(corpus.tokens, copies),
        np.tile(corpus.response, copies),
        np.concatenate(
            [corpus.offsets[:-1] + i * corpus.offsets[-1] for i in range(copies)]
            + [[copies * corpus.offsets[-1]]]
        ),
        corpus.locations * copies,
        0,
    )
    _, losses = suite_losses(model, EvalSuite(None, [], many, corpus, None, 4000), "x")
    assert len(many) == 528 and np.isfinite(losses[many.response]).all()


# ----------------------------------------------------------------------------------------------- run folders


def test_foreign_names_are_passed_over_and_other_measurements_named(tmp_path):
    results = write_run(tmp_path, {"full": {0: [1.0, 2.0], 1: [1.0, 1.0]}, "base": {0: [2.0, 2.0]}})
    for name in ("full/seed-0.bak", "forgetting:old/seed-0", "notes/seed-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "results.json").write_text("{}")
    found, left_out = finished(tmp_path, {"full": {0: results["full"][0]}})
    assert {name: sorted(seeds) for name, seeds in found.items()} == {
        "full": [0, 1],
        "base": [0],
    } and left_out == []
    (tmp_path / "forgetting-clipped/seed-0").mkdir(parents=True)
    old = tmp_path / "forgetting-clipped/seed-0/results.json"
    old.write_text(json.dumps(results["full"][0]))
    assert finished(tmp_path, {})[1] == ["forgetting-clipped/seed-0: no method of today's"]
    old.unlink()
    other = results["full"][1] | {"identity": {"held-out": "y"}}
    (tmp_path / "full/seed-1/results.json").write_text(json.dumps(other))
    found, left_out = finished(tmp_path, {"full": {0: results["full"][0]}})
    assert sorted(found["full"]) == [0] and left_out == [
        "full/seed-1: measured on other tasks or held-out rows"
    ]


def test_files_that_are_no_row_stop_nothing(tmp_path):
    """A list in RUN/analysis/results.json ended a run after hours of training; some backups were passed over,
    others called methods of another day."""
    results = write_run(tmp_path, {"full": {0: [1.0, 2.0]}, "full:lr=0.001": {0: [1.0, 1.0]}})
    measured = json.dumps(results["full"][0])
    for name, content in (
        ("analysis", "[1, 2]"),
        ("plots", "not JSON"),
        ("full/seed-0.bak", measured),
        ("full.bak/seed-0", measured),
        ("full:old/seed-0", measured),
        ("full:lr=0.001/seed-0.bak", measured),
        ("renamed:lr=0.001/seed-0", measured),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "results.json").write_text(content)
    (tmp_path / "folder/results.json").mkdir(parents=True)
    found, left_out = finished(tmp_path, results)
    assert found == results and left_out == ["renamed:lr=0.001/seed-0: no method of today's"]
    (tmp_path / "full/seed-1").mkdir()
    (tmp_path / "full/seed-1/results.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="full/seed-1/results.json: an object is expected"):
        finished(tmp_path, results)


def test_a_table_without_results_is_that_of_the_run(tmp_path):
    """The joined runs took what base, the first that was found, was measured on: base stood alone in their table."""
    rows = write_run(tmp_path, {name: {0: [1.0, 2.0]} for name in ("base", "full", "ignoring")})
    of_base = rows["base"][0] | {"identity": {"held-out": "x", "mc": "y"}, "tasks": {"mc": {"acc": 0.5}}}
    (tmp_path / "base/results.json").write_text(json.dumps(of_base))
    of_command = finished(tmp_path, {name: rows[name] for name in ("full", "ignoring")})
    assert of_command == (rows, ["mc: not every row was measured on the same"])
    assert finished(tmp_path, {}) == of_command
    assert finished(tmp_path / "nothing", {}) == ({}, [])


@pytest.mark.parametrize("content", ["", '{"step": 0}\n{"ste', None])
def test_a_log_that_was_cut_off_stops_nothing(tmp_path, content):
    """On a full disk half a line stood in metrics.jsonl, and the same command failed for ever."""
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    log = open_log(tmp_path, 2, 5)
    assert log == ([{"step": 0}] if content else []) and read_log(tmp_path / "metrics.jsonl") == log


def test_scores_of_another_corpus_are_noticed(tmp_path):
    _, corpus, _ = setting(tmp_path / "m")
    losses = np.zeros(len(corpus.tokens), np.float32)
    arrays = {"base_loss": losses, "ref_loss": losses, "tokens": corpus.tokens, "offsets": corpus.offsets}
    save_arrays(arrays, tmp_path / "s", {"done": "24"})
    assert read_scores(tmp_path / "s", corpus)[2] == 24
    changed = corpus.tokens.copy()
    changed[5] += 1
    save_arrays(arrays | {"tokens": changed}, tmp_path / "s", {"done": "24"})
    with pytest.raises(ValueError, match="scores of another D_train; remove it"):
        read_scores(tmp_path / "s", corpus)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_between_two_steps(tmp_path, number, monkeypatch):
    """The message said that the same command goes on; up to 99 steps were lost."""
    model, corpus, signs = setting(tmp_path / "m")
    options = Options(model="m", rank=4, batch_size=6, lr=1e-2, epochs=2)
    train(model, corpus, signs, tmp_path / "whole", options, seed=5)
    whole = torch.cat([p.detach().flatten() for p in lora_parameters(model).values()])
    remove_lora(model)
    original, steps = forgetting.step_gradient, []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(forgetting, "step_gradient", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(model, corpus, signs, tmp_path / "run", options, seed=5)
    assert signal.getsignal(number) == before and len(read_log(tmp_path / "run/metrics.jsonl")) == 3 == len(
        steps
    )
    remove_lora(model)
    train(model, corpus, signs, tmp_path / "run", options, seed=5)
    assert len(steps) == 8, "it went on after the step that was running"
    assert torch.equal(torch.cat([p.detach().flatten() for p in lora_parameters(model).values()]), whole)


def test_a_full_disk_leaves_a_log_that_is_gone_on_from(tmp_path):
    """A real one, a tmpfs of 64 kB: the write that fails leaves part of a line, and the same training goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        (disk / "filler").write_bytes(bytes(50_000))
        log, bar = open_log(disk, 0, 1000), progress("x", 1000, "steps")
        figures = {"loss": 1.0, "L_P": 1.0, "L_N": None, "lambda": None, "tokens/s": 1.0, "long": "x" * 300}
        with pytest.raises(OSError, match="metrics.jsonl: could not be written .*No space"):
            for step in range(1000):
                append_log(disk, figures | {"step": step}, log, bar)
        text = (disk / "metrics.jsonl").read_text()
        assert not text.endswith("\n"), "half a line is there, or this test shows nothing"
        (disk / "filler").unlink()
        assert [line["step"] for line in open_log(disk, len(log), 1000)] == list(range(len(log) - 1))
        assert (disk / "metrics.jsonl").read_text() == text[: text.rindex("\n") + 1]
    finally:
        subprocess.run(["umount", disk], check=True)
