"""What a run found, to look at: its table, and every token with its Q, in RUN/report.html.

    ./run.sh look runs/mine                     # writes runs/mine/report.html, which opens offline
    ./run.sh look runs/mine --rows by-q.jsonl   # each row of D_train with its figures, lowest Q first
    ./run.sh look runs/mine --rows by-loss.jsonl --by loss      # or those first that theta finds hardest
    ./run.sh look runs/mine --text              # rows coloured in the terminal
    ./run.sh look runs/split-0 runs/split-1     # one table of several runs, with paired differences
    ./run.sh look runs/demo                     # a page for every run of the demo

Blue tokens are in P, orange ones in N, stronger the farther Q is from the threshold. Where rows have a field `noise`,
[[start, end, kind], ...] in characters of the response, its tokens are underlined, and the page says how well a low Q
finds them. Order: the run, several runs, warnings, tokens, drawings, page, command line.
"""

import argparse
import math
import os
import re
import sys
import types
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import groupby
from itertools import product
from pathlib import Path
from typing import Iterable, Sequence

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from data import Corpus, Tokenizer, read_object, read_rows, write_rows, write_text  # noqa: E402
from eval import table  # noqa: E402
from forgetting import LOSSES, METHODS, choose_signs, columns, comparison, detection, finished, is_row  # noqa: E402
from forgetting import quality_scores, read_log, read_scores, sequence_means, spread  # noqa: E402
from forgetting import student_t_quantile  # noqa: E402
from model import checkpoint_folder  # noqa: E402

Array = np.ndarray  # (C,): one for each token of D_train; (E,): one for each of its rows

# ------------------------------------------------------------------------------------------------ the run


@dataclass
class Run:
    """What stages 2 and 3 found on D_train."""

    folder: Path
    config: dict
    corpus: Corpus  # D_train
    base_loss: Array  # (C,) nats, under theta; NaN where nothing is judged
    ref_loss: Array  # (C,) nats, under theta'
    quality: Array  # (C,) Q
    mean_quality: Array  # (E,) over the response tokens of a row
    mean_loss: Array  # (E,) nats, under theta, over the same tokens
    signs: Array  # (C,) the sides of plain forgetting: +1 in P, -1 in N, 0 left out
    threshold: float  # the lowest Q in P

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's; read only where texts are needed."""
        name = self.config["model"]
        return Tokenizer(checkpoint_folder(str(nearby(name, self.folder) or name)))

    def places(self, example: int) -> range:
        """Where the response of a row lies, from its first token to its last."""
        first, last = self.corpus.offsets[example : example + 2]
        judged = np.flatnonzero(self.corpus.response[first:last]) + first
        return range(int(judged[0]), int(judged[-1]) + 1)

    def text(self, first: int, last: int) -> str:
        """The text of the tokens from first to last - 1."""
        return self.tokenizer.decode(self.corpus.tokens[first:last].tolist()).strip()


def read_run(folder: Path) -> Run:
    """A run folder's scores and sides. Raises ValueError where they are missing, unfinished, or of other rows."""
    path = folder / "scores.safetensors"
    if not path.is_file():
        raise ValueError(
            f"{folder}: no scores.safetensors in it, so it is not the folder of a run that scored"
        )
    base_loss, ref_loss, done = read_scores(path)
    arrays, config = load_file(path), read_object(folder / "config.json")
    if missing := {"tokens", "offsets", "sources"} - arrays.keys():
        raise ValueError(
            f"{path} has no {' and '.join(sorted(missing))}: remove it and give the run's command again"
        )
    sources = arrays["sources"].tobytes().decode().split("\n")
    noise = {
        name.removeprefix("noise."): known for name, known in arrays.items() if name.startswith("noise.")
    }
    corpus = Corpus(arrays["tokens"], np.isfinite(base_loss), arrays["offsets"], sources, 0, noise)
    if done < len(corpus):
        raise ValueError(f"{path} covers {done} of {len(corpus)} rows: give the run's command again")
    if corpus.fingerprint() != config.get("inputs", {}).get("training data"):
        raise ValueError(f"{path} was not made from the rows that config.json beside it names")
    quality = quality_scores(base_loss, ref_loss)
    shares = types.SimpleNamespace(rho=config.get("rho"), forget_rate=config.get("forget_rate"))
    signs = choose_signs(METHODS["forgetting"], quality, corpus, shares, seed=0)
    mean_quality, _ = sequence_means(quality, corpus)
    mean_loss, _ = sequence_means(base_loss, corpus)
    kept = quality[signs > 0]  # none with --rho positive, where theta' finds nothing easier
    threshold = float(kept.min()) if len(kept) else math.inf
    return Run(
        folder, config, corpus, base_loss, ref_loss, quality, mean_quality, mean_loss, signs, threshold
    )


