"""DR-LoRA: who grows, that the budget is met and never passed, and that what has not grown takes no part."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import call, on_processes, read_json, read_lines, words
from test_hellora import fresh_model

import hellora
import lora
import train
import training_step
from command.cli import InputError
from machine.processes import start_processes
from model import MoETransformer
from neighbours import drlora
from neighbours.ranks import pad, truncate
from run import adapters

ROOT = Path(__file__).parent.parent
L, E, R_TARGET, R_MAX, SCALE = 2, 7, 4, 12, 1.5  # every expert starts with rank 2


def adapted(r: int = R_TARGET, targets: str = "pure", r_max: int | None = R_MAX) -> MoETransformer:
    model, hot = fresh_model(E), torch.ones(L, E, dtype=torch.bool)
    hellora.attach(model, hot, r, SCALE * r, targets=targets, seed=5, expert_rank=r_max)
    return model


def optimizer_of(model: MoETransformer) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


def backward(model: MoETransformer, step: int, index: int = 0, count: int = 1) -> torch.Tensor:
    """Gradients of a batch of 5 sequences that depends on `step`, shared by the processes.  -> their counts [L, E]"""
    ids = torch.randint(0, 53, (5, 11), generator=torch.Generator().manual_seed(step))[index::count]
    loss, selected = model(ids, labels=ids)
    (loss * count / 55).backward()
    return torch.stack([torch.bincount(layer.flatten(), minlength=E) for layer in selected])


def advance(model, growth, optimizer, step: int, index: int = 0, count: int = 1) -> None:
    """One step as train.py does it."""
    counts = backward(model, step, index, count)
    if count > 1:
        dist.all_reduce(counts)
    growth.observe(counts)
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)
    optimizer.step()
    optimizer.zero_grad()
    growth.grow(step)


def pairs_of(model: MoETransformer) -> dict[tuple[int, str], lora.StackedLoRA]:
    return {(i, name): p for i, layer in enumerate(model.layers) for name, p in layer.mlp.experts.lora.items()}


# ------------------------------------------------------------------------------------------------- by hand


def test_ranks_grow_from_the_end_of_warm_up_to_one_interval_before_the_end():
    paper = drlora.growth_steps(3750)
    assert (paper[0], paper.step, paper[-1], len(paper)) == (113, 200, 3513, 18)  # 113 = 3 % rounded up
    assert list(drlora.growth_steps(40)) == list(range(2, 39, 2))
    assert list(drlora.growth_steps(2)) == [1]


def test_saliency_is_share_of_use_times_share_of_importance_over_a_power_of_the_rank():
    usage = torch.tensor([[30, 10], [0, 5], [3, 1]])
    importance = torch.tensor([[0.1, 0.4], [7.0, 7.0], [0.0, 0.0]])  # at last one where nothing is learnt yet
    ours = drlora.saliency(usage, importance, torch.tensor([[1, 3], [7, 0], [0, 0]]))
    by_hand = [[0.75 * 0.2 / 2**1.2, 0.25 * 0.8 / 4**1.2], [1e-6 * 0.5 / 8**1.2, 0.5], [0.75 * 1e-6, 0.25 * 1e-6]]
    assert ours.tolist() == [pytest.approx(row, rel=1e-4) for row in by_hand]


# ------------------------------------------------------------------------------------------------- the budget


def test_every_layer_ends_at_its_budget_and_is_never_above_it():
    rng, models = random.Random(0), {r: adapted(r_max=r) for r in (5, 9, 16, 24)}
    for seed in range(60):
        r_max = rng.choice(list(models))
        r_target, steps = rng.randint(1, r_max), rng.choice([2, 3, 7, 40, 60, 350])
        growth = drlora.RankGrowth(models[r_max], r_target, steps)
        torch.manual_seed(seed)
        for step in range(1, steps + 1):
            growth.usage.copy_(torch.rand(L, E) ** 9)  # a few experts take nearly all
            growth.score.copy_(torch.rand(L, E) ** 9)
            before = growth.ranks()
            growth.grow(step)
            grown = growth.ranks() - before
            assert int(grown.min()) >= 0 and int(growth.ranks().max()) <= r_max
            assert int(growth.ranks().sum(-1).max()) <= E * r_target
        assert [step for step, _ in growth.history[1:]] == list(drlora.growth_steps(steps))
        assert growth.ranks().sum(-1).tolist() == [E * r_target] * L, (r_max, r_target, steps)


def test_a_long_run_spends_the_same_at_every_growth_and_caps_every_expert():
    growth = drlora.RankGrowth(adapted(r_max=24), 12, 3750)  # 6 -> 12 of 24; free 18, so 2 at a time
    growth.usage.copy_(torch.arange(1, E + 1).expand(L, E))
    growth.score.copy_(torch.arange(1, E + 1).expand(L, E))
    spent = []
    for step in drlora.growth_steps(3750):
        before = growth.ranks()
        growth.grow(step)
        assert int((growth.ranks() - before).max()) <= 2
        spent.append((growth.ranks() - before).sum(-1).tolist())
    assert spent == [[3, 3]] * 14 + [[0, 0]] * 4  # 7 * 6 = 42 dimensions, ceil(42 / 18) at a time


# ------------------------------------------------------------------------------------------------- in training


def test_what_has_not_grown_never_changes_and_the_rest_trains_as_plain_lora_of_its_rank():
    reserved, plain = adapted(), adapted(R_TARGET // 2, r_max=None)
    growth = drlora.RankGrowth(reserved, R_TARGET, steps=1000)
    assert growth.steps[0] > 5
    before = {key: [p.detach().clone() for p in pair.parameters()] for key, pair in pairs_of(reserved).items()}
    ours, theirs = optimizer_of(reserved), optimizer_of(plain)
    for step in range(1, 6):
        advance(reserved, growth, ours, step)
        backward(plain, step)
        torch.nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 0.1)
        theirs.step()
        theirs.zero_grad()
    other = pairs_of(plain)
    for key, pair in pairs_of(reserved).items():
        A, B = before[key]
        assert torch.equal(pair.lora_A[:, 2:], A[:, 2:]) and not pair.lora_B[:, :, 2:].any()
        assert torch.allclose(pair.lora_A[:, :2], other[key].lora_A, atol=1e-5)
        assert torch.allclose(pair.lora_B[:, :, :2], other[key].lora_B, atol=1e-5) and pair.lora_B.any()
        moments = [ours.state[pair.lora_A][m][:, 2:] for m in ("exp_avg", "exp_avg_sq")]
        moments += [ours.state[pair.lora_B][m][:, :, 2:] for m in ("exp_avg", "exp_avg_sq")]
        assert not any(m.any() for m in moments)
    ids = torch.arange(22).view(2, 11)
    assert torch.allclose(reserved(ids)[0], plain(ids)[0], atol=1e-4)


def test_growing_changes_no_output_and_a_grown_dimension_trains_from_then_on():
    model = adapted()
    growth, optimizer = drlora.RankGrowth(model, R_TARGET, steps=12), optimizer_of(model)
    growth.observe(backward(model, 1))
    optimizer.step()
    optimizer.zero_grad()
    ids = torch.arange(22).view(2, 11)
    logits = model(ids)[0]
    drawn = {key: pair.lora_A.detach().clone() for key, pair in pairs_of(model).items()}
    growth.grow(1)
    assert torch.equal(model(ids)[0], logits)
    grown = growth.ranks() > 2
    assert 0 < int(grown.sum()) < L * E
    ranks = growth.ranks()
    for step in (2, 3):  # B at the first of them, A at the second, when B is no longer zero
        counts = backward(model, step)
        assert bool((counts[grown] > 0).all())
        growth.observe(counts)
        optimizer.step()
        optimizer.zero_grad()
    for (i, name), pair in pairs_of(model).items():
        for e in range(E):
            R = int(ranks[i, e])
            assert bool(pair.lora_B[e, :, :R].any(0).all()) and not pair.lora_B[e, :, R:].any(), (i, name, e)
            changed = (pair.lora_A[e] != drawn[i, name][e]).any(-1)
            assert changed.tolist() == [True] * R + [False] * (R_MAX - R), (i, name, e)


def test_a_skipped_step_leaves_no_score_and_its_growth_still_happens():
    """As a run in which the step's batch was never seen, but whose ranks grow at the same steps."""
    model, unseen = adapted(), adapted()
    growth, other = (drlora.RankGrowth(m, R_TARGET, steps=12) for m in (model, unseen))
    optimizers = [optimizer_of(m) for m in (model, unseen)]
    for step in range(1, 13):
        if step in (1, 4, 5, 11):
            growth.observe(backward(model, step) * math.nan)
            growth.forget()
            optimizers[0].zero_grad()
            growth.grow(step)
            other.grow(step)
        else:
            advance(model, growth, optimizers[0], step)
            advance(unseen, other, optimizers[1], step)
    assert growth.ranks().tolist() == other.ranks().tolist()
    assert torch.equal(growth.score, other.score) and torch.equal(growth.usage, other.usage)
    assert growth.ranks().sum(-1).tolist() == [E * R_TARGET] * L and growth.score.isfinite().all()


