"""Adapters as PEFT saves them: write ours that way, read theirs.

    load_any_adapter(model, "adapter")                # a folder of ours, or one of PEFT's
    adapter, state = read_peft("adapter", config)     # PEFT's files as `adapters.read_adapter` gives ours

PEFT names a pair of factors after its matrix in the hub's checkpoint. Under transformers 4 every expert has matrices
of its own; under transformers 5 a layer's experts are stacked, and PEFT >= 0.20 stacks the pairs that a file holds for
them. So what loads under both, and in vLLM, is a pair for every expert, zeros for those without an adapter.

Dimensions: E experts a layer, r rank, F intermediate_size of an expert.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import hellora
from command.cli import InputError
from hellora import TARGETS, Adapter
from hub.config import MoEConfig
from model import MoETransformer, hub_views
from run import adapters

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
UNDER_5 = ("olmoe", "mixtral", "qwen3_moe")  # the families whose files PEFT 0.21 loads under transformers 5

Factors = dict[str, Tensor]  # of one matrix: lora_A [r, in], lora_B [out, r]; of DoRA also lora_m [out]


# ------------------------------------------------------------------------------------------------------- names


def modules(adapter: Adapter, config: MoEConfig) -> dict[str, list[str]]:
    """Our modules that hold factors, and the matrices these belong to: one, or those of a layer's hot experts."""
    found = {name: [name] for name in hellora.adapted_linears(config, adapter.targets)}
    for i, ids in zip(config.moe_layers, adapter.hot, strict=True):
        for projection in PROJECTIONS if ids else ():
            stack = f"layers.{i}.mlp.experts.lora.{projection}"
            found[stack] = [f"layers.{i}.mlp.experts.{e}.{projection}" for e in ids]
    return found


def hub_name(matrix: str, config: MoEConfig) -> str:
    """Ours to the hub's: layers.0.mlp.experts.3.up_proj -> model.layers.0.block_sparse_moe.experts.3.w3"""
    path, _, leaf = matrix.rpartition(".")
    family = config.family
    if ".experts." in path:
        leaf = dict(zip(PROJECTIONS, family.projections, strict=True)).get(leaf, leaf)
    return f"model.{path}.{leaf}".replace(".mlp.", f".{family.moe}.").replace(
        ".shared_expert.", f".{family.shared_expert}."
    )


