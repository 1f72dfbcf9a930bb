"""Wrong input, through the real commands: one line that says what was given and what is allowed, exit status 2, and
nothing written. Every case is a command line in a folder that holds just the files it names, which `make` makes."""

import hashlib
import importlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import read_json, write_json, write_lines
from safetensors.torch import load_file, save_file

import evaluate
import export
import hellora
import profile
import train
from command import cli
from hub.checkpoint import TINY
from model import read_config
from run import adapters

ROOT = Path(__file__).parent.parent
GSM8K = json.dumps({"question": "How many?", "answer": "One.\n#### 1"})


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HELLORA_CACHE", str(tmp_path.parent / "cache"))
    monkeypatch.setattr("data.TINY_TRAIN", 60)  # rows that are made and encoded for every case
    monkeypatch.setattr("data.TINY_TEST", 400)
    monkeypatch.setattr("hub.config.ignored", set())


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> SimpleNamespace:
    """Two finished runs on the embedded model."""
    folder = tmp_path_factory.mktemp("runs")
    small = "--steps 1 --batch 2 --sample 0.005 --k 3 --rank 4 --alpha 8".split()
    for method in ("hellora", "hellori-d"):
        train.main([*small, "--method", method, "--out", str(folder / method)])
    return SimpleNamespace(run=folder / "hellora", lori=folder / "hellori-d")


# ----------------------------------------------------------------------------------------- the files of the cases

WORDS = {  # what stands for what in the tables below
    "GOOD": '{"messages": [ASKED, ANSWERED]}',
    "ASKED": '{"role": "user", "content": "2 + 2?"}',
    "ANSWERED": '{"role": "assistant", "content": "4"}',
    "GSM8K": GSM8K,
    "LONG": "long" * 80,  # no file system takes such a name
    "MANY": "1" + "0" * 400,
    "MARK": "\ufdd00\ufdd1",
    "HALF": "\ud800",
    " ¶ ": "\n",
}


def meaning(text: str) -> str:
    for word, stands_for in WORDS.items():
        text = text.replace(word, stands_for)
    return text


def table(text: str) -> dict[str, str]:
    """{name: content} of lines "name | content"."""
    rows = (line.partition("|") for line in text.strip("\n").splitlines())
    return {name.strip(): meaning(content.removeprefix(" ")) for name, _, content in rows}


