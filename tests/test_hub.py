"""The Hub, through huggingface_hub's real client and a local server that answers as the Hub does (hub_server.py).

The client reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is imported, so each setting is a process of its own.
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
import tiny
from hub_server import Hub, Repo

ROOT = Path(__file__).resolve().parent.parent
CHILD = """
import json, os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/tools"]
import data, get_data, model
get_data.constants.DOWNLOAD_CHUNK_SIZE = 1024  # the client goes on from the last whole chunk; its 10 MB are more than a shard here
get_data.RECIPES["alpaca"] = ([sys.argv[2] + "/alpaca_data.json"], get_data.convert_rows)
for sample, (what, name, count) in get_data.SAMPLES.items():
    get_data.SAMPLES[sample] = what, name, count // 1000
def samples(repo):
    get_data.AUTHORS_SET = repo
    get_data.constants.HF_HOME = repo.replace("/", "-")
    return {path.name: data.read_rows([str(path)]) for path in get_data.fetch_samples()}
calls = {
    "samples": samples,
    "folder": lambda x: str(model.checkpoint_folder(x)),
    "weight": lambda x: model.load_model(x).state_dict()["model.norm.weight"].tolist(),
    "rows": lambda x: data.read_rows(list(map(str, get_data.fetch_rows(x)))),
    "again": lambda x: str(*get_data.fetch_rows(x)),
    "text": get_data.fetch_text,
    "unreachable": lambda x: setattr(get_data.constants, "ENDPOINT", "http://127.0.0.1:9") or model.checkpoint_folder(x),
}
for kind, argument in json.loads(sys.argv[3]):
    name, _, token = kind.partition(" as ")
    os.environ |= {"HF_TOKEN": token.removeprefix("nobody")} if token else {}
    try:
        result = calls[name](argument)
    except ValueError as error:
        result = f"refused: {error}"
    print("RESULT", json.dumps(result))
"""


def ask(
    hub: Hub, home: Path, calls: list[tuple[str, str]], **environment: str
) -> tuple[dict[tuple[str, str], Any], str]:
    """What the calls return, or "refused: message", each; and what was printed. "folder as T": from here on with token T."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", CHILD, str(ROOT), hub.endpoint, json.dumps(calls)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=home, env=clean | settings | environment
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return dict(zip(calls, results, strict=True)), done.stdout


def lines(*rows: dict) -> bytes:
    return tiny.jsonl(rows).encode()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def message(
    text: str, rank: int | None = None, replies: tuple = (), role: str = "assistant", deleted: bool = False
) -> dict:
    return {"text": text, "role": role, "rank": rank, "replies": list(replies), "deleted": deleted}


def conversations(count: int, word: str = "row") -> list[dict]:
    return [{"messages": tiny_messages(f"{word} {i}?", f"It is {i}")} for i in range(count)]


