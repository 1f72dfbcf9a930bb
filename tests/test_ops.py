"""The fast versions in ops/ against the reference formulas, and adapted gradients against transformers and autograd."""

import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import call, hf_name, words
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import hellora
import lora
import model as model_module
import ops
import train
from command.errors import InputError
from hub.config import FAMILIES
from hub.weights import init_weights
from lab.benchmarks.measure import allocated_peak, saved_bytes
from model import MoEConfig, MoETransformer, load_model
from ops.experts import whole_tiles
from ops.lora import lora_recomputing

ROOT = Path(__file__).parent.parent
COUNTS = [3, 0, 5, 1, 2]  # rows of each of G = 5 groups, of which the first n are hot
PLAIN = {name: module for module in (model_module, lora) for name in ops.OPTIMISED if name in vars(module)}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_device = pytest.mark.parametrize("devices", [("cuda",), ("cpu",)], ids=["loop", "one kernel"])


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()


def ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


def gradients(model: MoETransformer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def adapted_model(folder, kind: str, dropout: float = 0.0) -> MoETransformer:
    """A family's model with random factors on two or three experts per layer, attention, router, shared experts."""
    model = load_model(folder)
    hot = torch.zeros(len(model.config.moe_layers), model.config.num_experts, dtype=torch.bool)
    hot[:, [1, 4]] = hot[0, 5] = True
    hellora.attach(model, hot, 8, 12.0, kind=kind, targets="shared", dropout=dropout)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


IDS = torch.randint(2, 50, (5, 11), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.rand(5, 11, generator=torch.Generator().manual_seed(1)) < 0.6, IDS.roll(-1, 1), -100)
LENGTHS = torch.tensor([7, 11, 1, 4, 9])


# ------------------------------------------------------------------------------------ plain and fast, by name


def test_every_fast_version_has_a_reference_with_its_arguments():
    assert PLAIN.keys() == set(ops.OPTIMISED)
    for name, module in PLAIN.items():
        fast, plain = getattr(ops, name), vars(module)[name]
        assert (
            fast is not plain
            and inspect.signature(fast).parameters.keys() == inspect.signature(plain).parameters.keys()
        )


@every_device
@pytest.mark.parametrize("kind", [*hellora.KINDS, "all weights"])
@every_family
def test_fast_versions_give_the_values_and_gradients_of_the_reference_formulas(
    make_checkpoint, monkeypatch, family, kind, devices
):
    folder, results = make_checkpoint(family).folder, []
    for plain in (False, True):
        model = load_model(folder) if kind == "all weights" else adapted_model(folder, kind)
        monkeypatch.setattr("ops.kernels.ONE_KERNEL", devices)
        for name, module in PLAIN.items() if plain else ():
            monkeypatch.setattr(ops, name, vars(module)[name])
        loss, selected = model(IDS, LENGTHS, labels=LABELS)
        loss.backward()
        results.append((loss, selected, gradients(model)))
    (loss, selected, grads), (want_loss, want_selected, want_grads) = results
    assert selected.equal(want_selected) and grads.keys() == want_grads.keys()
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        scale = want_grads[name].abs().max().item()
        torch.testing.assert_close(grad, want_grads[name], atol=1e-5 * scale, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_a_run_on_the_reference_formulas_has_the_losses_of_the_fast_versions(all_rows, base, tmp_path):
    flags = words("--model", base, "--method hellora --k 2 --rank 2 --lr 0.01 --batch 2")
    flags += words("--steps 4 --sample 0.01 --lora-dropout 0.1")
    call(train, flags, "--out", tmp_path / "fast")
    script = f"import lora, model, ops, train; train.main({[*flags, '--out', str(tmp_path / 'plain')]})"
    for name, module in PLAIN.items():
        script += f"; assert ops.{name} is {module.__name__}.{name}"
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"HELLORA_PLAIN": "1"}, check=True, cwd=ROOT)
    logs = [(tmp_path / mode / "log.jsonl").read_text().splitlines() for mode in ("fast", "plain")]
    fast, plain = ([json.loads(line)["loss"] for line in log] for log in logs)
    assert len(fast) == 4 and fast == pytest.approx(plain, rel=1e-5) and fast != plain


