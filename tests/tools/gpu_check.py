"""The first hour on a GPU, in one command: is the CUDA path right, and how fast is it?

    ./run.sh gpu_check                                   # tiny models, seconds
    ./run.sh gpu_check --model meta-llama/Llama-3.2-1B   # and its tokens/s, MFU, peak memory
    ./run.sh gpu_check --device cpu                      # the same comparisons against itself: a rehearsal

Every line compares the device with float32 on the CPU; the exit code is 1 if one of them differs by more than allowed.
The usual stack is timed beside ours by bench.py: ./run.sh bench train --device cuda --micro-tokens 8192 ...
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import tiny  # noqa: E402
from data import Corpus, Tokenizer, write_rows  # noqa: E402
from eval import Budget, continuous_batching, generate, loglikelihoods, table  # noqa: E402
from forgetting import Options, both_losses, partition, step_gradient  # noqa: E402
from lora import add_lora, dropout_mask, lora_parameters  # noqa: E402
from model import DTYPES, Cache, load_model, token_losses  # noqa: E402

KINDS = ("llama2", "llama3", "qwen2", "gpt_neo")
Row = tuple[str, float, float]  # what was compared, how far apart, how far is allowed


def random_corpus(vocabulary: int, lengths: list[int]) -> Corpus:
    """Sequences of random tokens, the second half of each a response."""
    draw = np.random.default_rng(0)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    response = np.concatenate([np.arange(length) >= length // 2 for length in lengths])
    tokens = draw.integers(3, vocabulary, offsets[-1]).astype(np.int32)
    return Corpus(tokens, response, offsets, [f"random:{i}" for i in range(len(lengths))], dropped=0)


def adapted(folder: Path, device: str, dtype: str):
    """The model with an adapter that does something, the same on every device."""
    model = load_model(folder, device, DTYPES[dtype])
    draw = torch.Generator().manual_seed(0)
    add_lora(model, r=4, dropout=0.0, generator=draw)
    for parameter in lora_parameters(model).values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=draw).to(parameter.device)
    return model


def gradient(model, corpus: Corpus) -> torch.Tensor:
    """Equation 8's gradient over the whole corpus, on the CPU in float32; and the losses, end to end."""
    signs = np.where(corpus.response, np.where(np.arange(len(corpus.tokens)) % 3 == 0, -1, 1), 0).astype(
        np.int8
    )
    sums, _ = step_gradient(model, corpus, signs, np.arange(len(corpus)), 0.2, Options(micro_tokens=200))
    return torch.cat(
        [*(p.grad.flatten() for p in lora_parameters(model).values()), sums / corpus.response.sum()]
    ).cpu()


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.float() - expected.float()).norm() / expected.float().norm())


def check_models(device: str, folder: Path) -> list[Row]:
    """Forward and backward of every architecture, float32 and bfloat16, with and without checkpointing."""
    rows = []
    for kind in KINDS:
        corpus = random_corpus(90, [30, 7, 19, 30, 2, 44])
        expected = gradient(adapted(folder / kind, "cpu", "float32"), corpus)
        rounding = (
            0.3 if kind == "gpt_neo" else 0.06
        )  # scores without a scale are large, and so is their rounding
        for dtype, allowed in (("float32", 1e-4), ("bfloat16", rounding)):
            for checkpointed in (False, True):
                model = adapted(folder / kind, device, dtype).train()
                model.checkpoint_activations = checkpointed
                name = f"{kind} {dtype} gradient of eq. 8{', checkpointed' * checkpointed}"
                rows.append((name, relative(gradient(model, corpus), expected), allowed))
    return rows


def check_pieces(device: str, folder: Path) -> list[Row]:
    """The in-place softmax, dropout's masks, cached log-likelihoods, decoding, the sides of a partition."""
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(1300, 64), torch.randn(500, 64), torch.randint(0, 500, (1300,))
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    found = token_losses(hidden.to(device), head.to(device), targets.to(device)).cpu()
    rows = [("softmax in place", float((found - expected).abs().max()), 1e-3)]
    masks = [dropout_mask(torch.empty(2000, 500, device=device), 0.1) for _ in range(2)]
    rows.append(("share that dropout drops", abs(float((masks[0] == 0).float().mean()) - 0.1), 2e-3))
    rows.append(("two masks are the same", float(torch.equal(*masks)), 0))
    tokenizer = Tokenizer(folder / "llama3")
    pairs = [([3, 4, 5] * i, [6, 7, 8][:j]) for i in (1, 3, 8) for j in (1, 2, 3)]
    prompts = [[3, 9, 11], [5] * 12, [7, 8], [5] * 12 + [6]]  # the last shares what it begins with
    here, there = load_model(folder / "llama3"), load_model(folder / "llama3", device)
    rounded = load_model(folder / "llama3", device, torch.bfloat16)
    for name, model, allowed in (("float32", there, 1e-4), ("bfloat16", rounded, 0.03)):
        sums = [[a.loglikelihood for a in loglikelihoods(m, pairs)] for m in (here, model)]
        rows.append((f"log-likelihoods, {name}", relative(*map(torch.tensor, reversed(sums))), allowed))
    expected = generate(here, tokenizer, prompts, 12)
    rows.append(
        ("replies that differ, float32", float(generate(there, tokenizer, prompts, 12) != expected), 0)
    )
    one_by_one = generate(there, tokenizer, prompts, 12, budget=Budget(cache_bytes=1))
    rows.append(("replies that differ, one by one", float(one_by_one != expected), 0))
    corpus, sides = random_corpus(90, [60] * 40), []
    for place, dtype in (("cpu", "float32"), (device, "bfloat16")):
        base_loss, ref_loss = both_losses(adapted(folder / "llama3", place, dtype), corpus, 500, place)
        sides.append(partition((base_loss - ref_loss)[corpus.response], 0.7)[0])
    rows.append(("tokens on the other side in bfloat16", float((sides[0] != sides[1]).mean()), 0.05))
    return rows