def tiny_messages(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


TREES = lines(
    {
        "prompt": message(
            "Name a river.",
            role="prompter",
            replies=(
                message("The Po.", 1),
                message("gone", 0, deleted=True),
                message(
                    "The Nile.",
                    0,
                    (
                        message(
                            "And a lake?", None, (message("Chad.", 2), message("Como.", None)), "prompter"
                        ),
                    ),
                ),
            ),
        )
    },
    {
        "prompt": message(
            "Thanks?", role="prompter", replies=(message("Yes.", 0, (message("Bye", 0, (), "prompter"),)),)
        )
    },
    {"prompt": message("Nobody answers.", role="prompter", replies=(message(" ", 0),))},
)
SETS = {
    "hamishivi/tulu_mix_store": {"flan_v2_resampled_50k.jsonl": lines({"inputs": "1 + 1?", "targets": "2"})},
    "databricks/databricks-dolly-15k": {
        "databricks-dolly-15k.jsonl": lines(
            {
                "instruction": "Where?",
                "context": "It is in Rome.",
                "response": "Rome",
                "category": "closed_qa",
            },
            {"instruction": "Who?", "context": "", "response": "Ann", "category": "open_qa"},
        )
    },
    "OpenAssistant/oasst1": {"2023-04-12_oasst_ready.trees.jsonl.gz": gzip.compress(TREES)},
    "WizardLMTeam/WizardLM_evol_instruct_70k": {
        "alpaca_evol_instruct_70k.json": json.dumps(
            [{"instruction": f"Do {i}", "output": "" if i == 1 else f"Done {i}"} for i in range(4)]
        ).encode()
    },
    "Aligh1380/forgetting-llm-dataset": {
        "README.md": b"#",
        "dataset_infos.json": b"{}",
        "data/test.jsonl": b"",
        "data/train.jsonl": lines({"prompt": "a", "response": "b"}),
    },
    "samples/named": {
        "README.md": b"#",
        "dataset_infos.json": b"{}",
        "tulu_10k_sample.json": json.dumps(conversations(10)).encode(),
        "tulu_50k_sample.json": json.dumps([*conversations(47), {"messages": []}]).encode(),
        "a_50k_more.json": json.dumps(conversations(50, "other")).encode(),
    },
    "samples/split": {
        "data/reference.jsonl.gz": gzip.compress(lines(*conversations(11))),
        "data/train.jsonl": lines(*conversations(55)),
        "data/all.jsonl": lines(*conversations(66)),
    },
    "samples/two": {
        "a.jsonl": lines(*conversations(9)),
        "b.jsonl": lines(*conversations(50)),
        "c.jsonl": lines(*conversations(51)),
        "d.parquet": b"PAR1",
        "e.jsonl": lines({"prompt": "a", "completion": "b"}) + b"oops\n",
    },
    "samples/none": {"README.md": b"#", "train.csv": b"a,b"},
    "someone/parquet": {"README.md": b"#", "data/train-00000.parquet": b"PAR1"},
    "someone/nothing": {"README.md": b"#"},
}
HF_FILE = "hf://datasets/Aligh1380/forgetting-llm-dataset/data/train.jsonl"
SAMPLES = [
    ("samples", name)
    for name in (
        "samples/named",
        "samples/split",
        "samples/two",
        "samples/none",
        "Aligh1380/forgetting-llm-dataset",
        "samples/absent",
    )
]
REFUSED = [  # the first is asked for with no token
    ("folder as nobody", "meta-llama/other"),
    ("folder as hf_stranger", "meta-llama/other"),
    ("folder as nobody", "owner/private"),
    ("text as nobody", "hub:owner/rows:a.jsonl"),
    ("folder as hf_wrong", "owner/unseen"),
    ("folder as hf_narrow", "owner/unseen"),
]
ALPACA = json.dumps([{"instruction": f"Say {i}", "input": "", "output": f"{i}"} for i in range(60)]).encode()


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    """Two checkpoints (one sharded, with a tag), gated, private and pickled ones, and the public sets in small."""
    folder = tmp_path_factory.mktemp("served")
    plain = files_of(tiny.make_checkpoint(folder / "a", "llama3", shards=2, seed=0))
    tagged = files_of(tiny.make_checkpoint(folder / "b", "llama3", seed=5))
    unwanted = {
        name: b"not to be fetched"
        for name in (
            "pytorch_model.bin",
            "model-q4.gguf",
            "original/params.json",
            "original/consolidated.00.pth",
            "README.md",
            "onnx/config.json",
            "consolidated.safetensors",
        )
    }
    pickled = {"config.json": plain["config.json"], "pytorch_model.bin": b"\x80"}
    repos = {
        "owner/name": Repo(plain | unwanted, {"v1": tagged}),
        "meta-llama/gated": Repo(plain, gated=True),
        "meta-llama/other": Repo(plain, gated=True),
        "owner/private": Repo(plain, private=True),
        "owner/pickled": Repo(pickled),
        "owner/rows": Repo({"a.jsonl": b"{}"}, gated=True, dataset=True),
    } | {name: Repo(files, dataset=True) for name, files in SETS.items()}
    cut = {"model-00001-of-00002.safetensors", "/alpaca_data.json"}
    with Hub(repos, {"/alpaca_data.json": ALPACA}, tokens=("hf_good",), cut=cut) as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def session(hub, home) -> tuple[dict, str, list]:
    """What a user with a token asks for, and then others: results, what was printed, and the requests the server saw."""
    calls = [
        ("folder", "owner/name"),
        ("weight", "owner/name"),
        ("weight", "owner/name@v1"),
        ("folder", "meta-llama/gated"),
        ("folder", "owner/name@v9"),
        ("folder", "owner/pickled"),
        ("folder", "owner/absent"),
        *(("rows", name) for name in ("flan_v2", "dolly", "oasst1", "alpaca", "wizardlm", HF_FILE)),
        ("rows", "nowhere"),
        ("again", "wizardlm"),
        ("rows", "hf://datasets/someone/parquet/data/train-00000.parquet"),
        ("rows", "hf://datasets/someone/parquet/data/train.csv"),
        ("rows", "hf://datasets/someone/nothing/rows.jsonl"),
        ("rows", "hf://datasets/someone/absent/rows.jsonl"),
        ("rows", "hf://datasets/someone"),
        ("text", "hub:OpenAssistant/oasst1:other.jsonl"),
        *SAMPLES,
        *REFUSED,
        ("unreachable", "owner/elsewhere"),
    ]
    results, printed = ask(hub, home, calls, HF_TOKEN="hf_good")
    return results, printed, list(hub.requests)


def weight(seed: int) -> list[float]:
    return tiny.make_weights(tiny.config_of("llama3", 4), seed)["model.norm.weight"].tolist()


def test_a_checkpoint_and_its_revision_are_fetched_and_load(session):
    results, _, _ = session
    assert results["weight", "owner/name"] == weight(0)
    assert results["weight", "owner/name@v1"] == weight(5) != weight(0)


def test_only_what_is_needed_is_fetched(session, hub, home):
    """No pickles, GGUF files, original/ and other subfolders, nor Meta's consolidated weights."""
    folder = Path(session[0]["folder", "owner/name"])
    assert folder.is_relative_to(home)
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not any(
        part in path
        for _, path, _ in session[2]
        for part in (".bin", ".gguf", "original", "onnx", "README", "consolidated")
    )


def test_the_token_goes_to_the_hub_and_not_to_its_cdn(session):
    paths = {"/api/models/owner/name", "/owner/name/resolve", "/datasets/databricks", "/cdn"}
    sent = {
        start: {headers.get("authorization") for _, path, headers in session[2] if path.startswith(start)}
        for start in paths
    }
    assert sent == {start: {"Bearer hf_good"} for start in paths} | {"/cdn": {None}}


def test_a_token_opens_a_gated_repository(session):
    assert (Path(session[0]["folder", "meta-llama/gated"]) / "config.json").is_file()


def test_a_cut_connection_is_taken_up_where_it_broke(session, hub):
    """The first GET of a shard breaks off half-way; the client asks for the rest, and the weights are whole (above)."""
    assert not hub.cut
    ranges = [
        (path.split("/")[1], int(headers["range"][6:-1]))
        for _, path, headers in session[2]
        if "range" in headers
    ]
    (place, start), (other, alpaca) = ranges
    assert place == "cdn" and start > 1000 and other == "alpaca_data.json" and alpaca == len(ALPACA) // 2


@pytest.mark.parametrize(
    "kind, name, expected",
    [
        (
            "folder",
            "owner/name@v9",
            "owner/name@v9: not a local folder, and the Hub said: 404 Client Error. Revision Not",
        ),
        ("folder", "owner/pickled", "owner/pickled: no safetensors in this repository (a pickle"),
        (
            "folder",
            "owner/absent",
            "404 Client Error. Repository Not Found for url: {0}/api/models/owner/absent",
        ),
        (
            "rows",
            "nowhere",
            "nowhere: not a public set: flan_v2, dolly, oasst1, alpaca, wizardlm, forgetting, hf://datasets/owner",
        ),
        (
            "rows",
            "hf://datasets/someone/parquet/data/train-00000.parquet",
            "hub:someone/parquet:data/train-00000.parquet: ",  # what data.py says of it
        ),
        (
            "rows",
            "hf://datasets/someone/parquet/data/train.csv",
            "only JSON, JSONL and parquet are read; convert it: hf",
        ),
        (
            "rows",
            "hf://datasets/someone/nothing/rows.jsonl",
            "404 Client Error. Entry Not Found for url: {0}/datasets/someone",
        ),
        (
            "rows",
            "hf://datasets/someone/absent/rows.jsonl",
            "404 Client Error. Repository Not Found for url: {0}/datasets/",
        ),
        (
            "rows",
            "hf://datasets/someone",
            "hf://datasets/someone: not a public set: flan_v2, dolly, oasst1, alpaca",
        ),
        (
            "text",
            "hub:OpenAssistant/oasst1:other.jsonl",
            "fetched (404 Client Error. Entry Not Found for url: {0}/datasets",
        ),
    ],
)
def test_what_is_not_there_is_named(session, hub, kind, name, expected):
    result = session[0][kind, name]
    assert result.startswith("refused: ") and expected.format(hub.endpoint) in result and "\n" not in result


def without_source(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "_source"} for row in rows]


