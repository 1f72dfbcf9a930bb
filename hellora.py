"""HELLoRA: LoRA on the experts a task really uses, and on nothing colder.

    hot = select_experts("hot", counts, num_hot=8)      # the 8 most-routed experts of every layer: bool [L, E]
    attach(model, hot, r=32, alpha=64)                  # freeze the model; LoRA on them, attention and router
    ...                                                 # train whatever still requires a gradient
    save_adapter(model, "run/adapter")                  # or merge(model): the adapter becomes part of the weights

An adapted matrix computes y = W x + (alpha / r) B A x with W frozen (LoRA, section 4.1; HELLoRA, eq. 3). The paper
writes x W + x A B, with A [in, r]; as in every checkpoint ours are the transposes: lora_A [r, in], lora_B [out, r].
The factors of a layer's hot experts are stacked. `attach` moves these experts to the front of the stacks, so the
rows they compute are a contiguous prefix of the sorted rows, cold experts cost nothing, and W + BA is never formed.

Dimensions: L layers, E experts a layer, n hot experts of one layer, r rank, D hidden_size, F intermediate_size of
an expert, T tokens, R rows routed, S rows of them that reach a hot expert.
"""

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from cli import InputError
from model import Experts, MoETransformer, grouped_linear

TARGETS = {  # what gets an adapter beside the chosen experts; `all` is the paper's recommendation (§4.5.2)
    "all": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate"),
    "gate": ("mlp.gate",),
    "pure": (),
}


# ----------------------------------------------------------------------------------- selection: counts to mask


def hot_first(scores: Tensor) -> Tensor:
    """Expert ids by falling score, ties to the lower id.  [..., E] -> [..., E]"""
    return scores.argsort(dim=-1, descending=True, stable=True)


def hottest(counts: Tensor, num_hot: int) -> Tensor:
    """The `num_hot` most-routed experts of every layer: HELLoRA (§3); MoE-Sieve with a quarter of E."""
    return _mask(counts, hot_first(counts)[:, :num_hot])


def hottest_of_model(counts: Tensor, num_hot: int) -> Tensor:
    """One set for all layers: the ids with the largest counts summed over layers (ablation HELLoRA_M, §4.5.1)."""
    return _mask(counts, hot_first(counts.sum(0))[:num_hot].expand(len(counts), -1))


def coldest(counts: Tensor, num_hot: int) -> Tensor:
    """The `num_hot` least-routed experts of every layer (ablation HELLoRA_C, §4.5.1)."""
    return _mask(counts, counts.argsort(dim=-1, stable=True)[:, :num_hot])


def any_experts(counts: Tensor, num_hot: int, seed: int) -> Tensor:
    """`num_hot` experts of every layer, blind to use: the control that the paper lacks and MoE-Sieve has."""
    noise = torch.from_numpy(uniform(seed, "select_experts", counts.numel())).view(counts.shape)
    return hottest(noise, num_hot)


def covering(counts: Tensor, coverage: float) -> Tensor:
    """Per layer the smallest set whose share of the counts reaches `coverage` (ESFT, §3; MoE-Sieve ablation)."""
    share = counts.double() / counts.double().sum(-1, keepdim=True)
    order = hot_first(share)
    before = share.gather(-1, order).cumsum(-1) - share.gather(-1, order)  # share of the hotter experts
    return torch.zeros_like(counts, dtype=torch.bool).scatter(-1, order, before < coverage - 1e-12)


def greedy(counts: Tensor, num_hot: int) -> Tensor:
    """`num_hot` experts a layer on average, spent where they cover the largest shares (MoE-Sieve ablation)."""
    share = counts.double() / counts.double().sum(-1, keepdim=True)
    chosen = hot_first(share.flatten())[: num_hot * len(counts)]
    return torch.zeros(counts.numel(), dtype=torch.bool).scatter(0, chosen, True).view(counts.shape)


