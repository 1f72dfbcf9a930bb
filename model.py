"""A compact mixture-of-experts transformer that reads and writes Hugging Face checkpoints.

    model = load_model("tiny")                     # a folder or a hub id, e.g. allenai/OLMoE-1B-7B-0924
    logits, selected_experts = model(input_ids)    # what it says, and which experts it asked

OLMoE, Mixtral, DeepSeekMoE and Qwen's models share this forward; they differ in config values and key names
(config.py). Attention knows which sequence a token is of, all else sees a flat list of real tokens: padding is never
routed, counted or multiplied by an expert. The E experts of a layer are stacked tensors, computed by one grouped matmul
per projection on rows sorted by expert; files hold the hub's per-expert keys (`hub_parts` maps one to the other).

Dimensions: B sequences, S positions, T real tokens (<= B * S), D hidden_size, F intermediate_size of an expert,
E experts a layer, K experts a token, R = T * K rows routed, L layers with experts, V vocabulary, Hq query heads,
Hk key and value heads, Dh head_dim, M key positions of a KV cache.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as compute_again

from attention import Attention, KVCache, Layout, RMSNorm, lay_out
from command.cli import InputError, is_main_process, say
from hub.checkpoint import (
    INDEX,
    SHARD_BYTES,
    read_config,
    read_rows,
    resolve,
    stored,
    unread_keys,
    write_checkpoint,
)
from hub.config import MoEConfig
from ops import HeadLoss, WeightedSwiGLU, grouped_linear

# --------------------------------------------------------------------------------------------------- forward


class Experts(nn.Module):
    """E SwiGLU MLPs as stacked tensors: down(silu(gate(x)) * up(x)).

    `expert_ids[i]` is the expert stored in row i, `rows` its inverse. They are the identity until
    `hellora.attach` moves the hot experts to the front: what these compute is then one contiguous prefix.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        E, D, F_ = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))  # gate's rows, then up's
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))
        # Never on the meta device, which the weights pass through: it is known without them.
        self.register_buffer("rows", torch.empty(E, dtype=torch.int64, device="cpu"), persistent=False)
        self.set_order(list(range(E)))

    def set_order(self, expert_ids: list[int]) -> None:
        """Say which expert each row of the stacks holds; moving the weights is the caller's job."""
        self.expert_ids = expert_ids
        self.rows.copy_(torch.tensor(expert_ids, device="cpu").argsort())

    def forward(self, x: Tensor, token: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """x [T, D] -> outputs [R, D] of the rows sorted by row of the stack, times their weights

        token [R] and routing weight [R, 1] of each row, offsets [E] where each expert's share of the rows ends.
        """
        gate_up = grouped_linear(x.index_select(0, token), self.gate_up_proj, offsets)  # [R, 2F]
        # down is linear, so the weight may scale its input: its output then need not be kept for backward.
        return grouped_linear(WeightedSwiGLU.apply(gate_up, weight), self.down_proj, offsets)


def route(router_logits: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """Softmax, then top-k.  router_logits [T, E] -> routing_weights [T, K], selected_experts [T, K]"""
    probs = router_logits.softmax(-1, dtype=torch.float32)  # bfloat16 probabilities would merge near-ties
    routing_weights, selected_experts = probs.topk(top_k, dim=-1)
    if norm_topk_prob:
        routing_weights = routing_weights / routing_weights.sum(-1, keepdim=True)
    return routing_weights.to(router_logits.dtype), selected_experts


def load_balancing_loss(router_logits: Tensor, top_k: int, form: str = "concat") -> Tensor:
    """E * sum_e f_e P_e: f_e the selections of expert e per token, P_e its mean probability.  [L, T, E] -> []

    "concat" is the hub's (and OLMoE's pre-training) form: tokens of all layers count together, so layers may cancel
    each other; its minimum is top_k. "layer" is the mean over layers of Switch's form (HELLoRA, eq. 1), f_e a share
    of the selections: its minimum is 1, and no layer can hide behind another.
    """
    L, _, E = router_logits.shape
    P = router_logits.softmax(-1, dtype=torch.float32)  # [L, T, E]
    f = torch.zeros_like(P).scatter(-1, P.topk(top_k, dim=-1).indices, 1.0)  # [L, T, E]
    if form == "concat":
        return E * (f.mean((0, 1)) * P.mean((0, 1))).sum()
    return E * (f.mean(1) * P.mean(1)).sum() / (L * top_k)


class MLP(nn.Module):
    """One SwiGLU MLP for all tokens: of DeepSeekMoE's first layers, or the shared expert.  [T, D] -> [T, D]"""

    def __init__(self, D: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, size, bias=False)
        self.up_proj = nn.Linear(D, size, bias=False)
        self.down_proj = nn.Linear(size, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseMoE(nn.Module):
    """A token's output is the weighted sum of its K experts' outputs, plus that of a shared expert if there is one."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)  # the router
        self.experts = Experts(config)
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_intermediate_size:
            self.shared_expert = MLP(config.hidden_size, config.shared_intermediate_size)
            if config.family.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> y [T, D], selected_experts [T, K], router_logits [T, E]"""
        T, E, K = len(x), len(self.experts.rows), self.top_k
        router_logits = self.gate(x)  # [T, E]
        routing_weights, selected_experts = route(router_logits, K, self.norm_topk_prob)  # [T, K]
        row = self.experts.rows[selected_experts].flatten()  # [R] where the chosen expert is stored
        row, order = row.sort(stable=True)  # [R] twice; order: sorted place -> token * K + slot
        offsets = torch.searchsorted(row, torch.arange(E, device=row.device), right=True, out_int32=True)  # [E]
        weight = routing_weights.flatten().index_select(0, order).unsqueeze(-1)  # [R, 1]
        out = self.experts(x, order // K, weight, offsets)  # [R, D]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=x.device))  # its inverse
        y = out.index_select(0, place).view(T, K, x.shape[-1]).sum(dim=1)  # [T, D]
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            y = y + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)
        return y, selected_experts, router_logits


class DecoderLayer(nn.Module):
    """Pre-norm attention and MoE (or one MLP), each added to the residual stream.

    activation_checkpointing: keep for backward only what came in, and compute the layer again when its turn comes.
    """

    activation_checkpointing = False

    def __init__(self, config: MoEConfig, layer: int) -> None:
        super().__init__()
        D, is_moe = config.hidden_size, layer in config.moe_layers
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.mlp = SparseMoE(config) if is_moe else MLP(D, config.dense_intermediate_size)

    def forward(self, x: Tensor, layout: Layout, layer: int, cache: KVCache | None) -> tuple[Tensor, ...]:
        """x [T, D] -> x [T, D], and of an MoE layer selected_experts [T, K] and router_logits [T, E]"""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return compute_again(self.compute, x, layout, layer, cache, use_reentrant=False, preserve_rng_state=False)
        return self.compute(x, layout, layer, cache)

    def compute(self, x: Tensor, layout: Layout, layer: int, cache: KVCache | None) -> tuple[Tensor, ...]:
        x = x + self.self_attn(self.input_layernorm(x), layout, layer, cache)  # [T, D]
        h = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MLP):
            return (x + self.mlp(h),)
        y, selected_experts, router_logits = self.mlp(h)
        return x + y, selected_experts, router_logits


class MoETransformer(nn.Module):
    """The whole decoder. Weights are uninitialised until `load_model` or `init_weights` fills them."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter = None  # the hellora.Adapter that is attached
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        output_router_logits: bool = False,
    ) -> tuple[Tensor, ...]:
        """input_ids [B, S] -> logits [B, S, V], selected_experts [L, B, S, K] (-1 at padding).

        lengths [B]: real tokens of each sequence, padding follows them; None: no padding.
        labels [B, S]: the token each position should predict, -100 for none. The first result is then the
        *sum* of the targets' negative log-likelihoods in nats; the LM head runs on those positions only.
        cache: the ids continue its sequences and are appended to it.
        last_only: logits [B, V] of each sequence's last real token.
        output_router_logits: a third result, router logits [L, T, E] of the real tokens.
        """
        B, S = input_ids.shape
        layout = lay_out(self.config, self.embed_tokens.weight, B, S, lengths, cache)
        ids = input_ids.flatten()
        x = self.embed_tokens(ids if layout.index is None else ids[layout.index])  # [T, D]
        chosen, router_logits = [], []
        for i, layer in enumerate(self.layers):
            x, *routed = layer(x, layout, i, cache)
            if routed:
                chosen.append(routed[0])
                router_logits.append(routed[1])
        if cache is not None:
            cache.lengths = cache.lengths + (S if lengths is None else lengths.cpu())
        selected_experts = torch.stack(chosen)  # [L, T, K]
        if layout.index is not None:
            padded = selected_experts.new_full((len(chosen), B * S, selected_experts.shape[-1]), -1)
            selected_experts = padded.index_copy(1, layout.index, selected_experts)
        result = self.head(x, layout, lengths, labels, last_only)
        outputs = (result, selected_experts.view(len(chosen), B, S, selected_experts.shape[-1]))
        return (*outputs, torch.stack(router_logits)) if output_router_logits else outputs

    def head(self, x: Tensor, layout: Layout, lengths: Tensor | None, labels: Tensor | None, last_only: bool) -> Tensor:
        """Final norm and LM head, only where their result is used.  x [T, D] -> see `forward`"""
        if labels is not None:
            labels = labels.flatten() if layout.index is None else labels.flatten()[layout.index]  # [T]
            wanted = (labels != -100).nonzero().flatten()  # [targets]
            return HeadLoss.apply(self.norm(x[wanted]), self.lm_head.weight, labels[wanted])
        if last_only:
            ends = torch.full((layout.B,), layout.S) if lengths is None else lengths.cpu()
            last = ends.cumsum(0) - 1  # the real tokens lie one sequence after the other
            return self.lm_head(self.norm(x[last.to(x.device)]))  # [B, V]
        logits = self.lm_head(self.norm(x))  # [T, V]
        if layout.index is not None:
            padded = logits.new_zeros(layout.B * layout.S, logits.shape[-1])
            logits = padded.index_copy(0, layout.index, logits)
        return logits.view(layout.B, layout.S, logits.shape[-1])


@torch.no_grad()
def init_weights(model: MoETransformer, std: float, seed: int = 0) -> None:
    """Fill every matrix with N(0, std^2), norms with ones and biases with zeros: a model to pre-train or to measure."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


# ----------------------------------------------------------------------------------------------- checkpoints


def base_parameters(model: MoETransformer) -> dict[str, nn.Parameter]:
    """The model's own parameters, without adapters; a tied lm_head is listed once, as the hub stores it."""
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" not in name}


def hub_parts(model: MoETransformer, name: str, rows: Tensor, first: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The hub's keys of one of our parameters, each with its part of `rows`: views, no copies.

    rows: the parameter's rows (of dimension 0) from number `first` on; a process that is one of many holds some.
    """
    family = model.config.family
    key = name if name.startswith("lm_head") else f"model.{name}"
    key = key.replace(".mlp.", f".{family.moe}.").replace(".shared_expert.", f".{family.shared_expert}.")
    if ".experts." not in key:
        yield key, rows
        return
    prefix, stack = key.rsplit(".", 1)
    expert_ids = model.get_submodule(name.rsplit(".", 1)[0]).expert_ids[first : first + len(rows)]
    gate, up, down = family.projections
    for e, weight in zip(expert_ids, rows, strict=True):
        if stack == "gate_up_proj":
            for projection, part in zip((gate, up), weight.chunk(2), strict=True):
                yield f"{prefix}.{e}.{projection}.weight", part
        else:
            yield f"{prefix}.{e}.{down}.weight", weight


def hub_views(model: MoETransformer) -> dict[str, Tensor]:
    """The hub's keys, each with the view of our parameters that holds it."""
    parameters = base_parameters(model).items()
    return {key: view for name, parameter in parameters for key, view in hub_parts(model, name, parameter.data)}


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, of which this process may hold some rows (a collective then)."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """What this process holds of a parameter, and the number of its first row; FSDP2 deals rows out evenly."""
    if not isinstance(parameter, DTensor):
        return parameter.data, 0
    a_process = -(-len(parameter) // parameter.device_mesh.size())
    return parameter.to_local().data, min(len(parameter), a_process * parameter.device_mesh.get_local_rank())


@torch.no_grad()
def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prepare: Callable[[MoETransformer], None] | None = None,
) -> MoETransformer:
    """Build the model of a checkpoint (folder, hub id or 'tiny') on the meta device and fill it, a tensor at a time.

    prepare(model) is called in between: what it shards is read by each process for its own rows alone, and what it
    adds (adapters) is left for the caller to fill. Raises InputError if the files do not fit config.json exactly.
    """
    folder = resolve(path)
    config = read_config(folder)
    if unread := unread_keys(config):
        say(f"{folder / 'config.json'}: nothing here reads {', '.join(unread)}; compare logits before you trust it")
    with torch.device("meta"):
        model = MoETransformer(config).to(dtype)
    weights = stored(folder, {key: tuple(view.shape) for key, view in hub_views(model).items()})
    if prepare is not None:
        prepare(model)
    materialize(model, device)
    destinations, rows = {}, {}
    for name, parameter in base_parameters(model).items():
        held, first = local_rows(parameter)
        for key, view in hub_parts(model, name, held, first):
            destinations[key] = view
            rows[key] = slice(None) if ".experts." in name else slice(first, first + len(held))
    for key, tensor in read_rows(weights, rows):
        destinations[key].copy_(tensor)
    return model.eval()


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give every parameter on the meta device memory, uninitialised, and move the rest; what was one stays one."""
    made = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta and parameter not in made:
                made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            setattr(module, name, made.get(parameter, parameter))
    model.to(device)


def save_model(
    model: MoETransformer, path: str | Path, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a checkpoint as transformers does: the hub's per-expert keys in safetensors of up to `shard_bytes`.

    Under FSDP every process must call it: one parameter after the other is gathered, and the main process writes.
    """
    folder, parameters = Path(path), base_parameters(model)
    if is_main_process() and (folder / INDEX).exists():  # its shards would stay beside ours
        raise InputError(f"{folder}: holds a sharded checkpoint; choose another folder")
    stored_dtype = dtype or model.lm_head.weight.dtype

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in parameters.items():
            for key, view in hub_parts(model, name, whole(parameter).detach()):
                yield key, view.to("cpu", stored_dtype, copy=True).contiguous()

    if not is_main_process():
        for _ in weights():
            pass
        return
    sizes = {}
    for name, parameter in parameters.items():
        for key, view in hub_parts(model, name, torch.empty(parameter.shape, device="meta")):
            sizes[key] = view.numel() * stored_dtype.itemsize
    hub = {key: value for key, value in model.config.hub.items() if key != "dtype"}
    hub["torch_dtype"] = str(stored_dtype).removeprefix("torch.")
    hub["rope_theta"] = model.config.rope_theta  # transformers 4 and vLLM do not read rope_parameters
    write_checkpoint(folder, sizes, weights(), hub, shard_bytes)
