"""One mixture-of-experts layer with HELLoRA, forward and backward, in numpy: `python examples/numpy_moe.py`.

A token's output is the weighted sum of its K experts' outputs; an expert is down(silu(gate x) * up x). The matrices of
hot experts and the router have LoRA pairs, W x + s B A x with s = alpha / r. Only A [r, in] and B [out, r] train.
`one_by_one` is the definition. `sorted_rows` is how training computes it: one grouped product for all experts.

Dimensions: T tokens, D hidden_size, F intermediate_size, E experts, n of them hot, K experts per token, R = T * K rows.
"""

import numpy as np


def route(router_logits, top_k, norm_topk_prob, topk_before_softmax=False):
    """Softmax over all experts, then the K largest.  [T, E] -> experts [T, K], their weights [T, K], probs [T, E]"""
    probs = np.exp(router_logits - router_logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    selected = np.argsort(-router_logits, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(probs, selected, -1)
    if norm_topk_prob or topk_before_softmax:  # Mixtral; GraniteMoE: softmax over the K is the same. OLMoE: neither
        weights = weights / weights.sum(-1, keepdims=True)
    return {"selected_experts": selected, "weights": weights, "probs": probs}


def swiglu(x, weight, dy, W, times, backward):
    """weight * expert(x), then the gradients of weight, x and W. `times` and `backward` multiply by W.  x [R, D]"""
    gate, up, grads = times(x, W["gate_proj"]), times(x, W["up_proj"]), {}
    sigmoid = 1 / (1 + np.exp(-gate))
    hidden = gate * sigmoid * up
    y = times(hidden, W["down_proj"])
    d_hidden, grads["down_proj"] = backward(weight * dy, hidden, W["down_proj"])
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    dx_gate, grads["gate_proj"] = backward(d_gate, x, W["gate_proj"])
    dx_up, grads["up_proj"] = backward(d_hidden * gate * sigmoid, x, W["up_proj"])
    return weight * y, (y * dy).sum(-1), dx_gate + dx_up, grads


def one_by_one(x, weight, dy, chosen, W, hot, factors, s):
    """Add s B A to the weights, take one expert's rows after the other, and carry the gradient of W to A and B."""
    W, dW = {name: stack.copy() for name, stack in W.items()}, {name: np.empty_like(W[name]) for name in W}
    for name in W:
        W[name][hot] += s * factors[name]["B"] @ factors[name]["A"]
    y, d_weight, dx, grads = np.empty_like(x), np.empty(len(x)), np.empty_like(x), {}
    for e in range(len(W["gate_proj"])):  # also without rows: the gradient is then zero
        rows, W_e = chosen == e, {name: W[name][e] for name in W}
        found = swiglu(x[rows], weight[rows], dy[rows], W_e, lambda x, W: x @ W.T, lambda dy, x, W: (dy @ W, dy.T @ x))
        y[rows], d_weight[rows], dx[rows], dW_e = found
        for name in W:
            dW[name][e] = dW_e[name]
    for name in W:
        A, B = factors[name]["A"], factors[name]["B"]
        grads[name] = {"A": s * B.swapaxes(1, 2) @ dW[name][hot], "B": s * dW[name][hot] @ A.swapaxes(1, 2)}
    return y, d_weight, dx, grads


def grouped(x, W, ends):
    """W_g x for sorted rows; those of group g end at ends[g].  x [R, in], W [G, out, in] -> [R, out]"""
    return np.concatenate([rows @ W_g.T for rows, W_g in zip(np.split(x, ends[:-1]), W, strict=True)])


def grouped_outer(a, b, ends):
    """a_g^T b_g of the same groups.  a [R, p], b [R, q] -> [G, p, q]"""
    return np.stack([a_g.T @ b_g for a_g, b_g in zip(np.split(a, ends[:-1]), np.split(b, ends[:-1]), strict=True)])


def sorted_rows(x, weight, dy, chosen, W, hot, factors, s):
    """Sort the rows by expert, hot experts first. The pairs then work on one prefix, and B A is never formed."""
    ids = np.argsort(~np.isin(np.arange(len(W["gate_proj"])), hot), kind="stable")  # [E] hot first, each part by id
    place = np.argsort(ids)[chosen]  # [R] where in `ids` the expert of a row stands
    order = np.argsort(place, kind="stable")
    ends = np.searchsorted(place[order], np.arange(len(ids)), side="right")
    ends_hot, H = ends[: len(hot)], ends[len(hot) - 1]

    def times(x, of):
        W, A, B = of
        y = grouped(x, W, ends)
        y[:H] += s * grouped(grouped(x[:H], A, ends_hot), B, ends_hot)
        return y

    def backward(dy, x, of):
        W, A, B = of
        dx, low = grouped(dy, W.swapaxes(1, 2), ends), grouped(x[:H], A, ends_hot)  # low is A x [H, r]
        d_low = s * grouped(dy[:H], B.swapaxes(1, 2), ends_hot)
        dx[:H] += grouped(d_low, A.swapaxes(1, 2), ends_hot)
        return dx, {"A": grouped_outer(d_low, x[:H], ends_hot), "B": s * grouped_outer(dy[:H], low, ends_hot)}

    of = {name: (W[name][ids], factors[name]["A"], factors[name]["B"]) for name in W}
    *found, grads = swiglu(x[order], weight[order], dy[order], of, times, backward)
    return *(rows[np.argsort(order)] for rows in found), grads  # back to the order of the tokens


def moe_layer(x, router, W, hot, factors, alpha, top_k, norm_topk_prob, grad_y, experts=sorted_rows):
    """y [T, D], and the gradients of x and of all factors for grad_y [T, D], the gradient of y.  x [T, D]"""
    A, B, s = factors["router"]["A"], factors["router"]["B"], alpha / len(factors["router"]["A"])
    G = router + s * B @ A  # [E, D]
    selected, weights, probs = route(x @ G.T, top_k, norm_topk_prob).values()
    rows = np.repeat(x, top_k, 0), weights.reshape(-1, 1), np.repeat(grad_y, top_k, 0)  # [R, D], [R, 1], [R, D]
    *found, grads = experts(*rows, selected.ravel(), W, hot, factors, s)
    y, d_weights, dx = (each.reshape(*selected.shape, *each.shape[1:]) for each in found)  # [T, K, D], [T, K], as y
    if norm_topk_prob:
        total = np.take_along_axis(probs, selected, -1).sum(-1, keepdims=True)
        d_weights = (d_weights - (d_weights * weights).sum(-1, keepdims=True)) / total
    d_probs = (np.eye(len(G))[selected] * d_weights[..., None]).sum(1)  # [T, E] zero where an expert was not chosen
    d_logits = probs * (d_probs - (d_probs * probs).sum(-1, keepdims=True))  # [T, E]
    grads["router"] = {"A": s * B.T @ d_logits.T @ x, "B": s * d_logits.T @ x @ A.T}
    return {"y": y.sum(1), "selected_experts": selected, "x": dx.sum(1) + d_logits @ G, "factors": grads}


if __name__ == "__main__":
    draw, (T, D, F, E, K, r) = np.random.default_rng(0).normal, (50, 16, 12, 8, 2, 4)
    x, dy, router = draw(size=(T, D)), draw(size=(T, D)), draw(size=(E, D))
    W = {"gate_proj": draw(size=(E, F, D)), "up_proj": draw(size=(E, F, D)), "down_proj": draw(size=(E, D, F))}
    counts = np.bincount(route(x @ router.T, K, False)["selected_experts"].ravel(), minlength=E)
    hot = np.sort(np.argsort(-counts, kind="stable")[:3])  # the 3 most-used experts, ties to the lower id; rising ids
    factors = {n: {"A": draw(size=(3, r, w.shape[2])), "B": draw(size=(3, w.shape[1], r))} for n, w in W.items()}
    factors["router"] = {"A": draw(size=(r, D)), "B": draw(size=(E, r))}
    forms = [moe_layer(x, router, W, hot, factors, 8.0, K, True, dy, form) for form in (one_by_one, sorted_rows)]
    arrays = [[f["y"], f["x"], *(f["factors"][name][part] for name in factors for part in "AB")] for f in forms]
    off = max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(*arrays, strict=True))
    assert off < 1e-12, off
    print(f"Experts {hot} are hot. Both forms agree: y and {len(arrays[0]) - 1} gradients differ by {off:.0e} at most.")
