"""Adapters that PEFT made by itself: read here, they compute what PEFT computes. docs/your-data.md lists them."""

import math
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from conftest import call, read_json, words
from safetensors.torch import load_file, save_file
from test_export import change_config, linear_for_every_matrix, logits
from transformers import AutoModelForCausalLM

import evaluate
import train
from command.cli import InputError
from hub.peft import Reading
from model import load_model, read_config
from run import adapters
from run.adapters import load_adapter, read_any_adapter, read_loosely
from run.settings import parse_settings
from run.subject import content_of

R, ALPHA = 4, 9
ROOT = Path(__file__).parent.parent
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
UNDER_5 = {  # what is adapted under transformers 5 -> settings of LoraConfig
    "attention alone": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "a subset of layers": {"target_modules": ["o_proj"], "target_parameters": STACKS, "layers_to_transform": [1]},
    "gate and up as one pair": {"target_modules": [], "target_parameters": STACKS},
    "gate, up and down by name": {"target_modules": ["gate_proj", "up_proj", "down_proj", "k_proj"]},
    "rsLoRA": {"target_modules": ["k_proj"], "target_parameters": [*STACKS, "gate.weight"], "use_rslora": True},
    "ranks and alphas by pattern": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": [*STACKS, "gate.weight"],
        "rank_pattern": {"q_proj": 2, r".*\.gate_up_proj": 7, "1.mlp.experts.down_proj": 3, "gate.weight": 1},
        "alpha_pattern": {"o_proj": 3, "down_proj": 5, r"0\.mlp\.(gate\.weight|experts\.gate_up_proj)": 1.5},
    },
    "DoRA": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
}
UNDER_4 = {  # where every expert has linear layers of its own
    "every linear layer": {"target_modules": r".*(proj|\.w[123]|gate)"},
    "some experts": {"target_modules": r".*(q_proj|experts\.[25]\.\w+)"},
    "rsLoRA": {"target_modules": r".*(v_proj|experts\.\d\.\w+)", "use_rslora": True},
    "ranks and alphas by pattern": {
        "target_modules": r".*(q_proj|experts\.\d\.\w+)",
        "rank_pattern": {r"experts\.[13]\.\w+": 6, "q_proj": 1},
        "alpha_pattern": {r"experts\.3\.(up_proj|w3)": 2, r"layers\.0\.self_attn\.q_proj": 30},
    },
    "DoRA": {"target_modules": r".*(o_proj|gate|experts\.[25]\.\w+)", "use_dora": True},
}
SWAPPED = "gate and up as one pair, as PEFT 0.17 and 0.18 store it"
ROWS = [*((5, name) for name in (*UNDER_5, SWAPPED)), *((4, name) for name in UNDER_4)]


def randomise(model: torch.nn.Module) -> None:
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.data = parameter * (1 + 0.2 * noise) if "magnitude" in name else 0.1 * noise


def config_of(settings: dict) -> peft.LoraConfig:
    return peft.LoraConfig(r=R, lora_alpha=ALPHA, task_type="CAUSAL_LM", base_model_name_or_path="base", **settings)


