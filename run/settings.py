"""What a run is made of: the recipe of its task, its method as a row of a table, and the flags that change them."""

import argparse
import os
from dataclasses import dataclass

import hellora
from command import cli
from command.cli import InputError


@dataclass(frozen=True)
class Recipe:
    """Settings of a task: Table 1 of the paper for the real ones, ours for the miniature."""

    lr: float
    epochs: int
    fft_lr: float  # of full fine-tuning
    batch: int = 128
    fft_batch: int = 256
    r: int = 32
    alpha: float = 64.0


TINY = {"epochs": 3, "fft_lr": 3e-4, "batch": 32, "fft_batch": 32, "r": 8, "alpha": 16.0}
RECIPES = {
    "gsm8k": Recipe(lr=4e-4, epochs=3, fft_lr=4e-5),
    "codealpaca": Recipe(lr=2e-3, epochs=2, fft_lr=2e-4),
    "saferpaca": Recipe(lr=4e-4, epochs=1, fft_lr=2e-5),
    "tiny-math": Recipe(lr=3e-3, **TINY),
    "tiny-code": Recipe(lr=3e-3, **TINY),
    "tiny-safety": Recipe(lr=3e-3, **TINY),
}


@dataclass(frozen=True)
class Method:
    """Which experts x what trains beside them."""

    experts: str | None  # key of hellora.POLICIES; None: no adapter, the base weights train
    kind: str = "lora"  # key of lora.KINDS
    sparse: bool = False  # a second stage trains a tenth of B, chosen by a first that trained all of it
    grows: bool = False  # ranks start at half of --rank and grow where saliency is high (drlora.py)
    k: int | float | None = None  # hot experts per layer, as a number or a share; None: experts per token


METHODS = {
    "fft": Method(experts=None),
    "lora": Method(experts="all"),
    "dora": Method(experts="all", kind="dora"),
    "lori-d": Method(experts="all", kind="lori"),
    "lori-s": Method(experts="all", kind="lori", sparse=True),
    "hellora": Method(experts="hot"),
    "hellori-d": Method(experts="hot", kind="lori"),
    "hellori-s": Method(experts="hot", kind="lori", sparse=True),
    "moe-sieve": Method(experts="hot", k=0.25),
    "dr-lora": Method(experts="all", grows=True),
}


CHOSEN_WITH_AN_ADAPTER = ("k", "experts", "coverage", "scores", "targets", "rank", "alpha", "profile")  # flags


def experts_flag(text: str) -> str:
    """A selection policy, or a file that lists the experts of every layer (adapter.json, or a list of lists)."""
    if text not in hellora.POLICIES and not os.path.isfile(text):
        allowed = ", ".join(hellora.POLICIES)
        raise argparse.ArgumentTypeError(f"got {text!r}; choose from {allowed}, or name a JSON file of expert lists")
    return text


