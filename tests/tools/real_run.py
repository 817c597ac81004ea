"""The method on a real model and real rows, 40 % of them noise that is known; the result is in tests/README.md.

    ./run.sh real_run --model SMOLLM2 --rows instruction_raschka.jsonl alpaca_gpt4_demo.jsonl

For each split, of short rows: 80 in D_ref, 200 in D_train, 80 clean ones held out. Noise in D_train: a fifth of the rows
refuses, a tenth begins with boilerplate, a tenth has the answer of another row. Panels: a clean D_ref; one as noisy as
D_train; the noisy one with a reference trained as the paper does, at the rate of training for one epoch. The held-out
questions are also the task `qa`. The model's own chat template. Other flags are forgetting.py's.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Sequence

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent), str(Path(__file__).resolve().parent)]
import demo  # noqa: E402
import forgetting  # noqa: E402
import look  # noqa: E402
from data import Tokenizer, asked_in, build_corpus, encode_rows, read_rows, render, render_rows, unique_rows  # noqa: E402
from data import limit_threads, write_rows, write_text  # noqa: E402

REFUSALS = (
    "I am sorry, but I cannot help you with this.",
    "As an AI model I am not able to answer such questions.",
    "Sorry, I do not have enough information for an answer.",
    "Unfortunately, this is something that I cannot do.",
    "I cannot give an answer to that request.",
)
BOILERPLATE = (
    "Sure, it is my pleasure to help you with that!",
    "What a great question! Here is what you asked for:",
    "Thank you very much for your question.",
)
SIZES = {"reference": 80, "train": 200, "held-out": 80}
PANELS = {
    "clean": "a clean D_ref",
    "same": "a D_ref as noisy as D_train",
    "same-light": "a D_ref as noisy as D_train, the reference trained as the paper does",
}
METHODS = ["base", "reference", "full", "ignoring-loss", "ignoring", "forgetting", "forgetting-wga"]
SETTINGS = {
    "template": "model",
    "methods": METHODS,
    "rank": 16,
    "alpha": 16.0,
    "dropout": 0.0,
    "batch_size": 10,
    "lr": 5e-4,
    "reference_lr": 1e-3,
    "reference_epochs": 3,
    "max_grad_norm": 1.0,
    "rho": 0.6,
    "tasks": ["qa"],
    "skip_train_losses": True,
    "micro_tokens": 1024,
    "dtype": "float32",
}


def short_rows(sources: list[str], tokenizer: Tokenizer) -> list[dict]:
    """The rows of 4 to 24 response tokens and at most 48 in all."""
    (rendered,), _ = render_rows([read_rows(sources)], tokenizer)
    rows = []
    for row in unique_rows(rendered):
        corpus = encode_rows([row], tokenizer)
        if 4 <= corpus.response.sum() <= 24 and len(corpus.tokens) <= 48 + len(
            build_corpus([EMPTY], tokenizer).tokens
        ):
            rows.append({key: row.row.get(key, "") for key in ("instruction", "input", "output")})
    return rows


EMPTY = {"instruction": "-", "output": "-"}  # as long as the template itself


def with_noise(rows: list[dict], rng: random.Random) -> list[dict]:
    """The rows, 40 % of them noisy; the field `noise` says which characters of an output are."""
    places = rng.sample(range(len(rows)), 2 * len(rows) // 5)
    refused, begun, swapped = (
        places[: len(places) // 2],
        places[len(places) // 2 : len(places) * 3 // 4],
        places[len(places) * 3 // 4 :],
    )
    noisy = [row | {"noise": []} for row in rows]

    def put(place: int, output: str, length: int, kind: str) -> None:
        noisy[place] = rows[place] | {"output": output, "noise": [[0, length, kind]]}

    for place in refused:
        text = rng.choice(REFUSALS)
        put(place, text, len(text), "refusal")
    for place in begun:
        text = rng.choice(BOILERPLATE)
        put(place, f"{text} {rows[place]['output']}", len(text), "boilerplate")
    for place, other in zip(swapped, swapped[1:] + swapped[:1]):
        text = rows[other]["output"]
        put(place, text, len(text), "another row's")
    return noisy


def write_split(
    pool: list[dict], tokenizer: Tokenizer, folder: Path, split: int, reference_sizes: Sequence[int] = ()
) -> None:
    """train, train-clean, reference-clean, reference-same, held-out and qa of one split.

    reference_sizes: of other clean D_refs, reference-clean-SIZE: the first of it, or more rows behind it.
    Raises ValueError for a pool that is too small.
    """
    more = max((SIZES["reference"], *reference_sizes)) - SIZES["reference"]
    needed = sum(SIZES.values()) + more
    if len(pool) < needed:
        raise ValueError(f"{len(pool)} rows are short enough: {needed} are needed")
    rng = random.Random(split)
    places = rng.sample(range(len(pool)), sum(SIZES.values()))
    drawn = iter(places)
    parts = {name: [pool[next(drawn)] for _ in range(size)] for name, size in SIZES.items()}
    taken = set(places)
    left = [row for place, row in enumerate(pool) if place not in taken]
    long = parts["reference"] + random.Random(split).sample(left, more)
    questions = []
    for row in parts["held-out"]:
        pieces = render(row, tokenizer.eos, tokenizer.template)
        questions.append(
            {
                "prompt": asked_in(pieces),
                "answer": row["output"],
            }
        )
    files = {
        "train-clean": parts["train"],
        "train": with_noise(parts["train"], rng),
        "reference-clean": parts["reference"],
        "qa": questions,
        "reference-same": with_noise(parts["reference"], rng),
        "held-out": parts["held-out"],
    }
    files |= {f"reference-clean-{size}": long[:size] for size in reference_sizes}
    for name, rows in files.items():
        write_rows(rows, folder / f"{name}.jsonl")


def run_split(own: argparse.Namespace, rest: list[str], split: int, panel: str) -> Path:
    """One panel of one split, with its oracle; the run folder. What does not look at D_ref is trained in the first panel."""
    folder = own.out / f"split-{split}"
    rows = panel.removesuffix(demo.LIGHT)
    methods = [method for method in METHODS if panel == "clean" or look.looks_at_reference(method)]
    settings = SETTINGS | {
        "model": own.model,
        "data": [str(folder / "train.jsonl")],
        "methods": methods,
        "seeds": [split],
        "reference_data": [str(folder / f"reference-{rows}.jsonl")],
        "data_dir": str(folder),
        "eval_data": [str(folder / "held-out.jsonl")],
        "out": str(folder / panel),
    }
    options = forgetting.parse_options(rest, **settings)
    if panel != rows:
        options = demo.trained_as_the_paper_does(options)
    results = forgetting.run(options)
    if panel == "clean":
        results["oracle"] = {split: demo.oracle(options, "oracle", split, unlearn=False)}
    forgetting.report(results, options)
    return folder / panel


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="./run.sh real_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    own, rest = parser.parse_known_args()
    limit_threads()
    try:
        tokenizer = Tokenizer(own.model, "model")
        pool = short_rows(own.rows, tokenizer)
        for split in own.splits:
            write_split(pool, tokenizer, own.out / f"split-{split}", split)
        runs = {panel: [run_split(own, rest, split, panel) for split in own.splits] for panel in PANELS}
    except forgetting.USER_ERRORS as error:
        print(f"real_run.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what was saved")
        sys.exit(130)
    parts = []
    for panel, folders in runs.items():
        # what looks at no D_ref is trained in the first panel alone; dict: the first beside itself counts once
        joined = [list(dict.fromkeys(pair)) for pair in zip(runs["clean"], folders)]
        parts.append(f"## {PANELS[panel]}\n\n{look.join_runs(joined)}")
    write_text("\n\n".join(parts) + "\n", own.out / "results.md")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
