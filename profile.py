"""Count how many tokens of a task each expert receives, and with what routing weights.

    python profile.py --model tiny --task tiny-math --out profile.json --plot profile.png
    torchrun --nproc_per_node 2 profile.py --model mistralai/Mixtral-8x7B-v0.1 --task gsm8k --warmup lora --out p.json
    python profile.py compare a.json b.json --plot overlap.png   # do two tasks (or samples) have the same hot experts?
    python profile.py advise profile.json                        # what do k hot experts cover, and what do they cost?

    counted = profile_routing(model, batches)                    # the model as it is, without gradients
    counted = profile_warmup(model, items, 16, lr=4e-4)          # while LoRA on all experts trains: the paper's way

Every real token counts, in the prompt and in the target. Padding never does. `hellora.select_experts` chooses hot sets
by the counts; routing/ says what the counts show.

Dimensions: L layers with experts, E experts per layer, K experts per token, B sequences, S positions.
"""

# ruff: noqa: E402
import command.start  # noqa: F401

# This file hides the standard library's `profile`. cProfile needs names from it, and every torch optimizer imports
# cProfile. So take over those names first. A Python without the module (PEP 799) needs none of them.
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from sysconfig import get_path

_spec = PathFinder.find_spec("profile", [get_path("stdlib")])
if _spec is not None:
    _standard = module_from_spec(_spec)
    _spec.loader.exec_module(_standard)
    _names = {"run", "runctx", "Profile", "_Utils"} & vars(_standard).keys()
    globals().update({name: vars(_standard)[name] for name in _names})

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
import hellora
from command import cli
from command.cli import InputError, RunError, flag
from command.files import parse_json, writable, write_text
from hub.checkpoint import resolve
from hub.config import IGNORE_HELP, PRESETS, ignore_keys
from hub.digests import weights_digest
from hub.tokenizer import BOS_HELP
from model import MoEConfig, MoETransformer, read_config
from routing import advice, statistics
from run import memory
from run.memory import config_of
from run.methods import RECIPES, Recipe, num_hot_experts
from run.processes import ALONE, DTYPE_HELP, DTYPES, Processes, default_dtype, start_processes
from run.step import global_step, load_shared


@dataclass(frozen=True)
class RoutingProfile:
    """How a task uses the experts. Every row of counts sums to num_tokens * num_experts_per_tok."""

    counts: Tensor  # int64 [L, E] how many tokens chose the expert
    gate_mass: Tensor  # float64 [L, E] sum of the routing weights they gave it
    num_tokens: int  # real tokens seen
    num_experts_per_tok: int
    model: str | None = None  # where and on what they were counted, if read from a file
    task: str | None = None
    data: str | None = None  # data.digest of the training examples, of which a sample was counted
    weights: str | None = None  # digest of the base model's weights

    def title(self) -> str:
        K, E = self.num_experts_per_tok, self.counts.shape[1]
        return f"Routing of {self.model} on {self.task}: {self.num_tokens:,} tokens, {K} of {E} experts per token"


# --------------------------------------------------------------------------------------------------------- counting


def count_experts(model: MoETransformer, batches: Iterable[data.Batch]) -> Tensor:
    """counts[l, e] = number of real tokens that layer l sends to expert e.  -> int64 [L, E], see `profile_routing`"""
    return profile_routing(model, batches).counts


@torch.no_grad()
def profile_routing(model: MoETransformer, batches: Iterable[data.Batch]) -> RoutingProfile:
    """Count the experts that the unchanged model chooses (HELLoRA §4.3, MoE-Sieve: the base model, no gradient).

    Under torch.distributed each process passes its own batches and gets the totals of all. A sharded model gathers its
    weights in every forward pass, so all processes must then pass equally many batches. Raises as `finish` does.
    """
    was_training = model.training
    model.eval()
    device = model.embed_tokens.weight.device
    totals = torch.zeros(2, len(model.config.moe_layers), model.config.num_experts, dtype=torch.float64, device=device)
    try:
        for batch in batches:
            ids = batch.input_ids.to(device)
            no_labels = torch.full_like(ids, -100)  # the LM head runs only where there is a label: nowhere
            _, selected, routing = model(ids, batch.lengths, labels=no_labels, output_routing=True)
            chosen = selected[:, selected[0, ..., 0] >= 0]  # [L, T, K], without padding
            totals += statistics.tally(chosen, routing.weights, model.config.num_experts)
    finally:
        model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(totals)
    return finish(model.config, totals)


