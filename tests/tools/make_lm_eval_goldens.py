"""Store what lm-evaluation-harness 0.4.13 gives for the documents of rows.py on the tiny LLaMA-2 of tiny.py.

    /path/to/peers/bin/python tests/tools/make_lm_eval_goldens.py        # needs lm_eval[ifeval], run by hand

Its own task files are used, with the data set replaced by a local file and TruthfulQA's fixed questions by ours.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
import lm_eval.tasks  # noqa: E402
from lm_eval import evaluator  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

HERE = Path(__file__).resolve().parent.parent  # tests/, where tiny.py, rows.py and goldens/ are
sys.path.insert(0, str(HERE))
import rows  # noqa: E402
import tiny  # noqa: E402

TASK_FILES = {  # our name: (lm-eval's task file below lm_eval/tasks, split)
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "logiqa": ("logiqa/logiqa.yaml", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1.yaml", "validation"),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "validation"),
    "lambada": ("lambada/lambada_openai.yaml", "test"),
    "asdiv": ("asdiv/default.yaml", "validation"),
    "arithmetic_2da": ("arithmetic/arithmetic_2da.yaml", "validation"),
}


def local_task(name: str, folder: Path, pairs: str = rows.TRUTHFULQA_PROMPT) -> ConfigurableTask:
    """lm-eval's task over a file of ours, any subtask of arithmetic too; `pairs` stand before TruthfulQA's questions."""
    file = folder / f"{name.split('_mc')[0]}.jsonl"
    if name.startswith("arithmetic_"):
        path, split = f"arithmetic/{name}.yaml", "validation"
        file = own_rows(name, folder / "arithmetic.jsonl")
    else:
        path, split = TASK_FILES[name]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / path)
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file)}},
    }
    config |= {
        f"{kind}_split": split if kind == split else None
        for kind in ("training", "validation", "test", "fewshot")
    }
    config.pop("tag", None)
    if name.startswith("truthfulqa"):
        config["doc_to_text"] = json.dumps(pairs)[1:-1].replace("\\n", "\n") + "\n\nQ: {{question}}\nA:"
    return ConfigurableTask(config=config)


def own_rows(subtask: str, path: Path) -> Path:
    """A file with the rows of one subtask of arithmetic, whose ten are in one file here."""
    lines = path.read_text(encoding="utf-8").splitlines()
    own = [line for line in lines if json.loads(line)["subtask"] == subtask]
    file = Path(tempfile.mkdtemp()) / f"{subtask}.jsonl"
    file.write_text("\n".join(own) + "\n", encoding="utf-8")
    return file


def request_goldens() -> dict:
    """By task and document: log-likelihoods, greedy flags, metrics; and the task's aggregate."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        checkpoint = tiny.make_checkpoint(folder / "m", "llama2")
        for file, documents in rows.ROWS.items():
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
        model = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=1)
        tasks = {name: local_task(name, folder) for name in TASK_FILES}
        out = evaluator.evaluate(lm=model, task_dict=tasks, log_samples=True, bootstrap_iters=0)
    goldens = {}
    for name in TASK_FILES:
        documents = []
        for sample in sorted(out["samples"][name], key=lambda s: s["doc_id"]):
            answers = [response[0] for response in sample["resps"]]
            metrics = {m: sample[m] for m in ("acc", "acc_norm") if m in sample}
            sums, greedy = [float(a[0]) for a in answers], [bool(a[1]) for a in answers]
            documents.append({"loglikelihoods": sums, "greedy": greedy} | metrics)
        aggregate = {
            k.split(",")[0]: v
            for k, v in out["results"][name].items()
            if isinstance(v, float) and "stderr" not in k
        }
        goldens[name] = {"documents": documents, "aggregate": aggregate}
    return goldens


def ifeval_goldens() -> list:
    """Strict and loose verdicts on every canned reply, instruction by instruction."""
    from lm_eval.tasks.ifeval.utils import process_results

    goldens = []
    for ids, arguments, replies in rows.IFEVAL:
        document = {"key": 0, "prompt": "p", "instruction_id_list": ids, "kwargs": arguments}
        for reply in replies:
            found = process_results(document, [reply])
            goldens.append(
                [[float(x) for x in found[f"inst_level_{kind}_acc"]] for kind in ("strict", "loose")]
            )
    return goldens


if __name__ == "__main__":
    goldens = {"requests": request_goldens(), "ifeval": ifeval_goldens()}
    path = HERE / "goldens" / "lm_eval.json"
    path.write_text(json.dumps(goldens, indent=1) + "\n")
    print(path, {name: golden["aggregate"] for name, golden in goldens["requests"].items()})
