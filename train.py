"""Fine-tune a mixture of experts: count, choose, attach, train, save.

    torchrun --nproc_per_node 2 train.py --method hellora --k 8          # the embedded model, no GPU needed
    torchrun --nproc_per_node 2 train.py --model allenai/OLMoE-1B-7B-0924 --task gsm8k --method hellora --k 8
    python train.py --save-every 50; python train.py --save-every 50 --resume       # killed at any moment in between

The file reads top to bottom. `main` counts which experts the task uses, chooses the hot ones, and trains what the
method asks for. `load` builds the model without weights, attaches the adapters, which freezes the rest, shards, and
only then reads the weights, each process its own. `fit` is the loop; training_step.py is the step that it takes.
What the flags leave open is in recipes/methods.py: the recipe of the task, and the row of the method.
"""

import command.start  # noqa: F401

import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import data
import hellora
import ops
from command import cli
from command.cli import say
from command.files import claimed, write_json
from lora import seed_dropout
from lori import sparsify, top_entries
from machine.processes import end_processes, freed_memory_kept
from model import MoETransformer
from neighbours import drlora
from profile import Warmup, count_task
from recipes.methods import num_hot_experts
from routing.profiles import RoutingProfile, note_origin
from run import adapters
from run.folder import earlier_result
from run.inputs import Run, prepare
from run.log import check_records, summary
from run.observers import Observers
from run.output import check_space, draw_adapter, save, write_inputs
from run.schedule import rate, warmup_steps
from run.settings import Settings, parse_settings
from run.sharding import choose_sharding
from run.state import naming_checkpoint
from training_step import load_for_process, train_step


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(argv)
    with claimed(Path(settings.out)) if cli.is_main_process() else nullcontext():
        return train_claimed(settings)


def train_claimed(settings: Settings) -> dict:
    """The run in the folder that this process has claimed.  -> result.json"""
    run = prepare(settings)
    earlier = run.processes.once(lambda: earlier_result(run.out, run.content, run.steps, run.settings.resume))
    if earlier:
        say(f"{run.out} holds this run already, with all its {earlier['steps']} steps: nothing to do")
        end_processes()
        return earlier
    result = {"method": run.settings.method, "task": run.settings.task, "processes": run.processes.count}
    compiled = ops.compile_elementwise(run.processes.device, run.dtypes[1]) if run.settings.compile else {}
    if run.method.adapts:
        started = time.perf_counter()
        run = count_and_choose(run)
        result |= {"adapted_share": adapted_share(run), "seconds_profile": time.perf_counter() - started}
    run = replace(run, shard=choose_sharding(run, partial(attach_adapters, run)))
    with ops.using(compiled):
        trained = train_lori_s(run) if run.method.sparse else train(run, run.out)[0]
    result |= {"shard": run.shard} | trained
    if run.processes.is_main:
        write_json(run.out / "result.json", result)
    end_processes()
    if run.processes.is_main:
        if run.method.adapts:
            draw_adapter(run)
        say(f"{summary(result)}; run in {run.out}")
    return result


# ----------------------------------------------------------------------------------------------- count and choose


def count_and_choose(run: Run) -> Run:
    """Count the experts and choose those to adapt, unless this is given."""
    s, content = run.settings, run.content
    origin = {"model": s.model, "task": s.task, "data": content["data"], "weights": content["base"]["weights"]}
    if run.counted:
        note_origin(run.counted, **origin)
    else:
        run = replace(run, counted=replace(count(run), began=content["began"], **origin))
    if run.hot is None:
        run = replace(run, hot=choose_experts(run))
    say(f"adapted experts receive {adapted_share(run):.1%} of the routed tokens")
    return run


def count(run: Run) -> RoutingProfile:
    """Routing counts on a sample of the training data."""
    s, sample = run.settings, data.sample(run.items, run.settings.sample, run.settings.seed)
    counted_model = {"lora": "LoRA warm-up", "base": "base model"}[s.count_on]
    say(f"counting tokens per expert on {len(sample):,} examples ({counted_model})")
    warmup = Warmup(s.rank, s.alpha, s.lr, s.batch) if s.count_on == "lora" else None
    dtype = getattr(torch, s.dtype)
    return count_task(
        run.folder, sample, s.micro_batch, run.processes, dtype=dtype, shard=s.shard, warmup=warmup, seed=s.seed
    )


def choose_experts(run: Run) -> Tensor:
    """The experts that the policy of --experts selects.  -> hot bool [L, E]"""
    s, counted = run.settings, run.counted
    ranking = counted.gate_mass if s.scores == "gate-mass" else counted.counts  # [L, E]
    num_hot = None
    if s.experts in hellora.NUMBERED:
        num_hot = num_hot_experts(s.k or run.method.k, run.config.num_experts, run.config.num_experts_per_tok)
    return hellora.select_experts(s.experts, ranking, num_hot, coverage=s.coverage, seed=s.seed)