def test_recipes_in_the_layouts_of_their_homes(session):
    read = {
        name: result
        for (kind, name), result in session[0].items()
        if kind == "rows" and isinstance(result, list)
    }
    rows = {name: without_source(result) for name, result in read.items()}
    assert rows["flan_v2"] == [{"inputs": "1 + 1?", "targets": "2"}]
    assert [(row["context"], row["response"]) for row in rows["dolly"]] == [
        ("It is in Rome.", "Rome"),
        ("", "Ann"),
    ]
    assert rows["alpaca"] == json.loads(ALPACA)
    assert rows[HF_FILE] == [{"prompt": "a", "response": "b"}]
    assert [row["output"] for row in rows["wizardlm"]] == ["Done 0", "Done 2", "Done 3"]


def test_oasst_trees_become_their_best_conversations(session):
    """Lowest rank first, deleted and blank messages skipped, no last question without an answer."""
    turns = [[(m["role"], m["content"]) for m in row["messages"]] for row in session[0]["rows", "oasst1"]]
    assert turns == [
        [
            ("user", "Name a river."),
            ("assistant", "The Nile."),
            ("user", "And a lake?"),
            ("assistant", "Chad."),
        ],
        [("user", "Thanks?"), ("assistant", "Yes.")],
    ]


def test_the_authors_samples_are_told_apart_by_their_rows(session):
    """10k and 50k, in thousandths here; of several as long the one that the authors' scripts name."""
    results, printed, _ = session
    named = results["samples", "samples/named"]
    assert list(named) == ["forgetting-reference.jsonl", "forgetting-train.jsonl"]
    assert without_source(named["forgetting-reference.jsonl"]) == conversations(10)
    assert without_source(named["forgetting-train.jsonl"]) == conversations(47), "one had no response"
    assert "forgetting-train.jsonl is tulu_50k_sample.json of samples/named, 48 rows\n" in printed
    assert "1 of 48 public rows have no response and are left out\n" in printed
    split = results["samples", "samples/split"]
    assert [len(rows) for rows in split.values()] == [11, 55]
    assert "forgetting-reference.jsonl is data/reference.jsonl.gz of samples/split, 11 rows\n" in printed


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "samples/two",
            "samples/two: which of its files is D_train, about 50 rows, cannot be told: a.jsonl, 9 rows; "
            "b.jsonl, 50 rows; c.jsonl, 51 rows; d.parquet: ",
        ),
        (
            "samples/two",
            "; e.jsonl:2: not valid JSON (Expecting value: line 1 column 1 (char 0)). One by its name: ",
        ),
        (
            "samples/none",
            "is D_ref, about 10 rows, cannot be told: no file of rows. One by its name: hf://datasets/s",
        ),
        (
            "Aligh1380/forgetting-llm-dataset",
            "data/test.jsonl: no rows in it; data/train.jsonl, 1 rows; dataset_infos.json: a list of rows is exp",
        ),
        ("samples/absent", "hf://datasets/samples/absent: could not be fetched (404 Client Error"),
    ],
)
def test_samples_that_cannot_be_told_apart_are_listed(session, home, name, expected):
    said = session[0]["samples", name]
    assert said.startswith("refused: ") and expected in said and "\n" not in said
    assert not (home / name.replace("/", "-")).exists(), "neither of the two is taken"


