"""Write whole_model.json, the values of the model in tiny/: `python tests/vectors/make_whole_model.py`.

They come from transformers' OLMoE, and from LoRA, backward pass and AdamW as torch has them: W + (alpha / r) B A is
formed for every adapted matrix, and autograd does the rest. Nothing here imports the code under test.
"""

import json
import sys

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.func import functional_call
from transformers import OlmoeForCausalLM
from whole_model import FILE, FOLDER, describe_forward, describe_step, factors, padded

sys.path.append(str(FOLDER.parent))
from tiny import tasks  # noqa: E402

R, ALPHA, LR = 4, 6.0, 1e-3
NUM_HOT = 2


def ask(model: OlmoeForCausalLM, input_ids: np.ndarray, lengths: np.ndarray) -> dict:
    """All that `forward` of a port may return."""
    routed, residual, hooks = [], [], []
    for layer in model.model.layers:
        hooks.append(layer.mlp.gate.register_forward_hook(lambda module, args, out: routed.append(out)))
        norm = layer.post_attention_layernorm
        hooks.append(norm.register_forward_pre_hook(lambda module, args: residual.append(args[0])))
    ids, real = torch.from_numpy(input_ids), torch.arange(input_ids.shape[1]) < torch.from_numpy(lengths)[:, None]
    last = []
    hooks.append(model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0])))
    with torch.no_grad():
        out = model(ids, attention_mask=real.long(), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    _, weights, selected = (torch.stack(parts).unflatten(1, ids.shape) for parts in zip(*routed, strict=True))
    p = torch.stack([logits for logits, _, _ in routed]).softmax(-1).sort(descending=True).values  # [L, B * S, E]
    K = selected.shape[-1]
    gaps = (p[..., K - 1] - p[..., K]).unflatten(1, ids.shape)  # [L, B, S]
    return {
        "hidden_states": torch.stack([*out.hidden_states[:-1], last[0]]).numpy(),
        "after_attention": torch.stack(residual).numpy(),
        "selected_experts": selected.numpy(),
        "weights": weights.numpy(),
        "logits": out.logits.numpy(),
        "gap": float(gaps[:, real].min()),  # between the last expert that is chosen and the first that is not
    }


def rows_without_ties(model: OlmoeForCausalLM, split: str, n: int) -> list[tuple[list[int], list[int]]]:
    """Prompt and target of the first n rows of tiny-math for which any order of summation chooses the same experts."""
    tokenizer, kept = Tokenizer.from_file(str(FOLDER / "tokenizer.json")), []
    for row in tasks.math_rows(5 * n, split=split, seed=7):
        prompt, target = (tokenizer.encode(text).ids for text in (row["question"] + "\n", row["answer"]))
        input_ids, lengths, _ = padded([prompt + target])
        if ask(model, input_ids, lengths)["gap"] > 2e-6:
            kept.append((prompt, target))
    return kept[:n]


def counted(selected: np.ndarray, real: np.ndarray, E: int) -> np.ndarray:
    """[L, E], one token after the other."""
    counts = np.zeros((len(selected), E), dtype=np.int64)
    for layer, ids in enumerate(selected[:, real]):
        for e in ids.ravel():
            counts[layer, e] += 1
    return counts


def adapted(hot: list[list[int]]) -> list[str]:
    """The names of the matrices that get a pair."""
    names = []
    for i, ids in enumerate(hot):
        names += [f"layers.{i}.self_attn.{matrix}_proj" for matrix in "qkvo"] + [f"layers.{i}.mlp.gate"]
        names += [f"layers.{i}.mlp.experts.{e}.{matrix}_proj" for e in ids for matrix in ("gate", "up", "down")]
    return names


def matrix_of(weights: dict[str, torch.Tensor], name: str) -> tuple[str, tuple]:
    """Where transformers holds a matrix: the name of the parameter, and the part of it."""
    *path, e, matrix = name.split(".")
    if not e.isdigit() or "experts" not in path:
        return f"model.{name}.weight", (slice(None),)
    stack = f"model.{'.'.join(path)}.{'down_proj' if matrix == 'down_proj' else 'gate_up_proj'}"
    F = weights[stack].shape[1] // (1 if matrix == "down_proj" else 2)
    rows = {"gate_proj": slice(F), "up_proj": slice(F, None), "down_proj": slice(None)}[matrix]
    return stack, (int(e), rows)


def step(model: OlmoeForCausalLM, input_ids, lengths, prompt_lengths, pairs: dict) -> dict:
    """One step of AdamW on the pairs."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    trained = {
        name: {part: torch.tensor(array, dtype=torch.float32, requires_grad=True) for part, array in pair.items()}
        for name, pair in pairs.items()
    }
    merged = {name: weight.clone() for name, weight in weights.items()}
    for name, pair in trained.items():
        parameter, part = matrix_of(weights, name)
        merged[parameter][part] += ALPHA / R * pair["B"] @ pair["A"]
    ids = torch.from_numpy(input_ids)
    position = torch.arange(ids.shape[1])
    real = position < torch.from_numpy(lengths)[:, None]
    labels = ids.masked_fill(~real | (position < torch.from_numpy(prompt_lengths)[:, None]), -100)
    loss = functional_call(model, merged, (ids,), {"attention_mask": real.long(), "labels": labels}).loss
    optimizer = torch.optim.AdamW([p for pair in trained.values() for p in pair.values()], lr=LR, weight_decay=0.0)
    loss.backward()
    gradients = {n: {part: p.grad.numpy().copy() for part, p in pair.items()} for n, pair in trained.items()}
    optimizer.step()
    updated = {n: {part: p.detach().numpy() for part, p in pair.items()} for n, pair in trained.items()}
    return {"loss": loss.item(), "gradients": gradients, "updated": updated}


def rounded(value):
    """Seven digits, which float32 has."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def content() -> dict:
    torch.manual_seed(0)
    model = OlmoeForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()
    batch = rows_without_ties(model, "train", 2)
    sequences, prompt_lengths = [p + t for p, t in batch], [len(p) for p, _ in batch]
    input_ids, lengths, real = padded(sequences)
    result = ask(model, input_ids, lengths)
    E = model.config.num_experts
    used = counted(result["selected_experts"], real, E)

    count_sequences = [p + t for p, t in rows_without_ties(model, "test", 10)]
    ids, count_lengths, count_real = padded(count_sequences)
    counts = counted(ask(model, ids, count_lengths)["selected_experts"], count_real, E)
    order = np.argsort(-counts, axis=1, kind="stable")
    # The hottest experts, and the hottest of those that no token of the batch reaches: its gradient is zero.
    hot = []
    for ids, is_used in zip(order.tolist(), used > 0, strict=True):
        idle = next(e for e in ids if not is_used[e])
        hot.append(sorted({*ids[:NUM_HOT], idle}))

    weights = dict(model.named_parameters())
    shapes = {}
    for name in adapted(hot):
        parameter, part = matrix_of(weights, name)
        shapes[name] = list(weights[parameter][part].shape)
    pairs = factors(shapes, R)
    made = step(model, input_ids, lengths, np.array(prompt_lengths), pairs)
    return rounded({
        "source": " ".join(__doc__.split("\n\n")[1].split()),
        "sequences": sequences, "prompt_lengths": prompt_lengths, "forward": describe_forward(result, real),
        "count_sequences": count_sequences, "counts": counts.tolist(),
        "r": R, "alpha": ALPHA, "lr": LR, "pairs": shapes, "step": describe_step(made, pairs),
    })  # fmt: skip


if __name__ == "__main__":
    FILE.write_text(json.dumps(content(), separators=(",", ":")).replace(',"', ',\n"') + "\n")
