"""What long runs meet: kill -9, a full disk, a rank that fails, losses that go wrong. Nothing whole is lost.

FORGETTING_KILLS=20 ./run.sh test -k killed        # the suite itself makes 4
"""

import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_command_line import ROOT, ROWS, environment
from test_training import adapt, gradient_of, setting

import forgetting
from data import whole_file, write_rows
from lora import remove_lora

COMMAND = [
    "--n-reference",
    "12",
    "--n-train",
    "28",
    "--batch-size",
    "4",
    "--rank",
    "4",
    "--lr",
    "1e-2",
    "--epochs",
    "4",
    "--reference-epochs",
    "6",
    "--save-every",
    "1",
    "--methods",
    "base",
    "reference",
    "ignoring",
    "forgetting",
]


def start(folder: Path, out: Path, *more, **options) -> subprocess.Popen:
    """The pipeline on a tiny model, every stage of it, with a checkpoint after every step and dropout on."""
    command = [sys.executable, str(ROOT / "forgetting.py"), "--model", str(folder / "model")]
    command += ["--data", str(folder / "rows.jsonl"), "--out", str(out), *COMMAND, *map(str, more)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(), **options
    )


def artifacts(out: Path) -> dict[str, bytes]:
    """What a run is for, byte by byte: adapters, scores, figures."""
    names = ("adapter_model.safetensors", "scores.safetensors", "results.json")
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.name in names}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict[str, bytes], float]:
    """A folder with model and rows, what one run makes of them, and its seconds."""
    folder = tmp_path_factory.mktemp("crashes")
    tiny.make_checkpoint(folder / "model", "llama3")
    write_rows(ROWS, folder / "rows.jsonl")
    began = time.perf_counter()
    done = start(folder, folder / "run")
    assert done.wait() == 0, done.stderr.read()
    return folder, artifacts(folder / "run"), time.perf_counter() - began


def test_a_killed_run_ends_in_the_same_bytes(undisturbed):
    """kill -9 at random moments of the whole pipeline; the same command each time; bit-identical in the end."""
    folder, expected, seconds = undisturbed
    assert len(expected) == 3 + 1 + 4 + 1 and all(expected.values())
    kills, runs, rng = int(os.environ.get("FORGETTING_KILLS", 4)), 0, random.Random(0)
    delays, out = [], folder / "killed-0"
    while len(delays) < kills:
        process, delay = (
            start(folder, out),
            rng.uniform(0.3 * seconds, 0.9 * seconds),
        )  # before 0.3 torch is still loading
        began = time.perf_counter()
        try:
            assert process.wait(timeout=delay) == 0, process.stderr.read()
            assert (
                artifacts(out) == expected
            )  # it was done before the kill: the next kills go into a new folder
            runs, out = runs + 1, folder / f"killed-{runs + 1}"
            seconds = (
                time.perf_counter() - began
            )  # the machine is less busy now: no delay would be short enough
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            delays.append(round(delay, 2))
    last = start(folder, out)
    assert last.wait() == 0, last.stderr.read()
    assert artifacts(out) == expected
    print(f"{kills} kills after {delays} s of a run of {seconds:.1f} s; {runs} runs were done between kills")


def test_scoring_goes_on_in_the_middle_of_the_corpus(tmp_path, monkeypatch):
    """Stopped after two of six parts: four are left to score, and the losses are those of an undisturbed run."""
    model, corpus, _ = setting(tmp_path / "m")
    adapt(model)
    options = forgetting.Options(batch_size=4, save_every=1)
    whole = forgetting.score(model, corpus, tmp_path / "whole", options)
    parts, original = [], forgetting.response_losses

    def stop_after_two(*arguments, **rest):
        parts.append(1)
        if len(parts) == 6:  # two passes a part: in the middle of the third
            raise KeyboardInterrupt
        return original(*arguments, **rest)

    monkeypatch.setattr(forgetting, "response_losses", stop_after_two)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        forgetting.score(model, corpus, cut, options)
    assert forgetting.read_scores(cut / "scores.safetensors")[2] == 8
    resumed = forgetting.score(model, corpus, cut, options)
    assert len(parts) == 6 + 2 * 4 and [path.name for path in cut.iterdir()] == ["scores.safetensors"]
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(whole, resumed))