def test_rows_left_out_are_counted_once(session, hub):
    printed = session[1]
    assert (
        printed.count("1 of 4 public rows have no response and are left out") == 1
    )  # wizardlm, asked for twice
    assert printed.count("1 of 3 public rows") == 1


@pytest.mark.parametrize("call, status", list(zip(REFUSED[:2], (401, 403))))
def test_a_gated_repository_says_where_its_terms_are(session, hub, call, status):
    """401 without a token, 403 with one whose account was not admitted."""
    start = f"refused: meta-llama/other: not a local folder, and the Hub said: {status} Client Error. Cannot access gated repo"
    assert session[0][call].startswith(f"{start} for url {hub.endpoint}/meta-llama/other/")


def test_other_refusals(session, hub):
    """A private repository and none look the same without a token: 401."""
    private, dataset, wrong, narrow = (session[0][call] for call in REFUSED[2:])
    assert (
        "Repository Not Found" in private
        and "private or gated repo, make sure you are authenticated" in private
    )
    assert f"Cannot access gated repo for url {hub.endpoint}/datasets/owner/rows" in dataset
    assert "401 Unauthorized" in wrong and "Invalid credentials" in wrong
    assert "403 Forbidden: This token lacks the permission" in narrow
    assert session[0]["unreachable", "owner/elsewhere"].endswith(
        "the Hub said: [Errno 111] Connection refused"
    )
    assert all("\n" not in session[0][call] for call in REFUSED)


