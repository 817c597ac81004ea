"""What a run found, to look at: the table of its methods, and every token with its Q, in RUN/report.html.

    python tests/tools/look.py runs/mine                   # writes runs/mine/report.html, one file, opens offline
    python tests/tools/look.py runs/demo                   # a page for every run of the demo
    python tests/tools/look.py runs/mine --text            # the same rows coloured in the terminal

Blue tokens are in P, orange ones in N, stronger the farther Q is from the threshold; known noise is underlined.
Order: known noise, notes, the run, drawings, tokens, page, command line.
"""

import argparse
import dataclasses
import json
import os
import sys
import types
import unicodedata
from collections import Counter
from functools import cached_property
from html import escape
from itertools import product
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from data import Corpus, Tokenizer, covers, read_object, read_rows, render, write_text  # noqa: E402
from eval import table  # noqa: E402
from forgetting import LOSSES, METHODS, UNTRAINED, choose_signs, columns, comparison, finished, quality_scores  # noqa: E402
from forgetting import read_scores, spread  # noqa: E402
from model import checkpoint_folder  # noqa: E402

NOISE_KINDS = ("", "wrong", "boilerplate", "garbled")  # of a row's field noise: [[start, end, kind], ...]

# -------------------------------------------------------------------------------------------- the known noise


def known_noise(corpus: Corpus, tokenizer: Tokenizer, rows: dict[str, dict]) -> np.ndarray:
    """(C,) int8: the kind of each token's noise, as a place in NOISE_KINDS, from the field `noise` of the rows, by source.

    Raises ValueError where the rows do not give the corpus's tokens.
    """
    kinds = np.zeros(len(corpus.tokens), np.int8)
    for begin in range(0, len(corpus), 1000):
        examples = range(begin, min(begin + 1000, len(corpus)))
        rendered = [render(rows[corpus.sources[example]], tokenizer.eos) for example in examples]
        encoded = tokenizer.encode(["".join(text for text, _ in pieces) for pieces in rendered])
        for example, pieces, (ids, spans) in zip(examples, rendered, encoded):
            start, end = corpus.offsets[example : example + 2]
            if ids[: end - start] != corpus.tokens[start:end].tolist():
                raise ValueError("the rows have changed since they were scored")
            covered = np.array(spans[: end - start], np.int64).reshape(-1, 2)  # (length, 2)
            at = sum(len(text) for text, _ in pieces[:-1])  # where the one response of a row of the demo begins
            for first, last, kind in rows[corpus.sources[example]]["noise"]:
                kinds[start:end][covers(covered, at + first, at + last)] = NOISE_KINDS.index(kind)
    return kinds


def roc_auc(low: np.ndarray, high: np.ndarray) -> float:
    """The chance that a value of `low` is below one of `high`, ties counting half: the area under the ROC curve."""
    ordered = np.sort(high)
    above = len(high) - np.searchsorted(ordered, low, side="right")
    ties = np.searchsorted(ordered, low, side="right") - np.searchsorted(ordered, low, side="left")
    return float((above + ties / 2).mean() / len(high))


def detection(quality: np.ndarray, negative: np.ndarray, corpus: Corpus, noise: np.ndarray) -> dict[str, float]:
    """How well a low Q (C,) finds noise that is known: ROC-AUC in all and by kind, precision and recall of N.

    noise (C,) int8 is the place of each token's kind in NOISE_KINDS; negative (C,) bool is N; quality is NaN where nothing is judged. {} if no token is known to be noise.
    """
    clean = quality[corpus.response & (noise == 0)]
    noisy = corpus.response & (noise > 0)
    if not noisy.any():
        return {}
    figures = {"noise share": float(noisy.sum() / corpus.response.sum()), "AUC": roc_auc(quality[noisy], clean)}
    for kind, name in enumerate(NOISE_KINDS):
        if kind and (noise == kind).any():
            figures[f"AUC {name}"] = roc_auc(quality[corpus.response & (noise == kind)], clean)
    figures["precision of N"] = float((noisy & negative).sum() / max(negative.sum(), 1))
    figures["recall of N"] = float((noisy & negative).sum() / noisy.sum())
    return figures


# ------------------------------------------------------------------------------------------- differences

LESS_IS_BETTER = ("held-out", "held-out perplexity", "lambada perplexity", "demo_qa popular")


