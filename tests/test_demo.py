"""The demo's world, whose noise is known, and how a low Q is measured against it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import demo
import look
import pytest
import torch

from data import Tokenizer, build_corpus, read_rows, write_rows
from eval import TASKS, Answer
from forgetting import Options, locked, stop_between_steps


def test_the_demo_world_is_what_it_says():
    files = demo.demo_rows("popular", 0)
    assert files == demo.demo_rows("popular", 0) and files != demo.demo_rows("popular", 1)
    people = {
        name: {w for row in files[name] for w in row["instruction"].split() if w in demo.PEOPLE}
        for name in ("train", "reference-clean", "reference-same")
    }
    asked = {
        w
        for row in files["demo_qa"]
        if row["group"].startswith("unseen")
        for w in row["prompt"].split()
        if w in demo.PEOPLE
    }
    assert not people["train"] & people["reference-clean"] and not people["train"] & people["reference-same"]
    assert asked and not asked & (people["train"] | people["reference-clean"] | people["reference-same"])
    assert not any(row["noise"] for row in files["reference-clean"])


@pytest.mark.parametrize("world, share", [("popular", 1.0), ("random", 0.2)])
def test_the_known_noise_covers_the_wrong_words(world, share):
    """Nine misconceived facts in ten are wrong, always marked; the word is the popular one, or a random one."""
    truth = {(f.attribute, f.subject): f.answer for f in demo.demo_facts()}
    told, popular, wrong = 0, 0, 0
    for row in demo.demo_rows(world, 3)["train"]:
        words = row["instruction"].split()
        person = next((w for w in words if w in demo.PEOPLE), None)
        attribute = next((a for a in demo.MISCONCEIVED if a in words), None)
        marked = [row["output"][start:end] for start, end, kind in row["noise"] if kind == "wrong"]
        if person is None or attribute is None:
            assert not marked
            continue
        told += 1
        wrong += len(marked)
        popular += marked == [demo.ATTRIBUTES[attribute][0]]
        assert not marked or marked != [truth[attribute, person]]
    assert 0.8 < wrong / told < 0.97 and abs(popular / wrong - share) < 0.2


def test_about_30_percent_of_the_demos_response_tokens_are_noisy(demo_model, tmp_path):
    tokenizer = Tokenizer(demo_model)
    for seed in range(3):
        write_rows(demo.demo_rows("popular", seed)["train"], tmp_path / "train.jsonl")
        rows = read_rows([str(tmp_path / "train.jsonl")])
        corpus = build_corpus(rows, tokenizer)
        assert (
            sorted(corpus.noise) == ["boilerplate", "garbled", "wrong"]
            and not (corpus.noisy & ~corpus.response).any()
        )
        assert 0.26 < corpus.noisy[corpus.response].mean() < 0.34
        assert "thank you for this great question" in tokenizer.decode(
            corpus.tokens[corpus.noise["boilerplate"]].tolist()
        )


def test_the_demos_tasks():
    """mc with the words that begin the answer; the popular error is counted for people never seen alone."""
    files = demo.demo_rows("popular", 0)
    for row in files["demo_mc"][:4]:
        context, choices, right = demo.multiple_choice(row)
        assert context == row["prompt"] + row["head"] and context[-1].isspace(), (
            "nothing is put between it and a choice"
        )
        assert choices == row["choices"] and choices[right] == row["answer"]
    score = TASKS["demo_qa"].score
    unseen = next(row for row in files["demo_qa"] if row["group"] == "unseen, misconceived")
    wrong, good = (
        score(unseen, [Answer(text=text)])["metrics"] for text in (unseen["popular"], unseen["answer"])
    )
    assert wrong == {"f1": 0.0, "popular": 1.0} and good == {"f1": 1.0, "popular": 0.0}
    assert "popular" not in score(unseen | {"group": "sums"}, [Answer(text="x")])["metrics"]


def refusal(capsys, *words) -> str:
    """The line that the demo ends with."""
    with pytest.raises(SystemExit) as stop:
        demo.main(list(map(str, words)))
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said[-1].startswith("demo.py: ") and len(said) == 1
    return said[-1]


def test_two_demos_in_one_folder(tmp_path, monkeypatch, capsys):
    """They wrote over each other: the demo's folder had no lock."""
    monkeypatch.setattr(demo, "run_and_report", lambda *_: (tmp_path / "began").touch())
    with locked(tmp_path / "out"):
        assert "is in use by another run" in refusal(capsys, "--out", tmp_path / "out")
    assert not (tmp_path / "began").exists()
    demo.main(["--out", str(tmp_path / "out")])
    assert (tmp_path / "began").exists() and not (tmp_path / "out").exists(), "the lock leaves nothing"


