"""Write the test vectors beside this file: `python tests/vectors/make.py`.

Nothing here imports the code under test. Every expected output comes from a formula that is written out as its source
has it, in float64, one expert and one token after the other. Gradients are autograd's. The docstring of each writer
names its source. Inputs are short decimals. Outputs have the digits that identify a float64.

Dimensions: L layers, E experts per layer, K experts per token, T tokens, D hidden_size, F intermediate_size, r rank,
V vocabulary.
"""

import json
import math
import random
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make_packed import packed_deltas
from make_scoring import gsm8k_verdict, pass_at_k, refuses
from torch import Tensor

HERE = Path(__file__).parent


def draw(rng: random.Random, *shape: int, scale: float = 1.0):
    """Nested lists of decimals with three places, uniform in +-scale."""
    if not shape:
        return round(rng.uniform(-scale, scale), 3)
    return [draw(rng, *shape[1:], scale=scale) for _ in range(shape[0])]


def leaves(value):
    """Lists of floats as tensors that get a gradient; positions are none."""
    if isinstance(value, dict):
        return {name: part if name == "positions" else leaves(part) for name, part in value.items()}
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def lists(value):
    """Tensors as nested lists."""
    if isinstance(value, dict):
        return {name: lists(part) for name, part in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


def gradients(factors: dict) -> dict:
    """Of what trains in a pair, or in the pairs of several matrices: all but LoRI's A."""
    if "A" not in factors:
        return {name: gradients(pair) for name, pair in factors.items()}
    names = ["B"] if "positions" in factors else factors
    # Autograd gives None for a stack of experts without a token, which is a gradient of zero.
    return {
        name: torch.zeros_like(factors[name]) if factors[name].grad is None else factors[name].grad for name in names
    }


# ------------------------------------------------------------------------------------------- which experts


def by_score(scores: list, hottest_first: bool = True) -> list[int]:
    """Ids by score; of equal scores the lower id comes first."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e] if hottest_first else scores[e], e))


def chosen(policy: str, scores: list, num_hot: int | None, coverage: float | None, seed: int) -> list[list[bool]]:
    """bool [L][E], in exact arithmetic."""
    L, E = len(scores), len(scores[0])
    exact = [[Fraction(str(x)) for x in row] for row in scores]
    if policy == "all":
        ids = [range(E)] * L
    elif policy in ("hot", "cold"):
        ids = [by_score(row, policy == "hot")[:num_hot] for row in exact]
    elif policy == "model-hot":
        ids = [by_score([sum(column) for column in zip(*exact, strict=True)])[:num_hot]] * L
    elif policy == "random":
        noise = uniform(seed, "select_experts", L * E)
        ids = [by_score(noise[i * E : (i + 1) * E])[:num_hot] for i in range(L)]
    elif policy == "coverage":
        ids = [smallest_set(row, Fraction(str(coverage))) for row in exact]
    else:  # greedy
        shares = [x / sum(row) for row in exact for x in row]
        best = by_score(shares)[: num_hot * L]
        ids = [[i % E for i in best if i // E == layer] for layer in range(L)]
    return [[e in row for e in range(E)] for row in ids]


def smallest_set(row: list[Fraction], coverage: Fraction) -> list[int]:
    """The fewest experts, hottest first, whose scores sum to at least `coverage` of the layer's sum."""
    ids: list[int] = []
    for e in by_score(row):
        if sum(row[i] for i in ids) >= coverage * sum(row):
            break
        ids.append(e)
    return ids


def select_experts() -> Iterator[tuple]:
    """hot: HELLoRA, section 3. model-hot, cold: section 4.5.1. coverage: ESFT. greedy, random: MoE-Sieve.

    Of equal scores the lower id comes first; for greedy the lower layer, then the lower id. The papers do not say.
    """
    counts = [[5, 9, 5, 0, 9, 5, 7], [4, 4, 4, 4, 4, 4, 4], [0, 30, 1, 2, 1, 3, 3]]
    mass = [[0.5, 0.25, 0.125, 0.5, 0.125, 0.25, 0.75], [1.5, 0.1, 0.2, 0.3, 0.1, 0.2, 1.5]]
    for policy, scores, num_hot, coverage in (
        ("hot", counts, 3, None), ("hot", mass, 2, None), ("model-hot", counts, 3, None), ("cold", counts, 3, None),
        ("greedy", counts, 2, None), ("greedy", mass, 3, None), ("coverage", counts, None, 0.45),
        ("coverage", counts, None, 0.75), ("coverage", mass, None, 0.6), ("coverage", counts, None, 1.0),
        ("random", counts, 3, None), ("all", counts, None, None),
    ):  # fmt: skip
        seed = 11 if policy == "random" else 0
        inputs = {"policy": policy, "scores": scores, "num_hot": num_hot, "coverage": coverage, "seed": seed}
        how = f"{num_hot} per layer" if num_hot else f"coverage {coverage}" if coverage else "each one"
        yield f"{policy}, {how}, of {'counts' if scores is counts else 'mass'}", inputs, chosen(**inputs)


# ------------------------------------------------------------------------------------------- the random stream


def uniform(seed: int, name: str, size: int) -> list[float]:
    """(w >> 40) / 2^24 for the 64-bit words w of numpy's PCG64, seeded by SeedSequence([seed, crc32(name)])."""
    words = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])).random_raw(size)
    return [(word >> 40) / 2**24 for word in words.tolist()]


