"""Every command starts, however it is started, although profile.py hides a module of the standard library.

cProfile imports `profile`, and torch imports cProfile in its optimizers, torch.compile, checkpointing: they meet
ours whenever this folder comes first on sys.path.
"""

import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = sorted(path.stem for path in ROOT.glob("*.py") if '__name__ == "__main__"' in path.read_text())


def start(*arguments, folder: Path = ROOT) -> subprocess.Popen:
    """Start Python with these arguments in a folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "tkagg"}  # one that would need a display
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def printed(started: subprocess.Popen) -> str:
    """What it printed, once it has ended with status 0."""
    out, err = started.communicate(timeout=300)
    assert started.returncode == 0, out + err
    return out


# As a debugger, IPython or `python -m cProfile` from another folder do: the standard library's `profile` comes first.
LOADED_BEFORE = """
import cProfile, runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_where_cprofile_was_loaded_before(name, tmp_path):
    usage = printed(start("-c", LOADED_BEFORE, ROOT / f"{name}.py", "--help", folder=tmp_path))
    assert usage.startswith("usage: ") and name in usage.splitlines()[0]


@pytest.mark.parametrize("name", ["profile", "train"])
def test_help_by_path_and_with_m(name, tmp_path):
    for started in start(ROOT / f"{name}.py", "--help", folder=tmp_path), start("-m", name, "--help"):
        assert printed(started).startswith(f"usage: {name}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads what GNU's OpenMP displays")
@pytest.mark.parametrize(
    "given, shown", [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_the_threads_of_a_command_spin_briefly_unless_the_user_says_otherwise(given, shown, monkeypatch):
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert f"GOMP_SPINCOUNT = '{shown}'" in start("train.py", "--help").communicate(timeout=300)[1]


def test_a_command_bounds_the_caches_of_onednn_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(ROOT / "train.py"), raising=False)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(os, "environ", {"LRU_CACHE_CAPACITY": "7"})
    runpy.run_path(str(ROOT / "command" / "start.py"))
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("64", "7")


# What breaks under a profile.py without the standard library's names, in one script.
NEEDS_PROFILE = """
import cProfile
import sys

import torch
from torch.utils.checkpoint import checkpoint

if len(sys.argv) == 1:  # not under cProfile already, which newer Pythons do not nest
    cProfile.run("sum(range(9))")
    assert cProfile.Profile().runcall(sum, [2, 3]) == 5

w = torch.ones(3, requires_grad=True)
optimizer = torch.optim.AdamW([w], lr=0.1)
checkpoint(lambda x: (x * x).sum(), w, use_reentrant=False).backward()
optimizer.step()
assert torch.allclose(w, torch.tensor(0.9), atol=0.01)

import torch._dynamo
import torch.distributed.checkpoint

assert torch.compile(lambda x: 2 * x + 1, backend="eager")(torch.ones(2)).tolist() == [3, 3]

import profile

assert {"count_experts", "RoutingProfile", "run", "runctx", "Profile"} <= vars(profile).keys()
if len(sys.argv) == 1:
    profile.run("sum(range(9))")
print("all of it works")
"""


def test_whatever_needs_the_standard_librarys_profile_works_beside_ours(tmp_path):
    left_out = shutil.ignore_patterns(".*", "tests", "results", "runs", "shared", "*.safetensors")
    shutil.copytree(ROOT, tmp_path, ignore=left_out, dirs_exist_ok=True)
    (tmp_path / "needs_profile.py").write_text(NEEDS_PROFILE)
    by_path = start(tmp_path / "needs_profile.py", folder=tmp_path / "tiny")
    under_cprofile = start("-m", "cProfile", "-o", "stats", "needs_profile.py", "nested", folder=tmp_path)
    assert "all of it works" in printed(by_path) and "all of it works" in printed(under_cprofile)
