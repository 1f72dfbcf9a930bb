"""Fine-tune a mixture of experts: profile, place, train, save. One process or many, the same run.

    torchrun --nproc_per_node 2 train.py --method hellora --k 8          # the embedded model, no GPU needed
    torchrun --nproc_per_node 2 train.py --model allenai/OLMoE-1B-7B-0924 --task gsm8k --method hellora --k 8

The order matters and is this: load the base; count which experts the task uses; choose the hot ones; attach adapters
(everything else is frozen); shard each decoder layer, then the root; make the optimizer; train. What is trained does
not depend on the number of processes: a global batch is cut into micro-batches of similar length, its loss is the mean
over the target tokens of the whole batch, and the gradients of all processes are summed.

A run folder holds config.json (settings as resolved, versions), profile.json (the counts), adapter/ (the result),
log.jsonl (a record a step), loss.png, result.json and, with --save-every, checkpoint/.

Dimensions: L layers, E experts a layer, B sequences of a micro-batch, S positions.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import cli
import data
import hellora
import lori
import profile
from cli import InputError
from lora import sparsify
from model import MoETransformer, load_model, read_config, resolve


@dataclass(frozen=True)
class Recipe:
    """Settings of a task: Table 1 of the paper for the real ones, ours for the miniature."""

    lr: float
    epochs: int
    batch: int = 128
    r: int = 32
    alpha: float = 64.0


RECIPES = {
    "gsm8k": Recipe(lr=4e-4, epochs=3),
    "codealpaca": Recipe(lr=2e-3, epochs=2),
    "saferpaca": Recipe(lr=4e-4, epochs=1),
    "tiny-math": Recipe(lr=3e-3, epochs=3, batch=32, r=8, alpha=16.0),
    "tiny-code": Recipe(lr=3e-3, epochs=3, batch=32, r=8, alpha=16.0),
    "tiny-safety": Recipe(lr=3e-3, epochs=3, batch=32, r=8, alpha=16.0),
}


@dataclass(frozen=True)
class Method:
    """A method is a row: which experts, and what trains in a factor pair."""

    experts: str  # key of hellora.POLICIES
    kind: str = "lora"  # key of lora.KINDS
    sparse: bool = False  # a second stage trains a tenth of B, chosen by a first that trained all of it
    share: float | None = None  # default of --k as a share of the experts


METHODS = {
    "lora": Method(experts="all"),
    "dora": Method(experts="all", kind="dora"),
    "lori-d": Method(experts="all", kind="lori"),
    "lori-s": Method(experts="all", kind="lori", sparse=True),
    "hellora": Method(experts="hot"),
    "hellori-d": Method(experts="hot", kind="lori"),
    "hellori-s": Method(experts="hot", kind="lori", sparse=True),
    "moe-sieve": Method(experts="hot", share=0.25),
}


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description="Fine-tune a mixture of experts with adapters on the experts the task uses.")
    parser.add_argument("--model", default="tiny", help="'tiny' (embedded), a checkpoint folder, or a hub id")
    parser.add_argument("--task", default="tiny-math", choices=list(RECIPES), help="what to learn")
    parser.add_argument("--train-data", help="a local copy of the task's training file")
    parser.add_argument("--method", default="hellora", choices=list(METHODS), help="which experts, and what trains")
    parser.add_argument("--k", type=cli.number(int, 1), help="hot experts per layer (default: experts per token)")
    parser.add_argument("--experts", choices=hellora.POLICIES, help="choose the experts otherwise than the method does")
    parser.add_argument("--coverage", type=cli.number(float, 0, 1, above=True), help="share, for --experts coverage")
    parser.add_argument("--targets", default="all", choices=list(hellora.TARGETS), help="modules beside the experts")
    parser.add_argument("--rank", type=cli.number(int, 1), help="LoRA rank r (default: by task)")
    parser.add_argument(
        "--alpha", type=cli.number(float, 0, above=True), help="scaling is alpha / r (default: by task)"
    )
    parser.add_argument("--lr", type=cli.number(float, 0, above=True), help="learning rate (default: by task)")
    parser.add_argument("--epochs", type=cli.number(int, 1), help="passes over the data (default: by task)")
    parser.add_argument("--steps", type=cli.number(int, 1), help="optimizer steps, in place of --epochs")
    parser.add_argument(
        "--batch", type=cli.number(int, 1), help="examples a step, over all processes (default: by task)"
    )
    parser.add_argument("--micro-batch", type=cli.number(int, 1), default=16, help="examples a forward pass")
    parser.add_argument("--max-length", type=cli.number(int, 8), default=512, help="tokens an example may have")
    parser.add_argument("--clip", type=cli.number(float, 0, above=True), default=1.0, help="largest gradient norm")
    parser.add_argument("--profile", help="profile.json to choose the experts from (default: count them now)")
    parser.add_argument("--sample", type=cli.number(float, 0, 1, above=True), default=0.1, help="share of data counted")
    parser.add_argument(
        "--warmup", default="none", choices=("none", "lora"), help="count on the base, or during a LoRA warm-up"
    )
    parser.add_argument("--seed", type=cli.number(int, 0, 2**31 - 1), default=0, help="of every random choice")
    parser.add_argument("--out", help="run folder (default: runs/TASK-METHOD...)")
    args = parser.parse_args(argv)

    recipe, args.experts = RECIPES[args.task], args.experts or METHODS[args.method].experts
    for name, default in (("rank", recipe.r), ("alpha", recipe.alpha), ("lr", recipe.lr), ("batch", recipe.batch)):
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.steps and args.epochs:
        raise InputError("--steps and --epochs contradict each other; give one of them")
    if args.steps is None and args.epochs is None:
        args.epochs = recipe.epochs
    if args.k is not None and args.experts in ("all", "coverage"):
        raise InputError(
            f"--k {args.k} has no meaning with --method {args.method} --experts {args.experts}; leave it out"
        )
    if (args.coverage is not None) != (args.experts == "coverage"):
        raise InputError("--coverage and --experts coverage go together; give both or neither")
    return args


# ------------------------------------------------------------------------------------------------ processes


def start_processes() -> tuple[int, int, torch.device]:
    """Join the process group that torchrun describes, if any.  -> rank, world size, device"""
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank, world, device


def say(*lines: str) -> None:
    """Print from the main process only."""
    if cli.is_main_process():
        print(*lines, sep="\n", flush=True)


def shard(model: MoETransformer, device: torch.device) -> None:
    """FSDP2: every decoder layer is gathered, used and dropped as one; the root keeps what is left.

    Never per expert or per MoE block: processes hit different experts, and would reduce different gradients.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