def test_offline_the_cache_serves_and_the_rest_is_named(session, hub, home):
    """HF_HUB_OFFLINE=1: not a request is sent."""
    before = len(hub.requests)
    calls = [
        ("weight", "owner/name"),
        ("rows", "dolly"),
        ("rows", "alpaca"),
        ("folder", "owner/private"),
        ("text", "hub:google/IFEval:x.jsonl"),
        ("rows", "hf://datasets/someone/nothing/rows.jsonl"),
        ("text", f"{hub.endpoint}/alpaca_data.json"),
        ("samples", "samples/named"),
        ("samples", "samples/offline"),
    ]
    results, _ = ask(hub, home, calls, HF_HUB_OFFLINE="1")
    assert results["weight", "owner/name"] == session[0]["weight", "owner/name"]
    assert len(results["rows", "dolly"]) == 2 and results["rows", "alpaca"] == session[0]["rows", "alpaca"]
    for call in calls[3:6]:
        assert "offline mode is enabled" in results[call] or "HF_HUB_OFFLINE" in results[call], results[call]
    assert "could not be fetched (HF_HUB_OFFLINE is set)" in results[calls[6]]
    assert results["samples", "samples/named"] == session[0]["samples", "samples/named"]
    assert "samples/offline: could not be fetched" in results["samples", "samples/offline"]
    assert len(hub.requests) == before


