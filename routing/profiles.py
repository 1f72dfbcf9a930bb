"""Routing counts and profile.json, the file that holds them.

    save_profile(counted, "profile.json")
    counted = load_profile("profile.json")                    # every value is checked

Dimensions: L layers with experts, E experts per layer.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from command.cli import InputError, say
from command.files import parse_json, writable, write_text
from model import MoEConfig


@dataclass(frozen=True)
class RoutingProfile:
    """How a task uses the experts. Every row of counts sums to num_tokens * num_experts_per_tok."""

    counts: Tensor  # int64 [L, E] how many tokens chose the expert
    gate_mass: Tensor  # float64 [L, E] sum of the routing weights they gave it
    num_tokens: int  # real tokens seen
    num_experts_per_tok: int
    model: str | None = None  # where and on what they were counted: the file has it
    task: str | None = None
    data: str | None = None  # data.digest of the training examples, of which a sample was counted
    weights: str | None = None  # digest of the base model's weights
    began: str | None = None  # the date that a chat template wrote into the examples
    half_counts: Tensor | None = None  # int64 [L, E] those of every second batch: do two halves have the same hot set?

    def title(self) -> str:
        K, E = self.num_experts_per_tok, self.counts.shape[1]
        return f"Routing of {self.model} on {self.task}: {self.num_tokens:,} tokens, {K} of {E} experts per token"


def save_profile(profile: RoutingProfile, path: str | Path) -> None:
    """Write profile.json atomically. Raises InputError if it cannot be written. Call it on one process."""
    content = {key: value for key, value in vars(profile).items() if value is not None}
    write_text(writable(path), json.dumps(content, default=Tensor.tolist) + "\n")


def load_profile(path: str | Path, config: MoEConfig | None = None) -> RoutingProfile:
    """Read profile.json. Raises InputError, which names the file, for values that counting cannot have written.

    config: if given, of the model that it must have been counted on.
    """
    try:
        profile = checked(parse_json(Path(path).read_bytes(), "the file"))
    except InputError as error:
        raise InputError(f"{path}: {error}; write it again with profile.py") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); profile.py --out makes such a file") from None
    if config is not None:
        check_fits(profile, config, path)
    return profile


def checked(content: object) -> RoutingProfile:
    """The contents of profile.json as a RoutingProfile. Raises InputError that says what is wrong with them."""
    kinds = dict(model=str, task=str, num_tokens=int, num_experts_per_tok=int, counts=list, gate_mass=list)
    if not isinstance(content, dict):
        raise InputError(f"it holds {content!r:.40}; expected an object with {', '.join(kinds)}")
    for key, kind in kinds.items():
        if type(content.get(key)) is not kind:
            raise InputError(f"{key} is {content.get(key)!r:.40}; expected {kind.__name__}")
    num_tokens, K = content["num_tokens"], content["num_experts_per_tok"]
    if not (0 < num_tokens < 2**53 and 0 < K < 2**20):
        raise InputError(f"num_tokens is {num_tokens} and num_experts_per_tok {K}; both must be above 0")
    try:
        counts, gate_mass = torch.tensor(content["counts"]), torch.tensor(content["gate_mass"], dtype=torch.float64)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged, not numbers, too large
        raise InputError(f"counts or gate_mass is not a table [layers][experts] of numbers ({error})") from None
    if counts.dtype != torch.int64 or counts.dim() != 2:
        raise InputError("counts is not a table [layers][experts] of whole numbers")
    if counts.shape != gate_mass.shape:
        raise InputError(f"counts has shape {tuple(counts.shape)}, gate_mass {tuple(gate_mass.shape)}")
    for key, values in (("counts", counts), ("gate_mass", gate_mass)):
        wrong = (~(values.isfinite() & (values >= 0))).nonzero().tolist()
        if wrong:
            layer, e = wrong[0]
            raise InputError(f"{key} of layer {layer}, expert {e} is {values[layer, e]:g}; expected 0 or more")
    for layer, total in enumerate(counts.double().sum(-1).tolist()):
        if total != num_tokens * K:
            raise InputError(f"counts of layer {layer} sum to {total:.0f}, not to {num_tokens} tokens x {K} experts")
    origin = content.get("data"), content.get("weights"), content.get("began")  # published counts have none
    if not all(isinstance(part, str | None) for part in origin):
        raise InputError(f"data, weights and began are {origin!r:.60}; expected str")
    half = checked_half(content.get("half_counts"), counts)
    return RoutingProfile(counts, gate_mass, num_tokens, K, content["model"], content["task"], *origin, half)


def checked_half(table: object, counts: Tensor) -> Tensor | None:
    """The counts of every second batch, if the file has them. Raises InputError unless they are a part of `counts`."""
    if table is None:
        return None
    try:
        half = torch.tensor(table)
        if half.dtype == torch.int64 and half.shape == counts.shape and ((half >= 0) & (half <= counts)).all():
            return half
    except (ValueError, TypeError, RuntimeError):
        pass
    raise InputError("half_counts is not a part of counts; count again with profile.py")


def check_fits(profile: RoutingProfile, config: MoEConfig, path: str | Path) -> None:
    """Raise InputError if the profile read from `path` was counted on a model of another shape."""
    counted = (*profile.counts.shape, profile.num_experts_per_tok)
    expected = (len(config.moe_layers), config.num_experts, config.num_experts_per_tok)
    if counted != expected:
        sizes = "{} layers of {} experts, {} per token".format
        raise InputError(
            f"{path} is of a model with {sizes(*counted)}; this one has {sizes(*expected)}; "
            "name the model that was counted, or profile this one"
        )


def note_origin(profile: RoutingProfile, model: str, task: str, data: str, weights: str) -> None:
    """Say if a profile that was read is of another model, task, training data or weights than a run has (digests)."""
    if (profile.model, profile.task) != (model, task):
        say(f"note: the profile is of {profile.task} on {profile.model}, and this run is {task} on {model}")
    elif profile.data not in (None, data):
        say(f"note: the profile was counted on other training data of {task} than this run's")
    elif profile.weights not in (None, weights):
        say(f"note: the profile was counted on other weights of {model} than this run's")