def init_A() -> Iterator[tuple]:
    """U(-1 / sqrt(in), 1 / sqrt(in)): Kaiming uniform with a = sqrt(5), as PEFT and LoRI initialise A."""
    for seed, name, r, fan_in in ((0, "layers.0.mlp.gate", 2, 7), (5, "layers.1.mlp.experts.3.up_proj", 3, 5)):
        u = uniform(seed, name, r * fan_in)
        A = [[(2 * u[k * fan_in + j] - 1) / math.sqrt(fan_in) for j in range(fan_in)] for k in range(r)]
        yield f"seed {seed}", {"seed": seed, "name": name, "r": r, "fan_in": fan_in}, A


# ------------------------------------------------------------------------------------------- factor pairs, experts


def draw_pair(rng: random.Random, kind: str, W: list, r: int) -> dict:
    pair = {"A": draw(rng, r, len(W[0])), "B": draw(rng, len(W), r, scale=0.5)}
    if kind == "dora":
        pair["m"] = [round(math.sqrt(sum(w * w for w in row)) + draw(rng, scale=0.2), 3) for row in W]
    if kind == "lori":
        pair["positions"] = sorted(rng.sample(range(len(W) * r), 4))
        pair["B"] = draw(rng, 4)
    return pair


def adapted(kind: str, W: Tensor, factors: dict, alpha: float) -> Tensor:
    """The weight that a pair makes of W.  [out, in]

    W + (alpha / r) B A (LoRA, section 4.1; HELLoRA, eq. 3). LoRI: B is zero but for the entries kept (section 3.2).
    DoRA: m (W + (alpha / r) B A) / |.| with a norm per row (eq. 5) that is a constant for the gradient (section 4.3).
    """
    A, B, r = factors["A"], factors["B"], len(factors["A"])
    if kind == "lori":
        B = B.new_zeros(len(W) * r).index_put((torch.tensor(factors["positions"]),), B).view(-1, r)
    merged = W + alpha / r * B @ A
    return factors["m"][:, None] * merged / merged.detach().norm(dim=1, keepdim=True) if kind == "dora" else merged


def swiglu(W: dict, x: Tensor) -> Tensor:
    """down(silu(gate x) * up x) (Shazeer 2020), silu(z) = z / (1 + exp(-z)).  [.., D] -> [.., D]"""
    gate, up = x @ W["gate_proj"].T, x @ W["up_proj"].T
    return (gate / (1 + torch.exp(-gate)) * up) @ W["down_proj"].T


def linear() -> Iterator[tuple]:
    """y = W' x + b, W' = W + (alpha / r) B A (LoRA, section 4.1; HELLoRA, eq. 3). lori: B is zero but at `positions`.

    dora: W' = m (W + (alpha / r) B A) / |.| per row (eq. 5), the norm a constant for the gradient (section 4.3).
    """
    for kind, with_bias in (("lora", False), ("lora", True), ("dora", False), ("dora", True), ("lori", True)):
        rng = random.Random(f"linear {kind} {with_bias}")
        W = draw(rng, 5, 4)
        factors, bias = draw_pair(rng, kind, W, 3), draw(rng, 5) if with_bias else None
        inputs = {"kind": kind, "x": draw(rng, 6, 4), "W": W, "bias": bias, "factors": factors, "alpha": 7.0}
        inputs["grad_y"] = draw(rng, 6, 5)
        x, pair = leaves(inputs["x"]), leaves(factors)
        y = x @ adapted(kind, leaves(W), pair, 7.0).T + (leaves(bias) if with_bias else 0)
        y.backward(leaves(inputs["grad_y"]))
        yield f"{kind}{', bias' if with_bias else ''}", inputs, {"y": y, "x": x.grad, "factors": gradients(pair)}


