"""This repository's functions under the names and signatures that check.py asks a port for."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

import data
import hellora
import lori
import model as transformer
import profile
from hellora import KINDS
from hub.config import FAMILIES
from hub.peft import Layout, unstack
from lora import init_A as fill_A
from machine.processes import Processes
from neighbours.drlora import RankGrowth
from scoring import gsm8k, refusals
from scoring.statistics import pass_at_k  # noqa: F401
from training_step import batch_gradients, tally


def tensor(array: np.ndarray, requires_grad: bool = False) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).requires_grad_(requires_grad)


# ------------------------------------------------------------------------------------------- the method


def select_experts(policy, scores, num_hot, coverage, seed):
    return hellora.select_experts(policy, tensor(scores), num_hot, coverage=coverage, seed=seed).numpy()


def init_A(seed, name, r, fan_in):
    A = torch.empty(r, fan_in)
    fill_A(A, seed, name)
    return A.numpy()


def route(router_logits, top_k, norm_topk_prob, topk_before_softmax):
    numbers = config(router_logits.shape[-1], 2, 2, top_k, norm_topk_prob)
    numbers = replace(numbers, topk_before_softmax=topk_before_softmax)
    selected_experts, routing = transformer.route(tensor(router_logits).float(), numbers)
    return {"selected_experts": selected_experts.numpy(), "weights": routing.weights.numpy()}


def count_experts(selected_experts, lengths, num_experts):
    real = torch.arange(selected_experts.shape[2]) < tensor(lengths)[:, None]  # [B, S]
    chosen = tensor(selected_experts)[:, real]  # [L, T, K]
    return tally(chosen, torch.ones(chosen.shape), num_experts)[0].numpy().astype(np.int64)


def merge(W, factors, alpha):
    pair = KINDS["lora"][0](nn.Linear(*reversed(W.shape), bias=False), len(factors["A"]), alpha)
    pair.weight.data = tensor(W)
    fill("lora", {"only": pair}, {"only": factors})
    return pair.merged().detach().numpy()


def kept_entries(matrices, share):
    kept = lori.top_entries({f"{name}.lora_B": tensor(B) for name, B in matrices.items()}, share)
    return {name: positions.numpy() for name, positions in kept.items()}


# ------------------------------------------------------------------------------------------- PEFT's files


def packed_deltas(lora_A, lora_B, num_experts, alpha, before_peft_0_19):
    pair, stack = {"lora_A": tensor(lora_A), "lora_B": tensor(lora_B)}, "model.layers.0.mlp.experts"
    fan_in, fan_out = (len(lora_B), lora_A.shape[1]) if before_peft_0_19 else (lora_A.shape[1], len(lora_B))
    shapes, layout = {f"{stack}.0.gate_proj": (fan_in, fan_out)}, Layout(False, before_peft_0_19)  # it is down's
    _, pairs = unstack(stack, pair, FAMILIES["olmoe"], list(range(num_experts)), layout, shapes)
    deltas = [alpha / len(pair["lora_A"]) * pair["lora_B"] @ pair["lora_A"] for pair in pairs.values()]
    return torch.stack(deltas).numpy()


# ------------------------------------------------------------------------------------------- adapters


def parameters(kind: str, pair: nn.Module) -> dict[str, Tensor]:
    """What a pair holds, by the names of the vectors."""
    B = pair.parametrizations.lora_B.original if kind == "lori" else pair.lora_B
    return {"A": pair.lora_A, "B": B} | ({"m": pair.lora_m} if kind == "dora" else {})


@torch.no_grad()
def fill(kind: str, pairs: dict[str, nn.Module], factors: dict[str, dict]) -> None:
    """Put the factors of the vectors into the pairs of the same names."""
    if kind == "lori":
        lori.sparsify(nn.ModuleDict(pairs), {name: tensor(one["positions"]) for name, one in factors.items()})
    for name, pair in pairs.items():
        for part, parameter in parameters(kind, pair).items():
            parameter.copy_(tensor(factors[name][part]).view_as(parameter))
        pair.lora_A.requires_grad_(kind != "lori")


def results(kind: str, pairs: dict[str, nn.Module], factors: dict[str, dict], y: Tensor, x: Tensor, grad_y) -> dict:
    """y, and the gradients of x and of all factors."""
    y.backward(tensor(grad_y))
    gradients = {
        name: {
            part: parameter.grad.view(factors[name][part].shape).numpy()
            for part, parameter in parameters(kind, pair).items()
            if parameter.requires_grad
        }
        for name, pair in pairs.items()
    }
    return {"y": y.detach().numpy(), "x": x.grad.numpy(), "factors": gradients}


def linear(kind, x, W, bias, factors, alpha, grad_y):
    base = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
    base.weight.data = tensor(W)
    if bias is not None:
        base.bias.data = tensor(bias)
    base.requires_grad_(False)
    pairs = {"only": KINDS[kind][0](base, len(factors["A"]), alpha).double()}
    fill(kind, pairs, {"only": factors})
    x = tensor(x, True)
    found = results(kind, pairs, {"only": factors}, pairs["only"](x), x, grad_y)
    return found | {"factors": found["factors"]["only"]}


def config(E: int, F: int, D: int, top_k: int = 1, norm_topk_prob: bool = False) -> transformer.MoEConfig:
    """One OLMoE layer."""
    sizes = {"num_experts": E, "intermediate_size": F, "hidden_size": D, "num_experts_per_tok": top_k, "head_dim": 2}
    rest = {"vocab_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "norm_topk_prob": norm_topk_prob}
    return transformer.MoEConfig.from_dict({"model_type": "olmoe", **sizes, **rest})


def fill_experts(experts: transformer.Experts, W: dict[str, np.ndarray]) -> None:
    """Put stacks [E, F, D], [E, F, D] and [E, D, F] into experts that stand in their order."""
    experts.gate_up_proj.data = torch.cat((tensor(W["gate_proj"]), tensor(W["up_proj"])), dim=1)
    experts.down_proj.data = tensor(W["down_proj"])
    experts.requires_grad_(False)


def expert(kind, x, W, factors, alpha, grad_y):
    F, D = W["gate_proj"].shape
    base = transformer.Experts(config(1, F, D))
    fill_experts(base, {name: stack[None] for name, stack in W.items()})
    experts = KINDS[kind][1](base, 1, len(factors["gate_proj"]["A"]), alpha).double()
    pairs = dict(experts.lora.items())
    fill(kind, pairs, factors)
    T, x = len(x), tensor(x, True)
    y = experts(x, torch.arange(T), torch.ones(T, 1, dtype=x.dtype), torch.tensor([T], dtype=torch.int32))
    return results(kind, pairs, factors, y, x, grad_y)


def moe_layer(x, router, W, hot, factors, alpha, top_k, norm_topk_prob, grad_y):
    E, F, D = W["gate_proj"].shape
    model = transformer.MoETransformer(config(E, F, D, top_k, norm_topk_prob))
    layer = model.layers[0].mlp
    layer.gate.weight.data = tensor(router)
    fill_experts(layer.experts, W)
    chosen = torch.zeros(1, E, dtype=torch.bool)
    chosen[0, tensor(hot)] = True
    hellora.attach(model, chosen, len(factors["router"]["A"]), alpha, targets="gate")
    layer.double()
    pairs = dict(layer.experts.lora.items()) | {"router": layer.gate}
    fill("lora", pairs, factors)
    x = tensor(x, True)
    y, selected_experts, _ = layer(x)
    return results("lora", pairs, factors, y, x, grad_y) | {"selected_experts": selected_experts.numpy()}


# ------------------------------------------------------------------------------------------- DR-LoRA


def rank_growth(ranks, r_max: int, B: list[Tensor]) -> RankGrowth:
    """The state of one layer with the ranks given, in a run of two steps, of which both grow."""
    pairs = {str(i): SimpleNamespace(lora_B=stack) for i, stack in enumerate(B)}
    layers = [SimpleNamespace(mlp=SimpleNamespace(experts=SimpleNamespace(lora=pairs)))]
    adapter = hellora.Adapter("lora", r=r_max // 2, alpha=1.0, targets="all", seed=0, hot=[list(range(len(ranks)))])
    model = SimpleNamespace(layers=layers, config=SimpleNamespace(moe_layers=range(1)), adapter=adapter)
    growth = RankGrowth(model, r_max // 2, 2)
    growth.history = [(0, tensor(ranks)[None])]
    growth.set_masks()
    return growth


def dr_lora_observe(usage, score, ranks, counts, B, grad_B):
    stacks = [tensor(stack, True) for stack in B]
    for stack, gradient in zip(stacks, grad_B, strict=True):
        stack.grad = tensor(gradient)
    growth = rank_growth(ranks, B[0].shape[-1], stacks)
    growth.usage, growth.score = tensor(usage)[None], tensor(score)[None]
    growth.observe(tensor(counts)[None])
    found = {"usage": growth.usage, "score": growth.score, "saliency": growth.saliency()}
    return {name: row[0].numpy() for name, row in found.items()} | {"grad_B": [stack.grad.numpy() for stack in stacks]}


def dr_lora_grow(saliency, ranks, quota, cap, budget, r_max):
    growth = rank_growth(ranks, r_max, [torch.zeros(len(ranks), 1, r_max)])
    growth.quota, growth.cap, growth.budget = quota, cap, budget
    growth.saliency = lambda: tensor(saliency)[None]
    growth.grow(growth.steps[0])
    return growth.ranks()[0].numpy()


# ------------------------------------------------------------------------------------------- loss and scores


class TableModel(nn.Module):
    """Stands for the transformer in `batch_gradients`: the logits of the next token are a row of a table."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(*table.shape, _weight=tensor(table))
        self.config = SimpleNamespace(moe_layers=range(1), num_experts=1, pad_token_id=0)

    def forward(self, ids, lengths, *, labels, output_routing):
        B, S = ids.shape
        wanted = labels != -100
        x, W = self.embed_tokens(ids[wanted]), torch.eye(len(self.embed_tokens.weight), dtype=torch.float64)
        nll = transformer.target_loss(x, W, labels[wanted])
        real = torch.arange(S) < lengths[:, None]
        selected = torch.zeros(1, B, S, 1, dtype=torch.int64).masked_fill(~real[None, ..., None], -1)
        ones = torch.ones(1, int(lengths.sum()), 1)
        return nll, selected, transformer.Routing(ones, ones, ones)