def _mask(counts: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros_like(counts, dtype=torch.bool).scatter(-1, ids, True)


POLICIES = ("hot", "model-hot", "cold", "random", "all", "coverage", "greedy")


def select_experts(
    policy: str, counts: Tensor, num_hot: int | None, *, coverage: float | None = None, seed: int = 0
) -> Tensor:
    """Which experts get an adapter.  counts [L, E] (or float scores) -> hot [L, E] bool

    num_hot: experts per layer, the paper's k; None for `all` and `coverage`. coverage: in (0, 1], for `coverage`.
    Raises InputError for an unknown policy, a num_hot or coverage out of range, and counts that are no counts.
    """
    if policy not in POLICIES:
        raise InputError(f"policy {policy!r} is unknown; choose from {', '.join(POLICIES)}")
    E = counts.shape[-1]
    if not bool(torch.isfinite(counts.double()).all()) or bool((counts < 0).any()):
        raise InputError("counts hold a negative or non-finite number; profile again")
    if policy == "all":
        return torch.ones_like(counts, dtype=torch.bool)
    if bool((counts.sum(-1) == 0).any()):
        raise InputError("counts of a layer are all zero: no token was routed; profile on more text")
    if policy == "coverage":
        if coverage is None or not 0 < coverage <= 1:
            raise InputError(f"coverage is {coverage}; want a share above 0 and at most 1")
        return covering(counts, coverage)
    if num_hot is None or not 1 <= num_hot <= E:
        raise InputError(f"k is {num_hot}; want 1..{E}, the experts of a layer")
    if policy == "random":
        return any_experts(counts, num_hot, seed)
    return {"hot": hottest, "model-hot": hottest_of_model, "cold": coldest, "greedy": greedy}[policy](counts, num_hot)


# --------------------------------------------------------------------------------------------------- adapters


def uniform(seed: int, name: str, size: int) -> np.ndarray:
    """`size` float32 numbers u in [0, 1) that depend on (seed, name) alone, not on device or library version.

    u = (w >> 40) / 2^24 for the 64-bit words w of numpy's PCG64 seeded with SeedSequence([seed, crc32(name)]): raw
    bits are the one thing numpy promises to keep; torch's generators promise nothing.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])).random_raw(size)
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def init_A(A: Tensor, seed: int, name: str) -> None:
    """Fill lora_A [r, in] of one matrix, uniform in +-1 / sqrt(in): Kaiming with a = sqrt(5), as PEFT and LoRI."""
    if not A.is_meta:  # a model that is only counted
        u = torch.from_numpy(uniform(seed, name, A.numel())).view(A.shape)
        A.copy_((2 * u - 1) / math.sqrt(A.shape[1]))


class LoRALinear(nn.Linear):
    """y = W x + (alpha / r) B A x, W frozen.  [..., in] -> [..., out]"""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        # float32 whatever the base: thousands of small updates would be lost in bfloat16
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))  # step 0 is the base model
        self.scaling = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A.to(x.dtype))  # [..., r]
        return super().forward(x) + self.scaling * F.linear(low, self.lora_B.to(x.dtype))

    def delta(self) -> Tensor:
        """(alpha / r) B A, for merging.  [out, in]"""
        return self.scaling * self.lora_B @ self.lora_A


class StackedLoRA(nn.Module):
    """(alpha / r) B_e A_e x for the n hot experts of one projection.  x [S, in], offsets [n] -> [S, out]"""

    def __init__(self, n: int, fan_in: int, fan_out: int, r: int, alpha: float, device: torch.device) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(n, r, fan_in, device=device))
        self.lora_B = nn.Parameter(torch.zeros(n, fan_out, r, device=device))
        self.scaling = alpha / r

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        low = grouped_linear(x, self.lora_A.to(x.dtype), offsets)  # [S, r]
        return self.scaling * grouped_linear(low, self.lora_B.to(x.dtype), offsets)

    def delta(self) -> Tensor:
        """(alpha / r) B_e A_e of every hot expert, for merging.  [n, out, in]"""
        return self.scaling * self.lora_B @ self.lora_A


class LoRAExperts(Experts):
    """Experts whose first n rows of the stack are hot and adapted.

    The adapters take part in every step, even when no token reaches a hot expert: their gradient is then zero, not
    None. FSDP2 reduces only parameters that have a gradient on a rank; skipping would silently mix up experts.
    """

    def __init__(self, base: Experts, n: int, r: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj, self.expert_ids = (
            base.gate_up_proj,
            base.down_proj,
            base.expert_ids,
        )
        self.register_buffer("rows", base.rows, persistent=False)
        _, D, F_ = base.down_proj.shape
        device = base.down_proj.device
        shapes = {"gate_proj": (D, F_), "up_proj": (D, F_), "down_proj": (F_, D)}
        self.lora = nn.ModuleDict({p: StackedLoRA(n, *shapes[p], r, alpha, device) for p in shapes})
        self.num_hot = n

    def gate_up(self, x: Tensor, offsets: Tensor) -> Tensor:
        y = super().gate_up(x, offsets)  # [R, 2F]
        offsets = offsets[: self.num_hot]
        x = x[: int(offsets[-1])]  # [S, D] the hot rows come first
        y[: len(x)] += torch.cat([self.lora[p](x, offsets) for p in ("gate_proj", "up_proj")], dim=-1)
        return y

    def down(self, x: Tensor, offsets: Tensor) -> Tensor:
        y = super().down(x, offsets)  # [R, D]
        offsets = offsets[: self.num_hot]
        x = x[: int(offsets[-1])]  # [S, F]
        y[: len(x)] += self.lora["down_proj"](x, offsets)
        return y

    def delta(self) -> tuple[Tensor, Tensor]:
        """What merging adds to the hot rows of the two stacks.  [n, 2F, D], [n, D, F]"""
        gate, up, down = (self.lora[p].delta() for p in ("gate_proj", "up_proj", "down_proj"))
        return torch.cat((gate, up), dim=1), down


# ------------------------------------------------------------------------------------- attach, merge, save, load


@dataclass(frozen=True)
class Adapter:
    """What is attached to a model; `adapter.json` holds it."""

    r: int
    alpha: float
    targets: str  # key of TARGETS
    seed: int  # of lora_A
    hot: list[list[int]]  # adapted experts of every layer


def attach(model: MoETransformer, hot: Tensor, r: int, alpha: float, *, targets: str = "all", seed: int = 0) -> None:
    """Freeze the model, then put LoRA on the hot experts (hot [L, E] bool) and on the modules of `targets`.

    The function computed does not change: B starts at zero. Raises InputError for a wrong r, targets or shape, and
    if the model has an adapter already.
    """
    L, E = len(model.layers), model.config.num_experts
    if getattr(model, "adapter", None) is not None:
        raise InputError("the model has an adapter already; merge or detach it first")
    if tuple(hot.shape) != (L, E):
        raise InputError(f"the expert list is for {tuple(hot.shape)} (layers, experts), the model has {(L, E)}")
    if targets not in TARGETS:
        raise InputError(f"targets {targets!r} is unknown; choose from {', '.join(TARGETS)}")
    limit = min(model.config.hidden_size, model.config.intermediate_size)
    if not 1 <= r <= limit:
        raise InputError(f"rank {r}; want 1..{limit}, the smaller side of an expert's matrices")
    model.requires_grad_(False)
    for i, layer in enumerate(model.layers):
        for path in TARGETS[targets]:
            name = f"layers.{i}.{path}"
            adapted = LoRALinear(model.get_submodule(name), r, alpha)
            init_A(adapted.lora_A.data, seed, name)
            model.set_submodule(name, adapted)
        ids = hot[i].nonzero().flatten().tolist()
        if not ids:  # `greedy` may leave a layer without
            continue
        move_to_front(layer.mlp.experts, ids)
        layer.mlp.experts = LoRAExperts(layer.mlp.experts, len(ids), r, alpha)
        for projection, lora in layer.mlp.experts.lora.items():
            for e, A in zip(ids, lora.lora_A.data, strict=True):
                init_A(A, seed, f"layers.{i}.mlp.experts.{e}.{projection}")
    model.adapter = Adapter(r, alpha, targets, seed, [row.nonzero().flatten().tolist() for row in hot])


def move_to_front(experts: Experts, ids: list[int]) -> None:
    """Reorder the stacks: experts `ids` first, the others behind them in rising order."""
    order = ids + [e for e in range(len(experts.expert_ids)) if e not in set(ids)]
    if order != experts.expert_ids:
        rows = experts.rows[order]
        for stack in (experts.gate_up_proj, experts.down_proj):
            stack.data = stack.data[rows]
        experts.set_order(order)


@torch.no_grad()
def detach(model: MoETransformer) -> None:
    """Take the adapters off; the model is the base again (its experts keep their storage order)."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            with torch.device("meta"):
                base = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            base.weight, base.bias = module.weight, module.bias
            model.set_submodule(name, base)
        elif isinstance(module, LoRAExperts):
            with torch.device("meta"):
                base = Experts(model.config)
            base.gate_up_proj, base.down_proj, base.rows = module.gate_up_proj, module.down_proj, module.rows
            base.expert_ids = module.expert_ids
            model.set_submodule(name, base)
    model.adapter = None


@torch.no_grad()
def merge(model: MoETransformer) -> None:
    """W <- W + (alpha / r) B A for every adapted matrix, in float32; then the adapters are gone."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.weight.copy_(module.weight.float() + module.delta())
        elif isinstance(module, LoRAExperts):
            for stack, delta in zip((module.gate_up_proj, module.down_proj), module.delta(), strict=True):
                stack[: module.num_hot] = (stack[: module.num_hot].float() + delta).to(stack.dtype)
    detach(model)


def adapter_state(model: MoETransformer) -> dict[str, Tensor]:
    """The adapter's tensors by name, whole and on the CPU (a collective under FSDP: every rank must call it)."""
    state = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            state[name] = whole.detach().cpu().contiguous()
    return state


def save_adapter(state: dict[str, Tensor], folder: Path, adapter: Adapter, **about) -> None:
    """Write adapter.safetensors (`adapter_state`) and adapter.json (the Adapter and whatever else is to be known)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter.safetensors", metadata={"format": "pt"})
    text = json.dumps(asdict(adapter) | about, indent=1)
    (folder / "adapter.json").write_text(text + "\n", encoding="utf-8")


def load_adapter(model: MoETransformer, folder: str | Path) -> None:
    """Attach the adapter of a folder to its base model. Raises InputError if it does not fit to the last tensor."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
        adapter = Adapter(*(about[key] for key in Adapter.__dataclass_fields__))
        hot = torch.zeros(len(model.layers), model.config.num_experts, dtype=torch.bool)
        for row, ids in zip(hot, adapter.hot, strict=True):
            row[ids] = True
        state = load_file(folder / "adapter.safetensors")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is missing; want the adapter/ folder of a run") from None
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise InputError(f"{folder}: not an adapter, or a damaged one ({error})") from None
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise InputError(f"{folder}: does not fit this model ({type(error).__name__}: {error})") from None
    attach(model, hot, adapter.r, adapter.alpha, targets=adapter.targets, seed=adapter.seed)
    ours = {name: parameter.data for name, parameter in model.named_parameters() if "lora_" in name}
    for name in sorted(ours.keys() ^ state.keys()):
        raise InputError(f"{folder}: {name} is {'missing' if name in ours else 'unexpected'}; a damaged adapter?")
    for name, tensor in state.items():
        if tensor.shape != ours[name].shape:
            raise InputError(f"{folder}: {name} is {tuple(tensor.shape)}, the model wants {tuple(ours[name].shape)}")
        ours[name].copy_(tensor)


def count_parameters(model: MoETransformer) -> tuple[int, int]:
    """(trainable, total), frozen adapter tensors included in the total: the convention of the paper and of PEFT."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def report(model: MoETransformer) -> Iterator[str]:
    """Lines that say what got an adapter: experts of every layer, modules, trainable parameters and their share."""
    trainable, total = count_parameters(model)
    adapter, E = model.adapter, model.config.num_experts
    for i, ids in enumerate(adapter.hot):
        shown = "all" if len(ids) == E else " ".join(map(str, ids))
        yield f"layer {i:2d}: {len(ids)} of {E} experts adapted: {shown}"
    modules = ", ".join(path.rsplit(".")[-1] for path in TARGETS[adapter.targets]) or "none"
    yield f"rank {adapter.r}, alpha {adapter.alpha:g}; other modules adapted in every layer: {modules}"
    yield f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / total:.4f} %)"
