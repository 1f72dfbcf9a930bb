"""Rows of data sets: public files, downloaded once and checked, and local files in the public formats.

    path = fetch(Download(url, sha256), "pass a copy with --train-data FILE")
    for place, row in read_rows(path): ...          # place: the file and line to name when the row is wrong

A row is a dict. A file is csv with a header, a JSON list, a JSON object of columns, or JSON lines, each perhaps
compressed with gzip, or parquet. HEx-PHI is a folder of csv files without headers.
"""

import csv
import gzip
import hashlib
import io
import re
import tempfile
import urllib.request
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from http.client import HTTPException
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError

from command.cli import InputError, note
from command.errors import first_line
from command.files import cache_folder, parse_json

Row = dict[str, object]
CHATS = ("messages", "conversations")  # columns that hold the turns of a chat


def text(row: Row, *columns: str) -> str:
    """The first of these columns that the row has. Raises InputError unless it holds text that is not blank."""
    value = next((row[column] for column in columns if column in row), None) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"no text as {' or '.join(map(repr, columns))} in {row!r:.100}")
    return value


CHANGING = set(  # words, without a plural s, in columns that say what is learnt of a row, or what else a model reads
    "system history context document chosen rejected label kto mask train weight tool function image video audio kwarg "
    "thinking".split()
)
JOINED = "systemprompt lossmask labelmask sampleweight lossweight toolcalls functioncall".split()
ABOUT = set("id length width height size count kg".split())  # words in columns that only describe a row


def unread(row: Row, used: Iterable[str]) -> list[str]:
    """The columns that hold something and are not used. Raises InputError for one that changes what the row means."""
    names = [name for name, value in row.items() if name not in used and value not in (None, "", [], {})]
    for name in names:
        words = {word.lower().removesuffix("s") for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)}
        if (words & CHANGING and not words & ABOUT) or name.lower() in JOINED:
            given = f"the column {name!r} ({row[name]!r:.40}) changes what a row means, and is not supported"
            raise InputError(f"{given}; remove the column, or put what it says into the text")
    return names


GOLD = re.compile(r"\$?(-?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?)", re.ASCII)


def gold(answer: str) -> Decimal:
    """The number behind "####" in an answer of the data set.

    Raises InputError for anything that one of the rules would read as another number, such as ".5", "1/2" or "5 of 9".
    """
    _, marker, text = answer.partition("####")
    found = GOLD.fullmatch(text.strip())
    if not found:
        given = repr(text.strip()[:40]) if marker else "no '####'"
        expected = "'#### ' and a plain number such as 5, -5, 1,250 or 0.5, which all rules read alike"
        raise InputError(f"'answer' has {given}; expected {expected}")
    return Decimal((found[1] + found[2]).replace(",", ""))


def label_of(row: dict) -> str | None:
    """What a row of prompts is labelled: "safe", "unsafe", or None if it has no label. Raises InputError otherwise."""
    label = row.get("label")
    name = label.strip().lower() if isinstance(label, str) else label
    if name not in (None, "", "safe", "unsafe"):
        raise InputError(f"'label' is {label!r:.40}; expected safe or unsafe, or no label")
    return name or None


# -------------------------------------------------------------------------------------------------- downloads


@dataclass(frozen=True)
class Download:
    """A public file, pinned by its SHA-256 or by the beginning of its id as a git blob."""

    url: str
    sha256: str = ""
    git_blob: str = ""
    licence: str = ""  # printed where it restricts the use

    def holds(self, content: bytes) -> bool:
        """Whether this is the pinned file."""
        if self.sha256:
            return hashlib.sha256(content).hexdigest() == self.sha256
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest().startswith(self.git_blob)


@dataclass(frozen=True)
class HubDataset:
    """Files of a data set on the Hugging Face hub, pinned by the commit, which decides their content."""

    name: str
    revision: str  # the commit
    pattern: str  # of the files
    licence: str


