"""Fine-tune a mixture of experts: profile, place, train, save. One process or many, the same run.

    torchrun --nproc_per_node 2 train.py --method hellora --k 8          # the embedded model, no GPU needed
    torchrun --nproc_per_node 2 train.py --model allenai/OLMoE-1B-7B-0924 --task gsm8k --method hellora --k 8
    python train.py --save-every 50; python train.py --save-every 50 --resume       # killed at any moment in between

The order matters and is this: count which experts the task uses; choose the hot ones; build the model without weights,
attach adapters (everything else is frozen), shard it, and only then read the weights, each process its own; make the
optimizer; train.

A run folder holds config.json (settings as resolved, versions), profile.json (the counts), adapter/ (the result),
log.jsonl (a record a step), loss.png, result.json and, with --save-every, checkpoint/ (runs.py).

Dimensions: L layers with experts, E experts a layer.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
import hellora
import lori
import profile
from command import cli
from command.cli import InputError, RunError, say
from command.files import atomic_folder, write_text
from hub.checkpoint import resolve
from hub.weights import full_tensor
from lori import sparsify
from model import MoEConfig, MoETransformer, read_config, save_model
from neighbours import drlora
from neighbours.ranks import truncate
from routing import statistics as routing
from run import adapters, memory
from run import folder as runs
from run.processes import Processes, start_processes
from run.settings import METHODS, hot_experts_per_layer, parse_flags
from run.step import global_step, load_shared


def main(argv: list[str] | None = None) -> dict:
    args = parse_flags(argv)
    method = METHODS[args.method]
    folder, out = resolve(args.model), Path(args.out)
    config = read_config(folder)
    num_hot = hot_experts_per_layer(args, config.num_experts, config.num_experts_per_tok)
    hot, start = read_given(args, config)
    if method.experts:
        hellora.check_rank(config, drlora.RESERVED * args.rank if method.grows else args.rank)
    if cli.is_main_process():
        runs.check_out(out, vars(args), args.resume)
    counted = read_counts(args, config) if method.experts else None
    processes = start_processes()
    rank, world, device = processes
    tokenizer = data.load_tokenizer(folder, config)
    examples = data.load_examples(args.task, "train", args.train_data)
    items = data.encode(examples, tokenizer, config.eos_token_id, args.max_length)
    say(f"{args.task}: {len(items):,} examples, {sum(len(item.ids) for item in items):,} tokens")

    # A frozen base may be bfloat16; weights that train, adapters too, are float32, whatever they are computed in.
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype, compute_dtype = (half, None) if method.experts else (torch.float32, half)
    tokens = args.micro_batch * max(len(item.ids) for item in items)
    about = {"method": args.method, "task": args.task, "processes": world}
    if method.experts:
        began = time.perf_counter()
        counted = count(folder, items, args, processes) if counted is None else counted
        hot = choose_experts(counted, args, num_hot) if hot is None else hot
        share = float((counted.counts * hot).sum() / counted.counts.sum())
        say(f"adapted experts take {share:.1%} of the routed tokens")
        about |= {"adapted_share": share, "seconds_profile": time.perf_counter() - began}

    def attach(model: MoETransformer, positions: dict[str, Tensor] | None = None) -> None:
        if hot is not None:
            options = {"kind": method.kind, "targets": args.targets, "seed": args.seed}
            r_max = drlora.RESERVED * args.rank if method.grows else None
            hellora.attach(model, hot, args.rank, args.alpha, r_max=r_max, **options)
        if positions is not None:
            sparsify(model, positions)

    checkpointing = {"checkpointing": args.activation_checkpointing}
    plan = memory.plan(config, attach, dtype=dtype, num_processes=world, sharded=False, tokens=tokens, **checkpointing)
    if compute_dtype in (None, dtype):
        sharded = memory.choose_shard(args.shard, device, world, plan)
    else:
        sharded = True
        say("sharded: FSDP keeps the float32 weights that train, and computes in bfloat16")
        if world == 1:
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    about["shard"] = "full" if sharded else "none"

    def stage(name: str, positions: dict[str, Tensor] | None = None) -> dict:
        """Load, attach, shard, train and save, in the run folder or in a folder of the stage's own."""
        place = partial(attach, positions=positions)
        model = load_shared(folder, dtype, device, sharded=sharded, attach=place, compute_dtype=compute_dtype)
        for layer in model.layers:
            layer.activation_checkpointing = args.activation_checkpointing
        if args.init_adapter:
            adapters.fill_factors(model, start, args.init_adapter)
        say(*hellora.report(model))
        if rank == 0:  # not before: whatever is wrong with the input has shown by now
            runs.write_config(out, vars(args))
            if counted:
                profile.save_profile(counted, out / "profile.json", args.model, args.task)
        trainable, total = hellora.count_parameters(model)
        result = fit(model, items, args, out / name, processes, [example.id for example in examples])
        if hot is None:
            state = {}
            with atomic_folder(out / name / "model") if rank == 0 else nullcontext(out) as part:
                save_model(model, part)
                if rank == 0:
                    shutil.copy(folder / "tokenizer.json", part / "tokenizer.json")
        else:
            state, adapter = adapters.adapter_state(model), model.adapter
            if method.grows:  # what never grew is neither kept nor counted: the size is that of LoRA at --rank
                adapter = replace(adapter, ranks=result.pop("ranks"))
                state = truncate(state, torch.tensor(adapter.ranks))
                unused = trainable - sum(tensor.numel() for tensor in state.values())
                trainable, total = trainable - unused, total - unused
            if rank == 0:
                with atomic_folder(out / name / "adapter") as part:
                    adapters.save_adapter(state, part, adapter, model=args.model, method=args.method)
        sizes = {"adapter_bytes": sum(tensor.nbytes for tensor in state.values())}
        return {"trainable": trainable, "trainable_percent": 100 * trainable / total, "state": state} | result | sizes

    if method.sparse:
        if args.mask:
            state = start
        elif args.resume and (out / "stage-d" / "adapter").is_dir():
            runs.cut_log(out / "stage-d" / "log.jsonl", total_steps(args, len(items)), whole=True)
            say(f"stage D is done: {out / 'stage-d'}")
            state = adapters.read_adapter(out / "stage-d" / "adapter")[1]
        else:
            say("stage D: all of B trains, to find the tenth of its entries that matters")
            state = stage("stage-d")["state"]
        say("stage S: these entries alone, from zero, under the same A")
        result = stage("", lori.top_entries(state))
    else:
        result = stage("")
    del result["state"]
    result = about | result
    if rank == 0:
        write_text(out / "result.json", json.dumps(result, indent=1) + "\n")
        say(
            f"{args.method} on {args.task}: loss {result['first_loss']:.4f} -> {result['last_loss']:.4f} in "
            f"{result['steps']} steps, {result['samples_per_s']:.1f} samples/s, {result['seconds']:.0f} s; run in {out}"
        )
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return result