@pytest.mark.parametrize("steps, skipped", [(2, {1}), (23, set(range(1, 23)))])
def test_the_budget_is_spent_to_the_last_rank_whatever_steps_are_skipped(tmp_path, monkeypatch, steps, skipped):
    real, calls = training_step.batch_gradients, []

    def sometimes(model, *args, **kwargs):
        done = real(model, *args, **kwargs)
        calls.append(1)
        if len(calls) in skipped:
            done.loss = done.loss * math.nan
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)
        return done

    monkeypatch.setattr(training_step, "batch_gradients", sometimes)
    flags = words("--method dr-lora --rank 4 --steps", steps, "--batch 1 --sample 0.005")
    flags += ["--save-every", str(steps)]
    result = call(train, flags, "--on-nonfinite skip --out", tmp_path / "run")
    assert result["skipped_steps"] == len(skipped)
    ranks = torch.tensor(read_json(tmp_path / "run/adapter/adapter.json")["ranks"])
    assert ranks.sum(-1).tolist() == [64 * 4] * 4  # 64 experts in each of 4 layers
    logged = [(record["active_ranks"], record["rank_budget"]) for record in read_lines(tmp_path / "run/log.jsonl")]
    assert logged == sorted(logged) and logged[-1] == (4 * 64 * 4, 4 * 64 * 4)
    state = (tmp_path / f"run/checkpoint/step-{steps:08d}/state.json").read_text()
    json.loads(state, parse_constant=pytest.fail)  # no NaN is left in the scores


