"""LoRA's dropout: PEFT's in expectation, off outside training, drawn again alike by a resumed run."""

import copy

import peft
import pytest
import torch
from conftest import words
from peft.tuners.lora import Linear
from test_ops import IDS, LABELS, LENGTHS, PLAIN, adapted_model, ends, every_device, every_family, gradients

import hellora
import lora
import ops
from command.cli import InputError
from model import MoETransformer
from run.settings import parse_settings


def attached(folder, kind: str = "lora") -> MoETransformer:
    return adapted_model(folder, kind, dropout=0.3).train()


def backward(model: MoETransformer, step: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    lora.seed_dropout(0, step, 0)
    loss, _ = model(IDS, LENGTHS, labels=LABELS)
    loss.backward()
    return loss, gradients(model)


@every_device
@pytest.mark.parametrize("kind", hellora.KINDS)
def test_fast_versions_drop_what_the_reference_formulas_drop(make_checkpoint, monkeypatch, kind, devices):
    results, folder = [], make_checkpoint("qwen2_moe").folder
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", devices)
    for plain in (False, True):
        for name, module in PLAIN.items() if plain else ():
            monkeypatch.setattr(ops, name, vars(module)[name])
        results.append(backward(attached(folder, kind)))
    (loss, grads), (plain_loss, plain_grads) = results
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    assert grads.keys() == plain_grads.keys()
    for name, grad in grads.items():
        scale = plain_grads[name].abs().max().item()
        torch.testing.assert_close(grad, plain_grads[name], atol=1e-5 * scale, rtol=1e-4, msg=lambda m, n=name: n + m)
    assert (backward(attached(folder, kind), step=4)[0] - loss).abs() > 1e-3 * loss  # other masks


@pytest.mark.parametrize("kind", ["lora", "dora"])
@every_family
def test_activation_checkpointing_changes_neither_loss_nor_gradients_and_drops_the_same(make_checkpoint, family, kind):
    model = attached(make_checkpoint(family).folder, kind)
    loss, grads = backward(model)
    grads = {name: grad.clone() for name, grad in grads.items()}
    model.zero_grad()
    for layer in model.layers:
        layer.activation_checkpointing = True
    again, grads_again = backward(model)
    assert loss == again and all(torch.equal(grads[name], grad) for name, grad in grads_again.items())


def test_seed_step_and_process_each_change_what_is_dropped():
    def mask(*key: int) -> torch.Tensor:
        lora.seed_dropout(*key)
        return torch.nn.functional.dropout(torch.ones(10_000), 0.5) != 0

    masks = [mask(0, 0, 0), mask(1, 0, 0), mask(0, 1, 0), mask(0, 0, 1)]
    assert torch.equal(masks[0], mask(0, 0, 0))
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert (one == other).float().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 10_000**0.5)


def peft_linear(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float, p: float) -> Linear:
    """PEFT's own layer with these factors, in training."""
    base = torch.nn.Linear(W.shape[1], len(W), bias=False)
    base.weight.data = W
    config = peft.LoraConfig(r=len(A), lora_alpha=alpha, lora_dropout=p)
    layer = Linear(base, "default", config, r=len(A), lora_alpha=alpha)
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
    return layer.train()


def assert_same_moments(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Mean and variance of rows that differ by dropout alone, to five standard errors of either.  [N, out] each"""
    for x in (ours, theirs):
        assert x.var(0).min() > 0
    error = ((ours.var(0) + theirs.var(0)) / len(ours)).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error).all()
    torch.testing.assert_close(ours.var(0), theirs.var(0), rtol=5 * 2 * (2 / len(ours)) ** 0.5, atol=0)


N, P = 6000, 0.2


@torch.no_grad()
def test_a_linear_layer_drops_as_peft_does_in_mean_and_variance():
    generator = torch.Generator().manual_seed(0)
    W, A, B, x = (torch.randn(shape, generator=generator) for shape in ((5, 24), (3, 24), (5, 3), (1, 24)))
    base = torch.nn.Linear(24, 5, bias=False)
    base.weight.data = W
    ours = lora.LoRALinear(base, 3, 7.0, P)
    ours.lora_A.data, ours.lora_B.data = A, B
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert_same_moments(ours(x.expand(N, -1)), peft_linear(W, A, B, 7.0, P)(x.expand(N, -1)))


@every_device
@torch.no_grad()
def test_experts_drop_as_pefts_layers_of_single_experts_do_in_mean_and_variance(monkeypatch, devices):
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", devices)
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 5, 24), (2, 3, 24), (2, 5, 3), (4, 48)
    W, A, B, gate_up = (torch.randn(shape, generator=generator) for shape in shapes)
    x, weight = ops.weighted_swiglu(gate_up, torch.ones(4, 1)), torch.ones(4 * N, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows = gate_up.repeat_interleave(N, 0)
        y = ops.lora_down(rows, weight, W, (A, 7 / 3 * B), ends([N] * 4), 2 * N, P)
        for e in (0, 1):
            assert_same_moments(y[e * N : (e + 1) * N], peft_linear(W[e], A[e], B[e], 7.0, P)(x[e].expand(N, -1)))
    torch.testing.assert_close(y[2 * N :], torch.cat([x[e].expand(N, -1) @ W[e].T for e in (2, 3)]))


def test_nothing_is_dropped_outside_training_and_merging_knows_no_dropout(olmoe):
    model = attached(olmoe.folder).eval()
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, lora.LoRALinear | lora.LoRAExperts):
            module.dropout = 0.0
    logits, _ = model(IDS, LENGTHS)
    assert torch.equal(logits, plain(IDS, LENGTHS)[0]) and model.adapter == plain.adapter
    assert (model.train()(IDS, LENGTHS)[0] - logits).abs().max() > 1e-3
    hellora.merge(model.eval())
    torch.testing.assert_close(model(IDS, LENGTHS)[0], logits, rtol=0, atol=1e-4)


def test_without_an_adapter_there_is_nothing_to_drop():
    with pytest.raises(InputError, match="--lora-dropout: --method fft trains every weight"):
        parse_settings(words("--method fft --lora-dropout 0.1"))
