"""The CUDA path without a GPU: run on fake CUDA tensors, every operation counted and priced as on an H100.

    python tests/tools/gpu_check.py --dry          # in an environment with torch's CUDA build; about a minute

Fake tensors have shapes, dtypes and a device, and no values: a CPU tensor that meets a CUDA one, a wrong dtype
or a wrong argument fails here as it would there, and whatever makes the host wait for the GPU is listed with its
line. An operation takes the longer of its FLOPs at the peak rate and its bytes at the memory's rate. That is a
model: believe the ratios, not the last digit. What it needs: torch's CUDA build (what pip installs on a machine
with a GPU; the CPU build has no CUDA autograd) and `cc`, for two symbols that stand in for the missing driver.
"""

import dataclasses, os, subprocess, sys, tempfile, weakref  # noqa: E401
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import eval as evaluation  # noqa: E402
import tiny  # noqa: E402
from data import Corpus  # noqa: E402
from forgetting import Lesson, Options, step_gradient  # noqa: E402
from lora import add_lora, lora_disabled, lora_parameters  # noqa: E402
from model import DTYPES, FAMILIES, Transformer  # noqa: E402

# an H100 SXM: what its data sheet says, times the share that good kernels reach
BYTES_PER_SECOND = 3.35e12 * 0.85
PEAK = 989e12  # bfloat16, what MFU is a share of
FLOPS_PER_SECOND = {torch.bfloat16: PEAK * 0.75, torch.float32: 67e12 * 0.8}
ATTENTION_FORWARD, ATTENTION_BACKWARD = PEAK * 0.5, PEAK * 0.4

LLAMA_1B = {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
            "tie_word_embeddings": True, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0}  # fmt: skip

# operations that move nothing: views, and memory that is only set aside
FREE = {"device", "view", "_unsafe_view", "t", "transpose", "expand", "slice", "split", "split_with_sizes", "select",
        "unsqueeze", "squeeze", "permute", "detach", "alias", "as_strided", "unbind", "_reshape_alias", "unfold", "empty", "lift_fresh",
        "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense"}  # fmt: skip
PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "addmm_": 1, "addmv": 1, "baddbmm": 1}  # first factor
FILLS = {"zero_", "fill_", "zeros", "zeros_like", "ones", "full", "full_like", "ones_like", "arange", "bernoulli_",
         "new_zeros", "new_full", "scalar_tensor"}  # fmt: skip  # they write and do not read
LOOKUPS = {"embedding", "index", "index_select", "gather"}  # they read only what they return
STORES = {"index_put_", "_index_put_impl_", "index_put", "index_add_", "scatter_add_"}  # they touch only the values' places
# what torch.compile leaves as kernels of their own; all else between two of them becomes one
SOLID = set(PRODUCTS) | LOOKUPS | STORES | {"bernoulli_", "cat"}


# ------------------------------------------------------------------------------------------ a GPU that is not there


def pretend_driver() -> None:
    """Start this program again with the two symbols that the autograd engine asks a driver's presence with.

    Raises ValueError where torch was built without CUDA or no C compiler is there.
    """
    if not torch.version.cuda:
        raise ValueError(f"--dry needs torch's CUDA build (no GPU, no driver): torch {torch.__version__} is built without")
    if os.environ.get("FORGETTING_PRETEND_DRIVER"):
        return
    source = ("short _ZN2at11accelerator14getAcceleratorEb(_Bool b) { return 0; }\n"
              "_Bool _ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE(signed char t) { return 0; }\n")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "driver.c").write_text(source)
        library = Path(folder) / "driver.so"
        try:
            command = ["cc", "-shared", "-fPIC", "-o", str(library), str(Path(folder) / "driver.c")]
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(f"--dry needs a C compiler ({error})") from None
        environment = os.environ | {"LD_PRELOAD": str(library), "FORGETTING_PRETEND_DRIVER": "1"}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)


@dataclasses.dataclass
class Op:
    """One operation on the device."""

    name: str
    flops: float
    bytes: int
    dtype: torch.dtype | None  # of a product's factors
    reads: list[tuple]  # (value, bytes): a value is a storage and how often it was written before
    writes: list[tuple]
    attention: bool

    @property
    def seconds(self) -> float:
        """The longer of arithmetic and memory traffic."""
        rate = FLOPS_PER_SECOND.get(self.dtype, FLOPS_PER_SECOND[torch.bfloat16])
        if self.attention:
            rate = ATTENTION_BACKWARD if "backward" in self.name else ATTENTION_FORWARD
        return max(self.flops / rate, self.bytes / BYTES_PER_SECOND)