def test_a_full_disk_is_one_line_and_costs_nothing(undisturbed):
    """A limit on file size stands for the quota; what earlier stages wrote is intact, and the run then goes on."""
    folder, expected, _ = undisturbed
    largest = max(len(content) for content in expected.values())
    quota = lambda size: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    out = folder / "full-disk"
    process = start(folder, out, preexec_fn=quota(largest // 2))
    message = process.communicate()[1].strip().splitlines()[-1]
    assert (
        process.returncode == 2
        and "could not be written" in message
        and str(out) in message
        and "large" in message
    )
    assert not list(out.rglob("*.tmp"))
    again = start(folder, out)
    assert again.wait() == 0 and artifacts(out) == expected


def test_a_read_only_place_is_one_line(undisturbed):
    """/sys takes no folder, not even root's."""
    process = start(undisturbed[0], Path("/sys/run"))
    lines = [line for line in process.communicate()[1].splitlines() if line.startswith("forgetting.py")]
    assert (
        process.returncode == 2
        and len(lines) == 1
        and "/sys/run" in lines[0]
        and "could not be written" in lines[0]
    )


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with (
        pytest.raises(OSError, match="x.txt: could not be written, what was there before still is"),
        whole_file(path) as file,
    ):
        file.write_text("ne")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and not list(tmp_path.glob("*.tmp"))
    with whole_file(path) as file:
        file.write_text("new")
    assert path.read_text() == "new"


def test_one_failing_rank_ends_all(tmp_path):
    """Rank 1 raises while rank 0 waits for it: torchrun ends both, with the error on screen."""
    script = tmp_path / "fails.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from data import rank_and_world, start_ranks, wait_for_all\n"
        "start_ranks('cpu')\n"
        "if rank_and_world()[0] == 1: raise RuntimeError('rank 1 has had enough')\n"
        "wait_for_all()\n"
    )
    began = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert (
        done.returncode != 0 and "rank 1 has had enough" in done.stderr and time.perf_counter() - began < 60
    )


def test_lambda_too_high_is_found(tmp_path):
    """An absurd forgetting strength on a tiny model: base is better on the very tokens that were to be learned.

    "L_P and L_N both rose", read off the log, fired on the noise of batches, and L_N rises by design.
    """
    model, corpus, signs = setting(tmp_path / "m")
    suite = forgetting.EvalSuite(None, [], corpus.part(0, 0), corpus, signs, 1000)
    results = {"base": {0: forgetting.measure(model, suite, tmp_path / "base")}}
    for name, strength in (("forgetting:t_max=20", 20.0), ("forgetting", 0.05)):
        options = forgetting.Options(
            model="m", rank=4, batch_size=4, t_max=strength, lambda_schedule="constant", lr=1e-2, epochs=8
        )
        forgetting.train(model, corpus, signs, tmp_path / name, options, seed=0)
        results[name] = {0: forgetting.measure(model, suite, tmp_path / name)}
        remove_lora(model)
    (warning,) = forgetting.warnings_of(results)
    assert warning.startswith("warning: L_P of forgetting:t_max=20, ")


def test_checkpointed_activations_change_memory_not_the_gradient(tmp_path):
    """With dropout on: the masks of the second forward pass are those of the first."""
    model, corpus, signs = setting(tmp_path / "m")
    adapt(model)
    for layer in forgetting.lora_parameters(model):
        model.get_submodule(layer.rpartition(".lora_")[0]).dropout = 0.3
    model.train()
    gradients, held = [], []
    for model.checkpoint_activations in (False, True):
        torch.manual_seed(0)
        saved: dict[int, int] = {}
        keep = lambda tensor: saved.setdefault(tensor.data_ptr(), tensor.nbytes) and tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            gradients.append(gradient_of(model, corpus, signs, 10_000))
        held.append(sum(saved.values()))
    assert torch.equal(*gradients) and held[1] < held[0]
