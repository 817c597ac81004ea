"""Changes on purpose that once passed the whole suite, in forgetting.py and look.py: each has a test here that fails for it."""

import os
import signal
import types

import numpy as np
import pytest
import torch
from test_helped import write_run
from test_training import setting

import forgetting
from data import Corpus
from forgetting import EvalSuite, Options, measure, paired_losses, read_log, stop_between_steps

import look


def on_rank(rank: int, folder, store: str, name: str, call: int) -> None:
    """Two gloo ranks of which the second alone is told to stop, in a call of a function of the training loop."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, corpus, signs = setting(folder / "m")
    original, calls = getattr(forgetting, name), []

    def told_to_stop(*arguments):
        calls.append(1)
        if rank == 1 and len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    setattr(forgetting, name, told_to_stop)
    options = Options(model="m", rank=4, batch_size=6, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        forgetting.train(model, corpus, signs, folder / "run", options, seed=5)
    (folder / f"calls-{rank}").write_text(str(len(calls)))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "name, call, saved",
    [
        ("step_gradient", 3, "checkpoint/state.safetensors"),
        ("append_log", 8, "adapter_model.safetensors"),  # the last step has asked the ranks already
    ],
)
def test_a_stop_that_another_rank_was_asked_for(tmp_path, name, call, saved):
    """Only the rank that got the signal stopped; the other waited for it for ever. Late in the last step a signal was
    lost: the run went on with its next training."""
    setting(tmp_path / "m")
    torch.multiprocessing.spawn(on_rank, (tmp_path, str(tmp_path / "store"), name, call), nprocs=2)
    assert [(tmp_path / f"calls-{rank}").read_text() for rank in (0, 1)] == [str(call)] * 2
    assert len(read_log(tmp_path / "run/metrics.jsonl")) == call
    assert (tmp_path / "run" / saved).is_file(), "on rank 0, which got no signal"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_acts_at_once(number):
    before = signal.getsignal(number)

    def acts(*_):
        raise InterruptedError

    signal.signal(number, acts)
    try:
        with pytest.raises(InterruptedError):
            with stop_between_steps() as received:
                os.kill(os.getpid(), number)
                assert received == [number], "the first is noted"
                os.kill(os.getpid(), number)
                raise AssertionError("the second was noted, too")
        assert signal.getsignal(number) is acts
    finally:
        signal.signal(number, before)


def test_l_p_and_l_n_are_over_an_even_sample(tmp_path):
    """Of the first 512 rows alone, the figures would be those of one file of several."""
    _, corpus, signs = setting(tmp_path / "m")
    copies = 60
    ends = np.concatenate([corpus.offsets[:-1] + i * corpus.offsets[-1] for i in range(copies)])
    offsets = np.append(ends, copies * corpus.offsets[-1])
    tiled = [np.tile(array, copies) for array in (corpus.tokens, corpus.response)]
    many = Corpus(*tiled, offsets, corpus.locations * copies, 0)
    examples = EvalSuite(None, [], many.part(0, 0), many, np.tile(signs, copies), 1000).sample
    assert len(many) == 1440 and len(examples) == 512
    assert examples[0] == 0 and examples[-1] == 1439 and set(np.diff(examples)) <= {2, 3}


def test_results_are_kept_with_and_measured_without_l_p(tmp_path, monkeypatch):
    """--skip-train-losses takes what is there; without it a model that lacks L_P and L_N is measured again."""
    model, corpus, signs = setting(tmp_path / "m")
    without = EvalSuite(None, [], corpus.part(0, 0), corpus, None, 1000)
    with_signs = EvalSuite(None, [], corpus.part(0, 0), corpus, signs, 1000)
    assert "L_P" not in measure(model, without, tmp_path / "a")
    first = measure(model, with_signs, tmp_path / "a")
    assert first["L_P"] and first["L_N"]
    monkeypatch.setattr(forgetting, "suite_losses", None)  # is not called again
    assert measure(model, without, tmp_path / "a") == first == measure(model, with_signs, tmp_path / "a")


def test_a_task_is_measured_once(tmp_path, monkeypatch):
    """With --eval-data, or one more task, every task of every method and seed was measured again."""
    model, corpus, _ = setting(tmp_path / "m")
    asked = []

    def measured(_, __, documents):
        asked.append([task.name for task in documents])
        samples = [
            {"task": task.name, "doc_id": 0, "version": task.identity["version"]} for task in documents
        ]
        return {task.name: {"acc": 0.5, "n": 1} | task.identity for task in documents}, samples

    monkeypatch.setattr(forgetting, "evaluate", measured)

    def figures_of(held_out_rows, **versions) -> dict:
        tasks = [
            types.SimpleNamespace(name=name, identity={"version": version})
            for name, version in versions.items()
        ]
        held_out = corpus.part(0, held_out_rows)
        return measure(model, EvalSuite(None, tasks, held_out, corpus, None, 1000), tmp_path / "a")

    figures_of(0, mc=1, qa=1)
    with_held_out = figures_of(5, mc=1, qa=1)
    assert asked == [["mc", "qa"], []] and with_held_out["held-out"]
    assert figures_of(0, mc=1, word=1)["held-out"] == with_held_out["held-out"], "it stays"
    found = figures_of(5, mc=2)
    assert asked[2:] == [["word"], ["mc"]]
    versions = {"mc": 2, "qa": 1, "word": 1}
    assert {name: task["version"] for name, task in found["tasks"].items()} == versions
    samples = read_log(tmp_path / "a/samples.jsonl")
    assert sorted((sample["task"], sample["version"]) for sample in samples) == sorted(versions.items())
    assert figures_of(5, mc=2, word=1) == found and len(asked) == 4, "nothing is missing"


def test_better_on_rows_is_over_all_seeds(tmp_path):
    """It was counted on the first seed alone."""
    full = np.full(10, 2.0)
    first, second = full - 0.1, full + np.array([0.3] * 7 + [0.05] * 3)
    results = write_run(tmp_path, {"full": {0: full, 1: full}, "ignoring": {0: first, 1: second}})
    (line,) = [
        line
        for line in paired_losses(tmp_path, results, trusted=True).split("\n")
        if "ignoring - full" in line
    ]
    assert "| 3 of 10" in line


def test_a_table_of_many_columns_is_turned():
    header = ["method", *map(str, range(12))]
    page = look.html_table(header, [["full", *map(str, range(12))]])
    assert "<th>full</th>" in page and "<th>11</th>" not in page
    assert "<th>11</th>" in look.html_table(header, [["full"] * 13] * 13), "as many rows: as it is"


def test_colours_are_as_strong_on_both_sides():
    """Strength goes by the distance from the threshold, above or below."""
    run = types.SimpleNamespace(
        corpus=types.SimpleNamespace(response=np.ones(3, bool)),
        quality=np.array([1.5, -0.5, 0.6]),
        signs=np.array([1, -1, 1]),
        base_loss=np.zeros(3),
        threshold=0.5,
    )
    above, below, near = (look.token_html(run, place, "x", False) for place in range(3))
    strength = [part.split("--a:")[1][:4] for part in (above, below, near)]
    assert strength[0] == strength[1] > strength[2]


def test_differences_leave_l_p_and_l_n_out():
    """Their P and N are those of one run; a difference over runs would compare other tokens."""
    ours = {0: {"average": 3.0, "L_P": 1.0, "L_N": 2.0, "held-out": 1.5}}
    theirs = {0: {"average": 1.0, "L_P": 5.0, "L_N": 5.0, "held-out": 1.0}}
    assert look.differences(ours, theirs) == {"average": [2.0], "held-out": [0.5]}


def test_files_of_the_hub_never_share_a_name(tmp_path, monkeypatch):
    """The cache had one name for several files of the Hub: a slash became a dash."""
    import get_data

    monkeypatch.setattr(get_data, "convert_once", lambda *_: None)
    monkeypatch.setattr(get_data.constants, "HF_HOME", str(tmp_path))
    names = ["a/b/c-d.jsonl", "a/b/c/d.jsonl", "a/b-c/d.jsonl", "a/b/c-d.jsonl@main", "a-b/c/d.jsonl"]
    paths = {path for name in names for path in get_data.fetch_rows(f"hf://datasets/{name}")}
    assert len(paths) == len(names) and {path.parent for path in paths} == {tmp_path / "forgetting-rows"}
