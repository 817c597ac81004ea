"""Instruction rows -> text with known response characters -> token ids with a response mask -> packs.

    python -c "import data; print(*data.read_rows(['rows.jsonl:5']), sep='\\n')"

    tokenizer = Tokenizer("tests/demo_model")
    corpus = build_corpus(read_rows(["train.jsonl:500"]), tokenizer, max_length=2048)
    for batch in pack(corpus, range(len(corpus)), token_budget=4096): ...

Order: corpus, batches, templates (turns become text), rendering, formats (a row becomes turns), reading
files, tokenizer, ranks, files.

A corpus is flat: the tokens of all examples end to end, `offsets` saying where each begins. Losses, scores
and signs are arrays of the same length, indexed by the token they judge, and a batch carries the places its
tokens came from: to store what a batch yields, or fetch what it needs, is one line whatever the packing.

Shapes: C tokens of the corpus   E examples   T tokens of a batch   B sequences of a batch
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple, Sequence

import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tokenizers import decoders, models, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------- corpus


@dataclass
class Corpus:
    """Tokenised examples, end to end. A token is judged (scored, trained on) where `response` is true."""

    tokens: np.ndarray  # (C,) int32
    response: np.ndarray  # (C,) bool; never the first token of an example, which nothing predicts
    offsets: np.ndarray  # (E+1,) int64
    locations: list[str]  # (E,) file:line of each example
    dropped: int  # rows that max_length left without a response token
    noise: dict[str, np.ndarray] = field(default_factory=dict)  # kind: (C,) bool, tokens known to be noise
    cut: int = 0  # answers that lose their end, or all of it, to max_length
    file_order: np.ndarray | None = None  # (E,) the examples as their files have them, for --step released

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def everything(self) -> np.ndarray:  # (E,) the number of each example
        return np.arange(len(self))

    @cached_property
    def lengths(self) -> np.ndarray:  # (E,), worked out once: a step must not cost what the corpus does
        return np.diff(self.offsets)

    @property
    def noisy(self) -> np.ndarray:
        """(C,) bool: the tokens that are known to be noise of any kind."""
        found = np.zeros(len(self.tokens), bool)
        for known in self.noise.values():
            found |= known
        return found

    def fingerprint(self) -> str:
        """sha256 of tokens, mask and boundaries."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.response, self.offsets):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def part(self, first: int, last: int) -> Corpus:
        """Examples first to last - 1 as a corpus of their own, without copying; the noise stays here."""
        start, end = self.offsets[first], self.offsets[last]
        return Corpus(
            tokens=self.tokens[start:end],
            response=self.response[start:end],
            offsets=self.offsets[first : last + 1] - start,
            locations=self.locations[first:last],
            dropped=0,
        )

    def split(self) -> list[np.ndarray]:
        """The tokens of each example, without copying."""
        if not len(self):
            return []
        return np.split(self.tokens, self.offsets[1:-1])

    def places(self, examples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where the tokens of these examples lie in the flat arrays, in order."""
        places = [np.empty(0, np.int64)]  # so that no examples at all are an array, too
        for example in examples:
            start, end = self.offsets[example], self.offsets[example + 1]
            places.append(np.arange(start, end))
        return np.concatenate(places)


def unique_rows(rows: list[RenderedRow]) -> list[RenderedRow]:
    """The rows without later duplicates, those of equal text and response spans, whatever their formats."""
    first: dict[tuple, RenderedRow] = {}
    for row in rows:
        first.setdefault((row.text, row.spans), row)
    return list(first.values())


def split_rows(
    rows: list[RenderedRow], reference: list[RenderedRow], n_reference: int | None, n_train: int | None
) -> tuple[list[RenderedRow], list[RenderedRow], list[str]]:
    """Rows of D_ref and of D_train, drawn with seed 0 and disjoint; and lines that a user should see.

    Where there are rows in `reference`, D_ref is the first n_reference of them, None: all. Else it is drawn
    from `rows`: None means the paper's 10,000 of 60,000 rows or more, a sixth of fewer. D_train is n_train of
    what is left, None: up to the paper's 50,000. Raises ValueError where a number cannot be had.
    """
    lines = []
    total = len(rows)
    given = total + len(reference)
    rows, reference = unique_rows(rows), unique_rows(reference)
    unique = len(rows)
    if repeated := given - unique - len(reference):
        lines.append(f"{repeated} of {given} rows are exact duplicates, and left out")
    order = np.random.default_rng(0).permutation(unique)
    rows = [rows[i] for i in order]
    if reference:
        reference = _take(reference, "--n-reference", n_reference, len(reference), "duplicates left out")
        rows = unique_rows(reference + rows)[len(reference) :]
        if unique > len(rows):
            shared = f"{unique - len(rows)} of {unique} rows of --data are in D_ref, too"
            lines.append(f"{shared}: they are left out of D_train")
    else:
        usual = 10_000 if unique >= 60_000 else max(unique // 6, 1)
        left_out = "duplicates left out, one row kept for D_train"
        reference = _take(rows[:-1], "--n-reference", n_reference, usual, left_out)
        rows = rows[len(reference) :]
    left_out = f"of {total} rows {total - unique} are exact duplicates, {unique - len(rows)} are in D_ref"
    train = _take(rows, "--n-train", n_train, 50_000, left_out)
    return reference, train, lines


def _take(rows: list[RenderedRow], flag: str, asked: int | None, usual: int, why: str) -> list[RenderedRow]:
    """The first rows: as many as the flag asks for, or up to the usual number. why: there are no more."""
    if not rows:
        raise ValueError(f"D_ref and D_train need a row each: none is left ({why})")
    count = min(usual, len(rows)) if asked is None else asked
    if not 1 <= count <= len(rows):
        raise ValueError(f"{flag} {count}: from 1 to {len(rows)} are there ({why})")
    return rows[:count]


def build_corpus(rows: list[dict], tokenizer: Tokenizer, max_length: int = 2048) -> Corpus:
    """Render and tokenise rows. Raises one ValueError for all that cannot be used."""
    (rendered,), _ = render_rows([rows], tokenizer)
    return encode_rows(rendered, tokenizer, max_length)


def encode_rows(rows: list[RenderedRow], tokenizer: Tokenizer, max_length: int = 2048) -> Corpus:
    """Tokenise rows, cut each to max_length tokens, drop and count those without a response then.

    The mask comes from the character spans of *one* tokenisation of the whole text: a token is a response
    token if it covers any character of a response. Tokenising a prefix apart would miss tokens that merge
    across the border.
    """
    examples: list[Example] = []
    for first in range(0, len(rows), 1000):
        some = rows[first : first + 1000]
        for row, (ids, spans) in zip(some, _encode(some, tokenizer)):
            example = _example(row, ids, spans, max_length)
            if example.response.any():
                examples.append(example)
    if not examples:
        reason = f"no response token within --max-length {max_length}"
        raise ValueError(f"all {len(rows)} rows were dropped: {reason}")
    return _end_to_end(examples, dropped=len(rows) - len(examples))


class Example(NamedTuple):
    """One row of n tokens, at most max_length."""

    tokens: np.ndarray  # (n,) int32
    response: np.ndarray  # (n,) bool
    noise: list[tuple[str, np.ndarray]]  # a kind and its tokens (n,) bool, for each mark of the row
    cut: int  # answers of which tokens are missing
    location: str


def _example(row: RenderedRow, ids: list[int], spans: list[tuple[int, int]], max_length: int) -> Example:
    """Cut a tokenised row to max_length; mark its response and its noise by the tokens' character spans."""
    ends = chain.from_iterable(spans)
    covered = np.fromiter(ends, np.int64, 2 * len(spans)).reshape(-1, 2)  # (m, 2): begin and end
    rest = covered[max_length:]
    covered = covered[:max_length]  # (n, 2)
    response = np.zeros(len(covered), bool)
    cut = 0
    for start, end in row.spans:
        response |= covers(covered, start, end)
        if len(rest):
            cut += int(covers(rest, start, end).any())
    response[:1] = False  # nothing predicts the first token
    noise = []
    for start, end, kind in row.noise:
        marked = covers(covered, start, end)
        noise.append((kind, marked & response))
    tokens = np.array(ids[:max_length], np.int32)
    return Example(tokens, response, noise, cut, row.row.get("_source", ""))


def _end_to_end(examples: list[Example], dropped: int) -> Corpus:
    """The examples as one corpus."""
    offsets = np.zeros(len(examples) + 1, np.int64)
    offsets[1:] = np.cumsum([len(example.tokens) for example in examples])
    corpus = Corpus(
        tokens=np.concatenate([example.tokens for example in examples]),
        response=np.concatenate([example.response for example in examples]),
        offsets=offsets,
        locations=[example.location for example in examples],
        dropped=dropped,
        cut=sum(example.cut for example in examples),
    )
    for example, start in zip(examples, offsets):
        for kind, marked in example.noise:
            if kind not in corpus.noise:
                corpus.noise[kind] = np.zeros(len(corpus.tokens), bool)
            corpus.noise[kind][start : start + len(marked)] |= marked
    return corpus


def _encode(rows: list[RenderedRow], tokenizer: Tokenizer) -> list[tuple[list[int], list]]:
    """(ids, character spans) of each row; a chat template has said itself whether there is a bos."""
    encoded: list[tuple] = [()] * len(rows)
    for templated in (False, True):
        group = [i for i, row in enumerate(rows) if row.templated == templated]
        texts = [rows[i].text for i in group]
        for i, result in zip(group, tokenizer.encode(texts, special=not templated)):
            encoded[i] = result
    return encoded


def covers(spans: np.ndarray, start: int, end: int) -> np.ndarray:
    """Which of the character spans (n, 2) hold a character of [start, end); an empty one, a bos, does not."""
    return (spans[:, 0] < end) & (spans[:, 1] > start) & (spans[:, 1] > spans[:, 0])


# --------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """Whole sequences end to end, without padding."""

    tokens: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B+1,) int32, on the CPU
    places: Tensor  # (T,) int64 index of each token in the corpus' flat arrays


