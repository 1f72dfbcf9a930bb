"""HELLoRA from end to end in one file: `OMP_NUM_THREADS=1 python examples/minimal.py`, 90 s of CPU time.

    1. Count how many tokens of the task each expert receives.
    2. Choose the k most-used ("hot") experts of every layer.
    3. Attach LoRA pairs to them, to attention and to the router. Every other weight is frozen.
    4. Train the pairs.
    5. Merge them into the weights, and answer questions that training did not show.

The model is the OLMoE in tiny/, the task tiny-math. This file takes only the rows of that task from the rest of the
repository, which has the same method for real models, fast and on many processes. The weights are a dict of tensors
under the names of the checkpoint. The pairs (A, B) are a dict under the same names.

Dimensions: B sequences, S positions, T real tokens in a batch, L layers, E experts per layer, K experts per token,
D hidden_size, F intermediate_size of an expert, Hq heads, Dh head_dim, V vocabulary, r rank.
"""

import json
import math
import random
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end, because this project's profile.py must not hide the standard library's

from tiny import tasks  # noqa: E402

CONFIG = json.loads((ROOT / "tiny/config.json").read_text())
TOKENIZER = Tokenizer.from_file(str(ROOT / "tiny/tokenizer.json"))
L, HEADS = CONFIG["num_hidden_layers"], CONFIG["num_attention_heads"]  # 4, 4
E, K = CONFIG["num_experts"], CONFIG["num_experts_per_tok"]  # 64, 8
EOS, PAD = CONFIG["eos_token_id"], CONFIG["pad_token_id"]

num_hot = 8  # the paper's k: hot experts per layer
r, alpha = 8, 16.0  # the rank of a pair; its product is scaled by alpha / r
batch_size, learning_rate, max_norm = 16, 6e-3, 1.0
num_train, num_test, max_new_tokens = 2000, 100, 100


# ---------------------------------------------------------------------------------------------------------- the task


def encode(row):
    """A row {"question", "answer"} as token ids: the prompt is read, the target is learnt."""
    question = "Answer the above question. First think step by step and then answer the final number."
    prompt = f"{row['question']}\n{question}\n"
    target = row["answer"].replace("####", "The final answer is:")
    return TOKENIZER.encode(prompt).ids, TOKENIZER.encode(target).ids + [EOS]


def pad(sequences):
    """ids [B, S], padded on the right, and real [B, S]: False at padding."""
    S = max(map(len, sequences))
    ids = torch.tensor([ids + [PAD] * (S - len(ids)) for ids in sequences])
    lengths = torch.tensor([len(ids) for ids in sequences])
    return ids, torch.arange(S) < lengths[:, None]


# --------------------------------------------------------------------------------------------------------- the model


def load_weights():
    """All matrices of the checkpoint by name: layers.0.self_attn.q_proj.weight [D, D], ..."""
    stored = load_file(ROOT / "tiny/model.safetensors")  # bfloat16
    return {name.removeprefix("model."): weight.float() for name, weight in stored.items()}


def linear(x, name, W, pairs):
    """y = W x + (alpha / r) B A x (HELLoRA, eq. 3); without a pair only W x.  [..., in] -> [..., out]"""
    y = x @ W[f"{name}.weight"].T
    if name in pairs:
        A, B = pairs[name]  # [r, in], [out, r]
        y = y + alpha / r * (x @ A.T @ B.T)
    return y


def norm(x, name, W):
    """x / rms(x) * weight"""
    return x * (x.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).rsqrt() * W[f"{name}.weight"]


def rotate(x):
    """Rotary positions: entries i and i + Dh / 2 of a head turn together, by an angle that grows with the position."""
    S, half = x.shape[2], x.shape[3] // 2
    frequency = CONFIG["rope_theta"] ** (-torch.arange(half) / half)  # [Dh / 2]
    angle = torch.arange(S)[:, None] * frequency  # [S, Dh / 2]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def attention(x, layer, W, pairs):
    """Causal attention. Padding is on the right, where no real token looks.  [B, S, D] -> [B, S, D]"""
    q = norm(linear(x, f"{layer}.self_attn.q_proj", W, pairs), f"{layer}.self_attn.q_norm", W)
    k = norm(linear(x, f"{layer}.self_attn.k_proj", W, pairs), f"{layer}.self_attn.k_norm", W)
    v = linear(x, f"{layer}.self_attn.v_proj", W, pairs)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))  # [B, Hq, S, Dh]
    y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)  # [B, Hq, S, Dh]
    return linear(y.transpose(1, 2).flatten(2), f"{layer}.self_attn.o_proj", W, pairs)


