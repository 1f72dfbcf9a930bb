"""Decoding equals transformers' and the forward without a cache; a sequence never notices its neighbours."""

import fcntl
import io
import math
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import LOADABLE, write_json
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer

import generate as command
import hellora
from command.cli import InputError
from generate import Decoding, Settings, Speaker, generate, nucleus_sample, text_behind, tokens
from model import load_model
from run import adapters

ROOT = Path(command.__file__).parent

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
    ours = generate(model, prompts, Decoding(NEW), batch_size=3)
    for prompt, completion in zip(prompts, ours, strict=True):
        theirs = checkpoint.hf.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        assert completion == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_one_prompt_token_by_token_says_what_a_batch_says(model, prompts, temperature):
    decoding = Decoding(NEW, temperature, top_p=0.9, seed=5)
    [free] = generate(model, prompts[:1], decoding, batch_size=1)
    assert list(tokens(model, prompts[0], decoding, ())) == free
    assert list(tokens(model, prompts[0], decoding, (free[6], 1))) == free[: free.index(free[6])]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_sequence_says_the_same_alone_and_in_any_batch(model, prompts, temperature):
    def stop(index: int, completion: list[int]) -> bool:
        return len(completion) > 3 * index % 7  # rows end at different times

    decoding = Decoding(NEW, temperature, top_p=0.9, seed=5, samples=2)
    alone, *batched = (
        generate(model, prompts, decoding, eos_ids=(40,), batch_size=batch_size, stop=stop)
        for batch_size in (1, 2, 3, 5, 8, 100)
    )
    assert all(completions == alone for completions in batched)


@pytest.mark.parametrize("mine", [3, 0])
def test_a_process_that_is_done_runs_the_model_without_a_token_while_others_decode(olmoe, prompts, mine):
    """As a sharded model needs it, whose processes gather each layer together."""
    model, busy, tokens = load_model(olmoe.folder), [], []
    model.embed_tokens.register_forward_hook(lambda module, ids, x: tokens.append(len(x)))
    want = generate(model, prompts[:mine], Decoding(NEW), batch_size=2)
    needed = len(tokens)
    tokens.clear()

    def proceed(flag: bool) -> bool:
        busy.append(flag)
        return len(busy) <= needed + 5  # the others need five steps more

    assert generate(model, prompts[:mine], Decoding(NEW), batch_size=2, proceed=proceed) == want
    assert busy == [True] * needed + [False] * 6 and len(tokens) == needed + 5
    assert all(tokens[:needed]) and not any(tokens[needed:])


def test_sampling_is_fixed_by_the_seed_and_differs_between_samples_and_seeds(model, prompts):
    def draw(seed: int) -> list[list[int]]:
        return generate(model, prompts, Decoding(NEW, 1.0, samples=2, seed=seed), batch_size=5)

    assert draw(1) == draw(1) != draw(2)
    first, second = draw(1)[:2]
    assert first != second
    _, elsewhere = generate(model, prompts[1::-1], Decoding(NEW, 1.0, seed=1), batch_size=2)
    assert first != elsewhere, "the stream belongs to the place in the data set, not to the text"


def test_a_very_low_temperature_is_greedy(model, prompts):
    greedy = generate(model, prompts, Decoding(NEW), batch_size=3)
    for temperature, top_p in ((1e-6, 1.0), (1e-310, 1.0), (5e-324, 1.0), (1.0, 1e-9)):
        assert generate(model, prompts, Decoding(NEW, temperature, top_p), batch_size=3) == greedy


def test_sampled_tokens_follow_the_distribution_cut_at_the_nucleus():
    """Hand-made: 0.5, 0.3, 0.15, 0.05 at top_p 0.75 leaves 0.5 and 0.3, so 5/8 and 3/8."""
    probs = torch.tensor([0.05, 0.3, 0.5, 0.15])
    u = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    tokens = nucleus_sample(probs.log().expand(800, -1), u, 1.0, 0.75)
    assert torch.bincount(tokens, minlength=4).tolist() == [0, 300, 500, 0]
    assert nucleus_sample(torch.zeros(1, 2), torch.tensor([0.5]).double(), 1.0, 1.0).tolist() == [1]  # u in [0, 1/2)
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


def test_a_sequence_ends_at_the_first_of_several_eos_tokens_as_in_transformers(model, olmoe, prompts):
    free = generate(model, prompts, Decoding(NEW), batch_size=3)
    eos = (free[2][4], free[5][2], free[0][6])
    ended = generate(model, prompts, Decoding(NEW), eos_ids=eos, batch_size=3)
    assert (
        len({completion[len(short)] for completion, short in zip(free, ended, strict=True) if short != completion}) > 1
    )
    for prompt, completion in zip(prompts, ended, strict=True):
        theirs = olmoe.hf.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=list(eos), pad_token_id=1
        )[0, len(prompt) :].tolist()
        assert completion == [token for token in theirs if token not in eos]


