"""Instruction rows -> text with known response characters -> token ids with a response mask -> packs.

    python -c "import data; print(*data.read_rows(['rows.jsonl:5']), sep='\\n')"

    tokenizer = Tokenizer("tests/demo_model")
    corpus = build_corpus(read_rows(["train.jsonl:500"]), tokenizer, max_length=2048)
    for batch in pack(corpus, range(len(corpus)), token_budget=4096): ...

A corpus is flat: the tokens of all examples end to end, `offsets` saying where each begins. Losses, scores
and signs are arrays of the same length, indexed by the token they judge, and a batch carries the places its
tokens came from: to store what a batch yields, or fetch what it needs, is one line whatever the packing.

Shapes: C tokens of the corpus   E examples   T tokens of a batch   B sequences of a batch
"""

import hashlib
import json
import os
import re
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

HALF_CHARACTER = re.compile("[\ud800-\udfff]")

# ------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """tokenizer.json of a checkpoint folder, with the special tokens that its config files name."""

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            hint = "a sentencepiece tokenizer.model alone is not read"
            raise ValueError(f"{folder}: no tokenizer.json in it ({hint})")
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
        self.start_id = self.eos_id if self.bos_id is None else self.bos_id  # for want of any other context
        if self.raw.encode(self.eos, add_special_tokens=False).ids != [self.eos_id]:
            raise ValueError(f"{path}: the eos token {self.eos!r} is not encoded as one token")

    def _special(self, folder: Path, kind: str) -> tuple[str | None, int | None]:
        """Text and id of a special token, from the first of three files that names it."""
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
        """(ids, character spans) of each text, with one bos if the tokenizer puts any; no eos is added."""
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
    # those two are huge, and no setting is in them
    kept = {key: keep_offsets(part) for key, part in content.items() if key not in ("vocab", "merges")}
    if "trim_offsets" in kept:
        kept["trim_offsets"] = False
    return content | kept


# ------------------------------------------------------------------------------------ rows and layouts

CONVERTERS = {".csv": "csv(FILE)", ".tsv": "csv(FILE, sep='\\t')", ".parquet": "parquet(FILE)"}


def read_rows(files: Iterable[str]) -> list[dict]:
    """The rows of .jsonl or .json files, each `path` or `path:count` (the first count rows).

    Every row gets a field "_source" (file:line) for messages. Raises ValueError naming the file and line.
    """
    rows: list[dict] = []
    for entry in files:
        path, _, count = entry.rpartition(":")
        path, count = (path, count) if count.isdigit() else (entry, "")
        if (kind := Path(path).suffix.lower()) == ".gguf":
            raise ValueError(f"{path}: GGUF, a model, not rows; transformers converts it (gguf_file=)")
        if not os.path.isfile(path):
            if os.path.isdir(path):
                raise ValueError(f"{path}: a folder, not a file")
            raise ValueError(f"{path}: no such file (public sets: python tests/tools/get_data.py --help)")
        if kind in CONVERTERS:
            convert = f"pandas.read_{CONVERTERS[kind]}.to_json('rows.jsonl', orient='records', lines=True)"
            raise ValueError(f"{path}: {kind} is not read, only .jsonl and .json: {convert}")
        read = list(_parse(Path(path)))
        if count and not 1 <= int(count) <= len(read):
            raise ValueError(f"{path}: {count} rows asked for, 1 to {len(read)} are there")
        rows += read[: int(count)] if count else read
    return rows


