"""Answer a mistyped flag, and Ctrl-C, at once: torch, which the programs load before they parse, takes seconds.

    python tests/tools/check_flags.py forgetting.py --epoch 2     # exit code 2, and one line

Flags are read off the sources: fields of Options, and texts that look like a flag. forgetting.py, eval.py and run.sh begin
with it; whatever else can be wrong, their own parsers say.
"""

import ast, os, re, signal, sys  # noqa: E401
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def known_flags(program: str) -> set[str]:
    """Every flag of a program; those of forgetting.py are fields of its Options, or the demo's own."""
    names = {"forgetting.py": ("forgetting.py", "tests/tools/demo.py"), "eval.py": ("eval.py",)}[program]
    flags = {"--help"}
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8")
        flags |= set(re.findall(r'"(--[a-z][a-z-]*)"', text))
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name == "Options":
                fields = [field.target.id for field in node.body if isinstance(field, ast.AnnAssign)]
                flags |= {f"--{field.replace('_', '-')}" for field in fields}
    return flags


def stop_in_one_line(*_: object) -> None:
    """What Ctrl-C does until the program's main has its own answer: imports would end in a traceback."""
    if os.environ.get("RANK", "0") == "0":
        print("\nstopped while loading", file=sys.stderr, flush=True)
    os._exit(130)


def check_flags(program: str, words: list[str]) -> None:
    """End the program if one of its words is a flag that it does not have."""
    signal.signal(signal.SIGINT, stop_in_one_line)
    if program in ("forgetting.py", "eval.py"):
        flags = [word for word in words if re.match(r"--|-[a-zA-Z]", word) and word != "-h"]  # no number has a letter there
        unknown = [word for word in flags if word.partition("=")[0] not in known_flags(program)]
        if unknown:
            print(f"{program}: unrecognized arguments: {' '.join(unknown)} (--help lists the flags)", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    check_flags(Path(sys.argv[1]).name, sys.argv[2:])
elif "program" in globals():  # run by a program that has just begun
    check_flags(program, sys.argv[1:])  # noqa: F821
