"""How hard to train the reference: a line of JSON for each D_ref, rate and number of passes, and tables.

    ./run.sh reference_steps --seeds 10 11 12 13 14                     # the demo's world
    ./run.sh reference_steps --model SMOLLM2 --rows a.jsonl b.jsonl --seeds 0 1 2   # real_run's

Each reference scores D_train, and --methods are trained with its Q; those that do not look at it are trained
once. Rows that a user would trust are scored as well: the held-out rows, and the same rows with each other's
answers. All losses are kept in OUT/WORLD/REFERENCE/losses.safetensors. Other flags are forgetting.py's.

The first table is a line for each kind of reference: means over seeds and 95 % intervals of Student's t, and
what the methods are worth over `full`. The second asks of every figure that needs no known
noise how well it says, over all references, whether `ignoring` will beat `full`; the third what a run's
trust gap told.
"""

import argparse
import dataclasses
import itertools
import json
import math
import random
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]
import ablations  # noqa: E402
import demo  # noqa: E402
import forgetting  # noqa: E402
import look  # noqa: E402
import real_run  # noqa: E402
from data import Corpus, Tokenizer, encode_rows, limit_threads, read_object, read_rows  # noqa: E402
from data import render_rows, whole_file, write_rows, write_text  # noqa: E402
from eval import primary_metrics, prepare, table  # noqa: E402
from lora import remove_lora  # noqa: E402
from model import DTYPES, load_model  # noqa: E402

Array = np.ndarray


@dataclass(frozen=True)
class Reference:
    """How a theta' is made."""

    rows: str  # the file reference-ROWS.jsonl
    rate: float
    passes: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.rows}-{self.rate:g}x{self.passes}"


@dataclass(frozen=True)
class World:
    """Rows on disk, and what every training on them shares."""

    name: str
    seed: int
    folder: Path
    options: forgetting.Options


@dataclass(frozen=True)
class Scored:
    """Rows with the losses of their response tokens under theta and theta'."""

    corpus: Corpus
    base_loss: Array  # (C,) nats, NaN where nothing is judged
    ref_loss: Array  # (C,)

    @property
    def quality(self) -> Array:
        """Q, (C,)."""
        return forgetting.quality_scores(self.base_loss, self.ref_loss)

    @property
    def tokens(self) -> Array:
        """Q of the judged tokens alone."""
        return self.quality[self.corpus.response]

    @property
    def rows(self) -> Array:
        """Mean Q of each row, (E,)."""
        means, _ = forgetting.sequence_means(self.quality, self.corpus)
        return means

    @property
    def lengths(self) -> Array:
        """Response tokens of each row, (E,)."""
        _, judged = forgetting.sequence_means(self.quality, self.corpus)
        return judged


# ------------------------------------------------------------------------------------------------ figures