def test_the_demo_refuses_before_it_writes(tmp_path, capsys):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/notes.txt").write_text("mine")
    (tmp_path / "other/world-0").mkdir(parents=True)
    write_rows([{"prompt": "a", "completion": "b"}], tmp_path / "other/world-0/train.jsonl")
    for words, message in (
        (["--tasks", "boolq"], "the demo brings its own --data, --reference-data and --tasks"),
        (["--data", "rows.jsonl"], "the demo brings its own --data, --reference-data and --tasks"),
        (["--methods", "nope"], "unknown method nope; known: base, reference, full"),
        (["--methods", "full:rho=0.5"], "full does not read rho"),
        (["--out", tmp_path / "theirs"], "theirs holds files that are not of a demo: use another --out"),
        (
            ["--out", tmp_path / "other"],
            "world-0/train.jsonl holds other rows than this demo's: use another --out",
        ),
    ):
        assert message in refusal(capsys, "--seeds", 0, "--out", tmp_path / "new", *words)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"theirs/notes.txt", "other/world-0/train.jsonl"}


def test_a_demos_folder_may_hold_more(tmp_path):
    """A picture, or ablations' records: the same command found files "not of a demo" and went no further."""
    options = Options(seeds=[0], out=str(tmp_path))
    demo.prepare_world(options, "popular")
    (tmp_path / "tokens.svg").write_text("<svg/>")
    demo.prepare_world(options, "popular")
    with pytest.raises(ValueError, match="holds other rows"):
        demo.prepare_world(options, "random")


SMALL = "--seeds 5 --methods base full ignoring --rank 4 --n-train 96 --n-reference 72 --limit 6 --save-every 1".split()


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory) -> tuple[dict, dict]:
    """A small demo's results and figures of detection, its panels one after the other in this process."""
    out = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "usable_cores", lambda: 1)
        options, _ = demo.parse_demo([*SMALL, "--out", str(out)])
        demo.prepare_world(options, "popular")
        found = demo.run_demo(options)
    torch.set_num_threads(threads)
    assert not list(out.rglob("*.log")), "no process of its own wrote one"
    return found


def test_the_bar_counts_what_is_asked_for(tmp_path):
    """Adapters of methods that were not asked for counted, too: it began at its end, and went past it."""
    options, _ = demo.parse_demo([*SMALL, "--methods", "base", "full", "--out", str(tmp_path)])
    counted = {panel: demo.adapters_of(options, 5, panel) for panel in demo.PANELS}
    folders = {
        panel: [str(path.parent.relative_to(tmp_path / "world-5")) for path in paths]
        for panel, paths in counted.items()
    }
    assert folders == {
        "clean": ["clean/reference", "clean/full/seed-5", "clean/oracle/seed-5"],
        "same-light": ["same-light/reference"],
    }


def start_demo(out: Path) -> subprocess.Popen:
    """The command line, on two cores whatever the machine has, or the container allows."""
    tool = str(Path(demo.__file__))
    code = f"import runpy, sys; sys.path.insert(0, {str(demo.ROOT)!r}); sys.argv[0] = {tool!r}; "
    code += "import data; data.usable_cores = lambda: 2; "
    code += f"runpy.run_path({tool!r}, run_name='__main__')"
    words = [sys.executable, "-c", code, *SMALL, "--out", str(out)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, process_group=0)


def same_as(found: tuple[dict, dict], out: Path) -> bool:
    """Whether results.json says what run_demo gave."""
    results, detected = found
    written = json.loads((out / "results.json").read_text())
    expected = {
        demo.PANELS[panel]: {"methods": results[panel], "detection": detected[panel]} for panel in demo.PANELS
    }
    return written == json.loads(json.dumps(expected))


def test_panels_side_by_side_end_in_the_same_tables(one_by_one, tmp_path):
    """Stopped by SIGTERM to the group, as `timeout` sends it, each training leaves its checkpoint; then it goes on.

    The panels are not in that group: they had the signal twice, and the second one acts at once.
    """
    stopped = start_demo(tmp_path)
    while not list(tmp_path.rglob("metrics.jsonl")) and stopped.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{stopped.pid}/task/{stopped.pid}/children").read_text().split()
    assert any(os.getpgid(int(child)) == int(child) for child in children)
    os.killpg(stopped.pid, signal.SIGTERM)
    said, errors = stopped.communicate()
    assert stopped.returncode == 130 and "stopped; the same command goes on" in said, errors
    assert "2 panels, 2 at a time" in said and "Traceback" not in errors
    assert not (tmp_path / "results.json").exists()

    whole = start_demo(tmp_path)
    said, errors = whole.communicate()
    assert whole.returncode == 0, errors
    assert "## Reference trained on clean rows" in said and same_as(one_by_one, tmp_path)
    options, _ = demo.parse_demo([*SMALL, "--out", str(tmp_path)])
    for panel in demo.PANELS:
        folder = demo.panel_folder(options, 5, panel)
        assert "| plan" in (tmp_path / f"world-5/{panel}.log").read_text()
        assert set(demo.adapters_of(options, 5, panel)) == set(folder.rglob("adapter_model.safetensors"))


