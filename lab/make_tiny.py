"""Pre-trains an embedded model: generated text -> tokenizer -> a mixture-of-experts model in the hub's layout.

    export OMP_NUM_THREADS=1
    torchrun --nproc_per_node 2 -m lab.make_tiny --minutes 65 --lr 5e-3              # tokenizer and model from nothing
    python -m lab.make_tiny --family mixtral --tokenizer tiny --minutes 40 --words 0.12 --lr 5e-3
    python -m lab.make_tiny --base tiny --minutes 25 --words 0.12                    # continue with more text

Each model has about 5 million parameters, so an hour on a laptop suffices. It learns the three worlds of tasks.py from
the text of documents.py. `--words` adds words of the fine-tuning formats in random order: a token that pre-training
never shows cannot be written later, because no adapter reaches the LM head.

The learning rate follows the clock and not a number of steps: a slow machine sees less text but still ends well.
"""

import itertools
import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from command.cli import flag, parse, run
from data import alpaca, gsm8k
from hellora import hottest
from hub.checkpoint import TINY, resolve
from hub.weights import init_weights
from lab.documents import held_out, pretraining_documents
from machine.processes import Processes, start_processes
from model import MoETransformer, load_model, read_config, save_model
from routing.statistics import jaccard, top_share
from tiny import tasks
from training_step import load_balancing_loss

FOLDERS = {"olmoe": TINY, "mixtral": TINY / "mixtral"}  # each has the config.json of its model
SPECIAL = ["<|endoftext|>", "<|padding|>"]  # ids 0 and 1
ROW_TOKENS = 256
WARM_UP, CLIP, WEIGHT_DECAY, BALANCE_LOSS, Z_LOSS = 100, 1.0, 0.1, 0.01, 0.001
SAVE_MINUTES, LOG_STEPS = 5, 50


@dataclass(frozen=True)
class Settings:
    """The flags of this command."""

    family: str = flag("olmoe", "shape of the model", choices=tuple(FOLDERS))
    minutes: float = flag(60.0, "time of the training", type=float)
    seed: int = flag(0, "of the weights and of the text", type=int)
    rows: int = flag(8, f"rows of {ROW_TOKENS} tokens per step and process", type=int)
    lr: float = flag(2e-3, "peak learning rate", type=float)
    std: float = flag(0.02, "standard deviation of initial weights", type=float)
    base: str | None = flag(None, "go on from this model, with new text")
    tokenizer: str | None = flag(None, "use the tokenizer of this model and do not train one")
    words: float = flag(0.0, "share of documents that are words in random order", type=float)
    out: str | None = flag(None, "folder to write (default: tiny/, or tiny/mixtral/)")
    report: bool = flag(False, "only report on the model in --out")

    @property
    def folder(self) -> Path:
        return Path(self.out) if self.out else FOLDERS[self.family]


# ------------------------------------------------------------------------------------------------- text to tokens


def fine_tuning_texts(seed: int) -> Iterator[str]:
    """Training examples of the three tasks, as fine-tuning and evaluation will write them."""
    for row in tasks.math_rows(2000, "train", seed):
        yield "".join(gsm8k(row))
    for row in tasks.code_rows(2000, seed):
        yield "".join(alpaca(row))
    for row in tasks.safety_rows(2000, seed):
        yield "".join(alpaca(row))
        yield tasks.CHAT.format_map(row)


def documents(seed: int, words: float) -> Iterator[str]:
    """The stream to train on: pre-training documents, and a share of words in random order, each group said twice."""
    rng, plain = random.Random(seed), pretraining_documents(seed)
    pieces = [piece for text in fine_tuning_texts(seed) for piece in re.findall(r"\s*\S+", text)] if words else []
    rare = sorted(set(pieces))
    while True:
        if rng.random() >= words:
            yield next(plain)[1]
        else:  # half of the pieces as often as they occur, half of them all alike
            group = "".join(rng.choice(rng.choice((pieces, rare))) for _ in range(rng.randrange(4, 17)))
            yield f"Say:{group}\nSaid:{group}\n"


def train_tokenizer(seed: int, vocab_size: int) -> Tokenizer:
    """Byte-level BPE in which every digit is a token: any text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = (text for _, text in itertools.islice(pretraining_documents(seed), 20_000))
    tokenizer.train_from_iterator(itertools.chain(documents, fine_tuning_texts(seed)), trainer)
    sample = "Zoë paid 1,234 €\t for  北京 🙂\n\n  def f(x):\r\n"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample, "the tokenizer does not round-trip"
    return tokenizer


def token_rows(tokenizer: Tokenizer, documents: Iterator[str], count: int) -> Iterator[Tensor]:
    """Endless batches [count, ROW_TOKENS + 1] cut from the stream of documents, which EOS tokens separate."""
    need, ids = count * ROW_TOKENS + 1, []
    for text in documents:
        ids += [*tokenizer.encode(text).ids, 0]
        if len(ids) >= need:
            flat = torch.tensor(ids[:need])
            yield torch.cat([flat[:-1].view(count, -1), flat[ROW_TOKENS::ROW_TOKENS, None]], dim=1)
            ids = ids[need - 1 :]


# ------------------------------------------------------------------------------------------------------ one step


def losses(model: MoETransformer, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy in nats per token, load-balancing loss over the concatenated layers, router z-loss."""
    logits, selected, routing = model(rows[:, :-1], output_routing=True)  # logits [B, S, V]
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    z = routing.logits.logsumexp(dim=-1).square().mean()
    tokens = torch.tensor([rows[:, 1:].numel()])  # balanced over the batch, as if it were one sequence
    balance = load_balancing_loss(routing.probs, selected.flatten(1, 2), tokens, "concat") / tokens
    return loss, balance.squeeze(), z


