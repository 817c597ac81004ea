"""--compile on a CPU: a plain loop takes the flash kernel's place, everything around it is what a GPU runs."""

import pytest
import tiny
import torch
from torch._dynamo.utils import counters

from lora import add_lora, lora_disabled, lora_parameters
from model import load_model


def attention(q, k, v, cu, scale):
    """Causal attention sequence by sequence: q (T, H, K), k and v (T, G, K) -> (T, H, K)."""
    outputs = []
    for start, end in zip(cu.tolist(), cu.tolist()[1:]):
        part = (x[None, start:end].transpose(1, 2) for x in (q, k, v))  # (1, H or G, length, K)
        grouped = {"is_causal": True, "scale": scale, "enable_gqa": True}
        outputs.append(torch.nn.functional.scaled_dot_product_attention(*part, **grouped)[0].transpose(0, 1))
    return torch.cat(outputs)


@torch.library.custom_op(
    "forgetting_tests::varlen", mutates_args=()
)  # one opaque call for the compiler, as the kernel is
def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, scale: float) -> torch.Tensor:
    return attention(q, k, v, cu, scale)


def keep(ctx, inputs, output):
    ctx.inputs = inputs


def backward(ctx, grad):
    qkv = [x.detach().requires_grad_() for x in ctx.inputs[:3]]
    with torch.enable_grad():
        return *torch.autograd.grad(attention(*qkv, *ctx.inputs[3:]), qkv, grad), None, None


varlen.register_fake(lambda q, k, v, cu, scale: torch.empty_like(q))
varlen.register_autograd(backward, setup_context=keep)


def kernel(q, k, v, cu_q, cu_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
    return varlen(q, k, v, cu_q, scale)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_are_the_eager_ones_in_few_graphs(tmp_path, monkeypatch, checkpointed):
    """Ten packs of other lengths, adapter on and off: no break, at most four graphs, equal to 1e-5, gradients too."""
    monkeypatch.setattr("model.flash_runs_on", lambda x: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    folder, draw = tiny.make_checkpoint(tmp_path, "llama3"), torch.Generator().manual_seed(1)
    eager, compiled = load_model(folder), load_model(folder)
    for model in (eager, compiled):
        add_lora(model, r=4, dropout=0.0, generator=torch.Generator().manual_seed(0))
        for parameter in lora_parameters(model).values():
            parameter.data += 0.02  # B = 0 would give A no gradient
        model.train().checkpoint_activations = checkpointed
    torch._dynamo.reset()
    counters.clear()
    compiled.compile_blocks(backend="eager")
    for _ in range(10):
        lengths = torch.randint(2, 12, (int(torch.randint(2, 7, (), generator=draw)),), generator=draw)
        cu = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
        tokens = torch.randint(0, 90, (int(cu[-1]),), generator=draw)
        with torch.no_grad(), lora_disabled(eager), lora_disabled(compiled):
            assert torch.allclose(eager(tokens, cu), compiled(tokens, cu), atol=1e-5)
        hidden = [model(tokens, cu) for model in (eager, compiled)]
        assert torch.allclose(*hidden, atol=1e-5)
        sum(x.square().mean() for x in hidden).backward()
    for ours, theirs in zip(lora_parameters(compiled).values(), lora_parameters(eager).values()):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    assert not counters["graph_break"] and 2 <= counters["stats"]["unique_graphs"] <= 4, counters


def test_compile_without_its_kernel_is_refused(tmp_path):
    model = load_model(tiny.make_checkpoint(tmp_path, "llama3"))
    with pytest.raises(ValueError, match="--compile needs a GPU"):
        model.compile_blocks()
