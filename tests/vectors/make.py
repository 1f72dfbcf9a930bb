"""Write the test vectors beside this file: `python tests/vectors/make.py`.

Nothing here imports the code under test. Every expected output comes from a formula that is written out on single
numbers, in plain Python and float64. Gradients come from differentiate.py, which applies the chain rule to each
operation. A formula therefore stands here once, as its source writes it, and no backward pass is derived by hand. The
docstring of each writer names its source. Inputs are short decimals. Outputs have the digits that identify a float64.

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

from differentiate import Number, backward, constant, each, exp, flat, gradients, log, values
from make_scoring import gsm8k_verdict, pass_at_k, refuses

HERE = Path(__file__).parent


def draw(rng: random.Random, *shape: int, scale: float = 1.0):
    """Nested lists of decimals with three places, uniform in +-scale."""
    if not shape:
        return round(rng.uniform(-scale, scale), 3)
    return [draw(rng, *shape[1:], scale=scale) for _ in range(shape[0])]


# ------------------------------------------------------------------------------------------- which experts


def by_score(scores: list, hottest_first: bool = True) -> list[int]:
    """Ids by score; of equal scores the lower id comes first."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e] if hottest_first else scores[e], e))


def chosen(policy: str, scores: list, num_hot: int | None, coverage: float | None, seed: int) -> list[list[bool]]:
    """bool [L][E], in exact arithmetic."""
    L, E = len(scores), len(scores[0])
    exact = each(lambda x: Fraction(str(x)), scores)
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


def seed_words(entropy: list[int]) -> list[int]:
    """Eight 32-bit words of numpy's SeedSequence (O'Neill's seed_seq_fe, pool of four words)."""
    mask = 2**32 - 1
    factor = 0x43B0D7E5

    def hashed(value: int, multiplier: int) -> int:
        nonlocal factor
        value ^= factor
        factor = factor * multiplier & mask
        value = value * factor & mask
        return value ^ value >> 16

    def mixed(x: int, y: int) -> int:
        value = (0xCA01F9DD * x - 0x4973F715 * y) & mask
        return value ^ value >> 16

    pool = [hashed(word, 0x931E8875) for word in (entropy + [0] * 4)[:4]]
    for source in range(4):
        for target in range(4):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source], 0x931E8875))
    factor = 0x8B51F9DD
    return [hashed(pool[i % 4], 0x58F38DED) for i in range(8)]


def uniform(seed: int, name: str, size: int) -> list[float]:
    """(w >> 40) / 2^24 for the words w of PCG64 (O'Neill 2014, XSL-RR 128/64), seeded by [seed, crc32(name)]."""
    words = seed_words([seed, zlib.crc32(name.encode())])
    state, stream = ((words[i] | words[i + 1] << 32) << 64 | words[i + 2] | words[i + 3] << 32 for i in (0, 4))
    multiplier, mask, increment = 0x2360ED051FC65DA44385DF649FCCF645, 2**128 - 1, (stream << 1 | 1) & (2**128 - 1)
    state = ((increment + state) * multiplier + increment) & mask
    found = []
    for _ in range(size):
        state = (state * multiplier + increment) & mask
        low, turn = (state >> 64 ^ state) & (2**64 - 1), state >> 122
        word = (low >> turn | low << (-turn % 64)) & (2**64 - 1)
        found.append((word >> 40) / 2**24)
    return found


def init_A() -> Iterator[tuple]:
    """U(-1 / sqrt(in), 1 / sqrt(in)): Kaiming uniform with a = sqrt(5), as PEFT and LoRI initialise A."""
    for seed, name, r, fan_in in ((0, "layers.0.mlp.gate", 2, 7), (5, "layers.1.mlp.experts.3.up_proj", 3, 5)):
        u = uniform(seed, name, r * fan_in)
        A = [[(2 * u[k * fan_in + j] - 1) / math.sqrt(fan_in) for j in range(fan_in)] for k in range(r)]
        yield f"seed {seed}", {"seed": seed, "name": name, "r": r, "fan_in": fan_in}, A


# ------------------------------------------------------------------------------------------- factor pairs, experts


def adapted(kind: str, W: list, factors: dict, alpha: float) -> list:
    """The weight that a pair makes of W.  [out, in]

    W + (alpha / r) B A (LoRA, section 4.1; HELLoRA, eq. 3). LoRI: B is zero but for the entries kept (section 3.2).
    DoRA: m (W + (alpha / r) B A) / |.| with a norm per row (eq. 5) that is a constant for the gradient (section 4.3).
    """
    A, B, r = factors["A"], factors["B"], len(factors["A"])
    if kind == "lori":
        kept = dict(zip(factors["positions"], B, strict=True))
        B = [[kept.get(i * r + k, constant(0)) for k in range(r)] for i in range(len(W))]
    merged = [
        [W[i][j] + alpha / r * sum(B[i][k] * A[k][j] for k in range(r)) for j in range(len(W[0]))]
        for i in range(len(W))
    ]
    if kind == "dora":
        norms = [math.sqrt(sum(entry.value**2 for entry in row)) for row in merged]
        merged = [[m * entry / norm for entry in row] for m, row, norm in zip(factors["m"], merged, norms, strict=True)]
    return merged


