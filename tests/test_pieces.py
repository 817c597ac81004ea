"""The pieces that README offers to copy work where they are copied to."""

import ast
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

from forgetting import partition

ROOT = Path(__file__).resolve().parent.parent
DEFINITIONS = {
    "forgetting.py": ("token_weights", "weighted_token_loss", "weighted_and_token_losses"),
    "model.py": ("WeightedTokenLoss", "head_chunks", "float32_product"),
}
IMPORTS = "from __future__ import annotations\nimport torch\nfrom torch import Tensor\nfrom typing import Iterator\n"


def copied() -> dict:
    """A module of the definitions that README names, and of the imports that it names, alone."""
    source = IMPORTS
    for name, wanted in DEFINITIONS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if getattr(node, "name", None) in wanted:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                source += "\n\n" + "\n".join(text.split("\n")[first - 1 : node.end_lineno]) + "\n"
    module: dict = {}
    exec(compile(source, "copied.py", "exec"), module)
    return module


def test_the_loss_is_six_definitions_and_three_imports():
    """Equation 8 and its gradient, from the copied pieces alone."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for names in DEFINITIONS.values() for name in names)
    module = copied()
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 4, requires_grad=True), torch.randn(11, 4)
    targets, positive = torch.randint(0, 11, (9,)), torch.rand(9) < 0.6
    weights = module["token_weights"](positive, ~positive, 0.2)
    loss = module["weighted_token_loss"](hidden, head, targets, weights)
    losses = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    plain = losses[positive].mean() - 0.2 * losses[~positive].mean()
    assert torch.allclose(loss, plain, atol=1e-6)
    (gradient,) = torch.autograd.grad(plain, hidden)
    loss.backward()
    assert torch.allclose(hidden.grad, gradient, atol=1e-6)

    hidden.grad = None  # DFT: every weight times its token's probability
    module["weighted_token_loss"](hidden, head, targets, weights, powers=(1.0, 1.0)).backward()
    losses = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    (gradient,) = torch.autograd.grad((weights * torch.exp(-losses).detach() * losses).sum(), hidden)
    assert torch.allclose(hidden.grad, gradient, atol=1e-6)


def test_the_labels_for_other_trainers_are_p_and_n(tmp_path, monkeypatch):
    """README's lines on scores.safetensors, run as they stand: P alone, and both sets for the loop below them."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, pieces = readme.partition("## Pieces to copy")
    lines = pieces[pieces.index("    import numpy") :].splitlines()
    code = [line[4:] for line in lines[: lines.index("")]]

    rng = np.random.default_rng(0)
    base_loss = np.where(np.arange(12) % 4, rng.random(12), np.nan).astype(
        np.float32
    )  # a quarter is questions
    arrays = {"base_loss": base_loss, "ref_loss": rng.random(12).astype(np.float32)}
    arrays |= {"tokens": np.arange(12, dtype=np.int32), "offsets": np.array([0, 4, 7, 12])}
    (tmp_path / "runs/mine").mkdir(parents=True)
    save_file(arrays, tmp_path / "runs/mine/scores.safetensors")
    monkeypatch.chdir(tmp_path)
    copied: dict = {}
    exec("\n".join(code), copied)

    judged = np.isfinite(base_loss)
    positive, negative = np.zeros(12, bool), np.zeros(12, bool)
    positive[judged], negative[judged] = partition((base_loss - arrays["ref_loss"])[judged], 0.7)
    wanted = [
        np.arange(12),
        np.where(judged, np.arange(12), -100),
        positive,
        np.where(positive, np.arange(12), -100),
    ]
    assert negative.any() and len(copied["rows"]) == len(wanted)
    for by_row, whole in zip(copied["rows"], wanted):
        assert np.array_equal(np.concatenate(by_row), whole) and [len(row) for row in by_row] == [4, 3, 5]
