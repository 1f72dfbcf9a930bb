"""`export.py check`: adapters as each tool writes them are measured alike, and each finding is seen and not imagined.

The key names and shapes of other tools' files were read in their own sources:
- PEFT 0.17 to 0.21: `lora/layer.py`, class ParamWrapper; what the installed PEFT writes is written by it here.
- Unsloth: `unsloth_zoo/temporary_patches/moe_utils.py` of unslothai/unsloth-zoo at
  55400a778c03c67f2d0a92bd7e3ae9fea6b6b3eb (the two orders of lora_B, and the values of `lora_B_layout`).
- axolotl: `src/axolotl/integrations/moe_sieve/peft.py` and `selection.py` of axolotl-ai-cloud/axolotl at
  4a270c7ed167049089033f06a7b9b33fbebd772d (selected experts, in the order of `selected_experts`).
- ms-swift: `swift/tuners/peft.py` of modelscope/ms-swift at 01488c42ee7b374457d3376d57595b2ea1dad6cf (PEFT's two files,
  and `additional_config.json` beside them).
- LLaMA-Factory calls PEFT's `get_peft_model` and `save_pretrained`: its files are PEFT's.

Dimensions: E experts per layer, r rank.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import call, read_json, with_tokenizer, write_json
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import change_config, logits, make_run
from test_peft import STACKS, UNDER_5, as_before_19, saved_before_19, saved_under_4, saved_under_5
from torch import Tensor
from transformers import AutoModelForCausalLM

import data
import export
from command.cli import InputError
from diagnosis.findings import AS_READ, BASE, REORDERED, UNUSABLE, order_by_loss
from diagnosis.measure import adapter_changes, by_expert, spread
from diagnosis.report import rank_correlation
from hub.config import FAMILIES
from hub.peft import Layout, PeftAdapter, Reading, write_peft
from model import load_model, read_config
from run.adapters import (
    hub_shapes,
    load_adapter,
    read_adapter,
    read_loosely,
    read_start,
    readings_of,
    save_adapter,
    weights_of,
)
from run.output import draw_adapter
from run.subject import Subject, base_content, content_of

R, ALPHA, SCALE = 4, 9, 9 / 4
PREFIX, FILE = "base_model.model.", "adapter_model.safetensors"


def factors_of(base: Path, experts: Iterable[int] = range(7)) -> dict[str, dict[str, Tensor]]:
    """Random pairs on experts, router and attention; the experts' B differ in size, as training leaves them."""
    config, generator, pairs = read_config(base), torch.Generator().manual_seed(0), {}
    for key, shape in hub_shapes(config).items():
        path = key.split(".")
        if "experts" in path and int(path[-2]) in experts or path[-1] in ("gate", "q_proj", "v_proj"):
            size = 0.0004 * 2.0 ** int(path[-2]) if "experts" in path else 0.02
            A = torch.randn(R, shape[1], generator=generator)
            pairs[key] = {"lora_A": A, "lora_B": size * torch.randn(shape[0], R, generator=generator)}
    return pairs


def write_one_by_one(base: Path, out: Path, pairs: dict, name: str | None = None) -> Path:
    """A pair for each matrix, as PEFT under transformers 4, and as `export.py --to peft`."""
    out.mkdir()
    shapes = {key: (len(pair["lora_B"]), pair["lora_A"].shape[1]) for key, pair in pairs.items()}
    write_peft(out, PeftAdapter(R, ALPHA, pairs), shapes, ["gate_proj", "up_proj", "down_proj"], name or str(base))
    return out


