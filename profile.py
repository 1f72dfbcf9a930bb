"""The hot-expert catcher: which experts of every layer does a task use, and how much.

    python profile.py --model tiny --task tiny-math --out profile.json --plot profile.png
    torchrun --nproc_per_node 2 profile.py --model mistralai/Mixtral-8x7B-v0.1 --task gsm8k --warmup lora --out p.json

    counted = profile_routing(model, batches)  # the model as it is, no gradient: counts and gate mass of every expert
    counted = profile_warmup(model, batches)  # while LoRA on all experts trains, one step a batch: the paper's way (§3)

Every real token counts, prompt and target alike; padding never does. `hellora.select_experts` makes hot sets of the
counts, `top_share` and `entropy` say how concentrated they are, `jaccard` how far two hot sets agree.

Dimensions: L layers, E experts a layer, K experts a token, B sequences, S positions, T real tokens of a batch.
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

import functools
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import cli
import data
import hellora
from cli import InputError
from model import MoEConfig, MoETransformer, load_model, read_config, resolve
from settings import RECIPES

PLOT_FORMATS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class RoutingProfile:
    """What a task asks of the experts. Every row of counts sums to num_tokens * num_experts_per_tok."""

    counts: Tensor  # int64 [L, E] how many tokens chose the expert
    gate_mass: Tensor  # float64 [L, E] sum of the routing weights they gave it
    num_tokens: int  # real tokens seen
    num_experts_per_tok: int


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
    totals = no_routing(model)
    try:
        for batch in batches:
            no_labels = torch.full_like(batch.input_ids, -100)  # the LM head runs at labels only: nowhere
            _, *routed = forward(model, batch, no_labels)
            totals += routing(model.config, *routed)
    finally:
        model.train(was_training)
    return finish(model.config, totals)


def profile_warmup(
    model: MoETransformer,
    batches: Iterable[data.Batch],
    *,
    r: int = 32,
    alpha: float = 64.0,
    lr: float = 4e-4,
    seed: int = 0,
) -> RoutingProfile:
    """Count the experts chosen while LoRA on all experts, attention and router trains, one step a batch (HELLoRA §3).

    The adapters are thrown away: the model computes what it did before, and stays frozen. Under torch.distributed
    the processes' batches make one step together (`warmup_batches` cuts them), and each holds the whole model.
    Raises InputError if there is no token, and whatever `hellora.attach` raises.
    """
    totals = no_routing(model)
    hellora.attach(model, torch.ones(totals.shape[1:], dtype=torch.bool), r, alpha, seed=seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)  # constant rate, no decay, as in train.py
    try:
        for batch in itertools.chain(batches, itertools.repeat(None)):
            targets = 0 if batch is None else int((batch.labels != -100).sum())
            with_batch, targets = add_up(totals.new_tensor([batch is not None, targets])).tolist()
            if not with_batch:
                break
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)  # a process that ran out of batches still steps
            if batch is not None:
                loss, *routed = forward(model, batch, batch.labels)
                totals += routing(model.config, *routed)
                (loss / max(1, targets)).backward()  # mean over the target tokens of all processes
            for parameter in trained:
                add_up(parameter.grad)
            optimizer.step()
    finally:
        hellora.detach(model)
    return finish(model.config, totals)


def warmup_batches(
    items: list[data.Encoded], batch: int, pad_id: int, seed: int, rank: int, world: int
) -> list[data.Batch]:
    """This process's part of each step of `batch` examples: the same steps on one process and on many."""
    mine = [chosen[rank::world] for chosen in data.global_batches(len(items), batch, seed, epoch=0)]
    return [data.collate([items[i] for i in part], pad_id) for part in mine if part]


