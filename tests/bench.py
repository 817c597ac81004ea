"""Time this project against the usual stack on one machine, interleaved: ours, theirs, ours, theirs, ...

    python tests/bench.py evaluate --model SMOLLM2 --data-dir ../shared/data/benchmarks --peers /path/to/peers/bin/python

Each run is a process of its own that loads the model, warms up, and times the evaluation alone. Without --peers only ours
is timed. Ratios are of medians; these machines are noisy, so a ratio means more than a rate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
JOBS = {"logiqa": 100, "arc_challenge": 200, "boolq": 100}  # task: documents


def time_ours(arguments: argparse.Namespace) -> float:
    """Seconds for one task with eval.py."""
    sys.path.insert(0, str(HERE.parent))
    from data import Tokenizer
    from eval import evaluate
    from model import DTYPES, load_model

    model, tokenizer = load_model(arguments.model, dtype=DTYPES[arguments.dtype]), Tokenizer(arguments.model)
    evaluate(model, tokenizer, [arguments.task], arguments.data_dir, limit=2)
    began = time.perf_counter()
    evaluate(model, tokenizer, [arguments.task], arguments.data_dir, limit=JOBS[arguments.task])
    return time.perf_counter() - began


def time_lm_eval(arguments: argparse.Namespace) -> float:
    """Seconds for the same documents with lm-evaluation-harness, --model hf."""
    sys.path.insert(0, str(HERE))
    import make_lm_eval_goldens
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=arguments.model, dtype=arguments.dtype, device="cpu", batch_size=arguments.batch_size)
    run = lambda limit: evaluator.evaluate(
        lm=model,
        task_dict={arguments.task: make_lm_eval_goldens.local_task(arguments.task, Path(arguments.data_dir))},
        limit=limit,
        bootstrap_iters=0,
    )
    run(2)
    began = time.perf_counter()
    run(JOBS[arguments.task])
    return time.perf_counter() - began


def once(python: str, who: str, task: str, arguments: argparse.Namespace, batch_size: int = 1) -> float:
    """One measurement in a fresh process."""
    command = [python, str(Path(__file__)), who, "--task", task, "--model", arguments.model, "--dtype", arguments.dtype]
    command += ["--data-dir", arguments.data_dir, "--batch-size", str(batch_size)]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def evaluate_job(arguments: argparse.Namespace) -> None:
    """The table: seconds of both (median), the peer's best batch size, and the ratio."""
    for task in arguments.tasks:
        ours, peers = [], {}
        for _ in range(arguments.repeats):
            ours.append(once(sys.executable, "ours", task, arguments))
            for size in arguments.batch_sizes if arguments.peers else ():
                peers.setdefault(size, []).append(once(arguments.peers, "lm_eval", task, arguments, size))
        line = f"{task:14} {arguments.dtype:9} ours {statistics.median(ours):6.1f} s"
        if peers:
            best = min(peers, key=lambda size: statistics.median(peers[size]))
            theirs = statistics.median(peers[best])
            line += f"  lm_eval (batch {best}) {theirs:6.1f} s  ratio {theirs / statistics.median(ours):.2f}"
        print(line, {"ours": ours, **peers}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["evaluate", "ours", "lm_eval"], help="ours and lm_eval are single runs")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--peers", help="a Python that has lm_eval")
    parser.add_argument("--tasks", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--task", help="of a single run")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.job == "evaluate":
        evaluate_job(arguments)
    else:
        print(json.dumps((time_ours if arguments.job == "ours" else time_lm_eval)(arguments)))


if __name__ == "__main__":
    main()
