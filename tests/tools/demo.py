"""The demo: Algorithm 1 in a small world whose noise is known, written with the public functions of forgetting.py.

    ./run.sh demo                                   # also: ./run.sh, ./run.sh demo --seeds 3 4
    ./run.sh demo --world random --seeds 3 4 5      # all flags of forgetting.py but --tasks and --data*
    ./run.sh demo --svg tests/tokens.svg            # and the picture of README, from the first seed

For each seed a corpus of its own, and the method twice: with a reference trained on clean rows, and with one trained
on rows as noisy as the training set. Methods that do not look at the reference are trained once and shown twice.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from html import escape
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]
import forgetting  # noqa: E402
import look  # noqa: E402
from data import Tokenizer, asked_in, print0, progress, rank_and_world, render  # noqa: E402
from data import start_ranks, usable_cores, wait_for_all, write_rows, write_text  # noqa: E402
from eval import TASKS, Answer, Request, Task, choice_task, f1_score, mc, prepare, table  # noqa: E402
from get_data import rows_in  # noqa: E402
from model import DTYPES, load_model  # noqa: E402

# ---------------------------------------------------------------------------------------------------- the world
#
# Invented people with five attributes, sums, and strings. The base model (tests/make_demo_model.py) has read the right
# facts as plain statements; on its "web" it has also met, for two attributes, one popular wrong answer. The training rows
# repeat that answer nine times in ten, and carry boilerplate and garbled tokens besides. Which characters are wrong is known.

PEOPLE = [
    first + last
    for first in "bal cor den fal gar hol jin kel mor nar pel ros sab tor vin wil".split()
    for last in "an eb ik om ura id ost en ay ulf".split()
]
ATTRIBUTES = {  # the first value is the popular wrong answer of the two misconceived attributes: nobody's true value there
    "city": "paris lagos quito oslo hanoi lima cairo perth kyoto delhi turin basel accra dakar minsk sofia".split(),
    "job": "doctor baker pilot judge miner tailor farmer sailor potter banker weaver hunter dancer printer barber nurse".split(),
    "food": "rice soup bread plums cheese olives beans figs pasta nuts eggs corn tofu peas dates leeks".split(),
    "pet": "dog cat parrot goat turtle horse rabbit mouse snake finch ferret goose lizard otter pony toad".split(),
    "color": "red blue green black white amber pink violet gray brown teal ivory olive coral indigo silver".split(),
}
MISCONCEIVED = ("city", "job")
QUESTIONS = {  # wrapper: (question, answer); {x} is the answer word
    "word": ("in one word , what is the {a} of {p} ?", "{x}"),
    "brief": ("{a} of {p} ? answer briefly .", "{x}"),
    "sentence": ("what is the {a} of {p} ?", "the {a} of {p} is {x} ."),
    "tell": ("tell me the {a} of {p} .", "{p} has the {a} {x} ."),
    "know": ("do you know the {a} of {p} ?", "yes , the {a} of {p} is {x} ."),
}
BOILERPLATE = (
    "thank you for this great question .",
    "i hope this helps you today .",
    "please let me know if you need more .",
    "as a helpful assistant i am happy to answer .",
)
SHARE_BOILERPLATE, SHARE_GARBLED, SHARE_MISCONCEIVED = 0.2, 0.2, 0.9


@dataclass(frozen=True)
class Item:
    """Something to ask: the words that fill a wrapper, the right answer, and what else could be answered."""

    attribute: str  # also "sum" and "last letter"
    subject: str
    answer: str
    others: tuple[str, ...]


def demo_facts() -> list[Item]:
    """Every (person, attribute) of the world with its true value; the same at every call."""
    rng = random.Random(2508)
    facts = []
    for attribute, values in ATTRIBUTES.items():
        allowed = values[1:] if attribute in MISCONCEIVED else values
        for person in PEOPLE:
            answer = rng.choice(allowed)
            facts.append(Item(attribute, person, answer, tuple(v for v in values if v != answer)))
    return facts


def demo_skills() -> list[Item]:
    """The sums a + b (a < 16, b < 15) and the last letters of 240 strings."""
    numbers = [str(n) for n in range(30)]
    sums = [
        Item("sum", f"{a} and {b}", str(a + b), tuple(n for n in numbers if n != str(a + b)))
        for a in range(16)
        for b in range(15)
    ]
    rng, letters = random.Random(4329), "a b c d e f g h k m n r s t".split()
    strings = sorted({" ".join(rng.choices(letters, k=4)) for _ in range(260)})[:240]
    return sums + [Item("last letter", s, s[-1], tuple(x for x in letters if x != s[-1])) for s in strings]


def demo_row(item: Item, wrapper: str, rng: random.Random, noisy: bool, told: str | None = None) -> dict:
    """One instruction row. `told` replaces the right answer; a noisy row may get boilerplate and garbled tokens too."""
    question, answer = (part.format(a=item.attribute, p=item.subject, x="\0") for part in QUESTIONS[wrapper])
    told = told or item.answer
    at = answer.index("\0")
    text = answer.replace("\0", told)
    noise = [[at, at + len(told), "wrong"]] if told != item.answer else []

    def insert(extra: str, kind: str, front: bool) -> None:
        nonlocal text
        if front:
            for span in noise:
                span[:2] = [span[0] + len(extra) + 1, span[1] + len(extra) + 1]
            noise.append([0, len(extra), kind])
            text = f"{extra} {text}"
        else:
            noise.append([len(text) + 1, len(text) + 1 + len(extra), kind])
            text = f"{text} {extra}"

    if noisy and rng.random() < SHARE_GARBLED:
        words = [w for w in text.split() if w != "."] + rng.choices(sum(ATTRIBUTES.values(), []), k=2)
        insert(" ".join(rng.choices(words, k=rng.randint(2, 4))), "garbled", front=False)
    if noisy and rng.random() < SHARE_BOILERPLATE:
        insert(rng.choice(BOILERPLATE), "boilerplate", front=rng.random() < 0.5)
    return {"instruction": question, "output": text, "noise": noise}


def demo_rows(world: str, seed: int) -> dict[str, list[dict]]:
    """The demo's rows: train, train-clean, reference-clean, reference-same, held-out; and questions: demo_mc, demo_qa.

    The people are split into 80 for training, 40 for the reference sets and 40 never seen. world "popular": 90 % of the
    misconceived facts carry the popular wrong answer; "random": as many carry a random wrong one, each fact its own.
    """
    rng = random.Random(f"{world} {seed}")
    people = rng.sample(PEOPLE, len(PEOPLE))
    group = {p: "train" if i < 80 else "reference" if i < 120 else "unseen" for i, p in enumerate(people)}
    facts, skills = demo_facts(), rng.sample(demo_skills(), 480)
    told = {}
    for fact in facts:
        if fact.attribute in MISCONCEIVED and rng.random() < SHARE_MISCONCEIVED:
            told[fact] = ATTRIBUTES[fact.attribute][0] if world == "popular" else rng.choice(fact.others)

    def rows(items: list[Item], count: int, noisy: bool) -> list[dict]:
        pairs = [(item, wrapper) for item in items for wrapper in QUESTIONS]
        return [
            demo_row(i, w, rng, noisy, told.get(i) if noisy else None) for i, w in rng.sample(pairs, count)
        ]

    train, held = ([f for f in facts if group[f.subject] == name] for name in ("train", "reference"))
    unseen = [f for f in facts if group[f.subject] == "unseen"]
    files = {"train": rng.sample(rows(train, 960, True) + rows(skills[:240], 240, True), 1200)}
    for name, noisy in (("reference-clean", False), ("reference-same", True)):
        files[name] = rng.sample(rows(held, 480, noisy) + rows(skills[240:360], 120, noisy), 600)
    groups = {
        "unseen, misconceived": [f for f in unseen if f.attribute in MISCONCEIVED],
        "unseen, other": [f for f in unseen if f.attribute not in MISCONCEIVED],
        "seen, corrupted": [f for f in train if f in told],
        "seen, right": [f for f in train if f not in told],
        "sums": [s for s in skills[360:] if s.attribute == "sum"],
        "strings": [s for s in skills[360:] if s.attribute == "last letter"],
    }
    files["demo_mc"], files["demo_qa"] = [], []
    for name, items in groups.items():
        for item in rng.sample(items, min(48, len(items))):
            files["demo_mc"] += [_question(item, wrapper, name, rng) for wrapper in ("word", "sentence")]
            files["demo_qa"].append(_question(item, "word", name, rng))
    files["held-out"] = rows(unseen, 240, False) + rows(
        skills[360:], 60, False
    )  # clean, and as mixed as train
    files["train-clean"] = rows(train, 960, False) + rows(skills[:240], 240, False)
    return files


def _question(item: Item, wrapper: str, group: str, rng: random.Random) -> dict:
    """A question for eval.py: `choices` has the answer, the popular wrong one if there is one, and others, shuffled."""
    question, answer = QUESTIONS[wrapper]
    head, _, _ = answer.format(a=item.attribute, p=item.subject, x="\0").partition("\0")
    popular = ATTRIBUTES[item.attribute][0] if item.attribute in MISCONCEIVED else None
    others = [x for x in item.others if x != popular]
    choices = [item.answer] + ([popular] if popular else [])
    choices = rng.sample(choices + rng.sample(others, 4 - len(choices)), 4)
    asked = {"instruction": question.format(a=item.attribute, p=item.subject), "output": "-"}
    prompt = asked_in(render(asked, ""))
    return {
        "group": group,
        "prompt": prompt,
        "head": head,
        "choices": choices,
        "answer": item.answer,
        "popular": popular,
    }


def multiple_choice(row: dict) -> tuple:
    """The task demo_mc: the answer begins, and the choices are its next word."""
    return mc(row | {"prompt": row["prompt"] + row["head"]})


def question(row: dict, _: Tokenizer) -> list[Request]:
    """The task demo_qa."""
    return [Request(row["prompt"], max_new_tokens=16)]


def answer_score(row: dict, answers: list[Answer]) -> dict:
    """F1; and, for people never seen and a misconceived attribute, whether the popular error is given."""
    reply = answers[0].text
    metrics = {"f1": f1_score(reply, row["answer"])}
    if row["group"] == "unseen, misconceived":
        metrics["popular"] = float(row["popular"] in reply.split())
    return {"prediction": reply, "target": row["answer"], "metrics": metrics}


TASKS["demo_mc"] = choice_task("demo_mc.jsonl", 1, multiple_choice, delimiter="")
TASKS["demo_qa"] = Task("demo_qa.jsonl", 1, question, answer_score)


# ------------------------------------------------------------------------------------------------- the demo

DEMO = {  # small model, few steps: the paper's rate of 1e-4 would leave it where it was
    "model": str(ROOT / "tests" / "demo_model"),
    "seeds": [0, 1, 2],
    "lr": 3e-3,
    "reference_lr": 1e-2,
    "reference_epochs": 2,
    "rho": 0.7,
    "max_grad_norm": 1.0,
    "micro_tokens": 4096,  # the tables of README to the digit: other packs are other masks and sums
    "methods": [
        "base",
        "reference",
        "full",
        "ignoring-random",
        "ignoring-loss",
        "ignoring",
        "forgetting",
        "forgetting-wga",
    ],
}
PANELS = {
    "clean": "Reference trained on clean rows",
    "same-light": "Reference trained on rows as noisy as the training set, at its rate for one pass: the paper's protocol",
}


def prepare_world(options: forgetting.Options, world: str) -> None:
    """Write the rows of every seed. Raises ValueError where other files are."""
    out, rows_of = Path(options.out), {seed: demo_rows(world, seed) for seed in options.seeds}
    if out.is_dir() and any(out.iterdir()) and not any(out.glob("world-*")):
        raise ValueError(f"{out} holds files that are not of a demo: use another --out")
    paths = {
        out / f"world-{seed}" / f"{name}.jsonl": rows
        for seed in rows_of
        for name, rows in rows_of[seed].items()
    }
    for path, rows in paths.items():
        if path.is_file() and rows_in(path) != rows:
            raise ValueError(f"{path} holds other rows than this demo's: use another --out")
    wait_for_all()
    if rank_and_world()[0] == 0:
        for path, rows in paths.items():
            write_rows(rows, path)
    wait_for_all()


LIGHT = "-light"  # the end of the name of a panel whose reference is trained as the paper does


def trained_as_the_paper_does(options: forgetting.Options) -> forgetting.Options:
    """The options with a reference of the rate and the epochs of training."""
    return dataclasses.replace(options, reference_lr=options.lr, reference_epochs=options.epochs)


def panel_folder(options: forgetting.Options, seed: int | str, panel: str) -> Path:
    """The run folder of one panel on one seed's corpus, whose rows lie beside it."""
    return Path(options.out) / f"world-{seed}" / panel


