# Made by tools/unasync.py from ../_async/files.py: edit that one.
"""Files of the guest: single ones, and whole directories as archives. Nothing is held in memory but one piece."""

from __future__ import annotations

import builtins
import contextlib
import os
import posixpath
import stat
from collections.abc import Iterator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from limpet.client import _sio, _tar, _wire
from limpet.client._sync.transport import Transport
from limpet.errors import NotFound
from limpet.models import FileInfo, Unpacked

if TYPE_CHECKING:
    from limpet.client._sync.sandbox import Sandbox

Source = bytes | str | BinaryIO | Iterable[bytes] | Iterator[bytes]


class Files:
    """Paths are absolute, or relative to the user's home; bytes that are not UTF-8 are surrogate escapes."""

    def __init__(self, transport: Transport, sandbox: Sandbox) -> None:
        self._transport, self._sandbox = transport, sandbox

    def read(self, path: str) -> bytes:
        with self._transport.stream("GET", self._sandbox.path("files"), params={"path": path}) as response:
            return response.read()

    def read_text(self, path: str) -> str:
        """A file of UTF-8. Raises UnicodeDecodeError."""
        return (self.read(path)).decode()

    @contextlib.contextmanager
    def stream(self, path: str) -> Iterator[Iterator[bytes]]:
        """The content in pieces."""
        with self._transport.stream("GET", self._sandbox.path("files"), params={"path": path}) as response:
            yield response.iter_bytes(_wire.CHUNK)

    def write(
        self, path: str, data: Source, *, mode: int | None = None, user: str | None = None, parents: bool = False
    ) -> FileInfo:
        """Replace the file atomically by bytes, text (UTF-8), what a binary file object has left, or pieces of bytes.
        `parents` makes missing directories."""
        params: _wire.Params = {"path": path, "mode": mode, "user": user, "parents": parents}
        headers = {"Content-Length": str(size)} if (size := _size(data)) is not None else {}
        answer = self._transport.request(
            "PUT", self._sandbox.path("files"), params=params, content=_body(data), headers=headers
        )
        return FileInfo.model_validate(answer)

    def list(self, path: str = ".") -> builtins.list[FileInfo]:
        answer = self._transport.request("GET", self._sandbox.path("files", "list"), params={"path": path})
        return [FileInfo.model_validate(item) for item in answer]

    def stat(self, path: str) -> FileInfo:
        """Of the path itself, also when it is a symbolic link. Raises NotFound."""
        answer = self._transport.request("GET", self._sandbox.path("files", "stat"), params={"path": path})
        return FileInfo.model_validate(answer)

    def exists(self, path: str) -> bool:
        try:
            self.stat(path)
        except NotFound:
            return False
        return True

    def mkdir(self, path: str, *, parents: bool = True, mode: int | None = None) -> None:
        body = {"path": path, "parents": parents, "mode": mode}
        self._transport.request("POST", self._sandbox.path("files", "mkdir"), body=body)

    def rename(self, source: str, target: str) -> None:
        body = {"source": source, "target": target}
        self._transport.request("POST", self._sandbox.path("files", "rename"), body=body)

    def remove(self, path: str, *, recursive: bool = False) -> None:
        params: _wire.Params = {"path": path, "recursive": recursive}
        self._transport.request("DELETE", self._sandbox.path("files"), params=params)

    def upload(
        self, local: str | os.PathLike[str], path: str, *, user: str | None = None, parents: bool = True
    ) -> FileInfo:
        """Copy a host file into the guest, with its permission bits."""
        with Path(local).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            return self.write(path, file, mode=mode, user=user, parents=parents)

    def download(self, path: str, local: str | os.PathLike[str]) -> None:
        """Copy a guest file to the host. The host file appears whole or not at all."""
        place = Path(local)
        partial = place.with_name(f".{place.name}.limpet-part")
        try:
            with partial.open("xb") as file:
                with self.stream(path) as chunks:
                    for chunk in chunks:
                        file.write(chunk)
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)


class Archive:
    """Trees of the guest as tar streams."""

    def __init__(self, transport: Transport, sandbox: Sandbox) -> None:
        self._transport, self._sandbox = transport, sandbox

    @contextlib.contextmanager
    def get(self, path: str) -> Iterator[Iterator[bytes]]:
        """A tar of `path`, in pieces."""
        with self._transport.stream("GET", self._sandbox.path("archive"), params={"path": path}) as response:
            yield response.iter_bytes(_wire.CHUNK)

    def put(self, path: str, data: Source, *, user: str | None = None) -> Unpacked:
        """Unpack a tar into the guest directory `path`."""
        answer = self._transport.request(
            "PUT", self._sandbox.path("archive"), params={"path": path, "user": user}, content=_body(data)
        )
        return Unpacked.model_validate(answer)

    def upload(self, local: str | os.PathLike[str], path: str, *, user: str | None = None) -> Unpacked:
        """Copy a host directory (or file) so that it is at `path` in the guest."""
        parent, name = posixpath.split(posixpath.normpath(path))
        entry = "." if name in ("", ".", "..") else name
        return self.put(path if entry == "." else parent or ".", _tar.pack(Path(local), entry), user=user)

    def download(self, path: str, local: str | os.PathLike[str]) -> int:
        """Copy a guest tree so that it is at `local` on the host; the number of entries. Nothing is written outside
        of it, whatever the guest sends; ownership is not kept."""
        place = Path.cwd() / local
        reading, writing = os.pipe()
        count: builtins.list[int] = []

        def take() -> None:
            with os.fdopen(reading, "rb") as archive:
                count.append(_sio.in_thread(_tar.unpack, archive, place.parent, place.name))

        taking = _sio.Background(take)
        try:
            with self.get(path) as chunks:
                for chunk in chunks:
                    _sio.in_thread(_write_all, writing, chunk)
        except BrokenPipeError:
            pass  # the reader gave up: join tells why
        finally:
            os.close(writing)
        taking.join()
        return count[0]


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _size(data: Source) -> int | None:
    """How many bytes will come, where that can be known."""
    if isinstance(data, str):
        return len(data.encode())
    if isinstance(data, bytes):
        return len(data)
    fileno, tell = getattr(data, "fileno", None), getattr(data, "tell", None)
    if fileno is None or tell is None:
        return None
    try:
        found = os.fstat(fileno())
        return found.st_size - tell() if stat.S_ISREG(found.st_mode) else None
    except OSError:  # io.BytesIO has no descriptor, a pipe has no position
        return None


def _body(data: Source) -> Iterator[bytes]:
    """The content in pieces that are worth a system call."""
    if isinstance(data, str):
        data = data.encode()
    if isinstance(data, bytes):
        for start in range(0, len(data), _wire.CHUNK):
            yield data[start : start + _wire.CHUNK]
    elif (read := getattr(data, "read", None)) is not None:
        while chunk := read(_wire.CHUNK):
            yield chunk
    else:
        for chunk in _sio.iterate(data):
            yield chunk
