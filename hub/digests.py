"""The content of a checkpoint as a short text: equal for equal tensors, whatever their files are named or cut into.

    weights_digest(folder)      # SHA-256 over the name, dtype, shape and bytes of every tensor

Every byte is read, which takes seconds for billions of parameters. So the digests of a file's tensors are kept in the
cache folder, under the file's size, times and inode, and are computed again once one of these has changed.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from command.cli import RunError
from command.files import cache_folder, json_sha256, write_json
from hub.checkpoint import DTYPES, files, headers, read_parts


def weights_digest(folder: Path) -> str:
    """The digest of all weights of a checkpoint folder. Raises InputError if a file is missing."""
    return combined(files(folder))


def combined(paths: Iterable[Path]) -> str:
    """The digest of all tensors of these safetensors files."""
    with ThreadPoolExecutor() as pool:  # hashing and reading release Python's lock
        parts = list(pool.map(cached_digests, paths))
    tensors = sorted((name, digest) for part in parts for name, digest in part.items())
    return json_sha256(tensors)


def cached_digests(path: Path) -> dict[str, str]:
    """tensor_digests(path), from the cache ($HELLORA_CACHE or ~/.cache/hellora) if the file has not changed since."""
    stat = path.stat()
    state = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    name = json_sha256(state)[:32]
    kept = cache_folder() / "digests" / f"{name}.json"
    try:
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        fresh = tensor_digests(path)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, fresh)
    except (OSError, RunError):
        pass  # without a cache it takes longer
    return fresh


def tensor_digests(path: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a safetensors file, over its dtype, shape and bytes.

    Raises InputError for a file that is damaged or of another format.
    """
    weights, names = dict(headers(path)), {dtype: name for name, dtype in DTYPES.items()}
    tensors = read_parts(path, ((name, weight.index()) for name, weight in weights.items()))
    digests = {}
    for (name, weight), tensor in zip(weights.items(), tensors, strict=True):
        kind = json.dumps([names.get(weight.dtype, weight.dtype), weight.shape])
        digest = hashlib.sha256(kind.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        digests[name] = digest.hexdigest()
    return digests
