"""What `bench.py gpu` checks before it measures: the results of a GPU against those of a CPU in float32.

    for check in run_checks(torch.device("cuda")):
        print(check.name, check.error, check.limit, check.passed)

The models are small. Their weights are rounded to bfloat16 first, so that only the computation differs. An error is a
distance: the norm of the difference over the norm of what the CPU gives.
"""

import io
import json
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import data
import hellora
import lora
import ops.kernels
import train
from generate import generate
from hub.weights import full_tensor, init_weights
from model import KVCache, MoEConfig, MoETransformer, save_model
from run.processes import Processes
from run.step import global_step, load_shared

EXACT, HALF = 1e-3, 0.1  # limits in float32, where kernels sum in another order, and in bfloat16
DTYPES = {"float32": (torch.float32, EXACT), "bfloat16": (torch.bfloat16, HALF)}
CONFIG = MoEConfig.from_dict(
    {
        "model_type": "olmoe", "vocab_size": 211, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 16, "num_experts_per_tok": 4,
        "eos_token_id": 0, "pad_token_id": 1,
    }
)  # fmt: skip
HOT = (torch.arange(16) % 5 == 2).expand(3, -1)  # experts 2, 7 and 12
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(2, 211, (5, 37), generator=GENERATOR)
LENGTHS = torch.tensor([37, 20, 1, 33, 8])
LABELS = torch.where(torch.arange(37) < LENGTHS[:, None] - 1, IDS.roll(-1, 1), -100)