def split_by_tokens(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Places in `lengths`, longest first, in groups of at most token_budget tokens, or one longer sequence.

    Neighbours then have like lengths, and those of equal lengths are attended together.
    """
    packs: list[list[int]] = []
    room = 0
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable: equal ones in order
    for i in longest_first:
        if not packs or lengths[i] > room:
            packs.append([])
            room = token_budget
        packs[-1].append(i)
        room -= lengths[i]
    return packs


def pack(corpus: Corpus, examples: Sequence[int] | np.ndarray, token_budget: int) -> Iterator[Batch]:
    """These examples as batches of at most token_budget tokens; neighbours have like lengths."""
    examples = np.asarray(examples, np.int64)
    lengths = corpus.lengths[examples]
    for group in split_by_tokens(lengths.tolist(), token_budget):
        places = corpus.places(examples[group])  # (T,)
        cu_seqlens = np.zeros(len(group) + 1, np.int32)
        cu_seqlens[1:] = np.cumsum(lengths[group])
        yield Batch(
            tokens=torch.from_numpy(corpus.tokens[places]).long(),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            places=torch.from_numpy(places),
        )


def shift(tokens: Tensor, judged: Tensor) -> tuple[Tensor, Tensor]:
    """The next-token shift: rows (n,) of the states that predict the judged tokens, and those tokens (n,).

    tokens (T,) int64; judged (T,) bool, never true for the first token of a sequence.
    """
    at = judged.nonzero().squeeze(1)  # (n,)
    return at - 1, tokens[at]


# ------------------------------------------------------------------------------------------- templates

Pieces = list[tuple[str, bool]]  # text and whether it is a response, in order


def closed(text: str, eos: str) -> str:
    """The text with an eos at its end; some files have written it already."""
    return text if text.endswith(eos) else text + eos


def tulu(turns: list[Turn], eos: str) -> Pieces:
    """The template of the paper's corpus, a newline between two turns as in the authors' files.

    Contents lose the white space around them, as in open-instruct, which made those files.
    """
    pieces: Pieces = []
    newline = ""
    for role, content, train in turns:
        content = content.strip()
        pieces.append((f"{newline}<|{role}|>\n", False))
        if role == "assistant":
            pieces.append((closed(content, eos), train))
            newline = "\n"
        else:
            pieces.append((content + "\n", False))
            newline = ""
    return pieces


def raw_text(row: Raw, eos: str) -> Pieces:
    """Prompt and response as they are, joined by a space unless one is there."""
    prompt, response = row
    spaced = not prompt or prompt[-1].isspace() or response[0].isspace()
    if not spaced:
        prompt += " "
    return [(prompt, False), (closed(response, eos), True)]


def printed(content: str, text: str, begin: int = 0) -> tuple[int, int] | None:
    """From where to where a content stands in a text that a template wrote, without white space around it.

    begin: where the template may have begun with it; None: it is not there.
    """
    own = content.strip()
    start = text.find(own, begin)
    return None if start < 0 else (start, start + len(own))


def read_chat_template(folder: Path, settings: dict) -> str | None:
    """The text of a checkpoint's chat template: chat_template.jinja, else what tokenizer_config.json has."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each with its name
        defaults = [some["template"] for some in template if some.get("name") == "default"]
        template = defaults[0] if defaults else None
    return template if isinstance(template, str) else None


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, with which some templates mark the answer: what is inside."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class ModelTemplate:
    """A checkpoint's own chat template, rendered with what transformers gives it.

    source: a jinja template, run in a sandbox; tokens: bos_token, eos_token and so on; now: the date that
    it may write, the same for all rows. Raises ValueError for a template that is not valid.
    """

    def __init__(self, source: str, tokens: dict[str, str], where: str, now: datetime | None = None):
        sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
        )
        sandbox.filters["tojson"] = _to_json
        sandbox.globals["raise_exception"] = _raise_exception
        sandbox.globals["strftime_now"] = (now or datetime.now()).strftime
        # a row must be the same when a run goes on tomorrow: nothing is drawn at random
        del sandbox.filters["random"], sandbox.globals["lipsum"]
        try:
            self.compiled = sandbox.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{where} is not valid ({error})") from None
        self.tokens = tokens

    def text(self, turns: list[Turn], ask: bool = False) -> str:
        """The turns as text; ask: and the beginning of an answer."""
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self.compiled.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=ask,
                **self.tokens,
            )
        except Exception as error:  # a template is a program: what it may raise is not known
            reason = " ".join(str(error).split())
            raise RowError(f"the chat template does not take it ({reason})") from None

    def pieces(self, turns: list[Turn]) -> Pieces:
        """A response is what a turn that is trained on adds to the text that asks for it, see _answer.

        Raises RowError for templates that write earlier turns anew: then this text is not the model's.
        """
        if not self.prints_answers:
            raise RowError("the chat template does not write the answer as it is", ALTERNATIVE)
        pieces: Pieces = []
        done = ""
        for i, turn in enumerate(turns):
            if not turn.train:
                continue
            asked = self.text(turns[:i], ask=True)
            answered = self.text(turns[: i + 1])
            pieces.append((_added(done, asked, REWRITTEN), False))
            pieces += _answer(_added(asked, answered, NOT_AS_ASKED), turn.content)
            done = answered
        if not turns[-1].train:
            rest = _added(done, self.text(turns), REWRITTEN)
            pieces.append((rest, False))
        return pieces

    @cached_property
    def prints_answers(self) -> bool:
        """Whether an answer's text is written at all: some templates write lists of parts only."""
        letter = "\ue000"  # of private use: no template writes it by itself
        turns = [Turn("user", "-", False), Turn("assistant", letter, True)]
        try:
            return letter in self.text(turns)
        except RowError:
            return True  # what it does not take, the rows say

    def before_answer(self, turns: list[Turn]) -> int:
        """How many characters the template writes between the question and the content of the last turn."""
        letter = "\ue000"  # of private use: no template writes it by itself
        asked = self.text(turns[:-1], ask=True)
        answered = self.text([*turns[:-1], turns[-1]._replace(content=letter)])
        return max(answered.find(letter) - len(asked), 0)