def test_a_sequence_ends_where_the_callback_says_and_keeps_that_token(model, prompts):
    free = generate(model, prompts, Decoding(NEW), batch_size=3)

    def stop(index: int, completion: list[int]) -> bool:
        return len(completion) == index + 1

    ended = generate(model, prompts, Decoding(NEW), batch_size=3, stop=stop)
    assert ended == [long[: index + 1] for index, long in enumerate(free)]


def test_no_work_gives_no_completions_and_an_empty_prompt_is_refused(model):
    assert generate(model, [], Decoding(3), batch_size=4) == []
    with pytest.raises(ValueError, match="empty prompt"):
        generate(model, [[3], []], Decoding(3), batch_size=4)


# -------------------------------------------------------------------------------------------------------------- text


def byte_fallback() -> Tokenizer:
    """As Llama's: a space is written \u2581, and a character without a token becomes its bytes."""
    vocab = {"<s>": 0, "<unk>": 1, "\u2581": 2, "a": 3, "b": 4, "\u2581a": 5}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


@pytest.mark.parametrize("given", ["a", "\u4e2d\u6587\u5b57", "a\u4e2d\u6587\u5b57", "b \U0001f600\U0001f600"])
@pytest.mark.parametrize("answer", [" a b", "b", "\u5b57 a", "\U0001f600", "a \u4e2d"])
def test_an_answer_is_the_text_behind_the_prompt_whatever_bytes_the_prompt_ends_in(given, answer):
    tokenizer = byte_fallback()
    prompt, whole = (tokenizer.encode(text, add_special_tokens=False).ids for text in (given, given + answer))
    assert whole[: len(prompt)] == prompt
    text_of, ids = text_behind(tokenizer, prompt), whole[len(prompt) :]
    assert text_of(ids) == answer == tokenizer.decode(whole)[len(given) :]
    assert text_of([]) == ""
    if ids[-1] > 5:  # a character that is not finished spoils itself alone
        assert text_of([4, *ids[:-1]]).startswith("b")


def test_pieces_end_with_whole_characters_and_add_up_to_the_text(model, monkeypatch):
    tokenizer = byte_fallback()
    prompt, ids = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", "b\u4e2d a\U0001f600"))
    monkeypatch.setattr(command, "tokens", lambda *args: iter(ids[1:]))
    found = list(command.pieces(model, tokenizer, prompt, Decoding(9), ()))
    assert [piece for piece in found if piece] == ["b", "\u4e2d", " a", "\U0001f600"]
    monkeypatch.setattr(command, "tokens", lambda *args: iter(ids[1:-1]))
    assert "".join(command.pieces(model, tokenizer, prompt, Decoding(9), ())).startswith("b\u4e2d a\ufffd")


# ------------------------------------------------------------------------------------------------------- the command


def said(speaker: Speaker, text: str) -> str:
    return "".join(speaker.answer(text))


def test_a_chat_is_put_to_the_model_as_transformers_writes_it_and_is_kept_until_reset():
    speaker, theirs = Speaker(Settings("tiny", max_new_tokens=24)), AutoTokenizer.from_pretrained(ROOT / "tiny")
    first = said(speaker, "Hello!")
    second = said(speaker, "And then?")
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": first}]
    messages += [{"role": "user", "content": "And then?"}]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    [ids] = generate(speaker.model, [prompt], Decoding(24), eos_ids=speaker.reader.stop_ids, batch_size=1)
    assert second == theirs.decode(ids) and speaker.messages[:3] == messages
    speaker.reset()
    assert said(speaker, "Hello!") == first and len(speaker.messages) == 2


def test_a_run_is_asked_in_the_prompt_of_its_task_and_adapter_none_is_its_base(tmp_path):
    model = load_model("tiny")
    hellora.attach(model, torch.eye(4, 64, dtype=torch.bool), 4, 8.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3, generator=torch.Generator().manual_seed(0))
    adapters.save_adapter(adapters.adapter_state(model), tmp_path / "adapter", model.adapter)
    question, answers = "Mia has 3 marbles and finds 4. How many?", []
    for task, shown in (
        ("tiny-math", f"{question}\nAnswer the above question. First think step by step and then answer the final"),
        ("tiny-code", f"### Instruction:\n{question}\n\n### Response:\n"),
    ):
        write_json(tmp_path / "config.json", {"model": "tiny", "settings": {"task": task}})
        trained, base = (Speaker(Settings(str(tmp_path), adapter=name, max_new_tokens=9)) for name in (None, "none"))
        assert shown in trained.reader.tokenizer.decode(trained.ids(question))
        assert base.ids(question) == trained.ids(question)
        expected = tokens(load_model("tiny"), base.ids(question), Decoding(9), base.reader.stop_ids)
        assert said(base, question) == base.reader.tokenizer.decode(list(expected))
        answers.append((said(base, question), said(trained, question)))
        assert trained.messages == []
    assert any(before != after for before, after in answers)
    with pytest.raises(InputError, match="--adapter none: tiny has no adapter"):
        Speaker(Settings("tiny", adapter="none"))


