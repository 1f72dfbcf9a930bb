"""Expected outputs for the packed pairs of all experts of a layer, from PEFT's definition written out on numbers."""

import random
from collections.abc import Iterator


def packed_deltas() -> Iterator[tuple]:
    """delta[e] = alpha / r B_e A_e of the packed pair of all experts (PEFT, class ParamWrapper).

    lora_A's rows are ordered expert by expert, lora_B's columns with the expert innermost. Before PEFT 0.19 the factors
    have each other's place: lora_A multiplies on the side of the output.
    """
    rng, E, r, alpha = random.Random("packed"), 3, 2, 5
    for name, fan_out, fan_in, old in (
        ("PEFT 0.19 and later", 4, 5, False),
        ("PEFT 0.17 and 0.18", 4, 5, True),
        ("a square stack, PEFT 0.19 and later", 4, 4, False),
        ("a square stack, PEFT 0.17 and 0.18", 4, 4, True),
    ):
        of_A, of_B = (fan_out, fan_in) if old else (fan_in, fan_out)
        A = [[round(rng.uniform(-1, 1), 3) for _ in range(of_A)] for _ in range(E * r)]
        B = [[round(rng.uniform(-1, 1), 3) for _ in range(r * E)] for _ in range(of_B)]

        def entry(e: int, i: int, j: int, A: list = A, B: list = B, old: bool = old) -> float:
            """Row i, column j of the delta of expert e."""
            row, column = (j, i) if old else (i, j)
            return alpha / r * sum(B[row][k * E + e] * A[e * r + k][column] for k in range(r))

        deltas = [[[entry(e, i, j) for j in range(fan_in)] for i in range(fan_out)] for e in range(E)]
        inputs = {"lora_A": A, "lora_B": B, "num_experts": E, "alpha": alpha, "before_peft_0_19": old}
        yield name, inputs, deltas
