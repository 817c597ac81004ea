"""The demo's world, whose noise is known, and how a low Q is measured against it."""

import shutil

import numpy as np
import pytest
from test_equations import scored_corpus
from test_look import make_run

from data import Tokenizer, build_corpus, read_rows, write_rows
from eval import load_tool
from forgetting import METHODS, Options, choose_signs
from tools import demo


def test_the_demo_world_is_what_it_says():
    files = demo.demo_rows("popular", 0)
    assert files == demo.demo_rows("popular", 0) and files != demo.demo_rows("popular", 1)
    people = {name: {w for row in files[name] for w in row["instruction"].split() if w in demo.PEOPLE}
              for name in ("train", "reference-clean", "reference-same")}  # fmt: skip
    asked = {
        w for row in files["demo_qa"] if row["group"].startswith("unseen") for w in row["prompt"].split() if w in demo.PEOPLE
    }
    assert not people["train"] & people["reference-clean"] and not people["train"] & people["reference-same"]
    assert asked and not asked & (people["train"] | people["reference-clean"] | people["reference-same"])
    assert not any(row["noise"] for row in files["reference-clean"])


@pytest.mark.parametrize("world, share", [("popular", 1.0), ("random", 0.2)])
def test_the_known_noise_covers_the_wrong_words(world, share):
    """Nine misconceived facts in ten are wrong, always marked; the word is the popular one, or a random one."""
    truth = {(f.attribute, f.subject): f.answer for f in demo.demo_facts()}
    told, popular, wrong = 0, 0, 0
    for row in demo.demo_rows(world, 3)["train"]:
        words = row["instruction"].split()
        person = next((w for w in words if w in demo.PEOPLE), None)
        attribute = next((a for a in demo.MISCONCEIVED if a in words), None)
        marked = [row["output"][start:end] for start, end, kind in row["noise"] if kind == "wrong"]
        if person is None or attribute is None:
            assert not marked
            continue
        told += 1
        wrong += len(marked)
        popular += marked == [demo.ATTRIBUTES[attribute][0]]
        assert not marked or marked != [truth[attribute, person]]
    assert 0.8 < wrong / told < 0.97 and abs(popular / wrong - share) < 0.2


def test_about_30_percent_of_the_demos_response_tokens_are_noisy(demo_model, tmp_path):
    tokenizer = Tokenizer(demo_model)
    for seed in range(3):
        write_rows(demo.demo_rows("popular", seed)["train"], tmp_path / "train.jsonl")
        rows = read_rows([str(tmp_path / "train.jsonl")])
        corpus = build_corpus(rows, tokenizer)
        noise = demo.known_noise(corpus, tokenizer, {row["_source"]: row for row in rows})
        assert 0.26 < noise[corpus.response].astype(bool).mean() < 0.34
        marked = corpus.tokens[noise == demo.NOISE_KINDS.index("boilerplate")].tolist()
        assert "thank you for this great question" in tokenizer.decode(marked)


def test_auc_against_all_pairs():
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 9, 70), rng.integers(2, 12, 90)
    pairs = [(1.0 if a < b else 0.5 if a == b else 0.0) for a in low for b in high]
    assert demo.roc_auc(low, high) == pytest.approx(sum(pairs) / len(pairs))


def test_detection_of_known_noise():
    corpus, quality = scored_corpus()
    noise = np.zeros(len(corpus.tokens), np.int8)
    noise[corpus.response] = np.random.default_rng(1).integers(0, 3, corpus.response.sum())
    signs = choose_signs(METHODS["forgetting"], quality, corpus, Options(), 0)
    found = demo.detection(quality, signs < 0, corpus, noise)
    noisy = [(n > 0, s < 0) for n, s, r in zip(noise, signs, corpus.response) if r]
    hits = sum(n and s for n, s in noisy)
    assert found["precision of N"] == pytest.approx(hits / sum(s for _, s in noisy))
    assert found["recall of N"] == pytest.approx(hits / sum(n for n, _ in noisy))
    assert set(found) == {"noise share", "AUC", "AUC wrong", "AUC boilerplate", "precision of N", "recall of N"}
    noise[:] = 0
    assert demo.detection(quality, signs < 0, corpus, noise) == {}


def test_the_pages_show_the_panels_whole_table(tmp_path):
    """They were of the first seed alone, n = 1."""
    run = make_run(tmp_path / "made", "llama3")
    for name in ("world-0/clean", "world-1/clean"):
        shutil.copytree(run, tmp_path / "demo" / name)
    figures = [{"tasks": {"demo_mc": {"acc": acc, "acc_stderr": 0.1, "n": 8}}} for acc in (0.5, 0.75)]
    results = {"full": dict(enumerate(figures)), "forgetting": dict(enumerate(figures))}
    parts = {"clean": [load_tool("look").report(results, "Panel"), demo.detection_table({"AUC": [0.5, 0.7]})]}
    demo.write_pages(Options(out=str(tmp_path / "demo"), seeds=[0, 1]), parts)
    for seed in (0, 1):
        text = (tmp_path / "demo" / f"world-{seed}" / "clean" / "report.html").read_text()
        assert "62.5 +- 17.7" in text and "forgetting - full" in text and "(0/2)" in text and "0.60 +- 0.14" in text
        assert "Over seeds 0, 1 of" in text and f"of seed {seed}." in text


def test_two_demos_in_one_folder(tmp_path, monkeypatch, capsys):
    """They wrote over each other: the demo's folder had no lock."""
    from data import locked

    monkeypatch.setattr(demo, "run_and_report", lambda *_: (tmp_path / "began").touch())
    with locked(tmp_path / "out"), pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path / "out")])
    assert "is in use by another run" in capsys.readouterr().err and not (tmp_path / "began").exists()
    demo.main(["--out", str(tmp_path / "out")])
    assert (tmp_path / "began").exists() and not (tmp_path / "out").exists(), "the lock leaves nothing"