@pytest.mark.parametrize("asked", [None, 600, 40])
def test_an_answer_ends_where_the_positions_of_the_model_do(asked, monkeypatch):
    lengths = []
    monkeypatch.setattr(command, "pieces", lambda *args: lengths.append((len(args[2]), args[3].max_new_tokens)) or "")
    said(Speaker(Settings("tiny", max_new_tokens=asked)), "a")
    [(given, room)] = lengths
    assert room == 40 if asked == 40 else given + room == 512


def test_a_prompt_is_answered_on_the_command_line_and_each_line_of_a_pipe_by_itself(capsys, monkeypatch):
    for prompt in ("Hello!", "What now?"):
        command.main(["tiny", prompt, "--max-new-tokens", "12"])
    alone = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\n\n  \nWhat now?"))
    command.main(["tiny", "--max-new-tokens", "12"])
    assert capsys.readouterr().out == alone and alone.count("\n") >= 2


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, *argv: str) -> None:
        self.screen, slave = pty.openpty()
        take = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # noqa: E731
        env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(
            [sys.executable, *argv], cwd=ROOT, env=env, start_new_session=True, preexec_fn=take, **streams
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C at a prompt until something shows: a signal just before the wait for a key is seen with the next."""
        shown = False
        while not shown:
            self.process.send_signal(signal.SIGINT)
            shown, *_ = select.select([self.screen], [], [], 5)

    def end(self) -> int:
        """Ctrl-D until the process ends: one that comes before the wait for a key is lost.  -> the exit status"""
        for _ in range(100):
            with suppress(OSError):  # it has ended meanwhile
                self.type("\x04")
                if select.select([self.screen], [], [], 5)[0]:
                    os.read(self.screen, 1024)
            if self.process.poll() is not None:
                break
        return self.process.wait(60)

    def read_until(self, end: str, seconds: float = 120.0) -> str:
        shown, deadline = "", time.monotonic() + seconds
        while end not in shown:
            assert select.select([self.screen], [], [], deadline - time.monotonic())[0], shown
            try:
                shown += os.read(self.screen, 1024).decode(errors="replace")
            except OSError:  # the process has ended
                break
        return shown


TALK = """
import time
from command import terminal
heard = []
def answer(line):
    heard.append(line)
    for i in range(1000 if line == "long" else 3):
        yield f"{i} "
        time.sleep(0.02)
    yield f"heard {heard}"
terminal.converse(answer, heard.clear)
"""


def test_in_a_terminal_ctrl_c_stops_an_answer_reset_forgets_and_ctrl_d_ends():
    talk = Terminal("-c", TALK)
    assert "Ctrl-D ends" in talk.read_until("> ")
    talk.type("one\n")
    assert "0 1 2 heard ['one']" in talk.read_until("> ")
    talk.type("long\n")
    talk.read_until("5 ")
    talk.type("\x03")
    assert "heard" not in talk.read_until("> ")
    talk.type("two\n")
    assert "heard ['one', 'long', 'two']" in talk.read_until("> ")
    talk.type("/forget\n")
    assert "/forget is not a command" in talk.read_until("> ")  # nor a question
    talk.type("/reset\n")
    talk.read_until("> ")
    talk.type("half a li")
    talk.read_until("half a li")
    talk.interrupt()  # not while an answer is made: the line is dropped
    talk.read_until("> ")
    talk.type("three\n")
    talk.read_until("heard ['three']\r\n> ")
    assert talk.end() == 0


def test_the_command_talks_in_a_terminal():
    talk = Terminal("generate.py", "tiny", "--max-new-tokens", "8")
    talk.read_until("> ")
    talk.type("Hello!\n")
    assert len(talk.read_until("\r\n> ")) > len("Hello!\r\n\r\n> ")
    talk.interrupt()
    talk.read_until("> ")  # it goes on
    assert talk.end() == 0


@pytest.mark.parametrize("batch_size, slots", [(2, 2), (9, 3)])
def test_the_cache_has_a_slot_for_each_sequence_that_is_decoded_at_once(model, monkeypatch, batch_size, slots):
    made, real = [], command.new_cache
    monkeypatch.setattr(
        command, "new_cache", lambda model, size, capacity: made.append(size) or real(model, size, capacity)
    )
    generate(model, [[5, 6], [7], [8, 9, 10]], Decoding(4), eos_ids=(), batch_size=batch_size)
    assert made == [slots]
