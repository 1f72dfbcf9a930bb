"""Adapter files of PEFT: written so that every loader takes them, and read back.

    write_peft(folder, adapter, shapes, target_modules, "allenai/OLMoE-1B-7B-0924")
    reading = read_pairs(folder, family, num_experts, shapes)
    adapter, remark = unified(reading)

A matrix has here the key of its weight in the hub's checkpoint, without ".weight"; PEFT names LoRA pairs after these
keys. Under transformers 4 each expert has matrices of its own. Under transformers 5 the experts of a layer are stacked,
and PEFT 0.20 or later stacks the pairs that it finds in the file. This needs a pair for every expert, and so does vLLM.
A file therefore holds a pair for every expert, with zeros for the cold ones.

Dimensions: E experts per layer, r rank, D hidden_size, F intermediate_size of an expert.
"""

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from command.cli import InputError
from command.files import read_json
from hub.checkpoint import converted, name_and_revision
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
    (name, revision), tensors, r, alpha = name_and_revision(base_name), {}, adapter.r, adapter.alpha
    for matrix, (fan_out, fan_in) in shapes.items():
        zeros = {"lora_A": torch.zeros(r, fan_in), "lora_B": torch.zeros(fan_out, r)}
        for factor, value in adapter.pairs.get(matrix, zeros).items():
            kind = "lora_magnitude_vector" if factor == "lora_m" else f"{factor}.weight"
            key = f"base_model.model.{matrix}.{kind}"
            tensors[key] = converted(value, dtype, key).clone()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
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
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


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
KNOWN = ONLY.keys() | set(  # keys that are read, or that change nothing once the factors are trained
    """
    r lora_alpha use_dora use_rslora rank_pattern alpha_pattern init_lora_weights target_modules target_parameters
    exclude_modules layers_to_transform layers_pattern base_model_name_or_path revision task_type auto_mapping
    inference_mode lora_dropout peft_version loftq_config eva_config corda_config lora_ga_config megatron_config
    megatron_core qalora_group_size ensure_weight_tying trainable_token_indices lora_B_layout moe_sieve_selection
    moe_sieve_version
    """.split()
)
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that change the base model's weights
# Parts of names that FSDP, torch.compile, activation checkpointing and an adapter's own name leave in a raw state dict.
WRAPPERS = r"_fsdp_wrapped_module\.|_orig_mod\.|_checkpoint_wrapped_module\.|(?<=lora_[AB]\.)default\."


class Layout(NamedTuple):
    """How a file packs the pairs of all experts of a layer into one; nothing in the tensors says it."""

    by_expert: bool  # the columns of lora_B: one expert after the other. PEFT: the expert is innermost
    swapped: bool  # lora_A and lora_B have each other's place, as before PEFT 0.19


@dataclass
class Reading:
    """What an adapter's folder holds, as far as it can be read."""

    kind: str  # key of hellora.KINDS
    pairs: dict[str, Factors] = field(default_factory=dict)  # by matrix
    scales: dict[str, Fraction] = field(default_factory=dict)  # what B A is multiplied by
    layout: Layout | None = None  # of packed stacks
    packed: dict[str, int] = field(default_factory=dict)  # PEFT's name of each packed stack -> its rank
    problems: list[str] = field(default_factory=list)  # what cannot be read, or changes what the factors mean
    missing: list[str] = field(default_factory=list)  # modules that adapter_config.json names, without a pair

    @property
    def is_swapped(self) -> bool:
        """Whether the stacks' A is called lora_B in the file, and their B lora_A."""
        return bool(self.packed) and self.layout.swapped