def saved_under_5(base: Path, out: Path, settings: dict) -> torch.Tensor:
    """The logits of transformers' model with an adapter that PEFT made and saved."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config_of(settings)).eval()
    randomise(model)
    model.save_pretrained(out)
    return logits(model)


def saved_before_19(base: Path, out: Path) -> torch.Tensor:
    want = saved_under_5(base, out, UNDER_5["gate and up as one pair"])
    as_before_19(out, read_config(base).num_experts)
    return want


def as_before_19(out: Path, E: int) -> None:
    """PEFT 0.18 took (E, out, in) for (E, in, out): what is A here was B there, transposed."""
    state = load_file(out / "adapter_model.safetensors")
    for key in [key for key in state if "experts" in key and "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        A = state[key].unflatten(0, (E, -1))  # [E, r, in]
        B = state[other].unflatten(1, (-1, E)).permute(2, 0, 1)  # [E, out, r]
        state[key] = B.mT.flatten(0, 1).contiguous()
        state[other] = A.permute(2, 1, 0).flatten(1).contiguous()
    save_file(state, out / "adapter_model.safetensors")
    change_config(out, {"peft_version": "0.18.1"})


def saved_under_4(base: Path, out: Path, settings: dict) -> torch.Tensor:
    """PEFT on a linear layer for every matrix, saved; the logits of transformers' model with the merged weights."""
    config, (tree, merged) = config_of(settings), (linear_for_every_matrix(base), out / "merged")
    tree = peft.inject_adapter_in_model(config, tree)
    randomise(tree)
    state = {f"base_model.model.{key}": t for key, t in peft.get_peft_model_state_dict(tree).items()}
    config.save_pretrained(out)
    save_file({key: t.contiguous() for key, t in state.items()}, out / "adapter_model.safetensors")
    shutil.copytree(base, merged)
    weights = load_file(base / "model.safetensors")
    for name, layer in tree.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            layer.merge()
            weights[f"{name}.weight"] = layer.get_base_layer().weight.detach().clone()
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return logits(AutoModelForCausalLM.from_pretrained(merged).eval())


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.parametrize("transformers, name", ROWS)
def test_adapters_of_peft_compute_the_same_here(transformers, name, family, make_checkpoint, tmp_path):
    base = make_checkpoint(family).folder
    if name == SWAPPED:
        want = saved_before_19(base, tmp_path)
    elif transformers == 5:
        want = saved_under_5(base, tmp_path, UNDER_5[name])
    else:
        want = saved_under_4(base, tmp_path, UNDER_4[name])
    model = load_model(base)
    plain = logits(model)
    load_adapter(model, tmp_path)
    difference = (logits(model) - want).abs().max()
    print(f"| {transformers} | {name} | {difference:.1e} |")  # pytest -s
    assert difference <= 1e-5
    assert (plain - want).abs().max() > 0.05 * want.abs().max()


def modules_of(reading: Reading) -> set[str]:
    """The matrices that have a pair; of a layer's experts, one for all that have a pair on gate_proj, say."""
    return {re.sub(r"experts\.\d+", "experts.*", key) for key in reading.pairs}


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.parametrize("transformers, name", ROWS)
def test_modules_that_adapter_config_names_and_the_file_lacks_are_told(
    transformers, name, family, make_checkpoint, tmp_path
):
    """Nothing is missing from a file as PEFT saved it. Taken out: a layer, and a module of attention in all layers."""
    made = make_checkpoint(family)
    if name == SWAPPED:
        saved_before_19(made.folder, tmp_path)
    else:
        save, rows = (saved_under_5, UNDER_5) if transformers == 5 else (saved_under_4, UNDER_4)
        save(made.folder, tmp_path, rows[name])
    config, file = read_config(made.folder), tmp_path / "adapter_model.safetensors"
    tensors, whole = load_file(file), read_loosely(tmp_path, config)
    assert not whole.problems and not whole.missing
    parts = sorted({part for key in tensors for part in re.findall(r"layers\.\d+\.|[qkvo]_proj\.", key)})
    cuts = {part: {key: t for key, t in tensors.items() if part not in key} for part in parts}
    cuts = {part: rest for part, rest in cuts.items() if rest}
    assert cuts
    for part, rest in cuts.items():
        save_file(rest, file)
        cut = read_loosely(tmp_path, config)
        assert set(cut.missing) == modules_of(whole) - modules_of(cut), part


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj", "up_proj"]])
def test_stacked_experts_that_an_older_peft_did_not_reach_by_their_names_are_not_called_missing(
    modules, make_checkpoint, tmp_path
):
    """PEFT 0.18 finds no linear layer in the experts of transformers 5, and saves attention alone."""
    made = make_checkpoint("olmoe")
    saved_under_5(made.folder, tmp_path, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]})
    change_config(tmp_path, {"target_modules": modules})
    assert not read_loosely(tmp_path, read_config(made.folder)).missing


@pytest.mark.parametrize(
    "stacks, targets",
    [
        (["experts.gate_up_proj"], "pure"),  # saved under the name of down
        (["gate.weight", "experts.down_proj"], "gate"),
        (["experts.down_proj", "experts.gate_up_proj"], "pure"),
    ],
)
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_which_stack_a_pair_adapts_is_told_by_its_shape(family, stacks, targets, make_checkpoint, tmp_path):
    base = make_checkpoint(family).folder
    want = saved_under_5(base, tmp_path, {"target_modules": [], "target_parameters": stacks})
    model = load_model(base)
    load_adapter(model, tmp_path)
    assert (logits(model) - want).abs().max() <= 1e-5
    assert model.adapter.targets == targets


