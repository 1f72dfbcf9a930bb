"""One budget spent otherwise: pairs of another rank on experts, all experts at r k / E, parts without pairs."""

import pytest
import torch
from conftest import call
from safetensors.torch import load_file

import hellora
import train
from hub.config import PRESETS
from model import MoEConfig, MoETransformer, load_model
from recipes.methods import flat_rank
from run.adapters import load_adapter

STEPS = "--steps 2 --batch 3 --sample 0.005 --lr 0.02"


@pytest.mark.parametrize("num_hot, expert_rank", [(8, 32), (64, 4)])
def test_rank_4_on_all_64_experts_of_olmoe_trains_what_rank_32_on_8_does(num_hot, expert_rank):
    with torch.device("meta"):
        model = MoETransformer(MoEConfig.from_dict(PRESETS["olmoe-1b-7b"]))
    hot = torch.arange(64).expand(16, -1) < num_hot
    hellora.attach(model, hot, 32, 64, expert_rank=expert_rank)
    assert hellora.count_parameters(model)[0] == 47_218_688


@pytest.mark.parametrize("r, k, E, rank", [(32, 8, 64, 4), (8, 8, 64, 1), (12, 5, 60, 1), (10, 4, 8, 5)])
def test_the_flat_rank_keeps_the_budget_to_the_last_parameter(r, k, E, rank):
    assert flat_rank(r, k, E) == rank and rank * E == r * k


@pytest.mark.parametrize("flags", ["--method lora-flat", "--method hellora --expert-rank 3 --k 5"])
def test_pairs_of_another_rank_train_are_saved_and_add_alpha_over_r_b_a(flags, tmp_path):
    call(train, flags, STEPS, "--out", tmp_path / "run")
    rank = {"lora-flat": 1, "hellora": 3}[flags.split()[1]]
    factors = load_file(tmp_path / "run/adapter/adapter.safetensors")
    A, B = (factors[f"layers.1.mlp.experts.lora.down_proj.lora_{name}"] for name in "AB")
    assert A.shape[1] == B.shape[2] == rank and B.abs().max() > 0
    assert factors["layers.1.self_attn.q_proj.lora_A"].shape[0] == 8
    base, adapted = load_model("tiny"), load_model("tiny")
    load_adapter(adapted, tmp_path / "run/adapter")
    hot = adapted.adapter.hot[1]
    ids = torch.arange(3, 20).view(1, 17)
    logits, _ = adapted(ids)
    hellora.merge(adapted)
    assert torch.allclose(adapted(ids)[0], logits, atol=1e-4) and not torch.allclose(base(ids)[0], logits, atol=1e-3)
    before, after = base.layers[1].mlp.experts, adapted.layers[1].mlp.experts
    for i, e in enumerate(hot):
        delta = after.down_proj[after.position[e]] - before.down_proj[before.position[e]]
        assert torch.allclose(delta, 16 / 8 * B[i] @ A[i], atol=1e-6)  # alpha and r are those of the whole adapter


@pytest.mark.parametrize(
    "flags, modules",
    [
        ("--targets attention --k 5", {"experts", "self_attn"}),
        ("--experts none", {"self_attn", "gate"}),
        ("--experts none --targets attention", {"self_attn"}),
        ("--targets pure --k 5", {"experts"}),
    ],
)
def test_what_has_a_pair_follows_targets_and_experts(flags, modules, tmp_path):
    call(train, flags, STEPS, "--out", tmp_path / "run")
    moved = {name for name, B in load_file(tmp_path / "run/adapter/adapter.safetensors").items() if "lora_B" in name}
    kinds = {part for part in ("experts", "self_attn", "gate") for name in moved if f".{part}." in name}
    assert kinds == modules
