"""tests/tools/ablations.py: what its tables say of figures that are known, and what a second call does. Nothing is trained."""

import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import ablations
import look
import numpy as np
import pytest

from data import read_rows, write_rows, write_text

DEMO_ROWS = ablations.demo.demo_rows


@cache
def few_rows(world, seed):
    """The demo's files, cut: the rows are not looked at here."""
    return {name: rows[:8] for name, rows in DEMO_ROWS(world, seed).items()}


class FakeRunner:
    """In the place of forgetting.run: trains what is not there yet; figures from method and seed."""

    def __init__(self, monkeypatch):
        self.trained, self.stop_at = [], None
        monkeypatch.setattr(ablations.forgetting, "run", self.run)

    def run(self, options):
        results = {}
        for method in options.methods:
            (seed,) = options.seeds
            adapter = Path(options.out) / method / f"seed-{seed}" / "adapter_model.safetensors"
            rows = Path(options.data[0]).read_text() + Path(options.reference_data[0]).read_text()
            if adapter.is_file():
                assert adapter.read_text() == rows, "other rows would be refused"
            else:
                if len(self.trained) == self.stop_at:
                    raise KeyboardInterrupt
                self.trained.append(adapter)
                write_text(rows, adapter)
            percent = 50 + len(method) + seed % 10
            results[method] = {
                seed: {"tasks": {"demo_qa": {"exact_match": percent / 100, "exact_match_stderr": 0.0}}}
            }
        return results


@pytest.fixture
def runner(monkeypatch, tmp_path):
    """A fake runner, and tests/ablations elsewhere."""
    monkeypatch.setattr(ablations, "RESULTS", tmp_path / "committed")
    monkeypatch.setattr(ablations.demo, "demo_rows", few_rows)
    return FakeRunner(monkeypatch)


def call(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["ablations.py", *map(str, words)])
    ablations.main()


def test_a_second_call_trains_nothing(runner, monkeypatch, tmp_path):
    """controls: full and two random ones once, 2 methods in 2 panels, on 5 seeds. A call that was stopped is gone on with."""
    runner.stop_at = 17
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, "controls", "--out", tmp_path / "out")
    runner.stop_at = None
    call(monkeypatch, "controls", "--out", tmp_path / "out")
    table = tmp_path / "committed" / "controls.md"
    first, drawing = table.read_text(), table.with_suffix(".svg").read_text()
    assert len(runner.trained) == 35
    call(monkeypatch, "controls", "--out", tmp_path / "out")
    assert (
        len(runner.trained) == 35
        and table.read_text() == first
        and table.with_suffix(".svg").read_text() == drawing
    )


def test_ablations_share_what_is_trained(runner, monkeypatch, tmp_path):
    """level shares full and forgetting with controls: three of its five methods are left, in two panels."""
    call(monkeypatch, "controls", "level", "--out", tmp_path / "out")
    assert len(runner.trained) == 35 + 30


def test_some_panels(runner, monkeypatch, tmp_path, capsys):
    """They are made alone, the table says which, and it does not replace the repository's."""
    call(monkeypatch, "level", "--panels", "same-light", "--out", tmp_path / "out")
    assert len(runner.trained) == 25 and not (tmp_path / "committed").exists()
    text = (tmp_path / "out" / "level.md").read_text()
    assert text.startswith("`./run.sh ablations level --panels same-light --out ")
    assert text.count("Reference: ") == 1
    call(monkeypatch, "level", "--out", tmp_path / "out")
    assert len(runner.trained) == 25 + 5 + 20, "the other panel, and full in the first of them"


def test_a_light_reference_is_trained_like_everything_else():
    options = ablations.forgetting.parse_options([], **ablations.demo.DEMO)
    heavy, light = (
        ablations.demo.panel_options(options, panel, 0, ["full"]) for panel in ("same", "same-light")
    )
    assert (heavy.reference_lr, heavy.reference_epochs) == (1e-2, 2)
    assert (light.reference_lr, light.reference_epochs) == (options.lr, options.epochs)
    assert heavy.reference_data == light.reference_data and heavy.out != light.out


