"""tests/tools/reference_steps.py: its figures on scores that are known, and a study of the smallest kind."""

import json

import numpy as np
import pytest
import reference_steps as steps

from data import Corpus

RNG = np.random.default_rng(0)


def scored(lengths, row_quality, base=1.0):
    """Rows of one token of a question and so many of an answer; every token of a row has its Q."""
    lengths = np.array(lengths) + 1
    rows = len(lengths)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    response = np.ones(offsets[-1], bool)
    response[offsets[:-1]] = False
    tokens = np.zeros(offsets[-1], np.int32)
    corpus = Corpus(tokens, response, offsets, [""] * rows, 0, {})
    quality = np.repeat(row_quality, lengths)
    base_loss = np.repeat(np.broadcast_to(base, rows), lengths)
    base_loss = np.where(response, base_loss, np.nan)
    return steps.Scored(corpus, base_loss.astype(np.float32), (base_loss - quality).astype(np.float32))


def test_the_matched_gap_does_not_see_the_mixture():
    """Q depends on the length alone: trusted rows that are all long have a gap, but not beside rows as long."""
    lengths = RNG.integers(1, 20, 400)
    train = scored(lengths, 0.1 * lengths)
    trusted = scored([18] * 30, [1.8] * 30)
    figures = steps.trust_figures(train, trusted, trusted)
    assert figures["gap in deviations"] > 0.5 and abs(figures["matched gap"]) < 0.1
    better = scored([18] * 30, [2.8] * 30)
    assert steps.matched_gap(better, train) == pytest.approx(1 / train.tokens.std(), abs=0.1)


def test_the_regressed_gap_does_not_see_theta():
    """Q is a third of theta's loss: rows that theta finds hard have a gap which their loss explains."""
    base = RNG.uniform(0.5, 3, 300)
    train = scored([5] * 300, base / 3, base)
    trusted = scored([5] * 40, [1.0] * 40, 3.0)
    figures = steps.trust_figures(train, trusted, trusted)
    assert figures["gap in deviations"] > 1 and abs(figures["regressed gap"]) < 1e-3


def test_the_swap_auc():
    """1 where every row's own answer has a higher Q than every other row's, 0.5 where they are the same."""
    train, low, high = (scored([3] * 20, np.full(20, level) + 0.1 * RNG.random(20)) for level in (0, 1, 2))
    assert steps.trust_figures(train, high, low)["swap AUC"] == 1
    assert steps.trust_figures(train, low, low)["swap AUC"] == 0.5


def test_no_row_keeps_its_answer():
    rows = [{"instruction": f"q{i}", "output": f"a{i}", "noise": []} for i in range(7)]
    swapped = steps.swap_answers(rows, 3)
    assert [row["instruction"] for row in swapped] == [row["instruction"] for row in rows]
    assert sorted(row["output"] for row in swapped) == [row["output"] for row in rows]
    assert all(a["output"] != b["output"] for a, b in zip(rows, swapped)) and "noise" not in swapped[0]
    assert steps.swap_answers(rows, 3) == swapped != steps.swap_answers(rows, 4)


def test_losses_are_kept_whole(tmp_path):
    kept = {name: scored([2, 3, 4], np.array([0.1, 0.2, 0.3])) for name in ("train", "held-out", "swapped")}
    steps.keep_losses(kept, tmp_path)
    found = steps.read_losses(tmp_path)
    assert list(found) == list(kept)
    for name, part in kept.items():
        assert np.array_equal(found[name].corpus.offsets, part.corpus.offsets)
        assert np.array_equal(found[name].tokens, part.tokens) and np.array_equal(found[name].rows, part.rows)


def record(gap, gain):
    """A record in which ignoring is better than full by so much."""
    others = {name: 0.0 for name in steps.TRUST}
    return others | {"gap": gap, "row AUC": 0.5 + gap, "full held-out": 1.0, "ignoring held-out": 1.0 - gain}


def test_the_trust_table():
    """A figure that orders the gains has 1.00 three times; one that says nothing has a chance of half."""
    records = [record(*pair) for pair in ((-0.2, -0.3), (-0.1, -0.1), (0.1, 0.2), (0.2, 0.4))]
    records = [line | {"swap AUC": value} for line, value in zip(records, (0.6, 0.7, 0.7, 0.6))]
    lines = {
        line.split("|")[1].strip(): line.split("|")[2:5] for line in steps.trust_table(records).splitlines()
    }
    assert list(map(float, lines["gap"])) == [1, 1, 1]
    assert list(map(float, lines["swap AUC"])) == [0.5, 0, 0]