def forward(model: MoETransformer, batch: data.Batch, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (a sum), selected_experts [L, B, S, K] and router_logits [L, T, E] of one batch."""
    device = model.embed_tokens.weight.device
    return model(batch.input_ids.to(device), batch.lengths, labels=labels.to(device), output_router_logits=True)


def no_routing(model: MoETransformer) -> Tensor:
    """The totals before the first token: zeros, float64 [2, L, E], for counts and gate mass."""
    shape = (2, model.config.num_hidden_layers, model.config.num_experts)
    return torch.zeros(shape, dtype=torch.float64, device=model.embed_tokens.weight.device)


@torch.no_grad()
def routing(config: MoEConfig, selected_experts: Tensor, router_logits: Tensor) -> Tensor:
    """What one batch adds to the totals.  [L, B, S, K] (-1 at padding), [L, T, E] -> float64 [2, L, E]"""
    chosen = selected_experts[:, selected_experts[0, ..., 0] >= 0]  # [L, T, K]
    weights = router_logits.softmax(-1, dtype=torch.float32).gather(-1, chosen)  # [L, T, K]
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    added = torch.stack((torch.ones_like(weights), weights)).double().flatten(2)  # [2, L, T * K]
    index = chosen.flatten(1).expand_as(added)
    return added.new_zeros(2, len(chosen), config.num_experts).scatter_add_(-1, index, added)


def add_up(tensor: Tensor) -> Tensor:
    """Replace a tensor by its sum over the processes, if there are several."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def finish(config: MoEConfig, totals: Tensor) -> RoutingProfile:
    """The totals of this process -> the profile of all processes."""
    counts, gate_mass = add_up(totals).cpu()
    K = config.num_experts_per_tok
    num_tokens = round(counts[0].sum().item()) // K
    if num_tokens == 0:
        raise InputError("there is no token to count experts on; give at least one example")
    return RoutingProfile(counts.long(), gate_mass, num_tokens, K)


# ------------------------------------------------------------------------------------------- what counts say


def top_share(counts: Tensor, n: int) -> Tensor:
    """sum of the n largest counts of a layer / sum of all; n / E if use is uniform.  [L, E] -> float64 [L]"""
    counts = counts.double()
    return counts.sort(dim=-1, descending=True).values[:, :n].sum(-1) / counts.sum(-1)


def entropy(counts: Tensor) -> Tensor:
    """-sum_e p_e ln p_e / ln E with p = counts / their sum: 1 uniform, 0 one expert only.  [L, E] -> float64 [L]"""
    p = counts.double() / counts.double().sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1) / math.log(counts.shape[-1])


def jaccard(hot_a: Tensor, hot_b: Tensor) -> Tensor:
    """|A and B| / |A or B| of two hot sets, 1 if both are empty.  bool [L, E] twice -> float64 [L]"""
    both, either = (hot_a & hot_b).sum(-1).double(), (hot_a | hot_b).sum(-1).double()
    return torch.where(either > 0, both / either, 1.0)


