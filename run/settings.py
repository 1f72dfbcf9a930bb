"""The settings of a training run: a line per flag of train.py, and the rules by which flags go together.

    settings = parse_settings(["--method", "hellora", "--k", "8"])      # a Settings, defaults filled in

A setting that is not given is decided by the recipe of the task and by the method (`resolved`).
"""

import sys
from dataclasses import asdict, dataclass, replace

import data
import hellora
import ops
from command import cli
from command.cli import POSITIVE, SHARE, InputError, count_or_share, flag, number, say
from hub.checkpoint import REVISION_HELP, with_revision
from hub.config import IGNORE_HELP
from hub.tokenizer import BOS_HELP
from machine.memory import CHOSEN, SHARD_HELP
from machine.processes import DTYPE_HELP, DTYPES, default_dtype
from recipes.methods import COUNT_ON_HELP, METHODS, RECIPES, count_on_flag, defaults_by_task, experts_flag
from recipes.papers import PAPERS, recipe_flags
from run.report import PACKAGES
from run.schedule import SCHEDULES
from run.subject import Subject

AMOUNT = number(float, 0, above=True)
MODEL_HELP = (
    "'tiny' or 'tiny-mixtral' (embedded), a checkpoint folder, or a hub id (default: tiny, or the base of "
    "--init-adapter)"
)
METHOD_HELP = "which experts get an adapter, and what trains (default: hellora, or that of --init-adapter)"
EXPERTS_HELP = f"policy: {', '.join(hellora.POLICIES)}; or a JSON file of expert lists (default: by method)"
TARGETS_HELP = (
    "other modules to adapt: all: attention and router; shared: these and shared experts; attention; gate: the "
    "router; pure: none (default: all; moe-sieve shared)"
)
SAVE_DTYPE_HELP = "dtype of the checkpoint that --method fft writes (default: float32, in which it trains)"
K_HELP = "hot experts per layer: a number or a share (default: experts per token; moe-sieve 0.25)"
HALF = number(float, 0, 0.5, above=True)
TASK, CHOICE, ADAPTER = {"group": "what to learn"}, {"group": "which experts"}, {"group": "what trains"}
STEP, FOLDER, MACHINE = {"group": "optimisation"}, {"group": "run folder"}, {"group": "machine"}


def warmup_flag(text: str) -> int | float:
    """An argparse type: 8 steps, 0.1 of the steps, or 0 for none."""
    return count_or_share(text) if text.strip("0.") else 0


