"""The memory plan against what small models really hold, and the choice that follows from it."""

import ctypes
import gc
import itertools
import os
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import SHARED, SIZES, call, on_processes
from torch import Tensor

import hellora
import lab.benchmarks.plan
from command.cli import InputError
from hub.config import PRESETS
from hub.weights import init_weights
from lab.benchmarks.measure import allocated_peak, saved_bytes
from machine import memory
from machine.processes import end_processes, freed_memory_kept, start_processes
from model import KVCache, MoEConfig, MoETransformer, save_model
from training_step import load_for_process

S, R = 65, 8
OTHER = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
WIDE = {  # sizes that are large beside the constants of the plan, as in real models
    "mixtral": {"hidden_size": 160, "intermediate_size": 256, "num_attention_heads": 5, "num_key_value_heads": 1},
    "deepseek": {"hidden_size": 128, "moe_intermediate_size": 96, "intermediate_size": 320, "num_attention_heads": 4},
    "qwen2_moe": {**OTHER, "moe_intermediate_size": 64},
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 8, "head_dim": 32},
}
REST = {  # of these keys each family has some
    "vocab_size": 211, "num_hidden_layers": 5, "num_experts": 24, "num_local_experts": 6, "n_routed_experts": 24,
    "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1, "shared_expert_intermediate_size": 192,
}  # fmt: skip


def wide(family: str) -> MoEConfig:
    rest = {key: value for key, value in REST.items() if key in SIZES[family]}
    return MoEConfig.from_dict({"model_type": family, **SIZES[family], **rest, **WIDE.get(family, OTHER)})


def attach(model: MoETransformer, num_hot=3, kind="lora", targets="all", dropout=0.0) -> None:
    hot = (torch.arange(model.config.num_experts) < num_hot).expand(len(model.config.moe_layers), -1)
    hellora.attach(model, hot, R, 16.0, kind=kind, targets=targets, dropout=dropout)


ATTACH = {
    "hellora": attach,
    "lora": lambda model: attach(model, model.config.num_experts),
    "dora": lambda model: attach(model, model.config.num_experts, "dora"),
    "lori": lambda model: attach(model, model.config.num_experts, "lori"),
    "fft": None,
    "dropout": lambda model: attach(model, model.config.num_experts, dropout=0.1),
    "lori with dropout": lambda model: attach(model, model.config.num_experts, "lori", "shared", 0.1),
    "moe-sieve": lambda model: attach(model, 6, targets="shared"),
    "pure": lambda model: attach(model, 6, targets="pure"),
}
CASES = [(family, method) for family in SIZES for method in ("hellora", "lora", "dora", "lori", "fft")]
CASES += [*((family, "moe-sieve") for family in SHARED), ("qwen3_moe", "pure")]
CASES += [("olmoe", "dropout"), ("qwen2_moe", "lori with dropout")]
TRAINED = [(*case, torch.float32, {}) for case in CASES]
TRAINED += [
    (family, method, torch.bfloat16, {}) for family, method in zip(itertools.cycle(SIZES), ATTACH, strict=False)
]
TRAINED += [("olmoe", "lora", torch.float32, {"hidden_size": 126, "num_attention_heads": 3, "num_key_value_heads": 3})]
TRAINED += [("mixtral", "lora", torch.float32, {"sliding_window": 13})]
TRAINED += [("olmoe", "hellora", torch.float32, {"vocab_size": 5003})]  # the head's logits are the most at once


def planned(
    config: MoEConfig, method: str, tokens: int, *, processes: int = 1, dtype: torch.dtype = torch.float32, **more
) -> memory.Plan:
    sharded = processes > 1
    return memory.plan(
        config, ATTACH[method], dtype=dtype, num_processes=processes, sharded=sharded, tokens=tokens, **more
    )


def loss(model: MoETransformer, lengths: Tensor) -> Tensor:
    ids = torch.randint(0, 200, (len(lengths), S), generator=torch.Generator().manual_seed(0))
    return model.train()(ids, lengths, labels=ids)[0]


