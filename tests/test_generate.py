"""Decoding equals transformers' and the forward without a cache; a sequence never notices its neighbours."""

import math

import pytest
import torch
from conftest import LOADABLE

from generate import generate, nucleus_sample, stream
from model import load_model

LENGTHS = (5, 1, 12, 3, 9, 2, 7, 5)  # of the prompts: ragged, one of them twice
NEW = 11


def random_prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module", params=[*LOADABLE, "mixtral with a sliding window"])
def checkpoint(request, make_checkpoint):
    if request.param.endswith("window"):
        return make_checkpoint("mixtral", sliding_window=4)
    return make_checkpoint(request.param)


@pytest.fixture(scope="module")
def model(olmoe):
    return load_model(olmoe.folder)


@pytest.fixture(scope="module")
def prompts(model):
    return random_prompts(model.config.vocab_size)


def test_greedy_equals_transformers_generate_token_for_token(checkpoint):
    model = load_model(checkpoint.folder)
    prompts = random_prompts(model.config.vocab_size)
    ours = generate(model, prompts, max_new_tokens=NEW, eos_ids=(), batch_size=3)
    for prompt, completion in zip(prompts, ours, strict=True):
        theirs = checkpoint.hf.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        assert completion == theirs[0, len(prompt) :].tolist()


def test_greedy_takes_the_argmax_of_the_forward_without_a_cache(model, prompts):
    completions = generate(model, prompts, max_new_tokens=NEW, eos_ids=(), batch_size=4)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert len(completion) == NEW
        for n, token in enumerate(completion):
            with torch.no_grad():
                logits, _ = model(torch.tensor([prompt + completion[:n]]))
            assert token == int(logits[0, -1].argmax())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_sequence_says_the_same_alone_and_in_any_batch(model, prompts, temperature):
    def stop(index: int, completion: list[int]) -> bool:
        return len(completion) > 3 * index % 7  # rows end at different times

    settings = dict(max_new_tokens=NEW, eos_ids=(40,), temperature=temperature, top_p=0.9, seed=5, samples=2, stop=stop)
    alone = generate(model, prompts, batch_size=1, **settings)
    for batch_size in (2, 3, 5, 8, 100):
        assert generate(model, prompts, batch_size=batch_size, **settings) == alone


def test_parts_of_the_work_on_several_processes_add_up_to_the_whole(model, prompts):
    settings = dict(max_new_tokens=NEW, eos_ids=(40,), temperature=0.8, seed=5, batch_size=3)
    todo = [(index, sample) for index in range(len(prompts)) for sample in range(3)]
    parts = [list(stream(model, prompts, todo[process::2], **settings)) for process in range(2)]
    found = {(index, sample): ids for part in parts for index, sample, ids in part}
    assert [found[pick] for pick in todo] == generate(model, prompts, samples=3, **settings)


@pytest.mark.parametrize("mine", [3, 0])
def test_a_process_that_is_done_runs_the_model_without_a_token_while_others_decode(olmoe, prompts, mine):
    """As a sharded model needs it, whose processes gather each layer together."""
    model, busy, tokens = load_model(olmoe.folder), [], []
    model.embed_tokens.register_forward_hook(lambda module, ids, x: tokens.append(len(x)))
    want = generate(model, prompts[:mine], max_new_tokens=NEW, batch_size=2)
    needed = len(tokens)
    tokens.clear()

    def proceed(flag: bool) -> bool:
        busy.append(flag)
        return len(busy) <= needed + 5  # the others need five steps more

    assert generate(model, prompts[:mine], max_new_tokens=NEW, batch_size=2, proceed=proceed) == want
    assert busy == [True] * needed + [False] * 6 and len(tokens) == needed + 5
    assert all(tokens[:needed]) and not any(tokens[needed:])


def test_sampling_is_fixed_by_the_seed_and_differs_between_samples_and_seeds(model, prompts):
    def draw(seed: int) -> list[list[int]]:
        return generate(
            model, prompts, samples=2, max_new_tokens=NEW, eos_ids=(), batch_size=5, temperature=1.0, seed=seed
        )

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    first, second = draw(1)[:2]
    assert first != second
    twins = (
        draw(1)[0],
        generate(
            model, [prompts[1], prompts[0]], max_new_tokens=NEW, eos_ids=(), batch_size=2, temperature=1.0, seed=1
        )[1],
    )
    assert twins[0] != twins[1], "the stream belongs to the place in the data set, not to the text"


