"""What trains in each method of the paper's tables, its share and bytes, beside the printed values. Needs no weights.

size(config, "hellora", k=8, targets="all").trainable
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

import hellora
import lori
from command import cli
from command.files import writable, write_json
from hub.config import PRESETS
from lab.markdown import grid
from lab.paper.page import Section
from model import MoEConfig, MoETransformer
from recipes.methods import METHODS, Recipe
from routing.advice import without_weights


class Row(NamedTuple):
    """One line of a table that says how much trains: in the paper, or in MoE-Sieve (arXiv 2603.24044)."""

    table: str
    model: str  # key of PRESETS
    method: str  # key of METHODS
    k: int | None  # hot experts per layer; None: all
    targets: str | None  # key of TARGETS
    paper: float | None  # percent, as printed
    millions: float | None = None  # trainable parameters, as printed


OLMOE, MIXTRAL, DEEPSEEK, QWEN = "olmoe-1b-7b", "mixtral-8x7b", "deepseek-moe-16b", "qwen1.5-moe-a2.7b"
ROWS = (
    Row("2", OLMOE, "fft", None, None, 100.0),
    Row("2", OLMOE, "lora", None, "all", 4.3),
    Row("2", OLMOE, "dora", None, "all", 4.35),
    Row("2", OLMOE, "lori-d", None, "all", 1.9),
    Row("2", OLMOE, "lori-s", None, "all", 0.19),
    Row("2", OLMOE, "hellora", 8, "all", 0.7),
    Row("2", OLMOE, "hellori-d", 8, "all", 0.3),
    Row("2", OLMOE, "hellori-s", 8, "all", 0.03),
    Row("3", MIXTRAL, "lora", None, "all", 1.03),
    Row("3", MIXTRAL, "lori-d", None, "all", 0.59),
    Row("3", MIXTRAL, "lori-s", None, "all", 0.06),
    Row("3", MIXTRAL, "hellora", 2, "all", 0.31),
    Row("3", MIXTRAL, "hellori-d", 2, "all", 0.17),
    Row("3", MIXTRAL, "hellori-s", 2, "all", 0.02),
    Row("5", OLMOE, "hellora", 8, "pure", 0.543),
    Row("5", OLMOE, "hellora", 8, "gate", 0.558),
    Row("5", OLMOE, "hellori-d", 8, "pure", 0.241),
    Row("5", OLMOE, "hellori-d", 8, "gate", 0.242),
    Row("5", OLMOE, "hellori-s", 8, "pure", 0.02),
    Row("5", OLMOE, "hellori-s", 8, "gate", 0.02),
    Row("7", OLMOE, "hellora", 2, "all", 0.27),
    Row("7", OLMOE, "hellora", 4, "all", 0.41),
    Row("7", OLMOE, "hellora", 8, "all", 0.68),
    Row("7", OLMOE, "hellora", 16, "all", 1.21),
    Row("Sieve", OLMOE, "lora", None, "shared", None, 311.5),
    Row("Sieve", OLMOE, "moe-sieve", 16, "shared", None, 85.0),
    Row("Sieve", QWEN, "lora", None, "shared", None, 509.7),
    Row("Sieve", QWEN, "moe-sieve", 15, "shared", None, 151.3),
    Row("-", QWEN, "hellora", 4, "all", None),
    Row("-", DEEPSEEK, "moe-sieve", 16, "shared", None),
    Row("-", DEEPSEEK, "lora", None, "all", None),
    Row("-", DEEPSEEK, "lori-d", None, "all", None),
    Row("-", DEEPSEEK, "lori-s", None, "all", None),
    Row("-", DEEPSEEK, "hellora", 6, "all", None),
    Row("-", DEEPSEEK, "hellori-d", 6, "all", None),
    Row("-", DEEPSEEK, "hellori-s", 6, "all", None),
)


class Size(NamedTuple):
    """How large a method is, in parameters and in bytes."""

    trainable: int
    total: int  # base and adapters, including frozen A and all of B
    adapter_bytes: int  # of the tensors in adapter.safetensors
    optimizer_bytes: int  # of AdamW's two moments

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total


def size(config: MoEConfig, method: str, k: int | None, targets: str | None, r: int = Recipe.r) -> Size:
    """What a method trains, counted on the model with its adapters, here without weights. Factors are float32."""
    how = METHODS[method]
    if how.experts is None:
        with torch.device("meta"):
            model = MoETransformer(config)
    else:
        model = without_weights(config, k or config.num_experts, r, kind=how.kind, targets=targets)
    trainable, total = hellora.count_parameters(model)
    bits = 0  # that mark the entries of B which train
    if how.sparse:
        trainable = int(lori.KEPT * trainable)
        bits = sum(-(-p.numel() // 8) for name, p in model.named_parameters() if "lora_B" in name)
    return Size(trainable, total, 4 * trainable + bits if model.adapter else 0, 2 * 4 * trainable)


CONVENTION = "percent: trainable / (base + adapters, including frozen A and all of B), as PEFT prints; rank 32"
HEADS = "table model method k targets trainable percent paper adapter_bytes AdamW_bytes".split()


@dataclass(frozen=True)
class ParamsSettings:
    """The flags of `reproduce.py params`."""

    json: str | None = cli.flag(None, "where to write the rows", metavar="FILE")


def section() -> Section:
    """Trainable parameters of every method and variant in the paper's tables, beside what they print."""
    sizes = {row[1:5]: size(MoEConfig.from_dict(PRESETS[row.model]), *row[2:5]) for row in ROWS}
    rows, shown = [], []
    for row in ROWS:
        counted, known = sizes[row[1:5]], "-" if row.paper is None else f"{row.paper:g}"
        known = f"{row.millions:.1f}M" if row.millions else known
        counts = (f"{n:,}" for n in (counted.adapter_bytes, counted.optimizer_bytes))
        trained = (f"{counted.trainable:,}", f"{counted.percent:.4f}", known, *counts)
        shown.append([row.table, row.model, row.method, str(row.k or "all"), row.targets or "-", *trained])
        line = {key: getattr(row, key) for key in ("model", "method", "k", "targets")}
        rows.append(line | {"trainable": counted.trainable, "percent": counted.percent, "paper": row.paper})
        rows[-1]["paper_millions"] = row.millions
    lines = [*grid(HEADS, shown), "", f"{CONVENTION}.", ""]
    for model, k in ((OLMOE, 8), (MIXTRAL, 2), (DEEPSEEK, 6)):
        ours, lora = sizes[model, "hellora", k, "all"], sizes[model, "lora", None, "all"]
        share, quotient = ours.trainable / lora.trainable, ours.percent / lora.percent
        shares = f"{share:.2%} of LoRA's parameters (quotient of the percentages, as in the paper: {quotient:.2%})"
        lines.append(f"- {model}: HELLoRA trains {shares}")
    return Section("What trains: the sizes in Tables 2, 3, 5 and 7", lines, rows)


def params(argv: list[str]) -> list[dict]:
    """The command: print the section.  -> its rows"""
    settings = cli.parse(
        ParamsSettings,
        argv,
        prog="reproduce.py params",
        description="How many parameters each method trains, beside the paper's numbers.",
        example="python reproduce.py params",
    )
    out = settings.json and writable(settings.json)
    sizes = section()
    cli.say(*sizes.lines)
    if out:
        write_json(out, sizes.rows)
    return sizes.rows
