"""The real command lines, end to end: the table, torchrun, going on after a crash, and what a user gets wrong."""

import dataclasses
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from data import write_rows
from forgetting import Options, parse_options

ROOT = Path(__file__).resolve().parent.parent
ROWS = [{"instruction": f"Tell me {i} of {i * i}", "output": " ".join(tiny.TEXT.split()[i : i + 3 + i % 7])} for i in range(40)]
FAST = ["--n-reference", "12", "--n-train", "24", "--batch-size", "6", "--rank", "4", "--lr", "1e-2", "--dropout", "0"]


def run(*arguments, ranks: int = 0, script: str = "forgetting.py", code: int = 0) -> subprocess.CompletedProcess:
    """A command line in a process of its own; one thread, so that processes can share two cores."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def environment() -> dict[str, str]:
    import os

    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A folder with a tiny checkpoint, rows, and a task's rows."""
    folder = tmp_path_factory.mktemp("setting")
    tiny.make_checkpoint(folder / "model", "llama3")
    write_rows(ROWS + ROWS[:5], folder / "rows.jsonl")
    choices = {"group": "x", "prompt": "Tell me:", "head": " it is ", "choices": ["the dog", "a fox"], "answer": "a fox"}
    write_rows([choices], folder / "demo_mc.jsonl")
    return folder


@pytest.fixture(scope="module")
def finished(setting) -> Path:
    """One whole run of every method."""
    out = setting / "run"
    done = run("--model", setting / "model", "--data", setting / "rows.jsonl", "--out", out, *FAST, "--methods", "base",
               "reference", "full", "ignoring", "ignoring-random", "forgetting", "forgetting-clipped", "ignoring-sequence",
               "forgetting-sequence", "--seeds", 0, 1, "--tasks", "demo_mc", "--data-dir", setting, "--export")  # fmt: skip
    assert "| forgetting-sequence | 2 |" in done.stdout and "D_train 24 examples" in done.stdout
    return out


@pytest.mark.parametrize("kind", ["llama2", "qwen2", "gpt_neo"])
def test_all_stages_on_every_architecture(setting, tmp_path, kind):
    """The paper's models in small, with the default targets; llama3 is the one the other tests use."""
    import forgetting
    from eval import load_tool

    tiny.make_checkpoint(tmp_path / "m", kind, dialect=5, shards=2, dtype=torch.bfloat16)
    options = Options(model=str(tmp_path / "m"), data=[str(setting / "rows.jsonl")], out=str(tmp_path / "run"), n_reference=12,
                      n_train=24, batch_size=6, rank=4, lr=1e-2, epochs=3, lambda_schedule="constant", rho=0.7,
                      methods=["base", "ignoring", "forgetting"], tasks=["demo_mc"], data_dir=str(setting), export=True)  # fmt: skip
    results = {name: seeds[0] for name, seeds in forgetting.run(options).items()}
    load_tool("publish").publish_run(options)
    assert results["forgetting"]["L_P"] < results["base"]["L_P"]
    assert results["forgetting"]["L_N"] > results["ignoring"]["L_N"] + 0.1
    assert (tmp_path / "run/forgetting/seed-0/merged/model.safetensors").is_file()