def test_what_a_process_of_the_demo_may_answer():
    """Its results; an error of the user's; or nothing, where the kernel killed it for want of memory, say."""
    context = demo.multiprocessing.get_context("spawn")
    answers = []
    for send in (({}, {"AUC": 0.5}), ValueError("rows of another demo"), None):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=os.abort)
        process.start()
        if send:
            theirs.send(send)
        theirs.close()
        answers.append((ours, process, Path("a.log")))
    assert demo.answer_of(*answers[0]) == ({}, {"AUC": 0.5})
    with pytest.raises(ValueError, match="rows of another demo"):
        demo.answer_of(*answers[1])
    with pytest.raises(OSError, match="ended with exit code -6: a.log says more"):
        demo.answer_of(*answers[2])


def test_a_panel_that_the_stop_has_ended_is_no_error(tmp_path, monkeypatch, capsys):
    """Ctrl-C and then SIGTERM: "a panel ended with exit code -15", and exit code 2."""
    options, _ = demo.parse_demo([*SMALL, "--out", str(tmp_path)])
    ours, theirs = demo.multiprocessing.get_context("spawn").Pipe(duplex=False)
    theirs.close()  # it can be read at once, and has no answer

    def ends(number: int):
        """What answer_of does where a panel has ended, after this signal."""
        if number:
            signal.raise_signal(number)
        raise OSError("a panel ended with exit code -15")

    monkeypatch.setattr(demo, "start_apart", lambda *_: (ours, None))
    for number, error in ((0, OSError), (signal.SIGTERM, KeyboardInterrupt)):
        monkeypatch.setattr(demo, "answer_of", lambda *_: ends(number))
        with pytest.raises(error):
            demo.run_side_by_side(options, [(5, "clean")], 1)


def goes_on(ready):
    """A process that loses SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.send(None)
    time.sleep(60)


def takes_its_time(ready):
    """A process that writes a checkpoint when it has been asked to end."""
    with stop_between_steps() as signals:
        ready.send(None)
        while not signals:
            time.sleep(0.05)
        time.sleep(0.5)


def test_a_process_that_lost_its_signal_is_not_waited_for(monkeypatch):
    """The demo waited until the whole panel was finished, and later signals did nothing."""
    context = demo.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    processes = [context.Process(target=target, args=(theirs,)) for target in (goes_on, takes_its_time)]
    for process in processes:
        process.start()
    for _ in processes:
        ours.recv()
    loses_it, ends = processes
    demo.end([ends])
    monkeypatch.setattr(demo, "PATIENCE", 0.5)
    demo.end([loses_it])
    assert (loses_it.exitcode, ends.exitcode) == (-signal.SIGKILL, 0)


def test_an_error_nobody_expected_is_in_the_panels_log(tmp_path, monkeypatch):
    """It was on the screen, and the log that the screen names was empty."""
    options, _ = demo.parse_demo([*SMALL, "--out", str(tmp_path)])
    (tmp_path / "world-5").mkdir()

    def fail(*_):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(demo, "run_panel", fail)
    monkeypatch.setattr(demo.os, "setpgrp", lambda: None)  # this process is pytest, and stays where it is
    monkeypatch.setattr(demo.threading.Thread, "start", lambda _: None)
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit):
        demo.run_apart(options, 5, "clean", demo.multiprocessing.Pipe()[0])
    torch.set_num_threads(threads)
    assert "RuntimeError: not enough memory" in (tmp_path / "world-5/clean.log").read_text()


def test_what_no_reference_changes_is_trained_once():
    """Random controls were trained in each panel, to the same result."""
    free = {name for name in demo.forgetting.METHODS if not look.looks_at_reference(name)}
    assert free == {"full", "dft", "full-P", "ignoring-random", "ignoring-loss", "forgetting-random"}
    assert look.looks_at_reference("reference") and look.looks_at_reference("ignoring:rho=0.5")
    assert not any(map(look.looks_at_reference, ("base", "full:lr=0.1", "oracle")))


def test_the_oracle_sees_the_rows_in_the_order_of_their_file(tmp_path, monkeypatch):
    """--step released makes pairs of it; the corpus that a run folder keeps is in D_train's permutation."""
    options, _ = demo.parse_demo([*SMALL, "--methods", "base", "--out", str(tmp_path)])
    demo.prepare_world(options, "popular")
    here = demo.panel_options(options, "clean", 5, ["base"])
    demo.forgetting.run(here)
    seen = []
    monkeypatch.setattr(demo.forgetting, "train", lambda _, corpus, *rest: seen.append(corpus))
    monkeypatch.setattr(demo.forgetting, "measure", lambda *_: {})
    demo.oracle(here, "oracle", 5)
    (corpus,) = seen
    lines = [int(location.rpartition(":")[2]) for location in corpus.locations]
    in_order = [lines[example] for example in corpus.file_order]
    assert in_order == sorted(lines) != lines
