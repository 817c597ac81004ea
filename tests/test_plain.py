"""plain.py, one sequence at a time, and forgetting.py, packed and weighted, are the same algorithm."""

from types import SimpleNamespace

import numpy as np
import plain
import pytest
import tiny
import torch
from safetensors.torch import load_file

import forgetting
from data import Tokenizer, encode_rows, read_rows, render_rows, split_rows
from lora import load_adapter
from model import load_model

WORDS = tiny.TEXT.split()
SETTINGS = {
    "rank": 4,
    "alpha": 8.0,
    "lr": 0.01,
    "epochs": 2,
    "batch_size": 5,
    "t_min": 0.1,
    "t_max": 0.9,
    "max_length": 60,
}


def flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Both programs, on one model and the same rows of unequal lengths: (inputs, run folder, what plain.py returned)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("plain")
    tiny.make_checkpoint(folder / "model", "llama3")
    rows = [
        {"instruction": f"Tell me {i} of {i * i}", "output": " ".join(WORDS[i : i + 2 + 3 * i % 11])}
        for i in range(24)
    ]
    for name, part in (("trusted", rows[:9]), ("rows", rows[9:])):
        (folder / f"{name}.jsonl").write_text(tiny.jsonl(part))
    given = ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]
    given += ["--reference-data", str(folder / "trusted.jsonl"), *flags(SETTINGS)]
    results = plain.main([*given, "--out", str(folder / "plain")])
    run = [
        *given,
        "--out",
        str(folder / "run"),
        "--methods",
        "full",
        "ignoring",
        "forgetting",
        "--dropout",
        "0",
    ]
    run += [
        "--reference-epochs",
        "2",
        "--rho",
        "0.7",
        "--micro-tokens",
        "100",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    forgetting.run(forgetting.parse_options(run))
    return folder, results


def same_adapter(one, other):
    """Every tensor of two adapter folders, to 1e-5."""
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=0, atol=1e-5), (
            name,
            (one[name] - other[name]).abs().max(),
        )
    return max(tensor.abs().max() for name, tensor in one.items() if "lora_B" in name)


def test_the_reference_is_the_same(both):
    folder, _ = both
    moved = same_adapter(folder / "plain" / "reference", folder / "run" / "reference")
    assert moved > 0.01  # lora_B begins at 0: both have learned something


def d_train_of(folder):
    """D_train and theta, as both programs read them."""
    tokenizer = Tokenizer(folder / "model")
    files = [str(folder / "rows.jsonl")], [str(folder / "trusted.jsonl")]
    (rows, trusted), _ = render_rows(list(map(read_rows, files)), tokenizer)
    d_train = split_rows(rows, trusted, None, None)[1]
    return encode_rows(d_train, tokenizer, SETTINGS["max_length"]), load_model(folder / "model")


def test_losses_threshold_and_sides_are_the_same(both):
    folder, (quality, threshold, positive, negative) = both
    scores = {name: x.numpy() for name, x in load_file(folder / "run" / "scores.safetensors").items()}
    corpus, model = d_train_of(folder)
    examples = plain.sequences_of(corpus)
    with torch.no_grad():
        base = torch.cat([plain.token_losses(model, *example) for example in examples])
        load_adapter(model, folder / "plain" / "reference")
        reference = torch.cat([plain.token_losses(model, *example) for example in examples])
    of_run = scores["base_loss"][corpus.response], scores["ref_loss"][corpus.response]
    assert np.allclose(base, of_run[0], atol=1e-5, rtol=0) and np.allclose(
        reference, of_run[1], atol=1e-5, rtol=0
    )
    assert torch.allclose(torch.cat(quality), base - reference, atol=1e-5, rtol=0)

    run_quality = forgetting.quality_scores(*of_run)
    sides = forgetting.partition(run_quality, 0.7)
    assert threshold == pytest.approx(run_quality[sides[0]].min(), abs=1e-5)
    assert np.array_equal(torch.cat(positive), sides[0]) and np.array_equal(torch.cat(negative), sides[1])
    assert 0 < sides[1].sum() < sides[0].sum() and not (sides[0] & sides[1]).any()


def test_the_trained_adapter_is_the_same(both):
    folder, _ = both
    same_adapter(folder / "plain" / "forgetting", folder / "run" / "forgetting" / "seed-0")


@pytest.mark.parametrize("method", ["full", "ignoring"])
def test_other_sets_are_the_other_methods(both, method):
    """plain.train with every token in P is `full`, and with none in N `ignoring`."""
    folder, (_, _, positive, negative) = both
    corpus, model = d_train_of(folder)
    nothing = [mask & False for mask in negative]
    sets = [~mask for mask in nothing] if method == "full" else positive
    plain.train(model, plain.sequences_of(corpus), sets, nothing, 0, SimpleNamespace(**SETTINGS))
    plain.save_adapter(model, folder / method, "tiny")
    same_adapter(folder / method, folder / "run" / method / "seed-0")
