"""The hot-expert catcher: which experts of every layer does a task use, and how much.

    python profile.py --model tiny --task tiny-math --out profile.json --plot profile.png
    torchrun --nproc_per_node 2 profile.py --model mistralai/Mixtral-8x7B-v0.1 --task gsm8k --warmup lora --out p.json

    counted = profile_routing(model, batches)  # the model as it is, no gradient: counts and gate mass of every expert
    counted = profile_warmup(model, items, 16, lr=4e-4)  # while LoRA on all experts trains: the paper's way (§3)

    python profile.py compare a.json b.json --plot overlap.png  # how far the hot sets of two profiles agree
    python profile.py advise profile.json  # what k hot experts cover, and what adapting them costs

Every real token counts, prompt and target alike; padding never does. `hellora.select_experts` makes hot sets of the
counts; routing.py says what they show. To compare two samples, profile with two values of --sample or of --seed.

Dimensions: L layers that have experts, E experts a layer, K experts a token, B sequences, S positions, T real tokens of
a batch.
"""

# ruff: noqa: E402
# This file hides the standard library's `profile`, whose names cProfile wants, which every torch optimizer imports.
# So take them over, before anything else is imported. A Python without that module (PEP 799) asks for none of them.
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from sysconfig import get_path

_spec = PathFinder.find_spec("profile", [get_path("stdlib")])
if _spec is not None:
    _standard = module_from_spec(_spec)
    _spec.loader.exec_module(_standard)
    _names = {"run", "runctx", "Profile", "_Utils"} & vars(_standard).keys()
    globals().update({name: vars(_standard)[name] for name in _names})

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
import hellora
from command import cli
from command.cli import InputError, RunError
from command.files import writable
from hub.checkpoint import config_of, read_config, resolve
from hub.config import PRESETS, MoEConfig
from model import MoETransformer
from routing import statistics as routing
from run import memory
from run.processes import ALONE, Processes, start_processes
from run.settings import RECIPES, Recipe
from run.step import global_step, load_shared

PLOT_FORMATS = ".png, .pdf, .svg"


@dataclass(frozen=True)
class RoutingProfile:
    """What a task asks of the experts. Every row of counts sums to num_tokens * num_experts_per_tok."""

    counts: Tensor  # int64 [L, E] how many tokens chose the expert
    gate_mass: Tensor  # float64 [L, E] sum of the routing weights they gave it
    num_tokens: int  # real tokens seen
    num_experts_per_tok: int
    model: str | None = None  # where and on what they were counted, if read from a file
    task: str | None = None


# -------------------------------------------------------------------------------------------------- counting


def count_experts(model: MoETransformer, batches: Iterable[data.Batch]) -> Tensor:
    """counts[l, e] = number of real tokens that layer l sends to expert e.  -> int64 [L, E], see `profile_routing`"""
    return profile_routing(model, batches).counts


