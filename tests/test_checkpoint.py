"""Checkpoints as other programs write them: what changes nothing is accepted, and what is wrong is named."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import LOADABLE, hf_name, read_json, write_json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from command.cli import InputError
from hub.checkpoint import copy_beside
from hub.config import MOST_EXPERTS, PRESETS, ignore_keys, read_numbers
from model import load_model, read_config

IDS = torch.tensor([[5, 3, 9, 11, 2]])


def changed(source: Path, folder: Path, change) -> Path:
    """A copy of a checkpoint, its tensors changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def assert_logits(folder: Path, hf) -> None:
    torch.testing.assert_close(load_model(folder)(IDS)[0], hf(IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", LOADABLE)
def test_experts_stacked_as_transformers_holds_them_in_memory_give_its_logits(family, make_checkpoint, tmp_path):
    hf = make_checkpoint(family).hf
    hf.save_pretrained(tmp_path, save_original_format=False)
    assert hf_name("layers.1.mlp.experts.gate_up_proj", family) in load_file(tmp_path / "model.safetensors")
    assert_logits(tmp_path, hf)


def test_stacked_experts_in_shards_and_half_precision_are_those_of_the_file(olmoe, tmp_path):
    hf = copy.deepcopy(olmoe.hf).to(torch.bfloat16)
    hf.save_pretrained(tmp_path, save_original_format=False, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model = load_model(tmp_path)
    for i, layer in enumerate(hf.model.layers):
        assert torch.equal(model.layers[i].mlp.experts.down_proj, layer.mlp.experts.down_proj.float())
        assert torch.equal(model.layers[i].mlp.experts.gate_up_proj, layer.mlp.experts.gate_up_proj.float())


def test_weights_in_double_precision_are_rounded_to_those_of_single(olmoe, tmp_path):
    def double(tensors):
        tensors.update({name: tensor.double() for name, tensor in tensors.items()})

    assert_logits(changed(olmoe.folder, tmp_path / "double", double), olmoe.hf)


def test_rotary_tables_and_masks_of_older_checkpoints_change_nothing(olmoe, tmp_path):
    def older(tensors):
        tensors.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)})
        tensors.update(
            {"model.rotary_emb.inv_freq": torch.ones(4), "model.rotary_emb.original_inv_freq": torch.ones(4)}
        )
        tensors.update({"model.layers.0.self_attn.masked_bias": torch.tensor(-1e4)})
        tensors.update({"model.layers.0.self_attn.bias": torch.ones(1, 1, 6, 6, dtype=torch.bool)})

    assert_logits(changed(olmoe.folder, tmp_path / "older", older), olmoe.hf)
    for name in ("model.layers.0.inv_freq", "model.layers.0.self_attn.bias"):
        stray = changed(olmoe.folder, tmp_path / name, lambda t, name=name: t.update({name: torch.ones(4)}))
        with pytest.raises(InputError, match=f"unexpected keys .'{name}'"):
            load_model(stray)


