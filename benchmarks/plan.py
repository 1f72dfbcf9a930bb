"""Memory and traffic of a run on machines that are not here: from config.json alone, no weights.

    python bench.py plan --model mixtral-8x7b --method hellora --gpus 2
    python bench.py plan --model allenai/OLMoE-1B-7B-0924 --method lora --gpus 4 --micro-batch 32 --memory 40

Gigabytes are 10^9 bytes, on each GPU. The terms are those of memory.plan, by which train.py chooses --shard. Of full
fine-tuning, whose float32 weights are computed with in bfloat16, what is gathered and kept is half of what is said.
"""

import json

import torch

import hellora
from command import cli
from command.cli import InputError
from command.files import writable
from hub.checkpoint import config_of
from hub.config import PRESETS
from model import MoETransformer
from neighbours import drlora
from run import memory
from run.settings import METHODS, Recipe, hot_experts_per_layer, k_flag


def traffic(plan: memory.Plan, *, full: bool, world: int, sharded: bool, micro_batches: int) -> int:
    """Bytes that each of `world` GPUs sends in an optimizer step, by ring collectives.

    Whole: the gradients, reduced and spread, 2 (N - 1) / N of their bytes. Sharded: what a process holds of every
    weight (bfloat16) and factor (float32) goes round in the forward and again in the backward pass of each micro-batch,
    and the gradients once, or where all weights train (`full`) in each micro-batch. A little too much: embedding and
    head stay gathered between the two passes.
    """
    trained = plan.optimizer // 2
    if not sharded:
        return 2 * (world - 1) * trained // world
    held = plan.weights // 2 if full else plan.weights + plan.adapters  # weights that train are float32
    return (world - 1) * (2 * micro_batches * held + trained * (micro_batches if full else 1))


def main(argv: list[str] | None = None) -> list[dict]:
    parser = cli.Parser(prog="bench.py plan", description="Memory a GPU needs, term by term, and bytes sent a step.")
    whole = cli.number(int, 1)
    parser.add_argument("--model", default="olmoe-1b-7b", help=f"{', '.join(PRESETS)}, a checkpoint folder or a hub id")
    parser.add_argument("--method", default="hellora", choices=list(METHODS), help="what trains")
    parser.add_argument("--k", type=k_flag, help="hot experts per layer (default: experts per token)")
    parser.add_argument("--rank", type=whole, default=Recipe.r, help="LoRA rank r")
    parser.add_argument("--targets", default="all", choices=list(hellora.TARGETS), help="modules beside the experts")
    parser.add_argument("--gpus", type=whole, default=2, help="processes, one a GPU")
    parser.add_argument("--batch", type=whole, default=128, help="examples a step, over all GPUs")
    parser.add_argument("--micro-batch", type=whole, default=16, help="examples a forward pass")
    parser.add_argument("--length", type=whole, default=512, help="tokens of the longest examples")
    parser.add_argument("--memory", type=cli.number(float, 1), default=80, help="GB of a GPU")
    parser.add_argument("--activation-checkpointing", action="store_true", help="compute layers twice, to keep less")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    args = parser.parse_args(argv)
    args.json = args.json and writable(args.json)
    config = config_of(args.model)
    method = METHODS[args.method]
    if args.k and method.experts != "hot":
        raise InputError(f"--k {args.k} has no meaning with --method {args.method}; leave it out")
    num_hot = hot_experts_per_layer(args, config.num_experts, config.num_experts_per_tok)
    num_hot = config.num_experts if method.experts == "all" else num_hot

    def attach(model: MoETransformer) -> None:
        hot = (torch.arange(config.num_experts) < num_hot).expand(len(config.moe_layers), -1)
        r_max = drlora.RESERVED * args.rank if method.grows else None
        hellora.attach(model, hot, args.rank, Recipe.alpha, kind=method.kind, targets=args.targets, r_max=r_max)

    rows = []
    for sharded in (False, True) if method.experts else (True,):  # all weights train in float32, under FSDP
        plan = memory.plan(
            config,
            attach if method.experts else None,
            dtype=torch.bfloat16 if method.experts else torch.float32,
            world=args.gpus,
            sharded=sharded,
            tokens=args.micro_batch * args.length,
            checkpointing=args.activation_checkpointing,
        )
        passes = -(-args.batch // (args.gpus * args.micro_batch))
        sent = traffic(plan, full=not method.experts, world=args.gpus, sharded=sharded, micro_batches=passes)
        row = {"shard": "full" if sharded else "none"} | plan._asdict() | {"total": plan.total, "sent_per_step": sent}
        rows.append(row | {"fits": plan.total <= (1 - memory.SPARE) * args.memory * 1e9})
    cli.say(f"{args.model}, {args.method}, {args.gpus} GPUs of {args.memory:g} GB: GB on each")
    cli.say(f"{'':14}" + "".join(f" --shard {row['shard']:>4}" for row in rows))
    for term in (*memory.Plan._fields, "total", "sent_per_step"):
        cli.say(f"{term.replace('_', ' '):14}" + "".join(f" {row[term] / 1e9:12.2f}" for row in rows))
    cli.say(f"{'fits':14}" + "".join(f" {'yes' if row['fits'] else 'no':>12}" for row in rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows
