"""Time this project against the usual stack on one machine, interleaved: ours, theirs, ours, theirs, ...

    python tests/tools/bench.py train    --model SMOLLM2 --data rows.jsonl --peers /path/to/peers/bin/python
    python tests/tools/bench.py score    --model SMOLLM2 --data rows.jsonl --peers ... --dtypes float32 bfloat16
    python tests/tools/bench.py evaluate --model SMOLLM2 --data-dir benchmarks/ --peers ...
    python tests/tools/bench.py partition

Every measurement is a process of its own, on --threads cores: it loads the model, runs the job once on other examples
(evaluate: on two documents), and times it alone. Printed are the medians over --repeats: useful tokens a second (no padding,
shared contexts once), the peak of the process's memory (on a GPU: of the memory allocated), the share of the arithmetic floor,
which is the time that the counted FLOPs take at the matrix-product rate measured beside the job, and the ratios. Machines are
noisy: trust ratios.

transformers: as usually written. Training pads micro-batches of 6 and takes full logits; scoring loads base and merged
reference and runs one example at a time; evaluation is lm_eval at batch 1. The second peer is the better one: TRL's
SFTTrainer, padding-free, micro-batch 3; PEFT with the adapter off and on over padding-free packs of 3; lm_eval at batch 8.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable

HERE = Path(__file__).resolve().parent
LORA = {"r": 64, "alpha": 16}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORKERS = {"train": ["ours", "transformers", "trl"], "score": ["ours", "transformers", "peft"],
           "evaluate": ["ours", "lm_eval-1", "lm_eval-8"], "partition": ["ours"]}  # fmt: skip


# ------------------------------------------------------------------------------------------------- one measurement


def ours(job: str, task: dict) -> Callable[[list[int]], None]:
    """A function that runs the job on some examples, with this project."""
    sys.path.insert(0, str(HERE.parent.parent))
    import numpy as np
    import torch

    import forgetting
    from data import Corpus, Tokenizer
    from eval import evaluate, prepare
    from lora import add_lora, lora_disabled, lora_parameters
    from model import DTYPES, load_model

    model = load_model(task["model"], task["device"], DTYPES[task["dtype"]])
    if job == "evaluate":
        tokenizer = Tokenizer(task["model"])
        documents = lambda count: prepare([task["task"]], tokenizer, task["data_dir"], limit=count)
        return lambda examples: evaluate(model, tokenizer, documents(len(examples)))
    rows = task["rows"]
    offsets = np.cumsum([0] + [len(row["ids"]) for row in rows])
    response = np.concatenate([row["response"] for row in rows])
    corpus = Corpus(np.concatenate([row["ids"] for row in rows]), response, offsets, [""] * len(rows), 0)
    options = forgetting.Options(device=task["device"], dtype=task["dtype"], micro_tokens=task["micro_tokens"])
    add_lora(model, options.rank, options.alpha, options.dropout)
    parameters = lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0, fused=True)
    if job == "score":
        for name, parameter in parameters.items():
            parameter.data.normal_(0, 0.02)

        def score(examples: list[int]) -> None:
            forgetting.response_losses(model, corpus, np.array(examples), options.micro_tokens, "theta'")
            with lora_disabled(model):
                forgetting.response_losses(model, corpus, np.array(examples), options.micro_tokens, "theta")

        return score
    places = np.arange(len(response))  # about 30 % of the response tokens are unlearned, as in the recipe
    signs = np.where(response, np.where(places * 7 % 10 < 3, -1, 1), 0).astype(np.int8)

    def step(examples: list[int]) -> None:
        model.train()
        optimizer.zero_grad(set_to_none=False)
        forgetting.step_gradient(model, corpus, signs, np.array(examples), 0.1, options)
        optimizer.step()

    return step


def peft_model(task: dict):
    """The peers' model: transformers with PEFT's adapter on all linear layers."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(task["model"], dtype=getattr(torch, task["dtype"]))
    config = peft.LoraConfig(
        r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=0.1, target_modules=LINEAR, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model.to(task["device"]), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    return model


def padded(rows: list[dict], device: str) -> dict:
    """A padded batch with labels, as the usual collator makes it."""
    import torch

    longest = max(len(row["ids"]) for row in rows)
    fill = lambda values, filler: values + [filler] * (longest - len(values))
    labels = [[t if r else -100 for t, r in zip(row["ids"], row["response"])] for row in rows]
    batch = {
        "input_ids": [fill(row["ids"], 0) for row in rows],
        "attention_mask": [fill([1] * len(row["ids"]), 0) for row in rows],
        "labels": [fill(label, -100) for label in labels],
    }
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}