def draw_expert(rng: random.Random, D: int, F: int) -> dict:
    return {"gate_proj": draw(rng, F, D), "up_proj": draw(rng, F, D), "down_proj": draw(rng, D, F)}


def expert() -> Iterator[tuple]:
    """down(silu(gate x) * up x) (Shazeer 2020), with each of the three matrices adapted as in `linear`."""
    for kind in ("lora", "dora", "lori"):
        rng = random.Random(f"expert {kind}")
        W = draw_expert(rng, 5, 4)
        factors = {name: draw_pair(rng, kind, matrix, 3) for name, matrix in W.items()}
        inputs = {"kind": kind, "x": draw(rng, 6, 5), "W": W, "factors": factors, "alpha": 7.0}
        inputs["grad_y"] = draw(rng, 6, 5)
        x, pairs = leaves(inputs["x"]), leaves(factors)
        y = swiglu({name: adapted(kind, matrix, pairs[name], 7.0) for name, matrix in leaves(W).items()}, x)
        y.backward(leaves(inputs["grad_y"]))
        yield kind, inputs, {"y": y, "x": x.grad, "factors": gradients(pairs)}


# ------------------------------------------------------------------------------------------- routing, the layer


def routed(logits: Tensor, K: int, renormalise: bool) -> tuple[list[int], Tensor]:
    """Softmax over all experts, the K largest, divided by their sum if the config says norm_topk_prob.  logits [E]"""
    order = by_score(logits.tolist())
    gaps = logits[order[:K]] - logits[order[1 : K + 1]]
    assert gaps.min() > 0.01, gaps  # no near tie: float32 must choose the same experts
    weights = logits.softmax(0)[order[:K]]
    return order[:K], weights / weights.sum() if renormalise else weights


def route() -> Iterator[tuple]:
    """Softmax over all experts, then the K largest. With norm_topk_prob (Mixtral) they are divided by their sum.

    topk_before_softmax (GraniteMoE): the K largest logits, then softmax over them.
    """
    logits = draw(random.Random("route"), 5, 7, scale=3.0)
    wide = [[round(20 * z, 2) for z in row] for row in logits]
    for renormalise in (False, True):
        for name, rows in (("", logits), (", large logits", wide)):
            ids, weights = zip(*(routed(leaves(row), 3, renormalise) for row in rows), strict=True)
            inputs = {"router_logits": rows, "top_k": 3, "norm_topk_prob": renormalise, "topk_before_softmax": False}
            outputs = {"selected_experts": list(ids), "weights": torch.stack(weights)}
            yield f"{'' if renormalise else 'not '}renormalised{name}", inputs, outputs
    # The softmax over all experts is 0 for all but one of them in float32.
    rows = [[-60.0, -75.5, -50.25, -40.5, -80.0, 71.0, -65.25]]
    ids = by_score(rows[0])[:3]
    inputs = {"router_logits": rows, "top_k": 3, "norm_topk_prob": False, "topk_before_softmax": True}
    yield "top-k before softmax", inputs, {"selected_experts": [ids], "weights": leaves(rows)[:, ids].softmax(-1)}


def count_experts() -> Iterator[tuple]:
    """c[l, e]: the real tokens whose K experts in layer l include e (HELLoRA, section 3). Padding is routed to 0, 1."""
    rng = random.Random("count")
    for name, lengths in (("padded", [5, 3, 4]), ("not padded", [5, 5])):
        chosen = [
            [[sorted(rng.sample(range(6), 2)) if s < n else [0, 1] for s in range(5)] for n in lengths]
            for _ in range(3)
        ]
        real = [[ids for row, n in zip(layer, lengths, strict=True) for ids in row[:n]] for layer in chosen]
        counts = [[sum(e in ids for ids in layer) for e in range(6)] for layer in real]
        yield name, {"selected_experts": chosen, "lengths": lengths, "num_experts": 6}, counts


def merge() -> Iterator[tuple]:
    """W + (alpha / r) B A (LoRA, section 4.1)."""
    for alpha in (7.0, 3.0):
        rng = random.Random(f"merge {alpha}")
        W = draw(rng, 3, 4)
        factors = draw_pair(rng, "lora", W, 3)
        merged = adapted("lora", leaves(W), leaves(factors), alpha)
        yield f"alpha {alpha:g}", {"W": W, "factors": factors, "alpha": alpha}, merged