def adapted_share(run: Run) -> float:
    """Share of the routed tokens that reach an adapted expert."""
    counts = run.counted.counts
    return float((counts * run.hot).sum() / counts.sum())


# -------------------------------------------------------------------------------------------------- build the model


def attach_adapters(run: Run, model: MoETransformer, positions: dict[str, Tensor] | None = None) -> None:
    """Put the run's adapters on a model. positions: the entries of B that LoRI-S keeps (`top_entries`)."""
    s = run.settings
    if run.hot is not None:
        hellora.attach(
            model,
            run.hot,
            s.rank,
            s.alpha,
            kind=run.method.kind,
            targets=s.targets,
            seed=s.seed,
            expert_rank=drlora.RESERVED * s.rank if run.method.grows else s.expert_rank,
            dropout=s.lora_dropout,
        )
    if positions is not None:
        sparsify(model, positions)


def load(run: Run, positions: dict[str, Tensor] | None = None) -> MoETransformer:
    """The base model with the run's adapters, as this process is to hold it.

    `model.load_model` builds it without weights, has `attach_adapters` called and the model sharded, and then reads.
    """
    dtype, compute_dtype = run.dtypes
    model = load_for_process(
        run.folder,
        dtype,
        run.processes.device,
        shard=run.shard,
        attach=partial(attach_adapters, run, positions=positions),
        compute_dtype=compute_dtype if compute_dtype != dtype else None,
    )
    for layer in model.layers:
        layer.activation_checkpointing = run.settings.activation_checkpointing
    if run.start:
        adapters.fill_factors(model, run.start, run.settings.init_adapter)
    say(*adapters.report(model))
    return model


# ------------------------------------------------------------------------------------------------------------ train


def train(run: Run, out: Path, positions: dict[str, Tensor] | None = None) -> tuple[dict, dict[str, Tensor]]:
    """Train what the method asks for, and save it in out/adapter, or as a checkpoint like the base model in out/model.

    -> for result.json, the adapter's tensors
    """
    model = load(run, positions)
    with naming_checkpoint(out / "checkpoint"):
        observers = fit(run, model, out)
        trainable, total = hellora.count_parameters(model)
        result = {"trainable": trainable, "trainable_percent": 100 * trainable / total} | observers.result()
        state = save(run, model, out / ("adapter" if model.adapter else "model"))
    observers.draw()
    return result | {"adapter_bytes": sum(tensor.nbytes for tensor in state.values())}, state


def fit(run: Run, model: MoETransformer, out: Path) -> Observers:
    """Train whatever requires a gradient. All else is the observers' (run/observers.py)."""
    s = run.settings
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # On the paper's tasks the rate is constant and nothing decays, as in LoRI's code, on which its numbers rest.
    optimizer = torch.optim.AdamW(trained, lr=s.lr, weight_decay=s.weight_decay, fused=True)
    warmup = warmup_steps(s.lr_warmup, run.steps)
    observers = Observers(run, model, optimizer, out)
    first = observers.checkpoints.resume() if s.resume else 1
    run.processes.once(lambda: check_space(run, model))
    write_inputs(run)
    say(f"{run.steps:,} steps of {s.batch} examples, {run.processes.count} process{'es' * (run.processes.count > 1)}")
    model.train()
    with observers.watching(first), freed_memory_kept(run.processes.device):
        for number, batch in data.numbered_batches(len(run.items), s.batch, s.seed, first, run.steps):
            if observers.ended:
                break
            if s.lora_dropout:
                seed_dropout(s.seed, number, run.processes.index)
            optimizer.param_groups[0]["lr"] = rate(s.lr, s.schedule, number, run.steps, warmup)
            done = train_step(
                model,
                optimizer,
                [run.items[i] for i in batch],
                s.micro_batch,
                run.processes,
                clip=s.clip,
                aux_weight=s.router_aux_loss,
                aux_form=s.router_aux_form,
                on_gradients=observers.on_gradients,
            )
            observers.after(number, done)
    observers.signals.exit_if_interrupted()  # the training is to be continued: there is no result
    return observers


def train_lori_s(run: Run) -> dict:
    """LoRI-S and HELLoRI-S: stage D finds the entries of B that matter, stage S trains them.  -> for result.json"""
    stage_d = run.out / "stage-d"
    if run.settings.resume and (stage_d / "adapter").is_dir():
        check_records(stage_d / "log.jsonl", run.steps, run.settings.patience)
        say(f"stage D is done: {stage_d}")
        _, state = adapters.read_any_adapter(stage_d / "adapter", run.config)
    else:
        say("stage D: all of B trains, to find the tenth of its entries that matters")
        _, state = train(run, stage_d)
    # DEVIATION from LoRI: both stages have the same A; LoRI's code redraws it.
    say("stage S: these entries alone, from zero, under the same A")
    return train(run, run.out, top_entries(state))[0]


if __name__ == "__main__":
    cli.run(main)
