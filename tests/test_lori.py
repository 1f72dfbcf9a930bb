"""LoRI and HELLoRI: what is frozen, what is kept, and that a vector of values is the same as a mask."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import same
from test_hellora import ALPHA, HOT, R, fresh_model

import hellora
import lora
import lori
import training_step
from command.cli import InputError
from model import MoETransformer
from run import adapters


def adapted(seed: int = 5) -> MoETransformer:
    model = fresh_model()
    hellora.attach(model, HOT, R, ALPHA, kind="lori", seed=seed)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 53, (3, 11), generator=torch.Generator().manual_seed(1))


def step(model: MoETransformer, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    loss, _ = model(ids, labels=ids)
    optimizer.zero_grad()
    (loss / ids.numel()).backward()
    optimizer.step()


def optimizer_of(model: MoETransformer) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


def matrices(model: MoETransformer) -> dict[str, torch.Tensor]:
    """Every lora_B as a whole matrix, by the name of its module."""
    pairs = (lora.LoRALinear, lora.StackedLoRA)
    return {name: m.lora_B.detach().clone() for name, m in model.named_modules() if isinstance(m, pairs)}


def trained_d(ids: torch.Tensor) -> MoETransformer:
    model = adapted()
    optimizer = optimizer_of(model)
    for _ in range(3):
        step(model, optimizer, ids)
    return model


def with_random_B() -> MoETransformer:
    """As after stage D; the earlier an expert stands in its stack, the larger its entries."""
    model, noise = adapted(), torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=noise))
            if parameter.dim() == 3:
                parameter.data *= torch.arange(len(parameter), 0, -1)[:, None, None]
    return model


def choose_in_process(rank: int, world: int, out: Path) -> None:
    torch.set_num_threads(1)
    patience = timedelta(minutes=3)
    dist.init_process_group("gloo", f"file://{out}/meet", timeout=patience, rank=rank, world_size=world)
    model = with_random_B()
    training_step.shard_model(model, torch.device("cpu"))
    torch.save(lori.top_entries(adapters.adapter_state(model)), out / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_choose_by_one_threshold_over_what_both_hold(tmp_path):
    """The first of them holds the larger experts: a tenth of what each holds would be another choice."""
    torch.multiprocessing.start_processes(choose_in_process, (2, tmp_path), nprocs=2, start_method="fork")
    alone = lori.top_entries(adapters.adapter_state(with_random_B()))
    stack = alone["layers.0.mlp.experts.lora.up_proj"]
    assert int((stack < 3 * 24 * R).sum()) > 4 * int((stack >= 3 * 24 * R).sum())  # 3 of its 5 experts, and 2
    for rank in (0, 1):
        chosen = torch.load(tmp_path / f"{rank}.pt")
        assert same(chosen, alone)


def test_a_d_run_that_hardly_moved_is_refused():
    state = {"a.lora_B": torch.zeros(10, 10)}
    state["a.lora_B"][0, :9] = 1
    with pytest.raises(InputError, match="only 9 entries of B are not zero, expected 10 or more"):
        lori.top_entries(state, share=0.1)
    with pytest.raises(InputError, match="no dense lora_B"):
        lori.top_entries({})


def test_a_vector_of_values_trains_as_a_masked_matrix_does(ids):
    """The reference: a dense B whose gradient is masked before every step of the same optimizer."""
    kept = lori.top_entries(adapters.adapter_state(trained_d(ids)))
    kept["layers.1.mlp.gate"] = kept["layers.1.mlp.gate"][:0]  # a matrix that keeps nothing
    compact, masked = adapted(), adapted()
    lori.sparsify(compact, kept)
    assert all(not B.any() for B in matrices(compact).values())  # B starts from zero again
    ours, theirs = optimizer_of(compact), optimizer_of(masked)
    for _ in range(4):
        step(compact, ours, ids)
        loss, _ = masked(ids, labels=ids)
        theirs.zero_grad()
        (loss / ids.numel()).backward()
        for name, parameter in masked.named_parameters():
            if parameter.requires_grad:
                mask = torch.zeros(parameter.numel(), dtype=torch.bool)
                mask[kept[name.removesuffix(".lora_B")]] = True
                parameter.grad *= mask.view_as(parameter)
        theirs.step()
    dense = matrices(masked)
    for name, B in matrices(compact).items():
        assert torch.allclose(B, dense[name], atol=1e-6), name
        outside = torch.ones(B.numel(), dtype=torch.bool)
        outside[kept[name]] = False
        assert not B.flatten()[outside].any()
    assert all(B.any() == (name != "layers.1.mlp.gate") for name, B in dense.items())


def test_an_A_that_is_not_the_one_trained_under_is_refused(tmp_path, ids):
    model = trained_d(ids)
    adapters.save_adapter(adapters.adapter_state(model), tmp_path, replace(model.adapter, seed=6))
    other = fresh_model()
    with pytest.raises(InputError, match="a different checksum"):
        adapters.load_adapter(other, tmp_path)
