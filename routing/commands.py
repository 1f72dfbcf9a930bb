"""profile.py compare and profile.py advise: what the counts of profile.json show.

python profile.py compare a.json b.json --plot overlap.png   # do two tasks (or samples) have the same hot experts?
python profile.py advise profile.json                        # what do k hot experts cover, and what do they cost?
"""

from dataclasses import dataclass

import hellora
from command import cli
from command.cli import POSITIVE, SHARE, InputError, flag
from command.files import writable
from hub.config import PRESETS
from machine.memory import config_of
from recipes.methods import RECIPES, Recipe, num_hot_experts
from routing import advice, statistics
from routing.profiles import check_fits, load_profile

K_HELP = "hot experts per layer (default: experts per token)"
PLOT_HELP = f"where to draw it ({', '.join(cli.PICTURE_FORMATS)})"


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """The flags of `profile.py compare`."""

    profiles: list[str] = flag(help="profile.json of two tasks or samples", positional=True, nargs=2, metavar="FILE")
    k: int | None = flag(None, K_HELP, type=POSITIVE)
    plot: str | None = flag(None, PLOT_HELP, metavar="FILE", type=cli.picture)


@dataclass(frozen=True, kw_only=True)
class AdviseSettings:
    """The flags of `profile.py advise`."""

    profile: str = flag(help="profile.json of the task", positional=True, metavar="FILE")
    model: str | None = flag(
        None, f"model to size: as in train.py, or {', '.join(PRESETS)} (default: the profiled one)"
    )
    rank: int | None = flag(None, "LoRA rank r (default: that of the profiled task)", type=POSITIVE)
    targets: str = flag("all", "modules beside the experts", choices=list(hellora.TARGETS))
    coverage: tuple[float, ...] = flag(
        (0.5, 0.6, 0.7, 0.8, 0.9), "shares of the routed tokens to reach", type=SHARE, nargs="+"
    )
    plot: str | None = flag(None, PLOT_HELP, metavar="FILE", type=cli.picture)


def compare(argv: list[str]) -> None:
    """Print, and with --plot draw, how far the hot sets of two profiles agree in each layer."""
    settings = cli.parse(
        CompareSettings,
        argv,
        prog="profile.py compare",
        description="Overlap of the hot experts of two profiles of one model.",
        example="python profile.py compare runs/math.json runs/code.json --plot runs/overlap.png",
    )
    names = " and ".join(settings.profiles)
    a, b = map(load_profile, settings.profiles)
    if a.counts.shape != b.counts.shape:
        shapes = " and ".join(f"{tuple(p.counts.shape)}" for p in (a, b))
        raise InputError(f"{names} are of different models: {shapes} (layers, experts)")
    num_hot = num_hot_experts(settings.k, a.counts.shape[1], a.num_experts_per_tok)
    hot_a, hot_b = (hellora.hottest(p.counts, num_hot) for p in (a, b))
    cli.say(*statistics.overlap_table(hot_a, hot_b))
    if settings.plot:
        from routing import pictures

        pictures.draw_overlap(hot_a, hot_b, names, writable(settings.plot))
        cli.say(f"wrote {settings.plot}")


def advise(argv: list[str]) -> None:
    """Print what adapting the k hottest experts covers and costs, and the smallest k that covers enough."""
    settings = cli.parse(
        AdviseSettings,
        argv,
        prog="profile.py advise",
        description="What k hot experts cover and cost, and the smallest k that covers enough.",
        example="python profile.py advise runs/math.json --model olmoe-1b-7b",
    )
    counted = load_profile(settings.profile)
    model, recipe = settings.model or counted.model, RECIPES.get(counted.task, Recipe)  # else the paper's rank
    config = config_of(model)
    check_fits(counted, config, settings.profile)
    r, K = settings.rank or recipe.r, counted.num_experts_per_tok
    sizes = advice.adapter_sizes(config, r, settings.targets)
    cli.say(
        f"{counted.task} on {model}, {counted.num_tokens:,} tokens: LoRA of rank {r} on the k hottest of "
        f"{config.num_experts} experts per layer, targets {settings.targets}",
        *advice.table(advice.choices(counted.counts, K, sizes), K, settings.coverage),
        *advice.remarks(counted.counts, counted.half_counts, K),
    )
    if settings.plot:
        from routing import pictures

        pictures.draw_profile(counted.counts, K, counted.title(), writable(settings.plot))
        cli.say(f"wrote {settings.plot}")
