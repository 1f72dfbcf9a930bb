"""The traps of docs/porting.md: with each of them in our code, a test of this folder that compares it fails."""

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import test_drlora
import test_hellora
import test_model
import test_parallel
import test_profile
import test_runs
import test_vectors
import torch

import hellora
import hub.config
import hub.weights
import lora
import model
import profile
import train
import training_step
from neighbours.drlora import RankGrowth

PAGE = (Path(__file__).parent.parent / "docs/porting.md").read_text(encoding="utf-8")
IDS = torch.arange(33).view(3, 11)


class Mistake(NamedTuple):
    """A line of our code as a wrong port has it, and the test that must fail then."""

    test: Callable
    given: dict  # arguments of the test besides fixtures
    function: Callable
    right: str  # occurs once in the function
    wrong: str


def parity(family: str, *mistake) -> Mistake:
    """One that changes what a model of the family computes."""
    test = test_model.test_logits_and_chosen_experts_equal_those_of_transformers
    return Mistake(test, {"family": family, "changes": {}, "lengths": test_model.LENGTHS}, *mistake)


def vectors(name: str, *mistake) -> Mistake:
    """One that changes the result of a function of tests/vectors."""
    return Mistake(test_vectors.test_ours_passes_every_vector, {"name": name}, *mistake)


DEFAULT = test_model.test_a_key_that_config_json_leaves_out_has_the_default_of_transformers
RENORMALISED = "elif config.norm_topk_prob:"
TRAPS = {
    "routing weights not renormalised where the family does it, or renormalised where it does not": [
        parity("mixtral", model.route, RENORMALISED, "elif False:"),
        parity("olmoe", model.route, RENORMALISED, "else:"),
    ],
    "gate and up swapped": [parity("olmoe", hub.weights.matrices, "PROJECTIONS[:2] if", "PROJECTIONS[1::-1] if")],
    "a key that config.json leaves out has another default than assumed": [
        Mistake(DEFAULT, {"family": family}, hub.config.read_numbers, right, wrong)
        for family, right, wrong in (
            ("olmoe", "or family.rope_theta", "or 1e6"),
            ("mixtral", "or family.rms_norm_eps", "or 1e-6"),
            ("granitemoe", "hub.get(key) or 1.0 for", "hub.get(key) or 2.0 for"),
            ("qwen3_moe", 'hub.get("norm_topk_prob")', 'hub.get("norm_topk_prob", True)'),
        )
    ],
    "softmax before or after top-k": [
        parity("granitemoe", model.route, "weights = weights.softmax(-1)", "weights = probs.gather(-1, selected)")
    ],
    "rotary positions half-split or interleaved": [
        parity(
            "olmoe", model.rotate, "first, second =", "x = torch.cat((x[..., ::2], x[..., 1::2]), -1); first, second ="
        )
    ],
    "a second softmax of the router logits elsewhere (counts, balancing loss)": [
        Mistake(
            test_profile.test_counts_and_gate_mass_are_those_of_transformers_router,
            {"family": "mixtral"},
            profile.profile_routing,
            "tally(chosen, routing.weights",
            "tally(chosen, routing.logits.softmax(-1).gather(-1, chosen)",
        ),
        Mistake(
            test_parallel.test_the_balancing_loss_of_a_step_is_that_of_transformers,
            {"family": "olmoe"},
            training_step.global_step,
            "load_balancing_loss(routing.probs,",
            "load_balancing_loss(routing.probs.softmax(-1),",
        ),
    ],
    "idle experts under data parallelism give no gradient": [
        Mistake(
            test_hellora.test_a_batch_without_hot_experts_gives_zero_gradients_not_none,
            {"ids": IDS},
            lora.LoRAExperts.forward,
            "gate_up = self",
            "if num_rows == 0: return Experts.forward(self, x, token, weight, offsets)\n    gate_up = self",
        )
    ],
    "padding is counted": [
        Mistake(
            test_profile.test_padding_is_never_counted_whatever_its_token_id,
            {},
            profile.profile_routing,
            "model(ids, batch.lengths,",
            "model(ids, None,",
        )
    ],
    "A zero and B random, with A frozen (LoRI)": [
        vectors("init_A", lora.init_A, "(2 * u - 1) /", "0 * u /"),
        Mistake(
            test_hellora.test_function_is_unchanged_at_step_0,
            {"kind": "lori", "ids": IDS},
            hellora.init_factors,
            "parameter.zero_()",
            "parameter.uniform_(-1, 1)",
        ),
    ],
    "rows of a stacked adapter in another order than rising expert id": [
        vectors(
            "moe_layer",
            hellora.attach,
            "ids = model.layers[i].mlp, is_hot",
            "ids = model.layers[i].mlp, is_hot.flip(0)",
        )
    ],
    "router probabilities in bfloat16": [
        parity("olmoe", model.route, "torch.promote_types(router_logits.dtype, torch.float32)", "torch.bfloat16")
    ],
    "weight decay or momentum on masked entries": [
        Mistake(
            test_drlora.test_what_has_not_grown_never_changes_and_the_rest_trains_as_plain_lora_of_its_rank,
            {},
            RankGrowth.observe,
            "pair.lora_B.grad.mul_(mask)",
            "pass",
        ),
        Mistake(
            test_runs.test_an_adapted_expert_that_no_token_reached_is_reported_and_as_drawn,
            {},
            train.fit,
            "weight_decay=settings.weight_decay",
            "weight_decay=0.01",
        ),
    ],
    "multipliers on embeddings, branches, scores or logits ignored": [
        parity("granitemoe", model.MoETransformer.forward, " * self.config.embedding_multiplier", ""),
        parity("granitemoe", model.DecoderLayer.compute, "x.add(y, alpha=self.multiplier)", "x.add(y)"),
        parity("granitemoe", model.Attention.forward, "self.config.attention_multiplier", "None"),
        parity("granitemoe", model.MoETransformer.scaled_norm, " / self.config.logits_scaling", ""),
    ],
    "norms that scale by 1 + w": [parity("olmoe", model.RMSNorm.forward, "self.weight *", "(1 + self.weight) *")],
}


def make(mistake: Mistake, monkeypatch) -> None:
    """Give the function the code of the wrong port, wherever it has been imported to."""
    function = inspect.unwrap(mistake.function)
    source, made = textwrap.dedent(inspect.getsource(function)), {}
    assert source.count(mistake.right) == 1
    exec(source.replace(mistake.right, mistake.wrong), function.__globals__, made)
    monkeypatch.setattr(function, "__code__", inspect.unwrap(made[function.__name__]).__code__)


def test_the_page_lists_these_traps():
    table = PAGE.partition("## Traps")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| (.+?) \|", table, re.M)[1:]  # after the head
    assert listed == list(TRAPS)


@pytest.mark.parametrize(
    "mistake", [pytest.param(each, id=f"{name}, {i}") for name, made in TRAPS.items() for i, each in enumerate(made, 1)]
)
def test_a_trap_is_noticed(mistake, request, monkeypatch, tmp_path_factory):
    names = inspect.signature(mistake.test).parameters.keys() - mistake.given.keys()

    def compare() -> None:
        fixtures = {name: request.getfixturevalue(name) for name in names - {"tmp_path"}}
        folder = {"tmp_path": tmp_path_factory.mktemp("compared")} if "tmp_path" in names else {}
        mistake.test(**mistake.given, **fixtures, **folder)

    compare()
    make(mistake, monkeypatch)
    with pytest.raises(AssertionError):
        compare()