def nearby(name: str, folder: Path) -> Path | None:
    """The file or folder that a run was given by this name: it may be meant from a folder above the run's."""
    places = [Path(name), *(above / name for above in folder.resolve().parents)]
    return next((place for place in places if place.exists()), None)


def rows_in_order(run: Run, by: str = "q") -> list[dict]:
    """An object for each row of D_train, the suspicious first; all figures are over its response tokens.

    by: "q", the lowest mean Q first, or "loss", the highest mean loss under theta first. `row` is the row as its
    file has it, to be read, filtered and trained again; null where the file is gone or has changed.
    """
    figures = {"mean_Q": run.quality, "loss_theta": run.base_loss, "loss_theta_prime": run.ref_loss}
    figures["share_in_N"] = run.signs < 0
    means = {}
    for name, values in figures.items():
        by_row, counts = sequence_means(values, run.corpus)  # (E,) each
        means[name] = by_row.round(6).tolist()
    originals = original_rows(run)
    lines = []
    for row in first_to_look_at(run, by):
        location = run.corpus.locations[row]
        line = {"source": location} | {name: means[name][row] for name in means}
        lines.append(line | {"response_tokens": int(counts[row]), "row": originals.get(location)})
    return lines


def first_to_look_at(run: Run, by: str) -> Array:
    """All rows (E,), by the lowest mean Q, or by the highest mean loss under theta."""
    suspicion = {"q": run.mean_quality, "loss": -run.mean_loss}[by]
    return np.argsort(suspicion, kind="stable")


def original_rows(run: Run) -> dict[str, dict]:
    """{location: row} of the rows of --data, from the files as they are now."""
    found = {}
    names = dict.fromkeys(location.rpartition(":")[0] for location in run.corpus.locations)
    for name in names:
        path = nearby(name, run.folder)
        if path is None:
            continue
        for row in read_rows([str(path)], keep_bad=True):
            number = row.pop("_source").rpartition(":")[2]
            if "_bad" not in row:
                found[f"{name}:{number}"] = row
    return found


def read_logs(folder: Path, methods: Sequence[str] = ()) -> tuple[dict[str, list[dict]], list[str]]:
    """The log of each training, up to a line that was cut off, by its name, such as full/seed-0.

    In the order of `methods`; those that are not among them come last, the reference first. Beside them the
    names of logs that are not read: of a method that is gone, of a copy that somebody keeps, say full/seed-0.bak.
    """
    logs: dict[str, list[dict]] = {}
    left_out = []
    for path in sorted(folder.glob("**/metrics.jsonl")):
        name = path.parent.relative_to(folder).as_posix()
        method, _, seed = name.partition("/seed-")
        if is_row(method) and (seed.isdigit() or name == method):
            logs[name] = read_log(path)
        else:
            left_out.append(name)
    places = {name: place for place, name in enumerate(["reference", *methods])}

    def place_of(name: str) -> tuple:
        method, _, seed = name.partition("/seed-")
        return places.get(method, len(places)), method, int(seed or 0)

    return {name: logs[name] for name in sorted(logs, key=place_of)}, left_out


# ------------------------------------------------------------------------------------------- several runs


def gather(rows: Iterable[dict[str, float]]) -> dict[str, list[float]]:
    """{column: its figures} of some rows of a table."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


def differences(ours: dict, theirs: dict) -> dict[str, list[float]]:
    """{column: ours - theirs for each key of both}, of two methods' {key: row}; a key is a seed, a run, or another split."""
    names = {
        key: [name for name in ours[key] if name in theirs[key] and name not in ("L_P", "L_N")]
        for key in ours
        if key in theirs
    }
    return gather({name: ours[key][name] - theirs[key][name] for name in names[key]} for key in names)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean over seeds or runs, Student's t: a bootstrap of so few would promise too much."""
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = student_t_quantile(0.05, len(values) - 1) * error
    return mean - reach, mean + reach


