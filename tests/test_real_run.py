"""tests/tools/real_run.py: its panels and its splits. Nothing is trained."""

import argparse

import pytest
import real_run

from data import Tokenizer, read_rows


@pytest.mark.parametrize(
    "panel, rows, rate, epochs",
    [
        ("clean", "clean", 1e-3, 3),
        ("same", "same", 1e-3, 3),
        ("same-light", "same", 5e-4, 1),
    ],
)
def test_how_each_panel_trains_its_reference(panel, rows, rate, epochs, monkeypatch, tmp_path):
    """The paper's reference is trained like everything else; only the first panel has what needs no reference."""
    seen = []
    monkeypatch.setattr(real_run.forgetting, "run", lambda options: seen.append(options) or {})
    monkeypatch.setattr(real_run.forgetting, "report", lambda *_: None)
    monkeypatch.setattr(real_run.demo, "oracle", lambda *_, **__: {})
    own = argparse.Namespace(model="m", out=tmp_path)
    folder = real_run.run_split(own, ["--device", "cpu"], 4, panel)
    (options,) = seen
    assert folder == tmp_path / "split-4" / panel and options.out == str(folder)
    assert options.reference_data == [str(tmp_path / "split-4" / f"reference-{rows}.jsonl")]
    assert (options.reference_lr, options.reference_epochs) == (rate, epochs)
    again = ["reference", "ignoring", "forgetting", "forgetting-wga"]
    assert options.methods == (real_run.METHODS if panel == "clean" else again)


def pool_of(count: int) -> list[dict]:
    """Rows that differ."""
    return [{"instruction": f"q{i}", "input": "", "output": f"a{i} b"} for i in range(count)]


def rows_of(folder) -> dict[str, list[dict]]:
    """{file: its rows} of a split."""
    found = {}
    for path in folder.glob("*.jsonl"):
        found[path.stem] = read_rows([str(path)])
    return found


def questions_of(rows: list[dict]) -> list[str]:
    return [row["instruction"] for row in rows]


def test_a_split(demo_model, tmp_path):
    """Sizes, no row in two sets, and noise in two fifths of D_train's rows, whose clean form is beside them."""
    real_run.write_split(pool_of(360), Tokenizer(demo_model), tmp_path, 3)
    found = rows_of(tmp_path)
    sizes = {"train": 200, "train-clean": 200, "reference-clean": 80, "reference-same": 80}
    assert {name: len(rows) for name, rows in found.items()} == sizes | {"held-out": 80, "qa": 80}
    drawn = [*found["train"], *found["reference-clean"], *found["held-out"]]
    assert sorted(questions_of(drawn)) == sorted(questions_of(pool_of(360)))
    for clean, noisy in (("train-clean", "train"), ("reference-clean", "reference-same")):
        assert questions_of(found[clean]) == questions_of(found[noisy])
        outputs = [row["output"] for row in found[clean]]
        changed = [row["output"] != output for row, output in zip(found[noisy], outputs)]
        assert changed == [bool(row["noise"]) for row in found[noisy]]
        assert sum(changed) == 2 * len(changed) // 5
    for asked, row in zip(found["qa"], found["held-out"]):
        assert row["instruction"] in asked["prompt"] and asked["answer"] == row["output"]


def test_other_sizes_of_a_clean_reference(demo_model, tmp_path):
    """The first of it, and more rows behind it that are in no other set; the other files stay what they are."""
    tokenizer, pool = Tokenizer(demo_model), pool_of(580)
    real_run.write_split(pool, tokenizer, tmp_path / "without", 3)
    real_run.write_split(pool, tokenizer, tmp_path / "with", 3, (30, 300))
    for path in (tmp_path / "without").iterdir():
        assert (tmp_path / "with" / path.name).read_bytes() == path.read_bytes()
    found = {name: questions_of(rows) for name, rows in rows_of(tmp_path / "with").items() if name != "qa"}
    few, some, many = (found[f"reference-clean{size}"] for size in ("-30", "", "-300"))
    assert many[:80] == some and some[:30] == few and len(set(many)) == 300
    assert not set(many) & {*found["train"], *found["held-out"]}


@pytest.mark.parametrize("count, sizes, needed", [(359, (), 360), (359, (30,), 360), (579, (30, 300), 580)])
def test_a_pool_that_is_too_small(demo_model, tmp_path, count, sizes, needed):
    """reference_steps ended in a traceback of random.sample, and real_run asked for rows that it does not use."""
    with pytest.raises(ValueError, match=f"{count} rows are short enough: {needed} are needed"):
        real_run.write_split(pool_of(count), Tokenizer(demo_model), tmp_path / "out", 3, sizes)
    assert not (tmp_path / "out").exists()
