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
import math
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from command.cli import InputError, note
from command.files import parse_json, read_json
from hub.checkpoint import check_finite, converted
from hub.config import Family

Factors = dict[str, Tensor]  # of one matrix: lora_A [r, in], lora_B [out, r]; for DoRA also lora_m [out]
Shapes = dict[str, tuple[int, ...]]  # matrix -> (out, in)


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter: y = W x + (alpha / r) B A x on some matrices, or DoRA."""

    r: int
    alpha: float
    pairs: dict[str, Factors]  # by matrix
    dora: bool = False


# ------------------------------------------------------------------------------------------------------- write


def peft_bytes(r: int, shapes: Shapes, dtype: torch.dtype, dora: bool = False) -> int:
    """Bytes of the tensors that `write_peft` writes for these matrices."""
    magnitudes = sum(fan_out for fan_out, _ in shapes.values()) if dora else 0
    return (r * sum(map(sum, shapes.values())) + magnitudes) * dtype.itemsize


def write_peft(
    out: Path,
    adapter: PeftAdapter,
    shapes: Shapes,
    target_modules: list[str],
    base_name: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter as PEFT does: a pair for each matrix of `shapes`, zeros where the adapter has none.

    DoRA needs a pair everywhere, since zeros would stand for a weight of zeros.
    """
    tensors, r, alpha = {}, adapter.r, adapter.alpha
    for matrix, (fan_out, fan_in) in shapes.items():
        zeros = {"lora_A": torch.zeros(r, fan_in), "lora_B": torch.zeros(fan_out, r)}
        for factor, value in adapter.pairs.get(matrix, zeros).items():
            name = "lora_magnitude_vector" if factor == "lora_m" else f"{factor}.weight"
            key = f"base_model.model.{matrix}.{name}"
            tensors[key] = converted(value, dtype, key).clone()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": target_modules,
        "use_dora": adapter.dora,
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
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
}
KNOWN = {  # keys of adapter_config.json that are read, or that change nothing once the factors are trained
    *ONLY, "r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "target_modules",
    "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path",
    "revision", "task_type", "auto_mapping", "inference_mode", "lora_dropout", "peft_version", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying", "trainable_token_indices",
}  # fmt: skip
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that change the base model's weights


def read_peft(folder: str | Path, family: Family, num_experts: int, shapes: Shapes) -> PeftAdapter:
    """The LoRA or DoRA adapter that PEFT saved in a folder, without the pairs that are all zero.

    shapes: of every matrix of the model. Reads a pair per expert, and the stacked pairs that PEFT saves under
    transformers 5. Pairs of other ranks and scales become pairs of one rank and one alpha: `unified`. Raises InputError
    for a damaged file, for a setting that changes what the factors mean, and for pairs that do not fit the model.
    """
    folder = Path(folder)
    try:
        about = parse_json((folder / "adapter_config.json").read_bytes(), folder / "adapter_config.json", dict)
        tensors = load_file(folder / "adapter_model.safetensors")
        r, alpha = about["r"], about["lora_alpha"]
        if type(r) is not int or type(alpha) not in (int, float) or not (r > 0 and 0 < alpha < float("inf")):
            raise ValueError(f"r {r!r}, lora_alpha {alpha!r}; want numbers above 0")
    except FileNotFoundError as error:
        is_pickle = (folder / "adapter_model.bin").is_file()
        pickle = "adapter_model.bin is a pickle, which is never opened; load it with PEFT and save it again"
        advice = pickle if is_pickle else "want the folder of a PEFT adapter"
        missing = error.filename or folder / "adapter_model.safetensors"  # safetensors names no file
        raise InputError(f"{missing} is missing; {advice}") from None
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, OverflowError, SafetensorError) as error:
        raise InputError(f"{folder}: not a PEFT adapter, or damaged ({type(error).__name__}: {error})") from None
    try:
        check_settings(about)
        pairs, scales = {}, {}
        for name, pair in pairs_by_name(tensors, about).items():
            matrix, rows = name.replace(".mlp.", f".{family.moe}."), len(pair["lora_A"])  # transformers 5 -> the hub
            if name.endswith((".experts", ".experts.base_layer")):
                parameter, found = unstack(matrix, pair, family, num_experts, about, shapes)
                name, rows = f"{name.removesuffix('.base_layer')}.{parameter}", rows // num_experts
            else:
                found = {matrix: pair}
            pairs |= found
            scales |= dict.fromkeys(found, scale_of(name, rows, about))
        for matrix, pair in pairs.items():
            fan_out, fan_in = shapes.get(matrix, (0, 0))
            rank = len(pair["lora_A"])
            if (pair["lora_A"].shape, pair["lora_B"].shape) != ((rank, fan_in), (fan_out, rank)):
                raise InputError(f"{matrix} has {described(pair)}, which is of another model or rank")
        adapter, remark = unified(pairs, scales, bool(about.get("use_dora")))
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    if remark:
        note(f"{folder}: {remark}")
    return adapter


