"""Fine-tune a mixture of experts: count, choose, attach, train, save.

    torchrun --nproc_per_node 2 train.py --method hellora --k 8          # the embedded model, no GPU needed
    torchrun --nproc_per_node 2 train.py --model allenai/OLMoE-1B-7B-0924 --task gsm8k --method hellora --k 8
    python train.py --save-every 50; python train.py --save-every 50 --resume       # killed at any moment in between

`main` reads top to bottom. It resolves the settings, counts which experts the task uses, chooses the hot ones, and
trains what the method asks for. `load` builds the model without weights, attaches the adapters, which freezes the rest,
shards, and only then reads the weights, each process its own. `fit` is the loop. L layers with experts, E per layer.
"""

import command.start  # noqa: F401

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import data
import hellora
import profile
from command import cli
from command.cli import note, say
from command.files import atomic_folder, write_json
from hub.checkpoint import copy_beside, resolve
from hub.config import ignore_keys
from hub.weights import full_tensor
from lori import sparsify, top_entries
from model import MoEConfig, MoETransformer, read_config, save_model
from neighbours import drlora
from neighbours.ranks import truncate
from ops import Dropout
from run import adapters, memory, recipes
from run.folder import check_out, earlier_result, write_config
from run.log import Recorder, check_records, stop, stop_signals, summary
from run.methods import METHODS, num_hot_experts
from run.processes import Processes, end_processes, freed_memory_kept, processes_per_machine, start_processes
from run.report import package, reporting
from run.schedule import rate, warmup_steps
from run.settings import Settings, parse_settings
from run.state import Checkpoints, moment_bytes, pinned
from run.step import global_step, load_shared
from run.subject import content_of
from run.validation import BEST, Validation, split

