"""What counts say: shares, overlap and advice, by hand, by exhaustion, and by adding up what a forward multiplies."""

import itertools
import json
import random

import matplotlib.image
import pytest
import torch

import data
import hellora
import profile
from hub.config import PRESETS
from lora import LoRALinear
from model import MoEConfig, load_model
from routing import advice, pictures, statistics
from run import log


def test_top_share_and_entropy_have_their_closed_forms():
    counts = torch.tensor([[3] * 8, [0, 0, 0, 9, 0, 0, 0, 0], [4, 0, 16, 32, 0, 8, 2, 2]])
    assert statistics.top_share(counts, 3).tolist() == pytest.approx([3 / 8, 1, 7 / 8])
    bits = 1 / 2 + 2 / 4 + 3 / 8 + 4 / 16 + 2 * 5 / 32  # of p = 1/2, 1/4, 1/8, 1/16, 1/32, 1/32
    assert statistics.entropy(counts).tolist() == pytest.approx([1, 0, bits / 3])
    assert statistics.top_share(counts, 8).tolist() == [1, 1, 1]


def test_jaccard_is_shared_experts_over_all_experts_of_two_hot_sets():
    draw = random.Random(1)
    sets = [[{e for e in range(6) if draw.random() < 0.5} for _ in range(9)] for _ in range(2)]
    sets[0][3] = sets[1][3] = set()
    sets[0][4], sets[1][4] = {1, 2}, {3, 5}
    hot_a, hot_b = (torch.tensor([[e in hot for e in range(6)] for hot in layers]) for layers in sets)
    wanted = [len(a & b) / len(a | b) if a | b else 1 for a, b in zip(*sets, strict=True)]
    assert statistics.jaccard(hot_a, hot_b).tolist() == pytest.approx(wanted)
    assert wanted[3:5] == [1, 0] and statistics.jaccard(hot_a, hot_a).tolist() == [1] * 9


def test_table_names_share_entropy_hottest_and_coldest_of_every_layer():
    counts = torch.tensor([[1, 5, 2, 2], [4, 1, 4, 1], [0, 0, 0, 10]])
    header, *layers, last = statistics.table(counts, 1)
    assert header.split() == ["layer", "top", "1", "of", "4", "entropy", "hottest", "coldest"]
    assert [line.split() for line in layers] == [
        ["0", "50.0", "%", "0.880", "1", "2", "3", "0", "0", "2"],  # equal counts: the lower id first
        ["1", "40.0", "%", "0.861", "0", "2", "1", "3", "1", "3"],
        ["2", "100.0", "%", "0.000", "3", "0", "1", "2", "0", "1"],
    ]
    assert last == "top 1 of 4: 63.3 % of the routed tokens, mean of the layers (uniform 25.0 %)"


