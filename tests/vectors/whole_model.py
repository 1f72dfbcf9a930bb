"""A port's model against the values of tiny/ in whole_model.json, in the order in which a model computes them.

An array is described by its norm and some of its entries (`described`). check.py says what a port
offers. make_whole_model.py, which writes the values, says where they come from.

Dimensions: B sequences, S positions, T real tokens, L layers with experts, K experts per token, D hidden_size.
"""

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

VECTORS = Path(__file__).resolve().parent
FILE, FOLDER = VECTORS / "whole_model.json", VECTORS.parent.parent / "tiny"
TOLERANCE = 3e-4  # largest error (`error_of`): float32 with room to spare
NUM_ENTRIES = 24  # of an array of the forward pass
PAD = 1


def padded(sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """input_ids [B, S], lengths [B], and which positions are real, bool [B, S]."""
    lengths = np.array([len(ids) for ids in sequences])
    real = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.full(real.shape, PAD)
    input_ids[real] = np.concatenate(sequences)
    return input_ids, lengths, real


def factors(pairs: dict[str, list[int]], r: int) -> dict[str, dict[str, np.ndarray]]:
    """A [r, in] and B [out, r] of matrices [out, in]: cosines, which any framework can write down.

    For the n-th pair, A[i, j] = cos(n + 3 i + 7 j) / sqrt(in) and B[i, j] = cos(n + 5 i + 11 j) / 20.
    """
    made = {}
    for n, (name, (fan_out, fan_in)) in enumerate(pairs.items()):
        A = np.cos(n + 3 * np.arange(r)[:, None] + 7 * np.arange(fan_in)) / math.sqrt(fan_in)
        B = np.cos(n + 5 * np.arange(fan_out)[:, None] + 11 * np.arange(r)) / 20
        made[name] = {"A": A, "B": B}
    return made


# ------------------------------------------------------------------------------------------------- descriptions


def described(array: np.ndarray | None, count: int) -> dict | None:
    """The norm of an array, and `count` of its entries, evenly spaced in the flat array."""
    if array is None:
        return None
    flat = np.asarray(array, dtype=np.float64).ravel()
    places = np.linspace(0, flat.size - 1, count).round().astype(int)
    return {"size": flat.size, "norm": float(np.linalg.norm(flat)), "entries": flat[places].tolist()}


def error_of(array, expected: dict | None) -> float:
    """How far an array is from its description: its entries relative to their root mean square, the norm to itself."""
    if array is None or expected is None:
        return 0.0 if array is expected else math.inf
    got = described(array, len(expected["entries"]))
    if got["size"] != expected["size"]:
        return math.inf
    norm = expected["norm"] or 1.0
    off = np.abs(np.subtract(got["entries"], expected["entries"])).max() * math.sqrt(expected["size"])
    error = max(off, abs(got["norm"] - expected["norm"])) / norm
    return math.inf if math.isnan(off + got["norm"]) else float(error)


def describe_forward(result: dict, real: np.ndarray) -> dict:
    """What `compare_forward` needs of a right result, with real tokens alone."""
    hidden = [described(layer[real], NUM_ENTRIES) for layer in result["hidden_states"]]
    attention = [described(layer[real], NUM_ENTRIES) for layer in result["after_attention"]]
    return {
        "hidden_states": hidden,
        "after_attention": attention,
        "selected_experts": [layer[real].tolist() for layer in result["selected_experts"]],
        "weights": [described(falling(layer[real]), NUM_ENTRIES) for layer in result["weights"]],
        "logits": described(result["logits"][real], NUM_ENTRIES),
    }


def falling(weights: np.ndarray) -> np.ndarray:
    """Each token's routing weights, the largest first.  [T, K] -> [T, K]"""
    return -np.sort(-weights)


def compare_forward(result: dict, real: np.ndarray, expected: dict) -> Iterator[tuple[str, float]]:
    """What is compared, and its error, from the first layer to the last."""
    arrays = {name: np.asarray(array) for name, array in result.items()}

    def part(name: str, layer: int) -> np.ndarray | None:
        """The real tokens of a layer; None if the array has not its shape."""
        layers = arrays[name]
        return layers[layer][real] if layer < len(layers) and layers.shape[1:3] == real.shape else None

    if "hidden_states" in arrays:
        yield "embeddings", error_of(part("hidden_states", 0), expected["hidden_states"][0])
    for i in range(len(expected["after_attention"])):
        if "after_attention" in arrays:
            yield f"layer {i}, after attention", error_of(part("after_attention", i), expected["after_attention"][i])
        if "selected_experts" in arrays:
            chosen, right = part("selected_experts", i), np.sort(expected["selected_experts"][i])
            same = chosen is not None and np.array_equal(np.sort(chosen), right)
            yield f"layer {i}, selected experts", 0.0 if same else math.inf
        if "weights" in arrays:
            weights = part("weights", i)
            off = math.inf if weights is None else error_of(falling(weights), expected["weights"][i])
            yield f"layer {i}, routing weights", off
        if "hidden_states" in arrays:
            yield f"layer {i}, output", error_of(part("hidden_states", i + 1), expected["hidden_states"][i + 1])
    if "logits" in arrays:
        logits = arrays["logits"]
        yield "logits", error_of(logits[real] if logits.shape[:2] == real.shape else None, expected["logits"])


def step_arrays(result: dict, pairs: dict) -> Iterator[tuple[str, np.ndarray | None]]:
    """Every gradient, and what the step adds to every factor, with a label."""
    for name, pair in pairs.items():
        for part in pair if "gradients" in result else ():
            yield f"gradient of {name}.{part}", result["gradients"].get(name, {}).get(part)
    for name, pair in pairs.items():
        for part, before in pair.items() if "updated" in result else ():
            after = result["updated"].get(name, {}).get(part)
            yield f"update of {name}.{part}", None if after is None else np.asarray(after) - before


def describe_step(result: dict, pairs: dict) -> dict:
    """What `compare_step` needs of a right result."""
    arrays = {label: described(array, 3) for label, array in step_arrays(result, pairs)}
    return {"loss": float(result["loss"])} | arrays


def compare_step(result: dict, pairs: dict, expected: dict) -> Iterator[tuple[str, float]]:
    if "loss" in result:
        yield "loss", abs(float(result["loss"]) - expected["loss"]) / expected["loss"]
    for label, array in step_arrays(result, pairs):
        yield label, error_of(array, expected[label])


# ------------------------------------------------------------------------------------------------- checking a port


FUNCTIONS = ("forward", "counts", "train_step")


def questions() -> dict[str, tuple[dict, Callable, Callable]]:
    """Function of a port -> its arguments, compare(result), and compare(result, the right result) of a mistake."""
    values = json.loads(FILE.read_text())
    input_ids, lengths, real = padded(values["sequences"])
    forward = {"folder": str(FOLDER), "input_ids": input_ids, "lengths": lengths}
    count_ids, count_lengths, _ = padded(values["count_sequences"])
    counting = {"folder": str(FOLDER), "input_ids": count_ids, "lengths": count_lengths}
    pairs = factors(values["pairs"], values["r"])
    step = forward | {"prompt_lengths": np.array(values["prompt_lengths"]), "factors": pairs}
    step |= {"alpha": values["alpha"], "lr": values["lr"]}

    def compare_counts(result, expected) -> Iterator[tuple[str, float]]:
        for i, counts in enumerate(expected):
            yield f"layer {i}", 0.0 if i < len(result) and np.array_equal(result[i], counts) else math.inf

    return {
        "forward": (
            forward,
            lambda result: compare_forward(result, real, values["forward"]),
            lambda result, wrong: compare_forward(result, real, describe_forward(wrong, real)),
        ),
        "counts": (
            counting,
            lambda result: compare_counts(result, values["counts"]),
            compare_counts,
        ),
        "train_step": (
            step,
            lambda result: compare_step(result, pairs, values["step"]),
            lambda result, wrong: compare_step(result, pairs, describe_step(wrong, pairs)),
        ),
    }


def check(module: ModuleType) -> Iterator[tuple[str, bool]]:
    """Lines that say what agrees, up to the first value that differs, and whether each is a failure."""
    for function, (arguments, compare, compare_wrong) in questions().items():
        if not hasattr(module, function):
            yield f"{function}: not offered", False
            continue
        result = getattr(module, function)(**arguments)
        count, largest = 0, 0.0
        for label, error in compare(result):
            if error > TOLERANCE:
                by = "" if math.isinf(error) else f", by {error:.1e} of its root mean square"
                yield f"{function}: {label} is the first value that differs{by} ({count} before it agree)", True
                for mistake in likely(function, arguments, result, compare_wrong):
                    yield f"    This looks like: {mistake}.", True
                return
            count, largest = count + 1, max(largest, error)
        if not count:
            yield f"{function} returns nothing that could be compared", True
            return
        yield f"{function}: all {count} values agree, largest error {largest:.0e}", False


def our_module(name: str) -> ModuleType:
    """ours.py or mistakes.py, with this project's modules, although a port may have some of the same names."""
    places = [str(FOLDER.parent), str(VECTORS)]
    ours = {path.stem for place in places for path in Path(place).iterdir()}
    theirs = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in ours and not str(getattr(module, "__file__", None)).startswith(places[0])
    }
    path = list(sys.path)
    sys.path[:0] = places
    for other in theirs:
        del sys.modules[other]
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = path
        sys.modules.update(theirs)


def likely(function: str, arguments: dict, result, compare_wrong: Callable) -> Iterator[str]:
    """The mistakes with which this project's model gives the same wrong result."""
    for of, mistake, wrong in our_module("mistakes").MODELS:
        if of == function and all(error <= TOLERANCE for _, error in compare_wrong(result, wrong(**arguments))):
            yield mistake