def read_pairs(
    folder: str | Path, family: Family, num_experts: int, shapes: Shapes, layout: Layout | None = None
) -> Reading:
    """The pairs that a tool saved in PEFT's format: one for each expert, or packed as under transformers 5.

    shapes: of every matrix of the model. layout: of packed pairs, by default what adapter_config.json says. Also reads
    the packed pairs of selected experts that axolotl's moe_sieve writes. Raises InputError for a damaged file.
    """
    settings, tensors = read_files(Path(folder))
    problems = setting_problems(settings)
    layout = layout or layout_of(settings)
    reading = Reading("dora" if settings.get("use_dora") else "lora", layout=layout, problems=problems)
    selection = settings.get("moe_sieve_selection") or {}
    for name, pair in pairs_by_name(tensors, settings, problems).items():
        try:
            matrix, rows = name.replace(".mlp.", f".{family.moe}."), len(pair["lora_A"])  # transformers 5 -> the hub
            if name.endswith((".experts", ".experts.base_layer")):
                module = name.removesuffix(".base_layer")
                ids = selection.get(module, {}).get("selected_experts", list(range(num_experts)))
                parameter, parts = unstack(matrix, pair, family, ids, layout, shapes)
                name, rows = f"{module}.{parameter}", rows // len(ids)
                reading.packed[name] = rows
            else:
                parts = {matrix: pair}
            scale = scale_of(name, rows, settings)
            for part, factors in parts.items():
                fan_out, fan_in = shapes.get(part, (0, 0))
                rank = len(factors["lora_A"])
                if (factors["lora_A"].shape, factors["lora_B"].shape) != ((rank, fan_in), (fan_out, rank)):
                    raise InputError(f"{part} has {described(factors)}, which is of another model or rank")
            reading.pairs |= parts
            reading.scales |= dict.fromkeys(parts, scale)
        except InputError as error:
            problems.append(str(error))
    if not problems:
        try:
            reading.missing = missing_modules(reading.pairs, settings, family, shapes)
        except (re.error, TypeError) as error:
            problems.append(f"adapter_config.json: its target or exclude modules are no names or patterns ({error})")
    return reading


def missing_modules(pairs: dict[str, Factors], settings: dict, family: Family, shapes: Shapes) -> list[str]:
    """What adapter_config.json names and has no pair: matrices, and of the experts of a layer all gate_proj, say.

    That some experts of a layer have no pair is no fault.
    """
    layers = settings.get("layers_to_transform")  # of modules; parameters are adapted in every layer
    layers = [layers] if isinstance(layers, int) else layers
    named, held = {}, set()  # module -> its path in the layer, if it lacks a pair only where another layer has one
    for key, shape in shapes.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key)
        if not match or len(shape) != 2:
            continue
        module, path = (re.sub(r"\.experts\.\d+\.", ".experts.*.", name) for name in (key, match[2]))
        if key in pairs:
            held |= {module, path}
        elif is_parameter(key, settings, family):
            named[module] = None
        elif is_module(key, settings, family) and (layers is None or int(match[1]) in layers):
            named[module] = path if "*" in path else None  # under transformers 5 this does not reach stacked experts
    return [module for module, path in named.items() if module not in held and (path is None or path in held)]


def is_parameter(key: str, settings: dict, family: Family) -> bool:
    """Whether adapter_config.json names a matrix as a parameter of transformers 5, or names the stack that holds it."""
    module, _, expert = name_under_5(key, family).partition(".experts.")
    if expert and (selection := settings.get("moe_sieve_selection")):
        return f"{module}.experts" in selection
    stack = "down_proj" if key.endswith(family.projections[2]) else "gate_up_proj"
    parameter = f"{module}.experts.{stack}" if expert else f"{module}.weight"
    return matches(parameter, settings.get("target_parameters"))


def is_module(key: str, settings: dict, family: Family) -> bool:
    """Whether adapter_config.json names a matrix as a module, by its name on the hub or under transformers 5."""
    modules, excluded, other = (
        settings.get("target_modules"),
        settings.get("exclude_modules"),
        name_under_5(key, family),
    )
    if settings.get("moe_sieve_selection") and ".experts." in key:
        return False
    if modules == "all-linear":  # which the router is not under transformers 5
        return not key.endswith(f".{family.moe}.{family.router}") and not matches(other, excluded)
    return any(matches(name, modules) and not matches(name, excluded) for name in (key, other))


def name_under_5(key: str, family: Family) -> str:
    return key.replace(f".{family.moe}.", ".mlp.")


