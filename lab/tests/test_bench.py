"""Benchmarks run, and compare what does the same work."""

import gc
import json
import statistics
import sys
import weakref

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bench
import data
from command.cli import InputError
from hub.weights import init_weights
from lab.benchmarks import full, growth, step, subjects
from lab.benchmarks.measure import allocated_peak, saved_bytes, times_as_fast
from lab.benchmarks.subjects import make_ours
from lab.benchmarks.workload import make_batches


def test_decoding_is_timed_on_the_same_tokens_as_transformers(olmoe, tmp_path, capsys):
    flags = ["--model", str(olmoe.folder), "--prompts", "5", "--batch", "2", "--repeats", "2"]
    rows = bench.main(["generate", *flags, "--json", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert [row["name"] for row in rows] == ["hellora", "transformers"]
    ours, theirs = rows
    assert ours["samples_per_s"] == pytest.approx(5 / statistics.median(ours["seconds"]))
    turns = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
    assert ours["over_transformers"] == pytest.approx(statistics.median(turns)) and theirs["over_transformers"] == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("100.0 % of 5 answers are the same token for token")


def test_drawn_lengths_have_the_deciles_they_are_drawn_from():
    from lab.benchmarks.generate import LENGTHS, draw_lengths

    for deciles in LENGTHS.values():
        drawn = draw_lengths(deciles, 300_000, np.random.default_rng(0))
        assert min(drawn) >= deciles[0] and max(drawn) <= deciles[-1]
        assert statistics.quantiles(drawn, n=10) == pytest.approx(deciles[1:-1], abs=1)


# -------------------------------------------------------------------------------------------------- bench.py step


@pytest.fixture
def tiny_step(monkeypatch):
    """`bench.py step` on a model of a few thousand weights, one batch a turn."""
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_experts=8)
    shape = {**step.SHAPES["small"], **sizes, "num_experts_per_tok": 2}
    monkeypatch.setattr(step, "SHAPES", {"small": shape, "full": shape})
    monkeypatch.setattr(step, "EXAMPLES", 3)
    return step


def test_a_training_step_is_timed_beside_the_frozen_base_and_the_peers(tiny_step, tmp_path):
    flags = ["--batch", "3", "--k", "2", "--rank", "4", "--repeats", "3"]
    rows = bench.main(["step", *flags, "--json", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    table = {row["name"]: row for row in rows}
    assert list(table) == [*tiny_step.NAMES, "profile"]
    floor, lora, hellora, peer = (table[name] for name in ("floor", "lora", "hellora", "peft-all"))
    assert floor["over_floor"] == 1 and floor["adapter_flops"] == 0
    assert hellora["samples_per_s"] == pytest.approx(3 / statistics.median(hellora["seconds"]))
    turns = [b / a for a, b in zip(hellora["seconds"], peer["seconds"], strict=True)]
    assert hellora["over_peft-all"] == pytest.approx(statistics.median(turns))
    assert floor["saved_bytes"] < hellora["saved_bytes"] < lora["saved_bytes"] < peer["saved_bytes"]
    assert floor["peak_bytes"] < hellora["peak_bytes"] < peer["peak_bytes"] and floor["peak_bytes"] < lora["peak_bytes"]
    assert 0 < hellora["adapter_flops"] < lora["adapter_flops"] < table["dora"]["adapter_flops"]
    assert all(table[name]["share_of_matmul"] > 0 for name in tiny_step.NAMES)
    work = {
        name: table[name]["flops_per_s"] / table[name]["samples_per_s"] for name in ("floor", "hellora", "peft-all")
    }
    assert work["hellora"] - work["peft-all"] == pytest.approx(hellora["adapter_flops"] / 3)
    assert 0.9 * work["floor"] < work["peft-all"] < work["floor"]  # which lacks the gradient of the embeddings
    assert 2 / 8 < table["profile"]["hot_share"] < 1 and 0 < table["profile"]["share"] < 1


def test_a_ratio_is_that_of_the_speeds_over_all_batches_even_if_the_machine_slows_down_between_turns():
    seconds, others = np.array([1.0, 4.0]), np.array([3.0, 8.0])  # of two batches: 11 s to 5 s
    pace = np.array([[1.0], [2.0], [0.7]])  # of the machine in three turns
    assert times_as_fast(pace * seconds, pace * others) == pytest.approx(11 / 5)


def test_peers_have_our_weights_and_our_loss(tiny_step):
    device = torch.device("cpu")
    (batch,) = make_batches(3, 1, 97, device)
    model = subjects.our_model(tiny_step.SHAPES["small"], device, torch.float32)
    init_weights(model, std=0.3)  # so that experts matter
    peers = [subjects.make_peer(name, model, 4).loss(batch) for name in tiny_step.PEERS]
    ours = subjects.make_ours("lora", model, torch.ones(2, 8, dtype=torch.bool), 4).loss(batch)
    assert all(torch.allclose(loss, ours, rtol=1e-5) for loss in peers)


def test_lengths_are_those_of_the_histogram_and_labels_the_next_tokens_of_the_answer():
    (batch,) = make_batches(2000, 1, 97, torch.device("cpu"))
    assert batch.lengths.float().mean() == pytest.approx(151.6, rel=0.03)  # of GSM8K
    for ids, labels, length in zip(batch.input_ids[:9], batch.labels, batch.lengths.tolist(), strict=False):
        where = (labels != -100).nonzero().flatten()
        assert where.tolist() == list(range(int(where[0]), length - 1))
        assert len(where) == pytest.approx(0.51 * length, abs=2) and labels[where].equal(ids[where + 1])


def test_bytes_are_those_of_a_step_worked_out_by_hand():
    model = torch.nn.Linear(1, 1000, bias=False)  # 4,000 bytes, and as much for its gradient

    def loss(batch):
        return (model.weight.exp() * 2).sum()  # exp keeps its result for backward; 2 exp is made and dropped

    subject = subjects.Subject("x", model, loss, None)
    assert saved_bytes(lambda: loss(None), subject.resident()) == 4000
    peak = allocated_peak(lambda: subject.step(None), torch.device("cpu"))
    # exp and 2 exp forward; backward exp, the gradients of both and of the weight, not all at once
    assert 4000 * 2 <= peak <= 4000 * 4


def test_counting_what_is_kept_for_backward_lets_go_of_it():
    weight, made = torch.ones(7, requires_grad=True), []

    def forward():
        y = weight.exp()  # which keeps its own result
        made.append(weakref.ref(y))
        return y.sum()

    assert saved_bytes(forward, [weight]) == 7 * 4
    gc.collect()
    assert made[0]() is None


def test_a_peer_that_is_not_installed_is_a_row_that_says_so(tiny_step, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    rows = bench.main(["step", "--batch", "2", "--k", "2", "--repeats", "1", "--names", "floor", "peft-all"])
    missing = next(row for row in rows if row["name"] == "peft-all")
    assert missing["samples_per_s"] is None and missing["note"] == "peft is not installed"
    assert "peft-all: not run, peft is not installed" in capsys.readouterr().out


def test_the_placements_of_the_paper_and_moe_sieve_are_rows_of_their_own(tiny_step):
    names = "hellora hellora-gate hellora-pure lora-pure lori-s-gate moe-sieve hellora-k2 hellora-k4".split()
    rows = {
        row["name"]: row
        for row in bench.main(["step", "--batch", "3", "--k", "1", "--repeats", "1", "--names", *names])
    }
    flops = {name: rows[name]["adapter_flops"] for name in names}
    assert flops["hellora-pure"] < flops["hellora-gate"] < flops["hellora"] < flops["moe-sieve"] < flops["hellora-k4"]
    assert flops["moe-sieve"] == flops["hellora-k2"]  # two of eight experts
    assert flops["hellora-pure"] < flops["lora-pure"]


def test_models_that_train_adapters_share_the_frozen_weights_and_nothing_else(tiny_step):
    base = subjects.our_model(tiny_step.SHAPES["small"], torch.device("cpu"), torch.float32)
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    one, other = (subjects.make_ours("hellora", subjects.sharing(base), torch.ones(2, 8) > 0, 2) for _ in range(2))
    batch = make_batches(3, 1, base.config.vocab_size, torch.device("cpu"))[0]
    one.step(batch)
    shared = {id(weight) for weight in base.parameters()}
    trained = [[p for p in each.model.parameters() if p.requires_grad] for each in (one, other)]
    assert shared <= {id(p) for p in one.model.parameters()} and not shared & {id(p) for p in trained[0]}
    assert all(torch.equal(weight, before[name]) for name, weight in base.named_parameters())
    assert not all(map(torch.equal, *trained))


def test_at_full_size_every_row_has_the_device_to_itself_and_one_that_does_not_fit_says_so(tiny_step, monkeypatch):
    monkeypatch.setattr(
        subjects, "make_ours", lambda name, *rest: make_ours(name, *rest) if name != "dora" else full_up()
    )
    flags = ["--shape", "full", "--k", "2", "--rank", "4", "--repeats", "1", "--names", "floor", "dora", "hellora"]
    rows = {row["name"]: row for row in bench.main(["step", *flags])}
    assert rows["dora"]["note"] == "out of memory" and rows["dora"]["samples_per_s"] is None
    assert rows["floor"]["batch"] == 16 and rows["hellora"]["over_floor"] > 0


def full_up():
    raise torch.OutOfMemoryError


@pytest.mark.parametrize("flags", [["--k", "9"], ["--json", f"{__file__}/rows.json"], ["--names", "qlora"]], ids=str)
def test_wrong_flags_of_step_are_refused(tiny_step, flags):
    with pytest.raises(InputError, match=flags[1]):
        bench.main(["step", *flags])


# ------------------------------------------------------------------------------------------ bench.py full and plan


@pytest.fixture
def small_full(monkeypatch):
    """`bench.py full` on a model of a few thousand weights: the same commands, shards and plan."""
    monkeypatch.setattr(full, "SHAPE", {**full.SHAPE, "hidden_size": 64, "intermediate_size": 32, "vocab_size": 1088})
    monkeypatch.setattr(full, "SHARD_BYTES", 10**5)


def test_the_full_size_is_written_in_shards_loaded_profiled_and_trained(small_full, tmp_path, capsys):
    flags = [*"full --layers 3 --steps 5 --keep-at".split(), str(tmp_path / "kept")]
    row = bench.main([*flags, "--json", str(tmp_path / "row.json")])
    assert json.loads((tmp_path / "row.json").read_text()) == row
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype="auto")  # all weights, or it says so
    assert hf.dtype == torch.bfloat16 and hf.config.num_hidden_layers == 3
    assert row["bytes"] == sum(p.nbytes for p in hf.parameters())
    files = sorted((tmp_path / "kept").glob("*.safetensors"))
    assert len(files) > 1 and all(file.stat().st_size < 3e5 for file in files)
    assert len(row["losses"]) == len(row["seconds"]) == 5
    assert row["tokens_per_s"] == pytest.approx(sum(row["tokens"]) / sum(row["seconds"]))
    assert row["planned_bytes"] > row["bytes"] and row["peak_bytes"] >= row["resident_before_bytes"]
    assert "the plan of the model is" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists"):
        bench.main(flags)


def test_examples_of_the_full_size_are_those_of_the_workload():
    items = full.examples(5, 97)
    for item, batch in zip(items, make_batches(1, 5, 97, torch.device("cpu")), strict=True):
        labels = data.collate([item], 0).labels
        assert item.ids == batch.input_ids[0].tolist() and labels.equal(batch.labels)


def test_a_model_that_does_not_fit_is_refused_before_it_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr("machine.memory.available", lambda device: 10**9)
    with pytest.raises(InputError, match="memory: 1.0 GB are free, 1.5 GB are needed; give fewer --layers"):
        bench.main(["full", "--layers", "1", "--keep-at", str(tmp_path / "kept")])
    assert not (tmp_path / "kept").exists()


def test_the_plan_of_a_machine_without_a_gpu_says_memory_and_hours(capsys):
    flags = ["plan", "--cpu", "--micro-batch", "4", "--length", "256"]
    (row,) = bench.main(flags)
    assert row["fits"] and row["weights"] == 2 * 6_919_161_856 and row["sent_per_step"] == 0
    (half,) = bench.main([*flags, "--memory", "12", "--tokens-per-s", "20"])
    assert not half["fits"]
    assert not bench.main([*flags, "--memory", "18"])[0]["fits"]  # it peaks at 20 GB (docs/speed.md)
    assert half["hours"] == pytest.approx(7473 * 151.6 / 20 / 3600, rel=0.01)  # GSM8K
    assert f"takes {half['hours']:.1f} hours" in capsys.readouterr().out
    for wrong in ([*flags, "--gpus", "2"], ["plan", "--tokens-per-s", "20"]):
        with pytest.raises(InputError, match="--cpu"):
            bench.main(wrong)


def test_growth_is_the_time_of_each_repetition_over_that_of_the_frozen_base(monkeypatch, tmp_path):
    """Made-up steps: the base takes 1 s and then 2 s in a repetition, a row k or r tenths of that longer."""

    def measure(settings: step.Settings, batch: int, num_experts: int = 64) -> list[dict]:
        longer = {"floor": 0, "lora": settings.rank * num_experts / 64, "hellora": settings.rank / 2} | growth.BY_NUMBER
        return [{"name": n, "seconds": [1 + longer[n] / 10, 2 + longer[n] / 5] * 3} for n in settings.names]

    monkeypatch.setattr(step, "measure", measure)
    made = growth.main(["--repeats", "3", "--json", str(tmp_path / "g.json"), "--plot", str(tmp_path / "g.png")])
    found = {(point["series"], point["line"], point["value"]): point for point in made}
    assert found["k", "hellora", 16]["mean"] == pytest.approx(2.6) and found["k", "hellora", 16]["half"] < 1e-9
    assert [found["rank", "lora", r]["mean"] for r in (2, 8, 32)] == pytest.approx([1.2, 1.8, 4.2])
    assert [found["experts", "lora", E]["mean"] for E in (16, 64, 128)] == pytest.approx([1.2, 1.8, 2.6])
    assert found["batch", "hellora", 32]["mean"] == pytest.approx(1.4)
    assert json.loads((tmp_path / "g.json").read_text()) == made and (tmp_path / "g.png").stat().st_size > 10_000