def test_a_tied_head_may_be_stored_if_it_equals_the_embeddings(make_checkpoint, tmp_path):
    base = make_checkpoint("olmoe", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(base.folder / "model.safetensors")

    def stored(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def other(tensors):
        stored(tensors)
        tensors["lm_head.weight"][7, 3] += 1e-3

    assert_logits(changed(base.folder, tmp_path / "equal", stored), base.hf)
    with pytest.raises(InputError, match="lm_head.weight differs from the embeddings.*tie_word_embeddings"):
        load_model(changed(base.folder, tmp_path / "other", other))


@pytest.mark.parametrize(
    "key, value",
    [("model.norm.weight", float("nan")), ("model.layers.2.mlp.experts.5.up_proj.weight", -float("inf"))],
)
def test_weights_that_are_not_finite_are_refused_by_file_and_tensor(key, value, olmoe, tmp_path):
    def damage(tensors):
        tensors[key].view(-1)[-1] = value

    with pytest.raises(InputError, match=f"damaged/model.safetensors: {key} holds NaN or infinity"):
        load_model(changed(olmoe.folder, tmp_path / "damaged", damage))


def test_large_finite_weights_are_not_taken_for_infinite_ones(olmoe, tmp_path):
    def large(tensors):
        for name in list(tensors):
            tensors[name] = tensors[name].half()
        tensors["lm_head.weight"].fill_(60_000.0)  # their sum overflows

    assert load_model(changed(olmoe.folder, tmp_path / "large", large)).lm_head.weight.eq(60_000).all()


def weights(name: str, *others: str):
    """Moves model.safetensors to another name, and writes other files beside it."""

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / "model.safetensors").rename(folder / name)
        for other in others:
            write_json(folder / other, {"weight_map": {"lm_head.weight": name}})

    return change


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
INDEX = "model.safetensors.index.json"
ELSEWHERE = {
    "a pickle": (weights("pytorch_model.bin"), "pytorch_model.bin is a pickle.*save it as safetensors"),
    "a pickle of the authors": (weights("consolidated.00.pth"), "consolidated.00.pth is a pickle"),
    "a subfolder": (weights("weights/model.safetensors"), "in a subfolder .weights/model.safetensors.*name that"),
    "a subfolder of the index": (weights("weights/a.safetensors", INDEX), "subfolder .weights/a.safetensors.*move"),
    "shards without an index": (weights("model-00001-of-00002.safetensors"), f"expected .*, or shards with {INDEX}"),
    "a pointer": (lambda folder: (folder / "model.safetensors").write_text(POINTER), "pointer.*git lfs pull"),
    "nowhere": (lambda folder: (folder / "model.safetensors").unlink(), "missing; expected .* download it again"),
}


@pytest.mark.parametrize("change, said", ELSEWHERE.values(), ids=ELSEWHERE)
def test_weights_that_lie_elsewhere_are_named_with_what_to_do(change, said, olmoe, tmp_path):
    folder = shutil.copytree(olmoe.folder, tmp_path / "model")
    change(folder)
    with pytest.raises(InputError, match=said):
        load_model(folder)


def test_an_adapter_in_place_of_a_model_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is a PEFT adapter; name its base model"):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------------ keys of config.json


def read_with(folder: Path, tmp_path: Path, **changes):
    """The config of a checkpoint with some keys of config.json changed."""
    hub = read_json(folder / "config.json") | changes
    write_json(tmp_path / "config.json", hub)
    return read_config(tmp_path)


def test_an_ignored_key_is_read_over_and_every_other_one_still_is_an_error(olmoe, tmp_path, monkeypatch):
    monkeypatch.setattr("hub.config.ignored", set())
    ignore_keys("other_scale, mup_base")
    assert read_with(olmoe.folder, tmp_path, other_scale=8, mup_base=0, third=None) == read_config(olmoe.folder)
    with pytest.raises(InputError, match="third 1: unknown"):
        read_with(olmoe.folder, tmp_path, other_scale=8, third=1)


@pytest.mark.parametrize(
    "family, key, value, said",
    [
        ("olmoe", "is_causal", False, "is_causal False is not implemented, only True"),
        ("mixtral", "residual_multiplier", 0.22, "residual_multiplier 0.22 is not implemented, only 1.0"),
        ("mixtral", "clip_qkv", 0.5, "clip_qkv 0.5: unknown in a model of type mixtral"),
        ("qwen2_moe", "clip_qkv", 0.5, "clip_qkv 0.5: unknown in a model of type qwen2_moe"),
        ("qwen2_moe", "n_shared_experts", 2, "n_shared_experts 2: unknown"),
        ("qwen3_moe", "shared_expert_intermediate_size", 8, "shared_expert_intermediate_size 8: unknown"),
        ("deepseek", "head_dim", 16, "head_dim 16: unknown"),
        ("olmoe", "sliding_window", 64, "sliding_window 64: unknown"),
        ("olmoe", "first_k_dense_replace", 1, "first_k_dense_replace 1: unknown"),
    ],
)
def test_keys_that_would_change_the_model_or_that_a_family_does_not_use_are_errors(
    family, key, value, said, make_checkpoint, tmp_path
):
    with pytest.raises(InputError, match=said):
        read_with(make_checkpoint(family).folder, tmp_path, **{key: value})


@pytest.mark.parametrize("family", LOADABLE)
def test_every_key_that_transformers_writes_is_known(family, make_checkpoint, tmp_path):
    hf = make_checkpoint(family).hf.config
    full = {key: value for key, value in hf.to_dict().items() if key != "transformers_version"}
    assert len(full) > 25
    assert read_with(make_checkpoint(family).folder, tmp_path, **json.loads(json.dumps(full))).vocab_size
    older = {"is_causal": True, "logits_scaling": 1, "pruned_heads": {}, "top_k": 50, "attn_implementation": "sdpa"}
    assert read_with(make_checkpoint(family).folder, tmp_path, **older).vocab_size


def test_an_end_of_text_outside_the_vocabulary_is_none_and_several_are_kept_in_order(olmoe, tmp_path):
    def ids(value):
        return read_with(olmoe.folder, tmp_path, eos_token_id=value).eos_token_ids

    assert [ids(value) for value in (61, [61, 7, 3], -1, None, [5, 5000])] == [(), (7, 3), (), (), (5,)]
    for value in ("</s>", True, [1, "x"], 1.0):
        with pytest.raises(InputError, match="eos_token_id is"):
            ids(value)


# -------------------------------------------------------------------------------------- what lies beside the weights


@pytest.mark.parametrize("named_in", ["config.json", "tokenizer_config.json", None])
def test_what_a_base_has_beside_its_weights_is_copied_and_its_code_if_auto_map_names_some(named_in, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    beside = ["generation_config.json", "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "vocab.json",
              "merges.txt", "chat_template.jinja", "additional_chat_templates/tools.jinja", "LICENSE"]  # fmt: skip
    others = ["README.md", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
    code = ["modeling_own.py", "rope_own.py"]
    (base / "additional_chat_templates").mkdir(parents=True)
    out.mkdir()
    for name in (*code, *beside, *others):
        (base / name).write_text(name)
    for name in ("config.json", "tokenizer_config.json"):
        write_json(base / name, {"auto_map": {"AutoModel": "modeling_own.Own"}} if name == named_in else {})
    copy_beside(base, out)
    copied = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    assert copied.keys() == {*beside, "tokenizer_config.json", *(code if named_in else [])}
    assert all(path.read_bytes() == (base / name).read_bytes() for name, path in copied.items())


@pytest.mark.parametrize("first, then", [("sharded", "whole"), ("whole", "sharded")])
def test_of_a_whole_file_and_a_stale_index_the_weights_are_those_of_transformers(first, then, olmoe, tmp_path, capsys):
    """transformers leaves the index, or the whole file, of an earlier `save_pretrained` in the folder."""
    sizes = {"sharded": "200KB", "whole": "5GB"}
    for how, factor in ((first, 1.0), (then, 1.5)):
        hf = AutoModelForCausalLM.from_pretrained(olmoe.folder)
        hf.lm_head.weight.data *= factor
        hf.save_pretrained(tmp_path, max_shard_size=sizes[how])
    assert (tmp_path / INDEX).is_file() and (tmp_path / "model.safetensors").is_file()
    ours, theirs = load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert f"model.safetensors, as transformers does, and {INDEX} is ignored" in capsys.readouterr().err


def test_as_many_experts_as_the_bound_are_read_and_more_are_refused():
    hub = PRESETS["olmoe-1b-7b"] | {"num_hidden_layers": 1000}
    assert read_numbers(hub | {"num_experts": MOST_EXPERTS // 1000})["num_experts"] == 100
    with pytest.raises(InputError, match="1000 layers of 101 experts; expected at most 100,000"):
        read_numbers(hub | {"num_experts": 101})
