"""Instruction rows -> text with known response characters -> token ids with a response mask -> packed batches.

    python -c "import data; print(*data.demo_rows('popular', seed=0)['train'][:5], sep='\\n')"

    tokenizer = Tokenizer("tests/demo_model")
    corpus = build_corpus(read_rows(["train.jsonl:500"]), tokenizer, max_length=2048)
    for batch in pack(corpus, range(len(corpus)), token_budget=4096): ...

A corpus is flat: the tokens of all examples end to end, `offsets` saying where each begins. Losses, scores and signs are
arrays of the same length, indexed by the token they judge, and a batch carries the places its tokens came from; so
storing what a batch yields, or fetching what it needs, is one line whatever the packing and the number of ranks.

Shapes: N tokens of the corpus   E examples   T tokens of a batch   B sequences of a batch
"""

import ast
import gzip
import hashlib
import importlib.util
import json
import os
import random
import re
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from http.client import IncompleteRead
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence
from xml.etree import ElementTree

import numpy as np
import tokenizers
import torch
from huggingface_hub import constants, hf_hub_download, list_repo_files
from torch import Tensor

from lora import read_object, whole_file
from model import hub_error

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
NOISE_KINDS = ("", "wrong", "boilerplate", "garbled")  # a row may carry known noise: {"noise": [[start, end, kind], ...]}