@dataclass(frozen=True)
class Check:
    """How far a result is from the one wanted."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # not if it is NaN


def distance(ours: Tensor, want: Tensor) -> float:
    ours, want = (x.detach().to("cpu", torch.float64) for x in (ours, want))
    return float((ours - want).norm() / want.norm())


def make_model(device: torch.device, dtype: torch.dtype, kind: str | None = "lora") -> MoETransformer:
    """The model with random pairs of a kind on HOT, attention and router; of kind None without."""
    model = MoETransformer(CONFIG)
    init_weights(model, std=0.1)
    model = model.to(torch.bfloat16).to(dtype)
    if kind:
        hellora.attach(model, HOT, 8, 16.0, kind=kind)
        fill_factors(model)
    return model.to(device)


@torch.no_grad()
def fill_factors(model: MoETransformer) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.05, generator=generator))


def loss_of(model: MoETransformer) -> Tensor:
    device = model.embed_tokens.weight.device
    return model(IDS.to(device), LENGTHS, labels=LABELS.to(device))[0]


@torch.no_grad()
def logits_of(model: MoETransformer) -> Tensor:
    """Logits of the real tokens.  -> [T, V]"""
    logits, selected = model(IDS.to(model.embed_tokens.weight.device), LENGTHS)
    return logits[selected[0, ..., 0] >= 0]


def gradients_of(model: MoETransformer) -> tuple[Tensor, Tensor]:
    """All gradients of the loss, as one vector; and the loss."""
    (loss := loss_of(model)).backward()
    return torch.cat([full_tensor(p.grad).float().flatten() for p in model.parameters() if p.requires_grad]), loss


# ------------------------------------------------------------------------------------------------------- the checks


def forward(device: torch.device) -> Iterator[Check]:
    want = logits_of(make_model(torch.device("cpu"), torch.float32))
    for name, (dtype, limit) in DTYPES.items():
        yield Check(f"forward, {name}", distance(logits_of(make_model(device, dtype)), want), limit)


def backward(device: torch.device) -> Iterator[Check]:
    for kind in lora.KINDS:
        want, want_loss = gradients_of(make_model(torch.device("cpu"), torch.float32, kind))
        for name, (dtype, limit) in DTYPES.items():
            gradients, loss = gradients_of(make_model(device, dtype, kind))
            yield Check(f"loss in training, {kind}, {name}", distance(loss, want_loss), limit)
            yield Check(f"gradients, {kind}, {name}", distance(gradients, want), limit)


def attach_and_merge(device: torch.device) -> Iterator[Check]:
    base = logits_of(make_model(device, torch.float32, None))
    model = make_model(device, torch.float32, None)
    hellora.attach(model, HOT, 8, 16.0)
    yield Check("attach changes nothing", distance(logits_of(model), base), EXACT)
    fill_factors(model)
    apart = logits_of(model)
    hellora.merge(model)
    yield Check("merge changes nothing", distance(logits_of(model), apart), EXACT)


def products(device: torch.device) -> Iterator[Check]:
    """Both branches of the grouped products, with empty groups, and with no row that reaches a hot expert."""
    for branch, types in (("one kernel", (device.type,)), ("a loop", ())):
        for rows, counts in (("empty groups", [5, 0, 9, 3, 0]), ("no hot row", [0, 0, 0, 11, 6])):
            want = torch.cat([x.flatten() for x in product(counts, torch.device("cpu"), torch.float32, lora)])
            for name, (dtype, limit) in DTYPES.items():
                with one_kernel_on(types):
                    ours = torch.cat([x.float().flatten() for x in product(counts, device, dtype, ops)])
                    with torch.no_grad():
                        values = product(counts, device, dtype, ops)[0].float().flatten()
                yield Check(f"grouped products by {branch}, {rows}, {name}", distance(ours, want), limit)
                said = f"grouped products without gradients by {branch}, {rows}, {name}"
                yield Check(said, distance(values, want[: len(values)]), limit)


def product(counts: list[int], device: torch.device, dtype: torch.dtype, module) -> tuple[Tensor, ...]:
    """Values of `lora_grouped_linear` of a module, and its gradients if they are on.

    module: lora, which has the reference formula, or ops.
    """
    generator, (n, fan_in, fan_out, r) = torch.Generator().manual_seed(2), (3, 32, 48, 8)
    shapes = (sum(counts), fan_in), (len(counts), fan_out, fan_in), (n, r, fan_in), (n, r, fan_out)
    drawn = [torch.empty(shape).normal_(generator=generator).to(torch.bfloat16).to(device, dtype) for shape in shapes]
    x, A, B = (drawn[i].requires_grad_() for i in (0, 2, 3))
    offsets, num_rows = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device), sum(counts[:n])
    source = x.detach()[:num_rows]
    y = module.lora_grouped_linear(
        x, drawn[1], A, B, offsets, num_rows, None, lambda rows, source: source[rows], source
    )
    if not torch.is_grad_enabled():
        return (y,)
    grads = torch.autograd.grad(y.square().sum() / 100, (x, A, B), materialize_grads=True)
    return y, *grads


@contextmanager
def one_kernel_on(types: tuple[str, ...]) -> Iterator[None]:
    """Take the branch of one kernel only on these types of device."""
    before = ops.kernels.ONE_KERNEL
    ops.kernels.ONE_KERNEL = types
    try:
        yield
    finally:
        ops.kernels.ONE_KERNEL = before


def no_token(device: torch.device) -> Iterator[Check]:
    """The share of a process that got no example: its gradients are zero, not missing or NaN."""
    model = make_model(device, torch.bfloat16)
    batch = data.collate([], CONFIG.pad_token_id)
    loss, _ = model(batch.input_ids.to(device), batch.lengths, labels=batch.labels.to(device))
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    missing = sum(grad is None for grad in grads)
    yield Check("a batch without a token", missing + float(sum(g.abs().sum() for g in grads if g is not None)), 0.0)


@torch.no_grad()
def decode(device: torch.device) -> Iterator[Check]:
    prompts = [ids[:n].tolist() for ids, n in zip(IDS, LENGTHS.tolist(), strict=True)]
    options = {"max_new_tokens": 9, "batch_size": 3}
    cpu, ours = (make_model(where, torch.float32, None) for where in (torch.device("cpu"), device))
    pairs = zip(generate(cpu, prompts, **options), generate(ours, prompts, **options), strict=True)
    yield Check("decoding, answers that differ, float32", float(sum(a != b for a, b in pairs)), 0.0)
    for name, (dtype, limit) in DTYPES.items():
        model = make_model(device, dtype, None)
        cache = KVCache(CONFIG, 1, 37, dtype=dtype, device=device)
        for part in IDS[:1].split((30, 1, 6), dim=1):
            logits, _ = model(part.to(device), cache=cache, last_only=True)
        want, _ = cpu(IDS[:1], last_only=True)
        yield Check(f"decoding with a cache, {name}", distance(logits, want), limit)


def fsdp(device: torch.device) -> Iterator[Check]:
    """FSDP2 on one process, against the same model unsharded: loaded, trained and put together again."""
    items = [data.Encoded(ids[:n].tolist(), ((2, n),)) for ids, n in zip(IDS, LENGTHS.tolist(), strict=True) if n > 2]
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_model(make_model(torch.device("cpu"), torch.bfloat16, None), folder)
            attach = partial(hellora.attach, hot=HOT, r=8, alpha=16.0)
            grads = []
            for shard in ("none", "full"):
                model = load_shared(Path(folder), torch.bfloat16, device, shard=shard, attach=attach)
                global_step(model, items, 2, Processes(0, 1, device))
                grads.append(torch.cat([full_tensor(p.grad).flatten() for p in model.parameters() if p.requires_grad]))
    finally:
        dist.destroy_process_group()
    yield Check("FSDP2 on one process, gradients", distance(grads[1], grads[0]), EXACT)


def resume(device: torch.device) -> Iterator[Check]:
    """The embedded model trained for two steps, and for one and one more from a checkpoint."""
    flags = "--batch 3 --micro-batch 2 --sample 0.001 --k 3 --save-every 1".split()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        for name, more in (("uncut", ["2"]), ("cut", ["1"]), ("cut", ["2", "--resume"])):
            train.main([*flags, "--out", f"{folder}/{name}", "--steps", *more])
        logs = [Path(folder, name, "log.jsonl").read_text(encoding="utf-8") for name in ("cut", "uncut")]
    cut, uncut = (torch.tensor([json.loads(line)["loss"] for line in log.splitlines()]) for log in logs)
    yield Check("losses of a run that was resumed", distance(cut, uncut), EXACT)


CHECKS = (forward, backward, attach_and_merge, products, no_token, decode, fsdp, resume)


def run_checks(device: torch.device, checks: tuple[Callable, ...] = CHECKS) -> Iterator[Check]:
    """Every check. One that raises has failed, and the others still run."""
    for check in checks:
        try:
            yield from check(device)
        except Exception:  # noqa: BLE001 - whatever a new kind of device makes of it
            traceback.print_exc()
            yield Check(f"{check.__name__}: see the traceback", float("nan"), 0.0)