def mean_and_interval(values: Sequence[float], digits: int, sign: str = "") -> str:
    """The mean and, of three values or more, its 95 % interval."""
    text = f"{np.mean(values):{sign}.{digits}f}"
    if len(values) < 3:
        return text
    low, high = t_interval(values)
    return f"{text} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def spread_table(corner: str, figures: dict[str, dict[str, list[float]]], paired: bool = False) -> str:
    """{line: {column: figures}} as mean +- deviation.

    Of pairs: the mean difference, its interval, and how many differences have the mean's sign.
    """
    names = list(dict.fromkeys(name for line in figures.values() for name in line))
    lines = []
    for what, line in figures.items():
        cells = {}
        for name, values in line.items():
            digits = 3 if name in LOSSES else 1
            if paired:
                same_sign = (np.sign(values) == np.sign(np.mean(values))).sum()
                cells[name] = f"{mean_and_interval(values, digits, '+')} ({same_sign}/{len(values)})"
            else:
                cells[name] = spread(values, digits)
        lines.append([what, *(cells.get(name, "") for name in names)])
    return table([corner, *names], lines)


def paired_differences(rows: dict[str, dict]) -> str:
    """A table of each method minus full, and minus ignoring, of {method: {key: row}}; "" where there is no pair."""
    pairs = [
        (method, baseline)
        for baseline, method in product(("full", "ignoring"), rows)
        if baseline in rows and method not in ("base", "full", baseline)
    ]
    figures = {
        f"{method} - {baseline}": differences(rows[method], rows[baseline]) for method, baseline in pairs
    }
    figures = {pair: found for pair, found in figures.items() if found}
    title = (
        "Paired differences, 95 % intervals of three or more (in how many the difference has this sign):\n\n"
    )
    return title + spread_table("pair", figures, paired=True) if figures else ""


def join_runs(runs: Sequence[Sequence[Path]]) -> str:
    """The results of several runs in one table; each run counts once, with its means over its seeds.

    A run may be several folders that share D_train, each with a reference of its own: only the last one's
    reference counts, and of a method that two of them have the last one.
    """
    once = list({folders[-1].resolve(): folders for folders in runs}.values())
    names = ", ".join(str(folders[-1]) for folders in once)
    notes = [f"mean +- sample standard deviation over {len(once)} runs: {names}"]
    if len(once) < len(runs):
        notes.append("a run that was named twice counts once")
    rows: dict[str, dict[Path, dict[str, float]]] = {}
    for folders in once:
        for method, figures in means_of_run(folders, notes).items():
            rows.setdefault(method, {})[folders[-1]] = figures
    figures = {f"{method} ({len(by_run)})": gather(by_run.values()) for method, by_run in rows.items()}
    parts = [spread_table("method (runs)", figures), paired_differences(rows), "\n".join(notes)]
    return "\n\n".join(filter(None, parts))


def looks_at_reference(method: str) -> bool:
    """Whether a method, or a variant of one, gives something else with another reference."""
    stem = method.partition(":")[0]
    if stem not in METHODS:
        return stem == "reference"  # not base; the oracle knows the noise and asks nobody
    way = METHODS[stem]
    return not (way.rho == 1 or way.random or way.by_loss)


def means_of_run(folders: Sequence[Path], notes: list[str]) -> dict[str, dict[str, float]]:
    """{method: its figures, means over seeds} of a run's folders; what is left out is noted."""
    means = {}
    for folder in folders:
        done, left_out = finished(folder, {})
        if not done:
            raise ValueError(f"{folder}: no finished method of a run in it")
        notes += [f"not in the table: {folder}/{what}" for what in left_out]
        for method, by_seed in done.items():
            if folder != folders[-1] and looks_at_reference(method):
                continue  # it was made with another reference than the run's
            figures = gather(map(columns, by_seed.values()))
            means[method] = {name: float(np.mean(values)) for name, values in figures.items()}
    return means


# ----------------------------------------------------------------------------------------------- warnings