def expert(x, name, W, pairs):
    """down(silu(gate x) * up x)  [rows, D] -> [rows, D]"""
    gate = linear(x, f"{name}.gate_proj", W, pairs)  # [rows, F]
    up = linear(x, f"{name}.up_proj", W, pairs)  # [rows, F]
    return linear(F.silu(gate) * up, f"{name}.down_proj", W, pairs)


def mixture(x, layer, W, pairs):
    """y = sum of p_e expert_e(x) over the K experts e with the largest p.  [T, D] -> y [T, D], chosen [T, K]"""
    p = linear(x, f"{layer}.mlp.gate", W, pairs).softmax(-1)  # [T, E]
    p, chosen = p.topk(K)  # [T, K] twice; Mixtral now divides p by its sum, OLMoE does not
    y = torch.zeros_like(x)
    for e in range(E):  # also those that no token chose: their pairs then get a gradient of zero
        token, place = (chosen == e).nonzero(as_tuple=True)  # the tokens that chose e, and where it stands in their p
        y.index_add_(0, token, p[token, place, None] * expert(x[token], f"{layer}.mlp.experts.{e}", W, pairs))
    return y, chosen


def forward(ids, real, W, pairs):
    """ids, real [B, S] -> the normalised hidden states [B, S, D], and the experts of the real tokens [L, T, K]"""
    x = W["embed_tokens.weight"][ids]  # [B, S, D]
    chosen = []
    for layer in (f"layers.{i}" for i in range(L)):
        x = x + attention(norm(x, f"{layer}.input_layernorm", W), layer, W, pairs)
        h = norm(x[real], f"{layer}.post_attention_layernorm", W)  # [T, D]; padding passes no expert
        y, chosen_of_layer = mixture(h, layer, W, pairs)  # [T, D], [T, K]
        x = x.index_put((real,), x[real] + y)  # [B, S, D]
        chosen.append(chosen_of_layer)
    return norm(x, "norm", W), torch.stack(chosen)


# -------------------------------------------------------------------------------------------------------- the method


@torch.no_grad()
def count(sequences, W):
    """c[l, e] = how many tokens choose expert e in layer l of the base model.  -> [L, E]"""
    counts = torch.zeros(L, E, dtype=torch.int64)
    for start in range(0, len(sequences), batch_size):
        _, chosen = forward(*pad(sequences[start : start + batch_size]), W, pairs={})  # [L, T, K]
        for layer in range(L):
            counts[layer] += chosen[layer].flatten().bincount(minlength=E)
    return counts


def choose(counts):
    """H[l]: the k experts of layer l with the largest c[l, e]; of equal counts the lower id first.  -> L lists"""
    by_count = counts.argsort(dim=-1, descending=True, stable=True)  # [L, E]
    return [sorted(ids) for ids in by_count[:, :num_hot].tolist()]


def attach(hot, W):
    """A pair (A, B) for each matrix of the hot experts, for attention and for the router.

    A is uniform in +-1 / sqrt(in). B is zero, so that step 0 is the base model.
    """
    names = []
    for i in range(L):
        names += [f"layers.{i}.self_attn.{matrix}_proj" for matrix in "qkvo"] + [f"layers.{i}.mlp.gate"]
        names += [f"layers.{i}.mlp.experts.{e}.{matrix}_proj" for e in hot[i] for matrix in ("gate", "up", "down")]
    pairs = {}
    for name in names:
        fan_out, fan_in = W[f"{name}.weight"].shape
        A = torch.empty(r, fan_in).uniform_(-1, 1) / math.sqrt(fan_in)
        pairs[name] = A.requires_grad_(), torch.zeros(fan_out, r, requires_grad=True)
    return pairs


def loss_of(batch, W, pairs):
    """The mean of -log softmax(logits)[target token] over the target tokens of a batch of (prompt, target)."""
    ids, real = pad([prompt + target for prompt, target in batch])  # [B, S]
    prompts = torch.tensor([len(prompt) for prompt, _ in batch])
    is_target = real & (torch.arange(ids.shape[1]) >= prompts[:, None])  # [B, S]
    x, _ = forward(ids, real, W, pairs)  # [B, S, D]
    logits = x[:, :-1][is_target[:, 1:]] @ W["lm_head.weight"].T  # [targets, V]; position s predicts token s + 1
    return F.cross_entropy(logits, ids[is_target])