@pytest.mark.parametrize("family, method, dtype, sizes", TRAINED, ids=str)
def test_kept_bytes_and_the_peak_of_a_pass_are_planned_to_within_fifteen_percent(
    monkeypatch, family, method, dtype, sizes
):
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", ("cpu", "meta"))  # as on a GPU
    model, attach = MoETransformer(MoEConfig.from_dict({**wide(family).hub, **sizes})), ATTACH[method]
    init_weights(model, std=0.05)
    model.to(dtype)
    if attach:
        attach(model)
    lengths = torch.tensor([65, 60, 52, 65, 61, 58, 65])
    loss(model, lengths).backward()  # gradients are there from the first micro-batch on
    plans = {}
    for checkpointing in (False, True):
        for layer in model.layers:
            layer.activation_checkpointing = checkpointing
        plan = plans[checkpointing] = planned(
            model.config, method, int(lengths.sum()), dtype=dtype, checkpointing=checkpointing
        )
        kept = saved_bytes(lambda: loss(model, lengths), model.parameters())
        peak = allocated_peak(lambda: loss(model, lengths).backward(), torch.device("cpu"))
        assert plan.activations == pytest.approx(kept, rel=0.15)
        assert plan.activations + plan.transient == pytest.approx(peak, rel=0.15)
    assert plans[True].activations < 0.3 * plans[False].activations


