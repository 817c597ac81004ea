"""The real command lines, end to end: the table, torchrun, going on after a crash, and what a user gets wrong."""

import argparse
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import eval as evaluation
import forgetting
from data import write_rows, write_text
from forgetting import GROUPS, METHODS, Options, locked, method_of, options_of, parse_options

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    {"instruction": f"Tell me {i} of {i * i}", "output": " ".join(tiny.TEXT.split()[i : i + 3 + i % 7])}
    for i in range(40)
]
QUESTION = {"prompt": "Tell me: it is", "choices": ["the dog", "a fox"], "answer": "a fox"}
FAST = [
    "--n-reference",
    "12",
    "--n-train",
    "24",
    "--batch-size",
    "6",
    "--rank",
    "4",
    "--lr",
    "1e-2",
    "--dropout",
    "0",
]


def run(
    *arguments, ranks: int = 0, script: str = "forgetting.py", code: int = 0
) -> subprocess.CompletedProcess:
    """A command line in a process of its own; one thread, so that processes can share two cores."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A folder with a tiny checkpoint, rows, and a task's rows."""
    folder = tmp_path_factory.mktemp("setting")
    tiny.make_checkpoint(folder / "model", "llama3")
    write_rows(ROWS + ROWS[:5], folder / "rows.jsonl")
    other = {"prompt": "What is 12 plus 30?", "choices": ["It is", "42 things"], "answer": 1}
    write_rows([QUESTION, other], folder / "mc.jsonl")
    write_rows(
        [{"prompt": f"{i} plus 30 is", "answer": ["42", "the"]} for i in (12, 1, 144)], folder / "qa.jsonl"
    )
    return folder


@pytest.fixture(scope="module")
def finished(setting) -> Path:
    """One whole run of every method."""
    out = setting / "run"
    done = run(
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        "--out",
        out,
        *FAST,
        "--methods",
        "base",
        "reference",
        *METHODS,
        "--seeds",
        0,
        1,
        "--tasks",
        "mc",
        "--data-dir",
        setting,
    )
    assert "| forgetting-sequence | 2 " in done.stdout and "D_train 24 examples" in done.stdout
    assert done.stdout.splitlines()[-1] == f"every token with its Q: ./run.sh look {out}"
    return out


@pytest.mark.parametrize("kind", ["llama2", "qwen2", "mistral", "qwen3", "smollm3", "gpt_neo"])
def test_all_stages_on_every_architecture(setting, tmp_path, kind):
    """The paper's models in small, with the default targets; llama3 is the one the other tests use."""
    tiny.make_checkpoint(tmp_path / "m", kind, dialect=5, shards=2, dtype=torch.bfloat16)
    options = Options(
        model=str(tmp_path / "m"),
        data=[str(setting / "rows.jsonl")],
        out=str(tmp_path / "run"),
        n_reference=12,
        n_train=24,
        batch_size=6,
        rank=4,
        lr=1e-2,
        epochs=3,
        lambda_schedule="constant",
        rho=0.7,
        methods=["base", "ignoring", "forgetting"],
        tasks=["mc"],
        data_dir=str(setting),
    )
    results = {name: seeds[0] for name, seeds in forgetting.run(options).items()}
    assert results["forgetting"]["L_P"] < results["base"]["L_P"]
    assert results["forgetting"]["L_N"] > results["ignoring"]["L_N"] + 0.1


def test_a_run_folder_is_complete(finished):
    scores = load_file(finished / "scores.safetensors")
    assert {name: t.dtype for name, t in scores.items()} == {
        "base_loss": torch.float32,
        "ref_loss": torch.float32,
        "offsets": torch.int64,
        "tokens": torch.int32,
        "sources": torch.uint8,
    }
    sources = bytes(scores["sources"].tolist()).decode().split("\n")
    assert len(sources) == 24 and all(re.search(r"rows\.jsonl:\d+$", source) for source in sources)
    assert (
        scores["base_loss"].shape == scores["ref_loss"].shape == (scores["offsets"][-1],)
        and len(scores["offsets"]) == 25
    )
    lines = [
        json.loads(line) for line in (finished / "forgetting/seed-1/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[2]["lambda"] == pytest.approx(
        (0.25 - 1e-5) / 2
    )
    assert set(lines[0]) == {"step", "loss", "L_P", "L_N", "lambda", "lr", "grad_norm", "tokens/s"}
    files = (str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file())
    written = {re.sub(r"seed-[01]", "seed-S", file) for file in files}
    trained = ("adapter_config.json", "adapter_model.safetensors", "metrics.jsonl")
    expected = {
        "config.json",
        "results.json",
        "results.md",
        "scores.safetensors",
        *(f"reference/{name}" for name in trained),
    }
    expected |= {
        f"{model}/{name}" for model in ("base", "reference") for name in ("results.json", "samples.jsonl")
    }
    expected |= {
        f"{method}/seed-S/{name}"
        for method in METHODS
        for name in (*trained, "results.json", "samples.jsonl")
    }
    assert written == expected, "and no checkpoint, no temporary file"
    config = json.loads((finished / "config.json").read_text())
    assert config["rho"] is None and config["lr"] == 1e-2 and "torch" in config["versions"]
    table = (finished / "results.md").read_text()
    assert (
        re.search(r"\| ignoring-sequence +\| 2 ", table)
        and "| mc acc " in table
        and "mean +- sample standard" in table
    )


def test_reference_and_training_sets_are_disjoint_and_unique(finished, setting):
    from data import Tokenizer
    from forgetting import select_data

    options = Options(model="m", data=[str(setting / "rows.jsonl")], n_reference=12, n_train=28)
    reference, train = select_data(options, Tokenizer(setting / "model"))
    texts = [tuple(c.tokens[a:b]) for c in (reference, train) for a, b in zip(c.offsets, c.offsets[1:])]
    assert len(texts) == 40 == len(set(texts))
    with pytest.raises(ValueError, match="--n-train 29: from 1 to 28 are there"):
        select_data(dataclasses.replace(options, n_train=29), Tokenizer(setting / "model"))


def test_the_same_command_again_finds_everything(finished, setting, monkeypatch, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    said = in_process(
        monkeypatch,
        capsys,
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        "--out",
        finished,
        *FAST,
        "--methods",
        "full",
        "forgetting",
        "--seeds",
        0,
        1,
        "--tasks",
        "mc",
        "--data-dir",
        setting,
    )
    assert (
        said.count("found ") == 6
        and {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before
    )


def test_other_inputs_are_refused_and_nothing_is_changed(finished, setting, monkeypatch, capsys):
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        "--out",
        finished,
        *FAST,
        "--methods",
        "full",
    ]
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for more, message in (
        (["--t-max", 0.5], "was made with other t_max (there 0.25, now 0.5): use another --out"),
        (
            ["--epochs", 2, "--rank", 5],
            "was made with other epochs (there 1, now 2); rank (there 4, now 5): use another --out",
        ),
        (["--n-train", 23], "was made with other training data (there"),
        (["--n-reference", 11], "was made with other reference data (there"),
    ):
        assert message in in_process(monkeypatch, capsys, *common, *more, code=2)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_two_ranks_make_the_adapter_of_one_process(setting, monkeypatch, capsys):
    """torchrun with gloo: scores, partition and training agree with a single process (dropout 0)."""
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        *FAST,
        "--methods",
        "forgetting",
        "--micro-tokens",
        100,
        "--tasks",
        "mc",
        "--data-dir",
        setting,
    ]
    one, two = setting / "one", setting / "two"
    in_process(monkeypatch, capsys, *common, "--out", one)
    done = run(*common, "--out", two, ranks=2)
    assert (
        done.stdout.count("| forgetting |") == done.stdout.count("every token with its Q: ") == 1
    )  # rank 0 alone prints
    scores = [load_file(out / "scores.safetensors") for out in (one, two)]
    assert all(torch.allclose(scores[0][k], scores[1][k], atol=1e-4, equal_nan=True) for k in scores[0])
    for folder in ("reference", "forgetting/seed-0"):
        adapters = [load_file(out / folder / "adapter_model.safetensors") for out in (one, two)]
        assert all((adapters[0][name] - adapters[1][name]).abs().max() < 1e-5 for name in adapters[0])
    results = [json.loads((out / "forgetting/seed-0/results.json").read_text()) for out in (one, two)]
    assert results[0]["L_N"] == pytest.approx(results[1]["L_N"], abs=1e-4)


def test_three_ranks_make_the_adapter_of_one_process(setting, monkeypatch, capsys):
    """A last step of one example leaves two ranks without any."""
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        *FAST,
        "--methods",
        "full",
        "--n-train",
        25,
    ]
    in_process(monkeypatch, capsys, *common, "--out", setting / "alone")
    run(*common, "--out", setting / "three", ranks=3)
    for folder in ("reference", "full/seed-0"):
        adapters = [
            load_file(setting / out / folder / "adapter_model.safetensors") for out in ("alone", "three")
        ]
        assert all((adapters[0][name] - adapters[1][name]).abs().max() < 1e-5 for name in adapters[0])