@pytest.mark.parametrize("layers, experts, num_hot", [(4, 64, 8), (32, 8, 2), (1, 3, 3)])
def test_counts_and_overlap_of_any_model_are_wide_pictures(tmp_path, layers, experts, num_hot):
    counts = torch.arange(layers * experts).view(layers, experts) ** 2
    pictures.draw_profile(counts, num_hot, "a title", tmp_path / "profile.png")
    hot = hellora.hottest(counts, num_hot)
    pictures.draw_overlap(hot, hot.roll(1, dims=1), "a and b", tmp_path / "overlap.png")
    for name in ("profile.png", "overlap.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert picture.shape[1] >= 1000 and picture.std() > 0.1


# ------------------------------------------------------------------------------------------------ two profiles


@pytest.mark.parametrize("num_hot, experts", [(1, 4), (2, 5), (3, 4), (3, 3)])
def test_overlap_by_chance_is_the_mean_over_all_pairs_of_sets(num_hot, experts):
    sets = [set(chosen) for chosen in itertools.combinations(range(experts), num_hot)]
    mean = sum(len(a & b) / len(a | b) for a in sets for b in sets) / len(sets) ** 2
    assert statistics.chance_overlap(num_hot, experts) == pytest.approx(mean)


# ------------------------------------------------------------------------------------------- how many experts


@pytest.mark.parametrize("targets", ["shared", "all", "gate", "pure"])
@pytest.mark.parametrize("family", ["olmoe", "deepseek"])  # the latter's first layer has no experts
def test_parameters_and_flops_of_every_k_are_those_of_a_model_with_these_adapters(family, targets, make_checkpoint):
    """FLOPs: a multiplication and an addition for every entry of A and of B and every row that passes them."""
    folder, r = make_checkpoint(family).folder, 3
    ids = torch.randint(2, 50, (5, 9), generator=torch.Generator().manual_seed(2))
    batch = data.Batch(ids, torch.tensor([9, 4, 7, 9, 2]), torch.full_like(ids, -100))
    counted = profile.profile_routing(load_model(folder), [batch])
    config = load_model(folder).config
    choices = advice.choices(counted.counts, counted.num_experts_per_tok, advice.adapter_sizes(config, r, targets))
    assert [choice.k for choice in choices] == list(range(1, config.num_experts + 1))
    for choice in choices:
        model = load_model(folder)
        hot = hellora.hottest(counted.counts, choice.k)
        hellora.attach(model, hot, r, alpha=5.0, targets=targets)
        _, selected = model(batch.input_ids, batch.lengths)  # B is zero: routed as it was counted
        linears = [module for module in model.modules() if isinstance(module, LoRALinear)]
        entries = counted.num_tokens * sum(linear.lora_A.numel() + linear.lora_B.numel() for linear in linears)
        for i, row, chosen in zip(config.moe_layers, hot, selected, strict=True):
            pairs = model.layers[i].mlp.experts.lora.values()
            of_one = sum(pair.lora_A[0].numel() + pair.lora_B[0].numel() for pair in pairs)
            entries += of_one * sum(bool(row[e]) for e in chosen.flatten().tolist() if e >= 0)
        assert choice.flops == pytest.approx(2 * entries / counted.num_tokens)
        assert choice.parameters == hellora.count_parameters(model)[0]
        share = (counted.counts * hot).sum(-1) / counted.counts.sum(-1)
        assert (choice.coverage, choice.least) == pytest.approx((share.mean().item(), share.min().item()))


def test_on_olmoe_the_papers_saving_of_38_7_percent_is_a_coverage_of_51_6_percent():
    config = MoEConfig.from_dict(PRESETS["olmoe-1b-7b"])
    counts = torch.zeros(16, 64)
    counts[:, :8], counts[:, 8:] = 0.516 / 8, 0.484 / 56  # of the routed tokens
    choices = advice.choices(counts, 8, advice.adapter_sizes(config, r=32))
    assert choices[7].coverage == pytest.approx(0.516)
    # Per layer: attention 524,288, router 67,584, 8 experts 294,912 each.
    assert choices[-1].flops == 2 * 16 * 2_951_168
    assert 1 - choices[7].flops / choices[-1].flops == pytest.approx(0.387, abs=5e-4)


def test_advice_table_shows_powers_of_two_and_the_smallest_k_that_reaches_each_target():
    counts = torch.tensor([[50, 20, 15, 10, 5, 0], [40, 30, 10, 10, 5, 5]])
    choices = advice.choices(counts, 2, advice.Sizes(others=10, expert=3))
    _, *rows, half, ninety, all_of_it, rule = advice.table(choices, 2, (0.5, 0.9, 1.0))
    assert [row.split()[:4] for row in rows] == [
        ["1", "45.0%", "40.0%", "16"],
        ["2", "70.0%", "70.0%", "22"],
        ["4", "92.5%", "90.0%", "34"],
        ["6", "100.0%", "100.0%", "46"],
    ]
    assert rows[0].split()[4:] == ["34.8%", "31", "70.0%"]  # 16 / 46; 2 (10 + 2 * 3 * (0.5 + 0.4)) = 30.8 of 44
    assert half == "to cover 50% of the routed tokens: k = 2 on average, k = 2 in every layer"
    assert ninety == "to cover 90% of the routed tokens: k = 4 on average, k = 4 in every layer"
    assert all_of_it == "to cover 100% of the routed tokens: k = 6 on average, k = 6 in every layer"
    assert rule == "the paper's rule, k = experts per token: k = 2 covers 70.0%"


def test_an_adapted_expert_without_a_token_in_any_whole_epoch_is_named_and_a_cold_one_is_not(olmoe):
    model = load_model(olmoe.folder)
    L, E = 4, 7
    hot = torch.zeros(L, E, dtype=torch.bool)
    hot[0, [1, 5]] = hot[2, 3] = True
    hellora.attach(model, hot, r=2, alpha=3.0)
    idle, counts = log.IdleExperts(model), torch.ones(L, E)
    without = counts.clone()
    without[0, 5] = without[2, 3] = without[1, 1] = 0
    idle.observe(without, end_of_epoch=False)
    assert idle.names() == ["0:5", "2:3"]  # the run so far is shorter than an epoch
    idle.observe(counts, end_of_epoch=True)
    assert idle.names() == []  # the second step of the epoch reached them
    idle.observe(without, end_of_epoch=True)
    idle.observe(counts, end_of_epoch=True)
    again = log.IdleExperts(model)
    again.load_state_dict(json.loads(json.dumps(idle.state_dict())))
    assert again.names() == idle.names() == ["0:5", "2:3"]  # not reached in the second of three epochs


def test_counts_of_an_unfinished_epoch_survive_a_resume(olmoe):
    model = load_model(olmoe.folder)
    hellora.attach(model, torch.arange(28).view(4, 7) % 3 == 0, r=2, alpha=3.0)
    before, after = log.IdleExperts(model), log.IdleExperts(model)
    before.observe(torch.ones(4, 7), end_of_epoch=False)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    after.observe(torch.zeros(4, 7), end_of_epoch=True)
    assert after.names() == []  # reached before the resume