def batch_loss(table, sequences, prompt_lengths, micro_batch):
    model = TableModel(table)
    items = [
        data.Encoded(ids.tolist(), ((int(p), len(ids)),)) for ids, p in zip(sequences, prompt_lengths, strict=True)
    ]
    step = batch_gradients(model, items, micro_batch, Processes(0, 1, torch.device("cpu")))
    return {"loss": float(step.loss), "table": model.embed_tokens.weight.grad.numpy()}


def gsm8k_verdict(rule, completion, answer):
    found, correct = gsm8k.verdict(rule, completion, f"#### {answer}")
    return {"found": found, "correct": correct}


def refuses(rule, completion, as_published):
    return (refusals.phrase_found if as_published else refusals.refusal)(rule, completion) is not None


# ------------------------------------------------------------------------------------------- the whole model


@torch.no_grad()
def forward(folder, input_ids, lengths, change=lambda model: None):
    """change: makes a mistake in the model (mistakes.py)."""
    model, layers = transformer.load_model(folder), []
    change(model)
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: layers.append(args[0]))
        layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: layers.append(args[0]))
    model.norm.register_forward_pre_hook(lambda module, args: layers.append(args[0]))
    logits, selected_experts, routing = model(tensor(input_ids), tensor(lengths), output_routing=True)
    real = torch.arange(input_ids.shape[1]) < tensor(lengths)[:, None]

    def padded(x: Tensor) -> np.ndarray:  # [..., T, n] -> [..., B, S, n]
        whole = x.new_zeros(*x.shape[:-2], *real.shape, x.shape[-1])
        whole[..., real, :] = x
        return whole.numpy()

    return {
        "hidden_states": np.stack([padded(x) for x in layers[::2]]),
        "after_attention": np.stack([padded(x) for x in layers[1::2]]),
        "selected_experts": selected_experts.numpy(),
        "weights": padded(routing.weights),
        "logits": logits.numpy(),
    }


