"""Reading a checkpoint: time and peak memory, beside transformers' from_pretrained, and shared by two processes.

    python bench.py load                    # writes a checkpoint of 2 GB to a temporary folder, and reads it
    python bench.py load --model DIR        # reads an existing checkpoint

Each reading runs in a process of its own. The readers take turns several times, and medians are shown. Peak memory is
the largest resident size of the process, including shared pages of the file, less its size before it began. It is
shown as a multiple of the bytes of the weights.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from command import cli
from command.cli import InputError, flag
from command.files import writable, write_json
from hub.checkpoint import resolve
from hub.config import PRESETS
from hub.weights import init_weights
from lab import ROOT
from model import MoEConfig, MoETransformer, read_config, save_model

# OLMoE-1B-7B at half its width and with fewer layers: 1.1 G parameters, 2.2 GB in bfloat16.
SHAPE = PRESETS["olmoe-1b-7b"] | {
    "hidden_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 8
}  # fmt: skip

READERS = {  # what each process runs; `folder` is the checkpoint
    "ours": "from model import load_model\nbegin()\nmodel = load_model(folder, torch.bfloat16)",
    "ours, half of two processes": """
import torch.distributed as dist
from run.step import load_shared
dist.init_process_group("gloo", f"file://{meet}", rank=index, world_size=2)
begin()
model = load_shared(folder, torch.bfloat16, torch.device("cpu"), shard="full")""",
    "transformers": """
from transformers import AutoModelForCausalLM
begin()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)""",
}
FRAME = """
import json, resource, sys, time
import torch
folder, meet, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
def begin():
    global began, before
    began, before = time.perf_counter(), resident("VmRSS")
{reader}
seconds = time.perf_counter() - began
held = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in model.parameters())
print(json.dumps(dict(seconds=seconds, peak_bytes=resident("VmHWM") - before, held_bytes=held)))
"""


def read(name: str, folder: Path) -> dict:
    """One reading, in one process or two: the time of the slower one, the memory of the larger one."""
    count = 2 if "two processes" in name else 1
    root = str(ROOT)
    with tempfile.TemporaryDirectory() as meet:
        command = [sys.executable, "-c", FRAME.format(reader=READERS[name]), str(folder), f"{meet}/meet"]
        options = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | {"PYTHONPATH": root}}
        jobs = [subprocess.Popen([*command, str(index)], **options) for index in range(count)]
        printed = [job.communicate()[0] for job in jobs]
    if any(job.returncode for job in jobs):
        raise InputError(f"{name}: {folder} could not be read; see above")
    results = [json.loads(text.splitlines()[-1]) for text in printed]
    return {key: max(result[key] for result in results) for key in results[0]}


def make(folder: Path) -> None:
    """Write a random checkpoint of SHAPE in bfloat16."""
    model = MoETransformer(MoEConfig.from_dict(SHAPE)).to(torch.bfloat16)
    init_weights(model, std=0.02)
    save_model(model, folder, shard_bytes=10**9)


@dataclass(frozen=True)
class Settings:
    """The flags of `bench.py load`."""

    model: str | None = flag(None, "a checkpoint folder (default: one of 2 GB is written first)")
    repeat: int = flag(3, "readings of each; medians are shown", type=cli.number(int, 1))
    json: str | None = flag(None, "write the rows here", metavar="FILE")


def main(argv: list[str] | None = None) -> list[dict]:
    about = "Time and peak memory of reading a checkpoint."
    settings = cli.parse(Settings, argv, prog="bench.py load", description=about)
    out = settings.json and writable(settings.json)
    if settings.model:
        read_config(resolve(settings.model))
    names = list(READERS)
    if find_spec("transformers") is None:
        cli.say("transformers is not installed: its row is left out")
        names.remove("transformers")
    with tempfile.TemporaryDirectory() as temporary:
        folder = resolve(settings.model) if settings.model else Path(temporary)
        if not settings.model:
            began = time.perf_counter()
            make(folder)
            cli.say(f"wrote a checkpoint in {time.perf_counter() - began:.0f} s")
        files = list(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        cli.say(f"{size / 1e9:.2f} GB of weights in {len(files)} files, read as bfloat16")
        found = {name: [] for name in names}
        for _ in range(settings.repeat):  # in turn, so that other load on the machine affects all of them
            for name in names:
                found[name].append(read(name, folder))
    rows = []
    cli.say(f"{'':28} {'seconds':>8} {'peak GB':>8} {'peak / held':>12}")
    for name, readings in found.items():
        row = {"name": name} | {key: statistics.median(r[key] for r in readings) for key in readings[0]}
        rows.append(row | {"peak_over_held": row["peak_bytes"] / row["held_bytes"]})
        cli.say(f"{name:28} {row['seconds']:8.2f} {row['peak_bytes'] / 1e9:8.2f} {rows[-1]['peak_over_held']:12.2f}")
    if out:
        write_json(out, rows)
    return rows
