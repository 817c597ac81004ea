"""tests/tools/ablations.py: what its tables say of figures that are known, and what a second call does. Nothing is trained."""

import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import read_object, write_text
from tools import ablations

MINUTE = 60.0
DEMO_ROWS = ablations.demo.demo_rows


@cache
def few_rows(world, seed):
    """The demo's files, cut: the rows are not looked at here."""
    return {name: rows[:8] for name, rows in DEMO_ROWS(world, seed).items()}


class FakeRunner:
    """In the place of forgetting.run: a minute for each method that is not there yet; figures from method and seed."""

    def __init__(self, monkeypatch):
        self.now, self.trained, self.stop_at = 0.0, [], None
        monkeypatch.setattr(ablations.forgetting, "run", self.run)
        monkeypatch.setattr(ablations, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def run(self, options):
        results = {}
        self.now += MINUTE / 10  # to load the model, found or not
        for method in options.methods:
            (seed,) = options.seeds
            adapter = Path(options.out) / method / f"seed-{seed}" / "adapter_model.safetensors"
            rows = Path(options.data[0]).read_text() + Path(options.reference_data[0]).read_text()
            if adapter.is_file():
                assert adapter.read_text() == rows, "other rows would be refused"
            else:
                self.train(adapter, rows)
            percent = 50 + len(method) + seed % 10
            results[method] = {seed: {"tasks": {"demo_qa": {"exact_match": percent / 100, "exact_match_stderr": 0.0}}}}
        return results

    def train(self, adapter, rows):
        if len(self.trained) == self.stop_at:
            self.now += MINUTE / 2
            raise KeyboardInterrupt
        self.now += MINUTE
        self.trained.append(adapter)
        write_text(rows, adapter)


@pytest.fixture
def runner(monkeypatch, tmp_path):
    """A fake runner, and tests/ablations elsewhere."""
    monkeypatch.setattr(ablations, "RESULTS", tmp_path / "committed")
    monkeypatch.setattr(ablations.demo, "demo_rows", few_rows)
    return FakeRunner(monkeypatch)


def call(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["ablations.py", *map(str, words)])
    ablations.main()


def minutes_in(table):
    return float(re.search(r"`: ([\d.]+) minutes", table.read_text().splitlines()[0])[1])


def test_a_second_call_trains_nothing_and_keeps_the_minutes(runner, monkeypatch, tmp_path):
    """controls: 5 methods in 2 panels on 5 seeds are 50 minutes, and 6 seconds to load for each panel and seed."""
    call(monkeypatch, "controls", "--out", tmp_path / "out")
    table = tmp_path / "committed" / "controls.md"
    first, drawing = table.read_text(), table.with_suffix(".svg").read_text()
    assert len(runner.trained) == 50 and minutes_in(table) == 51.0
    call(monkeypatch, "controls", "--out", tmp_path / "out")
    assert len(runner.trained) == 50 and table.read_text() == first and table.with_suffix(".svg").read_text() == drawing


def test_a_stopped_calls_minutes_count(runner, monkeypatch, tmp_path):
    runner.stop_at = 17
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, "controls", "--out", tmp_path / "out")
    stopped = read_object(tmp_path / "out" / "controls.json")
    assert stopped == {"10": pytest.approx(10.2), "11": pytest.approx(7.7)}  # 7 methods, 2 loadings, half a minute lost
    runner.stop_at = None
    call(monkeypatch, "controls", "--out", tmp_path / "out")
    assert len(runner.trained) == 50 and minutes_in(tmp_path / "committed" / "controls.md") == 51.6


def test_what_an_earlier_ablation_trained_is_not_counted_again(runner, monkeypatch, tmp_path):
    """level shares full and forgetting with controls: three of its five methods are left."""
    call(monkeypatch, "controls", "level", "--out", tmp_path / "out")
    assert len(runner.trained) == 80 and minutes_in(tmp_path / "committed" / "level.md") == 31.0


def test_the_first_line_is_the_command_and_its_time(runner, monkeypatch, tmp_path):
    call(monkeypatch, "level", "--out", tmp_path / "my out")
    table = tmp_path / "committed" / "level.md"
    head, _, title, *_ = table.read_text().splitlines()
    assert head.startswith(f"`python tests/tools/ablations.py level --out '{tmp_path / 'my out'}'`: 51.0 minutes on a busy two-core")
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
    options = ablations.forgetting.Options(seeds=ablations.SEEDS, out=ablations.OUT)
    assert head == ablations.head_of(name, options, minutes_in(table)) and minutes_in(table) > 1
    assert title == f"# {ablations.ABLATIONS[name].title}"
    check_drawing(table.with_suffix(".svg"), head)
