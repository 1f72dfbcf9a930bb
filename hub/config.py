"""config.json of a checkpoint: the numbers of the forward pass, and what each model family leaves unsaid.

    numbers = read_numbers(json.loads(text))     # keyword arguments of model.MoEConfig

To port another mixture of experts, start here: its `model_type` becomes a row of `FAMILIES`.
"""

from dataclasses import dataclass
from pathlib import Path

from command.cli import InputError
from command.files import read_json


@dataclass(frozen=True)
class Family:
    """What a `model_type` fixes without saying so in config.json: key names, router rule, norms, biases, defaults."""

    num_experts: tuple[str, ...]  # config keys of E; the first that is there counts
    expert_size: str = "moe_intermediate_size"  # config key of F
    num_dense_layers: str | None = None  # config key: first layers with one MLP of intermediate_size for all tokens
    num_shared: str | None = None  # config key: shared experts, stored as one MLP as wide as so many experts
    shared_size: str | None = None  # config key: size of one shared expert
    shared_expert_gate: bool = False  # sigmoid(w . x) scales the shared expert's output
    moe: str = "mlp"  # name of the MoE block in the files: model.layers.{i}.{moe}.{router}.weight
    router: str = "gate"
    shared_expert: str = "shared_expert"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # {moe}.experts.{e}.{projection}.weight
    stacks: tuple[str, str] | None = None  # or {moe}.{stack}: [E, 2F, D], gate's rows first, and [E, D, F]
    peft: str | None = None  # newest transformers under which PEFT 0.21 is known to load our files, if any
    always_norm_topk_prob: bool = False  # the K routing weights sum to 1; False: only if norm_topk_prob says so
    topk_before_softmax: bool = False  # softmax over the K largest logits
    qk_norm: str | None = None  # RMSNorm of q and k over the whole "projection", or over each "head"
    qkv_bias: bool = False
    clip_qkv: bool = False  # config.json may limit q, k and v
    sliding_window: bool = False  # config.json may limit how far back a query sees
    multipliers: bool = False  # config.json scales embeddings, residual branches, attention scores and logits
    rope_theta: float = 1e4  # if config.json has none
    rms_norm_eps: float = 1e-6  # if config.json has none
    harmless: tuple[str, ...] = ()  # config keys that change nothing in this family


MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
SLIDING = ("sliding_window", "max_window_layers")  # not used while use_sliding_window is false
FAMILIES = {
    "olmoe": Family(
        num_experts=("num_experts", "num_local_experts"),
        expert_size="intermediate_size",
        qk_norm="projection",
        clip_qkv=True,
        peft="5",
        rms_norm_eps=1e-5,
        harmless=("head_dim",),
    ),
    "mixtral": Family(
        num_experts=("num_local_experts",),
        expert_size="intermediate_size",
        moe="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        always_norm_topk_prob=True,
        sliding_window=True,
        peft="5",
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        harmless=("head_dim", "router_jitter_noise"),
    ),
    "deepseek": Family(
        num_experts=("n_routed_experts",),
        num_dense_layers="first_k_dense_replace",
        num_shared="n_shared_experts",
        shared_expert="shared_experts",
        peft="4",
        harmless=("aux_loss_alpha", "seq_aux", "ep_size"),
    ),
    "qwen2_moe": Family(
        num_experts=("num_experts",),
        shared_size="shared_expert_intermediate_size",
        shared_expert_gate=True,
        qkv_bias=True,
        peft="4",
        harmless=("head_dim", "intermediate_size", *SLIDING),
    ),
    "qwen3_moe": Family(
        num_experts=("num_experts", "num_local_experts"),  # transformers 5 writes the second
        qk_norm="head",
        peft="5",
        harmless=("head_dim", "intermediate_size", *SLIDING),
    ),
    "granitemoe": Family(
        num_experts=("num_local_experts",),
        expert_size="intermediate_size",
        moe="block_sparse_moe",
        router="router.layer",
        stacks=("input_linear.weight", "output_linear.weight"),
        topk_before_softmax=True,
        multipliers=True,
    ),
}