def written_out(model: MoETransformer, sum_of: Callable) -> dict[str, torch.Tensor]:
    """transformers' adapted weights by name. sum_of(W, pair, name of the pair) gives one with its adapter in it."""
    weights, family = {}, model.config.model_type
    for name, module in model.named_modules():
        if isinstance(module, lora.LoRALinear):
            weights[hf_name(f"{name}.weight", family)] = sum_of(module.weight, module, name)
        elif isinstance(module, lora.LoRAExperts):
            Ws = {p: sum_of(W, module.lora[p], f"{name}.lora.{p}") for p, W in module.hot_weights().items()}
            hot_rows = {
                "gate_up_proj": torch.cat((Ws["gate_proj"], Ws["up_proj"]), dim=1),
                "down_proj": Ws["down_proj"],
            }
            back = torch.tensor(module.expert_ids).argsort()  # attach moved the hot experts to the front
            for stack, rows in hot_rows.items():
                full = torch.cat((rows, getattr(module, stack)[module.num_hot :].detach()))
                weights[hf_name(f"{name}.{stack}", family)] = full[back]
    return weights


@pytest.mark.parametrize("kind", hellora.KINDS)
@every_family
def test_gradients_of_every_adapted_module_are_autograds_on_transformers_with_the_weights_written_out(
    make_checkpoint, family, kind
):
    """transformers computes with W + (alpha / r) B A (DoRA: its rows scaled), and autograd goes back to A, B and m."""
    checkpoint = make_checkpoint(family)
    model = adapted_model(checkpoint.folder, kind)
    loss, _ = model(IDS, LENGTHS, labels=LABELS)
    loss.backward()

    def sum_of(W, pair, name):
        A, B = pair.lora_A.detach().requires_grad_(), pair.lora_B.detach().requires_grad_()
        leaves[f"{name}.lora_A"], leaves[f"{name}.lora_B"] = A, B
        V = W.detach() + pair.scaling * B @ A
        if kind == "dora":
            leaves[f"{name}.lora_m"] = m = pair.lora_m.detach().requires_grad_()
            V = m.unsqueeze(-1) * V / V.detach().norm(dim=-1, keepdim=True)
        return V

    leaves = {}
    weights = written_out(model, sum_of)
    assert weights.keys() <= dict(checkpoint.hf.named_parameters()).keys()
    mask = (torch.arange(11) < LENGTHS[:, None]).long()
    logits = functional_call(checkpoint.hf, weights, (IDS,), {"attention_mask": mask}).logits
    labels = torch.where(mask.bool(), LABELS, -100)
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-4)
    trained = {name: leaf for name, leaf in leaves.items() if kind != "lori" or not name.endswith("lora_A")}
    grads = gradients(model)
    assert grads.keys() == trained.keys()
    for name, want_grad in zip(trained, torch.autograd.grad(want, list(trained.values())), strict=True):
        scale = want_grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(grads[name], want_grad, atol=2e-5 * scale, rtol=1e-3, msg=lambda m, n=name: n + m)


# ------------------------------------------------------------------------------------------- one function each


@every_device
@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 0, 4, 7], [0, 0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype, fan_in, fan_out, r", [(torch.float64, 7, 6, 2), (torch.float32, 12, 20, 4)], ids=str)
def test_adapted_groups_have_the_gradients_of_the_plain_formula_also_without_rows(
    monkeypatch, dtype, fan_in, fan_out, r, counts, n, devices
):
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", devices)
    source = draw(sum(counts), fan_in, dtype=dtype)
    W = draw(len(counts), fan_out, fan_in, dtype=dtype).detach()
    A, B = draw(n, r, fan_in, dtype=dtype), draw(n, r, fan_out, dtype=dtype)
    upstream, num_rows = draw(sum(counts), fan_out, dtype=dtype).detach(), sum(counts[:n])
    recompute = lambda rows, source: source[rows].tanh()  # noqa: E731
    made_by = (recompute, source[:num_rows].detach())
    y = lora_recomputing(source.tanh(), W, A, B, ends(counts), num_rows, 0.0, *made_by)
    want = torch.cat(
        [x @ (W[g] + B[g].T @ A[g] if g < n else W[g]).T for g, x in enumerate(source.tanh().split(counts))]
    )
    torch.testing.assert_close(y, want)
    plain = lora.lora_grouped_linear(source.tanh(), W, [(A, B.mT)], ends(counts), num_rows, 0.0)
    torch.testing.assert_close(plain, want)
    grads = torch.autograd.grad(y, (source, A, B), upstream)  # raises if one of them is None
    want_grads = torch.autograd.grad(want, (source, A, B), upstream, materialize_grads=True)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, want_grad)


