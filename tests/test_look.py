"""tests/tools/look.py: what the page says is what the run wrote, and no row can do it harm."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from data import Tokenizer, build_corpus, write_rows, write_text
from eval import load_tool
from forgetting import Options

ROOT = Path(__file__).resolve().parent.parent
NASTY = "</script><script>alert(1)</script> \" ' & \u202edlrow \u05e9\u05dc\u05d5\u05dd \x07 <b onclick=x>"
LETTERS = "\u05e9\u05dc\u05d5\u05dd \u4f60\u597d \U0001f642 caf\u00e9"


@pytest.fixture
def run_folder(tmp_path):
    """A run folder as forgetting.py leaves it, of twelve rows with chosen scores."""
    return make_run(tmp_path, "llama3")


def make_run(tmp_path, kind, rows=None, name=None):
    """A run folder of a kind of model, with rows.jsonl, known to the run by `name`, and the model beside it."""
    ends, name = {3: NASTY, 5: LETTERS}, name or str(tmp_path / "rows.jsonl")
    rows = rows or [{"instruction": f"Say {i}", "output": f"the quick fox {i} " + ends.get(i, "jumps")} for i in range(12)]
    tiny.make_checkpoint(tmp_path / "model", kind)
    write_rows(rows, tmp_path / "rows.jsonl")
    rows = [row | {"_source": f"{name}:{i}"} for i, row in enumerate(rows, 1)]
    corpus = build_corpus(rows, Tokenizer(tmp_path / "model"))
    draw = np.random.default_rng(0)
    base = np.where(corpus.response, draw.gamma(2, 1, len(corpus.tokens)), np.nan).astype(np.float32)
    ref = np.where(corpus.response, base - draw.normal(0, 1, len(base)), np.nan).astype(np.float32)
    sources = np.frombuffer("\n".join(corpus.sources).encode(), np.uint8)
    out = tmp_path / "run"
    (out / "full" / "seed-0").mkdir(parents=True)
    arrays = {"tokens": corpus.tokens, "offsets": corpus.offsets, "sources": sources, "base_loss": base, "ref_loss": ref}
    save_file(arrays, out / "scores.safetensors", {"done": "12"})
    config = {"model": str(tmp_path / "model"), "rho": 0.6, "forget_rate": None}
    write_text(json.dumps(config), out / "config.json")
    write_rows([{"step": i, "L_P": 2 - i / 10, "L_N": None, "lambda": i / 8, "grad_norm": 1.0} for i in range(8)],
               out / "full" / "seed-0" / "metrics.jsonl")  # fmt: skip
    write_text("| method | n |\n| full | 1 |", out / "results.md")
    return out


def test_the_numbers_are_those_of_the_scores(run_folder):
    look = load_tool("look")
    look.main([str(run_folder)])
    text = (run_folder / "report.html").read_text()
    scores = load_file(run_folder / "scores.safetensors")
    quality = scores["base_loss"] - scores["ref_loss"]
    judged = np.isfinite(quality)
    threshold = np.quantile(quality[judged], 1 - 0.6, method="higher")
    positive = int((quality[judged] >= threshold).sum())
    assert f"threshold {threshold:.4f}, {positive:,} in" in text and f"{judged.sum() - positive:,} in <b class=\"n\">" in text
    for example, (first, last) in enumerate(zip(scores["offsets"], scores["offsets"][1:])):
        total = float(re.search(rf'data-sum="([-.\d]+)" data-mean="[-.\d]+" data-at="{example}"', text)[1])
        assert total == pytest.approx(np.nansum(quality[first:last]), abs=1e-4)
    assert len(re.findall(r'<b class="[pn]', text)) == judged.sum() + 2  # and two in the legend
    assert "1.3 to 2" in text and "rows.jsonl:12" in text and "| full | 1 |" in text
    sums = [float(x) for x in re.findall(r'data-sum="([-.\d]+)"', text)]
    assert sums[:6] == sorted(sums)[:6]  # the most negative ones first


def test_the_bars_of_the_histogram_add_up_to_each_side(run_folder):
    """The bin that straddles the threshold was wholly orange."""
    look = load_tool("look")
    run = look.Run(run_folder)
    run.signs[np.flatnonzero(run.signs > 0)[:5]] = 0  # as --forget-rate leaves some out
    drawn, judged = look.histogram(run), run.response.sum()
    tall = {side: sum(map(float, re.findall(rf'class="{side}"[^>]* height="([.\d]+)"', drawn))) for side in "opn"}
    for side, name, count in (("n", "in N", (run.signs < 0).sum()), ("o", "left out", 5), ("p", "in P", (run.signs > 0).sum())):
        numbers = re.findall(rf"<title>([\d,]+) {name}</title>", drawn)
        assert sum(int(number.replace(",", "")) for number in numbers) == count
        assert tall[side] / sum(tall.values()) == pytest.approx(count / judged, abs=0.005)


def test_rows_can_do_no_harm(run_folder):
    look = load_tool("look")
    look.main([str(run_folder)])
    text = (run_folder / "report.html").read_text()
    assert text.count("<script>") == 1 and text.count("</script>") == 1 and "<b onclick" not in text and "\x07" not in text
    assert "http" not in text  # nothing comes from elsewhere


def test_known_noise_is_underlined(run_folder):
    rows = [json.loads(line) | {"noise": [[0, 9, "wrong"]]} for line in (run_folder.parent / "rows.jsonl").read_text().splitlines()]
    write_rows(rows, run_folder.parent / "rows.jsonl")
    load_tool("look").main([str(run_folder)])
    text = (run_folder / "report.html").read_text()
    assert len(re.findall(r'<b class="[pno] k"', text)) >= 12 and "precision of N" in text


def test_the_terminal_shows_the_same_rows(run_folder, capsys):
    load_tool("look").main([str(run_folder), "--text", "--examples", "4"])
    shown = capsys.readouterr().out
    assert shown.count("rows.jsonl:") == 4 and "\033[41m" in shown and "\x07" not in shown


@pytest.mark.parametrize("kind", ["llama3", "llama2"])  # bytes as letters, and bytes as <0x..>
def test_a_character_in_several_tokens_is_shown_whole(tmp_path, capsys, kind):
    """Its bytes were shown as letters of their own, and the filter did not find the text."""
    folder, look = make_run(tmp_path, kind), load_tool("look")
    look.main([str(folder)])
    section = next(part for part in (folder / "report.html").read_text().split("<section ") if 'data-at="5"' in part)
    tokens = section.partition('<p class="tokens">')[2].partition("</p>")[0]
    shown = re.sub(r"<[^>]*>", "", tokens)
    assert shown.replace(look.PART, "").startswith("the quick fox 5 " + LETTERS) and look.PART in shown
    text = re.search(r'data-text="([^"]*)"', section)[1]
    assert LETTERS in text and "Say 5" in text
    look.main([str(folder), "--text"])
    printed = re.sub(r"\033\[\d*m", "", capsys.readouterr().out)
    assert LETTERS in printed.replace(look.PART, "")


def test_text_that_is_broken_itself_is_still_shown(run_folder):
    look = load_tool("look")
    run = look.Run(run_folder)
    first = run.tokenizer.encode(["\u4f60"], special=False)[0][0]
    run.corpus.tokens[:4] = [*first[:1] * 3, run.tokenizer.encode(["a"], special=False)[0][0][0]]
    assert run.texts(range(4)) == ["\ufffd"] * 3 + ["a"]


def test_many_examples_are_sampled(run_folder, monkeypatch):
    look = load_tool("look")
    monkeypatch.setattr(look, "LOWEST", 2)
    run = look.Run(run_folder)
    assert len(run.shown(6)) == 6 and len(set(run.shown(6))) == 6 and set(run.shown(12)) == set(range(12))
    assert run.shown(6)[:2] == np.argsort(run.means, kind="stable")[:2].tolist()
    assert set(np.argsort(run.sums, kind="stable")[:3].tolist()) <= set(run.shown(6))
    assert len(run.shown(12, most_tokens=30)) < 12


def test_rows_to_look_at_first_lead_to_their_tokens(run_folder, monkeypatch):
    """They were chosen by mean and the rows shown by sum: most of them were not on the page."""
    look = load_tool("look")
    monkeypatch.setattr(look, "LOWEST", 3)
    look.main([str(run_folder), "--examples", "4"])
    text = (run_folder / "report.html").read_text()
    linked = [int(number) for number in re.findall(r'href="#row-(\d+)"', text)]
    run = look.Run(run_folder)
    assert linked == np.argsort(run.means, kind="stable")[:3].tolist()
    assert set(linked) <= {int(number) for number in re.findall(r'<section id="row-(\d+)"', text)}
    assert "Search the 4 rows shown" in text


def test_known_noise_costs_one_encoding_of_each_row(run_folder, monkeypatch):
    rows = [json.loads(line) | {"noise": []} for line in (run_folder.parent / "rows.jsonl").read_text().splitlines()]
    write_rows(rows, run_folder.parent / "rows.jsonl")
    run, encoded = load_tool("look").Run(run_folder), []
    encode = run.tokenizer.encode
    monkeypatch.setattr(run.tokenizer, "encode", lambda texts: encoded.append(len(texts)) or encode(texts))
    assert run.noise is not None and encoded == [12]


def test_relative_paths_are_found_from_another_directory(tmp_path, monkeypatch):
    """Known noise lost its underline there, without the places that were tried."""
    rows = [{"instruction": "Say", "output": f"the fox {i}", "noise": [[0, 3, "wrong"]]} for i in range(12)]
    folder, look = make_run(tmp_path / "work" / "runs", "llama3", rows, "runs/rows.jsonl"), load_tool("look")
    monkeypatch.chdir(tmp_path)
    assert look.Run(folder).noise.sum() > 0
    (tmp_path / "work/runs/rows.jsonl").unlink()
    noise, reason = look.Run(folder).known_noise
    assert noise is None and "runs/rows.jsonl is not there" in reason and str(tmp_path) in reason and str(folder) in reason


def test_a_field_noise_of_another_meaning_is_one_line(run_folder):
    rows = [json.loads(line) | {"noise": 0.3} for line in (run_folder.parent / "rows.jsonl").read_text().splitlines()]
    write_rows(rows, run_folder.parent / "rows.jsonl")
    load_tool("look").main([str(run_folder)])
    assert "Known noise is not shown: " in (run_folder / "report.html").read_text()


def test_a_demos_folder_gives_all_its_pages(run_folder, tmp_path, capsys):
    look, demo = load_tool("look"), tmp_path / "demo"
    for name in ("world-0/clean", "world-1/clean"):
        shutil.copytree(run_folder, demo / name)
    look.main([str(demo)])
    assert "2 runs in it" in capsys.readouterr().out
    assert (demo / "world-0/clean/report.html").is_file() and (demo / "world-1/clean/report.html").is_file()
    look.main([str(demo), "--text"])
    assert capsys.readouterr().out.count("rows.jsonl:12") == 2
    with pytest.raises(SystemExit) as stop:
        look.main([str(demo), "--out", str(tmp_path / "page.html")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "world-0/clean" in error


def test_a_reader_that_stops_early_is_no_error(run_folder):
    command = f"{sys.executable} {ROOT / 'tests/tools/look.py'} {run_folder} --text | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_token_types_show_their_spaces_and_are_marked_in_their_context(run_folder):
    look = load_tool("look")
    drawn = look.token_types(look.Run(run_folder))
    assert "<td><code>\u2423" in drawn and len(re.findall("<mark>[^<]+</mark>", drawn)) == drawn.count("<tr>") - 1


def test_words_and_numbers_of_tables_are_not_broken():
    """The page's overflow-wrap: anywhere was inherited, and columns shrank to a letter's width."""
    rules = dict(re.findall(r"([^{}]+?) \{ ([^}]*) \}", load_tool("look").STYLE.replace("\n", " ")))
    assert "overflow-wrap: break-word" in rules[" table"] and "nowrap" in rules[" th, td:not(:last-child)"]


def test_the_command_of_a_run_can_be_given_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["forgetting.py", "--data", "my rows.jsonl"])
    load_tool("look").write_report([], {}, Options(out=str(tmp_path)))
    assert "Made by `python forgetting.py --data 'my rows.jsonl'`." in (tmp_path / "results.md").read_text()


def test_a_folder_without_scores_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        load_tool("look").main([str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_spike_in_a_long_log_is_drawn_and_named():
    """Points were thinned before their range was taken: a spike among 1,000 steps was gone."""
    drawn = load_tool("look").curve([(i, 99.0 if i == 501 else 1.0) for i in range(1000)], "x")
    assert "1 to 99" in drawn and len(drawn) < 8000


@pytest.mark.parametrize("change, reason", [
    (lambda rows: rows.pop(), "only 11 of 12 rows carry it"),
    (lambda rows: rows[2].update(output="quite another text"), "the rows have changed since"),
    (lambda rows: rows[1].pop("noise"), "only 11 of 12 rows carry it"),
    (lambda rows: rows.clear(), "was not looked for"),
])  # fmt: skip
def test_noise_of_rows_that_changed_is_not_trusted(run_folder, change, reason):
    rows = [json.loads(line) | {"noise": []} for line in (run_folder.parent / "rows.jsonl").read_text().splitlines()]
    change(rows)
    write_rows(rows, run_folder.parent / "rows.jsonl")
    load_tool("look").main([str(run_folder)])
    assert reason in (run_folder / "report.html").read_text()


def test_no_control_character_and_no_change_of_direction_acts():
    shown = load_tool("look").visible("a\x1b[31m\x9b2J\u202eb\u2066c\nd")
    assert shown == "a\u2039U+001B\u203a[31m\u2039U+009B\u203a2J\u2039U+202E\u203ab\u2039U+2066\u203ac\nd"


def test_a_log_that_was_cut_off_is_named(run_folder, capsys):
    path = run_folder / "full/seed-0/metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(SystemExit):
        load_tool("look").main([str(run_folder)])
    assert "full/seed-0/metrics.jsonl: not a whole log" in capsys.readouterr().err


def test_scores_of_a_stopped_run_are_named(run_folder, capsys):
    from safetensors.numpy import load_file, save_file

    arrays = load_file(run_folder / "scores.safetensors")
    save_file(arrays, run_folder / "scores.safetensors", {"done": "3"})
    with pytest.raises(SystemExit):
        load_tool("look").main([str(run_folder)])
    assert f"covers 3 of {len(arrays['offsets']) - 1} examples: give the run's command again" in capsys.readouterr().err


def test_what_a_table_would_hide_is_noted_under_it():
    """An empty N, an empty P and a training of rate 0 gave a normal table."""
    look = load_tool("look")
    line = {"lr": 1e-3, "L_P": 1.0, "L_N": 2.0}
    assert look.notes_on("forgetting/seed-0", [line]) == [] and look.notes_on("full/seed-0", [line | {"L_N": None}]) == []
    assert "N is empty" in look.notes_on("forgetting:rho=1/seed-0", [line | {"L_N": None}])[0]
    assert "P is empty" in look.notes_on("full/seed-0", [line | {"L_P": None}])[0]
    assert "rate 0" in look.notes_on("reference", [line | {"lr": 0.0}])[0]
    nothing = look.describe_scores(np.array([2.0, 1.0]), np.array([1.0, 1.0]), np.array([1, 1]))
    assert "no token is in N" in nothing


def test_tables_are_at_most_100_columns_wide():
    text = load_tool("look").table(["method", *(f"a column of many words {i}" for i in range(9))], [["forgetting"] + ["1.23 +- 4.5"] * 9])
    assert max(map(len, text.splitlines())) <= 100
