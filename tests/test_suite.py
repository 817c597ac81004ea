"""./run.sh test: several pytests share the files, and nothing is run twice or left out."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import suite


def test_two_processes_share_the_files(tmp_path):
    """Every test runs in one of them; a failure is told, and counted."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    for name, count in (("a", 3), ("b", 2), ("c", 4)):
        lines = [f"def test_{i}(): assert {i} != 3" for i in range(count)]
        (tmp_path / f"test_{name}.py").write_text("import time; time.sleep(0.2)\n" + "\n".join(lines) + "\n")
    claims = tmp_path / "claims"
    claims.mkdir()
    environment = os.environ | {"FORGETTING_CLAIMS": str(claims)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
        for _ in range(2)
    ]
    texts = [run.communicate()[0] for run in runs]
    counts = sum(map(suite.counts_in, texts), Counter())
    assert (counts["passed"], counts["failed"]) == (8, 1), texts
    assert sorted(run.returncode for run in runs) == [0, 1]
    assert {path.name for path in claims.iterdir()} == {"test_a.py", "test_b.py", "test_c.py"}
    told = "\n".join(map(suite.more_than_dots, texts))
    assert "test_c.py" in told and "3 != 3" in told and "[100%]" not in told


def test_what_a_pytest_counts():
    text = "..s  [ 50%]\n....    [100%]\n1,549 things\n2 failed, 7 passed, 1 skipped, 3 warnings in 61.20s (0:01:01)\n"
    assert suite.counts_in(text) == {"failed": 2, "passed": 7, "skipped": 1, "warnings": 3}
    assert suite.more_than_dots(text) == "1,549 things"
    assert suite.counts_in("no tests ran in 0.01s") == {}


def test_a_pytest_that_was_killed_is_named(tmp_path):
    """Its tests were in nobody's count, and nothing on the screen said so."""
    run = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    run.wait()
    (tmp_path / "test_a.py").write_text(str(run.pid))
    assert "ended by signal 9" in suite.how_it_died(run, tmp_path)
    assert "test_a.py" in suite.how_it_died(run, tmp_path)


SLEEPS = "time.sleep(60)"
KEEPS_ON = """
    for _ in range(9):
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(60)
"""


@pytest.mark.parametrize(
    "number, body, words",
    [(signal.SIGTERM, SLEEPS, "1 passed"), (signal.SIGINT, KEEPS_ON, "ended by signal 9; ")],
    ids=["SIGTERM", "SIGINT that a test takes"],
)
def test_a_suite_that_is_stopped_leaves_nothing(tmp_path, number, body, words):
    """SIGTERM left every pytest running, and their folder; SIGINT that reached the parent alone was waited on."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    pids, claims = tmp_path / "pids", tmp_path / "claims"
    claims.mkdir()
    lines = [
        "import contextlib, os, subprocess, time",
        "def test_first(): pass",
        "def test_sleeps():",
        "    child = subprocess.Popen(['sleep', '60'])",
        f"    with open({str(pids)!r}, 'w') as file: file.write(f'{{os.getpid()}} {{child.pid}}.')",
        f"    {body}",
    ]
    (tmp_path / "test_a.py").write_text("\n".join(lines) + "\n")
    code = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import suite; suite.PATIENCE = 2; "
    code += "suite.TESTS = pathlib.Path(sys.argv[2]); suite.main()"
    command = [sys.executable, "-c", code, str(suite.TESTS), str(tmp_path)]
    environment = os.environ | {"TMPDIR": str(claims)}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    while not pids.is_file() or not pids.read_text().endswith("."):
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(number)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and not list(claims.iterdir())
    assert words in said
    for pid in pids.read_text().strip(".").split():
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
