"""Solutions of the exercises in skeleton.py: `python tests/vectors/check.py --module examples/exercises/solutions.py`.

All arrays are NumPy's. T tokens, B sequences, S positions, L layers, E experts per layer, K experts per token,
D hidden_size, F intermediate_size of an expert, n hot experts, r rank, V vocabulary.
"""

import numpy as np


def route(router_logits, top_k, norm_topk_prob):
    """1. The K experts of every token, and their weights."""
    p = np.exp(router_logits - router_logits.max(axis=1, keepdims=True))  # [T, E]
    p = p / p.sum(axis=1, keepdims=True)
    selected = np.argsort(-p, axis=1, kind="stable")[:, :top_k]  # [T, K]
    weights = np.take_along_axis(p, selected, axis=1)  # [T, K]
    if norm_topk_prob:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return {"selected_experts": selected, "weights": weights}


def count_experts(selected_experts, lengths, num_experts):
    """2. c[l, e]: how many tokens choose expert e in layer l."""
    real = np.arange(selected_experts.shape[2]) < lengths[:, None]  # [B, S]
    return np.array([np.bincount(layer[real].ravel(), minlength=num_experts) for layer in selected_experts])


def select_experts(scores, num_hot):
    """3. The num_hot experts of every layer with the largest scores. Of equal scores the lower id comes first."""
    order = np.argsort(-scores, axis=1, kind="stable")  # [L, E]
    hot = np.zeros(scores.shape, dtype=bool)
    for layer, ids in enumerate(order):
        hot[layer, ids[:num_hot]] = True
    return hot


def linear(x, W, factors, alpha):
    """4. LoRA: y = W x + (alpha / r) B A x. W is frozen; A and B would train."""
    scale = alpha / len(factors["A"])
    return {"y": x @ W.T + scale * (x @ factors["A"].T @ factors["B"].T)}


def swiglu(x, W):
    """An expert: down(silu(gate x) * up x), silu(z) = z / (1 + exp(-z)).  [rows, D] -> [rows, D]"""
    gate, up = x @ W["gate_proj"].T, x @ W["up_proj"].T  # [rows, F]
    return (gate / (1 + np.exp(-gate)) * up) @ W["down_proj"].T


def moe_layer(x, router, W, hot, factors, alpha, top_k, norm_topk_prob):
    """5. Dispatch and combine: send each token to its K experts, and add up what they return, times their weights."""
    logits = linear(x, router, factors["router"], alpha)["y"]  # [T, E]
    routing = route(logits, top_k, norm_topk_prob)
    selected, weights = routing["selected_experts"], routing["weights"]  # [T, K]
    y = np.zeros_like(x)
    for e in range(len(router)):
        matrices = {name: stack[e] for name, stack in W.items()}
        for i in np.flatnonzero(hot == e):  # once if the expert is hot, else never
            for name in W:
                pair = {"A": factors[name]["A"][i], "B": factors[name]["B"][i]}
                matrices[name] = merge(matrices[name], pair, alpha)
        token, place = np.nonzero(selected == e)  # the tokens that chose e, and where it stands among their K
        y[token] += weights[token, place, None] * swiglu(x[token], matrices)
    return {"y": y, "selected_experts": selected}


def batch_loss(table, sequences, prompt_lengths, micro_batch):
    """6. The loss of a global batch that is computed in micro-batches of `micro_batch` sequences."""
    log_p = table - np.log(np.exp(table).sum(axis=1, keepdims=True))  # [V, V]
    targets = sum(len(ids) - n for ids, n in zip(sequences, prompt_lengths, strict=True))
    loss = 0.0
    for start in range(0, len(sequences), micro_batch):
        part = slice(start, start + micro_batch)
        for ids, n in zip(sequences[part], prompt_lengths[part], strict=True):
            loss += -log_p[ids[n - 1 : -1], ids[n:]].sum() / targets  # gradients add up like this sum
    return {"loss": loss}


def kept_entries(matrices, share):
    """7. LoRI's mask: which entries of all B train. They are the floor(share * N) largest of all N by magnitude."""
    names = sorted(matrices)
    magnitudes = np.concatenate([np.abs(matrices[name]).ravel() for name in names])  # [N]
    is_kept = np.zeros(len(magnitudes), dtype=bool)
    is_kept[np.argsort(-magnitudes, kind="stable")[: int(share * len(magnitudes))]] = True
    ends = np.cumsum([matrices[name].size for name in names])
    return {name: np.flatnonzero(part) for name, part in zip(names, np.split(is_kept, ends[:-1]), strict=True)}


def merge(W, factors, alpha):
    """8. The weight that computes without an adapter what W computes with it."""
    return W + alpha / len(factors["A"]) * factors["B"] @ factors["A"]