# -------------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Run:
    """What the parts of a run share."""

    settings: Settings
    folder: Path  # checkpoint of the base model
    content: dict  # digests of the base model and the training data
    processes: Processes
    items: list[data.Encoded]
    held_out: list[data.Encoded]  # for validation; none without
    steps: int
    counted: profile.RoutingProfile | None
    hot: Tensor | None  # bool [L, E], the adapted experts; None: every base weight trains
    given: dict[str, Tensor] | None  # tensors of --mask or --init-adapter
    dropout: Dropout | None = None  # shared by all adapters
    shard: str = "none"  # how the processes hold the base model, see `load_shared`


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(argv)
    if settings.recipe:
        say(*recipes.described(asdict(settings)))
    ignore_keys(settings.ignore_config_keys)
    if settings.report_to != "none":
        package(settings.report_to)  # an error now, not after the download
    method, folder, out = METHODS[settings.method], resolve(settings.model), Path(settings.out)
    config = read_config(folder)
    settings, hot, given = read_given(settings, config)
    check_sizes(settings, config)
    if cli.is_main_process():
        check_out(out, asdict(settings))
    counted = read_counts(settings, config) if method.experts else None
    processes = start_processes()
    digests, items, held_out = read_data(settings, folder, config)
    steps = settings.steps or settings.epochs * -(-len(items) // settings.batch)
    if method.grows:
        drlora.growth_steps(steps)  # an error now, not in the middle of the run
    warmup_steps(settings.lr_warmup, steps)  # the same
    content = processes.once(lambda: content_of(folder, settings.mask or settings.init_adapter)) | digests
    if earlier := processes.once(lambda: earlier_result(out, content, steps, settings.resume)):
        say(f"{out} holds this run already, with all its {earlier['steps']} steps: nothing to do")
        end_processes()
        return earlier
    dropout = Dropout(settings.lora_dropout, settings.seed) if settings.lora_dropout else None
    run = Run(settings, folder, content, processes, items, held_out, steps, counted, hot, given, dropout)
    run, about = place(run) if method.experts else (run, {})
    run = replace(run, shard=choose_sharding(run, config))
    result = train_lori_s(run) if method.sparse else train(run, out)[0]
    about = {"method": settings.method, "task": settings.task, "processes": processes.count} | about
    result = about | {"shard": run.shard} | result
    if processes.is_main:
        write_json(out / "result.json", result)
        say(f"{summary(result)}; run in {out}")
    end_processes()
    return result


# -------------------------------------------------------------------------------------------------- before training


def read_given(settings: Settings, config: MoEConfig) -> tuple[Settings, Tensor | None, dict[str, Tensor] | None]:
    """What --mask, --init-adapter or a file of --experts bring.  -> settings, experts bool [L, E], adapter's tensors

    An adapter to start from brings its rank, alpha and targets.
    """
    s = settings
    if s.mask:
        adapter, state = adapters.read_mask(s.mask, rank=s.rank, alpha=s.alpha, targets=s.targets, seed=s.seed)
    elif s.init_adapter:
        adapter, state = adapters.read_start(s.init_adapter, config, METHODS[s.method].kind, s.seed)
        s = replace(s, rank=adapter.r, alpha=adapter.alpha, targets=adapter.targets)
    elif s.experts and s.experts not in hellora.POLICIES:
        return s, adapters.read_hot(s.experts, config), None
    else:
        return s, None, None
    return s, adapters.hot_mask(adapter.hot, config), state


def check_sizes(settings: Settings, config: MoEConfig) -> None:
    """Raise InputError for a number of experts or a rank that the model does not have room for."""
    num_hot_experts(settings.k, config.num_experts, config.num_experts_per_tok)
    if METHODS[settings.method].grows:
        drlora.check_rank(settings.rank, hellora.largest_rank(config))
    elif METHODS[settings.method].experts:
        hellora.check_rank(config, settings.rank)


def read_data(
    settings: Settings, folder: Path, config: MoEConfig
) -> tuple[dict[str, str], list[data.Encoded], list[data.Encoded]]:
    """Digests of the data for config.json, and the examples to train on and those to validate on, as token ids."""
    options = {"max_length": settings.max_length, "bos": settings.bos, "prompt": settings.prompt}
    reader = data.Reader(settings.task, folder, config, **options)
    examples = reader.load("train", settings.train_data)
    eos_id, eos = data.end_token(reader.tokenizer, config)
    items, held_out, digests = reader.encode(examples), [], {"data": data.digest(examples)}
    if settings.valid_data:
        others = reader.load("train", settings.valid_data)
        held_out, digests["valid"] = reader.encode(others), data.digest(others)
    elif settings.valid_share:
        items, held_out = split(items, settings.valid_share, settings.seed)
    known = {tuple(item.ids) for item in items}
    if twice := sum(tuple(item.ids) in known for item in held_out):
        note(f"{twice} of {len(held_out)} rows to validate on are among the rows to train on; hold out others")
    tokens = f"{sum(len(item.ids) for item in items):,} tokens"
    if settings.loss_on == "all":
        items, held_out = ([replace(item, spans=((0, len(item.ids)),)) for item in part] for part in (items, held_out))
    begin = "" if settings.task != "own" and settings.bos == "auto" else f"; {reader.bos.said}"
    begin += f"; {len(held_out):,} examples held out for validation" if held_out else ""
    say(f"{settings.task}: {len(items):,} examples, {tokens}; targets end with {eos!r} (id {eos_id}){begin}")
    return digests, items, held_out


def read_counts(settings: Settings, config: MoEConfig) -> profile.RoutingProfile | None:
    """The routing counts of --profile, or those of the run to resume. None: they have yet to be made."""
    before = Path(settings.out) / "profile.json"
    source = before if settings.resume and before.is_file() else settings.profile
    if not source:
        return None
    counted = profile.load_profile(source)
    profile.check_fits(counted, config, source)
    return counted


def place(run: Run) -> tuple[Run, dict]:
    """Count the experts and choose those to adapt, unless this is given.  -> the run with both, for result.json"""
    began, settings, counted = time.perf_counter(), run.settings, run.counted
    origin = {"data": run.content["data"], "weights": run.content["base"]["weights"]}
    if counted:
        profile.note_origin(counted, settings.model, settings.task, **origin)
    else:
        counted = replace(count(settings, run.folder, run.items, run.processes), **origin)
    run = replace(run, counted=counted, hot=choose_experts(settings, counted) if run.hot is None else run.hot)
    share = float((counted.counts * run.hot).sum() / counted.counts.sum())
    say(f"adapted experts receive {share:.1%} of the routed tokens")
    return run, {"adapted_share": share, "seconds_profile": time.perf_counter() - began}


def count(settings: Settings, folder: Path, items: list[data.Encoded], processes: Processes) -> profile.RoutingProfile:
    """Routing counts on a sample of the training data."""
    s, sample = settings, data.sample(items, settings.sample, settings.seed)
    way = {"lora": "LoRA warm-up", "none": "base model"}[s.warmup]
    say(f"counting tokens per expert on {len(sample):,} examples ({way})")
    warmup = profile.Warmup(s.rank, s.alpha, s.lr, batch=16) if s.warmup == "lora" else None
    options = {"dtype": getattr(torch, s.dtype), "shard": s.shard, "warmup": warmup, "seed": s.seed}
    return profile.count_task(folder, sample, s.micro_batch, processes, **options)


def choose_experts(settings: Settings, counted: profile.RoutingProfile) -> Tensor:
    """The experts that the policy of --experts selects.  -> hot bool [L, E]"""
    scores = counted.gate_mass if settings.scores == "gate-mass" else counted.counts
    k = settings.k or METHODS[settings.method].k
    num_hot = num_hot_experts(k, counted.counts.shape[1], counted.num_experts_per_tok)
    num_hot = None if settings.experts in ("all", "coverage") else num_hot
    return hellora.select_experts(settings.experts, scores, num_hot, coverage=settings.coverage, seed=settings.seed)


def dtypes(run: Run) -> tuple[torch.dtype, torch.dtype]:
    """Of the base weights, and of the computation. Whatever trains is float32; a frozen base need not be."""
    dtype = getattr(torch, run.settings.dtype)
    return (dtype if METHODS[run.settings.method].experts else torch.float32), dtype


def choose_sharding(run: Run, config: MoEConfig) -> str:
    """Whether the base model is sharded over the processes (FSDP2) or those of a machine, or replicated on each."""
    s, processes, (dtype, compute_dtype) = run.settings, run.processes, dtypes(run)
    if dtype != compute_dtype:
        say("sharded: FSDP keeps the float32 weights that train, and computes in bfloat16")
        if processes.count == 1:
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        return "hybrid" if s.shard == "hybrid" and processes_per_machine() < processes.count else "full"
    sizes = {"tokens": s.micro_batch * max(len(item.ids) for item in run.items), "dtype": dtype}
    plan_of = partial(memory.plan, config, partial(attach, run), checkpointing=s.activation_checkpointing, **sizes)
    return memory.choose_shard(s.shard, processes.device, processes.count, plan_of)


# --------------------------------------------------------------------------------------------------- what to train


def attach(run: Run, model: MoETransformer, positions: dict[str, Tensor] | None = None) -> None:
    """Put the run's adapters on a model. positions: the entries of B that LoRI-S keeps (`top_entries`)."""
    s, method = run.settings, METHODS[run.settings.method]
    if run.hot is not None:
        r_max = drlora.RESERVED * s.rank if method.grows else None
        options = {"kind": method.kind, "targets": s.targets, "seed": s.seed, "r_max": r_max, "dropout": run.dropout}
        hellora.attach(model, run.hot, s.rank, s.alpha, **options)
    if positions is not None:
        sparsify(model, positions)


def load(run: Run, positions: dict[str, Tensor] | None = None) -> MoETransformer:
    """The base model with the run's adapters, as this process is to hold it."""
    s, processes = run.settings, run.processes
    dtype, compute_dtype = dtypes(run)
    options = {"shard": run.shard, "compute_dtype": compute_dtype if compute_dtype != dtype else None}
    attached = partial(attach, run, positions=positions)
    model = load_shared(run.folder, dtype, processes.device, attach=attached, **options)
    for layer in model.layers:
        layer.activation_checkpointing = s.activation_checkpointing
    if s.init_adapter:
        adapters.fill_factors(model, run.given, s.init_adapter)
    say(*hellora.report(model))
    return model


def write_about(run: Run) -> None:
    """config.json and profile.json. Not earlier than the first step: by then any fault of the input has been found."""
    out, settings = Path(run.settings.out), run.settings
    if run.processes.is_main:
        write_config(out, asdict(settings), run.content)
    if run.processes.is_main and run.counted:
        profile.save_profile(run.counted, out / "profile.json", settings.model, settings.task)


def save(
    run: Run, model: MoETransformer, folder: Path, about: dict | None = None, ranks: list | None = None
) -> dict[str, Tensor]:
    """Write what has been learnt so far: an adapter, or the checkpoint of full fine-tuning.  -> the adapter's tensors

    about: of the validation that chose it. ranks: those in use, of an adapter whose ranks grow; what never grew is not
    kept. Every process must call it.
    """
    is_main, adapter = run.processes.is_main, model.adapter
    state = adapters.adapter_state(model) if adapter else {}
    if ranks is not None:
        adapter, state = replace(adapter, ranks=ranks), truncate(state, torch.tensor(ranks))
    with atomic_folder(folder) if is_main else nullcontext(folder) as part:
        if adapter is None:
            save_model(model, part)
        if is_main:
            if adapter is None:
                copy_beside(run.folder, part)
            else:
                adapters.save_adapter(state, part, adapter, model=run.settings.model, method=run.settings.method)
            if about:
                write_json(part / "validation.json", about)
    return state


def train(run: Run, out: Path, positions: dict[str, Tensor] | None = None) -> tuple[dict, dict[str, Tensor]]:
    """Train what the method asks for, and save it in out/adapter, or as a checkpoint like the base model in out/model.

    -> for result.json, the adapter's tensors
    """
    model = load(run, positions)
    trainable, total = hellora.count_parameters(model)
    result = fit(run, model, out)
    ranks = result.pop("ranks", None)
    state = save(run, model, out / ("adapter" if model.adapter else "model"), ranks=ranks)
    if ranks is not None:  # what never grew is not counted: the size is that of LoRA at --rank
        unused = trainable - sum(tensor.numel() for tensor in state.values())
        trainable, total = trainable - unused, total - unused
    sizes = {"adapter_bytes": sum(tensor.nbytes for tensor in state.values())}
    return {"trainable": trainable, "trainable_percent": 100 * trainable / total} | result | sizes, state


def train_lori_s(run: Run) -> dict:
    """LoRI-S and HELLoRI-S: stage D finds the entries of B that matter, stage S trains them.  -> for result.json"""
    out, settings = Path(run.settings.out), run.settings
    stage_d = out / "stage-d"
    if settings.mask:
        state = run.given
    elif settings.resume and (stage_d / "adapter").is_dir():
        check_records(stage_d / "log.jsonl", run.steps, settings.patience)
        say(f"stage D is done: {stage_d}")
        _, state = adapters.read_adapter(stage_d / "adapter")
    else:
        say("stage D: all of B trains, to find the tenth of its entries that matters")
        _, state = train(run, stage_d)
    say("stage S: these entries alone, from zero, under the same A")
    return train(run, out, top_entries(state))[0]


# --------------------------------------------------------------------------------------------------------- training


def validation_of(
    run: Run, model: MoETransformer, out: Path, growth: drlora.RankGrowth | None, steps_per_epoch: int
) -> Validation:
    """The validations of a training, which keep the best result beside the last in `out`."""

    def keep(folder: Path, about: dict) -> None:
        save(run, model, folder, about, growth.ranks().tolist() if growth else None)

    s, folder = run.settings, out / BEST["adapter" if model.adapter else "model"]
    when = {"every": s.valid_every or steps_per_epoch, "steps": run.steps, "patience": s.patience}
    return Validation(run.held_out, model, run.processes, folder, keep, micro_batch=s.micro_batch, **when)


def fit(run: Run, model: MoETransformer, out: Path) -> dict:
    """Train whatever requires a gradient. The log, its picture and checkpoints go to `out`.  -> for result.json"""
    settings, items, processes, steps = run.settings, run.items, run.processes, run.steps
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # By default the rate is constant and nothing decays, as in LoRI's code, on which the paper's numbers rest.
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    scheduled = settings.schedule, warmup_steps(settings.lr_warmup, steps)
    growth = drlora.RankGrowth(model, settings.rank, steps) if METHODS[settings.method].grows else None
    recorder = Recorder(
        out, model, processes, title=f"{settings.method} on {settings.task}", steps=steps,
        steps_per_epoch=-(-len(items) // settings.batch), skips_nonfinite=settings.on_nonfinite == "skip",
    )  # fmt: skip
    validation = validation_of(run, model, out, growth, recorder.steps_per_epoch)
    parts = {"numbers": recorder, "reach": recorder.idle_experts} | ({"growth": growth} if growth else {})
    parts |= {"validations": validation} if run.held_out else {}
    plans = growth or scheduled != ("constant", 0)
    kept_same = pinned(items, run.held_out, model, settings.router_aux_loss, steps if plans else None)
    options = {"pinned": kept_same, "steps": steps, "keep": settings.keep, "processes": processes}
    checkpoints = Checkpoints(out / "checkpoint", trained, optimizer, parts, **options)
    first = checkpoints.resume() if settings.resume else 1
    write_about(run)
    say(f"{steps:,} steps of {settings.batch} examples, {processes.count} process{'es' * (processes.count > 1)}")
    model.train()
    report_to = settings.report_to if processes.is_main else "none"
    reports = reporting(report_to, out, asdict(settings), first)
    kept = freed_memory_kept(processes.device)
    with recorder.recording(first), reports as report, stop_signals(processes) as signalled, kept:
        for step, batch in data.numbered_batches(len(items), settings.batch, settings.seed, first, steps):
            if validation.ended:
                break
            if run.dropout:
                run.dropout.step = step
            options = {"aux_loss": settings.router_aux_loss, "aux_form": settings.router_aux_form}
            options["dropout"] = run.dropout
            done = global_step(model, [items[i] for i in batch], settings.micro_batch, processes, **options)
            if growth:
                growth.observe(done.routing[0].float())
            optimizer.param_groups[0]["lr"] = lr = rate(settings.lr, scheduled[0], step, steps, scheduled[1])
            norm = full_tensor(torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip)).item()
            if recorder.is_finite(step, done.loss.item(), norm, [items[i].example for i in batch]):
                optimizer.step()
            elif growth:
                growth.forget()
            optimizer.zero_grad()
            if growth:
                growth.grow(step)
            extra = {"aux_loss": done.aux_loss.item()} if settings.router_aux_loss else {}
            extra |= (growth.spent() if growth else {}) | validation.after(step)
            report(recorder.record(step, done, norm, lr, len(batch), extra))
            number = signalled()
            is_last = step == steps or validation.ended
            if number or (settings.save_every and (step % settings.save_every == 0 or is_last)):
                recorder.sync()
                checkpoints.save(step)
            if number:
                stop(number, step)
    result = recorder.result(validation.losses) | validation.result() | {"optimizer_bytes": moment_bytes(optimizer)}
    if growth and processes.is_main:
        drlora.draw_ranks(growth.history, out / "ranks.png")
    return result | ({"ranks": growth.ranks().tolist()} if growth else {})


if __name__ == "__main__":
    cli.run(main)
