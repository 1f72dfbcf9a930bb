"""A compact mixture-of-experts transformer that reads and writes Hugging Face checkpoints.

    model = load_model("tiny")                     # a folder or a hub id, e.g. allenai/OLMoE-1B-7B-0924
    logits, selected_experts = model(input_ids)    # what it says, and which experts it asked

OLMoE and Mixtral share this forward; they differ in config values and key names (config.py). Attention sees
a padded batch, everything else a flat list of real tokens: padding is never routed, counted or multiplied by
an expert. The E experts of a layer are stacked tensors, computed by one grouped matmul per projection on rows
sorted by expert; files hold the hub's per-expert keys (`hub_views` maps one to the other, both ways).

Dimensions: B sequences, S positions, T real tokens (<= B * S), D hidden_size, F intermediate_size of an
expert, E experts a layer, K experts a token, R = T * K rows routed, L layers, V vocabulary, Hq query heads,
Hk key and value heads, Dh head_dim, M key positions of a KV cache.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cli import InputError
from config import MoEConfig

TINY = Path(__file__).parent / "tiny"  # the embedded model: `--model tiny`


# --------------------------------------------------------------------------------------------------- forward


@dataclass
class Layout:
    """Where the T real tokens of a right-padded [B, S] batch sit, and what each may attend to."""

    B: int
    S: int
    index: Tensor | None  # [T] places b * S + s of the real tokens; None: no padding, T = B * S
    positions: Tensor  # [T] place of each token in its sequence, counted from 0
    cos: Tensor  # [T, 1, Dh]
    sin: Tensor  # [T, 1, Dh]
    mask: Tensor | None  # [B or 1, 1, S, M] bool, True = visible; None: plain causal attention

    def pad(self, x: Tensor) -> Tensor:
        """[T, H, Dh] -> [B, H, S, Dh], zeros at padding."""
        if self.index is not None:
            x = x.new_zeros(self.B * self.S, *x.shape[1:]).index_copy(0, self.index, x)  # [B * S, H, Dh]
        return x.view(self.B, self.S, *x.shape[1:]).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, H, S, Dh] -> [T, H * Dh]"""
        x = x.transpose(1, 2).flatten(2).flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index)