@torch.no_grad()
def profile_routing(model: MoETransformer, batches: Iterable[data.Batch]) -> RoutingProfile:
    """Count the experts that the model as it is chooses (HELLoRA §4.3, MoE-Sieve: the base model, no gradient).

    Under torch.distributed every process passes its own batches and gets the totals of all. A sharded model gathers
    its weights in every forward: pass equally many batches then. Raises InputError if there is no token.
    """
    was_training = model.training
    model.eval()
    device = model.embed_tokens.weight.device
    totals = torch.zeros(2, len(model.config.moe_layers), model.config.num_experts, dtype=torch.float64, device=device)
    try:
        for batch in batches:
            ids = batch.input_ids.to(device)
            no_labels = torch.full_like(ids, -100)  # the LM head runs at labels only: nowhere
            _, *routed = model(ids, batch.lengths, labels=no_labels, output_router_logits=True)
            totals += routing.tally(model.config, *routed)
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
    progress: Callable = iter,
) -> RoutingProfile:
    """Count the experts chosen while what requires a gradient trains, one step of `batch` items after the other.

    The model has LoRA on all experts, attention and router (HELLoRA §3), and keeps what it learnt: drop it afterwards.
    Raises InputError if there is no token.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)  # constant rate, no decay, as in train.py
    totals = torch.zeros(2, len(model.config.moe_layers), model.config.num_experts, dtype=torch.float64)
    for chosen in progress(data.global_batches(len(items), batch, seed, epoch=0)):
        step = global_step(model, [items[i] for i in chosen], micro_batch or batch, processes)
        if not step.loss.isfinite():
            raise RunError(f"warm-up: the loss is {step.loss:.3g}; lower the learning rate")
        totals += step.routing
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return finish(model.config, totals)


def count_task(
    folder: Path,
    items: list[data.Encoded],
    batch: int,
    processes: Processes,
    *,
    shard: str | None,
    warmup: dict[str, float] | None,
    seed: int,
    progress: Callable = iter,
) -> RoutingProfile:
    """Load a model as this process is to hold it, count the experts that `items` use, and drop it.

    warmup: r, alpha, lr and batch of the LoRA that trains meanwhile; None: count on the base. shard: "full", "none",
    or None to let the memory plan decide.
    """
    config, device = read_config(folder), processes.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def attach(model: MoETransformer) -> None:
        everything = torch.ones(len(config.moe_layers), config.num_experts, dtype=torch.bool)
        hellora.attach(model, everything, warmup["r"], warmup["alpha"], seed=seed)

    tokens = batch * max((len(item.ids) for item in items), default=0)
    options = {"dtype": dtype, "world": processes.count, "sharded": False, "tokens": tokens, "trains": bool(warmup)}
    whole = memory.plan(config, attach if warmup else None, **options)
    sharded = memory.choose_shard(shard, device, processes.count, whole)
    model = load_shared(folder, dtype, device, sharded=sharded, attach=attach if warmup else None)
    if warmup:
        options = {"processes": processes, "micro_batch": batch, "progress": progress}
        return profile_warmup(model, items, warmup["batch"], lr=warmup["lr"], seed=seed, **options)
    parts = data.micro_batches(items, batch, processes.index, processes.count)
    return profile_routing(model, progress([data.collate(part, config.pad_token_id or 0) for part in parts]))


def finish(config: MoEConfig, totals: Tensor) -> RoutingProfile:
    """Totals [2, L, E] as a profile."""
    counts, gate_mass = totals.cpu()
    K = config.num_experts_per_tok
    num_tokens = round(counts[0].sum().item()) // K
    if num_tokens == 0:
        raise InputError("there is no token to count experts on; give at least one example")
    return RoutingProfile(counts.long(), gate_mass, num_tokens, K)


# -------------------------------------------------------------------------------------------------- the file


def save_profile(profile: RoutingProfile, path: str | Path, model: str, task: str) -> None:
    """Write profile.json, whole or not at all. Raises InputError if it cannot be written. Call it on one process."""
    path = writable(path)
    about = vars(profile) | {"model": profile.model or model, "task": profile.task or task}
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(about, default=Tensor.tolist) + "\n", encoding="utf-8")
    os.replace(partial, path)


def load_profile(path: str | Path) -> RoutingProfile:
    """Read profile.json. Raises InputError that names the file for anything that no counting can have written."""
    try:
        return checked(json.loads(Path(path).read_text(encoding="utf-8")))
    except InputError as error:
        raise InputError(f"{path}: {error}; write it again with profile.py") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); profile.py --out makes such a file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def checked(about: object) -> RoutingProfile:
    """What profile.json holds as a RoutingProfile, or an InputError that says what is wrong with it."""
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
        raise InputError(f"counts and gate_mass are no tables [layers][experts] of numbers ({error})") from None
    if counts.dtype != torch.int64 or counts.dim() != 2:
        raise InputError("counts are no table [layers][experts] of whole numbers")
    if counts.shape != gate_mass.shape:
        raise InputError(f"counts have shape {tuple(counts.shape)}, gate_mass {tuple(gate_mass.shape)}")
    for key, values in (("counts", counts), ("gate_mass", gate_mass)):
        for layer, e in (~(values.isfinite() & (values >= 0))).nonzero().tolist():
            raise InputError(f"{key} of layer {layer}, expert {e} is {values[layer, e]:g}; want 0 or more")
    for layer, total in enumerate(counts.double().sum(-1).tolist()):
        if total != num_tokens * K:
            raise InputError(f"counts of layer {layer} sum to {total:.0f}, not to {num_tokens} tokens x {K} experts")
    return RoutingProfile(counts, gate_mass, num_tokens, K, about["model"], about["task"])


def check_fits(profile: RoutingProfile, config: MoEConfig, path: str | Path) -> None:
    """Raise InputError if the profile read from `path` was counted on a model of another shape."""
    found = (*profile.counts.shape, profile.num_experts_per_tok)
    wanted = (len(config.moe_layers), config.num_experts, config.num_experts_per_tok)
    if found != wanted:
        form = "{} layers of {} experts, {} a token".format
        raise InputError(f"{path} is of a model with {form(*found)}; this one has {form(*wanted)}: profile it again")


# --------------------------------------------------------------------------------------------------- command


def main(argv: list[str] | None = None) -> object:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        return count(argv)
    commands = {"compare": compare, "advise": advise}
    if argv[0] not in commands:
        raise InputError(f"{argv[0]!r} is no command; want {' or '.join(commands)}, or flags alone, to count")
    return commands[argv[0]](argv[1:])


def count(argv: list[str]) -> RoutingProfile:
    """The command without a name: count, write profile.json, print the table."""
    about = "Count which experts of every layer a task uses. (Also: profile.py compare A B, profile.py advise FILE.)"
    parser = cli.Parser(prog="profile.py", description=about)
    parser.add_argument("--model", default="tiny", help="'tiny' (embedded), a checkpoint folder, or a hub id")
    parser.add_argument("--task", default="tiny-math", choices=list(data.TASKS), help="whose training data to route")
    parser.add_argument("--train-data", metavar="FILE", help="a local copy of the task's training file")
    parser.add_argument("--sample", type=cli.number(float, 0, 1, above=True), default=0.1, help="share of it to use")
    parser.add_argument("--warmup", default="none", choices=("none", "lora"), help="count on the base, or during LoRA")
    parser.add_argument("--k", type=cli.number(int, 1), help="hot experts per layer (default: experts per token)")
    parser.add_argument("--seed", type=cli.number(int, 0, 2**31 - 1), default=0, help="of every random choice")
    parser.add_argument("--batch", type=cli.number(int, 1), default=16, help="examples a forward pass or warm-up step")
    parser.add_argument("--max-length", type=cli.number(int, 8), default=512, help="tokens an example may have")
    parser.add_argument("--shard", choices=("full", "none"), help="the base sharded, or whole on every process")
    parser.add_argument("--out", metavar="FILE", required=True, help="where to write profile.json")
    parser.add_argument("--plot", type=picture, metavar="FILE", help=f"where to draw it ({PLOT_FORMATS})")
    args = parser.parse_args(argv)
    folder = resolve(args.model)
    config = read_config(folder)
    num_hot = hot_experts(args.k, config.num_experts_per_tok, config.num_experts)
    tokenizer = data.load_tokenizer(folder, config)
    examples = data.sample(data.load_examples(args.task, "train", args.train_data), args.sample, args.seed)
    items = data.encode(examples, tokenizer, config.eos_token_id, args.max_length)
    out, drawn = (path and writable(path) for path in (args.out, args.plot))

    processes = start_processes()
    recipe = RECIPES[args.task]
    warmup = {"r": recipe.r, "alpha": recipe.alpha, "lr": recipe.lr, "batch": args.batch}
    warmup = warmup if args.warmup == "lora" else None
    progress = functools.partial(
        tqdm, unit="batch", disable=None if processes.is_main else True
    )  # None: only on a terminal
    options = {"shard": args.shard, "warmup": warmup, "seed": args.seed, "progress": progress}
    counted = count_task(folder, items, args.batch, processes, **options)
    title = f"Routing of {args.model} on {args.task}: {counted.num_tokens:,} tokens, "
    title += f"{config.num_experts_per_tok} of {config.num_experts} experts a token"
    if dense := config.num_hidden_layers - len(config.moe_layers):
        title += f"; layers are numbered from the first with experts, after {dense} without"
    if processes.is_main:
        save_profile(counted, out, args.model, args.task)
        if drawn:
            routing.plot(counted.counts, num_hot, title, drawn)
    cli.say(f"wrote {' and '.join(str(path) for path in (out, drawn) if path)}", title)
    cli.say(*routing.table(counted.counts, num_hot))
    if processes.count > 1:
        dist.destroy_process_group()
    return counted


def compare(argv: list[str]) -> None:
    """Print, and with --plot draw, how far the hot sets of two profiles agree in every layer."""
    parser = cli.Parser(prog="profile.py compare", description="How far do the hot experts of two profiles agree?")
    parser.add_argument(
        "profiles", nargs=2, metavar="FILE", help="profile.json of one model: two tasks, or two samples"
    )
    parser.add_argument("--k", type=cli.number(int, 1), help="hot experts per layer (default: experts per token)")
    parser.add_argument("--plot", type=picture, metavar="FILE", help=f"where to draw it ({PLOT_FORMATS})")
    args = parser.parse_args(argv)
    a, b = map(load_profile, args.profiles)
    if a.counts.shape != b.counts.shape:
        shapes = " and ".join(f"{tuple(p.counts.shape)}" for p in (a, b))
        raise InputError(f"{' and '.join(args.profiles)} are of unlike models: {shapes} (layers, experts)")
    num_hot = hot_experts(args.k, a.num_experts_per_tok, a.counts.shape[1])
    hot_a, hot_b = (hellora.hottest(p.counts, num_hot) for p in (a, b))
    cli.say(*routing.overlap_table(hot_a, hot_b))
    if args.plot:
        routing.plot_overlap(hot_a, hot_b, " and ".join(args.profiles), writable(args.plot))
        cli.say(f"wrote {args.plot}")


def advise(argv: list[str]) -> None:
    """Print what adapting the k hottest experts covers and costs, and the smallest k that covers enough."""
    parser = cli.Parser(prog="profile.py advise", description="How many hot experts are enough, and what do they cost?")
    parser.add_argument("profile", metavar="FILE", help="profile.json of the task")
    parser.add_argument(
        "--model", help=f"whose sizes count: as in train.py, or {', '.join(PRESETS)} (default: profiled)"
    )
    parser.add_argument("--rank", type=cli.number(int, 1), help="LoRA rank r (default: of the profiled task)")
    parser.add_argument("--targets", choices=list(hellora.TARGETS), default="all", help="modules beside the experts")
    share = cli.number(float, 0, 1, above=True)
    parser.add_argument("--coverage", type=share, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9], help="shares to reach")
    args = parser.parse_args(argv)
    counted = load_profile(args.profile)
    about = json.loads(Path(args.profile).read_text(encoding="utf-8"))
    model, recipe = args.model or about["model"], RECIPES.get(about["task"], Recipe)  # or the paper's rank
    config = config_of(model)
    check_fits(counted, config, args.profile)
    r, K = args.rank or recipe.r, counted.num_experts_per_tok
    sizes = routing.adapter_sizes(config, r, args.targets)
    cli.say(
        f"{about['task']} on {model}, {counted.num_tokens:,} tokens: LoRA of rank {r} on the k hottest of "
        f"{config.num_experts} experts a layer, targets {args.targets}",
        *routing.advice_table(routing.advice(counted.counts, K, sizes), K, args.coverage),
    )


def picture(text: str) -> str:
    """The name of a file that can hold a picture."""
    if Path(text).suffix not in PLOT_FORMATS.split(", "):
        raise argparse.ArgumentTypeError(f"got {text!r}; want a file that ends in {PLOT_FORMATS}")
    return text


def hot_experts(k: int | None, num_experts_per_tok: int, num_experts: int) -> int:
    """--k, or as many as a token has. Raises InputError for more than a layer has."""
    if k and k > num_experts:
        raise InputError(f"--k {k}: want 1..{num_experts}, the experts of a layer")
    return k or num_experts_per_tok


if __name__ == "__main__":
    cli.run(main)
