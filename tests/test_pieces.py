"""The pieces that README offers to copy work where they are copied to."""

import ast
from pathlib import Path

import torch
import torch.nn.functional as F

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