def fetch(source: Download | HubDataset, instead: str) -> Path:
    """The file or folder of a data set, downloaded unless it is in the cache. Says a licence that restricts the use.

    Raises InputError, with the advice `instead`, if it cannot be downloaded or is not the pinned file.
    """
    path = fetch_file(source, instead) if isinstance(source, Download) else fetch_from_hub(source, instead)
    if source.licence:
        name = path.name if isinstance(source, Download) else f"{source.name}, commit {source.revision}"
        note(f"{name}: licence {source.licence}")
    return path


def fetch_from_hub(data: HubDataset, instead: str) -> Path:
    """The file that matches the pattern, or the folder if it may match several, with the user's own token."""
    page = f"https://huggingface.co/datasets/{data.name}"
    try:
        folder = Path(
            snapshot_download(data.name, repo_type="dataset", revision=data.revision, allow_patterns=[data.pattern])
        )
    except GatedRepoError:
        how = f"ask for access at {page}, log in with `hf auth login` or set HF_TOKEN"
        raise InputError(
            f"{data.name} is gated, and no token on this machine has access; {how}, or {instead}"
        ) from None
    except Exception as error:  # of the library, its HTTP client or the disk
        raise InputError(f"{page} cannot be downloaded ({first_line(error)}); {instead}") from None
    path = folder if "*" in data.pattern else folder / data.pattern
    if not path.exists() or (path == folder and not any(folder.glob(data.pattern))):
        raise InputError(f"{page} has no {data.pattern} at commit {data.revision}; {instead}")
    return path