def notes_on(name: str, log: list[dict]) -> list[str]:
    """What the table must not hide about a training: that it moved, learned or unlearned nothing, or does harm."""
    method = METHODS.get(re.split("[:/]", name)[0])
    findings = {
        "all its steps had rate 0, so it is the base model": not any(line["lr"] for line in log),
        "no token was learned: P is empty": all(line["L_P"] is None for line in log),
        "no token was unlearned: N is empty, or lambda stayed 0": method is not None
        and method.unlearn
        and all(line["L_N"] is None for line in log),
    }
    return [f"{name}: {note}" for note, found in findings.items() if log and found]


# ------------------------------------------------------------------------------------------------- tokens

PART = "\u00b7"  # stands for a token whose character goes on in the next one
MOST_PARTS = 8  # a character has at most four bytes, but a token may end one and begin the next
SIDES = {1: "in P", -1: "in N", 0: "left out"}


def token_text(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Tokens as a reader knows them, with the leading space of the first; U+FFFD where a character is not whole."""
    text, name = tokenizer.decode(tokens, skip_special=False), tokenizer.raw.id_to_token(tokens[0]) or ""
    return " " + text if name.startswith("\u2581") and not text.startswith(" ") else text


def response_texts(run: Run, example: int) -> list[tuple[int, str]]:
    """(place, text) of a response's tokens; a character in several tokens stands on the last, PART on those before."""
    places, texts = run.places(example), []
    tokens = run.corpus.tokens[places.start : places.stop].tolist()
    while tokens:
        sizes = range(1, min(len(tokens), MOST_PARTS) + 1)  # where no end is found, the text itself is broken
        size = next((n for n in sizes if "\ufffd" not in token_text(run.tokenizer, tokens[:n])), 1)
        texts += [PART] * (size - 1) + [visible(token_text(run.tokenizer, tokens[:size]))]
        tokens = tokens[size:]
    return list(zip(places, texts))


def visible(text: str) -> str:
    """Text with control characters and changes of direction shown by name, so that none of them acts."""
    acting = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
    return re.sub(acting, lambda found: f"\u2039U+{ord(found[0]):04X}\u203a", text)


def safe(text: str, most: int | None = None) -> str:
    """Text for HTML, also inside an attribute; without its middle, if it has more than `most` characters."""
    short = (
        text if most is None or len(text) <= most else f"{text[: most // 2]} [\u2026] {text[-most // 2 :]}"
    )
    return escape(visible(short))


def rows_to_show(run: Run, count: int, most_tokens: int = 150_000) -> Array:
    """A third each: lowest mean Q, highest loss under theta, at random; fewer than count of long responses."""
    count = min(count, 1 + int(most_tokens * len(run.corpus) / run.corpus.response.sum()))
    third = (count + 2) // 3
    first = [*first_to_look_at(run, "q")[:third], *first_to_look_at(run, "loss")[:third]]
    first += np.random.default_rng(0).permutation(len(run.corpus)).tolist()
    return np.array(list(dict.fromkeys(map(int, first)))[:count])


def token_html(run: Run, place: int, text: str, noisy: bool) -> str:
    """One token: class p, n or o (left out), and k for known noise; Q and the base loss for hover and tap."""
    text = escape(text).replace("\n", "\u23ce\n")
    if not run.corpus.response[place]:
        return f"<i>{text}</i>"
    quality, sign = float(run.quality[place]), int(run.signs[place])
    strength = 0.15 + 0.65 * min(abs(quality - run.threshold) / 3, 1)
    note = f"Q {quality:.3f}, base loss {run.base_loss[place]:.3f}, {SIDES[sign]}"
    return f'<b class="{"opn"[sign]}{" k" * noisy}" style="--a:{strength:.2f}" title="{note}">{text}</b>'


def row_html(run: Run, example: int, noisy: Array) -> str:
    """A row: source, mean Q, question, coloured response; the script reads data-text, and sorts by the other data."""
    (first, last), begin = run.corpus.offsets[example : example + 2], run.places(example).start
    tokens = "".join(
        token_html(run, place, text, bool(noisy[place])) for place, text in response_texts(run, example)
    )
    source, mean = safe(run.corpus.locations[example]), run.mean_quality[example]
    loss = run.mean_loss[example]
    total = mean * run.corpus.response[first:last].sum()
    return (
        f'<section data-mean="{mean:.6f}" data-sum="{total:.6f}" data-loss="{-loss:.6f}" data-at="{example}" '
        f'data-text="{source} {safe(run.text(first, last))}"><h3>{source} \u00b7 mean Q {mean:.3f} \u00b7 loss {loss:.3f}</h3>'
        f'<p class="dim">{safe(run.text(first, begin), 400)}</p><p class="tokens">{tokens}</p></section>'
    )


def print_rows(run: Run, count: int) -> None:
    """The same rows for a terminal: blue in P, red in N, known noise underlined."""
    noisy = run.corpus.noisy
    for example in rows_to_show(run, count):
        print(
            f"\n\033[1m{visible(run.corpus.locations[example])}\033[0m  mean Q {run.mean_quality[example]:.3f}"
        )
        for place, text in response_texts(run, example):
            code = {1: "\033[44m", -1: "\033[41m", 0: ""}[int(run.signs[place])] + "\033[4m" * bool(
                noisy[place]
            )
            print(f"{code}{text}\033[0m" if code else text, end="")
        print()


# ----------------------------------------------------------------------------------------------- drawings


def curves(log: list[dict]) -> str:
    """All that a training logged, against the step, each with its lowest and highest value; every point is drawn."""
    drawn = []
    for name in dict.fromkeys(name for line in log for name in line if name not in ("step", "tokens/s")):
        points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
        if not points:  # L_N of a method that unlearns nothing
            continue
        first, low, high = points[0][0], min(y for _, y in points), max(y for _, y in points)
        wide, tall = points[-1][0] - first or 1, high - low or 1
        line = " ".join(
            f"{8 + 224 * (x - first) / wide:.1f},{84 - 60 * (y - low) / tall:.1f}" for x, y in points
        )
        drawn.append(
            f'<svg viewBox="0 0 240 100" role="img" aria-label="{safe(name)}"><text x="8" y="14">{safe(name)}</text>'
            f'<polyline points="{line}"/><text x="8" y="97" class="dim">{low:.3g} to {high:.3g}</text></svg>'
        )
    return "".join(drawn)


def histogram(run: Run, bins: int = 60) -> str:
    """How many tokens have which Q, each bar stacked of N, left out and P, with lines at 0 and at the threshold."""
    quality, signs = run.quality[run.corpus.response], run.signs[run.corpus.response]
    low, high = np.quantile(quality, [0.005, 0.995])
    low, high = min(low, 0, run.threshold), max(high, 0, run.threshold) + 1e-6
    inside = np.clip(quality, low, high)
    counts = np.stack(
        [np.histogram(inside[signs == sign], bins, (low, high))[0] for sign in (-1, 0, 1)]
    )  # (3, bins)
    tall = 98 * counts / counts.sum(0).max()
    tops = 125 - tall.cumsum(0)
    parts = [
        f'<rect class="{"nop"[side]}" x="{10 + 8 * i}" y="{tops[side, i]:.2f}" width="7" height="{tall[side, i]:.2f}">'
        f"<title>{counts[side, i]:,} {SIDES[side - 1]}</title></rect>"
        for side, i in np.argwhere(counts)
    ]
    for value, name, y in ((0, "0", 12), (run.threshold, f"threshold {run.threshold:.3f}", 24)):
        x = 10 + 8 * bins * (value - low) / (high - low)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="5" y2="125"/><text x="{x + 3:.1f}" y="{y}">{name}</text>'
        )
    parts.append(
        f'<text x="10" y="140" class="dim">Q from {low:.2f} to {high:.2f}, the outermost 1 % at the ends</text>'
    )
    return f'<svg viewBox="0 0 {20 + 8 * bins} 145" role="img" aria-label="histogram of Q">{"".join(parts)}</svg>'


