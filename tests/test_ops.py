"""Every hand-written backward pass against torch's gradients of the plain formula, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import hellora
import ops
from attention import RMSNorm, attend_apart
from benchmarks.measure import saved_bytes
from hub.config import MoEConfig
from model import MoETransformer, init_weights
from ops import GroupedLowRankLinear, HeadLoss, LowRankLinear, WeightedSwiGLU, grouped_outer

COUNTS = [3, 0, 5, 1, 2]  # rows of each of G = 5 groups, of which the first n are hot


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()


def ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


def plain_grouped(x, W, A, B, counts):
    """One group at a time: (W_g + B_g A_g) x, the sum only where there is a pair."""
    parts = []
    for g, rows in enumerate(x.split(counts)):
        parts.append(rows @ (W[g] + B[g] @ A[g] if g < len(A) else W[g]).T)
    return torch.cat(parts)


@pytest.mark.parametrize("devices", [("cuda",), ("cpu",)], ids=["loop", "one kernel"])
@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 0, 4, 7], [0, 0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype, fan_in, fan_out, r", [(torch.float64, 7, 6, 2), (torch.float32, 12, 20, 4)], ids=str)
def test_adapted_groups_have_the_gradients_of_the_plain_formula(
    monkeypatch, dtype, fan_in, fan_out, r, counts, n, devices
):
    monkeypatch.setattr(ops, "ONE_KERNEL", devices)
    source = draw(sum(counts), fan_in, dtype=dtype)
    W = draw(len(counts), fan_out, fan_in, dtype=dtype).detach()
    A, B = draw(n, r, fan_in, dtype=dtype), draw(n, fan_out, r, dtype=dtype)
    upstream, S = draw(sum(counts), fan_out, dtype=dtype).detach(), sum(counts[:n])
    x = source.tanh()
    remake = lambda rows, source: source[rows].tanh()  # noqa: E731
    y = GroupedLowRankLinear.apply(x, W, A, B.mT, ends(counts), S, remake, source[:S].detach())
    want = plain_grouped(source.tanh(), W, A, B, counts)
    torch.testing.assert_close(y, want)
    grads = torch.autograd.grad(y, (source, A, B), upstream)  # raises if one of them is None
    want_grads = torch.autograd.grad(want, (source, A, B), upstream, materialize_grads=True)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("noted", [False, True])
def test_an_adapted_linear_passes_gradcheck(noted, bias):
    W, b = draw(5, 7).detach(), draw(5).detach() if bias else None

    def compute(source, A, B):
        x = ops.noted(source.tanh(), lambda y, s: y.T @ s.tanh(), source) if noted else source.tanh()
        return LowRankLinear.apply(x, A, W, b, B.T)[0]

    source, A, B = draw(9, 7), draw(2, 7), draw(5, 2)
    assert torch.allclose(compute(source, A, B), F.linear(source.tanh(), W + B @ A, b))
    assert torch.autograd.gradcheck(compute, (source, A, B))


def test_parts_of_a_batch_give_the_gradient_of_a_weight_behind_all_of_them():
    q, k, v = (draw(11, heads, 4, seed=i) for i, heads in enumerate((6, 3, 3)))
    y, out = draw(11, 5), attend_apart(q, k, v, [4, 1, 6])
    gradient, parts = out.noted
    assert len(parts) == 3
    torch.testing.assert_close(gradient(y, *parts), y.T @ out)


def test_projections_of_one_input_together_are_each_alone():
    """As q, k and v of grouped-query attention, of unlike sizes."""
    source, fan_outs, r = draw(9, 7), (5, 3, 4), 2
    Ws, biases = [draw(out, 7).detach() for out in fan_outs], [draw(5).detach(), None, draw(4).detach()]
    As, Bs = [draw(r, 7, seed=out) for out in fan_outs], [draw(out, r) for out in fan_outs]

    def compute(source, *factors):
        A, Bs = torch.cat(factors[:3]), factors[3:]
        parts = [t for W, b, B in zip(Ws, biases, Bs, strict=True) for t in (W, b, B.T)]
        return LowRankLinear.apply(source.tanh(), A, *parts)

    for y, W, b, A, B in zip(compute(source, *As, *Bs), Ws, biases, As, Bs, strict=True):
        torch.testing.assert_close(y, F.linear(source.tanh(), W + B @ A, b))
    assert torch.autograd.gradcheck(compute, (source, *As, *Bs))


def test_no_gradient_is_computed_of_an_input_that_nobody_trains():
    """The first layer's: its own weights' products in the backward pass are as large as all of the forward pass."""
    x, W, A, B = draw(9, 7).detach(), draw(5, 7).detach(), draw(2, 7), draw(5, 2)
    y = LowRankLinear.apply(x, A, W, None, B.T)[0]
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 9 * 2 * (5 + 7 + 5)  # B's input, A, B
    x, W, A, B = draw(11, 7).detach(), draw(5, 6, 7).detach(), draw(3, 2, 7), draw(3, 6, 2)
    y = GroupedLowRankLinear.apply(x, W, A, B.mT, ends(COUNTS), 8, lambda rows, x: x[rows], x[:8])
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 8 * 2 * (6 + 7 + 6)


def test_a_frozen_A_gets_no_gradient_and_the_others_theirs():
    x, W, A, B = draw(9, 7), draw(5, 7).detach(), draw(2, 7).detach(), draw(5, 2)
    LowRankLinear.apply(x, A, W, None, B.T)[0].square().sum().backward()
    assert A.grad is None and x.grad.any() and B.grad.any()
    x, W, A, B = draw(11, 7), draw(5, 6, 7).detach(), draw(3, 2, 7).detach(), draw(3, 6, 2)
    y = GroupedLowRankLinear.apply(x, W, A, B.mT, ends(COUNTS), 8, lambda rows, x: x[rows], x.detach()[:8])
    y.square().sum().backward()
    assert A.grad is None and x.grad.any() and B.grad.any()


def test_the_weighted_swiglu_passes_gradcheck_and_is_the_formula():
    gate_up, weight = draw(6, 10), draw(6, 1)
    gate, up = gate_up.split(5, dim=1)
    assert torch.allclose(WeightedSwiGLU.apply(gate_up, weight), weight * gate * gate.sigmoid() * up)
    assert torch.autograd.gradcheck(WeightedSwiGLU.apply, (gate_up, weight))


@pytest.mark.parametrize("rows", [1, 4, 256])
@pytest.mark.parametrize("targets", [0, 9])
def test_the_loss_in_slices_is_the_cross_entropy(monkeypatch, targets, rows):
    monkeypatch.setattr(ops, "HEAD_ROWS", rows)
    x, W, target = draw(targets, 5), draw(13, 5), torch.arange(targets) * 3 % 13
    loss = HeadLoss.apply(x, W, target)
    want = F.cross_entropy(x @ W.T, target, reduction="sum")
    torch.testing.assert_close(loss, want)
    for grad, want_grad in zip(
        torch.autograd.grad(3 * loss, (x, W)), torch.autograd.grad(3 * want, (x, W)), strict=True
    ):
        torch.testing.assert_close(grad, want_grad)
    x.requires_grad_(False)
    assert HeadLoss.apply(x, W.detach(), target).equal(loss.detach())


def test_the_loss_never_holds_more_logits_than_a_slice(monkeypatch):
    monkeypatch.setattr(ops, "HEAD_ROWS", 4)
    x, W, target, seen = draw(30, 5, dtype=torch.float32), draw(1000, 5, dtype=torch.float32), torch.arange(30), []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: seen.append(linear(*args)) or seen[-1])
    HeadLoss.apply(x, W, target)
    assert [len(logits) for logits in seen] == [4] * 7 + [2]


def test_grouped_outer_is_one_product_a_group():
    x, y = draw(sum(COUNTS), 12, dtype=torch.float32), draw(sum(COUNTS), 20, dtype=torch.float32)
    parts = zip(y.split(COUNTS), x.split(COUNTS), strict=True)
    want = torch.stack([torch.einsum("ro,ri->oi", y_g, x_g) for y_g, x_g in parts])
    torch.testing.assert_close(grouped_outer(y, x, ends(COUNTS)), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_norm_gives_the_gradient_of_a_weight_behind_it_without_its_output(dtype):
    norm, x, y = RMSNorm(40, eps=0.1), draw(9, 40), draw(9, 3)  # an eps that counts
    norm.weight.data = draw(40)
    want = y.T @ norm.double()(x)
    got = norm.to(dtype).gradient(y.to(dtype), x.to(dtype))
    torch.testing.assert_close(got, want.to(dtype), rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


# ------------------------------------------------------------------------------------------- of a whole model

SHAPE = dict(
    model_type="olmoe", vocab_size=61, hidden_size=128, intermediate_size=32, num_hidden_layers=3, num_experts=16,
    num_attention_heads=4, num_key_value_heads=4, num_experts_per_tok=4,
)  # fmt: skip
IDS = torch.randint(0, 61, (3, 160), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([160, 124, 100])


def small_model() -> MoETransformer:
    model = MoETransformer(MoEConfig.from_dict(SHAPE))
    init_weights(model, std=0.05)
    return model


def attached(kind: str = "lora") -> MoETransformer:
    model, hot = small_model(), torch.zeros(3, 16, dtype=torch.bool)
    hot[:, 2:6] = True
    hellora.attach(model, hot, 4, 8.0, kind=kind)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    return model


def saved_floats(model: MoETransformer) -> int:
    return saved_bytes(lambda: model(IDS, LENGTHS, labels=IDS)[0], model.parameters()) // 4


def test_an_adapter_keeps_neither_the_rows_of_hot_experts_nor_what_norms_and_padding_made():
    frozen = small_model().requires_grad_(False)
    frozen.embed_tokens.register_forward_hook(lambda module, args, x: x.requires_grad_())
    T, L, D = int(LENGTHS.sum()), 3, 128
    # The input of router and experts, D floats a token, and what has the size of the rank. Keeping what the norm made
    # for q, k and v, the input of o_proj, or the hot rows, would each be D more.
    assert saved_floats(attached()) - saved_floats(frozen) < L * T * 2 * D


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_activation_checkpointing_changes_neither_loss_nor_gradients_and_keeps_less(kind):
    results = []
    for checkpointing in (False, True):
        model = attached(kind)
        for layer in model.layers:
            layer.activation_checkpointing = checkpointing
        loss, selected = model(IDS, LENGTHS, labels=IDS)
        loss.backward()
        kept = saved_floats(model)
        results.append((loss, selected, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, kept))
    (loss, selected, grads, kept), (other_loss, other_selected, other_grads, kept_less) = results
    assert loss == other_loss and selected.equal(other_selected)
    assert grads.keys() == other_grads.keys()
    assert all(grads[name].equal(other_grads[name]) for name in grads)
    assert kept_less < kept / 5
