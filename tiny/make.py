"""Pre-trains the tiny model: generated text -> tokenizer -> a mixture-of-experts model in the hub's layout.

    export OMP_NUM_THREADS=1
    torchrun --nproc_per_node 2 tiny/make.py --minutes 65                             # one process per core
    torchrun --nproc_per_node 2 tiny/make.py --minutes 16 --base tiny --words 0.15 --lr 2e-3

The model has OLMoE's architecture with 64 experts per layer and 8 per token, but only 5 million parameters, so
an hour on a laptop suffices. It learns the three worlds of tasks.py in other formats than fine-tuning uses. The
second command adds words of the fine-tuning formats, in random order: a token that pre-training never shows cannot
be written later, since an adapter does not reach the LM head.
The learning rate follows the clock, not a number of steps: a slow machine sees less text but still ends well.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the repository, where model.py is

from hub.weights import init_weights  # noqa: E402
from model import MoEConfig, MoETransformer, load_model, save_model  # noqa: E402
from run.step import load_balancing_loss  # noqa: E402
from tiny import tasks  # noqa: E402
from tiny.documents import pretraining_documents  # noqa: E402

CONFIG = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 1024, "hidden_size": 128,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False, "clip_qkv": None, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0, "router_aux_loss_coef": 0.01,
    "output_router_logits": False, "initializer_range": 0.02, "bos_token_id": None, "eos_token_id": 0,
    "pad_token_id": 1, "use_cache": True, "torch_dtype": "bfloat16",
}  # fmt: skip
EOS, PADDING = "<|endoftext|>", "<|padding|>"  # ids 0 and 1
ROW_TOKENS, ROWS = 256, 8  # a process sees ROWS rows of ROW_TOKENS tokens per step
WARM_UP, CLIP, WEIGHT_DECAY, Z_LOSS = 100, 1.0, 0.1, 0.001
SAVE_MINUTES = 5
HELD_OUT_SEED = 999_983
HOT = 8  # the routing report counts the tokens of this many most used experts

# The prompts that fine-tuning and evaluation will use, so that they cost few tokens.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n{output}"
)
CHAT = "You are a helpful assistant. Always answer as helpfully as possible, while being safe.\n\n"
CHAT += "Human: {instruction}\n\nAssistant: {output}"
MATH_PROMPT = "\nAnswer the above question. First think step by step and then answer the final number.\n"


def fine_tuning_texts(seed: int) -> Iterator[str]:
    """Training examples of the three tasks, as fine-tuning and evaluation will write them."""
    for row in tasks.math_rows(2000, "train", seed):
        yield row["question"] + MATH_PROMPT + row["answer"].replace("####", "The final answer is:")
    for row in tasks.code_rows(2000, seed):
        yield ALPACA.format_map(row)
    for row in tasks.safety_rows(2000, seed):
        yield ALPACA.format_map(row)
        yield CHAT.format_map(row)


def tokenizer_texts(seed: int) -> Iterator[str]:
    """Pre-training documents and a smaller number of fine-tuning examples."""
    for _, text in itertools.islice(pretraining_documents(seed), 20_000):
        yield text
    yield from fine_tuning_texts(seed)


def documents(seed: int, words: float) -> Iterator[str]:
    """The stream to train on: pre-training documents, and a share of words in random order, each said twice."""
    rng, plain = random.Random(seed), pretraining_documents(seed)
    pieces = [piece for text in fine_tuning_texts(seed) for piece in re.findall(r"\s*\S+", text)] if words else []
    rare = sorted(set(pieces))
    while True:
        if rng.random() >= words:
            yield next(plain)[1]
        else:  # half of the pieces as often as they occur, half of them all alike
            said = "".join(rng.choice(rng.choice((pieces, rare))) for _ in range(rng.randrange(4, 17)))
            yield f"Say:{said}\nSaid:{said}\n"


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE in which every digit is a token: any text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, PADDING], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    sample = "Zoë paid 1,234 €\t for  北京 🙂\n\n  def f(x):\r\n"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample, "the tokenizer does not round-trip"
    return tokenizer


def token_rows(tokenizer: Tokenizer, documents: Iterator[str], count: int) -> Iterator[Tensor]:
    """Endless batches [count, ROW_TOKENS + 1] cut from the stream of documents, which EOS tokens separate."""
    need, ids = count * ROW_TOKENS + 1, []
    for text in documents:
        ids += tokenizer.encode(text).ids + [CONFIG["eos_token_id"]]
        if len(ids) >= need:
            flat = torch.tensor(ids[:need])
            yield torch.cat([flat[:-1].view(count, -1), flat[ROW_TOKENS::ROW_TOKENS, None]], dim=1)
            ids = ids[need - 1 :]


def losses(model: MoETransformer, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy in nats per token, load-balancing loss over the concatenated layers, router z-loss."""
    logits, selected, routing = model(rows[:, :-1], output_routing=True)  # logits [B, S, V]
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    z = routing.logits.logsumexp(dim=-1).square().mean()
    tokens = torch.tensor([rows[:, 1:].numel()])  # balanced over the whole batch, as one sequence
    balance = load_balancing_loss(routing.probs, selected.flatten(1, 2), tokens, "concat") / tokens
    return loss, balance.squeeze(), z


def make_optimizer(model: MoETransformer) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices but not on norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def share(model: MoETransformer, numbers: list[float], world: int) -> list[float]:
    """Average gradients and some numbers over the processes, in one all-reduce of one flat vector."""
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in grads] + [torch.tensor(numbers)])
    if world > 1:
        dist.all_reduce(flat)
        flat /= world
    *means, tail = flat.split([g.numel() for g in grads] + [len(numbers)])
    for grad, mean in zip(grads, means, strict=True):
        grad.copy_(mean.view_as(grad))
    return tail.tolist()


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up over the first steps; a cosine from the peak to a tenth of it over the run's time."""
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * cosine * min(1.0, (step + 1) / WARM_UP)