def matched_gap(trusted: Scored, train: Scored) -> float:
    """The trust gap in deviations of Q, each trusted row beside the tenth of D_train as long as it."""
    means, lengths = train.rows, train.lengths
    tenth = max(len(means) // 10, 1)
    beside = []
    for length in trusted.lengths:
        nearest = np.argsort(np.abs(lengths - length), kind="stable")[:tenth]
        beside.append(np.average(means[nearest], weights=lengths[nearest]))
    difference = np.average(trusted.rows - beside, weights=trusted.lengths)
    return float(difference / train.tokens.std())


def row_columns(scored: Scored) -> Array:
    """What mean Q is regressed on: 1, the logarithm of a row's length, its mean loss under theta; (E, 3)."""
    base, lengths = forgetting.sequence_means(scored.base_loss, scored.corpus)
    return np.stack((np.ones(len(base)), np.log(lengths), base), axis=1)


def regressed_gap(trusted: Scored, train: Scored) -> float:
    """The trust gap in deviations of Q that a row's length and its loss under theta do not explain."""
    fit, *_ = np.linalg.lstsq(row_columns(train), train.rows, rcond=None)
    unexplained = trusted.rows - row_columns(trusted) @ fit  # (E,)
    mean = np.average(unexplained, weights=trusted.lengths)
    return float(mean / train.tokens.std())


def trust_figures(train: Scored, trusted: Scored, swapped: Scored) -> dict[str, float]:
    """What could tell, without known noise, whether Q points the right way."""
    deviation = float(train.tokens.std())
    on_train, on_trusted = float(train.tokens.mean()), float(trusted.tokens.mean())
    row_gap = float(trusted.rows.mean() - train.rows.mean())
    swap_gap = on_trusted - float(swapped.tokens.mean())
    return {
        "gap": on_trusted - on_train,
        "gap in deviations": (on_trusted - on_train) / deviation,
        "gap of rows in deviations": row_gap / float(train.rows.std()),
        "AUC of D_train": forgetting.roc_auc(train.rows, trusted.rows),
        "matched gap": matched_gap(trusted, train),
        "regressed gap": regressed_gap(trusted, train),
        "swap AUC": forgetting.roc_auc(swapped.rows, trusted.rows),
        "swap gap in deviations": swap_gap / deviation,
        "Q of D_train in deviations": on_train / deviation,
        "deviation of Q": deviation,
    }


def trust_gap(trusted: Scored, train: Scored) -> tuple[float, float, float]:
    """What a run says before stage 4: the gap in deviations of Q, and its 95 % interval."""
    of_trusted, of_train = ((part.rows, part.lengths) for part in (trusted, train))
    return forgetting.trust_gap(of_trusted, of_train, float(train.tokens.std()))


def noise_figures(train: Scored, options: forgetting.Options) -> dict[str, float]:
    """How well Q finds the known noise, and how well theta's own loss does; {} where there is none."""
    if not train.corpus.noisy.any():
        return {}
    negative = (
        forgetting.choose_signs(
            forgetting.METHODS["forgetting"], train.quality, train.corpus, options, seed=0
        )
        < 0
    )
    found = forgetting.detection(train.quality, negative, train.corpus)
    by_loss = forgetting.detection(-train.base_loss, negative, train.corpus)
    return found | {"row AUC of theta's loss": by_loss["row AUC"]}


def outcome(figures: dict) -> dict[str, float]:
    """The average of the tasks in percent, where there are some, and the held-out loss."""
    percents = list(primary_metrics(figures["tasks"]).values())
    average = {"average": sum(percents) / len(percents)} if percents else {}
    return average | {"held-out": figures["held-out"]}


# -------------------------------------------------------------------------------------------------- rows


def swap_answers(rows: list[dict], seed: int) -> list[dict]:
    """Every row with the answer of another one, and every answer once."""
    order = random.Random(f"swap {seed}").sample(range(len(rows)), len(rows))
    answers = dict(zip(order, order[1:] + order[:1]))  # a single cycle: no row keeps its own
    swapped = []
    for place, row in enumerate(rows):
        question = {key: row[key] for key in ("instruction", "input") if row.get(key)}
        answer = rows[answers[place]]["output"]
        swapped.append(question | {"output": answer})
    return swapped


def read_corpus(path: Path, tokenizer: Tokenizer, options: forgetting.Options) -> Corpus:
    """The rows of one file, in its order."""
    (rows,), _ = render_rows([read_rows([str(path)])], tokenizer)
    return encode_rows(rows, tokenizer, options.max_length)


def demo_worlds(own: argparse.Namespace, rest: list[str]) -> list[World]:
    """The demo's worlds of the seeds, written to disk."""
    settings = demo.DEMO | {"seeds": own.seeds, "out": str(own.out)}
    options = forgetting.parse_options(rest, **settings)
    demo.prepare_world(options, "popular")
    worlds = []
    for seed in own.seeds:
        folder = own.out / f"world-{seed}"
        ablations.other_references(folder)
        here = demo.panel_options(options, "clean", seed, [])
        here = dataclasses.replace(here, data=[str(folder / f"{own.d_train}.jsonl")])
        worlds.append(World("demo", seed, folder, here))
    return worlds


REAL_SIZES = (30, 300)  # of clean D_refs of real rows, beside real_run's: --d-ref clean-30 clean-300


def real_worlds(own: argparse.Namespace, rest: list[str]) -> list[World]:
    """The splits of real_run.py, written to disk; no questions are put."""
    tokenizer = Tokenizer(own.model, "model")
    pool = real_run.short_rows(own.rows, tokenizer)
    worlds = []
    for split in own.seeds:
        folder = own.out / f"split-{split}"
        real_run.write_split(pool, tokenizer, folder, split, REAL_SIZES)
        settings = real_run.SETTINGS | {"model": own.model, "tasks": [], "methods": []}
        settings["data"] = [str(folder / f"{own.d_train}.jsonl")]
        options = forgetting.parse_options(rest, **settings)
        worlds.append(World("real", split, folder, options))
    return worlds


# ------------------------------------------------------------------------------------------------- runs


class Study:
    """One world and one of its D_refs: theta' by theta', what Q is like and what methods make of it."""

    def __init__(self, world: World, rows: str) -> None:
        self.world = world
        self.rows = rows
        d_ref = world.folder / f"reference-{rows}.jsonl"
        self.options = options = dataclasses.replace(world.options, reference_data=[str(d_ref)])
        tokenizer = Tokenizer(options.model, options.template)
        self.d_ref, self.d_train = forgetting.select_data(options, tokenizer)
        own, swapped = world.folder / "held-out.jsonl", world.folder / "swapped.jsonl"
        write_rows(swap_answers(read_rows([str(own)]), world.seed), swapped)
        held_out, others = (read_corpus(path, tokenizer, options) for path in (own, swapped))
        self.corpora = {"train": self.d_train, "held-out": held_out, "swapped": others}
        documents = prepare(options.tasks, tokenizer, options.data_dir, options.limit)
        measured = tokenizer, documents, held_out, self.d_train
        self.suite = forgetting.EvalSuite(*measured, signs=None, token_budget=options.micro_tokens)
        self.model = load_model(options.model, options.device, DTYPES[options.dtype])

    def losses(self) -> dict[str, Array]:
        """The losses (C,) of each corpus under the model as it is."""
        budget, found = self.options.micro_tokens, {}
        for name, corpus in self.corpora.items():
            everything = np.arange(len(corpus))
            found[name] = forgetting.response_losses(self.model, corpus, everything, budget, name)
        return found

    @cached_property
    def base_losses(self) -> dict[str, Array]:
        """Under theta, kept beside the references; asked for first while no adapter is on the model."""
        path = self.world.folder / f"base-{self.rows}.safetensors"
        if not path.is_file():
            with whole_file(path) as file:
                save_file(self.losses(), file)
        return load_file(path)

    def scored(self, reference: Reference) -> dict[str, Scored]:
        """Each corpus with both its losses, from the reference's folder where they are there."""
        folder = self.world.folder / reference.name
        if not (folder / LOSSES).is_file():
            base = self.base_losses
            options = dataclasses.replace(self.options, lr=reference.rate, epochs=reference.passes)
            signs = self.d_ref.response.astype(np.int8)
            forgetting.train(self.model, self.d_ref, signs, folder / "reference", options, seed=0)
            ref = self.losses()
            remove_lora(self.model)
            keep_losses({name: Scored(self.corpora[name], base[name], ref[name]) for name in ref}, folder)
        return read_losses(folder)

    def figures(self, method: str, train: Scored, folder: Path) -> dict:
        """What a method, trained on D_train with these scores, is worth."""
        if method == "base":
            return forgetting.measure(self.model, self.suite, self.world.folder / "base")
        above = folder if look.looks_at_reference(method) else self.world.folder
        here = above / method / f"seed-{self.world.seed}"
        way, options = forgetting.method_of(method, self.options)
        scores = -train.base_loss if way.by_loss else train.quality
        signs = forgetting.choose_signs(way, scores, self.d_train, options, self.world.seed)
        forgetting.train(self.model, self.d_train, signs, here, options, self.world.seed)
        found = forgetting.measure(self.model, self.suite, here)
        remove_lora(self.model)
        return found

    def record(self, reference: Reference, methods: list[str]) -> dict:
        """The line of one reference, also in its folder; what is trained already is not trained again."""
        folder = self.world.folder / reference.name
        scored = self.scored(reference)
        steps = reference.passes * math.ceil(len(self.d_ref) / self.options.batch_size)
        record = {
            "world": self.world.name,
            "seed": self.world.seed,
            "D_train": Path(self.options.data[0]).stem,
            "D_ref": self.rows,
            "rate": reference.rate,
            "passes": reference.passes,
            "steps": steps,
        }
        record |= noise_figures(scored["train"], self.options)
        record |= trust_figures(*scored.values())
        record["trust gap"] = trust_gap(scored["held-out"], scored["train"])
        record["theta' held-out"] = float(np.nanmean(scored["held-out"].ref_loss))
        for method in methods:
            found = outcome(self.figures(method, scored["train"], folder))
            record |= {f"{method} {name}": value for name, value in found.items()}
        write_text(json.dumps(record) + "\n", folder / "record.json")
        print(f"{self.world.folder.name} {reference.name}: gap {record['gap in deviations']:.2f}", flush=True)
        return record


LOSSES = "losses.safetensors"


def keep_losses(scored: dict[str, Scored], folder: Path) -> None:
    """losses.safetensors: the rows of each corpus, and both losses of their tokens."""
    arrays = {}
    for name, part in scored.items():
        arrays[f"{name}.base_loss"] = part.base_loss
        arrays[f"{name}.ref_loss"] = part.ref_loss
        arrays[f"{name}.tokens"] = part.corpus.tokens
        arrays[f"{name}.offsets"] = part.corpus.offsets
        for kind, known in part.corpus.noise.items():
            arrays[f"{name}.noise.{kind}"] = known
    with whole_file(folder / LOSSES) as file:
        save_file(arrays, file)


def read_losses(folder: Path) -> dict[str, Scored]:
    """What keep_losses wrote: D_train, held-out and swapped."""
    arrays, scored = load_file(folder / LOSSES), {}
    for name in ("train", "held-out", "swapped"):
        head = f"{name}.noise."
        noise = {key.removeprefix(head): known for key, known in arrays.items() if key.startswith(head)}
        base_loss = arrays[f"{name}.base_loss"]
        offsets = arrays[f"{name}.offsets"]
        no_sources = [""] * (len(offsets) - 1)
        corpus = Corpus(arrays[f"{name}.tokens"], np.isfinite(base_loss), offsets, no_sources, 0, noise)
        scored[name] = Scored(corpus, base_loss, arrays[f"{name}.ref_loss"])
    return scored


# ------------------------------------------------------------------------------------------------- tables

SHOWN = {  # figure: its digits
    "AUC wrong": 2,
    "AUC": 2,
    "row AUC": 2,
    "gap in deviations": 2,
    "swap AUC": 2,
    "theta' held-out": 3,
}
OUTCOMES = {"average": 1, "held-out": 3}  # what a method is worth, in points and in nats: their digits
TRUST = (
    "gap",
    "gap in deviations",
    "gap of rows in deviations",
    "AUC of D_train",
    "matched gap",
    "regressed gap",
    "swap AUC",
    "swap gap in deviations",
    "Q of D_train in deviations",
    "deviation of Q",
)


def read_records(out: Path) -> list[dict]:
    """All that are finished, in the order of their folders."""
    return [read_object(path) for path in sorted(out.glob("*/*/record.json"))]


def kind_of(record: dict) -> tuple:
    """Records of one kind differ in the seed alone."""
    return record["D_ref"], record["rate"], record["passes"], record["steps"]


def with_gains(record: dict) -> dict:
    """The record with what each method is worth over `full`, in place of its own figures."""
    shown = dict(record)
    for name in record:
        method, _, measure = name.partition(" ")
        over = f"full {measure}"
        if measure in OUTCOMES and method not in ("full", "theta'") and over in record:
            shown[f"{method} - {over}"] = shown.pop(name) - record[over]
    return shown


def columns_of(records: list[dict]) -> dict[str, int]:
    """The columns of the table that some record has, each with its digits."""
    names = dict.fromkeys(name for record in records for name in record)
    outcomes = {
        name: digits for measure, digits in OUTCOMES.items() for name in names if name.endswith(f" {measure}")
    }
    columns = SHOWN | outcomes
    return {name: digits for name, digits in columns.items() if name in names}


def steps_table(records: list[dict]) -> str:
    """A line for each D_ref, rate and number of passes: means over seeds, with their intervals."""
    records = [with_gains(record) for record in records]
    columns = columns_of(records)
    lines = []
    for kind, group in itertools.groupby(sorted(records, key=kind_of), kind_of):
        found = list(group)
        line = [f"{part:g}" if isinstance(part, float) else str(part) for part in kind]
        line.append(str(len(found)))
        for name, digits in columns.items():
            values = [record[name] for record in found if name in record]
            line.append(look.mean_and_interval(values, digits) if values else "")
        lines.append(line)
    return table(["D_ref", "rate", "passes", "steps", "seeds", *columns], lines)


def ranks(values: Array) -> Array:
    """The place of each value in their order, ties sharing the mean of theirs."""
    ordered = np.sort(values)
    low = np.searchsorted(ordered, values, "left")
    high = np.searchsorted(ordered, values, "right")
    return (low + high - 1) / 2


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's; NaN where one of them has no order."""
    if min(len(set(a)), len(set(b))) < 2:
        return math.nan  # numpy would warn as well
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def trust_table(records: list[dict]) -> str:
    """A line for each figure: does it say whether, and by how much, ignoring beats full in held-out loss?"""
    gains = np.array([record["full held-out"] - record["ignoring held-out"] for record in records])
    row_auc = np.array([record.get("row AUC", math.nan) for record in records])
    known = np.isfinite(row_auc)
    lines = []
    for name in TRUST:
        values = np.array([record[name] for record in records])
        auc = forgetting.roc_auc(values[gains <= 0], values[gains > 0])
        with_gain = rank_correlation(values, gains)
        with_noise = rank_correlation(values[known], row_auc[known])
        lines.append([name, *(f"{figure:.2f}" for figure in (auc, with_gain, with_noise))])
    better = f"AUC of better ({(gains > 0).sum()} of {len(gains)})"
    return table(["figure", better, "rank correlation with the gain", "with the row AUC"], lines)


def verdict_table(records: list[dict]) -> str:
    """How often ignoring beat full in held-out loss, by where the trust gap's interval lay."""
    beat: dict[str, list[bool]] = {"above 0": [], "around 0": [], "below 0": []}
    for record in records:
        _, low, high = record["trust gap"]
        place = "above 0" if low > 0 else "below 0" if high < 0 else "around 0"
        beat[place].append(record["ignoring held-out"] < record["full held-out"])
    lines = [[place, f"{sum(found)} of {len(found)}"] for place, found in beat.items()]
    return table(["trust gap's interval", "ignoring beat full"], lines)


def all_tables(records: list[dict]) -> str:
    """The table of steps, and what the figures and the trust gap told where both methods were trained."""
    text = steps_table(records) + "\n"
    needed = {"full held-out", "ignoring held-out", "trust gap"}  # a record of an older version has no gap
    told = [record for record in records if needed <= set(record)]
    if len(told) > 1:  # one has no order
        text += f"\n{trust_table(told)}\n"
    if told:
        text += f"\n{verdict_table(told)}\n"
    return text


# -------------------------------------------------------------------------------------------------- main


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The tool's own flags, and what is left for forgetting.py's."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="./run.sh reference_steps", description=__doc__, formatter_class=as_written
    )
    parser.add_argument("--model", help="a real one, for real rows; else the demo's world")
    parser.add_argument("--rows", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--d-train", default="train", help="or train-clean, of which nothing is noise")
    parser.add_argument("--d-ref", nargs="+", default=["clean", "same"], help="NAME of reference-NAME.jsonl")
    parser.add_argument("--passes", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rates", nargs="+", type=float, default=[7.5e-4, 3e-3, 1.2e-2])
    parser.add_argument("--methods", nargs="+", default=["base", "full", "ignoring"])
    parser.add_argument("--out", type=Path, default=Path("runs/reference-steps"))
    return parser.parse_known_args(argv)


def main() -> None:
    """The command line."""
    own, rest = parse()
    limit_threads()
    try:
        worlds = real_worlds(own, rest) if own.model else demo_worlds(own, rest)
        for world, rows in itertools.product(worlds, own.d_ref):
            study = Study(world, rows)
            for rate, passes in itertools.product(own.rates, own.passes):
                study.record(Reference(rows, rate, passes), own.methods)
    except forgetting.USER_ERRORS as error:
        print(f"reference_steps.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what was saved")
        sys.exit(130)
    records = read_records(own.out)
    text = all_tables(records)
    write_rows(records, own.out / "records.jsonl")
    write_text(text, own.out / "results.md")
    print(text)


if __name__ == "__main__":
    main()
