"""tests/tools/look.py: what it shows is what the run wrote, and no row can do it harm."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import look
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from data import Tokenizer, build_corpus, read_rows, write_rows, write_text
from forgetting import detection

ROOT = Path(__file__).resolve().parent.parent
NASTY = "</script><script>alert(1)</script> \" ' & \u202edlrow \u05e9\u05dc\u05d5\u05dd \x07 <b onclick=x>"
LETTERS = "\u05e9\u05dc\u05d5\u05dd \u4f60\u597d \U0001f642 caf\u00e9"


@pytest.fixture
def run_folder(tmp_path):
    """A run folder as forgetting.py leaves it, of twelve rows with chosen scores."""
    return make_run(tmp_path, "llama3")


def make_run(tmp_path, kind, rows=None, name=None):
    """A run folder of a kind of model, with rows.jsonl, known to the run by `name`, and the model beside it."""
    rows, name = rows or some_rows(), name or str(tmp_path / "rows.jsonl")
    tiny.make_checkpoint(tmp_path / "model", kind)
    write_rows(rows, tmp_path / "rows.jsonl")
    rows = [row | {"_source": f"{name}:{i}"} for i, row in enumerate(rows, 1)]
    corpus = build_corpus(rows, Tokenizer(tmp_path / "model"))
    draw = np.random.default_rng(0)
    base = np.where(corpus.response, draw.gamma(2, 1, len(corpus.tokens)), np.nan).astype(np.float32)
    ref = np.where(corpus.response, base - draw.normal(0, 1, len(base)), np.nan).astype(np.float32)
    sources = np.frombuffer("\n".join(corpus.locations).encode(), np.uint8)
    out = tmp_path / "run"
    arrays = {
        "tokens": corpus.tokens,
        "offsets": corpus.offsets,
        "sources": sources,
        "base_loss": base,
        "ref_loss": ref,
    }
    arrays |= {f"noise.{kind}": known for kind, known in corpus.noise.items()}
    write_text(
        json.dumps(
            {
                "model": str(tmp_path / "model"),
                "rho": 0.6,
                "forget_rate": None,
                "inputs": {"training data": corpus.fingerprint()},
            }
        ),
        out / "config.json",
    )
    save_file(arrays, out / "scores.safetensors", {"done": str(len(rows))})
    write_rows([log_line(i, 2 - i / 10, None) for i in range(8)], out / "full" / "seed-0" / "metrics.jsonl")
    add_results(out, "full/seed-0", 1.5, 40)
    return out


def some_rows(noise=lambda i: []):
    """Twelve rows, one of nasty text and one of letters of several bytes, each with its field noise."""
    ends = {3: NASTY, 5: LETTERS}
    return [
        {"instruction": f"Say {i}", "output": f"the quick fox {i} " + ends.get(i, "jumps"), "noise": noise(i)}
        for i in range(12)
    ]


def log_line(step, l_p, l_n):
    return {
        "step": step,
        "L_P": l_p,
        "L_N": l_n,
        "lambda": step / 8,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens/s": 9.0,
    }


def add_results(run, name, held_out, f1, rows="a"):
    identity = {"qa": rows, "held-out": rows}
    tasks = {"qa": {"f1": f1 / 100, "f1_stderr": 0.1, "n": 8}}
    write_text(
        json.dumps({"identity": identity, "held-out": held_out, "tasks": tasks}), run / name / "results.json"
    )


class Page(HTMLParser):
    """A page as a browser takes it apart: elements as [tag, attributes, text], in order of their beginning."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in ("meta", "link", "input"):
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, "each element is closed in its place"

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def find(self, tag, **wanted):
        wanted = {key.strip("_").replace("_", "-"): value for key, value in wanted.items()}.items()
        return [
            (attributes, text)
            for name, attributes, text in self.elements
            if name == tag and wanted <= attributes.items()
        ]


