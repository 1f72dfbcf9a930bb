"""The results of a device against those of a CPU in float32: pytest lab/tests/test_device.py --device cuda

The models are small. Their weights are rounded to bfloat16 first, so that only the computation differs. An error is a
distance: the norm of the difference over the norm of what the CPU gives. Without --device all runs on the CPU.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import data
import hellora
import lora
import ops
import train
from generate import Decoding, generate
from hub.weights import full_tensor, init_weights
from machine.processes import Processes
from model import KVCache, MoEConfig, MoETransformer, save_model
from training_step import batch_gradients, load_for_process

EXACT, HALF = 1e-3, 0.1  # limits in float32, where kernels sum in another order, and in bfloat16
each_dtype = pytest.mark.parametrize("dtype, limit", [(torch.float32, EXACT), (torch.bfloat16, HALF)], ids=str)
CPU = torch.device("cpu")
CONFIG = MoEConfig.from_dict(
    {
        "model_type": "olmoe", "vocab_size": 211, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 16, "num_experts_per_tok": 4,
        "eos_token_id": 0, "pad_token_id": 1,
    }
)  # fmt: skip
HOT = (torch.arange(16) % 5 == 2).expand(3, -1)  # experts 2, 7 and 12
IDS = torch.randint(2, 211, (5, 37), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([37, 20, 1, 33, 8])
LABELS = torch.where(torch.arange(37) < LENGTHS[:, None] - 1, IDS.roll(-1, 1), -100)


@pytest.fixture
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


def distance(ours: Tensor, expected: Tensor) -> float:
    ours, expected = (x.detach().to("cpu", torch.float64) for x in (ours, expected))
    return float((ours - expected).norm() / expected.norm())


def make_model(device: torch.device, dtype: torch.dtype, kind: str | None = None) -> MoETransformer:
    """The model, with random pairs of a kind on HOT, attention and router."""
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


@torch.no_grad()
def logits_of(model: MoETransformer) -> Tensor:
    """Logits of the real tokens.  -> [T, V]"""
    logits, selected = model(IDS.to(model.embed_tokens.weight.device), LENGTHS)
    return logits[selected[0, ..., 0] >= 0]


def all_gradients(model: MoETransformer) -> Tensor:
    return torch.cat([full_tensor(p.grad).float().flatten() for p in model.parameters() if p.requires_grad])


@each_dtype
def test_logits(device, dtype, limit):
    expected = logits_of(make_model(CPU, torch.float32, "lora"))
    assert distance(logits_of(make_model(device, dtype, "lora")), expected) < limit


@each_dtype
@pytest.mark.parametrize("kind", hellora.KINDS)
def test_loss_and_gradients(device, kind, dtype, limit):
    losses, gradients = [], []
    for model in (make_model(CPU, torch.float32, kind), make_model(device, dtype, kind)):
        place = model.embed_tokens.weight.device
        loss, _ = model(IDS.to(place), LENGTHS, labels=LABELS.to(place))
        loss.backward()
        losses.append(loss)
        gradients.append(all_gradients(model))
    assert distance(losses[1], losses[0]) < limit and distance(gradients[1], gradients[0]) < limit


def test_attaching_and_merging_change_nothing(device):
    model = make_model(device, torch.float32)
    base = logits_of(model)
    hellora.attach(model, HOT, 8, 16.0)
    assert distance(logits_of(model), base) < EXACT
    fill_factors(model)
    apart = logits_of(model)
    hellora.merge(model)
    assert distance(logits_of(model), apart) < EXACT < distance(apart, base)


@each_dtype
@pytest.mark.parametrize("counts", [(5, 0, 9, 3, 0), (0, 0, 0, 11, 6)], ids=["empty groups", "no hot row"])
@pytest.mark.parametrize("in_one_kernel", [True, False])
def test_grouped_products(device, monkeypatch, in_one_kernel, counts, dtype, limit):
    expected = product(counts, CPU, torch.float32, lora)
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", (device.type,) if in_one_kernel else ())
    for ours, theirs in zip(product(counts, device, dtype, ops), expected, strict=True):
        assert distance(ours, theirs) < limit or not theirs.any() and not ours.any()
    with torch.no_grad():
        assert distance(product(counts, device, dtype, ops)[0], expected[0]) < limit


def product(counts: tuple[int, ...], device: torch.device, dtype: torch.dtype, module) -> tuple[Tensor, ...]:
    """Values of `lora_down` of a module, and its gradients if they are on.

    module: lora, which has the reference formula, or ops.
    """
    generator, (n, fan_in, fan_out, r) = torch.Generator().manual_seed(2), (3, 32, 48, 8)
    shapes = (
        (sum(counts), 2 * fan_in),
        (sum(counts), 1),
        (len(counts), fan_out, fan_in),
        (n, r, fan_in),
        (n, fan_out, r),
    )
    drawn = [torch.empty(shape).normal_(generator=generator).to(torch.bfloat16).to(device, dtype) for shape in shapes]
    gate_up, weight, W, A, B = drawn
    trained = [tensor.requires_grad_() for tensor in (gate_up, weight, A, B)]
    offsets, num_rows = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device), sum(counts[:n])
    y = module.lora_down(gate_up, weight, W, (A, B), offsets, num_rows, 0.0)
    if not torch.is_grad_enabled():
        return (y,)
    return y, *torch.autograd.grad(y.square().sum() / 100, trained, materialize_grads=True)


def test_a_batch_without_a_token_has_gradients_that_are_zero_and_not_missing(device):
    """The share of a process that got no example."""
    model = make_model(device, torch.bfloat16, "lora")
    batch = data.collate([], CONFIG.pad_token_id)
    loss, _ = model(batch.input_ids.to(device), batch.lengths, labels=batch.labels.to(device))
    loss.backward()
    assert not all_gradients(model).any()


@torch.no_grad()
def test_decoded_answers(device):
    prompts = [ids[:n].tolist() for ids, n in zip(IDS, LENGTHS.tolist(), strict=True)]
    cpu, ours = (make_model(place, torch.float32) for place in (CPU, device))
    decode = partial(generate, prompts=prompts, decoding=Decoding(9), batch_size=3)
    assert decode(ours) == decode(cpu)


@each_dtype
@torch.no_grad()
def test_logits_with_a_cache(device, dtype, limit):
    cache = KVCache(CONFIG, 1, 37, dtype=dtype, device=device)
    model = make_model(device, dtype)
    for part in IDS[:1].split((30, 1, 6), dim=1):
        logits, _ = model(part.to(device), cache=cache, last_only=True)
    expected, _ = make_model(CPU, torch.float32)(IDS[:1], last_only=True)
    assert distance(logits, expected) < limit


def test_sharding_on_one_process_changes_no_gradient(device, tmp_path):
    """FSDP2 against the same model unsharded: loaded, trained and put together again."""
    save_model(make_model(CPU, torch.bfloat16), tmp_path)
    items = [data.Encoded(ids[:n].tolist(), ((2, n),)) for ids, n in zip(IDS, LENGTHS.tolist(), strict=True) if n > 2]
    attach, gradients = partial(hellora.attach, hot=HOT, r=8, alpha=16.0), []
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        for shard in ("none", "full"):
            model = load_for_process(tmp_path, torch.bfloat16, device, shard=shard, attach=attach)
            batch_gradients(model, items, 2, Processes(0, 1, device))
            gradients.append(all_gradients(model))
    finally:
        dist.destroy_process_group()
    assert distance(gradients[1], gradients[0]) < EXACT


def test_a_run_that_was_resumed_has_the_losses_of_one_that_was_not_stopped(device, tmp_path):
    """Where train.py puts the embedded model: on a GPU if there is one."""
    flags = "--batch 3 --micro-batch 2 --sample 0.001 --k 3 --save-every 1 --schedule constant --lr-warmup 0".split()
    for name, more in (("uncut", ["2"]), ("cut", ["1"]), ("cut", ["2", "--resume"])):
        train.main([*flags, "--out", str(tmp_path / name), "--steps", *more])
    logs = [Path(tmp_path, name, "log.jsonl").read_text(encoding="utf-8").splitlines() for name in ("cut", "uncut")]
    cut, uncut = (torch.tensor([json.loads(line)["loss"] for line in log]) for log in logs)
    assert len(cut) == 2 and distance(cut, uncut) < EXACT
