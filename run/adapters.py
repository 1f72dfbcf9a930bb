"""An adapter on disk: adapter.json (what it is) and adapter.safetensors (what trained), read and written.

    save_adapter(adapter_state(model), folder, model.adapter)
    load_adapter(model, folder)                          # attach it, or one that PEFT saved, to its base model

Dimensions: L layers with experts, E experts per layer, r rank.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from command.cli import InputError, note
from command.files import parse_json, read_json, seal
from diagnosis.findings import AS_READ, REORDERED, UNUSABLE, of_order, of_pairs
from hellora import TARGETS, Adapter, adapted_linears, adapted_paths, attach, count_parameters, fill, init_factors
from hub.checkpoint import Stored, stored
from hub.peft import Factors, Layout, PeftAdapter, Reading, Shapes, read_pairs, unified
from hub.weights import PROJECTIONS, full_tensor, hub_key, hub_views
from lori import Scatter, positions_of, sparsify
from model import MoEConfig, MoETransformer
from neighbours.ranks import pad

FACTORS = ("lora_A", "lora_B", "lora_m")  # of a pair; the last one of DoRA


def adapter_state(model: MoETransformer) -> dict[str, Tensor]:
    """The adapter's trained tensors by name, complete and on the CPU. Under FSDP every process must call it."""
    scatters = ((name, module) for name, module in model.named_modules() if isinstance(module, Scatter))
    state = {f"{name}.positions": module.bits() for name, module in scatters}
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            state[name] = full_tensor(parameter)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def placement_digest(model: MoETransformer) -> str:
    """Where the adapter of a model is: equal for equal experts, kind, rank, targets and entries of a sparse B."""
    kept = {name: m.positions.tolist() for name, m in model.named_modules() if isinstance(m, Scatter)}
    return seal(asdict(replace(model.adapter, ranks=None, expert_rank=None)) | kept)  # ranks grow


def report(model: MoETransformer) -> Iterator[str]:
    """Lines that say what trains: the adapted experts of every layer, other modules, the number of parameters."""
    trainable, total = count_parameters(model)
    adapter, E = model.adapter, model.config.num_experts
    if adapter is not None:
        for i, ids in zip(model.config.moe_layers, adapter.hot, strict=True):
            shown = "all" if len(ids) == E else " ".join(map(str, ids))
            yield f"layer {i:2d}: {len(ids)} of {E} experts adapted: {shown}"
        paths = (path.split(".", 1)[1] for path in adapted_paths(model.config, adapter.targets))
        modules = ", ".join(paths) or "none"
        of_experts = f" (experts {adapter.expert_rank})" if adapter.expert_rank else ""
        yield f"rank {adapter.r}{of_experts}, alpha {adapter.alpha:g}; other modules adapted in every layer: {modules}"
    yield f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / total:.4f} %)"


def save_adapter(state: dict[str, Tensor], folder: Path, adapter: Adapter, **origin) -> None:
    """Write adapter.safetensors (`adapter_state`) and adapter.json: the Adapter, `origin`, a checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter.safetensors", metadata={"format": "pt"})
    content = asdict(adapter) | origin
    text = json.dumps(content | {"sha256": seal(content, folder / "adapter.safetensors")}, indent=1)
    (folder / "adapter.json").write_text(text + "\n", encoding="utf-8")


def read_adapter(folder: str | Path) -> tuple[Adapter, dict[str, Tensor]]:
    """What `save_adapter` wrote: the Adapter and its tensors. Raises InputError for a damaged file.

    Experts of different ranks are padded with zeros to the largest of them, which is then the rank of all experts.
    """
    folder = Path(folder)
    try:
        content = parse_json((folder / "adapter.json").read_bytes(), folder / "adapter.json", dict)
        if content.pop("sha256") != seal(content, folder / "adapter.safetensors"):
            raise ValueError("sha256 mismatch: the files are not as they were saved")
        state = load_file(folder / "adapter.safetensors")
        state = {name: positions_of(t) if name.endswith("positions") else t for name, t in state.items()}
        adapter = Adapter(*(content[key] for key in Adapter.__dataclass_fields__))
        if adapter.ranks is not None:
            ranks = torch.tensor(adapter.ranks)
            state, adapter = pad(state, ranks), replace(adapter, ranks=None, expert_rank=int(ranks.max()))
    except FileNotFoundError as error:
        if not folder.is_dir() and (folder.parent / "config.json").is_file():
            ended = "has no adapter: its training has not ended; wait for it, or continue it with --resume"
            raise InputError(f"{folder.parent} {ended}") from None
        raise InputError(f"{error.filename} is missing; expected the adapter/ folder of a run") from None
    except InputError:
        raise
    except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:
        raise InputError(f"{folder}: not an adapter, or a damaged one ({type(error).__name__}: {error})") from None
    return adapter, state


def hot_mask(hot: list[list[int]], config: MoEConfig) -> Tensor:
    """An Adapter's lists of experts as a mask for this model.  -> bool [L, E]"""
    mask = torch.zeros(len(config.moe_layers), config.num_experts, dtype=torch.bool)
    if len(hot) != len(mask):
        raise InputError(f"experts are listed for {len(hot)} layers; the model has experts in {len(mask)} layers")
    if unknown := [e for ids in hot for e in ids if not 0 <= e < config.num_experts]:
        raise InputError(f"expert {unknown[0]} is listed; the model's experts are 0 to {config.num_experts - 1}")
    for row, ids in zip(mask, hot, strict=True):
        row[ids] = True
    return mask


