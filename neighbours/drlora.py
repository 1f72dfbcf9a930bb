"""DR-LoRA: every expert starts with half of the rank; experts that are used and that learn get the other half.

    attach(model, all_experts, r, alpha, expert_rank=RESERVED * r)     # r_max dimensions per expert, B = 0
    growth = RankGrowth(model, r, steps)                        # after sharding
    loss.backward(); growth.observe(counts)     # every step: update the scores, mask the gradients
    clip; optimizer.step(); growth.grow(step)   # at some steps: the ranks of every layer grow

In a run, `Growth` of run/observers.py calls it.

Of the r_max dimensions of an expert the first R train. In the others B is zero, so they add nothing, and the gradient
of A is zero too. The gradient of B is not, so `observe` masks it before clipping. AdamW's moments then stay zero, and
without weight decay the parameters stay as drawn. An expert grows when R is raised. The model's function
does not change at that step, and the new dimensions start as LoRA starts. (AdamW corrects its bias by the age of the
whole tensor, so the first steps of a new column are a few times larger than the rate says. Any masked implementation
has this, also the authors'.)

Sources: arXiv 2601.04823, and the authors' code (gz-d/dr-lora). Both have S = f g / (R + 1)^1.2, the caps, decays of
0.9, growth from 3 % of the steps to one interval before the end, and a constant scale. The differences:

- f, the use of an expert: the paper averages routing weights. The code counts tokens, decayed per step, per process
  and with padding. Here: counts as in the code, but of the real tokens of the global batch.
- g, its importance, from s_A = |grad A_j . A_j| and s_B of every dimension j: the paper takes their product, the code
  their mean, updated at both factors of each micro-batch. Here: once per step, from the gradient of the global batch.
  There s_A = s_B, because scaling A_j by c and B_j by 1 / c changes nothing, so s_B is their mean. The paper's product
  would be its square.
- The code sets all scores to zero after a growth. Here they are kept; only grown dimensions start at zero. In the
  paper's runs the two are nearly the same: 200 steps lie between two growths, and 0.9^200 forgets everything. Here the
  interval shrinks with the run, and the decay does not: a run of 60 steps grows every 3, too few to score anew.
- Budget: the code rounds the quota up per projection, so that growth is over after 9 of 18 events, and a layer can
  overshoot. Here the quota counts an expert's rank once and is spent over the whole window. Every layer ends at
  exactly E r_target, also if a growth falls on a skipped step. What the cap leaves goes out in a second round.
- The code grows before the optimizer's step. Here growth comes after it.
- r_init : r_target : r_max is 1 : 2 : 4, as 8, 16 and 32 in the paper. The interval is 200 of 3,750 steps, as there.
  An odd r_target starts at its half rounded down.
- Adapted modules: the paper adapts up_proj and down_proj only, and trains the router's own weights after the warm-up
  (the code unfreezes them, but does not give them to the optimizer). Here: gate_proj too, and LoRA at the target rank
  on attention and router, as for the other methods (--targets pure leaves these out).
- Training: the paper has a linear rate with warm-up and a dropout of 0.1. Here: the task's rate and no dropout unless
  --recipe dr-lora asks for them, and gradients clipped to norm 1.0 (--clip).

Dimensions: L layers, E experts per layer (all of them adapted), R rank of an expert, r_max reserved rank.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from command.cli import InputError
from hub.sharded import full_tensor
from model import MoETransformer
from neighbours.ranks import trains

GAMMA = 1.2  # how strongly a large rank counts against growing more
RESERVED = 2  # r_max / r_target: attach with this multiple of the rank
DECAY = 0.9  # of both scores, per optimizer step
EPS = 1e-6  # an expert without tokens or without a gradient is still ranked by the other factor


def check_rank(r: int, largest: int) -> None:
    """Raise InputError for a target rank r that leaves no room to grow. largest: the largest rank of a LoRA pair."""
    if not 2 <= r <= largest // RESERVED:
        starts = f"the ranks of dr-lora start at half of it and may grow to {RESERVED} times as much"
        raise InputError(f"--rank {r}: {starts}; expected 2..{largest // RESERVED}")


def growth_steps(steps: int) -> range:
    """The optimizer steps (counted from 1) after which ranks grow: from 3 % of them to one interval before the end.

    Raises InputError for a run that is too short.
    """
    if steps < 2:
        raise InputError(f"a run of {steps} step has no time for ranks to grow; expected at least 2 steps")
    interval = max(1, round(steps * 200 / 3750))
    return range(-(-3 * steps // 100), steps - interval + 1, interval)


def saliency(usage: Tensor, importance: Tensor, ranks: Tensor) -> Tensor:
    """S = f g / (R + 1)^gamma, with f and g the shares of the layer's sum.  three times [L, E] -> [L, E]

    usage: decayed routing counts. importance: mean score of the expert's R dimensions.
    """
    f, g = (x / x.sum(-1, keepdim=True).clamp(min=1e-30) + EPS for x in (usage.double(), importance.double()))
    return f * g / (ranks + 1.0) ** GAMMA


def allocate(saliency: Tensor, quota: int, cap: int, free: Tensor) -> Tensor:
    """Share out the quota of a layer by descending saliency, at most `cap` per expert and round.  -> int64 [E]

    saliency [E], ties to the lower id; free [E]: how far each expert can grow. Only short runs need a second round.
    """
    grown = torch.zeros_like(free)
    quota = min(quota, int(free.sum()))
    while quota:
        for e in saliency.argsort(descending=True, stable=True).tolist():
            more = min(quota, cap, int(free[e] - grown[e]))
            grown[e] += more
            quota -= more
    return grown


class RankGrowth:
    """The ranks of all experts during a run. Every process holds the same numbers and decides the same."""

    def __init__(self, model: MoETransformer, r_target: int, steps: int) -> None:
        """model: pairs of kind `lora` on all experts, r_max >= r_target. Raises InputError for a run of one step."""
        self.model = model
        self.pairs = [list(model.layers[i].mlp.experts.lora.values()) for i in model.config.moe_layers]
        B = self.pairs[0][0].lora_B  # [E, out, r_max]
        L, E, self.r_max = len(self.pairs), len(B), B.shape[-1]
        self.steps = growth_steps(steps)
        r_init = max(1, r_target // 2)
        self.budget = E * r_target  # per layer
        self.quota = -(-E * (r_target - r_init) // len(self.steps))  # per layer and growth
        self.cap = max(1, -(-(self.r_max - r_init) // 10))  # per expert and growth
        self.usage = torch.zeros(L, E)  # on the CPU, as ranks and counts are
        self.score = torch.zeros(L, E, device=B.device)
        self.history = [(0, torch.full((L, E), r_init))]  # after which step, the ranks [L, E]
        self.set_masks()

    def ranks(self) -> Tensor:
        """The current rank of every expert.  int64 [L, E]"""
        return self.history[-1][1]

    def spent(self) -> dict[str, int]:
        """For the log: the sum of all ranks, and the sum that they may grow to."""
        return {"active_ranks": int(self.ranks().sum()), "rank_budget": len(self.ranks()) * self.budget}

    def set_masks(self) -> None:
        """Which columns of B train, sharded as B is.  L times [E, 1, r_max]. The adapter knows the ranks."""
        self.model.adapter = replace(self.model.adapter, ranks=self.ranks().tolist())
        self.masks = []
        for (pair, *_), row in zip(self.pairs, self.ranks(), strict=True):
            B, mask = pair.lora_B, trains(row, self.r_max).unsqueeze(1).to(pair.lora_B.device)
            if isinstance(B, DTensor):  # the mask is the same for all rows of an expert
                places = [Replicate() if place.is_shard(1) else place for place in B.placements]
                mask = distribute_tensor(mask, B.device_mesh, places, src_data_rank=None)
            self.masks.append(mask)

    @torch.no_grad()
    def observe(self, counts: Tensor) -> None:
        """Update the scores and mask the gradients of inactive dimensions. Call it after backward, before clipping.

        counts [L, E]: tokens that chose each expert in this step, over all processes; on the CPU.
        """
        self.before = self.usage, self.score
        self.usage = DECAY * self.usage + counts
        layers = []
        for pairs, mask in zip(self.pairs, self.masks, strict=True):
            # Inactive dimensions have the score 0, because B is 0, and start with it when they become active, as the
            # method asks. So the sum over dimensions is all that has to be kept.
            scores = [(pair.lora_B * pair.lora_B.grad).sum(1).abs().sum(-1) for pair in pairs]  # [E] each
            layers.append(sum(scores) / len(scores))
            for pair in pairs:
                pair.lora_B.grad.mul_(mask)
        score = full_tensor(torch.stack(layers))  # [L, E]
        self.score = self.score.lerp(score, 1 - DECAY)

    def forget(self) -> None:
        """Undo the last `observe`, because the optimizer skips the step. Its gradients were not finite."""
        self.usage, self.score = self.before

    def saliency(self) -> Tensor:
        """The priority of every expert at a growth.  float64 [L, E]"""
        return saliency(self.usage, self.score.cpu() / self.ranks(), self.ranks())

    def grow(self, step: int) -> None:
        """Grow the ranks if `step` is one of growth_steps. Call it after the optimizer's step."""
        if step not in self.steps:
            return
        grown = [
            row + allocate(priority, min(self.quota, self.budget - int(row.sum())), self.cap, self.r_max - row)
            for row, priority in zip(self.ranks(), self.saliency(), strict=True)
        ]
        self.history.append((step, torch.stack(grown)))
        self.set_masks()

    def unused(self) -> int:
        """How many reserved parameters never grew: without them the adapter has the size of LoRA at the target rank."""
        unused = 0
        for pairs, ranks in zip(self.pairs, self.ranks(), strict=True):
            dimensions = len(ranks) * self.r_max - int(ranks.sum())
            unused += dimensions * sum(pair.lora_A.shape[-1] + pair.lora_B.shape[1] for pair in pairs)
        return unused

    def state_dict(self) -> dict[str, list]:
        """Everything that a resumed run needs, as JSON can hold it; the same on every process."""
        steps, ranks = zip(*self.history, strict=True)
        return {
            "steps": list(steps),
            "ranks": [row.tolist() for row in ranks],
            "usage": self.usage.tolist(),
            "score": self.score.tolist(),
        }

    def load_state_dict(self, state: dict[str, list]) -> None:
        self.history = [(step, torch.tensor(ranks)) for step, ranks in zip(state["steps"], state["ranks"], strict=True)]
        self.usage = torch.tensor(state["usage"])
        self.score = torch.tensor(state["score"], device=self.score.device)
        self.set_masks()


def draw_ranks(history: list[tuple[int, Tensor]], path: Path) -> None:
    """Heat maps of the ranks (`RankGrowth.history`): at the start, at two growths between, and at the end."""
    from matplotlib.figure import Figure  # not pyplot: it has global state, and looks for a display

    shown = [history[i] for i in sorted({round(i * (len(history) - 1) / 3) for i in range(4)})]
    figure = Figure(figsize=(4 * len(shown) + 1, 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    limits = {"vmin": 0, "vmax": int(shown[-1][1].max())}  # ranks never shrink
    for axes, (step, ranks) in zip(panels, shown, strict=True):
        image = axes.imshow(ranks.numpy(), aspect="auto", cmap="cividis", interpolation="nearest", **limits)
        when = f"after step {step}" if step else "at the start"
        axes.set(xlabel="expert", title=f"{when}: {int(ranks.sum()):,} in all")
    panels[0].set(ylabel="layer", yticks=range(0, len(ranks), -(-len(ranks) // 16)))
    figure.colorbar(image, ax=panels, label="rank of the expert", pad=0.01)
    figure.savefig(path)
