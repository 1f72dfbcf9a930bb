"""Time and memory of a training step: every method beside the frozen model, and beside transformers + peft.

    python bench.py step                                      # batches of 8 and of 32
    python bench.py step --json step.json --plot step.png
    python bench.py step --batch 8 --sweep k --plot k.png     # how time and memory grow with k

`floor` is the model alone: all weights frozen, no adapter, forward and backward to the inputs of every layer.
A step is forward, backward, optimizer step and clearing the gradients. All rows are timed in one process in turn, on
the same batches; a ratio is that of the speeds over all of them (`times_as_fast`). Read the ratios, the absolute
numbers are the machine's.

The model has the shape of OLMoE-1B-7B at a quarter of its width and depth, with random weights; rank 8 is a quarter of
the paper's 32, so that adapters have their real share of the multiplications. Lengths are drawn from a histogram of
GSM8K under OLMoE's tokenizer; token ids follow Zipf's law, so that routing is as uneven as it is on text. The hot
experts are those profiled on the same data.

Dimensions: B sequences of a batch, S positions, L layers, E experts a layer.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hellora
from benchmarks.measure import allocated_peak, nbytes, saved_bytes, seconds
from command import cli
from command.cli import InputError, say
from command.files import writable
from data import Batch
from hub.config import MoEConfig
from lora import DoRALinear, LoRAExperts, LoRALinear, StackedDoRA, sparsify
from model import MoETransformer, init_weights
from profile import picture, profile_routing

SHAPE = {
    "model_type": "olmoe",
    "vocab_size": 12576,
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
# Examples of GSM8K's training split by tokens (prompt, answer and end), in bins of 16: [16 i, 16 i + 16).
LENGTHS = np.array(
    "0 0 0 1 92 538 965 1124 1096 866 794 595 438 336 210 158 95 73 35 16 18 13 3 4 1 1 0 1".split(), dtype=float
)
TARGET_SHARE = 0.51  # of those tokens: the answer, 76.7 of 151.6 on average
METHODS = {  # name -> which experts, kind of pair
    "hellora": ("hot", "lora"),
    "hellori-s": ("hot", "lori"),
    "lora": ("all", "lora"),
    "dora": ("all", "dora"),
}
PEERS = {  # name -> modules and parameters that peft adapts
    "peft-all": ("q_proj k_proj v_proj o_proj", "mlp.gate.weight mlp.experts.gate_up_proj mlp.experts.down_proj"),
    "peft-attention": ("q_proj k_proj v_proj o_proj", ""),
}
NAMES = ("floor", *METHODS, "fft", *PEERS)
SWEEPS = {  # --sweep -> the values tried
    "k": (1, 2, 4, 8, 16, 32, 64),
    "experts": (16, 32, 64, 128),
    "length": (64, 128, 256, 512),
    "batch": (1, 2, 4, 8, 16, 32),
    "rank": (1, 2, 4, 8, 16, 32, 64),
}
SWEPT = ("floor", "hellora", "lora")
EXAMPLES = 32  # timed in one repetition: four batches of 8, or one of 32


# ------------------------------------------------------------------------------------------------------ data


def make_batches(B: int, n: int, vocab_size: int, device: torch.device, length: int | None = None) -> list[Batch]:
    """n batches of B sequences, lengths as GSM8K's (or all `length`): the same ones whatever is measured on them."""
    rng, shares = np.random.default_rng(0), LENGTHS / LENGTHS.sum()
    zipf = 1 / np.arange(3, vocab_size + 3)
    batches = []
    for _ in range(n):
        lengths = torch.from_numpy(16 * rng.choice(len(LENGTHS), B, p=shares) + rng.integers(16, size=B))
        lengths = lengths if length is None else torch.full_like(lengths, length)
        S = int(lengths.max())
        ids = torch.from_numpy(rng.choice(vocab_size, (B, S), p=zipf / zipf.sum()))
        place, prompt = torch.arange(S), (lengths * (1 - TARGET_SHARE)).long()
        predicts = (place >= prompt[:, None] - 1) & (place < lengths[:, None] - 1)
        labels = torch.where(predicts, ids.roll(-1, 1), -100)
        batches.append(Batch(ids.to(device), lengths, labels.to(device)))
    return batches


# -------------------------------------------------------------------------------------------------- subjects