# --------------------------------------------------------------------------------------------- before training


def read_counts(args: argparse.Namespace, config: MoEConfig) -> profile.RoutingProfile | None:
    """The routing counts of --profile, or those that the run to resume has made; None: they are yet to be made."""
    before = Path(args.out) / "profile.json"
    source = before if args.resume and before.is_file() else args.profile
    if not source:
        return None
    counted = profile.load_profile(source)
    profile.check_fits(counted, config, source)
    if (counted.model, counted.task) != (args.model, args.task):
        say(f"note: {source} counted {counted.task} on {counted.model}, and this run is {args.task} on {args.model}")
    return counted


def read_given(args: argparse.Namespace, config: MoEConfig) -> tuple[Tensor | None, dict[str, Tensor] | None]:
    """What --mask, --init-adapter or a file of --experts say: the experts [L, E], and an adapter's tensors."""
    if args.mask:
        adapter, state = adapters.read_mask(args)
    elif args.init_adapter:
        adapter, state = adapters.read_any_adapter(args.init_adapter, config)
        kind = METHODS[args.method].kind
        if adapter.kind != kind:
            is_of = f"is of kind {adapter.kind}"
            raise InputError(f"--init-adapter {args.init_adapter} {is_of}; --method {args.method} is {kind}")
        if kind == "lori" and adapter.seed != args.seed:
            raise InputError(f"--init-adapter {args.init_adapter} has its A from --seed {adapter.seed}; give the same")
        if any(name.endswith("positions") for name in state):
            holds = "holds a tenth of B alone (LoRI-S)"
            raise InputError(f"--init-adapter {args.init_adapter} {holds}; want a dense adapter")
        args.rank, args.alpha, args.targets = adapter.r, adapter.alpha, adapter.targets
    elif args.experts and args.experts not in hellora.POLICIES:
        return adapters.read_hot(args.experts, config), None
    else:
        return None, None
    return adapters.hot_mask(adapter.hot, config), state


