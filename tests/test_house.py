"""The house: what each of the five files may import, and how big its parts may be. Sources are read with ast, not run."""

import ast
import dataclasses
import graphlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

from forgetting import Options

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/tools"))
import density  # noqa: E402

LEAVES = {"model", "lora", "data"}
BELOW = dict.fromkeys(sorted(LEAVES), set()) | {
    "eval": LEAVES,
    "forgetting": LEAVES | {"eval"},
}  # what each may import of ours
PACKAGES = {
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "tqdm",
    "jinja2",
}  # the last two come along
EXTRAS = {
    "langdetect",
    "nltk",
    "pyarrow",
}  # optional: only inside a function, where what needs them is asked for
RUNNING = ("exec", "eval", "compile", "__import__")
HIDDEN = {"importlib", "runpy", "imp", "pkgutil", "zipimport"}  # ways to load a file that no reader sees
STANDARD = {"__future__", *sys.stdlib_module_names} - HIDDEN
MOST_PARAMETERS, WIDEST = 7, 110
TOP_LEVEL = {"README.md", "requirements.txt", "LICENSE", ".gitignore", ".ci", "run.sh", "tests", "findings"}
TOP_LEVEL |= {f"{name}.py" for name in BELOW}


def source_of(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """The first part of every imported name, and whether the import is inside a function."""
    inside = {id(node) for function in functions(tree) for node in ast.walk(function)}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += ["." * node.level + (node.module or "")] if isinstance(node, ast.ImportFrom) else []
        yield from ((name.partition(".")[0] or name, id(node) in inside) for name in names)


def functions(tree: ast.AST) -> list:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def hidden_ways(tree: ast.AST) -> Iterator[str]:
    """Calls that load or run what no import names, and strings that are a path below tests/."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RUNNING:
            yield f"line {node.lineno}: {node.func.id}()"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "sys.modules",
            "sys.path",
            "sys.meta_path",
        ):
            yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            # words with spaces between them are a docstring, or a message that names a command
            if " " not in node.value and re.search(r"(^|[/\\])tests([/\\]|$)", node.value):
                yield f"line {node.lineno}: the path {node.value!r}"


def faults(source: str, below: set[str]) -> list[str]:
    """What a file of the five must not do."""
    tree = ast.parse(source)
    found = [
        f"imports {name}"
        for name, inside in imports(tree)
        if name not in STANDARD | PACKAGES | below and not (inside and name in EXTRAS)
    ]
    several = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Import) and len(node.names) > 1]
    found += [f"line {line}: several imports" for line in several] + list(hidden_ways(tree))
    for function in functions(tree):
        arguments = function.args
        named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = (
            len([name for name in named if name not in ("self", "cls")])
            + bool(arguments.vararg)
            + bool(arguments.kwarg)
        )
        if count > MOST_PARAMETERS and named[:1] != ["ctx"]:  # autograd's forward is given what it is given
            found.append(f"{function.name} has {count} parameters")
    return found + [
        f"line {i} has {len(line)} columns"
        for i, line in enumerate(source.split("\n"), 1)
        if len(line) > WIDEST
    ]


@pytest.mark.parametrize("name", BELOW)
def test_a_file_of_the_five(name):
    assert faults(source_of(name), BELOW[name]) == []


def sections(source: str) -> list[str]:
    """The headings of a file, in order."""
    return re.findall(r"^# -{20,} (.+)$", source, re.MULTILINE)


def announced(source: str) -> list[str]:
    """The sections that a file's docstring names behind "Order:", without what brackets and clauses say of them."""
    (order,) = re.findall(
        r"^Order: (.+?)\.(?:\s|$)", ast.get_docstring(ast.parse(source)), re.MULTILINE | re.DOTALL
    )
    names = re.split(r"[,;|]\s+", re.sub(r"\s*\(.*?\)", "", " ".join(order.split())))
    return [name.strip() for name in names]


@pytest.mark.parametrize("name", BELOW)
def test_no_line_has_to_be_read_twice(name):
    """No limit on lines: where one bound, code was squeezed. Tokens a line of code are what is limited."""
    source = source_of(name)
    dense = {
        f: round(d, 1) for f, d in density.functions_of(source).items() if d >= density.MOST_IN_A_FUNCTION
    }
    assert dense == {}
    assert density.tokens_a_line(density.lines_of_tokens(source)) < density.MOST_IN_A_FILE


def test_density_counts_tokens_on_lines_of_code():
    source = '''"""Not counted."""\n\nx = 1  # nor this\n\n\ndef f(a):\n    "Nor this."\n    y = f"{a} {x}"\n    return y + x\n'''
    assert density.lines_of_tokens(source) == [3] * 3 + [6] * 6 + [8] * 3 + [9] * 4
    assert density.tokens_a_line(density.lines_of_tokens(source)) == 4
    longer = "def g():\n" + "    x = [1, 2]\n" * 4 + "    def h():\n        return 1\n"
    assert density.functions_of(source) == {} and list(density.functions_of(longer)) == ["g:1"]


@pytest.mark.parametrize("name", BELOW)
def test_the_docstring_names_the_sections_in_their_order(name):
    source = source_of(name)
    assert announced(source) == sections(source)


@pytest.mark.parametrize(
    "source, fault",
    [
        ("import transformers", "imports transformers"),
        ("from peft.utils import x", "imports peft"),
        ("import nltk", "imports nltk"),
        ("from . import data", "imports ."),
        ("from forgetting import run", "imports forgetting"),
        ("def f():\n    import look", "imports look"),
        ("import importlib.util", "imports importlib"),
        ("from runpy import run_path", "imports runpy"),
        ("import os, sys", "line 1: several imports"),
        ("exec('1')", "line 1: exec()"),
        ("x = __import__('demo')", "line 1: __import__()"),
        ("sys.path.insert(0, 'x')", "line 1: sys.path"),
        ("x = Path(y).parent / 'tests' / 'z.py'", "line 1: the path 'tests'"),
        ("x = f'{root}/tests/tools/look.py'", "line 1: the path '/tests/tools/look.py'"),
        ("def f(a, b, c, d, *, e, f, g, **h):\n    pass", "f has 8 parameters"),
        ("# " + "x" * 109, "line 1 has 111 columns"),
    ],
)
def test_each_fault_is_found(source, fault):
    assert faults(source, {"data"}) == [fault]


def test_what_is_allowed_is_no_fault():
    source = (
        '"""See tests/README.md."""\nimport os\nfrom data import pack\nx = f"python tests/tools/look.py {os.name}"\n'
        "def forward(ctx, a, b, c, d, e, f, g, h):\n    import nltk\n"
        "class A:\n    def f(self, a, b, c, d, e, f, g):\n        pass\n"
    )
    assert faults(source, {"data"}) == []


def edges() -> dict[str, set[str]]:
    """{file: the files of ours that it imports}, of the five, of plain.py and of the tools."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "tests" / "tools").glob("*.py"), ROOT / "tests" / "plain.py"]
    names = {path.stem for path in paths}
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in paths if path.is_file()}
    return {name: {found for found, _ in imports(tree)} & names for name, tree in trees.items()}


def test_no_circle_and_no_arrow_back_up():
    found = edges()
    assert len(found) >= 12 and found["look"] and found["demo"], "the tools are seen"
    graphlib.TopologicalSorter(found).prepare()  # raises CycleError, with the circle's names
    assert {name: found[name] - BELOW[name] for name in BELOW} == dict.fromkeys(BELOW, set())
    assert found["plain"] <= LEAVES, "plain.py reads the method with its own eyes"


def test_every_option_is_read():
    """Outside its declaration, of options by any name; a field that nothing reads is a dead flag."""
    tree = ast.parse(source_of("forgetting"))
    (declaration,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Options")
    declared = {id(node) for node in ast.walk(declaration)}
    attributes = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    ]
    of_options = [
        node for node in attributes if isinstance(node.value, ast.Name) and node.value.id.endswith("options")
    ]
    read = {node.attr for node in of_options if id(node) not in declared}
    assert {field.name for field in dataclasses.fields(Options)} - read == set()


def test_no_framework_is_imported():
    """The project and its tests live without high-level frameworks; goldens and peers' timings are made by hand."""
    frameworks = {"transformers", "peft", "accelerate", "trl", "datasets", "lightning", "pickle"}
    paths = [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py"), *(ROOT / "tests/tools").glob("*.py")]
    for path in paths:
        if path.parent.name != "tools" or not path.name.startswith(("make_", "bench")):
            assert (
                not {name for name, _ in imports(ast.parse(path.read_text(encoding="utf-8")))} & frameworks
            ), path
    assert {path.stem for path in ROOT.glob("*.py")} == set(BELOW)


def test_the_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    # findings/ comes when there is a finding
    assert {path.partition("/")[0] for path in listed.stdout.splitlines()} | {"findings"} == TOP_LEVEL
