"""Fetch public rows into runs/data, where eval.py looks for a task's: benchmarks, and training sets.

    ./run.sh get_data boolq arithmetic paper      # tasks of eval.py, and groups of them
    ./run.sh get_data flan_v2 dolly alpaca        # training sets: --data runs/data/flan_v2.jsonl
    ./run.sh get_data forgetting                  # the paper's own D_ref and D_train, as its authors publish them
    ./run.sh get_data hf://datasets/owner/name/path/rows.jsonl@revision --out my/rows      # .json, .parquet, too

They are converted once, checked where their sha256 is known, kept under the Hugging Face cache (HF_HOME), and copied.

forgetting: forgetting-reference.jsonl and forgetting-train.jsonl out of the data set that the authors' README names,
Aligh1380/forgetting-llm-dataset. Their scripts train the reference on a sample of 10k conversations and stage 4 on one
of 50k, tulu_10k_sample.json and tulu_50k_sample.json there. What the files are called on the Hub, and whether the one
sample is part of the other, was not known when this was written: all files of rows are fetched, the two are found by
how many rows they have, and if that does not tell them apart, they are listed and nothing is taken.
"""

import argparse
import ast
import gzip
import hashlib
import json
import os
import random
import re
import sys
import urllib.request
from http.client import IncompleteRead
from pathlib import Path
from typing import Callable, Iterable
from urllib.parse import quote
from xml.etree import ElementTree

from huggingface_hub import constants, hf_hub_download, list_repo_files
from huggingface_hub.errors import LocalEntryNotFoundError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from data import NoResponse, RowError, read_rows, render, whole_file, write_text  # noqa: E402
from eval import GROUPS, TASKS  # noqa: E402

GITHUB = "https://raw.githubusercontent.com/"
LOGIQA_TEST = GITHUB + "lgw863/LogiQA-dataset/91e7b26bab6308fc222fe7f8838b61792f2f293f/Test.txt"
ASDIV_XML = GITHUB + "chaochun/nlu-asdiv-dataset/883f90a9a65bf00304ba8f37423910fe743abc47/dataset/ASDiv.xml"
TRUTHFULQA_MC = GITHUB + "sylinrl/TruthfulQA/013686a06be7a7bde5bf8223943e106c7250123c/data/mc_task.json"
TRUTHFULQA_TASK = (
    GITHUB + "EleutherAI/lm-evaluation-harness/fb9f352b699db09f0b6c2379f98f7645a6b4312a"
    "/lm_eval/tasks/truthfulqa/truthfulqa_mc1.yaml"
)
TYDIQA_SCRIPT = (
    GITHUB + "UCSC-REAL/TokenCleaning/af1a08e19f1c6072395dc9785d136860282e24cf/eval/tydiqa/run_eval.py"
)
TYDIQA = "https://storage.googleapis.com/tydiqa/v1.1/tydiqa-goldp-v1.1-{}.json"
ARC_ROWS = "https://datasets-server.huggingface.co/rows?dataset=allenai%2Fai2_arc&config=ARC-Challenge&split=test&offset={}&length=100"
ARITHMETIC_FILES = {  # subtask: the Hub's file
    "1dc": "single_digit_three_ops",
    "2da": "two_digit_addition",
    "2ds": "two_digit_subtraction",
    "2dm": "two_digit_multiplication",
    "3da": "three_digit_addition",
    "3ds": "three_digit_subtraction",
    "4da": "four_digit_addition",
    "4ds": "four_digit_subtraction",
    "5da": "five_digit_addition",
    "5ds": "five_digit_subtraction",
}


def json_lines(text: str) -> list[dict]:
    """The rows of a JSONL text."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def convert_boolq(text: str) -> list[dict]:
    """The original dev.jsonl; SuperGLUE, which lm-eval reads, puts the title in front of the passage."""
    rows = json_lines(text)
    return [
        {
            "question": r["question"],
            "passage": f"{r['title']} -- {r['passage']}",
            "idx": i,
            "label": int(r["answer"]),
        }
        for i, r in enumerate(rows)
    ]


def convert_logiqa(text: str) -> list[dict]:
    """Blocks of a blank line, the answer's letter, context, question and four options; "." becomes ". " as the Hub has it."""
    lines, rows = text.split("\n"), []
    spaced = lambda line: line.replace(".", ". ").strip()
    for at in range(1, len(lines) - 6, 8):
        label, context, question, *options = lines[at : at + 7]
        options = [spaced(option.strip()[2:]) for option in options]
        rows.append(
            {
                "label": label.strip(),
                "context": spaced(context),
                "question": spaced(question),
                "options": options,
            }
        )
    return rows


