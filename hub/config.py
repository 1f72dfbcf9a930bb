"""What a config.json means: the numbers the forward needs, and what each model family leaves unsaid.

Porting another mixture of experts starts here: its `model_type` becomes a row of `FAMILIES`.
"""

from dataclasses import dataclass, field

from command.cli import InputError


@dataclass(frozen=True)
class Family:
    """What a `model_type` fixes that its config.json does not say: key names, router rule, norms, biases, defaults."""

    num_experts: str  # config key of E
    expert_size: str = "moe_intermediate_size"  # config key of F
    moe: str = "mlp"  # name of the MoE block in the file: model.layers.{i}.{moe}.gate.weight
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # of an expert, in the file
    shared_expert: str | None = None  # name in the file of the MLP that every token passes beside its K experts
    shared_expert_gate: bool = False  # sigmoid(w . x) scales that MLP's output
    always_norm_topk_prob: bool = False  # the K routing weights sum to 1; False: if norm_topk_prob says so
    qk_norm: str | None = None  # RMSNorm of q and k over the whole "projection", or over each "head"
    qkv_bias: bool = False
    sliding_window: bool = False  # config.json may limit how far back a query sees
    rope_theta: float = 1e4  # where config.json leaves it out
    rms_norm_eps: float = 1e-6  # where config.json leaves it out


FAMILIES = {
    "olmoe": Family("num_experts", "intermediate_size", qk_norm="projection", rms_norm_eps=1e-5),
    "mixtral": Family(
        "num_local_experts",
        "intermediate_size",
        moe="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        always_norm_topk_prob=True,
        sliding_window=True,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
    ),
    "deepseek": Family("n_routed_experts", shared_expert="shared_experts"),
    "qwen2_moe": Family("num_experts", shared_expert="shared_expert", shared_expert_gate=True, qkv_bias=True),
    "qwen3_moe": Family("num_experts", qk_norm="head"),
}