# --------------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """tokenizer.json of a checkpoint folder, with the special tokens that its config files name."""

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder}: no tokenizer.json in it (a sentencepiece tokenizer.model alone is not read)")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.raw = tokenizers.Tokenizer.from_str(json.dumps(keep_offsets(content)))
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise ValueError(f"{path}: not a tokenizer file ({error})") from None
        self.raw.no_truncation()
        self.raw.no_padding()
        self.bos, self.bos_id = self._special(folder, "bos")
        self.eos, self.eos_id = self._special(folder, "eos")
        if self.eos is None:
            raise ValueError(f"{folder}: neither tokenizer_config.json nor config.json names an eos token")
        if self.raw.encode(self.eos, add_special_tokens=False).ids != [self.eos_id]:
            raise ValueError(f"{path}: the eos token {self.eos!r} is not encoded as one token")

    def _special(self, folder: Path, kind: str) -> tuple[str | None, int | None]:
        """Text and id of a special token: tokenizer_config.json first, then config.json and generation_config.json."""
        files = [folder / name for name in ("tokenizer_config.json", "config.json", "generation_config.json")]
        configs = [read_object(path) if path.is_file() else {} for path in files]
        text = configs[0].get(f"{kind}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if text is None:
            ids = [config.get(f"{kind}_token_id") for config in configs[1:]]
            ids = [i[0] if isinstance(i, list) else i for i in ids if i is not None]
            if ids and not (isinstance(ids[0], int) and ids[0] >= 0):
                raise ValueError(f"{folder}: {kind}_token_id {ids[0]!r} is not a token id")
            text = self.raw.id_to_token(ids[0]) if ids else None
        if not isinstance(text, str | None):
            raise ValueError(f"{files[0]}: {kind}_token {text!r} is not a text")
        return text, None if text is None else self.raw.token_to_id(text)

    def encode(self, texts: list[str], special: bool = True) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """(ids, character spans) of each text. A bos comes first once, if the tokenizer puts one; no eos is added."""
        results = []
        for text, encoding in zip(texts, self.raw.encode_batch(texts, add_special_tokens=special)):
            ids, spans = encoding.ids, encoding.offsets
            if special and ids[:2] == [self.bos_id] * 2 and text.startswith(self.bos):
                ids, spans = ids[1:], spans[1:]  # the text brought its own bos
            while special and ids and ids[-1] == self.eos_id and spans[-1][0] == spans[-1][1]:
                ids, spans = ids[:-1], spans[:-1]  # put there by the tokenizer, not by the text
            results.append((ids, spans))
        return results

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids."""
        return self.raw.decode(list(ids), skip_special_tokens=skip_special)


def check_ids(ids: Any, vocab_size: int, where: object) -> None:
    """Raise ValueError for a token id that the model has no embedding for; a tokenizer may know such, unless they occur."""
    if len(ids) and (largest := int(np.max(ids))) >= vocab_size:
        raise ValueError(f"{where}: its tokenizer gives id {largest}, the model's vocab_size is {vocab_size}: not a pair")


def keep_offsets(content: Any) -> Any:
    """tokenizer.json with offset trimming off: a trimmed whitespace token covers no character and would get no loss."""
    if isinstance(content, list):
        return [keep_offsets(part) for part in content]
    if not isinstance(content, dict):
        return content
    kept = {key: keep_offsets(part) for key, part in content.items() if key not in ("vocab", "merges")}
    if "trim_offsets" in kept:
        kept["trim_offsets"] = False
    return content | kept


# -------------------------------------------------------------------------------------------------- rows and layouts


def read_rows(files: Iterable[str]) -> list[dict]:
    """The rows of .jsonl or .json files, each `path` or `path:count` (the first count rows); a path may be in RECIPES.

    A file of that name wins over the recipe. Every row gets a field "_source" (file:line) for messages. Raises ValueError
    naming the file and line.
    """
    rows: list[dict] = []
    for entry in files:
        path, _, count = entry.rpartition(":")
        if not count.isdigit():
            path, count = entry, ""
        if not os.path.isfile(path) and path not in RECIPES:
            what = "a folder, not a file" if os.path.isdir(path) else "no such file"
            raise ValueError(f"{path}: {what}, nor a public set by name ({', '.join(RECIPES)})")
        read = list(_parse(Path(path) if os.path.isfile(path) else fetch_recipe(path)))
        if count and not 1 <= int(count) <= len(read):
            raise ValueError(f"{path}: {count} rows asked for, 1 to {len(read)} are there")
        rows += read[: int(count)] if count else read
    return rows


def _parse(path: Path) -> Iterator[dict]:
    try:
        text = path.read_text(encoding="utf-8").removeprefix("\ufeff")  # the byte-order mark that some editors put first
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None
    half_characters = "\\ud" in text or "\\uD" in text  # escapes: no UTF-8 text holds them as they are
    lines: Iterable = enumerate(text.split("\n"), 1)
    if path.suffix == ".json":
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(whole, list):
            raise ValueError(f"{path}: a list of rows is expected, not {type(whole).__name__}")
        lines = enumerate(whole, 1)
    count = 0
    for number, line in lines:
        if isinstance(line, str):
            if not line.strip():
                continue
            try:
                line = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(line, dict):
            raise ValueError(f"{path}:{number}: a row must be an object, not {type(line).__name__}")
        if half_characters and (found := HALF_CHARACTER.search(json.dumps(line, ensure_ascii=False))):
            raise ValueError(f"{path}:{number}: \\u{ord(found[0]):04x} alone is half a character (of a UTF-16 pair)")
        count += 1
        yield line | {"_source": f"{path}:{number}"}
    if not count:
        raise ValueError(f"{path}: no rows in it")


LAYOUTS = {  # layout: fields that must be there, the last one the response; further fields are optional context
    "messages": ("messages",),
    "prompt + completion": ("prompt", "completion"),
    "prompt + response": ("prompt", "response"),
    "instruction (+ input) + output": ("instruction", "output"),
    "instruction (+ context) + response": ("instruction", "response"),
    "inputs + targets": ("inputs", "targets"),
}

Pieces = list[tuple[str, bool]]  # text and whether it is a response, in order


def render(row: dict, eos: str) -> Pieces:
    """A row of any known layout as pieces of text; the responses, with their eos, are the pieces marked True.

    Conversations take the template of the paper's corpus (Tulu); prompt + completion and prompt + response rows are
    taken as they are, joined by a space unless one is there. Raises ValueError naming the row.
    """
    where = row.get("_source", "row")
    layout = next((fields for fields in LAYOUTS.values() if all(field in row for field in fields)), None)
    if layout is None:
        found = ", ".join(sorted(key for key in row if not key.startswith("_"))) or "none"
        raise ValueError(f"{where}: unknown layout, fields found: {found}; known: {'; '.join(LAYOUTS)}")
    if layout == ("messages",):
        return _conversation(_check_messages(row["messages"], where), eos)
    context = None
    if layout[0] == "instruction":
        context = row.get("input" if layout[1] == "output" else "context")
    for value in (*(row[field] for field in layout), context or ""):
        if not isinstance(value, str):
            raise ValueError(f"{where}: {' and '.join(layout)} must be strings, not {type(value).__name__}")
    prompt, response = (row[field] for field in layout)
    if not response:
        raise ValueError(f"{where}: {layout[1]} is empty")
    if layout[0] == "prompt":
        spaced = not prompt or prompt[-1].isspace() or response[0].isspace()
        return [(prompt if spaced else prompt + " ", False), (response + eos, True)]
    prompt = f"{prompt}\n\n{context}" if context else prompt
    return _conversation([("user", prompt), ("assistant", response)], eos)


def _check_messages(messages: object, where: str) -> list[tuple[str, str]]:
    """Messages as (role, content), checked: an optional system message, then user and assistant in turn."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: messages must be a list of objects with role and content")
    turns = [(message.get("role"), message.get("content")) for message in messages]
    for role, content in turns:
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: role {role!r} is not allowed: system, user, assistant")
        if not isinstance(content, str):
            raise ValueError(f"{where}: the content of a message must be a string, not {type(content).__name__}")
    spoken = [role for role, _ in turns[1:]] if turns and turns[0][0] == "system" else [role for role, _ in turns]
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise ValueError(f"{where}: user and assistant must take turns, starting with user, not {', '.join(spoken)}")
    if not any(role == "assistant" and content for role, content in turns):
        raise ValueError(f"{where}: no assistant message with text")
    return turns