# what a template may do that makes its text another than what the model sees when it is asked
REWRITTEN = (
    "the chat template writes earlier turns anew: make a row of each answer, with weight 0 on the answers "
    "before it"
)
NOT_AS_ASKED = (
    "the chat template does not go on from how it asks for an answer: write prompt and completion as the "
    "model is to see them"
)


def _answer(text: str, content: str) -> Pieces:
    """What a template writes for an answer: it is judged up to its end of turn.

    The line break that most templates write behind that is never generated. Raises RowError if the content
    is not in it.
    """
    place = printed(content, text)
    if place is None:
        raise RowError("the chat template does not write the answer as it is", ALTERNATIVE)
    _, end = place
    if text[end:].strip():  # where nothing else ends the turn, white space does
        end = len(text.rstrip())
    else:
        end = len(text)
    pieces = [(text[:end], True)]
    if text[end:]:
        pieces.append((text[end:], False))
    return pieces


ALTERNATIVE = " (or --template tulu)"


def _added(before: str, text: str, reason: str) -> str:
    """What a text has more than the one before. Raises RowError, with a reason, if it begins otherwise."""
    if not text.startswith(before):
        raise RowError(reason, ALTERNATIVE)
    return text[len(before) :]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter tojson: plain JSON, where jinja's own escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


# ------------------------------------------------------------------------------------------- rendering


@dataclass
class RenderedRow:
    """A row as text; spans are those of its responses, noise is what is known in them, in characters."""

    row: dict
    text: str
    spans: tuple[tuple[int, int], ...]
    noise: list[tuple[int, int, str]]  # from, to, kind
    raw: bool  # text that took no template
    templated: bool  # by the model's chat template, which writes the special tokens itself


def render(row: dict, eos: str, template: ModelTemplate | None = None) -> Pieces:
    """A row of any known format as pieces of text; the responses, with their end of turn, are marked True.

    Conversations take the template, Tulu's where it is None; prompt + completion and prompt + response are
    taken as they are, joined by a space unless one is there. Raises ValueError naming the row.
    """
    try:
        return _pieces(read_row(row, eos, set()), eos, template)
    except RowError as error:
        error.where = row.get("_source", "row")
        raise


def _pieces(found: Raw | list[Turn], eos: str, template: ModelTemplate | None) -> Pieces:
    if isinstance(found, Raw):
        return raw_text(found, eos)
    return tulu(found, eos) if template is None else template.pieces(found)


def render_rows(
    groups: Sequence[list[dict]], tokenizer: Tokenizer, skip_bad: bool = False
) -> tuple[list[list[RenderedRow]], list[str]]:
    """The rows of each group as text, and lines that a user should see.

    Raises one ValueError for all rows that cannot be used; with skip_bad they are left out, and counted.
    """
    rendered: list[list[RenderedRow]] = []
    errors: list[RowError] = []
    unused: set[str] = set()
    for rows in groups:
        rendered.append([])
        for row in rows:
            try:
                rendered[-1].append(_render_row(row, tokenizer, unused))
            except RowError as error:
                error.where = row.get("_source", "row")
                errors.append(error)
    total = sum(map(len, groups))
    if not skip_bad or len(errors) == total:
        refuse(errors, total)
    lines = []
    if errors:
        lines.append(f"{len(errors)} of {total} rows are left out (--skip-bad-rows): {by_reason(errors)}")
    if unused:
        lines.append(f"fields not used: {', '.join(sorted(unused))}")
    raw = [row.row for group in rendered for row in group if row.raw]
    if 0 < len(raw) < total - len(errors):
        names = {" + ".join(format_of(row, present(row))) for row in raw}
        formats = " and ".join(sorted(names))
        lines.append(f"{len(raw)} of {total} rows are raw text without turn markers ({formats})")
    return rendered, lines


def _render_row(row: dict, tokenizer: Tokenizer, unused: set[str]) -> RenderedRow:
    found = read_row(row, tokenizer.eos, unused)
    pieces = _pieces(found, tokenizer.eos, tokenizer.template)
    spans: list[tuple[int, int]] = []
    end = 0
    for text, is_response in pieces:
        start, end = end, end + len(text)
        if is_response and text:
            if spans and spans[-1][1] == start:  # goes on where the one before ends
                start = spans.pop()[0]
            spans.append((start, end))
    raw = isinstance(found, Raw)
    noise = []
    if marks := noise_of(row):
        noise = _noise_spans(marks, _last_answer(found, tokenizer.template), pieces)
        if len(noise) < len(marks):
            unused.add("marks of noise that are not in the response")
    return RenderedRow(
        row=row,
        text="".join(text for text, _ in pieces),
        spans=tuple(spans),
        noise=noise,
        raw=raw,
        templated=not raw and tokenizer.template is not None,
    )


def noise_of(row: dict) -> list[list]:
    """The field `noise` of a row, [start, end, kind] each; [] where it is absent, or means something else."""
    marks = row.get("noise")
    if not isinstance(marks, list):
        return []
    for mark in marks:
        if not isinstance(mark, list) or [type(value) for value in mark] != [int, int, str]:
            return []
    return marks


def _last_answer(found: Raw | list[Turn], template: ModelTemplate | None) -> tuple[str, int]:
    """The last response as the row has it, and how many characters a template writes in front of it."""
    if isinstance(found, Raw):
        return found.response, 0
    last = max(i for i, turn in enumerate(found) if turn.train)
    turns = found[: last + 1]
    before = 0 if template is None else template.before_answer(turns)
    return turns[-1].content, before


def _noise_spans(marks: list[list], answer: tuple[str, int], pieces: Pieces) -> list[tuple[int, int, str]]:
    """Where marks, which count in characters of the answer, lie in the row's text; without those that do not.

    Of white space around an answer a template may write less, or nothing.
    """
    content, before = answer
    written, length = [], 0
    for text, is_response in pieces:
        if is_response and text:
            written.append((length, text))
        length += len(text)
    offset, text = written[-1]
    place = printed(content, text, before)
    if place is None:
        return []
    first, last = place
    zero = first - len(content) + len(content.lstrip())  # where the content begins, or would
    if zero >= 0 and text.startswith(content, zero):
        first, last = zero, zero + len(content)
    spans = []
    for start, end, kind in marks:
        start = max(zero + start, first)
        end = min(zero + end, last)
        if start < end:
            spans.append((offset + start, offset + end, kind))
    return spans


def asked_in(pieces: Pieces) -> str:
    """The text up to the first response."""
    text = ""
    for piece, is_response in pieces:
        if is_response:
            break
        text += piece
    return text