def unified(pairs: dict[str, Factors], scales: dict[str, Fraction], dora: bool) -> tuple[PeftAdapter, str]:
    """The same function with one rank and one alpha.  -> the adapter, a remark on what changed, or ""

    The rank is the largest; smaller factors get rows and columns of zeros, which stay zero in training. The scale
    alpha / r is the most frequent one; where it was another, B makes up for it.
    """
    if not dora:
        pairs = {matrix: pair for matrix, pair in pairs.items() if any(factor.any() for factor in pair.values())}
    if not pairs:
        return PeftAdapter(1, 1.0, {}), ""
    r, scale = max(len(pair["lora_A"]) for pair in pairs.values()), Counter(map(scales.get, pairs)).most_common(1)[0][0]
    changed, same = {}, 0
    for matrix, pair in pairs.items():
        more, ratio = r - len(pair["lora_A"]), scales[matrix] / scale
        changed[matrix] = pair | {
            "lora_A": F.pad(pair["lora_A"], (0, 0, 0, more)),
            "lora_B": F.pad(pair["lora_B"], (0, more)) * float(ratio),
        }
        same += not more and ratio == 1
    remark = (
        f"{len(pairs) - same} of {len(pairs)} matrices have another rank or scale than rank {r} and alpha / r = "
        f"{float(scale):g}; they are padded and rescaled: the function is the same, steps of training are not"
    )
    return PeftAdapter(r, float(r * scale), changed, dora), "" if same == len(pairs) else remark


def check_settings(about: dict) -> None:
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
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = about.get(name) or {}
        if not isinstance(pattern, dict) or not all(type(n) in (int, float) and n > 0 for n in pattern.values()):
            raise InputError(f"{name} is {pattern!r:.80}; want an object of numbers above 0")


def of_module(about: dict, pattern: str, default: str, name: str) -> int | float:
    """What adapter_config.json says of a module. The keys of a pattern are regular expressions for ends of names."""
    for key, value in (about.get(pattern) or {}).items():
        try:  # PEFT calls a weight that is not a linear layer's by its own name
            if any(re.match(rf"(.*\.)?({key})$", each) for each in (name, f"{name}.weight")):
                return value
        except re.error as error:
            raise InputError(f"{pattern} has {key!r:.80}, not a regular expression ({error})") from None
    return about[default]


