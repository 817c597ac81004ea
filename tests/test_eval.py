"""eval.py: shared contexts, truncation, generation and metrics, against naive loops over whole sequences."""

import io
import json
import sys

import numpy as np
import pytest
import tiny
import torch

from data import Tokenizer, write_rows
from eval import encode_pair, evaluate, generate, loglikelihoods, mean_losses, prepare, progress
from model import load_model
from tools.benchmarks import f1_score, summarise


@pytest.fixture(scope="module", params=tiny.KINDS)
def pair(request, tmp_path_factory):
    folder = tiny.make_checkpoint(tmp_path_factory.mktemp("m") / request.param, request.param)
    return load_model(folder), Tokenizer(folder)


@torch.inference_mode()
def naive_loglikelihood(model, context, continuation) -> tuple[float, bool]:
    """The whole sequence in one pass, cut from the left as lm-evaluation-harness cuts it."""
    ids = (context + continuation)[-(model.config.max_position_embeddings + 1) :]
    inputs = torch.tensor(ids[:-1])
    logits = model.lm_head(model(inputs, torch.tensor([0, len(inputs)], dtype=torch.int32)))[-len(continuation) :]
    logprobs = torch.log_softmax(logits.double(), -1)
    targets = torch.tensor(continuation)
    total = logprobs[torch.arange(len(targets)), targets].sum().item()
    return total, bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_loglikelihoods_equal_the_naive_loop(pair, batch_tokens):
    """Choices of one and of many tokens, contexts shared and alone, and one that exceeds the positions."""
    model, _ = pair
    g = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, tiny.VOCAB, (n,), generator=g).tolist()
    contexts = [ids(9), ids(14), ids(1), ids(model.config.max_position_embeddings)]
    pairs = [(context, ids(n)) for context in contexts for n in (1, 4, 1, 7)]
    greedy = naive_greedy(model, contexts[0], 3)
    pairs.append((contexts[0], greedy))
    for (context, continuation), answer in zip(pairs, loglikelihoods(model, pairs, batch_tokens)):
        total, flag = naive_loglikelihood(model, context, continuation)
        assert answer.loglikelihood == pytest.approx(total, rel=1e-5) and answer.greedy == flag
    assert answer.greedy


@torch.inference_mode()
def naive_greedy(model, ids, count) -> list[int]:
    """No cache: the whole sequence again for every token."""
    ids = list(ids)
    for _ in range(count):
        hidden = model(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))
        ids.append(model.lm_head(hidden[-1]).argmax().item())
    return ids[-count:]


def test_generation_equals_the_naive_loop(pair):
    model, tokenizer = pair
    prompts = [ids for ids, _ in tokenizer.encode(["Tell me", "The river", "Why is the dog so lazy?", "The"])]
    written = [naive_greedy(model, ids, 12) for ids in prompts]
    expected = [tokenizer.decode(w[: w.index(tokenizer.eos_id)] if tokenizer.eos_id in w else w) for w in written]
    for batch_tokens in (1, 40, 4096):
        assert generate(model, tokenizer, prompts, 12, batch_tokens=batch_tokens) == expected
    stop = expected[0][2:4]
    assert generate(model, tokenizer, prompts[:1], 12, stop=stop) == [expected[0].split(stop)[0]]


def test_generation_stops_at_eos(pair):
    model, tokenizer = pair
    ids = tokenizer.encode(["Tell me"])[0][0]
    first = naive_greedy(model, ids, 3)
    before, tokenizer.eos_id = tokenizer.eos_id, first[1]
    try:
        assert generate(model, tokenizer, [ids], 12) == [tokenizer.decode(first[: first.index(first[1])])]
    finally:
        tokenizer.eos_id = before


def test_pairs_are_split_as_lm_eval_splits_them(pair):
    _, tokenizer = pair
    whole = tokenizer.encode(["The river is long"])[0][0]
    for context, continuation in (("The river", " is long"), ("The river ", "is long")):  # trailing space moves over
        context_ids, ids = encode_pair(tokenizer, context, continuation)
        assert context_ids == tokenizer.encode(["The river"])[0][0] and context_ids + ids == whole
    context_ids, ids = encode_pair(tokenizer, "", "long")
    assert context_ids == [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    assert ids == tokenizer.encode(["long"], special=False)[0][0]


def test_too_long_a_continuation_is_an_error(pair):
    model, tokenizer = pair
    limit = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"{limit + 1} tokens exceeds the model's {limit} positions"):
        loglikelihoods(model, [([3], [4] * (limit + 1))])
    with pytest.raises(ValueError, match="leave no room"):
        generate(model, tokenizer, [[3]], limit)


def test_f1_is_squads():
    assert f1_score("The cat, sat!", "a cat sat") == 1.0
    assert f1_score("cat cat dog", "cat") == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert f1_score("", "cat") == f1_score("dog", "cat") == f1_score("the", "a") == 0.0