def question_ids(question: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a question in the template, up to where the answer begins."""
    pieces = render({"instruction": question, "output": "-"}, tokenizer.eos, tokenizer.template)
    ((ids, _),) = tokenizer.encode([asked_in(pieces)], special=tokenizer.template is None)
    return ids


# --------------------------------------------------------------------------------------------- formats


class Turn(NamedTuple):
    """What one speaker says: system, user or assistant."""

    role: str
    content: str
    train: bool  # its tokens are judged: scored and trained on


class Raw(NamedTuple):
    """A prompt and a response that are text already: no template, no speakers."""

    prompt: str
    response: str


# What no template here renders, by the words that its fields have in their names. Such a field is refused
# unless it is absent, false or 0.
UNRENDERED = {
    "tool use": "tool tools function functions toolcalls plugin plugins observation observations",
    "media": "image images picture pictures video videos audio audios media pixel attachment attachments",
    "reasoning apart from the answer": "reasoning thinking thought thoughts rationale scratchpad cot",
    "one of two answers: keep the better one": "chosen rejected preferred dispreferred winner loser negative",
    "a mask made elsewhere": "mask masks labels",
}
# names that end so describe the row: image_id, question_type
DESCRIPTIONS = ("id", "ids", "idx", "index", "type", "source", "score", "count", "length", "language", "lang")
# fields that hold text of a prompt or a response, in one format or another
TEXTS = (
    "prompt",
    "completion",
    "response",
    "instruction",
    "input",
    "context",
    "output",
    "inputs",
    "targets",
    "messages",
    "conversations",
    "system",
    "system_prompt",
    "system_message",
    "history",
    "question",
    "query",
    "answer",
    "document",
    "documents",
    "passage",
    "passages",
    "suffix",
)
# of a turn or a row: 0 and false say that it is not trained on
TRAIN = ("weight", "train", "trainable", "training", "loss", "loss_mask", "loss_weight", "train_on_turn")
SYSTEM = ("system", "system_prompt", "system_message")  # names of one thing
STRUCTURED = ("messages", "conversations", "history", "noise")  # fields that are no text
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
BAD_ANSWER = ("label", "kto_tag")  # 0 and false mark a bad answer (KTO)
# these say nothing of the text, and pass; what nobody knows passes, too, and is said once
HARMLESS = frozenset(
    """
    author categories category conversation_hash created created_at date dataset dataset_name difficulty
    domain generator hash id is_classification lang language length license meta metadata model model_name
    name noise num_tokens num_turns origin quality rating score scores source sources split subset subtask
    tag tags task task_name template template_name timestamp topic type uid url uuid version
""".split()
)


@cache
def meaning_of(name: str) -> str | None:
    """What a field of this name holds, if it is something that cannot be rendered."""
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().split("_")
    if words[-1] in DESCRIPTIONS:
        return None
    for meaning, names in UNRENDERED.items():
        if set(words) & set(names.split()):
            return meaning
    return None


# all that shows nothing: white space, controls, what has no width, and letters that are drawn as a blank
VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    r"\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]"
)


def is_blank(text: str) -> bool:
    """Whether a text has no character that can be seen."""
    return VISIBLE.search(text) is None


def is_null(value: Any) -> bool:
    """null, or NaN, as pandas writes it."""
    return value is None or value != value


def says_nothing(value: Any) -> bool:
    """null, NaN, a blank text, and lists and objects of nothing else."""
    if isinstance(value, str):
        return is_blank(value)
    if isinstance(value, list | tuple):
        return all(says_nothing(part) for part in value)
    if isinstance(value, dict):
        return all(says_nothing(part) for part in value.values())
    return is_null(value)


def is_empty_json(name: str, value: Any) -> bool:
    """Whether a field that may hold JSON as text, as TRL prefers for tools, holds nothing: "[]", "null"."""
    if not isinstance(value, str) or not (name in STRUCTURED or meaning_of(name)):
        return False
    try:
        content = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return not content or says_nothing(content)


def present(fields: dict) -> dict:
    """The fields that say something; "_source" is our own."""
    found = {}
    for name, value in fields.items():
        if name != "_source" and not says_nothing(value) and not is_empty_json(name, value):
            found[name] = value
    return found


def take_text(fields: dict, name: str) -> str:
    """Take a field that must be a text out of the fields; "" where it is absent."""
    value = fields.pop(name, "")
    if not isinstance(value, str):
        raise RowError(f"{name} must be a string", f", not {type(value).__name__}")
    return value


def take_one(fields: dict, *names: str) -> str:
    """Take the text of the fields of one meaning, of which a row has one, or equal ones."""
    there = [name for name in names if name in fields]
    found = [take_text(fields, name) for name in there]
    if len({text.strip() for text in found}) > 1:
        raise RowError(f"{' and '.join(there)} are both there: one of them is needed")
    return found[0] if found else ""


def take_train(fields: dict) -> bool:
    """Whether no field says that a turn, or a row, is not to be trained on."""
    train = True
    for name in ("masked", *TRAIN):
        if name not in fields:
            continue
        value = fields.pop(name)
        if value not in (0, 1):  # False and True are equal to these
            raise RowError(f"{name} can only be 0, 1, false or true", f", not {value!r}")
        says_train = bool(value) != (name == "masked")
        train = train and says_train
    return train


def check_rest(fields: dict, unused: set[str], said: Sequence = (), owner: str = "") -> None:
    """Judge the fields that no format has taken: refused, harmless, or put into `unused`.

    What is said elsewhere in the row, such as a prompt beside messages, is a copy.
    """
    mend = "write it into the text, or take the field out"
    for name, value in fields.items():
        if said and is_copy(value, said):
            continue
        meaning = meaning_of(name)
        if value and meaning:
            raise RowError(f"{owner}{name} cannot be rendered ({meaning}): {mend}")
        if name in TEXTS:
            raise RowError(f"{owner}{name} has no place in this format: {mend}")
        if name in BAD_ANSWER and value in (0, 1):
            if not value:
                raise RowError(f"{owner}{name} {value!r} marks a bad answer: leave such rows out")
        elif name not in HARMLESS and name.rpartition("_")[2] not in DESCRIPTIONS:
            unused.add(owner + name)


def is_copy(value: Any, said: Sequence) -> bool:
    """Whether a field is one of the texts of a row, or some of its turns, as messages."""
    if isinstance(value, str):
        return value.strip() in said
    if not isinstance(value, list):
        return False
    try:
        turns = [as_said(read_message(message, set())) for message in value]
    except RowError:
        return False
    return any(list(said[i : i + len(turns)]) == turns for i in range(len(said)))


def as_said(turn: Turn) -> tuple[str, str]:
    """What makes two turns the same: who speaks, and the text without white space around it."""
    return turn.role, turn.content.strip()


def read_message(message: Any, unused: set[str]) -> Turn:
    """A message of OpenAI's (role, content) or ShareGPT's (from, value) format."""
    fields = present(message) if isinstance(message, dict) else {}
    names = [take_text(fields, name) for name in ("role", "from") if name in fields]
    roles = {ROLES.get(name, name) for name in names}
    if not roles or not {"content", "value"} & message.keys():
        raise RowError("a message must be an object with role and content, or from and value")
    if len(roles) > 1:
        raise RowError("role and from are both there: one of them is needed")
    (role,) = roles
    if role not in ("system", "user", "assistant"):
        raise RowError(f"role {role!r} is not allowed: system, user, assistant")
    content = read_content(message, unused)
    for name in ("content", "value"):
        fields.pop(name, None)
    flags = [flag for flag in TRAIN if flag in fields]
    train = take_train(fields)
    if flags and train and role != "assistant":
        unused.add(f"a message's {flags[0]}, where it is not the assistant's")
    if "name" in fields:
        raise RowError("a speaker's name cannot be rendered: write it into the content, or take it out")
    check_rest(fields, unused, owner="a message's ")
    return Turn(role, content, train and role == "assistant")


def read_content(message: dict, unused: set[str]) -> str:
    """The text of a message; its white space is kept, as that of its parts."""
    given = [message[name] for name in ("content", "value") if not is_null(message.get(name))]
    if len(given) > 1 and given[0] != given[1]:
        raise RowError("content and value are both there: one of them is needed")
    content = given[0] if given else ""
    if isinstance(content, list):
        content = "".join(read_part(part, unused) for part in content)
    if not isinstance(content, str):
        kind = type(content).__name__
        raise RowError("the content of a message must be a string, or a list of text parts", f", not {kind}")
    return content


def read_part(part: Any, unused: set[str]) -> str:
    """The text of a part of a content: {"type": "text", "text": ...}, in some files with "value"."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise RowError(f"a part of a content must be of type text, not {kind}")
    texts = [part[name] for name in ("text", "value") if not is_null(part.get(name))]
    if not {"text", "value"} & part.keys() or not all(isinstance(text, str) for text in texts):
        raise RowError("a part of type text must have a text")
    if len(texts) > 1 and texts[0] != texts[1]:
        raise RowError("text and value are both there: one of them is needed")
    fields = present(part)
    for name in ("type", "text", "value"):
        fields.pop(name, None)
    check_rest(fields, unused, owner="a part's ")
    return texts[0] if texts else ""


def read_messages(messages: Any, name: str, unused: set[str]) -> list[Turn]:
    """The turns in a list of messages."""
    if not isinstance(messages, list):
        raise RowError(f"{name} must be a list of messages", f", not {type(messages).__name__}")
    return [read_message(message, unused) for message in messages]


def read_history(history: Any, unused: set[str]) -> list[Turn]:
    """Earlier turns: pairs of a question and its answer (trained on, too), or messages."""
    turns = []
    for entry in history if isinstance(history, list) else [history]:
        if isinstance(entry, dict):
            turns.append(read_message(entry, unused))
        elif is_pair(entry):
            question, answer = ["" if is_null(text) else text for text in entry]
            turns.append(Turn("user", question, train=False))
            turns.append(Turn("assistant", answer, train=True))
        else:
            raise RowError("history must be a list of messages, or of pairs of a question and an answer")
    return turns


def is_pair(entry: Any) -> bool:
    """Whether an entry of a history is a list of two texts, which may be null."""
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    return all(isinstance(text, str) or is_null(text) for text in entry)


def conversation(fields: dict, unused: set[str], name: str) -> list[Turn]:
    """messages, conversations: the turns as they are."""
    return read_messages(fields.pop(name), name, unused)


def text_pair(fields: dict, unused: set[str], prompt: str, response: str) -> Raw | list[Turn]:
    """prompt + completion, prompt + response: text as it is, or TRL's two lists of messages.

    Beside a system prompt or a history the two texts are two more turns.
    """
    asked, answered = fields.get(prompt), fields.get(response)
    if isinstance(asked, list) or isinstance(answered, list):
        turns = read_messages(fields.pop(prompt, []), prompt, unused)
        turns = [turn._replace(train=False) for turn in turns]
        turns += read_messages(fields.pop(response), response, unused)
        return turns
    if "history" in fields or any(name in fields for name in SYSTEM):
        return instruction(fields, unused, prompt, response)
    question = take_question(fields, prompt)
    answer = take_text(fields, response)
    return Raw(question, answer)


def instruction(fields: dict, unused: set[str], prompt: str, response: str) -> list[Turn]:
    """instruction (+ input or context) + output or response, inputs + targets: one question, one answer."""
    question = take_question(fields, prompt)
    answer = take_text(fields, response)
    return [Turn("user", question, train=False), Turn("assistant", answer, train=True)]


def take_question(fields: dict, prompt: str) -> str:
    """Take the prompt and what it is about, input or context, as one text."""
    texts = take_text(fields, prompt), take_one(fields, "input", "context")
    return "\n\n".join(text for text in texts if text)


FORMATS = {  # the fields that must be there, the last one the response: the function that reads them
    ("messages",): conversation,
    ("conversations",): conversation,
    ("prompt", "completion"): text_pair,
    ("prompt", "response"): text_pair,
    ("instruction", "output"): instruction,
    ("instruction", "response"): instruction,
    ("inputs", "targets"): instruction,
}


def format_of(row: dict, fields: dict) -> tuple[str, ...]:
    """The format of a row, a key of FORMATS; fields: those that say something.

    Raises RowError where there is none, or no response.
    """
    for names in FORMATS:
        if fields.keys() >= set(names):
            return names
    for names in FORMATS:  # a prompt may be blank, where its response is a text on its own
        if names[-1] in fields and names[0] in row:
            return names
    for name in fields:
        if meaning := meaning_of(name):
            raise RowError(f"{name} cannot be rendered ({meaning}); no known format beside it")
    unanswered = [names for names in FORMATS if names[-1] in row and fields.keys() >= set(names[:-1])]
    if unanswered:
        longest = max(unanswered, key=len)
        raise NoResponse(f"{longest[-1]} is empty")
    found = ", ".join(sorted(fields)) or "none"
    alone = ": which part is the response? prompt and completion say it" if list(fields) == ["text"] else ""
    known = "; ".join(" + ".join(names) for names in FORMATS)
    raise RowError(f"unknown format, fields found: {found}{alone}; known: {known}")


def read_row(row: dict, eos: str, unused: set[str]) -> Raw | list[Turn]:
    """The turns of a row, or its raw text; the names of fields that are not used go into `unused`.

    Of what has no text of its own, as an eos alone, nothing is trained on.
    """
    if isinstance(row.get("_bad"), RowError):
        raise row["_bad"]
    fields = present(row)
    names = format_of(row, fields)
    if not take_train(fields):
        raise RowError("its weight says that the row is not to be learned: leave such rows out")
    given = dict(fields)
    found = FORMATS[names](fields, unused, *names)
    if isinstance(found, list):
        found = with_earlier(found, fields, unused)
        found = check_turns(found, eos)
    elif is_blank(found.response.removesuffix(eos)):
        raise NoResponse(f"{names[-1]} has no text but the eos")
    if "noise" in fields and not noise_of(row):
        unused.add("noise, which is not [[start, end, kind], ...]")
    if fields:
        check_rest(fields, unused, what_is_said(found, given, fields))
    return found


def what_is_said(found: Raw | list[Turn], given: dict, rest: dict) -> list:
    """Of a row the turns, as (role, text), and all texts, those of the fields that were taken included."""
    texts = list(found)
    said: list = []
    if not isinstance(found, Raw):
        said = [as_said(turn) for turn in found]
        texts = [turn.content for turn in found]
    for name, value in given.items():
        if name not in rest and isinstance(value, str):
            texts.append(value)
    return said + [text.strip() for text in texts]


def with_earlier(turns: list[Turn], fields: dict, unused: set[str]) -> list[Turn]:
    """The turns behind the row's system prompt and history, where these do not say what the turns say."""
    earlier = read_history(fields.pop("history", []), unused)
    spoken = [as_said(turn) for turn in turns if turn.role != "system"]
    begun = spoken[: len(earlier)]
    if [as_said(turn) for turn in earlier] != begun or len(begun) == len(spoken):
        turns = earlier + turns
    system = Turn("system", take_one(fields, *SYSTEM), train=False)
    if not system.content or (turns and as_said(turns[0]) == as_said(system)):
        return turns
    return [system, *turns]


def check_turns(turns: list[Turn], eos: str) -> list[Turn]:
    """The turns, those without text of their own not trained on.

    Raises RowError unless there is at most one system turn, in front, then user and assistant in turn.
    """
    roles = [turn.role for turn in turns]
    if roles[:1] == ["system"]:
        del roles[0]
    alternating = ["user", "assistant"] * len(roles)
    if roles != alternating[: len(roles)]:
        order = ", ".join(roles)
        raise RowError("user and assistant must take turns, starting with user", f", not {order}")
    answers = 0
    checked = []
    for turn in turns:
        if turn.role == "assistant":
            has_text = not is_blank(turn.content.removesuffix(eos))
            answers += has_text
            turn = turn._replace(train=turn.train and has_text)
        checked.append(turn)
    if not answers:
        raise NoResponse("no assistant message with text")
    if not any(turn.train for turn in checked):
        raise NoResponse("no assistant message is to be learned")
    return checked


# -------------------------------------------------------------------------------------- reading files

HALF_CHARACTER = re.compile("[\ud800-\udfff]")

PANDAS = "python -c \"import pandas; pandas.read_{}.to_json('rows.jsonl', orient='records', lines=True)\""
CONVERTERS = {  # what turns a file of another kind into one that is read
    ".csv": PANDAS.format("csv('{0}')"),
    ".tsv": PANDAS.format("csv('{0}', sep='\\t')"),
    ".xlsx": PANDAS.format("excel('{0}')"),
    ".feather": PANDAS.format("feather('{0}')"),
    ".parquet": "pip install pyarrow, and it is read as it is",
    ".arrow": "python -c \"import datasets; datasets.Dataset.from_file('{0}').to_json('rows.jsonl')\"",
    ".zst": "unzstd {0}",
    ".zip": "unzip {0}",
    ".bz2": "bunzip2 {0}",
    ".xz": "unxz {0}",
}


class RowError(ValueError):
    """What is wrong with one row: a reason that many rows may share, and what is particular to this one."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail, self.where = reason, detail, "row"

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}{self.detail}"


class NoResponse(RowError):
    """A row of a known format that has nothing to learn."""


def read_rows(files: Iterable[str], keep_bad: bool = False) -> list[dict]:
    """The rows of .jsonl, .json and .parquet files, each `path` or `path:count` (the first count rows).

    Every row gets a field "_source" (file:line) for messages. Raises ValueError naming the file, and all
    lines that are no rows; with keep_bad these are rows with a RowError in "_bad", for render_rows to report.
    """
    rows: list[dict] = []
    for entry in files:
        if HALF_CHARACTER.search(entry):  # how Python writes a byte that is not UTF-8: no file could keep it
            raise ValueError(f"{ascii(entry)}: a file name that is not UTF-8: rename it")
        path, _, count = entry.rpartition(":")
        path, count = (path, count) if count.isdecimal() else (entry, "")
        read = _parse(Path(path), _content_of(Path(path)))
        if not read:
            raise ValueError(f"{path}: no rows in it")
        if count and not 1 <= int(count) <= len(read):
            raise ValueError(f"{path}: {count} rows asked for, 1 to {len(read)} are there")
        rows += read[: int(count)] if count else read
    if not keep_bad:
        refuse([row["_bad"] for row in rows if isinstance(row.get("_bad"), RowError)], len(rows))
    return rows


def _kind_of(path: Path) -> str:
    """The suffix that says what is in a file, in small letters and without .gz."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _content_of(path: Path) -> str | list:
    """The text of a file, or the rows of a table. Raises ValueError saying how to convert other files."""
    kind = _kind_of(path)
    if kind == ".gguf":
        raise ValueError(f"{path}: GGUF, a model, not rows; transformers converts it (gguf_file=)")
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {what} (public sets: ./run.sh get_data --help)")
    if kind == ".parquet" and path.suffix.lower() == kind:
        with suppress(ImportError):
            return _read_parquet(path)
    if kind not in (".jsonl", ".json", ""):
        convert = CONVERTERS.get(kind, f"mv {{0}} {path.stem}.jsonl, if it holds a JSON object a line")
        raise ValueError(f"{path}: {kind} is not read, only .jsonl, .json, .parquet: {convert.format(path)}")
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")  # some editors put a byte-order mark first
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from None


def _read_parquet(path: Path) -> list[dict | RowError]:
    """The rows of a table, as the same rows in .jsonl would be read.

    Raises ImportError where pyarrow, which is no requirement, is not installed.
    """
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        rows = table.to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({error})") from None
    if not hasattr(pyarrow, "json_") and "arrow.json" in table.schema.to_string():
        raise ValueError(f"{path}: its columns of JSON need pyarrow 19, this is {pyarrow.__version__}")
    of_json = [column for column in table.schema if "arrow.json" in str(column.type)]
    return [_with_decoded(row, of_json) for row in rows]


def _with_decoded(row: dict, columns: list) -> dict | RowError:
    """A row with what the texts in its columns of JSON say; a RowError where one is not valid."""
    for column in columns:
        try:
            row[column.name] = _decoded(row[column.name], column.type)
        except (ValueError, RecursionError) as error:
            return RowError(f"column {column.name}: not valid JSON", f" ({error})")
    return row


def _decoded(value: Any, kind: Any) -> Any:
    """A value of an Arrow type: what is JSON text in it, at any depth, as what that text says."""
    if value is None:
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads(value)
    if isinstance(value, dict):  # a struct
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_decoded(element, kind.value_type) for element in value]
    return value