def product(W: list, x: list) -> list:
    return [sum(w * x_j for w, x_j in zip(row, x, strict=True)) for row in W]


def swiglu(W: dict, x: list) -> list:
    """down(silu(gate x) * up x) (Shazeer 2020), silu(z) = z / (1 + exp(-z))."""
    gate, up = product(W["gate_proj"], x), product(W["up_proj"], x)
    return product(W["down_proj"], [g / (1 + exp(-g)) * u for g, u in zip(gate, up, strict=True)])


def draw_pair(rng: random.Random, kind: str, W: list, r: int) -> dict:
    pair = {"A": draw(rng, r, len(W[0])), "B": draw(rng, len(W), r, scale=0.5)}
    if kind == "dora":
        pair["m"] = [round(math.sqrt(sum(w * w for w in row)) + draw(rng, scale=0.2), 3) for row in W]
    if kind == "lori":
        pair["positions"] = sorted(rng.sample(range(len(W) * r), 4))
        pair["B"] = draw(rng, 4)
    return pair


def numbers(factors: dict) -> dict:
    """The factors as Numbers. Positions are none."""
    if "A" not in factors:
        return {name: numbers(pair) for name, pair in factors.items()}
    return {name: part if name == "positions" else each(constant, part) for name, part in factors.items()}


def trained(kind: str, factors: dict) -> dict:
    """Gradients of what trains in a pair, or in the pairs of several matrices."""
    if "A" not in factors:
        return {name: trained(kind, pair) for name, pair in factors.items()}
    names = {"lora": ("A", "B"), "dora": ("A", "B", "m"), "lori": ("B",)}[kind]
    return {name: gradients(factors[name]) for name in names}


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
        x, pair = each(constant, inputs["x"]), numbers(factors)
        merged = adapted(kind, each(constant, W), pair, 7.0)
        y = [[z + b for z, b in zip(product(merged, row), bias or [0] * 5, strict=True)] for row in x]
        backward(y, inputs["grad_y"])
        outputs = {"y": values(y), "x": gradients(x), "factors": trained(kind, pair)}
        yield f"{kind}{', bias' if with_bias else ''}", inputs, outputs


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
        x, pairs = each(constant, inputs["x"]), numbers(factors)
        merged = {name: adapted(kind, each(constant, matrix), pairs[name], 7.0) for name, matrix in W.items()}
        y = [swiglu(merged, row) for row in x]
        backward(y, inputs["grad_y"])
        yield kind, inputs, {"y": values(y), "x": gradients(x), "factors": trained(kind, pairs)}


# ------------------------------------------------------------------------------------------- routing, the layer


def softmax(z: list[Number]) -> list[Number]:
    powers = [exp(each_z) for each_z in z]
    total = sum(powers)
    return [power / total for power in powers]


def routed(logits: list[Number], K: int, renormalise: bool) -> tuple[list[int], list[Number]]:
    """Softmax over all experts, the K largest, divided by their sum if the config says norm_topk_prob."""
    order = by_score([z.value for z in logits])
    gaps = [logits[a].value - logits[b].value for a, b in zip(order[:K], order[1:], strict=False)]
    assert min(gaps) > 0.01, gaps  # no near tie: float32 must choose the same experts
    p, ids = softmax(logits), order[:K]
    total = sum(p[e] for e in ids) if renormalise else 1.0
    return ids, [p[e] / total for e in ids]


