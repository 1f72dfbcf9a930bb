"""Adapter files of PEFT: written so that every loader takes them, and read back.

    write_peft(folder, adapter, shapes, target_modules, "allenai/OLMoE-1B-7B-0924")
    adapter = read_peft(folder, family, num_experts, shapes)

A matrix has here the key of its weight in the hub's checkpoint, without ".weight"; PEFT names LoRA pairs after these
keys. Under transformers 4 each expert has matrices of its own. Under transformers 5 the experts of a layer are stacked,
and PEFT 0.20 or later stacks the pairs that it finds in the file. This needs a pair for every expert, and so does vLLM.
A file therefore holds a pair for every expert, with zeros for the cold ones.

Dimensions: E experts per layer, r rank, D hidden_size, F intermediate_size of an expert.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from command.cli import InputError
from hub.checkpoint import check_finite, converted
from hub.config import Family

Factors = dict[str, Tensor]  # of one matrix: lora_A [r, in], lora_B [out, r]; for DoRA also lora_m [out]
Shapes = dict[str, tuple[int, ...]]  # matrix -> (out, in)


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter: y = W x + (alpha / r) B A x on some matrices."""

    r: int
    alpha: float
    pairs: dict[str, Factors]  # by matrix


# ------------------------------------------------------------------------------------------------------- write


def peft_bytes(r: int, shapes: Shapes, dtype: torch.dtype) -> int:
    """Bytes of the tensors that `write_peft` writes for these matrices."""
    return r * sum(map(sum, shapes.values())) * dtype.itemsize


def write_peft(
    out: Path,
    adapter: PeftAdapter,
    shapes: Shapes,
    target_modules: list[str],
    base_name: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter as PEFT does: a pair for each matrix of `shapes`, zeros where the adapter has none."""
    tensors, r, alpha = {}, adapter.r, adapter.alpha
    for matrix, (fan_out, fan_in) in shapes.items():
        for factor, shape in (("lora_A", (r, fan_in)), ("lora_B", (fan_out, r))):
            value = adapter.pairs[matrix][factor] if matrix in adapter.pairs else torch.zeros(shape)
            key = f"base_model.model.{matrix}.{factor}.weight"
            tensors[key] = converted(value, dtype, key).clone()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": target_modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (out / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- read

ONLY = {  # settings of PEFT that change what the factors mean, with the only value that can be read
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
KNOWN = {  # keys of adapter_config.json that are read, or that change nothing once the factors are trained
    *ONLY, "r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "target_modules",
    "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path",
    "revision", "task_type", "auto_mapping", "inference_mode", "lora_dropout", "peft_version", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying", "trainable_token_indices",
}  # fmt: skip
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that change the base model's weights


def read_peft(folder: str | Path, family: Family, num_experts: int, shapes: Shapes) -> PeftAdapter:
    """The LoRA adapter that PEFT saved in a folder, without the pairs that are all zero.

    shapes: of every matrix of the model. Reads a pair per expert, and the stacked pairs that PEFT saves under
    transformers 5 if gate and up can be told apart. Raises InputError for a damaged file, for a setting that changes
    what the factors mean, and for pairs that do not fit the model.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        r, alpha = int(about["r"]), float(about["lora_alpha"])
        if not (r > 0 and 0 < alpha < float("inf")):
            raise ValueError(f"r {r}, lora_alpha {alpha}")
    except FileNotFoundError as error:
        is_pickle = (folder / "adapter_model.bin").is_file()
        pickle = "adapter_model.bin is a pickle, which is never opened; load it with PEFT and save it again"
        advice = pickle if is_pickle else "want the folder of a PEFT adapter"
        missing = error.filename or folder / "adapter_model.safetensors"  # safetensors names no file
        raise InputError(f"{missing} is missing; {advice}") from None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder}: not a PEFT adapter, or damaged ({type(error).__name__}: {error})") from None
    try:
        check_settings(about, r, alpha)
        pairs = {}
        for name, pair in pairs_by_name(tensors, family).items():
            stacked = name.endswith((".experts", ".experts.base_layer"))
            pairs |= unstack(name, pair, family, num_experts, r, shapes) if stacked else {name: pair}
        for matrix, pair in pairs.items():
            fan_out, fan_in = shapes.get(matrix, (0, 0))
            if (pair["lora_A"].shape, pair["lora_B"].shape) != ((r, fan_in), (fan_out, r)):
                raise InputError(f"{matrix} has {described(pair)}, which is of another model or rank")
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    return PeftAdapter(r, alpha, {m: pair for m, pair in pairs.items() if any(t.any() for t in pair.values())})