# ------------------------------------------------------------------------------------------------- two processes


def grown(index: int = 0, count: int = 1) -> tuple[MoETransformer, drlora.RankGrowth]:
    """A model whose ranks have grown in 12 steps."""
    model = adapted(targets="all")
    if count > 1:
        training_step.shard_model(model, torch.device("cpu"))  # 7 experts: 4 and 3 of them
    growth, optimizer = drlora.RankGrowth(model, R_TARGET, steps=12), optimizer_of(model)
    for step in range(1, 13):
        advance(model, growth, optimizer, step, index, count)
    return model, growth


@pytest.fixture(scope="module")
def trained() -> tuple[MoETransformer, drlora.RankGrowth]:
    return grown()


def grow_in_group(folder: Path) -> None:
    index, count, _ = start_processes()
    model, growth = grown(index, count)
    torch.save((growth.state_dict(), adapters.adapter_state(model)), folder / f"{index}.pt")
    dist.destroy_process_group()


def test_two_processes_grow_the_same_ranks_and_train_the_same_adapter_as_one(trained, tmp_path):
    on_processes(2, grow_in_group, tmp_path)
    model, growth = trained
    one, state = growth.state_dict(), adapters.adapter_state(model)
    assert len(growth.ranks().unique()) > 2
    for index in range(2):
        two, other = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        assert (two["ranks"], two["usage"]) == (one["ranks"], one["usage"])
        assert torch.allclose(torch.tensor(two["score"]), torch.tensor(one["score"]), rtol=1e-3)
        assert other.keys() == state.keys()
        assert all(torch.allclose(other[name], state[name], rtol=0, atol=1e-5) for name in state)