def test_the_list_of_the_docs_has_these_adapters():
    page = (ROOT / "docs/your-data.md").read_text(encoding="utf-8")
    lists = re.findall(r"^- transformers ([45]): (.*(?:\n  .*)*)", page, re.M)
    assert [(int(n), name) for n, names in lists for name in " ".join(names.split()).split("; ")] == ROWS


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save is .'lm_head'., only None"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.base_layer.weight cannot be read"),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, "bias is 'lora_only', only 'none' can be read"),
    ],
)
def test_what_is_more_than_factors_is_refused_by_name(settings, says, olmoe, tmp_path):
    saved_under_5(olmoe.folder, tmp_path, settings)
    with pytest.raises(InputError, match=says):
        read_any_adapter(tmp_path, read_config(olmoe.folder))


def test_a_linear_layer_that_has_no_adapter_here_is_refused_by_name(make_checkpoint, tmp_path):
    base = make_checkpoint("qwen2_moe").folder
    saved_under_5(base, tmp_path, UNDER_5["all-linear"])
    with pytest.raises(InputError, match="it adapts model.layers.0.mlp.shared_expert_gate"):
        read_any_adapter(tmp_path, read_config(base))


def trained_from(base: Path, adapter: Path, out: Path, method: str) -> dict[str, torch.Tensor]:
    flags = words("--method", method, "--init-adapter", adapter, "--steps 3 --batch 2 --sample 0.005")
    call(train, "--model", base, flags, "--out", out)
    return adapters.read_adapter(out / "adapter")[1]


def test_a_run_starts_from_pairs_of_several_ranks_and_what_was_added_to_them_stays_zero(base, tmp_path, capsys):
    saved_under_5(base, tmp_path / "adapter", UNDER_5["ranks and alphas by pattern"])
    adapter, before = read_any_adapter(tmp_path / "adapter", read_config(base))
    said = capsys.readouterr().err
    with pytest.raises(InputError, match="has pairs of kind lora, and --method trains dora"):
        trained_from(base, tmp_path / "adapter", tmp_path / "run", "dora")
    assert adapter.r == 7 and "have another rank or scale than rank 7" in said
    after = trained_from(base, tmp_path / "adapter", tmp_path / "run", "lora")
    changed = 0
    for name, tensor in after.items():
        there = before[name] != 0
        changed += bool((tensor != before[name])[there].any())
        assert not tensor[~there].any(), name
    assert changed > 20


def test_a_run_starts_from_dora_where_a_magnitude_that_is_not_there_is_the_norm_of_the_weight(base, tmp_path):
    saved_under_5(base, tmp_path / "adapter", UNDER_5["DoRA"])
    _, before = read_any_adapter(tmp_path / "adapter", read_config(base))
    assert "layers.0.self_attn.k_proj.lora_m" not in before and "layers.0.self_attn.q_proj.lora_m" in before
    after, model = trained_from(base, tmp_path / "adapter", tmp_path / "run", "dora"), load_model(base)
    norm = model.layers[0].self_attn.k_proj.weight.norm(dim=-1)
    assert (after["layers.0.self_attn.k_proj.lora_m"] / norm - 1).abs().max() < 0.05
    assert all(math.isfinite(tensor.sum()) for tensor in after.values())


def test_evaluate_takes_the_folder_of_an_adapter_of_peft(base, tmp_path):
    saved_under_5(base, tmp_path / "adapter", UNDER_5["rsLoRA"])
    change_config(tmp_path / "adapter", {"base_model_name_or_path": str(base)})
    out = words("--limit 2 --max-new-tokens 2 --out", tmp_path / "out")
    call(evaluate, tmp_path / "adapter", "--task tiny-math", out)
    assert read_json(tmp_path / "out/score.json")["num_total"] == 2


def test_a_run_that_starts_from_an_adapter_of_peft_takes_the_base_that_it_names(base, tmp_path, capsys):
    saved_under_5(base, tmp_path / "adapter", UNDER_5["rsLoRA"])
    change_config(tmp_path / "adapter", {"base_model_name_or_path": str(base)})
    settings = parse_settings(["--method", "lora", "--init-adapter", str(tmp_path / "adapter")])
    assert settings.model == str(base)
    assert parse_settings([]).model == "tiny"
    other = shutil.copytree(base, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"][0] += 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    assert content_of(base, str(tmp_path / "adapter")) and "names the base" not in capsys.readouterr().err
    content_of(other, str(tmp_path / "adapter"))
    assert f"names the base {base}, whose weights differ from those of {other}" in capsys.readouterr().err