def check_ranks(folder: Path) -> list[Row]:
    """Two ranks on two GPUs make the adapter of one."""
    if torch.cuda.device_count() < 2:
        return []
    write_rows(
        [{"prompt": f"say {i}", "response": f"the quick fox {i}"} for i in range(40)], folder / "rows.jsonl"
    )
    common = [
        "--model",
        str(folder / "llama3"),
        "--data",
        str(folder / "rows.jsonl"),
        "--rank",
        "4",
        "--dropout",
        "0",
        "--dtype",
        "float32",
        "--batch-size",
        "6",
        "--methods",
        "forgetting",
    ]
    adapters = []
    for ranks in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [
            sys.executable,
            *launcher,
            str(ROOT / "forgetting.py"),
            *common,
            "--out",
            str(folder / f"ranks-{ranks}"),
        ]
        subprocess.run(command, check=True, capture_output=True)
        adapters.append(load_file(folder / f"ranks-{ranks}" / "forgetting/seed-0/adapter_model.safetensors"))
    return [
        (
            "two ranks against one",
            max(float((adapters[0][n] - adapters[1][n]).abs().max()) for n in adapters[0]),
            1e-4,
        )
    ]


def seconds_of(work: Callable[[], object], repeat: int = 3) -> float:
    """Median seconds of some calls, after one to warm up."""
    seconds = []
    for _ in range(repeat + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[repeat // 2]


def measure_speed(name: str, peak_tflops: float) -> list[list[str]]:
    """Tokens/s, share of the peak and memory of a training step and of scoring, without and with --compile."""
    rows, options = [], Options(micro_tokens=8192)
    for compiled in (False, True):
        model = load_model(name, "cuda", torch.bfloat16)
        if compiled:
            model.compile_blocks()
        corpus = random_corpus(model.config.vocab_size, [64 + 37 * i % 900 for i in range(48)])
        add_lora(model, r=64, dropout=0.1)
        size, tokens = sum(p.numel() for p in model.parameters()), len(corpus.tokens)
        signs, everything = corpus.response.astype(np.int8), np.arange(len(corpus))
        train = lambda: step_gradient(model.train(), corpus, signs, everything, 0.1, options)  # noqa: E731
        score = lambda: both_losses(model, corpus, 8192, "speed")  # noqa: E731
        for job, work in (("training", train), ("scoring", score)):
            torch.cuda.reset_peak_memory_stats()
            before, seconds = torch.cuda.memory_allocated(), seconds_of(work)
            share = 4 * size * tokens / seconds / (peak_tflops * 1e12)  # 2 a weight and product; two products
            memory = (torch.cuda.max_memory_allocated() - before) / 1e9
            kind = "compiled" if compiled else "eager"
            rows.append([job, kind, f"{tokens / seconds:,.0f}", f"{share:.2f}", f"{memory:.1f} GB"])
    return rows + measure_writing(name)


def measure_writing(name: str) -> list[list[str]]:
    """New tokens/s of 64 replies of 64 tokens to prompts of about 100, with so many in flight.

    A step launches about 1,430 kernels whatever is in flight: the gain should be nearly the number.
    """
    model, rows = load_model(name, "cuda", torch.bfloat16), []
    draw = torch.Generator().manual_seed(0)
    prompts = {}
    for i in range(64):
        prompts[i] = torch.randint(model.config.vocab_size, (70 + i,), generator=draw).tolist()
    one = Cache(model, 1)
    row_bytes = one.keys.nbytes + one.values.nbytes
    for in_flight in (3, 16, 64):
        budget = Budget(cache_bytes=in_flight * (134 + 64) * row_bytes)
        write = lambda: dict(continuous_batching(model, prompts, 64, lambda new: len(new) == 64, budget))  # noqa: E731
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            before, seconds = torch.cuda.memory_allocated(), seconds_of(write, 1)
        memory = (torch.cuda.max_memory_allocated() - before) / 1e9
        rows.append(
            ["writing", f"{in_flight} in flight", f"{64 * 64 / seconds:,.0f}", "", f"{memory:.1f} GB"]
        )
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="./run.sh gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a checkpoint to time")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of the GPU in bfloat16 [989, H100 SXM]"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_check.py: torch sees no CUDA device here (--device cpu rehearses the comparisons)",
            file=sys.stderr,
        )
        sys.exit(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in KINDS:
            tiny.make_checkpoint(folder / kind, kind)
        rows = (
            check_models(arguments.device, folder)
            + check_pieces(arguments.device, folder)
            + check_ranks(folder)
        )
    wrong = [name for name, difference, allowed in rows if not difference <= allowed]
    lines = [[n, f"{d:.2g}", f"{allowed:.2g}", "" if d <= allowed else "DIFFERS"] for n, d, allowed in rows]
    print(table(["comparison", "difference", "allowed", ""], lines))
    if arguments.model and arguments.device == "cuda":
        speed = measure_speed(arguments.model, arguments.peak_tflops)
        print("\n" + table(["job", "", "tokens/s", "MFU", "peak above weights"], speed))
    print(
        f"\n{len(rows) - len(wrong)} of {len(rows)} agree" + (f"; not: {', '.join(wrong)}" if wrong else "")
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