@dataclass(frozen=True)
class Settings:
    """A run. None: the task and the method decide (`resolved`), or the setting is off."""

    model: str | None = flag(None, MODEL_HELP, **TASK)
    revision: str | None = flag(None, REVISION_HELP, **TASK)
    task: str = flag("tiny-math", "task, or own: your rows in --train-data", choices=list(RECIPES), **TASK)
    train_data: str | None = flag(None, "your rows, or the task's training file", metavar="FILE", **TASK)
    valid_data: str | None = flag(None, "rows to validate on, in the format of --train-data", metavar="FILE", **TASK)
    valid_share: float | None = flag(None, "share of the training rows to hold out for validation", type=HALF, **TASK)
    recipe: str | None = flag(None, "all settings of a paper; other flags override them", choices=PAPERS, **TASK)
    prompt: str = flag("lori", "prompt for GSM8K's rows", choices=list(data.PROMPTS), **TASK)
    bos: str = flag("auto", BOS_HELP, choices=("auto", "yes", "no"), **TASK)
    max_length: int = flag(512, "cut-off length of an example, in tokens", type=number(int, 8), **TASK)
    ignore_config_keys: str | None = flag(None, IGNORE_HELP, metavar="KEYS", **TASK)
    method: str | None = flag(None, METHOD_HELP, choices=list(METHODS), **CHOICE)
    k: int | float | None = flag(None, K_HELP, type=count_or_share, **CHOICE)
    experts: str | None = flag(None, EXPERTS_HELP, type=experts_flag, **CHOICE)
    coverage: float | None = flag(None, "share of the routed tokens, for --experts coverage", type=SHARE, **CHOICE)
    scores: str | None = flag(None, "what ranks experts (default: counts)", choices=("counts", "gate-mass"), **CHOICE)
    profile: str | None = flag(None, "counts to choose experts by (default: count now)", metavar="FILE", **CHOICE)
    sample: float | None = flag(None, "share of the training data to count on (default: 0.1)", type=SHARE, **CHOICE)
    count_on: str | None = flag(
        None,
        f"{COUNT_ON_HELP} (default: base)",
        choices=("base", "lora"),
        type=count_on_flag,
        alias="--warmup",
        **CHOICE,
    )
    targets: str | None = flag(None, TARGETS_HELP, choices=list(hellora.TARGETS), **ADAPTER)
    rank: int | None = flag(None, "rank r of a LoRA pair (default: by task, below)", type=POSITIVE, **ADAPTER)
    expert_rank: int | None = flag(None, "rank of the experts' pairs (default: --rank)", type=POSITIVE, **ADAPTER)
    alpha: float | None = flag(
        None, "alpha of a LoRA pair; its scale is alpha / r (default: by task, below)", type=AMOUNT, **ADAPTER
    )
    lora_dropout: float = flag(0.0, "dropout on the input of each A", type=number(float, 0, 0.99), **ADAPTER)
    init_adapter: str | None = flag(None, "start from this adapter of a run or of PEFT", metavar="DIR", **ADAPTER)
    lr: float | None = flag(None, "learning rate (default: by task, below)", type=AMOUNT, **STEP)
    schedule: str | None = flag(
        None, "learning rate after --lr-warmup (default: by task, below)", choices=list(SCHEDULES), **STEP
    )
    lr_warmup: int | float | None = flag(
        None,
        "steps in which the rate rises from 0, or their share; 0: none (default: by task, below)",
        type=warmup_flag,
        **STEP,
    )
    weight_decay: float = flag(0.0, "AdamW's weight decay, on everything that trains", type=number(float, 0), **STEP)
    epochs: int | None = flag(None, "passes over the data (default: by task, below)", type=POSITIVE, **STEP)
    steps: int | None = flag(None, "optimizer steps, in place of --epochs", type=POSITIVE, **STEP)
    batch: int | None = flag(
        None, "examples per step, over all processes (default: by task, below)", type=POSITIVE, **STEP
    )
    loss_on: str = flag("answer", "which tokens are targets", choices=("answer", "all"), **STEP)
    clip: float = flag(1.0, "maximum gradient norm", type=AMOUNT, **STEP)
    router_aux_loss: float | None = flag(None, "weight of the load-balancing loss (default: off)", type=AMOUNT, **STEP)
    router_aux_form: str | None = flag(None, "form of that loss (default: layer)", choices=("concat", "layer"), **STEP)
    valid_every: int | None = flag(None, "steps between validations (default: an epoch)", type=POSITIVE, **STEP)
    patience: int | None = flag(
        None, "validations without an improvement after which the run ends (default: never)", type=POSITIVE, **STEP
    )
    on_nonfinite: str = flag(
        "stop", "what to do on a NaN or infinite loss or gradient", choices=("stop", "skip"), **STEP
    )
    seed: int = flag(0, "seed of every random choice", type=number(int, 0, 2**31 - 1), **STEP)
    out: str | None = flag(None, "run folder (default: runs/TASK-METHOD...)", metavar="RUN", **FOLDER)
    save_every: int | None = flag(None, "steps between checkpoints (default: none)", type=POSITIVE, **FOLDER)
    keep: int | None = flag(None, "checkpoints to keep (default: 2)", type=POSITIVE, **FOLDER)
    report_to: str = flag("none", "service that also gets the log", choices=("none", *PACKAGES), **FOLDER)
    resume: bool = flag(False, "continue from the last checkpoint in --out", **FOLDER)
    micro_batch: int = flag(16, "examples per forward pass", type=POSITIVE, **MACHINE)
    dtype: str | None = flag(None, DTYPE_HELP, choices=DTYPES, **MACHINE)
    save_dtype: str | None = flag(None, SAVE_DTYPE_HELP, choices=DTYPES, **MACHINE)
    shard: str | None = flag(None, SHARD_HELP, choices=tuple(CHOSEN), **MACHINE)
    activation_checkpointing: bool = flag(False, "save memory: keep layer inputs, compute layers twice", **MACHINE)
    compile: bool = flag(
        False,
        "compile norms, rotation and SwiGLU: slow start, faster steps; needs a C++ compiler or Triton",
        **MACHINE,
    )


