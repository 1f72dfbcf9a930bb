"""Attaching, merging and saving adapters, against peft. tests/vectors holds what selection and experts compute."""

import copy
import math
from dataclasses import replace

import peft
import pytest
import torch

import hellora
from command.cli import InputError
from hub.weights import init_weights
from model import Experts, MoEConfig, MoETransformer, load_model
from run import adapters

L, E, K, D, F_, R, ALPHA = 2, 12, 3, 40, 24, 4, 14.0  # pairwise different; 40 and 24: grouped_mm takes them
HOT = torch.zeros(L, E, dtype=torch.bool)
HOT[0, [1, 4, 5, 9, 11]] = True
HOT[1, [0, 2, 3, 6, 10]] = True


def fresh_model(num_experts: int = E) -> MoETransformer:
    sizes = {"vocab_size": 53, "hidden_size": D, "intermediate_size": F_, "num_hidden_layers": L}
    sizes |= {"num_attention_heads": 5, "num_experts": num_experts, "num_experts_per_tok": K}
    model = MoETransformer(MoEConfig.from_dict({"model_type": "olmoe", **sizes}))
    init_weights(model, std=0.15, seed=3)
    return model


def randomise_adapters(model: MoETransformer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 53, (3, 11), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------- selection

COUNTS = torch.tensor([[5, 9, 0, 5, 1], [0, 1, 7, 3, 7]])


@pytest.mark.parametrize("k", [1, 4, 5])
def test_topped_up_experts_are_half_of_the_hottest_and_random_ones_from_outside_them(k):
    scores = torch.tensor([[5, 9, 1, 0, 7, 3, 8, 2, 4, 6, 11, 10]] * 30)
    by_score = [10, 11, 1, 6, 4]
    found = hellora.select_experts("topup", scores, k, seed=7)
    assert found.sum(-1).tolist() == [k] * 30
    for row in found:
        ids = set(row.nonzero().flatten().tolist())
        assert set(by_score[: k // 2]) <= ids
        assert not ids & set(by_score[k // 2 : k])
    assert len({tuple(row.tolist()) for row in found}) > 2  # layers draw on their own
    assert torch.equal(found, hellora.select_experts("topup", scores, k, seed=7))
    assert not torch.equal(found, hellora.select_experts("topup", scores, k, seed=8))


@pytest.mark.parametrize(
    "policy, counts, num_hot, coverage, says",
    [
        ("hottest", COUNTS, 1, None, "choose from"),
        ("hot", COUNTS, 0, None, "expected 1..5"),
        ("hot", COUNTS, 6, None, "expected 1..5"),
        ("hot", COUNTS, None, None, "expected 1..5"),
        ("hot", -COUNTS, 1, None, "negative"),
        ("hot", COUNTS * math.nan, 1, None, "non-finite"),
        ("hot", COUNTS * 0, 1, None, "no token"),
        ("coverage", COUNTS, None, None, "coverage is None"),
        ("coverage", COUNTS, None, 1.5, "at most 1"),
    ],
)
def test_wrong_selection_input_is_named(policy, counts, num_hot, coverage, says):
    with pytest.raises(InputError, match=says):
        hellora.select_experts(policy, counts, num_hot, coverage=coverage)


# -------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_linear_pair_equals_peft_in_values_gradients_and_merged_weight(kind, bias):
    torch.manual_seed(0)
    base = torch.nn.Linear(13, 29, bias=bias)
    config = peft.LoraConfig(use_dora=kind == "dora")
    theirs = peft.tuners.lora.Linear(copy.deepcopy(base), "a", config, r=5, lora_alpha=14, use_dora=kind == "dora")
    ours = hellora.KINDS[kind][0](base.requires_grad_(False), r=5, alpha=14)
    ours.lora_A.data.copy_(theirs.lora_A["a"].weight.data)
    ours.lora_B.data.normal_()
    theirs.lora_B["a"].weight.data.copy_(ours.lora_B.data)
    pairs = [(ours.lora_A, theirs.lora_A["a"].weight), (ours.lora_B, theirs.lora_B["a"].weight)]
    if kind == "dora":
        magnitude = theirs.lora_magnitude_vector["a"].weight
        assert torch.allclose(ours.lora_m, magnitude)  # both start as the row norm of W
        ours.lora_m.data += torch.rand(29)
        magnitude.data.copy_(ours.lora_m.data)
        pairs.append((ours.lora_m, magnitude))
    x = torch.randn(7, 13)
    for module in (ours, theirs):
        module(x).square().sum().backward()
    assert torch.allclose(ours(x), theirs(x), atol=1e-4)
    for mine, other in pairs:
        assert torch.allclose(mine.grad, other.grad, atol=1e-5 * other.grad.abs().max().item())
    assert base.weight.grad is None
    theirs.merge()
    assert torch.allclose(ours.merged(), theirs.base_layer.weight, atol=1e-5)


def test_the_A_of_an_expert_does_not_depend_on_which_others_are_adapted():
    few, every = fresh_model(), fresh_model()
    hellora.attach(few, HOT, R, ALPHA, seed=7)
    hellora.attach(every, torch.ones_like(HOT), R, ALPHA, seed=7)
    hot_A, every_A = (model.layers[0].mlp.experts.lora["up_proj"].lora_A for model in (few, every))
    assert torch.equal(hot_A, every_A[HOT[0]])


def test_detach_then_attach_elsewhere_is_the_same_as_attaching_there_at_once(ids):
    once, twice = fresh_model(), fresh_model()
    hellora.attach(twice, HOT, R, ALPHA)
    hellora.detach(twice)
    assert type(twice.layers[0].mlp.experts) is Experts
    for model in (once, twice):
        hellora.attach(model, ~HOT, R, ALPHA)
        randomise_adapters(model)
    assert torch.allclose(once(ids)[0], twice(ids)[0], atol=1e-5)
    with pytest.raises(InputError, match="already"):
        hellora.attach(twice, HOT, R, ALPHA)


# --------------------------------------------------------------------------------------------- save and load


def saved(folder, model: MoETransformer) -> None:
    adapters.save_adapter(adapters.adapter_state(model), folder, model.adapter, model="tiny", method="hellora")


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda f: (f / "adapter.json").unlink(), "adapter.json is missing"),
        (lambda f: (f / "adapter.safetensors").unlink(), "missing"),
        (lambda f: edit(f, hot=[[0]]), "listed for 1 layers"),
        (lambda f: edit(f, r=8), "lora_A is .*4, .*, expected .*8, "),
        (lambda f: edit(f, targets="pure"), "unexpected"),
        (lambda f: edit(f, {"a": torch.ones(1)}), "missing, expected"),
    ],
)
def test_a_damaged_or_foreign_adapter_is_refused(tmp_path, damage, says):
    model = fresh_model()
    hellora.attach(model, HOT, R, ALPHA)
    saved(tmp_path, model)
    damage(tmp_path)
    with pytest.raises(InputError, match=says):
        adapters.load_adapter(fresh_model(), tmp_path)
    with pytest.raises(InputError, match=says):
        adapters.read_own_adapter(tmp_path, model.config)  # as exports do


def edit(folder, tensors=None, **changes) -> None:
    """Save the adapter again, with other tensors or another description."""
    adapter, state = adapters.read_adapter(folder)
    adapters.save_adapter(tensors or state, folder, replace(adapter, **changes))


def test_layers_are_reported_by_their_number_in_the_model(make_checkpoint):
    model = load_model(make_checkpoint("deepseek").folder)  # its first layer has no experts
    hellora.attach(model, adapters.hot_mask([[1, 4], [0], [2, 3, 5]], model.config), 2, 3.0)
    lines = list(adapters.report(model))
    assert lines[0] == "layer  1: 2 of 7 experts adapted: 1 4" and lines[2] == "layer  3: 3 of 7 experts adapted: 2 3 5"


def test_rank_expert_list_and_targets_are_checked():
    with pytest.raises(InputError, match="expected 1..24"):
        hellora.attach(fresh_model(), HOT, 25, ALPHA)
    with pytest.raises(InputError, match="the expert list is for"):
        hellora.attach(fresh_model(), HOT[:1], R, ALPHA)
    with pytest.raises(InputError, match="targets 'most' is unknown"):
        hellora.attach(fresh_model(), HOT, R, ALPHA, targets="most")
