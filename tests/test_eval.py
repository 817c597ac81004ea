"""eval.py: shared contexts, truncation, generation and metrics, against naive loops over whole sequences."""

import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest
import row_cases as cases
import tiny
import torch

import eval as evaluation
from data import Corpus, Tokenizer, advance, progress, question_ids, write_rows
from eval import TASKS, Answer, Budget, checked_limit, continuous_batching, describe_limit, document_count
from eval import encode_pair, evaluate, f1_score, generate, loglikelihoods, prepare, squad_score, summarise
from eval import words_of_any_language
from forgetting import losses_by_example, response_losses
from model import Cache, load_model


@pytest.fixture(scope="module", params=tiny.KINDS)
def pair(request, tmp_path_factory):
    folder = tiny.make_checkpoint(tmp_path_factory.mktemp("m") / request.param, request.param)
    return load_model(folder), Tokenizer(folder)


@torch.inference_mode()
def naive_loglikelihood(model, context, continuation) -> tuple[float, bool]:
    """The whole sequence in one pass, cut from the left as lm-evaluation-harness cuts it."""
    ids = (context + continuation)[-(model.config.max_position_embeddings + 1) :]
    inputs = torch.tensor(ids[:-1])
    logits = model.lm_head(model(inputs, torch.tensor([0, len(inputs)], dtype=torch.int32)))[
        -len(continuation) :
    ]
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
    expected = [
        tokenizer.decode(w[: w.index(tokenizer.eos_id)] if tokenizer.eos_id in w else w) for w in written
    ]
    for batch_tokens in (1, 40, 4096):
        assert generate(model, tokenizer, prompts, 12, budget=Budget(batch_tokens, 1)) == expected
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


class Passes:
    """Stands in front of a model's forward, and keeps the lengths of the sequences of every pass."""

    def __init__(self, model, monkeypatch):
        self.lengths: list[list[int]] = []
        forward = model.forward

        def counted(tokens, cu_seqlens, *rest, **named):
            self.lengths.append(cu_seqlens.diff().tolist())
            return forward(tokens, cu_seqlens, *rest, **named)

        monkeypatch.setattr(model, "forward", counted)

    def tokens(self) -> int:
        return sum(map(sum, self.lengths))


def drawn(seed: int):
    """A function that draws so many token ids."""
    generator = torch.Generator().manual_seed(seed)
    return lambda count: torch.randint(3, tiny.VOCAB, (count,), generator=generator).tolist()


def test_what_contexts_begin_with_runs_once(pair, monkeypatch):
    """At 14fe823 a few-shot prompt ran for every question: 8 x (30 + 9) + 16 tokens instead of 30 + 8 x 9 + 16."""
    model, _ = pair
    ids = drawn(1)
    shots, other = ids(30), ids(20)
    questions = [shots + ids(9) for _ in range(8)]
    pairs = [(question, ids(count)) for question in questions for count in (1, 3)]
    alone = ids(12)
    pairs.insert(5, (alone, ids(2)))
    expected = [naive_loglikelihood(model, *pair) for pair in pairs]
    passes = Passes(model, monkeypatch)
    answers = loglikelihoods(model, pairs)
    for answer, (total, greedy) in zip(answers, expected):
        assert answer.loglikelihood == pytest.approx(total, abs=1e-4) and answer.greedy == greedy
    assert passes.tokens() == 30 + 8 * 9 + 8 * 2 + 13 and len(passes.lengths) == 1
    passes.lengths.clear()
    short = [(other[:3] + ids(9), ids(1)) for _ in range(4)]
    loglikelihoods(model, short + [short[0]])
    assert passes.tokens() == 3 + 4 * 9  # the same input never runs twice


def test_prompts_of_generation_share_their_beginning(pair, monkeypatch):
    model, tokenizer = pair
    monkeypatch.setattr(tokenizer, "eos_id", -1)
    ids = drawn(2)
    shots = ids(30)
    prompts = [shots + ids(6) for _ in range(5)] + [shots + ids(6), shots]
    expected = [tokenizer.decode(naive_greedy(model, prompt, 4)) for prompt in prompts]
    passes = Passes(model, monkeypatch)
    assert generate(model, tokenizer, prompts, 4) == expected
    assert passes.tokens() == 30 + 6 * 6 + 7 * 3  # the prompts, and all new tokens but the last of each
    assert [len(lengths) for lengths in passes.lengths] == [7] * 4
    passes.lengths.clear()
    generate(model, tokenizer, [shots[:7] + ids(6) for _ in range(3)], 1)
    assert passes.tokens() == 3 * 13  # seven tokens are not worth copying rows that lie apart at every step