def paired_differences(results: dict[str, dict[int, dict]]) -> str:
    """A table of each method minus full, and minus ignoring, over the seeds that both have; "" where there is none."""
    rows_by_method = {name: {seed: columns(figures) for seed, figures in seeds.items()} for name, seeds in results.items()}
    names = [name for seeds in rows_by_method.values() for row in seeds.values() for name in row if name not in ("L_P", "L_N")]
    names, lines = list(dict.fromkeys(names)), []
    for baseline, method in product(("full", "ignoring"), rows_by_method):
        ours, theirs = rows_by_method[method], rows_by_method.get(baseline, {})
        shared = [seed for seed in ours if seed in theirs]
        if method in (baseline, "full", *UNTRAINED) or not shared:
            continue
        cells = [f"{method} - {baseline}"]
        for name in names:
            differences = [ours[seed][name] - theirs[seed][name] for seed in shared]
            wins = sum(d < 0 if name in LESS_IS_BETTER else d > 0 for d in differences)
            cells.append(f"{spread(differences, 3 if name in LOSSES else 1, '+')} ({wins}/{len(shared)})")
        lines.append(cells)
    return "Paired differences over seeds (in how many the first is better):\n\n" + table(["pair", *names], lines) if lines else ""


# ---------------------------------------------------------------------------------------------- notes


def forgetting_hurts(log: list[dict], window: int = 10) -> bool:
    """Whether L_P and L_N both rose, as means over the first and the last `window` steps that have both."""
    both = [(line["L_P"], line["L_N"]) for line in log if None not in (line["L_P"], line["L_N"])]
    if len(both) < 2 * window:
        return False
    start, now = np.mean(both[:window], axis=0), np.mean(both[-window:], axis=0)
    return bool((now > start).all())


def notes_on(name: str, log: list[dict]) -> list[str]:
    """What the table must not hide about a training: that it moved nothing, learned nothing or unlearned nothing."""
    method, notes = METHODS.get(name.partition("/")[0].partition(":")[0]), []
    if log and not any(line["lr"] for line in log):
        notes.append("all its steps had rate 0, so it is the base model")
    if method is not None and method.unlearn and all(line["L_N"] is None for line in log):
        notes.append("no token was unlearned: N is empty, or lambda stayed 0")
    if log and all(line["L_P"] is None for line in log):
        notes.append("no token was learned: P is empty")
    return notes


# ---------------------------------------------------------------------------------------------- the run

SHOWN = 1000  # rows of a page, if not too long
LOWEST = 20  # rows to look at first
PART = "\u00b7"  # stands for a token whose character goes on in the next one
MOST_PARTS = 8  # a character has at most four bytes, but a token may end one and begin the next