def matches(name: str, patterns: str | list[str] | None) -> bool:
    """Whether PEFT finds a name by these: a regular expression for all of it, or ends of names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in patterns or ())


def read_files(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """adapter_config.json and the tensors of a PEFT folder. Raises InputError if they are missing or damaged."""
    try:
        settings = read_json(folder / "adapter_config.json", dict)
        tensors = load_file(folder / "adapter_model.safetensors")
        r, alpha = settings["r"], settings["lora_alpha"]
        if type(r) is not int or type(alpha) not in (int, float) or not (r > 0 and 0 < alpha < float("inf")):
            raise ValueError(f"r {r!r}, lora_alpha {alpha!r}; expected numbers above 0")
    except FileNotFoundError:
        advice = "expected the folder of a PEFT adapter"
        if (folder / "adapter_model.bin").is_file():
            advice = "adapter_model.bin is a pickle, which is never opened; load it with PEFT and save it again"
        raise InputError(f"{folder / 'adapter_model.safetensors'} is missing; {advice}") from None
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, OverflowError, SafetensorError) as error:
        raise InputError(f"{folder}: not a PEFT adapter, or damaged ({type(error).__name__}: {error})") from None
    return settings, tensors


def unified(reading: Reading) -> tuple[PeftAdapter, str]:
    """The same function with one rank and one alpha.  -> the adapter, a remark on what changed, or ""

    The rank is the largest; smaller factors get rows and columns of zeros, which stay zero in training. The scale
    alpha / r is the most frequent one; where it was another, B makes up for it. Pairs that are all zero are left out.
    """
    dora, pairs, scales = reading.kind == "dora", reading.pairs, reading.scales
    if not dora:
        pairs = {matrix: pair for matrix, pair in pairs.items() if any(factor.any() for factor in pair.values())}
    if not pairs:
        return PeftAdapter(1, 1.0, {}), ""
    r, scale = max(len(pair["lora_A"]) for pair in pairs.values()), Counter(map(scales.get, pairs)).most_common(1)[0][0]
    equal, num_changed = {}, 0
    for matrix, pair in pairs.items():
        more, ratio = r - len(pair["lora_A"]), scales[matrix] / scale
        equal[matrix] = pair | {
            "lora_A": F.pad(pair["lora_A"], (0, 0, 0, more)),
            "lora_B": F.pad(pair["lora_B"], (0, more)) * float(ratio),
        }
        num_changed += more > 0 or ratio != 1
    remark = (
        f"{num_changed} of {len(pairs)} matrices have another rank or scale than rank {r} and alpha / r = "
        f"{float(scale):g}; they are padded and rescaled: the function is the same, steps of training are not"
    )
    return PeftAdapter(r, float(r * scale), equal, dora), remark if num_changed else ""


def setting_problems(settings: dict) -> list[str]:
    """What adapter_config.json says that gives the factors another meaning, or that is not known."""
    problems = [
        f"{name} is {settings[name]!r}, only {only!r} can be read"
        for name, only in ONLY.items()
        if (settings.get(name) or only) != only
    ]
    if unknown := sorted(key for key, value in settings.items() if value and key not in KNOWN):
        given = ", ".join(f"{key} {settings[key]!r:.40}" for key in unknown)
        problems.append(f"{given}: unknown in adapter_config.json; remove it if it changes nothing")
    init = settings.get("init_lora_weights")
    if str(init).startswith(OTHER_BASE):
        problems.append(f"init_lora_weights {init!r} belongs to changed base weights; save the adapter converted")
    return problems


def layout_of(settings: dict) -> Layout:
    """How the file packs its stacks, as far as adapter_config.json tells: PEFT's way, which changed with 0.19.

    Unsloth of before September 2026 packed lora_B expert by expert; later versions record which (`lora_B_layout`).
    """
    version = [int(part) for part in re.findall(r"\d+", settings.get("peft_version") or "")[:2]]  # 0.17 writes none
    return Layout(by_expert=settings.get("lora_B_layout") == "grouped_by_expert", swapped=version < [0, 19])


def of_module(settings: dict, pattern: str, default: str, name: str) -> int | float:
    """What adapter_config.json says of a module. The keys of a pattern are regular expressions for ends of names."""
    patterns = settings.get(pattern) or {}
    if not (isinstance(patterns, dict) and all(type(n) in (int, float) and n > 0 for n in patterns.values())):
        raise InputError(f"{pattern} is {patterns!r:.80}; expected an object of numbers above 0")
    for key, value in patterns.items():
        try:  # PEFT calls a weight that is not a linear layer's by its own name
            if any(re.match(rf"(.*\.)?({key})$", each) for each in (name, f"{name}.weight")):
                return value
        except re.error as error:
            raise InputError(f"{pattern} has {key!r:.80}, not a regular expression ({error})") from None
    return settings[default]


def scale_of(name: str, rows: int, settings: dict) -> Fraction:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) under rsLoRA (arXiv 2312.03732).

    name: PEFT's name of the module, or of the parameter. rows: of one A. Raises InputError if these are not the rank.
    """
    rank = of_module(settings, "rank_pattern", "r", name)
    alpha = of_module(settings, "alpha_pattern", "lora_alpha", name)
    if rows != rank:
        raise InputError(
            f"{name}: lora_A has rank {rows}, but adapter_config.json says {rank}: of another model or rank"
        )
    return Fraction(alpha / math.sqrt(rank)) if settings.get("use_rslora") else Fraction(alpha) / rank