def _conversation(turns: list[tuple[str, str]], eos: str) -> Pieces:
    """The Tulu template. Between two turns stands a newline, as in the authors' files; none follows the last eos."""
    pieces: Pieces = []
    for i, (role, content) in enumerate(turns):
        newline = "\n" if i and turns[i - 1][0] == "assistant" else ""
        pieces.append((f"{newline}<|{role}|>\n", False))
        pieces.append((content + eos, True) if role == "assistant" else (content + "\n", False))
    return pieces


# ------------------------------------------------------------------------------------------------------------ corpus


@dataclass
class Corpus:
    """Tokenised examples, end to end. A token is judged (scored, trained on) where `response` is true."""

    tokens: np.ndarray  # (N,) int32
    response: np.ndarray  # (N,) bool; never the first token of an example, which nothing predicts
    noise: np.ndarray  # (N,) int8 place in NOISE_KINDS; all 0 for data whose noise is not known
    offsets: np.ndarray  # (E+1,) int64
    dropped: int  # rows that max_length left without a response token

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:  # (E,), worked out once: a step must not cost what the corpus does
        return np.diff(self.offsets)

    def fingerprint(self) -> str:
        """sha256 of tokens, mask and boundaries."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.response, self.offsets):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def part(self, first: int, last: int) -> "Corpus":
        """Examples first to last - 1 as a corpus of their own, without copying."""
        tokens = slice(self.offsets[first], self.offsets[last])
        arrays = (array[tokens] for array in (self.tokens, self.response, self.noise))
        return Corpus(*arrays, self.offsets[first : last + 1] - self.offsets[first], dropped=0)

    def places(self, examples: Sequence[int]) -> np.ndarray:
        """Where the tokens of these examples lie in the flat arrays, in order."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in examples]
        return np.concatenate(spans) if spans else np.empty(0, np.int64)


def unique_rows(rows: list[dict], eos: str) -> list[dict]:
    """The rows without later exact duplicates (equal text after rendering); reference and training sets stay disjoint."""
    first: dict[str, dict] = {}
    for row in rows:
        first.setdefault("\0".join(text for text, _ in render(row, eos)), row)
    return list(first.values())


def build_corpus(rows: list[dict], tokenizer: Tokenizer, max_length: int = 2048) -> Corpus:
    """Render and tokenise rows, cut each to max_length tokens, drop (and count) those left without a response token.

    The mask comes from the character spans of *one* tokenisation of the whole text: a token is a response token if it
    covers any character of a response. Tokenising a prefix apart would miss tokens that merge across the border.
    """
    tokens, response, noise, lengths = [], [], [], []
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        pieces = [render(row, tokenizer.eos) for row in part]
        encoded = tokenizer.encode(["".join(text for text, _ in p) for p in pieces])
        for row, row_pieces, (ids, spans) in zip(part, pieces, encoded):
            ends = np.array(spans[:max_length], dtype=np.int64).reshape(-1, 2)  # (length, 2)
            mask, kinds = np.zeros(len(ends), bool), np.zeros(len(ends), np.int8)
            at = 0
            for text, is_response in row_pieces:
                if is_response:
                    mask |= covers(ends, at, at + len(text))
                    for first, last, kind in known_noise(row):
                        kinds[covers(ends, at + first, at + last)] = NOISE_KINDS.index(kind)
                at += len(text)
            mask[:1] = False
            if mask.any():
                tokens.append(np.array(ids[:max_length], np.int32))
                response.append(mask)
                noise.append(kinds)
                lengths.append(len(ends))
    if not lengths:
        raise ValueError(f"all {len(rows)} rows were dropped: no response token within --max-length {max_length}")
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    flat = [np.concatenate(parts) for parts in (tokens, response, noise)]
    return Corpus(*flat, offsets, dropped=len(rows) - len(lengths))