def write_packed(base: Path, out: Path, pairs: dict, by_expert: bool = False, changes: dict | None = None) -> Path:
    """One pair for a layer's stack, lora_B with the expert innermost, or one expert after the other.

    gate and up share a stack: their rank is 2 R, and B is block-diagonal.
    """
    write_one_by_one(base, out, {key: pair for key, pair in pairs.items() if ".experts." not in key})
    state = load_file(out / FILE)
    layers = sorted({key.split(".experts.")[0] for key in pairs if ".experts." in key})
    ids = sorted({int(key.split(".")[-2]) for key in pairs if ".experts." in key})
    for layer in layers:
        gate, up, down = (
            [pairs[f"{layer}.experts.{e}.{name}"] for e in ids] for name in ("gate_proj", "up_proj", "down_proj")
        )
        both = [
            (torch.cat([g["lora_A"], u["lora_A"]]), torch.block_diag(g["lora_B"], u["lora_B"]))
            for g, u in zip(gate, up, strict=True)
        ]
        for name, stack in (("experts.base_layer", both), ("experts", [(d["lora_A"], d["lora_B"]) for d in down])):
            B = torch.stack([B for _, B in stack], dim=1 if by_expert else 2)  # [out, E, r] or [out, r, E]
            module = f"{PREFIX}{layer.replace('block_sparse_moe', 'mlp')}.{name}"
            state[f"{module}.lora_A.weight"] = torch.cat([A for A, _ in stack])
            state[f"{module}.lora_B.weight"] = B.flatten(1).contiguous()
    save_file(state, out / FILE)
    patterns = {r".*\.gate_up_proj": 2 * R}, {r".*\.gate_up_proj": 2 * ALPHA}
    change_config(out, {"peft_version": "0.21.2", "rank_pattern": patterns[0], "alpha_pattern": patterns[1]})
    change_config(out, changes or {})
    return out


def moe_sieve(base: Path, out: Path, pairs: dict) -> Path:
    """axolotl's plugin: packed stacks of the selected experts alone, which adapter_config.json lists."""
    write_packed(base, out, pairs)
    ids = sorted({int(key.split(".")[-2]) for key in pairs if ".experts." in key})
    layers = {key.split(".experts.")[0] for key in pairs if ".experts." in key}
    selection = {f"{layer}.experts": {"selected_experts": ids, "num_experts": 7} for layer in layers}
    change_config(out, {"moe_sieve_selection": selection, "moe_sieve_version": 1})
    return out


def swift(base: Path, out: Path, pairs: dict) -> Path:
    write_packed(base, out, pairs)
    write_json(out / "additional_config.json", {"lora_dtype": None, "lorap_lr_ratio": None})
    return out