def train(batches, W, pairs):
    """AdamW on the pairs alone. The rate rises from 0 over a tenth of the steps, then falls to 0.  -> the losses"""
    factors = [factor for pair in pairs.values() for factor in pair]
    optimizer = torch.optim.AdamW(factors, weight_decay=0.0)
    steps = len(batches)
    warmup = math.ceil(steps / 10)
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate * min(step / warmup, (steps - step) / (steps - warmup))
        loss = loss_of(batch, W, pairs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 25 == 0 or step == steps - 1:
            print(f"    step {step + 1:3d} of {steps}: loss {losses[-1]:.3f}")
    return losses


@torch.no_grad()
def merge(W, pairs):
    """W + (alpha / r) B A: an ordinary checkpoint, which computes the same without pairs."""
    merged = dict(W)
    for name, (A, B) in pairs.items():
        merged[f"{name}.weight"] = W[f"{name}.weight"] + alpha / r * (B @ A)
    return merged


# ------------------------------------------------------------------------------------------------------- the answers


@torch.no_grad()
def complete(prompts, W, pairs):
    """Append the most likely token to each prompt until it is EOS. Each step reads everything again: no KV cache."""
    sequences = [list(prompt) for prompt in prompts]
    going = list(range(len(prompts)))  # those without an EOS
    for _ in range(max_new_tokens):
        ids, real = pad([sequences[i] for i in going])
        x, _ = forward(ids, real, W, pairs)
        last = x[torch.arange(len(going)), real.sum(1) - 1]  # [B, D] of each sequence's last token
        tokens = (last @ W["lm_head.weight"].T).argmax(-1)  # [B]
        for i, token in zip(going, tokens.tolist(), strict=True):
            sequences[i].append(token)
        going = [i for i in going if sequences[i][-1] != EOS]
        if not going:
            break
    return [TOKENIZER.decode(ids[len(prompt) :]) for prompt, ids in zip(prompts, sequences, strict=True)]


def accuracy(rows, answers):
    """The share of the answers that name the right number."""
    right = 0
    for row, text in zip(rows, answers, strict=True):
        number = re.search(r"The final answer is: (-?\d+)", text)
        right += number is not None and number[1] == row["answer"].split("#### ")[1]
    return right / len(rows)


def main():
    began = time.perf_counter()
    torch.manual_seed(0)
    W = load_weights()
    print(f"tiny: {L} layers of {E} experts, {K} per token; {sum(w.numel() for w in W.values()):,} weights")
    rows = [encode(row) for row in tasks.math_rows(num_train, seed=0, split="train")]
    test = tasks.math_rows(num_test, seed=0, split="test")
    random.Random(0).shuffle(rows)

    sample = [prompt + target for prompt, target in rows[: num_train // 10]]
    counts = count(sample, W)
    print(f"1. counted {sum(map(len, sample)):,} tokens, a tenth of the training rows")

    hot = choose(counts)
    for i, ids in enumerate(hot):
        share = counts[i, ids].sum() / counts[i].sum()
        print(f"2. layer {i}: experts {' '.join(map(str, ids))} receive {share:.0%} of the routed tokens")
    print(f"   evenly used, {num_hot} of {E} experts would receive {num_hot / E:.1%}")

    pairs = attach(hot, W)
    trained = sum(factor.numel() for pair in pairs.values() for factor in pair)
    print(f"3. attached {len(pairs)} pairs of rank {r}: {trained:,} parameters train")

    batches = [rows[start : start + batch_size] for start in range(0, num_train, batch_size)]
    print(f"4. training on {num_train:,} rows, {batch_size} a step")
    train(batches, W, pairs)

    merged = merge(W, pairs)
    prompts = [encode(row)[0] for row in test]
    print(f"5. merged; answering {num_test} questions with the base and the merged weights")
    before, after = (complete(prompts, weights, pairs={}) for weights in (W, merged))
    print(f"\n{test[0]['question']}\n\nbase:    {before[0][:200]!r}\nHELLoRA: {after[0]!r}\n")
    print(f"accuracy: base {accuracy(test, before):.0%}, HELLoRA {accuracy(test, after):.0%}")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