# ------------------------------------------------------------------------------------------------- file and picture


def test_a_truncated_adapter_has_the_size_of_plain_lora_and_computes_the_same(trained):
    model, growth = trained
    state = adapters.adapter_state(model)
    small = truncate(state, growth.ranks())
    plain = adapters.adapter_state(adapted(targets="all", r_max=None))
    assert {name: tensor.numel() for name, tensor in small.items()} == {n: t.numel() for n, t in plain.items()}
    restored, largest = pad(small, growth.ranks()), int(growth.ranks().max())
    assert R_TARGET < largest <= R_MAX
    for (i, name), pair in pairs_of(model).items():
        stem, ranks = f"layers.{i}.mlp.experts.lora.{name}", growth.ranks()[i].tolist()
        A, B = small[f"{stem}.lora_A"].split(ranks), small[f"{stem}.lora_B"].split(ranks, dim=1)
        for e in range(E):
            assert torch.allclose(B[e] @ A[e], pair.lora_B[e] @ pair.lora_A[e], atol=1e-6), (stem, e)
    of_largest = adapters.adapter_state(adapted(R_TARGET, "all", r_max=largest))
    assert {name: tensor.shape for name, tensor in restored.items()} == {n: t.shape for n, t in of_largest.items()}
    assert all(tensor.is_contiguous() for tensor in (*small.values(), *restored.values()))  # as safetensors expects


def test_a_saved_adapter_loads_to_the_same_logits_and_merges(trained, tmp_path):
    model, growth = trained
    adapter = replace(model.adapter, ranks=growth.ranks().tolist())
    state = truncate(adapters.adapter_state(model), growth.ranks())
    adapters.save_adapter(state, tmp_path, adapter)
    other, ids = fresh_model(E), torch.arange(22).view(2, 11)
    adapters.load_adapter(other, tmp_path)
    logits = model(ids)[0]
    assert torch.allclose(other(ids)[0], logits, atol=1e-4)
    hellora.merge(other)
    assert torch.allclose(other(ids)[0], logits, atol=1e-4)
    more = [[rank + 1 for rank in row] for row in adapter.ranks]
    for ranks in (adapter.ranks[:1], [row[1:] for row in adapter.ranks], [[1], [2, 3]], 4, more):
        adapters.save_adapter(state, tmp_path, replace(adapter, ranks=ranks))
        with pytest.raises(InputError, match="damaged"):
            adapters.load_adapter(fresh_model(E), tmp_path)


def test_ranks_are_drawn_at_the_start_at_the_end_and_between(trained, tmp_path):
    from matplotlib.image import imread

    drlora.draw_ranks(trained[1].history, tmp_path / "ranks.png")
    drlora.draw_ranks(trained[1].history[:1], tmp_path / "first.png")
    four, one = (imread(tmp_path / name) for name in ("ranks.png", "first.png"))
    assert four.shape[1] > 3 * one.shape[1] > 0 and four.std() > 0.1


def test_an_adapter_whose_ranks_are_still_below_the_target_keeps_attention_and_router_whole(tmp_path):
    model = adapted(targets="all")
    growth = drlora.RankGrowth(model, R_TARGET, steps=12)  # before the first growth: half of the target rank
    for name, parameter in model.named_parameters():
        if "lora_B" in name and ".experts." not in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    adapters.save_adapter(truncate(adapters.adapter_state(model), growth.ranks()), tmp_path, model.adapter)
    again = fresh_model(E)
    adapters.load_adapter(again, tmp_path)
    ids = torch.arange(2, 16).view(2, 7)
    assert torch.allclose(again(ids)[0], model(ids)[0], atol=1e-5)