def parse_settings(argv: list[str] | None = None) -> Settings:
    """The settings of a command line, defaults filled in. Raises InputError for wrong or contradictory flags."""
    argv = sys.argv[1:] if argv is None else argv
    settings = parse_flags(argv)
    if settings.recipe:
        flags, comments = recipe_flags(asdict(settings), argv)
        say(*comments, f"--recipe {settings.recipe}, for {settings.task}, sets {' '.join(flags)}")
        settings = parse_flags([*flags, *argv])
    check(settings)
    return resolved(settings)


def parse_flags(argv: list[str]) -> Settings:
    """The settings of a command line as they are given, but for the method. @FILE stands for the flags in a file."""
    settings = cli.parse(
        Settings,
        argv,
        prog="train.py",
        description="Fine-tune a mixture-of-experts model, by default with LoRA on the experts that a task uses most.\n"
        "@FILE reads flags from a file.",
        epilog=defaults_by_task(),
        example="torchrun --nproc_per_node 2 train.py --task own --train-data chats.jsonl --method hellora --k 8",
        fromfile_prefix_chars="@",
    )
    if settings.method:
        return settings
    return replace(settings, method=settings.init_adapter and method_of_start(settings.init_adapter) or "hellora")


CHOSEN_WITH_AN_ADAPTER = ("k", "experts", "coverage", "scores", "targets", "rank", "expert_rank", "alpha", "profile")
COUNTING = ("sample", "count_on")


def check(settings: Settings) -> None:
    """Raise InputError for flags that contradict each other or have no meaning together."""
    s, method = settings, METHODS[settings.method]
    experts = s.experts or method.experts

    def refuse(names: tuple[str, ...], reason: str) -> None:
        for name in names:
            if getattr(s, name) is not None:
                raise InputError(f"--{name.replace('_', '-')}{reason}")

    if method.adapts and s.save_dtype:
        raise InputError(
            f"--save-dtype {s.save_dtype}: --method {s.method} writes an adapter, in float32; leave it out"
        )
    if not method.adapts:
        reason = f": --method {s.method} trains every weight, without adapters; leave it out"
        refuse((*CHOSEN_WITH_AN_ADAPTER, *COUNTING, "init_adapter"), reason)
        if s.lora_dropout:
            raise InputError(f"--lora-dropout{reason}")
    if s.prompt != "lori" and data.TASKS[s.task].benchmark != "gsm8k":
        raise InputError(f"--prompt {s.prompt} is a form of GSM8K's rows, and the task is {s.task}; leave it out")
    if s.steps and s.epochs:
        raise InputError("--steps and --epochs contradict each other; give one of them")
    counted = [policy for policy in hellora.POLICIES if policy not in ("random", "all", "none")]
    for name, allowed in (("k", hellora.NUMBERED), ("scores", counted)):
        if experts not in allowed and not (method.flat and name == "k"):
            chosen = f"--method {s.method} and experts {experts}"
            refuse((name,), f" {getattr(s, name)} has no meaning with {chosen}; leave it out")
    if (s.coverage is not None) != (experts == "coverage"):
        raise InputError("--coverage and --experts coverage go together; give both or neither")
    if experts == "none":
        refuse(("expert_rank",), " has no meaning with --experts none; leave it out")
        if (s.targets or method.targets) == "pure":
            raise InputError("--experts none --targets pure: nothing would train; leave one of them out")
    if (method.grows or method.flat) and experts != "all":
        raise InputError(f"--experts {experts}: --method {s.method} adapts all experts; leave it out")
    if method.grows or method.flat:
        refuse(("expert_rank",), f": --method {s.method} sets it; leave it out")
    if s.weight_decay and method.grows:
        reason = "keeps dimensions that do not train yet as they were drawn, and decay would shrink them"
        raise InputError(f"--weight-decay {s.weight_decay:g}: --method {s.method} {reason}; leave it out")
    if s.compile and ops.PLAIN:
        raise InputError("--compile replaces formulas that HELLORA_PLAIN=1 asks for; leave one of them out")
    if s.valid_data and s.valid_share:
        raise InputError("--valid-data and --valid-share contradict each other; give one of them")
    if not (s.valid_data or s.valid_share):
        refuse(("valid_every", "patience"), " has no meaning without --valid-data or --valid-share; give one of them")
    if s.router_aux_form and not s.router_aux_loss:
        raise InputError("--router-aux-form has no meaning without --router-aux-loss; give both or neither")
    if s.init_adapter:
        if method.sparse or method.grows:
            raise InputError(f"--init-adapter: --method {s.method} starts from zero; choose another method")
        refuse(CHOSEN_WITH_AN_ADAPTER, " contradicts --init-adapter, which sets it; leave one out")
        if (own := method_of_start(s.init_adapter)) not in (None, s.method):
            raise InputError(
                f"--init-adapter {s.init_adapter} is of --method {own}, not {s.method}; give --method {own}, or none"
            )
    if s.profile:
        refuse(COUNTING, " says how to count, and --profile has the counts already; leave one out")
    if not s.save_every:
        refuse(("keep",), " has no meaning without --save-every; give both or neither")


