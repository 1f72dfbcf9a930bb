"""Small random models for all tests, built, filled and saved by transformers. No test may reach the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is first imported
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start: small matrices gain nothing from threads

import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
torch.set_num_threads(1)

# Pairwise different, so that a swapped axis fails; multiples of 8, so that grouped_mm takes them.
SIZES = {
    "olmoe": dict(
        vocab_size=61, hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, num_experts=7, num_experts_per_tok=3, eos_token_id=0, pad_token_id=1,
    ),
    "mixtral": dict(
        vocab_size=53, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=14,
        num_key_value_heads=7, head_dim=4, num_local_experts=6, num_experts_per_tok=2, eos_token_id=0,
    ),
}  # fmt: skip
CLASSES = {"olmoe": (OlmoeConfig, OlmoeForCausalLM), "mixtral": (MixtralConfig, MixtralForCausalLM)}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that transformers wrote, and transformers' model of it. Shared: copy the folder to change it."""

    folder: Path
    hf: OlmoeForCausalLM | MixtralForCausalLM


def random_hf(family: str, **changes) -> OlmoeForCausalLM | MixtralForCausalLM:
    """transformers' model with matrices ~ N(0, 0.2^2), so that logits are of order 1, and norms unlike one."""
    config_class, model_class = CLASSES[family]
    config = config_class(**{**SIZES[family], "attn_implementation": "eager", **changes})
    with torch.random.fork_rng():
        hf = model_class(config).eval()
    hf.set_experts_implementation("eager")  # the plain loop over experts
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.2, generator=generator)
    return hf


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory) -> Callable[..., Checkpoint]:
    """make_checkpoint("olmoe", clip_qkv=0.5): that change of SIZES as a Checkpoint, made once a session."""
    made = {}

    def make(family: str, **changes) -> Checkpoint:
        key = json.dumps([family, changes], sort_keys=True)
        if key not in made:
            hf = random_hf(family, **changes)
            folder = tmp_path_factory.mktemp(family)
            hf.save_pretrained(folder)
            made[key] = Checkpoint(folder, hf)
        return made[key]

    return make


@pytest.fixture(scope="session")
def olmoe(make_checkpoint) -> Checkpoint:
    return make_checkpoint("olmoe")


@pytest.fixture(scope="session")
def mixtral(make_checkpoint) -> Checkpoint:
    return make_checkpoint("mixtral")