def test_a_system_text_in_front_of_all_rows_runs_once_a_pack(pair, monkeypatch):
    """Scoring: 12 tokens before every row are 42 % of the tokens of short rows; losses as without sharing."""
    model, _ = pair
    ids = drawn(6)
    system = ids(12)
    rows = [system + ids(length) for length in (9, 9, 14, 6)]
    offsets = np.cumsum([0] + [len(row) for row in rows])
    response = np.concatenate([np.arange(len(row)) > 14 for row in rows])
    corpus = Corpus(np.concatenate(rows).astype(np.int32), response, offsets, [""] * 4, 0)
    expected = [-naive_loglikelihood(model, row[:15], row[15:])[0] for row in rows]
    passes = Passes(model, monkeypatch)
    losses = response_losses(model, corpus, np.arange(4), 4096, "theta")
    sums = [np.nansum(losses[start:end]) for start, end in zip(offsets, offsets[1:])]
    assert sums == pytest.approx(expected, abs=1e-4)
    assert passes.tokens() == 12 + 9 + 9 + 14 + 6
    assert np.array_equal(~np.isnan(losses), response)
    passes.lengths.clear()
    corpus.response[offsets[1] + 5] = (
        True  # an answer among the shared tokens: four in front of it are too few
    )
    response_losses(model, corpus, np.arange(4), 4096, "theta")
    assert passes.tokens() == len(corpus.tokens)


