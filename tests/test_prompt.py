"""profile.py --prompt: what it prints of each token is what the model does."""

import re

import pytest
import torch
from conftest import read_json

import data
import profile
import train
from command.cli import InputError
from hub.tokenizer import tokenize
from run.subject import Subject

TEXT = "Tom has 3 apples. Ana has 4 more."


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("prompt") / "run"
    train.main(["--steps", "8", "--sample", "0.01", "--lr", "0.02", "--batch", "4", "--k", "5", "--out", str(out)])
    return str(out)


def experts_printed(text: str) -> list[list[list[tuple[int, bool]]]]:
    """[token][layer] -> the experts with their stars."""
    tokens = []
    for line in text.splitlines():
        if re.match(r" *\d+  '", line):
            tokens.append([])
        elif match := re.match(r" +layer +\d+: ([\d* ]+)", line):
            tokens[-1].append([(int(each.rstrip("*")), each.endswith("*")) for each in match[1].split()])
    return tokens


def expected_experts(name: str) -> torch.Tensor:
    subject = Subject(name)
    model = subject.load(torch.float32)
    (ids,) = tokenize([TEXT], data.load_tokenizer(subject.folder, subject.config))
    return model(torch.tensor([ids]))[1][:, 0]  # [L, T, K]


def test_a_run_shows_its_hot_experts_and_what_its_adapter_changed(run, tmp_path, capsys):
    profile.main(["--model", run, "--prompt", TEXT, "--plot", str(tmp_path / "p.png")])
    out = capsys.readouterr().out
    after, before = expected_experts(run), expected_experts("tiny")
    lists = read_json(Subject(run).adapter / "adapter.json")["hot"]
    shown = experts_printed(out)
    assert len(shown) == after.shape[1]
    for t, layers in enumerate(shown):
        for layer, pairs in enumerate(layers):
            assert sorted(e for e, _ in pairs) == sorted(after[layer, t].tolist())
            assert all(star == (e in lists[layer]) for e, star in pairs)
    different = (after.sort(-1).values != before.sort(-1).values).any(-1)  # [L, T]
    assert different.any() and f"and of {different.float().mean():.1%} of tokens and layers" in out
    assert out.count("(base: ") == different.sum()
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_is_read_and_a_profile_says_what_is_hot(tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT)
    profile.main(["--sample", "0.01", "--out", str(tmp_path / "p.json")])
    capsys.readouterr()
    flags = ["--prompt", str(tmp_path / "text"), "--profile", str(tmp_path / "p.json"), "--k", "64"]
    experts = profile.main(["--model", "tiny", *flags])
    assert torch.equal(experts, expected_experts("tiny").sort(-1).values)
    out = capsys.readouterr().out
    assert "100.0% of the" in out and all(star for layers in experts_printed(out) for row in layers for _, star in row)
    profile.main(["--model", "tiny", "--prompt", TEXT])
    assert "*" not in capsys.readouterr().out
    (tmp_path / "text").write_bytes("é".encode("latin1"))
    with pytest.raises(InputError, match="not readable as UTF-8"):
        profile.main(["--model", "tiny", "--prompt", str(tmp_path / "text")])