def moe_layer() -> Iterator[tuple]:
    """y = sum over a token's K experts of weight * expert(x). Hot experts and router have pairs (HELLoRA, section 3).

    In the first two cases no token chooses hot expert 5. In the last, no token chooses a hot expert.
    """
    for name, renormalise in (("not renormalised", False), ("renormalised", True)):
        yield layer_case(name, 12, (7, 6, 5, 8, 4), [0, 2, 5], 2, renormalise)
    yield layer_case("only cold experts have tokens", 73, (6, 7, 4, 5, 3), [1, 4], 1, False)


def layer_case(name: str, seed: int, sizes: tuple, hot: list[int], K: int, renormalise: bool) -> tuple:
    rng, alpha = random.Random(seed), 7.0
    T, D, F, E, r = sizes
    W = {"gate_proj": draw(rng, E, F, D), "up_proj": draw(rng, E, F, D), "down_proj": draw(rng, E, D, F)}
    router = draw(rng, E, D)
    pairs = {key: [draw_pair(rng, "lora", W[key][e], r) for e in hot] for key in W}
    factors = {key: {part: [pair[part] for pair in stack] for part in "AB"} for key, stack in pairs.items()}
    factors["router"] = draw_pair(rng, "lora", router, r)
    inputs = {"x": draw(rng, T, D), "router": router, "W": W, "hot": hot, "factors": factors, "alpha": alpha}
    inputs |= {"top_k": K, "norm_topk_prob": renormalise, "grad_y": draw(rng, T, D)}

    x, trained = leaves(inputs["x"]), leaves(factors)
    experts = [{key: stack[e] for key, stack in leaves(W).items()} for e in range(E)]
    for i, e in enumerate(hot):
        for key in W:
            pair = {part: trained[key][part][i] for part in "AB"}
            experts[e][key] = adapted("lora", experts[e][key], pair, alpha)
    gate = adapted("lora", leaves(router), trained["router"], alpha)
    y, selected = [], []
    for row in x:
        ids, weights = routed(gate @ row, K, renormalise)
        y.append(sum(w * swiglu(experts[e], row) for e, w in zip(ids, weights, strict=True)))
        selected.append(ids)
    used = {e for ids in selected for e in ids}
    assert set(hot) - used and (used - set(hot)), (name, used)
    torch.stack(y).backward(leaves(inputs["grad_y"]))
    outputs = {"y": torch.stack(y), "selected_experts": selected, "x": x.grad, "factors": gradients(trained)}
    return name, inputs, outputs


# ------------------------------------------------------------------------------------------- LoRI's entries


def kept_entries() -> Iterator[tuple]:
    """LoRI, section 3.2: one threshold for all matrices together. Ties, which are ours: by name, then by position."""
    rng = random.Random("kept")
    names = ["layers.2.mlp.gate", "layers.10.mlp.gate", "layers.2.mlp.experts.lora.up_proj"]
    shapes = [(4, 3), (5, 3), (2, 5, 2)]
    B = dict(zip(names, (draw(rng, *shape) for shape in shapes), strict=True))
    tied = {key: (torch.tensor(b).sign() * (1 + torch.tensor(b).abs().round()) / 2).tolist() for key, b in B.items()}
    for name, matrices, share in (("distinct", B, 0.1), ("tied", tied, 0.2)):
        entries = [(-abs(b), key, i) for key in sorted(matrices) for i, b in enumerate(np.ravel(matrices[key]))]
        entries.sort()
        best = entries[: math.floor(Fraction(str(share)) * len(entries))]
        assert (best[-1][0] == entries[len(best)][0]) == (name == "tied")
        kept = {key: sorted(i for _, at, i in best if at == key) for key in matrices}
        yield name, {"matrices": matrices, "share": share}, kept


# ------------------------------------------------------------------------------------------- DR-LoRA