def test_the_next_prompt_takes_the_place_of_a_reply_that_ended(pair, monkeypatch):
    """Continuous batching: replies of 1 to 7 tokens, room for three. At 14fe823 the longest held two others' rows."""
    model, _ = pair
    ids = drawn(3)
    prompts = {place: ids(10) for place in range(12)}
    has_ended = lambda new: len(new) == new[0] % 7 + 1
    first = {place: naive_greedy(model, prompt, 1)[0] for place, prompt in prompts.items()}
    lengths = {place: token % 7 + 1 for place, token in first.items()}
    expected = {place: naive_greedy(model, prompts[place], length) for place, length in lengths.items()}
    row = 2 * Cache(model, 1).keys.nbytes
    passes = Passes(model, monkeypatch)
    budget = Budget(cache_bytes=3 * 17 * row + row // 2)
    assert dict(continuous_batching(model, prompts, 7, has_ended, budget)) == expected
    in_flight = [len(lengths) for lengths in passes.lengths]
    waiting, running, busy = list(lengths.values()), [], []
    while waiting or running:
        running += [waiting.pop(0) for _ in range(min(3 - len(running), len(waiting)))]
        busy.append(len(running))
        running = [left - 1 for left in running if left > 1]
    assert in_flight == busy and busy.count(3) > len(busy) / 2


def test_a_reply_that_fits_no_budget_is_written_alone(pair, monkeypatch):
    model, tokenizer = pair
    prompts = [drawn(4)(10), drawn(5)(12)]
    passes = Passes(model, monkeypatch)
    small = generate(model, tokenizer, prompts, 5, budget=Budget(cache_bytes=1))
    assert max(len(lengths) for lengths in passes.lengths) == 1
    assert small == generate(model, tokenizer, prompts, 5)


def test_pairs_are_split_as_lm_eval_splits_them(pair):
    _, tokenizer = pair
    whole = tokenizer.encode(["The river is long"])[0][0]
    for context, continuation in (
        ("The river", " is long"),
        ("The river ", "is long"),
    ):  # trailing space moves over
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
    assert (
        found["f1"] == 0.5 and found["f1_stderr"] == pytest.approx(0.5 / 3**0.5) and found["popular"] == 1.0
    )


def test_your_own_rows_end_to_end(pair, tmp_path):
    """Tasks mc and qa: an answer by its text or its place, one or several right answers; a space joins unless one is there."""
    model, tokenizer = pair
    choice = {"prompt": "Tell me: it is", "choices": ["the dog", "a fox", "42"], "answer": "a fox"}
    write_rows([choice, choice | {"prompt": "Tell me: it is ", "answer": 2}], tmp_path / "mc.jsonl")
    asked = {"prompt": "Tell me the name:", "answer": ["a fox", "the river"]}
    write_rows([asked, asked | {"answer": "a fox"}], tmp_path / "qa.jsonl")
    documents = prepare(["mc", "qa"], tokenizer, tmp_path)
    results, samples = evaluate(model, tokenizer, documents)
    totals = [
        naive_loglikelihood(model, *encode_pair(tokenizer, "Tell me: it is ", c))[0]
        for c in choice["choices"]
    ]
    for sample, right in zip(samples[:2], (1, 2)):
        assert sample["loglikelihoods"] == pytest.approx(totals, rel=1e-5) and sample["target"] == right
        assert sample["prediction"] == max(range(3), key=totals.__getitem__)
    assert (
        results["mc"]["acc"] == sum(s["prediction"] == s["target"] for s in samples[:2]) / 2
        and results["mc"]["n"] == 2
    )
    reply = generate(model, tokenizer, [tokenizer.encode([asked["prompt"]])[0][0]], 32, stop="\n")[0].strip()
    scores = [f1_score(reply, answer) for answer in asked["answer"]]
    assert [sample["metrics"]["f1"] for sample in samples[2:]] == [max(scores), scores[0]] and samples[2][
        "prediction"
    ] == reply
    assert evaluate(model, tokenizer, prepare(["mc"], tokenizer, tmp_path, limit=1))[0]["mc"]["n"] == 1
    with pytest.raises(ValueError, match="unknown task nope; known: truthfulqa_mc1, "):
        prepare(["nope"], tokenizer, tmp_path)


def test_a_share_of_a_tasks_documents(tmp_path):
    """lm-evaluation-harness 0.4.13's get_sample_size gave these; 100 x .07 is 7.000000000000001 in floating point."""
    sizes = {(817, 0.99): 809, (3270, 0.99): 3238, (651, 0.99): 645, (2305, 0.99): 2282, (100, 0.07): 8}
    sizes |= {(10, 0.99): 10, (10, 1e-6): 1, (10, 1.0): 1, (10, 2.0): 2, (10, 30): 30}
    assert {(n, limit): document_count(checked_limit(limit), n) for n, limit in sizes} == sizes
    assert document_count(checked_limit(None), 10) is None and type(checked_limit(2.0)) is int
    for limit in (0, -0.5, 1.5, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=f"--limit {limit:g} is not allowed: a whole number of documents, or"
        ):
            checked_limit(limit)
    assert describe_limit(0.07) == "only the first 7 % of each task's documents, rounded up (--limit)"

    tokenizer = Tokenizer(tiny.make_checkpoint(tmp_path, "llama3"))
    write_rows([{"prompt": "What is", "choices": ["a", "b"], "answer": 0}] * 5, tmp_path / "mc.jsonl")
    write_rows([{"prompt": "What is", "answer": "a"}] * 8, tmp_path / "qa.jsonl")
    documents = prepare(["mc", "qa"], tokenizer, tmp_path, limit=0.5)
    assert [len(task.rows) for task in documents] == [3, 4], "of each task's own documents"
    assert documents[0].identity["limit"] == 0.5


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "x", "choices": ["a"]}, "no field 'answer'"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": "c"}, "answer 'c' is none of the choices"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": True}, "answer True is none of the choices"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 2}, "2 choices, the right one is number 2"),
    ],
)
def test_malformed_questions_are_named(pair, tmp_path, row, message):
    write_rows([row], tmp_path / "mc.jsonl")
    with pytest.raises(ValueError, match=f"mc.jsonl:1: {message}"):
        prepare(["mc"], pair[1], tmp_path)


def test_a_model_that_answers_nan_has_no_accuracy(pair, tmp_path):
    """Found at fe070b7: the argmax of NaN is place 0, so truthfulqa_mc1 gave 1.0."""
    model, tokenizer = pair
    write_rows([{"prompt": "Tell me:", "choices": ["a", "b"], "answer": 0}], tmp_path / "mc.jsonl")
    norm = next(
        p for name, p in model.named_parameters() if name.endswith(("model.norm.weight", "ln_f.weight"))
    )
    before = norm.data.clone()
    norm.data[0] = torch.nan
    try:
        with pytest.raises(ValueError, match="mc.jsonl:1: mc has the log-likelihood nan"):
            evaluate(model, tokenizer, prepare(["mc"], tokenizer, tmp_path))
    finally:
        norm.data = before