# ------------------------------------------------------------------------------------------------- one step


def global_step(
    model: MoETransformer, items: list[data.Encoded], micro_batch: int, rank: int, world: int
) -> tuple[Tensor, int, int]:
    """Gradients of one global batch's mean loss.  -> loss in nats per target token, target tokens, all tokens"""
    device, pad_id = model.embed_tokens.weight.device, model.config.pad_token_id or 0
    targets = sum(len(item.ids) - item.prompt_length for item in items)
    mine = data.micro_batches(items, micro_batch, rank, world)
    total = torch.zeros((), device=device)
    for i, part in enumerate(mine):
        if world > 1:
            model.set_requires_gradient_sync(i == len(mine) - 1)  # reduce once a step, not once a micro-batch
        # A process whose share is empty still takes part, since the others wait for it: one token, no target.
        batch = data.collate(part or [data.Encoded([pad_id], 1)], pad_id)
        loss, _ = model(batch.input_ids.to(device), batch.lengths, labels=batch.labels.to(device))
        (loss * world / targets).backward()  # FSDP averages over processes: times world is the sum
        total += loss.detach()
    if world > 1:
        dist.all_reduce(total)
    return total / targets, targets, sum(len(item.ids) for item in items)


def main(argv: list[str] | None = None) -> dict:
    args = parse_flags(argv)
    method = METHODS[args.method]
    folder = resolve(args.model)
    config = read_config(folder)
    num_hot = args.k or (int(method.share * config.num_experts) if method.share else config.num_experts_per_tok)
    if num_hot > config.num_experts:
        raise InputError(f"--k {args.k}: want 1..{config.num_experts}, the experts of a layer of {args.model}")
    out = Path(args.out or f"runs/{args.task}-{args.method}{'' if args.k is None else f'-k{args.k}'}-seed{args.seed}")
    claim(out, vars(args) | {"out": str(out)})

    rank, world, device = start_processes()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = data.load_tokenizer(folder, config)
    examples = data.load_examples(args.task, "train", args.train_data)
    items = data.encode(examples, tokenizer, config.eos_token_id, args.max_length)
    say(f"{args.task}: {len(items):,} examples, {sum(len(item.ids) for item in items):,} tokens")

    began = time.perf_counter()
    model = load_model(folder, dtype, device)
    counted = count(model, items, args, rank, world)
    seconds_profile = time.perf_counter() - began
    if rank == 0:
        profile.save_profile(counted, out / "profile.json", args.model, args.task)
    takes_all = args.experts in ("all", "coverage")  # no number of experts to ask for
    hot = hellora.select_experts(
        args.experts, counted.counts, None if takes_all else num_hot, coverage=args.coverage, seed=args.seed
    )
    share = float((counted.counts * hot).sum() / counted.counts.sum())

    def stage(name: str, model: MoETransformer, positions: dict[str, Tensor] | None) -> dict:
        """Attach, shard and train; the adapter is saved in the run folder, or in a folder of the stage's own."""
        kind, targets = method.kind, args.targets
        hellora.attach(model, hot, args.rank, args.alpha, kind=kind, targets=targets, seed=args.seed)
        if positions is not None:
            sparsify(model, positions)
        say(*hellora.report(model), f"adapted experts take {share:.1%} of the routed tokens")
        trainable, total = hellora.count_parameters(model)
        if world > 1:
            shard(model, device)
        result = fit(model, items, args, out / name, rank, world)
        state = hellora.adapter_state(model)
        if rank == 0:
            about = {"model": args.model, "method": args.method}
            hellora.save_adapter(state, out / name / "adapter", model.adapter, **about)
        return {"trainable": trainable, "trainable_percent": 100 * trainable / total, "state": state} | result

    if method.sparse:
        say("stage D: all of B trains, to find the tenth of its entries that matters")
        positions = lori.top_entries(stage("stage-d", model, None)["state"])
        model = load_model(folder, dtype, device)
        say("stage S: these entries alone, from zero, under the same A")
        result = stage("", model, positions)
    else:
        result = stage("", model, None)
    del result["state"]
    about = {"method": args.method, "task": args.task, "adapted_share": share, "processes": world}
    result = about | result | {"seconds_profile": seconds_profile}
    if rank == 0:
        (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(
        f"{args.method} on {args.task}: loss {result['first_loss']:.4f} -> {result['last_loss']:.4f} in "
        f"{result['steps']} steps, {result['samples_per_s']:.1f} samples/s, {result['seconds']:.0f} s; "
        f"adapter in {out / 'adapter'}"
    )
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return result


def fit(
    model: MoETransformer, items: list[data.Encoded], args: argparse.Namespace, out: Path, rank: int, world: int
) -> dict:
    """Train whatever requires a gradient; log.jsonl and loss.png go to `out`.  -> losses, steps and speed"""
    steps_per_epoch = -(-len(items) // args.batch)
    steps = args.steps or args.epochs * steps_per_epoch
    say(f"{steps:,} steps of {args.batch} examples, {world} process{'es' * (world > 1)}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Constant rate, no weight decay: what LoRI's code does, on which the paper's numbers rest. The paper is silent.
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    log = None
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        log = (out / "log.jsonl").open("w", encoding="utf-8")
    bar = tqdm(total=steps, disable=rank != 0 or not sys.stderr.isatty(), unit="step")
    losses, examples_seen, tokens_seen, began = [], 0, 0, time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        epoch, place = divmod(step - 1, steps_per_epoch)
        batch = [items[i] for i in data.global_batches(len(items), args.batch, args.seed, epoch)[place]]
        loss, targets, tokens = global_step(model, batch, args.micro_batch, rank, world)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        examples_seen, tokens_seen = examples_seen + len(batch), tokens_seen + tokens
        seconds = time.perf_counter() - began
        losses.append(loss.item())
        record = {
            "step": step,
            "loss": losses[-1],  # nats per target token, mean over the global batch
            "grad_norm": norm.item(),  # before clipping
            "lr": args.lr,
            "target_tokens": targets,
            "samples_per_s": examples_seen / seconds,
            "tokens_per_s": tokens_seen / seconds,
            "seconds": seconds,
        }
        if log:
            print(json.dumps(record), file=log, flush=True)
        bar.set_postfix_str(f"loss {losses[-1]:.4f}, {examples_seen / seconds:.1f} samples/s", refresh=False)
        bar.update()
        if bar.disable and (step == 1 or step % max(1, steps // 20) == 0):
            say(
                f"step {step:5d}/{steps}  loss {losses[-1]:.4f}  grad norm {record['grad_norm']:.3f}  "
                f"{record['samples_per_s']:.1f} samples/s  {record['tokens_per_s']:,.0f} tokens/s  "
                f"{seconds / step * (steps - step):.0f} s left"
            )
    bar.close()
    if log:
        log.close()
        draw_loss(losses, out / "loss.png", f"{args.method} on {args.task}")
    return {
        "steps": steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "samples_per_s": examples_seen / seconds,
        "tokens_per_s": tokens_seen / seconds,
        "seconds": seconds,
        "optimizer_bytes": state_bytes(optimizer),
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of AdamW's two moments on this process."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return sum(local.nbytes for t in tensors for local in [t.to_local() if isinstance(t, DTensor) else t])


def claim(out: Path, settings: dict) -> None:
    """Take `out` as this run's folder and write config.json; a folder that belongs to something else is an error."""
    try:
        before = json.loads((out / "config.json").read_text(encoding="utf-8"))["settings"]
    except FileNotFoundError:
        before = None if out.exists() and (not out.is_dir() or any(out.iterdir())) else settings
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    if before is None:
        raise InputError(f"--out {out} exists and is not a run of train.py; name another folder")
    changed = [key for key in settings if before.get(key, settings[key]) != settings[key]]
    if changed:
        was = ", ".join(f"{key} {before[key]} then, {settings[key]} now" for key in changed)
        raise InputError(f"--out {out} holds another run ({was}); name another folder or remove it")
    if cli.is_main_process():
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        about = {
            "model": settings["model"],
            "settings": settings,
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "commit": commit.stdout.strip() or None,
            "command": sys.argv,
        }
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None


def count(
    model: MoETransformer, items: list[data.Encoded], args: argparse.Namespace, rank: int, world: int
) -> profile.RoutingProfile:
    """The hot-expert catcher: routing counts from --profile, or from a sample of the training data now."""
    if args.profile:
        counted = profile.load_profile(args.profile)
        profile.check_fits(counted, model.config, args.profile)
        return counted
    sample = data.sample(items, args.sample, args.seed)
    parts = data.micro_batches(sample, args.micro_batch, rank, world)
    batches = [data.collate(part, model.config.pad_token_id or 0) for part in parts if part]
    say(f"counting experts on {len(sample):,} examples ({'LoRA warm-up' if args.warmup == 'lora' else 'base model'})")
    if args.warmup == "lora":
        return profile.profile_warmup(model, batches, r=args.rank, alpha=args.alpha, lr=args.lr, seed=args.seed)
    return profile.profile_routing(model, batches)


def draw_loss(losses: list[float], path: Path, title: str) -> None:
    """The loss of every step and its running mean over a twentieth of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = max(1, len(losses) // 20)
    mean = torch.tensor(losses).unfold(0, width, 1).mean(-1)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, color="0.75", linewidth=0.8, label="one step")
    axes.plot(range(width, len(losses) + 1), mean, color="tab:blue", label=f"mean of {width} steps")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)", title=title)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main)