def known_noise(row: dict) -> list[tuple[int, int, str]]:
    """The spans of a row's field `noise`; ValueError naming the row if that field is something else."""
    spans = row.get("noise") or []
    is_span = lambda x: isinstance(x, list) and [type(part) for part in x] == [int, int, str] and x[2] in NOISE_KINDS[1:]
    if not (isinstance(spans, list) and all(map(is_span, spans))):
        expected = f"a list of [start, end, kind], kinds {', '.join(NOISE_KINDS[1:])}"
        raise ValueError(f"{row.get('_source', 'row')}: noise {str(spans)[:40]} is not {expected}")
    return spans


def covers(spans: np.ndarray, start: int, end: int) -> np.ndarray:
    """Which of the character spans (n, 2) hold a character of [start, end); an empty span (a bos) holds none."""
    return (spans[:, 0] < end) & (spans[:, 1] > start) & (spans[:, 1] > spans[:, 0])


def roc_auc(low: np.ndarray, high: np.ndarray) -> float:
    """The chance that a value of `low` is below one of `high`, ties counting half: the area under the ROC curve."""
    ordered = np.sort(high)
    above = len(high) - np.searchsorted(ordered, low, side="right")
    ties = np.searchsorted(ordered, low, side="right") - np.searchsorted(ordered, low, side="left")
    return float((above + ties / 2).mean() / len(high))


def detection(quality: np.ndarray, negative: np.ndarray, corpus: Corpus) -> dict[str, float]:
    """How well a low Q (N,) finds noise that is known: ROC-AUC in all and by kind, precision and recall of N.

    negative (N,) bool is N; quality is NaN where nothing is judged. {} if no token is known to be noise.
    """
    clean = quality[corpus.response & (corpus.noise == 0)]
    noisy = corpus.response & (corpus.noise > 0)
    if not noisy.any():
        return {}
    figures = {"noise share": float(noisy.sum() / corpus.response.sum()), "AUC": roc_auc(quality[noisy], clean)}
    for kind, name in enumerate(NOISE_KINDS):
        if kind and (corpus.noise == kind).any():
            figures[f"AUC {name}"] = roc_auc(quality[corpus.response & (corpus.noise == kind)], clean)
    figures["precision of N"] = float((noisy & negative).sum() / max(negative.sum(), 1))
    figures["recall of N"] = float((noisy & negative).sum() / noisy.sum())
    return figures


# ----------------------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """Whole sequences end to end, without padding."""

    tokens: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B+1,) int32, on the CPU
    places: Tensor  # (T,) int64 index of each token in the corpus' flat arrays


