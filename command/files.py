"""Files that are there complete or not at all, and checksums of files.

A file or folder is written under a hidden name beside its place, synced to the disk, and renamed. Whatever carries its
final name is therefore complete, however the process ended.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from command.cli import InputError, RunError, note


def writable(path: str | Path) -> Path:
    """The path of a file that can be written; its folder is made if need be. Raises InputError otherwise."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name a file in a writable folder") from None
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file to write")
    return path


def read_json(path: str | Path, kind: type = object, *, missing: Any = None) -> Any:
    """What a JSON file holds, or `missing`, if that is given and there is no file.

    Raises InputError, which names the file, if it cannot be read, and as `parse_json`.
    """
    try:
        text = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if missing is not None:
            return missing
        raise InputError(f"{path} is missing") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_json(text, path, kind)


def parse_json(text: str | bytes, place: object, kind: type = object) -> Any:
    """What a JSON text holds. Raises InputError, which names `place`, if it is not JSON or not a `kind`."""
    try:
        content = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not readable as JSON ({error})") from None
    if not isinstance(content, kind):
        expected = {dict: "an object", list: "a list"}[kind]
        raise InputError(f"{place}: it holds {content!r:.40}; expected {expected}")
    return content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`. Raises ValueError if a key has two different values."""
    content = dict(pairs)
    for key, value in pairs if len(content) < len(pairs) else ():
        if content[key] != value:
            raise ValueError(f"the key {key!r} has two values")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises RunError if the disk refuses; an older file then stays."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        sync(part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written ({error.strerror})") from None


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_jsonl(path: Path, records: list[dict]) -> None:
    """Write a file with one JSON object per line atomically."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` if all goes well and is removed if not.

    Raises RunError if the disk refuses.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        for path in part.iterdir():
            if path.is_file():
                path.chmod(part.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
            sync(path)
        sync(part)
        remove_folder(folder)
        part.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be written ({error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


LOCK = ".lock"  # the file in a folder by which a process claims it


@contextmanager
def claimed(folder: Path, *, beside: bool = False) -> Iterator[None]:
    """Keep other processes that claim the folder out of it. It is made if need be, and removed if it stays empty.

    The operating system holds the lock, and drops it with the process, however that ends. beside: the lock lies beside
    the folder, which is not made, since an `atomic_folder` is to take its place. Raises InputError if another process,
    which is named, has claimed the folder, or if the folder cannot be written.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not os.path.exists(path)]
    try:
        with claim(folder, folder.parent / f".{folder.name}{LOCK}" if beside else folder / LOCK):
            yield
    finally:
        for path in made:
            with suppress(OSError):  # it is not empty
                path.rmdir()


@contextmanager
def claim(folder: Path, path: Path) -> Iterator[None]:
    """Claim the folder by a lock at `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locked(path, folder)
    except OSError as error:
        kind = "it is not a folder" if os.path.isfile(folder) else error.strerror
        raise InputError(f"{folder} cannot be written ({kind}); name another folder") from None
    try:
        yield
    finally:
        path.unlink()
        lock.close()


def locked(path: Path, folder: Path) -> TextIO:
    """A file that this process alone has locked, until it is closed. Raises InputError if another process has it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another process"
            raise InputError(f"{folder} is in use by {owner}; wait for its end, or stop it") from None
        except OSError as error:  # as some file systems of networks answer
            note(f"{folder} cannot be locked ({error.strerror}): do not start a second command with this folder")
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break
        file.close()  # its owner has just removed it
    try:
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError:  # a full disk
        path.unlink()
        raise
    return file


def remove_folder(folder: Path) -> None:
    """Remove a folder under a hidden name, so that an interruption leaves nothing incomplete under its own name."""
    gone = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(content: object) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def seal(content: dict, *files: Path) -> str:
    """SHA-256 over a JSON object and the files it describes: a changed bit in any of them changes the seal."""
    text = json.dumps([content, *map(sha256, files)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cache_folder() -> Path:
    """Where downloads and digests are kept: $HELLORA_CACHE or ~/.cache/hellora."""
    return Path(os.environ.get("HELLORA_CACHE") or "~/.cache/hellora").expanduser()
