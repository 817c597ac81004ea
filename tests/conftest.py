"""Shared fixtures: where shared/ is, and tiny checkpoints made on the spot."""

import contextlib
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The embedded base model."""
    return ROOT / "tests" / "demo_model"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The team's shared folder with real rows and goldens; tests that need it skip where it is not."""
    folder = Path(os.environ.get("FORGETTING_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("needs ../shared (real rows and reference results), which is not beside this checkout")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under suite.py the largest files first: begun last, one of them would keep a single core busy."""
    if "FORGETTING_CLAIMS" in os.environ:
        items.sort(key=lambda item: -item.path.stat().st_size)


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Under suite.py a file that another process has begun is passed over: True says that it is dealt with."""
    folder = os.environ.get("FORGETTING_CLAIMS")
    if folder is None:
        return None
    claim = Path(folder, item.path.name)
    with contextlib.suppress(FileExistsError):
        with open(claim, "x") as file:
            file.write(str(os.getpid()))
    begun_elsewhere = claim.read_text() != str(os.getpid())
    return True if begun_elsewhere else None
