"""One model on many processes: each reads its part alone, and together they compute what one process does."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import LOADABLE, on_processes
from test_model import ask_transformers
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

import data
import hellora
import hub.weights
from hub import config
from machine.processes import ALONE, Processes, end_processes, start_processes
from model import load_model, save_model
from training_step import batch_gradients, load_balancing_loss, load_for_process

WORLD = 3  # divides neither the experts nor the heads nor the ranks of the fixtures
R, ALPHA = 5, 7.0
FAMILIES = ["tied", *config.FAMILIES]


def checkpoint(make_checkpoint, family: str):
    return make_checkpoint("olmoe", tie_word_embeddings=True) if family == "tied" else make_checkpoint(family)


def hot_experts(config) -> torch.Tensor:
    """One or two experts a layer: fewer than processes."""
    hot = torch.zeros(len(config.moe_layers), config.num_experts, dtype=torch.bool)
    hot[:, 2] = hot[0, 5] = True
    return hot


def items(vocab_size: int) -> list[data.Encoded]:
    generator = torch.Generator().manual_seed(1)
    lengths = [9, 4, 6, 13, 5, 8, 3]  # 7 examples: micro-batches of 2 make 2 for each process, some of them empty
    ids = [torch.randint(2, vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return [data.Encoded(row, ((2, len(row)),), example=str(i)) for i, row in enumerate(ids)]


KINDS = ("lora", "dora", "lori")


def attach(model, kind: str) -> None:
    hot = hot_experts(model.config)
    hellora.attach(model, hot, R, ALPHA, kind=kind, targets="shared", seed=3)


def step_of(model, processes: Processes):
    return batch_gradients(model.train(), items(model.config.vocab_size), 2, processes)


def assert_near(gradient: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Up to rounding, at the scale of the largest entry."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * scale + 1e-7, msg=name)


def share_the_work(folders: dict[str, Path], out: Path) -> None:
    processes, results = start_processes(), {}
    for family, folder in folders.items():
        read, real = [], hub.weights.read_slices

        def counting(weights, rows, real=real, read=read):
            for key, tensor in real(weights, rows):
                read.append(tensor.numel())
                yield key, tensor

        for kind in KINDS:
            read.clear()
            hub.weights.read_slices = counting
            model = load_for_process(
                folder, torch.float32, torch.device("cpu"), shard="full", attach=partial(attach, kind=kind)
            )
            hub.weights.read_slices = real
            step = step_of(model, processes)
            grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
            held = sum(p.to_local().numel() for n, p in model.named_parameters() if "lora_" not in n)
            results[family, kind] = {"loss": step.loss, "counts": step.counts, "grads": grads, "read": sum(read)}
            results[family, kind] |= {"held": held, "A": model.adapter.sha256_A}
        if family == "olmoe":
            save_model(model, out / "saved", shard_bytes=20_000)
    torch.save(results, out / f"{processes.index}.pt")
    end_processes()


@pytest.mark.parametrize("form", ["concat", "layer"])
def test_the_load_balancing_loss_is_that_of_transformers_for_every_sequence(form):
    L, E, K, lengths = 3, 7, 2, torch.tensor([5, 0, 11, 4])  # a sequence may be empty
    router_logits = torch.randn(L, 20, E, generator=torch.Generator().manual_seed(0), requires_grad=True)
    probs = router_logits.softmax(-1)
    ours = load_balancing_loss(probs, probs.topk(K).indices, lengths, form)
    want = 0.0
    for layers in router_logits.split(lengths.tolist(), dim=1):  # [L, len, E]
        if form == "concat":  # tokens of all layers together
            balance = load_balancing_loss_func(tuple(layers), E, K) if layers.shape[1] else 0.0
        else:  # one layer at a time, as a share of the selections
            balance = sum(load_balancing_loss_func((x,), E, K) / K / L for x in layers) if layers.shape[1] else 0.0
        want = want + layers.shape[1] * balance
    torch.testing.assert_close(ours, want)
    grads = [torch.autograd.grad(loss, router_logits)[0] for loss in (ours, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("family", LOADABLE)
def test_the_balancing_loss_and_the_counts_of_a_step_are_those_of_transformers(make_checkpoint, family):
    checkpoint, (one, *_) = make_checkpoint(family), items(50)
    model = load_model(checkpoint.folder)
    step = batch_gradients(model, [one], 1, ALONE, aux_weight=0.5, aux_form="concat")
    _, chosen, router_logits = ask_transformers(checkpoint.hf, torch.tensor([one.ids]))
    E, K = model.config.num_experts, model.config.num_experts_per_tok
    want = load_balancing_loss_func(tuple(router_logits[:, 0].detach()), E, K)
    torch.testing.assert_close(step.aux_loss.float(), want, rtol=1e-5, atol=0)
    assert step.counts.tolist() == [layer.flatten().bincount(minlength=E).tolist() for layer in chosen]


@pytest.mark.parametrize("form", ["concat", "layer"])
def test_micro_batches_do_not_change_the_balancing_loss_or_its_gradients(olmoe, form):
    model, results = load_model(olmoe.folder), []
    attach(model, "lora")
    for micro_batch in (7, 3, 2):  # 1, 3 and 4 pieces of 7 examples
        step = batch_gradients(model, items(50), micro_batch, ALONE, aux_weight=0.5, aux_form=form)
        results.append((step, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
        model.zero_grad()
    (want, want_grads), *others = results
    for step, grads in others:
        torch.testing.assert_close(step.aux_loss, want.aux_loss, rtol=1e-6, atol=0)
        for name, grad in grads.items():
            assert_near(grad, want_grads[name], name)


@pytest.fixture(scope="module")
def shared(make_checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shared")
    folders = {family: checkpoint(make_checkpoint, family).folder for family in FAMILIES}
    on_processes(WORLD, share_the_work, folders, out)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_three_sharded_processes_give_the_loss_and_gradients_of_one(make_checkpoint, shared, family, kind):
    model = load_model(checkpoint(make_checkpoint, family).folder)
    attach(model, kind)
    step = step_of(model, ALONE)
    for rank in range(WORLD):
        result = torch.load(shared / f"{rank}.pt")[family, kind]
        torch.testing.assert_close(result["loss"], step.loss, rtol=0, atol=1e-5)
        assert torch.equal(result["counts"], step.counts)
        assert result["A"] == model.adapter.sha256_A and bool(result["A"]) == (kind == "lori")
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert result["grads"].keys() == grads.keys()
        for name, grad in grads.items():
            assert_near(result["grads"][name], grad, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_process_reads_what_it_holds_and_no_more(make_checkpoint, shared, family):
    model = load_model(checkpoint(make_checkpoint, family).folder)
    total = sum(p.numel() for p in model.parameters())
    parts = [torch.load(shared / f"{rank}.pt")[family, "lora"] for rank in range(WORLD)]
    assert [part["read"] for part in parts] == [part["held"] for part in parts]
    assert sum(part["read"] for part in parts) == total
    assert max(part["read"] for part in parts) < 0.5 * total


def test_a_sharded_model_is_saved_whole_in_shards_that_load_to_the_same_bits(olmoe, shared):
    assert len(list((shared / "saved").glob("model-*.safetensors"))) > 3
    one, again = load_model(olmoe.folder), load_model(shared / "saved")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))


def test_full_fine_tuning_in_bfloat16_keeps_float32_weights(olmoe):
    """What train.py does with --method fft on a GPU, on one process of the CPU."""
    whole = load_model(olmoe.folder)
    want = batch_gradients(whole, items(50), 2, ALONE)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        cpu, half = torch.device("cpu"), torch.bfloat16
        model = load_for_process(olmoe.folder, torch.float32, cpu, shard="full", compute_dtype=half)
        step = batch_gradients(model, items(50), 2, ALONE)
        assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
        assert 0 < abs(step.loss - want.loss) < 0.02 * want.loss  # computed in bfloat16
        before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
        for _ in range(3):  # updates that bfloat16 would lose
            optimizer.step()
        assert all(not torch.equal(p.full_tensor(), before[name]) for name, p in model.named_parameters())
    finally:
        dist.destroy_process_group()


def test_a_thousand_tiny_updates_of_an_adapter_are_not_lost_beside_a_bfloat16_base(olmoe):
    model = load_model(olmoe.folder, torch.bfloat16)
    attach(model, "lora")
    A = model.layers[0].mlp.experts.lora["up_proj"].lora_A
    A.data.fill_(1.0)
    A.grad = torch.ones_like(A)
    optimizer = torch.optim.SGD([A], lr=1e-6)
    for _ in range(1000):
        optimizer.step()
    torch.testing.assert_close(A, torch.full_like(A, 0.999), rtol=0, atol=1e-4)