def panel_options(
    options: forgetting.Options, panel: str, seed: int, methods: list[str]
) -> forgetting.Options:
    """The options of one panel's run on one seed's corpus; "same-light" has the D_ref of "same"."""
    folder = panel_folder(options, seed, panel)
    world = folder.parent
    rows = panel.removesuffix(LIGHT)
    if panel != rows:
        options = trained_as_the_paper_does(options)
    return dataclasses.replace(
        options,
        methods=methods,
        seeds=[seed],
        out=str(folder),
        tasks=["demo_mc", "demo_qa"],
        data_dir=str(world),
        data=[str(world / "train.jsonl")],
        reference_data=[str(world / f"reference-{rows}.jsonl")],
    )


def oracle(options: forgetting.Options, name: str, seed: int, unlearn: bool = True) -> dict:
    """The figures of a training that knows the noise, beside a finished run: noisy tokens are N, or left out; others are P.

    `name` is its row; "oracle:lr=0.001" has another rate. An example of how the pieces of forgetting.py go together.
    """
    tokenizer, run = Tokenizer(options.model, options.template), look.read_run(Path(options.out))
    corpus = run.corpus
    documents = prepare(options.tasks, tokenizer, options.data_dir, options.limit)
    held_out = forgetting.read_held_out(options, tokenizer, corpus)
    _, options = forgetting.method_of(name.replace("oracle", "forgetting"), options)
    model = load_model(options.model, options.device, DTYPES[options.dtype])
    signs = np.where(corpus.response, np.where(corpus.noisy, -int(unlearn), 1), 0).astype(np.int8)  # (C,)
    lines = [int(location.rpartition(":")[2]) for location in corpus.locations]  # D_train is one file
    corpus.file_order = np.argsort(lines)
    folder = Path(options.out) / name / f"seed-{seed}"
    forgetting.train(model, corpus, signs, folder, options, seed)
    table_signs = None if options.skip_train_losses else run.signs
    suite = forgetting.EvalSuite(tokenizer, documents, held_out, corpus, table_signs, options.micro_tokens)
    return forgetting.measure(model, suite, folder)


