"""profile.py --prompt: which experts each token of a text reaches, and how many of them are hot.

    python profile.py --model tiny --prompt "Tom has 3 apples." --profile profile.json --plot prompt.png
    python profile.py --model runs/tiny-math-hellora --prompt rows.txt       # the run's hot experts; base and adapter

Dimensions: L layers with experts, E experts per layer, K experts per token, T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

import data
import hellora
from command import cli
from command.cli import POSITIVE, InputError, flag, say
from command.files import writable
from hub.tokenizer import tokenize
from machine.processes import DTYPE_HELP, DTYPES, default_dtype
from model import MoETransformer, load_model
from recipes.methods import num_hot_experts
from routing.commands import K_HELP, PLOT_HELP
from routing.profiles import load_profile
from run.adapters import hot_mask, read_any_adapter
from run.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `profile.py --prompt`."""

    model: str = flag("tiny", "'tiny' or 'tiny-mixtral' (embedded), a checkpoint folder, a hub id, or a run")
    prompt: str = flag(help="a text, or the name of a file that holds one", metavar="TEXT")
    profile: str | None = flag(
        None, "counts that say which experts are hot (default: those of the run)", metavar="FILE"
    )
    k: int | None = flag(None, K_HELP, type=POSITIVE)
    dtype: str | None = flag(None, DTYPE_HELP, choices=DTYPES)
    plot: str | None = flag(None, PLOT_HELP, metavar="FILE", type=cli.picture)


def prompt(argv: list[str]) -> Tensor:
    """Print every token with its experts, and with --plot draw the share of hot ones.  -> experts [L, T, K]"""
    settings = cli.parse(
        Settings,
        argv,
        prog="profile.py",
        description="Print the experts of each token of a text.",
        example='python profile.py --model tiny --prompt "Mia has 3 marbles." --profile runs/math.json',
    )
    subject = Subject(settings.model)
    tokenizer = data.load_tokenizer(subject.folder, subject.config)
    (ids,) = tokenize([text_of(settings.prompt)], tokenizer)
    if not ids:
        raise InputError("--prompt holds no token; give a text, or a file with one")
    hot = hot_experts(settings, subject)
    if settings.plot and hot is None:
        raise InputError("--plot draws the share of hot experts; give --profile FILE, or a run as --model")
    plot = settings.plot and writable(settings.plot)
    dtype = getattr(torch, settings.dtype or default_dtype())
    experts = reached(subject.load(dtype), ids)
    before = reached(load_model(subject.folder, dtype), ids) if subject.adapter else None
    say(*lines(tokenizer, ids, experts, hot, before))
    if plot:
        from routing import pictures  # here, since importing matplotlib takes long

        pictures.draw_prompt(hot_share(experts, hot), pieces(tokenizer, ids), settings.model, plot)
        say(f"wrote {plot}")
    return experts


def text_of(prompt: str) -> str:
    """The text itself, or what the file of that name holds. Raises InputError for the name of no file."""
    names_a_file = prompt.endswith((".txt", ".md", ".json", ".jsonl")) and len(prompt.split()) == 1
    if names_a_file and not Path(prompt).is_file():
        raise InputError(f"--prompt {prompt}: no such file; give a text, or the name of a file that holds one")
    try:
        return Path(prompt).read_text(encoding="utf-8") if Path(prompt).is_file() else prompt
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt {prompt}: not readable as UTF-8 text ({error})") from None


def hot_experts(settings: Settings, subject: Subject) -> Tensor | None:
    """The hot experts by --profile, or those of the run's adapter.  -> bool [L, E], None if nothing says which"""
    config = subject.config
    if settings.profile:
        counted = load_profile(settings.profile, config)
        return hellora.hottest(
            counted.counts, num_hot_experts(settings.k, config.num_experts, config.num_experts_per_tok)
        )
    if settings.k:
        raise InputError(f"--k {settings.k} needs --profile FILE, whose counts say which experts are hot")
    if subject.adapter is None:
        return None
    return hot_mask(read_any_adapter(subject.adapter, config)[0].hot, config)


@torch.no_grad()
def reached(model: MoETransformer, ids: list[int]) -> Tensor:
    """The experts of each token, in rising order.  -> [L, T, K]"""
    return model(torch.tensor([ids]))[1][:, 0].sort(-1).values


def hot_share(experts: Tensor, hot: Tensor) -> Tensor:
    """The share of a token's experts that are hot.  experts [L, T, K], hot [L, E] -> [L, T]"""
    return torch.stack([row[ids] for row, ids in zip(hot, experts, strict=True)]).float().mean(-1)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Each token as text that shows its spaces."""
    return [repr(tokenizer.decode([token], skip_special_tokens=False)) for token in ids]


def lines(
    tokenizer: Tokenizer, ids: list[int], experts: Tensor, hot: Tensor | None, before: Tensor | None
) -> Iterator[str]:
    """Each token with its experts layer by layer, hot ones with a star, and those that the adapter changed."""
    share = None if hot is None else hot_share(experts, hot)
    for t, piece in enumerate(pieces(tokenizer, ids)):
        yield f"{t:4d}  {piece}" + ("" if share is None else f"  {share[:, t].mean():.0%} hot")
        for layer, chosen in enumerate(experts[:, t].tolist()):
            stars = [f"{e}*" if hot is not None and hot[layer, e] else f"{e}" for e in chosen]
            left = sorted(set(before[layer, t].tolist()) - set(chosen)) if before is not None else ()
            base = f"   (base: {' '.join(map(str, left))})" if left else ""
            yield f"      layer {layer:2d}: {' '.join(f'{each:>4}' for each in stars)}{base}"
    if share is not None:
        yield f"{share.mean():.1%} of the {experts.numel():,} choices reach a hot expert (*); by layer: " + " ".join(
            f"{each:.0%}" for each in share.mean(1)
        )
    if before is not None:
        changed = (experts != before).any(-1)  # [L, T]
        yield (
            f"the adapter changes the experts of {int(changed.any(0).sum())} of {len(ids)} tokens in some layer, "
            f"and of {changed.float().mean():.1%} of tokens and layers"
        )