def test_memory_is_what_the_tightest_control_group_leaves(tmp_path):
    process = tmp_path / "process"
    process.write_text("12:devices:/other\n0::/batch/job7\n")
    for folder, limit, used in (("", "max", 90), ("batch", "700", 300), ("batch/job7", "900", 250)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.current").write_text(f"{used}\n")
        (tmp_path / folder / "memory.stat").write_text("anon 40\ninactive_file 30\n")
    assert memory.left_by_control_groups(process, tmp_path) == [900 - 250 + 30, 700 - 300 + 30]
    assert memory.left_by_control_groups(tmp_path / "absent", tmp_path) == []


READING = [(family, method, {}) for family in SIZES for method in ("lora", "dora", "fft")]
READING += [("olmoe", method, {"intermediate_size": 16}) for method in ("lora", "dora", "fft")]  # down needs the most


@pytest.mark.parametrize("family, method, sizes", READING, ids=str)
def test_the_bytes_of_decoding_are_planned_to_within_fifteen_percent(family, method, sizes):
    """Of reading prompts, the largest step."""
    config = MoEConfig.from_dict({**wide(family).hub, **sizes})
    model = MoETransformer(config)
    init_weights(model, std=0.05)
    if ATTACH[method]:
        ATTACH[method](model)
    lengths = torch.full((6,), 70)
    ids = torch.randint(0, 200, (6, 70), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def read() -> None:
        cache = KVCache(config, 6, 70, dtype=torch.float32, device="cpu")
        model(ids, lengths, cache=cache, last_only=True)

    model.eval()
    read()
    plan = planned(config, method, 420, cached=420, trains=False)
    assert plan.activations + plan.transient == pytest.approx(allocated_peak(read, torch.device("cpu")), rel=0.15)


def measure_a_process(index: int, folder, out) -> None:
    """What each of two processes holds, and what a pass allocates: with the base replicated, and sharded."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{out}/meet", rank=index, world_size=2)
    lengths, cpu, found = torch.tensor([65, 60, 52]), torch.device("cpu"), {}
    for method in ("hellora", "fft"):
        for sharded in (False, True):
            shard = "full" if sharded else "none"
            model = load_for_process(folder, torch.float32, cpu, shard=shard, attach=ATTACH[method])
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
            loss(model, lengths).backward()
            optimizer.step()
            gc.collect()  # the model before this one, whose modules refer to each other
            held = {n: p.to_local() if sharded else p for n, p in model.named_parameters()}
            moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
            found[method, sharded] = {
                "weights": sum(p.nbytes for name, p in held.items() if "lora_" not in name),
                "adapters": sum(p.nbytes for name, p in held.items() if "lora_" in name),
                "optimizer": sum((m.to_local() if sharded else m).nbytes for m in moments),
                # How long what was received stays alive is a matter of timing: the smallest of a few.
                "peak": min(allocated_peak(lambda: loss(model, lengths).backward(), cpu) for _ in range(4)),  # noqa: B023
            }
    torch.save(found, out / f"{index}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("num_experts", [24, 7])  # 7 on 2 processes: each holds half of every expert
def test_what_sharded_processes_hold_and_gather_is_planned(tmp_path, num_experts):
    config = MoEConfig.from_dict({**wide("olmoe").hub, "hidden_size": 256, "num_experts": num_experts})
    model = MoETransformer(config)
    init_weights(model, std=0.05)
    save_model(model, tmp_path / "model")
    torch.multiprocessing.spawn(measure_a_process, (tmp_path / "model", tmp_path), nprocs=2)
    found = torch.load(tmp_path / "0.pt")  # the first process holds most
    for method in ("hellora", "fft"):
        whole, plan = (planned(config, method, 177, processes=processes) for processes in (1, 2))
        for planned_terms, measured in ((whole, found[method, False]), (plan, found[method, True])):
            for term in ("weights", "adapters", "optimizer"):
                assert getattr(planned_terms, term) == measured[term], term
        assert (whole.gradients, whole.gathered) == (whole.optimizer // 2, 0)
        # When all weights train, so is how many gradients wait to be reduced at once: the plan is then for the most.
        bounds = (0.85, 1.25) if method == "hellora" else (0.95, 2)
        gathered = plan.gathered + (plan.gradients - plan.optimizer // 2)
        assert bounds[0] < gathered / (found[method, True]["peak"] - found[method, False]["peak"]) < bounds[1]


def plan_of(*, num_processes: int, sharded: bool) -> memory.Plan:
    """100 bytes, shared by the processes."""
    return memory.Plan(100 // num_processes, *[0] * (len(memory.Plan._fields) - 1))


@pytest.mark.parametrize(
    "asked, room, local, chosen, said",
    [
        (None, 110, 4, "none", "replicated on 4 processes (needs "),
        (None, 90, 4, "full", "sharded over 4 processes (replicated it would need "),
        (None, 90, 2, "hybrid", "sharded over the 2 processes of each machine (needs "),
        (None, 40, 2, "full", "sharded over 4 processes (replicated it would need "),
        (None, 90, 1, "full", "sharded over 4 processes (replicated it would need "),
        ("full", 110, 2, "full", "sharded over 4 processes (as asked, --shard full)"),
        ("none", 50, 2, "none", "replicated on 4 processes (as asked, --shard none)"),
        ("hybrid", 110, 2, "hybrid", "sharded over the 2 processes of each machine (as asked, --shard hybrid)"),
        ("hybrid", 110, 4, "full", "sharded over 4 processes (as asked, --shard hybrid)"),
        ("hybrid", 110, 1, "none", "replicated on 4 processes (as asked, --shard hybrid)"),
    ],
)
def test_the_base_is_held_as_asked_or_in_the_first_way_that_fits(monkeypatch, capsys, asked, room, local, chosen, said):
    """room: bytes that are free, of 100 that a copy needs; local: processes of a machine, of four"""
    monkeypatch.setattr(memory, "available", lambda device: room / (1 - memory.SPARE))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert memory.choose_shard(asked, torch.device("cpu"), 4, plan_of) == chosen
    assert said in capsys.readouterr().out
    assert memory.choose_shard(asked, torch.device("cpu"), 1, plan_of) == "none" and not capsys.readouterr().out


def test_hellora_on_olmoe_sends_0_19_gigabytes_per_step_where_fsdp_sends_28():
    replicated, sharded = call(lab.benchmarks.plan, "--gpus 2 --batch 64")  # two micro-batches of 16 each
    assert replicated["sent_per_step"] == 4 * 47_218_688  # 2 (N - 1) / N of the gradients
    weights = 2 * 6_919_161_856 + 4 * 47_218_688
    assert sharded["sent_per_step"] == pytest.approx((2 * 2 * weights + 4 * 47_218_688) / 2, rel=1e-3)
    assert 140 < sharded["sent_per_step"] / replicated["sent_per_step"] < 150


def test_hybrid_sharding_needs_the_memory_of_one_machine_and_sends_only_gradients_to_the_other():
    flags = "--model mixtral-8x7b --micro-batch 8"
    none, hybrid, full = call(lab.benchmarks.plan, flags, "--gpus 16 --machines 2")
    one_machine = call(lab.benchmarks.plan, flags, "--gpus 8")[1]
    assert all(hybrid[term] == one_machine[term] for term in (*memory.Plan._fields, "total", "fits"))
    gradients = none["gradients"]
    assert none["sent_between_machines"] == 2 * 15 * gradients // 16
    assert hybrid["sent_between_machines"] == pytest.approx(gradients, rel=1e-3)  # 2 (M - 1) / M of them
    within = 7 * (2 * (hybrid["weights"] + hybrid["adapters"]) + gradients / 8)  # to 7 others in one micro-batch
    assert hybrid["sent_per_step"] == pytest.approx(within + gradients / 8, rel=1e-3)
    assert full["sent_between_machines"] == full["sent_per_step"] > 100 * hybrid["sent_between_machines"]


def test_the_plan_of_mixtral_fits_two_gpus_sharded_and_not_replicated(capsys):
    rows = call(lab.benchmarks.plan, "--model mixtral-8x7b --gpus 2 --micro-batch 4")
    assert [row["fits"] for row in rows] == [False, True]
    assert rows[0]["weights"] == 2 * 46_702_792_704
    assert "sent per step" in capsys.readouterr().out


def choose_with_its_own_room(out) -> None:
    index, _, cpu = start_processes()
    memory.available = lambda device: (200, 90)[index]  # a replicated base would fit on the first alone
    chosen = memory.choose_shard(None, cpu, 2, plan_of)
    os.environ["LOCAL_WORLD_SIZE"] = str(1 + index)
    try:
        memory.choose_shard("hybrid", cpu, 2, plan_of)
    except InputError as error:
        torch.save((chosen, str(error)), out / f"{index}.pt")
    end_processes()


def test_processes_with_different_free_memory_choose_alike_and_machines_must_be_alike_for_hybrid(tmp_path):
    on_processes(2, choose_with_its_own_room, tmp_path)
    outcomes = [torch.load(tmp_path / f"{index}.pt") for index in (0, 1)]
    assert outcomes == [("full", "--shard hybrid: the machines run 1 to 2 processes; start as many on each")] * 2


@pytest.mark.parametrize("processes", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("model", PRESETS)
def test_every_process_holds_about_the_average(model, processes):
    """Also 8 experts on 16 processes, which FSDP2 alone would give one each to half of them."""
    with torch.device("meta"):
        of_preset = MoETransformer(MoEConfig.from_dict(PRESETS[model]))
    attach(of_preset)
    parameters = list(of_preset.parameters())
    assert memory.held(parameters, processes) <= 1.1 * memory.held(parameters) / processes


# ------------------------------------------------------------------------------------------------- freed memory


def test_glibc_is_called_neither_for_a_gpu_nor_on_another_system(monkeypatch):
    def refuse(name):
        raise AssertionError("glibc was called")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with freed_memory_kept(torch.device("cuda")):
        pass
    monkeypatch.setattr(sys, "platform", "darwin")
    with freed_memory_kept(torch.device("cpu")):
        pass