def route() -> Iterator[tuple]:
    """Softmax over all experts, then the K largest. With norm_topk_prob (Mixtral) they are divided by their sum.

    topk_before_softmax (GraniteMoE): the K largest logits, then softmax over them.
    """
    logits = draw(random.Random("route"), 5, 7, scale=3.0)
    wide = [[round(20 * z, 2) for z in row] for row in logits]
    for renormalise in (False, True):
        for name, rows in (("", logits), (", large logits", wide)):
            found = [routed([constant(z) for z in row], 3, renormalise) for row in rows]
            inputs = {"router_logits": rows, "top_k": 3, "norm_topk_prob": renormalise, "topk_before_softmax": False}
            outputs = {"selected_experts": [ids for ids, _ in found], "weights": [values(w) for _, w in found]}
            yield f"{'' if renormalise else 'not '}renormalised{name}", inputs, outputs
    # The softmax over all experts is 0 for all but one of them in float32.
    rows = [[-60.0, -75.5, -50.25, -40.5, -80.0, 71.0, -65.25]]
    ids = by_score(rows[0])[:3]
    weights = values(softmax([constant(rows[0][e]) for e in ids]))
    inputs = {"router_logits": rows, "top_k": 3, "norm_topk_prob": False, "topk_before_softmax": True}
    yield "top-k before softmax", inputs, {"selected_experts": [ids], "weights": [weights]}


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
        merged = adapted("lora", each(constant, W), numbers(factors), alpha)
        yield f"alpha {alpha:g}", {"W": W, "factors": factors, "alpha": alpha}, values(merged)


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
    factors = {key: {part: [pair[part] for pair in found] for part in "AB"} for key, found in pairs.items()}
    factors["router"] = draw_pair(rng, "lora", router, r)
    inputs = {"x": draw(rng, T, D), "router": router, "W": W, "hot": hot, "factors": factors, "alpha": alpha}
    inputs |= {"top_k": K, "norm_topk_prob": renormalise, "grad_y": draw(rng, T, D)}

    x, of = each(constant, inputs["x"]), numbers(factors)
    gate = adapted("lora", each(constant, router), of["router"], alpha)
    experts = []
    for e in range(E):
        weights = {key: each(constant, stack[e]) for key, stack in W.items()}
        if e in hot:
            i = hot.index(e)
            own = {key: {part: of[key][part][i] for part in "AB"} for key in W}
            weights = {key: adapted("lora", weights[key], own[key], alpha) for key in W}
        experts.append(weights)
    y, selected = [], []
    for row in x:
        ids, weights = routed(product(gate, row), K, renormalise)
        outs = [[w * z for z in swiglu(experts[e], row)] for e, w in zip(ids, weights, strict=True)]
        y.append([sum(column) for column in zip(*outs, strict=True)])
        selected.append(ids)
    used = set(flat(selected))
    assert set(hot) - used and (used - set(hot)), (name, used)
    backward(y, inputs["grad_y"])
    outputs = {"y": values(y), "selected_experts": selected, "x": gradients(x), "factors": gradients(of)}
    return name, inputs, outputs


# ------------------------------------------------------------------------------------------- LoRI's entries


def kept_entries() -> Iterator[tuple]:
    """LoRI, section 3.2: one threshold for all matrices together. Ties, which are ours: by name, then by position."""
    rng = random.Random("kept")
    names = ["layers.2.mlp.gate", "layers.10.mlp.gate", "layers.2.mlp.experts.lora.up_proj"]
    shapes = [(4, 3), (5, 3), (2, 5, 2)]
    B = dict(zip(names, (draw(rng, *shape) for shape in shapes), strict=True))
    tied = each(lambda value: math.copysign(1 + round(abs(value)), value) / 2, B)
    for name, matrices, share in (("distinct", B, 0.1), ("tied", tied, 0.2)):
        entries = [(-abs(b), key, i) for key in sorted(matrices) for i, b in enumerate(flat(matrices[key]))]
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
    usage = [0.9 * u + c for u, c in zip(inputs["usage"], inputs["counts"], strict=True)]
    new = [
        sum(abs(sum(b[j] * g[j] for b, g in zip(stack[e], grads[e], strict=True)))
            for stack, grads in zip(B, grad_B, strict=True) for j in range(r_max)) / len(B)
        for e in range(E)
    ]  # fmt: skip
    score = [0.9 * old + 0.1 * s for old, s in zip(inputs["score"], new, strict=True)]
    g = [s / R for s, R in zip(score, ranks, strict=True)]
    saliency = [(usage[e] / sum(usage) + 1e-6) * (g[e] / sum(g) + 1e-6) / (ranks[e] + 1) ** 1.2 for e in range(E)]
    masked = [[[[v if j < ranks[e] else 0.0 for j, v in enumerate(row)] for row in one] for e, one in enumerate(stack)]
              for stack in grad_B]  # fmt: skip
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
    for micro_batch in (1, 2, 5):
        rows = each(constant, table)
        losses = [
            [-log(softmax(rows[before])[after]) for before, after in zip(ids[p - 1 :], ids[p:], strict=False)]
            for ids, p in zip(sequences, prompts, strict=True)
        ]
        loss = sum(flat(losses)) / len(flat(losses))
        backward([loss], [1.0])
        inputs = {"table": table, "sequences": sequences, "prompt_lengths": prompts, "micro_batch": micro_batch}
        yield f"micro-batches of {micro_batch}", inputs, {"loss": loss.value, "table": gradients(rows)}


# ------------------------------------------------------------------------------------------- files


WRITERS = (
    select_experts, count_experts, init_A, route, linear, expert, moe_layer, merge, kept_entries, dr_lora_observe,
    dr_lora_grow, batch_loss, gsm8k_verdict, pass_at_k, refuses,
)  # fmt: skip


def cases(writer) -> list[dict]:
    return [dict(zip(("name", "inputs", "outputs"), found, strict=True)) for found in writer()]


def content(writer) -> str:
    """The file of one function: its source, then a case a line."""
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases(writer))
    source = json.dumps(" ".join(writer.__doc__.split()))
    return f'{{"function": "{writer.__name__}", "source": {source}, "cases": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    for writer in WRITERS:
        (HERE / f"{writer.__name__}.json").write_text(content(writer))
