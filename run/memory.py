"""What a run needs of memory, before it starts: so that a process holds the base whole where that fits.

    plan(config, attach, dtype=torch.bfloat16, world=2, sharded=True, tokens=2048)     # bytes a process, by term

Whole (`--shard none`) only the gradients of the adapters travel between processes; sharded (`--shard full`, FSDP2)
every weight of every layer travels in every forward and backward pass.

Dimensions: T tokens of a micro-batch, K experts a token, D hidden_size, F intermediate_size of an expert, V vocabulary,
Hq and Hk query and key heads, Dh head_dim.
"""

import gc
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from command import cli
from hellora import Adapter
from hub.config import MoEConfig
from model import MoETransformer
from ops import HEAD_ROWS

SPARE = 0.1  # of a device, left to the allocator and to what is not in the plan


class Plan(NamedTuple):
    """Bytes on one process."""

    weights: int  # of the base, or this process's rows of them
    adapters: int  # factors, trained and frozen, float32
    gathered: int  # sharded: the root, the layer at work twice (received and unpacked), the next as received
    gradients: int
    optimizer: int  # AdamW's two moments
    activations: int  # kept for the backward pass, over all layers
    transient: int  # of the layer at work, or of the head

    @property
    def total(self) -> int:
        return sum(self)


def plan(
    config: MoEConfig,
    attach: Callable[[MoETransformer], None] | None,
    *,
    dtype: torch.dtype,
    world: int,
    sharded: bool,
    tokens: int,
    trains: bool = True,
    checkpointing: bool = False,
) -> Plan:
    """What each of `world` processes needs for micro-batches of `tokens` tokens. attach: as for `load_shared`.

    Counted on the meta device for all that parameters need; activations by `layer_activations`.
    """
    with torch.device("meta"):
        model = MoETransformer(config).to(dtype)
    if attach is not None:
        attach(model)
    parameters = {name: p for name, p in model.named_parameters()}

    def size(keep: Callable[[str, torch.Tensor], bool], processes: int = 1) -> int:
        """Bytes of the parameters kept; of many processes the first holds most of each, in whole rows."""
        rows = {name: -(-len(p) // processes) for name, p in parameters.items() if keep(name, p)}
        return sum(n * parameters[name].nbytes // len(parameters[name]) for name, n in rows.items())

    share = world if sharded else 1
    trains_here = size(lambda name, p: trains and p.requires_grad, share)
    trained = size(lambda name, p: trains and p.requires_grad)
    factors = size(lambda name, p: "lora_" in name)
    root = size(lambda name, p: not name.startswith("layers."))
    L = config.num_hidden_layers
    # The largest layer; and as it travels, in equal parts, whatever of them is padding.
    layer = max(size(lambda name, p, i=i: name.startswith(f"layers.{i}.")) for i in range(L))
    parcel = max(world * size(lambda name, p, i=i: name.startswith(f"layers.{i}."), world) for i in range(L))
    kept, passing = layer_activations(config, model.adapter, factors // L, tokens, dtype, trains)
    if checkpointing:
        kept, passing = tokens * config.hidden_size * dtype.itemsize, kept + passing
    entering = 2 * tokens * config.hidden_size * dtype.itemsize  # the first layer, and the head
    if model.adapter is None:  # the head keeps its weight's gradient, made on the way forward, and its norm's input
        entering += (config.vocab_size + tokens) * config.hidden_size * dtype.itemsize
    head = min(tokens, HEAD_ROWS) * config.vocab_size * 4 * 2  # logits and log-probabilities, float32
    return Plan(
        weights=size(lambda name, p: "lora_" not in name, share),
        adapters=size(lambda name, p: "lora_" in name, share),
        gathered=root + layer + 2 * parcel if sharded else 0,
        # Those of adapters are added up whole over the micro-batches; full fine-tuning reduces them in each.
        gradients=trains_here + ((trained if model.adapter else layer) if sharded else 0),
        optimizer=2 * trains_here,
        activations=L * kept + (entering if trains else 0),
        transient=max(passing, head),
    )


def layer_activations(
    config: MoEConfig, adapter: Adapter | None, factor_bytes: int, tokens: int, dtype: torch.dtype, trains: bool
) -> tuple[int, int]:
    """Bytes that a layer keeps for its backward pass, and bytes that come and go within it.

    adapter: None if every weight trains. factor_bytes: of the layer's factors in float32.
    """
    D, F, K = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    normed = D + q + kv if config.family.qk_norm else D  # what goes into a norm; the product's input is made again
    attention = normed + 2 * q + 2 * kv  # queries, keys, values and result of the attention itself
    shared = 3 * config.shared_intermediate_size + (D if config.family.shared_expert_gate else 0)
    experts = 2 * D + config.num_experts + K * 2 * F + shared
    factors = 0
    if adapter is None:  # the inputs of norms' weights and of all products
        attention += normed + D + q
        experts += 2 * D + K * (D + F)
    else:  # a copy of the factors, side by side, and what A makes of the inputs
        factors = 1.2 * factor_bytes * dtype.itemsize / 4
        attention += 4 * adapter.r
        experts += (3 * K + 1) * adapter.r
        if adapter.kind == "dora":  # what is scaled, and what the scale multiplies
            attention += q + 2 * kv + D
            experts += 2 * K * (2 * F + D)
    indices = K * (4 * 8 + dtype.itemsize)  # the experts chosen, the rows' order and places, their weights
    kept = tokens * ((attention + experts) * dtype.itemsize + indices) + int(factors)
    if not trains:
        return 0, tokens * (K * max(5 * F, F + 2 * D) + D) * dtype.itemsize
    # At its largest in SwiGLU's backward, or on the way forward through down and its pairs. By then what the head kept
    # is gone, and what the shared expert keeps is not there yet, or gone.
    if adapter is None:
        passing = K * max(4 * F, 2 * D) - shared
    else:
        passing = K * max(5 * F, F + 2 * D) - shared + D
    return kept, tokens * passing * dtype.itemsize


def available(device: torch.device) -> int:
    """Bytes that this process may use: the GPU's, or its share of the memory that the machine has left."""
    if device.type == "cuda":
        gc.collect()  # modules under FSDP refer to each other: nothing else frees what the counting left behind
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            left = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except FileNotFoundError:  # not Linux
        left = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return left // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_shard(asked: str | None, device: torch.device, world: int, whole: Plan) -> bool:
    """Whether to shard: as asked, or if the plan of a process that holds the base `whole` does not fit. Says why."""
    if world == 1:
        return False
    room = torch.tensor(available(device) * (1 - SPARE), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(room, dist.ReduceOp.MIN)  # the processes must agree
    room = int(room)
    need, room_gb = f"{whole.total / 1e9:.1f} GB", f"{room / 1e9:.1f} GB"
    sharded = whole.total > room if asked is None else asked == "full"
    if sharded:
        why = "as asked" if asked else f"the base whole would need {need} a process, of {room_gb}"
        cli.say(f"sharded over {world} processes ({why}): weights travel in every pass")
    else:
        why = "as asked" if asked else f"{need} of {room_gb}"
        cli.say(f"every process holds the base whole ({why}): only gradients travel")
    return sharded