def fetch_file(file: Download, instead: str) -> Path:
    """The file in the cache ($HELLORA_CACHE or ~/.cache/hellora), downloaded unless it is there as pinned."""
    folder = cache_folder()
    path = folder / f"{(file.sha256 or file.git_blob)[:8]}-{file.url.rsplit('/', 1)[-1]}"
    try:
        if path.exists() and file.holds(path.read_bytes()):
            return path
        with urllib.request.urlopen(file.url, timeout=30) as reply:
            content = reply.read()
        if not file.holds(content):
            pinned = f"sha256 {file.sha256}" if file.sha256 else f"git blob {file.git_blob}"
            raise InputError(f"{file.url}: checksum mismatch, expected {pinned}; {instead}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as part:  # several processes may arrive here at once
            (Path(part) / path.name).write_bytes(content)
            (Path(part) / path.name).replace(path)
    except (OSError, HTTPException) as error:
        raise InputError(f"{file.url} cannot be downloaded into {folder} ({error}); {instead}") from None
    return path


# ------------------------------------------------------------------------------------------------ local files


FILES = "a file is parquet or csv if its name says so, else JSON or JSON lines in UTF-8; gzip may compress csv and JSON"


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, decompressed if it is a gzip file. Raises InputError if it cannot be read."""
    content = b""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")  # spreadsheets write a byte order mark first
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not text encoded in UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def csv_rows(path: Path, columns: list[str] | None = None) -> list[tuple[str, Row]]:
    """(place, row) for each record of a csv file; its first line names the columns, unless they are given."""
    csv.field_size_limit(2**31 - 1)  # the library refuses a field of more than 131,072 characters otherwise
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), fieldnames=columns, strict=True)
    rows = []
    try:
        check_header(path, reader.fieldnames or [])
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{place}: more or fewer fields than {', '.join(reader.fieldnames)}")
            if columns is None and is_header(row):
                raise InputError(f"{place}: a second header line, as in concatenated files; remove it")
            rows.append((place, row))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.reader.line_num}: not csv ({error})") from None
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def check_header(path: Path, columns: list[str]) -> None:
    """Raise InputError if a column occurs twice, or if the names are not separated by commas."""
    names = [name for name in columns if name]
    if len(set(names)) < len(names):
        raise InputError(f"{path}, line 1: a column occurs twice in {', '.join(names)}; expected each once")
    if len(names) == 1 and any(sign in names[0] for sign in ";\t|"):
        raise InputError(f"{path}, line 1: {names[0]!r:.60} is one column; expected names separated by commas")


def is_header(row: Row) -> bool:
    """Whether a record repeats the names of its columns, perhaps after a byte order mark."""
    return all(value.strip("\ufeff ").lower() == name.strip().lower() for name, value in row.items())


def json_rows(path: Path) -> list[tuple[str, Row]]:
    """(place, row) for each row of a JSON list, of an object of columns, or of a file with one object per line."""
    content = read_text(path)
    lines = [(f"{path}, line {i}", line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        return []
    if len(lines) > 1 and is_json(lines[0][1]):
        return [(place, parse_json(line, place)) for place, line in lines]
    try:
        whole = parse_json(content, path)
    except InputError as error:
        opens = content.lstrip().startswith(("[", "{"))
        advice = "" if opens else f"; it begins with {content.lstrip()[:30]!r}; {FILES}"
        raise InputError(f"{error}{advice}") from None
    if isinstance(whole, dict) and any(whole.values()) and all(isinstance(column, list) for column in whole.values()):
        if any(isinstance(turn, dict) for name in CHATS for turn in whole.get(name, ())):  # one row, and its turns
            return [(lines[0][0], whole)]
        if len(whole) == 1 and all(isinstance(row, dict) for column in whole.values() for row in column):
            raise InputError(f"{path}: its rows are inside {next(iter(whole))!r}; save this list alone")
        columns = {name: column for name, column in whole.items() if column}
        if len({len(column) for column in columns.values()}) > 1:
            raise InputError(f"{path}: its lists differ in length")
        whole = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(whole, list):
        return [(f"{path}, entry {i}", row) for i, row in enumerate(whole, 1)]
    return [(lines[0][0], whole)]


def is_json(line: str) -> bool:
    """Whether a line is a JSON value by itself, as each of a file of JSON lines is."""
    try:
        parse_json(line, "")
    except InputError:
        return False
    return True


def parquet_rows(path: Path) -> list[tuple[str, Row]]:
    """(place, row) for each row of a parquet file. Raises InputError if pyarrow, which reads it, is not installed."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        advice = "install it, or write its rows as JSON lines (pandas: to_json(orient='records', lines=True))"
        raise InputError(f"{path}: a parquet file, which is read with pyarrow; {advice}") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise InputError(f"{path}: not a parquet file that can be read ({error})") from None
    return [(f"{path}, row {i}", row) for i, row in enumerate(rows, 1)]


HEXPHI = {  # category_N.csv; the hub has withdrawn the second
    1: "Illegal Activity",
    2: "Child Abuse Content",
    3: "Hate/Harass/Violence",
    4: "Malware",
    5: "Physical Harm",
    6: "Economic Harm",
    7: "Fraud/Deception",
    8: "Adult Content",
    9: "Political Campaigning",
    10: "Privacy Violation Activity",
    11: "Tailored Financial Advice",
}


def hexphi_rows(folder: Path) -> list[tuple[str, Row]]:
    """(place, row) for each line of a folder's category_N.csv files, which have no header; says what is missing."""
    named = ((path, re.fullmatch(r"category_(\d+)\.csv", path.name, re.IGNORECASE)) for path in folder.iterdir())
    files = {int(match[1]): path for path, match in named if match}
    if not files:
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:3]) or "nothing"
        raise InputError(f"{folder}: a folder without category_N.csv, not a file; it holds {inside}")
    if unknown := files.keys() - HEXPHI.keys():
        raise InputError(
            f"{folder}: category_{min(unknown)}.csv is not a file of HEx-PHI, which has categories 1 to 11"
        )
    rows = [
        (place, row | {"category": f"{number} {HEXPHI[number]}"})
        for number in sorted(files)
        for place, row in csv_rows(files[number], ["instruction"])
    ]
    missing = HEXPHI.keys() - files.keys() - {2}
    if missing or len(rows) != 30 * len(files):
        lacks = f", without {', '.join(map(str, sorted(missing)))}" if missing else ""
        note(
            f"{folder}: {len(rows)} instructions in {len(files)} categories{lacks}; HEx-PHI has 30 in each of 10 or 11"
        )
    return rows


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """(place, row) for each row of a csv, JSON or parquet file. Raises InputError for damaged files."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file of rows")
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    return {".csv": csv_rows, ".parquet": parquet_rows}.get(kind, json_rows)(path)