TEXTS = table("""
file                 | a file
nothing.jsonl        |
columns.jsonl        | {"q": "How many?", "a": "#### 1"}
blank.jsonl          | {"question": "  ", "answer": "#### 1"}
broken.jsonl         | GSM8K ¶ {"question": "And ¶ GSM8K
alpaca.json          | [{"instruction": "Say one.", "output": "One."}]
gsm8k.jsonl          | GSM8K ¶ GSM8K ¶ GSM8K
gold.jsonl           | GSM8K ¶ {"question": "How many?", "answer": "Half.\\n#### 1/2"}
own-good.jsonl       | GOOD ¶ GOOD
own-one.jsonl        | GOOD
own-order.jsonl      | GOOD ¶ {"messages": [ASKED, ASKED, ANSWERED]}
own-system.jsonl     | GOOD ¶ {"messages": [ASKED, ANSWERED, {"role": "system", "content": "Stop."}, ASKED, ANSWERED]}
own-empty.jsonl      | GOOD ¶ {"messages": [ASKED, {"role": "assistant", "content": " "}]}
own-no-turn.jsonl    | GOOD ¶ {"messages": []}
own-no-turns.json    | {"messages": []}
own-first.jsonl      | GOOD ¶ {"messages": [ANSWERED, ASKED, ANSWERED]}
own-alone.jsonl      | GOOD ¶ {"messages": [ASKED]}
own-tool.jsonl       | GOOD ¶ {"messages": [ASKED, {"role": "tool", "content": "4"}, ANSWERED]}
own-calls.jsonl      | GOOD ¶ {"messages": [ASKED, {"role": "assistant", "content": "4", "tool_calls": [{}]}]}
own-tools.jsonl      | GOOD ¶ {"messages": [ASKED, ANSWERED], "tools": [{"name": "add"}]}
own-mixed.jsonl      | GOOD ¶ {"prompt": "2 + 2?", "completion": "4"}
own-parts.jsonl      | GOOD ¶ {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]}
own-columns.jsonl    | {"question": "2 + 2?", "answer": "4"}
own-blank.jsonl      | {"text": "  "}
own-character.jsonl  | GOOD ¶ {"messages": [{"role": "user", "content": "MARK"}, ANSWERED]}
own-long.jsonl       | {"messages": [ASKED, {"role": "assistant", "content": "It is 4."}]}
own-twice.csv        | prompt,completion,prompt ¶ 2 + 2?,4,1 + 1?
short.csv            | prompt,type ¶ x,y ¶ x
lists-short.json     | [[1, 2], [3]]
lists-high.json      | [[1], [2], [3], [64]]
lists-negative.json  | [[1], [2], [3], [-1]]
lists-none.json      | [[], [], [], []]
lists-twice.json     | [[1], [2, 5, 2], [3], [4]]
answers.jsonl        | {"id": 0, "completion": "7"}
answers-id.jsonl     | {"id": 400, "completion": "7"}
answers-twice.jsonl  | {"id": 0, "completion": "7"} ¶ {"id": "0", "completion": "8"}
answers-keys.jsonl   | {"id": 0, "text": "7"}
answers-cut.jsonl    | {"id": 0, "completion": "7"} ¶  ¶ {"id": 1, "comple
notes/thesis.txt     | precious
empty/nothing        |
no-config/tokenizer.json | {}
run-bare/config.json | {"model": "tiny"}
run-list/config.json | {"model": "tiny", "settings": []}
run-task/config.json | {"model": "tiny", "settings": {"task": "chess", "method": "hellora"}}
run-model/config.json | {"model": 7, "settings": {"task": "tiny-math"}}
fft/config.json      | {"model": "tiny", "settings": {}}
fft/model/config.json | {}
evaluation/items.jsonl | {"id": "0", "correct": true}
evaluation/score.json | {"problems": "d", "settings": {"task": "tiny-math"}}
evaluation-ids/items.jsonl | {"id": "1", "correct": true}
evaluation-ids/score.json | {"problems": "d", "settings": {"task": "tiny-math"}}
evaluation-task/items.jsonl | {"id": "0", "correct": true}
evaluation-task/score.json | {"problems": "d", "settings": {"task": "gsm8k"}}
evaluation-items/items.jsonl | {"id": "0"}
evaluation-items/score.json | {"problems": "d", "settings": {"task": "tiny-math"}}
""")
MODELS = table("""
config-huge          | {"hidden_size": 1000000000000000000}
config-layers        | {"num_hidden_layers": 900000}
config-experts       | {"num_experts": 30000}
config-cross         | {"add_cross_attention": true}
config-wide          | {"hidden_size": 1000000, "num_attention_heads": 1, "num_key_value_heads": 1}
config-negative      | {"num_hidden_layers": -4}
config-missing       | {"num_experts_per_tok": null}
config-k             | {"num_experts_per_tok": 65}
config-theta         | {"rope_theta": MANY}
config-nan           | {"rms_norm_eps": NaN}
config-pad           | {"pad_token_id": 1000000}
config-rope-kinds    | {"rope_parameters": {"full_attention": {"rope_theta": 5e5, "rope_type": "default"}}}
config-layer-types   | {"layer_types": [["full_attention"]]}
config-other         | {"intermediate_size": 64}
config-causal        | {"is_causal": false}
config-scaling       | {"logits_scaling": 8}
config-unknown       | {"other_scale": 0, "mup": false}
config-end-outside   | {"eos_token_id": 5000}
config-no-end        | {"eos_token_id": null}
config-short         | {"max_position_embeddings": 12}
tokenizer-big        | {"vocab_size": 1000}
no-template          | {}
""")
TEMPLATES = table("""
template-damaged     | {% for message in messages %}
template-raises      | {{ raise_exception('no system message, please') }}
template-fails       | {{ messages[7].content }}
template-drops       | {% for m in messages[1:] %}{{ m.content }}{% endfor %}
template-cuts        | {% for m in messages %}{{ m.content[:6] }}{% endfor %}
template-character   | {% for m in messages %}{{ 'MARK' + m.content }}{% endfor %}
template-rewrites    | {% for m in messages %}{{ m.content }}{{ loop.length }}{% endfor %}
""")
PROFILES = table("""
profile.json         | {}
profile-layers.json  | {"layers": 3}
profile-experts.json | {"experts": 32}
profile-k.json       | {"k": 16}
profile-mass.json    | {"mass_layers": 3}
profile-nan.json     | {"first_mass": NaN}
profile-infinite.json | {"first_mass": Infinity}
profile-light.json   | {"first_mass": -0.5}
profile-negative.json | {"first_count": -1}
profile-half.json    | {"first_count": 0.5}
profile-large.json   | {"first_count": 1000000000000000000000000000000}
profile-sum.json     | {"num_tokens": 9}
profile-tokens.json  | {"num_tokens": 0}
profile-endless.json | {"num_tokens": MANY}
profile-empty.json   | {"layers": 0}
profile-narrow.json  | {"experts": 0}
profile-ragged.json  | {"counts": [[1, 2], [3]]}
profile-model.json   | {"model": "no/such-model"}
""")


def profile_of(layers=4, experts=64, k=8, mass_layers=None, first_count=None, first_mass=None, **changes) -> str:
    """A profile.json of 8 tokens, evenly routed but for what is given."""
    even = 8 * k // max(experts, 1)
    counts = [[even] * experts for _ in range(layers)]
    mass = [[float(even)] * experts for _ in range(mass_layers or layers)]
    for rows, first in ((counts, first_count), (mass, first_mass)):
        if first is not None:
            rows[0][0] = first
    about = {"model": "tiny", "task": "tiny-math", "num_tokens": 8, "num_experts_per_tok": k}
    return json.dumps(about | {"counts": counts, "gate_mass": mass} | changes)


def tiny_model(path: Path, changes: dict | None = None, **files: bytes | None) -> None:
    """The embedded model with another config.json (None takes a key out), other weights or another tokenizer."""
    path.mkdir()
    config = read_json(TINY / "config.json") | (changes or {})
    write_json(path / "config.json", {key: value for key, value in config.items() if value is not None})
    for kind, name in (("weights", "model.safetensors"), ("tokenizer", "tokenizer.json")):
        if kind not in files:
            (path / name).symlink_to(TINY / name)
        elif files[kind]:
            (path / name).write_bytes(files[kind])


