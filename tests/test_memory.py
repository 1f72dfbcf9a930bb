"""The memory plan against what small models really hold, and the choice that follows from it."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import benchmarks.plan
import hellora
import memory
from config import PRESETS, MoEConfig
from model import MoETransformer, init_weights

B, S, R = 7, 33, 8
WIDE = {  # sizes that are large beside the constants of the plan, as in real models
    "olmoe": {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4},
    "mixtral": {"hidden_size": 160, "intermediate_size": 256, "num_attention_heads": 5, "num_key_value_heads": 1},
    "deepseek": {"hidden_size": 128, "moe_intermediate_size": 96, "intermediate_size": 320, "num_attention_heads": 4},
    "qwen2_moe": {"hidden_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 4},
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 8, "head_dim": 32},
}
REST = {  # keys that some family reads
    "vocab_size": 211, "num_hidden_layers": 5, "num_experts": 24, "num_local_experts": 6, "n_routed_experts": 24,
    "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1, "shared_expert_intermediate_size": 192,
}  # fmt: skip


def wide(family: str) -> MoEConfig:
    return MoEConfig.from_dict({"model_type": family, **REST, **WIDE[family]})


def attach(model: MoETransformer, num_hot: int = 3, kind: str = "lora") -> None:
    hot = (torch.arange(model.config.num_experts) < num_hot).expand(len(model.config.moe_layers), -1)
    hellora.attach(model, hot, R, 16.0, kind=kind)


def saved_bytes(model: MoETransformer, lengths: Tensor) -> int:
    """Bytes that autograd keeps from the forward pass, each storage once, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used again
        return tensor

    ids = torch.randint(0, 200, (len(lengths), S), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, lengths, labels=ids)
    return sum(size for size, _ in kept.values())


ATTACH = {
    "hellora": attach,
    "lora": lambda model: attach(model, model.config.num_experts),
    "dora": lambda model: attach(model, model.config.num_experts, "dora"),
    "lori": lambda model: attach(model, model.config.num_experts, "lori"),
    "fft": None,
}


@pytest.mark.parametrize("method", ATTACH)
@pytest.mark.parametrize("family", WIDE)
def test_activations_are_planned_to_within_fifteen_percent(family, method):
    """In float32: in bfloat16 torch's norm keeps a float32 copy on the CPU, and on a GPU it does not."""
    model, dtype, attach = MoETransformer(wide(family)), torch.float32, ATTACH[method]
    init_weights(model, std=0.05)
    if attach:
        attach(model)
    lengths = torch.tensor([33, 30, 28, 33, 31, 29, 33])
    options = {"world": 1, "sharded": False, "tokens": int(lengths.sum())}
    plan = memory.plan(model.config, attach, dtype=dtype, **options)
    assert plan.activations == pytest.approx(saved_bytes(model, lengths), rel=0.15)
    for layer in model.layers:
        layer.activation_checkpointing = True
    less = memory.plan(model.config, attach, dtype=dtype, **options, checkpointing=True)
    assert less.activations == pytest.approx(saved_bytes(model, lengths), rel=0.15)
    assert less.activations < 0.3 * plan.activations


def test_parameters_gradients_and_moments_are_counted_exactly():
    model = MoETransformer(wide("olmoe"))
    init_weights(model, std=0.05)
    attach(model)
    plan = memory.plan(model.config, attach, dtype=torch.float32, world=1, sharded=False, tokens=99)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(torch.ones(1, 5, dtype=torch.int64), labels=torch.ones(1, 5, dtype=torch.int64))[0].backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert plan.weights == sum(p.nbytes for n, p in model.named_parameters() if "lora_" not in n)
    assert plan.adapters == plan.gradients == sum(p.grad.nbytes for p in trained)
    assert plan.optimizer == sum(moment.nbytes for moment in moments)
    assert plan.gathered == 0


def test_the_base_is_whole_where_it_fits_and_sharded_where_not(monkeypatch, capsys):
    plan = memory.plan(wide("olmoe"), attach, dtype=torch.float32, world=2, sharded=False, tokens=99)
    cpu = torch.device("cpu")
    for free, asked, sharded in ((2, None, False), (0.9, None, True), (2, "full", True), (0.5, "none", False)):
        monkeypatch.setattr(memory, "available", lambda device, free=free: int(free * plan.total))
        assert memory.choose_shard(asked, cpu, 2, plan) == sharded
        said = capsys.readouterr().out
        assert ("sharded over 2 processes" in said) == sharded and ("as asked" in said) == bool(asked)
    assert memory.choose_shard(None, cpu, 1, plan) is False and not capsys.readouterr().out


def test_hellora_on_olmoe_sends_a_fifth_of_a_gigabyte_a_step_where_fsdp_sends_twenty_eight():
    config = MoEConfig.from_dict(PRESETS["olmoe-1b-7b"])
    whole = benchmarks.plan.traffic(config, 4 * 47_218_688, full=False, world=2, sharded=False, micro_batches=2)
    sharded = benchmarks.plan.traffic(config, 4 * 47_218_688, full=False, world=2, sharded=True, micro_batches=2)
    assert whole == 4 * 47_218_688  # 2 (N - 1) / N of the gradients
    weights = 2 * 6_919_161_856 + 4 * 47_218_688
    assert sharded == (2 * 2 * weights + 4 * 47_218_688) // 2
    assert 140 < sharded / whole < 150


def test_the_plan_of_mixtral_fits_two_gpus_sharded_and_not_whole(capsys):
    rows = benchmarks.plan.main(["--model", "mixtral-8x7b", "--gpus", "2", "--micro-batch", "4"])
    assert [row["fits"] for row in rows] == [False, True]
    assert rows[0]["weights"] == 2 * 46_702_792_704
    assert "sent per step" in capsys.readouterr().out


def choose_with_its_own_room(rank: int, out, plan) -> None:
    dist.init_process_group("gloo", f"file://{out}/meet", rank=rank, world_size=2)
    memory.available = lambda device: int((2, 0.9)[rank] * plan.total)  # whole would fit on the first alone
    torch.save(memory.choose_shard(None, torch.device("cpu"), 2, plan), out / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_with_unlike_room_choose_alike(tmp_path):
    plan = memory.plan(wide("olmoe"), attach, dtype=torch.float32, world=2, sharded=False, tokens=99)
    torch.multiprocessing.spawn(choose_with_its_own_room, (tmp_path, plan), nprocs=2)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)] == [True, True]
