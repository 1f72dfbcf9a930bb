"""What a config.json means: the numbers the forward needs, and what each model family leaves unsaid.

Porting another mixture of experts starts here: its `model_type` becomes a row of `FAMILIES`.
"""

from dataclasses import dataclass, field

from cli import InputError


@dataclass(frozen=True)
class Family:
    """What a `model_type` fixes that its config.json does not say: key names, router rule, q/k norm."""

    moe: str  # name of the MoE block in the file: model.layers.{i}.{moe}.gate.weight
    projections: tuple[str, str, str]  # names of an expert's gate, up and down projection in the file
    num_experts: str  # config key of E
    always_norm_topk_prob: bool  # the K routing weights sum to 1; False: if norm_topk_prob says so
    qk_norm: bool  # RMSNorm over the whole q and k projection
    rope_theta: float  # where config.json leaves it out


FAMILIES = {
    "olmoe": Family("mlp", ("gate_proj", "up_proj", "down_proj"), "num_experts", False, True, 1e4),
    "mixtral": Family("block_sparse_moe", ("w1", "w3", "w2"), "num_local_experts", True, False, 1e6),
}


@dataclass(frozen=True)
class MoEConfig:
    """The numbers of config.json that the forward needs, under the hub's names."""

    model_type: str  # key of FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    rope_theta: float
    clip_qkv: float | None = None  # OLMoE: clamp q, k, v to [-clip, clip]
    rms_norm_eps: float = 1e-5  # some OLMoE revisions leave it out
    sliding_window: int | None = None  # Mixtral derivatives: positions a query sees, itself included
    tie_word_embeddings: bool = False
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    hub: dict = field(default_factory=dict, repr=False, compare=False)  # config.json as read, for saving

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @classmethod
    def from_dict(cls, hub: dict) -> "MoEConfig":
        """Read the hub's config.json; a value that this forward does not implement is an InputError."""
        model_type = hub.get("model_type")
        if model_type not in FAMILIES:
            raise InputError(f"config.json: model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
        family = FAMILIES[model_type]
        rope = hub.get("rope_parameters") or {}  # transformers 5 nests what 4 keeps at the top level
        supported = {
            "hidden_act": (hub.get("hidden_act", "silu"), "silu"),
            "attention_bias": (hub.get("attention_bias") or False, False),
            "rope_scaling": (hub.get("rope_scaling"), None),
            "rope_type": (rope.get("rope_type", "default"), "default"),
        }
        for key, (value, allowed) in supported.items():
            if value != allowed:
                raise InputError(f"config.json: {key} {value!r} is not implemented, only {allowed!r}")
        try:
            heads = hub["num_attention_heads"]
            eos = hub.get("eos_token_id")
            config = cls(
                model_type=model_type,
                vocab_size=hub["vocab_size"],
                hidden_size=hub["hidden_size"],
                intermediate_size=hub["intermediate_size"],
                num_hidden_layers=hub["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=hub.get("num_key_value_heads") or heads,
                head_dim=hub.get("head_dim") or hub["hidden_size"] // heads,
                num_experts=hub[family.num_experts],
                num_experts_per_tok=hub["num_experts_per_tok"],
                norm_topk_prob=family.always_norm_topk_prob or hub.get("norm_topk_prob", False),
                clip_qkv=hub.get("clip_qkv"),
                rms_norm_eps=hub.get("rms_norm_eps", cls.rms_norm_eps),
                rope_theta=rope.get("rope_theta") or hub.get("rope_theta", family.rope_theta),
                sliding_window=hub.get("sliding_window"),
                tie_word_embeddings=hub.get("tie_word_embeddings", False),
                eos_token_id=eos[0] if isinstance(eos, list) else eos,
                pad_token_id=hub.get("pad_token_id"),
                hub=hub,
            )
        except KeyError as key:
            raise InputError(f"config.json: {key} is missing") from None
        if not 0 < config.num_experts_per_tok <= config.num_experts:
            raise InputError(
                f"config.json: num_experts_per_tok {config.num_experts_per_tok}, want 1..{config.num_experts}"
            )
        return config


# config.json of the paper's backbones, for counting without weights (`reproduce.py params`).
PRESETS = {
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 50279,
        "pad_token_id": 1,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
    },
}
