"""Merged checkpoints and PEFT adapters: loaded by transformers and peft, they compute what the adapted model does."""

import json
import math
import shutil
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
import torch.nn as nn
from conftest import LOADABLE, SHARED, SIZES, call, read_json, same, with_tokenizer, write_json
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import export
import hellora
import lori
from command.cli import InputError
from hub.config import FAMILIES
from lori import sparsify
from model import MoEConfig, MoETransformer, load_model, read_config
from neighbours.ranks import trains, truncate
from run import adapters
from run.adapters import read_any_adapter

R, ALPHA, SEED = 5, 7.0, 3


def some_experts(family: str) -> list[list[int]]:
    """Hot experts by layer, one to four of them, and one layer without."""
    hub = {"model_type": family, **SIZES[family]}
    config, generator = MoEConfig.from_dict(hub), torch.Generator().manual_seed(len(family))
    hot = [torch.randperm(config.num_experts, generator=generator)[:n].sort().values.tolist() for n in (3, 0, 1, 4)]
    return hot[: len(config.moe_layers)]


HOT = {family: some_experts(family) for family in FAMILIES}
PEFT = [family for family in FAMILIES if FAMILIES[family].peft]  # whose experts PEFT has names for
KINDS = ("lora", "dora", "lori", "lori-s", "dr-lora")


UNDER_5 = [name for name, family in FAMILIES.items() if family.peft == "5"]  # of transformers, in PEFT 0.21


def randomise(model: MoETransformer) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(parameter * (1 + 0.1 * noise) if name.endswith("lora_m") else 0.3 * noise)


def make_run(base: Path, run: Path, kind: str = "lora", targets: str = "all", dtype=torch.float32) -> MoETransformer:
    """A run folder as train.py leaves it, its adapter random; the adapted model."""
    model = load_model(base, dtype)
    hot = adapters.hot_mask(HOT[model.config.model_type], model.config)
    settings = {"kind": kind.removesuffix("-s").removeprefix("dr-"), "targets": targets, "seed": SEED}
    if kind == "dr-lora":
        hot, settings["expert_rank"] = torch.ones_like(hot), 2 * R
    hellora.attach(model, hot, R, ALPHA, **settings)
    randomise(model)
    if kind == "lori-s":
        positions = lori.top_entries(adapters.adapter_state(model))
        hellora.detach(model)
        hellora.attach(model, hot, R, ALPHA, **settings)
        sparsify(model, positions)
        randomise(model)
    state, adapter = adapters.adapter_state(model), model.adapter
    if kind == "dr-lora":  # every expert has grown to another rank; what has not grown adds nothing
        ranks = torch.randint(1, 2 * R + 1, hot.shape, generator=torch.Generator().manual_seed(2))
        for i, row in zip(model.config.moe_layers, ranks, strict=True):
            for pair in model.layers[i].mlp.experts.lora.values():
                pair.lora_B.data *= trains(row, 2 * R)[:, None]
        state, adapter = truncate(adapters.adapter_state(model), ranks), replace(adapter, ranks=ranks.tolist())
    adapters.save_adapter(state, run / "adapter", adapter)
    about = {"task": "tiny-math", "train_data": None, "max_length": 64, "method": "hellora"}
    write_json(run / "config.json", {"model": str(base), "settings": about})
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of our models and of transformers', on the same ids."""
    result = model(torch.randint(2, 50, (3, 17), generator=torch.Generator().manual_seed(0)))
    return result[0] if isinstance(result, tuple) else result.logits