def test_a_mean_is_over_the_documents_that_have_the_metric():
    found = summarise([{"f1": 1.0}, {"f1": 0.0, "popular": 1.0}, {"f1": 0.5}])
    assert found["f1"] == 0.5 and found["f1_stderr"] == pytest.approx(0.5 / 3**0.5) and found["popular"] == 1.0


def test_demo_tasks_end_to_end(pair, tmp_path):
    model, tokenizer = pair
    question = {"group": "unseen, misconceived", "prompt": "Tell me:", "head": " it is ", "choices": ["the dog", "a fox", "42"],
                "answer": "a fox", "popular": "dog"}  # fmt: skip
    write_rows([question, question | {"group": "sums"}], tmp_path / "demo_mc.jsonl")
    write_rows([question, question | {"group": "sums"}], tmp_path / "demo_qa.jsonl")
    results, samples = evaluate(model, tokenizer, prepare(["demo_mc", "demo_qa"], tokenizer, tmp_path))
    totals = [naive_loglikelihood(model, *encode_pair(tokenizer, "Tell me: it is ", c))[0] for c in question["choices"]]
    assert samples[0]["loglikelihoods"] == pytest.approx(totals, rel=1e-5)
    assert samples[0]["prediction"] == max(range(3), key=totals.__getitem__) and samples[0]["target"] == 1
    assert results["demo_mc"]["acc"] == float(samples[0]["prediction"] == 1) and results["demo_mc"]["n"] == 2
    assert "popular" in samples[2]["metrics"] and "popular" not in samples[3]["metrics"]
    assert evaluate(model, tokenizer, prepare(["demo_mc"], tokenizer, tmp_path, limit=1))[0]["demo_mc"]["n"] == 1
    with pytest.raises(ValueError, match="unknown task nope; known: truthfulqa_mc1, "):
        prepare(["nope"], tokenizer, tmp_path)
    (tmp_path / "demo_mc.jsonl").write_text(json.dumps({"prompt": "x"}))
    with pytest.raises(ValueError, match="demo_mc.jsonl:1: no field 'head'"):
        prepare(["demo_mc"], tokenizer, tmp_path)


def test_empty_texts_begin_with_the_bos_or_eos(pair):
    """An empty prompt took the reply of its neighbour; an empty pair was an IndexError without its row."""
    model, tokenizer = pair
    first, alone = generate(model, tokenizer, [[5, 9, 7], []], 4), generate(model, tokenizer, [[tokenizer.start_id]], 4)
    assert first[1] == alone[0]
    with pytest.raises(ValueError, match="context and continuation are both empty"):
        encode_pair(tokenizer, "", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LONG = "forgetting:t_max=1.0,lambda_schedule=constant/seed-0"


def watched(monkeypatch, stream, steps: int = 3) -> str:
    """What a bar with a training's figures writes."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("eval.rank_and_world", lambda: (0, 1))
    with progress(LONG, 2084, "step", keep=True) as bar:
        bar.mininterval = bar.delay = 0
        for step in range(steps):
            bar.set_postfix_str("loss 10.8 P 11.2 N 10.4 lam 0.0179 tok/s 1.25e+04", refresh=False)
            bar.update()
            bar.refresh()
    return stream.getvalue()


def test_without_a_terminal_progress_is_whole_lines(monkeypatch):
    """Carriage returns stood before every line of a log file."""
    lines = watched(monkeypatch, io.StringIO()).splitlines()
    assert len(lines) >= 3 and not any("\r" in line or not line.strip() for line in lines)
    assert lines[-1].startswith("forgetting...") and "seed-0 " in lines[-1] and "N 10.4 lam 0.0179" in lines[-1]


def test_progress_fits_80_columns_and_shows_what_is_watched(monkeypatch):
    """The name of a variant left no room for its figures."""
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda stream: (80, 24))
    frames = [part for part in watched(monkeypatch, Terminal()).replace("\n", "\r").split("\r") if "seed-0" in part]
    assert frames and all(len(frame) <= 80 for frame in frames) and "P 11.2 N 1" in frames[-1], frames


def test_an_interrupted_bar_says_where(monkeypatch):
    with pytest.raises(KeyboardInterrupt, match="at scores, 5 of 20 tokens"):
        with progress("scores", 20, "token") as bar:
            bar.update(5)
            raise KeyboardInterrupt


def test_an_empty_corpus_has_no_losses_and_no_bar(pair, monkeypatch):
    from data import Corpus

    monkeypatch.setattr("eval.progress", None)
    nothing = Corpus(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), [], 0)
    assert mean_losses(pair[0], nothing, {"held-out": nothing.response}, 100) == {"held-out": None}