def hub_shapes(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of the model, by the hub's name without `.weight`."""
    with torch.device("meta"):
        views = hub_views(MoETransformer(config))
    return {key.removesuffix(".weight"): tuple(view.shape) for key, view in views.items()}


# ------------------------------------------------------------------------------------------------------- write


def adapted_matrices(adapter: Adapter, config: MoEConfig, compact: bool) -> list[str]:
    """The matrices that a PEFT file has pairs for: attention and router as adapted, the hot experts or all of them.

    Raises InputError for DoRA, which PEFT refuses on the stacked experts of transformers 5.
    """
    if adapter.kind == "dora":
        raise InputError("PEFT has no DoRA on the stacked experts of transformers 5; use --to merged")
    every = [list(range(config.num_experts))] * len(adapter.hot)
    shown = adapter if compact else replace(adapter, hot=every)
    matrices = [matrix for matrices in modules(shown, config).values() for matrix in matrices]
    if not compact:  # PEFT takes target_modules by the end of a name, so MLPs beside the experts get pairs too: zeros
        for i in range(config.num_hidden_layers):
            block = f"layers.{i}.mlp" if i not in config.moe_layers else f"layers.{i}.mlp.shared_expert"
            if i not in config.moe_layers or config.shared_intermediate_size:
                matrices += [f"{block}.{projection}" for projection in PROJECTIONS]
    return matrices


def peft_bytes(adapter: Adapter, config: MoEConfig, compact: bool, dtype: torch.dtype) -> int:
    """Bytes of the tensors that `write_peft` would write."""
    shapes = hub_shapes(config)
    sides = (sum(shapes[hub_name(matrix, config)]) for matrix in adapted_matrices(adapter, config, compact))
    return adapter.r * sum(sides) * dtype.itemsize


def write_peft(
    out: Path,
    adapter: Adapter,
    factors: dict[str, Factors],
    config: MoEConfig,
    base_name: str,
    *,
    compact: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter, given by matrix, as PEFT would: a pair for every expert, or if `compact` for the hot ones."""
    shapes, tensors = hub_shapes(config), {}
    for matrix in adapted_matrices(adapter, config, compact):
        name = hub_name(matrix, config)
        fan_out, fan_in = shapes[name]
        for factor, shape in (("lora_A", (adapter.r, fan_in)), ("lora_B", (fan_out, adapter.r))):
            value = factors[matrix][factor] if matrix in factors else torch.zeros(shape)
            tensors[f"base_model.model.{name}.{factor}.weight"] = value.to(dtype, copy=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [path.rpartition(".")[2] for path in TARGETS[adapter.targets]]
    if compact:  # whole names: from a pattern transformers 5 would make a model without the experts, and say nothing
        targets += [hub_name(matrix, config) for matrix in factors if ".experts." in matrix]
    else:
        targets += config.family.projections
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": adapter.r,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (out / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- read


PLAIN = {  # settings of PEFT that change what the factors mean, with the one value that is read here
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
}
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that change the base model's weights


def read_peft(folder: str | Path, config: MoEConfig) -> tuple[Adapter, dict[str, Tensor]]:
    """A LoRA adapter that PEFT saved, as `adapters.read_adapter` would give it. Experts whose pairs are zero are cold.

    Reads a pair per expert, and the stacked pairs that PEFT saves under transformers 5 as long as gate and up do not
    mix. What is missing of a hot expert, or of `targets`, gets zeros: they add nothing, and learn nothing.
    Raises InputError for a damaged file, and for whatever an Adapter has no place for.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        r, alpha = int(about["r"]), float(about["lora_alpha"])
        if not (r > 0 and 0 < alpha < float("inf")):
            raise ValueError(f"r {r}, lora_alpha {alpha}")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is missing; want the folder of a PEFT adapter") from None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder}: not a PEFT adapter, or damaged ({type(error).__name__}: {error})") from None
    for name, only in PLAIN.items():
        if (about.get(name) or only) != only:
            raise InputError(f"{folder}: {name} is {about[name]!r}, only {only!r} can be read")
    if str(about.get("init_lora_weights")).startswith(OTHER_BASE):
        made = about["init_lora_weights"]
        raise InputError(f"{folder}: init_lora_weights {made!r} belongs to changed base weights; save it converted")
    for name, doubled in (("rank_pattern", 2 * r), ("alpha_pattern", 2 * alpha)):  # of gate and up in one pair
        if (about.get(name) or {}) not in ({}, {r".*\.gate_up_proj": doubled}):
            raise InputError(f"{folder}: {name} is {about[name]}; only one rank and one alpha for all can be read")
    found = read_pairs(folder, tensors, config, r)

    found = {matrix: pair for matrix, pair in found.items() if pair["lora_A"].any() or pair["lora_B"].any()}
    hot = {layer: set() for layer in config.moe_layers}
    others = set()
    for matrix in found:
        _, layer, path = matrix.split(".", 2)
        if path.startswith("mlp.experts."):
            hot[int(layer)].add(int(path.split(".")[2]))
        else:
            others.add(path)
    fitting = [name for name, paths in TARGETS.items() if others <= set(paths)]
    if not found or not fitting:
        what = ", ".join(sorted(others)) or "nothing"
        raise InputError(f"{folder}: it adapts {what}; want {', '.join(TARGETS['all'])} or experts")
    targets = min(fitting, key=lambda name: len(TARGETS[name]))
    adapter = Adapter("lora", r, alpha, targets, seed=0, hot=[sorted(ids) for ids in hot.values()])
    shapes, state = hub_shapes(config), {}
    for module, matrices in modules(adapter, config).items():
        fan_out, fan_in = shapes[hub_name(matrices[0], config)]
        for factor, shape in (("lora_A", (r, fan_in)), ("lora_B", (fan_out, r))):
            parts = [found[matrix][factor] if matrix in found else torch.zeros(shape) for matrix in matrices]
            state[f"{module}.{factor}"] = parts[0] if matrices == [module] else torch.stack(parts)
    return adapter, state


def read_pairs(folder: Path, tensors: dict[str, Tensor], config: MoEConfig, r: int) -> dict[str, Factors]:
    """The tensors of a PEFT file by our names of their matrices, each expert's apart, their shapes checked."""
    ours = {hub_name(f"x.experts.0.{name}", config).rpartition(".")[2]: name for name in PROJECTIONS}
    pairs, found, shapes = {}, {}, hub_shapes(config)
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.model\.(.+)\.lora_([AB])\.weight", key)
        if not match:
            raise InputError(f"{folder}: {key} cannot be read; want lora_A and lora_B of attention, router, experts")
        path, _, leaf = match[1].replace(f".{config.family.moe}.", ".mlp.").rpartition(".")
        pairs.setdefault(f"{path}.{ours.get(leaf, leaf)}", {})[f"lora_{match[2]}"] = tensor.float()
    for name, pair in pairs.items():
        if len(pair) < 2:
            raise InputError(f"{folder}: {name} has {', '.join(pair)} alone; a damaged adapter?")
        stacked = name.endswith((".experts", ".experts.base_layer"))
        found |= unstack(name, pair, config.num_experts, r) if stacked else {name: pair}
    for matrix, pair in found.items():
        fan_out, fan_in = shapes.get(hub_name(matrix, config), (0, 0))
        A, B = tuple(pair["lora_A"].shape), tuple(pair["lora_B"].shape)
        if (A, B) != ((r, fan_in), (fan_out, r)):
            raise InputError(f"{folder}: {matrix} has lora_A {A}, lora_B {B}, which is of another model or rank")
    return found


def unstack(name: str, pair: Factors, E: int, r: int) -> dict[str, Factors]:
    """Take apart the one pair that PEFT holds under transformers 5 for all experts of a layer.

    lora_A [E * r, in] has the expert outermost, lora_B [out, r * E] innermost. `experts.base_layer` is gate and up:
    made from two pairs, its rank is 2r and B block-diagonal. `experts` is down, wrapped around it.
    """
    experts = name.removesuffix(".base_layer")
    if len(pair["lora_A"]) % E or pair["lora_B"].shape[1] % E:
        raise InputError(f"{name}: stacked pairs for another number of experts than {E}")
    A = pair["lora_A"].unflatten(0, (E, -1))  # [E, r or 2r, in]
    B = pair["lora_B"].unflatten(1, (-1, E)).permute(2, 0, 1)  # [E, out, r or 2r]
    if name == experts:
        parts = {"down_proj": (A, B)}
    else:
        gate, up = B.chunk(2, dim=1)  # [E, F, r or 2r] each
        if A.shape[1] == r:
            parts = {"gate_proj": (A, gate), "up_proj": (A, up)}
        elif gate[..., r:].any() or up[..., :r].any():
            raise InputError(f"{name}: gate and up were trained as one pair of rank {A.shape[1]}; want rank {r} each")
        else:
            parts = {"gate_proj": (A[:, :r], gate[..., :r]), "up_proj": (A[:, r:], up[..., r:])}
    return {
        f"{experts}.{e}.{projection}": {"lora_A": A[e], "lora_B": B[e]}
        for projection, (A, B) in parts.items()
        for e in range(E)
    }


def base_of(folder: str | Path) -> str | None:
    """The base model that an adapter of PEFT names; None if `folder` holds no such adapter."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError):
        name = None
    if not isinstance(name, str):
        raise InputError(f"{path} does not name a base model; add its folder or hub id as base_model_name_or_path")
    return name


def read_any_adapter(folder: str | Path, config: MoEConfig) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter of a folder: of a run, ours (adapter.json), or one that PEFT saved (adapter_config.json)."""
    if (Path(folder) / "adapter_config.json").is_file():
        return read_peft(folder, config)
    is_run = (Path(folder) / "adapter" / "adapter.json").is_file()
    return adapters.read_adapter(Path(folder) / "adapter" if is_run else folder)


def load_any_adapter(model: MoETransformer, folder: str | Path) -> None:
    """Attach the adapter of a folder, ours or PEFT's, to its base model."""
    adapters.attach_adapter(model, *read_any_adapter(folder, model.config), folder)