GROUPED = [
    (torch.float32, 12, 20, True),
    (torch.bfloat16, 16, 24, True),
    (torch.float32, 12, 18, False),
    (torch.float32, 14, 20, False),
    (torch.bfloat16, 12, 24, False),
    (torch.float64, 12, 20, False),
]


@every_device
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 9, 0, 0], [18, 0, 33, 5], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype, fan_in, fan_out, fast", GROUPED, ids=str)
def test_grouped_linear_equals_one_product_per_group_on_both_of_its_paths(
    monkeypatch, dtype, fan_in, fan_out, fast, counts, devices
):
    calls, grouped_mm = [], F.grouped_mm
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", devices)
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or grouped_mm(*args, **kwargs))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), fan_in, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), fan_out, fan_in, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(sum(counts), fan_out, generator=generator).to(dtype)
    y = ops.grouped_linear(x, weight, torch.tensor(counts).cumsum(0, dtype=torch.int32))
    assert bool(calls) == (fast and sum(counts) > 0 and (devices == ("cpu",) or dtype == torch.float32))
    assert y.shape == (sum(counts), fan_out) and y.dtype == dtype
    x_grad, weight_grad = torch.autograd.grad(y, (x, weight), upstream)  # raises if an idle group had none
    start = 0
    for g, count in enumerate(counts):
        rows = slice(start, start := start + count)
        w, tolerance = weight[g].double(), {"atol": 0.1, "rtol": 0.02} if dtype == torch.bfloat16 else {}
        want = [x[rows].double() @ w.T, upstream[rows].double() @ w, upstream[rows].double().T @ x[rows].double()]
        for got, expected in zip((y[rows], x_grad[rows], weight_grad[g]), want, strict=True):
            torch.testing.assert_close(got, expected.to(dtype), **tolerance)