def test_the_first_line_is_the_command(runner, monkeypatch, tmp_path):
    call(monkeypatch, "level", "--out", tmp_path / "my out")
    table = tmp_path / "committed" / "level.md"
    head, _, title, *_ = table.read_text().splitlines()
    command = f"./run.sh ablations level --out '{tmp_path / 'my out'}'"
    assert head == f"`{command}`: seeds 10 11 12 13 14. Intervals: 95 %, Student's t over seeds."
    assert title == "# tokens or whole sequences"
    check_drawing(table.with_suffix(".svg"), head)


def check_drawing(path, head):
    """<desc> comes first, and holds the table's first line."""
    root = ElementTree.fromstring(path.read_text())
    assert root[0].tag.endswith("desc") and root[0].text == head


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_the_committed_results_are_of_the_default_command(name):
    table = ablations.ROOT / "tests" / "ablations" / f"{name}.md"
    head, _, title, *_ = table.read_text().splitlines()
    options = ablations.forgetting.Options(seeds=list(ablations.ABLATIONS[name].seeds), out=ablations.OUT)
    head_today = re.sub(r"[\d.]+ minutes [^;]*; ", "", head)  # minutes were counted once
    head_today = head_today.replace("bootstrap over seeds", "Student's t over seeds")  # what some still have
    assert head_today == ablations.head_of(name, options)
    assert title == f"# {ablations.ABLATIONS[name].title}"
    check_drawing(table.with_suffix(".svg"), head)


def test_a_trial_leaves_the_repositorys_results_alone(runner, monkeypatch, tmp_path, capsys):
    """Other seeds, also five of them: tables and drawings go under --out, and the message says so."""
    for seeds in ([10, 11], [0, 1, 2, 3, 4], [10, 11, 12, 13]):
        call(monkeypatch, "level", "--out", tmp_path / "out", "--seeds", *seeds)
        assert capsys.readouterr().out == f"{tmp_path / 'out' / 'level.md'} and .svg\n"
        head = (tmp_path / "out" / "level.md").read_text().splitlines()[0]
        assert f" --seeds {' '.join(map(str, seeds))} --out {tmp_path / 'out'}`: seeds" in head
    assert not (tmp_path / "committed").exists()
    call(monkeypatch, "level", "--out", tmp_path / "out", "--seeds", *ablations.ABLATIONS["level"].seeds)
    assert capsys.readouterr().out == f"{tmp_path / 'committed' / 'level.md'} and .svg\n"


@pytest.mark.parametrize("count, words", [(1, "1 seed: no interval"), (4, "4 seeds: no interval")])
def test_few_seeds_have_no_interval(count, words):
    found = {"full": [40.0] * count, "ignoring": [42.0 + i for i in range(count)]}
    text = ablations.comparison(found, "full")
    assert f"| {2 + (count - 1) / 2:+.1f} ({words}) | {count}/{count}" in text and "[" not in text
    by_panel = {"clean": ablations.differences(found, "full")}
    drawing = ablations.draw(ablations.Ablation("t", "full", ["ignoring"], ("clean",)), by_panel, "")
    assert words in drawing
    bars = re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"[^/]*stroke-width', drawing)
    assert len(bars) == 1 and bars[0][0] == bars[0][1]
    options = ablations.forgetting.Options(seeds=list(range(count)))
    assert words in ablations.head_of("level", options) and "Student" not in ablations.head_of(
        "level", options
    )


def test_five_seeds_have_one():
    found = {"full": [40.0] * 5, "ignoring": [41.0, 42.0, 43.0, 44.0, 45.0]}
    low, high = look.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert f"| +3.0 [{low:+.1f}, {high:+.1f}] | 5/5" in ablations.comparison(found, "full")


