"""What a run starts from: the checkpoint, the rows, the counts or the adapter that are given. All of it is checked.

run = prepare(parse_settings(argv))       # reads and checks; the processes of torchrun start here
"""

from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

import data
import hellora
from command import cli
from command.cli import InputError, note, say
from command.files import json_sha256
from hub.checkpoint import resolve
from hub.config import ignore_keys
from machine.processes import Processes, start_processes
from model import MoEConfig, read_config
from neighbours import drlora
from recipes.methods import METHODS, Method, flat_rank, num_hot_experts
from routing.profiles import RoutingProfile, load_profile
from run import adapters
from run.folder import check_out
from run.report import package
from run.schedule import warmup_steps
from run.settings import Settings, start_of
from run.subject import BEST, began, content_of, run_config


@dataclass(frozen=True)
class Run:
    """What the parts of a run share."""

    settings: Settings
    folder: Path  # checkpoint of the base model
    config: MoEConfig
    content: dict  # what config.json says of the base model and the data: digests, the date, what ends an answer
    processes: Processes
    items: list[data.Encoded]
    held_out: list[data.Encoded]  # for validation; none without
    steps: int
    counted: RoutingProfile | None  # None: the experts have yet to be counted
    hot: Tensor | None  # bool [L, E], the adapted experts; None: they have yet to be chosen, or every weight trains
    start: dict[str, Tensor] | None  # tensors of --init-adapter
    shard: str = "none"  # how the processes hold the base model, see `load_for_process`

    @property
    def method(self) -> Method:
        return METHODS[self.settings.method]

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.items) // self.settings.batch)

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the weights, and of the computation. Whatever trains is float32; a frozen base need not be."""
        dtype = getattr(torch, self.settings.dtype)
        return (dtype if self.method.adapts else torch.float32), dtype


def prepare(settings: Settings) -> Run:
    """Everything that a run needs before its experts are counted. Raises InputError for what does not fit."""
    ignore_keys(settings.ignore_config_keys)
    if settings.report_to != "none":
        package(settings.report_to)  # an error now, not after the download
    folder = resolve(settings.model)
    config = read_config(folder)
    settings, hot, start = read_given(settings, config)
    settings = sized(settings, config)
    if cli.is_main_process():
        check_out(Path(settings.out), asdict(settings))  # before --resume reads anything in it
    counted = read_counts(settings, config) if METHODS[settings.method].adapts else None
    processes = start_processes()
    # A run that continues, or uses counts, has their date: a chat template may write it into the rows.
    date = processes.once(lambda: began(run_config(settings.out), counted and vars(counted)))
    described, items, held_out = read_data(settings, folder, config, date)
    steps = settings.steps or settings.epochs * -(-len(items) // settings.batch)
    if METHODS[settings.method].grows:
        drlora.growth_steps(steps)  # an error now, not in the middle of the run
    warmup_steps(settings.lr_warmup, steps)  # the same
    given = processes.once(lambda: content_of(folder, settings.init_adapter) | given_content(settings, config, hot))
    content = given | described
    return Run(settings, folder, config, content, processes, items, held_out, steps, counted, hot, start)


def read_given(settings: Settings, config: MoEConfig) -> tuple[Settings, Tensor | None, dict[str, Tensor] | None]:
    """What --init-adapter or a file of --experts brings.  -> settings, experts bool [L, E], adapter's tensors

    An adapter to start from brings its rank, alpha and targets.
    """
    s = settings
    if s.init_adapter:
        folder = start_of(s.init_adapter).adapter
        if folder.name in BEST.values():
            note(f"{folder}: the run starts from the best by validation loss")
        adapter, tensors = adapters.read_start(folder, config, METHODS[s.method].kind, s.seed)
        s = replace(s, rank=adapter.r, expert_rank=adapter.expert_rank, alpha=adapter.alpha, targets=adapter.targets)
        return s, adapters.hot_mask(adapter.hot, config), tensors
    if s.experts and s.experts not in hellora.POLICIES:
        return s, adapters.read_hot(s.experts, config), None
    return s, None, None


def given_content(settings: Settings, config: MoEConfig, hot: Tensor | None) -> dict:
    """What config.json says of the files that choose or start the adapter.  -> {"given": {flag: digest}}

    hot: as of `read_given`. Raises InputError if --profile is not a file of counts.
    """
    s, given = settings, {}
    if s.init_adapter:
        given["--init-adapter"] = json_sha256(start_of(s.init_adapter).adapter_content)
    elif hot is not None:
        given["--experts"] = json_sha256(hot.tolist())
    if s.profile:  # a run that resumes has counts of its own
        counted = load_profile(s.profile, config)
        given["--profile"] = json_sha256([counted.counts.tolist(), counted.gate_mass.tolist()])
    return {"given": given}


def sized(settings: Settings, config: MoEConfig) -> Settings:
    """The settings with the rank of the experts' pairs, where the method decides it by the model.

    Raises InputError for a number of experts or a rank that the model does not have room for.
    """
    s, method = settings, METHODS[settings.method]
    num_hot = num_hot_experts(s.k, config.num_experts, config.num_experts_per_tok)
    if method.grows:
        drlora.check_rank(s.rank, hellora.largest_rank(config))
    elif method.adapts:
        hellora.check_rank(config, s.rank)
        hellora.check_rank(config, s.expert_rank or s.rank)
    if method.flat and not s.init_adapter:
        return replace(s, expert_rank=flat_rank(s.rank, num_hot, config.num_experts))
    return s


def read_counts(settings: Settings, config: MoEConfig) -> RoutingProfile | None:
    """The routing counts of --profile, or those of the run to resume. None: they have yet to be made."""
    before = Path(settings.out) / "profile.json"
    source = before if settings.resume and before.is_file() else settings.profile
    if not source:
        return None
    return load_profile(source, config)


def read_data(
    settings: Settings, folder: Path, config: MoEConfig, date: datetime
) -> tuple[dict, list[data.Encoded], list[data.Encoded]]:
    """What config.json says of the data, and the examples to train on and those to validate on, as token ids.

    date: what a chat template takes for the present.
    """
    reader = data.Reader(
        settings.task,
        folder,
        config,
        max_length=settings.max_length,
        bos=settings.bos,
        prompt=settings.prompt,
        date=date,
    )
    examples = reader.load("train", settings.train_data)
    items, held_out = reader.encode(examples), []
    described = {"began": date.isoformat(), "stop_ids": reader.stop_ids, "data": data.digest(examples)}
    if settings.valid_data:
        others = reader.load("train", settings.valid_data)
        held_out, described["valid"] = reader.encode(others), data.digest(others)
    elif settings.valid_share:
        items, held_out = split(items, settings.valid_share, settings.seed)
    known = {tuple(item.ids) for item in items}
    if twice := sum(tuple(item.ids) in known for item in held_out):
        note(f"{twice} of {len(held_out)} rows to validate on are among the rows to train on; hold out others")
    tokens = f"{sum(len(item.ids) for item in items):,} tokens"
    if settings.loss_on == "all":
        items, held_out = ([replace(item, spans=((0, len(item.ids)),)) for item in part] for part in (items, held_out))
    begin = "" if settings.task != "own" and settings.bos == "auto" else f"; {reader.bos.reason}"
    begin += f"; {len(held_out):,} examples held out for validation" if held_out else ""
    say(f"{settings.task}: {len(items):,} examples, {tokens}; answers end with {reader.endings(items)}{begin}")
    return described, items, held_out


def split(items: list, share: float, seed: int) -> tuple[list, list]:
    """All items but a random share, and that share; both at least one. Raises InputError for a single item."""
    held_out = set(data.sample(range(len(items)), share, seed))
    rest = [item for i, item in enumerate(items) if i not in held_out]
    if not rest:
        raise InputError(
            f"--valid-share {share:g} of {len(items)} examples leaves none to train on; expected more examples"
        )
    return rest, [items[i] for i in sorted(held_out)]
