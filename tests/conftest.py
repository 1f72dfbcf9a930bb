"""Small random models for all tests, built, filled and saved by transformers. No test may reach the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is first imported
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start: small matrices gain nothing from threads

import json  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
from collections.abc import Callable, Iterable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType, SimpleNamespace  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig  # noqa: E402
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel  # noqa: E402
from transformers.utils import logging  # noqa: E402

from hub.config import FAMILIES  # noqa: E402

for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:  # started in the background, or by nohup
        signal.signal(_number, _handler)  # what tests send must arrive, here and in what they start
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
    "qwen2_moe": dict(
        vocab_size=59, hidden_size=48, intermediate_size=88, moe_intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=12, num_key_value_heads=6, num_experts=7, num_experts_per_tok=2,
        shared_expert_intermediate_size=56, eos_token_id=0,
    ),
    "qwen3_moe": dict(
        vocab_size=67, hidden_size=40, intermediate_size=88, moe_intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_experts=9, num_experts_per_tok=4,
        norm_topk_prob=True, eos_token_id=0,
    ),
    "deepseek": dict(
        vocab_size=71, hidden_size=48, intermediate_size=88, moe_intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, n_routed_experts=7, n_shared_experts=2, num_experts_per_tok=3,
        first_k_dense_replace=1, eos_token_id=0,
    ),
    "granitemoe": dict(
        vocab_size=73, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, num_local_experts=7, num_experts_per_tok=3, embedding_multiplier=3.0,
        residual_multiplier=0.6, attention_multiplier=0.2, logits_scaling=2.5, eos_token_id=0, pad_token_id=1,
    ),
}  # fmt: skip
CLASSES = {
    "granitemoe": (GraniteMoeConfig, GraniteMoeForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
SHARED = [family for family, row in FAMILIES.items() if row.shared_size or row.num_shared]  # with shared experts
LOADABLE = [family for family in FAMILIES if family in CLASSES]  # transformers 5 has a class for them
RENAMED = {  # transformers' names of our modules in memory, where they differ
    "deepseek": {".shared_expert.": ".shared_experts."},
    "granitemoe": {".mlp.gate.": ".block_sparse_moe.router.", ".mlp.": ".block_sparse_moe."},
}


def hf_name(name: str, family: str) -> str:
    """The name that transformers' model has for one of our parameters."""
    for ours, theirs in RENAMED.get(family, {}).items():
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"model.{name}"


class DeepSeek(nn.Module):
    """DeepSeekMoE out of the parts that transformers 5 has: a Llama decoder with DeepSeek's MoE, without a head.

    transformers knows no model_type "deepseek"; config.json and the keys are those of deepseek-moe-16b.
    """

    def __init__(self, **changes) -> None:
        super().__init__()
        self.hub = {"model_type": "deepseek", **SIZES["deepseek"], **changes}
        sizes = {key: value for key, value in self.hub.items() if key not in ("model_type", "first_k_dense_replace")}
        dense = self.hub["first_k_dense_replace"]
        kinds = ["dense"] * dense + ["sparse"] * (sizes["num_hidden_layers"] - dense)
        self.config = DeepseekOcr2TextConfig(mlp_layer_types=kinds, attn_implementation="eager", **sizes)
        self.model = DeepseekOcr2TextModel(self.config)
        self.lm_head = nn.Linear(sizes["hidden_size"], sizes["vocab_size"], bias=False)

    def set_experts_implementation(self, name: str) -> None:
        self.model.set_experts_implementation(name)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.model(ids, attention_mask=attention_mask).last_hidden_state))

    def save_pretrained(self, folder: Path) -> None:
        tensors = {}
        for name, tensor in self.state_dict().items():
            prefix, _, stack = name.rpartition(".")
            for e in range(len(tensor)) if ".experts." in name else ():
                for part, rows in zip(("gate", "up"), tensor[e].chunk(2), strict=True) if "gate_up" in stack else ():
                    tensors[f"{prefix}.{e}.{part}_proj.weight"] = rows.clone()
                if stack == "down_proj":
                    tensors[f"{prefix}.{e}.down_proj.weight"] = tensor[e].clone()
            if ".experts." not in name:
                tensors[name] = tensor
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", self.hub)


def with_tokenizer(folder: Path) -> Path:
    """The checkpoint of a folder, with a tokenizer of the fewest words that the embedded tasks can be run with."""
    words = ["<eos>", "<pad>", "<unk>", *"0123456789", "+", "-", "=", "the", "is", "of"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def on_processes(count: int, work: Callable[..., object], *args, per_machine: int | None = None) -> None:
    """work(*args) on forks of this process, which have its imports, in the environment that torchrun gives them."""
    port = free_port()

    def start(index: int) -> None:
        torch.set_num_threads(1)
        local = per_machine or count
        numbers = {"RANK": index, "LOCAL_RANK": index % local, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": local}
        os.environ |= {name: str(number) for name, number in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work(*args)

    torch.multiprocessing.start_processes(start, nprocs=count, start_method="fork")


def words(*parts) -> list[str]:
    """A command line: a text is split at its spaces, a list is taken as it is, a path or a number is one word."""
    found = []
    for part in parts:
        one_word = isinstance(part, Path | int | float)
        found += part.split() if isinstance(part, str) else map(str, [part] if one_word else part)
    return found


def call(command: ModuleType, *parts):
    """What the main function of a command returns: call(train, "--steps 3 --out", folder)."""
    return command.main(words(*parts))


def read_json(path: Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def losses(run: Path) -> list[float]:
    """The loss of every step of a run."""
    return [record["loss"] for record in read_lines(run / "log.jsonl")]


def write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, rows: Iterable) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two adapters or models have the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@dataclass(frozen=True)
class Checkpoint:
    """A folder that transformers wrote, and transformers' model of it. Shared: copy the folder to change it."""

    folder: Path
    hf: PreTrainedModel


def random_hf(family: str, **changes) -> PreTrainedModel:
    """transformers' model with matrices ~ N(0, 0.2^2), so that logits are of order 1, and norms unlike one."""
    with torch.random.fork_rng():
        if family == "deepseek":
            hf = DeepSeek(**changes).eval()
        else:
            config_class, model_class = CLASSES[family]
            hf = model_class(config_class(**{**SIZES[family], "attn_implementation": "eager", **changes})).eval()
    hf.set_experts_implementation("eager")  # the plain loop over experts
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() == 1:  # norms, and biases
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.2, generator=generator)
    return hf


@pytest.fixture(autouse=True)
def empty_pictures(monkeypatch):
    """The pictures in run folders are empty files: no test looks at them, and one takes as long as ten steps."""
    draw = Figure.savefig

    def save(figure: Figure, path: Path, **options) -> None:
        path = Path(path)
        path.touch() if (path.parent / "config.json").exists() else draw(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", save)


@pytest.fixture(scope="session", autouse=True)
def few_rows():
    """Few rows of the embedded tasks: they are made and encoded for every run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.TINY_TRAIN", 300)
        yield


@pytest.fixture
def all_rows(monkeypatch):
    """All rows of the embedded tasks, as a process has them that a test starts."""
    monkeypatch.setattr("data.TINY_TRAIN", 2000)


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


@pytest.fixture(scope="session")
def base(olmoe, tmp_path_factory) -> Path:
    """The checkpoint of `olmoe`, with a tokenizer. Shared: copy it to change it."""
    folder = tmp_path_factory.mktemp("base")
    return with_tokenizer(shutil.copytree(olmoe.folder, folder, dirs_exist_ok=True))
