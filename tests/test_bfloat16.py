"""A base in bfloat16 beside the same weights in float32: what a GPU computes with by default, walked on every machine.

Rounding sends about one token of fifty to another expert. Where gradients are compared, both sides use the experts
that bfloat16 chose: what is left is the rounding of the products.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import call, losses, read_json, with_tokenizer, words
from torch import Tensor

import data
import hellora
import ops
import profile
import train
from hub.config import FAMILIES
from hub.weights import full_tensor
from lori import sparsify
from machine.processes import ALONE, DTYPES
from model import MoETransformer, RMSNorm, lay_out, load_model, read_config, save_model
from neighbours import drlora
from recipes.methods import METHODS, num_hot_experts
from training_step import batch_gradients, shard_model

R = 8
LOGITS, GRADIENTS = 0.05, 0.12  # bounds of |bfloat16 - float32| / |float32|; the largest seen are 0.03 and 0.09


def adapt(model: MoETransformer, method_name: str) -> None:
    """What `--method method_name` attaches, with factors that matter."""
    method, config, generator = METHODS[method_name], model.config, torch.Generator().manual_seed(0)
    num_hot = config.num_experts
    if method.experts == "hot":
        num_hot = num_hot_experts(method.k, config.num_experts, config.num_experts_per_tok)
    hot = (torch.arange(config.num_experts) < num_hot).expand(len(config.moe_layers), -1)
    expert_rank = drlora.RESERVED * R if method.grows else 3 if method.flat else None
    hellora.attach(model, hot, R, 12.0, kind=method.kind, targets=method.targets, expert_rank=expert_rank)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    if method.sparse:
        Bs = {name: B for name, B in model.named_parameters() if name.endswith("lora_B")}
        sparsify(model, {name.removesuffix(".lora_B"): torch.arange(0, B.numel(), 10) for name, B in Bs.items()})


def one_step(folder: Path, method: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, logits and gradients of four examples in two micro-batches. The weights are numbers of bfloat16."""
    model = load_model(folder, torch.bfloat16)
    if method == "fft" or dtype == torch.float32:
        model.float()
    if method != "fft":
        adapt(model, method)
    elif dtype != torch.float32:  # as train.py does it: FSDP holds float32 weights and gathers them in bfloat16
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        shard_model(model, torch.device("cpu"), dtype)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(2, 50, (n,), generator=generator).tolist() for n in (17, 24, 9, 13)]
    items = [data.Encoded(row, ((2, len(row)),)) for row in ids]
    step, batch = batch_gradients(model, items, 2, ALONE), data.collate(items, 0)
    grads = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        logits = model(batch.input_ids, batch.lengths)[0].float()
    if dist.is_initialized():
        dist.destroy_process_group()
    return step.loss, logits, grads


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_of_every_method_and_family_are_those_of_float32_up_to_rounding(
    make_checkpoint, monkeypatch, family, method
):
    topk, chosen = Tensor.topk, []

    def recorded(x, *args, **options):
        found = topk(x, *args, **options)
        chosen.append(found.indices)
        return found

    def replayed(x, *args, **options):
        return x.gather(-1, chosen[0]), chosen.pop(0)

    folder = make_checkpoint(family).folder
    monkeypatch.setattr(Tensor, "topk", recorded)
    loss, logits, grads = one_step(folder, method, torch.bfloat16)
    monkeypatch.setattr(Tensor, "topk", replayed)
    want_loss, want_logits, want_grads = one_step(folder, method, torch.float32)
    assert not chosen and grads.keys() == want_grads.keys()
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert loss.item() == pytest.approx(want_loss.item(), rel=0.003)
    assert distance(logits, want_logits) < LOGITS
    flat, want = (torch.cat([g.flatten() for g in each.values()]) for each in (grads, want_grads))
    assert 1e-4 < distance(flat, want) < GRADIENTS  # not float32 in disguise


# ----------------------------------------------------------------- what stays in float32, exactly


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_is_computed_in_float32_from_the_logits_of_the_router(make_checkpoint, family):
    model = load_model(make_checkpoint(family).folder, torch.bfloat16)
    ids = torch.arange(50).view(2, 25)
    _, selected, routing = model(ids, output_routing=True)
    exact = routing.logits.double()  # [L, T, E], numbers of bfloat16
    torch.testing.assert_close(routing.probs.double(), exact.softmax(-1), rtol=1e-6, atol=0)
    assert routing.weights.dtype == torch.float32
    weights = exact.softmax(-1).gather(-1, selected.flatten(1, 2))
    if model.config.topk_before_softmax or model.config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights.double(), weights, rtol=1e-6, atol=0)


def test_norms_angles_and_the_loss_are_rounded_once(olmoe):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 48, generator=generator).bfloat16()
    got, want = RMSNorm(48, 1e-5).bfloat16()(x).double(), F.rms_norm(x.double(), (48,), eps=1e-5)
    torch.testing.assert_close(got, want, rtol=2**-8, atol=0)

    config = read_config(olmoe.folder)
    cos, sin = lay_out(config, x, 500, torch.tensor([500]), None).rotary  # [T, 1, Dh]
    exponent = torch.arange(0, config.head_dim, 2).repeat(2) / config.head_dim
    angle = torch.arange(500)[:, None] / config.rope_theta ** exponent.double()
    for found, function in ((cos, torch.cos), (sin, torch.sin)):
        torch.testing.assert_close(found[:, 0].double(), function(angle), rtol=2**-8, atol=1e-4)

    W, target = torch.randn(61, 48, generator=generator).bfloat16(), torch.arange(40)
    loss = ops.target_loss(x, W, target)
    assert loss.dtype == torch.float32
    want = F.cross_entropy(F.linear(x, W).double(), target, reduction="sum")
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)


# ------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def base(make_checkpoint, tmp_path_factory) -> Path:
    """A checkpoint in bfloat16, as they are on the hub."""
    folder = tmp_path_factory.mktemp("base")
    save_model(load_model(make_checkpoint("olmoe").folder), folder, torch.bfloat16)
    return with_tokenizer(folder)


def test_the_losses_of_a_hundred_steps_are_those_of_float32_within_one_percent(base, tmp_path):
    sums = [{"question": f"{a} + {b} =", "answer": f"{a} + {b} is #### {a + b}"} for a in range(5) for b in range(5)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    flags = words("--model", base, "--task gsm8k --train-data", tmp_path / "sums.jsonl", "--rank 4")
    flags += words("--alpha 8 --batch 3 --steps 100 --lr 0.0005")
    for dtype in DTYPES:
        call(train, flags, "--dtype", dtype, "--out", tmp_path / dtype)
    want, got = (losses(tmp_path / dtype) for dtype in DTYPES)
    assert len(got) == 100 and sum(want[-10:]) < 0.6 * sum(want[:10]) and got != want
    assert got == pytest.approx(want, rel=0.01)
    assert read_json(tmp_path / "bfloat16/config.json")["settings"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("warmup", ["base", "lora"])
def test_profiling_in_bfloat16_counts_what_float32_counts_but_for_near_ties(base, tmp_path, warmup):
    flags = words("--model", base, "--sample 0.07 --count-on", warmup)
    want, got = (call(profile, flags, "--dtype", d, "--out", tmp_path / d).counts for d in DTYPES)
    assert got.sum() == want.sum() and not got.equal(want)
    assert (got - want).abs().sum() < 0.05 * want.sum()