def test_variants_share_the_reference_and_have_rows_of_their_own(setting, tmp_path, monkeypatch, capsys):
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        "--out",
        tmp_path / "run",
        *FAST,
    ]
    names = ["forgetting", "forgetting:rho=0.5", "forgetting:t_max=1.0,lambda_schedule=constant", "full"]
    out = in_process(monkeypatch, capsys, *common, "--methods", *names)
    assert all(f"| {name} " in out for name in names)
    adapters = [load_file(tmp_path / "run" / name / "seed-0/adapter_model.safetensors") for name in names]
    tensor = next(name for name in adapters[0] if name.endswith("lora_B.weight"))
    assert len({adapter[tensor].numpy().tobytes() for adapter in adapters}) == 4
    logged = (tmp_path / "run" / names[2] / "seed-0/metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["lambda"] for line in logged} == {1.0}
    again = in_process(monkeypatch, capsys, *common, "--methods", *names, "ignoring:lr=1e-3")
    assert again.count("found ") == 2 + 4 and "| ignoring:lr=1e-3 " in again


def test_eval_command_line(finished, setting, tmp_path, monkeypatch, capsys):
    """Documents, choices and replies of two ranks are those of one process; --limit is said."""
    common = ["--model", setting / "model", "--adapter", finished / "full/seed-1", "--tasks", "mc", "qa", "--data-dir", setting,
              "--batch-tokens", 20]  # fmt: skip  # a document a pass: both ranks have some
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, common), "--samples", str(tmp_path / "one.jsonl")])
    evaluation.main()
    both = run(
        *common,
        "--samples",
        tmp_path / "two.jsonl",
        "--output",
        tmp_path / "two.json",
        script="eval.py",
        ranks=2,
    )
    assert both.stdout == capsys.readouterr().out  # rank 0 alone prints
    one, two = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [sample["task"] for sample in one] == ["mc"] * 2 + ["qa"] * 3
    for alone, shared in zip(one, two, strict=True):
        assert (
            shared.pop("loglikelihoods", []) == pytest.approx(alone.pop("loglikelihoods", []), rel=1e-5)
            and shared == alone
        )
    results = json.loads((tmp_path / "two.json").read_text())
    assert (
        results["mc"]["n"] == 2
        and results["qa"]["model"] == str(setting / "model")
        and results["qa"]["f1_stderr"] >= 0
    )
    monkeypatch.setattr(
        sys, "argv", ["eval.py", *map(str, common), "--limit", "1", "--output", str(tmp_path / "r.json")]
    )
    evaluation.main()
    assert "only the first 1 documents of each task" in capsys.readouterr().out
    assert [result["n"] for result in json.loads((tmp_path / "r.json").read_text()).values()] == [1, 1]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_bar_of_an_evaluation_counts_all_ranks(setting, monkeypatch, world):
    """It counted rank 0's share against all requests, and stopped at half of them where there were two ranks."""
    from data import Tokenizer
    from model import load_model

    bars = []

    def remember(*arguments, **settings):
        bars.append(progress(*arguments, **settings))
        return bars[-1]

    progress = evaluation.progress
    monkeypatch.setattr(evaluation, "progress", remember)
    for module in ("eval", "data"):
        monkeypatch.setattr(f"{module}.rank_and_world", lambda: (0, world))
    model, tokenizer = load_model(setting / "model"), Tokenizer(setting / "model")
    pairs = [([5, 6, 7, i], [8, 9]) for i in range(20, 44)]
    evaluation.loglikelihoods(model, pairs, batch_tokens=10)
    monkeypatch.setattr(
        evaluation, "join_over_ranks", lambda written: {i: written.get(i, []) for i in range(24)}
    )
    evaluation.generate(model, tokenizer, [context for context, _ in pairs], 2)
    assert [(bar.n, bar.total) for bar in bars] == [(24, 24)] * 2