def check_settings(about: dict, r: int, alpha: float) -> None:
    """Raise InputError for an adapter_config.json under which the factors mean something else."""
    for name, only in ONLY.items():
        if (about.get(name) or only) != only:
            raise InputError(f"{name} is {about[name]!r}, only {only!r} can be read")
    if unknown := sorted(key for key, value in about.items() if value and key not in KNOWN):
        given = ", ".join(f"{key} {about[key]!r:.40}" for key in unknown)
        raise InputError(f"{given}: unknown in adapter_config.json; take it out if it changes nothing")
    init = about.get("init_lora_weights")
    if str(init).startswith(OTHER_BASE):
        raise InputError(f"init_lora_weights {init!r} belongs to changed base weights; save the adapter converted")
    others = {}  # patterns that give a module another rank or alpha
    for name, value in (("rank_pattern", r), ("alpha_pattern", alpha)):
        pattern = about.get(name) or {}
        if not isinstance(pattern, dict):
            raise InputError(f"{name} is {pattern!r:.80}; want an object")
        others[name] = {module: its for module, its in pattern.items() if its != value}
    gate_up = r".*\.gate_up_proj"  # as PEFT saves the pairs of gate and up as one
    if others not in (
        {"rank_pattern": {}, "alpha_pattern": {}},
        {"rank_pattern": {gate_up: 2 * r}, "alpha_pattern": {gate_up: 2 * alpha}},
    ):
        name = next(name for name, pattern in others.items() if pattern)
        raise InputError(f"{name} is {about[name]}; only one rank and one alpha for all can be read")


def pairs_by_name(tensors: dict[str, Tensor], family: Family) -> dict[str, Factors]:
    """The tensors of a PEFT file as pairs, by matrix or by the name of a layer's stacked experts."""
    pairs = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(model\..+)\.lora_([AB])\.weight", key)
        if not match:
            raise InputError(f"{key} cannot be read; want lora_A and lora_B of attention, router, experts")
        check_finite(tensor, key)
        name = match[1].replace(".mlp.", f".{family.moe}.")  # the block's name in transformers 5 -> in the checkpoint
        pairs.setdefault(name, {})[f"lora_{match[2]}"] = tensor.float()
    for name, pair in pairs.items():
        if len(pair) < 2:
            raise InputError(f"{name} has {', '.join(pair)} alone; a damaged adapter?")
    return pairs


def described(pair: Factors) -> str:
    """The shapes of a pair, for a message."""
    return ", ".join(f"{name} {tuple(factor.shape)}" for name, factor in pair.items())


def unstack(name: str, pair: Factors, family: Family, E: int, r: int, shapes: Shapes) -> dict[str, Factors]:
    """Take apart the one pair that PEFT holds under transformers 5 for all experts of a layer.  -> pairs by matrix

    lora_A [E * r, in] has the expert outermost, lora_B [out, r * E] innermost. The shapes tell whether it adapts
    gate_up_proj (in D, out 2F) or down_proj (in F, out D): of two pairs one is named `experts`, the other, inside it,
    `experts.base_layer`; of one alone the name says nothing. If gate and up had a pair each, the rank of their common
    pair is 2r, and B is block-diagonal.
    """
    experts = name.removesuffix(".base_layer")
    gate_proj, up_proj, down_proj = family.projections
    F, D = shapes.get(f"{experts}.0.{gate_proj}", (0, 0))
    A, B = pair["lora_A"], pair["lora_B"]
    adapts = {(D, 2 * F): "gate_up_proj", (F, D): "down_proj"}.get((A.shape[-1], B.shape[0]))
    if not F or adapts is None or len(A) % E or B.shape[1] % E:
        raise InputError(f"{name} has {described(pair)}, which is of another model")
    A = A.unflatten(0, (E, -1))  # [E, r or 2r, in]
    B = B.unflatten(1, (-1, E)).permute(2, 0, 1)  # [E, out, r or 2r]
    if adapts == "down_proj":
        parts = {down_proj: (A, B)}
    else:
        gate, up = B.chunk(2, dim=1)  # [E, F, r or 2r] each
        if A.shape[1] == r:
            parts = {gate_proj: (A, gate), up_proj: (A, up)}
        elif gate[..., r:].any() or up[..., :r].any():
            raise InputError(f"{name}: gate and up were trained as one pair of rank {A.shape[1]}; want rank {r} each")
        else:
            parts = {gate_proj: (A[:, :r], gate[..., :r]), up_proj: (A[:, r:], up[..., r:])}
    return {
        f"{experts}.{e}.{projection}": {"lora_A": A[e], "lora_B": B[e]}
        for projection, (A, B) in parts.items()
        for e in range(E)
    }


def base_of(folder: str | Path) -> str | None:
    """The base model that a PEFT adapter names; None if `folder` holds no PEFT adapter."""
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
