"""A model of OLMoE-1B-7B's size on this machine, with random weights: written, loaded, profiled and trained.

    python bench.py full                            # 14 GB of disk, 17 GB of memory, no GPU
    python bench.py full --layers 2                 # two of the 16 layers
    python bench.py full --keep-at DIR              # leaves the checkpoint, for profile.py, train.py, ...

A checkpoint in bfloat16 is written in shards and loaded. The experts that 16 examples use are counted. The hottest of
each layer get HELLoRA's pairs, and these train for a few steps. The examples are as long as GSM8K's; their tokens are
random. Peak memory stands beside the plan's. The speed stands beside that of the best grouped matmul of this run.

A checkpoint that is kept has the tokenizer of the embedded model, whose ids are a part of the vocabulary.

Dimensions: D hidden_size, F intermediate_size of an expert, E experts per layer, K experts per token.
"""

import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import data
import hellora
from command import cli
from command.cli import InputError, flag, say
from command.files import writable, write_json
from hub.checkpoint import EMBEDDED, copy_beside, write_checkpoint
from hub.config import PRESETS
from hub.weights import hub_views
from lab.benchmarks.flops import adapter_flops, model_flops
from lab.benchmarks.measure import grouped_matmul_speed
from lab.benchmarks.subjects import adamw, attach
from lab.benchmarks.workload import make_batches
from machine import memory
from machine.processes import ALONE, freed_memory_kept
from model import MoEConfig, MoETransformer, read_config
from profile import count_task
from training_step import batch_gradients, load_for_process

TOKENS = {"eos_token_id": 0, "pad_token_id": 1}  # of the embedded tokenizer
SHAPE = PRESETS["olmoe-1b-7b"] | TOKENS | {"torch_dtype": "bfloat16"}
RANK, BATCH, EXAMPLES = 32, 4, 16
CPU = torch.device("cpu")
SHARD_BYTES = 10**9


@torch.no_grad()
def write_random(folder: Path, shape: dict, shard_bytes: int) -> int:
    """Write a checkpoint of N(0, 0.02^2) in bfloat16, one shard in memory at a time.  -> its bytes"""
    with torch.device("meta"):
        views = hub_views(MoETransformer(MoEConfig.from_dict(shape)))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for key, view in views.items():
            tensor = torch.ones(view.shape, dtype=torch.bfloat16)  # a norm
            yield key, tensor if view.dim() == 1 else tensor.normal_(0.0, 0.02, generator=generator)

    sizes = {key: view.numel() * torch.bfloat16.itemsize for key, view in views.items()}
    write_checkpoint(folder, sizes, tensors(), shape, shard_bytes)
    copy_beside(EMBEDDED["tiny"], folder)
    return sum(sizes.values())


def peak_resident() -> int:
    """Bytes of the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def examples(n: int, vocab_size: int) -> list[data.Encoded]:
    """n examples as long as GSM8K's, of random tokens."""
    items = []
    for batch in make_batches(1, n, vocab_size, CPU):
        ids, prompt = batch.input_ids[0].tolist(), int((batch.labels[0] != -100).nonzero()[0]) + 1
        items.append(data.Encoded(ids, ((prompt, len(ids)),)))
    return items


def train(model: MoETransformer, batches: list[list[data.Encoded]]) -> dict:
    """One step on each batch, as train.py takes it, but without clipping."""
    optimizer, losses, times = adamw(model), [], []
    tokens = [sum(len(item.ids) for item in batch) for batch in batches]
    for batch, count in zip(batches, tokens, strict=True):
        began = time.perf_counter()
        losses.append(batch_gradients(model, batch, len(batch), ALONE).loss.item())
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
        say(f"step of {count} tokens: loss {losses[-1]:.3f}, {times[-1]:.1f} s, {count / times[-1]:.0f} tokens/s")
    padded = [data.collate(batch, 0) for batch in batches]
    flops = sum(model_flops(model.config, batch) + adapter_flops(model, batch) for batch in padded)
    rates = {"tokens_per_s": sum(tokens) / sum(times), "flops_per_s": flops / sum(times)}
    return {"tokens": tokens, "losses": losses, "seconds": times, **rates, "peak_bytes": peak_resident()}


