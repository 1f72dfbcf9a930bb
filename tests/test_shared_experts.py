"""Adapters on the shared expert (targets "shared", MoE-Sieve): placed, merged, exported and trained.

test_ops.py compares what they compute, and their gradients, with transformers.
"""

import shutil

import pytest
import torch
from conftest import SHARED, call, with_tokenizer
from safetensors.torch import load_file
from test_export import logits, make_run, merged

import bench
import export
import hellora
import train
from lab.paper import params
from model import load_model, read_config
from run import adapters


@pytest.mark.parametrize("kind", ["lora", "dora", "lori", "lori-s"])
@pytest.mark.parametrize("family", SHARED)
def test_a_saved_adapter_loads_and_merges_in_memory_and_on_disk(family, kind, make_checkpoint, tmp_path):
    base = make_checkpoint(family).folder
    adapted = make_run(base, tmp_path, kind, "shared")
    want = logits(adapted)
    loaded = load_model(base)
    adapters.load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded), want)
    hellora.merge(adapted)
    for got in (logits(adapted), logits(load_model(merged(base, tmp_path, tmp_path / "out")))):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()  # the order of a sum is another


@pytest.mark.parametrize("family", SHARED)
def test_moe_sieve_trains_them_and_is_exported_under_the_names_of_the_hub(family, make_checkpoint, tmp_path):
    base, run = with_tokenizer(shutil.copytree(make_checkpoint(family).folder, tmp_path / "base")), tmp_path / "run"
    result = call(train, "--method moe-sieve --steps 2 --batch 2 --sample 0.1 --rank 4 --model", base, "--out", run)
    config = read_config(base)
    assert result["trainable"] == params.size(config, "moe-sieve", 1, "shared", r=4).trainable
    state = load_file(run / "adapter/adapter.safetensors")
    B = [tensor for name, tensor in state.items() if ".shared_expert." in name and name.endswith("lora_B")]
    assert len(B) == 3 * len(config.moe_layers) and all(tensor.any() for tensor in B)
    call(export, run, "--to peft --out", tmp_path / "peft")
    keys = load_file(tmp_path / "peft/adapter_model.safetensors")
    name = f"base_model.model.model.layers.2.mlp.{config.family.shared_expert}.up_proj.lora_B.weight"
    assert torch.equal(keys[name], state["layers.2.mlp.shared_expert.up_proj.lora_B"])


@pytest.mark.parametrize("model, shared", [("qwen1.5-moe-a2.7b", 24 * 737_280), ("deepseek-moe-16b", 27 * 466_944)])
def test_the_plan_of_moe_sieve_holds_factors_of_the_shared_experts(model, shared):
    """3 r (2048 + width) per layer, r = 32; width 5632 in Qwen1.5-MoE, 2 x 1408 in DeepSeekMoE."""
    plans = [call(bench, "plan --model", model, "--method moe-sieve", flags)[0] for flags in ([], ["--targets", "all"])]
    adapters, without = (plan["adapters"] for plan in plans)
    assert adapters - without == 4 * shared
    assert plans[0]["activations"] > plans[1]["activations"]