def read_hot(path: str | Path, config: MoEConfig) -> Tensor:
    """A file of expert lists, one list per layer, or an adapter.json, which has them as `hot`.  -> bool [L, E]"""
    content = read_json(path)
    hot = content.get("hot") if isinstance(content, dict) else content
    lists = isinstance(hot, list) and any(hot) and all(isinstance(ids, list) for ids in hot)
    if not lists or any(type(e) is not int for ids in hot for e in ids):
        raise InputError(f"{path}: expected a JSON list of expert ids for every layer; it holds {hot!r:.60}")
    if twice := [e for ids in hot for e, times in Counter(ids).items() if times > 1]:
        raise InputError(f"{path}: expert {twice[0]} is listed twice for one layer; list it once")
    try:
        return hot_mask(hot, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def load_adapter(model: MoETransformer, folder: str | Path) -> None:
    """Attach the adapter in a folder, ours or PEFT's, to its base model. Raises InputError unless every tensor fits."""
    adapter, state = read_any_adapter(folder, model.config)
    place_adapter(model, adapter, state)
    fill_adapter(model, adapter, state, folder)


def place_adapter(model: MoETransformer, adapter: Adapter, state: dict[str, Tensor]) -> None:
    """Give a model, which may be on the meta device, the pairs of an adapter. `fill_adapter` fills them."""
    hot = hot_mask(adapter.hot, model.config)
    attach(
        model,
        hot,
        adapter.r,
        adapter.alpha,
        kind=adapter.kind,
        targets=adapter.targets,
        seed=adapter.seed,
        expert_rank=adapter.expert_rank,
    )
    positions = {name: tensor for name, tensor in state.items() if name.endswith("positions")}
    if positions:
        sparsify(model, {name.partition(".parametrizations")[0]: tensor for name, tensor in positions.items()})


def fill_adapter(model: MoETransformer, adapter: Adapter, state: dict[str, Tensor], folder: str | Path) -> None:
    """Set what `place_adapter` placed. Raises InputError, naming `folder`, unless every tensor fits."""
    if model.adapter != adapter:
        drawn = f"lora_A drawn from seed {adapter.seed}"
        raise InputError(f"{folder}: {drawn} has a different checksum; is the adapter damaged?")
    fill_factors(model, {name: tensor for name, tensor in state.items() if not name.endswith("positions")}, folder)


@torch.no_grad()
def fill_factors(model: MoETransformer, state: dict[str, Tensor], source: str | Path) -> None:
    """Set the trained factors of an attached model. A magnitude of DoRA that is not given stays the norm of W.

    Raises InputError, naming `source`, if one does not fit.
    """
    ours = {name: p for name, p in model.named_parameters() if "lora_" in name and p.requires_grad}
    advice = "is the adapter damaged, or of another model?"
    for name, parameter in sorted(ours.items()):
        held = state.get(name)
        if held is None and name.endswith("lora_m"):
            continue
        if held is None or held.shape != parameter.shape:
            what = "missing" if held is None else f"of shape {tuple(held.shape)}"
            raise InputError(f"{source}: {name} is {what}, expected {tuple(parameter.shape)}; {advice}")
    if unexpected := sorted(state.keys() - ours.keys()):
        raise InputError(f"{source}: {unexpected[0]} is unexpected; {advice}")
    for name, tensor in state.items():
        fill(ours[name], tensor)


# ------------------------------------------------------------------------------- matrix by matrix, and from PEFT


def weight_shapes(config: MoEConfig) -> Shapes:
    """The shape of every weight of a model, by the hub's key."""
    with torch.device("meta"):
        views = hub_views(MoETransformer(config))
    return {key: tuple(view.shape) for key, view in views.items()}


def hub_shapes(config: MoEConfig) -> Shapes:
    """The shape of every weight of a model, by the hub's key without `.weight`."""
    return {key.removesuffix(".weight"): shape for key, shape in weight_shapes(config).items()}


def weights_of(folder: Path, config: MoEConfig) -> dict[str, Stored]:
    """A checkpoint's weights by key, in the order of its files. Raises InputError if they do not fit the config."""
    return stored(folder, weight_shapes(config), config.family)


def adapted_matrices(adapter: Adapter, config: MoEConfig) -> dict[str, list[str]]:
    """Our modules that hold factors, and the matrices that these adapt: one, or those of a layer's hot experts."""
    modules = {name: [name] for name in adapted_linears(config, adapter.targets)}
    for i, ids in zip(config.moe_layers, adapter.hot, strict=True):
        for projection in PROJECTIONS if ids else ():
            stack = f"layers.{i}.mlp.experts.lora.{projection}"
            modules[stack] = [f"layers.{i}.mlp.experts.{e}.{projection}" for e in ids]
    return modules


@torch.no_grad()
def dense_factors(
    adapter: Adapter, state: dict[str, Tensor], config: MoEConfig, folder: str | Path
) -> dict[str, Factors]:
    """The factors of `read_adapter` by matrix, dense: LoRI's A is drawn again, its sparse B spread out.

    Raises InputError, naming `folder`, for an adapter that is damaged or does not fit the model.
    """
    with torch.device("meta"):
        model = MoETransformer(config)
    place_adapter(model, adapter, state)
    for name, factor in list(model.named_parameters()):
        if "lora_" in name:
            module, _, leaf = name.rpartition(".")
            unknown = torch.full_like(factor, torch.nan, device="cpu")  # what a file lacks is then noticed
            setattr(model.get_submodule(module), leaf, nn.Parameter(unknown, factor.requires_grad))
    if adapter.kind == "lori":
        init_factors(model)
    for name, _ in model.named_parameters():
        if name.endswith("lora_m") and name not in state:  # only an adapter of PEFT may lack it
            raise InputError(f"{folder}: {name} is missing; is the adapter damaged, or of another model?")
    fill_adapter(model, adapter, state, folder)
    by_matrix = {}
    for name, matrices in adapted_matrices(adapter, config).items():
        module = model.get_submodule(name)
        factors = {factor: getattr(module, factor).detach() for factor in FACTORS if hasattr(module, factor)}
        if matrices == [name]:
            by_matrix[name] = factors
        else:  # those of hot experts are stacked
            for i, matrix in enumerate(matrices):
                by_matrix[matrix] = {factor: stack[i] for factor, stack in factors.items()}
    return by_matrix


def reading_of(adapter: Adapter, factors: dict[str, Factors], config: MoEConfig) -> Reading:
    """The adapter of a run as if it had been read from a file of PEFT."""
    pairs = {hub_key(matrix, config.family): pair for matrix, pair in factors.items()}
    return Reading(adapter.kind, pairs, dict.fromkeys(pairs, Fraction(adapter.alpha) / adapter.r))


def read_loosely(folder: str | Path, config: MoEConfig, layout: Layout | None = None) -> Reading:
    """The pairs in a folder by the hub's keys, with whatever is wrong with them: a run's adapter, or one of PEFT."""
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        return read_pairs(folder, config.family, config.num_experts, hub_shapes(config), layout)
    adapter, state = read_adapter(folder)
    return reading_of(adapter, dense_factors(adapter, state, config, folder), config)


def readings_of(folder: str | Path, config: MoEConfig) -> dict[str, Reading]:
    """The adapter as it says it is packed and, if that makes a difference, with lora_B of stacks in the other order."""
    reading = read_loosely(folder, config)
    experts = (pair for key, pair in reading.pairs.items() if ".experts." in key)
    moved = any(pair["lora_A"].any() and pair["lora_B"].any() for pair in experts)
    if max(reading.packed.values(), default=1) == 1 or not moved:
        return {AS_READ: reading}
    other = reading.layout._replace(by_expert=not reading.layout.by_expert)
    return {AS_READ: reading, REORDERED: read_loosely(folder, config, other)}


def check_usable(readings: dict[str, Reading], config: MoEConfig, folder: str | Path) -> None:
    """Raise InputError for what `export.py check` finds unusable, and note its other faults, in the same words."""
    for finding in (*of_pairs(readings[AS_READ], config), *of_order(readings, config)):
        if finding.name in UNUSABLE:
            raise InputError(f"{folder}: {finding.what}")
        if finding.is_fault:
            note(f"{folder}: {finding.what}. {finding.means}")


def read_own_adapter(folder: str | Path, config: MoEConfig) -> tuple[Adapter, dict[str, Tensor], dict[str, Factors]]:
    """The adapter of a run as of `read_adapter`, and its `dense_factors`. Raises InputError for one of no use."""
    adapter, state = read_adapter(folder)
    factors = dense_factors(adapter, state, config, folder)
    check_usable({AS_READ: reading_of(adapter, factors, config)}, config, folder)
    return adapter, state, factors


def from_peft(loaded: PeftAdapter, config: MoEConfig) -> tuple[Adapter, dict[str, Tensor]]:
    """PEFT's adapter as `read_adapter` gives ours. An expert is hot if one of its matrices has a pair.

    What a hot expert or a module of `targets` lacks gets zeros: they add nothing, and learn nothing. A module whose
    magnitudes DoRA lacks has none in the result, for which `fill_factors` leaves the norm of W. Raises InputError if
    it adapts nothing, or a matrix that no value of `targets` names.
    """
    experts = [list(range(config.num_experts))] * len(config.moe_layers)
    every = Adapter("lora", loaded.r, loaded.alpha, "shared", 0, experts)
    names = {hub_key(m, config.family): m for matrices in adapted_matrices(every, config).values() for m in matrices}
    if not loaded.pairs or loaded.pairs.keys() - names.keys():
        what = ", ".join(sorted(loaded.pairs.keys() - names.keys())[:3]) or "nothing"
        raise InputError(f"it adapts {what}; expected {', '.join(adapted_paths(config, 'shared'))} or experts")
    pairs = {names[key]: pair for key, pair in loaded.pairs.items()}
    hot, others = {layer: set() for layer in config.moe_layers}, set()
    for matrix in pairs:
        _, layer, path = matrix.split(".", 2)
        if path.startswith("mlp.experts."):
            hot[int(layer)].add(int(path.split(".")[2]))
        else:
            others.add(path)
    fitting = [name for name, paths in TARGETS.items() if others <= set(paths)]
    targets = min(fitting, key=lambda name: len(TARGETS[name]))
    kind = "dora" if loaded.dora else "lora"
    adapter = replace(every, kind=kind, targets=targets, hot=[sorted(ids) for ids in hot.values()])
    shapes, state = hub_shapes(config), {}
    for module, matrices in adapted_matrices(adapter, config).items():
        fan_out, fan_in = shapes[hub_key(matrices[0], config.family)]
        zeros = {"lora_A": torch.zeros(loaded.r, fan_in), "lora_B": torch.zeros(fan_out, loaded.r)}
        lacking = [matrix for matrix in matrices if matrix not in pairs]
        if loaded.dora and not lacking:
            zeros["lora_m"] = torch.zeros(fan_out)
        elif loaded.dora and len(lacking) < len(matrices):
            raise InputError(
                f"DoRA adapts {module.rpartition('.')[2]} of some experts but not {lacking[0]}; expected all"
            )
        for factor in zeros:
            parts = [pairs.get(matrix, zeros)[factor] for matrix in matrices]
            state[f"{module}.{factor}"] = parts[0] if matrices == [module] else torch.stack(parts)
    return adapter, state


def read_any_adapter(folder: str | Path, config: MoEConfig) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter in a folder: a run's, ours (adapter.json), or one that PEFT saved (adapter_config.json).

    Raises InputError for what `export.py check` finds unusable; that the experts did not train is noted.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        inside = folder / "adapter"
        adapter, state, _ = read_own_adapter(inside if (inside / "adapter.json").is_file() else folder, config)
        return adapter, state
    readings = readings_of(folder, config)
    check_usable(readings, config, folder)
    loaded, remark = unified(readings[AS_READ])
    if remark:
        note(f"{folder}: {remark}")
    try:
        return from_peft(loaded, config)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


# ---------------------------------------------------------------------------------------- what a run starts from


def read_start(folder: Path, config: MoEConfig, kind: str, seed: int) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter from which a run starts, whose pairs are of this kind. Raises InputError if it cannot start there."""
    adapter, state = read_any_adapter(folder, config)
    given = f"--init-adapter {folder}"
    if adapter.kind != kind:
        raise InputError(f"{given} has pairs of kind {adapter.kind}, and --method trains {kind}; give another --method")
    if kind == "lori" and adapter.seed != seed:
        raise InputError(f"{given} has its A from --seed {adapter.seed}; give the same")
    if any(name.endswith("positions") for name in state):
        raise InputError(f"{given} holds only a tenth of B (LoRI-S); expected a dense adapter")
    return adapter, state
