"""An adapter on disk: adapter.json (what it is) and adapter.safetensors (what trained), read and written.

    save_adapter(adapter_state(model), folder, model.adapter)
    load_adapter(model, folder)                                  # attach it to its base model

Dimensions: L layers with experts, E experts per layer.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from command.cli import InputError
from command.files import seal
from hellora import Adapter, attach, fill
from hub.config import MoEConfig
from lora import Scatter, pad, positions_of, sparsify
from model import MoETransformer, whole


def adapter_state(model: MoETransformer) -> dict[str, Tensor]:
    """The adapter's trained tensors by name, whole and on the CPU (a collective under FSDP: all ranks must call it)."""
    scatters = ((name, module) for name, module in model.named_modules() if isinstance(module, Scatter))
    state = {f"{name}.positions": module.bits() for name, module in scatters}
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            state[name] = whole(parameter)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_adapter(state: dict[str, Tensor], folder: Path, adapter: Adapter, **about) -> None:
    """Write adapter.safetensors (`adapter_state`) and adapter.json: the Adapter, whatever else, a SHA-256 of it all."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter.safetensors", metadata={"format": "pt"})
    about = asdict(adapter) | about
    text = json.dumps(about | {"sha256": seal(about, folder / "adapter.safetensors")}, indent=1)
    (folder / "adapter.json").write_text(text + "\n", encoding="utf-8")


def read_adapter(folder: str | Path) -> tuple[Adapter, dict[str, Tensor]]:
    """What `save_adapter` wrote: the Adapter and its tensors. Raises InputError for a missing or damaged file.

    Experts of unlike ranks come out filled with zeros to the largest of them, as a plain adapter of that rank.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
        if about.pop("sha256") != seal(about, folder / "adapter.safetensors"):
            raise ValueError("its sha256 is another: it is not as it was saved")
        stored = load_file(folder / "adapter.safetensors")
        state = {name: positions_of(t) if name.endswith("positions") else t for name, t in stored.items()}
        adapter = Adapter(*(about[key] for key in Adapter.__dataclass_fields__))
        if adapter.ranks is not None:
            ranks = torch.tensor(adapter.ranks)
            state, r = pad(state, ranks), int(ranks.max())
            adapter = replace(adapter, r=r, alpha=adapter.alpha * r / adapter.r, ranks=None)
        return adapter, state
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is missing; want the adapter/ folder of a run") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder}: not an adapter, or a damaged one ({type(error).__name__}: {error})") from None


def hot_mask(hot: list[list[int]], config: MoEConfig) -> Tensor:
    """An Adapter's lists of experts as a mask for this model.  -> bool [L, E]"""
    mask = torch.zeros(len(config.moe_layers), config.num_experts, dtype=torch.bool)
    if len(hot) != len(mask) or not all(0 <= e < config.num_experts for ids in hot for e in ids):
        raise InputError(
            f"the adapter is for {len(hot)} layers and expert {max(map(max, filter(None, hot)), default=-1)}; "
            f"the model has {len(mask)} layers of {config.num_experts} experts"
        )
    for row, ids in zip(mask, hot, strict=True):
        row[ids] = True
    return mask


def read_hot(path: str | Path, config: MoEConfig) -> Tensor:
    """A file of expert lists, one list a layer (or an adapter.json, which has them as `hot`).  -> bool [L, E]"""
    try:
        about = json.loads(Path(path).read_text(encoding="utf-8"))
        hot = about["hot"] if isinstance(about, dict) else about
        lists = isinstance(hot, list) and any(hot) and all(isinstance(ids, list) for ids in hot)
        if not lists or any(type(e) is not int for ids in hot for e in ids):
            raise ValueError(f"it holds {hot!r:.60}")
        mask = hot_mask(hot, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: want a JSON list of expert ids for every layer ({error})") from None
    return mask


def load_adapter(model: MoETransformer, folder: str | Path) -> None:
    """Attach the adapter of a folder to its base model. Raises InputError if it does not fit to the last tensor."""
    attach_adapter(model, *read_adapter(folder), folder)


def attach_adapter(model: MoETransformer, adapter: Adapter, state: dict[str, Tensor], folder: str | Path) -> None:
    """Attach what `read_adapter` gave. Raises InputError, naming `folder`, if it does not fit to the last tensor."""
    hot = hot_mask(adapter.hot, model.config)
    attach(model, hot, adapter.r, adapter.alpha, kind=adapter.kind, targets=adapter.targets, seed=adapter.seed)
    if model.adapter != adapter:
        raise InputError(f"{folder}: lora_A drawn from seed {adapter.seed} has another checksum; a damaged adapter?")
    positions = {name: tensor for name, tensor in state.items() if name.endswith("positions")}
    if positions:
        sparsify(model, {name.partition(".parametrizations")[0]: tensor for name, tensor in positions.items()})
    values = {name: tensor for name, tensor in state.items() if name not in positions}
    fill_factors(model, values, folder)


@torch.no_grad()
def fill_factors(model: MoETransformer, state: dict[str, Tensor], source: str | Path) -> None:
    """Set the trained factors of an attached model. Raises InputError, naming `source`, if one does not fit."""
    ours = {name: p for name, p in model.named_parameters() if "lora_" in name and p.requires_grad}
    for name in sorted(ours.keys() ^ state.keys()):
        raise InputError(f"{source}: {name} is {'missing' if name in ours else 'unexpected'}; a damaged adapter?")
    for name, parameter in ours.items():
        if parameter.shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, the model wants {tuple(parameter.shape)}"
            raise InputError(f"{source}: {name} is {shapes}")
        fill(parameter, state[name])
