"""The content of a checkpoint as a short text: equal for equal tensors, whatever their files are named or cut into.

    weights_digest(folder)      # SHA-256 over the name, dtype, shape and bytes of every tensor

Every byte is read, which takes seconds for billions of parameters. So the digests of a file's tensors are kept in the
cache folder, under the file's size, times and inode, and are computed again once one of these has changed.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from command.cli import InputError, RunError
from command.files import write_json
from hub.checkpoint import files

BLOCK = 1 << 20  # bytes


def weights_digest(folder: Path) -> str:
    """The digest of all weights of a checkpoint folder. Raises InputError if a file is missing."""
    return combined(files(folder))


def combined(paths: Iterable[Path]) -> str:
    """The digest of all tensors of these safetensors files."""
    with ThreadPoolExecutor() as pool:  # hashing and reading release Python's lock
        parts = list(pool.map(cached_digests, paths))
    tensors = sorted((name, digest) for part in parts for name, digest in part.items())
    return hashlib.sha256(json.dumps(tensors).encode()).hexdigest()


def cached_digests(path: Path) -> dict[str, str]:
    """tensor_digests(path), from the cache ($HELLORA_CACHE or ~/.cache/hellora) if the file has not changed since."""
    stat = path.stat()
    state = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    name = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    kept = Path(os.environ.get("HELLORA_CACHE") or "~/.cache/hellora").expanduser() / "digests" / f"{name}.json"
    try:
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        found = tensor_digests(path)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, found)
    except (OSError, RunError):
        pass  # without a cache it takes longer
    return found


def tensor_digests(path: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a safetensors file, over its dtype, shape and bytes.

    The file has 8 bytes with the size of the header, the header as JSON, then the bytes of the tensors. Raises
    InputError for a file that is damaged or of another format.
    """
    try:
        with safe_open(path, framework="pt"):  # checks the sizes
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); download it again") from None
    found = {}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, about in header.items():
            first, end = about["data_offsets"]
            digest = hashlib.sha256(json.dumps([about["dtype"], about["shape"]]).encode())
            file.seek(8 + size + first)
            while first < end:
                block = file.read(min(BLOCK, end - first))
                if not block:
                    raise OSError(f"{path} ends early")
                digest.update(block)
                first += len(block)
            found[name] = digest.hexdigest()
    return found
