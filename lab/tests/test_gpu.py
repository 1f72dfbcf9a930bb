"""What a GPU will be asked for, without one: the kit that measures it, rehearsed, and how often it is waited for."""

import json
import traceback
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import hellora
import ops
from command.cli import InputError, RunError
from data import Batch
from hub.weights import init_weights
from lab.benchmarks import gpu
from lab.benchmarks.flops import model_flops
from lab.benchmarks.measure import host_waits
from lab.tests.test_device import CONFIG
from model import MoEConfig, MoETransformer, grouped_linear, lay_out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: `make gpu` is the test")
def test_the_kit_runs_the_tests_of_the_device_and_both_benchmarks(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(gpu.step, "main", lambda argv: calls.append(argv) or [{"name": "floor"}])
    monkeypatch.setattr(gpu.generate, "main", lambda argv: calls.append(argv) or [])
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda command, cwd: calls.append(command) or SimpleNamespace(returncode=0)
    )
    flags = ["gpu", "--device", "cpu", "--shape", "small", "--json", str(tmp_path / "gpu.json")]
    rows = bench.main(flags)
    assert json.loads((tmp_path / "gpu.json").read_text()) == rows and rows["steps"] == [{"name": "floor"}]
    assert calls[0][-3:] == ["lab/tests/test_device.py", "--device", "cpu"]
    assert all(argv[:4] == ["--shape", "small", "--dtype", "bfloat16"] for argv in calls[1:3])
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, cwd: SimpleNamespace(returncode=1))
    with pytest.raises(RunError, match="tests failed on CPU"):
        bench.main(flags)
    assert json.loads((tmp_path / "gpu.json").read_text())["passed"] is False


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
    assert host_waits(work, torch.device("cuda")) == {f"test_gpu.py:{line}": 2} and modes == ["warn", "default"]
    assert host_waits(work, torch.device("cpu")) is None


# ------------------------------------------------------------------------------------------------ waiting for a GPU


@pytest.mark.parametrize(
    "kind, num_hot, checkpointing, dropout",
    [(kind, n, False, 0.0) for kind in hellora.KINDS for n in (5, 16)]
    + [("lora", 0, False, 0.0), ("lora", 5, True, 0.0), ("lora", 5, False, 0.25)],
)
def test_the_layers_wait_for_a_gpu_once_each_if_some_experts_are_cold_and_else_never(
    monkeypatch, kind, num_hot, checkpointing, dropout
):
    """On the meta device, on which every number that is read back is an error: forward and backward of all layers."""
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", ("meta",))  # as on a GPU
    with torch.device("meta"):
        model = MoETransformer(CONFIG)
    if num_hot:
        hot = (torch.arange(16) < num_hot).expand(3, -1)
        hellora.attach(model, hot, 8, 16.0, kind=kind, dropout=dropout)
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
    expected = pytest.approx(counter.get_total_flops(), rel=0.005)
    assert model_flops(config, batch, to_embeddings=to_embeddings) == expected