def measure(folder: Path, steps: int) -> dict:
    """Count, choose, load and train, as train.py does; says each number as it comes."""
    config, before, began = read_config(folder), peak_resident(), time.perf_counter()
    items = examples(max(EXAMPLES, steps * BATCH), config.vocab_size)
    counted = count_task(folder, items[:EXAMPLES], BATCH, ALONE, dtype=torch.bfloat16, shard=None, warmup=None, seed=0)
    row = {"resident_before_bytes": before, "seconds_profile": time.perf_counter() - began}
    say(f"loaded, and counted the experts of {counted.num_tokens} tokens, in {row['seconds_profile']:.0f} s")

    hot, began = hellora.select_experts("hot", counted.counts, config.num_experts_per_tok), time.perf_counter()

    def attach_here(model: MoETransformer) -> None:
        attach("hellora", model, hot, RANK)

    model = load_for_process(folder, torch.bfloat16, CPU, shard="none", attach=attach_here)
    row["seconds_load"] = time.perf_counter() - began
    say(f"loaded again, with adapters, in {row['seconds_load']:.0f} s")
    with freed_memory_kept(CPU):
        row |= train(model, [items[i * BATCH : (i + 1) * BATCH] for i in range(steps)])
        rows = max(row["tokens"]) * config.num_experts_per_tok
        speed = grouped_matmul_speed(model.layers[-1].mlp.experts.gate_up_proj, rows)
    planned = memory.plan(
        config, attach_here, dtype=torch.bfloat16, num_processes=1, sharded=False, tokens=max(row["tokens"])
    )
    row["planned_bytes"] = planned.total
    return row | {"grouped_matmul_flops_per_s": speed, "share_of_matmul": row["flops_per_s"] / speed}


def check_room(shape: dict, folder: Path) -> None:
    """Raise InputError if disk or memory is too small for the model."""
    config = MoEConfig.from_dict(shape)
    plan = memory.plan(config, None, dtype=torch.bfloat16, num_processes=1, sharded=False, tokens=1, trains=False)
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = {"disk": shutil.disk_usage(place).free, "memory": memory.available(torch.device("cpu"))}
    for what, size in free.items():
        if size < 1.2 * plan.weights:
            need = f"{1.2 * plan.weights / 1e9:.1f} GB"
            raise InputError(f"{what}: {size / 1e9:.1f} GB are free, {need} are needed; give fewer --layers")


@dataclass(frozen=True)
class Settings:
    """The flags of `bench.py full`."""

    layers: int = flag(
        SHAPE["num_hidden_layers"], "number of layers", type=cli.number(int, 1, SHAPE["num_hidden_layers"])
    )
    steps: int = flag(3, "training steps", type=cli.number(int, 1))
    keep_at: str | None = flag(None, "new folder for the checkpoint (default: a temporary one)", metavar="DIR")
    json: str | None = flag(None, "write the numbers here", metavar="FILE")


def main(argv: list[str] | None = None) -> dict:
    settings = cli.parse(
        Settings,
        argv,
        prog="bench.py full",
        description="Write, load, profile and train OLMoE-1B-7B's shape with random bfloat16 weights.",
        example="python bench.py full --layers 2",
    )
    out, shape = settings.json and writable(settings.json), SHAPE | {"num_hidden_layers": settings.layers}
    if settings.keep_at and Path(settings.keep_at).exists():
        raise InputError(f"--keep-at {settings.keep_at} exists; name a new folder")
    with nullcontext(settings.keep_at) if settings.keep_at else tempfile.TemporaryDirectory() as folder:
        folder, began = Path(folder), time.perf_counter()
        check_room(shape, folder)
        # In a process of its own, whose memory is not part of the peak.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
            size = other.submit(write_random, folder, shape, SHARD_BYTES).result()
        written = time.perf_counter() - began
        say(f"wrote {size / 1e9:.2f} GB ({settings.layers} layers) in {written:.0f} s")
        row = {"layers": settings.layers, "bytes": size, "seconds_write": written} | measure(folder, settings.steps)
    speed, fastest = row["flops_per_s"] / 1e9, row["grouped_matmul_flops_per_s"] / 1e9
    peak, before, planned = (row[f"{name}_bytes"] / 1e9 for name in ("peak", "resident_before", "planned"))
    say(
        f"{row['tokens_per_s']:.1f} tokens/s on {torch.get_num_threads()} threads: {speed:.0f} GFLOP/s, "
        f"{row['share_of_matmul']:.2f} of a grouped matmul's {fastest:.0f}",
        f"peak memory {peak:.2f} GB, {before:.2f} of it before loading; the plan of the model is {planned:.2f} GB",
    )
    if out:
        write_json(out, row)
    return row