def convert_asdiv(text: str) -> list[dict]:
    """ASDiv.xml: the texts of each problem, unstripped."""
    names = {
        "body": "Body",
        "question": "Question",
        "solution_type": "Solution-Type",
        "answer": "Answer",
        "formula": "Formula",
    }
    problems = ElementTree.fromstring(text).iter("Problem")
    return [{field: problem.find(tag).text for field, tag in names.items()} for problem in problems]


def convert_truthfulqa(text: str) -> list[dict]:
    """mc_task.json: {choice: label} becomes {choices, labels}, in order."""
    split = lambda targets: {"choices": list(targets), "labels": list(targets.values())}
    return [
        {"question": r["question"], **{k: split(r[k]) for k in ("mc1_targets", "mc2_targets")}}
        for r in json.loads(text)
    ]


def convert_truthfulqa_prompt(text: str) -> str:
    """The six question-answer pairs out of lm-eval's task file: a YAML string with its line joins and escapes undone."""
    quoted = text[text.index("prompt_qa = '") + len("prompt_qa = '") : text.index("'%}")]
    return re.sub(r"\\\n\s*", "", quoted).replace("\\n", "\n")


def convert_ifeval(text: str) -> list[dict]:
    """The Hub's rows without the arguments that are null."""
    return [
        r | {"kwargs": [{k: v for k, v in a.items() if v is not None} for a in r["kwargs"]]}
        for r in json_lines(text)
    ]


def convert_arithmetic(*texts: str) -> list[dict]:
    """Ten files, each row marked with its subtask."""
    return [
        {"subtask": f"arithmetic_{name}"} | {k: r[k] for k in ("context", "completion")}
        for name, text in zip(ARITHMETIC_FILES, texts)
        for r in json_lines(text)
    ]


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
                rows.setdefault(qa["id"].split("-")[0], []).append(
                    row | {"question": qa["question"], "answers": answers}
                )
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


def hub_file(source: str) -> Path:
    """The file of "hub:REPO:FILE@REVISION", through the Hub's client and its cache."""
    _, repo, file = source.split(":")
    file, _, revision = file.partition("@")
    return Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision or None))


class NotATable(ValueError):
    """A parquet file that cannot be read, or not here."""


def rows_in(path: Path) -> list[dict]:
    """The rows of a file, as data.py reads them, without where they stand in it."""
    rows = read_rows([str(path)])
    for row in rows:
        del row["_source"]
    return rows


def as_lines(rows: list[dict]) -> str:
    """Rows as JSONL; what a table may hold and JSON may not, a date, becomes a text."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def table_as_lines(path: Path) -> str:
    """The rows of a parquet file as JSONL."""
    try:
        return as_lines(rows_in(path))
    except ValueError as error:
        raise NotATable(error) from None


def fetch_text(source: str) -> str:
    """A public text: "hub:REPO:FILE" through the Hub's client (and its cache), anything else by https.

    What is gzipped is unpacked, a table becomes JSON lines. Raises ValueError naming the source.
    """
    try:
        if source.startswith("hub:"):
            path = hub_file(source)
            if path.suffix.lower() == ".parquet":
                return table_as_lines(path)
            content = path.read_bytes()
        elif constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        else:
            content = download(source)
        return (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8")
    except NotATable as error:
        raise ValueError(f"{source}: {error}") from None
    except Exception as error:  # urllib and the Hub's client have many error types; a user needs one line
        raise not_fetched(source, error) from None


def not_fetched(source: str, error: BaseException) -> ValueError:
    """What to say where a source could not be reached, or gave nothing."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # "not in the cache either" hides why the Hub was no help
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(
        f"{source}: could not be fetched ({reason}); "
        "put the rows in a file for --data, or those of a benchmark in a folder for --data-dir"
    )


