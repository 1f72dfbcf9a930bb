"""How much memory a run needs, before it starts: it decides whether the base is replicated or sharded.

    plan(config, attach, dtype=torch.bfloat16, num_processes=2, sharded=True, tokens=2048)     # bytes per process

Replicated (`--shard none`): every process holds all weights of the base. Only the gradients of the adapters are
communicated. Sharded (`--shard full`, FSDP2): every process holds a part of each weight. The weights of a layer are
all-gathered before its forward pass and again before its backward pass. `--shard hybrid`: each machine holds a copy of
the base, sharded over its processes, so that weights are gathered within a machine and only gradients leave it. It
needs the memory of `full` on one machine.

Dimensions: T tokens of a micro-batch, K experts per token, D hidden_size, F intermediate_size of an expert.
"""

import gc
import os
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from command import cli
from command.cli import InputError
from hub.checkpoint import resolve
from hub.config import HUB_IDS, PRESETS
from hub.weights import shard_dim
from machine.processes import processes_per_machine
from model import KVCache, MoEConfig, MoETransformer, read_config

aten = torch.ops.aten
SPARE = 0.1  # share of a device's memory that is left to the allocator and to what the plan does not count


class Plan(NamedTuple):
    """Bytes on one process."""

    weights: int  # of the base; sharded: this process's part
    adapters: int  # factors in float32, trained and frozen; sharded: this process's part
    gathered: int  # sharded: weights that are all-gathered at once
    gradients: int
    optimizer: int  # AdamW's two moments
    activations: int  # kept for the backward pass, over all layers; or keys and values while text is decoded
    transient: int  # allocated and freed within the current layer, or within the head

    @property
    def total(self) -> int:
        return sum(self)


def plan(
    config: MoEConfig,
    attach: Callable[[MoETransformer], None] | None,
    *,
    dtype: torch.dtype,
    num_processes: int,
    sharded: bool,
    tokens: int,
    trains: bool = True,
    checkpointing: bool = False,
    cached: int = 0,
) -> Plan:
    """What each of `num_processes` processes needs for micro-batches of `tokens` tokens.

    attach: as for `load_for_process`. cached: positions of a KV cache, over all sequences. On a model without weights,
    parameters are counted and a pass is measured: to within 15 % of what it really allocates (tests/test_memory.py), if
    all rows reach hot experts.
    """
    with torch.device("meta"):
        model = MoETransformer(config).to(dtype)
    if attach is not None:
        attach(model)
    named, parts = dict(model.named_parameters()), num_processes if sharded else 1
    trained = [p for p in named.values() if trains and p.requires_grad]
    activations, transient = pass_bytes(model, tokens, trains, checkpointing)
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    # Sharded, gradients wait to be reduced: of all adapters until the last micro-batch, or of one full layer.
    waiting = 0 if not sharded else held(trained) if model.adapter else largest_layer(model)
    return Plan(
        weights=held([p for name, p in named.items() if "lora_" not in name], parts),
        adapters=held([p for name, p in named.items() if "lora_" in name], parts),
        gathered=gathered(model, num_processes) if sharded else 0,
        gradients=held(trained, parts) + waiting,
        optimizer=2 * held(trained, parts),
        activations=activations + cached * position,
        transient=transient,
    )


# ------------------------------------------------------------------------------------------------------- parameters