def _parse(path: Path, content: str | list) -> list[dict]:
    """The rows of one file's content; a value that is no row becomes one with a RowError in "_bad"."""
    # only an escape can write half a character: UTF-8 has no bytes for it
    may_be_half = not isinstance(content, str) or "\\ud" in content or "\\uD" in content
    rows = []
    for number, row in _numbered_values(path, content):
        location = f"{path}:{number}"
        error = row if isinstance(row, RowError) else _fault_of(row, may_be_half)
        if error is not None:
            error.where = location
            row = {"_bad": error}
        rows.append(row | {"_source": location})
    return rows


def _fault_of(row: Any, may_be_half: bool) -> RowError | None:
    """What makes a value no row, if anything does."""
    if not isinstance(row, dict):
        return RowError("a row must be an object", f", not {type(row).__name__}")
    if may_be_half and (found := HALF_CHARACTER.search(json.dumps(row, ensure_ascii=False, default=str))):
        return RowError(f"\\u{ord(found[0]):04x} alone is half a character (of a UTF-16 pair)")
    return None


def _numbered_values(path: Path, content: str | list) -> Iterable[tuple[int, Any]]:
    """The lines that are not empty, or the elements of a list, with their numbers."""
    if isinstance(content, list):
        return enumerate(content, 1)
    if _kind_of(path) == ".json":
        return _values_of_json(path, content)
    return _values_of_lines(content)