class KVCache:
    """Keys and values of B growing sequences: `model(new_ids, lengths, cache=cache)` appends to it."""

    def __init__(self, config: MoEConfig, batch: int, capacity: int, *, dtype: torch.dtype, device) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [L, B, Hk, M, Dh]
        self.values = torch.zeros(shape, dtype=dtype, device=device)  # [L, B, Hk, M, Dh]
        self.lengths = torch.zeros(batch, dtype=torch.int64)  # [B] positions filled, on the host

    def append(self, layer: int, layout: Layout, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [T, Hk, Dh] at their positions; return this layer's keys and values [B, Hk, M', Dh]."""
        row = torch.arange(layout.B, device=k.device).repeat_interleave(layout.S)  # [B * S]
        row = row if layout.index is None else row[layout.index]  # [T]
        self.keys[layer, row, :, layout.positions] = k
        self.values[layer, row, :, layout.positions] = v
        visible = layout.S if layout.mask is None else layout.mask.shape[-1]
        return self.keys[layer, :, :, :visible], self.values[layer, :, :, :visible]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, normalised in float32 and cast back before the weight, as the hub's models do."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split form: pairs are (i, i + Dh / 2).  [T, H, Dh] -> [T, H, Dh]"""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; OLMoE also normalises (and may clip) q and k."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        D, Dh = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_attention_heads * Dh, config.num_key_value_heads * Dh
        self.q_proj = nn.Linear(D, q_size, bias=False)
        self.k_proj = nn.Linear(D, kv_size, bias=False)
        self.v_proj = nn.Linear(D, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, D, bias=False)
        if config.family.qk_norm:
            self.q_norm = RMSNorm(q_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(kv_size, config.rms_norm_eps)
        self.qk_norm, self.clip, self.head_dim = config.family.qk_norm, config.clip_qkv, Dh

    def forward(self, x: Tensor, layout: Layout, layer: int, cache: KVCache | None) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [T, Hq * Dh], [T, Hk * Dh] twice
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # [T, H, Dh]
        q, k = rotate(q, layout.cos, layout.sin), rotate(k, layout.cos, layout.sin)
        q = layout.pad(q)  # [B, Hq, S, Dh]
        k, v = cache.append(layer, layout, k, v) if cache else (layout.pad(k), layout.pad(v))  # [B, Hk, M, Dh]
        # Right padding comes after every real token, so plain causal attention never sees it.
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=layout.mask, is_causal=layout.mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(layout.unpad(out))


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """W_g x for rows sorted by group.  x [R, in], weight [G, out, in], offsets int32 [G] ends -> [R, out]"""
    if all(size * x.element_size() % 16 == 0 for size in weight.shape[1:]) and x.dtype != torch.float64:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    # Row strides that are no multiple of 16 bytes (small ranks) and float64: grouped_mm refuses them.
    # Empty groups take part too, so that their gradient is zero, not None.
    counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    return torch.cat([F.linear(x_g, w_g) for x_g, w_g in zip(x.split(counts), weight, strict=True)])


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
        self.register_buffer("rows", torch.empty(E, dtype=torch.int64), persistent=False)
        self.set_order(list(range(E)))

    def set_order(self, expert_ids: list[int]) -> None:
        """Say which expert each row of the stacks holds; moving the weights is the caller's job."""
        self.expert_ids = expert_ids
        self.rows.copy_(torch.tensor(expert_ids).argsort())

    def gate_up(self, x: Tensor, offsets: Tensor) -> Tensor:
        return grouped_linear(x, self.gate_up_proj, offsets)  # [R, 2F]

    def down(self, x: Tensor, offsets: Tensor) -> Tensor:
        return grouped_linear(x, self.down_proj, offsets)  # [R, D]

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [R, D] sorted by row of the stack, offsets [E] where each row's share ends -> [R, D]"""
        gate, up = self.gate_up(x, offsets).chunk(2, dim=-1)  # [R, F] twice
        return self.down(F.silu(gate) * up, offsets)


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


class SparseMoE(nn.Module):
    """A token's output is the weighted sum of its K experts' outputs."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)  # the router
        self.experts = Experts(config)
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> y [T, D], selected_experts [T, K], router_logits [T, E]"""
        T, E, K = len(x), len(self.experts.rows), self.top_k
        router_logits = self.gate(x)  # [T, E]
        routing_weights, selected_experts = route(router_logits, K, self.norm_topk_prob)  # [T, K]
        row = self.experts.rows[selected_experts].flatten()  # [R] where the chosen expert is stored
        row, order = row.sort(stable=True)  # [R] twice; order: sorted place -> token * K + slot
        offsets = torch.searchsorted(row, torch.arange(E, device=row.device), right=True, out_int32=True)  # [E]
        out = self.experts(x.index_select(0, order // K), offsets)  # [R, D]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=x.device))  # its inverse
        out = out.index_select(0, place).view(T, K, x.shape[-1]) * routing_weights.unsqueeze(-1)  # [T, K, D]
        return out.sum(dim=1), selected_experts, router_logits


class DecoderLayer(nn.Module):
    """Pre-norm attention and MoE, each added to the residual stream."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMoE(config)

    def forward(self, x: Tensor, layout: Layout, layer: int, cache: KVCache | None) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), layout, layer, cache)  # [T, D]
        y, selected_experts, router_logits = self.mlp(self.post_attention_layernorm(x))
        return x + y, selected_experts, router_logits


class MoETransformer(nn.Module):
    """The whole decoder. Weights are uninitialised until `load_model` or `init_weights` fills them."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def layout(self, B: int, S: int, lengths: Tensor | None, cache: KVCache | None) -> Layout:
        """Everything about a batch's geometry that all layers share, computed once."""
        device, dtype = self.embed_tokens.weight.device, self.embed_tokens.weight.dtype
        past = torch.zeros(B, dtype=torch.int64) if cache is None else cache.lengths
        positions = (past[:, None] + torch.arange(S)).to(device, non_blocking=True)  # [B, S]
        index = mask = None
        if lengths is not None and bool((lengths < S).any()):
            real = torch.arange(S) < lengths[:, None].cpu()  # [B, S], on the host: no wait for the device
            index = real.flatten().nonzero().flatten().to(device, non_blocking=True)  # [T]
        window = self.config.sliding_window or math.inf
        if past.any() or window < S:
            filled = past + (S if lengths is None else lengths.cpu())  # [B]
            keys = torch.arange(S if cache is None else int(filled.max()), device=device)  # [M]
            ago = (positions if past.any() else positions[:1])[:, None, :, None] - keys  # [B or 1, 1, S, M]
            mask = (ago >= 0) & (ago < window)
        flat = positions.flatten() if index is None else positions.flatten()[index]  # [T]
        exponent = torch.arange(0, self.config.head_dim, 2, device=device).float() / self.config.head_dim
        angle = flat[:, None].float() * (1.0 / self.config.rope_theta**exponent)  # [T, Dh / 2], rounded as the hub does
        angle = torch.cat((angle, angle), dim=-1)[:, None]  # [T, 1, Dh]
        return Layout(B, S, index, flat, angle.cos().to(dtype), angle.sin().to(dtype), mask)

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
        layout = self.layout(B, S, lengths, cache)
        ids = input_ids.flatten()
        x = self.embed_tokens(ids if layout.index is None else ids[layout.index])  # [T, D]
        chosen, router_logits = [], []
        for i, layer in enumerate(self.layers):
            x, selected, logits = layer(x, layout, i, cache)
            chosen.append(selected)
            router_logits.append(logits)
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
            logits = self.lm_head(self.norm(x[wanted]))  # [targets, V]
            return F.cross_entropy(logits.float(), labels[wanted], reduction="sum")
        if last_only:
            ends = torch.full((layout.B,), layout.S) if lengths is None else lengths.cpu()
            last = ends.cumsum(0) - 1  # the real tokens lie one sequence after the other
            return self.lm_head(self.norm(x[last.to(x.device)]))  # [B, V]
        logits = self.lm_head(self.norm(x))  # [T, V]
        if layout.index is not None:
            padded = logits.new_zeros(layout.B * layout.S, logits.shape[-1])
            logits = padded.index_copy(0, layout.index, logits)
        return logits.view(layout.B, layout.S, logits.shape[-1])


def init_weights(model: MoETransformer, std: float, seed: int = 0) -> None:
    """Fill every matrix with N(0, std^2) and every norm with ones: a model to pre-train or to measure."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


# ----------------------------------------------------------------------------------------------- checkpoints


def hub_views(model: MoETransformer) -> dict[str, Tensor]:
    """The hub's keys, each with the view of our parameters that holds it: one map for loading and saving."""
    family, views = model.config.family, {}
    for name, parameter in model.named_parameters():  # a tied lm_head is listed once, as the hub stores it
        if "lora_" in name:
            continue
        key = name if name.startswith("lm_head") else f"model.{name}"
        key = key.replace(".mlp.", f".{family.moe}.")
        if ".experts." not in key:
            views[key] = parameter.data
            continue
        prefix, stack = key.rsplit(".", 1)
        expert_ids = model.get_submodule(name.rsplit(".", 1)[0]).expert_ids
        gate, up, down = family.projections
        for e, weight in zip(expert_ids, parameter.data, strict=True):
            if stack == "gate_up_proj":
                views[f"{prefix}.{e}.{gate}.weight"], views[f"{prefix}.{e}.{up}.weight"] = weight.chunk(2)
            else:
                views[f"{prefix}.{e}.{down}.weight"] = weight
    return views


def resolve(path: str | Path) -> Path:
    """The folder of a checkpoint: 'tiny', a local folder, or a hub id (downloaded once, then cached)."""
    if str(path) == "tiny":
        return TINY
    if Path(path).exists():
        if not (Path(path) / "config.json").is_file():
            raise InputError(f"model {str(path)!r}: it has no config.json; want a Hugging Face checkpoint folder")
        return Path(path)
    beside = ["tokenizer*", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"]
    wanted = ["config.json", "model*.safetensors", "*.safetensors.index.json", *beside]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model {str(path)!r} is not 'tiny', not a local folder, and the hub did not give it ({reason})"
        ) from None


def read_config(folder: Path) -> MoEConfig:
    """config.json of a checkpoint folder as a MoEConfig."""
    file = folder / "config.json"
    try:
        hub = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(hub, dict):
        raise InputError(f"{file}: want a JSON object, not {type(hub).__name__}; is it a config.json of the hub?")
    return MoEConfig.from_dict(hub)


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or the only one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{index}: not a safetensors index; download it again") from None
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder}: {name} is missing; the checkpoint is incomplete, download it again")
    return [folder / name for name in names]


@torch.no_grad()
def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> MoETransformer:
    """Build the model of a checkpoint (folder, hub id or 'tiny') and fill it, one tensor at a time.

    Raises InputError for a missing file and for any missing, unexpected or mis-shaped key.
    """
    folder = resolve(path)
    files = checkpoint_files(folder)
    with torch.device("meta"):
        model = MoETransformer(read_config(folder))
    missing, unexpected = hub_views(model), []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dict
                    shape = tuple(tensors.get_slice(key).get_shape())
                    view = missing.pop(key, None)
                    if view is None:
                        unexpected.append(key)
                    elif tuple(view.shape) != shape:
                        raise InputError(f"{file}: {key} has shape {shape}, config.json wants {tuple(view.shape)}")
        except SafetensorError as error:
            raise InputError(f"{file}: not a whole safetensors file ({error}); download it again") from None
    if missing or unexpected:
        raise InputError(
            f"{folder}: {len(missing)} missing keys {list(missing)[:5]}, "
            f"{len(unexpected)} unexpected keys {unexpected[:5]}; is config.json of this checkpoint?"
        )
    model = model.to(dtype).to_empty(device=device)
    for module in model.modules():
        if isinstance(module, Experts):
            module.set_order(module.expert_ids)  # to_empty left the buffer as it fell
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # to_empty made two of one
    views = hub_views(model)
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                views[key].copy_(tensors.get_tensor(key))
    return model.eval()


def save_model(model: MoETransformer, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors under the hub's per-expert keys (what transformers loads)."""
    folder = Path(path)
    if (folder / "model.safetensors.index.json").exists():  # readers would take its shards, not our file
        raise InputError(f"{folder}: holds a sharded checkpoint; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: view.to(dtype or view.dtype).contiguous().cpu() for key, view in hub_views(model).items()}
    stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    hub = {key: value for key, value in model.config.hub.items() if key != "dtype"} | {"torch_dtype": stored}
    hub["rope_theta"] = model.config.rope_theta  # transformers 4 and vLLM do not read rope_parameters
    (folder / "config.json").write_text(json.dumps(hub, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