def held(parameters: Iterable[Tensor], num_processes: int = 1) -> int:
    """Bytes that the first of `num_processes` holds. None holds more."""
    sizes = [(p.shape[shard_dim(p.shape, num_processes)], p.nbytes) for p in parameters]
    return sum(-(-size // num_processes) * nbytes // size for size, nbytes in sizes)


def gathered(model: MoETransformer, num_processes: int) -> int:
    """Bytes that are all-gathered at once: the root; the current layer, received and unpacked; the next, received."""
    root = held(p for name, p in model.named_parameters() if not name.startswith("layers."))
    # All processes send parts of the same size, so smaller parts are padded.
    received = max(num_processes * held(layer.parameters(), num_processes) for layer in model.layers)
    return root + largest_layer(model) + 2 * received


def largest_layer(model: MoETransformer) -> int:
    return max(held(layer.parameters()) for layer in model.layers)


# ------------------------------------------------------------------------------------------------------ activations


def pass_bytes(model: MoETransformer, tokens: int, trains: bool, checkpointing: bool) -> tuple[int, int]:
    """Bytes kept for the backward pass over all layers, and the most that are allocated besides.

    model: on the meta device. Its layers with experts are alike: one more of them is measured, and counted for each.
    """
    layers, num_dense = model.layers, model.config.num_dense_layers
    num_moe = len(layers) - num_dense
    measured = []
    for n in range(1, min(2, num_moe) + 1):
        model.layers = layers[: num_dense + n]
        measured.append(train_on_meta(model, tokens, checkpointing) if trains else read_on_meta(model, tokens))
    model.layers = layers
    kept_by_one, (kept, peak) = measured[0][0], measured[-1]
    return kept + (num_moe - len(measured)) * (kept - kept_by_one), peak - kept


def train_on_meta(model: MoETransformer, tokens: int, checkpointing: bool) -> tuple[int, int]:
    """Bytes kept after the forward pass of a micro-batch, in which every token has a target, and the peak of both."""
    model.to("meta").train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)  # there from the first micro-batch on
    for layer in model.layers:
        layer.activation_checkpointing = checkpointing
    ids, lengths = sequences(model.config, tokens)
    with Meter(model.parameters(), ids.numel() * model.config.num_experts_per_tok) as meter:
        loss, _ = model(ids, lengths, labels=ids)
        kept = meter.held
        loss.backward()
    return kept, meter.peak


@torch.no_grad()
def read_on_meta(model: MoETransformer, tokens: int) -> tuple[int, int]:
    """Bytes kept (none), and the peak of reading prompts into a KV cache, whose own bytes are not counted."""
    model.to("meta").eval()
    ids, lengths = sequences(model.config, tokens)
    dtype = model.embed_tokens.weight.dtype
    cache = KVCache(model.config, *ids.shape, dtype=dtype, device="meta")
    given = [*model.parameters(), cache.keys, cache.values]
    with Meter(given, ids.numel() * model.config.num_experts_per_tok) as meter:
        model(ids, lengths, cache=cache, last_only=True)
    return 0, meter.peak


def sequences(config: MoEConfig, tokens: int) -> tuple[Tensor, Tensor]:
    """Sequences of that many tokens together, no longer than the attention's window.  -> ids [B, S], lengths [B]"""
    length = min(tokens, config.sliding_window or tokens)
    lengths = torch.full((-(-tokens // length),), length)
    return torch.empty(len(lengths), length, dtype=torch.int64, device="meta"), lengths


class Meter(TorchDispatchMode):
    """Counts the bytes that a computation on the meta device would hold: in `held` now, and in `peak` at most.

    The routing is not known there. All rows count as if they reached hot experts, which is the most a pass can need.
    """

    def __init__(self, given: Iterable[Tensor], num_rows: int) -> None:
        """given: tensors that exist already; neither they nor their gradients are counted. num_rows: R of a layer."""
        super().__init__()
        self.held = self.peak = 0
        self.num_rows = num_rows
        self.known = WeakIdKeyDictionary()  # storages
        for tensor in given:
            self.known[tensor.untyped_storage()] = True
            if tensor.grad is not None:
                self.known[tensor.grad.untyped_storage()] = True

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_meta = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if operation is aten._local_scalar_dense.default and on_meta:  # where the hot experts' rows end
            return self.num_rows
        if operation is aten._to_copy.default and on_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.full_like(args[0], self.num_rows, device="cpu")  # where each group's rows end
        if operation is aten.nonzero.default and on_meta:  # which labels are targets: all
            result = args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        elif operation is aten._grouped_mm.default:  # in float32 torch does not say its shape
            x, W, offsets = args[:3]
            groups = (len(offsets),) if W.dim() == 2 else ()
            result = x.new_empty(*groups, x.shape[0], W.shape[-1])
        else:
            result = operation(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known[storage] = True
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self.release, storage.nbytes())

    def release(self, size: int) -> None:
        self.held -= size


# ----------------------------------------------------------------------------------------------------------- choice


def available(device: torch.device) -> int:
    """Bytes that this process may use: the GPU's free memory, or its share of the machine's."""
    if device.type == "cuda":
        gc.collect()  # FSDP's modules refer to each other: nothing else frees the model that was counted on
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except FileNotFoundError:  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([free, *left_by_control_groups()]) // processes_per_machine()


def left_by_control_groups(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that each limit of a container or a batch system leaves (version 2). Caches of files count as free."""
    left = []
    try:
        own = root / process.read_text().rpartition("0::/")[2].strip()
    except OSError:  # not Linux
        return left
    for folder in (own, *own.parents):
        with suppress(OSError, ValueError, KeyError):  # no such group, or "max": no limit
            limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left.append(max(0, limit - used + int(stat["inactive_file"])))
    return left


SHARD_HELP = "how processes hold the base (default: the first that fits)"
CHOSEN = {  # what is printed of a way to hold the base
    "none": "base replicated on {count} processes ({why}): only gradients are communicated",
    "hybrid": "base sharded over the {local} processes of each machine ({why}): only gradients leave a machine",
    "full": "base sharded over {count} processes ({why}): weights are communicated in every pass",
}


def choose_shard(asked: str | None, device: torch.device, num_processes: int, plan_of: Callable[..., Plan]) -> str:
    """How the base is held, "none", "hybrid" or "full": as asked, or the first of them that fits. Prints the reason.

    plan_of: `plan`, given all but num_processes and sharded. "hybrid" on one machine is "full", and with one process
    per machine "none". Raises InputError if it is asked for and the machines run different numbers of processes.
    """
    if num_processes == 1:
        return "none"
    local = processes_per_machine()
    limits = torch.tensor([available(device) * (1 - SPARE), local, -local], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(limits, dist.ReduceOp.MIN)  # all processes must decide alike
    free, least, most = limits.abs().long().tolist()
    if least != most and asked == "hybrid":
        raise InputError(f"--shard hybrid: the machines run {least} to {most} processes; start as many on each")
    hybrid = "full" if least != most else {num_processes: "full", 1: "none"}.get(local, "hybrid")
    needs, why = {}, f"as asked, --shard {asked}"
    if asked is None:
        needs["none"] = plan_of(num_processes=1, sharded=False).total
        if hybrid == "hybrid":
            needs["hybrid"] = plan_of(num_processes=local, sharded=True).total
        asked = next((way for way, need in needs.items() if need <= free), "full")
        need = f"{needs.get(asked, needs['none']) / 1e9:.1f} GB of {free / 1e9:.1f} GB per process"
        why = f"needs {need}" if asked in needs else f"replicated it would need {need}"
    chosen = hybrid if asked == "hybrid" else asked
    cli.say(CHOSEN[chosen].format(count=num_processes, local=local, why=why))
    return chosen


def config_of(model: str) -> MoEConfig:
    """The config of a model that is only counted: a preset of hub/config.py, or as `resolve` finds it."""
    if preset := PRESETS.get(HUB_IDS.get(model, model)):
        return MoEConfig.from_dict(preset)
    try:
        folder = resolve(model, ("config.json",))
    except InputError as error:
        raise InputError(f"{error}; without a checkpoint there are {', '.join(PRESETS)}") from None
    return read_config(folder)