def in_process(monkeypatch, capsys, *arguments, code: int = 0) -> str:
    """forgetting.main() without a process of its own; its stdout, or the one line it ends with."""
    monkeypatch.setattr(sys, "argv", ["forgetting.py", *map(str, arguments)])
    if code == 0:
        forgetting.main()
        return capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        forgetting.main()
    assert stop.value.code == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("forgetting.py:")]
    assert len(lines) == 1
    return lines[0]


def test_a_run_without_out_leaves_the_demos_folder_alone(setting, tmp_path, monkeypatch, capsys):
    """`runs/demo` was once the default of every run, because the world option's default is "popular"."""
    monkeypatch.chdir(tmp_path)
    in_process(
        monkeypatch,
        capsys,
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        *FAST,
        "--methods",
        "base",
    )
    assert (tmp_path / "runs/latest/results.md").is_file() and not (tmp_path / "runs/demo").exists()


@pytest.mark.parametrize(
    "name", ["reference/precious.txt", "results.json", "base/results.json", "reference/inputs.json"]
)
def test_folders_of_others_are_not_touched(setting, tmp_path, monkeypatch, capsys, name):
    """A project with a folder named reference/ lost it when its root was given as --out; so were results.json."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        "--out",
        tmp_path,
        *FAST,
        "--methods",
        "full",
    ]
    assert "holds files that are not of a run: use another --out" in in_process(
        monkeypatch, capsys, *common, code=2
    )
    assert (tmp_path / name).read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def test_a_mistyped_first_command_does_not_block_its_folder(setting, tmp_path, monkeypatch, capsys):
    """Only inputs.json was there, and the corrected command was refused as another run."""
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        "--out",
        tmp_path,
        *FAST,
        "--methods",
        "base",
    ]
    assert "names no linear layer" in in_process(monkeypatch, capsys, *common, "--targets", "qproj", code=2)
    assert "| base" in in_process(monkeypatch, capsys, *common, "--targets", "q_proj")


def test_changed_rows_of_a_task_are_evaluated_again(setting, tmp_path, monkeypatch, capsys):
    """Results were kept by the name of the data folder, so edited rows gave the old figures."""
    write_rows([QUESTION], tmp_path / "mc.jsonl")
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        "--out",
        tmp_path / "run",
        *FAST,
        "--methods",
        "base",
        "--tasks",
        "mc",
        "--data-dir",
        tmp_path,
    ]
    in_process(monkeypatch, capsys, *common)
    write_rows([QUESTION, QUESTION | {"answer": "the dog"}], tmp_path / "mc.jsonl")
    in_process(monkeypatch, capsys, *common)
    result = json.loads((tmp_path / "run/base/results.json").read_text())["tasks"]["mc"]
    assert result["n"] == 2 and result["acc"] == 0.5


def test_a_limit_of_a_run(setting, tmp_path, monkeypatch, capsys):
    """A share is said as one, and with another limit a row is measured again."""
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        "--out",
        tmp_path / "run",
        *FAST,
    ]
    common += ["--methods", "base", "--tasks", "qa", "--data-dir", setting]
    for limit, note, count in (
        (0.5, "only the first 50 % of each task's documents, rounded up (--limit)", 2),
        (1, "only the first 1 documents of each task (--limit)", 1),
        (1.0, "only the first 1 documents of each task (--limit)", 1),  # as lm-evaluation-harness has it
    ):
        assert f"\nqa: {note}\n" in in_process(monkeypatch, capsys, *common, "--limit", limit)
        result = json.loads((tmp_path / "run/results.json").read_text())["base"]["0"]["tasks"]["qa"]
        assert (result["n"], result["limit"]) == (count, limit)


def test_what_is_wrong_with_tasks_is_found_before_training(setting, tmp_path, monkeypatch, capsys):
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        "--out",
        tmp_path / "run",
        *FAST,
    ]
    write_rows([{"body": "x", "question": "?", "answer": 5}], tmp_path / "asdiv.jsonl")
    for more, message in (
        (
            ["--tasks", "boolq", "--data-dir", tmp_path / "nowhere"],
            "nowhere has no boolq.jsonl, the rows of boolq",
        ),
        (["--tasks", "asdiv", "--data-dir", tmp_path], "asdiv.jsonl:1: 'int' object has no attribute"),
        (
            ["--limit", "0"],
            "--limit 0 is not allowed: a whole number of documents, or a share of them below 1",
        ),
        (["--limit", "1.5"], "--limit 1.5 is not allowed: a whole number of documents, or a share"),
        (["--seeds", "-1"], "--seeds -1 is not in [0, 2147483647]"),
        (["--reference-epochs", "0"], "--reference-epochs 0 is not in [1, inf)"),
        (["--reference-lr", "0"], "--reference-lr 0.0 is not in (0, inf)"),
        (["--targets", "lm_head"], "lm_head cannot be a LoRA target"),
        (["--device", "tpu"], "--device tpu is not supported"),
    ):
        assert message in in_process(monkeypatch, capsys, *common, *more, code=2)
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


def test_scores_in_another_precision_than_the_training(setting, tmp_path, monkeypatch, capsys):
    """bfloat16 scores are near float32's, not equal; and scores of the other precision are not taken for one's own."""
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        *FAST,
        "--methods",
        "full",
        "--checkpoint-activations",
    ]
    for dtype in ("float32", "bfloat16"):
        in_process(monkeypatch, capsys, *common, "--out", tmp_path / dtype, "--score-dtype", dtype)
    exact, rounded = (load_file(tmp_path / dtype / "scores.safetensors") for dtype in ("float32", "bfloat16"))
    for name in ("base_loss", "ref_loss"):
        apart = (exact[name] - rounded[name])[exact[name].isfinite()].abs()
        assert 0 < apart.mean() < 0.1 and apart.max() < 0.5
    adapters = [
        (tmp_path / dtype / "full/seed-0/adapter_model.safetensors").read_bytes()
        for dtype in ("float32", "bfloat16")
    ]
    assert adapters[0] == adapters[1], "full does not look at the scores, and trains in --dtype"
    message = in_process(monkeypatch, capsys, *common, "--out", tmp_path / "bfloat16", code=2)
    assert "other score_dtype (there 'bfloat16', now 'float32')" in message


def test_a_truncated_score_file_is_one_line(setting, tmp_path, monkeypatch, capsys):
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        "--out",
        tmp_path,
        *FAST,
        "--methods",
        "base",
    ]
    in_process(monkeypatch, capsys, *common)
    path = tmp_path / "scores.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    assert in_process(monkeypatch, capsys, *common, code=2)


def test_a_single_step_of_rate_0_is_warned_about(setting, tmp_path, monkeypatch, capsys):
    """With a handful of rows all of training was the first step of warm-up, and nothing was learned in silence."""
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        "--n-reference",
        4,
        "--n-train",
        4,
        "--rank",
        4,
    ]
    out = in_process(monkeypatch, capsys, *common, "--out", tmp_path / "a", "--methods", "full")
    assert out.count("warning: a single step has rate 0 and teaches nothing: --warmup 0") == 1
    assert "D_ref has 4 examples: 8 epochs, 8 steps" in out
    out = in_process(
        monkeypatch, capsys, *common, "--out", tmp_path / "b", "--methods", "full", "--warmup", 0
    )
    assert "a single step" not in out


def test_the_demo_runs_both_panels(demo_model, tmp_path):
    """One seed of the embedded default; the mechanics are asserted, not which method wins."""
    done = run(
        "--out",
        tmp_path,
        "--seeds",
        5,
        "--methods",
        "base",
        "full",
        "ignoring",
        "forgetting",
        "--rank",
        8,
        "--n-train",
        300,
        "--n-reference",
        240,
        "--limit",
        60,
        script="tests/tools/demo.py",
    )
    clean, same = done.stdout.split("## Reference trained on rows as noisy")
    for panel in (clean, same):
        for method in ("base", "full", "ignoring", "forgetting", "oracle"):
            assert f"| {method} " in panel
        assert "AUC wrong" in panel and "demo_qa popular" in panel
    tables = [
        text[text.rindex("| method ") :].splitlines() for text in (clean, same)
    ]  # after the plans of the runs
    rows = [
        [cell.strip() for cell in next(line for line in lines if line.startswith("| full ")).split("|")]
        for lines in tables
    ]
    assert rows[0][:7] == rows[1][:7] and rows[0][3], "trained once, shown twice"
    results = json.loads((tmp_path / "results.json").read_text())
    panel = next(iter(results.values()))
    losses = {name: next(iter(seeds.values()))["L_N"] for name, seeds in panel["methods"].items()}
    assert losses["forgetting"] > losses["ignoring"] and panel["detection"]["AUC wrong"][0] > 0.6
    assert 0.26 < panel["detection"]["noise share"][0] < 0.34


def test_a_reference_that_learned_nothing_ends_the_run(setting, tmp_path, monkeypatch, capsys):
    """Found at d954c0b: one step of rate 0, every Q 0, N empty: `forgetting` was `full` byte for byte, with exit 0."""
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        "--rank",
        4,
        "--out",
        tmp_path,
        "--methods",
        "forgetting",
    ]
    said = in_process(monkeypatch, capsys, *common, "--reference-lr", 1e-30, "--n-reference", 6, code=2)
    assert "the reference learned nothing: Q is 0 for every token" in said
    assert not (tmp_path / "forgetting").exists()


def test_a_reference_of_a_single_step_is_refused_before_anything_is_scored(
    setting, tmp_path, monkeypatch, capsys
):
    """Its rate is 0; it was refused after D_train had been scored."""
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", "--rank", 4, "--out", tmp_path]
    said = in_process(monkeypatch, capsys, *common, "--reference-epochs", 1, "--n-reference", 6, code=2)
    assert "a single step, whose rate is 0, teaches the reference nothing: more --reference-epochs" in said
    assert not tmp_path.exists(), "a folder that stayed empty goes, too"


def test_somebody_elses_folder_is_refused_before_rows_are_read(setting, tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    common = ["--model", setting / "model", "--data", tmp_path / "no-such.jsonl", "--out", tmp_path]
    said = in_process(monkeypatch, capsys, *common, code=2)
    assert "holds files that are not of a run" in said and [f.name for f in tmp_path.iterdir()] == [
        "thesis.txt"
    ]


def test_a_small_pool_works_with_the_defaults(setting, tmp_path, monkeypatch, capsys):
    """40 rows: D_ref is 6 rows; it is gone through until the reference has taken 8 steps, and Q is described."""
    said = in_process(
        monkeypatch,
        capsys,
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        "--rank",
        4,
        "--out",
        tmp_path,
        "--methods",
        "full",
        "forgetting",
        "--lr",
        "1e-2",
        "--epochs",
        3,
    )
    assert "D_ref has 6 examples: 8 epochs, 8 steps" in said
    assert len((tmp_path / "reference" / "metrics.jsonl").read_text().splitlines()) == 8
    assert re.search(r"Q of \d+ response tokens: mean .* 5 / 50 / 95 % at", said) and "under theta'" in said
    assert re.search(r"lowest Q in P [-\d.]+: \d+ tokens in P, \d+ in N\n", said)
    full, forgetting = (
        load_file(tmp_path / name / "seed-0" / "adapter_model.safetensors") for name in ("full", "forgetting")
    )
    assert any(not torch.equal(full[name], forgetting[name]) for name in full)


def test_held_out_rows_have_a_column(setting, tmp_path, monkeypatch, capsys):
    held = [{"instruction": f"Tell me {i}", "output": "the quick brown fox"} for i in range(100, 104)]
    write_rows(held, tmp_path / "held.jsonl")
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        *FAST,
        "--methods",
        "base",
        "reference",
        "full",
    ]
    said = in_process(
        monkeypatch, capsys, *common, "--out", tmp_path / "a", "--eval-data", tmp_path / "held.jsonl"
    )
    figures = [
        json.loads((tmp_path / "a" / name / "results.json").read_text())
        for name in ("base", "reference", "full/seed-0")
    ]
    assert "perplexity" not in said and len({figure["held-out"] for figure in figures}) == 3
    from data import Tokenizer, build_corpus, read_rows
    from model import load_model

    model, corpus = (
        load_model(setting / "model"),
        build_corpus(read_rows([str(tmp_path / "held.jsonl")]), Tokenizer(setting / "model")),
    )
    losses = []
    for tokens, judged in zip(corpus.split(), np.split(corpus.response, corpus.offsets[1:-1])):
        with torch.no_grad():
            ids = torch.from_numpy(tokens).long()
            logits = model.lm_head(model(ids, torch.tensor([0, len(ids)], dtype=torch.int32)))
        losses += torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[
            torch.from_numpy(judged[1:])
        ].tolist()
    assert figures[0]["held-out"] == pytest.approx(np.mean(losses), abs=1e-4)
    said = in_process(
        monkeypatch,
        capsys,
        *common,
        "--out",
        tmp_path / "b",
        "--eval-data",
        f"{setting / 'rows.jsonl'}:5",
        code=2,
    )
    assert "of its 5 rows are in D_ref or D_train" in said


def test_a_command_without_held_out_rows_loses_none_and_mixes_none(setting, tmp_path, monkeypatch, capsys):
    """The finished command without --eval-data wrote every row's figures anew, without its held-out loss."""
    for name in ("a", "b"):
        held = [{"instruction": f"Tell me {name} {i}", "output": "the quick fox"} for i in range(100, 104)]
        write_rows(held, tmp_path / f"{name}.jsonl")
    run_folder = tmp_path / "run"
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", *FAST, "--out", run_folder]
    common += ["--data-dir", setting, "--methods"]
    two, on_a, on_b = (
        ("base", "full"),
        ("--eval-data", tmp_path / "a.jsonl"),
        ("--eval-data", tmp_path / "b.jsonl"),
    )

    def files() -> dict[str, bytes]:
        found = (*run_folder.glob("base/*"), *run_folder.glob("full/seed-0/*"))
        return {str(path): path.read_bytes() for path in found}

    def held_out(name: str) -> float | None:
        return json.loads((run_folder / name / "results.json").read_text()).get("held-out")

    in_process(monkeypatch, capsys, *common, *two, *on_a)
    before, table = files(), (run_folder / "results.json").read_text()
    said = in_process(monkeypatch, capsys, *common, *two)
    assert files() == before and (run_folder / "results.json").read_text() == table
    assert "| full - base |" in said and "not in the table" not in said

    # a task is measured beside it, and stays when it is no longer asked for, too
    in_process(monkeypatch, capsys, *common, *two, "--tasks", "mc")
    with_task = files()
    assert held_out("base") == json.loads(table)["base"]["0"]["held-out"]
    said = in_process(monkeypatch, capsys, *common, *two, *on_a)
    assert files() == with_task and "| mc acc " in said

    # a row without held-out loss: the column goes, the figures stay where they are
    said = in_process(monkeypatch, capsys, *common, *two, "ignoring")
    assert "not in the table: held-out: not every row was measured on the same" in said
    assert "not in the table: mc: not every row was measured on the same" in said
    assert "| held-out" not in said and " - base |" not in said and files() == with_task

    # other held-out rows: what was measured on the first ones is no partner of it
    said = in_process(monkeypatch, capsys, *common, "ignoring", *on_b)
    assert "not in the table: base: measured on other tasks or held-out rows" in said
    said = in_process(monkeypatch, capsys, *common, *two, "ignoring")
    assert "not in the table: held-out: not every row was measured on the same" in said
    assert "| held-out" not in said and files() == with_task and held_out("ignoring/seed-0") is not None


