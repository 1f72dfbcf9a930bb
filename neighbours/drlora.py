"""DR-LoRA: every expert starts with half of the rank, and the ranks that are used and learn grow until it is spent.

    attach(model, all_experts, r, alpha, r_max=RESERVED * r)    # r_max dimensions in every expert's pairs, B = 0
    growth = RankGrowth(model, r, steps)                # after sharding, if there are several processes
    loss.backward(); growth.observe(counts)             # every step: scores; no gradient for what is not grown yet
    clip; optimizer.step(); growth.grow(step)           # at a few steps: the ranks of every layer grow

An expert's first R of r_max dimensions train. The others have a random row of A and a zero column of B: they add
nothing, and A's row gets no gradient under a zero B. B's column would get one; it is set to zero before clipping, so
AdamW's moments stay zero too and, without weight decay, the entries stay as drawn. Growing is one changed number: the
function does not jump, and the new dimensions start as LoRA starts. (AdamW corrects its start-up bias by the age of
the tensor: a new column first steps a few times farther than the rate says. Masking, as the paper does, entails it.)

From arXiv 2601.04823 and its code: S = f g / (R + 1)^1.2, decays, quotas and caps, growth from 3 % of the steps to one
interval before the end, a constant scale. OURS, where these are silent or would not compare with the other methods:
- gate_proj, up_proj and down_proj adapted; attention and router by LoRA at the target rank; a constant learning rate.
  The paper adapts up and down alone, trains the router's own weights, and decays the rate.
- r_init : r_target : r_max = 1 : 2 : 4 and 200 of 3,750 steps between growths: the paper's sizes, in proportion.
- Scores come once a step from the global batch's gradient, however it was cut; the code takes them at A and at B of
  every micro-batch. grad A_j . A_j = grad B_j . B_j (scaling one by c, the other by 1 / c, changes nothing): B will do.
- A share is of the layer's sum. Every layer ends at E * r_target exactly: the quota counts an expert's rank once (the
  code: projections), and what the cap leaves of a quota is handed out in a second round.

Dimensions: L layers, E experts a layer (all of them adapted), R rank of an expert, r_max reserved rank.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from command.cli import InputError
from model import MoETransformer
from neighbours.ranks import trains

GAMMA = 1.2  # how strongly a large rank counts against growing more
RESERVED = 2  # r_max / r_target: the rank to attach with
DECAY = 0.9  # per optimizer step, of both scores
EPS = 1e-6  # an expert that was not asked, or did not learn, still ranks by the other factor


def growth_steps(steps: int) -> range:
    """The optimizer steps (counted from 1) after which ranks grow: from 3 % of them to one interval before the end."""
    interval = max(1, round(steps * 200 / 3750))
    return range(-(-3 * steps // 100), steps - interval + 1, interval)


def saliency(usage: Tensor, importance: Tensor, ranks: Tensor) -> Tensor:
    """S = f g / (R + 1)^gamma, f and g being shares within the layer.  three times [L, E] -> [L, E]

    usage: decayed routing counts. importance: mean score of the expert's R dimensions.
    """
    f, g = (x / x.sum(-1, keepdim=True).clamp(min=1e-30) + EPS for x in (usage.double(), importance.double()))
    return f * g / (ranks + 1.0) ** GAMMA


def allocate(saliency: Tensor, quota: int, cap: int, free: Tensor) -> Tensor:
    """Hand out a layer's quota by falling saliency, at most `cap` to one expert in a round.  -> int64 [E]

    saliency [E], ties to the lower id; free [E]: how far each expert can grow. A second round is rare: short runs.
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
        """model: pairs of kind `lora` on all experts, r_max >= r_target. Raises InputError if it cannot grow."""
        self.pairs = [list(model.layers[i].mlp.experts.lora.values()) for i in model.config.moe_layers]
        B = self.pairs[0][0].lora_B  # [E, out, r_max]
        L, E, self.r_max = len(self.pairs), len(B), B.shape[-1]
        self.steps = growth_steps(steps)
        if not self.steps:
            raise InputError(f"a run of {steps} step has no time for ranks to grow; want at least 2 steps")
        r_init = max(1, r_target // 2)
        self.budget = E * r_target  # of a layer
        self.quota = -(-E * (r_target - r_init) // len(self.steps))  # of a layer, at one growth
        self.cap = max(1, -(-(self.r_max - r_init) // 10))  # of an expert, at one growth
        self.usage = torch.zeros(L, E)  # on the CPU, as ranks and counts are
        self.score = torch.zeros(L, E, device=B.device)
        self.history = [(0, torch.full((L, E), r_init))]  # after which step, the ranks [L, E]
        self.set_masks()

    def ranks(self) -> Tensor:
        """The rank of every expert now.  int64 [L, E]"""
        return self.history[-1][1]

    def spent(self) -> dict[str, int]:
        """For the log: the ranks of all experts together, and the sum that they may grow to."""
        return {"active_ranks": int(self.ranks().sum()), "rank_budget": len(self.ranks()) * self.budget}

    def set_masks(self) -> None:
        """Which columns of B train, placed as B is: each process keeps the experts it holds.  L times [E, 1, r_max]"""
        self.masks = []
        for (pair, *_), row in zip(self.pairs, self.ranks(), strict=True):
            B, mask = pair.lora_B, trains(row, self.r_max).unsqueeze(1).to(pair.lora_B.device)
            if isinstance(B, DTensor):
                mask = distribute_tensor(mask, B.device_mesh, B.placements, src_data_rank=None)
            self.masks.append(mask)

    @torch.no_grad()
    def observe(self, counts: Tensor) -> None:
        """Score the experts and hold back what has not grown. Call it after backward and before clipping.

        counts [L, E]: tokens that chose each expert in this step, over all processes; on the CPU.
        """
        self.usage.mul_(DECAY).add_(counts)
        layers = []
        for pairs, mask in zip(self.pairs, self.masks, strict=True):
            # What has not grown scores 0, as its B is 0, and enters with the score 0 that the method asks for: the
            # sum over dimensions is all there is to keep.
            scores = [(pair.lora_B * pair.lora_B.grad).sum(1).abs().sum(-1) for pair in pairs]  # [E] each
            layers.append(sum(scores) / len(scores))
            for pair in pairs:
                pair.lora_B.grad.mul_(mask)
        score = torch.stack(layers)  # [L, E]
        self.score.lerp_(score.full_tensor() if isinstance(score, DTensor) else score, 1 - DECAY)

    def saliency(self) -> Tensor:
        """Who should grow next.  float64 [L, E]"""
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

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs to go on as if nothing had happened; the same on every process."""
        steps, ranks = zip(*self.history, strict=True)
        return {"steps": torch.tensor(steps), "ranks": torch.stack(ranks), "usage": self.usage, "score": self.score}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.history = list(zip(state["steps"].tolist(), state["ranks"].cpu(), strict=True))
        self.usage.copy_(state["usage"])
        self.score.copy_(state["score"])
        self.set_masks()


def draw_ranks(history: list[tuple[int, Tensor]], path: Path) -> None:
    """Heat maps of the ranks (`RankGrowth.history`): at the start, at two growths between, and at the end."""
    from matplotlib.figure import Figure  # pyplot would bring global state, and look for a display

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
