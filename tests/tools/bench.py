"""Time this project against the usual stack on one machine, interleaved: ours, theirs, ours, theirs, ...

    ./run.sh bench train    --model SMOLLM2 --data rows.jsonl --peers /path/to/peers/bin/python
    ./run.sh bench score    --model SMOLLM2 --data rows.jsonl --peers ... --dtypes float32 bfloat16
    ./run.sh bench evaluate --model SMOLLM2 --data-dir benchmarks/ --peers ... --task truthfulqa_mc1 --count 40
    ./run.sh bench generate --model SMOLLM2 --data-dir benchmarks/ --peers ... --task ifeval --count 32
    ./run.sh bench prepare  --model SMOLLM2 --data rows.jsonl --peers ...
    ./run.sh bench run      --model SMOLLM2 --data rows.jsonl --before /path/to/another/checkout
    ./run.sh bench partition

Every measurement is a process of its own, on --threads cores: it loads the model, runs the job once on other examples
(evaluate: on two documents), and times it alone. Printed are the medians over --repeats: useful tokens a second (no padding),
the peak of the process's memory (on a GPU: of the memory allocated), and the ratios. On one thread of a CPU a second is one
of CPU time, so that other processes count less. Machines are noisy: trust ratios.
Few CPUs have instructions for bfloat16; without them it takes 13 times as long.
With --before another checkout of this project runs every job, too, in turn with this one.

transformers: as usually written. Training pads micro-batches of 6 and takes full logits; scoring loads base and merged
reference and runs one example at a time; evaluation is lm_eval at batch 1; generation is transformers.generate on 16 prompts
at once. The second peer is the better one: TRL's SFTTrainer, padding-free, micro-batch 3; PEFT with the adapter off and on
over padding-free packs of 3; lm_eval at batch 8 and 16. Rows are prepared by SFTTrainer, which is datasets.map with TRL's
tokenisation.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent))  # last: no package of the peers may find a file of ours
WORKERS = {
    "train": ["ours", "before", "transformers", "trl"],
    "score": ["ours", "before", "transformers", "peft"],
    "evaluate": ["ours", "before", "lm_eval-1", "lm_eval-8"],
    "generate": ["ours", "before", "lm_eval-1", "lm_eval-8", "lm_eval-16", "transformers"],
    "prepare": ["ours", "before", "trl"],
    "run": ["ours", "before"],
    "partition": ["ours", "before"],
}


# ------------------------------------------------------------------------------------------------- one measurement


def ours(job: str, task: dict) -> Callable[[list[int]], None]:
    """A function that runs the job on some examples, with this project."""
    import numpy as np
    import torch

    import forgetting
    from data import Corpus, Tokenizer
    from eval import evaluate, prepare
    from lora import add_lora, lora_disabled, lora_parameters
    from model import DTYPES, load_model

    if job == "prepare":
        return prepare_rows(task)
    model = load_model(task["model"], task["device"], DTYPES[task["dtype"]])
    if job == "generate":
        from eval import generate

        tokenizer = Tokenizer(task["model"])
        ids = [ids for ids, _ in tokenizer.encode([prompt["text"] for prompt in task["prompts"]])]
        settings = task["prompts"][0]["new_tokens"], task["prompts"][0]["stop"]
        return lambda examples: generate(model, tokenizer, [ids[i] for i in examples], *settings)
    if job == "evaluate":
        tokenizer = Tokenizer(task["model"])
        documents = lambda count: prepare([task["task"]], tokenizer, task["data_dir"], limit=count)
        return lambda examples: evaluate(model, tokenizer, documents(len(examples)))
    rows = task["rows"]
    offsets = np.cumsum([0] + [len(row["ids"]) for row in rows])
    response = np.concatenate([row["response"] for row in rows])
    corpus = Corpus(np.concatenate([row["ids"] for row in rows]), response, offsets, [""] * len(rows), 0)
    options = forgetting.Options(
        device=task["device"], dtype=task["dtype"], micro_tokens=task["micro_tokens"]
    )
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


def prepare_rows(task: dict) -> Callable[[list[int]], None]:
    """Rows as token ids and response masks, by this project."""
    from data import Tokenizer, build_corpus

    tokenizer = Tokenizer(task["model"])

    def run(examples: list[int]) -> None:
        rows = many_rows(task["data"], len(examples))
        began = clock(task)
        build_corpus(rows, tokenizer)
        return clock(task) - began

    return run


def many_rows(paths: list[str], count: int) -> list[dict]:
    """The prompt-completion rows of instruction rows, over and over with another number in front, as many as asked for."""
    lines = [line for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in lines]
    texts = [(f"{row['instruction']}\n{row.get('input') or ''}", row["output"]) for row in rows]
    found = []
    for i in range(count):
        prompt, completion = texts[i % len(texts)]
        found.append({"prompt": f"{i} {prompt}\n", "completion": completion})
    return found


def peft_model(task: dict):
    """The peers' model: transformers with PEFT's adapter on all linear layers."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        task["model"], dtype=getattr(torch, task["dtype"])
    )
    config = peft.LoraConfig(
        r=64, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
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
        "labels": [fill(label, -100) for label in labels],
        "attention_mask": [fill([1] * len(row["ids"]), 0) for row in rows],
    }
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}