def test_the_table_keeps_what_is_finished(setting, tmp_path, monkeypatch, capsys):
    """Found at d954c0b: with other --methods, rows whose results were on disk vanished from results.md."""
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", *FAST, "--out", tmp_path]
    in_process(monkeypatch, capsys, *common, "--methods", "base", "full", "--seeds", 0, 1)
    in_process(monkeypatch, capsys, *common, "--methods", "ignoring")
    table = (tmp_path / "results.md").read_text()
    assert "not in the table" not in table
    expected = (("full", 2), ("ignoring", 1), ("base", 1))
    assert all(re.search(rf"\| {method} +\| {seeds} +\|", table) for method, seeds in expected)
    said = in_process(
        monkeypatch, capsys, *common, "--methods", "reference", "--tasks", "mc", "--data-dir", setting
    )
    table = said[said.rindex("\n| method") :]
    assert re.search(r"\| reference +\| 1 ", table) and table.count("\n| ") == 3, (
        "a head, a rule and one row: the others know no mc"
    )
    for other in ("base", "full/seed-0", "full/seed-1", "ignoring/seed-0"):
        assert f"not in the table: {other}: measured on other tasks or held-out rows" in said


def test_two_runs_in_one_folder(setting, tmp_path, monkeypatch, capsys):
    """The second is told so, and touches nothing; the lock goes with the block."""
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        *FAST,
        "--out",
        tmp_path / "run",
        "--methods",
        "base",
    ]
    with locked(tmp_path / "run"):
        assert "is in use by another run" in in_process(monkeypatch, capsys, *common, code=2)
        assert not list((tmp_path / "run").iterdir())
    assert not (tmp_path / "run").exists()  # it stayed empty
    in_process(monkeypatch, capsys, *common)