class FakeCuda(TorchDispatchMode):
    """Inside, CPU tensors are real and "cuda" tensors are fake; operations on those are counted."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=False)
        self.ops: list[Op] = []
        self.waits: Counter[str] = Counter()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.versions: Counter[int] = Counter()
        self.before: list[tuple] = []

    def __enter__(self):
        torch._C._ensureCUDADeviceGuardSet()

        def pinned(x: Tensor) -> Tensor:  # there is no pinned memory without a driver
            x = x.clone()
            x.is_pinned_copy = True
            return x

        def tolist(x: Tensor) -> list:
            self.wait("tolist")
            return torch.ones(x.shape).to(x.dtype).tolist()

        patches = [(torch.cuda, "_lazy_init", lambda: None), (torch.Tensor, "pin_memory", pinned),
                   (torch.cuda, "get_device_capability", lambda device: (9, 0)), (FakeTensor, "tolist", tolist)]  # fmt: skip
        for owner, name, value in patches:
            self.before.append((owner, name, owner.__dict__.get(name)))
            setattr(owner, name, value)
        return super().__enter__()

    def __exit__(self, *error: object):
        for owner, name, value in self.before:
            delattr(owner, name) if value is None else setattr(owner, name, value)
        return super().__exit__(*error)

    def wait(self, what: str) -> None:
        """Note that the host waits for the device, and which line of ours asked for it."""
        frame = sys._getframe(1)
        while frame is not None and (Path(frame.f_code.co_filename).parent != ROOT):
            frame = frame.f_back
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "torch"
        self.waits[f"{what} at {line}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        device = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if not fakes and device != "cuda":
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.wait("item")
            return True if tensors[0].dtype == torch.bool else 1
        if name == "_to_copy" and fakes and device == "cpu":
            self.wait("copy to the CPU")
            return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        real = [x for x in tensors if not isinstance(x, FakeTensor) and x.device.type == "cpu"]
        if name in ("_to_copy", "copy_") and real:
            if not (getattr(real[0], "is_pinned_copy", False) and kwargs.get("non_blocking")):
                self.wait("copy of pageable memory")
        elif real and not all(x.dim() == 0 for x in real):
            raise RuntimeError(f"{name}: a CPU tensor of shape {tuple(real[0].shape)} meets tensors on cuda")
        with self.fake:
            args, kwargs = tree_map_only(Tensor, self.as_fake, (args, kwargs))
            result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, FakeTensor)]
        self.hold(outputs)
        if name not in FREE and not (name == "_to_copy" and real):
            self.count(name, args, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)], outputs)
        return result

    def as_fake(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)

    def hold(self, tensors: list[Tensor]) -> None:
        """Count the memory of new storages, until they are freed."""
        for x in tensors:
            storage = x.untyped_storage()
            key = storage._cdata
            if x.device.type == "cuda" and key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.live += self.sizes[key]
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.release, key)

    def release(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)
        self.versions[key] += 1  # the next storage at this address is another value

    def value(self, x: Tensor) -> tuple:
        key = x.untyped_storage()._cdata
        return key, self.versions[key]

    def count(self, name: str, args: tuple, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """FLOPs and bytes of one operation."""
        flops, dtype = 0.0, None
        if name in PRODUCTS:
            factor = args[PRODUCTS[name]]
            flops, dtype = 2.0 * outputs[0].numel() * factor.shape[-1], factor.dtype
        moved = sum(map(size, unique(inputs))) + sum(map(size, outputs))
        if name in FILLS:
            moved = size(outputs[0])
        elif name in LOOKUPS:
            moved = 2 * size(outputs[0]) + sum(map(size, inputs[1:]))
        elif name in STORES:
            moved = 3 * size(inputs[-1]) + sum(map(size, inputs[1:-1]))
        reads = [(self.value(x), size(x)) for x in inputs]
        if name.endswith("_"):
            for x in outputs:
                self.versions[x.untyped_storage()._cdata] += 1
        writes = [(self.value(x), size(x)) for x in outputs]
        self.ops.append(Op(name, flops, moved, dtype, reads, writes, "varlen_attn" in name))


def size(x: Tensor) -> int:
    """Bytes of reading x once: a broadcast dimension costs nothing."""
    return x.element_size() * int(np.prod([n for n, stride in zip(x.shape, x.stride()) if stride], dtype=np.int64))


def unique(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors without those that are the same memory again."""
    seen = {(x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape)): x for x in tensors}
    return list(seen.values())