def counts(folder, input_ids, lengths):
    batch = data.Batch(tensor(input_ids), tensor(lengths), torch.full(input_ids.shape, -100))
    return profile.count_experts(transformer.load_model(folder), [batch]).numpy()


def adapted_model(folder, factors, alpha) -> transformer.MoETransformer:
    """The model with these factors attached."""
    model = transformer.load_model(folder)
    hot = torch.zeros(len(model.config.moe_layers), model.config.num_experts, dtype=torch.bool)
    for name in factors:
        _, layer, *_, e, _ = name.split(".")
        if e.isdigit():
            hot[int(layer), int(e)] = True
    hellora.attach(model, hot, len(next(iter(factors.values()))["A"]), alpha)
    with torch.no_grad():
        for name, pair in factors.items():
            for part, values in pair.items():
                parameter, place = factor(model, name, part)
                parameter[place] = tensor(values).to(parameter.dtype)
    return model


def factor(model: nn.Module, name: str, part: str) -> tuple[Tensor, int | slice]:
    """The parameter that holds A or B of a matrix, and its place there."""
    path, _, matrix = name.rpartition(".")
    experts, _, e = path.rpartition(".")
    if not e.isdigit() or not experts.endswith("experts"):
        return getattr(model.get_submodule(name), f"lora_{part}"), slice(None)
    stack = model.get_submodule(experts)
    return getattr(stack.lora[matrix], f"lora_{part}"), stack.expert_ids.index(int(e))


def train_step(folder, input_ids, lengths, prompt_lengths, factors, alpha, lr, weight_decay=0.0):
    model = adapted_model(folder, factors, alpha)
    rows = zip(input_ids.tolist(), lengths.tolist(), prompt_lengths.tolist(), strict=True)
    items = [data.Encoded(ids[:n], ((p, n),)) for ids, n, p in rows]
    step = batch_gradients(model, items, 1, Processes(0, 1, torch.device("cpu")))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay).step()
    named = {name: {part: factor(model, name, part) for part in "AB"} for name in factors}
    return {
        "loss": float(step.loss),
        "gradients": {n: {part: p.grad[i].numpy() for part, (p, i) in pair.items()} for n, pair in named.items()},
        "updated": {n: {part: p.detach()[i].numpy() for part, (p, i) in pair.items()} for n, pair in named.items()},
    }
