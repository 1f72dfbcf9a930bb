"""The tables as the paper prints them, the claims of its text, and a question that MoE-Sieve leaves open."""

from dataclasses import replace

from lab.paper.table import Column, Row, Table

MATH = Column("GSM8K", "math", "accuracy", tuned=True)
CODE = tuple(Column(f"HumanEval pass@{k}", "code", f"pass@{k}", tuned=True) for k in (1, 5, 10))
SAFE = Column("HEx-PHI refusals", "safety", "refusal_rate", tuned=True)
OVER_REFUSAL = Column("Refusals of harmless requests", "safety", "over-refusal, lori", tuned=True)
CONSTANT = {
    "change": {"schedule": "constant", "lr": 3e-3, "lr_warmup": 0},
    "note": "at a constant rate of 3e-3 (FFT: 3e-4)",
}


def constant(*columns: Column) -> tuple[Column, ...]:
    """Columns of runs at one constant rate, 3e-3 (full fine-tuning: 3e-4), as in LoRI's code."""
    return tuple(column._replace(tuned=False, **CONSTANT) for column in columns)


AT_BEST = (MATH, *CODE, SAFE, OVER_REFUSAL)
ALL = (MATH, *constant(*CODE, SAFE))
ONE_SEED = (
    "The rates of tiny-code, tiny-safety and tiny-mixtral come from sweeps of one seed, around the best rate on "
    "tiny-math. The intervals do not include the uncertainty of that choice. On tiny-safety the rate is chosen by the "
    "mean of two shares: unsafe instructions that are refused, and safe ones that are answered."
)
SHARED_RATE = "Rows with other experts or modules have the best learning rate of their method."
ONE_RATE = constant(  # what a common rate makes of Table 2
    *(column._replace(title=f"{column.title}, one rate") for column in AT_BEST if column not in CODE[1:])
)
METHODS = Table(
    "Table 2: methods on three tasks, OLMoE-1B-7B",
    columns=(*AT_BEST, *ONE_RATE),
    seeds=5,
    rows=(
        Row("FFT", "fft", (27.64, 16.4, 21.04, 22.38, 97.32), "LoRA"),
        Row("LoRA", "lora", (26.37, 16.52, 21.80, 24.03, 98.75), sieve="full_lora"),
        Row("DoRA", "dora", (26.82, 16.72, 21.93, 23.68, 98.86), "LoRA"),
        Row("LoRI-D", "lori-d", (28.22, 16.98, 21.85, 23.75, 96.56), "LoRA"),
        Row("LoRI-S", "lori-s", (25.49, 16.46, 20.22, 22.37, 98.44), "LoRA"),
        Row("HELLoRA", "hellora", (29.49, 17.87, 22.04, 23.82, 99.06), "LoRA", "hotk8"),
        Row("HELLoRI-D", "hellori-d", (28.42, 16.89, 20.89, 22.21, 98.75), "LoRA"),
        Row("HELLoRI-S", "hellori-s", (25.10, 16.22, 20.27, 21.76, 97.50), "LoRA"),
        Row("MoE-Sieve", "moe-sieve", against="LoRA", sieve="hotk16", claims=(0.0,)),
        Row("DR-LoRA", "dr-lora", against="LoRA", claims=(2.2, 2.2)),
    ),
    notes=(
        "For MoE-Sieve and DR-LoRA, the differences beside the paper's values are those that their own papers claim. "
        "MoE-Sieve is equivalent to LoRA within 2 points (in 5 of 6 pairs of model and task). DR-LoRA is consistently "
        "above LoRA, and 2.2 points above its strongest baseline, on average over six tasks on OLMoE-1B-7B. "
        + ONE_SEED,
    ),
)
NAMED = {row.name: row for row in METHODS.rows}
HELLORI = Table(
    "HELLoRI beside LoRI and HELLoRA (section 4.3), OLMoE-1B-7B",
    columns=(*AT_BEST, *ONE_RATE),
    seeds=5,
    notes=(
        "The text says that HELLoRI matches or exceeds LoRI and does not overtake HELLoRA. On GSM8K the paper's own "
        "HELLoRI-S is below its LoRI-S. " + ONE_SEED,
    ),
    rows=(
        *(NAMED[name]._replace(against=None, sieve=None) for name in ("LoRI-D", "LoRI-S", "HELLoRA")),
        *(NAMED[f"HELLoRI-{kind}"]._replace(against=f"LoRI-{kind}") for kind in "DS"),
        *(NAMED[f"HELLoRI-{kind}"]._replace(name=f"HELLoRI-{kind} again", against="HELLoRA") for kind in "DS"),
    ),
)
MIXTRAL = Table(
    "Table 3: methods on math, Mixtral-8x7B",
    columns=(MATH,),
    notes=(ONE_SEED,),
    model="mixtral",
    rows=(
        Row("LoRA", "lora", (67.73,)),
        Row("LoRI-D", "lori-d", (64.84,), "LoRA"),
        Row("LoRI-S", "lori-s", (63.98,), "LoRA"),
        Row("HELLoRA", "hellora", (68.28,), "LoRA"),
        Row("HELLoRI-D", "hellori-d", (64.61,), "LoRA"),
        Row("HELLoRI-S", "hellori-s", (66.17,), "LoRA"),
    ),
)
SELECTION = Table(
    "Table 4: which experts, OLMoE-1B-7B",
    columns=(MATH,),
    seeds=5,
    notes=("_M: one set of hot experts for all layers. _C: the coldest of each layer. " + SHARED_RATE,),
    rows=(
        Row("HELLoRA", "hellora", (29.49,), sieve="hotk8"),
        Row("HELLoRA_M", "hellora", (28.51,), "HELLoRA", change={"experts": "model-hot"}),
        Row("HELLoRA_C", "hellora", (25.88,), "HELLoRA", change={"experts": "cold"}),
        Row("random experts", "hellora", against="HELLoRA", sieve="randk8", change={"experts": "random"}),
        Row("all experts, same budget", "lora-flat", against="HELLoRA"),
        Row("MoE-Sieve, a quarter", "moe-sieve", against="HELLoRA", sieve="hotk16"),
        Row("HELLoRI-D", "hellori-d", (28.42,)),
        Row("HELLoRI-D_M", "hellori-d", (23.14,), "HELLoRI-D", change={"experts": "model-hot"}),
        Row("HELLoRI-D_C", "hellori-d", (25.19,), "HELLoRI-D", change={"experts": "cold"}),
        Row("HELLoRI-S", "hellori-s", (25.10,)),
        Row("HELLoRI-S_M", "hellori-s", (23.14,), "HELLoRI-S", change={"experts": "model-hot"}),
        Row("HELLoRI-S_C", "hellori-s", (23.04,), "HELLoRI-S", change={"experts": "cold"}),
    ),
)
PURE, GATE = {"targets": "pure"}, {"targets": "gate"}
NO_EXPERTS = {"experts": "none", "count_on": "base"}  # nothing is chosen, so that a LoRA warm-up would be in vain
PLACEMENT = Table(
    "Table 5: which modules besides the experts, OLMoE-1B-7B",
    columns=ALL,
    notes=(
        "_pure: hot experts alone. _gate: also the router. No suffix: also attention (values of Table 2). The paper "
        "has no row of experts and attention without the router, and none without experts. " + SHARED_RATE,
    ),
    rows=(
        Row("HELLoRA", "hellora", (29.49, 17.87, 22.04, 23.82, 99.06)),
        Row("HELLoRA_pure", "hellora", (26.46, 17.07, 21.19, 22.78, 98.43), "HELLoRA", change=PURE),
        Row("HELLoRA_gate", "hellora", (28.03, 17.09, 21.86, 23.28, 97.50), "HELLoRA", change=GATE),
        Row("HELLoRA, experts and attention", "hellora", against="HELLoRA", change={"targets": "attention"}),
        Row("LoRA on attention and router", "hellora", against="HELLoRA", change=NO_EXPERTS),
        Row("HELLoRI-D", "hellori-d", (28.42, 16.89, 20.89, 22.21, 98.75)),
        Row("HELLoRI-D_pure", "hellori-d", (23.24, 17.07, 20.38, 21.89, 91.25), "HELLoRI-D", change=PURE),
        Row("HELLoRI-D_gate", "hellori-d", (23.53, 16.95, 21.80, 23.17, 90.32), "HELLoRI-D", change=GATE),
        Row("HELLoRI-S", "hellori-s", (25.10, 16.22, 20.27, 21.76, 97.50)),
        Row("HELLoRI-S_pure", "hellori-s", (23.44, 16.15, 20.82, 22.29, 97.81), "HELLoRI-S", change=PURE),
        Row("HELLoRI-S_gate", "hellori-s", (23.44, 16.06, 21.17, 22.73, 96.56), "HELLoRI-S", change=GATE),
    ),
)
ROUTER = Table(
    "The router's part (section 4.5.2), OLMoE-1B-7B",
    columns=ALL,
    notes=(
        "_pure: hot experts alone. _gate: also the router. The paper says that this regains some of the score. "
        + SHARED_RATE,
    ),
    rows=tuple(
        row._replace(against=row.name.replace("_gate", "_pure") if "_gate" in row.name else None)
        for row in PLACEMENT.rows
        if "_" in row.name
    ),
)
NUMBER = Table(
    "Table 7: how many hot experts per layer, OLMoE-1B-7B",
    columns=(MATH,),
    seeds=5,
    notes=(
        "The paper swaps the labels of the rows Accuracy and Throughput. Here they are in the right order. Its "
        "throughput is 20.99, 20.98, 20.08 and 16.49 samples/s. Ours follows Table 6.",
    ),
    rows=(
        Row("k = 2", "hellora", (26.72,), "k = 8", change={"k": 2}),
        Row("k = 4", "hellora", (26.97,), "k = 8", "hotk4", change={"k": 4}),
        Row("k = 8", "hellora", (29.49,), sieve="hotk8"),
        Row("k = 16", "hellora", (29.69,), "k = 8", "hotk16", change={"k": 16}),
    ),
)
CROSS_TASK = Table(
    "Table 8: HELLoRA on one task, scored on the others, OLMoE-1B-7B",
    columns=constant(*ALL),
    rows=(
        Row("base model", "base", (1.66, 13.41, 16.81, 18.17, 66.75)),
        Row("after GSM8K", "hellora", (None, 13.78, 18.94, 20.63, 58.43), "base model", change={"task": "math"}),
        Row("after code", "hellora", (5.86, None, None, None, 63.01), "base model", change={"task": "code"}),
        Row("after safety", "hellora", (2.83, 15.18, 19.51, 21.33), "base model", change={"task": "safety"}),
    ),
)
TOP_UP = Table(
    "MoE-Sieve's open question: are cold experts noise?",
    columns=(MATH,),
    notes=(
        "MoE-Sieve's hypothesis is about the spread over seeds (§7 of its paper). The top of this page shows that "
        "spread. Three seeds test only the mean. " + SHARED_RATE,
    ),
    rows=(
        Row("hottest quarter", "moe-sieve", sieve="hotk16"),
        Row("half of it, and random cold ones", "moe-sieve", against="hottest quarter", change={"experts": "topup"}),
        Row("half of it", "hellora", against="hottest quarter", sieve="hotk8", change={"count_on": "base"}),
    ),
)
K8, K2 = "8 hottest, rank 8", "2 hottest, rank 8"
ONE_BUDGET = Table(
    "Table 9 (ours): one budget, several ways to spend it",
    columns=(MATH,),
    seeds=10,
    notes=(
        "The k hottest experts of each layer at rank r have as many parameters as all 64 at rank r k / 64, or as the "
        "2 k hottest at rank r / 2. Attention and router have rank 8, but rank 2 in DR-LoRA. It starts experts at half "
        "of their final rank, so that this is at least 2. Its experts then have twice the parameters of the 8 hottest "
        "at rank 8. The budget of the 2 hottest would be rank 1/4 on all 64, so it is spread over 16 at rank 1. Random "
        "and cold experts have the learning rate of the hot ones.",
    ),
    rows=(
        Row(K8, "hellora"),
        Row("all 64, rank 1", "lora-flat", against=K8),
        Row("16 hottest, rank 4", "hellora", against=K8, change={"k": 16, "expert_rank": 4}),
        Row("8 at random, rank 8", "hellora", against=K8, change={"experts": "random"}),
        Row("8 coldest, rank 8", "hellora", against=K8, change={"experts": "cold"}),
        Row("DR-LoRA, rank 2", "dr-lora", against=K8, change={"rank": 2, "alpha": 4.0}),
        Row("all 64, rank 8 (over the budget)", "lora", against=K8),
        Row(K2, "hellora", change={"k": 2}),
        Row("4 hottest, rank 4", "hellora", against=K2, change={"k": 4, "expert_rank": 4}),
        Row("16 hottest, rank 1", "hellora", against=K2, change={"k": 16, "expert_rank": 1}),
        Row("2 at random, rank 8", "hellora", against=K2, change={"k": 2, "experts": "random"}),
        Row("2 coldest, rank 8", "hellora", against=K2, change={"k": 2, "experts": "cold"}),
    ),
)
ELSEWHERE = {  # Table 9 on the other tasks
    task: replace(
        ONE_BUDGET,
        title=f"Table 9 (ours) on {task}",
        columns=columns,
        seeds=5,
        notes=("The rows are those of Table 9 on math, with the rates of this task. " + ONE_SEED,),
    )
    for task, columns in (("code", CODE[:1]), ("safety", (SAFE, OVER_REFUSAL)))
}
TUNED = "results/profiles/tiny-tiny-math-1-tuned.json"  # counted after LoRA fine-tuning (routing.counted)
CATCHER = Table(
    "The hot-expert catcher: on which model experts are counted (sections 3, 4.3 and 4.4), OLMoE-1B-7B",
    columns=(MATH._replace(tuned=False),),
    seeds=5,
    rows=(
        Row("base model, a tenth of the data", "hellora", change={"count_on": "base"}),
        Row("LoRA warm-up, a tenth", "hellora", against="base model, a tenth of the data", change={"count_on": "lora"}),
        Row(
            "base model, all data",
            "hellora",
            against="base model, a tenth of the data",
            change={"count_on": "base", "sample": 1.0},
        ),
        Row(
            "after LoRA fine-tuning",
            "hellora",
            against="base model, a tenth of the data",
            change={"count_on": "base", "profile": TUNED},
        ),
    ),
)
TABLES = {
    "table2": METHODS,
    "hellori": HELLORI,
    "table3": MIXTRAL,
    "table4": SELECTION,
    "table5": PLACEMENT,
    "router": ROUTER,
    "table7": NUMBER,
    "table8": CROSS_TASK,
    "table9": ONE_BUDGET,
    **{f"table9-{task}": table for task, table in ELSEWHERE.items()},
    "catcher": CATCHER,
    "topup": TOP_UP,
}