def test_the_table_of_steps_has_differences_by_seed():
    """Of 3 seeds: ignoring - full is .1, .2, .3 by seed, mean .2; its t-interval is 4.303 deviations of the mean wide each way."""
    kind = {"D_ref": "clean", "rate": 1e-3, "passes": 3, "steps": 24, "row AUC": 0.9}
    figures = [(1.0, 1.1), (3.0, 3.2), (2.0, 2.3)]
    records = [kind | {"full held-out": full, "ignoring held-out": ours} for full, ours in figures]
    reach = 4.303 * 0.1 / 3**0.5
    assert f"0.200 [{0.2 - reach:.3f}, {0.2 + reach:.3f}]" in steps.steps_table(records)
    two = steps.steps_table(records[:2])
    assert "0.150" in two and "[" not in two  # of two seeds an interval would say nothing


def test_what_the_trust_gap_told_is_counted_by_its_interval():
    """Above 0 ignoring won once in two, around 0 never, below 0 nothing was seen."""
    records = [(0.1, 1.0, 0.9), (0.2, 1.0, 1.1), (-0.1, 1.0, 1.2)]  # the interval's lower end; full, ignoring
    records = [
        {"trust gap": [0.3, low, 0.5], "full held-out": full, "ignoring held-out": ours}
        for low, full, ours in records
    ]
    assert ["1 of 2", "0 of 1", "0 of 0"] == [
        line.split("|")[2].strip() for line in steps.verdict_table(records).splitlines()[2:]
    ]


@pytest.mark.filterwarnings("error")
def test_the_tables_that_the_records_allow():
    """One record gave a table of nan with numpy's warnings, a record without the trust gap a KeyError."""
    kind = {"D_ref": "clean", "rate": 1e-3, "passes": 3, "steps": 24}
    old = kind | record(0.1, 0.2)
    new = [kind | record(gap, gap) | {"trust gap": [0.3, 0.1, 0.5]} for gap in (0.1, 0.2)]
    for records, trust, verdict in ((new, True, True), ([old, new[0]], False, True), ([old], False, False)):
        text = steps.all_tables(records)
        assert ("rank correlation" in text, "ignoring beat full" in text) == (trust, verdict)


def test_ctrl_c_is_a_line(tmp_path, monkeypatch, capsys):
    """It was a traceback."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "demo_worlds", interrupted)
    monkeypatch.setattr("sys.argv", ["reference_steps.py", "--seeds", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        steps.main()
    assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().out


def test_ties_share_their_rank():
    assert steps.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]


def test_clean_rows_have_no_noise_to_find():
    train = scored([2, 3], np.array([0.1, 0.2]))
    assert steps.noise_figures(train, steps.forgetting.Options(device="cpu")) == {}


def test_a_study(tmp_path, monkeypatch):
    """Two references of the demo's world, few rows: a line and a row of the table for each; again trains nothing."""
    everything = steps.demo.demo_rows
    few = lambda world, seed: {name: rows[:24] for name, rows in everything(world, seed).items()}  # noqa: E731
    monkeypatch.setattr(steps.demo, "demo_rows", few)
    words = ["--seeds", "0", "--d-ref", "clean", "--passes", "1", "2", "--rates", "3e-3", "--out", tmp_path]
    monkeypatch.setattr(
        "sys.argv", ["reference_steps.py", *map(str, words), "--batch-size", "8", "--device", "cpu"]
    )
    steps.main()
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [(line["passes"], line["steps"]) for line in lines] == [(1, 3), (2, 6)]
    assert all(0 <= line[name] <= 1 for line in lines for name in ("row AUC", "swap AUC", "AUC"))
    assert lines[0]["full held-out"] == lines[1]["full held-out"] and lines[0]["ignoring held-out"]
    table = (tmp_path / "results.md").read_text()
    assert "| clean | 0.003 | 1      | 3     | 1" in table and "\n| swap AUC " in table
    monkeypatch.setattr(steps.forgetting, "step_gradient", None)
    steps.main()
    assert (tmp_path / "results.md").read_text() == table


def test_too_few_rows_are_a_line(tmp_path, monkeypatch, capsys):
    """It was a traceback of random.sample."""
    monkeypatch.setattr(steps, "Tokenizer", lambda *_: None)
    monkeypatch.setattr(steps.real_run, "short_rows", lambda *_: [{}] * 400)
    words = ["--model", "m", "--rows", "rows.jsonl", "--seeds", "0", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["reference_steps.py", *words])
    with pytest.raises(SystemExit) as stop:
        steps.main()
    assert stop.value.code == 2
    expected = "reference_steps.py: 400 rows are short enough: 580 are needed\n"
    assert capsys.readouterr().err == expected
