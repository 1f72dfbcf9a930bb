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
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from command import cli
from command.cli import InputError
from hellora import SHARED, adapted_paths
from hub.checkpoint import resolve
from hub.config import HUB_IDS, PRESETS
from hub.weights import shard_dim
from lora import LoRAExperts, LoRALinear
from machine.processes import processes_per_machine
from model import MoEConfig, MoETransformer, read_config
from ops.head import HEAD_ROWS

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
    """What each of `num_processes` processes needs for micro-batches of `tokens` tokens. attach: as for `load_shared`.

    cached: positions of a KV cache, over all sequences. Parameters are counted on a model without weights; activations
    follow from the config.
    """
    with torch.device("meta"):
        model = MoETransformer(config).to(dtype)
    if attach is not None:
        attach(model)
    named, parts = dict(model.named_parameters()), num_processes if sharded else 1
    trained = [p for p in named.values() if trains and p.requires_grad]
    activations, transient = pass_bytes(model, dtype, tokens, trains, checkpointing)
    return Plan(
        weights=held([p for name, p in named.items() if "lora_" not in name], parts),
        adapters=held([p for name, p in named.items() if "lora_" in name], parts),
        gathered=gathered(model, num_processes) if sharded else 0,
        gradients=held(trained, parts) + (unreduced(model, trained) if sharded else 0),
        optimizer=2 * held(trained, parts),
        activations=activations + cached * position_bytes(config, dtype),
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


def unreduced(model: MoETransformer, trained: list[Tensor]) -> int:
    """Bytes of gradients that wait to be reduced: of all adapters until the last micro-batch, or of one full layer."""
    return held(trained) if model.adapter else largest_layer(model)


def largest_layer(model: MoETransformer) -> int:
    return max(held(layer.parameters()) for layer in model.layers)


# ------------------------------------------------------------------------------------------------------ activations


def pass_bytes(
    model: MoETransformer, dtype: torch.dtype, tokens: int, trains: bool, checkpointing: bool
) -> tuple[int, int]:
    """Bytes kept for the backward pass over all layers, and bytes allocated and freed on the way."""
    config, hidden = model.config, tokens * model.config.hidden_size * dtype.itemsize  # of one [T, D]
    head = min(tokens, HEAD_ROWS) * config.vocab_size * 4 * 2  # logits and log-probabilities, float32
    transient = tokens * transient_numbers(model, trains) * dtype.itemsize + norm_bytes(model, dtype)
    if not trains:
        return 0, max(transient + factor_copies(model, dtype) // config.num_hidden_layers, head)
    kept = kept_by_layers(model, dtype, tokens)
    if checkpointing:  # only the inputs of layers are kept; one layer at a time is computed again
        kept, transient = config.num_hidden_layers * hidden, kept // config.num_hidden_layers + transient
    ends = 2 * hidden  # inputs of the first layer and of the head
    if model.adapter is None:  # the head also keeps its weight's gradient, computed in the forward pass, and norm input
        ends += config.vocab_size * config.hidden_size * dtype.itemsize + hidden
    return kept + ends, max(transient, head)


def kept_by_layers(model: MoETransformer, dtype: torch.dtype, tokens: int) -> int:
    """Bytes that all layers keep for the backward pass, by the rules of autograd.

    For instance, a product keeps its input if its weight trains or the factor A beside it does. Every row is counted
    as if it reached a hot expert.
    """
    config, adapter = model.config, model.adapter
    D, F, K, E = config.hidden_size, config.intermediate_size, config.num_experts_per_tok, config.num_experts
    S, r = config.shared_intermediate_size, adapter.r if adapter else 0
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    paths = adapted_paths(config, adapter.targets if adapter else "shared")
    attends, shares = "self_attn.q_proj" in paths, SHARED[0] in paths  # attention, and shared experts, train

    normed = D + (q + kv if config.qk_norm else 0)  # inputs of the attention's norms
    attention = normed + 2 * q + 2 * kv  # queries, keys, values and the result of the attention itself
    experts = D + E * 4 // dtype.itemsize + K * 2 * F  # input of the norm, probabilities, gate and up
    experts += 3 * S + (D if config.shared_expert_gate else 0)  # gate, silu(gate), up; the gated output
    if adapter is None or adapter.kind != "lori":
        attention += D + q if attends else 0  # the input of q, k and v; that of o
        experts += D + (S if shares else 0)  # the input of router, gate and up; that of the shared expert's down
    if adapter is None:  # norms' weights train too, and the experts' inputs are not computed again
        attention += normed
        experts += D + K * (D + F)
    else:  # what A computes
        attention += 4 * r if attends else 0
        experts += 3 * K * r + (r if "mlp.gate" in paths else 0) + (3 * r if shares else 0)
    if adapter and uses_dropout(model):  # masks of a byte, and what the A's see of x, which was one tensor for several
        bytes_ = dtype.itemsize if adapter.kind != "lori" else 0
        masks = (3 * D + q if attends else 0, (D if "mlp.gate" in paths else 0) + (2 * D + S if shares else 0))
        copies = (2 * D if attends else 0, (D if "mlp.gate" in paths else 0) + (2 * D if shares else 0))
        attention, experts = (
            n + (mask + bytes_ * copy) / dtype.itemsize
            for n, mask, copy in zip((attention, experts), masks, copies, strict=True)
        )
        experts += 2 * K * 8 // dtype.itemsize  # what names the rows
    if adapter and adapter.kind == "dora":  # outputs before they are scaled; for experts also the scale of each row
        attention += q + 2 * kv + D if attends else 0
        experts += 2 * K * (2 * F + D) + (2 * S + D if shares else 0)
    indices = K * (4 * 8 + dtype.itemsize)  # the experts chosen, the rows' order and places, their weights
    L, dense = len(config.moe_layers), config.num_hidden_layers - len(config.moe_layers)
    numbers = L * (attention + experts) + dense * (attention + 2 * D + 3 * config.dense_intermediate_size)
    if not attends:  # nothing trains below the first experts
        numbers = L * (attention + experts) - attention
    return tokens * (numbers * dtype.itemsize + L * indices) + factor_copies(model, dtype)


def uses_dropout(model: MoETransformer) -> bool:
    return any(isinstance(module, LoRALinear | LoRAExperts) and module.dropout for module in model.modules())


def factor_copies(model: MoETransformer, dtype: torch.dtype) -> int:
    """Bytes of the factors as products take them: scaled, in `dtype`, those of gate and up side by side."""
    numbers = 0
    for name, p in model.named_parameters():
        stacked, is_A = ".experts." in name, name.endswith("lora_A")
        if is_A and (stacked or dtype != p.dtype) or name.endswith("lora_B"):
            numbers += p.numel() * (2 if stacked and not is_A and "down_proj" not in name else 1)  # block-diagonal
    return numbers * dtype.itemsize


def norm_bytes(model: MoETransformer, dtype: torch.dtype) -> int:
    """Bytes of the float32 copy of a projection's hot weights, of which DoRA takes the norm (`lora.row_norm`)."""
    if dtype == torch.float32 or model.adapter is None or model.adapter.kind != "dora":
        return 0
    config, experts = model.config, [m.num_hot for m in model.modules() if isinstance(m, LoRAExperts)]
    return max(experts, default=0) * config.hidden_size * config.intermediate_size * 4


def transient_numbers(model: MoETransformer, trains: bool) -> int:
    """Numbers per token that are allocated at once within a layer, beside what it keeps.

    The peak is in the backward pass of SwiGLU, or in the forward pass of down and its adapters. By then what the head
    kept is freed; what the shared expert keeps is not yet allocated, or freed.
    """
    config = model.config
    D, F, K = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    if not trains:  # while rows are gathered, in down or behind it; and the residual stream with its norms
        results = {None: 0, "dora": 2}.get(model.adapter and model.adapter.kind, 1)  # of the adapters, scaled or not
        return K * max((D if results else 0) + 2 * F * (1 + results), 3 * F + D * (1 + results), 2 * D) + 5 * D
    shared = 3 * config.shared_intermediate_size + (D if config.shared_expert_gate else 0)
    if model.adapter is None:
        return K * max(4 * F, 2 * D) - shared
    # Dropout: the rows, what A sees of them, a hash for four numbers and their mask, while gate and up are computed.
    dropping = 2 * F + 5 * D // 2 if uses_dropout(model) else 0
    return K * max(5 * F, F + 2 * D, dropping) - shared + D


def position_bytes(config: MoEConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one position, in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


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