def k_flag(text: str) -> int | float:
    """8: a number of experts; 0.25: that share of them."""
    try:
        value = int(text) if text.isdecimal() else float(text)
    except ValueError:
        value = 0
    if not (value >= 1 if isinstance(value, int) else 0 < value < 1):
        raise argparse.ArgumentTypeError(f"got {text!r}; want a whole number at least 1, or a share between 0 and 1")
    return value


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run, defaults filled in. Raises InputError for what is wrong or contradicts itself."""
    positive, share = cli.number(int, 1), cli.number(float, 0, 1, above=True)
    amount = cli.number(float, 0, above=True)
    parser = cli.Parser(prog="train.py", description="Fine-tune a mixture of experts on the experts the task uses.")
    parser.add_argument("--model", default="tiny", help="'tiny' (embedded), a checkpoint folder, or a hub id")
    parser.add_argument("--task", default="tiny-math", choices=list(RECIPES), help="what to learn")
    parser.add_argument("--train-data", help="a local copy of the task's training file")
    parser.add_argument("--method", default="hellora", choices=list(METHODS), help="which experts, and what trains")
    parser.add_argument("--k", type=k_flag, help="hot experts per layer: a number or a share")
    parser.add_argument("--experts", type=experts_flag, help="choose the experts otherwise than the method does")
    parser.add_argument("--coverage", type=share, help="share of the routed tokens, for --experts coverage")
    parser.add_argument(
        "--scores", choices=("counts", "gate-mass"), help="what makes an expert hot: its tokens or their weights"
    )
    parser.add_argument("--targets", choices=list(hellora.TARGETS), help="modules beside the experts (default: all)")
    parser.add_argument("--rank", type=positive, help="LoRA rank r (default: by task)")
    parser.add_argument("--alpha", type=amount, help="scaling is alpha / r (default: by task)")
    parser.add_argument("--mask", metavar="RUN", help="a finished lori-d or hellori-d run, in place of stage D")
    parser.add_argument("--lr", type=amount, help="learning rate (default: by task and method)")
    parser.add_argument("--epochs", type=positive, help="passes over the data (default: by task)")
    parser.add_argument("--steps", type=positive, help="optimizer steps, in place of --epochs")
    parser.add_argument("--batch", type=positive, help="examples a step, over all processes (default: by task)")
    parser.add_argument("--micro-batch", type=positive, default=16, help="examples a forward pass")
    parser.add_argument("--max-length", type=cli.number(int, 8), default=512, help="tokens an example may have")
    parser.add_argument("--clip", type=amount, default=1.0, help="largest gradient norm")
    parser.add_argument("--router-aux-loss", type=amount, help="coefficient of the load-balancing loss (default: off)")
    parser.add_argument(
        "--router-aux-form", choices=("concat", "layer"), help="over all layers, or each (default: layer)"
    )
    parser.add_argument("--profile", help="profile.json to choose the experts from (default: count them now)")
    parser.add_argument("--sample", type=share, default=0.1, help="share of the data counted")
    parser.add_argument("--warmup", default="none", choices=("none", "lora"), help="count on the base, or during LoRA")
    parser.add_argument(
        "--init-adapter", metavar="DIR", help="start from this adapter (a run's, or PEFT's), its experts and its rank"
    )
    parser.add_argument("--save-every", type=positive, metavar="N", help="steps between checkpoints (default: none)")
    parser.add_argument("--keep", type=positive, default=2, help="checkpoints to keep")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of --out")
    parser.add_argument(
        "--on-nonfinite", default="stop", choices=("stop", "skip"), help="when a loss or gradient is not a number"
    )
    parser.add_argument("--shard", choices=("full", "none"), help="the base sharded, or whole (default: what fits)")
    parser.add_argument("--activation-checkpointing", action="store_true", help="compute layers twice, to keep less")
    parser.add_argument("--seed", type=cli.number(int, 0, 2**31 - 1), default=0, help="of every random choice")
    parser.add_argument("--out", help="run folder (default: runs/TASK-METHOD...)")
    args = parser.parse_args(argv)
    check(args)

    recipe, method = RECIPES[args.task], METHODS[args.method]
    full = method.experts is None
    args.experts = args.experts or method.experts
    args.lr = args.lr or (recipe.fft_lr if full else recipe.lr)
    args.batch = args.batch or (recipe.fft_batch if full else recipe.batch)
    if args.steps is None:
        args.epochs = args.epochs or recipe.epochs
    if not full:
        args.rank, args.alpha = args.rank or recipe.r, args.alpha or recipe.alpha
        args.targets = args.targets or "all"
    if args.router_aux_loss:
        args.router_aux_form = args.router_aux_form or "layer"
    k = "" if args.k is None else f"-k{args.k}"
    args.out = args.out or f"runs/{args.task}-{args.method}{k}-seed{args.seed}"
    return args


def check(args: argparse.Namespace) -> None:
    """Raise InputError for flags that contradict each other or mean nothing together."""
    method, experts = METHODS[args.method], args.experts or METHODS[args.method].experts
    if method.experts is None:
        for flag in (*CHOSEN_WITH_AN_ADAPTER, "mask", "init_adapter"):
            if getattr(args, flag) is not None:
                flag = flag.replace("_", "-")
                raise InputError(
                    f"--{flag}: --method {args.method} trains every weight, without adapters; leave it out"
                )
    if args.steps and args.epochs:
        raise InputError("--steps and --epochs contradict each other; give one of them")
    for flag, allowed in (("k", (*hellora.SCORED, "random")), ("scores", (*hellora.SCORED, "coverage"))):
        value = getattr(args, flag)
        if value is not None and experts not in allowed:
            chosen = f"--method {args.method} and experts {experts}"
            raise InputError(f"--{flag} {value} has no meaning with {chosen}; leave it out")
    if (args.coverage is not None) != (experts == "coverage"):
        raise InputError("--coverage and --experts coverage go together; give both or neither")
    if method.grows and experts != "all":
        raise InputError(f"--experts {experts}: --method {args.method} grows the ranks of all experts; leave it out")
    if method.grows and args.steps == 1:
        raise InputError("--steps 1: ranks have no time to grow; want at least 2 steps")
    if args.router_aux_form and not args.router_aux_loss:
        raise InputError("--router-aux-form means nothing without --router-aux-loss; give both or neither")
    if args.init_adapter:
        if method.sparse or method.grows:
            raise InputError(f"--init-adapter: --method {args.method} starts from zero; choose another method")
        for flag in CHOSEN_WITH_AN_ADAPTER:
            if getattr(args, flag) is not None:
                raise InputError(f"--{flag} contradicts --init-adapter, which brings its own; leave one out")
    if args.profile and args.warmup == "lora":
        raise InputError("--warmup lora is a way to count, and --profile has the counts already; leave one out")
    if args.mask:
        if not method.sparse:
            raise InputError(f"--mask is for lori-s and hellori-s, not for --method {args.method}; leave it out")
        for flag in ("k", "experts", "coverage", "scores", "profile"):
            if getattr(args, flag) is not None:
                raise InputError(f"--{flag} contradicts --mask, whose run has chosen its experts; leave one out")


def hot_experts_per_layer(args: argparse.Namespace, num_experts: int, num_experts_per_tok: int) -> int:
    """--k, the method's k or the experts per token (HELLoRA, §4.5.3), as a number of experts."""
    k = args.k or METHODS[args.method].k or num_experts_per_tok
    if isinstance(k, float):
        return max(1, int(k * num_experts))
    if k > num_experts:
        raise InputError(f"--k {k}: want 1..{num_experts}, the experts of a layer of {args.model}")
    return k