def download(url: str, tries: int = 5) -> bytes:
    """What is behind an address. A connection that breaks off is taken up where it broke. Raises OSError."""
    content = b""
    for _ in range(tries):
        request = urllib.request.Request(url, headers={"Range": f"bytes={len(content)}-"} if content else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = (
                content if answer.status == 206 else b""
            )  # 200: a server that knows no ranges begins again
            try:
                while block := answer.read1(1 << 20):
                    content += block
                if not answer.length:  # what is still to come; None: not known
                    return content
            except (IncompleteRead, ConnectionError, TimeoutError):
                pass  # the next try asks for the rest
    raise OSError(f"the connection broke off {tries} times, the last time after {len(content)} bytes")


def convert_once(
    path: Path, sources: Iterable[str], convert: Callable[..., str | list[dict]], expected: str | None
) -> None:
    """Write `path`, unless it is there, from its public sources. Raises ValueError if they are not what they were."""
    if path.is_file():
        return
    sources = list(sources)
    texts = [fetch_text(source) for source in sources]
    try:
        content = convert(*texts)
    except Exception as error:  # what came is not in the format it had
        raise ValueError(
            f"{path.name}: {sources[0]} is not what it was ({type(error).__name__}: {error})"
        ) from None
    if not isinstance(content, str):
        content = as_lines(content)
    found = hashlib.sha256(content.encode()).hexdigest()
    if expected is not None and not found.startswith(expected):
        raise ValueError(
            f"{path.name}: {sources[0]} is not what it was (sha256 {found[:16]}, expected {expected})"
        )
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
    rows = [
        row for text in texts for row in (json.loads(text) if text.lstrip()[:1] == "[" else json_lines(text))
    ]
    return with_response(rows)


def with_response(rows: list[dict]) -> list[dict]:
    """The rows that have a response; how many have none is said."""
    kept = [row for row in rows if has_response(row)]
    if len(kept) < len(rows):
        print(
            f"{len(rows) - len(kept)} of {len(rows)} public rows have no response and are left out",
            flush=True,
        )
    return kept


def has_response(row: dict) -> bool:
    """Whether a row has a response. Rows that are wrong in another way pass: a run says what is wrong with them."""
    try:
        render(row, "")
    except NoResponse:
        return False
    except RowError:
        pass
    return True


def convert_oasst(text: str) -> list[dict]:
    """Message trees as one conversation each, the best: at every turn the reply of lowest rank, as in Tulu 2.

    Deleted and blank messages are skipped with what hangs on them; a last question without an answer is dropped.
    """
    rows = []
    for tree in json_lines(text):
        messages, replies = [], [tree["prompt"]]
        while replies := [
            reply for reply in replies if not reply.get("deleted") and (reply["text"] or "").strip()
        ]:
            best = min(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))
            role = {"prompter": "user", "assistant": "assistant"}[best["role"]]
            messages.append({"role": role, "content": best["text"]})
            replies = best.get("replies") or []
        if messages and messages[-1]["role"] == "user":
            messages.pop()
        rows.append({"messages": messages})
    return convert_rows("".join(json.dumps(row) + "\n" for row in rows))


RECIPES = {  # name: (where its originals are, how they are converted)
    "flan_v2": (["hub:hamishivi/tulu_mix_store:flan_v2_resampled_50k.jsonl"], convert_rows),
    "dolly": (["hub:databricks/databricks-dolly-15k:databricks-dolly-15k.jsonl"], convert_rows),
    "oasst1": (["hub:OpenAssistant/oasst1:2023-04-12_oasst_ready.trees.jsonl.gz"], convert_oasst),
    "alpaca": ([GITHUB + "tatsu-lab/stanford_alpaca/main/alpaca_data.json"], convert_rows),
    "wizardlm": (["hub:WizardLMTeam/WizardLM_evol_instruct_70k:alpaca_evol_instruct_70k.json"], convert_rows),
}


HUB_PREFIX = "hf://datasets/"
ROW_FILE = r"\.(jsonl?(\.gz)?|parquet)"
AUTHORS_SET = "Aligh1380/forgetting-llm-dataset"
SAMPLES = {  # of the paper's authors; file: (what it is, its name in their scripts, about how many rows it has)
    "forgetting-reference.jsonl": ("D_ref", "tulu_10k_sample", 10_000),
    "forgetting-train.jsonl": ("D_train", "tulu_50k_sample", 50_000),
}


PUBLIC_SETS = (*RECIPES, "forgetting", f"{HUB_PREFIX}owner/name/path/rows.jsonl")  # what fetch_rows takes


def is_public(name: str) -> bool:
    """Whether there are rows to train on under this name."""
    return name in PUBLIC_SETS or name.startswith(HUB_PREFIX)


def fetch_samples() -> list[Path]:
    """The authors' two samples as JSONL under the Hugging Face cache, fetched once.

    Raises ValueError, listing what the data set has, where it cannot be told which of its files they are.
    """
    folder = Path(constants.HF_HOME) / "forgetting-rows"
    paths = [folder / name for name in SAMPLES]
    if not all(path.is_file() for path in paths):
        contents = rows_of_a_set(AUTHORS_SET)
        files = [sample_among(contents, *SAMPLES[path.name]) for path in paths]
        for path, file in zip(paths, files):
            write_text(as_lines(with_response(contents[file])), path)
            print(f"{path.name} is {file} of {AUTHORS_SET}, {len(contents[file]):,} rows", flush=True)
    return paths


