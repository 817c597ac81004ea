"""How dense the code is: names, numbers, strings and operators on a line of code, by file and by function.

    python tests/tools/density.py                    # the five files, as tests/README.md has them
    python tests/tools/density.py tests/plain.py     # any others

A line that holds much has to be read twice. Docstrings, comments and blank lines do not count; a string, an f-string
too, is one token. A function counts by its body, where that has five lines of code or more.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ("forgetting.py", "model.py", "lora.py", "data.py", "eval.py")
MOST_IN_A_FILE, MOST_IN_A_FUNCTION = 10, 15
KINDS = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP)


def lines_of_tokens(source: str) -> list[int]:
    """The line on which each token of the code begins."""
    docstrings = lines_of_docstrings(ast.parse(source))
    f_string_starts = getattr(tokenize, "FSTRING_START", None)  # Python 3.12 reads the parts of an f-string
    f_string_ends = getattr(tokenize, "FSTRING_END", None)
    lines = []
    inside = 0  # how many f-strings we are in
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type == f_string_ends:
            inside -= 1
            continue
        starts = token.type == f_string_starts
        if inside == 0 and line not in docstrings and (starts or token.type in KINDS):
            lines.append(line)
        inside += starts
    return lines


def lines_of_docstrings(tree: ast.AST) -> set[int]:
    """Every line of a docstring of the module, a class or a function."""
    found: set[int] = set()
    for node in ast.walk(tree):
        owner = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if owner and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            found |= set(range(text.lineno, text.end_lineno + 1))
    return found


def tokens_a_line(lines: list[int]) -> float:
    """Tokens over lines of code; 0 where there are none."""
    return len(lines) / len(set(lines)) if lines else 0.0


def functions_of(source: str) -> dict[str, float]:
    """{name:line of a function: tokens a line of its body}; one inside another belongs to the outer one."""
    lines = lines_of_tokens(source)
    found = {}
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
            continue
        body = [line for line in lines if node.body[0].lineno <= line <= node.end_lineno]
        if len(set(body)) >= 5:
            found[f"{node.name}:{node.lineno}"] = tokens_a_line(body)
    return found


def main() -> None:
    """The command line."""
    paths = [Path(name) for name in sys.argv[1:]] or [ROOT / name for name in FILES]
    print(
        "| file | lines | of code | tokens | tokens a line | densest function |\n| --- | --- | --- | --- | --- | --- |"
    )
    for path in paths:
        source = path.read_text(encoding="utf-8")
        lines = lines_of_tokens(source)
        by_density = functions_of(source)
        densest = max(by_density, key=by_density.get, default="")
        cells = [path.name, source.count("\n"), len(set(lines)), len(lines), f"{tokens_a_line(lines):.1f}"]
        cells.append(f"{densest} {by_density[densest]:.1f}" if densest else "")
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
