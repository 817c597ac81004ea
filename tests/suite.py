"""The whole suite, on every core that may be used: ./run.sh test.

One pytest a core, of one thread; each takes the next file that no other has begun (conftest.py), the longest first.
`./run.sh test WORDS` is a single pytest with these words.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
from data import progress, usable_cores  # noqa: E402

MOST = 8  # processes: more would wait for the longest file
PATIENCE = 10  # seconds for a pytest that was interrupted to say what it has found


def start(folder: Path, number: int) -> subprocess.Popen:
    """One of the processes, which claim test files in this folder; what it prints is NUMBER.log there.

    It leads a group of its own, so that Ctrl-C in a terminal reaches it, and what its tests start, through stop()
    alone.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FORGETTING_CLAIMS": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    with open(folder / f"{number}.log", "wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, process_group=0
        )


def interrupt(number: int, _: object) -> None:
    """A signal becomes Ctrl-C, once: `timeout` sends its own twice."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def stop(runs: list[subprocess.Popen]) -> None:
    """Interrupt those that still run, and kill them where a test has taken the interrupt for its own."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would end this function, and not the pytests
    running = [run for run in runs if run.poll() is None]
    for run in running:
        os.killpg(run.pid, signal.SIGINT)
    latest = time.monotonic() + PATIENCE
    for run in running:
        try:
            run.wait(max(latest - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


def counts_in(text: str) -> Counter:
    """{"passed": 12, ...}: what the last line of a pytest counts."""
    last = text.rstrip().rpartition("\n")[2]
    return Counter({word: int(count) for count, word in re.findall(r"(\d+) ([a-z]+)", last)})


def more_than_dots(text: str) -> str:
    """What a pytest says beside its dots and its last line: failures, errors, warnings."""
    lines = text.rstrip().split("\n")[:-1]
    return "\n".join(line for line in lines if not re.fullmatch(r"[.sxXFE]*( *\[ *\d+%\])?", line))


def how_it_died(run: subprocess.Popen, folder: Path) -> str:
    """A line on a pytest that a signal has ended, "" on others: what it has not run is in nobody's count."""
    if run.returncode >= 0:
        return ""
    files = [path.name for path in folder.glob("*.py") if path.read_text() == str(run.pid)]
    return (
        f"a pytest was ended by signal {-run.returncode}; its files, of which not all may have run: {files}"
    )


def main() -> None:
    """Exit code 0 if all of them passed, 1 if not, 130 if somebody stopped them."""
    files = len(list(TESTS.glob("test_*.py")))
    began = time.perf_counter()
    stopped = False
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, interrupt)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = []
        try:
            for number in range(min(usable_cores(), MOST)):
                runs.append(start(folder, number))
            with progress("test files", files, "files", keep=True) as bar:
                while at_work := sum(run.poll() is None for run in runs):
                    time.sleep(0.5)
                    begun = len(list(folder.glob("*.py")))
                    bar.update(max(begun - at_work, bar.n) - bar.n)
                bar.update(files - bar.n)
        except KeyboardInterrupt:
            stopped = True
        finally:
            stop(runs)
        ended = [line for run in runs if (line := how_it_died(run, folder))]
        texts = [path.read_text(errors="replace") for path in sorted(folder.glob("*.log"))]
    total = sum(map(counts_in, texts), Counter())
    print("\n".join(filter(None, [*map(more_than_dots, texts), *ended])))
    seconds = time.perf_counter() - began
    print(", ".join(f"{count} {word}" for word, count in total.items()) + f" in {seconds:.0f}s")
    sys.exit(130 if stopped else int(any(run.returncode for run in runs)))


if __name__ == "__main__":
    main()