@every_device
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("way", ["expanded", "transposed", "strided"])
def test_rows_and_gradients_need_not_lie_side_by_side_in_memory(monkeypatch, way, adapted, devices):
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", devices)
    R, n, dtype, num_rows = sum(COUNTS), 3, torch.float32, sum(COUNTS[:3])
    W, A, B = draw(5, 20, 12, dtype=dtype), draw(n, 4, 12, dtype=dtype), draw(n, 4, 20, dtype=dtype)

    def laid_out(width: int) -> torch.Tensor:
        shape = {"expanded": (1, width), "transposed": (width, R), "strided": (R, 2 * width)}[way]
        drawn = draw(*shape, dtype=dtype).detach()
        return drawn.expand(R, width) if way == "expanded" else drawn.mT if way == "transposed" else drawn[:, ::2]

    results = []
    for change in (lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)):
        x, upstream = (change(laid_out(width)) for width in (12, 20))
        x, offsets = x.requires_grad_(), ends(COUNTS)
        if adapted:
            made_by = (lambda rows, source: source[rows].contiguous(), x.detach()[:num_rows])
            y, leaves = lora_recomputing(x, W.detach(), A, B, offsets, num_rows, 0.0, *made_by), (x, A, B)
        else:
            y, leaves = ops.grouped_linear(x, W, offsets), (x, W)
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("counts", [[19, 0, 5, 33, 2], [1, 16, 295, 0, 0], [0, 0, 0, 7, 21]], ids=str)
def test_products_in_bfloat16_take_whole_tiles_of_rows_and_give_what_the_groups_alone_give(monkeypatch, counts, n):
    sizes, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, *args, **kwargs: sizes.append(len(x)) or mm(x, *args, **kwargs))
    R, num_rows = sum(counts), sum(counts[:n])
    source, W = draw(R, 16, dtype=torch.bfloat16), draw(len(counts), 24, 16, dtype=torch.bfloat16).detach()
    A, B = draw(n, 4, 16, dtype=torch.bfloat16), draw(n, 4, 24, dtype=torch.bfloat16)
    upstream = draw(R, 24, dtype=torch.bfloat16).detach()
    made_by = (lambda rows, source: source[rows].tanh(), source[:num_rows].detach())

    def results() -> tuple[torch.Tensor, ...]:
        y = lora_recomputing(source.tanh(), W, A, B, ends(counts), num_rows, 0.0, *made_by)
        return y, *torch.autograd.grad(y, (source, A, B), upstream)

    whole_tiles, products = results(), len(sizes)
    with monkeypatch.context() as patch:
        patch.setattr("ops.experts.whole_tiles", lambda rows, end, x: rows)
        groups_alone = results()
    assert (sizes[0], sizes[products]) == (-(-counts[0] // 16) * 16, counts[0])
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", ("cpu",))  # one kernel takes the rank of 4 as 8
    for found, as_on_a_gpu, alone in zip(whole_tiles, results(), groups_alone, strict=True):
        torch.testing.assert_close(found, alone, rtol=0.02, atol=0.02)
        torch.testing.assert_close(as_on_a_gpu, alone, rtol=0.02, atol=0.04)  # rounded once more, between W and B


@pytest.mark.parametrize("r", [3, 5, 8])
def test_a_rank_that_is_no_multiple_of_16_bytes_is_filled_up_and_takes_one_kernel(monkeypatch, r):
    x, W = draw(11, 8, dtype=torch.float32), draw(5, 12, 8, dtype=torch.float32).detach()
    A, B = draw(3, r, 8, dtype=torch.float32), draw(3, r, 12, dtype=torch.float32)
    looped = lora_recomputing(x, W, A, B, ends(COUNTS), 8, 0.0, lambda rows, x: x[rows], x[:8].detach())
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", ("cpu",))
    monkeypatch.setattr("ops.lora.LoRAByLoop", None)
    y = lora_recomputing(x, W, A, B, ends(COUNTS), 8, 0.0, lambda rows, x: x[rows], x[:8].detach())
    torch.testing.assert_close(y, looped)
    for found, expected in zip(*(torch.autograd.grad(each.sum(), (x, A, B)) for each in (y, looped)), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_tile_has_at_most_an_eighth_of_many_rows_and_there_are_few_sizes():
    x = torch.empty(0, dtype=torch.bfloat16)
    sizes = {n: whole_tiles(slice(0, n), 10**6, x).stop for n in range(1, 5000)}
    assert all(n <= size <= max(n + 15, n * 9 / 8) for n, size in sizes.items())
    assert len({*sizes.values()}) < 60
    assert whole_tiles(slice(3, 20), 34, x) == slice(3, 20) and whole_tiles(slice(3, 20), 35, x) == slice(3, 35)


def test_no_gradient_is_computed_for_an_input_that_nothing_trained_made():
    """As in the first layer, where the products with frozen weights are as large as those of the forward pass."""
    x, W, A, B = draw(11, 7).detach(), draw(5, 6, 7).detach(), draw(3, 2, 7), draw(3, 2, 6)
    y = lora_recomputing(x, W, A, B, ends(COUNTS), 8, 0.0, lambda rows, x: x[rows], x[:8])
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 8 * 2 * (6 + 7 + 6)  # B's input, A, B


@pytest.mark.parametrize("rows", [1, 4, 256])
@pytest.mark.parametrize("targets", [0, 9])
def test_the_loss_in_slices_is_the_cross_entropy(monkeypatch, targets, rows):
    monkeypatch.setattr("ops.head.HEAD_ROWS", rows)
    x, W, target = draw(targets, 5), draw(13, 5), torch.arange(targets) * 3 % 13
    loss = ops.target_loss(x, W, target)
    want = F.cross_entropy(x @ W.T, target, reduction="sum")
    torch.testing.assert_close(loss, want)
    for grad, want_grad in zip(
        torch.autograd.grad(3 * loss, (x, W)), torch.autograd.grad(3 * want, (x, W)), strict=True
    ):
        torch.testing.assert_close(grad, want_grad)
    x.requires_grad_(False)
    assert ops.target_loss(x, W.detach(), target).equal(loss.detach())


def test_the_loss_makes_no_gradients_when_they_are_off():
    """On a frozen 7-billion-parameter model, counting experts would otherwise take 0.6 GB for nothing."""
    x, W = draw(3, 16, dtype=torch.float32), draw(5000, 16, dtype=torch.float32)
    with torch.no_grad():
        peak = allocated_peak(lambda: ops.target_loss(x, W, torch.arange(3)), torch.device("cpu"))
    assert peak < W.nbytes  # logits of three targets


def test_the_loss_never_holds_more_logits_than_a_slice(monkeypatch):
    monkeypatch.setattr("ops.head.HEAD_ROWS", 4)
    x, W, target, seen = draw(30, 5, dtype=torch.float32), draw(1000, 5, dtype=torch.float32), torch.arange(30), []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: seen.append(linear(*args)) or seen[-1])
    ops.target_loss(x, W, target)
    assert [len(logits) for logits in seen] == [4] * 7 + [2]


# ------------------------------------------------------------------------------------------- memory of a whole model

SHAPE = dict(
    model_type="olmoe", vocab_size=61, hidden_size=128, intermediate_size=32, num_hidden_layers=3, num_experts=16,
    num_attention_heads=4, num_key_value_heads=4, num_experts_per_tok=4,
)  # fmt: skip
TEXT = torch.randint(0, 61, (3, 160), generator=torch.Generator().manual_seed(0))
TEXT_LENGTHS = torch.tensor([160, 124, 100])


def small_model() -> MoETransformer:
    model = MoETransformer(MoEConfig.from_dict(SHAPE))
    init_weights(model, std=0.05)
    return model


def attached(kind: str = "lora") -> MoETransformer:
    model, hot = small_model(), torch.zeros(3, 16, dtype=torch.bool)
    hot[:, 2:6] = True
    hellora.attach(model, hot, 4, 8.0, kind=kind)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    return model


def saved_floats(model: MoETransformer) -> int:
    return saved_bytes(lambda: model(TEXT, TEXT_LENGTHS, labels=TEXT)[0], model.parameters()) // 4


def test_an_adapter_does_not_keep_the_rows_of_hot_experts():
    frozen = small_model().requires_grad_(False)
    frozen.embed_tokens.register_forward_hook(lambda module, args, x: x.requires_grad_())
    T, L, D = int(TEXT_LENGTHS.sum()), 3, 128
    # Per layer and token, the inputs of q, k and v, of o_proj, and of router and experts: D floats each. The rest has
    # the size of the rank. Keeping the hot rows of gate and up would be about one D more.
    assert saved_floats(attached()) - saved_floats(frozen) < L * T * 3.5 * D


def test_compiled_formulas_give_the_same_loss_and_gradients_and_are_not_compiled_again_for_other_sizes():
    def results(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        model, ids = attached(), TEXT[: len(lengths), : max(lengths)]
        loss, _ = model(ids, torch.tensor(lengths), labels=ids)
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    sizes = [(5, 4), (9, 7, 8), (11, 3), (6, 10, 12)]
    plain = [results(size) for size in sizes]
    compiled, graphs, called = [], [], Counter()
    functions = ops.compile_elementwise(torch.device("cpu"), torch.float32)

    def counting(name: str) -> Callable:
        return lambda *args: called.update([name]) or functions[name](*args)

    with ops.using({name: counting(name) for name in functions}):
        for size in sizes:
            compiled.append(results(size))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]
    # Per layer of the 3, one SwiGLU, two rotations and four norms; a norm at the end.
    assert called == {"weighted_swiglu": 4 * 3, "rotate": 4 * 6, "rms_norm": 4 * 13}
    assert ops.weighted_swiglu is ops.OPTIMISED["weighted_swiglu"]  # again
    for expected, got in zip(plain, compiled, strict=True):
        assert got["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
        assert all((got[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() for name in expected)


def test_without_a_compiler_compile_is_one_error(monkeypatch):
    def compile_in_vain(formula, dynamic, options):
        def run(*args):
            raise RuntimeError("no C++ compiler found\nand a long trace")

        return run

    monkeypatch.setattr(torch, "compile", compile_in_vain)
    with pytest.raises(InputError, match=r"^--compile needs a C\+\+ compiler .*\(no C\+\+ compiler found\)"):
        ops.compile_elementwise(torch.device("cpu"), torch.float32)