def _values_of_lines(text: str) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line; a RowError where it is not valid JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, RowError("not valid JSON", f" ({error})")


def _values_of_json(path: Path, text: str) -> Iterable[tuple[int, Any]]:
    """What a .json file holds: a list of rows, an object with one under `data`, or lines after all."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        first_line = text.lstrip().partition("\n")[0]
        with suppress(ValueError, RecursionError):
            if isinstance(json.loads(first_line), dict):
                return _values_of_lines(text)
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if isinstance(whole, dict):
        lists = [key for key, value in whole.items() if isinstance(value, list | dict)]
        whole = whole["data"] if lists == ["data"] else whole
    if not isinstance(whole, list):
        raise ValueError(
            f"{path}: a list of rows is expected, or an object with one under `data` alone, "
            f"not {type(whole).__name__}"
        )
    return enumerate(whole, 1)


def refuse(errors: Sequence[RowError], total: int) -> None:
    """Raise ValueError for all errors, if any: the first ten, and how many there are of each kind."""
    if not errors:
        return
    if len(errors) == 1:
        raise ValueError(str(errors[0]))
    shown = "".join(f"\n  {error}" for error in errors[:10])
    more = f"\n  and {len(errors) - 10} more" if len(errors) > 10 else ""
    heading = f"{len(errors)} of {total} rows cannot be used:"
    raise ValueError(f"{heading}{shown}{more}\n  in all: {by_reason(errors)}")


def by_reason(errors: Sequence[RowError]) -> str:
    """How many errors there are of each kind, the most frequent first."""
    counts = Counter(error.reason for error in errors)
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common())


# ------------------------------------------------------------------------------------------- tokenizer


SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of a checkpoint folder: its tokens, and what the folder's config files say about them.

    template: how conversations become text, "tulu" or "model" (the checkpoint's own chat template);
    now: the date that a chat template may write, today's where it is None.
    Raises ValueError naming the file for what cannot be read, and for a template that is not there.
    """

    def __init__(self, folder: str | os.PathLike, template: str = "tulu", now: datetime | None = None):
        folder = Path(folder)
        settings = tokenizer_settings(folder)
        self.raw = _read_tokenizer(folder, settings)
        _add_tokens(self.raw, settings, folder)
        self.raw.no_truncation()
        self.raw.no_padding()
        configs = [_object(folder / name) for name in ("config.json", "generation_config.json")]
        self.bos, self.bos_id = self._special(settings, "bos_token", configs, folder)
        eos, eos_id = self._special(settings, "eos_token", configs, folder)
        if eos is None or eos_id is None:
            raise ValueError(f"{folder}: neither tokenizer_config.json nor config.json names an eos token")
        self.eos, self.eos_id = eos, eos_id
        self.start_id = self.eos_id if self.bos_id is None else self.bos_id  # for want of any other context
        of_model, of_generation = (_token_ids(config, "eos_token", folder) for config in configs)
        self.model_eos_ids = of_generation or of_model
        if self.raw.encode(self.eos, add_special_tokens=False).ids != [self.eos_id]:
            raise ValueError(f"{folder}: the eos token {self.eos!r} is not encoded as one token")
        # of tokenizer.json it is the processor that says so, whatever the settings say
        is_pair = not (folder / "tokenizer.json").is_file()
        if is_pair and self.bos is not None and settings.get("add_bos_token"):
            self._put_bos()
        self.chat_template = read_chat_template(folder, settings)
        self.template = None if template == "tulu" else self._model_template(settings, folder, now)

    @property
    def stop_ids(self) -> set[int]:
        """The ids that end a generation: an instruct model ends a turn with one and a text with another."""
        return {self.eos_id, *self.model_eos_ids}

    def _special(
        self, settings: dict, name: str, configs: list[dict], folder: Path
    ) -> tuple[str | None, int | None]:
        """Text and id of a special token: the tokenizer's files come first, then the model's configs."""
        text = _content(settings.get(name), name)
        if name == "bos_token" and text is None and name in settings:
            return None, None  # null says that there is none, whatever the model's config says
        if text is None:
            ids: list[int] = []
            for config in configs:
                ids += _token_ids(config, name, folder)
            text = self.raw.id_to_token(ids[0]) if ids else None
        token = None if text is None else self.raw.token_to_id(text)
        return text, token

    def _put_bos(self) -> None:
        """Let each text begin with a bos."""
        single, pair = f"{self.bos} $A", f"{self.bos} $A {self.bos} $B"
        self.raw.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(self.bos, self.bos_id)]
        )

    def _model_template(self, settings: dict, folder: Path, now: datetime | None) -> ModelTemplate:
        if self.chat_template is None:
            raise ValueError(f"{folder}: it has no chat template, which --template model needs: use tulu")
        texts = {}  # by name, of every token that the settings name
        for name, token in settings.items():
            if name.endswith("_token") and isinstance(token, str | dict):
                texts[name] = _content(token, name)
        texts["bos_token"] = self.bos
        texts["eos_token"] = self.eos
        given = {name: text for name, text in texts.items() if text is not None}
        return ModelTemplate(self.chat_template, given, f"{folder}: its chat template", now)

    def encode(self, texts: list[str], special: bool = True) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """(ids, character spans) of each text, with one bos if the tokenizer puts any; no eos is added."""
        encodings = self.raw.encode_batch(texts, add_special_tokens=special)
        results = []
        for text, encoding in zip(texts, encodings):
            ids, spans = encoding.ids, encoding.offsets
            if special:
                first, end = self._own_tokens(text, ids, spans)
                ids, spans = ids[first:end], spans[first:end]
            results.append((ids, spans))
        return results

    def _own_tokens(self, text: str, ids: list[int], spans: list[tuple[int, int]]) -> tuple[int, int]:
        """First and end of the tokens without a second bos, and without an eos that the text has not."""
        brought_a_bos = ids[:2] == [self.bos_id] * 2 and text.startswith(self.bos)
        first, end = int(brought_a_bos), len(ids)
        while end > first and ids[end - 1] == self.eos_id:
            start, stop = spans[end - 1]
            if start < stop:  # an eos that the text wrote itself covers its characters
                break
            end -= 1
        return first, end

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids."""
        return self.raw.decode(list(ids), skip_special_tokens=skip_special)


def tokenizer_settings(folder: Path) -> dict:
    """tokenizer_config.json, completed from the older files in the order of transformers.

    Where it does not list the added tokens, special_tokens_map.json goes over it, and added_tokens.json has
    the list; where it does, neither is read.
    """
    settings = _object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings = settings | _object(folder / "special_tokens_map.json")
        named = {_content(value, name) for name, value in _special_tokens(settings)}
        settings["added_tokens_decoder"] = {
            index: {"content": text, "special": text in named, "normalized": text not in named}
            for text, index in _object(folder / "added_tokens.json").items()
        }
    return settings


def _read_tokenizer(folder: Path, settings: dict) -> tokenizers.Tokenizer:
    """tokenizer.json, or GPT-2's pair of files, vocab.json and merges.txt, which is all that GPT-Neo has."""
    path = folder / "tokenizer.json"
    pair = [str(folder / name) for name in ("vocab.json", "merges.txt")]
    try:
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            raw = tokenizers.Tokenizer.from_str(json.dumps(keep_offsets(content)))
            for token in content.get("added_tokens", []):  # tokenizers takes the next free id instead
                _check_id(raw, token["content"], token["id"], folder)
            return raw
        path = Path(pair[0])
        if not all(map(os.path.isfile, pair)):
            raise ValueError(f"{folder}: {_missing_tokenizer(folder)}")
        family = settings.get("tokenizer_class") or _object(folder / "config.json").get("model_type", "gpt2")
        if family not in ("GPT2Tokenizer", "GPT2TokenizerFast", "gpt2", "gpt_neo"):
            reason = f"vocab.json and merges.txt are read as GPT-2's, not as those of {family}"
            raise ValueError(f"{folder}: no tokenizer.json in it, and {reason}: transformers saves one")
        raw = tokenizers.Tokenizer(models.BPE.from_file(*pair))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        if str(error).startswith(str(folder)):
            raise
        raise ValueError(f"{path}: not a tokenizer file ({error})") from None
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")))
    raw.decoder = decoders.ByteLevel()
    for name in ("bos_token", "eos_token", "unk_token"):  # GPT-2's defaults
        settings.setdefault(name, "<|endoftext|>")
    return raw