@pytest.fixture
def get_data(monkeypatch, tmp_path):
    """The program in this process, with a cache of its own; and the list of what it fetched from a stand-in for the network."""
    import get_data

    monkeypatch.setattr(get_data.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    fetched: list[str] = []
    monkeypatch.setattr(get_data, "BENCHMARKS", {file: ([file], str, None) for file in get_data.BENCHMARKS})
    monkeypatch.setattr(get_data, "RECIPES", {"dolly": (["dolly"], str)})
    monkeypatch.setattr(
        get_data, "fetch_text", lambda source: fetched.append(source) or f"rows of {source}\n"
    )
    return get_data.main, fetched


PAPER = [
    "asdiv.jsonl",
    "boolq.jsonl",
    "logiqa.jsonl",
    "truthfulqa.jsonl",
    "truthfulqa_prompt.txt",
    "tydiqa.jsonl",
    "tydiqa_1shot.jsonl",
    "tydiqa_templates.json",
]


@pytest.mark.parametrize(
    "name, files",
    [
        ("boolq", ["boolq.jsonl"]),
        ("truthfulqa", ["truthfulqa.jsonl", "truthfulqa_prompt.txt"]),
        ("truthfulqa_mc2", ["truthfulqa.jsonl", "truthfulqa_prompt.txt"]),
        ("tydiqa", ["tydiqa.jsonl", "tydiqa_1shot.jsonl", "tydiqa_templates.json"]),
        ("arithmetic", ["arithmetic.jsonl"]),
        ("arithmetic_3da", ["arithmetic.jsonl"]),
        ("paper", PAPER),
        ("paper-appendix", ["arc_challenge.jsonl", "arithmetic.jsonl", "ifeval.jsonl", "lambada.jsonl"]),
        ("dolly", ["dolly.jsonl"]),
    ],
)
def test_the_program_puts_files_where_eval_looks(get_data, tmp_path, capsys, name, files):
    program, fetched = get_data
    program([name])
    assert sorted(path.name for path in (tmp_path / "runs/data").iterdir()) == files
    assert sorted(capsys.readouterr().out.split()) == [f"runs/data/{file}" for file in files]
    program([name, name, "--out", "other"])  # converted once, copied as often as asked for
    assert (
        len(fetched) == len(files) and sorted(path.name for path in (tmp_path / "other").iterdir()) == files
    )
    source = "dolly" if name == "dolly" else files[0]
    assert (tmp_path / "other" / files[0]).read_text() == f"rows of {source}\n"


def test_the_program_puts_both_samples_there(get_data, tmp_path, monkeypatch, capsys):
    import get_data as program

    rows = {"a.json": conversations(10_900), "b.json": conversations(45_000)}
    monkeypatch.setattr(program, "rows_of_a_set", lambda repo: rows)
    get_data[0](["forgetting"])
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["runs/data/forgetting-reference.jsonl", "runs/data/forgetting-train.jsonl"]
    assert said[1] == "forgetting-train.jsonl is b.json of Aligh1380/forgetting-llm-dataset, 45,000 rows"
    lengths = [len((tmp_path / name).read_text().splitlines()) for name in said[-2:]]
    assert lengths == [10_900, 45_000]


def test_the_program_replaces_nothing_and_names_what_it_knows(get_data, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/boolq.jsonl").write_text("my own")
    for words, message in (
        (
            ["boolq", "--out", "mine"],
            "mine/boolq.jsonl is there and holds something else: move it away, or use another --out",
        ),
        (
            ["boolq", "mmlu", "mc"],
            "unknown mmlu, mc; known: truthfulqa, arithmetic, paper, paper-appendix, truthfulqa_mc1",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            get_data[0](words)
        said = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and said.startswith("get_data.py: ")
            and message in said
            and len(said.splitlines()) == 1
        )
    assert (tmp_path / "mine/boolq.jsonl").read_text() == "my own" and not (tmp_path / "runs").exists()


def test_every_benchmark_of_the_paper_has_a_public_home():
    """The names of get_data.py are eval.py's; only the tasks on a user's own rows have no home."""
    import get_data

    from eval import GROUPS, TASKS

    assert {name for name in TASKS if not get_data.benchmark_files(name)} <= {
        "mc",
        "qa",
        "demo_mc",
        "demo_qa",
    }
    assert all(set(tasks) <= TASKS.keys() for tasks in GROUPS.values())
    assert {file for name in GROUPS for file in get_data.benchmark_files(name)} == set(get_data.BENCHMARKS)