def dr_lora_observe() -> Iterator[tuple]:
    """DR-LoRA, the saliency in its README: S = f g / (R + 1)^1.2, f and g as shares of their sums plus 1e-6.

    usage <- 0.9 usage + counts. Dimension j of B has |sum_i B[i, j] grad_B[i, j]|. score <- 0.9 score + 0.1 times the
    sum over dimensions, averaged over projections. f comes from usage, g from score / R. Dimensions from R on do not
    train: their gradient is set to zero.
    """
    rng, E, r_max, ranks = random.Random("dr-lora"), 3, 4, [1, 2, 3]
    B = [[[[b if j < ranks[e] else 0.0 for j, b in enumerate(row)] for row in one] for e, one in enumerate(stack)]
         for stack in (draw(rng, E, 5, r_max), draw(rng, E, 5, r_max), draw(rng, E, 2, r_max))]  # fmt: skip
    grad_B = [draw(rng, E, len(stack[0]), r_max) for stack in B]
    inputs = {"usage": [3.5, 12.25, 4.0], "score": [0.25, 0.5, 0.0], "ranks": ranks}
    inputs |= {"counts": [4, 9, 0], "B": B, "grad_B": grad_B}
    usage = 0.9 * leaves(inputs["usage"]) + torch.tensor(inputs["counts"])
    products = [(leaves(stack) * leaves(grads)).sum(1).abs().sum(1) for stack, grads in zip(B, grad_B, strict=True)]
    score = 0.9 * leaves(inputs["score"]) + 0.1 * sum(products) / len(B)
    R = leaves(ranks)
    g = score / R
    saliency = (usage / usage.sum() + 1e-6) * (g / g.sum() + 1e-6) / (R + 1) ** 1.2
    trains = torch.arange(r_max) < R[:, None, None]  # [E, 1, r_max]
    masked = [lists(leaves(stack) * trains) for stack in grad_B]
    yield "one step", inputs, {"usage": usage, "score": score, "saliency": saliency, "grad_B": masked}


def dr_lora_grow() -> Iterator[tuple]:
    """DR-LoRA: the quota of a layer in order of falling saliency, at most `cap` per expert, within budget and r_max."""
    for name, saliency, ranks, quota, cap, budget, r_max in (
        ("ties", [0.25, 0.5, 0.25, 0.5, 0.25], [2, 2, 2, 2, 2], 5, 2, 20, 6),
        ("a full expert", [0.1, 0.9, 0.3, 0.2], [2, 6, 3, 2], 3, 2, 20, 6),
        ("what is left of the budget", [0.1, 0.9, 0.3, 0.2], [3, 4, 3, 2], 5, 2, 15, 6),
    ):
        left, grown = min(quota, budget - sum(ranks)), list(ranks)
        for e in by_score(saliency):
            more = min(left, cap, r_max - ranks[e])
            grown[e] += more
            left -= more
        assert left == 0, name  # otherwise a second round would follow, which is ours
        inputs = {"saliency": saliency, "ranks": ranks, "quota": quota, "cap": cap, "budget": budget, "r_max": r_max}
        yield name, inputs, grown


# ------------------------------------------------------------------------------------------- the loss of a batch


def batch_loss() -> Iterator[tuple]:
    """-mean log softmax(logits)[next token] over all target tokens of the global batch, however it is cut.

    The model is a table: row a holds the logits of the token after a. The mean of the pieces' means would be another.
    """
    rng, V = random.Random("loss"), 6
    table = draw(rng, V, V, scale=2.0)
    lengths, prompts = (4, 7, 3, 6, 5), [2, 1, 1, 5, 3]
    sequences = [[rng.randrange(V) for _ in range(length)] for length in lengths]
    rows = leaves(table)
    given = [a for ids, p in zip(sequences, prompts, strict=True) for a in ids[p - 1 : -1]]
    targets = [b for ids, p in zip(sequences, prompts, strict=True) for b in ids[p:]]
    loss = F.cross_entropy(rows[given], torch.tensor(targets))
    loss.backward()
    for micro_batch in (1, 2, 5):
        inputs = {"table": table, "sequences": sequences, "prompt_lengths": prompts, "micro_batch": micro_batch}
        yield f"micro-batches of {micro_batch}", inputs, {"loss": loss, "table": rows.grad}


# ------------------------------------------------------------------------------------------- files


WRITERS = (
    select_experts, count_experts, init_A, route, linear, expert, moe_layer, merge, kept_entries, dr_lora_observe,
    dr_lora_grow, batch_loss, packed_deltas, gsm8k_verdict, pass_at_k, refuses,
)  # fmt: skip


def cases(writer) -> list[dict]:
    return [{"name": name, "inputs": inputs, "outputs": lists(outputs)} for name, inputs, outputs in writer()]


def content(writer) -> str:
    """The file of one function: its source, then a case a line."""
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases(writer))
    source = json.dumps(" ".join(writer.__doc__.split()))
    return f'{{"function": "{writer.__name__}", "source": {source}, "cases": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    for writer in WRITERS:
        (HERE / f"{writer.__name__}.json").write_text(content(writer))