def _parse(path: Path) -> Iterator[dict]:
    """The rows of one file, each an object of text that is whole UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte-order mark first
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
            what = f"\\u{ord(found[0]):04x} alone is half a character (of a UTF-16 pair)"
            raise ValueError(f"{path}:{number}: {what}")
        count += 1
        yield line | {"_source": f"{path}:{number}"}
    if not count:
        raise ValueError(f"{path}: no rows in it")


LAYOUTS = {  # layout: the fields that must be there, the last one the response
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt + completion": ("prompt", "completion"),
    "prompt + response": ("prompt", "response"),
    "instruction (+ input) + output": ("instruction", "output"),
    "instruction (+ context) + response": ("instruction", "response"),
    "inputs + targets": ("inputs", "targets"),
}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}  # of `conversations`; system is called so, too

Pieces = list[tuple[str, bool]]  # text and whether it is a response, in order


def render(row: dict, eos: str) -> Pieces:
    """A row of any known layout as pieces of text; the responses, with their eos, are the pieces marked True.

    Conversations take the template of the paper's corpus (Tulu); prompt + completion and prompt + response
    rows are taken as they are, joined by a space unless one is there. Raises ValueError naming the row.
    """
    where = row.get("_source", "row")
    layout = next((fields for fields in LAYOUTS.values() if all(field in row for field in fields)), None)
    if layout is None:
        found = ", ".join(sorted(key for key in row if not key.startswith("_"))) or "none"
        raise ValueError(f"{where}: unknown layout, fields found: {found}; known: {'; '.join(LAYOUTS)}")
    if len(layout) == 1:
        return _conversation(_turns(row[layout[0]], layout[0], where), eos)
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


def _turns(messages: object, layout: str, where: str) -> list[tuple[str, str]]:
    """Messages as (role, content), checked: an optional system message, then user and assistant in turn."""
    names = ("from", "value") if layout == "conversations" else ("role", "content")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: {layout} must be a list of objects with {names[0]} and {names[1]}")
    turns = [tuple(message.get(name) for name in names) for message in messages]
    if layout == "conversations":
        turns = [(SHAREGPT_ROLES.get(str(role), role), content) for role, content in turns]
    for role, content in turns:
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: role {role!r} is not allowed: system, user, assistant")
        if not isinstance(content, str):
            kind = type(content).__name__
            raise ValueError(f"{where}: the content of a message must be a string, not {kind}")
    roles = [role for role, _ in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        order = ", ".join(spoken)
        raise ValueError(f"{where}: user and assistant must take turns, starting with user, not {order}")
    if not any(role == "assistant" and content for role, content in turns):
        raise ValueError(f"{where}: no assistant message with text")
    return turns


def _conversation(turns: list[tuple[str, str]], eos: str) -> Pieces:
    """The Tulu template, with a newline between two turns as in the authors' files, none after the last."""
    pieces: Pieces = []
    for i, (role, content) in enumerate(turns):
        newline = "\n" if i and turns[i - 1][0] == "assistant" else ""
        pieces.append((f"{newline}<|{role}|>\n", False))
        pieces.append((content + eos, True) if role == "assistant" else (content + "\n", False))
    return pieces


# ---------------------------------------------------------------------------------------------- corpus


