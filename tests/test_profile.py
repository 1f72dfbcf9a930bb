"""profile.py: what it counts is what transformers' router chooses, for real tokens, in one process or two."""

import math
import random
from datetime import timedelta
from pathlib import Path

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from conftest import call, on_processes, read_json, words, write_json
from test_model import ask_transformers

import data
import hellora
import profile
from command import cli
from hub.config import FAMILIES
from machine.processes import end_processes, start_processes
from model import MoEConfig, MoETransformer, load_model, read_config
from routing import profiles, statistics

LENGTHS = (5, 2, 11, 3, 8, 1, 7)  # of the sequences; 7 sequences do not divide evenly by 2 batches or 2 processes
WARMUP = dict(r=3, alpha=7.0, lr=0.05)  # a rate at which routing has changed by the second step


def make_items(vocab_size: int) -> list[data.Encoded]:
    """Random token ids; half of each sequence is its prompt, and the one of length 1 has no target."""
    draw = random.Random(5)
    return [data.Encoded([draw.randrange(2, vocab_size) for _ in range(n)], ((max(1, n // 2), n),)) for n in LENGTHS]


def make_batches(items: list[data.Encoded], size: int, pad_id: int = 1) -> list[data.Batch]:
    return [data.collate(items[i : i + size], pad_id) for i in range(0, len(items), size)]


@torch.no_grad()
def plain_routing(hf, items: list[data.Encoded], config: MoEConfig) -> tuple[list, list]:
    """Counts and gate mass, token by token, from transformers' router logits of each sequence alone."""
    counts, mass = ([[0] * config.num_experts for _ in config.moe_layers] for _ in range(2))
    top_k, renormalise = config.num_experts_per_tok, config.norm_topk_prob or config.topk_before_softmax
    for item in items:
        _, _, layers = ask_transformers(hf, torch.tensor([item.ids]))
        for layer, router_logits in enumerate(layers):
            for logits in router_logits[0].tolist():  # of one token
                exps = [math.exp(x) for x in logits]
                chosen = sorted(range(len(logits)), key=lambda e: -logits[e])[:top_k]
                total = sum(exps[e] for e in chosen) if renormalise else sum(exps)
                for e in chosen:
                    counts[layer][e] += 1
                    mass[layer][e] += exps[e] / total
    return counts, mass


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_and_gate_mass_are_those_of_transformers_router(make_checkpoint, family):
    checkpoint = make_checkpoint(family)
    config = read_config(checkpoint.folder)
    items = make_items(config.vocab_size)
    counted = profile.profile_routing(load_model(checkpoint.folder), make_batches(items, 3))
    counts, mass = plain_routing(checkpoint.hf, items, config)
    assert counted.counts.dtype == torch.int64 and counted.counts.tolist() == counts
    assert counted.gate_mass.dtype == torch.float64
    torch.testing.assert_close(counted.gate_mass, torch.tensor(mass, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert (counted.num_tokens, counted.num_experts_per_tok) == (sum(LENGTHS), config.num_experts_per_tok)
    assert profile.count_experts(load_model(checkpoint.folder), make_batches(items, 3)).tolist() == counts


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_model_as_it_was_and_runs_no_lm_head(olmoe, training):
    model = load_model(olmoe.folder).train(training)
    calls = []  # rows, training mode and gradient mode of every call of the norm before the head
    model.norm.register_forward_pre_hook(
        lambda head, args: calls.append((len(args[0]), head.training, torch.is_grad_enabled()))
    )
    profile.profile_routing(model, make_batches(make_items(model.config.vocab_size), 3))
    assert set(calls) == {(0, False, False)}
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_no_token_at_all_is_an_input_error(olmoe):
    model = load_model(olmoe.folder)
    with pytest.raises(cli.InputError, match="no token"):
        profile.profile_routing(model, [])
    with pytest.raises(cli.InputError, match="no token"):
        profile.profile_warmup(with_lora(model), [], 3, **STEPS)


@pytest.mark.parametrize("value", [math.nan, 1e38])  # finite, but the router's logits overflow
def test_non_finite_routing_weights_are_an_error_that_names_the_layer(olmoe, value):
    model = load_model(olmoe.folder)
    model.layers[2].mlp.gate.weight.data[3] = value
    with pytest.raises(cli.RunError, match="routing weights of layer 2 are NaN or infinite"):
        profile.count_experts(model, make_batches(make_items(model.config.vocab_size), 3))


# ----------------------------------------------------------------------------------------------------- warm-up


def plain_warmup(model, batches: list[data.Batch], r: int, alpha: float, lr: float, seed: int) -> list:
    """The same steps from whole logits and torch's mean cross-entropy, counted token by token."""
    config = model.config
    everything = torch.ones(config.num_hidden_layers, config.num_experts, dtype=torch.bool)
    hellora.attach(model, everything, r, alpha, seed=seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    counts = [[0] * config.num_experts for _ in range(config.num_hidden_layers)]
    for batch in batches:
        logits, selected_experts = model(batch.input_ids, batch.lengths)
        for layer, rows in enumerate(selected_experts.tolist()):
            for e in (e for row, n in zip(rows, batch.lengths, strict=True) for token in row[:n] for e in token):
                counts[layer][e] += 1
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
    hellora.detach(model)
    return counts


def with_lora(model) -> MoETransformer:
    everything = torch.ones(len(model.config.moe_layers), model.config.num_experts, dtype=torch.bool)
    hellora.attach(model, everything, WARMUP["r"], WARMUP["alpha"], seed=STEPS["seed"])
    return model


STEPS = {"lr": WARMUP["lr"], "seed": 3}


def test_warmup_counts_what_is_chosen_while_lora_on_every_expert_trains(olmoe):
    model = load_model(olmoe.folder)
    items = make_items(model.config.vocab_size)
    order = data.global_batches(len(items), 2, STEPS["seed"], epoch=0)
    batches = [data.collate([items[i] for i in chosen], 1) for chosen in order]
    before = profile.profile_routing(model, batches)
    warm = profile.profile_warmup(with_lora(model), items, 2, **STEPS)
    assert warm.counts.tolist() == plain_warmup(load_model(olmoe.folder), batches, **WARMUP, seed=STEPS["seed"])
    assert warm.counts.sum(-1).equal(before.counts.sum(-1)) and not warm.counts.equal(before.counts)
    fresh = with_lora(load_model(olmoe.folder))  # nothing is learnt yet when the first step counts
    first = profile.profile_warmup(fresh, items, len(items), **STEPS)
    assert first.counts.equal(before.counts)


def test_a_warmup_with_a_nan_loss_stops_and_counts_nothing(olmoe):
    model = with_lora(load_model(olmoe.folder))
    model.layers[1].mlp.experts.lora["up_proj"].lora_A.data[0] = float("nan")
    with pytest.raises(cli.RunError, match="warm-up: loss nan, .*; use --count-on base"):
        profile.profile_warmup(model, make_items(model.config.vocab_size), 3, **STEPS)


# ----------------------------------------------------------------------------------------------- two processes


def count_in_process(folder, out) -> None:
    """Half of the base's batches, all different in number and size, and this process's part of a warm-up."""
    processes = start_processes(timeout=timedelta(minutes=3))  # who waits for what never comes fails, and does not hang
    model = load_model(folder)
    items = make_items(model.config.vocab_size)
    base = profile.profile_routing(model, make_batches(items, 2)[processes.index :: 2])
    warm = profile.profile_warmup(with_lora(model), items, 3, processes=processes, **STEPS)
    counted = [base, warm]
    for shard in ("none", "full"):  # seven examples: the last step leaves one process without any
        for warmup in (None, profile.Warmup(**WARMUP, batch=3)):
            counted.append(
                profile.count_task(
                    folder, items, 3, processes, dtype=torch.float32, shard=shard, warmup=warmup, seed=STEPS["seed"]
                )
            )
    torch.save([vars(one) for one in counted], out / f"{processes.index}.pt")
    end_processes()


def test_two_processes_get_the_totals_of_one_process_sharded_or_not(olmoe, tmp_path):
    on_processes(2, count_in_process, olmoe.folder, tmp_path)
    model = load_model(olmoe.folder)
    items = make_items(model.config.vocab_size)
    base = profile.profile_routing(model, make_batches(items, 2))
    warm = profile.profile_warmup(with_lora(model), items, 3, **STEPS)
    for index in (0, 1):
        for one, two in zip((base, warm) * 3, torch.load(tmp_path / f"{index}.pt"), strict=True):
            assert two["counts"].equal(one.counts) and two["num_tokens"] == one.num_tokens == sum(LENGTHS)
            torch.testing.assert_close(two["gate_mass"], one.gate_mass, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------- the file

GOOD = {
    "model": "m", "task": "t", "num_tokens": 5, "num_experts_per_tok": 2,
    "counts": [[5, 1, 4], [0, 5, 5]], "gate_mass": [[2.5, 0.1, 1.25], [0, 1.0, 2.0]],
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- command


def test_warmup_by_command_prints_the_table_last_and_writes_both_files(tmp_path, capsys):
    out, picture = tmp_path / "made" / "profile.json", tmp_path / "profile.svg"
    flags = "--count-on lora --sample 0.004 --batch 3 --k 5"
    counted = call(profile, flags, "--out", out, "--plot", picture)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-6:] == list(statistics.table(counted.counts, 5))
    assert profiles.load_profile(out).counts.equal(counted.counts)
    assert picture.read_text().startswith("<?xml")


@pytest.fixture
def two_profiles(tmp_path) -> list[str]:
    """A good profile and one whose layer 1 uses other experts."""
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, second in zip(paths, ([0, 5, 5], [5, 5, 0]), strict=True):
        write_json(path, GOOD | {"counts": [[5, 1, 4], second]})
    return list(map(str, paths))


def test_compare_prints_and_draws_the_overlap_of_two_profiles(two_profiles, tmp_path, capsys):
    picture = tmp_path / "new" / "overlap.png"
    call(profile, "compare", two_profiles, "--plot", picture)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [["layer", "overlap", "only", "A", "only", "B"], ["0", "1.000", "-", "-"],
                         ["1", "0.333", "2", "0"]]  # fmt: skip
    assert lines[3][1:3] == ["overlap", "0.667,"] and lines[4] == "the same set in 1 of 2 layers".split()
    assert matplotlib.image.imread(picture).std() > 0.1
    call(profile, "compare", two_profiles, "--k 3")
    assert "Jaccard overlap 1.000, mean of the layers (by chance 1.000)" in capsys.readouterr().out


def test_advise_reads_the_model_the_rank_and_the_counts_from_the_profile(tmp_path, capsys):
    out = tmp_path / "p.json"
    counted = call(profile, "--sample 0.03 --batch 4 --out", out)
    capsys.readouterr()
    call(profile, "advise", out, "--coverage 0.5 1 --targets pure")
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("tiny-math on tiny,") and "rank 8" in head
    assert [int(row.split()[0]) for row in rows[:7]] == [1, 2, 4, 8, 16, 32, 64]
    k = int(rows[7].split("k = ")[1].split()[0])
    assert statistics.top_share(counted.counts, k).mean() >= 0.5 > statistics.top_share(counted.counts, k - 1).mean()
    assert rows[8].startswith("to cover 100% of the routed tokens: k = ")
    assert "the hot sets of two halves of the text overlap by" in rows[-1]
    call(profile, "advise", out, "--rank 4 --targets pure")
    at_rank_4 = capsys.readouterr().out.splitlines()[2].split()
    assert 2 * int(at_rank_4[3].replace(",", "")) == int(rows[0].split()[3].replace(",", ""))


# ------------------------------------------------------------------------------------------- what others measured

PUBLISHED = sorted((Path(__file__).parent.parent / "results" / "published").glob("*moe-*[!y].json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_advice_on_published_counts_needs_no_network_and_says_what_k_experts_cover(path, capsys):
    about = read_json(path)
    K = about["num_experts_per_tok"]
    shares = [sum(sorted(row)[-K:]) / sum(row) for row in about["counts"]]  # of the K hottest, layer by layer
    call(profile, "advise", path)
    said = capsys.readouterr().out
    assert f"{about['num_tokens']:,} tokens" in said
    assert f"k = {K} covers {sum(shares) / len(shares):.1%}\n" in said
    even = K / len(about["counts"][0])
    assert ("there is hardly a hot set" in said) == (sum(shares) / len(shares) < 2 * even)
    assert ("qwen" in path.name) <= ("receive 11.6% of the routed tokens, and an even split gives 6.7%" in said)


def test_the_command_on_two_processes_writes_the_counts_of_one(base, tmp_path):
    flags = words("--model", base, "--sample 0.05 --batch 4 --out")
    call(profile, flags, tmp_path / "one.json")
    on_processes(2, profile.main, words(flags, tmp_path / "two.json"))
    one, two = (read_json(tmp_path / name) for name in ("one.json", "two.json"))
    assert one["counts"] == two["counts"] and one["num_tokens"] == two["num_tokens"]
