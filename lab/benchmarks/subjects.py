"""What `bench.py step` compares: our model under each method, and transformers' model under peft.

Dimensions: L layers, E experts per layer.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import hellora
import ops
from data import Batch
from hub.weights import init_weights, materialize
from lori import sparsify
from model import MoEConfig, MoETransformer
from recipes.methods import METHODS

OURS = ("hellora", "hellori-d", "hellori-s", "lora", "lori-d", "lori-s", "dora")  # rows of METHODS
PLACED = tuple(f"{name}-{targets}" for targets in ("pure", "gate") for name in OURS[:6])  # as the paper's _pure, _gate
COMPILED = ("floor-compiled", "hellora-compiled", "lora-compiled")  # as train.py --compile
BY_NUMBER = {f"hellora-k{k}": k for k in (2, 4, 16)}  # hot experts per layer, as in the paper's Table 7
PEERS = {  # name -> modules and parameters that peft adapts
    "peft-all": ("q_proj k_proj v_proj o_proj", "mlp.gate.weight mlp.experts.gate_up_proj mlp.experts.down_proj"),
    "peft-attention": ("q_proj k_proj v_proj o_proj", ""),
}


@dataclass
class Subject:
    """What is measured: a model, its loss on a batch, and the optimizer of what trains (None if nothing does)."""

    name: str
    model: torch.nn.Module
    loss: Callable[[Batch], Tensor]
    optimizer: torch.optim.Optimizer | None

    def step(self, batch: Batch) -> None:
        self.loss(batch).backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def resident(self) -> set[Tensor]:
        """What stays allocated between steps: weights, buffers and the optimizer's moments."""
        state = self.optimizer.state.values() if self.optimizer else ()
        moments = [value for of in state for value in of.values() if torch.is_tensor(value)]
        return {*self.model.parameters(), *self.model.buffers(), *moments}


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0, fused=True)


def our_model(shape: dict, device: torch.device, dtype: torch.dtype) -> MoETransformer:
    """Random weights, made where they will be: a copy elsewhere or in float32 may not fit."""
    with torch.device("meta"):
        model = MoETransformer(MoEConfig.from_dict(shape)).to(dtype)
    materialize(model, device)
    init_weights(model, std=0.02)
    return model


def sharing(base: MoETransformer) -> MoETransformer:
    """A model of its own on the weights of `base`: many that only train adapters then fit into memory."""
    return copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})


def attach(name: str, model: MoETransformer, hot: Tensor, rank: int) -> None:
    """Put the adapters of a method on a model.  hot [L, E] bool: the experts that hot methods adapt"""
    method = METHODS[method_of(name)]
    hot = hot if method.experts == "hot" else torch.ones_like(hot)
    targets = name.rpartition("-")[2] if name in PLACED else method.targets
    hellora.attach(model, hot, rank, 2.0 * rank, kind=method.kind, targets=targets)


def method_of(name: str) -> str:
    return name.rpartition("-")[0] if name in PLACED or name in BY_NUMBER else name


def make_subject(name: str, base: MoETransformer, hot: Tensor, rank: int) -> Subject:
    """The model of one row.  hot [L, E] bool: the experts that hot methods adapt"""
    if name in PEERS:
        return make_peer(name, base, rank)
    subject = make_ours(name.removesuffix("-compiled"), base, hot, rank)
    if name not in COMPILED:
        return subject
    compiled = ops.compile_elementwise(base.lm_head.weight.device, base.lm_head.weight.dtype)

    def loss(batch: Batch) -> Tensor:
        with ops.using(compiled):
            return subject.loss(batch)

    return replace(subject, name=name, loss=loss)


def make_ours(name: str, model: MoETransformer, hot: Tensor, rank: int) -> Subject:
    """Our model under a method, or frozen as "floor".  hot [L, E] bool: the experts that hot methods adapt"""
    if name == "floor":
        model.requires_grad_(False)
        # The backward pass then runs down to the input of the first layer, as if something below it trained.
        model.embed_tokens.register_forward_hook(lambda module, ids, x: x.requires_grad_())
    elif name != "fft":
        attach(name, model, hot, rank)
        if METHODS[method_of(name)].sparse:  # a tenth of B trains, as in LoRI-S; for speed any tenth will do
            generator = torch.Generator().manual_seed(0)
            Bs = {key.removesuffix(".lora_B"): B for key, B in model.named_parameters() if key.endswith("lora_B")}
            kept = {key: torch.rand(B.numel(), generator=generator) < 0.1 for key, B in Bs.items()}
            sparsify(model, {key: mask.nonzero().flatten() for key, mask in kept.items()})

    def loss(batch: Batch) -> Tensor:
        nll, _ = model(batch.input_ids, batch.lengths, labels=batch.labels)
        return nll / (batch.labels != -100).sum()

    return Subject(name, model, loss, None if name == "floor" else adamw(model))


def transformers_model(base: MoETransformer) -> torch.nn.Module:
    """transformers' model on the weights of `base`, which it shares. Raises ImportError if it is not installed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**base.config.hub))
    weights = {k if k.startswith("lm_head") else f"model.{k}": w for k, w in base.named_parameters()}
    hf.load_state_dict(weights, assign=True)
    hf.model.rotary_emb = type(hf.model.rotary_emb)(hf.config)  # its table is not among the weights
    return hf.to(base.lm_head.weight.device)


def make_peer(name: str, base: MoETransformer, rank: int) -> Subject:
    """transformers' model on the weights of `base` under peft's LoRA. Raises ImportError if one is not installed."""
    from peft import LoraConfig, get_peft_model

    hf = transformers_model(base)
    modules, parameters = PEERS[name]
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=modules.split(), target_parameters=parameters.split() or None
    )
    model = get_peft_model(hf, settings).train()

    def loss(batch: Batch) -> Tensor:
        places = torch.arange(batch.input_ids.shape[1])
        real = (places < batch.lengths[:, None]).long().to(batch.input_ids.device)
        # transformers shifts the labels itself
        labels = torch.cat((torch.full_like(batch.labels[:, :1], -100), batch.labels[:, :-1]), dim=1)
        return model(batch.input_ids, attention_mask=real, labels=labels, use_cache=False).loss

    return Subject(name, model, loss, adamw(model))