def assert_close(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def change_config(folder: Path, changes: dict) -> None:
    settings = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", settings | changes)


def merged(base: Path, run: Path, out: Path, **options) -> Path:
    out.mkdir()
    adapter, _, factors = adapters.read_own_adapter(run / "adapter", read_config(base))
    export.write_merged(out, adapter, factors, base, **options)
    return out


def peft_folder(base: Path, run: Path, out: Path, **options) -> Path:
    out.mkdir()
    config = read_config(base)
    adapter, _, factors = adapters.read_own_adapter(run / "adapter", config)
    export.write_adapter(out, adapter, factors, config, "somewhere/base", **options)
    return out


def load_peft(base: Path, folder: Path) -> peft.PeftModel:
    """PEFT's own way to load, on transformers' model; what it could not place is a failure."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        result = model.load_adapter(folder, "again")
    assert not [str(w.message) for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    assert not result.missing_keys and not result.unexpected_keys
    return model


# ----------------------------------------------------------------------------------------- merged checkpoint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", LOADABLE)
def test_merged_checkpoint_computes_what_the_adapter_does(family, kind, make_checkpoint, tmp_path):
    base = make_checkpoint(family).folder
    adapted = make_run(base, tmp_path, kind)
    want = logits(adapted)
    assert (want - logits(load_model(base))).abs().max() > 0.1 * want.abs().max()  # it does something
    out = merged(base, tmp_path, tmp_path / "out")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(out).eval()), want)
    ours = load_model(out)
    assert_close(logits(ours), want)
    hellora.merge(adapted)
    for name, W in ours.named_parameters():  # adapted keeps its hot experts in front
        other = adapted.get_parameter(name)
        if ".experts." in name:
            other = other[adapted.get_submodule(name.rpartition(".")[0]).position]
        torch.testing.assert_close(W, other, rtol=0, atol=1e-6)


def test_shards_hold_every_weight_once_below_the_limit_and_load_by_their_index(olmoe, tmp_path):
    want = logits(make_run(olmoe.folder, tmp_path))
    out = merged(olmoe.folder, tmp_path, tmp_path / "out", shard_bytes=100_000)
    index = read_json(out / "model.safetensors.index.json")
    shards = {file.name: load_file(file) for file in sorted(out.glob("*.safetensors"))}
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards.values()]
    assert len(sizes) > 3 and max(sizes) <= 100_000 and sum(sizes) == index["metadata"]["total_size"]
    assert all(a + b > 100_000 for a, b in pairwise(sizes))  # none is cut short
    assert index["weight_map"] == {key: name for name, shard in shards.items() for key in shard}
    assert list(shards) == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert_close(logits(load_model(out)), want)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(out).eval()), want)


def test_values_beyond_the_range_of_float16_are_named_with_the_dtype_to_choose(olmoe, tmp_path):
    make_run(olmoe.folder, tmp_path)
    base = shutil.copytree(olmoe.folder, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    said = "^model.norm.weight goes up to 7e.04, beyond the range of float16; choose --dtype float32"
    with pytest.raises(InputError, match=said):
        merged(base, tmp_path, tmp_path / "out", dtype=torch.float16)
    merged(base, tmp_path, tmp_path / "bfloat16", dtype=torch.bfloat16)


def test_another_dtype_is_rounded_once_from_the_float32_sum_and_said_in_the_config(olmoe, tmp_path):
    make_run(olmoe.folder, tmp_path)
    exact = load_file(merged(olmoe.folder, tmp_path, tmp_path / "exact") / "model.safetensors")
    out = merged(olmoe.folder, tmp_path, tmp_path / "out", dtype=torch.bfloat16)
    got = load_file(out / "model.safetensors")
    assert got.keys() == exact.keys() and all(torch.equal(got[key], exact[key].bfloat16()) for key in got)
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert (tmp_path / "exact/config.json").read_bytes() == (olmoe.folder / "config.json").read_bytes()


# ------------------------------------------------------------------------------------------------------ PEFT


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PEFT])
def test_a_family_whose_experts_peft_cannot_name_is_refused_by_name(family, make_checkpoint, tmp_path):
    base = make_checkpoint(family).folder
    make_run(base, tmp_path)
    with pytest.raises(InputError, match=f"PEFT is not known to load adapters of {family}; use --to merged"):
        peft_folder(base, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("kind, targets", [("lora", "all"), ("lori", "pure"), ("lori-s", "gate"), ("dr-lora", "all")])
@pytest.mark.parametrize("family", UNDER_5)
def test_peft_computes_what_the_adapter_does_on_transformers_own_model(
    family, kind, targets, make_checkpoint, tmp_path
):
    base = make_checkpoint(family).folder
    want = logits(make_run(base, tmp_path, kind, targets))
    assert (want - logits(load_model(base))).abs().max() > 0.05 * want.abs().max()
    assert_close(logits(load_peft(base, peft_folder(base, tmp_path, tmp_path / "out"))), want)


def linear_for_every_matrix(folder: Path) -> nn.Module:
    """The weights of a checkpoint as transformers 4 holds them: a tree of modules, an nn.Linear for every matrix."""
    tree = nn.Module()
    for key, W in load_file(folder / "model.safetensors").items():
        *path, leaf, _ = key.split(".")
        node = tree
        for name in path:
            if not hasattr(node, name):
                node.add_module(name, nn.Module())
            node = getattr(node, name)
        linear = nn.Linear(W.shape[-1], len(W), bias=False)
        linear.weight.data = W.view(len(W), -1)
        node.add_module(leaf, linear)
    return tree


@pytest.mark.parametrize("kind, compact", [("lora", False), ("lora", True), ("dora", True)])
@pytest.mark.parametrize(
    "family, targets",
    [(family, "all") for family in PEFT] + [(family, "shared") for family in SHARED if family in PEFT],
)
def test_with_a_linear_per_expert_peft_makes_of_both_layouts_the_merged_weights(
    family, targets, kind, compact, make_checkpoint, tmp_path
):
    base = make_checkpoint(family).folder
    make_run(base, tmp_path, kind, targets)
    want = load_file(merged(base, tmp_path, tmp_path / "merged") / "model.safetensors")
    out = peft_folder(base, tmp_path, tmp_path / "out", compact=compact)
    tree = nn.Module()
    tree.add_module("base", linear_for_every_matrix(base))
    tree = peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(out), tree.base)
    state = {
        key.removeprefix("base_model.model."): value
        for key, value in load_file(out / "adapter_model.safetensors").items()
    }
    assert not peft.set_peft_model_state_dict(tree, state).unexpected_keys
    layers = {name: module for name, module in tree.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    assert {f"{name}.lora_A.weight" for name in layers} == {key for key in state if "lora_A" in key}
    for name, layer in layers.items():
        layer.merge()
        torch.testing.assert_close(layer.weight, want[f"{name}.weight"])
    changed = [key for key, W in load_file(base / "model.safetensors").items() if not torch.equal(W, want[key])]
    assert {key.removesuffix(".weight") for key in changed} <= set(layers)


def test_compact_leaves_out_cold_experts_and_stops_under_transformers_5(olmoe, tmp_path):
    make_run(olmoe.folder, tmp_path)
    out = peft_folder(olmoe.folder, tmp_path, tmp_path / "out", compact=True)
    keys = load_file(out / "adapter_model.safetensors")
    pairs = {tuple(int(part) for part in key.split(".") if part.isdecimal()) for key in keys if ".experts." in key}
    assert pairs == {(i, e) for i, ids in enumerate(HOT["olmoe"]) for e in ids}
    with pytest.raises(RuntimeError, match="size mismatch"):  # and not a model without its experts
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(olmoe.folder), out)


# ----------------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize(
    "family, layout",
    [
        (family, layout)
        for family in LOADABLE
        if family in PEFT
        for layout in ("all", "compact", "saved again")
        if layout[0] != "s" or family in UNDER_5
    ],
)
def test_an_adapter_comes_back_from_peft_as_it_went(family, layout, make_checkpoint, tmp_path):
    base, all_of_it = make_checkpoint(family).folder, "shared" if family in SHARED else "all"
    targets = {"all": all_of_it, "compact": "gate", "saved again": "pure"}[layout]
    adapted = make_run(base, tmp_path, targets=targets)
    adapter, state = adapters.read_adapter(tmp_path / "adapter")
    state["layers.0.mlp.experts.lora.up_proj.lora_B"][0] = 0  # an expert that has not learnt is still hot
    adapters.save_adapter(state, tmp_path / "adapter", adapter)
    out = peft_folder(base, tmp_path, tmp_path / "out", compact=layout == "compact")
    if layout == "saved again":  # by PEFT under transformers 5: one pair for all experts of a layer
        load_peft(base, out).save_pretrained(tmp_path / "again", selected_adapters=["default"])
        out = tmp_path / "again"
        assert any(".experts.base_layer." in key for key in load_file(out / "adapter_model.safetensors"))
    got, tensors = read_any_adapter(out, adapted.config)
    assert (got.hot, got.r, got.alpha, got.targets, got.kind) == (HOT[family], R, ALPHA, targets, "lora")
    assert tensors.keys() == state.keys()
    assert same(tensors, state)


ELSEWHERE = {f"base_model.model.model.layers.9.mlp.gate.lora_{x}.weight": torch.ones(R, R) for x in "AB"}


@pytest.mark.parametrize(
    "settings, tensors, said",
    [
        ({"arrow_config": {"top_k": 2}, "other": 0}, {}, "arrow_config {'top_k': 2}: unknown"),
        ({"peft_type": "IA3"}, {}, "peft_type is 'IA3'"),
        ({"rank_pattern": {"q_proj": 3}}, {}, "q_proj: lora_A has rank 5, but .* says 3"),
        ({"rank_pattern": {"q_proj": 0}}, {}, "rank_pattern is .'q_proj': 0."),
        ({"alpha_pattern": {"(q": 3}}, {}, "alpha_pattern has '.q', not a regular expression"),
        ({}, ELSEWHERE, "layers.9.mlp.gate"),
    ],
)
def test_what_has_no_place_here_is_refused_by_name(settings, tensors, said, olmoe, tmp_path):
    make_run(olmoe.folder, tmp_path)
    out = peft_folder(olmoe.folder, tmp_path, tmp_path / "out")
    change_config(out, settings)
    save_file(load_file(out / "adapter_model.safetensors") | tensors, out / "adapter_model.safetensors")
    with pytest.raises(InputError, match=said):
        read_any_adapter(out, read_config(olmoe.folder))


def test_an_adapter_of_peft_that_is_a_pickle_is_named_and_not_opened(tmp_path, olmoe):
    (tmp_path / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    with pytest.raises(InputError, match="adapter_model.safetensors is missing; expected the folder of a PEFT adapter"):
        read_any_adapter(tmp_path, read_config(olmoe.folder))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="adapter_model.bin is a pickle, which is never opened"):
        read_any_adapter(tmp_path, read_config(olmoe.folder))


# --------------------------------------------------------------------------------------------- the command


@pytest.fixture
def base(olmoe, tmp_path) -> Path:
    """A checkpoint with a tokenizer, and with code of its own."""
    folder = with_tokenizer(shutil.copytree(olmoe.folder, tmp_path / "base"))
    hub = read_json(folder / "config.json") | {"auto_map": {"AutoConfig": "configuration_own.Own"}}
    (folder / "config.json").write_text(json.dumps(hub, indent=2) + "\n")
    (folder / "configuration_own.py").write_text("from transformers import OlmoeConfig as Own\n")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def run(base, tmp_path) -> Path:
    make_run(base, tmp_path / "run")
    return tmp_path / "run"


def bytes_of_tensors(folder: Path) -> int:
    return sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


def test_merged_from_the_command_line_is_complete(base, run, tmp_path, capsys):
    call(export, run, "--to merged --out", tmp_path / "a/b")
    printed = capsys.readouterr().out
    assert {file.name for file in (tmp_path / "a/b").iterdir()} == {file.name for file in base.iterdir()}
    assert f"merged checkpoint: {bytes_of_tensors(tmp_path / 'a/b'):,} bytes" in printed
    whole = sum(file.stat().st_size for file in (tmp_path / "a/b").iterdir())
    assert f"{whole:,} bytes with everything" in printed
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b"]
    assert len({file.stat().st_mode for file in (tmp_path / "a/b").iterdir()}) == 1  # who reads one reads all


@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16"], ["--compact"]])
def test_peft_from_the_command_line_says_the_sizes_it_writes(flags, base, run, tmp_path, capsys):
    (tmp_path / "out").mkdir()  # empty: may be used
    call(export, run, "--to peft --out", tmp_path / "out", flags)
    said = capsys.readouterr().out
    assert f"adapter for PEFT: {bytes_of_tensors(tmp_path / 'out'):,} bytes" in said
    assert f"wrote {tmp_path / 'out'}: {sum(f.stat().st_size for f in (tmp_path / 'out').iterdir()):,} bytes" in said
    assert read_json(tmp_path / "out/adapter_config.json")["base_model_name_or_path"] == str(base)
    if not flags:
        call(export, run, "--to peft --out", tmp_path / "small", "--compact")
        assert f"--compact: {bytes_of_tensors(tmp_path / 'small'):,})" in said


def test_a_base_that_was_moved_is_named_and_its_dtype_kept(base, run, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "elsewhere")
    shutil.rmtree(base)
    call(export, run, "--to merged --out", tmp_path / "out", "--model", tmp_path / "elsewhere")
    assert load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_dora_of_experts_is_refused_for_peft_and_nothing_is_half_written(run, tmp_path):
    make_run(tmp_path / "base", tmp_path / "run", "dora")
    with pytest.raises(InputError, match="use --to merged"):
        call(export, run, "--to peft --out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("read", [adapters.read_own_adapter, adapters.read_any_adapter])
def test_an_adapter_that_holds_nan_or_infinity_is_refused_by_the_name_of_its_matrix(read, olmoe, tmp_path):
    make_run(olmoe.folder, tmp_path)
    adapter, state = adapters.read_adapter(tmp_path / "adapter")
    last = max(adapter.hot[3])
    for name, value, matrix in (
        ("layers.1.mlp.gate.lora_B", math.nan, "layers.1.mlp.gate"),
        ("layers.3.mlp.experts.lora.up_proj.lora_A", math.inf, f"layers.3.mlp.experts.{last}.up_proj"),
    ):
        damaged = {key: tensor.clone() for key, tensor in state.items()}
        damaged[name].view(-1)[-1] = value
        adapters.save_adapter(damaged, tmp_path / "adapter", adapter)
        with pytest.raises(InputError, match=f"pairs that hold NaN or infinity: 1, the first model.{matrix}"):
            read(tmp_path / "adapter", read_config(olmoe.folder))
