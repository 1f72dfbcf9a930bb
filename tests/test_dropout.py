"""LoRA's dropout: PEFT's in expectation, the same on every process, and the reference formula's gradients."""

import copy
from functools import partial

import peft
import pytest
import torch
from peft.tuners.lora import Linear
from test_ops import IDS, LABELS, LENGTHS, PLAIN, ends, every_device, every_family, gradients

import data
import hellora
import lora
import ops
from command.cli import InputError
from machine.processes import ALONE
from model import MoETransformer, load_model
from ops import Dropout
from run.settings import parse_settings
from training_step import global_step


def attached(folder, kind: str = "lora", p: float = 0.3, seed: int = 3) -> tuple[MoETransformer, Dropout]:
    """A model in training with random factors on two or three experts per layer, and its dropout."""
    model, dropout = load_model(folder), Dropout(p, seed)
    hot = torch.zeros(len(model.config.moe_layers), model.config.num_experts, dtype=torch.bool)
    hot[:, [1, 4]] = hot[0, 5] = True
    hellora.attach(model, hot, 8, 12.0, kind=kind, targets="shared", dropout=dropout)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.train(), dropout


def backward(model: MoETransformer, dropout: Dropout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    dropout.see(list("edgac"), LENGTHS)
    loss, _ = model(IDS, LENGTHS, labels=LABELS)
    loss.backward()
    return loss, gradients(model)


def assert_same_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, grad in got.items():
        scale = want[name].abs().max().item()
        torch.testing.assert_close(grad, want[name], atol=1e-5 * scale, rtol=1e-4, msg=lambda m, n=name: n + m)


@every_device
@pytest.mark.parametrize("kind", lora.KINDS)
def test_fast_versions_drop_what_the_reference_formula_drops(make_checkpoint, monkeypatch, kind, devices):
    """The reference drops inside autograd, which takes the gradient back by itself."""
    results, folder = [], make_checkpoint("qwen2_moe").folder
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", devices)
    for plain in (False, True):
        for name, module in PLAIN.items() if plain else ():
            monkeypatch.setattr(ops, name, vars(module)[name])
        results.append(backward(*attached(folder, kind)))
    (loss, grads), (want_loss, want_grads) = results
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    assert_same_gradients(grads, want_grads)
    undropped, _ = attached(folder, kind)
    assert (undropped.eval()(IDS, LENGTHS, labels=LABELS)[0] - loss).abs() > 1e-3 * loss


@every_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", lora.KINDS)
def test_a_pass_without_gradients_gives_the_same_logits(make_checkpoint, monkeypatch, kind, dtype, devices):
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", devices)
    model, dropout = attached(make_checkpoint("qwen2_moe").folder, kind)
    dropout.see(list("edgac"), LENGTHS)
    want, _ = model.to(dtype)(IDS, LENGTHS)
    with torch.no_grad():
        logits, _ = model(IDS, LENGTHS)
        undropped, _ = model.eval()(IDS, LENGTHS)
    assert want.requires_grad and not logits.requires_grad
    torch.testing.assert_close(logits, want.detach(), atol=1e-5, rtol=1e-5)
    assert (undropped - logits).abs().max() > 1e-3


@every_family
def test_activation_checkpointing_drops_the_same_again(make_checkpoint, family):
    model, dropout = attached(make_checkpoint(family).folder)
    loss, grads = backward(model, dropout)
    grads = {name: grad.clone() for name, grad in grads.items()}
    model.zero_grad()
    for layer in model.layers:
        layer.activation_checkpointing = True
    again, grads_again = backward(model, dropout)
    assert loss == again and all(torch.equal(grads[name], grad) for name, grad in grads_again.items())


def test_micro_batches_drop_the_same_and_another_step_something_else(olmoe):
    generator, results = torch.Generator().manual_seed(1), []
    items = [
        data.Encoded(torch.randint(2, 50, (n,), generator=generator).tolist(), ((2, n),), example=str(i))
        for i, n in enumerate([9, 4, 6, 13, 5, 8, 3])
    ]
    for micro_batch, step in ((7, 5), (3, 5), (2, 5), (7, 6)):
        model, dropout = attached(olmoe.folder)
        dropout.step = step
        done = global_step(model, items, micro_batch, ALONE, dropout=dropout)
        results.append((done.loss.item(), gradients(model)))
    (loss, grads), *same, (other_loss, _) = results
    for again, grads_again in same:
        assert again == pytest.approx(loss, rel=1e-6)
        assert_same_gradients(grads_again, grads)
    assert other_loss != pytest.approx(loss, rel=1e-4)


def peft_linear(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float, p: float, **options) -> Linear:
    """PEFT's own layer with these factors, in training."""
    base = torch.nn.Linear(W.shape[1], len(W), bias=False)
    base.weight.data = W
    config = peft.LoraConfig(r=len(A), lora_alpha=alpha, lora_dropout=p, **options)
    layer = Linear(base, "default", config, r=len(A), lora_alpha=alpha)
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
    return layer.train()


def assert_same_moments(got: torch.Tensor, want: torch.Tensor) -> None:
    """Mean and variance of rows that differ by dropout alone, to five standard errors of either.  [N, out] each"""
    for x in (got, want):
        assert x.var(0).min() > 0
    error = ((got.var(0) + want.var(0)) / len(got)).sqrt()
    assert ((got.mean(0) - want.mean(0)).abs() < 5 * error).all()
    torch.testing.assert_close(got.var(0), want.var(0), rtol=5 * 2 * (2 / len(got)) ** 0.5, atol=0)


N, P = 6000, 0.2


def test_a_linear_layer_drops_as_peft_does_in_mean_and_variance():
    generator = torch.Generator().manual_seed(0)
    W, A, B, x = (torch.randn(shape, generator=generator) for shape in ((5, 24), (3, 24), (5, 3), (1, 24)))
    base, dropout = torch.nn.Linear(24, 5, bias=False), Dropout(P, seed=1)
    base.weight.data = W
    ours = lora.LoRALinear(base, 3, 7.0, partial(dropout, matrix="q_proj"))
    ours.lora_A.data, ours.lora_B.data = A, B
    dropout.see(list(map(str, range(N // 10))), torch.full((N // 10,), 10))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        assert_same_moments(ours(x.expand(N, -1)), peft_linear(W, A, B, 7.0, P)(x.expand(N, -1)))


def test_experts_drop_as_pefts_layers_of_single_experts_do_in_mean_and_variance():
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 5, 24), (2, 3, 24), (2, 5, 3), (4, 24)
    W, A, B, x = (torch.randn(shape, generator=generator) for shape in shapes)
    dropout = Dropout(P, seed=1)
    dropout.see(list(map(str, range(N))), torch.ones(N, dtype=torch.int64))
    rows, token = x.repeat_interleave(N, 0), torch.arange(N).repeat(2)  # each token reaches every expert
    drop = dropout.of_rows(0, "down_proj", token, torch.tensor([9, 2]).repeat_interleave(N))
    offsets = ends([N] * 4)
    y = ops.lora_grouped_linear(rows, W, A, 7 / 3 * B.mT, offsets, 2 * N, drop, None)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for e in (0, 1):
            assert_same_moments(y[e * N : (e + 1) * N], peft_linear(W[e], A[e], B[e], 7.0, P)(x[e].expand(N, -1)))
    torch.testing.assert_close(y[2 * N :], torch.cat([x[e].expand(N, -1) @ W[e].T for e in (2, 3)]))


def test_whatever_names_a_number_changes_whether_it_is_dropped():
    """Masks under two names agree as often as independent ones do: for p = 1/2 in half of all places."""
    x, lengths = torch.ones(4000, 25), torch.full((400,), 10)

    def mask(seed=0, step=0, first=0, matrix="q", shift=0) -> torch.Tensor:
        dropout = Dropout(0.5, seed)
        dropout.step = step
        dropout.see([str(i) for i in range(first, first + 400)], lengths)
        return (dropout(x, matrix) != 0).roll((shift, shift), (0, 1))

    expert = Dropout(0.5, 0)
    expert.see(list(map(str, range(400))), lengths)
    token = torch.arange(4000)
    of_experts = [expert.of_rows(1, "up_proj", token, torch.full((4000,), e))(x, slice(4000)) != 0 for e in range(2)]
    others = [mask(seed=1), mask(step=1), mask(first=1), mask(matrix="k"), mask(shift=1), *of_experts]
    for i, one in enumerate([mask(), *others]):
        assert one.float().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 1e5**0.5)
        for other in others[i:]:
            assert (one == other).float().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 1e5**0.5)
    assert torch.equal(mask(), mask())


def test_p_is_kept_to_within_its_rounding_and_the_mean_of_x_stays():
    for p in (0.05, 0.1, 0.7):
        dropout = Dropout(p, 0)
        dropout.see(["0"], torch.tensor([2000]))
        y = dropout(torch.ones(2000, 403), "q")
        error = (p * (1 - p) / y.numel()) ** 0.5
        assert (y == 0).float().mean().item() == pytest.approx(p, abs=5 * error + 2**-16)
        assert dropout.scale == pytest.approx(1 / (1 - p), rel=1e-4)
        assert y.unique().tolist() == pytest.approx([0, dropout.scale])


def test_nothing_is_dropped_outside_training_and_merging_knows_no_dropout(olmoe):
    model, _ = attached(olmoe.folder)
    plain = copy.deepcopy(model.eval())
    for module in plain.modules():
        if isinstance(module, lora.LoRALinear | lora.LoRAExperts):
            module.dropout = None
    assert torch.equal(model(IDS, LENGTHS)[0], plain(IDS, LENGTHS)[0])
    assert model.adapter == plain.adapter


def test_without_an_adapter_there_is_nothing_to_drop():
    with pytest.raises(InputError, match="--lora-dropout: --method fft trains every weight"):
        parse_settings(["--method", "fft", "--lora-dropout", "0.1"])
