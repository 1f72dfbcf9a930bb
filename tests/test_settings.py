"""The table of methods: whatever the method and the targets, what is said to train is what trains, and nothing else."""

import itertools
from pathlib import Path

import matplotlib.image
import pytest
import torch
from conftest import call, read_json, words, write_json
from safetensors.torch import load_file

import hellora
import train
from hub.weights import hub_views
from model import load_model
from recipes.methods import METHODS
from run import adapters
from run.log import draw_loss

E, L, R, STEPS = 7, 4, 4, 3
SIDES = {  # d_in, d_out of the fixture's matrices: width 48, 6 heads of 8 that share 2 keys, 7 experts of 40
    "q_proj": (48, 48), "k_proj": (48, 16), "v_proj": (48, 16), "o_proj": (48, 48), "gate": (48, 7),
    "gate_proj": (48, 40), "up_proj": (48, 40), "down_proj": (40, 48),
}  # fmt: skip
BESIDE = {"all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate"), "gate": ("gate",), "pure": ()}
ADAPTED = {"hellora": 3, "hellori-d": 3, "hellori-s": 3, "moe-sieve": 1}  # experts a layer: 3 a token, a quarter of 7
FACTORS = {"lori-d": "B", "hellori-d": "B", "lori-s": "b", "hellori-s": "b", "dora": "ABm"}  # b: a tenth of B


@pytest.fixture
def trained_models(monkeypatch) -> list:
    """The models that train.py loads from now on."""
    loaded, load = [], train.load_for_process

    def keep(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(train, "load_for_process", keep)
    return loaded


def expected(method: str, targets: str) -> int:
    """Trainable parameters, by hand."""
    names = [*BESIDE[targets], *("gate_proj", "up_proj", "down_proj") * ADAPTED.get(method, E)] * L
    A, B, m = (
        R * sum(SIDES[name][0] for name in names),
        R * sum(SIDES[name][1] for name in names),
        sum(SIDES[name][1] for name in names),
    )
    sizes = {"A": A, "B": B, "b": B // 10, "m": m}
    return sum(sizes[factor] for factor in FACTORS.get(method, "AB"))


EVERY_METHOD = [(name, "all") for name, method in METHODS.items() if method.experts and not method.flat]
EVERY_KIND = itertools.product(("lora", "dora", "lori-d", "lori-s", "dr-lora"), ("gate", "pure"))


@pytest.mark.parametrize("method, targets", [*EVERY_METHOD, *EVERY_KIND])
def test_every_method_and_every_choice_of_targets_trains_what_it_says(
    method, targets, base, trained_models, tmp_path, capsys
):
    flags = words("--model", base, "--method", method, "--targets", targets, "--rank", R, "--alpha 6 --steps", STEPS)
    flags += words("--batch 3 --sample 0.03 --lr 0.01 --out", tmp_path / "run")
    result = call(train, flags)

    # It counts what it says: by hand, in result.json, in print, and in the file.
    assert result["trainable"] == expected(method, targets)
    said = capsys.readouterr().out
    if method != "dr-lora":  # which prints what it reserves, and ends with what has grown
        assert f"trainable {expected(method, targets):,} of " in said
    assert f"other modules adapted in every layer: {', '.join(BESIDE[targets]) or 'none'}" in said
    experts = ADAPTED.get(method, E)
    assert all(f"layer {i:2d}: {experts} of {E} experts adapted" in said for i in range(L))
    tensors = load_file(tmp_path / "run/adapter/adapter.safetensors")
    values = {name: t for name, t in tensors.items() if t.is_floating_point()}
    assert sum(t.numel() for t in values.values()) == expected(method, targets)
    if FACTORS.get(method) == "b":  # where they stand: a bit for every entry of B
        bits = sum(t.nbytes for t in tensors.values()) - 4 * expected(method, targets)
        assert bits <= 10 * expected(method, targets) // 8 + len(tensors)

    # It trains what it says, where it says.
    model = trained_models[-1]
    adapter, ours = model.adapter, adapters.adapter_state(model)
    fresh = load_model(base)
    where = {"kind": adapter.kind, "targets": targets, "seed": adapter.seed}
    r_max = 2 * R if method == "dr-lora" else None
    hellora.attach(fresh, adapters.hot_mask(adapter.hot, fresh.config), R, 6.0, expert_rank=r_max, **where)
    before = dict(fresh.named_parameters())
    modules = {name.partition(".lora_")[0].partition(".parametrizations")[0].rpartition(".")[2] for name in ours}
    assert modules == {*BESIDE[targets], "gate_proj", "up_proj", "down_proj"}
    for name, value in ours.items():
        if name.endswith("original"):  # the values of a sparse B, which starts at zero
            assert value.any(), name
        elif value.is_floating_point():
            assert not torch.equal(value, before[name]), name
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A") and adapter.kind == "lori":
            assert torch.equal(parameter, before[name])

    # And nothing else: the base is as it was.
    hellora.detach(model)
    reference = hub_views(load_model(base))
    assert all(torch.equal(view, reference[key]) for key, view in hub_views(model).items())


# --------------------------------------------------------------------------------------- counts or gate mass


def profiled(path: Path) -> Path:
    """A profile whose experts 0, 1, 2 have the tokens, and whose experts 4, 5 have the weight."""
    counts, mass = [30, 29, 28, 5, 4, 3, 0], [1.0, 1.0, 1.0, 1.0, 9.0, 7.0, 0.0]
    about = {"model": "m", "task": "t", "num_tokens": 33, "num_experts_per_tok": 3}
    write_json(path, about | {"counts": [counts] * L, "gate_mass": [mass] * L})
    return path


@pytest.mark.parametrize(
    "flags, hot",
    [
        ("--k 2", [0, 1]),
        ("--k 2 --scores counts", [0, 1]),
        ("--k 2 --scores gate-mass", [4, 5]),
        ("--experts coverage --coverage 0.8", [0, 1, 2]),
        ("--experts coverage --coverage 0.8 --scores gate-mass", [4, 5]),
        ("--experts cold --k 2 --scores gate-mass", [0, 6]),
        ("--experts greedy --k 1 --scores gate-mass", [4]),
    ],
)
def test_experts_are_chosen_by_tokens_or_by_the_weight_they_get(flags, hot, base, tmp_path):
    profile = profiled(tmp_path / "p.json")
    call(train, flags, "--model", base, "--steps 1 --batch 2 --rank 2 --profile", profile, "--out", tmp_path / "run")
    assert read_json(tmp_path / "run/adapter/adapter.json")["hot"] == [hot] * L


def test_the_loss_and_the_validations_are_drawn(tmp_path):
    draw_loss([3.0, 2.0, 1.5], [(2, 2.2)], tmp_path / "loss.png", "a title")
    assert matplotlib.image.imread(tmp_path / "loss.png").std() > 0.1