def table(counts: Tensor, num_hot: int) -> Iterator[str]:
    """Lines for the terminal: per layer the share of the `num_hot` hottest experts, entropy, hottest and coldest."""
    E, share = counts.shape[-1], 100 * top_share(counts, num_hot)
    top, shown = f"top {num_hot} of {E}", min(8, E)
    hottest, coldest = hellora.hot_first(counts)[:, :shown], counts.argsort(dim=-1, stable=True)[:, : shown // 2]
    yield f"layer  {top:>12}  entropy  {'hottest':{4 * shown}}  coldest"
    for layer, h in enumerate(entropy(counts)):
        hot, cold = (" ".join(f"{e:3d}" for e in ids[layer]) for ids in (hottest, coldest))
        yield f"{layer:5d}  {share[layer]:10.1f} %  {h:7.3f}  {hot}  {cold}"
    yield f"{top}: {share.mean():.1f} % of the routed tokens, mean of the layers (uniform {100 * num_hot / E:.1f} %)"


def plot(counts: Tensor, num_hot: int, title: str, path: Path) -> None:
    """Heat map of every expert's share, and each layer's shares in falling order (as HELLoRA, Figures 1 and 4)."""
    from matplotlib import colormaps  # here, since most callers want no picture
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure  # pyplot would bring global state, and look for a display

    L, E = counts.shape
    share = (100 * counts.double() / counts.double().sum(-1, keepdim=True)).numpy()  # [L, E] per cent
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ticks = range(0, L, -(-L // 16))

    image = left.imshow(share, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    layers, experts = hellora.hottest(counts, num_hot).numpy().nonzero()
    left.scatter(experts, layers, s=10, c="white", edgecolors="black", linewidths=0.6)
    left.set(xlabel="expert", ylabel="layer", yticks=ticks)
    left.set_title(f"Share of each expert (dots: the {num_hot} hottest of the layer)", fontsize=11)
    figure.colorbar(image, ax=left, label="% of the layer's routed tokens", pad=0.01)

    # Both colour maps grow evenly in lightness: they read the same without colour vision.
    colors = ListedColormap(colormaps["viridis_r"]([0.1 + 0.9 * i / L for i in range(L)]))
    for color, row in zip(colors.colors, np.sort(share)[:, ::-1], strict=True):
        right.plot(range(1, E + 1), row, color=color, linewidth=1.6, marker="o" if E <= 16 else None, markersize=3)
    right.axvspan(0.5, num_hot + 0.5, color="0.93", zorder=0)
    right.axvline(num_hot + 0.5, color="0.3", linestyle=":", linewidth=1.2)
    right.axhline(100 / E, color="0.3", linestyle="--", linewidth=1.2)
    paper = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1.5)
    right.text(E, 104 / E, f"uniform: {100 / E:.3g} %", ha="right", va="bottom", bbox=paper)
    top = 100 * top_share(counts, num_hot)
    cut = f"left of the dotted line: the top {num_hot},\n{top.min():.0f} to {top.max():.0f} % of the routed tokens"
    cut += f"\n(uniform: {100 * num_hot / E:.3g} %)"
    right.text(0.98, 0.98, cut, ha="right", va="top", transform=right.transAxes, bbox=paper)
    right.set(xlabel="experts of a layer, most used first", ylabel="% of the layer's routed tokens")
    right.set(xlim=(0.5, E + 0.5), ylim=(0, None))
    right.set_title("The same shares in falling order, one curve a layer", fontsize=11)
    right.spines[["top", "right"]].set_visible(False)
    norm = BoundaryNorm([i - 0.5 for i in range(L + 1)], L)
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=right, label="layer", ticks=ticks, pad=0.01)
    bar.minorticks_off()
    bar.ax.invert_yaxis()  # layer 0 on top, as in the heat map
    figure.savefig(path)


# -------------------------------------------------------------------------------------------------- the file


def save_profile(profile: RoutingProfile, path: str | Path, model: str, task: str) -> None:
    """Write profile.json, whole or not at all. Raises InputError if it cannot be written. Call it on one process."""
    path = writable(path)
    about = {"model": model, "task": task} | vars(profile)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(about, default=Tensor.tolist) + "\n", encoding="utf-8")
    os.replace(partial, path)


def writable(path: str | Path) -> Path:
    """The path of a file that can be written, its folder made if need be; otherwise an InputError."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name a file in a writable folder") from None
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file to write")
    return path


def load_profile(path: str | Path) -> RoutingProfile:
    """Read profile.json. Raises InputError that names the file for anything that no counting can have written."""
    try:
        return checked(json.loads(Path(path).read_text(encoding="utf-8")))
    except InputError as error:
        raise InputError(f"{path}: {error}; write it again with profile.py") from None
    except (OSError, ValueError, RecursionError) as error:
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
    return RoutingProfile(counts, gate_mass, num_tokens, K)


def check_fits(profile: RoutingProfile, config: MoEConfig, path: str | Path) -> None:
    """Raise InputError if the profile read from `path` was counted on a model of another shape."""
    found = (*profile.counts.shape, profile.num_experts_per_tok)
    wanted = (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok)
    if found != wanted:
        form = "{} layers of {} experts, {} a token".format
        raise InputError(f"{path} is of a model with {form(*found)}; this one has {form(*wanted)}: profile it again")


# --------------------------------------------------------------------------------------------------- command


def main(argv: list[str] | None = None) -> RoutingProfile:
    parser = cli.Parser(description="Count which experts of every layer a task uses.")
    parser.add_argument("--model", default="tiny", help="'tiny' (embedded), a checkpoint folder, or a hub id")
    parser.add_argument("--task", default="tiny-math", choices=list(data.TASKS), help="whose training data to route")
    parser.add_argument("--train-data", metavar="FILE", help="a local copy of the task's training file")
    parser.add_argument("--sample", type=cli.number(float, 0, 1, above=True), default=0.1, help="share of it to use")
    parser.add_argument("--warmup", default="none", choices=("none", "lora"), help="count on the base, or during LoRA")
    parser.add_argument("--k", type=cli.number(int, 1), help="hot experts per layer (default: experts per token)")
    parser.add_argument("--seed", type=cli.number(int, 0, 2**31 - 1), default=0, help="of every random choice")
    parser.add_argument("--batch", type=cli.number(int, 1), default=16, help="examples a forward pass or warm-up step")
    parser.add_argument("--max-length", type=cli.number(int, 8), default=512, help="tokens an example may have")
    parser.add_argument("--out", metavar="FILE", required=True, help="where to write profile.json")
    parser.add_argument("--plot", metavar="FILE", help=f"where to draw it ({', '.join(PLOT_FORMATS)})")
    args = parser.parse_args(argv)
    if args.plot and Path(args.plot).suffix not in PLOT_FORMATS:
        raise InputError(f"--plot {args.plot}: want a file that ends in {', '.join(PLOT_FORMATS)}")
    folder = resolve(args.model)
    config = read_config(folder)
    num_hot = args.k or config.num_experts_per_tok
    if num_hot > config.num_experts:
        raise InputError(f"--k {args.k}: want 1..{config.num_experts}, the experts of a layer of {args.model}")
    tokenizer = data.load_tokenizer(folder, config)
    examples = data.sample(data.load_examples(args.task, "train", args.train_data), args.sample, args.seed)
    items = data.encode(examples, tokenizer, config.eos_token_id, args.max_length)
    out, picture = (path and writable(path) for path in (args.out, args.plot))

    rank, world, device = cli.start_processes()
    model = load_model(folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    pad_id = config.pad_token_id or 0
    progress = functools.partial(tqdm, unit="batch", disable=None if rank == 0 else True)  # None: only on a terminal
    if args.warmup == "lora":
        batches = progress(warmup_batches(items, args.batch, pad_id, args.seed, rank, world))
        recipe = RECIPES[args.task]
        counted = profile_warmup(model, batches, r=recipe.r, alpha=recipe.alpha, lr=recipe.lr, seed=args.seed)
    else:
        parts = data.micro_batches(items, args.batch, rank, world)
        counted = profile_routing(model, progress([data.collate(part, pad_id) for part in parts if part]))
    title = f"Routing of {args.model} on {args.task}: {counted.num_tokens:,} tokens, "
    title += f"{config.num_experts_per_tok} of {config.num_experts} experts a token"
    if rank == 0:
        save_profile(counted, out, args.model, args.task)
        if picture:
            plot(counted.counts, num_hot, title, picture)
    cli.say(f"wrote {' and '.join(str(path) for path in (out, picture) if path)}", title)
    cli.say(*table(counted.counts, num_hot))
    if world > 1:
        dist.destroy_process_group()
    return counted


if __name__ == "__main__":
    cli.run(main)