def start_of(folder: str) -> Subject:
    """The run or the adapter that --init-adapter names. Raises InputError if there is no adapter."""
    subject = Subject(folder)
    if subject.adapter is None:
        expected = "a run of train.py, its adapter folder, or one that PEFT saved"
        raise InputError(f"--init-adapter {folder} holds no adapter; expected {expected}")
    return subject


def base_of_start(folder: str) -> str:
    """The model that the adapter of --init-adapter was trained on. Raises InputError if it does not say."""
    subject = start_of(folder)
    if subject.base == folder:
        raise InputError(f"--init-adapter {folder} does not say which model it adapts; add --model")
    return subject.base


def method_of_start(folder: str) -> str | None:
    """The method of the run that --init-adapter names. None: PEFT saved it, or the method starts from zero alone."""
    name = (start_of(folder).run or {"settings": {}})["settings"].get("method")
    method = METHODS.get(name)
    return name if method and not (method.sparse or method.grows) else None


def resolved(settings: Settings) -> Settings:
    """The settings with what the task's recipe and the method decide."""
    s, recipe, method = settings, RECIPES[settings.task], METHODS[settings.method]
    model = s.model or (base_of_start(s.init_adapter) if s.init_adapter else "tiny")
    k = "" if s.k is None else f"-k{s.k}"
    full = not method.adapts
    s = replace(
        s,
        model=with_revision(model, s.revision),
        experts=None if s.init_adapter else s.experts or method.experts,
        sample=s.sample or 0.1,
        count_on=s.count_on or "base",
        keep=s.keep or 2,
        lr=s.lr or (recipe.fft_lr if full else recipe.lr),
        schedule=s.schedule or recipe.schedule,
        lr_warmup=(recipe.lr_warmup if s.lr_warmup is None else s.lr_warmup) or None,
        epochs=s.epochs or (None if s.steps else recipe.epochs),
        batch=s.batch or (recipe.fft_batch if full else recipe.batch),
        dtype=s.dtype or default_dtype(),
        router_aux_form=s.router_aux_form or ("layer" if s.router_aux_loss else None),
        out=s.out or f"runs/{s.task}-{s.method}{k}-seed{s.seed}",
    )
    if full:
        return s
    return replace(s, rank=s.rank or recipe.r, alpha=s.alpha or recipe.alpha, targets=s.targets or method.targets)