# Keys of config.json that change what a model computes, with the only value that this forward implements.
ONLY = {
    "hidden_act": "silu",
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "attention_bias": False,
    "mlp_bias": False,
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
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "quantization_config": None,
    "pruned_heads": {},
}
READ = set(  # keys that `read_numbers` reads in every family
    """
    model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads num_experts_per_tok
    rope_theta rope_parameters rope_scaling rms_norm_eps tie_word_embeddings eos_token_id pad_token_id
    """.split()
)
HARMLESS = set(  # keys that change nothing here: bookkeeping, training settings, defaults of generation
    """
    architectures auto_map transformers_version _name_or_path _commit_hash torch_dtype dtype attn_implementation
    _attn_implementation _attn_implementation_autoset experts_implementation _experts_implementation use_cache
    bos_token_id sep_token_id unk_token_id cls_token_id mask_token_id decoder_start_token_id tokenizer_class
    attention_dropout initializer_range max_position_embeddings pretraining_tp output_router_logits
    router_aux_loss_coef is_decoder tie_encoder_decoder cross_attention_hidden_size chunk_size_feed_forward
    output_attentions output_hidden_states return_dict use_return_dict torchscript use_bfloat16 tf_legacy_loss
    gradient_checkpointing id2label label2id problem_type finetuning_task task_specific_params prefix max_length
    min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens unsloth_fixed
    unsloth_version
    """.split()
)
ignored: set[str] = set()  # the keys of --ignore-config-keys
IGNORE_HELP = "unknown keys of config.json to ignore, separated by commas"


def ignore_keys(keys: str | None) -> None:
    """Go on from now on although these keys of a config.json are unknown: the value of --ignore-config-keys."""
    ignored.update(key.strip() for key in (keys or "").split(","))


NUMBERS = ("rms_norm_eps", "clip_qkv", "max_position_embeddings")  # positive, if they are there
# Far beyond any model, and small enough to refuse quickly: the names of all weights are made before a file is read.
LARGEST, MOST_EXPERTS = 10**6, 10**5


def read_numbers(hub: dict) -> dict:
    """The fields of model.MoEConfig from a config.json. Raises InputError for a value that is not implemented."""
    model_type = hub.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"config.json: model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    rope = rope_values(hub)
    check_values(hub, family)
    hidden, heads = integer(hub, "hidden_size"), integer(hub, "num_attention_heads")
    layers = integer(hub, "num_hidden_layers", most=1000)
    vocab_size, expert_size = integer(hub, "vocab_size"), integer(hub, family.expert_size)
    if not hub.get("head_dim") and hidden % heads:
        raise InputError(f"config.json: hidden_size {hidden} is not a multiple of {heads} heads")
    head_dim, kv_heads = integer(hub, "head_dim", hidden // heads), integer(hub, "num_key_value_heads", heads)
    if heads % kv_heads or head_dim % 2:
        raise InputError(
            f"config.json: {heads} heads, {kv_heads} key-value heads of size {head_dim}; "
            "expected a whole number of heads for each key-value head, and an even size"
        )
    E = integer(hub, next((key for key in family.num_experts if key in hub), family.num_experts[0]))
    K = integer(hub, "num_experts_per_tok", most=E)
    num_dense = integer(hub, family.num_dense_layers, 0, layers - 1) if family.num_dense_layers else 0
    if layers * E > MOST_EXPERTS:
        raise InputError(f"config.json: {layers} layers of {E} experts; expected at most {MOST_EXPERTS:,} in all")
    shared_size = integer(hub, family.num_shared, 0) * expert_size if family.num_shared else 0
    shared_size = integer(hub, family.shared_size, 0) if family.shared_size else shared_size
    has_window = family.sliding_window and hub.get("sliding_window") is not None
    return dict(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=expert_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=family.always_norm_topk_prob or bool(hub.get("norm_topk_prob")),
        rope_theta=rope.get("rope_theta") or family.rope_theta,
        rms_norm_eps=hub.get("rms_norm_eps") or family.rms_norm_eps,
        num_dense_layers=num_dense,
        dense_intermediate_size=integer(hub, "intermediate_size") if num_dense else 0,
        shared_intermediate_size=shared_size,
        shared_expert_gate=family.shared_expert_gate,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        clip_qkv=hub.get("clip_qkv") if family.clip_qkv else None,
        sliding_window=integer(hub, "sliding_window") if has_window else None,
        tie_word_embeddings=bool(hub.get("tie_word_embeddings")),
        eos_token_ids=token_ids(hub, "eos_token_id", vocab_size),
        pad_token_id=next(iter(token_ids(hub, "pad_token_id", vocab_size)), None),
        topk_before_softmax=family.topk_before_softmax,
        **{key: hub.get(key) or 1.0 for key in MULTIPLIERS if family.multipliers},
        hub=hub,
    )


def integer(hub: dict, key: str, default: int | None = None, most: int = LARGEST) -> int:
    """A size from config.json; missing or null means `default`. Raises InputError for any other value out of range."""
    value = default if hub.get(key) is None else hub[key]
    if value is None:
        raise InputError(f"config.json: {key} is missing")
    least = 0 if default == 0 else 1
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"config.json: {key} is {value!r:.40}; expected a whole number from {least} to {most:,}")
    return value