def split_by_tokens(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group 0..n-1, sorted by length (longest first), into packs of at most token_budget tokens (or one sequence)."""
    packs: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not packs or lengths[i] > room:
            packs.append([])
            room = token_budget
        packs[-1].append(i)
        room -= lengths[i]
    return packs


def pack(corpus: Corpus, examples: Sequence[int], token_budget: int) -> Iterator[Batch]:
    """These examples as batches of at most token_budget tokens; neighbours have like lengths, which attend() shares."""
    lengths = corpus.lengths[np.asarray(examples, np.int64)].tolist()
    for group in split_by_tokens(lengths, token_budget):
        places = corpus.places([examples[i] for i in group])
        cu_seqlens = torch.tensor([0] + [lengths[i] for i in group]).cumsum(0).int()
        yield Batch(torch.from_numpy(corpus.tokens[places]).long(), cu_seqlens, torch.from_numpy(places))


def shift(tokens: Tensor, judged: Tensor) -> tuple[Tensor, Tensor]:
    """The next-token shift: rows (n,) of the states that predict the judged tokens, and those tokens (n,).

    tokens (T,) int64; judged (T,) bool, never true for the first token of a sequence.
    """
    at = judged.nonzero().squeeze(1)  # (n,)
    return at - 1, tokens[at]


# ------------------------------------------------------------------------------------ the benchmarks' public homes

GITHUB = "https://raw.githubusercontent.com/"
LOGIQA_TEST = GITHUB + "lgw863/LogiQA-dataset/91e7b26bab6308fc222fe7f8838b61792f2f293f/Test.txt"
ASDIV_XML = GITHUB + "chaochun/nlu-asdiv-dataset/883f90a9a65bf00304ba8f37423910fe743abc47/dataset/ASDiv.xml"
TRUTHFULQA_MC = GITHUB + "sylinrl/TruthfulQA/013686a06be7a7bde5bf8223943e106c7250123c/data/mc_task.json"
TRUTHFULQA_TASK = (
    GITHUB + "EleutherAI/lm-evaluation-harness/fb9f352b699db09f0b6c2379f98f7645a6b4312a"
    "/lm_eval/tasks/truthfulqa/truthfulqa_mc1.yaml"
)
TYDIQA_SCRIPT = GITHUB + "UCSC-REAL/TokenCleaning/af1a08e19f1c6072395dc9785d136860282e24cf/eval/tydiqa/run_eval.py"
TYDIQA = "https://storage.googleapis.com/tydiqa/v1.1/tydiqa-goldp-v1.1-{}.json"
ARC_ROWS = (
    "https://datasets-server.huggingface.co/rows?dataset=allenai%2Fai2_arc&config=ARC-Challenge&split=test&offset={}&length=100"
)
ARITHMETIC_FILES = {  # subtask: the Hub's file
    "1dc": "single_digit_three_ops", "2da": "two_digit_addition", "2ds": "two_digit_subtraction",
    "2dm": "two_digit_multiplication", "3da": "three_digit_addition", "3ds": "three_digit_subtraction",
    "4da": "four_digit_addition", "4ds": "four_digit_subtraction", "5da": "five_digit_addition",
    "5ds": "five_digit_subtraction",
}  # fmt: skip


def json_lines(text: str) -> list[dict]:
    """The rows of a JSONL text."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def convert_boolq(text: str) -> list[dict]:
    """The original dev.jsonl; SuperGLUE, which lm-eval reads, puts the title in front of the passage."""
    rows = json_lines(text)
    return [
        {"question": r["question"], "passage": f"{r['title']} -- {r['passage']}", "idx": i, "label": int(r["answer"])}
        for i, r in enumerate(rows)
    ]


def convert_logiqa(text: str) -> list[dict]:
    """Blocks of a blank line, the answer's letter, context, question and four options; "." becomes ". " as the Hub has it."""
    lines, rows = text.split("\n"), []
    spaced = lambda line: line.replace(".", ". ").strip()
    for at in range(1, len(lines) - 6, 8):
        label, context, question, *options = lines[at : at + 7]
        options = [spaced(option.strip()[2:]) for option in options]
        rows.append({"label": label.strip(), "context": spaced(context), "question": spaced(question), "options": options})
    return rows


def convert_asdiv(text: str) -> list[dict]:
    """ASDiv.xml: the texts of each problem, unstripped."""
    names = {"body": "Body", "question": "Question", "solution_type": "Solution-Type", "answer": "Answer", "formula": "Formula"}
    problems = ElementTree.fromstring(text).iter("Problem")
    return [{field: problem.find(tag).text for field, tag in names.items()} for problem in problems]


def convert_truthfulqa(text: str) -> list[dict]:
    """mc_task.json: {choice: label} becomes {choices, labels}, in order."""
    split = lambda targets: {"choices": list(targets), "labels": list(targets.values())}
    return [{"question": r["question"], **{k: split(r[k]) for k in ("mc1_targets", "mc2_targets")}} for r in json.loads(text)]


def convert_truthfulqa_prompt(text: str) -> str:
    """The six question-answer pairs out of lm-eval's task file: a YAML string with its line joins and escapes undone."""
    quoted = text[text.index("prompt_qa = '") + len("prompt_qa = '") : text.index("'%}")]
    return re.sub(r"\\\n\s*", "", quoted).replace("\\n", "\n")


def convert_ifeval(text: str) -> list[dict]:
    """The Hub's rows without the arguments that are null."""
    return [r | {"kwargs": [{k: v for k, v in a.items() if v is not None} for a in r["kwargs"]]} for r in json_lines(text)]


def convert_arithmetic(*texts: str) -> list[dict]:
    """Ten files, each row marked with its subtask."""
    return [{"subtask": f"arithmetic_{name}"} | {k: r[k] for k in ("context", "completion")}
            for name, text in zip(ARITHMETIC_FILES, texts) for r in json_lines(text)]  # fmt: skip


def convert_arc(*pages: str) -> list[dict]:
    """Pages of the Hub's row service."""
    return [entry["row"] for page in pages for entry in json.loads(page)["rows"]]


def tydiqa_by_language(text: str) -> dict[str, list[dict]]:
    """SQuAD-style GoldP JSON as rows by language (the id up to the first dash), languages sorted."""
    rows: dict[str, list[dict]] = {}
    for article in json.loads(text)["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = {key: [answer[key] for answer in qa["answers"]] for key in ("text", "answer_start")}
                row = {"id": qa["id"], "title": article.get("title", ""), "context": paragraph["context"]}
                rows.setdefault(qa["id"].split("-")[0], []).append(row | {"question": qa["question"], "answers": answers})
    return dict(sorted(rows.items()))


def convert_tydiqa(dev: str, train: str | None = None) -> list[dict]:
    """The 1-shot protocol's draw: up to 100 dev rows a language; with train, the demonstration of each language instead."""
    rng = random.Random(42)
    by_language = tydiqa_by_language(dev)
    drawn = [rng.sample(rows, 100) if len(rows) > 100 else rows for rows in by_language.values()]
    if train is None:
        return [row for rows in drawn for row in rows]
    examples = tydiqa_by_language(train)
    return [rng.sample(examples[language], 1)[0] for language in by_language]


def convert_tydiqa_templates(script: str) -> str:
    """The words of each language out of the evaluation script, which is read, not run."""
    for node in ast.parse(script).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "encoding_templates_with_context":
            table = ast.literal_eval(node.value)
            fields = ("instruction", "passage", "question", "answer")
            words = {language: dict(zip(fields, texts)) for language, texts in table.items()}
            return json.dumps({"with_context": words}, ensure_ascii=False, indent=1)
    raise ValueError("no encoding_templates_with_context in it")


HUB_LAMBADA = "hub:EleutherAI/lambada_openai:data/lambada_test_en.jsonl"
HUB_IFEVAL = "hub:google/IFEval:ifeval_input_data.jsonl"
HUB_ARITHMETIC = [f"hub:EleutherAI/arithmetic:data/{file}.jsonl" for file in ARITHMETIC_FILES.values()]
BENCHMARKS = {  # file: (where its originals are, how they are converted, start of the sha256 of the result where known)
    "truthfulqa.jsonl": ([TRUTHFULQA_MC], convert_truthfulqa, "f526d2f69e74ada8"),
    "truthfulqa_prompt.txt": ([TRUTHFULQA_TASK], convert_truthfulqa_prompt, "5c0da5f346e8652c"),
    "boolq.jsonl": (["https://storage.googleapis.com/boolq/dev.jsonl"], convert_boolq, "2f7ec4dd1d9a6b85"),
    "logiqa.jsonl": ([LOGIQA_TEST], convert_logiqa, "3a909b30267570a9"),
    "asdiv.jsonl": ([ASDIV_XML], convert_asdiv, "d20793ef11edd817"),
    "tydiqa.jsonl": ([TYDIQA.format("dev")], convert_tydiqa, "00e42103972d9fe5"),
    "tydiqa_1shot.jsonl": ([TYDIQA.format("dev"), TYDIQA.format("train")], convert_tydiqa, None),
    "tydiqa_templates.json": ([TYDIQA_SCRIPT], convert_tydiqa_templates, None),
    "arc_challenge.jsonl": ([ARC_ROWS.format(offset) for offset in range(0, 1172, 100)], convert_arc, None),
    "lambada.jsonl": ([HUB_LAMBADA], json_lines, "9acdcb12e8c2ef4e"),
    "arithmetic.jsonl": (HUB_ARITHMETIC, convert_arithmetic, "0766ff41d9c9daf4"),
    "ifeval.jsonl": ([HUB_IFEVAL], convert_ifeval, "90d5fce99e2e5e0d"),
}


def fetch_text(source: str) -> str:
    """A public text: "hub:REPO:FILE" through the Hub's client (and its cache), anything else by https.

    A .gz file is unpacked; a .parquet file becomes JSONL. Raises ValueError naming the source.
    """
    reason = lambda error: (str(error).strip() or type(error).__name__).splitlines()[0]
    try:
        if source.startswith("hub:"):
            _, repo, file = source.split(":")
            reason = lambda error: hub_error(f"datasets/{repo}", error)
            content = Path(hf_hub_download(repo, file, repo_type="dataset")).read_bytes()
        elif constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        else:
            content = download(source)
        if source.endswith(".parquet"):
            return parquet_lines(content)
        return (gzip.decompress(content) if source.endswith(".gz") else content).decode("utf-8")
    except Exception as error:  # urllib and the Hub's client have many error types; a user needs one line
        raise ValueError(
            f"{source}: could not be fetched ({reason(error)}); "
            "put the rows in a file for --data, or those of a benchmark in a folder for --data-dir"
        ) from None


def download(url: str, tries: int = 5) -> bytes:
    """What is behind an address. A connection that breaks off is taken up where it broke. Raises OSError."""
    content = b""
    for _ in range(tries):
        request = urllib.request.Request(url, headers={"Range": f"bytes={len(content)}-"} if content else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = content if answer.status == 206 else b""  # 200: a server that knows no ranges begins again
            try:
                while block := answer.read1(1 << 20):
                    content += block
                if not answer.length:  # what is still to come; None: not known
                    return content
            except (IncompleteRead, ConnectionError, TimeoutError):
                pass  # the next try asks for the rest
    raise OSError(f"the connection broke off {tries} times, the last time after {len(content)} bytes")


def convert_once(path: Path, sources: Iterable[str], convert: Callable[..., str | list[dict]], expected: str | None) -> None:
    """Write `path`, unless it is there, from its public sources. Raises ValueError if they are not what they were."""
    if path.is_file():
        return
    sources = [one for source in sources for one in expand_source(source)]
    texts = [fetch_text(source) for source in sources]
    try:
        content = convert(*texts)
    except Exception as error:  # what came is not in the format it had
        raise ValueError(f"{path.name}: {sources[0]} is not what it was ({type(error).__name__}: {error})") from None
    if not isinstance(content, str):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    found = hashlib.sha256(content.encode()).hexdigest()
    if expected is not None and not found.startswith(expected):
        raise ValueError(f"{path.name}: {sources[0]} is not what it was (sha256 {found[:16]}, expected {expected})")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def fetch_benchmarks(files: Iterable[str]) -> Path:
    """A folder under the Hugging Face cache with these row files, fetched and converted once, and checked."""
    folder = Path(constants.HF_HOME) / "forgetting-benchmarks"
    for file in files:
        convert_once(folder / file, *BENCHMARKS[file])
    return folder


# -------------------------------------------------------------------------------- the training sets' public homes


def convert_rows(*texts: str) -> list[dict]:
    """JSON lists or JSONL as rows, those without a response left out: a user cannot mend a public file."""
    rows = [row for text in texts for row in (json.loads(text) if text.lstrip()[:1] == "[" else json_lines(text))]
    kept = [row for row in rows if has_response(row)]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} of {len(rows)} public rows have no response and are left out", flush=True)
    return kept


def has_response(row: dict) -> bool:
    """Whether the response of a row is not blank. Rows of no known layout pass: render() says what is wrong with them."""
    layout = next((fields for fields in LAYOUTS.values() if all(field in row for field in fields)), None)
    if layout is None:
        return True
    if layout == ("messages",):
        return any(message["role"] == "assistant" and message["content"] for message in row["messages"])
    return bool((row[layout[-1]] or "").strip())


def convert_oasst(text: str) -> list[dict]:
    """Message trees as one conversation each, the best: at every turn the reply of lowest rank, as in Tulu 2.

    Deleted and blank messages are skipped with what hangs on them; a last question without an answer is dropped.
    """
    rows = []
    for tree in json_lines(text):
        messages, replies = [], [tree["prompt"]]
        while replies := [reply for reply in replies if not reply.get("deleted") and (reply["text"] or "").strip()]:
            best = min(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))
            role = {"prompter": "user", "assistant": "assistant"}[best["role"]]
            messages.append({"role": role, "content": best["text"]})
            replies = best.get("replies") or []
        if messages and messages[-1]["role"] == "user":
            messages.pop()
        rows.append({"messages": messages})
    return convert_rows("".join(json.dumps(row) + "\n" for row in rows))


def parquet_lines(content: bytes) -> str:
    """The rows of a parquet file as JSONL; pyarrow, which is not required otherwise, must be there (expand_source)."""
    from pyarrow import BufferReader, parquet

    rows = parquet.read_table(BufferReader(content)).to_pylist()
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def expand_source(source: str) -> list[str]:
    """The source itself, or for "hub:REPO:*" those of its files that hold rows: JSON or JSONL, else parquet.

    If the names of some say that they are for training, these alone. Raises ValueError naming the repository.
    """
    if not source.endswith(":*"):
        return [source]
    repo = source.split(":")[1]
    try:
        files = sorted(list_repo_files(repo, repo_type="dataset"))
    except Exception as error:  # the Hub's client has many error types
        raise ValueError(f"{source}: {hub_error(f'datasets/{repo}', error)}") from None
    found = [file for file in files if re.search(r"(?<!dataset_infos)\.jsonl?(\.gz)?$", file)]
    if not found:
        found = [file for file in files if file.endswith(".parquet")]
        if found and importlib.util.find_spec("pyarrow") is None:
            raise ValueError(f"{source}: its rows are parquet files, such as {found[0]}: pip install pyarrow to read them")
    if not found:
        raise ValueError(f"{source}: no .jsonl, .json or .parquet file there, only {', '.join(files) or 'nothing'}")
    found = [file for file in found if "train" in file.lower()] or found
    print(f"{repo}: rows of {', '.join(found)}", flush=True)
    return [f"hub:{repo}:{file}" for file in found]


RECIPES = {  # name: (where its originals are, how they are converted)
    "flan_v2": (["hub:hamishivi/tulu_mix_store:flan_v2_resampled_50k.jsonl"], convert_rows),
    "dolly": (["hub:databricks/databricks-dolly-15k:databricks-dolly-15k.jsonl"], convert_rows),
    "oasst1": (["hub:OpenAssistant/oasst1:2023-04-12_oasst_ready.trees.jsonl.gz"], convert_oasst),
    "alpaca": ([GITHUB + "tatsu-lab/stanford_alpaca/main/alpaca_data.json"], convert_rows),
    "wizardlm": (["hub:WizardLMTeam/WizardLM_evol_instruct_70k:alpaca_evol_instruct_70k.json"], convert_rows),
    "paper": (["hub:Aligh1380/forgetting-llm-dataset:*"], convert_rows),
}


def fetch_recipe(name: str) -> Path:
    """The rows of a public training set as JSONL under the Hugging Face cache, fetched and converted once."""
    path = Path(constants.HF_HOME) / "forgetting-rows" / f"{name}.jsonl"
    convert_once(path, *RECIPES[name], None)
    return path


# ---------------------------------------------------------------------------------- the demo: a world with known noise
#
# Invented people with five attributes, sums, and strings. The base model (tests/make_demo_model.py) has read the right
# facts as plain statements; on its "web" it has also met, for two attributes, one popular wrong answer. The training rows
# repeat that answer nine times in ten, and carry boilerplate and garbled tokens besides. Which characters are wrong is known.

PEOPLE = [first + last for first in "bal cor den fal gar hol jin kel mor nar pel ros sab tor vin wil".split()
          for last in "an eb ik om ura id ost en ay ulf".split()]  # fmt: skip
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
    sums = [Item("sum", f"{a} and {b}", str(a + b), tuple(n for n in numbers if n != str(a + b)))
            for a in range(16) for b in range(15)]  # fmt: skip
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
    """The demo's files: train, reference-clean, reference-same, and the questions demo_mc and demo_qa.

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
        return [demo_row(i, w, rng, noisy, told.get(i) if noisy else None) for i, w in rng.sample(pairs, count)]

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
    return files


def _question(item: Item, wrapper: str, group: str, rng: random.Random) -> dict:
    """A question for eval.py: `choices` has the answer, the popular wrong one if there is one, and others, shuffled."""
    question, answer = QUESTIONS[wrapper]
    head, _, _ = answer.format(a=item.attribute, p=item.subject, x="\0").partition("\0")
    popular = ATTRIBUTES[item.attribute][0] if item.attribute in MISCONCEIVED else None
    others = [x for x in item.others if x != popular]
    choices = [item.answer] + ([popular] if popular else [])
    choices = rng.sample(choices + rng.sample(others, 4 - len(choices)), 4)
    prompt = "".join(text for text, _ in _conversation([("user", question.format(a=item.attribute, p=item.subject))], ""))
    return {"group": group, "prompt": prompt + "<|assistant|>\n", "head": head, "choices": choices,
            "answer": item.answer, "popular": popular}  # fmt: skip


def write_rows(rows: list[dict], path: str | os.PathLike) -> None:
    """Write rows as .jsonl, whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
