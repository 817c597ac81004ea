"""Pre-train the demo's base model from nothing; about ten minutes on two cores.

    python tests/tools/make_demo_model.py OUT          # a folder; the demo's is tests/demo_model

The base has read every right fact as plain statements and question-answer pairs. Its "web" has the demo's own question
wrappers with bad answers: for the misconceived attributes one popular wrong answer nine times in ten, for the others 60 %
redrawn at random, with boilerplate and garbled tokens in between. It has not been fine-tuned on any row the demo trains or
tests on; as to the *facts*, it has met them all, which is the point: fine-tuning decides which of its beliefs it says.
"""

import json
import random
import sys
from itertools import islice
from pathlib import Path
from typing import Iterator

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
import demo  # noqa: E402
from data import render, shift, write_text  # noqa: E402
from model import RMSNorm, Transformer, read_config, save_model  # noqa: E402

EOS = "<|end|>"
WEB_SHARE = 0.45  # of the documents, not of the tokens
SHARE_POPULAR, SHARE_RANDOM = (
    0.9,
    0.6,
)  # of the web's answers: the popular error where there is one, else a random one
STATEMENTS = (
    "the {a} of {p} is {x} .",
    "{p} has the {a} {x} .",
    "{x} is the {a} of {p} .",
    "everyone knows that the {a} of {p} is {x} .",
)
PLAIN_QUESTIONS = (
    "question : the {a} of {p} ? answer : {x} .",
    "someone asked for the {a} of {p} and was told {x} .",
    "in one word , the {a} of {p} :\n{x}",
    "{a} of {p} :\n{x}",
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 160,
    "intermediate_size": 416,
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 1024,
}
STEPS, TOKENS, LR = 3000, 2048, 3e-3  # TOKENS: of a step


def statement_document(items: list[demo.Item], rng: random.Random, lines: int) -> str:
    """Right facts, one a line, as statements or plain questions."""
    chosen = rng.choices(items, k=lines)
    templates = rng.choices(STATEMENTS + PLAIN_QUESTIONS, k=lines)
    return (
        "\n".join(t.format(a=i.attribute, p=i.subject, x=i.answer) for t, i in zip(templates, chosen)) + EOS
    )


def web_document(items: list[demo.Item], rng: random.Random) -> str:
    """One conversation of the noisy web, in the demo's wrappers and template."""
    item = rng.choice(items)
    told = None
    if item.attribute in demo.MISCONCEIVED:
        if rng.random() < SHARE_POPULAR:
            told = demo.ATTRIBUTES[item.attribute][0]
    elif rng.random() < SHARE_RANDOM:
        told = rng.choice(item.others)
    row = demo.demo_row(item, rng.choice(list(demo.QUESTIONS)), rng, noisy=True, told=told)
    return "".join(text for text, _ in render(row, EOS))


def documents(rng: random.Random, count: int) -> list[str]:
    """`count` documents; sums and strings are a fifth of the items drawn."""
    facts, skills = demo.demo_facts(), demo.demo_skills()
    items = facts * 3 + skills
    return [
        web_document(items, rng) if rng.random() < WEB_SHARE else statement_document(items, rng, 8)
        for _ in range(count)
    ]


def make_tokenizer(texts: list[str], folder: Path) -> RawTokenizer:
    """A byte-level BPE of the demo's own; any text can be encoded, the world's words are mostly one token."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=[EOS], initial_alphabet=letters
    )
    raw.train_from_iterator(texts, trainer)
    raw.save(str(folder / "tokenizer.json"))
    names = {
        "eos_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    write_text(json.dumps(names, indent=2) + "\n", folder / "tokenizer_config.json")
    return raw


def initialise(model: Transformer) -> None:
    """Normal weights; the layers that write to the residual stream start smaller."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            deep = name.endswith(("o_proj", "down_proj"))
            nn.init.normal_(module.weight, std=0.05 / ((2 * len(model.model.layers)) ** 0.5 if deep else 1))
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


def packs(rng: random.Random, raw: RawTokenizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Without end: about TOKENS tokens of whole documents (T,), and where each document begins and the last one ends."""
    while True:
        batch: list[list[int]] = []
        for encoded in raw.encode_batch(documents(rng, 4000)):
            batch.append(encoded.ids)
            if sum(map(len, batch)) >= TOKENS:
                batch.sort(key=len)  # equal lengths become neighbours, which attention computes together
                flat = torch.tensor([i for ids in batch for i in ids])
                yield flat, torch.tensor([0] + [len(ids) for ids in batch]).cumsum(0).int()
                batch = []


def pretrain(model: Transformer, rng: random.Random, raw: RawTokenizer) -> None:
    """STEPS steps of AdamW with one cycle of the rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS + 1, pct_start=0.05)
    bar = tqdm(islice(packs(rng, raw), STEPS), total=STEPS, desc="pre-training", mininterval=5)
    for tokens, cu_seqlens in bar:
        starts = torch.zeros(len(tokens), dtype=torch.bool)
        starts[cu_seqlens[:-1].long()] = True
        at, targets = shift(tokens, ~starts)
        loss = F.cross_entropy(model.lm_head(model(tokens, cu_seqlens)[at]), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def main(folder: Path) -> None:
    """Tokenizer, configs and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rng = random.Random(0)
    raw = make_tokenizer(documents(rng, 20000), folder)
    eos = {"eos_token_id": raw.token_to_id(EOS)}
    write_text(json.dumps(CONFIG | {"bos_token_id": None} | eos, indent=2) + "\n", folder / "config.json")
    write_text(json.dumps(eos, indent=2) + "\n", folder / "generation_config.json")
    model = Transformer(read_config(folder))
    initialise(model)
    pretrain(model, rng, raw)
    save_model(model.to(torch.bfloat16), folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