def make_optimizer(model: MoETransformer) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices but not on norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up over the first steps; a cosine from the peak to a tenth of it over the run's time."""
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * cosine * min(1.0, (step + 1) / WARM_UP)


# ------------------------------------------------------------------------------------------------ what is written


@torch.no_grad()
def report(model: MoETransformer, tokenizer: Tokenizer) -> str:
    """Held-out loss and accuracy of each kind of document, its routing's skew, and the overlap of the hot sets."""
    E, K = model.config.num_experts, model.config.num_experts_per_tok
    lines, hot = [], {}
    for kind in ("math", "code", "safety"):
        rows = next(token_rows(tokenizer, held_out(kind), 16))
        logits, selected = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        right = (logits.argmax(-1) == rows[:, 1:]).double().mean()
        counts = torch.stack([chosen.bincount(minlength=E) for chosen in selected.flatten(1)])  # [L, E]
        hot[kind] = hottest(counts, K)
        shares = " ".join(f"{100 * share:.0f} %" for share in top_share(counts, K))
        lines.append(
            f"  {kind:6} held-out loss {loss.item():.4f}, next token right {right.item():.1%}; "
            f"tokens on the {K} hottest experts of each layer: {shares}"
        )
    for a, b in itertools.combinations(hot, 2):
        overlap = " ".join(f"{share:.2f}" for share in jaccard(hot[a], hot[b]))
        lines.append(f"  {a} and {b}: Jaccard of hot sets by layer {overlap}")
    return "\n".join(lines)


def save(model: MoETransformer, tokenizer: Tokenizer, out: Path) -> None:
    """Write the hub layout to a hidden folder, then move each file into place, so that readers see complete files."""
    partial = out / ".partial"
    save_model(model, partial, dtype=torch.bfloat16)
    tokenizer.save(str(partial / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "pad_token": SPECIAL[1]}
    settings["model_max_length"] = model.config.hub["max_position_embeddings"]
    (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    shutil.copy(TINY / "chat_template.jinja", partial)
    for file in partial.iterdir():
        os.replace(file, out / file.name)
    partial.rmdir()


# ------------------------------------------------------------------------------------------------------ the run


def start(settings: Settings, processes: Processes) -> tuple[MoETransformer, Tokenizer]:
    """The model and the tokenizer to begin with."""
    config = read_config(FOLDERS[settings.family])
    if source := settings.base or settings.tokenizer:
        tokenizer = Tokenizer.from_file(str(resolve(source) / "tokenizer.json"))
    else:
        trained = processes.once(lambda: train_tokenizer(settings.seed, config.vocab_size).to_str())
        tokenizer = Tokenizer.from_str(trained)
    if settings.base:
        return load_model(resolve(settings.base)), tokenizer
    model = MoETransformer(config)
    init_weights(model, settings.std, settings.seed)
    return model, tokenizer


def train(settings: Settings, processes: Processes) -> None:
    """Pre-train for `--minutes`. The main process prints, evaluates and saves."""
    model, tokenizer = start(settings, processes)
    replica = DistributedDataParallel(model) if processes.count > 1 else model  # averages the gradients
    optimizer = make_optimizer(model)
    # The text differs between processes, and between a first run and one that goes on from it.
    text = documents(settings.seed * 1000 + processes.index + 1 + (500 if settings.base else 0), settings.words)
    began, saved = time.monotonic(), 0.0
    for step, rows in enumerate(token_rows(tokenizer, text, settings.rows)):
        loss, balance, z = losses(replica, rows)
        (loss + BALANCE_LOSS * balance + Z_LOSS * z).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        minutes = torch.tensor((time.monotonic() - began) / 60)
        if processes.count > 1:  # one clock decides the learning rate, and when to stop
            dist.broadcast(minutes, 0)
        minutes = minutes.item()
        lr = learning_rate(settings.lr, step, minutes / settings.minutes)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        if processes.is_main and step % LOG_STEPS == 0:
            tokens = (step + 1) * processes.count * rows[:, 1:].numel() / 1e6
            print(
                f"step {step:5d}  {minutes:5.1f} min  {tokens:6.2f} M tokens  lr {lr:.1e}  "
                f"loss {loss.item():.4f}  balance {balance.item():.2f}",
                flush=True,
            )
        done = minutes >= settings.minutes
        if done or minutes - saved >= SAVE_MINUTES:
            saved = minutes
            if processes.is_main:
                save(model, tokenizer, settings.folder)
                print(f"saved after {minutes:.1f} min, {step + 1} steps\n{report(model, tokenizer)}", flush=True)
        if done:
            return


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, prog="make_tiny", description="Pre-train an embedded mixture-of-experts model.")
    if settings.report:
        tokenizer = Tokenizer.from_file(str(settings.folder / "tokenizer.json"))
        print(report(load_model(settings.folder), tokenizer))
        return
    settings.folder.mkdir(parents=True, exist_ok=True)
    train(settings, start_processes())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
