"""The rows of a file by number: JSON lists and lines, parquet tables, tar files of documents or of pictures with captions.

    rows = open_rows("docs.jsonl.gz")
    rows[7]       -> the object of row 7; raises BadSample
    rows.id(7)    -> "docs.jsonl.gz:8", what it is called where it has no id of its own

Nothing is held as objects: a row is parsed when it is asked for.
"""

from __future__ import annotations

import collections
import glob
import gzip
import io
import json
import mmap
import os
import threading
from typing import Any, Iterator, Protocol, Sequence

import numpy as np

from mmjax.data import stores
from mmjax.data.images import BrokenImage
from mmjax.data.messages import BadSample
from mmjax.errors import UserError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")  # endings of a picture in a tar file
HELD = 4  # row groups of parquet files that are kept decoded


class Rows(Protocol):
    """Rows of one data set. All methods may be called from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def id(self, index: int) -> str: ...


def open_rows(path: str, within: str = "") -> Rows:
    """The rows of a .json or .jsonl file (plain or .gz), or of the .parquet or .tar files that a glob names.

    within   the key under which a .json file that is one object has its list, e.g. "annotations"; where it has an object of objects
             there, its keys are the rows' ids
    Raises UserError for a file that is not there or cannot be read.
    """
    if path.endswith((".parquet", ".tar")):
        paths = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        if not paths or not all(os.path.isfile(name) for name in paths):
            raise UserError(f"there is no file {path!r}")
        return (ParquetRows if path.endswith(".parquet") else TarRows)(paths)
    return TextRows(path, within)


class TextRows:
    """The rows of a .json list (or object) or of a .jsonl file, plain or gzipped, held as text and parsed one by one."""

    def __init__(self, path: str, within: str = ""):
        if not os.path.isfile(path):
            raise UserError(f"there is no file {path!r}")
        self.path = path
        self.keys: list[str] = []
        stem, opener = (path[:-3], gzip.open) if path.endswith(".gz") else (path, io.open)
        with opener(path, "rb") as file:
            try:
                if stem.endswith(".json"):
                    self._text: bytes | mmap.mmap
                    self._text, self._lines, self.keys = _elements(path, file.read().decode(), within)
                else:
                    mapped = opener is io.open and os.path.getsize(path)
                    self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if mapped else file.read()
                    self._lines = _lines(self._text)
            except (OSError, EOFError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read ({error})") from error

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` as an object. Raises BadSample."""
        start, end = self._lines[index]
        return _object(self._text[start:end], self.id(index))

    def id(self, index: int) -> str:
        """The row's key in a file that is an object of rows, else the file's name and the row's number from 1."""
        return self.keys[index] if self.keys else f"{os.path.basename(self.path)}:{index + 1}"