def profile_warmup(
    model: MoETransformer,
    items: list[data.Encoded],
    batch: int,
    *,
    lr: float,
    seed: int = 0,
    processes: Processes = ALONE,
    micro_batch: int | None = None,
) -> RoutingProfile:
    """Count the experts chosen while everything that requires a gradient trains, one step per `batch` items.

    The model has LoRA on all experts, attention and router (HELLoRA §3). It keeps what it has learnt: drop it
    afterwards. Raises RunError if the loss becomes non-finite, and as `finish` does.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)  # constant rate, no decay, as in train.py
    totals = torch.zeros(2, len(model.config.moe_layers), model.config.num_experts, dtype=torch.float64)
    for chosen in progress(data.global_batches(len(items), batch, seed, epoch=0), processes):
        step = global_step(model, [items[i] for i in chosen], micro_batch or batch, processes)
        if not step.loss.isfinite():
            raise RunError(f"warm-up: the loss is {step.loss:.3g}; lower the learning rate")
        totals += step.routing
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return finish(model.config, totals)


def finish(config: MoEConfig, totals: Tensor) -> RoutingProfile:
    """Totals [2, L, E] as a profile. Raises InputError without any token, RunError for non-finite routing weights."""
    counts, gate_mass = totals.cpu()
    num_tokens = round(counts[0].sum().item()) // config.num_experts_per_tok
    if num_tokens == 0:
        raise InputError("there is no token to count experts on; give at least one example")
    finite = gate_mass.isfinite().all(-1)
    if not finite.all():
        layer = int((~finite).nonzero()[0])
        raise RunError(f"routing weights of layer {layer} are NaN or infinite; does the model overflow in this dtype?")
    return RoutingProfile(counts.long(), gate_mass, num_tokens, config.num_experts_per_tok)


@dataclass(frozen=True)
class Warmup:
    """The LoRA on all experts that trains while they are counted."""

    r: int
    alpha: float
    lr: float
    batch: int  # examples per step

    def attach(self, model: MoETransformer, seed: int) -> None:
        everything = torch.ones(len(model.config.moe_layers), model.config.num_experts, dtype=torch.bool)
        hellora.attach(model, everything, self.r, self.alpha, seed=seed)


def count_task(
    folder: Path,
    items: list[data.Encoded],
    batch: int,
    processes: Processes,
    *,
    dtype: torch.dtype,
    shard: str | None,
    warmup: Warmup | None,
    seed: int,
) -> RoutingProfile:
    """Load a model as this process is to hold it, count the experts that `items` use, and drop it.

    batch: examples per forward pass. shard: as for `load_shared`, or None to let the memory plan decide.
    """
    config, device = read_config(folder), processes.device
    attach = partial(warmup.attach, seed=seed) if warmup else None
    tokens = batch * max((len(item.ids) for item in items), default=0)
    plan_of = partial(memory.plan, config, attach, dtype=dtype, tokens=tokens, trains=warmup is not None)
    shard = memory.choose_shard(shard, device, processes.count, plan_of)
    model = load_shared(folder, dtype, device, shard=shard, attach=attach)
    if warmup:
        options = {"seed": seed, "processes": processes, "micro_batch": batch}
        return profile_warmup(model, items, warmup.batch, lr=warmup.lr, **options)
    parts = data.micro_batches(items, batch, processes.index, processes.count)
    batches = [data.collate(part, config.pad_token_id or 0) for part in parts]
    return profile_routing(model, progress(batches, processes))


def progress(batches: list, processes: Processes) -> Iterable:
    """The batches, with a progress bar on the main process if it has a terminal."""
    return tqdm(batches, unit="batch", disable=None if processes.is_main else True)


# --------------------------------------------------------------------------------------------------------- the file


def save_profile(profile: RoutingProfile, path: str | Path, model: str, task: str) -> None:
    """Write profile.json atomically. Raises InputError if it cannot be written. Call it on one process."""
    about = vars(profile) | {"model": profile.model or model, "task": profile.task or task}
    about = {key: value for key, value in about.items() if value is not None}
    write_text(writable(path), json.dumps(about, default=Tensor.tolist) + "\n")


def load_profile(path: str | Path) -> RoutingProfile:
    """Read profile.json. Raises InputError, which names the file, for values that counting cannot have written."""
    try:
        return checked(parse_json(Path(path).read_bytes(), "the file"))
    except InputError as error:
        raise InputError(f"{path}: {error}; write it again with profile.py") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); profile.py --out makes such a file") from None


def checked(about: object) -> RoutingProfile:
    """The contents of profile.json as a RoutingProfile. Raises InputError that says what is wrong with them."""
    kinds = dict(model=str, task=str, num_tokens=int, num_experts_per_tok=int, counts=list, gate_mass=list)
    if not isinstance(about, dict):
        raise InputError(f"it holds {about!r:.40}; want an object with {', '.join(kinds)}")
    for key, kind in kinds.items():
        if type(about.get(key)) is not kind:
            raise InputError(f"{key} is {about.get(key)!r:.40}; want {kind.__name__}")
    num_tokens, K = about["num_tokens"], about["num_experts_per_tok"]
    if not (0 < num_tokens < 2**53 and 0 < K < 2**20):
        raise InputError(f"num_tokens is {num_tokens} and num_experts_per_tok {K}; both must be above 0")
    try:
        counts, gate_mass = torch.tensor(about["counts"]), torch.tensor(about["gate_mass"], dtype=torch.float64)
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
            raise InputError(f"{key} of layer {layer}, expert {e} is {values[layer, e]:g}; want 0 or more")
    for layer, total in enumerate(counts.double().sum(-1).tolist()):
        if total != num_tokens * K:
            raise InputError(f"counts of layer {layer} sum to {total:.0f}, not to {num_tokens} tokens x {K} experts")
    digests = about.get("data"), about.get("weights")  # files of earlier versions have none
    if not all(isinstance(digest, str | None) for digest in digests):
        raise InputError(f"data and weights are {digests!r:.60}; want str")
    return RoutingProfile(counts, gate_mass, num_tokens, K, about["model"], about["task"], *digests)


def check_fits(profile: RoutingProfile, config: MoEConfig, path: str | Path) -> None:
    """Raise InputError if the profile read from `path` was counted on a model of another shape."""
    found = (*profile.counts.shape, profile.num_experts_per_tok)
    wanted = (len(config.moe_layers), config.num_experts, config.num_experts_per_tok)
    if found != wanted:
        shape = "{} layers of {} experts, {} per token".format
        raise InputError(f"{path} is of a model with {shape(*found)}; this one has {shape(*wanted)}: profile it again")


def note_origin(profile: RoutingProfile, model: str, task: str, data: str, weights: str) -> None:
    """Say if a profile that was read is of another model, task, training data or weights than a run has (digests)."""
    if (profile.model, profile.task) != (model, task):
        cli.say(f"note: the profile is of {profile.task} on {profile.model}, and this run is {task} on {model}")
    elif profile.data not in (None, data):
        cli.say(f"note: the profile is of other training data of {task} than this run learns from")
    elif profile.weights not in (None, weights):
        cli.say(f"note: the profile is of other weights of {model} than this run starts from")


# ------------------------------------------------------------------------------------------------------ the command

PROGRAM = "profile.py"
POSITIVE, SHARE = cli.number(int, 1), cli.number(float, 0, 1, above=True)
K_HELP = "hot experts per layer (default: experts per token)"
PLOT_HELP = f"where to draw it ({', '.join(cli.PICTURE_FORMATS)})"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `profile.py` without a command."""

    model: str = flag("tiny", "'tiny' or 'tiny-mixtral' (embedded), a checkpoint folder, or a hub id")
    task: str = flag("tiny-math", "task whose training data is counted", choices=list(data.TASKS))
    train_data: str | None = flag(None, "a local copy of the task's training file", metavar="FILE")
    bos: str = flag("auto", BOS_HELP, choices=("auto", "yes", "no"))
    sample: float = flag(0.1, "share of the training data to use", type=SHARE)
    warmup: str = flag("none", "count on the base model, or while LoRA trains", choices=("none", "lora"))
    k: int | None = flag(None, K_HELP, type=POSITIVE)
    seed: int = flag(0, "seed of every random choice", type=cli.number(int, 0))
    batch: int = flag(16, "examples per forward pass or warm-up step", type=POSITIVE)
    max_length: int = flag(512, "tokens an example may have", type=cli.number(int, 8))
    dtype: str | None = flag(None, DTYPE_HELP, choices=DTYPES)
    shard: str | None = flag(None, memory.SHARD_HELP, choices=tuple(memory.CHOSEN))
    ignore_config_keys: str | None = flag(None, IGNORE_HELP, metavar="KEYS")
    out: str = flag(help="where to write profile.json", metavar="FILE")
    plot: str | None = flag(None, PLOT_HELP, metavar="FILE", type=cli.picture)


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """The flags of `profile.py compare`."""

    profiles: list[str] = flag(help="profile.json of two tasks or samples", positional=True, nargs=2, metavar="FILE")
    k: int | None = flag(None, K_HELP, type=POSITIVE)
    plot: str | None = flag(None, PLOT_HELP, metavar="FILE", type=cli.picture)