def test_an_interrupted_training_says_how_it_goes_on(setting, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", stop)
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        *FAST,
        "--out",
        tmp_path / "run",
    ]
    monkeypatch.setattr(sys, "argv", ["forgetting.py", *map(str, common)])
    with pytest.raises(SystemExit) as stopped:
        forgetting.main()
    said = capsys.readouterr()
    assert stopped.value.code == 130 and "Traceback" not in said.err
    assert said.out.splitlines()[-1] == "stopped; the same command goes on from what was saved"


def test_prompts_are_answered_side_by_side(setting, finished, monkeypatch, capsys):
    adapters = [str(finished / name / "seed-0") for name in ("full", "forgetting")]
    monkeypatch.setattr(
        sys,
        "argv",
        ["eval.py", "--model", str(setting / "model"), "--prompt", "Tell me 3", "--adapter", *adapters],
    )
    evaluation.main()
    said = capsys.readouterr().out
    assert said.startswith("> Tell me 3\n[base] ") and said.count("/seed-0] ") == 2
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(setting / "model"), "--prompt", "-"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Tell me 3\nTell me 4\n")))
    evaluation.main()
    said = capsys.readouterr().out
    assert "> Tell me 3\n[base] " in said and "> Tell me 4\n[base] " in said


@pytest.mark.parametrize(
    "name, unread",
    [
        ("full:rho=0.5", "rho"),
        ("ignoring:t_max=1", "t_max"),
        ("full-P:forget_rate=0.1", "forget_rate"),
        ("dft:unlearn_power=1", "unlearn_power"),
    ],
)
def test_a_variant_by_an_option_its_method_does_not_read_is_refused(name, unread):
    """It was trained under its own name, and was the plain method."""
    with pytest.raises(ValueError, match=f"does not read {unread}"):
        method_of(name, Options())


