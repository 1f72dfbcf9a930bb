"""Ten optimizer steps in float64 beside stacks that we did not write: transformers with peft, or with autograd."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import LOADABLE
from peft import PeftModel
from test_export import peft_folder
from test_ops import written_out
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import hellora
from model import MoETransformer, load_model
from run import adapters

STEPS, R, ALPHA = 10, 5, 7.0
IDS = torch.randint(2, 50, (4, 9), generator=torch.Generator().manual_seed(0))


def adapted(folder, hot: int | None = None) -> MoETransformer:
    """A model with fresh adapters in float64 on `hot` experts per layer, or on all."""
    model = load_model(folder)
    E, L = model.config.num_experts, len(model.config.moe_layers)
    chosen = torch.stack([torch.arange(E).roll(i) < (hot or E) for i in range(L)])
    hellora.attach(model, chosen, R, ALPHA, seed=3)
    return model.double()


def train(parameters, compute, after_backward=lambda: None) -> tuple[Tensor, Tensor]:
    """The loss of each step, and the logits after the last one.  compute() -> logits"""
    optimizer = torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(compute().flatten(0, 1), IDS.flatten())
        loss.backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), compute().detach()


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    assert ours[0][-1] < 0.95 * ours[0][0]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


@pytest.fixture
def in_float64(monkeypatch):
    """transformers takes softmax and norms in float32 whatever the model's dtype: here they stay in float64."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, *args, dtype=None, **kwargs: softmax(x, *args, **kwargs))

    def route(forward, x: Tensor):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "float", lambda t: t)
            return forward(x)

    def exact(hf: torch.nn.Module) -> torch.nn.Module:
        for module in hf.modules():
            if "RMSNorm" in type(module).__name__:
                options = {"eps": module.variance_epsilon}
                module.forward = lambda x, m=module, o=options: m.weight * F.rms_norm(x, x.shape[-1:], **o)
            elif type(module).__name__.lower().endswith("topkrouter"):
                module.forward = partial(route, module.forward)
        return hf.double()

    return exact


def trained_by_us(model: MoETransformer) -> tuple[Tensor, Tensor]:
    return train([p for p in model.parameters() if p.requires_grad], lambda: model(IDS)[0])


def test_lora_on_all_experts_takes_the_steps_of_transformers_with_peft(olmoe, tmp_path, in_float64):
    """peft has one pair of rank 2r for gate and up of an expert: the same while its off-diagonal blocks stay zero."""
    model = adapted(olmoe.folder)
    adapters.save_adapter(adapters.adapter_state(model.float()), tmp_path / "adapter", model.adapter)
    base = AutoModelForCausalLM.from_pretrained(
        olmoe.folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    theirs = PeftModel.from_pretrained(base, peft_folder(olmoe.folder, tmp_path, tmp_path / "out"), is_trainable=True)
    theirs = in_float64(theirs).eval()
    E, F_ = model.config.num_experts, model.config.intermediate_size
    both = [p for name, p in theirs.named_parameters() if "experts.base_layer.lora_B" in name]
    assert len(both) == 4 and all(p.shape == (2 * F_, 2 * R * E) for p in both)

    def keep_gate_and_up_apart() -> None:
        for p in both:
            grad = p.grad.view(2, F_, 2, R, E)  # rows of gate or up, ranks of gate or up; the expert is innermost
            grad[0, :, 1] = grad[1, :, 0] = 0

    trains = [p for p in theirs.parameters() if p.requires_grad]
    want = train(trains, lambda: theirs(IDS).logits, keep_gate_and_up_apart)
    assert_same(trained_by_us(model.double()), want)


@pytest.mark.parametrize("family", LOADABLE)
def test_hellora_takes_the_steps_of_adapters_written_out_on_transformers(make_checkpoint, family, in_float64):
    checkpoint = make_checkpoint(family)
    model = adapted(checkpoint.folder, hot=2)
    hf = in_float64(copy.deepcopy(checkpoint.hf))
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if "lora_" in n}

    def sum_of(W: Tensor, pair: nn.Module, name: str) -> Tensor:
        return W.detach() + ALPHA / R * leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]

    def compute() -> Tensor:
        return functional_call(hf, written_out(model, sum_of), (IDS,)).logits

    want = train(leaves.values(), compute)
    assert_same(trained_by_us(model), want)