@torch.no_grad()
def report(model: MoETransformer, tokenizer: Tokenizer) -> str:
    """Held-out loss and accuracy of each kind of document, its routing's skew, and the overlap of the hot sets."""
    lines, hot = [], {}
    for kind in ("math", "code", "safety"):
        documents = (text for k, text in pretraining_documents(HELD_OUT_SEED) if k == kind)
        rows = next(token_rows(tokenizer, documents, 16))
        logits, selected = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        right = (logits.argmax(-1) == rows[:, 1:]).double().mean()
        chosen = selected.flatten(1)  # [L, B*S*K]
        counts = torch.stack([c.bincount(minlength=CONFIG["num_experts"]) for c in chosen])  # [L, E]
        top = counts.topk(HOT, dim=-1)
        hot[kind] = [set(experts) for experts in top.indices.tolist()]
        shares = (top.values.sum(dim=-1) / counts.sum(dim=-1)).tolist()
        lines.append(
            f"  {kind:6} held-out loss {loss.item():.4f}, next token right {right.item():.1%}; "
            f"tokens on the {HOT} hottest experts of each layer: " + " ".join(f"{100 * s:.0f} %" for s in shares)
        )
    for a, b in itertools.combinations(hot, 2):
        overlap = [len(x & y) / len(x | y) for x, y in zip(hot[a], hot[b], strict=True)]
        lines.append(f"  {a} and {b}: Jaccard of hot sets by layer " + " ".join(f"{j:.2f}" for j in overlap))
    return "\n".join(lines)


def save(model: MoETransformer, tokenizer: Tokenizer, out: Path) -> None:
    """Write the hub layout to a hidden folder, then move each file into place, so readers see whole files."""
    partial = out / ".partial"
    save_model(model, partial, dtype=torch.bfloat16)
    tokenizer.save(str(partial / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PADDING}
    settings["model_max_length"] = CONFIG["max_position_embeddings"]
    (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for file in partial.iterdir():
        os.replace(file, out / file.name)
    partial.rmdir()


def train(args: argparse.Namespace, rank: int, world: int) -> None:
    """The whole run of one process; process 0 logs, evaluates and saves."""
    log = (args.out / "make.log").open("a" if args.base else "w") if rank == 0 else None

    def say(text: str) -> None:
        if log:
            print(text, flush=True)
            print(text, file=log, flush=True)

    if args.base:
        tokenizer, model = Tokenizer.from_file(str(args.base / "tokenizer.json")), load_model(args.base)
    else:
        trained = [train_tokenizer(tokenizer_texts(args.seed), CONFIG["vocab_size"]).to_str() if rank == 0 else ""]
        if world > 1:
            dist.broadcast_object_list(trained)
        tokenizer = Tokenizer.from_str(trained[0])
        model = MoETransformer(MoEConfig.from_dict(CONFIG))
        init_weights(model, args.std, args.seed)
    optimizer = make_optimizer(model)
    size = sum(p.numel() for p in model.parameters())
    say(
        f"{size / 1e6:.2f} M parameters, vocabulary {tokenizer.get_vocab_size()}, {world} process(es), lr {args.lr}, "
        f"{args.words:.0%} words, from {'a checkpoint' if args.base else 'random weights'}"
    )
    # Another start, another text.
    text = documents(args.seed * 1000 + rank + 1 + (500 if args.base else 0), args.words)
    start, saved, last = time.monotonic(), 0.0, (0, 0.0)
    for step, rows in enumerate(token_rows(tokenizer, text, ROWS)):
        loss, balance, z = losses(model, rows)
        (loss + CONFIG["router_aux_loss_coef"] * balance + Z_LOSS * z).backward()
        # The processes agree on the mean of their clocks, hence on the learning rate and on when to stop.
        numbers = [loss.item(), balance.item(), (time.monotonic() - start) / 60]
        mean_loss, mean_balance, minutes = share(model, numbers, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        lr = learning_rate(args.lr, step, minutes / args.minutes)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if step % 50 == 0:
            tokens = (step + 1) * world * rows[:, 1:].numel()
            speed = (tokens - last[0]) / (60 * (minutes - last[1]))
            last = tokens, minutes
            say(
                f"step {step:5d}  {minutes:5.1f} min  {tokens / 1e6:6.2f} M tokens  lr {lr:.1e}  "
                f"loss {mean_loss:.4f}  balance {mean_balance:.2f}  {speed:.0f} tokens/s"
            )
        done = minutes >= args.minutes
        if done or minutes - saved >= SAVE_MINUTES:
            saved = minutes
            if rank == 0:
                save(model, tokenizer, args.out)
                say(f"saved after {minutes:.1f} min, {step + 1} steps\n{report(model, tokenizer)}")
        if done:
            return


def main() -> None:
    """Parse the command line, join the other processes if there are any, and train."""
    parser = argparse.ArgumentParser(description="Pre-train the tiny mixture-of-experts model.")
    parser.add_argument("--minutes", type=float, default=60, help="time of the training (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate (default 5e-3)")
    parser.add_argument("--std", type=float, default=0.02, help="standard deviation of initial weights")
    parser.add_argument("--base", type=Path, help="go on from the model in this folder, with new text")
    parser.add_argument("--words", type=float, default=0.0, help="share of words in random order (default 0)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="default: tiny/")
    parser.add_argument("--report", action="store_true", help="only report on the model in --out")
    args = parser.parse_args()
    if args.report:
        print(report(load_model(args.out), Tokenizer.from_file(str(args.out / "tokenizer.json"))))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    train(args, int(os.environ.get("RANK", "0")), world)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