@dataclass
class Subject:
    """What is measured: a model, its loss on a batch, and the optimizer of what trains (None: nothing does)."""

    name: str
    model: torch.nn.Module
    loss: Callable[[Batch], Tensor]
    optimizer: torch.optim.Optimizer | None

    def step(self, batch: Batch) -> None:
        self.loss(batch).backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def resident(self) -> set[Tensor]:
        """What lives from step to step: weights, buffers and the optimizer's moments."""
        state = self.optimizer.state.values() if self.optimizer else ()
        moments = [value for of in state for value in of.values() if torch.is_tensor(value)]
        return {*self.model.parameters(), *self.model.buffers(), *moments}


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0, fused=True)


def our_model(shape: dict, device: torch.device, dtype: torch.dtype) -> MoETransformer:
    model = MoETransformer(MoEConfig.from_dict(shape))
    init_weights(model, std=0.02)
    return model.to(device, dtype)


def make_ours(name: str, model: MoETransformer, hot: Tensor, rank: int) -> Subject:
    """Our model for one row of the table.  hot [L, E] bool: the experts that `hellora` adapts"""
    if name == "floor":
        model.requires_grad_(False)
        # as if something below trained: the backward pass then runs down to the inputs of the first layer
        model.embed_tokens.register_forward_hook(lambda module, ids, x: x.requires_grad_())
    elif name != "fft":
        experts, kind = METHODS[name]
        hellora.attach(model, hot if experts == "hot" else torch.ones_like(hot), rank, 2.0 * rank, kind=kind)
        if kind == "lori":  # a tenth of B, as stage S: here any tenth
            generator = torch.Generator().manual_seed(0)
            Bs = {key.removesuffix(".lora_B"): B for key, B in model.named_parameters() if key.endswith("lora_B")}
            kept = {key: torch.rand(B.numel(), generator=generator) < 0.1 for key, B in Bs.items()}
            sparsify(model, {key: mask.nonzero().flatten() for key, mask in kept.items()})

    def loss(batch: Batch) -> Tensor:
        nll, _ = model(batch.input_ids, batch.lengths, labels=batch.labels)
        return nll / (batch.labels != -100).sum()

    return Subject(name, model, loss, None if name == "floor" else adamw(model))


def make_peer(name: str, base: MoETransformer, rank: int) -> Subject:
    """transformers' OLMoE with the weights of `base` under peft's LoRA. Raises ImportError if they are not there."""
    from peft import LoraConfig, get_peft_model
    from transformers import OlmoeConfig, OlmoeForCausalLM

    hf = OlmoeForCausalLM(OlmoeConfig(**base.config.hub, eos_token_id=0, pad_token_id=0))
    weights = {k if k.startswith("lm_head") else f"model.{k}": w for k, w in base.named_parameters()}
    hf.load_state_dict(weights)
    modules, parameters = PEERS[name]
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=modules.split(), target_parameters=parameters.split() or None
    )
    model = get_peft_model(hf.to(base.lm_head.weight.device, base.lm_head.weight.dtype), settings).train()

    def loss(batch: Batch) -> Tensor:
        places = torch.arange(batch.input_ids.shape[1])
        real = (places < batch.lengths[:, None]).long().to(batch.input_ids.device)
        # transformers shifts the labels itself
        labels = torch.cat((torch.full_like(batch.labels[:, :1], -100), batch.labels[:, :-1]), dim=1)
        return model(batch.input_ids, attention_mask=real, labels=labels, use_cache=False).loss

    return Subject(name, model, loss, adamw(model))


# ------------------------------------------------------------------------------------------------ what is measured


@torch.no_grad()
def adapter_flops(model: torch.nn.Module, batch: Batch) -> int:
    """Multiplications and additions of the adapters in one step on this batch.

    A row through a pair costs 2 r (in + out) forward, as much for the gradients of its inputs, as much for those of A
    and B (half of it with A frozen); DoRA's norms W A^T once a step; peft multiplies B A out for every expert.
    """
    if not isinstance(model, MoETransformer):
        rows, flops = int(batch.input_ids.numel()), 0
        for name, A in model.named_parameters():
            if "lora_A" in name:
                B = model.get_parameter(name.replace("lora_A", "lora_B"))
                # a matrix [r * E, in] and [out, r * E]: on rows, or B A of all experts whatever the rows
                flops += 6 * (A.numel() * B.shape[0] if ".experts." in name else rows * (A.numel() + B.numel()))
        return flops
    _, selected = model(batch.input_ids, batch.lengths, labels=torch.full_like(batch.labels, -100))
    flops, tokens = 0, int(batch.lengths.sum())
    for layer, chosen in zip(model.layers, selected, strict=True):
        for module in layer.modules():
            if isinstance(module, LoRALinear):
                flops += pair_flops(module, tokens)
            elif isinstance(module, LoRAExperts):
                hot = torch.tensor(module.expert_ids[: module.num_hot], device=chosen.device)
                rows = int(torch.isin(chosen, hot).sum())
                flops += sum(pair_flops(pair, rows) for pair in module.lora.values())
    return flops