def rows_of_a_set(repo: str) -> dict[str, list[dict] | str]:
    """Each file of a data set on the Hub that may hold rows: its rows, or why it has none."""
    try:
        files = list_repo_files(repo, repo_type="dataset")
        files = sorted(file for file in files if re.search(ROW_FILE + "$", file, re.IGNORECASE))
        paths = [hub_file(f"hub:{repo}:{file}") for file in files]
    except Exception as error:  # the Hub's client has many error types
        raise not_fetched(HUB_PREFIX + repo, error) from None
    contents: dict[str, list[dict] | str] = {}
    for file, path in zip(files, paths):
        try:
            contents[file] = rows_in(path)
        except ValueError as error:
            contents[file] = str(error).replace(str(path), file).partition("\n")[0]
    return contents


def sample_among(contents: dict[str, list[dict] | str], what: str, name: str, count: int) -> str:
    """The file with about `count` rows; of several the one that the scripts name. Raises ValueError for no such one."""
    counts = {file: len(rows) for file, rows in contents.items() if isinstance(rows, list)}
    found = [file for file in counts if abs(counts[file] - count) <= count / 10]
    found = [file for file in found if name in file] or found
    if len(found) == 1:
        return found[0]
    listed = [
        f"{file}, {counts[file]:,} rows" if file in counts else f"{rows}" for file, rows in contents.items()
    ]
    raise ValueError(
        f"{AUTHORS_SET}: which of its files is {what}, about {count:,} rows, cannot be told: "
        f"{'; '.join(listed) or 'no file of rows'}. One by its name: {HUB_PREFIX}{AUTHORS_SET}/FILE"
    )


def fetch_rows(name: str) -> list[Path]:
    """The files of a public training set as JSONL under the Hugging Face cache, fetched and converted once."""
    if name == "forgetting":
        return fetch_samples()
    folder = Path(constants.HF_HOME) / "forgetting-rows"
    if name in RECIPES:
        sources, convert = RECIPES[name]
        path = folder / f"{name}.jsonl"
    else:
        parts = name.removeprefix(HUB_PREFIX).split("/", 2)
        if not name.startswith(HUB_PREFIX) or len(parts) < 3:
            raise ValueError(f"{name}: not a public set: {', '.join(PUBLIC_SETS)}")
        owner, repo, file = parts
        if not re.search(ROW_FILE + "(@|$)", file, re.IGNORECASE):
            raise ValueError(
                f"{name}: only JSON, JSONL and parquet are read; convert it: hf download {owner}/{repo} "
                f'{file.partition("@")[0]} --repo-type dataset --local-dir ., then python -c "import pandas; '
                "pandas.read_parquet('FILE').to_json('rows.jsonl', orient='records', lines=True)\""
            )
        sources, convert = [f"hub:{owner}/{repo}:{file}"], convert_rows
        path = folder / (quote(f"{owner}/{repo}/{file}", safe="") + ".jsonl")  # two names never share a file
    convert_once(path, sources, convert, None)
    return [path]


# -------------------------------------------------------------------------------------------------- the command line


def benchmark_files(name: str) -> list[str]:
    """The files of a task of eval.py or of a group, what lies beside the rows included; [] for any other name."""
    stems = tuple(Path(TASKS[task].file).stem for task in GROUPS.get(name, [name]) if task in TASKS)
    return [file for file in BENCHMARKS if file.startswith(stems)]


def put(path: Path, folder: Path) -> None:
    """Copy a file of the cache into a folder, and say so. Raises ValueError where a file of other content is."""
    content, copy = path.read_bytes(), folder / path.name
    if not copy.is_file():
        with whole_file(copy) as file:
            file.write_bytes(content)
    elif copy.read_bytes() != content:
        raise ValueError(f"{copy} is there and holds something else: move it away, or use another --out")
    print(copy, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Fetch what is named, and say where it is."""
    benchmarks = [name for name in [*GROUPS, *TASKS] if benchmark_files(name)]
    known = ", ".join([*benchmarks, *PUBLIC_SETS])
    usage = "./run.sh get_data NAME ... [--out FOLDER] (--help lists the names)"
    parser = argparse.ArgumentParser(
        prog="./run.sh get_data",
        usage=usage,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", help=f"any of {known}")
    parser.add_argument("--out", default="runs/data", help="the folder [runs/data]")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.out)
    try:
        if unknown := [name for name in arguments.names if not benchmark_files(name) and not is_public(name)]:
            raise ValueError(f"unknown {', '.join(unknown)}; known: {known}")
        for name in arguments.names:
            if files := benchmark_files(name):
                cache = fetch_benchmarks(files)
                for file in files:
                    put(cache / file, folder)
            else:
                for path in fetch_rows(name):
                    put(path, folder)
    except (ValueError, OSError) as error:
        print(f"get_data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