# Keys of config.json that change what a model computes, with the only value that this forward implements.
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "use_sliding_window": False,
    "layer_types": None,
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    "mlp_only_layers": [],
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "quantization_config": None,
}
# Keys that are read below, and keys that change nothing here: bookkeeping, training settings, rotary positions' limits.
KNOWN = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "num_local_experts", "n_routed_experts",
    "num_experts_per_tok", "norm_topk_prob", "n_shared_experts", "shared_expert_intermediate_size",
    "first_k_dense_replace", "rope_theta", "rope_parameters", "rms_norm_eps", "clip_qkv", "sliding_window",
    "tie_word_embeddings", "eos_token_id", "pad_token_id", "qkv_bias",
    "architectures", "auto_map", "transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache",
    "bos_token_id", "attention_dropout", "initializer_range", "max_position_embeddings", "pretraining_tp",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux", "ep_size",
    "max_window_layers", "chunk_size_feed_forward", "is_encoder_decoder", "output_attentions", "output_hidden_states",
    "return_dict", "id2label", "label2id", "problem_type",
}  # fmt: skip


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
    rms_norm_eps: float
    num_dense_layers: int = 0  # first layers, whose MLP is one for all tokens (first_k_dense_replace)
    dense_intermediate_size: int = 0  # of their MLP
    shared_intermediate_size: int = 0  # of the MLP that every token passes beside its experts; 0: there is none
    clip_qkv: float | None = None  # OLMoE: clamp q, k, v to [-clip, clip]
    sliding_window: int | None = None  # Mixtral derivatives: positions a query sees, itself included
    tie_word_embeddings: bool = False
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    hub: dict = field(default_factory=dict, repr=False, compare=False)  # config.json as read, for saving

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def moe_layers(self) -> range:
        """The layers that have a router and experts; L of counts, masks and selected_experts is their number."""
        return range(self.num_dense_layers, self.num_hidden_layers)

    @classmethod
    def from_dict(cls, hub: dict) -> "MoEConfig":
        """Read the hub's config.json; a value that this forward does not implement is an InputError."""
        model_type = hub.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise InputError(f"config.json: model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
        family = FAMILIES[model_type]
        rope = hub.get("rope_parameters") or {}  # transformers 5 nests what 4 keeps at the top level
        check_values(hub, rope, family)
        size_keys = ("vocab_size", "hidden_size", "num_attention_heads", "num_experts_per_tok")
        sizes = {key: whole(hub, key) for key in size_keys} | {
            "num_hidden_layers": whole(hub, "num_hidden_layers", most=1000)
        }
        heads, expert_size = sizes["num_attention_heads"], whole(hub, family.expert_size)
        if not hub.get("head_dim") and sizes["hidden_size"] % heads:
            raise InputError(f"config.json: hidden_size {sizes['hidden_size']} is no multiple of {heads} heads")
        num_dense = whole(hub, "first_k_dense_replace", 0) if model_type == "deepseek" else 0
        shared_size = 0
        if family.shared_expert:
            several = whole(hub, "n_shared_experts", 0) * expert_size  # DeepSeek stores them as one wide MLP
            shared_size = several or whole(hub, "shared_expert_intermediate_size", 0)
        # transformers 5 writes Qwen3's under Mixtral's name
        num_experts = next((key for key in (family.num_experts, "num_local_experts") if key in hub), family.num_experts)
        windowed = family.sliding_window and hub.get("sliding_window") is not None
        config = cls(
            model_type=model_type,
            **sizes,
            intermediate_size=expert_size,
            num_key_value_heads=whole(hub, "num_key_value_heads", heads),
            head_dim=whole(hub, "head_dim", sizes["hidden_size"] // heads),
            num_experts=whole(hub, num_experts),
            norm_topk_prob=family.always_norm_topk_prob or bool(hub.get("norm_topk_prob")),
            clip_qkv=hub.get("clip_qkv"),
            rms_norm_eps=hub.get("rms_norm_eps") or family.rms_norm_eps,
            rope_theta=rope.get("rope_theta") or hub.get("rope_theta") or family.rope_theta,
            num_dense_layers=num_dense,
            dense_intermediate_size=whole(hub, "intermediate_size") if num_dense else 0,
            shared_intermediate_size=shared_size,
            sliding_window=whole(hub, "sliding_window") if windowed else None,
            tie_word_embeddings=bool(hub.get("tie_word_embeddings")),
            eos_token_id=token(hub, "eos_token_id", sizes["vocab_size"]),
            pad_token_id=token(hub, "pad_token_id", sizes["vocab_size"]),
            hub=hub,
        )
        for key, value, most in (
            ("num_experts_per_tok", config.num_experts_per_tok, config.num_experts),
            ("first_k_dense_replace", config.num_dense_layers + 1, config.num_hidden_layers),
        ):
            if value > most:
                raise InputError(f"config.json: {key} {hub[key]} is too large; want at most {most - value + hub[key]}")
        if config.num_hidden_layers * config.num_experts > MOST_EXPERTS:
            stacks = f"{config.num_hidden_layers} layers of {config.num_experts} experts"
            raise InputError(f"config.json: {stacks} are too many; want at most {MOST_EXPERTS:,} in all")
        if heads % config.num_key_value_heads or config.head_dim % 2:
            raise InputError(
                f"config.json: {heads} heads, {config.num_key_value_heads} key-value heads of size {config.head_dim}; "
                "want a whole number of heads for each key-value head, and an even size"
            )
        return config


# Far beyond any model, and still quick to refuse: the names of all weights are made before a file is looked into.
MOST, MOST_EXPERTS = 10**6, 10**5


def whole(hub: dict, key: str, default: int | None = None, most: int = MOST) -> int:
    """A size from config.json; missing or null is `default`. Raises InputError for anything but a sane whole number."""
    value = hub.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise InputError(f"config.json: {key} is missing")
    least = 1 if default is None or default else 0
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"config.json: {key} is {value!r:.40}; want a whole number from {least} to {most:,}")
    return value


def token(hub: dict, key: str, vocab_size: int) -> int | None:
    """A token id from config.json, the first where there are several; None where there is none (some write -1)."""
    value = hub.get(key)
    first = value[0] if isinstance(value, list) and value else value
    if first is None or first == -1:
        return None
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < vocab_size:
        raise InputError(f"config.json: {key} is {value!r:.40}; want a token id from 0 to {vocab_size - 1}")
    return first


def check_values(hub: dict, rope: dict, family: Family) -> None:
    """Raise InputError for a value that is not implemented, or a number that is none."""
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if not isinstance(rope, dict) or rope.keys() - known:
        raise InputError(f"config.json: rope_parameters {rope!r:.80} cannot be read, only rope_theta and rope_type")
    allowed = ONLY | ({"qkv_bias": True} if family.qkv_bias else {})
    for key, only in allowed.items():
        value = (rope | hub).get(key)
        if key == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
            continue
        if value not in (None, only):
            raise InputError(f"config.json: {key} {value!r} is not implemented, only {only!r}")
    for key in rope.keys() & {"rope_type", "type"}:
        if rope[key] not in (None, "default"):
            raise InputError(f"config.json: rope_type {rope[key]!r} is not implemented, only 'default'")
    for key in ("norm_topk_prob", "tie_word_embeddings"):
        if hub.get(key) not in (None, True, False):
            raise InputError(f"config.json: {key} is {hub[key]!r:.40}; want true or false")
    for key, value in (rope | hub).items():
        if key in ("rope_theta", "rms_norm_eps", "clip_qkv", "max_position_embeddings") and value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e12:
                raise InputError(f"config.json: {key} is {value!r:.40}; want a positive number up to 1e12")


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
    "deepseek-moe-16b": {
        "model_type": "deepseek",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 100001,
    },
}