class Trap:
    """Unpickling it leaves a mark."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


A_PICKLE = pickle.dumps(Trap())
WEIGHTS, TOKENIZER = ((TINY / name).read_bytes() for name in ("model.safetensors", "tokenizer.json"))


def flip(adapter: Path) -> None:
    path = adapter / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-3] + bytes(3))


def reseal(**changes) -> Callable[[Path], None]:
    """An adapter that is whole, and not of this model."""

    def change(adapter: Path) -> None:
        about = read_json(adapter / "adapter.json")
        about = {key: about[key] for key in hellora.Adapter.__dataclass_fields__} | changes
        adapters.save_adapter(load_file(adapter / "adapter.safetensors"), adapter, hellora.Adapter(**about))

    return change


RUNS = {  # the adapter of a finished run, changed
    "run": lambda adapter: None,
    "run-flip": flip,
    "run-pickle": lambda adapter: (adapter / "adapter.safetensors").write_bytes(A_PICKLE),
    "run-no-adapter": shutil.rmtree,
    "run-layers": reseal(hot=[[0, 1, 2]] * 5),
    "run-experts": reseal(hot=[[0, 1, 64]] * 4),
    "run-k": reseal(hot=[[0, 1]] * 4),
    "run-rank": reseal(r=8),
}
PEFT = {  # changes of adapter_config.json, and the width of the factors of a layer's q_proj
    "peft-dora": ({"use_dora": True}, {"A": 256, "B": 256}),
    "peft-other": ({}, {"A": 40, "B": 40}),
    "peft-half": ({}, {"A": 256}),
    "peft-regex": ({"target_modules": "*proj"}, {"A": 128, "B": 128}),
    "peft-number": ({"target_modules": 5}, {"A": 128, "B": 128}),
    "peft-base": ({"base_model_name_or_path": None}, {"A": 256}),
}
DAMAGED = {
    "weights-cut": {"weights": WEIGHTS[: len(WEIGHTS) // 2]},
    "weights-nan": {"weights": WEIGHTS[:-4] + b"\xff\x7f\xff\x7f"},  # NaN of float32 and of bfloat16
    "weights-none": {"weights": None, "tokenizer": None},
    "tokenizer-cut": {"tokenizer": TOKENIZER[:-100]},
}


def make(name: str, made: SimpleNamespace) -> None:
    """The file or folder that a case names, if it is in a table above."""
    path = Path(name)
    for inside in TEXTS:
        if inside == name or inside.startswith(f"{name}/"):
            Path(inside).parent.mkdir(parents=True, exist_ok=True)
            Path(inside).write_text(TEXTS[inside] + "\n")
    if name in PROFILES:
        path.write_text(profile_of(**json.loads(PROFILES[name])))
    elif name in MODELS:
        tiny_model(path, json.loads(MODELS[name]))
    elif name in DAMAGED:
        tiny_model(path, **DAMAGED[name])
    elif name in TEMPLATES:
        tiny_model(path)
        (path / "chat_template.jinja").write_text(TEMPLATES[name])
    elif name == "lori":
        shutil.copytree(made.lori, path)
    elif name in RUNS:
        shutil.copytree(made.run, path)
        RUNS[name](path / "adapter")
    elif name in PEFT:
        changes, widths = PEFT[name]
        path.mkdir()
        about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "tiny"} | changes
        write_json(path / "adapter_config.json", about)
        shapes = {"A": (2, widths["A"]), "B": (widths.get("B"), 2)}
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight".format
        save_file({key(factor): torch.ones(shapes[factor]) for factor in widths}, path / "adapter_model.safetensors")


CASES = """
train --model nowhere/at-all                         | no such run or model: 'nowhere/at-all' is not 'tiny' or
train --model file                                   | model 'file' | config.json
train --model no-config                              | 'no-config' | config.json
train --model LONG                                   | longlong
train --model ''                                     | empty
train --model tinny                                  | did you mean tiny?
train --model tiny --revision v2                     | --revision v2 applies to a hub id, and the model is tiny
train --model a/b@v1 --revision v2                   | and the model is a/b@v1
train --model run                                    | 'run' has no config.json of a model | merge its adapter first
train --model run/adapter                            | the adapter of a run of train.py; name the model that it was
train --model fft                                    | it is a run of train.py; name fft/model
train extra                                          | extra (see train.py --help)
train --epoch 3                                      | unknown flag --epoch; did you mean --epochs? (see train.py
train --savevery=3                                   | unknown flag --savevery; did you mean --save-every?
train -k 3                                           | unknown flag -k; did you mean --k?
train --xyz                                          | unknown flag --xyz (see
train --method helora                                | did you mean hellora?
train --steps                                        | --steps: expected one argument (see train.py --help)
train --steps 0                                      | got '0'; expected a whole number at least 1 (see train.py --help)
train --k 0                                          | '0' | at least 1
train --k 1.5                                        | '1.5' | between 0 and 1
train --k 65                                         | 65 | 1..64
train --k MANY --out new                              | 1..64
train --out LONG                                     | cannot be written
train --experts warm                                 | 'warm' | coverage
train --experts LONG                                 | longlong
train --experts notes                                | 'notes' | coverage
train --experts file                                 | file: not readable as JSON
train --experts lists-short.json                     | lists-short.json | listed for 2 layers | experts in 4 layers
train --experts lists-high.json                      | lists-high.json | expert 64 is listed | 0 to 63
train --experts lists-negative.json                  | lists-negative.json | expert -1 is listed
train --experts lists-none.json                      | lists-none.json
train --experts coverage                             | give both or neither
train --rank 49 --task gsm8k --train-data absent.jsonl | 49 | 1..48
train --rank MANY                                    | --rank
train --profile profile-layers.json --task gsm8k --train-data absent.jsonl | profile-layers.json
train --steps MANY                                   | --steps
train --max-length 7                                 | '7' | at least 8
train --sample 1.01                                  | '1.01' | at most 1
train --resume now                                   | now
train --seed 2147483648                              | '2147483648' | at most
train --out notes                                    | --out notes | another folder
train --out file                                     | file cannot be written
train --out file/run                                 | file/run cannot be written
train --out run --steps 2                            | --out run holds another run | steps 1 then, 2 now
train --out ''                                       | empty
train --method fft --k 8                             | --k | trains every weight
train --method fft --experts hot                     | --experts | trains every weight
train --method fft --rank 8                          | --rank | trains every weight
train --method fft --targets gate                    | --targets
train --method fft --init-adapter run                | --init-adapter
train --method lora --k 8                            | --k 8 | no meaning
train --method dr-lora --experts hot                 | all experts
train --method dr-lora --steps 1                     | at least 2 steps
train --method dr-lora --steps 2 --rank 1            | --rank 1 | 2..24
train --method dr-lora --steps 2 --rank 25           | --rank 25 | 2..24
train --method dr-lora --expert-rank 2               | --method dr-lora sets it; leave it out
train --method lora-flat --expert-rank 2             | --method lora-flat sets it; leave it out
train --method lora-flat --experts hot               | --method lora-flat adapts all experts
train --method lora-flat --k 3                       | --rank 8 on 3 of 64 experts is rank 0.375 on all; choose another
train --method fft --expert-rank 2                   | --expert-rank | trains every weight
train --experts none --k 4                           | --k 4 has no meaning with --method hellora and experts none
train --expert-rank 49                               | rank 49; expected 1..48
train --save-dtype bfloat16                          | --save-dtype bfloat16 | writes an adapter, in float32
train --init-adapter lori --method hellori-s         | starts from zero
train --init-adapter run --rank 4                    | --rank contradicts --init-adapter
train --steps 3 --epochs 1                           | contradict
train --router-aux-form layer                        | both or neither
train --profile profile.json --count-on lora         | --count-on | --profile
train --profile profile.json --sample 0.1            | --sample | --profile
train --method fft --sample 0.1                      | --sample | trains every weight
train --method fft --count-on base                   | --count-on | trains every weight
train --experts none --expert-rank 4                 | --expert-rank has no meaning with --experts none
train --keep 2                                       | --keep has no meaning without --save-every
train --experts lists-twice.json                     | lists-twice.json | expert 2 is listed twice
train --init-adapter notes                           | --init-adapter notes holds no adapter
train --init-adapter run --k 8                       | contradicts --init-adapter
train --init-adapter lori --method hellora           | lori is of --method hellori-d, not hellora
train --init-adapter run --method moe-sieve          | run is of --method hellora, not moe-sieve
train --method hellori-d --init-adapter lori --seed 1 | --seed 0
train --init-adapter run-layers                      | listed for 5 layers | experts in 4 layers
train --init-adapter run-experts                     | expert 64 is listed | 0 to 63
train --init-adapter run-k --sample 0.001            | (3, | (2,
train --init-adapter run-rank --sample 0.001         | (3, 8, 48)
train --init-adapter run-flip                        | run-flip/adapter | sha256
train --init-adapter peft-dora                       | lora_m
train --init-adapter peft-other                      | another model or rank
train --init-adapter peft-half                       | lora_A alone
train --init-adapter peft-regex                      | target or exclude modules | nothing to repeat
train --init-adapter peft-number                     | target or exclude modules | not iterable
train --profile absent.json                          | absent.json
train --profile notes                                | notes
train --profile ''                                   | empty
train --profile profile-layers.json                  | 3 layers | 4 layers of 64
train --profile profile-experts.json                 | 32 experts | 64 experts
train --profile profile-k.json                       | 16 per token | 8 per token
train --profile profile-nan.json                     | gate_mass of layer 0, expert 0 is nan
train --profile profile-negative.json                | layer 0, expert 0 is -1
train --profile profile-sum.json                     | sum to 64, not to 9 tokens
train --profile profile-mass.json                    | (4, 64) | (3, 64)
train --profile profile-infinite.json                | gate_mass of layer 0, expert 0 is inf
train --profile profile-light.json                   | gate_mass of layer 0, expert 0 is -0.5
train --profile profile-half.json                    | whole numbers
train --profile profile-large.json                   | profile-large.json
train --profile profile-tokens.json                  | num_tokens is 0
train --profile profile-endless.json                 | num_tokens
train --profile profile-empty.json                   | not a table
train --profile profile-narrow.json                  | not a table
train --profile profile-ragged.json                  | not a table
train --experts broken.jsonl                         | broken.jsonl
train --experts none --targets pure                  | nothing would train; leave one of them out
train --lr 0                                         | got '0'; expected a number above 0
train --lr-warmup 1.5                                | whole number at least 1, or a share
train --lr-warmup 6 --steps 6                        | 6 steps of warm-up in a run of 6
train --weight-decay 0.1 --method dr-lora            | --weight-decay 0.1 | dr-lora keeps dimensions
train --recipe moe-sieve --task saferpaca            | no settings for saferpaca | tiny-math, gsm8k
train --recipe hellora --method fft                  | --method fft has no adapter
train --prompt question --task tiny-code             | GSM8K's rows | tiny-code
train --scores gate-mass --experts random            | no meaning with --method hellora and experts random
train --scores counts --method lora                  | no meaning with --method lora and experts all
train --scores gate-mass --method fft                | trains every weight
train --k 3 --experts all                            | --k 3 has no meaning
train --init-adapter run --method fft                | without adapters
train --model config-huge                            | hidden_size | 1000000000000000000 | to 1,000,000
train --model config-layers                          | num_hidden_layers | 900000
train --model config-experts                         | 4 layers of 30000 experts | at most 100,000
train --model config-cross                           | add_cross_attention True is not implemented
train --model config-wide                            | shape
train --model config-negative                        | num_hidden_layers is -4 | from 1
train --model config-missing                         | num_experts_per_tok is missing
train --model config-k                               | num_experts_per_tok is 65 | from 1 to 64
train --model config-theta                           | rope_theta
train --model config-nan                             | rms_norm_eps is nan | positive
train --model config-pad                             | pad_token_id is 1000000
train --model config-rope-kinds                      | rope_parameters | full_attention
train --model config-layer-types                     | layer_types
train --model config-other                           | shape | config.json implies
train --model config-causal                          | is_causal False is not implemented
train --model config-scaling                         | logits_scaling 8 is not implemented
train --model config-unknown                         | mup False, other_scale 0 | --ignore-config-keys mup,other_scale
train --model config-unknown --ignore-config-keys mup | other_scale 0
train --model config-end-outside                     | eos_token_id is 5000 | training needs one
train --model config-no-end                          | eos_token_id is None | training needs one
train --model config-short                           | --max-length 512 | made for 12 positions
train --model weights-cut                            | model.safetensors | download it again
train --model weights-none                           | tokenizer.json
train --model tokenizer-big                          | tokenizer.json | vocab_size 1000
train --model tokenizer-cut                          | tokenizer.json
train --task gsm8k --train-data absent.jsonl         | absent.jsonl | No such file | GSM8K rows | --task own
train --task gsm8k --train-data notes                | notes is a folder, not a file of rows | GSM8K rows
train --task gsm8k --train-data nothing.jsonl        | nothing.jsonl: no rows
train --task gsm8k --train-data columns.jsonl        | 'question' | GSM8K rows
train --task gsm8k --train-data blank.jsonl          | 'question'
train --task gsm8k --train-data gold.jsonl           | gold.jsonl, line 2 | '1/2'
train --task gsm8k --train-data alpaca.json          | entry 1 | GSM8K rows
train --task own                                     | task own: this task is your own data; pass | --train-data FILE
train --task own --train-data own-order.jsonl        | own-order.jsonl, line 2: turn 2 has role user after user
train --task own --train-data own-system.jsonl       | line 2: turn 3 has role system
train --task own --train-data own-empty.jsonl        | own-empty.jsonl, line 2: turn 2 (assistant) is empty
train --task own --train-data own-no-turn.jsonl      | line 2: 'messages' is []; expected a list of one turn or more
train --task own --train-data own-no-turns.json      | own-no-turns.json, line 1: 'messages' is []
train --task own --train-data own-first.jsonl        | line 2: turn 1 has role assistant after the beginning
train --task own --train-data own-alone.jsonl        | line 2: no turn has the role assistant
train --task own --train-data own-tool.jsonl         | line 2: turn 2 has 'role' 'tool' | system, user, assistant
train --task own --train-data own-calls.jsonl        | line 2: turn 2 has 'tool_calls'
train --task own --train-data own-tools.jsonl        | line 2: the column 'tools'
train --task own --train-data own-mixed.jsonl        | line 2: a row of prompt and completion after rows of messages
train --task own --train-data own-parts.jsonl        | line 2: turn 2 has 'content' | expected text
train --task own --train-data own-columns.jsonl      | line 1: its columns are 'question', 'answer'; expected
train --task own --train-data own-blank.jsonl        | line 1: no text as 'text'
train --task own --train-data own-character.jsonl    | line 2 | U+FDD0
train --task own --train-data own-good.jsonl --model no-template       | no-template has no chat template | completion
train --task own --train-data own-good.jsonl --model template-damaged  | template-damaged: its chat template is damaged
train --task own --train-data own-good.jsonl --model template-raises   | line 1 | no system message, please
train --task own --train-data own-good.jsonl --model template-fails    | line 1: the model's chat template refuses it
train --task own --train-data own-good.jsonl --model template-rewrites | line 1 | turns 1 to 1 differently
train --task own --train-data own-good.jsonl --model template-drops    | line 1 | leaves out turn 1 (user)
train --task own --train-data own-long.jsonl --model template-cuts     | line 1 | turn 2 (assistant), or the end of it
train --task own --train-data own-good.jsonl --model template-character | line 1 | U+FDD0
train --task own --train-data own-twice.csv              | own-twice.csv, line 1: a column occurs twice
train --task own --train-data own-good.jsonl --bos yes                 | --bos yes | names a BOS token
train --task own --train-data own-good.jsonl --valid-data own-order.jsonl | own-order.jsonl, line 2
train --task own --train-data own-one.jsonl --valid-share 0.5          | leaves none to train on
train --valid-share 0.6                              | '0.6' | at most 0.5
train --valid-share 0.1 --valid-data own-good.jsonl  | contradict
train --valid-every 5                                | --valid-every | --valid-data or --valid-share
train --patience 2                                   | --patience | --valid-data or --valid-share
train --task codealpaca --train-data gsm8k.jsonl     | line 1 | Alpaca rows
evaluate                                             | nothing to evaluate
evaluate tiny                                        | --task is missing | gsm8k
evaluate runs/typo                                   | no such run: there is no folder runs/typo | add --task
evaluate nowhere/at-all --task tiny-math             | no such run or model: 'nowhere/at-all'
evaluate notes --task tiny-math                      | notes | config.json
evaluate weights-cut --task tiny-math                | model.safetensors
evaluate weights-nan --task tiny-math                | model.safetensors | holds NaN
train --model weights-nan                            | model.safetensors | holds NaN
profile --out p.json --model weights-nan             | model.safetensors | holds NaN
evaluate tokenizer-cut --task tiny-math              | tokenizer.json
evaluate config-experts --task tiny-math             | at most 100,000
evaluate run-bare --task tiny-math                   | run-bare
evaluate run-list --task tiny-math                   | run-list
evaluate run-task                                    | chess
evaluate run-model --task tiny-math                  | run-model
evaluate run-no-adapter                              | run-no-adapter has no adapter | --resume
evaluate run-flip                                    | run-flip/adapter | sha256
evaluate run-pickle                                  | run-pickle/adapter
evaluate run-experts                                 | expert 64 is listed
evaluate run-k                                       | (3,
evaluate peft-other --task tiny-math                 | another model or rank
evaluate peft-base --task tiny-math                  | does not name a base model | base_model_name_or_path
evaluate tiny --task tiny-math --temperature -1      | -1
evaluate tiny --task tiny-math --top-p 1.1           | '1.1' | at most 1
evaluate tiny --task tiny-math --top-p 0.9           | 0.9 | --temperature
evaluate tiny --task tiny-math --samples 2           | --samples 2 | scores one completion
evaluate tiny --task tiny-code --samples 2 --temperature 0 | greedy samples
evaluate tiny --task tiny-code --shots 2             | --shots 2
evaluate tiny --task tiny-math --shots 61            | 60 problems
evaluate tiny --task tiny-math --train-data file     | --shots
evaluate tiny --task tiny-math --refusal-rule lori   | --refusal-rule lori
evaluate tiny --task tiny-math --partial             | --completions
evaluate tiny --task tiny-math --out notes           | --out notes
evaluate tiny --task tiny-math --out file            | --out file
evaluate tiny --task tiny-math --out file/x          | file/x cannot be written
evaluate tiny --task gsm8k --eval-data absent.jsonl  | absent.jsonl | GSM8K rows
evaluate tiny --task saferpaca --eval-data short.csv | short.csv, line 3
evaluate tiny --task tiny-math --completions answers.jsonl | one or the other
evaluate --task tiny-math --completions answers.jsonl --batch 2 | --batch | one or the other
evaluate --task tiny-math --completions absent.jsonl | absent.jsonl
evaluate --task tiny-math --completions notes        | notes
evaluate --task tiny-math --completions nothing.jsonl | holds no completions
evaluate --task tiny-math --completions answers.jsonl        | 399 of 400 ids | --partial
evaluate --task tiny-math --completions answers-id.jsonl     | line 1 | '400' is unknown
evaluate --task tiny-math --completions answers-twice.jsonl  | line 2 | already
evaluate --task tiny-math --completions answers-keys.jsonl   | line 1 | 'text'
evaluate --task tiny-math --completions ''           | empty
evaluate tiny --task gsm8k --code-rule uncut         | --code-rule uncut has no meaning for gsm8k
evaluate tiny --task gsm8k --shots -1                | '-1'
evaluate --task tiny-math --completions answers.jsonl --shots 8 | --shots | one or the other
evaluate --task tiny-math --completions answers-cut.jsonl    | line 3: not readable as JSON
profile advise profile-layers.json --model olmoe-1b-7b | profile-layers.json | 3 layers of 64 experts
evaluate compare evaluation                          | FOLDER
evaluate compare evaluation absent                   | absent
evaluate compare evaluation evaluation-ids           | 2 ids
evaluate compare evaluation evaluation-task          | tiny-math | gsm8k
evaluate compare evaluation evaluation-items         | line 1: not an item of evaluate.py
export                                               | run
export run                                           | --to
export run --to merged                               | --out
export notes --to merged --out new                   | notes is not a run folder
export tiny --to merged --out new                    | tiny is not a run folder
export run-bare --to merged --out new                | run-bare
export run-list --to merged --out new                | run-list
export run-model --to merged --out new               | run-model
export run-flip --to merged --out new                | sha256
export run-no-adapter --to peft --out new            | run-no-adapter has no adapter | --resume
export run-experts --to peft --out new               | expert 64 is listed
export run --to merged --out notes                   | not empty
export run --to peft --out file                      | not empty
export run --to peft --out file/new                  | file/new
export run --to merged --out new --model nowhere/at-all | nowhere/at-all
export run --to merged --out new --model config-other   | shape
export run --to merged --out new --model weights-nan    | not the base
export run --to merged --out new --model config-scaling | logits_scaling
export run --to merged --out new --model weights-cut    | model.safetensors
export run --to merged --out new --compact           | --compact
export run --too peft --out new                      | unknown flag --too; did you mean --to?
export check peft-base --base nowhere/at-all         | nowhere/at-all
export check nowhere/at-all --base tiny              | nowhere/at-all
export check peft-base --base tiny --adapter peft-base | --adapter has no meaning with the adapter
export check tiny --base tiny --adapter tiny         | holds no adapter
export check tiny-mixtral --base tiny                | not of the same model
export check peft-base --base tiny --profile absent.json | absent.json
generate                                             | the following arguments are required: model
generate tiny a --top-p 0.5                          | greedy decoding does not sample
generate tiny a --seed 5                             | --seed 5: greedy decoding does not sample
generate tiny a --max-new-tokens 0                   | got '0'
generate tiny HALF                                   | the prompt is not text in UTF-8
evaluate tiny --task own                             | your own data | --eval-data FILE
evaluate tiny --task own --eval-data own-empty.jsonl | own-empty.jsonl, line 2: turn 2 (assistant) is empty
evaluate --task own --completions answers.jsonl      | measured by the loss
evaluate tiny --task tiny-math --max-length 64       | --max-length 64 | no meaning
evaluate tiny --task tiny-math --timeout 2           | --timeout 2 | no meaning
evaluate tiny --task tiny-safety --workers 2         | --workers 2 | no meaning
profile --out p.json --task own                      | your own data | --train-data FILE
profile --out p.json --task own --train-data own-mixed.jsonl | line 2
profile                                              | --out
profile --out notes                                  | notes is a folder
profile --out file/p.json                            | file/p.json
profile --out new/p.json --k 65                      | 65 | 1..64
profile --out p.json --plot p.txt                    | 'p.txt' | .png
profile --out p.json --sample 2                      | '2' | at most 1
profile --out p.json --model weights-cut             | model.safetensors
profile --prompt ''                                  | an argument is empty
profile --prompt nowhere/rows.txt                    | no such file
profile --prompt rows.jsonl                          | no such file
profile --prompt Hello --k 4                         | --k 4 needs --profile FILE
profile --prompt Hello --plot p.png                  | --plot draws the share of hot experts; give --profile FILE
profile --prompt Hello --model nowhere/at-all        | nowhere/at-all
profile --out p.json --model config-unknown          | mup False
profile --out p.json --model config-short            | --max-length 512
profile --out p.json --task gsm8k --train-data columns.jsonl | 'question'
profile compare profile.json                         | FILE
profile compare profile.json absent.json             | absent.json
profile compare profile.json profile-layers.json     | (4, 64) | (3, 64)
profile compare profile.json profile.json --k 65     | 65 | 1..64
profile compare profile.json profile.json --plot p.gif | 'p.gif' | .png
profile compare profile.json profile-negative.json   | profile-negative.json
profile advise absent.json                           | absent.json | No such file | --out
profile advize profile.json                          | 'advize' | advise
profile advise profile.json --rank 49                | 49 | 1..48
profile advise profile.json --model mixtral-8x7b     | 32 layers of 8 experts
profile advise profile-model.json                    | no/such-model
bench                                                | no command | step
bench stride                                         | 'stride' | step
bench step --k 65                                    | 65 | 1..64
bench step --names lora nothing                      | 'nothing' | floor
bench step --json file/rows.json                     | file/rows.json
bench step --json notes                              | notes
bench plan --model nowhere/at-all                    | nowhere/at-all | olmoe-1b-7b
bench plan --k 65                                    | 65 | 1..64
bench plan --rank 1025                               | 1025 | 1..1024
bench plan --json notes                              | notes
bench generate --model nowhere/at-all                | nowhere/at-all
bench generate --json file/rows.json                 | file/rows.json
bench generate --json notes                          | notes
reproduce                                            | no command | params
reproduce table99                                    | 'table99' | params
reproduce params extra                               | extra
reproduce params --json notes                        | notes is a folder
reproduce params --json file/rows.json               | file/rows.json
"""


def cases() -> list:
    rows = [[part.strip() for part in line.split(" | ")] for line in CASES.strip().splitlines()]
    return [pytest.param(command, said, id=command) for command, *said in rows]


def arguments(command: str) -> list[str]:
    return shlex.split(meaning(command))


def listing() -> dict[str, tuple]:
    """Everything in the folder of the case, files with their sizes and times."""
    files = (Path(folder, name) for folder, _, names in os.walk(".") for name in names)
    times = {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in files}
    return times | {folder: None for folder, *_ in os.walk(".")}


def complaint(command: str, made: SimpleNamespace, capsys) -> str:
    """Run a wrong command as it runs itself, in its folder.  -> the one line that it answers"""
    name, *flags = arguments(command)
    for file in {part.split("/")[0] for part in flags}:
        make(file, made)
    before = listing()
    main = importlib.import_module(name).main
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: main(flags))
    err = capsys.readouterr().err
    assert end.value.code == 2, err
    assert listing() == before
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


@pytest.fixture
def no_work(made, monkeypatch):
    """What takes long is never reached: wrong input is found before."""

    def reached(*args, **kwargs):
        raise AssertionError("the work has begun")

    for name in (
        "train.fit",
        "evaluate.complete",
        "lab.benchmarks.step.measure",
        "lab.benchmarks.generate.decode_ours",
    ):
        monkeypatch.setattr(name, reached)


@pytest.mark.parametrize("command, said", cases())
def test_wrong_input_ends_in_one_line_with_status_2_and_writes_nothing(command, said, made, no_work, capsys):
    line = complaint(command, made, capsys)
    assert all(part in line for part in said), line


def test_a_process_of_its_own_answers_the_same_and_unpickles_nothing(made, no_work, capsys):
    line = complaint("evaluate run-pickle", made, capsys)
    command = [sys.executable, ROOT / "evaluate.py", "run-pickle"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("", line, 2)
    assert not Path("unpickled").exists()


# --------------------------------------------------------------------------------------------------------- pickles


def test_the_pickle_of_these_cases_leaves_a_mark_where_it_is_loaded_and_no_module_loads_one():
    pickle.loads(A_PICKLE)
    assert Path("unpickled").is_dir()
    calls = re.compile(r"\b(pickle|marshal|shelve|dill|joblib)\b|torch\.load\(|allow_pickle|trust_remote_code|\beval\(")
    modules = [*ROOT.glob("*.py"), *ROOT.glob("lab/**/*.py"), *ROOT.glob("tiny/*.py")]
    found = {path.name for path in modules for line in path.read_text().splitlines() if calls.search(code_of(line))}
    assert len(modules) > 20 and not found


def code_of(line: str) -> str:
    """A line without its comment, and without prose about pickles in docstrings."""
    code = line.split("#")[0].replace(".eval(", "")
    return code if re.search(r"[(=]|import", code) else ""


def test_weights_beside_safetensors_that_could_run_code_are_not_opened(made, no_work, capsys):
    Path("model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TINY / name, "model")
    for name in ("pytorch_model.bin", "model.bin", "adapter_model.bin"):
        Path("model", name).write_bytes(A_PICKLE)
    assert "model.safetensors is missing" in complaint("evaluate model --task tiny-math", made, capsys)
    index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    write_json(Path("model/model.safetensors.index.json"), index)
    assert "pytorch_model.bin: not a whole safetensors file" in complaint("profile --out p --model model", made, capsys)
    assert not Path("unpickled").exists()


# --------------------------------------------------------------------------------------- odd, and still right input


def test_examples_that_are_too_long_are_counted_and_said(capsys):
    rows = [{"question": "How many? " * n, "answer": "One.\n#### 1"} for n in (1, 9, 90, 900)]
    write_lines(Path("rows.jsonl"), rows)
    result = train.main("--task gsm8k --train-data rows.jsonl --max-length 64 --rank 2 --steps 1 --out run".split())
    assert result["steps"] == 1
    out, err = capsys.readouterr()
    assert err.startswith("2 of 4 prompts are too long for 64 tokens and lose ")
    assert "gsm8k: 4 examples, " in out


def test_folders_and_files_with_spaces_and_letters_of_any_alphabet_work(capsys):
    place = Path("mes modèles", "учёба")
    place.mkdir(parents=True)
    tiny_model(place / "tiny ñ")
    base, run, data = str(place / "tiny ñ"), str(place / "run é"), str(place / "zahlen ü.jsonl")
    Path(data).write_text(f"{GSM8K}\n" * 6)
    found = str(place / "profil ß.json")
    rows = ["--task", "gsm8k", "--train-data", data]
    profile.main([*rows, "--model", base, "--sample", "1", "--out", found, "--plot", found.replace("json", "png")])
    train.main([*rows, "--model", base, "--profile", found, "--rank", "2", "--steps", "1", "--out", run])
    some = ["--limit", "2", "--max-new-tokens", "2"]
    score = evaluate.main([run, "--eval-data", data, *some, "--out", str(place / "学习")])
    assert score["num_total"] == 2 and (place / "学习" / "score.json").is_file()
    for kind in ("merged", "peft"):
        export.main([run, "--to", kind, "--out", str(place / f"{kind} å")])
    assert evaluate.main([str(place / "merged å"), "--task", "gsm8k", "--eval-data", data, *some])["num_total"] == 2
    assert all(name.startswith("mes") for name in os.listdir() if name not in ("runs", "cache"))


def test_a_model_without_an_end_of_text_or_with_unknown_keys_can_be_evaluated_but_not_trained():
    tiny_model(Path("model"), {"eos_token_id": 5000, "other_scale": 0})
    flags = ["--ignore-config-keys", "other_scale"]
    sample = ["--model", "model", "--sample", "0.05", "--out", "p.json"]
    with pytest.raises(cli.InputError, match="eos_token_id is 5000, not a token of the model; training needs one"):
        profile.main([*flags, *sample])  # as train.py would
    some = ["--limit", "1", "--max-new-tokens", "2", "--out", "score"]
    assert evaluate.main(["model", "--task", "tiny-math", *flags, *some])["num_total"] == 1


@pytest.mark.parametrize("layers", [0, 1])
def test_the_number_of_dense_layers_may_be_none(layers, make_checkpoint):
    config = read_json(make_checkpoint("deepseek").folder / "config.json")
    write_json(Path("config.json"), config | {"first_k_dense_replace": layers})
    assert len(read_config(Path()).moe_layers) == config["num_hidden_layers"] - layers


# ------------------------------------------------------------------------------------------------------- downloads

RESOLVE = """
import huggingface_hub.constants as constants
from hub.checkpoint import files, resolve
from model import read_config
from command.cli import InputError

def attempt(offline):
    constants.HF_HUB_OFFLINE = offline
    try:
        print("whole", [file.stat().st_size for file in files(resolve("some/model"))])
    except InputError as error:
        print(" ".join(str(error).split()))

for phase in ("offline", "cut", "offline", "whole", "offline"):
    if phase == "whole":
        open("repaired", "w").close()
    attempt(offline=phase == "offline")
"""


def test_a_model_download_that_is_cut_is_an_error_the_next_one_is_whole_and_then_no_network_is_needed():
    """huggingface_hub against a local server that breaks off the weights until the file `repaired` is there."""
    contents = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": bytes(50_000)}
    repaired = Path("repaired").resolve()

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            listed = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in contents.items()]
            about = {"id": "some/model", "sha": "a" * 40, "siblings": [{"rfilename": n} for n in contents]}
            if name not in contents and not self.path.startswith("/api/models/"):
                return self.send_error(404)
            content = contents.get(name) or json.dumps(listed if "/tree/" in self.path else about).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                cut = name == "model.safetensors" and not repaired.exists()
                self.wfile.write(content[:1000] if cut else content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    env = os.environ | {"HF_HOME": str(Path("hub").resolve()), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{http.server_port}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", RESOLVE], env=env, capture_output=True, text=True, timeout=120)
    http.shutdown()
    http.server_close()
    nothing, cut, part, whole, again = done.stdout.splitlines()
    assert "the hub has no such model or cannot be reached" in nothing
    assert "the hub has no such model or cannot be reached" in cut and "50000" in cut
    assert "whole" not in part and re.search("some(/|--)model", part)
    assert whole == again == "whole [50000]"
