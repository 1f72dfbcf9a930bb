"""reproduce.py: the rows it writes, and that predicted bytes are those of a real file and a real optimizer."""

import json

import pytest
import torch

import hellora
import lori
import reproduce
from command.cli import InputError
from hub.checkpoint import TINY
from lab.paper import params
from lori import sparsify
from model import load_model
from recipes.methods import METHODS
from run import adapters


def test_params_writes_a_row_for_every_line_and_prints_it_beside_the_papers_figure(tmp_path, capsys):
    out = tmp_path / "new" / "params.json"
    rows = reproduce.main(["params", "--json", str(out)])
    assert json.loads(out.read_text()) == rows
    assert [tuple(row.values()) for row in rows] == [
        (*line[1:5], row["trainable"], row["percent"], line.paper, line.millions)
        for row, line in zip(rows, params.ROWS, strict=True)
    ]
    assert all(list(row) == "model method k targets trainable percent paper paper_millions".split() for row in rows)
    said = capsys.readouterr().out.replace("|", "").splitlines()
    hellora_line = next(line.split() for line in said if line.split()[1:4] == ["olmoe-1b-7b", "hellora", "8"])
    assert hellora_line == "2 olmoe-1b-7b hellora 8 all 47,218,688 0.6778 0.7 188,874,752 377,749,504".split()
    share = "15.16% of LoRA's parameters (quotient of the percentages, as in the paper: 15.74%)"
    assert f"- olmoe-1b-7b: HELLoRA trains {share}" in said


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "got no command; expected one of params, table2"),
        (["table99"], "got 'table99'; expected one of params, table2"),
        (["params", "--json", "/proc/x.json"], "/proc/x.json cannot be written"),
        (["params", "--model", "tiny"], "--model"),
    ],
)
def test_wrong_input_is_named_in_one_line(flags, says):
    with pytest.raises(InputError, match=says) as error:
        reproduce.main(flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["lora", "dora", "hellora", "hellori-d", "hellori-s"])
def test_predicted_bytes_are_those_of_the_file_and_of_the_optimizer(method, tmp_path):
    model, r, k = load_model(TINY), 4, None if method in ("lora", "dora") else 3
    how = METHODS[method]
    hot = torch.arange(64).expand(4, -1) < (k or 64)
    hellora.attach(model, hot, r, 6.0, kind=how.kind)
    if how.sparse:
        noise = torch.Generator().manual_seed(0)
        state = {name: torch.rand(B.shape, generator=noise) for name, B in adapters.adapter_state(model).items()}
        sparsify(model, lori.top_entries(state))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    sum(p.sum() for p in trained).backward()
    optimizer.step()
    adapters.save_adapter(adapters.adapter_state(model), tmp_path, model.adapter)
    file = (tmp_path / "adapter.safetensors").read_bytes()
    header = int.from_bytes(file[:8], "little")  # safetensors: its length, the names and shapes, the tensors
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    predicted = params.size(model.config, method, k, "all", r)
    assert predicted.adapter_bytes == len(file) - 8 - header
    assert predicted.optimizer_bytes == sum(moment.nbytes for moment in moments)
    assert predicted.trainable == sum(p.numel() for p in trained)
