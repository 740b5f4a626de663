"""Where a source's pictures lie: a folder, or uncompressed tar files or a JSON file of base64, read in place and never unpacked."""

from __future__ import annotations

import base64
import binascii
import glob
import mmap
import os
import tarfile
import threading
from pathlib import Path
from typing import Iterator, Protocol

from mmjax.data.images import MAX_BYTES, BrokenImage
from mmjax.errors import UserError


class Store(Protocol):
    """Pictures by name. `read` may be called from several threads, and a store can be sent to another process."""

    def read(self, name: str) -> bytes: ...


def open_store(spec: str) -> Store:
    """The store that `spec` names: a folder, a .tar file, a glob of .tar files, or a .json file; "" = no pictures at all.

    Raises UserError where nothing is there.
    """
    if not spec:
        return NoImages()
    if os.path.isdir(spec):
        return FolderImages(spec)
    if spec.endswith(".json") and os.path.isfile(spec):
        return JsonImages(spec)
    paths = sorted(glob.glob(spec)) if glob.has_magic(spec) else [spec]
    if not paths or not all(os.path.isfile(path) for path in paths):
        raise UserError(f"images: there is no folder, no tar file and no .json file {spec!r}")
    return TarImages(tuple(paths))


class NoImages:
    """The store of a text-only source."""

    def read(self, name: str) -> bytes:
        raise BrokenImage(f"{name}: the source names no folder or tar of images (`images` in its config)")


class FolderImages:
    """Files below a folder. A name that leads out of it, over `..` or over a symbolic link, is refused."""

    def __init__(self, root: str):
        self.root = Path(root).resolve()

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises BrokenImage."""
        try:
            path = (self.root / name).resolve()
            if not path.is_relative_to(self.root):
                raise BrokenImage(f"{name}: leaves the image folder")
            if not path.is_file():
                raise BrokenImage(f"{name}: no such file in the image folder")
            if path.stat().st_size > MAX_BYTES:
                raise BrokenImage(f"{name}: the file is larger than {MAX_BYTES >> 20} MiB")
            return path.read_bytes()
        except (OSError, ValueError, RuntimeError) as error:  # an impossible name, a loop of links, no right to read
            raise BrokenImage(f"{name[:100]!r}: cannot be read") from error


class TarImages:
    """The regular files of tar archives, indexed once and read by their offsets."""

    def __init__(self, paths: tuple[str, ...]):
        self.paths = paths
        self._index: dict[str, tuple[int, int, int]] = {}  # name -> archive, offset, bytes
        self._files: dict[int, int] = {}  # archive -> file descriptor
        self._lock = threading.Lock()
        for number, path in enumerate(paths):
            try:
                with tarfile.open(path, "r:") as archive:
                    for member in archive:
                        if member.isreg() and not member.issparse():
                            place = number, member.offset_data, member.size
                            self._index.setdefault(_name(member.name), place)
            except tarfile.TarError as error:
                raise UserError(f"images: {path} is not a readable, uncompressed tar file") from error

    @property
    def names(self) -> list[str]:
        """All members, in the order of the archives."""
        return list(self._index)

    def read(self, name: str) -> bytes:
        """The member's bytes. Raises BrokenImage."""
        found = self._index.get(_name(name))
        if found is None:
            raise BrokenImage(f"{name}: no such file in {', '.join(map(os.path.basename, self.paths))}")
        number, offset, size = found
        if size > MAX_BYTES:
            raise BrokenImage(f"{name}: the file is larger than {MAX_BYTES >> 20} MiB")
        with self._lock:
            if number not in self._files:
                self._files[number] = os.open(self.paths[number], os.O_RDONLY)
        return os.pread(self._files[number], size, offset)

    def __reduce__(self) -> tuple:
        return TarImages, (self.paths,)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


class JsonImages:
    """A JSON object of pictures in base64, `{"NAME": "/9j/4AAQ...", ...}` (MIMIC-IT). The file is mapped and indexed, never held."""

    def __init__(self, path: str):
        self.path = path
        self._index: dict[str, tuple[int, int]] = {}  # name -> start and end of its base64
        try:
            with open(path, "rb") as file:
                self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise UserError(f"images: {path} cannot be read ({error})") from error
        # Neither names nor base64 have quotes in them, so every four quotes are a name and its picture.
        quotes = self._quotes()
        for start in quotes:
            places = [next(quotes, -1) for _ in range(3)]
            if places[-1] < 0 or self._text[places[0] + 1 : places[1]].strip() != b":":
                raise UserError(f"images: {path} is not a JSON object of names and pictures in base64")
            name = self._text[start + 1 : places[0]].decode(errors="replace")
            self._index[name] = places[1] + 1, places[2]

    def read(self, name: str) -> bytes:
        """The picture's bytes. Raises BrokenImage."""
        if name not in self._index:
            raise BrokenImage(f"{name}: no such picture in {os.path.basename(self.path)}")
        start, end = self._index[name]
        if (end - start) * 3 // 4 > MAX_BYTES:
            raise BrokenImage(f"{name}: the file is larger than {MAX_BYTES >> 20} MiB")
        return decoded_base64(self._text[start:end].replace(b"\\/", b"/"), name)

    def _quotes(self) -> Iterator[int]:
        at = self._text.find(b'"')
        while at >= 0:
            yield at
            at = self._text.find(b'"', at + 1)

    def __reduce__(self) -> tuple:
        return JsonImages, (self.path,)


def decoded_base64(text: bytes | str, name: str) -> bytes:
    """The bytes that base64 stands for, a data URL's head left out. Raises BrokenImage."""
    head = text[:64]
    mark = b"base64," if isinstance(head, bytes) else "base64,"
    at = head.find(mark)  # type: ignore[arg-type]
    try:
        return base64.b64decode(text[at + len(mark) :] if at >= 0 else text)
    except (binascii.Error, ValueError) as error:
        raise BrokenImage(f"{name}: is not base64") from error


def _name(name: str) -> str:
    return name.removeprefix("./")