LAYOUTS: dict[str, tuple[Sequence[int], Callable]] = {  # -> the experts that have pairs, the writer
    "PEFT under transformers 4, one by one": (range(7), write_one_by_one),
    "some experts, one by one": ([1, 4], write_one_by_one),
    "PEFT 0.19 to 0.21, packed": (range(7), write_packed),
    "Unsloth before September 2026": (
        range(7),
        lambda *args: write_packed(*args, by_expert=True, changes={"lora_B_layout": "grouped_by_expert"}),
    ),
    "Unsloth": (range(7), lambda *args: write_packed(*args, changes={"lora_B_layout": "rank_major"})),
    "axolotl's moe_sieve": ([1, 4, 6], moe_sieve),
    "ms-swift": (range(7), swift),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_healthy_is_measured_as_the_plain_formula_says_and_computes_it(layout, base, tmp_path, capsys):
    experts, write = LAYOUTS[layout]
    pairs = factors_of(base, experts)
    folder, config = write(base, tmp_path / "adapter", pairs), read_config(base)
    status, findings = check(base, folder)
    assert status == 0 and not any(findings.values())
    printed = capsys.readouterr().out
    assert f"{4 * len(experts)} of {4 * len(experts)} adapted experts moved" in printed and "no faults" in printed
    assert ("packed-order-seen" in findings) == (write is not write_one_by_one)
    matrices = adapter_changes(read_loosely(folder, config), weights_of(base, config), config)
    weights = load_file(base / "model.safetensors")
    assert matrices.keys() == pairs.keys()
    for key, pair in pairs.items():
        W, delta = weights[f"{key}.weight"], SCALE * pair["lora_B"] @ pair["lora_A"]
        assert matrices[key].ratio == pytest.approx(float(delta.norm() / W.norm()), rel=1e-5)
        weights[f"{key}.weight"] = W + delta
    shown = by_expert(matrices, config)
    for layer, expert in zip(*(ids.tolist() for ids in shown.has_pair.nonzero(as_tuple=True)), strict=True):
        of_expert = [m for m in matrices.values() if (m.place.layer, m.place.expert) == (layer, expert)]
        delta, W = (math.hypot(*(getattr(m, name) for m in of_expert)) for name in ("change", "weight"))
        assert len(of_expert) == 3 and float(shown.ratio[layer, expert]) == pytest.approx(delta / W)
    model = load_model(base)
    load_adapter(model, folder)
    save_file(weights, shutil.copytree(base, tmp_path / "merged") / "model.safetensors", metadata={"format": "pt"})
    assert (logits(model) - logits(load_model(tmp_path / "merged"))).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_what_peft_itself_writes_is_read_without_a_problem(family, make_checkpoint, tmp_path):
    base = make_checkpoint(family).folder
    config = read_config(base)
    saved_under_5(base, tmp_path / "new", UNDER_5["gate and up as one pair"])
    saved_before_19(base, tmp_path / "old")
    saved_under_4(base, tmp_path / "4", {"target_modules": r".*(q_proj|experts\.\d\.\w+)"})
    for name in ("new", "old", "4"):
        reading = read_loosely(tmp_path / name, config)
        assert (reading.problems, bool(reading.packed), reading.layout.swapped) == ([], name != "4", name == "old")
        experts = by_expert(adapter_changes(reading, weights_of(base, config), config), config)
        assert experts.moved.all() and (experts.ratio > 0.01).all()


# ------------------------------------------------------------------------------------------- the findings


def check(base: Path | str, source: Path, *flags: object) -> tuple[int, dict[str, bool]]:
    """The command's exit status, and its findings: name -> whether it is a fault."""
    record = source.parent / "record.json"
    try:
        call(export, "check", source, "--base", base, "--json", record, map(str, flags))
        status = 0
    except SystemExit as end:
        status = end.code
    return status, {finding["name"]: finding["is_fault"] for finding in read_json(record)["findings"]}


def in_file(change: Callable[[dict], object]) -> Callable:
    """How a healthy adapter, one by one, is written with its tensors changed."""

    def write(base: Path, out: Path, pairs: dict) -> Path:
        write_one_by_one(base, out, pairs)
        state = load_file(out / FILE)
        change(state)
        save_file(state, out / FILE)
        return out

    return write


def times(factor: float, *parts: str) -> Callable:
    """The tensors whose names have all these parts multiplied by a number."""
    return in_file(
        lambda state: [tensor.mul_(factor) for name, tensor in state.items() if all(part in name for part in parts)]
    )


def keep_A_as_drawn(state: dict) -> None:
    """A of the experts within the range of its initialisation; elsewhere it has left it."""
    for name, tensor in state.items():
        if ".experts." in name and "lora_A" in name:
            tensor.uniform_(-1, 1).mul_(tensor.shape[1] ** -0.5)


def renamed(state: dict) -> None:
    for name in list(state):
        state[name.replace("lora_A.weight", "lora_A.default.weight")] = state.pop(name)


def without_pairs(part: str) -> Callable:
    return in_file(lambda state: [state.pop(name) for name in list(state) if part in name])


FAULTY: dict[str, Callable] = {  # the name of a fault -> how an adapter that has it is written
    "not-finite": times(torch.nan, "layers.0.mlp.gate.lora_A"),
    "missing": without_pairs("layers.1.mlp.experts."),
    "no-expert-pair": without_pairs(".experts."),
    "empty": times(0),
    "unmoved": times(0, ".experts.", "lora_B"),
    "unread": in_file(renamed),
    "stacks-unmoved": times(0, "layers.2.mlp.experts.", "down_proj.lora_B"),
    "negligible": times(1e-7, "lora_B"),
    "larger-than-weight": times(100, "lora_B"),
    "A-untrained": in_file(keep_A_as_drawn),
    "packed-order": lambda base, out, pairs: write_packed(base, out, pairs, by_expert=True),
    "another-base": lambda base, out, pairs: write_one_by_one(base, out, pairs, name=str(out.parent / "other")),
}


@pytest.fixture
def base(olmoe, tmp_path) -> Path:
    """A base that another of the same shape lies beside."""
    other = shutil.copytree(olmoe.folder, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"][0] += 1
    save_file(state, other / "model.safetensors")
    return olmoe.folder


@pytest.mark.parametrize("fault", FAULTY)
def test_an_adapter_with_a_fault_ends_with_status_3_and_its_name(fault, base, tmp_path, capsys):
    folder = FAULTY[fault](base, tmp_path / "adapter", factors_of(base))
    status, findings = check(base, folder)
    assert (status, findings.get(fault)) == (3, True)
    printed = capsys.readouterr().out
    assert "FAULT: " in printed and printed.index("FAULT") < printed.index("note:")  # the faults first
    if fault not in ("larger-than-weight", "another-base", "A-untrained"):
        assert [name for name, is_fault in findings.items() if is_fault] == [fault]


def test_pairs_that_did_not_move_are_a_fault_if_their_experts_receive_many_tokens(base, tmp_path):
    folder = times(0, ".experts.2.", "lora_B")(base, tmp_path / "adapter", factors_of(base))

    def with_counts(row: list[int]) -> tuple[int, dict]:
        about = {"model": "m", "task": "t", "num_tokens": sum(row) // 3, "num_experts_per_tok": 3}
        profile = about | {"counts": [row] * 4, "gate_mass": [[1.0] * 7] * 4}
        write_json(tmp_path / "profile.json", profile)
        return check(base, folder, "--profile", tmp_path / "profile.json")

    assert with_counts([10, 10, 60, 10, 10, 10, 10]) == (3, {"some-unmoved": True, "router-trained": False})
    assert with_counts([20, 20, 0, 20, 20, 20, 20]) == (0, {"some-unmoved": False, "router-trained": False})
    assert check(base, folder) == (0, {"some-unmoved": False, "router-trained": False})


def broken_run(change: Callable[[dict], object], base: Path, folder: Path) -> Path:
    """A run with the tensors of its adapter changed."""
    make_run(base, folder)
    adapter, state = read_adapter(folder / "adapter")
    change(state)
    save_adapter(state, folder / "adapter", adapter)
    return folder


def run_on_another_base(base: Path, folder: Path) -> Path:
    make_run(base, folder)
    settings = read_json(folder / "config.json")
    write_json(folder / "config.json", settings | {"base": base_content(base.parent / "other")})
    return folder


def with_nan(state: dict) -> None:
    state["layers.1.mlp.gate.lora_B"][0, 0] = torch.nan


def unmoved_experts(state: dict) -> None:
    for name, tensor in state.items():
        tensor.mul_("experts" not in name or "lora_B" not in name)


OF_RUNS = {  # the name of a fault -> how a run of this project that has it is written
    "not-finite": partial(broken_run, with_nan),
    "unmoved": partial(broken_run, unmoved_experts),
    "another-base": run_on_another_base,
}
USES = {
    "evaluation": lambda folder, base: Subject(str(folder)).load(torch.float32),
    "training": lambda folder, base: (
        content_of(base, str(folder)),
        read_start(str(folder), read_config(base), "lora", 0),
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "fault",
    ["not-finite", "unread", "empty", "no-expert-pair", "unmoved", "packed-order", *(f"run {n}" for n in OF_RUNS)],
)
def test_evaluation_and_training_refuse_or_note_a_fault_in_the_words_of_the_check(fault, use, base, tmp_path, capsys):
    name = fault.removeprefix("run ")
    if name == fault:
        folder = FAULTY[fault](base, tmp_path / "adapter", factors_of(base))
    else:
        base = shutil.copytree(base, tmp_path / "base")
        folder = OF_RUNS[name](base, tmp_path / "run")
    assert check(base, folder)[1][name] is True
    printed = re.findall("FAULT: (.+)", capsys.readouterr().out)
    (words,) = [what for what in printed if "by more than their norm" not in what]  # of random factors
    if name in (*UNUSABLE, "another-base"):
        with pytest.raises(InputError) as error:
            USES[use](folder, base)
        assert words in str(error.value) and "\n" not in str(error.value)
    else:
        USES[use](folder, base)
        assert words in capsys.readouterr().err


def test_a_merged_checkpoint_is_compared_with_an_adapter_that_holds_nan(olmoe, tmp_path):
    make_run(olmoe.folder, tmp_path / "run")
    call(export, tmp_path / "run", "--to merged --out", tmp_path / "out")
    broken_run(with_nan, olmoe.folder, tmp_path / "run")
    status, findings = check(olmoe.folder, tmp_path / "out", "--adapter", tmp_path / "run")
    assert (status, [name for name, is_fault in findings.items() if is_fault]) == (3, ["not-finite"])


def test_a_frozen_router_is_said_and_is_no_fault(base, tmp_path):
    change = in_file(lambda state: [state.pop(name) for name in list(state) if ".mlp.gate." in name])
    folder = change(base, tmp_path / "adapter", factors_of(base))
    assert check(base, folder) == (0, {"router-frozen": False})


def test_the_order_of_packed_columns_cannot_be_told_where_all_experts_moved_alike(base, tmp_path):
    pairs = factors_of(base)
    for pair in pairs.values():
        pair["lora_B"] /= pair["lora_B"].norm(dim=0)
    _, findings = check(base, write_packed(base, tmp_path / "adapter", pairs))
    assert findings["packed-order-unknown"] is False


def test_the_spread_of_column_norms_is_the_f_statistic_of_scipys_definition():
    """One-way analysis of variance on the logs, by hand: 3 experts with 2 columns each."""
    norms = torch.tensor([[1.0, 2.0], [4.0, 4.0], [8.0, 2.0]])
    pairs = {f"model.layers.0.mlp.experts.{e}.down_proj": {"lora_B": torch.diag(norms[e])} for e in range(3)}
    logs = norms.double().log()
    between = 2 * (logs.mean(1) - logs.mean()).square().sum() / 2
    within = (logs - logs.mean(1, keepdim=True)).square().sum() / 3
    assert spread(Reading("lora", pairs), FAMILIES["olmoe"]) == pytest.approx(float(between / within))


# --------------------------------------------------------------------------------------- merged checkpoints


def merged(base: Path, out: Path, change: Callable[[str, Tensor, Tensor], Tensor], pairs: dict, dtype=None) -> Path:
    """A copy of the base where change(key, W, delta) stands for each adapted W."""
    shutil.copytree(base, out)
    state = load_file(out / "model.safetensors")
    for key, pair in pairs.items():
        W = state[f"{key}.weight"]
        state[f"{key}.weight"] = change(key, W, SCALE * pair["lora_B"] @ pair["lora_A"]).contiguous()
    state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def without(part: str) -> Callable:
    return lambda key, W, delta: W if part in key else W + delta


def lost(key: str, W: Tensor, delta: Tensor) -> Tensor:
    return W


MERGED: dict[str, Callable] = {
    "merged-once": without("nothing"),
    "is-the-base": lost,
    "experts-not-merged": without(".experts."),
    "merged-twice": lambda key, W, delta: W + 2 * delta,
    "other-multiple": lambda key, W, delta: W + 0.25 * delta,
    "some-not-merged": without("layers.1.mlp.experts.0.up_proj"),
    "not-finite": lambda key, W, delta: W + delta * (torch.inf if "layers.1.mlp.experts.0.up_proj" in key else 1),
}
WITHOUT_ADAPTER = {  # the same -> its faults if the adapter is not named
    "is-the-base": ["is-the-base"],
    "experts-not-merged": ["experts-unchanged"],
    "not-finite": ["not-finite"],
}


@pytest.mark.parametrize("finding", MERGED)
def test_a_merged_checkpoint_is_compared_with_base_and_adapter(finding, base, tmp_path):
    pairs = factors_of(base)
    adapter = write_one_by_one(base, tmp_path / "adapter", pairs)
    folder = merged(base, tmp_path / "merged", MERGED[finding], pairs)
    status, findings = check(base, folder, "--adapter", adapter)
    assert (status, findings[finding]) == (0 if finding == "merged-once" else 3, finding != "merged-once")
    _, alone = check(base, folder)
    assert [name for name, is_fault in alone.items() if is_fault] == WITHOUT_ADAPTER.get(finding, [])


@pytest.mark.parametrize("size, finding", [(1e3, "larger-than-weight"), (1e-6, "negligible")])
def test_the_size_of_what_was_merged_is_judged_without_an_adapter_too(size, finding, base, tmp_path):
    def scaled(key: str, W: Tensor, delta: Tensor) -> Tensor:
        return W + size * W.norm() / delta.norm() * delta

    folder = merged(base, tmp_path / "merged", scaled, factors_of(base))
    _, findings = check(base, folder)
    assert [name for name, is_fault in findings.items() if is_fault] == [finding]


def test_a_merged_checkpoint_and_its_base_are_opened_once_to_be_listed_and_once_to_be_compared(
    base, tmp_path, monkeypatch
):
    """Opening a file reads the names of all its tensors: once for each tensor would be quadratic."""
    pairs, opened = factors_of(base, [1]), []
    folder = merged(base, tmp_path / "merged", without("nothing"), pairs)
    monkeypatch.setattr(
        "hub.checkpoint.safe_open", lambda path, **options: opened.append(path) or safe_open(path, **options)
    )
    check(base, folder)
    assert sorted(opened) == sorted(2 * [base / "model.safetensors", folder / "model.safetensors"])


def test_a_merge_that_read_packed_columns_in_the_other_order_is_told_from_the_weights(base, tmp_path):
    pairs = factors_of(base)
    adapter = write_packed(base, tmp_path / "adapter", pairs, by_expert=True)
    right = merged(base, tmp_path / "merged", without("nothing"), pairs)
    status, findings = check(base, right, "--adapter", adapter)
    assert (status, findings["merged-reordered"]) == (3, True)
    change_config(adapter, {"lora_B_layout": "grouped_by_expert"})
    assert check(base, right, "--adapter", adapter)[0] == 0


def test_a_transposed_square_stack_is_told_from_the_weights(make_checkpoint, tmp_path):
    base = make_checkpoint("olmoe", intermediate_size=24).folder  # 2 x 24 = 48, the hidden size
    pairs = factors_of(base)
    deltas = {key: SCALE * pair["lora_B"] @ pair["lora_A"] for key, pair in pairs.items()}

    def transposed(key: str, W: Tensor, delta: Tensor) -> Tensor:
        if not key.endswith(("gate_proj", "up_proj")):
            return W + delta
        stem = key.rpartition(".")[0]
        stack = torch.cat([deltas[f"{stem}.gate_proj"], deltas[f"{stem}.up_proj"]]).T
        return W + stack.chunk(2)[key.endswith("up_proj")]

    adapter = write_packed(base, tmp_path / "adapter", pairs)
    status, findings = check(base, merged(base, tmp_path / "wrong", transposed, pairs), "--adapter", adapter)
    assert (status, findings["merged-transposed"]) == (3, True)
    right = merged(base, tmp_path / "right", without("nothing"), pairs)
    assert check(base, right, "--adapter", adapter)[0] == 0


@pytest.mark.parametrize("stacks, loads", [(["experts.gate_up_proj"], True), (STACKS, False)])
def test_a_square_stack_of_peft_before_19_is_a_fault_if_newer_versions_load_it(
    stacks, loads, make_checkpoint, tmp_path
):
    base = make_checkpoint("olmoe", intermediate_size=24).folder
    written = saved_under_5(base, tmp_path / "adapter", {"target_modules": [], "target_parameters": stacks})
    as_before_19(tmp_path / "adapter", 7)
    assert check(base, tmp_path / "adapter")[1]["square-stack"] is loads
    with nullcontext() if loads else pytest.raises(RuntimeError, match="size mismatch"):
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
        assert (logits(model.eval()) - written).abs().max() > 0.1  # without an error


@pytest.mark.parametrize(
    "size, finding", [(1.0, "merged-once"), (2e-3, "lost-to-rounding"), (1e-9, "lost-to-rounding")]
)
def test_an_update_that_16_bits_round_away_is_said(size, finding, base, tmp_path):
    """At the smallest size no weight differs from the base: still the merge did what it could."""
    half = merged(base, tmp_path / "half", lost, {}, torch.bfloat16)
    pairs = {key: pair for key, pair in factors_of(base).items() if ".experts." in key}
    for key, pair in pairs.items():
        pair["lora_B"] *= size * 0.5 ** int(key.split(".")[-2])
    adapter = write_one_by_one(half, tmp_path / "adapter", pairs)
    add = lambda key, W, delta: W.float() + delta  # noqa: E731
    folder = merged(half, tmp_path / "merged", add, pairs, torch.bfloat16)
    is_lost = finding == "lost-to-rounding"
    assert check(half, folder, "--adapter", adapter) == (3 * is_lost, {finding: is_lost, "router-frozen": False})


def test_a_weight_that_changed_without_a_pair_is_named(base, tmp_path, capsys):
    pairs = factors_of(base)
    adapter = write_one_by_one(base, tmp_path / "adapter", pairs)
    other = merged(tmp_path / "other", tmp_path / "merged", without("nothing"), pairs)
    status, findings = check(base, other, "--adapter", adapter)
    assert (status, findings["unexplained"]) == (3, True)
    assert "model.norm.weight" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- the command, the picture


@pytest.mark.parametrize("kind", ["lora", "lori-s", "dora", "dr-lora"])
def test_a_run_of_this_project_and_its_merged_checkpoint_are_healthy(kind, olmoe, tmp_path):
    make_run(olmoe.folder, tmp_path / "run", kind)
    _, findings = check(olmoe.folder, tmp_path / "run" / "adapter")
    assert {name for name, is_fault in findings.items() if is_fault} <= {"larger-than-weight"}  # random, and large
    call(export, tmp_path / "run", "--to merged --out", tmp_path / "out")
    status, findings = check(olmoe.folder, tmp_path / "out", "--adapter", tmp_path / "run")
    assert (status, findings["merged-once"]) == (0, False)


def test_the_picture_and_the_ranks(base, tmp_path):
    folder = write_packed(base, tmp_path / "adapter", factors_of(base))
    check(base, folder, "--plot", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    ratio = torch.tensor([[0.3, 0.1, 0.2, 0.2], [0.1, 0.2, 0.3, 0.4]])
    counts = torch.tensor([[30, 10, 20, 20], [4, 3, 2, 1]])
    assert rank_correlation(ratio[:1], counts[:1]) == pytest.approx(1)
    assert rank_correlation(ratio, counts) == pytest.approx(0)  # 1 and -1


def test_the_picture_at_the_end_of_a_run_is_drawn_for_a_family_with_biases_too(make_checkpoint, tmp_path):
    base = make_checkpoint("qwen2_moe").folder
    make_run(base, tmp_path)
    settings, counted = SimpleNamespace(method="hellora", task="own"), SimpleNamespace(counts=None)
    draw_adapter(
        SimpleNamespace(settings=settings, counted=counted, folder=base, config=read_config(base), out=tmp_path)
    )
    assert (tmp_path / "adapter.png").is_file()


def trained_by_peft(base: Path, out: Path, rows: Path) -> peft.PeftModel:
    """PEFT's own training of all experts on the rows of a file, saved."""
    reader = data.Reader("own", base, read_config(base))
    items = reader.encode(reader.load("train", rows))
    model = AutoModelForCausalLM.from_pretrained(base)
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=R, target_parameters=stacks, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for batch in data.global_batches(len(items), 8, seed=0, epoch=0) * 3:
        batch = data.collate([items[i] for i in batch], 1)
        shifted = F.pad(batch.labels, (1, 0), value=-100)[:, :-1]  # ours are those of the next position
        model(input_ids=batch.input_ids, labels=shifted).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    return model


def repack(adapter: Path, num_experts: int) -> None:
    """The columns of lora_B, which PEFT packs with the expert innermost, one expert after the other."""
    state = load_file(adapter / FILE)
    for name in [name for name in state if "experts" in name and "lora_B" in name]:
        state[name] = state[name].unflatten(1, (-1, num_experts)).transpose(1, 2).flatten(1).contiguous()
    save_file(state, adapter / FILE)


@pytest.fixture
def rows(tmp_path) -> Path:
    sums = [{"prompt": f"{a} + {b} =", "completion": str((a + b) % 10)} for a in range(8) for b in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, sums)))
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("evidence", ["norms", "loss"])
def test_the_order_of_packed_columns_shows_in_what_peft_trained_and_merged(evidence, olmoe, rows, tmp_path, capsys):
    base, adapter = with_tokenizer(shutil.copytree(olmoe.folder, tmp_path / "base")), tmp_path / "adapter"
    merged = trained_by_peft(base, adapter, rows).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    (tmp_path / "some.jsonl").write_text(2 * "".join(rows.read_text().splitlines(keepends=True)[:12]))
    flags = ["--data", tmp_path / "some.jsonl"] if evidence == "loss" else []
    words = {"norms": "variance of the column norms", "loss": "loss is"}[evidence]
    of_merged = [tmp_path / "merged", "--adapter", adapter, *flags]

    status, findings = check(base, adapter, *flags)
    assert (status, findings["packed-order-seen"]) == (0, False)
    shown = capsys.readouterr().out
    assert f"Evidence: the {words}" in shown
    assert ("rows: 12;" in shown) == (evidence == "loss")  # each row counts once
    assert check(base, *of_merged) == (0, dict.fromkeys(("packed-order-seen", "merged-once", "router-frozen"), False))
    repack(adapter, 7)
    assert check(base, adapter, *flags) == (3, {"packed-order": True, "router-frozen": False})
    findings = {"packed-order": True, "merged-reordered": True, "router-frozen": False}
    assert check(base, *of_merged) == (3, findings)
    change_config(adapter, {"lora_B_layout": "grouped_by_expert"})
    assert check(base, adapter, *flags)[0] == check(base, *of_merged)[0] == 0


def test_the_factors_of_peft_before_19_are_judged_by_their_names_in_the_file(base, tmp_path, capsys):
    """What is lora_B there, trained from zero, is read as A."""
    pairs, adapter = factors_of(base), tmp_path / "adapter"
    for key, pair in pairs.items():
        if ".experts." in key:
            size = pair["lora_B"].std()
            pair |= {"lora_A": size * pair["lora_A"], "lora_B": pair["lora_B"] / size}
    as_before_19(write_packed(base, adapter, pairs), 7)
    healthy = {"packed-order-seen": False, "router-trained": False}
    assert check(base, adapter) == (0, healthy)
    state = load_file(adapter / FILE)
    repack(adapter, 7)
    assert check(base, adapter)[1] == {"packed-order": True, "router-trained": False}

    def changed(change: Callable[[Tensor], Tensor], part: str) -> dict[str, bool]:
        tensors = {name: change(t) if "experts" in name and part in name else t for name, t in state.items()}
        save_file(tensors, adapter / FILE)
        return check(base, adapter)[1]

    capsys.readouterr()
    assert changed(torch.zeros_like, "lora_B") == {"unmoved": True, "router-trained": False}
    assert "none of the 84 pairs on experts moved: B is zero" in capsys.readouterr().out
    as_drawn = lambda A: A / A.abs().max() * A.shape[1] ** -0.5  # noqa: E731
    assert changed(as_drawn, "lora_A") == {"A-untrained": True} | healthy
    state = {name: as_drawn(A) if "lora_A" in name and "experts" not in name else A for name, A in state.items()}
    assert changed(as_drawn, "lora_A") == {"A-untrained": False} | healthy  # as where A is frozen


@pytest.mark.parametrize(
    "read, other, base, expected",
    [
        ([1.0, 1.2, 1.1], [2.0, 2.3, 2.1], 3.0, True),
        ([2.0, 2.3, 2.1], [1.0, 1.2, 1.1], 3.0, False),
        ([2.0, 2.3, 2.1], [1.0, 1.2, 1.1], 0.5, None),  # neither lowers the loss: these are not the rows
        ([1.0, 1.2, 1.1], [1.4, 0.8, 1.2], 3.0, None),  # within the error
        ([1.0], [2.0], 3.0, None),
        ([1.0, math.nan, 1.1], [2.0, 2.3, 2.1], 3.0, None),
    ],
)
def test_the_loss_tells_an_order_only_if_it_is_clearly_lower_and_below_that_of_the_base(read, other, base, expected):
    losses = {AS_READ: torch.tensor(read), REORDERED: torch.tensor(other), BASE: torch.full((len(read),), base)}
    assert order_by_loss(losses)[0] is expected


def test_an_adapter_of_another_model_is_not_called_empty(base, tmp_path):
    folder = write_one_by_one(base, tmp_path / "adapter", factors_of(base, [1]))
    assert check("tiny", folder) == (3, {"unread": True, "another-base": True, "router-frozen": False})


def test_rows_that_are_not_needed_are_said_not_to_be_read(base, tmp_path, capsys):
    folder = write_one_by_one(base, tmp_path / "adapter", factors_of(base, [1]))
    assert check(base, folder, "--data", "nowhere.jsonl")[0] == 0
    assert "--data nowhere.jsonl is not read" in capsys.readouterr().err


@pytest.mark.parametrize("ranks, orders", [((1, 1), 1), ((1, 2), 2), ((2, 2), 2)])
def test_a_stack_of_rank_1_alone_has_one_order_of_columns(monkeypatch, ranks, orders):
    pair = {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2)}
    reading = Reading("lora", {"layers.0.mlp.experts.0.up_proj": pair}, layout=Layout(False, False))
    reading.packed = dict(zip(("gate_up_proj", "down_proj"), ranks, strict=True))
    monkeypatch.setattr("run.adapters.read_loosely", lambda folder, config, layout=None: reading)
    assert len(readings_of("anywhere", None)) == orders
