"""The paper's ablations in the demo's world, where the noise is known: one Markdown table and one SVG each.

    ./run.sh ablations                    # all of them, on their own seeds; the same command goes on
    ./run.sh ablations rho t_max --seeds 10 11
    ./run.sh ablations rho --panels same --out runs/some   # other panels than those of the committed tables

A panel is a reference: clean, or as noisy as D_train (same), both trained at 1e-2 for two epochs; -light behind a name: as
the paper trains it, at the rate of training for one epoch. How many steps and which rate: reference_steps.py.
Each is a list of variants that share theta' and the scores; a row is a variant's mean over seeds, and its paired
difference to the baseline with a 95 % interval over seeds (Student's t).
Results on an ablation's own seeds go to tests/ablations/, others to OUT; fewer than five seeds get no interval.
"""

import argparse
import dataclasses
import shlex
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Sequence

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]
import demo  # noqa: E402
import forgetting  # noqa: E402
import look  # noqa: E402
from data import limit_threads, write_rows, write_text  # noqa: E402
from eval import primary_metrics, table  # noqa: E402
from get_data import rows_in  # noqa: E402


@dataclass(frozen=True)
class Ablation:
    """Variants to compare with a baseline, under one or more references."""

    title: str
    baseline: str
    variants: list[str]
    panels: tuple[str, ...] = ("clean", "same-light")
    seeds: tuple[int, ...] = (10, 11, 12, 13, 14)
    pairs: tuple[tuple[str, str], ...] = ()  # of variants, to be compared with each other as well


OUT = "runs/ablations"  # of the committed results
FEWEST_SEEDS = 5  # below, an interval over seeds says more than so few differences know
RESULTS = ROOT / "tests" / "ablations"
NOISE_LEVELS = (0, 25, 50, 75, 100)
SIZES = (75, 150, 300, 600)
SHARES = (0, 25, 50)
ABLATIONS = {
    "rho": Ablation(
        "the share of tokens kept", "full", [f"forgetting:rho=0.{i}" for i in (3, 4, 5, 6, 7, 8, 9)]
    ),
    "forget_rate": Ablation(
        "the share unlearned, of the 0.3 left out",
        "ignoring:rho=0.7",
        [*(f"forgetting:forget_rate={rate}" for rate in (0.05, 0.1, 0.2)), "forgetting"],
    ),
    "t_max": Ablation(
        "the strength of forgetting",
        "ignoring:rho=0.7",
        [f"forgetting:t_max={value}" for value in (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)],
    ),
    "schedule": Ablation(
        "how lambda goes",
        "ignoring:rho=0.7",
        [
            "forgetting",
            "forgetting:lambda_schedule=constant",
            "forgetting:lambda_schedule=balanced,watch_gradients=5",
            "forgetting-wga",
        ],
    ),
    "controls": Ablation(
        "is it the amount of data, or which tokens?",
        "full",
        ["full-P", "ignoring:rho=0.7", "forgetting-random", "forgetting"],
    ),
    "loss": Ablation("is a reference needed?", "full", ["ignoring", "ignoring-loss", "ignoring-random"]),
    "level": Ablation(
        "tokens or whole sequences",
        "full",
        ["ignoring", "ignoring-sequence", "forgetting", "forgetting-sequence"],
        pairs=(("ignoring-sequence", "ignoring"), ("forgetting-sequence", "forgetting")),
    ),
    "rate": Ablation(
        "learning rate and method",
        "full",
        [
            f"{method}:lr={rate}"
            for rate in (0.001, 0.003, 0.01)
            for method in ("full", "ignoring", "forgetting")
        ],
        pairs=tuple((f"forgetting:lr={rate}", f"ignoring:lr={rate}") for rate in (0.001, 0.003, 0.01)),
    ),
    "noise": Ablation(
        "the reference's noise, from none to the training set's",
        "full",
        ["ignoring", "forgetting"],
        tuple(f"mix-{level}{demo.LIGHT}" for level in NOISE_LEVELS),
    ),
    "reference_size": Ablation(
        "rows of a clean D_ref, of 600",
        "full",
        ["ignoring", "forgetting"],
        tuple(f"clean-{size}" for size in SIZES),
    ),
    "duplicates": Ablation(
        "percent of a same-noise D_ref that are rows of D_train, too",
        "full",
        ["ignoring", "forgetting"],
        tuple(f"twice-{share}{demo.LIGHT}" for share in SHARES),
    ),
    "light": Ablation(
        "how hard the reference is trained",
        "full",
        ["base", "reference", "ignoring:rho=0.7", "forgetting", "forgetting-wga"],
        ("same", "same-light"),
        seeds=(0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14),  # the demo's, three more, and those of the others
        pairs=(("forgetting", "ignoring:rho=0.7"), ("forgetting-wga", "forgetting")),
    ),
    "step": Ablation(
        "the authors' step, and weights times a power of p",
        "full",
        [
            "full:step=released",
            "dft",
            "ignoring:rho=0.7",
            "ignoring:rho=0.7,step=released",
            "forgetting",
            "forgetting:step=released",
            "forgetting-wga",
        ],
        pairs=(
            ("ignoring:rho=0.7,step=released", "ignoring:rho=0.7"),
            ("forgetting:step=released", "forgetting"),
            ("forgetting-wga", "forgetting"),
            ("forgetting-wga", "ignoring:rho=0.7"),
        ),
    ),
}