def test_a_very_low_temperature_is_greedy(model, prompts):
    settings = dict(max_new_tokens=NEW, eos_ids=(), batch_size=3)
    greedy = generate(model, prompts, **settings)
    assert generate(model, prompts, temperature=1e-6, **settings) == greedy
    assert generate(model, prompts, temperature=1.0, top_p=1e-9, **settings) == greedy


def test_sampled_tokens_follow_the_distribution_cut_at_the_nucleus():
    """Hand-made: 0.5, 0.3, 0.15, 0.05 at top_p 0.75 leaves 0.5 and 0.3, so 5/8 and 3/8."""
    probs = torch.tensor([0.05, 0.3, 0.5, 0.15])
    u = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    tokens = nucleus_sample(probs.log().expand(800, -1), u, 1.0, 0.75)
    assert torch.bincount(tokens, minlength=4).tolist() == [0, 300, 500, 0]
    everything = nucleus_sample(probs.log().expand(800, -1), u, 1.0, 1.0)
    assert torch.bincount(everything, minlength=4).tolist() == [40, 240, 400, 120]


def test_temperature_divides_the_logits():
    """p^(1/T) renormalised: 0.8 and 0.2 at T = 0.5 become 16/17 and 1/17."""
    u = (torch.arange(1700, dtype=torch.float64) + 0.5) / 1700
    tokens = nucleus_sample(torch.tensor([0.2, 0.8]).log().expand(1700, -1), u, 0.5, 1.0)
    assert torch.bincount(tokens).tolist() == [100, 1600]


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.95, 1.0])
def test_top_p_never_leaves_the_smallest_set_that_reaches_it(top_p):
    logits = torch.randn(64, 37, generator=torch.Generator().manual_seed(0)) * 3
    for u in (0.0, 0.5, math.nextafter(1.0, 0.0)):
        tokens = nucleus_sample(logits, torch.full((64,), u, dtype=torch.float64), 1.0, top_p)
        for row, token in zip(logits.double().softmax(-1), tokens.tolist(), strict=True):
            likelier = row[row > row[token]].sum().item()
            assert likelier < top_p, "tokens likelier than the drawn one reach top_p without it"


def test_a_sequence_ends_at_eos_which_is_dropped(model, prompts):
    free = generate(model, prompts, max_new_tokens=NEW, eos_ids=(), batch_size=3)
    eos = free[2][4]
    ended = generate(model, prompts, max_new_tokens=NEW, eos_ids=(eos,), batch_size=3)
    for long, short in zip(free, ended, strict=True):
        assert short == (long[: long.index(eos)] if eos in long else long)
    assert len(ended[2]) <= 4


def test_a_sequence_ends_at_the_first_of_several_eos_tokens_as_in_transformers(model, olmoe, prompts):
    free = generate(model, prompts, max_new_tokens=NEW, batch_size=3)
    eos = (free[2][4], free[5][2], free[0][6])
    ended = generate(model, prompts, max_new_tokens=NEW, eos_ids=eos, batch_size=3)
    assert (
        len({completion[len(short)] for completion, short in zip(free, ended, strict=True) if short != completion}) > 1
    )
    for prompt, completion in zip(prompts, ended, strict=True):
        theirs = olmoe.hf.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=list(eos), pad_token_id=1
        )[0, len(prompt) :].tolist()
        assert completion == [token for token in theirs if token not in eos]


def test_a_sequence_ends_where_the_callback_says_and_keeps_that_token(model, prompts):
    free = generate(model, prompts, max_new_tokens=NEW, eos_ids=(), batch_size=3)

    def stop(index: int, completion: list[int]) -> bool:
        return len(completion) == index + 1

    ended = generate(model, prompts, max_new_tokens=NEW, eos_ids=(), batch_size=3, stop=stop)
    assert ended == [long[: index + 1] for index, long in enumerate(free)]


def test_decoding_on_a_dropped_row_leaves_no_trace_in_the_next_one(model, prompts):
    """Sixteen prompts through two rows: each row is taken eight times, by shorter prompts each time."""
    doubled = prompts + prompts[::-1]
    completions = generate(model, doubled, max_new_tokens=4, eos_ids=(), batch_size=2)
    assert completions[:8] == completions[:7:-1]


def test_no_work_gives_no_completions_and_an_empty_prompt_is_refused(model):
    assert generate(model, [], max_new_tokens=3, eos_ids=(0,), batch_size=4) == []
    with pytest.raises(ValueError, match="empty prompt"):
        generate(model, [[3], []], max_new_tokens=3, eos_ids=(0,), batch_size=4)