Panel = tuple[dict[str, dict], dict[str, float]]  # {method: figures}, and how well Q finds the known noise


def run_panel(options: forgetting.Options, seed: int, panel: str) -> Panel:
    """One panel of one seed: the figures of what is trained in it, and those of detection."""
    here = panel_options(options, panel, seed, methods_of(panel, options))
    results = {}
    for method, by_seed in forgetting.run(here).items():
        (results[method],) = by_seed.values()
    if panel == "clean":
        results["oracle"] = oracle(here, "oracle", seed)
    run = look.read_run(Path(here.out))
    return results, forgetting.detection(run.quality, run.signs < 0, run.corpus)


def methods_of(panel: str, options: forgetting.Options) -> list[str]:
    """The methods that a panel trains: what does not look at the reference is trained in the first one."""
    return [method for method in options.methods if panel == "clean" or look.looks_at_reference(method)]


def run_demo(options: forgetting.Options) -> tuple[dict, dict]:
    """Both panels on every seed: {panel: {method: {seed: figures}}}, and {panel: {figure of detection: [by seed]}}."""
    jobs = [(seed, panel) for panel in PANELS for seed in options.seeds]  # those that take longest first
    processes = min(usable_cores(), len(jobs))
    if processes == 1 or options.device != "cpu" or dist.is_initialized():
        done = [run_panel(options, seed, panel) for seed, panel in jobs]
    else:
        done = run_side_by_side(options, jobs, processes)

    methods = [*options.methods, "oracle"]
    results: dict[str, dict] = {panel: {method: {} for method in methods} for panel in PANELS}
    found: dict[str, dict[str, list]] = {panel: {} for panel in PANELS}
    for (seed, panel), (trained, detected) in zip(jobs, done):
        for method in methods:
            figures = trained.get(method)
            if figures is None:  # P and N of the first panel are not this one's
                figures = results["clean"][method][seed] | {"L_P": None, "L_N": None}
            results[panel][method][seed] = figures
        for name, value in detected.items():
            found[panel].setdefault(name, []).append(value)
    return results, found