def test_a_run_folder_is_complete(finished):
    scores = load_file(finished / "scores.safetensors")
    assert {name: t.dtype for name, t in scores.items()} == {
        "base_loss": torch.float32, "ref_loss": torch.float32, "offsets": torch.int64, "tokens": torch.int32,
        "sources": torch.uint8}  # fmt: skip
    sources = bytes(scores["sources"].tolist()).decode().split("\n")
    assert len(sources) == 24 and all(re.search(r"rows\.jsonl:\d+$", source) for source in sources)
    assert scores["base_loss"].shape == scores["ref_loss"].shape == (scores["offsets"][-1],) and len(scores["offsets"]) == 25
    lines = [json.loads(line) for line in (finished / "forgetting/seed-1/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[2]["lambda"] == pytest.approx((0.25 - 1e-5) / 2)
    assert set(lines[0]) == {"step", "loss", "L_P", "L_N", "rare_N", "lambda", "lr", "grad_norm", "tokens/s"}
    for name in ("config.json", "results.json", "results.md", "reference/adapter_model.safetensors", "base/results.json",
                 "full/seed-0/adapter_config.json", "full/seed-0/merged/config.json", "full/seed-0/README.md",
                 "full/seed-0/tokenizer.json", "full/seed-0/chat_template.jinja", "full/seed-0/merged/chat_template.jinja"):  # fmt: skip
        assert (finished / name).is_file(), name
    assert not list(finished.rglob("*.tmp")) and not list(finished.rglob("checkpoint"))
    config = json.loads((finished / "config.json").read_text())
    assert config["rho"] is None and config["lr"] == 1e-2 and "torch" in config["versions"]
    table = (finished / "results.md").read_text()
    assert re.search(r"\| forgetting - ignoring +\|", table) and "demo_mc acc" in table


def test_reference_and_training_sets_are_disjoint_and_unique(finished, setting):
    from data import Tokenizer
    from forgetting import select_data

    options = Options(model="m", data=[str(setting / "rows.jsonl")], n_reference=12, n_train=28)
    reference, train = select_data(options, Tokenizer(setting / "model"))
    texts = [tuple(c.tokens[a:b]) for c in (reference, train) for a, b in zip(c.offsets, c.offsets[1:])]
    assert len(texts) == 40 == len(set(texts))
    with pytest.raises(ValueError, match="--n-train 29: from 1 to 28 are there"):
        select_data(dataclasses.replace(options, n_train=29), Tokenizer(setting / "model"))


def test_exported_model_is_base_plus_adapter(finished, setting):
    from lora import load_adapter
    from model import load_model

    tokens, cu = torch.arange(3, 30), torch.tensor([0, 27], dtype=torch.int32)
    merged = load_model(finished / "full" / "seed-0" / "merged")
    adapted = load_model(setting / "model")
    before = adapted(tokens, cu)
    load_adapter(adapted, finished / "full" / "seed-0")
    with torch.inference_mode():
        assert torch.allclose(merged(tokens, cu), adapted(tokens, cu), atol=1e-4)
        assert not torch.allclose(adapted(tokens, cu), before, atol=1e-2)


def test_the_same_command_again_finds_everything(finished, setting):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    done = run("--model", setting / "model", "--data", setting / "rows.jsonl", "--out", finished, *FAST,
               "--methods", "full", "forgetting", "--seeds", 0, 1, "--tasks", "demo_mc", "--data-dir", setting)  # fmt: skip
    assert done.stdout.count("found ") == 6 and {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before


def test_other_inputs_are_refused_until_overwritten(finished, setting, tmp_path, monkeypatch, capsys):
    finished = shutil.copytree(finished, tmp_path / "run")
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", "--out", finished, *FAST, "--methods", "full"]
    config = (finished / "config.json").read_bytes()
    said = in_process(monkeypatch, capsys, *common, "forgetting", "--t-max", 0.5, code=2)
    assert (finished / "config.json").read_bytes() == config
    assert said.splitlines()[-1].endswith("t_max (there 0.25, now 0.5): use another --out, or --overwrite")
    adapter, scores = finished / "full/seed-0/adapter_model.safetensors", finished / "scores.safetensors"
    (finished / "full/seed-0/notes.txt").write_text("mine")
    before, written = load_file(adapter), scores.stat().st_mtime_ns
    in_process(monkeypatch, capsys, *common, "--epochs", 2, "--reference-epochs", 4, "--overwrite")
    after = load_file(adapter)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert scores.stat().st_mtime_ns == written, "options of stage 4 alone leave theta' and the scores"
    assert not (finished / "forgetting/seed-0/adapter_model.safetensors").exists(), "it was of other options"
    in_process(monkeypatch, capsys, *common, "--rank", 5, "--overwrite")
    assert scores.stat().st_mtime_ns > written and (finished / "full/seed-0/notes.txt").read_text() == "mine"


def test_two_ranks_make_the_adapter_of_one_process(setting):
    """torchrun with gloo: scores, partition and training agree with a single process (dropout 0)."""
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", *FAST, "--methods", "forgetting",
              "--micro-tokens", 100, "--tasks", "demo_mc", "--data-dir", setting]  # fmt: skip
    one, two = setting / "one", setting / "two"
    run(*common, "--out", one)
    done = run(*common, "--out", two, ranks=2)
    assert done.stdout.count("| forgetting |") == 1  # rank 0 alone prints
    scores = [load_file(out / "scores.safetensors") for out in (one, two)]
    assert all(torch.allclose(scores[0][k], scores[1][k], atol=1e-4, equal_nan=True) for k in scores[0])
    for folder in ("reference", "forgetting/seed-0"):
        adapters = [load_file(out / folder / "adapter_model.safetensors") for out in (one, two)]
        assert all((adapters[0][name] - adapters[1][name]).abs().max() < 1e-5 for name in adapters[0])
    results = [json.loads((out / "forgetting/seed-0/results.json").read_text()) for out in (one, two)]
    assert results[0]["L_N"] == pytest.approx(results[1]["L_N"], abs=1e-4)


def test_three_ranks_make_the_adapter_of_one_process(setting):
    """A last step of one example leaves two ranks without any."""
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", *FAST, "--methods", "full", "--n-train", 25]
    run(*common, "--out", setting / "alone")
    run(*common, "--out", setting / "three", ranks=3)
    for folder in ("reference", "full/seed-0"):
        adapters = [load_file(setting / out / folder / "adapter_model.safetensors") for out in ("alone", "three")]
        assert all((adapters[0][name] - adapters[1][name]).abs().max() < 1e-5 for name in adapters[0])


def test_variants_share_the_reference_and_have_rows_of_their_own(setting, tmp_path, monkeypatch, capsys):
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", "--out", tmp_path / "run", *FAST]
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


def test_eval_command_line(finished, setting, tmp_path):
    done = run("--model", setting / "model", "--adapter", finished / "full/seed-1", "--tasks", "demo_mc", "--data-dir", setting,
               "--output", tmp_path / "r.json", "--samples", tmp_path / "s.jsonl", "--limit", 1, script="eval.py")  # fmt: skip
    results = json.loads((tmp_path / "r.json").read_text())
    sample = json.loads((tmp_path / "s.jsonl").read_text())
    assert results["demo_mc"]["n"] == 1 and len(sample["loglikelihoods"]) == 2 and "only the first 1" in done.stdout
    both = run("--model", setting / "model", "--adapter", finished / "full/seed-1", "--tasks", "demo_mc", "--data-dir", setting,
               "--samples", tmp_path / "t.jsonl", script="eval.py", ranks=2)  # fmt: skip
    again = json.loads((tmp_path / "t.jsonl").read_text())
    assert (
        again["loglikelihoods"] == pytest.approx(sample["loglikelihoods"], rel=1e-5)
        and both.stdout.count("| demo_mc | acc ") == 1
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "{model}"], "--model and --data go together"),
        (["--model", "{model}", "--data", "nope.jsonl"], "nope.jsonl: no such file"),
        (["--model", "./nope", "--data", "{rows}"], "./nope: no such folder"),
        (["--model", "{model}", "--data", "{rows}", "--methods", "forget"], "unknown method forget; known: base"),
        (["--model", "{model}", "--data", "{rows}", "--rho", "1.2"], "argument --rho: 1.2 is not allowed"),
        (["--model", "{model}", "--data", "{rows}", "--forget-rate", "0.4"], "forget rate 0.4 is not allowed"),
        (["--model", "{model}", "--data", "{rows}", "--t-max", "0"], "--t-max 0.0 is below --t-min"),
        (["--model", "{model}", "--data", "{rows}", "--batch-size", "0"], "argument --batch-size: 0 is not allowed"),
        (["--model", "{model}", "--data", "{rows}", "--dropout", "1"], "argument --dropout: 1 is not allowed"),
        (["--model", "{model}", "--data", "{rows}", "--tasks", "nope", "--data-dir", "."], "unknown task nope"),
        (["--model", "{model}", "--data", "{rows}", "--n-reference", "99"], "--n-reference 99: from 1 to 39"),
        (["--model", "{model}", "--data", "{rows}", "--targets", "c_attn"], "LoRA target c_attn names no linear layer"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(setting, tmp_path, monkeypatch, capsys, arguments, message):
    import forgetting

    filled = [a.format(model=setting / "model", rows=setting / "rows.jsonl") for a in arguments]
    monkeypatch.setattr(sys, "argv", ["forgetting.py", *filled, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        forgetting.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]


def in_process(monkeypatch, capsys, *arguments, code: int = 0) -> str:
    """forgetting.main() without a process of its own; its stdout, or the one line it ends with."""
    import forgetting

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
    in_process(monkeypatch, capsys, "--model", setting / "model", "--data", setting / "rows.jsonl", *FAST, "--methods", "base")
    assert (tmp_path / "runs/latest/results.md").is_file() and not (tmp_path / "runs/demo").exists()


@pytest.mark.parametrize("name", ["reference/precious.txt", "results.json", "base/results.json", "reference/inputs.json"])
def test_folders_of_others_are_not_touched(setting, tmp_path, monkeypatch, capsys, name):
    """A project with a folder named reference/ lost it when its root was given as --out; so were results.json."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", "--out", tmp_path, *FAST, "--methods", "full"]
    for overwrite in ([], ["--overwrite"]):
        assert "holds files that are not of a run" in in_process(monkeypatch, capsys, *common, *overwrite, code=2)
    assert (tmp_path / name).read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def test_a_mistyped_first_command_does_not_block_its_folder(setting, tmp_path, monkeypatch, capsys):
    """Only inputs.json was there, and the corrected command was refused as another run."""
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", "--out", tmp_path, *FAST, "--methods", "base"]
    assert "names no linear layer" in in_process(monkeypatch, capsys, *common, "--targets", "qproj", code=2)
    assert "| base" in in_process(monkeypatch, capsys, *common, "--targets", "q_proj")


def test_changed_rows_of_a_task_are_evaluated_again(setting, tmp_path, monkeypatch, capsys):
    """Results were kept by the name of the data folder, so edited rows gave the old figures."""
    question = {"group": "x", "prompt": "Tell me:", "head": " it is ", "choices": ["the dog", "a fox"], "answer": "a fox"}
    write_rows([question], tmp_path / "demo_mc.jsonl")
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", "--out", tmp_path / "run", *FAST,
              "--methods", "base", "--tasks", "demo_mc", "--data-dir", tmp_path]  # fmt: skip
    in_process(monkeypatch, capsys, *common)
    write_rows([question, question | {"answer": "the dog"}], tmp_path / "demo_mc.jsonl")
    in_process(monkeypatch, capsys, *common)
    result = json.loads((tmp_path / "run/base/results.json").read_text())["tasks"]["demo_mc"]
    assert result["n"] == 2 and result["acc"] == 0.5


def test_what_is_wrong_with_tasks_is_found_before_training(setting, tmp_path, monkeypatch, capsys):
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", "--out", tmp_path / "run", *FAST]
    write_rows([{"body": "x", "question": "?", "answer": 5}], tmp_path / "asdiv.jsonl")
    for more, message in (
        (["--tasks", "boolq", "--data-dir", tmp_path / "nowhere"], "boolq.jsonl: no such file"),
        (["--tasks", "asdiv", "--data-dir", tmp_path], "asdiv.jsonl:1: 'int' object has no attribute"),
        (["--limit", "0"], "argument --limit: 0 is not allowed"),
        (["--seeds", "-1"], "argument --seeds: -1 is not allowed"),
        (["--reference-epochs", "0"], "argument --reference-epochs: 0 is not allowed"),
        (["--reference-lr", "0"], "argument --reference-lr: 0 is not allowed"),
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
    adapters = [(tmp_path / dtype / "full/seed-0/adapter_model.safetensors").read_bytes() for dtype in ("float32", "bfloat16")]
    assert adapters[0] == adapters[1], "full does not look at the scores, and trains in --dtype"
    message = in_process(monkeypatch, capsys, *common, "--out", tmp_path / "bfloat16", code=2)
    assert "other score_dtype (there 'bfloat16', now 'float32')" in message


def test_a_truncated_score_file_is_one_line(setting, tmp_path, monkeypatch, capsys):
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", "--out", tmp_path, *FAST, "--methods", "base"]
    in_process(monkeypatch, capsys, *common)
    path = tmp_path / "scores.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    assert in_process(monkeypatch, capsys, *common, code=2)


def test_a_single_step_of_rate_0_is_warned_about(setting, tmp_path, monkeypatch, capsys):
    """With a handful of rows all of training was the first step of warm-up, and nothing was learned in silence."""
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", "--n-reference", 4, "--n-train", 4, "--rank", 4]
    out = in_process(monkeypatch, capsys, *common, "--out", tmp_path / "a", "--methods", "full")
    assert out.count("warning: ") == 1 and "--warmup 0" in out and "the reference takes 8 epochs" in out
    out = in_process(monkeypatch, capsys, *common, "--out", tmp_path / "b", "--methods", "full", "--warmup", 0)
    assert "warning" not in out


def test_the_demo_takes_no_tasks_of_others(monkeypatch, capsys):
    assert "the demo brings its own" in in_process(monkeypatch, capsys, "--tasks", "boolq", code=2)


def test_less_perplexity_is_a_win():
    """A pair that lowered LAMBADA's perplexity was once counted as lost."""
    from eval import load_tool

    figures = lambda value: {0: {"L_P": None, "L_N": None, "tasks": {"lambada": {"acc": 0.5, "acc_stderr": 0.0,
                                   "perplexity": value, "perplexity_stderr": 0.0}}}}  # fmt: skip
    text = load_tool("look").report({"full": figures(9.0), "forgetting": figures(7.0)}, "t")
    assert "-2.0 (1/1)" in text and "+0.0 (0/1)" in text


def test_unknown_flags_are_refused():
    with pytest.raises(SystemExit):
        parse_options(["--learning-rate", "1"])


def test_every_option_is_read_somewhere_and_the_defaults_are_the_papers():
    source = (ROOT / "forgetting.py").read_text() + (ROOT / "tests/tools/publish.py").read_text()
    for field in dataclasses.fields(Options):
        named = rf'(?:options|its_options|reference_options)\.{field.name}\b|vars\(options\)\["{field.name}"\]'
        assert re.search(named, source), field.name
    options = parse_options(["--model", "m", "--data", "d"])
    assert (options.rank, options.alpha, options.dropout, options.lr) == (64, 16.0, 0.1, 1e-4)
    assert (options.batch_size, options.epochs, options.max_length, options.warmup) == (24, 1, 2048, 0.03)
    assert (options.t_min, options.t_max, options.max_grad_norm, len(options.targets)) == (1e-5, 0.25, 0.0, 10)
    options = parse_options(["--lr", "1"], seeds=[0, 1, 2], lr=2.0)
    assert options.lr == options.reference_lr == 1 and options.seeds == [0, 1, 2]


def test_the_demo_runs_both_panels(demo_model, tmp_path):
    """One seed of the embedded default; the mechanics are asserted, not which method wins."""
    done = run("--out", tmp_path, "--seeds", 5, "--methods", "base", "full", "ignoring", "forgetting", "--rank", 8,
               "--n-train", 300, "--n-reference", 240, "--limit", 60)  # fmt: skip
    clean, same = done.stdout.split("## Reference trained on rows as noisy")
    for panel in (clean, same):
        for method in ("base", "full", "ignoring", "forgetting", "oracle"):
            assert f"| {method} " in panel
        assert "AUC wrong" in panel and "demo_qa popular" in panel
    row = lambda text, name: next(line for line in text.splitlines() if line.startswith(f"| {name} "))
    assert row(clean, "full").split("|")[:7] == row(same, "full").split("|")[:7]  # trained once, shown twice
    results = json.loads((tmp_path / "results.json").read_text())
    panel = next(iter(results.values()))
    losses = {name: next(iter(seeds.values()))["L_N"] for name, seeds in panel["methods"].items()}
    assert losses["forgetting"] > losses["ignoring"] and panel["detection"]["AUC wrong"][0] > 0.6
    assert 0.26 < panel["detection"]["noise share"][0] < 0.34


def test_only_allowed_packages_are_imported():
    """The project and its tests live without high-level frameworks; goldens and peers' timings are made by hand."""
    frameworks = re.compile(r"^\s*(?:import|from)\s+(transformers|peft|accelerate|trl|datasets|lightning|pickle)\b", re.M)
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py"), *(ROOT / "tests/tools").glob("*.py")]:
        if path.parent.name != "tools" or not path.name.startswith(("make_", "bench")):
            assert not frameworks.search(path.read_text(encoding="utf-8")), path
    assert {p.name for p in ROOT.glob("*.py")} == {
        "forgetting.py", "lora.py", "model.py", "data.py", "eval.py"}  # fmt: skip


def test_a_reference_that_learned_nothing_ends_the_run(setting, tmp_path, monkeypatch, capsys):
    """Found at d954c0b: one step of rate 0, every Q 0, N empty: `forgetting` was `full` byte for byte, with exit 0."""
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", "--rank", 4, "--out", tmp_path, "--methods", "forgetting"]
    said = in_process(monkeypatch, capsys, *common, "--reference-epochs", 1, "--n-reference", 6, code=2)
    assert "the reference learned nothing: Q is 0 for every token" in said and not (tmp_path / "forgetting").exists()


def test_a_small_pool_works_with_the_defaults(setting, tmp_path, monkeypatch, capsys):
    """40 rows: D_ref is 6 rows; it is gone through until the reference has taken 8 steps, and Q is described."""
    said = in_process(monkeypatch, capsys, "--model", setting / "model", "--data", setting / "rows.jsonl", "--rank", 4,
                      "--out", tmp_path, "--methods", "full", "forgetting", "--lr", "1e-2", "--epochs", 3)  # fmt: skip
    assert "D_ref has 6 examples: the reference takes 8 epochs" in said
    assert len((tmp_path / "reference" / "metrics.jsonl").read_text().splitlines()) == 8
    assert re.search(r"Q of \d+ response tokens: mean .* 5 / 50 / 95 % at", said) and "under theta'" in said
    assert re.search(r"threshold [-\d.]+: \d+ tokens in P, \d+ in N; \d+% of N with Q > 0", said)
    full, forgetting = (load_file(tmp_path / name / "seed-0" / "adapter_model.safetensors") for name in ("full", "forgetting"))
    assert any(not torch.equal(full[name], forgetting[name]) for name in full)
    assert (tmp_path / "report.html").is_file()


def test_held_out_rows_have_a_column(setting, tmp_path, monkeypatch, capsys):
    held = [{"instruction": f"Tell me {i}", "output": "the quick brown fox"} for i in range(100, 104)]
    write_rows(held, tmp_path / "held.jsonl")
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", *FAST, "--methods", "base", "reference", "full"]
    said = in_process(monkeypatch, capsys, *common, "--out", tmp_path / "a", "--eval-data", tmp_path / "held.jsonl")
    figures = [json.loads((tmp_path / "a" / name / "results.json").read_text()) for name in ("base", "reference", "full/seed-0")]
    assert "held-out perplexity" in said and len({figure["held-out"] for figure in figures}) == 3
    from data import Tokenizer, build_corpus, read_rows
    from model import load_model

    model, corpus = load_model(setting / "model"), build_corpus(read_rows([str(tmp_path / "held.jsonl")]), Tokenizer(setting / "model"))
    losses = []
    for tokens, judged in zip(corpus.split(), np.split(corpus.response, corpus.offsets[1:-1])):
        with torch.no_grad():
            ids = torch.from_numpy(tokens).long()
            logits = model.lm_head(model(ids, torch.tensor([0, len(ids)], dtype=torch.int32)))
        losses += torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[torch.from_numpy(judged[1:])].tolist()
    assert figures[0]["held-out"] == pytest.approx(np.mean(losses), abs=1e-4)
    said = in_process(monkeypatch, capsys, *common, "--out", tmp_path / "b", "--eval-data", f"{setting / 'rows.jsonl'}:5", code=2)
    assert "of its 5 rows are in D_ref or D_train" in said


def test_the_table_keeps_what_is_finished(setting, tmp_path, monkeypatch, capsys):
    """Found at d954c0b: with other --methods, rows whose results were on disk vanished from results.md."""
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", *FAST, "--out", tmp_path]
    in_process(monkeypatch, capsys, *common, "--methods", "base", "full", "--seeds", 0, 1)
    in_process(monkeypatch, capsys, *common, "--methods", "ignoring")
    table = (tmp_path / "results.md").read_text()
    assert re.search(r"\| full +\| 2 \|", table) and re.search(r"\| ignoring +\| 1 \|", table) and re.search(r"\| base +\|", table)


def test_two_runs_in_one_folder(setting, tmp_path, monkeypatch, capsys):
    """The second is told so, and touches nothing; the lock goes with the block."""
    from data import locked

    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", *FAST, "--out", tmp_path / "run", "--methods", "base"]
    with locked(tmp_path / "run"):
        assert "is in use by another run" in in_process(monkeypatch, capsys, *common, code=2)
        assert not list((tmp_path / "run").iterdir())
    assert not (tmp_path / "run").exists()  # it stayed empty
    in_process(monkeypatch, capsys, *common)


def test_other_packing_with_dropout_is_said(setting, tmp_path, monkeypatch, capsys):
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", *FAST, "--out", tmp_path, "--methods", "full"]
    in_process(monkeypatch, capsys, *common, "--dropout", 0.1, "--micro-tokens", 100)
    said = in_process(monkeypatch, capsys, *common, "--dropout", 0.1, "--micro-tokens", 200, "--seeds", 0, 1)
    both = [{"micro_tokens": 100, "ranks": 1}, {"micro_tokens": 200, "ranks": 1}]
    assert f"was made with several of {both}: dropout masks" in said
    assert json.loads((tmp_path / "config.json").read_text())["packings"] == both
    said = in_process(monkeypatch, capsys, *common, "--dropout", 0.1, "--micro-tokens", 200, "--seeds", 0, 1)
    assert f"was made with several of {both}" in said, "what the first command made is still used"


def test_an_interrupted_training_says_where(setting, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", stop)
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", *FAST, "--out", tmp_path / "run"]
    said = in_process(monkeypatch, capsys, *common, code=130)
    assert "reference after step 0 of" in said and "the same command goes on" in said and "Traceback" not in said


def test_help_comes_in_groups(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["forgetting.py", "--help"])
    with pytest.raises(SystemExit):
        __import__("forgetting").main()
    said = capsys.readouterr().out
    groups = ["data", "method", "LoRA", "training", "memory and speed", "evaluation", "run"]
    places = [said.index(f"\n{group}:\n") for group in groups]
    assert places == sorted(places)


def test_prompts_are_answered_side_by_side(setting, finished, monkeypatch, capsys):
    adapters = [str(finished / name / "seed-0") for name in ("full", "forgetting")]
    import eval as evaluation

    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(setting / "model"), "--prompt", "Tell me 3", "--adapter", *adapters])
    evaluation.main()
    said = capsys.readouterr().out
    assert said.startswith("> Tell me 3\n[base] ") and said.count("/seed-0] ") == 2
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(setting / "model"), "--prompt", "-"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tell me 3\nTell me 4\n"))
    evaluation.main()
    said = capsys.readouterr().out
    assert "> Tell me 3\n[base] " in said and "> Tell me 4\n[base] " in said


def test_points_of_a_held_out_loss_without_its_rows_are_refused():
    with pytest.raises(ValueError, match="--eval-every needs --eval-data"):
        Options(eval_every=5)


def test_an_adapter_folder_is_whole_for_others(finished):
    folder = finished / "forgetting/seed-0"
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: ") and "- t_max: 0.25" in card and "library_name: peft" in card
    assert (folder / "chat_template.jinja").read_text() == (finished / "full/seed-0/merged/chat_template.jinja").read_text()
    assert "- rho: 0.7\n" in card, "the method's own, where --rho does not say"
    for name, rho in (("full/seed-0", 1.0), ("reference", 1.0), ("ignoring/seed-0", 0.5)):
        card = (finished / name / "README.md").read_text()
        assert f"- rho: {rho}\n" in card and "t_max" not in card, name
        assert (finished / name / "tokenizer.json").is_file() and (finished / name / "chat_template.jinja").is_file()


def test_a_model_card_of_ones_own_stays(finished, tmp_path, monkeypatch):
    """publish.py by hand: what its owner wrote into README.md is not replaced; the merged checkpoint comes on request."""
    folder = shutil.copytree(finished, tmp_path / "run") / "ignoring/seed-0"
    (folder / "README.md").write_text("mine")
    shutil.rmtree(folder / "merged")
    done = run(tmp_path / "run", "--merged", script="tests/tools/publish.py")
    assert done.returncode == 0 and (folder / "README.md").read_text() == "mine" and (folder / "merged/config.json").is_file()


@pytest.mark.parametrize("name, unread", [("full:rho=0.5", "rho"), ("ignoring:t_max=1", "t_max"), ("full-P:forget_rate=0.1", "forget_rate")])
def test_a_variant_by_an_option_its_method_does_not_read_is_refused(name, unread):
    """It was trained under its own name, and was the plain method."""
    with pytest.raises(ValueError, match=f"does not read {unread}"):
        parse_options(["--model", "m", "--data", "d", "--methods", name])


@pytest.mark.parametrize("flags, warned", [("avx2 fma", True), ("avx2 avx512_bf16", False)])
def test_bfloat16_without_instructions_for_it_is_warned_about(setting, tmp_path, monkeypatch, capsys, flags, warned):
    import forgetting

    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    warn = partial(forgetting.warn_if_slow, listed=tmp_path / "cpuinfo")
    monkeypatch.setattr(forgetting, "warn_if_slow", warn)
    said = in_process(monkeypatch, capsys, "--model", setting / "model", "--data", setting / "rows.jsonl", *FAST, "--methods", "base",
                      "--out", tmp_path / "run", "--dtype", "bfloat16")  # fmt: skip
    assert ("no instructions for bfloat16" in said) == warned


@pytest.mark.parametrize("name", ["m.gguf", "M.GGUF"])
def test_gguf_is_named(setting, tmp_path, monkeypatch, capsys, name):
    said = in_process(monkeypatch, capsys, "--model", name, "--data", setting / "rows.jsonl", "--out", tmp_path / "run", code=2)
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
    assert checkpoint_folder(str(tmp_path / "m")) == tmp_path / "m"


@pytest.mark.parametrize("entry", ["a.gguf", "A.GGUF:5"])
def test_gguf_for_rows_is_named(setting, tmp_path, monkeypatch, capsys, entry):
    (tmp_path / entry.partition(":")[0]).write_bytes(b"GGUF\xff")
    common = ["--model", setting / "model", "--data", tmp_path / entry, "--out", tmp_path / "run"]
    said = in_process(monkeypatch, capsys, *common, code=2)
    assert f"{entry.partition(':')[0]}: GGUF, a model, not rows; transformers converts it" in said


@pytest.mark.parametrize("program", ["forgetting.py", "eval.py", "run.sh"])
def test_a_typo_is_answered_before_torch_is_loaded(program):
    """It took 6 to 8 seconds: torch was imported twice before anything was parsed."""
    began = time.perf_counter()
    command = ["bash", str(ROOT / program)] if program == "run.sh" else [sys.executable, str(ROOT / program)]
    done = subprocess.run([*command, "--modle", "m"], capture_output=True, text=True)
    said = f"{program.replace('run.sh', 'forgetting.py')}: unrecognized arguments: --modle (--help lists the flags)\n"
    assert done.returncode == 2 and done.stderr == said and time.perf_counter() - began < 1
    done = subprocess.run([*command, "-m", "m"], capture_output=True, text=True)
    assert done.returncode == 2 and "unrecognized arguments: -m" in done.stderr


@pytest.mark.parametrize("program", ["forgetting.py", "eval.py", "tests/tools/launch.py"])
def test_an_interrupt_while_loading_is_one_line(program):
    """It was a traceback of up to 40 lines out of torch's imports."""
    process = subprocess.Popen([sys.executable, str(ROOT / program), "--help"], stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)  # torch takes longer
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said == "\nstopped while loading\n"


def test_every_flag_is_known_to_the_quick_check():
    """What the parsers accept, check_flags lets pass."""
    from forgetting import make_parser
    from tools.check_flags import known_flags

    flags = {flag for action in make_parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert flags | {"--world", "--svg"} <= known_flags("forgetting.py") and "--samples" in known_flags("eval.py")


def test_held_out_loss_while_training(setting, tmp_path, monkeypatch, capsys):
    """Every --eval-every steps a line of metrics.jsonl has it; the last is that of the table, and the training is the same."""
    held = [{"instruction": f"Tell me {i}", "output": "the quick brown fox"} for i in range(100, 104)]
    write_rows(held, tmp_path / "held.jsonl")
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", *FAST, "--methods", "full", "--dropout", 0.1,
              "--eval-data", tmp_path / "held.jsonl"]  # fmt: skip
    in_process(monkeypatch, capsys, *common, "--out", tmp_path / "a", "--eval-every", 2)
    in_process(monkeypatch, capsys, *common, "--out", tmp_path / "b")
    lines = [json.loads(line) for line in (tmp_path / "a/full/seed-0/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held-out" in line] == list(range(1, len(lines), 2))
    if len(lines) % 2 == 0:
        last = json.loads((tmp_path / "a/full/seed-0/results.json").read_text())["held-out"]
        assert lines[-1]["held-out"] == pytest.approx(last, rel=1e-5)
    adapters = [(tmp_path / run / "full/seed-0/adapter_model.safetensors").read_bytes() for run in "ab"]
    assert adapters[0] == adapters[1]


def test_a_run_of_an_earlier_version_goes_on(setting, tmp_path, monkeypatch, capsys):
    """An option that its config.json does not know had its default; another value is refused by name."""
    common = ["--model", setting / "model", "--data", setting / "rows.jsonl", *FAST, "--methods", "full", "--out", tmp_path]
    in_process(monkeypatch, capsys, *common)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["inputs"]["balance"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "skipping" in in_process(monkeypatch, capsys, *common)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "was made with other balance (there 0.5, now 0.7)" in in_process(monkeypatch, capsys, *common, "--balance", 0.7, code=2)


def test_importing_does_not_load_the_compiler():
    """torch.nn.attention.varlen brings torch._dynamo along: every command on a CPU began 3.6 seconds later for it."""
    code = "import sys, forgetting; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
