"""Numbers that the paper prints and code can check: parameter counts of its tables, from the config alone."""

import pytest
import torch

import hellora
from config import PRESETS, MoEConfig
from model import MoETransformer


def adapted(preset: str, num_hot: int | None, targets: str = "all") -> tuple[int, int]:
    """(trainable, total) parameters with adapters attached as training attaches them, on a model without weights."""
    with torch.device("meta"):
        model = MoETransformer(MoEConfig.from_dict(PRESETS[preset]))
    counts = torch.ones(len(model.layers), model.config.num_experts)
    hot = hellora.select_experts("all" if num_hot is None else "hot", counts, num_hot)
    hellora.attach(model, hot, r=32, alpha=64, targets=targets)
    return hellora.count_parameters(model)


@pytest.mark.parametrize(
    "table, preset, num_hot, targets, trainable, percent",
    [
        ("2: LoRA", "olmoe-1b-7b", None, "all", 311_459_840, 4.3075),
        ("2: HELLoRA", "olmoe-1b-7b", 8, "all", 47_218_688, 0.6778),
        ("5: HELLoRA_pure", "olmoe-1b-7b", 8, "pure", 37_748_736, 0.5426),
        ("5: HELLoRA_gate", "olmoe-1b-7b", 8, "gate", 38_830_080, 0.5581),
        ("7: k = 2", "olmoe-1b-7b", 2, "all", 18_907_136, 0.2725),
        ("7: k = 4", "olmoe-1b-7b", 4, "all", 28_344_320, 0.4080),
        ("7: k = 16", "olmoe-1b-7b", 16, "all", 84_967_424, 1.2131),
        ("3: LoRA", "mixtral-8x7b", None, "all", 484_450_304, 1.0267),
        ("3: HELLoRA", "mixtral-8x7b", 2, "all", 144_711_680, 0.3089),
    ],
)
def test_trainable_parameters_of_the_tables_to_the_last_one(table, preset, num_hot, targets, trainable, percent):
    ours, total = adapted(preset, num_hot, targets)
    assert ours == trainable
    assert 100 * ours / total == pytest.approx(percent, abs=5e-5)  # the share of base and adapters, as PEFT counts


@pytest.mark.parametrize("preset, total", [("olmoe-1b-7b", 6_919_161_856), ("mixtral-8x7b", 46_702_792_704)])
def test_the_presets_are_the_published_models(preset, total):
    with torch.device("meta"):
        model = MoETransformer(MoEConfig.from_dict(PRESETS[preset]))
    assert sum(parameter.numel() for parameter in model.parameters()) == total


def test_the_abstracts_15_74_percent_is_a_ratio_of_percentages_the_parameters_are_15_16_percent():
    (lora, lora_total), (ours, ours_total) = adapted("olmoe-1b-7b", None), adapted("olmoe-1b-7b", 8)
    assert (ours / ours_total) / (lora / lora_total) == pytest.approx(0.1574, abs=5e-5)
    assert ours / lora == pytest.approx(0.1516, abs=5e-5)


def test_the_attached_parameters_follow_the_formula():
    """r (d_in + d_out) for q, k, v, o, the router, and the three projections of every adapted expert."""
    L, D, F, E, r = 16, 2048, 1024, 64, 32
    for num_hot in (1, 8, 63):
        layer = 4 * r * (D + D) + r * (D + E) + num_hot * 3 * r * (D + F)
        assert adapted("olmoe-1b-7b", num_hot)[0] == L * layer
