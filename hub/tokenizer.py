"""The tokenizer of a checkpoint: tokenizer.json, what the files beside it say about special tokens, and BOS.

tokenizer = read_tokenizer(folder, vocab_size, special_ids)
ids = tokenize(["text"], tokenizer)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from command.cli import InputError
from command.files import read_json, write_json

Spans = tuple[tuple[int, int], ...]


def read_tokenizer(folder: Path, vocab_size: int, special_ids: set[int | None]) -> Tokenizer:
    """tokenizer.json of a checkpoint folder. Raises InputError if it is missing, damaged or beyond the vocabulary.

    special_ids: of tokens that config.json names.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            convert = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            raise InputError(
                f"{folder} has tokenizer.model but no tokenizer.json; make it with transformers: {convert}"
            )
        raise InputError(f"{folder} has no tokenizer.json; expected the fast tokenizer of the model, as the hub has it")
    try:
        with path.open("rb") as file:
            if file.read(8) == b"version ":
                raise ValueError("a Git LFS pointer; fetch the file with `git lfs pull`")
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: not a tokenizer.json ({error})") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= largest < vocab_size:
        raise InputError(f"{path}: its ids go up to {largest}, but config.json says vocab_size {vocab_size}")
    tokenizer.no_truncation()  # the file may ask for either; lengths are decided here
    tokenizer.no_padding()
    # Text that spells a special token, such as <s> in HTML, is text: special ids come from us alone. Some files do not
    # mark the special tokens that the files beside them name.
    added = tokenizer.get_added_tokens_decoder()
    also = special_tokens(folder)
    unmarked = [
        token.content for i, token in added.items() if not token.special and (i in special_ids or token.content in also)
    ]
    tokenizer.add_special_tokens(unmarked)
    tokenizer.encode_special_tokens = True
    return tokenizer


NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # tokenizer_config.json has a key `bos_token`, and so on


def named_tokens(folder: Path) -> dict[str, str]:
    """What tokenizer_config.json calls `bos_token`, `eos_token` and the like: names that a template may use."""
    config = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the second counts
        config |= read_json(folder / file, dict, missing={})
    tokens = {key: config.get(key) for key in (f"{name}_token" for name in NAMED)}
    tokens = {key: token.get("content") if isinstance(token, dict) else token for key, token in tokens.items()}
    return {key: token for key, token in tokens.items() if isinstance(token, str)}


def special_tokens(folder: Path) -> set[str]:
    """The special tokens that tokenizer_config.json names, if there is one: `eos_token` and the like, and lists."""
    path = folder / "tokenizer_config.json"
    config = read_json(path, dict, missing={})
    try:
        tokens = [
            token for key in ("additional_special_tokens", "extra_special_tokens") for token in config.get(key) or ()
        ]
        tokens += [token for token in config.get("added_tokens_decoder", {}).values() if token["special"]]
        listed = {token["content"] if isinstance(token, dict) else token for token in tokens}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a tokenizer_config.json ({error!r})") from None
    return listed | {*named_tokens(folder).values()}


def write_stop_ids(folder: Path, stop_ids: Iterable[int]) -> None:
    """Let generation_config.json of a checkpoint name all tokens that end a completion, for what will serve it."""
    path, config = folder / "generation_config.json", read_json(folder / "config.json", dict)
    named = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    named = read_json(path, dict, missing=named)
    ends = named.get("eos_token_id")
    if not set(stop_ids) <= set(ends if isinstance(ends, list) else [ends]):
        write_json(path, named | {"eos_token_id": list(stop_ids)})


def tokenize(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each text, without special tokens; the same for training and for decoding.

    Raises InputError for text that becomes a special token all the same, as in some tokenizers without merges.
    """
    # DEVIATION from LoRI: no BOS before HumanEval prompts either; LoRI has it there, but nowhere in training.
    ids_of = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    special = never_text(tokenizer)
    for text, ids in zip(texts, ids_of, strict=True):
        refuse_special(text, ids, special)
    return ids_of


def never_text(tokenizer: Tokenizer) -> dict[int, str]:
    """The special tokens by id, without the one that stands for text that has no token."""
    unknown = getattr(tokenizer.model, "unk_token", None) or "<unk>"
    added = tokenizer.get_added_tokens_decoder().items()
    return {i: token.content for i, token in added if token.special and token.content != unknown}


def refuse_special(text: str, ids: list[int], special: dict[int, str]) -> None:
    """Raise InputError if text became one of the special tokens."""
    if spelled := special.keys() & ids:
        token = special[min(spelled)]
        raise InputError(f"the tokenizer turns text into its special token {token!r}: {text!r:.80}; remove it")


# ----------------------------------------------------------------------------------------------------------------- BOS


@dataclass(frozen=True)
class Bos:
    """The BOS token, and which sequences begin with it."""

    id: int | None = None
    in_text: bool = False  # those of prompt and target
    in_chat: bool | None = None  # those of a chat template; None: where the template writes it
    reason: str = ""  # the choice, and why

    def before_text(self, ids: list[int]) -> list[int]:
        """The ids of a prompt, with the BOS token if it is to be there."""
        return [self.id, *ids] if self.in_text else ids

    def before_chat(self, ids: list[int], spans: Spans) -> tuple[list[int], Spans]:
        """The ids of a chat and what is learnt of them, with one BOS token in front or none, as `in_chat` says."""
        has = self.id is not None and ids[:1] == [self.id]
        if self.in_chat is None or self.in_chat == has:
            return ids, spans
        shift = 1 if self.in_chat else -1
        ids = [self.id, *ids] if self.in_chat else ids[1:]
        return ids, tuple((start + shift, end + shift) for start, end in spans)


BOS_HELP = "a BOS token before each sequence; auto: for task own as the tokenizer does, else none"


def choose_bos(asked: str, folder: Path, tokenizer: Tokenizer, config_id: int | None, follows: bool) -> Bos:
    """Which sequences begin with the BOS token. asked: "yes", "no", or "auto", which may follow the tokenizer.

    The tokenizer says it by what the post-processor of tokenizer.json adds, as in transformers 5.
    config_id: bos_token_id of config.json. Raises InputError for "yes" if there is no BOS token.
    """
    if asked == "auto" and not follows:
        return Bos(reason="no BOS token")
    name = named_tokens(folder).get("bos_token")
    bos_id = config_id if name is None else tokenizer.token_to_id(name)
    if asked == "yes":
        if bos_id is None:
            raise InputError("--bos yes: neither tokenizer_config.json nor config.json names a BOS token; leave it out")
        return Bos(bos_id, True, True, "as asked, a BOS token")
    if asked == "no":
        return Bos(bos_id, False, False, "as asked, no BOS token")
    if bos_id is None:
        return Bos(reason="no BOS token, as the tokenizer names none")
    if tokenizer.encode("a").ids[:1] == [bos_id]:
        return Bos(bos_id, True, None, "a BOS token, as the tokenizer adds it")
    return Bos(bos_id, reason="no BOS token, as the tokenizer adds none")