def _missing_tokenizer(folder: Path) -> str:
    """What to say of a folder without tokenizer.json and without GPT-2's pair of files."""
    if not (folder / "config.json").is_file():
        return "no config.json in it, and no tokenizer: not the folder of a checkpoint"
    missing = "no tokenizer.json in it, nor vocab.json and merges.txt"
    if not list(folder.glob("*.model")):
        return f"{missing}: is the download complete?"
    convert = f"A.from_pretrained('{folder}').save_pretrained('{folder}')"
    python = f'python -c "from transformers import AutoTokenizer as A; {convert}"'
    return f"{missing}; a sentencepiece tokenizer.model is converted: {python}"


def _check_id(raw: tokenizers.Tokenizer, text: str, index: int, folder: Path) -> None:
    """Raise ValueError where an added token has another id than the files say: its embedding is there."""
    found = raw.token_to_id(text)
    if found != index:
        raise ValueError(f"{folder}: its files disagree about the token {text!r}: id {index}, or {found}")


def _special_tokens(settings: dict) -> list[tuple[str, Any]]:
    """(name, token) of every special token that the settings name, in the order in which they are added."""
    names = list(SPECIAL_TOKENS)
    for name in settings:
        if name.endswith("_token") and name not in SPECIAL_TOKENS:
            names.append(name)
    found = [(name, settings.get(name)) for name in names]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        found += extra.items()
    else:
        found += [("extra_special_tokens", token) for token in extra]
    # add_bos_token and its like are switches, not tokens
    return [(name, token) for name, token in found if isinstance(token, str | dict)]


