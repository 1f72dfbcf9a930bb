"""What a GPU will be asked for, without one: the kit that measures it, rehearsed, and how often it is waited for."""

import json
import sys
import traceback
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import hellora
import lora
import ops
from command.cli import InputError, RunError
from data import Batch
from hub.config import PRESETS
from hub.weights import init_weights
from lab.benchmarks import gpu, gpu_checks
from lab.benchmarks.flops import model_flops
from model import MoEConfig, MoETransformer, grouped_linear, lay_out

TINY = {
    **PRESETS["olmoe-1b-7b"], "vocab_size": 97, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def tiny_size(monkeypatch):
    monkeypatch.setitem(gpu.SIZES, "small", gpu.Size(TINY, k=2, rank=8, batch=3, steps=2, prompts=2, matmul=64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: `make gpu` is the test")
def test_the_kit_runs_from_the_first_check_to_the_last_table(tiny_size, tmp_path, capsys):
    found = bench.main(["gpu", "--device", "cpu", "--shape", "small", "--json", str(tmp_path / "gpu.json")])
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    assert all(check["passed"] for check in found["checks"]) and len(found["checks"]) > 20
    rows = {row["name"]: row for row in found["steps"]}
    assert list(rows) == list(gpu.NAMES) and rows["floor"]["over_floor"] == 1
    assert all(row["peak_bytes"] > rows["floor"]["peak_bytes"] for row in found["steps"][1:])
    assert all(rows[name]["planned_bytes"] for name in ("hellora", "lora", "dora"))
    assert [row["name"] for row in found["decoding"]] == ["hellora", "transformers"]
    said = capsys.readouterr().out
    assert said.count("not counted on a CPU") >= len(rows) and "FAILED" not in said


def test_a_peer_that_is_missing_or_too_large_is_a_row_that_says_so(monkeypatch):
    base = gpu.our_model(TINY, torch.device("cpu"), gpu.DTYPE)
    size = gpu.Size(TINY, k=2, rank=8, batch=3, steps=1, prompts=2, matmul=64)
    monkeypatch.setattr(gpu, "NAMES", ("dora", "peft-all"))
    monkeypatch.setattr(gpu, "make_ours", lambda *of: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    monkeypatch.setitem(sys.modules, "peft", None)
    rows = gpu.measure_all(base, size, 1.0)
    assert [row["note"] for row in rows] == ["out of memory", "peft is not installed"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert gpu.measure_decoding(base, size)[1]["note"] == "transformers is not installed"


def test_a_check_that_raises_or_is_off_fails_the_kit_and_the_others_still_run(tiny_size, monkeypatch, capsys):
    def off(device):
        yield gpu_checks.Check("off", float("nan"), 1.0)

    def broken(device):
        raise ZeroDivisionError

    monkeypatch.setattr(
        gpu, "run_checks", lambda device: gpu_checks.run_checks(device, (off, broken, gpu_checks.no_token))
    )
    monkeypatch.setattr(gpu, "measure_all", lambda *of: [])
    monkeypatch.setattr(gpu, "measure_decoding", lambda *of: [])
    with pytest.raises(RunError, match="2 of 3 checks failed: off, broken: see the traceback"):
        gpu.main(["--device", "cpu", "--shape", "small"])
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error_that_names_the_rehearsal():
    with pytest.raises(InputError, match="add --device cpu --shape small"):
        gpu.main([])


def test_waits_are_counted_by_line(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work():
        for message in ("called a synchronizing CUDA operation", "called a synchronizing CUDA operation", "other"):
            warnings.warn(message, stacklevel=1)

    line = work.__code__.co_firstlineno + 2
    assert gpu.host_waits(work, torch.device("cuda")) == {f"test_gpu.py:{line}": 2} and modes == ["warn", "default"]
    assert gpu.host_waits(work, torch.device("cpu")) is None


# ------------------------------------------------------------------------------------------------ waiting for a GPU


@pytest.mark.parametrize(
    "kind, num_hot, checkpointing, dropout",
    [(kind, n, False, 0.0) for kind in lora.KINDS for n in (5, 16)]
    + [("lora", 0, False, 0.0), ("lora", 5, True, 0.0), ("lora", 5, False, 0.25)],
)
def test_the_layers_wait_for_a_gpu_once_each_if_some_experts_are_cold_and_else_never(
    monkeypatch, kind, num_hot, checkpointing, dropout
):
    """On the meta device, on which every number that is read back is an error: forward and backward of all layers."""
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", ("meta",))  # as on a GPU
    with torch.device("meta"):
        model = MoETransformer(gpu_checks.CONFIG)
    if num_hot:
        dropped = ops.Dropout(dropout, 3)
        hot = (torch.arange(16) < num_hot).expand(3, -1)
        hellora.attach(model, hot, 8, 16.0, kind=kind, dropout=dropped if dropout else None)
        dropped.see(["a", "b", "c"], torch.tensor([37, 7, 20]), "meta")
    model = model.to("meta", torch.bfloat16).train()
    model.embed_tokens.register_forward_hook(lambda module, ids, x: x.detach().requires_grad_())
    reads, real = [], torch.Tensor.__int__

    def read(tensor: torch.Tensor) -> int:
        if not tensor.is_meta:
            return real(tensor)
        reads.append(traceback.extract_stack(limit=2)[0].name)
        return 5

    monkeypatch.setattr(torch.Tensor, "__int__", read)
    lengths = torch.tensor([37, 7, 20])
    layout = lay_out(model.config, model.embed_tokens.weight, 37, lengths, None)
    x = model.embed_tokens(torch.zeros(3 * 37, dtype=torch.int64, device="meta")[layout.index])
    for i, layer in enumerate(model.layers):
        layer.activation_checkpointing = checkpointing
        x, *_ = layer(x, layout, i, None)
    x.sum().backward()
    assert reads == ["forward"] * (len(model.layers) * (1 + checkpointing) if num_hot == 5 else 0)


@pytest.mark.parametrize("to_embeddings", [True, False])
@pytest.mark.parametrize("family", ["olmoe", "deepseek", "qwen2_moe"])
def test_the_multiplications_of_a_step_are_those_that_torch_counts(monkeypatch, make_checkpoint, family, to_embeddings):
    """All but attention's own, which torch counts for every pair of positions: here each sequence has one."""
    config = MoEConfig.from_dict(json.loads((make_checkpoint(family).folder / "config.json").read_text()))
    monkeypatch.setattr(ops, "grouped_linear", grouped_linear)  # whose products torch's counter knows
    model = MoETransformer(config)
    init_weights(model, std=0.2)
    model.requires_grad_(False)
    attention = model.layers[0].self_attn  # with adapters, what they add to is the lowest that needs a gradient
    for module in [model.embed_tokens] if to_embeddings else [attention.q_proj, attention.k_proj, attention.v_proj]:
        module.register_forward_hook(lambda module, given, x: x.requires_grad_())
    ids = torch.arange(2, 32)[:, None]
    batch = Batch(ids, torch.ones(30, dtype=torch.int64), ids)
    with FlopCounterMode(display=False) as counter:
        model(batch.input_ids, batch.lengths, labels=batch.labels)[0].backward()
    want = pytest.approx(counter.get_total_flops(), rel=0.005)
    assert model_flops(config, batch, to_embeddings=to_embeddings) == want
