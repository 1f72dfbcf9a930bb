"""model.py and config.py against transformers' OLMoE and Mixtral, and against plainer formulas."""

import copy
import doctest
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, LOADABLE, SIZES, hf_name, read_json, write_json
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from command.cli import InputError
from hub.config import FAMILIES, MULTIPLIERS
from hub.weights import init_weights
from model import (
    KVCache,
    MoEConfig,
    MoETransformer,
    lay_out,
    load_model,
    read_config,
    save_model,
    sort_by_expert,
)

B, S = 5, 11  # sequences and positions; all sizes of one model are different, see conftest.py
LENGTHS = torch.tensor([7, 11, 1, 4, 9])  # real tokens of each sequence, right padding after them
SHORT = torch.tensor([7, 9, 1, 4, 9])  # the same where every sequence is padded
UNALIGNED = {"hidden_size": 30, "intermediate_size": 14, "num_attention_heads": 5, "num_key_value_heads": 5}

MODELS = {family: (family, {}) for family in FAMILIES} | {
    "olmoe, weights of the chosen experts sum to 1": ("olmoe", {"norm_topk_prob": True}),
    "olmoe, q, k, v clipped": ("olmoe", {"clip_qkv": 0.5}),
    "olmoe, a large constant in the norms": ("olmoe", {"rms_norm_eps": 0.1}),
    "olmoe, tied embeddings": ("olmoe", {"tie_word_embeddings": True}),
    "olmoe, sizes that grouped_mm refuses": ("olmoe", UNALIGNED),
    "mixtral, tied embeddings": ("mixtral", {"tie_word_embeddings": True}),
    "mixtral, window of 4, eager": ("mixtral", {"sliding_window": 4}),
    "mixtral, window of 4, sdpa": ("mixtral", {"sliding_window": 4, "attn_implementation": "sdpa"}),
    "mixtral, window longer than the sequence": ("mixtral", {"sliding_window": 64}),
    "deepseek, two dense layers": ("deepseek", {"first_k_dense_replace": 2, "n_shared_experts": 1}),
    "qwen2_moe, tied embeddings": ("qwen2_moe", {"tie_word_embeddings": True}),
    "qwen3_moe, weights as they are": ("qwen3_moe", {"norm_topk_prob": False}),
}
every_model = pytest.mark.parametrize("family, changes", MODELS.values(), ids=MODELS)
every_family = pytest.mark.parametrize("family", FAMILIES)
FILES = {name: model for name, model in MODELS.items() if model[0] in LOADABLE}
every_loadable_model = pytest.mark.parametrize("family, changes", FILES.values(), ids=FILES)
every_loadable_family = pytest.mark.parametrize("family", LOADABLE)
padded_or_not = pytest.mark.parametrize("lengths", [None, LENGTHS, SHORT], ids=["full", "ragged", "short"])