def test_the_interval_of_five_seeds_holds_what_it_says():
    """A bootstrap of five held 80 to 85 %; Student's t is exact where differences are normal."""
    values = [-1.3, 0.4, 2.2, 2.9, 7.1]
    reach = 2.776 * np.std(values, ddof=1) / 5**0.5  # the tables' 97.5 % point with four degrees of freedom
    mean = np.mean(values)
    assert look.t_interval(values) == pytest.approx((mean - reach, mean + reach), abs=1e-3)
    assert look.t_interval([3.0] * 5) == (3.0, 3.0)
    draws = np.random.default_rng(0).normal(0, 1, (2000, 5))
    held = [low <= 0 <= high for low, high in map(look.t_interval, draws)]
    assert 0.935 <= np.mean(held) <= 0.965


def test_each_methods_rate_is_chosen_on_the_other_seeds():
    """Seed 0 alone likes "full" at 0.1 better: chosen on the others it gets 0.2, though that is its worst."""
    found = {
        "full": [0.0, 0.0, 0.0],
        "full:lr=0.1": [99.0, 10.0, 10.0],
        "full:lr=0.2": [1.0, 20.0, 20.0],
        "ignoring:lr=0.1": [5.0, 6.0, 7.0],
        "ignoring:lr=0.2": [4.0, 5.0, 6.0],
    }
    assert ablations.at_best_rates(found) == {"full": [1.0, 10.0, 10.0], "ignoring": [5.0, 6.0, 7.0]}
    assert ablations.at_best_rates({"full": [1.0, 2.0], "forgetting": [3.0, 4.0]}) == {}
    assert ablations.at_best_rates({name: values[:1] for name, values in found.items()}) == {}


def test_other_references(tmp_path):
    """Their sizes and shares; a row of the training set is one but for a space, which keeps it from being taken out."""
    for name, rows in DEMO_ROWS("popular", 10).items():
        write_rows(rows, tmp_path / f"{name}.jsonl")
    ablations.other_references(tmp_path)

    def rows_of(name):
        rows = read_rows([str(tmp_path / f"{name}.jsonl")])
        return [(row["instruction"], row["output"]) for row in rows]

    clean, noisy, train = (rows_of(name) for name in ("reference-clean", "reference-same", "train"))
    assert len(clean) == len(noisy) == 600
    for level, bad in {0: 0, 25: 150, 50: 300, 75: 450, 100: 600}.items():
        assert rows_of(f"reference-mix-{level}") == noisy[:bad] + clean[bad:]
    for size in ablations.SIZES:
        assert rows_of(f"reference-clean-{size}") == clean[:size]
    for share, again in {0: 0, 25: 150, 50: 300}.items():
        rows = rows_of(f"reference-twice-{share}")
        assert [(question.removesuffix(" "), answer) for question, answer in rows] == train[:again] + noisy[
            again:
        ]
        assert not set(rows) & set(train)
    panels = {panel for ablation in ablations.ABLATIONS.values() for panel in ablation.panels}
    files = {f"reference-{panel.removesuffix(ablations.demo.LIGHT)}.jsonl" for panel in panels}
    assert all((tmp_path / name).is_file() for name in files)


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_no_label_runs_into_the_next_or_into_the_drawing(name):
    """In a monospaced font of 12 pixels a letter is 7.2 wide, and dots begin at 350 less their radius."""
    root = ElementTree.fromstring((ablations.ROOT / "tests" / "ablations" / f"{name}.svg").read_text())
    texts = [
        (text.get("x"), 7.2 * len(text.text)) for text in root[3:] if text.tag.endswith("text")
    ]  # less the title
    variants, panels = ([width for x, width in texts if x == column] for column in ("10", "240"))
    assert variants and len(variants) == len(panels)
    assert 10 + max(variants) < 236 and 240 + max(panels) < 342
