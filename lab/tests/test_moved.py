"""reproduce.py moved: the numbers of runs whose experts moved by known amounts."""

import json

import pytest
import torch

import hellora
import reproduce
from command.cli import InputError
from hub.checkpoint import TINY
from model import load_model
from run.adapters import adapter_state, save_adapter

COUNTS = (8 * torch.arange(64, 0, -1)).expand(4, -1)  # of each layer the first expert is the hottest


def run_where_the_first_moved_most(folder, hot, sign: int):
    """B of expert e is larger the lower e is, or with sign -1 the smaller; half of the experts got no gradient."""
    model = load_model(TINY)
    hellora.attach(model, hot, 2, 3.0)
    generator = torch.Generator().manual_seed(0)
    for layer in model.layers:
        for pair in layer.mlp.experts.lora.values():
            ids = torch.tensor(layer.mlp.experts.expert_ids[: len(pair.lora_B)])
            noise = 1 + 0.01 * torch.randn(pair.lora_B.shape, generator=generator)
            pair.lora_B.data = noise * (4.0 ** (-sign * ids) * (ids < 32))[:, None, None]
    folder.mkdir()
    save_adapter(adapter_state(model), folder / "adapter", model.adapter)
    (folder / "config.json").write_text(json.dumps({"model": "tiny", "settings": {"method": "hellora"}}))
    profile = {"model": "tiny", "task": "t", "num_tokens": 2080, "num_experts_per_tok": 8}
    (folder / "profile.json").write_text(
        json.dumps(profile | {"counts": COUNTS.tolist(), "gate_mass": COUNTS.tolist()})
    )
    return str(folder)


def test_the_correlation_is_that_of_the_experts_with_a_pair_and_of_those_that_moved(tmp_path, capsys):
    some = torch.zeros(4, 64, dtype=torch.bool)
    some[:, [1, 5, 20, 31]] = True
    runs = [
        run_where_the_first_moved_most(tmp_path / "hot-most", torch.ones_like(some), 1),
        run_where_the_first_moved_most(tmp_path / "hot-least", torch.ones_like(some), -1),
        run_where_the_first_moved_most(tmp_path / "some", some, 1),
    ]
    reproduce.main(["moved", *runs, "--plot", str(tmp_path / "moved.png")])
    assert (tmp_path / "moved.png").stat().st_size > 10_000
    lines = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    assert [line[1:3] for line in lines[2:]] == [
        ["hot-most", "128 of 256"], ["hot-least", "128 of 256"], ["some", "16 of 16"]
    ]  # fmt: skip
    correlations = [float(cell) for line in lines[2:] for cell in line[5:7]]
    assert (correlations[1], correlations[3], correlations[4], correlations[5]) == (1, -1, 1, 1)
    assert correlations[0] > 0.8 and -0.5 < correlations[2] < 0.9  # with those that did not move
    medians = [float(cell.removesuffix(" %")) for line in lines[2:4] for cell in line[3:5]]
    assert medians[0] > 4 * medians[1] and medians[3] > 4 * medians[2]


def test_what_is_no_run_with_an_adapter_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a run folder of train.py with an adapter"):
        reproduce.main(["moved", "tiny"])
    with pytest.raises(InputError, match="moved.txt"):
        reproduce.main(["moved", "tiny", "--plot", "moved.txt"])
