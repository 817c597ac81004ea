"""Shared fixtures: where shared/ is, and tiny checkpoints made on the spot."""

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