def test_empty_texts_begin_with_the_bos_or_eos(pair):
    """An empty prompt took the reply of its neighbour; an empty pair was an IndexError without its row."""
    model, tokenizer = pair
    first, alone = (
        generate(model, tokenizer, [[5, 9, 7], []], 4),
        generate(model, tokenizer, [[tokenizer.start_id]], 4),
    )
    assert first[1] == alone[0]
    with pytest.raises(ValueError, match="context and continuation are both empty"):
        encode_pair(tokenizer, "", "")


def test_progress_says_nothing_of_short_work_in_a_log_file(monkeypatch, capsys):
    """A line every ten seconds where stderr is no terminal; under ranks it counts the work of all, and ends at the total."""
    with progress("scores", 20, "tokens") as bar:
        advance(bar, 5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("data.rank_and_world", lambda: (0, 3))
    with progress("scores", 20, "tokens") as bar:
        bar.delay, counts = 0, []
        for share in (2, 2, 3):
            advance(bar, share)
            counts.append(bar.n)
    assert counts == [6, 12, 20]
    monkeypatch.setattr("data.rank_and_world", lambda: (1, 3))
    assert progress("scores", 20, "tokens").disable


def test_an_empty_corpus_has_no_losses_and_no_bar(pair, monkeypatch):
    monkeypatch.setattr("forgetting.progress", None)
    nothing = Corpus(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), [], 0)
    losses = response_losses(pair[0], nothing, nothing.everything, 100, "held-out")
    assert losses.shape == (0,) and losses_by_example(losses, nothing) == []


