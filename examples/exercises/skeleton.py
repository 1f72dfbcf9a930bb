"""Eight exercises: write HELLoRA's parts yourself. Replace each `...`, and check as often as you like:

    python tests/vectors/check.py --module examples/exercises/skeleton.py

The check says which functions are right. For a wrong one it names the cases, and the usual mistake that gives the same
result. The solutions are in solutions.py. examples/minimal.py shows where each part stands in the method.

All arrays are NumPy's. T tokens, B sequences, S positions, L layers, E experts per layer, K experts per token,
D hidden_size, F intermediate_size of an expert, n hot experts, r rank, V vocabulary.
"""

import numpy as np


def route(router_logits, top_k, norm_topk_prob):
    """1. The K experts of every token, and their weights.

    p = softmax(router_logits) over all E experts. A token goes to the K experts with the largest p, and their weights
    are these p: divided by their sum if norm_topk_prob (Mixtral), as they are if not (OLMoE).

    router_logits [T, E] -> {"selected_experts": [T, K], "weights": [T, K]}, the largest weight first
    """
    ...


def count_experts(selected_experts, lengths, num_experts):
    """2. c[l, e]: how many tokens choose expert e in layer l.

    The first lengths[b] positions of sequence b are real tokens. What follows is padding and does not count.

    selected_experts [L, B, S, K], lengths [B] -> [L, E]
    """
    ...


def select_experts(scores, num_hot):
    """3. The num_hot experts of every layer with the largest scores. Of equal scores the lower id comes first.

    scores [L, E] -> bool [L, E]
    """
    ...


def linear(x, W, factors, alpha):
    """4. LoRA: y = W x + (alpha / r) B A x. W is frozen; A and B would train.

    x [T, in], W [out, in], factors {"A": [r, in], "B": [out, r]} -> {"y": [T, out]}
    """
    ...


def swiglu(x, W):
    """An expert: down(silu(gate x) * up x), silu(z) = z / (1 + exp(-z)).  [rows, D] -> [rows, D]

    This one is given, for the next exercise.
    """
    gate, up = x @ W["gate_proj"].T, x @ W["up_proj"].T  # [rows, F]
    return (gate / (1 + np.exp(-gate)) * up) @ W["down_proj"].T


def moe_layer(x, router, W, hot, factors, alpha, top_k, norm_topk_prob):
    """5. Dispatch and combine: send each token to its K experts, and add up what they return, times their weights.

    The router has the pair factors["router"]: its logits are those of exercise 4. W holds three stacks, "gate_proj" and
    "up_proj" [E, F, D], "down_proj" [E, D, F]. Expert hot[i] has the pairs factors[name]["A"][i] and ["B"][i] on its
    three matrices; the scale alpha / r is the same everywhere.

    x [T, D], router [E, D], hot [n] -> {"y": [T, D], "selected_experts": [T, K]}
    """
    ...


def batch_loss(table, sequences, prompt_lengths, micro_batch):
    """6. The loss of a global batch that is computed in micro-batches of `micro_batch` sequences.

    It is the mean of -log softmax(logits)[next token] over all target tokens of the batch: those behind the prompt of
    their sequence. The model is a table: table[a] [V] holds the logits of the token that follows token a. The result
    must not depend on micro_batch.

    table [V, V], sequences: lists of token ids, prompt_lengths: one per sequence -> {"loss": number}
    """
    ...


def kept_entries(matrices, share):
    """7. LoRI's mask: which entries of all B train. They are the floor(share * N) largest of all N by magnitude.

    One threshold holds for all matrices together. Of equal entries the one in the matrix whose name sorts first is
    kept, within a matrix the one at the earlier position.

    matrices: name -> B -> name -> positions in the flat B, rising (an array, empty if nothing of this matrix is kept)
    """
    ...


def merge(W, factors, alpha):
    """8. The weight that computes without an adapter what W computes with it.

    W [out, in], factors {"A": [r, in], "B": [out, r]} -> [out, in]
    """
    ...