def transformers_peft(job: str, task: dict) -> Callable[[list[int]], None]:
    """The job as it is usually written."""
    import torch

    rows, model = task["rows"], peft_model(task)
    if job == "train":
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step(examples: list[int]) -> None:
            for start in range(0, len(examples), 6):
                part = examples[start : start + 6]
                batch = padded([rows[i] for i in part], task["device"])
                (model(**batch).loss * len(part) / len(examples)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step
    reference = model.merge_and_unload().eval()
    base = type(reference).from_pretrained(task["model"], dtype=reference.dtype).to(task["device"]).eval()

    def score(examples: list[int]) -> None:
        with torch.inference_mode():
            for i in examples:
                batch = padded([rows[i]], task["device"])
                for scorer in (base, reference):
                    logits = scorer(input_ids=batch["input_ids"]).logits[0, :-1].float()
                    torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:], reduction="none")

    return score


def peft_padding_free(job: str, task: dict) -> Callable[[list[int]], None]:
    """Scoring with one model, its adapter off and on, three examples end to end."""
    import torch

    rows, model = task["rows"], peft_model(task).eval()

    def score(examples: list[int]) -> None:
        with torch.inference_mode():
            for start in range(0, len(examples), 3):
                part = [rows[i] for i in examples[start : start + 3]]
                ids = torch.tensor([[t for row in part for t in row["ids"]]], device=task["device"])
                positions = torch.tensor([[p for row in part for p in range(len(row["ids"]))]], device=task["device"])
                labels = [t if r else -100 for row in part for t, r in zip(row["ids"], row["response"])]
                run = lambda: model(input_ids=ids, position_ids=positions).logits[0, :-1].float()
                targets = torch.tensor(labels[1:], device=task["device"])
                torch.nn.functional.cross_entropy(run(), targets, reduction="none")
                with model.disable_adapter():
                    torch.nn.functional.cross_entropy(run(), targets, reduction="none")

    return score