def test_prompts_of_stdin_end_at_newlines_alone(monkeypatch):
    """str.splitlines also ends a line at a form feed, U+0085 and U+2028, and so cut prompts in two."""
    monkeypatch.setattr(evaluation.sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\n")))
    assert evaluation.prompts_of("-") == ["a", ""], "the last line is empty, and a prompt"
    text = "a\u2028b\x85c\x0cd\r\ne\n\nf"
    monkeypatch.setattr(evaluation.sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert evaluation.prompts_of("-") == ["a\u2028b\x85c\x0cd", "e", "", "f"]
    assert evaluation.prompts_of(text) == [text]
    monkeypatch.setattr(evaluation.sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    with pytest.raises(ValueError, match=r"--prompt: not UTF-8 \(byte 2\)"):
        evaluation.prompts_of("-")
    with pytest.raises(ValueError, match=r"--prompt: not UTF-8 \(byte 1\)"):
        evaluation.prompts_of("a\udcff")  # as Python hands an argument over that is not UTF-8


@pytest.mark.parametrize(
    "reply, right",
    [("巴黎。", "巴黎"), ("«Paris»", "Paris"), ("“Paris”", "paris"), ("باريس،", "باريس"), ("42。", "42")],
)
def test_punctuation_of_other_scripts_is_none_of_an_answer(reply, right):
    """As MLQA's mlqa_evaluation_v1.py: every character of Unicode's category P. SQuAD knows ASCII's alone."""
    assert squad_score(reply, [right])["metrics"] == {"f1": 1.0, "exact_match": 1.0}
    assert TASKS["tydiqa"].score({"answers": {"text": [right]}}, [Answer(text=reply)])["metrics"]["f1"] == 0.0


def test_characters_are_words_where_no_spaces_stand():
    """MLQA's mixed segmentation, DRCD's characters: 2 of 7 shared with 2 of 2; SQuAD's one word gives 0."""
    assert f1_score("法国首都是巴黎", "巴黎", words_of_any_language) == pytest.approx(2 * 2 / (7 + 2))
    assert f1_score("東京都", "東京", words_of_any_language) == pytest.approx(2 * 2 / (3 + 2))
    assert words_of_any_language("The GDP of 中国 grew") == ["gdp", "of", "中", "国", "grew"]
    assert words_of_any_language("서울 특별시") == ["서울", "특별시"]


def test_prompts_that_lose_their_beginning_are_counted(pair, tmp_path, capsys):
    """lm-eval 0.4.13 warns of each; here one line a task."""
    model, tokenizer = pair
    long = "the river " * model.config.max_position_embeddings
    choices = {"choices": ["the dog", "a fox"], "answer": 0}
    write_rows([{"prompt": "Tell me:"} | choices, {"prompt": long} | choices], tmp_path / "mc.jsonl")
    write_rows([{"prompt": long, "answer": "a"}, {"prompt": "x", "answer": "a"}], tmp_path / "qa.jsonl")
    evaluate(model, tokenizer, prepare(["mc", "qa"], tokenizer, tmp_path))
    positions = model.config.max_position_embeddings
    assert capsys.readouterr().out.splitlines() == [
        f"mc: 2 of 4 prompts are cut at their beginning to fit the model's {positions} positions",
        f"qa: 1 of 2 prompts are cut at their beginning to fit the model's {positions} positions",
    ]


@pytest.mark.parametrize("name", ["llama3", "zephyr"])
def test_your_own_questions_are_asked_in_the_models_template(tmp_path, monkeypatch, name):
    """At 14fe823 raw: an instruct model began with a line break, and F1 was 0. One bos, where the template writes it."""
    tokenizer = Tokenizer(cases.template_folder(tmp_path / "m", name), "model", cases.NOW)
    write_rows([{"prompt": "Who? ", "choices": ["A fox.", "It"], "answer": 0}], tmp_path / "mc.jsonl")
    write_rows([{"prompt": "Who?", "answer": "a fox"}], tmp_path / "qa.jsonl")
    choices, questions = prepare(["mc", "qa"], tokenizer, tmp_path)
    asked = question_ids("Who?", tokenizer)
    seen = {}

    def answered(model, prompts, *rest):
        seen["qa"] = prompts
        return ["A fox."] * len(prompts)

    def scored(model, pairs, *rest):
        seen["mc"] = [context + continuation for context, continuation in pairs]
        return [Answer(-1.0 - i) for i in range(len(pairs))]

    monkeypatch.setattr(evaluation, "generate", lambda model, tokenizer, *rest: answered(model, *rest))
    monkeypatch.setattr(evaluation, "loglikelihoods", scored)
    model = SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=4096, vocab_size=10**6), folder="m", eval=lambda: None
    )
    results, _ = evaluate(model, tokenizer, [choices])
    assert results["mc"]["acc"] == 1.0
    text = tokenizer.decode(asked, skip_special=False)
    assert seen["mc"][0] == tokenizer.encode([text + "A fox."], special=False)[0][0]
    results, _ = evaluate(model, tokenizer, [questions])
    assert seen["qa"] == [asked] and results["qa"]["f1"] == 1.0


def test_ids_of_a_prompt_must_have_an_embedding(pair):
    model, tokenizer = pair
    config = model.config
    model.config = dataclasses.replace(config, vocab_size=5)
    try:
        with pytest.raises(ValueError, match="the model's vocab_size is 5: not a pair"):
            evaluation.answer_prompts(model, tokenizer, ["Tell me"], [], Budget())
    finally:
        model.config = config


def test_new_tokens_may_not_fill_the_positions(pair, tmp_path):
    """As many new tokens as positions leave no room for a prompt; one fewer does."""
    model, tokenizer = pair
    write_rows([{"prompt": "x", "answer": "a"}], tmp_path / "qa.jsonl")
    documents = prepare(["qa"], tokenizer, tmp_path)
    evaluation.check_room(documents, 33)
    with pytest.raises(
        ValueError, match="--tasks qa: 32 new tokens leave no room in the model's 32 positions"
    ):
        evaluation.check_room(documents, 32)


@pytest.mark.parametrize("flag", [["--cache-gib", "0"], ["--cache-gib", "nan"], ["--batch-tokens", "0"]])
def test_budgets_are_above_zero(monkeypatch, flag):
    monkeypatch.setattr(evaluation.sys, "argv", ["eval.py", "--model", "m", "--tasks", "mc", *flag])
    with pytest.raises(ValueError, match=f"{flag[0]} .* is not allowed"):
        evaluation.parse_arguments()


def test_a_budget_in_gibibytes(monkeypatch):
    monkeypatch.setattr(evaluation.sys, "argv", "eval.py --model m --tasks mc --cache-gib 0.5".split())
    assert evaluation.budget_of(evaluation.parse_arguments()) == Budget(4096, 2**29)