# --------------------------------------------------------------------------------------------------- page

SHOWN = 1000  # rows on a page
STYLE = """
:root { color-scheme: light dark; --p: 47, 111, 219; --n: 232, 131, 42; --line: 1px solid #8886; }
@media (prefers-color-scheme: dark) { :root { --p: 62, 116, 214; --n: 190, 92, 18; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 1rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h3 { margin: .8rem 0 0; font-size: 13px; } p { margin: .3rem 0; } input, select { font: inherit; max-width: 100%; }
.dim { opacity: .7; font-size: 13px; } .warning { border-left: 4px solid rgb(var(--n)); padding-left: .6rem; }
table { border-collapse: collapse; font-size: 13px; margin: .6rem 0; overflow-wrap: break-word; }
td, th { border-bottom: var(--line); padding: .15rem .5rem; text-align: left; vertical-align: top; }
@media (max-width: 700px) {  /* each line of a table becomes a list of its own: nothing to scroll, nothing cut */
  thead, td:empty { display: none; } table, tbody, tr { display: block; overflow-wrap: anywhere; }
  tr { border-bottom: var(--line); } td { display: flex; border: 0; } td:first-child { font-weight: 600; }
  td::before { content: attr(data-name); flex: 0 0 40%; opacity: .7; font-weight: 400; padding-right: .5rem; }
}
svg { width: 100%; max-width: 31rem; } .curves svg { max-width: 15rem; } svg text { font-size: 10px; fill: currentColor; }
svg line { stroke: currentColor; stroke-dasharray: 3; } svg polyline { fill: none; stroke: rgb(var(--p)); stroke-width: 1.5; }
svg .p { fill: rgb(var(--p)); } svg .n { fill: rgb(var(--n)); } svg .o { fill: #888; }
section { content-visibility: auto; contain-intrinsic-size: auto 5rem; } section p { white-space: pre-wrap; }
@media (min-width: 700px) { section { display: grid; grid-template-columns: 2fr 3fr; column-gap: 1rem; } }
section h3 { grid-column: 1 / 3; } [hidden] { display: none; }
section p, td, i, b { unicode-bidi: isolate; } .tokens { font: 13px/1.6 ui-monospace, monospace; }
i { font-style: normal; opacity: .6; } b { font-weight: 400; border-radius: 3px; } .k { text-decoration: underline 2px; }
.p { background: rgba(var(--p), var(--a, .5)); } .n { background: rgba(var(--n), var(--a, .5)); }
#value { position: sticky; bottom: 0; background: Canvas; padding: .3rem; }
"""
SCRIPT = """
const $ = (id) => document.getElementById(id), list = $("examples"), rows = [...list.children];
const show = () => rows.sort((a, b) => a.dataset[$("sort").value] - b.dataset[$("sort").value]).forEach((row) => {
  row.hidden = !row.dataset.text.toLowerCase().includes($("text").value.toLowerCase()); list.append(row); });
$("text").addEventListener("input", show); $("sort").addEventListener("input", show);
list.addEventListener("click", (event) => { if (event.target.title) $("value").textContent = event.target.title; });
"""


