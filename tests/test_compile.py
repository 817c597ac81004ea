"""--compile on a CPU: the flash kernel's place is taken by a custom operator, everything around it is what a GPU runs."""

import pytest
import tiny
import torch
import torch.multiprocessing
from torch._dynamo.utils import counters
from torch.nn.attention import varlen as kernels

import forgetting
import model as transformer
from forgetting import Lesson, Options
from lora import add_lora, lora_disabled, lora_parameters, remove_lora
from model import load_model
from test_training import adapt, gradient_of, setting


def naive(q, k, v, cu, scale, grad=None):
    """Causal attention sequence by sequence, (T, H, K); with the output's gradient, those of q, k and v."""
    repeat = q.shape[1] // k.shape[1]
    results = []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist()):
        qs, ks, vs = (x[start:end].transpose(0, 1) for x in (q, k, v))  # (H or G, length, K)
        ks, vs = ks.repeat_interleave(repeat, 0), vs.repeat_interleave(repeat, 0)
        later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        weights = (scale * qs @ ks.transpose(1, 2)).masked_fill(later, -torch.inf).softmax(-1)
        if grad is None:
            results.append(((weights @ vs).transpose(0, 1),))
            continue
        g = grad[start:end].transpose(0, 1)
        on_weights = g @ vs.transpose(1, 2)
        on_scores = scale * weights * (on_weights - (on_weights * weights).sum(-1, keepdim=True))
        found = on_scores @ ks, on_scores.transpose(1, 2) @ qs, weights.transpose(1, 2) @ g
        summed = [found[0], *(x.unflatten(0, (-1, repeat)).sum(1) for x in found[1:])]
        results.append([x.transpose(0, 1) for x in summed])
    return [torch.cat(parts).contiguous() for parts in zip(*results)]


@torch.library.custom_op("forgetting_tests::varlen", mutates_args=())
def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cq: torch.Tensor, ck: torch.Tensor, scale: float) -> torch.Tensor:
    return naive(q, k, v, cq, scale)[0]


@varlen.register_fake
def _(q, k, v, cq, ck, scale):
    return torch.empty_like(q)


@torch.library.custom_op("forgetting_tests::varlen_backward", mutates_args=())
def varlen_backward(
    g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cq: torch.Tensor, ck: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(naive(q, k, v, cq, scale, g))


@varlen_backward.register_fake
def _(g, q, k, v, cq, ck, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx, grad):
    return *torch.ops.forgetting_tests.varlen_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


varlen.register_autograd(backward, setup_context=keep)


def kernel(q, k, v, cq, ck, longest_q, longest_k, *, scale, window_size, enable_gqa):
    return torch.ops.forgetting_tests.varlen(q, k, v, cq, ck, scale)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_are_the_eager_ones_in_few_graphs(tmp_path, monkeypatch, checkpointed):
    """Twenty packs of other lengths, adapter on and off: no break, at most four graphs, equal to 1e-5."""
    monkeypatch.setattr("model.flash_runs_on", lambda x: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    torch.manual_seed(0)
    folder = tiny.make_checkpoint(tmp_path, "llama3")
    eager, compiled = load_model(folder), load_model(folder)
    for model in (eager, compiled):
        add_lora(model, r=4, dropout=0.0, generator=torch.Generator().manual_seed(0))
        for parameter in lora_parameters(model).values():
            parameter.data += 0.02
        model.train()
        model.checkpoint_activations = checkpointed
    torch._dynamo.reset()
    counters.clear()
    compiled.compile_blocks(backend="eager" if checkpointed else "aot_eager")  # the backward pass too, once
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        lengths = torch.randint(2, 12, (int(torch.randint(2, 7, (), generator=draw)),), generator=draw)
        cu = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
        tokens = torch.randint(0, 90, (int(cu[-1]),), generator=draw)
        a, b = eager(tokens, cu), compiled(tokens, cu)
        assert torch.allclose(a, b, atol=1e-5)
        a.square().mean().backward()
        b.square().mean().backward()
        with torch.no_grad(), lora_disabled(eager), lora_disabled(compiled):
            assert torch.allclose(eager(tokens, cu), compiled(tokens, cu), atol=1e-5)
    for ours, theirs in zip(lora_parameters(compiled).values(), lora_parameters(eager).values()):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 4, counters


def test_compile_without_its_kernel_is_refused(tmp_path):
    model = load_model(tiny.make_checkpoint(tmp_path, "llama3"))
    with pytest.raises(ValueError, match="--compile needs a GPU"):
        model.compile_blocks()


def compiled_on_rank(rank, folder, store):
    """The gradient of one step on one of two ranks, with compiled blocks under DDP."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    transformer.flash_runs_on, kernels.varlen_attn = (lambda x: True), kernel
    model, corpus, signs = setting(folder)
    adapt(model)
    model.train().compile_blocks(backend="eager")
    counters.clear()
    torch.save(gradient_of(model, corpus, signs, 150), f"{store}.{rank}")
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 2, counters
    torch.distributed.destroy_process_group()


def test_compiled_blocks_under_ddp(tmp_path):
    """Two gloo ranks with compiled blocks, several packs each, against one process without."""
    model, corpus, signs = setting(tmp_path / "m")
    adapt(model)
    expected = gradient_of(model.train(), corpus, signs, 10_000)
    torch.multiprocessing.spawn(compiled_on_rank, (tmp_path / "m", str(tmp_path / "store")), nprocs=2)
    for rank in range(2):
        assert torch.allclose(torch.load(tmp_path / f"store.{rank}"), expected, atol=1e-5, rtol=1e-4)


def test_a_compiled_training_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """Stopped between two checkpoints and given again, it ends in the same bytes; names carry no mark of the compiler."""
    monkeypatch.setattr("model.flash_runs_on", lambda x: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    torch._dynamo.reset()
    model, corpus, signs = setting(tmp_path / "m")
    model.compile_blocks(backend="eager")
    options = Options(model="m", rank=4, batch_size=6, dropout=0.0, lr=1e-2, warmup=0.0, save_every=2)
    forgetting.train(model, Lesson(corpus, signs), tmp_path / "whole", options, seed=5)
    remove_lora(model)
    step_gradient = forgetting.step_gradient
    monkeypatch.setattr(forgetting, "save_adapter", lambda *_: 1 / 0)  # stopped after its last step
    with pytest.raises(ZeroDivisionError):
        forgetting.train(model, Lesson(corpus, signs), tmp_path / "stopped", options, seed=5)
    monkeypatch.undo()
    monkeypatch.setattr("model.flash_runs_on", lambda x: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    remove_lora(model)
    ran = []
    monkeypatch.setattr(forgetting, "step_gradient", lambda *rest: ran.append(1) or step_gradient(*rest))
    forgetting.train(model, Lesson(corpus, signs), tmp_path / "stopped", options, seed=5)
    whole, stopped = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert len(ran) == 2 and whole == stopped and b"_orig_mod" not in whole