def transformers_peft(job: str, task: dict) -> Callable[[list[int]], None]:
    """The job as it is usually written."""
    import torch

    if job == "generate":
        return transformers_generate(task)
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


def transformers_generate(task: dict) -> Callable[[list[int]], list[str]]:
    """transformers.generate on 16 prompts at once, padded on the left, the longest first."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = getattr(torch, task["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype).to(task["device"])
    prompts = task["prompts"]

    def write(examples: list[int]) -> list[str]:
        in_order = sorted(examples, key=lambda i: -len(prompts[i]["text"]))
        texts = {}
        for start in range(0, len(in_order), 16):
            some = in_order[start : start + 16]
            batch = tokenizer([prompts[i]["text"] for i in some], return_tensors="pt", padding=True)
            settings = {"max_new_tokens": prompts[0]["new_tokens"], "do_sample": False}
            if prompts[0]["stop"] is not None:
                settings |= {"stop_strings": [prompts[0]["stop"]], "tokenizer": tokenizer}
            written = model.generate(**batch.to(task["device"]), **settings)
            new = written[:, batch["input_ids"].shape[1] :]
            texts |= zip(some, tokenizer.batch_decode(new, skip_special_tokens=True))
        return [texts[i].split(prompts[0]["stop"])[0] if prompts[0]["stop"] else texts[i] for i in examples]

    return write


def peft_padding_free(job: str, task: dict) -> Callable[[list[int]], None]:
    """Scoring with one model, its adapter off and on, three examples end to end."""
    import torch

    rows, model = task["rows"], peft_model(task).eval()

    def score(examples: list[int]) -> None:
        with torch.inference_mode():
            for start in range(0, len(examples), 3):
                part = [rows[i] for i in examples[start : start + 3]]
                ids = torch.tensor([[t for row in part for t in row["ids"]]], device=task["device"])
                positions = torch.tensor(
                    [[p for row in part for p in range(len(row["ids"]))]], device=task["device"]
                )
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

    tokenizer = transformers.AutoTokenizer.from_pretrained(task["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if job == "prepare":
        small = transformers.AutoConfig.from_pretrained(task["model"])
        small.num_hidden_layers, small.hidden_size, small.intermediate_size = (
            1,
            small.num_attention_heads * 8,
            8,
        )
        small.head_dim = 8
        model = transformers.AutoModelForCausalLM.from_config(small)  # it is there, and has nothing to do

        def prepare(examples: list[int]) -> float:
            config = SFTConfig(tempfile.mkdtemp(), report_to=[], max_length=2048, use_cpu=True, bf16=False)
            dataset = datasets.Dataset.from_list(many_rows(task["data"], len(examples)))
            began = clock(task)
            SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
            return clock(task) - began

        return prepare
    rows, model = task["rows"], peft_model(task)

    class Clock(transformers.TrainerCallback):
        began = seconds = 0.0

        def on_step_begin(self, *args, **kwargs):
            self.began = clock(task)

        def on_step_end(self, *args, **kwargs):
            self.seconds = clock(task) - self.began

    def step(examples: list[int]) -> float:
        clock = Clock()
        some = [
            {"input_ids": rows[i]["ids"], "completion_mask": [int(r) for r in rows[i]["response"]]}
            for i in examples
        ]
        config = SFTConfig(
            output_dir=tempfile.mkdtemp(),
            padding_free=True,
            per_device_train_batch_size=3,
            max_steps=1,
            report_to=[],
            gradient_accumulation_steps=-(-len(some) // 3),
            completion_only_loss=True,
            gradient_checkpointing=False,
            max_length=None,
            use_cpu=task["device"] == "cpu",
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            fp16=False,
        )
        dataset = datasets.Dataset.from_list(some)
        SFTTrainer(
            model, config, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock]
        ).train()
        return clock.seconds

    return step


def lm_eval(batch_size: int) -> Callable[[str, dict], Callable[[list[int]], None]]:
    """lm-evaluation-harness on the same documents."""

    def prepare(job: str, task: dict) -> Callable[[list[int]], None]:
        import make_lm_eval_goldens
        from lm_eval import evaluator
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        device = task["device"]
        model = HFLM(pretrained=task["model"], dtype=task["dtype"], device=device, batch_size=batch_size)
        if job == "generate":
            requests = []
            for i, prompt in enumerate(task["prompts"]):
                until = [] if prompt["stop"] is None else [prompt["stop"]]
                settings = {"until": until, "max_gen_toks": prompt["new_tokens"], "do_sample": False}
                requests.append(Instance("generate_until", {}, (prompt["text"], settings), i))
            return lambda examples: model.generate_until([requests[i] for i in examples], disable_tqdm=True)
        folder = Path(task["data_dir"])
        pairs = (folder / "truthfulqa_prompt.txt").read_text(encoding="utf-8")
        tasks = {task["task"]: make_lm_eval_goldens.local_task(task["task"], folder, pairs)}
        return lambda examples: evaluator.evaluate(
            lm=model, task_dict=tasks, limit=len(examples), bootstrap_iters=0
        )

    return prepare


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


def rows_of(task: dict, count: int) -> list[dict]:
    """Token ids and response masks of the first rows, the same for everybody, cut to 512 tokens."""
    from data import Tokenizer, build_corpus, read_rows

    corpus = build_corpus(read_rows(task["data"])[:count], Tokenizer(task["model"]), max_length=512)
    if len(corpus) < count:
        raise SystemExit(f"--data has {len(corpus)} usable rows, {count} are needed")
    spans = list(zip(corpus.offsets, corpus.offsets[1:]))
    return [{"ids": corpus.tokens[a:b].tolist(), "response": corpus.response[a:b].tolist()} for a, b in spans]


def prompts_of(task: dict) -> list[dict]:
    """Prompts of a task that are spread evenly over its rows, the same for everybody."""
    from data import Tokenizer
    from eval import prepare

    (documents,) = prepare([task["task"]], Tokenizer(task["model"]), task["data_dir"])
    step = max(len(documents.requests) // task["count"], 1)
    found = []
    for (request,) in documents.requests[::step][: task["count"]]:
        new_tokens = task["new_tokens"] or request.max_new_tokens
        found.append({"text": request.context, "stop": request.stop, "new_tokens": new_tokens})
    return found


def clock(task: dict) -> float:
    """Seconds: of CPU time where one thread does all the work, else on the wall."""
    return time.process_time() if task["device"] == "cpu" and task["threads"] == 1 else time.perf_counter()


def measure(job: str, who: str, task: dict) -> dict:
    """Run one measurement in this process."""
    if who == "before":
        sys.path.insert(0, task["before"])
    if job == "partition":
        return measure_partition()
    if job == "run":
        return measure_run(task["before"] if who == "before" else str(HERE.parent.parent), task)
    examples, warm_up, tokens = list(range(task["count"])), [0, 1], 0  # documents, prompts or rows
    if job in ("train", "score"):
        first = 24 * task["repetition"]  # of 24 rows half are timed, half are to warm up
        examples, warm_up = list(range(first, first + 12)), list(range(first + 12, first + 24))
        task["rows"] = rows_of(task, first + 24)
        tokens = sum(len(task["rows"][i]["ids"]) for i in examples)
    if job == "generate":
        task["prompts"] = prompts_of(task)
    prepare = {
        "ours": ours,
        "before": ours,
        "transformers": transformers_peft,
        "peft": peft_padding_free,
        "trl": trl,
        "lm_eval-1": lm_eval(1),
        "lm_eval-8": lm_eval(8),
        "lm_eval-16": lm_eval(16),
    }[who]
    run = prepare(job, task)
    if job != "generate":
        run(warm_up)
    peak_bytes(task["device"], reset=True)
    began = clock(task)
    result = run(examples)
    if task["device"] != "cpu":
        import torch

        torch.cuda.synchronize()
    seconds = result if isinstance(result, float) else clock(task) - began
    found = {"seconds": seconds, "peak": peak_bytes(task["device"]), "rate": tokens / seconds}
    return found | ({"texts": result} if job == "generate" else {})


def measure_run(project: str, task: dict) -> dict:
    """A whole small run of a checkout: 102 rows, of which a sixth are the reference's, and 24 held-out ones."""
    rows = Path(task["data"][0]).read_text(encoding="utf-8").splitlines()
    if len(rows) < 126:
        raise SystemExit(f"--data has {len(rows)} rows, 126 are needed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("\n".join(rows[:102]) + "\n", encoding="utf-8")
        (folder / "held.jsonl").write_text("\n".join(rows[102:126]) + "\n", encoding="utf-8")
        model, program = Path(task["model"]).resolve(), Path(project).resolve() / "forgetting.py"
        command = [sys.executable, str(program), "--model", str(model), "--device", task["device"]]
        command += [
            "--data",
            "rows.jsonl",
            "--eval-data",
            "held.jsonl",
            "--out",
            "run",
            "--max-length",
            "256",
        ]
        command += ["--methods", "base", "reference", "full", "ignoring", "forgetting"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = time.perf_counter() - began
        if task["device"] == "cpu":
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        results = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
        return {"seconds": seconds, "peak": after.ru_maxrss * 1024, "rate": 0.0, "texts": [results]}


def measure_partition() -> dict:
    """Equations 6 and 7 on 20 million scores: seconds, and by how much they raised the peak."""
    import numpy as np

    from forgetting import partition

    quality = np.random.default_rng(0).standard_normal(20_000_000, dtype=np.float32)
    before = peak_bytes("cpu", reset=True)
    began = time.perf_counter()
    partition(quality, 0.7)
    return {"seconds": time.perf_counter() - began, "peak": peak_bytes("cpu") - before, "rate": 0.0}


# ------------------------------------------------------------------------------------------------------ the figures


def in_a_process(who: str, dtype: str, repeat: int, arguments: argparse.Namespace) -> dict:
    """One measurement in a fresh process, on --threads cores: this program again, with the same flags and --worker."""
    python = sys.executable if who in ("ours", "before") else arguments.peers
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[-arguments.threads :]))
    command = ["taskset", "-c", cores, python, *sys.argv]
    command += ["--worker", who, "--dtypes", dtype, "--repetition", str(repeat)]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false"} if arguments.threads == 1 else {}
    environment |= {"THP_MEM_ALLOC_ENABLE": "1"}  # for everybody: see run.sh
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{who}: {done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def tokens_equal(texts: list[str], ours: list[str], model: str) -> tuple[int, int, int]:
    """Tokens of the texts, tokens of ours, and how many of them the texts begin with as ours do."""
    from data import Tokenizer

    tokenizer = Tokenizer(model)
    encode = lambda some: [ids for ids, _ in tokenizer.encode(some, special=False)]
    theirs, right = encode(texts), encode(ours)
    same = 0
    for a, b in zip(theirs, right):
        differs = (i for i, (x, y) in enumerate(zip(a, b)) if x != y)
        same += next(differs, min(len(a), len(b)))
    return sum(map(len, theirs)), sum(map(len, right)), same


def compare(arguments: argparse.Namespace, dtype: str) -> None:
    """The interleaved runs of one job in one precision, and their table."""
    job = arguments.job
    there = {"ours": True, "before": arguments.before is not None}
    found: dict[str, list[dict]] = {w: [] for w in WORKERS[job] if there.get(w, arguments.peers is not None)}
    for repeat in range(arguments.repeats):
        for who in found:
            found[who].append(in_a_process(who, dtype, repeat, arguments))
            shown = {key: value for key, value in found[who][-1].items() if key != "texts"}
            print(f"  {job} {dtype} {who} {repeat}: {shown}", file=sys.stderr, flush=True)
    for who, runs in found.items():
        figures = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "texts"}
        line = f"{job:9} {dtype:8} {who:13} {figures['seconds']:8.2f} s  peak {figures['peak'] / 1e9:6.2f} GB"
        if job == "generate":
            written, right, same = tokens_equal(runs[0]["texts"], found["ours"][0]["texts"], arguments.model)
            figures["rate"] = written / figures["seconds"]
            line += f"  {written} tokens, {same} of {right} as ours"
        if job == "run":
            line += (
                f"  results.json {'equal' if runs[0]['texts'] == found['ours'][0]['texts'] else 'another'}"
            )
        if figures["rate"]:
            line += f"  {figures['rate']:8.0f} tokens/s"
        if who != "ours":
            ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in zip(runs, found["ours"])]
            line += f"  ours is {statistics.median(ratios):.2f} x as fast [{' '.join(f'{r:.2f}' for r in ratios)}]"
        print(line, flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="./run.sh bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=list(WORKERS))
    parser.add_argument("--model", help="a checkpoint folder")
    parser.add_argument(
        "--data", nargs="+", default=[], help="instruction rows, for train, score, prepare, run"
    )
    parser.add_argument("--data-dir", help="benchmark rows, for evaluate and generate")
    parser.add_argument(
        "--task", default="logiqa", help="for evaluate, its first documents, and generate [logiqa]"
    )
    parser.add_argument("--count", type=int, help="documents, prompts, or rows [12; prepare: 50,000]")
    parser.add_argument("--new-tokens", type=int, help="for generate [the task's]")
    parser.add_argument("--before", help="another checkout of this project, to compare with")
    parser.add_argument("--peers", help="a Python that has transformers, peft, trl and lm_eval")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--micro-tokens", type=int, help="of ours [forgetting.py's default]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--repetition", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.count = arguments.count or (50_000 if arguments.job == "prepare" else 12)
    if arguments.worker:
        task = vars(arguments) | {"dtype": arguments.dtypes[0]}
        print(json.dumps(measure(arguments.job, arguments.worker, task)))
        return
    for dtype in arguments.dtypes if arguments.job not in ("partition", "prepare") else ["float32"]:
        compare(arguments, dtype)


if __name__ == "__main__":
    main()
