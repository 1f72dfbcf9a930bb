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
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
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
import drlora
import hellora
import lori
import profile
from cli import InputError, say, start_processes
from lora import sparsify, truncate
from model import MoETransformer, load_balancing_loss, load_model, read_config, resolve, save_model
from settings import METHODS, hot_experts_per_layer, parse_flags

# ------------------------------------------------------------------------------------------------ processes


def shard(model: MoETransformer, device: torch.device) -> None:
    """FSDP2: every decoder layer is gathered, used and dropped as one; the root keeps what is left.

    Never per expert or per MoE block: processes hit different experts, and would reduce different gradients.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


# ------------------------------------------------------------------------------------------------- one step


@dataclass
class Step:
    """What one global batch gave, summed over micro-batches and processes."""

    loss: Tensor  # nats per target token
    aux_loss: Tensor  # load-balancing loss, mean over the tokens; 0 if it is off
    counts: Tensor  # [L, E] tokens that chose each expert
    target_tokens: int
    tokens: int


def global_step(
    model: MoETransformer,
    items: list[data.Encoded],
    micro_batch: int,
    rank: int,
    world: int,
    *,
    aux_loss: float | None = None,
    aux_form: str = "layer",
) -> Step:
    """Gradients of one global batch: the mean loss of its target tokens, plus aux_loss times the balance."""
    config, device = model.config, model.embed_tokens.weight.device
    targets = sum(len(item.ids) - item.prompt_length for item in items)
    tokens = sum(len(item.ids) for item in items)
    mine = data.micro_batches(items, micro_batch, rank, world)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss, auxiliary loss
    counts = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.int64, device=device)
    for i, part in enumerate(mine):
        if world > 1:
            model.set_requires_gradient_sync(i == len(mine) - 1)  # reduce once a step, not once a micro-batch
        # A process whose share is empty still takes part, since the others wait for it: one token, no target.
        pad_id = config.pad_token_id or 0
        batch = data.collate(part or [data.Encoded([pad_id], 1)], pad_id)
        nll, selected, router_logits = model(
            batch.input_ids.to(device), batch.lengths, labels=batch.labels.to(device), output_router_logits=True
        )
        loss = nll / targets
        if part:
            totals[0] += loss.detach()
            chosen = selected.flatten(1)  # [L, B * S * K], -1 at padding
            counts.scatter_add_(1, chosen.clamp(min=0), (chosen >= 0).long())
            if aux_loss:  # a mean over micro-batches, weighted by tokens: each is balanced by itself, as in the hub
                share = int(batch.lengths.sum()) / tokens
                balance = share * load_balancing_loss(router_logits, config.num_experts_per_tok, aux_form)
                totals[1] += balance.detach()
                loss = loss + aux_loss * balance
        (loss * world).backward()  # FSDP averages over processes: times world is the sum
    if world > 1:
        dist.all_reduce(totals)
        dist.all_reduce(counts)
    return Step(totals[0], totals[1], counts.cpu(), targets, tokens)


def main(argv: list[str] | None = None) -> dict:
    args = parse_flags(argv)
    method = METHODS[args.method]
    folder = resolve(args.model)
    config = read_config(folder)
    num_hot = hot_experts_per_layer(args, config.num_experts, config.num_experts_per_tok)
    masked = lori.read_mask(args, config) if args.mask else None
    out = Path(args.out)
    if cli.is_main_process():
        check_out(out, vars(args))

    rank, world, device = start_processes()
    tokenizer = data.load_tokenizer(folder, config)
    examples = data.load_examples(args.task, "train", args.train_data)
    items = data.encode(examples, tokenizer, config.eos_token_id, args.max_length)
    say(f"{args.task}: {len(items):,} examples, {sum(len(item.ids) for item in items):,} tokens")

    # A frozen base may be bfloat16; weights that train, adapters too, are float32.
    dtype = torch.bfloat16 if device.type == "cuda" and method.experts else torch.float32
    model = load_model(folder, dtype, device)
    about = {"method": args.method, "task": args.task, "processes": world}
    hot = counted = None
    if method.experts:
        began = time.perf_counter()
        counted = count(model, items, args, rank, world)
        hot = choose_experts(model, counted.counts, args, num_hot, masked)
        share = float((counted.counts * hot).sum() / counted.counts.sum())
        say(f"adapted experts take {share:.1%} of the routed tokens")
        about |= {"adapted_share": share, "seconds_profile": time.perf_counter() - began}

    def stage(name: str, model: MoETransformer, positions: dict[str, Tensor] | None = None) -> dict:
        """Attach, shard, train and save, in the run folder or in a folder of the stage's own."""
        if hot is None:
            model.requires_grad_(True)
        else:
            options = {"kind": method.kind, "targets": args.targets, "seed": args.seed}
            r_max = drlora.RESERVED * args.rank if method.grows else None
            hellora.attach(model, hot, args.rank, args.alpha, r_max=r_max, **options)
        if positions is not None:
            sparsify(model, positions)
        say(*hellora.report(model))
        if rank == 0:  # not before: whatever is wrong with the input has shown by now
            write_config(out, vars(args))
            if counted:
                profile.save_profile(counted, out / "profile.json", args.model, args.task)
        trainable, total = hellora.count_parameters(model)
        if world > 1:
            shard(model, device)
        result = fit(model, items, args, out / name, rank, world)
        if hot is None:
            save_whole(model, out / name / "model", folder, rank)
            state = {}
        else:
            state, adapter = hellora.adapter_state(model), model.adapter
            if method.grows:  # what never grew is neither kept nor counted: the size is that of LoRA at --rank
                adapter = replace(adapter, ranks=result.pop("ranks"))
                state = truncate(state, torch.tensor(adapter.ranks))
                unused = trainable - sum(tensor.numel() for tensor in state.values())
                trainable, total = trainable - unused, total - unused
            if rank == 0:
                names = {"model": args.model, "method": args.method}
                hellora.save_adapter(state, out / name / "adapter", adapter, **names)
        sizes = {"adapter_bytes": sum(tensor.nbytes for tensor in state.values())}
        return {"trainable": trainable, "trainable_percent": 100 * trainable / total, "state": state} | result | sizes

    if method.sparse:
        if masked is None:
            say("stage D: all of B trains, to find the tenth of its entries that matters")
            positions = lori.top_entries(stage("stage-d", model)["state"])
            model = load_model(folder, dtype, device)
        else:
            positions = lori.top_entries(masked[1])
        say("stage S: these entries alone, from zero, under the same A")
        result = stage("", model, positions)
    else:
        result = stage("", model)
    del result["state"]
    result = about | result
    if rank == 0:
        (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(
        f"{args.method} on {args.task}: loss {result['first_loss']:.4f} -> {result['last_loss']:.4f} in "
        f"{result['steps']} steps, {result['samples_per_s']:.1f} samples/s, {result['seconds']:.0f} s; run in {out}"
    )
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return result


def choose_experts(
    model: MoETransformer,
    counts: Tensor,
    args: argparse.Namespace,
    num_hot: int,
    masked: tuple[hellora.Adapter, dict] | None,
) -> Tensor:
    """By the policy of --experts, from its file, or as the run of --mask chose.  counts [L, E] -> hot bool [L, E]"""
    if masked is not None:
        return hellora.hot_mask(masked[0].hot, model.config)
    if args.experts in hellora.POLICIES:
        number = None if args.experts in ("all", "coverage") else num_hot
        return hellora.select_experts(args.experts, counts, number, coverage=args.coverage, seed=args.seed)
    return hellora.read_hot(args.experts, model.config)


@torch.no_grad()
def save_whole(model: MoETransformer, folder: Path, base: Path, rank: int) -> None:
    """Write the fine-tuned weights in the hub's layout (a collective under FSDP), with the tokenizer of the base."""
    state = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    if rank == 0:
        whole = MoETransformer(model.config)
        for name, parameter in whole.named_parameters():
            parameter.copy_(state[name])
        save_model(whole, folder)
        shutil.copy(base / "tokenizer.json", folder / "tokenizer.json")


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
    growth = drlora.RankGrowth(model, args.rank, steps) if METHODS[args.method].grows else None
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
        aux = {"aux_loss": args.router_aux_loss, "aux_form": args.router_aux_form}
        done = global_step(model, batch, args.micro_batch, rank, world, **aux)
        if growth:
            growth.observe(done.counts)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        if growth:
            growth.grow(step)
        examples_seen, tokens_seen = examples_seen + len(batch), tokens_seen + done.tokens
        seconds = time.perf_counter() - began
        losses.append(done.loss.item())
        record = {
            "step": step,
            "loss": losses[-1],  # nats per target token, mean over the global batch
            "grad_norm": norm.item(),  # before clipping
            "lr": args.lr,
            "target_tokens": done.target_tokens,
            "samples_per_s": examples_seen / seconds,
            "tokens_per_s": tokens_seen / seconds,
            "seconds": seconds,
        }
        if args.router_aux_loss:
            record["aux_loss"] = done.aux_loss.item()
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
        if growth:
            drlora.draw_ranks(growth.history, out / "ranks.png")
    ranks = {"ranks": growth.ranks().tolist()} if growth else {}
    return ranks | {
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


def check_out(out: Path, settings: dict) -> None:
    """InputError if `out` belongs to something else, or to a run with other settings. (The same run starts over.)"""
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


def write_config(out: Path, settings: dict) -> None:
    """Make the run folder: config.json with the settings as resolved, versions and commit."""
    about = {
        "model": settings["model"],
        "settings": settings,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "commit": commit(),
        "command": sys.argv,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None


def commit() -> str | None:
    """The commit of this code, if it lies in a git repository and git is there."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def count(
    model: MoETransformer, items: list[data.Encoded], args: argparse.Namespace, rank: int, world: int
) -> profile.RoutingProfile:
    """The hot-expert catcher: routing counts from --profile, or from a sample of the training data now."""
    if args.profile:
        counted = profile.load_profile(args.profile)
        profile.check_fits(counted, model.config, args.profile)
        return counted
    sample = data.sample(items, args.sample, args.seed)
    pad_id = model.config.pad_token_id or 0
    say(f"counting experts on {len(sample):,} examples ({'LoRA warm-up' if args.warmup == 'lora' else 'base model'})")
    if args.warmup == "lora":
        batches = profile.warmup_batches(sample, args.micro_batch, pad_id, args.seed, rank, world)
        return profile.profile_warmup(model, batches, r=args.rank, alpha=args.alpha, lr=args.lr, seed=args.seed)
    parts = data.micro_batches(sample, args.micro_batch, rank, world)
    return profile.profile_routing(model, [data.collate(part, pad_id) for part in parts if part])


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
