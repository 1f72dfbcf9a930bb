"""How many multiplications and additions the frozen model and the adapters take in one training step."""

import torch

from data import Batch
from lora import LoRAExperts, LoRALinear
from model import MoEConfig, MoETransformer
from neighbours.dora import DoRALinear, StackedDoRA


def model_flops(config: MoEConfig, batch: Batch, *, to_embeddings: bool = False) -> int:
    """Multiplications and additions of the frozen model in one step: forward, and backward to whatever may train.

    to_embeddings: whether the first layer's input needs a gradient. With adapters alone nothing below it trains.

    A product with a weight takes 2 in the forward pass and 2 in the backward pass per token and entry of the weight.
    Causal attention multiplies half of the pairs of positions, with two products forward and four backward.
    """
    D, Dh, S = config.hidden_size, config.head_dim, config.shared_intermediate_size
    q, kv, dense = config.num_attention_heads * Dh, config.num_key_value_heads * Dh, config.num_dense_layers
    experts = 3 * D * (config.num_experts_per_tok * config.intermediate_size + S) + D * config.num_experts
    per_token = config.num_hidden_layers * D * (2 * q + 2 * kv) + len(config.moe_layers) * experts
    per_token += dense * 3 * D * config.dense_intermediate_size
    pairs = int(batch.lengths.square().sum()) // 2
    targets = int((batch.labels != -100).sum())
    products = int(batch.lengths.sum()) * per_token + targets * D * config.vocab_size
    unneeded = 0 if to_embeddings else 2 * int(batch.lengths.sum()) * D * (q + 2 * kv)
    return 4 * products - unneeded + 12 * config.num_hidden_layers * q * pairs


@torch.no_grad()
def adapter_flops(model: MoETransformer, batch: Batch) -> int:
    """Multiplications and additions of our adapters in one step on this batch.

    A row through a pair costs 2 r (in + out) in the forward pass, as much for the gradients of its inputs, and as much
    for those of A and B (of B alone if A is frozen). DoRA also computes the norms of W + BA once per step.
    """
    _, selected = model(batch.input_ids, batch.lengths, labels=torch.full_like(batch.labels, -100))
    flops, tokens = 0, int(batch.lengths.sum())
    for layer, chosen in zip(model.layers, selected, strict=True):
        for module in layer.modules():
            if isinstance(module, LoRALinear):
                flops += pair_flops(module, tokens)
            elif isinstance(module, LoRAExperts):
                hot = torch.tensor(module.expert_ids[: module.num_hot], device=chosen.device)
                rows = int(torch.isin(chosen, hot).sum())
                flops += sum(pair_flops(pair, rows) for pair in module.lora.values())
    return flops


def pair_flops(pair: torch.nn.Module, rows: int) -> int:
    """The same for one LoRA pair and the rows that pass through it."""
    *stack, r, fan_in = pair.lora_A.shape
    fan_out, n = pair.lora_B.shape[-2], stack[0] if stack else 1
    norms = 2 * n * r * fan_in * fan_out if isinstance(pair, DoRALinear | StackedDoRA) else 0
    return 2 * rows * r * ((2 + pair.lora_A.requires_grad) * fan_in + 3 * fan_out) + norms


def peft_flops(model: torch.nn.Module, batch: Batch) -> int:
    """The same for peft's adapters, which compute on padding too, and form B A of every expert, used or not."""
    rows, flops = int(batch.input_ids.numel()), 0
    for name, A in model.named_parameters():
        if "lora_A" in name:  # [r, in], B is [out, r]; of a stack of experts [r * E, in] and [out, r * E]
            B = model.get_parameter(name.replace("lora_A", "lora_B"))
            flops += 6 * (A.numel() * B.shape[0] if ".experts." in name else rows * (A.numel() + B.numel()))
    return flops
