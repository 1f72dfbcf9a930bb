"""--report-to: TensorBoard and Weights & Biases get the numbers of log.jsonl. Both are stand-ins for the packages."""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import call, read_json, read_lines, words

import train
from command.cli import InputError
from run.report import PACKAGES

SMALL = words("--steps 3 --batch 2 --sample 0.005 --rank 4 --save-every 2")
SMALL += words("--schedule constant --lr-warmup 0")  # so that a run can be extended


@pytest.fixture
def stubs(monkeypatch) -> dict[str, Mock]:
    """Modules in place of the packages, which take any call and remember it."""
    made = {"tensorboard": Mock(), "wandb": Mock()}
    for name, module in PACKAGES.items():
        monkeypatch.setitem(sys.modules, module, made[name])
    return made


def wanted(out: Path) -> list[tuple[str, float, int]]:
    records = read_lines(out / "log.jsonl")
    return [(name, n, record["step"]) for record in records for name, n in record.items() if name != "step"]


def test_tensorboard_gets_every_number_of_the_log_and_drops_what_is_done_again(stubs, tmp_path):
    writer, out = stubs["tensorboard"].SummaryWriter, tmp_path / "run"
    call(train, SMALL, "--report-to tensorboard --out", out)
    writer.assert_called_once_with(str(out / "tensorboard"), purge_step=1)
    assert [call.args for call in writer.return_value.add_scalar.call_args_list] == wanted(out)
    writer.return_value.close.assert_called_once_with()
    call(train, SMALL, "--steps 4 --report-to tensorboard --resume --out", out)
    assert writer.call_args.kwargs == {"purge_step": 4}


def test_wandb_gets_a_run_named_after_out_with_its_settings_and_every_number(stubs, tmp_path):
    wandb, out = stubs["wandb"], tmp_path / "run"
    call(train, SMALL, "--report-to wandb --out", out)
    init = SimpleNamespace(**wandb.init.call_args.kwargs)
    assert (init.project, init.name, init.dir) == ("hellora", str(out), str(out))
    assert init.config == read_json(out / "config.json")["settings"]
    sent = [(name, n, c.kwargs["step"]) for c in wandb.log.call_args_list for name, n in c.args[0].items()]
    assert sent == wanted(out)
    wandb.finish.assert_called_once_with()


def test_a_run_that_fails_still_ends_its_report(stubs, tmp_path):
    stubs["wandb"].log.side_effect = OSError("no network")
    with pytest.raises(OSError, match="no network"):
        call(train, SMALL, "--report-to wandb --out", tmp_path / "run")
    stubs["wandb"].finish.assert_called_once_with()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_installed_is_named_before_anything_is_written(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)  # importing it raises ImportError
    with pytest.raises(
        InputError, match=f"--report-to {name}: the package {name} is not installed; .*pip install {name}"
    ):
        call(train, SMALL, "--report-to", name, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_the_flag_neither_is_imported(stubs, tmp_path):
    call(train, SMALL, "--out", tmp_path / "run")
    assert not stubs["tensorboard"].mock_calls and not stubs["wandb"].mock_calls