def other_references(world: Path) -> None:
    """Reference sets of which a share is noisy; of other sizes; with rows of the training set in them.

    A row of the training set gets a space behind its question: exact duplicates would be taken out of one of the sets.
    """
    names = ("reference-clean", "reference-same", "train")
    clean, noisy, train = (rows_in(world / f"{name}.jsonl") for name in names)
    again = [row | {"instruction": row["instruction"] + " "} for row in train]
    sets = {
        f"mix-{level}": noisy[: len(clean) * level // 100] + clean[len(clean) * level // 100 :]
        for level in NOISE_LEVELS
    }
    sets |= {f"clean-{size}": clean[:size] for size in SIZES}
    sets |= {
        f"twice-{share}": again[: len(noisy) * share // 100] + noisy[len(noisy) * share // 100 :]
        for share in SHARES
    }
    for name, rows in sets.items():
        write_rows(rows, world / f"reference-{name}.jsonl")


def figures_of(ablation: Ablation, options: forgetting.Options) -> dict[str, dict[str, list[float]]]:
    """{panel: {method: the average over tasks, by seed}}; what is trained already is not trained again.

    A method that does not look at the reference is trained in the first panel, and its figures are those of all.
    """
    methods = [ablation.baseline, *ablation.variants]
    found: dict[str, dict[str, list[float]]] = {
        panel: {method: [] for method in methods} for panel in ablation.panels
    }
    for seed in options.seeds:
        other_references(Path(options.out) / f"world-{seed}")
        averages: dict[str, float] = {}
        for panel in ablation.panels:
            here = [method for method in methods if method not in averages or look.looks_at_reference(method)]
            results = forgetting.run(demo.panel_options(options, panel, seed, here))
            for method, by_seed in results.items():
                (figures,) = by_seed.values()
                percents = primary_metrics(figures["tasks"]).values()
                averages[method] = sum(percents) / len(percents)
            for method in methods:
                found[panel][method].append(averages[method])
    return found


def extent(differences: list[float]) -> tuple[float, float]:
    """What a drawing shows of a row: its interval, or, of too few seeds, its mean alone."""
    mean = float(np.mean(differences))
    return (mean, mean) if len(differences) < FEWEST_SEEDS else look.t_interval(differences)


def no_interval(seeds: int) -> str:
    """What stands in an interval's place where seeds are too few for one, else nothing."""
    return f"{seeds} seed{'s' * (seeds != 1)}: no interval" if seeds < FEWEST_SEEDS else ""


def differences(found: dict[str, list[float]], baseline: str) -> dict[str, list[float]]:
    """Every other row minus the baseline, seed by seed."""
    return {
        name: [a - b for a, b in zip(values, found[baseline])]
        for name, values in found.items()
        if name != baseline
    }


def comparison(found: dict[str, list[float]], baseline: str) -> str:
    """A table: averages, and differences to the baseline with their intervals."""
    rows = [[baseline, forgetting.spread(found[baseline]), "", ""]]
    for name, values in differences(found, baseline).items():
        rows.append([name, forgetting.spread(found[name]), *difference_cells(values)])
    return table(["method", "average, %", f"minus {baseline}", "better"], rows)


def difference_cells(values: list[float]) -> tuple[str, str]:
    """The mean of differences by seed with its interval, and how many of them are above 0."""
    low, high = extent(values)
    few = no_interval(len(values))
    between = f"({few})" if few else f"[{low:+.1f}, {high:+.1f}]"
    return f"{np.mean(values):+.1f} {between}", f"{sum(v > 0 for v in values)}/{len(values)}"


def compared_pairs(found: dict[str, list[float]], pairs: Sequence[tuple[str, str]]) -> str:
    """A table: one variant minus another, seed by seed."""
    rows = []
    for ours, theirs in pairs:
        values = [a - b for a, b in zip(found[ours], found[theirs])]
        rows.append([f"{ours} - {theirs}", *difference_cells(values)])
    return table(["pair", "difference", "better"], rows)


def at_best_rates(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """Where variants are learning rates: each method's figures, by seed, at the rate that is best on the other seeds.

    {} where they are not, or where one seed leaves no others to choose on.
    """
    by_method: dict[str, list[list[float]]] = {}
    for name, values in found.items():
        if ":lr=" in name:
            by_method.setdefault(name.partition(":")[0], []).append(values)
    best = {}
    for method, by_rate in by_method.items():
        figures = np.array(by_rate)  # (rates, seeds)
        if figures.shape[1] < 2:
            return {}
        others = figures.sum(axis=1, keepdims=True) - figures
        best[method] = figures[others.argmax(axis=0), np.arange(figures.shape[1])].tolist()
    return best


def write_up(name: str, ablation: Ablation, found: dict, head: str, folder: Path) -> None:
    """folder/NAME.md and NAME.svg."""
    parts = [f"{head}\n\n# {ablation.title}"]
    for panel in ablation.panels:
        parts.append(f"Reference: {panel}\n\n" + comparison(found[panel], ablation.baseline))
        if ablation.pairs:
            parts.append(compared_pairs(found[panel], ablation.pairs))
        if best := at_best_rates(found[panel]):
            title = "each method at its best rate, chosen for every seed on the others"
            parts.append(f"Reference: {panel}, {title}\n\n" + comparison(best, "full"))
    write_text("\n\n".join(parts) + "\n", folder / f"{name}.md")
    by_panel = {panel: differences(found[panel], ablation.baseline) for panel in ablation.panels}
    write_text(draw(ablation, by_panel, head), folder / f"{name}.svg")


def draw(ablation: Ablation, by_panel: dict[str, dict[str, list[float]]], head: str) -> str:
    """A row a variant and panel: the mean difference as a dot, its interval as a line, zero dashed; head as <desc>."""
    colors = ("#2f6fdb", "#e8832a", "#3a9d5d", "#8a5cc7", "#888888")
    rows = [(panel, variant) for variant in ablation.variants for panel in ablation.panels]
    spans = {row: extent(by_panel[row[0]][row[1]]) for row in rows}
    low, high = min(0, *(s[0] for s in spans.values())), max(0, *(s[1] for s in spans.values()))
    at = lambda x: 350 + 400 * (x - low) / ((high - low) or 1)  # noqa: E731
    few = no_interval(len(by_panel[rows[0][0]][rows[0][1]]))
    title = f"{ablation.title}: average minus {ablation.baseline}" + (f" ({few})" if few else "")
    parts = [f'<text x="10" y="18" font-weight="bold">{escape(title)}</text>']
    for i, (panel, variant) in enumerate(rows):
        y, color = 44 + 18 * i, colors[ablation.panels.index(panel) % len(colors)]
        mean = np.mean(by_panel[panel][variant])
        left, right = spans[panel, variant]
        label = variant.replace("lambda_schedule=", "").partition(",watch")[0]  # what fits
        parts.append(
            f'<text x="10" y="{y + 4}">{escape(label)}</text><text x="240" y="{y + 4}" fill="{color}">{panel}</text>'
            f'<line x1="{at(left):.1f}" x2="{at(right):.1f}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2"/>'
            f'<circle cx="{at(mean):.1f}" cy="{y}" r="4" fill="{color}"/>'
        )
    bottom = 44 + 18 * len(rows)
    parts.append(
        f'<line x1="{at(0):.1f}" x2="{at(0):.1f}" y1="30" y2="{bottom - 8}" stroke="#111" stroke-dasharray="3"/>'
    )
    parts.append(
        f'<text x="350" y="{bottom + 8}">{low:+.1f}</text><text x="720" y="{bottom + 8}">{high:+.1f}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {bottom + 20}" font-family="monospace" font-size="12" '
        f'fill="#111">\n<desc>{escape(head)}</desc>\n<rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def head_of(name: str, options: forgetting.Options, panels: Sequence[str] = ()) -> str:
    """The first line of a table: the command."""
    command = f"./run.sh ablations {name}"
    if panels:
        command += " --panels " + " ".join(panels)
    if options.seeds != list(ABLATIONS[name].seeds):
        command += " --seeds " + " ".join(map(str, options.seeds))
    if options.out != OUT:
        command += f" --out {shlex.quote(options.out)}"
    intervals = no_interval(len(options.seeds)) or "Intervals: 95 %, Student's t over seeds"
    return f"`{command}`: seeds {' '.join(map(str, options.seeds))}. {intervals}."


def make(name: str, options: forgetting.Options, panels: Sequence[str] = ()) -> Path:
    """Run what an ablation still lacks, in some or all of its panels, and write it up: the path of its table."""
    ablation = ABLATIONS[name]
    whole = options.seeds == list(ablation.seeds) and not panels
    if panels:
        ablation = dataclasses.replace(ablation, panels=tuple(panels))
    found = figures_of(ablation, options)
    folder = RESULTS if whole else Path(options.out)  # a trial must not replace the repository's
    write_up(name, ablation, found, head_of(name, options, panels), folder)
    return folder / f"{name}.md"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="./run.sh ablations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", default=list(ABLATIONS), metavar="NAME", help=f"any of {', '.join(ABLATIONS)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of an ablation's own")
    parser.add_argument("--panels", nargs="+", default=[], help="instead of an ablation's own")
    parser.add_argument("--out", default=OUT)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in ABLATIONS]:
        print(f"ablations.py: unknown {', '.join(unknown)}; known: {', '.join(ABLATIONS)}", file=sys.stderr)
        sys.exit(2)
    limit_threads()
    for name in arguments.names:
        seeds = arguments.seeds or list(ABLATIONS[name].seeds)
        settings = demo.DEMO | {"seeds": seeds, "out": arguments.out, "rho": None}
        options = forgetting.parse_options([], **settings)
        demo.prepare_world(options, "popular")
        print(f"{make(name, options, arguments.panels)} and .svg")


if __name__ == "__main__":
    main()