def scale_of(name: str, rows: int, about: dict) -> Fraction:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) under rsLoRA (arXiv 2312.03732).

    name: PEFT's name of the module, or of the parameter. rows: of one A. Raises InputError if these are not the rank.
    """
    rank, alpha = of_module(about, "rank_pattern", "r", name), of_module(about, "alpha_pattern", "lora_alpha", name)
    if rows != rank:
        raise InputError(
            f"{name}: lora_A has rank {rows}, but adapter_config.json says {rank}: of another model or rank"
        )
    return Fraction(alpha / math.sqrt(rank)) if about.get("use_rslora") else Fraction(alpha) / rank


def pairs_by_name(tensors: dict[str, Tensor], about: dict) -> dict[str, Factors]:
    """The tensors of a PEFT file as pairs, by PEFT's name of a matrix or of a layer's stacked experts."""
    pairs, factors = {}, ["lora_A", "lora_B"] + (["lora_m"] if about.get("use_dora") else [])
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(model\..+)\.lora_(A|B|magnitude_vector)(\.weight)?", key)
        factor = match and f"lora_{match[2][0]}"
        if factor not in factors:
            raise InputError(f"{key} cannot be read; want {' and '.join(factors)} of attention, router, experts")
        check_finite(tensor, key)
        pairs.setdefault(match[1], {})[factor] = tensor.float()
    for name, pair in pairs.items():
        if len(pair) < len(factors):
            raise InputError(f"{name} has {', '.join(pair)} alone, want {' and '.join(factors)}; a damaged adapter?")
    return pairs


def described(pair: Factors) -> str:
    """The shapes of a pair, for a message."""
    return ", ".join(f"{name} {tuple(factor.shape)}" for name, factor in pair.items())


def unstack(
    name: str, pair: Factors, family: Family, E: int, about: dict, shapes: Shapes
) -> tuple[str, dict[str, Factors]]:
    """Take apart the one pair that PEFT holds under transformers 5 for all experts of a layer.

    lora_A [E * r, in] has the expert outermost, lora_B [out, r * E] innermost. The shapes tell whether it adapts
    gate_up_proj (in D, out 2F) or down_proj (in F, out D): of two pairs one is named `experts`, the other, inside it,
    `experts.base_layer`; of one alone the name says nothing. Before PEFT 0.19, A and B have each other's place:
    (E, out, in) was read as (E, in, out). If gate and up had a pair each, the rank of their common pair is 2r, and B is
    block-diagonal. Otherwise gate and up share A.
    -> the parameter that it adapts, and pairs by matrix
    """
    experts = name.removesuffix(".base_layer")
    gate_proj, up_proj, down_proj = family.projections
    F_, D = shapes.get(f"{experts}.0.{gate_proj}", (0, 0))
    A, B = pair["lora_A"], pair["lora_B"]
    swapped = version(about) < (0, 19)  # 0.17 writes no version
    sides = (B.shape[0], A.shape[-1]) if swapped else (A.shape[-1], B.shape[0])
    adapts = {(D, 2 * F_): "gate_up_proj", (F_, D): "down_proj"}.get(sides)
    if not F_ or adapts is None or len(A) % E or B.shape[1] % E:
        raise InputError(f"{name} has {described(pair)}, which is of another model")
    A = A.unflatten(0, (E, -1))  # [E, rank, in]
    B = B.unflatten(1, (-1, E)).permute(2, 0, 1)  # [E, out, rank]
    if swapped:
        A, B = B.mT, A.mT
    if adapts == "down_proj":
        parts = {down_proj: (A, B)}
    else:
        r = A.shape[1] // 2
        gate, up = B.chunk(2, dim=1)  # [E, F, rank] each
        if A.shape[1] % 2 or gate[..., r:].any() or up[..., :r].any():
            parts = {gate_proj: (A, gate), up_proj: (A, up)}
        else:
            parts = {gate_proj: (A[:, :r], gate[..., :r]), up_proj: (A[:, r:], up[..., r:])}
    return adapts, {
        f"{experts}.{e}.{projection}": {"lora_A": A[e], "lora_B": B[e]}
        for projection, (A, B) in parts.items()
        for e in range(E)
    }


def version(about: dict) -> tuple[int, ...]:
    """The version of PEFT that wrote adapter_config.json; (0,) where it says none."""
    return tuple(int(part) for part in re.findall(r"\d+", str(about.get("peft_version") or "0"))[:2])


def base_of(folder: str | Path) -> str | None:
    """The base model that a PEFT adapter names; None if `folder` holds no PEFT adapter."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return None
    name = read_json(path, dict).get("base_model_name_or_path")
    if not isinstance(name, str):
        raise InputError(f"{path} does not name a base model; add its folder or hub id as base_model_name_or_path")
    return name