def _add_tokens(raw: tokenizers.Tokenizer, settings: dict, folder: Path) -> None:
    """Add the tokens that the settings list and the tokenizer lacks. Raises ValueError for another id."""
    listed = settings["added_tokens_decoder"]
    try:
        listed = {int(index): _added_token(token) for index, token in listed.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: its list of added tokens cannot be read ({error})") from None
    for index, token in sorted(listed.items()):
        raw.add_tokens([token])
        _check_id(raw, token.content, index, folder)
    known = {token.content for token in raw.get_added_tokens_decoder().values()}
    for name, token in _special_tokens(settings):
        if _content(token, name) not in known:
            raw.add_tokens([_added_token(token, special=True)])


def _added_token(token: str | dict, **flags: bool) -> tokenizers.AddedToken:
    fields = {"content": token} if isinstance(token, str) else token
    return tokenizers.AddedToken(**{name: fields[name] for name in fields if name != "__type"} | flags)


def _content(token: Any, name: str) -> str | None:
    """The text of a token as a config file writes it. Raises ValueError for what is no text."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise ValueError(f"tokenizer_config.json: {name} {text!r} is not a text")
    return text


def _token_ids(config: dict, name: str, folder: Path) -> list[int]:
    """bos_token_id or eos_token_id of a config as a list: models have none, one or several."""
    ids = config.get(f"{name}_id")
    if ids is None:
        return []
    if not isinstance(ids, list):
        ids = [ids]
    for i in ids:
        if type(i) is not int or i < 0:  # a bool is an int, too
            raise ValueError(f"{folder}: {name}_id {i!r} is not a token id")
    return ids


def _object(path: Path) -> dict:
    """The object in a JSON file, empty where there is no such file."""
    return read_object(path) if path.is_file() else {}


def check_ids(ids: Any, vocab_size: int, where: object) -> None:
    """Raise ValueError for a token id that the model has no embedding for."""
    largest = int(np.max(ids)) if len(ids) else -1
    if largest >= vocab_size:
        reason = f"gives id {largest}, the model's vocab_size is {vocab_size}: not a pair"
        raise ValueError(f"{where}: its tokenizer {reason}")


def keep_offsets(content: Any) -> Any:
    """tokenizer.json without offset trimming: else a whitespace token covers no character, has no loss."""
    if isinstance(content, list):
        return [keep_offsets(part) for part in content]
    if not isinstance(content, dict):
        return content
    kept = {}
    for key, part in content.items():
        huge = key in ("vocab", "merges")  # no setting is in them
        kept[key] = part if huge else keep_offsets(part)
    if "trim_offsets" in kept:
        kept["trim_offsets"] = False
    return kept


# ----------------------------------------------------------------------------------------------- ranks
#
# Every rank reads the same rows and draws the same examples; it works on its share, [rank::world], and the
# results are summed. Without torchrun there is one rank, and nothing is exchanged.


def start_ranks(device: str) -> str:
    """Limit the threads, and join the process group if torchrun started this process.

    Returns this rank's device: "cuda:1" for "cuda", say. Raises ValueError for a device that is not
    supported, or not there.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device} is not supported: cpu or cuda (see CUDA_VISIBLE_DEVICES)")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device here")
    limit_threads()
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if device == "cpu":
        dist.init_process_group("gloo")
        return device
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=torch.device(device))
    return device


def limit_threads() -> None:
    """No more threads than usable cores, unless OMP_NUM_THREADS is set: torch takes all cores of the host."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def usable_cores(root: Path = Path("/")) -> int:
    """How many cores' time this process may take: affinity, and the quota of a container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    named = root / "proc/self/cgroup"
    own = named.read_text().rpartition("0::/")[2].strip() if named.is_file() else ""
    group = root / "sys/fs/cgroup" / own
    while group != root / "sys/fs":  # a quota holds for all below it
        quota = group / "cpu.max"
        if quota.is_file():
            allowed, period = quota.read_text().split()  # microseconds, or "max"
            if allowed != "max":
                cores = min(cores, math.ceil(int(allowed) / int(period)))
        group = group.parent
    return cores


def rank_and_world() -> tuple[int, int]:
    """This process's place among the ranks, and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The elementwise sum of x over all ranks, on every rank, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def join_over_ranks(mine: dict) -> dict:
    """The entries of every rank's dict in one, on every rank."""
    if not dist.is_initialized():
        return mine
    parts: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def wait_for_all() -> None:
    """No rank goes on before every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def print0(text: str) -> None:
    """Print on rank 0; "?" for what the terminal cannot show."""
    if rank_and_world()[0] == 0:
        encoding = sys.stdout.encoding or "utf-8"
        shown = text.encode(encoding, errors="replace")
        print(shown.decode(encoding), flush=True)


def progress(label: str, total: int, unit: str, done: int = 0, keep: bool = False) -> tqdm:
    """A tqdm bar on rank 0; in a log file a line every ten seconds, or none. keep: it stays on the screen."""
    in_terminal = sys.stderr.isatty()
    return tqdm(
        desc=label,
        total=total,
        initial=done,
        unit=f" {unit}",
        unit_scale=total > 9999,
        leave=keep,
        dynamic_ncols=True,
        disable=rank_and_world()[0] > 0,
        mininterval=0.1 if in_terminal else 10,  # seconds
        delay=0 if in_terminal else 10,
    )


def advance(bar: tqdm, count: int) -> None:
    """Move the bar by `count` of this rank's work, and by as much for every other rank: they keep step."""
    bar.update(min(count * rank_and_world()[1], bar.total - bar.n))


# ----------------------------------------------------------------------------------------------- files


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name to write to; when the block ends the file is on the disk, and then takes its own name.

    After a crash or on a full disk `path` holds the old content or the new, never a part. Raises OSError.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # on a read-only disk even this fails
            temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written, what was there before still is ({error})") from None


def read_object(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError naming the file for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: an object is expected, not {type(content).__name__}")
    return content


def write_text(text: str, path: str | os.PathLike) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_rows(rows: list[dict], path: str | os.PathLike) -> None:
    """Write rows as .jsonl, whole or not at all."""
    write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), path)