@dataclass
class Corpus:
    """Tokenised examples, end to end. A token is judged (scored, trained on) where `response` is true."""

    tokens: np.ndarray  # (C,) int32
    response: np.ndarray  # (C,) bool; never the first token of an example, which nothing predicts
    offsets: np.ndarray  # (E+1,) int64
    sources: list[str]  # (E,) file:line of each example
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
        offsets = self.offsets[first : last + 1] - self.offsets[first]
        sources = self.sources[first:last]
        return Corpus(self.tokens[tokens], self.response[tokens], offsets, sources, dropped=0)

    def split(self) -> list[np.ndarray]:
        """The tokens of each example, without copying."""
        return np.split(self.tokens, self.offsets[1:-1]) if len(self) else []

    def places(self, examples: Sequence[int]) -> np.ndarray:
        """Where the tokens of these examples lie in the flat arrays, in order."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in examples]
        return np.concatenate(spans) if spans else np.empty(0, np.int64)


def unique_rows(rows: list[dict], eos: str) -> list[dict]:
    """The rows without later exact duplicates, equal in rendered text: D_ref and D_train stay disjoint."""
    first: dict[str, dict] = {}
    for row in rows:
        first.setdefault("\0".join(text for text, _ in render(row, eos)), row)
    return list(first.values())


def split_rows(rows: list[dict], reference: list[dict], eos: str, n_reference: int | None,
               n_train: int | None) -> tuple[list[dict], list[dict]]:
    """Rows of D_ref and D_train: exact duplicates out, then disjoint draws, always the same.

    D_ref is drawn from `rows` unless `reference` has rows. A number that is None is the paper's, 10,000 and
    50,000, or, where there are fewer rows, a sixth of them and the rest. Raises ValueError where a number
    cannot be had.
    """
    rows, reference = unique_rows(rows, eos), unique_rows(reference, eos)
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    if reference:
        reference = _take(reference, "--n-reference", n_reference, len(reference))
        rows = unique_rows(reference + rows, eos)[len(reference) :]
    else:
        usual = 10_000 if len(rows) >= 60_000 else max(len(rows) // 6, 1)
        reference = _take(rows[:-1], "--n-reference", n_reference, usual)  # one is left at least
        rows = rows[len(reference) :]
    return reference, _take(rows, "--n-train", n_train, 50_000)


def _take(rows: list[dict], flag: str, asked: int | None, usual: int) -> list[dict]:
    """The first rows: as many as the flag asks for, or up to the usual number."""
    if not rows:
        raise ValueError("D_ref and D_train need a row each: none is left, exact duplicates taken out")
    count = min(usual, len(rows)) if asked is None else asked
    if not 1 <= count <= len(rows):
        left = f"from 1 to {len(rows)} are there, exact duplicates and the other set taken out"
        raise ValueError(f"{flag} {count}: {left}")
    return rows[:count]


def build_corpus(rows: list[dict], tokenizer: Tokenizer, max_length: int = 2048) -> Corpus:
    """Render and tokenise rows, cut each to max_length tokens, drop and count those without a response then.

    The mask comes from the character spans of *one* tokenisation of the whole text: a token is a response
    token if it covers any character of a response. Tokenising a prefix apart would miss tokens that merge
    across the border.
    """
    tokens, response, lengths, sources = [], [], [], []
    for first in range(0, len(rows), 1000):
        part = rows[first : first + 1000]
        pieces = [render(row, tokenizer.eos) for row in part]
        encoded = tokenizer.encode(["".join(text for text, _ in p) for p in pieces])
        for row, row_pieces, (ids, spans) in zip(part, pieces, encoded):
            kept = np.array(spans[:max_length], dtype=np.int64).reshape(-1, 2)  # (length, 2)
            mask = np.zeros(len(kept), bool)
            start = 0
            for text, is_response in row_pieces:
                if is_response:
                    mask |= covers(kept, start, start + len(text))
                start += len(text)
            mask[:1] = False  # nothing predicts the first token
            if mask.any():
                tokens.append(np.array(ids[:max_length], np.int32))
                response.append(mask)
                lengths.append(len(kept))
                sources.append(row.get("_source", ""))
    if not lengths:
        reason = f"no response token within --max-length {max_length}"
        raise ValueError(f"all {len(rows)} rows were dropped: {reason}")
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    dropped = len(rows) - len(lengths)
    return Corpus(np.concatenate(tokens), np.concatenate(response), offsets, sources, dropped)


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
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not packs or lengths[i] > room:
            packs.append([])
            room = token_budget
        packs[-1].append(i)
        room -= lengths[i]
    return packs


def pack(corpus: Corpus, examples: Sequence[int], token_budget: int) -> Iterator[Batch]:
    """These examples as batches of at most token_budget tokens; neighbours have like lengths."""
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


# ----------------------------------------------------------------------------------------------- ranks
#
# Every rank reads the same rows and draws the same examples; it works on its share, [rank::world], and the
# results are summed. Without torchrun there is one rank, and nothing is exchanged.


def start_ranks(device: str) -> str:
    """Join the process group if torchrun started this process; this rank's device ("cuda:1" for "cuda")."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device} is not supported: cpu or cuda (see CUDA_VISIBLE_DEVICES)")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device here")
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if device == "cpu":
        dist.init_process_group("gloo")
        return device
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=torch.device(device))
    return device


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
    """Print on rank 0."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)


def progress(label: str, total: int, unit: str, done: int = 0, keep: bool = False) -> tqdm:
    """A tqdm bar on rank 0; in a log file a line every ten seconds, or none. keep: it stays on the screen."""
    seconds = {} if sys.stderr.isatty() else {"mininterval": 10, "delay": 10}
    return tqdm(desc=label, total=total, initial=done, unit=f" {unit}", unit_scale=total > 9999, leave=keep,
                dynamic_ncols=True, disable=rank_and_world()[0] > 0, **seconds)  # fmt: skip


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