@dataclasses.dataclass
class Run:
    """A run folder's scores, sides and logs. Raises ValueError where it has no scores, or no tokens in them."""

    folder: Path

    def __post_init__(self) -> None:
        path = self.folder / "scores.safetensors"
        if not path.is_file():
            raise ValueError(f"{self.folder}: no scores.safetensors in it, so it is not the folder of a run that scored")
        done = read_scores(path)[2]  # a file that was cut off is one line
        arrays = load_file(path)
        if not {"tokens", "sources"} <= arrays.keys():
            raise ValueError(f"{path} was made by an earlier version, without tokens: remove it and give the run again")
        if done < len(arrays["offsets"]) - 1:
            raise ValueError(f"{path} covers {done} of {len(arrays['offsets']) - 1} examples: give the run's command again")
        self.config = read_object(self.folder / "config.json")
        self.base_loss = arrays["base_loss"]  # (C,)
        self.quality = quality_scores(arrays["base_loss"], arrays["ref_loss"])  # (C,), NaN where nothing is judged
        self.response = np.isfinite(self.quality)  # (C,)
        sources = arrays["sources"].tobytes().decode().split("\n")
        self.corpus = Corpus(arrays["tokens"], self.response, arrays["offsets"], sources, dropped=0)
        wanted = types.SimpleNamespace(rho=self.config.get("rho"), forget_rate=self.config.get("forget_rate"))
        self.signs = choose_signs(METHODS["forgetting"], self.quality, self.corpus, wanted, seed=0)  # (C,)
        self.threshold = float(self.quality[self.signs > 0].min())
        self.sums = np.add.reduceat(np.where(self.response, self.quality, 0), arrays["offsets"][:-1], dtype=np.float64)
        self.means = self.sums / np.add.reduceat(self.response, arrays["offsets"][:-1], dtype=np.int64)  # (E,)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's, or the copy beside an adapter where the model is gone."""
        copies = sorted(self.folder.glob("*/seed-*/tokenizer.json"))
        try:
            return Tokenizer(checkpoint_folder(str(self.nearby(self.config["model"]) or self.config["model"])))
        except ValueError:
            if not copies:
                raise
            return Tokenizer(copies[0].parent)

    @property
    def noise(self) -> np.ndarray | None:
        """(C,) int8, above 0 where a token is known to be noise; None where the rows do not say."""
        return self.known_noise[0]

    @cached_property
    def known_noise(self) -> tuple[np.ndarray | None, str]:
        """The noise, or None and, where the rows may have had some, why it is not shown."""
        files = sorted({source.rpartition(":")[0] for source in self.corpus.sources})
        rows = {}  # by their source as the run gave it
        for file in files:
            if (path := self.nearby(file)) is None:
                tried = f"as given (from {Path.cwd()}) and in every folder above {self.folder.resolve()}"
                return None, f"Known noise was not looked for: {file} is not there; tried {tried}."
            try:
                rows |= {f"{file}:{row['_source'].rpartition(':')[2]}": row for row in read_rows([str(path)])}
            except ValueError as error:
                return None, f"Known noise was not looked for: {error}."
        marked = sum("noise" in rows.get(source, {}) for source in self.corpus.sources)
        if not marked:
            return None, ""
        if marked < len(self.corpus):
            return None, f"Known noise is not shown: only {marked} of {len(self.corpus)} rows carry it."
        try:
            return known_noise(self.corpus, self.tokenizer, rows), ""
        except (ValueError, TypeError) as error:  # also a field `noise` of another meaning
            return None, f"Known noise is not shown: {error}."

    def nearby(self, name: str) -> Path | None:
        """What the run was given by this name: a relative path may be meant from a folder above the run's."""
        places = [Path(name), *(folder / name for folder in self.folder.resolve().parents)]
        return next((place for place in places if place.exists()), None)

    def text_of(self, *tokens: int) -> str:
        """Tokens as a reader knows them: with the leading space of the first; U+FFFD where a character is not whole."""
        text, piece = self.tokenizer.decode(tokens, skip_special=False), self.tokenizer.raw.id_to_token(tokens[0]) or ""
        return " " + text if piece.startswith("\u2581") and not text.startswith(" ") else text

    def name_of(self, token: int) -> str:
        """A token alone, by its own name where it is a part of a character."""
        text = self.text_of(token)
        return self.tokenizer.raw.id_to_token(token) or text if "\ufffd" in text else text

    def texts(self, places: range) -> list[str]:
        """The text of each token; a character in several tokens stands on the last of them, PART on those before."""
        tokens = self.corpus.tokens[places.start : places.stop].tolist()
        texts: list[str] = []
        while tokens:
            sizes = range(1, min(len(tokens), MOST_PARTS) + 1)  # where no end is found, the text itself is broken
            size = next((n for n in sizes if "\ufffd" not in self.text_of(*tokens[:n])), 1)
            texts += [PART] * (size - 1) + [self.text_of(*tokens[:size])]
            tokens = tokens[size:]
        return texts

    def whole_text(self, example: int) -> str:
        """Prompt and response of an example as the tokenizer gives them back."""
        first, last = self.corpus.offsets[example : example + 2]
        return self.tokenizer.decode(self.corpus.tokens[first:last].tolist(), skip_special=False)

    def places(self, example: int) -> range:
        """Where the response tokens of an example lie, from the first to the last."""
        first, last = self.corpus.offsets[example : example + 2]
        judged = np.flatnonzero(self.response[first:last]) + first
        return range(int(judged[0]), int(judged[-1]) + 1)

    def logs(self) -> dict[str, list[dict]]:
        """metrics.jsonl of every training, by its folder."""
        found = {}
        for path in sorted(self.folder.glob("**/metrics.jsonl")):
            try:
                lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            except ValueError as error:
                raise ValueError(f"{path}: not a whole log ({error})") from None
            found[str(path.parent.relative_to(self.folder))] = lines
        return found

    def shown(self, count: int, most_tokens: int = 150_000) -> list[int]:
        """The examples to show: the lowest means of Q, the most negative sums, then others at random."""
        usual = self.response.sum() / len(self.corpus)
        count = min(count, 1 + int(most_tokens / usual))  # else long rows would leave no room for the others
        lowest, order = self.lowest(), np.argsort(self.sums, kind="stable")
        others = np.random.default_rng(0).permutation(order[count // 2 :])
        chosen, total = [], 0.0
        for example in list(dict.fromkeys([*lowest, *order[: count // 2].tolist(), *others.tolist()]))[:count]:
            length = self.corpus.offsets[example + 1] - self.corpus.offsets[example]
            total += len(self.places(example)) + length / 20  # in bytes a prompt's token is cheap
            if total > most_tokens and chosen:
                break
            chosen.append(example)
        return chosen

    def lowest(self) -> list[int]:
        """The examples with the lowest mean Q, to look at first."""
        return np.argsort(self.means, kind="stable")[:LOWEST].tolist()


# ------------------------------------------------------------------------------------------- drawings

SIDES = {1: "in P", -1: "in N", 0: "left out"}


def curve(points: list[tuple[float, float]], label: str) -> str:
    """A line through (step, value) as SVG, with its least and greatest value."""
    if not points:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    size = len(points) // 150 + 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    ends = [(min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])) for part in parts]  # a spike stays
    points = [point for pair in ends for point in sorted(set(pair))]
    xs, ys = zip(*points)
    wide, tall = max(xs) - min(xs) or 1, high - low or 1
    line = " ".join(f"{8 + 224 * (x - min(xs)) / wide:.1f},{84 - 60 * (y - low) / tall:.1f}" for x, y in points)
    return (f'<svg viewBox="0 0 240 100" role="img" aria-label="{escape(label)}"><text x="8" y="14">{escape(label)}</text>'
            f'<polyline points="{line}"/><text x="8" y="97" class="dim">{low:.3g} to {high:.3g}</text></svg>')


def curves(lines: list[dict]) -> str:
    """L_P, L_N, lambda and the gradient's norm of one training, and what else was watched."""
    names = ("L_P", "L_N", "lambda", "grad_norm", "held-out", "grad_P", "grad_N", "cosine")
    return "".join(curve([(x["step"], x[name]) for x in lines if x.get(name) is not None], name) for name in names)


def histogram(run: Run, bins: int = 60) -> str:
    """How many tokens have which Q, each bar stacked of N, left out and P, and lines at the threshold and at 0."""
    quality = run.quality[run.response]
    low, high = np.quantile(quality, [0.005, 0.995])
    low, high = min(low, 0, run.threshold), max(high, 0, run.threshold) + 1e-6
    quality, signs = np.clip(quality, low, high), run.signs[run.response]
    counts = {sign: np.histogram(quality[signs == sign], bins, (low, high))[0] for sign in (-1, 0, 1)}  # (bins,) each
    highest = sum(counts.values()).max()
    at = lambda x: 10 + 480 * (x - low) / (high - low)  # noqa: E731
    parts = []
    for i in range(bins):
        x, below = 10 + 480 / bins * i, 125.0
        for sign, count in ((sign, counts[sign][i]) for sign in counts if counts[sign][i]):
            tall = 110 * count / highest
            below -= tall
            parts.append(f'<rect class="{"opn"[sign]}" x="{x:.1f}" y="{below:.2f}" width="{480 / bins - 1:.1f}" '
                         f'height="{tall:.2f}"><title>{count:,} {SIDES[sign]}</title></rect>')
    for x, name, y in ((0, "0", 12), (run.threshold, f"threshold {run.threshold:.3f}", 24)):
        parts.append(f'<line x1="{at(x):.1f}" x2="{at(x):.1f}" y1="5" y2="125"/><text x="{at(x) + 3:.1f}" y="{y}">{name}</text>')
    parts.append(f'<text x="10" y="140" class="dim">Q from {low:.2f} to {high:.2f}, what lies outside (1 %) at the ends</text>')
    return f'<svg viewBox="0 0 500 145" role="img" aria-label="histogram of Q">{"".join(parts)}</svg>'


def scatter(run: Run, count: int = 2000) -> str:
    """Q against the loss of the base model, for an even sample of the tokens."""
    places = np.flatnonzero(run.response)
    places = places[np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)]
    x, y = run.base_loss[places], run.quality[places]
    wide, (low, high) = max(float(np.quantile(x, 0.995)), 1e-6), np.quantile(y, [0.005, 0.995])
    tall = high - low or 1
    dots = []
    for loss, q, sign in zip(x, y, run.signs[places]):
        across, down = 10 + 480 * min(loss / wide, 1), 125 - 115 * min(max((q - low) / tall, 0), 1)
        dots.append(f'<circle class="{"opn"[sign]}" cx="{across:.0f}" cy="{down:.0f}" r="1.5"/>')
    note = f"base loss 0 to {wide:.1f} nats to the right, Q {low:.2f} to {high:.2f} upwards; {len(places):,} tokens"
    text = f'<text x="10" y="140" class="dim">{note}</text>'
    return f'<svg viewBox="0 0 500 145" role="img" aria-label="Q against base loss">{"".join(dots)}{text}</svg>'


# --------------------------------------------------------------------------------------------- tokens


DIRECTIONS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def visible(text: str) -> str:
    """Text with control characters and changes of direction shown by name, so that none of them acts."""
    acting = lambda c: unicodedata.category(c) == "Cc" and c not in "\n\t" or c in DIRECTIONS  # noqa: E731
    return "".join(f"\u2039U+{ord(c):04X}\u203a" if acting(c) else c for c in text)


def token_html(run: Run, place: int, text: str) -> str:
    """One token: class p, n or o (left out), its strength, and Q and the base loss for hover and tap."""
    text = escape(visible(text)).replace("\n", "\u23ce\n")
    if not run.response[place]:
        return f"<i>{text}</i>"
    quality, sign = float(run.quality[place]), int(run.signs[place])
    strength = 0.15 + 0.65 * min(abs(quality - run.threshold) / 3, 1)
    known = " k" if run.noise is not None and run.noise[place] > 0 else ""
    note = f"Q {quality:.3f}, base loss {run.base_loss[place]:.3f}, {SIDES[sign]}"
    return f'<b class="{"opn"[sign]}{known}" style="--a:{strength:.2f}" title="{note}">{text}</b>'


def example_html(run: Run, example: int) -> str:
    """An example's response with its source, sum and mean of Q; the filter reads data-text, whatever the tokens cut."""
    source, places = visible(run.corpus.sources[example]), run.places(example)
    tokens = "".join(token_html(run, place, text) for place, text in zip(places, run.texts(places)))
    begin = max(int(run.corpus.offsets[example]), places[0] - 60)
    asked = run.tokenizer.decode(run.corpus.tokens[begin : places[0]].tolist(), skip_special=False).lstrip("\ufffd")
    whole, file = escape(visible(run.whole_text(example))), escape(source.rpartition(":")[0])
    return (f'<section id="row-{example}" data-sum="{run.sums[example]:.6f}" data-mean="{run.means[example]:.6f}" '
            f'data-at="{example}" data-file="{file}" data-text="{whole}"><h4>{escape(source)} \u00b7 sum {run.sums[example]:.2f} \u00b7 mean '
            f'{run.means[example]:.3f}</h4><p class="asked">{escape(visible(asked))}</p><p class="tokens">{tokens}</p></section>')


def token_types(run: Run, count: int = 40) -> str:
    """The types of token with the lowest and the highest mean Q, with a place where each occurs."""
    places = np.flatnonzero(run.response)
    ids = run.corpus.tokens[places]
    seen = np.bincount(ids)
    sums = np.bincount(ids, run.quality[places])
    enough = np.flatnonzero(seen >= min(5, seen.max()))
    order = enough[np.argsort(sums[enough] / seen[enough], kind="stable")]
    first_place = dict(zip(ids[::-1].tolist(), places[::-1].tolist()))
    lines = []
    for token in dict.fromkeys([*order[:count].tolist(), *order[-count:].tolist()]):
        place = first_place[token]
        first, last = max(place - 8, 0), min(place + 5, len(run.corpus.tokens))
        around = [escape(visible(text)) for text in run.texts(range(first, last))]
        around[place - first] = f"<mark>{around[place - first]}</mark>"
        name = escape(visible(run.name_of(token))).replace(" ", "\u2423").replace("\n", "\u23ce")
        cells = (f"<code>{name}</code>", f"{sums[token] / seen[token]:.3f}", f"{seen[token]:,}", "".join(around))
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>token</th><th>mean Q</th><th>count</th><th>where</th></tr>"
    return f"<p>Of those seen at least {min(5, seen.max())} times; \u2423 is a space.</p><table>{head}{''.join(lines)}</table>"


def lowest_rows(run: Run, examples: list[int]) -> str:
    """The rows with the lowest mean Q, each with a link to its tokens below."""
    lines = []
    for example in (example for example in run.lowest() if example in examples):
        text = run.tokenizer.decode(run.corpus.tokens[list(run.places(example))].tolist())
        source = escape(visible(run.corpus.sources[example]))
        name = source.rpartition("/")[2]  # the whole path would fill a narrow screen
        link = f'<a href="#row-{example}" title="{source}">{name}</a>'
        lines.append(f"<tr><td>{link}</td><td>{run.means[example]:.3f}</td>"
                     f"<td>{escape(visible(text[:160]))}</td></tr>")  # fmt: skip
    return f"<table><tr><th>row</th><th>mean Q</th><th>response</th></tr>{''.join(lines)}</table>"


def print_tokens(run: Run, count: int) -> None:
    """The same rows for a terminal, in colours."""
    for example in run.shown(count):
        print(f"\n\033[1m{visible(run.corpus.sources[example])}\033[0m  sum {run.sums[example]:.2f}  mean {run.means[example]:.3f}")
        places = run.places(example)
        for place, text in zip(places, map(visible, run.texts(places))):
            colour = {1: "\033[44m", -1: "\033[41m", 0: ""}[int(run.signs[place])]
            known = "\033[4m" if run.noise is not None and run.noise[place] > 0 else ""
            print(f"{colour}{known}{text}\033[0m" if colour or known else text, end="")
        print()


# ----------------------------------------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; --p: 47,111,219; --n: 232,131,42; --line: #8885; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 62rem; padding: 0 1rem; overflow-wrap: anywhere; }
pre, .wide { overflow-x: auto; } pre { font-size: 12px; overflow-wrap: normal; } h4 { margin: .8rem 0 0; font-size: 12px; }
svg { width: 100%; max-width: 31rem; } .curves svg { max-width: 15rem; } svg text { font-size: 10px; fill: currentColor; }
svg polyline { fill: none; stroke: rgb(var(--p)); stroke-width: 1.5; } svg line { stroke: currentColor; stroke-dasharray: 3; }
svg .p { fill: rgb(var(--p)); } svg .n { fill: rgb(var(--n)); } svg .o { fill: #888; } .dim, .asked { opacity: .65; font-size: 12px; }
section { content-visibility: auto; contain-intrinsic-size: auto 6rem; }
.tokens { margin: .2rem 0; white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: 13px; }
.tokens b { font-weight: 400; unicode-bidi: isolate; border-radius: 3px; } .tokens i { opacity: .6; font-style: normal; unicode-bidi: isolate; }
.tokens b.p { background: rgba(var(--p), var(--a)); } .tokens b.n { background: rgba(var(--n), var(--a)); }
.tokens b.k { text-decoration: underline 2px; } .asked { margin: 0; white-space: pre-wrap; unicode-bidi: isolate; }
table { border-collapse: collapse; font-size: 13px; overflow-wrap: break-word; } mark { border-radius: 3px; }
td, th { border-bottom: 1px solid var(--line); padding: .1rem .5rem; text-align: left; vertical-align: top;
unicode-bidi: isolate; }
th, td:not(:last-child) { white-space: nowrap; } td:last-child { min-width: 14rem; } td code { font-size: 12px; }
input, select { font: inherit; max-width: 100%; } #value { position: sticky; bottom: 0; background: Canvas; padding: .3rem; }
"""
SCRIPT = """
const list = document.getElementById("examples"), all = [...list.children], $ = (id) => document.getElementById(id);
function show() {
  const text = $("text").value.toLowerCase(), file = $("file").value, by = $("sort").value;
  all.sort((a, b) => a.dataset[by] - b.dataset[by]).forEach((e) => {
    e.hidden = (file && e.dataset.file !== file) || (text && !e.dataset.text.toLowerCase().includes(text)); list.append(e); });
}
["text", "file", "sort"].forEach((id) => $(id).addEventListener("input", show));
document.addEventListener("click", (event) => {  // a row that the filter hides is shown when a link leads to it
  const link = event.target.closest('a[href^="#row-"]'); if (link) $(link.hash.slice(1)).hidden = false; });
list.addEventListener("click", (event) => { if (event.target.title) $("value").textContent = event.target.title; });
"""


def page(run: Run, count: int) -> str:
    """report.html: nothing in it comes from elsewhere, and every text of the rows is escaped."""
    path = run.folder / "results.md"
    examples = sorted(run.shown(count), key=lambda example: run.sums[example])
    done, _ = finished(run.folder, {})
    results = comparison(done) if done else "No method of this run is finished yet."
    if path.is_file():
        results = path.read_text(encoding="utf-8")
    found = ""
    if run.noise is not None:
        figures = detection(run.quality, run.signs < 0, run.corpus, run.noise)
        found = "<p>Known noise: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()) + ".</p>"
    else:
        found = f"<p>{escape(run.known_noise[1])}</p>"
    files = Counter(visible(source).rpartition(":")[0] for source in run.corpus.sources)
    choices = "".join(f'<option value="{escape(name)}">{escape(name)} ({n:,})</option>' for name, n in files.items())
    quality, (n_p, n_n) = run.quality[run.response], ((run.signs > 0).sum(), (run.signs < 0).sum())
    trained = "".join(f'<h4>{escape(name)}</h4><div class="curves">{curves(lines)}</div>' for name, lines in run.logs().items())
    body = f"""<h1>{escape(str(run.folder))}</h1><pre>{escape(visible(results))}</pre>
<h2>Q</h2><p>{len(quality):,} response tokens of {len(run.corpus):,} examples: mean {quality.mean():.4f}, deviation {quality.std():.4f};
threshold {run.threshold:.4f}, {n_p:,} in <b class="p">P</b>, {n_n:,} in <b class="n">N</b>.</p>{found}{histogram(run)}{scatter(run)}
<h2>Training</h2>{trained}
<h2>Look at these rows first</h2><div class="wide">{lowest_rows(run, examples)}</div>
<h2>Tokens</h2><p>Blue: kept in P; orange: in N; plain: left out. {len(examples):,} of {len(run.corpus):,} examples:
the lowest means and the most negative sums of Q, and others at random. Hover or tap for values.</p>
<p><label>Search the {len(examples):,} rows shown: <input id="text"></label>
<select id="file"><option value="">all files</option>{choices}</select>
<select id="sort"><option value="sum">most negative sum</option><option value="mean">lowest mean</option><option value="at">order</option></select></p>
<div id="examples">{"".join(example_html(run, example) for example in examples)}</div><p id="value" aria-live="polite"></p>
<h2>Types of tokens</h2><div class="wide">{token_types(run)}</div>"""
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{escape(run.folder.name)}</title><style>{STYLE}</style></head>'
            f"<body>{body}<script>{SCRIPT}</script></body></html>\n")


def runs_in(folder: Path) -> list[Path]:
    """The folder itself, or the runs of a demo's folder, which has no scores of its own."""
    found = sorted(path.parent for path in folder.glob("world-*/*/scores.safetensors"))
    return found if found and not (folder / "scores.safetensors").is_file() else [folder]


def write_page(run: Run, count: int = SHOWN, path: Path | None = None) -> None:
    """RUN/report.html, or another path."""
    path = path or run.folder / "report.html"
    write_text(page(run, count), path)
    print(f"its tokens: {path}")


# -------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    """The command line: exit code 2, and one line, for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, or of a demo")
    parser.add_argument("--text", action="store_true", help="print the rows in colours instead")
    parser.add_argument("--examples", type=int, default=SHOWN, help=f"how many rows to show [{SHOWN}]")
    parser.add_argument("--out", type=Path, help="the page's path [RUN/report.html]")
    arguments = parser.parse_args(argv)
    try:
        folders = runs_in(arguments.run)
        if len(folders) > 1 and arguments.out:
            raise ValueError(f"{arguments.run} holds {len(folders)} runs and --out is one page: name one, such as {folders[0]}")
        if folders != [arguments.run]:
            print(f"{arguments.run} is a demo's: {len(folders)} run{'s' * (len(folders) > 1)} in it")
        for run in map(Run, folders):
            if arguments.text:
                print_tokens(run, arguments.examples)
            else:
                write_page(run, arguments.examples, arguments.out)
        sys.stdout.flush()
    except BrokenPipeError:  # what reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's last flush fails too
    except (ValueError, OSError) as error:
        print(f"look.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