@dataclass(frozen=True, kw_only=True)
class AdviseSettings:
    """The flags of `profile.py advise`."""

    profile: str = flag(help="profile.json of the task", positional=True, metavar="FILE")
    model: str | None = flag(None, f"model to size: as in train.py, or {', '.join(PRESETS)} (default: profiled)")
    rank: int | None = flag(None, "LoRA rank r (default: that of the profiled task)", type=POSITIVE)
    targets: str = flag("all", "modules besides the experts", choices=list(hellora.TARGETS))
    coverage: tuple[float, ...] = flag((0.5, 0.6, 0.7, 0.8, 0.9), "shares to reach", type=SHARE, nargs="+")
    plot: str | None = flag(None, PLOT_HELP, metavar="FILE", type=cli.picture)


def main(argv: list[str] | None = None) -> object:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        return count(argv)
    commands = {"compare": compare, "advise": advise}
    name, flags = cli.subcommand(PROGRAM, commands, argv, __doc__)
    return commands[name](flags)


def count(argv: list[str]) -> RoutingProfile:
    """The command without a name: count, write profile.json, print the table."""
    about = "Count which experts of each layer a task uses. (Also: profile.py compare A B, profile.py advise FILE.)"
    settings = cli.parse(Settings, argv, prog=PROGRAM, description=about)
    ignore_keys(settings.ignore_config_keys)
    folder = resolve(settings.model)
    config = read_config(folder)
    num_hot = num_hot_experts(settings.k, config.num_experts, config.num_experts_per_tok)
    reader = data.Reader(settings.task, folder, config, max_length=settings.max_length, bos=settings.bos)
    examples = reader.load("train", settings.train_data)
    items = reader.encode(data.sample(examples, settings.sample, settings.seed))
    paths = [writable(path) for path in (settings.out, settings.plot) if path]

    processes, recipe = start_processes(), RECIPES[settings.task]
    warmup = Warmup(recipe.r, recipe.alpha, recipe.lr, settings.batch) if settings.warmup == "lora" else None
    dtype = getattr(torch, settings.dtype or default_dtype())
    options = {"dtype": dtype, "shard": settings.shard, "warmup": warmup, "seed": settings.seed}
    counted = count_task(folder, items, settings.batch, processes, **options)
    digests = processes.once(lambda: (data.digest(examples), weights_digest(folder)))
    counted = replace(counted, model=settings.model, task=settings.task, data=digests[0], weights=digests[1])
    title = counted.title()
    if dense := config.num_hidden_layers - len(config.moe_layers):
        title += f"; layer 0 is the first with experts, after {dense} without"
    if processes.is_main:
        save_profile(counted, settings.out, settings.model, settings.task)
        if settings.plot:
            from routing import pictures  # here, since importing matplotlib takes long

            pictures.draw_profile(counted.counts, num_hot, title, Path(settings.plot))
    cli.say(f"wrote {' and '.join(map(str, paths))}", title, *statistics.table(counted.counts, num_hot))
    if processes.count > 1:
        dist.destroy_process_group()
    return counted