@pytest.mark.parametrize("name", ["m.gguf", "M.GGUF"])
def test_gguf_is_named(setting, tmp_path, monkeypatch, capsys, name):
    said = in_process(
        monkeypatch,
        capsys,
        "--model",
        name,
        "--data",
        setting / "rows.jsonl",
        "--out",
        tmp_path / "run",
        code=2,
    )
    assert f"{name}: GGUF is not read (transformers converts it" in said and not (tmp_path / "run").exists()


def test_a_folder_of_gguf_is_named(setting, tmp_path, monkeypatch, capsys):
    """Its config or tokenizer was said to be missing; one with safetensors beside the GGUF is read."""
    from model import checkpoint_folder

    (tmp_path / "m").mkdir()
    (tmp_path / "m/model-Q4.GGUF").touch()
    common = ["--model", tmp_path / "m", "--data", setting / "rows.jsonl", "--out", tmp_path / "run"]
    said = in_process(monkeypatch, capsys, *common, code=2)
    assert "m: GGUF is not read (transformers converts it" in said and not (tmp_path / "run").exists()
    (tmp_path / "m/model.safetensors").touch()
    (tmp_path / "m/config.json").write_text("{}")
    assert checkpoint_folder(str(tmp_path / "m")) == tmp_path / "m"


@pytest.mark.parametrize("entry", ["a.gguf", "A.GGUF:5"])
def test_gguf_for_rows_is_named(setting, tmp_path, monkeypatch, capsys, entry):
    (tmp_path / entry.partition(":")[0]).write_bytes(b"GGUF\xff")
    common = ["--model", setting / "model", "--data", tmp_path / entry, "--out", tmp_path / "run"]
    said = in_process(monkeypatch, capsys, *common, code=2)
    assert f"{entry.partition(':')[0]}: GGUF, a model, not rows; transformers converts it" in said