def count(
    folder: Path, items: list[data.Encoded], args: argparse.Namespace, processes: Processes
) -> profile.RoutingProfile:
    """The hot-expert catcher: routing counts from a sample of the training data."""
    sample = data.sample(items, args.sample, args.seed)
    say(f"counting experts on {len(sample):,} examples ({'LoRA warm-up' if args.warmup == 'lora' else 'base model'})")
    warmup = profile.Warmup(args.rank, args.alpha, args.lr, batch=16) if args.warmup == "lora" else None
    return profile.count_task(
        folder, sample, args.micro_batch, processes, shard=args.shard, warmup=warmup, seed=args.seed
    )


def choose_experts(counted: profile.RoutingProfile, args: argparse.Namespace, num_hot: int) -> Tensor:
    """By the policy of --experts.  -> hot bool [L, E]"""
    scores = counted.gate_mass if args.scores == "gate-mass" else counted.counts
    number = None if args.experts in ("all", "coverage") else num_hot
    return hellora.select_experts(args.experts, scores, number, coverage=args.coverage, seed=args.seed)


# ---------------------------------------------------------------------------------------------------- training


def total_steps(args: argparse.Namespace, examples: int) -> int:
    return args.steps or args.epochs * -(-examples // args.batch)


def fit(
    model: MoETransformer,
    items: list[data.Encoded],
    args: argparse.Namespace,
    out: Path,
    processes: Processes,
    ids: list[str],
) -> dict:
    """Train whatever requires a gradient; log.jsonl and loss.png go to `out`.  -> losses, steps and speed

    ids: the examples' names, for a batch whose numbers are none.
    """
    rank, world, _ = processes
    steps_per_epoch, steps = -(-len(items) // args.batch), total_steps(args, len(items))
    if steps < 2 and METHODS[args.method].grows:
        raise InputError(f"a run of {steps} step has no time for ranks to grow; want at least 2 steps")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Constant rate, no weight decay: what LoRI's code does, on which the paper's numbers rest. The paper is silent.
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=0.0, fused=True)
    growth = drlora.RankGrowth(model, args.rank, steps) if METHODS[args.method].grows else None
    reach = routing.IdleExperts(model)
    numbers = {"examples": 0, "tokens": 0, "seconds": 0.0, "skipped": 0}
    first, losses, checkpoints = 1, [], out / "checkpoint"
    seen = f"{len(items)} examples of {sum(len(item.ids) for item in items)} tokens"
    if args.resume and (last := runs.last_state(checkpoints)):
        saved = runs.load_state(last, trained, optimizer)
        first, numbers = saved["step"] + 1, saved["numbers"]
        reach.load_state_dict(saved["reach"])
        if growth:
            growth.load_state_dict({name: torch.tensor(value) for name, value in saved["growth"].items()})
        if steps < saved["step"]:
            raise InputError(f"{steps} steps are fewer than the {saved['step']} that {last} has done; want more")
        if saved["data"] != seen:
            raise InputError(f"{last} is of {saved['data']}, the training data are {seen} now; give the same")
        if growth and steps != saved["steps"]:
            raise InputError(f"--method {args.method} planned its growth for {saved['steps']} steps; resume with these")
        say(f"going on after step {saved['step']} from {last}")
    elif args.resume:
        say(f"no checkpoint in {checkpoints} yet: starting from the beginning")
    if world > 1:
        furthest = torch.tensor([first, -first], device=model.embed_tokens.weight.device)
        dist.all_reduce(furthest, dist.ReduceOp.MAX)
        if furthest.sum():
            raise InputError(f"processes resume from steps {-furthest[1]} to {furthest[0]}; want one --out for all")
    log = None
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        losses = [record["loss"] for record in runs.cut_log(out / "log.jsonl", first - 1)]
        log = (out / "log.jsonl").open("a", encoding="utf-8")

    def save(step: int) -> None:
        if log:
            os.fsync(log.fileno())
        state = {"steps": steps, "data": seen, "reach": reach.state_dict(), "numbers": numbers}
        if growth:
            state["growth"] = {name: tensor.tolist() for name, tensor in growth.state_dict().items()}
        runs.save_state(checkpoints, step, trained, optimizer, state, args.keep)

    say(f"{steps:,} steps of {args.batch} examples, {world} process{'es' * (world > 1)}")
    bar = tqdm(total=steps, initial=first - 1, disable=rank != 0 or not sys.stderr.isatty(), unit="step")
    began = time.perf_counter() - numbers["seconds"]
    model.train()
    with runs.asked_to_stop() as stop:
        for step in range(first, steps + 1):
            epoch, place = divmod(step - 1, steps_per_epoch)
            batch = data.global_batches(len(items), args.batch, args.seed, epoch)[place]
            aux = {"aux_loss": args.router_aux_loss, "aux_form": args.router_aux_form}
            done = global_step(model, [items[i] for i in batch], args.micro_batch, processes, **aux)
            if growth:
                before = {name: tensor.clone() for name, tensor in growth.state_dict().items()}
                growth.observe(done.routing[0].float())
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.clip)
            norm, loss = full_tensor(norm).item(), done.loss.item()
            is_finite = math.isfinite(loss) and math.isfinite(norm)
            if is_finite:
                optimizer.step()
                if growth:
                    growth.grow(step)
            elif args.on_nonfinite == "skip":
                numbers["skipped"] += 1
                say(f"step {step}: loss {loss}, gradient norm {norm}: skipped")
                if growth:
                    growth.load_state_dict(before)
            else:
                good = runs.last_state(checkpoints)
                raise RunError(
                    f"step {step}: loss {loss}, gradient norm {norm}, on examples {' '.join(ids[i] for i in batch)}; "
                    f"the last good checkpoint is {good or 'none (--save-every N makes them)'}. Lower --lr, look at "
                    "the examples, or give --on-nonfinite skip"
                )
            optimizer.zero_grad()
            reach.observe(done.routing[0], end_of_epoch=place == steps_per_epoch - 1)
            seconds = time.perf_counter() - began
            numbers["examples"] += len(batch)
            numbers["tokens"] += done.tokens
            numbers["seconds"] = seconds
            losses.append(loss if is_finite else None)
            record = {
                "step": step,
                "loss": losses[-1],  # nats per target token, mean over the global batch; None: the step was skipped
                "grad_norm": norm if is_finite else None,  # before clipping
                "lr": args.lr,
                "target_tokens": done.target_tokens,
                "samples_per_s": numbers["examples"] / seconds,
                "tokens_per_s": numbers["tokens"] / seconds,
                "seconds": seconds,
            }
            if args.router_aux_loss:
                record["aux_loss"] = done.aux_loss.item()
            if growth:
                record |= growth.spent()
            if log:
                print(json.dumps(record), file=log, flush=True)
            bar.set_postfix_str(f"loss {loss:.4f}, {record['samples_per_s']:.1f} samples/s", refresh=False)
            bar.update()
            if bar.disable and (step == first or step % max(1, steps // 20) == 0):
                say(
                    f"step {step:5d}/{steps}  loss {loss:.4f}  grad norm {norm:.3f}  "
                    f"{record['samples_per_s']:.1f} samples/s  {record['tokens_per_s']:,.0f} tokens/s  "
                    f"{seconds / step * (steps - step):.0f} s left"
                )
            number = stop(world)
            if number or (args.save_every and (step % args.save_every == 0 or step == steps)):
                save(step)
            if number:
                say(f"stopped by {signal.Signals(number).name} after step {step}; --resume goes on from there")
                raise SystemExit(128 + number)
    bar.close()
    if log:
        log.close()
        losses = [loss for loss in losses if loss is not None]
        if not losses:
            raise RunError("every step was skipped: nothing has been learnt; lower --lr, or look at the data")
        runs.draw_loss(losses, out / "loss.png", f"{args.method} on {args.task}")
        if growth:
            drlora.draw_ranks(growth.history, out / "ranks.png")
    idle = reach.names()
    if idle:
        say(f"{len(idle)} adapted experts (layer:expert) saw no token in an epoch, or in the run: {' '.join(idle)}")
    ranks = {"ranks": growth.ranks().tolist()} if growth else {}
    return ranks | {
        "steps": steps,
        "first_loss": losses[0] if losses else None,  # the main process alone has those of before a resume
        "last_loss": losses[-1] if losses else None,
        "samples_per_s": numbers["examples"] / numbers["seconds"],
        "tokens_per_s": numbers["tokens"] / numbers["seconds"],
        "seconds": numbers["seconds"],
        "skipped_steps": numbers["skipped"],
        "idle_hot_experts": idle,
        "optimizer_bytes": state_bytes(optimizer),
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of AdamW's two moments on this process."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return sum(local.nbytes for t in tensors for local in [t.to_local() if isinstance(t, DTensor) else t])


if __name__ == "__main__":
    cli.run(main)