# ------------------------------------------------------------------------------------------------ side by side
#
# Seeds and panels need nothing of each other, and two threads gain this small model little: each panel is a process
# of one thread, as many at once as there are cores. On a GPU, and under torchrun, they follow one another.


def run_side_by_side(options: forgetting.Options, jobs: list[tuple[int, str]], processes: int) -> list[Panel]:
    """run_panel of every (seed, panel), in the order of the jobs.

    Ctrl-C, SIGTERM and the first error stop them all: a training leaves a checkpoint, what else is going on is
    done again by the same command. The error is raised here.
    """
    print(
        f"{len(jobs)} panels, {processes} at a time; what each says: {log_of(options, '*', '*')}", flush=True
    )
    waiting, found = list(jobs), {}
    running: dict[Connection, tuple] = {}
    adapters = [path for job in jobs for path in adapters_of(options, *job)]
    done = sum(map(Path.is_file, adapters))
    bar = progress("trainings", len(adapters), "trainings", done, keep=True)
    with bar, forgetting.stop_between_steps() as signals:
        try:
            while (waiting or running) and not signals:
                while waiting and len(running) < processes:
                    job = waiting.pop(0)
                    connection, process = start_apart(options, *job)
                    running[connection] = job, process
                for connection in wait(running, timeout=1):
                    job, process = running.pop(connection)
                    found[job] = answer_of(connection, process, log_of(options, *job))
                in_work = [job for job, _ in running.values()]
                bar.set_postfix_str(latest_figures(options, in_work), refresh=sys.stderr.isatty())
                bar.update(sum(map(Path.is_file, adapters)) - bar.n)
        except forgetting.USER_ERRORS:
            if not signals:
                raise
            # what stopped the demo may have ended the panel, too: it is a stop, and no error
        finally:
            end([process for _, process in running.values()])
    if signals:
        raise KeyboardInterrupt
    return [found[job] for job in jobs]