def random_ids(vocab_size: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def is_real(lengths: Tensor | None) -> Tensor:
    """True at real tokens [B, S]"""
    return torch.ones(B, S, dtype=torch.bool) if lengths is None else torch.arange(S) < lengths[:, None]


def ask_transformers(hf, ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, S, V], chosen experts [L, B, S, K] and router logits [L, B, S, E] of transformers' model"""
    routers, hooks = [], []
    for module in hf.modules():
        if type(module).__name__.lower().endswith("topkrouter"):  # it returns logits, weights and experts
            hooks.append(module.register_forward_hook(lambda module, args, out: routers.append(out)))
    mask = None if lengths is None else (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    logits = hf(ids, attention_mask=mask).logits
    for hook in hooks:
        hook.remove()
    router_logits, _, chosen = (torch.stack(parts).unflatten(1, ids.shape) for parts in zip(*routers, strict=True))
    return logits, chosen, router_logits


def load_transformers(folder: Path, **settings):
    """transformers' model of a folder, with its plainest attention and experts"""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **plain, **settings)


def rewrite_config(folder: Path, **changes) -> None:
    """Change config.json; a value of ... removes the key."""
    config = read_json(folder / "config.json") | changes
    config = {key: value for key, value in config.items() if value is not ...}
    write_json(folder / "config.json", config)


@pytest.fixture
def copied(olmoe, tmp_path) -> Path:
    """An OLMoE checkpoint folder that the test may damage."""
    return Path(shutil.copytree(olmoe.folder, tmp_path / "checkpoint"))


# ------------------------------------------------------------------------------------------------- forward


@every_model
@padded_or_not
@torch.no_grad()
def test_logits_and_chosen_experts_equal_those_of_transformers(make_checkpoint, family, changes, lengths):
    checkpoint = make_checkpoint(family, **changes)
    model = load_model(checkpoint.folder)
    ids = random_ids(model.config.vocab_size, B, S)
    logits, selected, routing = model(ids, lengths, output_routing=True)
    router_logits = routing.logits
    want_logits, want_selected, want_router_logits = ask_transformers(checkpoint.hf, ids, lengths)
    real = is_real(lengths)
    assert want_logits.std() > 0.5  # else 1e-4 would prove little
    assert logits.shape == want_logits.shape and selected.shape == want_selected.shape
    torch.testing.assert_close(logits[real], want_logits[real], atol=1e-4, rtol=0)
    assert torch.equal(selected[:, real].sort().values, want_selected[:, real].sort().values)
    assert (selected[:, ~real] == -1).all()
    torch.testing.assert_close(router_logits, want_router_logits[:, real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("setting", [{"clip_qkv": 0.5}, {"norm_topk_prob": True}, {"sliding_window": 4}], ids=str)
@torch.no_grad()
def test_each_setting_compared_above_changes_the_logits(make_checkpoint, setting):
    family = "mixtral" if "sliding_window" in setting else "olmoe"
    ids = random_ids(50, B, S)
    plain, changed = (ask_transformers(make_checkpoint(family, **c).hf, ids)[0] for c in ({}, setting))
    assert (plain - changed).abs().max() > 0.1


@torch.no_grad()
def test_no_padding_token_is_multiplied_and_the_head_runs_only_where_it_is_needed(olmoe):
    model, rows = load_model(olmoe.folder), []
    layer = model.layers[1]
    for module, i in ((layer.mlp.experts, 1), (layer.self_attn.q_proj, 0), (model.norm, 0)):  # i: its rows
        module.register_forward_pre_hook(lambda module, args, i=i: rows.append(len(args[i])))
    labels = torch.full((B, S), -100)
    labels[0, 3:5] = labels[3, 1] = 7
    T, K = int(LENGTHS.sum()), model.config.num_experts_per_tok
    for options, head_rows in (({}, T), ({"labels": labels}, 3), ({"last_only": True}, B)):
        rows.clear()
        model(random_ids(50, B, S), LENGTHS, **options)
        assert rows == [T, T * K, head_rows]


@every_family
def test_rotary_angles_equal_those_of_transformers_to_the_last_bit_far_from_the_start(make_checkpoint, family):
    checkpoint = make_checkpoint(family)
    places = torch.arange(32768)
    cos, sin = checkpoint.hf.model.rotary_emb(torch.zeros(1), places[None])  # [1, S, Dh]
    model = load_model(checkpoint.folder)
    layout = lay_out(model.config, model.embed_tokens.weight, len(places), torch.tensor([len(places)]), None)
    assert torch.equal(layout.rotary[0][:, 0], cos[0])
    assert torch.equal(layout.rotary[1][:, 0], sin[0])


# ---------------------------------------------------------------------------------------------- experts


def test_the_worked_example_of_sorting_by_expert_is_right():
    example = doctest.DocTestFinder().find(sort_by_expert, globs={"sort_by_expert": sort_by_expert, "torch": torch})
    assert doctest.DocTestRunner().run(*example) == (0, 6)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@torch.no_grad()
def test_ties_of_the_router_go_to_the_experts_that_transformers_takes(make_checkpoint, norm_topk_prob):
    checkpoint = make_checkpoint("olmoe", norm_topk_prob=norm_topk_prob)
    moe, hf = load_model(checkpoint.folder).layers[1].mlp, copy.deepcopy(checkpoint.hf.model.layers[1].mlp)
    generator = torch.Generator().manual_seed(0)
    gate = torch.randint(-1, 2, moe.gate.weight.shape, generator=generator).float()  # whole numbers: exact sums
    gate[[3, 1]] = gate[[5, 6]]  # two pairs of equal experts
    moe.gate.weight.copy_(gate)
    hf.gate.weight.copy_(gate)
    x = torch.randint(-1, 2, (90, moe.gate.in_features), generator=generator).float()
    x[:7] = 0.0  # all experts equal
    y, selected, routing = moe(x)
    assert torch.equal(selected, hf.gate(x)[2])
    assert all(len(set(experts)) == 3 for experts in selected.tolist())
    torch.testing.assert_close(y, hf(x[None])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape, lengths", [((1, 1), [0]), ((3, 2), [0, 0, 0]), ((0, 5), [])], ids=str)
@pytest.mark.parametrize("changes", [{}, UNALIGNED], ids=["grouped_mm", "plain"])
def test_a_batch_without_a_real_token_has_loss_zero_and_zero_gradients(make_checkpoint, changes, shape, lengths):
    model = load_model(make_checkpoint("olmoe", **changes).folder)
    ids = torch.zeros(shape, dtype=torch.int64)
    lengths = torch.tensor(lengths, dtype=torch.int64)
    loss, selected = model(ids, lengths, labels=torch.full(shape, -100))
    loss.backward()
    assert loss == 0 and selected.shape == (4, *shape, 3) and (selected == -1).all()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# --------------------------------------------------------------------------------------- loss and gradients


@every_model
@pytest.mark.parametrize(
    "lengths, devices",
    [(None, ("cuda",)), (LENGTHS, ("cuda",)), (LENGTHS, ("cpu",)), (SHORT, ("cuda",)), (SHORT, ("cpu",))],
    ids=["full", "ragged, one by one", "ragged, at once", "short, one by one", "short, at once"],
)
def test_loss_and_gradients_of_all_weights_equal_those_of_transformers(
    make_checkpoint, monkeypatch, family, changes, lengths, devices
):
    monkeypatch.setattr("ops.kernels.ONE_KERNEL", devices)
    checkpoint = make_checkpoint(family, **changes)
    model = load_model(checkpoint.folder)
    ids, labels = random_ids(50, B, S), random_ids(50, B, S, seed=1)
    labels[:, :2] = -100  # a prompt
    labels[~is_real(lengths)] = -100
    loss, _ = model(ids, lengths, labels=labels)
    loss.backward()
    want_logits, _, _ = ask_transformers(checkpoint.hf, ids, lengths)
    want = F.cross_entropy(want_logits.flatten(0, 1), labels.flatten(), reduction="sum")
    checkpoint.hf.zero_grad()
    want.backward()
    torch.testing.assert_close(loss, want, atol=1e-3, rtol=1e-6)
    grads = {hf_name(name, family): p.grad for name, p in model.named_parameters()}
    want_grads = {name: p.grad for name, p in checkpoint.hf.named_parameters()}
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        scale = want_grads[name].abs().max().item()
        assert scale > 0
        torch.testing.assert_close(grad, want_grads[name], atol=1e-5 * scale, rtol=1e-4, msg=lambda m, n=name: n + m)


# ------------------------------------------------------------------------------------------------ KV cache

FEEDS = {  # tokens that each of three sequences gets at each call
    "ragged prompts, then single tokens": [[4, 1, 7], [1, 1, 1], [1, 1, 1], [1, 1, 1]],
    "sequences that end early": [[4, 1, 7], [1, 1, 1], [1, 0, 1], [0, 0, 1]],
    "prompts in ragged chunks": [[3, 1, 4], [1, 3, 3], [2, 1, 4], [1, 1, 1]],
    "a long chunk beside a full sequence": [[9, 1, 2], [1, 7, 4], [0, 1, 1]],
    "equal lengths": [[5, 5, 5], [1, 1, 1], [2, 2, 2]],
}


DECODED = [(family, {}) for family in FAMILIES] + [("mixtral", {"sliding_window": 3})]


@pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)
@pytest.mark.parametrize("family, changes", DECODED, ids=[*FAMILIES, "mixtral, window of 3"])
@torch.no_grad()
def test_decoding_with_the_cache_equals_the_forward_without_it(make_checkpoint, family, changes, feed):
    checkpoint = make_checkpoint(family, **changes)
    model = load_model(checkpoint.folder)
    totals = torch.tensor(feed).sum(0)  # [3]
    texts = [random_ids(50, int(n), seed=i) for i, n in enumerate(totals)]
    cache = KVCache(model.config, 3, int(totals.max()), dtype=torch.float32, device="cpu")
    logits, chosen, done = [[], [], []], [[], [], []], [0, 0, 0]
    for counts in feed:
        ids = torch.zeros(3, max(counts), dtype=torch.int64)
        for i, n in enumerate(counts):
            ids[i, :n] = texts[i][done[i] : done[i] + n]
        ragged = None if len(set(counts)) == 1 else torch.tensor(counts)
        step_logits, step_chosen = model(ids, ragged, cache=cache)
        for i, n in enumerate(counts):
            logits[i].append(step_logits[i, :n])
            chosen[i].append(step_chosen[:, i, :n])
            done[i] += n
    assert torch.equal(cache.lengths, totals)
    for i, text in enumerate(texts):
        want_logits, want_chosen, _ = ask_transformers(checkpoint.hf, text[None])
        torch.testing.assert_close(torch.cat(logits[i]), want_logits[0], atol=1e-4, rtol=0)
        assert torch.equal(torch.cat(chosen[i], dim=1).sort().values, want_chosen[:, 0].sort().values)


# --------------------------------------------------------------------------------------------- checkpoints


@every_loadable_model
@torch.no_grad()
def test_transformers_loads_what_save_model_wrote(make_checkpoint, tmp_path, family, changes):
    checkpoint = make_checkpoint(family, **changes)
    model = load_model(checkpoint.folder)
    save_model(model, tmp_path)
    assert read_config(tmp_path) == model.config
    hf, report = load_transformers(tmp_path, output_loading_info=True)
    assert type(hf) is type(checkpoint.hf)
    assert not any(report.values())  # no missing, unexpected, mis-shaped key and no other complaint
    want = checkpoint.hf.state_dict()
    assert hf.state_dict().keys() == want.keys()
    assert all(torch.equal(tensor, want[key]) for key, tensor in hf.state_dict().items())
    ids = random_ids(50, B, S)
    torch.testing.assert_close(hf(ids).logits, checkpoint.hf(ids).logits, atol=1e-4, rtol=0)


def test_saving_beside_the_shards_of_another_checkpoint_is_refused(olmoe, tmp_path):
    olmoe.hf.save_pretrained(tmp_path, max_shard_size="40KB")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert str(tmp_path) in error_of(save_model, load_model(olmoe.folder), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@every_loadable_family
def test_a_sharded_checkpoint_of_transformers_loads_to_the_same_weights(make_checkpoint, tmp_path, family):
    checkpoint = make_checkpoint(family)
    checkpoint.hf.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    one, many = load_model(checkpoint.folder), load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_save_model_writes_the_dtype_asked_for_and_says_so_in_the_config(olmoe, tmp_path, dtype):
    save_model(load_model(olmoe.folder), tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert AutoConfig.from_pretrained(tmp_path).dtype == dtype
    assert load_transformers(tmp_path, dtype="auto").dtype == dtype


@every_loadable_family
@torch.no_grad()
def test_rope_theta_is_read_in_both_spellings_and_written_in_both(make_checkpoint, tmp_path, family):
    checkpoint = make_checkpoint(family, rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    folders = [checkpoint.folder, tmp_path / "transformers 4", tmp_path / "saved"]
    shutil.copytree(folders[0], folders[1])
    rewrite_config(
        folders[1], rope_parameters=..., rope_theta=500.0, rope_scaling=None, dtype=..., torch_dtype="float32"
    )
    save_model(load_model(folders[0]), folders[2])
    written = read_json(folders[2] / "config.json")
    assert written["rope_theta"] == 500.0 and written["rope_parameters"]["rope_theta"] == 500.0
    ids = random_ids(50, B, S)
    want = checkpoint.hf(ids).logits
    for folder in folders:
        assert read_config(folder).rope_theta == 500.0
        torch.testing.assert_close(load_model(folder)(ids)[0], want, atol=1e-4, rtol=0)
        hf = load_transformers(folder)
        torch.testing.assert_close(hf(ids).logits, want, atol=1e-4, rtol=0)


@every_loadable_family
def test_a_key_that_config_json_leaves_out_has_the_default_of_transformers(tmp_path, family):
    optional = {*MULTIPLIERS, "norm_topk_prob"}
    sizes = {key: value for key, value in SIZES[family].items() if key not in optional}
    CLASSES[family][0](**sizes).save_pretrained(tmp_path)  # it writes every key
    assert MoEConfig.from_dict({"model_type": family, **sizes}) == read_config(tmp_path)


def test_init_weights_repeats_with_its_seed_and_has_the_asked_spread(olmoe):
    models = [MoETransformer(read_config(olmoe.folder)) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        init_weights(model, std=0.3, seed=seed)
    first, same, other = ([p.detach() for p in model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    for a, b in zip(first, other, strict=True):
        if a.dim() == 1:
            assert (a == 1).all()
        else:
            assert not torch.equal(a, b)
            assert abs(a.std().item() / 0.3 - 1) < 0.2


# ------------------------------------------------------------------------------------------ what is refused


def error_of(action, *args) -> str:
    """The one-line InputError that `action(*args)` raises."""
    with pytest.raises(InputError) as caught:
        action(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


DOWN = "model.layers.2.mlp.experts.5.down_proj.weight"


def test_a_missing_shard_and_a_weight_that_two_shards_hold_are_named(olmoe, tmp_path):
    olmoe.hf.save_pretrained(tmp_path, max_shard_size="40KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    key = next(iter(load_file(first)))
    save_file(load_file(second) | {key: load_file(first)[key]}, second, metadata={"format": "pt"})
    message = error_of(load_model, tmp_path)
    assert key in message and first.name in message and second.name in message
    second.unlink()
    message = error_of(load_model, tmp_path)
    assert second.name in message and "missing" in message


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda tensors: tensors.pop(DOWN), (DOWN, "1 missing", "0 unexpected")),
        (lambda tensors: tensors.update(odd=torch.zeros(2)), ("odd", "0 missing", "1 unexpected")),
        (lambda tensors: tensors.update({DOWN: tensors[DOWN].T.contiguous()}), (DOWN, "(40, 48)", "(48, 40)")),
    ],
)
def test_a_missing_an_unexpected_and_a_mis_shaped_key_are_named(copied, change, parts):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    message = error_of(load_model, copied)
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"model_type": ...},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": "linear"},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}},
        {"rope_parameters": "default"},
        {"rope_parameters": False},
        {"num_experts": ...},
        {"num_experts_per_tok": 0},
        {"num_experts_per_tok": True},
        {"quantization_config": {"quant_method": "gptq"}},
        {"partial_rotary_factor": 0.5},
        {"mlp_only_layers": [0]},
        {"decoder_sparse_step": 2},
        {"layer_types": ["sliding_attention"] * 4},
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        {"scoring_func": "sigmoid"},
        {"routed_scaling_factor": 2.5},
        {"use_sliding_window": True},
        {"hidden_size": 47},
        {"hidden_size": "48"},
        {"rms_norm_eps": -1},
        {"rope_theta": "10000"},
        {"clip_qkv": 0},
    ],
    ids=str,
)
def test_a_config_that_this_forward_does_not_compute_is_refused_by_naming_the_key(copied, changes):
    rewrite_config(copied, **changes)
    message = error_of(load_model, copied)
    key, value = list(changes.items())[-1]
    assert key in message or "rope_type" in message
    if not isinstance(value, dict) and value is not ...:
        assert str(value) in message


@pytest.mark.parametrize("nested", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("top", "inner"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": "abc"}),
        ({"rope_theta": 1e4}, {"rope_theta": 0}),
        ({"rope_theta": 1e4}, {"rope_theta": 5e5}),
        ({"rope_theta": -5.0}, {"rope_theta": 1e4}),
        ({"partial_rotary_factor": 1.0}, {"partial_rotary_factor": 0.5}),
        ({"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 1.0}),
        ({}, {"partial_rotary_factor": True}),
        ({}, {"type": "linear"}),
    ],
    ids=str,
)
def test_nested_values_of_the_rotary_embedding_are_checked_beside_those_at_the_top_level(copied, nested, top, inner):
    alone = {"rope_parameters": ..., "rope_scaling": ...}
    rewrite_config(copied, **(alone | {nested: {"rope_theta": 1e4, "rope_type": "default"}, "rope_theta": 1e4}))
    assert read_config(copied).rope_theta == 1e4
    rewrite_config(copied, **(alone | {"rope_theta": ..., nested: inner} | top))
    assert list(inner)[0] in error_of(read_config, copied)
