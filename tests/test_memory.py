"""What a step may hold: nothing that grows with the vocabulary times the tokens, nor with the corpus. Counted, not timed."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import tiny
import torch
from test_training import LAM
from torch.utils._python_dispatch import TorchDispatchMode

from data import Corpus
from forgetting import Options, partition, response_losses, step_gradient
from lora import add_lora
from model import head_chunks, load_model, token_losses

VOCABULARY = 128_256  # LLaMA 3's


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returns, and the sum of all, in bytes."""

    largest = total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.nbytes)
                self.total += tensor.nbytes
        return result


def corpus_of(examples: int, length: int = 64) -> Corpus:
    """Examples of equal length with random tokens, three quarters of them response."""
    tokens = np.random.default_rng(0).integers(0, 96, (examples, length)).astype(np.int32)
    response = np.tile(np.arange(length) >= length // 4, examples)
    return Corpus(tokens.ravel(), response, np.arange(examples + 1) * length, [""] * examples, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = load_model(tiny.make_checkpoint(tmp_path_factory.mktemp("memory"), "llama3"))
    add_lora(model, r=4)
    return model


def step(model, corpus: Corpus) -> Callable[[], object]:
    signs = np.where(corpus.response, np.where(np.arange(len(corpus.tokens)) % 3, 1, -1), 0).astype(np.int8)
    options = Options(micro_tokens=100_000)
    return lambda: step_gradient(model, corpus, signs, np.arange(24), LAM, options)


def test_no_tensor_has_a_row_per_token_and_a_column_per_word(model):
    """16,384 tokens and LLaMA 3's vocabulary: logits of all would be 8.4 GB, a chunk's are 263 MB."""
    hidden, targets = torch.zeros(16_384, 8), torch.zeros(16_384, dtype=torch.int64)
    with Largest() as seen:
        token_losses(hidden, torch.zeros(VOCABULARY, 8), targets)
    assert seen.largest == 512 * VOCABULARY * 4
    chunks = [
        logprobs.data_ptr()
        for _, logprobs, _ in head_chunks(hidden[:2048], torch.zeros(VOCABULARY, 8), targets[:2048])
    ]
    assert len(chunks) == 4 and len(set(chunks)) == 1, "all chunks share one buffer"


@pytest.mark.parametrize("job", ["train", "score"])
def test_a_step_does_not_grow_with_the_vocabulary_times_the_tokens(model, job):
    """The same 24 examples of 64 and of 256 tokens, with a head of 20,000 words: no tensor exceeds a chunk of the head."""
    small = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(torch.randn(20_000, small.shape[1]), requires_grad=False)
    for length in (64, 256):
        corpus = corpus_of(24, length)
        with Largest() as seen:
            if job == "train":
                step(model, corpus)()
            else:
                response_losses(model, corpus, np.arange(24), 100_000, "losses")
        assert seen.largest <= 512 * 20_000 * 4, f"{24 * length} tokens"
    model.lm_head.weight = small


def test_a_step_does_not_grow_with_the_corpus(model):
    """24 examples out of 24, and out of 50,000: the same tensors, and the same arrays beside them."""
    figures = []
    for examples in (24, 50_000):
        run = step(model, corpus_of(examples))
        run()
        tracemalloc.start()
        with Largest() as seen:
            run()
        figures.append((seen.total, tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
    assert figures[0][0] == figures[1][0]
    assert figures[1][1] < figures[0][1] + 1e5, "numpy's arrays are those of the step's examples"


def test_the_partition_holds_one_copy_of_the_scores():
    """Twenty million scores take 80 MB; the copy that is selected in and four masks take less than 0.2 GB."""
    quality = np.random.default_rng(0).standard_normal(20_000_000, dtype=np.float32)
    tracemalloc.start()
    positive, negative = partition(quality, 0.7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert positive.sum() == 14_000_001 and not (positive & negative).any() and peak < 0.2e9