# --------------------------------------------------------------------------------------------------------- the jobs


def fake_model(mode: FakeCuda, raw: dict, dtype: str) -> Transformer:
    """A model without weights on "cuda", with an adapter of rank 64."""
    with torch.device("meta"):
        model = Transformer(FAMILIES[raw["architectures"][0]].read(raw))
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        with mode.fake:
            weight = torch.empty(parameter.shape, dtype=DTYPES[dtype], device="cuda")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    model.tie()
    add_lora(model, r=64, alpha=16, dropout=0.1)
    mode.hold(list(model.parameters()))
    return model.eval()


def one_pack(tokens: int, vocabulary: int) -> Corpus:
    """Sequences of lengths as instruction data has them, mean 370, together `tokens` long; 60 % of each is a response."""
    draw, lengths = np.random.default_rng(0), []
    mean, longest = min(400, tokens // 10), min(2048, tokens // 4)
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(draw.lognormal(np.log(mean) - 0.12, 0.8), 16, longest)))
    lengths[-1] -= sum(lengths) - tokens
    lengths = [length for length in lengths if length > 1]
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    response = np.concatenate([np.arange(n) >= max(1, int(0.4 * n)) for n in lengths])
    ids = draw.integers(3, vocabulary, offsets[-1]).astype(np.int32)
    return Corpus(ids, response, offsets, [""] * len(lengths), dropped=0)


def useful_flops(raw: dict, corpus: Corpus, adapters: float, backward: bool) -> float:
    """FLOPs that no implementation can do without: frozen products, adapters, causal attention, the head where judged.

    A training step runs the frozen products forward and for their inputs' gradient; adapters cost three products.
    """
    d, f, head = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    q, kv, layers = raw["num_attention_heads"] * head, raw["num_key_value_heads"] * head, raw["num_hidden_layers"]
    tokens, n = len(corpus.tokens), corpus.lengths.astype(float)
    frozen = layers * 2 * tokens * (2 * d * q + 2 * d * kv + 3 * d * f) + 2 * corpus.response.sum() * d * raw["vocab_size"]
    low_rank = layers * 2 * tokens * 64 * ((d + q) * 2 + (d + kv) * 2 + (d + f) * 3)
    attention = layers * 4 * (n * (n + 1) / 2).sum() * q
    if backward:
        return 2 * frozen + 3 * low_rank + 3.5 * attention
    return frozen + adapters * low_rank + attention


def price_attention(ops: list[Op], corpus: Corpus, raw: dict) -> None:
    """Put the FLOPs of causal attention on the kernel's operations: two products forward, five backward."""
    n = corpus.lengths.astype(float)
    pairs = (n * (n + 1) / 2).sum() * raw["num_attention_heads"] * raw["head_dim"]
    for op in ops:
        if op.attention:
            op.flops = (10 if "backward" in op.name else 4) * pairs


def training(raw: dict, dtype: str = "bfloat16", checkpointed: bool = False, tokens: int = 8192) -> SimpleNamespace:
    """One micro-batch of a step, forward and backward; then the optimiser."""
    with FakeCuda() as mode:
        model = fake_model(mode, raw, dtype).train()
        model.checkpoint_activations = checkpointed
        optimizer = torch.optim.AdamW(lora_parameters(model).values(), fused=True)
        corpus = one_pack(tokens, raw["vocab_size"])
        third = np.arange(len(corpus.tokens)) % 10 < 3
        lesson = Lesson(corpus, np.where(corpus.response, np.where(third, -1, 1), 0).astype(np.int8))
        options = Options(micro_tokens=tokens, device="cuda", dtype=dtype)
        mode.waits.clear(), mode.ops.clear()
        mode.peak = weights = mode.live
        step_gradient(model, lesson, np.arange(len(corpus)), 0.1, options)
        ops, peak, waits = list(mode.ops), mode.peak - weights, Counter(mode.waits)
        optimizer.step()
    return SimpleNamespace(corpus=corpus, ops=ops, peak=peak, waits=waits)


