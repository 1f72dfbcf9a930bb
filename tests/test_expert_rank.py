"""One budget spent otherwise: pairs of another rank on experts, all experts at r k / E, parts without pairs."""

import pytest
import torch
from safetensors.torch import load_file

import hellora
import train
from command.cli import InputError
from hub.config import PRESETS
from model import MoEConfig, MoETransformer, load_model
from recipes.methods import flat_rank
from run.adapters import load_adapter

STEPS = ["--steps", "2", "--batch", "3", "--sample", "0.005", "--lr", "0.02"]


def trainable(config: MoEConfig, num_hot: int, r: int, expert_rank: int | None = None) -> int:
    with torch.device("meta"):
        model = MoETransformer(config)
    hot = torch.arange(config.num_experts).expand(len(config.moe_layers), -1) < num_hot
    hellora.attach(model, hot, r, 2 * r, expert_rank=expert_rank)
    return hellora.count_parameters(model)[0]


def test_rank_4_on_all_64_experts_of_olmoe_trains_what_rank_32_on_8_does():
    config = MoEConfig.from_dict(PRESETS["olmoe-1b-7b"])
    assert flat_rank(32, 8, 64) == 4
    assert trainable(config, 8, 32) == trainable(config, 64, 32, expert_rank=4) == 47_218_688


@pytest.mark.parametrize("r, k, E, rank", [(8, 8, 64, 1), (32, 6, 64, 3), (12, 5, 60, 1), (10, 4, 8, 5)])
def test_the_flat_rank_keeps_the_budget_to_the_last_parameter(r, k, E, rank):
    assert flat_rank(r, k, E) == rank and rank * E == r * k


@pytest.mark.parametrize("r, k, E", [(8, 2, 64), (31, 8, 64), (8, 4, 60)])
def test_a_budget_that_no_whole_rank_spends_is_refused(r, k, E):
    with pytest.raises(InputError, match=f"--rank {r} on {k} of {E} experts is rank .* give --rank or --k to suit"):
        flat_rank(r, k, E)


@pytest.mark.parametrize(
    "flags", [["--method", "lora-flat"], ["--method", "hellora", "--expert-rank", "3", "--k", "5"]]
)
def test_pairs_of_another_rank_train_are_saved_and_add_alpha_over_r_b_a(flags, tmp_path):
    train.main([*flags, *STEPS, "--out", str(tmp_path / "run")])
    rank = {"lora-flat": 1, "hellora": 3}[flags[1]]
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
        (["--targets", "attention", "--k", "5"], {"experts", "self_attn"}),
        (["--experts", "none"], {"self_attn", "gate"}),
        (["--experts", "none", "--targets", "attention"], {"self_attn"}),
        (["--targets", "pure", "--k", "5"], {"experts"}),
    ],
)
def test_what_has_a_pair_follows_targets_and_experts(flags, modules, tmp_path):
    train.main([*flags, *STEPS, "--out", str(tmp_path / "run")])
    moved = {name for name, B in load_file(tmp_path / "run/adapter/adapter.safetensors").items() if "lora_B" in name}
    kinds = {part for part in ("experts", "self_attn", "gate") for name in moved if f".{part}." in name}
    assert kinds == modules


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--method", "lora-flat", "--expert-rank", "2"], "--expert-rank: --method lora-flat sets it; leave it out"),
        (["--method", "dr-lora", "--expert-rank", "2"], "--expert-rank: --method dr-lora sets it; leave it out"),
        (["--method", "fft", "--expert-rank", "2"], "--expert-rank: --method fft trains every weight"),
        (["--method", "lora-flat", "--experts", "hot"], "--method lora-flat adapts all experts"),
        (["--experts", "none", "--k", "4"], "--k 4 has no meaning with --method hellora and experts none"),
        (["--expert-rank", "49"], "rank 49; expected 1..48"),
        (["--method", "lora-flat", "--k", "3"], "rank 0.375 on all of them"),
    ],
)
def test_an_expert_rank_that_cannot_be_is_one_line(flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train.main([*flags, *STEPS, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
