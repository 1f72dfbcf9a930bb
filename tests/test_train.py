"""The training loop: the same run on one process and on two, what a run folder holds, and wrong input."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call, on_processes, read_json, read_lines, same, words, write_json
from safetensors.torch import load_file

import export
import hellora
import ops
import train
from command.cli import InputError
from hub.checkpoint import TINY
from model import load_model, read_config
from recipes.methods import METHODS, num_hot_experts
from routing import profiles
from run import adapters

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "flags",
    [
        "--method hellora --k 3 --micro-batch 2",  # 7 examples: 3 and 4 of them, in 2 micro-batches
        # 3 micro-batches on one process, 4 on two; AdamW turns rounding into steps of the size of the rate
        "--k 2 --micro-batch 3 --shard full --router-aux-loss 0.1 --lr 1e-4",
        "--method hellori-s --batch 1",  # the second process never has an example
        "--method hellori-s --shard full",
        "--method dora --experts cold --k 5 --count-on lora",
        "--method dr-lora --rank 4 --lr 1e-4 --shard full",
    ],
)
def test_two_processes_give_the_losses_and_the_adapter_of_one(base, tmp_path, flags):
    flags = words("--model", base, "--batch 7 --steps 3 --lr 1e-3 --sample 0.05", flags, "--out")
    call(train, flags, tmp_path / "one")
    on_processes(2, train.main, words(flags, tmp_path / "two"))
    one, two = (read_lines(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], abs=1e-5)
    assert [record["grad_norm"] for record in two] == pytest.approx([r["grad_norm"] for r in one], rel=1e-4)
    ours, theirs = (load_file(tmp_path / name / "adapter/adapter.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5


def test_activation_checkpointing_is_set_on_every_layer(base, tmp_path, monkeypatch):
    fit, models = train.fit, []

    def seen(run, model, out):
        models.append(model)
        return fit(run, model, out)

    monkeypatch.setattr(train, "fit", seen)
    for flags in ("", "--activation-checkpointing"):
        call(train, "--model", base, "--steps 1 --batch 2 --sample 0.01", flags, "--out", tmp_path / f"run{flags}")
    without, with_it = ([layer.activation_checkpointing for layer in model.layers] for model in models)
    assert not any(without) and all(with_it)


def test_same_seed_same_bits_and_another_seed_another_run(base, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        call(train, "--model", base, "--steps 2 --batch 5 --sample 0.05 --seed", seed, "--out", tmp_path / name)
    a, b, c = (load_file(tmp_path / name / "adapter/adapter.safetensors") for name in "abc")
    assert same(a, b)
    assert not any(torch.equal(a[name], c[name]) for name in a if name.endswith("lora_A"))


def test_a_run_learns_and_its_folder_holds_what_is_documented(tmp_path):
    result = call(train, "--steps 10 --batch 8 --k 4 --out", tmp_path / "run")
    assert result["last_loss"] < 0.8 * result["first_loss"]
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    beside = "config.json profile.json log.jsonl adapter.png loss.png result.json"
    assert files == {*beside.split(), "adapter/adapter.json", "adapter/adapter.safetensors"}
    config = read_json(tmp_path / "run/config.json")
    assert config["model"] == "tiny" and config["settings"]["rank"] == 8
    assert config["versions"].keys() == {"python", "torch", "numpy", "tokenizers", "jinja2", "safetensors"}
    assert all(re.match(r"\d+\.\d+", number) for number in config["versions"].values())
    about = read_json(tmp_path / "run/adapter/adapter.json")
    counts = profiles.load_profile(tmp_path / "run/profile.json").counts
    hot = hellora.select_experts("hot", counts, 4)
    assert about["hot"] == [row.nonzero().flatten().tolist() for row in hot]
    model = load_model(TINY)
    adapters.load_adapter(model, tmp_path / "run/adapter")
    assert sum(t.numel() for t in adapters.adapter_state(model).values()) == result["trainable"]


def test_the_paper_s_table_1_is_the_default_of_the_real_tasks():
    for task, lr, epochs in (("gsm8k", 4e-4, 3), ("codealpaca", 2e-3, 2), ("saferpaca", 4e-4, 1)):
        args = train.parse_settings(["--task", task])
        assert (args.lr, args.epochs, args.batch) == (lr, epochs, 128)
        assert (args.rank, args.alpha, args.sample) == (32, 64.0, 0.1)
        full = train.parse_settings(["--task", task, "--method", "fft"])
        assert (full.lr, full.batch) == ({"gsm8k": 4e-5, "codealpaca": 2e-4, "saferpaca": 2e-5}[task], 256)
    config = read_config(TINY)
    assert config.num_experts_per_tok == 8  # so that k is 8 where it is not given


def test_the_auxiliary_loss_is_logged_and_balances(base, tmp_path):
    values = {}
    for weight in ("1.0", "1e-9"):
        flags = words("--steps 8 --batch 8 --sample 0.05 --router-aux-loss", weight)
        call(train, "--model", base, flags, "--out", tmp_path / weight)
        values[weight] = [record["aux_loss"] for record in read_lines(tmp_path / weight / "log.jsonl")]
    assert values["1.0"][0] == values["1e-9"][0]  # before the first step
    assert 1.0 < values["1.0"][-1] < 0.99 * values["1e-9"][-1]  # 1 is perfect balance of every layer


def test_full_fine_tuning_trains_every_weight_and_writes_a_checkpoint_with_all_that_the_base_had(tmp_path, capsys):
    base = shutil.copytree(TINY, tmp_path / "base", ignore=lambda *_: ["make.py", "README.md"])
    (base / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    flags = words("--method fft --steps 2 --batch 4 --lr 0.05 --out", tmp_path / "run", "--model", base)
    result = call(train, flags, "--save-dtype bfloat16")
    assert "answers end with '<|endoftext|>' (id 0)" in capsys.readouterr().out
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "run/model" / name).read_bytes() == (base / name).read_bytes()
    assert {tensor.dtype for tensor in load_file(tmp_path / "run/model/model.safetensors").values()} == {torch.bfloat16}
    before, after = load_model(TINY), load_model(tmp_path / "run/model")
    assert result["trainable_percent"] == 100
    assert not any(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_stage_d_of_hellori_s_is_a_run_of_hellori_d(base, tmp_path):
    flags = words("--model", base, "--steps 2 --batch 4 --sample 0.05 --rank 4")
    call(train, flags, "--method hellori-s --out", tmp_path / "both")
    call(train, flags, "--method hellori-d --out", tmp_path / "d")
    folders = (tmp_path / "both/stage-d", tmp_path / "d")
    first, alone = (load_file(folder / "adapter/adapter.safetensors") for folder in folders)
    assert same(first, alone)


def test_experts_can_be_listed_in_a_file_or_given_as_a_share(tmp_path):
    lists = [[3], [5, 1], [], [0, 63, 62]]
    write_json(tmp_path / "hot.json", lists)
    flags = "--steps 1 --batch 2 --sample 0.01"
    call(train, flags, "--experts", tmp_path / "hot.json", "--out", tmp_path / "listed")
    about = read_json(tmp_path / "listed/adapter/adapter.json")
    assert about["hot"] == [sorted(ids) for ids in lists]
    assert num_hot_experts(train.parse_settings(["--k", "0.1"]).k, 64, 8) == 6
    assert num_hot_experts(METHODS["moe-sieve"].k, 60, 4) == 15
    assert num_hot_experts(None, 64, 8) == 8


def test_init_adapter_goes_on_from_a_run_or_from_what_peft_saved(base, tmp_path):
    call(
        train,
        "--model",
        base,
        "--batch 4 --sample 0.05 --k 2 --steps 3 --lr 0.02 --rank 4 --alpha 6 --out",
        tmp_path / "first",
    )
    before = load_file(tmp_path / "first/adapter/adapter.safetensors")
    call(export, tmp_path / "first", "--to peft --out", tmp_path / "peft")
    once, losses = "--batch 4 --sample 0.05 --steps 1 --lr 1e-12 --seed 9 --out", set()  # the base is the adapter's
    for source in ("first", "first/adapter", "peft"):
        out = tmp_path / f"from-{source.replace('/', '-')}"
        losses.add(call(train, once, out, "--init-adapter", tmp_path / source)["first_loss"])
        after = load_file(out / "adapter/adapter.safetensors")
        assert after.keys() == before.keys()
        assert all(torch.allclose(after[name], before[name], atol=1e-8) for name in before)
        content = read_json(out / "adapter/adapter.json")
        assert (content["r"], content["alpha"]) == (4, 6.0)
    shutil.move(tmp_path / "first/adapter", tmp_path / "alone")
    with pytest.raises(InputError, match="does not say which model it adapts; add --model"):
        call(train, once, tmp_path / "nothing", "--init-adapter", tmp_path / "alone")
    alone = words("--model", base, "--init-adapter", tmp_path / "alone")
    losses.add(call(train, once, tmp_path / "from-alone", alone)["first_loss"])
    (loss,) = losses
    fresh = call(train, once, tmp_path / "fresh", "--k 2 --model", base)
    assert loss < fresh["first_loss"] - 0.05  # it had learnt something


def test_compiled_formulas_are_used_until_the_run_ends(base, tmp_path, monkeypatch):
    plain, called = ops.weighted_swiglu, []
    compiled = {"weighted_swiglu": lambda *args: called.append(1) or plain(*args)}
    monkeypatch.setattr(ops, "compile_elementwise", lambda device, dtype: compiled)
    call(train, "--model", base, "--batch 4 --sample 0.05 --steps 1 --compile --out", tmp_path / "run")
    assert called and ops.weighted_swiglu is plain


def test_compile_contradicts_the_plain_formulas(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "PLAIN", True)
    with pytest.raises(InputError, match="HELLORA_PLAIN=1"):
        call(train, "--compile --out", tmp_path / "run")