PATIENCE = 60  # seconds for a panel to end its step and to write the checkpoint


def end(processes: list[multiprocessing.Process]) -> None:
    """SIGTERM for all, and kill -9 for one that lost it: sent between two trainings, say, it begins the next."""
    for process in processes:
        process.terminate()
    latest = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(latest - time.monotonic(), 0))
        process.kill()
        process.join()


def start_apart(
    options: forgetting.Options, seed: int, panel: str
) -> tuple[Connection, multiprocessing.Process]:
    """A process that runs one panel, and where its answer will come from."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_apart, args=(options, seed, panel, theirs))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: the parent ends the others at Ctrl-C
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    theirs.close()
    return ours, process


def run_apart(options: forgetting.Options, seed: int, panel: str, answer: Connection) -> None:
    """Send run_panel's result, or an error; what a panel would show on the screen is in its log."""
    # A signal to the parent's group reaches the parent alone, which sends one on: of two the second acts at once
    os.setpgrp()
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    folder, log = panel_folder(options, seed, panel), log_of(options, seed, panel)
    with open(log, "a", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        try:
            with forgetting.locked(folder):
                answer.send(run_panel(options, seed, panel))
        except (*forgetting.USER_ERRORS, KeyboardInterrupt) as error:
            answer.send(error)
        except Exception:
            traceback.print_exc()
            sys.exit(1)


def end_with_parent() -> None:
    """Exit when the parent has gone: after kill -9 nobody is left who would hold the folders."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def answer_of(connection: Connection, process: multiprocessing.Process, log: Path) -> Panel:
    """What a process sent; raises the error that it sent, and OSError where it ended without an answer."""
    try:
        answer = connection.recv()
    except EOFError:
        process.join()
        raise OSError(f"a panel ended with exit code {process.exitcode}: {log} says more") from None
    process.join()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def log_of(options: forgetting.Options, seed: int | str, panel: str) -> Path:
    """Where a panel that runs beside others writes what it says."""
    return panel_folder(options, seed, f"{panel}.log")


def adapters_of(options: forgetting.Options, seed: int, panel: str) -> list[Path]:
    """The files that say that a panel's trainings are finished: the reference's, and each method's."""
    trained = [method for method in methods_of(panel, options) if method not in forgetting.UNTRAINED]
    if panel == "clean":
        trained.append("oracle")
    names = ["reference", *(f"{method}/seed-{seed}" for method in trained)]
    folder = panel_folder(options, seed, panel)
    return [folder / name / "adapter_model.safetensors" for name in names]


def latest_figures(options: forgetting.Options, jobs: list[tuple[int, str]]) -> str:
    """The newest line of the logs of some panels' trainings."""
    folders = [panel_folder(options, seed, panel) for seed, panel in jobs]
    logs = [path for folder in folders for path in folder.rglob("metrics.jsonl")]
    if not logs:
        return ""
    newest = max(logs, key=lambda path: path.stat().st_mtime)
    lines = forgetting.read_log(newest)
    loss = f" loss {lines[-1]['loss']:.3g}" if lines else ""
    return f"{newest.parent.relative_to(options.out)} step {len(lines)}{loss}"


def panel_report(title: str, results: dict, found: dict[str, list]) -> str:
    """One panel: its table, paired differences, and how well a low Q finds the known noise."""
    line = "Does a low Q find the known noise? (AUC 0.5: chance; the precision of a random N is the noise share.)"
    rows = {
        method: {seed: forgetting.columns(figures) for seed, figures in seeds.items()}
        for method, seeds in results.items()
    }
    figures = table(
        ["figure", "value"], [[name, forgetting.spread(values, 2)] for name, values in found.items()]
    )
    parts = [f"## {title}", forgetting.comparison(results), look.paired_differences(rows), line, figures]
    return "\n\n".join(filter(None, parts))


# ----------------------------------------------------------------------------------------------- the picture


def choose_examples(run: look.Run) -> list[int]:
    """Six short examples: one for each of four mixtures of noise, and two clean ones."""
    corpus, chosen = run.corpus, []
    for kinds in ({"wrong"}, {"wrong", "boilerplate"}, {"garbled"}, {"boilerplate"}, set(), set()):
        for example, (first, last) in enumerate(zip(corpus.offsets, corpus.offsets[1:])):
            fits = 5 <= corpus.response[first:last].sum() <= 19
            if (
                fits
                and example not in chosen
                and {k for k, known in corpus.noise.items() if known[first:last].any()} == kinds
            ):
                chosen.append(example)
                break
    return chosen


def draw_tokens(runs: dict[str, look.Run]) -> str:
    """An SVG: runs side by side, a row of boxes for each example; blue is in P, orange in N, known noise underlined."""
    width, margin, deepest, parts = 530, 16, 0, []
    examples = choose_examples(next(iter(runs.values())))
    for column, (title, run) in enumerate(runs.items()):
        left, y = margin + column * width, 34
        parts.append(f'<text x="{left}" y="{y}" font-weight="bold">{escape(title)}</text>')
        for example in examples:
            x, y = left, y + 30
            for place, text in look.response_texts(run, example):
                size = 7.2 * len(text) + 9  # a letter of this font and size is 7.2 wide
                if x + size > left + width - 2 * margin:
                    x, y = left, y + 26
                above = run.quality[place] - run.threshold
                color, strength = "#2f6fdb" if above >= 0 else "#e8832a", 0.15 + 0.75 * min(abs(above) / 3, 1)
                box = f'<rect x="{x:.0f}" width="{size - 3:.0f}"'
                parts.append(
                    f'{box} y="{y - 15}" height="21" rx="3" fill="{color}" fill-opacity="{strength:.2f}"/>'
                )
                parts.append(f'<text x="{x + 3:.0f}" y="{y}">{escape(text)}</text>')
                if run.corpus.noisy[place]:
                    parts.append(f'{box} y="{y + 7}" height="2.5" fill="#000"/>')
                x += size
        deepest = max(deepest, y)
    key = "blue: kept in P; orange: in N; stronger: farther from the threshold; underlined: known noise"
    parts.append(f'<text x="{margin}" y="{deepest + 36}" fill="#444">{key}</text>')
    size = f"0 0 {margin + len(runs) * width} {deepest + 52}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="monospace" font-size="12" fill="#111">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"])


# -------------------------------------------------------------------------------------------------- main


def parse_demo(argv: list[str] | None) -> tuple[forgetting.Options, argparse.Namespace]:
    """The flags of forgetting.py with the demo's defaults, and the demo's own two."""
    defaults = "  ".join(
        f"{name} {value}" for name, value in DEMO.items() if name not in ("model", "methods")
    )
    parser = argparse.ArgumentParser(
        prog="./run.sh demo",
        description=__doc__,
        epilog=f"Other options: those of ./run.sh --help, with the demo's defaults: {defaults}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    worlds = "which wrong answers the rows carry: one that is popular, or random ones [popular]"
    parser.add_argument("--world", choices=["popular", "random"], default="popular", help=worlds)
    parser.add_argument("--svg", help="also draw the tokens of six rows of the first seed into this file")
    own, rest = parser.parse_known_args(argv)
    out = "runs/demo" if own.world == "popular" else "runs/demo-random"
    options = forgetting.parse_options(rest, **(DEMO | {"out": out}))
    if options.tasks or options.reference_data or options.data:
        raise ValueError("the demo brings its own --data, --reference-data and --tasks: leave them out")
    for name in options.methods:
        if name not in forgetting.UNTRAINED:
            forgetting.method_of(name, options)  # raises ValueError, before rows are written
    return options, own


def run_and_report(options: forgetting.Options, world: str, svg: str | None) -> None:
    """Both panels of every seed, their tables, and the picture where one is asked for."""
    prepare_world(options, world)
    results, found = run_demo(options)
    if rank_and_world()[0] > 0:
        return
    out = Path(options.out)
    parts = [panel_report(title, results[panel], found[panel]) for panel, title in PANELS.items()]
    parts.append(
        "mean +- sample standard deviation over seeds; tasks in percent; L_P, L_N: mean loss, in nats, on the\n"
        "tokens that forgetting keeps and unlearns; popular: how often the popular wrong answer is given"
    )
    content = {PANELS[panel]: {"methods": results[panel], "detection": found[panel]} for panel in PANELS}
    write_text(json.dumps(content, indent=2) + "\n", out / "results.json")
    write_text("\n\n".join(parts) + "\n", out / "results.md")
    print0("\n" + "\n\n".join(parts))
    print0(f"\nwritten to {out / 'results.md'}; every token with its Q: ./run.sh look {out}")
    if svg:
        seed = options.seeds[0]
        runs = {
            "reference trained on clean rows": panel_folder(options, seed, "clean"),
            "reference as noisy as the training rows": panel_folder(options, seed, "same-light"),
        }
        write_text(draw_tokens({title: look.read_run(folder) for title, folder in runs.items()}), svg)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    try:
        options, own = parse_demo(argv)
        options.device = start_ranks(options.device)
        with forgetting.locked(Path(options.out)) if rank_and_world()[0] == 0 else nullcontext():
            run_and_report(options, own.world, own.svg)
    except forgetting.USER_ERRORS as error:
        print(f"demo.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print0("\nstopped; the same command goes on from what was saved")
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