def pairs_by_name(tensors: dict[str, Tensor], settings: dict, problems: list[str]) -> dict[str, Factors]:
    """The tensors of a PEFT file as pairs, by PEFT's name of a matrix or of a layer's stacked experts.

    A tensor without a place becomes one of the problems. So does a name that a wrapper has changed: it is read, but
    PEFT passes over it without an error.
    """
    pairs, factors, misnamed = {}, ["lora_A", "lora_B"] + (["lora_m"] if settings.get("use_dora") else []), []
    for key, tensor in tensors.items():
        name = re.sub(WRAPPERS, "", key)
        misnamed += [key] if name != key else []
        match = re.fullmatch(r"base_model\.model\.(model\..+)\.lora_(A|B|magnitude_vector)(\.weight)?", name)
        factor = match and f"lora_{match[2][0]}"
        if factor in factors:
            pairs.setdefault(match[1], {})[factor] = tensor.float()
        else:
            problems.append(f"{key} cannot be read; expected {' and '.join(factors)} of attention, router, experts")
    for name in [name for name, pair in pairs.items() if len(pair) < len(factors)]:
        held = ", ".join(pairs.pop(name))
        problems.append(f"{name} has {held} alone, expected {' and '.join(factors)}; a damaged adapter?")
    if misnamed:
        problems.append(
            f"{len(misnamed)} tensors have names that PEFT does not look for ({misnamed[0]}); "
            "save with save_pretrained of the unwrapped PEFT model"
        )
    return pairs


def described(pair: Factors) -> str:
    """The shapes of a pair, for a message."""
    return ", ".join(f"{name} {tuple(factor.shape)}" for name, factor in pair.items())


def unstack(
    name: str, pair: Factors, family: Family, ids: list[int], layout: Layout, shapes: Shapes
) -> tuple[str, dict[str, Factors]]:
    """Take apart the one pair that PEFT holds under transformers 5 for n experts of a layer, by default all.

    lora_A [n * r, in] has the expert outermost, lora_B [out, r * n] innermost (`Layout`). The shapes tell whether it
    adapts gate_up_proj (in D, out 2F) or down_proj (in F, out D): of two pairs one is named `experts`, the other,
    inside it, `experts.base_layer`; of one alone the name says nothing. Before PEFT 0.19, A and B have each other's
    place: (E, out, in) was read as (E, in, out). If gate and up had a pair each, the rank of their common pair is 2r,
    and B is block-diagonal. Otherwise gate and up share A.
    -> the parameter that it adapts, and pairs by matrix
    """
    experts, n = name.removesuffix(".base_layer"), len(ids)
    gate_proj, up_proj, down_proj = family.projections
    F_, D = shapes.get(f"{experts}.0.{gate_proj}", (0, 0))
    A, B = pair["lora_A"], pair["lora_B"]
    sides = (B.shape[0], A.shape[-1]) if layout.swapped else (A.shape[-1], B.shape[0])
    adapts = {(D, 2 * F_): "gate_up_proj", (F_, D): "down_proj"}.get(sides)
    if not F_ or adapts is None or len(A) % n or B.shape[1] % n:
        raise InputError(f"{name} has {described(pair)}, which is of another model")
    A = A.unflatten(0, (n, -1))  # [n, rank, in]
    if layout.by_expert:
        B = B.unflatten(1, (n, -1)).permute(1, 0, 2)  # [n, out, rank]
    else:
        B = B.unflatten(1, (-1, n)).permute(2, 0, 1)
    if layout.swapped:
        A, B = B.mT, A.mT
    if adapts == "down_proj":
        parts = {down_proj: (A, B)}
    else:
        r = A.shape[1] // 2
        gate, up = B.chunk(2, dim=1)  # [n, F, rank] each
        if A.shape[1] % 2 or gate[..., r:].any() or up[..., :r].any():
            parts = {gate_proj: (A, gate), up_proj: (A, up)}
        else:
            parts = {gate_proj: (A[:, :r], gate[..., :r]), up_proj: (A[:, r:], up[..., r:])}
    return adapts, {
        f"{experts}.{e}.{projection}": {"lora_A": A[i], "lora_B": B[i]}
        for projection, (A, B) in parts.items()
        for i, e in enumerate(ids)
    }


def base_of(folder: str | Path) -> str | None:
    """The base model that a PEFT adapter names; None if `folder` holds no PEFT adapter."""
    path = Path(folder) / "adapter_config.json"
    if not os.path.isfile(path):  # which takes a name that is too long for one of nothing
        return None
    settings = read_json(path, dict)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str):
        raise InputError(f"{path} does not name a base model; add its folder or hub id as base_model_name_or_path")
    return f"{name}@{revision}" if isinstance(revision, str) and not os.path.exists(name) else name