def pair_flops(pair: torch.nn.Module, rows: int) -> int:
    *stack, r, fan_in = pair.lora_A.shape
    fan_out, n = pair.lora_B.shape[-2], stack[0] if stack else 1
    norms = 2 * n * r * fan_in * fan_out if isinstance(pair, DoRALinear | StackedDoRA) else 0
    return 2 * rows * r * ((2 + pair.lora_A.requires_grad) * fan_in + 3 * fan_out) + norms


def times_as_fast(seconds: np.ndarray, others: np.ndarray) -> float:
    """Speed over another's on the same batches, from steps timed side by side.  seconds, others [repeats, batches]

    Per batch the median of the ratios, as the machine's own speed changes from turn to turn; then their mean, weighted
    by time: batches differ, some have more padding.
    """
    weight = np.median(seconds, axis=0)  # [batches]
    return float(np.average(np.median(others / seconds, axis=0), weights=weight))


def measure(
    names: tuple[str, ...],
    shape: dict,
    B: int,
    k: int,
    rank: int,
    repeats: int,
    device: torch.device,
    length: int | None = None,
) -> list[dict]:
    """The rows of one table, timed in turn on the same batches of B sequences."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batches = make_batches(B, max(1, EXAMPLES // B), shape["vocab_size"], device, length)
    base = our_model(shape, device, dtype)
    counts = profile_routing(base, batches).counts
    hot = hellora.select_experts("hot", counts, k)
    subjects, rows = [], []
    for name in names:
        try:
            if name in PEERS:
                subjects.append(make_peer(name, base, rank))
            else:  # weights that train are float32, as in train.py
                model = our_model(shape, device, torch.float32 if name == "fft" else dtype)
                subjects.append(make_ours(name, model, hot, rank))
        except ImportError as error:
            say(f"{name}: not run, {error.name} is not installed")
            keys = ("samples_per_s", "tokens_per_s", "over_floor", "peak_bytes", "saved_bytes", "adapter_flops")
            rows.append({"name": name, "batch": B, **dict.fromkeys(keys), "note": f"{error.name} is not installed"})
    for subject in subjects:
        subject.step(batches[0])  # warm up; the optimizer makes its moments
    turns = {subject.name: [] for subject in subjects}  # seconds of a step, batch after batch, `repeats` times
    for turn in tqdm(range(repeats * len(batches)), f"batch {B}", unit="turn", disable=None):  # None: on a terminal
        for subject in subjects if turn % 2 else subjects[::-1]:
            turns[subject.name].append(seconds(lambda s=subject: s.step(batches[turn % len(batches)]), device))  # noqa: B023
    samples, tokens = B * len(batches), sum(int(batch.lengths.sum()) for batch in batches)
    turns = {name: np.reshape(t, (repeats, len(batches))) for name, t in turns.items()}
    took = {name: float(np.median(t, axis=0).sum()) for name, t in turns.items()}
    for subject in subjects:
        t = turns[subject.name]
        over = {name: times_as_fast(t, turns[name]) for name in ("floor", *PEERS) if name in turns}
        rows.append(
            {
                "name": subject.name,
                "batch": B,
                "samples_per_s": samples / took[subject.name],
                "tokens_per_s": tokens / took[subject.name],
                "over_floor": over.pop("floor", None),
                **{f"over_{name}": ratio for name, ratio in over.items()},
                # weights, moments, gradients, activations
                "peak_bytes": nbytes(subject.resident()) + allocated_peak(lambda s=subject: s.step(batches[0]), device),
                "saved_bytes": saved_bytes(lambda s=subject: s.loss(batches[0]), subject.resident()),
                "adapter_flops": adapter_flops(subject.model, batches[0]),
                "seconds": t.flatten().tolist(),
            }
        )
    if "hellora" in took:  # what choosing the experts costs beside training on them
        t = median(seconds(lambda: profile_routing(base, batches), device) for _ in range(repeats))
        share = 0.1 * t / (0.1 * t + 3 * took["hellora"])
        hot_share = float((counts * hot).sum() / counts.sum())
        rows.append(
            {"name": "profile", "batch": B, "samples_per_s": samples / t, "share": share, "hot_share": hot_share}
        )
    return rows


# ------------------------------------------------------------------------------------------------------ show


def show(rows: list[dict]) -> None:
    peers = [f"over_{peer}" for peer in PEERS if any(f"over_{peer}" in row for row in rows)]
    say(
        f"{'':15}{'batch':>6}{'samples/s':>11}{'tokens/s':>10}{'/ floor':>9}"
        + "".join(f"{'/ ' + peer.removeprefix('over_'):>17}" for peer in peers)
        + f"{'peak MB':>9}{'saved MB':>10}{'adapter GFLOP':>15}"
    )
    for row in rows:
        line = f"{row['name']:15}{row['batch']:6d}"
        if row["samples_per_s"] is None:
            say(f"{line}  not run: {row['note']}")
        elif row["name"] == "profile":
            say(
                f"{line}{row['samples_per_s']:11.2f}   counting a tenth of the data is {row['share']:.1%} of 3 epochs;"
                f" the hot experts take {row['hot_share']:.0%} of the routed tokens"
            )
        else:
            ratio = "" if row["over_floor"] is None else f"{row['over_floor']:.2f}"
            say(
                f"{line}{row['samples_per_s']:11.2f}{row['tokens_per_s']:10,.0f}{ratio:>9}"
                + "".join(f"{row[peer]:17.2f}" for peer in peers)
                + f"{row['peak_bytes'] / 1e6:9,.0f}{row['saved_bytes'] / 1e6:10,.1f}{row['adapter_flops'] / 1e9:15,.1f}"
            )


def parse_flags(argv: list[str]) -> argparse.Namespace:
    positive = cli.number(int, 1)
    parser = cli.Parser(prog="bench.py step", description="Time and memory of a training step.")
    parser.add_argument("--batch", type=positive, nargs="+", help="sequences of a step (default: 8 32; with --sweep 8)")
    parser.add_argument("--k", type=positive, default=8, help="hot experts per layer")
    parser.add_argument("--rank", type=positive, default=8, help="LoRA rank r; alpha is 2 r")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=list(NAMES), help="rows to measure")
    parser.add_argument("--repeats", type=positive, default=5, help="times every row is timed, in turn")
    parser.add_argument("--sweep", choices=list(SWEEPS), help=f"{', '.join(SWEPT)} over values of this, one batch size")
    parser.add_argument("--json", metavar="FILE", help="write the rows")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw the rows (.png, .pdf or .svg)")
    args = parser.parse_args(argv)
    if args.k > SHAPE["num_experts"]:
        raise InputError(f"--k {args.k}: want 1..{SHAPE['num_experts']}, the experts of a layer")
    args.batch = args.batch or ([8] if args.sweep else [8, 32])
    if args.sweep and len(args.batch) > 1:
        raise InputError(f"--sweep {args.sweep} measures one batch size, --batch names {len(args.batch)}; give one")
    args.json, args.plot = (file and writable(file) for file in (args.json, args.plot))
    return args


def main(argv: list[str]) -> list[dict]:
    args = parse_flags(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    say(f"{where}, torch {torch.__version__}; hidden {SHAPE['hidden_size']}, rank {args.rank}, k {args.k}")
    rows = []
    if not args.sweep:
        for B in args.batch:
            part = measure(tuple(args.names), SHAPE, B, args.k, args.rank, args.repeats, device)
            rows += part
            show(part)
    else:
        for value in SWEEPS[args.sweep]:
            now = {"B": args.batch[0], "k": args.k, "rank": args.rank}
            shape = SHAPE
            if args.sweep == "experts":
                shape = {**SHAPE, "num_experts": value}
            else:
                now[{"batch": "B"}.get(args.sweep, args.sweep)] = value
            part = measure(SWEPT, shape, repeats=args.repeats, device=device, **now)
            rows += [{"sweep": args.sweep, "value": value, **row} for row in part]
            say(f"{args.sweep} {value}")
            show(part)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        from benchmarks import step_charts  # here, since matplotlib takes long to import

        (step_charts.lines if args.sweep else step_charts.bars)(rows, args.plot)
    return rows