def scoring(raw: dict, dtype: str = "bfloat16", tokens: int = 32768) -> SimpleNamespace:
    """The losses of theta' and theta on one pack, as score() takes them."""
    with FakeCuda() as mode, torch.no_grad():  # inference_mode would hand composite operations over whole
        model, corpus = fake_model(mode, raw, dtype), one_pack(tokens, raw["vocab_size"])
        losses = lambda: evaluation.response_losses.__wrapped__(model, corpus, np.arange(len(corpus)), tokens // 4)  # noqa: E731
        mode.waits.clear(), mode.ops.clear()
        mode.peak = weights = mode.live
        losses()
        with lora_disabled(model):
            losses()
    return SimpleNamespace(corpus=corpus, ops=mode.ops, peak=mode.peak - weights, waits=mode.waits)


def answering(raw: dict, dtype: str = "bfloat16", new_tokens: int = 4) -> tuple[Counter, Counter]:
    """Where the host waits while a pack of log-likelihoods is scored, and while a few tokens are written."""
    tokenizer = SimpleNamespace(eos_id=0, decode=lambda ids: " ".join(map(str, ids)))
    with FakeCuda() as mode, torch.no_grad():
        model = fake_model(mode, raw, dtype)
        mode.waits.clear()
        evaluation._score_pack(model, [[1] * 50, [2] * 30], [2, 1], [[5], [5, 6, 7], [8, 9]])
        scored = Counter(mode.waits)
        mode.waits.clear()
        evaluation._generate_pack(model, tokenizer, [[1] * 20, [2] * 9], new_tokens, "\n")
    return scored, mode.waits


def compiled_seconds(ops: list[Op]) -> float:
    """The time if everything between two solid kernels were one: a value is written once if a product or the backward
    pass wants it, and read once by the fused code of each pass that uses it. An upper bound of what --compile buys."""
    turn = next((i for i, op in enumerate(ops) if op.name.endswith("_backward")), len(ops))
    made, users, nbytes = {}, {}, {}
    for i, op in enumerate(ops):
        place = (op.attention or op.name in SOLID, i >= turn)
        for value, moved in op.reads:
            users.setdefault(value, set()).add(place)
            nbytes[value] = max(nbytes.get(value, 0), moved)
        for value, moved in op.writes:
            made.setdefault(value, place)
            nbytes[value] = max(nbytes.get(value, 0), moved)
    moved = 0
    for value, amount in nbytes.items():
        solid, late = made.get(value, (True, None))  # what nothing made is an input
        used = users.get(value, set())
        fused_passes = {late_use for solid_use, late_use in used if not solid_use}
        if not solid:
            moved += amount * any(solid_use or late_use != late for solid_use, late_use in used)
            fused_passes.discard(late)
        moved += amount * len(fused_passes)
    kernels = sum(op.seconds for op in ops if op.attention or op.name in SOLID)
    return kernels + moved / BYTES_PER_SECOND


def predicted_rows() -> list[list[str]]:
    """LLaMA-3.2-1B on one H100: a row for each job."""
    rows = []
    jobs = [("training", training(LLAMA_1B), True, 1),
            ("training, --checkpoint-activations", training(LLAMA_1B, checkpointed=True), True, 1),
            ("scoring theta and theta'", scoring(LLAMA_1B), False, 2)]  # fmt: skip
    for name, job, backward, models in jobs:
        price_attention(job.ops, job.corpus, LLAMA_1B)
        useful = models * useful_flops(LLAMA_1B, job.corpus, 1 / models, backward)
        times = {name: sum(op.seconds for op in job.ops)}
        if "checkpoint" not in name:
            times[f"{name}, --compile at best"] = compiled_seconds(job.ops)
        for title, seconds in times.items():
            speed, share = len(job.corpus.tokens) / seconds, useful / seconds / PEAK
            memory = f"{job.peak / 1e9:.1f} GB" if title == name else ""
            rows.append([title, f"{seconds * 1e3:.1f}", f"{speed:,.0f}", f"{share:.3f}", memory, str(sum(job.waits.values()))])
    return rows


def dry_run() -> list[tuple[str, Counter]]:
    """Every architecture through training, scoring and answering, in bfloat16 and float32; the waits of each."""
    found = []
    for kind in tiny.KINDS:
        raw = tiny.config_of(kind, 4)
        for dtype in ("bfloat16", "float32"):
            for checkpointed in (False, True):
                waits = training(raw, dtype, checkpointed, tokens=200).waits
                found.append((f"{kind} {dtype} training{', checkpointed' * checkpointed}", waits))
            found.append((f"{kind} {dtype} scoring", scoring(raw, dtype, tokens=400).waits))
            for job, waits in zip(("log-likelihoods", "4 new tokens"), answering(raw, dtype)):
                found.append((f"{kind} {dtype} {job}", waits))
    return found