def html_table(header: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML already; one with many columns is turned on its side."""
    if len(header) > max(9, len(rows) + 1):
        header, *rows = (list(cells) for cells in zip(header, *rows))
    head = "".join(f"<th>{name}</th>" for name in header)
    lines = [
        "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in zip(header, row)) for row in rows
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody><tr>{'</tr><tr>'.join(lines)}</tr></tbody></table>"


def markdown_html(text: str) -> str:
    """The tables and lines of a results.md as HTML."""
    parts = []
    for is_table, group in groupby(text.split("\n"), lambda line: line.startswith("|")):
        lines = [safe(line) for line in group if line.strip()]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        parts += (
            [html_table(cells[0], cells[2:])]
            if is_table
            else [f"<p>{line.lstrip('# ')}</p>" for line in lines]
        )
    return "".join(parts)


def results_of(folder: Path) -> str:
    """results.md; of a run that was stopped the table of what is there, with what is left out of it."""
    saved = folder / "results.md"
    if saved.is_file():
        return saved.read_text(encoding="utf-8")
    done, left_out = finished(folder, {})
    return "\n".join([comparison(done), *(f"not in the table: {what}" for what in left_out)])


def write_page(run: Run, count: int, path: Path) -> None:
    """report.html, with nothing in it that comes from elsewhere, and every text of the rows escaped."""
    logs, left_out = read_logs(run.folder, run.config.get("methods", []))
    not_drawn = ""
    if left_out:
        not_drawn = f"<p>not drawn, no training of today's methods: {safe(', '.join(left_out))}</p>"
    notes = [note for name in logs for note in notes_on(name, logs[name])]
    quality, shown, noisy = run.quality[run.corpus.response], rows_to_show(run, count), run.corpus.noisy
    found = [
        [safe(name), f"{x:.3f}"] for name, x in detection(run.quality, run.signs < 0, run.corpus).items()
    ]
    body = f"""<h1>{safe(str(run.folder))}</h1>{markdown_html(results_of(run.folder))}
{"".join(f'<p class="warning">{safe(note)}</p>' for note in notes)}
<h2>Q</h2><p>{len(quality):,} response tokens of {len(run.corpus):,} rows: mean {quality.mean():.4f},
deviation {quality.std():.4f}; threshold {run.threshold:.4f}, {(run.signs > 0).sum():,} in <b class="p">P</b>,
{(run.signs < 0).sum():,} in <b class="n">N</b>.</p>{histogram(run)}
{"<h2>Known noise: does a low Q find it?</h2>" + html_table(["figure", "value"], found) if found else ""}
<h2>Training</h2><details><summary>curves of {len(logs)} trainings</summary>
{"".join(f'<h3>{safe(name)}</h3><div class="curves">{curves(logs[name])}</div>' for name in logs)}{not_drawn}</details>
<h2>Look at these rows first</h2><p>Blue: in P; orange: in N; plain: left out; underlined: known noise. Hover or tap for
values. {len(shown):,} of {len(run.corpus):,} rows: a third of lowest mean Q, where theta' disagrees with the row, a third of
highest loss, which theta itself finds odd, and the rest at random.</p>
<p><label>Search in them: <input id="text"></label> <select id="sort"><option value="mean">lowest mean Q</option>
<option value="sum">lowest sum of Q</option><option value="loss">highest loss under theta</option><option value="at">order of the run</option></select></p>
<div id="examples">{"".join(row_html(run, example, noisy) for example in shown)}</div><p id="value"></p>"""
    head = f"""<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{safe(run.folder.name)}</title><style>{STYLE}</style>"""
    content = f'<html lang="en"><head>{head}</head><body>{body}<script>{SCRIPT}</script></body></html>'
    write_text(f"<!doctype html>\n{content}\n", path)
    print("\n".join([f"{run.folder}: its tokens are in {path}", *(f"warning: {note}" for note in notes)]))


# ------------------------------------------------------------------------------------------- command line


def runs_in(folder: Path) -> list[Path]:
    """The folder itself, or the runs of a demo's folder, which has no scores of its own."""
    found = sorted(path.parent for path in folder.glob("world-*/*/scores.safetensors"))
    return found if found and not (folder / "scores.safetensors").is_file() else [folder]


def main(argv: list[str] | None = None) -> None:
    """The command line: exit code 2, and one line, for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="./run.sh look", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folder of a run, or of a demo; several: one table"
    )
    parser.add_argument(
        "--rows", type=Path, help="write a line of JSON for each row of D_train to this file instead"
    )
    parser.add_argument(
        "--by",
        choices=["q", "loss"],
        default="q",
        help="which first in --rows: lowest Q, or highest loss [q]",
    )
    parser.add_argument("--text", action="store_true", help="print rows in colours instead")
    parser.add_argument("--examples", type=int, default=SHOWN, help=f"how many rows to show [{SHOWN}]")
    parser.add_argument(
        "--out", type=Path, help="file of the page [RUN/report.html], or of the table of several runs"
    )
    arguments = parser.parse_args(argv)
    try:
        folders = [folder for run in arguments.runs for folder in runs_in(run)]
        if len(arguments.runs) > 1 and not (arguments.rows or arguments.text):
            print(text := join_runs([[run] for run in arguments.runs]))
            if arguments.out:
                write_text(text + "\n", arguments.out)
        elif len(folders) > 1 and (arguments.rows or arguments.out):
            raise ValueError(f"{len(folders)} runs do not go into one file: name one, such as {folders[0]}")
        else:
            for run in map(read_run, folders):
                if arguments.text:
                    print_rows(run, arguments.examples)
                elif arguments.rows:
                    lines = rows_in_order(run, arguments.by)
                    write_rows(lines, arguments.rows)
                    order = {"q": "lowest mean Q", "loss": "highest loss under theta"}[arguments.by]
                    print(f"{len(lines):,} rows, {order} first: {arguments.rows}")
                    if lost := sum(line["row"] is None for line in lines):
                        print(f"warning: {lost} have no `row`: their file is gone, or has changed")
                else:
                    write_page(run, arguments.examples, arguments.out or run.folder / "report.html")
        sys.stdout.flush()
    except BrokenPipeError:  # what reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's last flush fails too
    except (ValueError, OSError) as error:
        print(f"look.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