def token_ids(hub: dict, key: str, vocab_size: int) -> tuple[int, ...]:
    """The token ids under a key of config.json, one or a list. Empty if there is none (some files write -1).

    An end of text outside the vocabulary, as in random test models, can never be generated: it is left out.
    """
    value = hub.get(key)
    ids = value if isinstance(value, list) else [] if value in (None, -1) else [value]
    for i in ids:
        is_integer = isinstance(i, int) and not isinstance(i, bool)
        if not is_integer or not (0 <= i < vocab_size or key == "eos_token_id"):
            raise InputError(f"config.json: {key} is {value!r:.40}; expected token ids from 0 to {vocab_size - 1}")
    return tuple(i for i in ids if 0 <= i < vocab_size)


def read_by(family: Family) -> set[str | None]:
    """The keys of config.json that are read in this family besides READ. None: it has no such key."""
    is_read = {
        "intermediate_size": family.num_dense_layers,
        "norm_topk_prob": not (family.always_norm_topk_prob or family.topk_before_softmax),
        "clip_qkv": family.clip_qkv,
        "sliding_window": family.sliding_window,
        **dict.fromkeys(MULTIPLIERS, family.multipliers),
    }
    sizes = {family.expert_size, family.num_dense_layers, family.num_shared, family.shared_size}
    return sizes | {*family.num_experts} | {key for key, value in is_read.items() if value}


ROPE = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
NESTED = ("rope_parameters", "rope_scaling")  # what transformers 4 keeps at the top level, transformers 5 nests


def rope_values(hub: dict) -> dict:
    """What config.json says about rotary embeddings, at its top level and nested.

    Raises InputError for a value that is not implemented or not valid, and for two values that contradict each other.
    """
    values_by_key, source = {}, {}
    for place in ("", *NESTED):
        values = hub.get(place) if place else {key: hub.get(key) for key in ROPE if key != "type"}
        values = {} if values is None else values
        if not isinstance(values, dict) or values.keys() - {*ROPE}:
            raise InputError(f"config.json: {place} {values!r:.80} cannot be read, only {', '.join(ROPE)}")
        for key in ROPE:
            value, name = values.get(key), f"{place}.{key}".lstrip(".")
            if value is None:
                continue
            if key == "rope_theta":
                check_positive(name, value)
            elif value != (only := ONLY.get(key, "default")) or isinstance(value, bool):
                raise InputError(f"config.json: {name} {value!r:.40} is not implemented, only {only!r}")
            if values_by_key.setdefault(key, value) != value:
                raise InputError(
                    f"config.json: {source[key]} is {values_by_key[key]!r}, {name} is {value!r}; they must agree"
                )
            source.setdefault(key, name)
    return values_by_key


def check_positive(name: str, value: object) -> None:
    """Raise InputError for a value of config.json that is not a positive number of a sensible size."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e12:
        raise InputError(f"config.json: {name} is {value!r:.40}; expected a positive number up to 1e12")


def check_values(hub: dict, family: Family) -> None:
    """Raise InputError for an unknown key, a value that is not implemented, or one that is not a valid number."""
    allowed = {key: only for key, only in ONLY.items() if not (family.multipliers and key in MULTIPLIERS)}
    allowed |= {"qkv_bias": family.qkv_bias}
    known = READ | HARMLESS | read_by(family) | {*family.harmless} | allowed.keys() | ignored
    if unknown := sorted(key for key, value in hub.items() if value is not None and key not in known):
        given = ", ".join(f"{key} {hub[key]!r:.40}" for key in unknown)
        commands = "train, profile, evaluate and export"
        advice = f"if that changes nothing, {commands} go on with --ignore-config-keys {','.join(unknown)}"
        raise InputError(f"config.json: {given}: unknown in a model of type {hub['model_type']}; {advice}")
    for key, only in allowed.items():
        value = hub.get(key)
        if key == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
            continue
        if value not in (None, only):
            raise InputError(f"config.json: {key} {value!r} is not implemented, only {only!r}")
    for key in ("norm_topk_prob", "tie_word_embeddings"):
        if hub.get(key) not in (None, True, False):
            raise InputError(f"config.json: {key} is {hub[key]!r:.40}; expected true or false")
    for key in (*NUMBERS, *MULTIPLIERS):
        if hub.get(key) is not None:
            check_positive(key, hub[key])


HUB_IDS = {  # whose configs are known without a download
    "allenai/OLMoE-1B-7B-0924": "olmoe-1b-7b",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral-8x7b",
    "Qwen/Qwen1.5-MoE-A2.7B": "qwen1.5-moe-a2.7b",
    "deepseek-ai/deepseek-moe-16b-base": "deepseek-moe-16b",
}
# config.json of the same models, for counting without weights (`reproduce.py params`).
PRESETS = {name: read_json(Path(__file__).parent / "presets" / f"{name}.json") for name in HUB_IDS.values()}