def test_held_out_loss_while_training(setting, tmp_path, monkeypatch, capsys):
    """Every --eval-every steps a line of metrics.jsonl has it; the last is that of the table, and the training is the same."""
    held = [{"instruction": f"Tell me {i}", "output": "the quick brown fox"} for i in range(100, 104)]
    write_rows(held, tmp_path / "held.jsonl")
    common = [
        "--model",
        setting / "model",
        "--data",
        setting / "rows.jsonl",
        *FAST,
        "--methods",
        "full",
        "--dropout",
        0.1,
        "--eval-data",
        tmp_path / "held.jsonl",
    ]
    in_process(monkeypatch, capsys, *common, "--out", tmp_path / "a", "--eval-every", 2)
    in_process(monkeypatch, capsys, *common, "--out", tmp_path / "b")
    lines = [json.loads(line) for line in (tmp_path / "a/full/seed-0/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held-out" in line] == list(range(1, len(lines), 2))
    if len(lines) % 2 == 0:
        last = json.loads((tmp_path / "a/full/seed-0/results.json").read_text())["held-out"]
        assert lines[-1]["held-out"] == pytest.approx(last, rel=1e-5)
    adapters = [(tmp_path / run / "full/seed-0/adapter_model.safetensors").read_bytes() for run in "ab"]
    assert adapters[0] == adapters[1]


def test_importing_does_not_load_the_compiler():
    """torch.nn.attention.varlen brings torch._dynamo along: every command on a CPU began 3.6 seconds later for it."""
    code = "import sys, forgetting; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


RANGES = [
    ("rank", 0, "[1, inf)"),
    ("lr", 0.0, "(0, inf)"),
    ("reference_lr", 0.0, "(0, inf)"),
    ("reference_epochs", 0, "[1, inf)"),
    ("micro_tokens", 0, "[1, inf)"),
    ("n_reference", 0, "[1, inf)"),
    ("n_train", 0, "[1, inf)"),
    ("rho", 0.0, "(0, 1]"),
    ("rho", 1.0001, "(0, 1]"),
    ("forget_rate", -0.1, "[0, 1]"),
    ("dropout", 1.0, "[0, 1)"),
    ("t_max", math.inf, "[0, inf)"),
    ("t_min", math.nan, "[0, inf)"),
    ("unlearn_power", -1.0, "[0, inf)"),
    ("learn_power", -0.5, "[0, inf)"),
    ("unlearn_power", math.inf, "[0, inf)"),
    ("alpha", 0.0, "(0, inf)"),
    ("batch_size", -1, "[1, inf)"),
    ("save_every", 0, "[1, inf)"),
    ("eval_every", -1, "[0, inf)"),
]


@pytest.mark.parametrize("name, value, allowed", RANGES)
def test_ranges_are_checked_in_python_too(name, value, allowed):
    """Options(rank=0) passed, and an explicit reference_lr of 0 was --lr: each is refused before defaults are filled in."""
    with pytest.raises(
        ValueError, match=re.escape(f"--{name.replace('_', '-')} {value} is not in {allowed}")
    ):
        Options(**{name: value})


def test_other_options_that_cannot_be_meant():
    for settings, message in (
        ({"seeds": [0, -1]}, "--seeds -1 is not in [0, 2147483647]"),
        ({"seeds": [2**31]}, "--seeds 2147483648 is not in"),
        ({"dtype": "float16"}, "--dtype float16 is not one of bfloat16, float32"),
        ({"score_dtype": ""}, "--score-dtype  is not one of"),
        ({"lambda_schedule": "cosine"}, "--lambda-schedule cosine is not one of linear, constant, balanced"),
        ({"lambda_schedule": "balanced"}, "--lambda-schedule balanced needs --watch-gradients"),
        ({"eval_every": 5}, "--eval-every needs --eval-data"),
        ({"limit": 0}, "--limit 0 is not allowed: a whole number of documents, or a share of them below 1"),
        ({"t_max": 0.0}, "--t-max 0.0 is below --t-min 1e-05"),
        ({"rho": 0.9, "forget_rate": 0.2}, "forget rate 0.2 is not allowed: 0 to 1 - rho = 0.1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Options(**settings)


def test_a_zero_that_is_allowed_is_meant():
    """0 is not "not given" for a share unlearned, a power, or a variant of them."""
    options = Options(
        forget_rate=0.0, unlearn_power=0.0, t_min=0.0, t_max=0.0, warmup=0.0, dropout=0.0, max_grad_norm=0.0
    )
    assert (options.forget_rate, options.unlearn_power, options.t_max, options.warmup) == (0, 0, 0, 0)
    assert method_of("forgetting-wga", options)[1].unlearn_power == 0.0
    assert method_of("forgetting-wga:unlearn_power=0", Options())[1].unlearn_power == 0.0
    assert method_of("forgetting", options)[1].forget_rate == 0.0
    assert method_of("ignoring:rho=0.95", Options(forget_rate=0.2))[1].forget_rate is None, "it reads none"


def test_a_power_is_the_methods_where_none_is_given():
    def powers(name: str, **given) -> tuple:
        options = method_of(name, Options(**given))[1]
        return options.learn_power, options.unlearn_power

    assert powers("full") == powers("forgetting") == (None, None)
    assert (powers("dft"), powers("forgetting-wga")) == ((1.0, None), (None, 1.0))
    assert powers("forgetting-wga", learn_power=0.5, unlearn_power=0.0) == (0.5, 0.0)
    assert powers("full:learn_power=1") == powers("dft")
    assert powers("forgetting:unlearn_power=2,learn_power=1") == (1.0, 2.0)


def test_help_and_the_papers_defaults(capsys):
    for program in (parse_options, evaluation.parse_arguments):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", ["program.py", "--help"])
            program()
        said = capsys.readouterr().out
        assert stop.value.code == 0 and "--model MODEL" in said and "None]" not in said
        if program is parse_options:
            assert all(f"--{field.name.replace('_', '-')}" in said for field in dataclasses.fields(Options))
    options = parse_options(["--model", "m", "--data", "d"])
    assert (options.rank, options.alpha, options.dropout, options.lr) == (64, 16.0, 0.1, 1e-4)
    assert (options.batch_size, options.epochs, options.max_length, options.warmup) == (24, 1, 2048, 0.03)
    assert (options.t_min, options.t_max, options.max_grad_norm, len(options.targets)) == (
        1e-5,
        0.25,
        0.0,
        10,
    )
    options = parse_options(["--lr", "1"], seeds=[0, 1, 2], lr=2.0)
    assert options.lr == options.reference_lr == 1 and options.seeds == [0, 1, 2]


# what a variant could change, and what made two runs the same, at 14fe823, where three lists were kept by hand
VARIANT = "rho forget_rate lambda_schedule t_min t_max watch_gradients lr epochs warmup batch_size"
VARIANT += " max_grad_norm rank alpha dropout"
VARIANT += " step learn_power unlearn_power"  # since then
SAME_RUN = VARIANT + " template targets reference_lr reference_epochs dtype score_dtype"


def test_the_groups_of_options_say_what_three_lists_said(tmp_path):
    assert set(options_of("training", "unlearning")) == set(VARIANT.split())
    assert set(options_of("training", "unlearning", "setting")) == set(SAME_RUN.split())
    assert set(options_of(*GROUPS)) == {field.name for field in dataclasses.fields(Options)}
    only_unlearning = {"forget_rate", "lambda_schedule", "t_min", "t_max", "watch_gradients"}
    only_unlearning |= {"unlearn_power"}
    assert set(options_of("unlearning")) == only_unlearning


def test_help_has_six_headings_and_the_methods(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    said = capsys.readouterr().out
    for name, sentence in GROUPS.items():
        assert f"\n{name}:\n  {sentence}\n" in said
    listed = re.findall(r"^  ([\w-]+) {2,}\S", said.partition("\nmethods:\n")[2], re.MULTILINE)
    assert listed == ["base", "reference", *METHODS]


def test_rho_positive(tmp_path):
    """As an option and in a variant; only where Q is looked at."""
    assert parse_options(["--rho", "positive"]).rho == "positive"
    assert method_of("forgetting:rho=positive", Options())[1].rho == "positive"
    assert method_of("full", Options(rho="positive"))[0].rho == 1
    for name in ("ignoring-random", "ignoring-loss", "full-P"):
        with pytest.raises(ValueError, match=f"{name} does not look at Q: rho must be a number"):
            method_of(name, Options(rho="positive"))
    with pytest.raises(ValueError, match="forget rate 0.1 needs a rho that is a number"):
        Options(rho="positive", forget_rate=0.1)
    with pytest.raises(ValueError, match="'best' is not a value of rho"):
        method_of("forgetting:rho=best", Options())


STAND_IN = """#!/bin/sh
case "$1 $2" in
"- "*) cat "$0.lacks" ;;                                      # what the environment lacks
"-c import torch"*) echo {gpus} ;;
"-c import sys; sys.exit"*) exit {too_old} ;;
"-c "*) exec {real} "$@" ;;
--version*) echo Python 3.9.1 ;;
"-m pip") echo "pip $*" >> "$0.log"; cat "$0.report" ;;
*) echo {name} "$@" ;;
esac
"""


def run_sh(folder: Path, *words, gpus=0, too_old=0, lacks="", report="") -> subprocess.CompletedProcess:
    """run.sh from another folder, with stand-ins for python and torchrun that print what they are called with."""
    for name in ("python", "torchrun"):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STAND_IN.format(gpus=gpus, too_old=too_old, name=name, real=sys.executable))
        path.chmod(0o755)
    (folder / "bin/python.lacks").write_text(lacks)
    (folder / "bin/python.report").write_text(report)
    changed = {"VIRTUAL_ENV": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    environment = os.environ | changed
    return subprocess.run(
        [ROOT / "run.sh", *words], capture_output=True, text=True, env=environment, cwd=folder
    )


RUN = "{root}/forgetting.py --model m --data d"
PROGRAMS = (
    "demo",
    "look",
    "get_data",
    "publish",
    "ablations",
    "real_run",
    "reference_steps",
    "bench",
    "gpu_check",
)


@pytest.mark.parametrize(
    "words, gpus, command",
    [
        ("", 0, "python {root}/tests/tools/demo.py"),
        *((f"{name} a --b", 4, f"python {{root}}/tests/tools/{name}.py a --b") for name in PROGRAMS),
        ("plain --help", 4, "python {root}/tests/plain.py --help"),
        ("test", 0, "python {root}/tests/suite.py"),
        ("test -k model", 0, "python -m pytest -q {root}/tests -k model"),
        ("--model m --data d", 0, f"python {RUN}"),
        ("--model m --data d", 1, f"python {RUN}"),
        ("--model m --data d", 4, f"torchrun --standalone --nproc_per_node=4 {RUN}"),
        ("eval --model m", 1, "python {root}/eval.py --model m"),
        ("eval --model m", 4, "torchrun --standalone --nproc_per_node=4 {root}/eval.py --model m"),
    ],
)
def test_what_run_sh_starts(tmp_path, words, gpus, command):
    done = run_sh(tmp_path, *words.split(), gpus=gpus)
    assert (done.returncode, done.stdout, done.stderr) == (0, command.format(root=ROOT) + "\n", "")


def test_run_sh_help_lists_what_it_starts(tmp_path):
    done = run_sh(tmp_path, "help")
    listed = re.findall(r"^(\w+) {2,}\S", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and set(listed) == {*PROGRAMS, "test", "plain", "eval"}
    tools = {path.stem for path in (ROOT / "tests/tools").glob("*.py") if not path.stem.startswith("make_")}
    assert tools <= {*PROGRAMS, "density"}, "a tool that no door leads to"


def test_run_sh_refuses_a_name_it_does_not_know(tmp_path):
    done = run_sh(tmp_path, "lok", "runs/mine")
    assert done.returncode == 2 and "'lok' is none of its names: ./run.sh help" in done.stderr


def test_run_sh_checks_the_python_of_an_active_environment(tmp_path):
    done = run_sh(tmp_path, "look", too_old=1)
    assert done.returncode == 2 and "Python 3.9.1 is too old: 3.11 or newer" in done.stderr
    assert f"deactivate {tmp_path}" in done.stderr


@pytest.mark.parametrize(
    "package, version", [("numpy", np.__version__), ("setuptools", "0"), ("new-one", "0")]
)
def test_run_sh_replaces_nothing_in_an_active_environment(tmp_path, package, version):
    """It ran pip in conda's base, which took the user's torch. setuptools, of which every environment has an old one,
    and what is not there yet may come."""
    report = json.dumps({"install": [{"metadata": {"name": package, "version": "99.0"}}]})
    done = run_sh(tmp_path, "look", lacks="torch==2.13.0\n", report=report)
    installs = [
        line for line in (tmp_path / "bin/python.log").read_text().splitlines() if "--dry-run" not in line
    ]
    if package == "numpy":
        assert done.returncode == 2 and installs == []
        assert f"  numpy {version} -> 99.0\n" in done.stderr and "makes a .venv beside itself" in done.stderr
    else:
        assert done.returncode == 0 and len(installs) == 1
        assert f"installing into {tmp_path}, once: torch==2.13.0" in done.stdout
        assert "takes several gigabytes" in done.stdout


def test_prompts_take_the_template_of_the_run(tmp_path):
    """A model trained in its own template was asked in Tulu's."""
    from eval import run_config, template_of

    def template(*adapters: str) -> str:
        return template_of({adapter: run_config(adapter) for adapter in adapters})

    for name, written in (("a", "model"), ("b", "tulu")):
        (tmp_path / name / "full/seed-0").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"template": written, "inputs": {}}))
    adapters = [
        str(tmp_path / "a/full/seed-0"),
        str(tmp_path / "a/reference"),
        str(tmp_path / "b/full/seed-0"),
    ]
    assert template(*adapters[:2]) == "model"
    assert template(*adapters[2:]) == template(str(tmp_path)) == template() == "tulu"
    assert template(*adapters[:2], str(tmp_path)) == "model", "one that lies in no run says nothing"
    with pytest.raises(ValueError, match="different templates: give --template"):
        template(*adapters)


def test_an_adapter_that_lies_in_no_run(setting, finished, tmp_path, monkeypatch, capsys):
    """A copy of its two files was asked in Tulu's template without a word; a model's config.json was taken for a run's."""
    copy = setting / "model/adapter"  # its parent has a config.json, which is the model's
    shutil.copytree(finished / "full/seed-0", copy)
    inside = str(finished / "full/seed-0")
    note = f"note: {copy} lies in no run, which would say the template that it was trained in: --template tulu is taken"
    asked = ["eval.py", "--model", str(setting / "model"), "--adapter"]
    for more, said in (
        ([str(copy), inside, "--prompt", "Tell me 3"], [note]),
        ([str(copy), "--tasks", "mc", "--data-dir", str(setting)], [note]),
        ([str(copy), "--prompt", "Tell me 3", "--template", "tulu"], []),
        ([inside, "--prompt", "Tell me 3"], []),
    ):
        monkeypatch.setattr(sys, "argv", asked + more)
        evaluation.main()
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("note: ")] == said


def test_runs_that_wrote_other_dates(tmp_path):
    """The last of their dates was taken without a word. It is said where the template that is used writes one."""
    from data import Tokenizer
    from eval import dates_of, describe_template, run_config

    adapters = []
    for name, day in (("a", "05T23"), ("b", "04T09"), ("c", "05T01")):
        adapters.append(str(tmp_path / name / "full/seed-0"))
        config = {"template": "model", "inputs": {}, "date": f"2026-07-{day}:00:00"}
        write_text(json.dumps(config), tmp_path / name / "config.json")
    configs = {adapter: run_config(adapter) for adapter in adapters}
    assert [date.day for date in dates_of(configs)] == [4, 5, 5]
    note = "note: the adapters' runs wrote other dates (2026-07-04, 2026-07-05): all are asked with the last"
    dated, plain = "{{ strftime_now('%d') }}{{ messages[0].content }}", "{{ messages[0].content }}"
    for written, template, names, tasks, lines in (
        (dated, "model", adapters, [], [note]),
        (dated, "model", adapters[::2], [], []),  # one day
        (dated, "tulu", adapters, [], []),
        (plain, "model", adapters, [], []),
        (dated, "model", adapters, ["boolq"], []),  # asked without a template
    ):
        folder = tmp_path / "model"
        tiny.save_tokenizer(folder, "llama3")
        (folder / "chat_template.jinja").write_text(written)
        prompt = None if tasks else "x"
        arguments = argparse.Namespace(adapter=names, prompt=prompt, tasks=tasks, template=None)
        given = {name: configs[name] for name in names}
        assert describe_template(arguments, given, template, Tokenizer(folder, template)) == lines