def trl(job: str, task: dict) -> Callable[[list[int]], float]:
    """SFTTrainer, padding-free; returns the seconds of its own optimiser step."""
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    rows, model = task["rows"], peft_model(task)
    tokenizer = transformers.AutoTokenizer.from_pretrained(task["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    class Clock(transformers.TrainerCallback):
        began = seconds = 0.0

        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.seconds = time.perf_counter() - self.began

    def step(examples: list[int]) -> float:
        clock = Clock()
        some = [{"input_ids": rows[i]["ids"], "completion_mask": [int(r) for r in rows[i]["response"]]} for i in examples]
        config = SFTConfig(
            output_dir=tempfile.mkdtemp(), padding_free=True, per_device_train_batch_size=3, max_steps=1, report_to=[],
            gradient_accumulation_steps=-(-len(some) // 3), completion_only_loss=True, gradient_checkpointing=False,
            max_length=None, use_cpu=task["device"] == "cpu", save_strategy="no", disable_tqdm=True, bf16=False, fp16=False,
        )  # fmt: skip
        dataset = datasets.Dataset.from_list(some)
        SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock]).train()
        return clock.seconds

    return step


def lm_eval(batch_size: int) -> Callable[[str, dict], Callable[[list[int]], None]]:
    """lm-evaluation-harness on the same documents."""

    def prepare(job: str, task: dict) -> Callable[[list[int]], None]:
        sys.path.insert(0, str(HERE))
        import make_lm_eval_goldens
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        device = task["device"]
        model = HFLM(pretrained=task["model"], dtype=task["dtype"], device=device, batch_size=batch_size)
        tasks = {task["task"]: make_lm_eval_goldens.local_task(task["task"], Path(task["data_dir"]))}
        return lambda examples: evaluator.evaluate(lm=model, task_dict=tasks, limit=len(examples), bootstrap_iters=0)

    return prepare


def gemm_rate(dtype: str, device: str) -> float:
    """FLOPs a second of a square matrix product: what the arithmetic could run at."""
    import torch

    x, y = (torch.randn(2048, 2048, device=device).to(getattr(torch, dtype)) for _ in range(2))
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        x @ y
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def peak_bytes(device: str, reset: bool = False) -> int:
    """The most memory held since the last reset: resident on a CPU, allocated on a GPU."""
    if device != "cpu":
        import torch

        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(job: str, who: str, task: dict) -> dict:
    """Run one measurement in this process."""
    if job == "partition":
        return measure_partition()
    prepare = {"ours": ours, "transformers": transformers_peft, "peft": peft_padding_free, "trl": trl,
               "lm_eval-1": lm_eval(1), "lm_eval-8": lm_eval(8)}[who]  # fmt: skip
    run = prepare(job, task)
    run(task["warm_up"])
    peak_bytes(task["device"], reset=True)
    began = time.perf_counter()
    own = run(task["examples"])
    if task["device"] != "cpu":
        import torch

        torch.cuda.synchronize()
    seconds = own if isinstance(own, float) else time.perf_counter() - began
    return {"seconds": seconds, "peak": peak_bytes(task["device"]), "gemm": gemm_rate(task["dtype"], task["device"])}


def measure_partition() -> dict:
    """Equations 6 and 7 on 20 million scores: seconds, and by how much they raised the peak."""
    sys.path.insert(0, str(HERE.parent.parent))
    import numpy as np

    from forgetting import partition

    quality = np.random.default_rng(0).standard_normal(20_000_000, dtype=np.float32)
    before = peak_bytes("cpu", reset=True)
    began = time.perf_counter()
    positive, _ = partition(quality, 0.7)
    return {"seconds": time.perf_counter() - began, "peak": peak_bytes("cpu") - before, "share": float(positive.mean())}


# ------------------------------------------------------------------------------------------------------ the figures


def rows_of(model: str, files: list[str], count: int) -> list[dict]:
    """Token ids and response masks, made once for everybody, cut to 512 tokens."""
    sys.path.insert(0, str(HERE.parent.parent))
    from data import Tokenizer, build_corpus, read_rows

    corpus = build_corpus(read_rows(files)[:count], Tokenizer(model), max_length=512)
    spans = list(zip(corpus.offsets, corpus.offsets[1:]))
    return [{"ids": corpus.tokens[a:b].tolist(), "response": corpus.response[a:b].tolist()} for a, b in spans]


def flops(job: str, model: str, lengths: list[int], judged: int) -> float:
    """Multiply-adds that cannot be avoided, times two: base and reference once each, or one training step.

    Attention counts half of the square (causal), backward 2.5 times forward; a frozen weight costs 2 FLOPs a parameter and
    token forward and 2 backward, an adapter's 2 and 4; the head runs on judged tokens only.
    """
    raw = json.loads((Path(model) / "config.json").read_text())
    width, inner, layers, heads = (
        raw[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    )
    head_dim = raw.get("head_dim") or width // heads
    q, kv = heads * head_dim, raw.get("num_key_value_heads", heads) * head_dim
    shapes = [(width, q), (width, kv), (width, kv), (q, width), (width, inner), (width, inner), (inner, width)]
    body = layers * sum(a * b for a, b in shapes)
    adapter = layers * sum(LORA["r"] * (a + b) for a, b in shapes)
    head, tokens = raw["vocab_size"] * width, sum(lengths)
    attention = layers * sum(2 * q * n * n for n in lengths)
    if job == "train":
        return tokens * (4 * body + 6 * adapter) + 3.5 * attention + 4 * head * judged
    passes = 2 if job == "score" else 1
    return passes * (2 * body * tokens + attention + 2 * head * judged) + (2 * adapter * tokens if job == "score" else 0)


def evaluation_tokens(arguments: argparse.Namespace, documents: int) -> tuple[list[int], int]:
    """Lengths of what must run when contexts are shared: each context once, and all but a choice's last token."""
    sys.path.insert(0, str(HERE.parent.parent))
    import eval as evaluation
    from data import Tokenizer

    tokenizer = Tokenizer(arguments.model)
    lengths, judged = [], 0
    for requests in evaluation.prepare([arguments.task], tokenizer, arguments.data_dir, documents)[0].requests:
        pairs = [evaluation.encode_pair(tokenizer, request.context, request.continuation) for request in requests]
        lengths.append(len(pairs[0][0]) + sum(len(continuation) - 1 for _, continuation in pairs))
        judged += sum(len(continuation) for _, continuation in pairs)
    return lengths, judged


def in_a_process(who: str, task: dict, arguments: argparse.Namespace) -> dict:
    """One measurement in a fresh process, on --threads cores."""
    python = sys.executable if who == "ours" else arguments.peers
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(task, file)
        file.flush()
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[-arguments.threads :]))
        worker = [str(HERE / "bench.py"), arguments.job, "--worker", who, "--task-file", file.name]
        command = ["taskset", "-c", cores, python, *worker]
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
        environment |= {"THP_MEM_ALLOC_ENABLE": "1"}  # for everybody: see run.sh
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{who}: {done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(arguments: argparse.Namespace, dtype: str) -> None:
    """The interleaved runs of one job in one precision, and their table."""
    job = arguments.job
    task = {"model": arguments.model, "dtype": dtype, "device": arguments.device, "micro_tokens": arguments.micro_tokens}
    task |= {"task": arguments.task, "data_dir": arguments.data_dir, "examples": [], "rows": []}
    if job in ("train", "score"):
        task["rows"] = rows_of(arguments.model, arguments.data, 24 * arguments.repeats)
        if len(task["rows"]) < 24 * arguments.repeats:
            raise SystemExit(f"--data has {len(task['rows'])} usable rows, {24 * arguments.repeats} are needed")
    found: dict[str, list[dict]] = {who: [] for who in WORKERS[job] if who == "ours" or arguments.peers}
    for repeat in range(arguments.repeats):
        task["examples"], task["warm_up"], tokens, work = list(range(12)), [0, 1], 0, 0.0
        if job in ("train", "score"):
            task["examples"] = list(range(24 * repeat, 24 * repeat + 12))  # the first half of each batch of 24
            task["warm_up"] = list(range(24 * repeat + 12, 24 * repeat + 24))
            some = [task["rows"][i] for i in task["examples"]]
            lengths, judged = [len(row["ids"]) for row in some], sum(sum(row["response"]) for row in some)
            tokens, work = sum(lengths), flops(job, arguments.model, lengths, judged)
        if job == "evaluate":
            lengths, judged = evaluation_tokens(arguments, 12)
            tokens, work = sum(lengths), flops(job, arguments.model, lengths, judged)
        for who in found:
            result = in_a_process(who, task, arguments)
            result |= {"rate": tokens / result["seconds"], "floor": work / result.get("gemm", 1) / result["seconds"]}
            found[who].append(result)
            print(f"  {job} {dtype} {who} {repeat}: {result}", file=sys.stderr, flush=True)
    middle = {who: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for who, runs in found.items()}
    for who, figures in middle.items():
        ratios = [theirs["seconds"] / own["seconds"] for theirs, own in zip(found[who], found["ours"])]
        line = f"{job:9} {dtype:8} {who:13} {figures['seconds']:8.2f} s  peak {figures['peak'] / 1e9:6.2f} GB"
        if tokens:
            line += (
                f"  {figures['rate']:8.0f} tokens/s  {figures['floor']:.2f} of the floor ({figures['gemm'] / 1e9:.0f} GFLOP/s)"
            )
        if who != "ours":
            line += f"  ours is {statistics.median(ratios):.2f} x as fast [{' '.join(f'{r:.2f}' for r in ratios)}]"
        print(line, flush=True)


def cpu_features() -> list[str]:
    """Which vector and matrix instructions this processor has, as Linux names them; [] where it does not say."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.is_file() else set()
    return sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "bf16", "sve"})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=list(WORKERS))
    parser.add_argument("--model", help="a checkpoint folder")
    parser.add_argument("--data", nargs="+", default=[], help="instruction rows, for train and score")
    parser.add_argument("--data-dir", help="benchmark rows, for evaluate")
    parser.add_argument("--task", default="logiqa", help="for evaluate; its first 12 documents")
    parser.add_argument("--peers", help="a Python that has transformers, peft, trl and lm_eval")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--micro-tokens", type=int, help="of ours [forgetting.py's default]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--task-file", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.job, arguments.worker, json.loads(Path(arguments.task_file).read_text()))))
        return
    dtypes = arguments.dtypes if arguments.job != "partition" else ["float32"]
    if arguments.device == "cpu":
        features = cpu_features()
        print("processor:", " ".join(features) or "features unknown")
        if "bfloat16" in dtypes and features and not any("bf16" in feature for feature in features):
            print("bfloat16 left out: this processor has no instructions for it, and takes 13 times as long as in float32")
            dtypes = [dtype for dtype in dtypes if dtype != "bfloat16"]
    for dtype in dtypes:
        compare(arguments, dtype)


if __name__ == "__main__":
    main()
