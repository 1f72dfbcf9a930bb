"""Check the results of a GPU, then measure its speed and memory, in one command.

    python bench.py gpu --json results/gpu.json                  # a CUDA GPU of 40 GB or more
    python bench.py gpu --device cpu --shape small               # the rehearsal

The tests in lab/tests/test_device.py hold the device's results against those of a CPU in float32. Then training steps
are measured (bench.py step), and decoding (bench.py generate), with random bfloat16 weights. Nothing is downloaded.
"""

import subprocess
import sys
from dataclasses import dataclass

import torch

from command import cli
from command.cli import InputError, RunError, flag
from command.files import writable, write_json
from lab import ROOT
from lab.benchmarks import generate, step
from lab.benchmarks.workload import SHAPES

STEPS = {"full": "--batch 16", "small": "--batch 4 --repeats 1"}  # flags of bench.py step
DECODING = {"full": "--prompts 64 --batch 64", "small": "--prompts 4 --batch 4 --repeats 1"}  # of bench.py generate


@dataclass(frozen=True)
class Settings:
    """The flags of `bench.py gpu`."""

    device: str = flag("cuda", "cpu: a rehearsal without a GPU", choices=("cuda", "cpu"))
    shape: str = flag("full", "OLMoE-1B-7B, or a quarter of its width and depth", choices=list(SHAPES))
    json: str | None = flag(None, "write the rows to this file", metavar="FILE")


def main(argv: list[str] | None = None) -> dict:
    """Test, measure and print; -> what is written to --json. Raises RunError at the end if a test failed."""
    settings = cli.parse(
        Settings,
        argv,
        prog="bench.py gpu",
        description="Check a GPU, then measure training and decoding on it.",
        example="python bench.py gpu --device cpu --shape small",
    )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU; add --device cpu --shape small to rehearse without one")
    if settings.device == "cpu" and torch.cuda.is_available():
        raise InputError("--device cpu: there is a GPU; set CUDA_VISIBLE_DEVICES to nothing to rehearse without it")
    out, flags = settings.json and writable(settings.json), ["--shape", settings.shape, "--dtype", "bfloat16"]
    command = [sys.executable, "-m", "pytest", "-q", "lab/tests/test_device.py", "--device", settings.device]
    passed = subprocess.run(command, cwd=ROOT).returncode == 0
    steps = step.main([*flags, *STEPS[settings.shape].split()])
    decoding = generate.main([*flags, *DECODING[settings.shape].split()])
    where = torch.cuda.get_device_name() if settings.device == "cuda" else "CPU"
    results = {"device": where, "torch": torch.__version__, "passed": passed, "steps": steps, "decoding": decoding}
    if out:
        write_json(out, results)
    if not passed:
        raise RunError(f"tests failed on {where}; pytest printed them above the measurements")
    return results