def page_of(run_folder, *arguments):
    look.main([str(run_folder), *arguments])
    return Page((run_folder / "report.html").read_text())


def fails(capsys, *arguments):
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        look.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize("forget_rate", [None, 0.2])
def test_the_numbers_are_those_of_the_scores(run_folder, forget_rate):
    config = json.loads((run_folder / "config.json").read_text())
    write_text(json.dumps(config | {"forget_rate": forget_rate}), run_folder / "config.json")
    page = page_of(run_folder)
    scores = load_file(run_folder / "scores.safetensors")
    quality = scores["base_loss"] - scores["ref_loss"]
    judged = np.isfinite(quality)
    threshold = np.quantile(quality[judged], 1 - 0.6, method="higher")
    positive, highest = (
        int((quality[judged] >= threshold).sum()),
        np.quantile(quality[judged], 0.2, method="higher"),
    )
    negative = int((quality[judged] < (threshold if forget_rate is None else highest)).sum())
    text = page.find("body")[0][1].replace("\n", " ")
    assert f"threshold {threshold:.4f}, {positive} in P, {negative} in N." in text
    sections = {int(section["data-at"]): section for section, _ in page.find("section")}
    for example, (first, last) in enumerate(zip(scores["offsets"], scores["offsets"][1:])):
        assert float(sections[example]["data-sum"]) == pytest.approx(np.nansum(quality[first:last]), abs=1e-4)
        assert float(sections[example]["data-mean"]) == pytest.approx(
            np.nanmean(quality[first:last]), abs=1e-5
        )
    classes = [b.get("class") for b, _ in page.find("b") if "title" in b]
    assert classes.count("p") == positive and classes.count("n") == negative and len(classes) == judged.sum()


def test_rows_of_lowest_q_come_first_with_their_question(run_folder):
    page, order = (
        page_of(run_folder, "--examples", "7"),
        np.argsort(look.read_run(run_folder).mean_quality).tolist(),
    )
    shown = [text.replace(look.PART, "") for _, text in page.find("section")]
    assert len(shown) == 7 and len(set(shown)) == 7
    for example, text in zip(order[:3], shown):
        assert (
            f"rows.jsonl:{example + 1} " in text
            and f"Say {example}\n" in text
            and f"quick fox {example}" in text
        )