def compare(argv: list[str]) -> None:
    """Print, and with --plot draw, how far the hot sets of two profiles agree in each layer."""
    about = "Overlap of the hot experts of two profiles of one model."
    settings = cli.parse(CompareSettings, argv, prog=f"{PROGRAM} compare", description=about)
    names = " and ".join(settings.profiles)
    a, b = map(load_profile, settings.profiles)
    if a.counts.shape != b.counts.shape:
        shapes = " and ".join(f"{tuple(p.counts.shape)}" for p in (a, b))
        raise InputError(f"{names} are of different models: {shapes} (layers, experts)")
    num_hot = num_hot_experts(settings.k, a.counts.shape[1], a.num_experts_per_tok)
    hot_a, hot_b = (hellora.hottest(p.counts, num_hot) for p in (a, b))
    cli.say(*statistics.overlap_table(hot_a, hot_b))
    if settings.plot:
        from routing import pictures

        pictures.draw_overlap(hot_a, hot_b, names, writable(settings.plot))
        cli.say(f"wrote {settings.plot}")


def advise(argv: list[str]) -> None:
    """Print what adapting the k hottest experts covers and costs, and the smallest k that covers enough."""
    about = "What k hot experts cover and cost, and the smallest k that covers enough."
    settings = cli.parse(AdviseSettings, argv, prog=f"{PROGRAM} advise", description=about)
    counted = load_profile(settings.profile)
    model, recipe = settings.model or counted.model, RECIPES.get(counted.task, Recipe)  # else the paper's rank
    config = config_of(model)
    check_fits(counted, config, settings.profile)
    r, K = settings.rank or recipe.r, counted.num_experts_per_tok
    sizes = advice.adapter_sizes(config, r, settings.targets)
    cli.say(
        f"{counted.task} on {model}, {counted.num_tokens:,} tokens: LoRA of rank {r} on the k hottest of "
        f"{config.num_experts} experts per layer, targets {settings.targets}",
        *advice.table(advice.choices(counted.counts, K, sizes), K, settings.coverage),
    )
    if settings.plot:
        from routing import pictures

        pictures.draw_profile(counted.counts, K, counted.title(), writable(settings.plot))
        cli.say(f"wrote {settings.plot}")


if __name__ == "__main__":
    cli.run(main)
