"""The method on a real model and real rows, a known quarter of them noise: the table is in tests/README.md.

    python tests/tools/real_run.py --model SMOLLM2 --rows instruction_raschka.jsonl alpaca_gpt4_demo.jsonl

Of short rows, drawn once, 400 are D_train, 100 D_ref and 200 held out. In D_train and, unless --clean-reference, in D_ref a
quarter is noise of two kinds: the answer of another row, or boilerplate in front. Other flags are forgetting.py's.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent), str(Path(__file__).resolve().parent)]
import demo  # noqa: E402
import forgetting  # noqa: E402
import look  # noqa: E402
from data import Tokenizer, build_corpus, read_rows, unique_rows, write_rows  # noqa: E402

BOILERPLATE = (
    "As an AI language model, I am always happy to help you with your request.",
    "Thank you for your question! I hope that you are having a wonderful day today.",
    "Sure! Please note that this answer is for general information only.",
)
METHODS = ["full", "ignoring", "forgetting", "forgetting-clipped", "oracle"]
RATES = (3e-4, 1e-3)  # the first is --lr, the second a variant of each method


def with_noise(rows: list[dict], rng: random.Random) -> list[dict]:
    """The rows, a quarter of them noisy; the field `noise` says which characters of an output are."""
    places = rng.sample(range(len(rows)), len(rows) // 4)
    noisy = [row | {"noise": []} for row in rows]
    wrong = places[: len(places) // 2]
    for place, other in zip(wrong, wrong[1:] + wrong[:1]):
        output = rows[other]["output"]
        noisy[place] = rows[place] | {"output": output, "noise": [[0, len(output), "wrong"]]}
    for place in places[len(wrong) :]:
        extra = rng.choice(BOILERPLATE)
        output = f"{extra} {rows[place]['output']}"
        noisy[place] = rows[place] | {"output": output, "noise": [[0, len(extra), "boilerplate"]]}
    return noisy


def make_files(sources: list[str], model: str, out: Path, clean_reference: bool) -> dict[str, str]:
    """Draw and write train.jsonl, reference.jsonl and held-out.jsonl; their paths."""
    tokenizer, rng = Tokenizer(model), random.Random(0)
    short = []
    for row in unique_rows(read_rows(sources), tokenizer.eos):
        corpus = build_corpus([row], tokenizer)
        if len(corpus.tokens) <= 96 and corpus.response.sum() >= 10:
            short.append({key: row.get(key, "") for key in ("instruction", "input", "output")})
    if len(short) < 700:
        raise ValueError(f"{len(short)} rows have at most 96 tokens, 10 of response: 700 are needed")
    drawn = rng.sample(short, 700)
    train, reference, held_out = with_noise(drawn[:400], rng), with_noise(drawn[400:500], rng), drawn[500:]
    sets = {"train": train, "reference": drawn[400:500] if clean_reference else reference, "held-out": held_out}
    for name, rows in sets.items():
        write_rows(rows, out / f"{name}.jsonl")
    return {name: str(out / f"{name}.jsonl") for name in sets}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--clean-reference", action="store_true")
    own, rest = parser.parse_known_args()
    try:
        files = make_files(own.rows, own.model, own.out / "rows", own.clean_reference)
        names = [f"{name}:lr={rate}" if rate != RATES[0] else name for rate in RATES for name in METHODS]
        methods = ["base", "reference", *(name for name in names if not name.startswith("oracle"))]
        defaults = {"model": own.model, "data": [files["train"]], "reference_data": [files["reference"]],
                    "eval_data": [files["held-out"]], "methods": methods, "lr": RATES[0], "reference_lr": RATES[1],
                    "dropout": 0.0, "micro_tokens": 4096, "max_grad_norm": 1.0, "dtype": "float32", "out": str(own.out / "run")}  # fmt: skip
        options = forgetting.parse_options(rest, **defaults)
        results = forgetting.run(options)
        for name in names:
            if name.startswith("oracle"):
                results[name] = {seed: demo.oracle(options, name, seed) for seed in options.seeds}
    except (ValueError, OSError) as error:
        print(f"real_run.py: {error}", file=sys.stderr)
        sys.exit(2)
    forgetting.report(results, options)
    run = look.read_run(Path(options.out))
    for name, value in look.detection(run.quality, run.signs < 0, run.corpus, look.find_noise(run)[0]).items():
        print(f"{name} {value:.3f}")


if __name__ == "__main__":
    main()