def test_rows_can_be_cleaned_by_their_figures(run_folder, tmp_path):
    look.main([str(run_folder), "--rows", str(tmp_path / "by-q.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "by-q.jsonl").read_text().splitlines()]
    run, scores = look.read_run(run_folder), load_file(run_folder / "scores.safetensors")
    assert len(rows) == 12 and [row["mean_Q"] for row in rows] == sorted(row["mean_Q"] for row in rows)
    for row in rows:
        example = run.corpus.locations.index(row["source"])
        places = [
            i for i in range(*scores["offsets"][example : example + 2]) if np.isfinite(scores["base_loss"][i])
        ]
        base, ref = scores["base_loss"][places], scores["ref_loss"][places]
        expected = (base - ref).mean(), base.mean(), ref.mean(), (run.signs[places] < 0).mean()
        found = [row[name] for name in ("mean_Q", "loss_theta", "loss_theta_prime", "share_in_N")]
        assert found == pytest.approx(expected, abs=1e-5) and row["response_tokens"] == len(places)
    given = {row["_source"] for row in read_rows([str(tmp_path / "rows.jsonl")])}
    assert {row["source"] for row in rows} == given, "the names that read_rows gives"
    originals = {row.pop("_source"): row for row in read_rows([str(tmp_path / "rows.jsonl")])}
    assert all(row["row"] == originals[row["source"]] for row in rows), "to be filtered and trained again"
    look.main([str(run_folder), "--rows", str(tmp_path / "by-loss.jsonl"), "--by", "loss"])
    lines = (tmp_path / "by-loss.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss_theta"] for line in lines]
    assert losses == sorted(losses, reverse=True) and len(losses) == 12


def test_rows_whose_file_is_gone_are_said(run_folder, tmp_path, capsys):
    (tmp_path / "rows.jsonl").rename(tmp_path / "elsewhere")
    look.main([str(run_folder), "--rows", str(tmp_path / "by-q.jsonl")])
    assert "warning: 12 have no `row`: their file is gone" in capsys.readouterr().out
    assert json.loads((tmp_path / "by-q.jsonl").read_text().splitlines()[0])["row"] is None


def test_the_bars_of_the_histogram_add_up_to_each_side(run_folder):
    """The bin that straddles the threshold was wholly orange."""
    run = look.read_run(run_folder)
    run.signs[np.flatnonzero(run.signs > 0)[:5]] = 0  # as --forget-rate leaves some out
    drawn, judged = look.histogram(run), run.corpus.response.sum()
    for side, name, count in (
        ("n", "in N", (run.signs < 0).sum()),
        ("o", "left out", 5),
        ("p", "in P", (run.signs > 0).sum()),
    ):
        assert sum(int(number) for number in re.findall(rf"<title>(\d+) {name}</title>", drawn)) == count
    heights = {
        side: sum(map(float, re.findall(rf'class="{side}"[^>]* height="([.\d]+)"', drawn))) for side in "opn"
    }
    assert heights["o"] / sum(heights.values()) == pytest.approx(5 / judged, abs=0.005)
    bars = [
        tuple(map(float, bar))
        for bar in re.findall(r'x="(\d+)" y="([.\d]+)" width="7" height="([.\d]+)"', drawn)
    ]
    for x in {x for x, _, _ in bars}:
        tops, tall = zip(*((y, height) for left, y, height in bars if left == x))
        assert 125 - min(tops) == pytest.approx(sum(tall), abs=0.03), "one on top of the other"


def test_rows_can_do_no_harm(tmp_path):
    """Nasty texts as rows, as tokens, as kinds of noise, as names of methods and of what was logged."""
    run_folder = make_run(tmp_path, "llama3", some_rows(lambda i: [[0, 3, NASTY]] * (i % 2)))
    path = run_folder / "full/seed-0/metrics.jsonl"
    write_rows([json.loads(line) | {NASTY: 1.0} for line in path.read_text().splitlines()], path)
    write_text(
        f"# {NASTY}\n\n| {NASTY} | n |\n| --- | --- |\n| {NASTY} | 1 |\n\n{NASTY}", run_folder / "results.md"
    )
    page = page_of(run_folder)
    assert len(page.find("script")) == 1 and not any("onclick" in a for _, a, _ in page.elements)
    text = (run_folder / "report.html").read_text()
    assert "http" not in text and "\x07" not in text and "\u202e" not in text, (
        "nothing from elsewhere, nothing that acts"
    )
    shown = look.visible(NASTY)
    assert (
        sum(shown in text for _, text in page.find("td")) == 3
        and sum(shown in text for _, text in page.find("text")) == 1
    )
    tokens = "".join(text for _, text in page.find("p", class_="tokens"))
    assert shown in tokens.replace(look.PART, ""), "each of its tokens alone is a text, not a tag"


def test_no_control_character_and_no_change_of_direction_acts():
    shown = look.visible("a\x1b[31m\x9b2J\u202eb\u2066c\nd")
    assert shown == "a\u2039U+001B\u203a[31m\u2039U+009B\u203a2J\u2039U+202E\u203ab\u2039U+2066\u203ac\nd"


def test_the_terminal_shows_the_same_rows(tmp_path, capsys):
    run_folder = make_run(tmp_path, "llama3", some_rows(lambda i: [[4, 9, "wrong"]]))
    look.main([str(run_folder), "--text", "--examples", "4"])
    shown = capsys.readouterr().out
    assert shown.count("rows.jsonl:") == 4 and "\033[41m" in shown and "\x07" not in shown
    assert "".join(re.findall("\033\\[4m([^\033]*)\033", shown)).replace(" ", "") == "quick" * 4


@pytest.mark.parametrize("kind", ["llama3", "llama2"])  # bytes as letters, and bytes as <0x..>
def test_a_character_in_several_tokens_is_shown_whole(tmp_path, capsys, kind):
    """Its bytes were shown as letters of their own, and the filter did not find the text."""
    folder = make_run(tmp_path, kind)
    page = page_of(folder)
    ((section, text),) = page.find("section", data_at="5")
    tokens = text.partition("<|assistant|>")[2].strip()
    assert tokens.replace(look.PART, "").startswith("the quick fox 5 " + LETTERS) and look.PART in tokens
    assert LETTERS in section["data-text"] and "Say 5" in section["data-text"]
    capsys.readouterr()
    look.main([str(folder), "--text"])
    assert LETTERS in re.sub(r"\033\[\d*m", "", capsys.readouterr().out).replace(look.PART, "")


def test_text_that_is_broken_itself_is_still_shown(run_folder):
    run = look.read_run(run_folder)
    begin = run.places(0).start
    part, letter = (run.tokenizer.encode([text], special=False)[0][0][0] for text in ("\u4f60", "a"))
    run.corpus.tokens[begin : begin + 4] = [part, part, part, letter]
    assert [text for _, text in look.response_texts(run, 0)][:4] == ["\ufffd"] * 3 + ["a"]


def test_many_rows_are_sampled(run_folder):
    run = look.read_run(run_folder)
    shown = look.rows_to_show(run, 7).tolist()
    lowest, hardest = np.argsort(run.mean_quality).tolist(), np.argsort(-run.mean_loss).tolist()
    assert shown[:3] == lowest[:3] and set(hardest[:3]) <= set(shown) and len(set(shown)) == 7
    assert set(look.rows_to_show(run, 99).tolist()) == set(range(12))
    assert len(look.rows_to_show(run, 12, most_tokens=30)) < 12


KINDS = [[0, 3, "spam"], [4, 9, "wrong"], [10, 13, "wrong"]]  # "the", "quick", "fox"


@pytest.mark.parametrize("several_turns", [False, True])
def test_known_noise_of_any_kind_is_underlined(tmp_path, several_turns):
    """Its characters are those of the last response."""
    turn = lambda text: [{"role": "user", "content": "Say"}, {"role": "assistant", "content": text}]  # noqa: E731
    before = turn("another answer") * several_turns
    rows = [{"messages": before + turn(f"the quick fox {i}"), "noise": KINDS * (i % 2)} for i in range(12)]
    folder = make_run(tmp_path, "llama3", rows)
    page = page_of(folder)
    marked = "".join(text for b, text in page.find("b") if b.get("class", "").endswith(" k"))
    assert marked.replace(" ", "") == "thequickfox" * 6
    run = look.read_run(folder)
    marked = run.corpus.noise.items()
    words = {
        kind: run.tokenizer.decode(run.corpus.tokens[mask].tolist()).replace(" ", "") for kind, mask in marked
    }
    assert words == {"spam": "the" * 6, "wrong": "quickfox" * 6}
    names = [text for _, text in page.find("td", data_name="figure")]
    assert {"AUC", "AUC spam", "AUC wrong", "row AUC", "precision of N"} < set(names)


def test_how_well_a_low_q_finds_noise_against_all_pairs(run_folder):
    run, draw = look.read_run(run_folder), np.random.default_rng(1)
    corpus, quality = run.corpus, np.round(run.quality)  # ties
    noise = {kind: corpus.response & (draw.random(len(quality)) < 0.05) for kind in ("a", "b")}
    noise["b"][corpus.offsets[6] :] = noise["a"][corpus.offsets[6] :] = False
    rows = [slice(*corpus.offsets[i : i + 2]) for i in range(12)]
    either = noise["a"] | noise["b"]
    means = np.array([np.nanmean(quality[row]) for row in rows])
    noisy_rows = {
        kind: np.array([mask[row].any() for row in rows]) for kind, mask in [*noise.items(), ("", either)]
    }

    def auc(low, high):
        return np.mean([1.0 if a < b else 0.5 if a == b else 0.0 for a in low for b in high])

    corpus.noise = noise
    found = detection(quality, run.signs < 0, corpus)
    clean = quality[corpus.response & ~either]
    for kind, mask in (("", either), (" a", noise["a"]), (" b", noise["b"])):
        assert found[f"AUC{kind}"] == pytest.approx(auc(quality[mask], clean))
        assert found[f"row AUC{kind}"] == pytest.approx(
            auc(means[noisy_rows[kind.strip()]], means[~noisy_rows[""]])
        )
    hits = int((either & (run.signs < 0)).sum())
    assert found["precision of N"] == pytest.approx(hits / (run.signs < 0).sum())
    assert found["recall of N"] == pytest.approx(hits / either.sum())
    corpus.noise = {"a": np.zeros_like(either)}
    assert detection(quality, run.signs < 0, corpus) == {}, "no response token is noise"
    corpus.noise = {"a": corpus.response}
    everywhere = detection(quality, run.signs < 0, corpus)
    assert set(everywhere) == {"noise share", "precision of N", "recall of N"}, "nothing to compare with"


@pytest.mark.parametrize(
    "noise", [0.3, True, "wrong", ["wrong"], [[0, 3]], [[0, 3, 1]], [[0.0, 3.0, "wrong"]]]
)
def test_a_field_noise_of_another_meaning_marks_nothing(tmp_path, noise):
    page = page_of(make_run(tmp_path, "llama3", some_rows(lambda i: noise)))
    assert not page.find("td", data_name="figure")


def test_a_demos_folder_gives_all_its_pages(run_folder, tmp_path, capsys):
    demo = tmp_path / "demo"
    for name in ("world-0/clean", "world-1/clean"):
        shutil.copytree(run_folder, demo / name)
    look.main([str(demo)])
    assert (demo / "world-0/clean/report.html").is_file() and (demo / "world-1/clean/report.html").is_file()
    capsys.readouterr()
    look.main([str(demo), "--text"])
    assert capsys.readouterr().out.count("rows.jsonl:12") == 2
    for flag in ("--out", "--rows"):
        assert "world-0/clean" in fails(capsys, demo, flag, tmp_path / "file")


def test_several_runs_make_one_table(run_folder, tmp_path, capsys):
    """A run counts once, whatever its seeds; what has no partner has no difference."""
    held_out = {
        "one": {"reference": (1.0,), "full": (2.0, 3.0), "forgetting:rho=0.5": (1.0, 1.5)},
        "two": {"reference": (1.2,), "full": (2.0,), "forgetting:rho=0.5": (1.5,)},
        "three": {"reference": (1.4,), "full": (1.8,)},
    }
    for run, methods in held_out.items():
        for method, values in methods.items():
            for seed, value in enumerate(values):
                name = method if method == "reference" else f"{method}/seed-{seed}"
                add_results(tmp_path / run, name, value, 40 + 10 * value)
    add_results(tmp_path / "two", "full/seed-9", 7.0, 0, rows="other tasks")
    add_results(tmp_path / "two", "full/seed-0.bak", 7.0, 0)
    add_results(tmp_path / "two", "full:old/seed-0", 7.0, 0)
    look.main([*(str(tmp_path / run) for run in held_out), "--out", str(tmp_path / "table.md")])
    text = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == text
    lines = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    means, pairs = ({line[0]: dict(zip(rows[0], line)) for line in rows} for rows in (lines[:5], lines[5:]))
    assert list(means)[2:] == ["reference (3)", "full (3)", "forgetting:rho=0.5 (2)"], "as --help has them"
    full, half = [2.5, 2.0, 1.8], [1.25, 1.5]
    assert means["full (3)"]["held-out"] == f"{np.mean(full):.3f} +- {np.std(full, ddof=1):.3f}"
    assert means["full (3)"]["qa f1"] == f"{40 + 10 * np.mean(full):.1f} +- {10 * np.std(full, ddof=1):.1f}"
    assert means["forgetting:rho=0.5 (2)"]["held-out"] == f"{np.mean(half):.3f} +- {np.std(half, ddof=1):.3f}"
    assert pairs["forgetting:rho=0.5 - full"]["held-out"] == "-0.875 (2/2)"  # of two there is no interval
    reach = 4.302653 * np.std([-1.5, -0.8, -0.4], ddof=1) / 3**0.5
    interval = f"[{-0.9 - reach:+.3f}, {-0.9 + reach:+.3f}]"
    assert pairs["reference - full"]["held-out"] == f"-0.900 {interval} (3/3)"
    assert "two/full/seed-9: measured on other tasks" in text and "7.000" not in text and "old" not in text
    assert "no finished method" in fails(capsys, tmp_path / "one", tmp_path / "model")


def test_another_references_methods_are_not_a_panels(tmp_path):
    """Trained with the clean D_ref alone, a method was shown under the noisy one; full and the oracle are its."""
    for place in ("full/seed-0", "oracle/seed-0", "forgetting-wga/seed-0", "reference"):
        add_results(tmp_path / "clean", place, 1.0, 40)
    add_results(tmp_path / "same", "ignoring/seed-0", 2.0, 40)
    means = look.means_of_run([tmp_path / "clean", tmp_path / "same"], [])
    assert sorted(means) == ["full", "ignoring", "oracle"]
    assert "forgetting-wga" in look.means_of_run([tmp_path / "clean"], [])


def test_a_run_that_is_named_twice_counts_once(tmp_path):
    """The table said that it was over 2 runs."""
    add_results(tmp_path / "one", "full/seed-0", 1.0, 40)
    text = look.join_runs([[tmp_path / "one"], [tmp_path / "one" / ".." / "one"]])
    assert "over 1 runs: " in text and "named twice counts once" in text


def test_signs_of_paired_differences_are_counted():
    row = lambda value: {"held-out": value, "L_P": value}  # noqa: E731
    rows = {
        "base": {0: row(9)},
        "full": {0: row(2), 1: row(2), 2: row(2)},
        "ignoring": {2: row(1.5), 0: row(1), 1: row(2.1)},
    }
    line = look.paired_differences(rows).splitlines()[-1]
    reach = 4.302653 * np.std([-1, 0.1, -0.5], ddof=1) / 3**0.5
    interval = f"[{-1.4 / 3 - reach:+.3f}, {-1.4 / 3 + reach:+.3f}]"
    assert f"| ignoring - full | -0.467 {interval} (2/3) |" == line
    assert look.paired_differences({"full": rows["full"], "base": rows["base"]}) == ""


def test_a_reader_that_stops_early_is_no_error(run_folder):
    command = f"{sys.executable} {ROOT / 'tests/tools/look.py'} {run_folder} --text | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_results_are_tables_of_html():
    table = "| method | n |\n| ------ | - |\n| full   | 1 |\n"
    page = Page("<body>" + look.markdown_html(f"Title\n\n{table}\n{table}\nA line.\nAnother") + "</body>")
    assert len(page.find("table")) == 2 and [text for _, text in page.find("p")] == [
        "Title",
        "A line.",
        "Another",
    ]
    assert [text for _, text in page.find("th")] == ["method", "n"] * 2
    assert [(td["data-name"], text) for td, text in page.find("td")] == [("method", "full"), ("n", "1")] * 2
    wide = Page(look.html_table(["method", *map(str, range(20))], [["full", *("abcdefghijklmnopqrst")]]))
    assert [text for _, text in wide.find("th")] == ["method", "full"] and len(wide.find("tr")) == 21, (
        "turned on its side"
    )
    assert wide.find("td", data_name="full")[2][1] == "c"


@pytest.mark.parametrize("odd", [99.0, -99.0, 0.0])
def test_a_spike_and_a_dip_in_a_long_log_are_drawn(odd):
    drawn = look.curves([{"step": i, "L_P": odd if i == 501 else 1.0, "L_N": None} for i in range(1000)])
    heights = [float(point.split(",")[1]) for point in re.search('points="([^"]*)"', drawn)[1].split()]
    assert len(set(heights)) == 2 and heights[501] == (24 if odd > 1 else 84) and drawn.count("<svg") == 1
    assert f"{min(odd, 1):.0f} to {max(odd, 1):.0f}" in drawn


def test_logs_are_read_up_to_a_line_that_was_cut_off_and_foreign_ones_not_at_all(run_folder):
    """A full disk leaves half a line. The page names those that it does not draw, and methods that are gone."""
    path = run_folder / "full/seed-0/metrics.jsonl"
    for foreign in ("full/seed-0.bak", "forgetting:old/seed-0", "reference/checkpoint"):
        write_text(path.read_text(), run_folder / foreign / "metrics.jsonl")
        write_text("{}", run_folder / foreign / "results.json")
    write_text(path.read_text()[:-9], path)
    write_text("", run_folder / "forgetting/seed-0/metrics.jsonl")
    write_text(path.read_text(), run_folder / "forgetting-clipped/seed-0/metrics.jsonl")
    add_results(run_folder, "forgetting-clipped/seed-0", 1.5, 40)
    page, (logs, left_out) = page_of(run_folder), look.read_logs(run_folder)
    assert left_out == [
        "forgetting-clipped/seed-0",
        "forgetting:old/seed-0",
        "full/seed-0.bak",
        "reference/checkpoint",
    ]
    lines = [text for _, text in page.find("p")]
    assert f"not drawn, no training of today's methods: {', '.join(left_out)}" in lines
    assert "not in the table: forgetting-clipped/seed-0: no method of today's" in lines
    assert {name: len(log) for name, log in logs.items()} == {"full/seed-0": 7, "forgetting/seed-0": 0}
    labels = [text for _, text in page.find("text")]
    assert "1.4 to 2" in labels and "L_N" not in labels
    assert [text for _, text in page.find("td", data_name="method")] == ["full"]


def test_what_a_table_would_hide_is_noted(run_folder, capsys):
    """An empty N, an empty P and a training of rate 0 gave a normal table."""
    line = {"lr": 1e-3, "L_P": 1.0, "L_N": 2.0}
    assert (
        look.notes_on("forgetting/seed-0", [line]) == []
        and look.notes_on("full/seed-0", [line | {"L_N": None}]) == []
    )
    assert "N is empty" in look.notes_on("forgetting:rho=1/seed-0", [line | {"L_N": None}])[0]
    assert "P is empty" in look.notes_on("full/seed-0", [line | {"L_P": None}])[0]
    assert (
        "rate 0" in look.notes_on("reference", [line | {"lr": 0.0}])[0]
        and look.notes_on("reference", []) == []
    )


def spoil(name):
    def change(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][1] += 1

    return change


@pytest.mark.parametrize(
    "change, done, reason",
    [
        (lambda arrays: None, "3", "covers 3 of 12 rows: give the run's command again"),
        (spoil("tokens"), "12", "was not made from the rows that config.json beside it names"),
        (spoil("offsets"), "12", "was not made from the rows that config.json beside it names"),
        (lambda arrays: arrays.pop("tokens"), "12", "not a whole file of scores ('tokens')"),
    ],
)
def test_scores_that_are_not_the_runs_are_named(run_folder, capsys, change, done, reason):
    path = run_folder / "scores.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, {"done": done})
    assert reason in fails(capsys, run_folder)
    path.unlink()
    assert "no scores.safetensors in it" in fails(capsys, run_folder)