class ParquetRows:
    """The rows of parquet files, one file after the other; whole row groups are decoded, and the last few kept."""

    def __init__(self, paths: Sequence[str]):
        from pyarrow import ArrowException, parquet

        self._paths = list(paths)
        self._groups: list[tuple[str, int, int]] = []  # file, row group in it, first row of all
        self._held: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._size = 0
        for path in self._paths:
            try:
                metadata = parquet.read_metadata(path)
            except (OSError, ArrowException) as error:
                raise UserError(f"{path}: is not a readable parquet file ({error})") from error
            for number in range(metadata.num_row_groups):
                self._groups.append((path, number, self._size))
                self._size += metadata.row_group(number).num_rows
        self._starts = np.array([first for _, _, first in self._groups], np.int64)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`, its columns by name. Raises BadSample."""
        from pyarrow import ArrowException, parquet

        group, at = self._place(index)
        with self._lock:
            if group not in self._held:
                path, number, _ = self._groups[group]
                try:
                    with parquet.ParquetFile(path) as file:
                        self._held[group] = file.read_row_group(number)
                except (OSError, ArrowException) as error:
                    raise BadSample(self.id(index), f"its row group cannot be read ({error})") from error
                while len(self._held) > HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(group)
            table = self._held[group]
        return table.slice(at, 1).to_pylist()[0]

    def id(self, index: int) -> str:
        group, at = self._place(index)
        path, _, first = self._groups[group]
        start = next(start for name, _, start in self._groups if name == path)
        return f"{os.path.basename(path)}:{first - start + at + 1}"

    def _place(self, index: int) -> tuple[int, int]:
        """The row group, and the row within it."""
        if not 0 <= index < self._size:
            raise IndexError(index)
        group = int(np.searchsorted(self._starts, index, "right")) - 1
        return group, index - int(self._starts[group])

    def __reduce__(self) -> tuple:
        return ParquetRows, (self._paths,)


class TarRows:
    """The samples of tar files in the manner of webdataset: members that share a name up to its first point are one row.

    A row is the object of its .json member; beside it stand `image`, the name of its picture in the tar, and `caption`, its .txt
    member, where it has them.
    """

    def __init__(self, paths: Sequence[str]):
        self._paths = tuple(paths)
        self._files = stores.TarImages(self._paths)
        members: dict[str, dict[str, str]] = {}
        for name in self._files.names:
            folder, _, file = name.rpartition("/")
            stem, _, ending = file.partition(".")
            kind = "image" if ending.lower() in PICTURES else ending.lower()
            if stem and kind in ("image", "json", "txt"):
                members.setdefault(f"{folder}/{stem}" if folder else stem, {}).setdefault(kind, name)
        self._members = list(members.items())

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`. Raises BadSample."""
        key, members = self._members[index]
        row: dict[str, Any] = {}
        try:
            if "json" in members:
                row = _object(self._files.read(members["json"]), key)
            if "txt" in members:
                row["caption"] = self._files.read(members["txt"]).decode()
        except (BrokenImage, UnicodeDecodeError) as error:
            raise BadSample(key, str(error)) from error
        return {**row, "image": members["image"]} if "image" in members else row

    def id(self, index: int) -> str:
        return self._members[index][0]

    def __reduce__(self) -> tuple:
        return TarRows, (self._paths,)


def _object(text: bytes, id: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(id, "the row is not valid JSON") from error
    if not isinstance(row, dict):
        raise BadSample(id, "the row is not a JSON object")
    return row


def _lines(text: Any) -> np.ndarray:
    """Start and end of every line that is not blank, int64 [rows, 2]; `text` is bytes or a mapped file."""
    spans, start, size = [], 0, len(text)
    while start < size:
        end = text.find(b"\n", start)
        end = size if end < 0 else end
        if text[start:end].strip():
            spans.append((start, end))
        start = end + 1
    return np.array(spans, np.int64).reshape(-1, 2)


def _elements(path: str, text: str, within: str) -> tuple[bytes, np.ndarray, list[str]]:
    """The elements of a JSON list or object as one text, their places in it, and their keys (of an object); element by element, so
    that no tree of objects is held."""
    at = _skip(text, 0)
    if within:
        at = _inside(path, text, at, within)
    elif text[at : at + 1] != "[":
        raise UserError(
            f"{path}: is not a JSON list; one object to a line belongs into a .jsonl file, and for a list below a key say which "
            "(the option `within`)"
        )
    rows: list[bytes] = []
    keys: list[str] = []
    try:
        for key, start, end in _walk(text, at):
            rows.append(text[start:end].encode())
            keys += [key] if key is not None else []
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON after {len(rows)} rows") from error
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    places = np.stack([ends - [len(row) for row in rows], ends], 1) if rows else np.zeros((0, 2), np.int64)
    return b"".join(rows), places, keys


def _inside(path: str, text: str, at: int, within: str) -> int:
    """Where the value of the key `within` begins in the object at `at`."""
    try:
        if text[at : at + 1] == "{":
            at = _skip(text, at + 1)
            while text[at : at + 1] == '"':
                key, start = _key(text, at)
                if key == within and text[start : start + 1] in ("[", "{"):
                    return start
                at = _after(text, _DECODER.raw_decode(text, start)[1], "}")
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{path}: has no list and no object under the key {within!r}")


def _walk(text: str, at: int) -> Iterator[tuple[str | None, int, int]]:
    """Key (None in a list), start and end of each element of the list or object at `at`. Raises ValueError."""
    closing = {"[": "]", "{": "}"}[text[at]]
    at = _skip(text, at + 1)
    while text[at : at + 1] != closing:
        key, start = _key(text, at) if closing == "}" else (None, at)
        _, end = _DECODER.raw_decode(text, start)
        yield key, start, end
        at = _after(text, end, closing)


def _key(text: str, at: int) -> tuple[str, int]:
    """The key at `at`, and where its value begins."""
    key, at = _DECODER.raw_decode(text, at)
    at = _skip(text, at)
    if not isinstance(key, str) or text[at : at + 1] != ":":
        raise ValueError
    return key, _skip(text, at + 1)


def _after(text: str, at: int, closing: str) -> int:
    """Where the next element begins, or what closes them stands."""
    at = _skip(text, at)
    if text[at : at + 1] == ",":
        return _skip(text, at + 1)
    if text[at : at + 1] != closing:
        raise ValueError
    return at


def _skip(text: str, at: int) -> int:
    """The place of the next character that is not JSON's white space."""
    while at < len(text) and text[at] in " \t\n\r":
        at += 1
    return at


_DECODER = json.JSONDecoder()
